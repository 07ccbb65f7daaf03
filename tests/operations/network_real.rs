//! The same changes on the real kernel, in a network namespace of their own: a failure and a death at every message, and
//! what passes through a bridge meanwhile.

use crate::faulty::Faulty;
use crate::house::*;
use crate::network::{is, name};
use dom0d::job::JobState;
use dom0d::kernel::linux::LinuxKernel;
use dom0d::model::network::{Address, Bridge, Change, Kind, Mtu, Route};
use dom0d::network::{Desired, DesiredLink};
use dom0d::operation::network::{Options, Want, apply};
use dom0d::operation::plan::Plan;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio_util::sync::CancellationToken;

const BRIDGES: u64 = 6;

/// A namespace that nobody else is in. Needs root, as the agent does.
fn namespace() -> OwnedFd {
    let made = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
        OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net").unwrap())
    });
    made.join().unwrap()
}

/// A host whose kernel's network is real, with ports to put into bridges.
async fn house() -> (Host, Arc<Faulty>) {
    let mut host = Host::new();
    let kernel = Faulty::new(Arc::new(LinuxKernel::in_namespace_of(namespace())));
    for n in 0..BRIDGES {
        let (link, peer) = (name(&format!("port{n}")), name(&format!("far{n}")));
        let kind = Kind::Veth { peer: Some(peer) };
        kernel.inner.change(&Change::Create { link, kind, mac: None, mtu: None }).await.unwrap();
    }
    host.kernel = Arc::clone(&kernel) as _;
    (host, kernel)
}

fn bridge(n: u64, mtu: u64) -> DesiredLink {
    let mut bridge = DesiredLink::new(Kind::Bridge(Bridge {
        stp: n.is_multiple_of(2),
        forward_delay_ms: 4000,
        ..Bridge::default()
    }));
    bridge.ports.insert(name(&format!("port{n}")));
    let addresses = [format!("10.1.{n}.1/24"), format!("2001:db8:{n}::1/64")];
    bridge.addresses = Some(addresses.iter().map(|text| Address::parse(text).unwrap()).collect());
    bridge.mtu = Some(Mtu::new(mtu).unwrap());
    bridge
}

fn route(n: u64) -> Route {
    let (to, via) = (Address::parse("203.0.113.0/24").unwrap(), format!("10.1.{n}.2").parse().unwrap());
    Route { via: Some(via), ..Route::new(to) }
}

/// Two bridges.
fn first() -> Desired {
    let links = (0..2).map(|n| (name(&format!("br{n}")), bridge(n, 1400))).collect();
    Desired { links, routes: BTreeSet::from([route(0)]), ..Desired::default() }
}

/// One of them goes, one changes, and more come.
fn second() -> Desired {
    let links = (1..BRIDGES).map(|n| (name(&format!("br{n}")), bridge(n, 1450))).collect();
    Desired { links, routes: BTreeSet::from([route(2)]), ..Desired::default() }
}

fn change(desired: Desired) -> Plan {
    apply::change("test", Want::Whole(Box::new(desired)), Options::default(), None, None)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_at_each_message_leaves_the_real_kernel_as_it_was_within_five_seconds() {
    let (host, kernel) = house().await;
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first())).await;
    let before = is(&kernel).await;
    let mut took = Vec::new();
    for at in 1.. {
        kernel.heal();
        kernel.refuse_at.store(at, Ordering::SeqCst);
        let began = Instant::now();
        let record = life.run("network_apply", change(second())).await;
        if kernel.asked.load(Ordering::SeqCst) < at {
            assert_eq!(record.state, JobState::Succeeded);
            break;
        }
        assert_eq!(record.state, JobState::Failed);
        assert_eq!(is(&kernel).await, before, "message {at}");
        let events = life.events("network.operation_failed").await;
        assert_eq!(events.len(), at, "one each");
        assert!(events.iter().all(|event| event.acknowledged.is_some()));
        took.push(began.elapsed());
    }
    assert!(took.len() >= 30, "{} messages", took.len());
    took.sort();
    println!(
        "failed, rolled back, discovered, acknowledged: {:?} at most, of {}",
        took.last().unwrap(),
        took.len()
    );
    assert!(took.last().unwrap().as_secs() < 5, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_at_any_message_finds_the_real_kernels_way_back_at_its_start() {
    let (host, kernel) = house().await;
    let mut life = Life::begin(&host).await;
    life.good("network_apply", change(first())).await;
    let before = is(&kernel).await;
    // Every third: the simulated kernel has seen them all.
    for at in (1..).step_by(3) {
        kernel.heal();
        kernel.stand_after.store(at, Ordering::SeqCst);
        let job = life.submit("network_apply", change(second())).await;
        tokio::select! {
            () = kernel.stands.notified() => {}
            record = life.end(job) => {
                assert_eq!(record.state, JobState::Succeeded);
                assert!(at > 30, "{at} messages");
                return;
            }
        }
        let store = life.crash().await;
        kernel.heal();
        life = Life::on(&host, store, CancellationToken::new()).await;
        assert_eq!(life.end(job).await.state, JobState::Failed);
        assert_eq!(is(&kernel).await, before, "message {at}");
    }
}
