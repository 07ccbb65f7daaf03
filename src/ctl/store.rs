//! The store: checked in the running daemon, or taken out of and put into a folder whose daemon is stopped.

use super::args::StoreCommand;
use super::{CtlError, Session};

pub async fn execute(session: &mut Session<'_>, command: StoreCommand) -> Result<(), CtlError> {
    match command {
        StoreCommand::Check { state_dir: None } => {
            let answer = session.read("store_check", &[]).await?;
            session.printer.value(&answer)
        }
        _ => Err(CtlError::Failed("not joined yet".to_owned())),
    }
}
