//! Reads a declaration from its JSON form, strictly: what is not known is refused, and each problem names its field.

use super::problem::{Problem, Problems};
use super::{Desired, DesiredLink, LogicalNetwork, Role, VirtualIp};
use crate::model::network::{
    Address, Bond, BondMode, Bridge, Hop, Kind, LacpRate, MAIN_TABLE, Mtu, PortVlan, Route, VlanId, XmitHash,
};
use crate::model::{IfName, Label, Mac, excerpt};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::net::IpAddr;

const MAX_LINKS: usize = 5000;
const MAX_ROUTES: usize = 5000;
const MAX_NETWORKS: usize = 5000;
const MAX_VIRTUAL_IPS: usize = 5000;
const MAX_PORTS: usize = 5000;
const MAX_ADDRESSES: usize = 256;
const MAX_VLANS: usize = 4094;
const MAX_HOPS: usize = 64;
/// The kernel keeps one less in a byte (`rtnh_hops`).
const MAX_WEIGHT: u32 = 256;

impl Desired {
    /// From the form that [`super::desired`] shows.
    pub fn read(value: &Value) -> Result<Self, Vec<Problem>> {
        let mut reader = Reader { problems: Problems::default() };
        let desired = reader.desired(value);
        if reader.problems.is_empty() { Ok(desired) } else { Err(reader.problems.into_vec()) }
    }
}

struct Reader {
    problems: Problems,
}

/// An object's members that nobody has asked for yet.
struct Members<'a> {
    path: String,
    object: &'a Map<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Members<'a> {
    /// `null` is the same as nothing.
    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.push(key);
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn field(&self, key: &str) -> String {
        under(&self.path, key)
    }
}

