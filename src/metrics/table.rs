//! The table of all families: their names, types, units and labels, what they mean and where they come from. What is
//! written, and the page `docs/metrics.md`, come from it.
//!
//! Families of the daemon itself stand here; those of the host and its domains follow from [`crate::stats::METRICS`] by
//! rule: `dom0d_` before the name, `dom0d_domain_` of a domain, the unit behind it.

use crate::stats::metric::{METRICS, Metric, Of, Unit};
use std::borrow::Cow;
use std::sync::LazyLock;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Gauge,
    /// Its samples end in `_total`.
    Counter,
    Histogram,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::Histogram => "histogram",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    /// Without the suffixes of samples.
    pub name: Cow<'static, str>,
    pub kind: Kind,
    /// The name's last word then.
    pub unit: Option<&'static str>,
    pub labels: Cow<'static, [&'static str]>,
    pub meaning: &'static str,
    pub source: &'static str,
}

const UNITS: [&str; 3] = ["seconds", "bytes", "celsius"];

/// The unit that stands at the end of a name.
const fn unit_of(name: &str) -> Option<&'static str> {
    let mut index = 0;
    while index < UNITS.len() {
        if ends_with(name.as_bytes(), UNITS[index].as_bytes()) {
            return Some(UNITS[index]);
        }
        index += 1;
    }
    None
}

const fn ends_with(text: &[u8], end: &[u8]) -> bool {
    if text.len() <= end.len() || text[text.len() - end.len() - 1] != b'_' {
        return false;
    }
    let mut index = 0;
    while index < end.len() {
        if text[text.len() - end.len() + index] != end[index] {
            return false;
        }
        index += 1;
    }
    true
}

macro_rules! families {
    ($($id:ident: $kind:ident $name:literal [$($label:literal),*] $meaning:literal, $source:literal;)*) => {
        $(pub static $id: Family = Family {
            name: Cow::Borrowed($name),
            kind: Kind::$kind,
            unit: unit_of($name),
            labels: Cow::Borrowed(&[$($label),*]),
            meaning: $meaning,
            source: $source,
        };)*
        /// The daemon's own.
        pub static OWN: &[&Family] = &[$(&$id),*];
    };
}

