//! The table of all metrics: what can be asked for, what it means, where it comes from and how exact it is.
//! `docs/metrics.md`, the verbs' answers and the exposition are made from it.

/// Whose figure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Of {
    Host,
    /// A domain: dom0 too, as far as its source tells of it.
    Domain,
}

/// How a figure moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows while its object lives; a series keeps its rate a second.
    Counter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    Seconds,
    Bytes,
    Celsius,
    /// Things counted: packets, requests, CPUs.
    Count,
}

impl Unit {
    /// As it stands behind a value; of a counter's rate, `/s` follows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Bytes => "bytes",
            Self::Celsius => "°C",
            Self::Count => "",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Stable, snake case, unique.
    pub name: &'static str,
    pub of: Of,
    pub kind: Kind,
    pub unit: Unit,
    /// What its instances are, for a metric that has several of an object: `vif`, `disk`.
    pub instance: Option<&'static str>,
    pub meaning: &'static str,
    pub source: &'static str,
    /// The least difference that the source can tell.
    pub resolution: &'static str,
}

/// A metric by its place in [`METRICS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MetricId(pub u8);

impl MetricId {
    /// The metric of this name.
    pub fn parse(name: &str) -> Option<Self> {
        METRICS.iter().position(|metric| metric.name == name).and_then(|at| u8::try_from(at).ok()).map(Self)
    }

    pub fn metric(self) -> &'static Metric {
        &METRICS[usize::from(self.0)]
    }
}

const fn counter(
    (name, of, unit, instance): (&'static str, Of, Unit, Option<&'static str>),
    meaning: &'static str,
    (source, resolution): (&'static str, &'static str),
) -> Metric {
    Metric { name, of, kind: Kind::Counter, unit, instance, meaning, source, resolution }
}

const fn gauge(
    (name, of, unit, instance): (&'static str, Of, Unit, Option<&'static str>),
    meaning: &'static str,
    (source, resolution): (&'static str, &'static str),
) -> Metric {
    Metric { name, of, kind: Kind::Gauge, unit, instance, meaning, source, resolution }
}

use Of::{Domain, Host};
use Unit::{Bytes, Celsius, Count, Seconds};

const STAT: (&str, &str) = ("/proc/stat", "10 ms");
const LOAD: (&str, &str) = ("/proc/loadavg", "0.01");
const MEMINFO: (&str, &str) = ("/proc/meminfo", "1 KiB");
const XEN_CPU: (&str, &str) = ("sysctl getcpuinfo", "1 ns");
const XEN_MEMORY: (&str, &str) = ("sysctl physinfo", "4 KiB");
const NET_DEV: (&str, &str) = ("/proc/net/dev", "1");
const DISKSTATS: (&str, &str) = ("/proc/diskstats", "512 bytes");
const DISK_COUNT: (&str, &str) = ("/proc/diskstats", "1");
const HWMON: (&str, &str) = ("/sys/class/hwmon", "0.001 °C");
const DOMAINS: (&str, &str) = ("sysctl getdomaininfolist", "1 ns");
const DOMAIN_MEMORY: (&str, &str) = ("sysctl getdomaininfolist", "4 KiB");
const DOMAIN_COUNT: (&str, &str) = ("sysctl getdomaininfolist", "1");
const MOST: (&str, &str) = ("XenStore memory/static-max", "1 KiB");
const TARGET: (&str, &str) = ("XenStore memory/target", "1 KiB");
const GUEST: (&str, &str) = ("XenStore data/meminfo_*, written by the guest", "1 KiB; the guest's word");
const BLKBACK: (&str, &str) = ("/sys/bus/xen-backend", "512 bytes");
const BLKBACK_COUNT: (&str, &str) = ("/sys/bus/xen-backend", "1");

