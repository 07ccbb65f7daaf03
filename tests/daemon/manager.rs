//! Delivery to a manager over real TLS: everything it may do to us, and our own death in between.

use crate::receiver::{Mood, Receiver};
use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::wire::Value;
use std::time::Duration;

const MANAGER: &str = "0004fb00000100007a5fb1c2d3e4f506";

/// The newer form: a URL for each stream, and the certificate.
fn ownership(receiver: &Receiver) -> Value {
    structure([
        ("manager_uuid", text(MANAGER)),
        ("manager_event_url", text(receiver.url("/events"))),
        ("manager_statistic_url", text(receiver.url("/statistics"))),
        ("manager_certificate", text(&receiver.pem)),
    ])
}

async fn owned(home: &Home, receiver: &Receiver) -> Daemon {
    home.settings("[manager]\npost_timeout_ms = 2000\n");
    owned_as_set(home, receiver).await
}

async fn owned_as_set(home: &Home, receiver: &Receiver) -> Daemon {
    let daemon = home.start().await;
    daemon.local().ask("take_ownership", &[ownership(receiver)]).await;
    daemon
}

/// So many events happen.
async fn happens(daemon: &Daemon, count: usize) {
    let mut caller = daemon.local();
    for n in 0..count {
        caller.ask("notify_manager", &[text(format!("word {n}"))]).await;
    }
}

async fn newest(daemon: &Daemon) -> u64 {
    let page = daemon.local().ask("event_list", &[structure([("limit", int(1))])]).await;
    number(field(&page, "last"))
}

/// Waits until the manager has taken all there is.
async fn all_taken(daemon: &Daemon) {
    let mut caller = daemon.local();
    until("all events are taken", PATIENCE, async || {
        let status = caller.ask("manager_status", &[]).await;
        let events = &list(field(&status, "streams"))[0];
        string(field(events, "state")) == "idle" && number(field(events, "behind")) == 0
    })
    .await;
}

