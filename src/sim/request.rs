//! What may be asked of the world, and what it answers: the words of its protocol (JSON on the socket).

use super::{
    Audit, Behaviour, DiskTraffic, GuestMemory, HostFigures, HostView, HypervisorView, Link, LinkCounters,
    Ntp, Rule, UsageView, Zone,
};
use crate::model::network::{Change, LinkFacts, Neighbour, NetworkView, Owner, Refused};
use crate::model::{Hint, IfName, KiB, MiB, SafePath, Timestamp, VmId, VmName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// What a domain is built from. Only what the world counts is typed; the rest comes back as it was given.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub vm: VmId,
    pub name: VmName,
    pub memory: MiB,
    pub max_memory: MiB,
    pub vcpus: u32,
    pub max_vcpus: u32,
    /// Credit scheduler.
    pub weight: u16,
    pub cap: u16,
    /// `None`: no VNC server.
    pub display: Option<Display>,
    pub disks: Vec<Device>,
    pub vifs: Vec<Device>,
    /// Opaque; may hold a VNC password, hence the hand-written `Debug`.
    pub rest: serde_json::Value,
}

impl fmt::Debug for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spec")
            .field("vm", &self.vm)
            .field("name", &self.name)
            .field("memory", &self.memory)
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

/// Which VNC display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Display {
    FirstFree,
    /// Port 5900 + n.
    Number(u16),
}

/// A disk, by the guest's name for it, or a network card, by its address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    pub key: String,
    pub detail: serde_json::Value,
}

/// A domain that travels: to a file, or to another world.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// [`Image::FORMAT`], so that a file of something else is known for that.
    pub format: String,
    pub spec: Spec,
    pub online_vcpus: u32,
    pub cpu_time_ns: u64,
}

impl Image {
    pub const FORMAT: &str = "dom0d simulated domain 1";
}

/// Why a domain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Poweroff,
    Reboot,
    Suspend,
    Crash,
    Watchdog,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Booting.
    Running,
    /// Booted and idle.
    Blocked,
    Paused,
    /// Waiting to be destroyed; `Suspend` also while it is sent away.
    Ended(Reason),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DomainView {
    pub domid: u32,
    pub vm: Option<VmId>,
    pub name: String,
    pub state: State,
    pub memory: KiB,
    pub max_memory: KiB,
    pub vcpus: u32,
    pub online_vcpus: u32,
    pub cpu_time_ns: u64,
    pub started: Timestamp,
    pub vnc_port: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    Power,
    Reset,
    /// Any that a guest does not mind.
    Other,
}

/// Something changed: look at this domain.
pub type Observation = Hint<u32>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum WorldError {
    #[error("no such domain")]
    NoSuchDomain,
    #[error("a domain of this name or UUID exists")]
    Exists,
    #[error("not enough free memory: {needed} needed, {free} free")]
    OutOfMemory { needed: MiB, free: MiB },
    #[error("the state does not allow it: {0}")]
    BadState(String),
    #[error("{0}")]
    Failed(String),
    /// The kernel does not do that.
    #[error("{0}")]
    Refused(Refused),
    #[error("no answer in time")]
    Timeout,
    #[error("the simulated world cannot be reached: {0}")]
    Unreachable(String),
}

