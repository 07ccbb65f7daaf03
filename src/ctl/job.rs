//! Changes as jobs: submit, follow, list, cancel.
//!
//! A job belongs to the daemon. Whatever happens to dom0ctl while it follows (a timeout, ^C, the daemon's
//! restart), the job goes on; following takes up again when a restarted daemon answers.

use super::args::{Change, JobFilter};
use super::error::plain;
use super::output::Column;
use super::values::{int, number, options, text, whole};
use super::{CtlError, Session};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;
use tokio::time::Instant;
use xmlrpc::Value;

const COLUMNS: &[Column] = &[
    ("ID", "id"),
    ("STATE", "state"),
    ("%", "progress"),
    ("VERB", "verb"),
    ("ABOUT", "about"),
    ("CALLER", "caller"),
    ("CREATED", "created"),
    ("ENDED", "ended"),
];

const LOCK_COLUMNS: &[Column] = &[
    ("LOCK", "lock"),
    ("MODE", "mode"),
    ("STATE", "state"),
    ("JOB", "job"),
    ("VERB", "verb"),
    ("SINCE", "since"),
];

/// Between two looks at a job whose progress is shown; its end is told at once in any case.
const LOOK_S: u64 = 1;
/// One wait when no progress is shown.
const WAIT_S: u64 = 30;
/// How much longer than the wait we asked for the answer may take.
const GRACE: Duration = Duration::from_secs(10);
/// A daemon that restarts is back within this.
const RESTART: Duration = Duration::from_secs(30);
/// Between two tries to reach it.
const RETRY: Duration = Duration::from_millis(250);

/// Makes a change: prints its plan, or its number, or follows it to its end. The job, if it was followed.
pub async fn change(
    session: &mut Session<'_>,
    verb: &str,
    params: Vec<Value>,
    change: &Change,
) -> Result<Option<Value>, CtlError> {
    let given = options([
        ("idempotency_key", change.idempotency_key.as_deref().map(Value::from)),
        ("deadline_s", change.deadline.map(Value::Int)),
        ("dry_run", change.dry_run.then_some(Value::Bool(true))),
    ]);
    let answer = session.read("job_submit", &[Value::from(verb), Value::Array(params), given]).await?;
    if change.dry_run {
        session.printer.value(&answer)?;
        return Ok(None);
    }
    let id = whole(&answer).ok_or_else(|| CtlError::Answer {
        verb: "job_submit".to_owned(),
        problem: "no job number".to_owned(),
    })?;
    if change.no_wait {
        session.printer.value(&answer)?;
        return Ok(None);
    }
    let job = follow(session, id).await?;
    report(session, &job)?;
    Ok(Some(job))
}

/// Waits for the end of a job, and shows its progress on a terminal.
async fn follow(session: &mut Session<'_>, id: i64) -> Result<Value, CtlError> {
    let until = session.timeout.map(|timeout| (Instant::now() + timeout, timeout.as_secs()));
    let bar = session.printer.terminal().then(|| new_bar(id));
    loop {
        let mut wait_s = if bar.is_some() { LOOK_S } else { WAIT_S };
        if let Some((until, seconds)) = until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CtlError::StillRunning { id, seconds });
            }
            wait_s = wait_s.min(left.as_secs().max(1));
        }
        let wait = Duration::from_secs(wait_s);
        let answer = patiently(session, "job_wait", &[int(id), int(wait_s as i64)], wait + GRACE).await;
        if let Err(CtlError::Unreachable { .. }) = &answer {
            session.printer.note(&format!("job {id} was accepted, and goes on when the daemon is back"));
        }
        let job = answer?;
        if has_ended(&job) {
            return Ok(job);
        }
        if let Some(bar) = &bar {
            bar.set_position(u64::try_from(number(&job, "progress").unwrap_or(0)).unwrap_or(0));
            bar.set_message(super::output::clean(&waiting_or_step(&job)));
        }
    }
}

/// Calls a verb that reads; if the daemon is not there, until it is back from a restart.
pub async fn patiently(
    session: &mut Session<'_>,
    verb: &str,
    params: &[Value],
    timeout: Duration,
) -> Result<Value, CtlError> {
    let until = Instant::now() + RESTART.max(timeout);
    loop {
        match session.rpc.call(verb, params, timeout).await {
            Err(error) if error.exit() == super::Exit::Unreachable && Instant::now() < until => {
                tokio::time::sleep(RETRY).await;
            }
            answer => return answer,
        }
    }
}

