//! Changes of a declaration, as the dialect's verbs ask for them: each becomes a new declaration, from what is declared and
//! what is there at that moment. Whoever asks twice gets the same the second time.
//!
//! A link that was never declared is declared as it is, and then changed. Addresses and routes follow their link: into a
//! bridge when it becomes the bridge's port, back when the bridge goes (as the dialect's agent does: the management address
//! is then on the bridge).

use super::desired::{Desired, DesiredLink, VirtualIp};
use super::problem::Problem;
use crate::model::IfName;
use crate::model::network::{Address, Bond, BondMode, Bridge, Kind, Mtu, NetworkView, Route, VlanId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// How often a new bond looks at its ports' carriers.
const MIIMON_MS: u32 = 100;
/// Of a note about a link.
pub const MAX_META_BYTES: usize = 4096;

pub type Meta = BTreeMap<IfName, String>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// A bridge on a link, or on a VLAN of it.
    Bridge {
        bridge: IfName,
        link: IfName,
        vlan: Option<VlanId>,
    },
    /// A bridge without any port of the host's: refused if a bridge of that name is there.
    LocalBridge {
        bridge: IfName,
    },
    /// The bridge goes; `with_vlan`: and with it the VLAN that was made for it.
    NoBridge {
        bridge: IfName,
        with_vlan: bool,
    },
    Vlan {
        link: IfName,
        id: VlanId,
    },
    NoVlan {
        link: IfName,
        id: VlanId,
    },
    /// Exactly this address.
    Static {
        link: IfName,
        address: Address,
    },
    Dhcp {
        link: IfName,
    },
    Flush {
        link: IfName,
    },
    /// Empty: forgets it.
    Meta {
        link: IfName,
        text: String,
    },
    Bond {
        bond: IfName,
        mode: BondMode,
    },
    NoBond {
        bond: IfName,
    },
    BondMode {
        bond: IfName,
        mode: BondMode,
    },
    BondPort {
        bond: IfName,
        port: IfName,
    },
    NoBondPort {
        bond: IfName,
        port: IfName,
    },
    Mtu {
        link: IfName,
        mtu: Mtu,
    },
    /// On the link that holds the base address.
    VirtualIp {
        ip: IpAddr,
        base: IpAddr,
    },
    NoVirtualIp {
        ip: IpAddr,
    },
    /// A network that is reached by this link.
    Control {
        link: IfName,
        network: Address,
    },
}

/// The name that the dialect gives a VLAN's link: `eth0.7`.
pub fn vlan_name(link: &IfName, id: VlanId) -> Result<IfName, Problem> {
    IfName::parse(&format!("{link}.{id}")).map_err(|error| Problem::new("vlan", error.to_string()))
}

