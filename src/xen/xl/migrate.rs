//! Live migration, each half with the xl of its own host. The bytes of the domain flow one way; everything else
//! that two xl would say to each other is said here, locally.
//!
//! ```text
//!  xl migrate ─sh─ our binary (pipe) ── Unix socket ── send(): "banner" ; domain → out ; END seen ; hand over?
//!        yes: xl is killed where it waits for "ready", and the domain, which stands still, destroyed
//!        no, or anything broke: the socket closes, and xl lets the domain go on by itself
//!
//!  receive(): "banner" ; input → xl migrate-receive -e -p ; "ready" → permission ; report ; the domain is paused
//!        anything broke, or the input ended too early: xl is killed, and its half of a domain destroyed
//! ```
//!
//! xl never hears "ready" from us on the sending side: until it does, it resumes the domain on any failure, and we
//! take the domain from it only after the handover. A domain that is not to run while it is sent (`live` unset) goes
//! by `xl save -p` instead: the stream is the same, and it ends with the domain paused here.

use super::Xl;
use super::memory::{TO_STDOUT, finish};
use super::run::{Leaves, Running, failed};
use super::stream::Stream;
use crate::model::{SafePath, VmId};
use crate::xen::{DomId, Handover, Inflow, Outflow, Result, RunState, ToolstackError};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// What two xl say to each other (tools/xl/xl_migrate.c; the same in all releases). The first is sent without the
/// zero byte that ends the others.
const BANNER: &[u8] = b"xl migration receiver ready, send binary domain data.\n";
const READY: &[u8] = b"domain received, ready to unpause\0";
const PERMISSION: &[u8] = b"domain is yours, you are cleared to unpause\0";
const REPORT: &[u8] = b"my copy unpause results are as follows\0";

const PIECE_BYTES: usize = 256 * 1024;
/// How long a domain that comes waits for others to be built. Its sender soon takes a stream that stands still for broken.
const TO_HAVE_A_TURN: Duration = Duration::from_secs(20);

fn broken(what: &str, error: &std::io::Error) -> ToolstackError {
    ToolstackError::Failed(format!("{what} broke: {}", error.kind()))
}

