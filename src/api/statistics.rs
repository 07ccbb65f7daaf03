//! Statistics as the dialect's pollers ask for them: each answer a struct of strings, counters that only grow while
//! a VM's domain or the host lives, from which the asker takes differences.
//!
//! A VM's CPU time is as old as the last look at all domains, at most a second or so; its uptime is told as of the
//! same moment, so that the quotient of their differences (CloudStack's CPU share) is right however short the time.

use super::Api;
use super::arguments::{Arguments, Type, need};
use super::fault::{ApiFault, Result};
use super::value::{structure, text};
use super::verb::{Kind, Origin, Row, Verb};
use crate::kernel::LinkTraffic;
use crate::model::{MiB, Timestamp, VmId, excerpt};
use crate::vm::ObservedDomain;
use crate::wire::{Answer, Caller, Role};
use crate::xen::{DomId, DomainInfo};
use futures_util::future::{BoxFuture, FutureExt};
use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;
use tokio::time::Instant;

const NAME: super::arguments::Param = need("vm", Type::Text, "the VM's name, or its id");

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("ovs_domU_stats", &[NAME], "struct", Role::Viewer, Kind::Read(domu_stats),
        "A running VM's counters, as strings: uptime and cputime in nanoseconds, vcpus, rx_bytes and tx_bytes as the guest receives and sends, rd_bytes, wr_bytes, rd_ops, wr_ops of its disks."),
    Row::new("ovs_dom0_stats", &[need("bridge", Type::Text, "a link of the host")], "struct", Role::Viewer, Kind::Read(dom0_stats),
        "The host's figures, as strings: cpu in per cent of all CPUs, of all domains, since an earlier call; free and total memory in bytes; rx and tx in bytes, of the link."),
    Row::new("get_vncport", &[NAME], "string", Role::Viewer, Kind::Read(get_vncport),
        "The port of a running VM's VNC server; 0 if there is none."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    DIALECT.iter().map(|row| row.of("statistics", Origin::Dialect))
}

/// The running VM of this name or id, as last seen.
async fn running(api: &Api, name: &str) -> Option<ObservedDomain> {
    api.fresh_sample().await;
    let id = VmId::parse(name).ok();
    let is_it =
        |info: &DomainInfo| info.domid != DomId(0) && (info.name == name || (id.is_some() && info.vm == id));
    api.operations.vms.domains().into_iter().find(|domain| is_it(&domain.info))
}

fn get_vncport<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let domain = running(api, arguments.text("vm")?).await;
        Ok(text(domain.and_then(|domain| domain.info.vnc_port).unwrap_or(0)).into())
    }
    .boxed()
}

/// A fault of a VM that does not run: does not exist, or is off.
fn not_running(api: &Api, name: &str) -> ApiFault {
    let id = VmId::parse(name).ok();
    let mut all = api.operations.vms.all().into_iter();
    if all.any(|vm| vm.record.config.name.as_str() == name || Some(vm.record.id()) == id) {
        return ApiFault::new(
            "VM_STATE",
            format!("{} is not running; only a running VM has statistics", excerpt(name)),
        );
    }
    ApiFault::new("VM_NOT_FOUND", format!("no VM {} is known here; vm_list shows all", excerpt(name)))
}

fn domu_stats<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let name = arguments.text("vm")?;
        let domain = running(api, name).await.ok_or_else(|| not_running(api, name))?;
        let (info, operations) = (&domain.info, &api.operations);
        let uptime_ms = api.sampled_at().0.saturating_sub(info.started.0);
        let disks = operations.machine.disk_traffic(info.domid.0).await?;
        let links = link_traffic(api).await?;
        let (from_guest, to_guest) = of_vifs(&domain, &links);
        Ok(structure([
            ("uptime", text(uptime_ms.saturating_mul(1_000_000))),
            ("cputime", text(info.cpu_time_ns)),
            ("vcpus", text(info.online_vcpus)),
            ("rx_bytes", text(to_guest)),
            ("tx_bytes", text(from_guest)),
            ("rd_bytes", text(disks.read.0)),
            ("wr_bytes", text(disks.written.0)),
            ("rd_ops", text(disks.reads)),
            ("wr_ops", text(disks.writes)),
        ])
        .into())
    }
    .boxed()
}

async fn link_traffic(api: &Api) -> Result<Vec<LinkTraffic>> {
    let links = api.operations.kernel.traffic().await;
    links.map_err(|error| ApiFault::new("HOST_FAILED", error.to_string()))
}

/// What all vifs of a domain received and sent: those of the toolstack's naming (`vif3.0`, and `vif3.0-emu` where
/// QEMU emulates the card), and those whose name was chosen.
fn of_vifs(domain: &ObservedDomain, links: &[LinkTraffic]) -> (u64, u64) {
    let prefix = format!("vif{}.", domain.info.domid.0);
    let vifs = domain.record.iter().flat_map(|record| &record.config.vifs);
    let named: Vec<&str> = vifs.filter_map(|vif| vif.ifname.as_ref()).map(|name| name.as_str()).collect();
    let own =
        links.iter().filter(|link| link.name.starts_with(&prefix) || named.contains(&link.name.as_str()));
    own.fold((0, 0), |(received, sent): (u64, u64), link| {
        (received.saturating_add(link.received.0), sent.saturating_add(link.sent.0))
    })
}

