//! The job engine: accepts a plan, keeps it on disk, takes its locks, runs its steps, undoes them when one
//! fails, and goes on after a crash. Knows no domain: a step is data, run by the [`Executor`] that the floor
//! above registers.
//!
//! Words: a *plan* is a list of steps; the *intent* of a step is written before its effect, the *outcome* after
//! it; a step with an intent and no outcome is *in doubt*; a *submission* is a plan with its locks and options;
//! a job is *open* from its acceptance to its terminal state.
//!
//! ```text
//! queued ──locks──► running ──all steps──► succeeded
//!    │                 │ step failed, cancel, deadline
//!    │ cancel          ▼
//!    └────────────► undoing ──────────────► failed | cancelled
//! ```
//!
//! Who owns what: [`Engine`] owns the tables `job` (the public record, kept as history), `job_plan` (steps with
//! their data, private, wiped at the terminal state, so that secrets in parameters end with the job), and
//! `idempotency`, `recurring`. One task per running job writes its record; nobody else does.
//!
//! Children run under their parent's locks and in its place; a parent that fails calls its children off, and none
//! outlives it. After a restart the jobs that had begun get their locks back before any other enters.
//!
//! Accepted means durable: [`Engine::submit`] returns after the record is on disk. The outcome of one step and
//! the intent of the next are one transaction, so a plan of n effects costs n + 2 commits.
//!
//! What it does not do: it never retries a step by itself, except that a step in doubt after a crash is run
//! again if its plan says so ([`Resume::Redo`]).

mod accept;
mod engine;
mod figures;
mod history;
mod lock;
mod record;
mod recurring;
mod run;
mod shelf;
#[cfg(test)]
mod tests;

pub use accept::SubmitError;
pub use engine::Engine;
pub use figures::{Ended, Figures};
pub use history::Listing;
pub use lock::{LockState, LockTable, LockView, LockWant, Mode};
pub use record::{CancelRecord, JobFault, JobRecord, JobState, StepRecord, StepState};
pub use recurring::Recurring;

use crate::model::{JobId, TraceParent};
use crate::store::Txn;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What becomes of a step that a crash left in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resume {
    /// Run it again: it is idempotent and looks at the world first.
    Redo,
    /// Undo the whole job.
    Undo,
}

/// One effect on the world, as planned.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlannedStep {
    /// Short and stable: `create_domain`.
    pub name: String,
    /// For people: `build domain web1 with 512 MiB`. No secrets.
    pub about: String,
    /// For the executor only. Private: wiped with the plan.
    pub what: serde_json::Value,
    /// Whether it changes anything outside the store. Only then is an intent written first: a step that only
    /// writes records does so in the transaction of its outcome, which cannot be in doubt.
    pub effect: bool,
    pub resume: Resume,
    /// Whether the executor can undo it.
    pub undo: bool,
    /// Its part of the job's progress.
    pub weight: u32,
}

/// Everything needed to accept a job.
#[derive(Debug, Clone)]
pub struct Submission {
    pub verb: String,
    pub about: String,
    pub caller: String,
    /// The parameters as people may see them: secrets already masked.
    pub params: serde_json::Value,
    pub locks: Vec<LockWant>,
    pub steps: Vec<PlannedStep>,
    pub options: Options,
}

#[derive(Debug, Clone, Default)]
pub struct Options {
    pub idempotency_key: Option<String>,
    /// What the key stands for, whole, with secrets: only a digest of it is kept. Without it, the verb and the
    /// parameters as shown.
    pub request: Option<Vec<u8>>,
    /// From acceptance to the end; the settings' default if `None`.
    pub deadline: Option<Duration>,
    /// A child runs under its parent's locks, which must cover its own.
    pub parent: Option<JobId>,
    /// What it is done for; without it, what the submitter works for.
    pub trace: Option<TraceParent>,
    pub recurring: Option<String>,
    /// May use the disk space kept in reserve, and is accepted beyond `max_open`.
    pub essential: bool,
}

