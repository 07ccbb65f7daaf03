//! The real kernel. By getifaddrs(3): which links there are, whether they are up, their addresses; by /proc/net/dev
//! (proc_pid_net(5)), whose counters have 64 bits: what has passed through them; by `netlink` everything that plans are
//! about, and the changes; by `sysfs` and `ethtool` what hardware tells; by `owners` whose a link is.
//!
//! What is read from files or by system calls of one answer does not wait for anything, but it is a system call all the same
//! and runs on the blocking pool.

use super::dhcp::Dhcp;
use super::netlink::{Counts, DEADLINE, Netlink, RECEIVE_BUFFER, ring_on_notices};
use super::owners::Files;
use super::place::Place;
use super::{
    Changed, Figures, Kernel, KernelError, Link, LinkFacts, LinkTraffic, Stopped, echo, ethtool, sysfs,
};
use crate::model::network::{Change, Neighbour, NetworkView, Owner, Refused};
use crate::model::{Bytes, IfName};
use async_trait::async_trait;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::{InterfaceFlags, if_nameindex};
use nix::sys::socket::SockaddrStorage;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};

/// Links told at most.
const MAX_LINKS: usize = 4096;
/// A line of /proc/net/dev has some 130 bytes.
const MAX_DEV_BYTES: u64 = 1024 * 1024;
/// Not /proc/net, which shows the namespace of the process's first thread.
const DEV: &str = "/proc/thread-self/net/dev";
const SYSFS: &str = "/sys/class/net";

/// The kernel of one network namespace: that which we run in, or another one. Clones share the sockets.
#[derive(Debug, Clone)]
pub struct LinuxKernel {
    place: Place,
    netlink: Arc<Netlink>,
    /// What all its bells have heard.
    heard: Arc<Counts>,
    dhcp: Dhcp,
    /// One reading of traffic at a time: it is asked for again and again, and one that hangs must not take the threads of
    /// all else.
    sampling: Arc<Semaphore>,
}

impl Default for LinuxKernel {
    fn default() -> Self {
        Self::of(Place::default())
    }
}

impl LinuxKernel {
    pub fn new() -> Self {
        Self::default()
    }

    /// Of the namespace that is mounted at this path (`/run/netns/NAME`, `/proc/PID/ns/net`).
    pub fn in_namespace(path: &Path) -> io::Result<Self> {
        Ok(Self::of(Place::at(path)?))
    }

    /// Of the namespace behind this descriptor.
    pub fn in_namespace_of(namespace: OwnedFd) -> Self {
        Self::of(Place::Other(Arc::new(namespace)))
    }

    fn of(place: Place) -> Self {
        Self {
            netlink: Arc::new(Netlink::new(place.clone())),
            place,
            heard: Arc::default(),
            dhcp: Dhcp::default(),
            sampling: Arc::new(Semaphore::new(1)),
        }
    }

    /// With DHCP clients of other folders, and notes about them elsewhere.
    #[must_use]
    pub fn with_dhcp(self, dhcp: Dhcp) -> Self {
        Self { dhcp, ..self }
    }

    async fn set_dhcp(&self, link: &IfName, on: bool) -> Result<(), KernelError> {
        let done = if on {
            let (dhcp, place, link) = (self.dhcp.clone(), self.place.clone(), link.clone());
            let started = tokio::task::spawn_blocking(move || dhcp.on(&place, &link)).await;
            started.map_err(|error| KernelError::Unanswered(error.to_string()))?
        } else {
            self.dhcp.off(link).await
        };
        done.map_err(|error| KernelError::Refused(Refused::Other(error.to_string())))
    }

    /// Does this in the handle's namespace, off the runtime's threads.
    async fn within<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, KernelError> {
        let place = self.place.clone();
        let done = tokio::task::spawn_blocking(move || place.within(work));
        match tokio::time::timeout(DEADLINE, done).await {
            Ok(Ok(told)) => told.map_err(|error| KernelError::Unanswered(error.to_string())),
            Ok(Err(error)) => Err(KernelError::Unanswered(error.to_string())),
            Err(_) => Err(KernelError::Unanswered("no answer in time".to_owned())),
        }
    }

    /// The same, one at a time. The permit goes with the work, not with who waits for it.
    async fn within_turn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, KernelError> {
        let busy = || KernelError::Unanswered("the reading before has not ended".to_owned());
        let turn = tokio::time::timeout(DEADLINE, Arc::clone(&self.sampling).acquire_owned()).await;
        let turn = turn.map_err(|_| busy())?.map_err(|_| busy())?;
        self.within(move || {
            let _turn = turn;
            work()
        })
        .await
    }

