//! How a command can end: errors, their exit codes, and a hint what to do.
//!
//! The daemon's faults begin with a symbolic name (`VM_NOT_FOUND: …`); the dialect's put the name of a Python
//! exception before that, which is taken off. This is the one place where names become exit codes.

use std::io;
use std::path::PathBuf;

/// The exit codes of dom0ctl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    /// Something is in the way: a lock, a state, an object of that name.
    Conflict = 4,
    TimedOut = 5,
    /// Done so it might cost data: refused until there is evidence that it will not.
    Unsafe = 6,
    Unreachable = 7,
}

#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// The daemon's word, without the dialect's prefix.
    #[error("{text}")]
    Fault { code: i32, text: String },
    #[error("job {id} {state}{}{text}", if text.is_empty() { "" } else { ": " })]
    JobEnded { id: i64, state: String, text: String },
    #[error("the daemon cannot be reached at {}: {problem}", socket.display())]
    Unreachable { socket: PathBuf, problem: String },
    #[error("{verb} was not answered within {seconds} s")]
    Timeout { verb: String, seconds: u64 },
    /// Our patience ended, not the job.
    #[error("job {id} has not ended within {seconds} s; it goes on")]
    StillRunning { id: i64, seconds: u64 },
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    Failed(String),
    #[error("{}: {problem}", file.display())]
    File { file: PathBuf, problem: String },
    /// An answer that is not shaped as the verb says.
    #[error("{verb} was answered in an unexpected way: {problem}")]
    Answer { verb: String, problem: String },
    #[error("cannot write the output")]
    Output(#[from] io::Error),
}

/// What the dialect's faults begin with, for its two releases.
const PREFIXES: [&str; 2] = ["exceptions.Exception:", "<type 'exceptions.Exception'>:"];

impl CtlError {
    pub fn fault(code: i32, text: &str) -> Self {
        Self::Fault { code, text: plain(text).to_owned() }
    }

    pub fn exit(&self) -> Exit {
        match self {
            Self::Fault { text, .. } => exit_of(name_of(text)),
            Self::JobEnded { text, .. } => exit_of(name_of(text)),
            Self::Unreachable { .. } => Exit::Unreachable,
            Self::Timeout { .. } | Self::StillRunning { .. } => Exit::TimedOut,
            Self::Usage(_) => Exit::Usage,
            Self::NotFound(_) => Exit::NotFound,
            Self::Conflict(_) => Exit::Conflict,
            Self::Failed(_) | Self::File { .. } | Self::Answer { .. } | Self::Output(_) => Exit::Failed,
        }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Fault { text, .. } => hint_of(name_of(text)).map(str::to_owned),
            Self::JobEnded { id, text, .. } => Some(match hint_of(name_of(text)) {
                Some(hint) => hint.to_owned(),
                None => format!("dom0ctl job show {id}"),
            }),
            Self::Unreachable { problem, .. } if problem.contains("ermission denied") => {
                Some("be root or of the group that may use the socket (setting wire.socket_group)".to_owned())
            }
            Self::Unreachable { .. } => {
                Some("is dom0d running? its socket is given by --socket or DOM0D_SOCKET".to_owned())
            }
            Self::StillRunning { id, .. } => Some(format!("dom0ctl job wait {id}")),
            Self::NotFound(text) if text.contains("no VM") => Some("dom0ctl vm list".to_owned()),
            _ => None,
        }
    }

    /// The reader of our output has gone, as `head` does. That is no failure.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// `text` without the dialect's prefix.
pub fn plain(text: &str) -> &str {
    let text = text.trim();
    PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix)).unwrap_or(text).trim_start()
}

/// The symbolic name at the start of a fault's text, or "".
fn name_of(text: &str) -> &str {
    let (name, _) = text.split_once(':').unwrap_or(("", ""));
    let good =
        name.len() > 2 && name.bytes().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b'_');
    if good { name } else { "" }
}

