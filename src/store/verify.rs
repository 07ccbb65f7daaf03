//! Reading every row and comparing: envelopes, and each table's count and sum with its head.
//!
//! Heads alone show a torn batch; only this shows a row that went missing, went back to an older value or came
//! up twice, which damage inside the engine's log can cause without any error.

use super::StoreError;
use super::core::{Numbers, TableHead};
use super::engine::{Engine, PAGE_ROWS, Range};
use super::envelope;
use std::time::Instant;

/// What is known of a table's rows after reading up to some key.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    pub rows: u64,
    pub bytes: u64,
    pub sum: u64,
    pub bad_rows: u64,
}

impl Tally {
    pub fn add(&mut self, key: &[u8], sealed: &[u8]) {
        self.rows += 1;
        self.bytes += (key.len() + sealed.len()) as u64;
        self.sum = self.sum.wrapping_add(envelope::fingerprint(key, sealed));
        self.bad_rows += u64::from(envelope::open(sealed).is_err());
    }

    pub fn compare(&self, table: &str, head: &TableHead) -> Result<(), StoreError> {
        let damaged = |what: String| Err(StoreError::Damaged(format!("table {table} {what}")));
        if self.bad_rows > 0 {
            return damaged(format!("has {} rows that do not match their checksum", self.bad_rows));
        }
        if self.rows != head.rows {
            return damaged(format!("has {} rows and should have {}", self.rows, head.rows));
        }
        if self.sum != head.sum {
            return damaged("has rows that are not those last committed".to_owned());
        }
        Ok(())
    }
}

/// Reads a table; `None` if the deadline came first.
pub(super) fn tally(
    engine: &dyn Engine,
    table: &str,
    deadline: Option<Instant>,
) -> Result<Option<Tally>, StoreError> {
    let mut tally = Tally::default();
    let mut range = Range::all();
    loop {
        if deadline.is_some_and(|at| Instant::now() >= at) {
            return Ok(None);
        }
        let page = engine.scan(table, &range.clone().limit(PAGE_ROWS))?;
        for (key, sealed) in &page {
            tally.add(key, sealed);
        }
        match page.last() {
            Some((key, _)) if page.len() == PAGE_ROWS => range = Range::after(key.clone()),
            _ => return Ok(Some(tally)),
        }
    }
}

/// Verifies tables, `first` ones first, then small before large, until the deadline or `max_rows`. Tells how
/// many rows were verified.
pub(super) fn verify(
    engine: &dyn Engine,
    numbers: &Numbers,
    first: &[(&str, u16)],
    deadline: Instant,
    max_rows: u64,
) -> Result<u64, StoreError> {
    let mut tables: Vec<_> = numbers.tables.iter().collect();
    tables.sort_by_key(|(name, head)| (!first.iter().any(|(first, _)| first == name), head.rows));
    let mut verified = 0;
    for (name, head) in tables {
        if verified + head.rows > max_rows {
            continue;
        }
        match tally(engine, name, Some(deadline))? {
            Some(tally) => tally.compare(name, head)?,
            None => break,
        }
        verified += head.rows;
    }
    Ok(verified)
}
