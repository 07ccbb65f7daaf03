//! Which link stands on which: the order from below to above, and which link leads to a gateway.

use crate::model::IfName;
use crate::model::network::{Address, Kind, MAIN_TABLE, NetworkView, Route};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The links, each after what it stands on: a VLAN after its parent, a controller after its ports. What stands on itself
/// comes last.
pub fn from_below(view: &NetworkView) -> Vec<&IfName> {
    let (mut order, left) = peel(edges(view), view.links.keys().collect());
    order.extend(left);
    order
}

/// The links that stand on themselves, or between such.
pub fn on_themselves(view: &NetworkView) -> BTreeSet<&IfName> {
    let (_, left) = peel(edges(view), view.links.keys().collect());
    let turned = edges(view).into_iter().map(|(upper, lower)| (lower, upper));
    peel(turned.filter(|(upper, lower)| left.contains(upper) && left.contains(lower)).collect(), left).1
}

/// Which link stands on which.
fn edges(view: &NetworkView) -> Vec<(&IfName, &IfName)> {
    let known = |name| view.links.get_key_value(name).map(|(name, _)| name);
    let mut edges = Vec::new();
    for (name, link) in &view.links {
        if let Kind::Vlan { parent, .. } = &link.kind {
            edges.extend(known(parent).map(|parent| (name, parent)));
        }
        edges.extend(link.controller.as_ref().and_then(known).map(|controller| (controller, name)));
    }
    edges
}

/// Takes one after another what stands on nothing that is left; also what then is left.
fn peel<'a>(
    edges: Vec<(&'a IfName, &'a IfName)>,
    all: BTreeSet<&'a IfName>,
) -> (Vec<&'a IfName>, BTreeSet<&'a IfName>) {
    let mut below: BTreeMap<&IfName, usize> = BTreeMap::new();
    let mut above: BTreeMap<&IfName, Vec<&IfName>> = BTreeMap::new();
    for (upper, lower) in edges {
        *below.entry(upper).or_default() += 1;
        above.entry(lower).or_default().push(upper);
    }
    let mut order: Vec<&IfName> = all.iter().filter(|name| !below.contains_key(*name)).copied().collect();
    let mut at = 0;
    while let Some(name) = order.get(at).copied() {
        at += 1;
        for upper in above.remove(name).unwrap_or_default() {
            if let Some(count) = below.get_mut(upper) {
                *count -= 1;
                if *count == 0 {
                    order.push(upper);
                }
            }
        }
    }
    let mut left = all;
    for name in &order {
        left.remove(name);
    }
    (order, left)
}

/// The networks that links lead to: by their addresses, and by routes without a gateway.
pub struct Reach {
    networks: BTreeMap<Address, BTreeSet<IfName>>,
    prefixes: BTreeSet<(bool, u8)>,
}

impl Reach {
    /// Of links that are on.
    pub fn of(view: &NetworkView) -> Self {
        let mut reach = Self { networks: BTreeMap::new(), prefixes: BTreeSet::new() };
        for (name, link) in view.links.iter().filter(|(_, link)| link.up) {
            for address in &link.addresses {
                reach.add(*address, name);
            }
        }
        for route in view.routes.iter().filter(|route| route.table == MAIN_TABLE) {
            reach.add_route(route);
        }
        reach
    }

    pub fn add_route(&mut self, route: &Route) {
        if let (None, Some(link)) = (route.via, &route.link) {
            self.add(route.to, link);
        }
    }

    fn add(&mut self, network: Address, link: &IfName) {
        self.prefixes.insert((network.ip.is_ipv4(), network.prefix));
        self.networks.entry(network.network()).or_default().insert(link.clone());
    }

    /// Whether each gateway of a route is on the network of its link, or needs to be on none.
    pub fn leads(&self, route: &Route) -> bool {
        route.ways().all(|(via, link, onlink)| match via {
            Some(via) => Route::is_on_link(Some(via), link, onlink) || self.link_to(via, link).is_some(),
            None => true,
        })
    }

    /// The link on whose network this address is, the narrowest network first; of `link` alone if one is named.
    pub fn link_to(&self, ip: IpAddr, link: Option<&IfName>) -> Option<&IfName> {
        let prefixes = self.prefixes.iter().rev().filter(|(is_ipv4, _)| *is_ipv4 == ip.is_ipv4());
        let mut networks = prefixes.filter_map(|(_, prefix)| {
            let network = Address { ip, prefix: *prefix }.network();
            let mut links = self.networks.get(&network)?.iter();
            links.find(|one| link.is_none_or(|link| *one == link))
        });
        networks.next()
    }
}
