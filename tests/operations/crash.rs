//! Every verb of a VM, with the daemon killed after every commit: right after it (`sharp`: nothing that would
//! follow has begun), and right before the next one (what follows has happened and is not written down).

use crate::house::*;
use dom0d::job::{JobRecord, JobState};
use dom0d::model::VmId;
use dom0d::operation::plan::{self, Plan};
use dom0d::sim::{Answer, Request};
use dom0d::store::Store;
use dom0d::vm::Intent;
use dom0d::xen::Trigger;
use futures_util::future::BoxFuture;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What the VM is before the verb.
#[derive(Debug, Clone, Copy)]
enum Before {
    Absent,
    Off,
    Running,
    Paused,
    Saved,
    Dumped,
}

type Planner = for<'a> fn(&'a Host, &'a Life, VmId) -> BoxFuture<'a, Plan>;

struct Case {
    verb: &'static str,
    before: Before,
    plan: Planner,
}

macro_rules! case {
    ($verb:literal, $before:ident, |$host:ident, $life:ident, $vm:ident| $plan:expr) => {{
        fn plan<'a>($host: &'a Host, $life: &'a Life, $vm: VmId) -> BoxFuture<'a, Plan> {
            let _ = ($host, $life, $vm);
            Box::pin(async move { $plan })
        }
        Case { verb: $verb, before: Before::$before, plan }
    }};
}

fn core(life: &Life, vm: VmId) -> dom0d::model::SafePath {
    life.operations.core_file(vm, "20261122.core")
}

async fn boot_id(life: &Life) -> String {
    life.operations.machine.facts().await.unwrap().boot_id
}

fn cases() -> Vec<Case> {
    vec![
        case!("create_vm", Absent, |h, life, v| plan::create_vm(vm("web"))),
        case!("configure_vm", Off, |h, life, vm| {
            plan::configure_vm(&life.record(vm), changed(&life.record(vm)))
        }),
        case!("configure_vm", Running, |h, life, vm| {
            plan::configure_vm(&life.record(vm), changed(&life.record(vm)))
        }),
        case!("set_vm_config", Off, |h, life, vm| plan::set_vm_config(
            &life.record(vm),
            changed(&life.record(vm))
        )),
        case!("configure_vm_ha", Running, |h, life, vm| plan::configure_vm_ha(vm, true)),
        case!("start_vm", Off, |h, life, vm| plan::start_vm(vm)),
        case!("stop_vm", Running, |host, life, vm| plan::stop_vm(vm, false, &host.settings.vm)),
        case!("stop_vm", Paused, |host, life, vm| plan::stop_vm(vm, false, &host.settings.vm)),
        case!("stop_vm force", Running, |host, life, vm| plan::stop_vm(vm, true, &host.settings.vm)),
        case!("reboot_vm", Running, |h, life, vm| plan::reboot_vm(vm, 30)),
        case!("pause_vm", Running, |h, life, vm| plan::pause_vm(vm)),
        case!("unpause_vm", Paused, |h, life, vm| plan::unpause_vm(vm)),
        case!("save_vm", Running, |h, life, vm| plan::save_vm(vm, life.operations.save_file(vm, "1"), false)),
        case!("save_vm", Paused, |h, life, vm| plan::save_vm(vm, life.operations.save_file(vm, "1"), false)),
        case!("restore_vm", Saved, |h, life, vm| plan::restore_vm(&life.record(vm), false)),
        case!("restore_vm paused", Saved, |h, life, vm| plan::restore_vm(&life.record(vm), true)),
        case!("dump_vm_core", Running, |h, life, vm| {
            plan::dump_vm_core(vm, "20261122", core(life, vm), false, false, false)
        }),
        case!("dump_vm_core crash", Running, |h, life, vm| {
            plan::dump_vm_core(vm, "20261122", core(life, vm), false, true, false)
        }),
        case!("dump_vm_core reset", Running, |h, life, vm| {
            plan::dump_vm_core(vm, "20261122", core(life, vm), false, false, true)
        }),
        case!("dump_vm_core crash reset", Running, |h, life, vm| {
            plan::dump_vm_core(vm, "20261122", core(life, vm), false, true, true)
        }),
        case!("delete_vm_core", Dumped, |h, life, vm| plan::delete_vm_core(&life.record(vm), "20261122")
            .unwrap()),
        case!("delete_vm", Off, |h, life, vm| plan::delete_vm(&life.record(vm))),
        case!("delete_vm", Saved, |h, life, vm| plan::delete_vm(&life.record(vm))),
        case!("sysrq_vm", Running, |h, life, vm| plan::sysrq_vm(vm, 's')),
        case!("trigger_vm", Running, |h, life, vm| plan::trigger_vm(vm, Trigger::Nmi, None)),
        case!("send_to_guest", Running, |h, life, vm| {
            plan::send_to_guest(vm, vec![("a".into(), "1".into()), ("b".into(), "2".into())])
        }),
        case!("sys_reboot", Running, |h, life, vm| plan::power(false, boot_id(life).await)),
        case!("sys_shutdown", Running, |h, life, vm| plan::power(true, boot_id(life).await)),
    ]
}

