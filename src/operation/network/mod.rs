//! Changes of the host's network: *snapshot -> plan -> apply -> verify by re-reading -> confirm*, and the way back.
//!
//! Words: what is *confirmed* is the declaration that holds, kept in the store and repeated in the ledger; the *open*
//! change is the one under way, on disk with its snapshot and its deadline before the kernel hears of it; a change is
//! *back* when the kernel again has what the snapshot says, for all that the change touched.
//!
//! ```text
//! snapshot ─► apply ─► confirm ─► keep                 (one job, under the lock `network`)
//!               │ a step failed, the manager was cut off, nobody confirmed, cancelled, the agent stopped or died, the
//!               │ host rebooted
//!               ▼
//!            back at once ─► undo: event ─► roll back (or keep) ─► discovery, a child ─► the event acknowledges itself
//! ```
//!
//! A rollback that is blocked leaves the open change on disk: it is told, tried again every [`look::RETRY`] and at each
//! start, and no other change is begun before it is done. After a reboot the kernel has forgotten all: then [`boot`] carries
//! out the confirmed declaration, before VMs start.
//!
//! Who owns what: whoever holds the lock `network` writes the open change: its own job, and after that the job that restores
//! what was blocked. The word that confirms it is a row of its own.

pub mod apply;
pub mod boot;
pub mod discover;
pub mod document;
pub mod look;
pub mod restore;
mod show;

pub use show::{Shown, Waiting};

use super::Operations;
use crate::job::{JobFault, LockWant, Mode};
use crate::kernel::Stopped;
use crate::model::network::{Change, NetworkView};
use crate::model::{EventNumber, IfName, JobId, Timestamp};
use crate::network::ask::Ask;
use crate::network::{Desired, Problem, Scope, Way};
use crate::store::{StoreError, Table};
use document::{Part, read_document};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Whoever changes the network holds this.
pub const LOCK: &str = "network";

/// The name of the step that waits for the word.
pub const CONFIRM: &str = "confirm";

/// The declaration that holds: one document.
pub const NETWORK: Table<Part> = Table::new("network", 1);
const OPEN: Table<Part> = Table::new("network_open", 1);
/// Confirmations asked for; a row goes with its change.
const CONFIRMED: Table<String> = Table::new("network_confirm", 1);
/// What was done, oldest first.
const PAST: Table<Past> = Table::new("network_past", 1);

/// Changes kept as history.
pub const MAX_PAST: u64 = 1000;

/// The longest that a change may wait for its confirmation.
pub const MAX_CONFIRM: Duration = Duration::from_secs(3600);

type Result<T> = std::result::Result<T, JobFault>;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Confirmed {
    pub desired: Desired,
    /// What managers have noted about links; never interpreted.
    #[serde(default)]
    pub meta: BTreeMap<IfName, String>,
    #[serde(default)]
    pub job: Option<JobId>,
    #[serde(default)]
    pub changed: Option<Timestamp>,
}

/// What to do when a change fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    #[default]
    Rollback,
    /// What worked stays, and is what is declared from then on.
    Keep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Options {
    /// Rolled back if nobody confirms within this many seconds of the snapshot.
    #[serde(default)]
    pub confirm_within_s: Option<u64>,
    #[serde(default)]
    pub on_failure: OnFailure,
    /// Done even if it takes away what the caller came by.
    #[serde(default)]
    pub may_cut_management: bool,
}

/// What is asked for: the whole declaration, or a change of it that is made under the lock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    Whole(Box<Desired>),
    Edit(Ask),
}

/// The change under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Open {
    pub job: JobId,
    pub boot_id: String,
    pub began: Timestamp,
    /// What holds if this does not.
    pub before: Confirmed,
    pub after: Confirmed,
    pub snapshot: NetworkView,
    pub aim: NetworkView,
    pub options: Options,
    /// Until when it must be confirmed.
    pub confirm_until: Option<Timestamp>,
    /// Who must stay reachable.
    pub caller: Option<Way>,
    /// Who asked, by which verb.
    #[serde(default)]
    pub by: String,
    #[serde(default)]
    pub verb: String,
    /// Why it does not hold.
    #[serde(default)]
    pub why: Option<String>,
    /// Links of it that another service of the host has.
    #[serde(default)]
    pub left_alone: BTreeSet<IfName>,
    /// What leads from the snapshot to the aim; known in the life that planned it.
    #[serde(skip)]
    pub changes: Vec<Change>,
    /// The event that tells of its failure is the first such after this one.
    #[serde(default)]
    pub told_after: Option<EventNumber>,
    /// That which tells that its rollback is blocked is the first such after this one.
    #[serde(default)]
    pub blocked_after: Option<EventNumber>,
}

impl Open {
    pub fn scope(&self) -> Scope {
        Scope::of(&self.before.desired, &self.after.desired, &self.snapshot)
            .without(&self.left_alone, &self.aim)
    }
}

/// How a change ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    Applied,
    RolledBack,
    Kept,
    /// Put right after the host's boot, or after a rollback that was blocked.
    Restored,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Past {
    pub at: Timestamp,
    pub job: JobId,
    pub caller: String,
    pub verb: String,
    pub ending: Ending,
    /// The steps, for people; at most [`MAX_TOLD`].
    pub changes: Vec<String>,
    pub why: Option<String>,
}

/// Steps and differences told in one record or event.
pub const MAX_TOLD: usize = 50;

/// What a change would do, or is about to do.
#[derive(Debug, Clone)]
pub struct Draft {
    pub before: Confirmed,
    pub after: Confirmed,
    pub now: NetworkView,
    pub aim: NetworkView,
    pub scope: Scope,
    pub left_alone: BTreeSet<IfName>,
    pub changes: Vec<Change>,
}

