//! The simulated host's network: what the kernel would show, which cables are plugged, and who answers beyond them.
//!
//! Changes follow [`crate::model::network::perform`]; this adds what brings carrier, the links of domains, and what a reboot
//! leaves.

use crate::model::network::{
    Address, Change, Kind, LinkFacts, LinkView, MAIN_TABLE, Neighbour, NeighbourState, NetworkView, Owner,
    Refused, Route, perform,
};
use crate::model::{IfName, Mac};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Ports of hardware: `eth0` …
const ETHERNETS: u8 = 4;
/// What may stand on what, from top to bottom: a VLAN on a bridge on a bond is 4.
const MAX_DEPTH: usize = 8;
/// Addresses that a test has made silent, and owners and facts that it has set.
const MAX_SETTINGS: usize = 4096;

#[derive(Debug)]
pub(super) struct Network {
    view: NetworkView,
    unplugged: BTreeSet<IfName>,
    owners: BTreeMap<IfName, Owner>,
    facts: BTreeMap<IfName, LinkFacts>,
    /// Addresses beyond the cables that do not answer; all others do.
    silent: BTreeSet<IpAddr>,
    /// How often anything changed: the bell's.
    version: u64,
}

/// One that the simulated host is born with.
fn name(text: &str) -> IfName {
    IfName::parse(text).expect("a literal name")
}

fn address(text: &str) -> Address {
    Address::parse(text).expect("a literal address")
}

fn ethernet_mac(n: u8) -> Mac {
    Mac::from_bytes([2, 0, 0, 0, 0, n + 1])
}

/// As the host's own configuration has it after a boot. The addresses are of TEST-NET-1 (RFC 5737), which nobody routes.
fn booted() -> NetworkView {
    let up = |kind: Kind| LinkView { up: true, ..LinkView::new(kind) };
    let mut view = NetworkView::default();
    let addresses = [address("127.0.0.1/8"), address("::1/128")].into();
    view.links.insert(name("lo"), LinkView { mtu: 65_536, addresses, ..up(Kind::Loopback) });
    for n in 0..ETHERNETS {
        let link = LinkView { mac: Some(ethernet_mac(n)), up: n == 0, ..LinkView::new(Kind::Ethernet) };
        view.links.insert(name(&format!("eth{n}")), link);
    }
    let bridge = name("xenbr0");
    if let Some(first) = view.links.get_mut(&name("eth0")) {
        first.controller = Some(bridge.clone());
    }
    let addresses = [address("192.0.2.10/24")].into();
    let kind = Kind::Bridge(crate::model::network::Bridge::default());
    view.links.insert(bridge.clone(), LinkView { mac: Some(ethernet_mac(0)), addresses, ..up(kind) });
    let via = Some(address("192.0.2.1").ip);
    view.routes.insert(Route { via, link: Some(bridge), ..Route::new(address("0.0.0.0/0")) });
    view
}

impl Network {
    pub(super) fn new() -> Self {
        let mut network = Self {
            view: booted(),
            unplugged: BTreeSet::new(),
            owners: BTreeMap::new(),
            facts: BTreeMap::new(),
            silent: BTreeSet::new(),
            version: 0,
        };
        network.changed();
        network
    }

