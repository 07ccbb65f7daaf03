//! The family of the network: declare it, see what that would do, do it with a way back, confirm it, look at it.

use super::Api;
use super::arguments::{Arguments, Fields, Param, Type, may, need};
use super::fault::{ApiFault, Result};
use super::value::{from_json, int, structure, text, texts};
use super::verb::{Kind, Origin, Row, Verb};
use crate::job::{JobRecord, JobState};
use crate::model::JobId;
use crate::network::{Desired, Way};
use crate::operation::network::{
    MAX_CONFIRM, OnFailure, Open, Options, Shown, Waiting, Want, apply, boot, discover, told,
};
use crate::operation::plan::Plan;
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};
use serde_json::json;
use std::net::SocketAddr;
use tokio::time::Instant;

const DESIRED: Param = need(
    "desired",
    Type::Struct,
    "{links: {NAME: {kind: ethernet|bond|vlan|bridge|dummy, …}}, routes: [{to, via, link, metric, table, onlink, \
     source, hops: [{via, link, weight, onlink}]}], networks: {NAME: {link, roles}}}: \
     all that is to be managed; what was declared before and is not here any more is removed, or let go",
);
const OPTIONS: Param = may(
    "options",
    Type::Struct,
    "{confirm_within: seconds until it is rolled back unless network_confirm is called, on_failure: rollback|keep, \
     may_cut_management: true to do it though it takes away what you came by}",
);

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("network_show", &[], "struct", Role::Viewer, Kind::Read(network_show), "Links, addresses, routes and neighbours as the kernel has them, what is declared, whose each link is, the change under way, and what the kernel lacks of the declaration (drift)."),
    Row::new("network_plan", &[DESIRED, OPTIONS], "struct", Role::Operator, Kind::Read(network_plan), "What network_apply would do, step by step. Changes nothing."),
    Row::new("network_apply", &[DESIRED, OPTIONS], "struct", Role::Admin, Kind::Window(network_apply, applied), "Changes the network to what is declared: all of it, or it is rolled back. With confirm_within it answers as soon as it is done and waits for network_confirm."),
    Row::new("network_confirm", &[may("job", Type::Int, "of the change that is meant; the one that waits if not said")], "struct", Role::Admin, Kind::Signal(network_confirm), "The change that waits for it holds from now on."),
    Row::new("network_rollback", &[], "nil", Role::Admin, Kind::Signal(network_rollback), "Takes the change under way back; one whose rollback was blocked is tried again at once."),
    Row::new("network_discover", &[], "struct", Role::Operator, Kind::Job(network_discover, result), "Reads the network, and tells how it differs from what is declared."),
    Row::new("network_history", &[may("limit", Type::Int, "how many, 1 to 1000; 20 if not said")], "array", Role::Viewer, Kind::Read(network_history), "Past changes, the newest first: when, who, how each ended and why."),
    Row::new("network_diagram", &[], "string", Role::Viewer, Kind::Read(network_diagram), "Ports, bonds, VLANs, bridges and vifs as a tree of text."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    OWN.iter().map(|row| row.of("network", Origin::Own))
}

/// Whom a change must not cut off.
pub(super) fn way(caller: &Caller) -> Option<Way> {
    // A socket for both families tells IPv4 callers as IPv6 ones (RFC 4291, 2.5.5.2).
    let ip = |address: SocketAddr| address.ip().to_canonical();
    let peer = caller.address.map(ip).filter(|ip| !ip.is_loopback())?;
    Some(Way { peer, own: caller.own.map(ip) })
}

fn read_desired(arguments: &Arguments) -> Result<Desired> {
    let value = Value::Struct(arguments.structure("desired")?.clone());
    let json = super::value::to_json(&value).map_err(|why| arguments.wrong("desired", why))?;
    Desired::read(&json).map_err(|problems| arguments.wrong("desired", told(&problems).join("; ")))
}

