//! The log of events on the store: written, read, waited for, acknowledged, pruned.

use super::clearing::{Clearing, OpenAlert};
use super::damper::Damper;
use super::token::STREAM_DIGITS;
use super::{Acknowledgement, Event, Kind, Page, Query, Token, catalogue};
use crate::config;
use crate::model::{EventNumber, JobId, Timestamp};
use crate::store::{Key, Range, Store, StoreError, Table, Txn};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

pub(super) const EVENTS: Table<Event> = Table::new("event", 1);
/// The table's name, for those who wait on its sequence. The ledger counts it by itself, as every table of appends.
pub const TABLE: &str = EVENTS.name;

/// The stream's name. In no ledger: a store that is made anew has another.
const STREAM: Table<String> = Table::new("event_stream", 1);
/// Of the tables that have one row.
const ONLY_KEY: &str = "only";

/// What the keeper knows of the events up to a number: what they clear is acknowledged, and these alerts are open.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    up_to: EventNumber,
    open: Vec<EventNumber>,
}

const NOTE: Table<Note> = Table::new("event_note", 1);

/// A store without a note is an older agent's: of its alerts, only those of so many events clear themselves.
const WITHOUT_NOTE: u64 = 10_000;

/// The log. Clones are the same log.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    /// Events kept.
    history: u64,
    stream: String,
    /// The last number before this life.
    born: EventNumber,
    /// Events written in this life, by severity, as far as the keeper has come.
    written: [AtomicU64; 4],
    clearing: Mutex<Clearing>,
    /// Only while there is a keeper, who tells in the end what was held back.
    damper: Mutex<Option<Damper>>,
    held_back: Notify,
    /// Rung when something that was held back is told, or could not be.
    told: Notify,
    /// How far the keeper has followed in this life.
    followed: AtomicU64,
    /// Held by whoever changes rows that are there, and by whoever must not read a row twice, before and after.
    rows: tokio::sync::Mutex<()>,
}

/// What the keeper has found in one page.
pub(super) struct Absorbed {
    pub last: EventNumber,
    /// Alerts to be acknowledged, and the type of the event that clears them.
    pub cleared: Vec<(EventNumber, String)>,
}

impl Log {
    pub async fn open(store: Store, settings: &config::Events) -> Result<Self, StoreError> {
        let stream = match store.get(&STREAM, ONLY_KEY).await? {
            Some(stream) => stream,
            None => new_stream(&store).await?,
        };
        let born = EventNumber(*store.sequence(TABLE).borrow());
        Ok(Self {
            inner: Arc::new(Inner {
                store,
                history: settings.history as u64,
                stream,
                born,
                written: Default::default(),
                clearing: Mutex::default(),
                damper: Mutex::default(),
                held_back: Notify::new(),
                told: Notify::new(),
                followed: AtomicU64::new(0),
                rows: tokio::sync::Mutex::default(),
            }),
        })
    }

    /// The name of this store's numbers.
    pub fn stream(&self) -> &str {
        &self.inner.stream
    }

    pub fn token(&self, number: EventNumber) -> Token {
        Token { stream: self.inner.stream.clone(), number }
    }

    /// Where a reader with this token goes on, and whether what it knows is not of this history: of another stream, or
    /// later than the newest, since the store was set back to an older state. It begins with the oldest that is kept then.
    pub fn resume(&self, token: &Token) -> (EventNumber, bool) {
        let lost = token.stream != self.inner.stream || token.number > self.last();
        (if lost { EventNumber(0) } else { token.number }, lost)
    }

    /// The number of the newest event on disk.
    pub fn last(&self) -> EventNumber {
        EventNumber(*self.inner.store.sequence(TABLE).borrow())
    }

