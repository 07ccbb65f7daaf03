//! One stream's task: reads a batch, sends it until it was taken, moves the cursor, tells of trouble.
//!
//! While a batch is on its way the next one is read. The cursor is written at most once a second, and when there is
//! nothing more to send: what a death forgets comes twice, with the same ids.

use super::cloudevents;
use super::cursor::{Cursor, Learned, Told};
use super::deliveries::{Carrier, Parts};
use super::pace::Pace;
use super::source::{Batch, Gap, Source, SourceError, Stream};
use super::target::{Seen, Target, Wanted};
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
pub(super) const SAVE_EVERY: Duration = Duration::from_secs(1);
/// A manager that could not be reached for so long is told of.
const TELL_AFTER: Duration = Duration::from_secs(60);
/// After a batch of few items the next one begins no sooner than this after it, so that a busy stream is not a POST an
/// item.
const GATHER: Duration = Duration::from_millis(10);
const FEW: usize = 100;
/// After so many failures in a row less is sent at once.
const STUBBORN: u32 = 3;
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
    /// When delivery to this place began in this life.
    pub begun: Option<Timestamp>,
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
    /// Held while it is decided which certificate a manager is known by.
    pub learning: Arc<tokio::sync::Mutex<()>>,
    pub targets: watch::Receiver<Wanted>,
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

    /// Delivers to whom it is wanted until that is another; never ends by itself.
    async fn serve(&self, wanted: Wanted) {
        let target = match &wanted {
            Wanted::Unknown => return std::future::pending().await,
            Wanted::Nobody => None,
            Wanted::Manager(target) => Some(&**target),
        };
        let Some((target, url)) = target.and_then(|target| Some((target, target.url(self.stream)?))) else {
            self.tell(|status| *status = Status::default());
            while let Err(error) = self.leave().await {
                tracing::warn!(
                    stream = self.stream.as_str(),
                    error,
                    "a manager that was left is not told of"
                );
                tokio::time::sleep(OWN_TROUBLE).await;
            }
            return std::future::pending().await;
        };
        loop {
            match Delivery::begin(self, target, url).await {
                Ok(mut delivery) => {
                    delivery.go().await;
                }
                Err(error) => {
                    tracing::warn!(stream = self.stream.as_str(), error, "delivery does not begin");
                    self.tell(|status| {
                        status.state = State::Waiting;
                        error.clone_into(&mut status.last_error);
                    });
                }
            }
            tokio::time::sleep(OWN_TROUBLE).await;
        }
    }

    fn tell(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// An event together with what it says of the cursor: both or none.
    async fn publish(&self, event: Event, cursor: &Cursor, mut txn: Txn) -> Result<(), StoreError> {
        cursor.put(&mut txn, self.stream);
        // Beforehand: whoever drops this at an order to stop, or for another target, does not stop the transaction.
        let before = self.moved_to(cursor);
        let written = self.parts.log.publish_with(&event, txn).await;
        if written.is_err() {
            *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = before;
        }
        written.map(drop)
    }

    /// Answers where it was before.
    fn moved_to(&self, cursor: &Cursor) -> Option<Cursor> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner).replace(cursor.clone())
    }

    /// The cursor as it moved on in this life, else as it is on disk.
    async fn last(&self) -> Result<Option<Cursor>, String> {
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match moved {
            Some(moved) => Ok(Some(moved)),
            None => Cursor::load(&self.parts.store, self.stream).await.map_err(|error| error.to_string()),
        }
    }

    /// Nothing is delivered any more: a trouble that was told is over with that.
    async fn leave(&self) -> Result<(), String> {
        let Some(mut cursor) = self.last().await?.filter(|cursor| cursor.told != Told::Nothing) else {
            return Ok(());
        };
        cursor.told = Told::Nothing;
        self.publish(self.left(), &cursor, Txn::essential()).await.map_err(|error| error.to_string())
    }

    fn left(&self) -> Event {
        self.event(
            kind::MANAGER_LEFT,
            "nothing is delivered any more to the manager that could not be reached",
        )
    }

    fn event(&self, kind: Kind, text: &str) -> Event {
        Event::new(kind, format!("manager/{}", self.stream.as_str()), text)
    }
}