    fn observe_with(&self, buffer: usize, counts: Arc<Counts>) -> mpsc::Receiver<Changed> {
        let (bell, heard) = mpsc::channel(1);
        ring_on_notices(&self.place, bell, buffer, counts);
        heard
    }
}

#[async_trait]
impl Kernel for LinuxKernel {
    async fn links(&self) -> Result<Vec<Link>, KernelError> {
        self.within(|| Ok(gather(getifaddrs()?))).await
    }

    async fn traffic(&self) -> Result<Vec<LinkTraffic>, KernelError> {
        self.within_turn(|| {
            let mut text = String::new();
            std::fs::File::open(DEV)?.take(MAX_DEV_BYTES).read_to_string(&mut text)?;
            Ok(traffic(&text))
        })
        .await
    }

    async fn network(&self) -> Result<NetworkView, KernelError> {
        let mut view = self.netlink.network().await?;
        let dhcp = self.dhcp.clone();
        let served = tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(move || dhcp.served())).await;
        let served = served.map_err(|_| KernelError::Unanswered("no answer in time".to_owned()))?;
        for link in served.map_err(|error| KernelError::Unanswered(error.to_string()))? {
            if let Some(link) = view.links.get_mut(&link) {
                link.dhcp = true;
            }
        }
        Ok(view)
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, KernelError> {
        self.netlink.neighbours().await
    }

    /// Of a link in another namespace only what its driver tells: sysfs shows the namespace it was mounted in.
    async fn facts(&self, link: &IfName) -> Result<LinkFacts, KernelError> {
        let (link, is_own) = (link.clone(), self.place.is_own());
        let told = self.within(move || {
            if nix::net::if_::if_nametoindex(link.as_str()).is_err() {
                return Ok(None);
            }
            let found = if is_own { sysfs::facts(Path::new(SYSFS), &link) } else { None };
            let mut facts = found.unwrap_or_default();
            ethtool::add_to(&mut facts, &link)?;
            Ok(Some(facts))
        });
        told.await?.ok_or(KernelError::Refused(Refused::NoSuchLink))
    }

    /// The services of the host configure the host's own namespace.
    async fn owners(&self) -> Result<BTreeMap<IfName, Owner>, KernelError> {
        if !self.place.is_own() {
            return Ok(BTreeMap::new());
        }
        self.within(|| {
            let all = if_nameindex()?;
            let named = |link: &nix::net::if_::Interface| {
                Some((link.index(), IfName::parse(link.name().to_str().ok()?).ok()?))
            };
            Ok(Files::default().owners(&all.iter().take(MAX_LINKS).filter_map(named).collect()))
        })
        .await
    }

    async fn change(&self, change: &Change) -> Result<(), KernelError> {
        self.change_all(std::slice::from_ref(change)).await.map_err(|stopped| stopped.error)
    }

    async fn change_all(&self, changes: &[Change]) -> Result<(), Stopped> {
        let mut before = 0;
        for part in changes.split_inclusive(|change| after_it(change).is_some()) {
            let stopped = |stopped: Stopped| Stopped { done: before + stopped.done, ..stopped };
            self.netlink.change(part.to_vec()).await.map_err(stopped)?;
            before += part.len();
            if let Some((link, on)) = part.last().and_then(after_it) {
                let done = self.set_dhcp(link, on).await;
                done.map_err(|error| Stopped { done: before - 1, error })?;
            }
        }
        Ok(())
    }

    async fn reaches(&self, address: IpAddr) -> Result<bool, KernelError> {
        self.netlink.reaches(address).await
    }

    async fn connects(&self, address: SocketAddr, patience: Duration) -> bool {
        match self.within(move || echo::connection_to(address)).await {
            Ok(socket) => echo::connects(socket, address, patience).await,
            Err(_) => false,
        }
    }

    async fn ping(&self, address: IpAddr) -> bool {
        match self.within(move || echo::echo_to(address)).await {
            Ok(socket) => echo::ping(socket, address).await,
            Err(_) => false,
        }
    }

    fn observe(&self) -> mpsc::Receiver<Changed> {
        self.observe_with(RECEIVE_BUFFER, Arc::clone(&self.heard))
    }

    fn figures(&self) -> Option<Figures> {
        let (messages, failures) = self.netlink.counts();
        let (notices, overruns) =
            (self.heard.notices.load(Ordering::Relaxed), self.heard.overruns.load(Ordering::Relaxed));
        Some(Figures { messages, failures, notices, overruns })
    }
}

/// What a change asks of the DHCP client, once the kernel has done it.
fn after_it(change: &Change) -> Option<(&IfName, bool)> {
    match change {
        Change::SetDhcp { link, on } => Some((link, *on)),
        // What served it has nothing to serve any more.
        Change::Delete { link } => Some((link, false)),
        _ => None,
    }
}

