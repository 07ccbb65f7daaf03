//! Every event is in the daemon's log too, with its number and whom it is about, so that `journalctl EVENT_ID=17`,
//! `VM_UUID=…` and `TRACE_ID=…` find it beside what was logged around it.
//!
//! A reader like any other: it follows the table by number, and so tells an event only when it is on disk.

use super::{Event, Log, Query, Severity};
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

/// Tells what comes after now, until `stop`.
pub async fn journal(log: Log, stop: CancellationToken) {
    let follow = async {
        let mut query = Query { since: log.last(), limit: PAGE, ..Query::default() };
        loop {
            match log.wait(&query, LOOK).await {
                Ok(page) => {
                    page.events.iter().for_each(|(number, event)| tell(*number, event));
                    query.since = page.last;
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
