//! The host's own certificate authority and server certificate: four files in one folder.
//!
//! `ca.pem ca.key server.pem server.key`; the folder is 0700, the keys 0600, each file is put in its place
//! whole. The CA (10 years) is made once: whoever trusts this host trusts it, so a damaged one is never
//! replaced without a human. The server's (397 days) is made anew when a third of its life is left, when the
//! host's names changed, and when its files are damaged; damaged files are moved aside, not deleted. A crash
//! between the writing of key and certificate leaves a pair that does not match, which is seen as damage at
//! the next start and made anew.
//!
//! Everything here blocks (some milliseconds, for the syncs): call it from a blocking thread.

use super::x509::{self, X509Error};
use crate::model::{Secret, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use super::x509::CertificateInfo;

const DAY_S: u64 = 86_400;
const CA_LIFE_S: u64 = 3653 * DAY_S;
/// The most that clients of the web's rules take.
const SERVER_LIFE_S: u64 = 397 * DAY_S;
/// A certificate is valid from a day ago, for peers whose clock is behind ours.
const SLACK_S: u64 = DAY_S;

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error(
        "the certificate authority in {dir} is damaged ({why}). Put ca.pem and ca.key back from a backup; or move \
         both away and start again, and a new one is made, which every manager then has to be told to trust"
    )]
    DamagedCa { dir: PathBuf, why: String },
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("the certificate could not be made: {0}")]
    Make(String),
}

type Result<T> = std::result::Result<T, CertificateError>;

/// What the server's certificate speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    pub hostname: String,
    pub addresses: Vec<IpAddr>,
}

impl Names {
    /// As they stand in the certificate. A host name that is none there (an underscore is fine, a blank or a
    /// letter beyond ASCII is not) is left out rather than in the way.
    fn alternatives(&self) -> Vec<String> {
        let good = |c: u8| c.is_ascii_alphanumeric() || b".-_".contains(&c);
        let hostname = Some(&self.hostname)
            .filter(|name| !name.is_empty() && name.len() <= 253 && name.bytes().all(good))
            .map(|name| name.to_ascii_lowercase());
        let mut all = vec!["localhost".to_owned()];
        all.extend(hostname);
        all.extend(self.addresses.iter().map(IpAddr::to_string));
        all.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
        let mut once: Vec<String> = Vec::new();
        for name in all {
            if !once.contains(&name) {
                once.push(name);
            }
        }
        once.truncate(100);
        once
    }
}

/// What TLS serves.
#[derive(Debug, Clone)]
pub struct ServerCertificate {
    /// The server's certificate, then the CA's.
    pub chain_pem: String,
    pub key_pem: Secret,
    pub ca_pem: String,
    pub info: CertificateInfo,
}

impl ServerCertificate {
    /// Whether a third of its life or less is left. Not so before its life begins: then the clock is wrong,
    /// and a new certificate would be dated by it.
    pub fn needs_renewal(&self, now: Timestamp) -> bool {
        let life = self.info.not_after.0.saturating_sub(self.info.not_before.0);
        self.info.not_after.0.saturating_sub(now.0) <= life / 3
    }
}

/// Reads what is there and makes what is missing, damaged, due or for other names.
pub fn ensure(dir: &Path, names: &Names, now: Timestamp) -> Result<ServerCertificate> {
    let ca = ensure_ca(dir, names, now)?;
    match read_server(dir, &ca) {
        Ok(Some((server, covered))) => {
            let missing = names.alternatives().into_iter().find(|name| !covered.contains(name));
            if missing.is_none() && !server.needs_renewal(now) {
                return Ok(server);
            }
            tracing::info!(?missing, not_after = %server.info.not_after, "the server's certificate is renewed");
            return make_server(dir, &ca, names, now).or_else(|error| match error {
                // The old one still serves, and a disk that cannot be written is no reason not to.
                CertificateError::Io { .. } => {
                    tracing::error!(%error, "the server's certificate cannot be renewed; the old one is served");
                    Ok(server)
                }
                error => Err(error),
            });
        }
        Ok(None) => {}
        Err(why) => {
            tracing::warn!(dir = %dir.display(), why, "the server's certificate is damaged: moved aside and made anew");
            for name in ["server.pem", "server.key"] {
                move_aside(&dir.join(name), now)?;
            }
        }
    }
    make_server(dir, &ca, names, now)
}

