//! The public record of a job: what `job_get` shows and history keeps. No secrets, no step data.

use super::lock::LockWant;
use crate::model::{JobId, Timestamp, TraceParent};
use crate::store::Table;
use serde::{Deserialize, Serialize};

pub(super) const JOBS: Table<JobRecord> = Table::new("job", 1);
pub(super) const PLANS: Table<StoredPlan> = Table::new("job_plan", 1);
pub(super) const KEYS: Table<StoredKey> = Table::new("idempotency", 1);
/// The key of the digests, made at the first start; one row, `digest`.
pub(super) const DIGEST_KEY: Table<Vec<u8>> = Table::new("digest_key", 1);

/// The steps of an open job with their data. A row exists exactly while its job is open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredPlan {
    pub steps: Vec<super::PlannedStep>,
    pub outcomes: Vec<Option<serde_json::Value>>,
    pub essential: bool,
    /// How many rows of `job_plan_part` hold each step's data; empty: all of it is here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<u32>,
}

/// Which job an idempotency key stands for, and a digest of what was asked with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredKey {
    pub job: JobId,
    /// HMAC-SHA256 in hex, by a key of this store's own: the request may hold secrets.
    pub digest: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Accepted; waits for its locks or for its turn.
    Queued,
    Running,
    /// A step failed, or it was cancelled, or its deadline passed: effects are being taken back.
    Undoing,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Undoing => "undoing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    Pending,
    /// The intent is on disk; the outcome is not.
    Intended,
    Done,
    Failed,
    Undone,
    UndoFailed,
}

impl StepState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Intended => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Undone => "undone",
            Self::UndoFailed => "undo_failed",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    pub name: String,
    pub about: String,
    pub state: StepState,
    pub started: Option<Timestamp>,
    pub ended: Option<Timestamp>,
    pub error: Option<JobFault>,
}

/// Why a job or step failed: a stable symbolic name and a text for people. Bounded to 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{name}: {text}")]
pub struct JobFault {
    pub name: String,
    pub text: String,
    /// The step is sure that it has changed nothing, so there is nothing to take back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_effect: bool,
}

impl JobFault {
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        let mut text: String = text.into();
        if text.len() > 4096 {
            let mut end = 4096;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
        }
        Self { name: name.into(), text, no_effect: false }
    }

    /// A fault of a step that has changed nothing.
    pub fn refusal(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { no_effect: true, ..Self::new(name, text) }
    }
}

/// Who asked for the job's end, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRecord {
    pub by: String,
    pub at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    pub id: JobId,
    pub verb: String,
    pub about: String,
    pub caller: String,
    pub params: serde_json::Value,
    pub locks: Vec<LockWant>,
    pub state: JobState,
    pub steps: Vec<StepRecord>,
    pub created: Timestamp,
    pub started: Option<Timestamp>,
    pub ended: Option<Timestamp>,
    pub deadline: Timestamp,
    pub parent: Option<JobId>,
    /// What it is done for. Kept, so that a job that goes on after a restart still knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceParent>,
    pub children: Vec<JobId>,
    pub idempotency_key: Option<String>,
    pub recurring: Option<String>,
    pub cancel: Option<CancelRecord>,
    pub fault: Option<JobFault>,
    pub result: Option<serde_json::Value>,
    /// 0 to 100. On disk it is only as fresh as the last step.
    pub progress: u8,
}

impl JobRecord {
    /// The step that runs now, if one does.
    pub fn current_step(&self) -> Option<&StepRecord> {
        self.steps.iter().find(|s| s.state == StepState::Intended)
    }
}
