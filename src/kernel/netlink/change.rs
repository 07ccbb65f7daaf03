//! Each [`Change`] as messages, and the kernel's refusals in our words.
//!
//! Before many changes the link is looked up by its name, which also tells what the kernel would do differently from
//! [`crate::model::network::perform`]: it moves a port from one controller to another without a word, takes away more than
//! one address with a primary one, and removes any route that looks alike.

use super::super::Stopped;
use super::dump::{self, Names};
use super::{DEADLINE, KernelError, Netlink, Refusal, unanswered};
use crate::model::network::{
    Address, Bond, Bridge, Change, Hop, Kind, LacpRate, PortVlan, Refused, Route, VlanId, XmitHash,
};
use crate::model::{IfName, Mac};
use nix::errno::Errno;
use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    AfSpecBridge, BondLacpRate, BondMode, BondXmitHashPolicy, BridgeFlag, BridgeStpState, BridgeVlanInfo,
    BridgeVlanInfoFlags, InfoBond, InfoBridge, InfoData, InfoKind, InfoVeth, InfoVlan, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio_util::task::AbortOnDropHandle;

type Done = Result<(), KernelError>;

impl Netlink {
    /// One after another, on the socket's thread, up to the first that is not done. Whoever stops waiting stops it, but for
    /// the message that is under way.
    pub(in crate::kernel) async fn change(self: &Arc<Self>, changes: Vec<Change>) -> Result<(), Stopped> {
        let thread = match self.open().await {
            Ok(open) => open.thread,
            Err(error) => return Err(Stopped { done: 0, error }),
        };
        let last = changes.len().saturating_sub(1);
        let done = Arc::new(AtomicUsize::new(0));
        let (netlink, count) = (Arc::clone(self), Arc::clone(&done));
        let work = thread.spawn(async move {
            for change in &changes {
                match tokio::time::timeout(DEADLINE, netlink.do_change(change)).await {
                    Ok(done) => done?,
                    Err(_) => return Err(unanswered("no answer in time")),
                }
                count.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        let made = AbortOnDropHandle::new(work).await;
        let error = match made {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => unanswered("the netlink socket broke"),
        };
        Err(Stopped { done: done.load(Ordering::SeqCst).min(last), error })
    }

    async fn do_change(&self, change: &Change) -> Done {
        match change {
            Change::Create { link, kind, mac, mtu } => self.create(link, kind, *mac, *mtu).await,
            Change::Delete { link } => self.delete(link).await,
            Change::SetMtu { link, mtu } => self.set_mtu(link, *mtu).await,
            Change::SetMac { link, mac } => {
                let address = LinkAttribute::Address(mac.as_bytes().to_vec());
                Ok(self.set(link, address).await??)
            }
            Change::SetUp { link, up } => self.set_up(link, *up).await,
            Change::SetController { link, controller } => {
                self.set_controller(link, controller.as_ref()).await
            }
            Change::SetBridge { link, bridge } => self.set_bridge(link, bridge).await,
            Change::SetBond { link, bond } => self.set_bond(link, bond).await,
            Change::AddPortVlan { link, vlan } => self.add_port_vlan(link, *vlan).await,
            Change::DeletePortVlan { link, id } => self.delete_port_vlan(link, *id).await,
            Change::AddAddress { link, address } => self.add_address(link, *address).await,
            Change::DeleteAddress { link, address } => self.delete_address(link, *address).await,
            Change::AddRoute { route } => self.add_route(route).await,
            Change::DeleteRoute { route } => self.delete_route(route).await,
            // The kernel knows nothing of it: `dhcp` does.
            Change::SetDhcp { link, .. } => self.link(link).await.map(drop),
        }
    }

    /// The link of this name.
    async fn link(&self, name: &IfName) -> Result<LinkMessage, KernelError> {
        let mut message = named(name);
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let told = self.get(RouteNetlinkMessage::GetLink(message)).await??;
        told.and_then(dump::new_link).ok_or(KernelError::Refused(Refused::NoSuchLink))
    }

    /// The link of this number.
    pub(super) async fn link_by_index(&self, index: u32) -> Result<LinkMessage, KernelError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let told = self.get(RouteNetlinkMessage::GetLink(message)).await??;
        told.and_then(dump::new_link).ok_or(KernelError::Refused(Refused::NoSuchLink))
    }

    /// One attribute of the link of this name.
    async fn set(&self, name: &IfName, attribute: LinkAttribute) -> Result<Result<(), Refusal>, KernelError> {
        let mut message = named(name);
        message.attributes.push(attribute);
        self.order(RouteNetlinkMessage::SetLink(message), 0).await
    }

    async fn create(&self, name: &IfName, kind: &Kind, mac: Option<Mac>, mtu: Option<u32>) -> Done {
        if mtu.is_some_and(|mtu| !is_mtu(mtu)) {
            return Err(KernelError::Refused(Refused::Range));
        }
        let mut message = LinkMessage::default();
        let attributes = &mut message.attributes;
        attributes.push(LinkAttribute::IfName(name.as_str().to_owned()));
        attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.as_bytes().to_vec())));
        attributes.extend(mtu.map(LinkAttribute::Mtu));
        let (word, data) = match kind {
            Kind::Bond(bond) => {
                let primary = match &bond.primary {
                    Some(primary) => Some(self.link(primary).await?.header.index),
                    None => None,
                };
                (InfoKind::Bond, Some(InfoData::Bond(new_bond(bond, primary))))
            }
            Kind::Bridge(bridge) => (InfoKind::Bridge, Some(InfoData::Bridge(changed_bridge(None, bridge)))),
            Kind::Vlan { parent, id } => {
                let parent = self.link(parent).await?;
                if mtu.is_some_and(|mtu| mtu > dump::mtu(&parent)) {
                    return Err(KernelError::Refused(Refused::Range));
                }
                attributes.push(LinkAttribute::Link(parent.header.index));
                (InfoKind::Vlan, Some(InfoData::Vlan(vec![InfoVlan::Id(id.get())])))
            }
            Kind::Dummy => (InfoKind::Dummy, None),
            Kind::Veth { peer: Some(peer) } => {
                let mut other = LinkMessage::default();
                other.attributes.push(LinkAttribute::IfName(peer.as_str().to_owned()));
                other.attributes.extend(mtu.map(LinkAttribute::Mtu));
                (InfoKind::Veth, Some(InfoData::Veth(InfoVeth::Peer(other))))
            }
            _ => return Err(KernelError::Refused(Refused::NotSupported)),
        };
        let mut infos = vec![LinkInfo::Kind(word)];
        infos.extend(data.map(LinkInfo::Data));
        attributes.push(LinkAttribute::LinkInfo(infos));
        Ok(self.order(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await??)
    }

