//! What callers ask for, as plans; and the executor that carries out each kind of step.
//!
//! Words: a [`plan::Plan`] is steps and locks, made from typed parameters without touching anything; the
//! *executor* is [`Operations`], which joins the domains (VM, host) with the drivers; *settling* is what happens
//! when the world changed without us.
//!
//! A caller's way: api -> `plan` -> `submission` -> the job engine -> `Operations::run`, step by step. What happens
//! by itself comes in through `observe` and takes the same way. There is no other way to change anything.

pub mod adoption;
mod execute;
pub mod fault;
mod host_steps;
mod memory_steps;
pub mod migrate_in;
pub mod migrate_out;
mod migrate_stream;
pub mod migrate_watch;
pub mod network;
pub mod observe;
pub mod peers;
pub mod plan;
mod settle;
pub mod step;
mod vm_steps;

use crate::config::Settings;
use crate::event;
use crate::host::record::{HOST, HOST_KEY, HostRecord};
use crate::host::{PEERS, Peer};
use crate::job::{Engine, Options, Submission};
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::machine::files::Files;
use crate::model::{JobId, SafePath, VmId};
use crate::store::{Store, StoreError, Txn};
use crate::vm::migration::ARRIVALS;
use crate::vm::{Registry, VMS};
use crate::xen::{Toolstack, ToolstackError};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;
use tokio::sync::watch;

/// A store that can be read only has none: then the host has this one for as long as the daemon lives.
async fn first_host_record(store: &Store, machine: &dyn Machine) -> Result<HostRecord, StoreError> {
    let uuid = match machine.facts().await {
        Ok(facts) => facts.dmi.system_uuid,
        Err(error) => {
            tracing::warn!(%error, "the machine does not tell its UUID; the host gets a random one");
            [0; 16]
        }
    };
    let record = HostRecord::new(uuid);
    let mut txn = Txn::essential();
    txn.put(&HOST, HOST_KEY, &record);
    match store.commit(txn).await {
        Ok(_) | Err(StoreError::ReadOnly(_)) => Ok(record),
        Err(error) => Err(error),
    }
}

/// What a change of passwords, ownership or certificates means for those who serve callers. The composition
/// root joins it to the wire.
pub trait Access: Send + Sync + 'static {
    /// The password's hash or the host's record has changed: decide callers' roles by these from now on.
    fn policy_changed(&self, password_hash: Option<&str>, host: &HostRecord);

    /// Makes a new server certificate (with `if_due`, only if it is time), keeps it, and serves it to new
    /// connections. `false`: it was not time. Blocking.
    fn renew_certificate(&self, if_due: bool) -> Result<bool, String>;

    /// These may call as peers from now on, and no others.
    fn peers_changed(&self, _peers: &[Peer]) {}
}

/// What a job gets beyond the waits it has planned.
const DEADLINE_SLACK_S: u64 = 300;

/// The worlds, as drivers.
#[derive(Clone)]
pub struct Worlds {
    pub toolstack: Arc<dyn Toolstack>,
    pub machine: Arc<dyn Machine>,
    pub kernel: Arc<dyn Kernel>,
}

/// The password's hash (PHC text).
pub const PASSWORD: crate::store::Table<String> = crate::store::Table::new("password", 1);

pub struct Operations {
    pub store: Store,
    pub toolstack: Arc<dyn Toolstack>,
    pub machine: Arc<dyn Machine>,
    pub kernel: Arc<dyn Kernel>,
    pub vms: Arc<Registry>,
    pub events: event::Log,
    pub settings: Arc<Settings>,
    files: Files,
    access: Arc<dyn Access>,
    host: RwLock<Arc<HostRecord>>,
    password: RwLock<Option<String>>,
    peers: RwLock<Arc<Vec<Peer>>>,
    link: OnceLock<Arc<dyn peers::PeerLink>>,
    /// Migrations under way.
    pub moves: migrate_in::Moves,
    engine: OnceLock<Engine>,
    this: Weak<Operations>,
    /// Asks the observer to look at everything.
    pub(crate) look_again: tokio::sync::Notify,
    /// VMs whose record and domain the observer shall compare, and its bell.
    suspects: Mutex<BTreeSet<VmId>>,
    pub(crate) suspected: tokio::sync::Notify,
    boot: RwLock<adoption::BootState>,
    /// What the agent's start has found.
    found: RwLock<Option<Arc<adoption::Found>>>,
    /// Where saved memory and core dumps lie.
    state_dir: SafePath,
    /// Somebody confirmed a change of the network.
    network_word: tokio::sync::Notify,
    /// The change whose time to be confirmed is over. Held by whoever decides whether it is.
    network_late: tokio::sync::Mutex<Option<JobId>>,
    /// The failed change whose way back was begun at once: it is not kept any more.
    network_back: Mutex<Option<JobId>>,
    /// The open change of this life.
    network_cache: Mutex<Option<Arc<network::Open>>>,
    /// Rises before and after we change the kernel's network.
    network_changes: std::sync::atomic::AtomicU64,
    /// Rises with every observation, so that a step that waits for the world looks again.
    pub(crate) world_changes: watch::Sender<u64>,
}

