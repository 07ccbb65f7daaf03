//! `dom0ctl top`: the domains by what they use, again and again on a terminal.

use super::args::{Sort, TopCommand};
use super::scale::human;
use super::values::{options, text};
use super::{CtlError, Session};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::time::Instant;
use xmlrpc::Value;

const COLUMNS: &[super::output::Column] = &[
    ("NAME", "name"),
    ("DOMID", "domid"),
    ("CPU %", "cpu"),
    ("VCPUS", "vcpus"),
    ("MEMORY", "memory"),
    ("RX", "rx"),
    ("TX", "tx"),
    ("READ", "read"),
    ("WRITTEN", "written"),
];
/// Goes to the upper left corner and clears what is below.
const CLEAR: &[u8] = b"\x1b[H\x1b[J";

/// One domain's figures, the instances of each together.
struct Row {
    name: String,
    domid: Option<i64>,
    value: BTreeMap<String, f64>,
    rate: BTreeMap<String, f64>,
}

/// What fits; without a terminal, all.
#[derive(Debug, Clone, Copy)]
struct Screen {
    rows: usize,
    columns: usize,
}

impl Screen {
    fn of(size: Option<(u16, u16)>) -> Self {
        let all = (u16::MAX, u16::MAX);
        // A pseudo-terminal that nobody has sized says 0.
        let (rows, columns) = size.filter(|(rows, columns)| *rows > 0 && *columns > 0).unwrap_or(all);
        Self { rows: rows.into(), columns: columns.into() }
    }

    fn cut(self, line: &str) -> String {
        console::truncate_str(line, self.columns, "").into_owned()
    }

    /// Leaves as many rows as fit below the host's line and the titles, above the line that counts the others, and the
    /// cursor. How many went.
    fn keep(self, rows: &mut Value) -> usize {
        let Value::Array(rows) = rows else { return 0 };
        let all = rows.len();
        if all + 3 > self.rows {
            rows.truncate(self.rows.saturating_sub(4).max(1));
        }
        all - rows.len()
    }
}

pub async fn execute(session: &mut Session<'_>, command: TopCommand) -> Result<(), CtlError> {
    let live = std::io::stdout().is_terminal() && !session.printer.is_json();
    let mut left = command.count.unwrap_or(if live { u64::MAX } else { 1 });
    let until = session.timeout.map(|timeout| Instant::now() + timeout);
    while left > 0 {
        let latest = session.read("stats_latest", &[options([])]).await?;
        if session.printer.is_json() {
            session.printer.json_line(&latest)?;
        } else {
            let size = live.then(|| console::Term::stdout().size_checked()).flatten();
            if live {
                session.printer.raw(CLEAR)?;
            }
            let screen = Screen::of(size);
            session.printer.line(&screen.cut(&summary(&latest)))?;
            let mut rows = table(&latest, command.sort);
            let more = screen.keep(&mut rows);
            session.printer.list_within(COLUMNS, &rows, screen.columns)?;
            if more > 0 {
                session.printer.line(&screen.cut(&format!("and {more} more")))?;
            }
        }
        left -= 1;
        if left == 0 || until.is_some_and(|until| Instant::now() >= until) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(command.interval)).await;
    }
    Ok(())
}

fn rows(latest: &Value) -> impl Iterator<Item = (&str, Row)> {
    latest["objects"].as_array().unwrap_or(&[]).iter().map(|one| {
        let mut row = Row {
            name: text(one, "name").to_owned(),
            domid: super::values::number(one, "domid"),
            value: BTreeMap::new(),
            rate: BTreeMap::new(),
        };
        for figure in one["figures"].as_array().unwrap_or(&[]) {
            let name = text(figure, "metric");
            let mut add = |map: fn(&mut Row) -> &mut BTreeMap<String, f64>, field: &str| {
                if let Some(value) = figure.get(field).and_then(Value::as_f64) {
                    *map(&mut row).entry(name.to_owned()).or_default() += value;
                }
            };
            add(|row| &mut row.value, "value");
            add(|row| &mut row.rate, "rate");
        }
        (text(one, "object"), row)
    })
}

/// The host in a line.
fn summary(latest: &Value) -> String {
    let Some((_, host)) = rows(latest).find(|(object, _)| *object == "host") else {
        return "the host is not measured".to_owned();
    };
    let value = |name: &str, unit: &str| {
        host.value.get(name).map_or_else(|| "-".to_owned(), |value| human(*value, unit))
    };
    let busy = host.rate.get("host_cpu_busy").or_else(|| host.rate.get("dom0_cpu_busy"));
    format!(
        "{}  {}  domains {}  CPUs busy {}  load {}  memory {} free of {}",
        host.name,
        text(latest, "time"),
        value("host_domains", ""),
        busy.map_or_else(|| "-".to_owned(), |busy| format!("{busy:.2}")),
        value("host_load_1m", ""),
        value("host_memory_free", "bytes"),
        value("host_memory_total", "bytes"),
    )
}

fn table(latest: &Value, sort: Sort) -> Value {
    let mut all: Vec<Row> =
        rows(latest).filter(|(object, _)| *object != "host").map(|(_, row)| row).collect();
    let rate =
        |row: &Row, names: &[&str]| -> f64 { names.iter().filter_map(|name| row.rate.get(*name)).sum() };
    let weight = |row: &Row| match sort {
        Sort::Cpu => rate(row, &["cpu_time"]),
        Sort::Memory => row.value.get("memory").copied().unwrap_or(0.0),
        Sort::Net => rate(row, &["vif_rx_bytes", "vif_tx_bytes"]),
        Sort::Disk => rate(row, &["vbd_read_bytes", "vbd_written_bytes"]),
        Sort::Name => 0.0,
    };
    all.sort_by(|a, b| weight(b).total_cmp(&weight(a)).then_with(|| a.name.cmp(&b.name)));
    Value::Array(all.iter().map(cells).collect())
}

fn cells(row: &Row) -> Value {
    let value =
        |name: &str, unit: &str| row.value.get(name).map_or_else(String::new, |value| human(*value, unit));
    let rate = |name: &str| row.rate.get(name).map_or_else(String::new, |rate| human(*rate, "bytes/s"));
    let cpu = row.rate.get("cpu_time").map_or_else(String::new, |cpus| format!("{:.1}", cpus * 100.0));
    options([
        ("name", Some(Value::from(row.name.clone()))),
        ("domid", row.domid.map(super::values::int)),
        ("cpu", Some(Value::from(cpu))),
        ("vcpus", Some(Value::from(value("vcpus", "")))),
        ("memory", Some(Value::from(value("memory", "bytes")))),
        ("rx", Some(Value::from(rate("vif_rx_bytes")))),
        ("tx", Some(Value::from(rate("vif_tx_bytes")))),
        ("read", Some(Value::from(rate("vbd_read_bytes")))),
        ("written", Some(Value::from(rate("vbd_written_bytes")))),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_on_the_screen_is_counted_instead() {
        let rows = |count: i64| Value::Array((0..count).map(super::super::values::int).collect());
        for (height, count, kept) in [(24, 21, 21), (24, 22, 20), (24, 100, 20), (3, 5, 1), (0, 500, 500)] {
            let mut all = rows(count);
            let more = Screen::of(Some((height, 80))).keep(&mut all);
            assert_eq!((all, more), (rows(kept), usize::try_from(count - kept).unwrap()), "{height} {count}");
        }
        assert_eq!(Screen::of(Some((24, 5))).cut("übermäßig"), "überm");
        assert_eq!(Screen::of(None).cut("all of it"), "all of it");
    }
}
