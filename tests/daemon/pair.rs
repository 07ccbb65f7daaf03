//! Two daemons with a world each, which know each other as peers, and the link between them, which can be cut.
//!
//! Each calls the other by a proxy of its own, whose address stays when a daemon comes back on another port.

use crate::support::*;
use dom0d::api::value::{structure, text};
use dom0d::model::{Secret, VmId};
use dom0d::sim::{Answer, DomainView, Handle, Request, State};
use dom0d::wire::{Client, Credentials, ServerTrust, TlsIdentity, Value};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

/// Once both hosts are back.
pub const DECIDED_WITHIN: Duration = Duration::from_secs(60);

/// A way to a daemon.
pub struct Proxy {
    pub address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    up: watch::Sender<bool>,
    /// Bytes towards the target so far.
    bytes: Arc<AtomicU64>,
}

impl Proxy {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(address));
        let up = watch::Sender::new(true);
        let bytes = Arc::new(AtomicU64::new(0));
        let (to, state, count) = (Arc::clone(&target), up.subscribe(), Arc::clone(&bytes));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let to = *to.lock().unwrap();
                if *state.borrow() {
                    tokio::spawn(carry(stream, to, state.clone(), Arc::clone(&count)));
                }
            }
        });
        Self { address, target, up, bytes }
    }

    pub fn lead_to(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = target;
    }

    /// Down: what is open breaks, and nothing new gets through.
    pub fn set(&self, up: bool) {
        self.up.send_replace(up);
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }
}

async fn carry(mut near: TcpStream, to: SocketAddr, mut up: watch::Receiver<bool>, count: Arc<AtomicU64>) {
    let Ok(mut far) = TcpStream::connect(to).await else { return };
    let (mut near_read, mut near_write) = near.split();
    let (mut far_read, mut far_write) = far.split();
    let there = async {
        let mut bytes = vec![0; 16 * 1024];
        while let Ok(n) = near_read.read(&mut bytes).await {
            count.fetch_add(n as u64, Ordering::SeqCst);
            if n == 0 || far_write.write_all(&bytes[..n]).await.is_err() {
                let _ = far_write.shutdown().await;
                return;
            }
        }
    };
    let back = async {
        let _ = tokio::io::copy(&mut far_read, &mut near_write).await;
        let _ = near_write.shutdown().await;
    };
    tokio::select! {
        _ = async { tokio::join!(there, back) } => {}
        _ = up.wait_for(|up| !up) => {}
    }
}

pub struct Host {
    pub home: Home,
    pub daemon: Option<Daemon>,
    /// How the other host comes here.
    pub way: Proxy,
}

impl Host {
    async fn new(settings: &str) -> Self {
        let home = Home::new();
        if !settings.is_empty() {
            home.settings(settings);
        }
        let way = Proxy::start().await;
        let mut host = Self { home, daemon: None, way };
        host.start().await;
        host
    }

    pub async fn start(&mut self) {
        let daemon = self.home.start().await;
        self.way.lead_to(daemon.address);
        self.daemon = Some(daemon);
    }

    pub async fn start_dying(&mut self, point: &str) {
        let daemon = self.home.start_dying(point).await;
        self.way.lead_to(daemon.address);
        self.daemon = Some(daemon);
    }

    pub async fn kill(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.kill_if_alive().await;
        }
    }

    pub fn local(&self) -> Caller {
        self.daemon.as_ref().unwrap().local()
    }

    pub fn world(&self) -> Handle {
        self.home.world()
    }

    pub async fn fingerprint(&self) -> String {
        let certificate = self.local().ask("certificate_get", &[]).await;
        string(field(&certificate, "ca_fingerprint"))
    }

    pub async fn trust(&self, other: &Host) {
        let params = [text(other.way.address), text(other.fingerprint().await)];
        self.local().ask("peer_add", &params).await;
    }

    pub async fn domains(&self) -> Vec<DomainView> {
        match self.world().call(Request::List, PATIENCE).await.unwrap() {
            Answer::Domains(domains) => domains.into_iter().skip(1).collect(),
            other => panic!("{other:?}"),
        }
    }

    pub async fn runs(&self, vm: VmId) -> bool {
        let running = |d: &&DomainView| matches!(d.state, State::Running | State::Blocked);
        self.domains().await.iter().filter(|d| d.vm == Some(vm)).filter(running).count() == 1
    }

    pub async fn events(&self, kind: &str) -> Vec<Value> {
        let filter = structure([("limit", dom0d::api::value::int(1000))]);
        let answer = self.local().ask("event_list", &[filter]).await;
        let events = match &answer {
            Value::Array(_) => list(&answer).to_vec(),
            other => list(field(other, "events")).to_vec(),
        };
        events.into_iter().filter(|event| string(field(event, "type")) == kind).collect()
    }
}

