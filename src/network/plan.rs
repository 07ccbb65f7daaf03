//! The changes that lead from what the kernel has to what it is to have.
//!
//! First what is in the way goes, from above to below: routes, DHCP, addresses, ports, links. Then what is to be comes, from
//! below to above, and last addresses and routes. The planner performs each change on a copy of what the kernel has, as
//! [`crate::model::network::perform`] says: so it sees what a change takes with it (the IPv6 addresses and routes of a
//! link that goes off, the VLANs of one that is removed), also beside the scope, and puts that back.

use super::aim::{is_same_make, vlans_by_parent};
use super::order::from_below;
use super::scope::{Scope, is_port_of_bond, target};
use crate::model::IfName;
use crate::model::network::{Bond, Change, Ground, Kind, LinkView, NetworkView, PortVlan, Route};
use std::collections::{BTreeMap, BTreeSet};

pub fn plan(now: &NetworkView, then: &NetworkView, scope: &Scope) -> Vec<Change> {
    let target = target(now, then, scope);
    if target == *now {
        return Vec::new();
    }
    let down: Vec<IfName> = from_below(now).into_iter().rev().cloned().collect();
    let up: Vec<IfName> = from_below(&target).into_iter().cloned().collect();
    let mut ports: BTreeMap<IfName, Vec<IfName>> = BTreeMap::new();
    for (name, link) in &target.links {
        if let Some(controller) = &link.controller {
            ports.entry(controller.clone()).or_default().push(name.clone());
        }
    }
    let parents = vlans_by_parent(&target).into_keys().cloned().collect();
    let ground = Ground::new(now.clone());
    let mut planner = Planner {
        target,
        ground,
        ports,
        parents,
        changes: Vec::new(),
        mtus: BTreeSet::new(),
        new_ports: BTreeSet::new(),
    };
    planner.tear_down(&down);
    for name in &up {
        planner.build(name);
    }
    planner.finish(&up);
    planner.changes
}

struct Planner {
    target: NetworkView,
    /// What the kernel has after the changes so far.
    ground: Ground,
    /// Of each controller of the target.
    ports: BTreeMap<IfName, Vec<IfName>>,
    /// The links of the target that VLANs stand on.
    parents: BTreeSet<IfName>,
    changes: Vec<Change>,
    /// Links whose MTU the kernel may have changed by itself in a way that no view shows.
    mtus: BTreeSet<IfName>,
    /// Bridges that are new or whose ports change.
    new_ports: BTreeSet<IfName>,
}

/// What a bond takes only while it is off.
fn needs_off(now: &Bond, then: &Bond) -> bool {
    now.mode != then.mode || now.lacp_rate != then.lacp_rate
}

impl Planner {
    /// A change that cannot be done is in the plan all the same: the kernel then says why.
    fn push(&mut self, change: Change) {
        let _ = self.ground.perform(&change);
        self.changes.push(change);
    }

    fn tear_down(&mut self, down: &[IfName]) {
        let going = self.going();
        // First of all: as long as it is on, addresses and routes are its own.
        for name in down {
            let Some(link) = self.ground.link(name) else { continue };
            let stays = self.target.links.get(name).is_some_and(|then| then.dhcp) && !going.contains(name);
            if link.dhcp && !stays {
                self.push(Change::SetDhcp { link: name.clone(), on: false });
            }
        }
        let gone: Vec<Route> = self.ground.view().routes.difference(&self.target.routes).cloned().collect();
        for route in gone {
            if !route.links().any(|link| going.contains(link)) {
                self.push(Change::DeleteRoute { route });
            }
        }
        for name in down {
            self.delete_addresses(name, &going);
        }
        for name in down {
            self.take_off(name, &going);
        }
        for name in down {
            self.switch_off(name, &going);
        }
        for name in down.iter().filter(|name| going.contains(*name)) {
            if self.ground.link(name).is_some() {
                self.push(Change::Delete { link: name.clone() });
            }
        }
    }

    /// The links that are removed, maybe to be made again, and the VLANs that go with them.
    fn going(&self) -> BTreeSet<IfName> {
        let goes = |name: &IfName, link: &LinkView| {
            let then = self.target.links.get(name);
            link.kind.is_made() && !then.is_some_and(|then| is_same_make(&link.kind, &then.kind))
        };
        let links = self.ground.view().links.iter();
        let mut waiting: Vec<IfName> =
            links.filter(|(name, link)| goes(name, link)).map(|(name, _)| name.clone()).collect();
        let mut going = BTreeSet::new();
        while let Some(name) = waiting.pop() {
            waiting.extend(self.ground.vlans_on(&name).into_iter().filter(|vlan| !going.contains(vlan)));
            going.insert(name);
        }
        going
    }

