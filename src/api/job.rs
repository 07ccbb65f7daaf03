//! The families of jobs and locks.

use super::Api;
use super::arguments::{Arguments, Fields, Type, may, need};
use super::fault::{ApiFault, Result};
use super::value::{from_json, int, or_nil, structure, text, texts};
use super::verb::{Kind, Origin, Row, Verb};
use crate::job::{JobRecord, JobState, Listing, LockState, LockWant, Mode, Options};
use crate::model::{JobId, Label, Timestamp};
use crate::operation::plan::Plan;
use crate::wire::{Answer, Caller, Identity, Role, Value, encode_call};
use futures_util::future::{BoxFuture, FutureExt};
use std::collections::BTreeMap;
use std::time::Duration;

const ID: super::arguments::Param = need("id", Type::Int, "the job's number");

#[rustfmt::skip]
const JOBS: &[Row] = &[
    Row::new("job_submit", &[need("verb", Type::Text, "a verb of kind job"), need("params", Type::Array, "its parameters"),
        may("options", Type::Struct, "idempotency_key, deadline_s, dry_run")], "int or struct", Role::Viewer,
        Kind::Envelope(job_submit), "Accepts a change and answers the job's number at once; with dry_run the plan. The verb's own role is needed."),
    Row::new("job_get", &[ID], "struct", Role::Viewer, Kind::Read(job_get), "A job with its steps."),
    Row::new("job_list", &[may("filter", Type::Struct, "state, verb, object, before, limit")], "array", Role::Viewer,
        Kind::Read(job_list), "Jobs, newest first."),
    Row::new("job_wait", &[ID, need("timeout_s", Type::Int, "0 to 840")], "struct", Role::Viewer,
        Kind::Read(job_wait), "Waits for a job's end or the time-out, and answers the job as it then is."),
    Row::new("job_cancel", &[ID], "nil", Role::Operator, Kind::Signal(job_cancel), "Asks a job to end; what it did is taken back."),
];

#[rustfmt::skip]
const LOCKS: &[Row] = &[
    Row::new("lock_list", &[], "array", Role::Viewer, Kind::Read(lock_list), "Which job holds which object, and which wait."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    let jobs = JOBS.iter().map(|row| row.of("job", Origin::Own));
    jobs.chain(LOCKS.iter().map(|row| row.of("lock", Origin::Own)))
}

/// The longest wait of one call: less than the dialect's clients' own patience.
const MAX_WAIT_S: i64 = 840;

fn job_id(arguments: &Arguments) -> Result<JobId> {
    let id = arguments.int("id")?;
    u64::try_from(id).map(JobId).map_err(|_| arguments.wrong("id", "is negative"))
}

fn not_found(id: JobId) -> ApiFault {
    ApiFault::new("JOB_NOT_FOUND", format!("no job {id}, or it is no longer kept"))
}

fn job_submit<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let verb = api.verb(arguments.text("verb")?)?;
        Api::permit(verb, caller)?;
        let params = arguments.array("params")?.to_vec();
        let fields = Fields::of(arguments, "options", &["idempotency_key", "deadline_s", "dry_run"])?;
        if fields.bool("dry_run")? {
            let plan = api.plan(verb, params, caller, true).await?;
            return Ok(plan_value(verb.name, &plan).into());
        }
        let key = fields.text("idempotency_key")?;
        let key = key
            .map(|k| {
                Label::parse(&k).map_err(|e| arguments.wrong("options", format!("idempotency_key: {e}")))
            })
            .transpose()?;
        let deadline = match fields.int("deadline_s")? {
            None => None,
            Some(s @ 1..=604_800) => Some(Duration::from_secs(s)),
            Some(s) => {
                return Err(arguments
                    .wrong("options", format!("deadline_s: {s} is out of range; allowed: 1 to 604800")));
            }
        };
        // A caller's key is its own: another caller with the same key means another job. Whence it calls does not
        // matter: a manager may have several addresses.
        let key = key.map(|k| format!("{}/{k}", identity(caller)));
        let request = key.is_some().then(|| encode_call(verb.name, &params).to_vec());
        if let (Some(key), Some(request)) = (&key, &request)
            && let Some(id) = api.engine().known(key, request).await?
        {
            // Before it is planned: what the job did may make the same plan impossible now.
            return Ok(int(id.0).into());
        }
        let options = Options { idempotency_key: key, request, deadline, ..Options::default() };
        let id = api.submit(verb, params, caller, options).await?;
        Ok(int(id.0).into())
    }
    .boxed()
}

fn identity(caller: &Caller) -> String {
    match &caller.identity {
        Identity::Password => "password".to_owned(),
        Identity::Owner { .. } => "owner".to_owned(),
        Identity::Peer { fingerprint } => format!("peer:{fingerprint}"),
        Identity::Local { uid, .. } => format!("local:{uid}"),
    }
}

fn plan_value(verb: &str, plan: &Plan) -> Value {
    let steps = plan.steps.iter().map(|s| structure([("name", text(&s.name)), ("about", text(&s.about))]));
    structure([
        ("verb", text(verb)),
        ("about", text(&plan.about)),
        ("locks", texts(plan.locks.iter().map(lock_text))),
        ("steps", Value::Array(steps.collect())),
    ])
}

fn lock_text(want: &LockWant) -> String {
    match want.mode {
        Mode::Exclusive => want.object.clone(),
        Mode::Shared => format!("{} (shared)", want.object),
    }
}

