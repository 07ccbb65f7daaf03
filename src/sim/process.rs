//! The world as a process of its own, behind a Unix socket that only its owner may open.
//!
//! It is started by the daemon ([`ensure`]) but lives on when the daemon is killed; it ends when it is told to,
//! or when nobody was connected for [`IDLE_END`]. Beside the socket lie `<socket>.pid`, locked while the process
//! lives, so that there is never a second world on one socket, and `<socket>.log`.

use super::server::serve_client;
use super::{Engine, Handle, Options, Request, WorldError};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Without a client for this long, the world's process ends: nobody will come back for it.
pub const IDLE_END: Duration = Duration::from_secs(15 * 60);
/// From spawning the process to its first answer.
const START_TIMEOUT: Duration = Duration::from_secs(10);
const START_POLL: Duration = Duration::from_millis(5);
const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// Clients at once; a further one is dropped.
const MAX_CLIENTS: usize = 64;
/// From the request to end to the closing of connections, so that the answer goes out.
const END_GRACE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("another simulated world serves {0}")]
    AlreadyRunning(PathBuf),
    #[error("{what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the simulated world did not answer within {0:?}; see {1}")]
    NotReady(Duration, PathBuf),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ProcessError {
    move |source| ProcessError::Io { what, path: path.to_owned(), source }
}

fn beside(socket: &Path, ending: &str) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(ending);
    PathBuf::from(path)
}

/// Runs a world until its end, on a runtime of one thread: the whole work of the world's process.
pub fn run(socket: &Path, options: Options) -> Result<(), ProcessError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(io_error("cannot start a runtime for", socket))?;
    runtime.block_on(serve(socket, options))
}

/// Serves a new world on this socket until its end.
pub async fn serve(socket: &Path, options: Options) -> Result<(), ProcessError> {
    serve_until_idle(socket, options, IDLE_END).await
}

/// [`serve`] with another bound on being without clients, for tests.
pub async fn serve_until_idle(
    socket: &Path,
    options: Options,
    idle_end: Duration,
) -> Result<(), ProcessError> {
    let pid_file = take_pid_file(socket)?;
    let listener = bind(socket)?;
    tracing::info!(socket = %socket.display(), "simulated world ready");
    let why = accept(listener, Engine::start(options), idle_end).await;
    tracing::info!(why, "simulated world ends");
    // The socket first: whoever finds no socket may take the lock.
    let _ = std::fs::remove_file(socket);
    let _ = std::fs::remove_file(beside(socket, ".pid"));
    drop(pid_file);
    Ok(())
}

fn take_pid_file(socket: &Path) -> Result<Flock<File>, ProcessError> {
    let path = beside(socket, ".pid");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(io_error("cannot open", &path))?;
    let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| ProcessError::AlreadyRunning(socket.to_owned()))?;
    // A world that was just ending may have removed the file between our opening and locking it.
    let ours = file.metadata().ok().map(|m| m.ino());
    if ours.is_none() || std::fs::metadata(&path).ok().map(|m| m.ino()) != ours {
        return Err(ProcessError::AlreadyRunning(socket.to_owned()));
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(io_error("cannot write", &path))?;
    Ok(file)
}

/// The socket appears under its name only when it has its mode and is listened on. A stale one is replaced: we
/// hold the lock, so nobody serves it.
fn bind(socket: &Path) -> Result<UnixListener, ProcessError> {
    let new = beside(socket, ".new");
    let _ = std::fs::remove_file(&new);
    let listener = UnixListener::bind(&new).map_err(io_error("cannot listen on", &new))?;
    std::fs::set_permissions(&new, Permissions::from_mode(0o600))
        .map_err(io_error("cannot protect", &new))?;
    std::fs::rename(&new, socket).map_err(io_error("cannot name", socket))?;
    Ok(listener)
}

/// Takes clients until the end, and says why it came.
async fn accept(listener: UnixListener, engine: Arc<Engine>, idle_end: Duration) -> &'static str {
    let end = Arc::new(Notify::new());
    let mut clients = JoinSet::new();
    let mut idle_since = Instant::now();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if clients.len() < MAX_CLIENTS => {
                    clients.spawn(serve_client(stream, engine.clone(), end.clone()));
                }
                Ok(_) => tracing::warn!(MAX_CLIENTS, "too many clients; one was dropped"),
                // Out of file descriptors, most likely: it passes, and must not spin.
                Err(error) => {
                    tracing::warn!(%error, "cannot take a client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = clients.join_next() => idle_since = Instant::now(),
            () = end.notified() => {
                tokio::time::sleep(END_GRACE).await;
                return "told to";
            }
            () = tokio::time::sleep_until(idle_since + idle_end), if clients.is_empty() => return "no client",
        }
    }
}

/// The world behind `socket`: the one that is there, or a new process, `exe simulated-world --socket …`, that
/// lives on when this process is killed or interrupted.
pub async fn ensure(socket: &Path, exe: &Path, options: Options) -> Result<Handle, ProcessError> {
    if answers(socket).await {
        tracing::info!(socket = %socket.display(), "simulated world found");
        return Ok(Handle::remote(socket));
    }
    let mut child = spawn(socket, exe, options)?;
    let deadline = Instant::now() + START_TIMEOUT;
    while Instant::now() < deadline {
        if answers(socket).await {
            end_unless_it_serves(&mut child, socket).await;
            return Ok(Handle::remote(socket));
        }
        tokio::time::sleep(START_POLL).await;
        // Ours may have lost a race for the socket to another's, or found one that was just ending.
        if matches!(child.try_wait(), Ok(Some(_))) && !answers(socket).await {
            tokio::time::sleep(RESTART_PAUSE).await;
            child = spawn(socket, exe, options)?;
        }
    }
    Err(ProcessError::NotReady(START_TIMEOUT, beside(socket, ".log")))
}

/// Another's world won the race: ours must not stay behind and begin when that one ends.
async fn end_unless_it_serves(child: &mut tokio::process::Child, socket: &Path) {
    let serving = std::fs::read_to_string(beside(socket, ".pid")).ok();
    let serving = serving.and_then(|text| text.trim().parse::<u32>().ok());
    if child.id().is_some() && child.id() != serving {
        let _ = child.kill().await;
    }
}

fn spawn(socket: &Path, exe: &Path, options: Options) -> Result<tokio::process::Child, ProcessError> {
    let log_path = beside(socket, ".log");
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&log_path);
    let log = log.map_err(io_error("cannot open", &log_path))?;
    let absolute = |path: &Path| std::path::absolute(path).map_err(io_error("cannot find", path));
    tokio::process::Command::new(absolute(exe)?)
        .arg("simulated-world")
        .arg("--socket")
        .arg(absolute(socket)?)
        .arg("--memory-mib")
        .arg(options.memory.0.to_string())
        // It may outlive the daemon, so it keeps nothing of it: no folder, no secret or service manager's
        // socket of its environment.
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        // A process group of its own: Ctrl-C on the daemon's terminal does not reach it.
        .process_group(0)
        .kill_on_drop(false)
        .spawn()
        .map_err(io_error("cannot start", exe))
}

/// Whether a world answers on this socket.
async fn answers(socket: &Path) -> bool {
    let connect = tokio::time::timeout(Duration::from_secs(2), UnixStream::connect(socket));
    if !matches!(connect.await, Ok(Ok(_))) {
        return false;
    }
    let answer = Handle::remote(socket).call(Request::Info, Duration::from_secs(2)).await;
    !matches!(answer, Err(WorldError::Timeout | WorldError::Unreachable(_)))
}
