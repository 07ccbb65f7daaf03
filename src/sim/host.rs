//! The made-up machine under the world: its clock, zone, NTP, power and log. What never changes about
//! it (names of its maker, its processors' flags) is the driver's to make up, not kept here.

use crate::model::{MiB, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::net::IpAddr;

/// From asking for a reboot or power-off to its happening: the answer goes out first.
const POWER_DELAY_MS: u64 = 200;
/// Lines of the log kept.
const MAX_LOG_LINES: usize = 500;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zone {
    pub name: String,
    pub rtc_utc: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ntp {
    pub servers: Vec<String>,
    pub local_time_source: bool,
    pub running: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub name: String,
    pub mac: Option<String>,
    pub up: bool,
    pub loopback: bool,
    pub addresses: Vec<(IpAddr, u8)>,
}

/// The machine as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    pub hostname: String,
    pub boot_id: String,
    pub boot_time: Timestamp,
    /// By the machine's own clock.
    pub now: Timestamp,
    pub memory: MiB,
    pub cpus: u32,
    pub system_uuid: [u8; 16],
    pub zone: Zone,
    pub ntp: Ntp,
    pub powered_on: bool,
    /// What has the machine run the `xendomains` service.
    #[serde(default)]
    pub xendomains: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PowerChange {
    Reboot,
    Off,
}

#[derive(Debug)]
pub(super) struct Host {
    seed: u64,
    boots: u64,
    boot_time: Timestamp,
    clock_offset_ms: i64,
    pub(super) zone: Zone,
    pub(super) ntp: Ntp,
    pub(super) powered_on: bool,
    pub(super) xendomains: bool,
    pub(super) pending: Option<(Timestamp, PowerChange)>,
    log: VecDeque<(Timestamp, &'static str)>,
}

impl Host {
    pub(super) fn new(seed: u64, now: Timestamp) -> Self {
        let mut host = Self {
            seed,
            boots: 0,
            boot_time: now,
            clock_offset_ms: 0,
            zone: Zone { name: "UTC".to_owned(), rtc_utc: true },
            ntp: Ntp { servers: Vec::new(), local_time_source: false, running: false },
            powered_on: true,
            xendomains: false,
            pending: None,
            log: VecDeque::new(),
        };
        host.boot(now);
        host
    }

    fn boot(&mut self, now: Timestamp) {
        self.boots += 1;
        self.boot_time = now;
        self.powered_on = true;
        self.log.clear();
        self.log(now, "simulated machine booted");
    }

    pub(super) fn request_power(&mut self, now: Timestamp, change: PowerChange) {
        // A power-off beats a reboot already asked for; the earlier moment holds.
        let at = self.pending.map_or(Timestamp(now.0 + POWER_DELAY_MS), |(at, _)| at);
        let change = match self.pending {
            Some((_, PowerChange::Off)) => PowerChange::Off,
            _ => change,
        };
        self.pending = Some((at, change));
        self.log(now, if change == PowerChange::Off { "power-off asked for" } else { "reboot asked for" });
    }

    /// Does what was asked for, if its moment has come.
    pub(super) fn advance(&mut self, now: Timestamp) -> Option<PowerChange> {
        let (at, change) = self.pending.filter(|(at, _)| *at <= now)?;
        self.pending = None;
        match change {
            PowerChange::Reboot => self.boot(at),
            PowerChange::Off => self.powered_on = false,
        }
        Some(change)
    }

    pub(super) fn set_clock(&mut self, now: Timestamp, time: Timestamp) {
        let signed = |t: Timestamp| i64::try_from(t.0).unwrap_or(i64::MAX);
        self.clock_offset_ms = signed(time).saturating_sub(signed(now));
    }

    fn by_own_clock(&self, time: Timestamp) -> Timestamp {
        Timestamp(time.0.saturating_add_signed(self.clock_offset_ms))
    }

    pub(super) fn view(&self, now: Timestamp, memory: MiB, cpus: u32) -> HostView {
        HostView {
            hostname: "simulated-host".to_owned(),
            boot_id: uuid::Uuid::from_u128(mix(self.seed, self.boots)).hyphenated().to_string(),
            boot_time: self.by_own_clock(self.boot_time),
            now: self.by_own_clock(now),
            memory,
            cpus,
            system_uuid: mix(self.seed, 0).to_be_bytes(),
            zone: self.zone.clone(),
            ntp: self.ntp.clone(),
            powered_on: self.powered_on,
            xendomains: self.xendomains.then(|| "/etc/rc3.d/S20xendomains".to_owned()),
        }
    }

    /// `words` are ours, never a caller's.
    pub(super) fn log(&mut self, now: Timestamp, words: &'static str) {
        if self.log.len() == MAX_LOG_LINES {
            self.log.pop_front();
        }
        self.log.push_back((self.by_own_clock(now), words));
    }

    /// The last whole lines that fit into `max_bytes`.
    pub(super) fn log_tail(&self, max_bytes: u64) -> String {
        let mut room = max_bytes;
        let mut lines = Vec::new();
        for (at, words) in self.log.iter().rev() {
            let line = format!("{at} {words}\n");
            let Some(left) = room.checked_sub(line.len() as u64) else { break };
            room = left;
            lines.push(line);
        }
        lines.into_iter().rev().collect()
    }
}

/// 128 bits that look random and are the same for the same numbers (splitmix64), shaped as a version 4 UUID.
fn mix(seed: u64, n: u64) -> u128 {
    let word = |salt: u64| {
        let mut z = seed ^ n.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(salt);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let bits = (u128::from(word(0x1234_5678)) << 64) | u128::from(word(0x9ABC_DEF0));
    uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid().as_u128()
}
