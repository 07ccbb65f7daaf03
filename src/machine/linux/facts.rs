//! Facts that do not change while the machine is up.

use super::file::{self, below};
use super::scsi;
use crate::machine::{Cpu, Dmi, DmiTables, Facts, Result};
use crate::model::{KiB, Timestamp};
use std::path::Path;

/// /proc/cpuinfo has some 1,500 bytes for each processor and /proc/stat a word for each interrupt, so that
/// the ordinary bound would lose processors on a large machine.
const MAX_PROC_BYTES: usize = 4 * 1024 * 1024;
/// Processors told at most.
const MAX_CPUS: usize = 4096;

pub fn read(root: &Path, life: bool) -> Result<Facts> {
    let kernel = |name: &str| file::read_value(root, &format!("/proc/sys/kernel/{name}"));
    let (os_name, os_version) = os_release(root);
    let (os_major, os_minor) = match os_version.split_once('.') {
        Some((major, minor)) => (major.to_owned(), minor.to_owned()),
        None => (os_version, String::new()),
    };
    Ok(Facts {
        hostname: kernel("hostname"),
        boot_id: kernel("random/boot_id"),
        boot_time: boot_time(root),
        architecture: architecture(root, life),
        kernel_release: kernel("osrelease"),
        kernel_version: kernel("version"),
        os_name,
        os_major,
        os_minor,
        memory: memory(root),
        cpus: cpus(&file::read_text_of(&below(root, "/proc/cpuinfo"), MAX_PROC_BYTES).unwrap_or_default()),
        dmi: dmi(root),
        scsi_hosts: scsi::hosts(root),
        iscsi_initiator: iscsi_initiator(root),
    })
}

/// Kernels before 6.1 do not tell it in /proc, and uname would tell of the machine a test runs on.
fn architecture(root: &Path, life: bool) -> String {
    let told = file::read_value(root, "/proc/sys/kernel/arch");
    if !told.is_empty() {
        return told;
    }
    let asked = if life { nix::sys::utsname::uname().ok() } else { None };
    asked.map_or_else(
        || std::env::consts::ARCH.to_owned(),
        |uname| file::clean(uname.machine().as_encoded_bytes()),
    )
}

fn boot_time(root: &Path) -> Timestamp {
    let stat = file::read_text_of(&below(root, "/proc/stat"), MAX_PROC_BYTES).unwrap_or_default();
    let told = stat.lines().find_map(|line| line.strip_prefix("btime "));
    Timestamp(told.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0).saturating_mul(1000))
}

fn memory(root: &Path) -> KiB {
    let text = file::read_text(root, "/proc/meminfo").unwrap_or_default();
    let told = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    KiB(told.and_then(|t| t.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0))
}

/// NAME and VERSION_ID of os-release(5), which may be quoted.
fn os_release(root: &Path) -> (String, String) {
    let text = file::read_text(root, "/etc/os-release")
        .or_else(|| file::read_text(root, "/usr/lib/os-release"))
        .unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
        line.map(|value| value.trim_matches(['"', '\'']).to_owned())
    };
    (value("NAME").unwrap_or_else(|| "Linux".to_owned()), value("VERSION_ID").unwrap_or_default())
}

fn iscsi_initiator(root: &Path) -> Option<String> {
    let text = file::read_text(root, "/etc/iscsi/initiatorname.iscsi")?;
    let name = text.lines().find_map(|line| line.trim().strip_prefix("InitiatorName="))?.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// The blocks of /proc/cpuinfo that begin with `processor`, in the words of x86 or, failing those, of Arm.
pub fn cpus(text: &str) -> Vec<Cpu> {
    let mut cpus: Vec<Cpu> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let (key, value) = (key.trim(), value.trim());
        // Arm's /proc/cpuinfo of old has a line `Processor` for the whole machine; only ours has a number.
        if key == "processor" {
            let Ok(id) = value.parse() else { continue };
            if cpus.len() == MAX_CPUS {
                break;
            }
            cpus.push(Cpu { id, ..blank() });
        } else if let Some(cpu) = cpus.last_mut() {
            note(cpu, key, value);
        }
    }
    cpus
}

