//! What the agent does with the domains and records it finds at its start, after its own restart and the host's.

use crate::house::*;
use dom0d::host::record::{BOOT, HOST_KEY, HostId};
use dom0d::job::{JobState, Listing};
use dom0d::model::{MiB, VmId};
use dom0d::operation::plan;
use dom0d::sim::{Fate, Kind, Reason, Request, Rule, WorldError};
use dom0d::store::{Store, Txn};
use dom0d::vm::adopt::{Boot, DomainVerdict, VmVerdict};
use dom0d::vm::{Autostart, EndCause, Intent};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

async fn restart(life: Life, host: &Host) -> Life {
    back(host, life.crash().await).await
}

async fn back(host: &Host, store: Store) -> Life {
    Life::on(host, store, CancellationToken::new()).await
}

/// The agent dies with the host, and both come back.
async fn reboot(life: Life, host: &Host) -> Life {
    let store = life.crash().await;
    host.world.call(Request::HostReboot, Duration::from_secs(1)).await.unwrap();
    seconds(1.0).await;
    back(host, store).await
}

async fn autostart(life: &Life, vm: VmId, order: u32, delay_s: u32) {
    let place = Autostart { enabled: true, order, delay_s };
    life.good("vm_autostart", plan::vm_autostart(vm, place)).await;
}

/// When each VM began, seconds after the first; in the host's time.
async fn began(host: &Host, since: usize) -> BTreeMap<VmId, u64> {
    let audit = host.audit().await;
    let effects = audit.effects.iter().skip(since).filter(|e| e.what == "create");
    let times: Vec<(VmId, u64)> = effects.map(|e| (e.vm.unwrap(), e.at.0 / 1000)).collect();
    let first = times.iter().map(|(_, at)| *at).min().unwrap_or(0);
    times.into_iter().map(|(vm, at)| (vm, at - first)).collect()
}

