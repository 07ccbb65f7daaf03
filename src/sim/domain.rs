//! One domain of the world and its guest.
//!
//! ```text
//!   Alive ⇄ Paused        a paused guest's time stands still: what it was about to do waits with it
//!     │ ╲      │
//!     │  Exporting        suspended while its image travels; goes back to what it was, or is destroyed
//!     ▼                   (Arriving: a copy that stands still until its sender has destroyed the original)
//!   Ended(reason)         holds its memory and name until it is destroyed
//! ```

use super::{Behaviour, Device, DomainView, Image, Reason, Result, Spec, State, WorldError};
use crate::model::{KiB, Timestamp};
use std::collections::BTreeMap;

/// Keys that a guest's store keeps; a further one is refused.
const MAX_GUEST_KEYS: usize = 64;
/// What a value of XenStore has at most.
const MAX_VALUE_BYTES: usize = 4096;
/// Devices of one kind that a domain takes.
const MAX_DEVICES: usize = 128;
/// A simulated guest is idle: it uses this part of one CPU.
const CPU_NS_PER_MS: u64 = 20_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    Alive,
    Paused,
    Exporting { was_paused: bool, handed_over: bool },
    Arriving,
    Ended(Reason),
}

#[derive(Debug)]
pub(super) struct Domain {
    pub(super) domid: u32,
    pub(super) spec: Spec,
    pub(super) condition: Condition,
    pub(super) online_vcpus: u32,
    pub(super) vnc_port: Option<u16>,
    pub(super) guest_store: BTreeMap<String, String>,
    /// What the guest itself wrote into XenStore, by its path below the domain's.
    written: BTreeMap<String, Vec<u8>>,
    started: Timestamp,
    boot_done_at: Timestamp,
    /// When the guest will end, and how, if nothing comes between.
    due: Option<(Timestamp, Reason)>,
    cpu_time_ns: u64,
    /// Of that, what it used elsewhere, before it came.
    brought_ns: u64,
    /// Since when it runs or stands still: CPU time and waiting are counted from here.
    since: Timestamp,
}

impl Domain {
    pub(super) fn begin(domid: u32, spec: Spec, guest: &Behaviour, now: Timestamp) -> Self {
        let later = |ms: u64| Timestamp(now.0.saturating_add(ms));
        Self {
            domid,
            online_vcpus: spec.vcpus,
            spec,
            condition: Condition::Alive,
            vnc_port: None,
            guest_store: BTreeMap::new(),
            written: BTreeMap::new(),
            started: now,
            boot_done_at: later(guest.boot_ms),
            due: guest.ends_by_itself.map(|end| (later(end.after_ms), end.reason)),
            cpu_time_ns: 0,
            brought_ns: 0,
            since: now,
        }
    }

    /// A domain that goes on from an image: booted already.
    pub(super) fn resume(domid: u32, image: Image, guest: &Behaviour, now: Timestamp) -> Self {
        let mut domain = Self::begin(domid, image.spec, guest, now);
        domain.boot_done_at = now;
        domain.cpu_time_ns = image.cpu_time_ns;
        domain.brought_ns = image.cpu_time_ns;
        domain.online_vcpus = image.online_vcpus.clamp(1, domain.spec.max_vcpus.max(1));
        domain
    }

    pub(super) fn is_executing(&self) -> bool {
        self.condition == Condition::Alive
    }

    pub(super) fn is_migrating(&self) -> bool {
        matches!(self.condition, Condition::Exporting { .. } | Condition::Arriving)
    }

    /// The moment its guest ends by itself, unless its time stands still.
    pub(super) fn next_event_at(&self) -> Option<Timestamp> {
        self.due.filter(|_| self.is_executing()).map(|(at, _)| at)
    }

    fn cpu_time_ns(&self, now: Timestamp) -> u64 {
        let ran_ms = if self.is_executing() { now.0.saturating_sub(self.since.0) } else { 0 };
        self.cpu_time_ns.saturating_add(ran_ms.saturating_mul(CPU_NS_PER_MS))
    }

    /// CPU time that it has used on this machine.
    pub(super) fn used_here_ns(&self, now: Timestamp) -> u64 {
        self.cpu_time_ns(now).saturating_sub(self.brought_ns)
    }

    /// For how long it has run; time in which it stood still does not count.
    pub(super) fn ran_ms(&self, now: Timestamp) -> u64 {
        self.cpu_time_ns(now) / CPU_NS_PER_MS
    }

    /// Changes the condition; time that stood still is added to what was to come.
    pub(super) fn become_(&mut self, condition: Condition, now: Timestamp) {
        self.cpu_time_ns = self.cpu_time_ns(now);
        let stood_still = !matches!(self.condition, Condition::Alive | Condition::Ended(_));
        if stood_still {
            let still_ms = now.0.saturating_sub(self.since.0);
            self.boot_done_at.0 = self.boot_done_at.0.saturating_add(still_ms);
            if let Some((at, _)) = &mut self.due {
                at.0 = at.0.saturating_add(still_ms);
            }
        }
        self.since = now;
        self.condition = condition;
    }