fn note(cpu: &mut Cpu, key: &str, value: &str) {
    let number = || value.parse().unwrap_or(0);
    match key {
        "vendor_id" | "CPU implementer" => cpu.vendor = value.to_owned(),
        "cpu family" | "CPU architecture" => cpu.family = value.to_owned(),
        "model" | "CPU part" => cpu.model = value.to_owned(),
        "model name" => cpu.model_name = value.to_owned(),
        "stepping" | "CPU revision" => cpu.stepping = value.to_owned(),
        "cache size" => cpu.cache_size = value.to_owned(),
        "flags" | "Features" => cpu.flags = value.to_owned(),
        "cpu MHz" => cpu.mhz = value.parse().ok().filter(|mhz: &f64| mhz.is_finite()).unwrap_or(0.0),
        "core id" => cpu.core_id = number(),
        "physical id" => cpu.physical_id = number(),
        _ => {}
    }
}

fn blank() -> Cpu {
    Cpu {
        id: 0,
        vendor: String::new(),
        family: String::new(),
        model: String::new(),
        model_name: String::new(),
        stepping: String::new(),
        cache_size: String::new(),
        flags: String::new(),
        mhz: 0.0,
        core_id: 0,
        physical_id: 0,
    }
}

fn dmi(root: &Path) -> Dmi {
    let told = |name: &str| file::read_value(root, &format!("/sys/class/dmi/id/{name}"));
    Dmi {
        system_uuid: system_uuid(root, &told("product_uuid")),
        system_manufacturer: told("sys_vendor"),
        system_product: told("product_name"),
        system_version: told("product_version"),
        system_serial: told("product_serial"),
        bios_vendor: told("bios_vendor"),
        bios_version: told("bios_version"),
        bios_date: told("bios_date"),
        chassis_manufacturer: told("chassis_vendor"),
        chassis_type: told("chassis_type"),
        board_manufacturer: told("board_vendor"),
        board_product: told("board_name"),
        tables: tables(root),
    }
}

/// Firmware without a UUID leaves all bits clear or set. The machine id then stands in, hashed with a key of
/// ours as machine-id(5) asks, since it must not be shown. All zeros: neither is there.
fn system_uuid(root: &Path, told: &str) -> [u8; 16] {
    if let Ok(uuid) = uuid::Uuid::try_parse(told)
        && !uuid.is_nil()
        && !uuid.is_max()
    {
        return uuid.into_bytes();
    }
    let machine_id = file::read_value(root, "/etc/machine-id");
    if machine_id.is_empty() {
        tracing::warn!("neither DMI nor /etc/machine-id tells which machine this is");
        return [0; 16];
    }
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"dom0d: the host's unique id");
    let tag = ring::hmac::sign(&key, machine_id.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&tag.as_ref()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().into_bytes()
}

/// The entry point tells the version: `_SM_` at bytes 6 and 7, `_SM3_` at 7 to 9 (SMBIOS 3.0, section 5.2).
fn tables(root: &Path) -> DmiTables {
    let part = |name: &str| {
        file::read_bytes(&below(root, &format!("/sys/firmware/dmi/tables/{name}")), file::MAX_BYTES)
    };
    let Some(bytes) = part("DMI") else { return DmiTables::default() };
    let entry = part("smbios_entry_point").unwrap_or_default();
    let (version, max_structure_bytes) = match entry.as_slice() {
        [b'_', b'S', b'M', b'_', _, _, major, minor, low, high, ..] => {
            (format!("{major}.{minor}.0"), u16::from_le_bytes([*low, *high]))
        }
        [b'_', b'S', b'M', b'3', b'_', _, _, major, minor, patch, ..] => {
            (format!("{major}.{minor}.{patch}"), 0)
        }
        _ => (String::new(), 0),
    };
    DmiTables { version, max_structure_bytes, bytes }
}
