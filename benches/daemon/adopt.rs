//! From the process's start to the event that says what was adopted, with 500 running domains.

use crate::daemon::{Home, TIMEOUT, call, create_vms, median, say, structure, text};
use dom0d::model::Timestamp;
use dom0d::wire::{Client, Value};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const VMS: usize = 500;
const TURNS: usize = 7;
const CALLERS: usize = 8;

pub fn figures(runtime: &Runtime) {
    let home = Home::new();
    home.start_world(262_144);
    let mut daemon = home.start("");
    runtime.block_on(async {
        let mut clients: Vec<Client> = (0..CALLERS).map(|_| home.client(daemon.address)).collect();
        create_vms(&mut clients, VMS, true).await;
    });
    let (mut after, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        // Killed: nothing is handed over.
        drop(daemon);
        let started = Timestamp::now();
        daemon = home.start("");
        let told = runtime.block_on(adoption(&home, &daemon, started));
        after.push((told.0 - started.0) as f64);
        cpu.push(daemon.process.cpu().as_secs_f64() * 1e3);
    }
    let worst = after.iter().copied().fold(0.0, f64::max);
    say(&format!(
        "process start to the event of adoption, {VMS} running domains adopted: median {:.0} ms, worst {worst:.0} ms \
         (bar: at most 1000); CPU until then, with the asking for it, {:.0} ms",
        median(&mut after),
        median(&mut cpu)
    ));
}

/// When the event since `started` was made. It must tell of all domains.
async fn adoption(home: &Home, daemon: &crate::daemon::Daemon, started: Timestamp) -> Timestamp {
    let mut client = home.client(daemon.address);
    let deadline = Instant::now() + TIMEOUT;
    let query =
        structure([("since", Value::Int(0)), ("limit", Value::Int(10_000)), ("object", text("host"))]);
    loop {
        let answer = call(&mut client, "event_list", std::slice::from_ref(&query)).await;
        let Value::Struct(page) = &answer else { panic!("{answer:?}") };
        let Some(Value::Array(events)) = page.get("events") else { panic!("{answer:?}") };
        for event in events {
            let Value::Struct(event) = event else { panic!("{event:?}") };
            let (Some(Value::String(kind)), Some(Value::String(time))) =
                (event.get("type"), event.get("time"))
            else {
                panic!("{event:?}")
            };
            let time: jiff::Timestamp = time.parse().unwrap();
            let time = Timestamp(u64::try_from(time.as_millisecond()).unwrap());
            if kind == "vm.adoption" && time >= started {
                assert!(format!("{event:?}").contains(&format!("{VMS} running VMs adopted")), "{event:?}");
                return time;
            }
        }
        assert!(Instant::now() < deadline, "no adoption is told");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
