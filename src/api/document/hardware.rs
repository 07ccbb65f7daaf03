//! `discover_hardware`.

use super::xml::{Empty, Xml, element_name};
use crate::machine::{Cpu, Dmi, Facts, ScsiHost};
use crate::model::MiB;
use crate::xen::HypervisorInfo;
use base64::Engine;

/// Pages of a mebibyte; the dialect's pages have 4 KiB.
const PAGES_PER_MIB: u64 = 256;
/// Words of CPU features.
const HW_CAPS: usize = 8;

/// What `discover_hardware` is made of.
#[derive(Debug, Clone, Copy)]
pub struct HardwareDocument<'a> {
    pub facts: &'a Facts,
    pub hypervisor: &'a HypervisorInfo,
}

/// The whole document.
pub fn discover_hardware(input: &HardwareDocument<'_>) -> String {
    let facts = input.facts;
    let mut xml = Xml::new("<?xml version=\"1.0\" encoding=\"UTF-8\"?>", Empty::Long);
    xml.node("Discover_Hardware_Result", |xml| {
        xml.node("NodeInformation", |xml| {
            xml.node("VMM", |xml| physical_info(xml, input.hypervisor));
            xml.node("CPUInfo", |xml| {
                xml.node("Proc_Info", |xml| facts.cpus.iter().for_each(|cpu| processor(xml, cpu)));
            });
            xml.node("IO", |xml| {
                xml.node("SCSI", |xml| {
                    facts.scsi_hosts.iter().for_each(|host| scsi_host(xml, host));
                    xml.node("ISCSI_Node", |xml| {
                        xml.leaf("Initiatorname", facts.iscsi_initiator.as_deref().unwrap_or_default());
                    });
                });
                xml.node("IDE", |_| ());
            });
            xml.node("DMTF", |xml| dmtf(xml, &facts.dmi));
        });
    });
    xml.finish()
}

fn physical_info(xml: &mut Xml, info: &HypervisorInfo) {
    let pages = |memory: MiB| memory.0.saturating_mul(PAGES_PER_MIB);
    xml.node("PhysicalInfo", |xml| {
        xml.leaf("ThreadsPerCore", info.threads_per_core);
        xml.leaf("CoresPerSocket", info.cores_per_socket);
        xml.leaf("SocketsPerNode", info.sockets_per_node);
        xml.leaf("Nodes", info.nr_nodes);
        xml.leaf("CPUKHz", info.cpu_khz);
        xml.leaf("TotalPages", pages(info.total_memory));
        xml.leaf("FreePages", pages(info.free_memory));
        xml.node("HW_Caps", |xml| {
            // A Xen that tells more words, or fewer, is told in the dialect's eight.
            let words = info.hw_caps.iter().copied().chain(std::iter::repeat(0));
            for (number, word) in words.take(HW_CAPS).enumerate() {
                xml.leaf(&format!("Item_{number}"), format_args!("{word:#010x}"));
            }
        });
    });
}

fn processor(xml: &mut Xml, cpu: &Cpu) {
    xml.node_with("CPU", &[("ID", &cpu.id.to_string())], |xml| {
        xml.leaf("vendor_id", &cpu.vendor);
        xml.leaf("cpu_family", integer(&cpu.family));
        xml.leaf("model", integer(&cpu.model));
        xml.leaf("model_name", &cpu.model_name);
        xml.leaf("stepping", integer(&cpu.stepping));
        xml.leaf("cache_size", &cpu.cache_size);
        xml.leaf("flags", &cpu.flags);
    });
}

/// A number as clients read it, whatever the kernel's manner: Arm tells `0xd08`, and nothing is 0.
fn integer(text: &str) -> u64 {
    let hex = text.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16));
    hex.unwrap_or_else(|| text.parse()).unwrap_or(0)
}

fn scsi_host(xml: &mut Xml, host: &ScsiHost) {
    xml.node_with("SCSI_Host", &[("Num", &host.number.to_string())], |xml| {
        attributes(xml, &host.attributes);
        if !host.device.is_empty() {
            xml.node("SysFSDev", |xml| attributes(xml, &host.device));
        }
    });
}

fn attributes(xml: &mut Xml, pairs: &[(String, String)]) {
    for (name, value) in pairs {
        if let Some(name) = element_name(name) {
            xml.leaf(&name, value);
        }
    }
}

