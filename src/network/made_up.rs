//! Made-up hosts and declarations for the proofs: whatever a tape of bytes says, as near to valid as can be.

use super::{Desired, DesiredLink, LogicalNetwork, Role, VirtualIp, validate};
use crate::model::network::{
    Address, Bond, BondMode, Bridge, Kind, LacpRate, LinkView, Mtu, NetworkView, PortVlan, Route, VlanId,
    XmitHash,
};
use crate::model::{IfName, Label, Mac};
use std::collections::{BTreeMap, BTreeSet};

pub fn name(text: &str) -> IfName {
    IfName::parse(text).unwrap()
}

pub fn address(text: &str) -> Address {
    Address::parse(text).unwrap()
}

pub fn route(to: &str, via: Option<&str>, link: Option<&str>) -> Route {
    Route { via: via.map(|via| via.parse().unwrap()), link: link.map(name), ..Route::new(address(to)) }
}

pub fn vlan_id(id: u64) -> VlanId {
    VlanId::new(id).unwrap()
}

/// A view with these links, on, each with its own MAC.
pub fn host(links: &[(&str, Kind)]) -> NetworkView {
    let mut view = NetworkView::default();
    for (at, (link, kind)) in links.iter().enumerate() {
        let mut made = LinkView::new(kind.clone());
        made.up = true;
        made.carrier = true;
        made.mac = Some(Mac::from_bytes([0x02, 0, 0, 0, 1, u8::try_from(at).unwrap()]));
        view.links.insert(name(link), made);
    }
    view
}

pub fn bond(mode: BondMode) -> Bond {
    Bond { miimon_ms: 100, ..Bond::new(mode) }
}

/// Choices; when it is at its end always the first.
pub struct Tape<'a> {
    bytes: &'a [u8],
}

impl<'a> Tape<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub fn of(&mut self, count: usize) -> usize {
        let Some((first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        usize::from(*first) % count
    }

    fn yes(&mut self) -> bool {
        self.of(2) == 1
    }

    fn one<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.of(all.len())].clone()
    }
}

const ETHERNETS: [&str; 5] = ["eth0", "eth1", "eth2", "eth3", "eth4"];

/// Ports of hardware, some on, some with addresses, and the default route by one.
pub fn bare_host(tape: &mut Tape<'_>) -> NetworkView {
    let mut view = host(&ETHERNETS.map(|name| (name, Kind::Ethernet)));
    view.links.insert(name("lo"), LinkView { up: true, mtu: 65_535, ..LinkView::new(Kind::Loopback) });
    for (at, link) in view.links.values_mut().filter(|link| link.kind == Kind::Ethernet).enumerate() {
        link.up = !tape.yes();
        link.mtu = tape.one(&[1500, 9000, 1400]);
        if tape.yes() {
            link.addresses.insert(address(&format!("172.16.{at}.1/24")));
        }
        if tape.yes() && link.up {
            link.addresses.insert(address(&format!("2001:db8:{at}::1/64")));
        }
    }
    for (at, ethernet) in ETHERNETS.iter().enumerate() {
        let link = &view.links[&name(ethernet)];
        let via = address(&format!("172.16.{at}.254/24"));
        if link.up && link.addresses.iter().any(|one| one.contains(via.ip)) && tape.yes() {
            let to = address(&format!("198.18.{at}.0/24"));
            let mut route = Route { via: Some(via.ip), link: Some(name(ethernet)), ..Route::new(to) };
            // As hosts have them: by somebody else, in a table of its own, with a source, to a gateway that is just there.
            match tape.of(6) {
                1 => route.protocol = 12,
                2 => route.table = 100,
                3 => route.source = Some(address(&format!("172.16.{at}.1")).ip),
                4 => (route.via, route.onlink) = (Some(address("192.88.99.1").ip), true),
                _ => {}
            }
            view.routes.insert(route);
        }
    }
    view
}

