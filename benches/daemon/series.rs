//! The history of 500 running VMs, each with two CPUs, three disks and two interfaces: what it costs in memory, before
//! anybody asked for any of it and after every series was asked for, and on disk.

use crate::daemon::{Home, call, create_vms, say, text};
use dom0d::wire::{Client, Value};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const VMS: usize = 500;
/// By then a first minute of each must be over and written.
const PATIENCE: Duration = Duration::from_secs(300);
/// Over which the CPU time at rest is taken: six sweeps, and one writing of a minute.
const WINDOW: Duration = Duration::from_secs(60);

pub fn figures(runtime: &Runtime) {
    let home = Home::new();
    home.start_world(1_000_000);
    let daemon = home.start("");
    let mut clients: Vec<Client> = (0..8).map(|_| home.client(daemon.address)).collect();
    runtime.block_on(create_vms(&mut clients, VMS, true));
    drop(clients);
    let folder = home.state().join("stats");
    let began = Instant::now();
    while std::fs::read_dir(&folder).map_or(0, Iterator::count) <= VMS {
        assert!(began.elapsed() < PATIENCE, "no minute of each VM is written");
        std::thread::sleep(Duration::from_millis(100));
    }
    let (cpu, began) = (daemon.process.cpu(), Instant::now());
    std::thread::sleep(WINDOW);
    let idle = (daemon.process.cpu() - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
    let before = daemon.process.rss_mib();
    let (files, bytes) = on_disk(&folder);
    // An idle connection would have been closed by now.
    let client = &mut home.client(daemon.address);
    runtime.block_on(async {
        let mut series = 0;
        let mut values = 0;
        let objects = call(client, "stats_list", &[]).await;
        let objects = strings(&objects);
        for object in &objects {
            let told = call(client, "stats_list", &[text(object.clone())]).await;
            let Value::Array(rows) = told else { panic!("it is a list") };
            for row in &rows {
                let Value::Struct(row) = row else { panic!("it is a struct") };
                let key = row.iter().find(|(name, _)| *name == "series").unwrap().1.clone();
                let question = [text(object.clone()), key, Value::Int(-7200)];
                let Value::Struct(answer) = call(client, "stats_query", &question).await else {
                    panic!("it is a struct")
                };
                let found = answer.iter().find(|(name, _)| *name == "values").map(|(_, found)| found);
                let Some(Value::Array(found)) = found else { panic!("it has values") };
                values += found.iter().filter(|value| matches!(value, Value::Double(_))).count();
                series += 1;
            }
        }
        assert!(files >= VMS && objects.len() > VMS && values > series, "{files} files, {values} values");
        say(&format!(
            "{VMS} running VMs, {} objects with {series} series: RSS {before:.1} MiB (bar: at most 60 MB), {:.2} % of a CPU",
            objects.len(),
            idle * 100.0
        ));
        say(&format!(
            "after {series} questions, one a series: RSS {:.1} MiB, worst ever {:.1} MiB",
            daemon.process.rss_mib(),
            daemon.process.status_kib("VmHWM:") as f64 / 1024.0
        ));
        say(&format!(
            "{files} files of {} KiB on disk: {:.2} KB a series (bar: at most 4)",
            bytes / 1024,
            bytes as f64 / 1000.0 / series as f64
        ));
    });
}

/// Files, and the bytes that their blocks take.
fn on_disk(folder: &Path) -> (usize, u64) {
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap());
    files.fold((0, 0), |(files, bytes), file| (files + 1, bytes + file.blocks() * 512))
}

fn strings(value: &Value) -> Vec<String> {
    let Value::Array(values) = value else { panic!("it is a list") };
    let one = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => panic!("{other:?} is no text"),
    };
    values.iter().map(one).collect()
}
