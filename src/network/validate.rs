//! What speaks against a declaration, before anything is touched.

use super::aim::{aim, is_same_make};
use super::order::{from_below, on_themselves};
use super::problem::{Problem, Problems};
use super::{Desired, DesiredLink, Role, ways};
use crate::model::IfName;
use crate::model::network::{
    Address, Bond, BondMode, Bridge, Kind, LacpRate, NetworkView, Owner, VlanId, XmitHash,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Links that stand on each other: the kernel's MAX_NEST_DEV.
const MAX_DEPTH: usize = 8;

pub fn validate(
    desired: &Desired,
    before: &Desired,
    now: &NetworkView,
    owners: &BTreeMap<IfName, Owner>,
) -> Vec<Problem> {
    let mut check =
        Check { aim: aim(now, before, desired), desired, before, now, owners, problems: Problems::default() };
    for (name, link) in &desired.links {
        check.link(name, link);
    }
    check.ports();
    check.vlans();
    check.removed();
    check.loops();
    check.addresses();
    check.networks();
    check.virtual_ips();
    ways::check(desired, before, &check.aim, &mut check.problems);
    check.problems.into_vec()
}

struct Check<'a> {
    aim: NetworkView,
    desired: &'a Desired,
    before: &'a Desired,
    now: &'a NetworkView,
    owners: &'a BTreeMap<IfName, Owner>,
    problems: Problems,
}

