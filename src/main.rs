//! dom0d's entrance: flags, settings, the log, the runtime; then the agent runs.
//!
//! Exit codes: 0 stopped as asked, 1 could not start or failed, 2 wrong flags or settings. What goes wrong
//! before the log is set up is one paragraph on stderr.

use clap::{Args, Parser, Subcommand};
use dom0d::agent::{self, Start};
use dom0d::config::{self, LogFormat, MetricsAddress, Overrides, Settings, ToolstackChoice, WorldChoice};
use dom0d::store::{FaultPoint, FaultWhen};
use dom0d::{logging, machine, model::MiB, sim, xen};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Turns a Xen host into a managed one: XML-RPC over TLS, durable jobs, VMs.
///
/// Try it without Xen and without root: dom0d --dev
#[derive(Debug, Parser)]
#[command(name = "dom0d", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    daemon: Daemon,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Daemon {
    /// Settings; without this, /etc/dom0d/dom0d.toml if it exists (with --dev: the defaults)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Try it out: a simulated host, a fresh state folder, 127.0.0.1, no root; cannot touch this machine
    #[arg(long)]
    dev: bool,
    /// Where managers connect to [default: 0.0.0.0:8899; with --dev 127.0.0.1, a free port if 8899 is taken]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Where monitoring reads, or "" for nowhere [default: 127.0.0.1:9178; with --dev a free port, told in the log]
    #[arg(long, value_name = "ADDR:PORT", value_parser = metrics_address)]
    metrics_listen: Option<MetricsAddress>,
    /// Where state lies [default: /var/lib/dom0d; with --dev a new folder, gone afterwards]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The first line of this file becomes the password of user `oracle`
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// What runs the VMs
    #[arg(long, value_name = "auto|xl|sim", value_parser = toolstack)]
    toolstack: Option<ToolstackChoice>,
    /// Whose links and addresses
    #[arg(long, value_name = "linux|sim", value_parser = world)]
    kernel: Option<WorldChoice>,
    /// Whose clock, power and hardware
    #[arg(long, value_name = "linux|sim", value_parser = world)]
    host: Option<WorldChoice>,
    /// Check the settings and end
    #[arg(long)]
    check_config: bool,
    /// End at once, as if killed, at the N-th commit to the store (for tests of crashes)
    #[arg(long, hide = true, requires = "dev", value_name = "N[:before|:after]", value_parser = fault_point)]
    die_at_commit: Option<FaultPoint>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The simulated world of a `--dev` daemon, as a process of its own
    #[command(hide = true)]
    SimulatedWorld {
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Memory of the simulated host
        #[arg(long, value_name = "N", default_value_t = 65_536)]
        memory_mib: u64,
    },
    /// Joins the streams of an `xl migrate` with a socket of the daemon; xl starts it
    #[command(hide = true)]
    MigrationPipe {
        #[arg(value_name = "SOCKET")]
        socket: PathBuf,
    },
}

fn metrics_address(text: &str) -> Result<MetricsAddress, String> {
    MetricsAddress::try_from(text.to_owned())
        .map_err(|_| "allowed: an address and a port, or \"\"".to_owned())
}

fn toolstack(text: &str) -> Result<ToolstackChoice, String> {
    match text {
        "auto" => Ok(ToolstackChoice::Auto),
        "xl" => Ok(ToolstackChoice::Xl),
        "sim" => Ok(ToolstackChoice::Sim),
        _ => Err("allowed: auto, xl, sim".to_owned()),
    }
}

fn world(text: &str) -> Result<WorldChoice, String> {
    match text {
        "linux" => Ok(WorldChoice::Linux),
        "sim" => Ok(WorldChoice::Sim),
        _ => Err("allowed: linux, sim".to_owned()),
    }
}

fn fault_point(text: &str) -> Result<FaultPoint, String> {
    let (number, when) = match text.split_once(':') {
        None => (text, FaultWhen::After),
        Some((number, "after")) => (number, FaultWhen::After),
        Some((number, "before")) => (number, FaultWhen::Before),
        Some(_) => return Err("allowed: N, N:before, N:after".to_owned()),
    };
    let at_commit = number.parse().map_err(|_| "N must be a whole number".to_owned())?;
    Ok(FaultPoint { at_commit, when })
}

/// Why the process ends, with its code.
#[derive(Debug)]
enum Failure {
    Usage(String),
    Start(String),
}

