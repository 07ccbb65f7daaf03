//! A crash right after, and right before, every commit.

use super::support::*;
use crate::job::record::{JOBS, StepState};
use crate::job::{JobState, LockWant, Resume, Submission};
use crate::model::JobId;
use crate::store::{Range, Store};
use proptest::prelude::*;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Jobs with every way to end, and among them a child.
fn jobs() -> Vec<Submission> {
    let child = Child { name: "child".to_owned(), act: Act::Do, locks: vec![LockWant::exclusive("vm/a")] };
    let calls = Act::Child { key: "k".to_owned(), submission: Box::new(child) };
    let mut undone = on("vm/c", &[("i", Act::Do), ("j", Act::Do)]);
    undone.steps[1].resume = Resume::Undo;
    vec![
        on("vm/a", &[("a", Act::Do), ("b", calls), ("c", Act::Answer(serde_json::json!({"n": 1})))]),
        on("vm/a", &[("d", Act::Do), ("e", Act::FailUndo), ("f", Act::Fail { no_effect: false })]),
        on("vm/b", &[("g", Act::Do), ("h", Act::Panic)]),
        undone,
    ]
}

/// Whether what a job says agrees with what its steps did to the world.
fn check(record: &crate::job::JobRecord, world: &World) {
    assert!(record.state.is_terminal(), "{record:?}");
    assert_eq!(record.progress == 100, record.state == JobState::Succeeded);
    for step in &record.steps {
        let on = world.on.get(&step.name).copied();
        match step.state {
            StepState::Done => assert_eq!(on, Some(true), "{step:?}"),
            StepState::Undone => assert_ne!(on, Some(true), "{step:?}"),
            StepState::Pending => {
                assert_eq!(on, None, "a step without an intent had an effect (I6): {step:?}")
            }
            StepState::UndoFailed => assert_eq!(step.name, "e"),
            StepState::Failed | StepState::Intended => panic!("{step:?}"),
        }
    }
    let expected = match record.verb.as_str() {
        "child" => JobState::Succeeded,
        _ if record.steps[0].name == "a" => JobState::Succeeded,
        _ if record.steps[0].name == "i" => return,
        _ => JobState::Failed,
    };
    assert_eq!(record.state, expected, "{record:?}");
}

