//! How programs of the toolstack are run: argument vectors (never a shell), a clean environment, a process group
//! of their own, a deadline after which the whole family is killed, and bounded output.
//!
//! A call that leaves processes behind (a device model, a hotplug script), or that must outlive the daemon, runs
//! in a scope of its own where systemd runs: outside the daemon's cgroup, its limits and its life. Elsewhere its
//! own process group is enough. What the service's unit takes away for good (system calls, capabilities) a scope
//! does not give back, so the unit takes only what device models and hotplug scripts never need; a transient
//! service would, but systemd makes one with streams of ours only over D-Bus, which not every dom0 has.
//!
//! The family is found by parenthood and not by the group alone: libxl starts hotplug scripts in sessions of
//! their own. Each member is stopped before its children are looked for, so that none can be reaped, and its
//! number given to a stranger, between the look and the kill.

use super::super::{Result, ToolstackError};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

/// Where programs are looked for; the environment we were started with has no say.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";
/// The longest output that is read: `xl list -l` of some hundred domains.
const MAX_OUTPUT_BYTES: usize = 8 * 1024 * 1024;
/// What is kept of a program's words on stderr: the last ones.
const MAX_COMPLAINT_BYTES: usize = 4 * 1024;
/// How long the streams of a program that has ended are still read: a child of its own may hold them open.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// How long a killed program may take to go. One in an uninterruptible wait does not go at all.
const TO_DIE: Duration = Duration::from_secs(5);
/// The most members of a family that are looked for.
const MAX_FAMILY: usize = 1024;

/// Whether what a call starts ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaves {
    Nothing,
    /// Processes stay behind, or the call must outlive us.
    Processes,
}

/// Counts what moves, in any unit. May block, even for ever.
pub(super) type Moved = Arc<dyn Fn() -> u64 + Send + Sync>;

/// How long a call may take.
pub(super) enum Patience {
    /// So long in all.
    For(Duration),
    /// As long as something moves, be it but the CPU time of the program's family; so long while nothing does.
    WhileItMoves(Duration, Moved),
}

impl Patience {
    async fn over(self, program: Option<Pid>) {
        match self {
            Self::For(limit) => tokio::time::sleep(limit).await,
            Self::WhileItMoves(limit, moved) => {
                let all = move || moved() + program.map_or(0, cpu_of_family);
                stalled(limit, Arc::new(all)).await;
            }
        }
    }
}

/// Looks between which something must have moved. It is looks that are counted, and not the clock: a dom0 that was not
/// run for a minute finds that nothing has moved, and neither could it.
struct Stillness {
    last: Option<u64>,
    looks: u32,
    most: u32,
}

impl Stillness {
    /// And how long it is between two looks.
    fn of(limit: Duration) -> (Self, Duration) {
        let pause = (limit / 10).clamp(Duration::from_millis(10), Duration::from_secs(5));
        let most = u32::try_from(limit.as_millis().div_ceil(pause.as_millis())).unwrap_or(u32::MAX);
        (Self { last: None, looks: 0, most }, pause)
    }

    /// `None`: it could not be seen. Whether it has stood still for too long.
    fn look(&mut self, moved: Option<u64>) -> bool {
        if moved.is_some() && moved != self.last {
            (self.last, self.looks) = (moved, 0);
        } else {
            self.looks += 1;
        }
        self.looks >= self.most
    }
}

