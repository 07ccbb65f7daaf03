//! VMs and domains as the wire shows them: the dialect's `list_vms` and `get_vm_config`, and our own `vm_list`.
//!
//! In `list_vms` every scalar is a string, as xend's own structs were; in `get_vm_config` numbers and booleans are
//! real ones. Fields that xend had and xl has not (`store_mfn`, `features`, …) are there and empty or "0", since
//! clients read them by name.

use super::value::{int, is_secret, or_nil, structure, text, texts};
use crate::model::{MiB, VmId};
use crate::vm::{Action, Intent, KeptValue, ObservedDomain, Vm, VmRecord, allowed};
use crate::wire::Value;
use crate::xen::config::{
    Boot, Disk, DiskBacking, DiskMode, DomainConfig, GuestType, OnEnd, TscMode, Vif, VifModel, Vnc,
};
use crate::xen::{DomainInfo, RunState};
use std::collections::BTreeMap;

type Map = BTreeMap<String, Value>;

fn on_end(end: OnEnd) -> &'static str {
    match end {
        OnEnd::Destroy => "destroy",
        OnEnd::Restart => "restart",
        OnEnd::Preserve => "preserve",
        OnEnd::CoredumpDestroy => "coredump-destroy",
        OnEnd::CoredumpRestart => "coredump-restart",
    }
}

/// The six places of xend's state: running, blocked, paused, shut down, crashed, dying.
pub fn state_letters(state: RunState) -> &'static str {
    use crate::xen::ShutdownReason::{Crash, Watchdog};
    match state {
        RunState::Running => "r-----",
        RunState::Blocked => "-b----",
        RunState::Paused => "--p---",
        RunState::Shutdown(Crash | Watchdog) => "---sc-",
        RunState::Shutdown(_) => "---s--",
        RunState::Dying => "-----d",
    }
}

/// A stable id for a VM's nth device of a kind, as xend's structs had one.
fn device_uuid(vm: VmId, kind: u8, index: usize) -> String {
    let mut bytes = *vm.as_bytes();
    bytes[0] ^= kind;
    bytes[15] = bytes[15].wrapping_add(u8::try_from(index).unwrap_or(0)).wrapping_add(1);
    VmId::from_bytes(bytes).to_string()
}

fn disk_text(disk: &Disk) -> String {
    let scheme = match disk.backing {
        DiskBacking::File => "file",
        DiskBacking::Phy => "phy",
    };
    let path = disk.path.as_ref().map_or("", |p| p.as_str());
    let kind = if disk.cdrom { ":cdrom" } else { "" };
    format!("{scheme}:{path},{}{kind},{}", disk.device.as_str(), mode_text(disk.mode))
}

fn mode_text(mode: DiskMode) -> &'static str {
    match mode {
        DiskMode::ReadOnly => "r",
        DiskMode::ReadWrite => "w",
        DiskMode::SharedReadWrite => "w!",
    }
}

fn vif_text(vif: &Vif) -> String {
    let mut line = format!("mac={},bridge={}", vif.mac, vif.bridge);
    match vif.model {
        VifModel::Netfront => {}
        VifModel::E1000 => line.push_str(",type=ioemu,model=e1000"),
        VifModel::Rtl8139 => line.push_str(",type=ioemu,model=rtl8139"),
    }
    if let Some(name) = &vif.ifname {
        line.push_str(&format!(",vifname={name}"));
    }
    line
}

fn password(vnc: &Vnc, secrets: bool) -> &str {
    match &vnc.password {
        Some(password) if secrets => password.expose(),
        Some(_) => "***",
        None => "",
    }
}

fn vfb_text(vnc: &Vnc, secrets: bool) -> String {
    let mut line = format!("type=vnc,vnclisten={}", vnc.listen);
    match vnc.display {
        Some(display) => line.push_str(&format!(",vncunused=0,vncdisplay={display}")),
        None => line.push_str(",vncunused=1"),
    }
    if vnc.password.is_some() {
        line.push_str(&format!(",vncpasswd={}", password(vnc, secrets)));
    }
    if let Some(keymap) = &vnc.keymap {
        line.push_str(&format!(",keymap={}", keymap.as_str()));
    }
    line
}

