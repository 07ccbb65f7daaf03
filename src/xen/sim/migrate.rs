//! A simulated migration: pieces that stand for memory, then the domain's image; each piece four bytes of length,
//! most significant first, then that many bytes; the image is JSON.
//!
//! ```text
//!  source                                    target
//!  (runs)  ── memory ──────────────────────►
//!  suspend ── domain ──────────────────────► build it, standing still, then paused
//!  ask for the handover: destroy, or go on
//! ```

use super::super::{DomId, Handover, Inflow, Outflow, Result, ToolstackError, moving_deadline};
use super::{SimToolstack, unexpected};
use crate::sim::{Answer, Image, Request, WorldError};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MAX_FRAME_BYTES: u32 = 1024 * 1024;
/// This bit of a length says that the piece stands for memory, and is thrown away.
const MEMORY: u32 = 0x8000_0000;

/// Runs in a task of its own: a caller that stops waiting must not leave a domain suspended.
pub(super) async fn send(
    from: SimToolstack,
    domid: DomId,
    live: bool,
    out: Box<dyn Outflow>,
    handover: Arc<dyn Handover>,
) -> Result<()> {
    in_task(async move { send_through(&from, domid, live, out, handover).await }).await
}

/// Runs in a task of its own, as [`send`].
pub(super) async fn receive(to: SimToolstack, input: Box<dyn Inflow>) -> Result<DomId> {
    in_task(async move { receive_from(&to, input).await }).await
}

async fn in_task<T: Send + 'static>(talk: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let failed = |_| Err(ToolstackError::Failed("the simulated migration failed".to_owned()));
    tokio::spawn(talk).await.unwrap_or_else(failed)
}

async fn send_through(
    from: &SimToolstack,
    domid: DomId,
    live: bool,
    mut out: Box<dyn Outflow>,
    handover: Arc<dyn Handover>,
) -> Result<()> {
    let Answer::Millis(takes_ms) = from.ask(Request::BeginExport { domid: domid.0 }).await? else {
        return Err(unexpected());
    };
    let takes = Duration::from_millis(takes_ms);
    if live {
        // The guest runs on meanwhile.
        send_memory(&mut out, takes).await?;
    }
    let Answer::Image(image) = from.ask(Request::Export { domid: domid.0 }).await? else {
        return Err(unexpected());
    };
    let limit = moving_deadline(from.timeout, image.spec.memory);
    let sent = within(limit + takes, async {
        if !live {
            send_memory(&mut out, takes).await?;
        }
        write(&mut out, &image).await
    })
    .await;
    if sent.is_ok() && handover.hand_over().await {
        from.tell(Request::HandOver { domid: domid.0 }).await?;
        return from.tell(Request::EndExport { domid: domid.0, gone: true }).await;
    }
    // The error that ended the migration is the one to tell, not what the undoing met.
    if let Err(undo) = from.tell(Request::EndExport { domid: domid.0, gone: false }).await {
        tracing::warn!(domid = domid.0, %undo, "a domain that could not be sent stays suspended");
    }
    sent.and(Err(ToolstackError::Failed("the domain was not handed over".to_owned())))
}

/// Bytes that stand for memory, over as long as it takes.
async fn send_memory(out: &mut Box<dyn Outflow>, takes: Duration) -> Result<()> {
    const PIECES: u32 = 20;
    static PIECE: [u8; 32 * 1024] = [0; 32 * 1024];
    for _ in 0..PIECES {
        tokio::time::sleep(takes / PIECES).await;
        let length = PIECE.len() as u32;
        out.write_u32(MEMORY | length).await.map_err(broken)?;
        out.write_all(&PIECE).await.map_err(broken)?;
        out.flush().await.map_err(broken)?;
    }
    Ok(())
}

async fn receive_from(to: &SimToolstack, mut input: Box<dyn Inflow>) -> Result<DomId> {
    let image = read(&mut input, to.timeout).await?;
    let domid = to.ask_domid(Request::Import { image: Box::new(image) }).await?;
    match to.tell(Request::EndImport { domid: domid.0, paused: true }).await {
        Ok(()) => Ok(domid),
        Err(error) => {
            if let Err(undo) = to.tell(Request::Destroy { domid: domid.0 }).await {
                tracing::warn!(domid = domid.0, %undo, "a domain that did not arrive stays, paused");
            }
            Err(error)
        }
    }
}

/// Each exchange ends within its deadline.
async fn within<T>(limit: Duration, talk: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, talk).await.unwrap_or(Err(WorldError::Timeout.into()))
}

fn broken(error: std::io::Error) -> ToolstackError {
    ToolstackError::Failed(format!("the migration's stream broke: {}", error.kind()))
}

async fn write(out: &mut Box<dyn Outflow>, image: &Image) -> Result<()> {
    let too_long = || ToolstackError::Failed("the domain is too long to send".to_owned());
    let bytes = serde_json::to_vec(image).map_err(|_| too_long())?;
    let length = u32::try_from(bytes.len()).ok().filter(|n| *n <= MAX_FRAME_BYTES).ok_or_else(too_long)?;
    out.write_u32(length).await.map_err(broken)?;
    out.write_all(&bytes).await.map_err(broken)?;
    out.flush().await.map_err(broken)
}

/// Each piece within `limit`: how many come is the sender's affair, and its receiver's who gives up.
async fn read(input: &mut Box<dyn Inflow>, limit: Duration) -> Result<Image> {
    let not_one = || ToolstackError::Failed("what arrived is no simulated domain".to_owned());
    loop {
        let piece = async {
            let length = input.read_u32().await.map_err(broken)?;
            if length & !MEMORY > MAX_FRAME_BYTES {
                return Err(not_one());
            }
            let mut bytes = vec![0; (length & !MEMORY) as usize];
            input.read_exact(&mut bytes).await.map_err(broken)?;
            Ok((length & MEMORY == 0).then_some(bytes))
        };
        if let Some(image) = within(limit, piece).await? {
            return serde_json::from_slice(&image).map_err(|_| not_one());
        }
    }
}
