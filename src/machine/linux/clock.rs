//! The clock and the time zone.
//!
//! Files of ours to write: `/etc/localtime` (a link into the zone database), `/etc/timezone` where the
//! distribution keeps one, and the third line of `/etc/adjtime` (whether the hardware clock runs in UTC).

use super::command::Programs;
use super::file::{self, below};
use crate::machine::{MachineError, Result, TimeZone};
use crate::model::{Timestamp, excerpt};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use std::path::Path;

const ZONES: &str = "/usr/share/zoneinfo";
const LOCALTIME: &str = "/etc/localtime";
const TIMEZONE: &str = "/etc/timezone";
const ADJTIME: &str = "/etc/adjtime";

/// Sets the kernel's wall clock.
pub fn set(time: Timestamp) -> Result<()> {
    let seconds = i64::try_from(time.seconds())
        .map_err(|_| MachineError::Invalid("the time is beyond what the clock holds".to_owned()))?;
    let nanoseconds = i64::try_from(time.0 % 1000).unwrap_or(0) * 1_000_000;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanoseconds)).map_err(|errno| match errno {
        nix::Error::EPERM => MachineError::Failed(
            "setting the clock was not permitted: the daemon needs CAP_SYS_TIME".to_owned(),
        ),
        nix::Error::EINVAL => MachineError::Invalid(format!("the kernel does not take the time {time}")),
        other => MachineError::Failed(format!("setting the clock: {other}")),
    })
}

/// Writes the system's time into the hardware clock where that is possible. A machine without one, or where
/// Xen keeps it, goes on with a warning: the system's clock is what was asked for.
pub async fn keep_in_hardware(programs: &Programs<'_>, base: &[&str]) {
    if programs.find("hwclock").is_none() {
        return;
    }
    let mut args = vec!["--systohc"];
    args.extend(base);
    if let Err(error) = programs.run("hwclock", &args).await {
        tracing::warn!(%error, "the hardware clock was not set");
    }
}

pub fn timezone(root: &Path) -> Result<TimeZone> {
    Ok(TimeZone { name: zone_name(root), rtc_utc: rtc_utc(root) })
}

/// The link is what the C library obeys; the text is a copy. Neither: UTC, as the C library has it.
fn zone_name(root: &Path) -> String {
    let link = std::fs::read_link(below(root, LOCALTIME)).ok();
    let linked = link.as_deref().and_then(Path::to_str).and_then(|target| {
        let name = target.split_once("zoneinfo/")?.1;
        Some(name.strip_prefix("posix/").unwrap_or(name).to_owned())
    });
    let written =
        || file::read_text(root, TIMEZONE).and_then(|t| t.lines().next().map(|l| l.trim().to_owned()));
    let name = linked.or_else(written).filter(|name| well_formed(name));
    name.unwrap_or_else(|| "UTC".to_owned())
}

/// hwclock(8): the third line is `UTC` or `LOCAL`; without the file it is UTC.
fn rtc_utc(root: &Path) -> bool {
    let text = file::read_text(root, ADJTIME).unwrap_or_default();
    text.lines().nth(2).is_none_or(|line| line.trim() != "LOCAL")
}

/// What a change of the time zone changed.
pub struct Changed {
    /// The hardware clock's base: the clock itself has to be set anew.
    pub rtc: bool,
}

pub fn set_timezone(root: &Path, zone: &TimeZone) -> Result<Changed> {
    check(root, &zone.name)?;
    file::link(&below(root, LOCALTIME), &format!("..{ZONES}/{}", zone.name))?;
    if below(root, TIMEZONE).exists() {
        file::write(&below(root, TIMEZONE), &format!("{}\n", zone.name))?;
    }
    let rtc = rtc_utc(root) != zone.rtc_utc;
    if rtc {
        let old = file::read_text(root, ADJTIME).unwrap_or_default();
        let mut lines = old.lines();
        let drift = lines.next().unwrap_or("0.0 0 0.0");
        let adjusted = lines.next().unwrap_or("0");
        let base = if zone.rtc_utc { "UTC" } else { "LOCAL" };
        file::write(&below(root, ADJTIME), &format!("{drift}\n{adjusted}\n{base}\n"))?;
    }
    Ok(Changed { rtc })
}

/// Parts of letters, digits and `_ + -`, so that no name can leave the zone database.
fn well_formed(name: &str) -> bool {
    let part = |part: &str| {
        let good = |c: u8| c.is_ascii_alphanumeric() || b"_+-".contains(&c);
        !part.is_empty() && part.bytes().all(good) && !part.starts_with(['-', '+'])
    };
    name.len() <= 64 && name.split('/').all(part)
}

fn check(root: &Path, name: &str) -> Result<()> {
    let database = below(root, ZONES);
    if !database.is_dir() {
        return Err(MachineError::Unavailable(format!("the zone database ({ZONES}, package tzdata)")));
    }
    let unknown = || {
        MachineError::Invalid(format!(
            "time zone {} is not one; allowed: a name of the zone database, as Europe/Amsterdam",
            excerpt(name)
        ))
    };
    if !well_formed(name) {
        return Err(unknown());
    }
    // The database holds tables (zone.tab, leapseconds) beside its zones; only zones begin so (RFC 8536).
    let zone = file::read_bytes(&database.join(name), 4).ok_or_else(unknown)?;
    if zone == b"TZif" { Ok(()) } else { Err(unknown()) }
}
