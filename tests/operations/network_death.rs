//! The agent killed at every transaction of the ways back: of a change that failed, of one that nobody confirmed, of a
//! rollback that was blocked, and of a boot.

use crate::faulty::Faulty;
use crate::house::*;
use crate::network::{assert_told_and_acknowledged, change, first, house, is, second};
use dom0d::operation::network::{OnFailure, Options};
use dom0d::sim::Request;
use dom0d::store::Store;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Runs a change that does not hold, and kills the agent at its transaction 1, 2, … until one run is not killed.
async fn killed_at_each_commit(options: Options, faults: impl Fn(&Faulty), patience_s: f64) {
    for sharp in [false, true] {
        let (mut commits, mut failures) = (1, 0);
        loop {
            let (host, kernel) = house();
            let store = Store::memory();
            let dead = store.die_after(u64::MAX);
            let hold = if sharp { dead.clone() } else { CancellationToken::new() };
            let life = Life::on(&host, store.clone(), hold).await;
            life.good("network_apply", change(first(), Options::default())).await;
            let old = is(&kernel).await;
            kernel.heal();
            faults(&kernel);
            let _ = store.die_after(commits);
            let job = life.submit("network_apply", change(second(), options)).await;
            let ended = async {
                life.end(job).await;
                seconds(patience_s).await;
            };
            let is_killed = tokio::select! {
                () = dead.cancelled() => true,
                () = ended => false,
            };
            let store = life.crash().await;
            kernel.heal();
            let life = Life::on(&host, store, CancellationToken::new()).await;
            let record = life.end(job).await;
            life.quiet().await;
            if is_killed && record.fault.is_none() {
                // Killed before it met the fault, which is over: it goes on, and holds.
                assert_eq!(life.operations.network_show().await.unwrap().drift, Vec::<String>::new());
                commits += 1;
                continue;
            }
            failures += 1;
            assert!(record.fault.is_some(), "{commits} {sharp}: {record:?}");
            assert_eq!(life.operations.network_confirmed().await.unwrap().desired, first());
            assert_eq!(is(&kernel).await, old, "{commits} {sharp}");
            if life.events("network.operation_failed").await.is_empty() {
                assert_eq!(life.operations.network_open().await.unwrap(), None, "nothing had been done");
            } else {
                assert_told_and_acknowledged(&life).await;
            }
            let blocked = life.events("network.rollback_blocked").await;
            assert!(
                blocked.len() <= 1 && blocked.iter().all(|one| one.acknowledged.is_some()),
                "{blocked:?}"
            );
            if !is_killed {
                break;
            }
            commits += 1;
        }
        assert!(failures > 6, "{failures} of {commits}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_killed_at_any_commit_of_a_rollback_finds_its_end_and_tells_it_once() {
    let options = Options::default();
    killed_at_each_commit(options, |kernel| kernel.refuse_at.store(20, Ordering::SeqCst), 50.0).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_killed_at_any_commit_of_a_window_that_nobody_confirmed_finds_the_way_back() {
    let options = Options { confirm_within_s: Some(30), ..Options::default() };
    killed_at_each_commit(options, |_| {}, 50.0).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_killed_at_any_commit_of_a_blocked_rollback_and_its_tries_finds_the_way_back() {
    let options = Options::default();
    // From here on all is refused; the tries go on all the while.
    killed_at_each_commit(options, |kernel| kernel.refuse_from.store(20, Ordering::SeqCst), 200.0).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_killed_at_any_commit_of_keeping_what_worked_has_declared_what_there_is() {
    let mut commits = 1;
    loop {
        let (host, kernel) = house();
        let store = Store::memory();
        let dead = store.die_after(u64::MAX);
        let life = Life::on(&host, store.clone(), CancellationToken::new()).await;
        kernel.heal();
        kernel.refuse_at.store(20, Ordering::SeqCst);
        let _ = store.die_after(commits);
        let options = Options { on_failure: OnFailure::Keep, ..Options::default() };
        let job = life.submit("network_apply", change(second(), options)).await;
        let ended = async {
            life.end(job).await;
            seconds(50.0).await;
        };
        let is_killed = tokio::select! {
            () = dead.cancelled() => true,
            () = ended => false,
        };
        let store = life.crash().await;
        kernel.heal();
        let life = Life::on(&host, store, CancellationToken::new()).await;
        life.end(job).await;
        life.quiet().await;
        let shown = life.operations.network_show().await.unwrap();
        assert_eq!(shown.drift, Vec::<String>::new(), "{commits}");
        assert_eq!(life.operations.network_open().await.unwrap(), None, "{commits}");
        if !is_killed {
            break;
        }
        commits += 1;
    }
    assert!(commits > 6, "{commits}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_killed_at_any_commit_after_a_boot_brings_the_network_back_all_the_same() {
    let mut commits = 1;
    loop {
        let (host, kernel) = house();
        let life = Life::begin(&host).await;
        life.good("network_apply", change(second(), Options::default())).await;
        let declared = is(&kernel).await;
        let store = life.crash().await;
        host.world.call(Request::HostReboot, Duration::from_secs(1)).await.unwrap();
        seconds(1.0).await;
        let dead = store.die_after(commits);
        let life = Life::on(&host, store, CancellationToken::new()).await;
        let is_killed = tokio::select! {
            () = dead.cancelled() => true,
            () = life.quiet() => false,
        };
        let store = life.crash().await;
        let life = Life::on(&host, store, CancellationToken::new()).await;
        life.quiet().await;
        assert_eq!(is(&Arc::clone(&kernel)).await, declared, "{commits}");
        if !is_killed {
            break;
        }
        commits += 1;
    }
    assert!(commits > 4, "{commits}");
}

#[tokio::test(start_paused = true)]
async fn what_failed_goes_back_at_once_though_nothing_can_be_written_any_more() {
    let mut seen = 0;
    for commits in 1..5 {
        let (host, kernel) = house();
        let store = Store::memory();
        let life = Life::on(&host, store.clone(), CancellationToken::new()).await;
        life.good("network_apply", change(first(), Options::default())).await;
        let old = is(&kernel).await;
        kernel.heal();
        kernel.refuse_at.store(20, Ordering::SeqCst);
        let _ = store.die_after(commits);
        life.submit("network_apply", change(second(), Options::default())).await;
        seconds(5.0).await;
        assert_eq!(is(&kernel).await, old, "{commits}");
        seen += usize::from(kernel.asked.load(Ordering::SeqCst) >= 20);
        life.crash().await;
    }
    assert!(seen > 0, "none got so far");
}