/// A new key and certificate for the server, signed by the CA that is there.
pub fn renew(dir: &Path, names: &Names, now: Timestamp) -> Result<ServerCertificate> {
    let ca = ensure_ca(dir, names, now)?;
    make_server(dir, &ca, names, now)
}

/// What the first certificate of a PEM text says.
pub fn describe(pem: &str) -> std::result::Result<CertificateInfo, X509Error> {
    let (der, _) = x509::der_of(pem)?;
    x509::info(&der)
}

/// The CA, read or made.
struct Ca {
    pem: String,
    der: Vec<u8>,
    key: KeyPair,
}

fn ensure_ca(dir: &Path, names: &Names, now: Timestamp) -> Result<Ca> {
    make_folder(dir)?;
    let pem = read(&dir.join("ca.pem"));
    let key = read(&dir.join("ca.key"));
    let damaged = |why: String| CertificateError::DamagedCa { dir: dir.to_path_buf(), why };
    match (pem, key) {
        (Ok(None), Ok(None)) => make_ca(dir, names, now),
        (Ok(Some(pem)), Ok(Some(key))) => read_ca(pem, &key).map_err(damaged),
        (Ok(None), Ok(Some(_))) => Err(damaged("ca.pem is missing".to_owned())),
        (Ok(Some(_)), Ok(None)) => Err(damaged("ca.key is missing".to_owned())),
        (Err(why), _) | (_, Err(why)) => Err(damaged(why)),
    }
}

fn read_ca(pem: String, key: &str) -> std::result::Result<Ca, String> {
    let (der, _) = x509::der_of(&pem).map_err(|error| format!("ca.pem: {error}"))?;
    let certificate = x509::parse(&der).map_err(|error| format!("ca.pem: {error}"))?;
    let key = KeyPair::from_pem(key).map_err(|_| "ca.key holds no key".to_owned())?;
    if !certificate.is_ca() || !signed_by(&certificate, key.public_key_raw()) {
        return Err("ca.pem and ca.key do not belong together".to_owned());
    }
    Ok(Ca { pem, der, key })
}

/// The pair and the names it covers; `None` where there is neither file; else why they are no pair of ours.
fn read_server(dir: &Path, ca: &Ca) -> std::result::Result<Option<(ServerCertificate, Vec<String>)>, String> {
    let (chain_pem, key_pem) = match (read(&dir.join("server.pem"))?, read(&dir.join("server.key"))?) {
        (Some(pem), Some(key)) => (pem, key),
        (None, None) => return Ok(None),
        _ => return Err("one of server.pem and server.key is missing".to_owned()),
    };
    let (der, count) = x509::der_of(&chain_pem).map_err(|error| format!("server.pem: {error}"))?;
    let certificate = x509::parse(&der).map_err(|error| format!("server.pem: {error}"))?;
    let key = KeyPair::from_pem(&key_pem).map_err(|_| "server.key holds no key".to_owned())?;
    if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err("server.pem and server.key do not belong together".to_owned());
    }
    if count != 2 || !chain_pem.ends_with(&ca.pem) || !signed_by(&certificate, ca.key.public_key_raw()) {
        return Err("server.pem was not made by ca.pem".to_owned());
    }
    let covered = alternatives_of(&certificate);
    let info = x509::info(&der).map_err(|error| error.to_string())?;
    let server = ServerCertificate { chain_pem, key_pem: Secret::new(key_pem), ca_pem: ca.pem.clone(), info };
    Ok(Some((server, covered)))
}

fn signed_by(certificate: &x509_parser::certificate::X509Certificate<'_>, public_key: &[u8]) -> bool {
    let signed = certificate.tbs_certificate.as_ref();
    let signature = certificate.signature_value.data.as_ref();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, public_key).verify(signed, signature).is_ok()
}

fn alternatives_of(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Vec<String> {
    use x509_parser::extensions::GeneralName;
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    let names = extension.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
            _ => None,
        },
        _ => None,
    });
    names.collect()
}

