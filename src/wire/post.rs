//! The way out to a manager: one HTTPS POST after another, on one connection that is kept.
//!
//! Only a status 2xx with its whole answer means that the body was taken; everything else (another status, a redirect,
//! an answer that breaks off, silence) means that it may or may not have been, and the caller sends it again. Redirects
//! are never followed: the pinned certificate speaks for the place that was told, not for where it points. An answer's
//! body is read, bounded, and thrown away.

use super::client::{ServerTrust, client_config, tcp};
use super::tls::{TlsError, TlsIdentity};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

/// An answer longer than this is not read to its end, and its connection not used again.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;
/// From a name to a connection that can be used, for each address.
const CONNECT: Duration = Duration::from_secs(10);

/// Why a body was not taken, as far as we know.
#[derive(Debug, thiserror::Error)]
pub enum PostError {
    #[error("no such host: {0}")]
    Name(String),
    #[error("no connection: {0}")]
    Connect(io::Error),
    /// The other end is not who it should be: its certificate is not the one that is pinned.
    #[error("the certificate shown is not the one that is pinned, nor issued by it for this name: {0}")]
    Certificate(String),
    /// It was connected, and did not take the body or did not answer.
    #[error("no answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    #[error("HTTP status {0}")]
    Status(u16),
    #[error("HTTP status {0}, a redirect; those are not followed")]
    Redirect(u16),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the certificates given cannot be used")]
    Tls(#[from] TlsError),
}

/// Where to, and by what it is known.
#[derive(Debug, Clone)]
pub struct Destination {
    /// A DNS name, or an address (of IPv6 without brackets).
    pub host: String,
    pub port: u16,
    /// Path and query, from the slash on.
    pub path: String,
    /// `None`: plain HTTP.
    pub trust: Option<ServerTrust>,
    /// What we show.
    pub identity: Option<TlsIdentity>,
}

/// Posts to one destination.
pub struct Poster {
    destination: Destination,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    host: HeaderValue,
    uri: Uri,
    connection: Option<Connection>,
}

/// A connection, and the task that drives it: dropped, it is closed at once. A peer that reads no more would hold up an
/// orderly end for as long as it likes.
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    _driver: AbortOnDropHandle<()>,
}

impl std::fmt::Debug for Poster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poster").field("destination", &self.destination).finish_non_exhaustive()
    }
}

impl Poster {
    pub fn new(destination: Destination) -> Result<Self, PostError> {
        let tls = match &destination.trust {
            None => None,
            Some(trust) => {
                let name = ServerName::try_from(destination.host.clone())
                    .map_err(|_| PostError::Name(destination.host.clone()))?;
                let config = client_config(trust, destination.identity.as_ref())?;
                Some((TlsConnector::from(Arc::new(config)), name))
            }
        };
        let shown = match destination.host.contains(':') {
            true => format!("[{}]:{}", destination.host, destination.port),
            false => format!("{}:{}", destination.host, destination.port),
        };
        let wrong = || PostError::Name(destination.host.clone());
        let host = HeaderValue::from_str(&shown).map_err(|_| wrong())?;
        let uri = destination.path.parse().map_err(|_| wrong())?;
        Ok(Self { tls, host, uri, connection: None, destination })
    }

    /// Sends one body. When this returns `Ok`, it was taken.
    pub async fn post(
        &mut self,
        content_type: &'static str,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        patience: Duration,
    ) -> Result<(), PostError> {
        // Taken out, so that a post that is dropped or fails leaves no half-used connection behind.
        let kept = self.connection.take().filter(|kept| kept.sender.is_ready() && !kept.sender.is_closed());
        // Has deadlines of its own, which do not mean that the other end is slow to take a body.
        let connection = match kept {
            Some(kept) => kept,
            None => self.connect().await?,
        };
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = hyper::Method::POST;
        *request.uri_mut() = self.uri.clone();
        let map = request.headers_mut();
        map.insert(HOST, self.host.clone());
        map.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        map.insert(USER_AGENT, HeaderValue::from_static(concat!("dom0d/", env!("CARGO_PKG_VERSION"))));
        map.extend(headers.iter().cloned());
        match tokio::time::timeout(patience, exchange(connection, request)).await {
            Err(_) => Err(PostError::Timeout(patience)),
            Ok(Err(error)) => Err(error),
            Ok(Ok(connection)) => {
                self.connection = connection;
                Ok(())
            }
        }
    }

