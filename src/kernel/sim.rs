//! The kernel's simulated body: the network of the simulated world.

use super::{Changed, Kernel, KernelError, Link, LinkFacts, LinkTraffic};
use crate::model::network::{Change, Neighbour, NetworkView, Owner};
use crate::model::{Bytes, IfName};
use crate::sim::{self, Answer, Handle, Request, WorldError};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::sync::mpsc;

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

    async fn ask(&self, request: Request) -> Result<Answer, KernelError> {
        self.handle.call(request, self.timeout).await.map_err(|error| match error {
            WorldError::Refused(refused) => KernelError::Refused(refused),
            other => KernelError::Unanswered(other.to_string()),
        })
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

fn another() -> KernelError {
    KernelError::Unanswered("an answer of another kind".to_owned())
}

#[async_trait]
impl Kernel for SimKernel {
    async fn links(&self) -> Result<Vec<Link>, KernelError> {
        match self.ask(Request::Links).await? {
            Answer::Links(links) => Ok(links.into_iter().map(Link::from).collect()),
            _ => Err(another()),
        }
    }

    async fn traffic(&self) -> Result<Vec<LinkTraffic>, KernelError> {
        let Answer::LinkTraffic(links) = self.ask(Request::LinkTraffic).await? else { return Err(another()) };
        let link = |(name, told): (String, sim::LinkCounters)| LinkTraffic {
            name,
            received: Bytes(told.received_bytes),
            sent: Bytes(told.sent_bytes),
            received_packets: told.received_packets,
            sent_packets: told.sent_packets,
            receive_errors: told.receive_errors,
            send_errors: told.send_errors,
            receive_drops: told.receive_drops,
            send_drops: told.send_drops,
        };
        Ok(links.into_iter().map(link).collect())
    }

    async fn network(&self) -> Result<NetworkView, KernelError> {
        match self.ask(Request::Network).await? {
            Answer::Network(view) => Ok(*view),
            _ => Err(another()),
        }
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, KernelError> {
        match self.ask(Request::Neighbours).await? {
            Answer::Neighbours(all) => Ok(all),
            _ => Err(another()),
        }
    }

    async fn facts(&self, link: &IfName) -> Result<LinkFacts, KernelError> {
        match self.ask(Request::LinkFacts { link: link.clone() }).await? {
            Answer::LinkFacts(facts) => Ok(*facts),
            _ => Err(another()),
        }
    }

    async fn owners(&self) -> Result<BTreeMap<IfName, Owner>, KernelError> {
        match self.ask(Request::LinkOwners).await? {
            Answer::LinkOwners(owners) => Ok(owners),
            _ => Err(another()),
        }
    }

    async fn change(&self, change: &Change) -> Result<(), KernelError> {
        self.ask(Request::ChangeNetwork { change: change.clone() }).await.map(|_| ())
    }

    async fn reaches(&self, address: IpAddr) -> Result<bool, KernelError> {
        match self.ask(Request::Reaches { address }).await? {
            Answer::Reaches(reached) => Ok(reached),
            _ => Err(another()),
        }
    }

    /// Nobody listens there but by being there.
    async fn connects(&self, address: SocketAddr, _: Duration) -> bool {
        self.reaches(address.ip()).await.unwrap_or(false)
    }

    async fn ping(&self, address: IpAddr) -> bool {
        self.reaches(address).await.unwrap_or(false)
    }

    fn observe(&self) -> mpsc::Receiver<Changed> {
        self.handle.observe_network()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::network::{NeighbourState, Refused};
    use crate::sim::{Fate, Kind, Options, Rule};

    fn kernel() -> (Handle, SimKernel) {
        let handle = Handle::in_process(Options::default());
        (handle.clone(), SimKernel::new(handle, Duration::from_secs(1)))
    }

    #[tokio::test(start_paused = true)]
    async fn the_simulated_host_has_a_loopback_and_an_addressed_bridge_by_name() {
        let links = kernel().1.links().await.unwrap();
        let names: Vec<_> = links.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["eth0", "eth1", "eth2", "eth3", "lo", "xenbr0"]);
        assert!(links[4].loopback && !links[5].loopback);
        assert_eq!(links[5].addresses, [("192.0.2.10".parse().unwrap(), 24)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_kernel_that_does_not_answer_is_an_error_and_no_wait_without_end() {
        let (handle, kernel) = kernel();
        handle.add_rule(Rule::next(Kind::Links, Fate::Hang)).await.unwrap();
        assert!(kernel.links().await.is_err());
    }

    fn name(text: &str) -> IfName {
        text.parse().unwrap()
    }

    fn up(link: &str) -> Change {
        Change::SetUp { link: name(link), up: true }
    }

    #[tokio::test(start_paused = true)]
    async fn the_host_has_four_ports_one_of_them_on_an_addressed_bridge_with_the_default_route() {
        let view = kernel().1.network().await.unwrap();
        assert_eq!(view.links[&name("eth0")].controller, Some(name("xenbr0")));
        assert!(view.links[&name("xenbr0")].carrier && !view.links[&name("eth1")].up);
        let routes: Vec<_> = view.routes.iter().map(ToString::to_string).collect();
        assert_eq!(routes, ["0.0.0.0/0 via 192.0.2.1 by xenbr0"]);
        let links = kernel().1.links().await.unwrap();
        assert_eq!(links.len(), view.links.len());
    }

    #[tokio::test(start_paused = true)]
    async fn the_kth_change_fails_or_hangs_as_the_script_says() {
        let (handle, kernel) = kernel();
        let busy = Fate::Fail(sim::WorldError::Refused(Refused::Busy));
        handle.add_rule(Rule::next(Kind::ChangeNetwork, busy).after(1)).await.unwrap();
        handle.add_rule(Rule::next(Kind::ChangeNetwork, Fate::Hang).after(2)).await.unwrap();
        assert_eq!(kernel.change(&up("eth1")).await, Ok(()));
        assert_eq!(kernel.change(&up("eth2")).await, Err(KernelError::Refused(Refused::Busy)));
        let mut told = Vec::new();
        for _ in 0..3 {
            told.push(kernel.change(&up("eth2")).await);
        }
        assert!(told.iter().any(|told| matches!(told, Err(KernelError::Unanswered(_)))), "{told:?}");
        assert!(told.iter().any(Result::is_ok), "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_cable_or_somebody_elses_change_rings_and_what_was_refused_does_not() {
        let (handle, kernel) = kernel();
        let mut bell = kernel.observe();
        assert!(kernel.change(&Change::Delete { link: name("eth0") }).await.is_err());
        assert!(bell.try_recv().is_err());
        handle.plug_cable(&name("eth0"), false).await.unwrap();
        assert_eq!(bell.try_recv(), Ok(Changed));
        assert!(!kernel.network().await.unwrap().links[&name("xenbr0")].carrier);
        for link in ["eth1", "eth2", "eth3"] {
            handle.change_from_outside(up(link)).await.unwrap();
        }
        assert_eq!((bell.try_recv(), bell.try_recv().ok()), (Ok(Changed), None), "it melts");
    }

    #[tokio::test(start_paused = true)]
    async fn the_network_outlives_who_changed_it_and_a_reboot_ends_what_the_host_does_not_configure_itself() {
        let (handle, kernel) = kernel();
        let fresh = kernel.network().await.unwrap();
        kernel.change(&Change::SetController { link: name("eth0"), controller: None }).await.unwrap();
        kernel.change(&Change::Delete { link: name("xenbr0") }).await.unwrap();
        let next = SimKernel::new(handle.another_client(), Duration::from_secs(1));
        handle.leave();
        assert!(kernel.network().await.is_err(), "a process that is gone asks no more");
        assert!(!next.network().await.unwrap().links.contains_key(&name("xenbr0")));
        let mut bell = next.observe();
        next.ask(Request::HostReboot).await.unwrap();
        bell.recv().await.unwrap();
        assert_eq!(next.network().await.unwrap(), fresh);
    }

    #[tokio::test(start_paused = true)]
    async fn owners_facts_and_silence_are_as_a_test_sets_them() {
        let (handle, kernel) = kernel();
        handle.set_link_owner(&name("eth1"), Some(Owner::Networkd)).await.unwrap();
        assert_eq!(kernel.owners().await.unwrap(), [(name("eth1"), Owner::Networkd)].into());
        handle.set_link_owner(&name("eth1"), None).await.unwrap();
        assert!(kernel.owners().await.unwrap().is_empty());
        let facts = LinkFacts { wake_on: Some("g".to_owned()), ..LinkFacts::default() };
        handle.set_link_facts(&name("eth2"), facts.clone()).await.unwrap();
        assert_eq!(kernel.facts(&name("eth2")).await, Ok(facts));
        assert_eq!(kernel.facts(&name("eth0")).await.unwrap().speed_mbps, Some(10_000));
        let gateway = "192.0.2.1".parse().unwrap();
        assert_eq!(kernel.reaches(gateway).await, Ok(true));
        let state = |all: Vec<Neighbour>| (all.len(), all[0].ip, all[0].mac.is_some(), all[0].state);
        assert_eq!(state(kernel.neighbours().await.unwrap()), (1, gateway, true, NeighbourState::Reachable));
        handle.set_silent(gateway, true).await.unwrap();
        assert_eq!(state(kernel.neighbours().await.unwrap()), (1, gateway, false, NeighbourState::Failed));
        assert_eq!(kernel.reaches("203.0.113.5".parse().unwrap()).await, Ok(false));
        assert_eq!(kernel.reaches("192.0.2.77".parse().unwrap()).await, Ok(true));
    }
}
