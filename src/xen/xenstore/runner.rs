//! The task that owns the connection: sends what it is asked, matches answers by their number, carries watch
//! events to their queues, and makes the connection anew when it breaks.
//!
//! It never waits for a caller: an answer goes to whoever still waits, a hint into a set that melts doubles. What
//! callers left behind (watches, transactions) it holds weakly and clears away.

use super::codec::{self, Decoder, Kind, Message};
use super::endpoint::{Connection, Endpoint};
use super::transaction::TransactionId;
use super::watch::{Hint, Queue};
use super::{Result, StoreError, WatchPath};
use bytes::{Buf, Bytes};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

/// Requests whose answer is still to come, the restoring of watches not counted; beyond that, callers wait.
const MAX_PENDING: usize = 1024;
/// Watches of all watchers of one connection.
const MAX_WATCHES: usize = 16_384;
/// A xenstored that owes answers and gives none for so many looks, one each [`LOOK_EVERY`], is given up. Longer than one
/// that is merely slow.
const STALL_LOOKS: u32 = 30;
const LOOK_EVERY: Duration = Duration::from_secs(1);
const FIRST_BACK_OFF: Duration = Duration::from_millis(50);
const MAX_BACK_OFF: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Answer {
    pub payload: Bytes,
    /// Which connection it came by.
    pub connection: u64,
}

pub(super) type Reply = oneshot::Sender<Result<Answer>>;

#[derive(Debug)]
pub(super) enum Command {
    Ask { kind: Kind, transaction: Option<TransactionId>, payload: Bytes, reply: Reply },
    Begin { held: Weak<()>, payload: Bytes, reply: Reply },
    Watch { path: WatchPath, token: u64, queue: Weak<Queue>, reply: Reply },
    Unwatch { token: u64, reply: Reply },
}

impl Command {
    fn refuse(self, error: StoreError) {
        let (Self::Ask { reply, .. }
        | Self::Begin { reply, .. }
        | Self::Watch { reply, .. }
        | Self::Unwatch { reply, .. }) = self;
        let _ = reply.send(Err(error));
    }
}

#[derive(Debug)]
struct Watch {
    path: WatchPath,
    queue: Weak<Queue>,
}

#[derive(Debug)]
pub(super) struct Runner {
    endpoint: Endpoint,
    commands: mpsc::Receiver<Command>,
    reap: Arc<Notify>,
    watches: HashMap<u64, Watch>,
    /// Connections made so far.
    connection: u64,
}

/// Why a connection ended.
pub(super) enum End {
    /// Nobody is left to ask anything.
    Stopped,
    /// `answered`: it gave answers before, so that one more try at once is reasonable.
    Broken { why: StoreError, answered: bool },
}

impl Runner {
    pub(super) fn new(endpoint: Endpoint, commands: mpsc::Receiver<Command>, reap: Arc<Notify>) -> Self {
        Self { endpoint, commands, reap, watches: HashMap::new(), connection: 0 }
    }

    pub(super) async fn run(mut self) {
        let mut back_off = FIRST_BACK_OFF;
        loop {
            let why = match self.endpoint.connect().await {
                Ok(connection) => {
                    self.connection += 1;
                    match Session::new(&mut self).run(connection).await {
                        End::Stopped => return,
                        End::Broken { why, answered: true } => {
                            tracing::warn!(%why, "the connection to XenStore broke");
                            back_off = FIRST_BACK_OFF;
                            continue;
                        }
                        End::Broken { why, answered: false } => why.to_string(),
                    }
                }
                Err(error) => error.to_string(),
            };
            if back_off == FIRST_BACK_OFF {
                tracing::warn!(why, "XenStore cannot be reached");
            }
            if !self.away(Instant::now() + back_off, &why).await {
                return;
            }
            back_off = MAX_BACK_OFF.min(back_off * 2);
        }
    }

    /// Answers callers that there is nobody, until it is time to try again. `false`: no caller is left.
    async fn away(&mut self, until: Instant, why: &str) -> bool {
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                command = self.commands.recv() => match command {
                    None => return false,
                    Some(Command::Unwatch { token, reply }) => {
                        self.watches.remove(&token);
                        let _ = reply.send(Ok(Answer { payload: Bytes::new(), connection: self.connection }));
                    }
                    Some(command) => command.refuse(StoreError::Unreachable(why.to_owned())),
                },
            }
        }
    }
}

/// What an answer is for.
#[derive(Debug)]
enum Purpose {
    Ask(Reply),
    Begin(Reply, Weak<()>),
    Watch(Reply, u64),
    /// A watch of the connection before.
    Restore(u64),
    /// Our own clearing away.
    Clear,
}

#[derive(Debug)]
struct Pending {
    kind: Kind,
    purpose: Purpose,
}

/// How long it has owed us answers and given none, in time in which we ran. A dom0 that was not run for a minute finds
/// its clock a minute on and no answer: its xenstored was not run either.
struct Silence {
    looks: u32,
    next: Instant,
}

impl Silence {
    fn new() -> Self {
        Self { looks: 0, next: Instant::now() + LOOK_EVERY }
    }

