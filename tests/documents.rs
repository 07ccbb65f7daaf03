//! Our documents have every element of the dialect's, in its order and with values of the same kind.

use dom0d::api::document::{
    CAPABILITIES, HardwareDocument, ServerDocument, discover_hardware, discover_server,
};
use dom0d::config::Dialect;
use dom0d::host::ownership::{RawTake, TakeRequest};
use dom0d::host::{HostRecord, Ownership};
use dom0d::machine::{Cpu, Dmi, DmiTables, Facts, Ntp, ScsiHost, TimeZone};
use dom0d::model::{KiB, MiB, Timestamp};
use dom0d::xen::HypervisorInfo;
use quick_xml::events::{BytesStart, Event};

const SERVER: &str = include_str!("fixtures/discover_server.shape");
const HARDWARE: &str = include_str!("fixtures/discover_hardware.shape");

/// A machine that tells everything.
fn full() -> Facts {
    let pairs = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    let cpu = |id| Cpu {
        id,
        vendor: "GenuineIntel".into(),
        family: "6".into(),
        model: "85".into(),
        model_name: "Some <CPU> & more".into(),
        stepping: "4".into(),
        cache_size: "4096 KB".into(),
        flags: "fpu tsc".into(),
        mhz: 2000.0,
        core_id: id,
        physical_id: 0,
    };
    let bios = [vec![0, 24, 0, 0], vec![0; 20], b"Acme\0\0".to_vec()].concat();
    Facts {
        hostname: "node-7".into(),
        boot_id: "b".into(),
        boot_time: Timestamp(1_700_000_000_000),
        architecture: "x86_64".into(),
        kernel_release: "6.1.0".into(),
        kernel_version: "#1 SMP".into(),
        os_name: "Debian GNU/Linux".into(),
        os_major: "12".into(),
        os_minor: "5".into(),
        memory: KiB(4_000_000),
        cpus: vec![cpu(0), cpu(1)],
        dmi: Dmi {
            system_uuid: [0x1d; 16],
            system_manufacturer: "Acme".into(),
            system_product: "Box".into(),
            bios_vendor: "Acme".into(),
            bios_version: "1.0".into(),
            bios_date: "01/01/2020".into(),
            chassis_manufacturer: "Acme".into(),
            tables: DmiTables { version: "2.8.0".into(), max_structure_bytes: 48, bytes: bios },
            ..Dmi::default()
        },
        scsi_hosts: vec![ScsiHost {
            number: 0,
            attributes: pairs(&[
                ("active_mode", "Initiator"),
                ("ahci_host_cap2", "0"),
                ("ahci_host_caps", "40141f05"),
                ("ahci_host_version", "10000"),
                ("ahci_port_cmd", "1000c017"),
                ("can_queue", "31"),
                ("cmd_per_lun", "1"),
                ("em_message_supported", ""),
                ("em_message_type", "0"),
                ("host_busy", "0"),
                ("link_power_management_policy", "max_performance"),
                ("proc_name", "ahci"),
                ("prot_capabilities", "0"),
                ("prot_guard_type", "0"),
                ("sg_prot_tablesize", "0"),
                ("sg_tablesize", "168"),
                ("state", "running"),
                ("supported_mode", "Initiator"),
                ("uevent", ""),
                ("unique_id", "1"),
            ]),
            device: pairs(&[
                ("broken_parity_status", "0"),
                ("class", "0x010601"),
                ("consistent_dma_mask_bits", "32"),
                ("device", "0x2922"),
                ("dma_mask_bits", "32"),
                ("enable", "1"),
                ("irq", "58"),
                ("local_cpulist", "0-1"),
                ("msi_bus", ""),
                ("msi_irqs", "58"),
                ("numa_node", "-1"),
                ("subsystem_device", "0x1100"),
                ("subsystem_vendor", "0x1af4"),
                ("uevent", "DRIVER=ahci"),
                ("vendor", "0x8086"),
            ]),
        }],
        iscsi_initiator: Some("iqn.1993-08.org.debian:01:ab".into()),
    }
}

/// A machine that tells next to nothing: no DMI, no SCSI, an odd processor, a distribution without a version.
fn sparse() -> Facts {
    let empty = || String::new();
    let odd = Cpu {
        family: empty(),
        model: "0xd08".into(),
        stepping: empty(),
        vendor: empty(),
        ..full().cpus[0].clone()
    };
    Facts {
        hostname: "\u{1}bad\u{ffff}<&\"".into(),
        os_major: "rolling".into(),
        os_minor: empty(),
        cpus: vec![odd],
        dmi: Dmi::default(),
        scsi_hosts: Vec::new(),
        iscsi_initiator: None,
        ..full()
    }
}

