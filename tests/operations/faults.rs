//! The world fails by script: refusals, time-outs, lost answers, silence.

use crate::house::*;
use dom0d::job::JobState;
use dom0d::operation::plan;
use dom0d::sim::{Fate, Kind, Rule, WorldError};
use dom0d::store::Store;
use dom0d::vm::{EndCause, Intent};
use dom0d::xen::RunState;
use tokio_util::sync::CancellationToken;

fn failed() -> Fate {
    Fate::Fail(WorldError::Failed("by script".to_owned()))
}

async fn rule(host: &Host, kind: Kind, fate: Fate) {
    host.world.add_rule(Rule::next(kind, fate)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_start_that_the_toolstack_refuses_fails_by_name_and_leaves_the_vm_off() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.created("web").await;
    let no_memory =
        Fate::Fail(WorldError::OutOfMemory { needed: dom0d::model::MiB(256), free: dom0d::model::MiB(1) });
    for (fate, fault) in
        [(no_memory, "OUT_OF_MEMORY"), (failed(), "TOOLSTACK_FAILED"), (Fate::Hang, "TOOLSTACK_TIMEOUT")]
    {
        rule(&host, Kind::Create, fate).await;
        life.bad("start_vm", plan::start_vm(vm), fault).await;
        assert_eq!(life.record(vm).intent, Intent::Off);
        life.quiet().await;
        life.assert_agreement(&host).await;
    }
    assert_eq!(host.audit().await.begun(vm), 0);
    life.good("start_vm", plan::start_vm(vm)).await;
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_was_built_although_the_answer_was_lost_is_taken_for_ours_and_not_built_twice() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    for fate in [Fate::DoThenTimeout, Fate::DoThenLose] {
        let vm = life.created(&format!("{fate:?}")).await;
        rule(&host, Kind::Create, fate.clone()).await;
        life.good("start_vm", plan::start_vm(vm)).await;
        assert_eq!(host.audit().await.begun(vm), 1);
        life.good("save_vm", plan::save_vm(vm, life.operations.save_file(vm, "1"), false)).await;
        rule(&host, Kind::Restore, fate).await;
        life.good("restore_vm", plan::restore_vm(&life.record(vm), false)).await;
        let audit = host.audit().await;
        assert_eq!((audit.begun(vm), audit.count(vm, "destroy")), (2, 0));
    }
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_appears_after_its_start_was_given_up_is_found_and_the_record_follows() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.created("web").await;
    // Later than the toolstack's deadline of 120 s.
    rule(&host, Kind::Create, Fate::DelayMs(150_000)).await;
    life.bad("start_vm", plan::start_vm(vm), "TOOLSTACK_TIMEOUT").await;
    seconds(60.0).await;
    life.quiet().await;
    assert_eq!(life.record(vm).intent, Intent::On);
    assert_eq!(life.events("vm.found_running").await.len(), 1);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_save_that_fails_leaves_the_vm_running_and_no_file() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    for fate in [failed(), Fate::Hang, Fate::Fail(WorldError::Timeout)] {
        rule(&host, Kind::Save, fate).await;
        let save = plan::save_vm(vm, life.operations.save_file(vm, "1"), false);
        assert_eq!(life.run("save_vm", save).await.state, JobState::Failed);
        life.quiet().await;
        assert_eq!(life.record(vm).intent, Intent::On);
        life.assert_agreement(&host).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_save_whose_answer_was_lost_has_saved_the_vm() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    for fate in [Fate::DoThenTimeout, Fate::DoThenLose] {
        let vm = life.started(&format!("{fate:?}")).await;
        rule(&host, Kind::Save, fate).await;
        life.good("save_vm", plan::save_vm(vm, life.operations.save_file(vm, "1"), false)).await;
        life.quiet().await;
        life.assert_agreement(&host).await;
        life.good("restore_vm", plan::restore_vm(&life.record(vm), false)).await;
    }
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_save_in_doubt_that_is_cancelled_keeps_the_memory_that_was_saved() {
    let host = Host::new();
    let store = Store::memory();
    let life = Life::on(&host, store.clone(), CancellationToken::new()).await;
    let vm = life.started("web").await;
    // Accepted, intent written; then the domain is saved and the daemon dies before it can say so.
    let dead = store.die_after(2);
    let id = life.submit("save_vm", plan::save_vm(vm, life.operations.save_file(vm, "1"), false)).await;
    dead.cancelled().await;
    let store = life.crash().await;
    assert_eq!(host.domain(vm).await, None);
    let life = Life::on(&host, store, CancellationToken::new()).await;
    assert!(life.engine.cancel(id, "operator").await.unwrap());
    assert_eq!(life.end(id).await.state, JobState::Cancelled);
    life.quiet().await;
    assert!(matches!(life.record(vm).intent, Intent::Saved { .. }), "{:?}", life.record(vm).intent);
    life.assert_agreement(&host).await;
    life.good("restore_vm", plan::restore_vm(&life.record(vm), false)).await;
}

#[tokio::test(start_paused = true)]
async fn a_restore_whose_file_cannot_be_removed_does_not_end_the_guest_that_goes_on() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    life.good("save_vm", plan::save_vm(vm, life.operations.save_file(vm, "1"), false)).await;
    // A folder in the place of a file cannot be removed as a file.
    let folder = host.dir.path().join("a-folder");
    std::fs::create_dir(&folder).unwrap();
    let file = dom0d::model::SafePath::parse(folder.to_str().unwrap()).unwrap();
    let mut broken = plan::restore_vm(&life.record(vm), false);
    *broken.steps.last_mut().unwrap() = dom0d::operation::step::Step::RemoveFile { file }.planned();
    life.bad("restore_vm", broken, "FILE_FAILED").await;
    life.quiet().await;
    assert_eq!(life.record(vm).intent, Intent::On);
    let audit = host.audit().await;
    assert_eq!((audit.begun(vm), audit.count(vm, "destroy")), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_stop_whose_answers_are_lost_has_stopped_the_vm() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    for fate in [Fate::DoThenTimeout, Fate::DoThenLose] {
        let vm = life.started(&format!("{fate:?}")).await;
        rule(&host, Kind::Destroy, fate).await;
        life.good("stop_vm", plan::stop_vm(vm, true, &host.settings.vm)).await;
        assert_eq!(life.record(vm).last_end, Some(EndCause::Asked));
    }
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_configure_that_fails_midway_gives_the_domain_and_the_record_back_as_they_were() {
    let kinds = [
        Kind::AttachDisk,
        Kind::AttachVif,
        Kind::SetVcpus,
        Kind::SetMemory,
        Kind::SetScheduling,
        Kind::DetachDisk,
    ];
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let old = life.record(vm);
    for fate in [failed(), Fate::DoThenTimeout, Fate::Hang] {
        for kind in kinds {
            rule(&host, kind, fate.clone()).await;
            let configure = plan::configure_vm(&old, changed(&old));
            let record = life.run("configure_vm", configure).await;
            assert_eq!(record.state, JobState::Failed, "{kind:?} {fate:?}");
            assert_eq!(life.record(vm).config, old.config);
            life.quiet().await;
            life.assert_agreement(&host).await;
        }
    }
    life.good("configure_vm", plan::configure_vm(&old, changed(&old))).await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn of_two_changes_planned_from_the_same_record_neither_is_lost() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let old = life.record(vm);
    let with = |device: &str| {
        let mut new = old.clone();
        new.config.disks.push(disk(device));
        plan::configure_vm(&old, new)
    };
    let first = life.submit("configure_vm", with("xvdb")).await;
    let second = life.submit("configure_vm", with("xvdc")).await;
    assert_eq!(life.end(first).await.state, JobState::Succeeded);
    assert_eq!(life.end(second).await.state, JobState::Succeeded);
    assert_eq!(life.record(vm).config.disks, [disk("xvda"), disk("xvdb"), disk("xvdc")]);
    life.assert_agreement(&host).await;
    // Planned for a VM that is off, which then starts: it is plugged all the same.
    let off = life.created("db").await;
    let (old, new) = (life.record(off), changed(&life.record(off)));
    let planned = plan::configure_vm(&old, new);
    life.good("start_vm", plan::start_vm(off)).await;
    life.good("configure_vm", planned).await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_dump_is_kept_although_the_vm_cannot_be_built_anew_after_it() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let file = life.operations.core_file(vm, "1.core");
    // Nor on the way back.
    host.world.add_rule(Rule::next(Kind::Create, failed()).times(2)).await.unwrap();
    life.bad("dump_vm_core", plan::dump_vm_core(vm, "1", file, false, false, true), "TOOLSTACK_FAILED").await;
    life.quiet().await;
    assert_eq!(life.record(vm).cores.len(), 1);
    assert_eq!(life.record(vm).intent, Intent::Off, "nothing of it runs");
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_reboot_that_cannot_build_the_domain_anew_is_told_and_the_record_says_off_soon() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    // Nor on the way back.
    host.world.add_rule(Rule::next(Kind::Create, failed()).times(2)).await.unwrap();
    life.bad("reboot_vm", plan::reboot_vm(vm, 30), "TOOLSTACK_FAILED").await;
    // Long before the next discovery.
    seconds(2.0).await;
    assert_eq!(life.record(vm).intent, Intent::Off);
    assert_eq!(life.events("vm.gone").await.len(), 1);
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_hangs_is_cancelled_within_the_bound_and_leaves_nothing() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.created("web").await;
    rule(&host, Kind::Create, Fate::Hang).await;
    let id = life.submit("start_vm", plan::start_vm(vm)).await;
    seconds(1.0).await;
    let start = tokio::time::Instant::now();
    assert!(life.engine.cancel(id, "operator").await.unwrap());
    assert_eq!(life.end(id).await.state, JobState::Cancelled);
    assert!(start.elapsed().as_secs() <= host.settings.jobs.cancel_bound_s);
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_cannot_stop_one_vm_stays_up_and_calls_the_other_stops_off() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("stuck").await;
    let slow = life.started("slow").await;
    host.world.set_behaviour(Some(slow), dom0d::sim::Behaviour::deaf()).await.unwrap();
    host.world.add_rule(Rule::next(Kind::Destroy, failed()).of_vm(vm)).await.unwrap();
    let boot_id = life.operations.machine.facts().await.unwrap().boot_id;
    life.bad("sys_reboot", plan::power(false, boot_id), "VM_NOT_STOPPED").await;
    life.quiet().await;
    assert_eq!(host.audit().await.host_reboots, 0);
    assert_eq!(host.domain(slow).await.map(|d| d.state), Some(RunState::Blocked));
    assert_eq!(life.record(slow).intent, Intent::On);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_restore_and_a_delete_planned_before_the_vm_was_saved_remove_the_file_it_then_has() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let save = |tag| plan::save_vm(vm, life.operations.save_file(vm, tag), false);
    let restore = plan::restore_vm(&life.record(vm), false);
    let delete = plan::delete_vm(&life.record(vm));
    life.good("save_vm", save("1")).await;
    life.good("restore_vm", restore).await;
    assert_eq!(host.files().len(), 0);
    life.good("save_vm", save("2")).await;
    life.good("delete_vm", delete).await;
    life.assert_agreement(&host).await;
}
