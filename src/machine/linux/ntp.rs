//! The NTP service's configuration.
//!
//! *chrony*: ours are a file `dom0d.conf` in its drop-in folder where the main file names one below
//! /etc/chrony (`confdir`), else a marked block at the end of the main file. Sources of others in the main file
//! are set aside by a comment that starts with [`ASIDE`], since the caller's list is the whole list; what DHCP
//! brings (`sourcedir /run/…`) is left alone and not told. *timesyncd*: ours is one drop-in file, whose first,
//! empty assignment takes back everybody else's servers. timesyncd only asks: `allow_query` is refused with it,
//! and the local time source is only remembered, since without an answer its clock runs on by itself anyway.

use super::file::{self, below};
use super::ntp_service::{Kind, Service};
use crate::machine::{MachineError, Ntp, Result};
use crate::model::excerpt;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

const MAX_SERVERS: usize = 16;
const BEGIN: &str = "# dom0d: begin (written by dom0d; changes here are lost)";
const END: &str = "# dom0d: end";
const ASIDE: &str = "#dom0d: ";
const TIMESYNCD: &str = "/etc/systemd/timesyncd.conf.d/dom0d.conf";
const LOCAL_SOURCE: &str = "# dom0d: local_time_source";
/// chrony's words for where time comes from and who may ask.
const SOURCES: [&str; 3] = ["server", "pool", "peer"];
const OURS_TO_SAY: [&str; 5] = ["server", "pool", "peer", "local", "allow"];

/// What was asked for, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    servers: Vec<String>,
    local_time_source: bool,
    allow_query: bool,
}

impl Wanted {
    pub fn parse(servers: &[String], local_time_source: bool, allow_query: bool) -> Result<Self> {
        if servers.len() > MAX_SERVERS {
            let count = servers.len();
            return Err(MachineError::Invalid(format!(
                "{count} NTP servers; allowed: at most {MAX_SERVERS}"
            )));
        }
        let mut checked: Vec<String> = Vec::new();
        for server in servers {
            check_server(server)?;
            if !checked.contains(server) {
                checked.push(server.clone());
            }
        }
        Ok(Self { servers: checked, local_time_source, allow_query })
    }
}

/// A host name (RFC 1123, and not all digits at the end, which would be a broken address) or an address.
fn check_server(text: &str) -> Result<()> {
    let label = |label: &str| {
        let good = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(good)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last_is_a_number = text.rsplit('.').next().is_some_and(|l| l.bytes().all(|c| c.is_ascii_digit()));
    let host_name = text.len() <= 253 && text.split('.').all(label) && !last_is_a_number;
    if host_name || text.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    Err(MachineError::Invalid(format!(
        "NTP server {} is not one; allowed: a host name or an IP address",
        excerpt(text)
    )))
}

/// What is configured; whether it runs is for the service to say.
pub fn read(root: &Path) -> Result<(Service, Ntp)> {
    let service = Service::detect(root)?;
    let (servers, local_time_source) = match &service.kind {
        Kind::Chrony { main } => read_chrony(root, main),
        Kind::Timesyncd => read_timesyncd(root),
    };
    Ok((service, Ntp { servers, local_time_source, running: false }))
}

pub fn write(root: &Path, wanted: &Wanted) -> Result<Service> {
    let service = Service::detect(root)?;
    match &service.kind {
        Kind::Chrony { main } => write_chrony(root, main, wanted)?,
        Kind::Timesyncd => write_timesyncd(root, wanted)?,
    }
    Ok(service)
}

fn read_chrony(root: &Path, main: &Path) -> (Vec<String>, bool) {
    let main = file::read_text_of(main, file::MAX_BYTES).unwrap_or_default();
    let mut texts = vec![main.clone()];
    for folder in folders(root, &main, "confdir") {
        texts.extend(drop_ins(&folder, "conf"));
    }
    for folder in folders(root, &main, "sourcedir") {
        texts.extend(drop_ins(&folder, "sources"));
    }
    let mut servers: Vec<String> = Vec::new();
    let mut local = false;
    for (word, rest) in texts.iter().flat_map(|text| text.lines()).filter_map(directive) {
        local |= word == "local";
        let name = rest.split_whitespace().next().unwrap_or_default();
        if SOURCES.contains(&word.as_str()) && !name.is_empty() && !servers.iter().any(|s| s == name) {
            servers.push(name.to_owned());
        }
    }
    (servers, local)
}

/// A line of chrony.conf(5) that says something: its first word, in lower case, and the rest.
fn directive(line: &str) -> Option<(String, &str)> {
    let line = line.trim();
    if line.is_empty() || line.starts_with(['#', '!', ';', '%']) {
        return None;
    }
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    Some((word.to_ascii_lowercase(), rest.trim()))
}

/// The folders below /etc/chrony that the main file names by `word`. Others (below /run) are not kept.
fn folders(root: &Path, main: &str, word: &str) -> Vec<PathBuf> {
    let named = main.lines().filter_map(directive).filter(|(found, _)| found == word);
    let paths = named.flat_map(|(_, rest)| rest.split_whitespace());
    let ours = |path: &&str| path.starts_with("/etc/chrony/") && !path.contains("..");
    paths.filter(ours).map(|path| below(root, path)).collect()
}

/// The texts of the files in a drop-in folder, by name.
fn drop_ins(folder: &Path, ending: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().take(256);
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == ending))
        .collect();
    paths.sort();
    paths.iter().filter_map(|path| file::read_text_of(path, file::MAX_BYTES)).collect()
}

