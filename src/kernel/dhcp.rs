//! DHCP by the host's own client: dhclient, dhcpcd or udhcpc, whichever is there. The client configures the link by itself
//! (address, routes, resolver) as its distribution has set it up; we start it, know whether it runs, and end it.
//!
//! It runs in the foreground of a session of its own, so that it outlives the daemon (the unit has `KillMode=process`), and
//! is known by a file that names its process: number and start, since numbers are used again. Where the daemon dies between
//! the start and the file, the next start finds the process by its words.

use super::place::Place;
use crate::model::IfName;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::time::Instant;

/// A client that is told to end gives its lease back first.
const TO_END: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);
/// Of a process's words.
const MAX_WORDS: usize = 64 * 1024;
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Clients, the best first. Each in the foreground, for IPv4, with the link as its last word.
const CLIENTS: [&str; 3] = ["dhclient", "dhcpcd", "udhcpc"];

#[derive(Debug, thiserror::Error)]
pub(super) enum DhcpError {
    #[error("this host has no DHCP client: dhclient, dhcpcd or udhcpc is needed")]
    NoClient,
    #[error("the DHCP client {0} could not be started: {1}")]
    Start(PathBuf, io::Error),
    #[error("the DHCP client does not end")]
    DoesNotEnd,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Where clients are found, and where it is noted which run.
#[derive(Debug, Clone)]
pub struct Dhcp {
    pub programs: Vec<PathBuf>,
    pub notes: PathBuf,
}

impl Default for Dhcp {
    fn default() -> Self {
        Self { programs: FOLDERS.map(PathBuf::from).to_vec(), notes: PathBuf::from("/run/dom0d/dhcp") }
    }
}

/// A process, told apart from a later one of the same number by its start (proc_pid_stat(5), field 22).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    start: u64,
}

impl Process {
    fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in brackets, may hold anything.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, start })
    }

    fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

impl Dhcp {
    /// The links that a client of ours serves.
    pub(super) fn served(&self) -> BTreeSet<IfName> {
        let Ok(entries) = fs::read_dir(&self.notes) else { return BTreeSet::new() };
        let named = entries.flatten().filter_map(|entry| IfName::parse(entry.file_name().to_str()?).ok());
        named.filter(|link| self.noted(link).is_some_and(Process::lives)).collect()
    }

    fn noted(&self, link: &IfName) -> Option<Process> {
        let text = fs::read_to_string(self.notes.join(link.as_str())).ok()?;
        let (pid, start) = text.trim().split_once(' ')?;
        Some(Process { pid: pid.parse().ok()?, start: start.parse().ok()? })
    }

    fn note(&self, link: &IfName, process: Process) -> io::Result<()> {
        // Not a link's name, which has no colon.
        let new = self.notes.join(format!("{link}:new"));
        fs::write(&new, format!("{} {}\n", process.pid, process.start))?;
        fs::rename(new, self.notes.join(link.as_str()))
    }

    /// Has a client serve the link from now on. Blocking.
    pub(super) fn on(&self, place: &Place, link: &IfName) -> Result<(), DhcpError> {
        if self.noted(link).is_some_and(Process::lives) {
            return Ok(());
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.notes)?;
        let (name, program) = self.client().ok_or(DhcpError::NoClient)?;
        if let Some(process) = left_behind(&program, link) {
            return Ok(self.note(link, process)?);
        }
        let mut command = Command::new(&program);
        command.args(self.words(name, link)).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // In the namespace of the thread that starts it.
        let started = place.within(|| command.spawn());
        let mut child = started.map_err(|error| DhcpError::Start(program.clone(), error))?;
        let process = i32::try_from(child.id()).ok().and_then(Process::of);
        // It is our child for as long as we live: somebody has to hear of its end.
        std::thread::Builder::new()
            .name("dhcp".to_owned())
            .stack_size(64 * 1024)
            .spawn(move || child.wait())?;
        match process {
            Some(process) => Ok(self.note(link, process)?),
            None => Err(DhcpError::Start(program, io::Error::other("it ended at once"))),
        }
    }

    fn client(&self) -> Option<(&'static str, PathBuf)> {
        let places = |name: &'static str| self.programs.iter().map(move |folder| (name, folder.join(name)));
        CLIENTS.into_iter().flat_map(places).find(|(_, path)| path.exists())
    }

    fn words(&self, client: &str, link: &IfName) -> Vec<String> {
        let file = |ending: &str| self.notes.join(format!("{link}:{ending}")).display().to_string();
        let words: Vec<String> = match client {
            "dhclient" => {
                vec!["-4".into(), "-d".into(), "-pf".into(), file("pid"), "-lf".into(), file("leases")]
            }
            "dhcpcd" => vec!["-4".into(), "-B".into()],
            _ => vec!["-f".into(), "-R".into(), "-i".into()],
        };
        words.into_iter().chain([link.to_string()]).collect()
    }

