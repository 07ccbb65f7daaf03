//! What happens to the network by itself: changes from outside become events, drift from the declaration an alert with
//! the plan that would mend it, and a rollback that was blocked is tried again.
//!
//! One task. While a job changes the network, what changes is that job's doing and no event; when it has ended or waits for
//! its word, what is there then is where the next look begins. What was not seen to end (in such a time, before our start, in
//! a change that is told as one) is told by what is there: alerts that the present view shows to be over are acknowledged.
//! Many notices melt into one look (the kernel's bell does), and
//! a look is made at most every [`PAUSE`].

use super::boot::Lack;
use super::{LOCK, OPEN, Operations, told};
use crate::event::{Event, Kind, OpenAlert, Severity, kind};
use crate::host::record::HOST_KEY;
use crate::job::Options as JobOptions;
use crate::model::network::{Address, Change, Kind as LinkKind, NetworkView};
use crate::model::{EventNumber, IfName, Timestamp};
use crate::network::{Observation, Watching};
use crate::store::{StoreError, Table, Txn};
use serde::{Deserialize, Serialize};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Between the first tries of a rollback that is blocked, or of a boot's restore; then twice as long each time, up to [`LONGEST_RETRY`].
pub const RETRY: Duration = Duration::from_secs(30);
const LONGEST_RETRY: Duration = Duration::from_secs(300);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);
/// How soon the network is looked at again while a job holds it, or after a kernel that did not answer.
const AGAIN: Duration = Duration::from_secs(1);
/// Flaps end without a notice: how often that is looked for.
const QUIET_LOOK: Duration = Duration::from_secs(10);

/// Acknowledgements in one transaction.
const ACKNOWLEDGED_AT_ONCE: usize = 15;
/// Alerts of links.
const OF_LINKS: [Kind; 4] = [
    kind::NETWORK_CARRIER_LOST,
    kind::NETWORK_FLAPPING,
    kind::NETWORK_SETTLED,
    kind::NETWORK_ADDRESS_REMOVED,
];

/// What is told of drift, in the store: its event is the first such after this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Alert {
    after: EventNumber,
    /// Of the whole plan; the event has its beginning.
    digest: u64,
}

const ALERT: Table<Alert> = Table::new("network_drift", 1);
const DRIFT: Kind = kind::NETWORK_DRIFT;

struct Look {
    operations: Arc<Operations>,
    /// What was there at the last look, and what is known of carriers that come and go.
    last: Option<NetworkView>,
    /// How often we had changed it ourselves then.
    changes: u64,
    watching: Watching,
    /// Whether alerts may be over that nobody saw end.
    is_behind: bool,
    /// The alert that tells of drift, while there is any; not known before the first look.
    alert: Option<Option<Alert>>,
    /// When to try next, and how long to wait after that.
    next_try: Option<(Instant, Duration)>,
    /// Which boot of the host this is, once it is known.
    boot_id: Option<String>,
    /// What was lacking at the last look.
    lack: Lack,
}

/// Looks until `stop`.
pub async fn run(operations: Arc<Operations>, stop: CancellationToken) {
    let mut bell = operations.kernel.observe();
    let mut look = Look {
        operations,
        last: None,
        changes: 0,
        watching: Watching::new(),
        is_behind: true,
        alert: None,
        next_try: None,
        boot_id: None,
        lack: Lack::Nothing,
    };
    let mut deaf = false;
    loop {
        let again = if look.all().await { QUIET_LOOK } else { AGAIN };
        tokio::select! {
            rung = bell.recv(), if !deaf => deaf = rung.is_none(),
            () = tokio::time::sleep(again) => {}
            () = stop.cancelled() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = stop.cancelled() => return,
        }
    }
}

