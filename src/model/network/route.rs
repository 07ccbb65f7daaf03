//! Routes: what can be declared, and what is kept of others' when a change puts them back.

use super::{Address, IfName};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// The table that is asked when no rule says otherwise (RT_TABLE_MAIN, linux/rtnetlink.h).
pub const MAIN_TABLE: u32 = 254;

/// The table of this host's own addresses, which the kernel fills (RT_TABLE_LOCAL).
pub const LOCAL_TABLE: u32 = 255;

/// A unicast route. It leads by one link, or by several hops.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    /// `0.0.0.0/0` or `::/0`: the default route.
    pub to: Address,
    #[serde(default)]
    pub via: Option<IpAddr>,
    #[serde(default)]
    pub link: Option<IfName>,
    #[serde(default)]
    pub metric: u32,
    #[serde(default = "main_table", skip_serializing_if = "is_main_table")]
    pub table: u32,
    /// The gateway counts as being on the link, whatever addresses say.
    #[serde(default, skip_serializing_if = "is_default")]
    pub onlink: bool,
    /// The address that our own packets by this route have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// Who made it (`RTPROT_*`); 0: an administrator (RTPROT_STATIC), as what is declared. Others' are kept, never declared.
    #[serde(default, skip_serializing_if = "is_default")]
    pub protocol: u8,
    /// What else the kernel keeps of it, by the numbers of the attributes (`RTA_METRICS` …), in its own form: put back as it
    /// was, never declared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rest: Vec<(u16, Vec<u8>)>,
    /// Packets are spread over these; then there is no `via`, `link` or `onlink`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hops: Vec<Hop>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Hop {
    #[serde(default)]
    pub via: Option<IpAddr>,
    pub link: IfName,
    /// Its share beside the others': 1 to 256.
    #[serde(default = "one")]
    pub weight: u16,
    #[serde(default, skip_serializing_if = "is_default")]
    pub onlink: bool,
}

fn main_table() -> u32 {
    MAIN_TABLE
}

fn is_main_table(table: &u32) -> bool {
    *table == MAIN_TABLE
}

fn one() -> u16 {
    1
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Route {
    /// In the main table; without a way yet.
    pub fn new(to: Address) -> Self {
        Self {
            to,
            via: None,
            link: None,
            metric: 0,
            table: MAIN_TABLE,
            onlink: false,
            source: None,
            protocol: 0,
            rest: Vec::new(),
            hops: Vec::new(),
        }
    }

    /// As the kernel keeps it: to a network, for IPv6 with 1,024 for the metric 0 (IP6_RT_PRIO_USER), and a single hop as the
    /// route's own way.
    pub fn normal(&self) -> Self {
        let metric = if self.metric == 0 && self.to.ip.is_ipv6() { 1024 } else { self.metric };
        let mut normal = Self { to: self.to.network(), metric, ..self.clone() };
        if let [hop] = self.hops.as_slice() {
            (normal.via, normal.link, normal.onlink) = (hop.via, Some(hop.link.clone()), hop.onlink);
            normal.hops.clear();
        }
        normal
    }

    /// Without what nobody needs to say of it.
    pub fn bare(&self) -> Self {
        Self { onlink: false, source: None, protocol: 0, rest: Vec::new(), ..self.normal() }
    }

    /// Every way that it leads: its gateway, its link, and whether the gateway counts as being there.
    pub fn ways(&self) -> impl Iterator<Item = (Option<IpAddr>, Option<&IfName>, bool)> {
        let single = self.hops.is_empty().then_some((self.via, self.link.as_ref(), self.onlink));
        single.into_iter().chain(self.hops.iter().map(|hop| (hop.via, Some(&hop.link), hop.onlink)))
    }

    pub fn links(&self) -> impl Iterator<Item = &IfName> {
        self.ways().filter_map(|(_, link, _)| link)
    }

    pub fn has_gateway(&self) -> bool {
        self.ways().any(|(via, ..)| via.is_some())
    }

    /// Whether the kernel has only one of the two: their network, metric and table are the same.
    pub fn is_rival(&self, other: &Self) -> bool {
        (self.to, self.metric, self.table) == (other.to, other.metric, other.table)
    }

    /// Whether a route that there is does what is asked for. Of a gateway without a link, the link may be any; without both,
    /// the way may be any.
    pub fn does(&self, asked: &Self) -> bool {
        let (is, asked) = (self.normal(), asked.normal());
        is.is_rival(&asked)
            && is.hops == asked.hops
            && (is.via == asked.via || (asked.via.is_none() && asked.link.is_none()))
            && (asked.link.is_none() || is.link == asked.link)
            && (asked.source.is_none() || is.source == asked.source)
    }

    /// Whether a gateway needs no address on its network: it was said to be on the link, or is an address of the link itself
    /// (fe80::/10, RFC 4291), where routers of IPv6 are found.
    pub fn is_on_link(via: Option<IpAddr>, link: Option<&IfName>, onlink: bool) -> bool {
        let is_links_own = matches!(via, Some(IpAddr::V6(six)) if six.is_unicast_link_local());
        link.is_some() && (onlink || is_links_own)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to)?;
        for (number, (via, link, _)) in self.ways().enumerate() {
            if number > 0 {
                f.write_str(" and")?;
            }
            if let Some(via) = via {
                write!(f, " via {via}")?;
            }
            if let Some(link) = link {
                write!(f, " by {link}")?;
            }
        }
        if self.table != MAIN_TABLE {
            write!(f, " in table {}", self.table)?;
        }
        Ok(())
    }
}
