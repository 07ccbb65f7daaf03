//! Every kind of step there is, as data. A step says what to reach, not how; running it twice reaches the same.

use super::migrate_in::Document;
use super::migrate_out::Going;
use super::network::{CONFIRM, Options as NetworkOptions, Want};
use crate::host::record::HostRecord;
use crate::host::{Peer, PeerAddress};
use crate::job::{PlannedStep, Resume};
use crate::model::{EventNumber, JobId, MiB, MigrationId, SafePath, VmId};
use crate::network::Way;
use crate::vm::{Action, Autostart, VmRecord};
use crate::xen::Trigger;
use crate::xen::config::{Disk, Vif};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    // Guards: no effect, run under the job's locks.
    /// `base`: the mark of the configuration that the plan was made from, where it holds parts of that.
    CheckVm {
        vm: VmId,
        action: Action,
        base: Option<u32>,
    },
    CheckNewVm {
        vm: VmId,
    },
    // Records only.
    /// `from`: what the change was planned from; what others have changed since stays.
    PutVm {
        record: Box<VmRecord>,
        created: bool,
        from: Option<Box<VmRecord>>,
    },
    SetHa {
        vm: VmId,
        enabled: bool,
    },
    SetAutostart {
        vm: VmId,
        autostart: Autostart,
    },
    DeleteVm {
        vm: VmId,
    },
    RecordCore {
        vm: VmId,
        date: String,
        file: SafePath,
    },
    ForgetCore {
        vm: VmId,
        date: String,
    },
    // Domains.
    CreateDomain {
        vm: VmId,
    },
    ShutdownDomain {
        vm: VmId,
        timeout_s: u64,
        then_force: bool,
    },
    /// `host_goes_down`: it is ended for that, not because anybody wants it off.
    DestroyDomain {
        vm: VmId,
        #[serde(default)]
        host_goes_down: bool,
    },
    AskReboot {
        vm: VmId,
        timeout_s: u64,
    },
    /// `rebuild_on_undo`: the VM is to run after the job, also if that fails.
    ClearDomain {
        vm: VmId,
        #[serde(default)]
        rebuild_on_undo: bool,
    },
    RebuildDomain {
        vm: VmId,
    },
    PauseDomain {
        vm: VmId,
    },
    UnpauseDomain {
        vm: VmId,
    },
    SaveDomain {
        vm: VmId,
        file: SafePath,
        checkpoint: bool,
    },
    RestoreDomain {
        vm: VmId,
        paused: bool,
    },
    Hotplug {
        vm: VmId,
        change: Hotplug,
    },
    Sysrq {
        vm: VmId,
        letter: char,
    },
    Trigger {
        vm: VmId,
        trigger: Trigger,
        vcpu: Option<u32>,
    },
    SendToGuest {
        vm: VmId,
        key: String,
        value: String,
    },
    /// `rebuild_on_undo`: as of `ClearDomain`, where the dump itself ends the domain.
    DumpCore {
        vm: VmId,
        file: SafePath,
        live: bool,
        crash: bool,
        #[serde(default)]
        rebuild_on_undo: bool,
    },
    /// What became of a domain that changed by itself: reads the world, decides, has no effect.
    InspectDomain {
        vm: VmId,
    },
    /// Carries out what `InspectDomain` decided: clear away.
    SettleClear {
        vm: VmId,
    },
    /// And: build anew, or take the VM for off.
    SettleRebuild {
        vm: VmId,
    },
    // A VM goes to another host: see `migrate_out`.
    PrepareTarget {
        going: Going,
    },
    SendDomain {
        going: Going,
        live: bool,
        limit_s: u64,
    },
    CommitMigration {
        going: Going,
    },
    TellTarget {
        going: Going,
    },
    SettleMigration {
        going: Going,
    },
    /// A human's word: `keep` what is here.
    ForceLeaving {
        vm: VmId,
        keep: bool,
    },
    // And comes from one: see `migrate_in`.
    ReceiveDomain {
        document: Box<Document>,
        source: String,
        limit_s: u64,
    },
    TakeOver {
        id: MigrationId,
    },
    LetRun {
        vm: VmId,
    },
    DropArrival {
        id: MigrationId,
    },
    PutPeer {
        peer: Peer,
    },
    RemovePeer {
        address: PeerAddress,
    },
    RemoveFile {
        file: SafePath,
    },
    /// The files that the step before left without an owner: which they are shows only when it runs.
    RemoveLeftFiles {},
    // The host.
    SetClock {
        year: i16,
        month: i8,
        day: i8,
        hour: i8,
        minute: i8,
        second: i8,
    },
    SetTimezone {
        name: String,
        rtc_utc: bool,
    },
    SetNtp {
        servers: Vec<String>,
        local_time_source: bool,
        allow_query: bool,
    },
    EnableNtp {
        enabled: bool,
    },
    /// Only if the record is still `before`: two managers may plan at the same time.
    PutHost {
        before: Box<HostRecord>,
        record: Box<HostRecord>,
        event: String,
    },
    SetPassword {
        hash: String,
    },
    /// `if_due`: only if a third of its life or less is left.
    RenewCertificate {
        if_due: bool,
    },
    /// Stops every VM, each as a child job. `boot_id` as of `Power`: after that boot there is nothing to stop.
    StopAllVms {
        #[serde(default)]
        boot_id: String,
    },
    /// `boot_id` is the boot that is to end: a run after it has nothing more to do.
    Power {
        off: bool,
        boot_id: String,
    },
    /// Has a boot written down by a job under the host's lock.
    TakeBoot {
        boot_id: String,
    },
    /// That, with what it means for each record.
    WriteBoot {
        boot_id: String,
    },
    /// Starts what is to be started after this boot.
    Autostart {
        boot_id: String,
    },
    // A change of the network: see `network`. `caller`: who must stay reachable.
    NetworkSnapshot {
        want: Want,
        options: NetworkOptions,
        caller: Option<Way>,
    },
    NetworkApply {},
    NetworkConfirm {
        within_s: u64,
    },
    /// `answer`: what the caller is told, in words of its own.
    NetworkKeep {
        answer: Option<String>,
    },
    NetworkRestore {},
    /// After the host's boot, before VMs start.
    NetworkAtBoot {
        boot_id: String,
    },
    /// `event`: acknowledged when it ends; `of`: the change that failed.
    NetworkDiscover {
        event: Option<EventNumber>,
        of: Option<JobId>,
    },
    // The agent itself.
    Sleep {
        ms: u64,
    },
    Discover {},
    Prune {},
}

