//! A sweep made of what the sources told, and of nothing else: no clock, no world, the same each time.
//!
//! Whose a link is: the host's kernel sees a vif from the other end, so that what it *received* the guest has *sent*. A
//! vif is known by the toolstack's name for it, `vif<domid>.<n>` (`-emu` behind it where QEMU emulates the card), or by
//! the name that was chosen for it; as an instance it is called by its number, which outlives the domain, or by that name.

use super::metric::{METRICS, MetricId};
use super::sweep::{Figure, Object, ObjectFigures, Sweep};
use crate::kernel::LinkTraffic;
use crate::machine::{DiskTraffic, HostFigures};
use crate::model::{KiB, Timestamp, VmId};
use crate::xen::{DomId, DomainInfo, GuestFigures, RunState, Usage};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Links of the host that are told.
const MAX_HOST_LINKS: usize = 2048;
/// What an instance is called at most.
const MAX_INSTANCE_BYTES: usize = 64;

/// What the room above knows of VMs.
pub trait Roster: Send + Sync + 'static {
    fn host_name(&self) -> Arc<str>;
    /// Whether a domain of this UUID is a VM of ours.
    fn is_ours(&self, vm: VmId) -> bool;
    /// The names that were chosen for vifs, with their VMs.
    fn chosen_vifs(&self) -> HashMap<Arc<str>, VmId>;
}

/// What the sources told at one moment. What is `None` could not be read; `problems` says why.
#[derive(Debug, Clone, Default)]
pub struct Readings {
    pub domains: Option<Vec<DomainInfo>>,
    pub guests: Vec<GuestFigures>,
    pub usage: Option<Usage>,
    /// How long each physical CPU has worked, in seconds: [`super::meter::Meter`].
    pub busy: Vec<(u32, f64)>,
    pub links: Option<Vec<LinkTraffic>>,
    pub host: Option<HostFigures>,
    pub problems: Vec<(&'static str, String)>,
}

/// A metric by its name, found when we are compiled: a name that is none does not compile.
const fn id(name: &str) -> MetricId {
    let mut at = 0;
    while at < METRICS.len() {
        if is_same(METRICS[at].name.as_bytes(), name.as_bytes()) {
            assert!(at <= u8::MAX as usize, "more metrics than a byte counts");
            return MetricId(at as u8);
        }
        at += 1;
    }
    panic!("no such metric")
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}

/// The metrics of traffic, in the order of [`Passed`] and of [`DiskTraffic`].
const LINK: [MetricId; 6] = [
    const { id("link_rx_bytes") },
    const { id("link_tx_bytes") },
    const { id("link_rx_packets") },
    const { id("link_tx_packets") },
    const { id("link_errors") },
    const { id("link_drops") },
];
const VIF: [MetricId; 6] = [
    const { id("vif_rx_bytes") },
    const { id("vif_tx_bytes") },
    const { id("vif_rx_packets") },
    const { id("vif_tx_packets") },
    const { id("vif_errors") },
    const { id("vif_drops") },
];
const DISK: [MetricId; 4] = [
    const { id("disk_read_bytes") },
    const { id("disk_written_bytes") },
    const { id("disk_reads") },
    const { id("disk_writes") },
];
const VBD: [MetricId; 4] = [
    const { id("vbd_read_bytes") },
    const { id("vbd_written_bytes") },
    const { id("vbd_reads") },
    const { id("vbd_writes") },
];

/// The sweep of these readings. `instant` is when they were asked for, `at` the same by the wall clock.
pub fn assemble(
    readings: &Readings,
    roster: &dyn Roster,
    (at, instant, took): (Timestamp, Instant, Duration),
) -> Sweep {
    let mut problems = readings.problems.clone();
    let mut names = Names::default();
    let mut host = Of::new(Object::Host, roster.host_name(), None);
    let mut domains = Domains::of(readings, roster);
    domains.put_guests(readings);
    if let Some(links) = &readings.links {
        let left_out = put_links(links, roster, &mut host, &mut domains, &mut names);
        if left_out > 0 {
            problems.push(("links", format!("{left_out} links of the host are left out")));
        }
    }
    put_machine(readings, &mut host, &mut domains, &mut names);
    let mut objects: Vec<ObjectFigures> =
        std::iter::once(host).chain(domains.all).map(Of::in_order).collect();
    objects.sort_unstable_by_key(|one| one.object);
    Sweep { at, instant, took, objects, problems }
}

/// Instances by number: hundreds of guests have a vif 0 and a disk 51712.
#[derive(Default)]
struct Names(HashMap<u32, Arc<str>>);

impl Names {
    fn of(&mut self, number: u32) -> Arc<str> {
        Arc::clone(self.0.entry(number).or_insert_with(|| number.to_string().into()))
    }
}

/// The figures of one object, as they come.
struct Of(ObjectFigures);

impl Of {
    fn new(object: Object, name: Arc<str>, domid: Option<DomId>) -> Self {
        // Most are guests with a card and a disk.
        Self(ObjectFigures { object, name, domid, figures: Vec::with_capacity(20) })
    }

