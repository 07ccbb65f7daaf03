//! The client of the world's process.
//!
//! One task owns the connection. Calls reach it by a bounded queue; each waits for its answer by number. When
//! the connection breaks, every waiting call fails as unreachable (its effect is unknown), and the task connects
//! again: at once, then after growing pauses. While it pauses, calls fail at once instead of waiting. On each
//! new connection the world first says to look at everything.

use super::bell::Bell;
use super::frame::{self, FromWorld, ToWorld};
use super::{Answer, Observation, Request, Result, WorldError};
use crate::model::Observers;
use crate::model::network::Changed;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// Calls waiting to be sent; the caller waits (until its deadline) when there are more.
const QUEUE: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

struct Call {
    request: Request,
    answer: oneshot::Sender<Result<Answer>>,
}

#[derive(Debug)]
pub(super) struct Remote {
    calls: mpsc::Sender<Call>,
    observers: Arc<Observers<u32>>,
    network_bell: Arc<Bell<Changed>>,
    runtime: tokio::runtime::Handle,
}

impl Remote {
    pub(super) fn start(socket: PathBuf) -> Self {
        let (calls, queue) = mpsc::channel(QUEUE);
        let observers: Arc<Observers<u32>> = Arc::default();
        let network_bell: Arc<Bell<Changed>> = Arc::default();
        let hearing = Hearing { observers: observers.clone(), network_bell: network_bell.clone() };
        tokio::spawn(stay_connected(socket, queue, hearing));
        Self { calls, observers, network_bell, runtime: tokio::runtime::Handle::current() }
    }

    pub(super) async fn call(&self, request: Request) -> Result<Answer> {
        let (answer, result) = oneshot::channel();
        if self.calls.send(Call { request, answer }).await.is_err() {
            return Err(unreachable("the client has ended"));
        }
        result.await.unwrap_or_else(|_| Err(unreachable("the connection broke")))
    }

    pub(super) fn observe<T: From<Observation> + Send + 'static>(&self) -> mpsc::Receiver<T> {
        self.observers.observe(&self.runtime)
    }

    pub(super) fn observe_network(&self) -> mpsc::Receiver<Changed> {
        self.network_bell.listen()
    }
}

/// Who is told what the world says by itself.
struct Hearing {
    observers: Arc<Observers<u32>>,
    network_bell: Arc<Bell<Changed>>,
}

fn unreachable(why: &str) -> WorldError {
    WorldError::Unreachable(why.to_owned())
}

/// Ends when the last [`Remote`] is dropped.
async fn stay_connected(socket: PathBuf, mut queue: mpsc::Receiver<Call>, hearing: Hearing) {
    let mut pause = FIRST_PAUSE;
    loop {
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(&socket)).await;
        match connecting.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                pause = FIRST_PAUSE;
                match converse(stream, &mut queue, &hearing).await {
                    Ended::NobodyAsks => return,
                    Ended::Lost(why) => tracing::debug!(%why, "connection to the simulated world lost"),
                }
            }
            Err(error) => {
                if refuse_while_away(&mut queue, pause, &error.to_string()).await.is_none() {
                    return;
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Answers every call with "unreachable" for this long. `None`: nobody holds the client any more.
async fn refuse_while_away(queue: &mut mpsc::Receiver<Call>, pause: Duration, why: &str) -> Option<()> {
    let over = tokio::time::Instant::now() + pause;
    loop {
        match tokio::time::timeout_at(over, queue.recv()).await {
            Ok(Some(call)) => drop(call.answer.send(Err(unreachable(why)))),
            Ok(None) => return None,
            Err(_) => return Some(()),
        }
    }
}

enum Ended {
    NobodyAsks,
    Lost(std::io::Error),
}

type Waiting = Mutex<HashMap<u64, oneshot::Sender<Result<Answer>>>>;

/// Dropping `waiting` at the end tells every waiting call that the connection broke.
async fn converse(stream: UnixStream, queue: &mut mpsc::Receiver<Call>, hearing: &Hearing) -> Ended {
    let (read, mut write) = stream.into_split();
    let waiting: Waiting = Mutex::default();
    let sending = async {
        let mut id = 0_u64;
        while let Some(call) = queue.recv().await {
            id += 1;
            let sent = frame::encode(&ToWorld { id, request: call.request });
            let bytes = match sent {
                Ok(bytes) => bytes,
                Err(error) => {
                    drop(call.answer.send(Err(WorldError::Failed(error.to_string()))));
                    continue;
                }
            };
            {
                let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                // Callers that gave up leave nothing behind.
                waiting.retain(|_, answer| !answer.is_closed());
                waiting.insert(id, call.answer);
            }
            if let Err(error) = write.write_all(&bytes).await {
                return Ended::Lost(error);
            }
        }
        Ended::NobodyAsks
    };
    tokio::select! {
        ended = sending => ended,
        error = receive(read, &waiting, hearing) => Ended::Lost(error),
    }
}

async fn receive(read: impl AsyncRead + Unpin, waiting: &Waiting, hearing: &Hearing) -> std::io::Error {
    let mut read = BufReader::new(read);
    loop {
        match frame::read::<FromWorld>(&mut read).await {
            Ok(FromWorld::Answer { id, result }) => {
                let answer = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                if let Some(answer) = answer {
                    drop(answer.send(result));
                }
            }
            Ok(FromWorld::Observation(observation)) => hearing.observers.tell(observation),
            Ok(FromWorld::NetworkChanged) => hearing.network_bell.ring(Changed),
            Err(error) => return error,
        }
    }
}