fn kept(value: &KeptValue) -> Value {
    match value {
        KeptValue::Bool(b) => Value::Bool(*b),
        KeptValue::Int(n) => int(*n),
        KeptValue::Text(t) => text(t.as_str()),
        KeptValue::List(list) => texts(list.iter().map(|t| t.as_str())),
    }
}

/// `get_vm_config`: vm.cfg as a struct. `secrets`: whether the caller may see the VNC password.
pub fn config(record: &VmRecord, secrets: bool) -> Value {
    let config = &record.config;
    // A manager's own key may be a secret too.
    let shown = |k: &str, v| if secrets || !is_secret(k) { kept(v) } else { text("***") };
    let mut map: Map = record.kept.iter().map(|(k, v)| (k.clone(), shown(k, v))).collect();
    // The dialect's clients read these whether or not they were ever set.
    for key in ["OVM_description", "OVM_cpu_compat_group", "guest_os_type"] {
        map.entry(key.to_owned()).or_insert_with(|| text(""));
    }
    map.entry("OVM_simple_name".to_owned()).or_insert_with(|| text(&config.name));
    let domain_type = match config.guest {
        GuestType::Pv => "xen_pvm",
        GuestType::Pvh => "xen_pvh",
        GuestType::Hvm => "xen_hvm",
    };
    map.entry("OVM_domain_type".to_owned()).or_insert_with(|| text(domain_type));
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("OVM_high_availability", Value::Bool(record.ha));
    put("name", text(&config.name));
    put("uuid", text(config.vm));
    put("memory", int(config.memory.0));
    put("maxmem", int(config.max_memory.0));
    put("vcpus", int(config.vcpus));
    put("maxvcpus", int(config.max_vcpus));
    put("cpu_weight", int(config.cpu_weight));
    put("cpu_cap", int(config.cpu_cap));
    put("disk", texts(config.disks.iter().map(disk_text)));
    put("vif", texts(config.vifs.iter().map(vif_text)));
    put("vfb", texts(config.vnc.iter().map(|vnc| vfb_text(vnc, secrets))));
    put("on_poweroff", text(on_end(config.on_poweroff)));
    put("on_reboot", text(on_end(config.on_reboot)));
    put("on_crash", text(on_end(config.on_crash)));
    put("builder", text(if config.guest == GuestType::Hvm { "hvm" } else { "linux" }));
    if config.guest == GuestType::Pvh {
        // The dialect has no builder for it, and what we show must mean the same when it comes back.
        put("type", text("pvh"));
    }
    if !config.cpus.is_empty() {
        put("cpus", text(cpu_ranges(&config.cpus)));
    }
    let (loader, args, extra) = match &config.boot {
        Boot::Pygrub { args, extra } => ("/usr/bin/pygrub", args.as_str(), extra.as_str()),
        Boot::Kernel { cmdline, .. } => ("", "", cmdline.as_str()),
        Boot::Firmware { .. } => ("", "", ""),
    };
    put("bootloader", text(loader));
    put("bootargs", text(args));
    put("extra", text(extra));
    match &config.boot {
        Boot::Kernel { kernel, ramdisk, .. } => {
            put("kernel", text(kernel));
            put("ramdisk", text(ramdisk.as_ref().map_or("", |r| r.as_str())));
        }
        Boot::Firmware { order } => {
            put("boot", text(order.as_str()));
        }
        Boot::Pygrub { .. } => {}
    }
    if config.guest == GuestType::Hvm || config.localtime {
        put("localtime", Value::Bool(config.localtime));
    }
    if config.guest != GuestType::Pv {
        put("acpi", Value::Bool(config.acpi));
        put("apic", Value::Bool(config.apic));
        put("pae", Value::Bool(config.pae));
    }
    if config.guest == GuestType::Hvm {
        put("usbdevice", text(if config.usb_tablet { "tablet" } else { "" }));
        put("serial", text(if config.serial_pty { "pty" } else { "" }));
    }
    if config.tsc_mode != TscMode::Default {
        put("tsc_mode", text(tsc(config.tsc_mode)));
    }
    Value::Struct(map)
}

/// `0-3,5` for sorted CPU numbers.
fn cpu_ranges(cpus: &[u32]) -> String {
    let ranges = cpus.chunk_by(|a, b| a + 1 == *b);
    let range = |range: &[u32]| match range {
        [first, .., last] => format!("{first}-{last}"),
        single => single.iter().map(u32::to_string).collect(),
    };
    ranges.map(range).collect::<Vec<_>>().join(",")
}

