//! One job's run: steps forward with intent and outcome on disk, and back if one fails.
//!
//! Only this task writes the job's record. A commit that fails for want of disk space or because the store is
//! gone is tried again for as long as the daemon lives: an effect whose outcome cannot be written is worse than
//! a job that holds its locks, visibly.

use super::engine::{CANCELS, Engine, OpenJob, guard};
use super::record::{
    CancelRecord, JOBS, JobFault, JobRecord, JobState, PLANS, StepRecord, StepState, StoredPlan,
};
use super::{Outcome, Resume, StepContext, shelf};
use crate::model::{JobId, Timestamp, trace};
use crate::store::{Importance, StoreError, Txn};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tracing::Instrument;

/// One undo step ends after this at the latest; the next is tried all the same. The longest known is a network's way back:
/// a kernel takes 20 ms and more to remove a link, and there may be thousands.
const UNDO_BOUND: Duration = Duration::from_secs(600);

/// Between two tries of a commit that the store refused.
const COMMIT_RETRY: Duration = Duration::from_millis(500);

/// A step's answer beyond this is left out of a record that would otherwise be too large.
const LARGE_ANSWER_BYTES: usize = 16 * 1024;

/// The daemon is stopping: the job stays open on disk and goes on at the next start.
struct Parked;

struct Run {
    engine: Engine,
    open: Arc<OpenJob>,
    record: JobRecord,
    plan: StoredPlan,
    /// What the next commit writes beside the record.
    pending: Txn,
    then: Vec<Box<dyn FnOnce() + Send>>,
    deadline: Instant,
    /// The step that a crash left in doubt, until it has run again.
    in_doubt: Option<usize>,
}

/// Whatever is logged or told on the way carries the job and what it is done for.
pub(super) async fn run(engine: Engine, id: JobId, open: Arc<OpenJob>) {
    let record = Arc::clone(&open.record.borrow());
    let trace = record.trace;
    let trace_id = trace.map(|trace| trace.trace_id());
    // Of the highest level, so that no filter leaves warnings without it; and a root, since who ends a job starts the
    // next one.
    let vm_uuid = record.locks.iter().find_map(|lock| lock.object.strip_prefix("vm/"));
    let span = tracing::error_span!(parent: None, "job", verb = record.verb, job_id = %id, vm_uuid, trace_id);
    trace::scope(trace, run_here(engine, open)).instrument(span).await;
}

async fn run_here(engine: Engine, open: Arc<OpenJob>) {
    let plan = open.plan.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let Some(plan) = plan else { return };
    let record = JobRecord::clone(&open.record.borrow());
    let in_doubt = record.steps.iter().position(|s| s.state == StepState::Intended);
    let pending = Txn::new();
    let deadline = open.deadline;
    let mut run = Run { engine, open, record, plan, pending, then: Vec::new(), deadline, in_doubt };
    tracing::debug!("job runs");
    if run.through().await.is_err() {
        tracing::info!("job is parked until the next start");
        run.engine.parked(&run.open);
    }
}

impl Run {
    async fn through(&mut self) -> Result<(), Parked> {
        let fault = match self.record.state {
            JobState::Undoing => self.record.fault.clone(),
            _ => self.forward().await?,
        };
        // One that was taking back already had called its children off before; those that are open help with that.
        self.end_children(fault.is_some() && self.record.state != JobState::Undoing).await?;
        match fault {
            None => self.end(JobState::Succeeded).await,
            Some(fault) => {
                self.record.fault = Some(fault);
                // What takes a step back may have children of its own: whoever called the others off does not mean them.
                self.engine.open_family(&self.open);
                self.backward().await?;
                self.end_children(false).await?;
                let cancelled = self.record.fault.as_ref().is_some_and(|f| f.name == "CANCELLED");
                self.end(if cancelled { JobState::Cancelled } else { JobState::Failed }).await
            }
        }
    }

    /// Children run under our locks, so none may outlive us. If we failed they are called off.
    async fn end_children(&mut self, call_off: bool) -> Result<(), Parked> {
        self.engine.close_family(&self.open);
        let mut family = self.open.family.subscribe();
        let by = format!("job {}", self.record.id);
        loop {
            if family.borrow_and_update().open == 0 {
                return Ok(());
            }
            let children = self.open.record.borrow().children.clone();
            for child in children.iter().filter(|_| call_off) {
                let called_off = |open: &Arc<OpenJob>| guard(&open.asked).by.is_some();
                if self.engine.find_open(*child).is_some_and(|open| !called_off(&open))
                    && let Err(error) = self.engine.cancel(*child, &by).await
                {
                    tracing::warn!(%child, %error, "a child was not called off");
                }
            }
            tokio::select! {
                _ = family.changed() => {}
                // One that was being accepted is among the children only a moment later.
                () = tokio::time::sleep(CHILDREN_RECHECK) => {}
                () = self.engine.stopping() => return Err(Parked),
            }
        }
    }

