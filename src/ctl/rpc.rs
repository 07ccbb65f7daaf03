//! The way to the daemon: one method, so that commands can be tried on a fake.

use super::CtlError;
use async_trait::async_trait;
use std::path::PathBuf;
use std::time::Duration;
use xmlrpc::Value;

/// Something that answers calls.
#[async_trait]
pub trait Rpc: Send {
    /// Calls `verb` and waits for its answer for at most `timeout`.
    async fn call(&mut self, verb: &str, params: &[Value], timeout: Duration) -> Result<Value, CtlError>;
}

/// The daemon at the end of the operator's socket. Connects when first needed, and anew after a failure.
pub struct UnixRpc {
    socket: PathBuf,
}

impl UnixRpc {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }
}

#[async_trait]
impl Rpc for UnixRpc {
    async fn call(&mut self, _verb: &str, _params: &[Value], _timeout: Duration) -> Result<Value, CtlError> {
        Err(CtlError::Unreachable { socket: self.socket.clone(), problem: "not joined yet".to_owned() })
    }
}
