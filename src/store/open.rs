//! Opening a store, and what is done if it cannot be trusted.
//!
//! ```text
//! folder cannot be written ------------------------------> read-only, content of the ledger
//! another process holds it ------------------------------> InUse
//! nothing there -----------------------------------------> fresh
//! engine opens, heads agree, rows add up,
//!   not older than ledger and witness -------------------> intact
//! anything else: folder moved to damaged-<time> ----------> rebuilt: desired state from the ledger, numbers
//!                                                          well above all that were given
//! ```
//!
//! The folder: `lock`, `sled/` (the engine's), `ledger.{0,1}.json`, `witness`, `reserve`, `reserve.open`, `damaged-*`.

use super::core::{Core, Numbers, TableHead, seed};
use super::engine::Engine;
use super::ledger::{self, LedgerDocument, LedgerHeader, LedgerKeeper, Scope, restore_from_ledger};
use super::memory::MemoryEngine;
use super::options::{OpenError, OpenReport, Opened, Options, Recovered};
use super::sled_engine::SledEngine;
use super::space::Space;
use super::verify::verify;
use super::witness::{self, Witness};
use super::writer::{Writer, WriterParts};
use super::{Mode, Store, StoreError};
use crate::model::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The engine may take so long to open; longer, and it is taken to hang on damage.
const ENGINE_DEADLINE: Duration = Duration::from_secs(120);
/// Verifying rows at open stops after this; a larger store is verified further by `check`.
const VERIFY_BUDGET: Duration = Duration::from_millis(300);
/// And after so many rows: reading 100,000 took the engine 55 MB of memory that it never gave back.
const VERIFY_ROWS: u64 = 5_000;
/// After a rebuild, numbers go on so far above the last ones known. The ledger is never so far behind.
const NUMBERS_JUMP: u64 = 1_000_000;
/// Damaged stores kept.
const DAMAGED_KEPT: usize = 3;

/// Holds the folder against other processes.
pub(super) struct FolderLock(Option<Flock<File>>);

enum LockError {
    InUse(String),
    Unwritable(std::io::Error),
}

impl FolderLock {
    fn take(dir: &Path) -> Result<Self, LockError> {
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join("lock"))
            .map_err(LockError::Unwritable)?;
        let mut holder = String::new();
        // Only for the message.
        let _ = file.read_to_string(&mut holder);
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut locked) => {
                let _ = locked.set_len(0).and_then(|()| locked.rewind());
                let _ = write!(*locked, "{}", std::process::id());
                Ok(Self(Some(locked)))
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(LockError::InUse(holder)),
            Err((_, errno)) => Err(LockError::Unwritable(errno.into())),
        }
    }

    pub fn release(&mut self) {
        self.0 = None;
    }
}

pub(super) fn engine_dir(dir: &Path) -> PathBuf {
    dir.join("sled")
}

/// Makes the folder and takes its lock; `Ok(Err)` if it cannot be written.
pub(super) fn take_folder(dir: &Path) -> Result<Result<FolderLock, std::io::Error>, OpenError> {
    if let Err(error) = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
        && !dir.is_dir()
    {
        return Err(OpenError::Failed { dir: dir.to_owned(), why: error.to_string() });
    }
    match FolderLock::take(dir) {
        Ok(lock) => Ok(Ok(lock)),
        Err(LockError::InUse(holder)) => {
            let holder = if holder.is_empty() { holder } else { format!(" ({holder})") };
            Err(OpenError::InUse { dir: dir.to_owned(), holder })
        }
        Err(LockError::Unwritable(error)) => Ok(Err(error)),
    }
}

impl Store {
    /// Opens the store of a folder, rebuilding it if it is damaged. Blocks for as long as the disk does.
    pub fn open(options: Options) -> Result<Opened, OpenError> {
        let started = Instant::now();
        let opened = match take_folder(&options.dir)? {
            Ok(lock) => open_locked(&options, lock)?,
            Err(error) => read_only(&options, format!("the folder cannot be written: {error}"))?,
        };
        let Opened { store, mut report, ledger } = opened;
        report.took = started.elapsed();
        tracing::info!(
            recovered = ?report.recovered,
            commit = report.commit,
            rows = report.rows,
            verified_rows = report.verified_rows,
            took_ms = u64::try_from(report.took.as_millis()).unwrap_or(u64::MAX),
            "the store is open"
        );
        Ok(Opened { store, report, ledger })
    }
}

