//! Who may run a VM that is on its way from one host to another: pure.
//!
//! Words: the *source* sends, the *target* receives; *whole* is a copy that has arrived completely and stands paused;
//! to *hand over* is the source's durable word that it will not let the VM go on by itself any more; the *judge* is
//! the source's decision, made of what it sees and never of what it assumes.
//!
//! ```text
//!  source                                    target
//!  send …                                    receive …
//!                                            whole and paused      T1 durable, then READY
//!  handed over            S1 durable
//!  destroy the domain
//!  committed              S2 durable ──────► the record is ours    T2 durable, then it runs
//! ```
//!
//! Why it never runs twice: the target lets its copy run only after the source has said *committed*, and the source
//! says that only when its own domain is gone or was seen standing still and destroyed, and forgets the VM in the
//! same transaction. Before S1 the source may go on at any time, since the target will not. After S1 it goes on only
//! if the domain is seen running: then the toolstack never heard of the handover, and no copy has ever run.
//!
//! Both tables are desired state (the ledger repeats them): what is in them must outlive a damaged store.

use super::record::{Intent, Leaving, VmRecord};
use crate::model::{MigrationId, Timestamp, VmId};
use crate::store::Table;
use serde::{Deserialize, Serialize};

/// Copies that are here, whole and paused, and wait for the source's word (T1).
pub const ARRIVALS: Table<Arrival> = Table::new("arrival", 1);
/// How migrations ended, for those who ask later; the newest are kept.
pub const OUTCOMES: Table<Ended> = Table::new("migration", 1);
/// So many outcomes are kept at least.
pub const OUTCOMES_KEPT: usize = 1000;

/// A copy that stands here, paused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arrival {
    pub id: MigrationId,
    /// The source, by its pinned fingerprint: only it decides.
    pub source: String,
    pub record: VmRecord,
    /// It was paused there, so it stays so.
    pub paused: bool,
    pub since: Timestamp,
}

/// Which end of a migration we were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Source,
    Target,
}

/// A migration that is decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub id: MigrationId,
    pub vm: VmId,
    pub side: Side,
    pub committed: bool,
    /// The other host: address (on the source) or fingerprint (on the target).
    pub peer: String,
    pub at: Timestamp,
}

/// What the source sees of its own domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Here {
    /// It runs, or is paused: alive.
    Alive,
    /// Suspended, waiting to be destroyed.
    StandsStill,
    Gone,
}

/// What the target says of its copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum There {
    /// It cannot be asked now.
    Unknown,
    /// Nothing whole, and nothing will be: it knows of no such migration, or gave it up.
    Nothing,
    /// The copy stands there, paused.
    Whole,
    /// It was whole, and its domain is gone: that host's memory died.
    Lost,
    /// It has taken the VM over, on our word.
    Taken,
}

/// What the source knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    /// S1 is on disk.
    pub handed_over: bool,
    pub here: Here,
    pub there: There,
}

/// The judge's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The VM is the source's. The target destroys its copy.
    Aborted,
    /// The VM is the target's. A domain that stands still here is destroyed first.
    Committed,
    /// Not known yet; what is missing. Nobody runs it.
    Wait(Missing),
}

/// The evidence that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// The target's answer.
    TargetsAnswer,
    /// The only memory left stands still here and cannot be let go on: a human decides.
    TargetLostIt,
    /// It runs here, and the target has taken it over: somebody has been let run what must not.
    BothClaimIt,
}

impl Missing {
    pub fn words(self) -> &'static str {
        match self {
            Self::TargetsAnswer => "the other host must say whether it holds the VM whole",
            Self::TargetLostIt => {
                "the other host has lost its copy, and the domain here stands still and cannot be let go on; \
                 migration_resolve decides"
            }
            Self::BothClaimIt => "it runs here although the other host has taken it over; a human must look",
        }
    }
}

/// Decides. Sure of one thing: two never run.
pub fn judge(evidence: Evidence) -> Verdict {
    use There::{Lost, Nothing, Taken, Unknown, Whole};
    let Evidence { handed_over, here, there } = evidence;
    match (here, there) {
        // Nobody but us can have let it run, and nobody may any more.
        (Here::Alive, Unknown | Nothing | Whole | Lost) => Verdict::Aborted,
        (Here::Alive, Taken) => Verdict::Wait(Missing::BothClaimIt),
        // It has our word already.
        (Here::StandsStill | Here::Gone, Taken) => Verdict::Committed,
        (Here::StandsStill, Whole) => Verdict::Committed,
        (Here::StandsStill, Unknown) => Verdict::Wait(Missing::TargetsAnswer),
        (Here::StandsStill, Nothing | Lost) if handed_over => Verdict::Wait(Missing::TargetLostIt),
        (Here::StandsStill, Nothing | Lost) => Verdict::Aborted,
        // Handed over and gone: destroyed by our own toolstack, or lost with this host. It is the target's, also
        // if that has lost it since: there is nothing here.
        (Here::Gone, _) if handed_over => Verdict::Committed,
        (Here::Gone, Whole) => Verdict::Committed,
        (Here::Gone, Unknown) => Verdict::Wait(Missing::TargetsAnswer),
        (Here::Gone, Nothing | Lost) => Verdict::Aborted,
    }
}

/// What the source answers the target that asks for the outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    Committed,
    Aborted,
    /// Not decided: ask again.
    Pending,
    /// We know of neither the migration nor the VM: a human decides.
    Unknown,
}

/// See [`Word`]. `busy`: a job is open on the VM, which may be this migration's.
pub fn word(id: MigrationId, ended: Option<&Ended>, record: Option<&VmRecord>, busy: bool) -> Word {
    if let Some(ended) = ended.filter(|ended| ended.side == Side::Source) {
        return if ended.committed { Word::Committed } else { Word::Aborted };
    }
    match record.map(|record| &record.intent) {
        Some(Intent::Leaving(Leaving { id: other, .. })) if *other == id => Word::Pending,
        _ if busy => Word::Pending,
        // It is ours, and was not given out of our hands for this migration.
        Some(_) => Word::Aborted,
        None => Word::Unknown,
    }
}

#[cfg(test)]
#[path = "migration_tests.rs"]
mod tests;
