//! A host, which lives on, and the daemon's lives on it.

use crate::mortal::Mortal;
use dom0d::config::Settings;
use dom0d::event::{Event, Query};
use dom0d::host::record::HostRecord;
use dom0d::job::{Engine, Executor, JobRecord, JobState, Options};
use dom0d::kernel::Kernel;
use dom0d::kernel::sim::SimKernel;
use dom0d::machine::sim::SimMachine;
use dom0d::model::{JobId, Mac, MiB, RepoId, SafePath, Text, Timestamp, VmId, VmName};
use dom0d::operation::plan::{self, Plan};
use dom0d::operation::{Access, Operations, Worlds, network, observe};
use dom0d::sim::{self, Handle};
use dom0d::store::{Range, Store};
use dom0d::vm::{Intent, VMS, VmRecord, state_of};
use dom0d::xen::config::{
    Boot, Disk, DiskBacking, DiskDevice, DiskMode, DomainConfig, GuestType, OnEnd, PygrubArgs, TscMode, Vif,
    VifModel,
};
use dom0d::xen::sim::SimToolstack;
use dom0d::xen::{DomainInfo, RunState, Toolstack};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The world, the disk's folder, and the settings: what a crash of the daemon leaves.
pub struct Host {
    pub world: Handle,
    pub toolstack: Arc<dyn Toolstack>,
    pub kernel: Arc<dyn Kernel>,
    pub settings: Arc<Settings>,
    pub dir: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        Self::with(Settings::default())
    }

    pub fn with(settings: Settings) -> Self {
        let world = Handle::in_process(sim::Options { memory: MiB(32 * 1024), ..sim::Options::default() });
        let limit = Duration::from_secs(settings.vm.toolstack_timeout_s);
        let toolstack = Arc::new(SimToolstack::new(world.clone(), limit));
        let kernel = Arc::new(SimKernel::new(world.clone(), Duration::from_secs(10)));
        Self { world, toolstack, kernel, settings: Arc::new(settings), dir: tempfile::tempdir().unwrap() }
    }

    /// The domain of a VM, as it really is.
    pub async fn domain(&self, vm: VmId) -> Option<DomainInfo> {
        self.toolstack.find(vm).await.unwrap()
    }

    pub async fn audit(&self) -> sim::Audit {
        self.world.audit().await.unwrap()
    }

    pub fn files(&self) -> BTreeSet<String> {
        let folders = ["saved", "cores"].map(|name| self.dir.path().join(name));
        let entries = folders.iter().filter_map(|f| std::fs::read_dir(f).ok()).flatten();
        entries.map(|e| e.unwrap().path().to_str().unwrap().to_owned()).collect()
    }
}

struct NoAccess;

impl Access for NoAccess {
    fn policy_changed(&self, _: Option<&str>, _: &HostRecord) {}

    fn renew_certificate(&self, _: bool) -> Result<bool, String> {
        Ok(true)
    }
}

/// One life of the daemon.
pub struct Life {
    pub operations: Arc<Operations>,
    pub engine: Engine,
    pub store: Store,
    /// Ends the life's observer.
    stop: CancellationToken,
    /// Ends the life's hold on the world.
    dead: CancellationToken,
}

impl Life {
    pub async fn begin(host: &Host) -> Self {
        Self::on(host, Store::memory(), CancellationToken::new()).await
    }

    pub async fn on(host: &Host, store: Store, dead: CancellationToken) -> Self {
        Self::under(host, store, dead, |operations| operations).await
    }

    /// With an executor around the operations, for those who want to watch.
    pub async fn under(
        host: &Host,
        store: Store,
        dead: CancellationToken,
        wrap: impl FnOnce(Arc<dyn Executor>) -> Arc<dyn Executor>,
    ) -> Self {
        let worlds = Worlds {
            toolstack: Arc::new(Mortal { inner: Arc::clone(&host.toolstack), dead: dead.clone() }),
            machine: Arc::new(SimMachine::new(host.world.clone(), Duration::from_secs(10))),
            kernel: Arc::clone(&host.kernel),
        };
        let folder = SafePath::parse(host.dir.path().to_str().unwrap()).unwrap();
        let settings = Arc::clone(&host.settings);
        let operations =
            Operations::load(store.clone(), worlds, settings, Arc::new(NoAccess), folder).await.unwrap();
        let executor = wrap(Arc::clone(&operations) as _);
        let engine =
            Engine::open(store.clone(), executor, host.settings.jobs.clone(), JobId(0)).await.unwrap();
        operations.join_engine(engine.clone());
        engine.resume();
        // Beside, so that a test can act before a job that goes on has done anything.
        let booting = Arc::clone(&operations);
        tokio::spawn(async move { booting.submit_network_at_boot().await });
        let stop = CancellationToken::new();
        tokio::spawn(observe::run(Arc::clone(&operations), stop.clone()));
        tokio::spawn(network::look::run(Arc::clone(&operations), stop.clone()));
        tokio::spawn(dom0d::event::run(operations.events.clone(), stop.clone()));
        Self { operations, engine, store, stop, dead }
    }

