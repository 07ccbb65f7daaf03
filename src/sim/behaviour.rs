//! How a guest answers what is done to it. A test gives one to a VM, or changes the default for all.

use super::Reason;
use serde::{Deserialize, Serialize};

/// What a guest does. Read when its domain is built or receives a request, so a change also reaches a guest
/// that runs already, but for `boot_ms` and `ends_by_itself`, which count from the domain's start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Behaviour {
    /// From the domain's start until the guest heeds a request to shut down or reboot.
    pub boot_ms: u64,
    /// From such a request until the guest has ended.
    pub shutdown_ms: u64,
    /// The guest never heeds such a request (nor the power button).
    pub ignores_shutdown: bool,
    pub ends_by_itself: Option<EndsByItself>,
    /// How long its memory takes to be sent to another host.
    pub migration_ms: u64,
}

/// The guest ends without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndsByItself {
    /// After the domain's start.
    pub after_ms: u64,
    pub reason: Reason,
}

impl Default for Behaviour {
    /// A quick, obedient guest.
    fn default() -> Self {
        Self { boot_ms: 100, shutdown_ms: 50, ignores_shutdown: false, ends_by_itself: None, migration_ms: 0 }
    }
}

impl Behaviour {
    pub fn deaf() -> Self {
        Self { ignores_shutdown: true, ..Self::default() }
    }

    pub fn crashing_after(after_ms: u64) -> Self {
        Self::ending_after(after_ms, Reason::Crash)
    }

    pub fn ending_after(after_ms: u64, reason: Reason) -> Self {
        Self { ends_by_itself: Some(EndsByItself { after_ms, reason }), ..Self::default() }
    }
}