fn tsc(mode: TscMode) -> &'static str {
    match mode {
        TscMode::Default => "default",
        TscMode::AlwaysEmulate => "always_emulate",
        TscMode::Native => "native",
        TscMode::NativeParavirt => "native_paravirt",
    }
}

/// One element of `list_vms`, and the answer of `list_vm`. `host_cpus`: how many CPUs a VM without affinity may
/// run on.
pub fn domain(observed: &ObservedDomain, host_cpus: u32, secrets: bool) -> Value {
    let info = &*observed.info;
    let config = observed.record.as_ref().map(|r| &r.config);
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("name", text(&info.name));
    put("uuid", text(uuid(info)));
    put("domid", text(info.domid.0));
    put("memory", text(MiB::from(info.memory).0));
    put("maxmem", text(MiB::from(info.max_memory).0));
    put("vcpus", text(info.vcpus));
    put("online_vcpus", text(info.online_vcpus));
    put("cpu_time", text(cpu_time(info)));
    put("state", text(state_letters(info.state)));
    put("status", text("2"));
    put("start_time", text(format_args!("{}.{:02}", info.started.0 / 1000, info.started.0 % 1000 / 10)));
    put("pool_name", text("Pool-0"));
    put("shadow_memory", text("0"));
    put("features", text(""));
    put("store_mfn", text("0"));
    put("console_mfn", text("0"));
    put("on_xend_start", text("ignore"));
    put("on_xend_stop", text("ignore"));
    put("cpus", cpus(config, info.vcpus, host_cpus));
    put("cpu_weight", text(config.map_or(65_535, |c| c.cpu_weight)));
    put("cpu_cap", text(config.map_or(0, |c| c.cpu_cap)));
    put("on_poweroff", text(config.map_or("destroy", |c| on_end(c.on_poweroff))));
    put("on_reboot", text(config.map_or("restart", |c| on_end(c.on_reboot))));
    put("on_crash", text(config.map_or("restart", |c| on_end(c.on_crash))));
    let hvm = config.is_some_and(|c| c.guest == GuestType::Hvm);
    put("builder", text(if hvm { "hvm" } else { "linux" }));
    let (loader, args, kernel) = match config.map(|c| &c.boot) {
        Some(Boot::Pygrub { args, .. }) => ("/usr/bin/pygrub", args.as_str(), ""),
        Some(Boot::Kernel { kernel, .. }) => ("", "", kernel.as_str()),
        _ => ("", "", ""),
    };
    put("bootloader", text(loader));
    put("bootloader_args", text(args));
    let description = observed.record.as_ref().and_then(|r| r.kept.get("OVM_description").map(kept));
    put("description", description.unwrap_or_else(|| text("")));
    put("image", image(config, kernel));
    put("device", config.map_or_else(|| Value::Struct(Map::new()), |c| devices(c, info, secrets)));
    Value::Struct(map)
}

/// Seconds, with nanoseconds behind the point.
pub(super) fn cpu_time(info: &DomainInfo) -> String {
    format!("{}.{:09}", info.cpu_time_ns / 1_000_000_000, info.cpu_time_ns % 1_000_000_000)
}

fn uuid(info: &DomainInfo) -> String {
    match info.vm {
        Some(vm) => vm.to_string(),
        None => "00000000-0000-0000-0000-000000000000".to_owned(),
    }
}

/// How many CPUs of a vCPU, and how many vCPUs, are shown.
const SHOWN_CPUS: usize = 512;
/// And how many CPUs in all: at some 36 bytes each 256 KiB.
const SHOWN_CPUS_IN_ALL: usize = 7000;

