//! Sweeps of made-up readings.

use super::*;
use crate::machine::{CpuTime, DiskFigures, VbdFigures};
use crate::model::Bytes;
use crate::xen::ShutdownReason;
use proptest::prelude::*;

/// All VMs but those named here are ours.
#[derive(Default)]
struct Book {
    strangers: Vec<VmId>,
    chosen: HashMap<Arc<str>, VmId>,
}

impl Roster for Book {
    fn host_name(&self) -> Arc<str> {
        "node-7".into()
    }

    fn is_ours(&self, vm: VmId) -> bool {
        !self.strangers.contains(&vm)
    }

    fn chosen_vifs(&self) -> HashMap<Arc<str>, VmId> {
        self.chosen.clone()
    }
}

fn vm(n: u8) -> VmId {
    VmId::from_bytes([n; 16])
}

fn domain(domid: u32, vm: Option<VmId>) -> DomainInfo {
    DomainInfo {
        domid: DomId(domid),
        vm,
        name: format!("domain-{domid}"),
        state: RunState::Blocked,
        memory: KiB(1024),
        max_memory: KiB(2048),
        vcpus: 2,
        online_vcpus: 1,
        cpu_time_ns: 1_500_000_000,
        started: Timestamp(0),
        vnc_port: None,
    }
}

/// Counters that tell each from each.
fn link(name: &str, received: u64) -> LinkTraffic {
    LinkTraffic {
        name: name.to_owned(),
        received: Bytes(received),
        sent: Bytes(received + 1),
        received_packets: received + 2,
        sent_packets: received + 3,
        receive_errors: 10,
        send_errors: 20,
        receive_drops: 100,
        send_drops: 200,
    }
}

fn sweep(readings: &Readings, book: &Book) -> Sweep {
    assemble(readings, book, (Timestamp(5), Instant::now(), Duration::from_millis(7)))
}

fn of_links(domains: Vec<DomainInfo>, links: Vec<LinkTraffic>) -> Readings {
    Readings { domains: Some(domains), links: Some(links), ..Readings::default() }
}

fn instances(figures: &ObjectFigures, metric: &str) -> Vec<String> {
    let metric = MetricId::parse(metric).unwrap();
    let of_it = figures.figures.iter().filter(|figure| figure.metric == metric);
    of_it.map(|figure| figure.instance.as_deref().unwrap_or("").to_owned()).collect()
}

#[test]
fn what_a_vif_received_its_guest_has_sent() {
    let readings = of_links(vec![domain(3, Some(vm(1)))], vec![link("vif3.0", 1000)]);
    let told = sweep(&readings, &Book::default());
    let guest = told.object(Object::Vm(vm(1))).unwrap();
    let vif = |metric: &str| guest.value(metric, Some("0"));
    assert_eq!((vif("vif_tx_bytes"), vif("vif_rx_bytes")), (Some(1000.0), Some(1001.0)));
    assert_eq!((vif("vif_tx_packets"), vif("vif_rx_packets")), (Some(1002.0), Some(1003.0)));
    assert_eq!((vif("vif_errors"), vif("vif_drops")), (Some(30.0), Some(300.0)));
    let host = told.object(Object::Host).unwrap();
    assert!(instances(host, "link_rx_bytes").is_empty());
}

#[test]
fn a_link_is_its_guests_by_the_toolstacks_name_or_the_chosen_one_and_else_the_hosts() {
    let chosen = [("web0".into(), vm(2)), ("gone0".into(), vm(9))].into();
    let book = Book { chosen, ..Book::default() };
    let names = [
        "lo",
        "eth0",
        "vif3.0",
        "vif3.1",
        "vif3.0-emu",
        "vif30.0",
        "web0",
        "web0-emu",
        "gone0",
        "vifx.0",
        "vif3",
        "eth0-emu",
        "vif3.+1",
        "vif99999999999.0",
    ];
    let links = names.iter().zip(1..).map(|(name, n)| link(name, n * 100)).collect();
    let domains = vec![domain(0, None), domain(3, Some(vm(1))), domain(4, Some(vm(2)))];
    let told = sweep(&of_links(domains, links), &book);
    let of = |object| instances(told.object(object).unwrap(), "vif_rx_bytes");
    assert_eq!(of(Object::Vm(vm(1))), ["0", "0-emu", "1"]);
    assert_eq!(of(Object::Vm(vm(2))), ["web0", "web0-emu"]);
    let host = instances(told.object(Object::Host).unwrap(), "link_rx_bytes");
    assert_eq!(host, ["eth0", "eth0-emu", "vif3", "vif3.+1", "vif99999999999.0", "vifx.0"]);
    assert_eq!(told.problems, []);
}

#[test]
fn links_of_the_host_are_bounded_and_what_is_left_out_is_said() {
    let links = (0..MAX_HOST_LINKS + 3).map(|n| link(&format!("br{n}"), 1)).collect();
    let told = sweep(&of_links(vec![], links), &Book::default());
    assert_eq!(instances(&told.objects[0], "link_drops").len(), MAX_HOST_LINKS);
    assert_eq!(told.problems, [("links", "3 links of the host are left out".to_owned())]);
}