    /// Killed. What the world was asked already happens.
    pub async fn crash(self) -> Store {
        let store = self.store.crash_copy();
        seconds(0.001).await;
        self.dead.cancel();
        self.stop.cancel();
        seconds(0.001).await;
        store
    }

    pub async fn submit(&self, verb: &str, plan: Plan) -> JobId {
        self.try_submit(verb, plan).await.unwrap()
    }

    pub async fn try_submit(&self, verb: &str, plan: Plan) -> Result<JobId, dom0d::job::SubmitError> {
        self.engine.submit(self.operations.submission(verb, "test", plan, Options::default())).await
    }

    pub async fn end(&self, id: JobId) -> Arc<JobRecord> {
        let record = self.engine.wait(id, Duration::from_secs(1_000_000)).await.unwrap().unwrap();
        assert!(record.state.is_terminal(), "{record:?}");
        record
    }

    pub async fn run(&self, verb: &str, plan: Plan) -> Arc<JobRecord> {
        self.end(self.submit(verb, plan).await).await
    }

    pub async fn good(&self, verb: &str, plan: Plan) -> Arc<JobRecord> {
        let record = self.run(verb, plan).await;
        assert_eq!(record.state, JobState::Succeeded, "{verb}: {:?}", record.fault);
        record
    }

    /// Fails with this fault.
    pub async fn bad(&self, verb: &str, plan: Plan, fault: &str) -> Arc<JobRecord> {
        let record = self.run(verb, plan).await;
        assert_eq!(record.state, JobState::Failed, "{verb}");
        assert_eq!(record.fault.as_ref().map(|f| f.name.as_str()), Some(fault), "{:?}", record.fault);
        record
    }

    pub async fn created(&self, name: &str) -> VmId {
        let record = vm(name);
        let id = record.id();
        self.good("create_vm", plan::create_vm(record)).await;
        id
    }

    pub async fn started(&self, name: &str) -> VmId {
        let id = self.created(name).await;
        self.good("start_vm", plan::start_vm(id)).await;
        seconds(1.0).await;
        id
    }

    pub fn record(&self, vm: VmId) -> VmRecord {
        VmRecord::clone(&self.operations.vms.get(vm).unwrap().record)
    }

    pub async fn events(&self, kind: &str) -> Vec<Event> {
        let page = self.operations.events.list(&Query { limit: 10_000, ..Query::default() }).await.unwrap();
        for (_, event) in &page.events {
            let row = dom0d::event::catalogue::find(&event.kind).expect("it is of the catalogue");
            assert!(row.fits(&event.object), "{event:?} and {row:?}");
        }
        page.events.into_iter().map(|(_, event)| event).filter(|event| event.kind == kind).collect()
    }

    /// Waits until no job is open and the observer is content: longer than it waits after a failure.
    pub async fn quiet(&self) {
        let mut still = 0;
        for _ in 0..10_000 {
            still = if self.engine.open_jobs() == 0 { still + 1 } else { 0 };
            if still == 40 {
                return;
            }
            seconds(1.0).await;
        }
        panic!("jobs are open for hours: {:?}", self.engine.locks());
    }

