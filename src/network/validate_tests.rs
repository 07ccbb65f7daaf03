//! Every refusal with its field.

use super::made_up::{address, bond, host, name, route, vlan_id};
use super::{Desired, Management, Scope, aim, cuts_management, plan, validate};
use crate::model::network::{Address, Bond, BondMode, Bridge, Kind, LinkView, NetworkView, Owner};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Cards with and without addresses, a guest's card, a bridge and a VLAN that nobody declared.
fn now() -> NetworkView {
    let mut now = host(&[
        ("lo", Kind::Loopback),
        ("eth0", Kind::Ethernet),
        ("eth1", Kind::Ethernet),
        ("eth2", Kind::Ethernet),
        ("eth3", Kind::Ethernet),
        ("nm0", Kind::Ethernet),
        ("vif1.0", Kind::Vif),
        ("virbr0", Kind::Bridge(Bridge::default())),
        ("eth3.9", Kind::Vlan { parent: name("eth3"), id: vlan_id(9) }),
        ("old0", Kind::Dummy),
        ("old0.3", Kind::Vlan { parent: name("old0"), id: vlan_id(3) }),
    ]);
    now.links.get_mut(&name("vif1.0")).unwrap().controller = Some(name("virbr0"));
    now.links.get_mut(&name("eth2")).unwrap().controller = Some(name("virbr0"));
    now.links.get_mut(&name("eth3")).unwrap().addresses.insert(address("198.51.100.3/24"));
    now
}

fn before() -> Desired {
    read(&json!({"links": {"old0": {"kind": "dummy"}}}))
}

fn read(value: &Value) -> Desired {
    Desired::read(value).unwrap_or_else(|problems| panic!("{value}: {problems:?}"))
}

fn problems(desired: &Desired) -> Vec<String> {
    let owners = BTreeMap::from([(name("nm0"), Owner::NetworkManager)]);
    validate(desired, &before(), &now(), &owners).iter().map(ToString::to_string).collect()
}

/// With the link that was declared before, so that it does not count as removed.
fn keeping(mut links: Value) -> Value {
    links["old0"] = json!({"kind": "dummy"});
    links
}

fn refused(links: Value, field: &str, text: &str) {
    let told = problems(&read(&json!({"links": keeping(links.clone())})));
    let found = told.iter().any(|one| one.starts_with(&format!("{field}: ")) && one.contains(text));
    assert!(found, "{links}: {field}: …{text}… is not among {told:#?}");
}

