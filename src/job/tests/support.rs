//! A world of counters, and an executor that a step's data commands.

use crate::config;
use crate::job::record::{JOBS, StepState};
use crate::job::{
    Engine, Executor, JobFault, JobRecord, JobState, LockWant, Options, Outcome, PlannedStep, Resume,
    StepContext, Submission,
};
use crate::model::JobId;
use crate::store::{Store, Txn};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What a step does. Steps with a name act on the counter of that name in the world.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Act {
    Do,
    Answer(serde_json::Value),
    AnswerBytes(usize),
    Fail {
        no_effect: bool,
    },
    FailUndo,
    Panic,
    /// Obeys a cancel.
    Wait {
        ms: u64,
    },
    /// Does not.
    Deaf {
        ms: u64,
    },
    Progress(Vec<u8>),
    Child {
        key: String,
        submission: Box<Child>,
    },
    /// Has a child help to take it back.
    UndoChild {
        submission: Box<Child>,
    },
    /// Of any size.
    Load(String),
    /// Begins children and does not wait for them.
    Leave {
        submission: Box<Child>,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Child {
    pub name: String,
    pub act: Act,
    pub locks: Vec<LockWant>,
}

/// What there is outside the engine; lives on when the engine dies.
#[derive(Debug, Default)]
pub struct World {
    /// By step's name: how often its effect happened, minus how often it was taken back counts as state.
    pub on: BTreeMap<String, bool>,
    pub effects: BTreeMap<String, u32>,
    pub log: Vec<String>,
    /// What the store said of the job's steps when a step began.
    pub seen: Vec<(String, JobState, Vec<StepState>)>,
    pub resumed: Vec<String>,
    pub running: usize,
    pub most_running: usize,
    pub ended: Vec<(JobId, JobState)>,
}

pub struct Script {
    pub store: Store,
    pub world: Arc<Mutex<World>>,
    pub dead: CancellationToken,
}

impl Script {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    async fn alive(&self) {
        if self.dead.is_cancelled() {
            std::future::pending::<()>().await;
        }
    }

    async fn act(&self, name: &str, act: Act, context: &StepContext) -> Result<Outcome, JobFault> {
        match act {
            Act::Do | Act::FailUndo | Act::UndoChild { .. } | Act::Load(_) => {}
            Act::Answer(value) => {
                self.effect(name);
                return Ok(Outcome::value(value));
            }
            Act::AnswerBytes(bytes) => {
                self.effect(name);
                return Ok(Outcome::value(serde_json::Value::String("x".repeat(bytes))));
            }
            Act::Fail { no_effect: true } => return Err(JobFault::refusal("REFUSED", "no")),
            Act::Fail { no_effect: false } => {
                self.effect(name);
                return Err(JobFault::new("BROKEN", "half done"));
            }
            Act::Panic => panic!("as the test wants it"),
            Act::Wait { ms } => tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(ms)) => {}
                () = context.cancelled.cancelled() => return Err(JobFault::new("CANCELLED", "cancelled")),
            },
            Act::Deaf { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
            Act::Progress(list) => {
                for percent in list {
                    context.progress(percent);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            Act::Child { key, submission } => {
                let ended = context.child(&key, child(&submission)).await?;
                if ended.state != JobState::Succeeded {
                    return Err(JobFault::new("CHILD_FAILED", ended.state.as_str()));
                }
            }
            Act::Leave { submission } => {
                let mut submission = child(&submission);
                submission.options.parent = Some(context.job);
                context.engine.submit(submission).await.map_err(|e| JobFault::new("CHILD", e.to_string()))?;
            }
        }
        self.alive().await;
        self.effect(name);
        Ok(Outcome::done())
    }

    fn effect(&self, name: &str) {
        let mut world = self.world();
        world.on.insert(name.to_owned(), true);
        *world.effects.entry(name.to_owned()).or_default() += 1;
    }
}

fn child(child: &Child) -> Submission {
    Submission {
        locks: child.locks.clone(),
        ..job(&child.name, vec![(child.name.clone(), child.act.clone())])
    }
}

/// Counts what runs at the same time, also if it is dropped in the midst.
struct Running(Arc<Mutex<World>>);

impl Running {
    fn new(world: &Arc<Mutex<World>>) -> Self {
        let mut inner = world.lock().unwrap();
        inner.running += 1;
        inner.most_running = inner.most_running.max(inner.running);
        drop(inner);
        Self(Arc::clone(world))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().unwrap().running -= 1;
    }
}

#[async_trait::async_trait]
impl Executor for Script {
    async fn run(&self, step: &PlannedStep, context: &StepContext) -> Result<Outcome, JobFault> {
        self.alive().await;
        let on_disk = self.store.get(&JOBS, &context.job).await.unwrap().expect("a running job is on disk");
        let states = on_disk.steps.iter().map(|s| s.state).collect();
        {
            let mut world = self.world();
            world.log.push(format!("run {}", step.name));
            world.seen.push((step.name.clone(), on_disk.state, states));
            if context.resumed {
                world.resumed.push(step.name.clone());
            }
        }
        let _running = Running::new(&self.world);
        self.act(&step.name, serde_json::from_value(step.what.clone()).unwrap(), context).await
    }

    async fn undo(
        &self,
        step: &PlannedStep,
        _: Option<&serde_json::Value>,
        context: &StepContext,
    ) -> Result<Outcome, JobFault> {
        self.alive().await;
        let act: Act = serde_json::from_value(step.what.clone()).unwrap();
        if let Act::UndoChild { submission } = &act {
            let ended = context.child("undo", child(submission)).await?;
            assert_eq!(ended.state, JobState::Succeeded, "nobody calls off who helps to take back");
        }
        let mut world = self.world();
        world.log.push(format!("undo {}", step.name));
        if matches!(act, Act::FailUndo) {
            return Err(JobFault::new("STUCK", "cannot be undone"));
        }
        world.on.insert(step.name.clone(), false);
        Ok(Outcome::done())
    }

    fn ended(&self, job: &JobRecord, _: &mut Txn) {
        self.world().ended.push((job.id, job.state));
    }
}

/// One life of the engine.
pub struct Life {
    pub engine: Engine,
    pub store: Store,
    pub world: Arc<Mutex<World>>,
    dead: CancellationToken,
}

pub fn settings() -> config::Jobs {
    config::Jobs { cancel_bound_s: 5, ..config::Settings::default().jobs }
}

impl Life {
    pub async fn begin(
        store: Store,
        world: Arc<Mutex<World>>,
        settings: config::Jobs,
        dead: CancellationToken,
    ) -> Self {
        let script = Script { store: store.clone(), world: Arc::clone(&world), dead: dead.clone() };
        let engine = Engine::open(store.clone(), Arc::new(script), settings, JobId(0)).await.unwrap();
        Self { engine, store, world, dead }
    }

    pub async fn with(settings: config::Jobs) -> Self {
        Self::begin(Store::memory(), Arc::default(), settings, CancellationToken::new()).await
    }

    pub async fn new() -> Self {
        Self::with(settings()).await
    }

    /// The engine dies here and now; its world and its disk do not.
    pub async fn crash(self) -> (Store, Arc<Mutex<World>>) {
        self.dead.cancel();
        let store = self.store.crash_copy();
        // What is under way runs into its end.
        tokio::time::sleep(Duration::from_millis(1)).await;
        (store, self.world)
    }

    pub async fn crash_and_restart(self) -> Self {
        let (store, world) = self.crash().await;
        let life = Self::begin(store, world, settings(), CancellationToken::new()).await;
        life.engine.resume();
        life
    }

    pub async fn submit(&self, submission: Submission) -> JobId {
        self.engine.submit(submission).await.unwrap()
    }

    pub async fn end(&self, id: JobId) -> Arc<JobRecord> {
        let record = self.engine.wait(id, Duration::from_secs(100_000)).await.unwrap().unwrap();
        assert!(record.state.is_terminal(), "{record:?}");
        record
    }

    pub async fn run(&self, submission: Submission) -> Arc<JobRecord> {
        self.end(self.submit(submission).await).await
    }

    pub async fn state(&self, id: JobId) -> JobState {
        self.engine.get(id).await.unwrap().unwrap().state
    }

    pub fn log(&self) -> Vec<String> {
        self.world.lock().unwrap().log.clone()
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Nothing is open, held, or left behind on disk.
    pub async fn assert_idle(&self) {
        assert_eq!(self.engine.open_jobs(), 0);
        assert_eq!(self.engine.locks(), vec![]);
        for table in ["job_plan", "job_plan_part", "job_cancel"] {
            assert_eq!(self.store.count(table).await.unwrap(), 0, "{table}");
        }
    }
}

pub fn step(name: &str, act: Act) -> PlannedStep {
    PlannedStep {
        name: name.to_owned(),
        about: name.to_owned(),
        what: serde_json::to_value(act).unwrap(),
        effect: true,
        resume: Resume::Redo,
        undo: true,
        weight: 1,
    }
}

pub fn job(verb: &str, acts: Vec<(String, Act)>) -> Submission {
    Submission {
        verb: verb.to_owned(),
        about: verb.to_owned(),
        caller: "test".to_owned(),
        params: serde_json::json!([verb]),
        locks: vec![LockWant::shared("host")],
        steps: acts.into_iter().map(|(name, act)| step(&name, act)).collect(),
        options: Options::default(),
    }
}

/// A job on one object.
pub fn on(object: &str, acts: &[(&str, Act)]) -> Submission {
    let acts = acts.iter().map(|(name, act)| ((*name).to_owned(), act.clone())).collect();
    let locks = vec![LockWant::shared("host"), LockWant::exclusive(object)];
    Submission { locks, ..job("test", acts) }
}

pub async fn ms(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}
