//! Events: facts worth telling, numbered without a hole, durable, bounded, acknowledged.
//!
//! Words: an event's *object* is what it is about (`vm/<uuid>`, `host`, `job/17`); its *type* is one of the
//! [`catalogue`]; an *alert* is one of severity warning or above, open until it is acknowledged; a *gap* says which numbers
//! are no longer kept, so that a reader who comes late learns what it missed instead of missing it silently; a
//! [`Token`] is a place to go on from that also tells whether the numbers are still those of the same store.
//!
//! The number is given by the store when the transaction that holds the event is committed; an event that goes
//! with a change (a VM's record, a job's end) is in the same transaction as the change. Readers wait on the
//! table's sequence, and are never shown what a crash could still take back. Delivery to a manager reads here by number,
//! from the last it has taken.
//!
//! ```text
//! publish ---> damper (families that flap; the rest passes) ---> log <--- transactions of jobs
//!                 |  calm again: event.flapping                   |
//!                 +----------------------------------------------->  keeper: follows by number, clears alerts,
//!                                                                   prunes beyond twice the bound
//! ```

pub mod catalogue;
mod clearing;
mod damper;
#[cfg(test)]
mod damping_tests;
mod journal;
mod keeper;
mod log;
#[cfg(test)]
mod reference;
mod token;

pub use catalogue::{Kind, kind};
pub use clearing::OpenAlert;
pub use journal::journal;
pub use keeper::run;
pub use log::{Log, TABLE};
pub use token::Token;

use crate::model::{EventNumber, JobId, Timestamp, trace};
use crate::store::Txn;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Info,
    Warning,
    Error,
    Critical,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Info, Self::Warning, Self::Error, Self::Critical].into_iter().find(|s| s.as_str() == text)
    }
}

/// Who acknowledged an event, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledgement {
    pub by: String,
    pub at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(clippy::manual_non_exhaustive, reason = "`non_exhaustive` would not hold within the crate")]
pub struct Event {
    pub time: Timestamp,
    /// Stable and dotted: `vm.crashed`, `job.failed`. Of the catalogue, if this release wrote it.
    #[serde(rename = "type")]
    pub kind: String,
    pub severity: Severity,
    pub object: String,
    /// For people. No secrets.
    pub text: String,
    pub job: Option<JobId>,
    /// The traceparent of the request that it was done for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Facts for programs, by name.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub data: serde_json::Map<String, serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged: Option<Acknowledgement>,
    /// Only [`Event::new`] makes one, and it takes a [`Kind`].
    #[serde(skip)]
    made: (),
}

impl Event {
    /// With the severity that the catalogue says.
    pub fn new(kind: Kind, object: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            time: Timestamp::now(),
            kind: kind.as_str().to_owned(),
            severity: kind.entry().severity,
            object: object.into(),
            text: text.into(),
            job: None,
            trace: trace::current().map(|trace| trace.to_string()),
            data: serde_json::Map::new(),
            acknowledged: None,
            made: (),
        }
    }

    /// For a type of which some events are worse than others; the catalogue tells which.
    #[must_use]
    pub fn with_severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }

    #[must_use]
    pub fn with_job(mut self, job: JobId) -> Self {
        self.job = Some(job);
        self
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.data.insert(name.to_owned(), value.into());
        self
    }

    /// What of its object it is about, if not all of it: one address of a link.
    fn part(&self) -> Option<&str> {
        catalogue::find(&self.kind)?.part_of(&self.data)
    }

    /// Adds the event to a transaction; it gets its number when that is committed.
    pub fn append_to(&self, txn: &mut Txn) {
        txn.append(&log::EVENTS, self);
    }
}

/// What a reader wants.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Only events after this number.
    pub since: EventNumber,
    pub severity: Option<Severity>,
    pub object: Option<String>,
    pub unacknowledged: bool,
    pub limit: usize,
}

/// Numbers that were asked for and are not kept any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    pub from: EventNumber,
    pub to: EventNumber,
}

#[derive(Debug, Clone, Default)]
pub struct Page {
    pub events: Vec<(EventNumber, Event)>,
    /// Ask for what comes after this next. At least the number of the last event looked at, even if it did not
    /// match.
    pub last: EventNumber,
    pub gap: Option<Gap>,
}

impl Query {
    fn matches(&self, event: &Event) -> bool {
        self.severity.is_none_or(|s| event.severity >= s)
            && self.object.as_ref().is_none_or(|o| event.object == *o)
            && (!self.unacknowledged || event.acknowledged.is_none())
    }
}

impl Page {
    /// Numbers up to `to` are gone. `false`: that belongs in front of the next page, since this one has events.
    fn miss(&mut self, to: EventNumber) -> bool {
        if !self.events.is_empty() {
            return false;
        }
        let from = self.gap.map_or(EventNumber(self.last.0 + 1), |gap| gap.from);
        self.gap = Some(Gap { from, to });
        self.last = to;
        true
    }
}
