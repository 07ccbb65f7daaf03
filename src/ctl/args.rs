//! What can be typed: the definitions from which parsing, `--help` and completion are made.

use super::Format;
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use std::path::PathBuf;

/// Operates dom0d on this host.
///
/// Exit codes: 0 ok, 1 failed, 2 wrong use, 3 not found, 4 conflict or locked, 5 timed out, 6 refused for safety,
/// 7 the daemon cannot be reached.
#[derive(Debug, Parser)]
#[command(name = "dom0ctl", version)]
pub struct Cli {
    /// The daemon's socket [default: /var/lib/dom0d/dom0d.sock]
    #[arg(long, global = true, env = "DOM0D_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// How to print what was asked for
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Wait at most this many seconds; a job then goes on by itself
    #[arg(long, global = true, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: Option<u64>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The host
    #[command(subcommand)]
    Host(HostCommand),
    /// The password of user `oracle`, with which managers come
    #[command(subcommand)]
    Password(PasswordCommand),
    /// The manager that owns the host
    #[command(subcommand)]
    Ownership(OwnershipCommand),
    /// The daemon's certificate
    #[command(subcommand)]
    Certificate(CertificateCommand),
    /// Virtual machines; VM is a name or a UUID
    #[command(subcommand)]
    Vm(VmCommand),
    /// Other hosts, to which VMs go and from which they come
    #[command(subcommand)]
    Peer(PeerCommand),
    /// VMs on their way of which it is not settled who runs them
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// The host's network: ports, bonds, VLANs, bridges, addresses, routes
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Jobs: every change is one
    #[command(subcommand)]
    Job(JobCommand),
    /// Events: what happened, numbered
    #[command(subcommand)]
    Event(EventCommand),
    /// The manager: how far events and statistics are delivered to it
    #[command(subcommand)]
    Manager(ManagerCommand),
    /// Statistics: the latest figures, and their history
    #[command(subcommand)]
    Stats(StatsCommand),
    /// Domains by what they use, again and again on a terminal
    Top(TopCommand),
    /// Locks: which job holds what
    #[command(subcommand)]
    Lock(LockCommand),
    /// The daemon's verbs
    #[command(subcommand)]
    Verb(VerbCommand),
    /// Call any verb
    Call {
        verb: String,
        /// Each is JSON if it can be read so, else text: 5, true, null, '{"a": 1}', '"5"', web-1
        #[arg(value_name = "ARG", allow_negative_numbers = true)]
        args: Vec<String>,
    },
    /// The store that keeps the daemon's state
    #[command(subcommand)]
    Store(StoreCommand),
    /// Print a shell's completion script
    Completion { shell: Shell },
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// What the host is and has
    Show,
}