    async fn delete(&self, name: &IfName) -> Done {
        let found = self.link(name).await?;
        // The kernel would also remove kinds that we do not make.
        let below = found.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => Some((*index, name.clone())),
            _ => None,
        });
        if !dump::kind(&found, &below.into_iter().collect::<Names>()).is_made() {
            return Err(KernelError::Refused(Refused::NotSupported));
        }
        let mut message = LinkMessage::default();
        message.header.index = found.header.index;
        Ok(self.order(RouteNetlinkMessage::DelLink(message), 0).await??)
    }

    async fn set_mtu(&self, name: &IfName, mtu: u32) -> Done {
        let told = self.set(name, LinkAttribute::Mtu(mtu)).await?;
        told.map_err(|refusal| match refusal.errno {
            // The device's limits have that number, with words of their own.
            Errno::EINVAL => KernelError::Refused(Refused::Range),
            _ => refusal.into(),
        })
    }

    async fn set_up(&self, name: &IfName, up: bool) -> Done {
        let mut message = named(name);
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        Ok(self.order(RouteNetlinkMessage::SetLink(message), 0).await??)
    }

    async fn set_controller(&self, name: &IfName, controller: Option<&IfName>) -> Done {
        let port = self.link(name).await?;
        let current = dump::controller(&port);
        let over = match controller {
            Some(controller) => Some(self.link(controller).await?),
            None => None,
        };
        let asked = over.as_ref().map_or(0, |over| over.header.index);
        match current {
            None if controller.is_none() => return Ok(()),
            Some(current) if current == asked => return Ok(()),
            // The kernel would take it away from the one that has it.
            Some(_) if controller.is_some() => return Err(KernelError::Refused(Refused::Busy)),
            _ => {}
        }
        if port.header.flags.contains(LinkFlags::Loopback) {
            return Err(KernelError::Refused(Refused::NotPermitted));
        }
        // Kernels say this by different numbers.
        if over.as_ref().and_then(dump::bridge).is_some() && dump::bridge(&port).is_some() {
            return Err(KernelError::Refused(Refused::Loop));
        }
        let told = self.set(name, LinkAttribute::Controller(asked)).await?;
        told.map_err(|refusal| match refusal.errno {
            // It has no controller: so the controller stands on it (`__netdev_upper_dev_link`, net/core/dev.c).
            Errno::EBUSY => KernelError::Refused(Refused::Loop),
            _ => refusal.into(),
        })
    }

    /// Options of a kind go by RTM_NEWLINK; RTM_SETLINK does not read them.
    async fn set_options(&self, index: u32, kind: InfoKind, data: InfoData) -> Done {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]));
        Ok(self.order(RouteNetlinkMessage::NewLink(message), 0).await??)
    }

    async fn set_bridge(&self, name: &IfName, bridge: &Bridge) -> Done {
        let found = self.link(name).await?;
        let mut old = dump::bridge(&found).ok_or(KernelError::Refused(Refused::NotSupported))?;
        if old.stp && !bridge.stp {
            // Of its own, and first: the kernel sets the delay before the state, whatever stands first in a message
            // (`br_changelink`), and with STP on it takes 2 to 30 s only.
            let off = vec![InfoBridge::StpState(BridgeStpState::Disabled)];
            self.set_options(found.header.index, InfoKind::Bridge, InfoData::Bridge(off)).await?;
            old.stp = false;
        }
        let options = changed_bridge(Some(&old), bridge);
        if options.is_empty() {
            return Ok(());
        }
        self.set_options(found.header.index, InfoKind::Bridge, InfoData::Bridge(options)).await
    }

    async fn set_bond(&self, name: &IfName, bond: &Bond) -> Done {
        let found = self.link(name).await?;
        let mut names = Names::new();
        let mut primary = 0;
        if let Some(wanted) = &bond.primary {
            primary = self.link(wanted).await?.header.index;
            names.insert(primary, wanted.clone());
        }
        if !matches!(dump::kind(&found, &names), Kind::Bond(_)) {
            return Err(KernelError::Refused(Refused::NotSupported));
        }
        let options = changed_bond(&dump::bond(&found, &names), bond, primary);
        self.set_options(found.header.index, InfoKind::Bond, InfoData::Bond(options)).await
    }

    /// The message about one VLAN of a port, and whether the link can have one: it is a bridge, or a bridge's port.
    async fn port_vlan(
        &self,
        name: &IfName,
        id: VlanId,
        flags: BridgeVlanInfoFlags,
    ) -> Result<Option<LinkMessage>, KernelError> {
        let link = self.link(name).await?;
        let is_bridge = dump::bridge(&link).is_some();
        let is_port = match dump::controller(&link) {
            Some(controller) => dump::bridge(&self.link_by_index(controller).await?).is_some(),
            None => false,
        };
        if !is_bridge && !is_port {
            return Ok(None);
        }
        let mut message = LinkMessage::default();
        message.header.interface_family = AddressFamily::Bridge;
        message.header.index = link.header.index;
        let mut specs = Vec::new();
        if is_bridge {
            // BRIDGE_FLAGS_SELF: the bridge's own, not that of a port (linux/if_bridge.h).
            specs.push(AfSpecBridge::Flags(BridgeFlag::LowerDev));
        }
        specs.push(AfSpecBridge::VlanInfo(BridgeVlanInfo { flags, vid: id.get() }));
        message.attributes.push(LinkAttribute::AfSpecBridge(specs));
        Ok(Some(message))
    }

    async fn add_port_vlan(&self, name: &IfName, vlan: PortVlan) -> Done {
        let mut flags = BridgeVlanInfoFlags::empty();
        flags.set(BridgeVlanInfoFlags::Pvid, vlan.pvid);
        flags.set(BridgeVlanInfoFlags::Untagged, vlan.untagged);
        let message = self.port_vlan(name, vlan.id, flags).await?;
        let message = message.ok_or(KernelError::Refused(Refused::NotSupported))?;
        Ok(self.order(RouteNetlinkMessage::SetLink(message), 0).await??)
    }

    async fn delete_port_vlan(&self, name: &IfName, id: VlanId) -> Done {
        let message = self.port_vlan(name, id, BridgeVlanInfoFlags::empty()).await?;
        let message = message.ok_or(KernelError::Refused(Refused::NoSuchVlan))?;
        let told = self.order(RouteNetlinkMessage::DelLink(message), 0).await?;
        told.map_err(|refusal| match refusal.errno {
            Errno::ENOENT => KernelError::Refused(Refused::NoSuchVlan),
            _ => refusal.into(),
        })
    }

    async fn add_address(&self, name: &IfName, address: Address) -> Done {
        let link = self.link(name).await?;
        if address.ip.is_ipv6() && dump::mtu(&link) < 1280 {
            // The kernel has no IPv6 there and says so by different numbers.
            return Err(KernelError::Refused(Refused::Range));
        }
        Ok(self.add_address_at(link.header.index, address).await??)
    }

    async fn add_address_at(&self, index: u32, address: Address) -> Result<Result<(), Refusal>, KernelError> {
        let message = RouteNetlinkMessage::NewAddress(address_message(index, address));
        self.order(message, NLM_F_CREATE | NLM_F_EXCL).await
    }

    /// With the first address of a network the kernel takes the others of that network, unless
    /// net.ipv4.conf.*.promote_secondaries is set (ip-sysctl): those come back.
    async fn delete_address(&self, name: &IfName, address: Address) -> Done {
        let index = self.link(name).await?.header.index;
        let before = if address.ip.is_ipv4() { self.addresses_of(index).await? } else { Vec::new() };
        let message = RouteNetlinkMessage::DelAddress(address_message(index, address));
        self.order(message, 0).await??;
        let siblings = |one: &Address| *one != address && one.network() == address.network();
        if !before.iter().any(siblings) {
            return Ok(());
        }
        let after = self.addresses_of(index).await?;
        for lost in before.into_iter().filter(siblings).filter(|one| !after.contains(one)) {
            self.add_address_at(index, lost).await??;
        }
        Ok(())
    }

    /// In the kernel's order.
    async fn addresses_of(&self, index: u32) -> Result<Vec<Address>, KernelError> {
        let all = dump::addresses(self).await?;
        Ok(all.iter().filter(|one| one.header.index == index).filter_map(dump::address).collect())
    }

    async fn add_route(&self, route: &Route) -> Done {
        let mut numbers = BTreeMap::new();
        for link in route.links() {
            numbers.insert(link, self.link(link).await?.header.index);
        }
        if numbers.is_empty() && route.via.is_none() {
            return Err(KernelError::Refused(Refused::NoSuchLink));
        }
        let message = route_message(route, &numbers);
        let order = self.order(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL).await?;
        let Err(refusal) = order else { return Ok(()) };
        if let (Errno::EINVAL, Some(source)) = (refusal.errno, route.source)
            && !dump::addresses(self).await?.iter().filter_map(dump::address).any(|one| one.ip == source)
        {
            return Err(KernelError::Refused(Refused::NoSuchAddress));
        }
        Err(match refusal.errno {
            // "Nexthop has invalid gateway": one on no network of the link, or an address of our own.
            Errno::EINVAL | Errno::ENETDOWN | Errno::ENODEV if route.has_gateway() => {
                KernelError::Refused(Refused::Unreachable)
            }
            _ => refusal.into(),
        })
    }

    async fn delete_route(&self, route: &Route) -> Done {
        let family = family(route.to.ip);
        let missing = KernelError::Refused(Refused::NoSuchRoute);
        let all = dump::routes(self, family).await?;
        for message in all.into_iter().filter(|message| dump::may_be(message, route)) {
            let Some(found) = self.named(&message, route).await? else { continue };
            if found.does(route) {
                return Ok(self.order(RouteNetlinkMessage::DelRoute(message), 0).await??);
            }
        }
        Err(missing)
    }

    /// What the message tells, its link by the name that is asked for or by any other.
    async fn named(&self, message: &RouteMessage, asked: &Route) -> Result<Option<Route>, KernelError> {
        let mut names = Names::new();
        for index in dump::links_of(message) {
            match self.link_by_index(index).await {
                Ok(link) => names.extend(dump::name(&link).map(|name| (index, name))),
                // It has gone meanwhile, and its routes with it.
                Err(KernelError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let to = |found: &Route| found.to == asked.to.network();
        Ok(dump::route(message, &names).filter(to))
    }
}

/// About the link of this name: with the number 0 the kernel looks it up itself (`rtnl_setlink`, net/core/rtnetlink.c).
fn named(name: &IfName) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.as_str().to_owned()));
    message
}

