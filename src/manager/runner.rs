//! One stream's task: reads a batch, sends it until it was taken, moves the cursor, tells of trouble.
//!
//! While a batch is on its way the next one is read. The cursor is written at most once a second, and when there is
//! nothing more to send: what a death forgets comes twice, with the same ids.

use super::cloudevents;
use super::cursor::{Cursor, Learned, Told};
use super::deliveries::{Carrier, Parts};
use super::pace::Pace;
use super::source::{Batch, Gap, Source, SourceError, Stream};
use super::target::{Place, Seen, Target};
use crate::event::{Event, Kind, kind};
use crate::model::Timestamp;
use crate::store::{StoreError, Txn};
use crate::wire::PostError;
use futures_util::future::{BoxFuture, FutureExt};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Between two writings of a cursor that moves on.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// A manager that could not be reached for so long is told of.
const TELL_AFTER: Duration = Duration::from_secs(60);
/// Between two tries if our own store does not answer.
const OWN_TROUBLE: Duration = Duration::from_secs(5);

/// What a stream is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// No manager, or none that gave a URL.
    #[default]
    Unset,
    /// All was taken.
    Idle,
    Sending,
    /// The last try failed; there will be another.
    Waiting,
    /// It cannot be tried as things are set.
    Refused,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unset => "unset",
            Self::Idle => "idle",
            Self::Sending => "sending",
            Self::Waiting => "waiting",
            Self::Refused => "refused",
        }
    }
}

/// A stream, for people.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub state: State,
    pub url: String,
    /// The last number that the manager took.
    pub number: u64,
    /// Items and batches taken since the agent's start; tries that failed since then, and in a row.
    pub items: u64,
    pub batches: u64,
    pub failed: u64,
    pub failures: u32,
    pub last_ok: Option<Timestamp>,
    pub last_error: String,
    pub next_try: Option<Timestamp>,
    /// The number of the newest item, and how many wait.
    pub newest: u64,
    pub behind: u64,
    /// Gap records that were taken, and the last one of them.
    pub gaps: u64,
    pub last_gap: Option<Gap>,
    /// The certificate that was seen first, of a manager that gave none.
    pub learned: Option<String>,
}

pub(super) struct Runner {
    pub stream: Stream,
    pub source: Arc<dyn Source>,
    pub parts: Arc<Parts>,
    pub targets: watch::Receiver<Option<Arc<Target>>>,
    pub status: Arc<Mutex<Status>>,
    /// Try now.
    pub kick: Arc<Notify>,
    /// The cursor as it moved on in this life, which may be further than what is on disk.
    pub moved: Mutex<Option<Cursor>>,
}

/// One manager's delivery.
struct Delivery<'a> {
    runner: &'a Runner,
    target: &'a Target,
    url: &'a str,
    cursor: Cursor,
    pace: Pace,
    /// When the cursor is to be written.
    save_at: Option<Instant>,
    saved: Option<Instant>,
    failing_since: Option<Instant>,
}

type Fetch<'a> = BoxFuture<'a, Result<Batch, SourceError>>;

impl Runner {
    /// Until the agent stops.
    pub(super) async fn run(mut self) {
        let stop = self.parts.stop.clone();
        loop {
            let target = self.targets.borrow_and_update().clone();
            let mut targets = self.targets.clone();
            tokio::select! {
                () = self.serve(target) => {}
                changed = targets.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return self.save().await,
            }
        }
    }

    /// In order, nothing comes twice after the next start.
    async fn save(&self) {
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(cursor) = moved
            && let Err(error) = cursor.save(&self.parts.store, self.stream).await
        {
            tracing::warn!(stream = self.stream.as_str(), %error, "the cursor is not saved; some will be sent twice");
        }
    }

    /// Delivers to this target until it is another; never ends by itself.
    async fn serve(&self, target: Option<Arc<Target>>) {
        let Some((target, url)) =
            target.as_deref().and_then(|target| Some((target, target.url(self.stream)?)))
        else {
            self.tell(|status| *status = Status::default());
            return std::future::pending().await;
        };
        loop {
            match Delivery::begin(self, target, url).await {
                Ok(mut delivery) => {
                    delivery.go().await;
                }
                Err(error) => {
                    tracing::warn!(stream = self.stream.as_str(), error, "delivery does not begin");
                    self.tell(|status| error.clone_into(&mut status.last_error));
                }
            }
            tokio::time::sleep(OWN_TROUBLE).await;
        }
    }

    fn tell(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }

    async fn publish(&self, event: Event, cursor: &Cursor, mut txn: Txn) -> Result<(), StoreError> {
        *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = Some(cursor.clone());
        cursor.put(&mut txn, self.stream);
        self.parts.log.publish_with(&event, txn).await.map(drop)
    }
}

