//! How late the daemon's workers are: a task that sleeps a while and looks how much later it wakes. Whatever holds a worker
//! up (a computation, a call that blocks, a machine without CPU time) shows here before callers complain.

use super::Lag;
use crate::model::histogram::{CALL_BOUNDS, Histogram};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const SLEEP: Duration = Duration::from_millis(500);
/// The latest is told of this period and the one before.
const PERIOD: Duration = Duration::from_secs(30);

/// What was measured so far.
#[derive(Debug)]
pub struct Meter {
    late: Histogram,
    /// The latest of the period under way, and of the one before; ns.
    max_ns: [AtomicU64; 2],
}

impl Default for Meter {
    fn default() -> Self {
        Self { late: Histogram::new(CALL_BOUNDS), max_ns: Default::default() }
    }
}

impl Meter {
    pub fn read(&self) -> Lag {
        let max = self.max_ns.iter().map(|max| max.load(Ordering::Relaxed)).max();
        Lag { late: self.late.counted(), max: Duration::from_nanos(max.unwrap_or(0)) }
    }

    /// Measures until `stop`.
    pub async fn measure(&self, stop: CancellationToken) {
        let mut period_end = Instant::now() + PERIOD;
        loop {
            let due = Instant::now() + SLEEP;
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = stop.cancelled() => return,
            }
            let now = Instant::now();
            if now >= period_end {
                period_end = now + PERIOD;
                let last = self.max_ns[0].swap(0, Ordering::Relaxed);
                self.max_ns[1].store(last, Ordering::Relaxed);
            }
            self.note(now - due);
        }
    }

    fn note(&self, late: Duration) {
        self.late.observe(late);
        self.max_ns[0].fetch_max(u64::try_from(late.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_was_held_up_shows_for_a_while_and_then_no_more() {
        let meter = Arc::new(Meter::default());
        let stop = CancellationToken::new();
        let measuring = tokio::spawn({
            let (meter, stop) = (Arc::clone(&meter), stop.clone());
            async move { meter.measure(stop).await }
        });
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(meter.read().max < Duration::from_millis(5), "{:?}", meter.read());
        // The clock goes on, and nobody was woken.
        tokio::time::advance(Duration::from_secs(2)).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let held_up = meter.read();
        assert!(held_up.max >= Duration::from_millis(1400), "{held_up:?}");
        assert_eq!(held_up.late.counts.iter().rev().take(6).sum::<u64>(), 1, "{held_up:?}");
        tokio::time::sleep(2 * PERIOD).await;
        assert!(meter.read().max < Duration::from_millis(5), "{:?}", meter.read());
        stop.cancel();
        measuring.await.unwrap();
    }
}
