//! The manager: how far it has got what it should, and whether it can be reached.

use super::args::ManagerCommand;
use super::values::text;
use super::{CtlError, Session};
use std::time::Duration;
use xmlrpc::Value;

const STREAMS: &[super::output::Column] = &[
    ("STREAM", "stream"),
    ("STATE", "state"),
    ("TAKEN", "taken"),
    ("NEWEST", "newest"),
    ("BEHIND", "behind"),
    ("FAILURES", "failures_in_a_row"),
    ("LAST OK", "last_ok"),
    ("NEXT TRY", "next_try"),
    ("URL", "url"),
];
const PROBES: &[super::output::Column] =
    &[("STREAM", "stream"), ("OK", "ok"), ("MS", "took_ms"), ("URL", "url"), ("ERROR", "error")];
/// Each of two streams may take as long as one POST may.
const TEST_TIMEOUT: Duration = Duration::from_secs(120);

pub async fn execute(session: &mut Session<'_>, command: ManagerCommand) -> Result<(), CtlError> {
    match command {
        ManagerCommand::Show => show(session).await,
        ManagerCommand::Test => test(session).await,
    }
}

async fn show(session: &mut Session<'_>) -> Result<(), CtlError> {
    let status = session.read("manager_status", &[]).await?;
    if session.printer.is_json() {
        return session.printer.value(&status);
    }
    let mut head = super::values::members(status.clone());
    head.retain(|name, _| name != "streams");
    session.printer.value(&Value::Struct(head))?;
    if status.get("owned") != Some(&Value::Bool(true)) {
        session.printer.note("no manager owns this host; nothing is sent");
        return Ok(());
    }
    session.printer.line("")?;
    session.printer.list(STREAMS, &status["streams"])?;
    for stream in status["streams"].as_array().unwrap_or(&[]) {
        let error = text(stream, "last_error");
        if !error.is_empty() {
            session.printer.note(&format!("{}: {error}", text(stream, "stream")));
        }
    }
    Ok(())
}

async fn test(session: &mut Session<'_>) -> Result<(), CtlError> {
    let timeout = session.timeout.unwrap_or(TEST_TIMEOUT);
    let probes = session.rpc.call("manager_test", &[], timeout).await?;
    session.printer.list(PROBES, &probes)?;
    let failed = |probe: &Value| probe.get("ok") != Some(&Value::Bool(true));
    let all = probes.as_array().unwrap_or(&[]);
    match all.iter().filter(|probe| failed(probe)).count() {
        0 => Ok(()),
        count => Err(CtlError::Failed(format!("{count} of {} streams do not reach the manager", all.len()))),
    }
}
