//! What a kernel has: links with their options and addresses, and routes.

use super::{IfName, Invalid, Mac, Route, VlanId};
use crate::model::excerpt;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// An address with the length of its network's prefix: `192.0.2.1/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
}

impl Address {
    /// `192.0.2.1/24`, `2001:db8::1/64`; without a prefix the address alone (32 or 128).
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let wrong = || {
            let allowed =
                "an IPv4 or IPv6 address with the length of its prefix: 192.0.2.1/24, 2001:db8::1/64";
            Invalid::new("address", format!("{} is not one", excerpt(text)), allowed)
        };
        let (ip, prefix) = match text.split_once('/') {
            Some((ip, prefix)) => (ip, Some(prefix)),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => most,
            Some(digits) if digits.len() <= 3 && digits.bytes().all(|c| c.is_ascii_digit()) => {
                digits.parse().ok().filter(|prefix| *prefix <= most).ok_or_else(wrong)?
            }
            Some(_) => return Err(wrong()),
        };
        Ok(Self { ip, prefix })
    }

    /// The network it lies in: the address with the bits after the prefix zero. A prefix that is too long counts as the longest.
    pub fn network(self) -> Self {
        let ip = match self.ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32_u32.saturating_sub(u32::from(self.prefix))).unwrap_or(0);
                IpAddr::V4((u32::from(ip) & mask).into())
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128_u32.saturating_sub(u32::from(self.prefix))).unwrap_or(0);
                IpAddr::V6((u128::from(ip) & mask).into())
            }
        };
        Self { ip, prefix: self.prefix }
    }

    pub fn contains(self, ip: IpAddr) -> bool {
        self.ip.is_ipv4() == ip.is_ipv4()
            && Self { ip, prefix: self.prefix }.network().ip == self.network().ip
    }

    pub fn as_str(&self) -> String {
        format!("{}/{}", self.ip, self.prefix)
    }
}
crate::model::text_type!(Address);

/// How a bond uses its ports (Documentation/networking/bonding.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BondMode {
    #[serde(rename = "active-backup")]
    ActiveBackup,
    #[serde(rename = "802.3ad")]
    Lacp,
    #[serde(rename = "balance-alb")]
    BalanceAlb,
    /// Seen on hosts, never asked for by us: told and left.
    #[serde(rename = "other")]
    Other(u8),
}

impl BondMode {
    /// The kernel's number (`BOND_MODE_*`, linux/if_bonding.h).
    pub fn number(self) -> u8 {
        match self {
            Self::ActiveBackup => 1,
            Self::Lacp => 4,
            Self::BalanceAlb => 6,
            Self::Other(number) => number,
        }
    }

    pub fn from_number(number: u8) -> Self {
        match number {
            1 => Self::ActiveBackup,
            4 => Self::Lacp,
            6 => Self::BalanceAlb,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for BondMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ActiveBackup => f.write_str("active-backup"),
            Self::Lacp => f.write_str("802.3ad"),
            Self::BalanceAlb => f.write_str("balance-alb"),
            Self::Other(number) => write!(f, "mode {number}"),
        }
    }
}

/// How often LACP's partner is to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LacpRate {
    #[default]
    Slow,
    Fast,
}

/// By what 802.3ad chooses a port (`BOND_XMIT_POLICY_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum XmitHash {
    #[default]
    #[serde(rename = "layer2")]
    Layer2,
    #[serde(rename = "layer3+4")]
    Layer34,
    #[serde(rename = "layer2+3")]
    Layer23,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bond {
    pub mode: BondMode,
    /// How often the ports' carrier is looked at, milliseconds; 0: never.
    #[serde(default)]
    pub miimon_ms: u32,
    #[serde(default)]
    pub up_delay_ms: u32,
    #[serde(default)]
    pub down_delay_ms: u32,
    /// The port that is used while it works; active-backup and balance-alb only.
    #[serde(default)]
    pub primary: Option<IfName>,
    /// 802.3ad only.
    #[serde(default)]
    pub lacp_rate: LacpRate,
    /// 802.3ad only.
    #[serde(default)]
    pub xmit_hash: XmitHash,
}