impl Ask {
    /// The declaration, and the notes, with this done.
    pub fn resolve(
        &self,
        declared: &Desired,
        meta: &Meta,
        now: &NetworkView,
    ) -> Result<(Desired, Meta), Problem> {
        let mut edit = Edit { desired: declared.clone(), now };
        let mut meta = meta.clone();
        match self {
            Self::Bridge { bridge, link, vlan } => edit.bridge(bridge, link, *vlan)?,
            Self::LocalBridge { bridge } => {
                if edit.is_known(bridge) {
                    return Err(Problem::new(
                        "bridge",
                        format!("Bridge {bridge} Is Busy: it is there already"),
                    ));
                }
                edit.desired.links.insert(bridge.clone(), DesiredLink::new(Kind::Bridge(Bridge::default())));
            }
            Self::NoBridge { bridge, with_vlan } => edit.no_bridge(bridge, *with_vlan)?,
            Self::Vlan { link, id } => {
                edit.vlan(link, *id)?;
            }
            Self::NoVlan { link, id } => edit.remove(&vlan_name(link, *id)?, "vlan")?,
            Self::Static { link, address } => {
                let one = edit.declare(link, "interface")?;
                one.addresses = Some(BTreeSet::from([*address]));
                one.dhcp = false;
            }
            Self::Dhcp { link } => {
                let one = edit.declare(link, "interface")?;
                one.addresses = None;
                one.dhcp = true;
            }
            Self::Flush { link } => {
                let one = edit.declare(link, "interface")?;
                one.addresses = Some(BTreeSet::new());
                one.dhcp = false;
                edit.drop_routes_by(link);
            }
            Self::Meta { link, text } => note(&mut meta, &edit, link, text)?,
            Self::Bond { bond, mode } => edit.bond(bond, *mode)?,
            Self::NoBond { bond } => edit.remove(bond, "bond")?,
            Self::BondMode { bond, mode } => edit.bond_mode(bond, *mode)?,
            Self::BondPort { bond, port } => edit.bond_port(bond, port)?,
            Self::NoBondPort { bond, port } => {
                edit.options(bond)?;
                if !edit.declare(bond, "bond")?.ports.remove(port) {
                    return Err(Problem::new("backup", format!("{port} is no port of {bond}")));
                }
            }
            Self::Mtu { link, mtu } => edit.declare(link, "interface")?.mtu = Some(*mtu),
            Self::VirtualIp { ip, base } => edit.virtual_ip(*ip, *base)?,
            Self::NoVirtualIp { ip } => {
                // A master that has lost the address gives it back all the same.
                edit.desired.virtual_ips.remove(ip);
            }
            Self::Control { link, network } => edit.control(link, *network)?,
        }
        Ok((edit.desired, meta))
    }
}

fn note(meta: &mut Meta, edit: &Edit<'_>, link: &IfName, text: &str) -> Result<(), Problem> {
    if !edit.is_known(link) {
        return Err(Problem::new("interface", format!("there is no link {link}")));
    }
    if text.len() > MAX_META_BYTES || text.starts_with(' ') || text.chars().any(char::is_control) {
        let why = format!("is not taken; allowed: at most {MAX_META_BYTES} bytes of text, not first a space");
        return Err(Problem::new("data", why));
    }
    match text.is_empty() {
        true => meta.remove(link),
        false => meta.insert(link.clone(), text.to_owned()),
    };
    Ok(())
}

struct Edit<'a> {
    desired: Desired,
    now: &'a NetworkView,
}

