//! All VMs in memory: records as committed, domains as last seen.
//!
//! Every change of an entry raises a generation that no other entry ever had, so that whoever keeps something
//! made of an entry (an encoded answer) knows by the number alone whether it still holds. The CPU time alone does
//! not raise it: it is another at each look.

use super::machine::{VmState, state_of};
use super::record::VmRecord;
use crate::model::{IfName, RepoId, VmId};
use crate::xen::{DomId, DomainInfo, RunState};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};

/// More domains do not go while all are being listed.
const GONE_KEPT: usize = 1024;

/// A VM with its domain, if it has one.
#[derive(Debug, Clone)]
pub struct Vm {
    pub record: Arc<VmRecord>,
    pub domain: Option<Arc<DomainInfo>>,
    pub generation: u64,
}

impl Vm {
    pub fn state(&self) -> VmState {
        state_of(&self.record.intent, self.domain.as_deref())
    }
}

/// A domain as last seen, with its VM's record if we know the VM.
#[derive(Debug, Clone)]
pub struct ObservedDomain {
    pub info: Arc<DomainInfo>,
    pub record: Option<Arc<VmRecord>>,
    pub generation: u64,
}

#[derive(Debug, Default)]
pub struct Registry {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    generation: u64,
    records: HashMap<VmId, (Arc<VmRecord>, u64)>,
    domains: BTreeMap<DomId, (Arc<DomainInfo>, u64)>,
    by_vm: HashMap<VmId, DomId>,
    /// Domains that went lately, and when: the newest [`GONE_KEPT`].
    gone: VecDeque<(DomId, u64)>,
}

impl Inner {
    fn next(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// A domain has gone: its VM's entry changes with that.
    fn forget(&mut self, known: &DomainInfo) {
        let generation = self.next();
        if self.gone.len() == GONE_KEPT {
            self.gone.pop_front();
        }
        self.gone.push_back((known.domid, generation));
        let Some(vm) = known.vm else { return };
        if self.by_vm.get(&vm) == Some(&known.domid) {
            self.by_vm.remove(&vm);
        }
        if let Some(entry) = self.records.get_mut(&vm) {
            entry.1 = generation;
        }
    }

    fn observe_one(&mut self, domid: DomId, info: Option<DomainInfo>) -> Option<Change> {
        let before = self.domains.remove(&domid);
        match info {
            Some(info) => {
                let generation = self.next();
                if let Some(vm) = info.vm {
                    self.by_vm.insert(vm, domid);
                }
                let info = Arc::new(info);
                self.domains.insert(domid, (Arc::clone(&info), generation));
                let before = before.map(|(known, _)| known);
                let changed = before.as_ref().is_none_or(|b| b.state != info.state);
                changed.then_some(Change { before, after: Some(info) })
            }
            None => {
                let (known, _) = before?;
                self.forget(&known);
                Some(Change { before: Some(known), after: None })
            }
        }
    }

    /// The domain of each VM. Of two, one that lives: as adoption chooses.
    fn shown(&self) -> HashMap<VmId, DomId> {
        let mut shown: HashMap<VmId, (bool, DomId)> = HashMap::new();
        for (domid, (info, _)) in &self.domains {
            if let Some(vm) = info.vm {
                let rank = (!is_alive(info), *domid);
                let best = shown.entry(vm).or_insert(rank);
                *best = rank.min(*best);
            }
        }
        shown.into_iter().map(|(vm, (_, domid))| (vm, domid)).collect()
    }

    fn vm(&self, id: VmId) -> Option<Vm> {
        let (record, record_generation) = self.records.get(&id)?;
        let domain = self.by_vm.get(&id).and_then(|domid| self.domains.get(domid));
        let generation = domain.map_or(*record_generation, |(_, g)| (*g).max(*record_generation));
        Some(Vm { record: Arc::clone(record), domain: domain.map(|(d, _)| Arc::clone(d)), generation })
    }
}

impl Registry {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A record as just committed.
    pub fn put(&self, record: VmRecord) {
        let mut inner = self.write();
        let generation = inner.next();
        inner.records.insert(record.id(), (Arc::new(record), generation));
    }

    pub fn remove(&self, id: VmId) {
        self.write().records.remove(&id);
    }

    pub fn get(&self, id: VmId) -> Option<Vm> {
        self.read().vm(id)
    }

    /// All VMs, by name.
    pub fn all(&self) -> Vec<Vm> {
        let inner = self.read();
        let mut vms: Vec<Vm> = inner.records.keys().filter_map(|id| inner.vm(*id)).collect();
        vms.sort_by(|a, b| {
            a.record.config.name.cmp(&b.record.config.name).then_with(|| a.record.id().cmp(&b.record.id()))
        });
        vms
    }

    /// The VM of this name.
    pub fn named(&self, name: &str) -> Option<VmId> {
        let inner = self.read();
        let mut records = inner.records.values();
        records.find(|(record, _)| record.config.name.as_str() == name).map(|(record, _)| record.id())
    }

