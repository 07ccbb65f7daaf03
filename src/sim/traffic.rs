//! What passes through the world's links and disks: made-up figures that grow while a guest runs, and stand still
//! when it does.

use super::domain::Domain;
use super::{DiskTraffic, World};
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

impl World {
    pub(super) fn link_traffic(&self, now: Timestamp) -> BTreeMap<String, (u64, u64)> {
        let rate =
            |ms: u64, (received, sent): (u64, u64)| (ms.saturating_mul(received), ms.saturating_mul(sent));
        let up_ms = now.0.saturating_sub(self.started.0);
        let of_link = |name: &str| match self.domain_of_vif(name) {
            Some(domain) => rate(domain.ran_ms(now), GUEST_RATE),
            None if name == "lo" => (0, 0),
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
        let times = |ms_each: u64| (domain.ran_ms(now) / ms_each).saturating_mul(disks);
        let (reads, writes) = (times(MS_PER_READ), times(MS_PER_WRITE));
        let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_BYTES);
        DiskTraffic { read_bytes: bytes(reads), written_bytes: bytes(writes), reads, writes }
    }
}
