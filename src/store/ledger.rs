//! Desired state as JSON that a human can read, beside the store, in two copies.
//!
//! The ledger is what a damaged store is rebuilt from: the rows of the tables that hold what *should be*, and
//! how far numbers were given. `ledger.0.json` and `ledger.1.json` are written in turn, each by temporary file,
//! fsync, rename and fsync of the folder; the higher valid generation wins. It is written by a thread of its
//! own, so no commit waits for it; it may lag behind the store by some hundred milliseconds. It does not hold
//! jobs or events.

use super::core::{Core, Numbers};
use super::engine::{Engine, Range, for_each_row};
use super::table::{Op, Txn};
use super::{StoreError, envelope};
use crate::model::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Tables by name, rows by key (text, or `hex:` and digits).
pub type LedgerTables = BTreeMap<String, BTreeMap<String, serde_json::Value>>;

/// A ledger as read or written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LedgerDocument {
    pub format: u32,
    /// Rises with each writing.
    pub generation: u64,
    /// The last commit it covers.
    pub commit: u64,
    /// When it was written, RFC 3339, for people.
    pub written: String,
    /// Last numbers given, by table.
    pub counters: BTreeMap<String, u64>,
    pub tables: LedgerTables,
}

/// The transactions that put a ledger's rows back; `tables` are those of [`super::Options::ledger_tables`].
pub fn restore_from_ledger(ledger: &LedgerDocument, tables: &[(&'static str, u16)]) -> Vec<Txn> {
    /// Bounds the size of each transaction.
    const ROWS: usize = 64;
    let mut ops = Vec::new();
    for (table, schema) in tables {
        for (key, value) in ledger.tables.get(*table).into_iter().flatten() {
            let value = value.to_string().into_bytes();
            ops.push(Op::Put { table, schema: *schema, key: key_from_text(key), value });
        }
    }
    ops.chunks(ROWS).map(|ops| Txn { ops: ops.to_vec(), ..Txn::essential() }).collect()
}

/// Printable ASCII keys stay readable; others are hexadecimal.
fn key_to_text(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) if !text.starts_with("hex:") && text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) => {
            text.to_owned()
        }
        _ => format!("hex:{}", to_hex(key)),
    }
}

fn key_from_text(text: &str) -> Vec<u8> {
    text.strip_prefix("hex:").and_then(from_hex).unwrap_or_else(|| text.as_bytes().to_vec())
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing into a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|digit| digit.to_digit(16).and_then(|value| u8::try_from(value).ok())).collect();
    let digits = digits?;
    let pairs = digits.chunks_exact(2);
    pairs.remainder().is_empty().then(|| pairs.map(|pair| pair[0] << 4 | pair[1]).collect())
}

const FORMAT: u32 = 1;
/// Under load the ledger is written at most so often.
const PAUSE: Duration = Duration::from_millis(200);
/// If only numbers went on, it is written after so long: a rebuild jumps ahead by more than is given meanwhile.
const COUNTERS_PAUSE: Duration = Duration::from_secs(60);
const CHECKSUM_FIELD: &[u8] = b"\"checksum\": \"";
const CHECKSUM_DIGITS: usize = 8;

/// What is needed of a ledger at each open, without reading its rows into memory.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct LedgerHeader {
    pub format: u32,
    pub generation: u64,
    pub commit: u64,
}

pub(super) fn copy_path(dir: &Path, copy: u64) -> PathBuf {
    dir.join(format!("ledger.{copy}.json"))
}

/// One copy, if it is there: what is wrong with it otherwise.
pub(super) fn read_copy<T: serde::de::DeserializeOwned>(dir: &Path, copy: u64) -> Result<Option<T>, String> {
    let mut text = match std::fs::read(copy_path(dir, copy)) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let digits = checksum_digits(&text).ok_or("it has no checksum")?;
    let told =
        text.get(digits.clone()).and_then(|digits| std::str::from_utf8(digits).ok()).map(str::to_owned);
    text.get_mut(digits).ok_or("it is cut off")?.fill(b'0');
    if told != Some(format!("{:08x}", crc32c::crc32c(&text))) {
        return Err("it does not match its checksum".to_owned());
    }
    let header: LedgerHeader = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if header.format != FORMAT {
        return Err(format!("it has format {}, this release reads format {FORMAT}", header.format));
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| error.to_string())
}

