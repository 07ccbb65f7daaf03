//! The engine for tests in virtual time and for a host whose disk cannot be written: ordered maps, no thread.

use super::StoreError;
use super::engine::{Batch, Engine, Range, RawRow};
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

#[derive(Debug, Clone, Default)]
struct MemoryTable {
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
    head: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct MemoryEngine {
    tables: RwLock<BTreeMap<String, MemoryTable>>,
}

impl MemoryEngine {
    fn with<T>(&self, table: &str, read: impl FnOnce(&MemoryTable) -> T) -> Option<T> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner).get(table).map(read)
    }
}

impl Engine for MemoryEngine {
    fn tables(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.tables.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect())
    }

    fn head(&self, table: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.with(table, |table| table.head.clone()))
    }

    fn get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.with(table, |table| table.rows.get(key).cloned()).flatten())
    }

    fn scan(&self, table: &str, range: &Range) -> Result<Vec<RawRow>, StoreError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let read = |table: &MemoryTable| {
            let rows = table.rows.range::<Vec<u8>, _>((range.from.as_ref(), range.to.as_ref()));
            let own = |(key, value): (&Vec<u8>, &Vec<u8>)| (key.clone(), value.clone());
            if range.reverse {
                rows.rev().take(range.limit).map(own).collect()
            } else {
                rows.take(range.limit).map(own).collect()
            }
        };
        Ok(self.with(table, read).unwrap_or_default())
    }

    fn apply(&self, batch: &Batch) -> Result<(), StoreError> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        for (name, changes) in &batch.tables {
            let table = tables.entry(name.clone()).or_default();
            for (key, value) in &changes.rows {
                match value {
                    Some(value) => table.rows.insert(key.clone(), value.clone()),
                    None => table.rows.remove(key),
                };
            }
            table.head.clone_from(&changes.head);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