fn end_of(life: &Life, vm: VmId) -> (Intent, Option<EndCause>) {
    (life.record(vm).intent, life.record(vm).last_end)
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_of_the_agent_alone_each_domain_is_adopted_once_and_nothing_happens_to_it() {
    let host = Host::new();
    let mut life = Life::begin(&host).await;
    let running = life.started("running").await;
    let paused = life.started("paused").await;
    life.good("pause_vm", plan::pause_vm(paused)).await;
    let off = life.created("off").await;
    let saved = life.started("saved").await;
    life.good("save_vm", plan::save_vm(saved, life.operations.save_file(saved, "1"), false)).await;
    let gone = life.started("gone").await;
    autostart(&life, gone, 1, 0).await;
    let stranger = host.toolstack.create(&vm("stranger").config, false).await.unwrap();
    let store = life.crash().await;
    host.toolstack.destroy(host.domain(gone).await.unwrap().domid).await.unwrap();
    life = back(&host, store).await;
    life.quiet().await;
    let found = life.operations.found().unwrap();
    assert_eq!(found.boot, Boot::Same);
    let adopted = [running, paused].map(|vm| (DomainVerdict::Adopted(vm), true));
    let domains: Vec<_> = found.domains.iter().map(|d| (d.verdict, d.uuid.is_some())).collect();
    assert_eq!(domains[..2], adopted);
    assert_eq!(found.domains[2].domid, stranger);
    assert_eq!(found.domains[2].verdict, DomainVerdict::Unknown { same_name: None });
    let verdicts: BTreeMap<VmId, VmVerdict> = found.vms.iter().map(|vm| (vm.vm, vm.verdict)).collect();
    let expected = [
        (running, VmVerdict::HasDomain),
        (paused, VmVerdict::HasDomain),
        (off, VmVerdict::Off),
        (saved, VmVerdict::Saved),
        (gone, VmVerdict::Gone),
    ];
    assert_eq!(verdicts, expected.into());
    assert_eq!(end_of(&life, gone), (Intent::Off, Some(EndCause::Unknown)), "autostart is no evidence");
    let told = life.events("vm.adoption").await;
    let last = told.last().unwrap();
    let number = |name: &str| last.data[name].as_u64().unwrap();
    assert_eq!(["adopted", "unknown", "gone", "restarted"].map(number), [2, 1, 1, 0]);
    assert_eq!(last.data["gone_names"], serde_json::json!(["gone"]));
    let audit = host.audit().await;
    assert!([running, paused, saved, gone].iter().all(|vm| audit.begun(*vm) == 1));
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn after_a_reboot_of_the_host_only_what_ran_and_has_autostart_is_started_and_once() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let (auto, plain) = (life.started("auto").await, life.started("plain").await);
    let stopped = life.started("stopped").await;
    let never = life.created("never").await;
    for vm in [auto, stopped, never] {
        autostart(&life, vm, 1, 0).await;
    }
    life.good("stop_vm", plan::stop_vm(stopped, true, &host.settings.vm)).await;
    let saved = life.started("saved").await;
    autostart(&life, saved, 1, 0).await;
    life.good("save_vm", plan::save_vm(saved, life.operations.save_file(saved, "1"), false)).await;
    let mut life = reboot(life, &host).await;
    life.quiet().await;
    assert_eq!(life.operations.found().unwrap().boot, Boot::New);
    for _ in 0..2 {
        assert_eq!(end_of(&life, auto), (Intent::On, None));
        assert_eq!(end_of(&life, plain), (Intent::Off, Some(EndCause::HostDown)));
        assert_eq!(end_of(&life, stopped), (Intent::Off, Some(EndCause::Asked)));
        assert_eq!(end_of(&life, never), (Intent::Off, None));
        assert!(matches!(life.record(saved).intent, Intent::Saved { .. }));
        let audit = host.audit().await;
        assert_eq!([auto, plain, stopped, never, saved].map(|vm| audit.begun(vm)), [2, 1, 1, 0, 1]);
        assert_eq!(life.events("vm.gone").await.len(), 2, "told once");
        life.assert_agreement(&host).await;
        // The same boot once more.
        life = restart(life, &host).await;
        life.quiet().await;
        assert_eq!(life.operations.found().unwrap().boot, Boot::Same);
    }
}

#[tokio::test(start_paused = true)]
async fn autostart_keeps_the_order_and_the_delays_and_one_that_fails_stops_no_other() {
    let mut settings = dom0d::config::Settings::default();
    settings.vm.autostart_delay_s = 120;
    let host = Host::with(settings);
    let life = Life::begin(&host).await;
    let mut vms = Vec::new();
    for (name, order, delay_s) in
        [("last", 30, 0), ("first", 0, 60), ("also first", 0, 10), ("middle", 7, 5), ("bad", 7, 900)]
    {
        let vm = life.started(&name.replace(' ', "-")).await;
        autostart(&life, vm, order, delay_s).await;
        vms.push(vm);
    }
    let broken = Fate::Fail(WorldError::Failed("by script".to_owned()));
    host.world.add_rule(Rule::next(Kind::Create, broken).of_vm(vms[4]).times(100)).await.unwrap();
    let before = host.audit().await.effects.len();
    let life = reboot(life, &host).await;
    let booted = tokio::time::Instant::now();
    life.quiet().await;
    let times = began(&host, before).await;
    let waits: Vec<u64> = [1, 2, 3, 0].map(|n| times[&vms[n]]).to_vec();
    assert_eq!(waits, [0, 0, 60, 65], "the delay of one that has not started is not waited for");
    assert!(booted.elapsed() >= Duration::from_secs(120 + 65));
    assert_eq!(end_of(&life, vms[4]), (Intent::Off, Some(EndCause::HostDown)));
    let told = life.events("vm.autostart").await;
    assert_eq!(
        (told.len(), told[0].data["started"].as_u64(), told[0].data["failed"].as_u64()),
        (1, Some(4), Some(1))
    );
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn whoever_stops_or_starts_a_vm_before_its_turn_has_decided() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let mut vms = Vec::new();
    for (n, name) in ["first", "stopped", "started", "deleted", "no-more"].iter().enumerate() {
        let vm = life.started(name).await;
        autostart(&life, vm, u32::from(n > 0), 100).await;
        vms.push(vm);
    }
    let life = reboot(life, &host).await;
    seconds(50.0).await;
    assert_eq!(end_of(&life, vms[0]), (Intent::On, None));
    assert_eq!(end_of(&life, vms[1]), (Intent::Off, Some(EndCause::HostDown)), "its turn is to come");
    life.good("stop_vm", plan::stop_vm(vms[1], false, &host.settings.vm)).await;
    life.good("start_vm", plan::start_vm(vms[2])).await;
    life.good("delete_vm", plan::delete_vm(&life.record(vms[3]))).await;
    life.good("vm_autostart", plan::vm_autostart(vms[4], Autostart::default())).await;
    life.quiet().await;
    let audit = host.audit().await;
    assert_eq!([0, 1, 2, 3, 4].map(|n| audit.begun(vms[n])), [2, 1, 2, 1, 1]);
    assert_eq!(end_of(&life, vms[1]), (Intent::Off, Some(EndCause::Asked)));
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn the_agent_killed_at_any_commit_of_a_host_boot_starts_each_vm_once() {
    let mut commits = 0;
    loop {
        let host = Host::new();
        let life = Life::begin(&host).await;
        let mut vms = Vec::new();
        for order in 0..3 {
            let vm = life.started(&format!("vm{order}")).await;
            autostart(&life, vm, order, 20).await;
            vms.push(vm);
        }
        let plain = life.started("plain").await;
        let store = life.crash().await;
        host.world.call(Request::HostReboot, Duration::from_secs(1)).await.unwrap();
        seconds(1.0).await;
        let before = host.audit().await.effects.len();
        let dead = store.die_after(commits);
        let life = Life::on(&host, store.clone(), CancellationToken::new()).await;
        let killed = tokio::select! {
            () = dead.cancelled() => true,
            () = life.quiet() => false,
        };
        let life = restart(life, &host).await;
        life.quiet().await;
        let audit = host.audit().await;
        assert_eq!(vms.iter().map(|vm| audit.begun(*vm)).collect::<Vec<_>>(), [2, 2, 2], "at {commits}");
        assert_eq!(audit.begun(plain), 1, "at {commits}");
        assert_eq!(end_of(&life, plain), (Intent::Off, Some(EndCause::HostDown)), "at {commits}");
        let times = began(&host, before).await;
        let gaps: Vec<u64> = vms.windows(2).map(|pair| times[&pair[1]] - times[&pair[0]]).collect();
        assert!(gaps.iter().all(|gap| *gap >= 20), "at {commits}: {gaps:?}");
        life.assert_agreement(&host).await;
        if !killed {
            break;
        }
        commits += 1;
    }
    assert!(commits > 10, "{commits}");
}

#[tokio::test(start_paused = true)]
async fn vms_that_were_stopped_because_the_host_goes_down_are_started_when_it_is_up_again() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let (auto, plain) = (life.started("auto").await, life.started("plain").await);
    let stopped = life.started("stopped").await;
    for vm in [auto, stopped] {
        autostart(&life, vm, 1, 0).await;
    }
    life.good("stop_vm", plan::stop_vm(stopped, false, &host.settings.vm)).await;
    let boot_id = life.operations.machine.facts().await.unwrap().boot_id;
    // The simulated host boots under the living agent.
    life.good("sys_reboot", plan::power(false, boot_id)).await;
    seconds(1.0).await;
    life.quiet().await;
    let audit = host.audit().await;
    assert_eq!((audit.host_reboots, audit.count(auto, "lost with the host")), (1, 0), "shut down in order");
    assert_eq!([auto, plain, stopped].map(|vm| audit.begun(vm)), [2, 1, 1]);
    assert_eq!(end_of(&life, plain), (Intent::Off, Some(EndCause::HostDown)));
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_crashed_while_the_agent_was_dead_is_started_again_once_also_after_a_reboot_of_the_host()
{
    for host_too in [false, true] {
        let host = Host::new();
        let life = Life::begin(&host).await;
        let (crashed, well) = (life.started("crashed").await, life.started("well").await);
        let store = life.crash().await;
        host.world.end_guest(crashed, Reason::Crash).await.unwrap();
        // Seen; then the agent dies before its domain is built anew.
        let dead = store.die_after(3);
        let life = Life::on(&host, store.clone(), CancellationToken::new()).await;
        dead.cancelled().await;
        let store = life.crash().await;
        assert_eq!(host.audit().await.begun(crashed), 1);
        if host_too {
            host.world.call(Request::HostReboot, Duration::from_secs(1)).await.unwrap();
            seconds(1.0).await;
        }
        let life = back(&host, store).await;
        life.quiet().await;
        let audit = host.audit().await;
        assert_eq!(audit.begun(crashed), 2, "host {host_too}");
        assert_eq!(end_of(&life, crashed), (Intent::On, Some(EndCause::Crash)));
        assert_eq!(audit.begun(well), 1);
        assert_eq!(life.record(well).intent == Intent::On, !host_too);
        life.assert_agreement(&host).await;
        assert_eq!(life.record(crashed).crash_seen, None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_goes_on_after_it_stood_still_for_long_is_told_and_the_alert_is_over() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let domid = host.domain(vm).await.unwrap().domid.0;
    let somebody = host.world.another_client();
    somebody.call(Request::Export { domid }, Duration::from_secs(1)).await.unwrap();
    seconds(100.0).await;
    assert_eq!(life.events("vm.stands_still").await[0].acknowledged, None);
    somebody.call(Request::EndExport { domid, gone: false }, Duration::from_secs(1)).await.unwrap();
    seconds(100.0).await;
    assert_eq!(life.events("vm.goes_on").await.len(), 1);
    let told = life.events("vm.stands_still").await.remove(0);
    assert_eq!(told.acknowledged.unwrap().by, "agent: vm.goes_on");
    life.quiet().await;
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_stands_still_for_a_save_of_somebody_elses_is_not_taken_from_him() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    host.world.end_guest(vm, Reason::Suspend).await.unwrap();
    seconds(50.0).await;
    assert_eq!(life.events("vm.stands_still").await.len(), 0, "a save takes a while");
    seconds(300.0).await;
    life.quiet().await;
    assert_eq!(life.events("vm.stands_still").await.len(), 1, "told, and told once");
    // The same where the agent finds it at its start: an xl of its former life may be about to let it go on.
    let life = restart(life, &host).await;
    seconds(300.0).await;
    life.quiet().await;
    assert_eq!(host.audit().await.count(vm, "destroy"), 0);
    assert_eq!(life.record(vm).intent, Intent::On);
    // Told to end, it ends.
    life.good("stop_vm", plan::stop_vm(vm, true, &host.settings.vm)).await;
    assert_eq!(life.record(vm).intent, Intent::Off);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_start_after_a_boot_that_fails_is_tried_again_and_not_for_ever() {
    for failures in [2, 100] {
        let host = Host::new();
        let life = Life::begin(&host).await;
        let vm = life.started("web").await;
        let broken = Fate::Fail(WorldError::Failed("by script".to_owned()));
        autostart(&life, vm, 1, 0).await;
        host.world.add_rule(Rule::next(Kind::Create, broken).times(failures)).await.unwrap();
        let life = reboot(life, &host).await;
        seconds(600.0).await;
        life.quiet().await;
        let failed = Listing { state: Some(JobState::Failed), limit: 99, ..Default::default() };
        let tries = life.engine.list(&failed).await.unwrap().len();
        let told = life.events("vm.autostart").await;
        let (started, lost) = (told[0].data["started"].as_u64(), told[0].data["failed"].as_u64());
        assert_eq!(told.len(), 1, "once, when it is settled");
        if failures == 2 {
            assert_eq!((tries, started, lost), (2, Some(1), Some(0)));
            assert_eq!(life.record(vm).intent, Intent::On);
        } else {
            assert_eq!((tries, started, lost), (3, Some(0), Some(1)));
            assert_eq!(end_of(&life, vm), (Intent::Off, Some(EndCause::HostDown)));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_after_a_crash_that_fails_is_tried_again_and_not_for_ever() {
    for failures in [2, 100] {
        let host = Host::new();
        let life = Life::begin(&host).await;
        let vm = life.started("web").await;
        let broken = Fate::Fail(WorldError::Failed("by script".to_owned()));
        host.world.add_rule(Rule::next(Kind::Create, broken).times(failures)).await.unwrap();
        host.world.end_guest(vm, Reason::Crash).await.unwrap();
        seconds(3.0).await;
        let life = restart(life, &host).await;
        seconds(600.0).await;
        life.quiet().await;
        let failed = Listing { state: Some(JobState::Failed), limit: 99, ..Default::default() };
        let tries = life.engine.list(&failed).await.unwrap().len();
        if failures == 2 {
            assert_eq!((tries, host.audit().await.begun(vm)), (2, 2));
            assert_eq!(life.record(vm).intent, Intent::On);
        } else {
            assert_eq!((tries, host.audit().await.begun(vm)), (4, 1));
            assert_eq!(end_of(&life, vm), (Intent::Off, Some(EndCause::Crash)));
            assert_eq!(life.events("vm.left_off").await.len(), 1);
        }
        assert_eq!(life.record(vm).crash_seen, None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_whose_domains_cannot_be_read_at_the_start_is_adopted_as_soon_as_they_can() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let store = life.crash().await;
    let blind = Fate::Fail(WorldError::Unreachable("by script".to_owned()));
    host.world.add_rule(Rule::next(Kind::List, blind).times(3)).await.unwrap();
    let life = back(&host, store).await;
    seconds(1.0).await;
    assert!(life.operations.found().is_none());
    seconds(30.0).await;
    assert_eq!(life.operations.found().unwrap().domains[0].verdict, DomainVerdict::Adopted(vm));
    life.quiet().await;
    life.assert_agreement(&host).await;
    assert_eq!(host.audit().await.begun(vm), 1);
}

/// F4 on the simulated host. DOM0D_RESTARTS=1000 for the whole of it.
#[tokio::test(start_paused = true)]
async fn restarts_over_500_domains_forget_none_double_none_and_restart_none() {
    const VMS: usize = 500;
    let restarts = std::env::var("DOM0D_RESTARTS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let host = Host::with(dom0d::config::Settings::default());
    let mut life = Life::begin(&host).await;
    let mut vms = Vec::new();
    for n in 0..VMS {
        let mut record = vm(&format!("vm{n}"));
        record.config.memory = MiB(32);
        record.autostart = Some(Autostart { enabled: true, ..Autostart::default() });
        let id = record.id();
        life.good("create_vm", plan::create_vm(record)).await;
        life.good("start_vm", plan::start_vm(id)).await;
        vms.push(id);
    }
    life.quiet().await;
    for _ in 0..restarts {
        life = restart(life, &host).await;
        while life.operations.found().is_none() {
            seconds(0.01).await;
        }
        let found = life.operations.found().unwrap();
        assert_eq!(found.count_domains(|v| matches!(v, DomainVerdict::Adopted(_))), VMS);
        assert_eq!(found.count_vms(|v| *v == VmVerdict::HasDomain), VMS);
        assert_eq!(life.engine.open_jobs(), 0, "there is nothing to settle");
    }
    life.quiet().await;
    let audit = host.audit().await;
    assert!(vms.iter().all(|vm| audit.begun(*vm) == 1));
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn state_that_was_copied_to_another_machine_starts_nothing_there() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    autostart(&life, vm, 1, 0).await;
    let mut kept = life.store.get(&BOOT, HOST_KEY).await.unwrap().unwrap();
    kept.machine = HostId::from_bytes([9; 16]);
    let mut txn = Txn::new();
    txn.put(&BOOT, HOST_KEY, &kept);
    life.store.commit(txn).await.unwrap();
    let life = reboot(life, &host).await;
    life.quiet().await;
    assert_eq!(end_of(&life, vm), (Intent::Off, Some(EndCause::Unknown)), "it may run on the other one");
    assert_eq!(host.audit().await.begun(vm), 1);
    life.assert_agreement(&host).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_whose_job_ends_while_the_agent_takes_its_first_look_is_not_told_as_gone() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    // The agent dies in the middle of a stop; its guest goes.
    host.world.add_rule(Rule::next(Kind::Shutdown, Fate::Hang)).await.unwrap();
    let stopping = life.submit("stop_vm", plan::stop_vm(vm, false, &host.settings.vm)).await;
    seconds(0.5).await;
    let store = life.crash().await;
    let domid = host.toolstack.find(vm).await.unwrap().unwrap().domid;
    host.toolstack.destroy(domid).await.unwrap();
    // The job that goes on ends between the reading of the domains and the machine's answer to the first look: the
    // first question is that of the start.
    for (kind, delay_ms) in [(Kind::Find, 500), (Kind::Host, 9_000)] {
        host.world.add_rule(Rule::next(kind, Fate::DelayMs(delay_ms)).times(9)).await.unwrap();
    }
    let life = back(&host, store).await;
    life.end(stopping).await;
    life.quiet().await;
    let found = life.operations.found().unwrap();
    assert_eq!(found.vms[0].verdict, VmVerdict::InJob);
    let told = life.events("vm.adoption").await.pop().unwrap();
    assert_eq!(told.severity, dom0d::event::Severity::Info, "{}", told.text);
}
