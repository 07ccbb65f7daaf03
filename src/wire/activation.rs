//! Sockets that systemd opened for us and hands over, so that a restart refuses no connection.
//!
//! The protocol: `LISTEN_PID` names the process meant, `LISTEN_FDS` counts the descriptors, which begin at 3,
//! `LISTEN_FDNAMES` names them, joined by colons. Each is kept as what it is: a TCP or a Unix listener.

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

const FIRST_FD: RawFd = 3;
/// systemd hands over what the socket unit lists; more than this is a mistake.
const MAX_FDS: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    #[error("LISTEN_FDS is not a number from 0 to {MAX_FDS}")]
    Count,
    #[error("the descriptor handed over as {name:?} is no listening TCP or Unix stream socket")]
    NotAListener { name: String },
}

/// What was handed over.
#[derive(Debug, Default)]
pub struct Activated {
    pub tcp: Vec<TcpListener>,
    pub unix: Vec<UnixListener>,
}

/// Takes the sockets handed to this process. Empty if none were; empty when asked again, for they are taken.
pub fn activated_sockets() -> Result<Activated, ActivationError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let text = |name| std::env::var(name).unwrap_or_default();
    let named = parse(&text("LISTEN_PID"), &text("LISTEN_FDS"), &text("LISTEN_FDNAMES"), std::process::id())?;
    if named.is_empty() || TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Activated::default());
    }
    let mut activated = Activated::default();
    for (fd, name) in named {
        activated.add(own(fd), name)?;
    }
    Ok(activated)
}

/// The descriptors meant for process `own_pid`, each with its name.
fn parse(pid: &str, count: &str, names: &str, own_pid: u32) -> Result<Vec<(RawFd, String)>, ActivationError> {
    if pid.parse() != Ok(own_pid) || count.is_empty() {
        return Ok(Vec::new());
    }
    let count: usize = count.parse().map_err(|_| ActivationError::Count)?;
    if count > MAX_FDS {
        return Err(ActivationError::Count);
    }
    let mut names = names.split(':');
    Ok((FIRST_FD..).take(count).map(|fd| (fd, names.next().unwrap_or("").to_owned())).collect())
}

#[allow(unsafe_code)]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: systemd opened this descriptor for this process (LISTEN_PID is ours), nothing else in the process
    // owns it, and `activated_sockets` takes each only once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Activated {
    fn add(&mut self, fd: OwnedFd, name: String) -> Result<(), ActivationError> {
        // systemd sets it not; without it our child processes would keep the port.
        let flags = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
        let listening = nix::fcntl::fcntl(&fd, flags).is_ok()
            && getsockopt(&fd, sockopt::AcceptConn) == Ok(true)
            && getsockopt(&fd, sockopt::SockType) == Ok(nix::sys::socket::SockType::Stream);
        let family = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|address| address.family());
        match family {
            Some(AddressFamily::Inet | AddressFamily::Inet6) if listening => {
                self.tcp.push(TcpListener::from(fd));
            }
            Some(AddressFamily::Unix) if listening => self.unix.push(UnixListener::from(fd)),
            _ => return Err(ActivationError::NotAListener { name }),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_meant_for_another_process_are_left_alone() {
        assert_eq!(parse("7", "2", "a:b", 8).unwrap(), []);
        assert_eq!(parse("", "", "", 8).unwrap(), []);
        let ours = parse("8", "2", "a", 8).unwrap();
        assert_eq!(ours, [(3, "a".to_owned()), (4, String::new())]);
        assert!(parse("8", "17", "", 8).is_err());
        assert!(parse("8", "-1", "", 8).is_err());
    }

    #[test]
    fn a_listener_is_taken_as_what_it_is_and_anything_else_refused() {
        let mut activated = Activated::default();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        activated.add(tcp.into(), "tcp".to_owned()).unwrap();
        assert_eq!(activated.tcp[0].local_addr().unwrap(), address);

        let folder = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(folder.path().join("socket")).unwrap();
        activated.add(unix.into(), "unix".to_owned()).unwrap();
        assert_eq!(activated.unix.len(), 1);

        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(activated.add(udp.into(), "udp".to_owned()).is_err());
    }
}
