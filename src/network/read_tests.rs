//! That the JSON form is read strictly, and that nothing hostile gets through or is told at length.

use super::Desired;
use super::made_up::{Tape, desired};
use proptest::prelude::*;
use serde_json::{Value, json};

fn told(value: &Value) -> Vec<String> {
    match Desired::read(value) {
        Ok(_) => panic!("{value} was taken"),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn each_problem_names_its_field() {
    let eth = |key: &str, value: Value| json!({"links": {"eth0": {"kind": "ethernet", key: value}}});
    let bond =
        |key: &str, value: Value| json!({"links": {"b": {"kind": "bond", "mode": "802.3ad", key: value}}});
    for (value, problem) in [
        (json!([]), "the declaration: a list is not one; allowed: an object"),
        (json!({"linkz": {}}), "linkz: is not known here; allowed: links, routes, networks, virtual_ips"),
        (json!({"links": []}), "links: a list is not one; allowed: an object"),
        (json!({"links": {"eth0": 7}}), "links.eth0: 7 is not one; allowed: an object"),
        (eth("mtu", json!(67)), "links.eth0.mtu: 67 is not one; allowed: 68 to 65535 bytes"),
        (eth("mtu", json!(65_536)), "links.eth0.mtu: 65536 is not one; allowed: 68 to 65535 bytes"),
        (eth("mtu", json!("1500")), "links.eth0.mtu: \"1500\" is not one; allowed: 68 to 65535 bytes"),
        (eth("mtu", json!(-1)), "links.eth0.mtu: -1 is not one; allowed: 68 to 65535 bytes"),
        (eth("mtu", json!(1500.0)), "links.eth0.mtu: 1500.0 is not one; allowed: 68 to 65535 bytes"),
        (eth("up", json!("yes")), "links.eth0.up: \"yes\" is not one; allowed: true, false"),
        (
            eth("addresses", json!("10.0.0.1")),
            "links.eth0.addresses: \"10.0.0.1\" is not one; allowed: a list",
        ),
        (
            eth("vlans", json!([0])),
            "links.eth0.vlans[0]: 0 is not one; allowed: 1 to 4094, or an object with id, pvid, untagged",
        ),
        (eth("vlans", json!([7, {"id": 7}])), "links.eth0.vlans[1]: VLAN 7 is there twice"),
        (eth("vlans", json!([{"id": 4095}])), "links.eth0.vlans[0].id: 4095 is not one; allowed: 1 to 4094"),
        (
            eth("vlans", json!([{"id": 7, "tagged": true}])),
            "links.eth0.vlans[0].tagged: is not known here; allowed: id, pvid, untagged",
        ),
        (
            eth("addresses", json!(["10.0.0.1/8", "10.0.0.1/8"])),
            "links.eth0.addresses[1]: \"10.0.0.1/8\" is there twice",
        ),
        (
            eth("mode", json!("802.3ad")),
            "links.eth0.mode: is not known here; allowed: kind, up, dhcp, ports, mtu, mac, addresses, vlans",
        ),
        (bond("miimon_ms", json!(700_000)), "links.b.miimon_ms: 700000 is not one; allowed: 0 to 600000"),
        (
            bond("mode", json!({"other": 0})),
            "links.b.mode: an object is not one; allowed: active-backup, 802.3ad, balance-alb",
        ),
        (bond("lacp_rate", json!("quick")), "links.b.lacp_rate: \"quick\" is not one; allowed: slow, fast"),
        (bond("ports", json!(["eth0", "eth0"])), "links.b.ports[1]: \"eth0\" is there twice"),
        (
            json!({"links": {"b": {"kind": "bond"}}}),
            "links.b.mode: is missing; allowed: active-backup, 802.3ad, balance-alb",
        ),
        (
            json!({"links": {"v": {"kind": "vlan", "id": 4096, "parent": "x"}}}),
            "links.v.id: 4096 is not one; allowed: 1 to 4094",
        ),
        (
            json!({"links": {"v": {"kind": "vif"}}}),
            "links.v.kind: \"vif\" is not one; allowed: ethernet, bond, vlan, bridge, dummy",
        ),
        (
            json!({"links": {"v": {}}}),
            "links.v.kind: null is not one; allowed: ethernet, bond, vlan, bridge, dummy",
        ),
        (
            json!({"routes": [{"via": "10.0.0.1"}]}),
            "routes[0].to: is missing; allowed: a network, 0.0.0.0/0 or ::/0",
        ),
        (
            json!({"routes": [{"to": "::/0", "hops": [{"link": "eth0", "weight": 0}]}]}),
            "routes[0].hops[0].weight: is not one; allowed: 1 to 256",
        ),
        (
            json!({"routes": [{"to": "::/0", "via": "x"}]}),
            "routes[0].via: \"x\" is not one; allowed: an IPv4 or IPv6 address",
        ),
        (
            json!({"routes": [{"to": "::/0", "metric": -1}]}),
            "routes[0].metric: -1 is not one; allowed: 0 to 4294967295",
        ),
        (
            json!({"networks": {"m": {"link": "x", "roles": ["OTHER"]}}}),
            "networks.m.roles[0]: \"OTHER\" is not one; allowed: MANAGEMENT, CLUSTER_HEARTBEAT, LIVE_MIGRATE, STORAGE, VIRTUAL_MACHINE",
        ),
        (
            json!({"virtual_ips": {"10.0.0.1": {"link": "x"}}}),
            "virtual_ips.10.0.0.1.prefix: is missing; allowed: 1 to 128",
        ),
        (
            json!({"virtual_ips": {"::1": {"link": "x", "prefix": 64}, "0::1": {"link": "x", "prefix": 64}}}),
            "virtual_ips.::1: is there twice",
        ),
    ] {
        assert_eq!(told(&value), [problem], "{value}");
    }
}

#[test]
fn hostile_names_are_refused_and_told_short_and_escaped() {
    for bad in
        ["sixteen-bytes-xx", "a/b", "eth%d", "..", "", "a b", "a\n\u{1b}[31m", "-x", &"x".repeat(100_000)]
    {
        for value in [
            json!({"links": {bad: {"kind": "ethernet"}}}),
            json!({"links": {"b": {"kind": "bridge", "ports": [bad]}}}),
            json!({"links": {"b": {"kind": "vlan", "parent": bad, "id": 5}}}),
            json!({"links": {"b": {"kind": bad}}}),
            json!({"links": {"b": {"kind": "dummy", bad: 1}}}),
            json!({"links": {"b": {"kind": "dummy", "mac": bad}}}),
            json!({"links": {"b": {"kind": "dummy", "addresses": [bad]}}}),
            json!({"virtual_ips": {bad: {"link": "x", "prefix": 5}}}),
        ] {
            let told = told(&value).join("\n");
            assert!(told.len() < 400, "{told}");
            assert!(!told.contains(['\u{1b}', '\r']), "{told}");
        }
    }
}

#[test]
fn what_is_too_much_is_refused_before_it_is_read() {
    let links: serde_json::Map<String, Value> =
        (0..5001).map(|at| (format!("l{at}"), json!({"kind": "dummy"}))).collect();
    assert_eq!(told(&json!({"links": links})), ["links: has 5001 entries; allowed: at most 5000"]);
    let routes = vec![json!({}); 5001];
    assert_eq!(told(&json!({"routes": routes})), ["routes: has 5001 entries; allowed: at most 5000"]);
    let addresses: Vec<String> = (0..257).map(|at| format!("10.0.{}.{}/32", at / 256, at % 256)).collect();
    let link = json!({"links": {"l": {"kind": "dummy", "addresses": addresses}}});
    assert_eq!(told(&link), ["links.l.addresses: has 257 entries; allowed: at most 256"]);
    let vlans: Vec<u64> = (1..=4095).collect();
    let link = json!({"links": {"l": {"kind": "dummy", "vlans": vlans}}});
    assert_eq!(told(&link), ["links.l.vlans: has 4095 entries; allowed: at most 4094"]);
    let vlans: Vec<u64> = (1..=4094).collect();
    let all = Desired::read(&json!({"links": {"l": {"kind": "dummy", "vlans": vlans}}})).unwrap();
    assert_eq!(all.links.values().next().unwrap().vlans.as_ref().unwrap().len(), 4094);
}

#[test]
fn at_most_twenty_problems_are_told() {
    let routes = vec![json!({}); 100];
    let told = told(&json!({"routes": routes}));
    assert_eq!(told.len(), 20);
    assert!(told[19].ends_with("(and 80 more problems)"), "{told:?}");
}

#[test]
fn the_example_of_the_documentation_is_read_and_shows_every_field() {
    let document = include_str!("../../docs/network.md");
    let example = document.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let value: Value = toml::from_str(example).unwrap();
    let read = Desired::read(&value).unwrap();
    assert_eq!(
        (read.links.len(), read.routes.len(), read.networks.len(), read.virtual_ips.len()),
        (6, 3, 1, 1)
    );
    let fields = serde_json::to_value(&read).unwrap();
    let links = fields["links"].as_object().unwrap().values();
    for field in links.flat_map(|link| link.as_object().unwrap().keys()) {
        assert!(example.contains(&format!("{field} = ")), "{field}");
    }
}

#[test]
fn an_example_in_json_is_read() {
    let value = json!({
        "links": {"bond0":  {"kind": "bond", "mode": "active-backup", "miimon_ms": 100, "ports": ["eth0", "eth1"]},
                  "xenbr0": {"kind": "bridge", "ports": ["bond0"], "addresses": ["192.0.2.10/24"]},
                  "bond0.7": {"kind": "vlan", "parent": "bond0", "id": 7, "mtu": 1500}},
        "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}],
        "networks": {"mgmt": {"link": "xenbr0", "roles": ["MANAGEMENT", "VIRTUAL_MACHINE"]}}
    });
    let read = Desired::read(&value).unwrap();
    assert_eq!(read, serde_json::from_value(value).unwrap());
    assert_eq!((read.links.len(), read.routes.len(), read.networks.len()), (3, 1, 1));
}

#[test]
fn all_that_a_route_can_have_is_read_as_it_was_written() {
    let value = json!({"routes": [
        {"to": "0.0.0.0/0", "via": "192.0.2.1", "link": "eth0", "metric": 5, "table": 70_000, "onlink": true,
         "source": "192.0.2.10"},
        {"to": "::/0", "hops": [{"via": "fe80::1", "link": "eth0", "weight": 256}, {"link": "eth1", "onlink": true}]},
    ]});
    let read = Desired::read(&value).unwrap();
    assert_eq!(read, serde_json::from_value(value).unwrap());
    assert_eq!(Desired::read(&serde_json::to_value(&read).unwrap()).unwrap(), read);
    let hops: Vec<u16> = read.routes.iter().flat_map(|route| &route.hops).map(|hop| hop.weight).collect();
    assert_eq!(hops, [256, 1]);
}

fn anything() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        Just("links"),
        Just("routes"),
        Just("kind"),
        Just("bond"),
        Just("mode"),
        Just("eth0"),
        Just("addresses"),
        Just("vlans"),
        Just("ports"),
        Just("bridge"),
        Just("to"),
        Just("virtual_ips"),
        Just("10.0.0.1/8"),
        Just("\u{0}"),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 60, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map(word.clone().prop_map(str::to_owned), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read_as_it_was(tape in proptest::collection::vec(any::<u8>(), 0..300)) {
        let desired = desired(&mut Tape::new(&tape));
        let value = serde_json::to_value(&desired).unwrap();
        prop_assert_eq!(Desired::read(&value), Ok(desired));
    }

    #[test]
    fn nothing_makes_the_reader_panic_and_what_it_takes_serde_takes_too(value in anything()) {
        if let Ok(read) = Desired::read(&value) {
            prop_assert_eq!(Desired::read(&serde_json::to_value(&read).unwrap()), Ok(read));
        }
    }
}
