//! The tree as people see it.

use super::made_up::{address, bond, host, name, vlan_id};
use super::{Desired, diagram};
use crate::model::IfName;
use crate::model::network::{BondMode, Bridge, Kind, LinkView, NetworkView, Owner};
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;

#[test]
fn bridges_are_the_roots_and_all_is_drawn_once() {
    let mut view = host(&[
        ("lo", Kind::Loopback),
        ("eth0", Kind::Ethernet),
        ("eth1", Kind::Ethernet),
        ("eth2", Kind::Ethernet),
        ("eth3", Kind::Ethernet),
        ("bond0", Kind::Bond(bond(BondMode::ActiveBackup))),
        ("bond0.7", Kind::Vlan { parent: name("bond0"), id: vlan_id(7) }),
        ("bond0.8", Kind::Vlan { parent: name("bond0"), id: vlan_id(8) }),
        ("xenbr0", Kind::Bridge(Bridge::default())),
        ("xenbr8", Kind::Bridge(Bridge::default())),
        ("vif1.0", Kind::Vif),
        ("eth2.5", Kind::Vlan { parent: name("eth2"), id: vlan_id(5) }),
    ]);
    for (port, controller) in [
        ("eth0", "bond0"),
        ("eth1", "bond0"),
        ("bond0", "xenbr0"),
        ("vif1.0", "xenbr0"),
        ("bond0.8", "xenbr8"),
    ] {
        view.links.get_mut(&name(port)).unwrap().controller = Some(name(controller));
    }
    view.links.get_mut(&name("eth1")).unwrap().carrier = false;
    view.links.get_mut(&name("xenbr0")).unwrap().addresses =
        [address("192.0.2.10/24"), address("192.0.2.99/24")].into();
    let desired = Desired::read(&json!({
        "networks": {"mgmt": {"link": "xenbr0", "roles": ["MANAGEMENT", "VIRTUAL_MACHINE"]}},
        "virtual_ips": {"192.0.2.99": {"link": "xenbr0", "prefix": 24}},
    }))
    .unwrap();
    let owners = BTreeMap::from([(name("eth3"), Owner::NetworkManager)]);
    assert_eq!(
        diagram(&view, &desired, &owners),
        "\
xenbr0  bridge, up  192.0.2.10/24  192.0.2.99/24 (virtual)  [mgmt: MANAGEMENT VIRTUAL_MACHINE]
├─ bond0  bond active-backup, up
│  ├─ eth0  ethernet, up
│  ├─ eth1  ethernet, no carrier
│  └─ bond0.7  VLAN 7 on bond0, up
└─ vif1.0  vif, up
xenbr8  bridge, up
└─ bond0.8  VLAN 8 on bond0, up
eth2  ethernet, up
└─ eth2.5  VLAN 5 on eth2, up
eth3  ethernet, up  (NetworkManager)
lo  loopback, up
"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_link_of_a_hostile_view_is_drawn_exactly_once(ways in proptest::collection::vec((0..12_usize, 0..12_usize, 0..4_u8), 12)) {
        let mut view = NetworkView::default();
        let names: Vec<IfName> = (0..12).map(|at| name(&format!("l{at}"))).collect();
        for (at, (over, below, kind)) in ways.into_iter().enumerate() {
            let kind = match kind {
                0 => Kind::Vlan { parent: names[below].clone(), id: vlan_id(3) },
                1 => Kind::Bridge(Bridge::default()),
                2 => Kind::Bond(bond(BondMode::Lacp)),
                _ => Kind::Ethernet,
            };
            let mut link = LinkView::new(kind);
            link.controller = (over != below).then(|| names[over].clone());
            view.links.insert(names[at].clone(), link);
        }
        let text = diagram(&view, &Desired::default(), &BTreeMap::new());
        prop_assert_eq!(text.lines().count(), 12, "{}", text);
        for name in &names {
            let is_its = |line: &&str| line.trim_start_matches(['│', '├', '└', '─', ' ']).starts_with(&format!("{name}  "));
            prop_assert_eq!(text.lines().filter(is_its).count(), 1, "{} in {}", name, text);
        }
    }
}
