//! What is told of two readings, and what is not told again.

use super::made_up::{address, host, name, route};
use super::{Observation, Watching};
use crate::model::Timestamp;
use crate::model::network::{Kind, LinkView, NetworkView};

fn with_carrier(view: &NetworkView, link: &str, carrier: bool) -> NetworkView {
    let mut view = view.clone();
    view.links.get_mut(&name(link)).unwrap().carrier = carrier;
    view
}

#[test]
fn each_kind_of_change_is_told_once() {
    let old = host(&[("eth0", Kind::Ethernet), ("eth1", Kind::Ethernet)]);
    let mut new = with_carrier(&old, "eth0", false);
    new.links.remove(&name("eth1"));
    new.links.insert(name("vif1.0"), LinkView::new(Kind::Vif));
    let eth0 = new.links.get_mut(&name("eth0")).unwrap();
    (eth0.mtu, eth0.up) = (9000, false);
    eth0.addresses.insert(address("192.0.2.1/24"));
    new.routes.insert(route("0.0.0.0/0", Some("192.0.2.254"), Some("eth0")));
    let mut watching = Watching::new();
    let link = name("eth0");
    let told = watching.observe(&old, &new, Timestamp(0));
    assert_eq!(
        told,
        [
            Observation::LinkRemoved { link: name("eth1"), kind: "ethernet".into() },
            Observation::CarrierLost { link: link.clone() },
            Observation::LinkChanged { link: link.clone(), what: vec!["MTU".into(), "state".into()] },
            Observation::AddressAdded { link: link.clone(), address: address("192.0.2.1/24") },
            Observation::LinkAdded { link: name("vif1.0"), kind: "vif".into() },
            Observation::RoutesChanged { added: 1, removed: 0 },
        ]
    );
    assert_eq!(watching.observe(&new, &new, Timestamp(1)), []);
    let back = watching.observe(&new, &old, Timestamp(2));
    assert!(back.contains(&Observation::CarrierBack { link: link.clone() }));
    assert!(back.contains(&Observation::AddressRemoved { link, address: address("192.0.2.1/24") }));
}

#[test]
fn a_link_that_flaps_is_told_once_until_it_is_quiet() {
    let on = host(&[("eth0", Kind::Ethernet)]);
    let off = with_carrier(&on, "eth0", false);
    let mut watching = Watching::new();
    let mut told = Vec::new();
    for at in 0..20_u64 {
        let (old, new) = if at % 2 == 0 { (&on, &off) } else { (&off, &on) };
        told.push(watching.observe(old, new, Timestamp(at * 1000)));
    }
    assert!(told[..4].iter().all(|one| one.len() == 1), "four changes are told each");
    assert_eq!(told[4], [Observation::Flapping { link: name("eth0") }]);
    assert!(told[5..].iter().all(Vec::is_empty), "{told:?}");
    assert_eq!(watching.observe(&on, &on, Timestamp(48_999)), []);
    let settled = watching.observe(&on, &on, Timestamp(49_000));
    assert_eq!(settled, [Observation::Settled { link: name("eth0"), carrier: true }]);
    assert_eq!(watching.remembered(), 0);
    let lost = watching.observe(&on, &off, Timestamp(50_000));
    assert_eq!(lost, [Observation::CarrierLost { link: name("eth0") }]);
}

#[test]
fn slow_changes_of_carrier_are_no_flapping() {
    let on = host(&[("eth0", Kind::Ethernet)]);
    let off = with_carrier(&on, "eth0", false);
    let mut watching = Watching::new();
    for at in 0..50_u64 {
        let (old, new) = if at % 2 == 0 { (&on, &off) } else { (&off, &on) };
        let told = watching.observe(old, new, Timestamp(at * 3000));
        assert!(
            matches!(told[..], [Observation::CarrierLost { .. } | Observation::CarrierBack { .. }]),
            "{told:?}"
        );
    }
}

#[test]
fn many_at_once_are_told_as_one_and_memory_is_bounded() {
    let mut on = NetworkView::default();
    for at in 0..6000 {
        on.links.insert(name(&format!("l{at}")), LinkView { carrier: true, ..LinkView::new(Kind::Dummy) });
    }
    let mut off = on.clone();
    off.links.values_mut().for_each(|link| link.carrier = false);
    let mut watching = Watching::new();
    let told = watching.observe(&on, &off, Timestamp(5));
    assert_eq!(told, [Observation::Many { count: 6000, links: 6000 }]);
    assert_eq!(watching.remembered(), 5000);
    watching.observe(&off, &NetworkView::default(), Timestamp(6));
    assert_eq!(watching.remembered(), 0);
}

#[test]
fn a_clock_that_is_set_back_ends_no_watch_for_ever() {
    let on = host(&[("eth0", Kind::Ethernet)]);
    let off = with_carrier(&on, "eth0", false);
    let mut watching = Watching::new();
    for at in 0..6_u64 {
        let (old, new) = if at % 2 == 0 { (&on, &off) } else { (&off, &on) };
        watching.observe(old, new, Timestamp(1_000_000 + at));
    }
    let told = watching.observe(&on, &on, Timestamp(10));
    assert_eq!(told, [Observation::Settled { link: name("eth0"), carrier: true }]);
}
