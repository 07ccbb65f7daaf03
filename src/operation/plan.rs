//! Plans: what a caller asks of a VM or the host, as steps and locks. Pure, so that a dry run answers exactly
//! what a real run would do.
//!
//! Every job that touches anything takes `host` at least shared, so that a reboot of the host, which takes it alone, waits for all
//! and lets none in.

use super::memory_steps::CHECKPOINT;
use super::migrate_in::Document;
use super::migrate_out::Going;
use super::step::{Hotplug, Step};
use crate::config;
use crate::host::{Peer, PeerAddress};
use crate::job::{LockWant, PlannedStep};
use crate::model::{MigrationId, SafePath, VmId};
use crate::vm::{Action, Autostart, VmRecord};
use crate::xen::Trigger;
use crate::xen::config::DomainConfig;

/// A plan: the steps in order, and the locks they need.
#[derive(Debug, Clone)]
pub struct Plan {
    pub about: String,
    pub locks: Vec<LockWant>,
    pub steps: Vec<PlannedStep>,
    /// May use the reserve of disk space: it frees something, or ends something.
    pub essential: bool,
    /// How long its steps may wait for guests and clocks, seconds: its deadline lies beyond that.
    pub waits_s: u64,
}

impl Plan {
    pub(super) fn new(about: impl Into<String>, locks: Vec<LockWant>, steps: Vec<Step>) -> Self {
        let waits_s = steps.iter().map(Step::waits_s).sum();
        let steps = steps.into_iter().map(Step::planned).collect();
        Self { about: about.into(), locks, steps, essential: false, waits_s }
    }

    pub(super) fn essential(mut self) -> Self {
        self.essential = true;
        self
    }
}

/// Names and MACs are unique on the host; whoever changes one holds this.
const NAMES: &str = "vm-names";

fn vm_locks(vm: VmId) -> Vec<LockWant> {
    vec![LockWant::shared("host"), LockWant::exclusive(VmRecord::lock(vm))]
}

fn naming_locks(vm: VmId) -> Vec<LockWant> {
    let mut locks = vm_locks(vm);
    locks.push(LockWant::exclusive(NAMES));
    locks
}

fn host_locks(part: &str) -> Vec<LockWant> {
    vec![LockWant::shared("host"), LockWant::exclusive(part)]
}

pub fn create_vm(record: VmRecord) -> Plan {
    let about = format!("create VM {}", record.config.name);
    let locks = naming_locks(record.id());
    let check = Step::CheckNewVm { vm: record.id() };
    let steps = vec![check, Step::PutVm { record: Box::new(record), created: true, from: None }];
    Plan::new(about, locks, steps)
}

/// Replaces the configuration of a VM that is off.
pub fn set_vm_config(old: &VmRecord, new: VmRecord) -> Plan {
    let vm = new.id();
    let steps = vec![
        Step::CheckVm { vm, action: Action::Reconfigure, base: Some(old.mark()) },
        Step::PutVm { record: Box::new(new), created: false, from: None },
    ];
    Plan::new(format!("set the configuration of VM {vm}"), naming_locks(vm), steps)
}

/// Changes a VM from `old` to `new`, in the running domain too if it has one.
///
/// Whether it has one is known only under its lock, so the plan plugs in any case; without a living domain there
/// is nothing to plug, and the step does nothing.
pub fn configure_vm(old: &VmRecord, new: VmRecord) -> Plan {
    let vm = new.id();
    let mut steps = vec![Step::CheckVm { vm, action: Action::Configure, base: None }];
    let changes = hotplugs(&old.config, &new.config);
    steps.extend(changes.into_iter().map(|change| Step::Hotplug { vm, change }));
    steps.push(Step::PutVm { record: Box::new(new), created: false, from: Some(Box::new(old.clone())) });
    Plan::new(format!("configure VM {vm}"), naming_locks(vm), steps)
}

