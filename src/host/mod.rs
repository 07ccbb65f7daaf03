//! The host as a domain: what it is called, who owns it, what it may show.
//!
//! Words: the *record* is what we keep of the host; its *owner* is the manager that took ownership, and until
//! one did the host is *unowned*; the *unique id* is the machine's UUID in the dialect's writing; a *role*
//! says what the host is for in a pool.
//!
//! Pure but for `certificate`, which reads and writes its four files: operations decide when a record is
//! stored, and by which verb it is changed. This room knows no verb, starts nothing and logs no secret.

pub mod certificate;
pub mod ownership;
pub mod password;
pub mod peer;
pub mod record;
pub mod support;
mod x509;

pub use ownership::{ManagerId, ManagerUrl, Ownership, OwnershipError};
pub use peer::{PEERS, Peer, PeerAddress};
pub use record::{HOST, HOST_KEY, HostId, HostRecord, Roles, parse_roles};
pub use x509::X509Error;
