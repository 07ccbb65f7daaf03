//! Keeps the house as `src/lib.rs` draws it: imports run down only, rooms of one floor do not know each other,
//! files stay small and begin with prose, no shell is started, and `unsafe` stays where it must be.
//!
//! The rules are functions from text to complaints, so that the tests below can also hand them made-up text and
//! see that they would catch what they are for.

use dom0d::event::catalogue::CATALOGUE;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The floors from the ground up. `main` and `bin` are entrances: they may use every room, and none uses them.
const FLOORS: &[&[&str]] = &[
    &["model", "store", "config", "sim"],
    &["xen", "kernel", "machine"],
    &["job", "event", "stats", "wire"],
    &["vm", "host", "network", "manager"],
    &["operation"],
    &["api", "metrics"],
    &["agent", "ctl", "logging", "main", "bin"],
];

/// The ground floor is not quite flat: its rooms may use the types of `model`, which uses none of them.
const BASE: &str = "model";

const MAX_LINES: usize = 600;

/// Where `unsafe` may be: the drivers, and the two files of `wire` that take over descriptors and ask the kernel
/// who is at the other end of a socket.
const UNSAFE_ROOMS: &[&str] = &["xen", "kernel", "machine"];
const UNSAFE_FILES: &[&str] = &["src/wire/activation.rs", "src/wire/auth.rs"];

/// A source file with its path from the crate's root.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn made_up(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// `src/vm/plan.rs` is of the room `vm`, `src/agent.rs` of `agent`.
    fn room(&self) -> &str {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let first = inner.split('/').next().unwrap_or(inner);
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// How many modules lie between this file and the crate's root.
    fn depth(&self) -> usize {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let parts = inner.split('/').count();
        if inner.ends_with("/mod.rs") { parts - 1 } else { parts }
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src")];
    let mut all = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the sources can be read") {
            let path: PathBuf = entry.expect("the sources can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = std::fs::read_to_string(&path).expect("the sources can be read");
                let path = path
                    .strip_prefix(root)
                    .expect("the sources can be read")
                    .to_str()
                    .expect("the sources can be read")
                    .to_owned();
                all.push(Source { path, text });
            }
        }
    }
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

/// The code without comments, and with strings and characters emptied, so that neither is taken for code. Lines
/// stay lines.
fn code(text: &str) -> String {
    blank(text, false)
}

/// The same, but strings keep what is in them.
fn code_with_strings(text: &str) -> String {
    blank(text, true)
}

fn blank(text: &str, keep_strings: bool) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let (taken, kept) = match token(rest) {
            Token::Comment(length) => (length, String::new()),
            Token::Text(length) if keep_strings => (length, rest[..length].to_owned()),
            Token::Text(length) => (length, "\"\"".to_owned()),
            Token::Code => (c.len_utf8(), c.to_string()),
        };
        out.push_str(&kept);
        if kept.is_empty() || kept == "\"\"" {
            out.extend(rest[..taken].chars().filter(|c| *c == '\n'));
        }
        rest = &rest[taken..];
    }
    out
}

enum Token {
    Comment(usize),
    Text(usize),
    Code,
}

