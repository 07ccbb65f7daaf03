//! What the rooms above hold: `Store`, cheap to clone, asynchronous.

use super::core::{Core, Numbers};
use super::engine::{PAGE_ROWS, Range, RawRow};
use super::envelope;
use super::memory::MemoryEngine;
use super::table::{Key, Table, Txn};
use super::writer::Writer;
use super::{Committed, Figures, Mode, StoreError};
use serde::{Serialize, de::DeserializeOwned};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Keys, and what could be read of each row.
type Rows<V> = Vec<(Vec<u8>, Result<V, StoreError>)>;

/// Reads of each kind (single rows; pages of scans) that may be on blocking threads at once. Two kinds, so that
/// a single row never waits behind scans; few, since more threads only wait for the same disk.
const READERS: usize = 2;
/// Rows a pruning transaction deletes: small enough that commits of others hardly notice.
const PRUNE_ROWS: usize = 128;

/// The store. Clones are the same store.
#[derive(Clone)]
pub struct Store {
    pub(super) core: Arc<Core>,
    body: Body,
}

#[derive(Clone)]
enum Body {
    /// Everything happens inline: nothing here blocks.
    Memory {
        end: Arc<End>,
    },
    Disk {
        writer: Arc<Writer>,
        rows: Arc<Semaphore>,
        pages: Arc<Semaphore>,
    },
}

/// A crash at a commit of one's choice.
#[derive(Debug)]
struct End {
    /// Commits until then; more than there will ever be, if nobody chose.
    left: AtomicU64,
    dead: CancellationToken,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("mode", &*self.core.mode.borrow()).finish_non_exhaustive()
    }
}

impl Store {
    /// A store that lives in memory only, for tests in virtual time: no thread, commits complete inline.
    pub fn memory() -> Self {
        let engine = Box::new(MemoryEngine::default());
        Self::in_memory(Core::new(engine, Numbers::default(), Mode::Normal))
    }

    pub(super) fn in_memory(core: Core) -> Self {
        Self {
            core: Arc::new(core),
            body: Body::Memory {
                end: Arc::new(End { left: AtomicU64::new(u64::MAX), dead: CancellationToken::new() }),
            },
        }
    }

    pub(super) fn on_disk(core: Arc<Core>, writer: Writer) -> Self {
        let body = Body::Disk {
            writer: Arc::new(writer),
            rows: Arc::new(Semaphore::new(READERS)),
            pages: Arc::new(Semaphore::new(READERS)),
        };
        Self { core, body }
    }

    /// What a restart after a crash would find, as a new store; this handle (and its clones) then says `Closed`
    /// to everything. Only for memory stores: a disk store gives an empty one.
    pub fn crash_copy(&self) -> Self {
        let numbers = self.core.numbers().clone();
        match (&self.body, self.core.take_engine(StoreError::Closed)) {
            (Body::Memory { .. }, Some(engine)) => {
                Self::in_memory(Core::new(engine, numbers, self.core.mode.borrow().clone()))
            }
            _ => Self::memory(),
        }
    }

    /// For crash tests with a memory store: after so many more commits (at least one) everything is refused, as
    /// if the daemon had died right after the last of them. The token tells whoever else dies then. Holds for
    /// all clones; a disk store never dies of it.
    pub fn die_after(&self, commits: u64) -> CancellationToken {
        match &self.body {
            Body::Memory { end } => {
                end.left.store(commits.max(1), Ordering::SeqCst);
                end.dead.clone()
            }
            Body::Disk { .. } => CancellationToken::new(),
        }
    }

    /// Writes the transaction. When this returns, it is on disk, and no crash loses it.
    ///
    /// After [`StoreError::Io`] it may or may not be there; after any other error it is not. Dropping the
    /// future does not stop a transaction that was queued.
    pub async fn commit(&self, txn: Txn) -> Result<Committed, StoreError> {
        let began = Instant::now();
        let done = self.write(txn).await;
        if done.is_ok() {
            self.core.commits.observe(began.elapsed());
        }
        done
    }

    async fn write(&self, txn: Txn) -> Result<Committed, StoreError> {
        match &self.body {
            Body::Disk { writer, .. } => writer.commit(txn).await,
            Body::Memory { end } => {
                if end.dead.is_cancelled() {
                    return Err(StoreError::Closed);
                }
                if let Mode::ReadOnly { why } = &*self.core.mode.borrow() {
                    return Err(StoreError::ReadOnly(why.clone()));
                }
                let results = self.core.commit_group(std::slice::from_ref(&txn))?;
                if results.iter().all(Result::is_ok) && end.left.fetch_sub(1, Ordering::SeqCst) == 1 {
                    end.dead.cancel();
                }
                results.into_iter().next().unwrap_or(Err(StoreError::Closed))
            }
        }
    }

    /// One row. May show a change a moment before its `commit` returns.
    pub async fn get<V>(&self, table: &Table<V>, key: &(impl Key + ?Sized)) -> Result<Option<V>, StoreError>
    where
        V: Serialize + DeserializeOwned,
    {
        let (name, key) = (table.name, key.bytes());
        let sealed = match &self.body {
            Body::Memory { .. } => self.core.read(|engine| engine.get(name, &key))?,
            Body::Disk { rows, .. } => {
                let core = self.core.clone();
                blocking(rows, move || core.read(|engine| engine.get(name, &key))).await?
            }
        };
        sealed.map(|sealed| decode(table.name, table.schema, &sealed)).transpose()
    }

