//! What a change touches: the links and routes that a plan may change and a rollback restores.

use super::Desired;
use super::aim::{controllers, is_same_make, vlans_by_parent};
use crate::model::IfName;
use crate::model::network::{Address, Kind, LinkView, NetworkView, Route};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Scope {
    /// With all routes by them.
    pub links: BTreeSet<IfName>,
    /// Beside those by the links; bare. One without a link stands for any link.
    pub extra_routes: BTreeSet<Route>,
    /// Addresses that matter even on links that DHCP configures, where others come and go with the lease.
    pub virtual_ips: BTreeSet<(IfName, Address)>,
}

impl Scope {
    /// All that either declaration names, the ports of it, what stands on it, and routes that would stand in the way.
    pub fn of(before: &Desired, desired: &Desired, now: &NetworkView) -> Self {
        let mut scope = Self::default();
        let mut named: BTreeSet<&IfName> = BTreeSet::new();
        for declared in [before, desired] {
            named.extend(declared.links.keys());
            named.extend(controllers(declared).keys());
            for (ip, virtual_ip) in &declared.virtual_ips {
                named.insert(&virtual_ip.link);
                let address = Address { ip: *ip, prefix: virtual_ip.prefix };
                scope.virtual_ips.insert((virtual_ip.link.clone(), address));
            }
            for route in declared.routes.iter().map(Route::normal) {
                let in_the_way = now.routes_to(route.to).filter(|one| one.is_rival(&route));
                scope.extra_routes.extend(in_the_way.map(Route::bare));
                scope.extra_routes.insert(route.bare());
            }
        }
        let vlans = vlans_by_parent(now);
        let mut ports: BTreeMap<&IfName, Vec<&IfName>> = BTreeMap::new();
        for (name, link) in &now.links {
            if let Some(controller) = &link.controller {
                ports.entry(controller).or_default().push(name);
            }
        }
        let mut waiting: Vec<&IfName> = named.into_iter().collect();
        while let Some(name) = waiting.pop() {
            if scope.links.insert(name.clone()) {
                waiting.extend(vlans.get(name).into_iter().flatten());
                waiting.extend(ports.get(name).into_iter().flatten());
            }
        }
        scope
    }

    /// Without links that another service of the host has now, and without declared routes by them.
    #[must_use]
    pub fn without(mut self, others: &BTreeSet<IfName>, aim: &NetworkView) -> Self {
        self.links.retain(|link| !others.contains(link));
        self.retain_routes(aim, |link| !others.contains(link));
        self
    }

    /// Only what stands on these links, with them.
    #[must_use]
    pub fn above(mut self, links: &BTreeSet<IfName>, aim: &NetworkView) -> Self {
        let vlans = vlans_by_parent(aim);
        let mut kept: BTreeSet<IfName> = BTreeSet::new();
        let mut waiting: Vec<IfName> = links.iter().cloned().collect();
        while let Some(name) = waiting.pop() {
            waiting.extend(aim.links.get(&name).and_then(|link| link.controller.clone()));
            waiting.extend(vlans.get(&name).into_iter().flatten().copied().cloned());
            waiting.retain(|one| !kept.contains(one));
            kept.insert(name);
        }
        self.links.retain(|link| kept.contains(link));
        self.retain_routes(aim, |link| kept.contains(link));
        self
    }

    /// Of the declared routes, those that lead by such links.
    fn retain_routes(&mut self, aim: &NetworkView, by: impl Fn(&IfName) -> bool) {
        let leads = |route: &Route| {
            let mut ways = aim.routes_to(route.to).filter(|one| one.does(route));
            ways.any(|one| one.links().all(&by)) || (route.links().next().is_some() && route.links().all(&by))
        };
        self.extra_routes.retain(leads);
    }

    pub fn has_route(&self, route: &Route) -> bool {
        route.links().any(|link| self.links.contains(link)) || self.is_extra(route)
    }

    fn is_extra(&self, route: &Route) -> bool {
        let route = route.bare();
        self.extra_routes.contains(&route) || self.extra_routes.contains(&Route { link: None, ..route })
    }
}

