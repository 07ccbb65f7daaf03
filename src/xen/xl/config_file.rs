//! xl.cfg, written from the typed configuration of a domain: the one writer, and the only way to a domain's
//! configuration.
//!
//! Every value is a number of ours, a word of ours, or a quoted string. In a quoted string xl's reader (libxlu)
//! ends at the quote and takes `\` as an escape, so these two and every control character are written as
//! escapes; nothing a caller says can end a string, a list or a line. Inside disk, vif and vfb strings commas
//! part the keys: their parts are of types that know no comma, and a disk's `target=` comes last, since it
//! swallows the rest.
//!
//! A domain that ends is always kept (`preserve`), whatever the VM's own rules say: our runner acts on its end.

use super::super::config::{Boot, Disk, DiskMode, DomainConfig, GuestType, TscMode, Vif, VifModel, Vnc};
use std::fmt::Write as _;
use std::net::IpAddr;

/// Why a configuration cannot be written. It names no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unwritable {
    #[error("a kernel's command line has a character that xl.cfg cannot hold")]
    Character,
    #[error("the firmware boots HVM guests only")]
    FirmwareOfNoHvm,
    #[error("an HVM guest has no boot loader in dom0")]
    PygrubOfHvm,
    #[error("a disk that is no CD-ROM needs a path")]
    NoPath,
}

/// The text of an xl.cfg.
pub fn write(config: &DomainConfig) -> Result<String, Unwritable> {
    let mut file = File(String::with_capacity(1024));
    let hvm = config.guest == GuestType::Hvm;
    file.text("name", config.name.as_str())?;
    file.text("uuid", &config.vm.to_string())?;
    file.text("type", guest_type(config.guest))?;
    file.number("memory", config.memory.0);
    file.number("maxmem", config.max_memory.0);
    file.number("vcpus", config.vcpus.into());
    file.number("maxvcpus", config.max_vcpus.into());
    file.number("cpu_weight", config.cpu_weight.into());
    file.number("cap", config.cpu_cap.into());
    if !config.cpus.is_empty() {
        let cpus: Vec<String> = config.cpus.iter().map(u32::to_string).collect();
        file.text("cpus", &cpus.join(","))?;
    }
    for event in ["on_poweroff", "on_reboot", "on_crash", "on_watchdog", "on_soft_reset"] {
        file.text(event, "preserve")?;
    }
    boot(&mut file, config)?;
    let disks = config.disks.iter().map(disk_spec).collect::<Result<Vec<_>, _>>()?;
    file.list("disk", &disks)?;
    let vifs: Vec<String> = config.vifs.iter().map(|vif| vif_spec(vif, config.guest)).collect();
    file.list("vif", &vifs)?;
    if config.tsc_mode != TscMode::Default {
        file.text("tsc_mode", tsc_mode(config.tsc_mode))?;
    }
    file.flag("localtime", config.localtime);
    if hvm {
        hvm_devices(&mut file, config)?;
    } else if let Some(vnc) = &config.vnc {
        file.list("vfb", &[vfb_spec(vnc)])?;
    }
    Ok(file.0)
}

pub(super) fn guest_type(guest: GuestType) -> &'static str {
    match guest {
        GuestType::Pv => "pv",
        GuestType::Pvh => "pvh",
        GuestType::Hvm => "hvm",
    }
}

pub(super) fn tsc_mode(mode: TscMode) -> &'static str {
    match mode {
        TscMode::Default => "default",
        TscMode::AlwaysEmulate => "always_emulate",
        TscMode::Native => "native",
        TscMode::NativeParavirt => "native_paravirt",
    }
}

fn boot(file: &mut File, config: &DomainConfig) -> Result<(), Unwritable> {
    let hvm = config.guest == GuestType::Hvm;
    match &config.boot {
        Boot::Pygrub { .. } if hvm => return Err(Unwritable::PygrubOfHvm),
        Boot::Firmware { .. } if !hvm => return Err(Unwritable::FirmwareOfNoHvm),
        Boot::Pygrub { args, extra } => {
            file.text("bootloader", "pygrub")?;
            let words: Vec<&str> = args.as_str().split_ascii_whitespace().collect();
            if !words.is_empty() {
                file.list("bootloader_args", &words)?;
            }
            if !extra.is_empty() {
                file.text("cmdline", extra.as_str())?;
            }
        }
        Boot::Kernel { kernel, ramdisk, cmdline } => {
            file.text("kernel", kernel.as_str())?;
            if let Some(ramdisk) = ramdisk {
                file.text("ramdisk", ramdisk.as_str())?;
            }
            if !cmdline.is_empty() {
                file.text("cmdline", cmdline.as_str())?;
            }
        }
        Boot::Firmware { order } => file.text("boot", order.as_str())?,
    }
    Ok(())
}

