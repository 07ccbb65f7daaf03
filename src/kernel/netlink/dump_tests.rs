//! The kernel's messages, made up, and what they become.

use super::*;
use proptest::prelude::*;
use rtnetlink::packet_route::link::BridgeVlanInfo;
use rtnetlink::packet_route::route::RouteNextHop;

fn a_link(index: u32, name: &str, kind: Option<InfoKind>, data: Option<InfoData>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.link_layer_type = LinkLayerType::Ether;
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    if let Some(kind) = kind {
        let mut infos = vec![LinkInfo::Kind(kind)];
        infos.extend(data.map(LinkInfo::Data));
        message.attributes.push(LinkAttribute::LinkInfo(infos));
    }
    message
}

fn on(mut message: LinkMessage, attribute: LinkAttribute) -> LinkMessage {
    message.attributes.push(attribute);
    message
}

fn kinds(links: &[LinkMessage]) -> Vec<(String, Kind)> {
    let links = view(links, &[], &[], &[]).links;
    links.into_iter().map(|(name, link)| (name.as_str().to_owned(), link.kind)).collect()
}

#[test]
fn a_links_kind_is_told_by_the_kernels_word_its_name_or_its_bus() {
    let veth =
        |index, name, peer| on(a_link(index, name, Some(InfoKind::Veth), None), LinkAttribute::Link(peer));
    let vlan = a_link(6, "v", Some(InfoKind::Vlan), Some(InfoData::Vlan(vec![InfoVlan::Id(160)])));
    let mut lo = a_link(1, "lo", None, None);
    lo.header.flags = LinkFlags::Loopback;
    let links = [
        lo,
        a_link(2, "eth0", None, None),
        veth(3, "a", 4),
        veth(4, "b", 3),
        on(veth(5, "c", 2), LinkAttribute::LinkNetNsId(0)),
        on(vlan, LinkAttribute::Link(2)),
        a_link(7, "vif3.0", None, None),
        on(a_link(8, "guest7", None, None), LinkAttribute::ParentDevBusName("xen-backend".to_owned())),
        a_link(9, "vif3.0-emu", Some(InfoKind::Tun), None),
        a_link(10, "d", Some(InfoKind::Dummy), None),
    ];
    let peer = |peer: &str| Kind::Veth { peer: Some(peer.parse().unwrap()) };
    let expected = [
        ("a", peer("b")),
        ("b", peer("a")),
        ("c", Kind::Veth { peer: None }),
        ("d", Kind::Dummy),
        ("eth0", Kind::Ethernet),
        ("guest7", Kind::Vif),
        ("lo", Kind::Loopback),
        ("v", Kind::Vlan { parent: "eth0".parse().unwrap(), id: VlanId::new(160).unwrap() }),
        ("vif3.0", Kind::Vif),
        ("vif3.0-emu", Kind::Vif),
    ];
    assert_eq!(kinds(&links), expected.map(|(name, kind)| (name.to_owned(), kind)));
}

#[test]
fn a_bonds_and_a_bridges_options_are_read() {
    let options = vec![
        InfoBond::Mode(rtnetlink::packet_route::link::BondMode::from(4)),
        InfoBond::MiiMon(100),
        InfoBond::UpDelay(200),
        InfoBond::DownDelay(300),
        InfoBond::Primary(2),
        InfoBond::AdLacpRate(BondLacpRate::Fast),
        InfoBond::XmitHashPolicy(BondXmitHashPolicy::Layer34),
    ];
    let bond = a_link(1, "bond0", Some(InfoKind::Bond), Some(InfoData::Bond(options)));
    let options = vec![
        InfoBridge::StpState(BridgeStpState::KernelStp),
        InfoBridge::ForwardDelay(400),
        InfoBridge::VlanFiltering(true),
    ];
    let bridge = a_link(3, "br0", Some(InfoKind::Bridge), Some(InfoData::Bridge(options)));
    let told = kinds(&[bond, a_link(2, "eth0", None, None), bridge]);
    let bond = Bond {
        mode: BondMode::Lacp,
        miimon_ms: 100,
        up_delay_ms: 200,
        down_delay_ms: 300,
        primary: Some("eth0".parse().unwrap()),
        lacp_rate: LacpRate::Fast,
        xmit_hash: XmitHash::Layer34,
    };
    assert_eq!(told[0], ("bond0".to_owned(), Kind::Bond(bond)));
    let bridge = Bridge { stp: true, forward_delay_ms: 4000, vlan_filtering: true };
    assert_eq!(told[1], ("br0".to_owned(), Kind::Bridge(bridge)));
}

#[test]
fn a_range_of_vlans_is_all_of_them_and_bridges_without_filtering_have_none() {
    let spec = |vid, flags| AfSpecBridge::VlanInfo(BridgeVlanInfo { flags, vid });
    let specs = vec![
        spec(1, BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged),
        spec(100, BridgeVlanInfoFlags::RangeBegin),
        spec(102, BridgeVlanInfoFlags::RangeEnd),
        spec(200, BridgeVlanInfoFlags::empty()),
    ];
    let vlans_of = |filtering| {
        let options = vec![InfoBridge::VlanFiltering(filtering)];
        let bridge = a_link(1, "br0", Some(InfoKind::Bridge), Some(InfoData::Bridge(options)));
        let port = on(a_link(2, "eth0", None, None), LinkAttribute::Controller(1));
        let told = on(a_link(2, "eth0", None, None), LinkAttribute::AfSpecBridge(specs.clone()));
        view(&[bridge, port], &[told], &[], &[]).links[&"eth0".parse().unwrap()].vlans.clone()
    };
    let told: Vec<_> = vlans_of(true).iter().map(|vlan| (vlan.id.get(), vlan.pvid, vlan.untagged)).collect();
    let plain = |id| (id, false, false);
    assert_eq!(told, [(1, true, true), plain(100), plain(101), plain(102), plain(200)]);
    assert!(vlans_of(false).is_empty());
}