#[test]
fn a_link_that_cannot_be_so_is_refused_at_its_field() {
    let bond = |more: Value| {
        let mut bond =
            json!({"kind": "bond", "mode": "active-backup", "miimon_ms": 100, "ports": ["eth0", "eth1"]});
        bond.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        bond
    };
    let eth = |more: Value| {
        let mut eth = json!({"kind": "ethernet"});
        eth.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        eth
    };
    for (links, field, text) in [
        (json!({"eth9": {"kind": "ethernet"}}), "links.eth9", "no such link"),
        (json!({"nm0": {"kind": "ethernet"}}), "links.nm0", "NetworkManager"),
        (json!({"lo": {"kind": "ethernet"}}), "links.lo", "loopback"),
        (json!({"vif1.0": {"kind": "ethernet"}}), "links.vif1.0", "vif"),
        (json!({"eth0": {"kind": "dummy"}}), "links.eth0.kind", "never declared"),
        (json!({"virbr0": {"kind": "dummy"}}), "links.virbr0.kind", "never declared"),
        (
            json!({"eth3.9": {"kind": "vlan", "parent": "eth3", "id": 8}}),
            "links.eth3.9.kind",
            "vlan 9 on eth3",
        ),
        (json!({"v": {"kind": "vlan", "parent": "none0", "id": 8}}), "links.v.parent", "no link none0"),
        (json!({"v": {"kind": "vlan", "parent": "v", "id": 8}}), "links.v", "on itself"),
        (json!({"v": {"kind": "vlan", "parent": "lo", "id": 8}}), "links.v.parent", "carries no VLANs"),
        (json!({"v": {"kind": "vlan", "parent": "eth3", "id": 9}}), "links.v.id", "eth3.9"),
        (
            json!({"v": {"kind": "vlan", "parent": "eth0", "id": 9}, "w": {"kind": "vlan", "parent": "eth0", "id": 9}}),
            "links.w.id",
            "that of v",
        ),
        (
            json!({"v": {"kind": "vlan", "parent": "eth0", "id": 9, "mtu": 9000}}),
            "links.v.mtu",
            "more than the 1500",
        ),
        (
            json!({"eth0": eth(json!({"up": false})), "v": {"kind": "vlan", "parent": "eth0", "id": 9}}),
            "links.v.up",
            "while eth0 is off",
        ),
        (json!({"eth0": eth(json!({"ports": ["eth1"]}))}), "links.eth0.ports", "only bonds and bridges"),
        (json!({"b": bond(json!({"ports": ["eth9"]}))}), "links.b.ports.eth9", "no such link"),
        (json!({"b": bond(json!({"ports": ["vif1.0"]}))}), "links.b.ports.vif1.0", "guest's card"),
        (json!({"b": bond(json!({"ports": ["lo"]}))}), "links.b.ports.lo", "loopback"),
        (json!({"b": bond(json!({"ports": ["nm0"]}))}), "links.b.ports.nm0", "NetworkManager"),
        (json!({"b": bond(json!({"ports": ["eth2"]}))}), "links.b.ports.eth2", "port of virbr0"),
        (json!({"b": bond(json!({})), "c": bond(json!({}))}), "links.c.ports.eth0", "port of b already"),
        (
            json!({"b": bond(json!({"ports": ["c"]})), "c": bond(json!({"ports": []}))}),
            "links.b.ports.c",
            "bond",
        ),
        (
            json!({"b": {"kind": "bridge", "ports": ["c"]}, "c": {"kind": "bridge"}}),
            "links.b.ports.c",
            "cannot be a port of a bridge",
        ),
        (json!({"b": bond(json!({"ports": ["b"]}))}), "links.b", "on itself"),
        (
            json!({"b": bond(json!({"ports": ["c"]})), "c": bond(json!({"ports": ["b"]}))}),
            "links.c",
            "on itself",
        ),
        (
            json!({"b": {"kind": "bridge", "ports": ["v"]}, "v": {"kind": "vlan", "parent": "b", "id": 4}}),
            "links.v",
            "on itself",
        ),
        (
            json!({"b": bond(json!({})), "eth0": eth(json!({"addresses": ["192.0.2.1/24"]}))}),
            "links.eth0.addresses",
            "port of b",
        ),
        (json!({"b": bond(json!({})), "eth0": eth(json!({"dhcp": true}))}), "links.eth0.dhcp", "port of b"),
        (
            json!({"b": bond(json!({})), "eth0": eth(json!({"mtu": 9000}))}),
            "links.eth0.mtu",
            "whose MTU is 1500",
        ),
        (
            json!({"b": bond(json!({})), "eth0": eth(json!({"mac": "02:00:00:00:00:01"}))}),
            "links.eth0.mac",
            "bond",
        ),
        (
            json!({"b": bond(json!({})), "eth0": eth(json!({"up": false}))}),
            "links.eth0.up",
            "switches its ports on",
        ),
        (
            json!({"b": {"kind": "bridge", "ports": ["eth0"]}, "eth0": eth(json!({"addresses": ["192.0.2.1/24"]}))}),
            "links.eth0.addresses",
            "port of b",
        ),
        (json!({"b": bond(json!({"primary": "eth3"}))}), "links.b.primary", "no port of this bond"),
        (
            json!({"b": bond(json!({"primary": "eth0", "mode": "802.3ad"}))}),
            "links.b.primary",
            "active-backup",
        ),
        (json!({"b": bond(json!({"lacp_rate": "fast"}))}), "links.b.lacp_rate", "802.3ad"),
        (json!({"b": bond(json!({"xmit_hash": "layer3+4"}))}), "links.b.xmit_hash", "802.3ad"),
        (json!({"b": bond(json!({"mode": "802.3ad", "miimon_ms": 0}))}), "links.b.miimon_ms", "802.3ad"),
        (json!({"b": bond(json!({"up_delay_ms": 150}))}), "links.b.up_delay_ms", "multiple"),
        (
            json!({"b": bond(json!({"miimon_ms": 0, "down_delay_ms": 100}))}),
            "links.b.down_delay_ms",
            "multiple",
        ),
        (json!({"b": {"kind": "bridge", "stp": true}}), "links.b.forward_delay_ms", "2000 to 30000"),
        (
            json!({"b": {"kind": "bridge", "forward_delay_ms": 15}}),
            "links.b.forward_delay_ms",
            "multiple of 10",
        ),
        (json!({"b": {"kind": "bridge", "vlans": [7]}}), "links.b.vlans", "vlan_filtering"),
        (json!({"eth0": eth(json!({"vlans": [7]}))}), "links.eth0.vlans", "vlan_filtering"),
        (
            json!({"b": {"kind": "bridge", "vlan_filtering": true,
                         "vlans": [{"id": 7, "pvid": true}, {"id": 8, "pvid": true}]}}),
            "links.b.vlans",
            "more than one has pvid",
        ),
        (
            json!({"eth0": eth(json!({"dhcp": true, "addresses": ["192.0.2.1/24"]}))}),
            "links.eth0.dhcp",
            "excludes addresses",
        ),
        (
            json!({"eth0": eth(json!({"mtu": 1279, "addresses": ["2001:db8::1/64"]}))}),
            "links.eth0.mtu",
            "from 1280",
        ),
        (
            json!({"eth0": eth(json!({"addresses": ["198.51.100.3/24"]}))}),
            "links.eth0.addresses.198.51.100.3",
            "by eth3 too",
        ),
        (
            json!({"eth0": eth(json!({"addresses": ["192.0.2.1/24"]})), "eth1": eth(json!({"addresses": ["192.0.2.1/25"]}))}),
            "links.eth1.addresses.192.0.2.1",
            "by eth0 too",
        ),
    ] {
        refused(links, field, text);
    }
}