impl Check<'_> {
    fn add(&mut self, name: &IfName, member: &str, text: impl Into<String>) {
        let member = if member.is_empty() { String::new() } else { format!(".{member}") };
        self.problems.add(format!("links.{name}{member}"), text);
    }

    fn link(&mut self, name: &IfName, link: &DesiredLink) {
        if let Some(owner) = self.owners.get(name)
            && !self.is_old(name)
        {
            self.add(name, "", format!("is configured by {owner}; take it from that service first"));
        }
        self.kind(name, link);
        match &link.kind {
            Kind::Bond(bond) => self.bond(name, link, bond),
            Kind::Bridge(bridge) => self.bridge(name, *bridge),
            Kind::Vlan { parent, .. } => self.vlan(name, link, parent),
            _ => {}
        }
        if !link.kind.has_ports() && !link.ports.is_empty() {
            self.add(name, "ports", "only bonds and bridges have ports");
        }
        if link.dhcp && link.addresses.as_ref().is_some_and(|addresses| !addresses.is_empty()) {
            self.add(name, "dhcp", "excludes addresses");
        }
        self.place(name, link);
        self.mtu(name);
        self.port_vlans(name, link);
    }

    /// Declared before, and now in the same way: that its link is gone or taken meanwhile keeps nobody from other changes.
    fn is_old(&self, name: &IfName) -> bool {
        let before = self.before.links.get(name);
        before.is_some() && before == self.desired.links.get(name)
    }

    fn kind(&mut self, name: &IfName, link: &DesiredLink) {
        let found = self.now.links.get(name).map(|found| &found.kind);
        if matches!(found, Some(Kind::Vif | Kind::Loopback)) {
            let what = found.map(Kind::word).unwrap_or_default();
            self.add(name, "", format!("is a {what}, and cannot be declared"));
            return;
        }
        match (&link.kind, found) {
            (Kind::Ethernet, None) if self.is_old(name) => {}
            (Kind::Ethernet, None) => self.add(name, "", "there is no such link, and it cannot be made"),
            (Kind::Ethernet, Some(_)) => {}
            (Kind::Bond(_) | Kind::Bridge(_) | Kind::Vlan { .. } | Kind::Dummy, None) => {}
            (kind @ (Kind::Bond(_) | Kind::Bridge(_) | Kind::Vlan { .. } | Kind::Dummy), Some(found)) => {
                let was = self.before.links.get(name).map(|before| &before.kind);
                let is_ours = was.is_some_and(|was| was.is_made() && was.word() == found.word());
                let can_be = is_same_make(kind, found) || (is_ours && found.is_made());
                if !can_be {
                    let on = match found {
                        Kind::Vlan { parent, id } => format!(" {id} on {parent}"),
                        _ => String::new(),
                    };
                    let text =
                        format!("there is a {found}{on} of this name already, which was never declared");
                    self.add(name, "kind", text);
                }
            }
            (kind, _) => {
                let text = format!("{kind} cannot be declared; allowed: ethernet, bond, vlan, bridge, dummy");
                self.add(name, "kind", text);
            }
        }
    }

    fn bond(&mut self, name: &IfName, link: &DesiredLink, bond: &Bond) {
        if let BondMode::Other(_) = bond.mode {
            self.add(name, "mode", "is not one; allowed: active-backup, 802.3ad, balance-alb");
        }
        if let Some(primary) = &bond.primary {
            if !link.ports.contains(primary) {
                self.add(name, "primary", format!("{primary} is no port of this bond"));
            }
            if bond.mode == BondMode::Lacp {
                self.add(name, "primary", "goes only with active-backup and balance-alb");
            }
        }
        if bond.mode != BondMode::Lacp {
            if bond.lacp_rate != LacpRate::default() {
                self.add(name, "lacp_rate", "goes only with 802.3ad");
            }
            if bond.xmit_hash != XmitHash::default() {
                self.add(name, "xmit_hash", "goes only with 802.3ad");
            }
        }
        // The kernel would take 100 ms by itself (bond_option_mode_set).
        if bond.miimon_ms == 0 && bond.mode != BondMode::ActiveBackup {
            self.add(name, "miimon_ms", format!("0 does not go with {}; 100 is usual", bond.mode));
        }
        for (member, delay) in [("up_delay_ms", bond.up_delay_ms), ("down_delay_ms", bond.down_delay_ms)] {
            if delay != 0 && (bond.miimon_ms == 0 || !delay.is_multiple_of(bond.miimon_ms)) {
                self.add(name, member, "has to be a multiple of miimon_ms");
            }
        }
    }

    fn bridge(&mut self, name: &IfName, bridge: Bridge) {
        let delay = bridge.forward_delay_ms;
        // BR_MIN_FORWARD_DELAY, BR_MAX_FORWARD_DELAY.
        if bridge.stp && !(2000..=30_000).contains(&delay) {
            self.add(
                name,
                "forward_delay_ms",
                format!("{delay} does not go with STP; allowed: 2000 to 30000"),
            );
        }
        if !delay.is_multiple_of(10) {
            self.add(name, "forward_delay_ms", "the kernel counts hundredths of a second: a multiple of 10");
        }
    }

    fn vlan(&mut self, name: &IfName, link: &DesiredLink, parent: &IfName) {
        let Some(below) = self.aim.links.get(parent) else {
            if self.is_old(name) {
                return;
            }
            self.add(name, "parent", format!("there will be no link {parent}"));
            return;
        };
        if matches!(below.kind, Kind::Loopback | Kind::Vif) {
            let text = format!("{parent} is a {}, which carries no VLANs", below.kind);
            self.add(name, "parent", text);
        } else if link.up && !below.up {
            self.add(name, "up", format!("cannot be on while {parent} is off"));
        }
    }

    /// What a port must not have, since its controller has it.
    fn place(&mut self, name: &IfName, link: &DesiredLink) {
        let Some(then) = self.aim.links.get(name) else { return };
        let Some(controller) = then.controller.clone() else { return };
        let over = self.aim.links.get(&controller);
        let bonds_mtu = over.filter(|over| matches!(over.kind, Kind::Bond(_))).map(|over| over.mtu);
        if !then.addresses.is_empty() {
            self.add(name, "addresses", format!("it is a port of {controller}, which has the addresses"));
        }
        if link.dhcp {
            self.add(name, "dhcp", format!("it is a port of {controller}, which has the addresses"));
        }
        if let Some(bonds) = bonds_mtu {
            if link.mtu.is_some_and(|mtu| mtu.get() != bonds) {
                self.add(name, "mtu", format!("it is a port of bond {controller}, whose MTU is {bonds}"));
            }
            if link.mac.is_some() {
                self.add(name, "mac", format!("it is a port of bond {controller}, and has the bond's"));
            }
            if !link.up {
                self.add(name, "up", format!("bond {controller} switches its ports on"));
            }
        }
    }

    fn mtu(&mut self, name: &IfName) {
        let Some(then) = self.aim.links.get(name) else { return };
        let mtu = then.mtu;
        let has_ipv6 = then.addresses.iter().any(|address| address.ip.is_ipv6());
        let parents = match &then.kind {
            Kind::Vlan { parent, .. } => self.aim.links.get(parent).map(|below| (parent.clone(), below.mtu)),
            _ => None,
        };
        if mtu < 1280 && has_ipv6 {
            self.add(name, "mtu", format!("{mtu} is too small for its IPv6 addresses; allowed: from 1280"));
        }
        if let Some((parent, most)) = parents.filter(|(_, most)| mtu > *most) {
            self.add(name, "mtu", format!("{mtu} is more than the {most} of {parent}, on which it stands"));
        }
    }

    fn port_vlans(&mut self, name: &IfName, link: &DesiredLink) {
        let (Some(vlans), Some(then)) = (&link.vlans, self.aim.links.get(name)) else { return };
        let bridge = then.controller.as_ref().unwrap_or(name);
        let over = self.aim.links.get(bridge).map(|over| &over.kind);
        if !matches!(over, Some(Kind::Bridge(bridge)) if bridge.vlan_filtering) {
            self.add(name, "vlans", "goes only with a bridge with vlan_filtering, and its ports");
        }
        if vlans.iter().filter(|vlan| vlan.pvid).count() > 1 {
            self.add(name, "vlans", "more than one has pvid");
        }
        let ids: BTreeSet<VlanId> = vlans.iter().map(|vlan| vlan.id).collect();
        if ids.len() < vlans.len() {
            self.add(name, "vlans", "one is there twice");
        }
    }

    fn ports(&mut self) {
        let mut taken: BTreeMap<&IfName, &IfName> = BTreeMap::new();
        for (controller, link) in self.desired.links.iter().filter(|(_, link)| link.kind.has_ports()) {
            for port in &link.ports {
                if let Some(other) = taken.insert(port, controller) {
                    self.add(controller, &format!("ports.{port}"), format!("is a port of {other} already"));
                }
                if let Some(wrong) = self.wrong_port(controller, &link.kind, port) {
                    self.add(controller, &format!("ports.{port}"), wrong);
                }
            }
        }
    }

    fn wrong_port(&self, controller: &IfName, kind: &Kind, port: &IfName) -> Option<String> {
        let was_port = self.before.links.get(controller).is_some_and(|before| before.ports.contains(port));
        let Some(then) = self.aim.links.get(port) else {
            return (!was_port).then(|| "there is no such link".to_owned());
        };
        if let Some(owner) = self.owners.get(port)
            && !was_port
        {
            return Some(format!("is configured by {owner}; take it from that service first"));
        }
        match (kind, &then.kind) {
            (_, Kind::Loopback) => return Some("is the loopback".to_owned()),
            (_, Kind::Vif) => return Some("is a guest's card, which the toolstack places".to_owned()),
            (Kind::Bond(_), Kind::Bond(_)) => return Some("a bond cannot be a port of a bond".to_owned()),
            (Kind::Bridge(_), Kind::Bridge(_)) => {
                return Some("a bridge cannot be a port of a bridge".to_owned());
            }
            _ => {}
        }
        // From a controller that nobody declared it is not ours to take.
        let held = self.now.links.get(port)?.controller.as_ref()?;
        let is_known = |all: &Desired| all.links.contains_key(held);
        let is_free = held == controller || is_known(self.desired) || is_known(self.before);
        (!is_free).then(|| format!("is a port of {held}, which was never declared"))
    }

    /// One VLAN of an id on a parent, whoever made it.
    fn vlans(&mut self) {
        let mut taken: BTreeMap<(&IfName, VlanId), &IfName> = BTreeMap::new();
        let mut twice: Vec<(IfName, String)> = Vec::new();
        for (name, link) in &self.aim.links {
            let Kind::Vlan { parent, id } = &link.kind else { continue };
            if let Some(other) = taken.insert((parent, *id), name) {
                let ours = if self.desired.links.contains_key(name) { name } else { other };
                let other = if ours == name { other } else { name };
                twice.push((ours.clone(), format!("{id} is that of {other}, on the same {parent}")));
            }
        }
        for (name, text) in twice {
            self.add(&name, "id", text);
        }
    }

    /// A VLAN that nobody declared keeps what it stands on.
    fn removed(&mut self) {
        for (name, link) in &self.now.links {
            let Kind::Vlan { parent, .. } = &link.kind else { continue };
            let known = self.desired.links.contains_key(name) || self.before.links.contains_key(name);
            if !known && self.now.links.contains_key(parent) && !self.aim.links.contains_key(parent) {
                self.add(
                    parent,
                    "",
                    format!("cannot be removed: VLAN {name}, which was never declared, stands on it"),
                );
            }
        }
    }

    fn loops(&mut self) {
        let rings: Vec<IfName> = on_themselves(&self.aim).into_iter().cloned().collect();
        for name in rings.iter().filter(|name| self.desired.links.contains_key(*name)) {
            self.add(name, "", "would stand on itself");
        }
        for name in too_deep(&self.aim) {
            if self.desired.links.contains_key(&name) {
                self.add(&name, "", format!("more than {MAX_DEPTH} links would stand on each other"));
            }
        }
    }

    fn addresses(&mut self) {
        let mut holders: BTreeMap<IpAddr, Vec<&IfName>> = BTreeMap::new();
        for (name, link) in &self.aim.links {
            for address in &link.addresses {
                holders.entry(address.ip).or_default().push(name);
            }
        }
        for (name, link) in &self.desired.links {
            for address in link.addresses.iter().flatten() {
                let field = format!("links.{name}.addresses.{}", address.ip);
                if let Some(wrong) = wrong_address(*address) {
                    self.problems.add(field, wrong);
                } else if let Some(others) = holders.get(&address.ip).filter(|all| all.len() > 1) {
                    let other = others.iter().find(|other| **other != name);
                    let other = other.map_or_else(|| "twice".to_owned(), |other| format!("by {other} too"));
                    self.problems.add(field, format!("would be held {other}"));
                }
            }
        }
        for ip in self.desired.virtual_ips.keys() {
            if holders.get(ip).is_some_and(|all| all.len() > 1) {
                self.problems.add(format!("virtual_ips.{ip}"), "would be held twice");
            }
        }
    }

    fn networks(&mut self) {
        let mut managing: Option<&str> = None;
        for (label, network) in &self.desired.networks {
            let field = format!("networks.{}", label.as_str());
            if !self.aim.links.contains_key(&network.link) && self.before.networks.get(label) != Some(network)
            {
                self.problems.add(format!("{field}.link"), format!("there will be no link {}", network.link));
            }
            if network.roles.contains(&Role::Management) {
                if let Some(other) = managing {
                    let text = format!("MANAGEMENT is the role of {other} already");
                    self.problems.add(format!("{field}.roles"), text);
                }
                managing = Some(label.as_str());
            }
        }
    }

    fn virtual_ips(&mut self) {
        for (ip, virtual_ip) in &self.desired.virtual_ips {
            let field = format!("virtual_ips.{ip}");
            let most = if ip.is_ipv4() { 32 } else { 128 };
            if virtual_ip.prefix == 0 || virtual_ip.prefix > most {
                let text = format!("{} is not one; allowed: 1 to {most}", virtual_ip.prefix);
                self.problems.add(format!("{field}.prefix"), text);
            } else if let Some(wrong) = wrong_address(Address { ip: *ip, prefix: virtual_ip.prefix }) {
                self.problems.add(field.clone(), wrong);
            }
            let link = &virtual_ip.link;
            let is_old = self.before.virtual_ips.get(ip) == Some(virtual_ip);
            if let Some(owner) = self.owners.get(link)
                && !is_old
            {
                self.problems.add(format!("{field}.link"), format!("{link} is configured by {owner}"));
            }
            let text = match self.aim.links.get(link) {
                None if is_old => continue,
                None => format!("there will be no link {link}"),
                Some(then) if matches!(then.kind, Kind::Vif | Kind::Loopback) => {
                    format!("{link} is a {}", then.kind)
                }
                Some(then) if then.controller.is_some() => {
                    format!("{link} is a port, which has no addresses")
                }
                Some(then) if ip.is_ipv6() && then.mtu < 1280 => {
                    format!("the MTU of {link}, {}, is too small for IPv6", then.mtu)
                }
                Some(_) => continue,
            };
            self.problems.add(format!("{field}.link"), text);
        }
    }
}

