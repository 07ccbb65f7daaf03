//! The sampler on the simulated world, in virtual time.

use super::*;
use crate::kernel::sim::SimKernel;
use crate::machine::sim::SimMachine;
use crate::model::{MiB, VmId, VmName};
use crate::sim::{self, Answer, Device, Fate, Handle, Kind, Request, Rule, Spec};
use crate::stats::{Object, ObjectFigures};
use crate::xen::sim::SimToolstack;
use std::collections::HashMap;

const LIMIT: Duration = Duration::from_secs(60);
const EVERY: Duration = Duration::from_secs(10);

struct All;

impl Roster for All {
    fn host_name(&self) -> Arc<str> {
        "node".into()
    }

    fn is_ours(&self, _: VmId) -> bool {
        true
    }

    fn chosen_vifs(&self) -> HashMap<Arc<str>, VmId> {
        HashMap::new()
    }
}

fn world() -> Handle {
    Handle::in_process(sim::Options { memory: MiB(8192), cpus: 4, ..sim::Options::default() })
}

fn sampler(world: &Handle) -> Arc<Sampler> {
    let sources = Sources {
        toolstack: Arc::new(SimToolstack::new(world.clone(), LIMIT)),
        kernel: Arc::new(SimKernel::new(world.clone(), LIMIT)),
        machine: Arc::new(SimMachine::new(world.clone(), LIMIT)),
    };
    Sampler::new(sources, Arc::new(All))
}

fn vm(n: u8) -> VmId {
    VmId::from_bytes([n; 16])
}

async fn start(world: &Handle, n: u8) -> u32 {
    let device = |key: &str| Device { key: key.to_owned(), detail: serde_json::Value::Null };
    let spec = Spec {
        vm: vm(n),
        name: VmName::parse(&format!("vm{n}")).unwrap(),
        memory: MiB(64),
        max_memory: MiB(128),
        vcpus: 1,
        max_vcpus: 2,
        weight: 256,
        cap: 0,
        display: None,
        disks: vec![device("xvda"), device("xvdb")],
        vifs: vec![device("02:00:00:00:00:01")],
        rest: serde_json::Value::Null,
    };
    match world.call(Request::Create { spec: Box::new(spec), paused: false }, LIMIT).await.unwrap() {
        Answer::DomId(domid) => domid,
        other => panic!("{other:?}"),
    }
}

async fn destroy(world: &Handle, domid: u32) {
    world.call(Request::Destroy { domid }, LIMIT).await.unwrap();
}

fn total(figures: &ObjectFigures, metric: &str) -> f64 {
    let of_it = figures.figures.iter().filter(|figure| figure.metric.metric().name == metric);
    of_it.map(|figure| figure.value).sum()
}

fn of(sweep: &Sweep, object: Object) -> &ObjectFigures {
    sweep.object(object).unwrap_or_else(|| panic!("no {object} in {sweep:?}"))
}

fn guest(sweep: &Sweep, n: u8) -> &ObjectFigures {
    of(sweep, Object::Vm(vm(n)))
}

#[tokio::test(start_paused = true)]
async fn the_figures_of_a_sweep_add_up() {
    let world = world();
    let sampler = sampler(&world);
    for n in 1..=3 {
        start(&world, n).await;
    }
    let before = sampler.sweep(EVERY).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let sweep = sampler.sweep(EVERY).await;
    assert_eq!(sweep.problems, []);
    let host = of(&sweep, Object::Host);
    let domains: Vec<_> = sweep.objects.iter().filter(|one| one.domid.is_some()).collect();
    let sum = |metric: &str| domains.iter().map(|one| total(one, metric)).sum::<f64>();
    assert_eq!(total(host, "host_memory_free") + sum("memory"), total(host, "host_memory_total"));
    assert_eq!(total(host, "host_domains"), 3.0);
    let used = |sweep: &Sweep| sweep.objects.iter().map(|one| total(one, "cpu_time")).sum::<f64>();
    let busy = |sweep: &Sweep| total(of(sweep, Object::Host), "host_cpu_busy");
    let (used, busy) = (used(&sweep) - used(&before), busy(&sweep) - busy(&before));
    assert!(used > 1.0 && (used - busy).abs() < 0.001, "{used} used, {busy} busy");
    for n in 1..=3 {
        let guest = guest(&sweep, n);
        assert_eq!(total(guest, "memory"), 64.0 * 1024.0 * 1024.0);
        assert_eq!(total(guest, "memory_target"), total(guest, "memory"));
        assert!(total(guest, "guest_memory_free") <= total(guest, "guest_memory_total"));
        assert!(total(guest, "guest_memory_total") <= total(guest, "memory"));
        assert!(guest.value("vbd_reads", Some("51712")) > Some(0.0));
        assert!(guest.value("vif_rx_bytes", Some("0")) > Some(0.0));
    }
    assert!(host.value("dom0_cpu_busy", Some("3")) > Some(0.0));
    assert!(host.value("link_rx_bytes", Some("xenbr0")) > Some(0.0));
    assert!(host.figures.iter().all(|figure| figure.instance.as_deref() != Some("lo")));
}

