//! The sampler: asks all sources at the same time, each once and with a deadline, and makes a sweep of what they tell.
//!
//! A source that fails or hangs costs its own figures and nothing else: it is told in the sweep's problems, and once in
//! the log until it recovers. A sweep that takes too long makes the next ones wait for the next tick; none is made up for.
//!
//! Sampling takes no lock, is no job and changes nothing. It keeps the latest sweep and a few counters; what is done with
//! a sweep is the matter of whoever subscribes.

use super::assemble::{Readings, Roster, assemble};
use super::meter::Meter;
use super::sweep::Sweep;
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::model::Timestamp;
use crate::xen::{DomId, DomainInfo, GuestFigures, Toolstack};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// What a source may take at most, however seldom we sample.
const DEADLINE: Duration = Duration::from_secs(5);
/// Of the words that say what is wrong with a source.
const MAX_WHY_CHARACTERS: usize = 300;

/// Where the figures come from.
#[derive(Clone)]
pub struct Sources {
    pub toolstack: Arc<dyn Toolstack>,
    pub kernel: Arc<dyn Kernel>,
    pub machine: Arc<dyn Machine>,
}

/// What the sampler itself has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub sweeps: u64,
    /// Sources that could not be read, in all sweeps together.
    pub failures: u64,
    pub last_took_ms: u64,
}

/// See the module.
pub struct Sampler {
    sources: Sources,
    roster: Arc<dyn Roster>,
    meter: Mutex<Meter>,
    latest: watch::Sender<Arc<Sweep>>,
    sweeps: AtomicU64,
    failures: AtomicU64,
    last_took_ms: AtomicU64,
}

impl Sampler {
    pub fn new(sources: Sources, roster: Arc<dyn Roster>) -> Arc<Self> {
        Arc::new(Self {
            sources,
            roster,
            meter: Mutex::default(),
            latest: watch::Sender::new(Arc::new(Sweep::none())),
            sweeps: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            last_took_ms: AtomicU64::new(0),
        })
    }

    /// Every sweep from now on; who is slow sees the latest only.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Sweep>> {
        self.latest.subscribe()
    }

    /// Before the first sweep has ended: [`Sweep::none`].
    pub fn latest(&self) -> Arc<Sweep> {
        Arc::clone(&self.latest.borrow())
    }

    pub fn counts(&self) -> Counts {
        Counts {
            sweeps: self.sweeps.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            last_took_ms: self.last_took_ms.load(Ordering::Relaxed),
        }
    }

    /// Sweeps at once, and then at every tick, until `stop`.
    pub async fn run(self: Arc<Self>, every: Duration, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        // Domains and guests are asked for one after the other: both within one interval.
        let limit = DEADLINE.min(every / 2);
        let mut troubled = BTreeSet::new();
        let sweeping = async {
            loop {
                ticks.tick().await;
                let sweep = self.sweep(limit).await;
                self.take(sweep, &mut troubled);
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = sweeping => {}
        }
    }

    /// One sweep, for which each source has so long. Nobody else is told of it.
    pub async fn sweep(&self, limit: Duration) -> Sweep {
        let (at, began) = (Timestamp::now(), Instant::now());
        let Sources { toolstack, kernel, machine } = &self.sources;
        let (domains, usage, links, host) = tokio::join!(
            self.domains(limit),
            within(limit, toolstack.usage()),
            within(limit, kernel.traffic()),
            within(limit, machine.figures()),
        );
        let mut readings = Readings::default();
        let mut problems = Vec::new();
        match domains {
            Ok((domains, guests)) => {
                let guests = guests.unwrap_or_else(|why| {
                    problems.push(("guests", why));
                    Vec::new()
                });
                let missing = domains.len() - guests.len().min(domains.len());
                if missing > 0 && problems.is_empty() {
                    problems
                        .push(("guests", format!("{missing} of {} domains were not read", domains.len())));
                }
                (readings.domains, readings.guests) = (Some(domains), guests);
            }
            Err(why) => problems.push(("domains", why)),
        }
        let mut told = |source: &'static str, why: String| problems.push((source, why));
        readings.usage = usage.map_err(|why| told("hypervisor", why)).ok();
        readings.links = links.map_err(|why| told("links", why)).ok();
        readings.host = host.map_err(|why| told("machine", why)).ok();
        if let Some(usage) = &readings.usage {
            readings.busy = self.meter.lock().unwrap_or_else(PoisonError::into_inner).read(usage);
        }
        if let Some(host) = &mut readings.host {
            problems.append(&mut host.problems);
        }
        readings.problems = problems;
        assemble(&readings, &*self.roster, (at, began, began.elapsed()))
    }

    /// All domains, and then what is told of their guests' memory.
    async fn domains(
        &self,
        limit: Duration,
    ) -> Result<(Vec<DomainInfo>, Result<Vec<GuestFigures>, String>), String> {
        let toolstack = &self.sources.toolstack;
        let domains = within(limit, toolstack.list()).await?;
        let domids: Vec<DomId> = domains.iter().map(|info| info.domid).collect();
        let guests = within(limit, toolstack.guest_figures(&domids)).await;
        Ok((domains, guests))
    }

    fn take(&self, sweep: Sweep, troubled: &mut BTreeSet<&'static str>) {
        let now: BTreeSet<&'static str> = sweep.problems.iter().map(|(source, _)| *source).collect();
        for (source, why) in sweep.problems.iter().filter(|(source, _)| !troubled.contains(source)) {
            tracing::warn!(source, why, "a source of statistics cannot be read; told once until it can");
        }
        for source in troubled.difference(&now) {
            tracing::info!(source, "a source of statistics can be read again");
        }
        *troubled = now;
        self.sweeps.fetch_add(1, Ordering::Relaxed);
        self.failures.fetch_add(u64::try_from(sweep.problems.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
        let took_ms = u64::try_from(sweep.took.as_millis()).unwrap_or(u64::MAX);
        self.last_took_ms.store(took_ms, Ordering::Relaxed);
        self.latest.send_replace(Arc::new(sweep));
    }
}

/// What a source tells in time, or why it does not.
async fn within<T, E: Display>(
    limit: Duration,
    ask: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match tokio::time::timeout(limit, ask).await {
        Ok(Ok(told)) => Ok(told),
        Ok(Err(error)) => Err(error.to_string().chars().take(MAX_WHY_CHARACTERS).collect()),
        Err(_) => Err(format!("no answer within {} ms", limit.as_millis())),
    }
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