/// What the kernel is to have in all: what is asked for in the scope, and what it has now beside that, as far as this can
/// stay. It may name links that are gone and that nobody can make.
pub fn target(now: &NetworkView, then: &NetworkView, scope: &Scope) -> NetworkView {
    let mut target = now.clone();
    for name in &scope.links {
        match (now.links.get(name), then.links.get(name)) {
            // What others make and take away (a guest's card, its device model's tap, a container's end) stays gone.
            (None, Some(link)) if link.kind.is_others() => {}
            (now, Some(link)) => {
                let mut link = link.clone();
                if let Some(now) = now.filter(|now| now.dhcp && link.dhcp) {
                    keep_lease(now, &mut link, |one| scope.virtual_ips.contains(&(name.clone(), *one)));
                }
                target.links.insert(name.clone(), link);
            }
            (Some(link), None) if link.kind.is_made() => {
                target.links.remove(name);
            }
            (_, None) => {}
        }
    }
    let is_leased = |route: &Route| {
        let has_dhcp = |view: &NetworkView, name| view.links.get(name).is_some_and(|link| link.dhcp);
        let by_link = route.link.as_ref().is_some_and(|name| has_dhcp(now, name) && has_dhcp(then, name));
        by_link && !scope.is_extra(route)
    };
    target.routes.retain(|route| !scope.has_route(route));
    target.routes.extend(then.routes.iter().filter(|one| scope.has_route(one) && !is_leased(one)).cloned());
    // The lease's: as they are now, or as they were where there are none now and the lease is the same.
    let leased = |view: &NetworkView| -> Vec<Route> {
        view.routes.iter().filter(|one| scope.has_route(one) && is_leased(one)).cloned().collect()
    };
    for route in leased(now).into_iter().chain(leased(then)) {
        let link = route.link.as_ref().and_then(|link| target.links.get(link));
        let can_be = link.is_some_and(|link| {
            let is_reached = |via| link.addresses.iter().any(|one| one.contains(via));
            let is_on_link = Route::is_on_link(route.via, route.link.as_ref(), route.onlink);
            link.up
                && (is_on_link || route.via.is_none_or(is_reached))
                && (route.to.ip.is_ipv4() || link.mtu >= 1280)
        });
        if can_be && !target.routes_to(route.to).any(|one| one.is_rival(&route)) {
            target.routes.insert(route);
        }
    }
    drop_dangling(&mut target);
    target
}

/// What DHCP brought stays as it is now; where nothing is left of a family, it is asked for as it was.
fn keep_lease(now: &LinkView, then: &mut LinkView, is_virtual: impl Fn(&Address) -> bool) {
    for is_ipv4 in [true, false] {
        let leased = |link: &LinkView| -> BTreeSet<Address> {
            let leased = |one: &&Address| one.ip.is_ipv4() == is_ipv4 && !is_virtual(one);
            link.addresses.iter().filter(leased).copied().collect()
        };
        let is_kept = is_ipv4 || (then.mtu >= 1280 && then.up);
        let now = leased(now);
        if !now.is_empty() && is_kept {
            for old in leased(then) {
                then.addresses.remove(&old);
            }
            then.addresses.extend(now);
        }
    }
}

/// Without VLANs, ports and routes of links that are not there.
fn drop_dangling(view: &mut NetworkView) {
    let vlans = vlans_by_parent(view);
    let missing = vlans.iter().filter(|(parent, _)| !view.links.contains_key(**parent));
    let mut going: Vec<IfName> = missing.flat_map(|(_, above)| above.iter().copied().cloned()).collect();
    let vlans: BTreeMap<IfName, Vec<IfName>> = if going.is_empty() {
        BTreeMap::new()
    } else {
        let owned =
            |(parent, above): (&IfName, Vec<&IfName>)| (parent.clone(), above.into_iter().cloned().collect());
        vlans.into_iter().map(owned).collect()
    };
    while let Some(name) = going.pop() {
        view.links.remove(&name);
        going.extend(vlans.get(&name).into_iter().flatten().cloned());
    }
    let can_have_ports = |link: &Kind| link.has_ports() || matches!(link, Kind::Other { .. });
    let over = view.links.iter().filter(|(_, link)| can_have_ports(&link.kind));
    let over: BTreeSet<IfName> = over.map(|(name, _)| name.clone()).collect();
    for link in view.links.values_mut() {
        if link.controller.as_ref().is_some_and(|controller| !over.contains(controller)) {
            link.controller = None;
            link.vlans.clear();
        }
    }
    let links = &view.links;
    view.routes.retain(|route| route.links().all(|link| links.contains_key(link)));
}

/// The target of a rollback: the snapshot for what is in scope, and what there is now for all else. Guests' cards that are
/// on a bridge of the scope now return to it, as do those of the snapshot that still exist.
pub fn back(now: &NetworkView, snapshot: &NetworkView, scope: &Scope) -> NetworkView {
    target(now, snapshot, scope)
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// A link's name, or a route.
    pub object: String,
    /// Of the link: `MTU`, `addresses`; or `there`: whether it exists.
    pub what: &'static str,
    pub asked: String,
    pub is: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} should be {}, is {}", self.object, self.what, self.asked, self.is)
    }
}

