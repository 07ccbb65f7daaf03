//! The dialect's verbs of the network (wire/oracle-vm-agent.md, "Network"). Each change is a declaration changed a little
//! ([`Ask`]) and then applied as any other: verified, and rolled back if it fails.
//!
//! Answers begin with the action, as its clients expect (`start …`, `Added …`). Of verbs that are known by name only (mark I
//! of the dialect's table) the parameters here are what their names and the manager's books say.

use super::Api;
use super::arguments::{Arguments, Param, Type, may, need};
use super::document::NetworkDocument;
use super::fault::{ApiFault, Result};
use super::network::way;
use super::value::text;
use super::verb::{Kind, Origin, Row, Verb, nil};
use crate::config::Dialect;
use crate::job::{JobRecord, Options as JobOptions};
use crate::model::IfName;
use crate::model::network::{Address, BondMode, Kind as LinkKind, Mtu, VlanId};
use crate::network::ask::{Ask, vlan_name};
use crate::operation::network::{Options, Want, apply};
use crate::operation::plan::Plan;
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

const ACTION: Param = need("action", Type::Text, "start or stop");
const BRIDGE: Param = need("bridge", Type::Text, "the bridge's name");
const NET_DEV: Param = need("net_dev", Type::Text, "the link that the bridge stands on");
const INTERFACE: Param = need("interface", Type::Text, "a link's name");
const BOND: Param = need("bond", Type::Text, "the bond's name");
const VLAN: Param = need("vlan", Type::Int, "1 to 4094");
const IP: Param = need("ip", Type::Text, "an IP address");

