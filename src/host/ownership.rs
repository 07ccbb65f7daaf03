//! Who owns the host: a pure machine of two states.
//!
//! ```text
//! Unowned --take(A)--> Owned by A --release(A)--> Unowned
//!                        | take(A): updates what it names, the rest stays; `since` stays
//!                        | take(B), release(B): refused, and the owner is named
//! ```
//!
//! A manager is known by its id, whose dashes and case do not matter (it writes it both ways). Credentials in
//! a manager's URL are split off when the request is read and stay in memory with it: no record, error or log
//! shows them.

use super::x509::{self, X509Error};
use crate::model::{Invalid, Secret, Timestamp, excerpt, text_type};
use serde::{Deserialize, Serialize};
use std::net::Ipv6Addr;

/// A manager's id, as it wrote it: 1 to 64 hex digits and dashes.
#[derive(Debug, Clone)]
pub struct ManagerId(String);

impl ManagerId {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let good = text.len() <= 64 && text.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
        if good && text.bytes().any(|c| c != b'-') {
            return Ok(Self(text.to_owned()));
        }
        Err(Invalid::new(
            "manager id",
            format!("{} is not one", excerpt(text)),
            "1 to 64 hex digits and dashes",
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn plain(&self) -> String {
        self.0.replace('-', "").to_ascii_lowercase()
    }
}
text_type!(ManagerId);

impl PartialEq for ManagerId {
    fn eq(&self, other: &Self) -> bool {
        self.plain() == other.plain()
    }
}
impl Eq for ManagerId {}

/// Where a manager listens: `http` or `https`, a host, maybe a port, a path; no credentials, no fragment; at
/// most 1,024 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagerUrl(String);

impl ManagerUrl {
    /// A URL without credentials; one with them is refused, so that no record can hold any.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        match Self::split(text)? {
            (url, None) => Ok(url),
            _ => Err(wrong_url("holds credentials")),
        }
    }

    /// The URL and the `user:password` that it held. Errors repeat nothing of the text, which may hold a
    /// secret anywhere once it is malformed.
    pub fn split(text: &str) -> Result<(Self, Option<Secret>), Invalid> {
        if text.len() > 1024 {
            return Err(wrong_url("is longer than 1,024 bytes"));
        }
        if !text.bytes().all(|c| c.is_ascii_graphic()) || text.contains(['"', '<', '>', '\\', '`', '#']) {
            return Err(wrong_url("has characters that no URL has"));
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong_url("has no scheme"))?;
        let scheme = scheme.to_ascii_lowercase();
        if scheme != "http" && scheme != "https" {
            return Err(wrong_url("is neither http nor https"));
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (userinfo, host) = match authority.rsplit_once('@') {
            Some((userinfo, host)) => (Some(Secret::new(userinfo)), host),
            None => (None, authority),
        };
        check_host(host)?;
        Ok((Self(format!("{scheme}://{host}{path}")), userinfo))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}
text_type!(ManagerUrl);

fn wrong_url(problem: &str) -> Invalid {
    Invalid::new("manager URL", problem, "http://HOST[:PORT][/PATH] or https://…, at most 1,024 bytes")
}

/// `name`, `192.0.2.1` or `[2001:db8::1]`, and maybe `:port`.
fn check_host(text: &str) -> Result<(), Invalid> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or_else(|| wrong_url("has an open bracket"))?;
            if address.parse::<Ipv6Addr>().is_err() {
                return Err(wrong_url("has no IPv6 address in its brackets"));
            }
            (None, after)
        }
        None => {
            let end = text.find(':').unwrap_or(text.len());
            (Some(&text[..end]), &text[end..])
        }
    };
    let good = |c: u8| c.is_ascii_alphanumeric() || b".-_".contains(&c);
    if host.is_some_and(|host| host.is_empty() || host.len() > 253 || !host.bytes().all(good)) {
        return Err(wrong_url("has no host"));
    }
    let port_fits = match port.strip_prefix(':') {
        Some(digits) => {
            digits.bytes().all(|c| c.is_ascii_digit()) && digits.parse::<u16>().is_ok_and(|p| p > 0)
        }
        None => port.is_empty(),
    };
    if port_fits { Ok(()) } else { Err(wrong_url("has a port that is none")) }
}

/// The certificate by which the owner is known on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerCertificate {
    pub pem: String,
    /// SHA-256 of its DER in lower-case hex.
    pub fingerprint: String,
    /// It then vouches for others; else it is matched exactly.
    pub is_ca: bool,
}

impl OwnerCertificate {
    pub fn parse(pem: &str) -> Result<Self, X509Error> {
        let (der, count) = x509::der_of(pem)?;
        if count != 1 {
            return Err(X509Error::Malformed(format!("{count} certificates instead of one")));
        }
        let certificate = x509::parse(&der)?;
        x509::check_strength(&certificate)?;
        Ok(Self { pem: pem.to_owned(), fingerprint: x509::fingerprint(&der), is_ca: certificate.is_ca() })
    }

    pub fn der(&self) -> Result<Vec<u8>, X509Error> {
        x509::der_of(&self.pem).map(|(der, _)| der)
    }
}

/// `take_ownership` as it came in, in both of its forms; what was not sent, or sent empty, is `None`.
#[derive(Clone, Copy, Default)]
pub struct RawTake<'a> {
    pub manager: &'a str,
    pub core_api_url: Option<&'a str>,
    pub event_url: Option<&'a str>,
    pub statistic_url: Option<&'a str>,
    pub certificate: Option<&'a str>,
    pub signed_server_certificate: Option<&'a str>,
}

