//! `discover_network`: links, bonds and bridges (shape recorded from a real agent; wire/oracle-vm-agent.md, 4.3).
//!
//! Client traps it honours (1.9 there): one `Family` a device, since the client takes the last; the management address on a
//! bridge that is listed.

use super::xml::{Empty, Xml};
use crate::kernel::LinkFacts;
use crate::model::network::{Address, Kind, LinkView, NetworkView};
use crate::model::{IfName, Mac};
use crate::operation::network::Confirmed;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

pub struct NetworkDocument<'a> {
    pub now: &'a NetworkView,
    pub confirmed: &'a Confirmed,
    pub facts: &'a BTreeMap<IfName, LinkFacts>,
}

impl NetworkDocument<'_> {
    pub fn write(&self) -> String {
        let mut xml = Xml::new("<?xml version=\"1.0\" ?>", Empty::Short);
        xml.node("Discover_Network_Result", |xml| {
            xml.node("Network", |xml| {
                xml.node("Active", |xml| {
                    xml.node("Network", |xml| self.devices(xml, is_port, Self::port));
                    xml.node("Bonding", |xml| {
                        self.devices(xml, |kind| matches!(kind, Kind::Bond(_)), Self::bond)
                    });
                    xml.node("Bridges", |xml| {
                        self.devices(xml, |kind| matches!(kind, Kind::Bridge(_)), Self::bridge);
                    });
                    xml.node("Infiniband", |_| {});
                });
            });
        });
        xml.finish()
    }

    fn devices(
        &self,
        xml: &mut Xml,
        which: impl Fn(&Kind) -> bool,
        tell: impl Fn(&Self, &mut Xml, &IfName, &LinkView),
    ) {
        for (name, link) in self.now.links.iter().filter(|(_, link)| which(&link.kind)) {
            xml.node_with("Device", &[("Name", name.as_str())], |xml| {
                tell(self, xml, name, link);
                xml.leaf("BootProto", boot_proto(link));
                if let Some(words) = self.metadata(name) {
                    xml.leaf("MetaData", words);
                }
            });
        }
    }

    fn port(&self, xml: &mut Xml, name: &IfName, link: &LinkView) {
        let facts = self.facts.get(name).cloned().unwrap_or_default();
        if let Some(mac) = link.mac {
            xml.leaf("MAC", upper(mac));
        }
        xml.leaf("Flags", flags(link));
        xml.node("ETHTOOL", |xml| {
            xml.leaf("Autonegotiate", if facts.autonegotiation == Some(false) { "off" } else { "on" });
            xml.leaf("Link", if link.carrier { "yes" } else { "no" });
            if let Some(speed) = facts.speed_mbps {
                xml.leaf("Speed", format!("{speed}Mb/s"));
            }
            if let Some(full) = facts.full_duplex {
                xml.leaf("Duplex", if full { "Full" } else { "Half" });
            }
        });
        xml.node("WOL", |xml| {
            let wakes = facts.wake_on.as_ref().is_some_and(|letters| letters.contains('g'));
            xml.leaf("WakeOnLan", if wakes { "enabled" } else { "disabled" });
        });
        xml.node("SysFS", |xml| {
            xml.leaf("carrier", u8::from(link.carrier));
            if let Some(speed) = facts.speed_mbps {
                xml.leaf("speed", speed);
            }
            if let Some(full) = facts.full_duplex {
                xml.leaf("duplex", if full { "full" } else { "half" });
            }
            xml.leaf("operstate", if link.up && link.carrier { "up" } else { "down" });
            xml.leaf("mtu", link.mtu);
            if let Some(driver) = &facts.driver {
                xml.leaf("driver", driver);
            }
        });
    }

    fn bond(&self, xml: &mut Xml, name: &IfName, link: &LinkView) {
        let Kind::Bond(bond) = &link.kind else { return };
        let state = |link: &LinkView| if link.carrier { "up" } else { "down" };
        xml.leaf("Bonding_Mode", bond.mode);
        if let Some(primary) = &bond.primary {
            xml.leaf("Primary_Slave", format!("{primary} (primary_reselect always)"));
        }
        let active = self.facts.get(name).and_then(|facts| facts.active_port.as_deref());
        xml.leaf("Currently_Active_Slave", active.unwrap_or("None"));
        xml.leaf("MII_Status", state(link));
        xml.leaf("MII_Polling_Interval", bond.miimon_ms);
        xml.leaf("Up_Delay", bond.up_delay_ms);
        xml.leaf("Down_Delay", bond.down_delay_ms);
        for (port, is) in self.now.ports(name) {
            let facts = self.facts.get(port).cloned().unwrap_or_default();
            xml.node_with("Slave_Interface", &[("Name", port.as_str())], |xml| {
                xml.leaf("MII_Status", state(is));
                if let Some(speed) = facts.speed_mbps {
                    xml.leaf("Speed", format!("{speed} Mbps"));
                }
                if let Some(full) = facts.full_duplex {
                    xml.leaf("Duplex", if full { "full" } else { "half" });
                }
                if let Some(mac) = &facts.permanent_mac {
                    xml.leaf("Permanent_HW_addr", mac);
                }
            });
        }
        family(xml, link, true);
    }

    fn bridge(&self, xml: &mut Xml, name: &IfName, link: &LinkView) {
        family(xml, link, false);
        xml.node("Interfaces", |xml| {
            // What stands for the bridge's way out; vifs are guests'.
            for (port, _) in self.now.ports(name).filter(|(_, port)| port.kind != Kind::Vif) {
                xml.leaf("PhyInterface", port);
            }
        });
    }

    /// What the manager has noted; else the networks that are declared on the link, in the same form.
    fn metadata(&self, name: &IfName) -> Option<String> {
        if let Some(noted) = self.confirmed.meta.get(name) {
            return Some(noted.clone());
        }
        let on_it = self.confirmed.desired.networks.iter().filter(|(_, network)| network.link == *name);
        let words: Vec<String> = on_it
            .map(|(id, network)| {
                let roles: Vec<&str> = network.roles.iter().map(|role| role.as_str()).collect();
                format!("ethernet:{id}{{{}}}:{}", self.subnet(name), roles.join(","))
            })
            .collect();
        (!words.is_empty()).then(|| words.join(";"))
    }

    fn subnet(&self, name: &IfName) -> String {
        let address = self.now.links.get(name).and_then(first_v4);
        address.map_or_else(String::new, |address| address.network().ip.to_string())
    }
}

