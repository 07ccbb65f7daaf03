//! The history of all objects: each sweep becomes a row of rates and values in memory; a minute that is over becomes a
//! row in the object's ring file, made of its sweeps; an hour one made of its minutes, a day one made of its hours.
//!
//! ```text
//! sweep ──rates──► 10 s, 60 rows, in memory ──mean──► 1 min, 120 rows ──mean──► 1 h, 168 rows ──mean──► 1 day, 365 rows
//! ```
//!
//! A question about a time that the finer rows still reach is answered from them, so up to the last sweep; the coarser
//! row is for what they no longer reach. One is written when its time is over, when its object is seen no more, and, of
//! what ended while nobody was there, when its object is seen again. One write an object and minute, one more an hour
//! and one a day.
//!
//! All of this blocks (files): callers are on threads that may, but for [`History::rates`]. The lock is never held over a
//! file.

use super::metric::Kind;
use super::recent::{Recent, SLOT_S};
use super::ring::{Ring, Rows, Tier};
use super::series::SeriesKey;
use super::sweep::{Object, ObjectFigures, Sweep};
use crate::model::Timestamp;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Objects that are remembered, and files that are kept.
const MAX_OBJECTS: usize = 4096;
/// Series of one object.
pub const MAX_SERIES: usize = 512;
/// The file of an object that is no more is kept so long after it was written last.
const KEEP_UNKNOWN: Duration = Duration::from_secs(7 * 86_400);
/// Rates over less than this say nothing.
const LEAST_INTERVAL_S: f64 = 0.5;

#[derive(Default)]
struct Inner {
    recent: HashMap<Object, Recent>,
    /// The last sweep.
    before: Option<Arc<Sweep>>,
    /// Objects that have more series than are kept, of which it was told.
    full: BTreeSet<Object>,
}

pub struct History {
    folder: PathBuf,
    inner: Mutex<Inner>,
    /// By object, the hour of the last minute that was written in this life. Held by whoever writes files.
    hours: Mutex<HashMap<Object, u32>>,
}

/// What one object's minute has, and its columns.
struct Minute {
    object: Object,
    series: Vec<SeriesKey>,
    row: Option<Vec<f32>>,
    /// It is seen no more: coarser rows are made of what there is.
    last: bool,
}

/// What is known of one object, for questions.
pub(super) struct Known {
    series: Vec<SeriesKey>,
    recent: Option<Recent>,
    tiers: [Rows; 3],
    /// Now; `None`: nothing has been seen in this life.
    minute: Option<u32>,
}

impl Known {
    fn of_file(ring: &Ring, minute: u32) -> io::Result<Self> {
        Ok(Self { minute: Some(minute), ..Self::new(None, Some(ring))? })
    }

    fn new(recent: Option<Recent>, ring: Option<&Ring>) -> io::Result<Self> {
        let mut tiers = [Rows::default(), Rows::default(), Rows::default()];
        if let Some(ring) = ring {
            for (rows, tier) in tiers.iter_mut().zip(Tier::ALL) {
                *rows = ring.rows(tier)?;
            }
        }
        // What is remembered has the file's columns first, in its order.
        let series = match (&recent, ring) {
            (Some(recent), _) => recent.series().to_vec(),
            (None, Some(ring)) => ring.series().to_vec(),
            (None, None) => Vec::new(),
        };
        let minute = recent.as_ref().map(|recent| recent.newest() / PARTS_OF_MINUTE);
        Ok(Self { series, recent, tiers, minute })
    }

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

    /// The minute that this slot is in, as written by an earlier life: of one of which this life has seen nothing.
    pub(super) fn forgotten(&self, column: usize, slot: u32) -> Option<f32> {
        let from = slot / PARTS_OF_MINUTE * PARTS_OF_MINUTE;
        let remembers =
            |recent: &Recent| (from..from.saturating_add(PARTS_OF_MINUTE)).any(|slot| recent.has(slot));
        match self.recent.as_ref().is_some_and(remembers) {
            true => None,
            false => self.stored(column, Tier::Minute, slot / PARTS_OF_MINUTE),
        }
    }

    fn rows(&self, tier: Tier) -> &Rows {
        match tier {
            Tier::Minute => &self.tiers[0],
            Tier::Hour => &self.tiers[1],
            Tier::Day => &self.tiers[2],
        }
    }

