//! Resident memory: idle, with VMs and a history, and what one VM and one job cost.

use crate::daemon::{Daemon, Home, create_vms, load, say};
use dom0d::wire::{Client, Value};
use std::time::Duration;
use tokio::runtime::Runtime;

const VMS: usize = 500;
const JOBS: usize = 10_000;

pub fn figures(runtime: &Runtime) {
    let home = Home::new();
    home.start_world(1_000_000);
    let daemon = home.start("");
    let idle = settled(&daemon);
    say(&format!("idle: RSS {idle:.1} MiB (bar: at most 15)"));
    let mut clients: Vec<Client> = (0..16).map(|_| home.client(daemon.address)).collect();
    runtime.block_on(load(&mut clients, 16, "echo", &[Value::Int(1)]));
    let called = settled(&daemon);
    say(&format!("after the first calls, 16 TLS connections open: RSS {called:.1} MiB"));
    runtime.block_on(create_vms(&mut clients, VMS, true));
    let vms = settled(&daemon);
    say(&format!(
        "{VMS} running VMs ({} jobs in history): RSS {vms:.1} MiB, {:.1} KiB per VM",
        2 * VMS,
        (vms - called) * 1024.0 / VMS as f64
    ));
    runtime.block_on(load(&mut clients, JOBS - 2 * VMS, "sleep", &[Value::Int(0)]));
    let jobs = settled(&daemon);
    say(&format!(
        "{VMS} VMs and {JOBS} jobs of history: RSS {jobs:.1} MiB (bar: at most 30), {:.0} bytes per job; worst ever {:.1} MiB",
        (jobs - vms) * 1024.0 * 1024.0 / (JOBS - 2 * VMS) as f64,
        daemon.process.status_kib("VmHWM:") as f64 / 1024.0
    ));
    runtime.block_on(load(&mut clients, 32, "list_vms", &[]));
    say(&format!("after 32 list_vms by 16 callers: RSS {:.1} MiB", settled(&daemon)));
    drop(clients);
    drop(daemon);
    let daemon = home.start("");
    say(&format!(
        "killed and started again with all that: RSS {:.1} MiB, ready in {:.0} ms",
        settled(&daemon),
        daemon.ready.as_secs_f64() * 1e3
    ));
}

/// When it has not changed for a while.
fn settled(daemon: &Daemon) -> f64 {
    let mut last = daemon.process.rss_mib();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(1500));
        let now = daemon.process.rss_mib();
        if (now - last).abs() < 0.1 {
            return now;
        }
        last = now;
    }
    last
}
