//! A declaration as it came true: what is declared after a change of which only a part worked, and was kept.

use super::desired::{Desired, DesiredLink};
use crate::model::network::{Mtu, NetworkView};

/// What of `before` and `after` is there now, as it is. A link that neither made nor removed is declared by nobody.
pub fn settled(before: &Desired, after: &Desired, now: &NetworkView) -> Desired {
    let mut desired = after.clone();
    for (name, link) in &before.links {
        // It should have gone and has not: it is still ours.
        if link.kind.is_made() && now.links.contains_key(name) {
            desired.links.entry(name.clone()).or_insert_with(|| link.clone());
        }
    }
    desired.links.retain(|name, _| now.links.contains_key(name));
    for (name, link) in &mut desired.links {
        let Some(is) = now.links.get(name) else { continue };
        as_it_is(link, is);
        let ports = now.ports(name).filter(|(port, is)| link.ports.contains(*port) || !is.kind.is_others());
        link.ports = ports.map(|(port, _)| port.clone()).collect();
    }
    // What of before was to go and is still there is ours as well.
    desired.routes.extend(before.routes.iter().cloned());
    desired.routes.retain(|route| now.routes.iter().any(|is| is.does(route)));
    for (ip, virtual_ip) in &before.virtual_ips {
        desired.virtual_ips.entry(*ip).or_insert_with(|| virtual_ip.clone());
    }
    desired.networks.retain(|_, network| now.links.contains_key(&network.link));
    desired.virtual_ips.retain(|ip, _| now.holder(*ip).is_some());
    let held: Vec<_> = desired.virtual_ips.iter().map(|(ip, one)| (*ip, one.link.clone())).collect();
    for (ip, link) in held {
        if let Some(addresses) = desired.links.get_mut(&link).and_then(|link| link.addresses.as_mut()) {
            addresses.retain(|address| address.ip != ip);
        }
    }
    desired
}

/// Only what was declared about it.
fn as_it_is(link: &mut DesiredLink, is: &crate::model::network::LinkView) {
    if link.kind.is_made() && is.kind.is_made() {
        link.kind = is.kind.clone();
    }
    link.up = is.up;
    link.mtu = link.mtu.and_then(|_| Mtu::new(u64::from(is.mtu)).ok());
    link.mac = link.mac.and(is.mac);
    if link.addresses.is_some() {
        link.addresses = Some(is.addresses.clone());
    }
    if link.vlans.is_some() {
        link.vlans = Some(is.vlans.clone());
    }
    link.dhcp &= is.dhcp;
}
