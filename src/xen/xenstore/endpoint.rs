//! The two ways to xenstored: the daemon's Unix socket, and the kernel's device, which leads to a xenstored in
//! another domain too (or to one that has no socket).

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

const CONNECT: Duration = Duration::from_secs(2);

/// Where xenstored is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    Socket(PathBuf),
    Device(PathBuf),
    /// The socket where there is one, else the device.
    Any(Vec<Endpoint>),
}

impl Endpoint {
    /// Where dom0 has it.
    pub fn of_dom0() -> Self {
        let socket = |path: &str| Self::Socket(PathBuf::from(path));
        let device = Self::Device(PathBuf::from("/dev/xen/xenbus"));
        Self::Any(vec![socket("/run/xenstored/socket"), socket("/var/run/xenstored/socket"), device])
    }

    /// Connects, and ends within two seconds for each way there is.
    pub(super) async fn connect(&self) -> io::Result<Connection> {
        match self {
            Self::Socket(path) => connect_socket(path).await,
            Self::Device(path) => {
                let stream = Box::new(Device::open(path)?);
                Ok(Connection { stream, one_at_a_time: true })
            }
            Self::Any(ways) => {
                let mut first = None;
                for way in ways {
                    match Box::pin(way.connect()).await {
                        Ok(connection) => return Ok(connection),
                        // A xenstored that is there and does not answer: behind the device is the same one, and a
                        // thread that waits for it in the kernel cannot be ended.
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        Err(error) => first = first.or(Some(error)),
                    }
                }
                Err(first.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
            }
        }
    }
}

async fn connect_socket(path: &Path) -> io::Result<Connection> {
    match tokio::time::timeout(CONNECT, UnixStream::connect(path)).await {
        Ok(stream) => Ok(Connection { stream: Box::new(stream?), one_at_a_time: false }),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

pub(super) struct Connection {
    pub stream: Box<dyn Duplex>,
    /// No request may be written before the one ahead of it is answered. The kernel's device keeps no copy of a request: a
    /// thread of its own sends it on from the buffer that the next write fills (`xenbus_dev_request_and_reply`,
    /// drivers/xen/xenbus/xenbus_xs.c), and xenstored then gets one request's head with another one's words.
    pub one_at_a_time: bool,
}

pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The kernel's xenbus device. It tells when there is something to read. A write (one message) is taken at once, and
/// readiness to write is not told at all.
#[derive(Debug)]
struct Device {
    file: AsyncFd<File>,
}

impl Device {
    #[allow(unsafe_code)]
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        // SAFETY: a `File` answers the same descriptor for as long as it lives, nobody takes it out of the
        // `AsyncFd`, and that one takes the descriptor out of the poll before it drops the file.
        let file = unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) }?;
        Ok(Self { file })
    }
}

impl AsyncRead for Device {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.file.poll_read_ready(cx))?;
            let read = ready.try_io(|file| file.get_ref().read(out.initialize_unfilled()));
            if let Ok(read) = read {
                return Poll::Ready(read.map(|n| out.advance(n)));
            }
        }
    }
}

impl AsyncWrite for Device {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.file.get_ref().write(bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn a_xenstored_that_refuses_is_not_gone_round_and_one_that_is_not_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let _listening = UnixListener::bind(path("listens")).unwrap();
        let listens = Endpoint::Socket(path("listens"));
        // A socket that nobody listens at any more.
        drop(UnixListener::bind(path("dead")).unwrap());

        let ways = Endpoint::Any(vec![Endpoint::Socket(path("absent")), listens.clone()]);
        assert!(ways.connect().await.is_ok());
        let ways = Endpoint::Any(vec![Endpoint::Socket(path("dead")), listens]);
        assert_eq!(ways.connect().await.err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
        let none = Endpoint::Any(vec![Endpoint::Socket(path("absent"))]);
        assert_eq!(none.connect().await.err().unwrap().kind(), io::ErrorKind::NotFound);
    }
}