fn main() -> ExitCode {
    machine::memory::tune_allocator();
    // Nothing we make is for others to read; the operator's socket gets its own mode.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let failure = match run(Cli::parse()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    let (text, code) = match failure {
        Failure::Usage(text) => (text, 2),
        Failure::Start(text) => (text, 1),
    };
    say(&format!("dom0d: {text}"));
    ExitCode::from(code)
}

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Some(Command::SimulatedWorld { socket, memory_mib }) => {
            // It has a log of its own, of a few lines, on its stderr.
            logging::init(config::LogLevel::Info, LogFormat::Text).map_err(start_failure)?;
            let options = sim::Options { memory: MiB(memory_mib), ..sim::Options::default() };
            return sim::process::run(&socket, options).map_err(start_failure);
        }
        Some(Command::MigrationPipe { socket }) => {
            return xen::xl::pipe::run(&socket).map_err(start_failure);
        }
        None => {}
    }
    let daemon = cli.daemon;
    let config_file = config_file(&daemon);
    if daemon.check_config {
        // No dev folder is made and no port tried for a mere check.
        let overrides = overrides(&daemon, daemon.state_dir.clone(), daemon.listen)?;
        load(config_file.as_deref(), &overrides)?;
        let name = config_file.map_or("the defaults".to_owned(), |file| file.display().to_string());
        return writeln!(io::stdout(), "{name}: good").map_err(start_failure);
    }
    let listen = daemon.listen.or_else(|| daemon.dev.then(dev_address));
    let mut overrides = overrides(&daemon, daemon.state_dir.clone(), listen)?;
    let mut settings = load(config_file.as_deref(), &overrides)?;
    // Only now, so that wrong settings leave no folder behind.
    let folder = (daemon.dev && daemon.state_dir.is_none()).then(FreshFolder::new).transpose()?;
    if let Some(folder) = &folder {
        overrides.state_dir = Some(folder.0.clone());
        settings = load(config_file.as_deref(), &overrides)?;
    }
    logging::init(settings.log.level, settings.log.format).map_err(start_failure)?;
    settings.wire.max_connections = connections_that_fit(settings.wire.max_connections);
    let start = Start {
        settings,
        dev: daemon.dev,
        ephemeral_state: folder.is_some(),
        password_file: daemon.password_file,
        fault: daemon.die_at_commit,
        config_file,
        overrides,
    };
    block_on(agent::run(start))?.map_err(|error| match error {
        agent::StartError::Refused(text) => Failure::Usage(text),
        error => start_failure(error),
    })
}

/// Descriptors for all that is no connection: the store, children's pipes, the world.
const OTHER_DESCRIPTORS: u64 = 256;
/// Children inherit the limit, and some try to close every descriptor there could be.
const USUAL_DESCRIPTORS: u64 = 65_536;

/// Raises the limit of open files as far as it may be, and says how many connections then fit: better to refuse one
/// in good order than to fail for want of a descriptor somewhere in a job.
fn connections_that_fit(wanted: usize) -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (mut soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files is not known");
            return wanted;
        }
    };
    let raised = raised_limit(wanted, soft, hard);
    match setrlimit(Resource::RLIMIT_NOFILE, raised, hard) {
        Ok(()) => soft = raised,
        Err(error) => tracing::warn!(%error, soft, hard, "the limit of open files cannot be raised"),
    }
    let fit = clamped(wanted, soft);
    if fit < wanted {
        tracing::warn!(
            wanted,
            connections = fit,
            limit = soft,
            "fewer connections than wire.max_connections fit into the limit of open files; raise it \
             (LimitNOFILE= in the unit)"
        );
    }
    fit
}

fn raised_limit(connections: usize, soft: u64, hard: u64) -> u64 {
    let needed = u64::try_from(connections).unwrap_or(u64::MAX).saturating_add(OTHER_DESCRIPTORS);
    needed.max(USUAL_DESCRIPTORS).min(hard).max(soft)
}

fn clamped(connections: usize, limit: u64) -> usize {
    let left = usize::try_from(limit.saturating_sub(OTHER_DESCRIPTORS)).unwrap_or(usize::MAX);
    // A few always, or nobody could ask what is wrong.
    connections.min(left.max(16))
}

fn start_failure(error: impl std::error::Error) -> Failure {
    // The sentence of an error does not hold that of its source; here a person needs both.
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Failure::Start(text)
}

fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Settings, Failure> {
    config::load(file, overrides).map_err(|error| Failure::Usage(error.to_string()))
}

/// A named file must exist, the usual one may. A `--dev` daemon leaves the usual one alone: it is a real host's.
fn config_file(daemon: &Daemon) -> Option<PathBuf> {
    let usual = Path::new(config::DEFAULT_FILE);
    match &daemon.config {
        Some(file) => Some(file.clone()),
        None if !daemon.dev && usual.exists() => Some(usual.to_owned()),
        None => None,
    }
}

fn overrides(
    daemon: &Daemon,
    state_dir: Option<PathBuf>,
    listen: Option<SocketAddr>,
) -> Result<Overrides, Failure> {
    let dev = daemon.dev;
    // The daemon outlives the folder it was started in, so a relative path is resolved here and once.
    let absolute = |dir: PathBuf| {
        std::path::absolute(&dir).map_err(|error| Failure::Usage(format!("--state-dir {dir:?}: {error}")))
    };
    Ok(Overrides {
        toolstack: daemon.toolstack.or(dev.then_some(ToolstackChoice::Sim)),
        kernel: daemon.kernel.or(dev.then_some(WorldChoice::Sim)),
        host: daemon.host.or(dev.then_some(WorldChoice::Sim)),
        listen,
        // Several may be tried out at once.
        metrics_listen: daemon.metrics_listen.or(dev.then_some(MetricsAddress(Some(FREE_PORT)))),
        state_dir: state_dir.map(absolute).transpose()?,
        log_level: None,
        // In front of a newcomer the log is on the screen, also if the shell was started by systemd.
        log_format: (dev && daemon.config.is_none()).then_some(LogFormat::Text),
    })
}