/// One change of a running domain. Applying it to a domain that has it changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hotplug {
    AttachDisk(Disk),
    DetachDisk(Disk),
    AttachVif(Vif),
    DetachVif(Vif),
    Vcpus { online: u32, before: u32 },
    Memory { target: MiB, before: MiB },
    Scheduling { weight: u16, cap: u16, before: (u16, u16) },
}

impl Hotplug {
    /// What takes it back.
    pub fn inverse(&self) -> Self {
        match self {
            Self::AttachDisk(disk) => Self::DetachDisk(disk.clone()),
            Self::DetachDisk(disk) => Self::AttachDisk(disk.clone()),
            Self::AttachVif(vif) => Self::DetachVif(vif.clone()),
            Self::DetachVif(vif) => Self::AttachVif(vif.clone()),
            Self::Vcpus { online, before } => Self::Vcpus { online: *before, before: *online },
            Self::Memory { target, before } => Self::Memory { target: *before, before: *target },
            Self::Scheduling { weight, cap, before } => {
                Self::Scheduling { weight: before.0, cap: before.1, before: (*weight, *cap) }
            }
        }
    }

    fn about(&self) -> String {
        match self {
            Self::AttachDisk(disk) => format!("attach disk {}", disk.device.as_str()),
            Self::DetachDisk(disk) => format!("detach disk {}", disk.device.as_str()),
            Self::AttachVif(vif) => format!("attach vif {} on {}", vif.mac, vif.bridge),
            Self::DetachVif(vif) => format!("detach vif {}", vif.mac),
            Self::Vcpus { online, .. } => format!("bring {online} virtual CPUs online"),
            Self::Memory { target, .. } => format!("set memory to {target}"),
            Self::Scheduling { weight, cap, .. } => format!("schedule with weight {weight}, cap {cap}"),
        }
    }
}

