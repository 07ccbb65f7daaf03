//! Cancels and deadlines, whenever they come.

use super::support::*;
use crate::config;
use crate::job::engine::CANCELS;
use crate::job::{JobState, Options, Submission};
use crate::model::JobId;
use std::time::Duration;
use tokio::time::Instant;

fn with_deadline(submission: Submission, ms: u64) -> Submission {
    let deadline = Some(Duration::from_millis(ms));
    Submission { options: Options { deadline, ..Options::default() }, ..submission }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_waits_for_a_lock_or_a_place_is_cancelled_at_once() {
    let life = Life::with(config::Jobs { max_running: 1, ..settings() }).await;
    let first = life.submit(on("vm/a", &[("a", Act::Wait { ms: 60_000 })])).await;
    let behind = life.submit(on("vm/a", &[("behind", Act::Do)])).await;
    let ready = life.submit(on("vm/b", &[("ready", Act::Do)])).await;
    ms(1).await;
    let start = Instant::now();
    for id in [behind, ready] {
        assert!(life.engine.cancel(id, "operator").await.unwrap());
        let record = life.end(id).await;
        assert_eq!((record.state, record.started), (JobState::Cancelled, None));
        assert_eq!(record.cancel.as_ref().map(|c| c.by.as_str()), Some("operator"));
        assert!(!life.engine.cancel(id, "operator").await.unwrap(), "it has ended");
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert_eq!(life.log(), ["run a"]);
    life.end(first).await;
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_running_job_is_cancelled_within_the_bound_even_if_its_step_does_not_heed_it_and_is_undone() {
    let life = Life::new().await;
    let start = Instant::now();
    let heeds = life.submit(on("vm/a", &[("a", Act::Do), ("b", Act::Wait { ms: 60_000 })])).await;
    let deaf = life.submit(on("vm/b", &[("c", Act::Do), ("d", Act::Deaf { ms: 60_000 })])).await;
    ms(10).await;
    for id in [heeds, deaf] {
        assert!(life.engine.cancel(id, "operator").await.unwrap());
    }
    assert_eq!(life.end(heeds).await.state, JobState::Cancelled);
    assert_eq!(start.elapsed().as_millis(), 10);
    let record = life.end(deaf).await;
    assert_eq!(record.state, JobState::Cancelled);
    assert_eq!(start.elapsed().as_millis(), 5010, "the bound of these settings");
    assert_eq!(life.log()[4..], ["undo b", "undo a", "undo d", "undo c"]);
    ms(100_000).await;
    assert!(!life.world().effects.contains_key("d"), "what was dropped does not go on");
    assert!(!life.engine.cancel(deaf, "operator").await.unwrap());
    assert!(!life.engine.cancel(JobId(4711), "operator").await.unwrap());
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn cancels_at_the_very_end_are_answered_by_what_becomes_of_the_job_and_leave_no_row() {
    for turns in 0..40 {
        let life = Life::new().await;
        let id = life.submit(on("vm/a", &[("a", Act::Do), ("b", Act::Do)])).await;
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        let taken = life.engine.cancel(id, "operator").await.unwrap();
        let record = life.end(id).await;
        assert_eq!(record.cancel.is_some(), taken, "after {turns} turns: {record:?}");
        if record.state == JobState::Cancelled {
            assert!(taken);
        }
        life.assert_idle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_answered_cancel_survives_a_crash() {
    let life = Life::new().await;
    let running = life.submit(on("vm/a", &[("a", Act::Do), ("b", Act::Deaf { ms: 60_000 })])).await;
    let queued = life.submit(on("vm/a", &[("c", Act::Do)])).await;
    ms(10).await;
    let (engine, by) = (life.engine.clone(), "operator");
    assert!(engine.cancel(running, by).await.unwrap());
    // The engine dies before the other one's run, which ends it, had a turn.
    assert!(engine.cancel(queued, by).await.unwrap());
    let life = life.crash_and_restart().await;
    for id in [running, queued] {
        let record = life.end(id).await;
        assert_eq!(record.state, JobState::Cancelled, "{record:?}");
        assert_eq!(record.cancel.as_ref().map(|c| c.by.as_str()), Some(by));
    }
    assert!(!life.world().effects.contains_key("c"));
    assert!(!life.world().on["a"], "undone");
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_cancel_that_came_too_late_and_lost_its_answer_in_a_crash_is_forgotten() {
    let life = Life::new().await;
    let id = life.run(on("vm/a", &[("a", Act::Do)])).await.id;
    let mut txn = crate::store::Txn::new();
    let request = crate::job::CancelRecord { by: "operator".to_owned(), at: crate::model::Timestamp::now() };
    txn.put(&CANCELS, &id, &request);
    life.store.commit(txn).await.unwrap();
    let life = life.crash_and_restart().await;
    assert_eq!(life.state(id).await, JobState::Succeeded);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_deadline_passes_while_it_waits_ends_then() {
    let life = Life::with(config::Jobs { max_running: 1, ..settings() }).await;
    let start = Instant::now();
    let long = life.submit(on("vm/a", &[("a", Act::Wait { ms: 600_000 })])).await;
    let behind = life.submit(with_deadline(on("vm/a", &[("b", Act::Do)]), 2000)).await;
    let ready = life.submit(with_deadline(on("vm/b", &[("c", Act::Do)]), 1000)).await;
    for (id, after) in [(ready, 1000), (behind, 2000)] {
        let record = life.end(id).await;
        assert_eq!(record.state, JobState::Failed);
        assert_eq!(record.fault.as_ref().map(|f| f.name.as_str()), Some("JOB_DEADLINE"));
        assert_eq!(start.elapsed().as_millis(), after);
    }
    assert_eq!(life.log(), ["run a"], "neither began");
    assert_eq!(life.end(long).await.state, JobState::Succeeded);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_running_job_whose_deadline_passes_is_undone_within_the_bound() {
    let life = Life::new().await;
    let start = Instant::now();
    let acts = [("a", Act::Do), ("b", Act::Wait { ms: 60_000 })];
    let heeds = life.submit(with_deadline(on("vm/a", &acts), 1000)).await;
    let deaf = life.submit(with_deadline(on("vm/b", &[("c", Act::Deaf { ms: 60_000 })]), 1000)).await;
    for (id, after) in [(heeds, 1000), (deaf, 6000)] {
        let record = life.end(id).await;
        assert_eq!((record.state, &record.cancel), (JobState::Failed, &None));
        assert_eq!(record.fault.as_ref().map(|f| f.name.as_str()), Some("JOB_DEADLINE"));
        assert_eq!(start.elapsed().as_millis(), after);
    }
    assert_eq!(life.log()[3..], ["undo b", "undo a", "undo c"]);
    life.assert_idle().await;
}
