//! The way to the daemon: one method, so that commands can be tried on a fake.

use super::CtlError;
use crate::model::TraceParent;
use crate::wire::{Client, ClientError};
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
    client: Client,
}

impl UnixRpc {
    /// `trace`: what its calls are done for.
    pub fn new(socket: PathBuf, trace: Option<TraceParent>) -> Self {
        let mut client = Client::unix(&socket);
        client.set_trace(trace);
        Self { client, socket }
    }

    fn error(&self, verb: &str, error: ClientError) -> CtlError {
        let unreachable = |problem: String| CtlError::Unreachable { socket: self.socket.clone(), problem };
        match error {
            ClientError::Fault(fault) => CtlError::fault(fault.fault_code, &fault.fault_string),
            ClientError::Connect { source, .. } => unreachable(source.to_string()),
            ClientError::Broken { .. } => {
                unreachable(format!("the connection broke; {verb} may have been done or not"))
            }
            ClientError::Refused { .. } => unreachable("permission denied".to_owned()),
            ClientError::Timeout { after, .. } => {
                CtlError::Timeout { verb: verb.to_owned(), seconds: after.as_secs() }
            }
            other => CtlError::Answer { verb: verb.to_owned(), problem: chain(&other) },
        }
    }
}

#[async_trait]
impl Rpc for UnixRpc {
    async fn call(&mut self, verb: &str, params: &[Value], timeout: Duration) -> Result<Value, CtlError> {
        self.client.call(verb, params, timeout).await.map_err(|error| self.error(verb, error))
    }
}

/// An error with what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
