//! What every body of the kernel's trait must do: the simulated one, and the real one in a network namespace of its own.
//! Rules about kinds that a kernel may lack (bonds, VLANs, dummies, VLAN filtering) look first whether it has them.

pub use crate::routes::*;
use dom0d::kernel::{Kernel, KernelError};
use dom0d::model::IfName;
use dom0d::model::network::{
    Address, Bond, BondMode, Bridge, Change, Kind, LacpRate, LinkView, NetworkView, PortVlan, Refused, Route,
    VlanId, XmitHash, perform,
};
use std::net::IpAddr;
use std::time::Duration;

/// Longer than any body takes for one call.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn name(text: &str) -> IfName {
    text.parse().unwrap()
}

pub fn address(text: &str) -> Address {
    text.parse().unwrap()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn vlan_id(id: u64) -> VlanId {
    VlanId::new(id).unwrap()
}

pub fn bridge() -> Kind {
    Kind::Bridge(Bridge::default())
}

pub fn pair(peer: &str) -> Kind {
    Kind::Veth { peer: Some(name(peer)) }
}

pub fn create(link: &str, kind: Kind) -> Change {
    Change::Create { link: name(link), kind, mac: None, mtu: None }
}

pub fn delete(link: &str) -> Change {
    Change::Delete { link: name(link) }
}

pub fn set_up(link: &str, up: bool) -> Change {
    Change::SetUp { link: name(link), up }
}

fn set_controller(link: &str, controller: Option<&str>) -> Change {
    Change::SetController { link: name(link), controller: controller.map(name) }
}

pub fn set_mtu(link: &str, mtu: u32) -> Change {
    Change::SetMtu { link: name(link), mtu }
}

pub fn add_address(link: &str, text: &str) -> Change {
    Change::AddAddress { link: name(link), address: address(text) }
}

pub fn delete_address(link: &str, text: &str) -> Change {
    Change::DeleteAddress { link: name(link), address: address(text) }
}

pub fn route(to: &str, via: Option<&str>, link: Option<&str>, metric: u32) -> Route {
    Route { via: via.map(ip), link: link.map(name), metric, ..Route::new(address(to)) }
}

pub fn add_route(route: Route) -> Change {
    Change::AddRoute { route }
}

pub fn delete_route(route: Route) -> Change {
    Change::DeleteRoute { route }
}

pub async fn view(kernel: &dyn Kernel) -> NetworkView {
    kernel.network().await.unwrap()
}

async fn link(kernel: &dyn Kernel, link: &str) -> LinkView {
    view(kernel).await.links.remove(&name(link)).unwrap_or_else(|| panic!("there is no {link}"))
}

async fn exists(kernel: &dyn Kernel, link: &str) -> bool {
    view(kernel).await.links.contains_key(&name(link))
}

pub async fn done(kernel: &dyn Kernel, changes: impl IntoIterator<Item = Change>) {
    for change in changes {
        let told = kernel.change(&change).await;
        assert_eq!(told, Ok(()), "{change}");
    }
}

pub async fn refused(kernel: &dyn Kernel, change: Change, why: Refused) {
    let before = view(kernel).await;
    assert_eq!(kernel.change(&change).await, Err(KernelError::Refused(why)), "{change}");
    assert_eq!(view(kernel).await, before, "{change}: a refusal changes nothing");
}

/// Waits until it is so: the kernel does some things after its answer.
async fn until(kernel: &dyn Kernel, what: &str, is_so: impl Fn(&NetworkView) -> bool) {
    let wait = async {
        while !is_so(&view(kernel).await) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "{what}: {:#?}", view(kernel).await);
}

/// Whether it has this kind. What it lacks is the lab's to show, where kernels have it.
#[allow(clippy::print_stdout, reason = "a test tells what it left out")]
async fn has(kernel: &dyn Kernel, kind: Kind, rule: &str) -> bool {
    match kernel.change(&create("probe0", kind.clone())).await {
        Ok(()) => {
            done(kernel, [delete("probe0")]).await;
            true
        }
        Err(KernelError::Refused(Refused::NotSupported)) => {
            println!("left to the lab: {rule}: this kernel has no {kind}");
            false
        }
        Err(error) => panic!("{kind}: {error}"),
    }
}

fn filtering() -> Kind {
    Kind::Bridge(Bridge { vlan_filtering: true, ..Bridge::default() })
}

pub async fn a_row_of_changes_ends_at_the_first_that_is_not_done(kernel: &dyn Kernel) {
    let row =
        [create("r0", bridge()), set_up("r0", true), set_up("none", true), set_mtu("r0", 1400), delete("r0")];
    let stopped = kernel.change_all(&row).await.unwrap_err();
    assert_eq!((stopped.done, stopped.error), (2, KernelError::Refused(Refused::NoSuchLink)));
    let made = link(kernel, "r0").await;
    assert!(made.up && made.mtu == 1500, "{made:?}");
    assert_eq!(kernel.change_all(&row[3..]).await, Ok(()));
    assert_eq!(kernel.change_all(&[]).await, Ok(()));
    assert!(!exists(kernel, "r0").await);
}

pub async fn a_new_link_is_off_and_has_what_it_was_asked_to_have(kernel: &dyn Kernel) {
    let mac = "02:00:50:9a:00:01".parse().unwrap();
    let options = Bridge { stp: true, forward_delay_ms: 4000, vlan_filtering: false };
    let made =
        Change::Create { link: name("kb0"), kind: Kind::Bridge(options), mac: Some(mac), mtu: Some(1400) };
    done(kernel, [made]).await;
    let found = link(kernel, "kb0").await;
    assert_eq!(found, LinkView { mac: Some(mac), mtu: 1400, ..LinkView::new(Kind::Bridge(options)) });
}

pub async fn a_pair_comes_and_goes_as_one(kernel: &dyn Kernel) {
    let made = Change::Create { link: name("kv0"), kind: pair("kv1"), mac: None, mtu: Some(1450) };
    done(kernel, [made]).await;
    let (one, other) = (link(kernel, "kv0").await, link(kernel, "kv1").await);
    assert_eq!((one.kind, other.kind), (pair("kv1"), pair("kv0")));
    assert_eq!((one.mtu, other.mtu), (1450, 1450));
    done(kernel, [delete("kv1")]).await;
    assert!(!exists(kernel, "kv0").await && !exists(kernel, "kv1").await);
}

pub async fn what_exists_is_not_made_again(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge())]).await;
    refused(kernel, create("kb0", bridge()), Refused::Exists).await;
    refused(kernel, create("kb0", pair("kv1")), Refused::Exists).await;
    refused(kernel, create("kv0", pair("kb0")), Refused::Exists).await;
    let too_small = Change::Create { link: name("kb1"), kind: bridge(), mac: None, mtu: Some(60) };
    refused(kernel, too_small, Refused::Range).await;
}

