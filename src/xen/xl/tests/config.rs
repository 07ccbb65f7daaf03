//! The written configuration, read again: by a small reader of xl.cfg here (libxlu's rules), and by xl itself in the
//! lab. Nothing that a caller says becomes a key, a list or a line.

use super::super::{config_file, json};
use super::calls::config;
use crate::model::{IfName, Mac, MiB, SafePath, Text, VmId, VmName};
use crate::xen::config::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::net::IpAddr;

#[derive(Debug, Clone, PartialEq)]
enum Value {
    One(String),
    Many(Vec<String>),
}

/// Reads xl.cfg as libxlu does: `key = value` a line, strings with escapes, lists of strings.
fn read(text: &str) -> BTreeMap<String, Value> {
    let mut keys = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find('=').expect("a key and its value");
        let key = rest[..at].trim();
        assert!(key.bytes().all(|c| c.is_ascii_lowercase() || c == b'_'), "no key: {key:?}");
        rest = rest[at + 1..].trim_start_matches(' ');
        let value = match rest.as_bytes()[0] {
            b'[' => {
                let mut values = Vec::new();
                rest = rest[1..].trim_start_matches([' ', ',']);
                while !rest.starts_with(']') {
                    values.push(string(&mut rest));
                    rest = rest.trim_start_matches([' ', ',']);
                }
                rest = &rest[1..];
                Value::Many(values)
            }
            b'"' => Value::One(string(&mut rest)),
            _ => {
                let end = rest.find('\n').unwrap();
                let number = rest[..end].to_owned();
                assert!(number.bytes().all(|c| c.is_ascii_digit()), "no number: {number:?}");
                rest = &rest[end..];
                Value::One(number)
            }
        };
        rest = rest.strip_prefix('\n').expect("one setting a line");
        assert_eq!(keys.insert(key.to_owned(), value), None, "{key} twice");
    }
    keys
}

fn string(rest: &mut &str) -> String {
    assert!(rest.starts_with('"'), "no string: {rest:?}");
    let mut out = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => {
                *rest = &rest[at + 1..];
                return out;
            }
            '\\' => out.push(match chars.next().unwrap().1 {
                'n' => '\n',
                't' => '\t',
                c @ ('"' | '\\') => c,
                other => panic!("an escape that libxlu does not know: {other}"),
            }),
            '\n' => panic!("a line ends in a string"),
            c => out.push(c),
        }
    }
    panic!("a string without end")
}

fn one(keys: &BTreeMap<String, Value>, key: &str) -> String {
    match keys.get(key) {
        Some(Value::One(text)) => text.clone(),
        other => panic!("{key}: {other:?}"),
    }
}

fn many(keys: &BTreeMap<String, Value>, key: &str) -> Vec<String> {
    match keys.get(key) {
        Some(Value::Many(list)) => list.clone(),
        other => panic!("{key}: {other:?}"),
    }
}

fn kernel(cmdline: &str) -> Boot {
    Boot::Kernel {
        kernel: SafePath::parse("/k/vmlinuz").unwrap(),
        ramdisk: None,
        cmdline: Text::parse(cmdline).unwrap(),
    }
}

const KEYS: [&str; 29] = [
    "name",
    "uuid",
    "type",
    "memory",
    "maxmem",
    "vcpus",
    "maxvcpus",
    "cpu_weight",
    "cap",
    "cpus",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_watchdog",
    "on_soft_reset",
    "bootloader",
    "bootloader_args",
    "cmdline",
    "kernel",
    "ramdisk",
    "boot",
    "disk",
    "vif",
    "vfb",
    "tsc_mode",
    "localtime",
    "acpi",
    "apic",
    "pae",
];
const HVM_KEYS: [&str; 10] = [
    "usb",
    "usbdevice",
    "serial",
    "vnc",
    "vnclisten",
    "vncunused",
    "vncdisplay",
    "vncpasswd",
    "keymap",
    "nothing",
];

#[test]
fn no_string_of_a_caller_becomes_a_key() {
    for hostile in [
        "x\"\nkernel = \"/etc/shadow",
        "x'\ndevice_model_override='/tmp/x'",
        "]\npci = [ \"00:00.0\"",
        "\\\"\nbootloader=\"/bin/x",
        "\\",
        "\\\\\"",
        "device_model_args = [ \"-monitor\" ]",
        "xen_platform_pci=0, backend=1, script=/tmp/x",
        "vnclisten=0.0.0.0",
    ] {
        let keys = read(&config_file::write(&DomainConfig { boot: kernel(hostile), ..config() }).unwrap());
        assert_eq!(one(&keys, "cmdline"), hostile);
        assert_eq!(one(&keys, "kernel"), "/k/vmlinuz");
        assert!(keys.keys().all(|key| KEYS.contains(&key.as_str())), "{keys:?}");
        let extra = Boot::Pygrub { args: PygrubArgs::default(), extra: Text::parse(hostile).unwrap() };
        let keys = read(&config_file::write(&DomainConfig { boot: extra, ..config() }).unwrap());
        assert_eq!((one(&keys, "cmdline").as_str(), one(&keys, "bootloader").as_str()), (hostile, "pygrub"));
    }
}