/// Lets the engine die after its `commits` commit (with `sharp`: before whatever would follow it) and restart,
/// over and over until all is done. Answers how many lives it took.
async fn live_and_die(commits: &[u64], sharp: bool) -> usize {
    let mut store = Store::memory();
    let world = Arc::default();
    let mut accepted: Vec<JobId> = Vec::new();
    let mut ended = std::collections::BTreeMap::new();
    let mut lives = 0;
    loop {
        lives += 1;
        let dead = commits.get(lives - 1).map(|n| store.die_after(*n));
        let stops = if sharp { dead.clone() } else { None }.unwrap_or_default();
        let life = Life::begin(store, Arc::clone(&world), settings(), stops).await;
        life.engine.resume();
        if lives == 1 {
            for submission in jobs() {
                if let Ok(id) = life.engine.submit(submission).await {
                    accepted.push(id);
                }
            }
        }
        let dead = dead.unwrap_or_default();
        let all = futures_util::future::join_all(accepted.iter().map(|id| life.end(*id)));
        tokio::select! {
            _ = all => {}
            () = async { dead.cancelled().await; ms(1000).await } => {}
        }
        if !dead.is_cancelled() {
            life.assert_idle().await;
            store = life.store.clone();
            break;
        }
        (store, _) = life.crash().await;
        for (_, record) in store.scan(&JOBS, Range::all()).await.unwrap() {
            if record.state.is_terminal() {
                let before = ended.insert(record.id, record.clone());
                assert!(before.is_none_or(|before| before == record), "an end is for good: {record:?}");
            }
        }
    }
    let rows = store.scan(&JOBS, Range::all()).await.unwrap();
    let world = world.lock().unwrap();
    for (_, record) in &rows {
        check(record, &world);
        assert!(ended.get(&record.id).is_none_or(|before| before == record));
    }
    let ids: Vec<JobId> = rows.iter().map(|(_, record)| record.id).collect();
    assert!(accepted.iter().all(|id| ids.contains(id)), "an accepted job is lost");
    assert!(ids.len() <= accepted.len() + 1, "a job nobody was told of: {ids:?} {accepted:?}");
    lives
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_at_any_commit_every_accepted_job_ends_once_and_agrees_with_the_world() {
    for sharp in [false, true] {
        let mut commits = 1;
        while live_and_die(&[commits], sharp).await == 2 {
            commits += 1;
        }
        assert!(commits > 20, "the jobs take more commits than {commits}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn so_it_is_after_crash_upon_crash(commits in prop::collection::vec(1..12_u64, 1..6), sharp: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(live_and_die(&commits, sharp));
    }
}

#[tokio::test(start_paused = true)]
async fn a_step_in_doubt_is_told_so_and_others_are_not() {
    let life = Life::new().await;
    let id = life.submit(on("vm/a", &[("a", Act::Do), ("b", Act::Wait { ms: 1000 }), ("c", Act::Do)])).await;
    ms(500).await;
    let life = life.crash_and_restart().await;
    assert_eq!(life.end(id).await.state, JobState::Succeeded);
    assert_eq!(life.world().resumed, ["b"]);
    assert_eq!(life.log(), ["run a", "run b", "run b", "run c"]);
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_a_job_that_had_begun_has_its_locks_before_any_other() {
    let life = Life::new().await;
    let first = life.submit(on("vm/a", &[("first", Act::Wait { ms: 1000 })])).await;
    let second = life.submit(on("vm/a", &[("second", Act::Wait { ms: 1000 })])).await;
    ms(500).await;
    let (store, world) = life.crash().await;
    // As if the second had overtaken the first between the giving of ids and the queue, and begun.
    let mut records = store.scan(&JOBS, Range::all()).await.unwrap();
    let mut txn = crate::store::Txn::new();
    let (begun, waiting) = (records[0].1.clone(), records[1].1.clone());
    let swap = |record: &mut crate::job::JobRecord, other: crate::job::JobRecord| {
        (record.state, record.started) = (other.state, other.started);
        record.steps[0].state = other.steps[0].state;
    };
    swap(&mut records[0].1, waiting);
    swap(&mut records[1].1, begun);
    for (_, record) in &records {
        txn.put(&JOBS, &record.id, record);
    }
    store.commit(txn).await.unwrap();
    let life = Life::begin(store, world, settings(), CancellationToken::new()).await;
    life.world().log.clear();
    assert_eq!(life.engine.resume(), 2);
    assert!(life.engine.cancel(second, "operator").await.unwrap());
    assert_eq!(life.end(second).await.state, JobState::Cancelled);
    assert_eq!(life.end(first).await.state, JobState::Succeeded);
    assert_eq!(life.log(), ["undo second", "run first"]);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn what_a_step_did_before_the_daemon_stopped_in_order_is_not_done_again() {
    let life = Life::new().await;
    let id = life.submit(on("vm/a", &[("a", Act::Wait { ms: 100 }), ("b", Act::Do)])).await;
    ms(50).await;
    life.engine.halt(std::time::Duration::from_secs(10)).await;
    let life = life.crash_and_restart().await;
    assert_eq!(life.end(id).await.state, JobState::Succeeded);
    assert_eq!(life.log(), ["run a", "run b"]);
}

#[tokio::test(start_paused = true)]
async fn a_step_whose_data_is_larger_than_a_row_runs_also_after_a_crash_and_leaves_nothing() {
    let life = Life::new().await;
    let load = Act::Load("é\"".repeat(400_000));
    let id = life
        .submit(on("vm/a", &[("first", Act::Wait { ms: 100 }), ("large", load), ("last", Act::Do)]))
        .await;
    ms(50).await;
    let life = life.crash_and_restart().await;
    assert_eq!(life.end(id).await.state, JobState::Succeeded);
    assert_eq!(life.world().effects["large"], 1);
    life.assert_idle().await;
}
