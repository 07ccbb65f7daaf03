//! Steps whose data is larger than a row of the store: it lies in rows of its own, written once when the job is accepted
//! and deleted with its plan. A declaration of 4,094 VLANs is the largest there is.

use super::record::StoredPlan;
use crate::model::{JobId, pieces};
use crate::store::{Key, Store, StoreError, Table, Txn};

pub(super) const PARTS: Table<String> = Table::new("job_plan_part", 1);

/// Data up to this stays in the plan's row, which is written anew with each step.
const SMALL_BYTES: usize = 16 * 1024;
/// As text in JSON it may double.
const PART_BYTES: usize = 96 * 1024;

/// Job, step and part: what one job has lies together.
struct PartKey {
    job: JobId,
    step: usize,
    part: u32,
}

impl Key for PartKey {
    fn bytes(&self) -> Vec<u8> {
        let step = u32::try_from(self.step).unwrap_or(u32::MAX);
        [&self.job.0.to_be_bytes()[..], &step.to_be_bytes(), &self.part.to_be_bytes()].concat()
    }
}

/// Puts what is large on the shelf, and notes in the plan what lies there.
pub(super) fn shelve(job: JobId, plan: &mut StoredPlan, txn: &mut Txn) {
    let texts: Vec<String> = plan.steps.iter().map(|step| step.what.to_string()).collect();
    if texts.iter().all(|text| text.len() <= SMALL_BYTES) {
        return;
    }
    plan.parts = vec![0; plan.steps.len()];
    for (step, text) in texts.iter().enumerate().filter(|(_, text)| text.len() > SMALL_BYTES) {
        for piece in pieces(text, PART_BYTES) {
            txn.put(&PARTS, &PartKey { job, step, part: plan.parts[step] }, &piece.to_owned());
            plan.parts[step] += 1;
        }
    }
}

/// The plan as its own row holds it.
pub(super) fn light(plan: &StoredPlan) -> StoredPlan {
    let mut light = plan.clone();
    for (step, _) in plan.parts.iter().enumerate().filter(|(_, parts)| **parts > 0) {
        light.steps[step].what = serde_json::Value::Null;
    }
    light
}

/// Takes from the shelf what the plan has there.
pub(super) async fn fetch(store: &Store, job: JobId, plan: &mut StoredPlan) -> Result<(), StoreError> {
    for step in 0..plan.parts.len().min(plan.steps.len()) {
        if plan.parts[step] == 0 {
            continue;
        }
        let mut text = String::new();
        for part in 0..plan.parts[step] {
            let piece = store.get(&PARTS, &PartKey { job, step, part }).await?;
            text.push_str(
                &piece.ok_or_else(|| StoreError::Damaged(format!("job {job} lacks a part of its plan")))?,
            );
        }
        plan.steps[step].what = serde_json::from_str(&text)
            .map_err(|error| StoreError::Damaged(format!("job {job}, step {step}: {error}")))?;
    }
    Ok(())
}

pub(super) fn discard(job: JobId, plan: &StoredPlan, txn: &mut Txn) {
    for (step, parts) in plan.parts.iter().enumerate() {
        for part in 0..*parts {
            txn.delete(&PARTS, &PartKey { job, step, part });
        }
    }
}