fn under(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// A key of the input as part of a path.
fn shown(key: &str) -> String {
    let is_plain = key.len() <= 40 && key.bytes().all(|c| c.is_ascii_alphanumeric() || b"_.:-".contains(&c));
    if is_plain && !key.is_empty() { key.to_owned() } else { excerpt(key) }
}

fn what_is(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(yes) => yes.to_string(),
        Value::Number(number) => excerpt(&number.to_string()).trim_matches('"').to_owned(),
        Value::String(text) => excerpt(text),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

impl Reader {
    fn wrong(&mut self, field: &str, value: &Value, allowed: &str) {
        self.problems.add(field, format!("{} is not one; allowed: {allowed}", what_is(value)));
    }

    fn members<'a>(&mut self, path: &str, value: &'a Value) -> Option<Members<'a>> {
        let Value::Object(object) = value else {
            let field = if path.is_empty() { "the declaration" } else { path };
            self.wrong(field, value, "an object");
            return None;
        };
        Some(Members { path: path.to_owned(), object, known: Vec::new() })
    }

    fn no_more(&mut self, members: Members<'_>) {
        for key in members.object.keys().filter(|key| !members.known.contains(&key.as_str())) {
            let allowed = members.known.join(", ");
            self.problems
                .add(under(&members.path, &shown(key)), format!("is not known here; allowed: {allowed}"));
        }
    }

    fn list<'a>(&mut self, field: &str, value: &'a Value, most: usize) -> &'a [Value] {
        let Value::Array(list) = value else {
            self.wrong(field, value, "a list");
            return &[];
        };
        if self.bounded(field, list.len(), most) { list } else { &[] }
    }

    fn bounded(&mut self, field: &str, count: usize, most: usize) -> bool {
        if count > most {
            self.problems.add(field, format!("has {count} entries; allowed: at most {most}"));
        }
        count <= most
    }

    fn text<'a>(&mut self, field: &str, value: &'a Value, allowed: &str) -> Option<&'a str> {
        let text = value.as_str();
        if text.is_none() {
            self.wrong(field, value, allowed);
        }
        text
    }

    fn parsed<T>(
        &mut self,
        field: &str,
        value: &Value,
        parse: fn(&str) -> Result<T, crate::model::Invalid>,
    ) -> Option<T> {
        let text = self.text(field, value, "a text")?;
        parse(text)
            .map_err(|wrong| {
                self.problems.add(field, format!("{}; allowed: {}", wrong.problem, wrong.allowed))
            })
            .ok()
    }

    fn name(&mut self, field: &str, value: &Value) -> Option<IfName> {
        self.parsed(field, value, IfName::parse)
    }

    fn ip(&mut self, field: &str, value: &Value) -> Option<IpAddr> {
        let ip = value.as_str().and_then(|text| text.parse().ok());
        if ip.is_none() {
            self.wrong(field, value, "an IPv4 or IPv6 address");
        }
        ip
    }

    fn number(&mut self, field: &str, value: &Value, most: u32) -> Option<u32> {
        let number =
            value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number <= most);
        if number.is_none() {
            self.wrong(field, value, &format!("0 to {most}"));
        }
        number
    }

    fn checked<T>(
        &mut self,
        field: &str,
        value: &Value,
        new: fn(u64) -> Result<T, crate::model::Invalid>,
        allowed: &str,
    ) -> Option<T> {
        let checked = value.as_u64().and_then(|number| new(number).ok());
        if checked.is_none() {
            self.wrong(field, value, allowed);
        }
        checked
    }

    fn yes(&mut self, members: &mut Members<'_>, key: &'static str, default: bool) -> bool {
        let Some(value) = members.get(key) else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.wrong(&members.field(key), value, "true, false");
            default
        })
    }

    fn millis(&mut self, members: &mut Members<'_>, key: &'static str) -> u32 {
        let value = members.get(key);
        value.and_then(|value| self.number(&members.field(key), value, 600_000)).unwrap_or(0)
    }

    fn word<T: Copy>(&mut self, field: &str, value: &Value, words: &[(&str, T)]) -> Option<T> {
        let found = words.iter().find(|(word, _)| value.as_str() == Some(word));
        if found.is_none() {
            let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.wrong(field, value, &all.join(", "));
        }
        found.map(|(_, one)| *one)
    }

    /// Each once.
    fn set<T: Ord>(
        &mut self,
        field: &str,
        value: &Value,
        most: usize,
        read: impl Fn(&mut Self, &str, &Value) -> Option<T>,
    ) -> BTreeSet<T> {
        let mut set = BTreeSet::new();
        for (at, value) in self.list(field, value, most).iter().enumerate() {
            let field = format!("{field}[{at}]");
            if let Some(one) = read(self, &field, value)
                && !set.insert(one)
            {
                self.problems.add(field, format!("{} is there twice", what_is(value)));
            }
        }
        set
    }

    fn map<K: Ord, V>(
        &mut self,
        members: &mut Members<'_>,
        key: &'static str,
        most: usize,
        mut read: impl FnMut(&mut Self, &str, &str, &Value) -> Option<(K, V)>,
    ) -> std::collections::BTreeMap<K, V> {
        let mut map = std::collections::BTreeMap::new();
        let Some(value) = members.get(key) else { return map };
        let path = members.field(key);
        let Some(all) = self.members(&path, value) else { return map };
        if !self.bounded(&path, all.object.len(), most) {
            return map;
        }
        for (key, value) in all.object {
            let field = under(&path, &shown(key));
            if let Some((key, value)) = read(self, &field, key, value)
                && map.insert(key, value).is_some()
            {
                self.problems.add(field, "is there twice");
            }
        }
        map
    }

    fn desired(&mut self, value: &Value) -> Desired {
        let Some(mut members) = self.members("", value) else { return Desired::default() };
        let links = self.map(&mut members, "links", MAX_LINKS, |reader, field, key, value| {
            let name = reader.name(field, &Value::from(key));
            let link = reader.link(field, value);
            name.zip(link)
        });
        let routes = members.get("routes");
        let routes =
            routes.map(|value| self.set("routes", value, MAX_ROUTES, Self::route)).unwrap_or_default();
        let networks = self.map(&mut members, "networks", MAX_NETWORKS, |reader, field, key, value| {
            let label = reader.parsed(field, &Value::from(key), Label::parse);
            label.zip(reader.network(field, value))
        });
        let virtual_ips =
            self.map(&mut members, "virtual_ips", MAX_VIRTUAL_IPS, |reader, field, key, value| {
                let ip = reader.ip(field, &Value::from(key));
                ip.zip(reader.virtual_ip(field, value))
            });
        self.no_more(members);
        Desired { links, routes, networks, virtual_ips }
    }

    fn link(&mut self, path: &str, value: &Value) -> Option<DesiredLink> {
        let mut members = self.members(path, value)?;
        let kind = self.kind(&mut members);
        let mut link = DesiredLink::new(Kind::Ethernet);
        link.up = self.yes(&mut members, "up", true);
        link.dhcp = self.yes(&mut members, "dhcp", false);
        if let Some(value) = members.get("ports") {
            link.ports = self.set(&members.field("ports"), value, MAX_PORTS, Self::name);
        }
        if let Some(value) = members.get("mtu") {
            link.mtu = self.checked(&members.field("mtu"), value, Mtu::new, "68 to 65535 bytes");
        }
        if let Some(value) = members.get("mac") {
            link.mac = self.parsed(&members.field("mac"), value, Mac::parse);
        }
        if let Some(value) = members.get("addresses") {
            let address =
                |reader: &mut Self, field: &str, value: &Value| reader.parsed(field, value, Address::parse);
            link.addresses = Some(self.set(&members.field("addresses"), value, MAX_ADDRESSES, address));
        }
        if let Some(value) = members.get("vlans") {
            link.vlans = Some(self.port_vlans(&members.field("vlans"), value));
        }
        if kind.is_some() {
            self.no_more(members);
        }
        link.kind = kind?;
        Some(link)
    }

    fn kind(&mut self, members: &mut Members<'_>) -> Option<Kind> {
        const WORDS: &[(&str, &str)] = &[
            ("ethernet", "ethernet"),
            ("bond", "bond"),
            ("vlan", "vlan"),
            ("bridge", "bridge"),
            ("dummy", "dummy"),
        ];
        let field = members.field("kind");
        let value = members.get("kind").unwrap_or(&Value::Null);
        match self.word(&field, value, WORDS)? {
            "ethernet" => Some(Kind::Ethernet),
            "dummy" => Some(Kind::Dummy),
            "bond" => self.bond(members).map(Kind::Bond),
            "vlan" => {
                let parent = self.needed(members, "parent", "an interface's name", Self::name);
                let id = self.needed(members, "id", "1 to 4094", Self::vlan_id);
                Some(Kind::Vlan { parent: parent?, id: id? })
            }
            _ => Some(Kind::Bridge(Bridge {
                stp: self.yes(members, "stp", false),
                forward_delay_ms: self.millis(members, "forward_delay_ms"),
                vlan_filtering: self.yes(members, "vlan_filtering", false),
            })),
        }
    }

    fn needed<T>(
        &mut self,
        members: &mut Members<'_>,
        key: &'static str,
        allowed: &str,
        read: impl Fn(&mut Self, &str, &Value) -> Option<T>,
    ) -> Option<T> {
        let field = members.field(key);
        match members.get(key) {
            Some(value) => read(self, &field, value),
            None => {
                self.problems.add(field, format!("is missing; allowed: {allowed}"));
                None
            }
        }
    }

    fn vlan_id(&mut self, field: &str, value: &Value) -> Option<VlanId> {
        self.checked(field, value, VlanId::new, "1 to 4094")
    }

    fn bond(&mut self, members: &mut Members<'_>) -> Option<Bond> {
        const MODES: &[(&str, BondMode)] = &[
            ("active-backup", BondMode::ActiveBackup),
            ("802.3ad", BondMode::Lacp),
            ("balance-alb", BondMode::BalanceAlb),
        ];
        const RATES: &[(&str, LacpRate)] = &[("slow", LacpRate::Slow), ("fast", LacpRate::Fast)];
        const HASHES: &[(&str, XmitHash)] =
            &[("layer2", XmitHash::Layer2), ("layer3+4", XmitHash::Layer34), ("layer2+3", XmitHash::Layer23)];
        let words = "active-backup, 802.3ad, balance-alb";
        let mode =
            self.needed(members, "mode", words, |reader, field, value| reader.word(field, value, MODES));
        let (miimon_ms, up_delay_ms) =
            (self.millis(members, "miimon_ms"), self.millis(members, "up_delay_ms"));
        let down_delay_ms = self.millis(members, "down_delay_ms");
        let primary = members.get("primary").and_then(|value| self.name(&members.field("primary"), value));
        let rate =
            members.get("lacp_rate").and_then(|value| self.word(&members.field("lacp_rate"), value, RATES));
        let hash =
            members.get("xmit_hash").and_then(|value| self.word(&members.field("xmit_hash"), value, HASHES));
        Some(Bond {
            mode: mode?,
            miimon_ms,
            up_delay_ms,
            down_delay_ms,
            primary,
            lacp_rate: rate.unwrap_or_default(),
            xmit_hash: hash.unwrap_or_default(),
        })
    }

    /// Each id once.
    fn port_vlans(&mut self, field: &str, value: &Value) -> BTreeSet<PortVlan> {
        let mut ids = BTreeSet::new();
        let mut vlans = BTreeSet::new();
        for (at, value) in self.list(field, value, MAX_VLANS).iter().enumerate() {
            let field = format!("{field}[{at}]");
            let Some(vlan) = self.port_vlan(&field, value) else { continue };
            if !ids.insert(vlan.id) {
                self.problems.add(field, format!("VLAN {} is there twice", vlan.id));
            }
            vlans.insert(vlan);
        }
        vlans
    }

    fn port_vlan(&mut self, field: &str, value: &Value) -> Option<PortVlan> {
        if !value.is_object() {
            let id =
                self.checked(field, value, VlanId::new, "1 to 4094, or an object with id, pvid, untagged")?;
            return Some(PortVlan { id, pvid: false, untagged: false });
        }
        let mut members = self.members(field, value)?;
        let id = self.needed(&mut members, "id", "1 to 4094", Self::vlan_id);
        let (pvid, untagged) =
            (self.yes(&mut members, "pvid", false), self.yes(&mut members, "untagged", false));
        self.no_more(members);
        Some(PortVlan { id: id?, pvid, untagged })
    }

    fn route(&mut self, field: &str, value: &Value) -> Option<Route> {
        let mut members = self.members(field, value)?;
        let to = self.needed(&mut members, "to", "a network, 0.0.0.0/0 or ::/0", |reader, field, value| {
            reader.parsed(field, value, Address::parse)
        });
        let via = members.get("via").and_then(|value| self.ip(&members.field("via"), value));
        let link = members.get("link").and_then(|value| self.name(&members.field("link"), value));
        let metric =
            members.get("metric").and_then(|value| self.number(&members.field("metric"), value, u32::MAX));
        let table =
            members.get("table").and_then(|value| self.number(&members.field("table"), value, u32::MAX));
        let onlink = self.yes(&mut members, "onlink", false);
        let source = members.get("source").and_then(|value| self.ip(&members.field("source"), value));
        let hops = members.get("hops").map(|value| self.hops(&members.field("hops"), value));
        self.no_more(members);
        Some(Route {
            via,
            link,
            metric: metric.unwrap_or(0),
            table: table.unwrap_or(MAIN_TABLE),
            onlink,
            source,
            hops: hops.unwrap_or_default(),
            ..Route::new(to?)
        })
    }

    fn hops(&mut self, field: &str, value: &Value) -> Vec<Hop> {
        let mut hops = Vec::new();
        for (at, value) in self.list(field, value, MAX_HOPS).iter().enumerate() {
            hops.extend(self.hop(&format!("{field}[{at}]"), value));
        }
        hops
    }

    fn hop(&mut self, field: &str, value: &Value) -> Option<Hop> {
        let mut members = self.members(field, value)?;
        let via = members.get("via").and_then(|value| self.ip(&members.field("via"), value));
        let link = self.needed(&mut members, "link", "an interface's name", Self::name);
        let weight =
            members.get("weight").and_then(|value| self.number(&members.field("weight"), value, MAX_WEIGHT));
        let onlink = self.yes(&mut members, "onlink", false);
        if weight == Some(0) {
            self.problems.add(members.field("weight"), "is not one; allowed: 1 to 256");
        }
        self.no_more(members);
        Some(Hop { via, link: link?, weight: u16::try_from(weight.unwrap_or(1)).ok()?, onlink })
    }

    fn network(&mut self, field: &str, value: &Value) -> Option<LogicalNetwork> {
        let mut members = self.members(field, value)?;
        let link = self.needed(&mut members, "link", "an interface's name", Self::name);
        let roles = members.get("roles").map(|value| {
            let role = |reader: &mut Self, field: &str, value: &Value| reader.word(field, value, &Role::ALL);
            self.set(&members.field("roles"), value, Role::ALL.len(), role)
        });
        self.no_more(members);
        Some(LogicalNetwork { link: link?, roles: roles.unwrap_or_default() })
    }

    fn virtual_ip(&mut self, field: &str, value: &Value) -> Option<VirtualIp> {
        let mut members = self.members(field, value)?;
        let link = self.needed(&mut members, "link", "an interface's name", Self::name);
        let prefix = self.needed(&mut members, "prefix", "1 to 128", |reader, field, value| {
            reader.number(field, value, 128)
        });
        self.no_more(members);
        Some(VirtualIp { link: link?, prefix: u8::try_from(prefix?).ok()? })
    }
}