/// A socket in our folder that is gone when this is dropped.
struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Xl {
    pub(super) async fn send(
        &self,
        domid: DomId,
        live: bool,
        mut out: Box<dyn Outflow>,
        handover: Arc<dyn Handover>,
        cancelled: &CancellationToken,
    ) -> Result<()> {
        let line = self.living(domid).await?;
        if line.state == RunState::Paused {
            return Err(ToolstackError::BadState(
                "the domain is paused, so its guest cannot get ready".into(),
            ));
        }
        let sent = if live {
            self.send_live(domid, &mut out, &handover, cancelled).await
        } else {
            self.send_still(domid, &mut out, &handover, cancelled).await
        };
        self.explained(domid, sent).await
    }

    async fn send_live(
        &self,
        domid: DomId,
        out: &mut Box<dyn Outflow>,
        handover: &Arc<dyn Handover>,
        cancelled: &CancellationToken,
    ) -> Result<()> {
        let door = self.door()?;
        // With an empty -s the "host" is the command, which xl starts by itself. It is a text of ours: two plain paths.
        let plain = |path: &std::path::Path| {
            let text = path.to_str().and_then(|text| SafePath::parse(text).ok());
            text.ok_or_else(|| ToolstackError::Failed(format!("{} is no plain path", path.display())))
        };
        let command = format!("exec {} migration-pipe {}", plain(&self.inner.exe)?, plain(&door.path)?);
        let args = ["migrate", "-s", "", &domid.0.to_string(), &command];
        let mut xl = self.inner.runner.start_xl(&args, Leaves::Processes, Stdio::null())?;
        let talk = async {
            let mut socket = accept(&door, self.inner.limit, &mut xl).await?;
            socket.write_all(BANNER).await.map_err(|e| broken("xl's pipe", &e))?;
            pass_domain(&mut socket, out, self.inner.limit).await?;
            Ok(socket)
        };
        let talked = tokio::select! {
            talked = talk => talked,
            () = cancelled.cancelled() => Err(ToolstackError::Failed("its caller has gone".to_owned())),
        };
        match talked {
            // From here on the caller has no say any more but by its handover.
            Ok(socket) if handover.hand_over().await => {
                xl.kill().await;
                drop(socket);
                self.end(domid).await
            }
            Ok(socket) => {
                drop(socket);
                self.resumed_by(
                    &mut xl,
                    &args,
                    ToolstackError::Failed("the domain was not handed over".into()),
                )
                .await
            }
            // The socket went with the talk.
            Err(error) => self.resumed_by(&mut xl, &args, error).await,
        }
    }

    /// Waits until xl, whose pipe is broken, has let the domain go on, and says why it came to that.
    async fn resumed_by(&self, xl: &mut Running, args: &[&str], error: ToolstackError) -> Result<()> {
        let ended = finish(xl, self.inner.limit).await;
        let words = xl.complaint().await;
        match (ended, error) {
            (Err(unsure), _) => Err(unsure),
            (Ok(_), ToolstackError::Failed(why)) => {
                Err(ToolstackError::Failed(format!("{why}; {}", failed(args, &words))))
            }
            (Ok(_), ToolstackError::Timeout) => {
                let why = "the domain's sending stood still; it goes on here";
                Err(ToolstackError::Failed(format!("{why}; {}", failed(args, &words))))
            }
            (Ok(_), other) => Err(other),
        }
    }

    /// The domain stands still from the first byte on, and is paused at the end.
    async fn send_still(
        &self,
        domid: DomId,
        out: &mut Box<dyn Outflow>,
        handover: &Arc<dyn Handover>,
        cancelled: &CancellationToken,
    ) -> Result<()> {
        let args = ["save", "-p", &domid.0.to_string(), TO_STDOUT];
        let mut xl = self.inner.runner.start_xl(&args, Leaves::Processes, Stdio::null())?;
        let mut source = xl.stdout().ok_or_else(|| ToolstackError::Failed("xl has no output".to_owned()))?;
        let passed = tokio::select! {
            passed = pass_domain(&mut source, out, self.inner.limit) => passed,
            () = cancelled.cancelled() => Err(ToolstackError::Failed("its caller has gone".to_owned())),
        };
        if let Err(error) = passed {
            drop(source);
            return self.resumed_by(&mut xl, &args, error).await;
        }
        if !finish(&mut xl, self.inner.limit).await? {
            return Err(failed(&args, &xl.complaint().await));
        }
        if handover.hand_over().await {
            return self.end(domid).await;
        }
        self.set_paused(domid, false).await?;
        Err(ToolstackError::Failed("the domain was not handed over".to_owned()))
    }

    fn door(&self) -> Result<Door> {
        let path = self.inner.folder.join(format!("m{}", &VmId::random().to_string()[..6]));
        let made = UnixListener::bind(&path).and_then(|listener| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        });
        let listener = made.map_err(|error| broken("the socket for xl", &error))?;
        Ok(Door { listener, path })
    }

    pub(super) async fn receive(
        &self,
        input: Box<dyn Inflow>,
        cancelled: &CancellationToken,
    ) -> Result<DomId> {
        let turn = tokio::time::timeout(TO_HAVE_A_TURN, self.turn_to_build(cancelled)).await;
        let others = "another domain is being built or received here, and xl does one at a time";
        let _turn = turn.unwrap_or_else(|_| Err(ToolstackError::Failed(others.to_owned())))?;
        let before: BTreeSet<DomId> = self.lines().await?.into_iter().map(|line| line.domid).collect();
        let args = ["migrate-receive", "-e", "-p"];
        let mut xl = self.inner.runner.start_xl(&args, Leaves::Processes, Stdio::piped())?;
        let mut vm = None;
        let received = tokio::select! {
            received = self.receive_from(&mut xl, input, &mut vm) => received,
            () = cancelled.cancelled() => Err(ToolstackError::Failed("its caller has gone".to_owned())),
        };
        let done = match (received, vm) {
            (Ok(()), Some(vm)) => match finish(&mut xl, self.inner.limit).await {
                Ok(true) => self.new_domain(vm, &before).await,
                Ok(false) => Err(failed(&args, &xl.complaint().await)),
                Err(error) => Err(error),
            },
            (Ok(()), None) => Err(ToolstackError::Failed("the domain has no configuration".to_owned())),
            (Err(error), _) => {
                xl.kill().await;
                let words = xl.complaint().await;
                Err(match error {
                    ToolstackError::Failed(why) if !words.is_empty() => {
                        ToolstackError::Failed(format!("{why}; {}", failed(&args, &words)))
                    }
                    error => error,
                })
            }
        };
        match (done, vm) {
            (Ok(domid), _) => Ok(domid),
            (Err(error), Some(vm)) => {
                if let Err(left) = self.destroy_new(vm, &before).await {
                    tracing::warn!(vm_uuid = %vm, %error, %left, "what was received of a domain cannot be destroyed");
                    return Err(ToolstackError::Timeout);
                }
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Feeds xl until it says that the domain is whole, and lets it finish. `vm` is told as soon as it is known.
    async fn receive_from(
        &self,
        xl: &mut Running,
        mut input: Box<dyn Inflow>,
        vm: &mut Option<VmId>,
    ) -> Result<()> {
        let limit = self.inner.limit;
        let no_pipe = || ToolstackError::Failed("xl has no pipe".to_owned());
        let (mut to_xl, mut from_xl) = (xl.stdin().ok_or_else(no_pipe)?, xl.stdout().ok_or_else(no_pipe)?);
        hear(&mut from_xl, BANNER, limit).await?;
        let mut stream = Stream::default();
        let mut piece = vec![0; PIECE_BYTES];
        while !stream.is_whole() {
            // How long the other side may be silent is for its link to know, not for us.
            let read =
                input.read(&mut piece).await.map_err(|error| broken("the migration's stream", &error))?;
            if read == 0 {
                return Err(ToolstackError::Failed("the migration's stream ended too early".to_owned()));
            }
            stream.feed(&piece[..read]).map_err(|error| ToolstackError::Failed(error.to_string()))?;
            if vm.is_none()
                && let Some(config) = stream.config()
            {
                *vm = Some(self.welcome(config).await?);
            }
            let written = tokio::time::timeout(limit, to_xl.write_all(&piece[..read])).await;
            let written = written.map_err(|_| ToolstackError::Failed("xl takes no more".to_owned()))?;
            written.map_err(|error| broken("xl's pipe", &error))?;
        }
        // xl builds on for a while: the last memory, the device model, the hotplug scripts.
        hear(&mut from_xl, READY, limit).await?;
        to_xl.write_all(PERMISSION).await.map_err(|error| broken("xl's pipe", &error))?;
        hear(&mut from_xl, REPORT, limit).await?;
        let mut outcome = [1];
        let heard = tokio::time::timeout(limit, from_xl.read_exact(&mut outcome)).await;
        match heard {
            Ok(Ok(_)) if outcome == [0] => Ok(()),
            _ => Err(ToolstackError::Failed("xl could not finish the domain".to_owned())),
        }
    }

    /// Whether a domain of this configuration may come here, and whose it is.
    async fn welcome(&self, config: &[u8]) -> Result<VmId> {
        let bad = || ToolstackError::Failed("the domain's configuration is not understood".to_owned());
        let told: serde_json::Value = serde_json::from_slice(config).map_err(|_| bad())?;
        let vm = told["c_info"]["uuid"].as_str().and_then(|uuid| VmId::parse(uuid).ok()).ok_or_else(bad)?;
        let name = told["c_info"]["name"].as_str().ok_or_else(bad)?;
        let incoming = format!("{name}--incoming");
        let taken =
            |line: &super::read::Line| line.vm == Some(vm) || line.name == name || line.name == incoming;
        // Our own xl has made nothing yet: it has not seen this.
        if self.lines().await?.iter().any(taken) {
            return Err(ToolstackError::Exists);
        }
        Ok(vm)
    }
}

/// Passes on a domain to its last byte. However slow the link is, as long as something moves: how much time the whole
/// may take is for the caller to know. Nothing for `limit` is too long.
async fn pass_domain(
    from: &mut (impl AsyncRead + Unpin),
    out: &mut Box<dyn Outflow>,
    limit: Duration,
) -> Result<()> {
    let mut stream = Stream::default();
    let mut piece = vec![0; PIECE_BYTES];
    while !stream.is_whole() {
        let read = tokio::time::timeout(limit, from.read(&mut piece)).await;
        let read = read.map_err(|_| ToolstackError::Timeout)?.map_err(|error| broken("xl's pipe", &error))?;
        if read == 0 {
            return Err(ToolstackError::Failed("xl ended before the domain was sent".to_owned()));
        }
        stream.feed(&piece[..read]).map_err(|error| ToolstackError::Failed(error.to_string()))?;
        let written = tokio::time::timeout(limit, out.write_all(&piece[..read])).await;
        let written = written.map_err(|_| ToolstackError::Timeout)?;
        written.map_err(|error| broken("the migration's stream", &error))?;
    }
    let flushed = tokio::time::timeout(limit, out.flush()).await.map_err(|_| ToolstackError::Timeout)?;
    flushed.map_err(|error| broken("the migration's stream", &error))
}

/// The transport that xl has started. One that ends before is told at once.
async fn accept(door: &Door, limit: Duration, xl: &mut Running) -> Result<UnixStream> {
    tokio::select! {
        accepted = door.listener.accept() => match accepted {
            Ok((socket, _)) => Ok(socket),
            Err(error) => Err(broken("the socket for xl", &error)),
        },
        ended = xl.wait(limit) => match ended {
            Ok(_) => Err(ToolstackError::Failed("xl ended before it sent anything".to_owned())),
            Err(error) => Err(error),
        },
    }
}

/// Reads one of xl's messages.
async fn hear(from: &mut (impl AsyncRead + Unpin), message: &[u8], limit: Duration) -> Result<()> {
    let mut heard = vec![0; message.len()];
    match tokio::time::timeout(limit, from.read_exact(&mut heard)).await {
        Err(_) => Err(ToolstackError::Failed("xl did not answer in time".to_owned())),
        Ok(Err(error)) => Err(broken("xl's pipe", &error)),
        Ok(Ok(_)) if heard == message => Ok(()),
        Ok(Ok(_)) => Err(ToolstackError::Failed("xl said something else than was expected".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::stream::tests::domain;
    use super::super::tests::fake::Fake;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(120);

    #[tokio::test(start_paused = true)]
    async fn a_domain_may_take_long_as_long_as_something_moves() {
        let bytes = domain(r#"{"c_info":{}}"#, &[vec![7; 4096]]);
        let (mut xl, mut from) = tokio::io::duplex(1024);
        let (out, mut wire) = tokio::io::duplex(bytes.len());
        let mut out: Box<dyn Outflow> = Box::new(out);
        let sent = bytes.clone();
        tokio::spawn(async move {
            for piece in sent.chunks(512) {
                tokio::time::sleep(LIMIT / 2).await;
                xl.write_all(piece).await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        let began = tokio::time::Instant::now();
        pass_domain(&mut from, &mut out, LIMIT).await.unwrap();
        assert!(began.elapsed() > LIMIT * 2);
        let mut passed = vec![0; bytes.len()];
        wire.read_exact(&mut passed).await.unwrap();
        assert_eq!(passed, bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn a_domain_of_which_nothing_moves_is_given_up() {
        let bytes = domain("{}", &[vec![7; 4096]]);
        let (mut xl, mut from) = tokio::io::duplex(bytes.len());
        // Nobody reads what is sent.
        let (out, _wire) = tokio::io::duplex(16);
        let mut out: Box<dyn Outflow> = Box::new(out);
        assert!(
            matches!(pass_domain(&mut from, &mut out, LIMIT).await, Err(ToolstackError::Timeout)),
            "silence"
        );
        xl.write_all(&bytes).await.unwrap();
        assert!(
            matches!(pass_domain(&mut from, &mut out, LIMIT).await, Err(ToolstackError::Timeout)),
            "no reader"
        );
    }

    #[tokio::test]
    async fn a_domain_that_comes_while_another_is_built_is_refused_before_xl_is_asked() {
        let fake = Fake::new(&[("migrate-receive", "exit 0")]);
        let xl = fake.open(LIMIT).await;
        let _building = Arc::clone(&xl.inner.turn).lock_owned().await;
        let (_source, stream) = tokio::io::duplex(16);
        tokio::time::pause();
        let began = tokio::time::Instant::now();
        let received = xl.receive(Box::new(stream), &CancellationToken::new()).await;
        assert!(
            matches!(&received, Err(ToolstackError::Failed(why)) if why.contains("one at a time")),
            "{received:?}"
        );
        assert_eq!(began.elapsed().as_secs(), TO_HAVE_A_TURN.as_secs());
        assert!(!fake.calls().iter().any(|call| call.starts_with("migrate-receive")));
    }
}
