//! From the kernel's tables to a [`NetworkView`]: pure but for the asking. The attributes are told in rtnetlink(7), their
//! numbers in linux/if_link.h, if_addr.h and rtnetlink.h.

use super::{KernelError, Netlink};
use crate::model::network::{
    Address, Bond, BondMode, Bridge, Hop, Kind, LOCAL_TABLE, LacpRate, LinkView, Neighbour, NeighbourState,
    NetworkView, PortVlan, Route, VlanId, XmitHash,
};
use crate::model::{IfName, Mac};
use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{
    AfSpecBridge, BondLacpRate, BondXmitHashPolicy, BridgeStpState, BridgeVlanInfoFlags, InfoBond,
    InfoBridge, InfoData, InfoKind, InfoVlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState as KernelsState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags, RoutePreference,
    RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The names of the links that have one that we take, by their numbers.
pub(super) type Names = HashMap<u32, IfName>;

pub(super) async fn network(netlink: &Netlink) -> Result<NetworkView, KernelError> {
    let links = links(netlink).await?;
    let filtering = links.iter().any(|link| bridge(link).is_some_and(|bridge| bridge.vlan_filtering));
    let port_vlans = if filtering { port_vlans(netlink).await? } else { Vec::new() };
    let addresses = addresses(netlink).await?;
    let mut all_routes = routes(netlink, AddressFamily::Inet).await?;
    all_routes.extend(routes(netlink, AddressFamily::Inet6).await?);
    Ok(view(&links, &port_vlans, &addresses, &all_routes))
}

pub(super) async fn neighbours(netlink: &Netlink) -> Result<Vec<Neighbour>, KernelError> {
    let links = links(netlink).await?;
    let names: Names = links.iter().filter_map(|link| Some((link.header.index, name(link)?))).collect();
    let answers = netlink.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())).await?;
    let one = |answer: &RouteNetlinkMessage| match answer {
        RouteNetlinkMessage::NewNeighbour(message) => neighbour(message, &names),
        _ => None,
    };
    let mut all: Vec<Neighbour> = answers.iter().filter_map(one).take(super::MAX_NEIGHBOURS).collect();
    all.sort();
    Ok(all)
}

async fn links(netlink: &Netlink) -> Result<Vec<LinkMessage>, KernelError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let answers = netlink.dump(RouteNetlinkMessage::GetLink(message)).await?;
    Ok(answers.into_iter().filter_map(new_link).collect())
}

async fn port_vlans(netlink: &Netlink) -> Result<Vec<LinkMessage>, KernelError> {
    let mut message = LinkMessage::default();
    message.header.interface_family = AddressFamily::Bridge;
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::BrvlanCompressed]));
    let answers = netlink.dump(RouteNetlinkMessage::GetLink(message)).await?;
    Ok(answers.into_iter().filter_map(new_link).collect())
}

pub(super) async fn addresses(netlink: &Netlink) -> Result<Vec<AddressMessage>, KernelError> {
    let answers = netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await?;
    let one = |answer| match answer {
        RouteNetlinkMessage::NewAddress(message) => Some(message),
        _ => None,
    };
    Ok(answers.into_iter().filter_map(one).collect())
}

pub(super) async fn routes(
    netlink: &Netlink,
    family: AddressFamily,
) -> Result<Vec<RouteMessage>, KernelError> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    let answers = netlink.dump(RouteNetlinkMessage::GetRoute(message)).await?;
    let one = |answer| match answer {
        RouteNetlinkMessage::NewRoute(message) => Some(message),
        _ => None,
    };
    Ok(answers.into_iter().filter_map(one).collect())
}

pub(super) fn new_link(answer: RouteNetlinkMessage) -> Option<LinkMessage> {
    match answer {
        RouteNetlinkMessage::NewLink(message) => Some(message),
        _ => None,
    }
}

