//! The other end: calls another host's agent, or ours by the operator's socket.
//!
//! One client holds at most one connection, opened at the first call and kept. A call ends by its timeout
//! whatever happens; a connection on which that happened is not used again. A request is sent a second time only
//! when it is certain that the first was never sent, so that no change is made twice. Answers are as bounded as
//! requests are: the other end is a stranger too.

use super::certificate::{Usage, accepts_fingerprint, is_ca};
use super::http::TRACEPARENT;
use super::tls::{TlsError, TlsIdentity, provider};
use super::upgrade::Stream;
use super::{DecodeError, Fault, Value, decode_response, encode_call};
use crate::config;
use crate::model::{Secret, TraceParent};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// The largest answer taken, and the most values in it. Ours are at most half as long.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
const MAX_ANSWER_VALUES: usize = 4_000_000;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The call came through and failed there.
    #[error("fault {}: {}", .0.fault_code, .0.fault_string)]
    Fault(Fault),
    /// No connection; the call was not made.
    #[error("no connection to {peer}")]
    Connect { peer: String, source: std::io::Error },
    /// No answer in time; the call may have been made.
    #[error("no answer from {peer} within {} s", .after.as_secs_f32())]
    Timeout { peer: String, after: Duration },
    /// The other end does not let us in.
    #[error("{peer} refuses the credentials (HTTP {status})")]
    Refused { peer: String, status: u16 },
    #[error("{peer} answers with HTTP status {status}")]
    Status { peer: String, status: u16 },
    /// The connection broke; the call may have been made.
    #[error("the connection to {peer} broke")]
    Broken { peer: String, source: hyper::Error },
    #[error("the answer of {peer} is longer than {MAX_ANSWER_BYTES} bytes, or broke off")]
    Answer { peer: String },
    #[error("the answer of {peer} is no XML-RPC answer")]
    Decode { peer: String, source: DecodeError },
    #[error("the certificates given cannot be used")]
    Tls(#[from] TlsError),
}

/// What the other end's certificate must be.
#[derive(Debug, Clone)]
pub enum ServerTrust {
    /// Issued by this CA (DER), for this name; without a name, for the address that is called.
    Ca { der: Vec<u8>, name: Option<String> },
    /// Exactly this one (DER).
    Pinned { der: Vec<u8> },
    /// One with this SHA-256 (lower-case hex), or issued by a CA with it; whatever names stand in it.
    Fingerprint { sha256: String },
    /// Exactly this one (DER); or one that it issued, if it is a CA, for the name that is called.
    PinnedOrIssued { der: Vec<u8> },
    /// Whoever answers; the SHA-256 of what it shows is left here.
    FirstSeen { seen: Arc<std::sync::Mutex<Option<String>>> },
}

/// What we show. Both may be given: the other end takes what it accepts.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// The password of user `oracle`.
    pub password: Option<Secret>,
    pub certificate: Option<TlsIdentity>,
}

/// Calls one agent.
pub struct Client {
    target: Target,
    authorization: Option<HeaderValue>,
    host: HeaderValue,
    trace: Option<HeaderValue>,
    limits: config::Wire,
    connection: Option<SendRequest<Full<Bytes>>>,
}

enum Target {
    Unix(PathBuf),
    Plain(SocketAddr),
    Tls { address: SocketAddr, name: ServerName<'static>, connector: TlsConnector },
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Plain(address) | Self::Tls { address, .. } => write!(f, "{address}"),
        }
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("target", &format_args!("{}", self.target))
            .field("authorization", &self.authorization.as_ref().map(|_| "***"))
            .field("connected", &self.connection.is_some())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// By the operator's socket, where the kernel says who we are.
    pub fn unix(path: impl AsRef<Path>) -> Self {
        Self::new(Target::Unix(path.as_ref().to_owned()), HeaderValue::from_static("localhost"), None)
    }

    pub fn tls(
        address: SocketAddr,
        trust: &ServerTrust,
        credentials: &Credentials,
    ) -> Result<Self, ClientError> {
        let name = match trust {
            ServerTrust::Ca { name: Some(given), .. } => ServerName::try_from(given.clone())
                .map_err(|_| TlsError::Unusable(rustls::Error::General("no server name".to_owned())))?,
            _ => ServerName::from(address.ip()),
        };
        let config = client_config(trust, credentials.certificate.as_ref())?;
        let target = Target::Tls { address, name, connector: TlsConnector::from(Arc::new(config)) };
        Ok(Self::new(target, host_of(address), authorization(credentials.password.as_ref())))
    }

    /// Without TLS: the password travels in the clear.
    pub fn plain(address: SocketAddr, password: Option<&Secret>) -> Self {
        Self::new(Target::Plain(address), host_of(address), authorization(password))
    }