#[test]
fn a_domain_that_ends_is_kept_whatever_the_vm_says() {
    let text = config_file::write(&DomainConfig { on_crash: OnEnd::CoredumpRestart, ..config() }).unwrap();
    let keys = read(&text);
    for event in ["on_poweroff", "on_reboot", "on_crash", "on_watchdog", "on_soft_reset"] {
        assert_eq!(one(&keys, event), "preserve");
    }
}

#[test]
fn what_cannot_boot_is_not_written() {
    let firmware = Boot::Firmware { order: BootOrder::parse("c").unwrap() };
    let pv = DomainConfig { boot: firmware, ..config() };
    assert_eq!(config_file::write(&pv), Err(config_file::Unwritable::FirmwareOfNoHvm));
    let hvm = DomainConfig { guest: GuestType::Hvm, ..config() };
    assert_eq!(config_file::write(&hvm), Err(config_file::Unwritable::PygrubOfHvm));
}

#[test]
fn the_path_of_a_disk_comes_last_and_an_empty_drive_has_none() {
    let disk = Disk {
        backing: DiskBacking::File,
        path: Some(SafePath::parse("/a/b=c.img").unwrap()),
        device: DiskDevice::parse("xvda").unwrap(),
        cdrom: false,
        mode: DiskMode::ReadWrite,
    };
    let spec = config_file::disk_spec(&disk).unwrap();
    assert_eq!(spec, "format=raw,vdev=xvda,access=rw,target=/a/b=c.img");
    let empty = Disk { cdrom: true, path: None, ..disk.clone() };
    assert_eq!(config_file::disk_spec(&empty).unwrap(), "format=raw,vdev=xvda,access=ro,devtype=cdrom");
    assert!(config_file::disk_spec(&Disk { path: None, ..disk }).is_err());
}

/// What xl tells of a running domain (`xl list -l`), a plain one of each kind.
const TOLD: &str = r#"[{"domid":0,"config":{"c_info":{"type":"pv","name":"Domain-0"}}},{"domid":6,"config":{
 "c_info":{"type":"pv","name":"pv1","domid":4294967295,"uuid":"98cd556e-8b89-4870-8957-8c0d9a96dbb4","run_hotplug_scripts":"True"},
 "b_info":{"max_vcpus":2,"avail_vcpus":[0],"max_memkb":163840,"target_memkb":98304,"video_memkb":0,
  "sched_params":{"sched":"credit2","weight":300,"cap":20},"kernel":"/lab/vmlinux","cmdline":"console=hvc0 \"x\"",
  "ramdisk":"/lab/domu.cpio","tsc_mode":"native","vcpu_hard_affinity":[[0,2],[0,2]],"type.pv":{},"arch_x86":{"msr_relaxed":"False"}},
 "disks":[{"pdev_path":"/dev/vdb","vdev":"xvda","format":"raw","readwrite":1},{"pdev_path":"/r/i.iso","vdev":"xvdc","format":"raw","removable":1,"is_cdrom":1}],
 "nics":[{"devid":0,"mac":"00:16:3e:00:00:01","bridge":"xenbr0","nictype":"vif"}],
 "vfbs":[{"devid":0,"vnc":{"enable":"True","listen":"0.0.0.0","passwd":"secret","findunused":"False","display":7}}],
 "on_reboot":"restart"}}]"#;

#[test]
fn what_xl_tells_of_a_domain_is_made_a_configuration_again() {
    let told = json::domain(TOLD.as_bytes(), crate::xen::DomId(6)).unwrap();
    assert_eq!((told.guest, told.memory, told.max_memory), (GuestType::Pv, MiB(96), MiB(160)));
    assert_eq!((told.vcpus, told.max_vcpus, told.cpu_weight, told.cpu_cap), (1, 2, 300, 20));
    assert_eq!((told.cpus.as_slice(), told.tsc_mode), (&[0, 2][..], TscMode::Native));
    let Boot::Kernel { cmdline, ramdisk, .. } = &told.boot else { panic!("{:?}", told.boot) };
    assert_eq!((cmdline.as_str(), ramdisk.is_some()), ("console=hvc0 \"x\"", true));
    let disks: Vec<_> = told.disks.iter().map(|d| (d.device.as_str(), d.backing, d.mode, d.cdrom)).collect();
    let expected = [
        ("xvda", DiskBacking::Phy, DiskMode::ReadWrite, false),
        ("xvdc", DiskBacking::File, DiskMode::ReadOnly, true),
    ];
    assert_eq!(disks, expected);
    let vnc = told.vnc.unwrap();
    assert_eq!((vnc.listen.to_string().as_str(), vnc.display), ("0.0.0.0", Some(7)));
    assert_eq!(
        json::domain(TOLD.as_bytes(), crate::xen::DomId(7)).map(drop),
        Err(crate::xen::ToolstackError::NoSuchDomain)
    );
}

