//! Network namespaces of a test's own (network_namespaces(7)): they go with the last descriptor to them. And what only the real
//! kernel can show: two namespaces joined by a pair, and storms of notices.

use crate::kernel::name;
use dom0d::kernel::linux::LinuxKernel;
use dom0d::kernel::{Kernel, KernelError};
use dom0d::model::network::{Change, Kind, NeighbourState};
use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

pub struct Namespace(OwnedFd);

/// Made on a thread that ends: this one stays where it is.
pub fn fresh() -> Namespace {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests make network namespaces: run them as root");
        File::open("/proc/thread-self/ns/net").unwrap().into()
    });
    Namespace(made.join().expect("a fresh namespace"))
}

impl Namespace {
    pub fn kernel(&self) -> LinuxKernel {
        LinuxKernel::in_namespace_of(self.0.try_clone().unwrap())
    }

    /// By which other programs find it while this one lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// A program of this process's, run there by its descriptor.
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let path = self.path();
        let told = Command::new("nsenter")
            .arg(format!("--net={path}"))
            .arg(program)
            .args(arguments)
            .output()
            .expect("nsenter is installed");
        assert!(told.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&told.stderr));
        String::from_utf8(told.stdout).unwrap()
    }
}

pub async fn done(kernel: &LinuxKernel, changes: impl IntoIterator<Item = Change>) {
    for change in changes {
        assert_eq!(kernel.change(&change).await, Ok(()), "{change}");
    }
}

fn up(link: &str) -> Change {
    Change::SetUp { link: name(link), up: true }
}

pub fn address(link: &str, address: &str) -> Change {
    Change::AddAddress { link: name(link), address: address.parse().unwrap() }
}

/// `here0` in one, `there0` in the other.
pub async fn joined() -> (Namespace, Namespace) {
    let (here, there) = (fresh(), fresh());
    let kernel = here.kernel();
    let kind = Kind::Veth { peer: Some(name("there0")) };
    done(&kernel, [Change::Create { link: name("here0"), kind, mac: None, mtu: None }]).await;
    let other = format!("/proc/{}/fd/{}", std::process::id(), there.0.as_raw_fd());
    here.run("ip", &["link", "set", "there0", "netns", &other]);
    done(&kernel, [up("here0"), address("here0", "198.51.100.1/24"), address("here0", "2001:db8:1::1/64")])
        .await;
    let other = there.kernel();
    done(&other, [up("there0"), address("there0", "198.51.100.2/24"), address("there0", "2001:db8:1::2/64")])
        .await;
    (here, there)
}

#[tokio::test]
async fn a_pair_between_namespaces_has_no_peer_here_and_is_not_ours_to_remove() {
    let (here, _there) = joined().await;
    let kernel = here.kernel();
    let view = kernel.network().await.unwrap();
    assert_eq!(view.links[&name("here0")].kind, Kind::Veth { peer: None });
    let told = kernel.change(&Change::Delete { link: name("here0") }).await;
    assert_eq!(told, Err(KernelError::Refused(dom0d::model::network::Refused::NotSupported)));
}

#[tokio::test]
async fn a_neighbour_that_answers_is_reached_and_one_that_has_gone_silent_is_not_though_it_was_just_known() {
    let (here, there) = joined().await;
    let (kernel, other) = (here.kernel(), there.kernel());
    for to in ["198.51.100.2", "2001:db8:1::2"] {
        let to = to.parse().unwrap();
        let answers = async {
            while kernel.reaches(to).await != Ok(true) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, answers).await.expect("it answers");
        assert_eq!(kernel.reaches(to).await, Ok(true), "asked again");
        let all = kernel.neighbours().await.unwrap();
        let told = all.iter().find(|one| one.ip == to && one.link == name("here0")).expect("it is known");
        assert!(told.state == NeighbourState::Reachable && told.mac.is_some(), "{told:?}");
    }
    // The carrier stays; only the address is gone, and the neighbour's entry is fresh.
    for gone in ["198.51.100.2/24", "2001:db8:1::2/64"] {
        done(&other, [Change::DeleteAddress { link: name("there0"), address: gone.parse().unwrap() }]).await;
    }
    assert_eq!(kernel.reaches("198.51.100.2".parse().unwrap()).await, Ok(false));
    assert_eq!(kernel.reaches("2001:db8:1::2".parse().unwrap()).await, Ok(false));
    let all = kernel.neighbours().await.unwrap();
    assert!(!all.iter().any(|one| one.state == NeighbourState::Reachable), "{all:?}");
}

#[tokio::test]
async fn a_gateway_that_answers_reaches_what_is_behind_it() {
    let (here, _there) = joined().await;
    let kernel = here.kernel();
    let route = |via: &str| dom0d::model::network::Route {
        via: Some(via.parse().unwrap()),
        ..dom0d::model::network::Route::new("0.0.0.0/0".parse().unwrap())
    };
    let far = "203.0.113.77".parse().unwrap();
    assert_eq!(kernel.reaches(far).await, Ok(false), "no route");
    done(&kernel, [Change::AddRoute { route: route("198.51.100.2") }]).await;
    assert_eq!(kernel.reaches(far).await, Ok(true));
    done(&kernel, [Change::DeleteRoute { route: route("198.51.100.2") }]).await;
    done(&kernel, [Change::AddRoute { route: route("198.51.100.3") }]).await;
    assert_eq!(kernel.reaches(far).await, Ok(false), "nobody is at the gateway");
}