pub async fn of_a_link_that_is_not_there_nothing_is_changed(kernel: &dyn Kernel) {
    let gone = || name("gone0");
    let bond = Bond { miimon_ms: 100, ..a_bond(BondMode::ActiveBackup) };
    for change in [
        delete("gone0"),
        set_mtu("gone0", 1400),
        Change::SetMac { link: gone(), mac: "02:00:50:9a:00:01".parse().unwrap() },
        set_up("gone0", true),
        set_controller("gone0", None),
        Change::SetBridge { link: gone(), bridge: Bridge::default() },
        Change::SetBond { link: gone(), bond },
        Change::AddPortVlan { link: gone(), vlan: PortVlan { id: vlan_id(7), pvid: false, untagged: false } },
        Change::DeletePortVlan { link: gone(), id: vlan_id(7) },
        add_address("gone0", "192.0.2.1/24"),
        delete_address("gone0", "192.0.2.1/24"),
        add_route(route("198.51.100.0/24", None, Some("gone0"), 0)),
        Change::SetDhcp { link: gone(), on: false },
    ] {
        refused(kernel, change, Refused::NoSuchLink).await;
    }
    refused(kernel, set_controller("lo", Some("gone0")), Refused::NoSuchLink).await;
}

pub async fn links_that_we_do_not_make_are_not_removed(kernel: &dyn Kernel) {
    assert_eq!(kernel.change(&delete("lo")).await, Err(KernelError::Refused(Refused::NotSupported)));
}

