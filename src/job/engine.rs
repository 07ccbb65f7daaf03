//! The engine: locks, the table of open jobs, cancel, wait, recovery, pruning. What happens inside
//! a running job is in `run`.
//!
//! Every change of the lock table and the table of open jobs happens under one mutex that is never held across
//! an await.

use super::Executor;
use super::accept::KEY_STRIPES;
use super::figures::Tally;
use super::lock::{LockTable, LockView};
use super::record::{CancelRecord, JOBS, JobRecord, JobState, PLANS, StoredPlan};
use super::recurring::RecurringTable;
use crate::config;
use crate::model::{JobId, Timestamp};
use crate::store::{Range, Store, StoreError, Table, Txn};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Cancels that were asked for and not yet carried out: durable, so that an answered `job_cancel` survives a
/// crash. A row goes with its job's terminal state.
pub(super) const CANCELS: Table<CancelRecord> = Table::new("job_cancel", 1);

#[derive(Clone)]
pub struct Engine(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) digest_key: ring::hmac::Key,
    pub(super) store: Store,
    pub(super) executor: Arc<dyn Executor>,
    pub(super) settings: config::Jobs,
    pub(super) recurring: RecurringTable,
    pub(super) tally: Tally,
    state: Mutex<State>,
    pub(super) keys: Vec<tokio::sync::Mutex<()>>,
    /// Told when the daemon stops: runners stop between steps, and what is in doubt is resumed at the next start.
    pub(super) halt: CancellationToken,
    /// A queued job's deadline is now the first.
    sooner: Arc<Notify>,
}

pub(super) struct State {
    pub(super) next: JobId,
    pub(super) accepting: bool,
    /// Accepted or about to be.
    pub(super) reserved: usize,
    pub(super) open: HashMap<JobId, Arc<OpenJob>>,
    pub(super) locks: LockTable,
    /// Hold their locks and wait for one of `max_running` places.
    ready: VecDeque<JobId>,
    /// Hold their locks and need no place: what is essential is not kept waiting by what is not.
    urgent: VecDeque<JobId>,
    running: usize,
    /// When to end those that still wait. Whoever starts leaves it.
    deadlines: BTreeSet<(Instant, JobId)>,
}

impl State {
    /// These hold all their locks now.
    fn make_ready(&mut self, jobs: impl IntoIterator<Item = JobId>) {
        for id in jobs {
            let essential = self.open.get(&id).is_some_and(|open| open.essential);
            if essential { &mut self.urgent } else { &mut self.ready }.push_back(id);
        }
    }
}

pub(super) struct OpenJob {
    pub(super) record: watch::Sender<Arc<JobRecord>>,
    pub(super) cancel: CancellationToken,
    pub(super) asked: Mutex<Asked>,
    pub(super) plan: Mutex<Option<StoredPlan>>,
    pub(super) essential: bool,
    /// On tokio's clock, which no step of the machine's clock moves.
    pub(super) deadline: Instant,
    /// Runs under its parent's locks and in its parent's place.
    parent: Option<JobId>,
    pub(super) family: watch::Sender<Family>,
    pub(super) started: AtomicBool,
}

/// Whether a job's end was asked for.
#[derive(Default)]
pub(super) struct Asked {
    pub(super) by: Option<CancelRecord>,
    /// The terminal record is being written: a cancel comes too late.
    pub(super) ending: bool,
}

/// A job's children that run under its locks: it does not let go of them before the last has ended.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Family {
    pub(super) open: usize,
    /// No more are taken.
    pub(super) closed: bool,
}

impl OpenJob {
    pub(super) fn new(record: JobRecord, plan: StoredPlan, deadline: Instant) -> Self {
        Self {
            parent: record.parent,
            essential: plan.essential,
            plan: Mutex::new(Some(plan)),
            deadline,
            record: watch::Sender::new(Arc::new(record)),
            cancel: CancellationToken::new(),
            asked: Mutex::default(),
            family: watch::Sender::new(Family::default()),
            started: AtomicBool::new(false),
        }
    }

    /// Whether nothing of it was done yet, in this life or an earlier one, so that it can end without its locks.
    fn is_untouched(&self) -> bool {
        self.record.borrow().state == JobState::Queued
    }
}

