//! The transport that `xl migrate` starts: our own binary, which joins xl's stdin and stdout with a private Unix
//! socket of the daemon. It knows nothing of what passes. It ends when either side does: if the daemon dies, xl
//! sees the end of its pipe and lets the domain go on.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

const PIECE_BYTES: usize = 256 * 1024;

/// Runs until the daemon's side ends.
pub fn run(socket: &Path) -> io::Result<()> {
    let from_xl = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let to_xl = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    join(UnixStream::connect(socket)?, from_xl, to_xl)
}

fn join(to_daemon: UnixStream, from_xl: impl Read + Send + 'static, to_xl: impl Write) -> io::Result<()> {
    let from_daemon = to_daemon.try_clone()?;
    std::thread::spawn(move || {
        // Whatever ended it, the daemon sees the end and judges.
        let _ = pass(from_xl, &to_daemon);
        let _ = to_daemon.shutdown(Shutdown::Write);
    });
    pass(from_daemon, to_xl)
}

/// Not `io::copy`: between a socket and a pipe that is splice(2), which holds the pipe's lock while it waits for the socket.
/// Whoever then reads what is in the pipe waits, too: an xl that came late for the daemon's first words sent nothing.
fn pass(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&piece[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::sync::mpsc;
    use std::time::Duration;

    const SOON: Duration = Duration::from_secs(20);

    /// Waits until a thread stands in a system call about this descriptor (proc_pid_syscall(5)).
    fn until_it_waits_for(thread: nix::unistd::Pid, descriptor: i32) {
        let began = std::time::Instant::now();
        let waits = || {
            let call = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).unwrap();
            call.split(' ').nth(1) == Some(format!("{descriptor:#x}").as_str())
        };
        while !waits() {
            assert!(began.elapsed() < SOON, "it never waits");
            std::thread::yield_now();
        }
    }

    /// What xl reads, if it comes to that.
    fn heard(mut from: io::PipeReader) -> [u8; 5] {
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let mut heard = [0; 5];
            tell.send(from.read_exact(&mut heard).map(|()| heard))
        });
        told.recv_timeout(SOON).expect("xl can read").unwrap()
    }

    #[test]
    fn what_the_daemon_said_is_read_by_an_xl_that_comes_late_for_it() {
        let (mut daemon, ours) = UnixStream::pair().unwrap();
        let (xl_hears, to_xl) = io::pipe().unwrap();
        // It is there before the transport looks, so the transport waits only once it has passed it on.
        daemon.write_all(b"ready").unwrap();
        let socket = ours.as_raw_fd();
        let (tell, told) = mpsc::channel();
        let passing = std::thread::spawn(move || {
            tell.send(nix::unistd::gettid()).unwrap();
            pass(ours, File::from(OwnedFd::from(to_xl)))
        });
        until_it_waits_for(told.recv().unwrap(), socket);
        assert_eq!(&heard(xl_hears), b"ready");
        drop(daemon);
        passing.join().unwrap().unwrap();
    }

    #[test]
    fn it_passes_both_ways_until_the_daemons_side_ends() {
        let (mut daemon, ours) = UnixStream::pair().unwrap();
        let (from_xl, mut xl_says) = io::pipe().unwrap();
        let (xl_hears, to_xl) = io::pipe().unwrap();
        let joined = std::thread::spawn(move || join(ours, from_xl, to_xl));
        daemon.set_read_timeout(Some(SOON)).unwrap();
        daemon.write_all(b"ready").unwrap();
        assert_eq!(&heard(xl_hears), b"ready");
        xl_says.write_all(b"domain").unwrap();
        drop(xl_says);
        let mut all = Vec::new();
        daemon.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"domain", "and then the end");
        drop(daemon);
        joined.join().unwrap().unwrap();
    }
}