#[test]
fn an_address_that_no_link_can_have_is_refused() {
    for bad in [
        "0.0.0.0/24",
        "127.0.0.1/8",
        "224.0.0.1/24",
        "255.255.255.255/32",
        "0.1.2.3/8",
        "192.0.2.0/24",
        "192.0.2.255/24",
        "192.0.2.1/0",
        "::/64",
        "::1/128",
        "ff02::1/64",
        "fe80::1/64",
        "2001:db8::/64",
        "::ffff:192.0.2.1/120",
    ] {
        let ip = address(bad).ip;
        refused(
            json!({"eth0": {"kind": "ethernet", "addresses": [bad]}}),
            &format!("links.eth0.addresses.{ip}"),
            "",
        );
    }
    for good in
        ["192.0.2.0/31", "192.0.2.1/31", "192.0.2.7/32", "2001:db8::/127", "2001:db8::5/128", "10.0.0.255/16"]
    {
        let links = keeping(json!({"eth0": {"kind": "ethernet", "addresses": [good]}}));
        assert_eq!(problems(&read(&json!({"links": links}))), [""; 0], "{good}");
    }
}

#[test]
fn routes_networks_and_virtual_addresses_that_cannot_be_are_refused_at_their_field() {
    let links = keeping(json!({
        "eth0": {"kind": "ethernet", "addresses": ["192.0.2.10/24", "2001:db8::10/64"]},
        "eth1": {"kind": "ethernet", "up": false, "addresses": ["203.0.113.1/24"]},
        "br": {"kind": "bridge", "ports": ["d"]}, "d": {"kind": "dummy"}, "low": {"kind": "dummy", "mtu": 1000},
    }));
    for (more, field, text) in [
        (json!({"routes": [{"to": "::/0", "via": "192.0.2.1"}]}), "routes.::/0.via", "other family"),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "via": "10.9.9.9"}]}),
            "routes.0.0.0.0/0.via",
            "on no network",
        ),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "via": "203.0.113.2"}]}),
            "routes.0.0.0.0/0.via",
            "on no network",
        ),
        (json!({"routes": [{"to": "0.0.0.0/0", "via": "192.0.2.10"}]}), "routes.0.0.0.0/0.via", "itself"),
        (json!({"routes": [{"to": "0.0.0.0/0", "via": "0.0.0.0"}]}), "routes.0.0.0.0/0.via", "no gateway"),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1", "link": "eth3"}]}),
            "routes.0.0.0.0/0.via",
            "on no network of eth3",
        ),
        (json!({"routes": [{"to": "10.0.0.0/8"}]}), "routes.10.0.0.0/8", "needs a gateway"),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "via": "203.0.113.2", "onlink": true}]}),
            "routes.0.0.0.0/0.onlink",
            "needs a gateway (via) and a link",
        ),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1", "source": "203.0.113.2"}]}),
            "routes.0.0.0.0/0.source",
            "no address of this host",
        ),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1", "table": 255}]}),
            "routes.0.0.0.0/0.table",
            "kernel's own",
        ),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1", "hops": [{"link": "eth0"}]}]}),
            "routes.0.0.0.0/0.hops",
            "excludes via",
        ),
        (
            json!({"routes": [{"to": "0.0.0.0/0", "hops": [{"link": "eth0"}, {"link": "none"}]}]}),
            "routes.0.0.0.0/0.link",
            "no link none",
        ),
        (json!({"routes": [{"to": "10.0.0.1/8", "link": "eth0"}]}), "routes.10.0.0.1/8.to", "10.0.0.0/8"),
        (json!({"routes": [{"to": "224.0.0.0/4", "link": "eth0"}]}), "routes.224.0.0.0/4.to", "others"),
        (
            json!({"routes": [{"to": "10.0.0.0/8", "link": "none0"}]}),
            "routes.10.0.0.0/8.link",
            "no link none0",
        ),
        (json!({"routes": [{"to": "10.0.0.0/8", "link": "eth1"}]}), "routes.10.0.0.0/8.link", "is off"),
        (
            json!({"routes": [{"to": "2001:db8:9::/64", "link": "low"}]}),
            "routes.2001:db8:9::/64.link",
            "IPv6",
        ),
        (
            json!({"routes": [{"to": "10.0.0.0/8", "link": "eth0"}, {"to": "10.0.0.0/8", "via": "192.0.2.1"}]}),
            "routes.10.0.0.0/8",
            "same metric",
        ),
        (json!({"networks": {"m": {"link": "none0"}}}), "networks.m.link", "no link none0"),
        (
            json!({"networks": {"m": {"link": "eth0", "roles": ["MANAGEMENT"]},
                                "n": {"link": "br", "roles": ["STORAGE", "MANAGEMENT"]}}}),
            "networks.n.roles",
            "role of m already",
        ),
        (
            json!({"virtual_ips": {"10.1.1.1": {"link": "none0", "prefix": 24}}}),
            "virtual_ips.10.1.1.1.link",
            "no link",
        ),
        (
            json!({"virtual_ips": {"10.1.1.1": {"link": "d", "prefix": 24}}}),
            "virtual_ips.10.1.1.1.link",
            "a port",
        ),
        (
            json!({"virtual_ips": {"10.1.1.1": {"link": "nm0", "prefix": 24}}}),
            "virtual_ips.10.1.1.1.link",
            "Manager",
        ),
        (
            json!({"virtual_ips": {"10.1.1.1": {"link": "lo", "prefix": 24}}}),
            "virtual_ips.10.1.1.1.link",
            "loopback",
        ),
        (
            json!({"virtual_ips": {"10.1.1.1": {"link": "br", "prefix": 33}}}),
            "virtual_ips.10.1.1.1.prefix",
            "1 to 32",
        ),
        (
            json!({"virtual_ips": {"127.0.0.1": {"link": "br", "prefix": 24}}}),
            "virtual_ips.127.0.0.1",
            "loopback",
        ),
        (
            json!({"virtual_ips": {"198.51.100.3": {"link": "br", "prefix": 24}}}),
            "virtual_ips.198.51.100.3",
            "twice",
        ),
        (
            json!({"virtual_ips": {"2001:db8:5::1": {"link": "low", "prefix": 64}}}),
            "virtual_ips.2001:db8:5::1.link",
            "IPv6",
        ),
    ] {
        let mut whole = json!({"links": links});
        whole.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let told = problems(&read(&whole));
        let found = told.iter().any(|one| one.starts_with(&format!("{field}: ")) && one.contains(text));
        assert!(found, "{more}: {field}: …{text}… is not among {told:#?}");
    }
}