    /// Ends the link's client.
    pub(super) async fn off(&self, link: &IfName) -> Result<(), DhcpError> {
        let Some(process) = self.noted(link) else { return Ok(()) };
        for (signal, patience) in [(Signal::SIGTERM, TO_END), (Signal::SIGKILL, TO_END)] {
            if !process.lives() {
                break;
            }
            // It may have ended since.
            let _ = kill(Pid::from_raw(process.pid), signal);
            let end = Instant::now() + patience;
            while process.lives() && Instant::now() < end {
                tokio::time::sleep(POLL).await;
            }
        }
        if process.lives() {
            return Err(DhcpError::DoesNotEnd);
        }
        match fs::remove_file(self.notes.join(link.as_str())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// A client that serves the link, started by a life of ours that died before it could note it.
fn left_behind(program: &Path, link: &IfName) -> Option<Process> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words[..words.len().min(MAX_WORDS)].split(|byte| *byte == 0).collect();
        let is_it = |word: &&[u8]| Path::new(&*String::from_utf8_lossy(word)) == program;
        words.iter().take(2).any(is_it) && words.contains(&link.as_str().as_bytes())
    })
    .find_map(Process::of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn host(client: &str, script: &str) -> (tempfile::TempDir, Dhcp) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join(client);
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let dhcp = Dhcp { programs: vec![folder.path().to_owned()], notes: folder.path().join("notes") };
        (folder, dhcp)
    }

    fn link(name: &str) -> IfName {
        IfName::parse(name).unwrap()
    }

    #[tokio::test]
    async fn a_client_is_started_once_known_to_a_later_life_and_ended() {
        let (folder, dhcp) =
            host("dhclient", "#!/bin/sh\necho \"$@\" >>\"${0%/*}/calls\"\nwhile :; do sleep 1; done\n");
        let eth0 = link("eth0");
        for _ in 0..2 {
            dhcp.on(&Place::Own, &eth0).unwrap();
        }
        assert_eq!(dhcp.clone().served(), [eth0.clone()].into());
        // It has its own words only when it runs: the kernel tells of its start a moment before (vfork).
        let process = dhcp.noted(&eth0).unwrap();
        while fs::metadata(folder.path().join("calls")).map_or(0, |file| file.len()) == 0 {
            assert!(process.lives());
            tokio::task::yield_now().await;
        }
        // The note is lost: the process is found by its words.
        fs::remove_file(dhcp.notes.join("eth0")).unwrap();
        assert_eq!(dhcp.served(), BTreeSet::new());
        dhcp.on(&Place::Own, &eth0).unwrap();
        let process = dhcp.noted(&eth0).unwrap();
        dhcp.off(&eth0).await.unwrap();
        assert!(!process.lives());
        assert_eq!(dhcp.served(), BTreeSet::new());
        dhcp.off(&eth0).await.unwrap();
        let calls = fs::read_to_string(folder.path().join("calls")).unwrap();
        assert_eq!(calls.lines().count(), 1, "{calls}");
        assert!(calls.starts_with("-4 -d ") && calls.trim_end().ends_with(" eth0"), "{calls}");
    }

    #[tokio::test]
    async fn a_client_that_does_not_heed_is_killed_and_a_number_that_is_anothers_now_is_left_alone() {
        let deaf = "#!/bin/sh\ntrap '' TERM\n: >\"${0%/*}/deaf\"\nwhile :; do sleep 1; done\n";
        let (folder, dhcp) = host("udhcpc", deaf);
        let eth1 = link("eth1");
        dhcp.on(&Place::Own, &eth1).unwrap();
        let process = dhcp.noted(&eth1).unwrap();
        while !folder.path().join("deaf").exists() {
            assert!(process.lives());
            std::thread::yield_now();
        }
        dhcp.off(&eth1).await.unwrap();
        assert!(!process.lives());
        let own = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        dhcp.note(&eth1, Process { start: own.start + 1, ..own }).unwrap();
        dhcp.off(&eth1).await.unwrap();
        assert!(own.lives());
    }

    #[test]
    fn a_host_without_a_client_says_what_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let dhcp = Dhcp { programs: vec![folder.path().to_owned()], notes: folder.path().join("notes") };
        let refused = dhcp.on(&Place::Own, &link("eth0")).unwrap_err();
        assert!(refused.to_string().contains("dhclient"), "{refused}");
    }
}
