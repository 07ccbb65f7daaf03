//! A store with 100,000 ended jobs and 1,000,000 events: how soon the daemon is ready, also after SIGKILL, what it
//! takes, and how callers fare while it prunes that down to its bounds.

use crate::daemon::{Daemon, Home, call, median, say, structure, text};
use dom0d::event::{Event, kind};
use dom0d::job::{JobRecord, JobState, LockWant, StepRecord, StepState};
use dom0d::model::{JobId, Timestamp};
use dom0d::store::{self, Store, Table, Txn};
use dom0d::wire::{Client, Value};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const JOBS: u64 = 100_000;
const EVENTS: u64 = 1_000_000;

pub fn figures(runtime: &Runtime) {
    let home = Home::new();
    let started = Instant::now();
    runtime.block_on(fill(&home));
    let disk = folder_mib(&home.state());
    say(&format!(
        "{JOBS} jobs and {EVENTS} events written in {:.0} s, {disk:.0} MiB on disk",
        started.elapsed().as_secs_f64()
    ));
    let mut daemon = home.start("");
    tell_ready("first start", &daemon);
    let mut client = home.client(daemon.address);
    // Long enough that pruning is under way.
    latencies(runtime, &mut client, Duration::from_secs(2), "while pruning");
    say(&format!("RSS {:.1} MiB", daemon.process.rss_mib()));
    daemon.process.kill();
    let daemon = home.start("");
    tell_ready("after SIGKILL in the middle of pruning", &daemon);
    let mut client = home.client(daemon.address);
    let started = Instant::now();
    let mut peak: f64 = 0.0;
    let mut times = [const { Vec::new() }; 2];
    while !runtime.block_on(pruned(&mut client)) {
        peak = peak.max(daemon.process.rss_mib());
        sample(runtime, &mut client, &mut times);
        assert!(started.elapsed() < Duration::from_secs(600), "pruning does not end");
    }
    let cpu = daemon.process.cpu().as_secs_f64();
    say(&format!(
        "pruned to 10,000 jobs and 100,000 events {:.0} s after that start ({cpu:.0} s of CPU); highest RSS seen {peak:.1} MiB, ever {:.1} MiB (bar: at most 60)",
        started.elapsed().as_secs_f64(),
        daemon.process.status_kib("VmHWM:") as f64 / 1024.0
    ));
    tell_latencies("while pruning", &mut times);
    latencies(runtime, &mut client, Duration::from_secs(2), "afterwards");
    std::thread::sleep(Duration::from_secs(3));
    say(&format!(
        "RSS afterwards {:.1} MiB, {:.0} MiB on disk",
        daemon.process.rss_mib(),
        folder_mib(&home.state())
    ));
    drop(daemon);
    let daemon = home.start("");
    tell_ready("start with the pruned store", &daemon);
}

fn tell_ready(when: &str, daemon: &Daemon) {
    // What opening took for a moment is given back right after READY.
    std::thread::sleep(Duration::from_millis(500));
    say(&format!(
        "{when}: ready in {:.0} ms (bar: at most 3000), RSS {:.1} MiB, ever {:.1} MiB (bar: at most 60)",
        daemon.ready.as_secs_f64() * 1e3,
        daemon.process.rss_mib(),
        daemon.process.status_kib("VmHWM:") as f64 / 1024.0
    ));
}

async fn fill(home: &Home) {
    let options =
        store::Options { cache_mib: 64, counter_tables: &["job"], ..store::Options::new(home.state()) };
    let store = Store::open(options).unwrap().store;
    let jobs: Table<JobRecord> = Table::new("job", 1);
    for first in (1..=JOBS).step_by(500) {
        let mut txn = Txn::new();
        for id in first..(first + 500).min(JOBS + 1) {
            txn.put(&jobs, &id, &job(id));
        }
        store.commit(txn).await.unwrap();
    }
    for first in (0..EVENTS).step_by(2_000) {
        let mut txn = Txn::new();
        for n in first..first + 2_000 {
            let vm = format!("vm/0004fb00-0006-4000-8000-{:012x}", n % 500);
            let event = Event::new(kind::VM_STARTED, vm, format!("VM web-{} was started", n % 500));
            event.with_job(JobId(n % JOBS + 1)).append_to(&mut txn);
        }
        store.commit(txn).await.unwrap();
    }
    store.close().await;
}

