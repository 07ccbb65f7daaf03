//! Adoption: at its start the agent finds domains that run and records that say what should run, and each domain
//! gets exactly one verdict, each record too. Pure: records, domains and facts go in, verdicts come out.
//!
//! Words: a domain is *adopted* by the record of its UUID, and by nothing else: domids are given anew at each boot,
//! and a name is only a name. A domain that no record adopts is *unknown*: it is told and never touched. *Evidence* is
//! what is written down of why a domain is gone: an open job of an earlier life, a crash that was seen, the boot id.
//!
//! What has gone without evidence stays off: its disks may be in use elsewhere, and never running twice comes before
//! running at all.
//!
//! Not here: the boot id is read and kept, and verdicts are carried out, by `operation`.

use super::record::{Autostart, EndCause, Intent, VmRecord};
use crate::model::VmId;
use crate::xen::{DomId, DomainInfo, RunState};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The host's boot now, beside the one that was last written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// The agent alone was restarted.
    Same,
    /// The host was: every domain of before is gone with it.
    New,
    /// No boot was written down yet, or this one cannot be read: no evidence of anything.
    Unknown,
}

/// What adoption knows besides records and domains.
pub struct Facts<'a> {
    pub boot: Boot,
    /// `vm.autostart_default`
    pub autostart_default: bool,
    /// Whether a job of an earlier life is open on this VM: it knows what it does.
    pub in_job: &'a dyn Fn(VmId) -> bool,
    /// Whether a VM without a record is on its way here from another host.
    pub arriving: &'a dyn Fn(VmId) -> bool,
}

/// Whether this VM may run on another host, to which it was on its way. Then nothing of it is started or settled here
/// but by the migration itself.
fn leaving(record: &VmRecord) -> bool {
    matches!(record.intent, Intent::Leaving(_))
}

/// What a domain is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainVerdict {
    Adopted(VmId),
    /// No record has its UUID; `same_name`: a record has its name all the same.
    Unknown {
        same_name: Option<VmId>,
    },
    /// Another domain has been adopted for this VM. Told, never touched.
    Double(VmId),
    /// The VM is under migration, which decides about this domain.
    Migrating(VmId),
    /// It is being taken apart, and nobody's any more.
    Dying,
}

/// What is to be done for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmVerdict {
    /// It has a domain; what may have happened to that is settled as at any other time.
    HasDomain,
    /// Off, as it should be.
    Off,
    Saved,
    /// An open job of an earlier life decides.
    InJob,
    /// The migration decides.
    Migrating,
    /// Its domain has gone, nobody knows why: off, cause unknown.
    Gone,
    /// Its domain went with the host: off, that cause.
    WentWithHost,
    /// It is started again, and this is why.
    Restart(Evidence),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// It was seen to crash, and was to be started again.
    CrashSeen,
    /// The host has booted anew, the VM went down with it, and autostart is set.
    HostBooted,
}

/// The verdicts, in the order of what was given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Adoption {
    pub domains: Vec<(DomId, DomainVerdict)>,
    pub vms: Vec<(VmId, VmVerdict)>,
}

/// Decides. dom0 is not asked about and has no verdict.
pub fn adopt(records: &[Arc<VmRecord>], domains: &[DomainInfo], facts: &Facts<'_>) -> Adoption {
    let by_id: HashMap<VmId, &VmRecord> = records.iter().map(|r| (r.id(), &**r)).collect();
    let by_name: HashMap<&str, VmId> = records.iter().map(|r| (r.config.name.as_str(), r.id())).collect();
    let chosen = chosen(domains);
    let mut adopted = HashSet::new();
    let mut verdict = |domain: &DomainInfo| {
        if domain.state == RunState::Dying {
            return DomainVerdict::Dying;
        }
        let Some(record) = domain.vm.and_then(|vm| by_id.get(&vm)) else {
            if let Some(vm) = domain.vm.filter(|vm| (facts.arriving)(*vm)) {
                return DomainVerdict::Migrating(vm);
            }
            return DomainVerdict::Unknown { same_name: by_name.get(domain.name.as_str()).copied() };
        };
        let vm = record.id();
        if leaving(record) {
            DomainVerdict::Migrating(vm)
        } else if chosen.get(&vm) == Some(&domain.domid) && adopted.insert(vm) {
            DomainVerdict::Adopted(vm)
        } else {
            DomainVerdict::Double(vm)
        }
    };
    let guests = domains.iter().filter(|d| d.domid != DomId(0));
    let domains = guests.map(|d| (d.domid, verdict(d))).collect();
    let vms = records.iter().map(|r| (r.id(), of_record(r, adopted.contains(&r.id()), facts))).collect();
    Adoption { domains, vms }
}

/// Of several domains of one VM: one that lives before one that has ended, then the oldest.
fn chosen(domains: &[DomainInfo]) -> HashMap<VmId, DomId> {
    let mut chosen: HashMap<VmId, (bool, DomId)> = HashMap::new();
    let candidates = domains.iter().filter(|d| d.domid != DomId(0) && d.state != RunState::Dying);
    for (vm, domain) in candidates.filter_map(|d| d.vm.map(|vm| (vm, d))) {
        let rank = (matches!(domain.state, RunState::Shutdown(_)), domain.domid);
        let best = chosen.entry(vm).or_insert(rank);
        *best = rank.min(*best);
    }
    chosen.into_iter().map(|(vm, (_, domid))| (vm, domid)).collect()
}

fn of_record(record: &VmRecord, has_domain: bool, facts: &Facts<'_>) -> VmVerdict {
    if has_domain {
        return VmVerdict::HasDomain;
    }
    match record.intent {
        Intent::Leaving(_) => VmVerdict::Migrating,
        _ if (facts.in_job)(record.id()) => VmVerdict::InJob,
        Intent::On if record.crash_seen.is_some() => VmVerdict::Restart(Evidence::CrashSeen),
        Intent::On if facts.boot == Boot::New => match record.starts_by_itself(facts.autostart_default) {
            true => VmVerdict::Restart(Evidence::HostBooted),
            false => VmVerdict::WentWithHost,
        },
        Intent::On => VmVerdict::Gone,
        Intent::Off
            if facts.boot == Boot::New
                && record.last_end == Some(EndCause::HostDown)
                && record.starts_by_itself(facts.autostart_default) =>
        {
            VmVerdict::Restart(Evidence::HostBooted)
        }
        Intent::Off => VmVerdict::Off,
        Intent::Saved { .. } => VmVerdict::Saved,
    }
}

impl VmRecord {
    /// Whether it is to be started when its host has booted.
    pub fn starts_by_itself(&self, default: bool) -> bool {
        self.autostart.map_or(default, |autostart| autostart.enabled)
    }

    /// Whether its start after the host's boot is still to come: it went down with the host, nobody has started or
    /// stopped it since, and nothing says that it may run elsewhere.
    pub fn awaits_autostart(&self, default: bool) -> bool {
        self.intent == Intent::Off
            && self.last_end == Some(EndCause::HostDown)
            && self.starts_by_itself(default)
    }

    /// Its place among those that start by themselves.
    pub fn autostart_place(&self) -> Autostart {
        self.autostart.unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "adopt_tests.rs"]
mod tests;
