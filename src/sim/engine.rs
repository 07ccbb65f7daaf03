//! The engine: owns the world, gives it time, obeys its script, does its file work, and tells observers.
//!
//! Time is tokio's, counted from the wall clock at the engine's start; so a paused clock moves the world, and a
//! step of the machine's clock does not. A task of the engine wakes at the world's next event and ends when the
//! engine is dropped. The lock around the world is held for one request and never across an await.

use super::bell::Bell;
use super::{Answer, Fate, Image, Observation, Options, Request, Result, World, WorldError, image};
use crate::model::network::Changed;
use crate::model::{Observers, Timestamp};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

#[derive(Debug)]
pub struct Engine {
    world: Mutex<World>,
    started: Instant,
    started_at: Timestamp,
    observers: Observers<u32>,
    network_bell: Bell<Changed>,
    /// The next event may be another one now (or the engine is gone).
    changed: Arc<Notify>,
    runtime: tokio::runtime::Handle,
    /// Domains on their way, and the client that sends or receives each.
    on_their_way: Mutex<HashMap<u32, u64>>,
    clients: AtomicU64,
}

/// What becomes of a request, once the script has had its say.
#[derive(Debug)]
pub(super) enum Outcome {
    Answer(Result<Answer>),
    /// The connection breaks instead of an answer.
    Lost,
    /// No answer ever comes.
    Never,
}

impl Engine {
    /// Must be called within a tokio runtime.
    pub fn start(options: Options) -> Arc<Self> {
        let started_at = Timestamp::now();
        let engine = Arc::new(Self {
            world: Mutex::new(World::new(options, started_at)),
            started: Instant::now(),
            started_at,
            observers: Observers::default(),
            network_bell: Bell::default(),
            changed: Arc::new(Notify::new()),
            runtime: tokio::runtime::Handle::current(),
            on_their_way: Mutex::default(),
            clients: AtomicU64::new(0),
        });
        tokio::spawn(tick(Arc::downgrade(&engine), engine.changed.clone()));
        engine
    }

    fn now(&self) -> Timestamp {
        let elapsed_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Timestamp(self.started_at.0.saturating_add(elapsed_ms))
    }

    /// Works on the world as it is now, tells what was observed, and has the next event looked up anew.
    fn with_world<T>(&self, work: impl FnOnce(&mut World, Timestamp) -> (T, Vec<Observation>)) -> T {
        let (result, observed, rang) = {
            let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
            let before = world.network_version();
            let (result, observed) = work(&mut world, self.now());
            (result, observed, world.network_version() != before)
        };
        observed.into_iter().for_each(|one| self.observers.tell(one));
        if rang {
            self.network_bell.ring(Changed);
        }
        self.changed.notify_one();
        result
    }

