//! Delivery to the manager that owns the host: events and statistics, each as a *stream* of numbered items, by HTTPS
//! POST with our certificate, to whoever shows the certificate that was pinned when ownership was taken.
//!
//! Words: an *item* is an event, or what one sweep of statistics has found; its *number* orders it in its stream (an
//! event's own number; the time of a sample in ms since 1970); a *batch* is what one POST carries; the *cursor* is the
//! number of the last item that the manager took, that is answered with 2xx, and is on disk; a *gap* is a range of
//! numbers that could not be kept so long, told by one record in their place; the *form* is how a batch is written
//! ([`cloudevents`]; a manager's own would be another file beside it).
//!
//! ```text
//!   unset ──ownership with a URL──► idle ⇄ sending ──2xx──► cursor moves
//!                                     ▲        │ anything else
//!                                     └─ waits ┘ 0.5 to 60 s, longer each time; the same items again
//! ```
//!
//! At least once and in order: an item is sent again until it was taken, and nothing behind it is sent before. After a
//! death some may come twice, with the same id. What waits lies in the event log (events) or in an [`Outbox`] (statistics),
//! both bounded; nothing else grows while a manager is away. Each stream has its own task and its own connection, so that
//! neither waits for the other; and no job, event or sample ever waits for either.
//!
//! What this room does not do: it knows no ownership record (the composition root hands over a [`Target`]), decides
//! nothing about events, and forgets nothing by itself.

pub mod cloudevents;
mod cursor;
mod deliveries;
mod events;
mod pace;
mod runner;
mod samples;
mod source;
mod target;
#[cfg(test)]
mod tests;

pub use cursor::Cursor;
pub use deliveries::{Carrier, Connect, Deliveries, Parts, Probe, RealConnect};
pub use events::EventSource;
pub use runner::{State, Status};
pub use samples::{Outbox, SampleSource, time_of as sample_time};
pub use source::{Batch, Gap, Limit, Source, Stream};
pub use target::{Place, Target, TargetError, Wanted};
