//! Guests with a will of their own, and hands in the world that are not ours.

use crate::house::*;
use dom0d::job::JobState;
use dom0d::model::VmId;
use dom0d::operation::plan;
use dom0d::sim::{Behaviour, EndsByItself, Fate, Kind, Reason, Rule, WorldError};
use dom0d::vm::{EndCause, Intent};
use dom0d::xen::config::OnEnd;
use dom0d::xen::{RunState, ShutdownReason};

async fn behave(host: &Host, vm: VmId, behaviour: Behaviour) {
    host.world.set_behaviour(Some(vm), behaviour).await.unwrap();
}

/// A VM that runs, with another way to end than restarting.
async fn started_with(life: &Life, name: &str, change: impl FnOnce(&mut dom0d::vm::VmRecord)) -> VmId {
    let mut record = vm(name);
    change(&mut record);
    let id = record.id();
    life.good("create_vm", plan::create_vm(record)).await;
    life.good("start_vm", plan::start_vm(id)).await;
    seconds(1.0).await;
    id
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_a_shutdown_runs_on_until_it_is_stopped_by_force() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("deaf").await;
    behave(&host, vm, Behaviour::deaf()).await;
    life.bad("stop_vm", plan::stop_vm(vm, false, &host.settings.vm), "SHUTDOWN_IGNORED").await;
    life.quiet().await;
    assert_eq!(life.record(vm).intent, Intent::On);
    life.assert_agreement(&host).await;
    life.good("stop_vm", plan::stop_vm(vm, true, &host.settings.vm)).await;
    assert_eq!((life.record(vm).intent, life.record(vm).last_end), (Intent::Off, Some(EndCause::Asked)));
    life.assert_agreement(&host).await;
    assert_eq!(host.audit().await.begun(vm), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_did_not_listen_yet_is_asked_again() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("boots").await;
    for kind in [Kind::Reboot, Kind::Shutdown] {
        host.world.add_rule(Rule::next(kind, Fate::Pretend).of_vm(vm).times(2)).await.unwrap();
    }
    let since = tokio::time::Instant::now();
    life.good("reboot_vm", plan::reboot_vm(vm, 180)).await;
    life.good("stop_vm", plan::stop_vm(vm, false, &host.settings.vm)).await;
    let took = since.elapsed().as_secs();
    assert!((40..50).contains(&took), "each was asked three times, ten seconds apart: {took} s");
    assert_eq!(life.record(vm).last_end, Some(EndCause::Asked));
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_a_reboot_is_rebuilt_all_the_same() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("deaf").await;
    behave(&host, vm, Behaviour::deaf()).await;
    life.good("reboot_vm", plan::reboot_vm(vm, 30)).await;
    life.quiet().await;
    assert_eq!(host.audit().await.begun(vm), 2);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_crashes_is_restarted_once_and_at_once() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    for crashes in 1..=3_u64 {
        host.world.end_guest(vm, Reason::Crash).await.unwrap();
        seconds(1.0).await;
        assert_eq!(host.audit().await.begun(vm), 1 + crashes, "restarted within a second");
        assert_eq!(life.record(vm).last_end, Some(EndCause::Crash));
    }
    life.quiet().await;
    assert_eq!(life.events("vm.restarted_after_crash").await.len(), 3);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_crashes_again_and_again_is_left_off_after_five_crashes() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.created("web").await;
    behave(&host, vm, Behaviour::crashing_after(500)).await;
    life.good("start_vm", plan::start_vm(vm)).await;
    seconds(600.0).await;
    life.quiet().await;
    assert_eq!(host.audit().await.count(vm, "end crash"), 5);
    assert_eq!((life.record(vm).intent, life.record(vm).last_end), (Intent::Off, Some(EndCause::Crash)));
    assert_eq!(life.events("vm.left_off").await.len(), 1);
    life.assert_agreement(&host).await;
    // Somebody starts it again: it is not held against it, and it can be saved from the loop.
    behave(&host, vm, Behaviour::default()).await;
    assert_eq!(life.events("vm.crashed").await[0].acknowledged, None);
    life.good("start_vm", plan::start_vm(vm)).await;
    life.quiet().await;
    life.assert_agreement(&host).await;
    for over in ["vm.crashed", "vm.left_off"] {
        let told = life.events(over).await.remove(0);
        assert_eq!(told.acknowledged.unwrap().by, "agent: vm.started", "{over}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ends_the_moment_it_is_built_is_seen_to_have_ended() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.created("web").await;
    let ends = EndsByItself { after_ms: 0, reason: Reason::Poweroff };
    behave(&host, vm, Behaviour { ends_by_itself: Some(ends), ..Behaviour::default() }).await;
    life.good("start_vm", plan::start_vm(vm)).await;
    seconds(2.0).await;
    assert_eq!(life.record(vm).intent, Intent::Off);
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_itself_off_is_off_and_told() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    host.world.end_guest(vm, Reason::Poweroff).await.unwrap();
    seconds(1.0).await;
    assert_eq!((life.record(vm).intent, life.record(vm).last_end), (Intent::Off, Some(EndCause::Poweroff)));
    assert_eq!(host.domain(vm).await, None, "cleared away");
    let told = life.events("vm.stopped").await;
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].object, format!("vm/{vm}"));
    life.quiet().await;
    life.assert_agreement(&host).await;
    assert_eq!(host.audit().await.begun(vm), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_reboots_itself_is_rebuilt_once_each_time() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    for reboots in 1..=3_u64 {
        host.world.end_guest(vm, Reason::Reboot).await.unwrap();
        seconds(1.0).await;
        assert_eq!(host.audit().await.begun(vm), 1 + reboots, "within a second");
    }
    life.quiet().await;
    assert_eq!(host.audit().await.begun(vm), 4);
    assert_eq!(life.record(vm).crashes_in_a_row, 0);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_crashed_guest_that_is_to_be_preserved_is_kept_to_be_looked_at() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = started_with(&life, "web", |record| record.config.on_crash = OnEnd::Preserve).await;
    host.world.end_guest(vm, Reason::Crash).await.unwrap();
    seconds(1300.0).await;
    life.quiet().await;
    let domain = host.domain(vm).await.expect("its domain is kept");
    assert_eq!(domain.state, RunState::Shutdown(ShutdownReason::Crash));
    assert_eq!(life.record(vm).intent, Intent::Off);
    assert_eq!(life.events("vm.left_off").await.len(), 1, "told once");
    let file = life.operations.core_file(vm, "1.core");
    life.good("dump_vm_core", plan::dump_vm_core(vm, "1", file, false, false, false)).await;
    life.bad("start_vm", plan::start_vm(vm), "VM_STATE").await;
    life.good("stop_vm", plan::stop_vm(vm, false, &host.settings.vm)).await;
    life.good("start_vm", plan::start_vm(vm)).await;
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_domain_destroyed_behind_our_back_is_off_for_a_cause_we_do_not_know_and_is_not_restarted() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let domid = host.domain(vm).await.unwrap().domid;
    host.toolstack.destroy(domid).await.unwrap();
    seconds(1.0).await;
    assert_eq!((life.record(vm).intent, life.record(vm).last_end), (Intent::Off, Some(EndCause::Unknown)));
    assert_eq!(life.events("vm.gone").await.len(), 1);
    life.quiet().await;
    assert_eq!(host.audit().await.begun(vm), 1);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_domain_started_behind_our_back_is_found_and_its_stale_saved_memory_goes() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let off = life.created("off").await;
    let saved = life.started("saved").await;
    life.good("save_vm", plan::save_vm(saved, life.operations.save_file(saved, "1"), false)).await;
    for vm in [off, saved] {
        host.toolstack.create(&life.record(vm).config, false).await.unwrap();
    }
    seconds(1.0).await;
    for vm in [off, saved] {
        assert_eq!(life.record(vm).intent, Intent::On);
    }
    assert_eq!(life.events("vm.found_running").await.len(), 2);
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_is_no_vm_of_ours_is_told_once_and_never_touched() {
    let host = Host::new();
    let stranger = vm("stranger").config;
    let domid = host.toolstack.create(&stranger, false).await.unwrap();
    let life = Life::begin(&host).await;
    let later = vm("later").config;
    host.toolstack.create(&later, false).await.unwrap();
    seconds(1.0).await;
    for _ in 0..3 {
        life.good("discover", plan::discover()).await;
        seconds(300.0).await;
    }
    host.world.end_guest(stranger.vm, Reason::Crash).await.unwrap();
    seconds(300.0).await;
    let boot_id = life.operations.machine.facts().await.unwrap().boot_id;
    assert_eq!(life.events("domain.unknown").await.len(), 2);
    let there = host.domain(stranger.vm).await.expect("still there");
    assert_eq!((there.domid, there.state), (domid, RunState::Shutdown(ShutdownReason::Crash)));
    assert_eq!(host.audit().await.count(stranger.vm, "destroy"), 0);
    life.good("sys_reboot", plan::power(false, boot_id)).await;
    assert_eq!(host.audit().await.count(later.vm, "ask to shut down"), 0);
}

#[tokio::test(start_paused = true)]
async fn an_observer_that_cannot_see_looks_at_everything_later_and_finds_it_all() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let mut vms = Vec::new();
    for n in 0..20 {
        vms.push(life.started(&format!("vm{n}")).await);
    }
    // Every look at a single domain fails, and the first look at all; meanwhile half of them end.
    let blind = Fate::Fail(WorldError::Unreachable("by script".to_owned()));
    for kind in [Kind::Get, Kind::List] {
        host.world.add_rule(Rule::next(kind, blind.clone()).times(1000)).await.unwrap();
    }
    for vm in &vms[..10] {
        host.world.end_guest(*vm, Reason::Poweroff).await.unwrap();
    }
    seconds(5.0).await;
    host.world.clear_rules().await.unwrap();
    life.good("discover", plan::discover()).await;
    seconds(2.0).await;
    life.quiet().await;
    for (n, vm) in vms.iter().enumerate() {
        assert_eq!(life.record(*vm).intent, if n < 10 { Intent::Off } else { Intent::On });
    }
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_ends_that_overflows_the_observer_is_settled_all_the_same() {
    let host = Host::with(dom0d::config::Settings::default());
    let life = Life::begin(&host).await;
    let mut vms = Vec::new();
    for n in 0..300 {
        let mut record = vm(&format!("vm{n}"));
        record.config.memory = dom0d::model::MiB(64);
        let id = record.id();
        life.good("create_vm", plan::create_vm(record)).await;
        life.good("start_vm", plan::start_vm(id)).await;
        vms.push(id);
    }
    seconds(1.0).await;
    // All in one moment: the world tells "everything" instead of each.
    let ends = vms.iter().map(|vm| host.world.end_guest(*vm, Reason::Reboot));
    for ended in futures_util::future::join_all(ends).await {
        ended.unwrap();
    }
    life.quiet().await;
    let audit = host.audit().await;
    assert!(vms.iter().all(|vm| audit.begun(*vm) == 2), "each was rebuilt once");
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn what_happened_while_the_daemon_was_dead_is_settled_when_it_is_back() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let (crashed, gone, off, left) =
        (life.started("a").await, life.started("b").await, life.created("c").await, life.started("d").await);
    let store = life.crash().await;
    host.world.end_guest(crashed, Reason::Crash).await.unwrap();
    host.toolstack.destroy(host.domain(gone).await.unwrap().domid).await.unwrap();
    let config = {
        let rows = store.scan(&dom0d::vm::VMS, dom0d::store::Range::all()).await.unwrap();
        rows.into_iter().find(|(_, r)| r.id() == off).unwrap().1.config
    };
    host.toolstack.create(&config, false).await.unwrap();
    let life = Life::on(&host, store, tokio_util::sync::CancellationToken::new()).await;
    life.quiet().await;
    let intents = [crashed, gone, off, left].map(|vm| life.record(vm).intent);
    assert_eq!(intents, [Intent::On, Intent::Off, Intent::On, Intent::On]);
    let audit = host.audit().await;
    assert_eq!([crashed, gone, off, left].map(|vm| audit.begun(vm)), [2, 1, 1, 1]);
    life.assert_agreement(&host).await;
    assert_eq!(
        life.engine
            .list(&dom0d::job::Listing { state: Some(JobState::Failed), limit: 9, ..Default::default() })
            .await
            .unwrap(),
        vec![]
    );
}
