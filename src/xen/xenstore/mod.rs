//! XenStore: the small tree that Xen's daemon keeps for the toolstack, the back-ends and the guests, and our own
//! client of it.
//!
//! Words: a *path* names a node ([`StorePath`]); a *value* is bytes that whoever may write the node chose, often
//! a guest, and so is hostile: bounded, and not text until one of [`text`], [`number`], [`shown`] has looked. A
//! *watch* is one registered path; its *event* is a hint to look there again and nothing more, so doubles melt
//! together and a guest that writes a thousand values a second costs one look at a time. A *transaction* is a
//! set of reads and writes that happen together or not at all.
//!
//! ```text
//!  Client ── requests ──> runner (one task: owns the connection) ── codec ── endpoint (socket or device)
//!  Watcher <── hints ────┘   answers matched by number; reconnects, and registers all watches again
//!  DomainWatch ── a Watcher on @introduceDomain, @releaseDomain and a few paths of each domain -> Observation
//! ```
//!
//! States of the connection: *connecting* (requests wait), *up*, *away* (requests fail at once with
//! [`StoreError::Unreachable`]). When it breaks, requests whose answer was still to come fail with
//! [`StoreError::Lost`] (reads are asked once more), open transactions are void, and each watcher hears
//! [`Hint::Everything`] once its watches stand again.
//!
//! What this room does not do: it keeps no copy of the tree, decides nothing, and knows no VM.

mod client;
mod codec;
#[cfg(test)]
mod device_tests;
mod domains;
mod endpoint;
#[cfg(test)]
mod fake;
mod path;
mod perms;
mod runner;
#[cfg(test)]
mod tests;
mod transaction;
mod value;
mod watch;

pub use client::Client;
pub use domains::DomainWatch;
pub use endpoint::Endpoint;
pub use path::{StorePath, WatchPath};
pub use perms::{Access, Permission};
pub use transaction::Transaction;
pub use value::{number, shown, text};
pub use watch::{Hint, Watcher};

use async_trait::async_trait;

/// What a request's payload is at most (xs_wire.h), and so a value.
pub const MAX_PAYLOAD_BYTES: usize = 4096;
/// What an answer's payload is at most: oxenstored tells a long list of children in one answer.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    BadPath(#[from] crate::model::Invalid),
    /// The request is larger than the protocol carries; nothing was sent.
    #[error("{0} bytes are more than the {MAX_PAYLOAD_BYTES} that a request to XenStore carries")]
    TooLarge(usize),
    /// More watches or names than we keep.
    #[error("more {what} than the {max} that are kept")]
    TooMany { what: &'static str, max: usize },
    #[error("no such node in XenStore")]
    NotFound,
    /// The transaction met another one: nothing of it was done. Told only after it was tried a few times.
    #[error("the transaction met others in XenStore each time it was tried")]
    Conflict,
    /// xenstored said no; the name of its error.
    #[error("XenStore refused: {0}")]
    Refused(Refusal),
    /// No answer in time. The effect is unknown: look again.
    #[error("XenStore did not answer in time")]
    Timeout,
    /// Nothing was sent: there is no connection.
    #[error("XenStore cannot be reached: {0}")]
    Unreachable(String),
    /// The connection broke before the answer came. The effect is unknown: look again.
    #[error("the connection to XenStore was lost")]
    Lost,
    /// The other side does not speak the protocol. The connection was given up.
    #[error("XenStore answered out of order: {0}")]
    Garbled(&'static str),
}

/// An error's name as xenstored tells it (xs_wire.h, `xsd_errors`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("not found")]
    NotFound,
    #[error("try again")]
    Again,
    #[error("exists already")]
    Exists,
    #[error("not allowed")]
    Denied,
    #[error("invalid")]
    Invalid,
    /// `E2BIG`: among others, a list of children that fills no single answer.
    #[error("too big")]
    TooBig,
    /// `EQUOTA`, `ENOSPC`
    #[error("quota reached")]
    Quota,
    #[error("not supported")]
    Unsupported,
    #[error("busy")]
    Busy,
    #[error("out of memory")]
    OutOfMemory,
    #[error("an error of another name")]
    Other,
}

impl Refusal {
    fn parse(payload: &[u8]) -> Self {
        match payload.strip_suffix(&[0]).unwrap_or(payload) {
            b"ENOENT" => Self::NotFound,
            b"EAGAIN" => Self::Again,
            b"EEXIST" => Self::Exists,
            b"EACCES" | b"EPERM" | b"EROFS" => Self::Denied,
            b"EINVAL" | b"EISDIR" => Self::Invalid,
            b"E2BIG" => Self::TooBig,
            b"EQUOTA" | b"ENOSPC" => Self::Quota,
            b"ENOSYS" => Self::Unsupported,
            b"EBUSY" | b"EISCONN" => Self::Busy,
            b"ENOMEM" => Self::OutOfMemory,
            _ => Self::Other,
        }
    }
}

impl From<Refusal> for StoreError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotFound => Self::NotFound,
            other => Self::Refused(other),
        }
    }
}

pub type Result<T> = std::result::Result<T, StoreError>;

/// The little of XenStore that the rest of the room needs, so that its tests can do without one.
#[async_trait]
pub trait StoreRead: Send + Sync {
    /// A node's value; `None` where there is no such node.
    async fn read(&self, path: &str) -> Result<Option<Vec<u8>>>;
    /// The names of a node's children, in the store's order; none where there is no such node.
    async fn list(&self, path: &str) -> Result<Vec<String>>;
    /// Makes the node, and those above it, where they are missing.
    async fn write(&self, path: &str, value: &[u8]) -> Result<()>;
    /// Removes a node with all below it; nothing where there is none.
    async fn rm(&self, path: &str) -> Result<()>;
}
