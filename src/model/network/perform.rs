//! What a change does to a view: the kernel's rules, as far as plans lean on them.
//!
//! Left out, since no plan leans on it: which MAC and MTU a bridge takes from its ports, and what time brings (carrier
//! comes later than a link's being switched on).

use super::{
    Address, Change, Ground, IfName, Kind, LinkView, MAIN_TABLE, Mac, NetworkView, PortVlan, Route, VlanId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Why a kernel does not do a change. In brackets: its error number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refused {
    #[error("exists already")]
    Exists,
    #[error("there is no such link")]
    NoSuchLink,
    #[error("there is no such address")]
    NoSuchAddress,
    #[error("there is no such route")]
    NoSuchRoute,
    #[error("there is no such VLAN on this port")]
    NoSuchVlan,
    #[error("this kernel cannot do that")]
    NotSupported,
    #[error("is in use")]
    Busy,
    #[error("the link is off, or what it stands on is")]
    Down,
    #[error("the gateway is on no network of this host")]
    Unreachable,
    #[error("would stand on itself")]
    Loop,
    #[error("a value is out of range")]
    Range,
    #[error("not permitted")]
    NotPermitted,
    /// Any other.
    #[error("{0}")]
    Other(String),
}

/// Does the change, or leaves the view as it was.
pub fn perform(view: &mut NetworkView, change: &Change) -> Result<(), Refused> {
    let mut ground = Ground::bare(std::mem::take(view));
    let done = on(&mut ground, change);
    *view = ground.into_view();
    done
}

pub(super) fn on(ground: &mut Ground, change: &Change) -> Result<(), Refused> {
    match change {
        Change::Create { link, kind, mac, mtu } => create(ground, link, kind, *mac, *mtu),
        Change::Delete { link } => delete(ground, link),
        Change::SetMtu { link, mtu } => set_mtu(ground, link, *mtu),
        Change::SetMac { link, mac } => set_mac(ground, link, *mac),
        Change::SetUp { link, up } => set_up(ground, link, *up),
        Change::SetController { link, controller } => set_controller(ground, link, controller.as_ref()),
        Change::SetBridge { link, bridge } => {
            let found = ground.link_mut(link)?;
            let Kind::Bridge(old) = found.kind else { return Err(Refused::NotSupported) };
            found.kind = Kind::Bridge(*bridge);
            if old.vlan_filtering != bridge.vlan_filtering {
                filter(ground, link, bridge.vlan_filtering);
            }
            Ok(())
        }
        Change::SetBond { link, bond } => {
            let ports = !ground.ports(link).is_empty();
            let has_primary = bond.primary.as_ref().is_none_or(|primary| ground.link(primary).is_some());
            let found = ground.link_mut(link)?;
            let Kind::Bond(old) = &found.kind else { return Err(Refused::NotSupported) };
            if !has_primary {
                return Err(Refused::NoSuchLink);
            }
            // BOND_OPTFLAG_NOSLAVES and BOND_OPTFLAG_IFDOWN (drivers/net/bonding/bond_options.c).
            if old.mode != bond.mode && (ports || found.up) {
                return Err(Refused::Busy);
            }
            if old.lacp_rate != bond.lacp_rate && found.up {
                return Err(Refused::Busy);
            }
            found.kind = Kind::Bond(bond.clone());
            Ok(())
        }
        Change::AddPortVlan { link, vlan } => add_port_vlan(ground, link, *vlan),
        Change::DeletePortVlan { link, id } => {
            let vlans = &mut ground.link_mut(link)?.vlans;
            let one = same_id(vlans, *id).ok_or(Refused::NoSuchVlan)?;
            vlans.remove(&one);
            Ok(())
        }
        Change::AddAddress { link, address } => add_address(ground, link, *address),
        Change::DeleteAddress { link, address } => delete_address(ground, link, *address),
        Change::AddRoute { route } => add_route(ground, route),
        Change::DeleteRoute { route } => {
            let like = route.normal();
            let one = ground
                .view()
                .routes_to(like.to)
                .find(|one| one.does(&like))
                .cloned()
                .ok_or(Refused::NoSuchRoute)?;
            ground.remove_route(&one);
            Ok(())
        }
        Change::SetDhcp { link, on } => {
            ground.link_mut(link)?.dhcp = *on;
            Ok(())
        }
    }
}

fn create(
    ground: &mut Ground,
    link: &IfName,
    kind: &Kind,
    mac: Option<Mac>,
    mtu: Option<u32>,
) -> Result<(), Refused> {
    if ground.link(link).is_some() {
        return Err(Refused::Exists);
    }
    if !kind.is_made() {
        return Err(Refused::NotSupported);
    }
    if mtu.is_some_and(|mtu| !is_mtu(mtu)) {
        return Err(Refused::Range);
    }
    let mut made = LinkView::new(kind.clone());
    made.mac = mac.or_else(|| Some(made_up_mac(link)));
    made.mtu = mtu.unwrap_or(made.mtu);
    match kind {
        Kind::Vlan { parent, id } => {
            let below = ground.link(parent).ok_or(Refused::NoSuchLink)?;
            if ground.has_vlan(parent, *id) {
                return Err(Refused::Exists);
            }
            made.mac = mac.or(below.mac);
            made.mtu = mtu.unwrap_or(below.mtu);
            if made.mtu > below.mtu {
                return Err(Refused::Range);
            }
        }
        Kind::Veth { peer: Some(peer) } => {
            if ground.link(peer).is_some() || peer == link {
                return Err(Refused::Exists);
            }
            let mut other = LinkView::new(Kind::Veth { peer: Some(link.clone()) });
            other.mac = Some(made_up_mac(peer));
            other.mtu = made.mtu;
            ground.insert(peer.clone(), other);
        }
        Kind::Bridge(bridge) if bridge.vlan_filtering => {
            made.vlans.insert(default_vlan());
        }
        // It has none until its first port brings one.
        Kind::Bond(bond) => {
            if bond.primary.as_ref().is_some_and(|primary| ground.link(primary).is_none()) {
                return Err(Refused::NoSuchLink);
            }
            made.mac = mac;
        }
        _ => {}
    }
    ground.insert(link.clone(), made);
    Ok(())
}

/// As [`super::Mtu`] has it.
fn is_mtu(bytes: u32) -> bool {
    (68..=65_535).contains(&bytes)
}

/// The same for the same name, locally administered.
fn made_up_mac(link: &IfName) -> Mac {
    let sum = link
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let [a, b, c, d, e, ..] = sum.to_be_bytes();
    Mac::from_bytes([0x02, a, b, c, d, e])
}

/// With a VLAN's parent goes the VLAN, with one end of a pair the other.
fn delete(ground: &mut Ground, link: &IfName) -> Result<(), Refused> {
    if !ground.link(link).ok_or(Refused::NoSuchLink)?.kind.is_made() {
        return Err(Refused::NotSupported);
    }
    let mut going = vec![link.clone()];
    while let Some(name) = going.pop() {
        let above = ground.vlans_on(&name);
        let ports = ground.ports(&name);
        let Some(gone) = ground.remove(&name) else { continue };
        if let Kind::Veth { peer: Some(peer) } = &gone.kind {
            going.push(peer.clone());
        }
        going.extend(above);
        end_macless(ground, gone.controller.as_ref());
        for port in ports {
            release(ground, &port, matches!(gone.kind, Kind::Bond(_)));
        }
        for route in ground.routes_by(&name) {
            ground.remove_route(&route);
        }
    }
    Ok(())
}

/// A VLAN's MTU is at most its parent's; a bond's ports have the bond's. IPv6 ends below 1,280.
fn set_mtu(ground: &mut Ground, link: &IfName, mtu: u32) -> Result<(), Refused> {
    if !is_mtu(mtu) {
        return Err(Refused::Range);
    }
    if let Kind::Vlan { parent, .. } = &ground.link(link).ok_or(Refused::NoSuchLink)?.kind
        && ground.link(parent).is_some_and(|below| below.mtu < mtu)
    {
        return Err(Refused::Range);
    }
    let mut waiting = vec![link.clone()];
    while let Some(name) = waiting.pop() {
        let Ok(one) = ground.link_mut(&name) else { continue };
        one.mtu = mtu;
        let is_bond = matches!(one.kind, Kind::Bond(_));
        if mtu < 1280 {
            end_ipv6(ground, &name);
        }
        let mtu_of = |name: &IfName| ground.link(name).map_or(mtu, |one| one.mtu);
        waiting.extend(ground.vlans_on(&name).into_iter().filter(|vlan| mtu_of(vlan) > mtu));
        if is_bond {
            waiting.extend(ground.ports(&name).into_iter().filter(|port| mtu_of(port) != mtu));
        }
    }
    Ok(())
}

fn end_ipv6(ground: &mut Ground, link: &IfName) {
    if let Ok(one) = ground.link_mut(link) {
        one.addresses.retain(|address| address.ip.is_ipv4());
    }
    end_routes(ground, link, |route| route.to.ip.is_ipv6());
}

/// Those that lead by this link alone, or by others that are off too: one with a hop that is left waits for this one.
fn end_routes(ground: &mut Ground, link: &IfName, which: impl Fn(&Route) -> bool) {
    for route in ground.routes_by(link).iter().filter(|route| which(route)) {
        let leads = |by: &IfName| by != link && ground.link(by).is_some_and(|by| by.up);
        if !route.links().any(leads) {
            ground.remove_route(route);
        }
    }
}

fn set_mac(ground: &mut Ground, link: &IfName, mac: Mac) -> Result<(), Refused> {
    let one = ground.link_mut(link)?;
    one.mac = Some(mac);
    if matches!(one.kind, Kind::Bond(_)) {
        for port in ground.ports(link) {
            ground.link_mut(&port)?.mac = Some(mac);
        }
    }
    Ok(())
}

/// VLANs go with their parent; what is off has no routes and no IPv6 addresses.
fn set_up(ground: &mut Ground, link: &IfName, up: bool) -> Result<(), Refused> {
    if let Kind::Vlan { parent, .. } = &ground.link(link).ok_or(Refused::NoSuchLink)?.kind
        && up
        && ground.link(parent).is_some_and(|below| !below.up)
    {
        return Err(Refused::Down);
    }
    let mut waiting = vec![link.clone()];
    while let Some(name) = waiting.pop() {
        let Ok(one) = ground.link_mut(&name) else { continue };
        if one.up == up {
            continue;
        }
        one.up = up;
        if !up {
            one.addresses.retain(|address| address.ip.is_ipv4());
            end_routes(ground, &name, |_| true);
        }
        waiting.extend(ground.vlans_on(&name));
    }
    Ok(())
}

fn set_controller(ground: &mut Ground, link: &IfName, controller: Option<&IfName>) -> Result<(), Refused> {
    let port = ground.link(link).ok_or(Refused::NoSuchLink)?;
    let Some(controller) = controller else {
        if let Some(old) = &port.controller {
            let from_bond = ground.link(old).is_some_and(|one| matches!(one.kind, Kind::Bond(_)));
            release(ground, link, from_bond);
        }
        return Ok(());
    };
    if port.controller.as_ref() == Some(controller) {
        return Ok(());
    }
    if port.controller.is_some() {
        return Err(Refused::Busy);
    }
    if stands_on(ground, link, controller) {
        return Err(Refused::Loop);
    }
    let over = ground.link(controller).ok_or(Refused::NoSuchLink)?;
    let (over_mac, over_mtu) = (over.mac, over.mtu);
    match (&over.kind, &port.kind) {
        (_, Kind::Loopback) => return Err(Refused::NotPermitted),
        (Kind::Bridge(_), Kind::Bridge(_)) => return Err(Refused::Loop),
        (Kind::Bridge(bridge), _) => {
            if bridge.vlan_filtering {
                ground.link_mut(link)?.vlans.insert(default_vlan());
            }
        }
        (Kind::Bond(_), Kind::Bond(_)) => return Err(Refused::NotPermitted),
        (Kind::Bond(_), _) => {
            if port.up {
                return Err(Refused::NotPermitted);
            }
            if let Kind::Vlan { parent, .. } = &port.kind
                && let Some(below) = ground.link(parent)
            {
                if below.mtu < over_mtu {
                    return Err(Refused::Range);
                }
                if !below.up {
                    return Err(Refused::Down);
                }
            }
            let port_mac = port.mac;
            set_mtu(ground, link, over_mtu)?;
            set_up(ground, link, true)?;
            match over_mac {
                Some(mac) => ground.link_mut(link)?.mac = Some(mac),
                None => ground.link_mut(controller)?.mac = port_mac,
            }
        }
        _ => return Err(Refused::NotSupported),
    }
    ground.set_controller(link, Some(controller.clone()));
    Ok(())
}

/// Whether `upper` is `lower`, or stands on it as a VLAN or through ports (`__netdev_upper_dev_link`, net/core/dev.c).
fn stands_on(ground: &Ground, upper: &IfName, lower: &IfName) -> bool {
    let mut waiting = vec![upper.clone()];
    let mut seen = BTreeSet::new();
    while let Some(name) = waiting.pop() {
        if name == *lower {
            return true;
        }
        if let Some(Kind::Vlan { parent, .. }) = ground.link(&name).map(|one| &one.kind) {
            waiting.push(parent.clone());
        }

        waiting.extend(ground.ports(&name));
        waiting.retain(|one| !seen.contains(one));
        seen.insert(name);
    }
    false
}

/// A bond takes a MAC by chance when its last port leaves: none, for a view.
fn end_macless(ground: &mut Ground, controller: Option<&IfName>) {
    if let Some(bond) = controller.filter(|bond| ground.ports(bond).is_empty())
        && let Ok(bond) = ground.link_mut(bond)
        && matches!(bond.kind, Kind::Bond(_))
    {
        bond.mac = None;
    }
}

/// A bond leaves its port off.
fn release(ground: &mut Ground, port: &IfName, from_bond: bool) {
    let old = ground.link(port).and_then(|one| one.controller.clone());
    ground.set_controller(port, None);
    if let Ok(one) = ground.link_mut(port) {
        one.vlans.clear();
    }
    if from_bond {
        let _ = set_up(ground, port, false);
        end_macless(ground, old.as_ref());
    }
}

fn default_vlan() -> PortVlan {
    PortVlan { id: VlanId::new(1).expect("1 is a VLAN id"), pvid: true, untagged: true }
}

fn filter(ground: &mut Ground, bridge: &IfName, on: bool) {
    let mut all = ground.ports(bridge);
    all.push(bridge.clone());
    for name in all {
        let Ok(one) = ground.link_mut(&name) else { continue };
        one.vlans.clear();
        if on {
            one.vlans.insert(default_vlan());
        }
    }
}

fn same_id(vlans: &BTreeSet<PortVlan>, id: VlanId) -> Option<PortVlan> {
    vlans.range(PortVlan { id, pvid: false, untagged: false }..).next().filter(|one| one.id == id).copied()
}

fn add_port_vlan(ground: &mut Ground, link: &IfName, vlan: PortVlan) -> Result<(), Refused> {
    let one = ground.link(link).ok_or(Refused::NoSuchLink)?;
    let bridge = one.controller.as_ref().unwrap_or(link);
    if !matches!(ground.link(bridge).map(|one| &one.kind), Some(Kind::Bridge(_))) {
        return Err(Refused::NotSupported);
    }
    let vlans = &mut ground.link_mut(link)?.vlans;
    if let Some(old) = same_id(vlans, vlan.id) {
        vlans.remove(&old);
    }
    // A port has one such VLAN at most.
    if vlan.pvid
        && let Some(old) = vlans.iter().find(|old| old.pvid).copied()
    {
        vlans.remove(&old);
        vlans.insert(PortVlan { pvid: false, ..old });
    }
    vlans.insert(vlan);
    Ok(())
}

fn add_address(ground: &mut Ground, link: &IfName, address: Address) -> Result<(), Refused> {
    let one = ground.link_mut(link)?;
    if address.ip.is_ipv6() && one.mtu < 1280 {
        return Err(Refused::Range);
    }
    if one.addresses.insert(address) { Ok(()) } else { Err(Refused::Exists) }
}

/// The routes through gateways stay, but with the last IPv4 address IPv4 ends on the link, and its routes go
/// (`fib_inetaddr_event`, net/ipv4/fib_frontend.c).
fn delete_address(ground: &mut Ground, link: &IfName, address: Address) -> Result<(), Refused> {
    let one = ground.link_mut(link)?;
    if !one.addresses.remove(&address) {
        return Err(Refused::NoSuchAddress);
    }
    if address.ip.is_ipv4() && !one.addresses.iter().any(|other| other.ip.is_ipv4()) {
        end_routes(ground, link, |route| route.to.ip.is_ipv4());
    }
    if address.ip.is_ipv4() && ground.view().holder(address.ip).is_none() {
        // Whose packets would have it (`fib_sync_down_addr`, net/ipv4/fib_semantics.c); in other tables they stay.
        let of_it = |route: &&Route| route.source == Some(address.ip) && route.table == MAIN_TABLE;
        let gone: Vec<Route> = ground.view().routes.iter().filter(of_it).cloned().collect();
        for route in gone {
            ground.remove_route(&route);
        }
    }
    if address.ip.is_ipv6() && ground.view().holder(address.ip).is_none() {
        // IPv6 keeps them, without the source (`fib6_remove_prefsrc`, net/ipv6/route.c).
        let of_it = |route: &&Route| route.source == Some(address.ip);
        let changed: Vec<Route> = ground.view().routes.iter().filter(of_it).cloned().collect();
        for route in changed {
            ground.remove_route(&route);
            ground.insert_route(Route { source: None, ..route });
        }
    }
    Ok(())
}

fn add_route(ground: &mut Ground, route: &Route) -> Result<(), Refused> {
    let mut route = route.normal();
    if let Some(via) = route.via
        && !Route::is_on_link(route.via, route.link.as_ref(), route.onlink)
    {
        route.link =
            Some(gateways_link(ground.view(), via, route.link.as_ref()).ok_or(Refused::Unreachable)?);
    }
    for (via, link, onlink) in route.ways() {
        let link = link.ok_or(Refused::NoSuchLink)?;
        if !ground.link(link).ok_or(Refused::NoSuchLink)?.up {
            return Err(Refused::Down);
        }
        if let Some(via) = via
            && !Route::is_on_link(Some(via), Some(link), onlink)
            && gateways_link(ground.view(), via, Some(link)).is_none()
        {
            return Err(Refused::Unreachable);
        }
    }
    if route.source.is_some_and(|source| ground.view().holder(source).is_none()) {
        return Err(Refused::NoSuchAddress);
    }
    if ground.view().routes_to(route.to).any(|one| one.is_rival(&route)) {
        return Err(Refused::Exists);
    }
    ground.insert_route(route);
    Ok(())
}

/// The link on whose network the gateway is: by an address of the link, or by a route without a gateway.
fn gateways_link(view: &NetworkView, via: IpAddr, link: Option<&IfName>) -> Option<IfName> {
    let on_it = |one: &LinkView| {
        one.up && one.addresses.iter().any(|address| address.ip != via && address.contains(via))
    };
    let by_address = match link {
        Some(link) => view.links.get(link).filter(|one| on_it(one)).map(|_| link.clone()),
        None => view.links.iter().find(|(_, one)| on_it(one)).map(|(name, _)| name.clone()),
    };
    let by_route = || {
        let is_way = |one: &&Route| {
            one.via.is_none()
                && one.table == MAIN_TABLE
                && one.to.contains(via)
                && one.link.is_some()
                && (link.is_none() || one.link.as_ref() == link)
        };
        view.routes.iter().find(is_way).and_then(|one| one.link.clone())
    };
    by_address.or_else(by_route)
}