    /// Follows [`Log::last`].
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.inner.store.sequence(TABLE)
    }

    /// Open alerts by severity (info, of which there are none, warning, error, critical), as far as the keeper has come;
    /// of very many (20,000), the newest.
    pub fn open_alerts(&self) -> [u64; 4] {
        self.clearing().counts()
    }

    /// The open alerts of some types that something may clear. `None`: the keeper has not followed all that was written.
    pub fn open_of(&self, kinds: &[Kind]) -> Option<Vec<OpenAlert>> {
        // Before the look at the numbers, or one that is written in between would seem to be followed.
        let last = self.last().0;
        let open = self.clearing().open_of(kinds);
        (self.inner.followed.load(Ordering::SeqCst) >= last).then_some(open)
    }

    /// Whether there are events that are to be told later.
    pub fn is_holding_back(&self) -> bool {
        self.damper().as_ref().is_some_and(Damper::is_busy)
    }

    /// The last number before this life.
    pub(super) fn born(&self) -> EventNumber {
        self.inner.born
    }

    /// Events written since the start, by severity, as far as the keeper has come.
    pub fn written(&self) -> [u64; 4] {
        self.inner.written.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    /// Writes one event that goes with no other change. `None`: its object's events come too quickly, and it is held back.
    pub async fn publish(&self, event: &Event) -> Result<Option<EventNumber>, StoreError> {
        if let Some(family) = catalogue::find(&event.kind).and_then(|entry| entry.damped_as)
            && !self
                .damper()
                .as_mut()
                .is_none_or(|damper| damper.take(family, event, self.last(), Instant::now()))
        {
            self.inner.held_back.notify_one();
            return Ok(None);
        }
        self.publish_with(event, Txn::essential()).await.map(Some)
    }

    /// Writes an event together with a change, which appends nothing itself.
    pub async fn publish_with(&self, event: &Event, mut change: Txn) -> Result<EventNumber, StoreError> {
        event.append_to(&mut change);
        let committed = self.inner.store.commit(change).await?;
        Ok(EventNumber(committed.appended.first().copied().unwrap_or_default()))
    }

    /// The first event of this type and job after a number, if it is kept.
    pub async fn find(
        &self,
        since: EventNumber,
        kind: Kind,
        job: Option<JobId>,
    ) -> Result<Option<EventNumber>, StoreError> {
        let mut query = Query { since, limit: 512, ..Query::default() };
        loop {
            let page = self.list(&query).await?;
            let found = page.events.iter().find(|(_, event)| event.kind == kind && event.job == job);
            if let Some((number, _)) = found {
                return Ok(Some(*number));
            }
            if page.last >= self.last() || page.last == query.since {
                return Ok(None);
            }
            query.since = page.last;
        }
    }

    /// Events that match, oldest first, and the gap if older ones were asked for than are kept.
    ///
    /// Numbers have no holes, so one that is missing was pruned, also while this reads, or cannot be read any more, which
    /// holds up nobody. Nothing newer than the newest on disk is shown: a crash could give its number to another event.
    pub async fn list(&self, query: &Query) -> Result<Page, StoreError> {
        self.page(query, |number, error| {
            tracing::warn!(%error, event_id = %number, "an event cannot be read, and is told as missing");
            Ok(())
        })
        .await
    }

    /// `damaged` says whether a row that cannot be read is as good as one that is missing.
    async fn page(
        &self,
        query: &Query,
        damaged: impl Fn(EventNumber, StoreError) -> Result<(), StoreError>,
    ) -> Result<Page, StoreError> {
        const SCAN_PAGE: usize = 512;
        let newest = self.last();
        let limit = query.limit.max(1);
        let mut page = Page { last: query.since, ..Page::default() };
        while page.last < newest {
            let range = Range::after(page.last.bytes()).limit(SCAN_PAGE);
            let rows = self.inner.store.scan_each(&EVENTS, range).await?;
            let rows = rows.into_iter().map(|(key, event)| (number(&key), event));
            let mut rows = rows.take_while(|(number, _)| *number <= newest).peekable();
            if rows.peek().is_none() {
                page.miss(newest);
                return Ok(page);
            }
            for (number, event) in rows {
                let event = match event {
                    Ok(event) => event,
                    Err(error) => {
                        damaged(number, error)?;
                        if !page.miss(number) {
                            return Ok(page);
                        }
                        continue;
                    }
                };
                if number.0 > page.last.0 + 1 && !page.miss(EventNumber(number.0 - 1)) {
                    return Ok(page);
                }
                page.last = number;
                if query.matches(&event) {
                    page.events.push((number, event));
                    if page.events.len() >= limit {
                        return Ok(page);
                    }
                }
            }
        }
        Ok(page)
    }

    /// As `list`, but waits up to `timeout` for something to answer.
    pub async fn wait(&self, query: &Query, timeout: Duration) -> Result<Page, StoreError> {
        let deadline = Instant::now() + timeout;
        let mut sequence = self.changed();
        let mut query = query.clone();
        let mut gap = None;
        loop {
            sequence.mark_unchanged();
            let mut page = self.list(&query).await?;
            gap = gap.or(page.gap);
            page.gap = gap;
            if !page.events.is_empty() || page.gap.is_some() {
                return Ok(page);
            }
            query.since = page.last;
            match tokio::time::timeout_at(deadline, sequence.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Ok(page),
            }
        }
    }

    /// Acknowledges events. Answers how many there were that nobody had acknowledged before.
    pub async fn acknowledge(&self, numbers: &[EventNumber], by: &str) -> Result<usize, StoreError> {
        let at = Timestamp::now();
        let _rows = self.inner.rows.lock().await;
        let mut txn = Txn::new();
        let mut done = std::collections::BTreeSet::new();
        for number in numbers {
            if let Some(mut event) = self.inner.store.get(&EVENTS, number).await?
                && event.acknowledged.is_none()
            {
                event.acknowledged = Some(Acknowledgement { by: by.to_owned(), at });
                txn.put(&EVENTS, number, &event);
                done.insert(*number);
            }
        }
        if !done.is_empty() {
            self.inner.store.commit(txn).await?;
            let mut clearing = self.clearing();
            done.iter().for_each(|number| clearing.forget(*number));
        }
        Ok(done.len())
    }

    /// Deletes the oldest beyond the bound. Answers how many.
    pub async fn prune(&self) -> Result<usize, StoreError> {
        /// Acknowledgements wait for so many.
        const AT_ONCE: usize = 1024;
        let mut gone = 0;
        loop {
            let _rows = self.inner.rows.lock().await;
            let keep_from = EventNumber(self.last().0.saturating_sub(self.inner.history) + 1);
            let now = self.inner.store.prune(&EVENTS, keep_from.bytes(), AT_ONCE).await?;
            gone += now;
            if now < AT_ONCE {
                self.clearing().forget_before(keep_from);
                return Ok(gone);
            }
        }
    }

    /// Whether there are more than twice as many as are to be kept.
    pub(super) async fn is_overfull(&self) -> bool {
        let kept = self.inner.store.count(TABLE).await.unwrap_or(0);
        kept > self.inner.history.saturating_mul(2)
    }

    /// Takes up what an earlier life noted, anew each time. Where to follow from, what is cleared by now, and whether there
    /// was a note. A note that cannot be read is none.
    pub(super) async fn recall(&self) -> Result<(Absorbed, bool), StoreError> {
        *self.clearing() = Clearing::default();
        let note = match self.inner.store.get(&NOTE, ONLY_KEY).await {
            Err(error) if is_for_good(&error) => {
                tracing::warn!(%error, "how far the events were followed cannot be read");
                None
            }
            note => note?,
        };
        let is_noted = note.is_some();
        let note = note.unwrap_or_else(|| Note {
            up_to: EventNumber(self.last().0.saturating_sub(WITHOUT_NOTE)),
            open: Vec::new(),
        });
        let mut cleared = Vec::new();
        for some in note.open.chunks(256) {
            let _rows = self.inner.rows.lock().await;
            for number in some {
                if let Some(event) = self.readable(*number).await? {
                    cleared.extend(self.take(*number, &event));
                }
            }
        }
        Ok((Absorbed { last: note.up_to, cleared }, is_noted))
    }

    /// One event; `None`: it is not kept, or damaged, which is said.
    async fn readable(&self, number: EventNumber) -> Result<Option<Event>, StoreError> {
        match self.inner.store.get(&EVENTS, &number).await {
            Err(error) if is_for_good(&error) => {
                tracing::warn!(%error, event_id = %number, "an event cannot be read and is left out");
                Ok(None)
            }
            event => event,
        }
    }

    fn take(&self, number: EventNumber, event: &Event) -> Vec<(EventNumber, String)> {
        let by = self.clearing().take(number, event);
        by.into_iter().map(|alert| (alert, event.kind.clone())).collect()
    }

    /// Notes that all up to there is followed, and acknowledged.
    pub(super) async fn note(&self, up_to: EventNumber) -> Result<(), StoreError> {
        let mut txn = Txn::new();
        txn.put(&NOTE, ONLY_KEY, &Note { up_to, open: self.clearing().numbers() });
        self.inner.store.commit(txn).await.map(drop)
    }

    /// The next page for the keeper. No row of it is acknowledged or pruned between its reading and its counting.
    pub(super) async fn absorb(&self, since: EventNumber, limit: usize) -> Result<Absorbed, StoreError> {
        let _rows = self.inner.rows.lock().await;
        // What is missing because of damage is still open, and not pruned.
        let query = Query { since, limit, ..Query::default() };
        let page = match self.page(&query, |_, error| Err(error)).await {
            Err(error) if is_for_good(&error) => self.page_of_readable(since, limit).await?,
            page => page?,
        };
        if let Some(gap) = page.gap {
            self.clearing().forget_before(EventNumber(gap.to.0 + 1));
        }
        let mut cleared = Vec::new();
        for (number, event) in &page.events {
            if *number > self.inner.born {
                self.inner.written[event.severity as usize].fetch_add(1, Ordering::Relaxed);
            }
            cleared.extend(self.take(*number, event));
        }
        self.inner.followed.store(page.last.0, Ordering::SeqCst);
        Ok(Absorbed { last: page.last, cleared })
    }

    /// One by one, without those that are damaged.
    async fn page_of_readable(&self, since: EventNumber, limit: usize) -> Result<Page, StoreError> {
        let last = EventNumber(self.last().0.min(since.0.saturating_add(limit as u64)));
        let mut page = Page { last, ..Page::default() };
        for number in (since.0 + 1..=last.0).map(EventNumber) {
            page.events.extend(self.readable(number).await?.map(|event| (number, event)));
        }
        Ok(page)
    }

    fn clearing(&self) -> MutexGuard<'_, Clearing> {
        self.inner.clearing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn damper(&self) -> MutexGuard<'_, Option<Damper>> {
        self.inner.damper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Comes when something was held back.
    pub(super) async fn held_back(&self) {
        self.inner.held_back.notified().await;
    }

    /// Rung when something that was held back is told, or could not be.
    pub(super) fn told(&self) -> &Notify {
        &self.inner.told
    }
}

