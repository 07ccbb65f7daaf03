//! Client certificates: what a peer showed, and whether the owner's pin accepts it.
//!
//! The handshake has proved that the peer holds the key; nothing else was asked there. Here it is decided: the
//! pinned certificate itself, within its dates; or, if the pin is a CA, what it issued for client use, within its
//! dates.

use ring::digest;
use rustls::pki_types::{CertificateDer, UnixTime};
use std::fmt::Write as _;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A chain longer than this is not looked at.
const MAX_INTERMEDIATES: usize = 4;

/// What a peer showed in its handshake.
#[derive(Clone)]
pub(super) struct PeerCertificate {
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// SHA-256 of the first certificate, in lower-case hex.
    pub(super) fingerprint: String,
    /// SHA-256 over the chain: what is decided for it holds for it alone.
    pub(super) digest: [u8; 32],
}

impl PeerCertificate {
    pub(super) fn new(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let first = chain.first()?;
        let mut whole = digest::Context::new(&digest::SHA256);
        for certificate in chain {
            whole.update(&certificate.len().to_be_bytes());
            whole.update(certificate);
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(whole.finish().as_ref());
        Some(Self {
            fingerprint: fingerprint(first),
            chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
            digest,
        })
    }
}

/// SHA-256 of a certificate's DER in lower-case hex.
pub fn fingerprint(der: &[u8]) -> String {
    let mut text = String::with_capacity(64);
    for byte in digest::digest(&digest::SHA256, der).as_ref() {
        // Writing to memory does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Whether a certificate (DER) may issue others.
pub(super) fn is_ca(der: &[u8]) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| certificate.is_ca())
}

/// What a certificate is shown for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usage {
    Client,
    Server,
}

pub(super) fn accepts(pin: &[u8], chain: &[CertificateDer<'_>]) -> bool {
    accepts_for(pin, chain, Usage::Client)
}

/// A pin of which only the fingerprint is known: the other end shows the pinned certificate in its chain.
pub(super) fn accepts_fingerprint(pin: &str, chain: &[CertificateDer<'_>], usage: Usage) -> bool {
    let shown = chain.iter().take(MAX_INTERMEDIATES + 1).find(|shown| fingerprint(shown) == pin);
    shown.is_some_and(|pinned| accepts_for(pinned, chain, usage))
}

fn accepts_for(pin: &[u8], chain: &[CertificateDer<'_>], usage: Usage) -> bool {
    let Some((first, intermediates)) = chain.split_first() else {
        return false;
    };
    let Ok((_, pinned)) = X509Certificate::from_der(pin) else {
        return false;
    };
    if !pinned.validity().is_valid() {
        return false;
    }
    if first.as_ref() == pin {
        return true;
    }
    pinned.is_ca() && intermediates.len() <= MAX_INTERMEDIATES && issued_by(pin, first, intermediates, usage)
}

fn issued_by(
    pin: &[u8],
    first: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    usage: Usage,
) -> bool {
    let pin = CertificateDer::from(pin);
    let Ok(anchor) = webpki::anchor_from_trusted_cert(&pin) else {
        return false;
    };
    let Ok(certificate) = webpki::EndEntityCert::try_from(first) else {
        return false;
    };
    certificate
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &[anchor],
            intermediates,
            UnixTime::now(),
            match usage {
                Usage::Client => webpki::KeyUsage::client_auth(),
                Usage::Server => webpki::KeyUsage::server_auth(),
            },
            None,
            None,
        )
        .is_ok()
}
