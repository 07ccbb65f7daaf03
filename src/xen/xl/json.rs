//! A domain's configuration as `xl list -l` tells it (JSON of libxl's `domain_config`), made into our typed one.
//!
//! Told are the domain's guest, boot, memory, CPUs, disks, network cards and consoles as they are now. Not told,
//! since no domain holds it: what our runner does when it ends (always `preserve`, see `config_file`). Whether a
//! disk's backing is a file or a block device is taken from its path (`/dev/…`): a look at the file could hang.
//! A device that our types cannot hold (made by another tool) is left out and logged.

use super::super::config::{
    Boot, BootOrder, Disk, DiskBacking, DiskDevice, DiskMode, DomainConfig, GuestType, Keymap, OnEnd,
    PygrubArgs, TscMode, Vif, VifModel, Vnc, VncPassword,
};
use super::super::{DomId, Result, ToolstackError};
use super::config_file;
use crate::model::{IfName, KiB, Mac, MiB, SafePath, Text, VmId, VmName};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};

fn missing(what: &str) -> ToolstackError {
    ToolstackError::Failed(format!("xl list tells no {what}, or not in a known form"))
}

/// The domain `domid` in the output of `xl list -l`.
pub(super) fn domain(output: &[u8], domid: DomId) -> Result<DomainConfig> {
    let parsed: Value = serde_json::from_slice(output).map_err(|_| missing("JSON"))?;
    let all = parsed.as_array().ok_or_else(|| missing("list of domains"))?;
    let same = |entry: &&Value| entry["domid"].as_u64() == Some(domid.0.into());
    let entry = all.iter().find(same).ok_or(ToolstackError::NoSuchDomain)?;
    config(&entry["config"])
}

pub(super) fn config(told: &Value) -> Result<DomainConfig> {
    let (create, build) = (&told["c_info"], &told["b_info"]);
    let guest = match text(create, "type")? {
        "pv" => GuestType::Pv,
        "pvh" => GuestType::Pvh,
        "hvm" => GuestType::Hvm,
        _ => return Err(missing("known type of guest")),
    };
    let of_type = &build[format!("type.{}", config_file::guest_type(guest))];
    let max_vcpus = u32_of(&build["max_vcpus"]).unwrap_or(1);
    let online = build["avail_vcpus"].as_array().and_then(|list| u32::try_from(list.len()).ok());
    let scheduling = &build["sched_params"];
    let u16_of = |value: &Value| value.as_u64().and_then(|n| u16::try_from(n).ok());
    Ok(DomainConfig {
        vm: text(create, "uuid").ok().and_then(|t| VmId::parse(t).ok()).ok_or_else(|| missing("UUID"))?,
        name: VmName::parse(text(create, "name")?).map_err(|e| ToolstackError::Failed(e.to_string()))?,
        guest,
        boot: boot(guest, build, of_type)?,
        memory: MiB::from(KiB(build["target_memkb"].as_u64().ok_or_else(|| missing("target_memkb"))?)),
        max_memory: MiB::from(KiB(build["max_memkb"].as_u64().ok_or_else(|| missing("max_memkb"))?)),
        vcpus: online.filter(|n| *n > 0).unwrap_or(max_vcpus),
        max_vcpus,
        cpu_weight: u16_of(&scheduling["weight"]).unwrap_or(256),
        cpu_cap: u16_of(&scheduling["cap"]).unwrap_or(0),
        cpus: affinity(&build["vcpu_hard_affinity"]),
        disks: devices(&told["disks"], "disk", disk),
        vifs: devices(&told["nics"], "network card", vif),
        vnc: vnc(if guest == GuestType::Hvm { of_type } else { &told["vfbs"][0] }),
        on_poweroff: OnEnd::Preserve,
        on_reboot: OnEnd::Preserve,
        on_crash: OnEnd::Preserve,
        tsc_mode: build["tsc_mode"].as_str().map(tsc_mode).unwrap_or_default(),
        acpi: flag(build, of_type, "acpi").unwrap_or(true),
        apic: flag(build, of_type, "apic").unwrap_or(true),
        pae: flag(build, of_type, "pae").unwrap_or(true),
        usb_tablet: of_type["usbdevice"] == "tablet",
        serial_pty: of_type["serial"] == "pty",
        localtime: flag(build, of_type, "localtime").unwrap_or(false),
    })
}

fn text<'a>(of: &'a Value, key: &str) -> Result<&'a str> {
    of[key].as_str().ok_or_else(|| missing(key))
}

fn u32_of(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok())
}

/// libxl writes a `defbool` as "True", "False" or "<default>"; releases differ in where some of them stand.
fn flag(build: &Value, of_type: &Value, key: &str) -> Option<bool> {
    [&build[key], &of_type[key]].into_iter().find_map(|value| match value {
        Value::Bool(flag) => Some(*flag),
        Value::String(word) if word == "True" => Some(true),
        Value::String(word) if word == "False" => Some(false),
        _ => None,
    })
}