fn is_mtu(mtu: u32) -> bool {
    (68..=65_535).contains(&mtu)
}

/// The options that differ; of a new bridge, all but VLAN filtering when it is not asked for, since a kernel that lacks it
/// refuses to switch it off as well.
fn changed_bridge(old: Option<&Bridge>, new: &Bridge) -> Vec<InfoBridge> {
    let mut options = Vec::new();
    if old.is_none_or(|old| old.forward_delay_ms != new.forward_delay_ms) {
        options.push(InfoBridge::ForwardDelay(new.forward_delay_ms / 10));
    }
    if old.is_none_or(|old| old.stp != new.stp) {
        let state = if new.stp { BridgeStpState::KernelStp } else { BridgeStpState::Disabled };
        options.push(InfoBridge::StpState(state));
    }
    if old.map_or(new.vlan_filtering, |old| old.vlan_filtering != new.vlan_filtering) {
        options.push(InfoBridge::VlanFiltering(new.vlan_filtering));
    }
    options
}

fn xmit_hash(hash: XmitHash) -> BondXmitHashPolicy {
    match hash {
        XmitHash::Layer2 => BondXmitHashPolicy::Layer2,
        XmitHash::Layer34 => BondXmitHashPolicy::Layer34,
        XmitHash::Layer23 => BondXmitHashPolicy::Layer23,
    }
}

