//! What there is to tell of the network.

use super::{Confirmed, MAX_PAST, Open, Operations, PAST, Past, Result, kernel_fault, store_fault};
use crate::job::JobState;
use crate::model::network::{NetworkView, Owner};
use crate::model::{IfName, JobId};
use crate::network::{Scope, aim, plan};
use crate::store::{Range, StoreError};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// All of it.
#[derive(Debug, Clone)]
pub struct Shown {
    pub now: NetworkView,
    pub confirmed: Confirmed,
    pub owners: BTreeMap<IfName, Owner>,
    pub open: Option<Open>,
    /// What would bring the kernel to the declaration; nothing while a change is under way.
    pub drift: Vec<String>,
}

/// Where a change stands whose caller waits for it.
#[derive(Debug, Clone)]
pub enum Waiting {
    /// It is done and waits to be confirmed.
    ForConfirmation(Box<Open>),
    Ended,
    /// The caller has waited long enough.
    GoesOn,
}

impl Operations {
    pub async fn network_show(&self) -> Result<Shown> {
        let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        let owners = self.kernel.owners().await.map_err(|e| kernel_fault(&e))?;
        let (confirmed, open) = (self.network_confirmed().await?, self.network_open().await?);
        let drift = if open.is_some() { Vec::new() } else { super::told(drift(&now, &confirmed)) };
        Ok(Shown { now, confirmed, owners, open, drift })
    }

    /// The newest first.
    pub async fn network_history(&self, limit: usize) -> Result<Vec<Past>> {
        let rows = self
            .store
            .scan(&PAST, Range::all().reversed().limit(limit))
            .await
            .map_err(|e| store_fault(&e))?;
        Ok(rows.into_iter().map(|(_, past)| past).collect())
    }

    /// Deletes the oldest changes beyond [`MAX_PAST`].
    pub(in crate::operation) async fn prune_network_history(&self) -> std::result::Result<(), StoreError> {
        let newest = *self.store.sequence(PAST.name).borrow();
        let keep_from = newest.saturating_sub(MAX_PAST) + 1;
        self.store.prune(&PAST, keep_from.to_be_bytes().to_vec(), 20_000).await.map(drop)
    }

    /// Waits until a change has ended or waits for its confirmation.
    pub async fn network_applied(&self, job: JobId, end: Instant) -> Result<Waiting> {
        let Some(engine) = self.engine() else { return Ok(Waiting::GoesOn) };
        loop {
            let record = engine.wait(job, Duration::from_millis(20)).await.map_err(|e| store_fault(&e))?;
            if record.is_none_or(|record| record.state.is_terminal()) {
                return Ok(Waiting::Ended);
            }
            if let Some(open) =
                self.network_of(job).await?.filter(|open| open.applied && open.confirm_until.is_some())
                && engine
                    .get(job)
                    .await
                    .ok()
                    .flatten()
                    .is_some_and(|record| record.state == JobState::Running)
            {
                return Ok(Waiting::ForConfirmation(Box::new(open)));
            }
            if Instant::now() >= end || engine.is_stopping() {
                return Ok(Waiting::GoesOn);
            }
        }
    }
}

/// What would bring the kernel to the declaration.
pub(super) fn drift(now: &NetworkView, confirmed: &Confirmed) -> Vec<crate::model::network::Change> {
    let declared = &confirmed.desired;
    plan(now, &aim(now, declared, declared), &Scope::of(declared, declared, now))
}
