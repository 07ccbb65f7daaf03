//! The bytes of a migration between two agents, in frames, so that the end of a domain is told from the end of a
//! link.
//!
//! A frame is four bytes of length, most significant first, then that many bytes. Length 0 is the end: the domain is
//! whole on the wire. [`ALIVE`] stands for "still here" and has no bytes; each side sends it while it has nothing else
//! to say, so that silence for the stall time means a broken link. The target sends one frame, its [`Answer`] in JSON.
//!
//! One pump per stream and side owns the stream; the toolstack has the other end of a pipe. The pump ends when the
//! pipe or the link does, and when it is cut.

use crate::wire::Stream;
use serde::{Deserialize, Serialize};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split,
};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// The length that stands for "still here".
const ALIVE: u32 = u32::MAX;
const ALIVE_EVERY: Duration = Duration::from_secs(5);
const MAX_FRAME_BYTES: u32 = 256 * 1024;
const MAX_ANSWER_BYTES: u32 = 64 * 1024;
const PIPE_BYTES: usize = 256 * 1024;
const TOOLSTACK_ENDED: &str = "the toolstack ended the stream";

/// What the target says at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// The domain is here, whole and paused, and that is written down.
    Ready,
    Refused(String),
}

/// The source's end of a stream.
pub(super) struct Sending {
    accepted: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    end: CancellationToken,
    answer: tokio::sync::Mutex<watch::Receiver<Option<Result<(), String>>>>,
    cut: CancellationToken,
}

impl Sending {
    /// Bytes on the wire.
    pub(super) fn bytes(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Gives the stream up; the target then destroys its half.
    pub(super) fn cut(&self) {
        self.cut.cancel();
    }

    /// All was written: tells the target so, and waits for its answer.
    pub(super) async fn finish(&self, limit: Duration) -> Result<(), String> {
        self.end.cancel();
        let mut answer = self.answer.lock().await;
        let said = tokio::time::timeout(limit, answer.wait_for(Option::is_some)).await;
        match said {
            Ok(Ok(said)) => said.clone().unwrap_or_else(|| Err("no answer".to_owned())),
            Ok(Err(_)) => Err("the stream broke".to_owned()),
            Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
        }
    }

    /// Why the stream is over, if it is and was not a success, and not the toolstack's doing: that knows why itself.
    pub(super) async fn trouble(&self) -> Option<String> {
        let why = self.answer.lock().await.borrow().clone().and_then(Result::err);
        why.filter(|why| why != TOOLSTACK_ENDED)
    }
}

/// Frames on their way out. The writer is for the toolstack.
pub(super) fn send(stream: Stream, stall: Duration) -> (Counted, Arc<Sending>) {
    let (pipe, from) = duplex(PIPE_BYTES);
    let (said, answer) = watch::channel(None);
    let sending = Arc::new(Sending {
        accepted: Arc::default(),
        sent: Arc::default(),
        end: CancellationToken::new(),
        answer: tokio::sync::Mutex::new(answer),
        cut: CancellationToken::new(),
    });
    let out = Counted { pipe, accepted: Arc::clone(&sending.accepted) };
    let (read, write) = split(stream);
    let counts = (Arc::clone(&sending.accepted), Arc::clone(&sending.sent));
    let (end, cut) = (sending.end.clone(), sending.cut.clone());
    tokio::spawn(async move {
        let why = tokio::select! {
            why = pump_out(from, write, counts, end, stall) => why,
            answer = read_answer(read, stall) => answer,
            () = cut.cancelled() => Err("it was given up here".to_owned()),
        };
        let _ = said.send(Some(why));
    });
    (out, sending)
}

/// A pipe that knows how much went in.
pub(super) struct Counted {
    pipe: DuplexStream,
    accepted: Arc<AtomicU64>,
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.pipe).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            self.accepted.fetch_add(*count as u64, Ordering::SeqCst);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}

/// Never answers `Ok`: that is the reader's to say.
async fn pump_out(
    mut from: DuplexStream,
    mut write: WriteHalf<Stream>,
    (accepted, sent): (Arc<AtomicU64>, Arc<AtomicU64>),
    end: CancellationToken,
    stall: Duration,
) -> Result<(), String> {
    let mut bytes = vec![0; MAX_FRAME_BYTES as usize];
    let mut ended = false;
    loop {
        // What the toolstack wrote before it asked for the end goes first.
        if end.is_cancelled() && !ended && sent.load(Ordering::SeqCst) >= accepted.load(Ordering::SeqCst) {
            ended = true;
            put(&mut write, 0, &[], stall).await?;
        }
        tokio::select! {
            read = from.read(&mut bytes), if !ended => match read {
                Ok(count) if count > 0 => {
                    put(&mut write, count as u32, &bytes[..count], stall).await?;
                    sent.fetch_add(count as u64, Ordering::SeqCst);
                }
                // The toolstack is done; whether it was asked for the end shows above.
                _ if end.is_cancelled() => {}
                _ => return Err(TOOLSTACK_ENDED.to_owned()),
            },
            () = end.cancelled(), if !end.is_cancelled() => {}
            () = tokio::time::sleep(ALIVE_EVERY) => put(&mut write, ALIVE, &[], stall).await?,
        }
    }
}

