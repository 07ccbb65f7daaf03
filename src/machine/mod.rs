//! The machine dom0 runs on, as one trait: clock, time zone, NTP, power, hardware facts, logs, file systems.
//! `linux` reads /proc, /sys and DMI and drives chrony or timesyncd; `sim` speaks to the simulated world and
//! can never touch the machine it runs on.

pub mod files;
pub mod linux;
pub mod memory;
pub mod sim;

use crate::model::{Bytes, KiB, SafePath, Timestamp};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

/// Facts that do not change while the machine is up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub hostname: String,
    /// /proc/sys/kernel/random/boot_id: tells a new boot from a restart of the agent.
    pub boot_id: String,
    pub boot_time: Timestamp,
    /// `x86_64`
    pub architecture: String,
    pub kernel_release: String,
    pub kernel_version: String,
    /// /etc/os-release: NAME, and VERSION_ID split at the first dot.
    pub os_name: String,
    pub os_major: String,
    pub os_minor: String,
    pub memory: KiB,
    pub cpus: Vec<Cpu>,
    pub dmi: Dmi,
    pub scsi_hosts: Vec<ScsiHost>,
    /// /etc/iscsi/initiatorname.iscsi
    pub iscsi_initiator: Option<String>,
}

/// One processor of /proc/cpuinfo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    pub id: u32,
    pub vendor: String,
    pub family: String,
    pub model: String,
    pub model_name: String,
    pub stepping: String,
    pub cache_size: String,
    pub flags: String,
    pub mhz: f64,
    pub core_id: u32,
    pub physical_id: u32,
}

/// What DMI tells (/sys/class/dmi/id); empty where it tells nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Dmi {
    /// The machine's UUID. Where DMI has none: made of /etc/machine-id.
    pub system_uuid: [u8; 16],
    pub system_manufacturer: String,
    pub system_product: String,
    pub system_version: String,
    pub system_serial: String,
    pub bios_vendor: String,
    pub bios_version: String,
    pub bios_date: String,
    pub chassis_manufacturer: String,
    pub chassis_type: String,
    pub board_manufacturer: String,
    pub board_product: String,
    /// The tables as the firmware left them; empty where they cannot be read.
    #[serde(default)]
    pub tables: DmiTables,
}

/// The raw SMBIOS tables (/sys/firmware/dmi/tables).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct DmiTables {
    /// From the entry point: `2.4.0`.
    pub version: String,
    /// The longest structure, as a 2.x entry point tells; 0: not told.
    pub max_structure_bytes: u16,
    /// The structures, at most 64 KiB.
    pub bytes: Vec<u8>,
}

/// One of /sys/class/scsi_host, its attributes by file name, in order of the name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScsiHost {
    pub number: u32,
    pub attributes: Vec<(String, String)>,
    /// The PCI device it hangs on.
    pub device: Vec<(String, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeZone {
    /// A name of the zone database: `Europe/Amsterdam`.
    pub name: String,
    /// Whether the hardware clock runs in UTC.
    pub rtc_utc: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ntp {
    pub servers: Vec<String>,
    /// The local clock serves as a source when no server answers.
    pub local_time_source: bool,
    pub running: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    pub mount_point: String,
    pub device: String,
    pub kind: String,
    pub size: Bytes,
    pub free: Bytes,
}

/// What a domain's disks have done since they were plugged, all together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskTraffic {
    pub read: Bytes,
    pub written: Bytes,
    pub reads: u64,
    pub writes: u64,
}

/// Time of one of dom0's CPUs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuTime {
    pub cpu: u32,
    /// It worked: all but idle, waiting for disks, and stolen.
    pub busy_s: f64,
    /// It wanted to, and Xen ran another domain.
    pub steal_s: f64,
}

/// A whole disk of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFigures {
    pub name: String,
    pub traffic: DiskTraffic,
}

/// A disk that this machine's kernel serves to a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VbdFigures {
    pub domid: u32,
    /// Xen's number for it: 51712 is `xvda`.
    pub device: u32,
    pub traffic: DiskTraffic,
}

/// What one reading of dom0's kernel tells. What could not be read is not there, and `problems` says why.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostFigures {
    pub cpus: Vec<CpuTime>,
    /// Over a minute, five, and fifteen.
    pub load: Option<[f64; 3]>,
    pub memory_total: Option<Bytes>,
    pub memory_available: Option<Bytes>,
    /// Without partitions, loops and ram disks; by name.
    pub disks: Vec<DiskFigures>,
    /// By sensor, in °C.
    pub temperatures: Vec<(String, f64)>,
    /// By domid and device.
    pub vbds: Vec<VbdFigures>,
    /// At most one a source.
    pub problems: Vec<(&'static str, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineError {
    /// The caller's value is not one this machine takes: which, and what is allowed.
    #[error("{0}")]
    Invalid(String),
    /// This machine has no such thing (no NTP service installed, no such log).
    #[error("not available here: {0}")]
    Unavailable(String),
    #[error("{0}")]
    Failed(String),
    #[error("no answer in time: {0}")]
    Timeout(String),
}

pub type Result<T> = std::result::Result<T, MachineError>;

/// The machine. Nothing here blocks an async worker, and every call ends within a bounded time.
#[async_trait]
pub trait Machine: Send + Sync + 'static {
    async fn facts(&self) -> Result<Facts>;
    /// Wall-clock time of the machine.
    async fn now(&self) -> Result<Timestamp>;
    async fn set_clock(&self, time: Timestamp) -> Result<()>;
    async fn timezone(&self) -> Result<TimeZone>;
    async fn set_timezone(&self, zone: &TimeZone) -> Result<()>;
    async fn ntp(&self) -> Result<Ntp>;
    /// Writes the configuration (servers: host names or addresses, checked) and restarts a running service.
    async fn set_ntp(&self, servers: &[String], local_time_source: bool, allow_query: bool) -> Result<()>;
    async fn enable_ntp(&self, enabled: bool) -> Result<()>;
    /// The last `max` bytes of a log by the dialect's name: `ovs-agent`, `messages`, `xend`, `dmesg`.
    async fn log(&self, name: &str, max: Bytes) -> Result<String>;
    /// Mounted file systems with a device of their own, the root first.
    async fn filesystems(&self) -> Result<Vec<Filesystem>>;
    /// What has the host run the `xendomains` service, which starts and stops VMs by itself: a path, for people.
    async fn xendomains(&self) -> Result<Option<String>>;
    /// What the disks of the domain of this number have done, as far as this machine's kernel serves them; of a
    /// domain without such disks, nothing.
    async fn disk_traffic(&self, domid: u32) -> Result<DiskTraffic>;
    /// All that sampling wants to know, in one reading.
    async fn figures(&self) -> Result<HostFigures>;
    /// Whether a file or block device lies there.
    async fn has_disk(&self, path: &SafePath) -> Result<bool>;
    /// Asks for a reboot or a power-off, and returns before it happens.
    async fn reboot(&self) -> Result<()>;
    async fn power_off(&self) -> Result<()>;
}