fn lacp_rate(rate: LacpRate) -> BondLacpRate {
    match rate {
        LacpRate::Slow => BondLacpRate::Slow,
        LacpRate::Fast => BondLacpRate::Fast,
    }
}

/// Only what differs from a new bond: the kernel refuses delays without miimon, and LACP's rate in another mode.
fn new_bond(bond: &Bond, primary: Option<u32>) -> Vec<InfoBond> {
    let fresh = Bond::new(bond.mode);
    let mut options = vec![InfoBond::Mode(BondMode::from(bond.mode.number()))];
    options.extend(changed_bond(&fresh, bond, primary.unwrap_or(0)));
    options
}

/// In the order in which the kernel reads them all the same (`bond_changelink`, drivers/net/bonding/bond_netlink.c).
fn changed_bond(old: &Bond, new: &Bond, primary: u32) -> Vec<InfoBond> {
    let mut options = Vec::new();
    let mut add = |differs: bool, option: InfoBond| {
        if differs {
            options.push(option);
        }
    };
    add(old.mode != new.mode, InfoBond::Mode(BondMode::from(new.mode.number())));
    add(old.miimon_ms != new.miimon_ms, InfoBond::MiiMon(new.miimon_ms));
    add(old.up_delay_ms != new.up_delay_ms, InfoBond::UpDelay(new.up_delay_ms));
    add(old.down_delay_ms != new.down_delay_ms, InfoBond::DownDelay(new.down_delay_ms));
    add(old.primary != new.primary, InfoBond::Primary(primary));
    add(old.xmit_hash != new.xmit_hash, InfoBond::XmitHashPolicy(xmit_hash(new.xmit_hash)));
    add(old.lacp_rate != new.lacp_rate, InfoBond::AdLacpRate(lacp_rate(new.lacp_rate)));
    options
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address_message(index: u32, address: Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.index = index;
    message.header.scope = if address.ip.is_loopback() { AddressScope::Host } else { AddressScope::Universe };
    message.attributes.push(AddressAttribute::Address(address.ip));
    match address.ip {
        IpAddr::V4(four) => {
            message.attributes.push(AddressAttribute::Local(address.ip));
            // As ip-address(8) does with `broadcast +`; a network of two has none (RFC 3021).
            if address.prefix < 31 {
                let hosts = u32::MAX.checked_shr(u32::from(address.prefix)).unwrap_or(0);
                let broadcast = Ipv4Addr::from(u32::from(four) | hosts);
                message.attributes.push(AddressAttribute::Broadcast(broadcast));
            }
        }
        IpAddr::V6(_) => {
            // Usable at once, and not after a second of asking whether another host has it.
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
    }
    message
}

fn route_message(route: &Route, numbers: &BTreeMap<&IfName, u32>) -> RouteMessage {
    let route = route.normal();
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.to.ip);
    header.destination_prefix_length = route.to.prefix;
    // A larger number has the attribute alone (RT_TABLE_UNSPEC).
    header.table = u8::try_from(route.table).unwrap_or(0);
    header.protocol =
        if route.protocol == 0 { RouteProtocol::Static } else { RouteProtocol::from(route.protocol) };
    header.kind = RouteType::Unicast;
    header.scope =
        if !route.has_gateway() && route.to.ip.is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    if route.onlink {
        header.flags |= RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    if route.to.prefix > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(route.to.ip)));
    }
    attributes.extend(gateway(&route, route.via));
    attributes
        .extend(route.link.as_ref().and_then(|link| numbers.get(link)).copied().map(RouteAttribute::Oif));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    let rest = |(number, value): (u16, Vec<u8>)| RouteAttribute::Other(DefaultNla::new(number, value));
    attributes.extend(route.rest.iter().cloned().map(rest));
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(RouteAddress::from(source))));
    if !route.hops.is_empty() {
        let hop = |hop: &Hop| {
            let mut message = RouteNextHop::default();
            message.hops = u8::try_from(hop.weight.saturating_sub(1)).unwrap_or(u8::MAX);
            message.interface_index = numbers.get(&hop.link).copied().unwrap_or(0);
            if hop.onlink {
                message.flags |= RouteNextHopFlags::Onlink;
            }
            message.attributes.extend(gateway(&route, hop.via));
            message
        };
        attributes.push(RouteAttribute::MultiPath(route.hops.iter().map(hop).collect()));
    }
    message
}