/// For each vCPU the CPUs it may run on. They are the same for all, and their product can be large: many vCPUs with
/// a wide affinity must not make the whole of `list_vms` too big. So they are shown for as many vCPUs as fit, and
/// the lists beyond are empty.
fn cpus(config: Option<&DomainConfig>, vcpus: u32, host_cpus: u32) -> Value {
    let allowed: Vec<u32> = match config {
        Some(config) if !config.cpus.is_empty() => {
            // Before the hypervisor has told how many the host has, the wish is shown as it is.
            let there = config.cpus.iter().filter(|cpu| host_cpus == 0 || **cpu < host_cpus);
            there.take(SHOWN_CPUS).copied().collect()
        }
        _ => (0..host_cpus).take(SHOWN_CPUS).collect(),
    };
    let vcpus = usize::try_from(vcpus).unwrap_or(SHOWN_CPUS).min(SHOWN_CPUS);
    let full = vcpus.min(SHOWN_CPUS_IN_ALL / allowed.len().max(1));
    let shown = std::iter::repeat_n(texts(&allowed), full);
    Value::Array(shown.chain(std::iter::repeat_n(Value::Array(Vec::new()), vcpus - full)).collect())
}

fn image(config: Option<&DomainConfig>, kernel: &str) -> Value {
    let tsc_mode = config.map_or(0, |c| match c.tsc_mode {
        TscMode::Default => 0,
        TscMode::AlwaysEmulate => 1,
        TscMode::Native => 2,
        TscMode::NativeParavirt => 3,
    });
    structure([
        ("kernel", text(kernel)),
        ("tsc_mode", text(tsc_mode)),
        ("superpages", text("0")),
        ("nomigrate", text("0")),
        ("expose_host_uuid", text("0")),
        ("videoram", text("4")),
        ("device_model", text("")),
        ("notes", Value::Array(vec![texts(["XEN_VERSION", "xen-3.0"])])),
        ("pci", Value::Array(Vec::new())),
    ])
}

fn devices(config: &DomainConfig, info: &DomainInfo, secrets: bool) -> Value {
    let vm = config.vm;
    let vbds = config.disks.iter().enumerate().map(|(i, disk)| vbd(vm, i, disk)).collect();
    let vifs = config.vifs.iter().enumerate().map(|(i, vif)| {
        structure([
            ("uuid", text(device_uuid(vm, 1, i))),
            ("mac", text(vif.mac)),
            ("bridge", text(&vif.bridge)),
            ("script", text("/etc/xen/scripts/vif-bridge")),
            ("backend", text("0")),
        ])
    });
    let mut map = Map::new();
    map.insert("vbd".to_owned(), Value::Array(vbds));
    map.insert("vif".to_owned(), Value::Array(vifs.collect()));
    let console = structure([
        ("protocol", text("vt100")),
        ("location", text(info.domid.0)),
        ("uuid", text(device_uuid(vm, 3, 0))),
    ]);
    map.insert("console".to_owned(), Value::Array(vec![console]));
    if let Some(vnc) = &config.vnc {
        let port = info.vnc_port.map_or_else(|| "0".to_owned(), |p| p.to_string());
        let vfb = structure([
            ("uuid", text(device_uuid(vm, 4, 0))),
            ("location", text(format_args!("{}:{port}", vnc.listen))),
            ("vnc", text("1")),
            ("vnclisten", text(vnc.listen)),
            ("vncunused", text(u8::from(vnc.display.is_none()))),
            ("vncpasswd", text(password(vnc, secrets))),
            ("keymap", text(vnc.keymap.as_ref().map_or("", |k| k.as_str()))),
            ("xauthority", text("")),
        ]);
        map.insert("vfb".to_owned(), Value::Array(vec![vfb]));
        map.insert("vkbd".to_owned(), Value::Array(vec![structure([("backend", text("0"))])]));
    }
    Value::Struct(map)
}

fn vbd(vm: VmId, index: usize, disk: &Disk) -> Value {
    let scheme = match disk.backing {
        DiskBacking::File => "file",
        DiskBacking::Phy => "phy",
    };
    let path = disk.path.as_ref().map_or("", |p| p.as_str());
    let kind = if disk.cdrom { "cdrom" } else { "disk" };
    structure([
        ("uuid", text(device_uuid(vm, 2, index))),
        ("uname", text(format_args!("{scheme}:{path}"))),
        ("dev", text(format_args!("{}:{kind}", disk.device.as_str()))),
        ("mode", text(mode_text(disk.mode))),
        ("bootable", text(u8::from(index == 0))),
        ("protocol", text("x86_64-abi")),
        ("backend", text("0")),
        ("VDI", text("")),
    ])
}

