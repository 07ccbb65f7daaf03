//! What each key may be, said once: the same table checks a value and tells, in an error, what is allowed.
//!
//! Types are checked by serde before; here come ranges, the forms of paths and names, and what two keys must
//! hold together. Nothing here reads a file or knows where a value came from.

use super::Settings;
use std::path::Path;

/// A key that is a number, and what it may be.
struct Range {
    key: &'static str,
    unit: &'static str,
    min: u64,
    max: u64,
    value: fn(&Settings) -> u64,
}

/// A value that its type allows and its meaning does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wrong {
    pub key: &'static str,
    pub problem: String,
    pub allowed: String,
}

/// Longest path of a Unix socket: `sun_path` has 108 bytes, the last of them a zero.
const MAX_SOCKET_PATH: usize = 107;

/// The dialect's clients give up after 900 s; a wait ends before, so that its fault still reaches them.
const CLIENT_PATIENCE_S: u64 = 900;

const fn range(
    key: &'static str,
    unit: &'static str,
    min: u64,
    max: u64,
    value: fn(&Settings) -> u64,
) -> Range {
    Range { key, unit, min, max, value }
}

const HOUR_MS: u64 = 3_600_000;
const DAY_S: u64 = 86_400;

/// The upper ends are no wishes but fences against a slip of a unit: ms where s was meant, bytes for MiB.
const RANGES: &[Range] = &[
    range("state.reserve_mib", "MiB", 0, 4096, |s| s.state.reserve_mib),
    range("state.cache_mib", "MiB", 1, 1024, |s| s.state.cache_mib),
    range("wire.max_connections", "connections", 1, 65_536, |s| s.wire.max_connections as u64),
    range("wire.max_connections_per_address", "connections", 1, 65_536, |s| {
        s.wire.max_connections_per_address as u64
    }),
    range("wire.head_timeout_ms", "ms", 100, HOUR_MS, |s| s.wire.head_timeout_ms),
    range("wire.body_timeout_ms", "ms", 100, HOUR_MS, |s| s.wire.body_timeout_ms),
    range("wire.idle_timeout_ms", "ms", 100, HOUR_MS, |s| s.wire.idle_timeout_ms),
    range("wire.write_timeout_ms", "ms", 100, HOUR_MS, |s| s.wire.write_timeout_ms),
    range("wire.max_head_bytes", "bytes", 8192, 1024 * 1024, |s| s.wire.max_head_bytes as u64),
    range("wire.max_body_bytes", "bytes", 1024, 64 * 1024 * 1024, |s| s.wire.max_body_bytes as u64),
    range("wire.max_depth", "levels", 4, 256, |s| s.wire.max_depth as u64),
    range("wire.max_values", "values", 100, 10_000_000, |s| s.wire.max_values as u64),
    range("wire.max_answer_bytes", "bytes", 65_536, 1024 * 1024 * 1024, |s| s.wire.max_answer_bytes as u64),
    range("wire.drain_timeout_ms", "ms", 0, HOUR_MS, |s| s.wire.drain_timeout_ms),
    range("access.max_failures_per_minute", "failures", 1, 10_000, |s| {
        u64::from(s.access.max_failures_per_minute)
    }),
    range("jobs.max_open", "jobs", 1, 1_000_000, |s| s.jobs.max_open as u64),
    range("jobs.max_running", "jobs", 1, 10_000, |s| s.jobs.max_running as u64),
    range("jobs.history", "jobs", 1, 10_000_000, |s| s.jobs.history as u64),
    range("jobs.default_deadline_s", "s", 1, 30 * DAY_S, |s| s.jobs.default_deadline_s),
    range("jobs.cancel_bound_s", "s", 1, 3600, |s| s.jobs.cancel_bound_s),
    range("jobs.wait_limit_s", "s", 1, CLIENT_PATIENCE_S - 1, |s| s.jobs.wait_limit_s),
    range("events.history", "events", 1, 100_000_000, |s| s.events.history as u64),
    range("manager.post_timeout_ms", "ms", 100, HOUR_MS, |s| s.manager.post_timeout_ms),
    range("vm.shutdown_timeout_s", "s", 1, DAY_S, |s| s.vm.shutdown_timeout_s),
    range("vm.toolstack_timeout_s", "s", 1, 3600, |s| s.vm.toolstack_timeout_s),
    range("vm.autostart_delay_s", "s", 0, 3600, |s| s.vm.autostart_delay_s),
    range("vm.discovery_interval_s", "s", 1, DAY_S, |s| s.vm.discovery_interval_s),
    range("migration.max_out", "VMs", 1, 64, |s| s.migration.max_out as u64),
    range("migration.max_in", "VMs", 1, 64, |s| s.migration.max_in as u64),
    range("migration.deadline_s", "s", 1, DAY_S, |s| s.migration.deadline_s),
    range("migration.stall_s", "s", 1, 3600, |s| s.migration.stall_s),
];

