//! The stream of statistics: sweeps wait in an outbox until the manager took them, a bounded number of them. What is
//! pushed out there is told as a gap; the host's own history has it still.
//!
//! A number is the sweep's time in ms (made to rise, whatever the clock does) and how many of its objects are sent:
//! a large sweep goes in several batches.

use super::cloudevents::Body;
use super::source::{Batch, Gap, Limit, Source, SourceError, Stream};
use crate::model::Timestamp;
use crate::stats::Sweep;
use futures_util::future::{BoxFuture, FutureExt};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Sweeps that wait at most, and figures in all of them together: some 5 MB.
const MOST_SWEEPS: usize = 30;
const MOST_FIGURES: usize = 100_000;
/// Sweeps come every ten seconds.
const MOST_EARLY: Duration = Duration::from_secs(5);
/// A silence of so long before the first sample of a life is told, even if samples came less often: nobody knows whether
/// they came more often once.
const TELL_SILENCE: Duration = Duration::from_secs(60);
/// The lower bits of a number: objects of the sweep that are sent; all of these: the whole sweep.
const PART_BITS: u32 = 16;
const WHOLE: u64 = (1 << PART_BITS) - 1;
/// A number has no room for a later time; no clock goes so far.
const MOST_MS: u64 = u64::MAX >> (PART_BITS + 1);
/// So many objects are written without giving way to others.
const AT_ONCE: usize = 64;

/// The number of a whole sweep.
const fn whole(at_ms: u64) -> u64 {
    (at_ms << PART_BITS) | WHOLE
}

fn split(number: u64) -> (u64, u64) {
    (number >> PART_BITS, number & WHOLE)
}

/// The time of the sweep that a number is of.
pub fn time_of(number: u64) -> Timestamp {
    Timestamp(split(number).0)
}

#[derive(Debug, Clone)]
struct Sample {
    at_ms: u64,
    /// The one before, sent or not; `None` for the first since the agent's start.
    previous_ms: Option<u64>,
    interval: Duration,
    sweep: Arc<Sweep>,
}

impl Sample {
    /// What is missing between the cursor and this.
    fn gap(&self, after: u64) -> Option<Gap> {
        let (done_ms, part) = split(after);
        let torn = part != WHOLE;
        let to = self.at_ms.saturating_sub(1);
        let missing = match self.previous_ms {
            Some(previous_ms) => previous_ms > done_ms || torn,
            // Nobody knows what an earlier life had; told is all in which it may have had one, and what a clock that was
            // set back hides.
            None => {
                let silence = Duration::from_millis(to.saturating_sub(done_ms));
                let usual = self.interval.saturating_sub(early(self.interval)).min(TELL_SILENCE);
                torn || silence >= usual || self.sweep.at.0 < done_ms
            }
        };
        let from = if torn { done_ms } else { done_ms + 1 };
        (missing && from <= to).then_some(Gap { from, to })
    }
}

/// A sweep comes a little early or late: the nearest one is taken.
fn early(interval: Duration) -> Duration {
    (interval / 8).min(MOST_EARLY)
}

#[derive(Debug, Default)]
struct Waiting {
    samples: VecDeque<Sample>,
    figures: usize,
    last: Option<(u64, Instant)>,
    /// No number may be less than of this time: what was sent before, perhaps when the clock was ahead.
    least_ms: u64,
}

/// Sweeps on their way.
#[derive(Debug)]
pub struct Outbox {
    waiting: Mutex<Waiting>,
    newest: watch::Sender<u64>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self { waiting: Mutex::default(), newest: watch::Sender::new(0) }
    }
}

