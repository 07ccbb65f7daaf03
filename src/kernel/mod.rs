//! The kernel's view of the network, as one trait: links and their addresses. (Changes come with the network
//! floor.) `linux` asks the kernel, `sim` the simulated world.

pub mod linux;
pub mod sim;

use crate::model::Bytes;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

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
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("the kernel did not answer: {0}")]
pub struct KernelError(pub String);

#[async_trait]
pub trait Kernel: Send + Sync + 'static {
    /// All links, by name.
    async fn links(&self) -> Result<Vec<Link>, KernelError>;
    /// Of all links, by name.
    async fn traffic(&self) -> Result<Vec<LinkTraffic>, KernelError>;
}
