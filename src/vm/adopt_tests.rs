//! Tables of verdicts, random worlds, and F4 on the pure function.

use super::*;
use crate::model::{KiB, MiB, MigrationId, RepoId, SafePath, Text, Timestamp, VmName};
use crate::vm::Leaving;
use crate::xen::ShutdownReason;
use crate::xen::config::{Boot as BootFrom, DomainConfig, GuestType, OnEnd, PygrubArgs, TscMode};
use proptest::prelude::*;

fn id(n: u16) -> VmId {
    let mut bytes = [7; 16];
    bytes[14..].copy_from_slice(&n.to_be_bytes());
    VmId::from_bytes(bytes)
}

fn record(n: u16, intent: Intent) -> VmRecord {
    let config = DomainConfig {
        vm: id(n),
        name: VmName::parse(&format!("vm-{n}")).unwrap(),
        guest: GuestType::Pv,
        boot: BootFrom::Pygrub { args: PygrubArgs::default(), extra: Text::default() },
        memory: MiB(64),
        max_memory: MiB(64),
        vcpus: 1,
        max_vcpus: 1,
        cpu_weight: 256,
        cpu_cap: 0,
        cpus: vec![],
        disks: vec![],
        vifs: vec![],
        vnc: None,
        on_poweroff: OnEnd::Destroy,
        on_reboot: OnEnd::Restart,
        on_crash: OnEnd::Restart,
        tsc_mode: TscMode::Default,
        acpi: true,
        apic: true,
        pae: true,
        usb_tablet: false,
        serial_pty: false,
        localtime: false,
    };
    VmRecord {
        config,
        repo: RepoId::parse("0004fb0000030000aabbccddeeff0011").unwrap(),
        intent,
        ha: false,
        kept: Default::default(),
        created: Timestamp(0),
        changed: Timestamp(0),
        last_end: None,
        cores: vec![],
        checkpoint: None,
        crashes_in_a_row: 0,
        autostart: None,
        crash_seen: None,
    }
}

fn saved() -> Intent {
    Intent::Saved { file: SafePath::parse("/var/lib/dom0d/saved/x").unwrap(), at: Timestamp(1) }
}

fn leaving() -> Intent {
    Intent::Leaving(Leaving {
        id: MigrationId::random(),
        dest: "host-2.example".to_owned(),
        since: Timestamp(1),
        handed_over: true,
        was_paused: false,
    })
}

fn domain(domid: u32, vm: Option<u16>, name: &str, state: RunState) -> DomainInfo {
    DomainInfo {
        domid: DomId(domid),
        vm: vm.map(id),
        name: name.to_owned(),
        state,
        memory: KiB(1024),
        max_memory: KiB(1024),
        vcpus: 1,
        online_vcpus: 1,
        cpu_time_ns: 0,
        started: Timestamp(0),
        vnc_port: None,
    }
}

const CRASHED: RunState = RunState::Shutdown(ShutdownReason::Crash);
const SUSPENDED: RunState = RunState::Shutdown(ShutdownReason::Suspend);
const ON: Autostart = Autostart { enabled: true, order: 1, delay_s: 0 };
const NOT: Autostart = Autostart { enabled: false, ..ON };

/// The verdict on one record without a domain.
fn of(change: impl FnOnce(&mut VmRecord), boot: Boot) -> VmVerdict {
    let mut record = record(1, Intent::On);
    change(&mut record);
    let facts = Facts { boot, autostart_default: false, in_job: &|_| false, arriving: &|_| false };
    adopt(&[Arc::new(record)], &[], &facts).vms[0].1
}

fn verdicts(records: &[VmRecord], domains: &[DomainInfo]) -> Vec<DomainVerdict> {
    let records: Vec<_> = records.iter().cloned().map(Arc::new).collect();
    let facts = Facts { boot: Boot::Same, autostart_default: true, in_job: &|_| false, arriving: &|_| false };
    adopt(&records, domains, &facts).domains.into_iter().map(|(_, verdict)| verdict).collect()
}

