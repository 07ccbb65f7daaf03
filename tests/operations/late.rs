//! What comes late, is given up, or is asked twice: a guest and its memory survive it.

use crate::house::*;
use dom0d::event::Severity;
use dom0d::job::JobState;
use dom0d::model::{MiB, VmId};
use dom0d::operation::plan;
use dom0d::sim::{Behaviour, EndsByItself, Fate, Kind, Reason, Rule, WorldError};
use dom0d::store::Store;
use dom0d::vm::{EndCause, Intent};
use dom0d::xen::RunState;
use dom0d::xen::config::OnEnd;
use tokio_util::sync::CancellationToken;

fn failed() -> Fate {
    Fate::Fail(WorldError::Failed("by script".to_owned()))
}

async fn rule(host: &Host, kind: Kind, fate: Fate) {
    host.world.add_rule(Rule::next(kind, fate)).await.unwrap();
}

fn save(life: &Life, vm: VmId, tag: &str, checkpoint: bool) -> plan::Plan {
    plan::save_vm(vm, life.operations.save_file(vm, tag), checkpoint)
}

async fn assert_saved_and_restored(life: &Life, host: &Host, vm: VmId) {
    life.quiet().await;
    assert!(matches!(life.record(vm).intent, Intent::Saved { .. }), "{:?}", life.record(vm).intent);
    assert_eq!((life.events("vm.saved").await.len(), life.events("vm.gone").await.len()), (1, 0));
    life.assert_agreement(host).await;
    life.good("restore_vm", plan::restore_vm(&life.record(vm), false)).await;
    life.quiet().await;
    life.assert_agreement(host).await;
}

#[tokio::test(start_paused = true)]
async fn a_save_slower_than_the_toolstacks_deadline_fails_its_job_and_keeps_the_memory() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    rule(&host, Kind::Save, Fate::DelayMs(150_000)).await;
    life.bad("save_vm", save(&life, vm, "1", false), "TOOLSTACK_TIMEOUT").await;
    assert!(matches!(life.record(vm).intent, Intent::Saved { .. }), "the way back has waited for it");
    assert_saved_and_restored(&life, &host, vm).await;
}

#[tokio::test(start_paused = true)]
async fn a_save_cancelled_in_the_middle_keeps_the_memory_that_the_toolstack_goes_on_to_write() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    rule(&host, Kind::Save, Fate::DelayMs(60_000)).await;
    let id = life.submit("save_vm", save(&life, vm, "1", false)).await;
    seconds(1.0).await;
    assert!(life.engine.cancel(id, "operator").await.unwrap());
    assert_eq!(life.end(id).await.state, JobState::Cancelled);
    assert_saved_and_restored(&life, &host, vm).await;
}

#[tokio::test(start_paused = true)]
async fn a_save_that_ends_long_after_its_job_is_found_when_the_domain_has_gone() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    rule(&host, Kind::Save, Fate::DelayMs(400_000)).await;
    life.bad("save_vm", save(&life, vm, "1", false), "TOOLSTACK_TIMEOUT").await;
    assert_eq!(life.record(vm).intent, Intent::On, "it lives on for now");
    seconds(300.0).await;
    assert_eq!(life.events("vm.saved").await[0].severity, Severity::Warning);
    assert_saved_and_restored(&life, &host, vm).await;
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_is_never_taken_for_the_memory_of_a_guest_that_has_gone() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    life.good("save_vm", save(&life, vm, "1.save", true)).await;
    host.toolstack.destroy(host.domain(vm).await.unwrap().domid).await.unwrap();
    seconds(1.0).await;
    life.quiet().await;
    assert_eq!((life.record(vm).intent, life.record(vm).last_end), (Intent::Off, Some(EndCause::Unknown)));
}

