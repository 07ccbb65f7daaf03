//! The dialect's XML documents, made of facts: pure, no I/O.
//!
//! Names, order and writing of the elements are those of the dialect's own answers (`tests/fixtures`), since clients
//! look values up by element name and compare them as text: booleans are `True`/`False` (but
//! `Is_Current_Master` is `true`/`false`), ids are hex with colons. What we tell beyond the dialect stands
//! behind what it knows. Text that XML cannot hold is left out, the rest escaped.

mod hardware;
mod network;
mod server;
mod xml;

pub use hardware::{HardwareDocument, discover_hardware};
pub use network::NetworkDocument;
pub use server::{CAPABILITIES, Capability, ServerDocument, discover_server};
