//! The family of the manager: what it is told, how far it has got it, and the dialect's words for that.

use super::Api;
use super::arguments::{Arguments, Type, may, need};
use super::fault::{ApiFault, Result};
use super::ownership;
use super::value::{int, or_nil, structure, text, to_json};
use super::verb::{Kind, Origin, Row, Verb, nil};
use crate::event::{Event, kind};
use crate::host::{HostRecord, ManagerUrl, Ownership, OwnershipError};
use crate::manager::{Probe, Status, Stream};
use crate::operation::plan::Plan;
use crate::store::Txn;
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};

/// What may be notified, as JSON.
const MAX_NOTIFICATION_BYTES: usize = 16 * 1024;
/// Each costs more memory than its text.
const MAX_NOTIFICATION_VALUES: usize = 1000;
/// In seconds. Nothing is measured more often than every ten.
const INTERVAL_S: std::ops::RangeInclusive<i64> = 10..=86_400;

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("set_statistic_interval", &[need("interval", Type::Int, "seconds, 10 to 86400")], "nil", Role::Operator,
        Kind::Job(set_statistic_interval, nil), "How often statistics are sent to the manager."),
    Row::new("set_statistics_interval", &[need("interval", Type::Int, "seconds, 10 to 86400")], "nil", Role::Operator,
        Kind::Job(set_statistic_interval, nil), "The same as set_statistic_interval, as CloudStack writes it."),
    Row::new("notify_manager", &[need("notification", Type::Text, "what to say, up to 4096 bytes"), may("data", Type::Any, "more about it, up to 16 KiB as JSON and 1000 values")], "nil", Role::Operator,
        Kind::Signal(notify_manager), "Tells the manager something: an event manager.notification."),
    Row::new("update_core_api_bindings", &[need("url", Type::Text, "where the manager is called"), may("option", Type::Any, "not looked at")], "nil", Role::Admin,
        Kind::Job(update_core_api_bindings, nil), "The manager has another address: what goes to its one URL goes there from now on."),
];

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("manager_status", &[], "struct", Role::Viewer, Kind::Read(manager_status),
        "The manager that owns the host, and how far events and statistics are delivered to it."),
    Row::new("manager_test", &[], "array", Role::Operator, Kind::Signal(manager_test),
        "Sends a word to the manager that asks for nothing, by each stream, and tells what became of it. A stream that waits tries again at once."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    let dialect = DIALECT.iter().map(|row| row.of("manager", Origin::Dialect));
    dialect.chain(OWN.iter().map(|row| row.of("manager", Origin::Own)))
}

fn set_statistic_interval<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    _: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let seconds = u32::try_from(arguments.within("interval", INTERVAL_S)?).unwrap_or(u32::MAX);
        let record = HostRecord::clone(&api.operations.host_record());
        let record = HostRecord { statistic_interval_s: seconds, ..record };
        Ok(ownership::host_changed(api, record, format!("statistics are sent every {seconds} s")))
    }
    .boxed()
}

fn update_core_api_bindings<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    _: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        // Credentials inside are the manager's secret, and dropped.
        let (url, _) =
            ManagerUrl::split(arguments.text("url")?).map_err(|error| arguments.wrong("url", error))?;
        let mut record = HostRecord::clone(&api.operations.host_record());
        let Ownership::Owned(owner) = &mut record.ownership else {
            return Err(OwnershipError::NotOwned.into());
        };
        owner.core_api_url = Some(url.clone());
        Ok(ownership::host_changed(api, record, format!("the manager is called at {}", url.as_str())))
    }
    .boxed()
}

