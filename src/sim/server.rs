//! One client's connection to the world's process. Requests are taken as they come and answered as they are
//! done; what was begun is finished even if the client goes away. A domain that the client was sending goes on then,
//! and one that it was receiving is destroyed, as `xl` does when its other end is gone.

use super::engine::{Engine, Outcome};
use super::frame::{self, FromWorld, ToWorld};
use super::{Observation, Request, Result};
use crate::model::network::Changed;
use std::sync::Arc;
use tokio::io::{AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Requests of one client under way at once; the next is not read before one of them is done.
const MAX_UNDER_WAY: usize = 1024;
/// Answers waiting for a client that does not read.
const MAX_ANSWERS: usize = 1024;

/// Serves until the client goes away; `end` is notified if it asks for the world's end.
pub(super) async fn serve_client(stream: UnixStream, engine: Arc<Engine>, end: Arc<Notify>) {
    let (read, write) = stream.into_split();
    let (answers, to_send) = mpsc::channel(MAX_ANSWERS);
    let broken = CancellationToken::new();
    let number = engine.new_client();
    let client = Client { engine: engine.clone(), number, answers, broken: broken.clone(), end };
    let result = tokio::select! {
        result = client.take_requests(read) => result,
        result = send_answers(write, to_send, engine.observe(), engine.observe_network()) => result,
        () = broken.cancelled() => Ok(()),
    };
    broken.cancel();
    engine.client_gone(number);
    if let Err(error) = result {
        tracing::debug!(%error, "a client of the simulated world went away");
    }
}

#[derive(Clone)]
struct Client {
    engine: Arc<Engine>,
    number: u64,
    answers: mpsc::Sender<FromWorld>,
    /// The connection is over, or shall be.
    broken: CancellationToken,
    end: Arc<Notify>,
}

impl Client {
    async fn take_requests(&self, read: impl tokio::io::AsyncRead + Unpin) -> std::io::Result<()> {
        let mut read = BufReader::new(read);
        let under_way = Arc::new(Semaphore::new(MAX_UNDER_WAY));
        loop {
            let message: ToWorld = frame::read(&mut read).await?;
            let Ok(place) = under_way.clone().acquire_owned().await else { return Ok(()) };
            let client = self.clone();
            tokio::spawn(async move {
                client.serve_one(message).await;
                drop(place);
            });
        }
    }

    async fn serve_one(&self, message: ToWorld) {
        let ends_world = matches!(message.request, Request::EndWorld);
        match self.engine.serve_client(message.request, self.number).await {
            Outcome::Answer(result) => self.answer(message.id, result).await,
            Outcome::Lost => self.broken.cancel(),
            Outcome::Never => self.broken.cancelled().await,
        }
        if self.broken.is_cancelled() {
            // What was done after the client had gone is abandoned too.
            self.engine.client_gone(self.number);
        }
        if ends_world {
            self.end.notify_one();
        }
    }

    async fn answer(&self, id: u64, result: Result<super::Answer>) {
        tokio::select! {
            _ = self.answers.send(FromWorld::Answer { id, result }) => {}
            () = self.broken.cancelled() => {}
        }
    }
}

async fn send_answers(
    mut write: impl AsyncWrite + Unpin,
    mut answers: mpsc::Receiver<FromWorld>,
    mut observed: mpsc::Receiver<Observation>,
    mut network: mpsc::Receiver<Changed>,
) -> std::io::Result<()> {
    // What happened before we listened, the client may have missed.
    write.write_all(&frame::encode(&FromWorld::Observation(Observation::Everything))?).await?;
    write.write_all(&frame::encode(&FromWorld::NetworkChanged)?).await?;
    loop {
        // Observations first: who has the answer to a change has also been told of it.
        let message = tokio::select! {
            biased;
            Some(observation) = observed.recv() => FromWorld::Observation(observation),
            Some(Changed) = network.recv() => FromWorld::NetworkChanged,
            Some(answer) = answers.recv() => answer,
            else => return Ok(()),
        };
        write.write_all(&frame::encode(&message)?).await?;
    }
}
