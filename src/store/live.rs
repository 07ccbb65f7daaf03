//! The check of a store in use: every row is read and its checksum compared, a page at a time, so that neither
//! commits nor other reads wait for it. Counts are not compared with the heads: rows change meanwhile.

use super::engine::{Engine, PAGE_ROWS, Range};
use super::tools::{CheckReport, TableReport};
use super::{Store, StoreError, envelope};

impl Store {
    /// Reads every row. Long for a large store; changes nothing.
    pub async fn check(&self) -> Result<CheckReport, StoreError> {
        let core = self.core.clone();
        // The numbers are held for as long as the disk takes to sync.
        let numbers =
            tokio::task::spawn_blocking(move || core.numbers().clone()).await.map_err(ended_early)?;
        let commit = numbers.commit;
        let tables: Vec<(String, u64)> =
            numbers.tables.into_iter().map(|(name, head)| (name, head.last)).collect();
        let mut report = CheckReport { commit, tables: Vec::new(), ledger: Vec::new(), problems: Vec::new() };
        for (name, last_number) in tables {
            let core = self.core.clone();
            let table = name.clone();
            let read = move || walk(|range| core.read(|engine: &dyn Engine| engine.scan(&table, range)));
            let done = tokio::task::spawn_blocking(read).await;
            let (rows, bytes, bad_rows) = done.map_err(ended_early)??;
            if bad_rows > 0 {
                report.problems.push(format!("table {name}: {bad_rows} rows do not pass their checksums"));
            }
            report.tables.push(TableReport { name, rows, bytes, bad_rows, last_number });
        }
        Ok(report)
    }
}

fn ended_early(error: tokio::task::JoinError) -> StoreError {
    StoreError::Io(format!("the check ended early: {error}"))
}

/// Rows, bytes, and rows that do not pass.
fn walk(
    scan: impl Fn(&Range) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError>,
) -> Result<(u64, u64, u64), StoreError> {
    let (mut rows, mut bytes, mut bad) = (0, 0, 0);
    let mut range = Range::all().limit(PAGE_ROWS);
    loop {
        let page = scan(&range)?;
        for (key, sealed) in &page {
            rows += 1;
            bytes += (key.len() + sealed.len()) as u64;
            bad += u64::from(envelope::open(sealed).is_err());
        }
        match page.last() {
            Some((key, _)) if page.len() == PAGE_ROWS => range = Range::after(key.clone()).limit(PAGE_ROWS),
            _ => return Ok((rows, bytes, bad)),
        }
    }
}