/// Asked again, the store says the same.
pub(super) fn is_for_good(error: &StoreError) -> bool {
    matches!(error, StoreError::Damaged(_) | StoreError::Refused(_))
}

/// A store that can only be read keeps none: then this one holds for as long as the daemon lives.
async fn new_stream(store: &Store) -> Result<String, StoreError> {
    let mut bytes = [0u8; STREAM_DIGITS / 2];
    let random = SystemRandom::new();
    random.fill(&mut bytes).map_err(|_| StoreError::Io("the system gives no random bytes".to_owned()))?;
    let stream = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut txn = Txn::essential();
    txn.put(&STREAM, ONLY_KEY, &stream);
    match store.commit(txn).await {
        Ok(_) | Err(StoreError::ReadOnly(_)) => Ok(stream),
        Err(error) => Err(error),
    }
}

fn number(key: &[u8]) -> EventNumber {
    EventNumber(key.try_into().map_or(0, u64::from_be_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Gap, Severity, kind};

    async fn log(history: usize) -> Log {
        Log::open(Store::memory(), &config::Events { history }).await.unwrap()
    }

    fn event(n: u32) -> Event {
        Event::new(kind::VM_STARTED, format!("vm/{n}"), format!("VM {n} started"))
    }

    fn after(since: u64) -> Query {
        Query { since: EventNumber(since), limit: 100, ..Query::default() }
    }

    fn numbers(page: &Page) -> Vec<u64> {
        page.events.iter().map(|(n, _)| n.0).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn events_are_numbered_from_one_without_a_hole() {
        let log = log(10).await;
        for n in 0..5 {
            assert_eq!(log.publish(&event(n)).await.unwrap(), Some(EventNumber(u64::from(n) + 1)));
        }
        let page = log.list(&after(2)).await.unwrap();
        assert_eq!(numbers(&page), [3, 4, 5]);
        assert_eq!((page.last, page.gap), (EventNumber(5), None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_longer_kept_is_told_as_a_gap() {
        let log = log(3).await;
        for n in 0..10 {
            log.publish(&event(n)).await.unwrap();
        }
        assert_eq!(log.prune().await.unwrap(), 7);
        let page = log.list(&after(2)).await.unwrap();
        assert_eq!(page.gap, Some(Gap { from: EventNumber(3), to: EventNumber(7) }));
        assert_eq!(numbers(&page), [8, 9, 10]);
        assert_eq!(log.publish(&event(0)).await.unwrap(), Some(EventNumber(11)));
        let nothing = Query { object: Some("vm/none".to_owned()), ..after(2) };
        let page = log.list(&nothing).await.unwrap();
        assert_eq!((page.gap.map(|gap| gap.to.0), page.last.0), (Some(7), 11));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hole_behind_events_of_the_answer_is_told_by_the_next_answer() {
        let log = log(1000).await;
        for n in 0..10 {
            log.publish(&event(n)).await.unwrap();
        }
        // As if pruned while the rows were read.
        let mut txn = Txn::new();
        (4..=6).for_each(|n| txn.delete(&EVENTS, &EventNumber(n)));
        log.inner.store.commit(txn).await.unwrap();
        let page = log.list(&after(0)).await.unwrap();
        assert_eq!((numbers(&page), page.last, page.gap), (vec![1, 2, 3], EventNumber(3), None));
        let page = log.list(&after(3)).await.unwrap();
        assert_eq!(page.gap, Some(Gap { from: EventNumber(4), to: EventNumber(6) }));
        assert_eq!(numbers(&page), [7, 8, 9, 10]);
        let mut txn = Txn::new();
        (7..=10).for_each(|n| txn.delete(&EVENTS, &EventNumber(n)));
        log.inner.store.commit(txn).await.unwrap();
        let page = log.list(&after(8)).await.unwrap();
        assert_eq!((page.last.0, page.gap.map(|gap| (gap.from.0, gap.to.0))), (10, Some((9, 10))));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_on_disk_for_good_is_not_shown() {
        let log = log(10).await;
        log.publish(&event(1)).await.unwrap();
        // The engine has it, and its commit has not come through yet.
        let mut txn = Txn::new();
        txn.put(&EVENTS, &EventNumber(2), &event(2));
        log.inner.store.commit(txn).await.unwrap();
        for since in 0..4 {
            let page = log.list(&after(since)).await.unwrap();
            assert!(page.gap.is_none() && numbers(&page).iter().all(|n| *n == 1), "{page:?}");
            assert_eq!(page.last.0, since.max(1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_hears_of_the_next_event_and_of_nothing_when_its_time_is_up() {
        let log = log(10).await;
        let waiter = tokio::spawn({
            let log = log.clone();
            async move { log.wait(&after(0), Duration::from_secs(60)).await.unwrap() }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        log.publish(&event(1)).await.unwrap();
        assert_eq!(waiter.await.unwrap().events.len(), 1);
        let page = log.wait(&after(1), Duration::from_secs(60)).await.unwrap();
        assert!(page.events.is_empty());
        assert_eq!(page.last, EventNumber(1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_acknowledged_event_stays_and_says_by_whom() {
        let log = log(10).await;
        log.publish(&event(1)).await.unwrap();
        let numbers = [EventNumber(1), EventNumber(9), EventNumber(1)];
        assert_eq!(log.acknowledge(&numbers, "local:0").await.unwrap(), 1);
        assert_eq!(log.acknowledge(&[EventNumber(1)], "local:7").await.unwrap(), 0);
        let page = log.list(&after(0)).await.unwrap();
        assert_eq!(page.events[0].1.acknowledged.as_ref().unwrap().by, "local:0");
        let open = Query { unacknowledged: true, ..after(0) };
        assert!(log.list(&open).await.unwrap().events.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_holds_over_a_restart_and_tells_of_another_store_and_of_one_that_was_set_back() {
        let store = Store::memory();
        let settings = config::Events { history: 100 };
        let log = Log::open(store.clone(), &settings).await.unwrap();
        for n in 0..5 {
            log.publish(&event(n)).await.unwrap();
        }
        let token = log.token(EventNumber(3));
        assert_eq!(log.resume(&token), (EventNumber(3), false));
        assert_eq!(log.resume(&log.token(EventNumber(5))), (EventNumber(5), false));
        let again = Log::open(store.crash_copy(), &settings).await.unwrap();
        assert_eq!(again.resume(&token), (EventNumber(3), false));
        assert_eq!(again.resume(&again.token(EventNumber(6))), (EventNumber(0), true), "set back");
        let another = Log::open(Store::memory(), &settings).await.unwrap();
        assert_eq!(another.resume(&token), (EventNumber(0), true));
        assert_ne!(another.stream(), again.stream());
        assert_eq!(another.token(EventNumber(0)).to_string().parse(), Ok(another.token(EventNumber(0))));
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_of_an_older_agent_is_read_whatever_its_type() {
        let log = log(10).await;
        let old = r#"{"time":1,"type":"vm.of_old","severity":"error","object":"vm/x","text":"x","job":null}"#;
        let event: Event = serde_json::from_str(old).unwrap();
        log.publish(&event).await.unwrap();
        let page = log.list(&after(0)).await.unwrap();
        assert_eq!(page.events[0].1, event);
        assert_eq!((page.events[0].1.severity, page.events[0].1.trace.clone()), (Severity::Error, None));
    }
}
