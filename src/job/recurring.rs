//! Recurring work: discovery, pruning, certificate renewal. Each is an ordinary job, made anew when its time
//! has come. The time of the last one is on disk, so that a daemon that restarts often does not repeat it each
//! time; and of the jobs that succeeded only the last is kept, so that they do not push others out of history.

use super::engine::Engine;
use super::record::JOBS;
use super::{JobState, Submission};
use crate::model::{JobId, Timestamp};
use crate::store::{Table, Txn};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const RECURRING: Table<LastRun> = Table::new("recurring", 1);

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct LastRun {
    pub at: Timestamp,
    pub job: JobId,
}

/// One kind of recurring work.
#[derive(Clone)]
pub struct Recurring {
    pub name: &'static str,
    pub every: Duration,
    pub submission: Arc<dyn Fn() -> Submission + Send + Sync>,
}

#[derive(Default)]
pub(super) struct RecurringTable {
    names: Mutex<Vec<&'static str>>,
}

impl Engine {
    /// Starts a kind of recurring work: the first time when its interval has passed since the last run of this
    /// or an earlier life, or now if there was none.
    pub fn start_recurring(&self, work: Recurring) {
        self.0.recurring.names.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(work.name);
        let engine = self.clone();
        tokio::spawn(async move {
            let stop = engine.0.halt.clone();
            tokio::select! {
                () = engine.repeat(&work) => {}
                () = stop.cancelled() => {}
            }
        });
    }

    pub fn recurring_names(&self) -> Vec<&'static str> {
        self.0.recurring.names.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    async fn repeat(&self, work: &Recurring) {
        let last = self.0.store.get(&RECURRING, work.name).await.ok().flatten().unwrap_or_default();
        let passed = Duration::from_millis(Timestamp::now().0.saturating_sub(last.at.0));
        tokio::time::sleep(work.every.saturating_sub(passed)).await;
        loop {
            let mut submission = (work.submission)();
            submission.options.recurring = Some(work.name.to_owned());
            match self.submit(submission).await {
                Ok(id) => self.follow(work, id).await,
                Err(error) => tracing::warn!(work = work.name, %error, "recurring job was not accepted"),
            }
            tokio::time::sleep(work.every).await;
        }
    }

    /// Waits for the end of one run, notes it, and lets go of the one before.
    async fn follow(&self, work: &Recurring, id: JobId) {
        let before = self.0.store.get(&RECURRING, work.name).await.ok().flatten();
        let limit = Duration::from_secs(self.0.settings.default_deadline_s + 60);
        if let Ok(Some(record)) = self.wait(id, limit).await
            && record.state == JobState::Failed
        {
            tracing::warn!(work = work.name, job_id = %id, fault = ?record.fault, "recurring job failed");
        }
        let mut txn = Txn::essential();
        txn.put(&RECURRING, work.name, &LastRun { at: Timestamp::now(), job: id });
        if let Some(before) = before
            && let Ok(Some(old)) = self.get(before.job).await
            && old.state == JobState::Succeeded
            && old.recurring.as_deref() == Some(work.name)
        {
            txn.delete(&JOBS, &before.job);
        }
        if let Err(error) = self.0.store.commit(txn).await {
            tracing::warn!(work = work.name, %error, "the time of a recurring job was not kept");
        }
    }
}
