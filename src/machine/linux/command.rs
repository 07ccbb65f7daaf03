//! Programs: absolute path, argument vector, clean environment, deadline, bounded output. Never a shell.

use super::DEADLINE;
use super::file::clean;
use crate::machine::{MachineError, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

/// Where programs are looked for; the environment we were started with has no say.
const FOLDERS: [&str; 6] = ["usr/sbin", "usr/bin", "sbin", "bin", "usr/local/sbin", "usr/local/bin"];
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// What is kept of what a program writes, where its caller does not say.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// What is kept of its words on stderr.
const MAX_COMPLAINT_BYTES: usize = 4 * 1024;

/// The programs below a root.
#[derive(Debug, Clone, Copy)]
pub struct Programs<'a> {
    root: &'a Path,
}

/// What a program that ran to its end left.
#[derive(Debug)]
pub struct Finished {
    pub success: bool,
    /// The last bytes of its output.
    pub output: Vec<u8>,
    /// Whether there was more before them.
    pub cut: bool,
    pub complaint: String,
}

impl<'a> Programs<'a> {
    pub fn new(root: &'a Path) -> Self {
        Self { root }
    }

    pub fn find(&self, name: &str) -> Option<PathBuf> {
        let paths = FOLDERS.iter().map(|folder| self.root.join(folder).join(name));
        paths.into_iter().find(|path| {
            std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
    }

    /// Runs to the end; a program that says no is an error that repeats its words.
    pub async fn run(&self, name: &str, args: &[&str]) -> Result<Finished> {
        let finished = self.ask(name, args, MAX_OUTPUT_BYTES).await?;
        if finished.success {
            return Ok(finished);
        }
        let words = if finished.complaint.trim().is_empty() {
            clean(&finished.output)
        } else {
            finished.complaint.clone()
        };
        Err(MachineError::Failed(format!("{name} {}: {}", args.join(" "), words.trim())))
    }

    /// Runs to the end and tells how it ended; keeps the last `max` bytes of its output.
    pub async fn ask(&self, name: &str, args: &[&str], max: usize) -> Result<Finished> {
        let path =
            self.find(name).ok_or_else(|| MachineError::Unavailable(format!("{name} is not installed")))?;
        let mut child = Command::new(path)
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", PATH)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| MachineError::Failed(format!("{name}: {error}")))?;
        // Kills the group if we are dropped or run out of time before the leader was waited for: until then
        // its number can belong to nobody else.
        let mut group = Group::of(&child);
        let ended = tokio::time::timeout(DEADLINE, finish(&mut child, max)).await;
        match ended {
            Err(_) => Err(MachineError::Timeout(format!("{name} {}", args.join(" ")))),
            Ok(Err(error)) => Err(MachineError::Failed(format!("{name}: {error}"))),
            Ok(Ok(finished)) => {
                group.disarm();
                Ok(finished)
            }
        }
    }
}

/// Reads both streams to their ends, then waits.
async fn finish(child: &mut Child, max: usize) -> std::io::Result<Finished> {
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (out, err) = tokio::join!(tail(out, max), tail(err, MAX_COMPLAINT_BYTES));
    let ((output, cut), (complaint, _)) = (out?, err?);
    let status = child.wait().await?;
    Ok(Finished { success: status.success(), output, cut, complaint: clean(&complaint) })
}

/// The last `max` bytes of a stream, and whether there were more.
async fn tail(stream: Option<impl AsyncRead + Unpin>, max: usize) -> std::io::Result<(Vec<u8>, bool)> {
    let Some(mut stream) = stream else { return Ok((Vec::new(), false)) };
    let mut kept = VecDeque::new();
    let mut cut = false;
    let mut piece = [0_u8; 8192];
    loop {
        let read = stream.read(&mut piece).await?;
        if read == 0 {
            return Ok((kept.into(), cut));
        }
        kept.extend(&piece[..read]);
        if kept.len() > max {
            kept.drain(..kept.len() - max);
            cut = true;
        }
    }
}

/// A process group that dies with its guard.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw))
    }

    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended by itself between; then there is nobody to kill.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}
