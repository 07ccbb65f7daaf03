//! A second place that knows the last commit's number, so that an engine that silently went back is found out.
//!
//! A torn end of the engine's log can leave it consistent but older than what was acknowledged. The witness is
//! written after each group, over the same few bytes and without a sync: a crash of the process keeps it, a
//! loss of power may make it older, but it is never ahead of what was on disk. A store older than its witness
//! has lost commits.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 4] = b"d0w1";
const BYTES: usize = 16;

pub(super) struct Witness {
    file: Option<File>,
}

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("witness")
}

impl Witness {
    pub fn open(dir: &Path) -> std::io::Result<Self> {
        let file = File::options().write(true).create(true).truncate(false).open(path(dir))?;
        Ok(Self { file: Some(file) })
    }

    pub fn note(&mut self, commit: u64) {
        if let Some(file) = &self.file
            && let Err(error) = file.write_all_at(&encode(commit), 0)
        {
            // It only makes some damage harder to see; commits go on.
            tracing::warn!(%error, "the witness of commits could not be written");
            self.file = None;
        }
    }

    pub fn sync(&self) {
        if let Some(file) = &self.file {
            // As above.
            let _ = file.sync_data();
        }
    }
}

/// The last commit the witness saw; 0 if it does not know.
pub(super) fn read(dir: &Path) -> u64 {
    std::fs::read(path(dir)).ok().and_then(|bytes| decode(&bytes)).unwrap_or(0)
}

fn encode(commit: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..4].copy_from_slice(MAGIC);
    bytes[4..12].copy_from_slice(&commit.to_be_bytes());
    let crc = crc32c::crc32c(&bytes[..12]);
    bytes[12..].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<u64> {
    let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
    let commit = u64::from_be_bytes(bytes[4..12].try_into().ok()?);
    (encode(commit) == *bytes).then_some(commit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_witness_with_a_flipped_bit_knows_nothing() {
        let good = encode(77);
        assert_eq!(decode(&good), Some(77));
        for bit in 0..BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bad), None, "bit {bit}");
        }
    }
}
