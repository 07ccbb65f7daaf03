//! Telling observers where to look, bounded: each has a small set of things to look at, in which doubles melt together;
//! when the set is full it becomes "everything". So a slow reader costs a bounded amount and loses nothing for good.
//!
//! What things are is the user's: domains here, links there.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Notify, mpsc};

/// Things that one observer may be behind by.
const MAX_PENDING: usize = 256;
/// What lies in the channel beyond that, where nothing melts any more.
const CHANNEL: usize = 1;

/// Where to look, and not what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hint<T> {
    /// At this thing.
    At(T),
    /// At all things: some hints were lost, or whoever gives them has begun anew.
    Everything,
}

#[derive(Debug)]
struct Pending<T> {
    things: BTreeSet<T>,
    everything: bool,
}

impl<T: Ord> Pending<T> {
    fn add(&mut self, hint: Hint<T>) {
        match hint {
            Hint::At(_) if self.everything => {}
            Hint::At(thing) if self.things.len() < MAX_PENDING => {
                self.things.insert(thing);
            }
            Hint::At(_) | Hint::Everything => {
                self.things.clear();
                self.everything = true;
            }
        }
    }

    fn take(&mut self) -> Option<Hint<T>> {
        if std::mem::take(&mut self.everything) {
            return Some(Hint::Everything);
        }
        self.things.pop_first().map(Hint::At)
    }
}

#[derive(Debug)]
struct Observer<T> {
    pending: Mutex<Pending<T>>,
    more: Notify,
}

/// All who observe one source of hints.
#[derive(Debug)]
pub struct Observers<T> {
    all: Mutex<Vec<Arc<Observer<T>>>>,
}

impl<T> Default for Observers<T> {
    fn default() -> Self {
        Self { all: Mutex::default() }
    }
}

impl<T: Ord + Copy + Send + 'static> Observers<T> {
    pub fn tell(&self, hint: Hint<T>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // One whose pump has ended is held by us alone.
        all.retain(|observer| Arc::strong_count(observer) > 1);
        for observer in all.iter() {
            observer.pending.lock().unwrap_or_else(PoisonError::into_inner).add(hint);
            observer.more.notify_one();
        }
    }

    /// Hints from now on, as the observer takes them, until the receiver is dropped.
    pub fn observe<H>(&self, runtime: &tokio::runtime::Handle) -> mpsc::Receiver<H>
    where
        H: From<Hint<T>> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(CHANNEL);
        let pending = Mutex::new(Pending { things: BTreeSet::new(), everything: false });
        let observer = Arc::new(Observer { pending, more: Notify::new() });
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

async fn pump<T: Ord, H: From<Hint<T>>>(observer: &Observer<T>, tx: &mpsc::Sender<H>) {
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
        room.send(next.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_observer_is_told_to_look_at_everything_and_nothing_grows() {
        let observers = Observers::default();
        let mut rx = observers.observe::<Hint<u32>>(&tokio::runtime::Handle::current());
        (0..100_000).for_each(|number| observers.tell(Hint::At(number)));
        assert_eq!(rx.recv().await, Some(Hint::Everything));
        observers.tell(Hint::At(7));
        assert_eq!(rx.recv().await, Some(Hint::At(7)));
    }

    #[tokio::test]
    async fn doubles_melt_together() {
        let observers = Observers::default();
        let mut rx = observers.observe::<Hint<u32>>(&tokio::runtime::Handle::current());
        (0..1000).for_each(|_| observers.tell(Hint::At(7)));
        observers.tell(Hint::At(8));
        assert_eq!((rx.recv().await, rx.recv().await), (Some(Hint::At(7)), Some(Hint::At(8))));
    }

    #[tokio::test]
    async fn an_observer_that_went_away_is_forgotten() {
        let observers = Observers::default();
        drop(observers.observe::<Hint<u32>>(&tokio::runtime::Handle::current()));
        while !observers.all.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
            observers.tell(Hint::Everything);
        }
    }
}
