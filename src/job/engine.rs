//! The engine: acceptance, locks, the table of open jobs, cancel, wait, recovery, pruning. What happens inside
//! a running job is in `run`.
//!
//! Every change of the lock table and the table of open jobs happens under one mutex that is never held across
//! an await.

use super::lock::{LockTable, LockView, covers};
use super::record::{
    CancelRecord, JOBS, JobRecord, JobState, KEYS, PLANS, StepRecord, StepState, StoredKey, StoredPlan,
};
use super::recurring::RecurringTable;
use super::{Executor, Submission};
use crate::config;
use crate::model::{JobId, Timestamp};
use crate::store::{Key, Range, Store, StoreError, Table, Txn};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Cancels that were asked for and not yet carried out: durable, so that an answered `job_cancel` survives a
/// crash. A row goes with its job's terminal state.
pub(super) const CANCELS: Table<CancelRecord> = Table::new("job_cancel", 1);

/// Submissions with a key take one of these, so that two with the same key cannot both be new.
const KEY_STRIPES: usize = 64;

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

#[derive(Clone)]
pub struct Engine(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) executor: Arc<dyn Executor>,
    pub(super) settings: config::Jobs,
    pub(super) recurring: RecurringTable,
    state: Mutex<State>,
    keys: Vec<tokio::sync::Mutex<()>>,
    /// Told when the daemon stops: runners stop between steps, and what is in doubt is resumed at the next start.
    pub(super) halt: CancellationToken,
}

struct State {
    next: JobId,
    accepting: bool,
    /// Accepted or about to be.
    reserved: usize,
    open: HashMap<JobId, Arc<OpenJob>>,
    locks: LockTable,
    /// Hold their locks and wait for one of `max_running` places.
    ready: VecDeque<JobId>,
    running: usize,
}

pub(super) struct OpenJob {
    pub(super) record: watch::Sender<Arc<JobRecord>>,
    pub(super) cancel: CancellationToken,
    pub(super) cancelled_by: Mutex<Option<CancelRecord>>,
    pub(super) plan: Mutex<Option<StoredPlan>>,
    pub(super) essential: bool,
    /// Runs under its parent's locks and in its parent's place.
    child: bool,
    started: std::sync::atomic::AtomicBool,
}

impl OpenJob {
    fn new(record: JobRecord, plan: StoredPlan) -> Self {
        Self {
            child: record.parent.is_some(),
            essential: plan.essential,
            plan: Mutex::new(Some(plan)),
            record: watch::Sender::new(Arc::new(record)),
            cancel: CancellationToken::new(),
            cancelled_by: Mutex::new(None),
            started: false.into(),
        }
    }
}

