//! Delivery in virtual time, to a manager in memory that takes, refuses, hangs and dies as it is told.

use super::runner::SAVE_EVERY;
use super::*;
use crate::config;
use crate::event::{Event, Log, kind};
use crate::model::Timestamp;
use crate::stats::{Figure, MetricId, Object, ObjectFigures, Sweep};
use crate::store::{Store, Txn};
use crate::wire::{Destination, PostError, TlsIdentity};
use async_trait::async_trait;
use bytes::Bytes;
use serde_json::Value;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What becomes of the next POST.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mood {
    Takes,
    Absent,
    Status(u16),
    /// It took the body, and its answer broke off.
    TakesAndBreaks,
    /// Takes it when the cursor should have been written long ago. The clock then stands between two ticks of timers, as
    /// real clocks do: a timer for now comes too late for what is there already.
    Dawdles,
    /// Never answers.
    Hangs,
    Impostor,
    /// Takes no more than so many items at once.
    TakesUpTo(usize),
    /// The same, but says nothing and closes.
    Chokes(usize),
}

#[derive(Default)]
struct Book {
    /// All that came, in its order, also what was refused afterwards.
    events: Vec<Value>,
    statistics: Vec<Value>,
    posts: usize,
}

/// The manager: a mood for each stream, and what it has got.
#[derive(Clone)]
struct Manager {
    book: Arc<Mutex<Book>>,
    events: watch::Sender<Mood>,
    statistics: watch::Sender<Mood>,
}

impl Manager {
    fn new() -> Self {
        Self {
            book: Arc::default(),
            events: watch::Sender::new(Mood::Takes),
            statistics: watch::Sender::new(Mood::Takes),
        }
    }

    fn numbers(&self) -> Vec<u64> {
        let book = self.book.lock().unwrap();
        book.events.iter().filter_map(|item| item["data"]["number"].as_u64()).collect()
    }

    fn gaps(&self) -> Vec<(u64, u64)> {
        let book = self.book.lock().unwrap();
        let gaps = book.events.iter().filter(|item| item["type"] == "dom0d.gap");
        gaps.map(|gap| (gap["data"]["from"].as_u64().unwrap(), gap["data"]["to"].as_u64().unwrap())).collect()
    }

    fn samples(&self) -> usize {
        self.book.lock().unwrap().statistics.len()
    }

    fn kinds(&self, kind: &str) -> usize {
        self.book.lock().unwrap().events.iter().filter(|item| item["type"] == kind).count()
    }
}

struct Way {
    manager: Manager,
    stream: Stream,
}

impl Connect for Manager {
    fn open(&self, destination: Destination) -> Result<Box<dyn Carrier>, PostError> {
        let stream = if destination.path == "/events" { Stream::Events } else { Stream::Statistics };
        Ok(Box::new(Way { manager: self.clone(), stream }))
    }
}

#[async_trait]
impl Carrier for Way {
    async fn post(
        &mut self,
        content_type: &'static str,
        _: Option<&str>,
        body: Bytes,
        patience: Duration,
    ) -> Result<(), PostError> {
        assert_eq!(content_type, "application/cloudevents-batch+json");
        let mood = match self.stream {
            Stream::Events => *self.manager.events.borrow(),
            Stream::Statistics => *self.manager.statistics.borrow(),
        };
        tokio::time::sleep(Duration::from_millis(2)).await;
        self.manager.book.lock().unwrap().posts += 1;
        if mood == Mood::Absent {
            return Err(PostError::Connect(std::io::ErrorKind::ConnectionRefused.into()));
        }
        let items: Vec<Value> = serde_json::from_slice(&body).unwrap();
        let take = |items: Vec<Value>| {
            let mut book = self.manager.book.lock().unwrap();
            match self.stream {
                Stream::Events => book.events.extend(items),
                Stream::Statistics => book.statistics.extend(items),
            }
        };
        match mood {
            Mood::Takes => take(items),
            Mood::Dawdles => {
                tokio::time::advance(SAVE_EVERY + Duration::from_micros(100)).await;
                take(items);
            }
            Mood::TakesUpTo(most) | Mood::Chokes(most) if items.len() <= most => take(items),
            Mood::Chokes(_) => return Err(PostError::Broken("reset".to_owned())),
            Mood::TakesUpTo(_) => return Err(PostError::Status(413)),
            Mood::Absent => unreachable!("answered above, before anything was read"),
            Mood::Status(status) => return Err(PostError::Status(status)),
            Mood::TakesAndBreaks => {
                take(items);
                return Err(PostError::Broken("closed".to_owned()));
            }
            Mood::Hangs => {
                tokio::time::sleep(patience).await;
                return Err(PostError::Timeout(patience));
            }
            Mood::Impostor => {
                return Err(PostError::Certificate("another".to_owned()));
            }
        }
        Ok(())
    }
}