    /// Runs the steps that are not done. `Some`: why it stopped.
    async fn forward(&mut self) -> Result<Option<JobFault>, Parked> {
        if self.record.state == JobState::Queued
            && let Some(fault) = self.called_off()
        {
            return Ok(Some(fault));
        }
        self.record.state = JobState::Running;
        self.record.started.get_or_insert(Timestamp::now());
        if let Some(step) = self.in_doubt
            && self.plan.steps[step].resume == Resume::Undo
        {
            let text = format!("the agent died during step {}", self.record.steps[step].name);
            return Ok(Some(JobFault::new("INTERRUPTED", text)));
        }
        for step in 0..self.plan.steps.len() {
            if self.record.steps[step].state == StepState::Done {
                continue;
            }
            if let Some(fault) = self.called_off() {
                return Ok(Some(fault));
            }
            if self.engine.0.halt.is_cancelled() {
                if step > 0 {
                    // What the step before did is known; it need not be found out again.
                    self.commit(true).await?;
                }
                return Err(Parked);
            }
            self.record.steps[step].started = Some(Timestamp::now());
            self.record.steps[step].state = StepState::Intended;
            if self.plan.steps[step].effect && self.in_doubt != Some(step) {
                if let Some(fault) = self.intend(step).await? {
                    return Ok(Some(fault));
                }
            } else {
                self.flush_before(step).await?;
            }
            let result = self.perform(step).await?;
            self.in_doubt = None;
            self.record.steps[step].ended = Some(Timestamp::now());
            match result {
                Ok(outcome) => self.take(step, outcome),
                Err(fault) => {
                    let stopped = fault.name == "CANCELLED";
                    let fault = self.called_off().filter(|_| stopped).unwrap_or(fault);
                    self.record.steps[step].state = StepState::Failed;
                    self.record.steps[step].error = Some(fault.clone());
                    return Ok(Some(fault));
                }
            }
        }
        Ok(None)
    }

    /// Writes the intent of a step. `Some`: the step must not begin, and has not.
    ///
    /// The first effect of a job that is not essential does not use the space kept in reserve: on a full disk the
    /// job ends and lets go of its locks, so that those for whom the reserve is kept get them. Once it has had an
    /// effect, it goes on by all means.
    async fn intend(&mut self, step: usize) -> Result<Option<JobFault>, Parked> {
        let done = |i: &usize| self.plan.steps[*i].effect && self.record.steps[*i].state == StepState::Done;
        let begun = (0..step).any(|i| done(&i));
        let refused = match begun || self.open.essential {
            true => self.commit(true).await.map(|()| None)?,
            false => self.commit_first().await?,
        };
        // The commit may have taken its time.
        let refused = refused.or_else(|| self.called_off());
        if refused.is_some() {
            self.record.steps[step].state = StepState::Pending;
            self.record.steps[step].started = None;
        }
        Ok(refused)
    }

    /// What the step before wants done after its commit must be done before this one looks.
    async fn flush_before(&mut self, _step: usize) -> Result<(), Parked> {
        if self.then.is_empty() && self.pending.is_empty() {
            self.publish();
            return Ok(());
        }
        self.commit(true).await
    }

    fn take(&mut self, step: usize, outcome: Outcome) {
        self.record.steps[step].state = StepState::Done;
        self.plan.outcomes[step] = outcome.value;
        if outcome.result.is_some() {
            self.record.result = outcome.result;
        }
        self.pending.merge(outcome.writes);
        self.then.extend(outcome.then);
        let weights: Vec<u32> = self.plan.steps.iter().map(|s| s.weight).collect();
        self.record.progress = self.record.progress.max(progress(&weights, step, 100));
    }

    /// Whether the job should end before its next step, and why.
    fn called_off(&self) -> Option<JobFault> {
        // The deadline cancels the token too, so that the step stops early; only a request is a cancel.
        if let Some(request) = self.cancel_request() {
            return Some(JobFault::new("CANCELLED", format!("cancelled by {}", request.by)));
        }
        if Instant::now() >= self.deadline {
            return Some(JobFault::new("JOB_DEADLINE", "the job's deadline has passed"));
        }
        None
    }

    fn cancel_request(&self) -> Option<CancelRecord> {
        guard(&self.open.asked).by.clone()
    }

