//! From the dialect's form of a VM (`create_vm`, `configure_vm`, `set_vm_config`) to our typed one. Closed: a key
//! we do not know is refused by name, except `OVM_*`, which is kept as the manager sent it, bounded and inert.

mod devices;

use super::arguments::{int, type_name};
use super::fault::{ApiFault, Result};
use crate::config;
use crate::model::{MiB, RepoId, SafePath, Text, Timestamp, VmId, VmName};
use crate::vm::{Intent, KeptText, KeptValue, VmRecord};
use crate::wire::Value;
use crate::xen::config::{
    Boot, BootOrder, DomainConfig, GuestType, MAX_DISKS, MAX_MEMORY, MAX_VCPUS, MAX_VIFS, OnEnd, PygrubArgs,
    TscMode,
};
use std::collections::BTreeMap;

/// Keys that are typed.
const TYPED: &[&str] = &[
    "name",
    "uuid",
    "memory",
    "maxmem",
    "vcpus",
    "maxvcpus",
    "cpu_weight",
    "cpu_cap",
    "cpus",
    "disk",
    "vif",
    "vfb",
    "bootloader",
    "bootargs",
    "bootloader_args",
    "extra",
    "kernel",
    "ramdisk",
    "boot",
    "builder",
    "type",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "tsc_mode",
    "acpi",
    "apic",
    "pae",
    "usb",
    "usbdevice",
    "serial",
    "localtime",
    "vnc",
    "vnclisten",
    "vncpasswd",
    "vncunused",
    "vncdisplay",
    "keymap",
    "sdl",
    "stdvga",
];

/// Keys of the dialect that mean nothing to us and are kept: shown back, never acted on. Managers send the two
/// `other_config` (limits of disks and vifs) empty; with something in them they are lists of lists, and refused.
#[rustfmt::skip]
const KEPT: &[&str] = &[
    "guest_os_type", "timer_mode", "device_model", "on_xend_start", "on_xend_stop", "description",
    "disk_other_config", "vif_other_config",
];

/// How many keys of a manager's own are kept.
const MAX_KEPT: usize = 64;
/// And how much they may be in all, so that a record stays small.
const MAX_KEPT_BYTES: usize = 32 * 1024;

type Map = BTreeMap<String, Value>;

/// Reads the dialect's form. `params` names the parameter in errors.
pub struct Form<'a> {
    pub verb: &'static str,
    pub settings: &'a config::Vm,
}

