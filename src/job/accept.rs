//! Acceptance: from a submission to a job on disk, or a refusal that leaves nothing behind.

use super::Submission;
use super::engine::{Engine, OpenJob};
use super::lock::covers;
use super::record::{
    DIGEST_KEY, JOBS, JobRecord, JobState, KEYS, PLANS, StepRecord, StepState, StoredKey, StoredPlan,
};
use super::shelf;
use crate::model::{JobId, Timestamp, trace};
use crate::store::{Store, StoreError, Txn};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Submissions with a key take one of these, so that two with the same key cannot both be new.
pub(super) const KEY_STRIPES: usize = 64;

/// Why a job was not accepted. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("{open} jobs are open, as many as the settings allow (jobs.max_open)")]
    QueueFull { open: usize },
    #[error("the key was used for another request, job {job}")]
    IdempotencyConflict { job: JobId },
    #[error("the parent job {0} is not running")]
    NoParent(JobId),
    #[error("the parent's locks do not cover {0}")]
    NotCovered(String),
    #[error("the daemon is stopping")]
    Stopping,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Engine {
    /// Accepts a job: when this returns, it is on disk and will reach a terminal state. With a known
    /// idempotency key it answers the job that has it.
    pub async fn submit(&self, mut submission: Submission) -> Result<JobId, SubmitError> {
        submission.options.trace = submission.options.trace.or_else(trace::current);
        // In a task of its own: a caller that hangs up in the middle must not leave a job on disk that nobody runs.
        let engine = self.clone();
        tokio::spawn(async move { engine.accept(submission).await })
            .await
            .unwrap_or(Err(SubmitError::Stopping))
    }

    async fn accept(&self, submission: Submission) -> Result<JobId, SubmitError> {
        let mut digest = None;
        let _stripe = match &submission.options.idempotency_key {
            None => None,
            Some(key) => {
                let stripe = crc32c::crc32c(key.as_bytes()) as usize % KEY_STRIPES;
                let held = self.0.keys[stripe].lock().await;
                let request = match &submission.options.request {
                    Some(request) => request.clone(),
                    None => format!("{} {}", submission.verb, submission.params).into_bytes(),
                };
                if let Some(job) = self.known(key, &request).await? {
                    return Ok(job);
                }
                digest = Some(self.digest(&request));
                Some(held)
            }
        };
        let id = self.reserve(&submission)?;
        let accepted = Instant::now();
        let (record, mut plan) = self.first_record(id, submission);
        let deadline = accepted + Duration::from_millis(record.deadline.0.saturating_sub(record.created.0));
        let mut txn = if plan.essential { Txn::essential() } else { Txn::new() };
        txn.put(&JOBS, &id, &record);
        shelf::shelve(id, &mut plan, &mut txn);
        txn.put(&PLANS, &id, &shelf::light(&plan));
        if let (Some(key), Some(digest)) = (&record.idempotency_key, digest) {
            txn.put(&KEYS, key.as_str(), &StoredKey { job: id, digest });
        }
        let parent = record.parent;
        if let Err(error) = self.store_first(txn, id).await {
            self.state().reserved -= 1;
            if let Some(parent) = parent {
                self.family_of(parent, |family| family.open -= 1);
            }
            return Err(error.into());
        }
        let open = Arc::new(OpenJob::new(record, plan, deadline));
        if let Some(parent) = parent {
            self.note_child(parent, id);
        }
        self.enter(id, &open);
        self.schedule();
        Ok(id)
    }

    /// The job that an idempotency key stands for, if it was asked for with this very request.
    pub async fn known(&self, key: &str, request: &[u8]) -> Result<Option<JobId>, SubmitError> {
        match self.0.store.get(&KEYS, key).await? {
            None => Ok(None),
            Some(known) if known.digest == self.digest(request) => Ok(Some(known.job)),
            Some(known) => Err(SubmitError::IdempotencyConflict { job: known.job }),
        }
    }

    fn digest(&self, request: &[u8]) -> String {
        let tag = ring::hmac::sign(&self.0.digest_key, request);
        tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// After a failure of the disk the job may be there all the same, and would run after a restart: then it is
    /// accepted.
    async fn store_first(&self, txn: Txn, id: JobId) -> Result<(), StoreError> {
        match self.0.store.commit(txn).await {
            Err(StoreError::Io(error)) => match self.0.store.get(&JOBS, &id).await {
                Ok(Some(_)) => Ok(()),
                _ => Err(StoreError::Io(error)),
            },
            other => other.map(|_| ()),
        }
    }

    fn reserve(&self, submission: &Submission) -> Result<JobId, SubmitError> {
        let mut state = self.state();
        if !state.accepting {
            return Err(SubmitError::Stopping);
        }
        if let Some(parent) = submission.options.parent {
            let Some(parent_job) = state.open.get(&parent) else { return Err(SubmitError::NoParent(parent)) };
            let held = parent_job.record.borrow().locks.clone();
            if let Some(want) = submission.locks.iter().find(|want| !covers(&held, want)) {
                return Err(SubmitError::NotCovered(want.object.clone()));
            }
            let holds = parent_job.started.load(Ordering::SeqCst) && !parent_job.family.borrow().closed;
            if !holds {
                return Err(SubmitError::NoParent(parent));
            }
        }
        if state.reserved >= self.0.settings.max_open && !submission.options.essential {
            return Err(SubmitError::QueueFull { open: state.reserved });
        }
        state.reserved += 1;
        if let Some(open) = submission.options.parent.and_then(|parent| state.open.get(&parent)) {
            open.family.send_modify(|family| family.open += 1);
        }
        let id = state.next;
        state.next = JobId(id.0 + 1);
        Ok(id)
    }

    fn first_record(&self, id: JobId, submission: Submission) -> (JobRecord, StoredPlan) {
        let now = Timestamp::now();
        let default = Duration::from_secs(self.0.settings.default_deadline_s);
        let deadline = submission.options.deadline.unwrap_or(default);
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let steps = submission.steps.iter().map(|s| StepRecord {
            name: s.name.clone(),
            about: s.about.clone(),
            state: StepState::Pending,
            started: None,
            ended: None,
            error: None,
        });
        let record = JobRecord {
            id,
            verb: submission.verb,
            about: submission.about,
            caller: submission.caller,
            params: submission.params,
            locks: submission.locks,
            state: JobState::Queued,
            steps: steps.collect(),
            created: now,
            started: None,
            ended: None,
            deadline: Timestamp(now.0.saturating_add(deadline_ms)),
            parent: submission.options.parent,
            trace: submission.options.trace,
            children: Vec::new(),
            idempotency_key: submission.options.idempotency_key,
            recurring: submission.options.recurring,
            cancel: None,
            fault: None,
            result: None,
            progress: 0,
        };
        let outcomes = vec![None; submission.steps.len()];
        (
            record,
            StoredPlan {
                steps: submission.steps,
                outcomes,
                essential: submission.options.essential,
                parts: Vec::new(),
            },
        )
    }
}

/// The key of the digests: kept, so that a request is known again after a restart. A store that can only be read
/// takes no requests, so any key will do there.
pub(super) async fn digest_key(store: &Store) -> Result<ring::hmac::Key, StoreError> {
    const ROW: &str = "digest";
    let bytes = match store.get(&DIGEST_KEY, ROW).await? {
        Some(bytes) => bytes,
        None => {
            let made = [*uuid::Uuid::new_v4().as_bytes(), *uuid::Uuid::new_v4().as_bytes()].concat();
            let mut txn = Txn::essential();
            txn.put(&DIGEST_KEY, ROW, &made);
            match store.commit(txn).await {
                Ok(_) | Err(StoreError::ReadOnly(_) | StoreError::DiskFull(_)) => made,
                Err(error) => return Err(error),
            }
        }
    };
    Ok(ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &bytes))
}
