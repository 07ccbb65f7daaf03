//! Death at any moment. The child is this test binary again, running one test that does nothing unless told.

use super::{Seeded, assert_holds, nth, opened, options, runtime};
use dom0d::store::{FaultPoint, FaultWhen, Options, Recovered, Store};
use futures_util::StreamExt;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const CHILD_DIR: &str = "DOM0D_STORE_TEST_DIR";
const CHILD_FAULT: &str = "DOM0D_STORE_TEST_FAULT";

#[test]
fn child_commits_until_it_is_killed() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let fault = std::env::var(CHILD_FAULT).ok().map(|text| {
        let (when, at) = text.split_once(' ').unwrap();
        let when = if when == "before" { FaultWhen::Before } else { FaultWhen::After };
        FaultPoint { at_commit: at.parse().unwrap(), when }
    });
    let found = Store::open(Options { fault, ..options(Path::new(&dir)) }).unwrap();
    assert!(matches!(found.report.recovered, Recovered::Fresh | Recovered::Intact), "{:?}", found.report);
    let first = found.report.commit + 1;
    runtime().block_on(async {
        // Eight at a time, so that groups are cut by death too; queued one after another, so that the nth
        // commit has number n.
        let commits = futures_util::stream::iter(first..).map(|n| found.store.commit(nth(n)));
        let mut answers = std::pin::pin!(commits.buffered(8));
        while let Some(answer) = answers.next().await {
            println!("ack {}", answer.unwrap().number);
        }
    });
}

fn start_child(dir: &Path, fault: Option<&str>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "death::child_commits_until_it_is_killed", "--nocapture"]).env(CHILD_DIR, dir);
    if let Some(fault) = fault {
        command.env(CHILD_FAULT, fault);
    }
    command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap()
}

/// Reads acknowledgements, kills after `kill_after` of them (if any), reads the rest; the last one.
fn last_acknowledged(mut child: Child, kill_after: Option<u64>) -> u64 {
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let (mut seen, mut last) = (0, 0);
    loop {
        let mut line = Vec::new();
        if lines.read_until(b'\n', &mut line).unwrap() == 0 {
            break;
        }
        // The test harness writes lines of its own, and the last line may be cut off.
        let text = String::from_utf8_lossy(&line);
        let number = text.strip_suffix('\n').and_then(|text| text.rsplit_once("ack ")?.1.parse().ok());
        if let Some(number) = number {
            (seen, last) = (seen + 1, number);
            if Some(seen) == kill_after {
                child.kill().unwrap();
            }
        }
    }
    let status = child.wait().unwrap();
    assert!(!status.success(), "the child ended by itself");
    last
}

#[test]
fn after_a_kill_at_any_moment_all_that_was_acknowledged_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let mut seeded = Seeded(9);
    let mut before = 0;
    for round in 0..24 {
        let kill_after = 1 + seeded.below(150);
        let acknowledged = last_acknowledged(start_child(folder.path(), None), Some(kill_after));
        let found = opened(folder.path());
        assert_eq!(found.report.recovered, Recovered::Intact, "round {round}");
        let there = found.report.commit;
        assert!(there >= acknowledged && acknowledged > before, "round {round}: {there} < {acknowledged}");
        runtime.block_on(async {
            assert_holds(&found.store, there).await;
            found.store.close().await;
        });
        before = there;
    }
}

#[test]
fn a_fault_point_dies_exactly_around_its_transaction() {
    let runtime = runtime();
    for (fault, expected) in [("before 1", 0), ("before 30", 29), ("after 1", 1), ("after 31", 31)] {
        let folder = tempfile::tempdir().unwrap();
        let acknowledged = last_acknowledged(start_child(folder.path(), Some(fault)), None);
        let found = opened(folder.path());
        assert_eq!(found.report.commit, expected, "{fault}");
        assert!(acknowledged <= expected, "{fault}");
        runtime.block_on(async {
            assert_holds(&found.store, expected).await;
            found.store.close().await;
        });
    }
}
