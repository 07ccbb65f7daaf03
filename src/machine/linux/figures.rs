//! Figures for sampling, all in one pass: /proc/stat, /proc/loadavg, /proc/meminfo, /proc/diskstats (proc(5)), sensors of
//! /sys/class/hwmon, and the disks that the kernel serves to domains (`disks`).
//!
//! A source that cannot be read, or has nothing of what is asked, is told by its name; a line of another form is passed
//! over. Figures of the rest stand all the same.

use super::disks::{self, SECTOR_BYTES};
use super::file::{self, below, read_text_of};
use crate::machine::{CpuTime, DiskFigures, DiskTraffic, HostFigures};
use crate::model::Bytes;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// The CPUs stand first in /proc/stat, with at most some 200 bytes each.
const MAX_STAT_BYTES: usize = 512 * 1024;
const MAX_CPUS: usize = 2048;
/// A line of /proc/diskstats has some 150 bytes.
const MAX_DISKSTATS_BYTES: usize = 1024 * 1024;
const MAX_DISKS: usize = 1024;
const MAX_CHIPS: usize = 64;
const MAX_SENSORS: usize = 256;
/// Of a sensor's or a disk's name.
const MAX_NAME_BYTES: usize = 56;
/// `USER_HZ`: what the kernel counts CPU time in for programs, on all architectures that Xen runs on.
const TICKS_PER_SECOND: f64 = 100.0;

pub fn read(root: &Path) -> HostFigures {
    let mut figures = HostFigures::default();
    let whole = |path: &'static str, max| read_text_of(&below(root, path), max).ok_or("cannot be read");
    let mut told = |source: &'static str, done: Result<(), &str>| {
        if let Err(why) = done {
            figures.problems.push((source, why.to_owned()));
        }
    };
    let some = |any: bool, nothing: &'static str| if any { Ok(()) } else { Err(nothing) };
    let cpus = whole("/proc/stat", MAX_STAT_BYTES).map(|text| cpus(&text));
    told(
        "/proc/stat",
        cpus.as_ref().map_err(|e| *e).and_then(|cpus| some(!cpus.is_empty(), "tells of no CPU")),
    );
    let load =
        whole("/proc/loadavg", file::MAX_BYTES).and_then(|text| load(&text).ok_or("is not understood"));
    told("/proc/loadavg", load.map(drop));
    let memory = whole("/proc/meminfo", file::MAX_BYTES).map(|text| memory(&text));
    told("/proc/meminfo", memory.and_then(|(total, _)| some(total.is_some(), "does not tell the memory")));
    let disks = whole_disks(root).and_then(|whole_disks| {
        whole("/proc/diskstats", MAX_DISKSTATS_BYTES).map(|text| of_disks(&text, &whole_disks))
    });
    told("/proc/diskstats", disks.as_ref().map(drop).map_err(|e| *e));
    let vbds = disks::all(root);
    if let Err(error) = &vbds {
        told("/sys/bus/xen-backend", Err(&error.to_string()));
    }
    figures.cpus = cpus.unwrap_or_default();
    figures.load = load.ok();
    (figures.memory_total, figures.memory_available) = memory.unwrap_or_default();
    figures.disks = disks.unwrap_or_default();
    figures.vbds = vbds.unwrap_or_default();
    // Last: a sensor may be slow. That there is none is usual.
    figures.temperatures = temperatures(root);
    figures
}

/// `cpu0 user nice system idle iowait irq softirq steal guest guest_nice`; guests' time is in user and nice too.
fn cpus(text: &str) -> Vec<CpuTime> {
    let of_line = |line: &str| {
        let (name, ticks) = line.split_once(' ')?;
        let cpu = name.strip_prefix("cpu")?.parse().ok()?;
        let ticks: Vec<u64> = ticks.split_ascii_whitespace().take(8).map_while(|n| n.parse().ok()).collect();
        let [user, nice, system, _idle, _waiting, interrupts, soft_interrupts, steal] = ticks[..] else {
            return None;
        };
        let busy = [user, nice, system, interrupts, soft_interrupts].into_iter().fold(0, u64::saturating_add);
        let seconds = |ticks: u64| ticks as f64 / TICKS_PER_SECOND;
        Some(CpuTime { cpu, busy_s: seconds(busy), steal_s: seconds(steal) })
    };
    // One that was cut ends in no newline.
    let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    lines.take_while(|line| line.starts_with("cpu")).filter_map(of_line).take(MAX_CPUS).collect()
}

/// `0.20 0.18 0.12 1/80 11206`
fn load(text: &str) -> Option<[f64; 3]> {
    let mut numbers = text.split_ascii_whitespace();
    let mut next = || numbers.next()?.parse().ok().filter(|load: &f64| load.is_finite() && *load >= 0.0);
    Some([next()?, next()?, next()?])
}

