//! What the engine tells monitoring.

use super::support::*;

#[tokio::test(start_paused = true)]
async fn jobs_are_counted_by_what_they_do_and_by_how_they_ended() {
    let life = Life::new().await;
    let first = life.submit(on("vm/a", &[("long", Act::Wait { ms: 1000 })])).await;
    let second = life.submit(on("vm/a", &[("bad", Act::Fail { no_effect: true })])).await;
    ms(10).await;
    let figures = life.engine.figures();
    assert_eq!((figures.running, figures.queued, figures.undoing), (1, 1, 0));
    // Each has the VM, and the host shared.
    assert_eq!((figures.locks_held, figures.locks_waiting), (2, 2));
    assert!(figures.oldest_wait.is_some());
    life.end(first).await;
    life.end(second).await;
    let figures = life.engine.figures();
    assert_eq!((figures.running, figures.queued, figures.oldest_wait), (0, 0, None));
    let [ended] = &figures.ended[..] else { panic!("{figures:?}") };
    assert_eq!((ended.verb.as_str(), ended.succeeded, ended.failed, ended.cancelled), ("test", 1, 1, 0));
    assert_eq!(ended.took.count(), 2);
}
