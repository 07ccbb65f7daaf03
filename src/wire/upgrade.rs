//! A connection that stops being HTTP: the stream of a migration between two hosts.
//!
//! Only a peer (a certificate pinned for another host) is offered this, and only where the floor above has asked
//! for it: the path and protocol must be ones that its [`Upgrades`] takes. Everybody else meets the server that
//! knows no upgrade: another path is a 404, and an `Upgrade` header is not looked at.
//!
//! hyper answers `101` and ends; the connection's task then hands the bare stream, with what had been read too
//! far, to the taker, and ends with it. Deadlines on the stream are the taker's.

use super::http::AnswerBody;
use super::server::Shared;
use super::watch::{Phase, Watch};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}
pub type Stream = Box<dyn Duplex>;

/// Works on a stream until it is done with it.
pub type Taker = Box<dyn FnOnce(Stream) -> BoxFuture<'static, ()> + Send>;

/// The floor above: which streams it takes.
pub trait Upgrades: Send + Sync + 'static {
    /// The header's word for the protocol.
    fn protocol(&self) -> &'static str;

    /// Who takes the stream that the peer with this pinned fingerprint asks for; `None`: nobody waits for it.
    fn taker(&self, peer: &str, path: &str) -> Option<Taker>;
}

/// A connection that was answered with `101`, and who takes it.
#[derive(Clone, Default)]
pub(super) struct Upgrading(Arc<Mutex<Option<Taker>>>);

impl Upgrading {
    pub(super) fn take(&self) -> Option<Taker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A stream that may begin.
pub(super) struct Asked {
    protocol: &'static str,
    taker: Taker,
}

/// The stream that this request asks for, if it does and somebody waits for it.
pub(super) fn asked(shared: &Shared, peer: &str, request: &Request<Incoming>) -> Option<Asked> {
    let upgrades = shared.upgrades.as_ref()?;
    let protocol = upgrades.protocol();
    let mut named = request.headers().get_all(header::UPGRADE).iter();
    let (Some(first), None) = (named.next(), named.next()) else { return None };
    if request.method() != Method::POST || first.as_bytes() != protocol.as_bytes() {
        return None;
    }
    let taker = upgrades.taker(peer, request.uri().path())?;
    Some(Asked { protocol, taker })
}

impl Asked {
    pub(super) fn begin(self, connection: &Upgrading, watch: Watch) -> Response<AnswerBody> {
        *connection.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.taker);
        watch.enter(Phase::Answer);
        let mut response = Response::new(AnswerBody::new(Vec::new(), watch));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static(self.protocol));
        response
    }
}

/// The bare stream, beginning with what hyper had read of it.
pub(super) fn stream<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(inner: S, read: Bytes) -> Stream {
    Box::new(Rest { read, inner })
}

struct Rest<S> {
    read: Bytes,
    inner: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Rest<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let length = self.read.len().min(buf.remaining());
        let first = self.read.split_to(length);
        buf.put_slice(&first);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rest<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