    /// Rows in order. Not a snapshot: rows that change while a long scan is under way may be seen old or new.
    pub async fn scan<V>(&self, table: &Table<V>, range: Range) -> Result<Vec<(Vec<u8>, V)>, StoreError>
    where
        V: Serialize + DeserializeOwned + Send + 'static,
    {
        let rows = self.scan_each(table, range).await?;
        rows.into_iter().map(|(key, row)| Ok((key, row?))).collect()
    }

    /// As `scan`, for whom one row that cannot be read says nothing of the others.
    pub async fn scan_each<V>(&self, table: &Table<V>, range: Range) -> Result<Rows<V>, StoreError>
    where
        V: Serialize + DeserializeOwned + Send + 'static,
    {
        let (name, schema) = (table.name, table.schema);
        let mut rows = Vec::new();
        let mut rest = range;
        loop {
            let asked = rest.limit.min(PAGE_ROWS);
            let page = self
                .page(name, rest.clone().limit(asked), move |page| {
                    let decoded = |(key, sealed): RawRow| (key, decode(name, schema, &sealed));
                    Ok(page.into_iter().map(decoded).collect::<Rows<V>>())
                })
                .await?;
            let more = page.len() == asked && rest.limit > asked;
            if let (true, Some((last, _))) = (more, page.last()) {
                rest = rest.rest_after(last, asked);
            }
            rows.extend(page);
            if !more {
                return Ok(rows);
            }
        }
    }

    /// At most [`PAGE_ROWS`] raw rows, turned into something on the blocking thread.
    pub(super) async fn page<T: Send + 'static>(
        &self,
        table: &'static str,
        range: Range,
        turn: impl FnOnce(Vec<RawRow>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        match &self.body {
            Body::Memory { .. } => turn(self.core.read(|engine| engine.scan(table, &range))?),
            Body::Disk { pages, .. } => {
                let core = self.core.clone();
                blocking(pages, move || turn(core.read(|engine| engine.scan(table, &range))?)).await
            }
        }
    }

    pub async fn first_key(&self, table: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
        self.edge(table, Range::all().limit(1)).await
    }

    pub async fn last_key(&self, table: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
        self.edge(table, Range::all().limit(1).reversed()).await
    }

    async fn edge(&self, table: &'static str, range: Range) -> Result<Option<Vec<u8>>, StoreError> {
        self.page(table, range, |page| Ok(page.into_iter().next().map(|(key, _)| key))).await
    }

    /// Rows of the table, as of the last commit. Kept, not counted: cheap, also while the disk does not answer.
    pub async fn count(&self, table: &'static str) -> Result<u64, StoreError> {
        Ok(self.core.rows(table))
    }

    /// Follows the last number that an append in this table was given, as of the last commit.
    pub fn sequence(&self, table: &'static str) -> watch::Receiver<u64> {
        self.core.sequence(table)
    }

    /// For monitoring. Waits for nothing, also while the disk does not answer.
    pub fn figures(&self) -> Figures {
        let waiting = match &self.body {
            Body::Memory { .. } => 0,
            Body::Disk { writer, .. } => writer.waiting(),
        };
        Figures {
            commits: self.core.commits.counted(),
            waiting,
            mode: self.core.mode.borrow().clone(),
            rows: self.core.rows_if_free(),
        }
    }

    pub fn mode(&self) -> watch::Receiver<Mode> {
        self.core.mode.subscribe()
    }

    /// Deletes at most `max` rows with keys less than `keep_from`, oldest first, in small transactions between
    /// which others' commits go on. Tells how many were deleted; less than `max` means that none is left.
    pub async fn prune<V>(
        &self,
        table: &Table<V>,
        keep_from: Vec<u8>,
        max: usize,
    ) -> Result<usize, StoreError> {
        let mut deleted = 0;
        while deleted < max {
            let asked = PRUNE_ROWS.min(max - deleted);
            let range = Range::before(keep_from.clone()).limit(asked);
            let keys: Vec<Vec<u8>> = self
                .page(table.name, range, |page| Ok(page.into_iter().map(|(key, _)| key).collect()))
                .await?;
            if keys.is_empty() {
                break;
            }
            let mut txn = Txn::essential();
            for key in &keys {
                txn.delete(table, key.as_slice());
            }
            self.commit(txn).await?;
            deleted += keys.len();
            if keys.len() < asked {
                break;
            }
            tokio::task::yield_now().await;
        }
        Ok(deleted)
    }

    /// Writes what is queued and the ledger, then lets go of the folder. Everything afterwards says `Closed`.
    pub async fn close(&self) {
        match &self.body {
            Body::Memory { .. } => drop(self.core.take_engine(StoreError::Closed)),
            Body::Disk { writer, .. } => writer.close().await,
        }
    }
}

fn decode<V: DeserializeOwned>(table: &str, schema: u16, sealed: &[u8]) -> Result<V, StoreError> {
    let json = envelope::open_as(table, schema, sealed)?;
    serde_json::from_slice(json)
        .map_err(|error| StoreError::Damaged(format!("table {table}: a value cannot be read: {error}")))
}

async fn blocking<T: Send + 'static>(
    slots: &Arc<Semaphore>,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    // The permit goes with the work: a caller that hangs up does not let another thread in early.
    let permit = slots.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
    let done = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    done.await.unwrap_or_else(|error| Err(StoreError::Io(format!("a read ended early: {error}"))))
}