fn is_port(kind: &Kind) -> bool {
    matches!(kind, Kind::Ethernet)
}

fn boot_proto(link: &LinkView) -> &'static str {
    match (link.dhcp, first_v4(link)) {
        (true, _) => "dhcp",
        (false, Some(_)) => "static",
        (false, None) => "none",
    }
}

fn upper(mac: Mac) -> String {
    mac.as_str().to_uppercase()
}

fn first_v4(link: &LinkView) -> Option<Address> {
    link.addresses.iter().find(|address| address.ip.is_ipv4()).copied()
}

/// Only one: the client takes the last that it finds.
fn family(xml: &mut Xml, link: &LinkView, with_mtu: bool) {
    xml.node_with("Family", &[("Type", "AF_INET")], |xml| {
        if let Some(mac) = link.mac {
            xml.leaf("MAC", upper(mac));
        }
        if let Some(address) = first_v4(link)
            && let IpAddr::V4(ip) = address.ip
        {
            let mask = u32::MAX.checked_shl(32 - u32::from(address.prefix)).unwrap_or(0);
            xml.leaf("Address", ip);
            xml.leaf("Netmask", Ipv4Addr::from(mask));
            xml.leaf("Broadcast", Ipv4Addr::from(u32::from(ip) | !mask));
        }
        if with_mtu {
            xml.leaf("mtu", link.mtu);
        }
    });
}

/// IFF_* of linux/if.h, as ifconfig's users know them.
fn flags(link: &LinkView) -> String {
    let set = [
        (link.up, 0x1, "IFF_UP"),
        (true, 0x2, "IFF_BROADCAST"),
        (link.up && link.carrier, 0x40, "IFF_RUNNING"),
        (link.controller.is_some(), 0x800, "IFF_SLAVE"),
        (true, 0x1000, "IFF_MULTICAST"),
    ];
    let on: Vec<_> = set.iter().filter(|(on, ..)| *on).collect();
    let bits: u32 = on.iter().map(|(_, bit, _)| bit).sum();
    let names: Vec<&str> = on.iter().map(|(.., name)| *name).collect();
    format!("(0x{bits:x}) {}", names.join(" "))
}
