//! What acceptance promises: durable, once, bounded, remembered.

use super::support::*;
use crate::config;
use crate::job::record::{JOBS, PLANS};
use crate::job::{Engine, JobState, Listing, Options, SubmitError};
use crate::model::JobId;
use crate::store::{Store, StoreError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

fn keyed(key: &str) -> Options {
    Options { idempotency_key: Some(key.to_owned()), ..Options::default() }
}

#[tokio::test(start_paused = true)]
async fn an_accepted_job_is_on_disk_before_its_caller_hears_of_it() {
    let life = Life::new().await;
    life.submit(on("vm/a", &[("holds", Act::Wait { ms: 1000 })])).await;
    let id = life.submit(on("vm/a", &[("a", Act::Do)])).await;
    // Nothing else has run since: this is what a crash now would find.
    let copy = life.store.crash_copy();
    assert_eq!(copy.get(&JOBS, &id).await.unwrap().unwrap().state, JobState::Queued);
    assert_eq!(copy.get(&PLANS, &id).await.unwrap().unwrap().steps.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_cannot_be_written_is_refused_and_leaves_nothing_behind() {
    let store = Store::memory();
    let dead = store.die_after(1);
    let small = config::Jobs { max_open: 1, ..settings() };
    let life = Life::begin(store, std::sync::Arc::default(), small, dead).await;
    let mut too_large = on("vm/a", &[("a", Act::Do)]);
    too_large.params = serde_json::Value::String("x".repeat(300 * 1024));
    for _ in 0..3 {
        let refused = life.engine.submit(too_large.clone()).await;
        assert!(matches!(refused, Err(SubmitError::Store(StoreError::Refused(_)))), "{refused:?}");
        life.assert_idle().await;
    }
    // The only place is still free.
    life.submit(on("vm/a", &[("a", Act::Do)])).await;
    let closed = life.engine.submit(on("vm/a", &[("a", Act::Do)])).await;
    assert!(matches!(closed, Err(SubmitError::QueueFull { open: 1 })), "{closed:?}");
}

#[tokio::test(start_paused = true)]
async fn the_same_key_and_request_is_the_same_job_also_at_the_same_moment_and_after_a_restart() {
    let life = Life::new().await;
    let request =
        || crate::job::Submission { options: keyed("k"), ..on("vm/a", &[("a", Act::Wait { ms: 10 })]) };
    let all = futures_util::future::join_all((0..50).map(|_| life.engine.submit(request()))).await;
    let id = all[0].clone().unwrap();
    assert!(all.iter().all(|answer| *answer == Ok(id)), "{all:?}");
    life.end(id).await;
    assert_eq!(life.submit(request()).await, id, "also after its end");
    let life = life.crash_and_restart().await;
    assert_eq!(life.submit(request()).await, id, "also after a restart");
    assert_eq!(life.world().effects["a"], 1);
}

#[tokio::test(start_paused = true)]
async fn the_same_key_for_another_request_is_a_conflict_that_names_the_job() {
    let life = Life::new().await;
    let id =
        life.submit(crate::job::Submission { options: keyed("k"), ..on("vm/a", &[("a", Act::Do)]) }).await;
    let mut other = crate::job::Submission { options: keyed("k"), ..on("vm/a", &[("a", Act::Do)]) };
    other.params = serde_json::json!(["something else"]);
    assert_eq!(life.engine.submit(other).await, Err(SubmitError::IdempotencyConflict { job: id }));
    life.end(id).await;
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn no_more_jobs_are_open_than_allowed_but_an_essential_one_passes() {
    let life = Life::with(config::Jobs { max_open: 3, ..settings() }).await;
    for _ in 0..3 {
        life.submit(on("vm/a", &[("a", Act::Wait { ms: 1000 })])).await;
    }
    let full = life.engine.submit(on("vm/b", &[("b", Act::Do)])).await;
    assert_eq!(full, Err(SubmitError::QueueFull { open: 3 }));
    let mut essential = on("vm/b", &[("b", Act::Do)]);
    essential.options.essential = true;
    assert_eq!(life.run(essential).await.state, JobState::Succeeded);
    ms(10_000).await;
    assert_eq!(
        life.run(on("vm/b", &[("b", Act::Do)])).await.state,
        JobState::Succeeded,
        "there is room again"
    );
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn ids_rise_and_are_never_given_twice_over_restarts_and_stay_above_the_floor() {
    let life = Life::new().await;
    let mut last = JobId(0);
    for _ in 0..3 {
        let id = life.run(on("vm/a", &[("a", Act::Do)])).await.id;
        assert!(id > last);
        last = id;
    }
    let life = life.crash_and_restart().await;
    let id = life.run(on("vm/a", &[("a", Act::Do)])).await.id;
    assert!(id > last);
    let script = Script { store: Store::memory(), world: Default::default(), dead: CancellationToken::new() };
    let store = Store::memory();
    let script = Script { store: store.clone(), ..script };
    let rebuilt = Engine::open(store, std::sync::Arc::new(script), settings(), JobId(1000)).await.unwrap();
    assert_eq!(rebuilt.submit(on("vm/a", &[("a", Act::Do)])).await, Ok(JobId(1001)));
}

#[tokio::test(start_paused = true)]
async fn history_is_pruned_to_its_bound_with_its_keys_and_open_jobs_stay() {
    let life = Life::with(config::Jobs { history: 10, ..settings() }).await;
    let open = life.submit(on("vm/open", &[("open", Act::Wait { ms: 1_000_000 })])).await;
    for n in 0..600 {
        let mut submission = on("vm/a", &[("a", Act::Do)]);
        submission.options = keyed(&format!("key {n}"));
        life.run(submission).await;
    }
    assert_eq!(life.engine.prune().await.unwrap(), 590);
    assert_eq!(life.store.count("job").await.unwrap(), 11);
    assert_eq!(life.store.count("idempotency").await.unwrap(), 10);
    assert_eq!(life.state(open).await, JobState::Running);
    let all = life.engine.list(&Listing { limit: 1000, ..Listing::default() }).await.unwrap();
    assert_eq!(all.len(), 11);
    assert!(all.is_sorted_by(|a, b| a.id > b.id), "newest first");
    assert_eq!(life.engine.prune().await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_with_the_job_or_in_time_or_when_the_daemon_stops() {
    let life = Life::new().await;
    let id = life.submit(on("vm/a", &[("a", Act::Wait { ms: 3_600_000 })])).await;
    let start = tokio::time::Instant::now();
    let record = life.engine.wait(id, Duration::from_secs(10)).await.unwrap().unwrap();
    assert_eq!((record.state, start.elapsed().as_secs()), (JobState::Running, 10));
    let engine = life.engine.clone();
    let waiting = tokio::spawn(async move { engine.wait(id, Duration::from_secs(1000)).await });
    let short = life.submit(on("vm/b", &[("b", Act::Wait { ms: 500 })])).await;
    assert_eq!(life.end(short).await.state, JobState::Succeeded);
    assert_eq!(start.elapsed().as_millis(), 10_500, "told at the job's end, not later");
    life.engine.halt(Duration::ZERO).await;
    let told = waiting.await.unwrap().unwrap().unwrap();
    assert_eq!((told.state, start.elapsed().as_millis()), (JobState::Running, 10_500));
    assert_eq!(life.engine.submit(on("vm/c", &[("c", Act::Do)])).await, Err(SubmitError::Stopping));
    assert_eq!(life.engine.wait(JobId(99), Duration::from_secs(1)).await.unwrap(), None);
}
