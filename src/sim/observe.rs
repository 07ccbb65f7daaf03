//! Telling observers, bounded: each has a small set of domains to look at, in which doubles melt together; when
//! the set is full it becomes "everything". So a slow reader costs a bounded amount and loses nothing for good.

use super::Observation;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Notify, mpsc};

/// Domains that one observer may be behind by.
const MAX_PENDING: usize = 256;
/// What lies in the channel beyond that; small, since what is there no longer melts together.
const CHANNEL: usize = 16;

#[derive(Debug, Default)]
struct Pending {
    domains: BTreeSet<u32>,
    everything: bool,
}

impl Pending {
    fn add(&mut self, observation: Observation) {
        match observation {
            Observation::Domain(domid) if !self.everything => {
                self.domains.insert(domid);
                if self.domains.len() > MAX_PENDING {
                    self.add(Observation::Everything);
                }
            }
            Observation::Domain(_) => {}
            Observation::Everything => {
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

/// All observers of one engine or connection.
#[derive(Debug, Default)]
pub(super) struct Hub {
    observers: Mutex<Vec<Arc<Observer>>>,
}

impl Hub {
    pub(super) fn tell(&self, observations: &[Observation]) {
        if observations.is_empty() {
            return;
        }
        let mut observers = self.observers.lock().unwrap_or_else(PoisonError::into_inner);
        // An observer whose pump has ended is held by us alone.
        observers.retain(|observer| Arc::strong_count(observer) > 1);
        for observer in observers.iter() {
            let mut pending = observer.pending.lock().unwrap_or_else(PoisonError::into_inner);
            observations.iter().for_each(|o| pending.add(*o));
            observer.more.notify_one();
        }
    }

    /// Observations from now on, until the receiver is dropped.
    pub(super) fn observe<T>(&self, runtime: &tokio::runtime::Handle) -> mpsc::Receiver<T>
    where
        T: From<Observation> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(CHANNEL);
        let observer = Arc::new(Observer::default());
        self.observers.lock().unwrap_or_else(PoisonError::into_inner).push(observer.clone());
        runtime.spawn(async move {
            tokio::select! {
                () = pump(&observer, &tx) => {}
                () = tx.closed() => {}
            }
        });
        rx
    }
}

async fn pump<T: From<Observation>>(observer: &Observer, tx: &mpsc::Sender<T>) {
    loop {
        let next = observer.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        match next {
            Some(observation) => {
                if tx.send(observation.into()).await.is_err() {
                    return;
                }
            }
            None => observer.more.notified().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_observer_is_told_to_look_at_everything_and_nothing_grows() {
        let hub = Hub::default();
        let mut rx = hub.observe::<Observation>(&tokio::runtime::Handle::current());
        for domid in 0..100_000 {
            hub.tell(&[Observation::Domain(domid)]);
        }
        let mut seen = Vec::new();
        while let Some(observation) = rx.recv().await {
            seen.push(observation);
            if observation == Observation::Everything {
                break;
            }
        }
        assert!(seen.len() <= MAX_PENDING + CHANNEL);
    }

    #[tokio::test]
    async fn an_observer_that_went_away_is_forgotten() {
        let hub = Hub::default();
        drop(hub.observe::<Observation>(&tokio::runtime::Handle::current()));
        while !hub.observers.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
            hub.tell(&[Observation::Everything]);
        }
    }
}
