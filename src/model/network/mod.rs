//! Words of the network that drivers, the simulated world and the network's domain share: what a kernel has
//! ([`NetworkView`]), and what may be asked of it ([`Change`]).
//!
//! A *link* is what the kernel calls a network device. A *controller* is the bond or bridge that a link is a *port* of.
//! A view holds only what somebody may want to have: not the addresses and routes that the kernel makes by itself
//! (link-local addresses, routes to a network that an address brings), since they come and go with what they follow from.
//!
//! [`perform`] says what a change does to a view. The simulated kernel and the planner's proofs stand on it; the contract
//! suite of the kernel's bodies shows that the real one does the same.

mod ground;
mod perform;
mod route;
mod view;

pub use ground::Ground;
pub use perform::{Refused, perform};
pub use route::{Hop, LOCAL_TABLE, MAIN_TABLE, Route};
pub use view::{
    Address, Bond, BondMode, Bridge, Changed, Kind, LacpRate, LinkFacts, LinkView, Neighbour, NeighbourState,
    NetworkView, Owner, PortVlan, XmitHash,
};

use super::{IfName, Invalid, Mac};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The tag of a VLAN: 1 to 4094 (IEEE 802.1Q keeps 0 and 4095).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VlanId(u16);

impl VlanId {
    pub fn new(id: u64) -> Result<Self, Invalid> {
        match u16::try_from(id) {
            Ok(id @ 1..=4094) => Ok(Self(id)),
            _ => Err(Invalid::new("VLAN id", format!("{id} is not one"), "1 to 4094")),
        }
    }

    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u64> for VlanId {
    type Error = Invalid;
    fn try_from(id: u64) -> Result<Self, Invalid> {
        Self::new(id)
    }
}

impl From<VlanId> for u64 {
    fn from(id: VlanId) -> Self {
        u64::from(id.0)
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The largest packet of a link, bytes: 68 (RFC 791) to 65,535. IPv6 ends on a link of less than 1,280 (RFC 8200).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Mtu(u32);

impl Mtu {
    pub fn new(bytes: u64) -> Result<Self, Invalid> {
        match u32::try_from(bytes) {
            Ok(bytes @ 68..=65_535) => Ok(Self(bytes)),
            _ => Err(Invalid::new("MTU", format!("{bytes} is not one"), "68 to 65535 bytes")),
        }
    }

    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u64> for Mtu {
    type Error = Invalid;
    fn try_from(bytes: u64) -> Result<Self, Invalid> {
        Self::new(bytes)
    }
}

impl From<Mtu> for u64 {
    fn from(mtu: Mtu) -> Self {
        u64::from(mtu.0)
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One effect on the kernel's network: about one netlink message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// A link that is down, without a controller. `kind` is one that can be made ([`Kind::is_made`]).
    Create {
        link: IfName,
        kind: Kind,
        mac: Option<Mac>,
        mtu: Option<u32>,
    },
    Delete {
        link: IfName,
    },
    SetMtu {
        link: IfName,
        mtu: u32,
    },
    SetMac {
        link: IfName,
        mac: Mac,
    },
    SetUp {
        link: IfName,
        up: bool,
    },
    /// Makes it a port of the controller, or of none.
    SetController {
        link: IfName,
        controller: Option<IfName>,
    },
    SetBridge {
        link: IfName,
        bridge: Bridge,
    },
    /// Of a bond; its mode changes only while it has no ports and is down (the kernel's rule).
    SetBond {
        link: IfName,
        bond: Bond,
    },
    AddPortVlan {
        link: IfName,
        vlan: PortVlan,
    },
    DeletePortVlan {
        link: IfName,
        id: VlanId,
    },
    AddAddress {
        link: IfName,
        address: Address,
    },
    DeleteAddress {
        link: IfName,
        address: Address,
    },
    AddRoute {
        route: Route,
    },
    DeleteRoute {
        route: Route,
    },
    /// The host's DHCP client on this link, or none.
    SetDhcp {
        link: IfName,
        on: bool,
    },
}

impl Change {
    /// The link that it is about, if it is about one.
    pub fn link(&self) -> Option<&IfName> {
        match self {
            Self::Create { link, .. }
            | Self::Delete { link }
            | Self::SetMtu { link, .. }
            | Self::SetMac { link, .. }
            | Self::SetUp { link, .. }
            | Self::SetController { link, .. }
            | Self::SetBridge { link, .. }
            | Self::SetBond { link, .. }
            | Self::AddPortVlan { link, .. }
            | Self::DeletePortVlan { link, .. }
            | Self::AddAddress { link, .. }
            | Self::DeleteAddress { link, .. }
            | Self::SetDhcp { link, .. } => Some(link),
            Self::AddRoute { route } | Self::DeleteRoute { route } => route.link.as_ref(),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { link, kind, .. } => write!(f, "make {kind} {link}"),
            Self::Delete { link } => write!(f, "remove {link}"),
            Self::SetMtu { link, mtu } => write!(f, "set the MTU of {link} to {mtu}"),
            Self::SetMac { link, mac } => write!(f, "set the MAC of {link} to {mac}"),
            Self::SetUp { link, up: true } => write!(f, "switch {link} on"),
            Self::SetUp { link, up: false } => write!(f, "switch {link} off"),
            Self::SetController { link, controller: Some(to) } => write!(f, "make {link} a port of {to}"),
            Self::SetController { link, controller: None } => write!(f, "take {link} off its controller"),
            Self::SetBridge { link, .. } => write!(f, "set the options of bridge {link}"),
            Self::SetBond { link, .. } => write!(f, "set the options of bond {link}"),
            Self::AddPortVlan { link, vlan } => write!(f, "let VLAN {} through port {link}", vlan.id),
            Self::DeletePortVlan { link, id } => write!(f, "let VLAN {id} through port {link} no more"),
            Self::AddAddress { link, address } => write!(f, "give {link} the address {address}"),
            Self::DeleteAddress { link, address } => write!(f, "take the address {address} off {link}"),
            Self::AddRoute { route } => write!(f, "add the route {route}"),
            Self::DeleteRoute { route } => write!(f, "remove the route {route}"),
            Self::SetDhcp { link, on: true } => write!(f, "have {link} configured by DHCP"),
            Self::SetDhcp { link, on: false } => write!(f, "end DHCP on {link}"),
        }
    }
}