/// A request. Those after `SetBehaviour` are for tests and the process's owner; no rule of the script acts on
/// them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    Info,
    List,
    Get {
        domid: u32,
    },
    Find {
        vm: VmId,
    },
    Create {
        spec: Box<Spec>,
        paused: bool,
    },
    Destroy {
        domid: u32,
    },
    Shutdown {
        domid: u32,
    },
    Reboot {
        domid: u32,
    },
    Pause {
        domid: u32,
    },
    Unpause {
        domid: u32,
    },
    Save {
        domid: u32,
        file: SafePath,
        keep_running: bool,
    },
    Restore {
        spec: Box<Spec>,
        file: SafePath,
        paused: bool,
    },
    /// The domain begins to leave: how long its memory takes on its way. It runs on.
    BeginExport {
        domid: u32,
    },
    /// Suspends the domain and answers its image; `EndExport` must follow. If the client goes away before, it
    /// goes on, as a domain does whose sender saw its pipe close.
    Export {
        domid: u32,
    },
    /// The sender was told that the other end holds it: from now on it stands still, also if the client goes away.
    HandOver {
        domid: u32,
    },
    /// Destroys the exported domain (`gone`), or lets it go on.
    EndExport {
        domid: u32,
        gone: bool,
    },
    /// Builds a domain from an image, which stands still; `EndImport`, or `Destroy`, must follow. If the client
    /// goes away before, it is destroyed.
    Import {
        image: Box<Image>,
    },
    /// Lets the arrived domain live: after its original was destroyed.
    EndImport {
        domid: u32,
        paused: bool,
    },
    Config {
        domid: u32,
    },
    AttachDisk {
        domid: u32,
        disk: Device,
    },
    DetachDisk {
        domid: u32,
        key: String,
    },
    AttachVif {
        domid: u32,
        vif: Device,
    },
    DetachVif {
        domid: u32,
        key: String,
    },
    SetVcpus {
        domid: u32,
        online: u32,
    },
    SetMemory {
        domid: u32,
        target: MiB,
    },
    SetScheduling {
        domid: u32,
        weight: u16,
        cap: u16,
    },
    Sysrq {
        domid: u32,
        letter: char,
    },
    Trigger {
        domid: u32,
        trigger: Trigger,
    },
    SendToGuest {
        domid: u32,
        key: String,
        value: String,
    },
    DumpCore {
        domid: u32,
        file: SafePath,
        crash: bool,
    },

    Host,
    SetClock {
        time: Timestamp,
    },
    SetZone {
        zone: Zone,
    },
    SetNtp {
        servers: Vec<String>,
        local_time_source: bool,
    },
    EnableNtp {
        enabled: bool,
    },
    HostLog {
        max_bytes: u64,
    },
    HostReboot,
    HostPowerOff,
    Links,
    LinkTraffic,
    Network,
    ChangeNetwork {
        change: Change,
    },
    LinkFacts {
        link: IfName,
    },
    LinkOwners,
    Neighbours,
    Reaches {
        address: IpAddr,
    },
    DiskTraffic {
        domid: u32,
    },
    /// Memory and CPUs of the machine.
    Usage,
    /// What XenStore holds about these domains' memory.
    GuestMemory {
        domids: Vec<u32>,
    },
    HostFigures,
    /// Whether a disk lies there. It always does, unless a rule fails it with `BadState`.
    HasDisk {
        path: SafePath,
    },

    /// `vm` `None`: the default for all VMs without one of their own.
    SetBehaviour {
        vm: Option<VmId>,
        behaviour: Behaviour,
    },
    /// The guest ends now, by itself.
    EndGuest {
        vm: VmId,
        reason: Reason,
    },
    /// The machine is set up to run the `xendomains` service, or not any more.
    SetXendomains {
        enabled: bool,
    },
    /// What was sent to the guest (`SendToGuest`).
    GuestStore {
        domid: u32,
    },
    /// The guest writes into its own part of XenStore, whatever it likes.
    GuestWrites {
        vm: VmId,
        key: String,
        value: Vec<u8>,
    },
    /// Of a port of hardware.
    PlugCable {
        link: IfName,
        plugged: bool,
    },
    /// Another service of the host configures this link, or none does.
    SetLinkOwner {
        link: IfName,
        owner: Option<Owner>,
    },
    SetLinkFacts {
        link: IfName,
        facts: Box<LinkFacts>,
    },
    /// An address beyond the cables that does not answer, or answers again.
    SetSilent {
        address: IpAddr,
        silent: bool,
    },
    /// Somebody else changes the network.
    ChangeFromOutside {
        change: Change,
    },
    AddRule {
        rule: Rule,
    },
    ClearRules,
    Audit,
    /// The world's process ends, and all domains with it.
    EndWorld,
}

