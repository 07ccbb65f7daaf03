//! The listener: plain HTTP/1.1, `GET` and `HEAD` of `/metrics`, and nothing else.
//!
//! Whoever connects is a stranger, so all is bounded: connections, the head and the time it may take, the time an answer
//! may take to be read, one request a connection, and one rendering at a time. When all places are taken, the newcomer gets
//! one of the address that has most of them: that of the connection which has been silent longest, or else of the oldest.
//! Whoever takes all places, and says nothing or does not read what it asked for, keeps nobody else out.

use super::exposition::Form;
use super::render::{Own, render};
use super::{Figures, Source};
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

const MAX_CONNECTIONS: usize = 8;
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Of a whole connection: what is then not read is not wanted.
const CONNECTION_LIMIT: Duration = Duration::from_secs(20);
/// hyper takes no smaller buffer; also bounds a head that never ends.
const MAX_HEAD_BYTES: usize = 8192;
const MAX_HEADERS: usize = 64;
/// A scrape waits for the renderings before it at most this long.
const RENDER_LIMIT: Duration = Duration::from_secs(10);
/// Accepting fails for want of descriptors or memory: wait for some to be freed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
#[error("metrics cannot be served at {address}")]
pub struct ListenError {
    address: SocketAddr,
    source: io::Error,
}

/// Takes the address. Must be called inside a tokio runtime.
pub fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let bound = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    });
    bound.map_err(|source| ListenError { address, source })
}

struct Shared {
    source: Arc<dyn Source>,
    scrapes: AtomicU64,
    refused: AtomicU64,
    /// One rendering at a time: a source that hangs holds one thread, not all.
    rendering: Arc<Semaphore>,
    places: Mutex<VecDeque<Arc<Place>>>,
}

/// One connection's.
struct Place {
    address: IpAddr,
    /// It has sent a request.
    heard: AtomicBool,
    end: CancellationToken,
}

/// Serves until `stop`, and then cuts what is open.
pub async fn serve(listener: TcpListener, source: Arc<dyn Source>, stop: CancellationToken) {
    let shared = Arc::new(Shared::new(source));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, from)) => {
                let place = shared.admit(from.ip());
                tokio::spawn(connection(Arc::clone(&shared), place, stream));
            }
            // A client that is gone before it was accepted is its own affair.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "metrics: cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    shared.places().iter().for_each(|place| place.end.cancel());
}

impl Shared {
    fn new(source: Arc<dyn Source>) -> Self {
        Self {
            source,
            scrapes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            rendering: Arc::new(Semaphore::new(1)),
            places: Mutex::default(),
        }
    }

    fn places(&self) -> MutexGuard<'_, VecDeque<Arc<Place>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection, if need be that of another.
    fn admit(&self, address: IpAddr) -> Arc<Place> {
        let mut places = self.places();
        if places.len() >= MAX_CONNECTIONS {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let of = |address: IpAddr| places.iter().filter(|place| place.address == address).count();
            let rank = |place: &Place| (of(place.address), !place.heard.load(Ordering::Relaxed));
            // The oldest stand first; of equals the last is the greatest.
            let last = (0..places.len()).rev().max_by_key(|at| rank(&places[*at]));
            if let Some(place) = last.and_then(|at| places.remove(at)) {
                place.end.cancel();
            }
        }
        let (heard, end) = (AtomicBool::new(false), CancellationToken::new());
        let place = Arc::new(Place { address, heard, end });
        places.push_back(Arc::clone(&place));
        place
    }

    fn leave(&self, place: &Arc<Place>) {
        self.places().retain(|other| !Arc::ptr_eq(other, place));
    }

    /// The text, made where it holds up no call.
    async fn text(&self, form: Form) -> Option<Vec<Bytes>> {
        let turn = Arc::clone(&self.rendering).acquire_owned();
        let turn = tokio::time::timeout(RENDER_LIMIT, turn).await.ok()?.ok()?;
        let source = Arc::clone(&self.source);
        let own = Own {
            scrapes: self.scrapes.fetch_add(1, Ordering::Relaxed) + 1,
            refused: self.refused.load(Ordering::Relaxed),
        };
        let making = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let figures: Figures = source.figures();
            render(&figures, own, form)
        });
        tokio::time::timeout(RENDER_LIMIT, making).await.ok()?.ok()
    }
}

