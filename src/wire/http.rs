//! One request: who is it, what do they call, what is the answer.
//!
//! All that can be said from the head alone is said before a byte of the body is read: wrong path (404), method
//! (405), coding (411, 415), size (413), credentials (403). Everything after that is answered with status 200
//! and a fault, as the protocol asks.
//!
//! XML-RPC demands a Content-Length, and so do we: `Transfer-Encoding` is refused altogether. That closes
//! request smuggling by the two together, of which hyper would quietly prefer one. Content-Lengths that differ
//! are refused by hyper; equal ones are one.

use super::auth::{Refusal, Shown};
use super::certificate::PeerCertificate;
use super::server::Shared;
use super::upgrade::{self, Upgrading};
use super::watch::{Phase, Watch};
use super::{Answer, Call, Caller, Fault, Identity, Role, decode_call, encode_fault, encode_response};
use crate::model::TraceParent;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

/// The request is no XML-RPC call. Codes as in the specification for interoperable faults.
pub const FAULT_MALFORMED: i32 = -32700;
/// The answer would be longer than the settings allow.
pub const FAULT_TOO_BIG: i32 = -32500;
/// The handler failed in a way that is our mistake.
pub const FAULT_INTERNAL: i32 = -32603;

/// The header that says what a request is done for.
pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A body longer than this is decoded where it holds up no other connection.
const DECODE_INLINE_BYTES: usize = 128 * 1024;
/// Memory taken for a body on the word of its head alone.
const TRUSTED_BODY_BYTES: usize = 64 * 1024;

/// The other end of one connection.
pub(super) struct Peer {
    /// `None` on the operator's socket.
    pub(super) address: Option<SocketAddr>,
    pub(super) own: Option<SocketAddr>,
    pub(super) tls: bool,
    pub(super) certificate: Option<PeerCertificate>,
    /// On the operator's socket: who it is, for every request.
    pub(super) local: Option<Identity>,
}

/// Never fails: whatever goes wrong is an answer too. Begins in [`Phase::Call`]: verifying a password may have to
/// wait its turn, and that is not the client's slowness.
pub(super) async fn serve(
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    watch: Watch,
    connection: Upgrading,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let refused = |refusal: Refused| refusal.response(&watch);
    if let Some(stream) = peer_of(&shared, &peer).and_then(|peer| upgrade::asked(&shared, &peer, &request)) {
        return stream.begin(&connection, watch);
    }
    if let Err(refusal) = check_head(&shared, &request) {
        return refused(refusal);
    }
    let caller = match authenticate(&shared, &peer, request.headers()).await {
        Ok(caller) => caller,
        Err(refusal) => return refused(refuse_caller(&shared, &peer, refusal)),
    };
    let trace = trace_of(request.headers());
    watch.enter(Phase::Body);
    let body = match read_body(request.into_body(), shared.settings.max_body_bytes).await {
        Ok(body) => body,
        Err(refusal) => return refused(refusal),
    };
    watch.enter(Phase::Call);
    shared.metrics.calls.fetch_add(1, Ordering::Relaxed);
    let chunks = match call(&shared, caller, trace, body).await {
        Ok(chunks) => chunks,
        Err(fault) => {
            shared.metrics.faults.fetch_add(1, Ordering::Relaxed);
            vec![encode_fault(&fault)]
        }
    };
    watch.enter(Phase::Answer);
    let mut response = Response::new(AnswerBody::new(chunks, watch));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/xml"));
    response
}

/// The peer at the other end, by its certificate: nobody else is told that streams exist.
fn peer_of(shared: &Shared, peer: &Peer) -> Option<String> {
    match shared.gate.whose(peer.certificate.as_ref()?) {
        Shown::Peer(fingerprint) => Some(fingerprint),
        Shown::Owner | Shown::Nobody => None,
    }
}

/// A request answered without a look at its body.
struct Refused {
    status: StatusCode,
    text: &'static str,
}

impl Refused {
    fn new(status: StatusCode, text: &'static str) -> Self {
        Self { status, text }
    }

    fn response(self, watch: &Watch) -> Response<AnswerBody> {
        watch.enter(Phase::Answer);
        let body = AnswerBody::new(vec![Bytes::from_static(self.text.as_bytes())], watch.clone());
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        // Where the body of a refused request ends is nobody's business.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(header::ALLOW, HeaderValue::from_static("POST"));
        }
        response
    }
}

