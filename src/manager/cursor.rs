//! How far each stream has come, on disk.

use super::source::Stream;
use crate::model::Timestamp;
use crate::store::{Store, StoreError, Table, Txn};
use serde::{Deserialize, Serialize};

const CURSORS: Table<Cursor> = Table::new("delivery", 1);

/// The row of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Whose it is: another manager begins anew.
    pub manager: String,
    pub since: Timestamp,
    /// The last number that the manager took.
    pub number: u64,
    /// That the manager cannot be reached was told, and that it can again was not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub told: bool,
    /// SHA-256 of the certificate that was seen first, of a manager that gave none; and the URL it was seen at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<Learned>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    pub sha256: String,
    pub url: String,
}

impl Cursor {
    pub(super) fn new(manager: &str, since: Timestamp, number: u64) -> Self {
        Self { manager: manager.to_owned(), since, number, told: false, learned: None }
    }

    pub(super) async fn load(store: &Store, stream: Stream) -> Result<Option<Self>, StoreError> {
        store.get(&CURSORS, stream.as_str()).await
    }

    pub(super) fn put(&self, txn: &mut Txn, stream: Stream) {
        txn.put(&CURSORS, stream.as_str(), self);
    }

    pub(super) async fn save(&self, store: &Store, stream: Stream) -> Result<(), StoreError> {
        let mut txn = Txn::new();
        self.put(&mut txn, stream);
        store.commit(txn).await.map(drop)
    }
}