/// A wish to own the host, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakeRequest {
    pub manager: ManagerId,
    pub core_api_url: Option<ManagerUrl>,
    pub event_url: Option<ManagerUrl>,
    pub statistic_url: Option<ManagerUrl>,
    pub certificate: Option<OwnerCertificate>,
    pub signed_server_certificate: Option<String>,
    /// The first credentials found in the URLs. Never stored.
    pub credentials: Option<Secret>,
}

impl TakeRequest {
    pub fn parse(raw: &RawTake<'_>) -> Result<Self, OwnershipError> {
        let mut credentials = None;
        let mut url = |text: Option<&str>| -> Result<Option<ManagerUrl>, Invalid> {
            let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
            let (url, found) = ManagerUrl::split(text)?;
            credentials = credentials.take().or(found);
            Ok(Some(url))
        };
        let core_api_url = url(raw.core_api_url)?;
        let event_url = url(raw.event_url)?;
        let statistic_url = url(raw.statistic_url)?;
        let read = |what: &'static str, pem: Option<&str>| {
            let pem = pem.filter(|pem| !pem.is_empty());
            let parsed = pem.map(OwnerCertificate::parse).transpose();
            parsed.map_err(|why| OwnershipError::Certificate { what, why })
        };
        Ok(Self {
            manager: ManagerId::parse(raw.manager)?,
            core_api_url,
            event_url,
            statistic_url,
            certificate: read("manager_certificate", raw.certificate)?,
            signed_server_certificate: read("signed_server_certificate", raw.signed_server_certificate)?
                .map(|certificate| certificate.pem),
            credentials,
        })
    }
}

/// Why the owner stays who it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OwnershipError {
    #[error("ALREADY_OWNED: manager {owner} owns this host; it must release it first")]
    AlreadyOwned { owner: ManagerId },
    #[error("NOT_OWNED: no manager owns this host")]
    NotOwned,
    #[error("NOT_OWNER: manager {owner} owns this host, and only it may release it")]
    NotOwner { owner: ManagerId },
    #[error("INVALID_CERTIFICATE: {what}: {why}")]
    Certificate { what: &'static str, why: X509Error },
    #[error("INVALID_PARAMETER: {0}")]
    Invalid(#[from] Invalid),
}

/// Who owns the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Ownership {
    #[default]
    Unowned,
    Owned(Box<Owner>),
}

/// The manager that owns the host, and what it told us of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub manager: ManagerId,
    pub core_api_url: Option<ManagerUrl>,
    pub event_url: Option<ManagerUrl>,
    pub statistic_url: Option<ManagerUrl>,
    pub certificate: Option<OwnerCertificate>,
    /// Our server certificate as the manager signed it, PEM.
    pub signed_server_certificate: Option<String>,
    pub since: Timestamp,
    /// When it took ownership last: it may do so again, with another address or certificate.
    #[serde(default)]
    pub taken: Timestamp,
    /// The number of the newest event when it became the owner; it is told what came after.
    #[serde(default)]
    pub from_event: Option<u64>,
}

impl Ownership {
    pub fn owner(&self) -> Option<&Owner> {
        match self {
            Self::Unowned => None,
            Self::Owned(owner) => Some(owner),
        }
    }

    /// `newest_event`: its number now.
    pub fn take(
        &self,
        request: TakeRequest,
        now: Timestamp,
        newest_event: u64,
    ) -> Result<Self, OwnershipError> {
        let old = match self {
            Self::Owned(owner) if owner.manager != request.manager => {
                return Err(OwnershipError::AlreadyOwned { owner: owner.manager.clone() });
            }
            Self::Owned(owner) => Some(Owner::clone(owner)),
            Self::Unowned => None,
        };
        let since = old.as_ref().map_or(now, |owner| owner.since);
        let kept = old.unwrap_or_else(|| Owner {
            from_event: Some(newest_event),
            ..Owner::bare(&request.manager, since)
        });
        Ok(Self::Owned(Box::new(Owner {
            manager: kept.manager,
            core_api_url: request.core_api_url.or(kept.core_api_url),
            event_url: request.event_url.or(kept.event_url),
            statistic_url: request.statistic_url.or(kept.statistic_url),
            certificate: request.certificate.or(kept.certificate),
            signed_server_certificate: request.signed_server_certificate.or(kept.signed_server_certificate),
            since,
            taken: now,
            from_event: kept.from_event,
        })))
    }

    pub fn release(&self, manager: &ManagerId) -> Result<Self, OwnershipError> {
        match self {
            Self::Unowned => Err(OwnershipError::NotOwned),
            Self::Owned(owner) if owner.manager == *manager => Ok(Self::Unowned),
            Self::Owned(owner) => Err(OwnershipError::NotOwner { owner: owner.manager.clone() }),
        }
    }
}

impl Owner {
    fn bare(manager: &ManagerId, since: Timestamp) -> Self {
        Self {
            manager: manager.clone(),
            core_api_url: None,
            event_url: None,
            statistic_url: None,
            certificate: None,
            signed_server_certificate: None,
            since,
            taken: since,
            from_event: None,
        }
    }
}

#[cfg(test)]
#[path = "ownership_tests.rs"]
mod tests;
