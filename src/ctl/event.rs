//! Events: kept ones, and those that come.

use super::args::EventCommand;
use super::output::{Column, cell};
use super::values::{int, options};
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
/// Events in one answer.
const MOST: u64 = 1000;
/// How much longer than that the answer may take.
const GRACE: Duration = Duration::from_secs(10);

pub async fn execute(session: &mut Session<'_>, command: EventCommand) -> Result<(), CtlError> {
    match command {
        EventCommand::List { since, token, limit, severity, object, unacknowledged } => {
            let given = options([
                ("since", since.map(int)),
                ("token", token.map(Value::from)),
                ("limit", Some(Value::Int(limit))),
                ("severity", severity.map(Value::from)),
                ("object", object.map(Value::from)),
                ("unacknowledged", unacknowledged.then_some(Value::Bool(true))),
            ]);
            let answer = session.read("event_list", &[given]).await?;
            if session.printer.is_json() {
                return session.printer.value(&answer);
            }
            note_lost(session, &answer);
            session.printer.list(COLUMNS, &answer["events"])?;
            note_token(session, &answer["token"]);
            Ok(())
        }
        EventCommand::Watch { since, token, count } => watch(session, since, token, count).await,
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

/// Goes on by token, so that a restart of the daemon is no matter and a history that was lost is told.
async fn watch(
    session: &mut Session<'_>,
    since: Option<i64>,
    token: Option<String>,
    count: Option<u64>,
) -> Result<(), CtlError> {
    let until = session.timeout.map(|timeout| Instant::now() + timeout);
    let mut place = match (since, token) {
        (Some(since), _) => int(since),
        (None, Some(token)) => Value::from(token),
        (None, None) => {
            let newest = session.read("event_list", &[options([("limit", Some(Value::Int(1)))])]).await?;
            token_of(&newest, "event_list")?
        }
    };
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let mut wait_s = WAIT_S;
        if let Some(until) = until {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                break;
            }
            wait_s = wait_s.min(rest.as_secs().max(1));
        }
        let wait = Duration::from_secs(wait_s);
        // No more than are to be printed: the answer's token is to be the place behind the last of them.
        let limit = options([("limit", (left < MOST).then(|| int(left as i64)))]);
        let params = [place, int(wait_s as i64), limit];
        let answer = job::patiently(session, "event_wait", &params, wait + GRACE).await?;
        note_lost(session, &answer);
        let events = answer["events"].as_array().unwrap_or(&[]);
        for event in events {
            print_one(session, event)?;
        }
        left = left.saturating_sub(events.len() as u64);
        place = token_of(&answer, "event_wait")?;
    }
    note_token(session, &place);
    Ok(())
}

fn token_of(answer: &Value, verb: &str) -> Result<Value, CtlError> {
    match answer.get("token") {
        Some(token @ Value::String(_)) => Ok(token.clone()),
        _ => Err(CtlError::Answer { verb: verb.to_owned(), problem: "no token".to_owned() }),
    }
}

fn note_token(session: &mut Session<'_>, token: &Value) {
    if let Value::String(token) = token {
        session.printer.note(&format!("to go on: --token {token}"));
    }
}

fn note_lost(session: &mut Session<'_>, answer: &Value) {
    if let Some(gap @ Value::Struct(_)) = answer.get("gap") {
        let text = format!("events {} to {} are no longer kept", cell(&gap["from"]), cell(&gap["to"]));
        session.printer.note(&text);
    } else if matches!(answer.get("lost"), Some(Value::Bool(true))) {
        let text = "the history of this host was begun anew or set back: events may have been missed; all that are kept follow";
        session.printer.note(text);
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