impl<'a> Delivery<'a> {
    async fn begin(runner: &'a Runner, target: &'a Target, url: &'a str) -> Result<Self, String> {
        let moved = runner.moved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let stored = match moved {
            Some(moved) => Some(moved),
            None => Cursor::load(&runner.parts.store, runner.stream).await.map_err(|e| e.to_string())?,
        };
        let same = |cursor: &Cursor| cursor.manager == target.manager && cursor.since == target.since;
        let cursor = match stored.filter(same) {
            Some(cursor) => cursor,
            None => {
                let number = runner.source.start(target.since).await.map_err(|e| e.to_string())?;
                let cursor = Cursor::new(&target.manager, target.since, number);
                cursor.save(&runner.parts.store, runner.stream).await.map_err(|e| e.to_string())?;
                cursor
            }
        };
        runner.tell(|status| {
            status.state = State::Idle;
            url.clone_into(&mut status.url);
            status.number = cursor.number;
        });
        let (pace, saved) = (Pace::default(), None);
        Ok(Self { runner, target, url, cursor, pace, save_at: None, saved, failing_since: None })
    }

    /// Ends only for a trouble of our own.
    async fn go(&mut self) {
        loop {
            let learned = match self.learned().await {
                Ok(learned) => learned.map(|learned| learned.sha256),
                Err(error) => {
                    tracing::warn!(stream = self.runner.stream.as_str(), %error, "delivery pauses");
                    return;
                }
            };
            self.runner.tell(|status| status.learned.clone_from(&learned));
            let settings = &self.runner.parts.settings;
            let opened = match self.target.destination(self.url, settings, learned.as_deref()) {
                Ok((destination, seen)) => match self.runner.parts.connect.open(destination) {
                    Ok(carrier) => Ok((carrier, seen)),
                    Err(error) => Err(error.to_string()),
                },
                Err(error) => Err(error.to_string()),
            };
            let (carrier, seen) = match opened {
                Ok(opened) => opened,
                Err(why) => {
                    tracing::warn!(
                        stream = self.runner.stream.as_str(),
                        url = self.url,
                        why,
                        "nothing is delivered"
                    );
                    self.runner.tell(|status| {
                        status.state = State::Refused;
                        status.last_error = why;
                    });
                    return std::future::pending().await;
                }
            };
            if let Err(error) = self.with(carrier, seen).await {
                tracing::warn!(stream = self.runner.stream.as_str(), %error, "delivery pauses");
                self.runner.tell(|status| status.last_error = error.to_string());
                return;
            }
        }
    }

    /// `Ok`: the carrier is to be made anew.
    async fn with(
        &mut self,
        mut carrier: Box<dyn Carrier>,
        mut seen: Option<Seen>,
    ) -> Result<(), SourceError> {
        let source = Arc::clone(&self.runner.source);
        let patience = Duration::from_millis(self.runner.parts.settings.post_timeout_ms);
        let mut fetch = source.next(self.cursor.number, self.pace.limit());
        loop {
            let batch = self.wait(&mut fetch).await?;
            self.runner.tell(|status| status.state = State::Sending);
            // Read while this one is on its way, and once, however often this one is sent.
            fetch = source.next(batch.last, self.pace.limit());
            let mut ready = None;
            let taken = loop {
                let trace = batch.trace.as_deref();
                let posting = carrier.post(cloudevents::CONTENT_TYPE, trace, batch.body.clone(), patience);
                match beside(posting, &mut fetch, &mut ready).await {
                    Ok(()) => break true,
                    Err(error) => {
                        if self.failed(&error, batch.items).await? || batch.gap.is_some() {
                            break false;
                        }
                    }
                }
            };
            if !taken {
                // Less at once; or a gap, which may have grown meanwhile and is told once.
                fetch = source.next(self.cursor.number, self.pace.limit());
                continue;
            }
            let more = ready.is_some();
            if let Some(read) = ready {
                fetch = std::future::ready(read).boxed();
            }
            self.taken(&batch, more).await?;
            if let Some(seen) = seen.take() {
                self.learn(&seen).await?;
                return Ok(());
            }
        }
    }

    /// The next batch; writes the cursor meanwhile when it is time.
    async fn wait(&mut self, fetch: &mut Fetch<'_>) -> Result<Batch, SourceError> {
        loop {
            let save_at = self.save_at;
            let due = async move {
                match save_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = due => self.save().await?,
                batch = &mut *fetch => return batch,
            }
        }
    }

