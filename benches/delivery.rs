//! What delivery to a manager takes: `cargo bench --bench delivery`.
//!
//! A store on disk, its event log, and both streams as in the daemon; a receiver beside it in this process, with real TLS
//! that demands our certificate. From an event's commit to the receiver's hand at 1,000 events a second; and a backlog of
//! 100,000 events. Beside the latter the same bytes posted by nothing but the TLS client, so that the figure says how
//! much of the time is ours.
#![allow(clippy::unwrap_used, reason = "a bench: a failure shall stop it")]
#![allow(clippy::explicit_write, reason = "println is for what must never print")]

use bytes::Bytes;
use dom0d::config;
use dom0d::event::{Event, Log, kind};
use dom0d::manager::{Deliveries, EventSource, Outbox, Parts, RealConnect, SampleSource, Stream, Target};
use dom0d::model::{Secret, Timestamp};
use dom0d::store::{self, Store, Txn};
use dom0d::wire::{Destination, Poster, ServerTrust, TlsIdentity};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::PrivateKeyDer;
use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const RATE: u64 = 1000;
const SECONDS: u64 = 20;
const BACKLOG: u64 = 100_000;
const LATENCY_BAR: Duration = Duration::from_millis(50);
const DRAIN_BAR: f64 = 20_000.0;

fn main() {
    // Without it we were only built, with all other targets.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    // The receiver is another machine in life: it has threads of its own.
    let theirs = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let ours = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let receiver = theirs.block_on(Receiver::start());
    ours.block_on(latency(&receiver));
    ours.block_on(backlog(&receiver));
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap();
}

/// When each number came, and what came.
#[derive(Default)]
struct Book {
    came: Vec<(u64, Instant)>,
    bodies: Vec<Bytes>,
}

struct Receiver {
    address: SocketAddr,
    der: Vec<u8>,
    book: Arc<Mutex<Book>>,
}

fn identity() -> (rcgen::Certificate, rcgen::KeyPair) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    (params.self_signed(&key).unwrap(), key)
}

impl Receiver {
    async fn start() -> Self {
        let (certificate, key) = identity();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let book: Arc<Mutex<Book>> = Arc::default();
        let writing = Arc::clone(&book);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let (acceptor, book) = (acceptor.clone(), Arc::clone(&writing));
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service =
                        hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                            let book = Arc::clone(&book);
                            async move { take(&book, request).await }
                        });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, der: certificate.der().to_vec(), book }
    }

    fn came(&self) -> usize {
        self.book.lock().unwrap().came.len()
    }

    fn take(&self) -> Book {
        std::mem::take(&mut *self.book.lock().unwrap())
    }

    fn target(&self) -> Target {
        Target {
            manager: "bench".to_owned(),
            since: Timestamp(0),
            taken: Timestamp(0),
            from_event: Some(0),
            source: "urn:uuid:0".to_owned(),
            event_url: Some(format!("https://{}/events", self.address)),
            statistic_url: None,
            pin: Some(self.der.clone()),
            identity: Ok(shown()),
        }
    }
}

/// What we show.
fn shown() -> TlsIdentity {
    let (certificate, key) = identity();
    TlsIdentity { chain_pem: certificate.pem(), key_pem: Secret::new(key.serialize_pem()) }
}

/// All numbers of a body, without a JSON reader: the receiver is not what is measured.
fn numbers(body: &[u8]) -> Vec<u64> {
    const MARK: &[u8] = b"\"sequence\":\"";
    let mut found = Vec::new();
    let mut rest = body;
    while let Some(at) = rest.windows(MARK.len()).position(|here| here == MARK) {
        rest = &rest[at + MARK.len()..];
        let end = rest.iter().position(|c| *c == b'"').unwrap();
        found.push(std::str::from_utf8(&rest[..end]).unwrap().parse().unwrap());
    }
    found
}

async fn take(
    book: &Mutex<Book>,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let now = Instant::now();
    let numbers = numbers(&body);
    let mut book = book.lock().unwrap();
    book.came.extend(numbers.into_iter().map(|number| (number, now)));
    book.bodies.push(body);
    Ok(Response::builder().status(204).body(Empty::new()).unwrap())
}

