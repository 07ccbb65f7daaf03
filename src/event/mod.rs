//! Events: facts worth telling, numbered without a hole, durable, bounded, acknowledged.
//!
//! Words: an event's *object* is what it is about (`vm/<uuid>`, `host`, `job/17`); a *gap* says which numbers
//! are no longer kept, so that a reader who comes late learns what it missed instead of missing it silently.
//!
//! The number is given by the store when the transaction that holds the event is committed; an event that goes
//! with a change (a VM's record, a job's end) is in the same transaction as the change. Readers wait on the
//! table's sequence. Delivery to a manager reads here by number, from the last it has taken.

mod journal;

use crate::config;
use crate::model::{EventNumber, JobId, Timestamp, trace};
use crate::store::{Key, Range, Store, StoreError, Table, Txn};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::Instant;

pub use journal::journal;

const EVENTS: Table<Event> = Table::new("event", 1);
/// The table's name, for the store's ledger of counters.
pub const TABLE: &str = EVENTS.name;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Info,
    Warning,
    Error,
    Critical,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Info, Self::Warning, Self::Error, Self::Critical].into_iter().find(|s| s.as_str() == text)
    }
}

/// Who acknowledged an event, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledgement {
    pub by: String,
    pub at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub time: Timestamp,
    /// Stable and dotted: `vm.crashed`, `job.failed`.
    #[serde(rename = "type")]
    pub kind: String,
    pub severity: Severity,
    pub object: String,
    /// For people. No secrets.
    pub text: String,
    pub job: Option<JobId>,
    /// The traceparent of the request that it was done for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Facts for programs, by name.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub data: serde_json::Map<String, serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged: Option<Acknowledgement>,
}

impl Event {
    pub fn new(kind: &str, severity: Severity, object: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            time: Timestamp::now(),
            kind: kind.to_owned(),
            severity,
            object: object.into(),
            text: text.into(),
            job: None,
            trace: trace::current().map(|trace| trace.to_string()),
            data: serde_json::Map::new(),
            acknowledged: None,
        }
    }

    #[must_use]
    pub fn with_job(mut self, job: JobId) -> Self {
        self.job = Some(job);
        self
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.data.insert(name.to_owned(), value.into());
        self
    }

    /// Adds the event to a transaction; it gets its number when that is committed.
    pub fn append_to(&self, txn: &mut Txn) {
        txn.append(&EVENTS, self);
    }
}

/// What a reader wants.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Only events after this number.
    pub since: EventNumber,
    pub severity: Option<Severity>,
    pub object: Option<String>,
    pub unacknowledged: bool,
    pub limit: usize,
}

/// Numbers that were asked for and are not kept any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    pub from: EventNumber,
    pub to: EventNumber,
}

#[derive(Debug, Clone, Default)]
pub struct Page {
    pub events: Vec<(EventNumber, Event)>,
    /// Ask for what comes after this next. At least the number of the last event looked at, even if it did not
    /// match.
    pub last: EventNumber,
    pub gap: Option<Gap>,
}

/// The log of events.
#[derive(Clone)]
pub struct Log {
    store: Store,
    history: u64,
}

impl Log {
    pub fn new(store: Store, settings: &config::Events) -> Self {
        Self { store, history: settings.history as u64 }
    }

    /// The number of the newest event on disk.
    pub fn last(&self) -> EventNumber {
        EventNumber(*self.store.sequence(TABLE).borrow())
    }

    /// Writes one event that goes with no other change.
    pub async fn publish(&self, event: &Event) -> Result<EventNumber, StoreError> {
        self.publish_with(event, Txn::essential()).await
    }

    /// Writes an event together with a change, which appends nothing itself.
    pub async fn publish_with(&self, event: &Event, mut change: Txn) -> Result<EventNumber, StoreError> {
        event.append_to(&mut change);
        let committed = self.store.commit(change).await?;
        Ok(EventNumber(committed.appended.first().copied().unwrap_or_default()))
    }

