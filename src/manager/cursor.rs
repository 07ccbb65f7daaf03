//! How far each stream has come, on disk.

use super::source::Stream;
use super::target::Target;
use crate::model::Timestamp;
use crate::store::{Store, StoreError, Table, Txn};
use serde::{Deserialize, Serialize};

const CURSORS: Table<Cursor> = Table::new("delivery", 1);
/// By `host:port`.
const LEARNED: Table<Learned> = Table::new("delivery_pin", 1);

/// The row of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Whose it is: another manager begins anew.
    pub manager: String,
    pub since: Timestamp,
    /// The last number that the manager took.
    pub number: u64,
    /// What was told of a trouble that is not over.
    #[serde(default)]
    pub told: Told,
}

/// A trouble with the manager; the worse one is told after the other, never before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    #[default]
    Nothing,
    Unreachable,
    Refused,
}

/// The certificate that a manager showed first which gave none: both streams hold to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    pub sha256: String,
    pub manager: String,
    /// A later `take_ownership` of the same manager forgets it: its certificate may be another by then.
    pub taken: Timestamp,
}

impl Learned {
    /// Of the host and port of this URL.
    pub(super) async fn load(store: &Store, target: &Target, url: &str) -> Result<Option<Self>, StoreError> {
        let known = store.get(&LEARNED, target.place(url).as_str()).await?;
        Ok(known.filter(|known| known.manager == target.manager && known.taken == target.taken))
    }

    pub(super) fn put(&self, txn: &mut Txn, place: &str) {
        txn.put(&LEARNED, place, self);
    }
}

impl Cursor {
    pub(super) fn new(manager: &str, since: Timestamp, number: u64) -> Self {
        Self { manager: manager.to_owned(), since, number, told: Told::Nothing }
    }

    pub(super) async fn load(store: &Store, stream: Stream) -> Result<Option<Self>, StoreError> {
        store.get(&CURSORS, stream.as_str()).await
    }

    pub(super) fn put(&self, txn: &mut Txn, stream: Stream) {
        txn.put(&CURSORS, stream.as_str(), self);
    }

    pub(super) async fn save(&self, store: &Store, stream: Stream) -> Result<(), StoreError> {
        let mut txn = Txn::essential();
        self.put(&mut txn, stream);
        store.commit(txn).await.map(drop)
    }
}
