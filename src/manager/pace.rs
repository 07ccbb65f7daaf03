//! How often and how much at once: a pure machine, fed with what became of each POST.
//!
//! A batch that was taken lets the next one be twice as large, up to the bound; one that took too long or was too large
//! halves it, down to a single item, so that a slow line gets on. Waits double from half a second to a minute, each cut
//! by chance to between a half and the whole, so that many hosts do not come back at the same moment.

use super::source::Limit;
use std::time::Duration;

const MOST_ITEMS: usize = 1000;
const MOST_BYTES: usize = 512 * 1024;
const FIRST_WAIT_MS: u64 = 1000;
const LONGEST_WAIT_MS: u64 = 60_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pace {
    items: usize,
    /// Tries in a row that failed.
    failures: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { items: MOST_ITEMS, failures: 0 }
    }
}

impl Pace {
    pub(super) fn limit(&self) -> Limit {
        Limit { items: self.items, bytes: MOST_BYTES.min(self.items.saturating_mul(4096)) }
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    pub(super) fn taken(&mut self) {
        self.failures = 0;
        self.items = self.items.saturating_mul(2).min(MOST_ITEMS);
    }

    /// `too_much`: a smaller batch may get through. `sent`: how many items there were. `chance`: from 0 to below 1.
    pub(super) fn failed(&mut self, too_much: bool, sent: usize, chance: f64) -> Duration {
        if too_much {
            self.items = (sent.min(self.items) / 2).max(1);
        }
        let longest = LONGEST_WAIT_MS.min(FIRST_WAIT_MS.saturating_mul(1 << self.failures.min(16)));
        self.failures = self.failures.saturating_add(1);
        let part = 0.5 + chance.clamp(0.0, 1.0) / 2.0;
        Duration::from_millis(longest).mul_f64(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waits_double_to_a_minute_and_begin_anew_after_a_success() {
        let mut pace = Pace::default();
        let waits: Vec<u64> = (0..9).map(|_| pace.failed(false, 10, 1.0).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        pace.taken();
        assert_eq!(pace.failed(false, 10, 0.0), Duration::from_millis(500));
    }

    #[test]
    fn what_is_too_much_is_halved_down_to_one_and_grows_back() {
        let mut pace = Pace::default();
        pace.failed(true, 300, 0.5);
        assert_eq!(pace.limit().items, 150);
        for _ in 0..20 {
            pace.failed(true, pace.limit().items, 0.5);
        }
        assert_eq!(pace.limit().items, 1);
        for _ in 0..20 {
            pace.taken();
        }
        assert_eq!(pace, Pace::default());
    }

    proptest! {
        #[test]
        fn a_wait_is_never_shorter_than_half_a_second_nor_longer_than_a_minute(
            failures in 0..100_u32, chance in 0.0..1.0_f64, sent in 0..5000_usize,
        ) {
            let mut pace = Pace::default();
            for _ in 0..failures {
                pace.failed(sent % 2 == 0, sent, chance);
            }
            let wait = pace.failed(true, sent, chance);
            prop_assert!(wait >= Duration::from_millis(500) && wait <= Duration::from_secs(60));
            prop_assert!(pace.limit().items >= 1 && pace.limit().bytes >= 4096);
        }
    }
}
