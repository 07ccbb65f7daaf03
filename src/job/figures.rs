//! What monitoring asks of the engine: jobs now open, jobs ended in this life by verb, and who waits for locks.

use super::engine::{Engine, guard};
use super::record::{JobRecord, JobState};
use crate::model::Timestamp;
use crate::model::histogram::{Counted, Histogram, JOB_BOUNDS};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

/// Verbs are those of the table and a few kinds of our own work; more than this would be a mistake, and are counted
/// together.
const MAX_VERBS: usize = 512;
const OTHERS: &str = "other";

/// Jobs that have ended in this life, by verb.
#[derive(Default)]
pub(super) struct Tally(Mutex<BTreeMap<String, OfVerb>>);

struct OfVerb {
    succeeded: u64,
    failed: u64,
    cancelled: u64,
    /// From acceptance to the end.
    took: Histogram,
}

/// Jobs of one verb that have ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    pub verb: String,
    pub succeeded: u64,
    pub failed: u64,
    pub cancelled: u64,
    pub took: Counted,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Figures {
    pub queued: u64,
    pub running: u64,
    pub undoing: u64,
    pub ended: Vec<Ended>,
    pub locks_held: u64,
    pub locks_waiting: u64,
    /// How long the first of those that wait for a lock has waited.
    pub oldest_wait: Option<Duration>,
}

impl Tally {
    pub fn ended(&self, job: &JobRecord) {
        let mut verbs = guard(&self.0);
        let full = verbs.len() >= MAX_VERBS && !verbs.contains_key(&job.verb);
        let verb = if full { OTHERS } else { &job.verb };
        let of = verbs.entry(verb.to_owned()).or_insert_with(|| OfVerb {
            succeeded: 0,
            failed: 0,
            cancelled: 0,
            took: Histogram::new(JOB_BOUNDS),
        });
        match job.state {
            JobState::Succeeded => of.succeeded += 1,
            JobState::Cancelled => of.cancelled += 1,
            _ => of.failed += 1,
        }
        let ended = job.ended.unwrap_or(job.created);
        of.took.observe(between(job.created, ended));
    }

    fn all(&self) -> Vec<Ended> {
        let verbs = guard(&self.0);
        let ended = |(verb, of): (&String, &OfVerb)| Ended {
            verb: verb.clone(),
            succeeded: of.succeeded,
            failed: of.failed,
            cancelled: of.cancelled,
            took: of.took.counted(),
        };
        verbs.iter().map(ended).collect()
    }
}

fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::from_millis(to.0.saturating_sub(from.0))
}

impl Engine {
    /// Holds the engine's mutex only while it notes which jobs there are.
    pub fn figures(&self) -> Figures {
        let (open, (held, waiting)) = {
            let state = self.state();
            let waits = |id| !state.locks.holds(id);
            let open: Vec<_> = state.open.iter().map(|(id, open)| (open.clone(), waits(*id))).collect();
            (open, state.locks.counts())
        };
        let mut figures = Figures {
            ended: self.0.tally.all(),
            locks_held: held as u64,
            locks_waiting: waiting as u64,
            ..Figures::default()
        };
        let now = Timestamp::now();
        for (job, waits) in open {
            let record = job.record.borrow();
            match record.state {
                JobState::Queued => figures.queued += 1,
                JobState::Undoing => figures.undoing += 1,
                _ => figures.running += 1,
            }
            // A child has no claims of its own: it runs under its parent's.
            if waits && record.state == JobState::Queued && record.parent.is_none() {
                figures.oldest_wait = figures.oldest_wait.max(Some(between(record.created, now)));
            }
        }
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_verbs_that_nobody_knows_is_counted_together() {
        let tally = Tally::default();
        for n in 0..2 * MAX_VERBS {
            tally.ended(&record(&format!("verb{n}")));
        }
        let all = tally.all();
        assert_eq!(all.len(), MAX_VERBS + 1);
        let others = all.iter().find(|ended| ended.verb == OTHERS).unwrap();
        assert_eq!(others.failed, MAX_VERBS as u64);
    }

    fn record(verb: &str) -> JobRecord {
        JobRecord {
            id: crate::model::JobId(1),
            verb: verb.to_owned(),
            about: String::new(),
            caller: String::new(),
            params: serde_json::Value::Null,
            locks: Vec::new(),
            state: JobState::Failed,
            steps: Vec::new(),
            created: Timestamp(1),
            started: None,
            ended: None,
            deadline: Timestamp(2),
            parent: None,
            trace: None,
            children: Vec::new(),
            idempotency_key: None,
            recurring: None,
            cancel: None,
            fault: None,
            result: None,
            progress: 0,
        }
    }
}