fn write_chrony(root: &Path, main_path: &Path, wanted: &Wanted) -> Result<()> {
    let old = file::read_text_of(main_path, file::MAX_BYTES).unwrap_or_default();
    if old.len() >= file::MAX_BYTES {
        // It would be cut when written back.
        return Err(MachineError::Failed(format!("{} is larger than 64 KiB", main_path.display())));
    }
    let mut main = set_aside(&old);
    let said = chrony_lines(wanted);
    if let Some(folder) = folders(root, &main, "confdir").first() {
        file::write(&folder.join("dom0d.conf"), &format!("{BEGIN}\n{said}{END}\n"))?;
    } else {
        let _ = write!(main, "{BEGIN}\n{said}{END}\n");
    }
    if main == old { Ok(()) } else { file::write(main_path, &main) }
}

/// The main file without our block, and with others' sources as comments. A beginning without an end is no
/// block: what follows it is somebody's.
fn set_aside(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let begin = lines.iter().position(|line| *line == BEGIN);
    let end = begin.and_then(|at| lines[at..].iter().position(|line| *line == END).map(|more| at + more));
    let mut kept = String::with_capacity(text.len());
    for (number, line) in lines.into_iter().enumerate() {
        let ours = line == BEGIN || begin.zip(end).is_some_and(|(from, to)| (from..=to).contains(&number));
        if !ours {
            let theirs = directive(line).is_some_and(|(word, _)| OURS_TO_SAY.contains(&word.as_str()));
            let _ = writeln!(kept, "{}{line}", if theirs { ASIDE } else { "" });
        }
    }
    kept
}

fn chrony_lines(wanted: &Wanted) -> String {
    let mut text = String::new();
    for server in &wanted.servers {
        let _ = writeln!(text, "server {server} iburst");
    }
    if wanted.local_time_source {
        text.push_str("local stratum 10\n");
    }
    if wanted.allow_query {
        text.push_str("allow\n");
    }
    text
}

/// Servers of the main file and the drop-ins, in order; an empty assignment takes back those before it.
fn read_timesyncd(root: &Path) -> (Vec<String>, bool) {
    let mut texts: Vec<String> = file::read_text(root, "/etc/systemd/timesyncd.conf").into_iter().collect();
    texts.extend(drop_ins(&below(root, "/etc/systemd/timesyncd.conf.d"), "conf"));
    let mut servers: Vec<String> = Vec::new();
    for line in texts.iter().flat_map(|text| text.lines()) {
        let Some(value) = line.trim().strip_prefix("NTP=") else { continue };
        if value.trim().is_empty() {
            servers.clear();
        }
        servers.extend(value.split_whitespace().map(str::to_owned));
    }
    let ours = file::read_text(root, TIMESYNCD).unwrap_or_default();
    (servers, ours.lines().any(|line| line == LOCAL_SOURCE))
}

fn write_timesyncd(root: &Path, wanted: &Wanted) -> Result<()> {
    if wanted.allow_query {
        return Err(MachineError::Unavailable(
            "answering others' NTP queries (systemd-timesyncd only asks; install chrony)".to_owned(),
        ));
    }
    let mut text = format!("{BEGIN}\n[Time]\nNTP=\nNTP={}\nFallbackNTP=\n", wanted.servers.join(" "));
    if wanted.local_time_source {
        let _ = writeln!(text, "{LOCAL_SOURCE}");
    }
    let _ = writeln!(text, "{END}");
    file::write(&below(root, TIMESYNCD), &text)
}