async fn prepare(life: &Life, host: &Host, before: Before) -> VmId {
    if matches!(before, Before::Absent) {
        return VmId::random();
    }
    let vm = life.created("web").await;
    // A second one that nothing happens to, unless the host goes down.
    life.started("other").await;
    if matches!(before, Before::Off) {
        return vm;
    }
    life.good("start_vm", plan::start_vm(vm)).await;
    seconds(1.0).await;
    match before {
        Before::Absent | Before::Off | Before::Running => {}
        Before::Paused => {
            life.good("pause_vm", plan::pause_vm(vm)).await;
        }
        Before::Saved => {
            life.good("save_vm", plan::save_vm(vm, life.operations.save_file(vm, "0"), false)).await;
        }
        Before::Dumped => {
            let dump = plan::dump_vm_core(vm, "20261122", core(life, vm), false, false, false);
            life.good("dump_vm_core", dump).await;
        }
    }
    life.assert_agreement(host).await;
    vm
}

/// What must come out the same whether there was a crash or not.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// Name, intent, pausedness, devices, cores, how often a domain of it began.
    vms: Vec<String>,
    host_reboots: u64,
    host_on: bool,
}

async fn outcome(host: &Host, life: &Life) -> Outcome {
    let audit = host.audit().await;
    let mut vms = Vec::new();
    for vm in life.operations.vms.all() {
        let record = &vm.record;
        let intent = match record.intent {
            Intent::Off => "off",
            Intent::On => "on",
            Intent::Saved { .. } => "saved",
            Intent::Leaving(_) => "leaving",
        };
        let (name, begun) = (&record.config.name, audit.begun(record.id()));
        // The first bytes of MACs tell their kind; the rest is the VM's id, new each time.
        let macs: Vec<_> = record.config.vifs.iter().map(|v| v.mac.as_str()[..5].to_owned()).collect();
        let (disks, _, memory, cpus, scheduling) = sorted(&record.config);
        vms.push(format!(
            "{name} {intent} {:?} ha {} cores {} end {:?} {disks:?} {macs:?} {memory} {cpus} {scheduling:?} begun {begun}",
            vm.state(), record.ha, record.cores.len(), record.last_end
        ));
    }
    let host_on = match host.world.call(Request::Host, Duration::from_secs(1)).await.unwrap() {
        Answer::Host(view) => view.powered_on,
        other => panic!("{other:?}"),
    };
    Outcome { vms, host_reboots: audit.host_reboots, host_on }
}

/// What a guest may have heard is not sent again: then the job says that it was interrupted.
fn ended_well(case: &Case, record: &JobRecord) -> bool {
    let interrupted = record.state == JobState::Failed
        && record.fault.as_ref().is_some_and(|fault| fault.name == "INTERRUPTED");
    record.state == JobState::Succeeded || (interrupted && matches!(case.verb, "sysrq_vm" | "trigger_vm"))
}

/// Runs the case, killed after `commits` commits from the verb's acceptance on (the first). `None`: it had
/// ended before.
async fn run(case: &Case, commits: Option<u64>, sharp: bool) -> Option<Outcome> {
    let host = Host::new();
    let store = Store::memory();
    let dead = store.die_after(u64::MAX);
    let hold = if sharp { dead.clone() } else { CancellationToken::new() };
    let life = Life::on(&host, store.clone(), hold).await;
    let vm = prepare(&life, &host, case.before).await;
    let plan = (case.plan)(&host, &life, vm).await;
    if let Some(commits) = commits {
        let _ = store.die_after(commits);
    }
    let (life, id) = match (life.try_submit(case.verb, plan).await, commits) {
        (accepted, None) => (life, accepted.unwrap()),
        // What the agent wrote of its own came first: whoever asked was told so, and asks the next life.
        (Err(_), Some(_)) => {
            let life = Life::on(&host, life.crash().await, CancellationToken::new()).await;
            let id = life.submit(case.verb, (case.plan)(&host, &life, vm).await).await;
            (life, id)
        }
        (Ok(id), Some(_)) => {
            let ended = async {
                life.end(id).await;
                seconds(100.0).await;
            };
            tokio::select! {
                () = dead.cancelled() => {}
                () = ended => return None,
            }
            let store = life.crash().await;
            let life = Life::on(&host, store, CancellationToken::new()).await;
            let record = life.end(id).await;
            assert!(ended_well(case, &record), "{} at {commits:?} {sharp}: {record:?}", case.verb);
            (life, id)
        }
    };
    let record = life.end(id).await;
    let well =
        if commits.is_none() { record.state == JobState::Succeeded } else { ended_well(case, &record) };
    assert!(well, "{}: {record:?}", case.verb);
    life.quiet().await;
    life.assert_agreement(&host).await;
    assert_eq!(host.audit().await.refused_doubles, 0, "{} at {commits:?}", case.verb);
    Some(outcome(&host, &life).await)
}

#[tokio::test(start_paused = true)]
async fn every_verb_killed_at_any_commit_comes_out_as_if_it_had_not_been() {
    let mut crashes = 0;
    for case in cases() {
        let expected = run(&case, None, false).await.expect("it ran to its end");
        for sharp in [false, true] {
            let mut commits = 1;
            while let Some(found) = run(&case, Some(commits), sharp).await {
                assert_eq!(
                    found, expected,
                    "{} {:?} killed at commit {commits}, {sharp}",
                    case.verb, case.before
                );
                commits += 1;
            }
            // Acceptance, an intent, the end: after the last nothing is left to kill.
            assert!(commits > 2, "{} took {commits} commits", case.verb);
            crashes += commits - 1;
        }
    }
    assert!(crashes > 150, "{crashes}");
}