/// From the first on each number comes, first in its order; and an id is always of the same number.
fn assert_whole(receiver: &Receiver, last: u64) {
    let items = receiver.items("/events");
    assert!(items.iter().all(|item| item["type"] != "dom0d.gap"), "nothing was lost");
    let numbers = receiver.numbers();
    let mut expected = *numbers.first().expect("something came");
    for number in &numbers {
        assert!(*number <= expected, "{number} came before {expected}: {numbers:?}");
        expected = expected.max(number + 1);
    }
    assert!(expected > last, "{last} never came: {numbers:?}");
    let mut ids = std::collections::BTreeMap::new();
    for item in items.iter().filter(|item| item["data"]["number"].is_u64()) {
        let known = ids.entry(item["id"].to_string()).or_insert_with(|| item["data"].clone());
        assert_eq!(*known, item["data"], "an id stands for one event");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_and_statistics_reach_the_manager_which_sees_our_certificate() {
    let (home, receiver) = (Home::new(), Receiver::start().await);
    let daemon = owned(&home, &receiver).await;
    let mut caller = daemon.local();
    caller.ask("set_statistics_interval", &[int(10)]).await;
    happens(&daemon, 3).await;
    all_taken(&daemon).await;
    let told = receiver.items("/events");
    let word = told.iter().find(|item| item["type"] == "dom0d.manager.notification").unwrap();
    assert_eq!(word["data"]["text"], "word 0");
    assert_eq!(word["specversion"], "1.0");
    // From the taking on, that with it.
    assert_eq!(told[0]["type"], "dom0d.host.changed", "{told:?}");
    let own = string(field(&caller.ask("certificate_get", &[]).await, "fingerprint"));
    until("a sample comes", PATIENCE, async || !receiver.items("/statistics").is_empty()).await;
    for post in receiver.posts() {
        assert_eq!(post.shown, own, "{}", post.head);
        assert!(post.head.contains("content-type: application/cloudevents-batch+json"), "{}", post.head);
    }
    let samples = receiver.items("/statistics");
    let host = samples.iter().find(|item| item["subject"] == "host").unwrap();
    let figures = host["data"]["figures"].as_array().unwrap();
    let load = figures.iter().find(|figure| figure["metric"] == "host_memory_total").unwrap();
    assert!(load["value"].as_f64().unwrap() > 0.0);
    let status = caller.ask("manager_status", &[]).await;
    assert_eq!(string(field(&status, "manager")), MANAGER);
    let probes = caller.ask("manager_test", &[]).await;
    assert!(list(&probes).iter().all(|probe| *field(probe, "ok") == Value::Bool(true)), "{probes:?}");
    caller.ask("release_ownership", &[text(MANAGER)]).await;
    // The event of the release itself may still be on its way to whom it is about.
    until("nothing is sent any more", PATIENCE, async || {
        let status = caller.ask("manager_status", &[]).await;
        list(field(&status, "streams")).iter().all(|stream| string(field(stream, "state")) == "unset")
    })
    .await;
    let released = newest(&daemon).await;
    assert!(caller.refused("manager_test", &[]).await.contains("NOT_OWNED"));
    happens(&daemon, 2).await;
    let told = receiver.numbers();
    assert!(told.iter().all(|number| *number <= released), "who does not own us is told nothing: {told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_manager_does_on_the_wire_nothing_is_lost_and_the_order_is_kept() {
    let (home, mut receiver) = (Home::new(), Receiver::start().await);
    let daemon = owned(&home, &receiver).await;
    for mood in [
        Mood::Status(500),
        Mood::ClosesMidAnswer,
        Mood::Slow,
        Mood::Redirects,
        Mood::ClosesMidRequest,
        Mood::StallsTls,
        Mood::Holds,
        Mood::Status(503),
    ] {
        receiver.mood.send_replace(mood);
        happens(&daemon, 5).await;
        let mut caller = daemon.local();
        until("a try fails", PATIENCE, async || {
            let status = caller.ask("manager_status", &[]).await;
            number(field(&list(field(&status, "streams"))[0], "failures_in_a_row")) > 0
        })
        .await;
        receiver.mood.send_replace(Mood::Takes);
        caller.ask("manager_test", &[]).await;
        all_taken(&daemon).await;
    }
    receiver.goes().await;
    happens(&daemon, 50).await;
    receiver.comes_back(false).await;
    daemon.local().ask("manager_test", &[]).await;
    all_taken(&daemon).await;
    assert!(receiver.items("/elsewhere").is_empty(), "a redirect is not followed");
    assert_whole(&receiver, newest(&daemon).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_shows_another_certificate_gets_nothing_and_the_operator_is_told() {
    let (home, mut receiver) = (Home::new(), Receiver::start().await);
    let daemon = owned(&home, &receiver).await;
    happens(&daemon, 1).await;
    all_taken(&daemon).await;
    receiver.goes().await;
    receiver.comes_back(true).await;
    let before = receiver.posts().len();
    happens(&daemon, 1).await;
    let mut caller = daemon.local();
    until("it is told", PATIENCE, async || {
        let page = caller.ask("event_list", &[structure([("limit", int(20))])]).await;
        list(field(&page, "events")).iter().any(|event| string(field(event, "type")) == "manager.refused")
    })
    .await;
    assert_eq!(receiver.posts().len(), before);
    let status = caller.ask("manager_status", &[]).await;
    let why = string(field(&list(field(&status, "streams"))[0], "last_error"));
    assert!(why.contains("pinned") && why.matches("SHA-256").count() == 1 && why.len() > 200, "{why}");
    let probes = caller.ask("manager_test", &[]).await;
    assert!(list(&probes).iter().all(|probe| *field(probe, "ok") == Value::Bool(false)), "{probes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_of_the_older_form_is_known_by_what_it_showed_first() {
    let (home, mut receiver) = (Home::new(), Receiver::start().await);
    home.settings("[manager]\npost_timeout_ms = 2000\n");
    let daemon = home.start().await;
    let mut caller = daemon.local();
    caller.ask("take_ownership", &[text(MANAGER), text(receiver.url("/events"))]).await;
    happens(&daemon, 1).await;
    all_taken(&daemon).await;
    let status = caller.ask("manager_status", &[]).await;
    let seen = string(field(&list(field(&status, "streams"))[0], "certificate_seen"));
    let der = rustls::pki_types::pem::PemObject::from_pem_slice(receiver.pem.as_bytes());
    let der: rustls::pki_types::CertificateDer<'_> = der.unwrap();
    assert_eq!(seen, dom0d::wire::fingerprint(&der));
    // Somebody else at its address, and an agent that began anew meanwhile.
    daemon.stop().await;
    receiver.goes().await;
    receiver.comes_back(true).await;
    let before = receiver.posts().len();
    let daemon = home.start().await;
    happens(&daemon, 1).await;
    let mut caller = daemon.local();
    until("a try fails", PATIENCE, async || {
        let status = caller.ask("manager_status", &[]).await;
        number(field(&list(field(&status, "streams"))[0], "failures_in_a_row")) > 0
    })
    .await;
    assert_eq!(receiver.posts().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_at_each_point_of_a_delivery_loses_nothing() {
    let (home, mut receiver) = (Home::new(), Receiver::start().await);
    let mut daemon = owned(&home, &receiver).await;
    for mood in [
        Mood::StallsTls,
        Mood::ClosesMidRequest,
        Mood::Holds,
        Mood::ClosesMidAnswer,
        Mood::Status(500),
        Mood::Takes,
    ] {
        // With connections of the former mood it would go on in that.
        receiver.goes().await;
        receiver.mood.send_replace(mood);
        receiver.comes_back(false).await;
        let before = receiver.posts().len();
        happens(&daemon, 3).await;
        if matches!(mood, Mood::Holds | Mood::ClosesMidAnswer | Mood::Status(_) | Mood::Takes) {
            until("it is there", PATIENCE, async || receiver.posts().len() > before).await;
        }
        daemon.kill().await;
        receiver.mood.send_replace(Mood::Takes);
        daemon = home.start().await;
        all_taken(&daemon).await;
    }
    assert_whole(&receiver, newest(&daemon).await);
    // At each of its commits: events, cursors, whatever is written.
    daemon.stop().await;
    for point in 2..=14 {
        let mut daemon = home.start_dying(&format!("{point}:before")).await;
        let mut caller = daemon.local();
        while caller.call("notify_manager", &[text("on")]).await.is_ok() {}
        daemon.child.wait().await.unwrap();
    }
    let daemon = home.start().await;
    all_taken(&daemon).await;
    assert_whole(&receiver, newest(&daemon).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_to_stop_leaves_nothing_to_be_sent_twice() {
    let (home, receiver) = (Home::new(), Receiver::start().await);
    // With the deadline of every day: what is late is sent again, and rightly so.
    let mut daemon = owned_as_set(&home, &receiver).await;
    for _ in 0..3 {
        happens(&daemon, 20).await;
        all_taken(&daemon).await;
        assert_eq!(daemon.stop().await, Some(0));
        daemon = home.start().await;
    }
    all_taken(&daemon).await;
    let numbers = receiver.numbers();
    assert!(numbers.windows(2).all(|two| two[1] == two[0] + 1), "{numbers:?}");
    tokio::time::timeout(Duration::from_secs(30), daemon.stop()).await.unwrap();
}