/// The kinds of requests that a rule may act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Info,
    List,
    Get,
    Find,
    Create,
    Destroy,
    Shutdown,
    Reboot,
    Pause,
    Unpause,
    Save,
    Restore,
    Export,
    EndExport,
    Import,
    EndImport,
    Config,
    AttachDisk,
    DetachDisk,
    AttachVif,
    DetachVif,
    SetVcpus,
    SetMemory,
    SetScheduling,
    Sysrq,
    Trigger,
    SendToGuest,
    DumpCore,
    Host,
    SetClock,
    SetZone,
    SetNtp,
    EnableNtp,
    HostLog,
    HostReboot,
    HostPowerOff,
    Links,
    LinkTraffic,
    DiskTraffic,
    Usage,
    GuestMemory,
    HostFigures,
    BeginExport,
    HandOver,
    HasDisk,
    Network,
    ChangeNetwork,
    LinkFacts,
    LinkOwners,
    Neighbours,
    Reaches,
}

impl Request {
    /// `None` for the requests that no rule acts on.
    pub fn kind(&self) -> Option<Kind> {
        Some(match self {
            Self::Info => Kind::Info,
            Self::List => Kind::List,
            Self::Get { .. } => Kind::Get,
            Self::Find { .. } => Kind::Find,
            Self::Create { .. } => Kind::Create,
            Self::Destroy { .. } => Kind::Destroy,
            Self::Shutdown { .. } => Kind::Shutdown,
            Self::Reboot { .. } => Kind::Reboot,
            Self::Pause { .. } => Kind::Pause,
            Self::Unpause { .. } => Kind::Unpause,
            Self::Save { .. } => Kind::Save,
            Self::Restore { .. } => Kind::Restore,
            Self::Export { .. } => Kind::Export,
            Self::EndExport { .. } => Kind::EndExport,
            Self::Import { .. } => Kind::Import,
            Self::EndImport { .. } => Kind::EndImport,
            Self::Config { .. } => Kind::Config,
            Self::AttachDisk { .. } => Kind::AttachDisk,
            Self::DetachDisk { .. } => Kind::DetachDisk,
            Self::AttachVif { .. } => Kind::AttachVif,
            Self::DetachVif { .. } => Kind::DetachVif,
            Self::SetVcpus { .. } => Kind::SetVcpus,
            Self::SetMemory { .. } => Kind::SetMemory,
            Self::SetScheduling { .. } => Kind::SetScheduling,
            Self::Sysrq { .. } => Kind::Sysrq,
            Self::Trigger { .. } => Kind::Trigger,
            Self::SendToGuest { .. } => Kind::SendToGuest,
            Self::DumpCore { .. } => Kind::DumpCore,
            Self::Host => Kind::Host,
            Self::SetClock { .. } => Kind::SetClock,
            Self::SetZone { .. } => Kind::SetZone,
            Self::SetNtp { .. } => Kind::SetNtp,
            Self::EnableNtp { .. } => Kind::EnableNtp,
            Self::HostLog { .. } => Kind::HostLog,
            Self::HostReboot => Kind::HostReboot,
            Self::HostPowerOff => Kind::HostPowerOff,
            Self::Links => Kind::Links,
            Self::LinkTraffic => Kind::LinkTraffic,
            Self::DiskTraffic { .. } => Kind::DiskTraffic,
            Self::Usage => Kind::Usage,
            Self::GuestMemory { .. } => Kind::GuestMemory,
            Self::HostFigures => Kind::HostFigures,
            Self::BeginExport { .. } => Kind::BeginExport,
            Self::HandOver { .. } => Kind::HandOver,
            Self::HasDisk { .. } => Kind::HasDisk,
            Self::Network => Kind::Network,
            Self::ChangeNetwork { .. } => Kind::ChangeNetwork,
            Self::LinkFacts { .. } => Kind::LinkFacts,
            Self::LinkOwners => Kind::LinkOwners,
            Self::Neighbours => Kind::Neighbours,
            Self::Reaches { .. } => Kind::Reaches,
            Self::SetBehaviour { .. }
            | Self::EndGuest { .. }
            | Self::GuestStore { .. }
            | Self::GuestWrites { .. }
            | Self::SetXendomains { .. }
            | Self::PlugCable { .. }
            | Self::SetLinkOwner { .. }
            | Self::SetLinkFacts { .. }
            | Self::SetSilent { .. }
            | Self::ChangeFromOutside { .. }
            | Self::AddRule { .. }
            | Self::ClearRules
            | Self::Audit
            | Self::EndWorld => return None,
        })
    }

