//! The composition root: the only room that knows every other. It opens the store and the worlds, joins the
//! domains, the engine, the verbs and the wire, lets the jobs of an earlier life go on, and ends it all in order.
//!
//! Order at the start: store, certificates and worlds (at the same time) -> operations -> engine -> wire ->
//! resume, the network of a new boot, recurring work, observe (which adopts what runs) -> READY. At the stop: no new
//! jobs, callers are told, calls under way end, running steps get a moment, the store is closed. What is not done by
//! then is on disk and goes on at the next start.

mod access;
mod figures;
mod peers;
mod reports;
mod signals;
mod statistics;
mod worlds;

use crate::api::{Api, Reports};
use crate::config::{Overrides, Settings};
use crate::event::{self, Event};
use crate::host::{certificate, password};
use crate::job::{Engine, Options as JobOptions, Recurring};
use crate::metrics;
use crate::model::{JobId, SafePath, Secret, Timestamp};
use crate::operation::{Operations, Worlds, migrate_watch, network, observe, plan};
use crate::store::{self, FaultPoint, OpenReport, Recovered, Store};
use crate::wire::{self, Gate, Server, ServerConfig, TlsIdentity, TlsState};
use access::{Surroundings, gate_policy};
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What the entrance hands over.
#[derive(Debug)]
pub struct Start {
    pub settings: Settings,
    pub dev: bool,
    /// The state folder was made for this run (`--dev` without `--state-dir`); `main` removes it afterwards, so
    /// nothing must outlive the run.
    pub ephemeral_state: bool,
    pub password_file: Option<PathBuf>,
    /// Where a daemon under test ends itself, as if killed.
    pub fault: Option<FaultPoint>,
    /// For a reload: the settings are `config::load(config_file, &overrides)`.
    pub config_file: Option<PathBuf>,
    pub overrides: Overrides,
}

