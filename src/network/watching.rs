//! What happened between two readings of the kernel: for events, so that nothing is told twice and a link that comes and
//! goes does not drown what else happens.

use crate::model::network::{Address, LinkView, NetworkView};
use crate::model::{IfName, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// More changes of carrier than this within [`WINDOW_MS`] are flapping.
const FLAPS: usize = 4;
const WINDOW_MS: u64 = 10_000;
/// A link that has been quiet for so long does not flap any more.
const QUIET_MS: u64 = 30_000;
const MAX_LINKS: usize = 5000;
/// More observations at once than this are told as one.
const MAX_TOLD: usize = 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "observation", rename_all = "snake_case")]
pub enum Observation {
    LinkAdded {
        link: IfName,
        kind: String,
    },
    LinkRemoved {
        link: IfName,
        kind: String,
    },
    /// What of it is not as it was: `MTU`, `state`, `controller`, …
    LinkChanged {
        link: IfName,
        what: Vec<String>,
    },
    CarrierLost {
        link: IfName,
    },
    CarrierBack {
        link: IfName,
    },
    /// Its carrier comes and goes; no more is told of it until it is quiet.
    Flapping {
        link: IfName,
    },
    /// It has been quiet for a while, with carrier or without.
    Settled {
        link: IfName,
        carrier: bool,
    },
    AddressAdded {
        link: IfName,
        address: Address,
    },
    AddressRemoved {
        link: IfName,
        address: Address,
    },
    RoutesChanged {
        added: usize,
        removed: usize,
    },
    /// Too many at once to tell each.
    Many {
        count: usize,
        links: usize,
    },
}

impl Observation {
    pub fn link(&self) -> Option<&IfName> {
        match self {
            Self::LinkAdded { link, .. }
            | Self::LinkRemoved { link, .. }
            | Self::LinkChanged { link, .. }
            | Self::CarrierLost { link }
            | Self::CarrierBack { link }
            | Self::Flapping { link }
            | Self::Settled { link, .. }
            | Self::AddressAdded { link, .. }
            | Self::AddressRemoved { link, .. } => Some(link),
            Self::RoutesChanged { .. } | Self::Many { .. } => None,
        }
    }
}

/// The memory of changes of carrier.
#[derive(Debug, Default)]
pub struct Watching {
    carriers: BTreeMap<IfName, Carrier>,
}

#[derive(Debug, Default)]
struct Carrier {
    /// At most [`FLAPS`] + 1, the last last.
    changes: VecDeque<Timestamp>,
    flaps: bool,
}

impl Watching {
    pub fn new() -> Self {
        Self::default()
    }

    /// How many links are remembered.
    pub fn remembered(&self) -> usize {
        self.carriers.len()
    }

    /// Whether its carrier comes and goes, as far as this memory goes back.
    pub fn flaps(&self, link: &IfName) -> bool {
        self.carriers.get(link).is_some_and(|carrier| carrier.flaps)
    }

    /// What is to be told of the step from `old` to `new`. To be called from time to time also if nothing changes: it tells
    /// that a link flaps no more.
    pub fn observe(&mut self, old: &NetworkView, new: &NetworkView, at: Timestamp) -> Vec<Observation> {
        let mut told = self.settled(new, at);
        for (name, was) in &old.links {
            if !new.links.contains_key(name) {
                self.carriers.remove(name);
                told.push(Observation::LinkRemoved { link: name.clone(), kind: was.kind.to_string() });
            }
        }
        for (name, is) in &new.links {
            let Some(was) = old.links.get(name) else {
                told.push(Observation::LinkAdded { link: name.clone(), kind: is.kind.to_string() });
                continue;
            };
            if was == is {
                continue;
            }
            if was.carrier != is.carrier {
                told.extend(self.carrier(name, is.carrier, at));
            }
            let what = changed(was, is);
            if !what.is_empty() {
                told.push(Observation::LinkChanged { link: name.clone(), what });
            }
            let (gone, come) =
                (was.addresses.difference(&is.addresses), is.addresses.difference(&was.addresses));
            told.extend(gone.map(|one| Observation::AddressRemoved { link: name.clone(), address: *one }));
            told.extend(come.map(|one| Observation::AddressAdded { link: name.clone(), address: *one }));
        }
        let added = new.routes.difference(&old.routes).count();
        let removed = old.routes.difference(&new.routes).count();
        if added + removed > 0 {
            told.push(Observation::RoutesChanged { added, removed });
        }
        summed_up(told)
    }

    fn carrier(&mut self, name: &IfName, is_there: bool, at: Timestamp) -> Option<Observation> {
        let link = name.clone();
        let plain =
            if is_there { Observation::CarrierBack { link } } else { Observation::CarrierLost { link } };
        if self.carriers.len() >= MAX_LINKS && !self.carriers.contains_key(name) {
            return Some(plain);
        }
        let carrier = self.carriers.entry(name.clone()).or_default();
        carrier.changes.push_back(at);
        if carrier.changes.len() > FLAPS + 1 {
            carrier.changes.pop_front();
        }
        if carrier.flaps {
            return None;
        }
        let first = carrier.changes.front().copied().unwrap_or(at);
        if carrier.changes.len() > FLAPS && at.0.saturating_sub(first.0) <= WINDOW_MS {
            carrier.flaps = true;
            return Some(Observation::Flapping { link: name.clone() });
        }
        Some(plain)
    }

    /// Forgets links that are quiet; those that flapped are told.
    fn settled(&mut self, new: &NetworkView, at: Timestamp) -> Vec<Observation> {
        let mut told = Vec::new();
        self.carriers.retain(|name, carrier| {
            let last = carrier.changes.back().copied().unwrap_or_default();
            // A clock that was set back ends it too, or it might never end.
            let is_quiet = last.0 > at.0 || at.0 - last.0 >= QUIET_MS;
            if is_quiet
                && carrier.flaps
                && let Some(link) = new.links.get(name)
            {
                told.push(Observation::Settled { link: name.clone(), carrier: link.carrier });
            }
            !is_quiet
        });
        told
    }
}

fn changed(was: &LinkView, is: &LinkView) -> Vec<String> {
    let all = [
        ("options", was.kind != is.kind),
        ("MAC", was.mac != is.mac),
        ("MTU", was.mtu != is.mtu),
        ("state", was.up != is.up),
        ("controller", was.controller != is.controller),
        ("VLANs", was.vlans != is.vlans),
        ("DHCP", was.dhcp != is.dhcp),
    ];
    all.into_iter().filter(|(_, differs)| *differs).map(|(what, _)| what.to_owned()).collect()
}

fn summed_up(told: Vec<Observation>) -> Vec<Observation> {
    if told.len() <= MAX_TOLD {
        return told;
    }
    let links: std::collections::BTreeSet<&IfName> = told.iter().filter_map(Observation::link).collect();
    vec![Observation::Many { count: told.len(), links: links.len() }]
}