    /// Record, memory and world agree, nothing ran twice, and nothing is left over.
    pub async fn assert_agreement(&self, host: &Host) {
        let (engine, audit) = (&self.engine, host.audit().await);
        assert_eq!((engine.open_jobs(), engine.locks()), (0, vec![]));
        for table in ["job_plan", "job_cancel"] {
            assert_eq!(self.store.count(table).await.unwrap(), 0, "{table}");
        }
        assert_eq!(audit.doubled(), vec![], "ran twice at once (I1)");
        let rows = self.store.scan(&VMS, Range::all()).await.unwrap();
        let stored: BTreeMap<VmId, VmRecord> = rows.into_iter().map(|(_, r)| (r.id(), r)).collect();
        let known = self.operations.vms.all();
        assert_eq!(known.len(), stored.len());
        let mut files = BTreeSet::new();
        for known in known {
            let record = &stored[&known.record.id()];
            assert_eq!(*known.record, *record, "in memory as on disk");
            files.extend(record.cores.iter().map(|core| core.file.to_string()));
            files.extend(record.checkpoint.iter().map(ToString::to_string));
            let domain = host.domain(record.id()).await;
            let state = domain.as_ref().map(|d| d.state);
            assert_eq!(known.domain.as_ref().map(|d| d.domid), domain.as_ref().map(|d| d.domid));
            assert_eq!(known.state(), state_of(&record.intent, domain.as_ref()));
            let living = state.is_some_and(|s| !matches!(s, RunState::Shutdown(_) | RunState::Dying));
            assert_eq!(living, record.intent == Intent::On, "{:?} {state:?}", record.intent);
            if let Intent::Saved { file, .. } = &record.intent {
                files.insert(file.to_string());
            }
            if let Some(domain) = domain.filter(|_| living) {
                let config = host.toolstack.config(domain.domid).await.unwrap();
                assert_eq!(sorted(&config), sorted(&record.config), "the domain has what the record says");
            }
        }
        assert_eq!(host.files(), files, "files and records agree");
    }
}

/// Devices without their order, and the sizes.
pub fn sorted(config: &DomainConfig) -> (BTreeSet<String>, BTreeSet<String>, MiB, u32, (u16, u16)) {
    let disks = config.disks.iter().map(|d| format!("{d:?}")).collect();
    let vifs = config.vifs.iter().map(|v| format!("{v:?}")).collect();
    (disks, vifs, config.memory, config.vcpus, (config.cpu_weight, config.cpu_cap))
}

pub async fn seconds(n: f64) {
    tokio::time::sleep(Duration::from_secs_f64(n)).await;
}

pub fn vm(name: &str) -> VmRecord {
    let vm = VmId::random();
    let [a, b, c, d, ..] = *vm.as_bytes();
    let config = DomainConfig {
        vm,
        name: VmName::parse(name).unwrap(),
        guest: GuestType::Pv,
        boot: Boot::Pygrub { args: PygrubArgs::default(), extra: Text::default() },
        memory: MiB(256),
        max_memory: MiB(512),
        vcpus: 1,
        max_vcpus: 4,
        cpu_weight: 256,
        cpu_cap: 0,
        cpus: vec![],
        disks: vec![disk("xvda")],
        vifs: vec![vif(Mac::from_bytes([0x02, 0, a, b, c, d]))],
        vnc: None,
        on_poweroff: OnEnd::Destroy,
        on_reboot: OnEnd::Restart,
        on_crash: OnEnd::Restart,
        tsc_mode: TscMode::Default,
        acpi: true,
        apic: true,
        pae: true,
        usb_tablet: false,
        serial_pty: false,
        localtime: false,
    };
    VmRecord {
        config,
        repo: RepoId::parse("0004fb0000030000aabbccddeeff0011").unwrap(),
        intent: Intent::Off,
        ha: false,
        kept: BTreeMap::new(),
        created: Timestamp::now(),
        changed: Timestamp::now(),
        last_end: None,
        cores: vec![],
        checkpoint: None,
        crashes_in_a_row: 0,
        autostart: None,
        crash_seen: None,
    }
}

pub fn disk(device: &str) -> Disk {
    Disk {
        backing: DiskBacking::File,
        path: Some(SafePath::parse(&format!("/OVS/Repositories/r/VirtualDisks/{device}.img")).unwrap()),
        device: DiskDevice::parse(device).unwrap(),
        cdrom: false,
        mode: DiskMode::ReadWrite,
    }
}

pub fn vif(mac: Mac) -> Vif {
    Vif { mac, bridge: "xenbr0".parse().unwrap(), ifname: None, model: VifModel::Netfront }
}

/// With a disk, a vif, a CPU and memory more, another weight, and without the first disk.
pub fn changed(old: &VmRecord) -> VmRecord {
    let mut new = old.clone();
    let [a, b, c, d, ..] = *old.id().as_bytes();
    new.config.disks = vec![disk("xvdb"), disk("xvdc")];
    new.config.vifs.push(vif(Mac::from_bytes([0x02, 1, a, b, c, d])));
    new.config.vcpus = 3;
    new.config.memory = MiB(384);
    new.config.cpu_weight = 512;
    new
}