/// One element of `vm_list`.
pub fn summary(vm: &Vm, autostart_default: bool) -> Value {
    Value::Struct(summary_map(vm, autostart_default))
}

fn summary_map(vm: &Vm, autostart_default: bool) -> Map {
    let config = &vm.record.config;
    let fields = [
        ("uuid", text(config.vm)),
        ("name", text(&config.name)),
        ("state", text(vm.state().as_str())),
        ("repo_id", text(&vm.record.repo)),
        ("memory_mib", int(config.memory.0)),
        ("vcpus", int(config.vcpus)),
        ("domid", or_nil(vm.domain.as_ref().map(|d| int(d.domid.0)))),
        ("ha", Value::Bool(vm.record.ha)),
        ("autostart", Value::Bool(vm.record.starts_by_itself(autostart_default))),
    ];
    fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// `vm_get`.
/// `autostart_default`: where a VM was never asked about.
pub fn details(vm: &Vm, autostart_default: bool, secrets: bool) -> Value {
    let mut map = summary_map(vm, autostart_default);
    let record = &vm.record;
    let intent = match &record.intent {
        Intent::On => "on",
        Intent::Off => "off",
        Intent::Saved { .. } => "saved",
        Intent::Leaving(_) => "leaving",
    };
    let cause = record.last_end.map(|c| {
        text(serde_json::to_value(c).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default())
    });
    let state = vm.state();
    let may = Action::ALL
        .into_iter()
        .filter(|a| allowed(state, *a).is_ok())
        .flat_map(|action| super::vm::verbs_of(action).chain(super::migration::verbs_of(action)));
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("intent", text(intent));
    put("created", text(record.created));
    put("changed", text(record.changed));
    put("last_end", or_nil(cause));
    let place = record.autostart_place();
    put("autostart_order", int(place.order));
    put("autostart_delay", int(place.delay_s));
    put("config", config(record, secrets));
    put("allowed", texts(may));
    put("cores", texts(record.cores.iter().map(|c| &c.date)));
    put("vnc_port", or_nil(vm.domain.as_ref().and_then(|d| d.vnc_port).map(int)));
    put("cpu_time_ns", or_nil(vm.domain.as_ref().map(|d| int(d.cpu_time_ns))));
    put("started", or_nil(vm.domain.as_ref().map(|d| text(d.started))));
    Value::Struct(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use crate::model::{RepoId, Timestamp};
    use crate::wire::encode_value;

    fn record(params: &[(&str, Value)]) -> VmRecord {
        let settings = Settings::default().vm;
        let form = crate::api::vm_form::Form { verb: "create_vm", settings: &settings };
        let repo = RepoId::parse("0004fb0000030000aaaaaaaaaaaaaaaa").unwrap();
        let vm = VmId::parse("0004fb0000060000aaaaaaaaaaaaaaaa").unwrap();
        let params = params.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        form.create(repo, vm, &params, Timestamp(0)).unwrap()
    }

    fn lengths(value: &Value) -> Vec<usize> {
        let Value::Array(lists) = value else { panic!("{value:?}") };
        lists.iter().map(|list| if let Value::Array(list) = list { list.len() } else { panic!() }).collect()
    }

    #[test]
    fn the_cpus_of_a_wide_vm_are_the_hosts_and_no_more_than_a_quarter_mib() {
        let config = record(&[("cpus", text("0-4095")), ("vcpus", int(128))]).config;
        assert_eq!(lengths(&cpus(Some(&config), 2, 8)), [8, 8]);
        for host_cpus in [0, 1, 64, 512, 4096] {
            for config in [None, Some(&config)] {
                let shown = cpus(config, 128, host_cpus);
                assert_eq!(lengths(&shown).len(), 128);
                assert!(encode_value(&shown).0.len() <= 256 * 1024, "{host_cpus}");
            }
        }
        assert_eq!(lengths(&cpus(None, 64, 64)), [64; 64], "what is usual is shown whole");
    }

    #[test]
    fn a_managers_own_secrets_are_not_shown_to_viewers() {
        let record = record(&[("OVM_admin_password", text("geheim")), ("OVM_note", text("hello"))]);
        let shown = |secrets| format!("{:?}", config(&record, secrets));
        assert!(shown(true).contains("geheim"));
        assert!(!shown(false).contains("geheim") && shown(false).contains("hello"));
    }
}
