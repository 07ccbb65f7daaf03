//! Turning transactions into batches: numbers, heads, checks. Shared by the memory body and the disk's writer.
//!
//! Each table's *head* holds the number of the last commit that touched it, the last number an append was given
//! (so that pruning everything does not start again at 1), how many rows it has, and the sum of their
//! fingerprints. The *master head* (of the table `_store`) repeats each table's commit number. All heads are in
//! the same batch as the rows: if they differ after a crash, or if the rows do not add up, the engine tore a
//! batch and the store is not to be trusted.

use super::engine::{Batch, Engine, TableBatch};
use super::envelope;
use super::table::{Op, Txn};
use super::{Committed, Mode, StoreError};
use crate::model::histogram::{CALL_BOUNDS, Histogram};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use tokio::sync::watch;

/// The table that has only a head.
pub(super) const MASTER: &str = "_store";
/// Schema of heads.
const HEAD_SCHEMA: u16 = 1;
/// A larger value would leave the engine's log and go into a file of its own, which it does not sync.
pub(super) const MAX_VALUE_BYTES: usize = 256 * 1024;
/// All values of one transaction.
const MAX_TXN_BYTES: usize = 4 * 1024 * 1024;
const MAX_KEY_BYTES: usize = 1024;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TableHead {
    /// The last commit that touched this table.
    pub commit: u64,
    /// The last number given by an append.
    pub last: u64,
    pub rows: u64,
    /// Wrapping sum of the rows' fingerprints.
    pub sum: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct MasterHead {
    commit: u64,
    tables: BTreeMap<String, u64>,
}

/// Where counting stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub commit: u64,
    pub tables: BTreeMap<String, TableHead>,
}

impl Numbers {
    /// Reads and compares all heads. `Err(Damaged)` says what does not fit.
    pub fn load(engine: &dyn Engine) -> Result<Self, StoreError> {
        let mut numbers = Self::default();
        let mut master = MasterHead::default();
        for name in engine.tables()? {
            let Some(sealed) = engine.head(&name)? else {
                // A table is made just before its first batch; a crash between the two leaves it bare.
                if !engine.scan(&name, &super::Range::all().limit(1))?.is_empty() {
                    return Err(StoreError::Damaged(format!("table {name} has rows and no head")));
                }
                continue;
            };
            if name == MASTER {
                master = decode(&name, &sealed)?;
            } else {
                numbers.tables.insert(name.clone(), decode(&name, &sealed)?);
            }
        }
        numbers.commit = master.commit;
        for (name, head) in &numbers.tables {
            let known = master.tables.remove(name).unwrap_or(0);
            if known != head.commit {
                return Err(StoreError::Damaged(format!(
                    "table {name} stands at commit {}, the store says {known}",
                    head.commit
                )));
            }
        }
        match master.tables.keys().next() {
            Some(name) => Err(StoreError::Damaged(format!("table {name} is missing"))),
            None => Ok(numbers),
        }
    }

    fn master(&self) -> MasterHead {
        let tables = self.tables.iter().map(|(name, head)| (name.clone(), head.commit)).collect();
        MasterHead { commit: self.commit, tables }
    }
}

fn decode<T: serde::de::DeserializeOwned>(table: &str, sealed: &[u8]) -> Result<T, StoreError> {
    let json = envelope::open_as(table, HEAD_SCHEMA, sealed)?;
    serde_json::from_slice(json)
        .map_err(|error| StoreError::Damaged(format!("the head of table {table}: {error}")))
}

fn encode<T: Serialize>(head: &T) -> Result<Vec<u8>, StoreError> {
    let json = serde_json::to_vec(head).map_err(|error| StoreError::Io(error.to_string()))?;
    Ok(envelope::seal(HEAD_SCHEMA, &json))
}

/// A batch in the making.
struct Plan<'a> {
    engine: &'a dyn Engine,
    numbers: Numbers,
    batch: Batch,
}

