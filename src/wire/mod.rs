//! XML-RPC over HTTP/1.1 over TLS, plain TCP, or the operator's Unix socket: bytes to [`Call`], [`Answer`] to
//! bytes, who is calling, and every limit that holds before we know who it is. Knows no verb.
//!
//! Words: a *call* is one `<methodCall>` from an authenticated *caller*; an *answer* is what goes back, a value
//! or a fault; an *encoded* value is the bytes of a `<value>` element made earlier and sent as they are; the
//! *gate* says who may come in, by the *policy* that holds now; a *watch* is the deadline of what a connection is
//! doing.
//!
//! ```text
//!  listen, activation ─> server ─> tls ─> watch (deadlines) ─> http ─> auth (gate) ─> decode ─> Handler ─> encode
//! ```
//!
//! One task per listener and one per connection, which owns all of that connection; a handler runs in its
//! connection's task. A caller that hangs up drops its call's future here; what the call started (a job) goes on
//! elsewhere. Passwords are computed, and large bodies decoded, on threads that may block.

mod activation;
mod auth;
mod certificate;
mod client;
#[cfg(test)]
mod codec_tests;
mod datetime;
mod decode;
mod encode;
mod http;
mod lexis;
mod listen;
mod post;
mod server;
mod throttle;
mod tls;
mod upgrade;
mod watch;

pub use activation::{Activated, ActivationError, activated_sockets};
pub use auth::{AuthError, Gate, OwnerPin, Policy, USER, hash_password, hash_password_alone};
pub use certificate::fingerprint;
pub use client::{Client, ClientError, Credentials, ServerTrust};
pub use decode::{DecodeError, decode_call, decode_response};
pub use encode::{TooBig, encode_call, encode_fault, encode_list, encode_response, encode_value};
pub use http::{FAULT_INTERNAL, FAULT_MALFORMED, FAULT_TOO_BIG};
pub use listen::{ListenError, bind_tcp, bind_unix};
pub use post::{Destination, PostError, Poster};
pub use server::{Metrics, Server, ServerConfig};
pub use tls::{TlsError, TlsIdentity, TlsState};
pub use upgrade::{Stream, Taker, Upgrades};

use crate::model::TraceParent;
use futures_util::future::BoxFuture;
use std::net::SocketAddr;
use std::sync::Arc;
pub use xmlrpc::{Fault, Value};

/// What a caller may do: each of the last three includes those before it. A peer stands apart: it has its own few
/// verbs, which nobody else has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Peer,
    Viewer,
    Operator,
    Admin,
}

/// Who is calling, once known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// HTTP Basic, user `oracle`.
    Password,
    /// A client certificate that the owner's pin accepts; SHA-256 of its DER in lower-case hex.
    Owner { fingerprint: String },
    /// Another host, by the fingerprint that is pinned for it.
    Peer { fingerprint: String },
    /// The operator's Unix socket.
    Local { uid: u32, pid: i32 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub identity: Identity,
    pub role: Role,
    /// `None` on the Unix socket.
    pub address: Option<SocketAddr>,
    /// Our own end of the connection.
    pub own: Option<SocketAddr>,
    pub tls: bool,
}

/// `password@192.0.2.1`, `owner:ab12cd34@192.0.2.1`, `local:0`: for the audit.
impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.identity {
            Identity::Password => f.write_str("password")?,
            Identity::Owner { fingerprint } => {
                write!(f, "owner:{}", &fingerprint[..fingerprint.len().min(8)])?
            }
            Identity::Peer { fingerprint } => write!(f, "peer:{}", &fingerprint[..fingerprint.len().min(8)])?,
            Identity::Local { uid, .. } => write!(f, "local:{uid}")?,
        }
        match self.address {
            Some(address) => write!(f, "@{}", address.ip()),
            None => Ok(()),
        }
    }
}

/// One decoded request.
#[derive(Debug)]
pub struct Call {
    pub method: String,
    pub params: Vec<Value>,
    pub caller: Caller,
    /// What the caller says it calls for. Nothing is decided by it.
    pub trace: Option<TraceParent>,
}

/// A `<value>…</value>` element, encoded once and sent many times.
#[derive(Debug, Clone)]
pub struct Encoded(pub Arc<[u8]>);

/// What a call is answered with when it did not fail.
#[derive(Debug, Clone)]
pub enum Answer {
    Value(Value),
    /// An array whose elements were encoded before.
    Array(Vec<Encoded>),
}

impl From<Value> for Answer {
    fn from(value: Value) -> Self {
        Self::Value(value)
    }
}

/// The floor above: answers calls.
pub trait Handler: Send + Sync + 'static {
    fn call(&self, call: Call) -> BoxFuture<'_, Result<Answer, Fault>>;
}
