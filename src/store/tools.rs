//! Looking at a store from outside: check, export, import. They work on a folder that no daemon holds.
//!
//! An export is JSON lines: a header, one row a line, a footer with the number of rows and the checksum of all
//! lines before it. It can be read by people and other programs, and does not depend on the engine's format. An
//! import is written into a folder of its own, read back and compared, and only then takes the store's place.

use super::core::{MASTER, MAX_VALUE_BYTES, Numbers, TableHead, seed};
use super::engine::for_each_row;
use super::ledger::{self, LedgerHeader, from_hex, to_hex};
use super::open::{FolderLock, engine_dir, move_aside, take_folder};
use super::sled_engine::SledEngine;
use super::table::{Op, Txn};
use super::verify::tally;
use super::{OpenError, StoreError, envelope, witness};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

const EXPORT_FORMAT: u32 = 1;
/// Page cache of the tools.
const CACHE_BYTES: u64 = 2 * 1024 * 1024;
/// A line holds one value, its key in hexadecimal, and names.
const MAX_LINE_BYTES: usize = 4 * MAX_VALUE_BYTES;
/// Rows that an import writes at once.
const IMPORT_ROWS: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("line {line}: {why}")]
    Import { line: u64, why: String },
    #[error("there is a store in {0} already; it is only replaced with force")]
    NotEmpty(PathBuf),
    #[error("there is no store in {0}")]
    Missing(PathBuf),
}

impl From<std::io::Error> for ToolError {
    fn from(error: std::io::Error) -> Self {
        Self::Store(error.into())
    }
}

/// What [`check`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    pub commit: u64,
    pub tables: Vec<TableReport>,
    pub ledger: Vec<LedgerCopy>,
    /// Everything that is wrong; empty if the store is good.
    pub problems: Vec<String>,
}

