//! What every machine must tell to sampling.

use dom0d::machine::{DiskTraffic, HostFigures, Machine};
use std::collections::BTreeMap;
use std::time::Duration;

/// What only grows, by what it is of.
fn counters(figures: &HostFigures) -> BTreeMap<String, f64> {
    let mut all = BTreeMap::new();
    for cpu in &figures.cpus {
        all.insert(format!("cpu {} busy", cpu.cpu), cpu.busy_s);
    }
    let disks = figures.disks.iter().map(|disk| (disk.name.clone(), disk.traffic));
    let vbds = figures.vbds.iter().map(|vbd| (format!("vbd {} {}", vbd.domid, vbd.device), vbd.traffic));
    for (name, DiskTraffic { read, written, reads, writes }) in disks.chain(vbds) {
        for (what, value) in [("read", read.0), ("written", written.0), ("reads", reads), ("writes", writes)]
        {
            all.insert(format!("{name} {what}"), value as f64);
        }
    }
    all
}

pub async fn figures_only_grow_where_they_count(machine: &dyn Machine) {
    let first = machine.figures().await.unwrap();
    assert_eq!(first.problems, []);
    assert!(!first.cpus.is_empty());
    assert!(first.load.is_some_and(|load| load.iter().all(|load| load.is_finite() && *load >= 0.0)));
    let (total, available) = (first.memory_total.unwrap(), first.memory_available.unwrap());
    assert!(total.0 > 0 && available <= total, "{available} of {total}");
    let partition = |name: &str| name.starts_with("loop") || name.starts_with("ram");
    assert!(!first.disks.iter().any(|disk| partition(&disk.name)), "{:?}", first.disks);
    // Time must pass for a counter to grow, and somebody must work: we do.
    let (mut last, began) = (first, tokio::time::Instant::now());
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = machine.figures().await.unwrap();
        let (before, after) = (counters(&last), counters(&now));
        for (name, value) in &before {
            assert!(
                after.get(name).is_none_or(|now| now >= value),
                "{name}: {value}, then {:?}",
                after.get(name)
            );
        }
        if before.iter().any(|(name, value)| after.get(name).is_some_and(|now| now > value)) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "nothing grew in a minute");
        last = now;
    }
}
