//! What strangers, and callers with bad intent or bad luck, may do to the wire: by real sockets, on loopback, to a
//! server in this process with a small handler. Every limit is set so low that crossing it takes no time, and each
//! test waits for the server's answer or close, never for the clock.

mod auth;
mod ends;
mod http;
mod support;
mod tls;
