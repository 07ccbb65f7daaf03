//! How long things took, counted in buckets: what monitoring makes quantiles of.
//!
//! Counting takes no lock: each bucket is a number of its own, so a reading while others count may be short of the last
//! few, and never wrong by more.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// From a call answered from memory to one that waits for a guest, in seconds.
pub const CALL_BOUNDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// From a job that only writes a record to a migration, in seconds.
pub const JOB_BOUNDS: &[f64] = &[0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];

#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One more than there are bounds: the last is for what is above them all.
    counts: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

/// What a histogram had counted at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Counted {
    pub bounds: &'static [f64],
    /// Of each bucket alone, the last for what is above all bounds.
    pub counts: Vec<u64>,
    pub sum: Duration,
}

impl Histogram {
    /// `bounds`: the upper ends of the buckets in seconds, rising.
    pub fn new(bounds: &'static [f64]) -> Self {
        debug_assert!(bounds.is_sorted());
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_ns: AtomicU64::new(0) }
    }

    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub fn counted(&self) -> Counted {
        Counted {
            bounds: self.bounds,
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)),
        }
    }
}

impl Counted {
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Calls by verb: how long they took, and how many were answered with a fault. The verbs are given once, so that no
/// caller can make this larger.
#[derive(Debug)]
pub struct Calls(BTreeMap<&'static str, Verb>);

#[derive(Debug)]
struct Verb {
    took: Histogram,
    faults: AtomicU64,
}

/// What was counted of one verb.
#[derive(Debug, Clone, PartialEq)]
pub struct Called {
    pub verb: &'static str,
    pub took: Counted,
    pub faults: u64,
}

impl Calls {
    pub fn of(verbs: impl IntoIterator<Item = &'static str>) -> Self {
        let new = |verb| (verb, Verb { took: Histogram::new(CALL_BOUNDS), faults: AtomicU64::new(0) });
        Self(verbs.into_iter().map(new).collect())
    }

    /// A call of a verb that was not given is not counted.
    pub fn observe(&self, verb: &str, took: Duration, fault: bool) {
        let Some(verb) = self.0.get(verb) else { return };
        verb.took.observe(took);
        verb.faults.fetch_add(u64::from(fault), Ordering::Relaxed);
    }

    /// Those that were called.
    pub fn counted(&self) -> Vec<Called> {
        let all = self.0.iter().map(|(name, verb)| Called {
            verb: name,
            took: verb.took.counted(),
            faults: verb.faults.load(Ordering::Relaxed),
        });
        all.filter(|called| called.took.count() > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_as_long_as_a_bound_is_in_its_bucket_and_what_is_longer_than_all_is_in_the_last() {
        let histogram = Histogram::new(&[0.001, 1.0]);
        for ms in [0, 1, 2, 1000, 1001, 90_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let counted = histogram.counted();
        assert_eq!((counted.counts.as_slice(), counted.count()), ([2, 2, 2].as_slice(), 6));
        assert_eq!(counted.sum, Duration::from_millis(92_004));
    }

    #[test]
    fn only_verbs_that_are_known_are_counted_and_only_those_that_were_called_are_told() {
        let calls = Calls::of(["list_vms", "start_vm"]);
        calls.observe("start_vm", Duration::from_millis(3), true);
        calls.observe("start_vm", Duration::from_millis(3), false);
        calls.observe("no_verb", Duration::from_millis(3), true);
        let [called] = &calls.counted()[..] else { panic!("one verb was called") };
        assert_eq!((called.verb, called.took.count(), called.faults), ("start_vm", 2, 1));
    }
}
