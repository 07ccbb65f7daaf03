//! Mounted file systems with a device of their own.
//!
//! The sizes of network and cluster file systems are not asked: `statvfs` on a dead server or a lost lock
//! never returns. They are told with size and free 0.

use super::file::{self, below};
use crate::machine::{Filesystem, MachineError, Result};
use crate::model::Bytes;
use nix::sys::statvfs::statvfs;
use std::path::Path;

const MAX_MOUNTINFO_BYTES: usize = 1024 * 1024;
const MAX_FILESYSTEMS: usize = 1024;

/// Types whose answer depends on another machine, or on a process that may be stuck.
const REMOTE: [&str; 14] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "lustre",
    "gfs2",
    "ocfs2",
    "virtiofs",
    "glusterfs",
    "orangefs",
];

/// One line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: String,
    kind: String,
    source: String,
}

pub fn list(root: &Path) -> Result<Vec<Filesystem>> {
    let text = file::read_text_of(&below(root, "/proc/self/mountinfo"), MAX_MOUNTINFO_BYTES)
        .ok_or_else(|| MachineError::Failed("/proc/self/mountinfo cannot be read".to_owned()))?;
    let mut mounts = mounts(&text);
    mounts.sort_by(|a, b| a.point.cmp(&b.point));
    mounts.truncate(MAX_FILESYSTEMS);
    Ok(mounts.into_iter().map(|mount| measure(root, mount)).collect())
}

fn mounts(text: &str) -> Vec<Mount> {
    let mut mounts: Vec<Mount> = Vec::new();
    for mount in text.lines().filter_map(parse).filter(worth_telling) {
        // What is mounted later on the same point hides what was there.
        mounts.retain(|earlier| earlier.point != mount.point);
        mounts.push(mount);
    }
    mounts
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`: point, type and source stand at a fixed
/// place before or after the lone dash.
fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let point = before.split(' ').nth(4)?;
    let mut after = after.split(' ');
    let (kind, source) = (after.next()?, after.next()?);
    Some(Mount { point: unescape(point), kind: kind.to_owned(), source: unescape(source) })
}

fn worth_telling(mount: &Mount) -> bool {
    mount.point == "/" || mount.source.starts_with("/dev/") || mount.kind == "zfs" || is_remote(&mount.kind)
}

fn is_remote(kind: &str) -> bool {
    REMOTE.contains(&kind) || kind.starts_with("fuse")
}

/// Blank, tab, newline and backslash stand as `\040` and so on.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            // A control character in a path reaches no answer.
            Some(byte) if byte.is_ascii() => {
                plain.push(if byte.is_ascii_control() { '?' } else { char::from(byte) });
                rest = &rest[at + 4..];
            }
            _ => {
                plain.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    plain.push_str(rest);
    plain
}

fn measure(root: &Path, mount: Mount) -> Filesystem {
    let known = if is_remote(&mount.kind) { None } else { statvfs(&below(root, &mount.point)).ok() };
    // The C library's types differ between architectures.
    #[allow(clippy::useless_conversion)]
    let (size, free) = known.map_or((0, 0), |stat| {
        let unit = u64::from(stat.fragment_size());
        let bytes = |blocks: u64| blocks.saturating_mul(unit);
        (bytes(u64::from(stat.blocks())), bytes(u64::from(stat.blocks_available())))
    });
    Filesystem {
        mount_point: mount.point,
        device: mount.source,
        kind: mount.kind,
        size: Bytes(size),
        free: Bytes(free),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_systems_with_a_device_are_told_the_last_mount_of_a_point_wins_and_the_root_is_first() {
        let text = "22 1 0:21 / /proc rw - proc proc rw\n\
                    30 1 8:3 / /var rw - ext4 /dev/sda3 rw\n\
                    23 1 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1 rw\n\
                    24 1 0:40 / /mnt/a\\040b rw - nfs4 192.0.2.1:/x rw\n\
                    25 1 8:2 / /data rw - xfs /dev/sdb rw\n\
                    26 1 8:4 / /data rw - xfs /dev/sdc rw\n\
                    broken line\n27 1 0:50 / /run rw - tmpfs tmpfs rw\n";
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("proc/self")).unwrap();
        std::fs::write(folder.path().join("proc/self/mountinfo"), text).unwrap();
        let told = list(folder.path()).unwrap();
        let points: Vec<_> = told.iter().map(|f| (f.mount_point.as_str(), f.device.as_str())).collect();
        assert_eq!(
            points,
            [("/", "/dev/sda1"), ("/data", "/dev/sdc"), ("/mnt/a b", "192.0.2.1:/x"), ("/var", "/dev/sda3")]
        );
        assert!(told[0].size.0 > 0);
    }

    #[test]
    fn a_network_file_system_is_told_without_asking_it_for_its_size() {
        // The root exists and would have a size; its type alone keeps us from asking.
        for kind in ["nfs", "nfs4", "cifs", "fuse.glusterfs", "ocfs2"] {
            let mount = Mount { point: "/".into(), kind: kind.into(), source: "server:/x".into() };
            assert_eq!(measure(Path::new("/"), mount).size, Bytes(0), "{kind}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_for_mountinfo_is_taken_without_a_panic(text in ".{0,400}") {
            mounts(&text);
            unescape(&text);
        }
    }
}