    /// Once `next` is there. Whether it is given up.
    fn look(&mut self) -> bool {
        self.looks += 1;
        self.next = Instant::now() + LOOK_EVERY;
        self.looks >= STALL_LOOKS
    }
}

/// One connection's life.
pub(super) struct Session<'a> {
    runner: &'a mut Runner,
    pending: HashMap<u32, Pending>,
    /// Requests that were sent whole and are not answered yet.
    under_way: usize,
    /// Whole messages, the first perhaps sent in part.
    out: VecDeque<Bytes>,
    transactions: Vec<(u32, Weak<()>)>,
    next_request: u32,
    restoring: usize,
    answered: bool,
    silence: Silence,
}

impl<'a> Session<'a> {
    pub(super) fn new(runner: &'a mut Runner) -> Self {
        Self {
            runner,
            pending: HashMap::new(),
            under_way: 0,
            out: VecDeque::new(),
            transactions: Vec::new(),
            next_request: 1,
            restoring: 0,
            answered: false,
            silence: Silence::new(),
        }
    }

    pub(super) async fn run(mut self, connection: Connection) -> End {
        self.restore_watches();
        let why = match self.serve(connection).await {
            Ok(()) => return End::Stopped,
            Err(why) => why,
        };
        for (_, pending) in std::mem::take(&mut self.pending) {
            match pending.purpose {
                Purpose::Ask(reply) | Purpose::Begin(reply, _) => drop(reply.send(Err(StoreError::Lost))),
                Purpose::Watch(reply, token) => {
                    self.runner.watches.remove(&token);
                    let _ = reply.send(Err(StoreError::Lost));
                }
                Purpose::Restore(_) | Purpose::Clear => {}
            }
        }
        End::Broken { why, answered: self.answered }
    }

    async fn serve(&mut self, connection: Connection) -> Result<()> {
        let (mut read, mut write) = tokio::io::split(connection.stream);
        let mut decoder = Decoder::default();
        loop {
            let room = self.pending.len() < MAX_PENDING + self.restoring;
            let waits = connection.one_at_a_time && self.under_way > 0;
            let first: &[u8] = self.out.front().filter(|_| !waits).map_or(&[], |message| message);
            tokio::select! {
                got = read.read_buf(decoder.buffer()) => {
                    if got.map_err(|_| StoreError::Lost)? == 0 {
                        return Err(StoreError::Lost);
                    }
                    while let Some(message) = decoder.next()? {
                        self.take(message)?;
                    }
                }
                sent = write.write(first), if !first.is_empty() => {
                    let sent = sent.map_err(|_| StoreError::Lost)?;
                    self.sent(sent);
                }
                command = self.runner.commands.recv(), if room => match command {
                    Some(command) => self.command(command)?,
                    None => return Ok(()),
                },
                () = self.runner.reap.notified() => self.reap()?,
                () = tokio::time::sleep_until(self.silence.next), if !self.pending.is_empty() => {
                    if self.silence.look() {
                        return Err(StoreError::Timeout);
                    }
                }
            }
        }
    }

    fn sent(&mut self, bytes: usize) {
        if let Some(first) = self.out.front_mut() {
            first.advance(bytes.min(first.len()));
            if first.is_empty() {
                self.under_way += 1;
                self.out.pop_front();
            }
        }
    }

    fn send(&mut self, kind: Kind, transaction: u32, payload: Bytes, purpose: Purpose) -> Result<()> {
        let request = self.next_request;
        let message = Message { kind, request, transaction, payload };
        self.out.push_back(message.encode()?);
        if self.pending.is_empty() {
            self.silence = Silence::new();
        }
        self.pending.insert(request, Pending { kind, purpose });
        // 0 is what watch events have. One that is still pending is passed over, when the numbers wrap.
        loop {
            self.next_request = self.next_request.checked_add(1).unwrap_or(1);
            if !self.pending.contains_key(&self.next_request) {
                return Ok(());
            }
        }
    }

    fn command(&mut self, command: Command) -> Result<()> {
        match command {
            // Whose deadline has passed wants nothing any more.
            Command::Ask { reply, .. } | Command::Begin { reply, .. } | Command::Watch { reply, .. }
                if reply.is_closed() =>
            {
                Ok(())
            }
            Command::Ask { kind, transaction, payload, reply } => {
                let connection = self.runner.connection;
                let number = match transaction {
                    Some(id) if id.connection != connection => {
                        let _ = reply.send(Err(StoreError::Lost));
                        return Ok(());
                    }
                    Some(id) => id.number,
                    None => 0,
                };
                if kind == Kind::TransactionEnd {
                    self.transactions.retain(|(open, _)| *open != number);
                }
                self.send(kind, number, payload, Purpose::Ask(reply))
            }
            Command::Begin { held, payload, reply } => {
                self.send(Kind::TransactionStart, 0, payload, Purpose::Begin(reply, held))
            }
            Command::Watch { reply, .. } if self.runner.watches.len() >= MAX_WATCHES => {
                let _ = reply.send(Err(StoreError::TooMany { what: "watches", max: MAX_WATCHES }));
                Ok(())
            }
            Command::Watch { path, token, queue, reply } => {
                let payload = watch_arguments(&path, token);
                self.runner.watches.insert(token, Watch { path, queue });
                self.send(Kind::Watch, 0, payload, Purpose::Watch(reply, token))
            }
            Command::Unwatch { token, reply } => match self.runner.watches.remove(&token) {
                Some(watch) => {
                    let payload = watch_arguments(&watch.path, token);
                    self.send(Kind::Unwatch, 0, payload, Purpose::Ask(reply))
                }
                None => {
                    let _ = reply.send(Err(StoreError::NotFound));
                    Ok(())
                }
            },
        }
    }