fn job_get<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let id = job_id(arguments)?;
        let record = api.engine().get(id).await?.ok_or_else(|| not_found(id))?;
        Ok(full(api, &record).into())
    }
    .boxed()
}

fn job_wait<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let id = job_id(arguments)?;
        let seconds = u64::try_from(arguments.within("timeout_s", 0..=MAX_WAIT_S)?).unwrap_or(0);
        let record =
            api.engine().wait(id, Duration::from_secs(seconds)).await?.ok_or_else(|| not_found(id))?;
        Ok(full(api, &record).into())
    }
    .boxed()
}

fn job_list<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let fields = Fields::of(arguments, "filter", &["state", "verb", "object", "before", "limit"])?;
        let state = match fields.text("state")? {
            None => None,
            Some(name) => Some(parse_state(&name).ok_or_else(|| {
                arguments
                    .wrong("filter", "state: allowed: queued, running, undoing, succeeded, failed, cancelled")
            })?),
        };
        let listing = Listing {
            state,
            verb: fields.text("verb")?,
            object: fields.text("object")?,
            before: fields.int("before")?.map(JobId),
            limit: usize::try_from(fields.int("limit")?.unwrap_or(100).clamp(1, 1000)).unwrap_or(1000),
        };
        let records = api.engine().list(&listing).await?;
        Ok(Value::Array(records.iter().map(|r| Value::Struct(brief(api, r))).collect()).into())
    }
    .boxed()
}

fn parse_state(name: &str) -> Option<JobState> {
    use JobState::{Cancelled, Failed, Queued, Running, Succeeded, Undoing};
    [Queued, Running, Undoing, Succeeded, Failed, Cancelled].into_iter().find(|s| s.as_str() == name)
}

fn job_cancel<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let id = job_id(arguments)?;
        if api.engine().cancel(id, &caller.to_string()).await? {
            return Ok(Value::Nil.into());
        }
        let record = api.engine().get(id).await?.ok_or_else(|| not_found(id))?;
        Err(ApiFault::new("JOB_ENDED", format!("job {id} has {} already", record.state.as_str())))
    }
    .boxed()
}

fn lock_list<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let mut rows = Vec::new();
        for lock in api.engine().locks() {
            let record = api.engine().get(lock.job).await?;
            let since = record.as_ref().and_then(|r| r.started).or(record.as_ref().map(|r| r.created));
            rows.push(structure([
                ("lock", text(&lock.object)),
                ("mode", text(if lock.mode == Mode::Exclusive { "exclusive" } else { "shared" })),
                ("job", int(lock.job.0)),
                ("verb", text(record.as_ref().map_or("", |r| r.verb.as_str()))),
                ("caller", text(record.as_ref().map_or("", |r| r.caller.as_str()))),
                ("state", text(if lock.state == LockState::Held { "held" } else { "waiting" })),
                ("since", time(since)),
            ]));
        }
        Ok(Value::Array(rows).into())
    }
    .boxed()
}

fn time(time: Option<Timestamp>) -> Value {
    text(time.map_or_else(String::new, |t| t.to_string()))
}

/// A job without its steps.
fn brief(api: &Api, job: &JobRecord) -> BTreeMap<String, Value> {
    let waiting = if job.state == JobState::Queued { api.engine().waiting_for(job.id) } else { Vec::new() };
    let waiting = waiting
        .iter()
        .map(|(lock, other)| structure([("lock", text(lock)), ("job", int(other.0)), ("verb", text(""))]));
    let fault = job.fault.as_ref().map(|fault| {
        let code = super::fault::TABLE
            .iter()
            .find(|(name, ..)| *name == fault.name)
            .map_or(799, |(_, code, _)| *code);
        structure([("code", int(code)), ("name", text(&fault.name)), ("text", text(fault))])
    });
    let fields = [
        ("id", int(job.id.0)),
        ("verb", text(&job.verb)),
        ("about", text(&job.about)),
        ("caller", text(&job.caller)),
        ("state", text(job.state.as_str())),
        ("progress", int(job.progress)),
        ("step", text(job.current_step().map_or("", |s| s.name.as_str()))),
        ("locks", texts(job.locks.iter().map(lock_text))),
        ("waiting_for", Value::Array(waiting.collect())),
        ("created", text(job.created)),
        ("started", time(job.started)),
        ("ended", time(job.ended)),
        ("deadline", text(job.deadline)),
        ("parent", or_nil(job.parent.map(|p| int(p.0)))),
        ("children", Value::Array(job.children.iter().map(|c| int(c.0)).collect())),
        ("cancel_requested", Value::Bool(job.cancel.is_some())),
        ("fault", or_nil(fault)),
    ];
    fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

fn full(api: &Api, job: &JobRecord) -> Value {
    let mut map = brief(api, job);
    let steps = job.steps.iter().map(|step| {
        structure([
            ("name", text(&step.name)),
            ("about", text(&step.about)),
            ("state", text(step.state.as_str())),
            ("started", time(step.started)),
            ("ended", time(step.ended)),
            ("error", text(step.error.as_ref().map_or_else(String::new, ToString::to_string))),
        ])
    });
    map.insert("steps".to_owned(), Value::Array(steps.collect()));
    map.insert("trace".to_owned(), or_nil(job.trace.map(text)));
    map.insert("params".to_owned(), from_json(&job.params));
    map.insert("result".to_owned(), or_nil(job.result.as_ref().map(from_json)));
    Value::Struct(map)
}
