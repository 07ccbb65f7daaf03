//! What the kernel has when a declaration is carried out on what it has now.
//!
//! What was declared before and is not any more goes: links that are made are removed, others are released (from our
//! controllers, and of our addresses) and stay on. What is declared is as declared; where nothing is said, it stays as it is,
//! and a new link gets what the kernel would give it. A port loses its addresses, its DHCP and its routes: they are the
//! controller's business. The aim has no MAC where none is declared: none is asked for.

use super::order::{Reach, from_below};
use super::{Desired, DesiredLink};
use crate::model::IfName;
use crate::model::network::{Address, Kind, LinkView, NetworkView, PortVlan, Route, VlanId};
use std::collections::{BTreeMap, BTreeSet};

pub fn aim(now: &NetworkView, before: &Desired, desired: &Desired) -> NetworkView {
    let mut aim = Aim {
        view: now.clone(),
        now,
        before,
        desired,
        controllers: controllers(desired),
        made: BTreeSet::new(),
        dhcp_ended: BTreeSet::new(),
    };
    aim.remove();
    aim.release();
    aim.end_virtual_ips();
    aim.declare();
    aim.release_ports();
    aim.enter_ports();
    aim.switch_off();
    aim.set_mtus();
    aim.set_port_vlans();
    aim.set_routes();
    aim.view
}

/// Whether a link of the one kind becomes one of the other without being removed and made.
pub fn is_same_make(one: &Kind, other: &Kind) -> bool {
    match (one, other) {
        (Kind::Bond(_), Kind::Bond(_)) | (Kind::Bridge(_), Kind::Bridge(_)) => true,
        _ => one == other,
    }
}

/// The controller of each declared port.
pub fn controllers(desired: &Desired) -> BTreeMap<&IfName, &IfName> {
    let ports = |(name, link)| -> Vec<(&IfName, &IfName)> {
        let (name, link): (&IfName, &DesiredLink) = (name, link);
        if link.kind.has_ports() { link.ports.iter().map(|port| (port, name)).collect() } else { Vec::new() }
    };
    desired.links.iter().flat_map(ports).collect()
}

pub fn vlans_by_parent(view: &NetworkView) -> BTreeMap<&IfName, Vec<&IfName>> {
    let mut vlans: BTreeMap<&IfName, Vec<&IfName>> = BTreeMap::new();
    for (name, link) in &view.links {
        if let Kind::Vlan { parent, .. } = &link.kind {
            vlans.entry(parent).or_default().push(name);
        }
    }
    vlans
}

struct Aim<'a> {
    view: NetworkView,
    now: &'a NetworkView,
    before: &'a Desired,
    desired: &'a Desired,
    controllers: BTreeMap<&'a IfName, &'a IfName>,
    /// Links that are not there yet, or not of this make.
    made: BTreeSet<&'a IfName>,
    dhcp_ended: BTreeSet<IfName>,
}

