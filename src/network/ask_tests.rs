//! What the dialect's verbs make of a declaration.

use super::ask::{Ask, Meta};
use super::made_up::{address, host, name, route, vlan_id};
use super::{Desired, aim, validate};
use crate::model::network::{BondMode, Kind, LacpRate, NetworkView, XmitHash};
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn read(value: &Value) -> Desired {
    Desired::read(value).unwrap()
}

fn ask(ask: &Ask, before: &Desired, now: &NetworkView) -> Desired {
    let (after, _) = ask.resolve(before, &Meta::new(), now).unwrap();
    assert_eq!(validate(&after, before, now, &BTreeMap::new()), [], "{ask:?}: {after:?}");
    after
}

/// A port with an address and the default route by it.
fn addressed() -> NetworkView {
    let mut now = host(&[("eth0", Kind::Ethernet), ("eth1", Kind::Ethernet)]);
    now.links.get_mut(&name("eth0")).unwrap().addresses.insert(address("192.0.2.10/24"));
    now.routes.insert(route("0.0.0.0/0", Some("192.0.2.1"), Some("eth0")));
    now
}

fn bridge() -> Ask {
    Ask::Bridge { bridge: name("xenbr0"), link: name("eth0"), vlan: None }
}

#[test]
fn a_bridge_takes_its_ports_addresses_and_routes_also_those_that_were_declared_without_a_link() {
    let now = addressed();
    let before = read(&json!({
        "links": {"eth0": {"kind": "ethernet", "addresses": ["192.0.2.10/24"]}},
        "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}],
    }));
    for before in [Desired::default(), before] {
        let after = ask(&bridge(), &before, &now);
        let then = aim(&now, &before, &after);
        assert_eq!(then.links[&name("xenbr0")].addresses, [address("192.0.2.10/24")].into());
        assert!(then.links[&name("eth0")].addresses.is_empty());
        assert_eq!(then.routes, [route("0.0.0.0/0", Some("192.0.2.1"), Some("xenbr0"))].into());
        // And back.
        let back = ask(&Ask::NoBridge { bridge: name("xenbr0"), with_vlan: false }, &after, &then);
        assert_eq!(aim(&then, &after, &back).routes, now.routes);
    }
}

#[test]
fn a_bridge_on_a_port_with_a_lease_asks_for_a_lease_itself() {
    let mut now = addressed();
    now.links.get_mut(&name("eth0")).unwrap().dhcp = true;
    let before = ask(&Ask::Dhcp { link: name("eth0") }, &Desired::default(), &now);
    let after = ask(&bridge(), &before, &now);
    assert!(after.links[&name("xenbr0")].dhcp && !after.links[&name("eth0")].dhcp);
    assert_eq!(after.links[&name("xenbr0")].addresses, None);
    assert!(after.routes.is_empty(), "the lease brings its own: {:?}", after.routes);
}

#[test]
fn a_link_that_is_flushed_or_removed_takes_every_route_by_it_along() {
    let now = addressed();
    let before = read(&json!({
        "links": {"eth0": {"kind": "ethernet", "addresses": ["192.0.2.10/24"]}, "eth1": {"kind": "ethernet"}},
        "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"},
                   {"to": "10.0.0.0/8", "hops": [{"link": "eth0"}, {"link": "eth1"}]}],
    }));
    assert!(ask(&Ask::Flush { link: name("eth0") }, &before, &now).routes.is_empty());
}

#[test]
fn a_bonds_new_mode_ends_the_options_that_it_does_not_know() {
    let now = host(&[("eth0", Kind::Ethernet), ("eth1", Kind::Ethernet)]);
    let before = read(&json!({"links": {"bond0": {
        "kind": "bond", "mode": "802.3ad", "miimon_ms": 100, "lacp_rate": "fast", "xmit_hash": "layer3+4",
        "ports": ["eth0", "eth1"],
    }}}));
    let mode = |mode| Ask::BondMode { bond: name("bond0"), mode };
    let mut after = ask(&mode(BondMode::ActiveBackup), &before, &now);
    let Kind::Bond(bond) = &mut after.links.get_mut(&name("bond0")).unwrap().kind else { panic!() };
    assert_eq!((bond.lacp_rate, bond.xmit_hash), (LacpRate::Slow, XmitHash::Layer2));
    (bond.primary, bond.miimon_ms) = (Some(name("eth1")), 0);
    let again = ask(&mode(BondMode::Lacp), &after, &now);
    let Kind::Bond(bond) = &again.links[&name("bond0")].kind else { panic!() };
    assert!(bond.primary.is_none() && bond.miimon_ms > 0, "{bond:?}");
}

#[test]
fn what_others_have_put_on_a_bridge_is_not_declared_with_it() {
    let other = Kind::Other { word: "macvlan".to_owned() };
    let mut now = host(&[
        ("eth0", Kind::Ethernet),
        ("vif3.0", Kind::Vif),
        ("far", Kind::Veth { peer: None }),
        ("mac0", other),
    ]);
    let bridge = Kind::Bridge(Default::default());
    now.links.insert(name("xenbr0"), crate::model::network::LinkView::new(bridge));
    for port in ["eth0", "vif3.0", "far", "mac0"] {
        now.links.get_mut(&name(port)).unwrap().controller = Some(name("xenbr0"));
    }
    let mtu = crate::model::network::Mtu::new(1400).unwrap();
    let after = ask(&Ask::Mtu { link: name("xenbr0"), mtu }, &Desired::default(), &now);
    assert_eq!(after.links[&name("xenbr0")].ports, [name("eth0")].into());
    // A guest that ends, and a container, are no change of the declaration.
    for gone in ["vif3.0", "far", "mac0"] {
        now.links.remove(&name(gone));
    }
    ask(&Ask::Vlan { link: name("eth0"), id: vlan_id(5) }, &after, &now);
}
