//! HTTP: heads, bodies, framing, slowness.

use crate::support::*;
use dom0d::config;
use dom0d::wire::{FAULT_INTERNAL, FAULT_MALFORMED, FAULT_TOO_BIG, Value};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_post_to_the_paths_of_the_dialect_is_served() {
    let host = start();
    for (line, expected) in [
        ("POST / HTTP/1.1", "200"),
        ("POST /RPC2 HTTP/1.1", "200"),
        ("POST /api/3 HTTP/1.1", "200"),
        ("POST /api/3/ HTTP/1.1", "200"),
        ("POST /RPC2 HTTP/1.0", "200"),
        ("POST http://elsewhere/RPC2 HTTP/1.1", "200"),
        ("POST http://elsewhere HTTP/1.1", "200"),
        ("POST /RPC2/ HTTP/1.1", "404"),
        ("POST //RPC2 HTTP/1.1", "404"),
        ("POST /..%2f HTTP/1.1", "404"),
        ("POST /..%2fRPC2 HTTP/1.1", "404"),
        ("POST /x/../RPC2 HTTP/1.1", "404"),
        ("POST /%52PC2 HTTP/1.1", "404"),
        ("POST * HTTP/1.1", "404"),
        ("GET / HTTP/1.1", "405"),
        ("PUT /RPC2 HTTP/1.1", "405"),
        ("OPTIONS / HTTP/1.1", "405"),
        ("CONNECT dom0.test:80 HTTP/1.1", "405"),
        ("POST /RPC2 HTTP/2.0", "400"),
        ("POST /RPC2 HTTP/1.1\r\nno colon", "400"),
        ("POST /RPC2 HTTP/1.1\r\n folded: x", "400"),
        ("POST /RPC2 HTTP/1.1\r\nna me: x", "400"),
        ("POST /RPC2 HTTP/1.1\r\nname: \0", "400"),
        ("POST /a b HTTP/1.1", "400"),
        ("p\x01st / HTTP/1.1", "400"),
    ] {
        let body = echo_call("x");
        let mut request =
            format!("{line}\r\nHost: a\r\n{}{CLOSE}Content-Length: {}\r\n\r\n", good(), body.len())
                .into_bytes();
        request.extend_from_slice(&body);
        let answer = host.say(&request).await;
        assert_eq!(status(&answer), expected, "{line}: {answer}");
        assert_eq!(answer.to_lowercase().contains("\r\nallow: post\r\n"), expected == "405", "{answer}");
    }
    // HTTP/0.9 had no version; a connection that speaks it is answered with an error or nothing.
    assert!(["400", "none"].contains(&status(&host.say(b"GET /\r\n\r\n").await)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_whose_length_is_doubtful_is_refused() {
    let host = start();
    let body = String::from_utf8(echo_call("x")).unwrap();
    let length = body.len();
    for (framing, expected) in [
        (format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"), "411"),
        (format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"), "411"),
        ("Transfer-Encoding: chunked\r\n".to_owned(), "411"),
        ("Transfer-Encoding: identity\r\n".to_owned(), "400"),
        ("Transfer-Encoding: chunked, chunked\r\n".to_owned(), "411"),
        ("Transfer-Encoding: xchunked\r\n".to_owned(), "400"),
        (format!("Transfer-Encoding : chunked\r\nContent-Length: {length}\r\n"), "400"),
        (format!("Content-Length: {length}\r\nContent-Length: 5\r\n"), "400"),
        (format!("Content-Length: {length}, {length}\r\n"), "400"),
        ("Content-Length: -1\r\n".to_owned(), "400"),
        (format!("Content-Length: +{length}\r\n"), "400"),
        ("Content-Length: 0x10\r\n".to_owned(), "400"),
        ("Content-Length: \r\n".to_owned(), "400"),
        ("Content-Length: 99999999999999999999999\r\n".to_owned(), "400"),
        ("Content-Length: 9223372036854775807\r\n".to_owned(), "413"),
        ("Content-Length: 262145\r\n".to_owned(), "413"),
        (String::new(), "411"),
        (format!("Content-Length: {length}\r\nContent-Encoding: gzip\r\n"), "415"),
        (format!("Content-Length: {length}\r\nContent-Encoding: identity\r\n"), "200"),
        (format!("Content-Length: {length}\r\nContent-Type: application/x-anything\r\n"), "200"),
    ] {
        let chunked = format!("ffffffffffffffffff\r\n{body}\r\n0\r\n\r\n");
        let sent = if framing.contains("Transfer") { &chunked } else { &body };
        let request = format!("POST /RPC2 HTTP/1.1\r\nHost: a\r\n{}{CLOSE}{framing}\r\n{sent}", good());
        let answer = host.say(request.as_bytes()).await;
        assert_eq!(status(&answer), expected, "{framing}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{framing}: more than one answer: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_is_too_large_is_refused_and_the_client_hears_it() {
    let host = start();
    let long = format!("X-Long: {}\r\n", "a".repeat(100 * 1024));
    let many: String = (0..10_000).map(|n| format!("X-{n}: a\r\n")).collect();
    let few_but_too_many: String = (0..200).map(|n| format!("X-{n}: a\r\n")).collect();
    let endless = vec![b'a'; 1 << 20];
    for headers in [long, many, few_but_too_many] {
        let answer = host.say(&post(&headers, &echo_call("x"))).await;
        assert_eq!(status(&answer), "431", "{answer}");
    }
    let answer = host.say(&endless).await;
    assert!(["400", "431"].contains(&status(&answer)), "{answer}");
    let answer = host.say(format!("POST /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000)).as_bytes()).await;
    assert!(["414", "431"].contains(&status(&answer)), "{answer}");
}

/// Sends a byte now and then until the server has had enough, which comes sooner than our patience ends.
async fn drip_until_cut_off(stream: &mut TcpStream, byte: u8) {
    let cut_off = async {
        let mut one = [0];
        while stream.write_all(&[byte]).await.is_ok() {
            if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut one)).await {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, cut_off).await.expect("it is never cut off");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_head_is_cut_off_however_steadily_it_drips() {
    let host = start_with(hurried(), 10);
    let mut slow = host.plain().await;
    slow.write_all(b"POST /RPC2 HTTP/1.1\r\nX-Slow: ").await.unwrap();
    drip_until_cut_off(&mut slow, b'a').await;
    host.timeouts(1).await;

    let mut silent = host.plain().await;
    assert_eq!(rest(&mut silent).await, "");
    host.timeouts(2).await;

    // The second request of a connection has no more time than the first.
    let mut second = host.plain().await;
    second.write_all(&post(&good(), &echo_call("x"))).await.unwrap();
    let mut answer = vec![0; 4096];
    assert!(second.read(&mut answer).await.unwrap() > 0);
    second.write_all(b"POST /RPC2 HTTP/1.1\r\nX-Slow: ").await.unwrap();
    drip_until_cut_off(&mut second, b'a').await;
    host.timeouts(3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_body_is_cut_off() {
    let host = start_with(hurried(), 10);
    let mut slow = host.plain().await;
    let head = format!("POST /RPC2 HTTP/1.1\r\nHost: a\r\n{}Content-Length: 100000\r\n\r\n", good());
    slow.write_all(head.as_bytes()).await.unwrap();
    drip_until_cut_off(&mut slow, b'a').await;
    host.timeouts(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_connection_is_closed() {
    let host = start_with(config::Wire { idle_timeout_ms: 1000, ..settings() }, 10);
    let mut stream = host.plain().await;
    stream.write_all(&post(&good(), &echo_call("x"))).await.unwrap();
    assert!(value(&rest(&mut stream).await).is_ok());
    host.timeouts(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_takes_too_long_is_dropped() {
    let host = start_with(hurried(), 10);
    let mut slow = host.plain().await;
    slow.write_all(&post(&good(), &call("big"))).await.unwrap();
    let mut byte = [0];
    slow.read_exact(&mut byte).await.unwrap();
    host.timeouts(1).await;
    until(|| host.server.open_connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_for_continue_is_told_to_send_only_if_it_is_let_in() {
    let host = start();
    let body = echo_call("x");
    let head = |auth: &str| {
        format!(
            "POST /RPC2 HTTP/1.1\r\nHost: a\r\n{auth}{CLOSE}Expect: 100-continue\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
    };
    let mut stream = host.plain().await;
    stream.write_all(head(&good()).as_bytes()).await.unwrap();
    let mut line = String::new();
    let mut reader = BufReader::new(&mut stream);
    reader.read_line(&mut line).await.unwrap();
    assert_eq!(line, "HTTP/1.1 100 Continue\r\n");
    reader.read_line(&mut line).await.unwrap();
    reader.write_all(&body).await.unwrap();
    assert_eq!(value(&rest(&mut reader).await), Ok(Value::from("x")));

    let refused = host.say(head("").as_bytes()).await;
    assert!(status(&refused) == "403" && !refused.contains("100 Continue"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_pipelined_requests_are_answered_in_their_order() {
    let host = start();
    let mut requests = Vec::new();
    for number in 0..1000 {
        let last = if number == 999 { CLOSE } else { "" };
        requests.extend_from_slice(&post(&format!("{}{last}", good()), &echo_call(&format!("<{number}>"))));
    }
    let stream = host.plain().await;
    let (mut reader, mut writer) = stream.into_split();
    let writing = tokio::spawn(async move { writer.write_all(&requests).await.map(|()| writer) });
    let answers = rest(&mut reader).await;
    drop(writing.await.unwrap());
    let order: Vec<usize> = answers
        .split("&lt;")
        .skip(1)
        .map(|piece| piece.split("&gt;").next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(order, (0..1000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_upgraded() {
    let host = start();
    let upgrade = "Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n";
    let answer = host.say(&post(&format!("{}{upgrade}", good()), &echo_call("x"))).await;
    assert_eq!(value(&answer), Ok(Value::from("x")));
    let answer = host.say(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(!answer.contains("101") && status(&answer) != "200", "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_carries_many_calls_and_a_panic_in_one_does_not_end_it() {
    let host = start();
    let mut client = host.client(Some(PASSWORD), None);
    for number in 0..200 {
        let method = ["echo", "panic", "panic_at_once", "no_such"][number % 4];
        let answer = client.call(method, &[Value::from("x")], PATIENCE).await;
        match (method, answer) {
            ("echo", answer) => assert_eq!(answer.unwrap(), Value::from("x")),
            ("no_such", Err(dom0d::wire::ClientError::Fault(fault))) => assert_eq!(fault.fault_code, 1),
            (_, Err(dom0d::wire::ClientError::Fault(fault))) => {
                assert_eq!(fault.fault_code, FAULT_INTERNAL);
            }
            (method, other) => panic!("{method}: {other:?}"),
        }
    }
    let connections = host.server.metrics().connections.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(connections, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_call_or_makes_too_long_an_answer_is_a_fault() {
    let host = start_with(config::Wire { max_answer_bytes: 1 << 20, ..settings() }, 10);
    let faulty = |body: &[u8]| post(&format!("{}{CLOSE}", good()), body);
    for (body, code) in [
        (b"garbage".to_vec(), FAULT_MALFORMED),
        (Vec::new(), FAULT_MALFORMED),
        (vec![0xFF; 200_000], FAULT_MALFORMED),
        (call("big"), FAULT_TOO_BIG),
    ] {
        let fault = value(&host.say(&faulty(&body)).await).unwrap_err();
        assert_eq!(fault.fault_code, code, "{fault}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_up_to_the_limit_is_read_and_one_beyond_it_is_not() {
    let host = start();
    let room = settings().max_body_bytes - echo_call("").len();
    for (extra, expected) in [(0, "200"), (1, "413")] {
        let body = echo_call(&"x".repeat(room + extra));
        let answer = host.say(&post(&format!("{}{CLOSE}", good()), &body)).await;
        assert_eq!(status(&answer), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_idle_strangers_take_only_their_places() {
    // Longer than it takes them to come, however slow the machine is.
    let settings = config::Wire {
        max_connections: 50,
        max_connections_per_address: 40,
        head_timeout_ms: 600_000,
        ..settings()
    };
    let host = start_with(settings, 10);
    let mut held = Vec::new();
    for _ in 0..1000 {
        held.push(host.plain().await);
    }
    let metrics = host.server.metrics();
    until(|| metrics.connections_refused.load(std::sync::atomic::Ordering::SeqCst) == 960).await;
    assert_eq!(host.server.open_connections(), 40);
    // The operator comes in all the same.
    let mut local = dom0d::wire::Client::unix(&host.socket);
    assert_eq!(local.call("echo", &[Value::from("in")], PATIENCE).await.unwrap(), Value::from("in"));
    drop(local);
    drop(held);
    until(|| host.server.open_connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_who_says_nothing_loses_his_place() {
    let settings = config::Wire { max_connections_per_address: 10, head_timeout_ms: 2000, ..settings() };
    let host = start_with(settings, 10);
    let metrics = host.server.metrics();
    let mut held = Vec::new();
    for number in 1..=10 {
        held.push(host.plain().await);
        until(|| metrics.connections.load(std::sync::atomic::Ordering::SeqCst) == number).await;
    }
    until(|| host.server.open_connections() == 0).await;
    let answer = host.say(&post(&format!("{}{CLOSE}", good()), &echo_call("x"))).await;
    assert_eq!(value(&answer), Ok(Value::from("x")));
    drop(held);
}

#[test]
fn a_damaged_head_is_always_answered_or_closed_and_never_let_in_without_credentials() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let host = start();
    let pieces: [&[u8]; 12] = [
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b":",
        b"\r\n\r\n",
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"POST / HTTP/1.1\r\n",
        b"\xFF",
        b"99999999999999999999",
    ];
    let edit = (proptest::prelude::any::<proptest::sample::Index>(), 0..4usize, 0..pieces.len());
    let edits = proptest::collection::vec(edit, 1..5);
    proptest::proptest!(proptest::test_runner::Config::with_cases(300), |(edits in edits)| {
        let mut request = post("X-A: b\r\nConnection: close\r\n", &echo_call("x"));
        for (at, kind, piece) in edits {
            let at = at.index(request.len());
            let end = (at + [0, 1, 5, 60][kind]).min(request.len());
            request.splice(at..end, pieces[piece].iter().copied());
        }
        let answer = runtime.block_on(async {
            let mut stream = host.plain().await;
            let _ = stream.write_all(&request).await;
            // Nothing more comes, so that what looks unfinished needs not wait for its deadline.
            let _ = stream.shutdown().await;
            rest(&mut stream).await
        });
        proptest::prop_assert!(!answer.contains(" 200 "), "{}", answer);
    });
    assert_eq!(host.server.metrics().calls.load(std::sync::atomic::Ordering::SeqCst), 0);
}