    fn moved(&self) {
        *self.runner.moved.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.cursor.clone());
    }

    async fn save(&mut self) -> Result<(), SourceError> {
        self.cursor.save(&self.runner.parts.store, self.runner.stream).await.map_err(own)?;
        (self.save_at, self.saved) = (None, Some(Instant::now()));
        Ok(())
    }

    async fn taken(&mut self, batch: &Batch, more: bool) -> Result<(), SourceError> {
        self.cursor.number = batch.last;
        self.moved();
        self.pace.taken();
        self.failing_since = None;
        let items = u64::try_from(batch.items).unwrap_or(u64::MAX);
        self.runner.tell(|status| {
            status.state = if more { State::Sending } else { State::Idle };
            status.number = batch.last;
            status.items += items;
            status.batches += 1;
            status.failures = 0;
            status.last_ok = Some(Timestamp::now());
            status.next_try = None;
            status.last_error.clear();
            if let Some(gap) = batch.gap {
                (status.gaps, status.last_gap) = (status.gaps + 1, Some(gap));
            }
        });
        if self.cursor.told != Told::Nothing {
            self.cursor.told = Told::Nothing;
            let event = self.event(kind::MANAGER_REACHABLE, "the manager takes what is sent again");
            self.runner.publish(event, &self.cursor, Txn::new()).await.map_err(own)?;
            (self.save_at, self.saved) = (None, Some(Instant::now()));
            return Ok(());
        }
        let now = Instant::now();
        let at = self.saved.map_or(now, |saved| saved + SAVE_EVERY);
        // Nothing more to send: a quiet moment to write, but no oftener than the rest.
        self.save_at = Some(at.max(now));
        if at <= now && !more {
            self.save().await?;
        }
        Ok(())
    }

    /// Waits for the next try. Whether it is to be a smaller one.
    async fn failed(&mut self, error: &PostError, items: usize) -> Result<bool, SourceError> {
        let too_much = matches!(error, PostError::Timeout(_) | PostError::Status(413));
        let wait = self.pace.failed(too_much, items, chance());
        let now = Timestamp::now();
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.runner.tell(|status| {
            status.state = State::Waiting;
            status.failed += 1;
            status.failures = self.pace.failures();
            status.last_error = error.to_string();
            status.next_try = Some(Timestamp(now.0.saturating_add(wait_ms)));
        });
        tracing::debug!(stream = self.runner.stream.as_str(), url = self.url, %error, wait_ms, "a batch was not taken");
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let impostor = matches!(error, PostError::Certificate(_));
        let trouble = match impostor {
            true => Told::Refused,
            false if since.elapsed() >= TELL_AFTER => Told::Unreachable,
            false => Told::Nothing,
        };
        if trouble > self.cursor.told {
            self.cursor.told = trouble;
            let text = format!("{} are not delivered to {}: {error}", self.runner.stream.as_str(), self.url);
            let event = match impostor {
                true => self.event(kind::MANAGER_REFUSED, &text),
                false => self.event(kind::MANAGER_UNREACHABLE, &text),
            };
            tracing::warn!(stream = self.runner.stream.as_str(), url = self.url, %error, "the manager is not reached");
            self.runner.publish(event, &self.cursor, Txn::new()).await.map_err(own)?;
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = self.runner.kick.notified() => {}
        }
        Ok(too_much)
    }

    fn place(&self) -> String {
        Place::parse(self.url).map(|place| place.authority()).unwrap_or_default()
    }

    async fn learned(&self) -> Result<Option<Learned>, SourceError> {
        let owner = (self.target.manager.as_str(), self.target.since);
        Learned::load(&self.runner.parts.store, &self.place(), owner).await.map_err(own)
    }

    /// The certificate that was seen at the first connection is the only one from now on, unless the other stream has
    /// seen one before.
    async fn learn(&mut self, seen: &Seen) -> Result<(), SourceError> {
        let Some(sha256) = seen.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return Ok(()) };
        if self.learned().await?.is_some() {
            return Ok(());
        }
        let text = format!(
            "the manager gave no certificate; the one seen at {} is pinned from now on: SHA-256 {sha256}",
            self.url
        );
        let learned = Learned { sha256, manager: self.target.manager.clone(), since: self.target.since };
        let mut txn = Txn::new();
        learned.put(&mut txn, &self.place());
        let event = self.event(kind::MANAGER_CERTIFICATE_LEARNED, &text);
        self.runner.publish(event, &self.cursor, txn).await.map_err(own)
    }

    fn event(&self, kind: Kind, text: &str) -> Event {
        Event::new(kind, format!("manager/{}", self.runner.stream.as_str()), text)
    }
}

/// Posts, and meanwhile reads what comes next, if that is not read yet.
async fn beside(
    posting: impl Future<Output = Result<(), PostError>>,
    fetch: &mut Fetch<'_>,
    ready: &mut Option<Result<Batch, SourceError>>,
) -> Result<(), PostError> {
    tokio::pin!(posting);
    loop {
        tokio::select! {
            outcome = &mut posting => return outcome,
            read = &mut *fetch, if ready.is_none() => *ready = Some(read),
        }
    }
}

fn own(error: StoreError) -> SourceError {
    SourceError(format!("the cursor cannot be written: {error}"))
}

/// From 0 to below 1, by chance.
fn chance() -> f64 {
    let bits = uuid::Uuid::new_v4().as_u64_pair().0 >> 32;
    let part = u32::try_from(bits).unwrap_or(0);
    f64::from(part) / (f64::from(u32::MAX) + 1.0)
}
