//! The family of statistics: the latest figures, and their history.

use super::Api;
use super::arguments::{Arguments, Fields, Type, may, need};
use super::fault::{ApiFault, Result};
use super::value::{int, or_nil, structure, text, texts};
use super::verb::{Kind, Origin, Row, Verb};
use crate::model::{Timestamp, excerpt};
use crate::stats::metric;
use crate::stats::{
    Figure, History, MetricId, Object, ObjectFigures, QueryError, Question, SeriesKey, Sweep,
};
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};
use std::collections::HashMap;
use std::sync::Arc;

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("stats_latest", &[may("filter", Type::Struct, "object: host, dom0, vm/<uuid> or domain/<number>; none: all")], "struct", Role::Viewer,
        Kind::Read(stats_latest), "All figures of the last sweep, as their sources count them; of counters also their rate a second. docs/metrics.md has what each means."),
    Row::new("stats_list", &[may("object", Type::Text, "host, dom0 or vm/<uuid>; none: all objects")], "array", Role::Viewer,
        Kind::Read(stats_list), "Objects that have a history; of one, its series."),
    Row::new("stats_query", &[need("object", Type::Text, "host, dom0 or vm/<uuid>"), need("metric", Type::Text, "a series: cpu_time, vif_rx_bytes:0"),
        need("from", Type::Int, "seconds since 1970; 0 or less: so long ago"), may("to", Type::Int, "the same; none: now"), may("step", Type::Int, "seconds between two values; 0 or none: as fine as it is kept")], "struct", Role::Viewer,
        Kind::Read(stats_query), "The history of a series: values at equal distances from `from` on, nil where nothing is known. Counters as their rate a second. Kept are 10 s for ten minutes, 1 min for two hours, 1 h for a week, 1 day for a year."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    OWN.iter().map(|row| row.of("statistics", Origin::Own))
}

fn object(arguments: &Arguments, name: &str, given: &str) -> Result<Object> {
    Object::parse(given).ok_or_else(|| {
        let why = format!("{} is none; allowed: host, dom0, vm/<uuid>, domain/<number>", excerpt(given));
        arguments.wrong(name, why)
    })
}

impl From<QueryError> for ApiFault {
    fn from(error: QueryError) -> Self {
        let name = match error {
            QueryError::NoObject(_) | QueryError::NoSeries { .. } => "STATISTIC_NOT_FOUND",
            QueryError::Backward | QueryError::Step(_) => "INVALID_PARAMETER",
            QueryError::Io(_) => "HOST_FAILED",
        };
        Self::new(name, error.to_string())
    }
}

fn stats_latest<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let only = Fields::of(arguments, "filter", &["object"])?.text("object")?;
        let only = only.map(|given| object(arguments, "filter", &given)).transpose()?;
        let sweep = api.reports.sampler.latest();
        if sweep.at == Timestamp(0) {
            return Err(ApiFault::new("NOT_READY", "nothing was measured yet; ask again in some seconds"));
        }
        if let Some(only) = only.filter(|only| sweep.object(*only).is_none()) {
            return Err(QueryError::NoObject(only).into());
        }
        // A thousand objects are some work, and their rates are behind a lock.
        ask(api, move |history| latest(history, &sweep, only)).await.map(Answer::from)
    }
    .boxed()
}

fn latest(history: &History, sweep: &Sweep, only: Option<Object>) -> Value {
    let wanted = sweep.objects.iter().filter(|one| only.is_none_or(|only| one.object == only));
    let objects = wanted.map(|one| {
        let rates: HashMap<SeriesKey, f32> = history.rates(one.object).into_iter().collect();
        figures(one, &rates)
    });
    structure([
        ("time", text(sweep.at)),
        ("took_ms", int(u64::try_from(sweep.took.as_millis()).unwrap_or(u64::MAX))),
        ("problems", texts(sweep.problems.iter().map(|(source, why)| format!("{source}: {why}")))),
        ("objects", Value::Array(objects.collect())),
    ])
}