/// Ends when what has moved has not changed for so long. Each look has a thread of its own: one that hangs (on a file of
/// a dead server) is the last, and takes nobody's place.
pub(super) async fn stalled(limit: Duration, moved: Moved) {
    let (mut stillness, pause) = Stillness::of(limit);
    loop {
        let (tell, told) = tokio::sync::oneshot::channel();
        let moved = Arc::clone(&moved);
        std::thread::spawn(move || tell.send(moved()));
        let now = match tokio::time::timeout(limit, told).await {
            Ok(now) => now.ok(),
            Err(_) => return,
        };
        if stillness.look(now) {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

fn cpu_of_family(leader: Pid) -> u64 {
    let mut members = vec![leader];
    let mut next = 0;
    while let Some(parent) = members.get(next).copied()
        && members.len() < MAX_FAMILY
    {
        members.extend(children(parent));
        next += 1;
    }
    members.into_iter().map(cpu_ticks).sum()
}

/// The CPU time of a process and of its children that have ended; its unit is the kernel's (proc_pid_stat(5)).
fn cpu_ticks(pid: Pid) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may hold anything. utime is the 14th field, state the 3rd.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    fields.split_ascii_whitespace().skip(11).take(4).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

#[derive(Debug, Clone)]
pub(super) struct Runner {
    xl: PathBuf,
    systemd_run: Option<PathBuf>,
}

/// How a program ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub success: bool,
    pub output: Vec<u8>,
    /// Its last words.
    pub complaint: String,
}

impl Runner {
    pub fn new(xl: PathBuf) -> Self {
        let systemd = Path::new("/run/systemd/system").is_dir();
        Self { xl, systemd_run: if systemd { find("systemd-run") } else { None } }
    }

    /// Runs `xl` to its end; a refusal is an error that repeats its words.
    pub async fn xl(&self, args: &[&str], leaves: Leaves, limit: Duration) -> Result<Vec<u8>> {
        self.xl_or_words(args, leaves, limit).await.map_err(|(error, _)| error)
    }

    /// The same; the error comes with xl's last words, also those of one that was killed at its deadline.
    pub async fn xl_or_words(
        &self,
        args: &[&str],
        leaves: Leaves,
        limit: Duration,
    ) -> std::result::Result<Vec<u8>, (ToolstackError, String)> {
        self.xl_patiently(args, leaves, Stdio::null(), Patience::For(limit)).await
    }

    /// The same, with something to read.
    pub async fn xl_patiently(
        &self,
        args: &[&str],
        leaves: Leaves,
        stdin: Stdio,
        patience: Patience,
    ) -> std::result::Result<Vec<u8>, (ToolstackError, String)> {
        let ended = self.run(&self.xl, args, leaves, stdin, patience).await?;
        if ended.success { Ok(ended.output) } else { Err((failed(args, &ended.complaint), ended.complaint)) }
    }

    /// Runs `xl` to its end and tells how it ended.
    pub async fn ask(&self, args: &[&str], leaves: Leaves, limit: Duration) -> Result<Ended> {
        self.program(&self.xl, args, leaves, limit).await
    }

    /// Runs another program of the toolstack.
    pub async fn program(
        &self,
        program: &Path,
        args: &[&str],
        leaves: Leaves,
        limit: Duration,
    ) -> Result<Ended> {
        let patience = Patience::For(limit);
        self.run(program, args, leaves, Stdio::null(), patience).await.map_err(|(error, _)| error)
    }

    async fn run(
        &self,
        program: &Path,
        args: &[&str],
        leaves: Leaves,
        stdin: Stdio,
        patience: Patience,
    ) -> std::result::Result<Ended, (ToolstackError, String)> {
        let wordless = |error| (error, String::new());
        let began = tokio::time::Instant::now();
        let mut running = self.start(program, args, leaves, stdin).map_err(wordless)?;
        let (output, leader) = (running.stdout(), running.family.0);
        let ended = tokio::select! {
            // One that has ended has ended, however late we are to see it.
            biased;
            ended = read_until_ended(output, &mut running) => Some(ended),
            () = patience.over(leader) => None,
        };
        match ended {
            Some(Ok((output, success))) => {
                Ok(Ended { success, output, complaint: running.complaint().await })
            }
            Some(Err(error)) => {
                running.kill().await;
                Err(wordless(error))
            }
            None => {
                running.kill().await;
                let (after, words) = (began.elapsed(), running.complaint().await);
                tracing::warn!(program = %program.display(), ?args, ?after, words, "no answer in time: killed");
                Err((ToolstackError::Timeout, words))
            }
        }
    }

    /// Starts `xl` with its streams in our hands.
    pub fn start_xl(&self, args: &[&str], leaves: Leaves, stdin: Stdio) -> Result<Running> {
        self.start(&self.xl, args, leaves, stdin)
    }

    fn start(&self, program: &Path, args: &[&str], leaves: Leaves, stdin: Stdio) -> Result<Running> {
        let mut command = match (leaves, &self.systemd_run) {
            (Leaves::Processes, Some(systemd_run)) => {
                let mut command = Command::new(systemd_run);
                // The scope takes this very process over: its number and its streams stay.
                command.args(["--scope", "--quiet", "--collect", "--"]).arg(program);
                command
            }
            _ => Command::new(program),
        };
        // SAFETY: between fork and exec only sigaction(2) is called, which is async-signal-safe (signal-safety(7)).
        #[allow(unsafe_code, reason = "nothing else sets a child's signals")]
        unsafe {
            command.pre_exec(outlive_its_reader);
        }
        let child = command
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", PATH)
            .current_dir("/")
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn();
        let child =
            child.map_err(|error| ToolstackError::Unreachable(format!("{}: {error}", program.display())))?;
        Ok(Running::new(child))
    }
}

/// If we die, xl still writes to our pipes, and must go on all the same: `xl save` says that it failed before it lets
/// the suspended domain go on. What libxl starts has the signal's default again (libxl__exec).
fn outlive_its_reader() -> std::io::Result<()> {
    // SAFETY: no handler is set that could be called.
    #[allow(unsafe_code, reason = "nix marks all of signal(2) so, for the sake of handlers")]
    let before = unsafe { nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigIgn) };
    before.map(drop).map_err(std::io::Error::from)
}

/// The error of an `xl` that said no.
pub(super) fn failed(args: &[&str], complaint: &str) -> ToolstackError {
    let words = complaint.trim();
    let words = if words.is_empty() { "it said nothing" } else { words };
    let name = args.first().copied().unwrap_or_default();
    ToolstackError::Failed(format!("xl {name}: {words}"))
}

/// A program of ours where `PATH` has one.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    PATH.split(':').map(|folder| Path::new(folder).join(name)).find(executable)
}