    fn take(&mut self, message: Message) -> Result<()> {
        if message.kind == Kind::WatchEvent {
            return self.event(&message.payload);
        }
        let Some(pending) = self.pending.remove(&message.request) else {
            return Err(StoreError::Garbled("an answer to nothing we asked"));
        };
        self.under_way = self.under_way.saturating_sub(1);
        self.silence = Silence::new();
        let answer = codec::answer(pending.kind, message);
        // Said to the caller, and the end of this connection: whatever comes next means nothing.
        let garbled = answer.as_ref().err().filter(|error| matches!(error, StoreError::Garbled(_))).cloned();
        self.answered |= garbled.is_none();
        self.deliver(pending.purpose, answer)?;
        garbled.map_or(Ok(()), Err)
    }

    fn deliver(&mut self, purpose: Purpose, answer: Result<Bytes>) -> Result<()> {
        let connection = self.runner.connection;
        let answer = answer.map(|payload| Answer { payload, connection });
        match purpose {
            Purpose::Ask(reply) => drop(reply.send(answer)),
            Purpose::Begin(reply, held) => {
                if let Ok(number) = answer.as_ref().map_err(|_| ()).and_then(|a| number(&a.payload)) {
                    self.transactions.push((number, held));
                }
                if reply.send(answer).is_err() {
                    self.reap()?;
                }
            }
            Purpose::Watch(reply, token) => {
                if answer.is_err() {
                    self.runner.watches.remove(&token);
                }
                let registered = answer.is_ok();
                if reply.send(answer).is_err() && registered {
                    self.unwatch(token)?;
                }
            }
            Purpose::Restore(token) => {
                if let Err(error) = answer {
                    let path = self.runner.watches.get(&token).map(|watch| watch.path.as_str());
                    tracing::warn!(%error, path, "a watch could not be made anew");
                }
                self.restoring -= 1;
                if self.restoring == 0 {
                    self.everything();
                }
            }
            Purpose::Clear => {}
        }
        Ok(())
    }

    /// An event of a watch that is gone meanwhile, or that is not ours (a device may be shared), says nothing.
    fn event(&mut self, payload: &[u8]) -> Result<()> {
        let (_, token) = codec::watch_event(payload)?;
        let token = super::number(token);
        if let Some(watch) = token.and_then(|token| self.runner.watches.get(&token))
            && let Some(queue) = watch.queue.upgrade()
        {
            queue.tell(Hint::At(watch.path.clone()));
        }
        Ok(())
    }

    fn restore_watches(&mut self) {
        self.runner.watches.retain(|_, watch| watch.queue.strong_count() > 0);
        let all: Vec<_> = self
            .runner
            .watches
            .iter()
            .map(|(token, watch)| (*token, watch_arguments(&watch.path, *token)))
            .collect();
        for (token, payload) in all {
            // Cannot be too large: it was sent before.
            if self.send(Kind::Watch, 0, payload, Purpose::Restore(token)).is_ok() {
                self.restoring += 1;
            }
        }
    }

    /// All watches stand again; what happened meanwhile nobody told.
    fn everything(&self) {
        for queue in self.runner.watches.values().filter_map(|watch| watch.queue.upgrade()) {
            queue.tell(Hint::Everything);
        }
    }

    fn unwatch(&mut self, token: u64) -> Result<()> {
        let Some(watch) = self.runner.watches.remove(&token) else { return Ok(()) };
        self.send(Kind::Unwatch, 0, watch_arguments(&watch.path, token), Purpose::Clear)
    }

    /// Clears away what nobody holds any more.
    fn reap(&mut self) -> Result<()> {
        let dead = |watch: &Watch| watch.queue.strong_count() == 0;
        let watches: Vec<u64> =
            self.runner.watches.iter().filter(|(_, watch)| dead(watch)).map(|(token, _)| *token).collect();
        for token in watches {
            self.unwatch(token)?;
        }
        let (held, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.transactions).into_iter().partition(|(_, held)| held.strong_count() > 0);
        self.transactions = held;
        for (number, _) in left {
            self.send(Kind::TransactionEnd, number, Bytes::from_static(b"F\0"), Purpose::Clear)?;
        }
        Ok(())
    }
}

fn number(payload: &[u8]) -> std::result::Result<u32, ()> {
    codec::number_answer(payload).map_err(|_| ())
}

fn watch_arguments(path: &WatchPath, token: u64) -> Bytes {
    codec::arguments(&[path.as_str(), &token.to_string()]).into()
}