fn token(rest: &str) -> Token {
    if rest.starts_with("//") {
        return Token::Comment(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Token::Comment(rest.find("*/").map_or(rest.len(), |at| at + 2));
    }
    if let Some(after) = rest.strip_prefix('r') {
        let hashes = after.len() - after.trim_start_matches('#').len();
        if after[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let from = 1 + hashes + 1;
            return Token::Text(rest[from..].find(&end).map_or(rest.len(), |at| from + at + end.len()));
        }
    }
    if rest.starts_with('"') {
        return Token::Text(quoted(rest, '"').unwrap_or(rest.len()));
    }
    if rest.starts_with('\'') {
        // A lifetime has no closing quote after one character.
        let mut chars = rest.chars().skip(1);
        let (first, second) = (chars.next(), chars.next());
        if first == Some('\\') || second == Some('\'') {
            return Token::Text(quoted(rest, '\'').unwrap_or(rest.len()));
        }
    }
    Token::Code
}

/// The length of a quoted literal at the start of `rest`.
fn quoted(rest: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + c.len_utf8()),
            _ => {}
        }
    }
    None
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The rooms that a file names: `crate::room…`, `dom0d::room…` (from an entrance), `crate::{a, b::c}`, and
/// `super::super::room` where the chain leaves the file's own room.
fn rooms_used(source: &Source) -> BTreeSet<String> {
    let code = code(&source.text);
    let mut used = BTreeSet::new();
    for root in ["crate::", "dom0d::"] {
        for (at, _) in code.match_indices(root) {
            let whole = !code[..at].ends_with(is_word);
            if whole {
                used.extend(heads(&code[at + root.len()..]));
            }
        }
    }
    for (at, _) in code.match_indices("super::") {
        let before = &code[..at];
        if before.ends_with(is_word) || before.ends_with("super::") {
            continue;
        }
        let mut after = &code[at..];
        let mut ups = 0;
        while let Some(rest) = after.strip_prefix("super::") {
            (ups, after) = (ups + 1, rest);
        }
        // A `mod tests { … }` in the file adds a level, and then as many `super` lead to the file's own room.
        let inner = usize::from(inside_inner_module(before));
        if ups >= source.depth() + inner {
            used.extend(heads(after));
        }
    }
    used
}

/// Whether the code before a place has opened a module and not closed it.
fn inside_inner_module(before: &str) -> bool {
    before.match_indices("mod ").any(|(at, _)| {
        let opened = before[at..].split_once('{').filter(|(head, _)| !head.contains(';'));
        opened.is_some_and(|(_, body)| {
            let open = body.matches('{').count();
            let closed = body.matches('}').count();
            open + 1 > closed
        })
    })
}

