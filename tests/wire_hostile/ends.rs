//! How connections end: hang-ups, half-closed streams, drains; and the client's side of it.

use crate::support::*;
use dom0d::config;
use dom0d::model::Secret;
use dom0d::wire::{Client, ClientError, Credentials, ServerTrust, Value};
use std::time::Duration;
use tokio::io::AsyncWriteExt;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_closes_its_sending_half_still_gets_its_answer() {
    let host = start();
    let mut stream = host.plain().await;
    stream.write_all(&post(&good(), &call("wait"))).await.unwrap();
    stream.shutdown().await.unwrap();
    host.working(1).await;
    host.echo.release.notify_one();
    assert_eq!(value(&rest(&mut stream).await), Ok(Value::from("released")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_caller_hung_up_is_dropped() {
    let host = start();
    let mut plain = host.plain().await;
    plain.write_all(&post(&good(), &call("wait"))).await.unwrap();
    host.working(1).await;
    drop(plain);
    host.working(0).await;

    for mut client in [host.client(Some(PASSWORD), None), Client::unix(&host.socket)] {
        let error = client.call("wait", &[], Duration::from_millis(500)).await.unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        host.working(0).await;
        assert_eq!(client.call("echo", &[Value::from(1)], PATIENCE).await.unwrap(), Value::from(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_the_call_under_way_finish_and_closes_what_is_quiet() {
    let host = start();
    let mut idle = host.plain().await;
    idle.write_all(&post(&good(), &echo_call("x"))).await.unwrap();
    let untouched = host.plain().await;
    let mut busy = host.plain().await;
    busy.write_all(&post(&good(), &call("wait"))).await.unwrap();
    host.working(1).await;
    let drained = async { host.server.drain(PATIENCE).await };
    let others = async {
        assert!(value(&rest(&mut idle).await).is_ok());
        until(|| host.server.open_connections() == 1).await;
        assert!(tokio::net::TcpStream::connect(host.address).await.is_err(), "still accepts");
        host.echo.release.notify_one();
        rest(&mut busy).await
    };
    let (cut, answer) = tokio::join!(drained, others);
    assert_eq!((cut, value(&answer)), (0, Ok(Value::from("released"))));
    drop(untouched);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_cuts_what_takes_too_long() {
    let host = start();
    let mut client = host.client(Some(PASSWORD), None);
    let waiting = client.call("wait", &[], PATIENCE);
    let draining = async {
        host.working(1).await;
        host.server.drain(Duration::from_millis(50)).await
    };
    let (answer, cut) = tokio::join!(waiting, draining);
    assert_eq!(cut, 1);
    assert!(answer.is_err());
    host.working(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_socket_knows_its_caller_and_asks_for_no_password() {
    let host = start();
    let mut client = Client::unix(&host.socket);
    let who = client.call("who", &[], PATIENCE).await.unwrap();
    assert_eq!(who, Value::String(format!("local:{}", nix::unistd::geteuid())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_calls_again_after_the_server_closed_the_kept_connection() {
    let host = start_with(config::Wire { idle_timeout_ms: 2000, ..settings() }, 10);
    let mut client = host.client(Some(PASSWORD), None);
    for closed in 1..4 {
        assert_eq!(client.call("echo", &[Value::from(closed)], PATIENCE).await.unwrap(), Value::from(closed));
        assert!(client.is_connected());
        host.timeouts(u64::try_from(closed).unwrap()).await;
        // The server counts before it closes; a call in between may have been heard, and is not made twice.
        until(|| !client.is_connected()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_calls_only_the_server_it_trusts() {
    let host = start();
    let credentials = Credentials { password: Some(Secret::new(PASSWORD)), certificate: None };
    let named = |name: &str| ServerTrust::Ca { der: host.ca.der.clone(), name: Some(name.to_owned()) };
    for (trust, trusted) in [
        (host.ca.trust(), true),
        (named("dom0.test"), true),
        (named("other.test"), false),
        (ca().trust(), false),
        (ServerTrust::Pinned { der: ca().der }, false),
    ] {
        let mut client = Client::tls(host.address, &trust, &credentials).unwrap();
        let answer = client.call("echo", &[], PATIENCE).await;
        assert_eq!(answer.is_ok(), trusted, "{trust:?}: {answer:?}");
        assert!(trusted || matches!(answer, Err(ClientError::Connect { .. })), "{answer:?}");
    }
    let pinned = self_signed(params());
    host.tls.replace(&pinned.identity).unwrap();
    let mut client =
        Client::tls(host.address, &ServerTrust::Pinned { der: pinned.der.clone() }, &credentials).unwrap();
    assert_eq!(client.call("echo", &[], PATIENCE).await.unwrap(), Value::Nil);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_never_shows_its_password() {
    let host = start();
    let mut client = host.client(Some("hunter2"), None);
    let error = client.call("echo", &[], PATIENCE).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { status: 403, .. }), "{error}");
    let shown = format!("{client:?} {error:?} {error}");
    let header = basic("oracle", "hunter2");
    let encoded = header.trim_end().rsplit(' ').next().unwrap();
    assert!(!shown.contains("hunter2") && !shown.contains(encoded), "{shown}");
}
