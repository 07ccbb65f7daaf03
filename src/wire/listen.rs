//! Sockets to listen on, and how many connections may be open on them.

use super::throttle::network_of;
use nix::sys::socket::Backlog;
use nix::unistd::{Gid, Group};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Connections that the kernel completes before we have accepted them. The standard library asks for 128, which
/// a pool's managers fill when all reconnect at once.
const BACKLOG: i32 = 1024;
/// Connections on the operator's socket. They do not count among the others: when strangers have taken all of
/// those, the operator must still come in.
const MAX_LOCAL: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {address}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("cannot listen on {}", path.display())]
    Unix { path: PathBuf, source: io::Error },
    #[error("another process listens on {}", path.display())]
    InUse { path: PathBuf },
    #[error("{} exists and is no socket", path.display())]
    NotASocket { path: PathBuf },
}

pub fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let failed = |source| ListenError::Tcp { address, source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    let backlog = Backlog::new(BACKLOG).map_err(|error| failed(error.into()))?;
    nix::sys::socket::listen(&listener, backlog).map_err(|error| failed(error.into()))?;
    Ok(listener)
}

/// The operator's socket: for its owner and `group`, if there is such a group. A file left by a process that
/// has died is replaced; one that somebody listens on is not. (Who connects is asked again at each connection;
/// the file's mode is the outer of two doors.)
pub fn bind_unix(path: &Path, group: &str) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Unix { path: path.to_owned(), source };
    remove_stale(path)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(failed)?;
    if let Some(gid) = gid_of(group)
        && let Err(error) = nix::unistd::chown(path, None, Some(gid))
    {
        tracing::warn!(path = %path.display(), group, %error, "the operator's socket stays closed to its group");
    }
    Ok(listener)
}

fn gid_of(group: &str) -> Option<Gid> {
    if group.is_empty() {
        return None;
    }
    Group::from_name(group).ok().flatten().map(|group| group.gid)
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Unix { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
        Ok(_) => Err(ListenError::InUse { path: path.to_owned() }),
    }
}

/// How many connections are open: in all, and of each address.
#[derive(Debug)]
pub(super) struct Slots {
    max_total: usize,
    max_per_address: usize,
    taken: Mutex<Taken>,
    all_free: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    remote: usize,
    local: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Slots {
    pub(super) fn new(max_total: usize, max_per_address: usize) -> Arc<Self> {
        Arc::new(Self { max_total, max_per_address, taken: Mutex::default(), all_free: Notify::new() })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a connection from `address`, or from the operator's socket.
    pub(super) fn take(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Slot> {
        let address = address.map(network_of);
        let mut taken = self.taken();
        match address {
            None if taken.local >= MAX_LOCAL => return None,
            None => taken.local += 1,
            Some(_) if taken.remote >= self.max_total => return None,
            Some(address) => {
                let of_address = taken.by_address.entry(address).or_default();
                // A limit of 0 would leave an empty entry behind; the settings allow none below 1.
                if *of_address >= self.max_per_address {
                    return None;
                }
                *of_address += 1;
                taken.remote += 1;
            }
        }
        Some(Slot { slots: self.clone(), address })
    }

    pub(super) fn open(&self) -> usize {
        let taken = self.taken();
        taken.remote + taken.local
    }

    pub(super) async fn wait_until_all_free(&self) {
        loop {
            let freed = self.all_free.notified();
            if self.open() == 0 {
                return;
            }
            freed.await;
        }
    }

    fn free(&self, address: Option<IpAddr>) {
        let mut taken = self.taken();
        match address {
            None => taken.local -= 1,
            Some(address) => {
                taken.remote -= 1;
                if let Some(of_address) = taken.by_address.get_mut(&address) {
                    *of_address -= 1;
                    if *of_address == 0 {
                        taken.by_address.remove(&address);
                    }
                }
            }
        }
        if taken.remote + taken.local == 0 {
            self.all_free.notify_waiters();
        }
    }
}

/// One open connection; gives its place back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    address: Option<IpAddr>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.free(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_limited_in_all_and_for_each_address_and_places_come_back() {
        let slots = Slots::new(3, 2);
        let a = Some(IpAddr::from([192, 0, 2, 1]));
        let b = Some(IpAddr::from([192, 0, 2, 2]));
        let first = slots.take(a).unwrap();
        let _second = slots.take(a).unwrap();
        assert!(slots.take(a).is_none(), "two of one address");
        let _third = slots.take(b).unwrap();
        assert!(slots.take(b).is_none(), "three in all");
        assert!(slots.take(None).is_some(), "the operator comes in though all places are taken");
        drop(first);
        assert!(slots.take(b).is_some());
        assert_eq!(slots.taken().by_address.len(), 2);
    }

    #[test]
    fn a_socket_file_of_a_dead_process_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dom0d.sock");
        let live = bind_unix(&path, "").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(bind_unix(&path, ""), Err(ListenError::InUse { .. })));
        drop(live);
        bind_unix(&path, "").unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(bind_unix(&path, ""), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }
}