    fn stored(&self, column: usize, tier: Tier, slot: u32) -> Option<f32> {
        self.rows(tier).get(slot)?.get(column).copied().filter(|value| value.is_finite())
    }

    /// Whether the rows of the finer tier still have all of a coarser one's time. Rows of a later time than now, of a
    /// clock that was ahead once, say nothing of that.
    fn is_whole(&self, finer: Tier, from: u32) -> bool {
        let now = match (self.minute, finer) {
            (Some(minute), Tier::Minute) => minute,
            (Some(minute), _) => minute / 60,
            (None, _) => u32::MAX,
        };
        let newest = self.rows(finer).slots().iter().rfind(|slot| **slot <= now);
        newest.is_some_and(|newest| u64::from(*newest) < u64::from(from) + u64::from(finer.rows()))
    }

    /// Made of the finer rows where they reach, else as written.
    pub(super) fn value(&self, column: usize, tier: Tier, slot: u32) -> Option<f32> {
        match tier {
            Tier::Minute => self.stored(column, tier, slot).or_else(|| {
                let from = slot.checked_mul(PARTS_OF_MINUTE)?;
                mean((from..from.saturating_add(PARTS_OF_MINUTE)).map(|slot| self.sweep(column, slot)))
            }),
            Tier::Hour => self.of_parts(column, (tier, slot), (Tier::Minute, 60)),
            Tier::Day => self.of_parts(column, (tier, slot), (Tier::Hour, 24)),
        }
    }

    fn of_parts(&self, column: usize, (tier, slot): (Tier, u32), (finer, parts): (Tier, u32)) -> Option<f32> {
        let from = slot.checked_mul(parts)?;
        let made = || mean((from..from.saturating_add(parts)).map(|slot| self.value(column, finer, slot)));
        if self.is_whole(finer, from) {
            return made().or_else(|| self.stored(column, tier, slot));
        }
        self.stored(column, tier, slot).or_else(made)
    }

    fn row(&self, tier: Tier, slot: u32) -> Option<Vec<f32>> {
        let value = |column| self.value(column, tier, slot).unwrap_or(f32::NAN);
        let row: Vec<f32> = (0..self.series.len()).map(value).collect();
        row.iter().any(|value| !value.is_nan()).then_some(row)
    }
}

