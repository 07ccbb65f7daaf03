//! A job's way forward: order, places, locks, progress.

use super::support::*;
use crate::config;
use crate::job::record::StepState::{Done, Failed, Intended, Pending, UndoFailed, Undone};
use crate::job::{JobState, LockState, Submission};
use std::time::Duration;
use tokio::time::Instant;

#[tokio::test(start_paused = true)]
async fn each_step_finds_its_own_intent_on_disk_and_the_outcomes_of_those_before_it() {
    let life = Life::new().await;
    let record = life.run(on("vm/a", &[("a", Act::Do), ("b", Act::Do), ("c", Act::Do)])).await;
    let seen: Vec<_> = life.world().seen.clone();
    let expected = vec![
        ("a".to_owned(), JobState::Running, vec![Intended, Pending, Pending]),
        ("b".to_owned(), JobState::Running, vec![Done, Intended, Pending]),
        ("c".to_owned(), JobState::Running, vec![Done, Done, Intended]),
    ];
    assert_eq!(seen, expected);
    assert_eq!((record.state, record.progress), (JobState::Succeeded, 100));
    assert_eq!(life.store.get(&crate::job::record::JOBS, &record.id).await.unwrap().unwrap(), *record);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_failing_step_undoes_itself_and_the_done_ones_in_reverse_and_goes_on_after_a_failing_undo() {
    let life = Life::new().await;
    let acts = [("a", Act::Do), ("b", Act::FailUndo), ("c", Act::Fail { no_effect: false }), ("d", Act::Do)];
    let record = life.run(on("vm/a", &acts)).await;
    let log = ["run a", "run b", "run c", "undo c", "undo b", "undo a"];
    assert_eq!(life.log(), log);
    let states: Vec<_> = record.steps.iter().map(|s| s.state).collect();
    assert_eq!(states, [Undone, UndoFailed, Undone, Pending]);
    assert_eq!(record.state, JobState::Failed);
    assert_eq!(record.fault.as_ref().map(|f| f.name.as_str()), Some("BROKEN"));
    assert_eq!(record.steps[1].error.as_ref().map(|f| f.name.as_str()), Some("STUCK"));
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_step_that_is_sure_to_have_changed_nothing_is_not_undone() {
    let life = Life::new().await;
    let record = life.run(on("vm/a", &[("a", Act::Do), ("b", Act::Fail { no_effect: true })])).await;
    assert_eq!(life.log(), ["run a", "run b", "undo a"]);
    assert_eq!(record.steps.iter().map(|s| s.state).collect::<Vec<_>>(), [Undone, Failed]);
}

#[tokio::test(start_paused = true)]
async fn a_step_that_panics_fails_its_job_and_no_other() {
    let life = Life::new().await;
    let other = life.submit(on("vm/b", &[("other", Act::Wait { ms: 100 })])).await;
    let record = life.run(on("vm/a", &[("a", Act::Do), ("b", Act::Panic)])).await;
    assert_eq!(record.state, JobState::Failed);
    assert_eq!(record.fault.as_ref().map(|f| f.name.as_str()), Some("INTERNAL"));
    assert_eq!(life.log()[2..], ["run b", "undo b", "undo a"]);
    assert_eq!(life.end(other).await.state, JobState::Succeeded);
    assert_eq!(
        life.run(on("vm/a", &[("again", Act::Do)])).await.state,
        JobState::Succeeded,
        "its locks are free"
    );
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn no_more_jobs_run_at_once_than_allowed_and_all_get_their_turn() {
    let life = Life::with(config::Jobs { max_running: 4, ..settings() }).await;
    let mut ids = Vec::new();
    for n in 0..40 {
        ids.push(life.submit(on(&format!("vm/{n}"), &[("a", Act::Wait { ms: 100 })])).await);
    }
    let start = Instant::now();
    for id in ids {
        assert_eq!(life.end(id).await.state, JobState::Succeeded);
    }
    assert_eq!(life.world().most_running, 4);
    assert_eq!(start.elapsed(), Duration::from_millis(1000), "and no place stays empty");
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn jobs_on_one_object_run_in_the_order_of_their_arrival_and_one_that_needs_all_is_not_starved() {
    let life = Life::new().await;
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.push(life.submit(on("vm/a", &[(&format!("a{n}"), Act::Wait { ms: 10 })])).await);
    }
    let mut all = on("unused", &[("host", Act::Wait { ms: 10 })]);
    all.locks = vec![crate::job::LockWant::exclusive("host")];
    ids.push(life.submit(all).await);
    // Each of these could start at once, were there not one before them that needs the host alone.
    for n in 0..10 {
        ids.push(life.submit(on(&format!("vm/{n}"), &[(&format!("b{n}"), Act::Wait { ms: 10 })])).await);
    }
    for id in ids {
        life.end(id).await;
    }
    let expected: Vec<String> = (0..10).map(|n| format!("run a{n}")).chain(["run host".to_owned()]).collect();
    assert_eq!(life.log()[..11], expected);
}

#[tokio::test(start_paused = true)]
async fn five_thousand_jobs_that_wait_for_one_object_do_not_delay_a_job_on_another() {
    let life = Life::new().await;
    let mut first = None;
    for _ in 0..5000 {
        first = first.or(Some(life.submit(on("vm/a", &[("a", Act::Wait { ms: 1_000_000 })])).await));
    }
    let start = Instant::now();
    let record = life.run(on("vm/b", &[("b", Act::Do)])).await;
    assert_eq!((record.state, start.elapsed()), (JobState::Succeeded, Duration::ZERO));
    let waiting = life.engine.waiting_for(crate::model::JobId(5000));
    assert_eq!(waiting, [("vm/a".to_owned(), first.unwrap())]);
    let held = life.engine.locks().into_iter().filter(|l| l.object == "vm/a" && l.state == LockState::Held);
    assert_eq!(held.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn progress_never_falls_and_is_a_hundred_only_when_the_job_has_succeeded() {
    let life = Life::new().await;
    let watch = |submission: Submission| async {
        let id = life.submit(submission).await;
        let open = life.engine.find_open(id).unwrap();
        let mut follow = open.record.subscribe();
        let mut seen = Vec::new();
        loop {
            let record = follow.borrow_and_update().clone();
            seen.push((record.progress, record.state));
            if record.state.is_terminal() {
                return seen;
            }
            follow.changed().await.unwrap();
        }
    };
    let steps = || Act::Progress(vec![10, 50, 40, 100]);
    let good = watch(on("vm/a", &[("a", steps()), ("b", steps())])).await;
    assert!(good.is_sorted_by_key(|(progress, _)| *progress), "{good:?}");
    assert!(good.iter().all(|(p, state)| (*p == 100) == (*state == JobState::Succeeded)), "{good:?}");
    assert!(good.iter().any(|(p, _)| *p == 75), "half of the second half: {good:?}");
    let bad =
        watch(on("vm/a", &[("a", steps()), ("b", steps()), ("c", Act::Fail { no_effect: false })])).await;
    assert!(bad.is_sorted_by_key(|(progress, _)| *progress), "{bad:?}");
    assert!(bad.iter().all(|(p, _)| *p < 100), "{bad:?}");
}

#[tokio::test(start_paused = true)]
async fn a_step_that_answers_too_much_loses_its_answer_and_not_its_job() {
    let life = Life::new().await;
    let huge = || Act::AnswerBytes(300 * 1024);
    let record = life.run(on("vm/a", &[("a", huge()), ("b", Act::Do), ("c", huge())])).await;
    assert_eq!((record.state, &record.result), (JobState::Succeeded, &None));
    assert_eq!(life.log(), ["run a", "run b", "run c"]);
    life.assert_idle().await;
}
