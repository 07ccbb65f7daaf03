//! What may be done with a VM in which state: one table, published by `verb_list`, asked by every VM verb under
//! the VM's lock. Pure.
//!
//! ```text
//!          create            start                 pause
//!  (none) ───────► off ──────────────► running ◄──────────► paused
//!            ▲      ▲ ▲  stop, guest ends │  │ save            │ save
//!     delete │      │ └───────────────────┘  ▼                 │
//!          (off)    │      restore        saved ◄──────────────┘
//!                   └─ discard (delete) ──  │
//!                            running ◄──────┘
//! ```
//! `ended` is a domain that has shut down, rebooted or crashed by itself and waits for our runner; it lasts only
//! as long as the runner takes. `leaving` is a VM that was handed over to another host (see `migration`).

use super::record::Intent;
use crate::xen::{DomainInfo, RunState};

/// What a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VmState {
    Off,
    Running,
    Paused,
    Saved,
    /// The domain has ended by itself and is not cleared away yet.
    Ended,
    /// It was handed over to another host, and it is not settled yet who runs it.
    Leaving,
}

impl VmState {
    pub const ALL: [Self; 6] =
        [Self::Off, Self::Running, Self::Paused, Self::Saved, Self::Ended, Self::Leaving];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saved => "saved",
            Self::Ended => "ended",
            Self::Leaving => "leaving",
        }
    }
}

/// What a VM is, by what we want and by its domain as just read.
pub fn state_of(intent: &Intent, domain: Option<&DomainInfo>) -> VmState {
    if matches!(intent, Intent::Leaving(_)) {
        return VmState::Leaving;
    }
    match domain.map(|d| d.state) {
        Some(RunState::Running | RunState::Blocked) => VmState::Running,
        Some(RunState::Paused) => VmState::Paused,
        Some(RunState::Shutdown(_) | RunState::Dying) => VmState::Ended,
        None if matches!(intent, Intent::Saved { .. }) => VmState::Saved,
        None => VmState::Off,
    }
}

/// What a caller may ask of an existing VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Start,
    Stop,
    Reboot,
    Pause,
    Unpause,
    Save,
    Restore,
    Delete,
    /// Changes of what it has: disks, vifs, CPUs, memory.
    Configure,
    /// Replacing its configuration as a whole.
    Reconfigure,
    /// What goes to a living guest: SysRq, trigger, messages.
    Signal,
    DumpCore,
    /// To another host.
    Migrate,
}

impl Action {
    pub const ALL: [Self; 13] = [
        Self::Start,
        Self::Stop,
        Self::Reboot,
        Self::Pause,
        Self::Unpause,
        Self::Save,
        Self::Restore,
        Self::Delete,
        Self::Configure,
        Self::Reconfigure,
        Self::Signal,
        Self::DumpCore,
        Self::Migrate,
    ];

    /// As an infinitive, for messages: `start`, `dump the core of`.
    pub fn infinitive(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Reboot => "reboot",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::Delete => "delete",
            Self::Configure => "configure",
            Self::Reconfigure => "reconfigure",
            Self::Signal => "send a signal to",
            Self::DumpCore => "dump the core of",
            Self::Migrate => "migrate",
        }
    }
}

/// The action is not allowed in the VM's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {} a VM that is {}; allowed when it is {}", action.infinitive(), state.as_str(), states(*action))]
pub struct Refusal {
    pub action: Action,
    pub state: VmState,
}

fn states(action: Action) -> String {
    allowed_states(action).iter().map(|s| s.as_str()).collect::<Vec<_>>().join(" or ")
}

/// The states in which an action is allowed.
pub fn allowed_states(action: Action) -> Vec<VmState> {
    VmState::ALL.into_iter().filter(|state| allowed(*state, action).is_ok()).collect()
}

/// The table.
pub fn allowed(state: VmState, action: Action) -> Result<(), Refusal> {
    use Action::{
        Configure, Delete, DumpCore, Migrate, Pause, Reboot, Reconfigure, Restore, Save, Signal, Start, Stop,
        Unpause,
    };
    let yes = match (action, state) {
        (Start, VmState::Off) => true,
        // A saved VM is restored, not started: starting it would throw its memory away unasked.
        (Start, _) => false,
        // Stopping what is off is done already: managers repeat a stop whose answer they lost.
        (Stop, VmState::Saved | VmState::Leaving) => false,
        (Stop, _) => true,
        (Reboot, VmState::Running) => true,
        (Reboot, _) => false,
        // Repeating these is harmless, and managers do.
        (Pause | Unpause, VmState::Running | VmState::Paused) => true,
        (Pause | Unpause, _) => false,
        (Save, VmState::Running | VmState::Paused) => true,
        (Save, _) => false,
        (Restore, VmState::Saved) => true,
        (Restore, _) => false,
        // Deleting a saved VM discards its memory, as deleting any VM discards the VM.
        (Delete, VmState::Off | VmState::Saved) => true,
        (Delete, _) => false,
        (Configure, VmState::Off | VmState::Running | VmState::Paused) => true,
        // The saved memory fits the devices it was saved with.
        (Configure, _) => false,
        (Reconfigure, VmState::Off) => true,
        (Reconfigure, _) => false,
        (Signal, VmState::Running) => true,
        (Signal, _) => false,
        // A crashed guest's memory is the one most worth dumping.
        (DumpCore, VmState::Running | VmState::Paused | VmState::Ended) => true,
        (DumpCore, _) => false,
        (Migrate, VmState::Running | VmState::Paused) => true,
        (Migrate, _) => false,
    };
    if yes { Ok(()) } else { Err(Refusal { action, state }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_action_is_allowed_in_some_state_and_refused_in_another() {
        for action in Action::ALL {
            let states = allowed_states(action);
            assert!(!states.is_empty(), "{action:?}");
            assert!(states.len() < VmState::ALL.len(), "{action:?}");
        }
    }

    #[test]
    fn nothing_starts_a_vm_that_has_a_domain() {
        for state in [VmState::Running, VmState::Paused, VmState::Ended] {
            for action in [Action::Start, Action::Restore] {
                assert!(allowed(state, action).is_err(), "{action:?} when {state:?}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_is_allowed() {
        let refusal = allowed(VmState::Off, Action::Pause).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "cannot pause a VM that is off; allowed when it is running or paused"
        );
    }
}
