//! Domains' comings, endings and changes, as XenStore tells of them, made into [`Observation`]s.
//!
//! XenStore says *that* a domain came (`@introduceDomain`), and that one ended by itself or went
//! (`@releaseDomain`), but not which. So we keep which domains were there, and tell:
//!
//! * a domain that is new, or that is there no more: that domain;
//! * a release after which all are still there: one of them has ended by itself, and XenStore does not know
//!   which, so everything. One release can stand for several, an ended one among them: after domains went,
//!   everything is told once more, a little later and once for many;
//! * a changed name, VNC port or memory target: that domain. Whatever the reason, at most once a second for each
//!   domain, since some of these nodes may be a guest's to write.
//!
//! The facts are read after their watches stand and before anybody is told to look, so that no change falls in
//! between. Not watched: `control/shutdown`, which says what was asked of a guest and not what became of it.

use super::client::Client;
use super::{Hint, Result, StoreError, StorePath, WatchPath, Watcher};
use crate::model::Observers;
use crate::xen::{DomId, Observation};
use futures_util::future::try_join_all;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Below `/local/domain/<domid>/`. Each watched node makes its domain be looked at if its value changed.
const FACTS: [&str; 3] = ["name", "console/vnc-port", "memory/target"];
/// What is kept of a value, to see whether it changed.
const MAX_FACT_BYTES: usize = 256;
/// Xen has at most 32,752 domains; beyond this many the toolstack is asked about all of them each time.
const MAX_DOMAINS: usize = 2048;
/// One domain's facts are looked at no more often.
const PACE: Duration = Duration::from_secs(1);
/// After domains went, everything is told once more, this much later.
const AFTER_GONE: Duration = Duration::from_millis(500);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(5);

/// Observes domains for as long as it is held.
#[derive(Debug)]
pub struct DomainWatch {
    observers: Arc<Observers<DomId>>,
    task: tokio::task::JoinHandle<()>,
    runtime: tokio::runtime::Handle,
}

impl DomainWatch {
    /// Must be called within a tokio runtime. Where XenStore cannot be reached, it is tried again for ever.
    pub fn start(client: Client) -> Self {
        let observers = Arc::new(Observers::default());
        let runtime = tokio::runtime::Handle::current();
        let task = runtime.spawn(watch(client, Arc::clone(&observers)));
        Self { observers, task, runtime }
    }

    /// Observations from now on. Bounded: a slow reader gets [`Observation::Everything`].
    pub fn observe(&self) -> mpsc::Receiver<Observation> {
        self.observers.observe(&self.runtime)
    }
}

impl Drop for DomainWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(client: Client, observers: Arc<Observers<DomId>>) {
    let mut retry = FIRST_RETRY;
    loop {
        let watcher = client.watcher();
        let mut look = Look {
            client: client.clone(),
            watcher,
            observers: Arc::clone(&observers),
            known: BTreeMap::new(),
            due: BTreeMap::new(),
            everything_at: None,
        };
        if let Err(error) = look.begin().await {
            tracing::debug!(%error, "domains cannot be observed");
        } else {
            retry = FIRST_RETRY;
            let Err(error) = look.go_on().await;
            tracing::warn!(%error, "observing domains begins again");
        }
        tokio::time::sleep(retry).await;
        retry = MAX_RETRY.min(retry * 2);
    }
}

/// What XenStore said of one domain.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    values: [Option<Vec<u8>>; FACTS.len()],
}

#[derive(Debug)]
struct Known {
    facts: Facts,
    not_before: Instant,
}

struct Look {
    client: Client,
    watcher: Watcher,
    observers: Arc<Observers<DomId>>,
    known: BTreeMap<DomId, Known>,
    /// Domains whose facts may have changed, and when to look.
    due: BTreeMap<DomId, Instant>,
    everything_at: Option<Instant>,
}

enum Never {}

impl Look {
    async fn begin(&mut self) -> Result<()> {
        self.watcher.add_all(vec![WatchPath::IntroduceDomain, WatchPath::ReleaseDomain]).await?;
        self.everything().await
    }