impl Step {
    /// The step as the engine takes it.
    pub fn planned(self) -> PlannedStep {
        let (name, about) = self.words();
        let (effect, undo, weight) = self.nature();
        PlannedStep {
            name: name.to_owned(),
            about,
            what: serde_json::to_value(&self).expect("a step's maps have text keys, so it has a JSON form"),
            effect,
            resume: self.resume(),
            undo,
            weight,
        }
    }

    /// How long it may wait by its own data, seconds.
    pub fn waits_s(&self) -> u64 {
        match self {
            Self::ShutdownDomain { timeout_s, .. } | Self::AskReboot { timeout_s, .. } => *timeout_s,
            Self::SendDomain { limit_s, .. } | Self::ReceiveDomain { limit_s, .. } => *limit_s,
            Self::Sleep { ms } => ms.div_ceil(1000),
            Self::NetworkConfirm { within_s } => *within_s,
            _ => 0,
        }
    }

    /// A guest cannot be asked whether it has heard, and hears a second time as well as the first.
    fn resume(&self) -> Resume {
        match self {
            Self::Sysrq { .. } | Self::Trigger { .. } => Resume::Undo,
            // Who asked may have been cut off by the very step that the agent died in.
            Self::NetworkApply {} | Self::NetworkConfirm { .. } => Resume::Undo,
            _ => Resume::Redo,
        }
    }

    /// Has it an effect outside the store, can it be undone, how long does it take compared to others.
    fn nature(&self) -> (bool, bool, u32) {
        match self {
            Self::CheckVm { .. } | Self::CheckNewVm { .. } => (false, false, 1),
            Self::InspectDomain { .. } => (false, false, 1),
            Self::SetAutostart { .. } | Self::WriteBoot { .. } => (false, false, 1),
            Self::TakeBoot { .. } => (false, false, 5),
            Self::Autostart { .. } => (false, false, 50),
            Self::PutVm { .. } | Self::SetHa { .. } | Self::DeleteVm { .. } | Self::PutHost { .. } => {
                (false, false, 1)
            }
            Self::RecordCore { .. } | Self::ForgetCore { .. } => (false, false, 1),
            Self::Sleep { .. } | Self::Discover {} | Self::Prune {} => (false, false, 10),
            Self::CreateDomain { .. } | Self::RestoreDomain { .. } => (true, true, 20),
            Self::PauseDomain { .. } | Self::UnpauseDomain { .. } => (true, true, 2),
            Self::Hotplug { .. } => (true, true, 5),
            Self::SaveDomain { .. } | Self::DumpCore { .. } => (true, true, 50),
            Self::ShutdownDomain { .. } | Self::AskReboot { .. } | Self::StopAllVms { .. } => {
                (true, false, 50)
            }
            Self::ClearDomain { rebuild_on_undo, .. } => (true, *rebuild_on_undo, 5),
            // What the target keeps for us, it gives back by itself.
            Self::PrepareTarget { .. } => (true, false, 2),
            Self::SendDomain { .. } => (true, true, 90),
            Self::ReceiveDomain { .. } => (true, true, 90),
            Self::PutPeer { .. } | Self::RemovePeer { .. } => (false, false, 1),
            Self::SetPassword { .. } | Self::RenewCertificate { .. } => (true, false, 1),
            Self::NetworkApply {} => (true, true, 50),
            Self::NetworkRestore {} => (true, false, 50),
            // Nothing outside the store; but what it wrote is taken back if nothing follows.
            Self::NetworkSnapshot { .. } => (false, true, 1),
            Self::NetworkKeep { .. } | Self::NetworkConfirm { .. } => (false, false, 1),
            Self::NetworkDiscover { .. } => (false, false, 1),
            Self::NetworkAtBoot { .. } => (false, false, 10),
            _ => (true, false, 5),
        }
    }