#[test]
fn of_two_domains_of_one_vm_the_one_that_lives_is_the_vm() {
    let over = RunState::Shutdown(ShutdownReason::Suspend);
    for (first, second, its, others) in
        [(over, RunState::Paused, 4, 3), (RunState::Running, over, 3, 4), (over, over, 3, 4)]
    {
        let domains = vec![
            DomainInfo { state: first, ..domain(3, Some(vm(1))) },
            DomainInfo { state: second, ..domain(4, Some(vm(1))) },
        ];
        let told = sweep(&of_links(domains, vec![]), &Book::default());
        let objects: Vec<_> = told.objects.iter().map(|one| (one.object, one.domid.map(|d| d.0))).collect();
        let expected = [
            (Object::Host, None),
            (Object::Vm(vm(1)), Some(its)),
            (Object::Domain(DomId(others)), Some(others)),
        ];
        assert_eq!(objects, expected);
    }
}

#[test]
fn a_domain_that_is_no_vm_of_ours_is_told_by_its_number() {
    let book = Book { strangers: vec![vm(1)], ..Book::default() };
    let readings =
        of_links(vec![domain(0, None), domain(3, Some(vm(1))), domain(4, None)], vec![link("vif3.0", 1)]);
    let told = sweep(&readings, &book);
    let objects: Vec<Object> = told.objects.iter().map(|one| one.object).collect();
    assert_eq!(objects, [Object::Host, Object::Dom0, Object::Domain(DomId(3)), Object::Domain(DomId(4))]);
    assert_eq!(told.objects[2].value("vif_tx_bytes", Some("0")), Some(1.0));
    assert_eq!(told.objects[0].value("host_domains", None), Some(3.0 - 1.0));
}

#[test]
fn memory_is_what_the_hypervisor_counts_and_else_what_was_set() {
    let usage =
        |domains| Usage { total_memory: KiB(9), free_memory: KiB(4), clock_ns: 0, cpus: vec![], domains };
    let mut readings = of_links(vec![domain(3, Some(vm(1)))], vec![]);
    let memory = |readings: &Readings| sweep(readings, &Book::default()).objects[1].value("memory", None);
    assert_eq!(memory(&readings), Some(1024.0 * 1024.0));
    readings.usage = Some(usage(vec![(DomId(3), KiB(1000))]));
    assert_eq!(memory(&readings), Some(1000.0 * 1024.0));
    readings.usage = Some(usage(vec![]));
    assert_eq!(memory(&readings), Some(1024.0 * 1024.0));
    let told = sweep(&readings, &Book::default());
    assert_eq!(told.objects[0].value("host_memory_total", None), Some(9.0 * 1024.0));
    assert_eq!(told.objects[0].value("host_memory_free", None), Some(4.0 * 1024.0));
    assert_eq!(told.objects[1].value("cpu_time", None), Some(1.5));
    assert_eq!(told.objects[1].value("vcpus", None), Some(1.0));
    assert_eq!(told.objects[1].value("memory_max", None), Some(2048.0 * 1024.0));
    assert_eq!(told.objects[1].value("memory_target", None), None, "what is not known is not there");
}

/// Everything that a machine can tell.
fn machine() -> HostFigures {
    let traffic = |n: u64| DiskTraffic { read: Bytes(n), written: Bytes(n + 1), reads: n + 2, writes: n + 3 };
    HostFigures {
        cpus: (0..12).map(|cpu| CpuTime { cpu, busy_s: f64::from(cpu), steal_s: 0.25 }).collect(),
        load: Some([0.5, f64::NAN, f64::INFINITY]),
        memory_total: Some(Bytes(7000)),
        memory_available: Some(Bytes(5000)),
        disks: vec![DiskFigures { name: "sda".to_owned(), traffic: traffic(10) }],
        temperatures: vec![("Core 0".to_owned(), 41.5), ("x".repeat(65), 1.0)],
        vbds: vec![
            VbdFigures { domid: 3, device: 51728, traffic: traffic(100) },
            VbdFigures { domid: 3, device: 51712, traffic: traffic(200) },
            VbdFigures { domid: 5, device: 51712, traffic: traffic(300) },
        ],
        problems: vec![],
    }
}

