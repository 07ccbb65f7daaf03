//! What the network costs: planning, discovery beside the bare netlink dump, 500 bridges beside `ip -batch`, and the way back:
//! `cargo bench --bench network` (as root, in network namespaces of its own).
//!
//! What is compared with something is measured beside it in the same run, in turns; medians are told.
#![allow(clippy::unwrap_used, reason = "a bench: a failure shall stop it")]
#![allow(clippy::explicit_write, reason = "println is for what must never print")]

use dom0d::config::Settings;
use dom0d::event::Query;
use dom0d::host::HostRecord;
use dom0d::job::{Engine, JobRecord, JobState, Options as JobOptions};
use dom0d::kernel::Kernel;
use dom0d::kernel::linux::LinuxKernel;
use dom0d::machine::sim::SimMachine;
use dom0d::model::network::{Address, Bridge, Change, Kind, LinkView, NetworkView, VlanId};
use dom0d::model::{IfName, JobId, SafePath};
use dom0d::network::{Desired, DesiredLink, Scope, aim, plan, validate};
use dom0d::operation::network::{Options, Want, apply};
use dom0d::operation::{Access, Operations, Worlds};
use dom0d::sim;
use dom0d::store::{self, Store};
use dom0d::xen::sim::SimToolstack;
use futures_util::TryStreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;