families! {
    BUILD: Gauge "dom0d_build_info" ["version"] "Always 1; the version that runs is a label.", "the program";
    STARTED: Gauge "dom0d_process_start_time_seconds" [] "When the daemon was started, since 1970.", "the clock";
    CPU: Counter "dom0d_process_cpu_seconds" [] "CPU time that the daemon has used.", "getrusage";
    RESIDENT: Gauge "dom0d_process_resident_memory_bytes" [] "Memory of the daemon.", "/proc/self/status";
    THREADS: Gauge "dom0d_process_threads" [] "Threads of the daemon.", "/proc/self/status";
    OPEN_FDS: Gauge "dom0d_process_open_fds" [] "Open descriptors of the daemon.", "/proc/self/fd";
    MAX_FDS: Gauge "dom0d_process_max_fds" [] "How many descriptors it may have.", "getrlimit";
    LAG: Histogram "dom0d_loop_lag_seconds" [] "How late a sleep of 500 ms wakes on the daemon's workers: how long a call may wait for its turn.", "a task";
    LAG_MAX: Gauge "dom0d_loop_lag_max_seconds" [] "The latest of the last 30 to 60 s.", "a task";
    VMS: Gauge "dom0d_vms" ["state"] "VMs by state.", "records and domains as last seen";
    JOBS_OPEN: Gauge "dom0d_jobs_open" ["state"] "Jobs accepted and not ended.", "the engine";
    JOBS_ENDED: Counter "dom0d_jobs_ended" ["verb", "state"] "Jobs ended since the start.", "the engine";
    JOBS_FAILED: Counter "dom0d_jobs_failed" [] "Jobs of all verbs that failed since the start; there from the start on.", "the engine";
    JOB_TIME: Histogram "dom0d_job_duration_seconds" ["verb"] "From a job's acceptance to its end.", "the engine";
    LOCKS: Gauge "dom0d_locks" ["state"] "Claims of jobs on objects: held, or waiting.", "the engine";
    LOCK_WAIT: Gauge "dom0d_lock_oldest_wait_seconds" [] "How long the first of those that wait for a lock has waited.", "the engine";
    EVENT_LAST: Gauge "dom0d_events_last_number" [] "The number of the newest event.", "the event log";
    EVENTS_KEPT: Gauge "dom0d_events_kept" [] "Events kept.", "the event log";
    ALERTS: Gauge "dom0d_alerts_open" ["severity"] "Events that tell of something wrong, not cleared and not acknowledged.", "the event log";
    DELIVERY_LAST: Gauge "dom0d_delivery_last_number" ["stream"] "The last number that the manager has taken.", "delivery";
    DELIVERY_BEHIND: Gauge "dom0d_delivery_behind" ["stream"] "How many there are that it has not.", "delivery";
    DELIVERY_FAILURES: Counter "dom0d_delivery_failures" ["stream"] "Attempts that failed.", "delivery";
    DELIVERY_AGE: Gauge "dom0d_delivery_last_success_age_seconds" ["stream"] "Seconds since the last batch was taken or, if none was, since delivery began; 0 while nothing waits.", "delivery";
    CALL_TIME: Histogram "dom0d_rpc_duration_seconds" ["verb"] "Calls by verb, from their parameters to their answer. Verbs that wait (job_wait, event_wait, changes) wait.", "the verb table";
    CALL_FAULTS: Counter "dom0d_rpc_faults" ["verb"] "Calls answered with a fault.", "the verb table";
    CONNECTIONS: Gauge "dom0d_wire_open_connections" [] "Connections of callers, open now.", "the server";
    ACCEPTED: Counter "dom0d_wire_connections" [] "Connections accepted.", "the server";
    REFUSED: Counter "dom0d_wire_refused_connections" [] "Connections closed at once, since too many were open.", "the server";
    TIMEOUTS: Counter "dom0d_wire_timeouts" [] "Connections ended by a deadline.", "the server";
    UNAUTHORIZED: Counter "dom0d_wire_unauthorized" [] "Requests without good credentials.", "the server";
    WIRE_CALLS: Counter "dom0d_wire_calls" [] "Requests let in.", "the server";
    WIRE_FAULTS: Counter "dom0d_wire_faults" [] "Requests answered with a fault, malformed ones too.", "the server";
    COMMIT_TIME: Histogram "dom0d_store_commit_duration_seconds" [] "From a commit's call until it is on disk; its count is the number of commits.", "the store";
    COMMITS_WAITING: Gauge "dom0d_store_commits_waiting" [] "Commits queued or being written.", "the store";
    STORE_MODE: Gauge "dom0d_store_mode" ["mode"] "1 for what the store can do now: normal, low_space (essential writes only), read_only.", "the store";
    STORE_BYTES: Gauge "dom0d_store_disk_bytes" [] "What the store's folder takes on disk; looked at once a minute.", "the disk";
    STORE_ROWS: Gauge "dom0d_store_rows" ["table"] "Rows of the store's tables.", "the store";
    NETLINK_MESSAGES: Counter "dom0d_netlink_messages" [] "Questions and changes sent to the kernel's network.", "the netlink socket";
    NETLINK_FAILURES: Counter "dom0d_netlink_failures" [] "Those refused or not answered; asking for what is not there counts too.", "the netlink socket";
    NETLINK_NOTICES: Counter "dom0d_netlink_notices" [] "Notices of changes heard.", "the netlink socket";
    NETLINK_OVERRUNS: Counter "dom0d_netlink_overruns" [] "Times the kernel dropped notices; the network is read anew then.", "the netlink socket";
    SWEEP_AGE: Gauge "dom0d_sample_age_seconds" [] "Since the figures of host and domains were read.", "the sampler";
    SWEEP_TIME: Gauge "dom0d_sample_duration_seconds" [] "How long that took.", "the sampler";
    SWEEP_PROBLEMS: Gauge "dom0d_sample_problem" ["source"] "1 for each source that could not be read; the log says why.", "the sampler";
    SCRAPES: Counter "dom0d_metrics_scrapes" [] "Times that these figures were asked for.", "this listener";
    SCRAPE_REFUSED: Counter "dom0d_metrics_refused_connections" [] "Connections to this listener that were turned away or ended early.", "this listener";
    LEFT_OUT: Gauge "dom0d_metrics_left_out" [] "Samples that found no room in this text.", "this listener";
}