/// What of the scope is not as it should be. Carrier does not matter, nor a MAC that nobody asked for, nor what DHCP brought.
pub fn differences(now: &NetworkView, then: &NetworkView, scope: &Scope) -> Vec<Difference> {
    let target = target(now, then, scope);
    let mut all = Vec::new();
    for name in &scope.links {
        match (now.links.get(name), target.links.get(name)) {
            (None, None) => {}
            (now, None) => all.extend(now.map(|now| presence(name, "absent".into(), now.kind.to_string()))),
            (None, Some(asked)) => all.push(presence(name, asked.kind.to_string(), "absent".into())),
            (Some(now), Some(asked)) if !is_same_make(&now.kind, &asked.kind) => {
                all.push(difference(name, "kind", told(&asked.kind), told(&now.kind)));
            }
            (Some(now), Some(asked)) => {
                let is_bonds = is_port_of_bond(&target, asked.controller.as_ref());
                if asked.mac.is_some() && asked.mac != now.mac && !is_bonds {
                    all.push(difference(name, "MAC", option(asked.mac), option(now.mac)));
                }
                let rows = [
                    ("options", told(&asked.kind), told(&now.kind), asked.kind != now.kind),
                    ("MTU", asked.mtu.to_string(), now.mtu.to_string(), asked.mtu != now.mtu),
                    ("state", on(asked.up), on(now.up), asked.up != now.up),
                    (
                        "controller",
                        option(asked.controller.as_ref()),
                        option(now.controller.as_ref()),
                        asked.controller != now.controller,
                    ),
                    ("DHCP", on(asked.dhcp), on(now.dhcp), asked.dhcp != now.dhcp),
                ];
                let rows = rows.into_iter().filter(|(.., differs)| *differs);
                all.extend(rows.map(|(what, asked, is, _)| difference(name, what, asked, is)));
                if asked.addresses != now.addresses {
                    all.push(difference(name, "addresses", list(&asked.addresses), list(&now.addresses)));
                }
                if asked.vlans != now.vlans {
                    let ids = |link: &LinkView| list(link.vlans.iter().map(|one| one.id));
                    all.push(difference(name, "VLANs", ids(asked), ids(now)));
                }
            }
        }
    }
    let route = |one: &Route, asked: &str, is: &str| Difference {
        object: format!("route {one}"),
        what: "there",
        asked: asked.to_owned(),
        is: is.to_owned(),
    };
    all.extend(target.routes.difference(&now.routes).map(|one| route(one, "present", "absent")));
    all.extend(now.routes.difference(&target.routes).map(|one| route(one, "absent", "present")));
    all
}

/// Whether there is nothing left to do.
pub fn is_there(now: &NetworkView, then: &NetworkView, scope: &Scope) -> bool {
    differences(now, then, scope).is_empty()
}

pub(super) fn is_port_of_bond(view: &NetworkView, controller: Option<&IfName>) -> bool {
    let over = controller.and_then(|controller| view.links.get(controller));
    over.is_some_and(|over| matches!(over.kind, Kind::Bond(_)))
}

fn difference(name: &IfName, what: &'static str, asked: String, is: String) -> Difference {
    Difference { object: name.to_string(), what, asked, is }
}

fn presence(name: &IfName, asked: String, is: String) -> Difference {
    difference(name, "there", asked, is)
}

fn on(on: bool) -> String {
    if on { "on" } else { "off" }.to_owned()
}

fn option(one: Option<impl ToString>) -> String {
    one.map_or_else(|| "none".to_owned(), |one| one.to_string())
}

/// At most ten, and how many more.
fn list(all: impl IntoIterator<Item = impl ToString>) -> String {
    let all: Vec<String> = all.into_iter().map(|one| one.to_string()).collect();
    match all.len() {
        0 => "none".to_owned(),
        1..=10 => all.join(", "),
        more => format!("{} and {} more", all[..10].join(", "), more - 10),
    }
}

fn told(kind: &Kind) -> String {
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    match kind {
        Kind::Bond(bond) => format!(
            "bond (mode {}, miimon {} ms, delays {} and {} ms, primary {}, LACP {:?}, hash {:?})",
            bond.mode,
            bond.miimon_ms,
            bond.up_delay_ms,
            bond.down_delay_ms,
            option(bond.primary.as_ref()),
            bond.lacp_rate,
            bond.xmit_hash,
        ),
        Kind::Bridge(bridge) => format!(
            "bridge (STP {}, forward delay {} ms, VLAN filtering {})",
            yes(bridge.stp),
            bridge.forward_delay_ms,
            yes(bridge.vlan_filtering),
        ),
        Kind::Vlan { parent, id } => format!("VLAN {id} on {parent}"),
        other => other.to_string(),
    }
}
