//! Statistics: what the host and its domains do, sampled together and kept for a year.
//!
//! Words: a *metric* is one kind of figure, with its unit, its source and its resolution ([`metric`] has the table of
//! all); a *figure* is a metric's value for one *object* (the host, dom0, a VM), and where there are several of a kind
//! for one *instance* (a vif, a disk, a CPU); a *sweep* is all figures of all objects read at one moment, one reading
//! a source and no process a domain; a *series* is the history of one figure.
//!
//! The [`Sampler`] asks the drivers and makes a sweep of what they tell ([`assemble`]); it publishes the latest and keeps
//! none before it.
//!
//! Counters are kept in a sweep as their sources count; what a series keeps of them is their rate a second.
//!
//! What a guest writes into XenStore is the guest's word: it is read within bounds, checked, and changes only that
//! guest's own figures.

pub mod assemble;
pub mod history;
pub mod meter;
pub mod metric;
pub mod query;
mod recent;
mod ring;
pub mod sampler;
mod series;
pub mod sweep;
pub use assemble::Roster;
pub use history::History;
pub use metric::{METRICS, Metric, MetricId};
pub use query::{Answer, QueryError, Question};
pub use sampler::{Counts, Sampler, Sources};
pub use series::SeriesKey;
pub use sweep::{Figure, Object, ObjectFigures, Sweep};
