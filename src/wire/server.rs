//! The server: accepts, counts, greets, and carries each connection through its requests to its end.
//!
//! ```text
//!  accept ─> slot? ─> first byte ─> TLS handshake ─┐
//!              no: closed       └─> plain ─────────┼─> requests … ─> shutdown ─> rest read away ─> closed
//!                                   (or "TLS only")┘
//! ```
//!
//! One task per listener, one per connection; each connection's task owns all of it. A drain stops the
//! listeners, closes what is quiet, and lets calls under way finish; then the rest is cut.

use super::certificate::PeerCertificate;
use super::http::{self, Peer};
use super::listen::{Slot, Slots};
use super::upgrade::{self, Upgrading};
use super::watch::{Phase, Timeouts, Watch, Watched};
use super::{Gate, Handler, Identity, TlsState, Upgrades};
use crate::config;
use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::{Duration, Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// After the last answer, what the client still sends is read away for so long and so much: closed at once, the
/// kernel would reset the connection, and the client could lose the answer that tells it why.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 1024 * 1024;
/// A new connection's first call may be on its way when a drain begins: it is waited for so long.
const FIRST_CALL: Duration = Duration::from_millis(500);
/// Accepting fails for want of descriptors or memory: wait for some to be freed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// hyper takes no smaller buffer.
const MIN_HEAD_BYTES: usize = 8192;
const MAX_HEADERS: usize = 100;
/// The first byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
const TLS_ONLY: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 24\r\n\
    Connection: close\r\n\r\nThis port is TLS only.\r\n";

/// What a server is made of.
pub struct ServerConfig {
    pub settings: config::Wire,
    pub access: config::Access,
    pub gate: Arc<Gate>,
    pub tls: Arc<TlsState>,
    pub handler: Arc<dyn Handler>,
    /// Takes the streams of peers; without it there are none.
    pub upgrades: Option<Arc<dyn Upgrades>>,
    pub tcp: Vec<std::net::TcpListener>,
    pub unix: Vec<std::os::unix::net::UnixListener>,
}

/// Counters, for whoever wants to read them.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Connections accepted since the start.
    pub connections: AtomicU64,
    /// Connections closed at once because too many were open.
    pub connections_refused: AtomicU64,
    /// Connections ended by one of their deadlines.
    pub timeouts: AtomicU64,
    /// Requests without good credentials.
    pub unauthorized: AtomicU64,
    /// Requests let in.
    pub calls: AtomicU64,
    /// Calls answered with a fault.
    pub faults: AtomicU64,
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) settings: config::Wire,
    pub(super) gate: Arc<Gate>,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) upgrades: Option<Arc<dyn Upgrades>>,
    pub(super) metrics: Arc<Metrics>,
    tls: Arc<TlsState>,
    slots: Arc<Slots>,
    /// Accept no more, finish what is under way.
    draining: CancellationToken,
    /// End now.
    cut: CancellationToken,
}

impl Shared {
    /// Whoever connected before the drain and has not called yet is not coming.
    async fn first_call_is_overdue(&self) {
        self.draining.cancelled().await;
        tokio::time::sleep(FIRST_CALL).await;
    }
}

/// A running server. Dropped, it is cut.
pub struct Server {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
}

impl Server {
    /// Takes over the listeners and serves. Must be called inside a tokio runtime.
    pub fn start(config: ServerConfig) -> io::Result<Self> {
        config.gate.set_max_failures_per_minute(config.access.max_failures_per_minute);
        let shared = Arc::new(Shared {
            slots: Slots::new(config.settings.max_connections, config.settings.max_connections_per_address),
            settings: config.settings,
            gate: config.gate,
            handler: config.handler,
            upgrades: config.upgrades,
            metrics: Arc::default(),
            tls: config.tls,
            draining: CancellationToken::new(),
            cut: CancellationToken::new(),
        });
        if shared.settings.plain_http {
            tracing::warn!("plain HTTP is allowed by the settings: passwords travel in the clear");
        }
        let mut tcp = Vec::new();
        for listener in config.tcp {
            listener.set_nonblocking(true)?;
            tcp.push(TcpListener::from_std(listener)?);
        }
        let mut unix = Vec::new();
        for listener in config.unix {
            listener.set_nonblocking(true)?;
            unix.push(UnixListener::from_std(listener)?);
        }
        let addresses = tcp.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
        for listener in tcp {
            tokio::spawn(accept_tcp(shared.clone(), listener));
        }
        for listener in unix {
            tokio::spawn(accept_unix(shared.clone(), listener));
        }
        Ok(Self { shared, addresses })
    }

