//! The table of faults, and how each goes on the wire.
//!
//! A fault of one of our own verbs has a stable code and begins with its symbolic name. A fault of a dialect
//! verb has code 1 and the form its clients know, `exceptions.Exception:…` (3.2) or
//! `<type 'exceptions.Exception'>:…` (3.3), with the same name and text behind it.

use crate::config::Dialect;
use crate::job::{JobFault, SubmitError};
use crate::model::Invalid;
use crate::store::StoreError;
use crate::wire::Fault;

/// Name, code, and what it means. Codes are never given twice.
pub const TABLE: &[(&str, i32, &str)] = &[
    (
        "INVALID_PARAMETER",
        100,
        "a parameter is missing, of the wrong type, or not allowed; the text says which and what is allowed",
    ),
    ("UNKNOWN_VERB", 101, "there is no such verb; system.listMethods lists them"),
    ("NOT_PERMITTED", 102, "the caller's role does not allow the verb"),
    ("NOT_A_JOB", 103, "the verb cannot be submitted as a job"),
    (
        "CONFLICT",
        104,
        "somebody else changed the same thing meanwhile; nothing was changed, look and ask again",
    ),
    ("VM_NOT_FOUND", 200, "no VM has this id"),
    ("VM_EXISTS", 201, "the id, the name or a MAC address is taken"),
    ("VM_STATE", 202, "the VM's state does not allow it; the text says in which states it is allowed"),
    ("SHUTDOWN_IGNORED", 203, "the guest was asked to shut down and did not in time; it runs on"),
    ("VM_NOT_STOPPED", 204, "the host was to go down and a VM could not be stopped; the host stays up"),
    ("CORE_NOT_FOUND", 205, "the VM has no core dump of this date"),
    ("MIGRATION_REFUSED", 220, "the other host cannot take the VM; the text says what it lacks"),
    ("MIGRATION_LIMIT", 221, "as many VMs are on their way already as the settings allow"),
    ("MIGRATION_FAILED", 222, "the VM did not get there and runs on where it was"),
    (
        "MIGRATION_UNDECIDED",
        223,
        "it is not known yet which host runs the VM; it stands still until that is known",
    ),
    ("MIGRATION_UNCONFIRMED", 224, "the VM is the other host's, which did not confirm in time that it runs"),
    ("MIGRATION_NOT_FOUND", 225, "no VM of this migration is here"),
    ("PEER_NOT_FOUND", 230, "no peer has this address; peer_list shows all"),
    ("PEER_EXISTS", 231, "the fingerprint is another peer's"),
    ("PEER_LIMIT", 232, "there are as many peers as there can be"),
    ("PEER_UNREACHABLE", 233, "the peer gave no answer, or does not know this host"),
    ("OUT_OF_MEMORY", 210, "the host has not enough free memory; nothing was built"),
    ("TOOLSTACK_FAILED", 211, "the toolstack refused or failed; its words follow"),
    ("TOOLSTACK_TIMEOUT", 212, "the toolstack did not answer in time; the world was looked at again"),
    ("TOOLSTACK_UNREACHABLE", 213, "the toolstack cannot be reached"),
    (
        "INVALID_NETWORK",
        240,
        "the declaration of the network cannot be; the text names each field; nothing was changed",
    ),
    (
        "NETWORK_FAILED",
        241,
        "the kernel refused a step; the network is back as it was, unless it was to be kept",
    ),
    (
        "NETWORK_TIMEOUT",
        242,
        "the kernel did not answer in time; the network is back as it was, unless it was to be kept",
    ),
    (
        "NETWORK_NOT_AS_ASKED",
        243,
        "all steps were done and the kernel has something else; as for NETWORK_FAILED",
    ),
    ("NETWORK_BUSY", 244, "an earlier change could not be rolled back yet; nothing was changed"),
    ("MANAGEMENT_LOST", 245, "the change cut off who asked for it, and was rolled back"),
    ("NOT_CONFIRMED", 246, "nobody confirmed the change in time, and it was rolled back"),
    ("NOTHING_TO_CONFIRM", 247, "no change of the network waits to be confirmed"),
    ("ROLLBACK_BLOCKED", 248, "the network could not be brought back; it is tried again until it is"),
    ("JOB_NOT_FOUND", 300, "no job has this id, or it is no longer kept"),
    ("JOB_STILL_RUNNING", 301, "the wait is over and the job goes on; ask job_wait"),
    ("JOB_ENDED", 302, "the job has ended already and cannot be cancelled"),
    ("CANCELLED", 303, "the job was cancelled; what it did was taken back"),
    ("JOB_DEADLINE", 304, "the job's deadline passed; what it did was taken back"),
    (
        "INTERRUPTED",
        305,
        "the agent died during the job, and the job could not go on; what it did was taken back",
    ),
    ("QUEUE_FULL", 306, "too many jobs are open; nothing was accepted, try again later"),
    ("IDEMPOTENCY_CONFLICT", 307, "the idempotency key was used for another request"),
    ("CHILD_REFUSED", 308, "a job could not start its child"),
    ("ALREADY_OWNED", 400, "another manager owns this host"),
    ("STATISTIC_NOT_FOUND", 410, "no figures of this object, or none of this name"),
    ("NOT_OWNED", 401, "no manager owns this host"),
    (
        "NOT_OWNER",
        403,
        "another manager owns this host, and only it (or the operator on the host) may release it",
    ),
    ("INVALID_CERTIFICATE", 404, "a certificate cannot be read, or is too weak"),
    ("CERTIFICATE_FAILED", 402, "a certificate could not be made or read"),
    ("HOST_FAILED", 500, "the host's system refused or failed; its words follow"),
    ("HOST_TIMEOUT", 501, "a service of the host did not answer in time"),
    ("NOT_AVAILABLE", 502, "this host has no such service or log"),
    ("FILE_FAILED", 503, "a file could not be read, written or removed"),
    ("DISK_FULL", 600, "the disk is full; nothing was lost, and stopping VMs still works"),
    ("STORE_READ_ONLY", 601, "the store can only be read; nothing was changed"),
    ("STORE", 602, "the store failed; nothing was acknowledged that is not on disk"),
    ("STOPPING", 700, "the agent is stopping; try again when it is back"),
    ("ANSWER_TOO_BIG", 701, "the answer is larger than the settings allow"),
    (
        "NOT_CALLED",
        702,
        "the time of system.multicall was over; the call was not made or, if it only reads, not waited for",
    ),
    ("INTERNAL", 799, "something that was not foreseen; the log says more"),
];