/// Of host and domains, in the order of [`METRICS`].
pub static SAMPLED: LazyLock<Vec<Family>> = LazyLock::new(|| METRICS.iter().map(sampled).collect());

fn sampled(metric: &Metric) -> Family {
    let prefix = if metric.of == Of::Domain { "dom0d_domain_" } else { "dom0d_" };
    // `cpu_time` in seconds is `cpu_seconds`, `rx_bytes` stays as it is.
    let stem = match metric.unit {
        Unit::Seconds => metric.name.strip_suffix("_time").unwrap_or(metric.name),
        _ => metric.name,
    };
    let unit = match metric.unit {
        Unit::Seconds => Some("seconds"),
        Unit::Bytes => Some("bytes"),
        Unit::Celsius => Some("celsius"),
        Unit::Count => None,
    };
    let name = match unit {
        Some(unit) if !ends_with(stem.as_bytes(), unit.as_bytes()) => format!("{prefix}{stem}_{unit}"),
        _ => format!("{prefix}{stem}"),
    };
    let kind = match metric.kind {
        crate::stats::metric::Kind::Gauge => Kind::Gauge,
        crate::stats::metric::Kind::Counter => Kind::Counter,
    };
    let whose: &[&str] = if metric.of == Of::Domain { &["vm", "name"] } else { &[] };
    let labels: Vec<&str> = whose.iter().copied().chain(metric.instance).collect();
    let (meaning, source) = (metric.meaning, metric.source);
    Family { name: name.into(), kind, unit, labels: labels.into(), meaning, source }
}

#[cfg(test)]
pub(super) fn family(
    name: &'static str,
    kind: Kind,
    labels: &'static [&'static str],
    meaning: &'static str,
) -> Family {
    Family { name: name.into(), kind, unit: unit_of(name), labels: labels.into(), meaning, source: "a test" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_families_have_a_sample_of_the_same_name() {
        let mut seen = BTreeSet::new();
        for family in OWN.iter().copied().chain(SAMPLED.iter()) {
            for suffix in ["", "_total", "_bucket", "_sum", "_count"] {
                assert!(seen.insert(format!("{}{suffix}", family.name)), "{}{suffix}", family.name);
            }
        }
    }

    #[test]
    fn a_family_is_named_by_its_base_unit_and_a_counters_suffix_is_not_in_its_name() {
        for family in OWN.iter().copied().chain(SAMPLED.iter()) {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(family.name.starts_with("dom0d_") && family.name.chars().all(good), "{}", family.name);
            assert!(!family.name.ends_with("_total"), "{}", family.name);
            if let Some(unit) = family.unit {
                assert!(family.name.ends_with(&format!("_{unit}")), "{}", family.name);
            }
            assert!(family.meaning.ends_with('.'), "{}", family.meaning);
        }
        let name = |metric: &str| {
            let at = METRICS.iter().position(|m| m.name == metric).unwrap();
            SAMPLED[at].name.clone()
        };
        assert_eq!(name("cpu_time"), "dom0d_domain_cpu_seconds");
        assert_eq!(name("vif_rx_bytes"), "dom0d_domain_vif_rx_bytes");
        assert_eq!(name("host_memory_free"), "dom0d_host_memory_free_bytes");
        assert_eq!(name("temperature"), "dom0d_temperature_celsius");
        assert_eq!(name("host_load_1m"), "dom0d_host_load_1m");
    }
}