/// What to plug and unplug to come from one configuration to the other. What attaches comes first: a failure
/// then still leaves the guest all it had.
pub fn hotplugs(old: &DomainConfig, new: &DomainConfig) -> Vec<Hotplug> {
    let mut changes = Vec::new();
    let mut detach = Vec::new();
    for disk in &new.disks {
        match old.disks.iter().find(|d| d.device == disk.device) {
            Some(same) if same == disk => {}
            Some(other) => {
                // The same place cannot be taken twice: this one is detached first.
                changes.push(Hotplug::DetachDisk(other.clone()));
                changes.push(Hotplug::AttachDisk(disk.clone()));
            }
            None => changes.push(Hotplug::AttachDisk(disk.clone())),
        }
    }
    for vif in &new.vifs {
        match old.vifs.iter().find(|v| v.mac == vif.mac) {
            Some(same) if same == vif => {}
            Some(other) => {
                changes.push(Hotplug::DetachVif(other.clone()));
                changes.push(Hotplug::AttachVif(vif.clone()));
            }
            None => changes.push(Hotplug::AttachVif(vif.clone())),
        }
    }
    let gone_disks = old.disks.iter().filter(|d| !new.disks.iter().any(|n| n.device == d.device));
    detach.extend(gone_disks.map(|d| Hotplug::DetachDisk(d.clone())));
    let gone_vifs = old.vifs.iter().filter(|v| !new.vifs.iter().any(|n| n.mac == v.mac));
    detach.extend(gone_vifs.map(|v| Hotplug::DetachVif(v.clone())));
    if old.vcpus != new.vcpus {
        changes.push(Hotplug::Vcpus { online: new.vcpus, before: old.vcpus });
    }
    if old.memory != new.memory {
        changes.push(Hotplug::Memory { target: new.memory, before: old.memory });
    }
    if (old.cpu_weight, old.cpu_cap) != (new.cpu_weight, new.cpu_cap) {
        let before = (old.cpu_weight, old.cpu_cap);
        changes.push(Hotplug::Scheduling { weight: new.cpu_weight, cap: new.cpu_cap, before });
    }
    changes.extend(detach);
    changes
}

pub fn configure_vm_ha(vm: VmId, enabled: bool) -> Plan {
    let steps = vec![Step::SetHa { vm, enabled }];
    Plan::new(format!("switch high availability of VM {vm}"), vm_locks(vm), steps)
}

pub fn vm_autostart(vm: VmId, autostart: Autostart) -> Plan {
    let steps = vec![Step::SetAutostart { vm, autostart }];
    Plan::new(format!("set the autostart of VM {vm}"), vm_locks(vm), steps)
}

pub fn delete_vm(record: &VmRecord) -> Plan {
    let vm = record.id();
    // Files go after the record: a crash in between leaves a file nobody needs, not a record without its file.
    let steps = vec![
        Step::CheckVm { vm, action: Action::Delete, base: None },
        Step::DeleteVm { vm },
        Step::RemoveLeftFiles {},
    ];
    Plan::new(format!("delete VM {}", record.config.name), naming_locks(vm), steps).essential()
}

pub fn start_vm(vm: VmId) -> Plan {
    let steps = vec![Step::CheckVm { vm, action: Action::Start, base: None }, Step::CreateDomain { vm }];
    Plan::new(format!("start VM {vm}"), vm_locks(vm), steps)
}

pub fn stop_vm(vm: VmId, force: bool, settings: &config::Vm) -> Plan {
    let mut steps = vec![Step::CheckVm { vm, action: Action::Stop, base: None }];
    if !force {
        steps.push(Step::ShutdownDomain { vm, timeout_s: settings.shutdown_timeout_s, then_force: false });
    }
    steps.push(Step::DestroyDomain { vm, host_goes_down: false });
    Plan::new(format!("stop VM {vm}"), vm_locks(vm), steps).essential()
}

/// As `stop_vm`, but a guest that does not end is ended: the host goes down.
pub fn stop_vm_for_power(vm: VmId, settings: &config::Vm) -> Plan {
    let steps = vec![
        Step::CheckVm { vm, action: Action::Stop, base: None },
        Step::ShutdownDomain { vm, timeout_s: settings.shutdown_timeout_s, then_force: true },
        Step::DestroyDomain { vm, host_goes_down: true },
    ];
    Plan::new(format!("stop VM {vm}"), vm_locks(vm), steps).essential()
}

/// The guest gets `timeout_s` to end by itself; then its domain is ended all the same, as a reboot was asked.
pub fn reboot_vm(vm: VmId, timeout_s: u64) -> Plan {
    let steps = vec![
        Step::CheckVm { vm, action: Action::Reboot, base: None },
        Step::AskReboot { vm, timeout_s },
        Step::ClearDomain { vm, rebuild_on_undo: true },
        Step::RebuildDomain { vm },
    ];
    Plan::new(format!("reboot VM {vm}"), vm_locks(vm), steps)
}

pub fn pause_vm(vm: VmId) -> Plan {
    let steps = vec![Step::CheckVm { vm, action: Action::Pause, base: None }, Step::PauseDomain { vm }];
    Plan::new(format!("pause VM {vm}"), vm_locks(vm), steps)
}

