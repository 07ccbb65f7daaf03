//! What domains' disks have done, as the kernel's back-end (xen-blkback) counts it:
//! `/sys/bus/xen-backend/devices/vbd-<domid>-<device>/statistics`. A disk that QEMU serves is not counted there.

use super::file::{below, read_number};
use crate::machine::{DiskTraffic, MachineError, Result, VbdFigures};
use crate::model::Bytes;
use std::io::ErrorKind;
use std::path::Path;

pub const DEVICES: &str = "/sys/bus/xen-backend/devices";
/// What blkback counts in, whatever the disk's own sectors.
pub const SECTOR_BYTES: u64 = 512;
/// Back-ends of one host that are looked through, disks of all domains that are told, and of one that are counted.
const MAX_DEVICES: usize = 65_536;
pub const MAX_DISKS: usize = 8192;
const MAX_DISKS_OF_ONE: usize = 1024;

/// Of one domain, all together.
pub fn traffic(root: &Path, domid: u32) -> Result<DiskTraffic> {
    let mut sum = DiskTraffic::default();
    for disk in each(root, MAX_DISKS_OF_ONE, |of| of == domid)? {
        sum.read = Bytes(sum.read.0.saturating_add(disk.traffic.read.0));
        sum.written = Bytes(sum.written.0.saturating_add(disk.traffic.written.0));
        sum.reads = sum.reads.saturating_add(disk.traffic.reads);
        sum.writes = sum.writes.saturating_add(disk.traffic.writes);
    }
    Ok(sum)
}

/// Of all domains, each disk by itself, by domid and device.
pub fn all(root: &Path) -> Result<Vec<VbdFigures>> {
    let mut all = each(root, MAX_DISKS, |_| true)?;
    all.sort_by_key(|disk| (disk.domid, disk.device));
    Ok(all)
}

fn each(root: &Path, max: usize, wanted: impl Fn(u32) -> bool) -> Result<Vec<VbdFigures>> {
    let folder = below(root, DEVICES);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        // No Xen, or no back-end ever.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(MachineError::Failed(format!("{DEVICES}: {error}"))),
    };
    let names = entries.take(MAX_DEVICES).flatten().map(|entry| entry.file_name());
    let disks = names.filter_map(|name| {
        let (domid, device) = numbers(name.to_str()?).filter(|(domid, _)| wanted(*domid))?;
        // A disk that goes meanwhile is gone.
        let traffic = read(&folder.join(&name).join("statistics"))?;
        Some(VbdFigures { domid, device, traffic })
    });
    Ok(disks.take(max).collect())
}

/// `vbd-3-51712`
fn numbers(name: &str) -> Option<(u32, u32)> {
    let (domid, device) = name.strip_prefix("vbd-")?.split_once('-')?;
    let plain = |text: &str| text.bytes().all(|c| c.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    Some((plain(domid)?, plain(device)?))
}

fn read(statistics: &Path) -> Option<DiskTraffic> {
    let count = |what: &str| read_number(&statistics.join(what));
    let bytes = |what: &str| Some(Bytes(count(what)?.saturating_mul(SECTOR_BYTES)));
    Some(DiskTraffic {
        read: bytes("rd_sect")?,
        written: bytes("wr_sect")?,
        reads: count("rd_req")?,
        writes: count("wr_req")?,
    })
}
