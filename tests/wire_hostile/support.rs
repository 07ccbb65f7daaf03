//! A server with a handler that tests can look into, certificates, and raw clients.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dom0d::config;
use dom0d::model::Secret;
use dom0d::wire::{
    Answer, Call, Client, Credentials, Fault, Gate, Handler, Policy, Role, Server, ServerConfig, ServerTrust,
    TlsIdentity, TlsState, Value, bind_tcp, bind_unix, decode_response, encode_call, hash_password,
};
use futures_util::future::BoxFuture;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

pub const PASSWORD: &str = "correct horse battery staple";
/// Far more than anything here takes; reached only when a test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

static HASH: LazyLock<String> = LazyLock::new(|| hash_password(&Secret::new(PASSWORD)).unwrap());

/// A certificate and its key.
pub struct Certified {
    pub identity: TlsIdentity,
    pub der: Vec<u8>,
    params: CertificateParams,
    key: KeyPair,
}

impl Certified {
    pub fn trust(&self) -> ServerTrust {
        ServerTrust::Ca { der: self.der.clone(), name: None }
    }
}

pub fn params() -> CertificateParams {
    CertificateParams::new(vec!["127.0.0.1".to_owned(), "dom0.test".to_owned()]).unwrap()
}

pub fn client_params() -> CertificateParams {
    let mut params = params();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

pub fn self_signed(params: CertificateParams) -> Certified {
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    certified(&certificate, params, key)
}

pub fn ca() -> Certified {
    let mut params = params();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    self_signed(params)
}

pub fn issued(params: CertificateParams, by: &Certified) -> Certified {
    let key = KeyPair::generate().unwrap();
    let issuer = Issuer::from_params(&by.params, &by.key);
    let certificate = params.signed_by(&key, &issuer).unwrap();
    certified(&certificate, params, key)
}

fn certified(certificate: &rcgen::Certificate, params: CertificateParams, key: KeyPair) -> Certified {
    let identity = TlsIdentity { chain_pem: certificate.pem(), key_pem: Secret::new(key.serialize_pem()) };
    Certified { identity, der: certificate.der().to_vec(), params, key }
}

/// Answers a few methods, and counts the calls it works on.
#[derive(Default)]
pub struct Echo {
    pub working: AtomicUsize,
    pub release: tokio::sync::Notify,
}

struct Working<'a>(&'a AtomicUsize);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Handler for Echo {
    fn call(&self, mut call: Call) -> BoxFuture<'_, Result<Answer, Fault>> {
        assert!(call.method != "panic_at_once", "as asked");
        Box::pin(async move {
            self.working.fetch_add(1, Ordering::SeqCst);
            let _working = Working(&self.working);
            match call.method.as_str() {
                "echo" => Ok(call.params.pop().unwrap_or(Value::Nil).into()),
                "who" => Ok(Value::String(call.caller.to_string()).into()),
                "big" => Ok(Value::String("x".repeat(8 << 20)).into()),
                "wait" => {
                    self.release.notified().await;
                    Ok(Value::from("released").into())
                }
                "panic" => panic!("as asked"),
                other => Err(Fault { fault_code: 1, fault_string: format!("unknown method {other}") }),
            }
        })
    }
}

pub struct Host {
    pub server: Server,
    pub address: SocketAddr,
    pub gate: Arc<Gate>,
    pub tls: Arc<TlsState>,
    pub echo: Arc<Echo>,
    pub ca: Certified,
    pub socket: PathBuf,
    _folder: tempfile::TempDir,
}

pub fn policy() -> Policy {
    Policy {
        password_hash: Some(HASH.clone()),
        password_role: Some(Role::Admin),
        owner: None,
        peers: vec![],
        local_group: None,
    }
}

/// Small limits, and times that a busy machine does not cross by itself.
pub fn settings() -> config::Wire {
    config::Wire {
        plain_http: true,
        max_head_bytes: 16 * 1024,
        max_body_bytes: 256 * 1024,
        ..config::Wire::default()
    }
}

