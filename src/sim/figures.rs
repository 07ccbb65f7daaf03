//! Figures of the made-up machine: its memory and CPUs, dom0's, and what XenStore holds of its guests' memory. They add
//! up: what is given to domains and what is free is all there is, and the CPUs were busy for as long as dom0 and all
//! domains, those that went too, have used them.

use super::domain::Domain;
use super::traffic::of_one_disk;
use super::{Answer, Result, World, WorldError};
use crate::model::{KiB, MiB, Timestamp, VmId};
use serde::{Deserialize, Serialize};

/// Of each of dom0's CPUs, this part of what it used it wanted beside that, and Xen ran others.
const STEAL_DIVISOR: u64 = 16;
const NS_PER_MS: u64 = 1_000_000;
/// The host's own disks.
const HOST_DISKS: [&str; 2] = ["sda", "sdb"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorView {
    pub total_memory: MiB,
    pub free_memory: MiB,
    pub cpus: u32,
}

/// What a disk, or a domain's disks together, have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskTraffic {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

impl DiskTraffic {
    pub(super) fn times(self, n: u64) -> Self {
        Self {
            read_bytes: self.read_bytes.saturating_mul(n),
            written_bytes: self.written_bytes.saturating_mul(n),
            reads: self.reads.saturating_mul(n),
            writes: self.writes.saturating_mul(n),
        }
    }
}

/// What has passed through a link, as the host sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LinkCounters {
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub received_packets: u64,
    pub sent_packets: u64,
    pub receive_errors: u64,
    pub send_errors: u64,
    pub receive_drops: u64,
    pub send_drops: u64,
}

/// The machine's memory and CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageView {
    pub total_memory: KiB,
    pub free_memory: KiB,
    /// Since the machine is up.
    pub up_ns: u64,
    /// Of each CPU.
    pub idle_ns: Vec<u64>,
    /// What each domain has, dom0 first.
    pub domains: Vec<(u32, KiB)>,
}

/// What XenStore holds about a domain's memory. The last two are the guest's to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    pub domid: u32,
    pub target: Option<KiB>,
    pub max: Option<KiB>,
    pub total: Option<Vec<u8>>,
    pub free: Option<Vec<u8>>,
}

/// A disk of a domain that the kernel of dom0 serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vbd {
    pub domid: u32,
    /// Xen's number for it: 51712 is `xvda`.
    pub device: u32,
    pub traffic: DiskTraffic,
}

/// What dom0's kernel tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFigures {
    /// Busy and stolen nanoseconds of each of dom0's CPUs.
    pub cpus: Vec<(u64, u64)>,
    pub load: [f64; 3],
    pub memory_total: KiB,
    pub memory_available: KiB,
    pub disks: Vec<(String, DiskTraffic)>,
    pub vbds: Vec<Vbd>,
}

/// What must not be forgotten for the figures to add up.
#[derive(Debug, Default)]
pub(super) struct Spent {
    /// CPU time that domains used which have gone.
    gone_ns: u64,
    /// What each CPU idled, as last told: it never gets less.
    idle_ns: u64,
}

impl Spent {
    pub(super) fn by_one_that_goes(&mut self, domain: &Domain, now: Timestamp) {
        self.gone_ns = self.gone_ns.saturating_add(domain.used_here_ns(now));
    }
}

impl World {
    pub(super) fn usage(&mut self, now: Timestamp) -> UsageView {
        let cpus = u64::from(self.options.cpus.max(1));
        let up_ns = now.0.saturating_sub(self.started.0).saturating_mul(NS_PER_MS);
        let dom0 = self.dom0(now);
        let by_domains = self.domains.values().map(|d| d.used_here_ns(now));
        let busy_ns =
            by_domains.fold(dom0.cpu_time_ns.saturating_add(self.spent.gone_ns), u64::saturating_add);
        // All CPUs share the work alike; more work than there are CPUs leaves no time to idle.
        let idle_ns = up_ns.saturating_mul(cpus).saturating_sub(busy_ns) / cpus;
        self.spent.idle_ns = self.spent.idle_ns.max(idle_ns);
        let domains = self.domains.values().map(|d| (d.domid, KiB::from(d.spec.memory)));
        UsageView {
            total_memory: KiB::from(self.options.memory),
            free_memory: KiB::from(self.free_memory()),
            up_ns,
            idle_ns: vec![self.spent.idle_ns; self.options.cpus as usize],
            domains: std::iter::once((0, dom0.memory)).chain(domains).collect(),
        }
    }