/// What a step did.
#[derive(Default)]
pub struct Outcome {
    /// Kept with the plan, for `undo` and for later steps.
    pub value: Option<serde_json::Value>,
    /// The job's result, if no later step has one.
    pub result: Option<serde_json::Value>,
    /// Written in the same transaction as the outcome.
    pub writes: Txn,
    /// Run when that transaction is on disk, before the next step.
    pub then: Option<Box<dyn FnOnce() + Send>>,
}

impl Outcome {
    pub fn done() -> Self {
        Self::default()
    }

    pub fn value(value: serde_json::Value) -> Self {
        Self { value: Some(value), ..Self::default() }
    }

    pub fn result(result: serde_json::Value) -> Self {
        Self { result: Some(result), ..Self::default() }
    }
}

/// What a running step may ask of the engine.
#[derive(Clone)]
pub struct StepContext {
    pub job: JobId,
    pub verb: String,
    pub caller: String,
    pub step: usize,
    /// Whether this is a step that a crash left in doubt.
    pub resumed: bool,
    /// What the steps before this one answered.
    pub outcomes: Arc<Vec<Option<serde_json::Value>>>,
    /// Cancelled when the job is; a step that can stop early then returns `CANCELLED`.
    pub cancelled: CancellationToken,
    pub(crate) engine: Engine,
}

impl StepContext {
    /// Tells how far this step is, 0 to 100. Not written to disk.
    pub fn progress(&self, percent: u8) {
        self.engine.note_progress(self.job, self.step, percent);
    }

    /// Submits a child and waits for its end. The same `key` after a crash finds the same child.
    pub async fn child(&self, key: &str, mut submission: Submission) -> Result<Arc<JobRecord>, JobFault> {
        submission.options.parent = Some(self.job);
        submission.options.idempotency_key = Some(format!("child/{}/{key}", self.job));
        submission.options.essential = true;
        let id = self
            .engine
            .submit(submission)
            .await
            .map_err(|e| JobFault::new("CHILD_REFUSED", e.to_string()))?;
        let mut asked = false;
        // One that ended before a crash is found again and not open any more, so nobody else notes it.
        self.engine.note_child(self.job, id);
        loop {
            let waited = tokio::select! {
                waited = self.engine.wait(id, Duration::from_secs(3600)) => waited,
                // The child ends soon; until then it works under our locks, so we wait on.
                () = self.cancelled.cancelled(), if !asked => {
                    asked = true;
                    if let Err(error) = self.engine.cancel(id, &format!("job {}", self.job)).await {
                        tracing::warn!(job_id = %self.job, child = %id, %error, "a child was not cancelled");
                    }
                    continue;
                }
            };
            match waited {
                Ok(Some(record)) if record.state.is_terminal() => return Ok(record),
                // The daemon stops: the child goes on after the restart, and so does this step, which is dropped now.
                Ok(Some(_)) if self.engine.is_stopping() => std::future::pending().await,
                Ok(Some(_)) => {}
                Ok(None) => return Err(JobFault::new("JOB_NOT_FOUND", format!("child job {id} is gone"))),
                Err(error) => return Err(JobFault::new("STORE", error.to_string())),
            }
        }
    }
}

/// Runs each kind of step. Registered once by the floor above.
#[async_trait]
pub trait Executor: Send + Sync + 'static {
    async fn run(&self, step: &PlannedStep, context: &StepContext) -> Result<Outcome, JobFault>;

    /// Takes back what `run` did, wholly or in part; `outcome` is `None` if it failed or is in doubt. Idempotent.
    async fn undo(
        &self,
        step: &PlannedStep,
        outcome: Option<&serde_json::Value>,
        context: &StepContext,
    ) -> Result<Outcome, JobFault>;

    /// What else the terminal transaction of a job writes: its event, its audit.
    fn ended(&self, job: &JobRecord, txn: &mut Txn);
}
