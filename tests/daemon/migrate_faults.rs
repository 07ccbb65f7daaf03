//! F22: the source, the target or the link between them dies in each phase of a migration. Once all are back the VM
//! runs on exactly one host within a minute, and it never ran on two; unless its memory died with a host.

use crate::pair::*;
use crate::support::*;
use dom0d::api::value::{structure, text};
use dom0d::model::VmId;
use dom0d::sim::{Behaviour, Fate, Kind, Request, Rule, State};
use dom0d::wire::Value;
use std::time::Duration;

/// Where a migration is made to stay for a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Memory is sent, the guest runs.
    Streaming,
    /// All was sent, the guest stands still, the target builds.
    Building,
    /// S1 is written, and the domain not yet destroyed.
    HandedOver,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Victim {
    Source,
    Target,
    Both,
    Link,
}

/// Begins a migration and brings it to the phase.
async fn begin(pair: &Pair, vm: VmId, phase: Phase, ms: u64) {
    let rule = |kind| Rule::next(kind, Fate::DelayMs(ms)).of_vm(vm);
    match phase {
        Phase::Streaming => {
            let slow = Behaviour { migration_ms: ms, ..Behaviour::default() };
            pair.a.world().set_behaviour(Some(vm), slow).await.unwrap();
        }
        Phase::Building => pair.b.world().add_rule(rule(Kind::Import)).await.unwrap(),
        Phase::HandedOver => pair.a.world().add_rule(rule(Kind::EndExport)).await.unwrap(),
    }
    let before = pair.b.way.bytes();
    pair.a.local().submit("migrate_vm", &pair.to_b(vm), structure([])).await;
    until(&format!("{phase:?}"), PATIENCE, async || match phase {
        Phase::Streaming => pair.b.way.bytes() > before + 100_000,
        Phase::Building => {
            let domains = pair.a.domains().await;
            domains.iter().any(|d| d.vm == Some(vm) && matches!(d.state, State::Ended(_)))
        }
        Phase::HandedOver => pair.a.world().audit().await.unwrap().count(vm, "handed over") == 1,
    })
    .await;
}

async fn calm(pair: &Pair) {
    for host in [&pair.a, &pair.b] {
        host.world().clear_rules().await.unwrap();
    }
}

async fn strike(pair: &mut Pair, victim: Victim) {
    match victim {
        Victim::Source => {
            pair.a.kill().await;
            calm(pair).await;
            pair.a.start().await;
        }
        Victim::Target => {
            pair.b.kill().await;
            calm(pair).await;
            pair.b.start().await;
        }
        Victim::Both => {
            pair.a.kill().await;
            pair.b.kill().await;
            calm(pair).await;
            // The source comes back alone first: what it cannot know it must not guess.
            pair.a.start().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            pair.b.start().await;
        }
        Victim::Link => {
            pair.a.way.set(false);
            pair.b.way.set(false);
            tokio::time::sleep(Duration::from_secs(3)).await;
            calm(pair).await;
            pair.a.way.set(true);
            pair.b.way.set(true);
        }
    }
}