#[test]
fn figures_stand_in_the_order_of_metrics_and_instances_and_none_is_without_number() {
    let mut readings = of_links(
        vec![domain(3, Some(vm(1))), domain(0, None)],
        vec![link("vif3.1", 1), link("eth1", 1), link("vif3.0", 1), link("eth0", 1)],
    );
    readings.host = Some(machine());
    readings.busy = vec![(1, 3.0), (0, 2.0)];
    readings.guests = vec![GuestFigures {
        domid: DomId(3),
        memory_target: Some(KiB(3)),
        guest_total: Some(KiB(2)),
        guest_free: None,
    }];
    let told = sweep(&readings, &Book::default());
    assert!(told.objects.is_sorted_by_key(|one| one.object));
    for one in &told.objects {
        assert!(one.figures.is_sorted_by_key(|figure| (figure.metric, figure.instance.clone())), "{one:?}");
        assert!(one.figures.iter().all(|figure| figure.value.is_finite()));
        let has_instance =
            |figure: &Figure| figure.instance.is_some() == figure.metric.metric().instance.is_some();
        assert!(one.figures.iter().all(has_instance), "{one:?}");
    }
    let host = told.object(Object::Host).unwrap();
    assert_eq!(&*host.name, "node-7");
    assert_eq!(host.value("host_cpu_busy", Some("1")), Some(3.0));
    assert_eq!(host.value("dom0_cpu_busy", Some("11")), Some(11.0));
    assert_eq!(host.value("dom0_cpu_steal", Some("2")), Some(0.25));
    assert_eq!((host.value("host_load_1m", None), host.value("host_load_5m", None)), (Some(0.5), None));
    assert_eq!(host.value("dom0_memory_total", None), Some(7000.0));
    assert_eq!(host.value("dom0_memory_available", None), Some(5000.0));
    let disk = ["disk_read_bytes", "disk_written_bytes", "disk_reads", "disk_writes"];
    assert_eq!(disk.map(|metric| host.value(metric, Some("sda"))), [10.0, 11.0, 12.0, 13.0].map(Some));
    assert_eq!(instances(host, "temperature"), ["Core 0"], "a name too long is left out");
    let guest = told.object(Object::Vm(vm(1))).unwrap();
    let vbd = ["vbd_read_bytes", "vbd_written_bytes", "vbd_reads", "vbd_writes"];
    assert_eq!(vbd.map(|metric| guest.value(metric, Some("51728"))), [100.0, 101.0, 102.0, 103.0].map(Some));
    assert_eq!(instances(guest, "vbd_reads"), ["51712", "51728"]);
    assert_eq!(guest.value("guest_memory_total", None), Some(2048.0));
    assert_eq!(guest.value("guest_memory_free", None), None);
    assert_eq!(guest.value("memory_target", None), Some(3072.0));
}

#[test]
fn without_any_reading_there_is_the_host_with_nothing_and_the_reasons() {
    let why = vec![("domains", "no answer".to_owned())];
    let told = sweep(&Readings { problems: why.clone(), ..Readings::default() }, &Book::default());
    assert_eq!((told.objects.len(), told.problems), (1, why));
    assert_eq!((told.objects[0].object, told.objects[0].figures.len()), (Object::Host, 0));
}

#[test]
fn while_the_domains_are_not_known_no_vif_is_taken_for_a_link_of_the_host() {
    let book = Book { chosen: [("web0".into(), vm(2))].into(), ..Book::default() };
    let links = vec![link("eth0", 1), link("vif3.0", 1), link("web0", 1)];
    let told = sweep(&Readings { links: Some(links), ..Readings::default() }, &book);
    assert_eq!(instances(&told.objects[0], "link_rx_bytes"), ["eth0"]);
    assert_eq!(told.objects.len(), 1);
}

#[test]
fn every_metric_is_told_by_somebody() {
    let mut readings =
        of_links(vec![domain(0, None), domain(3, Some(vm(1)))], vec![link("vif3.0", 1), link("eth0", 1)]);
    readings.host = Some(HostFigures { load: Some([1.0; 3]), ..machine() });
    readings.busy = vec![(0, 1.0)];
    readings.usage =
        Some(Usage { total_memory: KiB(9), free_memory: KiB(4), clock_ns: 0, cpus: vec![], domains: vec![] });
    let known = Some(KiB(1));
    readings.guests =
        vec![GuestFigures { domid: DomId(3), memory_target: known, guest_total: known, guest_free: known }];
    let told = sweep(&readings, &Book::default());
    let all: std::collections::BTreeSet<MetricId> =
        told.objects.iter().flat_map(|one| one.figures.iter().map(|figure| figure.metric)).collect();
    assert_eq!(all.len(), METRICS.len());
    for one in &told.objects {
        let host = one.object == Object::Host;
        assert!(one.figures.iter().all(|f| (f.metric.metric().of == crate::stats::metric::Of::Host) == host));
    }
}

proptest! {
    #[test]
    fn whatever_links_are_called_each_is_told_at_most_once(names in proptest::collection::btree_set("(vif|eth|web)?[0-4]?(\\.[0-2])?(-emu)?", 0..20)) {
        let book = Book { chosen: [("web0".into(), vm(2))].into(), ..Book::default() };
        let links: Vec<LinkTraffic> = names.iter().map(|name| link(name, 1)).collect();
        let told = sweep(&of_links(vec![domain(1, Some(vm(1))), domain(2, Some(vm(2)))], links), &book);
        let figures = told.objects.iter().flat_map(|one| &one.figures);
        let traffic = figures.filter(|f| ["link_errors", "vif_errors"].contains(&f.metric.metric().name)).count();
        prop_assert!(traffic <= names.len());
        for one in &told.objects {
            let mut seen = std::collections::BTreeSet::new();
            prop_assert!(one.figures.iter().all(|f| seen.insert((f.metric, f.instance.clone()))));
        }
    }
}
