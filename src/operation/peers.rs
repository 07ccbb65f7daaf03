//! Other hosts: the table of peers in memory, and the way to them.

use super::Operations;
use crate::event::{Event, kind};
use crate::host::peer::{MAX_PEERS, PEERS, Peer, PeerAddress};
use crate::job::{JobFault, Outcome, StepContext};
use crate::model::MigrationId;
use crate::store::Txn;
use crate::wire::Stream;
use async_trait::async_trait;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Why a peer gave no answer, or a bad one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// It answered, and refused: its fault, by name.
    #[error("{name}: {text}")]
    Fault { name: String, text: String },
    /// Nothing is known of what became of the call.
    #[error("{0}")]
    Unreachable(String),
}

/// The way to peers. The composition root joins it: by TLS with our own certificate, the peer's pinned.
#[async_trait]
pub trait PeerLink: Send + Sync + 'static {
    /// Calls a peer verb; every parameter is text. Ends by `limit`.
    async fn call(
        &self,
        peer: &Peer,
        verb: &str,
        params: Vec<String>,
        limit: Duration,
    ) -> Result<serde_json::Value, LinkError>;

    /// Opens the stream of a migration that was prepared.
    async fn open(&self, peer: &Peer, id: MigrationId, limit: Duration) -> Result<Stream, LinkError>;
}

impl Operations {
    /// Joins the way to peers, once.
    pub fn join_peers(&self, link: Arc<dyn PeerLink>) {
        let _ = self.link.set(link);
    }

    pub(super) fn link(&self) -> Result<&Arc<dyn PeerLink>, LinkError> {
        self.link.get().ok_or_else(|| LinkError::Unreachable("this agent calls no peers".to_owned()))
    }

    /// All peers, by address.
    pub fn peers(&self) -> Arc<Vec<Peer>> {
        Arc::clone(&self.peers.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn peer_at(&self, address: &str) -> Option<Peer> {
        self.peers().iter().find(|peer| peer.address.as_str() == address).cloned()
    }

    pub(super) fn peer_of(&self, fingerprint: &str) -> Option<Peer> {
        self.peers().iter().find(|peer| peer.fingerprint.as_str() == fingerprint).cloned()
    }

    pub(super) fn set_peers(&self, peers: Vec<Peer>) {
        let peers = Arc::new(peers);
        *self.peers.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&peers);
        self.access.peers_changed(&peers);
    }

    pub(super) fn put_peer(&self, peer: Peer, context: &StepContext) -> Result<Outcome, JobFault> {
        let mut peers = Vec::clone(&self.peers());
        peers.retain(|other| other.address != peer.address);
        if peers.len() >= MAX_PEERS {
            let text = format!("there are {MAX_PEERS} peers already; peer_remove frees a place");
            return Err(JobFault::refusal("PEER_LIMIT", text));
        }
        if let Some(other) = peers.iter().find(|other| other.fingerprint == peer.fingerprint) {
            let text =
                format!("this fingerprint is the peer's at {}; a host has one address here", other.address);
            return Err(JobFault::refusal("PEER_EXISTS", text));
        }
        let mut writes = Txn::new();
        writes.put(&PEERS, peer.address.as_str(), &peer);
        let text = format!("peer {} may send VMs here and take VMs from here", peer.address);
        let event = Event::new(kind::PEER_ADDED, "host", text).with_job(context.job);
        event.append_to(&mut writes);
        peers.push(peer);
        peers.sort_by(|a, b| a.address.cmp(&b.address));
        let then = self.hook(move |operations| operations.set_peers(peers));
        Ok(Outcome { writes, then, ..Outcome::default() })
    }

    pub(super) fn remove_peer(
        &self,
        address: &PeerAddress,
        context: &StepContext,
    ) -> Result<Outcome, JobFault> {
        let mut peers = Vec::clone(&self.peers());
        let before = peers.len();
        peers.retain(|peer| peer.address != *address);
        if peers.len() == before {
            return Err(JobFault::refusal(
                "PEER_NOT_FOUND",
                format!("no peer {address}; peer_list shows all"),
            ));
        }
        let mut writes = Txn::new();
        writes.delete(&PEERS, address.as_str());
        let text = format!("peer {address} was removed: nothing is sent there and nothing taken from there");
        let event = Event::new(kind::PEER_REMOVED, "host", text).with_job(context.job);
        event.append_to(&mut writes);
        let then = self.hook(move |operations| operations.set_peers(peers));
        Ok(Outcome { writes, then, ..Outcome::default() })
    }
}
