//! A bell: who hears it looks again. It melts: of many rings one waits until it is heard.

use std::sync::{Mutex, PoisonError};
use tokio::sync::mpsc;

#[derive(Debug)]
pub(super) struct Bell<T> {
    listeners: Mutex<Vec<mpsc::Sender<T>>>,
}

impl<T> Default for Bell<T> {
    fn default() -> Self {
        Self { listeners: Mutex::default() }
    }
}

impl<T: Copy> Bell<T> {
    /// Rings from now on, until the receiver is dropped.
    pub(super) fn listen(&self) -> mpsc::Receiver<T> {
        let (tx, rx) = mpsc::channel(1);
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(tx);
        rx
    }

    pub(super) fn ring(&self, sound: T) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        // Full: one waits already.
        listeners.retain(|one| !matches!(one.try_send(sound), Err(mpsc::error::TrySendError::Closed(_))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_rings_one_waits_and_who_went_away_is_forgotten() {
        let bell = Bell::default();
        let mut heard = bell.listen();
        drop(bell.listen());
        (0..1000).for_each(|_| bell.ring(7));
        assert_eq!((heard.try_recv(), heard.try_recv().ok()), (Ok(7), None));
        assert_eq!(bell.listeners.lock().unwrap().len(), 1);
        bell.ring(8);
        assert_eq!(heard.try_recv(), Ok(8));
    }
}
