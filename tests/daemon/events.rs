//! Readers of events that go on by token: whatever happens to them or to the agent, each sees every number once, in
//! order, and nothing of what it has seen is another event later.

use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::model::{Secret, VmId};
use dom0d::wire::{Client, ClientError, Credentials, ServerTrust, Value};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

const RECONNECTS: usize = 10_000;
const DEATHS: usize = 20;
const CONSUMERS: usize = 8;

/// What a consumer has seen: number, time, text.
type Seen = Vec<(u64, String, String)>;

fn seen_in(page: &Value) -> Seen {
    let one = |event: &Value| {
        (number(field(event, "number")), string(field(event, "time")), string(field(event, "text")))
    };
    list(field(page, "events")).iter().map(one).collect()
}

/// What the consumers know of the daemon that lives at the moment, and it of them.
struct Scene {
    address: watch::Sender<SocketAddr>,
    ca_der: Vec<u8>,
    /// Answers that came on a connection of their own.
    connections: AtomicUsize,
    /// The last event there will be, once that is known.
    end: watch::Sender<Option<u64>>,
}

impl Scene {
    fn connect(&self) -> Caller {
        let credentials = Credentials { password: Some(Secret::new(PASSWORD)), certificate: None };
        let trust = ServerTrust::Ca { der: self.ca_der.clone(), name: None };
        Caller(Client::tls(*self.address.borrow(), &trust, &credentials).unwrap())
    }
}

/// A new connection for every answer, and nothing kept between two but the token.
async fn consume(scene: Arc<Scene>, mut token: Value, wait_s: u64) -> Seen {
    let mut seen = Seen::new();
    loop {
        match scene.connect().call("event_wait", &[token.clone(), int(wait_s)]).await {
            Ok(page) => {
                assert_eq!((field(&page, "lost"), field(&page, "gap")), (&Value::Bool(false), &Value::Nil));
                scene.connections.fetch_add(1, Ordering::SeqCst);
                seen.extend(seen_in(&page));
                token = field(&page, "token").clone();
            }
            // Killed, and not there again yet.
            Err(ClientError::Connect { .. } | ClientError::Broken { .. } | ClientError::Answer { .. }) => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(error) => panic!("{error}"),
        }
        if scene.end.borrow().is_some_and(|end| seen.last().is_some_and(|(n, ..)| *n >= end)) {
            return seen;
        }
    }
}

