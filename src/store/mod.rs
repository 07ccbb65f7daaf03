//! The embedded store: typed tables, atomic transactions that are on disk when `commit` returns, numbered logs,
//! and a ledger that a human can read.
//!
//! Words: a *table* is a typed key-value map; a *transaction* changes several tables, all or nothing; the
//! *commit number* rises by one with each; an *append* gives its value the next number of its table, without
//! holes, in commit order; the *ledger* is the desired state as JSON, beside the store, in two copies.
//!
//! sled is used as measured (it does not fsync, panics on some damage, blocks): one writer thread with group
//! commit and an own `fdatasync`, values in envelopes with version and checksum, the commit number written into
//! every table a transaction touches and compared at open, `open` under `catch_unwind`. Nothing outside
//! `sled_engine` knows that sled exists; `memory` is the body for tests in virtual time.
//!
//! ```text
//! callers --commit--> places (1,024) --> writer thread --> core: numbers, heads, one batch --> engine
//!         --get/scan--> blocking threads, 2 for rows and 2 for pages ----------------------------^
//!                                          writer --wakes--> ledger thread --> ledger.{0,1}.json
//! ```
//!
//! Who finds which damage: the engine, what breaks its pages; heads, a torn batch; each table's count and sum,
//! rows that went missing or back; ledger and witness, a whole store that went back. Opening looks at heads
//! always and at rows of ledger tables and small tables; `tools::check` looks at all rows. What the store does not
//! do: keep snapshots for readers, know what its tables mean, or repair anything but by rebuilding.

mod core;
mod engine;
mod envelope;
mod handle;
mod ledger;
mod live;
mod memory;
mod open;
mod options;
mod panics;
mod sled_engine;
mod space;
mod table;
pub mod tools;
mod verify;
mod witness;
mod writer;

use crate::model::histogram::Counted;
pub use engine::Range;
pub use handle::Store;
pub use ledger::{LedgerDocument, restore_from_ledger};
pub use options::{FaultPoint, FaultWhen, OpenError, OpenReport, Opened, Options, Recovered};
pub use table::{Importance, Key, Op, Table, Txn};

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nothing was written. Free some space; verbs that need no space still work.
    #[error("the disk is full: {0}")]
    DiskFull(String),
    /// The store can only be read. Nothing was written.
    #[error("the store is read-only: {0}")]
    ReadOnly(String),
    /// A value did not pass its checksum or version, or tables disagree.
    #[error("the store is damaged: {0}")]
    Damaged(String),
    /// The disk or the engine failed; what was being written may or may not be there.
    #[error("the store failed: {0}")]
    Io(String),
    /// This transaction can never be written: a value or key is too large or cannot be encoded.
    #[error("the transaction was refused: {0}")]
    Refused(String),
    /// The store was closed (the daemon is stopping).
    #[error("the store is closed")]
    Closed,
}

impl From<std::io::Error> for StoreError {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        match error.kind() {
            Kind::StorageFull | Kind::QuotaExceeded => Self::DiskFull(error.to_string()),
            Kind::ReadOnlyFilesystem | Kind::PermissionDenied => Self::ReadOnly(error.to_string()),
            Kind::UnexpectedEof | Kind::InvalidData => Self::Damaged(error.to_string()),
            _ => Self::Io(error.to_string()),
        }
    }
}

/// What a commit did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    pub number: u64,
    /// The numbers that the transaction's appends were given, in order.
    pub appended: Vec<u64>,
}

/// What the store can do at present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    Normal,
    /// The disk is nearly full: only essential transactions are written, from the reserve.
    LowSpace,
    /// Nothing can be written.
    ReadOnly {
        why: String,
    },
}

/// What monitoring asks of the store.
#[derive(Debug, Clone)]
pub struct Figures {
    pub commits: Counted,
    /// Transactions that are queued or being written.
    pub waiting: usize,
    pub mode: Mode,
    /// By table; `None` while a group is being written.
    pub rows: Option<Vec<(String, u64)>>,
}

#[cfg(test)]
mod tests;
