//! The network as a tree for a terminal: bridges and what hangs on them, each link once.

use super::Desired;
use super::aim::vlans_by_parent;
use crate::model::IfName;
use crate::model::network::{Kind, LinkView, NetworkView, Owner};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Bridges first, with their ports below; a bond with its ports below; VLANs below their parent, unless they are a port of
/// something: then there, with the parent's name. Then links without any relation.
pub fn diagram(view: &NetworkView, desired: &Desired, owners: &BTreeMap<IfName, Owner>) -> String {
    let mut drawing = Drawing {
        view,
        desired,
        owners,
        ports: BTreeMap::new(),
        vlans: vlans_by_parent(view),
        drawn: BTreeSet::new(),
        roles: roles(desired),
        text: String::new(),
    };
    for (name, link) in &view.links {
        if let Some((controller, _)) =
            link.controller.as_ref().and_then(|over| view.links.get_key_value(over))
        {
            drawing.ports.entry(controller).or_default().push(name);
        }
    }
    let rank = |(name, link): (&IfName, &LinkView)| match &link.kind {
        _ if drawing.is_below(name, link) => 3,
        Kind::Bridge(_) => 0,
        _ if drawing.ports.contains_key(name) || drawing.vlans.contains_key(name) => 1,
        _ => 2,
    };
    let mut roots: Vec<(u8, &IfName)> = view.links.iter().map(|link| (rank(link), link.0)).collect();
    roots.sort();
    // The last are below others, or in a ring without a top.
    for (_, name) in roots {
        drawing.tree(name);
    }
    drawing.text
}

fn roles(desired: &Desired) -> BTreeMap<&IfName, Vec<String>> {
    let mut roles: BTreeMap<&IfName, Vec<String>> = BTreeMap::new();
    for (label, network) in &desired.networks {
        let words: Vec<&str> = network.roles.iter().map(|role| role.as_str()).collect();
        let label: String = label.as_str().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let told = if words.is_empty() { label } else { format!("{label}: {}", words.join(" ")) };
        roles.entry(&network.link).or_default().push(told);
    }
    roles
}

struct Drawing<'a> {
    view: &'a NetworkView,
    desired: &'a Desired,
    owners: &'a BTreeMap<IfName, Owner>,
    ports: BTreeMap<&'a IfName, Vec<&'a IfName>>,
    vlans: BTreeMap<&'a IfName, Vec<&'a IfName>>,
    drawn: BTreeSet<&'a IfName>,
    roles: BTreeMap<&'a IfName, Vec<String>>,
    text: String,
}

impl<'a> Drawing<'a> {
    fn is_below(&self, name: &IfName, link: &LinkView) -> bool {
        let is_there = |over: &IfName| over != name && self.view.links.contains_key(over);
        let stands = matches!(&link.kind, Kind::Vlan { parent, .. } if is_there(parent));
        stands || link.controller.as_ref().is_some_and(is_there)
    }

    /// Without recursion: a hostile view may be deep.
    fn tree(&mut self, root: &'a IfName) {
        let mut waiting: Vec<(&IfName, String, &str, &str)> = vec![(root, String::new(), "", "")];
        while let Some((name, before, branch, under)) = waiting.pop() {
            if !self.drawn.insert(name) {
                continue;
            }
            let line = self.line(name);
            let _ = writeln!(self.text, "{before}{branch}{line}");
            let below = self.below(name);
            // What is deeper than a terminal is wide is not pushed further in.
            let before = if before.len() < 120 { format!("{before}{under}") } else { before };
            let last = below.len().saturating_sub(1);
            for (at, below) in below.into_iter().enumerate().rev() {
                let (branch, under) = if at == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
                waiting.push((below, before.clone(), branch, under));
            }
        }
    }

    fn below(&self, name: &IfName) -> Vec<&'a IfName> {
        let is_port = |vlan: &&&IfName| {
            let controller = self.view.links.get(**vlan).and_then(|link| link.controller.as_ref());
            controller.is_some_and(|controller| self.view.links.contains_key(controller))
        };
        let ports = self.ports.get(name).into_iter().flatten();
        let vlans = self.vlans.get(name).into_iter().flatten().filter(|vlan| !is_port(vlan));
        let all: Vec<&IfName> = ports.chain(vlans).copied().collect();
        all.into_iter().filter(|below| !self.drawn.contains(*below)).collect()
    }

    fn line(&self, name: &IfName) -> String {
        let Some(link) = self.view.links.get(name) else { return name.to_string() };
        let mut line = format!("{name}  {}", kind(&link.kind));
        let state = match (link.up, link.carrier) {
            (false, _) => "off",
            (true, false) => "no carrier",
            (true, true) => "up",
        };
        let _ = write!(line, ", {state}");
        if link.mtu != 1500 {
            let _ = write!(line, ", MTU {}", link.mtu);
        }
        if !link.vlans.is_empty() {
            let ids: Vec<String> = link.vlans.iter().take(8).map(|vlan| vlan.id.to_string()).collect();
            let more = link.vlans.len() - ids.len();
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let _ = write!(line, ", VLANs {}{more}", ids.join(" "));
        }
        if link.dhcp {
            line.push_str("  DHCP");
        }
        for address in &link.addresses {
            let is_virtual = self.desired.virtual_ips.get(&address.ip).is_some_and(|one| one.link == *name);
            let _ = write!(line, "  {address}{}", if is_virtual { " (virtual)" } else { "" });
        }
        for roles in self.roles.get(name).into_iter().flatten() {
            let _ = write!(line, "  [{roles}]");
        }
        if let Some(owner) = self.owners.get(name) {
            let _ = write!(line, "  ({owner})");
        }
        line
    }
}

fn kind(kind: &Kind) -> String {
    match kind {
        Kind::Bond(bond) => format!("bond {}", bond.mode),
        Kind::Bridge(bridge) if bridge.stp => "bridge with STP".to_owned(),
        Kind::Vlan { parent, id } => format!("VLAN {id} on {parent}"),
        Kind::Veth { peer: Some(peer) } => format!("veth to {peer}"),
        Kind::Other { word } => word.chars().take(20).map(|c| if c.is_control() { '?' } else { c }).collect(),
        other => other.to_string(),
    }
}
