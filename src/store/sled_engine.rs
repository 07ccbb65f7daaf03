//! The engine on disk: sled 0.34.7, used as it was measured.
//!
//! What sled does that we work around: it flushes with `sync_file_range`, which writes neither metadata nor the
//! disk's cache, so we hold a second descriptor on its file and `fdatasync` it; pages of more than 128 KiB go
//! to files in `blobs/` that it never syncs, so we do; it panics on some damage and after some failures, so
//! every call is guarded; its calls block, so only own threads and blocking threads come here. A key gets a
//! first byte, which keeps the head apart from all rows.

use super::StoreError;
use super::engine::{Batch, Engine, Range, RawRow};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sled::Transactional;
use sled::transaction::{ConflictableTransactionError, TransactionError};
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

/// How long a dropped engine may hold its file.
const LET_GO: Duration = Duration::from_secs(10);
const HEAD_KEY: &[u8] = &[0];
const ROW: u8 = 1;
/// sled's own tree, which we do not use.
const UNUSED_TREE: &str = "__sled__default";
/// sled's default, written down since a store can only be opened with the size it was made with.
const SEGMENT_BYTES: usize = 512 * 1024;

pub(super) struct SledEngine {
    /// Empty only while it is being dropped.
    db: Option<sled::Db>,
    trees: RwLock<BTreeMap<String, sled::Tree>>,
    file: File,
    blobs: Mutex<Blobs>,
}

/// Which files of `blobs/` are known to be on disk.
struct Blobs {
    dir: PathBuf,
    changed: Option<SystemTime>,
    synced: HashSet<OsString>,
}

impl SledEngine {
    /// Opens or makes a database in `dir`, and syncs what opening wrote.
    pub fn open(dir: &Path, cache_bytes: u64) -> Result<Self, StoreError> {
        wait_until_let_go(&dir.join("db"))?;
        super::panics::guarded(|| {
            let db = sled::Config::new()
                .path(dir)
                .segment_size(SEGMENT_BYTES)
                .cache_capacity(cache_bytes)
                .flush_every_ms(None)
                // HighThroughput measured the same within noise, in speed and in space.
                .mode(sled::Mode::LowSpace)
                .open()
                .map_err(translate)?;
            let mut trees = BTreeMap::new();
            for name in db.tree_names() {
                let name = String::from_utf8(name.to_vec())
                    .map_err(|_| StoreError::Damaged("a table's name is not text".to_owned()))?;
                if name != UNUSED_TREE {
                    let tree = db.open_tree(&name).map_err(translate)?;
                    trees.insert(name, tree);
                }
            }
            let file = File::open(dir.join("db"))?;
            let blobs = Blobs { dir: dir.join("blobs"), changed: None, synced: HashSet::new() };
            let engine = Self { db: Some(db), trees: RwLock::new(trees), file, blobs: Mutex::new(blobs) };
            engine.file.sync_all()?;
            engine.sync_blobs()?;
            for name in ["conf", "."] {
                File::open(dir.join(name))?.sync_all()?;
            }
            if let Some(parent) = dir.parent() {
                File::open(parent)?.sync_all()?;
            }
            Ok(engine)
        })
    }

    fn db(&self) -> Result<&sled::Db, StoreError> {
        self.db.as_ref().ok_or(StoreError::Closed)
    }

    fn tree(&self, table: &str) -> Option<sled::Tree> {
        self.trees.read().unwrap_or_else(PoisonError::into_inner).get(table).cloned()
    }

    fn tree_for_writing(&self, table: &str) -> Result<sled::Tree, StoreError> {
        if let Some(tree) = self.tree(table) {
            return Ok(tree);
        }
        let tree = self.db()?.open_tree(table).map_err(translate)?;
        let mut trees = self.trees.write().unwrap_or_else(PoisonError::into_inner);
        trees.insert(table.to_owned(), tree.clone());
        Ok(tree)
    }

    /// A new blob changes its folder's time; then each file not seen before is synced, and the folder.
    fn sync_blobs(&self) -> Result<(), StoreError> {
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = std::fs::metadata(&blobs.dir)?.modified()?;
        if blobs.changed == Some(changed) {
            return Ok(());
        }
        let mut names = HashSet::new();
        for entry in std::fs::read_dir(&blobs.dir)? {
            let name = entry?.file_name();
            if !blobs.synced.contains(&name) {
                match File::open(blobs.dir.join(&name)) {
                    Ok(file) => file.sync_all()?,
                    // sled removes blobs that nothing points to any more.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error.into()),
                }
            }
            names.insert(name);
        }
        File::open(&blobs.dir)?.sync_all()?;
        blobs.synced = names;
        // The folder's clock ticks every few milliseconds: a file made in the same tick would go unseen, so a
        // young time is not trusted yet.
        let age = SystemTime::now().duration_since(changed).unwrap_or_default();
        blobs.changed = (age.as_millis() > 100).then_some(changed);
        Ok(())
    }
}

