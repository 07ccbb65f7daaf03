//! What strangers, and callers with bad intent or bad luck, may do to the wire: by real sockets, on loopback, to a
//! server in this process with a small handler. Every limit is set so low that crossing it takes no time, and each
//! test waits for the server's answer or close, never for the clock.

#[cfg(test)]
mod auth;
#[cfg(test)]
mod ends;
#[cfg(test)]
mod http;
#[cfg(test)]
mod support;
#[cfg(test)]
mod tls;
