//! What one sweep of statistics costs: `cargo bench --bench stats`.
//!
//! 1,000 simulated domains with a card and a disk each, in this process: the CPU time of the process, so the simulated
//! world's part is in it, and so is that of all threads. Beside it the one reading of dom0's kernel, from made-up files
//! of as many disks, which real Xen has in the place of the world's.
#![allow(clippy::unwrap_used, reason = "a bench: a failure shall stop it")]
#![allow(clippy::explicit_write, reason = "println is for what must never print")]

use dom0d::kernel::sim::SimKernel;
use dom0d::machine::Machine;
use dom0d::machine::linux::LinuxMachine;
use dom0d::machine::sim::SimMachine;
use dom0d::model::{MiB, VmId, VmName};
use dom0d::sim::{Behaviour, Device, Handle, Options, Request, Spec};
use dom0d::stats::{Object, Roster, Sampler, Sources, Sweep};
use dom0d::xen::sim::SimToolstack;
use nix::time::ClockId;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const DOMAINS: u32 = 1000;
const ROUNDS: usize = 31;
const LIMIT: Duration = Duration::from_secs(30);
const BAR: Duration = Duration::from_millis(50);

fn main() {
    // Without it we were only built, with all other targets.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(sweeps());
    runtime.block_on(kernel());
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap();
}

/// Of all threads of this process.
fn cpu() -> Duration {
    nix::time::clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).unwrap().into()
}

fn told(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    say(&format!(
        "{what}: median {:.1} ms, worst of {ROUNDS} {:.1} ms (bar {} ms)",
        ms(median),
        ms(worst),
        BAR.as_millis()
    ));
    assert!(median <= BAR, "{what}: over the bar");
}

struct All;

impl Roster for All {
    fn host_name(&self) -> Arc<str> {
        "bench".into()
    }

    fn is_ours(&self, _: VmId) -> bool {
        true
    }

    fn chosen_vifs(&self) -> HashMap<Arc<str>, VmId> {
        HashMap::new()
    }
}

fn vm(n: u32) -> VmId {
    VmId::from_bytes(u128::from(n + 1).to_be_bytes())
}

async fn start(world: &Handle, n: u32) {
    let device = |key: String| Device { key, detail: serde_json::Value::Null };
    let spec = Spec {
        vm: vm(n),
        name: VmName::parse(&format!("bench-{n}")).unwrap(),
        memory: MiB(64),
        max_memory: MiB(64),
        vcpus: 1,
        max_vcpus: 1,
        weight: 256,
        cap: 0,
        display: None,
        disks: vec![device("xvda".to_owned())],
        vifs: vec![device(format!("02:00:00:00:{:02x}:{:02x}", n / 256, n % 256))],
        rest: serde_json::Value::Null,
    };
    world.call(Request::Create { spec: Box::new(spec), paused: false }, LIMIT).await.unwrap();
}

async fn sweeps() {
    let world = Handle::in_process(Options { memory: MiB(128 * 1024), cpus: 64, ..Options::default() });
    // Booted at once, so that each tells its memory.
    world.set_behaviour(None, Behaviour { boot_ms: 0, ..Behaviour::default() }).await.unwrap();
    for n in 0..DOMAINS {
        start(&world, n).await;
    }
    let sources = Sources {
        toolstack: Arc::new(SimToolstack::new(world.clone(), LIMIT)),
        kernel: Arc::new(SimKernel::new(world.clone(), LIMIT)),
        machine: Arc::new(SimMachine::new(world, LIMIT)),
    };
    let sampler = Sampler::new(sources, Arc::new(All));
    let mut times = Vec::new();
    let mut figures = 0;
    for _ in 0..ROUNDS {
        let began = cpu();
        let sweep = sampler.sweep(LIMIT).await;
        times.push(cpu() - began);
        figures = whole(&sweep);
    }
    told(&format!("a sweep of {DOMAINS} domains, {figures} figures, CPU time"), times);
}

/// How many figures it has, if it has all.
fn whole(sweep: &Sweep) -> usize {
    assert_eq!(sweep.problems, []);
    for n in 0..DOMAINS {
        let guest = sweep.object(Object::Vm(vm(n))).unwrap();
        assert!(
            guest.value("vif_rx_bytes", Some("0")).is_some()
                && guest.value("vbd_reads", Some("51712")).is_some()
        );
        assert!(guest.value("guest_memory_free", None).is_some());
    }
    sweep.objects.iter().map(|one| one.figures.len()).sum()
}

async fn kernel() {
    let folder = tempfile::tempdir().unwrap();
    let put = |path: String, text: &str| {
        let path = Path::new(folder.path()).join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    for domid in 1..=DOMAINS {
        for file in ["rd_req", "rd_sect", "wr_req", "wr_sect"] {
            put(format!("sys/bus/xen-backend/devices/vbd-{domid}-51712/statistics/{file}"), "123456\n");
        }
    }
    for file in ["stat", "loadavg", "meminfo", "diskstats"] {
        put(format!("proc/{file}"), &std::fs::read_to_string(format!("/proc/{file}")).unwrap());
    }
    let machine = LinuxMachine::new(folder.path().to_owned());
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let began = cpu();
        let figures = machine.figures().await.unwrap();
        times.push(cpu() - began);
        assert_eq!(figures.vbds.len(), DOMAINS as usize);
    }
    told(&format!("dom0's figures and {DOMAINS} disks of guests from files, CPU time"), times);
}