    /// VMs that have more than one domain, with those. Domains that are being taken apart do not count.
    pub fn doubles(&self) -> HashMap<VmId, Vec<DomId>> {
        let inner = self.read();
        let mut domains: HashMap<VmId, Vec<DomId>> = HashMap::new();
        for (info, _) in inner.domains.values().filter(|(info, _)| info.state != RunState::Dying) {
            if let Some(vm) = info.vm.filter(|vm| inner.records.contains_key(vm)) {
                domains.entry(vm).or_default().push(info.domid);
            }
        }
        domains.retain(|_, domids| domids.len() > 1);
        domains
    }

    /// How many VMs are in each state.
    pub fn states(&self) -> Vec<(VmState, u64)> {
        let inner = self.read();
        let mut counts: Vec<(VmState, u64)> = VmState::ALL.into_iter().map(|state| (state, 0)).collect();
        for (id, (record, _)) in &inner.records {
            let domain = inner.by_vm.get(id).and_then(|domid| inner.domains.get(domid));
            let state = state_of(&record.intent, domain.map(|(info, _)| &**info));
            if let Some((_, count)) = counts.iter_mut().find(|(one, _)| *one == state) {
                *count += 1;
            }
        }
        counts
    }

    pub fn len(&self) -> usize {
        self.read().records.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Another VM than `id` with this name, or one that has one of these MACs.
    pub fn clash(&self, record: &VmRecord) -> Option<String> {
        let inner = self.read();
        for (other, _) in inner.records.values().filter(|(r, _)| r.id() != record.id()) {
            if other.config.name == record.config.name {
                return Some(format!("the name {} is VM {}'s", other.config.name, other.id()));
            }
            let taken = |mac| other.config.vifs.iter().any(|v| v.mac == mac);
            if let Some(vif) = record.config.vifs.iter().find(|v| taken(v.mac)) {
                return Some(format!("the MAC address {} is VM {}'s", vif.mac, other.id()));
            }
        }
        None
    }

    /// For [`Registry::observe`]: taken before the domains are listed.
    pub fn stamp(&self) -> u64 {
        self.read().generation
    }

    /// Takes over what the toolstack told of all domains, asked after `stamp`: what was seen of a domain since then
    /// may be newer, and stays. Answers what came, changed its state, or went.
    pub fn observe(&self, stamp: u64, domains: Vec<DomainInfo>) -> Vec<Change> {
        let mut inner = self.write();
        let mut changes = Vec::new();
        let (newer, mut old): (BTreeMap<_, _>, BTreeMap<_, _>) = std::mem::take(&mut inner.domains)
            .into_iter()
            .partition(|(_, (_, generation))| *generation > stamp);
        let gone: HashSet<DomId> = inner
            .gone
            .iter()
            .filter(|(_, generation)| *generation > stamp)
            .map(|(domid, _)| *domid)
            .collect();
        let overtaken = |domid| gone.contains(&domid) || newer.contains_key(&domid);
        for info in domains.into_iter().filter(|info| !overtaken(info.domid)) {
            let domid = info.domid;
            let entry = match old.remove(&domid) {
                Some((known, generation)) if *known == info => (known, generation),
                Some((known, generation)) if is_same_but_for_cpu_time(&known, &info) => {
                    (Arc::new(info), generation)
                }
                before => {
                    let info = Arc::new(info);
                    let was = before.map(|(known, _)| known);
                    if was.as_ref().is_none_or(|w| w.state != info.state) {
                        changes.push(Change { before: was, after: Some(Arc::clone(&info)) });
                    }
                    (info, inner.next())
                }
            };
            inner.domains.insert(domid, entry);
        }
        inner.domains.extend(newer);
        for (known, _) in old.into_values() {
            inner.forget(&known);
            changes.push(Change { before: Some(known), after: None });
        }
        inner.by_vm = inner.shown();
        changes
    }

    /// For [`Registry::observe_since`]: which look at this domain is the last.
    pub fn last_look(&self, domid: DomId) -> u64 {
        self.read().domains.get(&domid).map_or(0, |(_, generation)| *generation)
    }

    /// As `observe_one`, unless somebody else has taken over a look since `last`, which may be newer than ours.
    pub fn observe_since(&self, last: u64, domid: DomId, info: Option<DomainInfo>) -> Option<Change> {
        let mut inner = self.write();
        let now = inner.domains.get(&domid).map_or(0, |(_, generation)| *generation);
        if now == last { inner.observe_one(domid, info) } else { None }
    }

    /// Takes over what the toolstack told of one domain (`None`: it is gone).
    pub fn observe_one(&self, domid: DomId, info: Option<DomainInfo>) -> Option<Change> {
        self.write().observe_one(domid, info)
    }

    /// All domains as last seen, dom0 first.
    pub fn domains(&self) -> Vec<ObservedDomain> {
        let inner = self.read();
        inner
            .domains
            .values()
            .map(|(info, generation)| {
                let record = info.vm.and_then(|vm| inner.records.get(&vm));
                ObservedDomain {
                    info: Arc::clone(info),
                    record: record.map(|(r, _)| Arc::clone(r)),
                    generation: record.map_or(*generation, |(_, g)| (*g).max(*generation)),
                }
            })
            .collect()
    }

    /// The names that were chosen for vifs, with their VMs.
    pub fn chosen_vifs(&self) -> Vec<(IfName, VmId)> {
        let inner = self.read();
        let of_vm = |(record, _): &(Arc<VmRecord>, u64)| {
            let names = record.config.vifs.iter().filter_map(|vif| vif.ifname.clone());
            let vm = record.id();
            names.map(|name| (name, vm)).collect::<Vec<_>>()
        };
        inner.records.values().flat_map(of_vm).collect()
    }

    /// Repositories that VMs name.
    pub fn repositories(&self) -> Vec<RepoId> {
        let mut repos: Vec<RepoId> = self.read().records.values().map(|(r, _)| r.repo.clone()).collect();
        repos.sort();
        repos.dedup();
        repos
    }
}

fn is_alive(info: &DomainInfo) -> bool {
    !matches!(info.state, RunState::Shutdown(_) | RunState::Dying)
}

fn is_same_but_for_cpu_time(a: &DomainInfo, b: &DomainInfo) -> bool {
    *a == DomainInfo { cpu_time_ns: a.cpu_time_ns, ..b.clone() }
}

/// One difference between two looks at the world.
#[derive(Debug, Clone)]
pub struct Change {
    pub before: Option<Arc<DomainInfo>>,
    pub after: Option<Arc<DomainInfo>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{KiB, Timestamp};

