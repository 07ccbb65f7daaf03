//! Where a handle acts: in the network namespace we run in, or in another one (network_namespaces(7)).
//!
//! A namespace belongs to a thread (setns(2)), and a socket to the namespace of the thread that made it. So whatever is to
//! happen elsewhere gets a thread of its own, which enters, works and ends; no thread of the runtime ever moves.

use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

#[derive(Debug, Clone, Default)]
pub(super) enum Place {
    /// Where we run.
    #[default]
    Own,
    /// The namespace behind this descriptor.
    Other(Arc<OwnedFd>),
}

impl Place {
    /// The namespace that is mounted at this path: `/run/netns/NAME`, `/proc/PID/ns/net`.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::Other(Arc::new(File::open(path)?.into())))
    }

    pub(super) fn is_own(&self) -> bool {
        matches!(self, Self::Own)
    }

    fn enter(&self) -> io::Result<()> {
        match self {
            Self::Own => Ok(()),
            Self::Other(namespace) => Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?),
        }
    }

    /// Does the work there, and waits for it.
    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        if self.is_own() {
            return work();
        }
        std::thread::scope(|scope| {
            let there = scope.spawn(|| self.enter().and_then(|()| work()));
            there.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }

    /// A thread that lives there with a runtime of its own until the work is done.
    pub(super) fn inhabit<F, W>(&self, name: &str, work: W) -> io::Result<()>
    where
        W: FnOnce(io::Result<()>) -> F + Send + 'static,
        F: Future<Output = ()>,
    {
        let place = self.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let entered = place.enter();
            runtime.block_on(async move { work(entered).await });
        })?;
        Ok(())
    }
}
