//! The units: systemd itself reads them, where it is installed, and they say what the daemon relies on.

use std::path::{Path, PathBuf};
use std::process::Command;

fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

fn values(name: &str, key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(unit(name)).expect("the unit can be read");
    text.lines().filter_map(|line| line.strip_prefix(&format!("{key}=")).map(str::to_owned)).collect()
}

#[test]
fn systemd_finds_no_fault_in_the_units() {
    // The folder has the units, and a program at the place that ExecStart names, which verify looks for.
    let folder = tempfile::tempdir().unwrap();
    for name in ["dom0d.service", "dom0d.socket"] {
        let text = std::fs::read_to_string(unit(name)).unwrap();
        let text = text.replace("/usr/sbin/dom0d", env!("CARGO_BIN_EXE_dom0d"));
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let units = ["dom0d.service", "dom0d.socket"].map(|name| folder.path().join(name));
    let output = match Command::new("systemd-analyze").args(["verify", "--man=no"]).args(units).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: systemd-analyze: {error}");
            return;
        }
    };
    let told = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<&str> = told.lines().filter(|line| line.contains("dom0d.s")).collect();
    assert!(ours.is_empty() && output.status.success(), "{told}");
}

#[test]
fn a_restart_of_the_daemon_never_ends_a_vms_processes() {
    assert_eq!(values("dom0d.service", "KillMode"), ["process"]);
}

#[test]
fn starting_the_daemon_stops_no_other_service() {
    assert_eq!(values("dom0d.service", "Conflicts"), [""; 0]);
}

#[test]
fn the_daemon_gets_no_mount_name_space_of_its_own() {
    for key in [
        "ProtectSystem",
        "ProtectHome",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
    ] {
        assert_eq!(values("dom0d.service", key), [""; 0], "{key}");
    }
}

#[test]
fn the_sockets_lie_where_the_settings_and_dom0ctl_look_for_them() {
    let listen = values("dom0d.socket", "ListenStream");
    let settings = dom0d::config::Settings::default();
    assert_eq!(listen, [settings.wire.listen.port().to_string(), dom0d::ctl::DEFAULT_SOCKET.to_owned()]);
    assert_eq!(Path::new(dom0d::ctl::DEFAULT_SOCKET), settings.state.dir.join("dom0d.sock"));
}
