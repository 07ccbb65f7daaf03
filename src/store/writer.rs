//! The thread that alone writes: drains the queue and commits everything in it as one group.
//!
//! A caller takes one of a fixed number of places in the queue and waits if there is none; so the queue never
//! grows, and a burst slows its callers down instead. The thread takes what is queued, up to a bound, writes
//! it with one sync and answers each caller. Nothing else writes; the ledger has a thread of its own that this
//! one wakes.

use super::table::Txn;
use super::{Committed, StoreError};

pub(super) struct Writer {}

impl Writer {
    pub async fn commit(&self, _txn: Txn) -> Result<Committed, StoreError> {
        Err(StoreError::Closed)
    }

    pub async fn close(&self) {}
}
