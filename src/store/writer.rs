//! The thread that alone writes: drains the queue and commits everything in it as one group.
//!
//! A caller takes one of a fixed number of places in the queue and waits if there is none; so the queue never
//! grows, and a burst slows its callers down instead. The thread takes what is queued, up to a bound, writes
//! it with one sync and answers each caller. Before each group it looks whether the disk has room. If the
//! engine fails, the group's callers are told, and the engine is opened again; until that works the store can
//! only be read as far as the engine still answers. The ledger has a thread of its own, which this one wakes.

use super::core::{Core, Numbers};
use super::engine::Engine;
use super::ledger::LedgerKeeper;
use super::options::{FaultPoint, FaultWhen};
use super::space::{Room, Space};
use super::table::{Importance, Op, Txn};
use super::witness::Witness;
use super::{Committed, Mode, StoreError};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Transactions that may wait.
const QUEUE: usize = 1024;
/// Transactions of one group: at this size the sync costs each of them next to nothing already.
const GROUP: usize = 256;
/// Bytes of one group.
const GROUP_BYTES: u64 = 1024 * 1024;
/// How often a store in trouble looks whether the trouble is over.
const TROUBLE_TICK: Duration = Duration::from_secs(1);

type Reply = oneshot::Sender<Result<Committed, StoreError>>;

enum Request {
    Commit { txn: Txn, reply: Reply, _place: OwnedSemaphorePermit },
    Close,
}

/// Opens the engine again after a failure.
pub(super) type Reopen = Box<dyn Fn() -> Result<(Box<dyn Engine>, Numbers), StoreError> + Send>;

/// The handle of the thread.
pub(super) struct Writer {
    places: Arc<Semaphore>,
    requests: Mutex<Sender<Request>>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// What the thread works with.
pub(super) struct WriterParts {
    pub core: Arc<Core>,
    pub space: Space,
    pub witness: Witness,
    pub ledger: LedgerKeeper,
    pub reopen: Reopen,
    pub fault: Option<FaultPoint>,
    /// Released when the thread ends.
    pub lock: super::open::FolderLock,
}

impl Writer {
    pub fn start(parts: WriterParts) -> Result<Self, std::io::Error> {
        let (requests, queue) = std::sync::mpsc::channel();
        let runner = Runner { parts, queue, broken: None, since_open: 0 };
        let thread =
            std::thread::Builder::new().name("store-writer".to_owned()).spawn(move || runner.run())?;
        Ok(Self {
            places: Arc::new(Semaphore::new(QUEUE)),
            requests: Mutex::new(requests),
            thread: Arc::new(Mutex::new(Some(thread))),
        })
    }