fn too_deep(view: &NetworkView) -> Vec<IfName> {
    let mut depths: BTreeMap<&IfName, usize> = BTreeMap::new();
    let mut deep = Vec::new();
    for name in from_below(view) {
        let Some(link) = view.links.get(name) else { continue };
        let over_parent = match &link.kind {
            Kind::Vlan { parent, .. } => depths.get(parent).map_or(1, |below| below + 1),
            _ => 1,
        };
        let depth = depths.get(name).copied().unwrap_or(1).max(over_parent);
        depths.insert(name, depth);
        if depth > MAX_DEPTH {
            deep.push(name.clone());
        }
        if let Some(over) = &link.controller {
            let known = depths.entry(over).or_insert(1);
            *known = (*known).max(depth + 1);
        }
    }
    deep
}

/// Why no link can have this address.
fn wrong_address(address: Address) -> Option<&'static str> {
    let Address { ip, prefix } = address;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    if ip.is_unspecified() {
        return Some("is the unspecified address");
    }
    if ip.is_loopback() {
        return Some("is a loopback address");
    }
    if ip.is_multicast() {
        return Some("is a multicast address");
    }
    if prefix == 0 || prefix > most {
        return Some("has no network: the prefix is 0 or too long");
    }
    let is_network = prefix < most - 1 && address.network().ip == ip;
    match ip {
        IpAddr::V4(ip) if ip.octets()[0] == 0 || ip.octets()[0] >= 240 => Some("is a reserved address"),
        _ if is_network => Some("is the address of its network itself"),
        IpAddr::V4(ip) => {
            let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
            let is_broadcast = prefix < 31 && u32::from(ip) & host == host;
            is_broadcast.then_some("is the broadcast address of its network")
        }
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            Some("is link-local: the kernel makes these by itself")
        }
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Some("is an IPv4 address in the form of IPv6"),
        IpAddr::V6(_) => None,
    }
}
