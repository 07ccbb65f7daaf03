//! Every event is in the daemon's log too, with its number and whom it is about, so that `journalctl EVENT_ID=17`,
//! `VM_UUID=…` and `TRACE_ID=…` find it beside what was logged around it.
//!
//! A reader like any other: it follows the table by number, and so tells an event only when it is on disk.

use super::{Event, Log, Page, Query, Severity};
use crate::model::{EventNumber, TraceParent};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Events told at once.
const PAGE: usize = 256;
/// Between two looks: those that come meanwhile are told together.
const PAUSE: Duration = Duration::from_millis(50);
/// How long one look waits for something to tell.
const LOOK: Duration = Duration::from_secs(3600);
/// The store could not be read: it is asked again after this.
const RETRY: Duration = Duration::from_secs(10);

/// For a stop: what is still to be told is told within this.
const LAST_LOOK: Duration = Duration::from_secs(2);

/// Tells what was written in this life, until `stop`, and then what was written by then.
pub async fn journal(log: Log, stop: CancellationToken) {
    // Also what was written before this was first polled.
    let mut query = Query { since: log.born(), limit: PAGE, ..Query::default() };
    let follow = async {
        loop {
            match log.wait(&query, LOOK).await {
                Ok(page) => {
                    query.since = tell_all(&page);
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "events cannot be read");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    };
    tokio::select! {
        () = follow => {}
        () = stop.cancelled() => {}
    }
    let rest = async {
        while query.since < log.last() {
            query.since = match log.list(&query).await {
                Ok(page) => tell_all(&page),
                Err(error) => return tracing::warn!(%error, "the last events cannot be read"),
            };
        }
    };
    if tokio::time::timeout(LAST_LOOK, rest).await.is_err() {
        tracing::warn!("the last events are not told here");
    }
}

/// Where to go on.
fn tell_all(page: &Page) -> EventNumber {
    if let Some(gap) = page.gap {
        tracing::warn!(from = %gap.from, to = %gap.to, "events were pruned before they could be told here");
    }
    page.events.iter().for_each(|(number, event)| tell(*number, event));
    page.last
}

fn tell(number: EventNumber, event: &Event) {
    let trace_id = event.trace.as_deref().and_then(|trace| TraceParent::parse(trace).ok());
    let trace_id = trace_id.map(|trace| trace.trace_id());
    let vm_uuid = event.object.strip_prefix("vm/");
    let job_id = event.job.map(tracing::field::display);
    let (kind, object) = (event.kind.as_str(), event.object.as_str());
    macro_rules! tell {
        ($level:ident) => {
            tracing::$level!(event_id = %number, kind, object, job_id, vm_uuid, trace_id, "{}", event.text)
        };
    }
    match event.severity {
        Severity::Info => tell!(info),
        Severity::Warning => tell!(warn),
        Severity::Error | Severity::Critical => tell!(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::event::{Kind, kind};
    use crate::store::Store;
    use std::sync::{Arc, Mutex};

    /// What is logged, as text.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(text);
            Ok(text.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        fn told(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            let numbers = text.lines().filter_map(|line| line.split("event_id=").nth(1));
            numbers.map(|rest| rest.split(' ').next().unwrap().to_owned()).collect()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_written_before_the_first_look_is_told_and_what_came_last_before_the_stop() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _here = tracing::subscriber::set_default(subscriber);
        let store = Store::memory();
        let event = |kind: Kind| Event::new(kind, "host", "text");
        let open = async || Log::open(store.clone(), &config::Events { history: 100 }).await.unwrap();
        open().await.publish(&event(kind::HOST_CHANGED)).await.unwrap();
        let log = open().await;
        log.publish(&event(kind::STORE_REBUILT)).await.unwrap();
        let stop = CancellationToken::new();
        let told = tokio::spawn(journal(log.clone(), stop.clone()));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(lines.told(), ["2"], "not those of an earlier life");
        log.publish(&event(kind::HOST_CHANGED)).await.unwrap();
        stop.cancel();
        told.await.unwrap();
        assert_eq!(lines.told(), ["2", "3"]);
    }
}