#[rustfmt::skip]
const ROWS: &[Row] = &[
    Row::new("discover_network", &[], "string", Role::Viewer, Kind::Read(discover_network), "An XML document: links, bonds and bridges with their addresses."),
    Row::new("ovs_br_config", &[ACTION, BRIDGE, NET_DEV], "string", Role::Admin, Kind::Job(br_config, answer), "A bridge on a link; the link's addresses and routes move to the bridge, and back at stop."),
    Row::new("ovs_local_config", &[ACTION, BRIDGE], "string", Role::Admin, Kind::Job(local_config, answer), "A bridge without a port of the host's, for guests alone."),
    Row::new("ovs_vlan_config", &[need("action", Type::Text, "add or remove"), INTERFACE, VLAN], "nil", Role::Admin, Kind::Job(vlan_config, nil), "A VLAN of a link, named interface.vlan."),
    Row::new("ovs_vlan_bridge", &[ACTION, BRIDGE, NET_DEV, need("vlan", Type::Int, "1 to 4094; 1: without a tag")], "string", Role::Admin, Kind::Job(vlan_bridge, answer), "A bridge on a VLAN of a link."),
    Row::new("ovs_ip_config", &[INTERFACE, need("optype", Type::Text, "static, dynamic or flush"), may("ip", Type::Text, "static: the IPv4 address"), may("netmask", Type::Text, "static: 255.255.255.0")], "string", Role::Admin, Kind::Job(ip_config, answer), "The addresses of a link."),
    Row::new("ovs_if_meta", &[INTERFACE, may("data", Type::Text, "at most 4096 bytes, not first a space; empty: forget it")], "string", Role::Admin, Kind::Job(if_meta, answer), "A manager's note about a link, told by discover_network; not interpreted."),
    Row::new("ovs_bond_config", &[ACTION, BOND], "string", Role::Admin, Kind::Job(bond_config, answer), "A bond (active-backup, its ports looked at every 100 ms); ports come by ovs_bond_op."),
    Row::new("ovs_bond_mode", &[BOND, need("mode", Type::Text, "active-backup, 802.3ad or balance-alb; or 1, 4, 6")], "string", Role::Admin, Kind::Job(bond_mode, answer), "The mode of a bond."),
    Row::new("ovs_bond_op", &[need("action", Type::Text, "add or remove"), BOND, need("backup", Type::Text, "the port's name")], "string", Role::Admin, Kind::Job(bond_op, answer), "A port into a bond, or out of it."),
    Row::new("ovs_change_mtu", &[INTERFACE, need("mtu", Type::Int, "68 to 65535 bytes")], "string", Role::Admin, Kind::Job(change_mtu, answer), "The MTU of a link."),
    Row::new("ovs_async_bridge", &[ACTION, BRIDGE, NET_DEV], "int", Role::Admin, Kind::Signal(async_bridge), "As ovs_br_config, but answers the job's number at once."),
    Row::new("ovs_async_bond", &[ACTION, BOND], "int", Role::Admin, Kind::Signal(async_bond), "As ovs_bond_config, but answers the job's number at once."),
    Row::new("configure_virtual_ip", &[need("virtual_ip", Type::Text, "the address to hold"), need("base_ip", Type::Text, "an address of this host; its link gets the other one too")], "nil", Role::Admin, Kind::Job(virtual_ip, nil), "Holds a pool's address beside the host's own."),
    Row::new("deconfigure_virtual_ip", &[need("virtual_ip", Type::Text, "the address to give back")], "nil", Role::Admin, Kind::Job(no_virtual_ip, nil), "Gives a pool's address back; one that is not held is no error."),
    Row::new("ovs_control_interface", &[INTERFACE, need("network", Type::Text, "169.254.0.0/16")], "nil", Role::Admin, Kind::Job(control_interface, nil), "The network by which guests of the manager are reached: by this link."),
    Row::new("check_dom0_ip", &[IP], "boolean", Role::Viewer, Kind::Read(check_dom0_ip), "Whether this host has the address."),
    Row::new("check_dom0_port", &[IP, need("port", Type::Int, "1 to 65535"), may("timeout", Type::Int, "seconds, 1 to 60; 3 if not said")], "boolean", Role::Viewer, Kind::Read(check_dom0_port), "True if the port takes a TCP connection; nil if not (clients take any other answer for yes)."),
    Row::new("ping", &[need("host", Type::Text, "an IP address"), may("count", Type::Int, "echoes, 1 to 10; 3 if not said")], "boolean", Role::Viewer, Kind::Read(ping), "Whether the address answers one of so many ICMP echoes."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    ROWS.iter().map(|row| row.of("network", Origin::Dialect))
}

/// The words that the planner chose.
fn answer(record: &JobRecord) -> Value {
    let words = record.result.as_ref().and_then(|result| result.get("answer")?.as_str());
    text(words.unwrap_or_default())
}

fn change(what: &str, ask: Ask, words: String, caller: &Caller) -> Plan {
    apply::change(what, Want::Edit(ask), Options::default(), way(caller), Some(words))
}

/// One of two words.
fn either(arguments: &Arguments, name: &str, yes: &str, no: &str) -> Result<bool> {
    match arguments.text(name)? {
        word if word == yes => Ok(true),
        word if word == no => Ok(false),
        other => Err(arguments
            .wrong(name, format!("{} is not one; allowed: {yes}, {no}", crate::model::excerpt(other)))),
    }
}

fn link(arguments: &Arguments, name: &str) -> Result<IfName> {
    arguments.parse(name)
}

fn vlan(arguments: &Arguments) -> Result<VlanId> {
    let id = arguments.within("vlan", 1..=4094)?;
    VlanId::new(u64::try_from(id).unwrap_or(0)).map_err(|error| arguments.wrong("vlan", error))
}

fn ip(arguments: &Arguments, name: &str) -> Result<IpAddr> {
    arguments.text(name)?.parse().map_err(|_| {
        let given = crate::model::excerpt(arguments.opt_text(name).unwrap_or_default());
        arguments.wrong(name, format!("{given} is not one; allowed: an IPv4 or IPv6 address"))
    })
}

fn bridge_change(arguments: &Arguments, caller: &Caller) -> Result<Plan> {
    let start = either(arguments, "action", "start", "stop")?;
    let (bridge, net_dev) = (link(arguments, "bridge")?, link(arguments, "net_dev")?);
    let words = format!("{} bridge {bridge} on {net_dev}", arguments.text("action")?);
    let ask = match start {
        true => Ask::Bridge { bridge, link: net_dev, vlan: None },
        false => Ask::NoBridge { bridge, with_vlan: false },
    };
    Ok(change("configure a bridge", ask, words, caller))
}

fn br_config<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move { bridge_change(arguments, caller) }.boxed()
}

fn async_bridge<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move { at_once(api, "ovs_async_bridge", bridge_change(arguments, caller)?, caller).await }.boxed()
}

/// The job's number.
async fn at_once(api: &Api, verb: &str, plan: Plan, caller: &Caller) -> Result<Answer> {
    let submission = api.operations.submission(verb, &caller.to_string(), plan, JobOptions::default());
    let job = api.engine().submit(submission).await?;
    Ok(super::value::int(job.0).into())
}