fn job(id: u64) -> JobRecord {
    let at = Timestamp(1_790_000_000_000 + id * 100);
    let step = |name: &str| StepRecord {
        name: name.to_owned(),
        about: "start the VM's domain".to_owned(),
        state: StepState::Done,
        started: Some(at),
        ended: Some(at),
        error: None,
    };
    JobRecord {
        id: JobId(id),
        verb: "start_vm".to_owned(),
        about: format!("start VM web-{}", id % 500),
        caller: "password@192.0.2.1".to_owned(),
        params: serde_json::json!([
            "0004fb00-0003-0000-d4f1-e2c3b4a59687",
            "0004fb00-0006-4000-8000-000000000001"
        ]),
        locks: vec![LockWant::shared("host"), LockWant::exclusive("vm/0004fb00-0006-4000-8000-000000000001")],
        state: JobState::Succeeded,
        steps: vec![step("check"), step("start")],
        created: at,
        started: Some(at),
        ended: Some(at),
        deadline: Timestamp(at.0 + 3_600_000),
        parent: None,
        trace: None,
        children: Vec::new(),
        idempotency_key: None,
        recurring: None,
        cancel: None,
        fault: None,
        result: None,
        progress: 100,
    }
}

/// The oldest event and the oldest job are gone.
async fn pruned(client: &mut Client) -> bool {
    let page =
        call(client, "event_list", &[structure([("since", Value::Int(0)), ("limit", Value::Int(1))])]).await;
    let first_kept = page.get("gap").and_then(|gap| gap.get("to")).and_then(number).unwrap_or(0);
    let oldest_to_go = i64::try_from(JOBS - 10_000 - 10).unwrap();
    let before = structure([("before", Value::Int64(oldest_to_go)), ("limit", Value::Int(1))]);
    let jobs = call(client, "job_list", &[before]).await;
    first_kept >= i64::try_from(EVENTS - 100_000).unwrap() && jobs.as_array().unwrap().is_empty()
}

fn number(value: &Value) -> Option<i64> {
    value.as_i64().or(value.as_i32().map(i64::from))
}

fn sample(runtime: &Runtime, client: &mut Client, times: &mut [Vec<f64>; 2]) {
    let verbs = [("echo", [text("x")]), ("sleep", [Value::Int(0)])];
    for ((verb, params), times) in verbs.iter().zip(times) {
        for _ in 0..5 {
            let started = Instant::now();
            runtime.block_on(call(client, verb, params));
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    std::thread::sleep(Duration::from_millis(20));
}

fn latencies(runtime: &Runtime, client: &mut Client, span: Duration, when: &str) {
    let mut times = [const { Vec::new() }; 2];
    let started = Instant::now();
    while started.elapsed() < span {
        sample(runtime, client, &mut times);
    }
    tell_latencies(when, &mut times);
}

fn tell_latencies(when: &str, times: &mut [Vec<f64>; 2]) {
    for (what, times) in ["echo", "sleep(0), a job"].into_iter().zip(times) {
        let middle = median(times);
        let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)];
        say(&format!(
            "{what} {when}: p50 {middle:.2} ms, p99 {:.2} ms, worst {:.2} ms ({} calls)",
            at(99),
            at(100),
            times.len()
        ));
    }
}

fn folder_mib(dir: &std::path::Path) -> f64 {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        bytes += match meta.is_dir() {
            true => (folder_mib(&entry.path()) * 1024.0 * 1024.0) as u64,
            false => std::os::unix::fs::MetadataExt::blocks(&meta) * 512,
        };
    }
    bytes as f64 / 1024.0 / 1024.0
}
