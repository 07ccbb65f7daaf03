//! Reading certificates: one way for the owner's and for our own.

use crate::model::Timestamp;
use ring::digest::{SHA256, digest};
use x509_parser::certificate::X509Certificate;
use x509_parser::public_key::PublicKey;
use x509_parser::signature_algorithm::SignatureAlgorithm;

/// A PEM text longer than this is refused unread.
pub const MAX_PEM_BYTES: usize = 64 * 1024;
/// RSA keys shorter than this can be broken.
const MIN_RSA_BITS: usize = 2048;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum X509Error {
    #[error("it is not a certificate in PEM form: {0}")]
    Malformed(String),
    #[error("it is signed with {0}; allowed: SHA-256, SHA-384, SHA-512 or Ed25519")]
    WeakSignature(String),
    #[error("its RSA key has {0} bits; allowed: {MIN_RSA_BITS} or more")]
    ShortKey(usize),
}

/// What a certificate says, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CertificateInfo {
    pub subject: String,
    pub issuer: String,
    /// Lower-case hex.
    pub serial: String,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    /// SHA-256 of the DER in lower-case hex.
    pub fingerprint: String,
    pub is_ca: bool,
}

/// The DER of the first certificate of a PEM text, and how many there are.
pub fn der_of(pem: &str) -> Result<(Vec<u8>, usize), X509Error> {
    if pem.len() > MAX_PEM_BYTES {
        return Err(X509Error::Malformed(format!("longer than {MAX_PEM_BYTES} bytes")));
    }
    let mut first = None;
    let mut count = 0;
    for block in x509_parser::pem::Pem::iter_from_buffer(pem.as_bytes()) {
        let block = block.map_err(|error| X509Error::Malformed(error.to_string()))?;
        if block.label == "CERTIFICATE" {
            count += 1;
            first.get_or_insert(block.contents);
        }
    }
    first.map(|der| (der, count)).ok_or_else(|| X509Error::Malformed("no CERTIFICATE block".to_owned()))
}

pub fn parse(der: &[u8]) -> Result<X509Certificate<'_>, X509Error> {
    match x509_parser::parse_x509_certificate(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(X509Error::Malformed("bytes after its end".to_owned())),
        Err(error) => Err(X509Error::Malformed(error.to_string())),
    }
}

pub fn info(der: &[u8]) -> Result<CertificateInfo, X509Error> {
    let certificate = parse(der)?;
    let validity = certificate.validity();
    let time = |time: i64| Timestamp(u64::try_from(time).unwrap_or(0).saturating_mul(1000));
    Ok(CertificateInfo {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        serial: hex(certificate.raw_serial()),
        not_before: time(validity.not_before.timestamp()),
        not_after: time(validity.not_after.timestamp()),
        fingerprint: fingerprint(der),
        is_ca: certificate.is_ca(),
    })
}

pub fn fingerprint(der: &[u8]) -> String {
    hex(digest(&SHA256, der).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses what others could forge.
pub fn check_strength(certificate: &X509Certificate<'_>) -> Result<(), X509Error> {
    // RSA with SHA-2, ECDSA with SHA-2, Ed25519 (RFC 5280 and its updates). A whitelist: an algorithm that is
    // not known to be strong is weak.
    const STRONG: [&str; 7] = [
        "1.2.840.113549.1.1.11",
        "1.2.840.113549.1.1.12",
        "1.2.840.113549.1.1.13",
        "1.2.840.10045.4.3.2",
        "1.2.840.10045.4.3.3",
        "1.2.840.10045.4.3.4",
        "1.3.101.112",
    ];
    // RSA-PSS names its hash in its parameters; without them it is SHA-1.
    const STRONG_HASHES: [&str; 3] =
        ["2.16.840.1.101.3.4.2.1", "2.16.840.1.101.3.4.2.2", "2.16.840.1.101.3.4.2.3"];
    let algorithm = &certificate.signature_algorithm;
    let oid = algorithm.algorithm.to_id_string();
    let strong = match SignatureAlgorithm::try_from(algorithm) {
        Ok(SignatureAlgorithm::RSASSA_PSS(params)) => {
            STRONG_HASHES.contains(&params.hash_algorithm_oid().to_id_string().as_str())
        }
        _ => STRONG.contains(&oid.as_str()),
    };
    if !strong {
        return Err(X509Error::WeakSignature(weak_name(&oid)));
    }
    if let Ok(PublicKey::RSA(key)) = certificate.public_key().parsed()
        && key.key_size() < MIN_RSA_BITS
    {
        return Err(X509Error::ShortKey(key.key_size()));
    }
    Ok(())
}

fn weak_name(oid: &str) -> String {
    match oid {
        "1.2.840.113549.1.1.4" => "MD5".to_owned(),
        "1.2.840.113549.1.1.5" | "1.2.840.10045.4.1" => "SHA-1".to_owned(),
        other => format!("algorithm {other}"),
    }
}