    /// Runs one step until it ends, or its time is up after a cancel, the deadline, or the daemon's stop.
    async fn perform(&mut self, step: usize) -> Result<Result<Outcome, JobFault>, Parked> {
        let context = self.context(step);
        let executor = Arc::clone(&self.engine.0.executor);
        let planned = self.plan.steps[step].clone();
        let bound = Duration::from_secs(self.engine.0.settings.cancel_bound_s);
        // In a task of its own, so that a panic in a step fails the step and not the run.
        let mut task = self.spawn(async move { executor.run(&planned, &context).await });
        let cancel = self.open.cancel.clone();
        let halt = self.engine.0.halt.clone();
        let called_off = async {
            tokio::select! {
                () = cancel.cancelled() => tokio::time::sleep(bound).await,
                () = tokio::time::sleep_until(self.deadline) => {
                    cancel.cancel();
                    tokio::time::sleep(bound).await;
                }
            }
        };
        tokio::select! {
            joined = &mut task => Ok(joined.unwrap_or_else(|error| Err(panic_fault(&error)))),
            () = called_off => {
                drop_step(&mut task).await;
                let why = self.called_off().unwrap_or_else(|| JobFault::new("JOB_DEADLINE", "time is up"));
                Ok(Err(why))
            }
            // The step may still end well within the drain time; its outcome is then written as usual.
            () = async { halt.cancelled().await; tokio::time::sleep(HALT_GRACE).await } => {
                drop_step(&mut task).await;
                Err(Parked)
            }
        }
    }

    /// A task that works for what the job works for, and logs as the job does.
    fn spawn<F>(&self, work: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        tokio::spawn(trace::scope(self.record.trace, work).instrument(tracing::Span::current()))
    }

    /// Takes back, in reverse order, what was done or may have been. Goes on after a failure.
    async fn backward(&mut self) -> Result<(), Parked> {
        let concerned = |step: &StepRecord| match step.state {
            StepState::Done | StepState::Intended => true,
            StepState::Failed => !step.error.as_ref().is_some_and(|e| e.no_effect),
            StepState::Pending | StepState::Undone | StepState::UndoFailed => false,
        };
        let steps: Vec<usize> = (0..self.plan.steps.len())
            .rev()
            .filter(|i| self.plan.steps[*i].undo && concerned(&self.record.steps[*i]))
            .collect();
        if steps.is_empty() {
            return Ok(());
        }
        self.record.state = JobState::Undoing;
        self.commit(true).await?;
        for step in steps {
            if self.engine.0.halt.is_cancelled() {
                return Err(Parked);
            }
            let mut context = self.context(step);
            // A cancel ends the way forward; the way back is not called off by it.
            context.cancelled = tokio_util::sync::CancellationToken::new();
            let executor = Arc::clone(&self.engine.0.executor);
            let planned = self.plan.steps[step].clone();
            let outcome = self.plan.outcomes[step].clone();
            let task = self.spawn(async move { executor.undo(&planned, outcome.as_ref(), &context).await });
            let abort = task.abort_handle();
            let result = match tokio::time::timeout(UNDO_BOUND, task).await {
                Ok(joined) => joined.unwrap_or_else(|error| Err(panic_fault(&error))),
                Err(_) => {
                    abort.abort();
                    Err(JobFault::new("TIMEOUT", format!("undo took more than {} s", UNDO_BOUND.as_secs())))
                }
            };
            match result {
                Ok(outcome) => {
                    self.record.steps[step].state = StepState::Undone;
                    self.pending.merge(outcome.writes);
                    self.then.extend(outcome.then);
                }
                Err(fault) => {
                    tracing::error!(step = self.record.steps[step].name, %fault, "undo failed");
                    self.record.steps[step].state = StepState::UndoFailed;
                    self.record.steps[step].error = Some(fault);
                }
            }
            self.commit(true).await?;
        }
        Ok(())
    }

    async fn end(&mut self, state: JobState) -> Result<(), Parked> {
        self.record.state = state;
        self.record.ended = Some(Timestamp::now());
        self.record.cancel = {
            let mut asked = guard(&self.open.asked);
            asked.ending = true;
            asked.by.clone()
        };
        if state == JobState::Succeeded {
            self.record.progress = 100;
        } else {
            self.record.result = None;
        }
        let id = self.record.id;
        self.pending.delete(&PLANS, &id);
        shelf::discard(id, &self.plan, &mut self.pending);
        if self.record.cancel.is_some() {
            self.pending.delete(&CANCELS, &id);
        }
        self.engine.0.executor.ended(&self.record, &mut self.pending);
        self.commit(false).await?;
        let last = self.record.clone();
        self.engine.finish(id, &self.open, last);
        Ok(())
    }

    /// Writes the record, the plan's outcomes if `plan`, and what is pending, in one transaction, for which the
    /// reserve of disk space may be used.
    async fn commit(&mut self, plan: bool) -> Result<(), Parked> {
        let mut txn = std::mem::take(&mut self.pending);
        txn.set_importance(Importance::Essential);
        self.commit_as(txn, plan).await.map(|_| ())
    }

