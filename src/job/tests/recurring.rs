//! Work that comes again.

use super::support::*;
use crate::job::{JobState, Listing, Recurring};
use std::sync::Arc;
use std::time::Duration;

fn every_hour(act: Act) -> Recurring {
    let submission = move || on("vm/r", &[("r", act.clone())]);
    Recurring { name: "r", every: Duration::from_secs(3600), submission: Arc::new(submission) }
}

#[tokio::test(start_paused = true)]
async fn recurring_work_runs_on_schedule_and_of_its_successes_only_the_last_is_kept() {
    let life = Life::new().await;
    life.engine.start_recurring(every_hour(Act::Do));
    assert_eq!(life.engine.recurring_names(), ["r"]);
    ms(1000).await;
    assert_eq!(life.world().effects["r"], 1, "the first at once");
    ms(10 * 3_600_000).await;
    assert_eq!(life.world().effects["r"], 11);
    let kept = life.engine.list(&Listing { limit: 100, ..Listing::default() }).await.unwrap();
    let kept: Vec<_> = kept.iter().map(|job| (job.id.0, job.recurring.as_deref())).collect();
    assert_eq!(kept, [(11, Some("r"))]);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn recurring_work_is_not_repeated_after_a_quick_restart() {
    let life = Life::new().await;
    life.engine.start_recurring(every_hour(Act::Do));
    ms(1000).await;
    let life = life.crash_and_restart().await;
    life.engine.start_recurring(every_hour(Act::Do));
    ms(3_500_000).await;
    assert_eq!(life.world().effects["r"], 1);
    ms(200_000).await;
    assert_eq!(life.world().effects["r"], 2);
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_recurring_work_is_kept_and_it_goes_on() {
    let life = Life::new().await;
    life.engine.start_recurring(every_hour(Act::Fail { no_effect: true }));
    ms(2 * 3_600_000 + 1000).await;
    let failed = Listing { state: Some(JobState::Failed), limit: 100, ..Listing::default() };
    assert_eq!(life.engine.list(&failed).await.unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn recurring_work_that_never_succeeds_in_ending_is_ended_by_its_deadline_and_comes_again() {
    let life = Life::new().await;
    life.engine.start_recurring(every_hour(Act::Deaf { ms: u64::from(u32::MAX) }));
    ms(3 * 3_600_000).await;
    let failed = Listing { state: Some(JobState::Failed), limit: 100, ..Listing::default() };
    assert_eq!(life.engine.list(&failed).await.unwrap().len(), 1);
    assert_eq!(life.engine.open_jobs(), 1);
}