fn dom0_stats<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let bridge = arguments.text("bridge")?;
        let links = link_traffic(api).await?;
        let link = links.iter().find(|link| link.name == bridge);
        let link = link.ok_or_else(|| {
            let names: Vec<&str> =
                links.iter().map(|link| link.name.as_str()).filter(|n| !n.starts_with("vif")).collect();
            arguments
                .wrong("bridge", format!("{} is not there; allowed: {}", excerpt(bridge), names.join(", ")))
        })?;
        let hypervisor = api.operations.toolstack.info().await?;
        api.fresh_sample().await;
        let domains = api.operations.vms.domains();
        let at = api.domains.ended().unwrap_or_else(Instant::now);
        let busy = api.load.lock().unwrap_or_else(PoisonError::into_inner).tell(
            Sample::of(domains.iter().map(|domain| &*domain.info), at, api.sampled_at()),
            hypervisor.nr_cpus,
        );
        let bytes = |memory: MiB| text(memory.0.saturating_mul(1024 * 1024));
        Ok(structure([
            ("cpu", text(format_args!("{busy:.1}"))),
            ("free", bytes(hypervisor.free_memory)),
            ("total", bytes(hypervisor.total_memory)),
            ("rx", text(link.received.0)),
            ("tx", text(link.sent.0)),
        ])
        .into())
    }
    .boxed()
}

impl Api {
    /// The wall clock's time of the last look at all domains.
    fn sampled_at(&self) -> Timestamp {
        let age = self.domains.ended().map_or(Duration::ZERO, |at| at.elapsed());
        Timestamp(Timestamp::now().0.saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX)))
    }
}

/// CPU time of all domains at one moment.
#[derive(Debug)]
struct Sample {
    at: Instant,
    cpu_ns: BTreeMap<DomId, u64>,
    /// Since dom0 began.
    up: Duration,
}

impl Sample {
    fn of<'a>(domains: impl Iterator<Item = &'a DomainInfo>, at: Instant, time: Timestamp) -> Self {
        let (mut cpu_ns, mut up) = (BTreeMap::new(), Duration::ZERO);
        for info in domains {
            cpu_ns.insert(info.domid, info.cpu_time_ns);
            if info.domid == DomId(0) {
                up = Duration::from_millis(time.0.saturating_sub(info.started.0));
            }
        }
        Self { at, cpu_ns, up }
    }
}

/// What the toolstack tells may be nonsense, and must not overflow.
fn sum(times_ns: impl Iterator<Item = u64>) -> u64 {
    times_ns.fold(0, u64::saturating_add)
}

/// How busy the host's CPUs are: the part of their time that all domains used between two samples, some seconds
/// apart; at first, since dom0 began.
#[derive(Debug, Default)]
pub(super) struct Load {
    last: Option<(Sample, f64)>,
}

impl Load {
    /// Two samples closer than this say little; the figure of before is told.
    const LEAST: Duration = Duration::from_secs(5);

    /// In per cent of all CPUs.
    fn tell(&mut self, now: Sample, cpus: u32) -> f64 {
        let part = |used_ns: u64, time: Duration| {
            let all = time.as_secs_f64() * f64::from(cpus.max(1));
            let used = Duration::from_nanos(used_ns).as_secs_f64();
            if all > 0.0 { (100.0 * used / all).clamp(0.0, 100.0) } else { 0.0 }
        };
        let busy = match &self.last {
            None => part(sum(now.cpu_ns.values().copied()), now.up),
            Some((before, _)) if now.at >= before.at + Self::LEAST => {
                // A domain that came meanwhile has used all its time since; one that went is not counted.
                let used =
                    |(domid, ns): (&DomId, &u64)| ns.saturating_sub(*before.cpu_ns.get(domid).unwrap_or(&0));
                part(sum(now.cpu_ns.iter().map(used)), now.at - before.at)
            }
            Some((_, busy)) => return *busy,
        };
        self.last = Some((now, busy));
        busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn sample(at: Instant, up_s: u64, cpu: &[(u32, u64)]) -> Sample {
        let cpu_ns = cpu.iter().map(|(domid, ns)| (DomId(*domid), *ns)).collect();
        Sample { at, cpu_ns, up: Duration::from_secs(up_s) }
    }

    #[test]
    fn the_first_load_is_of_the_whole_time_and_the_next_ones_are_of_the_time_between() {
        let (mut load, start) = (Load::default(), Instant::now());
        let at = |s: u64| start + Duration::from_secs(s);
        assert_eq!(load.tell(sample(at(0), 100, &[(0, 40 * SECOND_NS)]), 4), 10.0);
        assert_eq!(load.tell(sample(at(1), 101, &[(0, 44 * SECOND_NS)]), 4), 10.0, "too soon");
        let cpu = [(0, 50 * SECOND_NS), (3, 10 * SECOND_NS)];
        assert_eq!(load.tell(sample(at(10), 110, &cpu), 4), 50.0);
        // Domain 3 went, 4 came; a counter that fell (of a number used again) counts nothing.
        let cpu = [(0, 49 * SECOND_NS), (4, 4 * SECOND_NS)];
        assert_eq!(load.tell(sample(at(20), 120, &cpu), 4), 10.0);
    }

    #[test]
    fn a_load_is_never_more_than_all_and_never_without_number() {
        let now = Instant::now();
        assert_eq!(Load::default().tell(sample(now, 0, &[(0, 7)]), 4), 0.0);
        assert_eq!(Load::default().tell(sample(now, 1, &[(0, u64::MAX), (1, 1)]), 0), 100.0);
    }
}
