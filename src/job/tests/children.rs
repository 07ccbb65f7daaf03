//! Jobs within jobs.

use super::support::*;
use crate::job::{JobState, LockWant, SubmitError};
use crate::model::TraceParent;
use std::time::Duration;
use tokio::time::Instant;

fn child_on(object: &str, name: &str, act: Act) -> Box<Child> {
    Box::new(Child { name: name.to_owned(), act, locks: vec![LockWant::exclusive(object)] })
}

fn calls(key: &str, child: Box<Child>) -> Act {
    Act::Child { key: key.to_owned(), submission: child }
}

#[tokio::test(start_paused = true)]
async fn a_child_runs_under_its_parents_locks_and_in_its_place() {
    let life = Life::with(crate::config::Jobs { max_running: 1, max_open: 1, ..settings() }).await;
    let child = child_on("vm/a", "child", Act::Wait { ms: 100 });
    let record = life.run(on("vm/a", &[("parent", calls("k", child))])).await;
    assert_eq!(record.state, JobState::Succeeded);
    let [child] = record.children[..] else { panic!("{record:?}") };
    let child = life.end(child).await;
    assert_eq!((child.state, child.parent), (JobState::Succeeded, Some(record.id)));
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_child_works_for_what_its_parent_does_also_after_a_crash() {
    let life = Life::new().await;
    let trace = TraceParent::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").ok();
    let child = child_on("vm/a", "child", Act::Wait { ms: 1000 });
    let mut parent = on("vm/a", &[("wait", Act::Wait { ms: 1000 }), ("parent", calls("k", child))]);
    parent.options.trace = trace;
    let parent = life.submit(parent).await;
    ms(500).await;
    let life = life.crash_and_restart().await;
    let record = life.end(parent).await;
    let [child] = record.children[..] else { panic!("{record:?}") };
    assert_eq!((record.trace, life.end(child).await.trace), (trace, trace));
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_child_that_needs_what_its_parent_does_not_hold_is_refused() {
    let life = Life::new().await;
    let child = child_on("vm/b", "child", Act::Do);
    let record = life.run(on("vm/a", &[("parent", calls("k", child))])).await;
    assert_eq!(record.state, JobState::Failed);
    assert_eq!(record.fault.as_ref().map(|f| f.name.as_str()), Some("CHILD_REFUSED"));
    let mut orphan = on("vm/a", &[("orphan", Act::Do)]);
    orphan.options.parent = Some(record.id);
    assert_eq!(life.engine.submit(orphan).await, Err(SubmitError::NoParent(record.id)));
    assert_eq!(life.store.count("job").await.unwrap(), 1);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_the_parent_finds_the_same_child() {
    let life = Life::new().await;
    let child = child_on("vm/a", "child", Act::Wait { ms: 1000 });
    let parent = life.submit(on("vm/a", &[("parent", calls("k", child))])).await;
    ms(500).await;
    let life = life.crash_and_restart().await;
    let record = life.end(parent).await;
    assert_eq!(record.state, JobState::Succeeded);
    assert_eq!(record.children.len(), 1, "{record:?}");
    assert_eq!(life.world().effects["child"], 1);
    assert_eq!(life.store.count("job").await.unwrap(), 2);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_parent_lets_go_of_its_locks_only_after_its_last_child() {
    let life = Life::new().await;
    let leaves = Act::Leave { submission: child_on("vm/a", "child", Act::Wait { ms: 1000 }) };
    let parent = life.submit(on("vm/a", &[("parent", leaves)])).await;
    let next = life.submit(on("vm/a", &[("next", Act::Do)])).await;
    assert_eq!(life.end(parent).await.state, JobState::Succeeded);
    life.end(next).await;
    assert_eq!(life.world().ended.iter().map(|(id, _)| id.0).collect::<Vec<_>>(), [2, 1, 3]);
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn the_children_of_a_parent_that_fails_or_is_cancelled_are_called_off_and_undone_before_it_ends() {
    for deaf in [false, true] {
        for cancelled in [false, true] {
            let life = Life::new().await;
            let act = if deaf { Act::Deaf { ms: 600_000 } } else { Act::Wait { ms: 600_000 } };
            let leaves = Act::Leave { submission: child_on("vm/a", "child", act) };
            let second = if cancelled { Act::Wait { ms: 600_000 } } else { Act::Fail { no_effect: true } };
            let parent = life.submit(on("vm/a", &[("parent", leaves), ("second", second)])).await;
            let next = life.submit(on("vm/a", &[("next", Act::Do)])).await;
            ms(10).await;
            if cancelled {
                assert!(life.engine.cancel(parent, "operator").await.unwrap());
            }
            let start = Instant::now();
            life.end(next).await;
            assert!(start.elapsed() <= Duration::from_secs(6));
            assert_eq!(
                life.log(),
                [
                    "run parent",
                    "run child",
                    "run second",
                    "undo child",
                    "undo second",
                    "undo parent",
                    "run next"
                ]
                .into_iter()
                .filter(|l| cancelled || *l != "undo second")
                .collect::<Vec<_>>()
            );
            let child = life.end(life.end(parent).await.children[0]).await;
            assert_eq!(child.state, JobState::Cancelled);
            life.assert_idle().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_waits_for_its_child_is_parked_when_the_daemon_stops_and_both_go_on_later() {
    let life = Life::new().await;
    let child = child_on("vm/a", "child", Act::Wait { ms: 60_000 });
    let parent = life.submit(on("vm/a", &[("parent", calls("k", child)), ("after", Act::Do)])).await;
    ms(10).await;
    let start = Instant::now();
    life.engine.halt(Duration::from_secs(30)).await;
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let life = life.crash_and_restart().await;
    let record = life.end(parent).await;
    assert_eq!((record.state, record.children.len()), (JobState::Succeeded, 1));
    life.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn what_takes_a_step_back_may_have_a_child_under_the_same_locks_also_over_a_crash() {
    for crash_ms in [None, Some(50), Some(150)] {
        let life = Life::new().await;
        let helper = Act::UndoChild { submission: child_on("vm/a", "helper", Act::Wait { ms: 100 }) };
        let parent = on("vm/a", &[("done", helper), ("fails", Act::Fail { no_effect: true })]);
        let parent = life.submit(parent).await;
        let life = match crash_ms {
            None => life,
            Some(at_ms) => {
                ms(at_ms).await;
                life.crash_and_restart().await
            }
        };
        let record = life.end(parent).await;
        assert_eq!((record.state, record.children.len()), (JobState::Failed, 1), "{crash_ms:?}: {record:?}");
        assert_eq!(life.end(record.children[0]).await.state, JobState::Succeeded);
        assert_eq!(life.world().effects["helper"], 1);
        life.assert_idle().await;
    }
}
