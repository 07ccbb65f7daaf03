//! What a stream delivers, seen by its runner: batches after a number.

use crate::model::Timestamp;
use bytes::Bytes;
use futures_util::future::BoxFuture;

/// The two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    Events,
    Statistics,
}

impl Stream {
    pub const ALL: [Self; 2] = [Self::Events, Self::Statistics];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Statistics => "statistics",
        }
    }
}

/// Numbers that were not kept until they could be sent, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    pub from: u64,
    pub to: u64,
}

/// How much one batch may hold. At least one item goes into each, however large it is; a gap goes beside them, but alone
/// where there may be but one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub items: usize,
    pub bytes: usize,
}

/// What one POST carries.
#[derive(Debug, Clone)]
pub struct Batch {
    pub body: Bytes,
    /// The cursor after it was taken.
    pub last: u64,
    pub items: usize,
    pub gap: Option<Gap>,
    /// W3C traceparent, if all items are of one trace.
    pub trace: Option<String>,
}

/// Why there is no batch now; another try may have one.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// A stream's items. Reads change nothing, so a future that is dropped loses nothing.
pub trait Source: Send + Sync + 'static {
    /// The next batch after a number; waits until there is one.
    fn next(&self, after: u64, limit: Limit) -> BoxFuture<'_, Result<Batch, SourceError>>;

    /// The number of the newest item.
    fn newest(&self) -> u64;

    /// How many wait behind a number.
    fn behind(&self, after: u64) -> u64;

    /// Where a manager begins that has taken nothing yet. `from`: the number of the newest event when it became our
    /// owner, if that is known; `since`: when that was.
    fn start(&self, from: Option<u64>, since: Timestamp) -> u64;

    /// The manager has taken all up to this number, in this life or in an earlier one.
    fn taken(&self, number: u64);
}
