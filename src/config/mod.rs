//! Settings: as written (`dom0d.toml`, flags) and as validated.
//!
//! The file is TOML; an unknown key, a wrong type or a value out of its range stops the daemon with the file,
//! the line and what is allowed. `config/dom0d.toml` lists every key with its default, its unit and why.
//! Flags win over the file. Each room takes its own part of [`Settings`] and no other.

use crate::model::SafePath;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

mod check;
mod load;
pub use load::{ConfigError, DEFAULT_FILE, Overrides, load};

/// All settings, validated. Durations carry their unit in their name; sizes theirs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    pub world: World,
    pub state: State,
    pub wire: Wire,
    pub dialect: Dialect,
    pub access: Access,
    pub jobs: Jobs,
    pub events: Events,
    pub manager: Manager,
    pub metrics: Metrics,
    pub vm: Vm,
    pub migration: Migration,
    pub log: Log,
}

/// Which worlds the daemon works on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct World {
    pub toolstack: ToolstackChoice,
    pub kernel: WorldChoice,
    pub host: WorldChoice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ToolstackChoice {
    Auto,
    Xl,
    Sim,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorldChoice {
    Linux,
    Sim,
}

/// Where state lies and how much disk it may use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct State {
    /// The store, the ledger, certificates, the password's hash.
    pub dir: PathBuf,
    /// Disk space kept aside so that `stop_vm` and recovery still work when the disk is full, MiB.
    pub reserve_mib: u64,
    /// Memory sled may use as page cache, MiB.
    pub cache_mib: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Wire {
    pub listen: SocketAddr,
    /// The operator's socket. Empty: `<state dir>/dom0d.sock`.
    pub socket: PathBuf,
    /// The group (besides root) that may use the operator's socket.
    pub socket_group: String,
    /// Serve plain HTTP on the same port. Credentials then travel in the clear.
    pub plain_http: bool,
    pub max_connections: usize,
    pub max_connections_per_address: usize,
    /// From the first byte of a request to the end of its head, and for the TLS handshake.
    pub head_timeout_ms: u64,
    pub body_timeout_ms: u64,
    /// A kept-alive connection without a request is closed after this.
    pub idle_timeout_ms: u64,
    /// A reader slower than this for a whole answer is dropped.
    pub write_timeout_ms: u64,
    pub max_head_bytes: usize,
    pub max_body_bytes: usize,
    pub max_depth: usize,
    pub max_values: usize,
    /// After escaping.
    pub max_answer_bytes: usize,
    /// How long a stopping daemon waits for calls under way.
    pub drain_timeout_ms: u64,
}

/// The Oracle VM release whose manner the answers follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dialect {
    #[serde(rename = "3.2")]
    V32,
    #[serde(rename = "3.3")]
    V33,
}

/// What the password may do once a manager owns the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PasswordAfterOwnership {
    Admin,
    None,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    pub password_after_ownership: PasswordAfterOwnership,
    /// Wrong passwords from one address in a minute, after which that address waits. Cached good
    /// credentials are never delayed.
    pub max_failures_per_minute: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Jobs {
    /// Jobs accepted and not yet ended; a further one is refused.
    pub max_open: usize,
    /// Jobs running at once.
    pub max_running: usize,
    /// Ended jobs kept.
    pub history: usize,
    /// A job without a deadline of its own ends after this.
    pub default_deadline_s: u64,
    /// After a cancel, how long a step may go on before it is dropped.
    pub cancel_bound_s: u64,
    /// A synchronous verb answers after at most this, with a fault naming the job, which goes on. Less than
    /// the 900 s after which the dialect's clients give up.
    pub wait_limit_s: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Events {
    /// Events kept.
    pub history: usize,
}

/// What is sent to the manager that owns the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Manager {
    /// Deliver to an `http://` URL too. All that is told can then be read on the way.
    pub plain_http: bool,
    pub without_certificate: WithoutCertificate,
    /// One POST, from its beginning to the end of its answer.
    pub post_timeout_ms: u64,
}

/// What becomes of delivery to a manager that gave no certificate when it took ownership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WithoutCertificate {
    /// The certificate seen at the first connection is pinned.
    FirstSeen,
    /// Nothing is delivered.
    Refuse,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    pub listen: MetricsAddress,
}

/// Where monitoring reads; none: nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MetricsAddress(pub Option<SocketAddr>);

impl TryFrom<String> for MetricsAddress {
    type Error = std::net::AddrParseError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.is_empty() { Ok(Self(None)) } else { Ok(Self(Some(text.parse()?))) }
    }
}