    fn delete_addresses(&mut self, name: &IfName, going: &BTreeSet<IfName>) {
        let (Some(link), Some(then)) = (self.ground.link(name), self.target.links.get(name)) else { return };
        if going.contains(name) || link.addresses == then.addresses {
            return;
        }
        let gone: Vec<_> = link.addresses.difference(&then.addresses).copied().collect();
        for address in gone {
            self.push(Change::DeleteAddress { link: name.clone(), address });
        }
    }

    fn take_off(&mut self, name: &IfName, going: &BTreeSet<IfName>) {
        let Some(controller) = self.ground.link(name).and_then(|link| link.controller.clone()) else {
            return;
        };
        if going.contains(name) {
            self.new_ports.insert(controller);
            return;
        }
        let over = self.ground.link(&controller).map(|over| &over.kind);
        let is_bond = matches!(over, Some(Kind::Bond(_)));
        let changes_mode = match (over, self.target.links.get(&controller).map(|over| &over.kind)) {
            (Some(Kind::Bond(now)), Some(Kind::Bond(then))) => now.mode != then.mode,
            _ => false,
        };
        let stays =
            self.target.links.get(name).is_some_and(|then| then.controller.as_ref() == Some(&controller));
        if !stays || going.contains(&controller) || changes_mode {
            self.push(Change::SetController { link: name.clone(), controller: None });
            if is_bond {
                self.mtus.insert(name.clone());
            }
            self.new_ports.insert(controller);
        }
    }

    fn switch_off(&mut self, name: &IfName, going: &BTreeSet<IfName>) {
        let (Some(link), Some(then)) = (self.ground.link(name), self.target.links.get(name)) else { return };
        let needs_off = match (&link.kind, &then.kind) {
            (Kind::Bond(now), Kind::Bond(then)) => needs_off(now, then),
            _ => false,
        };
        if link.up && !going.contains(name) && (!then.up || needs_off) {
            self.push(Change::SetUp { link: name.clone(), up: false });
        }
    }

    /// The link and its options, its ports, and on with it.
    fn build(&mut self, name: &IfName) {
        let Some(then) = self.target.links.get(name).cloned() else { return };
        if !self.make(name, &then) {
            return;
        }
        self.raise(name, &then);
        if matches!(then.kind, Kind::Bond(_)) {
            self.set_mac(name, &then);
        }
        for port in self.ports.get(name).cloned().unwrap_or_default() {
            self.enter(&port, name, &then);
        }
        self.set_mac(name, &then);
        self.keep_bridges_mtu(name, &then);
        // A bond takes a port that is off, and switches it on; what stands on the port may need it before.
        let enters_bond = is_port_of_bond(&self.target, then.controller.as_ref())
            && !self.parents.contains(name)
            && self.ground.link(name).is_some_and(|link| link.controller != then.controller);
        if then.up && !enters_bond && self.ground.link(name).is_some_and(|link| !link.up) {
            self.push(Change::SetUp { link: name.clone(), up: true });
        }
    }

    /// Whether it is there then.
    fn make(&mut self, name: &IfName, then: &LinkView) -> bool {
        let Some(link) = self.ground.link(name) else {
            if !then.kind.is_made() {
                return false;
            }
            let (mut mtu, mut mac) = (then.mtu, then.mac);
            if let Kind::Vlan { parent, .. } = &then.kind
                && let Some(below) = self.ground.link(parent)
            {
                mtu = mtu.min(below.mtu);
                // One that is not set follows the parent's.
                mac = mac.filter(|mac| below.mac != Some(*mac));
            }
            self.push(Change::Create { link: name.clone(), kind: then.kind.clone(), mac, mtu: Some(mtu) });
            if matches!(then.kind, Kind::Bridge(_)) {
                self.new_ports.insert(name.clone());
            }
            return true;
        };
        if link.kind != then.kind {
            match &then.kind {
                Kind::Bond(bond) => self.push(Change::SetBond { link: name.clone(), bond: bond.clone() }),
                Kind::Bridge(bridge) => self.push(Change::SetBridge { link: name.clone(), bridge: *bridge }),
                _ => {}
            }
        }
        true
    }

    /// A bond's is set before it has its ports, which take it; others are lowered when all else stands.
    fn raise(&mut self, name: &IfName, then: &LinkView) {
        let Some(link) = self.ground.link(name) else { return };
        let is_bond = matches!(then.kind, Kind::Bond(_));
        if link.mtu < then.mtu || (is_bond && link.mtu != then.mtu) {
            self.push(Change::SetMtu { link: name.clone(), mtu: then.mtu });
        }
    }

