//! What passes through the world's links and disks: made-up figures that grow while a guest runs, and stand still
//! when it does.

use super::domain::Domain;
use super::{DiskTraffic, LinkCounters, World};
use crate::model::Timestamp;
use std::collections::BTreeMap;

/// Bytes a millisecond that the host's own links receive and send.
const HOST_RATE: (u64, u64) = (48, 32);
/// Bytes a millisecond that the host receives from a running guest, and sends it, by each vif.
const GUEST_RATE: (u64, u64) = (8, 16);
/// A running guest reads a block by each disk so often, and writes one.
const MS_PER_READ: u64 = 10;
const MS_PER_WRITE: u64 = 20;
const BLOCK_BYTES: u64 = 4096;
/// What is in a packet, and how many pass for each that is dropped.
const PACKET_BYTES: u64 = 512;
const PACKETS_PER_DROP: u64 = 10_000;

impl World {
    pub(super) fn link_traffic(&self, now: Timestamp) -> BTreeMap<String, LinkCounters> {
        let rate = |ms: u64, (received, sent): (u64, u64)| {
            counters(ms.saturating_mul(received), ms.saturating_mul(sent))
        };
        let up_ms = now.0.saturating_sub(self.started.0);
        let of_link = |name: &str| match self.domain_of_vif(name) {
            Some(domain) => rate(domain.ran_ms(now), GUEST_RATE),
            None if name == "lo" => LinkCounters::default(),
            None => rate(up_ms, HOST_RATE),
        };
        self.links().into_iter().map(|link| (link.name.clone(), of_link(&link.name))).collect()
    }

    /// The domain of a `vifDOMID.N`.
    fn domain_of_vif(&self, name: &str) -> Option<&Domain> {
        self.domains.get(&name.strip_prefix("vif")?.split('.').next()?.parse().ok()?)
    }

    /// Of a domain that is not there: nothing.
    pub(super) fn disk_traffic(&self, domid: u32, now: Timestamp) -> DiskTraffic {
        let Some(domain) = self.domains.get(&domid) else { return DiskTraffic::default() };
        let disks = u64::try_from(domain.spec.disks.len()).unwrap_or(u64::MAX);
        of_one_disk(domain.ran_ms(now)).times(disks)
    }
}

/// What each disk of something has done that ran for so long.
pub(super) fn of_one_disk(ran_ms: u64) -> DiskTraffic {
    let (reads, writes) = (ran_ms / MS_PER_READ, ran_ms / MS_PER_WRITE);
    let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_BYTES);
    DiskTraffic { read_bytes: bytes(reads), written_bytes: bytes(writes), reads, writes }
}

fn counters(received: u64, sent: u64) -> LinkCounters {
    let (received_packets, sent_packets) = (received.div_ceil(PACKET_BYTES), sent.div_ceil(PACKET_BYTES));
    LinkCounters {
        received_bytes: received,
        sent_bytes: sent,
        received_packets,
        sent_packets,
        receive_drops: received_packets / PACKETS_PER_DROP,
        ..LinkCounters::default()
    }
}