    fn new(target: Target, host: HeaderValue, authorization: Option<HeaderValue>) -> Self {
        let limits = config::Wire {
            max_body_bytes: MAX_ANSWER_BYTES,
            max_values: MAX_ANSWER_VALUES,
            ..config::Wire::default()
        };
        Self { target, authorization, host, trace: None, limits, connection: None }
    }

    /// What the calls from now on are done for: sent with each.
    pub fn set_trace(&mut self, trace: Option<TraceParent>) {
        self.trace = trace.and_then(|trace| HeaderValue::from_str(&trace.as_str()).ok());
    }

    /// One call, ended by `timeout` at the latest.
    pub async fn call(
        &mut self,
        method: &str,
        params: &[Value],
        timeout: Duration,
    ) -> Result<Value, ClientError> {
        let body = encode_call(method, params);
        // Taken out, so that a call that is dropped or fails leaves no half-used connection behind.
        let connection = self.connection.take();
        let Ok(answer) = tokio::time::timeout(timeout, self.exchange(connection, body)).await else {
            return Err(ClientError::Timeout { peer: self.peer(), after: timeout });
        };
        let (connection, body) = answer?;
        self.connection = Some(connection);
        match decode_response(&body, &self.limits) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(fault)) => Err(ClientError::Fault(fault)),
            Err(source) => Err(ClientError::Decode { peer: self.peer(), source }),
        }
    }

    /// Whether it holds a connection of which it does not know that it was closed. A call in the very moment in which the
    /// other end closes one fails, since nobody can say whether it was heard.
    pub fn is_connected(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| !connection.is_closed())
    }

    /// A new connection that becomes a stream: `path` asked for with `Upgrade: protocol`. The other end may refuse.
    pub async fn open_stream(
        &self,
        path: &str,
        protocol: &'static str,
        timeout: Duration,
    ) -> Result<Stream, ClientError> {
        let opening = async {
            let mut connection = self.connect().await?;
            let mut request = self.request(Bytes::new());
            *request.uri_mut() =
                path.parse().map_err(|_| ClientError::Status { peer: self.peer(), status: 400 })?;
            let headers = request.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static(protocol));
            let response = connection.send_request(request).await.map_err(|e| self.broken(e))?;
            let (peer, status) = (self.peer(), response.status().as_u16());
            match status {
                101 => {
                    let upgraded = hyper::upgrade::on(response).await.map_err(|e| self.broken(e))?;
                    Ok(Box::new(TokioIo::new(upgraded)) as Stream)
                }
                401 | 403 => Err(ClientError::Refused { peer, status }),
                _ => Err(ClientError::Status { peer, status }),
            }
        };
        let late = || ClientError::Timeout { peer: self.peer(), after: timeout };
        tokio::time::timeout(timeout, opening).await.unwrap_or_else(|_| Err(late()))
    }

    fn peer(&self) -> String {
        self.target.to_string()
    }

    async fn exchange(
        &self,
        connection: Option<SendRequest<Full<Bytes>>>,
        body: Bytes,
    ) -> Result<(SendRequest<Full<Bytes>>, Bytes), ClientError> {
        let mut fresh = connection.is_none();
        let mut connection = match connection {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let mut request = self.request(body);
        let response = loop {
            if connection.ready().await.is_ok() {
                match connection.try_send_request(request).await {
                    Ok(response) => break response,
                    Err(mut error) => match error.take_message() {
                        Some(unsent) if !fresh => request = unsent,
                        _ => return Err(self.broken(error.into_error())),
                    },
                }
            } else if fresh {
                let source = std::io::ErrorKind::ConnectionReset.into();
                return Err(ClientError::Connect { peer: self.peer(), source });
            }
            // The kept connection had been closed meanwhile, and nothing was sent on it.
            fresh = true;
            connection = self.connect().await?;
        };
        let status = response.status();
        if status != StatusCode::OK {
            let (peer, status) = (self.peer(), status.as_u16());
            return Err(match status {
                401 | 403 => ClientError::Refused { peer, status },
                _ => ClientError::Status { peer, status },
            });
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|_| ClientError::Answer { peer: self.peer() })?.to_bytes();
        Ok((connection, body))
    }

    fn request(&self, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = hyper::Method::POST;
        *request.uri_mut() = hyper::Uri::from_static("/RPC2");
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/xml"));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        if let Some(trace) = &self.trace {
            headers.insert(TRACEPARENT, trace.clone());
        }
        request
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let failed = |source| ClientError::Connect { peer: self.peer(), source };
        match &self.target {
            Target::Unix(path) => self.greet(UnixStream::connect(path).await.map_err(failed)?).await,
            Target::Plain(address) => self.greet(tcp(*address).await.map_err(failed)?).await,
            Target::Tls { address, name, connector } => {
                let stream = tcp(*address).await.map_err(failed)?;
                self.greet(connector.connect(name.clone(), stream).await.map_err(failed)?).await
            }
        }
    }

    async fn greet<S>(&self, stream: S) -> Result<SendRequest<Full<Bytes>>, ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|source| self.broken(source))?;
        // Ends when the sender is dropped or the other end closes; errors reach the sender.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a client's connection ended");
            }
        });
        Ok(sender)
    }

    fn broken(&self, source: hyper::Error) -> ClientError {
        ClientError::Broken { peer: self.peer(), source }
    }
}

