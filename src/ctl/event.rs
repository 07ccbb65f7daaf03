//! Events: kept ones, and those that come.

use super::args::EventCommand;
use super::output::{Column, cell};
use super::values::{int, number, options};
use super::{CtlError, Session, job};
use std::time::Duration;
use tokio::time::Instant;
use xmlrpc::Value;

const COLUMNS: &[Column] = &[
    ("NUMBER", "number"),
    ("TIME", "time"),
    ("SEVERITY", "severity"),
    ("TYPE", "type"),
    ("OBJECT", "object"),
    ("JOB", "job"),
    ("ACK", "acknowledged"),
    ("TEXT", "text"),
];

/// One wait for the next event.
const WAIT_S: u64 = 30;
/// How much longer than that the answer may take.
const GRACE: Duration = Duration::from_secs(10);

pub async fn execute(session: &mut Session<'_>, command: EventCommand) -> Result<(), CtlError> {
    match command {
        EventCommand::List { since, limit, severity, object, unacknowledged } => {
            let given = options([
                ("since", since.map(int)),
                ("limit", Some(Value::Int(limit))),
                ("severity", severity.map(Value::from)),
                ("object", object.map(Value::from)),
                ("unacknowledged", unacknowledged.then_some(Value::Bool(true))),
            ]);
            let answer = session.read("event_list", &[given]).await?;
            note_gap(session, &answer);
            session.printer.list(COLUMNS, &answer["events"])
        }
        EventCommand::Watch { since, count } => watch(session, since, count).await,
        EventCommand::Ack { numbers } => {
            let count =
                session.read("event_ack", &[Value::Array(numbers.into_iter().map(int).collect())]).await?;
            if session.printer.is_json() {
                return session.printer.value(&count);
            }
            session.printer.note(&format!("{} acknowledged", cell(&count)));
            Ok(())
        }
    }
}

async fn watch(session: &mut Session<'_>, since: Option<i64>, count: Option<u64>) -> Result<(), CtlError> {
    let until = session.timeout.map(|timeout| Instant::now() + timeout);
    let mut since = match since {
        Some(since) => since,
        None => {
            let newest = session.read("event_list", &[options([("limit", Some(Value::Int(1)))])]).await?;
            last_of(&newest, "event_list")?
        }
    };
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let mut wait_s = WAIT_S;
        if let Some(until) = until {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Ok(());
            }
            wait_s = wait_s.min(rest.as_secs().max(1));
        }
        let wait = Duration::from_secs(wait_s);
        let params = [int(since), int(wait_s as i64)];
        let answer = job::patiently(session, "event_wait", &params, wait + GRACE).await?;
        note_gap(session, &answer);
        let events = answer["events"].as_array().unwrap_or(&[]);
        for event in events.iter().take(usize::try_from(left).unwrap_or(usize::MAX)) {
            print_one(session, event)?;
        }
        left = left.saturating_sub(events.len() as u64);
        since = last_of(&answer, "event_wait")?.max(since);
    }
    Ok(())
}

fn last_of(answer: &Value, verb: &str) -> Result<i64, CtlError> {
    number(answer, "last")
        .ok_or_else(|| CtlError::Answer { verb: verb.to_owned(), problem: "no last number".to_owned() })
}

fn note_gap(session: &mut Session<'_>, answer: &Value) {
    if let Some(gap @ Value::Struct(_)) = answer.get("gap") {
        let text = format!("events {} to {} are no longer kept", cell(&gap["from"]), cell(&gap["to"]));
        session.printer.note(&text);
    }
}

fn print_one(session: &mut Session<'_>, event: &Value) -> Result<(), CtlError> {
    if session.printer.is_json() {
        return session.printer.json_line(event);
    }
    let names = ["number", "time", "severity", "type", "object", "text"];
    let cells: Vec<String> = names.iter().map(|name| cell(&event[*name])).collect();
    session.printer.line(&cells.join("  "))
}
