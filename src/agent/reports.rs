//! What goes out by itself and what is kept of it: joins the sampler, the history, the event log and the manager's
//! deliveries, which know nothing of each other, and tells the deliveries who owns the host.

use super::access::Surroundings;
use super::figures::Newest;
use super::statistics;
use crate::api::Reports;
use crate::config::Settings;
use crate::event::Severity;
use crate::host::HostRecord;
use crate::manager::{
    Deliveries, EventSource, Outbox, Parts, RealConnect, SampleSource, Status, Stream, Target, sample_time,
};
use crate::metrics::Delivery;
use crate::model::Timestamp;
use crate::operation::Operations;
use crate::stats::{History, Object, Sampler};
use crate::wire::TlsIdentity;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What a stop gives the last minute of history.
const FLUSH_WITHIN: Duration = Duration::from_secs(5);
/// Our own certificate could not be read: again after this.
const IDENTITY_RETRY: Duration = Duration::from_secs(10);
/// How often files of VMs that are no more are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Starts all of it; it ends with `stop`.
pub(super) async fn start(
    settings: &Settings,
    operations: &Arc<Operations>,
    surroundings: &Arc<Surroundings>,
    stop: &CancellationToken,
) -> io::Result<Reports> {
    let folder = settings.state.dir.join("stats");
    let opened = tokio::task::spawn_blocking(move || History::open(&folder)).await;
    let history = Arc::new(opened.map_err(io::Error::other)??);
    let sampler = statistics::start(operations, stop);
    let outbox = Arc::new(Outbox::default());
    let us = name_of(&operations.host_record());
    let log = operations.events.clone();
    let parts = Parts {
        store: operations.store.clone(),
        log: log.clone(),
        settings: settings.manager.clone(),
        connect: Arc::new(RealConnect),
        stop: stop.clone(),
    };
    let id = log.stream().to_owned();
    let events = Arc::new(EventSource::new(log, id.clone(), us.clone()));
    let samples = Arc::new(SampleSource::new(Arc::clone(&outbox), id, us));
    let deliveries = Arc::new(Deliveries::start(parts, events, samples));
    tokio::spawn(offer(Arc::clone(operations), Arc::clone(&sampler), outbox, stop.clone()));
    tokio::spawn(record(Arc::clone(operations), Arc::clone(&sampler), Arc::clone(&history), stop.clone()));
    tokio::spawn(follow_owner(
        Arc::clone(operations),
        Arc::clone(surroundings),
        Arc::clone(&deliveries),
        stop.clone(),
    ));
    Ok(Reports { deliveries, history, sampler })
}

/// What is on its way to disk gets there.
pub(super) async fn end(reports: &Reports) {
    reports.deliveries.ended().await;
    let history = Arc::clone(&reports.history);
    let flushing = tokio::task::spawn_blocking(move || history.flush());
    if tokio::time::timeout(FLUSH_WITHIN, flushing).await.is_err() {
        tracing::warn!("the last minute of statistics is not kept");
    }
}

/// What monitoring asks of all this.
pub(super) fn newest(reports: &Reports, operations: &Arc<Operations>) -> Newest {
    let (sampler, deliveries, events) =
        (Arc::clone(&reports.sampler), Arc::clone(&reports.deliveries), operations.events.clone());
    Newest {
        sweep: Box::new(move || Some(sampler.latest()).filter(|sweep| sweep.at != Timestamp(0))),
        delivery: Box::new(move || deliveries.status().into_iter().map(delivery).collect()),
        alerts: Box::new(move || {
            let names = [Severity::Info, Severity::Warning, Severity::Error, Severity::Critical];
            names.into_iter().map(Severity::as_str).zip(events.open_alerts()).skip(1).collect()
        }),
    }
}

fn delivery((stream, status): (Stream, Status)) -> Delivery {
    // Samples are numbered by their time in ms.
    let number = |number: u64| match stream {
        Stream::Events => number,
        Stream::Statistics => sample_time(number).0,
    };
    // Since it last went well, or since we try; nothing waits: it is well now.
    let since = status.last_ok.or(status.begun);
    let since_ok = since.map(|at| match status.behind {
        0 => Duration::ZERO,
        _ => Duration::from_millis(Timestamp::now().0.saturating_sub(at.0)),
    });
    Delivery {
        stream: stream.as_str(),
        last_number: number(status.number),
        behind: status.behind,
        failures: status.failed,
        since_ok,
    }
}

/// `urn:uuid:…` of the host's unique id.
fn name_of(host: &HostRecord) -> String {
    format!("urn:uuid:{}", uuid::Uuid::from_bytes(*host.unique_id.as_bytes()))
}

