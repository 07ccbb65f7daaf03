//! What the world counted, for tests and auditors: it holds what *was*, whatever the daemon believes.

use crate::model::{Timestamp, VmId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Effects kept; older ones are dropped and counted.
const MAX_EFFECTS: usize = 10_000;
/// VMs counted one by one; further ones only raise `uncounted_vms`.
const MAX_VMS: usize = 65_536;

/// One thing that happened in the world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effect {
    pub at: Timestamp,
    pub vm: Option<VmId>,
    pub domid: Option<u32>,
    /// `create`, `destroy`, `end crash`, `save`, …: never what a caller wrote.
    pub what: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// How often a domain of the VM began (created, restored, or received).
    pub begun: BTreeMap<VmId, u64>,
    /// The most domains of the VM that ran (were neither paused, suspended nor ended) at one moment. More
    /// than 1 breaks invariant I1.
    pub most_running: BTreeMap<VmId, u32>,
    /// How often a second domain of a living VM was asked for, and refused.
    pub refused_doubles: u64,
    pub host_reboots: u64,
    pub effects: VecDeque<Effect>,
    pub dropped_effects: u64,
    pub uncounted_vms: u64,
}

impl Audit {
    pub fn begun(&self, vm: VmId) -> u64 {
        self.begun.get(&vm).copied().unwrap_or(0)
    }

    /// VMs that ran twice at once.
    pub fn doubled(&self) -> Vec<VmId> {
        self.most_running.iter().filter(|(_, most)| **most > 1).map(|(vm, _)| *vm).collect()
    }

    /// How often `what` happened to the VM, among the effects kept.
    pub fn count(&self, vm: VmId, what: &str) -> usize {
        self.effects.iter().filter(|e| e.vm == Some(vm) && e.what == what).count()
    }

    pub(super) fn note(&mut self, effect: Effect) {
        if self.effects.len() == MAX_EFFECTS {
            self.effects.pop_front();
            self.dropped_effects += 1;
        }
        self.effects.push_back(effect);
    }

    pub(super) fn note_begun(&mut self, vm: VmId) {
        if self.begun.len() >= MAX_VMS && !self.begun.contains_key(&vm) {
            self.uncounted_vms += 1;
            return;
        }
        *self.begun.entry(vm).or_default() += 1;
    }

    pub(super) fn note_running(&mut self, vm: VmId, now_running: u32) {
        if self.most_running.len() >= MAX_VMS && !self.most_running.contains_key(&vm) {
            return;
        }
        let most = self.most_running.entry(vm).or_default();
        *most = (*most).max(now_running);
    }
}