async fn each_phase(victim: Victim) {
    let mut pair = Pair::new().await;
    for phase in [Phase::Streaming, Phase::Building, Phase::HandedOver] {
        let vm = pair.started().await;
        begin(&pair, vm, phase, 5000).await;
        strike(&mut pair, victim).await;
        let on = pair.decided(vm, &format!("{victim:?} in {phase:?}")).await;
        println!("{victim:?} in {phase:?}: on {on}");
        if phase == Phase::Streaming {
            assert_eq!(on, "a", "{victim:?}: nothing was handed over");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_is_killed_in_each_phase_and_the_vm_runs_on_exactly_one_host() {
    each_phase(Victim::Source).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_target_is_killed_in_each_phase_and_the_vm_runs_on_exactly_one_host() {
    each_phase(Victim::Target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_are_killed_in_each_phase_and_the_vm_runs_on_exactly_one_host() {
    each_phase(Victim::Both).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_link_is_cut_in_each_phase_and_the_vm_runs_on_exactly_one_host() {
    each_phase(Victim::Link).await;
}

/// More transactions than a migration makes on one side.
const MOST_COMMITS: u64 = 40;

/// Kills one side at each of its transactions of a migration, before and after it.
async fn sweep(source: bool) {
    let mut pair = Pair::new().await;
    pair.a.local().until_settled().await;
    pair.b.local().until_settled().await;
    let mut points = 0;
    for commit in 1..=MOST_COMMITS {
        for side in ["before", "after"] {
            let vm = pair.started().await;
            pair.a.local().until_idle().await;
            let point = format!("{commit}:{side}");
            let dying = if source { &mut pair.a } else { &mut pair.b };
            dying.kill().await;
            dying.start_dying(&point).await;
            let (mut caller, params) = (pair.a.local(), pair.to_b(vm));
            let mut call = tokio::spawn(async move { caller.call("migrate_vm", &params).await });
            let dying = if source { &mut pair.a } else { &mut pair.b };
            let child = &mut dying.daemon.as_mut().unwrap().child;
            // A source whose target has died tries on for a while: nobody waits for that here.
            let early = tokio::select! {
                answer = &mut call => Some(answer.unwrap()),
                _ = child.wait() => None,
            };
            let died = early.is_none() || child.try_wait().unwrap().is_some();
            dying.kill().await;
            dying.start().await;
            let name = if source { "source" } else { "target" };
            let on = pair.decided(vm, &format!("{name} killed at {point}")).await;
            let answer = match early {
                Some(answer) => answer,
                None => call.await.unwrap(),
            };
            if answer.is_ok() {
                assert_eq!(on, "b", "{name} at {point}: the answer was a success");
            }
            points += 1;
            if answer.is_ok() && !died {
                println!("{name}: {points} points");
                return;
            }
        }
    }
    panic!("a migration makes more than {MOST_COMMITS} commits");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_is_killed_at_each_of_its_transactions_and_the_vm_runs_on_exactly_one_host() {
    sweep(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_target_is_killed_at_each_of_its_transactions_and_the_vm_runs_on_exactly_one_host() {
    sweep(false).await;
}

/// The target's host loses its memory: its daemon dies with it.
async fn reboot_target(pair: &mut Pair) {
    pair.b.kill().await;
    let reboots = pair.b.world().audit().await.unwrap().host_reboots;
    pair.b.world().call(Request::HostReboot, PATIENCE).await.unwrap();
    until("the host has rebooted", PATIENCE, async || {
        pair.b.world().audit().await.unwrap().host_reboots > reboots
    })
    .await;
    calm(pair).await;
    pair.b.start().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_died_with_the_target_after_the_commit_is_told_and_the_vm_is_off_there() {
    let mut pair = Pair::new().await;
    let vm = pair.started().await;
    begin(&pair, vm, Phase::HandedOver, 20_000).await;
    reboot_target(&mut pair).await;
    let off = async || pair.b.local().state_of(vm).await.as_deref() == Some("off");
    until("it is the target's, and off", DECIDED_WITHIN, off).await;
    assert_eq!(pair.a.local().state_of(vm).await, None);
    let told = pair.b.events("vm.arrived").await;
    assert!(told.iter().any(|event| format!("{event:?}").contains("memory was lost")), "{told:?}");
    // Nothing stands in the way of its next start.
    pair.b.local().on_vm("start_vm", vm).await;
    assert_eq!(pair.decided(vm, "started anew").await, "b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_stands_still_here_and_died_there_waits_and_a_human_decides() {
    let mut pair = Pair::new().await;
    let vm = pair.started().await;
    begin(&pair, vm, Phase::HandedOver, 600_000).await;
    pair.a.kill().await;
    reboot_target(&mut pair).await;
    pair.a.start().await;
    until("what is missing is told", DECIDED_WITHIN, async || {
        !pair.a.events("vm.migration_waits").await.is_empty()
    })
    .await;
    assert_eq!(pair.a.local().state_of(vm).await.as_deref(), Some("leaving"));
    for verb in ["start_vm", "stop_vm", "delete_vm", "pause_vm"] {
        let fault = pair.a.local().refused(verb, &[text(REPO), text(vm)]).await;
        assert!(fault.contains("VM_STATE") && fault.contains("leaving"), "{verb}: {fault}");
    }
    assert!(!pair.a.runs(vm).await && !pair.b.runs(vm).await);
    pair.a.local().ask("migration_resolve", &[text(vm), text("run")]).await;
    let off = async || pair.a.local().state_of(vm).await.as_deref() == Some("off");
    until("it is this host's, and off", DECIDED_WITHIN, off).await;
    pair.a.local().on_vm("start_vm", vm).await;
    assert_eq!(pair.decided(vm, "started anew").await, "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_whose_source_is_away_stands_paused_is_told_of_and_a_human_may_let_it_run() {
    let mut pair = Pair::new().await;
    let vm = pair.started().await;
    begin(&pair, vm, Phase::HandedOver, 600_000).await;
    pair.a.kill().await;
    until("what is missing is told", DECIDED_WITHIN, async || {
        !pair.b.events("vm.migration_waits").await.is_empty()
    })
    .await;
    let listed = pair.b.local().ask("migration_list", &[]).await;
    assert_eq!(string(field(&list(&listed)[0], "direction")), "in");
    assert!(!pair.b.runs(vm).await);
    // Its name and id are taken, and nobody can start it as if it were a VM of this host.
    let fault = pair.b.local().refused("create_vm", &[text(REPO), text(vm), vm_params(vm)]).await;
    assert!(fault.contains("VM_EXISTS"), "{fault}");
    let fault = pair.b.local().refused("start_vm", &[text(REPO), text(vm)]).await;
    assert!(fault.contains("VM_NOT_FOUND"), "{fault}");
    assert!(pair.b.events("domain.unknown").await.is_empty());
    let answer: Value = pair.b.local().ask("migration_resolve", &[text(vm), text("run")]).await;
    assert_eq!(string(field(&answer, "state")), "running");
    // The source comes back, hears that it was taken, and gives its own up.
    calm(&pair).await;
    pair.a.start().await;
    assert_eq!(pair.decided(vm, "let run by a human").await, "b");
}