pub async fn a_link_is_switched_and_asking_twice_is_fine(kernel: &dyn Kernel) {
    done(kernel, [create("kv0", pair("kv1")), set_up("kv0", true), set_up("kv0", true)]).await;
    let one = link(kernel, "kv0").await;
    assert!(one.up && !one.carrier, "its other end is off: {one:?}");
    done(kernel, [set_up("kv1", true)]).await;
    until(kernel, "both ends have carrier", |view| {
        ["kv0", "kv1"].iter().all(|end| view.links[&name(end)].carrier)
    })
    .await;
    done(kernel, [set_up("kv1", false), set_up("kv1", false)]).await;
    until(kernel, "carrier goes with the other end", |view| !view.links[&name("kv0")].carrier).await;
}

pub async fn mtu_and_mac_are_set(kernel: &dyn Kernel) {
    let mac = "02:00:50:9a:00:07".parse().unwrap();
    done(kernel, [create("kv0", pair("kv1")), set_mtu("kv0", 1300)]).await;
    done(kernel, [Change::SetMac { link: name("kv0"), mac }]).await;
    let found = link(kernel, "kv0").await;
    assert_eq!((found.mtu, found.mac), (1300, Some(mac)));
    assert_eq!(link(kernel, "kv1").await.mtu, 1500, "the other end keeps its own");
    refused(kernel, set_mtu("kv0", 60), Refused::Range).await;
    refused(kernel, set_mtu("kv0", 70_000), Refused::Range).await;
}

pub async fn a_port_has_one_controller_and_leaves_it_before_it_takes_another(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), create("kb1", bridge()), create("kv0", pair("kv1"))]).await;
    done(kernel, [set_controller("kv0", Some("kb0")), set_controller("kv0", Some("kb0"))]).await;
    assert_eq!(link(kernel, "kv0").await.controller, Some(name("kb0")));
    refused(kernel, set_controller("kv0", Some("kb1")), Refused::Busy).await;
    done(kernel, [set_controller("kv0", None), set_controller("kv0", None)]).await;
    done(kernel, [set_controller("kv0", Some("kb1"))]).await;
    assert_eq!(link(kernel, "kv0").await.controller, Some(name("kb1")));
    refused(kernel, set_controller("kb0", Some("kb1")), Refused::Loop).await;
    refused(kernel, set_controller("kb0", Some("kb0")), Refused::Loop).await;
    refused(kernel, set_controller("kv1", Some("kv0")), Refused::NotSupported).await;
    refused(kernel, set_controller("lo", Some("kb0")), Refused::NotPermitted).await;
}

pub async fn a_removed_controller_leaves_its_ports_behind(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), create("kv0", pair("kv1")), set_up("kv0", true)]).await;
    done(kernel, [set_controller("kv0", Some("kb0")), delete("kb0")]).await;
    let port = link(kernel, "kv0").await;
    assert!(port.controller.is_none() && port.up, "{port:?}");
}

pub async fn a_bridge_has_carrier_by_its_ports(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), set_up("kb0", true), create("kv0", pair("kv1"))]).await;
    // What a bridge has that never had a port is the kernel's secret.
    done(kernel, [set_controller("kv0", Some("kb0")), set_up("kv0", true)]).await;
    until(kernel, "the port's other end is off", |view| !view.links[&name("kb0")].carrier).await;
    done(kernel, [set_up("kv1", true)]).await;
    until(kernel, "the bridge has carrier", |view| view.links[&name("kb0")].carrier).await;
    done(kernel, [delete("kv0")]).await;
    until(kernel, "the bridge has none", |view| !view.links[&name("kb0")].carrier).await;
}

