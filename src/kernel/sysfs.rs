//! What /sys/class/net tells of a link (Documentation/ABI/testing/sysfs-class-net): its driver, its speed, a bond's port in
//! use. A value that a link does not have is absent or cannot be read, and both are no error.

use crate::model::IfName;
use crate::model::network::LinkFacts;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A value is one line.
const MAX_BYTES: u64 = 4096;

/// `root`: `/sys/class/net`. `None`: there is no such link.
pub(super) fn facts(root: &Path, link: &IfName) -> Option<LinkFacts> {
    let folder = root.join(link.as_str());
    if !folder.is_dir() {
        return None;
    }
    let target = |path: &str| {
        let target = std::fs::read_link(folder.join(path)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    };
    Some(LinkFacts {
        driver: target("device/driver"),
        // `0000:03:00.0` on PCI, `vif-0` on Xen's bus.
        bus: target("device"),
        // -1: unknown.
        speed_mbps: value(&folder, "speed").and_then(|speed| speed.parse().ok()).filter(|speed| *speed != 0),
        full_duplex: match value(&folder, "duplex").as_deref() {
            Some("full") => Some(true),
            Some("half") => Some(false),
            _ => None,
        },
        active_port: value(&folder, "bonding/active_slave"),
        ..LinkFacts::default()
    })
}

fn value(folder: &Path, name: &str) -> Option<String> {
    let mut text = String::new();
    File::open(folder.join(name)).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(folder: &Path, values: &[(&str, &str)]) {
        for (name, text) in values {
            let file = folder.join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
    }

    #[test]
    fn a_cards_driver_bus_speed_and_duplex_are_told() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("eth0");
        write(&folder, &[("speed", "10000\n"), ("duplex", "full\n")]);
        let device = root.path().join("0000:03:00.0");
        std::fs::create_dir(&device).unwrap();
        symlink("../../bus/pci/drivers/ixgbe", device.join("driver")).unwrap();
        symlink("../0000:03:00.0", folder.join("device")).unwrap();
        let told = facts(root.path(), &"eth0".parse().unwrap()).unwrap();
        let expected = LinkFacts {
            driver: Some("ixgbe".to_owned()),
            bus: Some("0000:03:00.0".to_owned()),
            speed_mbps: Some(10_000),
            full_duplex: Some(true),
            ..LinkFacts::default()
        };
        assert_eq!(told, expected);
    }

    #[test]
    fn a_bond_tells_its_port_in_use_and_what_is_unknown_is_absent() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("bond0");
        write(&folder, &[("speed", "-1\n"), ("duplex", "unknown\n"), ("bonding/active_slave", "eth1\n")]);
        let told = facts(root.path(), &"bond0".parse().unwrap()).unwrap();
        assert_eq!(told, LinkFacts { active_port: Some("eth1".to_owned()), ..LinkFacts::default() });
        write(&folder, &[("bonding/active_slave", "\n")]);
        assert_eq!(facts(root.path(), &"bond0".parse().unwrap()), Some(LinkFacts::default()));
        assert_eq!(facts(root.path(), &"eth7".parse().unwrap()), None);
    }
}
