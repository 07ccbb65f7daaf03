//! What the store needs of the thing that keeps rows, small enough that another one is one file.
//!
//! An engine is blocking and knows nothing of envelopes, numbers or types. Each table has rows (any non-empty
//! key) and one *head*, a record that no row can collide with. A batch is all or nothing. Two bodies:
//! `sled_engine` and `memory`; both must pass the contract in `tests`.

use super::StoreError;
use std::collections::BTreeMap;
use std::ops::Bound;

/// Rows one scan reads from the engine at once, so that a long scan never holds others up.
pub(super) const PAGE_ROWS: usize = 512;

/// A part of a table, in the order of the keys' bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    pub from: Bound<Vec<u8>>,
    pub to: Bound<Vec<u8>>,
    /// Begin at `to` and go down.
    pub reverse: bool,
    /// At most so many rows.
    pub limit: usize,
}

impl Range {
    /// The whole table.
    pub fn all() -> Self {
        Self { from: Bound::Unbounded, to: Bound::Unbounded, reverse: false, limit: usize::MAX }
    }

    /// Rows with keys greater than `key`.
    pub fn after(key: Vec<u8>) -> Self {
        Self { from: Bound::Excluded(key), ..Self::all() }
    }

    /// Rows with keys less than `key`.
    pub fn before(key: Vec<u8>) -> Self {
        Self { to: Bound::Excluded(key), ..Self::all() }
    }

    pub fn limit(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    pub fn reversed(self) -> Self {
        Self { reverse: true, ..self }
    }

    /// No key can be inside; asking an ordered map for such a range may panic.
    pub(super) fn is_empty(&self) -> bool {
        use Bound::{Excluded, Included, Unbounded};
        match (&self.from, &self.to) {
            (Unbounded, _) | (_, Unbounded) => self.limit == 0,
            (Included(from), Included(to)) => from > to || self.limit == 0,
            (Included(from) | Excluded(from), Excluded(to)) | (Excluded(from), Included(to)) => {
                from >= to || self.limit == 0
            }
        }
    }

    /// What is left after a page that ended with `key`.
    pub(super) fn rest_after(&self, key: &[u8], taken: usize) -> Self {
        let mut rest = self.clone();
        rest.limit -= taken;
        let edge = Bound::Excluded(key.to_vec());
        if self.reverse {
            rest.to = edge;
        } else {
            rest.from = edge;
        }
        rest
    }
}

/// A row as the engine keeps it.
pub(super) type RawRow = (Vec<u8>, Vec<u8>);

/// What changes in one table: rows to put (`Some`) or delete, and the new head.
#[derive(Debug, Clone, Default)]
pub(super) struct TableBatch {
    pub rows: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    pub head: Vec<u8>,
}

/// Changes of several tables, all or nothing.
#[derive(Debug, Clone, Default)]
pub(super) struct Batch {
    pub tables: BTreeMap<String, TableBatch>,
}

pub(super) trait Engine: Send + Sync {
    /// Names of all tables that were ever written.
    fn tables(&self) -> Result<Vec<String>, StoreError>;
    fn head(&self, table: &str) -> Result<Option<Vec<u8>>, StoreError>;
    fn get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// At most `range.limit` rows; callers keep that at or below [`PAGE_ROWS`].
    fn scan(&self, table: &str, range: &Range) -> Result<Vec<RawRow>, StoreError>;
    /// After this, reads see all of the batch; a crash may still lose all of it.
    fn apply(&self, batch: &Batch) -> Result<(), StoreError>;
    /// After this, no crash and no loss of power loses what was applied.
    fn sync(&self) -> Result<(), StoreError>;
}

/// All rows of a table, page by page, to `visit`.
pub(super) fn for_each_row(
    engine: &dyn Engine,
    table: &str,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut range = Range::all();
    loop {
        let page = engine.scan(table, &range.clone().limit(PAGE_ROWS))?;
        for (key, value) in &page {
            visit(key, value)?;
        }
        match page.last() {
            Some((key, _)) if page.len() == PAGE_ROWS => range = Range::after(key.clone()),
            _ => return Ok(()),
        }
    }
}
