//! Two hundred clients at once on twenty VMs (F24).

use crate::house::*;
use dom0d::config::{self, Settings};
use dom0d::job::{Executor, JobFault, JobRecord, JobState, Outcome, PlannedStep, StepContext};
use dom0d::model::{JobId, VmId};
use dom0d::operation::plan::{self, Plan};
use dom0d::sim::{Behaviour, Fate, Kind, Reason, Rule, WorldError};
use dom0d::store::{Range, Store, Txn};
use dom0d::xen::Trigger;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const CLIENTS: u64 = 200;
const VMS: usize = 20;
const CALLS: u64 = 4;
const SEEDS: u64 = 12;
const THREADS: u64 = 4;

/// A small generator (SplitMix64): the same seed, the same crowd.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Default)]
struct Seen {
    /// When each job's first step began.
    began: HashMap<JobId, Instant>,
    ends: BTreeMap<JobId, Vec<JobState>>,
}

/// Watches the operations at work.
struct Watch {
    inner: Arc<dyn Executor>,
    seen: Arc<Mutex<Seen>>,
}

#[async_trait::async_trait]
impl Executor for Watch {
    async fn run(&self, step: &PlannedStep, context: &StepContext) -> Result<Outcome, JobFault> {
        self.seen.lock().unwrap().began.entry(context.job).or_insert_with(Instant::now);
        self.inner.run(step, context).await
    }

    async fn undo(
        &self,
        step: &PlannedStep,
        outcome: Option<&serde_json::Value>,
        context: &StepContext,
    ) -> Result<Outcome, JobFault> {
        self.inner.undo(step, outcome, context).await
    }

    fn ended(&self, job: &JobRecord, txn: &mut Txn) {
        self.seen.lock().unwrap().ends.entry(job.id).or_default().push(job.state);
        self.inner.ended(job, txn);
    }
}

/// A random verb; `None` if it makes no sense for what the record says now.
fn verb(life: &Life, host: &Host, vm: VmId, dice: &mut Dice) -> Option<Plan> {
    let tag = dice.next().to_string();
    let known = life.operations.vms.get(vm)?;
    let record = &known.record;
    Some(match dice.below(16) {
        0..=2 => plan::start_vm(vm),
        3 => plan::stop_vm(vm, false, &host.settings.vm),
        4 => plan::stop_vm(vm, true, &host.settings.vm),
        5 => plan::reboot_vm(vm, 1),
        6 => plan::pause_vm(vm),
        7 => plan::unpause_vm(vm),
        8 => plan::save_vm(vm, life.operations.save_file(vm, &tag), false),
        9 | 10 => plan::restore_vm(record, false),
        11 => {
            let mut new = dom0d::vm::VmRecord::clone(record);
            new.config.vcpus = 1 + u32::try_from(dice.below(4)).unwrap();
            match new.config.disks.len() {
                1 => new.config.disks.push(disk("xvdb")),
                _ => new.config.disks.truncate(1),
            }
            plan::configure_vm(record, new)
        }
        12 => plan::sysrq_vm(vm, if dice.below(4) == 0 { 'b' } else { 's' }),
        13 => plan::trigger_vm(vm, Trigger::Nmi, None),
        14 => {
            let file = life.operations.core_file(vm, &tag);
            plan::dump_vm_core(vm, &tag, file, false, dice.below(2) == 0, dice.below(2) == 0)
        }
        _ => plan::configure_vm_ha(vm, dice.below(2) == 0),
    })
}

async fn client(
    life: Arc<Life>,
    host: Arc<Host>,
    vms: Arc<Vec<VmId>>,
    mut dice: Dice,
) -> Vec<(JobId, Instant)> {
    let mut asked = Vec::new();
    for _ in 0..CALLS {
        // Little enough that some ten clients are always waiting for each VM.
        seconds(dice.below(100) as f64 / 1000.0).await;
        let vm = vms[usize::try_from(dice.below(VMS as u64)).unwrap()];
        let Some(plan) = verb(&life, &host, vm, &mut dice) else { continue };
        let at = Instant::now();
        let id = life.submit("any", plan).await;
        asked.push((id, at));
        match dice.below(20) {
            0 => {
                life.engine.cancel(id, "client").await.unwrap();
            }
            1 => {
                // Its guest does something of its own meanwhile.
                let _ = host
                    .world
                    .end_guest(vm, [Reason::Crash, Reason::Poweroff][(dice.below(2)) as usize])
                    .await;
            }
            _ => {}
        }
        life.end(id).await;
    }
    asked
}