    /// As `commit`, but not from the reserve. `Some`: the disk is full, and nothing was written.
    async fn commit_first(&mut self) -> Result<Option<JobFault>, Parked> {
        let txn = std::mem::take(&mut self.pending);
        let kept = txn.clone();
        let refused = self.commit_as(txn, true).await?;
        if refused.is_some() {
            self.pending = kept;
        }
        Ok(refused)
    }

    async fn commit_as(&mut self, txn: Txn, plan: bool) -> Result<Option<JobFault>, Parked> {
        let (children, progress) = {
            let live = self.open.record.borrow();
            (live.children.clone(), live.progress)
        };
        self.record.children = children;
        self.record.progress = self.record.progress.max(progress);
        if let Some(refused) = self.write(txn, plan).await? {
            return Ok(Some(refused));
        }
        for then in self.then.drain(..) {
            then();
        }
        if plan {
            self.publish();
        }
        Ok(None)
    }

    /// `changes` are what goes beside the record, and beside the plan if `plan`. Tries on for as long as the
    /// daemon lives, but for what is not essential: that a full disk refuses.
    async fn write(&mut self, changes: Txn, plan: bool) -> Result<Option<JobFault>, Parked> {
        let mut told = false;
        let mut stripped = false;
        loop {
            let id = self.record.id;
            let mut txn = changes.clone();
            txn.put(&JOBS, &id, &self.record);
            if plan {
                txn.put(&PLANS, &id, &shelf::light(&self.plan));
            }
            match self.engine.0.store.commit(txn).await {
                Ok(_) => return Ok(None),
                Err(StoreError::Closed) => return Err(Parked),
                Err(StoreError::DiskFull(why)) if changes.importance() == Importance::Normal => {
                    let text = format!("the disk is full: {why}; nothing was done");
                    return Ok(Some(JobFault::refusal("DISK_FULL", text)));
                }
                // Too large: what is for people only goes, and answers of a size that no step needs.
                Err(StoreError::Refused(why)) if !stripped => {
                    tracing::error!(why, "a job's record is too large; its texts are left out");
                    stripped = true;
                    self.record.params = serde_json::Value::Null;
                    self.record.result = None;
                    let large = |value: &serde_json::Value| value.to_string().len() > LARGE_ANSWER_BYTES;
                    self.plan.outcomes.iter_mut().for_each(|o| *o = o.take().filter(|value| !large(value)));
                }
                Err(error) => {
                    if !told {
                        tracing::error!(%error, "a job's record cannot be written; trying on");
                        told = true;
                    }
                    if self.engine.0.halt.is_cancelled() {
                        return Err(Parked);
                    }
                    tokio::time::sleep(COMMIT_RETRY).await;
                }
            }
        }
    }

    fn publish(&self) {
        let mut record = self.record.clone();
        self.open.record.send_modify(|live| {
            // These two are told from elsewhere meanwhile.
            record.children.clone_from(&live.children);
            record.progress = record.progress.max(live.progress);
            *live = Arc::new(record);
        });
    }

    fn context(&self, step: usize) -> StepContext {
        StepContext {
            job: self.record.id,
            verb: self.record.verb.clone(),
            caller: self.record.caller.clone(),
            step,
            resumed: self.in_doubt == Some(step),
            outcomes: Arc::new(self.plan.outcomes.clone()),
            cancelled: self.open.cancel.clone(),
            engine: self.engine.clone(),
        }
    }
}

/// How long a step may go on once the daemon stops.
const HALT_GRACE: Duration = Duration::from_secs(5);

/// Between two looks for children that are to be called off.
const CHILDREN_RECHECK: Duration = Duration::from_millis(200);

/// Drops a step in the midst, and waits until it is really gone: what comes next must not meet it. A step that
/// does not let go (it must not block) is not waited for.
async fn drop_step<T>(task: &mut tokio::task::JoinHandle<T>) {
    task.abort();
    let _ = tokio::time::timeout(Duration::from_secs(1), task).await;
}

fn panic_fault(error: &tokio::task::JoinError) -> JobFault {
    if error.is_panic() {
        tracing::error!(%error, "a step panicked");
        JobFault::new("INTERNAL", "the step failed in a way that was not foreseen; the log says more")
    } else {
        JobFault::new("INTERRUPTED", "the step was stopped")
    }
}

/// The job's progress when `step` is at `percent`: 100 is for success alone.
pub(super) fn progress(weights: &[u32], step: usize, percent: u8) -> u8 {
    let total: u64 = weights.iter().map(|w| u64::from(*w)).sum::<u64>().max(1);
    let before: u64 = weights.iter().take(step).map(|w| u64::from(*w)).sum();
    let own = weights.get(step).map_or(0, |w| u64::from(*w)) * u64::from(percent.min(100));
    u8::try_from((before * 100 + own) / total).unwrap_or(99).min(99)
}
