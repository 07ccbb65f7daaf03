//! Whether the host is set up to run the `xendomains` service, which starts VMs at boot and saves or stops them when
//! the host goes down, behind our back.
//!
//! Told by the links that init systems go by, so that nothing is asked and nothing can hang: systemd's `.wants` and
//! `.requires`, the runlevels of OpenRC, and those of System V, which systemd honours too where the service has no
//! unit of its own. A service that was started by hand and is not enabled is not seen.

use std::path::{Path, PathBuf};

const UNIT: &str = "xendomains.service";
/// Where units lie, the administrator's first.
const UNITS: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];
/// Targets and runlevels of a host: there are some dozens.
const MAX_ENTRIES: usize = 4096;

/// The link that has it started at boot, as a path of the machine; `None`: none does.
pub(super) fn enabled(root: &Path) -> Option<PathBuf> {
    let link = match is_systemd(root) {
        true => by_systemd(root),
        false => by_openrc(root).or_else(|| by_system_v(root)),
    };
    link.map(|link| Path::new("/").join(link.strip_prefix(root).unwrap_or(&link)))
}

fn is_systemd(root: &Path) -> bool {
    root.join("run/systemd/system").is_dir()
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn by_systemd(root: &Path) -> Option<PathBuf> {
    let units: Vec<PathBuf> = UNITS.iter().map(|dir| root.join(dir).join(UNIT)).collect();
    let unit = units.iter().find(|unit| exists(unit));
    // A masked unit hides the one of the package, and System V's links as well.
    if unit.is_some_and(|unit| std::fs::read_link(unit).is_ok_and(|to| to == Path::new("/dev/null"))) {
        return None;
    }
    for dir in UNITS {
        let wanting = entries(&root.join(dir)).into_iter().filter(|entry| {
            let name = entry.file_name().unwrap_or_default().to_string_lossy();
            name.ends_with(".wants") || name.ends_with(".requires")
        });
        if let Some(link) = wanting.map(|dir| dir.join(UNIT)).find(|link| exists(link)) {
            return Some(link);
        }
    }
    if unit.is_none() { by_system_v(root) } else { None }
}

fn by_openrc(root: &Path) -> Option<PathBuf> {
    let runlevels = entries(&root.join("etc/runlevels"));
    runlevels.into_iter().map(|level| level.join("xendomains")).find(|link| exists(link))
}

fn by_system_v(root: &Path) -> Option<PathBuf> {
    let levels = ["etc", "etc/rc.d"].iter().flat_map(|dir| (2..=5).map(move |n| format!("{dir}/rc{n}.d")));
    levels.flat_map(|level| entries(&root.join(level))).find(|link| {
        let name = link.file_name().unwrap_or_default().to_string_lossy();
        let Some(("S", rest)) = name.split_at_checked(1) else { return false };
        rest.trim_start_matches(|c: char| c.is_ascii_digit()) == "xendomains"
    })
}

/// The entries of a folder, sorted; none if it is not there.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let read = std::fs::read_dir(dir).into_iter().flatten().take(MAX_ENTRIES);
    let mut entries: Vec<PathBuf> = read.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine with these files and links.
    fn machine(files: &[&str], links: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let made = |path: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        for file in files {
            std::fs::write(made(file), "").unwrap();
        }
        for (link, to) in links {
            symlink(to, made(link)).unwrap();
        }
        root
    }

    const WANTED: &str = "etc/systemd/system/multi-user.target.wants/xendomains.service";
    const PACKAGED: &str = "lib/systemd/system/xendomains.service";
    const SYSTEM_V: &str = "etc/rc3.d/S20xendomains";
    const RUNS: &str = "run/systemd/system/a.mount";

    fn assert_found(files: &[&str], links: &[(&str, &str)], link: Option<&str>) {
        let root = machine(files, links);
        let expected = link.map(|link| Path::new("/").join(link));
        assert_eq!(enabled(root.path()), expected, "{files:?} {links:?}");
    }

    #[test]
    fn xendomains_is_found_by_the_links_of_each_init_system() {
        let init = ("etc/rc3.d/S20xendomains", "../init.d/xendomains");
        assert_found(&[RUNS, PACKAGED], &[(WANTED, "/lib/systemd/system/xendomains.service")], Some(WANTED));
        assert_found(&[RUNS, "etc/init.d/xendomains"], &[init], Some(SYSTEM_V));
        assert_found(&["etc/init.d/xendomains"], &[init], Some(SYSTEM_V));
        let openrc = "etc/runlevels/default/xendomains";
        assert_found(&[], &[(openrc, "/etc/init.d/xendomains")], Some(openrc));
        let red_hat = "etc/rc.d/rc5.d/S98xendomains";
        assert_found(&[], &[(red_hat, "../init.d/xendomains")], Some(red_hat));
    }

    #[test]
    fn xendomains_that_is_installed_and_not_enabled_or_masked_is_in_nobodys_way() {
        assert_found(&[], &[], None);
        assert_found(&[RUNS, PACKAGED, "etc/init.d/xendomains"], &[], None);
        assert_found(
            &["etc/init.d/xendomains", "etc/rc3.d/K20xendomains", "etc/rc0.d/S20xendomains"],
            &[],
            None,
        );
        assert_found(&["etc/rc3.d/S20notxendomains", "etc/rc3.d/S20xendomains-watch"], &[], None);
        let mask = ("etc/systemd/system/xendomains.service", "/dev/null");
        let init = (SYSTEM_V, "../init.d/xendomains");
        assert_found(
            &[RUNS, PACKAGED],
            &[mask, init, (WANTED, "/lib/systemd/system/xendomains.service")],
            None,
        );
        // A unit of its own makes systemd pass System V's links over.
        assert_found(&[RUNS, PACKAGED], &[init], None);
    }
}
