//! What is kept of a VM.

use crate::model::{Bytes, JobId, MigrationId, RepoId, SafePath, Text, Timestamp, VmId};
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
    /// Another host may have it: whoever the source's judge ([`super::migration`]) says runs it. Nothing starts
    /// it here meanwhile.
    Leaving(Leaving),
}

/// A VM on its way to another host, as its source remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    pub id: MigrationId,
    /// The peer it goes to.
    pub dest: String,
    pub since: Timestamp,
    /// It was given out of our hands: it never runs here again unless it is seen running here. `false`: only kept
    /// from being taken for off until the other host can be asked.
    pub handed_over: bool,
    pub was_paused: bool,
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
    /// Its host went down with it, or it was stopped because the host was to go down.
    HostDown,
    /// Its domain was gone when we looked.
    Unknown,
}

/// Whether and when a VM is started after its host has booted.
///
/// It starts only what ran when the host went down: a VM that somebody stopped stays off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Autostart {
    pub enabled: bool,
    /// Lower ones first; those of one order start together.
    pub order: u32,
    /// After its start, so long until the VMs of the next order are started, seconds.
    pub delay_s: u32,
}

impl Autostart {
    pub const ORDERS: std::ops::RangeInclusive<u32> = 0..=9999;
    pub const DELAYS_S: std::ops::RangeInclusive<u32> = 0..=3600;
}

/// In the middle, so that others can be put before and after those that nobody has given a place.
impl Default for Autostart {
    fn default() -> Self {
        Self { enabled: false, order: 1000, delay_s: 0 }
    }
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
    /// As `vm_autostart` has set it; `None`: as the settings say for all (`vm.autostart_default`).
    #[serde(default)]
    pub autostart: Option<Autostart>,
    /// It was seen to crash, its domain was cleared away, and it is to be started again, which has not been done yet.
    #[serde(default)]
    pub crash_seen: Option<EndCause>,
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

    /// This change, planned from `old`, upon `now`: what others have changed since stays, what both have changed is
    /// as this one says. `None`: the two do not go together.
    pub fn rebased(&self, old: &Self, now: &Self) -> Option<Self> {
        let config = rebased_config(&old.config, &self.config, &now.config)?;
        let mut kept = now.kept.clone();
        let told = self.kept.iter().filter(|(key, value)| old.kept.get(*key) != Some(*value));
        kept.extend(told.map(|(key, value)| (key.clone(), value.clone())));
        let ha = if old.ha == self.ha { now.ha } else { self.ha };
        Some(Self { config, kept, ha, ..now.clone() })
    }

    /// The lock that guards this VM.
    pub fn lock(id: VmId) -> String {
        format!("vm/{id}")
    }
}

fn rebased_config(old: &DomainConfig, new: &DomainConfig, now: &DomainConfig) -> Option<DomainConfig> {
    let fields = |config: &DomainConfig| serde_json::to_value(config).ok();
    let (old, new, mut merged) = (fields(old)?, fields(new)?, fields(now)?);
    for (name, value) in new.as_object()? {
        if old[name] == *value {
            continue;
        }
        merged[name] = match name.as_str() {
            "disks" => rebased_list("device", &old[name], value, &merged[name])?,
            "vifs" => rebased_list("mac", &old[name], value, &merged[name])?,
            _ => value.clone(),
        };
    }
    let merged: DomainConfig = serde_json::from_value(merged).ok()?;
    (merged.vcpus <= merged.max_vcpus && merged.memory <= merged.max_memory).then_some(merged)
}

/// The same for a list of devices, each known by its `key`.
fn rebased_list(
    key: &str,
    old: &serde_json::Value,
    new: &serde_json::Value,
    now: &serde_json::Value,
) -> Option<serde_json::Value> {
    let find = |list: &serde_json::Value, device: &serde_json::Value| {
        list.as_array().and_then(|all| all.iter().find(|d| d[key] == device[key]).cloned())
    };
    let mut merged = Vec::new();
    for device in now.as_array()? {
        match (find(old, device), find(new, device)) {
            (Some(_), None) => {}
            (before, Some(after)) if before.as_ref() != Some(&after) => merged.push(after),
            _ => merged.push(device.clone()),
        }
    }
    let added = new.as_array()?.iter().filter(|d| find(old, d).is_none() && find(now, d).is_none());
    merged.extend(added.cloned());
    Some(merged.into())
}