pub async fn a_bridges_options_change_while_it_lives(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge())]).await;
    let options = Bridge { stp: true, forward_delay_ms: 2000, vlan_filtering: false };
    let change = Change::SetBridge { link: name("kb0"), bridge: options };
    done(kernel, [change.clone(), change]).await;
    assert_eq!(link(kernel, "kb0").await.kind, Kind::Bridge(options));
    // And back: a delay that the kernel takes only without STP.
    let options = Bridge { stp: false, forward_delay_ms: 0, vlan_filtering: false };
    done(kernel, [Change::SetBridge { link: name("kb0"), bridge: options }]).await;
    assert_eq!(link(kernel, "kb0").await.kind, Kind::Bridge(options));
    done(kernel, [create("kv0", pair("kv1"))]).await;
    let change = Change::SetBridge { link: name("kv0"), bridge: options };
    refused(kernel, change, Refused::NotSupported).await;
}

pub async fn addresses_come_and_go(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), set_up("kb0", true)]).await;
    let all =
        ["198.51.100.1/24", "198.51.100.2/24", "203.0.113.1/32", "2001:db8:1::1/64", "2001:db8:1::2/64"];
    done(kernel, all.iter().map(|one| add_address("kb0", one))).await;
    let of = |view: &NetworkView| view.links[&name("kb0")].addresses.clone();
    assert_eq!(of(&view(kernel).await), all.iter().map(|one| address(one)).collect());
    refused(kernel, add_address("kb0", "198.51.100.1/24"), Refused::Exists).await;
    refused(kernel, add_address("kb0", "2001:db8:1::1/64"), Refused::Exists).await;
    // The first of its network: Linux would take the second along.
    done(kernel, [delete_address("kb0", "198.51.100.1/24"), delete_address("kb0", "2001:db8:1::1/64")]).await;
    let left = ["198.51.100.2/24", "203.0.113.1/32", "2001:db8:1::2/64"];
    assert_eq!(of(&view(kernel).await), left.iter().map(|one| address(one)).collect());
    refused(kernel, delete_address("kb0", "198.51.100.1/24"), Refused::NoSuchAddress).await;
    refused(kernel, delete_address("kb0", "2001:db8:1::1/64"), Refused::NoSuchAddress).await;
    let told = kernel.links().await.unwrap();
    let told = &told.iter().find(|link| link.name == "kb0").unwrap().addresses;
    assert!(told.contains(&(ip("198.51.100.2"), 24)), "{told:?}");
}

pub async fn what_is_switched_off_keeps_ipv4_addresses_and_loses_ipv6_ones_and_routes(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), set_up("kb0", true)]).await;
    done(kernel, [add_address("kb0", "198.51.100.1/24"), add_address("kb0", "2001:db8:1::1/64")]).await;
    done(kernel, [add_route(route("203.0.113.0/24", Some("198.51.100.9"), None, 0))]).await;
    done(kernel, [set_up("kb0", false)]).await;
    let all = view(kernel).await;
    assert_eq!(all.links[&name("kb0")].addresses, [address("198.51.100.1/24")].into());
    assert!(!all.routes.iter().any(|one| one.link == Some(name("kb0"))), "{:?}", all.routes);
    let by_link = route("203.0.113.0/24", None, Some("kb0"), 0);
    refused(kernel, add_route(by_link), Refused::Down).await;
}

pub async fn a_small_mtu_ends_ipv6(kernel: &dyn Kernel) {
    done(kernel, [create("kv0", pair("kv1")), set_up("kv0", true), set_up("kv1", true)]).await;
    done(kernel, [add_address("kv0", "198.51.100.1/24"), add_address("kv0", "2001:db8:1::1/64")]).await;
    done(kernel, [add_route(route("2001:db8:2::/64", Some("2001:db8:1::9"), None, 0)), set_mtu("kv0", 1200)])
        .await;
    let all = view(kernel).await;
    assert_eq!(all.links[&name("kv0")].addresses, [address("198.51.100.1/24")].into());
    assert!(!all.routes.iter().any(|one| one.link == Some(name("kv0"))), "{:?}", all.routes);
    refused(kernel, add_address("kv0", "2001:db8:1::1/64"), Refused::Range).await;
}