impl Plan<'_> {
    fn add(&mut self, txn: &Txn) -> Result<Committed, StoreError> {
        self.numbers.commit += 1;
        let mut appended = Vec::new();
        for op in &txn.ops {
            match op {
                Op::Put { table, schema, key, value } => {
                    self.set(table, key.clone(), Some(envelope::seal(*schema, value)))?;
                }
                Op::Delete { table, key } => self.set(table, key.clone(), None)?,
                Op::Append { table, schema, value } => {
                    let number = self.numbers.tables.get(*table).map_or(0, |head| head.last) + 1;
                    self.set(table, number.to_be_bytes().to_vec(), Some(envelope::seal(*schema, value)))?;
                    self.head(table).last = number;
                    appended.push(number);
                }
            }
        }
        Ok(Committed { number: self.numbers.commit, appended })
    }

    fn head(&mut self, table: &str) -> &mut TableHead {
        if !self.numbers.tables.contains_key(table) {
            self.numbers.tables.insert(table.to_owned(), TableHead::default());
        }
        // The line above put it there.
        self.numbers.tables.entry(table.to_owned()).or_default()
    }

    fn set(&mut self, table: &str, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<(), StoreError> {
        if !self.batch.tables.contains_key(table) {
            self.batch.tables.insert(table.to_owned(), TableBatch::default());
        }
        let changes = self.batch.tables.entry(table.to_owned()).or_default();
        let old = match changes.rows.get(&key) {
            Some(pending) => pending.as_ref().map(|value| envelope::fingerprint(&key, value)),
            None => self.engine.get(table, &key)?.map(|value| envelope::fingerprint(&key, &value)),
        };
        let new = value.as_ref().map(|value| envelope::fingerprint(&key, value));
        changes.rows.insert(key, value);
        let commit = self.numbers.commit;
        let head = self.head(table);
        head.commit = commit;
        head.rows = (head.rows + u64::from(new.is_some())).saturating_sub(u64::from(old.is_some()));
        head.sum = head.sum.wrapping_add(new.unwrap_or(0)).wrapping_sub(old.unwrap_or(0));
        Ok(())
    }

    fn seal(&mut self) -> Result<(), StoreError> {
        for (name, changes) in &mut self.batch.tables {
            let head = self.numbers.tables.get(name).copied().unwrap_or_default();
            changes.head = encode(&head)?;
        }
        let head = encode(&self.numbers.master())?;
        self.batch.tables.insert(MASTER.to_owned(), TableBatch { rows: BTreeMap::new(), head });
        Ok(())
    }
}

/// Writes the first batch of an engine: counting goes on from `numbers`, and these transactions' rows are there.
pub(super) fn seed(engine: &dyn Engine, numbers: Numbers, txns: &[Txn]) -> Result<Numbers, StoreError> {
    let mut plan = Plan { engine, numbers, batch: Batch::default() };
    plan.numbers.commit += 1;
    let commit = plan.numbers.commit;
    for (name, head) in &mut plan.numbers.tables {
        head.commit = commit;
        plan.batch.tables.insert(name.clone(), TableBatch::default());
    }
    for txn in txns {
        refuse(txn)?;
        plan.add(txn)?;
    }
    plan.seal()?;
    engine.apply(&plan.batch)?;
    engine.sync()?;
    Ok(plan.numbers)
}

/// Why this transaction alone cannot be written, if so.
fn refuse(txn: &Txn) -> Result<(), StoreError> {
    let refused = |why: String| Err(StoreError::Refused(why));
    if let Some(why) = &txn.broken {
        return refused(format!("a value could not be encoded: {why}"));
    }
    let mut total = 0;
    for op in &txn.ops {
        let (table, key, value) = match op {
            Op::Put { table, key, value, .. } => (table, Some(key), value.len()),
            Op::Delete { table, key } => (table, Some(key), 0),
            Op::Append { table, value, .. } => (table, None, value.len()),
        };
        total += value;
        if value > MAX_VALUE_BYTES {
            return refused(format!(
                "table {table}: a value has {value} bytes, {MAX_VALUE_BYTES} are allowed"
            ));
        }
        if key.is_some_and(|key| key.is_empty() || key.len() > MAX_KEY_BYTES) {
            return refused(format!("table {table}: a key must have 1 to {MAX_KEY_BYTES} bytes"));
        }
        if table.is_empty() || table.starts_with('_') {
            return refused(format!("a table cannot be called {table:?}"));
        }
    }
    if total > MAX_TXN_BYTES {
        return refused(format!("a transaction has {total} bytes, {MAX_TXN_BYTES} are allowed"));
    }
    Ok(())
}