/// A sweep goes into the outbox when it is time and somebody wants it.
async fn offer(
    operations: Arc<Operations>,
    sampler: Arc<Sampler>,
    outbox: Arc<Outbox>,
    stop: CancellationToken,
) {
    let mut sweeps = sampler.subscribe();
    loop {
        tokio::select! {
            changed = sweeps.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
        let sweep = Arc::clone(&sweeps.borrow_and_update());
        let host = operations.host_record();
        let wanted = host.ownership.owner().is_some_and(|owner| {
            owner.statistic_url.is_some() || (owner.event_url.is_none() && owner.core_api_url.is_some())
        });
        if wanted {
            outbox.offer(&sweep, Duration::from_secs(u64::from(host.statistic_interval_s)));
        }
    }
}

/// Each sweep goes into the history. A disk that hangs holds up nothing but this.
async fn record(
    operations: Arc<Operations>,
    sampler: Arc<Sampler>,
    history: Arc<History>,
    stop: CancellationToken,
) {
    let mut sweeps = sampler.subscribe();
    let mut prune = tokio::time::interval(PRUNE_EVERY);
    let mut failing = false;
    loop {
        tokio::select! {
            changed = sweeps.changed() => if changed.is_err() { return },
            _ = prune.tick() => {
                prune_files(&operations, &history).await;
                continue;
            }
            () = stop.cancelled() => return,
        }
        let sweep = Arc::clone(&sweeps.borrow_and_update());
        let history = Arc::clone(&history);
        let failed = tokio::task::spawn_blocking(move || history.record(&sweep)).await.unwrap_or(1);
        if (failed > 0) != failing {
            failing = failed > 0;
            if failing {
                tracing::warn!(files = failed, "statistics are not kept: their files cannot be written");
            } else {
                tracing::info!("statistics are kept again");
            }
        }
    }
}

async fn prune_files(operations: &Operations, history: &Arc<History>) {
    let (history, vms) = (Arc::clone(history), Arc::clone(&operations.vms));
    let known = move |object| match object {
        Object::Vm(vm) => vms.get(vm).is_some(),
        Object::Host | Object::Dom0 | Object::Domain(_) => true,
    };
    let pruned = tokio::task::spawn_blocking(move || history.prune(known)).await.unwrap_or(0);
    if pruned > 0 {
        tracing::info!(files = pruned, "histories of VMs that are no more were removed");
    }
}

/// Tells the deliveries of another owner, another address, another certificate of ours.
async fn follow_owner(
    operations: Arc<Operations>,
    surroundings: Arc<Surroundings>,
    deliveries: Arc<Deliveries>,
    stop: CancellationToken,
) {
    let mut changes = surroundings.changes();
    let mut known = None;
    loop {
        changes.mark_unchanged();
        let host = operations.host_record();
        let reading = Arc::clone(&surroundings);
        let identity = tokio::task::spawn_blocking(move || reading.identity()).await;
        let identity = identity.unwrap_or_else(|error| Err(error.to_string()));
        let shown = identity.as_ref().ok().map(|identity| identity.chain_pem.clone());
        let unread = identity.is_err() && host.ownership.owner().is_some();
        let now = (host.ownership.clone(), shown);
        if known.as_ref() != Some(&now) {
            deliveries.set_target(target(&host, identity));
            known = Some(now);
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(IDENTITY_RETRY), if unread => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Whom the host's owner wants told, and what we show it: our certificate as it signed it, if it did.
fn target(host: &HostRecord, identity: Result<TlsIdentity, String>) -> Option<Target> {
    let owner = host.ownership.owner()?;
    let identity = identity.map(|own| match &owner.signed_server_certificate {
        None => own,
        Some(signed) => {
            let signed = TlsIdentity { chain_pem: signed.clone(), key_pem: own.key_pem.clone() };
            match signed.check() {
                Ok(()) => signed,
                Err(error) => {
                    tracing::warn!(%error, "the certificate that the manager signed is not of our key; our own is shown");
                    own
                }
            }
        }
    });
    let url = |url: &Option<crate::host::ManagerUrl>| url.as_ref().map(|url| url.as_str().to_owned());
    let one = url(&owner.core_api_url);
    // The older form has one URL for all.
    let has_own = owner.event_url.is_some() || owner.statistic_url.is_some();
    let or_one = |own: Option<String>| if has_own { own } else { one.clone() };
    let pin = owner.certificate.as_ref().and_then(|certificate| certificate.der().ok());
    Some(Target {
        manager: owner.manager.as_str().to_owned(),
        since: owner.since,
        taken: owner.taken,
        from_event: owner.from_event,
        source: name_of(host),
        event_url: or_one(url(&owner.event_url)),
        statistic_url: or_one(url(&owner.statistic_url)),
        pin,
        identity,
    })
}
