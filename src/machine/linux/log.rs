//! Logs by the dialect's names: `ovs-agent` (our own), `messages`, `xend` (the toolstack's), `dmesg`.

use super::file::{self, below};
use super::{LinuxMachine, command};
use crate::machine::{MachineError, Result};
use crate::model::{Bytes, excerpt};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// More of a log than this is never told, whatever was asked.
const MAX_BYTES: usize = 1024 * 1024;
/// Lines asked of the journal: more than [`MAX_BYTES`] holds.
const MAX_LINES: &str = "--lines=20000";
/// Records of the kernel's ring buffer that are looked at.
const MAX_KERNEL_RECORDS: usize = 200_000;
const NAMES: &str = "ovs-agent, messages, xend, dmesg";

pub async fn read(machine: &LinuxMachine, name: &str, max: Bytes) -> Result<String> {
    let max = usize::try_from(max.0).unwrap_or(MAX_BYTES).min(MAX_BYTES);
    match name {
        "ovs-agent" => match journal(machine, &["--unit=dom0d"], max).await {
            Some(text) => Ok(text),
            None => files(machine, "our own log", max, |root| existing(root, &["/var/log/dom0d.log"])).await,
        },
        "messages" => match journal(machine, &["--boot"], max).await {
            Some(text) => Ok(text),
            None => {
                let places = |root: &Path| existing(root, &["/var/log/messages", "/var/log/syslog"]);
                files(machine, "the system's log", max, places).await
            }
        },
        "xend" => files(machine, "the toolstack's log", max, toolstack_log).await,
        "dmesg" => kernel(machine, max).await,
        other => Err(MachineError::Invalid(format!("there is no log {}; allowed: {NAMES}", excerpt(other)))),
    }
}

/// The journal's words; `None` where there is no journal, or it has none of this.
async fn journal(machine: &LinuxMachine, which: &[&str], max: usize) -> Option<String> {
    let mut args = vec!["--quiet", "--no-pager", "--output=short-iso", MAX_LINES];
    args.extend(which);
    let finished = machine.programs().ask("journalctl", &args, max).await.ok()?;
    let text = output(&finished);
    (finished.success && !text.trim().is_empty()).then_some(text)
}

fn output(finished: &command::Finished) -> String {
    file::clean(file::whole_lines(&finished.output, finished.cut))
}

async fn files(
    machine: &LinuxMachine,
    what: &'static str,
    max: usize,
    find: impl FnOnce(&Path) -> Option<PathBuf> + Send + 'static,
) -> Result<String> {
    let read = move |root: &Path| {
        let path = find(root).ok_or_else(|| MachineError::Unavailable(what.to_owned()))?;
        file::read_tail(&path, max).map_err(|error| file::failed(&path, &error))
    };
    machine.blocking("log", read).await
}

fn existing(root: &Path, paths: &[&str]) -> Option<PathBuf> {
    paths.iter().map(|path| below(root, path)).find(|path| path.is_file())
}

/// `xl` writes a log for each domain, `xl-<name>.log`; of those the newest, else xend's own of old.
fn toolstack_log(root: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(below(root, "/var/log/xen")).into_iter().flatten().flatten();
    let of_xl = entries.take(10_000).filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("xl") && name.ends_with(".log")
    });
    let dated = of_xl.filter_map(|entry| {
        let meta = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), entry.path()))
    });
    let newest = dated.max().map(|(_, path)| path);
    newest.or_else(|| existing(root, &["/var/log/xen/xend.log", "/var/log/xend.log"]))
}

async fn kernel(machine: &LinuxMachine, max: usize) -> Result<String> {
    if machine.is_life()
        && let Ok(text) = machine.blocking("dmesg", move |_| ring_buffer(Path::new("/dev/kmsg"), max)).await
        && !text.is_empty()
    {
        return Ok(text);
    }
    let finished = machine.programs().ask("dmesg", &[], max).await?;
    if finished.success {
        return Ok(output(&finished));
    }
    Err(MachineError::Failed(format!("dmesg: {}", finished.complaint.trim())))
}

/// Reads /dev/kmsg until it would wait. Each read brings one record: `6,339,5140900,-;text`, then lines of
/// properties that begin with a blank (Documentation/ABI/testing/dev-kmsg).
fn ring_buffer(path: &Path, max: usize) -> Result<String> {
    let failed = |error: std::io::Error| file::failed(path, &error);
    let mut device = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(failed)?;
    let mut kept = std::collections::VecDeque::new();
    let mut cut = false;
    let mut record = [0_u8; 8192];
    for _ in 0..MAX_KERNEL_RECORDS {
        match device.read(&mut record) {
            Ok(0) => break,
            Ok(length) => kept.extend(kernel_line(&record[..length]).into_bytes()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // The kernel wrote over the record we were about to read; the next read goes on behind the gap.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
        if kept.len() > max {
            kept.drain(..kept.len() - max);
            cut = true;
        }
    }
    let bytes: Vec<u8> = kept.into();
    Ok(file::clean(file::whole_lines(&bytes, cut)))
}

/// A record in dmesg's manner: `[    5.140900] text`.
fn kernel_line(record: &[u8]) -> String {
    let text = file::clean(record);
    let first = text.lines().next().unwrap_or_default();
    let Some((head, message)) = first.split_once(';') else { return format!("{first}\n") };
    let microseconds: u64 = head.split(',').nth(2).and_then(|time| time.parse().ok()).unwrap_or(0);
    format!("[{:>5}.{:06}] {message}\n", microseconds / 1_000_000, microseconds % 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_kernel_reads_as_dmesg_shows_it() {
        let record = b"6,339,5140900,-;NET: Registered\n SUBSYSTEM=net\n";
        assert_eq!(kernel_line(record), "[    5.140900] NET: Registered\n");
        assert_eq!(kernel_line(b"no head"), "no head\n");
    }
}