fn hypervisor() -> HypervisorInfo {
    HypervisorInfo {
        version_major: 4,
        version_minor: 17,
        version_extra: ".3".into(),
        compiler: "gcc".into(),
        compiled_by: "someone".into(),
        compile_domain: "example.org".into(),
        compile_date: "Wed Dec  5".into(),
        capabilities: "xen-3.0-x86_64 ".into(),
        total_memory: MiB(4096),
        free_memory: MiB(3000),
        nr_cpus: 2,
        threads_per_core: 1,
        cores_per_socket: 2,
        sockets_per_node: 1,
        nr_nodes: 1,
        cpu_khz: 2_000_000,
        hw_caps: vec![0x0f8b_f3ff, 1],
    }
}

fn server(facts: &Facts, host: &HostRecord, dialect: Dialect) -> String {
    discover_server(&ServerDocument {
        facts,
        hypervisor: &hypervisor(),
        timezone: &TimeZone { name: "Europe/Amsterdam".into(), rtc_utc: true },
        ntp: Some(&Ntp { servers: Vec::new(), local_time_source: true, running: false }),
        host,
        dialect,
        registered_ip: std::net::IpAddr::from([192, 0, 2, 7]),
        agent_version: "0.1.0",
        plain_http: false,
        capabilities: &CAPABILITIES,
    })
}

fn hardware(facts: &Facts) -> String {
    discover_hardware(&HardwareDocument { facts, hypervisor: &hypervisor() })
}

/// Every element and attribute path of a document with its value, as they come; `None` for an element with
/// elements in it.
fn walk(document: &str) -> Vec<(String, Option<String>)> {
    let mut reader = quick_xml::Reader::from_str(document);
    let mut path: Vec<String> = Vec::new();
    let mut found: Vec<(String, Option<String>)> = Vec::new();
    let mut open: Vec<usize> = Vec::new();
    let enter =
        |start: &BytesStart<'_>, path: &mut Vec<String>, open: &mut Vec<usize>, found: &mut Vec<_>| {
            if let Some(parent) = open.last() {
                let parent: &mut (String, Option<String>) = &mut found[*parent];
                parent.1 = None;
            }
            path.push(start.name().as_ref().to_string());
            open.push(found.len());
            found.push((path.join("/"), Some(String::new())));
            for attribute in start.attributes() {
                let attribute = attribute.expect("well-formed");
                let key = attribute.key.as_ref().to_string();
                let value = attribute.value.to_string();
                found.push((format!("{}@{key}", path.join("/")), Some(value)));
            }
        };
    loop {
        match reader.read_event().expect("well-formed") {
            Event::Start(start) => enter(&start, &mut path, &mut open, &mut found),
            Event::Empty(start) => {
                enter(&start, &mut path, &mut open, &mut found);
                path.pop();
                open.pop();
            }
            Event::End(_) => {
                path.pop();
                open.pop();
            }
            Event::Text(text) => {
                let text = text.to_string();
                if let Some((_, Some(value))) = open.last().map(|at| &mut found[*at]) {
                    value.push_str(&text);
                }
            }
            Event::GeneralRef(name) => {
                let name = name.to_string();
                if let Some((_, Some(value))) = open.last().map(|at| &mut found[*at]) {
                    value.push_str(match name.as_str() {
                        "amp" => "&",
                        "lt" => "<",
                        "gt" => ">",
                        "quot" => "\"",
                        other => panic!("&{other};"),
                    });
                }
            }
            Event::Eof => return found,
            _ => {}
        }
    }
}

fn is_of_kind(value: Option<&str>, kind: &str) -> bool {
    let Some(value) = value else { return kind == "node" };
    match kind {
        // A node of ours may have nothing in it (no processors told).
        "node" | "empty" => value.is_empty(),
        "integer" => value.parse::<i64>().is_ok(),
        "hex" => value.strip_prefix("0x").is_some_and(|hex| u64::from_str_radix(hex, 16).is_ok()),
        "colons" => {
            value.len() == 47
                && value.split(':').all(|byte| byte.len() == 2 && u8::from_str_radix(byte, 16).is_ok())
        }
        "Flag" => value == "True" || value == "False",
        "flag" => value == "true" || value == "false",
        "text" => true,
        other => panic!("the fixture has a kind {other}"),
    }
}

