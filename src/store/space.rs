//! How much room the disk has left, the reserve file, and what may still be written.
//!
//! `<dir>/reserve` holds disk space that nobody else can take. When free space falls below a mark the reserve
//! is given back to the file system and only essential transactions go on; below a second mark nothing does,
//! since the engine does not take a full disk well. When there is room for the reserve again, with a margin so
//! that the mode does not flap, it is made again.

use nix::fcntl::posix_fallocate;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// `statvfs` is asked again after so long...
const CHECK_EVERY: Duration = Duration::from_millis(100);
/// ...or so many bytes.
const CHECK_BYTES: u64 = 256 * 1024;
/// Below this, nothing is written: one group and the engine's own rewriting must fit.
const FLOOR_BYTES: u64 = 1536 * 1024;
/// Low space begins here at the latest, and at half the reserve.
const LOW_BYTES: u64 = 3 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Room {
    /// Not even essential transactions fit.
    None,
    /// Only essential transactions.
    Low,
    Enough,
}

pub(super) struct Space {
    dir: PathBuf,
    reserve: PathBuf,
    reserve_bytes: u64,
    low_bytes: u64,
    held: bool,
    room: Room,
    checked: Option<Instant>,
    written: u64,
}

impl Space {
    pub fn new(dir: &Path, reserve_mib: u64) -> Self {
        let reserve_bytes = reserve_mib.saturating_mul(1024 * 1024);
        let reserve = dir.join("reserve");
        let held = std::fs::metadata(&reserve).is_ok_and(|file| file.len() == reserve_bytes);
        Self {
            dir: dir.to_owned(),
            reserve,
            reserve_bytes,
            low_bytes: LOW_BYTES.max(reserve_bytes / 2),
            held,
            room: Room::Enough,
            checked: None,
            written: 0,
        }
    }

    /// What may be written now; looks at the disk if that is due, and takes or gives back the reserve.
    pub fn room(&mut self, about_to_write: u64) -> Room {
        self.written += about_to_write;
        let due = self.checked.is_none_or(|at| at.elapsed() >= CHECK_EVERY) || self.written >= CHECK_BYTES;
        if due {
            self.look();
            self.checked = Some(Instant::now());
            self.written = about_to_write;
        }
        self.room
    }

    /// The next [`Space::room`] looks at the disk.
    pub fn doubt(&mut self) {
        self.checked = None;
    }

    fn look(&mut self) {
        let Some(mut free) = free_bytes(&self.dir) else {
            // A file system that does not tell is not known to be full.
            return;
        };
        if self.held && free < self.low_bytes {
            self.give_back();
            free = free_bytes(&self.dir).unwrap_or(free);
        }
        if !self.held && free >= self.low_bytes + self.reserve_bytes + LOW_BYTES {
            self.held = self.take();
        }
        self.room = if self.held || self.reserve_bytes == 0 && free >= self.low_bytes {
            Room::Enough
        } else if free >= FLOOR_BYTES {
            Room::Low
        } else {
            Room::None
        };
    }

    fn take(&self) -> bool {
        let taken =
            File::options().write(true).create(true).truncate(false).open(&self.reserve).is_ok_and(|file| {
                let length = i64::try_from(self.reserve_bytes).unwrap_or(i64::MAX);
                length == 0 || posix_fallocate(&file, 0, length).is_ok()
            });
        if !taken {
            self.remove();
        }
        taken
    }

    fn give_back(&mut self) {
        self.remove();
        self.held = false;
    }

    fn remove(&self) {
        if let Err(error) = std::fs::remove_file(&self.reserve)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the reserve of disk space could not be given back");
        }
    }
}

/// Bytes an ordinary user may still write.
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(dir).ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}
