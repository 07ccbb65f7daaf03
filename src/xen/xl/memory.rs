//! A domain's memory on disk: save, restore and core dump. Each takes as long as something moves: a disk may be as
//! slow as it likes, and a VM as large.
//!
//! A save is `xl save -p` into a pipe, and a thread of ours writes the file: so we see the stream's end, the
//! disk's errors are ours to judge, and if we die or give up, xl meets a broken pipe and lets the domain go on by
//! itself. Whole, the domain stands paused; then the file gets its name, and only then the domain goes or goes on.
//! A restore is the same the other way round: a thread of ours reads the file into a pipe, so we see how far it is.

use super::Xl;
use super::run::{Leaves, Moved, Patience, Running, failed, stalled};
use super::stream::Stream;
use crate::model::SafePath;
use crate::xen::{AfterSave, DomId, Result, RunState, ToolstackError};
use std::fs::File;
use std::io::{PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Where `xl save` finds the pipe that is its stdout.
pub(super) const TO_STDOUT: &str = "/proc/self/fd/1";
/// Where `xl restore` finds the pipe that is its stdin.
pub(super) const FROM_STDIN: &str = "/proc/self/fd/0";
const PIECE_BYTES: usize = 256 * 1024;
/// So much is written before it is brought to disk, so that no memory is filled with it and the end does not take long.
const SYNC_BYTES: u64 = 64 * 1024 * 1024;

/// Beside the file: same folder, so that it can be renamed.
fn part_of(file: &SafePath) -> PathBuf {
    PathBuf::from(format!("{file}.part"))
}

fn io_failed(what: &str, error: &std::io::Error) -> ToolstackError {
    ToolstackError::Failed(format!("{what}: {error}"))
}

impl Xl {
    pub(super) async fn save_to(
        &self,
        domid: DomId,
        file: &SafePath,
        after: AfterSave,
        cancelled: &CancellationToken,
    ) -> Result<()> {
        let line = self.living(domid).await?;
        let was_paused = line.state == RunState::Paused;
        let part = part_of(file);
        let target = open_part(&part).await?;
        if was_paused {
            // A paused guest cannot get ready to be saved.
            self.set_paused(domid, false).await?;
        }
        let saved = self.save_part(domid, target, cancelled).await;
        let named = match saved {
            Ok(()) => rename_part(&part, file).await,
            Err(error) => Err(error),
        };
        if let Err(error) = named {
            let _ = remove(&part).await;
            // Nothing to do for a domain that xl has let go on; one that was paused is paused again.
            if let Err(undo) = self.set_paused(domid, was_paused).await {
                tracing::warn!(domid = domid.0, %undo, "a domain that could not be saved is not as it was");
            }
            return self.explained(domid, Err(error)).await;
        }
        match after {
            AfterSave::Destroy => self.end(domid).await,
            AfterSave::Continue => self.set_paused(domid, was_paused).await,
        }
    }

    /// After success the domain stands paused, and the part is whole and on disk.
    async fn save_part(&self, domid: DomId, target: File, cancelled: &CancellationToken) -> Result<()> {
        let args = ["save", "-p", &domid.0.to_string(), TO_STDOUT];
        let mut xl = self.inner.runner.start_xl(&args, Leaves::Processes, Stdio::null())?;
        let source = xl.stdout().ok_or_else(|| ToolstackError::Failed("xl has no output".to_owned()))?;
        let source = source.into_owned_fd().map_err(|e| io_failed("xl's output", &e))?;
        let (stop, bytes) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
        let written = write_in_thread(source, target, stop.clone(), Arc::clone(&bytes));
        let limit = self.inner.limit;
        let written = tokio::select! {
            written = written => written.unwrap_or_else(|_| Err(ToolstackError::Failed("the write broke off".into()))),
            () = cancelled.cancelled() => Err(ToolstackError::Failed("its caller has gone".to_owned())),
            () = stalled(limit, Arc::new(move || bytes.load(Ordering::Relaxed))) => Err(ToolstackError::Timeout),
        };
        stop.cancel();
        // On an error xl's pipe is broken now (at the latest with the next piece), and it lets the domain go on.
        let ended = finish(&mut xl, self.inner.limit).await;
        match (written, ended) {
            (Ok(()), Ok(true)) => Ok(()),
            (Err(ToolstackError::Timeout), Ok(_)) => {
                Err(nothing_moved("written", limit, &xl.complaint().await))
            }
            (Err(error @ ToolstackError::Failed(_)), Ok(false)) => {
                let words = xl.complaint().await;
                Err(ToolstackError::Failed(format!("{error}; {}", failed(&args, &words))))
            }
            (Ok(()), Ok(false)) => Err(failed(&args, &xl.complaint().await)),
            (Err(error), Ok(_)) | (_, Err(error)) => Err(error),
        }
    }

    pub(super) async fn dump(
        &self,
        domid: DomId,
        file: &SafePath,
        live: bool,
        crash: bool,
        cancelled: &CancellationToken,
    ) -> Result<()> {
        let line = self.there(domid).await?;
        let alive = matches!(line.state, RunState::Running | RunState::Blocked);
        let part = part_of(file);
        drop(open_part(&part).await?);
        let pause = alive && !live;
        if pause {
            self.set_paused(domid, true).await?;
        }
        let part_text = part.to_string_lossy().into_owned();
        let args = ["dump-core", &domid.0.to_string(), &part_text];
        // It writes memory alone: while it looks through the holes between (minutes, on a slow host) the file stands still.
        let watched = part.clone();
        let length = move || std::fs::metadata(&watched).map_or(0, |file| file.len());
        let limit = self.inner.limit;
        let patience = Patience::WhileItMoves(limit, Arc::new(length));
        let dumped = tokio::select! {
            dumped = self.inner.runner.xl_patiently(&args, Leaves::Nothing, Stdio::null(), patience) => match dumped {
                Ok(_) => Ok(()),
                Err((ToolstackError::Timeout, words)) => Err(nothing_moved("written", limit, &words)),
                Err((error, _)) => Err(error),
            },
            () = cancelled.cancelled() => Err(ToolstackError::Failed("its caller has gone".to_owned())),
        };
        let dumped = match dumped {
            Ok(()) => rename_part(&part, file).await,
            Err(error) => Err(error),
        };
        if dumped.is_err() {
            let _ = remove(&part).await;
        }
        if dumped.is_ok() && crash {
            return self.end(domid).await;
        }
        if pause {
            self.set_paused(domid, false).await?;
        }
        dumped
    }
}

/// A saved domain on its way from its file to xl.
pub(super) struct Feed {
    bytes: Arc<AtomicU64>,
    told: oneshot::Receiver<std::io::Error>,
}

impl Feed {
    /// Begins to read the file into what is xl's stdin.
    pub(super) async fn start(file: &SafePath) -> Result<(Self, Stdio)> {
        let path = PathBuf::from(file.as_str());
        let source = in_thread(move || {
            File::open(&path).map_err(|error| io_failed(&path.display().to_string(), &error))
        })
        .await?;
        let (stdin, pipe) = std::io::pipe().map_err(|error| io_failed("a pipe to xl", &error))?;
        let bytes = Arc::new(AtomicU64::new(0));
        let (tell, told) = oneshot::channel();
        let counter = Arc::clone(&bytes);
        std::thread::spawn(move || feed(source, pipe, &counter, tell));
        Ok((Self { bytes, told }, stdin.into()))
    }

    /// Bytes read so far.
    pub(super) fn moved(&self) -> Moved {
        let bytes = Arc::clone(&self.bytes);
        Arc::new(move || bytes.load(Ordering::Relaxed))
    }

    /// Why the file could not be read to its end, if that was so.
    pub(super) fn broke(&mut self) -> Option<ToolstackError> {
        self.told.try_recv().ok().map(|error| io_failed("the saved domain cannot be read", &error))
    }
}

fn feed(mut source: File, mut pipe: PipeWriter, bytes: &AtomicU64, tell: oneshot::Sender<std::io::Error>) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match source.read(&mut piece) {
            Ok(0) => return,
            Ok(read) => {
                // An xl that reads no more has ended, and says why.
                if pipe.write_all(&piece[..read]).is_err() {
                    return;
                }
                bytes.fetch_add(read as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                // Before xl sees the end of its pipe. Nobody may wait for it any more.
                let _ = tell.send(error);
                return;
            }
        }
    }
}

