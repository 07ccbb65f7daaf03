//! The family of events.

use super::Api;
use super::arguments::{Arguments, Fields, Type, int as integer, may, need, type_name};
use super::fault::{ApiFault, Result};
use super::value::{from_json, int, or_nil, structure, text};
use super::verb::{Kind, Origin, Row, Verb};
use crate::event::{Event, Log, Page, Query, Severity, Token};
use crate::model::EventNumber;
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};
use std::time::Duration;

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("event_list", &[may("filter", Type::Struct, "since or token, limit, severity (at least), object, unacknowledged")], "struct", Role::Viewer,
        Kind::Read(event_list), "Events after `since` or `token`, oldest first; `gap` if some of them are no longer kept, `lost` if events may have been missed, `token` to go on. Without since and token: the newest."),
    Row::new("event_wait", &[need("since", Type::Any, "the last number already known, or the token of an earlier answer"), need("timeout_s", Type::Int, "0 to 840"), may("options", Type::Struct, "limit, severity (at least), object")], "struct", Role::Viewer,
        Kind::Read(event_wait), "As event_list, but waits until there is something to answer. With a token that is not of this history, or a number ahead of it: at once, all that is kept, and `lost`."),
    Row::new("event_ack", &[need("numbers", Type::Array, "up to 1000 numbers")], "int", Role::Operator,
        Kind::Signal(event_ack), "Acknowledges events; answers how many were not acknowledged before."),
];

/// Events in one answer.
const MOST: u64 = 1000;

pub fn verbs() -> impl Iterator<Item = Verb> {
    OWN.iter().map(|row| row.of("event", Origin::Own))
}

/// Where a reader goes on, and whether it is known to have missed something.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    since: EventNumber,
    lost: bool,
}

impl Place {
    fn of_token(events: &Log, arguments: &Arguments, parameter: &str, text: &str) -> Result<Self> {
        let token: Token = text.parse().map_err(|error| arguments.wrong(parameter, error))?;
        let (since, lost) = events.resume(&token);
        Ok(Self { since, lost })
    }

    /// One that is ahead of us was given by a history that is no more, as with a token.
    fn of_number(events: &Log, number: EventNumber) -> Self {
        let (since, lost) = events.resume(&events.token(number));
        Self { since, lost }
    }
}

/// What both verbs may be asked to leave out.
fn query(arguments: &Arguments, fields: &Fields<'_>, name: &str, limit: u64) -> Result<Query> {
    let severity = match fields.text("severity")? {
        None => None,
        Some(text) => Some(
            Severity::parse(&text)
                .ok_or_else(|| arguments.wrong(name, "severity: allowed: info, warning, error, critical"))?,
        ),
    };
    let limit = fields.int("limit")?.unwrap_or(limit).clamp(1, MOST);
    let limit = usize::try_from(limit).unwrap_or(1);
    Ok(Query { severity, object: fields.text("object")?, limit, ..Query::default() })
}

fn event_list<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let allowed = ["since", "token", "limit", "severity", "object", "unacknowledged"];
        let fields = Fields::of(arguments, "filter", &allowed)?;
        let events = &api.operations.events;
        let query = Query {
            unacknowledged: fields.bool("unacknowledged")?,
            ..query(arguments, &fields, "filter", 100)?
        };
        let place = match (fields.int("since")?, fields.text("token")?) {
            (Some(_), Some(_)) => {
                return Err(arguments.wrong("filter", "has since and token; allowed: one of them"));
            }
            (Some(since), None) => Some(Place::of_number(events, EventNumber(since))),
            (None, Some(token)) => Some(Place::of_token(events, arguments, "filter", &token)?),
            (None, None) => None,
        };
        if let Some(place) = place {
            let page = events.list(&Query { since: place.since, ..query }).await?;
            return Ok(page_value(events, &page, place.lost).into());
        }
        let plain = query.severity.is_none() && query.object.is_none() && !query.unacknowledged;
        // The newest: whoever has no place to go on from wants to see what happened last.
        let newest = EventNumber(events.last().0.saturating_sub(query.limit as u64));
        let since = if plain { newest } else { EventNumber(0) };
        let mut page = events.list(&Query { since, ..query }).await?;
        // And has missed nothing.
        page.gap = None;
        Ok(page_value(events, &page, false).into())
    }
    .boxed()
}

fn event_wait<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let events = &api.operations.events;
        let place = match arguments.value("since") {
            Some(Value::String(token)) => Place::of_token(events, arguments, "since", token)?,
            Some(value) => {
                let number = integer(value).ok_or_else(|| {
                    let why = format!("is of the wrong type ({}); allowed: int, or a token", type_name(value));
                    arguments.wrong("since", why)
                })?;
                let number = u64::try_from(number).map_err(|_| arguments.wrong("since", "is negative"))?;
                Place::of_number(events, EventNumber(number))
            }
            None => return Err(arguments.wrong("since", "is missing")),
        };
        let seconds = u64::try_from(arguments.within("timeout_s", 0..=840)?).unwrap_or(0);
        let fields = Fields::of(arguments, "options", &["limit", "severity", "object"])?;
        let query = Query { since: place.since, ..query(arguments, &fields, "options", MOST)? };
        if place.lost {
            // It is to hear of that now, not of the next event some day.
            return Ok(page_value(events, &events.list(&query).await?, true).into());
        }
        tokio::select! {
            page = events.wait(&query, Duration::from_secs(seconds)) => Ok(page_value(events, &page?, false).into()),
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

fn page_value(events: &Log, page: &Page, lost: bool) -> Value {
    let gap = page.gap.map(|gap| structure([("from", int(gap.from.0)), ("to", int(gap.to.0))]));
    structure([
        ("events", Value::Array(page.events.iter().map(|(n, e)| event_value(*n, e)).collect())),
        ("last", int(page.last.0)),
        ("lost", Value::Bool(lost || gap.is_some())),
        ("gap", or_nil(gap)),
        ("token", text(events.token(page.last))),
    ])
}

fn event_value(number: EventNumber, event: &Event) -> Value {
    let ack = event.acknowledged.as_ref();
    let mut value = structure([
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
    ]);
    if let (Some(trace), Value::Struct(fields)) = (&event.trace, &mut value) {
        fields.insert("trace".to_owned(), text(trace));
    }
    value
}