impl Form<'_> {
    fn wrong(&self, key: &str, why: impl std::fmt::Display) -> ApiFault {
        ApiFault::invalid(format!("{}: params.{key}: {why}", self.verb))
    }

    /// A new VM.
    pub fn create(&self, repo: RepoId, vm: VmId, params: &Map, now: Timestamp) -> Result<VmRecord> {
        let base = VmRecord {
            config: self.defaults(vm)?,
            repo,
            intent: Intent::Off,
            ha: false,
            kept: BTreeMap::new(),
            created: now,
            changed: now,
            last_end: None,
            cores: Vec::new(),
            checkpoint: None,
            crashes_in_a_row: 0,
            autostart: None,
            crash_seen: None,
        };
        self.merge(base, params)
    }

    fn defaults(&self, vm: VmId) -> Result<DomainConfig> {
        Ok(DomainConfig {
            vm,
            name: VmName::parse(&vm.as_str())?,
            guest: GuestType::Pv,
            boot: Boot::Pygrub { args: PygrubArgs::default(), extra: Text::default() },
            memory: MiB(256),
            max_memory: MiB(0),
            vcpus: 1,
            max_vcpus: 0,
            cpu_weight: 256,
            cpu_cap: 0,
            cpus: Vec::new(),
            disks: Vec::new(),
            vifs: Vec::new(),
            vnc: None,
            on_poweroff: OnEnd::Destroy,
            on_reboot: OnEnd::Restart,
            on_crash: OnEnd::Restart,
            tsc_mode: TscMode::Default,
            acpi: true,
            apic: true,
            pae: true,
            usb_tablet: false,
            serial_pty: false,
            localtime: false,
        })
    }

    /// The VM after `params`: what they do not name stays.
    pub fn merge(&self, mut record: VmRecord, params: &Map) -> Result<VmRecord> {
        self.known(params)?;
        self.identity(&record.config, params)?;
        self.keep(&mut record, params)?;
        let config = &mut record.config;
        if let Some(name) = self.text(params, "name")?.filter(|n| !n.is_empty()) {
            config.name = VmName::parse(name).map_err(|e| self.wrong("name", e))?;
        }
        self.sizes(config, params)?;
        self.guest_type(config, &record.kept, params)?;
        self.boot(config, params)?;
        if let Some(list) = self.list(params, "disk", MAX_DISKS)? {
            config.disks = list.iter().map(|d| self.disk(d)).collect::<Result<_>>()?;
            self.unique("disk", config.disks.iter().map(|d| d.device.as_str().to_owned()))?;
        }
        if let Some(list) = self.list(params, "vif", MAX_VIFS)? {
            config.vifs = list.iter().map(|v| self.vif(v)).collect::<Result<_>>()?;
            self.unique("vif", config.vifs.iter().map(|v| v.mac.as_str()))?;
        }
        self.vnc(config, params)?;
        self.ends(config, params)?;
        self.features(config, params)?;
        if let Some(Value::Bool(ha)) = params.get("OVM_high_availability") {
            record.ha = *ha;
        }
        Ok(record)
    }

    fn known(&self, params: &Map) -> Result<()> {
        let known = |k: &str| TYPED.contains(&k) || KEPT.contains(&k) || ovm_key(k);
        match params.keys().find(|k| !known(k)) {
            None => Ok(()),
            Some(key) => {
                let why = format!(
                    "unknown key {}; allowed: {}, {} and OVM_*",
                    crate::model::excerpt(key),
                    TYPED.join(", "),
                    KEPT.join(", ")
                );
                Err(ApiFault::invalid(format!("{}: params: {why}", self.verb)))
            }
        }
    }

    /// The same VM by either form of its id.
    fn identity(&self, config: &DomainConfig, params: &Map) -> Result<()> {
        let Some(uuid) = self.text(params, "uuid")?.filter(|u| !u.is_empty()) else { return Ok(()) };
        let uuid = VmId::parse(uuid).map_err(|e| self.wrong("uuid", e))?;
        if uuid != config.vm {
            return Err(self.wrong("uuid", format!("{uuid} is not the VM's id {}", config.vm)));
        }
        Ok(())
    }

    fn keep(&self, record: &mut VmRecord, params: &Map) -> Result<()> {
        for (key, value) in params.iter().filter(|(k, _)| KEPT.contains(&k.as_str()) || ovm_key(k)) {
            let text = |s: &str| KeptText::parse(s).map_err(|e| self.wrong(key, e));
            let kept = match value {
                Value::Bool(b) => KeptValue::Bool(*b),
                Value::String(s) => KeptValue::Text(text(s)?),
                Value::Array(list) if list.len() <= 64 => {
                    let item = |v: &Value| match v {
                        Value::String(s) => text(s),
                        other => {
                            Err(self.wrong(key, format!("holds a {}; allowed: strings", type_name(other))))
                        }
                    };
                    KeptValue::List(list.iter().map(item).collect::<Result<_>>()?)
                }
                other => match int(other) {
                    Some(n) => KeptValue::Int(n),
                    None => {
                        return Err(self.wrong(
                            key,
                            "is of the wrong type; allowed: string, int, boolean, up to 64 strings",
                        ));
                    }
                },
            };
            record.kept.insert(key.clone(), kept);
        }
        let bytes: usize = record.kept.iter().map(|(k, v)| k.len() + kept_bytes(v)).sum();
        if bytes > MAX_KEPT_BYTES {
            return Err(self.wrong("OVM_*", format!("{bytes} bytes in all, more than {MAX_KEPT_BYTES}")));
        }
        if record.kept.len() > MAX_KEPT {
            return Err(self.wrong("OVM_*", format!("{} keys, more than {MAX_KEPT}", record.kept.len())));
        }
        Ok(())
    }

    fn sizes(&self, config: &mut DomainConfig, params: &Map) -> Result<()> {
        if let Some(n) = self.number(params, "memory", 1..=MAX_MEMORY.0)? {
            let grown = config.max_memory < MiB(n);
            config.memory = MiB(n);
            if grown {
                config.max_memory = MiB(n);
            }
        }
        if let Some(n) = self.number(params, "maxmem", 0..=MAX_MEMORY.0)? {
            config.max_memory = MiB(n.max(config.memory.0));
        }
        config.max_memory = config.max_memory.max(config.memory);
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        if let Some(n) = self.number(params, "maxvcpus", 0..=u64::from(MAX_VCPUS))? {
            config.max_vcpus = small(n);
        }
        if let Some(n) = self.number(params, "vcpus", 1..=u64::from(MAX_VCPUS))? {
            config.vcpus = small(n);
        }
        // 0 means "as many as it has" (CloudStack sends it).
        config.max_vcpus = config.max_vcpus.max(config.vcpus);
        if let Some(n) = self.number(params, "cpu_weight", 1..=65_535)? {
            config.cpu_weight = u16::try_from(n).unwrap_or(u16::MAX);
        }
        let most_cap = u64::from(config.max_vcpus) * 100;
        if let Some(n) = self.number(params, "cpu_cap", 0..=most_cap)? {
            config.cpu_cap = u16::try_from(n).unwrap_or(u16::MAX);
        }
        if let Some(text) = self.text(params, "cpus")? {
            config.cpus = cpu_list(text).ok_or_else(|| {
                self.wrong(
                    "cpus",
                    "allowed: 0-3,5 (CPU numbers and ranges below 4096, at most 1024 bytes), or nothing",
                )
            })?;
        }
        Ok(())
    }

    fn guest_type(
        &self,
        config: &mut DomainConfig,
        kept: &BTreeMap<String, KeptValue>,
        params: &Map,
    ) -> Result<()> {
        let domain_type = match kept.get("OVM_domain_type") {
            Some(KeptValue::Text(text)) if params.contains_key("OVM_domain_type") => {
                text.as_str().to_ascii_lowercase()
            }
            _ => String::new(),
        };
        config.guest = match (self.text(params, "type")?, self.text(params, "builder")?) {
            (Some("pv"), _) => GuestType::Pv,
            (Some("pvh"), _) => GuestType::Pvh,
            (Some("hvm"), _) => GuestType::Hvm,
            (Some(other), _) => {
                return Err(self.wrong(
                    "type",
                    format!("{} is not one; allowed: pv, pvh, hvm", crate::model::excerpt(other)),
                ));
            }
            (None, Some("hvm")) => GuestType::Hvm,
            (None, Some("linux" | "generic" | "")) => GuestType::Pv,
            (None, Some(other)) => {
                return Err(self.wrong(
                    "builder",
                    format!("{} is not one; allowed: linux, generic, hvm", crate::model::excerpt(other)),
                ));
            }
            (None, None) if domain_type.contains("pvh") => GuestType::Pvh,
            (None, None) if domain_type.contains("hvm") => GuestType::Hvm,
            (None, None) if domain_type.contains("pvm") => GuestType::Pv,
            (None, None) => config.guest,
        };
        Ok(())
    }

    fn boot(&self, config: &mut DomainConfig, params: &Map) -> Result<()> {
        let kernel = self
            .text(params, "kernel")?
            .filter(|k| !k.is_empty() && k.rsplit('/').next() != Some("hvmloader"));
        let extra = self.text(params, "extra")?;
        let long = |key: &str, text: &str| Text::parse(text).map_err(|e| self.wrong(key, e));
        if let Some(kernel) = kernel {
            let kernel = self.kernel_file("kernel", kernel)?;
            let ramdisk = self.text(params, "ramdisk")?.filter(|r| !r.is_empty());
            let ramdisk = ramdisk.map(|r| self.kernel_file("ramdisk", r)).transpose()?;
            config.boot =
                Boot::Kernel { kernel, ramdisk, cmdline: long("extra", extra.unwrap_or_default())? };
            return Ok(());
        }
        if let Boot::Kernel { cmdline, .. } = &mut config.boot
            && !params.contains_key("bootloader")
            && !params.contains_key("boot")
        {
            if let Some(extra) = extra {
                *cmdline = long("extra", extra)?;
            }
            return Ok(());
        }
        if config.guest == GuestType::Hvm {
            if let Some(order) = self.text(params, "boot")?.filter(|b| !b.is_empty()) {
                let order = BootOrder::parse(order).map_err(|e| self.wrong("boot", e))?;
                config.boot = Boot::Firmware { order };
            } else if !matches!(config.boot, Boot::Firmware { .. }) {
                config.boot = Boot::Firmware { order: BootOrder::parse("cdn")? };
            }
            return Ok(());
        }
        let loader = self.text(params, "bootloader")?.unwrap_or_default();
        if !matches!(loader, "" | "pygrub" | "/usr/bin/pygrub" | "/usr/lib/xen/bin/pygrub") {
            return Err(self.wrong(
                "bootloader",
                format!("{} is not one; allowed: /usr/bin/pygrub, or nothing", crate::model::excerpt(loader)),
            ));
        }
        let (old_args, old_extra) = match &config.boot {
            Boot::Pygrub { args, extra } => (args.clone(), extra.clone()),
            _ => Default::default(),
        };
        // Two names of the dialect for the same.
        let named =
            ["bootargs", "bootloader_args"].map(|key| self.text(params, key).map(|t| t.map(|t| (key, t))));
        let [bootargs, bootloader_args] = named;
        let args = bootargs?.or(bootloader_args?);
        let args = args.map(|(key, a)| PygrubArgs::parse(a).map_err(|e| self.wrong(key, e))).transpose()?;
        let extra = extra.map(|e| long("extra", e)).transpose()?;
        config.boot = Boot::Pygrub { args: args.unwrap_or(old_args), extra: extra.unwrap_or(old_extra) };
        Ok(())
    }

    fn kernel_file(&self, key: &str, text: &str) -> Result<SafePath> {
        let path = SafePath::parse(text).map_err(|e| self.wrong(key, e))?;
        if path.is_below(&self.settings.kernels) {
            return Ok(path);
        }
        Err(self.wrong(
            key,
            format!("{path} is not below the kernel folder; allowed: files below {}", self.settings.kernels),
        ))
    }

    fn ends(&self, config: &mut DomainConfig, params: &Map) -> Result<()> {
        let parse = |key: &str| -> Result<Option<OnEnd>> {
            Ok(match self.text(params, key)? {
                None | Some("") => None,
                Some("destroy") => Some(OnEnd::Destroy),
                Some("restart" | "rename-restart") => Some(OnEnd::Restart),
                Some("preserve") => Some(OnEnd::Preserve),
                Some("coredump-destroy") => Some(OnEnd::CoredumpDestroy),
                Some("coredump-restart") => Some(OnEnd::CoredumpRestart),
                Some(other) => {
                    let why = format!(
                        "{} is not one; allowed: destroy, restart, preserve, coredump-destroy, coredump-restart",
                        crate::model::excerpt(other)
                    );
                    return Err(self.wrong(key, why));
                }
            })
        };
        config.on_poweroff = parse("on_poweroff")?.unwrap_or(config.on_poweroff);
        config.on_reboot = parse("on_reboot")?.unwrap_or(config.on_reboot);
        config.on_crash = parse("on_crash")?.unwrap_or(config.on_crash);
        Ok(())
    }

    fn features(&self, config: &mut DomainConfig, params: &Map) -> Result<()> {
        if let Some(value) = params.get("tsc_mode") {
            config.tsc_mode = match (value, int(value)) {
                (_, Some(0)) => TscMode::Default,
                (_, Some(1)) => TscMode::AlwaysEmulate,
                (_, Some(2)) => TscMode::Native,
                (_, Some(3)) => TscMode::NativeParavirt,
                (Value::String(s), _) if matches!(s.as_str(), "" | "default" | "0") => TscMode::Default,
                (Value::String(s), _) if matches!(s.as_str(), "always_emulate" | "1") => {
                    TscMode::AlwaysEmulate
                }
                (Value::String(s), _) if matches!(s.as_str(), "native" | "2") => TscMode::Native,
                (Value::String(s), _) if matches!(s.as_str(), "native_paravirt" | "3") => {
                    TscMode::NativeParavirt
                }
                _ => {
                    return Err(
                        self.wrong("tsc_mode", "allowed: default, always_emulate, native, native_paravirt")
                    );
                }
            };
        }
        config.acpi = self.flag(params, "acpi")?.unwrap_or(config.acpi);
        config.apic = self.flag(params, "apic")?.unwrap_or(config.apic);
        config.pae = self.flag(params, "pae")?.unwrap_or(config.pae);
        config.localtime = self.flag(params, "localtime")?.unwrap_or(config.localtime);
        if let Some(device) = self.text(params, "usbdevice")? {
            config.usb_tablet = match device {
                "tablet" => true,
                "" => false,
                _ => return Err(self.wrong("usbdevice", "allowed: tablet, or nothing")),
            };
        }
        if let Some(serial) = self.text(params, "serial")? {
            config.serial_pty = match serial {
                "pty" => true,
                "" | "none" => false,
                _ => return Err(self.wrong("serial", "allowed: pty, none")),
            };
        }
        Ok(())
    }

    fn text<'m>(&self, params: &'m Map, key: &str) -> Result<Option<&'m str>> {
        match params.get(key) {
            None | Some(Value::Nil) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, format!("is a {}; allowed: a string", type_name(other)))),
        }
    }

    /// A number, also as a string of digits (the dialect's clients send memory so).
    fn number(&self, params: &Map, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let n = match params.get(key) {
            None | Some(Value::Nil) => return Ok(None),
            Some(Value::String(text)) => text.parse::<u64>().ok(),
            Some(other) => int(other).and_then(|n| u64::try_from(n).ok()),
        };
        match n.filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                Err(self
                    .wrong(key, format!("allowed: a whole number from {} to {}", range.start(), range.end())))
            }
        }
    }

    fn flag(&self, params: &Map, key: &str) -> Result<Option<bool>> {
        match params.get(key) {
            None | Some(Value::Nil) => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(Value::Int(n @ (0 | 1))) => Ok(Some(*n == 1)),
            Some(Value::String(s)) if s == "1" || s == "0" => Ok(Some(s == "1")),
            Some(_) => Err(self.wrong(key, "allowed: a boolean, 0 or 1")),
        }
    }

    fn list<'m>(&self, params: &'m Map, key: &str, most: usize) -> Result<Option<Vec<&'m str>>> {
        let Some(value) = params.get(key) else { return Ok(None) };
        let Value::Array(list) = value else {
            return Err(self.wrong(key, format!("is a {}; allowed: an array of strings", type_name(value))));
        };
        if list.len() > most {
            return Err(self.wrong(key, format!("has {} entries; allowed: at most {most}", list.len())));
        }
        let text = |v: &'m Value| match v {
            Value::String(text) => Ok(text.as_str()),
            other => Err(self.wrong(key, format!("holds a {}; allowed: strings", type_name(other)))),
        };
        list.iter().map(text).collect::<Result<_>>().map(Some)
    }

    fn unique(&self, key: &str, names: impl Iterator<Item = String>) -> Result<()> {
        let mut seen = std::collections::BTreeSet::new();
        for name in names {
            if !seen.insert(name.clone()) {
                return Err(self.wrong(key, format!("{name} stands there twice")));
            }
        }
        Ok(())
    }
}

