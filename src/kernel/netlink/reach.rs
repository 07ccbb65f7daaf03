//! Whether an address answers: by the kernel's route to it and the neighbour that the route leads to.
//!
//! A neighbour's entry says what was true when it was last confirmed, up to a minute ago, and a change of ours may have been
//! since. So an entry that holds a hardware address is set to be probed now (NUD_PROBE), and one that holds none to be
//! resolved (NTF_USE); what the kernel then says is the answer (rtnetlink(7), arp(7), net/core/neighbour.c).

use super::dump;
use super::{KernelError, Netlink};
use crate::model::network::Refused;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// Three probes a second apart (`ucast_solicit`, `mcast_solicit`, `retrans_time_ms`; arp(7)), and a second more.
const PATIENCE: Duration = Duration::from_millis(4200);
/// A first resolution that takes longer is none: whoever asks, asks again.
const RESOLUTION: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Where packets to an address go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hop {
    link: u32,
    neighbour: IpAddr,
}

/// What a neighbour's entry says, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    /// It needs no answer: set by hand, or on a link without neighbours.
    Fixed,
    /// It was confirmed, lately or just now; with its hardware address.
    Answers(Vec<u8>),
    /// It has answered once.
    Known(Vec<u8>),
    /// The kernel is asking, and had a hardware address before.
    Probed,
    /// The kernel is asking for the first time.
    Resolving,
    /// It did not answer, or was never asked.
    Silent,
}

impl Netlink {
    pub(in crate::kernel) async fn reaches(&self, address: IpAddr) -> Result<bool, KernelError> {
        match tokio::time::timeout(super::DEADLINE, self.find_out(address)).await {
            Ok(answer) => answer,
            Err(_) => Err(KernelError::Unanswered("no answer in time".to_owned())),
        }
    }

    async fn find_out(&self, address: IpAddr) -> Result<bool, KernelError> {
        let Some(route) = self.route_to(address).await? else { return Ok(false) };
        if matches!(route.header.kind, RouteType::Local) {
            return Ok(true);
        }
        let Some(hop) = hop(&route, address) else { return Ok(false) };
        let link = match self.link_by_index(hop.link).await {
            Ok(link) => link,
            Err(KernelError::Refused(Refused::NoSuchLink)) => return Ok(false),
            Err(error) => return Err(error),
        };
        let flags = link.header.flags;
        if !flags.contains(LinkFlags::Up | LinkFlags::LowerUp) {
            return Ok(false);
        }
        if flags.intersects(LinkFlags::Noarp | LinkFlags::Loopback) {
            return Ok(true);
        }
        self.probe(hop).await
    }

    /// The kernel's choice. `None`: no route, or one that says no.
    async fn route_to(&self, address: IpAddr) -> Result<Option<RouteMessage>, KernelError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(address);
        message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(address)));
        // Any refusal is the route's own: unreachable, prohibit, blackhole have numbers of their own.
        match self.get(RouteNetlinkMessage::GetRoute(message)).await? {
            Ok(Some(RouteNetlinkMessage::NewRoute(route))) => Ok(Some(route)),
            _ => Ok(None),
        }
    }

    async fn probe(&self, hop: Hop) -> Result<bool, KernelError> {
        match self.entry(hop).await? {
            Entry::Fixed => return Ok(true),
            // One that answered a while ago is asked again, by its hardware address.
            Entry::Answers(hardware) | Entry::Known(hardware) => self.provoke(hop, Some(hardware)).await?,
            Entry::Silent => self.provoke(hop, None).await?,
            Entry::Probed | Entry::Resolving => {}
        }
        let began = Instant::now();
        loop {
            match self.entry(hop).await? {
                Entry::Fixed | Entry::Answers(_) => return Ok(true),
                Entry::Silent => return Ok(false),
                Entry::Resolving if began.elapsed() > RESOLUTION => return Ok(false),
                _ if began.elapsed() > PATIENCE => return Ok(false),
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// Has the kernel ask the neighbour now.
    async fn provoke(&self, hop: Hop, hardware: Option<Vec<u8>>) -> Result<(), KernelError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(hop.neighbour);
        message.header.ifindex = hop.link;
        message.attributes.push(NeighbourAttribute::Destination(destination(hop.neighbour)));
        match hardware {
            Some(hardware) => {
                message.header.state = NeighbourState::Probe;
                message.attributes.push(NeighbourAttribute::LinkLayerAddress(hardware));
            }
            None => message.header.flags = NeighbourFlags::Use,
        }
        let message = RouteNetlinkMessage::NewNeighbour(message);
        Ok(self.order(message, NLM_F_CREATE | NLM_F_REPLACE).await??)
    }

    async fn entry(&self, hop: Hop) -> Result<Entry, KernelError> {
        // The whole table: single entries can be asked for only since Linux 5.0.
        let mut message = NeighbourMessage::default();
        message.header.family = family(hop.neighbour);
        let all = self.dump(RouteNetlinkMessage::GetNeighbour(message)).await?;
        let entries = all.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(entry) => Some(entry),
            _ => None,
        });
        Ok(entry(entries, hop))
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn destination(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(four) => NeighbourAddress::Inet(four),
        IpAddr::V6(six) => NeighbourAddress::Inet6(six),
    }
}

