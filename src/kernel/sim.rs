//! The kernel's simulated body: the links of the simulated world.

use super::{Kernel, KernelError, Link, LinkTraffic};
use crate::model::Bytes;
use crate::sim::{self, Answer, Handle, Request};
use async_trait::async_trait;
use std::time::Duration;

#[derive(Debug, Clone)]
pub struct SimKernel {
    handle: Handle,
    timeout: Duration,
}

impl SimKernel {
    /// Each call ends within `timeout`.
    pub fn new(handle: Handle, timeout: Duration) -> Self {
        Self { handle, timeout }
    }
}

impl From<sim::Link> for Link {
    fn from(link: sim::Link) -> Self {
        Self {
            name: link.name,
            mac: link.mac,
            up: link.up,
            loopback: link.loopback,
            addresses: link.addresses,
        }
    }
}

#[async_trait]
impl Kernel for SimKernel {
    async fn links(&self) -> Result<Vec<Link>, KernelError> {
        match self.handle.call(Request::Links, self.timeout).await {
            Ok(Answer::Links(links)) => Ok(links.into_iter().map(Link::from).collect()),
            Ok(_) => Err(KernelError("an answer of another kind".to_owned())),
            Err(error) => Err(KernelError(error.to_string())),
        }
    }

    async fn traffic(&self) -> Result<Vec<LinkTraffic>, KernelError> {
        match self.handle.call(Request::LinkTraffic, self.timeout).await {
            Ok(Answer::LinkTraffic(links)) => {
                let link = |(name, (received, sent))| LinkTraffic {
                    name,
                    received: Bytes(received),
                    sent: Bytes(sent),
                };
                Ok(links.into_iter().map(link).collect())
            }
            Ok(_) => Err(KernelError("an answer of another kind".to_owned())),
            Err(error) => Err(KernelError(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{Fate, Kind, Options, Rule};

    fn kernel() -> (Handle, SimKernel) {
        let handle = Handle::in_process(Options::default());
        (handle.clone(), SimKernel::new(handle, Duration::from_secs(1)))
    }

    #[tokio::test(start_paused = true)]
    async fn the_simulated_host_has_a_loopback_and_an_addressed_bridge_by_name() {
        let links = kernel().1.links().await.unwrap();
        let names: Vec<_> = links.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["eth0", "lo", "xenbr0"]);
        assert!(links[1].loopback && !links[2].loopback);
        assert_eq!(links[2].addresses, [("192.0.2.10".parse().unwrap(), 24)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_kernel_that_does_not_answer_is_an_error_and_no_wait_without_end() {
        let (handle, kernel) = kernel();
        handle.add_rule(Rule::next(Kind::Links, Fate::Hang)).await.unwrap();
        assert!(kernel.links().await.is_err());
    }
}