/// The world is slow, now and then fails, and now and then loses an answer.
async fn disturb(host: &Host, dice: &mut Dice) {
    let kinds = [
        Kind::Create,
        Kind::Destroy,
        Kind::Shutdown,
        Kind::Pause,
        Kind::Unpause,
        Kind::Save,
        Kind::Restore,
        Kind::AttachDisk,
        Kind::DetachDisk,
        Kind::DumpCore,
        Kind::Find,
        Kind::Get,
    ];
    for _ in 0..300 {
        let kind = kinds[usize::try_from(dice.below(kinds.len() as u64)).unwrap()];
        // An undo that fails leaves what it could not take back, and says so; plugging is therefore only slow.
        let may_fail = !matches!(kind, Kind::AttachDisk | Kind::DetachDisk | Kind::Find | Kind::Get);
        let fate = match dice.below(12) {
            0 if may_fail => Fate::Fail(WorldError::Failed("by script".to_owned())),
            1 if may_fail => Fate::DoThenLose,
            2 if may_fail => Fate::DoThenTimeout,
            _ => Fate::DelayMs(dice.below(400)),
        };
        let rule = Rule::next(kind, fate).after(u32::try_from(dice.below(8)).unwrap());
        host.world.add_rule(rule).await.unwrap();
    }
    for kind in kinds {
        let slow = Fate::DelayMs(20 + dice.below(60));
        host.world.add_rule(Rule::next(kind, slow).times(u32::MAX)).await.unwrap();
    }
}

async fn crowd(seed: u64) {
    let mut dice = Dice(seed);
    let vm_settings = config::Vm { shutdown_timeout_s: 1, toolstack_timeout_s: 10, ..Settings::default().vm };
    let host = Arc::new(Host::with(Settings { vm: vm_settings, ..Settings::default() }));
    let seen = Arc::new(Mutex::new(Seen::default()));
    let watch = Arc::clone(&seen);
    let life = Life::under(&host, Store::memory(), CancellationToken::new(), |inner| {
        Arc::new(Watch { inner, seen: watch })
    });
    let life = Arc::new(life.await);
    let mut vms = Vec::new();
    for n in 0..VMS {
        let vm = life.created(&format!("vm{n}")).await;
        if n % 5 == 0 {
            host.world.set_behaviour(Some(vm), Behaviour::deaf()).await.unwrap();
        }
        vms.push(vm);
    }
    disturb(&host, &mut dice).await;
    let vms = Arc::new(vms);
    let clients = (0..CLIENTS).map(|n| {
        let dice = Dice(seed.wrapping_mul(1_000_003).wrapping_add(n));
        tokio::spawn(client(Arc::clone(&life), Arc::clone(&host), Arc::clone(&vms), dice))
    });
    let all = futures_util::future::join_all(clients.collect::<Vec<_>>());
    let all = tokio::time::timeout(Duration::from_secs(36_000), all).await;
    let asked: Vec<(JobId, Instant)> = all
        .unwrap_or_else(|_| panic!("seed {seed}: stuck: {:?}", life.engine.locks()))
        .into_iter()
        .flat_map(Result::unwrap)
        .collect();
    host.world.clear_rules().await.unwrap();
    life.good("discover", plan::discover()).await;
    life.quiet().await;
    life.assert_agreement(&host).await;
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    for (_, job) in
        life.store.scan(&dom0d::store::Table::<JobRecord>::new("job", 1), Range::all()).await.unwrap()
    {
        assert_eq!(seen.ends.get(&job.id), Some(&vec![job.state]), "seed {seed}: job {} ends once", job.id);
    }
    let mut waits: Vec<Duration> =
        asked.iter().filter_map(|(id, at)| Some(seen.began.get(id)?.duration_since(*at))).collect();
    waits.retain(|wait| !wait.is_zero());
    waits.sort_unstable();
    let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    assert!(waits.len() > 100, "seed {seed}: only {} jobs had to wait", waits.len());
    assert!(longest <= median * 10, "seed {seed}: longest {longest:?}, median {median:?}");
}

#[test]
fn two_hundred_clients_on_twenty_vms_end_without_deadlock_starvation_or_anything_left_behind() {
    let alone = |seed| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(crowd(seed));
    };
    // Crowds on a few threads: each mostly waits for the disk its saved VMs go to.
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || (thread..SEEDS).step_by(THREADS as usize).for_each(alone));
        }
    });
}