    /// Where the first TCP listener listens, with its real port.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.addresses.first().copied()
    }

    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub fn metrics(&self) -> Arc<Metrics> {
        self.shared.metrics.clone()
    }

    pub fn open_connections(&self) -> usize {
        self.shared.slots.open()
    }

    /// As [`Server::open_connections`], for whoever asks again and again.
    pub fn connection_counter(&self) -> impl Fn() -> usize + Send + Sync + 'static {
        let slots = self.shared.slots.clone();
        move || slots.open()
    }

    /// Accepts no more, closes connections on which nothing is under way (new ones a moment later, since their
    /// first call may be on its way), and waits for calls under way. What
    /// is still open after `patience` is cut; says how many those were.
    pub async fn drain(&self, patience: Duration) -> usize {
        self.shared.draining.cancel();
        let free = self.shared.slots.wait_until_all_free();
        if timeout(patience, free).await.is_ok() {
            return 0;
        }
        let cut = self.shared.slots.open();
        self.shared.cut.cancel();
        // Dropping what is left takes no more than a turn of each task.
        let _ = timeout(Duration::from_secs(1), self.shared.slots.wait_until_all_free()).await;
        cut
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.draining.cancel();
        self.shared.cut.cancel();
    }
}

async fn accept_tcp(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.draining.cancelled() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        if let Some(slot) = admit(&shared, Some(address)) {
            tokio::spawn(until_cut(shared.clone(), slot, tcp_connection(shared.clone(), stream, address)));
        }
    }
}

async fn accept_unix(shared: Arc<Shared>, listener: UnixListener) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.draining.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        if let Some(slot) = admit(&shared, None) {
            tokio::spawn(until_cut(shared.clone(), slot, unix_connection(shared.clone(), stream)));
        }
    }
}