#[tokio::test]
async fn a_handle_to_another_namespace_leaves_the_tests_own_alone() {
    let fresh = fresh();
    let kernel = fresh.kernel();
    let links = kernel.links().await.unwrap();
    assert_eq!(links.iter().map(|link| link.name.as_str()).collect::<Vec<_>>(), ["lo"]);
    let traffic = kernel.traffic().await.unwrap();
    assert_eq!(traffic.iter().map(|link| link.name.as_str()).collect::<Vec<_>>(), ["lo"]);
    let kind = Kind::Veth { peer: Some(name("kx1")) };
    done(&kernel, [Change::Create { link: name("kx0"), kind, mac: None, mtu: None }]).await;
    assert!(!LinuxKernel::new().network().await.unwrap().links.contains_key(&name("kx0")));
    let path = format!("/proc/{}/fd/{}", std::process::id(), fresh.0.as_raw_fd());
    let again = LinuxKernel::in_namespace(path.as_ref()).unwrap();
    assert!(again.network().await.unwrap().links.contains_key(&name("kx0")));
}

#[tokio::test]
async fn a_guests_card_is_known_by_its_name_and_is_not_ours_to_remove() {
    let fresh = fresh();
    fresh.run("ip", &["link", "add", "vif7.0", "type", "veth", "peer", "name", "guest"]);
    fresh.run("ip", &["link", "add", "name", "a+b", "type", "bridge"]);
    let kernel = fresh.kernel();
    let view = kernel.network().await.unwrap();
    assert_eq!(view.links[&name("vif7.0")].kind, Kind::Vif);
    assert_eq!(view.links.len(), 3, "a name that we do not take is left out: {view:?}");
    assert!(kernel.change(&Change::Delete { link: name("vif7.0") }).await.is_err());
}

#[tokio::test]
async fn routes_that_nobody_here_asked_for_are_left_out() {
    let fresh = fresh();
    let kernel = fresh.kernel();
    let kind = Kind::Bridge(dom0d::model::network::Bridge::default());
    done(&kernel, [Change::Create { link: name("kb0"), kind, mac: None, mtu: None }, up("kb0")]).await;
    done(&kernel, [address("kb0", "198.51.100.1/24"), address("kb0", "2001:db8:1::1/64")]).await;
    fresh.run("ip", &["route", "add", "blackhole", "203.0.113.0/24"]);
    fresh.run("ip", &["route", "add", "203.0.114.0/24", "dev", "kb0", "table", "77"]);
    fresh.run(
        "ip",
        &[
            "route",
            "add",
            "203.0.115.0/24",
            "nexthop",
            "via",
            "198.51.100.2",
            "nexthop",
            "via",
            "198.51.100.3",
        ],
    );
    fresh.run("ip", &["route", "add", "203.0.116.0/24", "dev", "kb0", "proto", "ra"]);
    fresh.run(
        "ip",
        &["route", "add", "203.0.117.0/24", "dev", "kb0", "proto", "dhcp", "metric", "9", "mtu", "1400"],
    );
    let routes = kernel.network().await.unwrap().routes;
    let told: Vec<String> = routes.iter().map(ToString::to_string).collect();
    let expected = [
        "203.0.114.0/24 by kb0 in table 77",
        "203.0.115.0/24 via 198.51.100.2 by kb0 and via 198.51.100.3 by kb0",
        "203.0.117.0/24 by kb0",
    ];
    assert_eq!(told, expected);
    // Whatever made them: taken away and put back, `ip` tells the same of them.
    let ip = || fresh.run("ip", &["-d", "route", "show", "table", "all"]);
    let before = ip();
    for route in routes {
        done(&kernel, [Change::DeleteRoute { route: route.clone() }, Change::AddRoute { route }]).await;
    }
    let sorted = |text: String| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(sorted(ip()), sorted(before));
}

#[tokio::test]
async fn a_handle_that_is_dropped_leaves_no_thread_behind() {
    let fresh = fresh();
    let here = std::fs::read_link(format!("/proc/self/fd/{}", fresh.0.as_raw_fd())).unwrap();
    // The threads that live in this namespace: ours alone.
    let threads = || {
        let all = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        all.filter(|task| std::fs::read_link(task.path().join("ns/net")).is_ok_and(|there| there == here))
            .count()
    };
    let kernel = fresh.kernel();
    let mut bell = kernel.observe();
    bell.recv().await.unwrap();
    kernel.network().await.unwrap();
    assert_eq!(threads(), 2, "one for questions, one for notices");
    drop((kernel, bell));
    let gone = async {
        while threads() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("they end");
}

#[tokio::test]
async fn the_hosts_own_namespace_tells_facts_and_owners_too() {
    let kernel = LinuxKernel::new();
    let view = kernel.network().await.unwrap();
    for link in view.links.keys() {
        kernel.facts(link).await.unwrap();
    }
    let owners = kernel.owners().await.unwrap();
    assert!(owners.keys().all(|link| view.links.contains_key(link)), "{owners:?}");
}