#[test]
fn a_domain_is_adopted_by_its_uuid_and_never_by_its_name_or_number() {
    let records = [record(1, Intent::On), record(2, Intent::Off)];
    use DomainVerdict::{Adopted, Unknown};
    for (found, expected) in [
        (domain(5, Some(1), "vm-1", RunState::Running), Adopted(id(1))),
        (domain(1, Some(1), "another name", RunState::Paused), Adopted(id(1))),
        (domain(5, Some(1), "vm-2", CRASHED), Adopted(id(1))),
        // Off, but it runs: the world wins for what is.
        (domain(5, Some(2), "vm-2", RunState::Blocked), Adopted(id(2))),
        (domain(1, Some(9), "vm-1", RunState::Running), Unknown { same_name: Some(id(1)) }),
        (domain(2, None, "vm-2", RunState::Running), Unknown { same_name: Some(id(2)) }),
        (domain(2, Some(9), "x", RunState::Running), Unknown { same_name: None }),
        (domain(2, Some(1), "vm-1", RunState::Dying), DomainVerdict::Dying),
    ] {
        assert_eq!(verdicts(&records, std::slice::from_ref(&found)), [expected], "{found:?}");
    }
}

#[test]
fn of_two_domains_of_one_vm_one_is_adopted_and_the_other_told() {
    let records = [record(1, Intent::On)];
    let [adopted, double] = [DomainVerdict::Adopted(id(1)), DomainVerdict::Double(id(1))];
    let two = |a, b| verdicts(&records, &[domain(3, Some(1), "a", a), domain(4, Some(1), "b", b)]);
    assert_eq!(two(RunState::Running, RunState::Running), [adopted, double]);
    assert_eq!(
        two(SUSPENDED, RunState::Paused),
        [double, adopted],
        "one that lives before one that has ended"
    );
    assert_eq!(two(RunState::Paused, SUSPENDED), [adopted, double]);
    assert_eq!(two(RunState::Dying, RunState::Running), [DomainVerdict::Dying, adopted]);
}

#[test]
fn a_record_without_a_domain_is_started_only_on_recorded_evidence() {
    use VmVerdict::{Gone, Off, Restart, Saved, WentWithHost};
    let booted = Restart(Evidence::HostBooted);
    let crashed = Restart(Evidence::CrashSeen);
    type Change = fn(&mut VmRecord);
    let table: &[(Change, [VmVerdict; 3])] = &[
        //                                           same boot, new boot, unknown boot
        (|_| {}, [Gone, WentWithHost, Gone]),
        (|r| r.autostart = Some(ON), [Gone, booted, Gone]),
        (|r| r.autostart = Some(NOT), [Gone, WentWithHost, Gone]),
        (|r| r.crash_seen = Some(EndCause::Crash), [crashed; 3]),
        // It crashed once and was started again since: no evidence of why it is gone now.
        (|r| r.last_end = Some(EndCause::Crash), [Gone, WentWithHost, Gone]),
        (|r| r.intent = Intent::Off, [Off; 3]),
        (|r| (r.intent, r.autostart) = (Intent::Off, Some(ON)), [Off; 3]),
        (|r| (r.intent, r.last_end) = (Intent::Off, Some(EndCause::HostDown)), [Off; 3]),
        (
            |r| (r.intent, r.last_end, r.autostart) = (Intent::Off, Some(EndCause::HostDown), Some(ON)),
            [Off, booted, Off],
        ),
        (|r| (r.intent, r.last_end, r.autostart) = (Intent::Off, Some(EndCause::Asked), Some(ON)), [Off; 3]),
        (|r| (r.intent, r.autostart) = (saved(), Some(ON)), [Saved; 3]),
    ];
    for (row, (change, expected)) in table.iter().enumerate() {
        for (boot, expected) in [Boot::Same, Boot::New, Boot::Unknown].into_iter().zip(expected) {
            assert_eq!(of(change, boot), *expected, "row {row}, {boot:?}");
        }
    }
}

#[test]
fn what_a_migration_or_an_open_job_has_in_hand_is_left_to_it() {
    let decide = |domains: &[DomainInfo], in_job: bool, moved: bool| {
        let intent = if moved { leaving() } else { Intent::On };
        let records = [Arc::new(VmRecord { autostart: Some(ON), ..record(1, intent) })];
        let arriving = |vm| vm == id(2);
        let facts =
            Facts { boot: Boot::New, autostart_default: true, in_job: &|_| in_job, arriving: &arriving };
        adopt(&records, domains, &facts)
    };
    assert_eq!(decide(&[], true, false).vms[0].1, VmVerdict::InJob);
    assert_eq!(decide(&[], false, true).vms[0].1, VmVerdict::Migrating, "it may run elsewhere");
    assert_eq!(decide(&[], true, true).vms[0].1, VmVerdict::Migrating);
    let standing = [domain(4, Some(1), "vm-1", SUSPENDED)];
    let decided = decide(&standing, false, true);
    assert_eq!(decided.domains[0].1, DomainVerdict::Migrating(id(1)));
    assert_eq!(decided.vms[0].1, VmVerdict::Migrating);
    let coming = [domain(5, Some(2), "vm-2", RunState::Paused), domain(6, Some(3), "vm-3", RunState::Paused)];
    let decided = decide(&coming, false, false);
    assert_eq!(decided.domains[0].1, DomainVerdict::Migrating(id(2)), "it is on its way here");
    assert_eq!(decided.domains[1].1, DomainVerdict::Unknown { same_name: None });
}

