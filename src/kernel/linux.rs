//! The real kernel, asked by getifaddrs(3): which links there are, whether they are up, their addresses.
//!
//! One call is one dump of the kernel's tables and does not wait for anything, but it is a system call all the
//! same and runs on the blocking pool.

use super::{Kernel, KernelError, Link};
use async_trait::async_trait;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(10);
/// Links told at most.
const MAX_LINKS: usize = 4096;

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
        let asked = tokio::task::spawn_blocking(|| {
            let addresses = getifaddrs().map_err(|errno| KernelError(errno.desc().to_owned()))?;
            Ok(gather(addresses))
        });
        match tokio::time::timeout(DEADLINE, asked).await {
            Ok(Ok(told)) => told,
            Ok(Err(error)) => Err(KernelError(error.to_string())),
            Err(_) => Err(KernelError("no answer in time".to_owned())),
        }
    }
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
}
