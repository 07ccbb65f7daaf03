//! Reads and writes that happen together or not at all. xenstored lets transactions run side by side and refuses
//! the later one if they met; it is then tried again, a few times.
//!
//! A transaction that nobody holds any more (its future was dropped, its deadline passed) is aborted by the
//! runner, which holds it weakly.

use super::client::{Nodes, Shared};
use super::codec::{self, Kind};
use super::runner::Command;
use super::{Refusal, Result, StoreError};
use bytes::Bytes;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

const TRIES: u32 = 8;

/// xenstored's number, good on one connection only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TransactionId {
    pub connection: u64,
    pub number: u32,
}

/// Tells the runner when it is dropped.
#[derive(Debug)]
struct Held {
    alive: Option<Arc<()>>,
    shared: Arc<Shared>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.alive = None;
        self.shared.reap();
    }
}

/// The tree as this transaction sees it.
#[derive(Debug)]
pub struct Transaction {
    nodes: Nodes,
    _held: Held,
}

impl Deref for Transaction {
    type Target = Nodes;
    fn deref(&self) -> &Nodes {
        &self.nodes
    }
}

impl Transaction {
    async fn start(nodes: &Nodes) -> Result<Self> {
        let shared = Arc::clone(nodes.shared());
        let alive = Arc::new(());
        let weak = Arc::downgrade(&alive);
        let held = Held { alive: Some(alive), shared };
        // Not through `ask`: the runner must know who holds it before it is there.
        let command = |reply| Command::Begin { held: weak, payload: Bytes::from_static(&[0]), reply };
        let answer = nodes.shared().command(command).await?;
        let number = codec::number_answer(&answer.payload)?;
        let id = TransactionId { connection: answer.connection, number };
        Ok(Self { nodes: nodes.within(id), _held: held })
    }

    async fn end(&self, commit: bool) -> Result<()> {
        let payload = if commit { b"T\0" } else { b"F\0" };
        self.nodes.ask(Kind::TransactionEnd, payload.to_vec()).await.map(drop)
    }
}

pub(super) async fn run<T, Fut>(nodes: &Nodes, work: impl Fn(Arc<Transaction>) -> Fut) -> Result<T>
where
    Fut: Future<Output = Result<T>>,
{
    for tried in 0..TRIES {
        if tried > 0 {
            tokio::time::sleep(Duration::from_millis(1 << tried)).await;
        }
        let transaction = Arc::new(Transaction::start(nodes).await?);
        let done = match work(Arc::clone(&transaction)).await {
            Ok(value) => transaction.end(true).await.map(|()| value),
            Err(error) => {
                // What it answers matters to nobody: after a failure the runner aborts it as well.
                let _ = transaction.end(false).await;
                Err(error)
            }
        };
        match done {
            Err(StoreError::Refused(Refusal::Again)) => {}
            done => return done,
        }
    }
    Err(StoreError::Conflict)
}
