//! The simulated data centre: a small Xen on a made-up machine, which no request can lead out of.
//!
//! Words: the *world* is one simulated host with its domains; a *guest* is what runs in a domain, and its
//! *behaviour* says how it answers; a *rule* of the *script* makes a kind of request fail, wait, or lose its
//! answer; the *audit* is what the world itself counted, for tests to compare with what the daemon believes.
//!
//! ```text
//!  drivers (floor 1) ── Handle ──┬── in process:  Engine ── World      tests in virtual time
//!                                └── remote: Unix socket ── process::serve ── Engine ── World
//! ```
//!
//! [`World`] is a pure state machine: time is passed in, files are somebody else's. [`Engine`] owns it, gives it
//! tokio's time, writes and reads saved domains, obeys the script, and tells observers. [`Handle`] is what the
//! drivers hold; each call through it ends by its deadline. [`process`] runs an engine behind a socket, so that
//! the domains outlive the daemon, as they do in life.
//!
//! What this room does not do: it knows no driver trait and no VM record; what a domain is built from is
//! opaque to it but for the few numbers it must count ([`Spec`]). It touches no file but those that a request
//! names and the socket's neighbours, and it can neither reboot nor re-clock the machine it runs on.

mod audit;
mod behaviour;
mod bell;
mod domain;
mod engine;
mod figures;
mod frame;
mod handle;
mod host;
mod image;
mod life;
mod network;
pub mod process;
mod remote;
mod request;
mod script;
mod server;
#[cfg(test)]
mod tests;
mod traffic;
mod world;

pub use audit::{Audit, Effect};
pub use behaviour::{Behaviour, EndsByItself};
pub use engine::Engine;
pub use figures::{DiskTraffic, GuestMemory, HostFigures, HypervisorView, LinkCounters, UsageView, Vbd};
pub use handle::Handle;
pub use host::{HostView, Link, Ntp, Zone};
pub use request::{
    Answer, Device, Display, DomainView, Image, Kind, Observation, Reason, Request, Spec, State, Trigger,
    WorldError,
};
pub use script::{Fate, Rule};
pub use world::{Options, World};

/// Result of a request to the world.
pub type Result<T> = std::result::Result<T, WorldError>;
