//! What is kept of a VM.

use crate::model::{Bytes, JobId, RepoId, SafePath, Text, Timestamp, VmId};
use crate::store::Table;
use crate::xen::config::DomainConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The table of VMs: desired state, so it is in the ledger too.
pub const VMS: Table<VmRecord> = Table::new("vm", 1);

/// What we want of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    Off,
    On,
    /// Its memory lies in a file; starting it means restoring that.
    Saved {
        file: SafePath,
        at: Timestamp,
    },
}

/// How a VM came to be off, if it went off by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndCause {
    /// We stopped it.
    Asked,
    /// The guest powered itself off.
    Poweroff,
    Crash,
    Watchdog,
    /// Its domain was gone when we looked.
    Unknown,
}

/// A dump of a VM's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreDump {
    /// `20261122-013000-17`: when, and the job that made it.
    pub date: String,
    pub file: SafePath,
    pub size: Bytes,
    pub job: JobId,
}

/// A manager's own value, kept and given back, never interpreted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum KeptValue {
    Bool(bool),
    Int(i64),
    Text(KeptText),
    List(Vec<KeptText>),
}

pub type KeptText = Text<4096>;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    pub config: DomainConfig,
    pub repo: RepoId,
    pub intent: Intent,
    /// `configure_vm_ha`: restart it on another host if this one dies. Kept for the pool.
    pub ha: bool,
    /// The dialect's own names for what we hold typed (`OVM_domain_type`, `guest_os_type`, …) and unknown
    /// `OVM_*` keys, as the manager sent them. At most 64.
    pub kept: BTreeMap<String, KeptValue>,
    pub created: Timestamp,
    /// When the intent was last carried out.
    pub changed: Timestamp,
    pub last_end: Option<EndCause>,
    #[serde(default)]
    pub cores: Vec<CoreDump>,
    /// Its last checkpoint.
    #[serde(default)]
    pub checkpoint: Option<SafePath>,
    /// Crashes in a row, each soon after a start: a VM that crashes again and again is not restarted for ever.
    #[serde(default)]
    pub crashes_in_a_row: u32,
}

impl VmRecord {
    pub fn id(&self) -> VmId {
        self.config.vm
    }

    /// Tells this configuration from any other of the VM: the CRC-32C of its JSON, stable over restarts. What the
    /// VM does meanwhile (its intent, its cores) is no part of it.
    pub fn mark(&self) -> u32 {
        // A record that could not be written would not be here; 0 then only means that a plan is made again.
        serde_json::to_vec(&(&self.config, &self.kept, &self.repo, self.ha))
            .map_or(0, |json| crc32c::crc32c(&json))
    }

    /// The lock that guards this VM.
    pub fn lock(id: VmId) -> String {
        format!("vm/{id}")
    }
}