fn any_disk() -> impl Strategy<Value = Disk> {
    ("xvd[a-z]", "/[a-z=:@.+~-]{1,30}x", any::<bool>(), 0..3_u8).prop_filter_map(
        "a path",
        |(device, path, cdrom, mode)| {
            Some(Disk {
                backing: DiskBacking::File,
                path: Some(SafePath::parse(&path).ok()?),
                device: DiskDevice::parse(&device).ok()?,
                cdrom,
                mode: [DiskMode::ReadOnly, DiskMode::ReadWrite, DiskMode::SharedReadWrite][usize::from(mode)],
            })
        },
    )
}

fn any_vnc() -> impl Strategy<Value = Vnc> {
    let listen =
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)];
    (listen, proptest::option::of(0..100_u16), proptest::option::of("[A-Za-z0-9_.+:@-]{1,20}")).prop_map(
        |(listen, display, password)| Vnc {
            listen,
            display,
            password: password.map(|p| VncPassword::parse(&p).unwrap()),
            keymap: Keymap::parse("en-us").ok(),
        },
    )
}

prop_compose! {
    fn any_config()(
        name in "[A-Za-z0-9_][A-Za-z0-9_.+:@-]{0,30}",
        guest in 0..3_u8,
        cmdline in "[ -~\n\té€]{0,60}",
        (memory, vcpus, weight, cap) in (1..1_000_000_u64, 1..128_u32, 1..=u16::MAX, any::<u16>()),
        cpus in proptest::collection::vec(0..64_u32, 0..4),
        disks in proptest::collection::vec(any_disk(), 0..4),
        macs in proptest::collection::vec(any::<[u8; 5]>(), 0..3),
        vnc in proptest::option::of(any_vnc()),
        flags in any::<[bool; 6]>(),
        vm in any::<[u8; 16]>(),
    ) -> DomainConfig {
        let [acpi, apic, pae, usb_tablet, serial_pty, localtime] = flags;
        DomainConfig {
            vm: VmId::from_bytes(vm),
            name: VmName::parse(&name).unwrap(),
            guest: [GuestType::Pv, GuestType::Pvh, GuestType::Hvm][usize::from(guest)],
            boot: kernel(&cmdline),
            memory: MiB(memory),
            max_memory: MiB(memory + 7),
            vcpus,
            max_vcpus: vcpus + 1,
            cpu_weight: weight,
            cpu_cap: cap,
            cpus,
            disks,
            vifs: macs.into_iter().map(|m| Vif {
                mac: Mac::from_bytes([2, m[0], m[1], m[2], m[3], m[4]]),
                bridge: IfName::parse("xenbr0.7").unwrap(),
                ifname: IfName::parse("tap-x").ok(),
                model: VifModel::E1000,
            }).collect(),
            vnc,
            acpi, apic, pae, usb_tablet, serial_pty, localtime,
            ..config()
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_again_and_nothing_else(config in any_config()) {
        let keys = read(&config_file::write(&config).unwrap());
        prop_assert!(keys.keys().all(|k| KEYS.contains(&k.as_str()) || HVM_KEYS.contains(&k.as_str())));
        prop_assert_eq!(one(&keys, "name"), config.name.as_str());
        prop_assert_eq!(one(&keys, "uuid"), config.vm.to_string());
        prop_assert_eq!(one(&keys, "memory"), config.memory.0.to_string());
        prop_assert_eq!(one(&keys, "maxvcpus"), config.max_vcpus.to_string());
        prop_assert_eq!(one(&keys, "cap"), config.cpu_cap.to_string());
        let Boot::Kernel { cmdline, .. } = &config.boot else { unreachable!() };
        prop_assert_eq!(keys.contains_key("cmdline"), !cmdline.is_empty());
        if !cmdline.is_empty() {
            prop_assert_eq!(one(&keys, "cmdline"), cmdline.as_str());
        }
        let disks = many(&keys, "disk");
        prop_assert_eq!(disks.len(), config.disks.len());
        for (spec, disk) in disks.iter().zip(&config.disks) {
            let path = disk.path.as_ref().unwrap();
            prop_assert_eq!(spec.split_once(",target=").unwrap().1, path.as_str());
        }
        let vifs = many(&keys, "vif");
        prop_assert_eq!(vifs.len(), config.vifs.len());
        for (spec, vif) in vifs.iter().zip(&config.vifs) {
            let mac = format!("mac={},", vif.mac);
            prop_assert!(spec.starts_with(&mac));
        }
    }
}
