//! Both streams together, as the rest of the house sees them.

use super::cloudevents::{self, Body};
use super::cursor::Learned;
use super::runner::{Runner, State, Status};
use super::source::{Source, Stream};
use super::target::{Target, Wanted};
use crate::config;
use crate::event::Log;
use crate::model::Timestamp;
use crate::store::Store;
use crate::wire::{Destination, PostError, Poster};
use async_trait::async_trait;
use bytes::Bytes;
use hyper::header::{HeaderName, HeaderValue};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The way to a manager.
#[async_trait]
pub trait Carrier: Send {
    /// `Ok`: the other end has taken it.
    async fn post(
        &mut self,
        content_type: &'static str,
        trace: Option<&str>,
        body: Bytes,
        patience: Duration,
    ) -> Result<(), PostError>;
}

/// Makes ways. Tests in virtual time have one of their own.
pub trait Connect: Send + Sync + 'static {
    fn open(&self, destination: Destination) -> Result<Box<dyn Carrier>, PostError>;
}

/// Real ones: HTTPS.
pub struct RealConnect;

impl Connect for RealConnect {
    fn open(&self, destination: Destination) -> Result<Box<dyn Carrier>, PostError> {
        Ok(Box::new(Poster::new(destination)?))
    }
}

#[async_trait]
impl Carrier for Poster {
    async fn post(
        &mut self,
        content_type: &'static str,
        trace: Option<&str>,
        body: Bytes,
        patience: Duration,
    ) -> Result<(), PostError> {
        let trace = trace.and_then(|trace| HeaderValue::from_str(trace).ok());
        let headers: Vec<_> = trace.map(|trace| (TRACEPARENT, trace)).into_iter().collect();
        Poster::post(self, content_type, &headers, body, patience).await
    }
}

/// What both streams need.
pub struct Parts {
    pub store: Store,
    pub log: Log,
    pub settings: config::Manager,
    pub connect: Arc<dyn Connect>,
    pub stop: CancellationToken,
}

struct Line {
    stream: Stream,
    source: Arc<dyn Source>,
    status: Arc<Mutex<Status>>,
    kick: Arc<Notify>,
}

/// What a test of one stream has found.
#[derive(Debug, Clone)]
pub struct Probe {
    pub stream: Stream,
    pub url: Option<String>,
    pub took: Duration,
    pub outcome: Result<(), String>,
}

/// The deliveries. Dropped, they end.
pub struct Deliveries {
    parts: Arc<Parts>,
    targets: watch::Sender<Wanted>,
    lines: Vec<Line>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Deliveries {
    /// Starts both streams, which wait for a target.
    pub fn start(parts: Parts, events: Arc<dyn Source>, statistics: Arc<dyn Source>) -> Self {
        let parts = Arc::new(parts);
        let learning = Arc::default();
        let targets = watch::Sender::new(Wanted::Unknown);
        let (mut lines, mut tasks) = (Vec::new(), Vec::new());
        for (stream, source) in [(Stream::Events, events), (Stream::Statistics, statistics)] {
            let line = Line { stream, source, status: Arc::default(), kick: Arc::default() };
            let runner = Runner {
                stream,
                source: Arc::clone(&line.source),
                parts: Arc::clone(&parts),
                learning: Arc::clone(&learning),
                targets: targets.subscribe(),
                status: Arc::clone(&line.status),
                kick: Arc::clone(&line.kick),
                moved: Mutex::default(),
            };
            tasks.push(tokio::spawn(runner.run()));
            lines.push(line);
        }
        Self { parts, targets, lines, tasks: Mutex::new(tasks) }
    }

    /// After the stop: waits, not for long, until both have written down how far they are.
    pub async fn ended(&self) {
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            let _ = tokio::time::timeout(Duration::from_secs(2), task).await;
        }
    }

    /// From now on to this manager; `None`: to nobody.
    pub fn set_target(&self, target: Option<Target>) {
        let wanted = target.map_or(Wanted::Nobody, |target| Wanted::Manager(Arc::new(target)));
        self.targets.send_replace(wanted);
    }

    pub fn target(&self) -> Option<Arc<Target>> {
        match &*self.targets.borrow() {
            Wanted::Manager(target) => Some(Arc::clone(target)),
            Wanted::Unknown | Wanted::Nobody => None,
        }
    }

    /// Each stream's state.
    pub fn status(&self) -> Vec<(Stream, Status)> {
        let told = |line: &Line| {
            let status = line.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let behind = if status.state == State::Unset { 0 } else { line.source.behind(status.number) };
            Status { newest: line.source.newest(), behind, ..status }
        };
        self.lines.iter().map(|line| (line.stream, told(line))).collect()
    }

    /// A stream that waits tries at once.
    pub fn try_now(&self) {
        for line in &self.lines {
            line.kick.notify_waiters();
        }
    }

    /// Sends a word to each stream's URL that asks for nothing, and tells what became of it.
    pub async fn probe(&self) -> Vec<Probe> {
        let Some(target) = self.target() else { return Vec::new() };
        let mut probes = Vec::new();
        for line in &self.lines {
            let begun = Instant::now();
            let outcome = self.probe_one(&target, line).await;
            let url = target.url(line.stream).map(str::to_owned);
            probes.push(Probe { stream: line.stream, url, took: begun.elapsed(), outcome });
        }
        self.try_now();
        probes
    }

    async fn probe_one(&self, target: &Target, line: &Line) -> Result<(), String> {
        let url = target.url(line.stream).ok_or("the manager gave no URL for it")?;
        let learned =
            Learned::load(&self.parts.store, target, url).await.map_err(|error| error.to_string())?;
        let learned = learned.as_ref().map(|learned| learned.sha256.as_str());
        let settings = &self.parts.settings;
        let (destination, _) =
            target.destination(url, settings, learned).map_err(|error| error.to_string())?;
        let mut carrier = self.parts.connect.open(destination).map_err(|error| error.to_string())?;
        let mut body = Body::new(&target.source, "test");
        body.test(line.stream, Timestamp::now());
        let patience = Duration::from_millis(settings.post_timeout_ms);
        let posted = carrier.post(cloudevents::CONTENT_TYPE, None, body.finish(), patience).await;
        posted.map_err(|error| error.to_string())
    }
}