/// The first names of a path, or of each path of a list in braces.
fn heads(path: &str) -> Vec<String> {
    let name = |text: &str| text.trim_start().chars().take_while(|c| is_word(*c)).collect::<String>();
    let Some(list) = path.strip_prefix('{') else { return vec![name(path)] };
    let (mut depth, mut item, mut names) = (1, String::new(), Vec::new());
    for c in list.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || (c == ',' && depth == 1) {
            names.push(name(&item));
            item.clear();
            if depth == 0 {
                break;
            }
        } else {
            item.push(c);
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn floor_of(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// Imports that do not run down.
fn wrong_imports(source: &Source) -> Vec<String> {
    let room = source.room();
    if room == "lib" {
        return Vec::new();
    }
    let complain = |used: &str, why: &str| format!("{}: {room} uses {used}, {why}", source.path);
    let Some(floor) = floor_of(room) else {
        return vec![format!("{}: the room {room} is on no floor", source.path)];
    };
    let mut wrong = Vec::new();
    for used in rooms_used(source) {
        // Names that are no rooms are items of the crate's root; it has none but modules.
        let Some(other) = floor_of(&used) else {
            wrong.push(complain(&used, "which is on no floor"));
            continue;
        };
        let entrance = matches!(room, "main" | "bin");
        if used == room || other < floor || (entrance && !matches!(used.as_str(), "main" | "bin")) {
            continue;
        }
        if used == BASE && floor == 0 {
            continue;
        }
        let why = if other == floor { "which is on the same floor" } else { "which is on a floor above" };
        wrong.push(complain(&used, why));
    }
    wrong
}

fn wrong_shape(source: &Source) -> Vec<String> {
    let mut wrong = Vec::new();
    let lines = source.text.lines().count();
    if lines >= MAX_LINES {
        wrong.push(format!("{}: {lines} lines; allowed: fewer than {MAX_LINES}", source.path));
    }
    if !source.text.starts_with("//! ") {
        wrong.push(format!("{}: does not begin with prose (//!)", source.path));
    }
    wrong
}

/// Programs are started by argument vectors; a shell would read what others wrote as commands.
fn wrong_shells(source: &Source) -> Vec<String> {
    let code = code_with_strings(&source.text);
    let mut wrong = Vec::new();
    for shell in ["sh", "bash", "dash", "ash", "zsh", "ksh", "busybox", "env", "xargs"] {
        for form in [format!("\"{shell}\""), format!("/{shell}\"")] {
            for (at, _) in code.match_indices(&form) {
                let before = code[..at].rsplit(['(', ',', '=']).next().unwrap_or("");
                let in_call = code[..at].trim_end_matches(|c| c != '(').ends_with("::new(");
                if in_call && !before.contains(';') {
                    wrong.push(format!("{}: starts {shell}", source.path));
                }
            }
        }
    }
    if code.contains("\"-c\"") {
        wrong.push(format!("{}: has the argument \"-c\"", source.path));
    }
    wrong
}

fn wrong_unsafe(source: &Source) -> Vec<String> {
    let allowed = UNSAFE_ROOMS.contains(&source.room()) || UNSAFE_FILES.contains(&source.path.as_str());
    let code = code(&source.text);
    let found = code
        .match_indices("unsafe")
        .any(|(at, word)| !code[..at].ends_with(is_word) && !code[at + word.len()..].starts_with(is_word));
    if found && !allowed {
        return vec![format!(
            "{}: has unsafe code; allowed: drivers, {}",
            source.path,
            UNSAFE_FILES.join(", ")
        )];
    }
    Vec::new()
}

/// A type of events is spelt in the catalogue alone; elsewhere it is a constant. dom0ctl knows nothing of the catalogue.
fn wrong_event_types(source: &Source) -> Vec<String> {
    if source.path.starts_with("src/event/") || source.room() == "ctl" {
        return Vec::new();
    }
    let code = code_with_strings(&source.text);
    let spelt = CATALOGUE.iter().map(|entry| entry.kind.as_str());
    let spelt = spelt.filter(|kind| code.contains(&format!("\"{kind}\"")));
    spelt.map(|kind| format!("{}: spells {kind}; dom0d::event::kind has it", source.path)).collect()
}

fn hold(rule: fn(&Source) -> Vec<String>) {
    let sources = sources();
    assert!(sources.len() > 10, "only {} files were found", sources.len());
    let wrong: Vec<String> = sources.iter().flat_map(rule).collect();
    assert!(wrong.is_empty(), "{} places:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn imports_run_down_the_floors_and_never_across() {
    hold(wrong_imports);
}

#[test]
fn files_are_short_and_begin_with_prose() {
    hold(wrong_shape);
}

#[test]
fn no_shell_is_ever_started() {
    hold(wrong_shells);
}

#[test]
fn unsafe_code_stays_in_the_drivers() {
    hold(wrong_unsafe);
}

#[test]
fn every_room_is_declared_drawn_and_on_a_floor() {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let drawing: String = lib.lines().filter(|line| line.starts_with("//!")).collect();
    for line in lib.lines() {
        let Some(room) = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')) else {
            continue;
        };
        assert!(floor_of(room).is_some(), "{room} is on no floor");
        let drawn = drawing.split(|c: char| !is_word(c)).any(|word| word == room);
        assert!(drawn, "{room} is not in the drawing");
    }
}

#[test]
fn types_of_events_are_spelt_in_their_catalogue_alone() {
    hold(wrong_event_types);
    let spells = "fn f() -> Event { event.kind = \"vm.started\".to_owned(); }";
    assert_eq!(complaints(wrong_event_types, "src/operation/mod.rs", spells), 1);
    assert_eq!(complaints(wrong_event_types, "src/event/log.rs", spells), 0);
    assert_eq!(complaints(wrong_event_types, "src/config/check.rs", "(\"vm.kernels\", 1)"), 0);
}

fn complaints(rule: fn(&Source) -> Vec<String>, path: &str, text: &str) -> usize {
    rule(&Source::made_up(path, text)).len()
}

#[test]
fn the_test_would_catch_an_import_that_goes_up_or_across() {
    for (path, text) in [
        ("src/vm/plan.rs", "use crate::operation::Plan;"),
        ("src/vm/mod.rs", "use crate::host::Facts;"),
        ("src/wire/mod.rs", "use crate::{model::Secret, api};"),
        ("src/wire/mod.rs", "use crate::{model::{Secret, MiB}, job::{Engine, Step}, config};"),
        ("src/event/mod.rs", "fn f() -> crate::job::Id { todo() }"),
        ("src/vm/mod.rs", "use super::host::Facts;"),
        ("src/vm/plan.rs", "use super::super::host::Facts;"),
        ("src/vm/plan.rs", "mod tests { use super::super::super::api::X; }"),
        ("src/store/mod.rs", "use crate::config::State;"),
        ("src/model/mod.rs", "use crate::store::Txn;"),
        ("src/ctl/mod.rs", "use crate::agent::Start;"),
        ("src/agent.rs", "use crate::ctl::Cli;"),
        ("src/attic/mod.rs", "fn f() {}"),
        ("src/vm/mod.rs", "use crate::attic::Old;"),
    ] {
        assert_eq!(complaints(wrong_imports, path, text), 1, "{path}: {text}");
    }
}

#[test]
fn the_test_would_not_complain_of_what_is_allowed() {
    for (path, text) in [
        (
            "src/vm/plan.rs",
            "use crate::model::{VmId, VmName};\nuse crate::xen::Toolstack;\nuse super::Record;",
        ),
        ("src/vm/mod.rs", "// use crate::api::Verb;\nconst X: &str = \"crate::api::Verb\";"),
        ("src/vm/mod.rs", "mod tests { use super::*; use super::plan::Plan; }"),
        ("src/vm/plan.rs", "mod tests { use super::super::Record; use super::*; }"),
        ("src/ctl/mod.rs", "use crate::wire::client::Client; use crate::store::tools;"),
        ("src/main.rs", "use dom0d::{agent, config::Overrides, logging};"),
        ("src/store/table.rs", "impl Key for crate::model::VmId {}"),
        ("src/model/mod.rs", "pub(crate) use text_type; fn f() -> $crate::model::Invalid {}"),
        ("src/vm/mod.rs", "let xcrate::api = 1;"),
    ] {
        assert_eq!(complaints(wrong_imports, path, text), 0, "{path}: {text}");
    }
}

#[test]
fn the_test_would_catch_long_files_shells_and_unsafe_code() {
    let long = format!("//! x\n{}", "\n".repeat(MAX_LINES));
    assert_eq!(complaints(wrong_shape, "src/vm/mod.rs", &long), 1);
    assert_eq!(complaints(wrong_shape, "src/vm/mod.rs", "use x;\n//! late"), 1);
    assert_eq!(complaints(wrong_shape, "src/vm/mod.rs", "//! fine\n"), 0);
    for text in [
        "Command::new(\"sh\")",
        "std::process::Command::new(\"bash\")",
        "Command::new(\"/bin/sh\")",
        "tokio::process::Command::new(\n    \"/usr/bin/env\")",
        "run(\"xl\", &[\"-c\"])",
    ] {
        assert_eq!(complaints(wrong_shells, "src/xen/xl.rs", text), 1, "{text}");
    }
    for text in ["Command::new(\"xl\")", "// Command::new(\"sh\")", "let shell = \"bash\";"] {
        assert_eq!(complaints(wrong_shells, "src/xen/xl.rs", text), 0, "{text}");
    }
    let code = "unsafe { x() }";
    assert_eq!(complaints(wrong_unsafe, "src/vm/mod.rs", code), 1);
    assert_eq!(complaints(wrong_unsafe, "src/wire/mod.rs", code), 1);
    assert_eq!(complaints(wrong_unsafe, "src/wire/auth.rs", code), 0);
    assert_eq!(complaints(wrong_unsafe, "src/machine/linux.rs", code), 0);
    for text in ["// unsafe", "#[allow(unsafe_code)]", "let s = \"unsafe\";", "let c = 'u'; let l: &'a str;"]
    {
        assert_eq!(complaints(wrong_unsafe, "src/vm/mod.rs", text), 0, "{text}");
    }
}
