//! What sampling reads of Xen: how much memory the machine and its domains have, how long its CPUs have idled, and what
//! XenStore holds about a guest's memory.
//!
//! Part of the last is written by the guest, so it is bytes until [`GuestTold::checked`] has looked: garbage, or more
//! than the domain may have, is as if nothing had been told.

use super::DomId;
use super::xenstore::number;
use crate::model::KiB;

/// The machine as Xen sees it at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    pub total_memory: KiB,
    /// Not given to any domain, and not claimed for one.
    pub free_memory: KiB,
    /// A clock that runs as the CPUs' idle time does, read at the same moment. Only its differences mean anything.
    pub clock_ns: u64,
    /// The physical CPUs that are on, by number; none if it is not known how long they idle.
    pub cpus: Vec<CpuIdle>,
    /// What each domain has now, by domid; none if it is not known.
    pub domains: Vec<(DomId, KiB)>,
}

/// How long a physical CPU has had nothing to do since it was switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuIdle {
    pub cpu: u32,
    pub idle_ns: u64,
}

/// What is told of a domain's memory, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFigures {
    pub domid: DomId,
    /// What it was told to have.
    pub memory_target: Option<KiB>,
    /// As the guest counts it: never more than the domain may have.
    pub guest_total: Option<KiB>,
    /// As the guest counts it: never more than the total.
    pub guest_free: Option<KiB>,
}

/// The same as it lies in XenStore: what the toolstack wrote, and what the guest did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestTold {
    /// `memory/target`
    pub target: Option<KiB>,
    /// `memory/static-max`
    pub max: Option<KiB>,
    /// `data/meminfo_total`, the guest's
    pub total: Option<Vec<u8>>,
    /// `data/meminfo_free`, the guest's
    pub free: Option<Vec<u8>>,
}

impl GuestTold {
    pub fn checked(&self, domid: DomId) -> GuestFigures {
        // Held against the most that the domain may have; where that is not known, nothing is believed.
        let within = |told: &Option<Vec<u8>>, most: Option<KiB>| {
            let told = KiB(number(told.as_deref()?)?);
            (told <= most?).then_some(told)
        };
        let guest_total = within(&self.total, self.max);
        let guest_free = within(&self.free, guest_total);
        GuestFigures { domid, memory_target: self.target, guest_total, guest_free }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn told(total: &[u8], free: &[u8]) -> GuestFigures {
        let told = GuestTold {
            target: Some(KiB(900)),
            max: Some(KiB(1000)),
            total: Some(total.to_vec()),
            free: Some(free.to_vec()),
        };
        told.checked(DomId(3))
    }

    fn believed(total: &[u8], free: &[u8]) -> (Option<u64>, Option<u64>) {
        let told = told(total, free);
        assert_eq!(told.memory_target, Some(KiB(900)), "the toolstack's word stands by itself");
        (told.guest_total.map(|kib| kib.0), told.guest_free.map(|kib| kib.0))
    }

    #[test]
    fn a_guest_is_believed_what_may_be_true() {
        assert_eq!(believed(b"950", b"400"), (Some(950), Some(400)));
        assert_eq!(believed(b"1000", b"1000"), (Some(1000), Some(1000)));
        assert_eq!(believed(b"950", b"951"), (Some(950), None), "more free than there is");
        assert_eq!(believed(b"1001", b"400"), (None, None), "more than the domain may have");
        assert_eq!(believed(b"950", b"-1"), (Some(950), None));
        assert_eq!(believed(b"950 kB", b"400"), (None, None));
        for garbage in [&b""[..], b"\0", b"\xff\xfe", b"1e3", b"NaN", b"18446744073709551616", &[b'9'; 4096]]
        {
            assert_eq!(believed(b"950", garbage), (Some(950), None), "{garbage:?}");
            assert_eq!(believed(garbage, b"400"), (None, None), "{garbage:?}");
        }
        let without_most = GuestTold { max: None, total: Some(b"1".to_vec()), ..GuestTold::default() };
        assert_eq!(without_most.checked(DomId(3)).guest_total, None);
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_its_figures_stay_within_what_it_may_have(
            total in proptest::collection::vec(any::<u8>(), 0..30),
            free in "[0-9]{0,25}",
        ) {
            let told = told(&total, free.as_bytes());
            prop_assert!(told.guest_total.is_none_or(|total| total <= KiB(1000)));
            prop_assert!(told.guest_free.is_none_or(|free| Some(free) <= told.guest_total));
        }
    }
}