#[test]
fn the_settings_decide_where_autostart_was_never_asked_for() {
    assert!(record(1, Intent::On).starts_by_itself(true) && !record(1, Intent::On).starts_by_itself(false));
    let told = |autostart| VmRecord { autostart: Some(autostart), ..record(1, Intent::On) };
    assert!(told(ON).starts_by_itself(false) && !told(NOT).starts_by_itself(true));
}

#[test]
fn a_record_of_before_has_no_autostart_and_no_crash() {
    let mut old = serde_json::to_value(record(1, Intent::On)).unwrap();
    for field in ["autostart", "crash_seen"] {
        old.as_object_mut().unwrap().remove(field).unwrap();
    }
    assert_eq!(serde_json::from_value::<VmRecord>(old).unwrap(), record(1, Intent::On));
}

fn any_state() -> impl Strategy<Value = RunState> {
    prop_oneof![
        Just(RunState::Running),
        Just(RunState::Blocked),
        Just(RunState::Paused),
        Just(RunState::Dying),
        Just(CRASHED),
        Just(SUSPENDED),
    ]
}

fn any_record(n: u16) -> impl Strategy<Value = VmRecord> {
    let intents = prop_oneof![Just(Intent::On), Just(Intent::Off), Just(saved()), Just(leaving())];
    let ends = prop::sample::select(vec![None, Some(EndCause::HostDown), Some(EndCause::Crash)]);
    let autostarts = prop::sample::select(vec![None, Some(ON), Some(NOT)]);
    (intents, ends, autostarts, any::<bool>()).prop_map(move |(intent, last_end, autostart, crashed)| {
        let crash_seen = crashed.then_some(EndCause::Watchdog);
        VmRecord { last_end, autostart, crash_seen, ..record(n, intent) }
    })
}

