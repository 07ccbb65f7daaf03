//! Which links another service of the host configures, by the files that these services keep:
//! * NetworkManager: `/run/NetworkManager/devices/IFINDEX`, a key file with `managed=true` in `[device]`
//!   (`nm_config_device_state_write`, src/core/nm-config.c); a link counts if a connection is active on it.
//! * systemd-networkd: `/run/systemd/netif/links/IFINDEX` with `ADMIN_STATE=` (sd-network(3), networkctl(1)); one of the
//!   states `unmanaged`, `pending` and `initialized` means that it leaves the link alone, or has not decided.
//! * ifupdown: `/run/network/ifstate` holds what it has brought up, and `/etc/network/interfaces` what it would
//!   (interfaces(5)); the latter counts only where the former is, since other systems leave such files about.

use crate::model::IfName;
use crate::model::network::Owner;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Of one file, and of one folder.
const MAX_BYTES: u64 = 256 * 1024;
const MAX_FILES: usize = 4096;

/// The root of the files: `/` but for tests.
#[derive(Debug, Clone)]
pub(super) struct Files {
    root: PathBuf,
}

impl Default for Files {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

impl Files {
    #[cfg(test)]
    fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// `names`: the links that there are, by their numbers. A file of a link that has gone owns nothing.
    pub(super) fn owners(&self, names: &BTreeMap<u32, IfName>) -> BTreeMap<IfName, Owner> {
        let mut owners = BTreeMap::new();
        let ifupdown = self.ifupdown();
        for name in names.values().filter(|name| ifupdown.contains(name.as_str())) {
            owners.insert(name.clone(), Owner::Ifupdown);
        }
        let by_number = [
            ("run/systemd/netif/links", Owner::Networkd, is_networkds as fn(&str) -> bool),
            ("run/NetworkManager/devices", Owner::NetworkManager, is_network_managers),
        ];
        for (folder, owner, is_its) in by_number {
            let folder = self.root.join(folder);
            for (index, name) in names {
                if read(&folder.join(index.to_string())).is_some_and(|text| is_its(&text)) {
                    owners.insert(name.clone(), owner);
                }
            }
        }
        owners
    }

    /// Names of links.
    fn ifupdown(&self) -> BTreeSet<String> {
        let Some(state) = read(&self.root.join("run/network/ifstate")) else { return BTreeSet::new() };
        // `eth0=eth0`: the link, and the stanza that it was brought up by.
        let up = state.lines().filter_map(|line| Some(line.split_once('=')?.0.trim().to_owned()));
        let mut links: BTreeSet<String> = up.collect();
        let folder = self.root.join("etc/network");
        let mut files = vec![folder.join("interfaces")];
        let entries = std::fs::read_dir(folder.join("interfaces.d")).into_iter().flatten().take(MAX_FILES);
        files.extend(entries.flatten().map(|entry| entry.path()));
        for text in files.iter().filter_map(|file| read(file)) {
            links.extend(stanzas(&text));
        }
        // Every system has it up; nobody's work is in the way of ours there.
        links.remove("lo");
        links
    }
}

/// `iface eth0 inet static`, `auto eth0 eth1`, `allow-hotplug eth0`; a backslash joins lines.
fn stanzas(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let mut links = Vec::new();
    for line in joined.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("iface") => links.extend(words.next().map(str::to_owned)),
            Some("auto" | "allow-auto" | "allow-hotplug") => links.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    links
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('=')).map(str::trim)
}

/// Managed, and configured by one of its connections.
fn is_network_managers(text: &str) -> bool {
    let managed = value(text, "managed").is_some_and(|managed| matches!(managed, "true" | "1"));
    managed && value(text, "connection-uuid").is_some_and(|uuid| !uuid.is_empty())
}

fn is_networkds(text: &str) -> bool {
    let state = value(text, "ADMIN_STATE");
    state.is_some_and(|state| !matches!(state, "" | "unmanaged" | "pending" | "initialized"))
}

fn read(file: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(file).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(files: &[(&str, &str)]) -> BTreeMap<String, Owner> {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = root.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        let names = [(1, "lo"), (2, "eth0"), (3, "eth1"), (4, "eth2")];
        let names = names.map(|(index, name)| (index, name.parse().unwrap())).into();
        let owners = Files::at(root.path()).owners(&names);
        owners.into_iter().map(|(name, owner)| (name.as_str().to_owned(), owner)).collect()
    }

    fn one(link: &str, owner: Owner) -> BTreeMap<String, Owner> {
        [(link.to_owned(), owner)].into()
    }

    #[test]
    fn a_host_without_such_services_has_no_owners() {
        assert_eq!(owners(&[]), BTreeMap::new());
    }

    #[test]
    fn network_manager_owns_what_it_manages_by_a_connection() {
        let managed =
            "[device]\nmanaged=true\nconnection-uuid=8c1f6a40-5f0a-4b52\nroute-metric-default=100\n";
        let told = owners(&[
            ("run/NetworkManager/devices/2", managed),
            ("run/NetworkManager/devices/3", "[device]\nmanaged=false\n"),
            ("run/NetworkManager/devices/4", "[device]\nmanaged=true\n"),
            ("run/NetworkManager/devices/99", managed),
        ]);
        assert_eq!(told, one("eth0", Owner::NetworkManager));
    }

    #[test]
    fn networkd_owns_what_it_configures_and_not_what_it_leaves_alone() {
        let told = owners(&[
            ("run/systemd/netif/links/1", "ADMIN_STATE=unmanaged\n"),
            (
                "run/systemd/netif/links/2",
                "# This is private data. Do not parse.\nADMIN_STATE=configured\nOPER_STATE=routable\n",
            ),
            ("run/systemd/netif/links/3", "ADMIN_STATE=initialized\n"),
        ]);
        assert_eq!(told, one("eth0", Owner::Networkd));
    }

    #[test]
    fn ifupdown_owns_what_its_files_name_but_only_where_it_is_installed() {
        let interfaces =
            "auto lo\niface lo inet loopback\n# auto eth0\nauto \\\n  eth1\niface eth1 inet dhcp\n";
        let more = "allow-hotplug eth2\niface eth2 inet static\n    address 192.0.2.1/24\n";
        let files = [("etc/network/interfaces", interfaces), ("etc/network/interfaces.d/more", more)];
        assert_eq!(owners(&files), BTreeMap::new());
        let mut files = files.to_vec();
        files.push(("run/network/ifstate", "lo=lo\n"));
        let told = owners(&files);
        assert_eq!(told.keys().collect::<Vec<_>>(), ["eth1", "eth2"]);
        files = vec![("run/network/ifstate", "lo=lo\neth0=eth0\n")];
        assert_eq!(owners(&files), one("eth0", Owner::Ifupdown));
    }
}
