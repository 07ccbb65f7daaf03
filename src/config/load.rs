//! Reads the file, lays the flags over it, and checks the whole.
//!
//! The order is fixed: defaults, then the file, then the flags. The result is checked once, at the end, so a
//! flag may repair what the file got wrong. An error names the place (file and line, or the flag), the key, and
//! what is allowed; it shows no more than the value at fault. A file that is named must exist; whether the
//! usual one ([`DEFAULT_FILE`]) exists is for the caller to look.

use super::{LogFormat, LogLevel, MetricsAddress, Settings, ToolstackChoice, WorldChoice, check};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Read when it exists and no other file is named.
pub const DEFAULT_FILE: &str = "/etc/dom0d/dom0d.toml";

/// A settings file is a page or two; more is a mistake (a disk image, /dev/zero), and is not read into memory.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the settings {}: {problem}", file.display())]
    Unreadable { file: PathBuf, problem: String },
    /// Not TOML at all.
    #[error("{}:{line}: {problem}", file.display())]
    Syntax { file: PathBuf, line: usize, problem: String },
    #[error("{place}: {key}: {problem}; allowed: {allowed}")]
    Key { place: Place, key: String, problem: String, allowed: String },
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Line { file: PathBuf, line: usize },
    Flag(&'static str),
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line } => write!(f, "{}:{line}", file.display()),
            Self::Flag(flag) => write!(f, "flag {flag}"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// What flags say; `None` leaves the file's word, or the default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    pub toolstack: Option<ToolstackChoice>,
    pub kernel: Option<WorldChoice>,
    pub host: Option<WorldChoice>,
    pub listen: Option<SocketAddr>,
    pub metrics_listen: Option<MetricsAddress>,
    pub state_dir: Option<PathBuf>,
    pub log_level: Option<LogLevel>,
    pub log_format: Option<LogFormat>,
}

impl Overrides {
    fn apply(&self, settings: &mut Settings) {
        fn set<T: Clone>(to: &mut T, from: &Option<T>) {
            if let Some(value) = from {
                to.clone_from(value);
            }
        }
        set(&mut settings.world.toolstack, &self.toolstack);
        set(&mut settings.world.kernel, &self.kernel);
        set(&mut settings.world.host, &self.host);
        set(&mut settings.wire.listen, &self.listen);
        set(&mut settings.metrics.listen, &self.metrics_listen);
        set(&mut settings.state.dir, &self.state_dir);
        set(&mut settings.log.level, &self.log_level);
        set(&mut settings.log.format, &self.log_format);
    }

    /// The flag that gave `key` its value, of those whose value can be wrong after its type was checked.
    fn flag_of(&self, key: &str) -> Option<&'static str> {
        (key == "state.dir" && self.state_dir.is_some()).then_some("--state-dir")
    }
}

/// The settings of `file` (or the defaults), with the flags over them, checked.
pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Settings, ConfigError> {
    let text = match file {
        Some(file) => read(file)?,
        None => String::new(),
    };
    parse(file.unwrap_or(Path::new("settings")), &text, overrides)
}

fn read(file: &Path) -> Result<String, ConfigError> {
    let unreadable = |problem: String| ConfigError::Unreadable { file: file.to_owned(), problem };
    let meta = std::fs::metadata(file).map_err(|error| unreadable(error.to_string()))?;
    if !meta.is_file() {
        return Err(unreadable("it is not a file".to_owned()));
    }
    if meta.len() > MAX_FILE_BYTES {
        return Err(unreadable(format!("it has {} bytes; allowed: at most {MAX_FILE_BYTES}", meta.len())));
    }
    std::fs::read_to_string(file).map_err(|error| unreadable(error.to_string()))
}

fn parse(file: &Path, text: &str, overrides: &Overrides) -> Result<Settings, ConfigError> {
    let tree = match DeTable::parse(text) {
        Ok(tree) => tree.into_inner(),
        Err(error) => {
            let line = line_of(text, error.span().map_or(0, |span| span.start));
            let problem = one_line(error.message());
            return Err(ConfigError::Syntax { file: file.to_owned(), line, problem });
        }
    };
    let spans = spans(&tree);
    let mut settings: Settings =
        toml::from_str(text).map_err(|error| typed_error(file, text, &spans, &error))?;
    overrides.apply(&mut settings);
    check::check(&settings).map_err(|wrong| {
        let place = match overrides.flag_of(wrong.key) {
            Some(flag) => Place::Flag(flag),
            None => spans
                .iter()
                .find(|span| span.key == wrong.key)
                .map_or(Place::Default, |span| at(file, text, span.from)),
        };
        ConfigError::Key { place, key: wrong.key.to_owned(), problem: wrong.problem, allowed: wrong.allowed }
    })?;
    Ok(settings)
}

