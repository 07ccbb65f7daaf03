//! The stream of events: what the log has after a number, as far as it is kept.

use super::cloudevents::Body;
use super::source::{Batch, Gap, Limit, Source, SourceError, Stream};
use crate::event::{Log, Page, Query};
use crate::model::{EventNumber, Timestamp};
use futures_util::future::{BoxFuture, FutureExt};
use std::time::Duration;

/// One look at the log waits this long; then it looks again.
const WAIT: Duration = Duration::from_secs(600);
/// So many events are written without giving way to others.
const AT_ONCE: usize = 64;

pub struct EventSource {
    log: Log,
    /// The log's id.
    id: String,
    /// Ours.
    source: String,
}

impl EventSource {
    pub fn new(log: Log, id: String, source: String) -> Self {
        Self { log, id, source }
    }

    async fn batch(&self, page: &Page, after: u64, limit: Limit) -> Batch {
        let mut body = Body::new(&self.source, &self.id);
        let gap = page.gap.map(|gap| Gap { from: gap.from.0, to: gap.to.0 });
        if let Some(gap) = gap {
            body.gap(Stream::Events, gap, Timestamp::now());
        }
        let (mut items, mut last) = (0, gap.map_or(after, |gap| gap.to));
        for (number, event) in &page.events {
            let before = body.len();
            body.event(*number, event);
            if items > 0 && body.len() > limit.bytes {
                body.cut_back(before);
                break;
            }
            (items, last) = (items + 1, number.0);
            if items % AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        let mut traces = page.events.iter().take(items).map(|(_, event)| event.trace.as_deref());
        let first = traces.next().flatten();
        let trace = first.filter(|first| traces.all(|trace| trace == Some(*first))).map(str::to_owned);
        Batch { body: body.finish(), last, items, gap, trace }
    }
}

fn failed(error: impl std::fmt::Display) -> SourceError {
    SourceError(format!("the events cannot be read: {error}"))
}

impl Source for EventSource {
    fn next(&self, after: u64, limit: Limit) -> BoxFuture<'_, Result<Batch, SourceError>> {
        async move {
            let query = Query { since: EventNumber(after), limit: limit.items, ..Query::default() };
            loop {
                let page = self.log.wait(&query, WAIT).await.map_err(failed)?;
                if !page.events.is_empty() || page.gap.is_some() {
                    return Ok(self.batch(&page, after, limit).await);
                }
            }
        }
        .boxed()
    }

    fn newest(&self) -> u64 {
        self.log.last().0
    }

    fn behind(&self, after: u64) -> u64 {
        self.newest().saturating_sub(after)
    }

    /// The number before the first event of that time or later. Numbers and times rise together, so it is found by
    /// halving.
    fn start(&self, since: Timestamp) -> BoxFuture<'_, Result<u64, SourceError>> {
        async move {
            let at = |number: u64| {
                let query = Query { since: EventNumber(number), limit: 1, ..Query::default() };
                async move { self.log.list(&query).await.map_err(failed) }
            };
            // The first event after `low` is too old; the one after `high` is not, or there is none.
            let (mut low, mut high) = (0, self.log.last().0);
            while low < high {
                let middle = low + (high - low) / 2;
                match at(middle).await?.events.first() {
                    Some((number, event)) if event.time < since => low = number.0,
                    _ => high = middle,
                }
            }
            Ok(low)
        }
        .boxed()
    }
}