/// Why the daemon did not start. Nothing was changed but what the text says.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the state folder {0:?} cannot be used: {1}")]
    StateFolder(PathBuf, String),
    #[error(transparent)]
    Store(#[from] store::OpenError),
    #[error("the store cannot be read")]
    Read(#[from] store::StoreError),
    #[error("certificates")]
    Certificate(#[from] certificate::CertificateError),
    #[error("TLS")]
    Tls(#[from] wire::TlsError),
    #[error(transparent)]
    Listen(#[from] wire::ListenError),
    #[error("sockets handed over by systemd")]
    Activation(#[from] wire::ActivationError),
    #[error("passwords")]
    Auth(#[from] wire::AuthError),
    #[error("the password file {0:?}: {1}")]
    Password(PathBuf, String),
    #[error("{0}")]
    World(String),
    /// As things are set up here it must not start; trying again mends nothing.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("a part of the start was interrupted: {0}")]
    Interrupted(#[from] tokio::task::JoinError),
}

/// Tables of desired state, repeated in the ledger.
const LEDGER: &[(&str, u16)] = &[
    ("vm", 1),
    ("host", 1),
    ("boot", 1),
    ("password", 1),
    ("peer", 1),
    ("arrival", 1),
    ("migration", 1),
    ("network", 1),
];
/// Tables whose numbers must never be given twice.
const COUNTERS: &[&str] = &["job"];
/// Room is left for the names of files below it.
const MAX_STATE_PATH: usize = 512;
/// How often history is brought back to its bounds.
const PRUNE_EVERY: Duration = Duration::from_secs(600);
/// What a stop gives the events that were held back.
const FLUSH_WITHIN: Duration = Duration::from_secs(5);
const CERTIFICATE_CHECK_EVERY: Duration = Duration::from_secs(86_400);

/// Everything that lives while the daemon does.
struct Running {
    store: Store,
    events: event::Log,
    /// And what ends it: later than the rest, so that it tells what that wrote last.
    journal: (tokio::task::JoinHandle<()>, CancellationToken),
    engine: Engine,
    server: Server,
    surroundings: Arc<Surroundings>,
    reports: Reports,
    stop: CancellationToken,
}

/// Runs the daemon until it is told to stop.
pub async fn run(start: Start) -> Result<(), StartError> {
    // First, so that a signal during the start stops us in order too.
    let mut signals = signals::Signals::new()?;
    let launched = tokio::select! {
        launched = launch(&start) => launched.map(Some),
        () = signals.stop() => Ok(None),
    };
    let Ok(Some(running)) = launched else {
        if start.ephemeral_state {
            worlds::end(&start.settings.state.dir).await;
        }
        return launched.map(|_| ());
    };
    let watchdog = signals::watchdog(running.store.clone(), running.stop.clone());
    signals::ready();
    crate::machine::memory::give_back();
    while signals.stop_or_reload().await == signals::Asked::Reload {
        reload(&start, &running).await;
    }
    watchdog.abort();
    stop(&start, running).await;
    Ok(())
}

async fn launch(start: &Start) -> Result<Running, StartError> {
    let settings = Arc::new(start.settings.clone());
    worlds::check(&settings)?;
    let state_dir = state_folder(&settings.state.dir)?;
    // What takes long goes on at the same time: the store, the worlds, the password's hash.
    let opening = tokio::task::spawn_blocking({
        let options = store_options(&settings, start.fault);
        move || store::Store::open(options)
    });
    let mut first = first_password(start, &settings)?;
    let hashing = first.as_ref().map(|password| {
        let password = password.secret.clone();
        tokio::task::spawn_blocking(move || wire::hash_password(&password))
    });
    let worlds = worlds::open(&settings, Path::new(state_dir.as_str())).await?;
    worlds::refuse_xendomains(&settings, &*worlds.machine).await?;
    let names = names(&worlds).await;
    let tls_dir = settings.state.dir.join("tls");
    let certificate = tokio::task::spawn_blocking({
        let (dir, names) = (tls_dir.clone(), names.clone());
        move || certificate::ensure(&dir, &names, crate::model::Timestamp::now())
    })
    .await??;
    let identity = TlsIdentity { chain_pem: certificate.chain_pem, key_pem: certificate.key_pem };
    let tls = Arc::new(TlsState::new(&identity)?);
    let gate = Arc::new(Gate::new(gate_policy(&settings, None, None, &[]))?);
    let opened = opening.await??;
    tell(&opened.report);
    let surroundings = Arc::new(Surroundings::new(
        Arc::clone(&settings),
        Arc::clone(&gate),
        Arc::clone(&tls),
        tls_dir,
        names,
    ));
    let operations = Operations::load(
        opened.store.clone(),
        worlds,
        Arc::clone(&settings),
        Arc::clone(&surroundings) as _,
        state_dir,
    )
    .await?;
    // A made-up one is only for a host that has none: the ledger may have brought one back.
    let wanted = start.password_file.is_some() || !operations.has_password();
    match hashing.filter(|_| wanted) {
        Some(hash) => keep_password(&operations, hash.await??).await?,
        None if start.dev && !operations.has_password() => {
            // A first start was killed before it kept one.
            let made = random_password()?;
            let secret = made.secret.clone();
            let hash = tokio::task::spawn_blocking(move || wire::hash_password(&secret));
            keep_password(&operations, hash.await??).await?;
            first = Some(made);
        }
        None => first = None,
    }
    let floor = JobId(opened.report.counters.get("job").copied().unwrap_or(0));
    let engine =
        Engine::open(opened.store.clone(), Arc::clone(&operations) as _, settings.jobs.clone(), floor)
            .await?;
    operations.join_engine(engine.clone());
    operations.join_peers(Arc::new(peers::TlsLink::new(Arc::clone(&surroundings))));
    let stop = CancellationToken::new();
    let resumed = engine.resume();
    operations.submit_network_at_boot().await;
    if resumed > 0 {
        tracing::info!(jobs = resumed, "jobs of an earlier life go on");
    }
    tell_rebuilt(&operations, &opened.report).await;
    let reports = reports::start(&settings, &operations, &surroundings, &stop).await?;
    let api = Arc::new(Api::new(
        Arc::clone(&operations),
        engine.clone(),
        Arc::clone(&surroundings) as _,
        reports.clone(),
    ));
    let journal_end = CancellationToken::new();
    let journal = tokio::spawn(event::journal(operations.events.clone(), journal_end.clone()));
    tokio::spawn(migrate_watch::run(Arc::clone(&operations), stop.clone()));
    let upgrades = Arc::new(peers::Streams::new(Arc::clone(&operations)));
    let calls = api.calls();
    let (server, socket) = listen(&settings, gate, tls, api, upgrades)?;
    surroundings.serve(server.metrics());
    let sources = figures::Sources {
        operations: Arc::clone(&operations),
        engine: engine.clone(),
        store: opened.store.clone(),
        calls,
        wire: server.metrics(),
        connections: figures::connections(&server),
        lag: Arc::default(),
        disk: Arc::new(figures::Disk::new(&settings.state.dir.join("sled"))),
        started: Timestamp::now(),
        newest: reports::newest(&reports, &operations),
    };
    serve_metrics(&settings, sources, &stop);
    start_recurring(&engine, &operations, &settings);
    if start.dev {
        // One from a file is known to whoever wrote the file.
        greet(&server, &socket, first.filter(|_| start.password_file.is_none()), &settings);
    }
    tokio::spawn(observe::run(Arc::clone(&operations), stop.clone()));
    tokio::spawn(network::look::run(Arc::clone(&operations), stop.clone()));
    tokio::spawn(event::run(operations.events.clone(), stop.clone()));
    let address = server.local_addr().map(|address| address.to_string());
    tracing::info!(address, socket = %socket.display(), took_ms = opened.report.took.as_millis() as u64, "serving");
    let events = operations.events.clone();
    let journal = (journal, journal_end);
    Ok(Running { store: opened.store, events, journal, engine, server, surroundings, reports, stop })
}

/// Made if it is missing (0700), and a path that has no surprises in it.
fn state_folder(dir: &Path) -> Result<SafePath, StartError> {
    let wrong = |why: String| StartError::StateFolder(dir.to_owned(), why);
    let path = dir.to_str().ok_or_else(|| wrong("its name is not UTF-8".to_owned()))?;
    let path = SafePath::parse(path).map_err(|e| wrong(e.to_string()))?;
    if path.as_str().len() > MAX_STATE_PATH {
        return Err(wrong(format!("its path is longer than {MAX_STATE_PATH} bytes")));
    }
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    match made {
        Ok(()) => Ok(path),
        // A folder on a read-only disk is still worth reading.
        Err(_) if dir.is_dir() => Ok(path),
        Err(error) => Err(wrong(error.to_string())),
    }
}

fn store_options(settings: &Settings, fault: Option<FaultPoint>) -> store::Options {
    store::Options {
        cache_mib: settings.state.cache_mib,
        reserve_mib: settings.state.reserve_mib,
        ledger_tables: LEDGER,
        counter_tables: COUNTERS,
        fault,
        ..store::Options::new(&settings.state.dir)
    }
}

/// A password that may become the first one.
struct FirstPassword {
    secret: Secret,
}

fn random_password() -> Result<FirstPassword, StartError> {
    let secret = password::random().map_err(|e| StartError::World(e.to_string()))?;
    Ok(FirstPassword { secret })
}

/// A store that can only be read keeps the password it has, and is served all the same.
async fn keep_password(operations: &Operations, hash: String) -> Result<(), StartError> {
    match operations.first_password(hash).await {
        Err(store::StoreError::ReadOnly(why)) => {
            tracing::warn!(why, "the given password is not taken over");
            Ok(())
        }
        kept => Ok(kept?),
    }
}

/// From the file, or made up for `--dev` when the state is new. A host that has none waits for `dom0ctl password
/// set`.
fn first_password(start: &Start, settings: &Settings) -> Result<Option<FirstPassword>, StartError> {
    let Some(file) = &start.password_file else {
        if !start.dev || settings.state.dir.join("sled").exists() {
            return Ok(None);
        }
        return random_password().map(Some);
    };
    let wrong = |why: String| StartError::Password(file.clone(), why);
    let text = std::fs::read_to_string(file).map_err(|e| wrong(e.to_string()))?;
    let line = text.lines().next().unwrap_or_default();
    let secret = password::check(password::USER, line).map_err(|e| wrong(e.to_string()))?;
    Ok(Some(FirstPassword { secret }))
}

/// What the server's certificate speaks for.
async fn names(worlds: &Worlds) -> certificate::Names {
    let hostname = worlds.machine.facts().await.map(|f| f.hostname).unwrap_or_default();
    let links = worlds.kernel.links().await.unwrap_or_default();
    let addresses = links.iter().filter(|l| !l.loopback).flat_map(|l| l.addresses.iter().map(|(a, _)| *a));
    certificate::Names { hostname, addresses: addresses.collect() }
}

fn tell(report: &OpenReport) {
    match &report.recovered {
        Recovered::Fresh => tracing::info!("a new store was made"),
        Recovered::Intact => {
            tracing::info!(commit = report.commit, rows = report.rows, "the store is intact");
        }
        Recovered::Rebuilt { why, moved_aside } => tracing::error!(
            why, moved_aside = %moved_aside.display(),
            "the store was damaged; VMs, ownership and password are back from the ledger, history is gone"
        ),
        Recovered::ReadOnly { why } => {
            tracing::error!(why, "the store can only be read: nothing can be changed until that is mended");
        }
    }
}

/// A rebuild is told where the manager looks, too.
async fn tell_rebuilt(operations: &Operations, report: &OpenReport) {
    let Recovered::Rebuilt { why, moved_aside } = &report.recovered else { return };
    let text = format!(
        "the store was damaged ({why}); VMs, ownership and password are back from the ledger, jobs and events \
         before this are gone; the old store is kept in {}",
        moved_aside.display()
    );
    let event = Event::new(event::kind::STORE_REBUILT, "host", text);
    if let Err(error) = operations.events.publish(&event).await {
        tracing::warn!(%error, "an event was not written");
    }
}

fn listen(
    settings: &Settings,
    gate: Arc<Gate>,
    tls: Arc<TlsState>,
    api: Arc<Api>,
    upgrades: Arc<peers::Streams>,
) -> Result<(Server, PathBuf), StartError> {
    let activated = wire::activated_sockets()?;
    let socket = match settings.wire.socket.as_os_str().is_empty() {
        true => settings.state.dir.join("dom0d.sock"),
        false => settings.wire.socket.clone(),
    };
    let tcp = match activated.tcp.is_empty() {
        true => vec![wire::bind_tcp(settings.wire.listen)?],
        false => activated.tcp,
    };
    let unix = match activated.unix.is_empty() {
        true => operators_socket(&socket, &settings.wire.socket_group)?,
        false => activated.unix,
    };
    let server = Server::start(ServerConfig {
        settings: settings.wire.clone(),
        access: settings.access.clone(),
        gate,
        tls,
        handler: api,
        upgrades: Some(upgrades),
        tcp,
        unix,
    })?;
    Ok((server, socket))
}

/// A host whose metrics cannot be served is managed all the same.
fn serve_metrics(settings: &Settings, sources: figures::Sources, stop: &CancellationToken) {
    let Some(address) = settings.metrics.listen.0 else { return };
    match metrics::bind(address) {
        Ok(listener) => {
            let address = listener.local_addr().unwrap_or(address);
            tracing::info!(%address, "metrics are served");
            let lag = Arc::clone(&sources.lag);
            let measuring = stop.clone();
            tokio::spawn(async move { lag.measure(measuring).await });
            tokio::spawn(Arc::clone(&sources.disk).measure(stop.clone()));
            tokio::spawn(metrics::serve(listener, Arc::new(sources), stop.clone()));
        }
        Err(error) => {
            let why = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(%error, why, "there are no metrics");
        }
    }
}

/// On a disk that takes no new file, managers are still served.
fn operators_socket(path: &Path, group: &str) -> Result<Vec<UnixListener>, StartError> {
    use std::io::ErrorKind::{ReadOnlyFilesystem, StorageFull};
    match wire::bind_unix(path, group) {
        Ok(listener) => Ok(vec![listener]),
        Err(wire::ListenError::Unix { path, source })
            if matches!(source.kind(), ReadOnlyFilesystem | StorageFull) =>
        {
            tracing::error!(path = %path.display(), error = %source, "there is no operator's socket: its disk cannot be written");
            Ok(Vec::new())
        }
        Err(error) => Err(error.into()),
    }
}

/// The agent's own work, as jobs like any other.
fn start_recurring(engine: &Engine, operations: &Arc<Operations>, settings: &Settings) {
    type Kind = (&'static str, Duration, fn() -> plan::Plan);
    let kinds: [Kind; 3] = [
        ("prune", PRUNE_EVERY, plan::prune),
        ("discover", Duration::from_secs(settings.vm.discovery_interval_s), plan::discover),
        ("renew_certificate", CERTIFICATE_CHECK_EVERY, plan::renew_certificate_if_due),
    ];
    for (name, every, make) in kinds {
        let operations = Arc::clone(operations);
        let submission =
            Arc::new(move || operations.submission(name, "agent", make(), JobOptions::default()));
        engine.start_recurring(Recurring { name, every, submission });
    }
}

/// What a newcomer needs: the address, the credential, the first command.
fn greet(server: &Server, socket: &Path, password: Option<FirstPassword>, settings: &Settings) {
    let address = server.local_addr().map_or_else(|| settings.wire.listen.to_string(), |a| a.to_string());
    let password = match &password {
        Some(password) => password.secret.expose().to_owned(),
        None => "(as it was set)".to_owned(),
    };
    let ca = settings.state.dir.join("tls/ca.pem");
    let text = format!(
        "dom0d listens on https://{address}/RPC2  (CA certificate: {})\n\
         user oracle, password {password}\n\
         first command: {} --socket {} host show\n",
        ca.display(),
        dom0ctl(std::env::current_exe().ok().as_deref(), std::env::var_os("CARGO").is_some()),
        socket.display(),
    );
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// How a newcomer calls dom0ctl: the one beside us; if there is none yet because cargo built and started us alone, by
/// cargo, which builds it.
fn dom0ctl(own: Option<&Path>, by_cargo: bool) -> String {
    let beside = own.map(|own| own.with_file_name("dom0ctl"));
    match beside {
        Some(beside) if beside.is_file() => beside.display().to_string(),
        // Of the same profile as we are: most is built already then.
        Some(beside) if by_cargo && beside.parent().is_some_and(|folder| folder.ends_with("debug")) => {
            "cargo run --bin dom0ctl --".to_owned()
        }
        _ if by_cargo => "cargo run --release --bin dom0ctl --".to_owned(),
        _ => "dom0ctl".to_owned(),
    }
}

/// SIGHUP: what can change while we serve does; the rest is said to need a restart.
async fn reload(start: &Start, running: &Running) {
    signals::reloading();
    match crate::config::load(start.config_file.as_deref(), &start.overrides) {
        Ok(settings) => running.surroundings.reload(settings).await,
        Err(error) => tracing::error!(%error, "the settings cannot be read; the old ones hold"),
    }
    signals::ready();
}

async fn stop(start: &Start, running: Running) {
    signals::stopping();
    tracing::info!("stopping");
    let patience = Duration::from_millis(start.settings.wire.drain_timeout_ms);
    running.stop.cancel();
    let (cut, ()) = tokio::join!(running.server.drain(patience), running.engine.halt(patience));
    if cut > 0 {
        tracing::warn!(connections = cut, "connections were cut after the drain time");
    }
    if tokio::time::timeout(FLUSH_WITHIN, running.events.flush()).await.is_err() {
        tracing::warn!("events that were held back are not told");
    }
    let (journal, journal_end) = running.journal;
    journal_end.cancel();
    // It has a deadline of its own.
    if journal.await.is_err() {
        tracing::warn!("the events' journal ended early");
    }
    reports::end(&running.reports).await;
    running.store.close().await;
    if start.ephemeral_state {
        worlds::end(&start.settings.state.dir).await;
    }
    tracing::info!("stopped");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_command_is_one_that_works_where_the_daemon_was_started() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("dom0d");
        assert_eq!(dom0ctl(Some(&own), true), "cargo run --release --bin dom0ctl --");
        assert_eq!(dom0ctl(Some(&folder.path().join("debug/dom0d")), true), "cargo run --bin dom0ctl --");
        assert_eq!(dom0ctl(Some(&own), false), "dom0ctl");
        std::fs::write(folder.path().join("dom0ctl"), "").unwrap();
        assert_eq!(dom0ctl(Some(&own), true), format!("{}/dom0ctl", folder.path().display()));
    }
}
