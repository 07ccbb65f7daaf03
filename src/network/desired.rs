//! What is declared: links, routes, logical networks and virtual addresses.
//!
//! ```json
//! {"links": {"bond0":  {"kind": "bond", "mode": "active-backup", "miimon_ms": 100, "ports": ["eth0", "eth1"]},
//!            "xenbr0": {"kind": "bridge", "ports": ["bond0"], "addresses": ["192.0.2.10/24"]},
//!            "bond0.7": {"kind": "vlan", "parent": "bond0", "id": 7, "mtu": 1500}},
//!  "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}],
//!  "networks": {"mgmt": {"link": "xenbr0", "roles": ["MANAGEMENT", "VIRTUAL_MACHINE"]}}}
//! ```

use crate::model::network::{Address, Kind, Mtu, PortVlan, Route};
use crate::model::{IfName, Label, Mac};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// What a network is for (the dialect's words; wire/oracle-vm-agent.md, 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Role {
    Management,
    ClusterHeartbeat,
    LiveMigrate,
    Storage,
    VirtualMachine,
}

impl Role {
    /// Each with its word.
    pub const ALL: [(&'static str, Self); 5] = [
        ("MANAGEMENT", Self::Management),
        ("CLUSTER_HEARTBEAT", Self::ClusterHeartbeat),
        ("LIVE_MIGRATE", Self::LiveMigrate),
        ("STORAGE", Self::Storage),
        ("VIRTUAL_MACHINE", Self::VirtualMachine),
    ];

    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(_, role)| *role == self).map_or("", |(word, _)| word)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogicalNetwork {
    pub link: IfName,
    pub roles: BTreeSet<Role>,
}

/// An address that a pool's master holds beside its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualIp {
    pub link: IfName,
    pub prefix: u8,
}

/// A link as it should be. What is `None` is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredLink {
    /// `Ethernet` stands for any link that is there already and that we never make or remove.
    #[serde(flatten)]
    pub kind: Kind,
    /// Of bonds and bridges: exactly these, beside vifs and what nobody ever declared.
    #[serde(default)]
    pub ports: BTreeSet<IfName>,
    #[serde(default)]
    pub mtu: Option<Mtu>,
    #[serde(default)]
    pub mac: Option<Mac>,
    #[serde(default = "yes")]
    pub up: bool,
    /// Exactly these.
    #[serde(default)]
    pub addresses: Option<BTreeSet<Address>>,
    /// By the host's DHCP client; excludes `addresses`.
    #[serde(default)]
    pub dhcp: bool,
    /// Of ports of a bridge with VLAN filtering, and of the bridge itself: exactly these.
    #[serde(default)]
    pub vlans: Option<BTreeSet<PortVlan>>,
}

fn yes() -> bool {
    true
}

impl DesiredLink {
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            ports: BTreeSet::new(),
            mtu: None,
            mac: None,
            up: true,
            addresses: None,
            dhcp: false,
            vlans: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Desired {
    #[serde(default)]
    pub links: BTreeMap<IfName, DesiredLink>,
    #[serde(default)]
    pub routes: BTreeSet<Route>,
    #[serde(default)]
    pub networks: BTreeMap<Label, LogicalNetwork>,
    #[serde(default)]
    pub virtual_ips: BTreeMap<IpAddr, VirtualIp>,
}
