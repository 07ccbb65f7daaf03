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

async fn locks(client: &mut Client) -> usize {
    call(client, "lock_list", &[]).await.as_array().unwrap().len()
}

async fn idle(client: &mut Client) {
    while locks(client).await > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

/// 5,000 jobs wait for one VM; meanwhile others come that do not have to wait.
async fn queued(clients: &mut [Client]) {
    const QUEUED: usize = 5_000;
    const PROBERS: usize = 4;
    const PROBES: usize = 2_000;
    for n in 0..=PROBERS {
        create_vm(&mut clients[0], n).await;
    }
    let change = |n: usize| {
        [text("configure_vm_ha"), Value::Array(vec![text(REPO), text(vm_id(n)), Value::Bool(true)])]
    };
    // Behind a guest that takes its time to reboot, all of them stand in line.
    call(&mut clients[0], "start_vm", &[text(REPO), text(vm_id(0))]).await;
    let reboot = [text("reboot_vm"), Value::Array(vec![text(REPO), text(vm_id(0))])];
    call(&mut clients[0], "job_submit", &reboot).await;
    let first = number(&call(&mut clients[0], "job_submit", &change(0)).await);
    let started = Instant::now();
    load(clients, QUEUED - 1, "job_submit", &change(0)).await;
    let waiting = locks(&mut clients[0]).await;
    say(&format!(
        "{QUEUED} jobs queued behind one VM in {:.2} s; locks held or waited for: {waiting}",
        started.elapsed().as_secs_f64()
    ));
    let probers = clients[..PROBERS].iter_mut().enumerate().map(|(n, client)| async move {
        let mut waits = Vec::new();
        for _ in 0..PROBES / PROBERS {
            let id = call(client, "job_submit", &change(n + 1)).await;
            let job = call(client, "job_wait", &[id, Value::Int(60)]).await;
            waits.push(at(&job, "started") - at(&job, "created"));
        }
        waits
    });
    let mut waits = futures_util::future::join_all(probers).await.concat();
    let still = locks(&mut clients[0]).await;
    tell("submitted to started, of jobs on other VMs meanwhile", &mut waits, "(bar: p99 at most 20 ms)");
    say(&format!("   ({still} locks held or waited for when the last of them had ended)"));
    idle(&mut clients[0]).await;
    let mut handovers = Vec::new();
    let mut previous_end = None;
    for n in 0..QUEUED as i64 {
        let job = call(&mut clients[0], "job_get", &[Value::Int((first + n).try_into().unwrap())]).await;
        handovers.extend(previous_end.map(|end| at(&job, "started") - end));
        previous_end = Some(at(&job, "ended"));
    }
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

/// One of a job's times, in ms.
fn at(job: &Value, name: &str) -> i64 {
    job.get(name).unwrap().as_str().unwrap().parse::<jiff::Timestamp>().unwrap().as_millisecond()
}
