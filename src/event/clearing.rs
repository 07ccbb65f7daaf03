//! Which alerts are open, and which of them an event clears. Pure: fed with the events in the order of their numbers.
//!
//! It keeps nothing on disk. Whoever feeds it acknowledges what it is told; fed once more with the same events (or with
//! those that were open at some number, and all behind it), it gives the same answers, less those that were acknowledged.

use super::catalogue::{self, Kind, kind};
use super::{Event, Severity};
use crate::model::EventNumber;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// More open alerts than this are not remembered: the oldest are not counted any more, and a hand must acknowledge them.
pub const MAX_OPEN: usize = 20_000;

/// What an alert is about: its type, and its object.
type Subject = (Kind, Arc<str>);

#[derive(Debug, Default)]
pub struct Clearing {
    open: BTreeMap<EventNumber, Alert>,
    /// Of the open alerts that something clears: their numbers.
    by_subject: HashMap<Subject, BTreeSet<EventNumber>>,
    counts: [u64; 4],
}

#[derive(Debug)]
struct Alert {
    severity: Severity,
    /// `None`: nothing clears it but a hand.
    subject: Option<Subject>,
}

impl Clearing {
    /// Open alerts by severity: info (of which there are none), warning, error, critical.
    pub fn counts(&self) -> [u64; 4] {
        self.counts
    }

    /// Those that are open, in order.
    pub fn numbers(&self) -> Vec<EventNumber> {
        self.open.keys().copied().collect()
    }

    /// The next event. Answers the alerts that it clears, which are open no more.
    pub fn take(&mut self, number: EventNumber, event: &Event) -> Vec<EventNumber> {
        let told = effective_type(event);
        let object: Arc<str> = event.object.as_str().into();
        let mut cleared = Vec::new();
        for alert in catalogue::clears(told) {
            let numbers = self.by_subject.get(&(*alert, Arc::clone(&object)));
            cleared.extend(numbers.into_iter().flatten().copied());
        }
        cleared.sort_unstable();
        cleared.iter().for_each(|number| self.forget(*number));
        if event.severity >= Severity::Warning && event.acknowledged.is_none() {
            self.open(number, event.severity, told, object);
        }
        cleared
    }

    fn open(&mut self, number: EventNumber, severity: Severity, told: &str, object: Arc<str>) {
        if self.open.len() >= MAX_OPEN
            && let Some(oldest) = self.open.keys().next().copied()
        {
            self.forget(oldest);
        }
        let entry = catalogue::find(told).filter(|entry| !entry.cleared_by.is_empty());
        let subject = entry.map(|entry| (entry.kind, object));
        if let Some(subject) = &subject {
            self.by_subject.entry(subject.clone()).or_default().insert(number);
        }
        self.counts[severity as usize] += 1;
        self.open.insert(number, Alert { severity, subject });
    }

    /// It was acknowledged.
    pub fn forget(&mut self, number: EventNumber) {
        let Some(alert) = self.open.remove(&number) else { return };
        self.counts[alert.severity as usize] -= 1;
        let Some(subject) = alert.subject else { return };
        if let Some(numbers) = self.by_subject.get_mut(&subject) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_subject.remove(&subject);
            }
        }
    }

    /// Older ones are no longer kept.
    pub fn forget_before(&mut self, oldest: EventNumber) {
        while let Some(number) = self.open.keys().next().copied().filter(|number| *number < oldest) {
            self.forget(number);
        }
    }
}

