//! The history of all objects: each sweep becomes a row of rates and values in memory; a minute that is over becomes a
//! row in the object's ring file, made of its sweeps; an hour one made of its minutes, a day one made of its hours.
//!
//! ```text
//! sweep ──rates──► 10 s, 60 rows, in memory ──mean──► 1 min, 120 rows ──mean──► 1 h, 168 rows ──mean──► 1 day, 365 rows
//! ```
//!
//! A row of a coarser tier that is not written yet (its time is not over, or nobody was there when it ended) is made
//! of the finer ones when it is asked for, by the same rule, so that a question is answered up to the last sweep and an
//! agent that starts again goes on where it was. One write an object and minute, one more an hour, one more a day.
//!
//! All of this blocks (files): callers are on threads that may. One lock: a sweep is recorded in a few milliseconds,
//! and questions read what it holds and then the files without it.

use super::metric::Kind;
use super::recent::{Recent, SLOT_S};
use super::ring::{Ring, Rows, Tier};
use super::series::SeriesKey;
use super::sweep::{Object, ObjectFigures, Sweep};
use crate::model::Timestamp;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Objects that are remembered, and files that are kept.
const MAX_OBJECTS: usize = 4096;
/// Series of one object.
pub const MAX_SERIES: usize = 512;
/// The file of an object that is no more is kept so long after it was written last.
const KEEP_UNKNOWN: Duration = Duration::from_secs(7 * 86_400);
/// Rates over less than this say nothing.
const LEAST_INTERVAL_S: f64 = 0.5;

/// Counters as a sweep had them.
struct Before {
    at_s: f64,
    objects: HashMap<Object, ObjectFigures>,
}

#[derive(Default)]
struct Inner {
    recent: HashMap<Object, Recent>,
    before: Option<Before>,
    /// The minute of the last sweep.
    minute: u32,
}

pub struct History {
    folder: PathBuf,
    /// What a sweep's moment is counted from on the clock that is never set.
    origin: tokio::time::Instant,
    inner: Mutex<Inner>,
}

/// What is known of one object, for questions.
pub(super) struct Known {
    series: Vec<SeriesKey>,
    recent: Option<Recent>,
    tiers: [Rows; 3],
}

impl Known {
    pub(super) fn series(&self) -> &[SeriesKey] {
        &self.series
    }

    pub(super) fn column(&self, key: &SeriesKey) -> Option<usize> {
        self.series.iter().position(|other| other == key)
    }

    /// The ten seconds of this slot.
    pub(super) fn sweep(&self, column: usize, slot: u32) -> Option<f32> {
        self.recent.as_ref()?.get(slot, column)
    }

    /// As written; else made of the finer tiers, as far as they reach.
    pub(super) fn value(&self, column: usize, tier: Tier, slot: u32) -> Option<f32> {
        let place = Tier::ALL.iter().position(|other| *other == tier)?;
        if let Some(row) = self.tiers[place].get(slot) {
            return row.get(column).copied().filter(|value| value.is_finite());
        }
        match tier {
            Tier::Minute => {
                let part = u32::try_from(60 / SLOT_S).unwrap_or(1);
                let begin = slot.checked_mul(part)?;
                mean((begin..begin.saturating_add(part)).map(|slot| self.sweep(column, slot)))
            }
            Tier::Hour => self.of_parts(column, Tier::Minute, slot, 60),
            Tier::Day => self.of_parts(column, Tier::Hour, slot, 24),
        }
    }

    fn of_parts(&self, column: usize, finer: Tier, slot: u32, parts: u32) -> Option<f32> {
        let begin = slot.checked_mul(parts)?;
        mean((begin..begin.saturating_add(parts)).map(|slot| self.value(column, finer, slot)))
    }

    fn row(&self, tier: Tier, slot: u32) -> Option<Vec<f32>> {
        let value = |column| self.value(column, tier, slot).unwrap_or(f32::NAN);
        let row: Vec<f32> = (0..self.series.len()).map(value).collect();
        row.iter().any(|value| !value.is_nan()).then_some(row)
    }
}

/// Of those that are known.
fn mean(values: impl Iterator<Item = Option<f32>>) -> Option<f32> {
    let (mut sum, mut count) = (0.0_f64, 0_u32);
    for value in values.flatten().filter(|value| value.is_finite()) {
        (sum, count) = (sum + f64::from(value), count + 1);
    }
    #[allow(clippy::cast_possible_truncation, reason = "a mean of f32 is one")]
    (count > 0).then(|| (sum / f64::from(count)) as f32)
}