fn figures(sweep: &Sweep) -> usize {
    sweep.objects.iter().map(|object| object.figures.len()).sum()
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a sweep over if it is time for one. The oldest go if there are too many.
    pub fn offer(&self, sweep: &Arc<Sweep>, interval: Duration) {
        let mut waiting = self.lock();
        let due = |last: Instant| sweep.instant.saturating_duration_since(last) + early(interval) >= interval;
        if waiting.last.is_some_and(|(_, instant)| !due(instant)) {
            return;
        }
        let previous_ms = waiting.last.map(|(at_ms, _)| at_ms);
        let at_ms = sweep.at.0.max(waiting.least_ms).min(MOST_MS);
        waiting.least_ms = at_ms.saturating_add(1);
        waiting.last = Some((at_ms, sweep.instant));
        waiting.figures += figures(sweep);
        waiting.samples.push_back(Sample { at_ms, previous_ms, interval, sweep: Arc::clone(sweep) });
        while waiting.samples.len() > 1
            && (waiting.samples.len() > MOST_SWEEPS || waiting.figures > MOST_FIGURES)
        {
            waiting.drop_oldest();
        }
        drop(waiting);
        self.newest.send_replace(whole(at_ms));
    }

    fn forget(&self, taken: u64) {
        let mut waiting = self.lock();
        // Room for a gap between the two, should the clock have been set back.
        waiting.least_ms = waiting.least_ms.max(split(taken).0.saturating_add(2)).min(MOST_MS);
        while waiting.samples.front().is_some_and(|sample| whole(sample.at_ms) <= taken) {
            waiting.drop_oldest();
        }
    }

    /// The first sample that is not wholly sent.
    fn first_after(&self, after: u64) -> Option<Sample> {
        self.lock().samples.iter().find(|sample| whole(sample.at_ms) > after).cloned()
    }
}

impl Waiting {
    fn drop_oldest(&mut self) {
        if let Some(sample) = self.samples.pop_front() {
            self.figures = self.figures.saturating_sub(figures(&sample.sweep));
        }
    }
}

pub struct SampleSource {
    outbox: Arc<Outbox>,
    log: String,
    source: String,
}

impl SampleSource {
    pub fn new(outbox: Arc<Outbox>, log: String, source: String) -> Self {
        Self { outbox, log, source }
    }

    async fn batch(&self, sample: &Sample, after: u64, limit: Limit) -> Batch {
        let mut body = Body::new(&self.source, &self.log);
        let (done_ms, part) = split(after);
        let goes_on = done_ms == sample.at_ms;
        let gap = if goes_on { None } else { sample.gap(after) };
        if let Some(gap) = gap {
            body.gap(Stream::Statistics, gap, Timestamp::now());
            if limit.items == 1 {
                return Batch {
                    body: body.finish(),
                    last: whole(gap.to),
                    items: 0,
                    gap: Some(gap),
                    trace: None,
                };
            }
        }
        let begin = if goes_on { usize::try_from(part).unwrap_or(usize::MAX) } else { 0 };
        let objects = &sample.sweep.objects;
        let interval_s = u32::try_from(sample.interval.as_secs()).unwrap_or(u32::MAX);
        let mut items = 0;
        for object in objects.iter().skip(begin).take(limit.items) {
            let before = body.len();
            body.sample((sample.at_ms, sample.sweep.at), interval_s, object);
            if items > 0 && body.len() > limit.bytes {
                body.cut_back(before);
                break;
            }
            items += 1;
            if items % AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        let done = begin.saturating_add(items);
        let last = match u64::try_from(done) {
            Ok(part) if done < objects.len() && part < WHOLE => (sample.at_ms << PART_BITS) | part,
            _ => whole(sample.at_ms),
        };
        Batch { body: body.finish(), last, items, gap, trace: None }
    }
}

impl Source for SampleSource {
    fn next(&self, after: u64, limit: Limit) -> BoxFuture<'_, Result<Batch, SourceError>> {
        async move {
            let mut newest = self.outbox.newest.subscribe();
            loop {
                newest.mark_unchanged();
                if let Some(sample) = self.outbox.first_after(after) {
                    return Ok(self.batch(&sample, after, limit).await);
                }
                // The sender lives as long as we do.
                let _ = newest.changed().await;
            }
        }
        .boxed()
    }

    fn newest(&self) -> u64 {
        *self.outbox.newest.borrow()
    }