impl Operations {
    /// Loads what the store has.
    pub async fn load(
        store: Store,
        worlds: Worlds,
        settings: Arc<Settings>,
        access: Arc<dyn Access>,
        state_dir: SafePath,
    ) -> Result<Arc<Self>, StoreError> {
        let vms = Registry::default();
        for (_, record) in store.scan(&VMS, crate::store::Range::all()).await? {
            vms.put(record);
        }
        let host = match store.get(&HOST, HOST_KEY).await? {
            Some(host) => host,
            None => first_host_record(&store, &*worlds.machine).await?,
        };
        let boot = adoption::load_boot(&store, &*worlds.machine).await?;
        let password = store.get(&PASSWORD, "oracle").await?;
        let rows = store.scan(&PEERS, crate::store::Range::all()).await?;
        let mut peers: Vec<Peer> = rows.into_iter().map(|(_, peer)| peer).collect();
        peers.sort_by(|a, b| a.address.cmp(&b.address));
        let events = event::Log::open(store.clone(), &settings.events).await?;
        let moves = migrate_in::Moves::default();
        let rows = store.scan(&ARRIVALS, crate::store::Range::all()).await?;
        moves.load(rows.into_iter().map(|(_, arrival)| arrival));
        access.peers_changed(&peers);
        access.policy_changed(password.as_deref(), &host);
        Ok(Arc::new_cyclic(|this| Self {
            events,
            store,
            toolstack: worlds.toolstack,
            machine: worlds.machine,
            kernel: worlds.kernel,
            vms: Arc::new(vms),
            settings,
            files: Files,
            access,
            host: RwLock::new(Arc::new(host)),
            password: RwLock::new(password),
            peers: RwLock::new(Arc::new(peers)),
            link: OnceLock::new(),
            moves,
            engine: OnceLock::new(),
            this: this.clone(),
            look_again: tokio::sync::Notify::new(),
            suspects: Mutex::default(),
            suspected: tokio::sync::Notify::new(),
            boot: RwLock::new(boot),
            found: RwLock::default(),
            state_dir,
            network_word: tokio::sync::Notify::new(),
            network_late: tokio::sync::Mutex::default(),
            network_back: Mutex::default(),
            network_cache: Mutex::default(),
            network_changes: std::sync::atomic::AtomicU64::new(0),
            world_changes: watch::Sender::new(0),
        }))
    }

    /// Joins the engine, which needs us first as its executor.
    pub fn join_engine(&self, engine: Engine) {
        let _ = self.engine.set(engine);
    }

    pub fn engine(&self) -> Option<&Engine> {
        self.engine.get()
    }

    pub fn host_record(&self) -> Arc<HostRecord> {
        Arc::clone(&self.host.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn has_password(&self) -> bool {
        self.password.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// The first password's hash, before any job can run. Later ones go by job.
    pub async fn first_password(&self, hash: String) -> Result<(), StoreError> {
        let mut txn = Txn::essential();
        txn.put(&PASSWORD, "oracle", &hash);
        self.store.commit(txn).await?;
        self.set_password(hash);
        Ok(())
    }

    fn set_password(&self, hash: String) {
        *self.password.write().unwrap_or_else(PoisonError::into_inner) = Some(hash);
        self.policy_changed();
    }

    fn set_host(&self, record: HostRecord) {
        *self.host.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(record);
        self.policy_changed();
    }

    fn policy_changed(&self) {
        let password = self.password.read().unwrap_or_else(PoisonError::into_inner).clone();
        self.access.policy_changed(password.as_deref(), &self.host_record());
    }

    pub(crate) fn suspect(&self, vm: VmId) {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner).insert(vm);
        self.suspected.notify_one();
    }

    pub(crate) fn take_suspects(&self) -> BTreeSet<VmId> {
        std::mem::take(&mut *self.suspects.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over a reading of all domains; the observer looks at what it may mean.
    pub async fn look_at_all(&self) -> Result<(), ToolstackError> {
        let stamp = self.vms.stamp();
        let domains = self.toolstack.list().await?;
        if !self.vms.observe(stamp, domains).is_empty() {
            self.look_again.notify_one();
        }
        Ok(())
    }

    /// A plan as the engine takes it.
    pub fn submission(&self, verb: &str, caller: &str, plan: plan::Plan, mut options: Options) -> Submission {
        options.essential |= plan.essential;
        // A job that is to wait long is not to fail for it.
        let default_s = self.settings.jobs.default_deadline_s;
        if plan.waits_s > 0 && options.deadline.is_none() {
            options.deadline = Some(Duration::from_secs(default_s.max(plan.waits_s + DEADLINE_SLACK_S)));
        }
        Submission {
            verb: verb.to_owned(),
            about: plan.about,
            caller: caller.to_owned(),
            params: serde_json::Value::Null,
            locks: plan.locks,
            steps: plan.steps,
            options,
        }
    }

    /// Where a VM's memory is saved. `tag` makes it the only one of its kind.
    pub fn save_file(&self, vm: VmId, tag: &str) -> SafePath {
        self.below_state("saved", vm, tag)
    }

    pub fn core_file(&self, vm: VmId, tag: &str) -> SafePath {
        self.below_state("cores", vm, tag)
    }

    fn below_state(&self, folder: &str, vm: VmId, tag: &str) -> SafePath {
        let path = Path::new(self.state_dir.as_str()).join(folder).join(format!("{vm}.{tag}"));
        SafePath::parse(&path.to_string_lossy())
            .expect("a checked folder, a constant, a UUID and a tag of digits and letters make a plain path")
    }
}