/// The slot of a moment in units of so many seconds.
pub(super) fn slot(at: Timestamp, seconds: u64) -> u32 {
    u32::try_from(at.0 / 1000 / seconds).unwrap_or(u32::MAX)
}

/// What a series keeps of an object's figures: values, and of counters their rate since the sweep before. Of figures
/// without a past, nothing.
fn rates(now: &ObjectFigures, before: Option<&ObjectFigures>, seconds: f64) -> Vec<(SeriesKey, f32)> {
    let before = before.filter(|before| before.domid == now.domid && seconds >= LEAST_INTERVAL_S);
    let mut kept = Vec::with_capacity(now.figures.len());
    for (at, figure) in now.figures.iter().enumerate() {
        let value = match figure.metric.metric().kind {
            Kind::Gauge => Some(figure.value),
            Kind::Counter => before.and_then(|before| {
                let same = |other: &&super::Figure| {
                    other.metric == figure.metric && other.instance == figure.instance
                };
                // Nearly always at the same place.
                let old = before.figures.get(at).filter(same).or_else(|| before.figures.iter().find(same))?;
                (figure.value >= old.value).then(|| (figure.value - old.value) / seconds)
            }),
        };
        let plain = figure.instance.as_ref().is_none_or(|instance| !instance.contains(char::is_control));
        if let Some(value) = value.filter(|value| value.is_finite() && plain) {
            #[allow(clippy::cast_possible_truncation, reason = "seven digits are what a history keeps")]
            kept.push((SeriesKey::new(figure.metric, figure.instance.clone()), value as f32));
        }
    }
    kept
}

