//! What a store is opened with, and what opening tells.

use super::{LedgerDocument, Store};
use std::path::PathBuf;
use std::time::Duration;

/// How and where to open a store.
#[derive(Debug, Clone)]
pub struct Options {
    /// The state folder. Made (mode 0700) if it is not there.
    pub dir: PathBuf,
    /// Memory for the engine's page cache, MiB.
    pub cache_mib: u64,
    /// Disk space kept aside for essential transactions, MiB.
    pub reserve_mib: u64,
    /// Tables of desired state (name, schema): the ledger repeats them.
    pub ledger_tables: &'static [(&'static str, u16)],
    /// Tables whose keys are numbers that must never be given twice; the ledger keeps their last one. Tables
    /// with appends are kept anyway.
    pub counter_tables: &'static [&'static str],
    /// Where to die, for crash tests. Only `--dev` sets it.
    pub fault: Option<FaultPoint>,
}

impl Options {
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            cache_mib: 2,
            reserve_mib: 16,
            ledger_tables: &[],
            counter_tables: &[],
            fault: None,
        }
    }
}

/// The process kills itself (SIGKILL) around one transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultPoint {
    /// The nth transaction since open, from 1.
    pub at_commit: u64,
    pub when: FaultWhen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultWhen {
    /// All before it are on disk; it is not.
    Before,
    /// It is on disk; nobody was told.
    After,
}

/// A store that can be used, and how it came to be.
#[derive(Debug)]
pub struct Opened {
    pub store: Store,
    pub report: OpenReport,
    /// The newest valid ledger, as it was before this open.
    pub ledger: Option<LedgerDocument>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenReport {
    pub recovered: Recovered,
    pub took: Duration,
    /// The last commit that is in the store.
    pub commit: u64,
    /// Rows in all tables.
    pub rows: u64,
    /// Rows whose sums were compared already; the rest is done in the background.
    pub verified_rows: u64,
    /// Numbers of keys in counter tables must be greater than these: after a rebuild they stand well above
    /// anything that may have been given before.
    pub counters: std::collections::BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovered {
    /// There was no store.
    Fresh,
    Intact,
    /// The store was damaged. Desired state is back from the ledger, the rest is gone; what was there lies in
    /// `moved_aside` (empty if there was nothing to move).
    Rebuilt {
        why: String,
        moved_aside: PathBuf,
    },
    /// The folder cannot be written. Desired state can be read; every commit is refused.
    ReadOnly {
        why: String,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("the store in {dir} is in use by another process{holder}")]
    InUse { dir: PathBuf, holder: String },
    #[error("the store in {dir} cannot be opened: {why}")]
    Failed { dir: PathBuf, why: String },
}