    fn put(&mut self, metric: MetricId, instance: Option<Arc<str>>, value: f64) {
        if value.is_finite() && instance.as_ref().is_none_or(|name| name.len() <= MAX_INSTANCE_BYTES) {
            self.0.figures.push(Figure { metric, instance, value });
        }
    }

    /// One without instances; one that is not known is not there.
    fn one(&mut self, metric: MetricId, value: Option<f64>) {
        if let Some(value) = value {
            self.put(metric, None, value);
        }
    }

    fn several<const N: usize>(&mut self, metrics: [MetricId; N], instance: &Arc<str>, values: [u64; N]) {
        for (metric, value) in metrics.into_iter().zip(values) {
            self.put(metric, Some(Arc::clone(instance)), value as f64);
        }
    }

    /// By metric, then by instance.
    fn in_order(self) -> ObjectFigures {
        let mut told = self.0;
        let key = |figure: &Figure| (figure.metric, figure.instance.clone());
        if !told.figures.is_sorted_by(|a, b| (a.metric, &a.instance) <= (b.metric, &b.instance)) {
            told.figures.sort_by_cached_key(key);
        }
        told
    }
}

fn bytes(memory: KiB) -> f64 {
    memory.0 as f64 * 1024.0
}

/// The domains, each as the object it is.
struct Domains {
    all: Vec<Of>,
    /// Their places in `all`.
    by_domid: HashMap<u32, usize>,
    by_vm: HashMap<VmId, usize>,
}

impl Domains {
    fn of(readings: &Readings, roster: &dyn Roster) -> Self {
        let told = readings.domains.as_deref().unwrap_or_default();
        let mut domains = Self {
            all: Vec::with_capacity(told.len()),
            by_domid: HashMap::with_capacity(told.len()),
            by_vm: HashMap::with_capacity(told.len()),
        };
        let shown = shown(told);
        let now = readings.usage.iter().flat_map(|usage| &usage.domains);
        let memory: HashMap<DomId, KiB> = now.copied().collect();
        for info in told {
            let vm = info.vm.filter(|vm| shown.get(vm) == Some(&info.domid) && roster.is_ours(*vm));
            let object = match (info.domid, vm) {
                (DomId(0), _) => Object::Dom0,
                (_, Some(vm)) => Object::Vm(vm),
                (domid, None) => Object::Domain(domid),
            };
            // Told twice: the first one stands.
            let Entry::Vacant(place) = domains.by_domid.entry(info.domid.0) else { continue };
            let place = *place.insert(domains.all.len());
            if let Some(vm) = vm {
                domains.by_vm.insert(vm, place);
            }
            let mut one = Of::new(object, info.name.as_str().into(), Some(info.domid));
            one.put(const { id("cpu_time") }, None, Duration::from_nanos(info.cpu_time_ns).as_secs_f64());
            one.put(const { id("vcpus") }, None, f64::from(info.online_vcpus));
            // What the toolstack lists is what it was set to.
            let memory = memory.get(&info.domid).copied().unwrap_or(info.memory);
            one.put(const { id("memory") }, None, bytes(memory));
            one.put(const { id("memory_max") }, None, bytes(info.max_memory));
            domains.all.push(one);
        }
        domains
    }

    fn with(&mut self, domid: u32) -> Option<&mut Of> {
        self.by_domid.get(&domid).and_then(|place| self.all.get_mut(*place))
    }