/// An agent's part that delivers, with its store.
struct Agent {
    store: Store,
    log: Log,
    outbox: Arc<Outbox>,
    deliveries: Deliveries,
    stop: CancellationToken,
}

fn target(manager: &str, since: Timestamp) -> Target {
    Target {
        manager: manager.to_owned(),
        since,
        taken: since,
        from_event: Some(0),
        source: "urn:uuid:1".to_owned(),
        event_url: Some("https://manager/events".to_owned()),
        statistic_url: Some("https://manager/statistics".to_owned()),
        pin: Some(b"certificate".to_vec()),
        identity: Ok(TlsIdentity { chain_pem: String::new(), key_pem: crate::model::Secret::new("") }),
    }
}

impl Agent {
    async fn start(store: Store, manager: &Manager, history: usize) -> Self {
        let log = Log::open(store.clone(), &config::Events { history }).await.unwrap();
        let (outbox, stop) = (Arc::new(Outbox::default()), CancellationToken::new());
        let parts = Parts {
            store: store.clone(),
            log: log.clone(),
            settings: config::Manager::default(),
            connect: Arc::new(manager.clone()),
            stop: stop.clone(),
        };
        let us = "urn:uuid:1".to_owned();
        let events = Arc::new(EventSource::new(log.clone(), "log1".to_owned(), us.clone()));
        let statistics = Arc::new(SampleSource::new(Arc::clone(&outbox), "log1".to_owned(), us));
        let deliveries = Deliveries::start(parts, events, statistics);
        Self { store, log, outbox, deliveries, stop }
    }

    async fn owned(store: Store, manager: &Manager, history: usize) -> Self {
        let agent = Self::start(store, manager, history).await;
        agent.deliveries.set_target(Some(target("a", Timestamp(0))));
        agent
    }

    async fn owned_since(since: Timestamp, manager: &Manager) -> Self {
        let agent = Self::start(Store::memory(), manager, 10_000).await;
        agent.deliveries.set_target(Some(target("a", since)));
        agent
    }

    async fn happens(&self, count: u64) {
        for n in 0..count {
            self.log.publish(&event(n)).await.unwrap();
        }
    }

    /// Waits in virtual time until the manager has taken all there is.
    async fn all_taken(&self) {
        for _ in 0..100_000 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let taken = |(_, status): &(Stream, Status)| status.behind == 0;
            if self.deliveries.status().iter().all(taken) {
                return;
            }
        }
        panic!("not all is delivered: {:?}", self.deliveries.status());
    }

    fn status(&self, stream: Stream) -> Status {
        self.deliveries.status().into_iter().find(|(s, ..)| *s == stream).unwrap().1
    }
}

fn event(n: u64) -> Event {
    Event::new(kind::VM_STARTED, format!("vm/{n}"), "a VM started")
}

fn sweep() -> Arc<Sweep> {
    let figure = Figure { metric: MetricId::parse("host_load_1m").unwrap(), instance: None, value: 0.5 };
    let host =
        ObjectFigures { object: Object::Host, name: "host".into(), domid: None, figures: vec![figure] };
    Arc::new(Sweep {
        at: Timestamp::now(),
        instant: Instant::now(),
        took: Duration::ZERO,
        objects: vec![host],
        problems: Vec::new(),
    })
}

