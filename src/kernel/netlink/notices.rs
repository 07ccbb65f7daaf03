//! The kernel's notices of what changes in links, addresses and routes (rtnetlink(7), multicast groups), melted into a bell.
//!
//! A notice is not read for what it says: whoever hears the bell reads everything again. So a notice that is lost costs
//! nothing as long as its loss is heard, and the kernel tells that it lost some (ENOBUFS, netlink(7)). With the default buffer
//! 1,000 ports made at once lose notices; with this one they do not.

use super::Place;
use crate::model::network::Changed;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};
use rtnetlink::MulticastGroup;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

pub(in crate::kernel) const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;
/// From the end of one socket to the next.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Changes of a port's VLANs are told among the links (`br_ifinfo_notify`, net/bridge/br_netlink.c).
const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

/// What came, for the log and tests.
#[derive(Debug, Default)]
pub(in crate::kernel) struct Counts {
    pub(in crate::kernel) notices: AtomicU64,
    pub(in crate::kernel) overruns: AtomicU64,
}

/// Rings from now on until the receiver is dropped. The first ring says that it listens: what changed before that, the
/// caller may have missed.
pub(in crate::kernel) fn ring_on_notices(
    place: &Place,
    bell: mpsc::Sender<Changed>,
    buffer: usize,
    counts: Arc<Counts>,
) {
    let listen = move |entered: io::Result<()>| async move {
        let mut pause = FIRST_PAUSE;
        loop {
            let heard = match &entered {
                Ok(()) => tokio::select! {
                    heard = hear(&bell, buffer, &counts, &mut pause) => heard,
                    () = bell.closed() => return,
                },
                Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
            };
            if let Err(error) = heard {
                tracing::warn!(%error, "the kernel's notices cannot be heard");
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                () = bell.closed() => return,
            }
        }
    };
    if let Err(error) = place.inhabit("notices", listen) {
        tracing::error!(%error, "no thread for the kernel's notices");
    }
}

/// Full: one waits already, and says the same.
fn ring(bell: &mpsc::Sender<Changed>) {
    let _ = bell.try_send(Changed);
}

/// Until the socket fails. The notices are not even parsed: a storm is drained faster than it is made.
async fn hear(
    bell: &mpsc::Sender<Changed>,
    buffer: usize,
    counts: &Counts,
    pause: &mut Duration,
) -> io::Result<()> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    enlarge(&socket, buffer);
    let groups = GROUPS.iter().fold(0, |all, group| all | 1 << (*group as u32 - 1));
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    ring(bell);
    #[allow(unsafe_code, reason = "tokio marks it so, for types that may change their descriptor")]
    // SAFETY: an `OwnedFd` keeps its one descriptor open until it is dropped, and the `AsyncFd` owns it.
    let socket = unsafe { AsyncFd::register(socket) }?;
    // What does not fit is cut off (netlink(7)), and not missed.
    let mut start = [0_u8; 16];
    loop {
        let mut ready = socket.readable().await?;
        match ready.try_io(|socket| Ok(recv(socket.as_raw_fd(), &mut start, MsgFlags::empty())?)) {
            Ok(Ok(_)) => {
                counts.notices.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                tracing::debug!("the kernel lost notices, for want of room");
                counts.overruns.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Err(error)) => return Err(error),
            // Nothing is there yet.
            Err(_) => continue,
        }
        *pause = FIRST_PAUSE;
        ring(bell);
    }
}

/// socket(7): beyond the system's limit only with CAP_NET_ADMIN. A smaller buffer is no error, only more overruns.
fn enlarge(socket: &OwnedFd, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err()
        && let Err(error) = setsockopt(socket, sockopt::RcvBuf, &bytes)
    {
        tracing::debug!(%error, "the receive buffer for notices keeps its size");
    }
}