    fn put_guests(&mut self, readings: &Readings) {
        for told in &readings.guests {
            let Some(one) = self.with(told.domid.0) else { continue };
            one.one(const { id("memory_target") }, told.memory_target.map(bytes));
            one.one(const { id("guest_memory_total") }, told.guest_total.map(bytes));
            one.one(const { id("guest_memory_free") }, told.guest_free.map(bytes));
        }
    }
}

/// The domain of each VM. Of two, one that lives, as the registry of VMs has it.
fn shown(domains: &[DomainInfo]) -> HashMap<VmId, DomId> {
    let is_over = |info: &DomainInfo| matches!(info.state, RunState::Shutdown(_) | RunState::Dying);
    let mut best: HashMap<VmId, (bool, DomId)> = HashMap::with_capacity(domains.len());
    for info in domains.iter().filter(|info| info.domid != DomId(0)) {
        if let Some(vm) = info.vm {
            let rank = (is_over(info), info.domid);
            let best = best.entry(vm).or_insert(rank);
            *best = rank.min(*best);
        }
    }
    best.into_iter().map(|(vm, (_, domid))| (vm, domid)).collect()
}

/// Whose a link is.
enum Whose {
    /// The domain's at this place, and what the vif is called.
    Guest(usize, Arc<str>),
    /// Of a domain that is not listed: it has gone, or it came since.
    GuestNotThere,
    Host,
}

/// How many links of the host were left out.
fn put_links(
    links: &[LinkTraffic],
    roster: &dyn Roster,
    host: &mut Of,
    domains: &mut Domains,
    names: &mut Names,
) -> usize {
    let chosen = roster.chosen_vifs();
    let (mut told, mut left_out) = (0, 0);
    for link in links.iter().filter(|link| link.name != "lo") {
        let (received, sent) = (link.received.0, link.sent.0);
        let (received_packets, sent_packets) = (link.received_packets, link.sent_packets);
        let errors = link.receive_errors.saturating_add(link.send_errors);
        let drops = link.receive_drops.saturating_add(link.send_drops);
        match whose(&link.name, domains, &chosen, names) {
            Whose::Guest(place, instance) => {
                let seen_by_guest = [sent, received, sent_packets, received_packets, errors, drops];
                domains.all[place].several(VIF, &instance, seen_by_guest);
            }
            Whose::GuestNotThere => {}
            Whose::Host if told < MAX_HOST_LINKS => {
                told += 1;
                let values = [received, sent, received_packets, sent_packets, errors, drops];
                host.several(LINK, &link.name.as_str().into(), values);
            }
            Whose::Host => left_out += 1,
        }
    }
    left_out
}

fn whose(name: &str, domains: &Domains, chosen: &HashMap<Arc<str>, VmId>, names: &mut Names) -> Whose {
    let (plain, emulated) = match name.strip_suffix("-emu") {
        Some(plain) => (plain, true),
        None => (name, false),
    };
    if let Some(vm) = chosen.get(name).or_else(|| chosen.get(plain).filter(|_| emulated)) {
        return match domains.by_vm.get(vm) {
            Some(place) => Whose::Guest(*place, name.into()),
            None => Whose::GuestNotThere,
        };
    }
    let Some((domid, number)) = numbers(plain) else { return Whose::Host };
    match domains.by_domid.get(&domid) {
        Some(place) if emulated => Whose::Guest(*place, format!("{number}-emu").into()),
        Some(place) => Whose::Guest(*place, names.of(number)),
        None => Whose::GuestNotThere,
    }
}

/// `vif3.0`
fn numbers(name: &str) -> Option<(u32, u32)> {
    let (domid, number) = name.strip_prefix("vif")?.split_once('.')?;
    let plain = |text: &str| text.bytes().all(|c| c.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    Some((plain(domid)?, plain(number)?))
}

fn of_disk(traffic: &DiskTraffic) -> [u64; 4] {
    [traffic.read.0, traffic.written.0, traffic.reads, traffic.writes]
}

/// What Xen and dom0's kernel tell of the machine, and of the disks that it serves.
fn put_machine(readings: &Readings, host: &mut Of, domains: &mut Domains, names: &mut Names) {
    for (cpu, seconds) in &readings.busy {
        host.put(const { id("host_cpu_busy") }, Some(names.of(*cpu)), *seconds);
    }
    if let Some(usage) = &readings.usage {
        host.put(const { id("host_memory_total") }, None, bytes(usage.total_memory));
        host.put(const { id("host_memory_free") }, None, bytes(usage.free_memory));
    }
    if let Some(all) = &readings.domains {
        let guests = all.iter().filter(|info| info.domid != DomId(0)).count();
        host.put(const { id("host_domains") }, None, guests as f64);
    }
    let Some(told) = &readings.host else { return };
    for cpu in &told.cpus {
        host.put(const { id("dom0_cpu_busy") }, Some(names.of(cpu.cpu)), cpu.busy_s);
        host.put(const { id("dom0_cpu_steal") }, Some(names.of(cpu.cpu)), cpu.steal_s);
    }
    let loads = [const { id("host_load_1m") }, const { id("host_load_5m") }, const { id("host_load_15m") }];
    for (metric, load) in loads.into_iter().zip(told.load.iter().flatten()) {
        host.put(metric, None, *load);
    }
    host.one(const { id("dom0_memory_total") }, told.memory_total.map(|memory| memory.0 as f64));
    host.one(const { id("dom0_memory_available") }, told.memory_available.map(|memory| memory.0 as f64));
    for disk in &told.disks {
        host.several(DISK, &disk.name.as_str().into(), of_disk(&disk.traffic));
    }
    for (sensor, celsius) in &told.temperatures {
        host.put(const { id("temperature") }, Some(sensor.as_str().into()), *celsius);
    }
    for vbd in &told.vbds {
        let instance = names.of(vbd.device);
        if let Some(one) = domains.with(vbd.domid) {
            one.several(VBD, &instance, of_disk(&vbd.traffic));
        }
    }
}

#[cfg(test)]
#[path = "assemble_tests.rs"]
mod tests;
