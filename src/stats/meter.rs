//! How long each physical CPU has worked: Xen tells how long it idled, so it is the time that passed less that. The two
//! are not read at quite the same moment and may run apart by a little; a counter must not fall for it.

use crate::xen::Usage;
use std::collections::HashMap;
use std::time::Duration;

/// CPUs that are counted.
const MAX_CPUS: usize = 4096;

/// Counts from its first look at each CPU.
#[derive(Debug, Default)]
pub struct Meter {
    cpus: HashMap<u32, Count>,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    /// From where it counts: clock and idle time, and what it had counted by then.
    from: (u64, u64, u64),
    last: (u64, u64),
    busy_ns: u64,
}

impl Count {
    fn begin(now: (u64, u64), busy_ns: u64) -> Self {
        Self { from: (now.0, now.1, busy_ns), last: now, busy_ns }
    }

    fn look(&mut self, now: (u64, u64)) {
        // The CPU, or the whole of Xen, began anew.
        if now.0 < self.last.0 || now.1 < self.last.1 {
            *self = Self::begin(now, self.busy_ns);
            return;
        }
        let passed = now.0.saturating_sub(self.from.0);
        let idle = now.1.saturating_sub(self.from.1);
        self.busy_ns = self.busy_ns.max(self.from.2.saturating_add(passed.saturating_sub(idle)));
        self.last = now;
    }
}

impl Meter {
    /// Seconds by CPU, which never get less as long as the CPU is told.
    pub fn read(&mut self, usage: &Usage) -> Vec<(u32, f64)> {
        let mut cpus = HashMap::with_capacity(usage.cpus.len());
        let mut told = Vec::with_capacity(usage.cpus.len());
        for cpu in usage.cpus.iter().take(MAX_CPUS) {
            let now = (usage.clock_ns, cpu.idle_ns);
            let mut count = self.cpus.get(&cpu.cpu).copied().unwrap_or_else(|| Count::begin(now, 0));
            count.look(now);
            cpus.insert(cpu.cpu, count);
            told.push((cpu.cpu, Duration::from_nanos(count.busy_ns).as_secs_f64()));
        }
        // One that is off is forgotten: it would come back as if it had worked all the while.
        self.cpus = cpus;
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::KiB;
    use crate::xen::CpuIdle;
    use proptest::prelude::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn usage(clock_ns: u64, idle: &[(u32, u64)]) -> Usage {
        let cpus = idle.iter().map(|(cpu, idle_ns)| CpuIdle { cpu: *cpu, idle_ns: *idle_ns }).collect();
        Usage { total_memory: KiB(1), free_memory: KiB(0), clock_ns, cpus, domains: Vec::new() }
    }

    #[test]
    fn a_cpu_worked_while_it_did_not_idle() {
        let mut meter = Meter::default();
        let s = SECOND_NS;
        assert_eq!(meter.read(&usage(100 * s, &[(0, 90 * s), (3, 7 * s)])), [(0, 0.0), (3, 0.0)]);
        assert_eq!(meter.read(&usage(110 * s, &[(0, 94 * s), (3, 7 * s)])), [(0, 6.0), (3, 10.0)]);
        // It seems to have idled for longer than time passed.
        assert_eq!(meter.read(&usage(111 * s, &[(0, 96 * s), (3, 8 * s)])), [(0, 6.0), (3, 10.0)]);
        assert_eq!(
            meter.read(&usage(121 * s, &[(0, 96 * s)])),
            [(0, 15.0)],
            "no time is lost or counted twice"
        );
        // CPU 3 was off meanwhile.
        assert_eq!(meter.read(&usage(131 * s, &[(0, 96 * s), (3, 8 * s)])), [(0, 25.0), (3, 0.0)]);
        // Its idle time began anew.
        assert_eq!(meter.read(&usage(132 * s, &[(0, s)])), [(0, 25.0)]);
        assert_eq!(meter.read(&usage(134 * s, &[(0, 2 * s)])), [(0, 26.0)]);
        assert_eq!(meter.read(&usage(140 * s, &[])), []);
    }

    proptest! {
        #[test]
        fn the_count_of_a_cpu_never_falls(looks in proptest::collection::vec((0..1000_u64, 0..1000_u64), 1..50)) {
            let (mut meter, mut last, mut clock) = (Meter::default(), 0.0, 0);
            for (passed, idle) in looks {
                clock += passed;
                let told = meter.read(&usage(clock, &[(0, idle)]))[0].1;
                prop_assert!(told >= last && told <= Duration::from_nanos(clock).as_secs_f64());
                last = told;
            }
        }
    }
}