fn figures(one: &ObjectFigures, rates: &HashMap<SeriesKey, f32>) -> Value {
    let figure = |figure: &Figure| {
        let metric = figure.metric.metric();
        let counts = metric.kind == metric::Kind::Counter;
        let rate = rates.get(&SeriesKey::new(figure.metric, figure.instance.clone()));
        structure([
            ("metric", text(metric.name)),
            ("instance", text(figure.instance.as_deref().unwrap_or(""))),
            ("value", Value::Double(figure.value)),
            ("unit", text(metric.unit.as_str())),
            ("rate", or_nil(rate.filter(|_| counts).map(|rate| double(*rate)))),
        ])
    };
    structure([
        ("object", text(one.object)),
        ("name", text(&one.name)),
        ("domid", or_nil(one.domid.map(|domid| int(domid.0)))),
        ("figures", Value::Array(one.figures.iter().map(figure).collect())),
    ])
}

/// As short as what is kept: 0.2, not 0.20000000298023224.
fn double(value: f32) -> Value {
    Value::Double(value.to_string().parse().unwrap_or(f64::from(value)))
}

/// Runs a question where it may block.
async fn ask<T: Send + 'static>(
    api: &Api,
    question: impl FnOnce(&History) -> T + Send + 'static,
) -> Result<T> {
    let history = Arc::clone(&api.reports.history);
    let asked = tokio::task::spawn_blocking(move || question(&history)).await;
    asked.map_err(|error| ApiFault::new("INTERNAL", format!("the history was not read: {error}")))
}

/// What a series keeps is told in: the unit, or of counters the unit a second.
fn unit(metric: MetricId) -> String {
    let metric = metric.metric();
    match metric.kind {
        metric::Kind::Gauge => metric.unit.as_str().to_owned(),
        metric::Kind::Counter => format!("{}/s", metric.unit.as_str()),
    }
}

fn stats_list<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let Some(given) = arguments.opt_text("object") else {
            let objects = ask(api, History::objects).await?;
            return Ok(texts(objects).into());
        };
        let object = object(arguments, "object", given)?;
        let series = ask(api, move |history| history.series(object)).await??;
        let row = |key: &SeriesKey| {
            let metric = key.metric();
            structure([
                ("series", text(key)),
                ("unit", text(metric.map(unit).unwrap_or_default())),
                ("meaning", text(metric.map_or("", |metric| metric.metric().meaning))),
                ("source", text(metric.map_or("", |metric| metric.metric().source))),
            ])
        };
        Ok(Value::Array(series.iter().map(row).collect()).into())
    }
    .boxed()
}

fn stats_query<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let object = object(arguments, "object", arguments.text("object")?)?;
        let given = arguments.text("metric")?;
        let series = SeriesKey::parse(given).ok_or_else(|| {
            let why = format!("{} is no series; stats_list has those of an object", excerpt(given));
            arguments.wrong("metric", why)
        })?;
        let now = Timestamp::now();
        let now_s = now.0 / 1000;
        let absolute = |given: i64| match u64::try_from(given) {
            Ok(seconds) if seconds > 0 => seconds,
            _ => now_s.saturating_sub(given.unsigned_abs()),
        };
        let from_s = absolute(arguments.int("from")?);
        let to_s = arguments.opt_int("to").map_or(now_s, absolute).min(now_s);
        let step_s = u64::try_from(arguments.opt_int("step").unwrap_or(0))
            .map_err(|_| arguments.wrong("step", "is negative"))?;
        let unit = series.metric().map(unit).unwrap_or_default();
        let question = Question { object, series, from_s, to_s, step_s };
        let asked = question.clone();
        let answer = ask(api, move |history| history.query(&asked, now)).await??;
        let value = |value: &Option<f32>| or_nil(value.map(double));
        Ok(structure([
            ("object", text(question.object)),
            ("metric", text(&question.series)),
            ("unit", text(unit)),
            ("from", int(answer.from_s)),
            ("step_s", int(answer.step_s)),
            ("resolution_s", int(answer.resolution_s)),
            ("values", Value::Array(answer.values.iter().map(value).collect())),
        ])
        .into())
    }
    .boxed()
}