fn notify_manager<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let said = arguments.text("notification")?;
        if said.len() > 4096 {
            let why = format!("is {} bytes long; allowed: up to 4096", said.len());
            return Err(arguments.wrong("notification", why));
        }
        let data = match arguments.value("data") {
            None | Some(Value::Nil) => serde_json::Value::Null,
            Some(data) => to_json(data).map_err(|why| arguments.wrong("data", why))?,
        };
        let size = data.to_string().len();
        if size > MAX_NOTIFICATION_BYTES {
            let why = format!("is {size} bytes long as JSON; allowed: up to {MAX_NOTIFICATION_BYTES}");
            return Err(arguments.wrong("data", why));
        }
        let count = values(&data);
        if count > MAX_NOTIFICATION_VALUES {
            let why = format!("has {count} values; allowed: up to {MAX_NOTIFICATION_VALUES}");
            return Err(arguments.wrong("data", why));
        }
        let event = Event::new(kind::MANAGER_NOTIFICATION, "host", said)
            .with("by", caller.to_string())
            .with("data", data);
        // What is said must not take the room that is kept for what happens.
        api.operations.events.publish_with(&event, Txn::new()).await?;
        Ok(Value::Nil.into())
    }
    .boxed()
}

/// How many there are, all in all.
fn values(data: &serde_json::Value) -> usize {
    match data {
        serde_json::Value::Array(list) => 1 + list.iter().map(values).sum::<usize>(),
        serde_json::Value::Object(map) => 1 + map.values().map(values).sum::<usize>(),
        _ => 1,
    }
}

fn manager_status<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let record = api.operations.host_record();
        let owner = record.ownership.owner();
        let pin = owner.and_then(|owner| owner.certificate.as_ref());
        let streams = api.reports.deliveries.status();
        let seen = streams.iter().find_map(|(_, status)| status.learned.as_deref());
        Ok(structure([
            ("owned", Value::Bool(owner.is_some())),
            ("manager", text(owner.map_or("", |owner| owner.manager.as_str()))),
            ("since", text(owner.map_or_else(String::new, |owner| owner.since.to_string()))),
            ("certificate", text(pin.map_or("", |pin| pin.fingerprint.as_str()))),
            ("certificate_seen", text(seen.unwrap_or(""))),
            ("statistic_interval_s", int(record.statistic_interval_s)),
            ("streams", Value::Array(streams.iter().map(|(s, told)| stream(*s, told)).collect())),
        ])
        .into())
    }
    .boxed()
}

fn stream(stream: Stream, status: &Status) -> Value {
    let time =
        |time: Option<crate::model::Timestamp>| text(time.map_or_else(String::new, |at| at.to_string()));
    // Statistics are numbered by their time.
    let number = |number: u64| match stream {
        Stream::Events => int(number),
        Stream::Statistics => time((number > 0).then(|| crate::manager::sample_time(number))),
    };
    let gap = status.last_gap.map(|gap| structure([("from", int(gap.from)), ("to", int(gap.to))]));
    structure([
        ("stream", text(stream.as_str())),
        ("state", text(status.state.as_str())),
        ("url", text(&status.url)),
        ("taken", number(status.number)),
        ("newest", number(status.newest)),
        ("behind", int(status.behind)),
        ("items", int(status.items)),
        ("batches", int(status.batches)),
        ("failed", int(status.failed)),
        ("failures_in_a_row", int(status.failures)),
        ("last_ok", time(status.last_ok)),
        ("last_error", text(&status.last_error)),
        ("next_try", time(status.next_try)),
        ("gaps", int(status.gaps)),
        ("last_gap", or_nil(gap)),
        ("certificate_seen", text(status.learned.as_deref().unwrap_or(""))),
    ])
}

fn manager_test<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        if api.operations.host_record().ownership.owner().is_none() {
            return Err(ApiFault::new("NOT_OWNED", "no manager owns this host, so there is nobody to test"));
        }
        let probes = api.reports.deliveries.probe().await;
        Ok(Value::Array(probes.iter().map(probe).collect()).into())
    }
    .boxed()
}

fn probe(probe: &Probe) -> Value {
    structure([
        ("stream", text(probe.stream.as_str())),
        ("url", text(probe.url.as_deref().unwrap_or(""))),
        ("ok", Value::Bool(probe.outcome.is_ok())),
        ("took_ms", int(u64::try_from(probe.took.as_millis()).unwrap_or(u64::MAX))),
        ("error", text(probe.outcome.as_ref().err().map_or("", String::as_str))),
    ])
}