fn view(
    links: &[LinkMessage],
    port_vlans: &[LinkMessage],
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
) -> NetworkView {
    let names: Names = links.iter().filter_map(|link| Some((link.header.index, name(link)?))).collect();
    if names.len() < links.len() {
        tracing::debug!(
            count = links.len() - names.len(),
            "links with names that we do not take are left out"
        );
    }
    let mut view = NetworkView::default();
    for message in links {
        if let Some(name) = names.get(&message.header.index) {
            view.links.insert(name.clone(), link(message, &names));
        }
    }
    for message in addresses {
        let link = names.get(&message.header.index).and_then(|name| view.links.get_mut(name));
        if let (Some(link), Some(address)) = (link, address(message)) {
            link.addresses.insert(address);
        }
    }
    for message in port_vlans {
        let Some(name) = names.get(&message.header.index) else { continue };
        let Some(controller) = view.links.get(name).map(|link| link.controller.as_ref().unwrap_or(name))
        else {
            continue;
        };
        let filters =
            |link: &LinkView| matches!(link.kind, Kind::Bridge(Bridge { vlan_filtering: true, .. }));
        if view.links.get(controller).is_some_and(filters)
            && let Some(link) = view.links.get_mut(name)
        {
            link.vlans.extend(vlans(message));
        }
    }
    view.routes.extend(routes.iter().filter_map(|message| route(message, &names)));
    view
}

pub(super) fn name(link: &LinkMessage) -> Option<IfName> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => IfName::parse(name).ok(),
        _ => None,
    })
}

/// The controller's number.
pub(super) fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) if *index != 0 => Some(*index),
        _ => None,
    })
}

pub(super) fn mtu(link: &LinkMessage) -> u32 {
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.unwrap_or(0)
}

fn link(message: &LinkMessage, names: &Names) -> LinkView {
    let mut link = LinkView::new(kind(message, names));
    link.mtu = mtu(message);
    link.up = message.header.flags.contains(LinkFlags::Up);
    link.carrier = message.header.flags.contains(LinkFlags::LowerUp);
    link.controller = controller(message).and_then(|index| names.get(&index).cloned());
    for attribute in &message.attributes {
        // A loopback's is all zero, a tunnel's is an address of another kind.
        if let LinkAttribute::Address(bytes) = attribute
            && let Ok(bytes) = <[u8; 6]>::try_from(bytes.as_slice())
            && bytes != [0; 6]
        {
            link.mac = Some(Mac::from_bytes(bytes));
        }
    }
    link
}

pub(super) fn kind(message: &LinkMessage, names: &Names) -> Kind {
    let is_guests = name(message).is_some_and(|name| is_vif(name.as_str()));
    // Linux 5.14 tells on which bus a device lies; netback's are on xen-backend.
    let is_netbacks = message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::ParentDevBusName(bus) if bus == "xen-backend"));
    if is_guests || is_netbacks {
        return Kind::Vif;
    }
    if message.header.flags.contains(LinkFlags::Loopback) {
        return Kind::Loopback;
    }
    let below = || {
        message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => names.get(index).cloned(),
            _ => None,
        })
    };
    match info_kind(message) {
        Some(InfoKind::Bond) => Kind::Bond(bond(message, names)),
        Some(InfoKind::Bridge) => Kind::Bridge(bridge(message).unwrap_or_default()),
        Some(InfoKind::Vlan) => match (below(), vlan_id(message)) {
            (Some(parent), Some(id)) => Kind::Vlan { parent, id },
            // Its parent lies in another namespace, or its tag is 0.
            _ => Kind::Other { word: "vlan".to_owned() },
        },
        Some(InfoKind::Dummy) => Kind::Dummy,
        Some(InfoKind::Veth) => {
            let is_abroad =
                message.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
            Kind::Veth { peer: if is_abroad { None } else { below() } }
        }
        Some(other) => Kind::Other { word: other.to_string() },
        None if message.header.link_layer_type == LinkLayerType::Ether => Kind::Ethernet,
        None => Kind::Other { word: message.header.link_layer_type.to_string().to_lowercase() },
    }
}

/// The toolstack's name for the host's end of a guest's card: `vifDOMID.N`, and of the one that its device model emulates:
/// `vifDOMID.N-emu` (xl-network-configuration(5)).
fn is_vif(name: &str) -> bool {
    let name = name.strip_suffix("-emu").unwrap_or(name);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = name.strip_prefix("vif").and_then(|rest| rest.split_once('.'));
    numbers.is_some_and(|(domid, n)| digits(domid) && digits(n))
}

fn infos(message: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    message.attributes.iter().flat_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.as_slice(),
        _ => &[],
    })
}

