//! Changes of the network on the simulated host: a failure, a death and a reboot at every step, rollbacks that are blocked,
//! the manager cut off, and what is declared after a boot.

use crate::faulty::Faulty;
use crate::house::*;
use dom0d::job::{JobRecord, JobState};
use dom0d::kernel::Kernel;
use dom0d::kernel::sim::SimKernel;
use dom0d::model::network::{
    Address, Bond, BondMode, Bridge, Change, Hop, Kind, LacpRate, Mtu, NetworkView, PortVlan, Route, VlanId,
};
use dom0d::model::{IfName, Mac};
use dom0d::network::{Desired, DesiredLink, Way};
use dom0d::operation::network::{Ending, OnFailure, Options, Want, apply, look};
use dom0d::operation::plan::{self, Plan};
use dom0d::sim::Request;
use dom0d::vm::Autostart;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub fn name(text: &str) -> IfName {
    IfName::parse(text).unwrap()
}

pub fn address(text: &str) -> Address {
    Address::parse(text).unwrap()
}

/// What is there before: a bridge with an address and a route, declared by us.
pub fn first() -> Desired {
    let mut desired = Desired::default();
    let mut bridge = DesiredLink::new(Kind::Bridge(Bridge::default()));
    bridge.addresses = Some(BTreeSet::from([address("198.51.100.1/24"), address("2001:db8:7::1/64")]));
    bridge.mtu = Some(Mtu::new(1400).unwrap());
    desired.links.insert(name("old"), bridge);
    let options = Bond { miimon_ms: 100, primary: Some(name("eth2")), ..Bond::new(BondMode::ActiveBackup) };
    desired.links.extend(bond_and_trunk(options, &["eth2"], 20, "02:00:00:00:00:aa"));
    let via = Some("198.51.100.2".parse().unwrap());
    desired.routes.insert(Route { via, ..Route::new(address("203.0.113.0/24")) });
    desired
}

/// A bond, and a bridge with VLAN filtering, a MAC of its own, and a port that one VLAN passes.
fn bond_and_trunk(options: Bond, ports: &[&str], vlan: u64, mac: &str) -> [(IfName, DesiredLink); 3] {
    let mut bond = DesiredLink::new(Kind::Bond(options));
    bond.ports = ports.iter().map(|port| name(port)).collect();
    let mut trunk = DesiredLink::new(Kind::Bridge(Bridge { vlan_filtering: true, ..Bridge::default() }));
    trunk.ports.insert(name("d0"));
    trunk.mac = Some(Mac::parse(mac).unwrap());
    let mut port = DesiredLink::new(Kind::Dummy);
    port.vlans = Some([PortVlan { id: VlanId::new(vlan).unwrap(), pvid: true, untagged: true }].into());
    [(name("bond7"), bond), (name("trunk"), trunk), (name("d0"), port)]
}

/// In its place: five VLANs with their bridges and addresses, and a route: over 30 steps.
pub fn second() -> Desired {
    let mut desired = Desired::default();
    for n in 10..15 {
        let (vlan, bridge) = (name(&format!("eth0.{n}")), name(&format!("br{n}")));
        let id = VlanId::new(n).unwrap();
        desired.links.insert(vlan.clone(), DesiredLink::new(Kind::Vlan { parent: name("eth0"), id }));
        let mut over = DesiredLink::new(Kind::Bridge(Bridge::default()));
        over.ports.insert(vlan);
        over.addresses = Some(BTreeSet::from([address(&format!("10.0.{n}.1/24"))]));
        desired.links.insert(bridge, over);
    }
    // And what stays becomes another: mode, port, VLAN, MAC.
    let options = Bond { miimon_ms: 200, lacp_rate: LacpRate::Fast, ..Bond::new(BondMode::Lacp) };
    desired.links.extend(bond_and_trunk(options, &["eth2", "eth3"], 30, "02:00:00:00:00:bb"));
    let via = Some("10.0.10.2".parse().unwrap());
    desired.routes.insert(Route { via, ..Route::new(address("203.0.113.0/24")) });
    desired
}

fn manager() -> Way {
    Way { peer: [192, 0, 2, 1].into(), own: Some([192, 0, 2, 10].into()) }
}

pub fn change(desired: Desired, options: Options) -> Plan {
    apply::change("test", Want::Whole(Box::new(desired)), options, Some(manager()), None)
}