    async fn go_on(&mut self) -> std::result::Result<Never, StoreError> {
        loop {
            let next = self.due.values().copied().chain(self.everything_at).min();
            let wait = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                hint = self.watcher.next() => self.hint(hint).await?,
                () = wait => self.look_at_due().await?,
            }
        }
    }

    async fn hint(&mut self, hint: Hint) -> Result<()> {
        match hint {
            Hint::Everything => self.everything().await,
            Hint::At(WatchPath::IntroduceDomain) => {
                let came = self.newcomers().await?;
                came.into_iter().for_each(|domid| self.tell(Observation::At(domid)));
                Ok(())
            }
            Hint::At(WatchPath::ReleaseDomain) => self.released().await,
            Hint::At(WatchPath::Node(path)) => {
                if let Some((domid, known)) = domain_of(&path).and_then(|d| self.known.get_key_value(&d)) {
                    self.due.insert(*domid, known.not_before);
                }
                Ok(())
            }
        }
    }

    fn tell(&self, observation: Observation) {
        tracing::debug!(?observation, "observed");
        self.observers.tell(observation);
    }

    async fn everything(&mut self) -> Result<()> {
        self.forget_gone().await?;
        self.newcomers().await?;
        self.everything_at = None;
        self.due = self.known.iter().map(|(domid, known)| (*domid, known.not_before)).collect();
        self.tell(Observation::Everything);
        Ok(())
    }

    async fn released(&mut self) -> Result<()> {
        let gone = self.forget_gone().await?;
        if gone.is_empty() {
            self.everything_at = None;
            self.tell(Observation::Everything);
        } else {
            gone.into_iter().for_each(|domid| self.tell(Observation::At(domid)));
            self.everything_at.get_or_insert_with(|| Instant::now() + AFTER_GONE);
        }
        Ok(())
    }

    async fn look_at_due(&mut self) -> Result<()> {
        let now = Instant::now();
        if self.everything_at.is_some_and(|at| at <= now) {
            self.everything_at = None;
            self.tell(Observation::Everything);
        }
        let due: Vec<DomId> =
            self.due.iter().filter(|(_, at)| **at <= now).map(|(domid, _)| *domid).collect();
        self.due.retain(|_, at| *at > now);
        for (domid, facts) in try_join_all(due.iter().map(|d| read(&self.client, *d))).await? {
            let Some(known) = self.known.get_mut(&domid) else { continue };
            known.not_before = now + PACE;
            if known.facts != facts {
                known.facts = facts;
                self.tell(Observation::At(domid));
            }
        }
        Ok(())
    }

    /// Takes in the domains that were not known, and answers which.
    async fn newcomers(&mut self) -> Result<Vec<DomId>> {
        let home = StorePath::parse("/local/domain")?;
        let listed = self.client.children(&home).await?;
        let listed: BTreeSet<DomId> = listed.iter().filter_map(|name| name.parse().ok().map(DomId)).collect();
        let room = MAX_DOMAINS.saturating_sub(self.known.len());
        let unknown = listed.into_iter().filter(|d| *d != DomId(0) && !self.known.contains_key(d));
        let came: Vec<DomId> = introduced(&self.client, unknown).await?.into_iter().take(room).collect();
        let mut paths = Vec::new();
        for domid in &came {
            paths.extend(fact_paths(*domid)?.map(WatchPath::Node));
        }
        self.watcher.add_all(paths).await?;
        let not_before = Instant::now();
        for (domid, facts) in try_join_all(came.iter().map(|d| read(&self.client, *d))).await? {
            self.known.insert(domid, Known { facts, not_before });
        }
        Ok(came)
    }

    /// Forgets the domains that are there no more, and answers which.
    async fn forget_gone(&mut self) -> Result<Vec<DomId>> {
        let alive: BTreeSet<DomId> =
            introduced(&self.client, self.known.keys().copied()).await?.into_iter().collect();
        let gone: Vec<DomId> = self.known.keys().copied().filter(|d| !alive.contains(d)).collect();
        for domid in &gone {
            self.known.remove(domid);
            self.due.remove(domid);
            for path in fact_paths(*domid)? {
                // A watch that is left behind only tells of a domain that nobody knows.
                if let Err(error) = self.watcher.remove(&path.into()).await {
                    tracing::debug!(%error, domid = domid.0, "a watch could not be ended");
                }
            }
        }
        Ok(gone)
    }
}

fn fact_paths(domid: DomId) -> Result<[StorePath; FACTS.len()]> {
    let [a, b, c] = FACTS.map(|below| StorePath::of_domain(domid.0, below));
    Ok([a?, b?, c?])
}

fn domain_of(path: &StorePath) -> Option<DomId> {
    let rest = path.as_str().strip_prefix("/local/domain/")?;
    rest.split('/').next()?.parse().ok().map(DomId)
}

async fn introduced(client: &Client, domains: impl Iterator<Item = DomId>) -> Result<Vec<DomId>> {
    let asked = domains.map(|d| async move { client.is_introduced(d).await.map(|there| (d, there)) });
    let answers = try_join_all(asked).await?;
    Ok(answers.into_iter().filter(|(_, there)| *there).map(|(d, _)| d).collect())
}

async fn read(client: &Client, domid: DomId) -> Result<(DomId, Facts)> {
    let paths = fact_paths(domid)?;
    let values = try_join_all(paths.iter().map(|path| client.get(path))).await?;
    let mut values = values.into_iter().map(|value| {
        value.map(|mut value| {
            value.truncate(MAX_FACT_BYTES);
            value
        })
    });
    let values = std::array::from_fn(|_| values.next().flatten());
    Ok((domid, Facts { values }))
}