impl<'a> Delivery<'a> {
    async fn begin(runner: &'a Runner, target: &'a Target, url: &'a str) -> Result<Self, String> {
        let same = |cursor: &Cursor| cursor.manager == target.manager && cursor.since == target.since;
        let cursor = match runner.last().await? {
            Some(cursor) if same(&cursor) => cursor,
            other => {
                let number = runner.source.start(target.from_event, target.since);
                let cursor = Cursor::new(&target.manager, target.since, number);
                runner.tell(|status| status.last_ok = None);
                let told = other.is_some_and(|other| other.told != Told::Nothing);
                let written = match told {
                    true => runner.publish(runner.left(), &cursor, Txn::essential()).await,
                    false => cursor.save(&runner.parts.store, runner.stream).await,
                };
                written.map_err(|error| error.to_string())?;
                runner.moved_to(&cursor);
                cursor
            }
        };
        runner.source.taken(cursor.number);
        runner.tell(|status| {
            status.state = State::Idle;
            url.clone_into(&mut status.url);
            status.number = cursor.number;
            status.begun = Some(Timestamp::now());
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
                self.runner.tell(|status| {
                    status.state = State::Waiting;
                    status.last_error = error.to_string();
                });
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
            if seen.is_some() && self.learned().await?.is_some() {
                // The other stream has met the manager meanwhile: this one holds to what that has seen.
                return Ok(());
            }
            self.runner.tell(|status| status.state = State::Sending);
            let begun = Instant::now();
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
            let few = |batch: &Batch| batch.items < FEW;
            let gather = few(&batch) && ready.as_ref().is_none_or(|read| read.as_ref().is_ok_and(few));
            if let Some(seen) = seen.take() {
                // Taken only if it was the one whom we know, or if nobody was known; sent again to that one else.
                if self.learn(&seen).await? {
                    self.taken(&batch, more).await?;
                }
                return Ok(());
            }
            self.taken(&batch, more).await?;
            if gather {
                // Those that come one by one go together; what was read of them is read again.
                tokio::time::sleep_until(begun + GATHER).await;
                fetch = source.next(self.cursor.number, self.pace.limit());
            } else if let Some(read) = ready {
                fetch = std::future::ready(read).boxed();
            }
        }
    }

    /// The next batch; writes the cursor meanwhile when it is time.
    async fn wait(&mut self, fetch: &mut Fetch<'_>) -> Result<Batch, SourceError> {
        loop {
            // Timers are late by up to a millisecond, and batches that are there already would always be first.
            if self.save_at.is_some_and(|at| at <= Instant::now()) {
                self.save().await?;
            }
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

    async fn save(&mut self) -> Result<(), SourceError> {
        self.cursor.save(&self.runner.parts.store, self.runner.stream).await.map_err(own)?;
        (self.save_at, self.saved) = (None, Some(Instant::now()));
        Ok(())
    }

    async fn taken(&mut self, batch: &Batch, more: bool) -> Result<(), SourceError> {
        self.cursor.number = batch.last;
        self.runner.moved_to(&self.cursor);
        self.runner.source.taken(batch.last);
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
            let event = self.runner.event(kind::MANAGER_REACHABLE, "the manager takes what is sent again");
            self.runner.publish(event, &self.cursor, Txn::essential()).await.map_err(own)?;
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
        // A proxy may say anything to a body that it does not like: if it goes on, less is tried.
        let stubborn = self.pace.failures() >= STUBBORN
            && matches!(error, PostError::Broken(_) | PostError::Status(400..=499 | 502 | 504));
        let too_much = stubborn || matches!(error, PostError::Timeout(_) | PostError::Status(413));
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
                true => self.runner.event(kind::MANAGER_REFUSED, &text),
                false => self.runner.event(kind::MANAGER_UNREACHABLE, &text),
            };
            tracing::warn!(stream = self.runner.stream.as_str(), url = self.url, %error, "the manager is not reached");
            self.runner.publish(event, &self.cursor, Txn::essential()).await.map_err(own)?;
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = self.runner.kick.notified() => {}
        }
        Ok(too_much)
    }

    async fn learned(&self) -> Result<Option<Learned>, SourceError> {
        Learned::load(&self.runner.parts.store, self.target, self.url).await.map_err(own)
    }

    /// The certificate that was seen at the first connection is the only one from now on, unless the other stream has
    /// seen one before. Whether it is the one that holds.
    async fn learn(&mut self, seen: &Seen) -> Result<bool, SourceError> {
        let Some(sha256) = seen.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
            return Ok(true);
        };
        let _one_at_a_time = self.runner.learning.lock().await;
        if let Some(known) = self.learned().await? {
            return Ok(known.sha256 == sha256);
        }
        let text = format!(
            "the manager gave no certificate; the one seen at {} is pinned from now on: SHA-256 {sha256}",
            self.url
        );
        let learned = Learned { sha256, manager: self.target.manager.clone(), taken: self.target.taken };
        let mut txn = Txn::essential();
        learned.put(&mut txn, &self.target.place(self.url));
        let event = self.runner.event(kind::MANAGER_CERTIFICATE_LEARNED, &text);
        self.runner.publish(event, &self.cursor, txn).await.map_err(own)?;
        Ok(true)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::event::Log;
    use crate::manager::{EventSource, RealConnect};
    use crate::store::{Options, Store};
    use tokio_util::sync::CancellationToken;

    #[tokio::test]
    async fn a_trouble_that_was_just_being_told_at_the_stop_is_known_to_be_told() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(Options::new(folder.path())).unwrap().store;
        let log = Log::open(store.clone(), &config::Events { history: 100 }).await.unwrap();
        let runner = Runner {
            stream: Stream::Events,
            source: Arc::new(EventSource::new(log.clone(), String::new(), String::new())),
            parts: Arc::new(Parts {
                store: store.clone(),
                log: log.clone(),
                settings: config::Manager::default(),
                connect: Arc::new(RealConnect),
                stop: CancellationToken::new(),
            }),
            learning: Arc::default(),
            targets: watch::Sender::new(Wanted::Nobody).subscribe(),
            status: Arc::default(),
            kick: Arc::default(),
            moved: Mutex::default(),
        };
        let mut cursor = Cursor::new("a", Timestamp(1), 7);
        runner.moved_to(&cursor);
        cursor.told = Told::Unreachable;
        let event = runner.event(kind::MANAGER_UNREACHABLE, "it is away");
        let cut_off = runner.publish(event, &cursor, Txn::essential()).now_or_never();
        assert!(cut_off.is_none(), "a disk is not so quick");
        runner.save().await;
        let mut last = log.changed();
        tokio::time::timeout(Duration::from_secs(60), last.wait_for(|last| *last == 1))
            .await
            .unwrap()
            .unwrap();
        let kept = Cursor::load(&store, Stream::Events).await.unwrap().unwrap();
        assert_eq!(kept.told, Told::Unreachable, "else nothing would say that it is over");
        store.close().await;
    }
}