fn make_ca(dir: &Path, names: &Names, now: Timestamp) -> Result<Ca> {
    let mut params = params(&format!("dom0d CA of {}", short(&names.hostname)), Vec::new(), now, CA_LIFE_S)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = new_key()?;
    let certificate = params.self_signed(&key).map_err(make_error)?;
    let pem = certificate.pem();
    write(&dir.join("ca.key"), &key.serialize_pem(), 0o600)?;
    write(&dir.join("ca.pem"), &pem, 0o644)?;
    Ok(Ca { pem, der: certificate.der().to_vec(), key })
}

fn make_server(dir: &Path, ca: &Ca, names: &Names, now: Timestamp) -> Result<ServerCertificate> {
    let mut params = params(short(&names.hostname), names.alternatives(), now, SERVER_LIFE_S)?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Peers of a pool are clients of each other.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let issuer = Issuer::from_ca_cert_der(&ca.der.as_slice().into(), &ca.key).map_err(make_error)?;
    let key = new_key()?;
    let certificate = params.signed_by(&key, &issuer).map_err(make_error)?;
    let chain_pem = format!("{}{}", certificate.pem(), ca.pem);
    let key_pem = Secret::new(key.serialize_pem());
    write(&dir.join("server.key"), key_pem.expose(), 0o600)?;
    write(&dir.join("server.pem"), &chain_pem, 0o644)?;
    let info = x509::info(certificate.der()).map_err(|error| CertificateError::Make(error.to_string()))?;
    Ok(ServerCertificate { chain_pem, key_pem, ca_pem: ca.pem.clone(), info })
}

fn params(name: &str, alternatives: Vec<String>, now: Timestamp, life_s: u64) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(alternatives).map_err(make_error)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "dom0d");
    params.distinguished_name.push(DnType::CommonName, name);
    // A clock far in the future would leave what a date can hold.
    let now_s = now.seconds().min(200 * 365 * DAY_S);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(now_s.saturating_sub(SLACK_S));
    params.not_after = epoch + Duration::from_secs(now_s.saturating_sub(SLACK_S) + life_s);
    let mut serial = [0_u8; 16];
    SystemRandom::new()
        .fill(&mut serial)
        .map_err(|_| CertificateError::Make("no random numbers".to_owned()))?;
    // Positive, and never shortened by a leading zero.
    serial[0] = (serial[0] & 0x7f) | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn new_key() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make_error)
}

fn make_error(error: rcgen::Error) -> CertificateError {
    CertificateError::Make(error.to_string())
}

/// A common name holds 64 characters at most (RFC 5280).
fn short(hostname: &str) -> &str {
    let end = hostname.char_indices().nth(40).map_or(hostname.len(), |(at, _)| at);
    if end == 0 { "this host" } else { &hostname[..end] }
}

fn make_folder(dir: &Path) -> Result<()> {
    let io = |error| CertificateError::Io { path: dir.to_path_buf(), error };
    // A folder that is as it should be is left alone: it may lie on a disk that can only be read.
    if std::fs::metadata(dir).is_ok_and(|m| m.is_dir() && m.permissions().mode() & 0o7777 == 0o700) {
        return Ok(());
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(io)
}

/// `None` where there is no such file; an error's words where it cannot be read as text of a sane length.
fn read(path: &Path) -> std::result::Result<Option<String>, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{name}: {error}")),
    };
    let mut text = String::new();
    let limit = u64::try_from(x509::MAX_PEM_BYTES).unwrap_or(u64::MAX);
    match file.take(limit).read_to_string(&mut text) {
        Ok(_) => Ok(Some(text)),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let temporary = path.with_extension(format!("new-{}", uuid::Uuid::new_v4().simple()));
    let put = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    put().map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        CertificateError::Io { path: path.to_path_buf(), error }
    })
}

fn move_aside(path: &Path, now: Timestamp) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{name}.damaged-{}", now.seconds()));
    match std::fs::rename(path, &aside) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(CertificateError::Io { path: path.to_path_buf(), error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "certificate_tests.rs"]
mod tests;
