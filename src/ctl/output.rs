//! Prints: tables for people, JSON for programs.
//!
//! A table's cells come from guests, managers and tools, so control characters in them are escaped: none can
//! end a row or steer the terminal. JSON escapes them by itself.

use super::CtlError;
use super::values::to_json;
use comfy_table::{ContentArrangement, Table, presets};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use xmlrpc::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns, or names with their values
    Table,
    /// What the daemon answered, as JSON
    Json,
}

/// Where the output of a command goes.
pub struct Printer<'a> {
    stdout: &'a mut (dyn Write + Send),
    stderr: &'a mut (dyn Write + Send),
    format: Format,
    /// stderr is a terminal, so progress can be shown there.
    terminal: bool,
}

/// A column of a list: its title and the member it shows.
pub type Column = (&'static str, &'static str);

impl<'a> Printer<'a> {
    pub fn new(
        stdout: &'a mut (dyn Write + Send),
        stderr: &'a mut (dyn Write + Send),
        format: Format,
        terminal: bool,
    ) -> Self {
        Self { stdout, stderr, format, terminal }
    }

    pub fn terminal(&self) -> bool {
        self.terminal
    }

    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// One line on stderr. That it cannot be written is no reason to fail.
    pub fn note(&mut self, text: &str) {
        let _ = writeln!(self.stderr, "{}", clean(text));
    }

    /// Bytes on stdout, as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<(), CtlError> {
        self.stdout.write_all(bytes)?;
        Ok(self.stdout.flush()?)
    }

    /// One line on stdout.
    pub fn line(&mut self, text: &str) -> Result<(), CtlError> {
        self.raw(format!("{}\n", clean(text)).as_bytes())
    }

    /// JSON on one line, for output that goes on and on.
    pub fn json_line(&mut self, value: &Value) -> Result<(), CtlError> {
        self.raw(format!("{}\n", to_json(value)).as_bytes())
    }

    fn json(&mut self, value: &Value) -> Result<(), CtlError> {
        self.raw(format!("{:#}\n", to_json(value)).as_bytes())
    }

    /// A list of structs, with these columns.
    pub fn list(&mut self, columns: &[Column], value: &Value) -> Result<(), CtlError> {
        match value {
            Value::Array(rows) if self.format == Format::Table => self.raw(table(columns, rows).as_bytes()),
            other => self.json(other),
        }
    }

    /// A table whose lines are cut at this many columns.
    pub fn list_within(&mut self, columns: &[Column], value: &Value, width: usize) -> Result<(), CtlError> {
        let rows = value.as_array().unwrap_or(&[]);
        let cut = |line: &str| format!("{}\n", console::truncate_str(line, width, ""));
        let lines: String = table(columns, rows).lines().map(cut).collect();
        self.raw(lines.as_bytes())
    }

    /// Any value: a struct as names with their values, a list of structs as a table, else its text.
    pub fn value(&mut self, value: &Value) -> Result<(), CtlError> {
        if self.format == Format::Json {
            return self.json(value);
        }
        match value {
            Value::Nil => Ok(()),
            Value::Struct(members) => self.raw(sheet(members).as_bytes()),
            Value::Array(items) if is_table(items) => self.raw(generic_table(items).as_bytes()),
            Value::Array(items) => {
                let lines: String = items.iter().map(|item| format!("{}\n", cell(item))).collect();
                self.raw(lines.as_bytes())
            }
            Value::String(text) => self.raw(block(text).as_bytes()),
            other => self.line(&cell(other)),
        }
    }
}

fn new_table(header: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}

/// Ends each line at its last visible character: pasted tables then have no tails of blanks.
fn finish(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn table(columns: &[Column], rows: &[Value]) -> String {
    let mut table = new_table(columns.iter().map(|(title, _)| (*title).to_owned()).collect());
    for row in rows {
        table.add_row(columns.iter().map(|(_, name)| cell(&row[*name])));
    }
    finish(table)
}

fn is_table(items: &[Value]) -> bool {
    !items.is_empty() && items.iter().all(|item| matches!(item, Value::Struct(_)))
}

/// What a reader looks for first, in this order; other columns follow by name.
const LEADING: [&str; 9] = ["number", "id", "name", "type", "state", "about", "started", "ended", "error"];

/// A column for each member that any of the rows has.
fn generic_table(rows: &[Value]) -> String {
    let names: BTreeSet<&String> =
        rows.iter().filter_map(Value::as_struct).flat_map(BTreeMap::keys).collect();
    let mut names: Vec<&String> = names.into_iter().collect();
    names.sort_by_key(|name| LEADING.iter().position(|l| l == name).unwrap_or(LEADING.len()));
    let mut table = new_table(names.iter().map(|name| clean(name).to_uppercase()).collect());
    for row in rows {
        table.add_row(names.iter().map(|name| cell(&row[name.as_str()])));
    }
    finish(table)
}

/// Names with their values; what has more than one line follows below, under its name.
fn sheet(members: &BTreeMap<String, Value>) -> String {
    let (mut rows, mut below) = (Vec::new(), Vec::new());
    flatten("", members, &mut rows, &mut below);
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut out: String = rows
        .iter()
        .map(|(name, text)| format!("{}\n", format!("{name:width$}  {text}").trim_end()))
        .collect();
    for (name, text) in below {
        out.push_str(&format!("\n{name}:\n{text}"));
    }
    out
}

fn flatten(
    prefix: &str,
    members: &BTreeMap<String, Value>,
    rows: &mut Vec<(String, String)>,
    below: &mut Vec<(String, String)>,
) {
    for (name, value) in members {
        let name = format!("{prefix}{}", clean(name));
        match value {
            Value::Struct(inner) if !inner.is_empty() => flatten(&format!("{name}."), inner, rows, below),
            Value::Array(items) if is_table(items) => below.push((name, generic_table(items))),
            Value::String(text) if text.trim_end().contains('\n') => below.push((name, block(text))),
            other => rows.push((name, cell(other))),
        }
    }
}

/// A value in one line.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Nil => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Int(number) => number.to_string(),
        Value::Int64(number) => number.to_string(),
        Value::Double(number) => number.to_string(),
        Value::DateTime(time) => time.to_string(),
        Value::String(text) => clean(text),
        Value::Array(items)
            if items.iter().all(|item| !matches!(item, Value::Struct(_) | Value::Array(_))) =>
        {
            items.iter().map(cell).collect::<Vec<_>>().join(", ")
        }
        other => clean(&to_json(other).to_string()),
    }
}

/// Text without anything that could end a line, steer a terminal, or reorder what is read.
pub fn clean(text: &str) -> String {
    cleaned(text, |_| false)
}

/// The same for text of several lines, which ends with a line end.
fn block(text: &str) -> String {
    format!("{}\n", cleaned(text.trim_end_matches('\n'), |c| c == '\n' || c == '\t'))
}

fn cleaned(text: &str, keep: fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let reorders =
            matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && !keep(c)) || reorders {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}