fn kept_bytes(value: &KeptValue) -> usize {
    match value {
        KeptValue::Bool(_) | KeptValue::Int(_) => 8,
        KeptValue::Text(text) => text.as_str().len(),
        KeptValue::List(list) => list.iter().map(|t| t.as_str().len() + 4).sum(),
    }
}

fn ovm_key(key: &str) -> bool {
    let plain = key.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_');
    key.len() <= 64 && key.starts_with("OVM_") && plain
}

/// Xen's own bound.
const MAX_CPUS: usize = 4096;
/// What a list of CPUs may be in length: many ranges that overlap cost nothing but time.
const MAX_CPU_LIST_BYTES: usize = 1024;

/// `0-3,5` as CPU numbers, each once and in order. A set of bits, so that ranges that overlap cost no memory.
fn cpu_list(text: &str) -> Option<Vec<u32>> {
    if text.len() > MAX_CPU_LIST_BYTES {
        return None;
    }
    let mut chosen = [false; MAX_CPUS];
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
        chosen.get_mut(from..=to).filter(|range| !range.is_empty())?.fill(true);
    }
    Some((0..).zip(chosen).filter(|(_, chosen)| *chosen).map(|(cpu, _)| cpu).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_cpus_is_numbers_and_ranges_below_4096_each_once_and_in_order() {
        assert_eq!(cpu_list("5,0-3,2-3,"), Some(vec![0, 1, 2, 3, 5]));
        assert_eq!(cpu_list(""), Some(Vec::new()));
        assert_eq!(cpu_list("0-4095").map(|cpus| cpus.len()), Some(MAX_CPUS));
        for bad in
            ["4096", "0-4096", "3-2", "9-0", "-", "1-", "x", "18446744073709551615", "0-18446744073709551615"]
        {
            assert_eq!(cpu_list(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_list_of_cpus_is_bounded_before_it_is_read() {
        assert!(cpu_list(&"0-4095,".repeat(146)).is_some());
        assert_eq!(cpu_list(&"0-4095,".repeat(147)), None);
    }

    #[test]
    fn no_part_of_a_vnc_password_is_repeated_in_an_error() {
        let settings = config::Settings::default().vm;
        let form = Form { verb: "create_vm", settings: &settings };
        for vfb in ["type=vnc,vncpasswd=a,geheimC", "type=vnc,vncpasswd=a,geheimC=b", "geheimC"] {
            let params = [("vfb".to_owned(), crate::api::value::texts([vfb]))].into();
            let repo = RepoId::parse("0004fb0000030000aaaaaaaaaaaaaaaa").unwrap();
            let vm = VmId::parse("0004fb0000060000aaaaaaaaaaaaaaaa").unwrap();
            let fault = form.create(repo, vm, &params, Timestamp(0)).unwrap_err();
            assert!(fault.text.contains("vfb: part "), "{fault}");
            assert!(!fault.text.contains("geheim"), "{fault}");
        }
    }
}