async fn put(
    write: &mut WriteHalf<Stream>,
    length: u32,
    bytes: &[u8],
    stall: Duration,
) -> Result<(), String> {
    let writing = async {
        write.write_u32(length).await?;
        write.write_all(bytes).await?;
        write.flush().await
    };
    match tokio::time::timeout(stall, writing).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("the link broke: {}", error.kind())),
        Err(_) => Err(format!("nothing moved on the link for {} s", stall.as_secs())),
    }
}

/// The next frame that is not a mere sign of life; `None` is the end.
async fn take(read: &mut ReadHalf<Stream>, max: u32, stall: Duration) -> Result<Option<Vec<u8>>, String> {
    let reading = async {
        let length = read.read_u32().await?;
        if length == ALIVE || length == 0 {
            return Ok::<_, io::Error>((length, Vec::new()));
        }
        if length > max {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length as usize];
        read.read_exact(&mut bytes).await?;
        Ok((length, bytes))
    };
    tokio::pin!(reading);
    match tokio::time::timeout(stall, reading).await {
        Ok(Ok((0, _))) => Ok(None),
        Ok(Ok((_, bytes))) => Ok(Some(bytes)),
        Ok(Err(error)) => Err(format!("the link broke: {}", error.kind())),
        Err(_) => Err(format!("nothing came on the link for {} s", stall.as_secs())),
    }
}

async fn read_answer(mut read: ReadHalf<Stream>, stall: Duration) -> Result<(), String> {
    loop {
        let Some(bytes) = take(&mut read, MAX_ANSWER_BYTES, stall).await? else {
            return Err("the other host ended the stream without an answer".to_owned());
        };
        if bytes.is_empty() {
            continue;
        }
        return match serde_json::from_slice(&bytes) {
            Ok(Answer::Ready) => Ok(()),
            Ok(Answer::Refused(why)) => Err(format!("the other host refused it: {why}")),
            Err(_) => Err("the other host gave no answer of ours".to_owned()),
        };
    }
}

/// The target's end of a stream.
pub(super) struct Receiving {
    ended: watch::Receiver<Option<Result<(), String>>>,
    answer: Mutex<Option<oneshot::Sender<Answer>>>,
    cut: CancellationToken,
    done: tokio::task::JoinHandle<()>,
}

impl Receiving {
    /// Gives the stream up.
    pub(super) fn cut(&self) -> CancellationToken {
        self.cut.clone()
    }

    /// Whether the source said that this was all.
    pub(super) async fn is_whole(&mut self, limit: Duration) -> Result<(), String> {
        match tokio::time::timeout(limit, self.ended.wait_for(Option::is_some)).await {
            Ok(Ok(ended)) => ended.clone().unwrap_or_else(|| Err("it did not end".to_owned())),
            _ => Err("the stream did not end".to_owned()),
        }
    }

    /// Sends the answer, and waits a moment until it is out. That it does not arrive is the source's to find out.
    pub(super) async fn answer(self, answer: Answer, stall: Duration) {
        let sender = self.answer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(sender) = sender {
            let _ = sender.send(answer);
        }
        let _ = tokio::time::timeout(stall, self.done).await;
    }
}

/// Frames as they come. The reader is for the toolstack; it ends early if the link does.
pub(super) fn receive(stream: Stream, stall: Duration) -> (impl AsyncRead + Send + Unpin, Receiving) {
    let (to, pipe) = duplex(PIPE_BYTES);
    let (said, ended) = watch::channel(None);
    let (answer, to_say) = oneshot::channel();
    let (read, write) = split(stream);
    let cut = CancellationToken::new();
    let given_up = cut.clone();
    let done = tokio::spawn(async move {
        let reading = async move {
            let _ = said.send(Some(pump_in(read, to, stall).await));
            // A source that hears nothing more from us closes; until then the answer is on its way.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = reading => {}
            () = write_answer(write, to_say, stall) => {}
            () = given_up.cancelled() => {}
        }
    });
    (pipe, Receiving { ended, answer: Mutex::new(Some(answer)), cut, done })
}

async fn pump_in(mut read: ReadHalf<Stream>, mut to: DuplexStream, stall: Duration) -> Result<(), String> {
    while let Some(bytes) = take(&mut read, MAX_FRAME_BYTES, stall).await? {
        // A toolstack that takes no more has failed, and says so itself.
        to.write_all(&bytes).await.map_err(|_| "the toolstack takes no more".to_owned())?;
    }
    Ok(())
}

async fn write_answer(mut write: WriteHalf<Stream>, mut to_say: oneshot::Receiver<Answer>, stall: Duration) {
    loop {
        let answer = tokio::select! {
            answer = &mut to_say => answer,
            () = tokio::time::sleep(ALIVE_EVERY) => {
                if put(&mut write, ALIVE, &[], stall).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let Ok(Ok(bytes)) = answer.map(|answer| serde_json::to_vec(&answer)) else { return };
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        if length <= MAX_ANSWER_BYTES && put(&mut write, length, &bytes, stall).await.is_ok() {
            let _ = tokio::time::timeout(stall, write.shutdown()).await;
        }
        return;
    }
}
