//! The network as it should be, and how to get there. Pure: no clock, no I/O.
//!
//! Words: what is *declared* ([`Desired`]) is ours to manage, all else is left alone; the *aim* is what the kernel has when
//! a declaration is carried out on what it has now; a *plan* is the changes from one view to another; the *scope* is the
//! links and routes that a change touches, and that its rollback restores.
//!
//! `operation` reads the kernel, has the changes done and reads again; nothing here does.

pub mod aim;
pub mod ask;
pub mod desired;
pub mod diagram;
mod order;
pub mod plan;
pub mod problem;
mod read;
pub mod scope;
pub mod settled;
pub mod validate;
pub mod watching;
mod way_in;
pub mod ways;

pub use aim::aim;
pub use desired::{Desired, DesiredLink, LogicalNetwork, Role, VirtualIp};
pub use diagram::diagram;
pub use plan::plan;
pub use problem::Problem;
pub use scope::{Difference, Scope, back, differences, is_there};
pub use validate::validate;
pub use watching::{Observation, Watching};
pub use way_in::way_in;
pub use ways::{Management, Way, cuts_all, cuts_management};

#[cfg(test)]
mod ask_tests;
#[cfg(test)]
mod diagram_tests;
#[cfg(test)]
mod made_up;
#[cfg(test)]
mod plan_tests;
#[cfg(test)]
mod read_tests;
#[cfg(test)]
mod validate_tests;
#[cfg(test)]
mod watching_tests;
