//! The family of events.

use super::Api;
use super::arguments::{Arguments, Fields, Type, int as integer, may, need};
use super::fault::{ApiFault, Result};
use super::value::{from_json, int, or_nil, structure, text};
use super::verb::{Kind, Origin, Row, Verb};
use crate::event::{Event, Page, Query, Severity};
use crate::model::EventNumber;
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};
use std::time::Duration;

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("event_list", &[may("filter", Type::Struct, "since, limit, severity (at least), object, unacknowledged")], "struct", Role::Viewer,
        Kind::Read(event_list), "Events after `since`, oldest first; `gap` if some of them are no longer kept. Without since: the newest."),
    Row::new("event_wait", &[need("since", Type::Int, "the last number already known"), need("timeout_s", Type::Int, "0 to 840")], "struct", Role::Viewer,
        Kind::Read(event_wait), "As event_list, but waits until there is something to answer."),
    Row::new("event_ack", &[need("numbers", Type::Array, "up to 1000 numbers")], "int", Role::Operator,
        Kind::Signal(event_ack), "Acknowledges events; answers how many were not acknowledged before."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    OWN.iter().map(|row| row.of("event", Origin::Own))
}

fn event_list<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let fields =
            Fields::of(arguments, "filter", &["since", "limit", "severity", "object", "unacknowledged"])?;
        let severity = match fields.text("severity")? {
            None => None,
            Some(name) => Some(Severity::parse(&name).ok_or_else(|| {
                arguments.wrong("filter", "severity: allowed: info, warning, error, critical")
            })?),
        };
        let limit = fields.int("limit")?.unwrap_or(100).clamp(1, 1000);
        let mut query = Query {
            since: EventNumber(fields.int("since")?.unwrap_or(0)),
            severity,
            object: fields.text("object")?,
            unacknowledged: fields.bool("unacknowledged")?,
            limit: usize::try_from(limit).unwrap_or(1000),
        };
        let events = &api.operations.events;
        let plain = query.severity.is_none() && query.object.is_none() && !query.unacknowledged;
        if fields.int("since")?.is_none() && plain {
            // The newest: whoever has no place to go on from wants to see what happened last.
            query.since = EventNumber(events.last().0.saturating_sub(limit));
            let mut page = events.list(&query).await?;
            page.gap = None;
            return Ok(page_value(&page).into());
        }
        Ok(page_value(&events.list(&query).await?).into())
    }
    .boxed()
}

fn event_wait<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let since = u64::try_from(arguments.int("since")?).map_err(|_| arguments.wrong("since", "is negative"))?;
        let seconds = u64::try_from(arguments.within("timeout_s", 0..=840)?).unwrap_or(0);
        let query = Query { since: EventNumber(since), limit: 1000, ..Query::default() };
        tokio::select! {
            page = api.operations.events.wait(&query, Duration::from_secs(seconds)) => Ok(page_value(&page?).into()),
            () = api.engine().stopping() => Err(ApiFault::new("STOPPING", "the agent is stopping; ask again when it is back")),
        }
    }
    .boxed()
}

fn event_ack<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let list = arguments.array("numbers")?;
        if list.len() > 1000 {
            return Err(arguments.wrong("numbers", format!("{} numbers; allowed: up to 1000", list.len())));
        }
        let number = |v: &Value| integer(v).and_then(|n| u64::try_from(n).ok()).map(EventNumber);
        let numbers: Option<Vec<_>> = list.iter().map(number).collect();
        let numbers =
            numbers.ok_or_else(|| arguments.wrong("numbers", "allowed: whole numbers, 0 or more"))?;
        let count = api.operations.events.acknowledge(&numbers, &caller.to_string()).await?;
        Ok(int(i64::try_from(count).unwrap_or(i64::MAX)).into())
    }
    .boxed()
}

fn page_value(page: &Page) -> Value {
    let gap = page.gap.map(|gap| structure([("from", int(gap.from.0)), ("to", int(gap.to.0))]));
    structure([
        ("events", Value::Array(page.events.iter().map(|(n, e)| event_value(*n, e)).collect())),
        ("last", int(page.last.0)),
        ("gap", or_nil(gap)),
    ])
}

fn event_value(number: EventNumber, event: &Event) -> Value {
    let ack = event.acknowledged.as_ref();
    structure([
        ("number", int(number.0)),
        ("time", text(event.time)),
        ("type", text(&event.kind)),
        ("severity", text(event.severity.as_str())),
        ("object", text(&event.object)),
        ("text", text(&event.text)),
        ("job", or_nil(event.job.map(|j| int(j.0)))),
        ("trace", or_nil(event.trace.as_ref().map(text))),
        ("data", from_json(&serde_json::Value::Object(event.data.clone()))),
        ("acknowledged", Value::Bool(ack.is_some())),
        ("acknowledged_by", text(ack.map_or("", |a| a.by.as_str()))),
        ("acknowledged_at", text(ack.map_or_else(String::new, |a| a.at.to_string()))),
    ])
}