    fn info() -> DomainInfo {
        DomainInfo {
            domid: DomId(3),
            vm: None,
            name: "x".to_owned(),
            state: RunState::Running,
            memory: KiB(1024),
            max_memory: KiB(1024),
            vcpus: 1,
            online_vcpus: 1,
            cpu_time_ns: 1,
            started: Timestamp(0),
            vnc_port: None,
        }
    }

    #[test]
    fn of_two_domains_of_one_vm_the_one_that_lives_is_shown() {
        use crate::xen::ShutdownReason::Suspend;
        let vm = VmId::random();
        let domain = |domid, state| DomainInfo { domid: DomId(domid), vm: Some(vm), state, ..info() };
        for (first, second, shown) in [
            (RunState::Running, RunState::Shutdown(Suspend), 3),
            (RunState::Shutdown(Suspend), RunState::Paused, 4),
            (RunState::Running, RunState::Running, 3),
        ] {
            let registry = Registry::default();
            registry.observe(registry.stamp(), vec![domain(3, first), domain(4, second)]);
            assert_eq!(registry.read().by_vm[&vm], DomId(shown), "{first:?} {second:?}");
            assert!(registry.doubles().is_empty(), "no record has this UUID");
        }
    }

    #[test]
    fn a_list_that_a_newer_look_has_overtaken_takes_nothing_back() {
        let domain = |domid, state| DomainInfo { domid: DomId(domid), state, ..info() };
        let registry = Registry::default();
        let (ends, stays) = (domain(3, RunState::Running), domain(4, RunState::Running));
        registry.observe(registry.stamp(), vec![ends.clone(), stays.clone()]);
        let stamp = registry.stamp();
        let listed = vec![ends, stays];
        registry.observe_one(DomId(3), None);
        registry.observe_one(DomId(4), Some(domain(4, RunState::Paused)));
        registry.observe_one(DomId(5), Some(domain(5, RunState::Running)));
        assert!(registry.observe(stamp, listed.clone()).is_empty());
        let seen = |registry: &Registry| -> Vec<_> {
            registry.domains().iter().map(|d| (d.info.domid.0, d.info.state)).collect()
        };
        assert_eq!(seen(&registry), [(4, RunState::Paused), (5, RunState::Running)]);
        assert_eq!(registry.observe(registry.stamp(), listed).len(), 3, "a list made since is believed");
        assert_eq!(seen(&registry), [(3, RunState::Running), (4, RunState::Running)]);
    }

    #[test]
    fn cpu_time_alone_is_taken_over_without_a_new_generation() {
        let info = info();
        let registry = Registry::default();
        registry.observe(registry.stamp(), vec![info.clone()]);
        let first = registry.domains().remove(0);
        assert!(
            registry
                .observe(registry.stamp(), vec![DomainInfo { cpu_time_ns: 2, ..info.clone() }])
                .is_empty()
        );
        let second = registry.domains().remove(0);
        assert_eq!((second.generation, second.info.cpu_time_ns), (first.generation, 2));
        registry.observe(registry.stamp(), vec![DomainInfo { memory: KiB(2048), cpu_time_ns: 3, ..info }]);
        assert_ne!(registry.domains().remove(0).generation, first.generation);
    }
}
