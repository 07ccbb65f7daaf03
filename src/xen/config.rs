//! What a domain is built from: typed and closed. No free-form key exists, so none can reach xl.cfg.

use crate::model::{BridgeName, IfName, Mac, MiB, SafePath, Text, VmId, VmName};
use serde::{Deserialize, Serialize};

/// How the guest is virtualised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestType {
    Pv,
    Pvh,
    Hvm,
}

/// What the guest boots from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// `/usr/bin/pygrub` reads the guest's own boot menu (PV, PVH). `extra` goes behind the kernel's own
    /// command line.
    Pygrub { args: PygrubArgs, extra: Text<1024> },
    /// A kernel of the settings' kernel folder (PV, PVH, HVM).
    Kernel { kernel: SafePath, ramdisk: Option<SafePath>, cmdline: Text<1024> },
    /// The firmware's boot order (HVM): letters of `c` disk, `d` CD-ROM, `n` network, each at most once.
    Firmware { order: BootOrder },
}

/// Arguments of pygrub. It runs in dom0 as root, and some of its options write files: only those that choose
/// from the guest's own menu are let through.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PygrubArgs(String);

impl PygrubArgs {
    pub fn parse(text: &str) -> Result<Self, crate::model::Invalid> {
        let plain = |s: &str| s.bytes().all(|c| c.is_ascii_alphanumeric() || b"_.-".contains(&c));
        let good = |word: &str| match word.strip_prefix("--entry=") {
            Some(entry) => !entry.is_empty() && plain(entry),
            None => matches!(word, "-q" | "--quiet"),
        };
        if text.len() <= 256 && text.split_ascii_whitespace().all(good) {
            return Ok(Self(text.to_owned()));
        }
        let problem = format!("{} are not", crate::model::excerpt(text));
        Err(crate::model::Invalid::new("pygrub arguments", problem, "-q, --quiet, --entry=NUMBER-OR-NAME"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PygrubArgs {
    type Error = crate::model::Invalid;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<PygrubArgs> for String {
    fn from(args: PygrubArgs) -> Self {
        args.0
    }
}

/// See [`Boot::Firmware`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BootOrder(String);

impl BootOrder {
    pub fn parse(text: &str) -> Result<Self, crate::model::Invalid> {
        let good = (1..=3).contains(&text.len())
            && text.chars().all(|c| "cdn".contains(c))
            && text.chars().enumerate().all(|(i, c)| !text[..i].contains(c));
        if good {
            return Ok(Self(text.to_owned()));
        }
        let problem = format!("{} is not one", crate::model::excerpt(text));
        Err(crate::model::Invalid::new("boot order", problem, "letters of c, d, n, each at most once"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BootOrder {
    type Error = crate::model::Invalid;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<BootOrder> for String {
    fn from(order: BootOrder) -> Self {
        order.0
    }
}

/// What the toolstack does is always nothing; this is what *our* runner does when a domain ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnEnd {
    Destroy,
    Restart,
    Preserve,
    CoredumpDestroy,
    CoredumpRestart,
}

/// xl.cfg(5), `tsc_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum TscMode {
    #[default]
    Default,
    AlwaysEmulate,
    Native,
    NativeParavirt,
}

/// The guest's name for a disk: `xvda`…`xvdzz`, `hda`…`hdd`, `sda`…`sdp`, each with an optional partition
/// number for `xvd`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskDevice(String);

impl DiskDevice {
    pub fn parse(text: &str) -> Result<Self, crate::model::Invalid> {
        let letters = |s: &str, last: char| s.len() == 1 && s.chars().all(|c| ('a'..=last).contains(&c));
        let good = if let Some(rest) = text.strip_prefix("xvd") {
            let unit = rest.trim_end_matches(|c: char| c.is_ascii_digit());
            let number = &rest[unit.len()..];
            (1..=2).contains(&unit.len())
                && unit.bytes().all(|c| c.is_ascii_lowercase())
                && (number.is_empty() || (number.len() <= 2 && !number.starts_with('0')))
        } else if let Some(rest) = text.strip_prefix("hd") {
            letters(rest, 'd')
        } else if let Some(rest) = text.strip_prefix("sd") {
            letters(rest, 'p')
        } else {
            false
        };
        if good {
            return Ok(Self(text.to_owned()));
        }
        let problem = format!("{} is not one", crate::model::excerpt(text));
        Err(crate::model::Invalid::new("disk device", problem, "xvda to xvdzz, hda to hdd, sda to sdp"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DiskDevice {
    type Error = crate::model::Invalid;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<DiskDevice> for String {
    fn from(device: DiskDevice) -> Self {
        device.0
    }
}

/// How a disk may be used by the guest and beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskMode {
    ReadOnly,
    ReadWrite,
    /// `w!`: writable although another domain may write to it.
    SharedReadWrite,
}

/// What a disk's backing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskBacking {
    /// A raw image file.
    File,
    /// A block device.
    Phy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub backing: DiskBacking,
    /// `None`: an empty CD-ROM drive.
    pub path: Option<SafePath>,
    pub device: DiskDevice,
    pub cdrom: bool,
    pub mode: DiskMode,
}

/// How the guest sees its network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VifModel {
    Netfront,
    /// An emulated e1000 beside the paravirtual one (HVM).
    E1000,
    Rtl8139,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vif {
    pub mac: Mac,
    pub bridge: BridgeName,
    /// The interface's name in dom0; Xen's own (`vif<domid>.<n>`) if `None`.
    pub ifname: Option<IfName>,
    pub model: VifModel,
}

/// A VNC console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vnc {
    pub listen: std::net::IpAddr,
    /// A fixed display number (port 5900 + n), or the first free one.
    pub display: Option<u16>,
    /// At most 8 significant characters (RFB); kept here because the domain is built with it.
    pub password: Option<VncPassword>,
    /// `en-us`, `de`, …: `[a-z-]{2,8}`.
    pub keymap: Option<Keymap>,
}

/// A VNC password: shown as `***`, but written to the VM's record, since the domain is built from that.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VncPassword(String);

impl VncPassword {
    pub fn parse(text: &str) -> Result<Self, crate::model::Invalid> {
        let good =
            text.len() <= 64 && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"_.+:@-".contains(&c));
        if good {
            return Ok(Self(text.to_owned()));
        }
        Err(crate::model::Invalid::new(
            "VNC password",
            "is not one",
            "up to 64 letters, digits and _ . + : @ -",
        ))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for VncPassword {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Keymap(String);

impl Keymap {
    pub fn parse(text: &str) -> Result<Self, crate::model::Invalid> {
        if (2..=8).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_lowercase() || c == b'-') {
            return Ok(Self(text.to_owned()));
        }
        let problem = format!("{} is not one", crate::model::excerpt(text));
        Err(crate::model::Invalid::new("keymap", problem, "2 to 8 letters and -"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Keymap {
    type Error = crate::model::Invalid;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<Keymap> for String {
    fn from(keymap: Keymap) -> Self {
        keymap.0
    }
}

/// Everything a domain is built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainConfig {
    pub vm: VmId,
    pub name: VmName,
    pub guest: GuestType,
    pub boot: Boot,
    pub memory: MiB,
    pub max_memory: MiB,
    pub vcpus: u32,
    pub max_vcpus: u32,
    /// Credit scheduler: 1 to 65535.
    pub cpu_weight: u16,
    /// Per cent of one CPU; 0: no cap.
    pub cpu_cap: u16,
    /// CPUs it may run on; empty: all.
    pub cpus: Vec<u32>,
    pub disks: Vec<Disk>,
    pub vifs: Vec<Vif>,
    pub vnc: Option<Vnc>,
    pub on_poweroff: OnEnd,
    pub on_reboot: OnEnd,
    pub on_crash: OnEnd,
    pub tsc_mode: TscMode,
    /// HVM: the guest sees ACPI, APIC, PAE.
    pub acpi: bool,
    pub apic: bool,
    pub pae: bool,
    /// HVM: an emulated USB tablet, so that a VNC pointer follows.
    pub usb_tablet: bool,
    /// A serial console on a pseudo-terminal (HVM).
    pub serial_pty: bool,
    /// Real-time clock in local time instead of UTC.
    pub localtime: bool,
}

/// Bounds that hold for any domain (Xen 4.17: HVM_MAX_VCPUS 128, PV 512; we keep the smaller).
pub const MAX_VCPUS: u32 = 128;
pub const MAX_MEMORY: MiB = MiB(16 * 1024 * 1024);
pub const MAX_DISKS: usize = 100;
pub const MAX_VIFS: usize = 31;