fn read_options(arguments: &Arguments) -> Result<Options> {
    let fields = Fields::of(arguments, "options", &["confirm_within", "on_failure", "may_cut_management"])?;
    let confirm_within_s = fields.int("confirm_within")?;
    if let Some(seconds) = confirm_within_s.filter(|s| *s == 0 || *s > MAX_CONFIRM.as_secs()) {
        let why = format!(
            "confirm_within: {seconds} is out of range; allowed: 1 to {} seconds",
            MAX_CONFIRM.as_secs()
        );
        return Err(arguments.wrong("options", why));
    }
    let on_failure = match fields.text("on_failure")?.as_deref() {
        None | Some("rollback") => OnFailure::Rollback,
        Some("keep") => OnFailure::Keep,
        Some(other) => {
            let why =
                format!("on_failure: {} is not one; allowed: rollback, keep", crate::model::excerpt(other));
            return Err(arguments.wrong("options", why));
        }
    };
    Ok(Options { confirm_within_s, on_failure, may_cut_management: fields.bool("may_cut_management")? })
}

fn network_apply<'a>(
    _: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let want = Want::Whole(Box::new(read_desired(arguments)?));
        let options = read_options(arguments)?;
        Ok(apply::change("change the network", want, options, way(caller), None))
    }
    .boxed()
}

/// Answers when all is done, or as soon as it waits to be confirmed.
fn applied(api: &Api, job: JobId, end: Instant) -> BoxFuture<'_, Result<Value>> {
    async move {
        match api.operations.network_applied(job, end).await? {
            Waiting::ForConfirmation(open) => {
                let mut told = open_value(&open, "waits_for_confirmation");
                if let Value::Struct(fields) = &mut told {
                    fields.insert("changes".to_owned(), texts(api.changes_of(job).await?));
                }
                Ok(told)
            }
            Waiting::Ended | Waiting::GoesOn => {
                let record = api.finished(job, end).await?;
                Ok(result(&record))
            }
        }
    }
    .boxed()
}

impl Api {
    /// The steps that a change of the network had, as its plan said.
    async fn changes_of(&self, job: JobId) -> Result<Vec<String>> {
        let open = self.operations.network_open().await?.filter(|open| open.job == job);
        Ok(open
            .map(|open| told(crate::network::plan(&open.snapshot, &open.aim, &open.scope())))
            .unwrap_or_default())
    }
}

fn result(record: &JobRecord) -> Value {
    let fields = record.result.clone().unwrap_or_else(|| json!({}));
    let mut value = from_json(&fields);
    if let Value::Struct(fields) = &mut value {
        fields.insert("job".to_owned(), int(record.id.0));
        fields.remove("answer");
    }
    value
}

fn open_value(open: &Open, state: &str) -> Value {
    structure([
        ("job", int(open.job.0)),
        ("began", text(open.began)),
        ("state", text(state)),
        ("verb", text(&open.verb)),
        ("caller", text(&open.by)),
        ("why", super::value::or_nil(open.why.as_ref().map(text))),
        ("confirm_until", super::value::or_nil(open.confirm_until.map(text))),
    ])
}

fn network_plan<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let want = Want::Whole(Box::new(read_desired(arguments)?));
        let draft = api.operations.network_draft(&want, read_options(arguments)?, way(caller)).await?;
        let count = int(draft.changes.len() as u64);
        let steps = draft.changes.iter().map(|change| {
            let detail = serde_json::to_value(change).unwrap_or_default();
            structure([("about", text(change)), ("detail", from_json(&detail))])
        });
        Ok(structure([("count", count), ("steps", Value::Array(steps.collect()))]).into())
    }
    .boxed()
}