    /// Ends the guest if its moment has come.
    pub(super) fn advance(&mut self, now: Timestamp) -> Option<Reason> {
        let (at, reason) = self.due.filter(|(at, _)| self.is_executing() && *at <= now)?;
        self.end(reason, at);
        Some(reason)
    }

    pub(super) fn end(&mut self, reason: Reason, now: Timestamp) {
        self.due = None;
        self.become_(Condition::Ended(reason), now);
    }

    /// The guest is asked to end; it does so after booting, in its own time, unless it was about to anyway.
    pub(super) fn ask_to_end(&mut self, reason: Reason, guest: &Behaviour, now: Timestamp) {
        if guest.ignores_shutdown {
            return;
        }
        let from = now.max(self.boot_done_at);
        let at = Timestamp(from.0.saturating_add(guest.shutdown_ms));
        if self.due.is_none_or(|(due, _)| due > at) {
            self.due = Some((at, reason));
        }
    }

    /// Refuses what needs a guest that has not ended and is not on its way.
    pub(super) fn must_live(&self) -> Result<()> {
        match self.condition {
            Condition::Alive | Condition::Paused => Ok(()),
            Condition::Exporting { .. } => {
                Err(WorldError::BadState("the domain is being sent away".to_owned()))
            }
            Condition::Arriving => Err(WorldError::BadState("the domain is still arriving".to_owned())),
            Condition::Ended(_) => Err(WorldError::BadState("the domain has ended".to_owned())),
        }
    }

    pub(super) fn image(&self, now: Timestamp) -> Image {
        Image {
            format: Image::FORMAT.to_owned(),
            spec: self.spec.clone(),
            online_vcpus: self.online_vcpus,
            cpu_time_ns: self.cpu_time_ns(now),
        }
    }

    pub(super) fn view(&self, now: Timestamp) -> DomainView {
        let state = match self.condition {
            Condition::Alive if now < self.boot_done_at => State::Running,
            Condition::Alive => State::Blocked,
            Condition::Paused | Condition::Arriving => State::Paused,
            Condition::Exporting { .. } => State::Ended(Reason::Suspend),
            Condition::Ended(reason) => State::Ended(reason),
        };
        DomainView {
            domid: self.domid,
            vm: Some(self.spec.vm),
            name: self.spec.name.as_str().to_owned(),
            state,
            memory: KiB::from(self.spec.memory),
            max_memory: KiB::from(self.spec.max_memory),
            vcpus: self.spec.max_vcpus,
            online_vcpus: self.online_vcpus,
            cpu_time_ns: self.cpu_time_ns(now),
            started: self.started,
            vnc_port: self.vnc_port,
        }
    }

    /// The guest writes into its own part of XenStore.
    pub(super) fn write(&mut self, key: String, value: Vec<u8>) -> Result<()> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(WorldError::Failed(format!("a value has at most {MAX_VALUE_BYTES} bytes")));
        }
        if self.written.len() >= MAX_GUEST_KEYS && !self.written.contains_key(&key) {
            return Err(WorldError::Failed(format!("the guest has written {MAX_GUEST_KEYS} keys already")));
        }
        self.written.insert(key, value);
        Ok(())
    }

    /// What lies there by the guest's hand. One that is up tells its memory, as guest tools do, until it writes
    /// something else.
    pub(super) fn written(&self, key: &str, now: Timestamp) -> Option<Vec<u8>> {
        if let Some(value) = self.written.get(key) {
            return Some(value.clone());
        }
        let memory = KiB::from(self.spec.memory).0;
        // Its kernel keeps some to itself.
        let total = memory - memory / 64;
        let told = match key {
            "data/meminfo_total" => total,
            "data/meminfo_free" => total / 2,
            _ => return None,
        };
        (now >= self.boot_done_at).then(|| told.to_string().into_bytes())
    }

    pub(super) fn send(&mut self, key: String, value: String) -> Result<()> {
        if self.guest_store.len() >= MAX_GUEST_KEYS && !self.guest_store.contains_key(&key) {
            return Err(WorldError::Failed(format!("the guest's store holds {MAX_GUEST_KEYS} keys already")));
        }
        self.guest_store.insert(key, value);
        Ok(())
    }
}

pub(super) fn attach(devices: &mut Vec<Device>, device: Device) -> Result<()> {
    if devices.iter().any(|d| d.key == device.key) {
        return Err(WorldError::BadState(format!("{} is plugged already", device.key)));
    }
    if devices.len() >= MAX_DEVICES {
        return Err(WorldError::BadState(format!("the domain has {MAX_DEVICES} such devices already")));
    }
    devices.push(device);
    Ok(())
}

pub(super) fn detach(devices: &mut Vec<Device>, key: &str) -> Result<()> {
    let position = devices.iter().position(|d| d.key == key);
    let Some(position) = position else {
        return Err(WorldError::BadState(format!("{key} is not plugged")));
    };
    devices.remove(position);
    Ok(())
}