    pub(super) fn observe<T: From<Observation> + Send + 'static>(&self) -> tokio::sync::mpsc::Receiver<T> {
        self.observers.observe(&self.runtime)
    }

    pub(super) fn observe_network(&self) -> tokio::sync::mpsc::Receiver<Changed> {
        self.network_bell.listen()
    }

    /// A number for one more client.
    pub(super) fn new_client(&self) -> u64 {
        self.clients.fetch_add(1, Ordering::Relaxed)
    }

    /// This client is gone, and with it whatever sent or received domains for it.
    pub(super) fn client_gone(&self, client: u64) {
        let mut on_their_way = self.on_their_way.lock().unwrap_or_else(PoisonError::into_inner);
        let its: Vec<u32> = on_their_way.iter().filter(|(_, c)| **c == client).map(|(d, _)| *d).collect();
        on_their_way.retain(|_, c| *c != client);
        drop(on_their_way);
        self.with_world(|world, now| {
            let mut observed = world.advance(now);
            its.iter().for_each(|domid| world.abandon(*domid, now));
            observed.extend(world.advance(now));
            ((), observed)
        });
    }

    /// [`Engine::serve`], and remembers whose domain is on its way.
    pub(super) async fn serve_client(self: &Arc<Self>, request: Request, client: u64) -> Outcome {
        let exported = match &request {
            Request::Export { domid } => Some(*domid),
            _ => None,
        };
        let imports = matches!(request, Request::Import { .. });
        let outcome = self.serve(request).await;
        let domid = match &outcome {
            Outcome::Answer(Ok(Answer::Image(_))) => exported,
            Outcome::Answer(Ok(Answer::DomId(domid))) if imports => Some(*domid),
            _ => None,
        };
        if let Some(domid) = domid {
            self.on_their_way.lock().unwrap_or_else(PoisonError::into_inner).insert(domid, client);
        }
        outcome
    }

    /// Serves one request. Dropping the future before it is done leaves a delayed request undone, but never
    /// half done.
    pub(super) async fn serve(self: &Arc<Self>, request: Request) -> Outcome {
        let fate = self.with_world(|world, _| (world.fate(&request), Vec::new()));
        match fate {
            Fate::Fail(error) => return Outcome::Answer(Err(error)),
            Fate::Hang => return Outcome::Never,
            Fate::Pretend => return Outcome::Answer(Ok(Answer::Done)),
            Fate::DelayMs(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
            Fate::Do | Fate::DoThenTimeout | Fate::DoThenLose => {}
        }
        let answer = self.perform(request).await;
        match fate {
            Fate::DoThenTimeout => Outcome::Answer(Err(WorldError::Timeout)),
            Fate::DoThenLose => Outcome::Lost,
            _ => Outcome::Answer(answer),
        }
    }

    async fn perform(self: &Arc<Self>, request: Request) -> Result<Answer> {
        if !matches!(request, Request::Save { .. } | Request::Restore { .. } | Request::DumpCore { .. }) {
            return self.with_world(|world, now| world.apply(request, now));
        }
        let engine = self.clone();
        match tokio::task::spawn_blocking(move || engine.perform_with_file(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(WorldError::Failed("the simulated disk failed".to_owned())),
        }
    }

    fn perform_with_file(&self, request: Request) -> Result<Answer> {
        let now_in_world = |work: &mut dyn FnMut(&mut World, Timestamp) -> Result<Answer>| {
            self.with_world(|world, now| {
                let mut observed = world.advance(now);
                let result = work(world, now);
                observed.extend(world.advance(now));
                (result, observed)
            })
        };
        match request {
            Request::Save { domid, file, keep_running } => {
                let image =
                    now_in_world(&mut |w, now| w.image(domid, now).map(|i| Answer::Image(Box::new(i))))?;
                let Answer::Image(image) = image else { return Err(not_this()) };
                image::write_new(Path::new(file.as_str()), &json(&*image)?)?;
                let saved = now_in_world(&mut |w, now| {
                    w.finish_save(domid, keep_running, now).map(|()| Answer::Done)
                });
                remove_if_failed(saved, file.as_str())
            }
            Request::Restore { spec, file, paused } => {
                let image: Image = image::read(Path::new(file.as_str()))?;
                now_in_world(&mut |w, now| {
                    w.restore((*spec).clone(), image.clone(), paused, now).map(Answer::DomId)
                })
            }
            Request::DumpCore { domid, file, crash } => {
                let view = now_in_world(&mut |w, now| w.core(domid, now).map(|v| Answer::Domain(Some(v))))?;
                image::write_new(Path::new(file.as_str()), &json(&view)?)?;
                let dumped =
                    now_in_world(&mut |w, now| w.finish_dump(domid, crash, now).map(|()| Answer::Done));
                remove_if_failed(dumped, file.as_str())
            }
            _ => Err(not_this()),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.changed.notify_one();
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| WorldError::Failed(format!("cannot be written down: {e}")))
}

fn not_this() -> WorldError {
    WorldError::Failed("not a request with a file".to_owned())
}

/// The domain ended while its file was written: the file must not stay.
fn remove_if_failed(result: Result<Answer>, file: &str) -> Result<Answer> {
    if result.is_err() {
        let _ = std::fs::remove_file(file);
    }
    result
}

/// Wakes the world whenever something is to happen in it by itself.
async fn tick(engine: Weak<Engine>, changed: Arc<Notify>) {
    loop {
        let next = {
            let Some(engine) = engine.upgrade() else { return };
            let next = engine.with_world_quietly();
            next.map(|at| engine.started + Duration::from_millis(at.0.saturating_sub(engine.started_at.0)))
        };
        match next {
            Some(at) => tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                () = changed.notified() => {}
            },
            None => changed.notified().await,
        }
    }
}

impl Engine {
    /// Lets happen what is due, and answers when the next thing is. Unlike [`Engine::with_world`] it does not
    /// wake the task that calls it.
    fn with_world_quietly(&self) -> Option<Timestamp> {
        let (observed, next, rang) = {
            let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
            let before = world.network_version();
            let observed = world.advance(self.now());
            (observed, world.next_event_at(), world.network_version() != before)
        };
        observed.into_iter().for_each(|one| self.observers.tell(one));
        if rang {
            self.network_bell.ring(Changed);
        }
        next
    }
}