/// `what`: read or written. `words`: xl's last ones.
pub(super) fn nothing_moved(what: &str, limit: Duration, words: &str) -> ToolstackError {
    let words = if words.is_empty() { String::new() } else { format!("; xl's last words: {words}") };
    ToolstackError::Failed(format!("nothing more was {what} for {} s{words}", limit.as_secs()))
}

/// Waits until xl has ended; one that does not is killed, and what became of its domain is unknown.
pub(super) async fn finish(xl: &mut Running, limit: Duration) -> Result<bool> {
    match xl.wait(limit).await {
        Err(ToolstackError::Timeout) => {
            xl.kill().await;
            Err(ToolstackError::Timeout)
        }
        other => other,
    }
}

/// Runs what may block for long (a slow disk) in a thread of its own, so that it takes no one's place.
async fn in_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (tell, told) = oneshot::channel();
    std::thread::spawn(move || tell.send(work()));
    told.await.unwrap_or_else(|_| Err(ToolstackError::Failed("the work broke off".to_owned())))
}

async fn open_part(part: &Path) -> Result<File> {
    let part = part.to_owned();
    in_thread(move || {
        // One of a save that broke off.
        let _ = std::fs::remove_file(&part);
        let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part);
        opened.map_err(|error| io_failed(&part.display().to_string(), &error))
    })
    .await
}