impl Look {
    /// Whether there is nothing to come back for soon.
    async fn all(&mut self) -> bool {
        let operations = Arc::clone(&self.operations);
        let Some(engine) = operations.engine() else { return false };
        if self.is_ours().await {
            return false;
        }
        let now = match operations.kernel.network().await {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(%error, "the network cannot be read");
                return false;
            }
        };
        if self.is_ours().await {
            return false;
        }
        if !engine.is_claimed(LOCK) {
            self.mend(&now).await;
            self.drift(&now).await;
        }
        let now = without_guests(now);
        match &self.last {
            None => self.is_behind = true,
            Some(last) => {
                for told in self.watching.observe(last, &now, Timestamp::now()) {
                    self.is_behind |= matches!(told, Observation::Many { .. });
                    self.tell(&told).await;
                }
            }
        }
        if self.is_behind {
            self.is_behind = !self.catch_up(&now).await;
        }
        self.last = Some(now);
        !self.is_behind
    }

    /// Ends the alerts that are over by what is there now. `false`: to be done once more.
    async fn catch_up(&self, now: &NetworkView) -> bool {
        let events = &self.operations.events;
        // Asked first: what is told late may be an alert that is over.
        let is_holding_back = events.is_holding_back();
        let Some(open) = events.open_of(&OF_LINKS) else { return false };
        let mut over = Vec::new();
        for alert in &open {
            match end(alert, now, &self.watching) {
                End::NotYet => {}
                End::Over => over.push(alert.number),
                // Clears it, and is an alert itself if the carrier is not there.
                End::Quiet(link, carrier) => self.tell(&Observation::Settled { link, carrier }).await,
            }
        }
        for some in over.chunks(ACKNOWLEDGED_AT_ONCE) {
            match events.acknowledge(some, "agent: the network shows that it is over").await {
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "alerts of the network that are over are not acknowledged");
                    // A damaged row stays one: those of it are left to a hand.
                    return matches!(error, StoreError::Damaged(_) | StoreError::Refused(_));
                }
            }
        }
        !is_holding_back
    }

    /// Whether we change it now, or have since the last look: our doing, and not the world's.
    async fn is_ours(&mut self) -> bool {
        let changes = self.operations.network_changes.load(Ordering::SeqCst);
        let is_ours = changes != self.changes || self.operations.network_is_changing().await;
        if is_ours {
            self.last = None;
        }
        self.changes = changes;
        is_ours
    }

    async fn tell(&self, seen: &Observation) {
        let (kind, text) = words(seen);
        let object = seen.link().map_or_else(|| "network".to_owned(), |link| format!("network/{link}"));
        let mut event = Event::new(kind, object, text);
        match seen {
            Observation::Settled { carrier: false, .. } => event = event.with_severity(Severity::Warning),
            Observation::AddressAdded { address, .. } | Observation::AddressRemoved { address, .. } => {
                event = event.with("address", address.to_string());
            }
            _ => {}
        }
        self.publish(event).await;
    }

    async fn publish(&self, event: Event) {
        if let Err(error) = self.operations.events.publish(&event).await {
            tracing::warn!(%error, "an event was not written");
        }
    }

    /// Told once, and acknowledged when it is over.
    async fn drift(&mut self, now: &NetworkView) {
        let Ok(confirmed) = self.operations.network_confirmed().await else { return };
        if !matches!(self.operations.network_open().await, Ok(None)) {
            return;
        }
        let Ok(owners) = self.operations.kernel.owners().await else { return };
        let plan = super::show::drift(now, &confirmed, &owners);
        if let Err(error) = self.tell_drift(&plan).await {
            tracing::warn!(%error, "what is to be told of drift was not written");
        }
    }

    async fn tell_drift(&mut self, plan: &[Change]) -> Result<(), StoreError> {
        let digest = digest(plan);
        let Operations { store, events, .. } = &*self.operations;
        let known = match self.alert.take() {
            Some(known) => known,
            None => store.get(&ALERT, HOST_KEY).await?,
        };
        if known.as_ref().map(|alert| alert.digest) == digest {
            self.alert = Some(known);
            return Ok(());
        }
        if let Some(old) = known {
            if let Some(number) = events.find(old.after, DRIFT, None).await? {
                events.acknowledge(&[number], "the drift is another, or over").await?;
            }
            let mut over = Txn::essential();
            over.delete(&ALERT, HOST_KEY);
            store.commit(over).await?;
        }
        self.alert = Some(None);
        let Some(digest) = digest else { return Ok(()) };
        let words = told(plan);
        let text = format!(
            "the network is not as declared; network_apply of the declaration would: {}",
            words.join("; ")
        );
        let event = Event::new(DRIFT, "network", text).with("plan", words);
        let alert = Alert { after: events.last(), digest };
        let mut note = Txn::essential();
        note.put(&ALERT, HOST_KEY, &alert);
        events.publish_with(&event, note).await?;
        self.alert = Some(Some(alert));
        Ok(())
    }

    /// What a rollback or the boot's restore could not bring, and no job works at.
    async fn mend(&mut self, now: &NetworkView) {
        let operations = Arc::clone(&self.operations);
        let is_blocked = operations.store.count(OPEN.name).await.unwrap_or(0) > 0;
        if !is_blocked && !self.boot_lacks(now).await {
            self.next_try = None;
            return;
        }
        if self.next_try.is_some_and(|(at, _)| Instant::now() < at) {
            return;
        }
        let pause = self.next_try.map_or(RETRY, |(_, pause)| pause);
        self.next_try = Some((Instant::now() + pause, LONGEST_RETRY.min(2 * pause)));
        let Some(engine) = operations.engine() else { return };
        let plan = super::boot::restore();
        let submission = operations.submission("network_restore", "agent", plan, JobOptions::default());
        match engine.submit(submission).await {
            Ok(job) => tracing::warn!(job_id = %job, is_blocked, "the network is brought back once more"),
            Err(error) => tracing::error!(%error, "the network cannot be brought back now"),
        }
    }

    /// Whether the boot's restore is to be run. A port that came is taken at once.
    async fn boot_lacks(&mut self, now: &NetworkView) -> bool {
        if self.boot_id.is_none() {
            self.boot_id = self.operations.machine_boot_id().await.ok();
        }
        let Some(boot_id) = &self.boot_id else { return false };
        let Ok(lack) = self.operations.boot_lacks(boot_id, now).await else { return false };
        if lack == Lack::Arrived && self.lack != Lack::Arrived {
            self.next_try = None;
        }
        self.lack = lack;
        matches!(lack, Lack::All | Lack::Arrived)
    }
}

