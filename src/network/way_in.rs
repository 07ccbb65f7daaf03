//! By which of our addresses somebody comes.

use crate::model::network::{Address, MAIN_TABLE, NetworkView, Route};
use std::net::IpAddr;

/// The address that packets to `peer` leave with: on the network that it is on, else on the link of the narrowest route to
/// it. A caller who came to another address of ours is answered from there all the same; then this is a guess, and a change
/// that takes this address away is refused though he would keep his.
pub fn way_in(view: &NetworkView, peer: IpAddr) -> Option<IpAddr> {
    let up = || view.links.values().filter(|link| link.up).flat_map(|link| link.addresses.iter());
    let near = up().filter(|address| address.contains(peer)).max_by_key(|address| address.prefix);
    if let Some(address) = near {
        return Some(address.ip);
    }
    let wider = view.routes.iter().filter(|route| route.table == MAIN_TABLE && route.to.contains(peer));
    let route = wider.max_by_key(|route| (route.to.prefix, std::cmp::Reverse(route.metric)))?;
    let link = view.links.get(route.links().next()?)?;
    by_gateway(link.addresses.iter(), route).map(|address| address.ip)
}

fn by_gateway<'a>(
    addresses: impl Iterator<Item = &'a Address> + Clone,
    route: &Route,
) -> Option<&'a Address> {
    let on_its_network = |address: &&Address| match route.source {
        Some(source) => address.ip == source,
        None => route.via.is_some_and(|via| address.contains(via)),
    };
    let of_family = |address: &&Address| address.ip.is_ipv4() == route.to.ip.is_ipv4();
    addresses.clone().find(on_its_network).or_else(|| addresses.clone().find(of_family))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::IfName;
    use crate::model::network::{Kind, LinkView};

    #[test]
    fn a_neighbour_comes_by_the_address_on_its_network_and_a_stranger_by_the_gateways_link() {
        let mut view = NetworkView::default();
        for (name, address) in [("a", "192.0.2.10/24"), ("b", "198.51.100.1/24")] {
            let mut link = LinkView::new(Kind::Ethernet);
            link.up = true;
            link.addresses.insert(Address::parse(address).unwrap());
            view.links.insert(IfName::parse(name).unwrap(), link);
        }
        let to = Address::parse("0.0.0.0/0").unwrap();
        let via = Some("198.51.100.2".parse().unwrap());
        view.routes.insert(Route { via, link: Some(IfName::parse("b").unwrap()), ..Route::new(to) });
        let way = |peer: &str| way_in(&view, peer.parse().unwrap()).map(|ip| ip.to_string());
        assert_eq!(way("192.0.2.77").as_deref(), Some("192.0.2.10"));
        assert_eq!(way("203.0.113.9").as_deref(), Some("198.51.100.1"));
        assert_eq!(way("2001:db8::1"), None);
    }
}
