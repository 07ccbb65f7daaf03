//! The way to other hosts, and the streams that come from them: joins operations with the wire.
//!
//! We show our server certificate as a client's and take only the certificate that is pinned for the peer; so each
//! side knows the other by what its operator has told it, and no CA of the world has a say. A connection per call:
//! calls of peers are few, and a renewed certificate is shown at once.

use super::access::Surroundings;
use crate::host::Peer;
use crate::model::{MigrationId, trace};
use crate::operation::Operations;
use crate::operation::peers::{LinkError, PeerLink};
use crate::wire::{Client, ClientError, Credentials, ServerTrust, Stream, Taker, Upgrades, Value};
use async_trait::async_trait;
use futures_util::FutureExt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// The word in the `Upgrade` header.
const PROTOCOL: &str = "dom0d-migration";
const PATH: &str = "/migration/";
const RESOLVE_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct TlsLink {
    surroundings: Arc<Surroundings>,
}

impl TlsLink {
    pub(super) fn new(surroundings: Arc<Surroundings>) -> Self {
        Self { surroundings }
    }

    async fn client(&self, peer: &Peer) -> Result<Client, LinkError> {
        let away = |why: String| LinkError::Unreachable(why);
        let surroundings = Arc::clone(&self.surroundings);
        let identity = tokio::task::spawn_blocking(move || surroundings.identity()).await;
        let identity = identity.map_err(|e| away(e.to_string()))?.map_err(away)?;
        let address = resolve(peer.address.as_str()).await.map_err(away)?;
        let trust = ServerTrust::Fingerprint { sha256: peer.fingerprint.as_str().to_owned() };
        let credentials = Credentials { password: None, certificate: Some(identity) };
        let mut client = Client::tls(address, &trust, &credentials).map_err(|error| away(told(&error)))?;
        client.set_trace(trace::current().map(|trace| trace.child()));
        Ok(client)
    }
}

async fn resolve(address: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = address.parse() {
        return Ok(address);
    }
    let looked = tokio::time::timeout(RESOLVE_LIMIT, tokio::net::lookup_host(address.to_owned())).await;
    let mut found = looked
        .map_err(|_| format!("the name of {address} is not resolved in time"))?
        .map_err(|error| format!("the name of {address} is not known: {error}"))?;
    found.next().ok_or_else(|| format!("{address} has no address"))
}

/// With its cause, which says what is wrong.
fn told(error: &ClientError) -> String {
    match (error, std::error::Error::source(error)) {
        (ClientError::Refused { .. }, _) => {
            format!("{error}: this host is no peer there; add it with peer_add")
        }
        (_, Some(cause)) => format!("{error}: {cause}"),
        (_, None) => error.to_string(),
    }
}

#[async_trait]
impl PeerLink for TlsLink {
    async fn call(
        &self,
        peer: &Peer,
        verb: &str,
        params: Vec<String>,
        limit: Duration,
    ) -> Result<serde_json::Value, LinkError> {
        let mut client = self.client(peer).await?;
        let params: Vec<Value> = params.into_iter().map(Value::String).collect();
        match client.call(verb, &params, limit).await {
            Ok(answer) => Ok(json(answer)),
            Err(ClientError::Fault(fault)) => {
                let (name, text) =
                    fault.fault_string.split_once(": ").unwrap_or(("FAILED", fault.fault_string.as_str()));
                Err(LinkError::Fault { name: name.to_owned(), text: text.to_owned() })
            }
            Err(error) => Err(LinkError::Unreachable(told(&error))),
        }
    }

    async fn open(&self, peer: &Peer, id: MigrationId, limit: Duration) -> Result<Stream, LinkError> {
        let client = self.client(peer).await?;
        let opened = client.open_stream(&format!("{PATH}{id}"), PROTOCOL, limit).await;
        opened.map_err(|error| LinkError::Unreachable(told(&error)))
    }
}

/// Answers of peer verbs hold texts, numbers and booleans.
fn json(value: Value) -> serde_json::Value {
    match value {
        Value::String(text) => text.into(),
        Value::Int(n) => n.into(),
        Value::Int64(n) => n.into(),
        Value::Bool(b) => b.into(),
        Value::Struct(map) => map.into_iter().map(|(key, value)| (key, json(value))).collect(),
        Value::Array(list) => list.into_iter().map(json).collect(),
        _ => serde_json::Value::Null,
    }
}

/// Takes the streams of migrations that were prepared.
pub(super) struct Streams {
    operations: Arc<Operations>,
}

impl Streams {
    pub(super) fn new(operations: Arc<Operations>) -> Self {
        Self { operations }
    }
}

impl Upgrades for Streams {
    fn protocol(&self) -> &'static str {
        PROTOCOL
    }

    fn taker(&self, peer: &str, path: &str) -> Option<Taker> {
        let id = MigrationId::parse(path.strip_prefix(PATH)?).ok()?;
        if !self.operations.expects_stream(peer, id) {
            return None;
        }
        let (operations, peer) = (Arc::clone(&self.operations), peer.to_owned());
        Some(Box::new(move |stream| async move { operations.receive(&peer, id, stream).await }.boxed()))
    }
}
