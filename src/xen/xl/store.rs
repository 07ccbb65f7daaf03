//! What the xl body needs of XenStore, as a small trait, and a body of it on the `xenstore-*` commands for where
//! no client of our own is connected.
//!
//! What stands below a guest's own folders is written by the guest: the reader of a value checks it.

use super::super::{Result, ToolstackError};
use super::run::{Leaves, Runner, find};
use async_trait::async_trait;
use std::path::PathBuf;
use std::time::Duration;

/// The longest value that is read; XenStore's own payloads end there.
pub const MAX_VALUE_BYTES: usize = 4096;

#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// `None`: there is no such node.
    async fn read(&self, path: &str) -> Result<Option<Vec<u8>>>;
    /// The names right below; none where there is no such node.
    async fn list(&self, path: &str) -> Result<Vec<String>>;
    async fn write(&self, path: &str, value: &[u8]) -> Result<()>;
}

/// By the commands of xenstore-utils: one process a call.
pub(super) struct Commands {
    runner: Runner,
    read: PathBuf,
    list: PathBuf,
    write: PathBuf,
    limit: Duration,
}

impl Commands {
    pub fn new(runner: Runner, limit: Duration) -> Self {
        let program = |name: &str| find(name).unwrap_or_else(|| PathBuf::from("/usr/bin").join(name));
        Self {
            runner,
            read: program("xenstore-read"),
            list: program("xenstore-list"),
            write: program("xenstore-write"),
            limit,
        }
    }

    async fn ask(&self, program: &std::path::Path, args: &[&str]) -> Result<Option<Vec<u8>>> {
        let ended = self.runner.program(program, args, Leaves::Nothing, self.limit).await?;
        // These are their words for a node that is not there.
        let none = ["couldn't read path", "could not list path", "No such file or directory"];
        match ended.success {
            true => Ok(Some(ended.output)),
            false if none.iter().any(|words| ended.complaint.contains(words)) => Ok(None),
            false => Err(ToolstackError::Unreachable(format!("XenStore: {}", ended.complaint))),
        }
    }
}

#[async_trait]
impl Store for Commands {
    async fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        // The commands write a line end behind the value.
        let value = self.ask(&self.read, &["-R", path]).await?;
        Ok(value.map(|mut bytes| {
            if bytes.last() == Some(&b'\n') {
                bytes.pop();
            }
            bytes.truncate(MAX_VALUE_BYTES);
            bytes
        }))
    }

    async fn list(&self, path: &str) -> Result<Vec<String>> {
        let names = self.ask(&self.list, &[path]).await?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&names).lines().map(str::to_owned).collect())
    }

    async fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        let value = std::str::from_utf8(value)
            .map_err(|_| ToolstackError::Failed("the value is no text".to_owned()))?;
        self.ask(&self.write, &["--", path, value]).await.map(|_| ())
    }
}