/// Always with its elements, since clients look for the UUID; empty where DMI tells nothing.
fn dmtf(xml: &mut Xml, dmi: &Dmi) {
    let structures = structures(&dmi.tables.bytes);
    let version = if dmi.tables.version.is_empty() { "0.0.0" } else { &dmi.tables.version };
    let longest = structures.iter().map(|structure| structure.length).max().unwrap_or(0);
    let max_size = longest.max(usize::from(dmi.tables.max_structure_bytes));
    xml.node_with("SMBIOS", &[("Version", version)], |xml| xml.leaf("MaxSize", max_size));
    let short = version.rsplit_once('.').map_or(version, |(short, _)| short);
    xml.node_with("DMI", &[("Version", short)], |xml| {
        xml.leaf("TableLength", dmi.tables.bytes.len());
        xml.leaf("Items", structures.len());
        xml.leaf("Buffer", base64::engine::general_purpose::STANDARD.encode(&dmi.tables.bytes));
    });
    described(
        xml,
        "BIOS",
        0,
        &structures,
        &[("Vendor", &dmi.bios_vendor), ("Version", &dmi.bios_version), ("ReleaseDate", &dmi.bios_date)],
    );
    described(
        xml,
        "System",
        1,
        &structures,
        &[
            ("UUID", &dmi.system_uuid.map(|byte| format!("{byte:02x}")).join(":")),
            ("Manufacturer", &dmi.system_manufacturer),
            ("ProductName", &dmi.system_product),
        ],
    );
    let height = structures.iter().find(|s| s.kind == 3).map_or(0, |s| s.height);
    described(
        xml,
        "Chassis",
        3,
        &structures,
        &[("Height", &format!("{height}U")), ("Manufacturer", &dmi.chassis_manufacturer)],
    );
}

/// One structure's element: where it stands in the table, and what it says.
fn described(xml: &mut Xml, name: &str, kind: u8, structures: &[Structure], says: &[(&str, &str)]) {
    let found = structures.iter().enumerate().find(|(_, structure)| structure.kind == kind);
    let (item, handle) = found.map_or((0, 0), |(item, structure)| (item, structure.handle));
    let place = [("Type", kind.to_string()), ("Item", item.to_string()), ("Handle", format!("{handle:#x}"))];
    let place = place.each_ref().map(|(key, value)| (*key, value.as_str()));
    xml.node_with(name, &place, |xml| {
        for (key, value) in says {
            xml.leaf(key, value);
        }
    });
}

/// One SMBIOS structure.
struct Structure {
    kind: u8,
    handle: u16,
    /// With its strings.
    length: usize,
    /// Rack units, in a chassis.
    height: u8,
}

/// The structures of a table (SMBIOS 3.0, section 6.1): a head of type, length and handle, the formatted part,
/// then strings that end with two zeros. Ends quietly at the first that does not fit.
fn structures(table: &[u8]) -> Vec<Structure> {
    let mut found = Vec::new();
    let mut rest = table;
    while let [kind, length, low, high, ..] = *rest {
        let formatted = usize::from(length);
        if formatted < 4 || formatted > rest.len() {
            break;
        }
        let strings = &rest[formatted..];
        let Some(end) = strings.windows(2).position(|pair| pair == [0, 0]) else { break };
        let whole = formatted + end + 2;
        // A chassis tells its height at offset 11h (section 7.4).
        let height = rest[..formatted].get(0x11).copied().filter(|_| kind == 3).unwrap_or(0);
        found.push(Structure { kind, handle: u16::from_le_bytes([low, high]), length: whole, height });
        if kind == 127 {
            break;
        }
        rest = &rest[whole..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_up_to_where_it_is_broken() {
        let chassis: Vec<u8> = [vec![3, 0x12, 0, 3], vec![0; 13], vec![2], b"Acme\0\0".to_vec()].concat();
        let table = [chassis.clone(), vec![1, 4, 7, 0, 0, 0], vec![9, 200, 0]].concat();
        let found = structures(&table);
        assert_eq!(
            found.iter().map(|s| (s.kind, s.handle, s.height)).collect::<Vec<_>>(),
            [(3, 0x300, 2), (1, 7, 0)]
        );
        assert_eq!(found[0].length, chassis.len());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_for_a_table_are_taken_without_a_panic(table in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            structures(&table);
        }
    }
}
