//! What happens to the network by itself: changes from outside become events, drift from the declaration an alert with
//! the plan that would mend it, and a rollback that was blocked is tried again.
//!
//! One task. While a job holds the network, what changes is that job's doing and no event; when it lets go, what is there
//! then is where the next look begins. Many notices melt into one look (the kernel's bell does), and a look is made at
//! most every [`PAUSE`].

use super::{LOCK, OPEN, Operations, told};
use crate::event::{Event, Severity};
use crate::job::Options as JobOptions;
use crate::model::network::{Kind, NetworkView};
use crate::model::{EventNumber, Timestamp};
use crate::network::{Observation, Watching};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Between the first tries of a rollback that is blocked; then twice as long each time, up to [`LONGEST_RETRY`].
pub const RETRY: Duration = Duration::from_secs(30);
const LONGEST_RETRY: Duration = Duration::from_secs(300);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);
/// How soon the network is looked at again while a job holds it, or after a kernel that did not answer.
const AGAIN: Duration = Duration::from_secs(1);
/// Flaps end without a notice: how often that is looked for.
const QUIET_LOOK: Duration = Duration::from_secs(10);

struct Look {
    operations: Arc<Operations>,
    /// What was there at the last look, and what is known of carriers that come and go.
    last: Option<NetworkView>,
    watching: Watching,
    /// The alert that tells of drift, while there is any.
    alert: Option<(EventNumber, Vec<String>)>,
    /// When to try next, and how long to wait after that.
    next_try: Option<(Instant, Duration)>,
}

/// Looks until `stop`.
pub async fn run(operations: Arc<Operations>, stop: CancellationToken) {
    let mut bell = operations.kernel.observe();
    let mut look = Look { operations, last: None, watching: Watching::new(), alert: None, next_try: None };
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
        if engine.is_claimed(LOCK) {
            // Its doing, not the world's.
            self.last = None;
            return false;
        }
        self.retry_blocked().await;
        let now = match operations.kernel.network().await {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(%error, "the network cannot be read");
                return false;
            }
        };
        if engine.is_claimed(LOCK) {
            self.last = None;
            return false;
        }
        self.drift(&now).await;
        let now = without_guests(now);
        if let Some(last) = &self.last {
            for told in self.watching.observe(last, &now, Timestamp::now()) {
                self.tell(&told).await;
            }
        }
        self.last = Some(now);
        true
    }

    async fn tell(&self, seen: &Observation) {
        let (kind, severity, text) = words(seen);
        let object = seen.link().map_or_else(|| "network".to_owned(), |link| format!("network/{link}"));
        self.publish(Event::new(kind, severity, object, text)).await;
    }

    async fn publish(&self, event: Event) -> Option<EventNumber> {
        match self.operations.events.publish(&event).await {
            Ok(number) => Some(number),
            Err(error) => {
                tracing::warn!(%error, "an event was not written");
                None
            }
        }
    }

    /// Told once, and acknowledged when it is over.
    async fn drift(&mut self, now: &NetworkView) {
        let Ok(confirmed) = self.operations.network_confirmed().await else { return };
        if !matches!(self.operations.network_open().await, Ok(None)) {
            return;
        }
        let words = told(super::show::drift(now, &confirmed));
        if self.alert.as_ref().is_some_and(|(_, known)| *known == words) {
            return;
        }
        if let Some((number, _)) = self.alert.take()
            && let Err(error) =
                self.operations.events.acknowledge(&[number], "the drift is another, or over").await
        {
            tracing::warn!(%error, "an event was not acknowledged");
        }
        if words.is_empty() {
            return;
        }
        let text = format!(
            "the network is not as declared; network_apply of the declaration would: {}",
            words.join("; ")
        );
        let event =
            Event::new("network.drift", Severity::Warning, "network", text).with("plan", words.clone());
        self.alert = self.publish(event).await.map(|number| (number, words));
    }

    /// What a rollback could not bring back, and no job works at.
    async fn retry_blocked(&mut self) {
        let operations = &self.operations;
        if operations.store.count(OPEN.name).await.unwrap_or(0) == 0 {
            self.next_try = None;
            return;
        }
        if self.next_try.is_some_and(|(at, _)| Instant::now() < at) {
            return;
        }
        let pause = self.next_try.map_or(RETRY, |(_, pause)| pause);
        self.next_try = Some((Instant::now() + pause, LONGEST_RETRY.min(2 * pause)));
        let Some(engine) = operations.engine() else { return };
        let submission = operations.submission(
            "network_restore",
            "agent",
            super::restore::restore(),
            JobOptions::default(),
        );
        match engine.submit(submission).await {
            Ok(job) => tracing::warn!(%job, "a rollback of the network that was blocked is tried again"),
            Err(error) => tracing::error!(%error, "a rollback of the network cannot be tried again now"),
        }
    }
}

/// A guest's card comes and goes with the guest, which has its own events.
fn without_guests(mut now: NetworkView) -> NetworkView {
    now.links.retain(|_, link| link.kind != Kind::Vif);
    now
}

/// Type, severity and text of an event.
fn words(seen: &Observation) -> (&'static str, Severity, String) {
    use Observation::*;
    match seen {
        LinkAdded { link, kind } => ("network.link_added", Severity::Info, format!("{kind} {link} is there")),
        LinkRemoved { link, kind } => {
            ("network.link_removed", Severity::Info, format!("{kind} {link} has gone"))
        }
        LinkChanged { link, what } => (
            "network.link_changed",
            Severity::Info,
            format!("{link} was changed from outside: {}", what.join(", ")),
        ),
        CarrierLost { link } => {
            ("network.carrier_lost", Severity::Warning, format!("{link} has lost its carrier"))
        }
        CarrierBack { link } => {
            ("network.carrier_back", Severity::Info, format!("{link} has a carrier again"))
        }
        Flapping { link } => {
            let text = format!("the carrier of {link} comes and goes; told again when it has been quiet");
            ("network.flapping", Severity::Warning, text)
        }
        Settled { link, carrier } => {
            let how = if *carrier { "with" } else { "without" };
            ("network.settled", Severity::Info, format!("{link} has been quiet for a while, {how} a carrier"))
        }
        AddressAdded { link, address } => (
            "network.address_added",
            Severity::Info,
            format!("{link} got the address {address} from outside"),
        ),
        AddressRemoved { link, address } => (
            "network.address_removed",
            Severity::Warning,
            format!("{link} lost the address {address} from outside"),
        ),
        RoutesChanged { added, removed } => {
            let text = format!("routes were changed from outside: {added} added, {removed} removed");
            ("network.routes_changed", Severity::Info, text)
        }
        Many { count, links } => {
            let text = format!(
                "{count} changes of {links} links from outside; network_show tells what is there now"
            );
            ("network.links_changed", Severity::Info, text)
        }
    }
}