fn open_locked(options: &Options, lock: FolderLock) -> Result<Opened, OpenError> {
    let dir = &options.dir;
    let header = ledger::newest_header(dir);
    // A full disk is given the reserve back before the engine writes anything.
    let mut space = Space::new(dir, options.reserve_mib);
    space.make_room_to_open();
    let engine_there = engine_dir(dir).exists();
    let seen = header.as_ref().map_or(0, |header| header.commit).max(witness::read(dir));
    if !engine_there && header.is_none() && seen == 0 {
        return match open_engine(options) {
            Ok(trusted) => running(options, lock, space, trusted, Recovered::Fresh, None),
            Err(error) => read_only(options, error.to_string()),
        };
    }
    let found = if engine_there {
        open_engine(options).and_then(|trusted| not_older(trusted, header.as_ref(), witness::read(dir)))
    } else {
        Err(StoreError::Damaged("the engine's folder is missing".to_owned()))
    };
    match found {
        Ok(trusted) => running(options, lock, space, trusted, Recovered::Intact, None),
        // Not the store's fault: what is there may be good, so it is left alone.
        Err(error @ (StoreError::DiskFull(_) | StoreError::ReadOnly(_) | StoreError::Io(_))) => {
            read_only(options, error.to_string())
        }
        Err(error) => rebuild(options, lock, space, &error.to_string(), seen),
    }
}

/// An engine whose heads, and as many rows as time allowed, were verified.
struct Trusted {
    engine: Box<dyn Engine>,
    numbers: Numbers,
    verified_rows: u64,
}

/// Opens and verifies, in a thread of its own: damage can make the engine hang, not only fail.
fn open_engine(options: &Options) -> Result<Trusted, StoreError> {
    let (done, result) = std::sync::mpsc::sync_channel(1);
    let (dir, cache, first) = (engine_dir(&options.dir), cache_bytes(options), options.ledger_tables);
    std::thread::Builder::new().name("store-open".to_owned()).spawn(move || {
        let opened = SledEngine::open(&dir, cache).and_then(|engine| {
            let numbers = Numbers::load(&engine)?;
            let verified_rows =
                verify(&engine, &numbers, first, Instant::now() + VERIFY_BUDGET, VERIFY_ROWS)?;
            Ok(Trusted { engine: Box::new(engine), numbers, verified_rows })
        });
        // If nobody waits any more, the engine is closed again here.
        let _ = done.send(opened);
    })?;
    result
        .recv_timeout(ENGINE_DEADLINE)
        .unwrap_or_else(|_| Err(StoreError::Damaged("the engine hung while it was opened".to_owned())))
}

fn cache_bytes(options: &Options) -> u64 {
    options.cache_mib.max(1) * 1024 * 1024
}

fn not_older(trusted: Trusted, header: Option<&LedgerHeader>, witnessed: u64) -> Result<Trusted, StoreError> {
    let has = trusted.numbers.commit;
    let older = |than: &str, commit: u64| {
        Err(StoreError::Damaged(format!("the store stands at commit {has}, {than} at {commit}")))
    };
    match header {
        Some(header) if has < header.commit => older("the ledger", header.commit),
        _ if has < witnessed => older("the witness", witnessed),
        _ => Ok(trusted),
    }
}

/// Moves the damaged store aside and puts a fresh one with the ledger's content in its place.
fn rebuild(
    options: &Options,
    lock: FolderLock,
    space: Space,
    why: &str,
    seen: u64,
) -> Result<Opened, OpenError> {
    tracing::error!(why, dir = %options.dir.display(), "the store is damaged and is rebuilt from the ledger");
    let document = ledger::newest_document(&options.dir);
    let rebuilt = move_aside(&options.dir).map_err(StoreError::from).and_then(|moved_aside| {
        let mut trusted = open_engine(options)?;
        let numbers = numbers_after(document.as_ref(), seen);
        let txns = document.as_ref().map(|document| restore_from_ledger(document, options.ledger_tables));
        trusted.numbers = seed(trusted.engine.as_ref(), numbers, &txns.unwrap_or_default())?;
        Ok((trusted, moved_aside))
    });
    match rebuilt {
        Ok((trusted, moved_aside)) => {
            let recovered = Recovered::Rebuilt { why: why.to_owned(), moved_aside };
            running(options, lock, space, trusted, recovered, document)
        }
        Err(error) => read_only(options, format!("{why}; and it could not be rebuilt: {error}")),
    }
}

/// Where counting goes on when the rows that would tell are lost.
fn numbers_after(document: Option<&LedgerDocument>, seen: u64) -> Numbers {
    let mut numbers = Numbers { commit: seen + NUMBERS_JUMP, ..Numbers::default() };
    for (table, last) in document.iter().flat_map(|document| &document.counters) {
        let head = TableHead { last: last + NUMBERS_JUMP, ..TableHead::default() };
        numbers.tables.insert(table.clone(), head);
    }
    numbers
}