    fn behind(&self, after: u64) -> u64 {
        let waiting = self.outbox.lock();
        let count = waiting.samples.iter().filter(|sample| whole(sample.at_ms) > after).count();
        u64::try_from(count).unwrap_or(u64::MAX)
    }

    /// What was measured before belonged to nobody, or to another.
    fn start(&self, _: Option<u64>, since: Timestamp) -> u64 {
        whole(since.0.min(MOST_MS))
    }

    fn taken(&self, number: u64) {
        self.outbox.forget(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{Figure, MetricId, Object, ObjectFigures};
    use crate::xen::DomId;
    use serde_json::Value;

    const EVERY: Duration = Duration::from_secs(20);

    fn sweep(at_ms: u64, objects: u32, start: Instant) -> Arc<Sweep> {
        let figure = Figure { metric: MetricId(0), instance: None, value: 1.0 };
        let object = |domid| ObjectFigures {
            object: Object::Domain(DomId(domid)),
            name: "d".into(),
            domid: Some(DomId(domid)),
            figures: vec![figure.clone()],
        };
        Arc::new(Sweep {
            at: Timestamp(at_ms),
            instant: start + Duration::from_millis(at_ms),
            took: Duration::ZERO,
            objects: (0..objects).map(object).collect(),
            problems: Vec::new(),
        })
    }

    fn source() -> (Arc<Outbox>, SampleSource) {
        let outbox = Arc::new(Outbox::default());
        (Arc::clone(&outbox), SampleSource::new(outbox, "log".to_owned(), "us".to_owned()))
    }

    /// Just before the first of all.
    const NOTHING: u64 = whole(0);
    const MANY: Limit = Limit { items: 1000, bytes: 1 << 20 };

    fn ids(batch: &Batch) -> Vec<String> {
        let list: Vec<Value> = serde_json::from_slice(&batch.body).unwrap();
        list.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn one_sweep_an_interval_is_taken_over_the_one_that_is_nearest() {
        let (outbox, source) = source();
        let start = Instant::now();
        for at_ms in [5, 10_000, 19_500, 29_500, 39_600] {
            outbox.offer(&sweep(at_ms, 1, start), EVERY);
        }
        let mut cursor = NOTHING;
        let mut taken = Vec::new();
        for _ in 0..3 {
            let batch = source.next(cursor, MANY).await.unwrap();
            taken.extend(ids(&batch));
            cursor = batch.last;
        }
        assert_eq!(taken, ["5-domain/0", "19500-domain/0", "39600-domain/0"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_sweep_goes_in_parts_and_none_of_it_twice() {
        let (outbox, source) = source();
        outbox.offer(&sweep(5, 7, Instant::now()), EVERY);
        let limit = Limit { items: 3, ..MANY };
        let (mut cursor, mut seen) = (NOTHING, Vec::new());
        for expected in [3, 3, 1] {
            let batch = source.next(cursor, limit).await.unwrap();
            assert_eq!((batch.items, batch.gap), (expected, None));
            seen.extend(ids(&batch));
            cursor = batch.last;
        }
        assert_eq!(seen, (0..7).map(|n| format!("5-domain/{n}")).collect::<Vec<_>>());
        assert_eq!(cursor, source.newest());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_pushed_out_is_one_gap_and_what_was_never_sent_is_told_after_a_restart() {
        let (outbox, source) = source();
        let start = Instant::now();
        outbox.offer(&sweep(1_000_000, 2, start), EVERY);
        let first = source.next(source.start(None, Timestamp(999_000)), MANY).await.unwrap();
        assert_eq!((first.items, first.gap), (2, None));
        for n in 1..100_u64 {
            outbox.offer(&sweep(1_000_000 + n * 20_000, 2, start), EVERY);
        }
        let after = source.next(first.last, MANY).await.unwrap();
        let oldest = 1_000_000 + 70 * 20_000;
        assert_eq!(after.gap, Some(Gap { from: 1_000_001, to: oldest - 1 }));
        assert_eq!(source.next(after.last, MANY).await.unwrap().gap, None);
        // Another life, which knows the cursor alone.
        let (outbox, source) = self::source();
        outbox.offer(&sweep(9_000_000, 1, start), EVERY);
        let batch = source.next(whole(4_000_000), MANY).await.unwrap();
        assert_eq!(batch.gap, Some(Gap { from: 4_000_001, to: 8_999_999 }));
        // 17.5 s after the last one another may have come, and not before.
        assert_eq!(source.next(whole(8_982_500), MANY).await.unwrap().gap, None);
        let silent = source.next(whole(8_982_499), MANY).await.unwrap();
        assert_eq!(silent.gap, Some(Gap { from: 8_982_500, to: 8_999_999 }));
        let torn = source.next((8_990_000 << PART_BITS) | 3, MANY).await.unwrap();
        assert_eq!(torn.gap, Some(Gap { from: 8_990_000, to: 8_999_999 }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cursor_of_a_clock_that_was_ahead_does_not_stop_the_stream() {
        let (outbox, source) = source();
        let cursor = whole(9_000_000);
        source.taken(cursor);
        let sweep = sweep(1_000_000, 1, Instant::now());
        outbox.offer(&sweep, EVERY);
        let batch = source.next(cursor, MANY).await.unwrap();
        let items: Vec<Value> = serde_json::from_slice(&batch.body).unwrap();
        assert_eq!(batch.gap, Some(Gap { from: 9_000_001, to: 9_000_001 }), "what was before is not known");
        assert_eq!((items[1]["sequence"].as_str(), batch.last > cursor), (Some("9000002"), true));
        assert_eq!(items[1]["time"], Timestamp(1_000_000).to_string());
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_owner_has_never_taken_anything_of_is_told_when_it_is_lost() {
        let begins = Timestamp(1_000_000);
        let start = Instant::now();
        // Pushed out in the same life.
        let (outbox, source) = source();
        let cursor = source.start(None, begins);
        source.taken(cursor);
        for n in 0..31_u64 {
            outbox.offer(&sweep(1_003_000 + n * 20_000, 1, start), EVERY);
        }
        let batch = source.next(cursor, MANY).await.unwrap();
        assert_eq!(batch.gap, Some(Gap { from: 1_000_001, to: 1_022_999 }));
        // Lost with the life.
        let (outbox, source) = self::source();
        source.taken(cursor);
        outbox.offer(&sweep(4_600_000, 1, start), EVERY);
        let batch = source.next(cursor, MANY).await.unwrap();
        assert_eq!(batch.gap, Some(Gap { from: 1_000_001, to: 4_599_999 }));
        // Of the time of another owner, nothing is told.
        let later = source.start(None, Timestamp(4_700_000));
        outbox.offer(&sweep(4_720_000, 1, start), EVERY);
        assert_eq!(source.next(later, MANY).await.unwrap().gap, None);
    }

    #[tokio::test(start_paused = true)]
    async fn where_one_item_is_the_most_a_gap_goes_alone() {
        let (outbox, source) = source();
        outbox.offer(&sweep(9_000_000, 2, Instant::now()), EVERY);
        let one = Limit { items: 1, ..MANY };
        let gap = source.next(whole(4_000_000), one).await.unwrap();
        assert_eq!((gap.items, gap.gap), (0, Some(Gap { from: 4_000_001, to: 8_999_999 })));
        let first = source.next(gap.last, one).await.unwrap();
        assert_eq!((ids(&first), first.gap), (vec!["9000000-domain/0".to_owned()], None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_goes_back_does_not_turn_the_order() {
        let (outbox, source) = source();
        let start = Instant::now();
        outbox.offer(&sweep(1_000_000, 1, start), EVERY);
        let mut back = Sweep::clone(&sweep(1_020_000, 1, start));
        back.at = Timestamp(500);
        outbox.offer(&Arc::new(back), EVERY);
        let first = source.next(whole(999_000), MANY).await.unwrap();
        let second = source.next(first.last, MANY).await.unwrap();
        assert_eq!((ids(&second)[0].as_str(), second.gap), ("1000001-domain/0", None));
    }
}