async fn pause(error: &io::Error) {
    // A client that is gone before it was accepted is its own affair.
    if error.kind() != io::ErrorKind::ConnectionAborted {
        tracing::warn!(%error, "cannot accept a connection");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

fn admit(shared: &Shared, address: Option<SocketAddr>) -> Option<Slot> {
    shared.metrics.connections.fetch_add(1, Ordering::Relaxed);
    let slot = shared.slots.take(address.map(|address| address.ip()));
    if slot.is_none() {
        shared.metrics.connections_refused.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(address = address.map(tracing::field::display), "too many connections, closed");
    }
    slot
}

async fn until_cut(shared: Arc<Shared>, slot: Slot, connection: impl Future<Output = ()>) {
    tokio::select! {
        () = connection => {}
        () = shared.cut.cancelled() => {}
    }
    drop(slot);
}

async fn tcp_connection(shared: Arc<Shared>, mut stream: TcpStream, address: SocketAddr) {
    let head_timeout = Duration::from_millis(shared.settings.head_timeout_ms);
    // Answers are written whole; waiting for more would only delay them.
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    let peeked = tokio::select! {
        peeked = timeout(head_timeout, stream.peek(&mut first)) => peeked,
        () = shared.first_call_is_overdue() => return,
    };
    match peeked {
        Ok(Ok(1)) => {}
        Ok(_) => return,
        Err(_) => return timed_out(&shared, Phase::Head),
    }
    let own = stream.local_addr().ok();
    let mut peer = Peer { address: Some(address), own, tls: false, certificate: None, local: None };
    if first == [TLS_HANDSHAKE] {
        let acceptor = TlsAcceptor::from(shared.tls.current());
        match timeout(head_timeout, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => {
                peer.tls = true;
                peer.certificate = stream.get_ref().1.peer_certificates().and_then(PeerCertificate::new);
                carry(shared, peer, stream).await;
            }
            Ok(Err(error)) => tracing::debug!(%address, %error, "TLS handshake failed"),
            Err(_) => timed_out(&shared, Phase::Head),
        }
    } else if shared.settings.plain_http {
        carry(shared, peer, stream).await;
    } else if timeout(LINGER, stream.write_all(TLS_ONLY)).await.is_ok() {
        part(stream, false).await;
    }
}

async fn unix_connection(shared: Arc<Shared>, stream: UnixStream) {
    let Ok(credentials) = stream.peer_cred() else {
        return;
    };
    let (uid, gid) = (credentials.uid(), credentials.gid());
    if !shared.gate.is_local_operator(uid, gid).await {
        shared.metrics.unauthorized.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(uid, "Unauthorized access attempt on the operator's socket");
        return;
    }
    let local = Some(Identity::Local { uid, pid: credentials.pid().unwrap_or(0) });
    carry(shared, Peer { address: None, own: None, tls: false, certificate: None, local }, stream).await;
}

fn timed_out(shared: &Shared, phase: Phase) {
    shared.metrics.timeouts.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(?phase, "a connection took too long, closed");
}

/// Serves the requests of one connection until it ends.
async fn carry<S>(shared: Arc<Shared>, peer: Peer, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let watch = Watch::new(timeouts(&shared.settings));
    let peer = Arc::new(peer);
    let upgrading = Upgrading::default();
    let service = {
        let (shared, watch, upgrading) = (shared.clone(), watch.clone(), upgrading.clone());
        service_fn(move |request: Request<Incoming>| -> BoxFuture<'static, Result<Response<_>, Infallible>> {
            // Now, not when the future is first polled: before that, hyper looks for more and may find the end.
            watch.enter(Phase::Call);
            let answer = http::serve(shared.clone(), peer.clone(), watch.clone(), upgrading.clone(), request);
            Box::pin(async { Ok(answer.await) })
        })
    };
    let io = TokioIo::new(Watched::new(stream, watch.clone()));
    let mut connection = builder(&shared.settings).serve_connection(io, service);
    let mut first_call = pin!(shared.first_call_is_overdue());
    let mut closing = false;
    let mut timer = pin!(tokio::time::sleep_until(Instant::now()));
    let in_time = poll_fn(|cx| {
        loop {
            if let Poll::Ready(result) = connection.poll_without_shutdown(cx) {
                if let Err(error) = result {
                    tracing::debug!(%error, "a connection ended early");
                }
                return Poll::Ready(true);
            }
            let unheard = first_call.as_mut().poll(cx).is_ready();
            if shared.draining.is_cancelled() && !closing {
                if watch.is_idle() || (watch.is_untouched() && unheard) {
                    return Poll::Ready(true);
                }
                if !watch.is_untouched() {
                    closing = true;
                    Pin::new(&mut connection).graceful_shutdown();
                    continue;
                }
            }
            return if is_over(&watch, timer.as_mut(), cx) { Poll::Ready(false) } else { Poll::Pending };
        }
    });
    if in_time.await {
        let parts = connection.into_parts();
        let stream = parts.io.into_inner().into_inner();
        if let Some(taker) = upgrading.take() {
            taker(upgrade::stream(stream, parts.read_buf)).await;
            return;
        }
        part(stream, watch.has_ended()).await;
    } else {
        timed_out(&shared, watch.phase());
    }
}

/// Has the connection's deadline passed? The timer is only set anew when it would ring too late: a connection in
/// steady use moves its deadline with every request and its timer hardly ever.
fn is_over(watch: &Watch, mut timer: Pin<&mut tokio::time::Sleep>, cx: &mut std::task::Context<'_>) -> bool {
    let Some(deadline) = watch.deadline() else {
        return false;
    };
    if deadline < timer.deadline() || timer.is_elapsed() {
        timer.as_mut().reset(deadline);
    }
    while timer.as_mut().poll(cx).is_ready() {
        if deadline <= Instant::now() {
            return true;
        }
        timer.as_mut().reset(deadline);
    }
    false
}

fn timeouts(settings: &config::Wire) -> Timeouts {
    Timeouts {
        head: Duration::from_millis(settings.head_timeout_ms),
        body: Duration::from_millis(settings.body_timeout_ms),
        idle: Duration::from_millis(settings.idle_timeout_ms),
        write: Duration::from_millis(settings.write_timeout_ms),
    }
}

fn builder(settings: &config::Wire) -> http1::Builder {
    let mut builder = http1::Builder::new();
    let max_head_bytes = settings.max_head_bytes.max(MIN_HEAD_BYTES);
    builder
        .timer(TokioTimer::new())
        // Ours are finer, see `watch`.
        .header_read_timeout(None)
        .max_headers(MAX_HEADERS)
        .max_header_size(max_head_bytes)
        // Also bounds a head that never ends, and a body's unread part.
        .max_buf_size(max_head_bytes);
    builder
}

/// Ends a connection so that the client can read the last answer.
async fn part<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, ended: bool) {
    let parting = async {
        if stream.shutdown().await.is_err() || ended {
            return;
        }
        let mut left = LINGER_BYTES;
        let mut rest = [0; 4096];
        while let Ok(read) = stream.read(&mut rest).await {
            left = left.saturating_sub(read);
            if read == 0 || left == 0 {
                return;
            }
        }
    };
    let _ = timeout(LINGER, parting).await;
}
