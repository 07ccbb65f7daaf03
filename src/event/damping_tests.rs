//! What is held back against what is open: damper and clearing together, beside a plain model of both.

use super::clearing::Clearing;
use super::damper::{Damper, Key};
use super::{Event, Kind, Severity, kind};
use crate::model::EventNumber;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

const KINDS: [Kind; 9] = [
    kind::NETWORK_LINK_ADDED,
    kind::NETWORK_LINK_REMOVED,
    kind::NETWORK_LINK_CHANGED,
    kind::NETWORK_CARRIER_LOST,
    kind::NETWORK_CARRIER_BACK,
    kind::NETWORK_FLAPPING,
    kind::NETWORK_SETTLED,
    kind::NETWORK_ADDRESS_ADDED,
    kind::NETWORK_ADDRESS_REMOVED,
];

type Subject = (Kind, String, Option<String>);

/// Every event does at once what it says: the open alerts by the step that brought them.
#[derive(Default)]
struct Model {
    open: BTreeMap<usize, Subject>,
}

impl Model {
    fn take(&mut self, step: usize, event: &Event) {
        let part = event.part().map(str::to_owned);
        self.open.retain(|_, (kind, object, its)| {
            let clears = kind.entry().cleared_by.iter().any(|by| event.kind == *by);
            !(clears && *object == event.object && (part.is_none() || part == *its))
        });
        if event.severity >= Severity::Warning {
            let kind = KINDS.into_iter().find(|kind| event.kind == *kind).unwrap();
            self.open.insert(step, (kind, event.object.clone(), part));
        }
    }

    fn subjects(&self) -> BTreeSet<Subject> {
        self.open.values().cloned().collect()
    }
}

/// The log without its disk.
#[derive(Default)]
struct Real {
    damper: Damper,
    clearing: Clearing,
    newest: u64,
    /// Alerts that passed: the number of each step's.
    passed: BTreeMap<usize, EventNumber>,
    /// Is being written.
    telling: Vec<(Key, Event)>,
}

impl Real {
    fn write(&mut self, event: &Event) -> EventNumber {
        self.newest += 1;
        self.clearing.take(EventNumber(self.newest), event);
        EventNumber(self.newest)
    }

    fn publish(&mut self, step: usize, event: &Event, now: Instant) {
        let family = super::catalogue::find(&event.kind).unwrap().damped_as;
        let newest = EventNumber(self.newest);
        if family.is_none_or(|family| self.damper.take(family, event, newest, now)) {
            let number = self.write(event);
            self.passed.insert(step, number);
        }
    }

    fn tell(&mut self) {
        for (key, event) in std::mem::take(&mut self.telling) {
            self.write(&event);
            self.damper.told(&key);
        }
    }

    fn subjects(&self) -> BTreeSet<Subject> {
        let open = self.clearing.open_of(&KINDS).into_iter();
        open.map(|a| (a.kind, a.object.to_string(), a.part.map(|part| part.to_string()))).collect()
    }
}

fn made(kind: usize, object: u8, address: u8) -> Event {
    let event = Event::new(KINDS[kind], format!("network/{object}"), "text");
    match KINDS[kind] {
        kind::NETWORK_SETTLED => event.with_severity(Severity::Warning),
        kind::NETWORK_ADDRESS_ADDED | kind::NETWORK_ADDRESS_REMOVED => {
            event.with("address", format!("192.0.2.{address}/24"))
        }
        _ => event,
    }
}

#[test]
fn an_address_that_another_one_joins_stays_lost_and_each_has_its_own_last_state() {
    let (mut real, now) = (Real::default(), Instant::now());
    real.publish(0, &made(8, 0, 1), now);
    real.publish(1, &made(7, 0, 2), now);
    let lost = (KINDS[8], "network/0".to_owned(), Some("192.0.2.1/24".to_owned()));
    assert_eq!(real.subjects(), BTreeSet::from([lost.clone()]));
    for step in 2..30 {
        real.publish(step, &made(7 + step % 2, 0, 2), now);
    }
    assert!(real.newest < 10, "they are held back");
    // Told alone, the other one's end would be the last state of both.
    for step in 30..50 {
        real.publish(step, &made(7 + step % 2, 0, 1), now);
    }
    real.publish(50, &made(8, 0, 1), now);
    real.publish(51, &made(7, 0, 2), now);
    real.telling = real.damper.all();
    real.tell();
    assert_eq!(real.subjects(), BTreeSet::from([lost]));
}

#[test]
fn what_was_held_back_clears_what_was_open_then_and_nothing_that_came_later() {
    let (mut real, now) = (Real::default(), Instant::now());
    (0..10).for_each(|step| real.publish(step, &made(2, 0, 0), now));
    real.publish(10, &made(3, 0, 0), now);
    // Held back, and not the last of what is.
    real.publish(11, &made(0, 0, 0), now);
    real.publish(12, &made(2, 0, 0), now);
    real.publish(13, &made(5, 0, 0), now);
    real.telling = real.damper.all();
    real.tell();
    assert_eq!(real.subjects(), BTreeSet::from([(KINDS[5], "network/0".to_owned(), None)]));
}

#[test]
fn an_alert_that_was_over_before_it_was_told_is_not_open_and_is_acknowledged() {
    let (mut real, now) = (Real::default(), Instant::now());
    (0..10).for_each(|step| real.publish(step, &made(7 + step % 2, 0, 1), now));
    real.publish(10, &made(1, 0, 0), now);
    let told = real.damper.all();
    assert_eq!(told[0].1.severity, Severity::Warning);
    let number = EventNumber(real.newest + 1);
    assert_eq!(real.clearing.take(number, &told[0].1), [number]);
    assert!(real.subjects().is_empty());
}

proptest! {
    /// Whatever comes whenever, and however long the telling takes: no alert that passed is taken for over before it
    /// is, and when all is told, what is open is what would be open had nothing been held back.
    #[test]
    fn what_is_held_back_changes_no_alert_for_good(
        steps in prop::collection::vec((0u64..4_000, 0usize..9, 0u8..2, 0u8..2, 0u8..4), 1..200),
    ) {
        let (mut real, mut model, mut now) = (Real::default(), Model::default(), Instant::now());
        for (step, (pause_ms, kind, object, address, slow)) in steps.into_iter().enumerate() {
            now += Duration::from_millis(pause_ms);
            if slow > 0 {
                real.tell();
                real.telling = real.damper.due(now);
            }
            let event = made(kind, object, address);
            model.take(step, &event);
            real.publish(step, &event, now);
            let open = real.clearing.numbers();
            for step in model.open.keys() {
                let still = real.passed.get(step).is_none_or(|number| open.contains(number));
                prop_assert!(still, "the alert of step {} is taken for over", step);
            }
        }
        real.tell();
        real.telling = real.damper.all();
        real.tell();
        prop_assert!(!real.damper.is_busy());
        prop_assert_eq!(real.subjects(), model.subjects());
    }
}