    pub(super) fn view(&self) -> &NetworkView {
        &self.view
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// What was not in the host's own configuration is gone; cables stay as they are.
    pub(super) fn reboot(&mut self) {
        self.view = booted();
        self.changed();
    }

    pub(super) fn change(&mut self, change: &Change) -> Result<(), Refused> {
        let before = self.view.clone();
        perform(&mut self.view, change)?;
        self.settle();
        // Who asked for what was so already has changed nothing.
        if self.view != before {
            self.version += 1;
        }
        Ok(())
    }

    pub(super) fn plug(&mut self, link: &IfName, plugged: bool) -> Result<(), Refused> {
        if !matches!(self.view.links.get(link).map(|link| &link.kind), Some(Kind::Ethernet)) {
            return Err(Refused::NoSuchLink);
        }
        if plugged {
            self.unplugged.remove(link);
        } else {
            self.unplugged.insert(link.clone());
        }
        self.changed();
        Ok(())
    }

    pub(super) fn set_owner(&mut self, link: IfName, owner: Option<Owner>) -> Result<(), Refused> {
        match owner {
            Some(_) if self.owners.len() >= MAX_SETTINGS => return Err(Refused::Range),
            Some(owner) => self.owners.insert(link, owner),
            None => self.owners.remove(&link),
        };
        Ok(())
    }

    pub(super) fn set_facts(&mut self, link: IfName, facts: LinkFacts) -> Result<(), Refused> {
        if self.facts.len() >= MAX_SETTINGS {
            return Err(Refused::Range);
        }
        self.facts.insert(link, facts);
        Ok(())
    }

    pub(super) fn set_silent(&mut self, address: IpAddr, silent: bool) -> Result<(), Refused> {
        if !silent {
            self.silent.remove(&address);
        } else if self.silent.len() >= MAX_SETTINGS {
            return Err(Refused::Range);
        } else {
            self.silent.insert(address);
        }
        Ok(())
    }

    /// Of the links that there are.
    pub(super) fn owners(&self) -> BTreeMap<IfName, Owner> {
        let there = |(link, _): &(&IfName, &Owner)| self.view.links.contains_key(*link);
        self.owners.iter().filter(there).map(|(link, owner)| (link.clone(), *owner)).collect()
    }

    pub(super) fn facts(&self, link: &IfName) -> Result<LinkFacts, Refused> {
        let there = self.view.links.get(link).ok_or(Refused::NoSuchLink)?;
        if let Some(set) = self.facts.get(link) {
            return Ok(set.clone());
        }
        let mut facts = LinkFacts::default();
        match &there.kind {
            Kind::Ethernet => {
                facts.driver = Some("simulated".to_owned());
                facts.permanent_mac = link
                    .as_str()
                    .strip_prefix("eth")
                    .and_then(|n| n.parse().ok())
                    .map(|n| ethernet_mac(n).as_str());
                facts.wake_on = Some(String::new());
                facts.wake_on_supported = Some("g".to_owned());
                facts.autonegotiation = Some(true);
                if there.carrier {
                    (facts.speed_mbps, facts.full_duplex) = (Some(10_000), Some(true));
                }
            }
            Kind::Bond(bond) => {
                facts.driver = Some("bonding".to_owned());
                let ready = |port: &IfName| self.view.links.get(port).is_some_and(|port| port.carrier);
                let primary = bond.primary.clone().filter(|primary| {
                    ready(primary) && self.view.ports(link).any(|(port, _)| port == primary)
                });
                let any = || self.view.ports(link).map(|(port, _)| port.clone()).find(ready);
                facts.active_port = primary.or_else(any).map(|port| port.as_str().to_owned());
            }
            kind => facts.driver = Some(kind.word().to_owned()),
        }
        Ok(facts)
    }

    /// The gateways of the routes: those are asked for by somebody all the time.
    pub(super) fn neighbours(&self) -> Vec<Neighbour> {
        let ways = self.view.routes.iter().flat_map(Route::ways);
        let hops: BTreeSet<(&IfName, IpAddr)> =
            ways.filter_map(|(via, link, _)| Some((link?, via?))).collect();
        let tell = |(link, ip): (&IfName, IpAddr)| {
            let answers = !self.silent.contains(&ip) && leads_out(&self.view, link, MAX_DEPTH);
            let mac = Mac::from_bytes([2, 0, 0, 1, 0, 1]);
            let state = if answers { NeighbourState::Reachable } else { NeighbourState::Failed };
            Neighbour { link: link.clone(), ip, mac: answers.then_some(mac), state }
        };
        hops.into_iter().map(tell).collect()
    }

    /// Its own addresses; and what answers beyond a cable, by the most specific route.
    pub(super) fn reaches(&self, to: IpAddr) -> bool {
        if self.view.holder(to).is_some() {
            return true;
        }
        let attached = self.view.links.iter().filter(|(_, link)| link.up).flat_map(|(name, link)| {
            let networks = link.addresses.iter().filter(|address| address.contains(to));
            networks.map(move |address| (address.prefix, 0, name, to))
        });
        let routed =
            self.view.routes.iter().filter(|route| route.table == MAIN_TABLE && route.to.contains(to));
        let routed = routed.flat_map(|route| {
            let ways = route.ways();
            ways.filter_map(|(via, link, _)| Some((route.to.prefix, route.metric, link?, via.unwrap_or(to))))
        });
        let best =
            attached.chain(routed).max_by_key(|(prefix, metric, ..)| (*prefix, std::cmp::Reverse(*metric)));
        best.is_some_and(|(_, _, link, hop)| {
            !self.silent.contains(&hop)
                && !self.silent.contains(&to)
                && leads_out(&self.view, link, MAX_DEPTH)
        })
    }

    /// The links of a domain, by the bridges that its cards are for: those that are new come, those too many go.
    pub(super) fn set_vifs(&mut self, domid: u32, bridges: &[Option<IfName>]) {
        let Ok(first) = IfName::parse(&format!("vif{domid}.")) else { return };
        let wanted: BTreeMap<IfName, &Option<IfName>> = bridges
            .iter()
            .enumerate()
            .filter_map(|(n, bridge)| Some((IfName::parse(&format!("vif{domid}.{n}")).ok()?, bridge)))
            .collect();
        let there: Vec<IfName> = self
            .view
            .links
            .range(first.clone()..)
            .map(|(name, _)| name)
            .take_while(|name| name.as_str().starts_with(first.as_str()))
            .cloned()
            .collect();
        let mut any = false;
        for gone in there.iter().filter(|name| !wanted.contains_key(*name)) {
            self.view.links.remove(gone);
            any = true;
        }
        for (name, bridge) in wanted.into_iter().filter(|(name, _)| !there.contains(name)) {
            let mac = Some(Mac::from_bytes([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]));
            let mut vif = LinkView { mac, up: true, ..LinkView::new(Kind::Vif) };
            // Where its bridge is not there, its packets go nowhere.
            let bridge = bridge.as_ref().and_then(|bridge| Some((bridge, self.view.links.get(bridge)?)));
            if let Some((bridge, over)) = bridge.filter(|(_, over)| matches!(over.kind, Kind::Bridge(_))) {
                (vif.controller, vif.mtu) = (Some(bridge.clone()), over.mtu);
            }
            self.view.links.insert(name, vif);
            any = true;
        }
        if any {
            self.changed();
        }
    }

    fn changed(&mut self) {
        self.settle();
        self.version += 1;
    }

    /// What follows: whether packets can pass.
    fn settle(&mut self) {
        let carriers: Vec<(IfName, bool)> = self
            .view
            .links
            .iter()
            .filter(|(_, link)| !matches!(link.kind, Kind::Vif))
            .map(|(name, _)| (name.clone(), carrier(&self.view, &self.unplugged, name, MAX_DEPTH)))
            .collect();
        for (name, carrier) in carriers {
            if let Some(link) = self.view.links.get_mut(&name) {
                link.carrier = carrier;
            }
        }
        for link in self.view.links.values_mut().filter(|link| matches!(link.kind, Kind::Vif)) {
            link.carrier = link.up;
        }
    }
}

/// Ethernet: switched on and plugged. A controller: through any of its ports, so one without ports has none.
fn carrier(view: &NetworkView, unplugged: &BTreeSet<IfName>, name: &IfName, depth: usize) -> bool {
    let Some(link) = view.links.get(name).filter(|link| link.up && depth > 0) else { return false };
    match &link.kind {
        Kind::Ethernet => !unplugged.contains(name),
        Kind::Bridge(_) | Kind::Bond(_) => {
            view.ports(name).any(|(port, _)| carrier(view, unplugged, port, depth - 1))
        }
        Kind::Vlan { parent, .. } => carrier(view, unplugged, parent, depth - 1),
        Kind::Veth { peer: Some(peer) } => view.links.get(peer).is_some_and(|peer| peer.up),
        _ => true,
    }
}

/// Whether what is sent by this link can pass a cable.
fn leads_out(view: &NetworkView, name: &IfName, depth: usize) -> bool {
    let Some(link) = view.links.get(name).filter(|link| link.carrier && depth > 0) else { return false };
    match &link.kind {
        Kind::Ethernet => true,
        Kind::Bridge(_) | Kind::Bond(_) => view.ports(name).any(|(port, _)| leads_out(view, port, depth - 1)),
        Kind::Vlan { parent, .. } => leads_out(view, parent, depth - 1),
        Kind::Veth { peer: Some(peer) } => {
            let peer_on = view.links.get(peer).and_then(|peer| peer.controller.as_ref());
            peer_on.is_some_and(|controller| leads_out(view, controller, depth - 1))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(network: &mut Network, change: Change) {
        network.change(&change).unwrap();
    }

    #[test]
    fn a_cable_decides_on_the_carrier_of_all_that_stands_on_it() {
        let mut network = Network::new();
        let carrier = |network: &Network, link: &str| network.view().links[&name(link)].carrier;
        assert!(carrier(&network, "eth0") && carrier(&network, "xenbr0") && carrier(&network, "lo"));
        assert!(!carrier(&network, "eth1"), "it is off");
        assert!(network.reaches(address("192.0.2.1").ip));
        network.plug(&name("eth0"), false).unwrap();
        assert!(!carrier(&network, "eth0") && !carrier(&network, "xenbr0"));
        assert!(!network.reaches(address("192.0.2.1").ip));
        assert!(network.reaches(address("192.0.2.10").ip), "its own");
        assert_eq!(network.plug(&name("xenbr0"), false), Err(Refused::NoSuchLink));
    }

    #[test]
    fn a_domain_keeps_a_bridge_up_but_does_not_lead_out() {
        let mut network = Network::new();
        network.set_vifs(3, &[Some(name("xenbr0"))]);
        done(&mut network, Change::SetController { link: name("eth0"), controller: None });
        assert!(network.view().links[&name("xenbr0")].carrier);
        assert!(!network.reaches(address("198.51.100.1").ip));
        done(&mut network, Change::SetController { link: name("eth0"), controller: Some(name("xenbr0")) });
        assert!(network.reaches(address("198.51.100.1").ip), "by the default route");
        network.set_silent(address("192.0.2.1").ip, true).unwrap();
        assert!(!network.reaches(address("198.51.100.1").ip));
    }

    #[test]
    fn vifs_come_and_go_with_their_domain_and_without_their_bridge_stand_alone() {
        let mut network = Network::new();
        network.set_vifs(1, &[Some(name("xenbr0"))]);
        network.set_vifs(12, &[Some(name("xenbr0")), Some(name("nowhere"))]);
        assert_eq!(network.view().links[&name("vif12.1")].controller, None);
        network.set_vifs(1, &[]);
        assert!(!network.view().links.contains_key(&name("vif1.0")));
        done(&mut network, Change::Delete { link: name("xenbr0") });
        assert_eq!(network.view().links[&name("vif12.0")].controller, None);
        // An old one stays as it is when another card is plugged.
        network.set_vifs(12, &[Some(name("xenbr0")), None, None]);
        assert_eq!(network.view().ports(&name("xenbr0")).count(), 0);
        network.set_vifs(12, &[]);
        network.reboot();
        assert_eq!(network.view(), Network::new().view());
    }

    #[test]
    fn only_what_changes_something_rings() {
        let mut network = Network::new();
        let before = network.version();
        done(&mut network, Change::SetUp { link: name("eth0"), up: true });
        assert!(network.change(&Change::Delete { link: name("no") }).is_err());
        assert_eq!(network.version(), before);
        done(&mut network, Change::SetUp { link: name("eth1"), up: true });
        assert!(network.version() > before);
    }
}
