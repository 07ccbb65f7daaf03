//! Statistics: the latest figures, and a series' history as a plot.

use super::args::{Span, StatsCommand};
use super::plot::{self, Series};
use super::scale::human;
use super::values::{int, number, options, text};
use super::{CtlError, Session};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use xmlrpc::Value;

const FIGURES: &[super::output::Column] =
    &[("METRIC", "metric"), ("INSTANCE", "instance"), ("VALUE", "shown"), ("RATE", "shown_rate")];
const SERIES: &[super::output::Column] = &[("SERIES", "series"), ("UNIT", "unit"), ("MEANING", "meaning")];
/// Without a terminal that tells its size.
const USUAL_WIDTH: usize = 80;
const LEAST_WIDTH: usize = 30;

pub async fn execute(session: &mut Session<'_>, command: StatsCommand) -> Result<(), CtlError> {
    match command {
        StatsCommand::Show { object } => show(session, &object).await,
        StatsCommand::List { object } => list(session, object).await,
        StatsCommand::Graph { object, series, last, step, height } => {
            graph(session, &object, &series, (&last, step), usize::from(height)).await
        }
    }
}

/// What an operator calls an object: `host`, `dom0`, `vm/<uuid>`, a VM's name or UUID.
async fn object(session: &mut Session<'_>, given: &str) -> Result<String, CtlError> {
    let plain =
        given == "host" || given == "dom0" || given.starts_with("vm/") || given.starts_with("domain/");
    if plain {
        return Ok(given.to_owned());
    }
    Ok(format!("vm/{}", super::vm::resolve(session, given).await?))
}

async fn show(session: &mut Session<'_>, given: &str) -> Result<(), CtlError> {
    let object = object(session, given).await?;
    let filter = options([("object", Some(Value::from(object)))]);
    let latest = session.read("stats_latest", &[filter]).await?;
    if session.printer.is_json() {
        return session.printer.value(&latest);
    }
    for problem in latest["problems"].as_array().unwrap_or(&[]) {
        session.printer.note(&format!("not measured: {}", problem.as_str().unwrap_or("")));
    }
    for one in latest["objects"].as_array().unwrap_or(&[]) {
        let rows = one["figures"].as_array().unwrap_or(&[]).iter().map(shown).collect();
        session.printer.list(FIGURES, &Value::Array(rows))?;
    }
    session.printer.note(&format!("measured {}", text(&latest, "time")));
    Ok(())
}

/// A figure with its value as people read it.
fn shown(figure: &Value) -> Value {
    let mut row = super::values::members(figure.clone());
    let unit = text(figure, "unit");
    let value = figure.get("value").and_then(Value::as_f64).unwrap_or(0.0);
    row.insert("shown".to_owned(), Value::from(human(value, unit)));
    let rate = figure.get("rate").and_then(Value::as_f64);
    let rate = rate.map_or_else(String::new, |rate| human(rate, &format!("{unit}/s")));
    row.insert("shown_rate".to_owned(), Value::from(rate));
    Value::Struct(row)
}

async fn list(session: &mut Session<'_>, given: Option<String>) -> Result<(), CtlError> {
    let Some(given) = given else {
        let objects = session.read("stats_list", &[]).await?;
        if session.printer.is_json() {
            return session.printer.value(&objects);
        }
        for object in objects.as_array().unwrap_or(&[]) {
            session.printer.line(object.as_str().unwrap_or(""))?;
        }
        return Ok(());
    };
    let object = object(session, &given).await?;
    let series = session.read("stats_list", &[Value::from(object)]).await?;
    session.printer.list(SERIES, &series)
}

async fn graph(
    session: &mut Session<'_>,
    given: &str,
    series: &str,
    (last, step): (&Span, i64),
    height: usize,
) -> Result<(), CtlError> {
    let object = object(session, given).await?;
    let from = -i64::try_from(last.seconds()).unwrap_or(i64::MAX);
    let params = [Value::from(object), Value::from(series), int(from), int(0), int(step)];
    let answer = session.read("stats_query", &params).await?;
    if session.printer.is_json() {
        return session.printer.value(&answer);
    }
    let values: Vec<Option<f64>> =
        answer["values"].as_array().unwrap_or(&[]).iter().map(Value::as_f64).collect();
    let (from_s, step_s) = (number(&answer, "from").unwrap_or(0), number(&answer, "step_s").unwrap_or(0));
    let long = last.seconds() > 86_400;
    let to_s = from_s + step_s * i64::try_from(values.len()).unwrap_or(0);
    let (from, to) = (clock(from_s, long), clock(to_s, long));
    let plotted = Series { values: &values, unit: text(&answer, "unit"), from: &from, to: &to };
    for line in plot::plot(&plotted, width(), height) {
        session.printer.line(&line)?;
    }
    let known = values.iter().flatten();
    let (count, sum) = known.fold((0_u32, 0.0), |(count, sum), value| (count + 1, sum + value));
    if count > 0 {
        let mean = human(sum / f64::from(count), text(&answer, "unit"));
        session.printer.note(&format!(
            "mean {mean}; a value each {step_s} s, kept each {} s",
            number(&answer, "resolution_s").unwrap_or(0)
        ));
    }
    Ok(())
}

/// In the host's time zone.
fn clock(seconds: i64, with_day: bool) -> String {
    let Ok(at) = Timestamp::from_second(seconds) else { return String::new() };
    let at = at.to_zoned(TimeZone::system());
    at.strftime(if with_day { "%Y-%m-%d %H:%M" } else { "%H:%M" }).to_string()
}

pub fn width() -> usize {
    let told = console::Term::stdout().size_checked().map(|(_, columns)| usize::from(columns));
    let set = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    told.or_else(set).unwrap_or(USUAL_WIDTH).clamp(LEAST_WIDTH, 400)
}
