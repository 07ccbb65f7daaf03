//! The few files that jobs make beside the store: saved memory and core dumps, below the state folder.
//! Blocking calls go to the blocking pool.

use crate::model::{Bytes, SafePath, Timestamp};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;

#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct FileError {
    path: SafePath,
    #[source]
    source: std::io::Error,
}

/// A file that was found, and when it was last written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub file: SafePath,
    pub modified: Timestamp,
}

/// Files that one list gives at most.
const MAX_FOUND: usize = 256;

/// Files as jobs use them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Files;

impl Files {
    pub async fn exists(&self, file: &SafePath) -> Result<bool, FileError> {
        Ok(self.size(file).await?.is_some())
    }

    /// `None`: there is no such file.
    pub async fn size(&self, file: &SafePath) -> Result<Option<Bytes>, FileError> {
        on(file, |path| match std::fs::symlink_metadata(path) {
            Ok(found) => Ok(found.is_file().then_some(Bytes(found.len()))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    /// Removes a file; one that is not there is removed already.
    pub async fn remove(&self, file: &SafePath) -> Result<(), FileError> {
        on(file, |path| match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
        .await
    }

    /// Files whose path begins so, in one folder: at most 256. A folder that is not there has none.
    pub async fn list(&self, start: &SafePath) -> Result<Vec<Found>, FileError> {
        on(start, |path| {
            let (Some(folder), Some(prefix)) = (path.parent(), path.file_name()) else { return Ok(vec![]) };
            let entries = match std::fs::read_dir(folder) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
                entries => entries?,
            };
            let mut found = Vec::new();
            for entry in entries {
                let entry = entry?;
                let name = entry.file_name();
                if name.as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
                    found.extend(found_at(&entry)?);
                }
                if found.len() == MAX_FOUND {
                    break;
                }
            }
            Ok(found)
        })
        .await
    }

    /// Makes the folder a file is to lie in, for us alone.
    pub async fn make_parent(&self, file: &SafePath) -> Result<(), FileError> {
        on(file, |path| match path.parent() {
            Some(parent) => std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent),
            None => Ok(()),
        })
        .await
    }
}

/// `None`: it is no plain file, or has gone meanwhile.
fn found_at(entry: &std::fs::DirEntry) -> std::io::Result<Option<Found>> {
    let about = match entry.metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        about => about?,
    };
    let Ok(file) = SafePath::parse(&entry.path().to_string_lossy()) else { return Ok(None) };
    let since = about.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let modified = Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    Ok(about.is_file().then_some(Found { file, modified }))
}

async fn on<T: Send + 'static>(
    file: &SafePath,
    work: impl FnOnce(&std::path::Path) -> std::io::Result<T> + Send + 'static,
) -> Result<T, FileError> {
    let path = std::path::PathBuf::from(file.as_str());
    let done = tokio::task::spawn_blocking(move || work(&path)).await;
    let done = done.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    done.map_err(|source| FileError { path: file.clone(), source })
}