fn main() {
    // Without it we were only built, with all other targets.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    planning();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(discovery());
    runtime.block_on(bridges());
    runtime.block_on(failures());
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap();
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn name(text: &str) -> IfName {
    IfName::parse(text).unwrap()
}

/// 500 VLANs on one port, each in a bridge with an address.
fn planning() {
    let mut now = NetworkView::default();
    now.links.insert(name("eth0"), LinkView { up: true, ..LinkView::new(Kind::Ethernet) });
    let mut desired = Desired::default();
    for n in 1..=500 {
        let vlan = name(&format!("eth0.{n}"));
        let kind = Kind::Vlan { parent: name("eth0"), id: VlanId::new(n).unwrap() };
        desired.links.insert(vlan.clone(), DesiredLink::new(kind));
        let mut bridge = DesiredLink::new(Kind::Bridge(Bridge::default()));
        bridge.ports.insert(vlan);
        let address = format!("10.{}.{}.1/24", n / 250, n % 250);
        bridge.addresses = Some(BTreeSet::from([Address::parse(&address).unwrap()]));
        desired.links.insert(name(&format!("br{n}")), bridge);
    }
    let mut times = Vec::new();
    let mut steps = 0;
    for _ in 0..31 {
        let began = Instant::now();
        let before = Desired::default();
        assert_eq!(validate(&desired, &before, &now, &BTreeMap::new()), []);
        let aim = aim(&now, &before, &desired);
        steps = plan(&now, &aim, &Scope::of(&before, &desired, &now)).len();
        times.push(began.elapsed());
    }
    say(&format!(
        "checked, aimed at and planned, 1,000 objects ({steps} steps): {:.1} ms (bar 20 ms)",
        median(times).as_secs_f64() * 1e3
    ));
}

/// A namespace of our own, and the kernel in it.
struct Own {
    namespace: OwnedFd,
    kernel: LinuxKernel,
}

impl Own {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
            OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net").unwrap())
        });
        let namespace = made.join().unwrap();
        let kernel = LinuxKernel::in_namespace_of(namespace.try_clone().unwrap());
        Self { namespace, kernel }
    }

    /// `ip -batch`, in here.
    fn ip(&self, lines: &[String]) -> Duration {
        let target = format!("--net=/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd());
        let began = Instant::now();
        let mut child = Command::new("nsenter")
            .args([target.as_str(), "ip", "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all((lines.join("\n") + "\n").as_bytes()).unwrap();
        drop(input);
        assert!(child.wait().unwrap().success());
        began.elapsed()
    }
}

/// 2,000 links, read as the daemon does, and by the bare dump of the same tables.
async fn discovery() {
    let own = Own::new();
    for n in 0..1000 {
        let kind = Kind::Veth { peer: Some(name(&format!("p{n}"))) };
        own.kernel
            .change(&Change::Create { link: name(&format!("v{n}")), kind, mac: None, mtu: None })
            .await
            .unwrap();
    }
    let bare = bare_handle(own.namespace.try_clone().unwrap());
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..=ROUNDS {
        let began = Instant::now();
        assert!(own.kernel.network().await.unwrap().links.len() >= 2000);
        ours.push(began.elapsed());
        let began = Instant::now();
        assert!(bare_dump(&bare).await >= 2000);
        theirs.push(began.elapsed());
    }
    let (ours, theirs) = (median(ours), median(theirs));
    say(&format!(
        "discovery of 2,000 links: {:.1} ms, the bare dump {:.1} ms: {:.2} times (bar 3)",
        ours.as_secs_f64() * 1e3,
        theirs.as_secs_f64() * 1e3,
        ours.as_secs_f64() / theirs.as_secs_f64()
    ));
}

fn bare_handle(namespace: OwnedFd) -> rtnetlink::Handle {
    let runtime = tokio::runtime::Handle::current();
    let made = std::thread::spawn(move || {
        let _entered = runtime.enter();
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        runtime.spawn(connection);
        handle
    });
    made.join().unwrap()
}

async fn bare_dump(handle: &rtnetlink::Handle) -> usize {
    let links: Vec<_> = handle.link().get().execute().try_collect().await.unwrap();
    let _: Vec<_> = handle.address().get().execute().try_collect().await.unwrap();
    for family in [rtnetlink::RouteMessageBuilder::<std::net::Ipv4Addr>::new().build()] {
        let _: Vec<_> = handle.route().get(family).execute().try_collect().await.unwrap();
    }
    links.len()
}

/// 500 bridges, each with a veth for a port: as one change of the daemon, on disk before and after, and by `ip -batch`.
async fn bridges() {
    const BRIDGES: usize = 500;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let own = Own::new();
        own.ip(&veths(BRIDGES));
        let agent = Agent::begin(&own).await;
        let began = Instant::now();
        let record = agent.change(over_veths(BRIDGES)).await;
        ours.push(began.elapsed());
        assert_eq!(record.state, JobState::Succeeded, "{:?}", record.fault);
        let own = Own::new();
        own.ip(&veths(BRIDGES));
        let lines: Vec<String> = (0..BRIDGES)
            .flat_map(|n| {
                [
                    format!("link add b{n} type bridge"),
                    format!("link set v{n} master b{n} up"),
                    format!("link set b{n} up"),
                ]
            })
            .collect();
        theirs.push(own.ip(&lines));
    }
    let (ours, theirs) = (median(ours), median(theirs));
    say(&format!(
        "{BRIDGES} bridges, each with a port, as one journalled change, verified: {:.0} ms, ip -batch {:.0} ms: {:.2} times (bar 1.5)",
        ours.as_secs_f64() * 1e3,
        theirs.as_secs_f64() * 1e3,
        ours.as_secs_f64() / theirs.as_secs_f64()
    ));
}

/// A change of 40 steps that the kernel refuses at one of them: from its submission until it is rolled back, discovered and
/// acknowledged.
async fn failures() {
    const BRIDGES: usize = 10;
    let own = Own::new();
    own.ip(&veths(BRIDGES));
    let agent = Agent::begin(&own).await;
    let mut times = Vec::new();
    for round in 0..100 {
        // A bridge that cannot be made, since the name is another link's second one.
        let taken = round % BRIDGES;
        own.ip(&[format!("link property add dev p0 altname b{taken}")]);
        let began = Instant::now();
        let record = agent.change(over_veths(BRIDGES)).await;
        times.push(began.elapsed());
        assert_eq!(record.state, JobState::Failed);
        let unacknowledged = Query { unacknowledged: true, limit: 9, ..Query::default() };
        let open = agent.operations.events.list(&unacknowledged).await.unwrap().events;
        assert!(open.iter().all(|(_, event)| event.kind != "network.operation_failed"), "{open:?}");
        own.ip(&[format!("link property del dev p0 altname b{taken}")]);
    }
    times.sort();
    say(&format!(
        "failed at one of 40 steps, rolled back, discovered, acknowledged: median {:.0} ms, p99 {:.0} ms, worst of 100 {:.0} ms (bar 2,000 ms)",
        times[49].as_secs_f64() * 1e3,
        times[98].as_secs_f64() * 1e3,
        times[99].as_secs_f64() * 1e3
    ));
}

/// The daemon's operations and jobs with their store on disk, on the kernel of one namespace.
struct Agent {
    operations: Arc<Operations>,
    engine: Engine,
    _folder: tempfile::TempDir,
}

struct NoAccess;

impl Access for NoAccess {
    fn policy_changed(&self, _: Option<&str>, _: &HostRecord) {}

    fn renew_certificate(&self, _: bool) -> Result<bool, String> {
        Ok(true)
    }
}

impl Agent {
    async fn begin(own: &Own) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Arc::new(Settings::default());
        let world = sim::Handle::in_process(sim::Options::default());
        let limit = Duration::from_secs(10);
        let worlds = Worlds {
            toolstack: Arc::new(SimToolstack::new(world.clone(), limit)),
            machine: Arc::new(SimMachine::new(world, limit)),
            kernel: Arc::new(own.kernel.clone()),
        };
        let store = Store::open(store::Options::new(folder.path())).unwrap().store;
        let path = SafePath::parse(folder.path().to_str().unwrap()).unwrap();
        let operations =
            Operations::load(store.clone(), worlds, Arc::clone(&settings), Arc::new(NoAccess), path)
                .await
                .unwrap();
        let executor = Arc::clone(&operations) as _;
        let engine = Engine::open(store, executor, settings.jobs.clone(), JobId(0)).await.unwrap();
        operations.join_engine(engine.clone());
        Self { operations, engine, _folder: folder }
    }

    async fn change(&self, desired: Desired) -> Arc<JobRecord> {
        let want = Want::Whole(Box::new(desired));
        let plan = apply::change("bench", want, Options::default(), None, None);
        let submission = self.operations.submission("network_apply", "bench", plan, JobOptions::default());
        let job = self.engine.submit(submission).await.unwrap();
        self.engine.wait(job, Duration::from_secs(60)).await.unwrap().unwrap()
    }
}

/// A bridge on each of them.
fn over_veths(count: usize) -> Desired {
    let mut desired = Desired::default();
    for n in 0..count {
        let mut bridge = DesiredLink::new(Kind::Bridge(Bridge::default()));
        bridge.ports.insert(name(&format!("v{n}")));
        desired.links.insert(name(&format!("b{n}")), bridge);
    }
    desired
}

fn veths(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("link add v{n} type veth peer name p{n}")).collect()
}
