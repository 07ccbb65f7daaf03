//! `discover_server`.

use super::xml::{Empty, Xml};
use crate::config::Dialect;
use crate::host::HostRecord;
use crate::machine::{Facts, Ntp, TimeZone};
use crate::xen::HypervisorInfo;
use std::net::IpAddr;

/// One of the dialect's capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    Flag(bool),
    Number(u64),
}

/// What this build can do, in the dialect's names and order. A flag turns `True` with the room that makes it
/// so: managers offer their users what they read here.
pub const CAPABILITIES: [(&str, Capability); 23] = [
    ("ISCSI", Capability::Flag(false)),
    ("BOND_MODE_LINK_AGGREGATION", Capability::Flag(true)),
    ("POWER_ON_WOL", Capability::Flag(false)),
    ("ALL_VM_CPU_OVERSUBSCRIBE", Capability::Flag(true)),
    ("HVM_MAX_VNICS", Capability::Number(8)),
    ("FIBRE_CHANNEL", Capability::Flag(false)),
    ("MAX_CONCURRENT_MIGRATION_OUT", Capability::Number(1)),
    ("LOCAL_STORAGE_ELEMENT", Capability::Flag(false)),
    ("CLUSTERS", Capability::Flag(false)),
    ("CONCURRENT_MIGRATION", Capability::Flag(false)),
    ("VM_MEMORY_ALIGNMENT", Capability::Number(1_048_576)),
    ("MIGRATION_SETUP", Capability::Flag(false)),
    ("PER_VM_CPU_OVERSUBSCRIBE", Capability::Flag(true)),
    ("BOND_MODE_ACTIVE_BACKUP", Capability::Flag(true)),
    ("NFS", Capability::Flag(false)),
    ("VM_VNC_CONSOLE", Capability::Flag(true)),
    ("MTU_CONFIGURATION", Capability::Flag(true)),
    ("HIGH_AVAILABILITY", Capability::Flag(false)),
    ("MAX_CONCURRENT_MIGRATION_IN", Capability::Number(1)),
    ("VM_SERIAL_CONSOLE", Capability::Flag(true)),
    ("BOND_MODE_ADAPTIVE_LOAD_BALANCING", Capability::Flag(true)),
    ("VM_SUSPEND", Capability::Flag(true)),
    ("YUM_PACKAGE_MANAGEMENT", Capability::Flag(false)),
];

/// What `discover_server` is made of.
#[derive(Debug, Clone, Copy)]
pub struct ServerDocument<'a> {
    pub facts: &'a Facts,
    pub hypervisor: &'a HypervisorInfo,
    pub timezone: &'a TimeZone,
    /// `None`: this machine has no NTP service.
    pub ntp: Option<&'a Ntp>,
    pub host: &'a HostRecord,
    pub dialect: Dialect,
    /// The address that managers reach us by.
    pub registered_ip: IpAddr,
    /// Ours: `0.1.0`.
    pub agent_version: &'a str,
    /// Credentials travel in the clear.
    pub plain_http: bool,
    /// Usually [`CAPABILITIES`].
    pub capabilities: &'a [(&'a str, Capability)],
}

/// The whole document.
pub fn discover_server(input: &ServerDocument<'_>) -> String {
    let mut xml = Xml::new("<?xml version=\"1.0\" ?>", Empty::Short);
    xml.node("Discover_Server_Result", |xml| {
        xml.node("Server", |xml| {
            machine(xml, input);
            hypervisor(xml, input.hypervisor);
            membership(xml, input);
            xml.node("Statistic", |xml| xml.leaf("Interval", input.host.statistic_interval_s));
            xml.node("Exports", |_| ());
            xml.node("Capabilities", |xml| {
                for (name, capability) in input.capabilities {
                    match capability {
                        Capability::Flag(flag) => xml.flag(name, *flag),
                        Capability::Number(number) => xml.leaf(name, number),
                    }
                }
            });
            xml.flag("Plain_Http", input.plain_http);
        });
    });
    xml.finish()
}

fn machine(xml: &mut Xml, input: &ServerDocument<'_>) {
    let facts = input.facts;
    // The dialect's form is version-build.
    let version = format!("{}-1", input.agent_version);
    xml.leaf("Unique_Id", input.host.unique_id);
    xml.leaf("Boot_Time", facts.boot_time.seconds());
    xml.node("Date_Time", |xml| {
        xml.leaf("Time_Zone", &input.timezone.name);
        xml.flag("UTC", input.timezone.rtc_utc);
    });
    xml.node("NTP", |xml| {
        xml.flag("Local_Time_Source", input.ntp.is_some_and(|ntp| ntp.local_time_source));
        xml.flag("Is_NTP_Running", input.ntp.is_some_and(|ntp| ntp.running));
    });
    xml.leaf("Agent_Version", &version);
    xml.leaf("RPM_Version", &version);
    xml.leaf("OVM_Version", format!("{}-1", release(input.dialect)));
    xml.leaf("CPU_Type", &facts.architecture);
    xml.leaf("OS_Type", "Linux");
    xml.leaf("OS_Name", &facts.os_name);
    // Clients read numbers here; a rolling distribution has none.
    xml.leaf("OS_Major_Version", number_or_zero(&facts.os_major));
    xml.leaf("OS_Minor_Version", number_or_zero(&facts.os_minor));
    xml.leaf("Hypervisor_Type", "xen");
    xml.leaf("Hypervisor_Name", "Xen");
    xml.leaf("Host_Kernel_Release", &facts.kernel_release);
    xml.leaf("Host_Kernel_Version", &facts.kernel_version);
}

fn hypervisor(xml: &mut Xml, info: &HypervisorInfo) {
    xml.node("VMM", |xml| {
        xml.node("Version", |xml| {
            xml.leaf("Major", info.version_major);
            xml.leaf("Minor", info.version_minor);
            xml.leaf("Extra", &info.version_extra);
        });
        xml.node("Compile_Information", |xml| {
            xml.leaf("Compiler", &info.compiler);
            xml.leaf("By", &info.compiled_by);
            xml.leaf("Domain", &info.compile_domain);
            xml.leaf("Date", &info.compile_date);
        });
        xml.leaf("Capabilities", info.capabilities.trim());
    });
}

/// Until pools come, a host is in none: its pool's id is `none` as an absent manager's, and it has no master.
fn membership(xml: &mut Xml, input: &ServerDocument<'_>) {
    let owner = input.host.ownership.owner();
    xml.leaf("Pool_Unique_Id", "none");
    xml.leaf("Manager_Unique_Id", owner.map_or("none", |owner| owner.manager.as_str()));
    xml.leaf("Hostname", &input.facts.hostname);
    xml.leaf("Registered_IP", input.registered_ip);
    xml.leaf("Node_Number", input.host.node_number);
    xml.leaf("Server_Roles", input.host.roles);
    // Not `False`: this one is lower case in the dialect.
    xml.leaf("Is_Current_Master", false);
    xml.leaf("Master_Virtual_Ip", "");
    xml.leaf("Manager_Core_API_Version", format!("{}.1", release(input.dialect)));
    xml.leaf("Membership_State", if owner.is_some() { "Owned" } else { "Unowned" });
    xml.leaf("Cluster_State", "Offline");
}

fn release(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::V32 => "3.2.1",
        Dialect::V33 => "3.3.1",
    }
}

fn number_or_zero(text: &str) -> &str {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    if digits == 0 { "0" } else { &text[..digits] }
}
