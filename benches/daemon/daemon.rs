//! A daemon under measurement, what it costs, and callers for it.

use dom0d::model::Secret;
use dom0d::wire::{Client, Credentials, ServerTrust, Value};
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const TIMEOUT: Duration = Duration::from_secs(120);
const PASSWORD: &str = "a-password-for-benches";

pub fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap();
}

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A process that ends with this.
pub struct Process {
    child: Child,
    clock: ClockId,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Self {
        let child = command.spawn().unwrap();
        let clock = clock_getcpuclockid(Pid::from_raw(child.id().cast_signed())).unwrap();
        Self { child, clock }
    }

    /// CPU time of the whole process, ended threads included.
    pub fn cpu(&self) -> Duration {
        self.clock.now().unwrap().into()
    }

    pub fn stdout(&mut self) -> BufReader<std::process::ChildStdout> {
        BufReader::new(self.child.stdout.take().unwrap())
    }

    pub fn status_kib(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn rss_mib(&self) -> f64 {
        self.status_kib("VmRSS:") as f64 / 1024.0
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Daemon {
    pub process: Process,
    pub address: SocketAddr,
    /// From the process's start to READY=1.
    pub ready: Duration,
}

/// A state folder and its simulated world; both gone with this.
pub struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn world_socket(&self) -> PathBuf {
        self.state().join("world.sock")
    }

    /// A simulated world before the daemon, with much memory.
    pub fn start_world(&self, memory_mib: u64) {
        std::fs::create_dir_all(self.state()).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_dom0d"))
            .args(["simulated-world", "--memory-mib", &memory_mib.to_string(), "--socket"])
            .arg(self.world_socket())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while std::os::unix::net::UnixStream::connect(self.world_socket()).is_err() {
            assert!(child.try_wait().unwrap().is_none(), "the world has ended");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// `settings`: lines of dom0d.toml.
    pub fn start(&self, settings: &str) -> Daemon {
        let path = |name: &str| self.dir.path().join(name);
        std::fs::write(path("password"), PASSWORD).unwrap();
        std::fs::write(path("dom0d.toml"), settings).unwrap();
        let _ = std::fs::remove_file(path("notify"));
        let notify = UnixDatagram::bind(path("notify")).unwrap();
        notify.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dom0d"));
        command
            .args(["--dev", "--listen", "127.0.0.1:0", "--password-file"])
            .arg(path("password"))
            .arg("--config")
            .arg(path("dom0d.toml"))
            .arg("--state-dir")
            .arg(self.state())
            .env("NOTIFY_SOCKET", path("notify"))
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(path("log")).unwrap());
        let started = Instant::now();
        let mut process = Process::spawn(&mut command);
        let mut message = [0; 512];
        while !message.starts_with(b"READY=1") {
            let length = notify.recv(&mut message).unwrap();
            message[length..].fill(0);
        }
        let ready = started.elapsed();
        let mut line = String::new();
        process.stdout().read_line(&mut line).unwrap();
        let address = line.split("https://").nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
        Daemon { process, address, ready }
    }

    pub fn client(&self, address: SocketAddr) -> Client {
        client(&self.tls(), address)
    }

    /// Where the daemon that was started last serves its metrics: a free port, which its log tells.
    pub fn metrics(&self) -> SocketAddr {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap();
        let told = log.split("metrics are served address=").nth(1).expect("the log tells the address");
        told.split_whitespace().next().unwrap().parse().unwrap()
    }

    pub fn tls(&self) -> PathBuf {
        self.state().join("tls")
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.world_socket().with_file_name("world.sock.pid"));
        if let Some(pid) = pid.ok().and_then(|pid| pid.trim().parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

pub fn client(tls_dir: &Path, address: SocketAddr) -> Client {
    let pem = std::fs::read(tls_dir.join("ca.pem")).unwrap();
    let der = CertificateDer::from_pem_slice(&pem).unwrap().to_vec();
    let credentials = Credentials { password: Some(Secret::new(PASSWORD)), certificate: None };
    Client::tls(address, &ServerTrust::Ca { der, name: Some("localhost".to_owned()) }, &credentials).unwrap()
}

pub async fn call(client: &mut Client, verb: &str, params: &[Value]) -> Value {
    client.call(verb, params, TIMEOUT).await.unwrap()
}

/// So many calls of one verb by so many callers at once.
pub async fn load(clients: &mut [Client], calls: usize, verb: &str, params: &[Value]) {
    let each = calls.div_ceil(clients.len());
    let callers = clients.iter_mut().map(|client| async move {
        for _ in 0..each {
            call(client, verb, params).await;
        }
    });
    futures_util::future::join_all(callers).await;
}

pub fn text(text: impl Into<String>) -> Value {
    Value::String(text.into())
}

pub fn structure<const N: usize>(members: [(&str, Value); N]) -> Value {
    Value::Struct(members.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
}

pub const REPO: &str = "0004fb00-0003-0000-d4f1-e2c3b4a59687";

pub fn vm_id(n: usize) -> String {
    format!("0004fb00-0006-4000-8000-{n:012x}")
}

/// A VM whose element of `list_vms` has about 7 KB: 16 CPUs of the host for each of two virtual ones, three disks, two
/// interfaces.
pub async fn create_vm(client: &mut Client, n: usize) {
    let disk = |m: usize| {
        let device = ["xvda", "xvdb", "xvdc"][m];
        text(format!("file:/OVS/Repositories/{REPO}/VirtualDisks/{}-{m}.img,{device},w", vm_id(n)))
    };
    let vif = |m: usize| text(format!("mac=00:21:f6:{m:02x}:{:02x}:{:02x},bridge=xenbr0", n / 256, n % 256));
    let params = structure([
        ("name", text(format!("vm-{n:04}"))),
        ("OVM_simple_name", text(format!("web server {n}"))),
        ("OVM_domain_type", text("xen_pvm")),
        ("memory", Value::Int(128)),
        ("maxmem", Value::Int(128)),
        ("vcpus", Value::Int(2)),
        ("disk", Value::Array((0..3).map(disk).collect())),
        ("vif", Value::Array((0..2).map(vif).collect())),
        ("vfb", Value::Array(vec![text("type=vnc,vncunused=1,vnclisten=127.0.0.1,keymap=en-us")])),
    ]);
    call(client, "create_vm", &[text(REPO), text(vm_id(n)), params]).await;
}

/// VMs `0..count`, made by several callers at once.
pub async fn create_vms(clients: &mut [Client], count: usize, start: bool) {
    let callers = clients.len();
    let makers = clients.iter_mut().enumerate().map(|(first, client)| async move {
        for n in (first..count).step_by(callers) {
            create_vm(client, n).await;
            if start {
                call(client, "start_vm", &[text(REPO), text(vm_id(n))]).await;
            }
        }
    });
    futures_util::future::join_all(makers).await;
}