pub(super) async fn tcp(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn host_of(address: SocketAddr) -> HeaderValue {
    HeaderValue::from_str(&address.to_string()).unwrap_or_else(|_| HeaderValue::from_static("localhost"))
}

fn authorization(password: Option<&Secret>) -> Option<HeaderValue> {
    let plain = zeroize::Zeroizing::new(format!("{}:{}", super::USER, password?.expose()));
    let text = zeroize::Zeroizing::new(format!("Basic {}", STANDARD.encode(plain.as_bytes())));
    // Base64 has no character that a header may not hold.
    let mut value = HeaderValue::from_str(&text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// What a connection to somebody whom we trust by `trust` is made with.
pub(super) fn client_config(
    trust: &ServerTrust,
    identity: Option<&TlsIdentity>,
) -> Result<rustls::ClientConfig, TlsError> {
    let provider = provider();
    let unusable = |error: rustls::Error| TlsError::Unusable(error);
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(unusable)?;
    let pinned = |pin| Arc::new(Pinned { pin, provider: provider.clone() });
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        ServerTrust::Ca { der, .. } => issued_by(der, &provider)?,
        ServerTrust::Pinned { der } => pinned(Pin::Der(der.clone(), None)),
        // One that is no CA (or an old one, which the library refuses as an anchor) is matched and no more.
        ServerTrust::PinnedOrIssued { der } => {
            let issuer = is_ca(der).then(|| issued_by(der, &provider).ok()).flatten();
            pinned(Pin::Der(der.clone(), issuer.map(|by| by as _)))
        }
        ServerTrust::Fingerprint { sha256 } => pinned(Pin::Fingerprint(sha256.clone())),
        ServerTrust::FirstSeen { seen } => pinned(Pin::FirstSeen(Arc::clone(seen))),
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let (chain, key) = identity.parse()?;
            builder.with_client_auth_cert(chain, key).map_err(unusable)?
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn issued_by(der: &[u8], provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(der.to_owned())).map_err(TlsError::Unusable)?;
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| TlsError::Unusable(rustls::Error::General(error.to_string())))
}

#[derive(Debug)]
enum Pin {
    /// This certificate, whatever names and dates stand in it; or what the verifier accepts, if there is one.
    Der(Vec<u8>, Option<Arc<dyn ServerCertVerifier>>),
    /// As [`ServerTrust::Fingerprint`] says, within its dates.
    Fingerprint(String),
    FirstSeen(Arc<std::sync::Mutex<Option<String>>>),
}

/// Who answered is not who is known.
#[derive(Debug, thiserror::Error)]
#[error("shown SHA-256 {shown}, pinned {}", .expected.as_deref().unwrap_or("none: it has expired, or is not for servers"))]
struct Strange {
    shown: String,
    expected: Option<String>,
}

#[derive(Debug)]
struct Pinned {
    pin: Pin,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let issued_by_it = |issuer: &Arc<dyn ServerCertVerifier>| {
            issuer.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now).is_ok()
        };
        let accepted = match &self.pin {
            Pin::Der(der, issuer) => end_entity.as_ref() == der || issuer.as_ref().is_some_and(issued_by_it),
            Pin::FirstSeen(seen) => {
                // By the rule by which it is known from then on.
                let sha256 = super::fingerprint(end_entity);
                let accepted = accepts_fingerprint(&sha256, std::slice::from_ref(end_entity), Usage::Server);
                let mut seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                *seen = accepted.then_some(sha256);
                accepted
            }
            Pin::Fingerprint(sha256) => {
                let chain: Vec<CertificateDer<'_>> =
                    std::iter::once(end_entity).chain(intermediates).cloned().collect();
                accepts_fingerprint(sha256, &chain, Usage::Server)
            }
        };
        if accepted {
            Ok(ServerCertVerified::assertion())
        } else {
            let expected = match &self.pin {
                Pin::Der(der, _) => Some(super::fingerprint(der)),
                Pin::Fingerprint(sha256) => Some(sha256.clone()),
                Pin::FirstSeen(_) => None,
            };
            let strange = Strange { shown: super::fingerprint(end_entity), expected };
            Err(rustls::CertificateError::Other(rustls::OtherError(Arc::new(strange))).into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