    async fn connect(&self) -> Result<Connection, PostError> {
        let destination = (self.destination.host.as_str(), self.destination.port);
        let found = tokio::time::timeout(CONNECT, tokio::net::lookup_host(destination)).await;
        let addresses: Vec<SocketAddr> = match found {
            Ok(Ok(addresses)) => addresses.take(MAX_ADDRESSES).collect(),
            Ok(Err(error)) => return Err(PostError::Name(error.to_string())),
            Err(_) => return Err(PostError::Name(format!("no answer within {} s", CONNECT.as_secs()))),
        };
        let mut last = PostError::Name(self.destination.host.clone());
        for address in addresses {
            match tokio::time::timeout(CONNECT, self.connect_to(address)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => last = error,
                Err(_) => last = PostError::Connect(io::ErrorKind::TimedOut.into()),
            }
        }
        Err(last)
    }

    async fn connect_to(&self, address: SocketAddr) -> Result<Connection, PostError> {
        let stream = tcp(address).await.map_err(PostError::Connect)?;
        match &self.tls {
            None => greet(stream).await,
            Some((connector, name)) => {
                let stream = connector.connect(name.clone(), stream).await.map_err(refused)?;
                greet(stream).await
            }
        }
    }
}

/// `Ok`: it was taken, and the connection can be used again if it is there.
async fn exchange(
    mut connection: Connection,
    request: Request<Full<Bytes>>,
) -> Result<Option<Connection>, PostError> {
    let broken = |error: hyper::Error| PostError::Broken(error.to_string());
    let response = connection.sender.send_request(request).await.map_err(broken)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
    match status.as_u16() {
        200..=299 => match body {
            Ok(_) => Ok(Some(connection)),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => Ok(None),
            Err(error) => Err(PostError::Broken(error.to_string())),
        },
        status @ 300..=399 => Err(PostError::Redirect(status)),
        status => Err(PostError::Status(status)),
    }
}

/// A handshake that failed: whether for the certificate.
fn refused(error: io::Error) -> PostError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => PostError::Certificate(match why {
            rustls::CertificateError::Other(why) => why.0.to_string(),
            why => format!("{why:?}"),
        }),
        Some(rustls::Error::InvalidMessage(_)) => {
            PostError::Connect(io::Error::other("what answers there speaks no TLS"))
        }
        _ => PostError::Connect(error),
    }
}

async fn greet<S>(stream: S) -> Result<Connection, PostError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(|error| PostError::Broken(error.to_string()))?;
    // Errors reach the sender.
    let driver = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to the manager ended");
        }
    });
    Ok(Connection { sender, _driver: AbortOnDropHandle::new(driver) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::PrivateKeyDer;

    /// Shakes hands, and reads no more until it is told to end.
    fn reads_nothing(end: std::sync::mpsc::Receiver<()>) -> (SocketAddr, Vec<u8>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut tls = rustls::ServerConnection::new(Arc::new(config)).unwrap();
            while tls.is_handshaking() {
                tls.complete_io(&mut stream).unwrap();
            }
            let _ = end.recv();
        });
        (address, certificate.der().to_vec())
    }

    #[tokio::test]
    async fn a_receiver_that_reads_no_more_holds_nothing_of_ours_once_the_time_is_over() {
        let (_end, ended) = std::sync::mpsc::channel();
        let (address, der) = reads_nothing(ended);
        let destination = Destination {
            host: address.ip().to_string(),
            port: address.port(),
            path: "/".to_owned(),
            trust: Some(ServerTrust::Pinned { der }),
            identity: None,
        };
        let mut poster = Poster::new(destination).unwrap();
        // More than the kernel's buffers take.
        let body = Bytes::from(vec![b'x'; 32 * 1024 * 1024]);
        let late = poster.post("text/plain", &[], body, Duration::from_secs(1)).await;
        assert!(matches!(late, Err(PostError::Timeout(_))), "{late:?}");
        let alone = async {
            while tokio::runtime::Handle::current().metrics().num_alive_tasks() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), alone).await.expect("the connection is closed");
    }
}