fn boot(guest: GuestType, build: &Value, of_type: &Value) -> Result<Boot> {
    // Before 4.10 these stood with the guest's type.
    let key = |name: &str| build[name].as_str().or_else(|| of_type[name].as_str());
    let bad = |error: crate::model::Invalid| ToolstackError::Failed(error.to_string());
    let cmdline = Text::parse(key("cmdline").unwrap_or_default()).map_err(bad)?;
    if key("bootloader").is_some() {
        let args = [build, of_type].into_iter().find_map(|at| at["bootloader_args"].as_array());
        let words: Vec<&str> = args.into_iter().flatten().filter_map(Value::as_str).collect();
        return Ok(Boot::Pygrub { args: PygrubArgs::parse(&words.join(" ")).map_err(bad)?, extra: cmdline });
    }
    if let Some(kernel) = key("kernel") {
        let kernel = SafePath::parse(kernel).map_err(bad)?;
        let ramdisk = key("ramdisk").map(SafePath::parse).transpose().map_err(bad)?;
        return Ok(Boot::Kernel { kernel, ramdisk, cmdline });
    }
    if guest == GuestType::Hvm {
        let order = of_type["boot"].as_str().unwrap_or("c");
        return Ok(Boot::Firmware { order: BootOrder::parse(order).map_err(bad)? });
    }
    Err(missing("kernel or boot loader"))
}

/// The CPUs that the first virtual one may run on: ours all have the same.
fn affinity(told: &Value) -> Vec<u32> {
    told[0].as_array().into_iter().flatten().filter_map(u32_of).collect()
}

fn devices<T>(told: &Value, what: &str, read: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    let all = told.as_array().into_iter().flatten();
    all.filter_map(|device| {
        let read = read(device);
        if read.is_none() {
            tracing::debug!(what, "a device of a kind we do not know is not told");
        }
        read
    })
    .collect()
}

fn disk(told: &Value) -> Option<Disk> {
    let path = match told["pdev_path"].as_str() {
        Some("") | None => None,
        Some(path) => Some(SafePath::parse(path).ok()?),
    };
    let is = |key: &str| told[key].as_u64().is_some_and(|n| n != 0) || told[key] == "True";
    let cdrom = is("is_cdrom");
    let block = path.as_ref().is_some_and(|path| path.as_str().starts_with("/dev/"));
    let mode = match (is("readwrite"), told["backend"].as_str()) {
        (false, _) => DiskMode::ReadOnly,
        (true, Some("qdisk")) => DiskMode::SharedReadWrite,
        (true, _) => DiskMode::ReadWrite,
    };
    Some(Disk {
        backing: if block { DiskBacking::Phy } else { DiskBacking::File },
        path,
        device: DiskDevice::parse(told["vdev"].as_str()?).ok()?,
        cdrom,
        mode,
    })
}

fn vif(told: &Value) -> Option<Vif> {
    let ioemu = told["nictype"] == "vif_ioemu";
    Some(Vif {
        mac: Mac::parse(told["mac"].as_str()?).ok()?,
        bridge: IfName::parse(told["bridge"].as_str()?).ok()?,
        ifname: told["ifname"].as_str().and_then(|name| IfName::parse(name).ok()),
        model: match (ioemu, told["model"].as_str()) {
            (false, _) => VifModel::Netfront,
            (true, Some("e1000")) => VifModel::E1000,
            (true, _) => VifModel::Rtl8139,
        },
    })
}

/// `of`: where libxl keeps a `vnc` (an HVM guest's own part, or a virtual frame buffer).
fn vnc(of: &Value) -> Option<Vnc> {
    let vnc = &of["vnc"];
    if vnc["enable"] != "True" {
        return None;
    }
    let told = vnc["listen"].as_str().unwrap_or("127.0.0.1");
    // An IPv6 one has brackets and its display behind it.
    let bracketed = told.strip_prefix('[').and_then(|rest| rest.split_once("]:"));
    let (listen, display) = match bracketed {
        Some((address, display)) => (address, display.parse().ok()),
        None => (told, vnc["display"].as_u64().and_then(|n| u16::try_from(n).ok())),
    };
    let fixed = vnc["findunused"] == "False";
    Some(Vnc {
        listen: listen.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        display: if fixed { display.or(Some(0)) } else { None },
        password: vnc["passwd"].as_str().and_then(|p| VncPassword::parse(p).ok()),
        keymap: of["keymap"].as_str().and_then(|k| Keymap::parse(k).ok()),
    })
}

fn tsc_mode(word: &str) -> TscMode {
    match word {
        "always_emulate" => TscMode::AlwaysEmulate,
        "native" => TscMode::Native,
        "native_paravirt" => TscMode::NativeParavirt,
        _ => TscMode::Default,
    }
}