/// `vif2.0: 5871 80 0 0 0 0 0 0 9567 78 …`: bytes, packets, errors and drops received first, sent from the ninth on. The
/// headings have no colon.
fn traffic(text: &str) -> Vec<LinkTraffic> {
    let line = |line: &str| {
        let (name, counters) = line.rsplit_once(':')?;
        let mut counters = counters.split_ascii_whitespace();
        let mut next = |passed_over: usize| counters.nth(passed_over)?.parse().ok();
        let received = [next(0)?, next(0)?, next(0)?, next(0)?];
        let sent = [next(4)?, next(0)?, next(0)?, next(0)?];
        Some(LinkTraffic {
            name: name.trim().to_owned(),
            received: Bytes(received[0]),
            sent: Bytes(sent[0]),
            received_packets: received[1],
            sent_packets: sent[1],
            receive_errors: received[2],
            send_errors: sent[2],
            receive_drops: received[3],
            send_drops: sent[3],
        })
    };
    let mut links: Vec<LinkTraffic> = text.lines().filter_map(line).take(MAX_LINKS).collect();
    links.sort_by(|a, b| a.name.cmp(&b.name));
    links
}

/// One entry comes for each link and for each of its addresses.
fn gather(entries: impl Iterator<Item = InterfaceAddress>) -> Vec<Link> {
    let mut links: BTreeMap<String, Link> = BTreeMap::new();
    for entry in entries {
        // An address with a label of its own comes under it: `eth0:1` is of the link `eth0`.
        let name = entry.interface_name.split(':').next().unwrap_or_default().to_owned();
        if !links.contains_key(&name) && links.len() == MAX_LINKS {
            continue;
        }
        let link = links.entry(name.clone()).or_insert_with(|| Link {
            name,
            mac: None,
            up: entry.flags.contains(InterfaceFlags::IFF_UP),
            loopback: entry.flags.contains(InterfaceFlags::IFF_LOOPBACK),
            addresses: Vec::new(),
        });
        if let Some(mac) = entry.address.as_ref().and_then(mac) {
            link.mac = Some(mac);
        }
        if let Some(address) = entry.address.as_ref().and_then(ip) {
            let prefix = entry.netmask.as_ref().and_then(ip).map_or_else(|| full(address), prefix_length);
            link.addresses.push((address, prefix));
        }
    }
    links.into_values().collect()
}

fn mac(address: &SockaddrStorage) -> Option<String> {
    let bytes = address.as_link_addr()?.addr()?;
    let shown: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    (bytes != [0; 6]).then(|| shown.join(":"))
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let four = address.as_sockaddr_in().map(|four| IpAddr::V4(four.ip()));
    four.or_else(|| address.as_sockaddr_in6().map(|six| IpAddr::V6(six.ip())))
}