impl From<MetricsAddress> for String {
    fn from(address: MetricsAddress) -> Self {
        address.0.map(|address| address.to_string()).unwrap_or_default()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// Disks lie below this folder: `<repositories>/<repo id>/VirtualDisks/…`.
    pub repositories: SafePath,
    /// Kernels and initial RAM disks for direct boot lie below this folder, and nowhere else.
    pub kernels: SafePath,
    /// How long a guest may take to shut down when asked, before `stop_vm` fails (or, with `force`, destroys).
    pub shutdown_timeout_s: u64,
    /// One call of the toolstack ends after this at the latest.
    pub toolstack_timeout_s: u64,
    /// Every so often the record is compared with the world even if nothing was seen to change.
    pub discovery_interval_s: u64,
    /// Whether a VM that ran when the host went down is started after its boot, if `vm_autostart` was never asked.
    pub autostart_default: bool,
    /// From the agent's first look at a new boot to the first of those starts.
    pub autostart_delay_s: u64,
    /// Start although the host's `xendomains` service starts and stops VMs by itself.
    pub beside_xendomains: bool,
}

/// VMs that go to other hosts and come from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Migration {
    /// VMs sent away at once; a further one is refused.
    pub max_out: usize,
    /// VMs received at once; a further one is refused.
    pub max_in: usize,
    /// A migration ends after this, and the VM goes on where it was.
    pub deadline_s: u64,
    /// A stream on which nothing moves for this long is broken.
    pub stall_s: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub level: LogLevel,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// journald when systemd started us, text otherwise.
    Auto,
    Text,
    Json,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            world: World::default(),
            state: State::default(),
            wire: Wire::default(),
            dialect: Dialect::V32,
            access: Access::default(),
            jobs: Jobs::default(),
            events: Events::default(),
            manager: Manager::default(),
            metrics: Metrics::default(),
            vm: Vm::default(),
            migration: Migration::default(),
            log: Log::default(),
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self { toolstack: ToolstackChoice::Auto, kernel: WorldChoice::Linux, host: WorldChoice::Linux }
    }
}

impl Default for State {
    fn default() -> Self {
        Self { dir: PathBuf::from("/var/lib/dom0d"), reserve_mib: 16, cache_mib: 2 }
    }
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8899)),
            socket: PathBuf::new(),
            socket_group: "dom0d".to_owned(),
            plain_http: false,
            max_connections: 1024,
            max_connections_per_address: 256,
            head_timeout_ms: 10_000,
            body_timeout_ms: 60_000,
            idle_timeout_ms: 120_000,
            write_timeout_ms: 60_000,
            max_head_bytes: 32 * 1024,
            max_body_bytes: 4 * 1024 * 1024,
            max_depth: 32,
            max_values: 200_000,
            max_answer_bytes: 32 * 1024 * 1024,
            drain_timeout_ms: 10_000,
        }
    }
}

impl Default for Access {
    fn default() -> Self {
        Self { password_after_ownership: PasswordAfterOwnership::Admin, max_failures_per_minute: 10 }
    }
}

impl Default for Jobs {
    fn default() -> Self {
        Self {
            max_open: 10_000,
            max_running: 1024,
            history: 10_000,
            default_deadline_s: 3600,
            cancel_bound_s: 30,
            wait_limit_s: 840,
        }
    }
}

impl Default for Events {
    fn default() -> Self {
        Self { history: 100_000 }
    }
}

impl Default for Manager {
    fn default() -> Self {
        Self {
            plain_http: false,
            without_certificate: WithoutCertificate::FirstSeen,
            post_timeout_ms: 30_000,
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { listen: MetricsAddress(Some(SocketAddr::from(([127, 0, 0, 1], 9178)))) }
    }
}

impl Default for Vm {
    fn default() -> Self {
        let path = |text| SafePath::parse(text).expect("a constant that the test below parses");
        Self {
            repositories: path("/OVS/Repositories"),
            kernels: path("/var/lib/dom0d/kernels"),
            shutdown_timeout_s: 180,
            toolstack_timeout_s: 120,
            discovery_interval_s: 600,
            autostart_default: false,
            autostart_delay_s: 0,
            beside_xendomains: false,
        }
    }
}

impl Default for Migration {
    fn default() -> Self {
        Self { max_out: 2, max_in: 1, deadline_s: 3600, stall_s: 30 }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: LogLevel::Info, format: LogFormat::Auto }
    }
}
