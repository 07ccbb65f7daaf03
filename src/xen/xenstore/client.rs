//! What callers hold: requests with a deadline each, answered in any order. Cheap to clone; when the last clone
//! and the last watcher are gone, the connection is closed.

use super::codec::{self, Kind};
use super::runner::{Answer, Command, Reply, Runner};
use super::transaction::{self, Transaction, TransactionId};
use super::{Endpoint, Permission, Refusal, Result, StorePath, StoreRead, Watcher, perms};
use super::{MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES, StoreError};
use crate::xen::DomId;
use async_trait::async_trait;
use bytes::Bytes;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

/// Commands on their way to the runner; beyond that callers wait, until their deadline.
const QUEUE: usize = 256;

/// What all clones, transactions and watchers of one connection share.
#[derive(Debug)]
pub(super) struct Shared {
    commands: mpsc::Sender<Command>,
    reap: Arc<Notify>,
    timeout: Duration,
    tokens: AtomicU64,
}

impl Shared {
    pub(super) fn new_token(&self) -> u64 {
        self.tokens.fetch_add(1, Ordering::Relaxed)
    }

    /// A watcher or a transaction is gone: the runner has something to clear away.
    pub(super) fn reap(&self) {
        self.reap.notify_one();
    }

    pub(super) async fn command(&self, command: impl FnOnce(Reply) -> Command) -> Result<Answer> {
        self.command_until(Instant::now() + self.timeout, command).await
    }

    async fn command_until(&self, until: Instant, command: impl FnOnce(Reply) -> Command) -> Result<Answer> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            let stopped = || StoreError::Unreachable("the client has stopped".to_owned());
            self.commands.send(command(reply)).await.map_err(|_| stopped())?;
            answer.await.map_err(|_| StoreError::Lost)?
        };
        tokio::time::timeout_at(until, asked).await.map_err(|_| StoreError::Timeout)?
    }
}

/// The tree, seen from outside or from within a transaction.
#[derive(Debug, Clone)]
pub struct Nodes {
    shared: Arc<Shared>,
    transaction: Option<TransactionId>,
}