/// 2 s for each phase, for those who are to cross them: more than what is in time takes on a busy machine.
pub fn hurried() -> config::Wire {
    config::Wire { head_timeout_ms: 2000, body_timeout_ms: 2000, write_timeout_ms: 2000, ..settings() }
}

pub fn start() -> Host {
    start_with(settings(), 1000)
}

pub fn start_with(settings: config::Wire, max_failures_per_minute: u32) -> Host {
    let ca = ca();
    let tls = Arc::new(TlsState::new(&issued(params(), &ca).identity).unwrap());
    let gate = Arc::new(Gate::new(policy()).unwrap());
    let echo = Arc::new(Echo::default());
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("dom0d.sock");
    let server = Server::start(ServerConfig {
        settings,
        access: config::Access { max_failures_per_minute, ..config::Access::default() },
        gate: gate.clone(),
        tls: tls.clone(),
        handler: echo.clone(),
        upgrades: None,
        tcp: vec![bind_tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap()],
        unix: vec![bind_unix(&socket, "").unwrap()],
    })
    .unwrap();
    let address = server.local_addr().unwrap();
    Host { server, address, gate, tls, echo, ca, socket, _folder: folder }
}

impl Host {
    pub async fn plain(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// All that the server says to `bytes` until it closes.
    pub async fn say(&self, bytes: &[u8]) -> String {
        let mut stream = self.plain().await;
        // The server may close before it has read all.
        let _ = stream.write_all(bytes).await;
        rest(&mut stream).await
    }

    pub fn client(&self, password: Option<&str>, certificate: Option<&Certified>) -> Client {
        let credentials = Credentials {
            password: password.map(Secret::new),
            certificate: certificate.map(|certified| certified.identity.clone()),
        };
        Client::tls(self.address, &self.ca.trust(), &credentials).unwrap()
    }

    /// The server works on exactly so many calls.
    pub async fn working(&self, calls: usize) {
        until(|| self.echo.working.load(Ordering::SeqCst) == calls).await;
    }

    pub async fn timeouts(&self, number: u64) {
        until(|| self.server.metrics().timeouts.load(Ordering::SeqCst) >= number).await;
    }
}

/// Waits for a condition.
pub async fn until(condition: impl Fn() -> bool) {
    let reached = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.expect("the condition is never met");
}

/// What comes until the other end closes, in whichever way it does.
pub async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut all = Vec::new();
    let reading = async {
        let mut piece = [0; 4096];
        while let Ok(read) = stream.read(&mut piece).await
            && read > 0
        {
            all.extend_from_slice(&piece[..read]);
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("the server does not close");
    String::from_utf8_lossy(&all).into_owned()
}

pub fn basic(user: &str, password: &str) -> String {
    format!("Authorization: Basic {}\r\n", STANDARD.encode(format!("{user}:{password}")))
}

pub fn good() -> String {
    basic("oracle", PASSWORD)
}

/// A request with these header lines, each ended by CRLF, and a body.
pub fn post(headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut bytes =
        format!("POST /RPC2 HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{headers}\r\n").into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub const CLOSE: &str = "Connection: close\r\n";

pub fn echo_call(text: &str) -> Vec<u8> {
    encode_call("echo", &[Value::from(text)]).to_vec()
}

pub fn call(method: &str) -> Vec<u8> {
    encode_call(method, &[]).to_vec()
}

pub fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

/// The value or fault in an answer with status 200.
pub fn value(answer: &str) -> Result<Value, Fault> {
    assert_eq!(status(answer), "200", "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    decode_response(body.as_bytes(), &config::Wire::default()).unwrap()
}

/// Hands over every byte alone.
pub struct ByteByByte(pub TcpStream);

impl AsyncRead for ByteByByte {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for ByteByByte {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, &bytes[..bytes.len().min(1)])
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