fn full(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn prefix_length(mask: IpAddr) -> u8 {
    let ones = match mask {
        IpAddr::V4(mask) => u32::from(mask).leading_ones(),
        IpAddr::V6(mask) => u128::from(mask).leading_ones(),
    };
    u8::try_from(ones).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::network::Kind;
    use std::time::Duration;

    #[tokio::test]
    async fn the_loopback_link_is_told_with_its_address_and_without_a_mac() {
        let links = LinuxKernel::new().links().await.unwrap();
        let loopback = links.iter().find(|link| link.loopback).expect("every namespace has one");
        assert_eq!((loopback.name.as_str(), &loopback.mac), ("lo", &None));
        if loopback.up {
            assert!(loopback.addresses.contains(&(IpAddr::from([127, 0, 0, 1]), 8)), "{loopback:?}");
        }
        assert!(links.is_sorted_by(|a, b| a.name < b.name));
    }

    #[test]
    fn a_mask_counts_its_leading_ones() {
        assert_eq!(prefix_length("255.255.252.0".parse().unwrap()), 22);
        assert_eq!(prefix_length("ffff:ffff:ffff:ffff::".parse().unwrap()), 64);
        assert_eq!(prefix_length("0.0.0.0".parse().unwrap()), 0);
    }

    #[tokio::test]
    async fn every_link_has_its_traffic() {
        let names: Vec<_> =
            LinuxKernel::new().links().await.unwrap().into_iter().map(|link| link.name).collect();
        let traffic = LinuxKernel::new().traffic().await.unwrap();
        assert!(
            names.iter().all(|name| traffic.iter().any(|link| link.name == *name)),
            "{names:?} {traffic:?}"
        );
    }

    #[test]
    fn a_reading_of_traffic_that_hangs_takes_one_thread_and_leaves_the_others_to_all_else() {
        let two = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
        two.unwrap().block_on(async {
            let kernel = LinuxKernel::new();
            let (release, gate) = std::sync::mpsc::channel::<()>();
            let gate = Arc::new(std::sync::Mutex::new(gate));
            for _ in 0..2 {
                let gate = Arc::clone(&gate);
                let hanging = kernel.within_turn(move || {
                    let _ = gate.lock().map(|gate| gate.recv());
                    Ok(())
                });
                // Who asked has gone; what it asked for hangs on.
                assert!(tokio::time::timeout(Duration::from_millis(20), hanging).await.is_err());
            }
            let links = tokio::time::timeout(Duration::from_secs(10), kernel.links()).await;
            let free = links.is_ok_and(|links| links.is_ok());
            drop(release);
            assert!(free, "no thread is left");
            kernel.traffic().await.unwrap();
        });
    }

    #[test]
    fn what_was_received_stands_first_and_what_was_sent_from_the_ninth_on() {
        let text = "Inter-|   Receive            |  Transmit\n face |bytes    packets errs\n\
            \x20   lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0\n\
            vif2.0:99999999999 80    1    2    3     4          5         6     9567      78    7    8    9    10       11          12\n\
            broken: 1 2\n\
            garbled: 1 2 x 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        let told = traffic(text);
        let names: Vec<&str> = told.iter().map(|link| link.name.as_str()).collect();
        assert_eq!(names, ["lo", "vif2.0"]);
        let vif = LinkTraffic {
            name: "vif2.0".to_owned(),
            received: Bytes(99_999_999_999),
            sent: Bytes(9567),
            received_packets: 80,
            sent_packets: 78,
            receive_errors: 1,
            send_errors: 7,
            receive_drops: 2,
            send_drops: 8,
        };
        assert_eq!(told[1], vif);
    }

    /// A namespace of a test's own; its thread ends, and leaves this one where it is.
    fn fresh_namespace() -> LinuxKernel {
        let made = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run them as root");
            OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net").unwrap())
        });
        LinuxKernel::in_namespace_of(made.join().unwrap())
    }

    async fn bridge(kernel: &LinuxKernel) {
        let kind = Kind::Bridge(crate::model::network::Bridge::default());
        let made = Change::Create { link: "b0".parse().unwrap(), kind, mac: None, mtu: None };
        kernel.change(&made).await.unwrap();
    }

    /// Switched on and off so often: each is a notice, or some.
    async fn storm(kernel: &LinuxKernel, times: usize) {
        for n in 0..times {
            kernel.change(&Change::SetUp { link: "b0".parse().unwrap(), up: n % 2 == 0 }).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_storm_of_notices_leaves_one_bell_waiting() {
        let kernel = fresh_namespace();
        bridge(&kernel).await;
        let counts = Arc::new(Counts::default());
        let mut bell = kernel.observe_with(RECEIVE_BUFFER, counts.clone());
        bell.recv().await.unwrap();
        let began = tokio::time::Instant::now();
        while counts.notices.load(Ordering::Relaxed) < 17_000 {
            storm(&kernel, 100).await;
            assert!(began.elapsed() < Duration::from_secs(120), "{counts:?}");
        }
        // It waits although nobody has heard one since: of 17,000 one is left, whether some were lost or not.
        assert_eq!(bell.len(), 1);
        bell.recv().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn notices_that_the_kernel_lost_for_want_of_room_ring_too() {
        let kernel = fresh_namespace();
        bridge(&kernel).await;
        let counts = Arc::new(Counts::default());
        // The least that the kernel gives: some two notices.
        let mut bell = kernel.observe_with(1, counts.clone());
        bell.recv().await.unwrap();
        let began = tokio::time::Instant::now();
        while counts.overruns.load(Ordering::Relaxed) == 0 {
            while bell.try_recv().is_ok() {}
            storm(&kernel, 50).await;
            assert!(began.elapsed() < Duration::from_secs(120), "{counts:?}");
        }
        bell.recv().await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_ended_is_opened_anew() {
        let kernel = fresh_namespace();
        assert_eq!(kernel.network().await.unwrap().links.len(), 1);
        kernel.netlink.close().await;
        assert_eq!(kernel.network().await.unwrap().links.len(), 1);
    }

    #[tokio::test]
    async fn a_namespace_that_cannot_be_entered_is_an_error() {
        assert!(LinuxKernel::in_namespace(Path::new("/run/netns/no-such")).is_err());
        let kernel = LinuxKernel::in_namespace(Path::new("/proc/self/status")).unwrap();
        assert!(matches!(kernel.network().await, Err(KernelError::Unanswered(_))));
        assert!(matches!(kernel.links().await, Err(KernelError::Unanswered(_))));
    }
}