    /// The first event of this type and job after a number, if it is kept.
    pub async fn find(
        &self,
        since: EventNumber,
        kind: &str,
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
    pub async fn list(&self, query: &Query) -> Result<Page, StoreError> {
        const SCAN_PAGE: usize = 512;
        let newest = self.last();
        let mut page = Page { gap: self.gap(query.since, newest).await?, ..Page::default() };
        page.last = page.gap.map_or(query.since, |gap| gap.to);
        let limit = query.limit.max(1);
        while page.events.len() < limit && page.last < newest {
            let rows = self.store.scan(&EVENTS, Range::after(page.last.bytes()).limit(SCAN_PAGE)).await?;
            let Some((newest_row, _)) = rows.last() else { break };
            let end = EventNumber(number(newest_row));
            for (key, event) in rows {
                page.last = EventNumber(number(&key));
                if query.matches(&event) {
                    page.events.push((page.last, event));
                    if page.events.len() >= limit {
                        return Ok(page);
                    }
                }
            }
            page.last = end;
        }
        Ok(page)
    }

    async fn gap(&self, since: EventNumber, newest: EventNumber) -> Result<Option<Gap>, StoreError> {
        if since >= newest {
            return Ok(None);
        }
        let first = match self.store.first_key(TABLE).await? {
            Some(key) => number(&key),
            None => newest.0 + 1,
        };
        let from = since.0 + 1;
        Ok((from < first).then_some(Gap { from: EventNumber(from), to: EventNumber(first - 1) }))
    }

    /// As `list`, but waits up to `timeout` for something to answer.
    pub async fn wait(&self, query: &Query, timeout: Duration) -> Result<Page, StoreError> {
        let deadline = Instant::now() + timeout;
        let mut sequence = self.store.sequence(TABLE);
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
        let mut txn = Txn::new();
        let mut count = 0;
        for number in numbers {
            if let Some(mut event) = self.store.get(&EVENTS, number).await?
                && event.acknowledged.is_none()
            {
                event.acknowledged = Some(Acknowledgement { by: by.to_owned(), at });
                txn.put(&EVENTS, number, &event);
                count += 1;
            }
        }
        if count > 0 {
            self.store.commit(txn).await?;
        }
        Ok(count)
    }

    /// Deletes the oldest beyond the bound. Answers how many.
    pub async fn prune(&self) -> Result<usize, StoreError> {
        const AT_MOST: usize = 20_000;
        let keep_from = self.last().0.saturating_sub(self.history) + 1;
        let mut gone = 0;
        loop {
            let now = self.store.prune(&EVENTS, keep_from.to_be_bytes().to_vec(), AT_MOST).await?;
            gone += now;
            if now < AT_MOST {
                return Ok(gone);
            }
        }
    }
}

impl Query {
    fn matches(&self, event: &Event) -> bool {
        self.severity.is_none_or(|s| event.severity >= s)
            && self.object.as_ref().is_none_or(|o| event.object == *o)
            && (!self.unacknowledged || event.acknowledged.is_none())
    }
}

fn number(key: &[u8]) -> u64 {
    key.try_into().map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(history: usize) -> Log {
        Log::new(Store::memory(), &config::Events { history })
    }

    fn event(n: u32) -> Event {
        Event::new("vm.started", Severity::Info, format!("vm/{n}"), format!("VM {n} started"))
    }

    fn after(since: u64) -> Query {
        Query { since: EventNumber(since), limit: 100, ..Query::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn events_are_numbered_from_one_without_a_hole() {
        let log = log(10);
        for n in 0..5 {
            assert_eq!(log.publish(&event(n)).await.unwrap(), EventNumber(u64::from(n) + 1));
        }
        let page = log.list(&after(2)).await.unwrap();
        assert_eq!(page.events.iter().map(|(n, _)| n.0).collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!((page.last, page.gap), (EventNumber(5), None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_longer_kept_is_told_as_a_gap() {
        let log = log(3);
        for n in 0..10 {
            log.publish(&event(n)).await.unwrap();
        }
        assert_eq!(log.prune().await.unwrap(), 7);
        let page = log.list(&after(2)).await.unwrap();
        assert_eq!(page.gap, Some(Gap { from: EventNumber(3), to: EventNumber(7) }));
        assert_eq!(page.events.len(), 3);
        assert_eq!(log.publish(&event(0)).await.unwrap(), EventNumber(11));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_hears_of_the_next_event_and_of_nothing_when_its_time_is_up() {
        let log = log(10);
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
        let log = log(10);
        log.publish(&event(1)).await.unwrap();
        assert_eq!(log.acknowledge(&[EventNumber(1), EventNumber(9)], "local:0").await.unwrap(), 1);
        assert_eq!(log.acknowledge(&[EventNumber(1)], "local:7").await.unwrap(), 0);
        let page = log.list(&after(0)).await.unwrap();
        assert_eq!(page.events[0].1.acknowledged.as_ref().unwrap().by, "local:0");
        let open = Query { unacknowledged: true, ..after(0) };
        assert!(log.list(&open).await.unwrap().events.is_empty());
    }
}