/// A program that runs. Dropped, it is killed with its family.
pub(super) struct Running {
    child: Child,
    family: Family,
    complaint: Option<JoinHandle<Vec<u8>>>,
}

impl Running {
    fn new(mut child: Child) -> Self {
        let family = Family(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
        let complaint = child.stderr.take().map(|stream| tokio::spawn(tail(stream)));
        Self { child, family, complaint }
    }

    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for its end, for at most `limit`. It is not killed then.
    pub async fn wait(&mut self, limit: Duration) -> Result<bool> {
        let waited = tokio::time::timeout(limit, self.child.wait()).await;
        match waited {
            Ok(Ok(status)) => {
                self.family.0 = None;
                Ok(status.success())
            }
            Ok(Err(error)) => Err(ToolstackError::Failed(format!("xl cannot be waited for: {error}"))),
            Err(_) => Err(ToolstackError::Timeout),
        }
    }

    /// Kills it and its family, and waits a while until it is gone.
    pub async fn kill(&mut self) {
        if let Some(leader) = self.family.0.take() {
            let _ = tokio::task::spawn_blocking(move || kill_family(leader)).await;
            if tokio::time::timeout(TO_DIE, self.child.wait()).await.is_err() {
                tracing::error!(pid = leader.as_raw(), "a killed xl does not go; it is left to the kernel");
            }
        }
    }

    /// Its last words, once it has ended.
    pub async fn complaint(&mut self) -> String {
        let Some(mut reading) = self.complaint.take() else { return String::new() };
        let bytes = tokio::time::timeout(AFTERWARDS, &mut reading).await;
        reading.abort();
        clean(&bytes.ok().and_then(std::result::Result::ok).unwrap_or_default())
    }
}

/// Reads what a program writes while waiting for its end. A stream that outlives it is not waited for.
async fn read_until_ended(stream: Option<ChildStdout>, running: &mut Running) -> Result<(Vec<u8>, bool)> {
    let broken = |error: std::io::Error| ToolstackError::Failed(format!("xl cannot be waited for: {error}"));
    let mut output = Vec::new();
    let mut early = false;
    let status = {
        let mut reading = std::pin::pin!(read_all(stream, &mut output));
        let status = loop {
            tokio::select! {
                status = running.child.wait() => break status.map_err(broken)?,
                read = &mut reading, if !early => {
                    read?;
                    early = true;
                }
            }
        };
        running.family.0 = None;
        if !early && let Ok(read) = tokio::time::timeout(AFTERWARDS, reading).await {
            read?;
        }
        status
    };
    Ok((output, status.success()))
}

async fn read_all(stream: Option<ChildStdout>, output: &mut Vec<u8>) -> Result<()> {
    let Some(mut stream) = stream else { return Ok(()) };
    let mut piece = [0_u8; 16 * 1024];
    loop {
        let read = stream.read(&mut piece).await;
        let read = read.map_err(|e| ToolstackError::Failed(format!("xl's output cannot be read: {e}")))?;
        if read == 0 {
            return Ok(());
        }
        if output.len() + read > MAX_OUTPUT_BYTES {
            let text = format!("xl wrote more than {MAX_OUTPUT_BYTES} bytes; it was killed");
            return Err(ToolstackError::Failed(text));
        }
        output.extend_from_slice(&piece[..read]);
    }
}

/// The last bytes of a stream.
async fn tail(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut kept = VecDeque::new();
    let mut piece = [0_u8; 4096];
    while let Ok(read @ 1..) = stream.read(&mut piece).await {
        kept.extend(&piece[..read]);
        let excess = kept.len().saturating_sub(MAX_COMPLAINT_BYTES);
        kept.drain(..excess);
    }
    kept.into()
}

/// As text for people: no control characters but line ends, and no progress lines.
fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let told = text.split(['\n', '\r']).filter(|line| !line.contains("xc: progress:"));
    let plain = told.map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>());
    plain.filter(|line| !line.trim().is_empty()).collect::<Vec<_>>().join("\n")
}