/// `with_optional`: parts that only some machines have must be there, too.
fn holds(shape: &str, document: &str, with_optional: bool) {
    let ours = walk(document);
    let mut last = 0;
    for line in shape.lines().filter(|line| !line.starts_with('#')) {
        let (path, kind) = line.split_once(' ').expect("path and kind");
        let optional = kind.ends_with('?');
        let kind = kind.trim_end_matches('?');
        let Some(at) = ours.iter().position(|(found, _)| found == path) else {
            assert!(optional && !with_optional, "{path} is missing");
            continue;
        };
        assert!(path.contains('@') || at >= last, "{path} comes too early");
        if !path.contains('@') {
            last = at;
        }
        for (_, value) in ours.iter().filter(|(found, _)| found == path) {
            assert!(is_of_kind(value.as_deref(), kind), "{path}: {value:?} is not {kind}");
        }
    }
}

fn value(document: &str, path: &str) -> String {
    let found = walk(document).into_iter().find(|(found, _)| found == path);
    found.and_then(|(_, value)| value).unwrap_or_else(|| panic!("{path} is missing"))
}

fn owned() -> HostRecord {
    let raw = RawTake { manager: "d1a749d4295041fb99854f52ea4dea97", ..RawTake::default() };
    let request = TakeRequest::parse(&raw).expect("a good id");
    let ownership = Ownership::Unowned.take(request, Timestamp(1), 0).expect("nobody owns it");
    HostRecord { ownership, ..HostRecord::new([0x1d; 16]) }
}

#[test]
fn discover_server_has_every_element_of_the_dialect_whatever_the_machine_tells() {
    for facts in [full(), sparse()] {
        for host in [HostRecord::new([0x1d; 16]), owned()] {
            for dialect in [Dialect::V32, Dialect::V33] {
                holds(SERVER, &server(&facts, &host, dialect), true);
            }
        }
    }
}

#[test]
fn discover_hardware_has_every_element_of_the_dialect_whatever_the_machine_tells() {
    holds(HARDWARE, &hardware(&full()), true);
    holds(HARDWARE, &hardware(&sparse()), false);
}

#[test]
fn the_documents_begin_as_clients_look_for() {
    let host = HostRecord::new([0x1d; 16]);
    let text = server(&full(), &host, Dialect::V32);
    assert!(
        text.starts_with("<?xml version=\"1.0\" ?><Discover_Server_Result><Server><Unique_Id>1d:1d:"),
        "{text}"
    );
    assert!(text.contains("<Exports/>"));
    let text = hardware(&full());
    assert!(
        text.starts_with("<?xml version=\"1.0\" encoding=\"UTF-8\"?><Discover_Hardware_Result>"),
        "{text}"
    );
    assert!(text.contains("<IDE></IDE>"));
}

#[test]
fn ownership_and_dialect_show_as_clients_compare_them() {
    let at = |name: &str| format!("Discover_Server_Result/Server/{name}");
    let free = server(&full(), &HostRecord::new([0x1d; 16]), Dialect::V32);
    assert_eq!(value(&free, &at("Manager_Unique_Id")), "none");
    assert_eq!(value(&free, &at("Membership_State")), "Unowned");
    assert_eq!(value(&free, &at("Server_Roles")), "xen,utility");
    assert!(value(&free, &at("OVM_Version")).starts_with("3.2."));
    let taken = server(&full(), &owned(), Dialect::V33);
    assert_eq!(value(&taken, &at("Manager_Unique_Id")), "d1a749d4295041fb99854f52ea4dea97");
    assert_eq!(value(&taken, &at("Membership_State")), "Owned");
    assert!(value(&taken, &at("OVM_Version")).starts_with("3.3."));
}

#[test]
fn text_of_the_machine_cannot_break_out_of_its_element() {
    let text = server(&sparse(), &HostRecord::new([1; 16]), Dialect::V32);
    assert_eq!(value(&text, "Discover_Server_Result/Server/Hostname"), "bad<&\"");
    let model = value(
        &hardware(&full()),
        "Discover_Hardware_Result/NodeInformation/CPUInfo/Proc_Info/CPU/model_name",
    );
    assert_eq!(model, "Some <CPU> & more");
}

#[test]
fn memory_is_told_in_pages_of_4_kib_and_cpu_features_in_eight_words() {
    let at = "Discover_Hardware_Result/NodeInformation/VMM/PhysicalInfo";
    let text = hardware(&full());
    assert_eq!(value(&text, &format!("{at}/TotalPages")), "1048576");
    assert_eq!(value(&text, &format!("{at}/HW_Caps/Item_0")), "0x0f8bf3ff");
    assert_eq!(value(&text, &format!("{at}/HW_Caps/Item_7")), "0x00000000");
    assert_eq!(value(&text, "Discover_Hardware_Result/NodeInformation/DMTF/BIOS@Type"), "0");
}
