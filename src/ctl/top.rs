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

pub async fn execute(session: &mut Session<'_>, command: TopCommand) -> Result<(), CtlError> {
    let live = std::io::stdout().is_terminal() && !session.printer.is_json();
    let mut left = command.count.unwrap_or(if live { u64::MAX } else { 1 });
    let until = session.timeout.map(|timeout| Instant::now() + timeout);
    while left > 0 {
        let latest = session.read("stats_latest", &[options([])]).await?;
        if session.printer.is_json() {
            session.printer.json_line(&latest)?;
        } else {
            if live {
                session.printer.raw(CLEAR)?;
            }
            let host = summary(&latest);
            session.printer.line(&host)?;
            session.printer.list(COLUMNS, &table(&latest, command.sort))?;
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
