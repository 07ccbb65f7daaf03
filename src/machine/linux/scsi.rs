//! /sys/class/scsi_host, and the PCI devices the hosts hang on.

use super::file::{self, below};
use crate::machine::ScsiHost;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const MAX_HOSTS: usize = 256;
const MAX_ATTRIBUTES: usize = 64;
/// One attribute of /sys is at most a page.
const MAX_ATTRIBUTE_BYTES: usize = 4096;

/// The attributes of a PCI device that are told. Not all there are: reading some (`rom`, `config`, `vpd`,
/// `resource*`) reads from the device itself.
const PCI: [&str; 15] = [
    "broken_parity_status",
    "class",
    "consistent_dma_mask_bits",
    "device",
    "dma_mask_bits",
    "enable",
    "irq",
    "local_cpulist",
    "msi_bus",
    "msi_irqs",
    "numa_node",
    "subsystem_device",
    "subsystem_vendor",
    "uevent",
    "vendor",
];

pub fn hosts(root: &Path) -> Vec<ScsiHost> {
    let folder = below(root, "/sys/class/scsi_host");
    let mut hosts: Vec<ScsiHost> = names(&folder, MAX_HOSTS)
        .into_iter()
        .filter_map(|name| {
            let number = name.strip_prefix("host")?.parse().ok()?;
            let host = folder.join(&name);
            Some(ScsiHost { number, attributes: attributes(&host), device: pci_attributes(root, &host) })
        })
        .collect();
    hosts.sort_by_key(|host| host.number);
    hosts
}

/// The names in a folder, sorted, at most `max`.
fn names(folder: &Path, max: usize) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().take(max).map(|entry| file::clean(entry.file_name().as_encoded_bytes())).collect();
    names.sort();
    names
}

/// Every file of the folder that may be read by its mode (root could read write-only ones, to no use).
fn attributes(host: &Path) -> Vec<(String, String)> {
    let readable = |path: &Path| {
        let meta = std::fs::symlink_metadata(path);
        meta.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o444 != 0)
    };
    let pairs = names(host, MAX_ATTRIBUTES).into_iter().filter_map(|name| {
        let path = host.join(&name);
        let value = readable(&path).then(|| value(&path)).flatten()?;
        Some((name, value))
    });
    pairs.collect()
}

/// One line: an attribute's lines are joined with blanks.
fn value(path: &Path) -> Option<String> {
    let text = file::read_text_of(path, MAX_ATTRIBUTE_BYTES)?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn pci_attributes(root: &Path, host: &Path) -> Vec<(String, String)> {
    let Some(device) = pci_device(root, host) else { return Vec::new() };
    let pairs = PCI.iter().filter_map(|name| {
        let path = device.join(name);
        // A folder with a file for each interrupt.
        let text = if *name == "msi_irqs" { names(&path, 64).join(" ") } else { value(&path)? };
        Some(((*name).to_owned(), text))
    });
    pairs.collect()
}

/// The nearest folder above the host that looks like a PCI device and not like the SCSI devices between.
fn pci_device(root: &Path, host: &Path) -> Option<PathBuf> {
    let real = host.canonicalize().ok()?;
    let root = root.canonicalize().ok()?;
    let mut above = real.ancestors().skip(1).take_while(|path| path.starts_with(&root));
    above.find(|path| path.join("vendor").is_file() && path.join("class").is_file()).map(Path::to_path_buf)
}