/// What has become of an alert of a link.
enum End {
    NotYet,
    Over,
    /// It flaps no more, and has a carrier or not.
    Quiet(IfName, bool),
}

fn end(alert: &OpenAlert, now: &NetworkView, watching: &Watching) -> End {
    let name = alert.object.strip_prefix("network/").and_then(|name| IfName::parse(name).ok());
    let Some(link) = name.as_ref().and_then(|name| now.links.get(name)) else { return End::Over };
    let is_over = match alert.kind {
        kind::NETWORK_FLAPPING => {
            return match name.filter(|name| !watching.flaps(name)) {
                Some(name) => End::Quiet(name, link.carrier),
                None => End::NotYet,
            };
        }
        kind::NETWORK_ADDRESS_REMOVED => {
            let is_it = |address: &Address| alert.part.as_deref() == Some(address.to_string().as_str());
            link.addresses.iter().any(is_it)
        }
        _ => link.carrier,
    };
    if is_over { End::Over } else { End::NotYet }
}

/// `None`: nothing is to be done.
fn digest(plan: &[Change]) -> Option<u64> {
    let mut hasher = std::hash::DefaultHasher::new();
    plan.iter().for_each(|change| change.to_string().hash(&mut hasher));
    (!plan.is_empty()).then(|| hasher.finish())
}

/// A guest's card comes and goes with the guest, which has its own events.
fn without_guests(mut now: NetworkView) -> NetworkView {
    now.links.retain(|_, link| link.kind != LinkKind::Vif);
    now
}

/// Type and text of an event.
fn words(seen: &Observation) -> (Kind, String) {
    use Observation::*;
    match seen {
        LinkAdded { link, kind } => (kind::NETWORK_LINK_ADDED, format!("{kind} {link} is there")),
        LinkRemoved { link, kind } => (kind::NETWORK_LINK_REMOVED, format!("{kind} {link} has gone")),
        LinkChanged { link, what } => {
            (kind::NETWORK_LINK_CHANGED, format!("{link} was changed from outside: {}", what.join(", ")))
        }
        CarrierLost { link } => (kind::NETWORK_CARRIER_LOST, format!("{link} has lost its carrier")),
        CarrierBack { link } => (kind::NETWORK_CARRIER_BACK, format!("{link} has a carrier again")),
        Flapping { link } => {
            let text = format!("the carrier of {link} comes and goes; told again when it has been quiet");
            (kind::NETWORK_FLAPPING, text)
        }
        Settled { link, carrier } => {
            let how = if *carrier { "with" } else { "without" };
            (kind::NETWORK_SETTLED, format!("{link} has been quiet for a while, {how} a carrier"))
        }
        AddressAdded { link, address } => {
            (kind::NETWORK_ADDRESS_ADDED, format!("{link} got the address {address} from outside"))
        }
        AddressRemoved { link, address } => {
            (kind::NETWORK_ADDRESS_REMOVED, format!("{link} lost the address {address} from outside"))
        }
        RoutesChanged { added, removed } => {
            let text = format!("routes were changed from outside: {added} added, {removed} removed");
            (kind::NETWORK_ROUTES_CHANGED, text)
        }
        Many { count, links } => {
            let text = format!(
                "{count} changes of {links} links from outside; network_show tells what is there now"
            );
            (kind::NETWORK_LINKS_CHANGED, text)
        }
    }
}
