//! The hypervisor's toolstack as one trait, with a body for real Xen (`xl`, which sees domains come and go by `xenstore`) and a
//! simulated one (`sim`). Both pass the same contract suite (`tests/contract`).
//!
//! Words: a *domain* is the running instance of a VM; a *domid* names it until it ends and is never a VM's
//! identity, since Xen gives a new one at each start. A domain that ends by itself (shutdown, reboot, crash)
//! waits in [`RunState::Shutdown`] until somebody destroys it: the toolstack never restarts anything on its
//! own (`xl create -e`), so our runner alone acts on a domain's end.
//!
//! What this room does not do: it keeps no record, decides nothing, and retries nothing.

pub mod config;
mod figures;
pub mod sim;
pub mod xenstore;
pub mod xl;

pub use figures::{CpuIdle, GuestFigures, GuestTold, Usage};

use crate::model::{Hint, KiB, MiB, SafePath, Timestamp, VmId};
use async_trait::async_trait;
use config::{Disk, DomainConfig, Vif};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// A domain's number, while it lives. 0 is dom0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DomId(pub u32);

/// What a domain is doing, as `xl list` tells by its letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// `r`: on a CPU.
    Running,
    /// `b`: waiting for an event; alive.
    Blocked,
    /// `p`
    Paused,
    /// `s`: ended by itself, waiting to be destroyed.
    Shutdown(ShutdownReason),
    /// `d`: being taken apart.
    Dying,
}

/// Why a domain ended (`SHUTDOWN_*`, xen/include/public/sched.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownReason {
    Poweroff,
    Reboot,
    Suspend,
    Crash,
    Watchdog,
}

/// A domain as the toolstack tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DomainInfo {
    pub domid: DomId,
    /// `None` for dom0 and for a domain whose UUID is no VM's.
    pub vm: Option<VmId>,
    pub name: String,
    pub state: RunState,
    pub memory: KiB,
    pub max_memory: KiB,
    pub vcpus: u32,
    pub online_vcpus: u32,
    /// CPU time used since the domain's start.
    pub cpu_time_ns: u64,
    pub started: Timestamp,
    /// Where the VNC server listens, if there is one.
    pub vnc_port: Option<u16>,
}

/// The hypervisor and the host as it sees it (`xl info`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HypervisorInfo {
    pub version_major: u32,
    pub version_minor: u32,
    pub version_extra: String,
    pub compiler: String,
    pub compiled_by: String,
    pub compile_domain: String,
    pub compile_date: String,
    pub capabilities: String,
    pub total_memory: MiB,
    pub free_memory: MiB,
    pub nr_cpus: u32,
    pub threads_per_core: u32,
    pub cores_per_socket: u32,
    pub sockets_per_node: u32,
    pub nr_nodes: u32,
    pub cpu_khz: u64,
    /// Eight 32-bit words of CPU features.
    pub hw_caps: Vec<u32>,
}

/// What happens to the domain once its memory is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterSave {
    Destroy,
    /// A checkpoint: the domain goes on.
    Continue,
}

/// `xl trigger`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    Nmi,
    Reset,
    Init,
    Power,
    Sleep,
    S3resume,
}

/// Something changed in the world of domains: this one appeared, changed its state, or went. An observation says only
/// where to look: the looker reads the domain again, so a lost or doubled observation does no harm.
pub type Observation = Hint<DomId>;

/// Why the toolstack did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolstackError {
    #[error("no such domain")]
    NoSuchDomain,
    #[error("a domain of this name or UUID exists")]
    Exists,
    #[error("not enough free memory: {needed} needed, {free} free")]
    OutOfMemory { needed: MiB, free: MiB },
    /// The domain's state does not allow it (pause a domain that has ended, unplug what is not there).
    #[error("the domain's state does not allow it: {0}")]
    BadState(String),
    /// The toolstack refused or failed; its own words, bounded to 4 KiB.
    #[error("the toolstack failed: {0}")]
    Failed(String),
    /// No answer in time. The effect is unknown: look at the world.
    #[error("the toolstack did not answer in time")]
    Timeout,
    /// The toolstack cannot be reached. Nothing was done, or it is unknown: look at the world.
    #[error("the toolstack cannot be reached: {0}")]
    Unreachable(String),
}

pub type Result<T> = std::result::Result<T, ToolstackError>;

/// What may be sent to a guest: a key of 1 to 64 ASCII letters, digits, `_`, `-`, `.` (none leads), a value of at most
/// 1,024 bytes without a zero byte.
pub fn check_guest_value(key: &str, value: &str) -> Result<()> {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"_-.".contains(&c);
    let refused = |text: &str| Err(ToolstackError::Failed(text.to_owned()));
    if !(1..=64).contains(&key.len()) || !key.bytes().all(plain) || key.starts_with('.') {
        return refused("allowed are keys of 1 to 64 letters, digits, _ . -, with no dot first");
    }
    if value.len() > 1024 || value.contains('\0') {
        return refused("allowed are values of at most 1,024 bytes, without a zero byte");
    }
    Ok(())
}

/// How long a call may take that moves this much memory: never less than `least`, and as slow as 64 MiB a second.
pub fn moving_deadline(least: Duration, memory: MiB) -> Duration {
    least.max(Duration::from_secs(30) + Duration::from_secs(memory.0.div_ceil(64)))
}

/// Where a migration's bytes go, and come from. They flow one way only.
pub trait Outflow: AsyncWrite + Send + Unpin {}
impl<T: AsyncWrite + Send + Unpin> Outflow for T {}
pub trait Inflow: AsyncRead + Send + Unpin {}
impl<T: AsyncRead + Send + Unpin> Inflow for T {}