    pub(super) fn guest_memory(&self, domids: &[u32], now: Timestamp) -> Vec<GuestMemory> {
        domids.iter().map(|domid| self.memory_of(*domid, now)).collect()
    }

    fn memory_of(&self, domid: u32, now: Timestamp) -> GuestMemory {
        let mut told = GuestMemory { domid, target: None, max: None, total: None, free: None };
        if domid == 0 {
            let memory = Some(KiB::from(self.dom0_memory()));
            (told.target, told.max) = (memory, memory);
        } else if let Some(domain) = self.domains.get(&domid) {
            told.target = Some(KiB::from(domain.spec.memory));
            told.max = Some(KiB::from(domain.spec.max_memory));
            told.total = domain.written("data/meminfo_total", now);
            told.free = domain.written("data/meminfo_free", now);
        }
        told
    }

    pub(super) fn guest_writes(&mut self, vm: VmId, key: String, value: Vec<u8>) -> Result<Answer> {
        let domid = self.find(vm).ok_or(WorldError::NoSuchDomain)?.domid;
        self.domain_mut(domid)?.write(key, value).map(|()| Answer::Done)
    }

    pub(super) fn host_figures(&self, now: Timestamp) -> HostFigures {
        let dom0 = self.dom0(now);
        let busy_ns = dom0.cpu_time_ns / u64::from(self.options.cpus.max(1));
        let busy_part = f64::from(u32::try_from(self.domains.len()).unwrap_or(u32::MAX)) / 1000.0;
        let up_ms = now.0.saturating_sub(self.started.0);
        HostFigures {
            cpus: vec![(busy_ns, busy_ns / STEAL_DIVISOR); self.options.cpus as usize],
            load: [0.2 + busy_part, 0.1 + busy_part, 0.1 + busy_part / 2.0],
            memory_total: dom0.memory,
            memory_available: KiB(dom0.memory.0 / 2),
            disks: HOST_DISKS.iter().map(|name| ((*name).to_owned(), of_one_disk(up_ms))).collect(),
            vbds: self.domains.values().flat_map(|domain| vbds(domain, now)).collect(),
        }
    }
}

fn vbds(domain: &Domain, now: Timestamp) -> impl Iterator<Item = Vbd> {
    let traffic = of_one_disk(domain.ran_ms(now));
    let devices = domain.spec.disks.iter().filter_map(|disk| device_number(&disk.key));
    devices.map(move |device| Vbd { domid: domain.domid, device, traffic })
}

/// Xen's number for a disk of this name, as xen-blkfront and the drivers before it count.
fn device_number(name: &str) -> Option<u32> {
    let (kind, letter) = name.split_at_checked(name.len().checked_sub(1)?)?;
    let place = u32::from(letter.bytes().next()?.checked_sub(b'a').filter(|place| *place < 26)?);
    let major = |major: u32, minor: u32| (major << 8) | minor;
    match kind {
        // From the 17th on, numbers of another form.
        "xvd" if place < 16 => Some(major(202, place << 4)),
        "xvd" => Some((1 << 28) | (place << 8)),
        "sd" if place < 16 => Some(major(8, place << 4)),
        "hd" if place < 2 => Some(major(3, place << 6)),
        "hd" if place < 4 => Some(major(22, (place - 2) << 6)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_the_numbers_that_xen_gives_them() {
        let numbers = ["xvda", "xvdb", "xvdq", "sda", "hda", "hdb", "hdc"].map(device_number);
        assert_eq!(numbers, [51712, 51728, (1 << 28) | (16 << 8), 2048, 768, 832, 5632].map(Some));
        assert_eq!(["", "a", "xvd1", "hde", "nvme0n1"].map(device_number), [None; 5]);
    }
}