pub struct Pair {
    pub a: Host,
    pub b: Host,
}

impl Pair {
    pub async fn new() -> Self {
        Self::with("").await
    }

    pub async fn with(settings: &str) -> Self {
        let (a, b) = tokio::join!(Host::new(settings), Host::new(settings));
        a.trust(&b).await;
        b.trust(&a).await;
        Self { a, b }
    }

    /// The first host's certificate, at the second.
    pub async fn peer_of_b(&self) -> Caller {
        let read = |name: &str| std::fs::read_to_string(self.a.home.state.join("tls").join(name)).unwrap();
        let certificate =
            Some(TlsIdentity { chain_pem: read("server.pem"), key_pem: Secret::new(read("server.key")) });
        let trust = ServerTrust::Fingerprint { sha256: self.b.fingerprint().await };
        let b = self.b.daemon.as_ref().unwrap();
        Caller(Client::tls(b.address, &trust, &Credentials { password: None, certificate }).unwrap())
    }

    /// A VM that runs on the first host.
    pub async fn started(&self) -> VmId {
        let vm = VmId::random();
        let mut local = self.a.local();
        local.create(vm).await;
        local.on_vm("start_vm", vm).await;
        vm
    }

    pub fn to_b(&self, vm: VmId) -> [Value; 3] {
        [text(REPO), text(vm), text(self.b.way.address)]
    }

    pub fn to_a(&self, vm: VmId) -> [Value; 3] {
        [text(REPO), text(vm), text(self.a.way.address)]
    }

    /// It runs on exactly one, whose record says so; the other has neither domain nor record; it never ran on two.
    pub async fn settled_on(&self, vm: VmId) -> Result<&'static str, String> {
        let (on_a, on_b) = (self.a.runs(vm).await, self.b.runs(vm).await);
        let (here, there, name) = match (on_a, on_b) {
            (true, false) => (&self.a, &self.b, "a"),
            (false, true) => (&self.b, &self.a, "b"),
            (false, false) => return Err("it runs nowhere".to_owned()),
            (true, true) => panic!("it runs twice\n{}\n{}", self.a.home.log(), self.b.home.log()),
        };
        let state = here.local().state_of(vm).await;
        if state.as_deref() != Some("running") {
            return Err(format!("the record on {name} says {state:?}"));
        }
        if let Some(state) = there.local().state_of(vm).await {
            return Err(format!("the other host has a record, {state}"));
        }
        let left = there.domains().await.into_iter().filter(|d| d.vm == Some(vm)).count();
        if left != 0 {
            return Err(format!("the other host than {name} has {left} domains of it"));
        }
        for host in [&self.a, &self.b] {
            let mut local = host.local();
            let undecided = local.ask("migration_list", &[]).await;
            if !list(&undecided).is_empty() || local.open_jobs().await != 0 {
                return Err(format!("undecided: {undecided:?}"));
            }
            assert_eq!(host.world().audit().await.unwrap().doubled(), vec![]);
        }
        Ok(name)
    }

    /// Waits until it runs on exactly one, and answers which.
    pub async fn decided(&self, vm: VmId, what: &str) -> &'static str {
        let deadline = Instant::now() + DECIDED_WITHIN;
        loop {
            match self.settled_on(vm).await {
                Ok(name) => return name,
                Err(why) => {
                    let logs = || format!("a:\n{}\nb:\n{}", self.a.home.log(), self.b.home.log());
                    assert!(Instant::now() < deadline, "{what}: {why}\n{}", logs());
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}
