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
            if limit.items == 1 {
                return Batch { body: body.finish(), last: gap.to, items: 0, gap: Some(gap), trace: None };
            }
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

    fn start(&self, from: Option<u64>, _: Timestamp) -> u64 {
        from.unwrap_or_else(|| self.newest())
    }

    /// The log has its own bounds.
    fn taken(&self, _: u64) {}
}