    fn set_mac(&mut self, name: &IfName, then: &LinkView) {
        let Some(link) = self.ground.link(name) else { return };
        let is_bonds = is_port_of_bond(&self.target, then.controller.as_ref());
        if let Some(mac) = then.mac
            && link.mac != then.mac
            && !is_bonds
        {
            self.push(Change::SetMac { link: name.clone(), mac });
        }
    }

    fn enter(&mut self, port: &IfName, controller: &IfName, over: &LinkView) {
        let Some(link) = self.ground.link(port) else { return };
        if link.controller.as_ref() == Some(controller) {
            return;
        }
        if link.up && matches!(over.kind, Kind::Bond(_)) {
            self.push(Change::SetUp { link: port.clone(), up: false });
        }
        self.push(Change::SetController { link: port.clone(), controller: Some(controller.clone()) });
        self.new_ports.insert(controller.clone());
    }

    /// A bridge whose MTU nobody set takes the least of its ports' when they change: it is set if that is not wanted.
    fn keep_bridges_mtu(&mut self, name: &IfName, then: &LinkView) {
        if !matches!(then.kind, Kind::Bridge(_)) || !self.new_ports.contains(name) {
            return;
        }
        let ports = self.ports.get(name).into_iter().flatten();
        let least = ports.filter_map(|port| self.target.links.get(port)).map(|port| port.mtu).min();
        if least.is_some_and(|least| least != then.mtu) {
            self.mtus.insert(name.clone());
        }
    }

    fn finish(&mut self, up: &[IfName]) {
        self.set_mtus(up);
        for (is_on, name) in
            up.iter().map(|name| (true, name)).chain(up.iter().rev().map(|name| (false, name)))
        {
            let then = self.target.links.get(name).map(|then| then.up);
            if then == Some(is_on) && self.ground.link(name).is_some_and(|link| link.up != is_on) {
                self.push(Change::SetUp { link: name.clone(), up: is_on });
            }
        }
        for name in up {
            let Some(then) = self.target.links.get(name).cloned() else { continue };
            self.set_mac(name, &then);
            self.set_vlans(name, &then);
            self.add_addresses(name, &then);
        }
        for name in up {
            let then = self.target.links.get(name).is_some_and(|then| then.dhcp);
            if then && self.ground.link(name).is_some_and(|link| !link.dhcp) {
                self.push(Change::SetDhcp { link: name.clone(), on: true });
            }
        }
        let missing = self.target.routes.difference(&self.ground.view().routes).cloned();
        let (with_gateway, without): (Vec<Route>, Vec<Route>) =
            missing.partition(|route| route.has_gateway());
        for route in without.into_iter().chain(with_gateway) {
            self.push(Change::AddRoute { route });
        }
    }

    /// Lower from above to below, raise from below to above.
    fn set_mtus(&mut self, up: &[IfName]) {
        for name in up.iter().rev() {
            self.set_mtu_if(name, |link, then| link.mtu > then.mtu);
        }
        for name in up {
            self.set_mtu_if(name, |link, then| link.mtu != then.mtu);
        }
        for name in up {
            if self.mtus.contains(name) {
                self.set_mtu_if(name, |_, _| true);
            }
        }
    }

    fn set_mtu_if(&mut self, name: &IfName, is_needed: impl Fn(&LinkView, &LinkView) -> bool) {
        let (Some(link), Some(then)) = (self.ground.link(name), self.target.links.get(name)) else { return };
        if is_needed(link, then) {
            let mtu = then.mtu;
            self.push(Change::SetMtu { link: name.clone(), mtu });
        }
    }

    fn set_vlans(&mut self, name: &IfName, then: &LinkView) {
        let Some(link) = self.ground.link(name) else { return };
        if link.vlans == then.vlans {
            return;
        }
        let ids: BTreeSet<_> = then.vlans.iter().map(|vlan| vlan.id).collect();
        let gone: Vec<_> = link.vlans.iter().map(|vlan| vlan.id).filter(|id| !ids.contains(id)).collect();
        let missing: Vec<PortVlan> = then.vlans.difference(&link.vlans).copied().collect();
        for id in gone {
            self.push(Change::DeletePortVlan { link: name.clone(), id });
        }
        // One that takes what has no tag takes that from another.
        let (last, first): (Vec<PortVlan>, Vec<PortVlan>) = missing.into_iter().partition(|vlan| vlan.pvid);
        for vlan in first.into_iter().chain(last) {
            self.push(Change::AddPortVlan { link: name.clone(), vlan });
        }
    }

    fn add_addresses(&mut self, name: &IfName, then: &LinkView) {
        let Some(link) = self.ground.link(name) else { return };
        let missing: Vec<_> = then.addresses.difference(&link.addresses).copied().collect();
        for address in missing {
            self.push(Change::AddAddress { link: name.clone(), address });
        }
    }
}
