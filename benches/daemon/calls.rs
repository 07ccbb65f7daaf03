//! CPU of single calls: `echo` beside a bare server, `list_vms` and `vm_list` with a thousand VMs, a start.

use crate::daemon::{Home, Process, REPO, call, client, create_vms, load, median, say, text, vm_id};
use dom0d::wire::Client;
use std::io::BufRead;
use std::process::{Command, Stdio};
use std::time::Instant;
use tokio::runtime::Runtime;

const CALLERS: usize = 16;

pub fn echo(runtime: &Runtime) {
    const ROUNDS: usize = 9;
    const CALLS: usize = 8_000;
    let home = Home::new();
    let daemon = home.start("");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("bare-echo").arg(home.tls()).stdout(Stdio::piped());
    let mut bare = Process::spawn(&mut command);
    let mut line = String::new();
    bare.stdout().read_line(&mut line).unwrap();
    let address = line.trim().parse().unwrap();
    let params = [text("x".repeat(200))];
    let mut ours: Vec<Client> = (0..CALLERS).map(|_| home.client(daemon.address)).collect();
    let mut theirs: Vec<Client> = (0..CALLERS).map(|_| client(&home.tls(), address)).collect();
    let per_call = |process: &Process, clients: &mut [Client]| {
        let before = process.cpu();
        runtime.block_on(load(clients, CALLS, "echo", &params));
        (process.cpu() - before).as_secs_f64() / CALLS as f64 * 1e6
    };
    // Connections, the password's hash, caches.
    per_call(&daemon.process, &mut ours);
    per_call(&bare, &mut theirs);
    let (mut own, mut other, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let a = per_call(&daemon.process, &mut ours);
        let b = per_call(&bare, &mut theirs);
        own.push(a);
        other.push(b);
        ratios.push(a / b);
    }
    say(&format!(
        "echo over TLS keep-alive, {CALLERS} callers, CPU per call: dom0d {:.2} µs, bare hyper+rustls {:.2} µs, \
         ratio {:.2} (median of {ROUNDS} rounds of {CALLS}; bar: at most 1.5)",
        median(&mut own),
        median(&mut other),
        median(&mut ratios)
    ));
}

pub fn list_vms(runtime: &Runtime) {
    const VMS: usize = 1000;
    const CALLS: usize = 60;
    let home = Home::new();
    home.start_world(1_000_000);
    let daemon = home.start("");
    let mut clients: Vec<Client> = (0..CALLERS).map(|_| home.client(daemon.address)).collect();
    let started = Instant::now();
    runtime.block_on(create_vms(&mut clients, VMS, true));
    say(&format!("{VMS} VMs created and started in {:.1} s", started.elapsed().as_secs_f64()));
    let client = &mut clients[0];
    let cost = |verb: &str, calls: usize, pause_ms: u64, client: &mut Client| {
        let before = daemon.process.cpu();
        let started = Instant::now();
        for _ in 0..calls {
            runtime.block_on(call(client, verb, &[]));
            std::thread::sleep(std::time::Duration::from_millis(pause_ms));
        }
        let cpu = (daemon.process.cpu() - before).as_secs_f64() * 1e3 / calls as f64;
        (cpu, started.elapsed().as_secs_f64() * 1e3 / calls as f64)
    };
    let answer = runtime.block_on(call(client, "list_vms", &[]));
    let count = answer.as_array().unwrap().len();
    let bytes = dom0d::wire::encode_value(&answer).0.len();
    say(&format!("list_vms answers {count} domains, {} bytes, {} each", bytes, bytes / count));
    let (cpu, wall) = cost("list_vms", CALLS, 0, client);
    say(&format!(
        "list_vms, one call after the other: {cpu:.2} ms of CPU per call ({wall:.1} ms between) (bar: at most 12)"
    ));
    let (cpu, _) = cost("list_vms", 8, 1100, client);
    say(&format!(
        "list_vms, one call each 1.1 s, so that every CPU time has changed: {cpu:.2} ms of CPU per call"
    ));
    let (cpu, _) = cost("vm_list", CALLS, 0, client);
    say(&format!("vm_list: {cpu:.2} ms of CPU per call"));
    let before = daemon.process.cpu();
    std::thread::sleep(std::time::Duration::from_secs(5));
    let idle = (daemon.process.cpu() - before).as_secs_f64() / 5.0 * 100.0;
    say(&format!(
        "idle with {VMS} running VMs: {idle:.2} % of one CPU, RSS {:.1} MiB",
        daemon.process.rss_mib()
    ));
    start_stop(runtime, &daemon.process, client);
}

/// The whole of one VM's start, which is a job of its own: verb, journal, toolstack, observation.
fn start_stop(runtime: &Runtime, process: &Process, client: &mut Client) {
    const TURNS: usize = 40;
    let params = [text(REPO), text(vm_id(0))];
    let forced = [text(REPO), text(vm_id(0)), dom0d::wire::Value::Bool(true)];
    let mut walls = Vec::new();
    let mut cpu = 0.0;
    for _ in 0..TURNS {
        runtime.block_on(call(client, "stop_vm", &forced));
        let before = process.cpu();
        let started = Instant::now();
        runtime.block_on(call(client, "start_vm", &params));
        walls.push(started.elapsed().as_secs_f64() * 1e3);
        cpu += (process.cpu() - before).as_secs_f64() * 1e6 / TURNS as f64;
    }
    say(&format!("start_vm, from call to answer: median {:.1} ms, {cpu:.0} µs of CPU", median(&mut walls)));
}
