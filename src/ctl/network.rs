//! The network: what there is, what is declared, and changes of it that come back if nobody confirms.

use super::args::NetworkCommand;
use super::output::{Column, cell};
use super::values::{from_json, from_toml, int, number, options};
use super::{CtlError, Session, job};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use xmlrpc::Value;

const LINKS: &[Column] = &[
    ("LINK", "name"),
    ("KIND", "kind"),
    ("STATE", "state"),
    ("CONTROLLER", "controller"),
    ("ADDRESSES", "addresses"),
    ("MTU", "mtu"),
    ("MAC", "mac"),
    ("MANAGED BY", "owner"),
];
const STEPS: &[Column] = &[("STEP", "step"), ("WHAT", "about")];
const HISTORY: &[Column] = &[
    ("AT", "at"),
    ("JOB", "job"),
    ("VERB", "verb"),
    ("CALLER", "caller"),
    ("ENDING", "ending"),
    ("WHY", "why"),
    ("CHANGES", "changes"),
];
/// A declaration of thousands of links has less.
const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;

pub async fn execute(session: &mut Session<'_>, command: NetworkCommand) -> Result<(), CtlError> {
    match command {
        NetworkCommand::Show => show(session).await,
        NetworkCommand::Plan { file, may_cut_management } => {
            let given = options([("may_cut_management", may_cut_management.then_some(Value::Bool(true)))]);
            let answer = session.read("network_plan", &[read_file(&file)?, given]).await?;
            if session.printer.is_json() {
                return session.printer.value(&answer);
            }
            plan(session, &answer)
        }
        NetworkCommand::Apply { file, confirm_within, on_failure, may_cut_management } => {
            let given = options([
                ("confirm_within", confirm_within.map(Value::Int)),
                ("on_failure", on_failure.map(Value::from)),
                ("may_cut_management", may_cut_management.then_some(Value::Bool(true))),
            ]);
            let answer = session.change("network_apply", &[read_file(&file)?, given]).await?;
            applied(session, &answer)
        }
        NetworkCommand::Confirm { job } => {
            let given: Vec<Value> = job.map(int).into_iter().collect();
            let answer = session.change("network_confirm", &given).await?;
            session.printer.note("confirmed: it holds from now on");
            told(session, &answer)
        }
        NetworkCommand::Rollback => {
            session.change("network_rollback", &[]).await?;
            session.printer.note("rolled back");
            Ok(())
        }
        NetworkCommand::Discover { change } => {
            job::change(session, "network_discover", vec![], &change).await.map(drop)
        }
        NetworkCommand::History { limit } => {
            let answer = session.read("network_history", &[Value::Int(limit)]).await?;
            session.printer.list(HISTORY, &answer)
        }
        NetworkCommand::Diagram => {
            let answer = session.read("network_diagram", &[]).await?;
            if session.printer.is_json() {
                return session.printer.value(&answer);
            }
            let text = answer.as_str().unwrap_or_default().to_owned();
            text.lines().try_for_each(|line| session.printer.line(line))
        }
    }
}

async fn show(session: &mut Session<'_>) -> Result<(), CtlError> {
    let answer = session.read("network_show", &[]).await?;
    if session.printer.is_json() {
        return session.printer.value(&answer);
    }
    let none = BTreeMap::new();
    let links = match answer.get("links") {
        Some(Value::Struct(links)) => links,
        _ => &none,
    };
    let rows = links.iter().map(|(name, link)| row(name, link)).collect();
    session.printer.list(LINKS, &Value::Array(rows))?;
    if let Some(change @ Value::Struct(_)) = answer.get("change") {
        session.printer.note(&under_way(change));
    }
    for line in answer.get("drift").and_then(Value::as_array).unwrap_or(&[]) {
        session.printer.note(&format!("differs from what is declared: {}", cell(line)));
    }
    Ok(())
}

fn under_way(change: &Value) -> String {
    let (job, why) = (cell(&change["job"]), cell(&change["why"]));
    match change["state"].as_str() {
        Some("waits_for_confirmation") => {
            let until = cell(&change["confirm_until"]);
            format!("job {job} has changed the network, and waits until {until} for: dom0ctl network confirm")
        }
        Some("rollback_blocked") => format!(
            "job {job} could not be rolled back yet and is tried again; until then nothing else is changed ({why})"
        ),
        Some("rolling_back") => format!("job {job} is being rolled back ({why})"),
        _ => format!("job {job} changes the network"),
    }
}

/// A link as a line of the table.
fn row(name: &str, link: &Value) -> Value {
    let mut row = match link {
        Value::Struct(fields) => fields.clone(),
        _ => BTreeMap::new(),
    };
    let is = |field: &str| link.get(field) == Some(&Value::Bool(true));
    let state = match (is("up"), is("carrier")) {
        (false, _) => "off",
        (true, false) => "no carrier",
        (true, true) => "up",
    };
    row.insert("name".to_owned(), Value::from(name));
    row.insert("state".to_owned(), Value::from(state));
    if is("dhcp") {
        row.insert("owner".to_owned(), Value::from("dom0d, DHCP"));
    }
    Value::Struct(row)
}

fn plan(session: &mut Session<'_>, answer: &Value) -> Result<(), CtlError> {
    let steps = answer.get("steps").and_then(Value::as_array).unwrap_or(&[]);
    if steps.is_empty() {
        session.printer.note("nothing is to be done: the network is as declared");
        return Ok(());
    }
    let row = |(step, one): (i32, &Value)| {
        let about = one.get("about").cloned().unwrap_or(Value::Nil);
        Value::Struct(BTreeMap::from([("step".to_owned(), Value::Int(step)), ("about".to_owned(), about)]))
    };
    session.printer.list(STEPS, &Value::Array((1..).zip(steps).map(row).collect()))
}

fn applied(session: &mut Session<'_>, answer: &Value) -> Result<(), CtlError> {
    if let Some(until @ Value::String(_)) = answer.get("confirm_until") {
        let text =
            format!("done; it is rolled back at {} unless you call: dom0ctl network confirm", cell(until));
        session.printer.note(&text);
    }
    told(session, answer)
}

/// What was done, a line each.
fn told(session: &mut Session<'_>, answer: &Value) -> Result<(), CtlError> {
    if session.printer.is_json() {
        return session.printer.value(answer);
    }
    let changes = answer.get("changes").and_then(Value::as_array).unwrap_or(&[]).to_vec();
    for change in &changes {
        session.printer.line(&cell(change))?;
    }
    let job = number(answer, "job").unwrap_or(0);
    session.printer.note(&format!("job {job}: {} steps", changes.len()));
    Ok(())
}

/// JSON or TOML, by the file's ending; `-` is standard input, JSON.
fn read_file(path: &Path) -> Result<Value, CtlError> {
    let problem = |problem: String| CtlError::File { file: path.to_owned(), problem };
    let mut text = String::new();
    let mut bounded: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin().take(MAX_FILE_BYTES + 1))
    } else {
        let file = std::fs::File::open(path).map_err(|error| problem(error.to_string()))?;
        Box::new(file.take(MAX_FILE_BYTES + 1))
    };
    bounded.read_to_string(&mut text).map_err(|error| problem(error.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(problem(format!("is larger than {MAX_FILE_BYTES} bytes")));
    }
    if path.extension().is_some_and(|ending| ending == "toml") {
        let table: toml::Table = toml::from_str(&text).map_err(|error| problem(error.to_string()))?;
        return Ok(from_toml(toml::Value::Table(table)));
    }
    let json = serde_json::from_str(&text).map_err(|error| problem(error.to_string()))?;
    from_json(json).map_err(problem)
}