#[tokio::test(start_paused = true)]
async fn counters_never_fall_while_domains_come_and_go() {
    let world = world();
    let sampler = sampler(&world);
    let mut last: HashMap<(Object, Option<u32>, String), f64> = HashMap::new();
    for n in 0..12 {
        let domid = start(&world, 1 + n % 3).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let sweep = sampler.sweep(EVERY).await;
        for one in &sweep.objects {
            for figure in
                one.figures.iter().filter(|f| f.metric.metric().kind == crate::stats::metric::Kind::Counter)
            {
                let name = format!("{} {:?}", figure.metric.metric().name, figure.instance);
                let before = last.insert((one.object, one.domid.map(|d| d.0), name.clone()), figure.value);
                assert!(
                    before.is_none_or(|before| before <= figure.value),
                    "{name}: {before:?} {}",
                    figure.value
                );
            }
        }
        destroy(&world, domid).await;
    }
    assert!(last.len() > 100);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_hangs_costs_its_own_figures_and_not_more_than_its_deadline() {
    let world = world();
    let sampler = sampler(&world);
    start(&world, 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let cases = [
        (Kind::List, "domains", "cpu_time"),
        (Kind::GuestMemory, "guests", "guest_memory_total"),
        (Kind::Usage, "hypervisor", "host_memory_total"),
        (Kind::LinkTraffic, "links", "vif_rx_bytes"),
        (Kind::HostFigures, "machine", "host_load_1m"),
    ];
    for (kind, source, lost) in cases {
        world.add_rule(Rule::next(kind, Fate::Hang)).await.unwrap();
        let sweep = sampler.sweep(Duration::from_secs(2)).await;
        let sources: Vec<_> = sweep.problems.iter().map(|(source, _)| *source).collect();
        assert_eq!(sources, [source]);
        assert!(sweep.took < Duration::from_secs(3), "{:?}", sweep.took);
        for (_, _, metric) in cases {
            let told: f64 = sweep.objects.iter().map(|one| total(one, metric)).sum();
            // Without its domain, nothing of a guest can be told.
            let with_domain =
                source == "domains" && metric != "host_memory_total" && metric != "host_load_1m";
            assert_eq!(told > 0.0, metric != lost && !with_domain, "{source} hangs: {metric} is {told}");
        }
    }
    assert_eq!(sampler.sweep(EVERY).await.problems, []);
}

#[tokio::test(start_paused = true)]
async fn a_lying_guest_changes_only_its_own_figures() {
    let world = world();
    let sampler = sampler(&world);
    for n in 1..=3 {
        start(&world, n).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Time stands still, so nothing changes but by what is written.
    let honest = sampler.sweep(EVERY).await;
    let huge = vec![b'9'; 4096];
    let lies: [&[u8]; 8] =
        [b"", b"\0\0", b"\xff\xfe", b"-5", b"1e308", b"18446744073709551615", &huge, b"131073"];
    for n in 0..1000 {
        let key = ["data/meminfo_total", "data/meminfo_free", "data/other"][n % 3];
        world.guest_writes(vm(2), key, lies[n % lies.len()]).await.unwrap();
        if n % 100 == 99 {
            let sweep = sampler.sweep(EVERY).await;
            assert_eq!(sweep.problems, []);
            for (before, after) in honest.objects.iter().zip(&sweep.objects) {
                if before.object != Object::Vm(vm(2)) {
                    assert_eq!(before, after);
                }
            }
            let told = guest(&sweep, 2);
            assert_eq!(
                (told.value("guest_memory_total", None), told.value("guest_memory_free", None)),
                (None, None)
            );
            assert_eq!(told.value("memory", None), guest(&honest, 2).value("memory", None));
        }
    }
    // 128 MiB is what it may have.
    world.guest_writes(vm(2), "data/meminfo_total", b"131072").await.unwrap();
    world.guest_writes(vm(2), "data/meminfo_free", b"100").await.unwrap();
    let told = sampler.sweep(EVERY).await;
    assert_eq!(guest(&told, 2).value("guest_memory_free", None), Some(102_400.0));
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_goes_and_comes_is_the_same_vm_with_another_domid() {
    let world = world();
    let sampler = sampler(&world);
    let first = start(&world, 1).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = sampler.sweep(EVERY).await;
    destroy(&world, first).await;
    let between = sampler.sweep(EVERY).await;
    assert_eq!(between.object(Object::Vm(vm(1))), None);
    let second = start(&world, 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = sampler.sweep(EVERY).await;
    assert_ne!(first, second);
    assert_eq!(guest(&before, 1).domid, Some(DomId(first)));
    assert_eq!(guest(&after, 1).domid, Some(DomId(second)));
    let reads = |sweep: &Sweep| guest(sweep, 1).value("vbd_reads", Some("51712"));
    assert!(reads(&after) < reads(&before), "its counters began anew");
    assert_eq!(guest(&after, 1).value("vif_rx_bytes", Some("0")).map(|bytes| bytes > 0.0), Some(true));
}

#[tokio::test(start_paused = true)]
async fn a_sweep_is_told_at_each_tick_and_missed_ticks_are_skipped() {
    let world = world();
    let sampler = sampler(&world);
    let stop = CancellationToken::new();
    let mut sweeps = sampler.subscribe();
    assert_eq!(*sampler.latest().objects, []);
    let running = tokio::spawn(Arc::clone(&sampler).run(EVERY, stop.clone()));
    let began = Instant::now();
    let mut at = Vec::new();
    for n in 0..5 {
        if n == 2 {
            // Both take nearly all their time, and still the next tick is in time.
            world.add_rule(Rule::next(Kind::List, Fate::DelayMs(4900))).await.unwrap();
            world.add_rule(Rule::next(Kind::GuestMemory, Fate::Hang)).await.unwrap();
        }
        sweeps.changed().await.unwrap();
        let sweep = sweeps.borrow_and_update().clone();
        at.push((sweep.instant - began).as_secs());
        assert_eq!(sweep.problems.len(), usize::from(n == 2), "{:?}", sweep.problems);
    }
    assert_eq!(at, [0, 10, 20, 30, 40]);
    let counts = sampler.counts();
    assert_eq!((counts.sweeps, counts.failures), (5, 1));
    // A machine that slept over many ticks makes up for none of them.
    tokio::time::advance(Duration::from_secs(95)).await;
    sweeps.changed().await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(sampler.counts().sweeps, 6);
    sweeps.borrow_and_update();
    sweeps.changed().await.unwrap();
    assert_eq!((sweeps.borrow().instant - began).as_secs(), 140);
    stop.cancel();
    running.await.unwrap();
    assert_eq!(sampler.counts().sweeps, 7);
}

#[tokio::test(start_paused = true)]
async fn stopping_does_not_wait_for_a_source_that_hangs() {
    let world = world();
    let sampler = sampler(&world);
    world.add_rule(Rule::next(Kind::HostFigures, Fate::Hang).times(1000)).await.unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&sampler).run(EVERY, stop.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    stop.cancel();
    running.await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    assert_eq!(sampler.counts().sweeps, 0);
}