/// `MemTotal:        2048000 kB`
fn memory(text: &str) -> (Option<Bytes>, Option<Bytes>) {
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(Bytes(kib.saturating_mul(1024)))
    };
    (of("MemTotal"), of("MemAvailable"))
}

/// What /sys/block has: partitions are not there by themselves. Loops and ram disks are no disks of the host.
fn whole_disks(root: &Path) -> Result<HashSet<String>, &'static str> {
    let entries = std::fs::read_dir(below(root, "/sys/block")).map_err(|_| "/sys/block cannot be read")?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let made_of_others = |name: &str| ["loop", "ram", "zram"].iter().any(|kind| name.starts_with(kind));
    Ok(names.filter(|name| !made_of_others(name) && name.len() <= MAX_NAME_BYTES).take(MAX_DISKS).collect())
}

/// `8 0 sda reads merged sectors_read ms writes merged sectors_written ms …`
fn of_disks(text: &str, whole: &HashSet<String>) -> Vec<DiskFigures> {
    let of_line = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(2);
        let name = words.next().filter(|name| whole.contains(*name))?;
        let counts: Vec<u64> = words.take(7).map_while(|n| n.parse().ok()).collect();
        let [reads, _, read, _, writes, _, written] = counts[..] else { return None };
        let bytes = |sectors: u64| Bytes(sectors.saturating_mul(SECTOR_BYTES));
        let traffic = DiskTraffic { read: bytes(read), written: bytes(written), reads, writes };
        Some(DiskFigures { name: name.to_owned(), traffic })
    };
    let mut disks: Vec<DiskFigures> = text.lines().filter_map(of_line).take(MAX_DISKS).collect();
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    disks
}

/// By the sensor's label, or its chip's name; one whose name another has too gets a number behind it. Names are given to
/// all sensors in their order, those that cannot be read too, so that a name is of one sensor whatever the others do.
fn temperatures(root: &Path) -> Vec<(String, f64)> {
    let value =
        |chip: &Path, what: &str| read_text_of(&chip.join(what), 4096).map(|text| text.trim().to_owned());
    let sensors: Vec<(PathBuf, u32)> = sensors(root).into_iter().take(MAX_SENSORS).collect();
    let own_name = |(chip, number): &(PathBuf, u32)| {
        let told = |what: &str| value(chip, what).filter(|text| !text.is_empty());
        let name = told(&format!("temp{number}_label")).or_else(|| told("name"));
        first(&name.unwrap_or_else(|| "sensor".to_owned()), MAX_NAME_BYTES)
    };
    let names = apart(sensors.iter().map(own_name).collect());
    let told = sensors.iter().zip(names).filter_map(|((chip, number), name)| {
        let thousandths: i32 = value(chip, &format!("temp{number}_input"))?.parse().ok()?;
        Some((name, f64::from(thousandths) / 1000.0))
    });
    told.collect()
}

/// The same names, each once: the first of equals keeps its name, and the others get the next number that makes none of
/// the others' names.
fn apart(names: Vec<String>) -> Vec<String> {
    let mut taken: HashSet<String> = names.iter().cloned().collect();
    let mut met = HashSet::new();
    let own = |name: String| {
        if met.insert(name.clone()) {
            return name;
        }
        let mut numbered = (2_u32..).map(|number| format!("{name} {number}"));
        let free = numbered.find(|made| taken.insert(made.clone()));
        free.unwrap_or(name)
    };
    names.into_iter().map(own).collect()
}

/// The whole characters that so many bytes hold.
fn first(text: &str, max_bytes: usize) -> String {
    let fits = |(at, c): &(usize, char)| at + c.len_utf8() <= max_bytes;
    text.char_indices().take_while(fits).map(|(_, c)| c).collect()
}

/// Chips with the numbers of their sensors of temperature, in order.
fn sensors(root: &Path) -> Vec<(PathBuf, u32)> {
    let names = |folder: &Path, max: usize| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().take(max);
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<String>>()
    };
    let hwmon = below(root, "/sys/class/hwmon");
    let mut chips: Vec<(u32, PathBuf)> = names(&hwmon, MAX_CHIPS)
        .into_iter()
        .filter_map(|name| Some((name.strip_prefix("hwmon")?.parse().ok()?, hwmon.join(&name))))
        .collect();
    chips.sort();
    let mut all = Vec::new();
    for (_, chip) in chips {
        let of = |name: &String| name.strip_prefix("temp")?.strip_suffix("_input")?.parse().ok();
        let mut numbers: Vec<u32> = names(&chip, 4096).iter().filter_map(of).collect();
        numbers.sort_unstable();
        all.extend(numbers.into_iter().map(|number| (chip.clone(), number)));
    }
    all
}