fn info_kind(message: &LinkMessage) -> Option<&InfoKind> {
    infos(message).find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

fn info_data(message: &LinkMessage) -> Option<&InfoData> {
    infos(message).find_map(|info| match info {
        LinkInfo::Data(data) => Some(data),
        _ => None,
    })
}

fn vlan_id(message: &LinkMessage) -> Option<VlanId> {
    let Some(InfoData::Vlan(options)) = info_data(message) else { return None };
    options.iter().find_map(|option| match option {
        InfoVlan::Id(id) => VlanId::new(u64::from(*id)).ok(),
        _ => None,
    })
}

/// `None` if it is no bridge.
pub(super) fn bridge(message: &LinkMessage) -> Option<Bridge> {
    let Some(InfoData::Bridge(options)) = info_data(message) else { return None };
    let mut bridge = Bridge::default();
    for option in options {
        match option {
            InfoBridge::StpState(state) => bridge.stp = *state != BridgeStpState::Disabled,
            InfoBridge::ForwardDelay(hundredths) => bridge.forward_delay_ms = hundredths.saturating_mul(10),
            InfoBridge::VlanFiltering(on) => bridge.vlan_filtering = *on,
            _ => {}
        }
    }
    Some(bridge)
}

pub(super) fn bond(message: &LinkMessage, names: &Names) -> Bond {
    let mut bond = Bond::new(BondMode::Other(0));
    let Some(InfoData::Bond(options)) = info_data(message) else { return bond };
    for option in options {
        match option {
            InfoBond::Mode(mode) => bond.mode = BondMode::from_number(u8::from(*mode)),
            InfoBond::MiiMon(ms) => bond.miimon_ms = *ms,
            InfoBond::UpDelay(ms) => bond.up_delay_ms = *ms,
            InfoBond::DownDelay(ms) => bond.down_delay_ms = *ms,
            InfoBond::Primary(index) => bond.primary = names.get(index).cloned(),
            InfoBond::AdLacpRate(BondLacpRate::Fast) => bond.lacp_rate = LacpRate::Fast,
            InfoBond::XmitHashPolicy(BondXmitHashPolicy::Layer34) => bond.xmit_hash = XmitHash::Layer34,
            InfoBond::XmitHashPolicy(BondXmitHashPolicy::Layer23) => bond.xmit_hash = XmitHash::Layer23,
            _ => {}
        }
    }
    bond
}

/// `None` for those that the kernel makes by itself and that come and go: link-local ones, and IPv6 ones with a lifetime,
/// which a router's advertisement brings (RFC 4862) or of which a temporary one is made (RFC 8981).
pub(super) fn address(message: &AddressMessage) -> Option<Address> {
    let (mut of_link, mut of_network) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => of_link = Some(*ip),
            AddressAttribute::Address(ip) => of_network = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the other end; IPv6 leaves IFA_LOCAL out where there is none.
    let ip = of_link.or(of_network)?;
    if let IpAddr::V6(six) = ip
        // IFA_F_SECONDARY has the same bit as IFA_F_TEMPORARY.
        && (six.is_unicast_link_local()
            || flags.contains(AddressFlags::Secondary)
            || !flags.contains(AddressFlags::Permanent))
    {
        return None;
    }
    Some(Address { ip, prefix: message.header.prefix_len })
}

/// `None` for those that are not asked: groups, ourselves, and links without neighbours (NUD_NOARP).
fn neighbour(message: &NeighbourMessage, names: &Names) -> Option<Neighbour> {
    let state = match message.header.state {
        KernelsState::Reachable => NeighbourState::Reachable,
        KernelsState::Stale => NeighbourState::Stale,
        KernelsState::Incomplete | KernelsState::Delay | KernelsState::Probe => NeighbourState::Asked,
        KernelsState::Failed => NeighbourState::Failed,
        KernelsState::Permanent => NeighbourState::Permanent,
        _ => return None,
    };
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(four)) => ip = Some(IpAddr::V4(*four)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(six)) => ip = Some(IpAddr::V6(*six)),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac::from_bytes);
            }
            _ => {}
        }
    }
    Some(Neighbour { link: names.get(&message.header.ifindex)?.clone(), ip: ip?, mac, state })
}

