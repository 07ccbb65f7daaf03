//! What domains' disks have done, as the kernel's back-end (xen-blkback) counts it:
//! `/sys/bus/xen-backend/devices/vbd-<domid>-<device>/statistics`. A disk that QEMU serves is not counted there.

use super::file::{below, read_value};
use crate::machine::{DiskTraffic, MachineError, Result};
use crate::model::Bytes;
use std::io::ErrorKind;
use std::path::Path;

const DEVICES: &str = "/sys/bus/xen-backend/devices";
/// What blkback counts in, whatever the disk's own sectors.
const SECTOR_BYTES: u64 = 512;
/// Back-ends of one host that are looked through, and disks of one domain that are counted.
const MAX_DEVICES: usize = 65_536;
const MAX_DISKS: usize = 1024;

pub fn traffic(root: &Path, domid: u32) -> Result<DiskTraffic> {
    let entries = match std::fs::read_dir(below(root, DEVICES)) {
        Ok(entries) => entries,
        // No Xen, or no back-end ever.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(DiskTraffic::default()),
        Err(error) => return Err(MachineError::Failed(format!("{DEVICES}: {error}"))),
    };
    let prefix = format!("vbd-{domid}-");
    let names = entries.take(MAX_DEVICES).flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut sum = DiskTraffic::default();
    for name in names.filter(|name| name.starts_with(&prefix)).take(MAX_DISKS) {
        // A disk that goes meanwhile counts nothing.
        let count = |what: &str| -> u64 {
            read_value(root, &format!("{DEVICES}/{name}/statistics/{what}")).parse().unwrap_or(0)
        };
        let bytes = |what: &str| count(what).saturating_mul(SECTOR_BYTES);
        sum.read = Bytes(sum.read.0.saturating_add(bytes("rd_sect")));
        sum.written = Bytes(sum.written.0.saturating_add(bytes("wr_sect")));
        sum.reads = sum.reads.saturating_add(count("rd_req"));
        sum.writes = sum.writes.saturating_add(count("wr_req"));
    }
    Ok(sum)
}