fn any_world() -> impl Strategy<Value = (Vec<Arc<VmRecord>>, Vec<DomainInfo>)> {
    let records = (0..8_u16).map(|n| prop::option::of(any_record(n))).collect::<Vec<_>>();
    let domains = prop::collection::vec((prop::option::of(0..10_u16), 0..10_u16, any_state()), 0..12);
    (records, domains).prop_map(|(records, domains)| {
        let records = records.into_iter().flatten().map(Arc::new).collect();
        let domains = domains.into_iter().enumerate().map(|(n, (vm, name, state))| {
            domain(u32::try_from(n).unwrap(), vm, &format!("vm-{name}"), state)
        });
        (records, domains.collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_domain_and_every_record_gets_one_verdict_and_no_vm_gets_two_domains(
        (records, domains) in any_world(),
        boot in prop::sample::select(vec![Boot::Same, Boot::New, Boot::Unknown]),
        default in any::<bool>(),
        busy in 0..10_u16,
        coming in 0..10_u16,
    ) {
        let facts = Facts {
            boot,
            autostart_default: default,
            in_job: &|vm| vm == id(busy),
            arriving: &|vm| vm == id(coming),
        };
        let adoption = adopt(&records, &domains, &facts);
        let guests: Vec<DomId> = domains.iter().map(|d| d.domid).filter(|d| d.0 != 0).collect();
        prop_assert_eq!(adoption.domains.iter().map(|(domid, _)| *domid).collect::<Vec<_>>(), guests);
        let vms: Vec<VmId> = records.iter().map(|r| r.id()).collect();
        prop_assert_eq!(adoption.vms.iter().map(|(vm, _)| *vm).collect::<Vec<_>>(), vms.clone());
        let mut adopted = HashSet::new();
        for (domid, verdict) in &adoption.domains {
            let found = domains.iter().find(|d| d.domid == *domid).unwrap();
            match verdict {
                DomainVerdict::Adopted(vm) => {
                    prop_assert!(adopted.insert(*vm), "two for one VM");
                    prop_assert!(found.vm == Some(*vm) && vms.contains(vm));
                }
                DomainVerdict::Unknown { .. } => prop_assert!(found.vm.is_none_or(|vm| !vms.contains(&vm))),
                DomainVerdict::Double(vm) | DomainVerdict::Migrating(vm) => {
                    prop_assert_eq!(found.vm, Some(*vm));
                }
                DomainVerdict::Dying => prop_assert_eq!(found.state, RunState::Dying),
            }
        }
        for (record, (vm, verdict)) in records.iter().zip(&adoption.vms) {
            prop_assert_eq!(*verdict == VmVerdict::HasDomain, adopted.contains(vm));
            if let VmVerdict::Restart(evidence) = verdict {
                let none = domains.iter().all(|d| d.domid.0 == 0 || d.vm != Some(*vm) || d.state == RunState::Dying);
                prop_assert!(none, "nothing is started beside a domain");
                prop_assert!(*vm != id(busy) && !matches!(record.intent, Intent::Leaving(_)));
                let written_down = match evidence {
                    Evidence::CrashSeen => record.crash_seen.is_some() && record.intent == Intent::On,
                    Evidence::HostBooted => boot == Boot::New && record.starts_by_itself(default),
                };
                prop_assert!(written_down);
            }
        }
    }

    #[test]
    fn the_order_in_which_domains_are_listed_decides_nothing((records, domains) in any_world()) {
        let facts = Facts { boot: Boot::New, autostart_default: true, in_job: &|_| false, arriving: &|_| false };
        let sorted = |domains: &[DomainInfo]| {
            let mut adoption = adopt(&records, domains, &facts);
            adoption.domains.sort_by_key(|(domid, _)| *domid);
            adoption
        };
        let backwards: Vec<_> = domains.iter().rev().cloned().collect();
        prop_assert_eq!(sorted(&domains), sorted(&backwards));
    }
}

/// F4: the agent is killed and restarted a thousand times over 500 domains, of which now and then one ends, one is
/// started by somebody else, or all go with the host. Verdicts are carried out to the letter.
#[test]
fn a_thousand_restarts_over_500_domains_forget_none_double_none_and_restart_none_without_evidence() {
    const VMS: u16 = 500;
    let mut random = 1_u64;
    let mut roll = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    let mut records: Vec<Arc<VmRecord>> = (0..VMS)
        .map(|n| Arc::new(VmRecord { autostart: n.is_multiple_of(2).then_some(ON), ..record(n, Intent::On) }))
        .collect();
    let mut next = 0;
    let mut built = |n: u16| {
        next += 1;
        domain(next, Some(n), &format!("vm-{n}"), RunState::Running)
    };
    let mut domains: Vec<DomainInfo> = (0..VMS).map(&mut built).collect();
    domains.push(domain(100_000, None, "stranger", RunState::Running));
    for restart in 0..1000 {
        let mut boot = Boot::Same;
        let mut expected_starts = HashSet::new();
        match roll(20) {
            0 => {
                boot = Boot::New;
                let lost = |n: &u16| domains.iter().any(|d| d.vm == Some(id(*n)));
                expected_starts = (0..VMS).filter(|n| n.is_multiple_of(2)).filter(lost).map(id).collect();
                domains.retain(|d| d.vm.is_none());
            }
            1..=5 => drop(domains.swap_remove(roll(domains.len() as u64) as usize)),
            6..=8 => {
                let n = u16::try_from(roll(VMS.into())).unwrap();
                if !domains.iter().any(|d| d.vm == Some(id(n))) {
                    domains.push(built(n));
                }
            }
            _ => {}
        }
        let strangers = domains.iter().filter(|d| d.vm.is_none()).count();
        let facts = Facts { boot, autostart_default: false, in_job: &|_| false, arriving: &|_| false };
        let adoption = adopt(&records, &domains, &facts);
        let adopted: HashSet<VmId> = adoption
            .domains
            .iter()
            .filter_map(|(_, v)| if let DomainVerdict::Adopted(vm) = v { Some(*vm) } else { None })
            .collect();
        assert_eq!(adopted.len() + strangers, domains.len(), "none forgotten, none doubled ({restart})");
        for (n, (vm, verdict)) in (0..VMS).zip(&adoption.vms) {
            let record = Arc::make_mut(&mut records[usize::from(n)]);
            assert_eq!(adopted.contains(vm), *verdict == VmVerdict::HasDomain);
            match verdict {
                VmVerdict::HasDomain => record.intent = Intent::On,
                VmVerdict::Gone | VmVerdict::WentWithHost => record.intent = Intent::Off,
                VmVerdict::Restart(evidence) => {
                    assert_eq!(
                        (*evidence, expected_starts.remove(vm)),
                        (Evidence::HostBooted, true),
                        "{restart}"
                    );
                    domains.push(built(n));
                }
                _ => {}
            }
        }
        assert_eq!(expected_starts, HashSet::new(), "all that were to start ({restart})");
    }
}