fn check_head(shared: &Shared, request: &Request<Incoming>) -> Result<(), Refused> {
    if !matches!(request.uri().path(), "" | "/" | "/RPC2" | "/api/3" | "/api/3/") {
        return Err(Refused::new(StatusCode::NOT_FOUND, "Allowed: /RPC2\n"));
    }
    if request.method() != Method::POST {
        return Err(Refused::new(StatusCode::METHOD_NOT_ALLOWED, "Allowed: POST\n"));
    }
    let headers = request.headers();
    let coded = |value: &HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    if headers.get_all(header::CONTENT_ENCODING).iter().any(coded) {
        return Err(Refused::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Allowed: no Content-Encoding\n"));
    }
    if headers.contains_key(header::TRANSFER_ENCODING) || !headers.contains_key(header::CONTENT_LENGTH) {
        return Err(Refused::new(StatusCode::LENGTH_REQUIRED, "Allowed: a body with Content-Length\n"));
    }
    let length = request.body().size_hint().exact().unwrap_or(u64::MAX);
    if length > shared.settings.max_body_bytes as u64 {
        return Err(Refused::new(StatusCode::PAYLOAD_TOO_LARGE, "The body is too large\n"));
    }
    Ok(())
}

async fn authenticate(shared: &Shared, peer: &Peer, headers: &HeaderMap) -> Result<Caller, Refusal> {
    let caller =
        |identity, role| Caller { identity, role, address: peer.address, own: peer.own, tls: peer.tls };
    if let Some(identity) = &peer.local {
        return Ok(caller(identity.clone(), Role::Admin));
    }
    if let Some(certificate) = &peer.certificate {
        match shared.gate.whose(certificate) {
            Shown::Owner => {
                let fingerprint = certificate.fingerprint.clone();
                return Ok(caller(Identity::Owner { fingerprint }, Role::Admin));
            }
            Shown::Peer(fingerprint) => return Ok(caller(Identity::Peer { fingerprint }, Role::Peer)),
            Shown::Nobody => {}
        }
    }
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(authorization), None, Some(address)) = (given.next(), given.next(), peer.address) else {
        return Err(Refusal::Unauthorized);
    };
    let role = match shared.gate.known(authorization.as_bytes()) {
        Some(role) => role,
        None => shared.gate.password(address.ip(), authorization.as_bytes()).await?,
    };
    Ok(caller(Identity::Password, role))
}

/// The one `traceparent` header, if it is of that form. Any other is as good as none, as the W3C asks.
fn trace_of(headers: &HeaderMap) -> Option<TraceParent> {
    let mut given = headers.get_all(TRACEPARENT).iter();
    let (Some(text), None) = (given.next(), given.next()) else { return None };
    TraceParent::parse(text.to_str().ok()?).ok()
}

fn refuse_caller(shared: &Shared, peer: &Peer, refusal: Refusal) -> Refused {
    shared.metrics.unauthorized.fetch_add(1, Ordering::Relaxed);
    let address = peer.address.map(tracing::field::display);
    match refusal {
        Refusal::Busy => {
            tracing::warn!(address, "too many passwords wait to be verified; a caller is sent away");
            Refused::new(StatusCode::SERVICE_UNAVAILABLE, "Too many logins at once, try again\n")
        }
        Refusal::Unauthorized | Refusal::Throttled => {
            // The words that log watchers of the dialect look for.
            let throttled = refusal == Refusal::Throttled;
            tracing::warn!(address, throttled, "Unauthorized access attempt");
            Refused::new(StatusCode::FORBIDDEN, "Unauthorized\n")
        }
    }
}

async fn read_body(mut body: Incoming, max_bytes: usize) -> Result<Bytes, Refused> {
    let length = usize::try_from(body.size_hint().exact().unwrap_or(0)).unwrap_or(max_bytes);
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Refused::new(StatusCode::BAD_REQUEST, "The body broke off\n"))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if whole.is_empty() && data.len() == length {
            return Ok(data);
        }
        if whole.len() + data.len() > max_bytes {
            return Err(Refused::new(StatusCode::PAYLOAD_TOO_LARGE, "The body is too large\n"));
        }
        if whole.is_empty() {
            whole.reserve(length.min(TRUSTED_BODY_BYTES));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

async fn call(
    shared: &Arc<Shared>,
    caller: Caller,
    trace: Option<TraceParent>,
    body: Bytes,
) -> Result<Vec<Bytes>, Fault> {
    let decoded = if body.len() <= DECODE_INLINE_BYTES {
        decode_call(&body, &shared.settings)
    } else {
        let shared = shared.clone();
        let decoding = tokio::task::spawn_blocking(move || decode_call(&body, &shared.settings));
        decoding.await.map_err(|_| internal())?
    };
    let (method, params) =
        decoded.map_err(|error| fault(FAULT_MALFORMED, format!("MALFORMED_REQUEST: {error}")))?;
    let name = method.clone();
    // A panic is a mistake of ours in one verb; the other callers are not to suffer for it. Inside the future,
    // because a handler may also panic before it has made one.
    let answering =
        AssertUnwindSafe(async { shared.handler.call(Call { method, params, caller, trace }).await });
    let answer: Answer = match answering.catch_unwind().await {
        Ok(answer) => answer?,
        Err(_) => {
            tracing::error!(method = name, "a handler panicked");
            return Err(internal());
        }
    };
    encode_response(&answer, shared.settings.max_answer_bytes)
        .map_err(|error| fault(FAULT_TOO_BIG, format!("ANSWER_TOO_BIG: {error}")))
}

fn internal() -> Fault {
    fault(
        FAULT_INTERNAL,
        "INTERNAL: the call failed by a mistake of the agent, which is in its log".to_owned(),
    )
}

fn fault(fault_code: i32, fault_string: String) -> Fault {
    Fault { fault_code, fault_string }
}

/// The pieces of an answer, sent from where they are.
pub(super) struct AnswerBody {
    chunks: VecDeque<Bytes>,
    left: u64,
    watch: Watch,
}

impl AnswerBody {
    pub(super) fn new(chunks: Vec<Bytes>, watch: Watch) -> Self {
        let left = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        Self { chunks: chunks.into(), left, watch }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let chunk = self.chunks.pop_front();
        self.left -= chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
        Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.chunks.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// hyper drops the body when it has buffered the last of it.
impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.watch.answer_written();
    }
}
