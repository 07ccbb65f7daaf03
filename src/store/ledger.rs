//! Desired state as JSON that a human can read, beside the store, in two copies.
//!
//! The ledger is what a damaged store is rebuilt from: the rows of the tables that hold what *should be*, and
//! how far numbers were given. `ledger.0.json` and `ledger.1.json` are written in turn, each by temporary file,
//! fsync, rename and fsync of the folder; the higher valid generation wins. It is written by a thread of its
//! own, so no commit waits for it; it may lag behind the store by some hundred milliseconds. It does not hold
//! jobs or events.

use super::table::{Op, Txn};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
