//! The log's own work beside those who write and read: it follows the numbers and acknowledges what later events have
//! cleared, tells what the damper held back, and prunes a log that grows faster than the recurring job comes.
//!
//! Every thousand events it notes how far it has come and which alerts are open; a start goes on from the note, since to read
//! 100,000 events costs sled 30 MB of memory that it never gives back. The note is written only behind the acknowledgements,
//! so a death at any point loses none: what is done twice is done already. While the keeper runs, and only then, events are
//! held back.
//!
//! The log's bound on disk is therefore twice `events.history`, and what is written while the surplus is deleted.

use super::damper::{Damper, Key};
use super::log::is_for_good;
use super::{Event, Log};
use crate::model::EventNumber;
use crate::store::{StoreError, Txn};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Events looked at in one go.
const PAGE: usize = 512;
/// Between two pages of a long way: others read, too.
const BREATH: Duration = Duration::from_millis(5);
/// Events between two notes. A start reads at most so many more than were written after its death.
const NOTE_EVERY: u64 = 1000;
/// After the store has refused something.
const RETRY: Duration = Duration::from_secs(5);
/// Acknowledgements in one transaction: few enough for its bound even if each event is as large as one may be.
const ACKNOWLEDGED_AT_ONCE: usize = 15;

/// Runs until `stop`.
pub async fn run(log: Log, stop: CancellationToken) {
    let others = async {
        tokio::select! {
            _ = async { tokio::join!(follow(&log), keep_bounded(&log)) } => {}
            () = stop.cancelled() => {}
        }
    };
    // Not cut off while it tells something.
    tokio::join!(others, damp(&log, &stop));
}

async fn follow(log: &Log) {
    let mut changed = log.changed();
    let Some((recalled, is_noted)) = insist(|| log.recall()).await else { return };
    acknowledge(log, recalled.cleared).await;
    let mut at = recalled.last;
    let mut noted = is_noted.then_some(at.0);
    loop {
        changed.mark_unchanged();
        if noted.is_none_or(|noted| at.0 - noted >= NOTE_EVERY) {
            if let Err(error) = log.note(at).await {
                tracing::debug!(%error, "how far the events were followed is not noted");
            }
            noted = Some(at.0);
        }
        let Some(absorbed) = insist(|| log.absorb(at, PAGE)).await else { return };
        at = absorbed.last;
        acknowledge(log, absorbed.cleared).await;
        if at < log.last() {
            tokio::time::sleep(BREATH).await;
        } else if changed.changed().await.is_err() {
            return;
        }
    }
}