impl Drop for SledEngine {
    fn drop(&mut self) {
        let trees = std::mem::take(&mut *self.trees.write().unwrap_or_else(PoisonError::into_inner));
        let db = self.db.take();
        // sled may panic here after an earlier failure; all that was promised is on disk already.
        let _ = super::panics::guarded(|| {
            drop(trees);
            drop(db);
            Ok(())
        });
    }
}

impl Engine for SledEngine {
    fn tables(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.trees.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect())
    }

    fn head(&self, table: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(tree) = self.tree(table) else { return Ok(None) };
        super::panics::guarded(|| Ok(tree.get(HEAD_KEY).map_err(translate)?.map(|head| head.to_vec())))
    }

    fn get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(tree) = self.tree(table) else { return Ok(None) };
        let key = row_key(key);
        super::panics::guarded(|| Ok(tree.get(&key).map_err(translate)?.map(|value| value.to_vec())))
    }

    fn scan(&self, table: &str, range: &Range) -> Result<Vec<RawRow>, StoreError> {
        let Some(tree) = self.tree(table) else { return Ok(Vec::new()) };
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let from = match &range.from {
            Bound::Included(key) => Bound::Included(row_key(key)),
            Bound::Excluded(key) => Bound::Excluded(row_key(key)),
            Bound::Unbounded => Bound::Included(vec![ROW]),
        };
        let to = match &range.to {
            Bound::Included(key) => Bound::Included(row_key(key)),
            Bound::Excluded(key) => Bound::Excluded(row_key(key)),
            Bound::Unbounded => Bound::Excluded(vec![ROW + 1]),
        };
        super::panics::guarded(|| {
            let mut rows = Vec::new();
            let mut iter = tree.range::<Vec<u8>, _>((from, to));
            while rows.len() < range.limit {
                let next = if range.reverse { iter.next_back() } else { iter.next() };
                let Some(row) = next else { break };
                let (key, value) = row.map_err(translate)?;
                rows.push((key.get(1..).unwrap_or_default().to_vec(), value.to_vec()));
            }
            Ok(rows)
        })
    }

    fn apply(&self, batch: &Batch) -> Result<(), StoreError> {
        super::panics::guarded(|| {
            let mut trees = Vec::with_capacity(batch.tables.len());
            let mut changes = Vec::with_capacity(batch.tables.len());
            for (name, table) in &batch.tables {
                trees.push(self.tree_for_writing(name)?);
                let mut batch = sled::Batch::default();
                for (key, value) in &table.rows {
                    match value {
                        Some(value) => batch.insert(row_key(key), value.as_slice()),
                        None => batch.remove(row_key(key)),
                    }
                }
                batch.insert(HEAD_KEY, table.head.as_slice());
                changes.push(batch);
            }
            let done = trees.as_slice().transaction(|views| {
                for (view, batch) in views.iter().zip(&changes) {
                    view.apply_batch(batch)?;
                }
                Ok::<(), ConflictableTransactionError<()>>(())
            });
            match done {
                Ok(()) => Ok(()),
                Err(TransactionError::Storage(error)) => Err(translate(error)),
                Err(TransactionError::Abort(())) => Err(StoreError::Io("a batch was aborted".to_owned())),
            }
        })
    }

    fn sync(&self) -> Result<(), StoreError> {
        super::panics::guarded(|| {
            self.db()?.flush().map_err(translate)?;
            self.file.sync_data()?;
            self.sync_blobs()
        })
    }
}

/// Waits until an engine of this process that was dropped a moment ago has let go of its file: threads of sled
/// hold it a little longer than the last handle lives. (Other processes are kept out by the folder's lock.)
fn wait_until_let_go(path: &Path) -> Result<(), StoreError> {
    let give_up = Instant::now() + LET_GO;
    loop {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => return Ok(()),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() < give_up => {
                std::thread::park_timeout(Duration::from_millis(2));
            }
            Err((_, errno)) => return Err(StoreError::Io(format!("{} is held: {errno}", path.display()))),
        }
    }
}

fn row_key(key: &[u8]) -> Vec<u8> {
    let mut row = Vec::with_capacity(1 + key.len());
    row.push(ROW);
    row.extend_from_slice(key);
    row
}

fn translate(error: sled::Error) -> StoreError {
    match error {
        sled::Error::Io(error) => error.into(),
        other => StoreError::Damaged(other.to_string()),
    }
}