const OTHERS: &[(&str, &str)] = &[
    ("dialect", "\"3.2\" or \"3.3\""),
    ("world.toolstack", "\"auto\", \"xl\" or \"sim\""),
    ("world.kernel", "\"linux\" or \"sim\""),
    ("world.host", "\"linux\" or \"sim\""),
    ("state.dir", "an absolute path other than /, without .. parts"),
    ("wire.listen", "an address and a port: \"0.0.0.0:8899\" or \"[::]:8899\""),
    ("wire.socket", "an absolute path of at most 107 bytes, or \"\" for dom0d.sock in the state folder"),
    ("wire.socket_group", "a group's name: letters, digits, _ and -, at most 32; or \"\" for root alone"),
    ("wire.plain_http", "true or false"),
    ("access.password_after_ownership", "\"admin\" or \"none\""),
    ("manager.plain_http", "true or false"),
    ("manager.without_certificate", "\"first_seen\" or \"refuse\""),
    ("metrics.listen", "an address and a port: \"127.0.0.1:9178\"; or \"\" for none"),
    ("vm.repositories", "an absolute path of letters, digits and / _ . + : @ = ~ -, without . or .. parts"),
    ("vm.kernels", "an absolute path of letters, digits and / _ . + : @ = ~ -, without . or .. parts"),
    ("vm.autostart_default", "true or false"),
    ("vm.beside_xendomains", "true or false"),
    ("log.level", "\"error\", \"warn\", \"info\", \"debug\" or \"trace\""),
    ("log.format", "\"auto\", \"text\" or \"json\""),
];

/// What the value of `key` may be; `None` for a key that does not exist.
pub(super) fn allowed(key: &str) -> Option<String> {
    if let Some(range) = RANGES.iter().find(|range| range.key == key) {
        return Some(format!("a whole number from {} to {} ({})", range.min, range.max, range.unit));
    }
    OTHERS.iter().find(|(name, _)| *name == key).map(|(_, text)| (*text).to_owned())
}

/// The names of all keys, with their section.
pub(super) fn keys() -> impl Iterator<Item = &'static str> {
    RANGES.iter().map(|range| range.key).chain(OTHERS.iter().map(|(key, _)| *key))
}

/// The first thing that is wrong with these settings.
pub(super) fn check(settings: &Settings) -> Result<(), Wrong> {
    for range in RANGES {
        let value = (range.value)(settings);
        if value < range.min || value > range.max {
            return Err(wrong(range.key, format!("is {value}")));
        }
    }
    check_paths(settings)?;
    check_group(&settings.wire.socket_group)?;
    check_pairs(settings)
}

fn wrong(key: &'static str, problem: impl Into<String>) -> Wrong {
    Wrong { key, problem: problem.into(), allowed: allowed(key).unwrap_or_default() }
}

fn check_paths(settings: &Settings) -> Result<(), Wrong> {
    let dir = &settings.state.dir;
    if !plain(dir) || dir.parent().is_none() {
        return Err(wrong("state.dir", format!("is {dir:?}")));
    }
    let socket = &settings.wire.socket;
    if socket.as_os_str().is_empty() {
        if dir.join("dom0d.sock").as_os_str().len() > MAX_SOCKET_PATH {
            let problem = "is too long for the operator's socket to lie in it (then set wire.socket)";
            return Err(wrong("state.dir", problem));
        }
    } else if !plain(socket) || socket.parent().is_none() || socket.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(wrong("wire.socket", format!("is {socket:?}")));
    }
    Ok(())
}

/// Absolute, and means the same to each who resolves it.
fn plain(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    let up = path.components().any(|part| matches!(part, std::path::Component::ParentDir));
    path.is_absolute() && !up && !text.iter().any(u8::is_ascii_control)
}

fn check_group(group: &str) -> Result<(), Wrong> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if group.len() <= 32 && group.chars().all(good) && !group.starts_with('-') {
        return Ok(());
    }
    Err(wrong("wire.socket_group", format!("is {}", crate::model::excerpt(group))))
}

/// What two keys must hold together.
fn check_pairs(settings: &Settings) -> Result<(), Wrong> {
    let pair = |key, value: usize, bound_by: &str, bound: usize| {
        if value <= bound {
            return Ok(());
        }
        let (problem, allowed) = (format!("is {value}"), format!("at most {bound_by}, which is {bound}"));
        Err(Wrong { key, problem, allowed })
    };
    let (wire, jobs) = (&settings.wire, &settings.jobs);
    pair(
        "wire.max_connections_per_address",
        wire.max_connections_per_address,
        "wire.max_connections",
        wire.max_connections,
    )?;
    pair("jobs.max_running", jobs.max_running, "jobs.max_open", jobs.max_open)
}