impl Edit<'_> {
    fn is_known(&self, link: &IfName) -> bool {
        self.desired.links.contains_key(link) || self.now.links.contains_key(link)
    }

    /// The link's declaration; if it has none yet, one as the link is.
    fn declare(&mut self, link: &IfName, field: &str) -> Result<&mut DesiredLink, Problem> {
        if !self.desired.links.contains_key(link) {
            let is = self
                .now
                .links
                .get(link)
                .ok_or_else(|| Problem::new(field, format!("there is no link {link}")))?;
            let kind = if is.kind.is_made() && !matches!(is.kind, Kind::Veth { .. }) {
                is.kind.clone()
            } else {
                Kind::Ethernet
            };
            let mut one = DesiredLink::new(kind);
            one.up = is.up;
            let own = self.now.ports(link).filter(|(_, port)| !port.kind.is_others());
            one.ports = own.map(|(port, _)| port.clone()).collect();
            self.desired.links.insert(link.clone(), one);
        }
        Ok(self.desired.links.get_mut(link).expect("it was there, or has just been put there"))
    }

    fn remove(&mut self, link: &IfName, field: &str) -> Result<(), Problem> {
        // Declared first, so that what is there is removed even if it was made by somebody else.
        if !self.is_known(link) {
            return Err(Problem::new(field, format!("there is no link {link}")));
        }
        if !self.desired.links.contains_key(link) {
            let why = format!("{link} is not managed here: only what was declared is removed");
            return Err(Problem::new(field, why));
        }
        self.desired.links.remove(link);
        for other in self.desired.links.values_mut() {
            other.ports.remove(link);
        }
        self.desired.networks.retain(|_, network| network.link != *link);
        self.desired.virtual_ips.retain(|_, virtual_ip| virtual_ip.link != *link);
        self.drop_routes_by(link);
        Ok(())
    }

    /// The declared routes that lead by a link: that say so, or do so now.
    fn drop_routes_by(&mut self, link: &IfName) {
        let by = |route: &Route| route.links().any(|one| one == link);
        let leads_by = |declared: &Route| {
            self.now.routes_to(declared.to.network()).any(|is| is.does(declared) && by(is))
        };
        self.desired.routes.retain(|route| !by(route) && !leads_by(route));
    }

    /// Options that the mode does not know end with the one that knew them.
    fn bond_mode(&mut self, bond: &IfName, mode: BondMode) -> Result<(), Problem> {
        let options = self.options(bond)?;
        options.mode = mode;
        match mode {
            BondMode::Lacp => options.primary = None,
            _ => (options.lacp_rate, options.xmit_hash) = Default::default(),
        }
        if mode != BondMode::ActiveBackup && options.miimon_ms == 0 {
            options.miimon_ms = MIIMON_MS;
        }
        Ok(())
    }

    fn vlan(&mut self, link: &IfName, id: VlanId) -> Result<IfName, Problem> {
        if !self.is_known(link) {
            return Err(Problem::new("interface", format!("there is no link {link}")));
        }
        // A VLAN is on only while what it stands on is.
        if self.now.links.get(link).is_some_and(|is| !is.up) {
            self.declare(link, "interface")?.up = true;
        }
        let name = vlan_name(link, id)?;
        let kind = Kind::Vlan { parent: link.clone(), id };
        self.desired.links.entry(name.clone()).or_insert_with(|| DesiredLink::new(kind));
        Ok(name)
    }

    fn bridge(&mut self, bridge: &IfName, link: &IfName, vlan: Option<VlanId>) -> Result<(), Problem> {
        if !self.is_known(link) {
            return Err(Problem::new("net_dev", format!("there is no link {link}")));
        }
        let port = match vlan {
            Some(id) => self.vlan(link, id)?,
            None => link.clone(),
        };
        if self.is_known(bridge) {
            let one = self.declare(bridge, "bridge")?;
            if !matches!(one.kind, Kind::Bridge(_)) {
                return Err(Problem::new("bridge", format!("{bridge} is there, and is no bridge")));
            }
            one.ports.insert(port.clone());
        } else {
            let mut one = DesiredLink::new(Kind::Bridge(Bridge::default()));
            one.ports.insert(port.clone());
            self.desired.links.insert(bridge.clone(), one);
        }
        self.declare_port(&port)?;
        self.move_addresses(&port, bridge)
    }

    /// A port of its own is declared too, so that it is switched on.
    fn declare_port(&mut self, port: &IfName) -> Result<(), Problem> {
        if self.now.links.contains_key(port) {
            self.declare(port, "net_dev")?.up = true;
        }
        Ok(())
    }

    /// The bridge's only port gets back what the bridge has.
    fn no_bridge(&mut self, bridge: &IfName, with_vlan: bool) -> Result<(), Problem> {
        let Some(one) = self.desired.links.get(bridge) else {
            // There or not: the one word for what is no link, and for what is not ours to remove.
            return self.remove(bridge, "bridge");
        };
        if !matches!(one.kind, Kind::Bridge(_)) {
            return Err(Problem::new("bridge", format!("{bridge} is no bridge")));
        }
        if let Some((vif, _)) = self.now.ports(bridge).find(|(_, port)| port.kind == Kind::Vif) {
            return Err(Problem::new("bridge", format!("{bridge} is in use by {vif}, a running VM's")));
        }
        let ports = one.ports.clone();
        if let (1, Some(port)) = (ports.len(), ports.first()) {
            match self.desired.links.get(port).map(|port| &port.kind) {
                Some(Kind::Vlan { .. }) if with_vlan => self.remove(port, "net_dev")?,
                _ => self.move_addresses(bridge, port)?,
            }
        }
        self.remove(bridge, "bridge")
    }

    /// What one link has becomes the other's, with the routes by it and the networks on it.
    fn move_addresses(&mut self, from: &IfName, to: &IfName) -> Result<(), Problem> {
        let dhcp = self.desired.links.get(from).is_some_and(|link| link.dhcp);
        let declared = self.desired.links.get(from).and_then(|link| link.addresses.clone());
        let is = || self.now.links.get(from).map(|link| link.addresses.clone()).unwrap_or_default();
        // What a lease brought comes anew with the other link's.
        let addresses: BTreeSet<Address> = if dhcp { BTreeSet::new() } else { declared.unwrap_or_else(is) };
        if addresses.is_empty() && !dhcp {
            return Ok(());
        }
        let target = self.declare(to, "bridge")?;
        target.dhcp |= dhcp;
        if !addresses.is_empty() {
            target.addresses.get_or_insert_with(BTreeSet::new).extend(addresses);
        }
        let source = self.declare(from, "net_dev")?;
        source.addresses = Some(BTreeSet::new());
        source.dhcp = false;
        let by = |route: &Route| route.links().any(|link| link == from);
        let declared = |is: &Route| self.desired.routes.iter().any(|declared| is.does(declared));
        let moved: Vec<Route> =
            self.now.routes.iter().filter(|is| by(is) && (!dhcp || declared(is))).cloned().collect();
        self.drop_routes_by(from);
        for mut route in moved {
            (route.protocol, route.rest) = (0, Vec::new());
            let links = route.link.iter_mut().chain(route.hops.iter_mut().map(|hop| &mut hop.link));
            links.filter(|link| *link == from).for_each(|link| link.clone_from(to));
            self.desired.routes.insert(route);
        }
        for network in self.desired.networks.values_mut().filter(|network| network.link == *from) {
            network.link = to.clone();
        }
        for virtual_ip in self.desired.virtual_ips.values_mut().filter(|one| one.link == *from) {
            virtual_ip.link = to.clone();
        }
        Ok(())
    }

    fn bond(&mut self, bond: &IfName, mode: BondMode) -> Result<(), Problem> {
        if self.is_known(bond) {
            self.options(bond)?;
            return Ok(());
        }
        let options = Bond { miimon_ms: MIIMON_MS, ..Bond::new(mode) };
        self.desired.links.insert(bond.clone(), DesiredLink::new(Kind::Bond(options)));
        Ok(())
    }

    fn options(&mut self, bond: &IfName) -> Result<&mut Bond, Problem> {
        match &mut self.declare(bond, "bond")?.kind {
            Kind::Bond(options) => Ok(options),
            _ => Err(Problem::new("bond", format!("{bond} is no bond"))),
        }
    }

    fn bond_port(&mut self, bond: &IfName, port: &IfName) -> Result<(), Problem> {
        self.options(bond)?;
        // A bond switches its ports on.
        self.declare(port, "backup")?.up = true;
        self.declare(bond, "bond")?.ports.insert(port.clone());
        self.move_addresses(port, bond)
    }

    fn virtual_ip(&mut self, ip: IpAddr, base: IpAddr) -> Result<(), Problem> {
        let Some(link) = self.now.holder(base).cloned() else {
            return Err(Problem::new("base_ip", format!("no link of this host has the address {base}")));
        };
        if ip == base || (self.now.holder(ip).is_some() && !self.desired.virtual_ips.contains_key(&ip)) {
            return Err(Problem::new("virtual_ip", format!("{ip} is this host's own address")));
        }
        let prefix = if ip.is_ipv4() { 32 } else { 128 };
        self.desired.virtual_ips.insert(ip, VirtualIp { link, prefix });
        Ok(())
    }

    fn control(&mut self, link: &IfName, network: Address) -> Result<(), Problem> {
        let Some(is) = self.now.links.get(link) else {
            return Err(Problem::new("interface", format!("there is no link {link}")));
        };
        let declared =
            self.desired.links.get(link).and_then(|link| link.addresses.clone()).unwrap_or_default();
        let on_it = |address: &Address| address.network() == network.network();
        if !is.addresses.iter().chain(&declared).any(on_it) {
            let to = network.network();
            self.desired.routes.insert(Route { link: Some(link.clone()), ..Route::new(to) });
        }
        Ok(())
    }
}