fn local_config<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let start = either(arguments, "action", "start", "stop")?;
        let bridge = link(arguments, "bridge")?;
        let words = format!("{} bridge {bridge}", arguments.text("action")?);
        let ask =
            if start { Ask::LocalBridge { bridge } } else { Ask::NoBridge { bridge, with_vlan: false } };
        Ok(change("configure a local bridge", ask, words, caller))
    }
    .boxed()
}

fn vlan_config<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let add = either(arguments, "action", "add", "remove")?;
        let (link, id) = (link(arguments, "interface")?, vlan(arguments)?);
        vlan_name(&link, id).map_err(|problem| arguments.wrong("vlan", problem))?;
        let ask = if add { Ask::Vlan { link, id } } else { Ask::NoVlan { link, id } };
        Ok(change("configure a VLAN", ask, String::new(), caller))
    }
    .boxed()
}

/// The client reads `start` of an agent 3.2 and `Added` of a later one.
fn vlan_bridge<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let start = either(arguments, "action", "start", "stop")?;
        let (bridge, net_dev) = (link(arguments, "bridge")?, link(arguments, "net_dev")?);
        let id = vlan(arguments)?;
        let verb = match (start, api.operations.settings.dialect) {
            (true, Dialect::V32) => "start",
            (true, Dialect::V33) => "Added",
            (false, _) => "stop",
        };
        let words = format!("{verb} bridge {bridge} on VLAN {id} of {net_dev}");
        // To the dialect, VLAN 1 is what has no tag.
        let tagged = (id.get() != 1).then_some(id);
        let ask = match start {
            true => Ask::Bridge { bridge, link: net_dev, vlan: tagged },
            false => Ask::NoBridge { bridge, with_vlan: tagged.is_some() },
        };
        Ok(change("configure a VLAN's bridge", ask, words, caller))
    }
    .boxed()
}

fn ip_config<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let link = link(arguments, "interface")?;
        let (ask, words) = match arguments.text("optype")? {
            "static" => {
                let IpAddr::V4(ip) = ip(arguments, "ip")? else {
                    return Err(arguments.wrong("ip", "is not one; allowed: an IPv4 address"));
                };
                let prefix = netmask(arguments)?;
                let address = Address { ip: ip.into(), prefix };
                let words = format!("{link} {address}");
                (Ask::Static { link, address }, words)
            }
            "dynamic" => {
                let words = format!("{link} dynamic");
                (Ask::Dhcp { link }, words)
            }
            "flush" => {
                let words = format!("{link} flush");
                (Ask::Flush { link }, words)
            }
            other => {
                let given = crate::model::excerpt(other);
                let why = format!("{given} is not one; allowed: static, dynamic, flush");
                return Err(arguments.wrong("optype", why));
            }
        };
        Ok(change("configure addresses", ask, words, caller))
    }
    .boxed()
}

fn netmask(arguments: &Arguments) -> Result<u8> {
    let given = arguments.text("netmask")?;
    let wrong = || {
        let why = format!("{} is not one; allowed: 255.255.255.0 and the like", crate::model::excerpt(given));
        arguments.wrong("netmask", why)
    };
    let mask = u32::from(given.parse::<Ipv4Addr>().map_err(|_| wrong())?);
    if mask.leading_ones() + mask.trailing_zeros() != 32 {
        return Err(wrong());
    }
    u8::try_from(mask.leading_ones()).map_err(|_| wrong())
}

fn if_meta<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let link = link(arguments, "interface")?;
        let data = arguments.opt_text("data").unwrap_or_default().to_owned();
        let words = format!("{link} {data}");
        Ok(change("note what a manager says of a link", Ask::Meta { link, text: data }, words, caller))
    }
    .boxed()
}

fn bond_change(arguments: &Arguments, caller: &Caller) -> Result<Plan> {
    let start = either(arguments, "action", "start", "stop")?;
    let bond = link(arguments, "bond")?;
    let words = format!("{} bond {bond}", arguments.text("action")?);
    let ask = match start {
        true => Ask::Bond { bond, mode: BondMode::ActiveBackup },
        false => Ask::NoBond { bond },
    };
    Ok(change("configure a bond", ask, words, caller))
}

fn bond_config<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move { bond_change(arguments, caller) }.boxed()
}

fn async_bond<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move { at_once(api, "ovs_async_bond", bond_change(arguments, caller)?, caller).await }.boxed()
}