pub async fn changes_do_to_a_kernel_what_they_do_to_a_view(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), create("kb1", bridge()), create("kv0", pair("kv1"))]).await;
    let mut model = view(kernel).await;
    let links = ["kb0", "kb1", "kv0", "kv1"];
    let addresses = ["198.51.100.1/24", "198.51.100.2/24", "203.0.114.1/24", "2001:db8:1::1/64"];
    let networks = ["192.88.99.0/24", "2001:db8:3::/48"];
    let mut seed = 7_u64;
    let mut pick = |most: usize| {
        // xorshift64: the same changes in each run.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % most as u64).unwrap()
    };
    for _ in 0..250 {
        let link = links[pick(4)];
        let change = match pick(9) {
            0 | 1 => set_up(link, pick(3) > 0),
            2 => set_controller(links[2 + pick(2)], [None, Some("kb0"), Some("kb1")][pick(3)]),
            3 | 4 => add_address(link, addresses[pick(4)]),
            5 => delete_address(link, addresses[pick(4)]),
            6 => set_mtu(links[2 + pick(2)], [1300, 1400, 1500][pick(3)]),
            7 => add_route(route(networks[pick(2)], None, Some(link), u32::try_from(pick(3)).unwrap())),
            _ => delete_route(route(networks[pick(2)], None, Some(link), u32::try_from(pick(3)).unwrap())),
        };
        let expected = perform(&mut model, &change).map_err(KernelError::Refused);
        assert_eq!(kernel.change(&change).await, expected, "{change}");
        let mut found = view(kernel).await;
        // What `perform` leaves out: carrier, and which MAC and MTU a bridge takes from its ports.
        for (name, link) in &mut found.links {
            let known = &model.links[name];
            link.carrier = known.carrier;
            if matches!(link.kind, Kind::Bridge(_)) {
                (link.mac, link.mtu) = (known.mac, known.mtu);
            }
        }
        assert_eq!(found, model, "{change}");
    }
}

pub async fn the_bell_rings_after_each_change_and_melts(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge())]).await;
    let mut bell = kernel.observe();
    let mut hear = async || tokio::time::timeout(PATIENCE, bell.recv()).await.expect("it rings").unwrap();
    let changes = [
        set_up("kb0", true),
        add_address("kb0", "198.51.100.1/24"),
        add_route(route("203.0.113.0/24", Some("198.51.100.9"), None, 0)),
        create("kv0", pair("kv1")),
        set_controller("kv0", Some("kb0")),
        set_mtu("kv0", 1400),
        delete("kv1"),
    ];
    for change in changes {
        done(kernel, [change]).await;
        hear().await;
    }
}

pub async fn ones_own_addresses_are_reached_and_silent_or_unrouted_ones_are_not(kernel: &dyn Kernel) {
    done(kernel, [set_up("lo", true), create("kb0", bridge()), set_up("kb0", true)]).await;
    done(kernel, [add_address("kb0", "198.51.100.1/24")]).await;
    assert_eq!(kernel.reaches(ip("198.51.100.1")).await, Ok(true));
    assert_eq!(kernel.reaches(ip("198.51.100.9")).await, Ok(false), "the bridge has no port");
    done(kernel, [create("kv0", pair("kv1")), set_controller("kv0", Some("kb0"))]).await;
    done(kernel, [set_up("kv0", true), set_up("kv1", true)]).await;
    until(kernel, "the bridge has carrier", |view| view.links[&name("kb0")].carrier).await;
    assert_eq!(kernel.reaches(ip("198.51.100.9")).await, Ok(false), "nobody is there");
    assert_eq!(kernel.reaches(ip("2001:db8:77::1")).await, Ok(false), "no route");
}

pub async fn facts_are_of_links_that_are_there_and_owners_and_neighbours_too(kernel: &dyn Kernel) {
    let links = view(kernel).await.links;
    let neighbours = kernel.neighbours().await.unwrap();
    assert!(
        neighbours.iter().all(|one| links.contains_key(&one.link)) && neighbours.is_sorted(),
        "{neighbours:?}"
    );
    done(kernel, [create("kb0", bridge())]).await;
    let facts = kernel.facts(&name("kb0")).await.unwrap();
    assert_eq!(facts.driver.as_deref(), Some("bridge"));
    assert_eq!(kernel.facts(&name("gone0")).await, Err(KernelError::Refused(Refused::NoSuchLink)));
    assert!(kernel.owners().await.unwrap().is_empty());
}

