//! Saved domains and core dumps as real, small files, so that they survive the world and can be deleted, moved
//! and miscounted like real ones. A file appears whole or not at all. These functions block.

use super::{Result, WorldError};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A larger file is none of ours.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Writes a new file: beside it first, then into place. The folder must exist, the file must not.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |what: &str, e: std::io::Error| WorldError::Failed(format!("{what}: {e}"));
    if fs::symlink_metadata(path).is_ok() {
        return Err(WorldError::Failed("the file exists".to_owned()));
    }
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let written = write_synced(Path::new(&part), bytes)
        .and_then(|()| fs::rename(&part, path))
        .map_err(|e| failed("writing the file", e));
    if written.is_err() {
        // Nothing of a failed file may stay; if it was never made, there is nothing to remove.
        let _ = fs::remove_file(&part);
    }
    written
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(super) fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let failed = |e: std::io::Error| WorldError::Failed(format!("reading the saved domain: {e}"));
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    // serde's words would repeat the file's text.
    serde_json::from_slice(&bytes)
        .map_err(|_| WorldError::Failed("the file does not hold a saved domain".to_owned()))
}
