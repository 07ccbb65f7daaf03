//! Whom to deliver to, and how it is known.

use super::source::Stream;
use crate::config::{self, WithoutCertificate};
use crate::model::Timestamp;
use crate::wire::{Destination, ServerTrust, TlsIdentity};
use std::sync::{Arc, Mutex};

/// The manager, as its ownership tells.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its id; another id begins anew.
    pub manager: String,
    /// Since when it owns us, and when it said so last.
    pub since: Timestamp,
    pub taken: Timestamp,
    /// The number of the newest event when it became our owner.
    pub from_event: Option<u64>,
    /// Who we are to it: `urn:uuid:…`.
    pub source: String,
    pub event_url: Option<String>,
    pub statistic_url: Option<String>,
    /// The pinned certificate (DER).
    pub pin: Option<Vec<u8>>,
    /// What we show; `Err` says why there is nothing to show.
    pub identity: Result<TlsIdentity, String>,
}

/// Whom to deliver to, as far as it is known.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// The agent has just begun.
    Unknown,
    Nobody,
    Manager(Arc<Target>),
}

/// Why nothing is delivered although there is a URL. Settings or another `take_ownership` mend it, no trying.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("the URL is no http or https URL")]
    Url,
    #[error(
        "the URL is http, which anybody can read: allowed are https URLs, or manager.plain_http in the settings"
    )]
    PlainHttp,
    #[error(
        "the manager gave no certificate: allowed are managers with one, or manager.without_certificate = \"first_seen\" in the settings"
    )]
    NoCertificate,
    #[error("our own certificate cannot be read: {0}")]
    Identity(String),
}

/// A URL's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub tls: bool,
    /// Of an IPv6 address without its brackets.
    pub host: String,
    pub port: u16,
    /// With the query, from the slash on.
    pub path: String,
}

impl Place {
    /// `http(s)://host[:port][/path]`, as ownership has checked it.
    pub fn parse(url: &str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let tls = match scheme {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (host, port) = match authority.strip_prefix('[') {
            Some(inner) => {
                let (host, after) = inner.split_once(']')?;
                (host, after.strip_prefix(':'))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let port = match port.filter(|digits| !digits.is_empty()) {
            Some(digits) => digits.parse().ok().filter(|port| *port > 0)?,
            None if tls => 443,
            None => 80,
        };
        let path = match path {
            "" => "/".to_owned(),
            query if query.starts_with('?') => format!("/{query}"),
            path => path.to_owned(),
        };
        (!host.is_empty()).then(|| Self { tls, host: host.to_owned(), port, path })
    }
}

/// Where the certificate is left that was seen at a first connection to a manager without a pin.
pub(super) type Seen = Arc<Mutex<Option<String>>>;

impl Target {
    /// `host:port` of a URL, by which its certificate is known.
    pub(super) fn place(&self, url: &str) -> String {
        Place::parse(url).map(|place| format!("{}:{}", place.host, place.port)).unwrap_or_default()
    }

    pub fn url(&self, stream: Stream) -> Option<&str> {
        match stream {
            Stream::Events => self.event_url.as_deref(),
            Stream::Statistics => self.statistic_url.as_deref(),
        }
    }

    /// How to get there. `learned`: the certificate that was seen first, of a manager that gave none.
    pub(super) fn destination(
        &self,
        url: &str,
        settings: &config::Manager,
        learned: Option<&str>,
    ) -> Result<(Destination, Option<Seen>), TargetError> {
        let place = Place::parse(url).ok_or(TargetError::Url)?;
        let mut seen = None;
        let trust = match (place.tls, &self.pin, learned) {
            (false, ..) if settings.plain_http => None,
            (false, ..) => return Err(TargetError::PlainHttp),
            (true, Some(der), _) => Some(ServerTrust::PinnedOrIssued { der: der.clone() }),
            (true, None, _) if settings.without_certificate == WithoutCertificate::Refuse => {
                return Err(TargetError::NoCertificate);
            }
            (true, None, Some(sha256)) => Some(ServerTrust::Fingerprint { sha256: sha256.to_owned() }),
            (true, None, None) => {
                let first = Seen::default();
                seen = Some(Arc::clone(&first));
                Some(ServerTrust::FirstSeen { seen: first })
            }
        };
        let identity = match trust {
            None => None,
            Some(_) => Some(self.identity.clone().map_err(TargetError::Identity)?),
        };
        let Place { host, port, path, .. } = place;
        Ok((Destination { host, port, path, trust, identity }, seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(tls: bool, host: &str, port: u16, path: &str) -> Option<Place> {
        Some(Place { tls, host: host.to_owned(), port, path: path.to_owned() })
    }

    #[test]
    fn a_url_is_taken_apart_with_the_usual_ports() {
        for (url, expected) in [
            ("https://manager", place(true, "manager", 443, "/")),
            ("http://192.0.2.1/a?b=c", place(false, "192.0.2.1", 80, "/a?b=c")),
            ("https://[2001:db8::1]:7002/ovm/core", place(true, "2001:db8::1", 7002, "/ovm/core")),
            ("https://m:8443?x=1", place(true, "m", 8443, "/?x=1")),
            ("https://m:/x", place(true, "m", 443, "/x")),
            ("https://m:0/x", None),
            ("ftp://m/x", None),
            ("https:///x", None),
            ("m", None),
        ] {
            assert_eq!(Place::parse(url), expected, "{url}");
        }
    }

    fn target(pin: Option<&[u8]>) -> Target {
        Target {
            manager: "a".to_owned(),
            since: Timestamp(0),
            taken: Timestamp(0),
            from_event: None,
            source: "urn:uuid:0".to_owned(),
            event_url: None,
            statistic_url: None,
            pin: pin.map(<[u8]>::to_vec),
            identity: Err("no key".to_owned()),
        }
    }

    #[test]
    fn nothing_goes_out_in_the_clear_or_to_an_unknown_unless_the_settings_say_so() {
        let strict =
            config::Manager { without_certificate: WithoutCertificate::Refuse, ..config::Manager::default() };
        let asked = |target: &Target, url: &str, settings| target.destination(url, settings, None).map(drop);
        assert_eq!(asked(&target(None), "http://m/", &strict), Err(TargetError::PlainHttp));
        assert_eq!(asked(&target(None), "https://m/", &strict), Err(TargetError::NoCertificate));
        let identity = Err(TargetError::Identity("no key".to_owned()));
        assert_eq!(asked(&target(Some(b"x")), "https://m/", &strict), identity);
        let open = config::Manager { plain_http: true, ..config::Manager::default() };
        let (destination, seen) = target(None).destination("http://m/", &open, None).unwrap();
        assert!(destination.trust.is_none() && destination.identity.is_none() && seen.is_none());
    }
}