async fn connection(shared: Arc<Shared>, place: Arc<Place>, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let service = {
        let (shared, place) = (Arc::clone(&shared), Arc::clone(&place));
        service_fn(move |request: Request<Incoming>| {
            place.heard.store(true, Ordering::Relaxed);
            let shared = Arc::clone(&shared);
            async move { Ok::<_, Infallible>(answer(&shared, &request).await) }
        })
    };
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let in_order = tokio::select! {
        served = tokio::time::timeout(CONNECTION_LIMIT, serving) => matches!(served, Ok(Ok(()))),
        // Counted by who took the place.
        () = place.end.cancelled() => true,
    };
    if !in_order {
        shared.refused.fetch_add(1, Ordering::Relaxed);
        tracing::debug!("metrics: a connection ended early");
    }
    shared.leave(&place);
}

async fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Text> {
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "Allowed: /metrics\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "Allowed: GET, HEAD\n");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let accept: Vec<&str> =
        request.headers().get_all(header::ACCEPT).iter().filter_map(|one| one.to_str().ok()).collect();
    let form = Form::accepted((!accept.is_empty()).then(|| accept.join(",")).as_deref());
    match shared.text(form).await {
        Some(pieces) => respond(StatusCode::OK, form.content_type(), pieces),
        None => {
            tracing::warn!("metrics: the figures were not brought together in time");
            plain(StatusCode::SERVICE_UNAVAILABLE, "The figures were not brought together in time\n")
        }
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Text> {
    respond(status, "text/plain; charset=utf-8", vec![Bytes::from_static(text.as_bytes())])
}

fn respond(status: StatusCode, content_type: &'static str, pieces: Vec<Bytes>) -> Response<Text> {
    let mut response = Response::new(Text(pieces.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The pieces that are still to be sent.
struct Text(VecDeque<Bytes>);

impl Body for Text {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NotAsked;

    impl Source for NotAsked {
        fn figures(&self) -> Figures {
            unreachable!("nobody scrapes in these tests")
        }
    }

    fn from(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn full(addresses: [u8; MAX_CONNECTIONS]) -> (Shared, Vec<Arc<Place>>) {
        let shared = Shared::new(Arc::new(NotAsked));
        let places = addresses.map(|last| shared.admit(from(last)));
        (shared, places.into())
    }

    fn ended(places: &[Arc<Place>]) -> Vec<usize> {
        (0..places.len()).filter(|at| places[*at].end.is_cancelled()).collect()
    }

    #[test]
    fn clients_that_ask_and_do_not_read_keep_nobody_out() {
        let (shared, places) = full([1, 2, 2, 2, 2, 2, 2, 2]);
        places.iter().for_each(|place| place.heard.store(true, Ordering::Relaxed));
        // The one that has one place keeps it, however old it is and whoever comes.
        let newcomer = shared.admit(from(3));
        assert_eq!(ended(&places), [1]);
        let another = shared.admit(from(2));
        assert_eq!(ended(&places), [1, 2]);
        assert!(!newcomer.end.is_cancelled() && !another.end.is_cancelled());
        assert_eq!(shared.places().len(), MAX_CONNECTIONS);
        assert_eq!(shared.refused.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn of_one_address_the_silent_go_first_and_then_the_oldest() {
        let (shared, places) = full([1; MAX_CONNECTIONS]);
        for at in [0, 1, 3, 4, 5, 6, 7] {
            places[at].heard.store(true, Ordering::Relaxed);
        }
        let silent = shared.admit(from(1));
        assert_eq!(ended(&places), [2]);
        silent.heard.store(true, Ordering::Relaxed);
        let _ = shared.admit(from(1));
        assert_eq!(ended(&places), [0, 2]);
    }

    #[test]
    fn of_eight_addresses_the_silent_goes_first() {
        let (shared, places) = full([1, 2, 3, 4, 5, 6, 7, 8]);
        places.iter().filter(|place| place.address != from(6)).for_each(|place| {
            place.heard.store(true, Ordering::Relaxed);
        });
        let _ = shared.admit(from(9));
        assert_eq!(ended(&places), [5]);
    }
}