fn checksum_digits(text: &[u8]) -> Option<std::ops::Range<usize>> {
    let at = text.windows(CHECKSUM_FIELD.len()).take(512).position(|window| window == CHECKSUM_FIELD)?;
    let from = at + CHECKSUM_FIELD.len();
    Some(from..from + CHECKSUM_DIGITS)
}

fn newest<T: serde::de::DeserializeOwned>(dir: &Path, generation: impl Fn(&T) -> u64) -> Option<T> {
    let copies = (0..2).filter_map(|copy| match read_copy::<T>(dir, copy) {
        Ok(found) => found,
        Err(why) => {
            tracing::warn!(copy, why, "a copy of the ledger cannot be used");
            None
        }
    });
    copies.max_by_key(generation)
}

pub(super) fn newest_header(dir: &Path) -> Option<LedgerHeader> {
    newest(dir, |header: &LedgerHeader| header.generation)
}

pub(super) fn newest_document(dir: &Path) -> Option<LedgerDocument> {
    newest(dir, |document: &LedgerDocument| document.generation)
}

/// Which tables the ledger is about.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Scope {
    pub tables: &'static [(&'static str, u16)],
    pub counters: &'static [&'static str],
}

/// The last numbers given: of appends, and the last keys of counter tables.
pub(super) fn counters(
    engine: &dyn Engine,
    numbers: &Numbers,
    scope: Scope,
) -> Result<BTreeMap<String, u64>, StoreError> {
    let given = numbers.tables.iter().filter(|(_, head)| head.last > 0);
    let mut counters: BTreeMap<String, u64> = given.map(|(name, head)| (name.clone(), head.last)).collect();
    for table in scope.counters {
        let last = engine.scan(table, &Range::all().limit(1).reversed())?;
        let key = last.first().and_then(|(key, _)| <[u8; 8]>::try_from(key.as_slice()).ok());
        let counter = counters.entry((*table).to_owned()).or_default();
        *counter = (*counter).max(key.map_or(0, u64::from_be_bytes));
    }
    Ok(counters)
}

/// The ledger's text: made by hand from the stored JSON, one row a line, since a tree of values of 1,000 VMs
/// would cost tens of MB for a moment.
fn compose(core: &Core, scope: Scope, generation: u64) -> Result<Vec<u8>, StoreError> {
    // Held: nothing is committed meanwhile, so the rows are those of one commit.
    let numbers = core.numbers();
    let body = core.read(|engine| {
        let counters = counters(engine, &numbers, scope)?;
        let mut body = format!("  \"counters\": {},\n  \"tables\": {{", json(&counters)).into_bytes();
        for (index, (table, _)) in scope.tables.iter().enumerate() {
            body.extend_from_slice(if index == 0 { b"\n" } else { b",\n" });
            body.extend_from_slice(format!("    {}: {{", json(table)).as_bytes());
            let mut first = true;
            for_each_row(engine, table, |key, sealed| {
                body.extend_from_slice(if first { b"\n" } else { b",\n" });
                first = false;
                body.extend_from_slice(format!("      {}: ", json(&key_to_text(key))).as_bytes());
                body.extend_from_slice(envelope::open(sealed)?.1);
                Ok(())
            })?;
            body.extend_from_slice(b"\n    }");
        }
        body.extend_from_slice(b"\n  }\n}\n");
        Ok(body)
    })?;
    let mut text = format!(
        "{{\n  \"format\": {FORMAT},\n  \"generation\": {generation},\n  \"commit\": {},\n  \"written\": {},\n  \"checksum\": \"{:0digits$}\",\n",
        numbers.commit,
        json(&Timestamp::now().to_string()),
        0,
        digits = CHECKSUM_DIGITS,
    )
    .into_bytes();
    drop(numbers);
    text.extend_from_slice(&body);
    let checksum = format!("{:08x}", crc32c::crc32c(&text));
    if let Some(digits) = checksum_digits(&text).and_then(|digits| text.get_mut(digits)) {
        digits.copy_from_slice(checksum.as_bytes());
    }
    Ok(text)
}

