//! From the errors of domains and drivers to the faults that jobs keep: a stable name each, listed in `api`'s
//! table.

use crate::job::JobFault;
use crate::machine::MachineError;
use crate::machine::files::FileError;
use crate::xen::ToolstackError;

/// After anything but a time-out or a lost connection, the toolstack has changed nothing (`xen::Toolstack`).
pub fn toolstack(error: ToolstackError) -> JobFault {
    let text = error.to_string();
    match error {
        ToolstackError::NoSuchDomain => JobFault::refusal("VM_STATE", text),
        ToolstackError::Exists => JobFault::refusal("VM_EXISTS", text),
        ToolstackError::OutOfMemory { .. } => JobFault::refusal("OUT_OF_MEMORY", text),
        ToolstackError::BadState(_) => JobFault::refusal("VM_STATE", text),
        ToolstackError::Failed(_) => JobFault::refusal("TOOLSTACK_FAILED", text),
        ToolstackError::Timeout => JobFault::new("TOOLSTACK_TIMEOUT", text),
        ToolstackError::Unreachable(_) => JobFault::new("TOOLSTACK_UNREACHABLE", text),
    }
}

pub fn machine(error: MachineError) -> JobFault {
    let text = error.to_string();
    match error {
        MachineError::Invalid(_) => JobFault::refusal("INVALID_PARAMETER", text),
        MachineError::Unavailable(_) => JobFault::refusal("NOT_AVAILABLE", text),
        MachineError::Failed(_) => JobFault::new("HOST_FAILED", text),
        MachineError::Timeout(_) => JobFault::new("HOST_TIMEOUT", text),
    }
}

pub fn files(error: FileError) -> JobFault {
    let full = std::error::Error::source(&error)
        .and_then(|s| s.downcast_ref::<std::io::Error>())
        .is_some_and(|e| e.kind() == std::io::ErrorKind::StorageFull);
    JobFault::new(if full { "DISK_FULL" } else { "FILE_FAILED" }, error.to_string())
}
