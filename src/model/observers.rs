//! Telling observers where to look, bounded: each has a small set of things to look at, in which doubles melt together;
//! when the set is full it becomes "everything". So a slow reader costs a bounded amount and loses nothing for good.
//!
//! What things are is the user's: domains here, links there.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Notify, mpsc};

/// Things that one observer may be behind by.
const MAX_PENDING: usize = 256;
/// What lies in the channel beyond that, where nothing melts any more.
const CHANNEL: usize = 1;

/// Says where to look, and not what is there.
pub trait Hint: Sized + Send + 'static {
    type Thing: Ord + Copy + Send;
    /// Look at this thing.
    fn at(thing: Self::Thing) -> Self;
    /// Some hints were lost: look at everything.
    fn everything() -> Self;
    /// `None`: everything.
    fn thing(self) -> Option<Self::Thing>;
}

#[derive(Debug)]
struct Pending<T> {
    things: BTreeSet<T>,
    everything: bool,
}

impl<T: Ord> Pending<T> {
    fn add(&mut self, thing: Option<T>) {
        match thing {
            Some(_) if self.everything => {}
            Some(thing) if self.things.len() < MAX_PENDING => {
                self.things.insert(thing);
            }
            Some(_) | None => {
                self.things.clear();
                self.everything = true;
            }
        }
    }

    /// `Some(None)`: everything.
    fn take(&mut self) -> Option<Option<T>> {
        if std::mem::take(&mut self.everything) {
            return Some(None);
        }
        self.things.pop_first().map(Some)
    }
}

#[derive(Debug)]
struct Observer<T> {
    pending: Mutex<Pending<T>>,
    more: Notify,
}

/// All who observe one source of hints.
#[derive(Debug)]
pub struct Observers<H: Hint> {
    all: Mutex<Vec<Arc<Observer<H::Thing>>>>,
}

impl<H: Hint> Default for Observers<H> {
    fn default() -> Self {
        Self { all: Mutex::default() }
    }
}

impl<H: Hint> Observers<H> {
    pub fn tell(&self, hint: H) {
        let thing = hint.thing();
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // One whose pump has ended is held by us alone.
        all.retain(|observer| Arc::strong_count(observer) > 1);
        for observer in all.iter() {
            observer.pending.lock().unwrap_or_else(PoisonError::into_inner).add(thing);
            observer.more.notify_one();
        }
    }

    /// Hints from now on, as the observer takes them, until the receiver is dropped.
    pub fn observe<T>(&self, runtime: &tokio::runtime::Handle) -> mpsc::Receiver<T>
    where
        T: From<H> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(CHANNEL);
        let pending = Mutex::new(Pending { things: BTreeSet::new(), everything: false });
        let observer = Arc::new(Observer { pending, more: Notify::new() });
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&observer));
        runtime.spawn(async move {
            tokio::select! {
                () = pump::<H, T>(&observer, &tx) => {}
                () = tx.closed() => {}
            }
        });
        rx
    }
}

async fn pump<H: Hint, T: From<H>>(observer: &Observer<H::Thing>, tx: &mpsc::Sender<T>) {
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
        room.send(next.map_or_else(H::everything, H::at).into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Look at this number; `None`: at all.
    #[derive(Debug, PartialEq, Eq)]
    struct Look(Option<u32>);

    impl Hint for Look {
        type Thing = u32;
        fn at(thing: u32) -> Self {
            Self(Some(thing))
        }
        fn everything() -> Self {
            Self(None)
        }
        fn thing(self) -> Option<u32> {
            self.0
        }
    }

    #[tokio::test]
    async fn a_slow_observer_is_told_to_look_at_everything_and_nothing_grows() {
        let observers = Observers::default();
        let mut rx = observers.observe::<Look>(&tokio::runtime::Handle::current());
        (0..100_000).for_each(|number| observers.tell(Look(Some(number))));
        assert_eq!(rx.recv().await, Some(Look(None)));
        observers.tell(Look(Some(7)));
        assert_eq!(rx.recv().await, Some(Look(Some(7))));
    }

    #[tokio::test]
    async fn doubles_melt_together() {
        let observers = Observers::default();
        let mut rx = observers.observe::<Look>(&tokio::runtime::Handle::current());
        (0..1000).for_each(|_| observers.tell(Look(Some(7))));
        observers.tell(Look(Some(8)));
        assert_eq!((rx.recv().await, rx.recv().await), (Some(Look(Some(7))), Some(Look(Some(8)))));
    }

    #[tokio::test]
    async fn an_observer_that_went_away_is_forgotten() {
        let observers = Observers::default();
        drop(observers.observe::<Look>(&tokio::runtime::Handle::current()));
        while !observers.all.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
            observers.tell(Look(None));
        }
    }
}
