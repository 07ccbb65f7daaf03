//! A daemon as its users have it: a process with a state folder and a simulated world that outlives it.
//!
//! A [`Home`] is the folder; daemons come and go in it, and the world's process ends with it. Everything here
//! that waits gives up at a deadline and then shows the daemon's log.

use dom0d::api::value::{int, structure, text, texts};
use dom0d::model::{Secret, VmId};
use dom0d::sim::{Answer, Handle, Request, State};
use dom0d::wire::{Client, ClientError, Credentials, ServerTrust, Value};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

/// For what takes a moment on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
pub const PASSWORD: &str = "test-Passwort-1";
pub const REPO: &str = "0004fb0000030000aa11bb22cc33dd44";
/// Where no manager answers: nothing is sent beyond loopback.
pub const NO_MANAGER: &str = "https://127.0.0.1:1/api";

/// The folder of a daemon and of its world.
pub struct Home {
    folder: tempfile::TempDir,
    pub state: PathBuf,
}

impl Home {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        Self::at(folder, state)
    }

    /// The state lies elsewhere: on a disk of its own.
    pub fn with_state(state: PathBuf) -> Self {
        Self::at(tempfile::tempdir().unwrap(), state)
    }

    fn at(folder: tempfile::TempDir, state: PathBuf) -> Self {
        std::fs::write(folder.path().join("password"), format!("{PASSWORD}\n")).unwrap();
        Self { folder, state }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Settings that every daemon started from now on reads.
    pub fn settings(&self, toml: &str) {
        std::fs::write(self.path("dom0d.toml"), toml).unwrap();
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    pub fn command(&self) -> Command {
        // Another build of the same daemon may be measured.
        let built =
            std::env::var_os("DOM0D_UNDER_TEST").unwrap_or_else(|| env!("CARGO_BIN_EXE_dom0d").into());
        let mut command = Command::new(built);
        command.args(self.arguments()).env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS");
        command
    }

    pub fn arguments(&self) -> Vec<String> {
        let name = |path: &Path| path.to_str().unwrap().to_owned();
        let mut arguments = vec!["--dev".to_owned(), "--state-dir".to_owned(), name(&self.state)];
        arguments.extend(["--listen".to_owned(), "127.0.0.1:0".to_owned()]);
        if !self.state.join("tls").exists() {
            arguments.extend(["--password-file".to_owned(), name(&self.path("password"))]);
        }
        if self.path("dom0d.toml").exists() {
            arguments.extend(["--config".to_owned(), name(&self.path("dom0d.toml"))]);
        }
        arguments
    }

    pub async fn start(&self) -> Daemon {
        self.start_with(&[]).await
    }

    pub async fn start_with(&self, more: &[&str]) -> Daemon {
        let mut command = self.command();
        command.args(more);
        self.launch(command).await
    }

    /// A daemon that dies at this point (`N:before`, `N:after`). Work of its own that was due may bring it there
    /// before it has greeted; then that is done first.
    pub async fn start_dying(&self, point: &str) -> Daemon {
        for _ in 0..5 {
            let mut command = self.command();
            command.args(["--die-at-commit", point]);
            if let Some(daemon) = self.try_launch(command).await {
                return daemon;
            }
            let daemon = self.start().await;
            daemon.local().until_settled().await;
            daemon.kill().await;
        }
        panic!("the daemon always dies before it greets at {point}:\n{}", self.log());
    }

    /// Starts what is a daemon of this home in the end, and waits for its greeting.
    pub async fn launch(&self, command: Command) -> Daemon {
        match self.try_launch(command).await {
            Some(daemon) => daemon,
            None => panic!("the daemon does not start:\n{}", self.log()),
        }
    }

    /// `None`: it ended without a greeting.
    async fn try_launch(&self, mut command: Command) -> Option<Daemon> {
        let log = std::fs::File::options().append(true).create(true).open(self.path("daemon.log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
        let began = Instant::now();
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = timeout(PATIENCE, lines.next_line()).await;
        let first =
            first.unwrap_or_else(|_| panic!("the daemon does not greet:\n{}", self.log())).unwrap()?;
        let after = first.split("https://").nth(1).unwrap_or_else(|| panic!("no address in {first:?}"));
        let address = after.split('/').next().unwrap().parse().unwrap();
        let ca = first.split("CA certificate: ").nth(1).unwrap().trim_end_matches(')').into();
        let mut greeting = vec![first];
        while greeting.len() < 3 {
            greeting.push(timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap()?);
        }
        let started_in = began.elapsed();
        Some(Daemon { child, address, ca, socket: self.state.join("dom0d.sock"), greeting, started_in })
    }

    pub fn world(&self) -> Handle {
        Handle::remote(&self.state.join("world.sock"))
    }

    fn world_pid(&self) -> Option<Pid> {
        let pid = std::fs::read_to_string(self.state.join("world.sock.pid")).ok()?.trim().parse().ok()?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        // The number may be somebody else's by now.
        let ours = String::from_utf8_lossy(&command).contains(self.state.to_str()?);
        ours.then(|| Pid::from_raw(pid))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(pid) = self.world_pid() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

pub struct Daemon {
    pub child: Child,
    pub address: SocketAddr,
    pub ca: PathBuf,
    pub socket: PathBuf,
    pub greeting: Vec<String>,
    pub started_in: Duration,
}

impl Daemon {
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub async fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap();
    }

    pub async fn kill_if_alive(mut self) {
        self.child.kill().await.unwrap();
    }

    /// Asks it to stop, and answers its exit code.
    pub async fn stop(mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        timeout(PATIENCE, self.child.wait()).await.expect("it stops in time").unwrap().code()
    }

    /// By the operator's socket.
    pub fn local(&self) -> Caller {
        Caller(Client::unix(&self.socket))
    }

    /// By TLS, as a manager.
    pub fn remote(&self) -> Caller {
        self.remote_as(PASSWORD)
    }

    pub fn remote_as(&self, password: &str) -> Caller {
        let credentials = Credentials { password: Some(Secret::new(password)), certificate: None };
        let trust = ServerTrust::Ca { der: self.ca_der(), name: None };
        Caller(Client::tls(self.address, &trust, &credentials).unwrap())
    }

    pub fn ca_der(&self) -> Vec<u8> {
        use base64::Engine;
        let pem = std::fs::read_to_string(&self.ca).unwrap();
        let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        base64::engine::general_purpose::STANDARD.decode(body).unwrap()
    }

    /// A figure of `/proc/PID/status` in KiB, or a plain one.
    pub fn status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("{field}:"))).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }
}

/// One who calls.
pub struct Caller(pub Client);

impl Caller {
    pub async fn call(&mut self, verb: &str, params: &[Value]) -> Result<Value, ClientError> {
        self.0.call(verb, params, PATIENCE).await
    }

    /// A call that must not fail.
    pub async fn ask(&mut self, verb: &str, params: &[Value]) -> Value {
        self.call(verb, params).await.unwrap_or_else(|error| panic!("{verb}: {error}"))
    }

    /// A call that must be refused; the fault's text.
    pub async fn refused(&mut self, verb: &str, params: &[Value]) -> String {
        match self.call(verb, params).await {
            Err(ClientError::Fault(fault)) => fault.fault_string,
            other => panic!("{verb}: {other:?} instead of a fault"),
        }
    }

    pub async fn submit(&mut self, verb: &str, params: &[Value], options: Value) -> u64 {
        let params = [text(verb), Value::Array(params.to_vec()), options];
        number(&self.ask("job_submit", &params).await)
    }

    /// Creates a VM of 32 MiB.
    pub async fn create(&mut self, vm: VmId) {
        self.ask("create_vm", &[text(REPO), text(vm), vm_params(vm)]).await;
    }

    pub async fn on_vm(&mut self, verb: &str, vm: VmId) -> Value {
        self.ask(verb, &[text(REPO), text(vm)]).await
    }

    pub async fn state_of(&mut self, vm: VmId) -> Option<String> {
        match self.call("vm_get", &[text(vm)]).await {
            Ok(vm) => Some(string(field(&vm, "state"))),
            Err(ClientError::Fault(fault)) if fault.fault_string.starts_with("VM_NOT_FOUND") => None,
            Err(error) => panic!("vm_get: {error}"),
        }
    }

    pub async fn open_jobs(&mut self) -> u64 {
        let host = self.ask("host_get", &[]).await;
        number(field(field(&host, "agent"), "open_jobs"))
    }

    /// Jobs with numbers above this, newest first.
    pub async fn jobs_after(&mut self, last: u64) -> Vec<Value> {
        let filter = structure([("limit", int(50))]);
        let Value::Array(mut jobs) = self.ask("job_list", &[filter]).await else { panic!("no list") };
        jobs.retain(|job| number(field(job, "id")) > last);
        jobs
    }

    pub async fn last_job(&mut self) -> u64 {
        self.jobs_after(0).await.first().map_or(0, |job| number(field(job, "id")))
    }

    /// All that a daemon writes by itself, at its first start and for a new owner, is written, so that none comes
    /// later.
    pub async fn until_settled(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.ask("store_check", &[]).await;
            let rows = format!("{report:?}");
            let Value::Array(tables) = field(&report, "tables") else { panic!("{rows}") };
            let has = |name: &str, count| {
                let table = tables.iter().find(|table| string(field(table, "name")) == name);
                table.is_some_and(|table| number(field(table, "rows")) == count)
            };
            let has_all = has("recurring", 3) && has("event_note", 1);
            if has_all && self.open_jobs().await == 0 && self.delivers_if_owned().await {
                return;
            }
            assert!(Instant::now() < deadline, "recurring work does not end: {rows}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// To an owner's URL: they have noted where they begin.
    async fn delivers_if_owned(&mut self) -> bool {
        let host = self.ask("host_get", &[]).await;
        if string(field(field(&host, "ownership"), "state")) != "owned" {
            return true;
        }
        let status = self.ask("manager_status", &[]).await;
        list(field(&status, "streams")).iter().all(|stream| string(field(stream, "state")) != "unset")
    }

    pub async fn until_idle(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.open_jobs().await > 0 {
            assert!(Instant::now() < deadline, "jobs stay open");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn locks(&mut self) -> usize {
        let Value::Array(locks) = self.ask("lock_list", &[]).await else { panic!("no list") };
        locks.len()
    }
}

/// The domain of a VM as the world has it.
pub async fn domain(world: &Handle, vm: VmId) -> Option<dom0d::sim::DomainView> {
    match world.call(Request::Find { vm }, PATIENCE).await.unwrap() {
        Answer::Domain(domain) => domain,
        other => panic!("{other:?}"),
    }
}

/// As the daemon names the states of what has, or has not, a domain.
pub fn state_word(domain: Option<&dom0d::sim::DomainView>) -> &'static str {
    match domain.map(|domain| domain.state) {
        None => "off",
        Some(State::Running | State::Blocked) => "running",
        Some(State::Paused) => "paused",
        Some(State::Ended(_)) => "ended",
    }
}

pub fn vm_params(vm: VmId) -> Value {
    let id = vm.as_str().replace('-', "");
    let mac = format!("02:00:00:{}:{}:{}", &id[0..2], &id[2..4], &id[4..6]);
    structure([
        ("name", text(&id)),
        ("memory", int(32)),
        ("maxmem", int(64)),
        ("maxvcpus", int(4)),
        ("disk", texts([format!("file:/OVS/Repositories/{REPO}/VirtualDisks/{id}.img,xvda,w")])),
        ("vif", texts([format!("mac={mac},bridge=xenbr0")])),
    ])
}

pub fn fields(value: &Value) -> &BTreeMap<String, Value> {
    match value {
        Value::Struct(map) => map,
        other => panic!("{other:?} is no struct"),
    }
}

pub fn field<'a>(value: &'a Value, name: &str) -> &'a Value {
    fields(value).get(name).unwrap_or_else(|| panic!("no {name} in {value:?}"))
}

pub fn number(value: &Value) -> u64 {
    match value {
        Value::Int(n) => u64::try_from(*n).unwrap(),
        Value::Int64(n) => u64::try_from(*n).unwrap(),
        other => panic!("{other:?} is no number"),
    }
}

pub fn string(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => panic!("{other:?} is no text"),
    }
}

pub fn list(value: &Value) -> &[Value] {
    match value {
        Value::Array(list) => list,
        other => panic!("{other:?} is no array"),
    }
}

/// Waits for a condition; `what` is said if it does not come true.
pub async fn until(what: &str, limit: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