#[test]
fn what_can_be_is_not_refused() {
    let whole = json!({
        "links": keeping(json!({
            "bond0": {"kind": "bond", "mode": "802.3ad", "miimon_ms": 100, "lacp_rate": "fast", "ports": ["eth0", "eth1"]},
            "xenbr0": {"kind": "bridge", "vlan_filtering": true, "ports": ["bond0"], "addresses": ["192.0.2.10/24"],
                       "vlans": [{"id": 1, "pvid": true, "untagged": true}, 7]},
            "bond0.7": {"kind": "vlan", "parent": "bond0", "id": 7, "mtu": 1400},
            "eth3.9": {"kind": "vlan", "parent": "eth3", "id": 9},
        })),
        "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}, {"to": "10.0.0.0/8", "via": "198.51.100.1"},
                   {"to": "10.7.7.7/32", "link": "eth3"}, {"to": "10.8.0.0/16", "via": "10.7.7.7"},
                   {"to": "10.9.0.0/16", "via": "203.0.113.2", "link": "xenbr0", "onlink": true},
                   {"to": "0.0.0.0/0", "via": "192.0.2.1", "table": 100, "source": "192.0.2.10"},
                   {"to": "10.10.0.0/16", "hops": [{"via": "192.0.2.1", "link": "xenbr0"}, {"link": "eth3", "weight": 5}]}],
        "networks": {"mgmt": {"link": "xenbr0", "roles": ["MANAGEMENT", "VIRTUAL_MACHINE"]}},
        "virtual_ips": {"192.0.2.99": {"link": "xenbr0", "prefix": 24}},
    });
    assert_eq!(problems(&read(&whole)), [""; 0]);
}