impl History {
    /// In a folder of its own, made if it is not there. Blocking.
    pub fn open(folder: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let origin = tokio::time::Instant::now();
        Ok(Self { folder: folder.to_owned(), origin, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where an object's file lies; domains that are no VMs have none, since their number is used again.
    fn file(&self, object: Object) -> Option<PathBuf> {
        let name = match object {
            Object::Host => "host.ring".to_owned(),
            Object::Dom0 => "dom0.ring".to_owned(),
            Object::Vm(vm) => format!("vm-{vm}.ring"),
            Object::Domain(_) => return None,
        };
        Some(self.folder.join(name))
    }

    /// Takes a sweep over. Answers how many files could not be written. Blocking.
    pub fn record(&self, sweep: &Sweep) -> usize {
        let at_s = sweep.instant.saturating_duration_since(self.origin).as_secs_f64();
        let (minute, slot) = (slot(sweep.at, 60), slot(sweep.at, SLOT_S));
        let mut inner = self.lock();
        let inner = &mut *inner;
        let began = inner.minute == 0;
        let over = std::mem::replace(&mut inner.minute, minute);
        let mut failed = 0;
        if !began && over != minute {
            failed = self.write_minute(&inner.recent, over);
        }
        let seconds = inner.before.as_ref().map_or(0.0, |before| at_s - before.at_s);
        for figures in sweep.objects.iter().take(MAX_OBJECTS) {
            let before = inner.before.as_ref().and_then(|before| before.objects.get(&figures.object));
            let kept = rates(figures, before, seconds);
            let recent = inner
                .recent
                .entry(figures.object)
                .or_insert_with(|| Recent::new(self.known_series(figures.object)));
            recent.put(slot, kept, MAX_SERIES);
        }
        let objects = sweep.objects.iter().map(|figures| (figures.object, figures.clone())).collect();
        inner.before = Some(Before { at_s, objects });
        // What has not been seen for as long as the rows reach back has none.
        inner.recent.retain(|_, recent| recent.reaches(slot));
        failed
    }

    /// What an earlier life has kept of it, so that its columns stay.
    fn known_series(&self, object: Object) -> Vec<SeriesKey> {
        let ring = self.file(object).and_then(|path| Ring::open(&path).ok().flatten());
        ring.map(|ring| ring.series().to_vec()).unwrap_or_default()
    }

    fn write_minute(&self, recent: &HashMap<Object, Recent>, minute: u32) -> usize {
        let mut failed = 0;
        for (object, recent) in recent {
            let Some(path) = self.file(*object) else { continue };
            if let Err(error) = write_rows(&path, recent, minute) {
                failed += 1;
                tracing::debug!(%object, %error, "a minute of history is lost");
            }
        }
        failed
    }

    /// Writes down what the last minute has so far, before the agent ends. Blocking.
    pub fn flush(&self) -> usize {
        let inner = self.lock();
        if inner.minute == 0 { 0 } else { self.write_minute(&inner.recent, inner.minute) }
    }

    /// All that is known of an object; `None`: nothing. Blocking.
    pub(super) fn known(&self, object: Object) -> io::Result<Option<Known>> {
        let recent = self.lock().recent.get(&object).cloned();
        let ring = match self.file(object) {
            Some(path) => Ring::open(&path)?,
            None => None,
        };
        known(recent, ring.as_ref())
    }

    /// What the last sweep made of an object's figures: values, and of counters their rate a second.
    pub fn rates(&self, object: Object) -> Vec<(SeriesKey, f32)> {
        self.lock().recent.get(&object).map(Recent::last).unwrap_or_default()
    }

    /// Objects of which there is anything.
    pub fn objects(&self) -> BTreeSet<Object> {
        let mut objects: BTreeSet<Object> = self.lock().recent.keys().copied().collect();
        objects.extend(self.files().into_iter().map(|(object, _)| object));
        objects
    }

    fn files(&self) -> Vec<(Object, PathBuf)> {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return Vec::new() };
        let object = |name: &str| match name.strip_suffix(".ring")? {
            "host" => Some(Object::Host),
            "dom0" => Some(Object::Dom0),
            name => Object::parse(&format!("vm/{}", name.strip_prefix("vm-")?)),
        };
        let entries = entries.flatten().take(4 * MAX_OBJECTS);
        entries.filter_map(|entry| Some((object(entry.file_name().to_str()?)?, entry.path()))).collect()
    }

    /// Removes the files of VMs that are no more, a week after their last row, and the oldest beyond the bound.
    /// Blocking.
    pub fn prune(&self, is_known: impl Fn(Object) -> bool) -> usize {
        let mut files: Vec<_> = self
            .files()
            .into_iter()
            .map(|(object, path)| {
                let age = std::fs::metadata(&path).and_then(|meta| meta.modified());
                let age = age.ok().and_then(|at| at.elapsed().ok()).unwrap_or_default();
                (age, object, path)
            })
            .collect();
        files.sort_by_key(|(age, ..)| *age);
        let mut removed = 0;
        for (place, (age, object, path)) in files.iter().enumerate() {
            let old = *age > KEEP_UNKNOWN && !is_known(*object);
            if (old || place >= MAX_OBJECTS) && std::fs::remove_file(path).is_ok() {
                removed += 1;
            }
        }
        removed
    }
}

fn known(recent: Option<Recent>, ring: Option<&Ring>) -> io::Result<Option<Known>> {
    let series = match (&recent, ring) {
        (None, None) => return Ok(None),
        (Some(recent), _) => recent.series().to_vec(),
        (None, Some(ring)) => ring.series().to_vec(),
    };
    let mut tiers = [Rows::default(), Rows::default(), Rows::default()];
    if let Some(ring) = ring {
        for (rows, tier) in tiers.iter_mut().zip(Tier::ALL) {
            *rows = ring.rows(tier)?;
        }
    }
    // Columns of the file come first in what is remembered, in its order.
    Ok(Some(Known { series, recent, tiers }))
}

/// The minute that is over, and the hours and days that ended and are not written yet.
fn write_rows(path: &Path, recent: &Recent, minute: u32) -> io::Result<()> {
    let opened = Ring::open(path)?;
    let ring = match opened {
        Some(ring) if ring.series() == recent.series() => ring,
        old => Ring::create(path, recent.series().to_vec(), old.as_ref())?,
    };
    let hour_ended = minute % 60 == 59;
    if let Some(row) = recent.minute(minute) {
        ring.write(Tier::Minute, minute, &row)?;
    }
    // At a full hour; and once after the start, for those that ended while nobody was there.
    if !hour_ended && recent.caught_up() {
        return Ok(());
    }
    let Some(mut known) = known(Some(recent.clone()), Some(&ring))? else { return Ok(()) };
    for (place, tier, parts) in [(1, Tier::Hour, 60), (2, Tier::Day, 24 * 60)] {
        let ended = (minute + 1) / parts;
        // As far back as the tier below reaches.
        let back = if tier == Tier::Hour { 2 } else { 7 };
        let mut wrote = false;
        for slot in ended.saturating_sub(back)..ended {
            if known.tiers[place].get(slot).is_none()
                && let Some(row) = known.row(tier, slot)
            {
                ring.write(tier, slot, &row)?;
                wrote = true;
            }
        }
        if wrote {
            known.tiers[place] = ring.rows(tier)?;
        }
    }
    recent.set_caught_up();
    Ok(())
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
