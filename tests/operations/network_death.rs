//! The agent killed at every transaction: of a change, of one that failed, of one that nobody confirmed, of a rollback that
//! was blocked, of keeping what worked, and of a boot.

use crate::faulty::Faulty;
use crate::house::*;
use crate::network::{assert_told_and_acknowledged, change, first, house, is, second};
use dom0d::job::JobRecord;
use dom0d::model::network::NetworkView;
use dom0d::network::Desired;
use dom0d::operation::network::{Ending, OnFailure, Options};
use dom0d::sim::Request;
use dom0d::store::Store;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How a change went whose agent was killed at one of its transactions, or ended before that; and the next life.
struct Killed {
    kernel: Arc<Faulty>,
    life: Life,
    record: Arc<JobRecord>,
    /// What the kernel had before.
    old: NetworkView,
    is_killed: bool,
}

/// Has `before` declared, then changes to `second`, with faults, and kills the agent at that transaction. `sharp`: what the
/// dead one still wanted of the world is not done. `patience_s`: how long it lives on after the job's end.
async fn killed_at(
    commit: u64,
    sharp: bool,
    before: Option<Desired>,
    options: Options,
    faults: impl Fn(&Faulty),
    patience_s: f64,
) -> Killed {
    let (host, kernel) = house();
    let store = Store::memory();
    let dead = store.die_after(u64::MAX);
    let hold = if sharp { dead.clone() } else { CancellationToken::new() };
    let life = Life::on(&host, store.clone(), hold).await;
    if let Some(before) = before {
        life.good("network_apply", change(before, Options::default())).await;
    }
    let old = is(&kernel).await;
    kernel.heal();
    faults(&kernel);
    let _ = store.die_after(commit);
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
    assert_eq!(life.operations.network_open().await.unwrap(), None, "{commit} {sharp}");
    assert_eq!(life.operations.network_show().await.unwrap().drift, Vec::<String>::new(), "{commit} {sharp}");
    Killed { kernel, life, record, old, is_killed }
}

/// Each transaction in turn, until one run is not killed.
async fn killed_at_each_commit(options: Options, faults: impl Fn(&Faulty), patience_s: f64) {
    for sharp in [false, true] {
        let mut failures = 0;
        for commit in 1.. {
            let one = killed_at(commit, sharp, Some(first()), options, &faults, patience_s).await;
            // Killed before it met the fault, which is over then: it goes on, and holds.
            if one.record.fault.is_some() {
                failures += 1;
                let declared = one.life.operations.network_confirmed().await.unwrap().desired;
                assert_eq!((is(&one.kernel).await, declared), (one.old, first()), "{commit} {sharp}");
                if !one.life.events("network.operation_failed").await.is_empty() {
                    assert_told_and_acknowledged(&one.life).await;
                }
                let blocked = one.life.events("network.rollback_blocked").await;
                let is_over = blocked.iter().all(|one| one.acknowledged.is_some());
                assert!(blocked.len() <= 1 && is_over, "{blocked:?}");
            }
            if !one.is_killed {
                assert!(one.record.fault.is_some(), "{:?}", one.record);
                break;
            }
        }
        assert!(failures > 6, "{failures}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_killed_at_any_commit_leaves_either_the_old_network_or_the_new_one() {
    for sharp in [false, true] {
        for commit in 1.. {
            let one = killed_at(commit, sharp, Some(first()), Options::default(), |_| {}, 50.0).await;
            let declared = one.life.operations.network_confirmed().await.unwrap().desired;
            if one.record.fault.is_none() {
                assert_eq!(declared, second(), "{commit} {sharp}");
            } else {
                assert_eq!((is(&one.kernel).await, declared), (one.old, first()), "{commit} {sharp}");
                assert_told_and_acknowledged(&one.life).await;
            }
            if !one.is_killed {
                assert!(commit > 3, "{commit}");
                break;
            }
        }
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
    let options = Options { on_failure: OnFailure::Keep, ..Options::default() };
    for commit in 1.. {
        let refuse = |kernel: &Faulty| kernel.refuse_at.store(20, Ordering::SeqCst);
        let one = killed_at(commit, false, None, options, refuse, 50.0).await;
        if !one.is_killed {
            let ending = one.life.operations.network_history(1).await.unwrap()[0].ending;
            assert!(commit > 6 && ending == Ending::Kept, "{commit}: {ending:?}");
            break;
        }
    }
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