pub(super) fn locks() -> Vec<LockWant> {
    vec![LockWant::shared("host"), LockWant { object: LOCK.to_owned(), mode: Mode::Exclusive }]
}

/// The words of the first few, and how many more there are.
pub fn told<T: std::fmt::Display>(all: impl IntoIterator<Item = T>) -> Vec<String> {
    let mut all = all.into_iter();
    let mut words: Vec<String> = all.by_ref().take(MAX_TOLD).map(|one| one.to_string()).collect();
    let more = all.count();
    if more > 0 {
        words.push(format!("and {more} more"));
    }
    words
}

fn invalid(problems: &[Problem]) -> JobFault {
    let words = told(problems).join("; ");
    JobFault::refusal("INVALID_NETWORK", format!("{words}; nothing was changed"))
}

fn store_fault(error: &StoreError) -> JobFault {
    JobFault::new("STORE", error.to_string())
}

impl Operations {
    /// The declaration that holds.
    pub async fn network_confirmed(&self) -> Result<Confirmed> {
        let found = read_document(&self.store, &NETWORK).await.map_err(|e| store_fault(&e))?;
        Ok(found.unwrap_or_default())
    }

    /// The change under way, or one whose rollback is blocked.
    pub async fn network_open(&self) -> Result<Option<Open>> {
        read_document(&self.store, &OPEN).await.map_err(|e| store_fault(&e))
    }

    /// The open change, if it is this job's.
    /// The same, as this life has written it down: thousands of links are not read again for each step.
    async fn network_known(&self, job: JobId) -> Result<Option<Arc<Open>>> {
        let known = self.network_cache.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(open) = known.filter(|open| open.job == job) {
            return Ok(Some(open));
        }
        Ok(self.network_of(job).await?.map(Arc::new))
    }

    fn keep_known(&self, open: Option<Arc<Open>>) {
        *self.network_cache.lock().unwrap_or_else(PoisonError::into_inner) = open;
    }

    async fn network_of(&self, job: JobId) -> Result<Option<Open>> {
        Ok(self.network_open().await?.filter(|open| open.job == job))
    }

    /// What the change would do to the network as it is now; refused if it cannot be, or must not.
    pub async fn network_draft(&self, want: &Want, options: Options, caller: Option<Way>) -> Result<Draft> {
        let before = self.network_confirmed().await?;
        let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        let owners = self.kernel.owners().await.map_err(|e| kernel_fault(&e))?;
        let mut after = before.clone();
        match want {
            Want::Whole(desired) => after.desired = Desired::clone(desired),
            Want::Edit(ask) => {
                let edited = ask
                    .resolve(&before.desired, &before.meta, &now)
                    .map_err(|problem| invalid(&[problem]))?;
                (after.desired, after.meta) = edited;
            }
        }
        let problems = crate::network::validate(&after.desired, &before.desired, &now, &owners);
        if !problems.is_empty() {
            return Err(invalid(&problems));
        }
        let aim = crate::network::aim(&now, &before.desired, &after.desired);
        // Those that were declared before somebody else took them: no others get past `validate`.
        let named = before.desired.links.keys().chain(after.desired.links.keys());
        let left_alone: BTreeSet<IfName> = named.filter(|link| owners.contains_key(*link)).cloned().collect();
        let scope = Scope::of(&before.desired, &after.desired, &now).without(&left_alone, &aim);
        let changes = crate::network::plan(&now, &aim, &scope);
        let declared = &after.desired.links;
        after.meta.retain(|link, _| aim.links.contains_key(link) || declared.contains_key(link));
        if !options.may_cut_management
            && !changes.is_empty()
            && let Some(problem) = self.cut_off((&before, &after), &now, &aim, caller)
        {
            return Err(invalid(&[problem]));
        }
        Ok(Draft { before, after, now, aim, scope, left_alone, changes })
    }

    /// The one way to the kernel, so that [`look`] knows what was our doing.
    async fn change_network(&self, changes: &[Change]) -> std::result::Result<(), Stopped> {
        self.network_changes.fetch_add(1, Ordering::SeqCst);
        let done = self.kernel.change_all(changes).await;
        self.network_changes.fetch_add(1, Ordering::SeqCst);
        done
    }

    /// Whether a network takes away what the other one is reached by. `declared`: before and after.
    fn cut_off(
        &self,
        (before, after): (&Confirmed, &Confirmed),
        now: &NetworkView,
        then: &NetworkView,
        caller: Option<Way>,
    ) -> Option<Problem> {
        let is_theirs = |network: &&crate::network::LogicalNetwork| {
            network.roles.contains(&crate::network::Role::Management)
        };
        let link =
            |all: &Confirmed| all.desired.networks.values().find(is_theirs).map(|one| one.link.clone());
        let management = crate::network::Management {
            ip: caller.and_then(|way| way.own.or_else(|| crate::network::way_in(now, way.peer))),
            peer: caller.map(|way| way.peer),
            link: link(before),
            next: link(after),
        };
        let cuts = crate::network::cuts_management(now, then, &management);
        cuts.or_else(|| crate::network::cuts_all(now, then))
    }
}

pub(super) fn kernel_fault(error: &crate::kernel::KernelError) -> JobFault {
    match error {
        crate::kernel::KernelError::Refused(why) => JobFault::new("NETWORK_FAILED", why.to_string()),
        crate::kernel::KernelError::Unanswered(_) => JobFault::new("NETWORK_TIMEOUT", error.to_string()),
    }
}
