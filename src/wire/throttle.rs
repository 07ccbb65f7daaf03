//! How often each address has failed in the last minute. Pure: the time comes in.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use tokio::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(60);
/// An address that has to wait may try once in so long all the same: somebody with the right password shares it
/// with somebody who guesses, and gets in; guesses stay slow.
const TRICKLE: Duration = Duration::from_secs(5);
/// Addresses remembered. Beyond it the older half is forgotten, so that a flood of addresses costs memory
/// to no one and an attempt to each.
const MAX_ADDRESSES: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Throttle {
    windows: HashMap<IpAddr, Window>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    since: Instant,
    failures: u32,
    admitted: Instant,
}

impl Throttle {
    /// Counts an attempt as failed until [`Throttle::forgive`]; `false` if the address has to wait.
    pub(super) fn admit(&mut self, address: IpAddr, max_failures: u32, now: Instant) -> bool {
        let address = network_of(address);
        if !self.windows.contains_key(&address) && self.windows.len() >= MAX_ADDRESSES {
            self.make_room(now);
        }
        let window = self.windows.entry(address).or_insert(Window { since: now, failures: 0, admitted: now });
        if now.saturating_duration_since(window.since) >= WINDOW {
            *window = Window { since: now, failures: 0, admitted: now };
        }
        if window.failures >= max_failures && now.saturating_duration_since(window.admitted) < TRICKLE {
            return false;
        }
        window.failures = window.failures.saturating_add(1);
        window.admitted = now;
        true
    }

    /// The attempt was a good one.
    pub(super) fn forgive(&mut self, address: IpAddr) {
        if let Some(window) = self.windows.get_mut(&network_of(address)) {
            window.failures = window.failures.saturating_sub(1);
        }
    }

    fn make_room(&mut self, now: Instant) {
        self.windows.retain(|_, window| now.saturating_duration_since(window.since) < WINDOW);
        if self.windows.len() >= MAX_ADDRESSES {
            // Half of them at once: to look for the oldest at every attempt would be the flood's gain.
            let mut begins: Vec<Instant> = self.windows.values().map(|window| window.since).collect();
            let (_, middle, _) = begins.select_nth_unstable(MAX_ADDRESSES / 2);
            let middle = *middle;
            let mut surplus = MAX_ADDRESSES / 2;
            self.windows.retain(|_, window| {
                let goes = surplus > 0 && window.since <= middle;
                surplus -= usize::from(goes);
                !goes
            });
        }
    }
}

/// The address as whom limits count it: IPv4 as it is, even if mapped; of IPv6 the first 64 bits, because one
/// customer has them all.
pub(super) fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_waits_after_its_failures_until_the_minute_is_over_and_others_do_not() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        assert!((0..3).all(|_| throttle.admit(address(1), 3, start)));
        assert!(!throttle.admit(address(1), 3, start + Duration::from_secs(4)));
        assert!(throttle.admit(address(2), 3, start));
        assert!(throttle.admit(address(1), 3, start + WINDOW));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_has_to_wait_may_try_once_in_a_few_seconds_however_often_it_asks() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        let tries = (0..600).map(|tenth| start + Duration::from_millis(tenth * 100));
        let admitted = tries.filter(|now| throttle.admit(address(1), 3, *now)).count();
        assert_eq!(admitted, 3 + 11);
    }

    #[tokio::test(start_paused = true)]
    async fn good_attempts_are_not_counted() {
        let mut throttle = Throttle::default();
        for _ in 0..100 {
            assert!(throttle.admit(address(1), 3, Instant::now()));
            throttle.forgive(address(1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_of_addresses_is_bounded() {
        let mut throttle = Throttle::default();
        for number in 0..10_000u32 {
            assert!(throttle.admit(IpAddr::from(number.to_be_bytes()), 3, Instant::now()));
        }
        assert!(throttle.windows.len() <= MAX_ADDRESSES);
    }

    #[test]
    fn one_ipv6_network_counts_as_one_address() {
        let a: IpAddr = "2001:db8:1:2:3::4".parse().unwrap();
        let b: IpAddr = "2001:db8:1:2:ffff::9".parse().unwrap();
        assert_eq!(network_of(a), network_of(b));
        assert_eq!(network_of("::ffff:192.0.2.1".parse().unwrap()), address(1));
    }
}
