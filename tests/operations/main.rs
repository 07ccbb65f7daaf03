//! Operations, engine and the simulated world joined as the daemon joins them, in one process and in virtual
//! time: every verb crashed at every commit, restarts of the agent and of the host, faults by script, guests with a will of their own, and a crowd of
//! clients at once.
#![allow(clippy::unwrap_used, reason = "a test: a failure shall stop it")]

mod adoption;
mod alerts;
mod crash;
mod crowd;
mod faults;
mod faulty;
mod guests;
mod house;
mod late;
mod mortal;
mod network;
mod network_boot;
mod network_death;
mod network_real;
