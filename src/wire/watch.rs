//! What a connection is doing, so that each phase has its own deadline.
//!
//! ```text
//!  accepted ─> Head ─(head read)─> Call ─> Body ─(body read)─> Call ─(answer made)─> Answer
//!               ^ (first byte)                                                         │ (all of it flushed)
//!               └──────────────────────────── Idle <───────────────────────────────────┘
//! ```
//!
//! hyper has one timer, for idle time and head together; we want four, and want to know which one ended a
//! connection. So the stream under hyper ([`Watched`]) tells the [`Watch`] what it reads and flushes, the service
//! above hyper tells it where the request is, and the connection's task asks it for the deadline. All three run
//! in that one task.
//!
//! A client may close its sending half and still wait for its answer; over TCP that looks like one that went
//! away. While a call runs, the end of the stream is therefore kept from hyper, and a short deadline set: an
//! answer made by then is still sent, a call that takes longer is dropped.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Duration, Instant};

/// How long a caller that sends no more may wait for its answer.
pub(super) const HALF_CLOSED: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Idle,
    Head,
    Body,
    Call,
    Answer,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) head: Duration,
    pub(super) body: Duration,
    pub(super) idle: Duration,
    pub(super) write: Duration,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    deadline: Option<Instant>,
    /// No byte has come on this connection yet.
    untouched: bool,
    /// Bytes of the next request came while the last was answered.
    early: bool,
    /// The other end sends no more.
    ended: bool,
    /// The answer's last byte is in hyper's buffer.
    answer_written: bool,
    /// Whoever waits for the stream to be readable while its end is kept back.
    reader: Option<Waker>,
}

#[derive(Debug, Clone)]
pub(super) struct Watch {
    state: Arc<Mutex<State>>,
    timeouts: Timeouts,
}

impl Watch {
    pub(super) fn new(timeouts: Timeouts) -> Self {
        let state = State {
            phase: Phase::Head,
            deadline: Some(Instant::now() + timeouts.head),
            untouched: true,
            early: false,
            ended: false,
            answer_written: false,
            reader: None,
        };
        Self { state: Arc::new(Mutex::new(state)), timeouts }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.state().deadline
    }

    pub(super) fn phase(&self) -> Phase {
        self.state().phase
    }

    /// Between two requests: the connection may be closed without a loss to anyone.
    pub(super) fn is_idle(&self) -> bool {
        self.state().phase == Phase::Idle
    }

    /// Nothing has come yet.
    pub(super) fn is_untouched(&self) -> bool {
        let state = self.state();
        state.phase == Phase::Head && state.untouched
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state().ended
    }

    /// The service says where the request is.
    pub(super) fn enter(&self, phase: Phase) {
        let timeout = match phase {
            Phase::Idle => Some(self.timeouts.idle),
            Phase::Head => Some(self.timeouts.head),
            Phase::Body => Some(self.timeouts.body),
            Phase::Answer => Some(self.timeouts.write),
            Phase::Call => None,
        };
        let mut state = self.state();
        state.phase = phase;
        state.untouched = false;
        state.answer_written = false;
        if phase == Phase::Body {
            // Hyper looks once for more right behind the head: what it found is the body's.
            state.early = false;
        }
        let timeout = match (state.ended, timeout) {
            (true, Some(timeout)) => Some(timeout.min(HALF_CLOSED)),
            (true, None) => Some(HALF_CLOSED),
            (false, timeout) => timeout,
        };
        state.deadline = timeout.map(|timeout| Instant::now() + timeout);
    }

    pub(super) fn answer_written(&self) {
        self.state().answer_written = true;
    }

    fn bytes_came(&self) {
        let begins_a_head = {
            let mut state = self.state();
            state.untouched = false;
            match state.phase {
                Phase::Call | Phase::Answer => state.early = true,
                Phase::Idle | Phase::Head | Phase::Body => {}
            }
            state.phase == Phase::Idle
        };
        if begins_a_head {
            self.enter(Phase::Head);
        }
    }

    /// `true` if the end must be kept back because a call is under way.
    fn end_came(&self, reader: &Waker) -> bool {
        let mut state = self.state();
        // In the body too: hyper looks for more as soon as it has the last of the body, before the service knows.
        if matches!(state.phase, Phase::Idle | Phase::Head) {
            state.ended = true;
            return false;
        }
        if !state.ended {
            state.ended = true;
            let end = Instant::now() + HALF_CLOSED;
            state.deadline = Some(state.deadline.map_or(end, |deadline| deadline.min(end)));
        }
        state.reader = Some(reader.clone());
        true
    }

    fn flushed(&self) {
        let reader = {
            let mut state = self.state();
            if state.phase != Phase::Answer || !state.answer_written {
                return;
            }
            state.reader.take()
        };
        let early = std::mem::take(&mut self.state().early);
        self.enter(if early { Phase::Head } else { Phase::Idle });
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

/// A stream that tells its watch what happens on it.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    watch: Watch,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, watch: Watch) -> Self {
        Self { stream, watch }
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.watch.bytes_came();
        } else if buffer.remaining() > 0 && self.watch.end_came(cx.waker()) {
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.watch.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request with a body, read and answered; bytes come at the moments that are named.
    fn after_a_request(bytes: &[Phase]) -> Phase {
        let second = Duration::from_secs(1);
        let watch = Watch::new(Timeouts { head: second, body: second, idle: second, write: second });
        let come = |phase| {
            if bytes.contains(&phase) {
                watch.bytes_came();
            }
        };
        watch.bytes_came();
        watch.enter(Phase::Call);
        come(Phase::Head);
        watch.enter(Phase::Body);
        come(Phase::Body);
        watch.enter(Phase::Call);
        come(Phase::Call);
        watch.enter(Phase::Answer);
        come(Phase::Answer);
        watch.answer_written();
        watch.flushed();
        watch.phase()
    }

    #[tokio::test]
    async fn bytes_of_a_body_that_come_right_behind_the_head_begin_no_other_head() {
        for its_own in [&[][..], &[Phase::Head], &[Phase::Body], &[Phase::Head, Phase::Body]] {
            assert_eq!(after_a_request(its_own), Phase::Idle, "{its_own:?}");
        }
        for of_the_next in [&[Phase::Call][..], &[Phase::Answer], &[Phase::Head, Phase::Call]] {
            assert_eq!(after_a_request(of_the_next), Phase::Head, "{of_the_next:?}");
        }
    }
}