impl CheckReport {
    pub fn good(&self) -> bool {
        self.problems.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableReport {
    pub name: String,
    pub rows: u64,
    pub bytes: u64,
    pub bad_rows: u64,
    /// The last number an append was given.
    pub last_number: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LedgerCopy {
    pub path: PathBuf,
    /// Generation and commit, or what is wrong; absent if there is no such file.
    pub state: Option<Result<(u64, u64), String>>,
}

/// Reads everything and changes nothing (but the engine tidies its own files when it opens).
pub fn check(dir: &Path) -> Result<CheckReport, ToolError> {
    let _lock = hold(dir)?;
    let mut report =
        CheckReport { commit: 0, tables: Vec::new(), ledger: ledger_copies(dir), problems: Vec::new() };
    for copy in &report.ledger {
        if let Some(Err(why)) = &copy.state {
            report.problems.push(format!("{}: {why}", copy.path.display()));
        }
    }
    let opened = SledEngine::open(&engine_dir(dir), CACHE_BYTES)
        .and_then(|engine| Numbers::load(&engine).map(|numbers| (engine, numbers)));
    let (engine, numbers) = match opened {
        Ok(opened) => opened,
        Err(StoreError::Damaged(why)) => {
            report.problems.push(why);
            return Ok(report);
        }
        Err(other) => return Err(other.into()),
    };
    report.commit = numbers.commit;
    for (name, head) in &numbers.tables {
        match tally(&engine, name, None) {
            Ok(Some(tally)) => {
                if let Err(error) = tally.compare(name, head) {
                    report.problems.push(error.to_string());
                }
                report.tables.push(TableReport {
                    name: name.clone(),
                    rows: tally.rows,
                    bytes: tally.bytes,
                    bad_rows: tally.bad_rows,
                    last_number: head.last,
                });
            }
            Ok(None) => {}
            Err(error) => report.problems.push(format!("table {name} cannot be read: {error}")),
        }
    }
    let seen = witness::read(dir).max(ledger::newest_header(dir).map_or(0, |header| header.commit));
    if numbers.commit < seen {
        report.problems.push(format!("the store stands at commit {}, {seen} was reached", numbers.commit));
    }
    Ok(report)
}

fn ledger_copies(dir: &Path) -> Vec<LedgerCopy> {
    let look = |copy| {
        let state = ledger::read_copy::<LedgerHeader>(dir, copy)
            .map(|header| header.map(|header| (header.generation, header.commit)))
            .transpose();
        LedgerCopy { path: ledger::copy_path(dir, copy), state }
    };
    (0..2).map(look).collect()
}

/// Takes the lock of a folder with a store in it.
fn hold(dir: &Path) -> Result<FolderLock, ToolError> {
    if !engine_dir(dir).exists() {
        return Err(ToolError::Missing(dir.to_owned()));
    }
    Ok(take_folder(dir)??)
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    dom0d_store_export: u32,
    commit: u64,
    /// Last numbers given by appends.
    numbers: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    table: String,
    schema: u16,
    key: String,
    value: serde_json::Value,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Footer {
    rows: u64,
    crc32c: String,
}

/// Writes lines and remembers their checksum.
struct Lines<W> {
    to: W,
    crc: u32,
}

impl<W: Write> Lines<W> {
    fn write<T: Serialize>(&mut self, line: &T) -> Result<(), StoreError> {
        let mut text = serde_json::to_vec(line).map_err(|error| StoreError::Io(error.to_string()))?;
        text.push(b'\n');
        self.crc = crc32c::crc32c_append(self.crc, &text);
        Ok(self.to.write_all(&text)?)
    }
}

/// Writes all rows; tells how many. A damaged row ends it: an export is whole or says so.
pub fn export(dir: &Path, to: impl Write) -> Result<u64, ToolError> {
    let _lock = hold(dir)?;
    let engine = SledEngine::open(&engine_dir(dir), CACHE_BYTES)?;
    let numbers = Numbers::load(&engine)?;
    let mut lines = Lines { to, crc: 0 };
    let given = numbers.tables.iter().filter(|(_, head)| head.last > 0);
    let given = given.map(|(name, head)| (name.clone(), head.last)).collect();
    lines.write(&Header { dom0d_store_export: EXPORT_FORMAT, commit: numbers.commit, numbers: given })?;
    let mut rows = 0;
    for table in numbers.tables.keys() {
        for_each_row(&engine, table, |key, sealed| {
            let (schema, json) = envelope::open(sealed)?;
            let value = serde_json::from_slice(json)
                .map_err(|error| StoreError::Damaged(format!("table {table}: {error}")))?;
            rows += 1;
            lines.write(&Row { table: table.clone(), schema, key: to_hex(key), value })
        })?;
    }
    let crc32c = format!("{:08x}", lines.crc);
    lines.write(&Footer { rows, crc32c })?;
    lines.to.flush()?;
    Ok(rows)
}

/// Makes a store of an export; tells how many rows. An existing store is replaced only with `force`, and then
/// moved aside.
pub fn import(dir: &Path, from: impl BufRead, force: bool) -> Result<u64, ToolError> {
    let _lock = take_folder(dir)??;
    if engine_dir(dir).exists() && !force {
        return Err(ToolError::NotEmpty(dir.to_owned()));
    }
    let building = dir.join("import");
    match std::fs::remove_dir_all(&building) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let seen = witness::read(dir).max(ledger::newest_header(dir).map_or(0, |header| header.commit));
    let rows = match fill(&building, from, seen) {
        Ok(rows) => rows,
        Err(error) => {
            // What is wrong with the export is what to tell, not what is left behind.
            let _ = std::fs::remove_dir_all(&building);
            return Err(error);
        }
    };
    move_aside(dir)?;
    std::fs::rename(&building, engine_dir(dir))?;
    std::fs::File::open(dir)?.sync_all()?;
    Ok(rows)
}

/// Writes the rows into a new engine and reads them back. Commits count on from the larger of the export's and
/// `seen`, so that the result is not taken for an old store.
fn fill(building: &Path, mut from: impl BufRead, seen: u64) -> Result<u64, ToolError> {
    let engine = SledEngine::open(building, CACHE_BYTES)?;
    let mut reader = Reader { crc: 0, line: 0 };
    let text = reader.next(&mut from)?;
    let header: Header = reader.parse(&text)?;
    if header.dom0d_store_export != EXPORT_FORMAT {
        return Err(reader.error(format!("format {} is not known", header.dom0d_store_export)));
    }
    let mut numbers = Numbers { commit: header.commit.max(seen), ..Numbers::default() };
    for (table, last) in header.numbers {
        numbers.tables.insert(table, TableHead { last, ..TableHead::default() });
    }
    let mut names: BTreeMap<String, &'static str> = BTreeMap::new();
    let mut txn = Txn::essential();
    let mut rows = 0;
    loop {
        let crc = reader.crc;
        let text = reader.next(&mut from)?;
        let Ok(row) = serde_json::from_str::<Row>(&text) else {
            let footer: Footer = reader.parse(&text)?;
            if footer.rows != rows || footer.crc32c != format!("{crc:08x}") {
                return Err(reader.error("the export is damaged: its footer does not match".to_owned()));
            }
            break;
        };
        if row.table == MASTER {
            return Err(reader.error(format!("a table cannot be called {MASTER}")));
        }
        let key = from_hex(&row.key).ok_or_else(|| reader.error("the key is not hexadecimal".to_owned()))?;
        // Operations name tables by constants. A tool meets a handful of names and then ends: each is leaked once.
        let table = *names.entry(row.table).or_insert_with_key(|name| name.clone().leak());
        txn.ops.push(Op::Put { table, schema: row.schema, key, value: row.value.to_string().into_bytes() });
        rows += 1;
        if txn.ops.len() >= IMPORT_ROWS {
            numbers = seed(&engine, numbers, &[std::mem::replace(&mut txn, Txn::essential())])?;
        }
    }
    let numbers = seed(&engine, numbers, &[txn])?;
    let mut found = 0;
    for (name, head) in &numbers.tables {
        if let Some(tally) = tally(&engine, name, None)? {
            tally.compare(name, head)?;
            found += tally.rows;
        }
    }
    if found != rows {
        return Err(reader.error(format!("{rows} rows were given, {found} were stored: a key came twice")));
    }
    Ok(rows)
}

struct Reader {
    crc: u32,
    line: u64,
}

impl Reader {
    /// The next line; its checksum is counted in.
    fn next(&mut self, from: &mut impl BufRead) -> Result<String, ToolError> {
        self.line += 1;
        let mut text = Vec::new();
        let mut limited = std::io::Read::take(from, MAX_LINE_BYTES as u64);
        limited.read_until(b'\n', &mut text)?;
        if text.is_empty() {
            return Err(self.error("the export ends without its footer".to_owned()));
        }
        if text.last() != Some(&b'\n') {
            return Err(self.error("the line is too long or cut off".to_owned()));
        }
        self.crc = crc32c::crc32c_append(self.crc, &text);
        String::from_utf8(text).map_err(|_| self.error("the line is not UTF-8".to_owned()))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, text: &str) -> Result<T, ToolError> {
        serde_json::from_str(text).map_err(|error| self.error(error.to_string()))
    }

    fn error(&self, why: String) -> ToolError {
        ToolError::Import { line: self.line, why }
    }
}