/// A poisoned mutex means a panic in the few lines below that hold it; the table may be half changed, so going
/// on would risk two jobs on one object.
pub(super) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
            urgent: VecDeque::new(),
            running: 0,
            deadlines: BTreeSet::new(),
        };
        let digest_key = super::accept::digest_key(&store).await?;
        let engine = Self(Arc::new(Inner {
            digest_key,
            store,
            executor,
            settings,
            recurring: RecurringTable::default(),
            tally: Tally::default(),
            state: Mutex::new(state),
            keys: (0..KEY_STRIPES).map(|_| tokio::sync::Mutex::new(())).collect(),
            halt: CancellationToken::new(),
            sooner: Arc::new(Notify::new()),
        }));
        engine.load_open().await?;
        tokio::spawn(watch_deadlines(Arc::downgrade(&engine.0), Arc::clone(&engine.0.sooner)));
        Ok(engine)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        guard(&self.0.state)
    }

    async fn load_open(&self) -> Result<(), StoreError> {
        let plans = self.0.store.scan(&PLANS, Range::all()).await?;
        let mut jobs = Vec::new();
        for (key, mut plan) in plans {
            let id = JobId(number(&key));
            super::shelf::fetch(&self.0.store, id, &mut plan).await?;
            let Some(record) = self.0.store.get(&JOBS, &id).await? else {
                return Err(StoreError::Damaged(format!("job {id} has a plan and no record")));
            };
            let left = Duration::from_millis(record.deadline.0.saturating_sub(Timestamp::now().0));
            jobs.push((id, Arc::new(OpenJob::new(record, plan, Instant::now() + left))));
        }
        {
            let mut state = self.state();
            for (id, open) in &jobs {
                state.reserved += 1;
                state.open.insert(*id, Arc::clone(open));
            }
        }
        for (id, open) in &jobs {
            if let Some(parent) = open.parent {
                self.family_of(parent, |family| family.open += 1);
                self.note_child(parent, *id);
            }
        }
        self.load_cancels().await
    }

    /// Cancels that were answered and not carried out. One whose job has ended meanwhile came too late.
    async fn load_cancels(&self) -> Result<(), StoreError> {
        let mut late = Txn::essential();
        for (key, request) in self.0.store.scan(&CANCELS, Range::all()).await? {
            let id = JobId(number(&key));
            match self.find_open(id) {
                Some(open) => {
                    guard(&open.asked).by = Some(request);
                    open.cancel.cancel();
                }
                None => late.delete(&CANCELS, &id),
            }
        }
        if !late.is_empty()
            && let Err(error) = self.0.store.commit(late).await
        {
            // Nothing is wrong with them but that they take room.
            tracing::warn!(%error, "cancels that came too late were not deleted");
        }
        Ok(())
    }

    /// Lets the jobs of an earlier life go on. Answers how many there are.
    ///
    /// Those that had begun come first: they held their locks together when that life ended, and nobody may get
    /// in between. The rest follow in their old order.
    pub fn resume(&self) -> usize {
        let mut jobs: Vec<(bool, JobId, Arc<OpenJob>)> = {
            let state = self.state();
            state.open.iter().map(|(id, open)| (open.is_untouched(), *id, Arc::clone(open))).collect()
        };
        jobs.sort_unstable_by_key(|(untouched, id, _)| (*untouched, *id));
        for (_, id, open) in &jobs {
            self.enter(*id, open);
            if guard(&open.asked).by.is_some() {
                self.end_waiting(*id, open);
            }
        }
        self.schedule();
        jobs.len()
    }

    pub fn open_jobs(&self) -> usize {
        self.state().open.len()
    }

    pub(super) fn find_open(&self, id: JobId) -> Option<Arc<OpenJob>> {
        self.state().open.get(&id).cloned()
    }

    /// Into the table of open jobs and the lock queues, and if it holds all its locks, among the ready. A child
    /// runs at once. All in one moment: a cancel finds the job either not yet or in its queues.
    pub(super) fn enter(&self, id: JobId, open: &Arc<OpenJob>) {
        let locks = open.record.borrow().locks.clone();
        {
            let mut state = self.state();
            state.open.insert(id, Arc::clone(open));
            if open.parent.is_none() {
                if state.locks.enqueue(id, &locks) {
                    state.make_ready([id]);
                }
                if open.is_untouched() {
                    let entry = (open.deadline, id);
                    state.deadlines.insert(entry);
                    if state.deadlines.first() == Some(&entry) {
                        self.0.sooner.notify_one();
                    }
                }
                return;
            }
            open.started.store(true, Ordering::SeqCst);
        }
        self.spawn_run(id, Arc::clone(open));
    }

    /// Starts ready jobs while there are places.
    pub(super) fn schedule(&self) {
        loop {
            let next = {
                let mut state = self.state();
                if self.0.halt.is_cancelled() {
                    return;
                }
                let place = state.running < self.0.settings.max_running;
                let next = state.urgent.pop_front();
                let Some(id) = next.or_else(|| if place { state.ready.pop_front() } else { None }) else {
                    return;
                };
                let Some(open) = state.open.get(&id).cloned() else { continue };
                open.started.store(true, Ordering::SeqCst);
                state.deadlines.remove(&(open.deadline, id));
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
        self.0.tally.ended(&last);
        {
            let mut state = self.state();
            let granted = state.locks.release(id);
            state.make_ready(granted);
            state.open.remove(&id);
            state.reserved -= 1;
            if open.parent.is_none() {
                state.running -= 1;
            }
        }
        if let Some(parent) = open.parent {
            self.family_of(parent, |family| family.open -= 1);
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
        let in_time = {
            let mut asked = guard(&open.asked);
            if !asked.ending {
                asked.by.get_or_insert(request);
            }
            !asked.ending
        };
        if !in_time {
            let mut txn = Txn::essential();
            txn.delete(&CANCELS, &id);
            self.0.store.commit(txn).await?;
            return Ok(false);
        }
        open.cancel.cancel();
        self.end_waiting(id, &open);
        Ok(true)
    }

    /// A job that waits and has done nothing is taken out of its queues: its run, which only ends it, waits for
    /// nothing. One that an earlier life had begun needs its locks to take back what it did.
    pub(super) fn end_waiting(&self, id: JobId, open: &Arc<OpenJob>) {
        {
            let mut state = self.state();
            if !state.open.contains_key(&id)
                || !open.is_untouched()
                || open.started.swap(true, Ordering::SeqCst)
            {
                return;
            }
            state.ready.retain(|j| *j != id);
            state.urgent.retain(|j| *j != id);
            state.deadlines.remove(&(open.deadline, id));
            let granted = state.locks.release(id);
            state.make_ready(granted);
            state.running += 1;
        }
        self.spawn_run(id, Arc::clone(open));
        self.schedule();
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
        self.wait_until(id, timeout, |record| record.state.is_terminal()).await
    }

    /// Waits until an open job's record is so, or the job has ended, at most `timeout`. Answers its record as it then is.
    pub async fn wait_until(
        &self,
        id: JobId,
        timeout: Duration,
        is_so: impl Fn(&JobRecord) -> bool,
    ) -> Result<Option<Arc<JobRecord>>, StoreError> {
        if let Some(open) = self.find_open(id) {
            let mut watch = open.record.subscribe();
            let waited = watch.wait_for(|record| record.state.is_terminal() || is_so(record));
            tokio::select! {
                record = waited => if let Ok(record) = record {
                    return Ok(Some(Arc::clone(&record)));
                },
                () = tokio::time::sleep(timeout) => {}
                // The daemon stops: whoever waits is told so while there is time.
                () = self.stopping() => {}
            }
        }
        self.get(id).await
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
            let changed = record.progress < progress && record.state == JobState::Running;
            if changed {
                Arc::make_mut(record).progress = progress;
            }
            changed
        });
    }

    pub(super) fn note_child(&self, parent: JobId, child: JobId) {
        let Some(open) = self.find_open(parent) else { return };
        open.record.send_if_modified(|record| {
            let new = !record.children.contains(&child);
            if new {
                Arc::make_mut(record).children.push(child);
            }
            new
        });
    }

    pub(super) fn family_of(&self, parent: JobId, change: impl FnOnce(&mut Family)) {
        if let Some(open) = self.find_open(parent) {
            open.family.send_modify(change);
        }
    }

    /// Children are taken again.
    pub(super) fn open_family(&self, open: &OpenJob) {
        let _state = self.state();
        open.family.send_modify(|family| family.closed = false);
    }

    /// No child is taken from now on.
    pub(super) fn close_family(&self, open: &OpenJob) {
        let _state = self.state();
        open.family.send_modify(|family| family.closed = true);
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
        if open.parent.is_none() {
            self.state().running -= 1;
        }
    }
}

/// Ends jobs whose deadline passes while they wait.
async fn watch_deadlines(inner: Weak<Inner>, sooner: Arc<Notify>) {
    loop {
        let (first, halt) = {
            let Some(inner) = inner.upgrade() else { return };
            let first = guard(&inner.state).deadlines.first().copied();
            (first, inner.halt.clone())
        };
        let passed = async {
            match first {
                Some((at, _)) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = passed => {}
            () = sooner.notified() => continue,
            () = halt.cancelled() => return,
        }
        let (Some(inner), Some((at, id))) = (inner.upgrade(), first) else { return };
        let engine = Engine(inner);
        engine.state().deadlines.remove(&(at, id));
        if let Some(open) = engine.find_open(id) {
            engine.end_waiting(id, &open);
        }
    }
}

/// The number a key of eight big-endian bytes stands for; 0 for any other key, which our tables do not have.
pub(super) fn number(key: &[u8]) -> u64 {
    key.try_into().map_or(0, u64::from_be_bytes)
}