/// A poisoned mutex means a panic in the few lines below that hold it; the table may be half changed, so going
/// on would risk two jobs on one object.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Engine {
    /// An engine on a store. Jobs left open by an earlier life are loaded, and run when [`Engine::resume`] is
    /// called. `floor`: no id below or at this is given (the ledger's mark, if the store was rebuilt).
    pub async fn open(
        store: Store,
        executor: Arc<dyn Executor>,
        settings: config::Jobs,
        floor: JobId,
    ) -> Result<Self, StoreError> {
        let last = store.last_key(JOBS.name).await?.map_or(0, |k| number(&k));
        let state = State {
            next: JobId(last.max(floor.0) + 1),
            accepting: true,
            reserved: 0,
            open: HashMap::new(),
            locks: LockTable::default(),
            ready: VecDeque::new(),
            running: 0,
        };
        let engine = Self(Arc::new(Inner {
            store,
            executor,
            settings,
            recurring: RecurringTable::default(),
            state: Mutex::new(state),
            keys: (0..KEY_STRIPES).map(|_| tokio::sync::Mutex::new(())).collect(),
            halt: CancellationToken::new(),
        }));
        engine.load_open().await?;
        Ok(engine)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        guard(&self.0.state)
    }

    async fn load_open(&self) -> Result<(), StoreError> {
        let plans = self.0.store.scan(&PLANS, Range::all()).await?;
        let mut jobs = Vec::new();
        for (key, plan) in plans {
            let id = JobId(number(&key));
            let Some(record) = self.0.store.get(&JOBS, &id).await? else {
                return Err(StoreError::Damaged(format!("job {id} has a plan and no record")));
            };
            let open = OpenJob::new(record, plan);
            if let Some(cancel) = self.0.store.get(&CANCELS, &id).await? {
                *guard(&open.cancelled_by) = Some(cancel);
                open.cancel.cancel();
            }
            jobs.push((id, Arc::new(open)));
        }
        let mut state = self.state();
        for (id, open) in jobs {
            state.reserved += 1;
            state.open.insert(id, open);
        }
        Ok(())
    }

    /// Lets the jobs of an earlier life go on, in their old order. Answers how many there are.
    pub fn resume(&self) -> usize {
        // Those that ran held their locks: they come first. Ids alone would not do, since a job may be on disk,
        // and run, before one with a lower id is.
        let queued = |open: &OpenJob| open.record.borrow().state == JobState::Queued;
        let mut jobs: Vec<(bool, JobId)> =
            self.state().open.iter().map(|(id, open)| (queued(open), *id)).collect();
        jobs.sort_unstable();
        let ids: Vec<JobId> = jobs.into_iter().map(|(_, id)| id).collect();
        for id in &ids {
            // A child is found again by its parent, which runs it under its own locks; it starts with it.
            let Some(open) = self.find_open(*id) else { continue };
            self.enter(*id, &open);
        }
        self.schedule();
        ids.len()
    }

    pub fn open_jobs(&self) -> usize {
        self.state().open.len()
    }

    pub(super) fn find_open(&self, id: JobId) -> Option<Arc<OpenJob>> {
        self.state().open.get(&id).cloned()
    }

    /// Accepts a job: when this returns, it is on disk and will reach a terminal state. With a known
    /// idempotency key it answers the job that has it.
    pub async fn submit(&self, submission: Submission) -> Result<JobId, SubmitError> {
        // In a task of its own: a caller that hangs up in the middle must not leave a job on disk that nobody runs.
        let engine = self.clone();
        tokio::spawn(async move { engine.accept(submission).await })
            .await
            .unwrap_or(Err(SubmitError::Stopping))
    }

    async fn accept(&self, submission: Submission) -> Result<JobId, SubmitError> {
        let digest = digest(&submission);
        let _stripe = match &submission.options.idempotency_key {
            None => None,
            Some(key) => {
                let stripe = crc32c::crc32c(key.as_bytes()) as usize % KEY_STRIPES;
                let held = self.0.keys[stripe].lock().await;
                if let Some(known) = self.0.store.get(&KEYS, key.as_str()).await? {
                    if known.digest == digest {
                        return Ok(known.job);
                    }
                    return Err(SubmitError::IdempotencyConflict { job: known.job });
                }
                Some(held)
            }
        };
        let id = self.reserve(&submission)?;
        let (record, plan) = self.first_record(id, submission);
        let mut txn = if plan.essential { Txn::essential() } else { Txn::new() };
        txn.put(&JOBS, &id, &record);
        txn.put(&PLANS, &id, &plan);
        if let Some(key) = &record.idempotency_key {
            txn.put(&KEYS, key.as_str(), &StoredKey { job: id, digest });
        }
        if let Err(error) = self.0.store.commit(txn).await {
            self.state().reserved -= 1;
            return Err(error.into());
        }
        let parent = record.parent;
        let open = Arc::new(OpenJob::new(record, plan));
        self.state().open.insert(id, Arc::clone(&open));
        if let Some(parent) = parent {
            self.note_child(parent, id);
        }
        self.enter(id, &open);
        self.schedule();
        Ok(id)
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
        }
        if state.reserved >= self.0.settings.max_open && !submission.options.essential {
            return Err(SubmitError::QueueFull { open: state.reserved });
        }
        state.reserved += 1;
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
            children: Vec::new(),
            idempotency_key: submission.options.idempotency_key,
            recurring: submission.options.recurring,
            cancel: None,
            fault: None,
            result: None,
            progress: 0,
        };
        let outcomes = vec![None; submission.steps.len()];
        (record, StoredPlan { steps: submission.steps, outcomes, essential: submission.options.essential })
    }

    /// Into the lock queues, and if it holds all its locks, among the ready. A child runs at once.
    fn enter(&self, id: JobId, open: &Arc<OpenJob>) {
        if open.child {
            open.started.store(true, std::sync::atomic::Ordering::SeqCst);
            self.spawn_run(id, Arc::clone(open));
            return;
        }
        let locks = open.record.borrow().locks.clone();
        let mut state = self.state();
        if state.locks.enqueue(id, &locks) {
            state.ready.push_back(id);
        }
    }

    /// Starts ready jobs while there are places.
    pub(super) fn schedule(&self) {
        loop {
            let next = {
                let mut state = self.state();
                if state.running >= self.0.settings.max_running || self.0.halt.is_cancelled() {
                    return;
                }
                let Some(id) = state.ready.pop_front() else { return };
                let Some(open) = state.open.get(&id).cloned() else { continue };
                open.started.store(true, std::sync::atomic::Ordering::SeqCst);
                state.running += 1;
                (id, open)
            };
            self.spawn_run(next.0, next.1);
        }
    }

    fn spawn_run(&self, id: JobId, open: Arc<OpenJob>) {
        let engine = self.clone();
        tokio::spawn(async move { super::run::run(engine, id, open).await });
    }

    /// The end of a job's run: locks go on to the next, then everybody who waits for the job hears of it.
    pub(super) fn finish(&self, id: JobId, open: &OpenJob, last: JobRecord) {
        {
            let mut state = self.state();
            let granted = state.locks.release(id);
            state.ready.extend(granted);
            state.open.remove(&id);
            state.reserved -= 1;
            if !open.child && open.started.load(std::sync::atomic::Ordering::SeqCst) {
                state.running -= 1;
            }
        }
        open.record.send_replace(Arc::new(last));
        self.schedule();
    }

    /// Asks a job to end. Answers `false` if it has ended already or never was. The request is on disk when this
    /// returns; the job ends within the step's bound, or at once if it was not running.
    pub async fn cancel(&self, id: JobId, by: &str) -> Result<bool, StoreError> {
        let Some(open) = self.find_open(id) else { return Ok(false) };
        let request = CancelRecord { by: by.to_owned(), at: Timestamp::now() };
        let mut txn = Txn::essential();
        txn.put(&CANCELS, &id, &request);
        self.0.store.commit(txn).await?;
        guard(&open.cancelled_by).get_or_insert(request);
        open.cancel.cancel();
        match self.take_unstarted(id, &open) {
            Cancelled::Started => Ok(true),
            Cancelled::Unstarted => {
                self.spawn_run(id, open);
                self.schedule();
                Ok(true)
            }
            Cancelled::Gone => {
                let mut txn = Txn::essential();
                txn.delete(&CANCELS, &id);
                self.0.store.commit(txn).await?;
                Ok(false)
            }
        }
    }

    /// A job that waits is taken out of its queues, so that its run, which only ends it, waits for nothing.
    fn take_unstarted(&self, id: JobId, open: &OpenJob) -> Cancelled {
        let mut state = self.state();
        if !state.open.contains_key(&id) {
            return Cancelled::Gone;
        }
        if open.started.swap(true, std::sync::atomic::Ordering::SeqCst) {
            return Cancelled::Started;
        }
        state.ready.retain(|j| *j != id);
        let granted = state.locks.release(id);
        state.ready.extend(granted);
        state.running += 1;
        Cancelled::Unstarted
    }

    /// A job's record: live if it is open, else from history.
    pub async fn get(&self, id: JobId) -> Result<Option<Arc<JobRecord>>, StoreError> {
        if let Some(open) = self.find_open(id) {
            let record = Arc::clone(&open.record.borrow());
            return Ok(Some(record));
        }
        Ok(self.0.store.get(&JOBS, &id).await?.map(Arc::new))
    }

    /// Waits until a job has ended, at most `timeout`. Answers its record as it then is.
    pub async fn wait(&self, id: JobId, timeout: Duration) -> Result<Option<Arc<JobRecord>>, StoreError> {
        if let Some(open) = self.find_open(id) {
            let mut watch = open.record.subscribe();
            let ended = watch.wait_for(|r| r.state.is_terminal());
            tokio::select! {
                record = ended => if let Ok(record) = record {
                    return Ok(Some(Arc::clone(&record)));
                },
                () = tokio::time::sleep(timeout) => {}
                // The daemon stops: whoever waits is told so while there is time.
                () = self.stopping() => {}
            }
        }
        self.get(id).await
    }

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

    /// Ends when the daemon has begun to stop.
    pub async fn stopping(&self) {
        self.0.halt.cancelled().await;
    }

    pub fn is_stopping(&self) -> bool {
        self.0.halt.is_cancelled()
    }

    pub fn locks(&self) -> Vec<LockView> {
        self.state().locks.view()
    }

    /// Whether a job holds this object or waits for it.
    pub fn is_claimed(&self, object: &str) -> bool {
        self.state().locks.is_claimed(object)
    }

    /// See [`LockTable::waiting_for`].
    pub fn waiting_for(&self, id: JobId) -> Vec<(String, JobId)> {
        self.state().locks.waiting_for(id)
    }

    pub(super) fn note_progress(&self, id: JobId, step: usize, percent: u8) {
        let Some(open) = self.find_open(id) else { return };
        let weights: Vec<u32> = match &*guard(&open.plan) {
            Some(plan) => plan.steps.iter().map(|s| s.weight).collect(),
            None => return,
        };
        let progress = super::run::progress(&weights, step, percent);
        open.record.send_if_modified(|record| {
            let changed = record.progress != progress && !record.state.is_terminal();
            if changed {
                Arc::make_mut(record).progress = progress;
            }
            changed
        });
    }

    fn note_child(&self, parent: JobId, child: JobId) {
        if let Some(open) = self.find_open(parent) {
            open.record.send_modify(|record| Arc::make_mut(record).children.push(child));
        }
    }

    /// No new jobs; running ones stop after their step. Waits until none runs, at most `timeout`. What is then
    /// still running is left in doubt on disk, and resumed at the next start.
    pub async fn halt(&self, timeout: Duration) {
        self.state().accepting = false;
        self.0.halt.cancel();
        let idle = async {
            while self.state().running > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(timeout, idle).await;
    }

    /// A runner that stopped because the daemon stops.
    pub(super) fn parked(&self, open: &OpenJob) {
        if !open.child {
            self.state().running -= 1;
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

/// How far a job was when its cancel came.
enum Cancelled {
    Gone,
    Started,
    Unstarted,
}

fn matches(listing: &Listing, record: &JobRecord) -> bool {
    listing.state.is_none_or(|s| s == record.state)
        && listing.verb.as_ref().is_none_or(|v| *v == record.verb)
        && listing.object.as_ref().is_none_or(|o| record.locks.iter().any(|l| l.object == *o))
}

/// What an idempotency key stands for: the verb and its parameters as kept.
fn digest(submission: &Submission) -> u32 {
    let text = format!("{} {}", submission.verb, submission.params);
    crc32c::crc32c(text.as_bytes())
}

/// The jobs from `from` to before `end`.
fn below(from: u64, end: u64) -> Range {
    Range { from: std::ops::Bound::Included(from.bytes()), ..Range::before(end.bytes()) }
}

/// The number a key of eight big-endian bytes stands for; 0 for any other key, which our tables do not have.
pub(super) fn number(key: &[u8]) -> u64 {
    key.try_into().map_or(0, u64::from_be_bytes)
}
