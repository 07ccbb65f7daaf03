//! The kernel's network, as one trait: what there is ([`NetworkView`]), what passes, whose it is, what the hardware tells,
//! and changes, one after another. `linux` speaks netlink, sysfs and ethtool in the network namespace we run in (or in another
//! one, by a handle), `sim` to the simulated world. Both pass one contract (`tests/contract`).
//!
//! It plans nothing and undoes nothing: that is the matter of `network` and `operation`.

mod dhcp;
mod echo;
mod ethtool;
pub mod linux;
mod netlink;
mod owners;
mod place;
pub mod sim;
mod sysfs;

pub use crate::model::network::{Changed, LinkFacts};
pub use dhcp::Dhcp;

use crate::model::network::{Change, Neighbour, NetworkView, Owner, Refused};
use crate::model::{Bytes, IfName};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::sync::mpsc;

/// A link with its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub name: String,
    /// Lower case with colons; `None` for links without one.
    pub mac: Option<String>,
    pub up: bool,
    pub loopback: bool,
    /// Address and prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// What has passed through a link since it came, as the host sees it: what a vif *received* its guest has sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkTraffic {
    pub name: String,
    pub received: Bytes,
    pub sent: Bytes,
    pub received_packets: u64,
    pub sent_packets: u64,
    pub receive_errors: u64,
    pub send_errors: u64,
    pub receive_drops: u64,
    pub send_drops: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum KernelError {
    /// It did not do the change, and said why.
    #[error("{0}")]
    Refused(Refused),
    /// It did not answer, or not in time: what was asked may have been done.
    #[error("the kernel did not answer: {0}")]
    Unanswered(String),
}

/// A row of changes ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("after {done} changes: {error}")]
pub struct Stopped {
    /// How many were done; the next one was not, or nobody knows ([`KernelError::Unanswered`]).
    pub done: usize,
    pub error: KernelError,
}

/// An echo that comes later than this has not come.
pub const PING: Duration = Duration::from_secs(3);

#[async_trait]
pub trait Kernel: Send + Sync + 'static {
    /// All links, by name.
    async fn links(&self) -> Result<Vec<Link>, KernelError>;
    /// Of all links, by name.
    async fn traffic(&self) -> Result<Vec<LinkTraffic>, KernelError>;
    /// Everything, as one reading.
    async fn network(&self) -> Result<NetworkView, KernelError>;
    /// Who is known on the links' networks, by link and address.
    async fn neighbours(&self) -> Result<Vec<Neighbour>, KernelError>;
    /// What the hardware of a link tells.
    async fn facts(&self, link: &IfName) -> Result<LinkFacts, KernelError>;
    /// The links that another service of the host configures.
    async fn owners(&self) -> Result<BTreeMap<IfName, Owner>, KernelError>;
    /// One change.
    async fn change(&self, change: &Change) -> Result<(), KernelError>;
    /// One after another, up to the first that is not done.
    async fn change_all(&self, changes: &[Change]) -> Result<(), Stopped> {
        for (done, change) in changes.iter().enumerate() {
            self.change(change).await.map_err(|error| Stopped { done, error })?;
        }
        Ok(())
    }
    /// Whether packets to this address can leave the host and be answered: a route exists, and the next hop answers (its
    /// neighbour entry resolves). The caller's own address is always reached.
    async fn reaches(&self, address: IpAddr) -> Result<bool, KernelError>;
    /// Whether a TCP connection to this address is taken in time. It is closed at once.
    async fn connects(&self, address: SocketAddr, patience: Duration) -> bool;
    /// Whether this address answers an ICMP echo within [`PING`].
    async fn ping(&self, address: IpAddr) -> bool;
    /// A bell that rings after every change of links, addresses and routes, whoever made it. One that was late or lost
    /// some rings too: who hears it reads again.
    fn observe(&self) -> mpsc::Receiver<Changed>;
    /// What went to and fro, for monitoring; a simulated one does not count.
    fn figures(&self) -> Option<Figures> {
        None
    }
}

/// Counted since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// Questions and changes.
    pub messages: u64,
    /// Questions and changes that were refused or not answered.
    pub failures: u64,
    /// Notices heard of what changed.
    pub notices: u64,
    /// Times that the kernel had to drop notices.
    pub overruns: u64,
}