/// Where a key of the file stands: from its first byte to the last of its value.
struct KeySpan {
    key: String,
    from: usize,
    to: usize,
    section: bool,
}

/// All keys of the file in two levels; a deeper one belongs to the key that holds it.
fn spans(tree: &DeTable<'_>) -> Vec<KeySpan> {
    let mut all = Vec::new();
    for (name, value) in tree {
        let section = matches!(value.get_ref(), DeValue::Table(_));
        let (from, to) = (name.span().start, value.span().end);
        all.push(KeySpan { key: name.get_ref().to_string(), from, to, section });
        let DeValue::Table(table) = value.get_ref() else { continue };
        for (inner, value) in table {
            let key = format!("{}.{}", name.get_ref(), inner.get_ref());
            all.push(KeySpan { key, from: inner.span().start, to: value.span().end, section: false });
        }
    }
    all
}

/// serde's error with the key it is about: the narrowest one around the place it tells.
fn typed_error(file: &Path, text: &str, spans: &[KeySpan], error: &toml::de::Error) -> ConfigError {
    let offset = error.span().map_or(0, |span| span.start);
    let key = spans
        .iter()
        .filter(|span| span.from <= offset && offset <= span.to)
        .max_by_key(|span| (!span.section, span.from))
        .map_or_else(String::new, |span| span.key.clone());
    let known = check::allowed(&key);
    let problem = match &known {
        None if !check::keys().any(|known| known.starts_with(&format!("{key}."))) => {
            "there is no such key".to_owned()
        }
        _ => one_line(error.message()),
    };
    let allowed = known.unwrap_or_else(|| neighbours(&key));
    ConfigError::Key { place: at(file, text, offset), key, problem, allowed }
}