/// The moment at which a VM changes hosts, as the sending toolstack asks for it.
#[async_trait]
pub trait Handover: Send + Sync {
    /// The domain stands still here, and all of it has been sent. `true`: the other host holds it whole, and it
    /// is written down that it never runs here again; the toolstack then destroys it. `false`: it goes on here.
    async fn hand_over(&self) -> bool;
}

/// The toolstack. Every call ends within the deadline its body was made with. Those that move a domain's memory may
/// take longer: a create by [`moving_deadline`], which grows with memory; a save, a restore, a dump and a migration on
/// real Xen as long as something moves. Each ends when its caller goes. Calls for one domain come one at a time (the
/// caller holds the VM's lock); calls for different domains may come together.
#[async_trait]
pub trait Toolstack: Send + Sync + 'static {
    async fn info(&self) -> Result<HypervisorInfo>;

    /// All domains, dom0 first, then by domid.
    async fn list(&self) -> Result<Vec<DomainInfo>>;

    async fn get(&self, domid: DomId) -> Result<Option<DomainInfo>>;

    /// The domain of a VM, ended ones included.
    async fn find(&self, vm: VmId) -> Result<Option<DomainInfo>> {
        Ok(self.list().await?.into_iter().find(|d| d.vm == Some(vm)))
    }

    /// The machine's memory, what of it each domain has, and how long its CPUs have idled.
    async fn usage(&self) -> Result<Usage>;

    /// What is told of the memory of these domains, by domid. One that has gone tells nothing; one whose reading
    /// failed, or had not ended at the deadline of all, is left out, and only if that is so of all of them this fails.
    async fn guest_figures(&self, domids: &[DomId]) -> Result<Vec<GuestFigures>>;

    /// Builds a domain and lets it run (`paused`: builds it paused). All or nothing: after an error other
    /// than `Timeout` and `Unreachable` no domain of this VM is left behind.
    async fn create(&self, config: &DomainConfig, paused: bool) -> Result<DomId>;

    /// Ends a domain at once and frees what it held. Also how an ended domain is cleared away.
    async fn destroy(&self, domid: DomId) -> Result<()>;

    /// Asks the guest to shut down. Returns when it was asked, not when it is done.
    async fn shutdown(&self, domid: DomId) -> Result<()>;

    /// Asks the guest to reboot. It then ends with [`ShutdownReason::Reboot`].
    async fn reboot(&self, domid: DomId) -> Result<()>;

    async fn pause(&self, domid: DomId) -> Result<()>;
    async fn unpause(&self, domid: DomId) -> Result<()>;

    /// Writes the domain's memory to a new file. After an error other than `Timeout` and `Unreachable` the domain
    /// runs on as before and the file is gone. A file of this name is whole (it is written beside it and renamed),
    /// and with `Destroy` the domain goes only after it is there: a file whose domain has gone is its memory.
    async fn save(&self, domid: DomId, file: &SafePath, after: AfterSave) -> Result<()>;

    /// Builds a domain from a saved file, which stays. All or nothing, as `create`.
    async fn restore(&self, config: &DomainConfig, file: &SafePath, paused: bool) -> Result<DomId>;

    /// Sends a domain into `out`; `live`: it runs on while most of its memory is sent. When all is sent and the
    /// domain stands still, `handover` decides. After `true` the domain is gone here when this returns; if this
    /// fails all the same, or its caller dies, the domain may be left, standing still, and is the caller's to
    /// destroy. After `false`, or an error before the handover, it runs on here.
    async fn migrate_out(
        &self,
        domid: DomId,
        live: bool,
        out: Box<dyn Outflow>,
        handover: std::sync::Arc<dyn Handover>,
    ) -> Result<()>;

    /// Receives a domain. It is whole and stands paused when this returns, and outlives the caller; after an
    /// error none is left.
    async fn migrate_in(&self, input: Box<dyn Inflow>) -> Result<DomId>;

    /// What a running domain was built from and has plugged now.
    async fn config(&self, domid: DomId) -> Result<DomainConfig>;

    async fn attach_disk(&self, domid: DomId, disk: &Disk) -> Result<()>;
    async fn detach_disk(&self, domid: DomId, device: &config::DiskDevice) -> Result<()>;
    async fn attach_vif(&self, domid: DomId, vif: &Vif) -> Result<()>;
    async fn detach_vif(&self, domid: DomId, mac: crate::model::Mac) -> Result<()>;
    /// Brings virtual CPUs online or offline, up to the maximum the domain was built with.
    async fn set_vcpus(&self, domid: DomId, online: u32) -> Result<()>;
    /// Balloons, up to the maximum the domain was built with.
    async fn set_memory(&self, domid: DomId, target: MiB) -> Result<()>;
    /// Weight (1 to 65535) and cap (per cent of one CPU, 0: none) of the credit scheduler.
    async fn set_scheduling(&self, domid: DomId, weight: u16, cap: u16) -> Result<()>;

    /// One magic SysRq letter to the guest.
    async fn sysrq(&self, domid: DomId, letter: char) -> Result<()>;
    async fn trigger(&self, domid: DomId, trigger: Trigger, vcpu: Option<u32>) -> Result<()>;
    /// Writes below `/local/domain/<domid>/control/dom0d/`, for an agent in the guest. Key and value:
    /// [`check_guest_value`]. XenStore's names have no dot: one in a key is written as `@2E`.
    async fn send_to_guest(&self, domid: DomId, key: &str, value: &str) -> Result<()>;
    /// Dumps the domain's memory to a new file. `live`: without pausing it; `crash`: destroys it afterwards.
    async fn dump_core(&self, domid: DomId, file: &SafePath, live: bool, crash: bool) -> Result<()>;

    /// Observations from now on. Bounded: a slow reader gets [`Observation::Everything`].
    fn observe(&self) -> tokio::sync::mpsc::Receiver<Observation>;
}
