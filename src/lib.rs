//! dom0d turns a plain Xen host into a managed one.
//!
//! The house has floors; imports run down only, and rooms of one floor do not import each other
//! (`tests/architecture.rs` holds this):
//!
//! ```text
//! 6  main.rs  bin/dom0ctl.rs  agent      entrances and the composition root, the only room that knows every room
//!    ctl  logging                        dom0ctl's commands (a client: knows wire, never api); the daemon's log
//! 5  api                                 the verb table: names, typed parameters, roles -> a read, or a job
//!    metrics                             what monitoring reads, on a listener of its own
//! 4  operation                           plans made of serialised steps, and the executor that runs each kind
//! 3  vm  host  network                   the domains: pure machines and planners, and their records
//!    manager                             delivers events and statistics to the manager
//! 2  job  event  stats  wire             the engine, the numbered events, the figures and their history, XML-RPC over TLS
//! 1  xen  kernel  machine                drivers: a trait per world, each with a real and a simulated body
//! 0  model  store  config  sim           types that cannot be wrong, the store, settings, the simulated world
//! ```

pub mod agent;
pub mod api;
pub mod config;
pub mod ctl;
pub mod event;
pub mod host;
pub mod job;
pub mod kernel;
pub mod logging;
pub mod machine;
pub mod manager;
pub mod metrics;
pub mod model;
pub mod network;
pub mod operation;
pub mod sim;
pub mod stats;
pub mod store;
pub mod vm;
pub mod wire;
pub mod xen;