/// IPv4 by a gateway of IPv6 has an attribute of its own (RFC 5549).
fn gateway(route: &Route, via: Option<IpAddr>) -> Option<RouteAttribute> {
    Some(match via? {
        IpAddr::V6(six) if route.to.ip.is_ipv4() => RouteAttribute::Via(RouteVia::Inet6(six)),
        via => RouteAttribute::Gateway(RouteAddress::from(via)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::network::BondMode as Mode;

    fn bond(mode: Mode) -> Bond {
        Bond { miimon_ms: 100, ..Bond::new(mode) }
    }

    #[test]
    fn a_new_bond_is_asked_for_with_what_differs_from_the_kernels_own_choice() {
        let asked = new_bond(&bond(Mode::ActiveBackup), Some(7));
        assert_eq!(asked, [InfoBond::Mode(BondMode::ActiveBackup), InfoBond::MiiMon(100)]);
        let lacp = Bond { lacp_rate: LacpRate::Fast, xmit_hash: XmitHash::Layer34, ..bond(Mode::Lacp) };
        let rest =
            [InfoBond::XmitHashPolicy(BondXmitHashPolicy::Layer34), InfoBond::AdLacpRate(BondLacpRate::Fast)];
        assert_eq!(new_bond(&lacp, None)[2..], rest);
    }

    #[test]
    fn a_bridge_is_told_only_what_differs() {
        let old = Bridge { stp: false, forward_delay_ms: 15_000, vlan_filtering: false };
        assert!(changed_bridge(Some(&old), &old).is_empty());
        let new = Bridge { stp: true, forward_delay_ms: 4000, vlan_filtering: false };
        let told = changed_bridge(Some(&old), &new);
        assert_eq!(told, [InfoBridge::ForwardDelay(400), InfoBridge::StpState(BridgeStpState::KernelStp)]);
        assert!(!changed_bridge(None, &new).iter().any(|one| matches!(one, InfoBridge::VlanFiltering(_))));
    }

    #[test]
    fn an_ipv4_address_has_the_last_of_its_network_for_broadcast_and_an_ipv6_one_is_usable_at_once() {
        let message = address_message(3, "192.0.2.10/24".parse().unwrap());
        assert!(message.attributes.contains(&AddressAttribute::Broadcast(Ipv4Addr::new(192, 0, 2, 255))));
        let message = address_message(3, "192.0.2.10/31".parse().unwrap());
        assert!(!message.attributes.iter().any(|one| matches!(one, AddressAttribute::Broadcast(_))));
        let message = address_message(3, "2001:db8::1/64".parse().unwrap());
        assert!(message.attributes.contains(&AddressAttribute::Flags(AddressFlags::Nodad)));
    }
}
