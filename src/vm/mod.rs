//! VMs: what each should be (its record), what it is (its domain as last seen), and what may be done with it
//! in which state.
//!
//! Words: a *VM* exists while off; its *domain* is the running instance. The *intent* is what we want of it
//! (on, off, saved); the *state* is what it is, made of the intent and of the domain as last seen. The world
//! wins for what is, the record for what should be.
//!
//! Who owns what: [`Registry`] holds all records and observations in memory, as the store and the toolstack
//! last said; only `operation` changes it, after the store has committed. Decisions that change the world are
//! made on a domain read freshly, never on the registry's copy.
//!
//! Nothing here does I/O, and nothing reads a clock.

pub mod adopt;
mod machine;
pub mod migration;
mod record;
mod registry;

pub use machine::{Action, Refusal, VmState, allowed, allowed_states, state_of};
pub use record::{Autostart, CoreDump, EndCause, Intent, KeptText, KeptValue, Leaving, VMS, VmRecord};
pub use registry::{Change, ObservedDomain, Registry, Vm};