/// The end of flapping tells of the last event that was held back: it means what that one means.
fn effective_type(event: &Event) -> &str {
    let last = event.data.get("type").and_then(|last| last.as_str());
    last.filter(|_| event.kind == kind::EVENT_FLAPPING).unwrap_or(&event.kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Acknowledgement;
    use crate::model::Timestamp;
    use proptest::prelude::*;

    fn event(kind: Kind, object: &str) -> Event {
        Event::new(kind, object, "text")
    }

    fn feed(machine: &mut Clearing, events: &[Event]) -> Vec<u64> {
        let numbered = events.iter().zip(1..);
        numbered.flat_map(|(event, n)| machine.take(EventNumber(n), event)).map(|n| n.0).collect()
    }

    #[test]
    fn an_alert_is_cleared_by_what_its_row_says_and_only_of_the_same_object() {
        for (what, events, cleared, open) in [
            ("a start", vec![event(kind::VM_CRASHED, "vm/a"), event(kind::VM_STARTED, "vm/a")], vec![1], 0),
            (
                "another's start",
                vec![event(kind::VM_CRASHED, "vm/a"), event(kind::VM_STARTED, "vm/b")],
                vec![],
                1,
            ),
            ("no start", vec![event(kind::VM_CRASHED, "vm/a"), event(kind::VM_CHANGED, "vm/a")], vec![], 1),
            (
                "a start before",
                vec![event(kind::VM_STARTED, "vm/a"), event(kind::VM_CRASHED, "vm/a")],
                vec![],
                1,
            ),
            (
                "one for all",
                vec![
                    event(kind::VM_LEFT_OFF, "vm/a"),
                    event(kind::VM_CRASHED, "vm/a"),
                    event(kind::VM_CRASHED, "vm/a"),
                    event(kind::VM_STARTED, "vm/a"),
                    event(kind::VM_STARTED, "vm/a"),
                ],
                vec![1, 2, 3],
                0,
            ),
            (
                "the same type anew",
                vec![
                    event(kind::VM_AUTOSTART, "host").with_severity(Severity::Error),
                    event(kind::VM_AUTOSTART, "host").with_severity(Severity::Error),
                    event(kind::VM_AUTOSTART, "host"),
                ],
                vec![1, 2],
                0,
            ),
            (
                "one that nothing clears",
                vec![event(kind::STORE_REBUILT, "host"), event(kind::VM_ADOPTION, "host")],
                vec![],
                1,
            ),
            (
                "a manager that is back",
                vec![
                    event(kind::MANAGER_UNREACHABLE, "manager/events"),
                    event(kind::MANAGER_REFUSED, "manager/statistics"),
                    event(kind::MANAGER_REACHABLE, "manager/events"),
                ],
                vec![1],
                1,
            ),
        ] {
            let mut machine = Clearing::default();
            assert_eq!(feed(&mut machine, &events), cleared, "{what}");
            assert_eq!(machine.counts().iter().sum::<u64>(), open, "{what}");
        }
    }

    #[test]
    fn what_is_acknowledged_or_pruned_is_open_no_more() {
        let mut machine = Clearing::default();
        let mut known = event(kind::VM_CRASHED, "vm/a");
        known.acknowledged = Some(Acknowledgement { by: "x".to_owned(), at: Timestamp(1) });
        let crash = event(kind::VM_CRASHED, "vm/a");
        feed(&mut machine, &[known, crash.clone(), crash.clone(), crash]);
        assert_eq!(machine.counts(), [0, 0, 3, 0]);
        machine.forget(EventNumber(3));
        machine.forget(EventNumber(3));
        machine.forget_before(EventNumber(3));
        assert_eq!(machine.counts(), [0, 0, 1, 0]);
        let cleared = machine.take(EventNumber(5), &event(kind::VM_STARTED, "vm/a"));
        assert_eq!(cleared, [EventNumber(4)]);
        assert!(machine.by_subject.is_empty());
    }

    #[test]
    fn the_end_of_flapping_means_what_the_last_one_held_back_means() {
        let lost = event(kind::NETWORK_ADDRESS_REMOVED, "network/eth0");
        let back = event(kind::EVENT_FLAPPING, "network/eth0").with("type", "network.address_added");
        assert_eq!(feed(&mut Clearing::default(), &[lost, back]), [1]);
        let gone = event(kind::EVENT_FLAPPING, "network/eth0").with("type", "network.address_removed");
        let gone = gone.with_severity(Severity::Warning);
        let back = event(kind::NETWORK_ADDRESS_ADDED, "network/eth0");
        assert_eq!(feed(&mut Clearing::default(), &[gone, back]), [1]);
    }

    #[test]
    fn of_more_alerts_than_can_be_remembered_the_oldest_are_forgotten() {
        let mut machine = Clearing::default();
        for n in 1..=MAX_OPEN as u64 + 10 {
            machine.take(EventNumber(n), &event(kind::VM_CRASHED, &format!("vm/{n}")));
        }
        assert_eq!(machine.counts(), [0, 0, MAX_OPEN as u64, 0]);
        assert_eq!((machine.open.len(), machine.by_subject.len()), (MAX_OPEN, MAX_OPEN));
        assert_eq!(machine.take(EventNumber(90_000), &event(kind::VM_STARTED, "vm/10")), []);
        assert_eq!(machine.take(EventNumber(90_001), &event(kind::VM_STARTED, "vm/11")), [EventNumber(11)]);
    }

    fn some_events() -> impl Strategy<Value = Vec<(usize, u8)>> {
        prop::collection::vec((0..catalogue::CATALOGUE.len(), 0u8..3), 0..80)
    }

    fn made((row, object): (usize, u8)) -> Event {
        event(catalogue::CATALOGUE[row].kind, &format!("object/{object}"))
    }

    proptest! {
        /// The rule as it is told: an alert is acknowledged by the first event behind it that clears its type.
        #[test]
        fn what_is_cleared_is_what_the_rule_says(events in some_events()) {
            let events: Vec<Event> = events.into_iter().map(made).collect();
            let rule = |(at, alert): (usize, &Event)| {
                let by = catalogue::find(&alert.kind).unwrap().cleared_by;
                let clears = |later: &Event| later.object == alert.object && by.iter().any(|by| later.kind == *by);
                alert.severity >= Severity::Warning && events[at + 1..].iter().any(clears)
            };
            let expected: Vec<u64> =
                (1..).zip(events.iter().enumerate()).filter(|(_, one)| rule(*one)).map(|(n, _)| n).collect();
            let mut machine = Clearing::default();
            let mut cleared = feed(&mut machine, &events);
            cleared.sort_unstable();
            prop_assert_eq!(&cleared, &expected);
            let alerts = events.iter().filter(|event| event.severity >= Severity::Warning).count();
            prop_assert_eq!(machine.counts().iter().sum::<u64>() as usize, alerts - cleared.len());
        }

        /// Whenever it dies, and whichever of its answers were carried out by then, the next life answers the rest.
        #[test]
        fn a_death_at_any_point_loses_no_acknowledgement(
            events in some_events(),
            dies_at in 0usize..80,
            carried_out in prop::collection::vec(any::<bool>(), 80),
        ) {
            let mut events: Vec<Event> = events.into_iter().map(made).collect();
            let whole: BTreeSet<u64> = feed(&mut Clearing::default(), &events).into_iter().collect();
            let first = feed(&mut Clearing::default(), &events[..dies_at.min(events.len())]);
            let mut done: BTreeSet<u64> = BTreeSet::new();
            for (number, _) in first.into_iter().zip(carried_out).filter(|(_, done)| *done) {
                done.insert(number);
                events[number as usize - 1].acknowledged = Some(Acknowledgement { by: "x".to_owned(), at: Timestamp(1) });
            }
            let second: BTreeSet<u64> = feed(&mut Clearing::default(), &events).into_iter().collect();
            prop_assert!(second.is_disjoint(&done), "nothing is acknowledged twice");
            prop_assert_eq!(&second | &done, whole);
        }
    }
}