#[test]
fn what_was_declared_may_become_something_else_but_not_lose_what_others_put_on_it() {
    let become_bridge = read(&json!({"links": {"old0": {"kind": "bridge"}}}));
    assert_eq!(problems(&become_bridge), [""; 0]);
    let gone = problems(&Desired::default());
    assert!(gone[0].starts_with("links.old0: cannot be removed: VLAN old0.3"), "{gone:?}");
}

#[test]
fn modes_that_we_only_see_are_refused() {
    let mut desired = before();
    let bond = Bond { ..bond(BondMode::Other(0)) };
    desired.links.insert(name("b"), super::DesiredLink::new(Kind::Bond(bond)));
    assert!(problems(&desired)[0].starts_with("links.b.mode: "));
    desired.links.insert(name("b"), super::DesiredLink::new(Kind::Vif));
    assert!(problems(&desired)[0].starts_with("links.b.kind: "));
}

#[test]
fn a_tower_of_vlans_is_refused_quickly() {
    let mut links = json!({"l0": {"kind": "dummy"}});
    for at in 1..4000 {
        links[format!("l{at}")] = json!({"kind": "vlan", "parent": format!("l{}", at - 1), "id": 5});
    }
    let told = problems(&read(&json!({"links": keeping(links)})));
    assert_eq!(told.len(), 20);
    assert!(told[0].contains("would stand on each other"), "{told:?}");
    assert!(told[19].ends_with("more problems)"), "{told:?}");
}

#[test]
fn what_was_declared_before_keeps_nobody_from_other_changes_when_its_link_is_gone_or_taken() {
    let whole = |more: Value| {
        let mut links = json!({
            "eth0": {"kind": "ethernet", "addresses": ["192.0.2.10/24"]},
            "eth1": {"kind": "ethernet", "addresses": ["198.51.100.1/24"]},
            "eth1.5": {"kind": "vlan", "parent": "eth1", "id": 5},
            "br5": {"kind": "bridge", "ports": ["eth1.5", "eth2"]},
        });
        links.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        read(&json!({
            "links": links,
            "routes": [{"to": "10.0.0.0/8", "via": "198.51.100.2"}, {"to": "10.0.0.0/16", "link": "eth1"}],
            "networks": {"storage": {"link": "eth1", "roles": ["STORAGE"]}},
            "virtual_ips": {"198.51.100.9": {"link": "eth1", "prefix": 24}},
        }))
    };
    let before = whole(json!({}));
    let all = host(&[("eth0", Kind::Ethernet), ("eth1", Kind::Ethernet), ("eth2", Kind::Ethernet)]);
    let mut now = aim(&all, &Desired::default(), &before);
    let more = whole(json!({"d0": {"kind": "dummy"}}));
    let owners = [(name("eth1"), Owner::NetworkManager), (name("eth2"), Owner::Networkd)].into();
    assert_eq!(validate(&more, &before, &now, &owners), []);
    for link in ["eth1", "eth1.5", "eth2"] {
        now.links.remove(&name(link));
    }
    now.routes.clear();
    assert_eq!(validate(&more, &before, &now, &BTreeMap::new()), []);
    // But nobody declares such anew.
    assert!(!validate(&more, &Desired::default(), &now, &BTreeMap::new()).is_empty());
    // And it is no part of a plan.
    let aim = aim(&now, &before, &more);
    let planned = plan(&now, &aim, &Scope::of(&before, &more, &now));
    let told: Vec<String> = planned.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["make dummy d0", "switch d0 on"]);
}