impl Aim<'_> {
    fn remove(&mut self) {
        let is_ours = |name: &IfName, link: &DesiredLink| {
            link.kind.is_made()
                && !self.desired.links.contains_key(name)
                && self.now.links.get(name).is_some_and(|found| found.kind.word() == link.kind.word())
        };
        let ours = self.before.links.iter().filter(|(name, link)| is_ours(name, link));
        let mut going: Vec<&IfName> = ours.map(|(name, _)| name).collect();
        let vlans = vlans_by_parent(self.now);
        while let Some(name) = going.pop() {
            if self.view.links.remove(name).is_some() {
                let above = vlans.get(name).into_iter().flatten();
                going.extend(above.filter(|name| !self.desired.links.contains_key(**name)));
            }
        }
    }

    fn release(&mut self) {
        for (name, link) in &self.before.links {
            if self.desired.links.contains_key(name) {
                continue;
            }
            let Some(left) = self.view.links.get_mut(name) else { continue };
            if link.dhcp && left.dhcp {
                left.dhcp = false;
                left.addresses.clear();
                self.dhcp_ended.insert(name.clone());
            }
            for address in link.addresses.iter().flatten() {
                left.addresses.remove(address);
            }
        }
    }

    fn end_virtual_ips(&mut self) {
        for (ip, virtual_ip) in &self.before.virtual_ips {
            if let Some(link) = self.view.links.get_mut(&virtual_ip.link) {
                link.addresses.remove(&Address { ip: *ip, prefix: virtual_ip.prefix });
            }
        }
    }

    fn release_ports(&mut self) {
        let before = controllers(self.before);
        let has_ports =
            |name: &IfName, link: &LinkView| !self.desired.links.contains_key(name) || link.kind.has_ports();
        let still = self.view.links.iter().filter(|(name, link)| has_ports(name, link));
        let still: BTreeSet<IfName> = still.map(|(name, _)| name.clone()).collect();
        let bridges = self.view.links.iter().filter(|(_, link)| matches!(link.kind, Kind::Bridge(_)));
        let bridges: BTreeSet<IfName> = bridges.map(|(name, _)| name.clone()).collect();
        let known = |name: &IfName| {
            self.before.links.contains_key(name)
                || self.desired.links.contains_key(name)
                || before.contains_key(name)
        };
        for (name, link) in &mut self.view.links {
            let Some(controller) = &link.controller else { continue };
            let is_exact = self.desired.links.get(controller).is_some_and(|over| over.kind.has_ports());
            let is_ours =
                before.get(name) == Some(&controller) || (is_exact && link.kind != Kind::Vif && known(name));
            // One that becomes something else keeps only guests' cards, and only as a bridge.
            let is_left =
                self.made.contains(controller) && (link.kind != Kind::Vif || !bridges.contains(controller));
            if !still.contains(controller) || ((is_left || is_ours) && !self.controllers.contains_key(name)) {
                link.controller = None;
                link.vlans.clear();
            }
        }
    }

    fn declare(&mut self) {
        for (name, asked) in &self.desired.links {
            let found = self.view.links.get(name);
            let mut link = match (found, &asked.kind) {
                (Some(found), Kind::Ethernet) => found.clone(),
                (None, Kind::Ethernet) => continue,
                (Some(found), kind) if is_same_make(&found.kind, kind) => {
                    LinkView { kind: kind.clone(), ..found.clone() }
                }
                (found, kind) => {
                    self.made.insert(name);
                    let mut made = LinkView::new(kind.clone());
                    if let Some(found) = found {
                        made.addresses.clone_from(&found.addresses);
                        made.controller.clone_from(&found.controller);
                        made.dhcp = found.dhcp;
                    }
                    made
                }
            };
            if let Kind::Bond(bond) = &mut link.kind {
                // One that is not there, or goes with this declaration, is made the primary when it comes.
                let is_there = |port: &IfName| {
                    self.view.links.contains_key(port)
                        || self.desired.links.get(port).is_some_and(|link| link.kind.is_made())
                };
                bond.primary = bond.primary.take().filter(is_there);
            }
            link.up = asked.up;
            if link.dhcp && !asked.dhcp {
                link.addresses.clear();
                self.dhcp_ended.insert(name.clone());
            }
            link.dhcp = asked.dhcp;
            if let Some(addresses) = &asked.addresses
                && !asked.dhcp
            {
                link.addresses.clone_from(addresses);
            }
            self.view.links.insert(name.clone(), link);
        }
        for (name, link) in &mut self.view.links {
            link.mac = self.desired.links.get(name).and_then(|asked| asked.mac);
        }
    }

    fn enter_ports(&mut self) {
        for (port, controller) in &self.controllers {
            let is_there = self.view.links.contains_key(*controller);
            let Some(link) = self.view.links.get_mut(*port).filter(|_| is_there) else { continue };
            link.controller = Some((*controller).clone());
            let asked = self.desired.links.get(*port);
            // Declared ones are as declared, and then refused.
            if asked.is_none_or(|asked| asked.addresses.is_none()) {
                link.addresses.clear();
            }
            if let Some(asked) = asked {
                link.up = asked.up;
            } else {
                link.up = true;
                link.dhcp = false;
            }
        }
        for (ip, virtual_ip) in &self.desired.virtual_ips {
            if let Some(link) = self.view.links.get_mut(&virtual_ip.link) {
                link.addresses.insert(Address { ip: *ip, prefix: virtual_ip.prefix });
            }
        }
    }

    /// VLANs go off with their parent, and what goes off loses the IPv6 addresses that nobody declared.
    fn switch_off(&mut self) {
        let order: Vec<IfName> = from_below(&self.view).into_iter().cloned().collect();
        for name in order {
            let is_declared = self.desired.links.contains_key(&name);
            let Some(link) = self.view.links.get(&name) else { continue };
            let is_below_off = match &link.kind {
                Kind::Vlan { parent, .. } => self.view.links.get(parent).is_some_and(|below| !below.up),
                _ => false,
            };
            let Some(link) = self.view.links.get_mut(&name) else { continue };
            link.up &= is_declared || !is_below_off;
            if !link.up && self.now.links.get(&name).is_some_and(|link| link.up) {
                self.keep_ipv4(&name);
            }
        }
    }

    fn keep_ipv4(&mut self, name: &IfName) {
        let declared = self.desired.links.get(name).and_then(|asked| asked.addresses.clone());
        let is_virtual = |address: &Address| {
            self.desired.virtual_ips.get(&address.ip).is_some_and(|virtual_ip| virtual_ip.link == *name)
        };
        let is_declared = |address: &Address| declared.as_ref().is_some_and(|all| all.contains(address));
        if let Some(link) = self.view.links.get_mut(name) {
            link.addresses.retain(|one| one.ip.is_ipv4() || is_declared(one) || is_virtual(one));
        }
    }

    /// A bond's ports have the bond's, a VLAN at most its parent's, a new bridge the least of its ports'.
    fn set_mtus(&mut self) {
        for (name, asked) in &self.desired.links {
            if let (Some(link), Some(mtu)) = (self.view.links.get_mut(name), asked.mtu) {
                link.mtu = mtu.get();
            }
        }
        let order: Vec<IfName> = from_below(&self.view).into_iter().cloned().collect();
        let mut least: BTreeMap<IfName, u32> = BTreeMap::new();
        for name in order {
            let Some(link) = self.view.links.get(&name) else { continue };
            let asked = self.desired.links.get(&name);
            let is_asked = asked.is_some_and(|asked| asked.mtu.is_some());
            let over = link.controller.as_ref().and_then(|over| self.view.links.get_key_value(over));
            let bonds = match over {
                Some((over, view))
                    if matches!(view.kind, Kind::Bond(_)) && self.desired.links.contains_key(over) =>
                {
                    Some(view.mtu)
                }
                _ => None,
            };
            let parents = match &link.kind {
                Kind::Vlan { parent, .. } => self.view.links.get(parent).map(|below| below.mtu),
                _ => None,
            };
            let mtu = match (bonds, parents, &link.kind) {
                _ if is_asked => link.mtu,
                (Some(mtu), _, _) => mtu,
                (None, Some(mtu), _) if self.made.contains(&name) => mtu,
                (None, Some(mtu), _) => mtu.min(link.mtu),
                (None, None, Kind::Bridge(_)) if self.made.contains(&name) => {
                    least.get(&name).copied().unwrap_or(link.mtu)
                }
                _ => link.mtu,
            };
            if let Some((over, _)) = over {
                let least = least.entry(over.clone()).or_insert(mtu);
                *least = mtu.min(*least);
            }
            if let Some(link) = self.view.links.get_mut(&name) {
                link.mtu = mtu;
            }
            if mtu < 1280 {
                self.keep_ipv4(&name);
            }
        }
    }

    fn set_port_vlans(&mut self) {
        let filters = |view: &NetworkView, name: &IfName| -> Option<IfName> {
            let link = view.links.get(name)?;
            let bridge = link.controller.as_ref().unwrap_or(name);
            let is_filtering =
                matches!(&view.links.get(bridge)?.kind, Kind::Bridge(bridge) if bridge.vlan_filtering);
            is_filtering.then(|| bridge.clone())
        };
        let mut vlans: Vec<(IfName, BTreeSet<PortVlan>)> = Vec::new();
        for (name, link) in &self.view.links {
            let Some(bridge) = filters(&self.view, name) else {
                vlans.push((name.clone(), BTreeSet::new()));
                continue;
            };
            let is_kept = filters(self.now, name).as_ref() == Some(&bridge)
                && !self.made.contains(name)
                && !self.made.contains(&bridge);
            let asked = self.desired.links.get(name).and_then(|asked| asked.vlans.clone());
            let kept = if is_kept { link.vlans.clone() } else { BTreeSet::from([default_vlan()]) };
            vlans.push((name.clone(), asked.unwrap_or(kept)));
        }
        for (name, vlans) in vlans {
            if let Some(link) = self.view.links.get_mut(&name) {
                link.vlans = vlans;
            }
        }
    }

    fn set_routes(&mut self) {
        for route in &self.before.routes {
            let like = route.normal();
            let is_it = |one: &&Route| {
                one.is_rival(&like)
                    && one.via == like.via
                    && one.hops == like.hops
                    && (like.link.is_none() || one.link == like.link)
            };
            let gone: Vec<Route> = self.view.routes_to(like.to).filter(is_it).cloned().collect();
            for route in gone {
                self.view.routes.remove(&route);
            }
        }
        let kept = std::mem::take(&mut self.view.routes);
        let kept: Vec<Route> = kept.into_iter().filter(|route| self.is_kept(route)).collect();
        let kept = kept.into_iter().map(|route| {
            // The kernel refuses one that nobody holds.
            let is_held = route.source.is_none_or(|source| self.view.holder(source).is_some());
            Route { source: route.source.filter(|_| is_held), ..route }
        });
        let (with_gateway, without): (Vec<Route>, Vec<Route>) = kept.partition(|route| route.has_gateway());
        self.view.routes = without.into_iter().collect();
        let (asked_with, asked_without): (Vec<Route>, Vec<Route>) =
            self.desired.routes.iter().map(Route::normal).partition(|route| route.has_gateway());
        for route in asked_without {
            self.put(route);
        }
        let reach = Reach::of(&self.view);
        for route in with_gateway {
            if reach.leads(&route) || !route.links().any(|link| self.is_touched(link)) {
                self.view.routes.insert(route);
            }
        }
        for mut route in asked_with {
            if route.link.is_none() {
                route.link = route.via.and_then(|via| reach.link_to(via, None)).cloned();
            }
            // One that leads nowhere now waits for its port: whoever asks for a new one is refused before (`ways`).
            if reach.leads(&route) && route.links().all(|link| self.view.links.contains_key(link)) {
                self.put(route);
            }
        }
    }

    /// One that does what is asked for stays as it is, whoever made it.
    fn put(&mut self, asked: Route) {
        let is_it = |one: &&Route| one.does(&asked) && one.onlink == asked.onlink;
        let route = self.now.routes_to(asked.to).find(is_it).cloned().unwrap_or(asked);
        let same: Vec<Route> =
            self.view.routes_to(route.to).filter(|one| one.is_rival(&route)).cloned().collect();
        for route in same {
            self.view.routes.remove(&route);
        }
        self.view.routes.insert(route);
    }

    fn is_touched(&self, name: &IfName) -> bool {
        match (self.now.links.get(name), self.view.links.get(name)) {
            (Some(now), Some(then)) => now.up != then.up || now.addresses != then.addresses,
            _ => true,
        }
    }

    /// Whether the link of a route that nobody speaks of keeps it.
    fn is_kept(&self, route: &Route) -> bool {
        route.links().all(|link| self.keeps(link, route))
    }

    fn keeps(&self, name: &IfName, route: &Route) -> bool {
        let Some(then) = self.view.links.get(name) else { return false };
        let has = |link: &LinkView| link.addresses.iter().any(|one| one.ip.is_ipv4());
        let lost_ipv4 = self.now.links.get(name).is_some_and(|now| has(now) && !has(then));
        let loses_family = if route.to.ip.is_ipv4() { lost_ipv4 } else { then.mtu < 1280 };
        let is_others =
            self.made.contains(name) || self.controllers.contains_key(name) || self.dhcp_ended.contains(name);
        then.up && !is_others && !loses_family
    }
}

fn default_vlan() -> PortVlan {
    PortVlan { id: VlanId::new(1).expect("1 is a VLAN id"), pvid: true, untagged: true }
}