    fn words(&self) -> (&'static str, String) {
        match self {
            Self::CheckVm { vm, action, .. } => {
                ("check", format!("VM {vm}: may one {} it now?", action.infinitive()))
            }
            Self::CheckNewVm { vm } => ("check", format!("VM {vm}: is its id free?")),
            Self::PutVm { record, .. } => {
                ("write_record", format!("write the record of VM {}", record.config.name))
            }
            Self::SetHa { vm, enabled } => {
                ("set_ha", format!("VM {vm}: high availability {}", on_off(*enabled)))
            }
            Self::SetAutostart { vm, autostart } => (
                "set_autostart",
                format!("VM {vm}: start after the host's boot {}", on_off(autostart.enabled)),
            ),
            Self::DeleteVm { vm } => ("delete_record", format!("delete the record of VM {vm}")),
            Self::RecordCore { date, .. } => ("record_core", format!("note the core dump {date}")),
            Self::ForgetCore { date, .. } => ("forget_core", format!("forget the core dump {date}")),
            Self::CreateDomain { vm } => ("create_domain", format!("build and start the domain of VM {vm}")),
            Self::ShutdownDomain { vm, timeout_s, .. } => {
                ("shut_down", format!("ask VM {vm} to shut down, and wait up to {timeout_s} s"))
            }
            Self::DestroyDomain { vm, .. } => {
                ("destroy_domain", format!("end the domain of VM {vm} and free what it holds"))
            }
            Self::AskReboot { vm, timeout_s } => {
                ("ask_reboot", format!("ask VM {vm} to reboot, and wait up to {timeout_s} s"))
            }
            Self::ClearDomain { vm, .. } => ("clear_domain", format!("clear the old domain of VM {vm} away")),
            Self::RebuildDomain { vm } => ("rebuild_domain", format!("build the domain of VM {vm} anew")),
            Self::PauseDomain { vm } => ("pause_domain", format!("pause VM {vm}")),
            Self::UnpauseDomain { vm } => ("unpause_domain", format!("let VM {vm} run")),
            Self::SaveDomain { vm, checkpoint: false, .. } => {
                ("save_domain", format!("write the memory of VM {vm} to disk"))
            }
            Self::SaveDomain { vm, .. } => {
                ("checkpoint_domain", format!("write a checkpoint of VM {vm} to disk"))
            }
            Self::RestoreDomain { vm, .. } => {
                ("restore_domain", format!("restore VM {vm} from its saved memory"))
            }
            Self::Hotplug { change, .. } => ("hotplug", change.about()),
            Self::Sysrq { vm, letter } => ("sysrq", format!("send SysRq {letter} to VM {vm}")),
            Self::Trigger { vm, trigger, .. } => ("trigger", format!("trigger {trigger:?} in VM {vm}")),
            Self::SendToGuest { vm, key, .. } => {
                ("send_to_guest", format!("send the value {key} to the guest of VM {vm}"))
            }
            Self::DumpCore { vm, .. } => ("dump_core", format!("dump the memory of VM {vm} to disk")),
            Self::InspectDomain { vm } => {
                ("inspect", format!("look at what became of the domain of VM {vm}"))
            }
            Self::SettleClear { vm } => ("clear_domain", format!("clear the ended domain of VM {vm} away")),
            Self::SettleRebuild { vm } => ("settle", format!("start VM {vm} again, or take it for off")),
            Self::PrepareTarget { going } => {
                ("prepare_target", format!("ask {} whether it can take VM {}", going.dest, going.vm))
            }
            Self::SendDomain { going, live, .. } => {
                let how = if *live { "while it runs" } else { "standing still" };
                ("send_domain", format!("send VM {} to {}, {how}", going.vm, going.dest))
            }
            Self::CommitMigration { going } => {
                ("commit", format!("VM {} is {}'s from now on", going.vm, going.dest))
            }
            Self::TellTarget { going } => {
                ("tell_target", format!("tell {} to let VM {} run", going.dest, going.vm))
            }
            Self::SettleMigration { going } => {
                ("settle_migration", format!("find out who runs VM {}, and carry it out", going.vm))
            }
            Self::ForceLeaving { vm, keep: true } => {
                ("decide", format!("VM {vm} is this host's, says a human"))
            }
            Self::ForceLeaving { vm, .. } => ("decide", format!("VM {vm} is the other host's, says a human")),
            Self::ReceiveDomain { document, .. } => {
                ("receive_domain", format!("receive VM {}", document.record.config.name))
            }
            Self::TakeOver { .. } => ("take_over", "the VM is this host's from now on".to_owned()),
            Self::LetRun { vm } => ("let_run", format!("let VM {vm} go on")),
            Self::DropArrival { .. } => ("drop_arrival", "destroy the copy that came".to_owned()),
            Self::PutPeer { peer } => ("write_record", format!("trust the peer at {}", peer.address)),
            Self::RemovePeer { address } => ("write_record", format!("trust the peer at {address} no more")),
            Self::RemoveFile { .. } | Self::RemoveLeftFiles {} => {
                ("remove_file", "remove a file that is not needed any more".to_owned())
            }
            Self::SetClock { year, month, day, hour, minute, second } => (
                "set_clock",
                format!("set the clock to {year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}"),
            ),
            Self::SetTimezone { name, .. } => ("set_timezone", format!("set the time zone to {name}")),
            Self::SetNtp { servers, .. } => ("set_ntp", format!("take the time from {}", servers.join(", "))),
            Self::EnableNtp { enabled } => ("enable_ntp", format!("switch NTP {}", on_off(*enabled))),
            Self::PutHost { event, .. } => ("write_record", event.clone()),
            Self::SetPassword { .. } => ("set_password", "replace the password's hash".to_owned()),
            Self::RenewCertificate { if_due: true } => {
                ("renew_certificate", "make a new server certificate if it is time".to_owned())
            }
            Self::RenewCertificate { .. } => {
                ("renew_certificate", "make a new server certificate and serve it".to_owned())
            }
            Self::StopAllVms { .. } => ("stop_vms", "stop every VM, each in a job of its own".to_owned()),
            Self::Power { off: true, .. } => ("power_off", "switch the host off".to_owned()),
            Self::Power { off: false, .. } => ("reboot", "reboot the host".to_owned()),
            Self::TakeBoot { .. } => (
                "take_boot",
                "wait for jobs under way, and write down that the host has booted anew".to_owned(),
            ),
            Self::WriteBoot { .. } => (
                "write_boot",
                "write down that the host has booted anew, and what went down with it".to_owned(),
            ),
            Self::Autostart { .. } => {
                ("autostart", "start the VMs that are to run after a boot, in their order".to_owned())
            }
            Self::NetworkSnapshot { .. } => {
                ("snapshot", "plan the change, and write down what the network is".to_owned())
            }
            Self::NetworkApply {} => {
                ("apply", "change the network, and look whether it is as asked".to_owned())
            }
            Self::NetworkConfirm { within_s: 0 } => (CONFIRM, "no word is waited for".to_owned()),
            Self::NetworkConfirm { within_s } => {
                (CONFIRM, format!("wait for network_confirm, {within_s} s from the snapshot"))
            }
            Self::NetworkKeep { .. } => ("keep", "write down that this holds from now on".to_owned()),
            Self::NetworkRestore {} => ("restore", "bring back what is declared".to_owned()),
            Self::NetworkAtBoot { .. } => {
                ("network", "bring the network to what is declared, before VMs start".to_owned())
            }
            Self::NetworkDiscover { .. } => {
                ("discover", "look at the network, and tell what is there".to_owned())
            }
            Self::Sleep { ms } => ("sleep", format!("wait {ms} ms")),
            Self::Discover {} => ("discover", "look at all domains and make the record true".to_owned()),
            Self::Prune {} => ("prune", "delete the oldest jobs and events beyond their bounds".to_owned()),
        }
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}