    pub async fn commit(&self, txn: Txn) -> Result<Committed, StoreError> {
        let place = self.places.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.send(Request::Commit { txn, reply, _place: place })?;
        answer.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Transactions that are queued or being written.
    pub fn waiting(&self) -> usize {
        QUEUE.saturating_sub(self.places.available_permits())
    }

    fn send(&self, request: Request) -> Result<(), StoreError> {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.send(request).map_err(|_| StoreError::Closed)
    }

    /// Everything queued before is written; then the thread ends.
    pub async fn close(&self) {
        // An error says that the thread has ended already.
        let _ = self.send(Request::Close);
        self.places.close();
        let thread = self.thread.clone();
        let joined = tokio::task::spawn_blocking(move || {
            let handle = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
            handle.map(JoinHandle::join)
        });
        if let Ok(Some(Err(_))) = joined.await {
            tracing::error!("the store's writer panicked");
        }
    }
}

struct Runner {
    parts: WriterParts,
    queue: Receiver<Request>,
    /// Why the engine is not there.
    broken: Option<StoreError>,
    since_open: u64,
}

impl Runner {
    fn run(mut self) {
        loop {
            let calm = *self.parts.core.mode.borrow() == Mode::Normal;
            let first = if calm {
                // Nothing to look after: sleep until someone comes, or until the last handle is gone.
                self.queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.queue.recv_timeout(TROUBLE_TICK)
            };
            match first {
                Ok(first) => {
                    if self.group(first) {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.look_after(0),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.parts.ledger.close();
        self.parts.witness.sync();
        drop(self.parts.core.take_engine(StoreError::Closed));
        self.parts.lock.release();
    }

    /// Takes what is queued and writes it. True if the store is to be closed.
    fn group(&mut self, first: Request) -> bool {
        let (mut txns, mut replies, mut places) = (Vec::new(), Vec::new(), Vec::new());
        let (mut bytes, mut next, mut closing) = (0, Some(first), false);
        while let Some(request) = next.take() {
            match request {
                Request::Close => {
                    closing = true;
                    break;
                }
                Request::Commit { txn, reply, _place } => {
                    bytes += weight(&txn);
                    txns.push(txn);
                    replies.push(reply);
                    places.push(_place);
                }
            }
            if txns.len() >= GROUP || bytes >= GROUP_BYTES {
                break;
            }
            next = self.queue.try_recv().ok();
        }
        if !txns.is_empty() {
            self.look_after(bytes);
            self.write(txns, replies);
        }
        closing
    }

    /// Brings the mode up to date with the disk and the engine.
    fn look_after(&mut self, about_to_write: u64) {
        if self.broken.is_some() {
            self.reopen();
        }
        let room = self.parts.space.room(about_to_write);
        let mode = match (&self.broken, room) {
            (Some(error), _) => Mode::ReadOnly { why: error.to_string() },
            (None, Room::Enough) => Mode::Normal,
            (None, Room::Low | Room::None) => Mode::LowSpace,
        };
        let changed =
            self.parts.core.mode.send_if_modified(|now| std::mem::replace(now, mode.clone()) != mode);
        if changed {
            tracing::warn!(?mode, "the store's mode changed");
        }
    }

    /// Writes those that may be written, in order, cut at the fault point.
    fn write(&mut self, txns: Vec<Txn>, replies: Vec<Reply>) {
        let room = self.parts.space.room(0);
        let mut group = Vec::with_capacity(txns.len());
        let mut waiting = Vec::with_capacity(replies.len());
        for (txn, reply) in txns.into_iter().zip(replies) {
            let refused = match (&self.broken, room, txn.importance) {
                (Some(StoreError::DiskFull(why)), ..) => Some(StoreError::DiskFull(why.clone())),
                (Some(error), ..) => Some(StoreError::ReadOnly(error.to_string())),
                (None, Room::Enough, _) | (None, Room::Low, Importance::Essential) => None,
                (None, Room::Low, Importance::Normal) => {
                    Some(StoreError::DiskFull("only the reserve for essential work is left".to_owned()))
                }
                (None, Room::None, _) => Some(StoreError::DiskFull("the reserve is used up too".to_owned())),
            };
            match refused {
                // A caller that has hung up need not be told.
                Some(error) => drop(reply.send(Err(error))),
                None => {
                    group.push(txn);
                    waiting.push(reply);
                }
            }
        }
        let cut = self.fault_in(group.len());
        if let Some((at, when)) = cut {
            let (rest, rest_waiting) = (group.split_off(at), waiting.split_off(at));
            self.commit(&group, waiting);
            if when == FaultWhen::After && !rest.is_empty() {
                // Its reply is never sent: nobody is told.
                let _ = self.parts.core.commit_group(&rest[..1]);
            }
            drop_dead();
            drop(rest_waiting);
            return;
        }
        self.commit(&group, waiting);
    }

    /// Whether one of the next `count` transactions is the one to die at: its place among them.
    fn fault_in(&mut self, count: usize) -> Option<(usize, FaultWhen)> {
        let before = self.since_open;
        self.since_open += count as u64;
        let fault = self.parts.fault?;
        let at = fault.at_commit.checked_sub(before + 1)?;
        usize::try_from(at).ok().filter(|at| *at < count).map(|at| (at, fault.when))
    }

    fn commit(&mut self, group: &[Txn], waiting: Vec<Reply>) {
        if group.is_empty() {
            return;
        }
        match self.parts.core.commit_group(group) {
            Ok(results) => {
                self.parts.witness.note(self.parts.core.numbers().commit);
                self.parts.ledger.committed(group);
                for (reply, result) in waiting.into_iter().zip(results) {
                    let _ = reply.send(result);
                }
            }
            Err(error) => self.failed(error, group, waiting),
        }
    }

    /// The engine failed in the midst of a group: open it again, and say what became of the group.
    fn failed(&mut self, error: StoreError, group: &[Txn], waiting: Vec<Reply>) {
        tracing::error!(%error, transactions = group.len(), "the store's engine failed");
        let before = self.parts.core.numbers().commit;
        self.broken = Some(error.clone());
        self.reopen();
        let untouched = self.broken.is_none() && self.parts.core.numbers().commit == before;
        if group.len() > 1 && untouched && matches!(error, StoreError::Damaged(_)) {
            // One of them touches a damaged row; the others need not suffer for it.
            for (txn, reply) in group.iter().zip(waiting) {
                self.commit(std::slice::from_ref(txn), vec![reply]);
            }
            return;
        }
        for reply in waiting {
            let _ = reply.send(Err(error.clone()));
        }
    }

    /// Puts a fresh engine in the failed one's place. What it then holds is what is on disk.
    fn reopen(&mut self) {
        // Waits for reads that are under way, each of one page; the folder's lock is ours, not the engine's.
        let why = self.broken.clone().unwrap_or(StoreError::Closed);
        drop(self.parts.core.take_engine(why));
        self.parts.space.make_room_to_open();
        match (self.parts.reopen)() {
            Ok((engine, numbers)) => {
                tracing::warn!(commit = numbers.commit, "the store's engine was opened again");
                self.parts.core.put_engine(engine, numbers);
                self.broken = None;
            }
            Err(error) => {
                tracing::error!(%error, "the store's engine could not be opened again");
                self.broken = Some(error);
            }
        }
    }
}

fn weight(txn: &Txn) -> u64 {
    let bytes = txn.ops.iter().map(|op| match op {
        Op::Put { key, value, .. } => key.len() + value.len(),
        Op::Delete { key, .. } => key.len(),
        Op::Append { value, .. } => value.len() + 8,
    });
    bytes.sum::<usize>() as u64
}

/// The crash of a crash test: no destructor, no flush, as when the power goes.
fn drop_dead() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}
