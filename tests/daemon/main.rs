//! The daemon as a process: real sockets, real TLS, a real disk, and the simulated world beside it, which lives
//! on when the daemon is killed.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a failure shall stop them")]
#![allow(clippy::print_stdout, reason = "figures for whoever runs the tests with --nocapture")]

mod adoption;
mod calls;
mod crash;
mod crash_cases;
mod crowd;
mod events;
mod history;
mod hostile;
mod manager;
mod migrate;
mod migrate_faults;
mod pair;
mod receiver;
mod secrets;
mod stop;
mod store;
mod support;
mod trace;
