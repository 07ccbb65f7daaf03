//! The body without Xen: a fake xl (a script of this folder's own, run by its argument vector) that behaves as badly
//! as a real one can, and a XenStore in memory.

mod calls;
mod config;
pub(super) mod fake;