/// A fault by its name in [`TABLE`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {text}")]
pub struct ApiFault {
    pub name: String,
    pub text: String,
}

pub type Result<T> = std::result::Result<T, ApiFault>;

impl ApiFault {
    pub fn new(name: &str, text: impl Into<String>) -> Self {
        Self { name: name.to_owned(), text: text.into() }
    }

    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new("INVALID_PARAMETER", text)
    }

    /// As a caller of a verb sees it.
    pub fn on_wire(&self, dialect_verb: bool, dialect: Dialect) -> Fault {
        if dialect_verb {
            let prefix = match dialect {
                Dialect::V32 => "exceptions.Exception",
                Dialect::V33 => "<type 'exceptions.Exception'>",
            };
            return Fault { fault_code: 1, fault_string: format!("{prefix}:{}: {}", self.name, self.text) };
        }
        let code = TABLE.iter().find(|(name, ..)| *name == self.name).map_or(799, |(_, code, _)| *code);
        Fault { fault_code: code, fault_string: format!("{}: {}", self.name, self.text) }
    }
}

impl From<JobFault> for ApiFault {
    fn from(fault: JobFault) -> Self {
        Self { name: fault.name, text: fault.text }
    }
}

impl From<StoreError> for ApiFault {
    fn from(error: StoreError) -> Self {
        let name = match error {
            StoreError::DiskFull(_) => "DISK_FULL",
            StoreError::ReadOnly(_) => "STORE_READ_ONLY",
            StoreError::Closed => "STOPPING",
            StoreError::Refused(_) => "INVALID_PARAMETER",
            StoreError::Damaged(_) | StoreError::Io(_) => "STORE",
        };
        let after = match error {
            // The write may have reached the disk before the failure did us.
            StoreError::Damaged(_) | StoreError::Io(_) => {
                "what was asked may have been done; look before asking again"
            }
            _ => "nothing was changed",
        };
        Self::new(name, format!("{error}; {after}"))
    }
}

impl From<SubmitError> for ApiFault {
    fn from(error: SubmitError) -> Self {
        let name = match error {
            SubmitError::Store(store) => return store.into(),
            SubmitError::QueueFull { .. } => "QUEUE_FULL",
            SubmitError::IdempotencyConflict { .. } => "IDEMPOTENCY_CONFLICT",
            SubmitError::NoParent(_) | SubmitError::NotCovered(_) => "CHILD_REFUSED",
            SubmitError::Stopping => "STOPPING",
        };
        Self::new(name, error.to_string())
    }
}

impl From<Invalid> for ApiFault {
    fn from(invalid: Invalid) -> Self {
        Self::invalid(invalid.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_a_name_and_a_code_of_its_own() {
        for (index, (name, code, help)) in TABLE.iter().enumerate() {
            assert!(!help.is_empty());
            assert!(name.chars().all(|c| c.is_ascii_uppercase() || c == '_'), "{name}");
            for (other, other_code, _) in &TABLE[index + 1..] {
                assert_ne!(name, other);
                assert_ne!(code, other_code);
            }
        }
    }

    #[test]
    fn a_dialect_fault_has_code_one_and_the_form_of_its_release() {
        let fault = ApiFault::new("VM_NOT_FOUND", "no VM x");
        let wire = fault.on_wire(true, Dialect::V32);
        assert_eq!(
            (wire.fault_code, wire.fault_string.as_str()),
            (1, "exceptions.Exception:VM_NOT_FOUND: no VM x")
        );
        let wire = fault.on_wire(true, Dialect::V33);
        assert!(wire.fault_string.starts_with("<type 'exceptions.Exception'>:"));
        assert_eq!(fault.on_wire(false, Dialect::V32).fault_code, 200);
    }

    #[test]
    fn a_failed_store_does_not_claim_that_nothing_was_changed() {
        for error in [StoreError::Io("x".to_owned()), StoreError::Damaged("x".to_owned())] {
            let text = ApiFault::from(error).text;
            assert!(!text.contains("nothing was changed") && text.contains("look before"), "{text}");
        }
        assert!(ApiFault::from(StoreError::DiskFull("x".to_owned())).text.ends_with("nothing was changed"));
    }
}