/// A program's process, until it was waited for: its number can belong to nobody else so long.
struct Family(Option<Pid>);

impl Drop for Family {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Reading /proc is quick, but nothing an async worker should do.
            std::thread::spawn(move || kill_family(leader));
        }
    }
}

/// Stops, then kills, a process, its group and all that descend from it.
pub(super) fn kill_family(leader: Pid) {
    // Whoever of them has ended meanwhile needs no signal.
    let _ = killpg(leader, Signal::SIGSTOP);
    let _ = kill(leader, Signal::SIGSTOP);
    let mut members = vec![leader];
    let mut next = 0;
    while let Some(parent) = members.get(next).copied()
        && members.len() < MAX_FAMILY
    {
        for child in children(parent) {
            let _ = kill(child, Signal::SIGSTOP);
            members.push(child);
        }
        next += 1;
    }
    let _ = killpg(leader, Signal::SIGKILL);
    for member in members.iter().rev() {
        let _ = kill(*member, Signal::SIGKILL);
    }
}

fn children(parent: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let numbers = lists.flat_map(|list| {
        list.split_ascii_whitespace().filter_map(|n| n.parse().ok()).map(Pid::from_raw).collect::<Vec<_>>()
    });
    numbers.take(MAX_FAMILY).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::fake::Fake;
    use super::*;

    #[test]
    fn what_stands_still_is_told_after_so_many_looks_whatever_the_clock_says() {
        let (mut stillness, pause) = Stillness::of(Duration::from_secs(600));
        assert_eq!((pause, stillness.most), (Duration::from_secs(5), 120));
        for moved in [Some(1), Some(2), None, Some(2), Some(3)] {
            assert!(!stillness.look(moved), "{moved:?}");
        }
        let looks = (1..).find(|_| stillness.look(Some(3)));
        assert_eq!(looks, Some(120));
        let (mut blind, pause) = Stillness::of(Duration::from_millis(25));
        assert_eq!((pause, (1..).find(|_| blind.look(None))), (Duration::from_millis(10), Some(3)));
    }

    #[tokio::test]
    async fn an_xl_whose_daemon_died_goes_on_though_nobody_reads_what_it_says() {
        // As `xl save` does: it says that it failed, and then lets the domain go on.
        let save =
            "cat <&0 >/dev/null; while echo more; do :; done 2>/dev/null; echo failed >&2; touch goes-on";
        let fake = Fake::new(&[("save", save)]);
        let (from_us, to_it) = std::io::pipe().unwrap();
        let started = Runner::new(fake.path("xl")).start_xl(&["save"], Leaves::Processes, from_us.into());
        let mut xl = started.unwrap();
        // All our ends of its pipes go, as with the death of a process.
        drop(xl.child.stdout.take());
        xl.complaint.take().unwrap().abort();
        drop(to_it);
        assert_eq!(xl.wait(Duration::from_secs(60)).await, Ok(true));
        assert!(fake.path("goes-on").exists());
    }
}
