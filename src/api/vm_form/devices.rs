//! The devices in the dialect's form: each one text of parts with commas.

use super::{Form, Map};
use crate::api::fault::Result;
use crate::model::{IfName, Mac, RepoId, SafePath};
use crate::xen::config::{
    Disk, DiskBacking, DiskDevice, DiskMode, DomainConfig, Keymap, Vif, VifModel, Vnc, VncPassword,
};
use std::net::{IpAddr, Ipv4Addr};

impl Form<'_> {
    /// `file:/OVS/Repositories/<repo>/VirtualDisks/x.img,xvda,w`, `phy:/dev/mapper/x,hda,w!`,
    /// `file:/…/x.iso,hdc:cdrom,r`.
    pub(super) fn disk(&self, text: &str) -> Result<Disk> {
        let wrong = |why: String| self.wrong("disk", format!("{}: {why}", crate::model::excerpt(text)));
        let form = || {
            wrong("allowed: file:PATH,DEVICE[:cdrom],MODE or phy:/dev/mapper/NAME,DEVICE,MODE, MODE one of r, w, w!".to_owned())
        };
        let parts: Vec<&str> = text.split(',').collect();
        let [place, device, mode] = parts[..] else { return Err(form()) };
        let (backing, path) = match place.split_once(':') {
            Some(("file", path)) => (DiskBacking::File, path),
            Some(("phy", path)) => (DiskBacking::Phy, path),
            None if place.is_empty() => (DiskBacking::File, ""),
            _ => return Err(form()),
        };
        let (device, kind) = device.split_once(':').unwrap_or((device, "disk"));
        let cdrom = match kind {
            "cdrom" => true,
            "disk" => false,
            _ => return Err(form()),
        };
        let mode = match mode {
            "r" | "r!" => DiskMode::ReadOnly,
            "w" => DiskMode::ReadWrite,
            "w!" => DiskMode::SharedReadWrite,
            _ => return Err(form()),
        };
        let path = match (path, backing) {
            ("", _) if cdrom => None,
            (path, DiskBacking::File) => Some(self.repository_file(path).map_err(wrong)?),
            (path, DiskBacking::Phy) => {
                let path = SafePath::parse(path).map_err(|e| wrong(e.to_string()))?;
                let mapper = SafePath::parse("/dev/mapper")?;
                if !path.is_below(&mapper) {
                    return Err(wrong("a block device lies below /dev/mapper".to_owned()));
                }
                Some(path)
            }
        };
        let device = DiskDevice::parse(&full_device(device)).map_err(|e| wrong(e.to_string()))?;
        Ok(Disk { backing, path, device, cdrom, mode })
    }

    fn repository_file(&self, text: &str) -> std::result::Result<SafePath, String> {
        let root = &self.settings.repositories;
        let path = SafePath::parse(text).map_err(|e| e.to_string())?;
        if !path.is_below(root) {
            return Err(format!(
                "is not below the repository folder; allowed: files below {root}/<repository id>/"
            ));
        }
        let rest = &path.as_str()[root.as_str().len() + 1..];
        match rest.split_once('/') {
            Some((repo, _)) => RepoId::parse(repo).map_err(|e| e.to_string())?,
            None => {
                return Err(format!(
                    "names no file in a repository; allowed: files below {root}/<repository id>/"
                ));
            }
        };
        Ok(path)
    }

    /// `mac=00:21:f6:00:00:01,bridge=xenbr0[,type=netfront|ioemu][,model=e1000|rtl8139][,vifname=x]`
    pub(super) fn vif(&self, text: &str) -> Result<Vif> {
        let wrong = |why: String| self.wrong("vif", format!("{}: {why}", crate::model::excerpt(text)));
        let (mut mac, mut bridge, mut ifname, mut model) = (None, None, None, VifModel::Netfront);
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            match part.split_once('=') {
                Some(("mac", v)) => mac = Some(Mac::parse(v).map_err(|e| wrong(e.to_string()))?),
                Some(("bridge", v)) => bridge = Some(IfName::parse(v).map_err(|e| wrong(e.to_string()))?),
                Some(("vifname", v)) => ifname = Some(IfName::parse(v).map_err(|e| wrong(e.to_string()))?),
                Some(("type", "netfront" | "vif")) => {}
                Some(("type", "ioemu")) if model == VifModel::Netfront => model = VifModel::Rtl8139,
                Some(("type", "ioemu")) => {}
                Some(("model", "e1000")) => model = VifModel::E1000,
                Some(("model", "rtl8139")) => model = VifModel::Rtl8139,
                _ => {
                    let why =
                        "allowed: mac=…,bridge=…[,type=netfront|ioemu][,model=e1000|rtl8139][,vifname=…]";
                    return Err(wrong(format!(
                        "{} is not a part of a vif; {why}",
                        crate::model::excerpt(part)
                    )));
                }
            }
        }
        match (mac, bridge) {
            (Some(mac), Some(bridge)) => Ok(Vif { mac, bridge, ifname, model }),
            _ => Err(wrong("mac and bridge are needed".to_owned())),
        }
    }

    /// From `vfb` (`type=vnc,vnclisten=0.0.0.0,…`) or, for HVM, from the keys beside it.
    pub(super) fn vnc(&self, config: &mut DomainConfig, params: &Map) -> Result<()> {
        if let Some(list) = self.list(params, "vfb", 1)? {
            config.vnc = match list.first() {
                None => None,
                Some(text) => {
                    let mut parts = Vec::new();
                    let given = text.split(',').map(str::trim).filter(|p| !p.is_empty());
                    for (part, number) in given.zip(1..) {
                        // Told by its place: it may be the rest of a password that has a comma.
                        let pair = part
                            .split_once('=')
                            .ok_or_else(|| self.wrong("vfb", format!("part {number} has no =")))?;
                        parts.push(pair);
                    }
                    Some(self.vnc_parts(None, &parts)?)
                }
            };
        }
        let beside = ["vnclisten", "vncpasswd", "vncdisplay", "keymap"];
        let mut parts = Vec::new();
        for key in beside {
            if let Some(text) = self.text(params, key)? {
                parts.push((key, text));
            }
        }
        let wanted = self.flag(params, "vnc")?;
        if wanted == Some(false) {
            config.vnc = None;
        } else if wanted == Some(true) || !parts.is_empty() {
            config.vnc = Some(self.vnc_parts(config.vnc.take(), &parts)?);
        }
        Ok(())
    }

    fn vnc_parts(&self, old: Option<Vnc>, parts: &[(&str, &str)]) -> Result<Vnc> {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut vnc = old.unwrap_or(Vnc { listen: local, display: None, password: None, keymap: None });
        for ((key, value), number) in parts.iter().zip(1..) {
            let wrong = |why: &dyn std::fmt::Display| self.wrong("vfb", format!("{key}: {why}"));
            match *key {
                "vnclisten" => vnc.listen = value.parse().map_err(|_| wrong(&"is not an IP address"))?,
                "vncpasswd" | "vncpassword" if value.is_empty() => vnc.password = None,
                "vncpasswd" | "vncpassword" => {
                    vnc.password = Some(VncPassword::parse(value).map_err(|e| wrong(&e))?)
                }
                "keymap" if value.is_empty() => vnc.keymap = None,
                "keymap" => vnc.keymap = Some(Keymap::parse(value).map_err(|e| wrong(&e))?),
                "vncdisplay" => {
                    let display = value.parse::<u16>().ok().filter(|d| *d < 59_000);
                    vnc.display = Some(display.ok_or_else(|| wrong(&"is not a number from 0 to 58999"))?);
                }
                "type" if *value == "vnc" => {}
                // Said by managers, and what we do anyway: a free display unless one is named.
                "vncunused" | "vncused" | "vnc" => {}
                _ => {
                    // Told by its place, see above.
                    let why = format!(
                        "part {number} is not a part of a vfb; allowed: type=vnc, vnclisten, vncpasswd, vncdisplay, vncunused, keymap"
                    );
                    return Err(self.wrong("vfb", why));
                }
            }
        }
        Ok(vnc)
    }
}

/// CloudStack names an HVM guest's disks by their letter alone: `c` for the third, after two it leaves free.
fn full_device(text: &str) -> String {
    match text.as_bytes() {
        [letter @ b'a'..=b'd'] => format!("hd{}", char::from(*letter)),
        [letter @ b'e'..=b'z'] => format!("xvd{}", char::from(*letter)),
        _ => text.to_owned(),
    }
}
