//! Peers: other hosts that this one trusts to send it VMs and to take VMs from it.
//!
//! A peer is an address and a fingerprint, SHA-256 over the DER of a certificate. The certificate is the peer's CA
//! (`dom0ctl host fingerprint` on the peer tells it), so that its server certificate may be renewed; its server
//! certificate itself is taken too. The fingerprint says who it is in both directions: whom we call, and who calls.
//! A pool will manage this table later.

use crate::model::{Invalid, Timestamp, excerpt, text_type};
use crate::store::Table;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The table of peers, by address: desired state, so it is in the ledger too.
pub const PEERS: Table<Peer> = Table::new("peer", 1);
/// Peers at most: as many as the largest pool has hosts, twice.
pub const MAX_PEERS: usize = 128;
const PORT: u16 = 8899;

/// Another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    pub address: PeerAddress,
    pub fingerprint: Fingerprint,
    pub added: Timestamp,
}

/// `host:port`; the host is a name, an IPv4 address, or an IPv6 address in brackets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerAddress(String);

impl PeerAddress {
    /// `192.0.2.7`, `host7.example`, `[2001:db8::7]`, a bare IPv6 address; each with `:port` or without (8899).
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let wrong = |why: &str| {
            let what = format!("{why}: {}", excerpt(text));
            Invalid::new("address", what, "HOST or HOST:PORT; HOST is a name or an IP address")
        };
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::of(&ip.to_string(), PORT));
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => {
                let digits = !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit());
                let port = port.parse::<u16>().ok().filter(|port| digits && *port > 0);
                (host, port.ok_or_else(|| wrong("has no port after its colon"))?)
            }
            None => (text, PORT),
        };
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        if let Some(ip) = bare {
            let ip: std::net::Ipv6Addr =
                ip.parse().map_err(|_| wrong("has no IPv6 address in its brackets"))?;
            return Ok(Self::of(&ip.to_string(), port));
        }
        let good = |c: u8| c.is_ascii_alphanumeric() || b".-_".contains(&c);
        if host.is_empty() || host.len() > 253 || host.starts_with(['-', '.']) || !host.bytes().all(good) {
            return Err(wrong("has no host"));
        }
        Ok(Self::of(&host.to_ascii_lowercase(), port))
    }

    fn of(host: &str, port: u16) -> Self {
        Self(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Without the port.
    pub fn host(&self) -> &str {
        self.0.rsplit_once(':').map_or(self.0.as_str(), |(host, _)| host)
    }
}
text_type!(PeerAddress);

/// SHA-256 in 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(String);

impl Fingerprint {
    /// Hex digits, with colons between the bytes or without.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let digits = text.replace(':', "").to_ascii_lowercase();
        if digits.len() == 64 && digits.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Ok(Self(digits));
        }
        let what = format!("{} is not one", excerpt(text));
        Err(Invalid::new(
            "fingerprint",
            what,
            "SHA-256 in 64 hex digits, as `dom0ctl host fingerprint` prints it",
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}
text_type!(Fingerprint);

/// The peer that a destination names: by its whole address, or by its host alone if only one has that.
pub fn find<'a>(peers: &'a [Peer], dest: &str) -> Option<&'a Peer> {
    let address = PeerAddress::parse(dest).ok()?;
    peers.iter().find(|peer| peer.address == address).or_else(|| {
        let named_port =
            !address.as_str().ends_with(&format!(":{PORT}")) || dest.ends_with(&format!(":{PORT}"));
        let mut same = peers.iter().filter(|peer| !named_port && peer.address.host() == address.host());
        same.next().filter(|_| same.next().is_none())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_one_writing_and_the_usual_port() {
        for (text, whole) in [
            ("192.0.2.7", "192.0.2.7:8899"),
            ("192.0.2.7:9000", "192.0.2.7:9000"),
            ("Host7.Example", "host7.example:8899"),
            ("2001:DB8::7", "[2001:db8::7]:8899"),
            ("[2001:db8::7]:1", "[2001:db8::7]:1"),
        ] {
            assert_eq!(PeerAddress::parse(text).unwrap().as_str(), whole);
        }
        for bad in
            ["", ":8899", "a:0", "a:99999", "a b", "a/b", "u@h", "[::g]", "-rf", "a:+1", "x\n", "'; id;'"]
        {
            assert!(PeerAddress::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_fingerprint_is_sixty_four_digits_however_they_are_written() {
        let plain = "ab".repeat(32);
        let colons = vec!["AB"; 32].join(":");
        assert_eq!(Fingerprint::parse(&colons).unwrap().as_str(), plain);
        for bad in ["", "ab", &plain[1..], &"zz".repeat(32)] {
            assert!(Fingerprint::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_destination_without_a_port_names_the_only_peer_of_that_host() {
        let peer = |address: &str| Peer {
            address: PeerAddress::parse(address).unwrap(),
            fingerprint: Fingerprint::parse(&"ab".repeat(32)).unwrap(),
            added: Timestamp(0),
        };
        let one = [peer("192.0.2.7:9000")];
        assert_eq!(find(&one, "192.0.2.7"), Some(&one[0]));
        assert_eq!(find(&one, "192.0.2.7:8899"), None, "a port that was said is meant");
        let two = [peer("192.0.2.7:9000"), peer("192.0.2.7:9001")];
        assert_eq!(find(&two, "192.0.2.7"), None);
        assert_eq!(find(&two, "192.0.2.7:9001"), Some(&two[1]));
    }
}