fn hvm_devices(file: &mut File, config: &DomainConfig) -> Result<(), Unwritable> {
    file.flag("acpi", config.acpi);
    file.flag("apic", config.apic);
    file.flag("pae", config.pae);
    if config.usb_tablet {
        file.flag("usb", true);
        file.text("usbdevice", "tablet")?;
    }
    if config.serial_pty {
        file.text("serial", "pty")?;
    }
    let Some(vnc) = &config.vnc else {
        file.flag("vnc", false);
        return Ok(());
    };
    file.flag("vnc", true);
    file.text("vnclisten", &vnc_listen(vnc))?;
    file.flag("vncunused", vnc.display.is_none());
    if let (Some(display), IpAddr::V4(_)) = (vnc.display, vnc.listen) {
        file.number("vncdisplay", display.into());
    }
    if let Some(password) = &vnc.password {
        file.text("vncpasswd", password.expose())?;
    }
    if let Some(keymap) = &vnc.keymap {
        file.text("keymap", keymap.as_str())?;
    }
    Ok(())
}

/// libxl takes an address with a colon for one with a display, so an IPv6 one comes with both.
fn vnc_listen(vnc: &Vnc) -> String {
    match vnc.listen {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]:{}", vnc.display.unwrap_or(0)),
    }
}

fn vfb_spec(vnc: &Vnc) -> String {
    let unused = u8::from(vnc.display.is_none());
    let mut spec = format!("vnc=1,vnclisten={},vncunused={unused}", vnc_listen(vnc));
    if let (Some(display), IpAddr::V4(_)) = (vnc.display, vnc.listen) {
        let _ = write!(spec, ",vncdisplay={display}");
    }
    if let Some(password) = &vnc.password {
        let _ = write!(spec, ",vncpasswd={}", password.expose());
    }
    if let Some(keymap) = &vnc.keymap {
        let _ = write!(spec, ",keymap={}", keymap.as_str());
    }
    spec
}

/// One disk as `disk = [...]` and `xl block-attach` take it.
pub fn disk_spec(disk: &Disk) -> Result<String, Unwritable> {
    let access = if disk.mode == DiskMode::ReadOnly || disk.cdrom { "ro" } else { "rw" };
    let mut spec = format!("format=raw,vdev={},access={access}", disk.device.as_str());
    if disk.cdrom {
        spec.push_str(",devtype=cdrom");
    }
    if disk.mode == DiskMode::SharedReadWrite && !disk.cdrom {
        // The kernel's backend goes with a script that refuses a disk another domain writes to.
        spec.push_str(",backendtype=qdisk");
    }
    match &disk.path {
        Some(path) => {
            let _ = write!(spec, ",target={path}");
        }
        None if disk.cdrom => {}
        None => return Err(Unwritable::NoPath),
    }
    Ok(spec)
}

/// One network card as `vif = [...]` takes it; its parts, separately, are what `xl network-attach` takes.
pub fn vif_spec(vif: &Vif, guest: GuestType) -> String {
    let mut spec = format!("mac={},bridge={}", vif.mac, vif.bridge);
    if let Some(name) = &vif.ifname {
        let _ = write!(spec, ",vifname={name}");
    }
    if guest == GuestType::Hvm {
        spec.push_str(match vif.model {
            VifModel::Netfront => ",type=vif",
            VifModel::E1000 => ",type=ioemu,model=e1000",
            VifModel::Rtl8139 => ",type=ioemu,model=rtl8139",
        });
    }
    spec
}

struct File(String);

impl File {
    fn number(&mut self, key: &str, value: u64) {
        let _ = writeln!(self.0, "{key} = {value}");
    }

    fn flag(&mut self, key: &str, value: bool) {
        self.number(key, value.into());
    }

    fn text(&mut self, key: &str, value: &str) -> Result<(), Unwritable> {
        let _ = writeln!(self.0, "{key} = {}", quoted(value)?);
        Ok(())
    }

    fn list<T: AsRef<str>>(&mut self, key: &str, values: &[T]) -> Result<(), Unwritable> {
        let quoted = values.iter().map(|value| quoted(value.as_ref())).collect::<Result<Vec<_>, _>>()?;
        let _ = writeln!(self.0, "{key} = [ {} ]", quoted.join(", "));
        Ok(())
    }
}

/// A string of xl.cfg.
fn quoted(text: &str) -> Result<String, Unwritable> {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => return Err(Unwritable::Character),
            c => out.push(c),
        }
    }
    out.push('"');
    Ok(out)
}
