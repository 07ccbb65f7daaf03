//! The daemon as a process: what it takes of the machine, read from the kernel's own files about us.

use crate::model::Timestamp;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeValLike;
use std::time::Duration;

/// What is not known is not there.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Figures {
    pub started: Timestamp,
    pub cpu: Option<Duration>,
    pub resident_bytes: Option<u64>,
    pub threads: Option<u64>,
    pub open_fds: Option<u64>,
    pub max_fds: Option<u64>,
}

/// `started`: when the daemon was.
pub fn read(started: Timestamp) -> Figures {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let cpu = getrusage(UsageWho::RUSAGE_SELF).ok().map(|usage| {
        let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    });
    Figures {
        started,
        cpu,
        resident_bytes: field("VmRSS").map(|kib| kib * 1024),
        threads: field("Threads"),
        // The one that reads the folder is among them.
        open_fds: std::fs::read_dir("/proc/self/fd").ok().map(|all| (all.count() as u64).saturating_sub(1)),
        max_fds: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_threads_and_descriptors() {
        let started = Timestamp::now();
        let before = read(started);
        let held: Vec<_> = (0..32).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let after = read(started);
        assert!(before.resident_bytes.unwrap() > 1024 * 1024, "{before:?}");
        assert!(before.threads.unwrap() >= 1 && before.max_fds.unwrap() >= 32, "{before:?}");
        assert!(after.cpu >= before.cpu && after.cpu > Some(Duration::ZERO), "{after:?}");
        // Other tests of this process open and close some meanwhile.
        assert!(after.open_fds.unwrap() >= held.len() as u64, "{before:?} {after:?}");
    }
}