/// A host whose kernel has faults.
pub fn house() -> (Host, Arc<Faulty>) {
    let mut host = Host::new();
    let kernel = Faulty::new(Arc::new(SimKernel::new(host.world.clone(), Duration::from_secs(10))));
    host.kernel = Arc::clone(&kernel) as _;
    (host, kernel)
}

/// Without what comes by itself.
pub async fn is(kernel: &Faulty) -> NetworkView {
    let mut view = kernel.network().await.unwrap();
    view.links.values_mut().for_each(|link| link.carrier = false);
    view
}

pub fn fault(record: &JobRecord) -> &str {
    record.fault.as_ref().map_or("", |fault| fault.name.as_str())
}

/// The event of a failure is there once, and acknowledged; nothing is open.
pub async fn assert_told_and_acknowledged(life: &Life) {
    let failed = life.events("network.operation_failed").await;
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(failed[0].acknowledged.as_ref().is_some_and(|ack| ack.by.contains("discovery")), "{failed:?}");
    assert_eq!(life.operations.network_open().await.unwrap(), None);
    assert_eq!(life.engine.locks(), vec![]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_at_each_step_leaves_the_network_as_it_was_within_five_seconds() {
    let mut at = 1;
    loop {
        let (host, kernel) = house();
        let life = Life::begin(&host).await;
        life.good("network_apply", change(first(), Options::default())).await;
        let before = is(&kernel).await;
        kernel.heal();
        kernel.refuse_at.store(at, Ordering::SeqCst);
        let began = Instant::now();
        let record = life.run("network_apply", change(second(), Options::default())).await;
        if kernel.asked.load(Ordering::SeqCst) < at {
            assert_eq!(record.state, JobState::Succeeded);
            break;
        }
        assert_eq!((record.state, fault(&record)), (JobState::Failed, "NETWORK_FAILED"), "{at}: {record:?}");
        assert!(began.elapsed() <= Duration::from_secs(5), "{at}: {:?}", began.elapsed());
        assert_eq!(is(&kernel).await, before, "step {at}");
        assert_told_and_acknowledged(&life).await;
        assert_eq!(life.operations.network_confirmed().await.unwrap().desired, first());
        assert_eq!(life.operations.network_history(1).await.unwrap()[0].ending, Ending::RolledBack);
        at += 1;
    }
    assert!(at > 40, "{at} steps");
}

#[tokio::test(start_paused = true)]
async fn what_worked_is_kept_if_that_was_asked_for_and_is_declared_from_then_on() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    let options = Options { on_failure: OnFailure::Keep, ..Options::default() };
    kernel.refuse_at.store(20, Ordering::SeqCst);
    let record = life.run("network_apply", change(second(), options)).await;
    assert_eq!((record.state, fault(&record)), (JobState::Failed, "NETWORK_FAILED"));
    assert_told_and_acknowledged(&life).await;
    let shown = life.operations.network_show().await.unwrap();
    assert!(!shown.confirmed.desired.links.is_empty());
    assert!(shown.confirmed.desired.links.keys().all(|link| shown.now.links.contains_key(link)));
    assert_eq!(shown.drift, Vec::<String>::new(), "the record is what the kernel has");
    assert_eq!(life.operations.network_history(1).await.unwrap()[0].ending, Ending::Kept);
}

#[tokio::test(start_paused = true)]
async fn what_went_back_at_once_is_not_kept_and_what_was_declared_stays_declared() {
    // Its first steps take the manager's bridge apart: then nothing may be kept.
    let far = |via: &str| Route { via: Some(via.parse().unwrap()), ..Route::new(address("198.18.0.0/15")) };
    let mut before = first();
    before.routes.insert(far("192.0.2.1"));
    let mut after = first();
    let mut bridge = DesiredLink::new(Kind::Bridge(Bridge::default()));
    bridge.ports.insert(name("eth0"));
    bridge.addresses = Some(BTreeSet::from([address("192.0.2.10/24")]));
    after.links.insert(name("mgmt"), bridge);
    let mut old = DesiredLink::new(Kind::Bridge(Bridge::default()));
    old.addresses = Some(BTreeSet::new());
    after.links.insert(name("xenbr0"), old);
    after.routes.insert(far("192.0.2.99"));
    let via = Some("192.0.2.1".parse().unwrap());
    after.routes.insert(Route { via, ..Route::new(address("0.0.0.0/0")) });
    let mut rolled_back = 0;
    for at in 1.. {
        let (host, kernel) = house();
        let life = Life::begin(&host).await;
        life.good("network_apply", change(before.clone(), Options::default())).await;
        let is_before = is(&kernel).await;
        kernel.heal();
        kernel.refuse_at.store(at, Ordering::SeqCst);
        let options = Options { on_failure: OnFailure::Keep, ..Options::default() };
        let record = life.run("network_apply", change(after.clone(), options)).await;
        if record.state == JobState::Succeeded {
            assert!(at > 6 && rolled_back > 2, "{rolled_back} of {at} steps");
            break;
        }
        let shown = life.operations.network_show().await.unwrap();
        assert_eq!(shown.drift, Vec::<String>::new(), "{at}");
        if life.operations.network_history(1).await.unwrap()[0].ending == Ending::RolledBack {
            assert_eq!((is(&kernel).await, shown.confirmed.desired), (is_before, before.clone()), "{at}");
            rolled_back += 1;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_stopped_in_order_leaves_no_change_that_nobody_confirmed() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    let before = is(&kernel).await;
    let options = Options { confirm_within_s: Some(600), ..Options::default() };
    let job = life.submit("network_apply", change(second(), options)).await;
    seconds(5.0).await;
    assert_ne!(is(&kernel).await, before);
    life.engine.halt(Duration::from_secs(10)).await;
    assert_eq!(is(&kernel).await, before, "also while no agent runs");
    let store = life.crash().await;
    let life = Life::on(&host, store, CancellationToken::new()).await;
    let record = life.end(job).await;
    assert_eq!(fault(&record), "INTERRUPTED");
    assert_eq!(is(&kernel).await, before);
    assert_told_and_acknowledged(&life).await;
}

#[tokio::test(start_paused = true)]
async fn a_clients_end_that_takes_its_lease_along_is_no_failure_of_the_change() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    let link = |dhcp: bool, addresses: &[&str]| {
        let mut link = DesiredLink::new(Kind::Ethernet);
        (link.dhcp, link.addresses) =
            (dhcp, (!dhcp).then(|| addresses.iter().map(|one| address(one)).collect()));
        Desired { links: [(name("eth2"), link)].into(), ..Desired::default() }
    };
    life.good("network_apply", change(link(true, &[]), Options::default())).await;
    let leased = address("198.51.100.77/24");
    kernel.inner.change(&Change::AddAddress { link: name("eth2"), address: leased }).await.unwrap();
    let via = Some("198.51.100.1".parse().unwrap());
    let route = Route { via, link: Some(name("eth2")), metric: 9, ..Route::new(address("0.0.0.0/0")) };
    kernel.inner.change(&Change::AddRoute { route }).await.unwrap();
    kernel.lease_ends_with_client.store(true, Ordering::SeqCst);
    life.good("network_apply", change(link(false, &["203.0.113.5/24"]), Options::default())).await;
    assert_eq!(is(&kernel).await.links[&name("eth2")].addresses, [address("203.0.113.5/24")].into());
}

#[tokio::test(start_paused = true)]
async fn a_route_by_a_single_hop_is_what_the_kernel_makes_of_it() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    let before = is(&kernel).await;
    let hop = Hop { via: Some("192.0.2.9".parse().unwrap()), link: name("xenbr0"), weight: 1, onlink: false };
    let route = Route { hops: vec![hop], metric: 7, ..Route::new(address("0.0.0.0/0")) };
    let desired = Desired { routes: [route].into(), ..Desired::default() };
    life.good("network_apply", change(desired, Options::default())).await;
    assert_eq!(life.operations.network_show().await.unwrap().drift, Vec::<String>::new());
    life.good("network_apply", change(Desired::default(), Options::default())).await;
    assert_eq!(is(&kernel).await, before);
}

#[tokio::test(start_paused = true)]
async fn a_rollback_that_is_blocked_is_told_lets_nothing_else_begin_and_is_done_when_it_can_be() {
    for at in 1.. {
        let (host, kernel) = house();
        let life = Life::begin(&host).await;
        life.good("network_apply", change(first(), Options::default())).await;
        let before = is(&kernel).await;
        kernel.heal();
        kernel.refuse_from.store(at + 1, Ordering::SeqCst);
        let record = life.run("network_apply", change(second(), Options::default())).await;
        if record.state == JobState::Succeeded {
            assert!(at > 40, "{at} steps");
            break;
        }
        assert_eq!(life.events("network.rollback_blocked").await.len(), 1);
        assert!(life.operations.network_open().await.unwrap().is_some());
        life.bad("network_apply", change(first(), Options::default()), "NETWORK_BUSY").await;
        kernel.heal();
        seconds(2.0 * look::RETRY.as_secs_f64()).await;
        life.quiet().await;
        assert_eq!(is(&kernel).await, before, "{at}");
        assert_told_and_acknowledged(&life).await;
        assert_eq!(life.events("network.restored").await.len(), 1);
        let blocked = life.events("network.rollback_blocked").await;
        assert!(blocked.len() == 1 && blocked[0].acknowledged.is_some(), "{blocked:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_rollback_that_was_blocked_is_done_at_the_next_start() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    let before = is(&kernel).await;
    kernel.heal();
    kernel.refuse_from.store(10, Ordering::SeqCst);
    assert_eq!(life.run("network_apply", change(second(), Options::default())).await.state, JobState::Failed);
    let store = life.crash().await;
    kernel.heal();
    let life = Life::on(&host, store, CancellationToken::new()).await;
    life.quiet().await;
    assert_eq!(is(&kernel).await, before);
    assert_told_and_acknowledged(&life).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_before_or_after_any_step_finds_the_way_back_at_its_start() {
    for after in [false, true] {
        let mut at = 1;
        loop {
            let (host, kernel) = house();
            let life = Life::begin(&host).await;
            life.good("network_apply", change(first(), Options::default())).await;
            let before = is(&kernel).await;
            kernel.heal();
            let stand = if after { &kernel.stand_after } else { &kernel.stand_before };
            stand.store(at, Ordering::SeqCst);
            let job = life.submit("network_apply", change(second(), Options::default())).await;
            tokio::select! {
                () = kernel.stands.notified() => {}
                record = life.end(job) => {
                    assert_eq!(record.state, JobState::Succeeded);
                    break;
                }
            }
            let store = life.crash().await;
            kernel.heal();
            let life = Life::on(&host, store, CancellationToken::new()).await;
            let record = life.end(job).await;
            assert_eq!((record.state, fault(&record)), (JobState::Failed, "INTERRUPTED"), "{at} {after}");
            assert_eq!(is(&kernel).await, before, "step {at}, {after}");
            assert_told_and_acknowledged(&life).await;
            at += 1;
        }
        assert!(at > 40, "{at} steps");
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_that_cuts_its_caller_off_comes_back_and_says_why() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    let before = is(&kernel).await;
    kernel.cut_off.store(true, Ordering::SeqCst);
    let record = life.run("network_apply", change(second(), Options::default())).await;
    assert_eq!((record.state, fault(&record)), (JobState::Failed, "MANAGEMENT_LOST"), "{record:?}");
    assert_eq!(is(&kernel).await, before);
    assert_told_and_acknowledged(&life).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_rebooted_inside_the_window_comes_back_with_what_was_confirmed() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    let options = Options { confirm_within_s: Some(600), ..Options::default() };
    let job = life.submit("network_apply", change(second(), options)).await;
    seconds(5.0).await;
    assert!(is(&kernel).await.links.contains_key(&name("br10")));
    let store = life.crash().await;
    host.world.call(Request::HostReboot, Duration::from_secs(1)).await.unwrap();
    seconds(1.0).await;
    assert!(!is(&kernel).await.links.contains_key(&name("old")), "a kernel forgets");
    let life = Life::on(&host, store, CancellationToken::new()).await;
    let record = life.end(job).await;
    assert_eq!((record.state, fault(&record)), (JobState::Failed, "INTERRUPTED"));
    life.quiet().await;
    let now = is(&kernel).await;
    assert!(now.links.contains_key(&name("old")) && !now.links.contains_key(&name("br10")));
    assert_told_and_acknowledged(&life).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_confirmed_is_there_after_a_boot_before_the_first_vm_starts() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    let mut record = vm("on-old");
    record.config.vifs[0].bridge = name("old");
    let vm = record.id();
    life.good("create_vm", plan::create_vm(record)).await;
    life.good("vm_autostart", plan::vm_autostart(vm, Autostart { enabled: true, order: 1, delay_s: 0 }))
        .await;
    life.good("start_vm", plan::start_vm(vm)).await;
    let store = life.crash().await;
    host.world.call(Request::HostReboot, Duration::from_secs(1)).await.unwrap();
    seconds(1.0).await;
    let life = Life::on(&host, store, CancellationToken::new()).await;
    life.quiet().await;
    let now = is(&kernel).await;
    let vif = now.links.values().find(|link| link.kind == Kind::Vif).expect("the VM runs");
    assert_eq!(vif.controller, Some(name("old")));
}

#[tokio::test(start_paused = true)]
async fn drift_is_an_alert_with_the_plan_and_ends_with_the_drift() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    life.quiet().await;
    let link = name("old");
    let mtu = |mtu| dom0d::model::network::Change::SetMtu { link: link.clone(), mtu };
    kernel.inner.change(&mtu(1300)).await.unwrap();
    seconds(5.0).await;
    let alerts = life.events("network.drift").await;
    assert_eq!(alerts.len(), 1);
    assert!(alerts[0].acknowledged.is_none() && alerts[0].text.contains("1400"), "{alerts:?}");
    kernel.inner.change(&mtu(1400)).await.unwrap();
    seconds(5.0).await;
    let alerts = life.events("network.drift").await;
    assert!(alerts.len() == 1 && alerts[0].acknowledged.is_some(), "{alerts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_change_that_ends_before_its_first_effect_leaves_nothing_open() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    let before = is(&kernel).await;
    // Its time is over when the snapshot has been taken.
    *kernel.reading.lock().unwrap() = Duration::from_secs(3);
    let deadline = Some(Duration::from_secs(2));
    let options = dom0d::job::Options { deadline, ..dom0d::job::Options::default() };
    let plan = change(second(), Options::default());
    let submission = life.operations.submission("network_apply", "test", plan, options);
    let record = life.end(life.engine.submit(submission).await.unwrap()).await;
    *kernel.reading.lock().unwrap() = Duration::ZERO;
    assert_eq!((record.state, fault(&record)), (JobState::Failed, "JOB_DEADLINE"), "{record:?}");
    assert_eq!(record.steps[0].state, dom0d::job::StepState::Undone);
    assert_eq!(life.operations.network_open().await.unwrap(), None);
    assert_eq!(life.events("network.operation_failed").await.len(), 0, "nothing was done");
    assert_eq!(is(&kernel).await, before);
}

#[tokio::test(start_paused = true)]
async fn asking_again_for_what_is_declared_and_there_is_no_news() {
    let (host, _) = house();
    let life = Life::begin(&host).await;
    for _ in 0..3 {
        life.good("network_apply", change(first(), Options::default())).await;
    }
    assert_eq!(life.events("network.changed").await.len(), 1);
    assert_eq!(life.operations.network_history(10).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn who_acknowledges_by_hand_does_not_end_the_discovery_and_the_lock_is_seen_until_it_is_over() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    let before = is(&kernel).await;
    kernel.heal();
    kernel.refuse_at.store(20, Ordering::SeqCst);
    *kernel.reading.lock().unwrap() = Duration::from_secs(2);
    let job = life.submit("network_apply", change(second(), Options::default())).await;
    while life.events("network.operation_failed").await.is_empty() {
        seconds(0.1).await;
    }
    let query = dom0d::event::Query { limit: 1000, ..Default::default() };
    let page = life.operations.events.list(&query).await.unwrap();
    let (number, _) = page.events.iter().find(|(_, one)| one.kind == "network.operation_failed").unwrap();
    assert_eq!(life.operations.events.acknowledge(&[*number], "operator").await.unwrap(), 1);
    assert!(life.engine.locks().iter().any(|lock| lock.object == "network"), "{:?}", life.engine.locks());
    let record = life.end(job).await;
    let child = life.engine.get(record.children[0]).await.unwrap().unwrap();
    assert_eq!((child.verb.as_str(), child.state), ("network_discover", JobState::Succeeded));
    let failed = life.events("network.operation_failed").await;
    assert_eq!(failed[0].acknowledged.as_ref().unwrap().by, "operator");
    *kernel.reading.lock().unwrap() = Duration::ZERO;
    assert_eq!((is(&kernel).await, life.engine.locks()), (before, vec![]));
}
