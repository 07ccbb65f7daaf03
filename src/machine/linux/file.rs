//! Files below a root: bounded reads of cleaned text, atomic writes.

use crate::machine::{MachineError, Result};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What an ordinary file may bring.
pub const MAX_BYTES: usize = 64 * 1024;

/// `path` below `root`, both absolute.
pub fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Opens without waiting: a FIFO in the place of a file must not hold us.
fn open(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// The first `max` bytes; `None` where there is no such file, or it cannot be read.
pub fn read_bytes(path: &Path, max: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = open(path).ok()?;
    // Many files of /sys fail half-way (EIO, ENODEV): what cannot be read tells nothing.
    file.take(u64::try_from(max).unwrap_or(u64::MAX)).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The first `max` bytes as clean text with its lines.
pub fn read_text_of(path: &Path, max: usize) -> Option<String> {
    read_bytes(path, max).map(|bytes| clean(&bytes))
}

pub fn read_text(root: &Path, path: &str) -> Option<String> {
    read_text_of(&below(root, path), MAX_BYTES)
}

/// One value: the text without white space around it; empty where there is no such file.
pub fn read_value(root: &Path, path: &str) -> String {
    read_text(root, path).unwrap_or_default().trim().to_owned()
}

/// A decimal number in a file of /sys, with as few calls of the kernel as that takes: there may be thousands.
pub fn read_number(path: &Path) -> Option<u64> {
    let mut bytes = [0; 32];
    let mut file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path).ok()?;
    let length = file.read(&mut bytes).ok()?;
    std::str::from_utf8(&bytes[..length]).ok()?.trim().parse().ok()
}

/// The last `max` bytes of a file, from the start of a line on.
pub fn read_tail(path: &Path, max: usize) -> std::io::Result<String> {
    let mut file = open(path)?;
    let length = file.metadata()?.len();
    let start = length.saturating_sub(u64::try_from(max).unwrap_or(u64::MAX));
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(u64::try_from(max).unwrap_or(u64::MAX)).read_to_end(&mut bytes)?;
    Ok(clean(whole_lines(&bytes, start > 0)))
}

/// Drops the piece of a line that a cut left at the front.
pub fn whole_lines(bytes: &[u8], cut: bool) -> &[u8] {
    if !cut {
        return bytes;
    }
    bytes.iter().position(|byte| *byte == b'\n').map_or(bytes, |end| &bytes[end + 1..])
}

/// UTF-8 with replacement characters where it was none, and without control characters but tab and newline.
pub fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// Puts `text` in the place of `path`, whole or not at all, and on disk when it returns. The mode of a file
/// that was there is kept; a new one is 0644. Folders on the way are made.
pub fn write(path: &Path, text: &str) -> Result<()> {
    write_io(path, text).map_err(|error| failed(path, &error))
}

fn write_io(path: &Path, text: &str) -> std::io::Result<()> {
    // A link that somebody made stays one: what it leads to is replaced.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let mode = std::fs::metadata(path).map_or(0o644, |meta| meta.permissions().mode() & 0o777);
    replace(path, |temporary| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
        // The umask may have taken bits away.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    })
}

/// A symbolic link at `path`, in the place of what was there.
pub fn link(path: &Path, target: &str) -> Result<()> {
    replace(path, |temporary| std::os::unix::fs::symlink(target, temporary))
        .map_err(|error| failed(path, &error))
}

fn replace(path: &Path, make: impl FnOnce(&Path) -> std::io::Result<()>) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.dom0d-{}", uuid::Uuid::new_v4().simple()));
    let made = make(&temporary).and_then(|()| std::fs::rename(&temporary, path));
    if made.is_err() {
        let _ = std::fs::remove_file(&temporary);
        return made;
    }
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

pub fn failed(path: &Path, error: &std::io::Error) -> MachineError {
    MachineError::Failed(format!("{}: {error}", path.display()))
}
