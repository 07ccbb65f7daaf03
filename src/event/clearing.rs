//! Which alerts are open, and which of them an event clears. Pure: fed with the events in the order of their numbers.
//!
//! What was held back is told late (`event.flapping`) and means what it meant in its place: it clears no alert that came
//! behind that place, and is no alert if it was over by the time it is told.
//!
//! It keeps nothing on disk. Whoever feeds it acknowledges what it is told; fed once more with the same events (or with
//! those that were open at some number, and all behind it), it gives the same answers, less those that were acknowledged.

use super::catalogue::{self, Kind, kind};
use super::damper::Place;
use super::{Event, Severity};
use crate::model::EventNumber;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// More open alerts than this are not remembered: the oldest are not counted any more, and a hand must acknowledge them.
pub const MAX_OPEN: usize = 20_000;

/// Of so many objects it is remembered when something last ended the alerts of a damped type: one that was held back may
/// be told behind that.
const MAX_ENDS: usize = 4096;

/// What an alert is about: its type, and its object.
type Subject = (Kind, Arc<str>);

/// One that is open, and that something may clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenAlert {
    pub number: EventNumber,
    pub kind: Kind,
    pub object: Arc<str>,
    /// What of the object; `None`: all of it.
    pub part: Option<Arc<str>>,
}

#[derive(Debug, Default)]
pub struct Clearing {
    open: BTreeMap<EventNumber, Alert>,
    /// Of the open alerts that something clears: their numbers.
    by_subject: HashMap<Subject, BTreeSet<EventNumber>>,
    /// Of damped types: what ended all alerts of the object last.
    ends: HashMap<Subject, Place>,
    counts: [u64; 4],
}

#[derive(Debug)]
struct Alert {
    severity: Severity,
    place: Place,
    part: Option<Arc<str>>,
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

    /// Those of some types.
    pub fn open_of(&self, kinds: &[Kind]) -> Vec<OpenAlert> {
        let subjects = self.by_subject.iter().filter(|((kind, _), _)| kinds.contains(kind));
        let alerts = subjects.flat_map(|((kind, object), numbers)| {
            numbers.iter().map(|number| OpenAlert {
                number: *number,
                kind: *kind,
                object: Arc::clone(object),
                part: self.open.get(number).and_then(|alert| alert.part.clone()),
            })
        });
        let mut alerts: Vec<OpenAlert> = alerts.collect();
        alerts.sort_unstable_by_key(|alert| alert.number);
        alerts
    }

    /// The next event. Answers the alerts that it clears, which are open no more: itself among them if it tells late of an
    /// alert that is over.
    pub fn take(&mut self, number: EventNumber, event: &Event) -> Vec<EventNumber> {
        let meaning = Meaning::of(number, event);
        let object: Arc<str> = event.object.as_str().into();
        let mut cleared = BTreeSet::new();
        for (told, place) in &meaning.ends {
            for alert in catalogue::clears(told) {
                let subject = (*alert, Arc::clone(&object));
                cleared.extend(self.ended(&subject, *place, meaning.part.as_deref()));
                if meaning.part.is_none() && alert.entry().damped_as.is_some() {
                    self.note_end(subject, *place);
                }
            }
        }
        cleared.iter().for_each(|number| self.forget(*number));
        if event.severity >= Severity::Warning && event.acknowledged.is_none() {
            let entry = catalogue::find(meaning.told).filter(|entry| !entry.cleared_by.is_empty());
            let subject = entry.map(|entry| (entry.kind, object));
            let end = subject.as_ref().and_then(|subject| self.ends.get(subject));
            if end.is_some_and(|end| *end > meaning.place) {
                cleared.insert(number);
            } else {
                let Meaning { place, part, .. } = meaning;
                self.open(number, Alert { severity: event.severity, place, part, subject });
            }
        }
        cleared.into_iter().collect()
    }

    fn ended(&self, subject: &Subject, place: Place, part: Option<&str>) -> Vec<EventNumber> {
        let numbers = self.by_subject.get(subject).into_iter().flatten();
        let is_over = |alert: &Alert| {
            let same = part.is_none_or(|part| alert.part.as_deref().is_none_or(|its| its == part));
            same && alert.place < place
        };
        numbers.filter(|number| self.open.get(number).is_some_and(is_over)).copied().collect()
    }

    fn note_end(&mut self, subject: Subject, place: Place) {
        if self.ends.len() >= MAX_ENDS
            && !self.ends.contains_key(&subject)
            && let Some(oldest) =
                self.ends.iter().min_by_key(|(_, at)| **at).map(|(oldest, _)| oldest.clone())
        {
            self.ends.remove(&oldest);
        }
        let end = self.ends.entry(subject).or_insert(place);
        *end = place.max(*end);
    }

    fn open(&mut self, number: EventNumber, alert: Alert) {
        self.forget(number);
        if self.open.len() >= MAX_OPEN
            && let Some(oldest) = self.open.keys().next().copied()
        {
            self.forget(oldest);
        }
        if let Some(subject) = &alert.subject {
            self.by_subject.entry(subject.clone()).or_default().insert(number);
        }
        self.counts[alert.severity as usize] += 1;
        self.open.insert(number, alert);
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

/// What an event says of alerts. The end of flapping says what those say that were held back.
struct Meaning<'a> {
    /// The type of the one that may be an alert, and its place.
    told: &'a str,
    place: Place,
    part: Option<Arc<str>>,
    /// All that may clear something.
    ends: Vec<(&'a str, Place)>,
}

impl<'a> Meaning<'a> {
    fn of(number: EventNumber, event: &'a Event) -> Self {
        let plain = (number, 0);
        let last = event.data.get("type").and_then(|last| last.as_str());
        let Some(told) = last.filter(|_| event.kind == kind::EVENT_FLAPPING) else {
            let part = event.part().map(Arc::from);
            return Self { told: &event.kind, place: plain, part, ends: vec![(&event.kind, plain)] };
        };
        let data = event.data.get("data").and_then(|data| data.as_object());
        let part = catalogue::find(told).and_then(|entry| entry.part_of(data?)).map(Arc::from);
        let mut ends = Vec::new();
        for (held, after) in event.data.get("after").and_then(|after| after.as_object()).into_iter().flatten()
        {
            if let Ok(place) = serde_json::from_value::<Place>(after.clone()) {
                ends.push((held.as_str(), place));
            }
        }
        let place = ends.iter().find(|(held, _)| *held == told).map(|(_, place)| *place);
        // An older agent's does not tell its place.
        let place = place.unwrap_or_else(|| {
            ends.push((told, plain));
            plain
        });
        Self { told, place, part, ends }
    }
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
