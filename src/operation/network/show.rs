//! What there is to tell of the network.

use super::{
    CONFIRM, Confirmed, LOCK, MAX_PAST, Open, Operations, PAST, Past, Result, kernel_fault, store_fault,
};
use crate::job::{JobRecord, JobState, StepRecord, StepState};
use crate::model::network::{Neighbour, NetworkView, Owner};
use crate::model::{IfName, JobId};
use crate::network::{Scope, aim, plan};
use crate::store::{Range, StoreError};
use std::collections::BTreeMap;
use tokio::time::Instant;

/// All of it.
#[derive(Debug, Clone)]
pub struct Shown {
    pub now: NetworkView,
    pub neighbours: Vec<Neighbour>,
    pub confirmed: Confirmed,
    pub owners: BTreeMap<IfName, Owner>,
    pub open: Option<Open>,
    /// Where that stands.
    pub stage: &'static str,
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
        let neighbours = self.kernel.neighbours().await.map_err(|e| kernel_fault(&e))?;
        let owners = self.kernel.owners().await.map_err(|e| kernel_fault(&e))?;
        let (confirmed, open) = (self.network_confirmed().await?, self.network_open().await?);
        let drift = if open.is_some() { Vec::new() } else { super::told(drift(&now, &confirmed, &owners)) };
        let stage = match &open {
            Some(open) => self.stage_of(open).await,
            None => "",
        };
        Ok(Shown { now, neighbours, confirmed, owners, open, stage, drift })
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

    /// Where the open change stands, for people and programs.
    async fn stage_of(&self, open: &Open) -> &'static str {
        match (open.blocked_after, open.told_after) {
            (Some(_), _) => "rollback_blocked",
            (None, Some(_)) => "rolling_back",
            _ if self.waits_for_word(open).await => "waits_for_confirmation",
            _ => "applying",
        }
    }

    /// All of it is done and verified, and its confirmation is awaited.
    pub(super) async fn waits_for_word(&self, open: &Open) -> bool {
        let Some(engine) = self.engine().filter(|_| open.confirm_until.is_some()) else { return false };
        matches!(engine.get(open.job).await, Ok(Some(record)) if waits_for_word(&record))
    }

    /// Whether a job has the network in hand; not while its change stands and waits for its word.
    pub(super) async fn network_is_changing(&self) -> bool {
        let Some(engine) = self.engine().filter(|engine| engine.is_claimed(LOCK)) else { return false };
        let Ok(Some(open)) = self.network_open().await else { return true };
        !matches!(engine.get(open.job).await, Ok(Some(record)) if waits_for_word(&record))
    }

    /// Waits until a change has ended or waits for its confirmation.
    pub async fn network_applied(&self, job: JobId, end: Instant) -> Result<Waiting> {
        let Some(engine) = self.engine() else { return Ok(Waiting::GoesOn) };
        let patience = end.saturating_duration_since(Instant::now());
        let record = engine.wait_until(job, patience, waits_for_word).await.map_err(|e| store_fault(&e))?;
        let Some(record) = record.filter(|record| !record.state.is_terminal()) else {
            return Ok(Waiting::Ended);
        };
        if !waits_for_word(&record) {
            return Ok(Waiting::GoesOn);
        }
        // What the step before wrote is on disk before this one begins. One without a window is past it at once.
        match self.network_of(job).await?.filter(|open| open.confirm_until.is_some()) {
            Some(open) => Ok(Waiting::ForConfirmation(Box::new(open))),
            None => Ok(Waiting::Ended),
        }
    }
}

/// What would bring the kernel to the declaration; but for links that another service has taken since.
pub(super) fn drift(
    now: &NetworkView,
    confirmed: &Confirmed,
    owners: &BTreeMap<IfName, Owner>,
) -> Vec<crate::model::network::Change> {
    let declared = &confirmed.desired;
    let target = aim(now, declared, declared);
    let others = owners.keys().cloned().collect();
    plan(now, &target, &Scope::of(declared, declared, now).without(&others, &target))
}

fn waits_for_word(record: &JobRecord) -> bool {
    let at = |step: &&StepRecord| step.state == StepState::Intended;
    record.state == JobState::Running && record.steps.iter().find(at).is_some_and(|step| step.name == CONFIRM)
}
