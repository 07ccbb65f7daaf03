//! Ways out of the host: whether declared routes can be, and whether the one who asks keeps theirs.

use super::Desired;
use super::order::Reach;
use super::problem::{Problem, Problems};
use crate::model::IfName;
use crate::model::network::{Kind, LOCAL_TABLE, MAIN_TABLE, NetworkView, Route};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// A caller's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    pub peer: IpAddr,
    /// The address of ours that it comes to.
    pub own: Option<IpAddr>,
}

/// How this host is reached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Management {
    /// The local address of the caller's connection.
    pub ip: Option<IpAddr>,
    pub peer: Option<IpAddr>,
    /// The link of the network with the role MANAGEMENT, before and then.
    pub link: Option<IfName>,
    pub next: Option<IfName>,
}

/// Whether a change takes away what the caller reaches this host by: it is there now, and then it is not.
pub fn cuts_management(now: &NetworkView, then: &NetworkView, management: &Management) -> Option<Problem> {
    let field = "management";
    // The kernel makes these by itself, and no view has them.
    let is_kernels = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    };
    let peer = management.peer.map(|peer| peer.to_canonical());
    match management.ip.map(|ip| ip.to_canonical()) {
        Some(ip) if is_kernels(&ip) => return None,
        Some(ip) if is_held(now, ip) && !is_held(then, ip) => {
            return Some(Problem::new(
                field,
                format!("{ip}, by which the caller reaches this host, would be gone"),
            ));
        }
        _ => {}
    }
    let has_any = |view: &NetworkView, link: &IfName| {
        view.links.get(link).is_some_and(|link| link.up && (link.dhcp || !link.addresses.is_empty()))
    };
    if let Some(link) = &management.link
        && has_any(now, link)
        && !has_any(then, link)
        && !management.next.as_ref().is_some_and(|next| has_any(then, next))
    {
        let text = format!("{link}, the link of the management network, would be without an address or off");
        return Some(Problem::new(field, text));
    }
    let peer = peer.filter(|peer| !is_kernels(peer) && !is_held(now, *peer))?;
    (leads_to(now, peer) && !leads_to(then, peer))
        .then(|| Problem::new(field, format!("no route would lead to the caller, {peer}")))
}

/// Whether a change leaves the host without any address to reach it by: whoever calls from the host itself, or from nobody
/// knows where, would not see that he cuts everybody else off.
pub fn cuts_all(now: &NetworkView, then: &NetworkView) -> Option<Problem> {
    let is_reachable = |view: &NetworkView| {
        let others = view.links.values().filter(|link| link.kind != Kind::Loopback && link.up);
        others.filter(|link| link.dhcp || !link.addresses.is_empty()).count() > 0
    };
    (is_reachable(now) && !is_reachable(then))
        .then(|| Problem::new("management", "this host would have no address left on any link that is on"))
}

fn is_held(view: &NetworkView, ip: IpAddr) -> bool {
    let holders = view.links.values().filter(|link| link.addresses.iter().any(|one| one.ip == ip));
    holders.filter(|link| link.up).count() > 0
}

fn leads_to(view: &NetworkView, ip: IpAddr) -> bool {
    let is_on = |link: &IfName| view.links.get(link).is_some_and(|link| link.up);
    let by_address =
        view.links.values().any(|link| link.up && link.addresses.iter().any(|address| address.contains(ip)));
    by_address
        || view
            .routes
            .iter()
            .any(|route| route.table == MAIN_TABLE && route.to.contains(ip) && route.links().any(is_on))
}

/// Of routes that were declared before, only what speaks against them by themselves: one whose link is gone waits for it.
pub(super) fn check(desired: &Desired, before: &Desired, aim: &NetworkView, problems: &mut Problems) {
    let reach = Reach::of(aim);
    let own: BTreeSet<IpAddr> =
        aim.links.values().flat_map(|link| link.addresses.iter().map(|address| address.ip)).collect();
    let mut taken: BTreeSet<_> = BTreeSet::new();
    for route in &desired.routes {
        let field = format!("routes.{}", route.to);
        let like = route.normal();
        if !taken.insert((like.to, like.metric, like.table)) {
            problems.add(field.clone(), "there are two of the same metric");
        }
        if route.to.ip != like.to.ip {
            problems.add(format!("{field}.to"), format!("is no network; allowed: {}", like.to));
        }
        if route.to.ip.is_multicast() || route.to.ip.is_loopback() {
            problems.add(format!("{field}.to"), "is no network of others");
        }
        if route.table == 0 || route.table == LOCAL_TABLE {
            problems
                .add(format!("{field}.table"), "is the kernel's own; allowed: 1 to 4294967295, without 255");
        }
        if before.routes.contains(route) {
            continue;
        }
        if route.source.is_some_and(|source| !own.contains(&source)) {
            problems.add(format!("{field}.source"), "is no address of this host");
        }
        if !route.hops.is_empty() && (route.via.is_some() || route.link.is_some() || route.onlink) {
            problems.add(format!("{field}.hops"), "excludes via, link and onlink");
            continue;
        }
        for way in route.ways() {
            check_way(&field, route, way, aim, &reach, &own, problems);
        }
    }
}

fn check_way(
    field: &str,
    route: &Route,
    (via, link, onlink): (Option<IpAddr>, Option<&IfName>, bool),
    aim: &NetworkView,
    reach: &Reach,
    own: &BTreeSet<IpAddr>,
    problems: &mut Problems,
) {
    if let Some(wrong) = via.and_then(|via| wrong_gateway(route, via, own)) {
        problems.add(format!("{field}.via"), wrong);
        return;
    }
    if onlink && (via.is_none() || link.is_none()) {
        problems.add(format!("{field}.onlink"), "needs a gateway (via) and a link");
        return;
    }
    let is_on_link = Route::is_on_link(via, link, onlink);
    let found = match via {
        Some(via) if !is_on_link => reach.link_to(via, link).or(link),
        _ => link,
    };
    match found.map(|link| (link, aim.links.get(link))) {
        None if via.is_some() => problems.add(format!("{field}.via"), "is on no network of this host"),
        None => problems.add(field.to_owned(), "needs a gateway (via) or a link"),
        Some((link, None)) => problems.add(format!("{field}.link"), format!("there will be no link {link}")),
        Some((link, Some(then))) if !then.up => {
            problems.add(format!("{field}.link"), format!("{link} is off"));
        }
        Some((link, Some(then))) if route.to.ip.is_ipv6() && then.mtu < 1280 => {
            problems.add(format!("{field}.link"), format!("the MTU of {link} is too small for IPv6"));
        }
        Some((link, Some(_))) => {
            if !is_on_link && via.is_some_and(|via| reach.link_to(via, Some(link)).is_none()) {
                problems.add(format!("{field}.via"), format!("is on no network of {link}"));
            }
        }
    }
}

fn wrong_gateway(route: &Route, via: IpAddr, own: &BTreeSet<IpAddr>) -> Option<String> {
    // IPv4 may go by a gateway of IPv6 (RFC 5549).
    if via.is_ipv4() && route.to.ip.is_ipv6() {
        return Some("is of the other family than the network".to_owned());
    }
    if via.is_unspecified() || via.is_loopback() || via.is_multicast() {
        return Some("is no gateway's address".to_owned());
    }
    own.contains(&via).then(|| "is an address of this host itself".to_owned())
}