#[test]
fn link_local_and_passing_addresses_are_left_out_and_of_two_ends_ours_is_told() {
    let told = |attributes: Vec<AddressAttribute>| {
        let mut message = AddressMessage::default();
        message.header.prefix_len = 32;
        message.attributes = attributes;
        address(&message).map(|address| address.to_string())
    };
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    let six = || AddressAttribute::Address(ip("2001:db8::1"));
    let lasting = AddressAttribute::Flags(AddressFlags::Permanent);
    assert_eq!(told(vec![six(), lasting]).as_deref(), Some("2001:db8::1/32"));
    assert_eq!(told(vec![six()]), None, "a router's advertisement brought it");
    let temporary = AddressAttribute::Flags(AddressFlags::Permanent | AddressFlags::Secondary);
    assert_eq!(told(vec![six(), temporary]), None);
    let lasting = AddressAttribute::Flags(AddressFlags::Permanent | AddressFlags::Managetempaddr);
    assert!(told(vec![six(), lasting]).is_some());
    assert_eq!(told(vec![AddressAttribute::Address(ip("fe80::1"))]), None);
    let ends = vec![AddressAttribute::Address(ip("192.0.2.2")), AddressAttribute::Local(ip("192.0.2.1"))];
    assert_eq!(told(ends).as_deref(), Some("192.0.2.1/32"));
    let second =
        vec![AddressAttribute::Local(ip("192.0.2.1")), AddressAttribute::Flags(AddressFlags::Secondary)];
    assert!(told(second).is_some(), "a second IPv4 address of a network is one that somebody wants");
    assert_eq!(told(vec![]), None);
}

fn a_route(family: AddressFamily, metric: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = 254;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(2));
    message.attributes.extend(metric.map(RouteAttribute::Priority));
    message
}

#[test]
fn only_unicast_routes_that_somebody_made_by_links_with_good_names_are_told() {
    let names: Names = [(2, "eth0".parse().unwrap())].into();
    let four = || a_route(AddressFamily::Inet, None);
    assert_eq!(route(&four(), &names).unwrap().to_string(), "0.0.0.0/0 by eth0");
    let without: [fn(&mut RouteMessage); 6] = [
        |message| message.header.protocol = RouteProtocol::Kernel,
        |message| message.header.protocol = RouteProtocol::Ra,
        |message| message.header.kind = RouteType::BlackHole,
        |message| message.attributes.push(RouteAttribute::Table(255)),
        |message| message.attributes.push(RouteAttribute::MultiPath(vec![RouteNextHop::default()])),
        |message| message.attributes[0] = RouteAttribute::Oif(9),
    ];
    for change in without {
        let mut message = four();
        change(&mut message);
        assert_eq!(route(&message, &names), None, "{message:?}");
    }
}

#[test]
fn a_route_has_the_kernels_metric() {
    let names: Names = [(2, "eth0".parse().unwrap())].into();
    let metric = |family, metric| route(&a_route(family, Some(metric)), &names).unwrap().metric;
    assert_eq!(metric(AddressFamily::Inet6, 1024), 1024);
    assert_eq!(metric(AddressFamily::Inet6, 256), 256);
    assert_eq!(metric(AddressFamily::Inet, 1024), 1024);
}

proptest! {
    #[test]
    fn whatever_names_links_have_only_good_ones_are_told_and_controllers_are_known_ones(
        names in proptest::collection::vec("[a-c:%/ .0-9]{0,17}|vif[0-9]{0,2}[.][0-9]{0,2}", 0..8),
        controllers in proptest::collection::vec(0_u32..12, 8),
    ) {
        let link = |((name, controller), index): ((&String, &u32), u32)| {
            on(a_link(index, name, None, None), LinkAttribute::Controller(*controller))
        };
        let links: Vec<LinkMessage> = names.iter().zip(&controllers).zip(1..).map(link).collect();
        let view = view(&links, &links, &[], &[]);
        let good = names.iter().filter(|name| IfName::parse(name).is_ok());
        prop_assert_eq!(view.links.len(), good.collect::<std::collections::BTreeSet<_>>().len());
        for link in view.links.values() {
            prop_assert!(link.controller.iter().all(|controller| view.links.contains_key(controller)));
        }
    }

    #[test]
    fn any_ranges_of_vlans_are_read_without_harm(
        entries in proptest::collection::vec((any::<u16>(), any::<u16>()), 0..16)
    ) {
        let spec = |(vid, flags)| {
            AfSpecBridge::VlanInfo(BridgeVlanInfo { vid, flags: BridgeVlanInfoFlags::from_bits_retain(flags) })
        };
        let specs = entries.into_iter().map(spec).collect();
        let told = vlans(&on(LinkMessage::default(), LinkAttribute::AfSpecBridge(specs)));
        prop_assert!(told.iter().all(|vlan| (1..=4094).contains(&vlan.id.get())));
    }
}