pub fn unpause_vm(vm: VmId) -> Plan {
    let steps = vec![Step::CheckVm { vm, action: Action::Unpause, base: None }, Step::UnpauseDomain { vm }];
    Plan::new(format!("unpause VM {vm}"), vm_locks(vm), steps)
}

pub fn save_vm(vm: VmId, file: SafePath, checkpoint: bool) -> Plan {
    let file = if checkpoint { checkpoint_file(vm, file) } else { file };
    let mut steps = vec![
        Step::CheckVm { vm, action: Action::Save, base: None },
        Step::SaveDomain { vm, file, checkpoint },
    ];
    if checkpoint {
        // The one before: a VM has one checkpoint, and is never without while a new one is written.
        steps.push(Step::RemoveLeftFiles {});
    }
    Plan::new(format!("save VM {vm}"), vm_locks(vm), steps)
}

/// A checkpoint tells by its name that it is one: its guest lives on, so it is not the memory of a VM that is
/// saved.
fn checkpoint_file(vm: VmId, file: SafePath) -> SafePath {
    let own = format!("/{vm}.");
    let marked = file.as_str().replacen(&own, &format!("{own}{CHECKPOINT}"), 1);
    SafePath::parse(&marked).unwrap_or(file)
}

pub fn restore_vm(record: &VmRecord, paused: bool) -> Plan {
    let vm = record.id();
    let steps = vec![
        Step::CheckVm { vm, action: Action::Restore, base: None },
        Step::RestoreDomain { vm, paused },
        Step::RemoveLeftFiles {},
    ];
    Plan::new(format!("restore VM {vm}"), vm_locks(vm), steps)
}

pub fn sysrq_vm(vm: VmId, letter: char) -> Plan {
    let steps = vec![Step::CheckVm { vm, action: Action::Signal, base: None }, Step::Sysrq { vm, letter }];
    Plan::new(format!("send SysRq {letter} to VM {vm}"), vm_locks(vm), steps)
}

pub fn trigger_vm(vm: VmId, trigger: Trigger, vcpu: Option<u32>) -> Plan {
    let steps =
        vec![Step::CheckVm { vm, action: Action::Signal, base: None }, Step::Trigger { vm, trigger, vcpu }];
    Plan::new(format!("trigger an event in VM {vm}"), vm_locks(vm), steps)
}

pub fn send_to_guest(vm: VmId, values: Vec<(String, String)>) -> Plan {
    let mut steps = vec![Step::CheckVm { vm, action: Action::Signal, base: None }];
    steps.extend(values.into_iter().map(|(key, value)| Step::SendToGuest { vm, key, value }));
    Plan::new(format!("send values to the guest of VM {vm}"), vm_locks(vm), steps)
}

/// `reset`: the VM is started again after a dump that ended it.
pub fn dump_vm_core(vm: VmId, date: &str, file: SafePath, live: bool, crash: bool, reset: bool) -> Plan {
    let mut steps = vec![
        Step::CheckVm { vm, action: Action::DumpCore, base: None },
        Step::DumpCore { vm, file: file.clone(), live, crash, rebuild_on_undo: crash && reset },
        Step::RecordCore { vm, date: date.to_owned(), file },
    ];
    if crash || reset {
        steps.push(Step::ClearDomain { vm, rebuild_on_undo: reset });
        steps.push(if reset {
            Step::RebuildDomain { vm }
        } else {
            Step::DestroyDomain { vm, host_goes_down: false }
        });
    }
    Plan::new(format!("dump the core of VM {vm}"), vm_locks(vm), steps)
}

pub fn delete_vm_core(record: &VmRecord, date: &str) -> Option<Plan> {
    let vm = record.id();
    let core = record.cores.iter().find(|core| core.date == date)?;
    let forget = Step::ForgetCore { vm, date: date.to_owned() };
    let steps = vec![forget, Step::RemoveFile { file: core.file.clone() }];
    Some(Plan::new(format!("delete the core dump {date} of VM {vm}"), vm_locks(vm), steps).essential())
}

/// Takes a running or paused VM to a peer. `limit_s`: until the handover.
pub fn migrate_vm(going: Going, live: bool, limit_s: u64) -> Plan {
    let (vm, dest) = (going.vm, going.dest.clone());
    let steps = vec![
        Step::CheckVm { vm, action: Action::Migrate, base: None },
        Step::PrepareTarget { going: going.clone() },
        Step::SendDomain { going: going.clone(), live, limit_s },
        Step::CommitMigration { going: going.clone() },
        Step::TellTarget { going },
    ];
    Plan::new(format!("migrate VM {vm} to {dest}"), vm_locks(vm), steps)
}