fn new_bar(id: i64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr());
    // The template is a constant and well formed; were it not, the usual look would do.
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3}% {elapsed} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(format!("job {id}"));
    bar
}

/// What a job does, or which job it waits for.
fn waiting_or_step(job: &Value) -> String {
    if let Some(first) = job.get("waiting_for").and_then(|waiting| waiting.get(0)) {
        let other = number(first, "job").unwrap_or(0);
        return format!("waits for {}, held by job {other} ({})", text(first, "lock"), text(first, "verb"));
    }
    match text(job, "step") {
        "" => text(job, "state").to_owned(),
        step => step.to_owned(),
    }
}

fn has_ended(job: &Value) -> bool {
    matches!(text(job, "state"), "succeeded" | "failed" | "cancelled")
}

/// Tells how a job ended; anything but success is an error.
fn report(session: &mut Session<'_>, job: &Value) -> Result<(), CtlError> {
    let id = number(job, "id").unwrap_or(0);
    let state = text(job, "state").to_owned();
    if session.printer.is_json() {
        session.printer.value(job)?;
    }
    if state != "succeeded" {
        let fault = job.get("fault").map_or("", |fault| text(fault, "text"));
        return Err(CtlError::JobEnded { id, state, text: plain(fault).to_owned() });
    }
    if !session.printer.is_json() {
        session.printer.note(&format!("job {id} {state}"));
        if let Some(result) = job.get("result") {
            session.printer.value(result)?;
        }
    }
    Ok(())
}

pub async fn list(session: &mut Session<'_>, filter: JobFilter) -> Result<(), CtlError> {
    let given = options([
        ("state", filter.state.map(Value::from)),
        ("verb", filter.verb.map(Value::from)),
        ("object", filter.object.map(Value::from)),
        ("before", filter.before.map(int)),
        ("limit", Some(Value::Int(filter.limit))),
    ]);
    let jobs = session.read("job_list", &[given]).await?;
    session.printer.list(COLUMNS, &jobs)
}

pub async fn show(session: &mut Session<'_>, id: i64) -> Result<(), CtlError> {
    let job = session.read("job_get", &[int(id)]).await?;
    session.printer.value(&job)
}

pub async fn wait(session: &mut Session<'_>, id: i64) -> Result<(), CtlError> {
    let job = follow(session, id).await?;
    report(session, &job)
}

pub async fn cancel(session: &mut Session<'_>, id: i64, no_wait: bool) -> Result<(), CtlError> {
    session.read("job_cancel", &[int(id)]).await?;
    if no_wait {
        session.printer.note(&format!("job {id} is asked to end"));
        return Ok(());
    }
    let job = follow(session, id).await?;
    match text(&job, "state") {
        "cancelled" => {
            if session.printer.is_json() {
                session.printer.value(&job)?;
            }
            session.printer.note(&format!("job {id} cancelled"));
            Ok(())
        }
        "succeeded" => Err(CtlError::Failed(format!("job {id} succeeded before it could be cancelled"))),
        _ => report(session, &job),
    }
}

pub async fn locks(session: &mut Session<'_>) -> Result<(), CtlError> {
    let locks = session.read("lock_list", &[]).await?;
    session.printer.list(LOCK_COLUMNS, &locks)
}

#[cfg(test)]
mod tests {
    use super::super::values::from_json;
    use super::*;

    #[test]
    fn progress_tells_the_step_or_who_holds_what_the_job_waits_for() {
        let said = |json| waiting_or_step(&from_json(json).unwrap());
        let held = serde_json::json!({"state": "queued", "step": "", "waiting_for":
            [{"lock": "vm/a", "job": 7, "verb": "save_vm"}]});
        assert_eq!(said(held), "waits for vm/a, held by job 7 (save_vm)");
        assert_eq!(said(serde_json::json!({"state": "running", "step": "boot", "waiting_for": []})), "boot");
        assert_eq!(said(serde_json::json!({"state": "queued", "step": ""})), "queued");
    }
}