impl Bond {
    /// As the kernel makes one: nobody looks at the ports' carrier.
    pub fn new(mode: BondMode) -> Self {
        Self {
            mode,
            miimon_ms: 0,
            up_delay_ms: 0,
            down_delay_ms: 0,
            primary: None,
            lacp_rate: LacpRate::default(),
            xmit_hash: XmitHash::default(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Bridge {
    #[serde(default)]
    pub stp: bool,
    /// From a port's first packet to its forwarding, with STP; milliseconds. The kernel counts hundredths of a second.
    #[serde(default)]
    pub forward_delay_ms: u32,
    #[serde(default)]
    pub vlan_filtering: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// A port of hardware, or what looks like one.
    Ethernet,
    Loopback,
    Bond(Bond),
    Bridge(Bridge),
    Vlan {
        parent: IfName,
        id: VlanId,
    },
    Dummy,
    /// `peer`: None if it lies in another network namespace.
    Veth {
        peer: Option<IfName>,
    },
    /// The host's end of a guest's network card (`vif2.0`), made and removed by the toolstack.
    Vif,
    /// By the kernel's word (`macvlan`, `tun`).
    Other {
        word: String,
    },
}

impl Kind {
    /// Whether links of this kind come and go by [`super::Change`].
    pub fn is_made(&self) -> bool {
        matches!(
            self,
            Self::Bond(_) | Self::Bridge(_) | Self::Vlan { .. } | Self::Dummy | Self::Veth { peer: Some(_) }
        )
    }

    /// Links that others make and take away: a guest's card, a container's end, whatever we cannot make.
    pub fn is_others(&self) -> bool {
        matches!(self, Self::Vif | Self::Other { .. } | Self::Veth { peer: None })
    }

    pub fn has_ports(&self) -> bool {
        matches!(self, Self::Bond(_) | Self::Bridge(_))
    }

    /// The kernel's word, or ours where it has none.
    pub fn word(&self) -> &str {
        match self {
            Self::Ethernet => "ethernet",
            Self::Loopback => "loopback",
            Self::Bond(_) => "bond",
            Self::Bridge(_) => "bridge",
            Self::Vlan { .. } => "vlan",
            Self::Dummy => "dummy",
            Self::Veth { .. } => "veth",
            Self::Vif => "vif",
            Self::Other { word } => word,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A VLAN that a bridge with VLAN filtering lets through one of its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortVlan {
    pub id: VlanId,
    /// What comes in without a tag belongs to this one.
    #[serde(default)]
    pub pvid: bool,
    /// It goes out without a tag.
    #[serde(default)]
    pub untagged: bool,
}

/// Who configures a link, if not we.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Owner {
    NetworkManager,
    #[serde(rename = "systemd-networkd")]
    Networkd,
    #[serde(rename = "ifupdown")]
    Ifupdown,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NetworkManager => "NetworkManager",
            Self::Networkd => "systemd-networkd",
            Self::Ifupdown => "ifupdown",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkView {
    #[serde(flatten)]
    pub kind: Kind,
    pub mac: Option<Mac>,
    pub mtu: u32,
    /// Switched on (IFF_UP).
    pub up: bool,
    /// Whether packets can pass (IFF_LOWER_UP).
    pub carrier: bool,
    pub controller: Option<IfName>,
    #[serde(default)]
    pub addresses: BTreeSet<Address>,
    /// Of a port of a bridge with VLAN filtering, and of the bridge itself.
    #[serde(default)]
    pub vlans: BTreeSet<PortVlan>,
    /// Whether our DHCP client serves it.
    #[serde(default)]
    pub dhcp: bool,
}

impl LinkView {
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            mac: None,
            mtu: 1500,
            up: false,
            carrier: false,
            controller: None,
            addresses: BTreeSet::new(),
            vlans: BTreeSet::new(),
            dhcp: false,
        }
    }
}

/// All of it, as one reading.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetworkView {
    pub links: BTreeMap<IfName, LinkView>,
    pub routes: BTreeSet<Route>,
}

impl NetworkView {
    /// The ports of a controller, by name.
    pub fn ports<'a>(&'a self, controller: &'a IfName) -> impl Iterator<Item = (&'a IfName, &'a LinkView)> {
        self.links.iter().filter(move |(_, link)| link.controller.as_ref() == Some(controller))
    }

    /// The routes to exactly this network.
    pub fn routes_to(&self, to: Address) -> impl Iterator<Item = &Route> {
        let least = Route { table: 0, ..Route::new(to) };
        self.routes.range(least..).take_while(move |one| one.to == to)
    }

    /// The link that has this address.
    pub fn holder(&self, ip: IpAddr) -> Option<&IfName> {
        self.links
            .iter()
            .find(|(_, link)| link.addresses.iter().any(|one| one.ip == ip))
            .map(|(name, _)| name)
    }
}

/// What a link's hardware and driver tell (ethtool, sysfs). What they do not tell is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LinkFacts {
    pub driver: Option<String>,
    pub bus: Option<String>,
    pub speed_mbps: Option<u32>,
    pub full_duplex: Option<bool>,
    pub autonegotiation: Option<bool>,
    pub permanent_mac: Option<String>,
    /// ethtool's letters of what wakes the host, enabled and possible (`g`, `pumbg`); empty: nothing.
    pub wake_on: Option<String>,
    pub wake_on_supported: Option<String>,
    /// A bond's port in use (`bonding/active_slave`).
    pub active_port: Option<String>,
}

/// What the kernel knows of another host on a link's network (arp(7); RFC 4861).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Neighbour {
    pub link: IfName,
    pub ip: IpAddr,
    pub mac: Option<Mac>,
    pub state: NeighbourState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NeighbourState {
    /// It has answered lately.
    Reachable,
    /// It answered once; nobody has needed it since.
    Stale,
    /// It is being asked.
    Asked,
    /// It did not answer.
    Failed,
    /// Set by hand.
    Permanent,
}

/// Something has changed in a kernel's links, addresses or routes since the last one was taken. Melts: at most one waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed;