#[derive(Debug, Subcommand)]
pub enum PasswordCommand {
    /// Set it: asked for on a terminal, else the first line of the input
    Set {
        /// Take the first line of this file
        #[arg(long, value_name = "F")]
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub enum OwnershipCommand {
    /// Who owns the host
    Show,
    /// Make the host nobody's, so that another manager can take it
    Release,
}

#[derive(Debug, Subcommand)]
pub enum CertificateCommand {
    /// The certificate and its CA
    Show,
    /// Make a new one, of the same CA
    Renew,
}

/// What goes with every change.
#[derive(Debug, Clone, Default, Args)]
pub struct Change {
    /// Print the job's number and do not wait for its end
    #[arg(long)]
    pub no_wait: bool,
    /// Print what would be done, and do nothing
    #[arg(long, conflicts_with = "no_wait")]
    pub dry_run: bool,
    /// The job ends after this many seconds at the latest
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(i32).range(1..))]
    pub deadline: Option<i32>,
    /// A second change with the same key is the same job
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

/// A change of one VM.
#[derive(Debug, Clone, Args)]
pub struct VmChange {
    pub vm: String,
    #[command(flatten)]
    pub change: Change,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// All VMs, those that are off too
    List,
    /// One VM with its configuration and what may be done with it now
    Show { vm: String },
    /// Create a VM from a TOML or JSON file (- is the input)
    Create {
        /// The parameters of create_vm (name, memory, vcpus, disk, vif, ...), repo_id, and uuid if not a new one
        file: PathBuf,
        /// Instead of the file's repo_id
        #[arg(long, value_name = "ID")]
        repo: Option<String>,
        #[command(flatten)]
        change: Change,
    },
    /// Start a VM
    Start(VmChange),
    /// Ask the guest to shut down
    Stop {
        #[command(flatten)]
        target: VmChange,
        /// Cut its power if it does not
        #[arg(long)]
        force: bool,
    },
    /// Ask the guest to reboot
    Reboot {
        #[command(flatten)]
        target: VmChange,
        /// Seconds to give the guest before it counts as not answering
        #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(i32).range(0..=3600))]
        wait: i32,
    },
    /// Stop its processors; memory stays
    Pause(VmChange),
    /// Let it run again
    Unpause(VmChange),
    /// Write its memory to disk and end its domain
    Save {
        #[command(flatten)]
        target: VmChange,
        /// Let it run on after the memory was written
        #[arg(long)]
        checkpoint: bool,
    },
    /// Go on from the saved memory
    Restore {
        #[command(flatten)]
        target: VmChange,
        /// Leave it paused
        #[arg(long)]
        paused: bool,
    },
    /// Take it to another host, which must be a peer (`peer list`)
    Migrate {
        #[command(flatten)]
        target: VmChange,
        /// The peer: HOST or HOST:PORT
        dest: String,
        /// Let it stand still while its memory is sent
        #[arg(long)]
        no_live: bool,
    },
    /// Remove a VM that is off from the record; its disks stay
    Delete(VmChange),
    /// Whether it is started after the host's boot, if it ran when the host went down
    Autostart {
        #[command(flatten)]
        target: VmChange,
        enabled: OnOff,
        /// Lower ones first, 0 to 9999 [default: as before, else 1000]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..=9999))]
        order: Option<i32>,
        /// Seconds after its start until VMs of the next order are started [default: as before, else 0]
        #[arg(long, value_name = "S", value_parser = clap::value_parser!(i32).range(0..=3600))]
        delay: Option<i32>,
    },
    /// What the agent found when it was started last: adopted, unknown, gone, started again, and why
    Adopted,
    /// Show the configuration, or change some of it
    Config {
        #[command(flatten)]
        target: VmChange,
        /// Change one key; VALUE is JSON if it can be read so, else text
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum PeerCommand {
    /// All peers
    List,
    /// Trust another host, which must trust this one too
    Add {
        /// HOST or HOST:PORT, as this host reaches it
        address: String,
        /// The ca_fingerprint that `dom0ctl certificate show` tells there
        fingerprint: String,
        #[command(flatten)]
        change: Change,
    },
    /// Trust it no more
    Remove {
        address: String,
        #[command(flatten)]
        change: Change,
    },
}

#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// All links, whose they are, and what differs from what is declared
    Show,
    /// What `apply` would do, step by step
    Plan {
        /// The declaration, JSON or (FILE.toml) TOML; - is standard input
        file: PathBuf,
        /// Also if it takes away the address that you came by
        #[arg(long)]
        may_cut_management: bool,
    },
    /// Change the network to what is declared: all of it, or it is rolled back
    Apply {
        /// The declaration, JSON or (FILE.toml) TOML; - is standard input
        file: PathBuf,
        /// Roll back after this many seconds unless `network confirm` is called
        #[arg(long, value_name = "S", value_parser = clap::value_parser!(i32).range(1..=3600))]
        confirm_within: Option<i32>,
        /// What becomes of a change that fails
        #[arg(long, value_name = "WHAT", value_parser = ["rollback", "keep"])]
        on_failure: Option<String>,
        /// Do it though it takes away the address that you came by
        #[arg(long)]
        may_cut_management: bool,
    },
    /// The change that waits for it holds from now on
    Confirm {
        /// The job of the change that is meant; the one that waits if not said
        job: Option<i64>,
    },
    /// Take the change under way back
    Rollback,
    /// Read the network, and tell how it differs from what is declared
    Discover {
        #[command(flatten)]
        change: Change,
    },
    /// Past changes, the newest first
    History {
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i32).range(1..=1000))]
        limit: i32,
    },
    /// Ports, bonds, VLANs, bridges and vifs as a tree
    Diagram,
}

