//! How much room the disk has left, the reserve files, and what may still be written.
//!
//! `<dir>/reserve` holds disk space that nobody else can take. When free space falls below a mark the reserve
//! is given back to the file system and only essential transactions go on; below a second mark nothing does,
//! since the engine does not take a full disk well. If others fill the disk so fast that it is met all the same,
//! the engine has to be opened again, and even that writes: `<dir>/reserve.open` is given back only for it. When
//! there is room again, with a margin so that the mode does not flap, both are made again.

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
/// Opening a store of a million rows writes 3 MB.
const OPENING_BYTES: u64 = 4 * 1024 * 1024;
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
    reserve: Reserve,
    /// For opening the engine.
    opening: Reserve,
    low_bytes: u64,
    room: Room,
    checked: Option<Instant>,
    written: u64,
}

impl Space {
    pub fn new(dir: &Path, reserve_mib: u64) -> Self {
        let bytes = reserve_mib.saturating_mul(1024 * 1024);
        Self {
            dir: dir.to_owned(),
            reserve: Reserve::find(dir.join("reserve"), bytes),
            opening: Reserve::find(dir.join("reserve.open"), (bytes / 4).min(OPENING_BYTES)),
            low_bytes: LOW_BYTES.max(bytes / 2),
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

    /// The engine is about to be opened: it must have room even on a full disk.
    pub fn make_room_to_open(&mut self) {
        self.look();
        if self.room == Room::None {
            self.opening.give_back();
        }
        // What opening takes is looked at before the next group.
        self.checked = None;
    }

    fn look(&mut self) {
        let Some(mut free) = free_bytes(&self.dir) else {
            // A file system that does not tell is not known to be full.
            return;
        };
        if self.reserve.held && free < self.low_bytes {
            self.reserve.give_back();
            free = free_bytes(&self.dir).unwrap_or(free);
        }
        if !self.opening.held && free >= self.opening.bytes + FLOOR_BYTES {
            self.opening.take();
            free = free_bytes(&self.dir).unwrap_or(free);
        }
        if !self.reserve.held && free >= self.low_bytes + self.reserve.bytes + LOW_BYTES {
            self.reserve.take();
        }
        self.room = match (self.reserve.held, free) {
            (true, _) => Room::Enough,
            // With no reserve asked for, there is only free space to go by.
            (false, free) if self.reserve.bytes == 0 && free >= self.low_bytes => Room::Enough,
            (false, free) if free >= FLOOR_BYTES => Room::Low,
            (false, _) => Room::None,
        };
    }
}

/// A file that holds disk space.
struct Reserve {
    path: PathBuf,
    bytes: u64,
    held: bool,
}

impl Reserve {
    fn find(path: PathBuf, bytes: u64) -> Self {
        let held = bytes > 0 && std::fs::metadata(&path).is_ok_and(|file| file.len() == bytes);
        Self { path, bytes, held }
    }

    fn take(&mut self) {
        let options = File::options().write(true).create(true).truncate(false).open(&self.path);
        self.held = options.is_ok_and(|file| {
            let length = i64::try_from(self.bytes).unwrap_or(i64::MAX);
            length > 0 && posix_fallocate(&file, 0, length).is_ok()
        });
        if !self.held {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        self.held = false;
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a reserve of disk space could not be given back");
        }
    }
}

/// Bytes an ordinary user may still write.
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(dir).ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}