    /// Whether it is about the kernel's links, addresses and routes.
    pub(super) fn is_of_network(&self) -> bool {
        matches!(
            self,
            Self::Links
                | Self::Network
                | Self::ChangeNetwork { .. }
                | Self::LinkFacts { .. }
                | Self::LinkOwners
                | Self::Neighbours
                | Self::Reaches { .. }
                | Self::PlugCable { .. }
                | Self::SetLinkOwner { .. }
                | Self::SetLinkFacts { .. }
                | Self::SetSilent { .. }
                | Self::ChangeFromOutside { .. }
        )
    }

    /// The domain it is about, if it names one by number.
    pub fn domid(&self) -> Option<u32> {
        match self {
            Self::Get { domid }
            | Self::Destroy { domid }
            | Self::Shutdown { domid }
            | Self::Reboot { domid }
            | Self::Pause { domid }
            | Self::Unpause { domid }
            | Self::Save { domid, .. }
            | Self::BeginExport { domid }
            | Self::Export { domid }
            | Self::HandOver { domid }
            | Self::EndExport { domid, .. }
            | Self::EndImport { domid, .. }
            | Self::Config { domid }
            | Self::AttachDisk { domid, .. }
            | Self::DetachDisk { domid, .. }
            | Self::AttachVif { domid, .. }
            | Self::DetachVif { domid, .. }
            | Self::SetVcpus { domid, .. }
            | Self::SetMemory { domid, .. }
            | Self::SetScheduling { domid, .. }
            | Self::Sysrq { domid, .. }
            | Self::Trigger { domid, .. }
            | Self::SendToGuest { domid, .. }
            | Self::DumpCore { domid, .. } => Some(*domid),
            _ => None,
        }
    }

    /// The VM it is about, if it names one.
    pub fn vm(&self) -> Option<VmId> {
        match self {
            Self::Find { vm } => Some(*vm),
            Self::Create { spec, .. } | Self::Restore { spec, .. } => Some(spec.vm),
            Self::Import { image } => Some(image.spec.vm),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Done,
    DomId(u32),
    Info(HypervisorView),
    Domains(Vec<DomainView>),
    Domain(Option<DomainView>),
    Config(Box<Spec>),
    Image(Box<Image>),
    Host(Box<HostView>),
    Ntp(Ntp),
    Links(Vec<Link>),
    LinkTraffic(BTreeMap<String, LinkCounters>),
    DiskTraffic(DiskTraffic),
    Usage(Box<UsageView>),
    GuestMemory(Vec<GuestMemory>),
    HostFigures(Box<HostFigures>),
    Network(Box<NetworkView>),
    LinkFacts(Box<LinkFacts>),
    LinkOwners(BTreeMap<IfName, Owner>),
    Neighbours(Vec<Neighbour>),
    Reaches(bool),
    Text(String),
    Pairs(BTreeMap<String, String>),
    Audit(Box<Audit>),
    Millis(u64),
}