async fn remove(part: &Path) -> Result<()> {
    let part = part.to_owned();
    in_thread(move || std::fs::remove_file(&part).map_err(|error| io_failed("the part", &error))).await
}

/// Gives the part its name, once it is on disk; then the name, too, is on disk.
async fn rename_part(part: &Path, file: &SafePath) -> Result<()> {
    let (part, file) = (part.to_owned(), PathBuf::from(file.as_str()));
    in_thread(move || {
        let named = || {
            File::open(&part)?.sync_all()?;
            std::fs::rename(&part, &file)?;
            file.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
        };
        named().map_err(|error| io_failed(&file.display().to_string(), &error))
    })
    .await
}

/// Copies a saved domain from xl's pipe to its file, following it; an end too early is an error. After `stop` no
/// further piece is taken.
fn write_in_thread(
    source: OwnedFd,
    target: File,
    stop: CancellationToken,
    bytes: Arc<AtomicU64>,
) -> oneshot::Receiver<Result<()>> {
    let (tell, told) = oneshot::channel();
    std::thread::spawn(move || tell.send(copy(File::from(source), target, &stop, &bytes)));
    told
}

fn copy(mut source: File, mut target: File, stop: &CancellationToken, bytes: &AtomicU64) -> Result<()> {
    let flags = nix::fcntl::OFlag::empty();
    let blocking = nix::fcntl::fcntl(&source, nix::fcntl::FcntlArg::F_SETFL(flags));
    blocking.map_err(|errno| io_failed("xl's output", &errno.into()))?;
    let mut stream = Stream::default();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let read = source.read(&mut piece).map_err(|error| io_failed("xl's output", &error))?;
        if stop.is_cancelled() {
            return Err(ToolstackError::Timeout);
        }
        if read == 0 {
            break;
        }
        stream.feed(&piece[..read]).map_err(|error| ToolstackError::Failed(error.to_string()))?;
        target.write_all(&piece[..read]).map_err(|error| io_failed("the file", &error))?;
        let written = bytes.fetch_add(read as u64, Ordering::Relaxed) + read as u64;
        if written / SYNC_BYTES != (written - read as u64) / SYNC_BYTES {
            target.sync_data().map_err(|error| io_failed("the file", &error))?;
        }
    }
    match stream.is_whole() {
        true => target.sync_all().map_err(|error| io_failed("the file", &error)),
        false => Err(ToolstackError::Failed("xl ended before the domain was saved".to_owned())),
    }
}