/// A new folder that nobody else may enter, gone when this is dropped: when the agent has ended, however.
#[derive(Debug)]
struct FreshFolder(PathBuf);

impl FreshFolder {
    fn new() -> Result<Self, Failure> {
        let template = std::env::temp_dir().join("dom0d-dev-XXXXXX");
        nix::unistd::mkdtemp(&template).map(Self).map_err(|error| {
            Failure::Start(format!("cannot make a folder like {}: {error}", template.display()))
        })
    }
}

impl Drop for FreshFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "the folder of this run stays behind");
        }
    }
}

/// A port of the kernel's choice.
const FREE_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// 127.0.0.1:8899, or a port of the kernel's choice if that one is taken. Tried by binding, so that it is also
/// right for a port whose owner we cannot see.
fn dev_address() -> SocketAddr {
    let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, 8899));
    match TcpListener::bind(usual) {
        Ok(_) => usual,
        Err(error) => {
            say(&format!("dom0d: port 8899 cannot be had ({error}), so a free one is taken"));
            FREE_PORT
        }
    }
}

/// Runs `future` on the runtime.
///
/// Two workers: what runs on them is short (parsing, TLS records, scheduling), and two are enough that one long
/// piece of it does not keep other callers waiting; a dom0 has few CPUs, and they belong to the guests first. What
/// blocks runs on at most 16 threads, which end when idle; a call that finds them all busy waits for one.
fn block_on<F: Future>(future: F) -> Result<F::Output, Failure> {
    const WORKERS: usize = 2;
    const BLOCKING: usize = 16;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .thread_name("dom0d")
        .enable_all()
        .build()
        .map_err(|error| Failure::Start(format!("cannot start threads: {error}")))?;
    let output = runtime.block_on(future);
    // A blocking call that hangs (a dead NFS) must not keep a stopped daemon from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(output)
}

/// One line on stderr. That it cannot be written is no reason to fail.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn daemon(args: &[&str]) -> Result<Daemon, clap::Error> {
        Cli::try_parse_from([&["dom0d"], args].concat()).map(|cli| cli.daemon)
    }

    #[test]
    fn the_flags_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn dev_makes_all_three_worlds_simulated_and_a_flag_overrides_one() {
        let flags = overrides(&daemon(&["--dev"]).unwrap(), None, None).unwrap();
        assert_eq!(flags.toolstack, Some(ToolstackChoice::Sim));
        assert_eq!((flags.kernel, flags.host), (Some(WorldChoice::Sim), Some(WorldChoice::Sim)));
        let flags = overrides(&daemon(&["--dev", "--kernel", "linux"]).unwrap(), None, None).unwrap();
        assert_eq!((flags.kernel, flags.host), (Some(WorldChoice::Linux), Some(WorldChoice::Sim)));
        let flags = overrides(&daemon(&[]).unwrap(), None, None).unwrap();
        assert_eq!((flags.toolstack, flags.kernel, flags.host), (None, None, None));
    }

    #[test]
    fn a_fault_point_is_a_number_with_its_side_and_only_for_dev() {
        let point = |text| daemon(&["--dev", "--die-at-commit", text]).map(|d| d.die_at_commit);
        assert_eq!(point("7").unwrap(), Some(FaultPoint { at_commit: 7, when: FaultWhen::After }));
        assert_eq!(point("7:before").unwrap(), Some(FaultPoint { at_commit: 7, when: FaultWhen::Before }));
        for bad in ["", "x", "7:", "7:never", "-1"] {
            assert!(point(bad).is_err(), "{bad}");
        }
        assert!(daemon(&["--die-at-commit", "7"]).is_err());
    }

    #[test]
    fn a_fresh_folder_is_private_and_goes_with_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let folder = FreshFolder::new().unwrap();
        let path = folder.0.clone();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::write(path.join("state"), "x").unwrap();
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn a_relative_state_folder_is_made_absolute() {
        let flags = overrides(&daemon(&[]).unwrap(), Some(PathBuf::from("here")), None).unwrap();
        assert!(flags.state_dir.unwrap().is_absolute());
    }

    #[test]
    fn the_limit_of_open_files_is_raised_for_the_connections_and_no_more_are_taken_than_fit() {
        assert_eq!(raised_limit(1024, 1024, 524_288), USUAL_DESCRIPTORS);
        assert_eq!(raised_limit(65_536, 1024, 524_288), 65_536 + OTHER_DESCRIPTORS);
        assert_eq!(raised_limit(1024, 1024, 4096), 4096);
        assert_eq!(raised_limit(1, 524_288, 524_288), 524_288, "never lowered");
        assert_eq!(clamped(1024, 65_536), 1024);
        assert_eq!(clamped(1024, 1024), 768);
        assert_eq!(clamped(1024, 100), 16);
        assert_eq!(clamped(4, 100), 4);
    }
}