/// Makes events until the daemon is killed.
async fn make_events(socket: PathBuf) {
    let mut caller = Caller(Client::unix(&socket));
    loop {
        let vm = VmId::random();
        for (verb, params) in [
            ("create_vm", vec![text(REPO), text(vm), vm_params(vm)]),
            ("start_vm", vec![text(REPO), text(vm)]),
            ("stop_vm", vec![text(REPO), text(vm), Value::Bool(true)]),
            ("delete_vm", vec![text(REPO), text(vm)]),
        ] {
            match caller.call(verb, &params).await {
                Ok(_) => {}
                // A VM of a former life may have taken something: that is an event too.
                Err(ClientError::Fault(_)) => {}
                Err(_) => return,
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_reconnects_by_token_over_twenty_deaths_of_the_agent_see_every_event_once() {
    let home = Home::new();
    let began = Instant::now();
    let mut daemon = home.start().await;
    let stream = string(field(&daemon.local().ask("event_list", &[structure([])]).await, "token"));
    let stream = stream.split(':').next().unwrap().to_owned();
    let scene = Arc::new(Scene {
        address: watch::Sender::new(daemon.address),
        ca_der: daemon.ca_der(),
        connections: AtomicUsize::new(0),
        end: watch::Sender::new(None),
    });
    let consumers: Vec<_> = (0..CONSUMERS)
        .map(|n| {
            // One waits for what comes, and is cut off while it does; the others come and go.
            let wait_s = u64::from(n == 0);
            tokio::spawn(consume(Arc::clone(&scene), text(format!("{stream}:0")), wait_s))
        })
        .collect();
    let enough = async |target: usize| {
        until("the consumers connect", PATIENCE, async || {
            assert!(!consumers.iter().any(|consumer| consumer.is_finished()), "a consumer has failed");
            scene.connections.load(Ordering::SeqCst) >= target
        })
        .await;
    };
    for life in 1..=DEATHS {
        let maker = tokio::spawn(make_events(daemon.socket.clone()));
        enough(RECONNECTS * life / (DEATHS + 1)).await;
        daemon.kill().await;
        maker.await.unwrap();
        daemon = home.start().await;
        scene.address.send_replace(daemon.address);
    }
    enough(RECONNECTS).await;
    let mut caller = daemon.local();
    caller.until_settled().await;
    caller.create(VmId::random()).await;
    let last = number(field(&caller.ask("event_list", &[structure([])]).await, "last"));
    scene.end.send_replace(Some(last));
    let mut truth = Seen::new();
    while truth.last().is_none_or(|(number, ..)| *number < last) {
        let since = truth.last().map_or(0, |(number, ..)| *number);
        let filter = structure([("since", int(since)), ("limit", int(1000))]);
        truth.extend(seen_in(&caller.ask("event_list", &[filter]).await));
    }
    for consumer in consumers {
        let seen = consumer.await.unwrap();
        assert!(seen.iter().zip(1..).all(|((number, ..), n)| *number == n), "each number once, in order");
        let known = truth.len().min(seen.len());
        assert!(seen[..known] == truth[..known], "what was seen is what there is");
        assert!(seen.len() as u64 >= last);
    }
    let connections = scene.connections.load(Ordering::SeqCst);
    println!("{connections} connections, {last} events, {DEATHS} deaths in {:?}", began.elapsed());
    assert!(connections >= RECONNECTS && last > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_none_is_refused_one_of_the_future_is_lost_and_a_gap_is_told() {
    let home = Home::new();
    home.settings("[events]\nhistory = 3\n");
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    for wrong in ["", "17", "x:1", "00ff00ff00ff00ff:", "00FF00ff00ff00ff:1"] {
        let refused = caller.refused("event_wait", &[text(wrong), int(0)]).await;
        assert!(refused.contains("INVALID_PARAMETER") && refused.contains("since"), "{refused}");
        let filter = structure([("token", text(wrong))]);
        let refused = caller.refused("event_list", &[filter]).await;
        assert!(refused.contains("INVALID_PARAMETER") && refused.contains("filter"), "{refused}");
    }
    let refused = caller.refused("event_wait", &[Value::Bool(true), int(0)]).await;
    assert!(refused.contains("since") && refused.contains("boolean"), "{refused}");
    let both = structure([("since", int(1)), ("token", text("00ff00ff00ff00ff:1"))]);
    assert!(caller.refused("event_list", &[both]).await.contains("one of them"));

    // The bound is three, so at seven the log prunes itself.
    let first = field(&caller.ask("event_list", &[structure([])]).await, "token").clone();
    until("the log is pruned", PATIENCE, async || {
        caller.create(VmId::random()).await;
        *field(&caller.ask("event_wait", &[first.clone(), int(0)]).await, "lost") == Value::Bool(true)
    })
    .await;
    let page = caller.ask("event_wait", &[first, int(0)]).await;
    let (gap, events) = (field(&page, "gap"), seen_in(&page));
    assert_eq!(number(field(gap, "to")) + 1, events[0].0, "the gap ends where the events begin");

    let token = string(field(&page, "token"));
    let (stream, last) = token.split_once(':').unwrap();
    let ahead = format!("{stream}:{}", last.parse::<u64>().unwrap() + 1_000_000);
    let page = caller.ask("event_wait", &[text(ahead), int(300)]).await;
    assert_eq!(field(&page, "lost"), &Value::Bool(true), "the store was set back");
    let page = caller.ask("event_wait", &[int(1_000_000), int(300)]).await;
    assert_eq!(field(&page, "lost"), &Value::Bool(true), "a number is no other than a token");
    assert!(!seen_in(&page).is_empty(), "all that is kept");
    // Only what was asked for.
    let one = structure([("limit", int(1)), ("object", text("nothing"))]);
    let page = caller.ask("event_wait", &[field(&page, "token").clone(), int(0), one]).await;
    assert_eq!((seen_in(&page).len(), field(&page, "lost")), (0, &Value::Bool(false)));
}