/// Renames the engine's folder; returns where it went (empty if there was none). Keeps the newest few.
pub(super) fn move_aside(dir: &Path) -> std::io::Result<PathBuf> {
    let from = engine_dir(dir);
    if !from.exists() {
        return Ok(PathBuf::new());
    }
    let mut kept: Vec<PathBuf> = std::fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("damaged-")))
        .collect();
    kept.sort();
    let excess = (kept.len() + 1).saturating_sub(DAMAGED_KEPT);
    for old in kept.drain(..excess) {
        std::fs::remove_dir_all(&old)?;
    }
    let now = Timestamp::now().to_string().replace([':', '.'], "-");
    let names =
        (0..).map(|n| dir.join(if n == 0 { format!("damaged-{now}") } else { format!("damaged-{now}-{n}") }));
    let mut free = names.filter(|path| !path.exists());
    let to = free.next().unwrap_or_else(|| dir.join("damaged"));
    std::fs::rename(&from, &to)?;
    File::open(dir)?.sync_all()?;
    Ok(to)
}

/// Starts the threads around an engine that is trusted.
fn running(
    options: &Options,
    lock: FolderLock,
    space: Space,
    trusted: Trusted,
    recovered: Recovered,
    ledger: Option<LedgerDocument>,
) -> Result<Opened, OpenError> {
    let failed = |why: String| OpenError::Failed { dir: options.dir.clone(), why };
    let Trusted { engine, numbers, verified_rows } = trusted;
    let scope = Scope { tables: options.ledger_tables, counters: options.counter_tables };
    let counters =
        ledger::counters(engine.as_ref(), &numbers, scope).map_err(|error| failed(error.to_string()))?;
    let report = report(recovered, &numbers, verified_rows, counters);
    let commit = numbers.commit;
    let core = Arc::new(Core::new(engine, numbers, Mode::Normal));
    let start = || -> std::io::Result<Writer> {
        let mut witness = Witness::open(&options.dir)?;
        witness.note(commit);
        let generation = ledger::newest_header(&options.dir).map_or(0, |header| header.generation);
        let keeper = LedgerKeeper::start(core.clone(), options.dir.clone(), scope, generation)?;
        if !matches!(report.recovered, Recovered::Intact) {
            keeper.touch();
        }
        let again = options.clone();
        Writer::start(WriterParts {
            core: core.clone(),
            space,
            witness,
            ledger: keeper,
            reopen: Box::new(move || {
                let trusted = open_engine(&again)?;
                Ok((trusted.engine, trusted.numbers))
            }),
            fault: options.fault,
            lock,
        })
    };
    let writer = start().map_err(|error| failed(error.to_string()))?;
    Ok(Opened { store: Store::on_disk(core, writer), report, ledger })
}

fn report(
    recovered: Recovered,
    numbers: &Numbers,
    verified_rows: u64,
    counters: std::collections::BTreeMap<String, u64>,
) -> OpenReport {
    let rows = numbers.tables.values().map(|head| head.rows).sum();
    OpenReport { recovered, took: Duration::ZERO, commit: numbers.commit, rows, verified_rows, counters }
}

/// A store in memory with the ledger's content that refuses every commit.
fn read_only(options: &Options, why: String) -> Result<Opened, OpenError> {
    tracing::error!(why, dir = %options.dir.display(), "the store can only be read, as far as the ledger goes");
    let failed = |error: StoreError| OpenError::Failed { dir: options.dir.clone(), why: error.to_string() };
    let document = ledger::newest_document(&options.dir);
    let engine = MemoryEngine::default();
    let txns = document.as_ref().map(|document| restore_from_ledger(document, options.ledger_tables));
    let commit = document.as_ref().map_or(0, |document| document.commit);
    let numbers = seed(&engine, numbers_after(document.as_ref(), commit), &txns.unwrap_or_default());
    let numbers = numbers.map_err(failed)?;
    let scope = Scope { tables: options.ledger_tables, counters: options.counter_tables };
    let counters = ledger::counters(&engine, &numbers, scope).map_err(failed)?;
    let rows = numbers.tables.values().map(|head| head.rows).sum();
    let report = report(Recovered::ReadOnly { why: why.clone() }, &numbers, rows, counters);
    let core = Core::new(Box::new(engine), numbers, Mode::ReadOnly { why });
    Ok(Opened { store: Store::in_memory(core), report, ledger: document })
}