/// Each number at least once, first seen in its order, and the same id each time.
fn assert_whole(manager: &Manager, last: u64) {
    let mut expected = 1;
    let book = manager.book.lock().unwrap();
    for item in book.events.iter().filter(|item| item["data"]["number"].is_u64()) {
        let number = item["data"]["number"].as_u64().unwrap();
        assert!(number <= expected, "{number} came before {expected}");
        assert_eq!(item["id"], format!("log1-{number}"));
        expected = expected.max(number + 1);
    }
    assert_eq!(expected, last + 1);
}

#[tokio::test(start_paused = true)]
async fn what_happens_is_delivered_in_order_and_once_if_nothing_fails() {
    let manager = Manager::new();
    let agent = Agent::owned(Store::memory(), &manager, 10_000).await;
    agent.happens(2500).await;
    agent.all_taken().await;
    assert_eq!(manager.numbers(), (1..=2500).collect::<Vec<_>>());
    assert_eq!(agent.status(Stream::Events).state, State::Idle);
}

#[tokio::test(start_paused = true)]
async fn whatever_a_manager_does_nothing_is_lost_and_the_order_is_kept() {
    let manager = Manager::new();
    let agent = Agent::owned(Store::memory(), &manager, 10_000).await;
    let moods = [
        Mood::Status(500),
        Mood::TakesAndBreaks,
        Mood::Hangs,
        Mood::Takes,
        Mood::Absent,
        Mood::Status(302),
        Mood::TakesAndBreaks,
        Mood::TakesUpTo(3),
        Mood::Impostor,
    ];
    for (n, mood) in moods.iter().cycle().take(36).enumerate() {
        manager.events.send_replace(*mood);
        agent.happens(7).await;
        tokio::time::sleep(Duration::from_millis(777 * (n as u64 % 90))).await;
    }
    manager.events.send_replace(Mood::Takes);
    agent.all_taken().await;
    assert_whole(&manager, agent.log.last().0);
    assert_eq!(manager.gaps(), []);
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_takes_little_at_once_gets_it_in_little_pieces() {
    for mood in [Mood::TakesUpTo(1), Mood::Chokes(2)] {
        let manager = Manager::new();
        manager.events.send_replace(mood);
        let agent = Agent::owned(Store::memory(), &manager, 10_000).await;
        agent.happens(40).await;
        agent.all_taken().await;
        assert_whole(&manager, agent.log.last().0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_trouble_that_was_told_is_over_when_the_manager_is_left_or_another_one_comes() {
    for next in [None, Some(target("b", Timestamp(5)))] {
        let manager = Manager::new();
        manager.events.send_replace(Mood::Absent);
        let store = Store::memory();
        let agent = Agent::owned(store.clone(), &manager, 10_000).await;
        agent.happens(1).await;
        tokio::time::sleep(Duration::from_secs(200)).await;
        assert_eq!(agent.log.last().0, 2, "it was told");
        // Also over a restart, at which it is not known at once whom to deliver to.
        agent.stop.cancel();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let agent = Agent::start(store, &manager, 10_000).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(agent.log.last().0, 2);
        manager.events.send_replace(Mood::Takes);
        agent.deliveries.set_target(next);
        tokio::time::sleep(Duration::from_secs(10)).await;
        let page = agent.log.list(&crate::event::Query { limit: 10, ..Default::default() }).await.unwrap();
        assert_eq!(page.events.last().unwrap().1.kind, kind::MANAGER_LEFT);
    }
}

#[tokio::test(start_paused = true)]
async fn a_sample_is_kept_until_it_was_taken_whatever_becomes_of_its_post() {
    let manager = Manager::new();
    let agent = Agent::owned_since(Timestamp::now(), &manager).await;
    for mood in [Mood::Hangs, Mood::TakesUpTo(0), Mood::Status(500)] {
        manager.statistics.send_replace(mood);
        tokio::time::sleep(Duration::from_secs(1)).await;
        agent.outbox.offer(&sweep(), Duration::from_secs(20));
        tokio::time::sleep(Duration::from_secs(200)).await;
        assert!(agent.status(Stream::Statistics).failures > 0);
        manager.statistics.send_replace(Mood::Takes);
        agent.all_taken().await;
    }
    let book = manager.book.lock().unwrap();
    let kinds: Vec<&str> = book.statistics.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["dom0d.statistics"; 3]);
}

#[tokio::test(start_paused = true)]
async fn one_stream_that_hangs_does_not_hold_the_other_nor_whoever_publishes() {
    let manager = Manager::new();
    manager.statistics.send_replace(Mood::Hangs);
    let agent = Agent::owned_since(Timestamp::now(), &manager).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    agent.outbox.offer(&sweep(), Duration::from_secs(20));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let begun = Instant::now();
    agent.happens(10).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((manager.numbers().len(), manager.samples()), (10, 0));
    manager.events.send_replace(Mood::Hangs);
    manager.statistics.send_replace(Mood::Takes);
    agent.happens(10).await;
    agent.outbox.offer(&sweep(), Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_eq!(manager.samples(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_absence_is_told_once_after_a_minute_and_so_is_its_end() {
    let manager = Manager::new();
    let agent = Agent::owned(Store::memory(), &manager, 10_000).await;
    manager.events.send_replace(Mood::Absent);
    agent.happens(1).await;
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(agent.log.last().0, 1, "not yet");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(agent.log.last().0, 2, "once");
    let status = agent.status(Stream::Events);
    assert_eq!(status.state, State::Waiting);
    assert!(status.last_error.contains("no connection") && status.next_try.is_some());
    let posts = manager.book.lock().unwrap().posts;
    assert!((60..200).contains(&posts), "{posts} tries in an hour");
    manager.events.send_replace(Mood::Takes);
    agent.all_taken().await;
    agent.all_taken().await;
    assert_eq!(manager.kinds("dom0d.manager.unreachable"), 1);
    assert_eq!(manager.kinds("dom0d.manager.reachable"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_manager_with_another_certificate_gets_nothing_and_is_told_of_at_once() {
    let manager = Manager::new();
    manager.events.send_replace(Mood::Impostor);
    let agent = Agent::owned(Store::memory(), &manager, 10_000).await;
    agent.happens(1).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(agent.log.last().0, 2);
    assert!(manager.numbers().is_empty());
    manager.events.send_replace(Mood::Takes);
    agent.all_taken().await;
    assert_eq!(manager.kinds("dom0d.manager.refused"), 1);
}

#[tokio::test(start_paused = true)]
async fn another_manager_begins_with_its_ownership_and_the_same_one_goes_on() {
    let manager = Manager::new();
    let agent = Agent::owned(Store::memory(), &manager, 10_000).await;
    agent.happens(5).await;
    agent.all_taken().await;
    agent.deliveries.set_target(None);
    tokio::time::sleep(Duration::from_secs(1)).await;
    agent.happens(5).await;
    // Wall-clock time does not stand still, and a taking that is later than all of these is.
    let since = Timestamp(Timestamp::now().0 + 1000);
    let mut after = event(11);
    after.time = Timestamp(since.0 + 1);
    agent.log.publish(&after).await.unwrap();
    agent.deliveries.set_target(Some(Target { from_event: Some(10), ..target("b", since) }));
    agent.all_taken().await;
    assert_eq!(manager.numbers(), [1, 2, 3, 4, 5, 11]);
    let old = agent.store.clone();
    agent.stop.cancel();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let again = Agent::start(old, &manager, 10_000).await;
    again.deliveries.set_target(Some(target("b", since)));
    again.happens(1).await;
    again.all_taken().await;
    assert_eq!(manager.numbers(), [1, 2, 3, 4, 5, 11, 12]);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_after_any_commit_loses_nothing_and_repeats_ids_only() {
    for dies_after in 1..60 {
        let manager = Manager::new();
        let mut store = Store::memory();
        let dead = store.die_after(dies_after);
        for mood in [Mood::Takes, Mood::TakesAndBreaks, Mood::Absent, Mood::Takes] {
            manager.events.send_replace(mood);
            let agent = Agent::owned(store.clone(), &manager, 10_000).await;
            for n in 0..6 {
                // The store may be dead: then it did not happen.
                let _ = agent.log.publish(&event(n)).await;
                tokio::time::sleep(Duration::from_millis(1100)).await;
            }
            if dead.is_cancelled() {
                drop(agent.deliveries);
                tokio::time::sleep(Duration::from_secs(1)).await;
                store = store.crash_copy();
            } else {
                agent.stop.cancel();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        // It may have died at the very end, or not yet at all.
        let store = store.crash_copy();
        let agent = Agent::owned(store, &manager, 10_000).await;
        agent.happens(1).await;
        agent.all_taken().await;
        assert_whole(&manager, agent.log.last().0);
    }
}

#[tokio::test(start_paused = true)]
async fn while_a_backlog_goes_to_a_slow_manager_the_cursor_is_never_behind_by_more_than_a_batch() {
    let manager = Manager::new();
    manager.events.send_replace(Mood::Dawdles);
    let agent = Agent::owned(Store::memory(), &manager, 10_000).await;
    agent.happens(5000).await;
    let mut taken = vec![0];
    for _ in 0..10_000 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let (number, before) = (agent.status(Stream::Events).number, *taken.last().unwrap());
        if number == before {
            continue;
        }
        // It is written before the next batch goes out.
        let cursor = Cursor::load(&agent.store, Stream::Events).await.unwrap().unwrap();
        assert!(cursor.number >= before, "{} is on disk, {taken:?} and {number} were taken", cursor.number);
        taken.push(number);
        if number == 5000 {
            break;
        }
    }
    assert!(taken.len() >= 5 && taken.last() == Some(&5000), "{taken:?}");
}

#[tokio::test(start_paused = true)]
async fn a_manager_away_for_seven_days_gets_one_gap_record_and_then_all_that_is_kept() {
    const HISTORY: u64 = 5000;
    let manager = Manager::new();
    let agent = Agent::owned(Store::memory(), &manager, HISTORY as usize).await;
    agent.happens(3).await;
    agent.all_taken().await;
    manager.events.send_replace(Mood::Absent);
    let (minutes, a_minute) = (7 * 24 * 60, Duration::from_secs(60));
    // Ten a second.
    let mut txn = Txn::new();
    for n in 0..600 {
        event(n).append_to(&mut txn);
    }
    for minute in 0..minutes {
        agent.store.commit(txn.clone()).await.unwrap();
        if minute % 10 == 9 {
            agent.log.prune().await.unwrap();
        }
        tokio::time::sleep(a_minute).await;
    }
    let last = agent.log.last().0;
    assert!(last > u64::try_from(minutes).unwrap() * 600, "{last}");
    manager.events.send_replace(Mood::Takes);
    agent.all_taken().await;
    let gaps = manager.gaps();
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    let (from, to) = gaps[0];
    let numbers = manager.numbers();
    // What was on its way when it went is kept beside what the log keeps.
    let before: Vec<u64> = (1..from).collect();
    assert_eq!(numbers, [before, ((to + 1)..=agent.log.last().0).collect()].concat());
    // One batch on its way, and the one that was read meanwhile.
    assert!((4..=2004).contains(&from), "{from}");
    assert!(numbers.len() as u64 >= HISTORY);
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_takes_one_item_at_a_time_takes_a_gap_too() {
    let manager = Manager::new();
    manager.events.send_replace(Mood::Absent);
    let agent = Agent::owned(Store::memory(), &manager, 20).await;
    agent.happens(100).await;
    agent.log.prune().await.unwrap();
    manager.events.send_replace(Mood::TakesUpTo(1));
    agent.all_taken().await;
    let first = *manager.numbers().first().unwrap();
    assert_eq!(manager.gaps(), [(1, first - 1)]);
    assert!(manager.numbers().is_sorted() && manager.numbers().len() >= 20, "{:?}", manager.numbers());
}
