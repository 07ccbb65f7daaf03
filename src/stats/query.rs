//! Questions to the history: which series there are, and their values over a time.

use super::history::{History, Known, slot};
use super::recent::{ROWS, SLOT_S};
use super::ring::Tier;
use super::series::SeriesKey;
use super::sweep::Object;
use crate::model::Timestamp;
use std::io;

/// Nothing is kept for longer.
const MAX_STEP_S: u64 = 366 * 86_400;

/// What is asked for. Times in seconds since 1970.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    pub object: Object,
    pub series: SeriesKey,
    pub from_s: u64,
    pub to_s: u64,
    /// Seconds between two points; 0: as fine as it is kept.
    pub step_s: u64,
}

/// Values at equal distances; each is the mean of the time from its point to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The first point.
    pub from_s: u64,
    pub step_s: u64,
    /// How fine the values are that went in: 10, 60, 3600 or 86,400 s.
    pub resolution_s: u64,
    pub values: Vec<Option<f32>>,
}

#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    #[error("nothing is known of {0}")]
    NoObject(Object),
    #[error("{object} has no series {series}; it has: {has}")]
    NoSeries { object: Object, series: SeriesKey, has: String },
    #[error("the time ends before it begins")]
    Backward,
    #[error("a step of {0} s; allowed: up to {MAX_STEP_S}, a year")]
    Step(u64),
    #[error("the history cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// How fine a history is, and how far it reaches back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grain {
    Sweep,
    Kept(Tier),
}

const GRAINS: [Grain; 4] =
    [Grain::Sweep, Grain::Kept(Tier::Minute), Grain::Kept(Tier::Hour), Grain::Kept(Tier::Day)];

impl Grain {
    fn seconds(self) -> u64 {
        match self {
            Self::Sweep => SLOT_S,
            Self::Kept(tier) => tier.seconds(),
        }
    }

    fn reach_s(self) -> u64 {
        match self {
            Self::Sweep => u64::from(ROWS) * SLOT_S,
            Self::Kept(tier) => u64::from(tier.rows()) * tier.seconds(),
        }
    }

    /// The finest that reaches back so far, or that says no value so often that it is much work for nothing. None has more
    /// rows than there are days in a year, so no answer is longer.
    fn of(question: &Question, now_s: u64) -> Self {
        let age = now_s.saturating_sub(question.from_s);
        let fits = |grain: &&Self| match question.step_s {
            0 => true,
            step => grain.seconds() * 60 > step,
        };
        let reaches = |grain: &&Self| age <= grain.reach_s();
        let coarsest = Self::Kept(Tier::Day);
        let found = GRAINS.iter().filter(reaches).find(fits).or_else(|| GRAINS.iter().rfind(reaches));
        found.copied().unwrap_or(coarsest)
    }
}

impl History {
    /// Blocking.
    pub fn series(&self, object: Object) -> Result<Vec<SeriesKey>, QueryError> {
        let known = self.known(object)?.ok_or(QueryError::NoObject(object))?;
        Ok(known.series().iter().filter(|key| key.metric().is_some()).cloned().collect())
    }

    /// Blocking.
    pub fn query(&self, question: &Question, now: Timestamp) -> Result<Answer, QueryError> {
        if question.to_s < question.from_s {
            return Err(QueryError::Backward);
        }
        if question.step_s > MAX_STEP_S {
            return Err(QueryError::Step(question.step_s));
        }
        let known = self.known(question.object)?.ok_or(QueryError::NoObject(question.object))?;
        let column = known.column(&question.series).ok_or_else(|| QueryError::NoSeries {
            object: question.object,
            series: question.series.clone(),
            has: alike(known.series(), &question.series),
        })?;
        let grain = Grain::of(question, now.0 / 1000);
        let step_s = match question.step_s {
            0 => grain.seconds(),
            step => step.max(grain.seconds()).next_multiple_of(grain.seconds()),
        };
        // Nothing reaches further back, nor into the future.
        let now_s = now.0 / 1000;
        let from_s = question.from_s.max(now_s.saturating_sub(MAX_STEP_S)) / step_s * step_s;
        let question = &Question { to_s: question.to_s.min(now_s).max(from_s), ..question.clone() };
        let points = (question.to_s - from_s) / step_s + 1;
        let mut resolution_s = grain.seconds();
        let mut mean = |from_s| {
            let (value, coarsest_s) = mean(&known, column, grain, from_s, step_s);
            resolution_s = resolution_s.max(coarsest_s);
            value
        };
        let values = (0..points).map(|point| mean(from_s + point * step_s)).collect();
        Ok(Answer { from_s, step_s, resolution_s, values })
    }
}

/// Those of the same metric, or of any: a few of them.
fn alike(series: &[SeriesKey], asked: &SeriesKey) -> String {
    const TOLD: usize = 12;
    let all = || series.iter().filter(|key| key.metric().is_some());
    let same: Vec<&SeriesKey> = all().filter(|key| key.metric() == asked.metric()).collect();
    let told = if same.is_empty() { all().collect() } else { same };
    let names: Vec<String> = told.iter().take(TOLD).map(ToString::to_string).collect();
    match told.len() - names.len() {
        0 => names.join(", "),
        more => format!("{}, and {more} more", names.join(", ")),
    }
}

/// Of the time from a point on, and how fine the coarsest value is that went in.
fn mean(known: &Known, column: usize, grain: Grain, from_s: u64, step_s: u64) -> (Option<f32>, u64) {
    let at = |seconds: u64| slot(Timestamp(seconds.saturating_mul(1000)), grain.seconds());
    let (mut sum, mut count, mut coarsest_s) = (0.0_f64, 0_u32, grain.seconds());
    for slot in at(from_s)..at(from_s.saturating_add(step_s)) {
        let value = match grain {
            Grain::Sweep => known.sweep(column, slot).or_else(|| {
                let minute = known.forgotten(column, slot)?;
                coarsest_s = Tier::Minute.seconds();
                Some(minute)
            }),
            Grain::Kept(tier) => known.value(column, tier, slot),
        };
        if let Some(value) = value {
            (sum, count) = (sum + f64::from(value), count + 1);
        }
    }
    #[allow(clippy::cast_possible_truncation, reason = "a mean of f32 is one")]
    let mean = (count > 0).then(|| (sum / f64::from(count)) as f32);
    (mean, coarsest_s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_a_series_that_is_not_there_is_told_those_of_that_metric_and_never_all_of_many() {
        let key = |text: &str| SeriesKey::parse(text).unwrap();
        let cpus = (0..20).map(|cpu| key(&format!("host_cpu_busy:{cpu}")));
        let series: Vec<SeriesKey> =
            [key("host_load_1m"), key("host_load_5m")].into_iter().chain(cpus).collect();
        let told = alike(&series, &key("host_cpu_busy"));
        assert!(
            told.starts_with("host_cpu_busy:0, host_cpu_busy:1, ") && told.ends_with(", and 8 more"),
            "{told}"
        );
        assert_eq!(alike(&series, &key("host_load_1m:x")), "host_load_1m");
        let told = alike(&series, &key("memory"));
        assert!(
            told.starts_with("host_load_1m, host_load_5m, ") && told.ends_with(", and 10 more"),
            "{told}"
        );
    }
}