fn network_show<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let Shown { now, neighbours, confirmed, owners, open, stage, drift } =
            api.operations.network_show().await?;
        let mut links = serde_json::to_value(&now.links).unwrap_or_default();
        for (name, owner) in &owners {
            if let Some(link) = links.get_mut(name.as_str()) {
                link["owner"] = owner.to_string().into();
            }
        }
        for name in confirmed.desired.links.keys() {
            if let Some(link) = links.get_mut(name.as_str()) {
                link["owner"] = "dom0d".into();
            }
        }
        let routes = serde_json::to_value(&now.routes).unwrap_or_default();
        let neighbours = serde_json::to_value(&neighbours).unwrap_or_default();
        let declared = serde_json::to_value(&confirmed.desired).unwrap_or_default();
        Ok(structure([
            ("links", from_json(&links)),
            ("routes", from_json(&routes)),
            ("neighbours", from_json(&neighbours)),
            ("declared", from_json(&declared)),
            ("changed", super::value::or_nil(confirmed.changed.map(text))),
            ("change", open.as_ref().map_or(Value::Nil, |open| open_value(open, stage))),
            ("drift", texts(drift)),
        ])
        .into())
    }
    .boxed()
}

fn network_confirm<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let job = match arguments.opt_int("job") {
            None => None,
            Some(_) => Some(JobId(arguments.within("job", 1..=i64::MAX)?.unsigned_abs())),
        };
        let open = api.operations.network_confirm(&caller.to_string(), job).await?;
        // Whoever confirms wants to know that it holds, not that he was heard.
        let record = api.finished(open.job, api.wait_end()).await?;
        Ok(result(&record).into())
    }
    .boxed()
}

fn network_rollback<'a>(api: &'a Api, _: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let Some(open) = api.operations.network_open().await? else {
            return Err(ApiFault::new("NOTHING_TO_CONFIRM", "no change of the network is under way"));
        };
        let end = api.wait_end();
        if api.engine.cancel(open.job, &caller.to_string()).await? {
            // It ends cancelled, which is what was asked for; a rollback that was blocked is told.
            let patience = end.saturating_duration_since(Instant::now());
            let ended = api.engine.wait(open.job, patience).await?;
            if ended.is_some_and(|record| record.state == JobState::Succeeded) {
                let text = format!("too late: the change of job {} was confirmed, and holds", open.job);
                return Err(ApiFault::new("JOB_ENDED", text));
            }
            if api.operations.network_open().await?.is_some_and(|left| left.job == open.job) {
                return Err(ApiFault::new(
                    "ROLLBACK_BLOCKED",
                    format!("job {} tells why; it is tried again", open.job),
                ));
            }
            return Ok(Value::Nil.into());
        }
        let options = crate::job::Options::default();
        let submission =
            api.operations.submission("network_restore", &caller.to_string(), boot::restore(), options);
        let job = api.engine.submit(submission).await?;
        api.finished(job, end).await?;
        Ok(Value::Nil.into())
    }
    .boxed()
}

fn network_discover<'a>(_: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move { Ok(discover::discover(None, None)) }.boxed()
}

fn network_history<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    _: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let limit = match arguments.opt_int("limit") {
            None => 20,
            Some(_) => arguments.within("limit", 1..=1000)?,
        };
        let past = api.operations.network_history(usize::try_from(limit).unwrap_or(1)).await?;
        let rows = past.into_iter().map(|one| {
            let ending = serde_json::to_value(one.ending).unwrap_or_default();
            structure([
                ("at", text(one.at)),
                ("job", int(one.job.0)),
                ("verb", text(one.verb)),
                ("caller", text(one.caller)),
                ("ending", from_json(&ending)),
                ("changes", texts(one.changes)),
                ("why", super::value::or_nil(one.why.map(text))),
            ])
        });
        Ok(Value::Array(rows.collect()).into())
    }
    .boxed()
}

fn network_diagram<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let Shown { now, confirmed, owners, .. } = api.operations.network_show().await?;
        Ok(text(crate::network::diagram(&now, &confirmed.desired, &owners)).into())
    }
    .boxed()
}