/// For a key that does not exist: those of its section, or the sections.
fn neighbours(key: &str) -> String {
    let section = key.split_once('.').map_or(key, |(section, _)| section);
    let prefix = format!("{section}.");
    let mut names: Vec<&str> = check::keys().filter_map(|key| key.strip_prefix(&prefix)).collect();
    if names.is_empty() {
        names = check::keys().map(|key| key.split_once('.').map_or(key, |(section, _)| section)).collect();
    }
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

fn at(file: &Path, text: &str, offset: usize) -> Place {
    Place::Line { file: file.to_owned(), line: line_of(text, offset) }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const SHIPPED: &str = include_str!("../../config/dom0d.toml");

    fn parsed(text: &str) -> Result<Settings, ConfigError> {
        parse(Path::new("f.toml"), text, &Overrides::default())
    }

    fn error_of(text: &str) -> String {
        parsed(text).unwrap_err().to_string()
    }

    /// `#key = value` is a key at its default; `# prose` is prose.
    fn uncommented(text: &str) -> String {
        let line = |line: &str| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => rest.to_owned(),
            _ => line.to_owned(),
        };
        text.lines().map(line).collect::<Vec<_>>().join("\n")
    }

    fn paths(table: &toml::Table) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for (name, value) in table {
            match value {
                toml::Value::Table(inner) => all.extend(inner.keys().map(|key| format!("{name}.{key}"))),
                _ => drop(all.insert(name.clone())),
            }
        }
        all
    }

    #[test]
    fn the_shipped_file_lists_every_key_with_its_default() {
        let written: toml::Table = uncommented(SHIPPED).parse().unwrap();
        let defaults = toml::Table::try_from(Settings::default()).unwrap();
        assert_eq!(paths(&written), paths(&defaults));
        assert_eq!(written, defaults);
        assert_eq!(parsed(&uncommented(SHIPPED)).unwrap(), Settings::default());
        assert_eq!(parsed(SHIPPED).unwrap(), Settings::default());
    }

    #[test]
    fn every_key_tells_what_is_allowed_and_no_other_key_is_told() {
        let defaults = toml::Table::try_from(Settings::default()).unwrap();
        let told: BTreeSet<String> = check::keys().map(str::to_owned).collect();
        assert_eq!(told, paths(&defaults));
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_known_ones() {
        let text = "dialect = \"3.2\"\n\n[jobs]\nhistori = 5\n";
        let error = error_of(text);
        assert!(error.starts_with("f.toml:4: jobs.histori: there is no such key; allowed: "), "{error}");
        assert!(error.contains("wait_limit_s") && error.contains("history"), "{error}");
        let error = error_of("[job]\nhistory = 5\n");
        assert!(error.starts_with("f.toml:1: job: there is no such key"), "{error}");
        assert!(error.contains("jobs"), "{error}");
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_line_its_key_and_what_is_allowed() {
        let error = error_of("[wire]\nplain_http = false\nmax_depth = \"deep\"\n");
        assert!(error.starts_with("f.toml:3: wire.max_depth: "), "{error}");
        assert!(error.ends_with("allowed: a whole number from 4 to 256 (levels)"), "{error}");
        let error = error_of("[log]\nlevel = \"loud\"\n");
        assert!(error.starts_with("f.toml:2: log.level: "), "{error}");
        let error = error_of("[vm]\nkernels = \"/a/../b\"\n");
        assert!(error.starts_with("f.toml:2: vm.kernels: "), "{error}");
        let error = error_of("[wire]\nlisten = \"here\"\n");
        assert!(error.starts_with("f.toml:2: wire.listen: ") && error.contains("8899"), "{error}");
        let error = error_of("[metrics]\nlisten = \"here\"\n");
        assert!(error.starts_with("f.toml:2: metrics.listen: ") && error.contains("9178"), "{error}");
        assert_eq!(parsed("[metrics]\nlisten = \"\"\n").unwrap().metrics.listen, MetricsAddress(None));
        let error = error_of("wire = 5\n");
        assert!(error.starts_with("f.toml:1: wire: "), "{error}");
    }

    #[test]
    fn a_value_out_of_its_range_is_refused_with_its_line() {
        for (text, key) in [
            ("[wire]\nmax_body_bytes = 1023", "wire.max_body_bytes"),
            ("[wire]\nmax_body_bytes = 67108865", "wire.max_body_bytes"),
            ("[jobs]\nwait_limit_s = 900", "jobs.wait_limit_s"),
            ("[vm]\ntoolstack_timeout_s = 0", "vm.toolstack_timeout_s"),
            ("[wire]\nhead_timeout_ms = 0", "wire.head_timeout_ms"),
            ("[state]\ndir = \"lib\"", "state.dir"),
            ("[state]\ndir = \"/\"", "state.dir"),
            ("[state]\ndir = \"/var/../etc\"", "state.dir"),
            ("[wire]\nsocket = \"run/x\"", "wire.socket"),
            ("[wire]\nsocket_group = \"a b\"", "wire.socket_group"),
            ("[jobs]\nmax_open = 10", "jobs.max_running"),
        ] {
            let error = error_of(text);
            assert!(error.contains(key), "{text}: {error}");
        }
        let error = error_of("[jobs]\nhistory = 1\nwait_limit_s = 900");
        assert!(
            error.starts_with("f.toml:3: jobs.wait_limit_s: is 900; allowed: a whole number from 1"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_toml_is_refused_with_its_line() {
        assert!(error_of("[wire]\n= 5\n").starts_with("f.toml:2: "), "{}", error_of("[wire]\n= 5\n"));
    }

    #[test]
    fn flags_win_over_the_file_and_are_named_when_they_are_wrong() {
        let text = "[world]\ntoolstack = \"xl\"\nkernel = \"linux\"\n[state]\ndir = \"/from/file\"\n";
        let flags = Overrides {
            toolstack: Some(ToolstackChoice::Sim),
            state_dir: Some(PathBuf::from("/from/flag")),
            ..Overrides::default()
        };
        let settings = parse(Path::new("f.toml"), text, &flags).unwrap();
        assert_eq!(settings.world.toolstack, ToolstackChoice::Sim);
        assert_eq!(settings.world.kernel, WorldChoice::Linux);
        assert_eq!(settings.state.dir, Path::new("/from/flag"));
        let flags = Overrides { state_dir: Some(PathBuf::from("relative")), ..Overrides::default() };
        let error = parse(Path::new("f.toml"), text, &flags).unwrap_err().to_string();
        assert!(error.starts_with("flag --state-dir: state.dir: "), "{error}");
    }

    #[test]
    fn a_named_file_must_exist_and_be_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let absent = folder.path().join("none.toml");
        let error = load(Some(&absent), &Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("none.toml"), "{error}");
        assert!(load(Some(folder.path()), &Overrides::default()).is_err());
        assert_eq!(load(None, &Overrides::default()).unwrap(), Settings::default());
    }
}
