//! The transport that `xl migrate` starts: our own binary, which joins xl's stdin and stdout with a private Unix
//! socket of the daemon. It knows nothing of what passes. It ends when either side does: if the daemon dies, xl
//! sees the end of its pipe and lets the domain go on.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Runs until the daemon's side ends.
pub fn run(socket: &Path) -> io::Result<()> {
    let to_daemon = UnixStream::connect(socket)?;
    let mut from_daemon = to_daemon.try_clone()?;
    let mut from_xl = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut to_xl = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    std::thread::spawn(move || {
        let mut to_daemon = to_daemon;
        // Whatever ended it, the daemon sees the end and judges.
        let _ = io::copy(&mut from_xl, &mut to_daemon);
        let _ = to_daemon.shutdown(Shutdown::Write);
    });
    io::copy(&mut from_daemon, &mut to_xl).map(|_| ())
}
