//! TLS: our certificate, exchangeable while we run, and a client certificate if the client has one.
//!
//! A client's certificate is not judged in the handshake: only that the client holds its key is proved there.
//! Who it is, is decided at each request (`auth`), so that a session that was resumed, or opened before the
//! ownership was released, has no more rights than a new one.

use crate::model::Secret;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use std::sync::{Arc, PoisonError, RwLock};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the certificate is not readable PEM")]
    Certificate(#[source] rustls::pki_types::pem::Error),
    #[error("there is no certificate in the PEM text")]
    NoCertificate,
    // The source is not told: it could repeat a piece of the key.
    #[error("the private key is not readable PEM")]
    Key,
    #[error("certificate and key cannot be used for TLS")]
    Unusable(#[source] rustls::Error),
}

/// A certificate with what proves it, in PEM.
#[derive(Debug, Clone)]
pub struct TlsIdentity {
    /// The certificate first, then those that issued it.
    pub chain_pem: String,
    pub key_pem: Secret,
}

impl TlsIdentity {
    /// Whether the key is the certificate's, and both can be used.
    pub fn check(&self) -> Result<(), TlsError> {
        let (chain, key) = self.parse()?;
        rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Unusable)?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_client_auth_cert(chain, key)
            .map(drop)
            .map_err(TlsError::Unusable)
    }

    pub(super) fn parse(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(self.chain_pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(TlsError::Certificate)?;
        if chain.is_empty() {
            return Err(TlsError::NoCertificate);
        }
        let key =
            PrivateKeyDer::from_pem_slice(self.key_pem.expose().as_bytes()).map_err(|_| TlsError::Key)?;
        Ok((chain, key))
    }
}

/// What new connections are greeted with.
#[derive(Debug)]
pub struct TlsState {
    current: RwLock<Arc<rustls::ServerConfig>>,
}

impl TlsState {
    pub fn new(identity: &TlsIdentity) -> Result<Self, TlsError> {
        Ok(Self { current: RwLock::new(Arc::new(server_config(identity)?)) })
    }

    /// From the next connection on. If the new identity is unusable, the old one stays.
    pub fn replace(&self, identity: &TlsIdentity) -> Result<(), TlsError> {
        let config = Arc::new(server_config(identity)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    pub(super) fn current(&self) -> Arc<rustls::ServerConfig> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn server_config(identity: &TlsIdentity) -> Result<rustls::ServerConfig, TlsError> {
    let (chain, key) = identity.parse()?;
    let provider = provider();
    let mut config = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(TlsError::Unusable)?
        .with_client_cert_verifier(Arc::new(AnyCertificate { provider }))
        .with_single_cert(chain, key)
        .map_err(TlsError::Unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Tickets hold the session at the client, so that ours need no memory. No early data: it can be replayed.
    config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(TlsError::Unusable)?;
    config.max_early_data_size = 0;
    Ok(config)
}

/// Takes any certificate that can be parsed and whose key the client proves to hold.
#[derive(Debug)]
struct AnyCertificate {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match webpki::EndEntityCert::try_from(end_entity) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(_) => Err(rustls::CertificateError::BadEncoding.into()),
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
