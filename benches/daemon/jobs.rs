//! Durable jobs: how many a second, and how soon a job starts that has to pass a queue of 5,000.

use crate::daemon::{Daemon, Home, REPO, call, create_vm, load, say, structure, text, vm_id};
use dom0d::wire::{Client, Value};
use std::time::Instant;
use tokio::runtime::Runtime;

const CALLERS: usize = 64;

pub fn figures(runtime: &Runtime) {
    let home = Home::new();
    let daemon = home.start("[jobs]\nhistory = 100000\n");
    let mut clients: Vec<Client> = (0..CALLERS).map(|_| home.client(daemon.address)).collect();
    runtime.block_on(load(&mut clients, CALLERS, "echo", &[Value::Int(1)]));
    throughput(runtime, &daemon, &mut clients, "sleep(0), waited for", "sleep", &[Value::Int(0)]);
    let submit = [text("sleep"), Value::Array(vec![Value::Int(0)]), structure([])];
    throughput(runtime, &daemon, &mut clients, "job_submit(sleep, 0)", "job_submit", &submit);
    runtime.block_on(queued(&mut clients));
}

fn throughput(
    runtime: &Runtime,
    daemon: &Daemon,
    clients: &mut [Client],
    what: &str,
    verb: &str,
    params: &[Value],
) {
    const JOBS: usize = 10_000;
    runtime.block_on(load(clients, 1000, verb, params));
    let before = daemon.process.cpu();
    let started = Instant::now();
    runtime.block_on(load(clients, JOBS, verb, params));
    runtime.block_on(idle(&mut clients[0]));
    let rate = JOBS as f64 / started.elapsed().as_secs_f64();
    let cpu = (daemon.process.cpu() - before).as_secs_f64() / JOBS as f64 * 1e6;
    say(&format!(
        "{what}, {CALLERS} callers: {rate:.0} jobs/s (bar: 2000 or more), {cpu:.0} µs of CPU per job"
    ));
}

async fn open_jobs(client: &mut Client) -> usize {
    call(client, "lock_list", &[]).await.as_array().unwrap().len()
}

async fn idle(client: &mut Client) {
    while open_jobs(client).await > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

/// 5,000 jobs wait for one VM; meanwhile others come that do not have to.
async fn queued(clients: &mut [Client]) {
    const QUEUED: usize = 5_000;
    const PROBES: usize = 1_000;
    create_vm(&mut clients[0], 0).await;
    create_vm(&mut clients[0], 1).await;
    let on = |n: usize| {
        [
            text("configure_vm_ha"),
            Value::Array(vec![text(REPO), text(vm_id(n)), Value::Bool(true)]),
            structure([]),
        ]
    };
    // Behind a guest that is slow to start, all of them stand in line.
    let blocker = [text("reboot_vm"), Value::Array(vec![text(REPO), text(vm_id(0))]), structure([])];
    call(&mut clients[0], "start_vm", &[text(REPO), text(vm_id(0))]).await;
    call(&mut clients[0], "job_submit", &blocker).await;
    let started = Instant::now();
    load(clients, QUEUED, "job_submit", &on(0)).await;
    let waiting = open_jobs(&mut clients[0]).await;
    say(&format!(
        "{QUEUED} jobs queued behind one VM in {:.2} s; locks held or waited for: {waiting}",
        started.elapsed().as_secs_f64()
    ));
    let first = number(&call(&mut clients[0], "job_submit", &on(1)).await);
    load(&mut clients[..4], PROBES, "job_submit", &on(1)).await;
    let still = open_jobs(&mut clients[0]).await;
    idle(&mut clients[0]).await;
    let last = first + PROBES as i64;
    let (mut waits, mut handovers) = (Vec::new(), Vec::new());
    let mut previous_end = None;
    for id in first - QUEUED as i64..=last {
        let job = call(&mut clients[0], "job_get", &[Value::Int(id.try_into().unwrap())]).await;
        let at = |name: &str| time(job.get(name).unwrap().as_str().unwrap());
        if id >= first {
            waits.push(at("started") - at("created"));
        } else {
            handovers.extend(previous_end.map(|end| at("started") - end));
            previous_end = Some(at("ended"));
        }
    }
    tell(
        "submitted to started, of jobs on another VM while they wait",
        &mut waits,
        "(bar: p99 at most 20 ms)",
    );
    say(&format!("   (locks held or waited for when the last of them was accepted: {still})"));
    tell("one job's end to the next one's start, on the VM with the queue", &mut handovers, "");
}

fn tell(what: &str, times: &mut [i64], bar: &str) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() * part / 1000).min(times.len() - 1)];
    say(&format!(
        "{what}: p50 {} ms, p99 {} ms, p99.9 {} ms, worst {} ms {bar}",
        at(500),
        at(990),
        at(999),
        at(1000)
    ));
}

fn number(value: &Value) -> i64 {
    value.as_i64().or(value.as_i32().map(i64::from)).unwrap()
}

/// Milliseconds of a time on the wire.
fn time(text: &str) -> i64 {
    text.parse::<jiff::Timestamp>().unwrap().as_millisecond()
}
