//! Tables and transactions, as the rooms above write them.

use serde::{Serialize, de::DeserializeOwned};
use std::marker::PhantomData;

/// A typed table. `schema` is written into each value's envelope; a value of another schema is refused.
#[derive(Debug)]
pub struct Table<V> {
    pub name: &'static str,
    pub schema: u16,
    value: PhantomData<fn() -> V>,
}

impl<V: Serialize + DeserializeOwned> Table<V> {
    pub const fn new(name: &'static str, schema: u16) -> Self {
        Self { name, schema, value: PhantomData }
    }
}

/// Something that names a row. The order of the bytes is the order of the rows.
pub trait Key {
    fn bytes(&self) -> Vec<u8>;
}

impl Key for u64 {
    fn bytes(&self) -> Vec<u8> {
        self.to_be_bytes().to_vec()
    }
}

impl Key for str {
    fn bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

impl Key for [u8] {
    fn bytes(&self) -> Vec<u8> {
        self.to_vec()
    }
}

impl Key for crate::model::JobId {
    fn bytes(&self) -> Vec<u8> {
        self.0.bytes()
    }
}

impl Key for crate::model::EventNumber {
    fn bytes(&self) -> Vec<u8> {
        self.0.bytes()
    }
}

impl Key for crate::model::VmId {
    fn bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

impl Key for crate::model::MigrationId {
    fn bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

/// Whether a transaction may use the disk space kept in reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Importance {
    #[default]
    Normal,
    /// Stopping VMs, ending and undoing jobs, recovery, pruning.
    Essential,
}

/// One change of one row. Values are JSON here and get their envelope in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put {
        table: &'static str,
        schema: u16,
        key: Vec<u8>,
        value: Vec<u8>,
    },
    Delete {
        table: &'static str,
        key: Vec<u8>,
    },
    /// The key is the next number of the table, big-endian.
    Append {
        table: &'static str,
        schema: u16,
        value: Vec<u8>,
    },
}

/// Changes that happen together or not at all.
#[derive(Debug, Clone, Default)]
pub struct Txn {
    pub(super) ops: Vec<Op>,
    pub(super) importance: Importance,
    /// The first value that could not be encoded; the commit then fails.
    pub(super) broken: Option<String>,
}

impl Txn {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn essential() -> Self {
        Self { importance: Importance::Essential, ..Self::default() }
    }

    pub fn set_importance(&mut self, importance: Importance) {
        self.importance = importance;
    }

    pub fn importance(&self) -> Importance {
        self.importance
    }

    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    pub fn put<V: Serialize, K: Key + ?Sized>(&mut self, table: &Table<V>, key: &K, value: &V) {
        if let Some(value) = self.encode(table, value) {
            self.ops.push(Op::Put { table: table.name, schema: table.schema, key: key.bytes(), value });
        }
    }

    pub fn delete<V, K: Key + ?Sized>(&mut self, table: &Table<V>, key: &K) {
        self.ops.push(Op::Delete { table: table.name, key: key.bytes() });
    }

    pub fn append<V: Serialize>(&mut self, table: &Table<V>, value: &V) {
        if let Some(value) = self.encode(table, value) {
            self.ops.push(Op::Append { table: table.name, schema: table.schema, value });
        }
    }

    /// Adds the changes of `other` behind ours; essential if either is.
    pub fn merge(&mut self, other: Txn) {
        self.ops.extend(other.ops);
        if other.importance == Importance::Essential {
            self.importance = Importance::Essential;
        }
        self.broken = self.broken.take().or(other.broken);
    }

    fn encode<V: Serialize>(&mut self, table: &Table<V>, value: &V) -> Option<Vec<u8>> {
        match serde_json::to_vec(value) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                self.broken.get_or_insert_with(|| format!("table {}: {error}", table.name));
                None
            }
        }
    }
}
