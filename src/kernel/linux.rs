//! The real kernel, asked by getifaddrs(3): which links there are, whether they are up, their addresses; and by
//! /proc/net/dev (proc_pid_net(5)), whose counters have 64 bits: what has passed through them.
//!
//! One call is one dump of the kernel's tables and does not wait for anything, but it is a system call all the
//! same and runs on the blocking pool.

use super::{Kernel, KernelError, Link, LinkTraffic};
use crate::model::Bytes;
use async_trait::async_trait;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;
use std::collections::BTreeMap;
use std::io::Read;
use std::net::IpAddr;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(10);
/// Links told at most.
const MAX_LINKS: usize = 4096;
/// A line of /proc/net/dev has some 130 bytes.
const MAX_DEV_BYTES: u64 = 1024 * 1024;

/// The kernel of the network namespace we run in.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinuxKernel;

impl LinuxKernel {
    pub fn new() -> Self {
        Self
    }
}

#[async_trait]
impl Kernel for LinuxKernel {
    async fn links(&self) -> Result<Vec<Link>, KernelError> {
        ask(|| {
            let addresses = getifaddrs().map_err(|errno| KernelError(errno.desc().to_owned()))?;
            Ok(gather(addresses))
        })
        .await
    }

    async fn traffic(&self) -> Result<Vec<LinkTraffic>, KernelError> {
        ask(|| {
            let mut text = String::new();
            let read = std::fs::File::open("/proc/net/dev")
                .and_then(|file| file.take(MAX_DEV_BYTES).read_to_string(&mut text));
            read.map_err(|error| KernelError(error.to_string()))?;
            Ok(traffic(&text))
        })
        .await
    }
}

async fn ask<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KernelError> + Send + 'static,
) -> Result<T, KernelError> {
    match tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(told)) => told,
        Ok(Err(error)) => Err(KernelError(error.to_string())),
        Err(_) => Err(KernelError("no answer in time".to_owned())),
    }
}

/// `vif2.0: 5871 80 0 0 0 0 0 0 9567 78 …`: bytes received first, bytes sent ninth. The headings have no colon.
fn traffic(text: &str) -> Vec<LinkTraffic> {
    let line = |line: &str| {
        let (name, counters) = line.rsplit_once(':')?;
        let mut counters = counters.split_ascii_whitespace();
        let (received, sent) = (counters.next()?.parse().ok()?, counters.nth(7)?.parse().ok()?);
        Some(LinkTraffic { name: name.trim().to_owned(), received: Bytes(received), sent: Bytes(sent) })
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
    fn bytes_stand_first_and_ninth_behind_the_name() {
        let text = "Inter-|   Receive            |  Transmit\n face |bytes    packets errs\n\
            \x20   lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0\n\
            vif2.0:99999999999 80    0    0    0     0          0         0     9567      78    0    0    0     0       0          0\n\
            broken: 1 2\n";
        let told = traffic(text);
        let told: Vec<_> =
            told.iter().map(|link| (link.name.as_str(), link.received.0, link.sent.0)).collect();
        assert_eq!(told, [("lo", 0, 0), ("vif2.0", 99_999_999_999, 9567)]);
    }
}
