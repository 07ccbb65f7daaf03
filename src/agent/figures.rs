//! Brings together what monitoring reads: every room's figures, each taken from memory.

use crate::job::Engine;
use crate::metrics::{self, Delivery, EventCounts, Figures, Source, lag, process};
use crate::model::Timestamp;
use crate::model::histogram::Calls;
use crate::operation::Operations;
use crate::stats::Sweep;
use crate::store::Store;
use crate::wire::{Metrics, Server};
use crate::{event, store};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the disk is asked how much the store takes.
const SIZE_EVERY: Duration = Duration::from_secs(60);
/// Files of the store's folder that are looked at; there are some twenty.
const MAX_FILES: usize = 4096;

pub(super) struct Sources {
    pub(super) operations: Arc<Operations>,
    pub(super) engine: Engine,
    pub(super) store: Store,
    pub(super) calls: Arc<Calls>,
    pub(super) wire: Arc<Metrics>,
    /// Connections open now.
    pub(super) connections: Box<dyn Fn() -> usize + Send + Sync>,
    pub(super) lag: Arc<lag::Meter>,
    pub(super) disk: Disk,
    pub(super) started: Timestamp,
    pub(super) newest: Newest,
}

/// What other rooms tell of late.
pub(super) struct Newest {
    pub(super) sweep: Box<dyn Fn() -> Option<Arc<Sweep>> + Send + Sync>,
    pub(super) delivery: Box<dyn Fn() -> Vec<Delivery> + Send + Sync>,
    /// Open alerts by severity.
    pub(super) alerts: Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>,
}

impl Source for Sources {
    fn figures(&self) -> Figures {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let store = self.disk.remember(self.store.figures());
        let kept = store.rows.iter().flatten().find(|(table, _)| table == event::TABLE);
        let events = EventCounts {
            last_number: self.operations.events.last().0,
            kept: kept.map(|(_, rows)| *rows),
            open: (self.newest.alerts)(),
        };
        let wire = metrics::Wire {
            open: (self.connections)() as u64,
            connections: count(&self.wire.connections),
            refused: count(&self.wire.connections_refused),
            timeouts: count(&self.wire.timeouts),
            unauthorized: count(&self.wire.unauthorized),
            calls: count(&self.wire.calls),
            faults: count(&self.wire.faults),
        };
        let states = self.operations.vms.states();
        Figures {
            sweep: (self.newest.sweep)(),
            vms: states.into_iter().map(|(state, vms)| (state.as_str(), vms)).collect(),
            jobs: self.engine.figures(),
            events,
            delivery: (self.newest.delivery)(),
            calls: self.calls.counted(),
            wire,
            store,
            store_bytes: self.disk.bytes(),
            kernel: self.operations.kernel.figures(),
            lag: self.lag.read(),
            process: process::read(self.started),
        }
    }
}

/// How many connections a server has, also when it is gone.
pub(super) fn connections(server: &Server) -> Box<dyn Fn() -> usize + Send + Sync> {
    Box::new(server.connection_counter())
}

/// What was last known of the store's folder.
pub(super) struct Disk {
    folder: PathBuf,
    size: Mutex<Option<(Instant, Option<u64>)>>,
    rows: Mutex<Option<Vec<(String, u64)>>>,
}

impl Disk {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), size: Mutex::default(), rows: Mutex::default() }
    }

    /// The rows as they were before the group that is being written, if one is.
    fn remember(&self, mut figures: store::Figures) -> store::Figures {
        let mut known = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        match &figures.rows {
            Some(rows) => known.clone_from(&Some(rows.clone())),
            None => figures.rows.clone_from(&known),
        }
        figures
    }

    /// Called on a thread that may block.
    fn bytes(&self) -> Option<u64> {
        let mut size = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        match &*size {
            Some((at, bytes)) if at.elapsed() < SIZE_EVERY => *bytes,
            _ => {
                let bytes = taken(&self.folder);
                *size = Some((Instant::now(), bytes));
                bytes
            }
        }
    }
}

/// What the files of a folder and of those below it take on disk.
fn taken(folder: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let (mut folders, mut bytes, mut files) = (vec![folder.to_owned()], 0, 0);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).ok()?.flatten() {
            files += 1;
            if files > MAX_FILES {
                return None;
            }
            // One that is gone meanwhile takes nothing. Links are not followed.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                folders.push(entry.path());
            }
            bytes += meta.blocks() * 512;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stores_folder_is_measured_with_what_is_below_it_and_not_at_each_scrape() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("db");
        std::fs::create_dir(&below).unwrap();
        std::fs::write(below.join("a"), vec![1; 1024 * 1024]).unwrap();
        let disk = Disk::new(folder.path());
        let first = disk.bytes().unwrap();
        assert!(first >= 1024 * 1024, "{first}");
        std::fs::write(below.join("b"), vec![1; 1024 * 1024]).unwrap();
        assert_eq!(disk.bytes(), Some(first));
        assert_eq!(Disk::new(&folder.path().join("none")).bytes(), None);
    }

    #[test]
    fn rows_stay_known_while_a_group_is_being_written() {
        let disk = Disk::new(Path::new("/"));
        let figures = Store::memory().figures();
        let rows = Some(vec![("event".to_owned(), 7)]);
        disk.remember(store::Figures { rows: rows.clone(), ..figures.clone() });
        assert_eq!(disk.remember(store::Figures { rows: None, ..figures }).rows, rows);
    }
}