/// The VLANs of one port; a range is told by its first and last.
fn vlans(message: &LinkMessage) -> Vec<PortVlan> {
    let mut all = Vec::new();
    let mut first = None;
    for attribute in &message.attributes {
        let LinkAttribute::AfSpecBridge(specs) = attribute else { continue };
        for spec in specs {
            let AfSpecBridge::VlanInfo(info) = spec else { continue };
            if info.flags.contains(BridgeVlanInfoFlags::RangeBegin) {
                first = Some(info.vid);
                continue;
            }
            let from = first.take().filter(|_| info.flags.contains(BridgeVlanInfoFlags::RangeEnd));
            let ids = from.unwrap_or(info.vid)..=info.vid;
            all.extend(ids.filter_map(|id| VlanId::new(u64::from(id)).ok()).map(|id| PortVlan {
                id,
                pvid: info.flags.contains(BridgeVlanInfoFlags::Pvid),
                untagged: info.flags.contains(BridgeVlanInfoFlags::Untagged),
            }));
        }
    }
    all
}

/// `None` for what is no unicast route that somebody wanted: those that the kernel makes with an address or learns from
/// routers, and those by links whose names we do not take.
pub(super) fn route(message: &RouteMessage, names: &Names) -> Option<Route> {
    let header = &message.header;
    let by_itself =
        matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect);
    if by_itself || header.kind != RouteType::Unicast {
        return None;
    }
    let unspecified = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut route = Route {
        table: u32::from(header.table),
        onlink: header.flags.contains(RouteFlags::Onlink),
        protocol: match header.protocol {
            RouteProtocol::Unspec | RouteProtocol::Static => 0,
            other => u8::from(other),
        },
        ..Route::new(Address { ip: unspecified, prefix: header.destination_prefix_length })
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => route.table = *number,
            RouteAttribute::Destination(to) => route.to.ip = ip(to)?,
            RouteAttribute::Oif(index) => route.link = Some(names.get(index)?.clone()),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::PrefSource(source) => route.source = Some(ip(source)?),
            RouteAttribute::MultiPath(hops) => {
                route.hops = hops.iter().map(|one| hop(one, names)).collect::<Option<_>>()?;
            }
            RouteAttribute::Preference(RoutePreference::Medium) => {}
            other @ (RouteAttribute::Metrics(_)
            | RouteAttribute::Preference(_)
            | RouteAttribute::EncapType(_)
            | RouteAttribute::Encap(_)) => route.rest.push(raw(other)),
            other => route.via = gateway(other).or(route.via),
        }
    }
    if route.table == LOCAL_TABLE {
        return None;
    }
    Some(route.normal())
}

/// An attribute's number and value, as they stand in a message.
fn raw(attribute: &RouteAttribute) -> (u16, Vec<u8>) {
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    (attribute.kind(), value)
}

/// IPv4 may go by a gateway of IPv6 (RFC 5549).
fn gateway(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(gateway) => ip(gateway),
        RouteAttribute::Via(RouteVia::Inet6(gateway)) => Some(IpAddr::V6(*gateway)),
        _ => None,
    }
}

fn hop(message: &RouteNextHop, names: &Names) -> Option<Hop> {
    Some(Hop {
        via: message.attributes.iter().find_map(gateway),
        link: names.get(&message.interface_index)?.clone(),
        weight: u16::from(message.hops) + 1,
        onlink: message.flags.contains(RouteNextHopFlags::Onlink),
    })
}

/// Whether a route may be the one that is asked for, by what needs no link's name.
pub(super) fn may_be(message: &RouteMessage, asked: &Route) -> bool {
    let mut route = Route { table: u32::from(message.header.table), ..Route::new(asked.to) };
    route.to.prefix = message.header.destination_prefix_length;
    let mut to = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => route.table = *number,
            RouteAttribute::Destination(one) => to = ip(one),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            _ => {}
        }
    }
    let is_there = to.is_none_or(|to| to == asked.to.network().ip);
    is_there && route.normal().is_rival(&asked.normal())
}

/// The numbers of the links that a route leads by.
pub(super) fn links_of(message: &RouteMessage) -> Vec<u32> {
    let mut all = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => all.push(*index),
            RouteAttribute::MultiPath(hops) => all.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    all
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(four) => Some(IpAddr::V4(*four)),
        RouteAddress::Inet6(six) => Some(IpAddr::V6(*six)),
        _ => None,
    }
}

#[cfg(test)]
#[path = "dump_tests.rs"]
mod tests;
