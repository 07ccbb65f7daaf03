//! Jobs as history: listed newest first, and pruned to the bound of the settings.

use super::engine::{Engine, number};
use super::record::{JOBS, JobRecord, JobState, KEYS};
use crate::model::JobId;
use crate::store::{Key, Range, StoreError, Txn};
use std::sync::Arc;

/// What `job_list` asks for. Newest first.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    pub state: Option<JobState>,
    pub verb: Option<String>,
    /// Only jobs with a lock on this object.
    pub object: Option<String>,
    /// Only jobs before this one.
    pub before: Option<JobId>,
    pub limit: usize,
}

impl Engine {
    /// Jobs, newest first. At most `limit`; looks through at most the whole history.
    pub async fn list(&self, listing: &Listing) -> Result<Vec<Arc<JobRecord>>, StoreError> {
        let mut found = Vec::new();
        let mut before = listing.before.unwrap_or(JobId(u64::MAX));
        loop {
            let page = self.0.store.scan(&JOBS, Range::before(before.bytes()).reversed().limit(256)).await?;
            let Some((last, _)) = page.last() else { return Ok(found) };
            before = JobId(number(last));
            for (key, stored) in page {
                let live = self.find_open(JobId(number(&key))).map(|o| Arc::clone(&o.record.borrow()));
                let record = live.unwrap_or_else(|| Arc::new(stored));
                if matches(listing, &record) {
                    found.push(record);
                    if found.len() >= listing.limit {
                        return Ok(found);
                    }
                }
            }
        }
    }

    /// Deletes ended jobs beyond the bound of history, oldest first, with their keys. Answers how many.
    pub async fn prune(&self) -> Result<usize, StoreError> {
        const PAGE: usize = 256;
        let keep = self.0.settings.history as u64;
        let Some(last) = self.0.store.last_key(JOBS.name).await? else { return Ok(0) };
        let floor = number(&last).saturating_sub(keep);
        let mut from = 0;
        let mut gone = 0;
        loop {
            let page = self.0.store.scan(&JOBS, below(from, floor + 1).limit(PAGE)).await?;
            let Some((key, _)) = page.last() else { return Ok(gone) };
            from = number(key) + 1;
            let mut txn = Txn::essential();
            for (key, record) in page {
                let id = JobId(number(&key));
                if !record.state.is_terminal() || self.find_open(id).is_some() {
                    continue;
                }
                gone += 1;
                txn.delete(&JOBS, &id);
                if let Some(key) = &record.idempotency_key {
                    txn.delete(&KEYS, key.as_str());
                }
            }
            if !txn.is_empty() {
                self.0.store.commit(txn).await?;
            }
            // Other commits go between the pages.
            tokio::task::yield_now().await;
        }
    }
}

fn matches(listing: &Listing, record: &JobRecord) -> bool {
    listing.state.is_none_or(|s| s == record.state)
        && listing.verb.as_ref().is_none_or(|v| *v == record.verb)
        && listing.object.as_ref().is_none_or(|o| record.locks.iter().any(|l| l.object == *o))
}

/// The jobs from `from` to before `end`.
fn below(from: u64, end: u64) -> Range {
    Range { from: std::ops::Bound::Included(from.bytes()), ..Range::before(end.bytes()) }
}