/// All metrics. Their order is the order in which they are shown; nothing that is kept depends on it.
#[rustfmt::skip]
pub const METRICS: &[Metric] = &[
    counter(("host_cpu_busy", Host, Seconds, Some("cpu")), "Time that a physical CPU did not idle.", XEN_CPU),
    counter(("dom0_cpu_busy", Host, Seconds, Some("cpu")), "Time that one of dom0's CPUs worked: all but idle, waiting for disks, and stolen time.", STAT),
    counter(("dom0_cpu_steal", Host, Seconds, Some("cpu")), "Time that one of dom0's CPUs wanted to run and Xen ran another domain.", STAT),
    gauge(("host_load_1m", Host, Count, None), "dom0's load average over a minute.", LOAD),
    gauge(("host_load_5m", Host, Count, None), "dom0's load average over five minutes.", LOAD),
    gauge(("host_load_15m", Host, Count, None), "dom0's load average over a quarter of an hour.", LOAD),
    gauge(("host_memory_total", Host, Bytes, None), "The machine's memory as Xen has it.", XEN_MEMORY),
    gauge(("host_memory_free", Host, Bytes, None), "Memory that Xen has not given to any domain.", XEN_MEMORY),
    gauge(("dom0_memory_total", Host, Bytes, None), "dom0's memory.", MEMINFO),
    gauge(("dom0_memory_available", Host, Bytes, None), "What programs of dom0 can still get without swapping.", MEMINFO),
    gauge(("host_domains", Host, Count, None), "Domains, dom0 not counted.", DOMAIN_COUNT),
    counter(("link_rx_bytes", Host, Bytes, Some("link")), "Received by a link of the host (vifs of guests are told with their domain).", NET_DEV),
    counter(("link_tx_bytes", Host, Bytes, Some("link")), "Sent by a link of the host.", NET_DEV),
    counter(("link_rx_packets", Host, Count, Some("link")), "Packets received by a link of the host.", NET_DEV),
    counter(("link_tx_packets", Host, Count, Some("link")), "Packets sent by a link of the host.", NET_DEV),
    counter(("link_errors", Host, Count, Some("link")), "Packets that a link of the host received or sent with errors.", NET_DEV),
    counter(("link_drops", Host, Count, Some("link")), "Packets that a link of the host dropped, received or to be sent.", NET_DEV),
    counter(("disk_read_bytes", Host, Bytes, Some("disk")), "Read from a disk of the host.", DISKSTATS),
    counter(("disk_written_bytes", Host, Bytes, Some("disk")), "Written to a disk of the host.", DISKSTATS),
    counter(("disk_reads", Host, Count, Some("disk")), "Reads of a disk of the host.", DISK_COUNT),
    counter(("disk_writes", Host, Count, Some("disk")), "Writes to a disk of the host.", DISK_COUNT),
    gauge(("temperature", Host, Celsius, Some("sensor")), "What a sensor of the machine tells; none on most machines under Xen.", HWMON),
    counter(("cpu_time", Domain, Seconds, None), "CPU time that a domain's virtual CPUs have used, all together.", DOMAINS),
    gauge(("vcpus", Domain, Count, None), "A domain's virtual CPUs that are online.", DOMAIN_COUNT),
    gauge(("memory", Domain, Bytes, None), "Memory that a domain has.", DOMAIN_MEMORY),
    gauge(("memory_max", Domain, Bytes, None), "Memory that a domain may have at most.", MOST),
    gauge(("memory_target", Domain, Bytes, None), "Memory that a domain was told to have.", TARGET),
    gauge(("guest_memory_total", Domain, Bytes, None), "Memory as the guest counts it, if it tells.", GUEST),
    gauge(("guest_memory_free", Domain, Bytes, None), "Free memory as the guest counts it, if it tells.", GUEST),
    counter(("vif_rx_bytes", Domain, Bytes, Some("vif")), "Received by the guest through a vif.", NET_DEV),
    counter(("vif_tx_bytes", Domain, Bytes, Some("vif")), "Sent by the guest through a vif.", NET_DEV),
    counter(("vif_rx_packets", Domain, Count, Some("vif")), "Packets received by the guest through a vif.", NET_DEV),
    counter(("vif_tx_packets", Domain, Count, Some("vif")), "Packets sent by the guest through a vif.", NET_DEV),
    counter(("vif_errors", Domain, Count, Some("vif")), "Packets with errors on a vif, both ways.", NET_DEV),
    counter(("vif_drops", Domain, Count, Some("vif")), "Packets dropped on a vif, both ways.", NET_DEV),
    counter(("vbd_read_bytes", Domain, Bytes, Some("vbd")), "Read by the guest from a disk that the kernel serves.", BLKBACK),
    counter(("vbd_written_bytes", Domain, Bytes, Some("vbd")), "Written by the guest to a disk that the kernel serves.", BLKBACK),
    counter(("vbd_reads", Domain, Count, Some("vbd")), "Reads by the guest of a disk that the kernel serves.", BLKBACK_COUNT),
    counter(("vbd_writes", Domain, Count, Some("vbd")), "Writes by the guest to a disk that the kernel serves.", BLKBACK_COUNT),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_metric_is_found_by_its_name_which_is_its_own() {
        let names: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
        for metric in METRICS {
            assert_eq!(MetricId::parse(metric.name).unwrap().metric(), metric);
            assert!(metric.name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_'));
        }
        assert_eq!(MetricId::parse("cpu"), None);
    }
}