fn a_bond(mode: BondMode) -> Bond {
    Bond { miimon_ms: 100, ..Bond::new(mode) }
}

pub async fn a_bond_has_its_options_and_takes_ports_that_are_off(kernel: &dyn Kernel) {
    if !has(kernel, Kind::Bond(a_bond(BondMode::ActiveBackup)), "bonds").await {
        return;
    }
    let lacp = Bond {
        lacp_rate: LacpRate::Fast,
        xmit_hash: XmitHash::Layer34,
        up_delay_ms: 200,
        down_delay_ms: 300,
        ..a_bond(BondMode::Lacp)
    };
    done(kernel, [create("kbond0", Kind::Bond(lacp.clone()))]).await;
    assert_eq!(link(kernel, "kbond0").await.kind, Kind::Bond(lacp));
    let bond = a_bond(BondMode::ActiveBackup);
    done(kernel, [Change::SetBond { link: name("kbond0"), bond }, create("kv0", pair("kv1"))]).await;
    done(kernel, [set_up("kv0", true)]).await;
    refused(kernel, set_controller("kv0", Some("kbond0")), Refused::NotPermitted).await;
    done(kernel, [set_up("kv0", false), set_controller("kv0", Some("kbond0")), set_up("kv1", true)]).await;
    let port = link(kernel, "kv0").await;
    assert!(port.up && port.controller == Some(name("kbond0")), "{port:?}");
    let bond = Bond { primary: Some(name("kv0")), ..a_bond(BondMode::ActiveBackup) };
    done(kernel, [Change::SetBond { link: name("kbond0"), bond: bond.clone() }, set_up("kbond0", true)])
        .await;
    assert_eq!(link(kernel, "kbond0").await.kind, Kind::Bond(bond));
    let wait = async {
        while kernel.facts(&name("kbond0")).await.unwrap().active_port.as_deref() != Some("kv0") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // sysfs shows one namespace alone: only there the port in use is told.
    if kernel.facts(&name("kbond0")).await.unwrap().active_port.is_some() {
        tokio::time::timeout(PATIENCE, wait).await.expect("the primary is used");
    }
    let change = Change::SetBond { link: name("kbond0"), bond: a_bond(BondMode::Lacp) };
    refused(kernel, change, Refused::Busy).await;
    done(kernel, [set_controller("kv0", None)]).await;
    assert!(!link(kernel, "kv0").await.up, "a bond leaves its port off");
}

pub async fn a_vlan_stands_on_its_parent_and_goes_with_it(kernel: &dyn Kernel) {
    done(kernel, [create("kv0", pair("kv1"))]).await;
    let kind = || Kind::Vlan { parent: name("kv0"), id: vlan_id(160) };
    if !has(kernel, kind(), "VLANs").await {
        return;
    }
    done(kernel, [create("kv0.160", kind())]).await;
    let (vlan, parent) = (link(kernel, "kv0.160").await, link(kernel, "kv0").await);
    assert_eq!((vlan.kind, vlan.mtu, vlan.mac), (kind(), parent.mtu, parent.mac));
    refused(kernel, create("kv0.161", kind()), Refused::Exists).await;
    refused(kernel, set_mtu("kv0.160", 9000), Refused::Range).await;
    refused(kernel, set_up("kv0.160", true), Refused::Down).await;
    let gone = Kind::Vlan { parent: name("gone0"), id: vlan_id(5) };
    refused(kernel, create("kv0.5", gone), Refused::NoSuchLink).await;
    done(kernel, [set_up("kv0", true), set_up("kv0.160", true), set_mtu("kv0", 1400)]).await;
    assert_eq!(link(kernel, "kv0.160").await.mtu, 1400);
    done(kernel, [create("kb0", bridge())]).await;
    let on_bridge = Kind::Vlan { parent: name("kb0"), id: vlan_id(7) };
    done(kernel, [create("kb0.7", on_bridge)]).await;
    refused(kernel, set_controller("kb0.7", Some("kb0")), Refused::Loop).await;
    done(kernel, [delete("kv0")]).await;
    assert!(!exists(kernel, "kv0.160").await);
}

pub async fn a_dummy_has_carrier_when_it_is_on(kernel: &dyn Kernel) {
    if has(kernel, Kind::Dummy, "dummies").await {
        done(kernel, [create("kd0", Kind::Dummy), set_up("kd0", true)]).await;
        let dummy = link(kernel, "kd0").await;
        assert!(dummy.kind == Kind::Dummy && dummy.carrier, "{dummy:?}");
    }
}

pub async fn a_bridge_with_vlan_filtering_lets_its_ports_vlans_through(kernel: &dyn Kernel) {
    if !has(kernel, filtering(), "VLAN filtering").await {
        return;
    }
    done(kernel, [create("kb0", filtering()), create("kv0", pair("kv1"))]).await;
    let one = |id, pvid| PortVlan { id: vlan_id(id), pvid, untagged: pvid };
    let add = |vlan| Change::AddPortVlan { link: name("kv0"), vlan };
    refused(kernel, add(one(7, false)), Refused::NotSupported).await;
    done(kernel, [set_controller("kv0", Some("kb0"))]).await;
    assert_eq!(link(kernel, "kv0").await.vlans, [one(1, true)].into());
    // A range is told compressed.
    done(kernel, (100..=103).map(|id| add(one(id, false)))).await;
    done(kernel, [add(one(50, true))]).await;
    let vlans = link(kernel, "kv0").await.vlans;
    assert!(
        vlans.contains(&one(50, true)) && (100..=103).all(|id| vlans.contains(&one(id, false))),
        "{vlans:?}"
    );
    assert_eq!(vlans.iter().filter(|vlan| vlan.pvid).count(), 1);
    let gone = Change::DeletePortVlan { link: name("kv0"), id: vlan_id(101) };
    done(kernel, [gone.clone()]).await;
    refused(kernel, gone, Refused::NoSuchVlan).await;
    done(kernel, [set_controller("kv0", None)]).await;
    assert!(link(kernel, "kv0").await.vlans.is_empty());
}

macro_rules! rules {
    ($hold:ident) => {
        $hold! {
            a_new_link_is_off_and_has_what_it_was_asked_to_have,
            a_pair_comes_and_goes_as_one,
            a_row_of_changes_ends_at_the_first_that_is_not_done,
            what_exists_is_not_made_again,
            of_a_link_that_is_not_there_nothing_is_changed,
            links_that_we_do_not_make_are_not_removed,
            a_link_is_switched_and_asking_twice_is_fine,
            mtu_and_mac_are_set,
            a_port_has_one_controller_and_leaves_it_before_it_takes_another,
            a_removed_controller_leaves_its_ports_behind,
            a_bridge_has_carrier_by_its_ports,
            a_bridges_options_change_while_it_lives,
            addresses_come_and_go,
            what_is_switched_off_keeps_ipv4_addresses_and_loses_ipv6_ones_and_routes,
            a_small_mtu_ends_ipv6,
            routes_read_back_as_they_were_asked_for,
            the_last_ipv4_address_takes_the_links_ipv4_routes_along,
            a_gateway_may_be_on_the_link_without_an_address_on_its_network,
            a_routes_source_and_table_are_kept_and_the_source_takes_it_along,
            a_route_by_several_hops_is_told_whole_and_goes_with_the_last_of_them,
            changes_do_to_a_kernel_what_they_do_to_a_view,
            the_bell_rings_after_each_change_and_melts,
            ones_own_addresses_are_reached_and_silent_or_unrouted_ones_are_not,
            facts_are_of_links_that_are_there_and_owners_and_neighbours_too,
            a_bond_has_its_options_and_takes_ports_that_are_off,
            a_vlan_stands_on_its_parent_and_goes_with_it,
            a_dummy_has_carrier_when_it_is_on,
            a_bridge_with_vlan_filtering_lets_its_ports_vlans_through,
        }
    };
}
pub(crate) use rules;