fn json<T: Serialize + ?Sized>(value: &T) -> String {
    // Strings, numbers and maps of them always have a JSON form.
    serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}

/// Replaces a file so that a crash leaves the old one or the new one.
pub(super) fn replace_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[derive(Debug, Default)]
struct Wanted {
    /// Rows changed: write as soon as the pause allows.
    rows: bool,
    /// Only numbers went on.
    counters: bool,
    closing: bool,
}

/// The thread that writes the ledger, and how it is told.
pub(super) struct LedgerKeeper {
    wanted: Arc<(Mutex<Wanted>, Condvar)>,
    scope: Scope,
    thread: Option<JoinHandle<()>>,
}

impl LedgerKeeper {
    pub fn start(core: Arc<Core>, dir: PathBuf, scope: Scope, generation: u64) -> std::io::Result<Self> {
        let wanted = Arc::new((Mutex::new(Wanted::default()), Condvar::new()));
        let told = wanted.clone();
        let thread = std::thread::Builder::new()
            .name("store-ledger".to_owned())
            .spawn(move || keep(&core, &dir, scope, generation, &told))?;
        Ok(Self { wanted, scope, thread: Some(thread) })
    }

    /// Rows are to be written even if no commit touched them.
    pub fn touch(&self) {
        self.tell(|wanted| wanted.rows = true);
    }

    pub fn committed(&self, group: &[Txn]) {
        let mut rows = false;
        for op in group.iter().flat_map(|txn| &txn.ops) {
            let (Op::Put { table, .. } | Op::Delete { table, .. } | Op::Append { table, .. }) = op;
            rows |= self.scope.tables.iter().any(|(name, _)| name == table);
        }
        self.tell(|wanted| {
            wanted.rows |= rows;
            wanted.counters = true;
        });
    }

    fn tell(&self, change: impl FnOnce(&mut Wanted)) {
        let (wanted, wake) = &*self.wanted;
        let mut wanted = wanted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = (wanted.rows, wanted.counters, wanted.closing);
        change(&mut wanted);
        // A wake-up is a system call; under load nearly all would be for nothing.
        if before != (wanted.rows, wanted.counters, wanted.closing) {
            wake.notify_one();
        }
    }

    /// Writes what is still to be written and ends the thread.
    pub fn close(&mut self) {
        self.tell(|wanted| wanted.closing = true);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the ledger's writer panicked");
        }
    }
}

fn keep(core: &Core, dir: &Path, scope: Scope, mut generation: u64, told: &(Mutex<Wanted>, Condvar)) {
    let (wanted, wake) = told;
    let mut last: Option<Instant> = None;
    loop {
        let mut now = wanted.lock().unwrap_or_else(PoisonError::into_inner);
        let closing = loop {
            if now.closing {
                break true;
            }
            let pause = match (now.rows, now.counters) {
                (true, _) => Some(PAUSE),
                (false, true) => Some(COUNTERS_PAUSE),
                (false, false) => None,
            };
            // The first change of numbers after open waits like any other; the first change of rows does not.
            let left = pause.map(|pause| match last {
                Some(last) => pause.saturating_sub(last.elapsed()),
                None => Duration::ZERO,
            });
            match left {
                Some(Duration::ZERO) => break false,
                Some(left) => now = wake.wait_timeout(now, left).unwrap_or_else(PoisonError::into_inner).0,
                None => now = wake.wait(now).unwrap_or_else(PoisonError::into_inner),
            }
        };
        let due = now.rows || now.counters;
        (now.rows, now.counters) = (false, false);
        drop(now);
        if due {
            let written = compose(core, scope, generation + 1)
                .and_then(|text| Ok(replace_file(&copy_path(dir, (generation + 1) % 2), &text)?));
            match written {
                Ok(()) => generation += 1,
                Err(error) => {
                    tracing::error!(%error, "the ledger could not be written");
                    wanted.lock().unwrap_or_else(PoisonError::into_inner).rows = true;
                }
            }
            last = Some(Instant::now());
        }
        if closing {
            return;
        }
    }
}
