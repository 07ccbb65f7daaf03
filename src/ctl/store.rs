//! The store: checked in the running daemon, or taken out of and put into a folder whose daemon is stopped.
//!
//! A folder is worked on under the store's own lock, so a daemon that runs after all is noticed and told.

use super::args::StoreCommand;
use super::rpc::chain;
use super::values::from_json;
use super::{CtlError, Session};
use crate::store::OpenError;
use crate::store::tools::{self, ToolError};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use xmlrpc::Value;

pub async fn execute(session: &mut Session<'_>, command: StoreCommand) -> Result<(), CtlError> {
    match command {
        StoreCommand::Check { state_dir: None } => {
            let answer = session.read("store_check", &[]).await?;
            session.printer.value(&answer)
        }
        StoreCommand::Check { state_dir: Some(dir) } => check(session, dir).await,
        StoreCommand::Export { state_dir, file } => {
            let rows = blocking(move || export(&state_dir, &file)).await?;
            session.printer.note(&format!("{rows} rows written"));
            Ok(())
        }
        StoreCommand::Import { state_dir, file, force } => {
            let rows = blocking(move || import(&state_dir, &file, force)).await?;
            session.printer.note(&format!("{rows} rows read; the store is ready"));
            Ok(())
        }
    }
}

/// Disks block, so this goes beside the runtime.
async fn blocking<T, F>(work: F) -> Result<T, CtlError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, CtlError> + Send + 'static,
{
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(CtlError::Failed(format!("the work on the store broke off: {error}"))))
}

async fn check(session: &mut Session<'_>, dir: PathBuf) -> Result<(), CtlError> {
    let report = blocking(move || tools::check(&dir).map_err(tool_error)).await?;
    let json = serde_json::to_value(&report).map_err(|error| CtlError::Failed(error.to_string()))?;
    let value = from_json(json).unwrap_or(Value::Nil);
    session.printer.value(&value)?;
    if report.good() {
        session.printer.note("the store is good");
        return Ok(());
    }
    Err(CtlError::Failed(format!("the store is damaged: {}", report.problems.join("; "))))
}

/// An export holds all that the store does, so only its owner may read it; a file that is there is not replaced.
fn export(dir: &Path, file: &Path) -> Result<u64, CtlError> {
    if file == Path::new("-") {
        return tools::export(dir, BufWriter::new(io::stdout().lock())).map_err(tool_error);
    }
    let wrong = |error: io::Error| CtlError::File { file: file.to_owned(), problem: error.to_string() };
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).map_err(wrong)?;
    let mut to = BufWriter::new(opened);
    let rows = tools::export(dir, &mut to).map_err(tool_error).and_then(|rows| {
        to.flush().and_then(|()| to.get_ref().sync_all()).map_err(wrong)?;
        Ok(rows)
    });
    if rows.is_err() {
        // Half an export is of no use; why there is no whole one is what to tell.
        let _ = std::fs::remove_file(file);
    }
    rows
}

fn import(dir: &Path, file: &Path, force: bool) -> Result<u64, CtlError> {
    if file == Path::new("-") {
        return tools::import(dir, io::stdin().lock(), force).map_err(tool_error);
    }
    let opened = File::open(file)
        .map_err(|error| CtlError::File { file: file.to_owned(), problem: error.to_string() })?;
    tools::import(dir, BufReader::new(opened), force).map_err(tool_error)
}

fn tool_error(error: ToolError) -> CtlError {
    match error {
        ToolError::Missing(_) => CtlError::NotFound(error.to_string()),
        ToolError::NotEmpty(_) => CtlError::Conflict(format!("{error} (--force)")),
        ToolError::Open(OpenError::InUse { .. }) => {
            CtlError::Conflict(format!("{error}; stop the daemon first"))
        }
        other => CtlError::Failed(chain(&other)),
    }
}