pub fn desired(tape: &mut Tape<'_>) -> Desired {
    let mut desired = Desired::default();
    let mut free: Vec<&str> = ETHERNETS.to_vec();
    let mut bases: Vec<&str> = ETHERNETS.to_vec();
    for name in ["d0", "d1"] {
        if tape.yes() {
            add(&mut desired, tape, name, Kind::Dummy);
            free.push(name);
        }
    }
    if tape.yes() {
        let kind = Kind::Vlan { parent: self::name("eth0"), id: vlan_id(9) };
        add(&mut desired, tape, "low9", kind);
        free.push("low9");
    }
    for name in ["x0", "b1"] {
        if tape.yes() {
            let mut bond = bond(tape.one(&[BondMode::ActiveBackup, BondMode::Lacp, BondMode::BalanceAlb]));
            if bond.mode == BondMode::Lacp {
                bond.lacp_rate = tape.one(&[LacpRate::Slow, LacpRate::Fast]);
                bond.xmit_hash = tape.one(&[XmitHash::Layer2, XmitHash::Layer34]);
            }
            let ports = some(tape, &mut free);
            if bond.mode != BondMode::Lacp && tape.yes() {
                bond.primary = ports.first().cloned();
            }
            add(&mut desired, tape, name, Kind::Bond(bond)).ports = ports;
            free.push(name);
            bases.push(name);
        }
    }
    for (vlan, id) in [("v0", 5), ("v1", 6), ("v2", 7)] {
        if tape.yes() {
            let parent = self::name(tape.one(&bases));
            let id = vlan_id(id + u64::from(tape.yes()) * 10);
            add(&mut desired, tape, vlan, Kind::Vlan { parent, id });
            free.push(vlan);
            bases.push(vlan);
        }
    }
    for bridge in ["x0", "br1", "br2"] {
        if tape.yes() && !desired.links.contains_key(&name(bridge)) {
            let (stp, vlan_filtering) = (tape.yes(), tape.yes());
            let options = Bridge { stp, forward_delay_ms: 2000, vlan_filtering };
            let ports = some(tape, &mut free);
            add(&mut desired, tape, bridge, Kind::Bridge(options)).ports.clone_from(&ports);
            for port in ports.iter().chain([&name(bridge)]) {
                if vlan_filtering && tape.yes() {
                    let link =
                        desired.links.entry(port.clone()).or_insert_with(|| DesiredLink::new(Kind::Ethernet));
                    link.vlans = Some(port_vlans(tape));
                }
            }
            if tape.yes() {
                let kind = Kind::Vlan { parent: name(bridge), id: vlan_id(77) };
                add(&mut desired, tape, &format!("{bridge}.77"), kind);
            }
        }
    }
    for ethernet in ETHERNETS {
        if tape.yes() && !desired.links.contains_key(&name(ethernet)) {
            add(&mut desired, tape, ethernet, Kind::Ethernet);
        }
    }
    let mut routes = BTreeSet::new();
    for (at, link) in desired.links.values().enumerate().filter(|(_, link)| link.up) {
        for address in link.addresses.iter().flatten() {
            if tape.yes() {
                let (to, via) = match address.ip.is_ipv4() {
                    true => {
                        (format!("198.18.{at}.0/24"), format!("{}", address.ip).replace(".1.1", ".1.254"))
                    }
                    false => (format!("2001:db8:f{at:x}::/64"), format!("{}fe", address.ip)),
                };
                routes.insert(route(&to, Some(&via), None));
            }
        }
    }
    desired.routes = routes;
    for link in desired.links.keys().cloned().collect::<Vec<_>>() {
        if tape.of(6) == 1 {
            let ip = format!("10.99.0.{}", desired.virtual_ips.len() + 1).parse().unwrap();
            desired.virtual_ips.insert(ip, VirtualIp { link, prefix: 24 });
        } else if tape.of(6) == 1 && desired.networks.is_empty() {
            let roles = BTreeSet::from([Role::Management]);
            desired.networks.insert(Label::parse("mgmt").unwrap(), LogicalNetwork { link, roles });
        }
    }
    desired
}

fn port_vlans(tape: &mut Tape<'_>) -> BTreeSet<PortVlan> {
    let pvid = tape.of(4);
    let all = [1_u64, 20, 30].into_iter().enumerate();
    let some = all.filter(|_| tape.yes());
    let ids: Vec<_> = some.collect();
    ids.into_iter()
        .map(|(at, id)| PortVlan { id: vlan_id(id), pvid: at == pvid, untagged: tape.yes() })
        .collect()
}

fn some(tape: &mut Tape<'_>, free: &mut Vec<&str>) -> BTreeSet<IfName> {
    let mut ports = BTreeSet::new();
    for _ in 0..tape.of(4) {
        if !free.is_empty() {
            ports.insert(name(free.remove(tape.of(free.len()))));
        }
    }
    ports
}

