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
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

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
    pub(super) disk: Arc<Disk>,
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

/// What was last known of the store's folder. A scrape reads that and does not touch the disk, which may hang.
pub(super) struct Disk {
    folder: PathBuf,
    /// What its files take.
    bytes: Mutex<Option<u64>>,
    rows: Mutex<Option<Vec<(String, u64)>>>,
}

impl Disk {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), bytes: Mutex::default(), rows: Mutex::default() }
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

    /// As last measured; `None`: it could not be, or was not yet.
    fn bytes(&self) -> Option<u64> {
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures at once and then again and again, until `stop`. One that hangs is waited for: it holds one thread, and no
    /// other is begun.
    pub(super) async fn measure(self: Arc<Self>, stop: CancellationToken) {
        self.measure_by(taken, stop).await;
    }

    async fn measure_by<L>(&self, look: L, stop: CancellationToken)
    where
        L: Fn(&Path) -> Option<u64> + Send + Sync + 'static,
    {
        let look = Arc::new(look);
        let mut ticks = tokio::time::interval(SIZE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let measuring = async {
            loop {
                ticks.tick().await;
                let (folder, look) = (self.folder.clone(), Arc::clone(&look));
                let looked = tokio::task::spawn_blocking(move || look(&folder)).await;
                *self.bytes.lock().unwrap_or_else(PoisonError::into_inner) = looked.ok().flatten();
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = measuring => {}
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

    #[tokio::test]
    async fn the_stores_folder_is_measured_with_what_is_below_it_and_not_at_a_scrape() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("db");
        std::fs::create_dir(&below).unwrap();
        std::fs::write(below.join("a"), vec![1; 1024 * 1024]).unwrap();
        assert!(taken(folder.path()).unwrap() >= 1024 * 1024);
        assert_eq!(taken(&folder.path().join("none")), None);
        let disk = Arc::new(Disk::new(folder.path()));
        assert_eq!(disk.bytes(), None, "it is not measured by who reads it");
        let stop = CancellationToken::new();
        let measuring = tokio::spawn(Arc::clone(&disk).measure(stop.clone()));
        let measured = async {
            while disk.bytes().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), measured).await.unwrap();
        assert_eq!(disk.bytes(), taken(folder.path()));
        stop.cancel();
        measuring.await.unwrap();
    }

    #[test]
    fn a_disk_that_hangs_holds_one_thread_and_the_last_value_is_read() {
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (gate, looks) = (Mutex::new(gate), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&looks);
        let look = move |_: &Path| {
            if counted.fetch_add(1, Ordering::SeqCst) > 0 {
                let _ = gate.lock().map(|gate| gate.recv());
            }
            Some(7)
        };
        let two = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
        two.unwrap().block_on(async {
            let disk = Arc::new(Disk::new(Path::new("/")));
            let (stop, measured) = (CancellationToken::new(), Arc::clone(&disk));
            let stopped = stop.clone();
            let measuring = tokio::spawn(async move { measured.measure_by(look, stopped).await });
            while disk.bytes().is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for _ in 0..3 {
                tokio::time::pause();
                tokio::time::advance(2 * SIZE_EVERY).await;
                tokio::time::resume();
                while looks.load(Ordering::SeqCst) < 2 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            let other = tokio::task::spawn_blocking(|| ());
            let free = tokio::time::timeout(Duration::from_secs(10), other).await.is_ok();
            let (told, looked) = (disk.bytes(), looks.load(Ordering::SeqCst));
            drop(release);
            assert_eq!((free, told, looked), (true, Some(7), 2));
            stop.cancel();
            measuring.await.unwrap();
        });
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