/// The engine and where counting stands; the only place that writes rows.
pub(super) struct Core {
    /// When there is none: what everybody who asks is told.
    engine: RwLock<Result<Box<dyn Engine>, StoreError>>,
    /// Held while a group is written, so whoever holds it sees the store between two commits.
    numbers: Mutex<Numbers>,
    /// Rows by table as of the last commit: apart, since `numbers` is held for as long as the disk takes to sync.
    rows: Mutex<HashMap<String, u64>>,
    sequences: Mutex<HashMap<String, watch::Sender<u64>>>,
    pub mode: watch::Sender<Mode>,
    /// From the call to the answer, of those that were written.
    pub commits: Histogram,
}

impl Core {
    pub fn new(engine: Box<dyn Engine>, numbers: Numbers, mode: Mode) -> Self {
        let core = Self {
            engine: RwLock::new(Ok(engine)),
            numbers: Mutex::new(numbers),
            rows: Mutex::default(),
            sequences: Mutex::default(),
            mode: watch::Sender::new(mode),
            commits: Histogram::new(CALL_BOUNDS),
        };
        core.publish(&core.numbers());
        core
    }

    pub fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows by table, unless a group is being written: that may take as long as the disk does.
    pub fn rows_if_free(&self) -> Option<Vec<(String, u64)>> {
        let numbers = self.numbers.try_lock().ok()?;
        Some(numbers.tables.iter().map(|(name, head)| (name.clone(), head.rows)).collect())
    }

    /// Rows of a table as of the last commit. Waits for no disk.
    pub fn rows(&self, table: &str) -> u64 {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).get(table).copied().unwrap_or(0)
    }

    fn keep_rows(&self, numbers: &Numbers) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, head) in &numbers.tables {
            match rows.get_mut(name) {
                Some(kept) => *kept = head.rows,
                None => drop(rows.insert(name.clone(), head.rows)),
            }
        }
    }

    pub fn read<T>(&self, read: impl FnOnce(&dyn Engine) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let engine = self.engine.read().unwrap_or_else(PoisonError::into_inner);
        match &*engine {
            Ok(engine) => read(engine.as_ref()),
            Err(why) => Err(why.clone()),
        }
    }

    /// Takes the engine away, when reads under way are done; all that ask afterwards are told `why`.
    pub fn take_engine(&self, why: StoreError) -> Option<Box<dyn Engine>> {
        let mut engine = self.engine.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *engine, Err(why)).ok()
    }

    /// Puts an engine in the place of one that failed, with the numbers it stands at.
    pub fn put_engine(&self, engine: Box<dyn Engine>, numbers: Numbers) {
        self.keep_rows(&numbers);
        *self.numbers() = numbers;
        *self.engine.write().unwrap_or_else(PoisonError::into_inner) = Ok(engine);
    }

    pub fn sequence(&self, table: &str) -> watch::Receiver<u64> {
        let mut sequences = self.sequences.lock().unwrap_or_else(PoisonError::into_inner);
        sequences.entry(table.to_owned()).or_insert_with(|| watch::Sender::new(0)).subscribe()
    }

    /// Tells how far the tables are, and the followers of sequences.
    pub fn publish(&self, numbers: &Numbers) {
        self.keep_rows(numbers);
        let mut sequences = self.sequences.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, head) in &numbers.tables {
            if head.last == 0 {
                continue;
            }
            let sender = sequences.entry(name.clone()).or_insert_with(|| watch::Sender::new(0));
            sender.send_if_modified(|last| std::mem::replace(last, head.last) != head.last);
        }
    }

    /// Writes a group of transactions, in order, in one batch, on disk when it returns. The inner errors are
    /// of single transactions; the outer error is of the engine, and then none of the group may be relied on.
    pub fn commit_group(&self, group: &[Txn]) -> Result<Vec<Result<Committed, StoreError>>, StoreError> {
        let mut numbers = self.numbers();
        let (results, after) = self.read(|engine| {
            let mut plan = Plan { engine, numbers: numbers.clone(), batch: Batch::default() };
            let mut results = Vec::with_capacity(group.len());
            for txn in group {
                results.push(match refuse(txn) {
                    Ok(()) => Ok(plan.add(txn)?),
                    Err(why) => Err(why),
                });
            }
            if results.iter().any(Result::is_ok) {
                plan.seal()?;
                engine.apply(&plan.batch)?;
                engine.sync()?;
            }
            Ok((results, plan.numbers))
        })?;
        *numbers = after;
        self.publish(&numbers);
        Ok(results)
    }
}