fn add<'a>(desired: &'a mut Desired, tape: &mut Tape<'_>, text: &str, kind: Kind) -> &'a mut DesiredLink {
    let at = desired.links.len();
    let mut link = DesiredLink::new(kind);
    link.up = tape.of(5) != 1;
    link.mtu = tape
        .one(&[None, None, Some(1500), Some(1280), Some(9000), Some(1000)])
        .map(|mtu| Mtu::new(mtu).unwrap());
    if tape.of(5) == 1 {
        link.mac = Some(Mac::from_bytes([0x02, 9, 9, 9, 9, u8::try_from(at).unwrap()]));
    }
    if tape.yes() {
        let mut addresses = BTreeSet::new();
        if tape.yes() {
            addresses.insert(address(&format!("10.{at}.1.1/24")));
        }
        if tape.yes() {
            addresses.insert(address(&format!("fd00:{at:x}::1/64")));
        }
        link.addresses = Some(addresses);
    } else {
        link.dhcp = tape.of(5) == 1;
    }
    desired.links.insert(name(text), link);
    desired.links.get_mut(&name(text)).unwrap()
}

/// Without what is refused, if that can be told from the problems.
pub fn made_valid(mut desired: Desired, before: &Desired, now: &NetworkView) -> Option<Desired> {
    for _ in 0..40 {
        let problems = validate(&desired, before, now, &BTreeMap::new());
        if problems.is_empty() {
            return Some(desired);
        }
        for problem in &problems {
            let parts: Vec<&str> = problem.field.splitn(2, '.').collect();
            let rest = parts.get(1).copied().unwrap_or_default();
            match parts[0] {
                "links" => {
                    let bad = desired.links.keys().filter(|name| {
                        rest.strip_prefix(name.as_str())
                            .is_some_and(|end| end.is_empty() || end.starts_with('.'))
                    });
                    // The longest, since names have dots.
                    let bad = bad.max_by_key(|name| name.as_str().len()).cloned()?;
                    let link = desired.links.get_mut(&bad).unwrap();
                    match rest[bad.as_str().len()..].split('.').nth(1) {
                        Some("mtu") if link.mtu.is_some() => link.mtu = None,
                        Some("addresses") if link.addresses.is_some() => link.addresses = None,
                        Some("dhcp") => link.dhcp = false,
                        Some("mac") => link.mac = None,
                        Some("up") => link.up = !link.up,
                        Some("vlans") => link.vlans = None,
                        Some("ports") => link.ports = BTreeSet::new(),
                        _ => {
                            desired.links.remove(&bad);
                        }
                    }
                }
                "routes" => desired.routes.retain(|route| !rest.starts_with(&route.to.to_string())),
                "networks" => desired.networks.clear(),
                _ => desired.virtual_ips.clear(),
            }
        }
    }
    None
}

/// What others do meanwhile: guests' cards, VLANs and routes that nobody declared.
pub fn others(tape: &mut Tape<'_>, view: &mut NetworkView, number: usize) {
    let bridges: Vec<IfName> = view
        .links
        .iter()
        .filter(|(_, link)| matches!(link.kind, Kind::Bridge(_)))
        .map(|(name, _)| name.clone())
        .collect();
    for (at, bridge) in bridges.into_iter().enumerate() {
        if tape.yes() {
            let card = name(&format!("vif{number}.{at}"));
            view.links.insert(card.clone(), LinkView { up: true, ..LinkView::new(Kind::Vif) });
            let change =
                crate::model::network::Change::SetController { link: card, controller: Some(bridge) };
            crate::model::network::perform(view, &change).unwrap();
        }
    }
    let parents: Vec<IfName> = view
        .links
        .iter()
        .filter(|(_, link)| matches!(link.kind, Kind::Ethernet | Kind::Bond(_)))
        .map(|(name, _)| name.clone())
        .collect();
    for (at, parent) in parents.into_iter().enumerate() {
        if tape.of(4) == 1 {
            let link = name(&format!("own{number}.{at}"));
            let kind =
                Kind::Vlan { parent: parent.clone(), id: vlan_id(100 + u64::try_from(number).unwrap()) };
            let up = view.links[&parent].up;
            let ip = address(&format!("10.{}.{at}.1/24", 100 + number));
            let ip6 = address(&format!("fd00:{number}:{at}:1::1/64"));
            let has_ipv6 = view.links[&parent].mtu >= 1280;
            use crate::model::network::Change;
            let mut changes = vec![
                Change::Create { link: link.clone(), kind, mac: None, mtu: None },
                Change::AddAddress { link: link.clone(), address: ip },
            ];
            if up {
                changes.push(Change::SetUp { link: link.clone(), up });
                let via = Some(address(&format!("10.{}.{at}.254", 100 + number)).ip);
                let to = address(&format!("10.{}.{at}.0/24", 200 + number));
                changes.push(Change::AddRoute {
                    route: Route { via, link: Some(link.clone()), metric: 5, ..Route::new(to) },
                });
            }
            if has_ipv6 && up {
                changes.push(Change::AddAddress { link, address: ip6 });
            }
            for change in changes {
                crate::model::network::perform(view, &change).unwrap();
            }
        }
    }
}