fn hop(route: &RouteMessage, address: IpAddr) -> Option<Hop> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let mut hop = Hop { link: 0, neighbour: address };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hop.link = *index,
            RouteAttribute::Gateway(gateway) => hop.neighbour = dump::ip(gateway)?,
            _ => {}
        }
    }
    (hop.link != 0).then_some(hop)
}

fn entry<'a>(entries: impl Iterator<Item = &'a NeighbourMessage>, hop: Hop) -> Entry {
    let wanted = NeighbourAttribute::Destination(destination(hop.neighbour));
    let mut entries =
        entries.filter(|one| one.header.ifindex == hop.link && one.attributes.contains(&wanted));
    let Some(entry) = entries.next() else { return Entry::Silent };
    let hardware = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => Some(bytes.clone()),
        _ => None,
    });
    match (entry.header.state, hardware) {
        (NeighbourState::Noarp | NeighbourState::Permanent, _) => Entry::Fixed,
        (NeighbourState::Reachable, hardware) => Entry::Answers(hardware.unwrap_or_default()),
        (NeighbourState::Stale | NeighbourState::Delay, Some(hardware)) => Entry::Known(hardware),
        (NeighbourState::Probe, _) => Entry::Probed,
        (NeighbourState::Incomplete, _) => Entry::Resolving,
        _ => Entry::Silent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn neighbour(link: u32, ip: &str, state: NeighbourState, hardware: bool) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = link;
        message.header.state = state;
        message.attributes.push(NeighbourAttribute::Destination(destination(ip.parse().unwrap())));
        if hardware {
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 1]));
        }
        message
    }

    #[test]
    fn an_entry_counts_on_its_link_alone_and_a_stale_one_is_no_answer() {
        let table = [
            neighbour(2, "192.0.2.1", NeighbourState::Reachable, true),
            neighbour(3, "192.0.2.1", NeighbourState::Stale, true),
            neighbour(3, "192.0.2.2", NeighbourState::Failed, false),
            neighbour(3, "192.0.2.3", NeighbourState::Permanent, true),
        ];
        let at = |ip: &str| entry(table.iter(), Hop { link: 3, neighbour: ip.parse().unwrap() });
        assert_eq!(at("192.0.2.1"), Entry::Known(vec![2, 0, 0, 0, 0, 1]));
        assert_eq!(at("192.0.2.2"), Entry::Silent);
        assert_eq!(at("192.0.2.3"), Entry::Fixed);
        assert_eq!(at("192.0.2.9"), Entry::Silent);
    }

    #[test]
    fn the_first_hop_is_the_gateway_or_the_address_itself_and_only_a_unicast_route_has_one() {
        let to: IpAddr = "198.51.100.7".parse().unwrap();
        let gateway: IpAddr = "192.0.2.1".parse().unwrap();
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        assert_eq!(hop(&route, to), None, "by no link");
        route.attributes.push(RouteAttribute::Oif(3));
        assert_eq!(hop(&route, to), Some(Hop { link: 3, neighbour: to }));
        route.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        assert_eq!(hop(&route, to), Some(Hop { link: 3, neighbour: gateway }));
        route.header.kind = RouteType::BlackHole;
        assert_eq!(hop(&route, to), None);
    }
}
