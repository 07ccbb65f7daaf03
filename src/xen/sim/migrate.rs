//! A simulated migration's talk over the stream.
//!
//! ```text
//!  source                                   target
//!  suspend ── domain (JSON) ──────────────► build it, standing still
//!          ◄───────────────── "ready"       (or "refused" and why: the source goes on)
//!  destroy ── "go" ───────────────────────► let it run; done
//! ```
//!
//! The source destroys its domain only after the target holds it whole, and the target lets it run only after
//! the source has destroyed its own: at no moment do two run. If the stream breaks before "ready", the source
//! goes on and the target throws its copy away. If it breaks between "ready" and "go", the domain is lost and
//! both sides fail: never run twice comes before running at all.
//!
//! Frames: four bytes of length, most significant first, then JSON.

use super::super::{DomId, Duplex, Result, ToolstackError, moving_deadline};
use super::{SimToolstack, unexpected};
use crate::sim::{Answer, Image, Request, WorldError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MAX_FRAME_BYTES: u32 = 1024 * 1024;

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Ready,
    Refused(ToolstackError),
}

#[derive(Debug, Serialize, Deserialize)]
struct Go;

/// Runs in a task of its own: a caller that stops waiting must not leave a domain suspended.
pub(super) async fn send(from: SimToolstack, domid: DomId, stream: Box<dyn Duplex>) -> Result<()> {
    in_task(async move { send_through(&from, domid, stream).await }).await
}

/// Runs in a task of its own, as [`send`].
pub(super) async fn receive(to: SimToolstack, stream: Box<dyn Duplex>, paused: bool) -> Result<DomId> {
    in_task(async move { receive_from(&to, stream, paused).await }).await
}

async fn in_task<T: Send + 'static>(talk: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let failed = |_| Err(ToolstackError::Failed("the simulated migration failed".to_owned()));
    tokio::spawn(talk).await.unwrap_or_else(failed)
}

async fn send_through(from: &SimToolstack, domid: DomId, mut stream: Box<dyn Duplex>) -> Result<()> {
    let Answer::Image(image) = from.ask(Request::Export { domid: domid.0 }).await? else {
        return Err(unexpected());
    };
    let limit = moving_deadline(from.timeout, image.spec.memory);
    match within(limit, offer(&mut stream, &image)).await {
        Ok(()) => {
            from.tell(Request::EndExport { domid: domid.0, gone: true }).await?;
            within(limit, write(&mut stream, &Go)).await
        }
        Err(error) => {
            // The error that ended the migration is the one to tell, not what the undoing met.
            if let Err(undo) = from.tell(Request::EndExport { domid: domid.0, gone: false }).await {
                tracing::warn!(domid = domid.0, %undo, "a domain that could not be sent stays suspended");
            }
            Err(error)
        }
    }
}

async fn offer(stream: &mut Box<dyn Duplex>, image: &Image) -> Result<()> {
    write(stream, image).await?;
    match read::<Reply>(stream).await? {
        Reply::Ready => Ok(()),
        Reply::Refused(error) => Err(error),
    }
}

async fn receive_from(to: &SimToolstack, mut stream: Box<dyn Duplex>, paused: bool) -> Result<DomId> {
    let image: Image = within(to.timeout, read(&mut stream)).await?;
    let limit = moving_deadline(to.timeout, image.spec.memory);
    let imported = to.ask_domid(Request::Import { image: Box::new(image) }).await;
    let domid = match imported {
        Ok(domid) => domid,
        Err(error) => {
            // If the source does not hear of it, it meets the end of the stream instead.
            let _ = within(limit, write(&mut stream, &Reply::Refused(error.clone()))).await;
            return Err(error);
        }
    };
    match within(limit, take_over(to, domid, &mut stream, paused)).await {
        Ok(()) => Ok(domid),
        Err(error) => {
            if let Err(undo) = to.tell(Request::Destroy { domid: domid.0 }).await {
                tracing::warn!(domid = domid.0, %undo, "a domain that did not arrive stays, paused");
            }
            Err(error)
        }
    }
}

async fn take_over(
    to: &SimToolstack,
    domid: DomId,
    stream: &mut Box<dyn Duplex>,
    paused: bool,
) -> Result<()> {
    write(stream, &Reply::Ready).await?;
    read::<Go>(stream).await?;
    to.tell(Request::EndImport { domid: domid.0, paused }).await
}

/// Each exchange ends within its deadline.
async fn within<T>(limit: Duration, talk: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, talk).await.unwrap_or(Err(WorldError::Timeout.into()))
}

fn broken(error: std::io::Error) -> ToolstackError {
    ToolstackError::Failed(format!("the migration's stream broke: {}", error.kind()))
}

async fn write<T: Serialize>(stream: &mut Box<dyn Duplex>, message: &T) -> Result<()> {
    let too_long = || ToolstackError::Failed("the domain is too long to send".to_owned());
    let bytes = serde_json::to_vec(message).map_err(|_| too_long())?;
    let length = u32::try_from(bytes.len()).ok().filter(|n| *n <= MAX_FRAME_BYTES).ok_or_else(too_long)?;
    stream.write_u32(length).await.map_err(broken)?;
    stream.write_all(&bytes).await.map_err(broken)?;
    stream.flush().await.map_err(broken)
}

async fn read<T: DeserializeOwned>(stream: &mut Box<dyn Duplex>) -> Result<T> {
    let not_one = || ToolstackError::Failed("what arrived is no simulated domain".to_owned());
    let length = stream.read_u32().await.map_err(broken)?;
    if length > MAX_FRAME_BYTES {
        return Err(not_one());
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes).await.map_err(broken)?;
    serde_json::from_slice(&bytes).map_err(|_| not_one())
}