pub fn settle_migration(going: Going) -> Plan {
    let vm = going.vm;
    let about = format!("settle the migration of VM {vm}");
    Plan::new(about, vm_locks(vm), vec![Step::SettleMigration { going }]).essential()
}

pub fn receive_vm(document: Document, source: String, limit_s: u64) -> Plan {
    let about = format!("receive VM {}", document.record.config.name);
    let locks = vm_locks(document.record.id());
    let step = Step::ReceiveDomain { document: Box::new(document), source, limit_s };
    Plan::new(about, locks, vec![step])
}

/// What came is this host's, by its source's word or a human's.
pub fn take_over(id: MigrationId, vm: VmId) -> Plan {
    let steps = vec![Step::TakeOver { id }, Step::LetRun { vm }];
    Plan::new(format!("take VM {vm} over"), vm_locks(vm), steps).essential()
}

pub fn drop_arrival(id: MigrationId, vm: VmId) -> Plan {
    let about = format!("destroy the copy of VM {vm}");
    Plan::new(about, vm_locks(vm), vec![Step::DropArrival { id }]).essential()
}

pub fn force_leaving(vm: VmId, keep: bool) -> Plan {
    let about = format!("decide who runs VM {vm}");
    Plan::new(about, vm_locks(vm), vec![Step::ForceLeaving { vm, keep }]).essential()
}

pub fn add_peer(peer: Peer) -> Plan {
    host_change(format!("trust the peer at {}", peer.address), "peers", Step::PutPeer { peer })
}

pub fn remove_peer(address: PeerAddress) -> Plan {
    host_change(format!("trust the peer at {address} no more"), "peers", Step::RemovePeer { address })
}

/// A domain changed without us: make record and world agree.
pub fn settle_vm(vm: VmId) -> Plan {
    let steps = vec![Step::InspectDomain { vm }, Step::SettleClear { vm }, Step::SettleRebuild { vm }];
    Plan::new(format!("settle VM {vm}"), vm_locks(vm), steps).essential()
}

/// A change of the host outside its power: clock, time zone, NTP, password, certificate, ownership.
pub fn host_change(about: impl Into<String>, part: &str, step: Step) -> Plan {
    Plan::new(about, host_locks(part), vec![step])
}

/// Ends every VM, then the host.
pub fn power(off: bool, boot_id: String) -> Plan {
    let about = if off { "switch the host off" } else { "reboot the host" };
    let locks = vec![LockWant::exclusive("host")];
    Plan::new(about, locks, vec![Step::StopAllVms { boot_id: boot_id.clone() }, Step::Power { off, boot_id }])
        .essential()
}

/// The host has booted anew. Without a lock, since it may take hours: what it does is done by jobs of their own.
pub fn host_boot(boot_id: &str, waits_s: u64) -> Plan {
    let boot_id = boot_id.to_owned();
    let steps = vec![
        Step::TakeBoot { boot_id: boot_id.clone() },
        Step::NetworkAtBoot { boot_id: boot_id.clone() },
        Step::Autostart { boot_id },
    ];
    let plan = Plan::new("see to the VMs after the host's boot", vec![], steps).essential();
    Plan { waits_s, ..plan }
}

/// Alone on the host: no job is to be in the middle of a VM's start while that VM is taken for off.
pub fn take_boot(boot_id: &str) -> Plan {
    let step = Step::WriteBoot { boot_id: boot_id.to_owned() };
    Plan::new("write down the host's boot", vec![LockWant::exclusive("host")], vec![step]).essential()
}

/// Without a lock: it touches nothing, and a reboot that waited for it would keep everybody else waiting too.
pub fn sleep(ms: u64) -> Plan {
    Plan::new(format!("wait {ms} ms"), vec![], vec![Step::Sleep { ms }])
}

pub fn discover() -> Plan {
    Plan::new("look at all domains", vec![LockWant::shared("host")], vec![Step::Discover {}]).essential()
}

pub fn prune() -> Plan {
    Plan::new("prune history", vec![LockWant::shared("host")], vec![Step::Prune {}]).essential()
}

pub fn renew_certificate_if_due() -> Plan {
    host_change("renew the certificate if it is time", "certificate", Step::RenewCertificate { if_due: true })
}
