//! The engine's rules, in virtual time, with an executor that does what a step's data tells it.

mod accepting;
mod children;
mod crashing;
mod ending;
mod figures;
mod recurring;
mod running;
mod support;