fn exit_of(name: &str) -> Exit {
    match name {
        "UNKNOWN_VERB" | "INVALID_PARAMETER" | "INVALID_NETWORK" => Exit::Usage,
        "VM_EXISTS"
        | "VM_STATE"
        | "LOCKED"
        | "CONFLICT"
        | "QUEUE_FULL"
        | "IDEMPOTENCY_CONFLICT"
        | "MIGRATION_REFUSED"
        | "MIGRATION_LIMIT"
        | "NETWORK_BUSY" => Exit::Conflict,
        "JOB_DEADLINE" | "JOB_STILL_RUNNING" | "TOOLSTACK_TIMEOUT" | "NETWORK_TIMEOUT" => Exit::TimedOut,
        "REFUSED_UNSAFE" => Exit::Unsafe,
        // The daemon ends and takes no more: the same to a script as one that has ended.
        "STOPPING" => Exit::Unreachable,
        name if name.ends_with("_NOT_FOUND") => Exit::NotFound,
        name if name.ends_with("_EXISTS") => Exit::Conflict,
        _ => Exit::Failed,
    }
}

fn hint_of(name: &str) -> Option<&'static str> {
    Some(match name {
        "VM_NOT_FOUND" => "dom0ctl vm list",
        "JOB_NOT_FOUND" => "dom0ctl job list; old jobs are pruned",
        "VM_STATE" => "dom0ctl vm show VM lists what is allowed in its state",
        "LOCKED" => "dom0ctl lock list shows which job holds it",
        "QUEUE_FULL" => "dom0ctl job list --state queued; try again later",
        "IDEMPOTENCY_CONFLICT" => "the key was used for another change; take a new one",
        "JOB_STILL_RUNNING" => "the job goes on; dom0ctl job list --state running",
        "UNKNOWN_VERB" => "dom0ctl verb list",
        "INVALID_PARAMETER" => "dom0ctl verb help VERB",
        "PEER_NOT_FOUND" => "dom0ctl peer list",
        "PEER_UNREACHABLE" => "each host must be the other's peer: dom0ctl peer list there too",
        "MIGRATION_UNDECIDED" => "dom0ctl migration list; it is settled when the other host is back",
        "INVALID_NETWORK" => "dom0ctl network show tells what there is",
        "NETWORK_BUSY" => "dom0ctl network rollback tries it once more, and tells what stands in the way",
        "NETWORK_FAILED" | "NETWORK_NOT_AS_ASKED" | "MANAGEMENT_LOST" | "NOT_CONFIRMED" => {
            "it was rolled back; dom0ctl network history"
        }
        "STORE_READ_ONLY" => "dom0ctl store check says why",
        "DISK_FULL" => "free some space in the state folder; stopping VMs still works",
        "STOPPING" => "the daemon is stopping; try again when it has started",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_of_a_fault_has_its_exit_code() {
        for (name, exit) in [
            ("VM_NOT_FOUND", Exit::NotFound),
            ("JOB_NOT_FOUND", Exit::NotFound),
            ("VM_EXISTS", Exit::Conflict),
            ("VM_STATE", Exit::Conflict),
            ("MIGRATION_REFUSED", Exit::Conflict),
            ("MIGRATION_UNDECIDED", Exit::Failed),
            ("PEER_NOT_FOUND", Exit::NotFound),
            ("LOCKED", Exit::Conflict),
            ("CONFLICT", Exit::Conflict),
            ("QUEUE_FULL", Exit::Conflict),
            ("IDEMPOTENCY_CONFLICT", Exit::Conflict),
            ("JOB_DEADLINE", Exit::TimedOut),
            ("JOB_STILL_RUNNING", Exit::TimedOut),
            ("TOOLSTACK_TIMEOUT", Exit::TimedOut),
            ("REFUSED_UNSAFE", Exit::Unsafe),
            ("NOT_PERMITTED", Exit::Failed),
            ("INVALID_PARAMETER", Exit::Usage),
            ("UNKNOWN_VERB", Exit::Usage),
            ("STORE_READ_ONLY", Exit::Failed),
            ("DISK_FULL", Exit::Failed),
            ("STOPPING", Exit::Unreachable),
            ("INTERNAL", Exit::Failed),
        ] {
            let text = format!("{name}: some text");
            assert_eq!(CtlError::fault(1, &text).exit(), exit, "{name}");
            for prefix in PREFIXES {
                let error = CtlError::fault(1, &format!("{prefix}{text}"));
                assert_eq!((error.exit(), error.to_string()), (exit, text.clone()));
            }
            let ended = CtlError::JobEnded { id: 1, state: "failed".to_owned(), text };
            assert_eq!(ended.exit(), exit);
        }
    }

    #[test]
    fn a_text_without_a_name_is_a_plain_failure() {
        for text in ["", "vm not found", "VM not found: x", "A: b", ": x"] {
            assert_eq!(CtlError::fault(1, text).exit(), Exit::Failed, "{text}");
        }
    }
}
