//! A manager's end of delivery: real TLS that demands a certificate, HTTP read by hand, and a mood that says what
//! becomes of the next connections and requests.

use super::support::until;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Takes,
    Status(u16),
    /// Sends elsewhere.
    Redirects,
    /// Reads a byte a second.
    Slow,
    /// Takes the body and closes in the middle of its answer.
    ClosesMidAnswer,
    /// Closes in the middle of the request.
    ClosesMidRequest,
    /// Takes connections and never shakes hands.
    StallsTls,
    /// Takes the body and does not answer until the mood is another.
    Holds,
}

#[derive(Debug, Clone)]
pub struct Post {
    pub path: String,
    pub head: String,
    pub items: Vec<Value>,
    /// It was answered with 2xx, as far as we know.
    pub taken: bool,
    /// SHA-256 of the certificate that was shown.
    pub shown: String,
}

pub struct Receiver {
    pub address: SocketAddr,
    /// Its certificate.
    pub pem: String,
    pub mood: watch::Sender<Mood>,
    posts: Arc<Mutex<Vec<Post>>>,
    acceptor: tokio_rustls::TlsAcceptor,
    task: Option<tokio::task::JoinHandle<()>>,
}

#[derive(Debug)]
struct Anybody(Arc<rustls::crypto::CryptoProvider>);

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A certificate of its own for 127.0.0.1, and what serves with it.
fn identity() -> (String, tokio_rustls::TlsAcceptor) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(Arc::new(Anybody(provider)))
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    (certificate.pem(), tokio_rustls::TlsAcceptor::from(Arc::new(config)))
}

impl Receiver {
    pub async fn start() -> Self {
        let (pem, acceptor) = identity();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut receiver = Self {
            address: listener.local_addr().unwrap(),
            pem,
            mood: watch::Sender::new(Mood::Takes),
            posts: Arc::default(),
            acceptor,
            task: None,
        };
        receiver.serve(listener);
        receiver
    }

    fn serve(&mut self, listener: TcpListener) {
        let (posts, mood, acceptor) = (Arc::clone(&self.posts), self.mood.clone(), self.acceptor.clone());
        self.task = Some(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                connections.spawn(connection(stream, acceptor.clone(), mood.clone(), Arc::clone(&posts)));
            }
        }));
    }

    /// Closes its port and its connections.
    pub async fn goes(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }

    /// At the same address; with `anew` it shows another certificate.
    pub async fn comes_back(&mut self, anew: bool) {
        if anew {
            self.acceptor = identity().1;
        }
        let mut listener = None;
        until("the port is free again", Duration::from_secs(30), async || {
            listener = TcpListener::bind(self.address).await.ok();
            listener.is_some()
        })
        .await;
        self.serve(listener.unwrap());
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    pub fn posts(&self) -> Vec<Post> {
        self.posts.lock().unwrap().clone()
    }

    /// All CloudEvents of a path, in the order in which they came.
    pub fn items(&self, path: &str) -> Vec<Value> {
        self.posts().into_iter().filter(|post| post.path == path).flat_map(|post| post.items).collect()
    }

    /// The numbers of events, in the order in which they came.
    pub fn numbers(&self) -> Vec<u64> {
        self.items("/events").iter().filter_map(|item| item["data"]["number"].as_u64()).collect()
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: tokio_rustls::TlsAcceptor,
    mut mood: watch::Sender<Mood>,
    posts: Arc<Mutex<Vec<Post>>>,
) {
    if *mood.borrow() == Mood::StallsTls {
        let _ = mood.subscribe().wait_for(|mood| *mood != Mood::StallsTls).await;
        return;
    }
    let Ok(mut stream) = acceptor.accept(stream).await else { return };
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let shown = shown.map(|der| dom0d::wire::fingerprint(der)).unwrap_or_default();
    let mut bytes = Vec::new();
    while let Some(mut post) = request(&mut stream, &mut bytes, &mood).await {
        post.shown.clone_from(&shown);
        let now = *mood.borrow();
        post.taken = now == Mood::Takes;
        let text = match now {
            Mood::Takes => "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
            Mood::Status(status) => format!("HTTP/1.1 {status} Odd\r\nContent-Length: 5\r\n\r\nsorry"),
            Mood::Redirects => {
                "HTTP/1.1 307 There\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n".to_owned()
            }
            Mood::ClosesMidAnswer => "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc".to_owned(),
            Mood::ClosesMidRequest | Mood::StallsTls | Mood::Slow => return,
            Mood::Holds => {
                posts.lock().unwrap().push(post.clone());
                let _ = mood.subscribe().wait_for(|mood| *mood != Mood::Holds).await;
                return;
            }
        };
        posts.lock().unwrap().push(post);
        if stream.write_all(text.as_bytes()).await.is_err() || now == Mood::ClosesMidAnswer {
            return;
        }
        mood = mood.clone();
    }
}

async fn request(
    stream: &mut tokio_rustls::server::TlsStream<TcpStream>,
    bytes: &mut Vec<u8>,
    mood: &watch::Sender<Mood>,
) -> Option<Post> {
    let (mut head_end, mut length) = (None, 0);
    loop {
        if head_end.is_none()
            && let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n")
        {
            let head = String::from_utf8_lossy(&bytes[..at]).to_ascii_lowercase();
            let line = head.lines().find_map(|line| line.strip_prefix("content-length: ").map(str::to_owned));
            length = line.unwrap().trim().parse().unwrap();
            head_end = Some(at + 4);
        }
        if let Some(end) = head_end
            && bytes.len() >= end + length
        {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let items = serde_json::from_slice(&bytes[end..end + length]).unwrap();
            bytes.drain(..end + length);
            let path = head.split(' ').nth(1).unwrap().to_owned();
            return Some(Post { path, head, items, taken: false, shown: String::new() });
        }
        let mut piece = [0; 16 * 1024];
        let most = match *mood.borrow() {
            Mood::Slow => 1,
            Mood::ClosesMidRequest if !bytes.is_empty() => return None,
            _ => piece.len(),
        };
        if most == 1 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        match stream.read(&mut piece[..most]).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => bytes.extend_from_slice(&piece[..count]),
        }
    }
}
