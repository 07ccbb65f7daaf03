//! The same changes on the real kernel, in a network namespace of their own: a failure at every
//! change and a death at every third, judged by our own reading and by what `ip` tells.

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
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
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

/// `ip`, in there.
fn ip(namespace: &OwnedFd, arguments: &[&str]) -> String {
    let target = format!("--net=/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    let told = Command::new("nsenter").args([target.as_str(), "ip"]).args(arguments).output().unwrap();
    assert!(told.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&told.stderr));
    String::from_utf8(told.stdout).unwrap()
}

/// What others see, without what time brings: not our own reading, which could miss what our own change misses.
fn seen(namespace: &OwnedFd) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for ask in ["-d route show table all", "-d -6 route show table all", "-o addr", "-o link"] {
        let told = ip(namespace, &ask.split(' ').collect::<Vec<_>>());
        let words = |line: &str| {
            // The numbers of links change when they are made anew, states come a moment later, and a link that was on once
            // has had its queue chosen.
            let line = line
                .split_once(": ")
                .filter(|(n, _)| n.parse::<u32>().is_ok())
                .map_or(line, |(_, rest)| rest);
            let unsteady = [
                "linkdown",
                "dead",
                "state",
                "UP",
                "DOWN",
                "UNKNOWN",
                "LOWERLAYERDOWN",
                "tentative",
                "noop",
                "noqueue",
            ];
            let words = line.split_ascii_whitespace().filter(|word| !unsteady.contains(word));
            words.filter(|word| !word.starts_with('<')).collect::<Vec<_>>().join(" ")
        };
        // Link-local ones come when a link has been checked.
        all.extend(told.lines().filter(|line| !line.contains("fe80:")).map(words));
    }
    all
}

fn assert_seen(namespace: &OwnedFd, before: &BTreeSet<String>, at: usize) {
    let now = seen(namespace);
    let (lost, new): (Vec<_>, Vec<_>) = (before.difference(&now).collect(), now.difference(before).collect());
    assert!(lost.is_empty() && new.is_empty(), "message {at}: lost {lost:#?}, new {new:#?}");
}

/// What an operator and his routing daemon have made beside us, on bridges of ours.
fn beside_us(namespace: &OwnedFd) {
    for route in [
        "route add 198.18.0.0/15 via 10.1.1.7 table 100 src 10.1.1.1 proto bird",
        "route add 198.20.0.0/16 nexthop via 10.1.1.7 dev br1 nexthop via 10.1.0.7 dev br0 weight 3",
        "route add 198.22.0.0/16 via 192.88.99.1 dev br0 onlink",
        "route add 198.24.0.0/16 via 10.1.0.7 dev br0 mtu lock 1300 initcwnd 20 advmss 1200",
        "-6 route add 2001:db8:77::/48 via fe80::7 dev br0 proto dhcp metric 9",
    ] {
        ip(namespace, &route.split(' ').collect::<Vec<_>>());
    }
}

/// A host whose kernel's network is real, with ports to put into bridges.
async fn house() -> (Host, Arc<Faulty>, OwnedFd) {
    let mut host = Host::new();
    let namespace = namespace();
    let kernel = Faulty::new(Arc::new(LinuxKernel::in_namespace_of(namespace.try_clone().unwrap())));
    for n in 0..BRIDGES {
        let (link, peer) = (name(&format!("port{n}")), name(&format!("far{n}")));
        let kind = Kind::Veth { peer: Some(peer) };
        kernel.inner.change(&Change::Create { link, kind, mac: None, mtu: None }).await.unwrap();
    }
    host.kernel = Arc::clone(&kernel) as _;
    (host, kernel, namespace)
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
    let (host, kernel, namespace) = house().await;
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first())).await;
    beside_us(&namespace);
    let (before, seen_before) = (is(&kernel).await, seen(&namespace));
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
        assert_seen(&namespace, &seen_before, at);
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
    // Nearly all: the machine may have stood still in one.
    assert!(took[took.len() * 9 / 10].as_secs() < 5, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_after_any_change_finds_the_real_kernels_way_back_at_its_start() {
    let (host, kernel, namespace) = house().await;
    let mut life = Life::begin(&host).await;
    life.good("network_apply", change(first())).await;
    beside_us(&namespace);
    let (before, seen_before) = (is(&kernel).await, seen(&namespace));
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
        assert_seen(&namespace, &seen_before, at);
    }
}
