//! Telling observers of domains, bounded: each has a small set of domains to look at, in which doubles melt
//! together; when the set is full it becomes "everything". A slow reader loses nothing for good.

use crate::xen::{DomId, Observation};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Notify, mpsc};

/// Domains that one observer may be behind by.
const MAX_PENDING: usize = 256;
/// What lies in the channel beyond that, where nothing melts any more.
const CHANNEL: usize = 1;

#[derive(Debug, Default)]
struct Pending {
    domains: BTreeSet<DomId>,
    everything: bool,
}

impl Pending {
    fn add(&mut self, observation: Observation) {
        match observation {
            Observation::Domain(_) if self.everything => {}
            Observation::Domain(domid) if self.domains.len() < MAX_PENDING => {
                self.domains.insert(domid);
            }
            Observation::Domain(_) | Observation::Everything => {
                self.domains.clear();
                self.everything = true;
            }
        }
    }

    fn take(&mut self) -> Option<Observation> {
        if std::mem::take(&mut self.everything) {
            return Some(Observation::Everything);
        }
        self.domains.pop_first().map(Observation::Domain)
    }
}

#[derive(Debug, Default)]
struct Observer {
    pending: Mutex<Pending>,
    more: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Observers {
    all: Mutex<Vec<Arc<Observer>>>,
}

impl Observers {
    pub(super) fn tell(&self, observation: &Observation) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // One whose pump has ended is held by us alone.
        all.retain(|observer| Arc::strong_count(observer) > 1);
        for observer in all.iter() {
            observer.pending.lock().unwrap_or_else(PoisonError::into_inner).add(observation.clone());
            observer.more.notify_one();
        }
    }

    /// Observations from now on, until the receiver is dropped.
    pub(super) fn observe(&self, runtime: &tokio::runtime::Handle) -> mpsc::Receiver<Observation> {
        let (tx, rx) = mpsc::channel(CHANNEL);
        let observer = Arc::new(Observer::default());
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&observer));
        runtime.spawn(async move {
            tokio::select! {
                () = pump(&observer, &tx) => {}
                () = tx.closed() => {}
            }
        });
        rx
    }
}

async fn pump(observer: &Observer, tx: &mpsc::Sender<Observation>) {
    loop {
        // Room first: what is not taken yet still melts together.
        let Ok(room) = tx.reserve().await else { return };
        let next = loop {
            let next = observer.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
            match next {
                Some(next) => break next,
                None => observer.more.notified().await,
            }
        };
        room.send(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_observer_is_told_to_look_at_everything_and_nothing_grows() {
        let observers = Observers::default();
        let mut rx = observers.observe(&tokio::runtime::Handle::current());
        (0..100_000).for_each(|domid| observers.tell(&Observation::Domain(DomId(domid))));
        assert_eq!(rx.recv().await, Some(Observation::Everything));
        observers.tell(&Observation::Domain(DomId(7)));
        assert_eq!(rx.recv().await, Some(Observation::Domain(DomId(7))));
    }

    #[tokio::test]
    async fn an_observer_that_went_away_is_forgotten() {
        let observers = Observers::default();
        drop(observers.observe(&tokio::runtime::Handle::current()));
        while !observers.all.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
            observers.tell(&Observation::Everything);
        }
    }
}