/// Sweeps in a minute.
const PARTS_OF_MINUTE: u32 = (60 / SLOT_S) as u32;

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
        Ok(Self { folder: folder.to_owned(), inner: Mutex::default(), hours: Mutex::default() })
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

    /// Takes a sweep over; one caller at a time. Answers how many files could not be written. Blocking.
    pub fn record(&self, sweep: &Arc<Sweep>) -> usize {
        let known = self.columns_of_new(sweep);
        let over = self.take(sweep, known);
        self.write(over)
    }

    /// The columns that the files of objects have which were not seen of late, so that they stay where they are.
    fn columns_of_new(&self, sweep: &Sweep) -> HashMap<Object, Vec<SeriesKey>> {
        let mut new: Vec<Object> = sweep.objects.iter().map(|figures| figures.object).collect();
        {
            let inner = self.lock();
            new.retain(|object| !inner.recent.contains_key(object));
        }
        let columns = |object: Object| {
            let ring = self.file(object).and_then(|path| Ring::open(&path).ok().flatten());
            let series = match ring {
                // Links and disks come and go: those of more than a year ago give way.
                Some(ring) if ring.series().len() > MAX_SERIES / 2 => ring.live_series().unwrap_or_default(),
                Some(ring) => ring.series().to_vec(),
                None => Vec::new(),
            };
            (object, series)
        };
        new.into_iter().map(columns).collect()
    }

    /// Puts a sweep into what is remembered. Answers what is to be written: a minute that is over, and what is seen no
    /// more.
    fn take(&self, sweep: &Arc<Sweep>, mut known: HashMap<Object, Vec<SeriesKey>>) -> (u32, Vec<Minute>) {
        let (minute, slot) = (slot(sweep.at, 60), slot(sweep.at, SLOT_S));
        let mut inner = self.lock();
        let inner = &mut *inner;
        let over = inner.before.as_ref().map_or(minute, |before| self::slot(before.at, 60));
        let mut written = Vec::new();
        if over != minute {
            let all = inner.recent.iter();
            written
                .extend(all.map(|(object, recent)| Minute::of(*object, recent, over, !recent.reaches(slot))));
            inner.recent.retain(|_, recent| recent.reaches(slot));
        }
        let before = inner.before.replace(Arc::clone(sweep));
        let seconds = before
            .as_ref()
            .map_or(0.0, |before| sweep.instant.saturating_duration_since(before.instant).as_secs_f64());
        for figures in sweep.objects.iter().take(MAX_OBJECTS) {
            let before = before.as_ref().and_then(|before| before.object(figures.object));
            let kept = rates(figures, before, seconds);
            let mut columns = || known.remove(&figures.object).unwrap_or_default();
            let recent = inner.recent.entry(figures.object).or_insert_with(|| Recent::new(columns()));
            let left_out = recent.put(slot, kept, MAX_SERIES);
            if left_out > 0 && inner.full.insert(figures.object) {
                tracing::warn!(object = %figures.object, left_out, "too many series: no history is kept of these");
            }
        }
        (over, written)
    }

    fn write(&self, (minute, all): (u32, Vec<Minute>)) -> usize {
        let mut hours = self.hours.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed = 0;
        for one in all {
            let Some(path) = self.file(one.object) else { continue };
            let hour = minute / 60;
            let ended = hours.insert(one.object, hour) != Some(hour);
            if let Err(error) = write_rows(&path, &one, minute, ended) {
                failed += 1;
                tracing::debug!(object = %one.object, %error, "a minute of history is lost");
            }
            if one.last {
                hours.remove(&one.object);
            }
        }
        failed
    }

    /// Writes down what the last minute has so far, before the agent ends. Blocking.
    pub fn flush(&self) -> usize {
        let minutes = {
            let inner = self.lock();
            let Some(before) = &inner.before else { return 0 };
            let minute = slot(before.at, 60);
            let all = inner.recent.iter();
            (minute, all.map(|(object, recent)| Minute::of(*object, recent, minute, true)).collect())
        };
        self.write(minutes)
    }

    /// All that is known of an object; `None`: nothing. Blocking.
    pub(super) fn known(&self, object: Object) -> io::Result<Option<Known>> {
        let recent = self.lock().recent.get(&object).cloned();
        let ring = match self.file(object) {
            Some(path) => Ring::open(&path)?,
            None => None,
        };
        if recent.is_none() && ring.is_none() {
            return Ok(None);
        }
        Known::new(recent, ring.as_ref()).map(Some)
    }

    /// What the last sweep made of an object's figures: values, and of counters their rate a second. Does not block.
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

impl Minute {
    fn of(object: Object, recent: &Recent, minute: u32, last: bool) -> Self {
        Self { object, series: recent.series().to_vec(), row: recent.minute(minute), last }
    }
}

/// The minute that is over, and hours and days if one has ended, or the object comes or goes.
fn write_rows(path: &Path, one: &Minute, minute: u32, ended: bool) -> io::Result<()> {
    let opened = Ring::open(path)?;
    let ring = match opened {
        Some(ring) if ring.series() == one.series => ring,
        // Nothing to say, and no file to say it in.
        None if one.row.is_none() => return Ok(()),
        old => Ring::create(path, one.series.clone(), old.as_ref())?,
    };
    if ended {
        // Before a new minute takes an old one's place.
        roll_up(&ring, minute, (Tier::Minute, 60, Tier::Hour))?;
        roll_up(&ring, minute, (Tier::Hour, 24, Tier::Day))?;
    }
    if let Some(row) = &one.row {
        ring.write(Tier::Minute, minute, row)?;
    }
    if one.last {
        roll_up(&ring, minute, (Tier::Minute, 60, Tier::Hour))?;
        roll_up(&ring, minute, (Tier::Hour, 24, Tier::Day))?;
    }
    Ok(())
}

/// Writes the coarser rows of all that the finer ones have: anew where these have the whole time, else only those
/// that are missing.
fn roll_up(ring: &Ring, minute: u32, (finer, parts, coarser): (Tier, u32, Tier)) -> io::Result<()> {
    let known = Known::of_file(ring, minute)?;
    let slots: BTreeSet<u32> = known.rows(finer).slots().iter().map(|slot| slot / parts).collect();
    for slot in slots {
        let whole = known.is_whole(finer, slot.saturating_mul(parts));
        if (whole || known.rows(coarser).get(slot).is_none())
            && let Some(row) = known.row(coarser, slot)
        {
            ring.write(coarser, slot, &row)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
