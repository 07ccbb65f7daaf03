//! Events that come and go faster than anybody can read. Pure: the time comes in.
//!
//! Words: a *run* is what one object's events of one family (links, addresses: the catalogue's `damped as`) do from the
//! first of them on, or those of one address of it; the first few of a run *pass*, further ones are *held back* and counted.
//! When it is calm again, or after ten minutes, one event tells how many there were and how things stand: the last one
//! held back is told whole, so the last state is never lost, only told late. What was held back would have cleared alerts
//! then, and not those that came between it and its telling: so its *place* is told too, the newest event's number when it
//! was held back, and which one it was behind that number.
//!
//! It holds back in memory only. What was held back when the agent is killed is told nowhere; an orderly stop tells it.

use super::{Event, kind};
use crate::model::EventNumber;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use tokio::time::Instant;

/// So many pass within [`WINDOW`].
pub const PASS: u32 = 5;
pub const WINDOW: Duration = Duration::from_secs(60);
/// It is calm when nothing has come for so long.
pub const CALM: Duration = Duration::from_secs(10);
/// What never calms down is told after so long, and held back anew.
pub const LONGEST: Duration = Duration::from_secs(600);
/// Runs that are remembered. What more there are pass.
pub const MAX_RUNS: usize = 4096;

/// The family, the object, and what of it.
pub type Key = (&'static str, String, Option<String>);

/// Where something that was held back stands among the events: behind this one, as this one of those held back.
pub type Place = (EventNumber, u64);

#[derive(Debug, Default)]
pub struct Damper {
    runs: HashMap<Key, Run>,
    /// How many were ever held back.
    held_back: u64,
}

#[derive(Debug)]
struct Run {
    began: Instant,
    passed: u32,
    held: Option<Held>,
    /// What is being written at the moment, and is not yet.
    telling: Option<Held>,
}

#[derive(Debug, Clone)]
struct Held {
    first: Instant,
    last: Instant,
    counts: BTreeMap<String, u64>,
    /// By type, of the last one.
    after: BTreeMap<String, Place>,
    from: crate::model::Timestamp,
    event: Event,
}

impl Damper {
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether this event passes. One that does not is held back, behind the newest there is.
    pub fn take(&mut self, family: &'static str, event: &Event, newest: EventNumber, now: Instant) -> bool {
        let key = (family, event.object.clone(), event.part().map(str::to_owned));
        if !self.runs.contains_key(&key) {
            self.make_room(now);
            if self.runs.len() < MAX_RUNS {
                self.runs.insert(key, Run { began: now, passed: 1, held: None, telling: None });
            }
            return true;
        }
        let Some(run) = self.runs.get_mut(&key) else { return true };
        if run.held.is_none() && run.telling.is_none() {
            if now.saturating_duration_since(run.began) >= WINDOW {
                (run.began, run.passed) = (now, 0);
            }
            if run.passed < PASS {
                run.passed += 1;
                return true;
            }
        }
        self.held_back += 1;
        run.hold(event, (newest, self.held_back), now);
        false
    }

    /// Whether something is held back, or being told.
    pub fn is_busy(&self) -> bool {
        self.runs.values().any(|run| run.held.is_some() || run.telling.is_some())
    }

    /// When there is something to tell next.
    pub fn next_due(&self) -> Option<Instant> {
        self.runs.values().filter_map(Run::due).min()
    }

    /// What is to be told now, the last held back last. Each is in the making until [`Damper::told`] or
    /// [`Damper::failed`]: what comes meanwhile must not overtake it.
    pub fn due(&mut self, now: Instant) -> Vec<(Key, Event)> {
        self.tell(|run| run.due().is_some_and(|due| due <= now))
    }

    /// All that is held back, due or not.
    pub fn all(&mut self) -> Vec<(Key, Event)> {
        self.tell(|_| true)
    }

    fn tell(&mut self, is_due: impl Fn(&Run) -> bool) -> Vec<(Key, Event)> {
        let mut told = Vec::new();
        for (key, run) in &mut self.runs {
            if run.telling.is_none()
                && is_due(run)
                && let Some(held) = run.held.take()
            {
                told.push((held.last, key.clone(), held.summary()));
                run.telling = Some(held);
            }
        }
        told.sort_by_key(|(last, ..)| *last);
        told.into_iter().map(|(_, key, event)| (key, event)).collect()
    }

    /// It is written: a run to which nothing was added meanwhile is over.
    pub fn told(&mut self, key: &Key) {
        if let Some(run) = self.runs.get_mut(key) {
            run.telling = None;
            if run.held.is_none() {
                self.runs.remove(key);
            }
        }
    }

    /// It could not be written, and is to be told again.
    pub fn failed(&mut self, key: &Key) {
        let Some(run) = self.runs.get_mut(key) else { return };
        let Some(before) = run.telling.take() else { return };
        run.held = Some(match run.held.take() {
            None => before,
            Some(later) => before.then(later),
        });
    }

    /// Runs of which nothing is held back and whose window is over would pass the next event anyway.
    fn make_room(&mut self, now: Instant) {
        if self.runs.len() >= MAX_RUNS {
            self.runs.retain(|_, run| {
                let idle = run.held.is_none() && run.telling.is_none();
                !(idle && now.saturating_duration_since(run.began) >= WINDOW)
            });
        }
    }
}

impl Run {
    fn hold(&mut self, event: &Event, place: Place, now: Instant) {
        let kind = event.kind.clone();
        let held = self.held.get_or_insert_with(|| Held {
            first: now,
            last: now,
            counts: BTreeMap::new(),
            after: BTreeMap::new(),
            from: event.time,
            event: event.clone(),
        });
        held.last = now;
        held.after.insert(kind.clone(), place);
        *held.counts.entry(kind).or_default() += 1;
        held.event = event.clone();
    }

    fn due(&self) -> Option<Instant> {
        let held = self.held.as_ref().filter(|_| self.telling.is_none())?;
        Some((self.began + WINDOW).max(held.last + CALM).min(held.first + LONGEST))
    }
}

impl Held {
    fn then(mut self, later: Self) -> Self {
        later.counts.into_iter().for_each(|(kind, count)| *self.counts.entry(kind).or_default() += count);
        self.after.extend(later.after);
        (self.last, self.event) = (later.last, later.event);
        self
    }

    fn summary(&self) -> Event {
        let last = &self.event;
        let count: u64 = self.counts.values().sum();
        let text = format!(
            "{count} events of {} came too quickly and were held back; the last: {}",
            last.object, last.text
        );
        let mut event = Event::new(kind::EVENT_FLAPPING, last.object.clone(), text)
            .with_severity(last.severity)
            .with("type", last.kind.clone())
            .with("severity", last.severity.as_str())
            .with("count", count)
            .with("counts", json!(self.counts))
            .with("after", json!(self.after))
            .with("from", self.from.to_string())
            .with("to", last.time.to_string())
            .with("text", last.text.clone())
            .with("data", json!(last.data));
        event.job = last.job;
        event
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Severity;
    use crate::event::catalogue::Kind;
    use proptest::prelude::*;

    const S: Duration = Duration::from_secs(1);

    fn event(kind: Kind, object: &str, text: &str) -> Event {
        Event::new(kind, object, text).with("n", text.to_owned())
    }

    fn link(text: &str) -> Event {
        event(kind::NETWORK_LINK_CHANGED, "network/eth0", text)
    }

    fn texts(told: &[(Key, Event)]) -> Vec<String> {
        told.iter().map(|(_, event)| event.data["text"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_first_few_pass_the_rest_is_counted_and_the_last_is_told_when_the_window_ends() {
        let (mut damper, t0) = (Damper::new(), Instant::now());
        for n in 0..20u32 {
            let passes = damper.take("link", &link(&n.to_string()), EventNumber(0), t0 + n * S);
            assert_eq!(passes, n < PASS, "{n}");
        }
        assert_eq!(damper.next_due(), Some(t0 + WINDOW));
        assert!(damper.due(t0 + WINDOW - S).is_empty());
        let told = damper.due(t0 + WINDOW);
        let data = &told[0].1.data;
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].1.kind, kind::EVENT_FLAPPING);
        assert_eq!(told[0].1.object, "network/eth0");
        assert_eq!(
            (&data["count"], &data["text"], &data["type"]),
            (&json!(15), &json!("19"), &json!("network.link_changed"))
        );
        assert_eq!(data["data"], json!({ "n": "19" }));
        damper.told(&told[0].0);
        assert!(damper.runs.is_empty() && damper.next_due().is_none());
        assert!(damper.take("link", &link("anew"), EventNumber(0), t0 + WINDOW + S));
    }

    #[test]
    fn slow_events_all_pass() {
        let (mut damper, t0) = (Damper::new(), Instant::now());
        assert!((0..50u32).all(|n| damper.take("link", &link("x"), EventNumber(0), t0 + n * 13 * S)));
        assert!(damper.due(t0 + 3600 * S).is_empty());
    }

    #[test]
    fn what_is_not_calm_at_the_windows_end_is_told_when_it_is_or_after_ten_minutes() {
        let (mut damper, t0) = (Damper::new(), Instant::now());
        for n in 0..=80u32 {
            damper.take("link", &link(&n.to_string()), EventNumber(0), t0 + n * S);
        }
        assert_eq!(damper.next_due(), Some(t0 + 80 * S + CALM));
        let mut told = 0;
        for n in 81..2000u32 {
            damper.take("link", &link(&n.to_string()), EventNumber(0), t0 + n * S);
            for (key, _) in damper.due(t0 + n * S) {
                damper.told(&key);
                told += 1;
            }
        }
        assert_eq!(told, 3, "every ten minutes");
    }

    #[test]
    fn types_of_one_family_are_damped_together_and_the_last_state_is_the_one_that_is_told() {
        let (mut damper, t0) = (Damper::new(), Instant::now());
        let (gone, come) = (kind::NETWORK_ADDRESS_REMOVED, kind::NETWORK_ADDRESS_ADDED);
        for n in 0..15u32 {
            let kind = if n % 2 == 0 { gone } else { come };
            damper.take("address", &event(kind, "network/eth0", &n.to_string()), EventNumber(0), t0 + n * S);
            assert!(damper.take(
                "address",
                &event(kind, &format!("network/{n}"), "another"),
                EventNumber(0),
                t0 + n * S
            ));
        }
        let told = damper.due(t0 + WINDOW);
        assert_eq!(texts(&told), ["14"]);
        assert_eq!(told[0].1.severity, Severity::Warning);
        assert_eq!(
            told[0].1.data["counts"],
            json!({ "network.address_added": 5, "network.address_removed": 5 })
        );
    }

    #[test]
    fn nothing_overtakes_what_is_being_told_and_what_could_not_be_told_is_told_again() {
        let (mut damper, t0) = (Damper::new(), Instant::now());
        for n in 0..7 {
            damper.take("link", &link(&n.to_string()), EventNumber(0), t0);
        }
        let told = damper.due(t0 + WINDOW);
        assert_eq!(texts(&told), ["6"]);
        assert!(!damper.take("link", &link("7"), EventNumber(0), t0 + WINDOW), "while it is being told");
        assert!(damper.due(t0 + 2 * WINDOW).is_empty() && damper.all().is_empty(), "told once at a time");
        damper.failed(&told[0].0);
        let told = damper.due(t0 + 2 * WINDOW);
        assert_eq!((texts(&told), &told[0].1.data["count"]), (vec!["7".to_owned()], &json!(3)));
        assert!(!damper.take("link", &link("8"), EventNumber(0), t0 + 2 * WINDOW));
        damper.told(&told[0].0);
        let told = damper.all();
        assert_eq!((texts(&told), &told[0].1.data["count"]), (vec!["8".to_owned()], &json!(1)));
        damper.told(&told[0].0);
        assert!(damper.runs.is_empty());
    }

    #[test]
    fn objects_beyond_the_bound_pass_and_quiet_ones_make_room() {
        let (mut damper, t0) = (Damper::new(), Instant::now());
        for n in 0..MAX_RUNS + 10 {
            assert!(damper.take(
                "link",
                &event(kind::NETWORK_LINK_ADDED, &format!("network/{n}"), ""),
                EventNumber(0),
                t0
            ));
        }
        assert_eq!(damper.runs.len(), MAX_RUNS);
        let late = event(kind::NETWORK_LINK_ADDED, "network/late", "");
        assert!((0..20).all(|_| damper.take("link", &late, EventNumber(0), t0 + S)));
        assert_eq!(
            (0..20).filter(|_| damper.take("link", &late, EventNumber(0), t0 + WINDOW)).count(),
            PASS as usize
        );
    }

    proptest! {
        /// Whatever comes whenever: nothing is lost from the count, and in the order of telling the last one told of an
        /// object is the last that came of it.
        #[test]
        fn every_event_passes_or_is_counted_and_the_last_state_is_told_last(
            steps in prop::collection::vec((0u64..40_000, 0u8..2, any::<bool>()), 1..200),
        ) {
            let (mut damper, mut now) = (Damper::new(), Instant::now());
            let mut told: Vec<(String, String, u64)> = Vec::new();
            let mut came: Vec<(String, String)> = Vec::new();
            let write = |told: &mut Vec<(String, String, u64)>, damper: &mut Damper, due: Vec<(Key, Event)>| {
                for (key, event) in due {
                    let text = event.data["text"].as_str().unwrap().to_owned();
                    told.push((event.object, text, event.data["count"].as_u64().unwrap()));
                    damper.told(&key);
                }
            };
            for (n, (pause_ms, object, gone)) in steps.into_iter().enumerate() {
                now += Duration::from_millis(pause_ms);
                let due = damper.due(now);
                write(&mut told, &mut damper, due);
                let kind = if gone { kind::NETWORK_LINK_REMOVED } else { kind::NETWORK_LINK_ADDED };
                let one = event(kind, &format!("network/{object}"), &n.to_string());
                came.push((one.object.clone(), one.text.clone()));
                if damper.take("link", &one, EventNumber(0), now) {
                    told.push((one.object, one.text, 1));
                }
            }
            let due = damper.all();
            write(&mut told, &mut damper, due);
            prop_assert!(damper.next_due().is_none());
            prop_assert_eq!(told.iter().map(|(.., count)| *count).sum::<u64>(), came.len() as u64);
            for object in ["network/0", "network/1"] {
                let last_came = came.iter().rfind(|(o, _)| o == object).map(|(_, text)| text);
                let last_told = told.iter().rfind(|(o, ..)| o == object).map(|(_, text, _)| text);
                prop_assert_eq!(last_came, last_told);
            }
        }
    }
}
