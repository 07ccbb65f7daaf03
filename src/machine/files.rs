//! The few files that jobs make beside the store: saved memory and core dumps, below the state folder.
//! Blocking calls go to the blocking pool.

use crate::model::{Bytes, SafePath};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;

#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct FileError {
    path: SafePath,
    #[source]
    source: std::io::Error,
}

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

    /// Makes the folder a file is to lie in, for us alone.
    pub async fn make_parent(&self, file: &SafePath) -> Result<(), FileError> {
        on(file, |path| match path.parent() {
            Some(parent) => std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent),
            None => Ok(()),
        })
        .await
    }
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