#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
    /// Those that wait for evidence
    List,
    /// Decide because the other host is lost: said wrongly, or on both hosts, a VM runs twice or its memory is gone
    Resolve {
        /// Its UUID or name
        vm: String,
        /// run: it is this host's; destroy: it is the other host's
        settle: Settle,
        #[command(flatten)]
        change: Change,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Settle {
    Run,
    Destroy,
}

#[derive(Debug, Clone, Args)]
pub struct JobFilter {
    /// queued, running, undoing, succeeded, failed, cancelled
    #[arg(long)]
    pub state: Option<String>,
    #[arg(long)]
    pub verb: Option<String>,
    /// Jobs that lock this: vm/<uuid>, host, ...
    #[arg(long)]
    pub object: Option<String>,
    /// Jobs before this number
    #[arg(long, value_name = "ID")]
    pub before: Option<i64>,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub limit: i32,
}

#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Jobs, the newest first
    List(JobFilter),
    /// One job with its steps
    Show { id: i64 },
    /// Wait for its end; the exit code is that of the job
    Wait { id: i64 },
    /// Ask a job to end; what it did is undone where that is possible
    Cancel {
        id: i64,
        /// Do not wait for its end
        #[arg(long)]
        no_wait: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum EventCommand {
    /// Events kept
    List {
        /// Events after this number
        #[arg(long, value_name = "NUMBER", conflicts_with = "token")]
        since: Option<i64>,
        /// Events after this token of an earlier answer, which also tells whether some were missed
        #[arg(long)]
        token: Option<String>,
        /// At most this many
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=10_000))]
        limit: i32,
        #[arg(long)]
        severity: Option<String>,
        #[arg(long)]
        object: Option<String>,
        /// Only those that nobody has acknowledged
        #[arg(long)]
        unacknowledged: bool,
    },
    /// Print events as they come, until interrupted (or --timeout)
    Watch {
        /// Events after this number [default: from now on]
        #[arg(long, value_name = "NUMBER", conflicts_with = "token")]
        since: Option<i64>,
        /// Events after this token: what `event list` and an earlier watch told
        #[arg(long)]
        token: Option<String>,
        /// End after this many
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Acknowledge events
    Ack {
        #[arg(required = true, value_name = "NUMBER")]
        numbers: Vec<i64>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ManagerCommand {
    /// Who it is, and how far it has got what it should
    Show,
    /// Send it a word that asks for nothing, and tell what became of it
    Test,
}

#[derive(Debug, Subcommand)]
pub enum StatsCommand {
    /// The latest figures of an object
    Show {
        /// host, dom0, a VM's name or UUID
        #[arg(default_value = "host")]
        object: String,
    },
    /// Objects that have a history; of one, its series
    List { object: Option<String> },
    /// A series' history as a plot
    Graph {
        /// host, dom0, a VM's name or UUID
        object: String,
        /// As `stats list OBJECT` has it: cpu_time, vif_rx_bytes:0
        series: String,
        /// How far back: 600s, 30m, 2h, 7d
        #[arg(long, value_name = "TIME", default_value = "10m")]
        last: Span,
        /// Seconds between two values [default: as fine as it is kept]
        #[arg(long, value_name = "S", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..=31_536_000))]
        step: i64,
        /// Lines of the plot
        #[arg(long, value_name = "LINES", default_value_t = 12, value_parser = clap::value_parser!(u8).range(2..=60))]
        height: u8,
    },
}

/// A time of some length: `90s`, `10m`, `2h`, `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(u64);

impl Span {
    pub fn seconds(self) -> u64 {
        self.0
    }
}

impl std::str::FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "allowed: a number with s, m, h or d, up to 366d".to_owned();
        let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(wrong()),
        };
        let count: u64 = digits.parse().map_err(|_| wrong())?;
        let span = count.checked_mul(seconds).filter(|span| (1..=366 * 86_400).contains(span));
        span.map(Self).ok_or_else(wrong)
    }
}

#[derive(Debug, Clone, Copy, Args)]
pub struct TopCommand {
    /// Seconds between two looks; figures are measured every 10
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
    /// End after so many looks [default: never on a terminal, else after one]
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// What stands first
    #[arg(long, value_enum, default_value_t = Sort::Cpu)]
    pub sort: Sort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    Cpu,
    Memory,
    Net,
    Disk,
    Name,
}

#[derive(Debug, Subcommand)]
pub enum LockCommand {
    /// Locks held and waited for
    List,
}

// `verb help` is a command of its own here.
#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
pub enum VerbCommand {
    /// All verbs
    List {
        /// Only those of one family: host, vm, job, ...
        #[arg(long)]
        family: Option<String>,
    },
    /// What a verb takes, gives and is for
    Help { verb: String },
}

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Check the store: of the running daemon, or with --state-dir of one that is stopped
    Check {
        #[arg(long, value_name = "DIR")]
        state_dir: Option<PathBuf>,
    },
    /// Write all that a stopped daemon's store holds to a file (- is the output)
    Export {
        #[arg(long, value_name = "DIR", default_value = "/var/lib/dom0d")]
        state_dir: PathBuf,
        file: PathBuf,
    },
    /// Make the store of a stopped daemon from such a file (- is the input)
    Import {
        #[arg(long, value_name = "DIR", default_value = "/var/lib/dom0d")]
        state_dir: PathBuf,
        /// Although there is a store, which is moved aside
        #[arg(long)]
        force: bool,
        file: PathBuf,
    },
}
