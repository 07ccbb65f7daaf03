//! What monitoring reads: the daemon's, the host's and the domains' figures as OpenMetrics text, on a listener of its own.
//!
//! Words: a *family* is one kind of figure with its labels ([`table`] has all), a *sample* one value of it; a *scrape* is
//! one reading of all of them by monitoring.
//!
//! Nothing is asked of a driver and nothing is waited for at a scrape: what is told was read before by whoever needs it, and
//! is taken from memory on a thread that may block, so that no call is delayed by monitoring. The listener is plain HTTP
//! without credentials and shows nothing that a viewer may not know; by its settings it listens to this machine alone.
//!
//! Who owns what: the composition root brings the figures together ([`Source`]), `render` writes them by the table into an
//! [`exposition`], `listen` serves that within its bounds. What the room does not do: keep history, decide what is an
//! alert (`docs/alerts.yml` is for Prometheus), or know what a call is for.

mod exposition;
pub mod lag;
mod listen;
pub mod process;
#[cfg(test)]
mod reference;
mod render;
pub mod table;

pub use exposition::Form;
pub use listen::{ListenError, bind, serve};
pub use render::{Own, render};

use crate::model::histogram::{Called, Counted};
use crate::stats::Sweep;
use crate::{job, kernel, store};
use std::sync::Arc;
use std::time::Duration;

/// Where the figures of one scrape come from. Called on a thread that may block, and must not take long all the same.
pub trait Source: Send + Sync + 'static {
    fn figures(&self) -> Figures;
}

/// All that one scrape tells.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The newest sweep; `None` before the first.
    pub sweep: Option<Arc<Sweep>>,
    /// VMs by state.
    pub vms: Vec<(&'static str, u64)>,
    pub jobs: job::Figures,
    pub events: EventCounts,
    pub delivery: Vec<Delivery>,
    pub calls: Vec<Called>,
    pub wire: Wire,
    pub store: store::Figures,
    /// What the store's folder takes.
    pub store_bytes: Option<u64>,
    pub kernel: Option<kernel::Figures>,
    pub lag: Lag,
    pub process: process::Figures,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct EventCounts {
    pub last_number: u64,
    pub kept: Option<u64>,
    /// By severity: events that tell of something wrong, not cleared and not acknowledged.
    pub open: Vec<(&'static str, u64)>,
}

/// One of the streams that go to the manager.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delivery {
    pub stream: &'static str,
    /// The last number that the manager has taken.
    pub last_number: u64,
    /// How many there are that it has not.
    pub behind: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Since the last batch was taken or, if none was, since delivery began; zero while nothing waits. `None`: not known.
    pub since_ok: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Wire {
    pub open: u64,
    pub connections: u64,
    pub refused: u64,
    pub timeouts: u64,
    pub unauthorized: u64,
    pub calls: u64,
    pub faults: u64,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lag {
    pub late: Counted,
    pub max: Duration,
}