/// A store on disk with the two streams on it.
async fn agent(folder: &tempfile::TempDir) -> (Store, Log, Deliveries) {
    let options = store::Options::new(folder.path());
    let store = tokio::task::spawn_blocking(move || Store::open(options)).await.unwrap().unwrap().store;
    let log = Log::open(store.clone(), &config::Events { history: 200_000 }).await.unwrap();
    let parts = Parts {
        store: store.clone(),
        log: log.clone(),
        settings: config::Manager::default(),
        connect: Arc::new(RealConnect),
        stop: CancellationToken::new(),
    };
    let (id, us) = (log.stream().to_owned(), "urn:uuid:0".to_owned());
    let events = Arc::new(EventSource::new(log.clone(), id.clone(), us.clone()));
    let samples = Arc::new(SampleSource::new(Arc::new(Outbox::default()), id, us));
    (store, log, Deliveries::start(parts, events, samples))
}

fn event(n: u64) -> Event {
    Event::new(kind::VM_STARTED, format!("vm/{n}"), format!("VM web{n} started on this host"))
        .with("vcpus", 4)
}

async fn latency(receiver: &Receiver) {
    let folder = tempfile::tempdir().unwrap();
    let (store, log, deliveries) = agent(&folder).await;
    deliveries.set_target(Some(receiver.target()));
    let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
    let mut publishing = tokio::task::JoinSet::new();
    for n in 0..RATE * SECONDS {
        ticks.tick().await;
        let log = log.clone();
        publishing.spawn(async move {
            let number = log.publish(&event(n)).await.unwrap().unwrap();
            (number.0, Instant::now())
        });
    }
    let committed = publishing.join_all().await;
    let patience = Instant::now() + Duration::from_secs(60);
    while receiver.came() < committed.len() {
        assert!(Instant::now() < patience, "not all came");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let book = receiver.take();
    let came: std::collections::HashMap<u64, Instant> = book.came.iter().rev().copied().collect();
    let mut late: Vec<Duration> =
        committed.iter().map(|(number, at)| came[number].saturating_duration_since(*at)).collect();
    late.sort();
    let part = |per_mille: usize| late[(late.len() - 1) * per_mille / 1000].as_secs_f64() * 1e3;
    say(&format!(
        "committed to received, {RATE} events/s for {SECONDS} s: p50 {:.1} ms, p99 {:.1} ms, worst {:.1} ms in {} posts (bar: p99 {} ms)",
        part(500),
        part(990),
        part(1000),
        book.bodies.len(),
        LATENCY_BAR.as_millis()
    ));
    deliveries.set_target(None);
    store.close().await;
}

async fn backlog(receiver: &Receiver) {
    let folder = tempfile::tempdir().unwrap();
    let (store, log, deliveries) = agent(&folder).await;
    for first in (0..BACKLOG).step_by(1000) {
        let mut txn = Txn::new();
        (first..first + 1000).for_each(|n| event(n).append_to(&mut txn));
        store.commit(txn).await.unwrap();
    }
    assert_eq!(log.last().0, BACKLOG);
    let began = Instant::now();
    deliveries.set_target(Some(receiver.target()));
    let all_taken =
        || deliveries.status().iter().any(|(s, told)| *s == Stream::Events && told.number >= BACKLOG);
    while !all_taken() {
        assert!(began.elapsed() < Duration::from_secs(120), "not all came: {:?}", deliveries.status());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let took = began.elapsed();
    let book = receiver.take();
    assert!(book.came.iter().map(|(number, _)| *number).eq(1..=BACKLOG), "in order, and each once");
    let bytes: usize = book.bodies.iter().map(Bytes::len).sum();
    let bare = bare(receiver, &book.bodies).await;
    let a_second = BACKLOG as f64 / took.as_secs_f64();
    say(&format!(
        "backlog of {BACKLOG} events, {} KiB in {} posts: {:.0} events/s, {:.2} s (bar {DRAIN_BAR} events/s); the same bodies posted bare {:.2} s: {:.1} times",
        bytes / 1024,
        book.bodies.len(),
        a_second,
        took.as_secs_f64(),
        bare.as_secs_f64(),
        took.as_secs_f64() / bare.as_secs_f64()
    ));
    deliveries.set_target(None);
    store.close().await;
}

async fn bare(receiver: &Receiver, bodies: &[Bytes]) -> Duration {
    let mut poster = Poster::new(Destination {
        host: "127.0.0.1".to_owned(),
        port: receiver.address.port(),
        path: "/events".to_owned(),
        trust: Some(ServerTrust::Pinned { der: receiver.der.clone() }),
        identity: Some(shown()),
    })
    .unwrap();
    let began = Instant::now();
    for body in bodies {
        poster.post("application/json", &[], body.clone(), Duration::from_secs(30)).await.unwrap();
    }
    began.elapsed()
}