#[test]
fn a_change_that_cuts_the_callers_own_way_is_seen() {
    let mut now = host(&[("eth0", Kind::Ethernet), ("eth1", Kind::Ethernet)]);
    now.links.get_mut(&name("eth0")).unwrap().addresses.insert(address("192.0.2.10/24"));
    now.routes.insert(route("0.0.0.0/0", Some("192.0.2.1"), Some("eth0")));
    let ip = |text: &str| Some(text.parse().unwrap());
    let far = Management { ip: ip("192.0.2.10"), peer: ip("203.0.113.5"), link: None, next: None };
    let near = Management { ip: ip("192.0.2.10"), peer: ip("192.0.2.77"), link: None, next: None };
    let local = Management { ip: ip("127.0.0.1"), peer: ip("127.0.0.1"), link: None, next: None };
    let unknown = Management { ip: None, peer: None, link: Some(name("eth0")), next: None };
    let moving = Management { next: Some(name("eth1")), ..unknown.clone() };
    let then = |value: Value| aim(&now, &Desired::default(), &read(&value));
    let links = |link: Value| then(json!({"links": {"eth0": link}}));
    let moved = links(json!({"kind": "ethernet", "addresses": ["192.0.2.11/24"]}));
    let off = links(json!({"kind": "ethernet", "up": false}));
    let bare = links(json!({"kind": "ethernet", "addresses": []}));
    let mut routeless = now.clone();
    routeless.routes.clear();
    let other = then(json!({"links": {"eth1": {"kind": "ethernet", "addresses": ["198.51.100.1/24"]}}}));
    for (then, managements) in [
        (&moved, [true, true, false, false]),
        (&off, [true, true, false, true]),
        (&bare, [true, true, false, true]),
        (&routeless, [true, false, false, false]),
        (&other, [false; 4]),
        (&now, [false; 4]),
    ] {
        for (management, cut) in [&far, &near, &local, &unknown].into_iter().zip(managements) {
            let told = cuts_management(&now, then, management);
            assert_eq!(told.is_some(), cut, "{management:?}: {told:?}");
        }
    }
    // The management network may move to another link that can be reached.
    assert!(cuts_management(&now, &bare, &moving).is_some());
    let elsewhere = then(json!({"links": {
        "eth0": {"kind": "ethernet", "addresses": []}, "eth1": {"kind": "ethernet", "addresses": ["198.51.100.1/24"]},
    }}));
    assert_eq!(cuts_management(&now, &elsewhere, &moving), None);
    assert!(cuts_management(&now, &elsewhere, &unknown).is_some());
    // Into a bridge, with its address and route: not cut.
    let bridged = then(json!({
        "links": {"xenbr0": {"kind": "bridge", "ports": ["eth0"], "addresses": ["192.0.2.10/24"]}},
        "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}],
    }));
    assert_eq!(cuts_management(&now, &bridged, &far), None);
    // What did not work before is not lost.
    let nowhere = Management { ip: ip("192.0.2.200"), peer: None, link: None, next: None };
    assert_eq!(cuts_management(&now, &off, &nowhere), None);
}

#[test]
fn a_virtual_address_is_kept_out_of_the_exactness_of_addresses() {
    let mut now = host(&[("eth0", Kind::Ethernet)]);
    let with = |virtual_ips: Value| {
        read(
            &json!({"links": {"eth0": {"kind": "ethernet", "addresses": ["192.0.2.10/24"]}}, "virtual_ips": virtual_ips}),
        )
    };
    let (plain, virtual_ip) = (with(json!({})), with(json!({"192.0.2.99": {"link": "eth0", "prefix": 24}})));
    now = aim(&now, &Desired::default(), &virtual_ip);
    let held: Vec<Address> = now.links[&name("eth0")].addresses.iter().copied().collect();
    assert_eq!(held, [address("192.0.2.10/24"), address("192.0.2.99/24")]);
    let gone = aim(&now, &virtual_ip, &plain);
    assert_eq!(gone.links[&name("eth0")].addresses.len(), 1);
    let scope = Scope::of(&virtual_ip, &plain, &now);
    assert_eq!(super::differences(&now, &gone, &scope).len(), 1);
    let _: Option<&LinkView> = gone.links.get(&name("eth0"));
}