impl Nodes {
    pub(super) fn within(&self, transaction: TransactionId) -> Self {
        Self { shared: Arc::clone(&self.shared), transaction: Some(transaction) }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Sends one request. One that only reads is asked again when the connection broke before its answer.
    pub(super) async fn ask(&self, kind: Kind, payload: Vec<u8>) -> Result<Answer> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(StoreError::TooLarge(payload.len()));
        }
        let (payload, transaction) = (Bytes::from(payload), self.transaction);
        let until = Instant::now() + self.shared.timeout;
        loop {
            let payload = payload.clone();
            let command = |reply| Command::Ask { kind, transaction, payload, reply };
            match self.shared.command_until(until, command).await {
                Err(StoreError::Lost) if kind.only_reads() && transaction.is_none() => {}
                answer => return answer,
            }
        }
    }

    async fn ask_path(&self, kind: Kind, path: &StorePath) -> Result<Bytes> {
        Ok(self.ask(kind, codec::arguments(&[path.as_str()])).await?.payload)
    }

    /// A node's value; `None` where there is no such node.
    pub async fn get(&self, path: &StorePath) -> Result<Option<Vec<u8>>> {
        match self.ask_path(Kind::Read, path).await {
            Ok(value) => Ok(Some(value.into())),
            Err(StoreError::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names of a node's children; none where there is no such node.
    pub async fn children(&self, path: &StorePath) -> Result<Vec<String>> {
        match self.ask_path(Kind::Directory, path).await {
            Ok(names) => Ok(codec::names(&names)),
            Err(StoreError::NotFound) => Ok(Vec::new()),
            Err(StoreError::Refused(Refusal::TooBig)) => self.children_in_parts(path).await,
            Err(error) => Err(error),
        }
    }

    /// More names than fit into one answer come in parts, each with the generation of the list; when it changes
    /// in between, we begin again.
    async fn children_in_parts(&self, path: &StorePath) -> Result<Vec<String>> {
        let until = Instant::now() + self.shared.timeout;
        let (mut list, mut generation) = (Vec::new(), None);
        while Instant::now() < until {
            let offset = list.len().to_string();
            let answer = self.ask(Kind::DirectoryPart, codec::arguments(&[path.as_str(), &offset])).await;
            let part = match answer {
                Ok(answer) => answer.payload,
                Err(StoreError::NotFound) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            };
            let cut = part.iter().position(|byte| *byte == 0);
            let cut = cut.ok_or(StoreError::Garbled("a part of a list without generation"))?;
            let (now, names) = (part.slice(..cut), &part[cut + 1..]);
            if generation.as_ref().is_some_and(|before| *before != now) {
                (list, generation) = (Vec::new(), None);
                continue;
            }
            generation = Some(now);
            // An empty name stands at the end of the whole list.
            let last = names == [0] || names.ends_with(&[0, 0]);
            if names.is_empty() {
                return Err(StoreError::Garbled("a part of a list with nothing in it"));
            }
            list.extend_from_slice(&names[..names.len() - usize::from(last)]);
            if last {
                return Ok(codec::names(&list));
            }
            if list.len() > MAX_ANSWER_BYTES {
                return Err(StoreError::TooMany { what: "bytes of names", max: MAX_ANSWER_BYTES });
            }
        }
        Err(StoreError::Timeout)
    }

    /// Writes a value, and makes the node and those above it where they are missing.
    pub async fn set(&self, path: &StorePath, value: &[u8]) -> Result<()> {
        let mut payload = codec::arguments(&[path.as_str()]);
        payload.extend_from_slice(value);
        self.ask(Kind::Write, payload).await.map(drop)
    }

    /// Makes an empty node, and those above it, where they are missing.
    pub async fn make(&self, path: &StorePath) -> Result<()> {
        self.ask_path(Kind::Mkdir, path).await.map(drop)
    }

    /// Removes a node with all below it; nothing where there is none.
    pub async fn remove(&self, path: &StorePath) -> Result<()> {
        match self.ask_path(Kind::Rm, path).await {
            Ok(_) | Err(StoreError::NotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub async fn permissions(&self, path: &StorePath) -> Result<Vec<Permission>> {
        perms::decode(&self.ask_path(Kind::GetPerms, path).await?)
    }

    pub async fn set_permissions(&self, path: &StorePath, permissions: &[Permission]) -> Result<()> {
        let mut payload = codec::arguments(&[path.as_str()]);
        payload.extend(perms::encode(permissions));
        self.ask(Kind::SetPerms, payload).await.map(drop)
    }
}

/// A connection to XenStore.
#[derive(Debug, Clone)]
pub struct Client {
    nodes: Nodes,
}

impl Deref for Client {
    type Target = Nodes;
    fn deref(&self) -> &Nodes {
        &self.nodes
    }
}

impl Client {
    /// Connects in the background, and again whenever the connection breaks. Each call ends within `timeout`.
    /// Must be called within a tokio runtime.
    pub fn start(endpoint: Endpoint, timeout: Duration) -> Self {
        let (commands, queue) = mpsc::channel(QUEUE);
        let reap = Arc::new(Notify::new());
        tokio::spawn(Runner::new(endpoint, queue, Arc::clone(&reap)).run());
        let shared = Shared { commands, reap, timeout, tokens: AtomicU64::new(0) };
        Self { nodes: Nodes { shared: Arc::new(shared), transaction: None } }
    }

    /// Whether the domain lives in XenStore's eyes: it was introduced, and has not gone.
    pub async fn is_introduced(&self, domain: DomId) -> Result<bool> {
        let payload = codec::arguments(&[&domain.0.to_string()]);
        let answer = self.ask(Kind::IsDomainIntroduced, payload).await?.payload;
        match answer.first() {
            Some(b'T') => Ok(true),
            Some(b'F') => Ok(false),
            _ => Err(StoreError::Garbled("neither T nor F")),
        }
    }

    /// The domain's home, `/local/domain/<domid>`. It is told whether or not there is such a domain.
    pub async fn domain_path(&self, domain: DomId) -> Result<StorePath> {
        let payload = codec::arguments(&[&domain.0.to_string()]);
        let answer = self.ask(Kind::GetDomainPath, payload).await?.payload;
        let path = super::text(answer.strip_suffix(&[0]).unwrap_or(&answer)).unwrap_or_default();
        StorePath::parse(path).map_err(|_| StoreError::Garbled("a domain's path that is none"))
    }

    /// A watcher without paths.
    pub fn watcher(&self) -> Watcher {
        Watcher::new(Arc::clone(&self.nodes.shared))
    }

    /// Does `work` within a transaction: all of it happens, or nothing. `work` is called again, at most a few
    /// times, when another transaction came between, so all its effects must be through the [`Transaction`].
    pub async fn transaction<T, Fut>(&self, work: impl Fn(Arc<Transaction>) -> Fut + Send) -> Result<T>
    where
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        transaction::run(&self.nodes, work).await
    }
}

#[async_trait]
impl StoreRead for Client {
    async fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.get(&StorePath::parse(path)?).await
    }

    async fn list(&self, path: &str) -> Result<Vec<String>> {
        self.children(&StorePath::parse(path)?).await
    }

    async fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.set(&StorePath::parse(path)?, value).await
    }

    async fn rm(&self, path: &str) -> Result<()> {
        self.remove(&StorePath::parse(path)?).await
    }
}