/// Until it is done. `None`: the store was closed.
async fn insist<T, F: Future<Output = Result<T, StoreError>>>(work: impl Fn() -> F) -> Option<T> {
    loop {
        match work().await {
            Ok(done) => return Some(done),
            Err(StoreError::Closed) => return None,
            Err(error) => tracing::warn!(%error, "the events cannot be followed"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// As the types of the events say that cleared them. Comes back when all are acknowledged that can be.
async fn acknowledge(log: &Log, cleared: Vec<(EventNumber, String)>) {
    for same in cleared.chunk_by(|(_, a), (_, b)| a == b) {
        let by = format!("agent: {}", same[0].1);
        for some in same.chunks(ACKNOWLEDGED_AT_ONCE) {
            let numbers: Vec<EventNumber> = some.iter().map(|(number, _)| *number).collect();
            if acknowledge_some(log, &numbers, &by).await {
                continue;
            }
            // One of them is damaged: the others need not stay open for it.
            for number in numbers {
                if !acknowledge_some(log, &[number], &by).await {
                    tracing::warn!(event_id = %number, by, "an alert that is over is left open, since it cannot be written");
                }
            }
        }
    }
}

/// Until it is done. `false`: that can never be.
async fn acknowledge_some(log: &Log, numbers: &[EventNumber], by: &str) -> bool {
    loop {
        match log.acknowledge(numbers, by).await {
            // What a closed store does not take, the next start's does: it has no note of it.
            Ok(_) | Err(StoreError::Closed) => return true,
            Err(error) if is_for_good(&error) => return false,
            Err(error) => tracing::warn!(%error, by, "alerts that are over are not acknowledged"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn damp(log: &Log, stop: &CancellationToken) {
    *log.damper() = Some(Damper::new());
    loop {
        let next = log.damper().as_ref().and_then(Damper::next_due);
        // Nothing is due: woken when something is held back.
        let due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            () = log.held_back() => continue,
            () = stop.cancelled() => return,
        }
        let due = log.damper().as_mut().map(|damper| damper.due(Instant::now()));
        let mut failed = false;
        for (key, event) in due.into_iter().flatten() {
            failed |= !log.tell(&key, &event).await;
        }
        if failed {
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

async fn keep_bounded(log: &Log) {
    let mut changed = log.changed();
    loop {
        changed.mark_unchanged();
        if log.is_overfull().await {
            match log.prune().await {
                Ok(events) => tracing::info!(events, "a log of events that grew quickly was pruned"),
                Err(error) => tracing::warn!(%error, "a log of events that grows quickly is not pruned"),
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

impl Log {
    /// Whether that went well; if not, it stays to be told.
    async fn tell(&self, key: &Key, event: &Event) -> bool {
        let told = self.publish_with(event, Txn::essential()).await;
        if let Err(error) = &told {
            tracing::warn!(%error, object = event.object, "what was held back is not told");
        }
        if let Some(damper) = self.damper().as_mut() {
            if told.is_ok() { damper.told(key) } else { damper.failed(key) }
        }
        self.told().notify_waiters();
        told.is_ok()
    }

    /// Tells all that is held back, and waits for what is being told; nothing is held back any more from then on. For an
    /// orderly stop, which has a deadline.
    pub async fn flush(&self) {
        loop {
            let told = self.told().notified();
            let (held, is_busy) = {
                let mut damper = self.damper();
                let held = damper.as_mut().map(Damper::all).unwrap_or_default();
                let is_busy = damper.as_ref().is_some_and(Damper::is_busy);
                if !is_busy {
                    *damper = None;
                }
                (held, is_busy)
            };
            if !is_busy {
                return;
            }
            if held.is_empty() {
                // The keeper writes it at the moment.
                told.await;
            }
            for (key, event) in held {
                if !self.tell(&key, &event).await {
                    // Whoever stops does not wait for a store to get well.
                    *self.damper() = None;
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::event::catalogue::Kind;
    use crate::event::{Query, Severity, kind};
    use crate::store::Store;

    async fn log_on(store: Store, history: usize) -> Log {
        Log::open(store, &config::Events { history }).await.unwrap()
    }

    fn event(kind: Kind, object: &str) -> Event {
        Event::new(kind, object, format!("{object} {}", kind.as_str()))
    }

    async fn all(log: &Log) -> Vec<(EventNumber, Event)> {
        log.list(&Query { limit: 100_000, ..Query::default() }).await.unwrap().events
    }

    async fn open(log: &Log) -> Vec<u64> {
        let open = all(log).await.into_iter();
        let open = open.filter(|(_, e)| e.severity >= Severity::Warning && e.acknowledged.is_none());
        open.map(|(number, _)| number.0).collect()
    }

    /// A keeper, until dropped.
    struct Kept(CancellationToken);

    fn kept(log: &Log) -> Kept {
        let stop = CancellationToken::new();
        tokio::spawn(run(log.clone(), stop.clone()));
        Kept(stop)
    }

    impl Drop for Kept {
        fn drop(&mut self) {
            self.0.cancel();
        }
    }

    async fn seconds(n: f64) {
        tokio::time::sleep(Duration::from_secs_f64(n)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_alert_is_acknowledged_when_what_clears_it_comes_and_says_by_what() {
        let log = log_on(Store::memory(), 100).await;
        let _kept = kept(&log);
        log.publish(&event(kind::VM_CRASHED, "vm/a")).await.unwrap();
        log.publish(&event(kind::VM_CRASHED, "vm/b")).await.unwrap();
        log.publish(&event(kind::DOMAIN_UNKNOWN, "host")).await.unwrap();
        seconds(1.0).await;
        assert_eq!((log.open_alerts(), log.written()), ([0, 1, 2, 0], [0, 1, 2, 0]));
        log.publish(&event(kind::VM_STARTED, "vm/a")).await.unwrap();
        seconds(1.0).await;
        assert_eq!(open(&log).await, [2, 3]);
        assert_eq!(all(&log).await[0].1.acknowledged.as_ref().unwrap().by, "agent: vm.started");
        assert_eq!((log.open_alerts(), log.written()), ([0, 1, 1, 0], [1, 1, 2, 0]));
        // By hand.
        log.acknowledge(&[EventNumber(3)], "local:0").await.unwrap();
        assert_eq!(log.open_alerts(), [0, 0, 1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_died_before_it_acknowledged_does_so_at_its_next_start() {
        let mut store = Store::memory();
        let log = log_on(store.clone(), 10_000).await;
        for n in 0..4000 {
            let object = format!("vm/{}", n % 700);
            let kind = if n < 3300 { kind::VM_CRASHED } else { kind::VM_STARTED };
            log.publish(&event(kind, &object)).await.unwrap();
        }
        assert_eq!(open(&log).await.len(), 3300);
        // Each life dies after a few acknowledgements.
        for life in 0..1000 {
            store = store.crash_copy();
            let dead = store.die_after(3);
            let log = log_on(store.clone(), 10_000).await;
            let kept = kept(&log);
            seconds(600.0).await;
            drop(kept);
            if !dead.is_cancelled() {
                assert_eq!(open(&log).await, [0; 0]);
                assert!(life > 20, "it has died often");
                assert_eq!(log.open_alerts(), [0; 4]);
                assert_eq!(log.written(), [0; 4], "none of them was written in this life");
                return;
            }
        }
        panic!("it makes no way");
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_goes_on_from_the_note_and_knows_what_was_open_before_it() {
        let mut store = Store::memory();
        let log = log_on(store.clone(), 100_000).await;
        let first_life = kept(&log);
        seconds(1.0).await;
        log.publish(&event(kind::VM_CRASHED, "vm/early")).await.unwrap();
        log.publish(&event(kind::DOMAIN_UNKNOWN, "host")).await.unwrap();
        log.publish(&event(kind::VM_CRASHED, "vm/by_hand")).await.unwrap();
        for n in 0..20_000 {
            log.publish(&event(kind::VM_CHANGED, &format!("vm/{n}"))).await.unwrap();
        }
        seconds(60.0).await;
        drop(first_life);
        store = store.crash_copy();
        let log = log_on(store.clone(), 100_000).await;
        // Between two lives of the keeper.
        log.acknowledge(&[EventNumber(3)], "local:0").await.unwrap();
        let _kept = kept(&log);
        seconds(1.0).await;
        assert_eq!(log.open_alerts(), [0, 1, 1, 0]);
        log.publish(&event(kind::VM_STARTED, "vm/early")).await.unwrap();
        seconds(1.0).await;
        assert_eq!(open(&log).await, [2]);
        assert_eq!((log.open_alerts(), log.written()), ([0, 1, 0, 0], [1, 0, 0, 0]));
    }

    #[tokio::test(start_paused = true)]
    async fn links_that_come_and_go_are_told_a_few_times_and_then_once_how_they_stand() {
        let log = log_on(Store::memory(), 1000).await;
        let _kept = kept(&log);
        seconds(1.0).await;
        let (gone, come) = (kind::NETWORK_ADDRESS_REMOVED, kind::NETWORK_ADDRESS_ADDED);
        for n in 0..100 {
            let kind = if n % 2 == 0 { gone } else { come };
            log.publish(&event(kind, "network/eth0")).await.unwrap();
            log.publish(&event(kind::DOMAIN_UNKNOWN, "host")).await.unwrap();
            seconds(0.5).await;
        }
        assert_eq!(all(&log).await.len(), 105);
        seconds(60.0).await;
        let told = all(&log).await;
        let (_, last) = told.last().unwrap();
        assert_eq!((told.len(), last.kind.as_str(), last.severity), (106, "event.flapping", Severity::Info));
        assert_eq!(last.data["type"], "network.address_added");
        assert_eq!(last.data["count"], 95);
        // The fifth that passed was an alert; what cleared it was held back, and clears it in the end.
        assert_eq!(open(&log).await.len(), 100, "only the unknown domains are open");
        seconds(100.0).await;
        assert!(log.publish(&event(gone, "network/eth0")).await.unwrap().is_some(), "it is calm");
    }

    #[tokio::test(start_paused = true)]
    async fn an_orderly_stop_tells_what_is_held_back_and_nothing_is_held_back_without_a_keeper() {
        let log = log_on(Store::memory(), 1000).await;
        let link = event(kind::NETWORK_LINK_CHANGED, "network/eth0");
        for _ in 0..20 {
            assert!(log.publish(&link).await.unwrap().is_some(), "nobody would tell it");
        }
        let kept = kept(&log);
        seconds(1.0).await;
        for _ in 0..20 {
            log.publish(&link).await.unwrap();
        }
        assert_eq!(all(&log).await.len(), 25);
        drop(kept);
        seconds(1.0).await;
        log.flush().await;
        let told = all(&log).await;
        assert_eq!((told.len(), &told.last().unwrap().1.data["count"]), (26, &serde_json::json!(15)));
        assert!(log.publish(&link).await.unwrap().is_some());
        log.flush().await;
        assert_eq!(all(&log).await.len(), 27);
    }

    #[tokio::test(start_paused = true)]
    async fn an_orderly_stop_waits_for_what_is_being_told() {
        let log = log_on(Store::memory(), 1000).await;
        let link = event(kind::NETWORK_LINK_CHANGED, "network/eth0");
        *log.damper() = Some(Damper::new());
        for _ in 0..20 {
            log.publish(&link).await.unwrap();
        }
        // As the keeper does, whose store takes a while.
        let telling = log.damper().as_mut().unwrap().all();
        let flushed = tokio::spawn({
            let log = log.clone();
            async move { log.flush().await }
        });
        seconds(1.0).await;
        assert!(!flushed.is_finished());
        log.publish(&link).await.unwrap();
        for (key, event) in telling {
            assert!(log.tell(&key, &event).await);
        }
        seconds(1.0).await;
        assert!(flushed.is_finished());
        let told = all(&log).await;
        let counts: Vec<_> = told[5..].iter().map(|(_, event)| event.data["count"].clone()).collect();
        assert_eq!(counts, [15, 1], "also what came meanwhile");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_recalled_twice_is_open_once() {
        let log = log_on(Store::memory(), 1000).await;
        log.publish(&event(kind::VM_CRASHED, "vm/a")).await.unwrap();
        log.absorb(EventNumber(0), PAGE).await.unwrap();
        log.note(EventNumber(1)).await.unwrap();
        for _ in 0..2 {
            let (recalled, _) = log.recall().await.unwrap();
            assert_eq!((recalled.last, recalled.cleared.len()), (EventNumber(1), 0));
            assert_eq!(log.open_alerts(), [0, 0, 1, 0]);
        }
        // Its acknowledgement by hand, between two tries, is not forgotten.
        log.acknowledge(&[EventNumber(1)], "local:0").await.unwrap();
        log.recall().await.unwrap();
        assert_eq!(log.open_alerts(), [0; 4]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_that_is_damaged_is_left_out_and_the_others_are_followed() {
        let store = Store::memory();
        let log = log_on(store.clone(), 1000).await;
        log.publish(&event(kind::VM_CRASHED, "vm/a")).await.unwrap();
        log.publish(&event(kind::VM_CRASHED, "vm/a")).await.unwrap();
        log.publish(&event(kind::VM_CHANGED, "vm/b")).await.unwrap();
        let _kept = kept(&log);
        seconds(1.0).await;
        // No event any more: one that is open, and one that is not yet followed.
        let nonsense: crate::store::Table<u64> = crate::store::Table::new("event", 1);
        let spoil = async |number: u64| {
            let mut txn = Txn::new();
            txn.put(&nonsense, &EventNumber(number), &7);
            store.commit(txn).await.unwrap();
        };
        spoil(1).await;
        let mut both = Txn::new();
        event(kind::VM_CHANGED, "vm/b").append_to(&mut both);
        store.commit(both).await.unwrap();
        spoil(4).await;
        log.publish(&event(kind::VM_STARTED, "vm/a")).await.unwrap();
        seconds(60.0).await;
        let second = store.get(&crate::event::log::EVENTS, &EventNumber(2)).await.unwrap().unwrap();
        assert_eq!(second.acknowledged.unwrap().by, "agent: vm.started");
        // The next life reads past both, too.
        let log = log_on(store.crash_copy(), 1000).await;
        let _kept = kept(&log);
        seconds(60.0).await;
        assert_eq!(log.open_of(&[kind::VM_CRASHED]), Some(Vec::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_that_is_damaged_is_told_as_missing_and_holds_up_no_reader() {
        let store = Store::memory();
        let log = log_on(store.clone(), 10_000).await;
        // More than one page of rows, with a hole of whole pages in the midst.
        for n in 1..=2000u64 {
            log.publish(&event(kind::VM_CHANGED, &format!("vm/{n}"))).await.unwrap();
        }
        let nonsense: crate::store::Table<u64> = crate::store::Table::new("event", 1);
        for number in (3..=3).chain(101..=1700).chain(2000..=2000) {
            let mut txn = Txn::new();
            txn.put(&nonsense, &EventNumber(number), &7);
            store.commit(txn).await.unwrap();
        }
        let (mut told, mut gaps, mut since) = (Vec::new(), Vec::new(), EventNumber(0));
        while since < log.last() {
            let query = Query { since, limit: 1000, ..Query::default() };
            let page = log.wait(&query, Duration::from_secs(1)).await.unwrap();
            gaps.extend(page.gap.map(|gap| (gap.from.0, gap.to.0)));
            told.extend(page.events.iter().map(|(number, _)| number.0));
            since = page.last;
        }
        assert_eq!(gaps, [(3, 3), (101, 1700), (2000, 2000)]);
        assert_eq!(told, [1, 2].into_iter().chain(4..=100).chain(1701..=1999).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_that_grows_beyond_twice_its_bound_prunes_itself() {
        let log = log_on(Store::memory(), 50).await;
        let _kept = kept(&log);
        for n in 1..=1000u64 {
            log.publish(&event(kind::VM_CRASHED, &format!("vm/{n}"))).await.unwrap();
            seconds(0.1).await;
            assert!(all(&log).await.len() <= 100, "{n}");
        }
        let left = all(&log).await.len() as u64;
        assert_eq!(log.open_alerts(), [0, 0, left, 0], "what is not kept is not open");
    }
}