fn bond_mode<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let bond = link(arguments, "bond")?;
        let mode = match arguments.text("mode")? {
            "active-backup" | "1" => BondMode::ActiveBackup,
            "802.3ad" | "4" => BondMode::Lacp,
            "balance-alb" | "6" => BondMode::BalanceAlb,
            other => {
                let given = crate::model::excerpt(other);
                let why = format!("{given} is not one; allowed: active-backup, 802.3ad, balance-alb");
                return Err(arguments.wrong("mode", why));
            }
        };
        let words = format!("{bond} {mode}");
        Ok(change("set a bond's mode", Ask::BondMode { bond, mode }, words, caller))
    }
    .boxed()
}

fn bond_op<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let add = either(arguments, "action", "add", "remove")?;
        let (bond, port) = (link(arguments, "bond")?, link(arguments, "backup")?);
        let words = format!("{} {port} {bond}", arguments.text("action")?);
        let ask = if add { Ask::BondPort { bond, port } } else { Ask::NoBondPort { bond, port } };
        Ok(change("change a bond's ports", ask, words, caller))
    }
    .boxed()
}

fn change_mtu<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let link = link(arguments, "interface")?;
        let bytes = arguments.within("mtu", 68..=65_535)?;
        let mtu =
            Mtu::new(u64::try_from(bytes).unwrap_or(0)).map_err(|error| arguments.wrong("mtu", error))?;
        let words = format!("{link} {mtu}");
        Ok(change("set the MTU of a link", Ask::Mtu { link, mtu }, words, caller))
    }
    .boxed()
}

fn virtual_ip<'a>(_: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let (ip, base) = (ip(arguments, "virtual_ip")?, ip(arguments, "base_ip")?);
        Ok(change("hold a virtual address", Ask::VirtualIp { ip, base }, String::new(), caller))
    }
    .boxed()
}

fn no_virtual_ip<'a>(
    _: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let ip = ip(arguments, "virtual_ip")?;
        Ok(change("give a virtual address back", Ask::NoVirtualIp { ip }, String::new(), caller))
    }
    .boxed()
}

fn control_interface<'a>(
    _: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let link = link(arguments, "interface")?;
        let network = arguments.parse("network")?;
        Ok(change("reach a network by a link", Ask::Control { link, network }, String::new(), caller))
    }
    .boxed()
}

fn discover_network<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let shown = api.operations.network_show().await?;
        let mut facts = BTreeMap::new();
        let told = |kind: &LinkKind| matches!(kind, LinkKind::Ethernet | LinkKind::Bond(_));
        for (name, _) in shown.now.links.iter().filter(|(_, link)| told(&link.kind)) {
            // A link may have gone meanwhile: it is told without.
            if let Ok(known) = api.operations.kernel.facts(name).await {
                facts.insert(name.clone(), known);
            }
        }
        let document = NetworkDocument { now: &shown.now, confirmed: &shown.confirmed, facts: &facts };
        Ok(text(document.write()).into())
    }
    .boxed()
}

fn check_dom0_ip<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let ip = ip(arguments, "ip")?;
        let links = api
            .operations
            .kernel
            .links()
            .await
            .map_err(|e| ApiFault::new("NETWORK_TIMEOUT", e.to_string()))?;
        let ours = links.iter().any(|link| link.addresses.iter().any(|(own, _)| *own == ip));
        Ok(Value::Bool(ours).into())
    }
    .boxed()
}

fn check_dom0_port<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    _: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let ip = ip(arguments, "ip")?;
        let port = u16::try_from(arguments.within("port", 1..=65_535)?).unwrap_or(0);
        let seconds = match arguments.opt_int("timeout") {
            None => 3,
            Some(_) => arguments.within("timeout", 1..=60)?,
        };
        let patience = Duration::from_secs(u64::try_from(seconds).unwrap_or(3));
        let open = api.operations.kernel.connects((ip, port).into(), patience).await;
        Ok(if open { Value::Bool(true) } else { Value::Nil }.into())
    }
    .boxed()
}

fn ping<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let host = ip(arguments, "host")?;
        let count = match arguments.opt_int("count") {
            None => 3,
            Some(_) => arguments.within("count", 1..=10)?,
        };
        for _ in 0..count {
            if api.operations.kernel.ping(host).await {
                return Ok(Value::Bool(true).into());
            }
        }
        Ok(Value::Bool(false).into())
    }
    .boxed()
}