#[tokio::test(start_paused = true)]
async fn a_vm_has_one_checkpoint_which_goes_with_it() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    life.good("save_vm", save(&life, vm, "1.save", true)).await;
    let first = life.record(vm).checkpoint.unwrap();
    // A checkpoint that fails leaves the one before.
    rule(&host, Kind::Save, failed()).await;
    life.bad("save_vm", save(&life, vm, "2.save", true), "TOOLSTACK_FAILED").await;
    assert_eq!(host.files(), [first.to_string()].into());
    life.good("save_vm", save(&life, vm, "3.save", true)).await;
    assert_ne!(life.record(vm).checkpoint, Some(first));
    life.quiet().await;
    life.assert_agreement(&host).await;
    assert_eq!(host.files().len(), 1);
    life.good("stop_vm", plan::stop_vm(vm, true, &host.settings.vm)).await;
    life.good("delete_vm", plan::delete_vm(&life.record(vm))).await;
    assert_eq!(host.files().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_a_save_and_a_restore_grows_with_the_memory() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let mut record = vm("large");
    (record.config.memory, record.config.max_memory) = (MiB(16 * 1024), MiB(16 * 1024));
    let vm = record.id();
    life.good("create_vm", plan::create_vm(record)).await;
    life.good("start_vm", plan::start_vm(vm)).await;
    for kind in [Kind::Save, Kind::Restore] {
        // Beyond the toolstack's deadline of 120 s, within the 286 s of so much memory.
        rule(&host, kind, Fate::DelayMs(250_000)).await;
    }
    life.good("save_vm", save(&life, vm, "1", false)).await;
    life.good("restore_vm", plan::restore_vm(&life.record(vm), false)).await;
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_reboot_or_a_dump_with_reset_that_is_cancelled_when_the_old_domain_has_gone_builds_it_again() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let core = |n: &str| life.operations.core_file(vm, n);
    let plans = [
        plan::reboot_vm(vm, 30),
        plan::dump_vm_core(vm, "1", core("1.core"), false, false, true),
        plan::dump_vm_core(vm, "2", core("2.core"), false, true, true),
    ];
    for (n, plan) in plans.into_iter().enumerate() {
        rule(&host, Kind::Create, Fate::Hang).await;
        let id = life.submit("reboot_vm", plan).await;
        seconds(40.0).await;
        assert_eq!(host.domain(vm).await, None, "{n}");
        assert!(life.engine.cancel(id, "operator").await.unwrap());
        assert_eq!(life.end(id).await.state, JobState::Cancelled);
        life.quiet().await;
        assert_eq!(life.record(vm).intent, Intent::On, "{n}");
        assert_eq!(host.audit().await.begun(vm), 2 + n as u64);
        life.assert_agreement(&host).await;
    }
    assert_eq!(life.events("vm.gone").await.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_dump_that_shall_end_the_vm_does_not_build_it_again_when_it_fails_after_that() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let core = life.operations.core_file(vm, "1.core");
    // The guard, the dump and the clearing look for the domain before the last step does.
    host.world.add_rule(Rule::next(Kind::Find, failed()).after(3)).await.unwrap();
    life.bad("dump_vm_core", plan::dump_vm_core(vm, "1", core, false, true, false), "TOOLSTACK_FAILED").await;
    life.quiet().await;
    assert_eq!(life.record(vm).intent, Intent::Off);
    assert_eq!(host.audit().await.begun(vm), 1);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_reboot_of_the_host_that_goes_on_in_another_boot_stops_no_vm() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    life.good("sys_reboot", plan::power(false, "the boot before".to_owned())).await;
    assert_eq!(life.record(vm).intent, Intent::On);
    let audit = host.audit().await;
    assert_eq!((audit.host_reboots, audit.count(vm, "destroy")), (0, 0));
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_sleeping_job_keeps_neither_a_reboot_of_the_host_nor_anybody_behind_it_waiting() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let began = tokio::time::Instant::now();
    let sleep = life.submit("sleep", plan::sleep(3_600_000)).await;
    let boot_id = life.operations.machine.facts().await.unwrap().boot_id;
    let reboot = life.submit("sys_reboot", plan::power(false, boot_id)).await;
    let create = life.submit("create_vm", plan::create_vm(vm("web"))).await;
    assert_eq!(life.end(reboot).await.state, JobState::Succeeded);
    assert_eq!(life.end(create).await.state, JobState::Succeeded);
    assert!(began.elapsed().as_secs() < 600, "{:?}", began.elapsed());
    assert!(life.engine.cancel(sleep, "operator").await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn cores_of_crashed_guests_are_listed_and_the_last_three_are_kept() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let mut record = vm("web");
    record.config.on_crash = OnEnd::CoredumpRestart;
    let id = record.id();
    life.good("create_vm", plan::create_vm(record)).await;
    life.good("start_vm", plan::start_vm(id)).await;
    let asked = life.operations.core_file(id, "1.core");
    life.good("dump_vm_core", plan::dump_vm_core(id, "1", asked, false, false, false)).await;
    let mut seen = Vec::new();
    for crashes in 1..=4 {
        host.world.end_guest(id, Reason::Crash).await.unwrap();
        seconds(2.0).await;
        let cores = life.record(id).cores;
        assert_eq!(cores.len(), 1 + crashes.min(3), "{cores:?}");
        assert!(cores[crashes.min(3)].size.0 > 0);
        seen.push(cores[crashes.min(3)].date.clone());
        life.assert_agreement(&host).await;
    }
    let kept: Vec<String> = life.record(id).cores.iter().map(|core| core.date.clone()).collect();
    assert_eq!(kept, ["1", &seen[1], &seen[2], &seen[3]], "the one asked for, and the last three");
    life.good("delete_vm_core", plan::delete_vm_core(&life.record(id), &kept[1]).unwrap()).await;
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn crashes_before_a_caller_started_the_vm_are_not_held_against_it() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    for round in 1..=2_u64 {
        for _ in 0..4 {
            host.world.end_guest(vm, Reason::Crash).await.unwrap();
            seconds(1.0).await;
        }
        assert_eq!(life.record(vm).crashes_in_a_row, 4, "round {round}");
        life.good("stop_vm", plan::stop_vm(vm, true, &host.settings.vm)).await;
        life.good("start_vm", plan::start_vm(vm)).await;
        assert_eq!(life.record(vm).crashes_in_a_row, 0);
    }
    assert_eq!(life.events("vm.left_off").await.len(), 0);
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_paused_vm_whose_guest_ignores_the_shutdown_is_paused_again() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("deaf").await;
    host.world.set_behaviour(Some(vm), Behaviour::deaf()).await.unwrap();
    life.good("pause_vm", plan::pause_vm(vm)).await;
    life.bad("stop_vm", plan::stop_vm(vm, false, &host.settings.vm), "SHUTDOWN_IGNORED").await;
    assert_eq!(host.domain(vm).await.unwrap().state, RunState::Paused);
    let id = life.submit("stop_vm", plan::stop_vm(vm, false, &host.settings.vm)).await;
    seconds(2.0).await;
    assert!(life.engine.cancel(id, "operator").await.unwrap());
    assert_eq!(life.end(id).await.state, JobState::Cancelled);
    assert_eq!(host.domain(vm).await.unwrap().state, RunState::Paused);
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_sysrq_that_a_crash_leaves_in_doubt_is_not_sent_a_second_time() {
    let host = Host::new();
    let store = Store::memory();
    let life = Life::on(&host, store.clone(), CancellationToken::new()).await;
    let vm = life.started("web").await;
    // Accepted, intent written, sent; the outcome is not written.
    let dead = store.die_after(2);
    let id = life.submit("sysrq_vm", plan::sysrq_vm(vm, 's')).await;
    dead.cancelled().await;
    let store = life.crash().await;
    let life = Life::on(&host, store, CancellationToken::new()).await;
    let record = life.end(id).await;
    assert_eq!(record.state, JobState::Failed);
    assert_eq!(record.fault.as_ref().unwrap().name, "INTERRUPTED");
    assert!(life.events("job.failed").await[0].text.contains("may or may not have been sent"));
    assert_eq!(host.audit().await.count(vm, "sysrq"), 1);
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_job_that_its_guard_refused_is_a_warning_and_one_that_the_host_failed_is_an_error() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    life.bad("start_vm", plan::start_vm(vm), "VM_STATE").await;
    rule(&host, Kind::Pause, failed()).await;
    life.bad("pause_vm", plan::pause_vm(vm), "TOOLSTACK_FAILED").await;
    let told: Vec<Severity> = life.events("job.failed").await.iter().map(|event| event.severity).collect();
    let mut expected = vec![Severity::Warning, Severity::Error];
    if told.first() == Some(&Severity::Error) {
        expected.reverse();
    }
    assert_eq!(told, expected);
}

#[tokio::test(start_paused = true)]
async fn the_memory_of_a_guest_that_was_restored_unseen_and_ended_at_once_goes() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    life.good("save_vm", save(&life, vm, "1", false)).await;
    let ends = EndsByItself { after_ms: 0, reason: Reason::Poweroff };
    host.world
        .set_behaviour(Some(vm), Behaviour { ends_by_itself: Some(ends), ..Behaviour::default() })
        .await
        .unwrap();
    rule(&host, Kind::Restore, Fate::DoThenLose).await;
    life.bad("restore_vm", plan::restore_vm(&life.record(vm), false), "TOOLSTACK_UNREACHABLE").await;
    life.quiet().await;
    assert_eq!(life.record(vm).intent, Intent::Off);
    life.assert_agreement(&host).await;
}
