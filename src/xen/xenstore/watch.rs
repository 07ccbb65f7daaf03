//! Watches as their owner sees them: a set of places to look at. A place that is in the set already stays there
//! once, so a guest that writes without pause costs one entry; when too many different places are waiting, the
//! set becomes "everything".

use super::client::Shared;
use super::runner::Command;
use super::{Result, StoreError, WatchPath};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// Places that one watcher may be behind by.
const MAX_WAITING: usize = 4096;
/// Paths of one watcher.
const MAX_PATHS: usize = 8192;

/// Where to look: at this path, or somewhere below it.
pub type Hint = crate::model::Hint<WatchPath>;

#[derive(Debug, Default)]
struct Waiting {
    order: VecDeque<WatchPath>,
    present: HashSet<WatchPath>,
    everything: bool,
}

/// What the runner has told and the watcher has not heard yet.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    more: Notify,
}

impl Queue {
    pub(super) fn tell(&self, hint: Hint) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match hint {
            Hint::At(_) if waiting.everything => return,
            Hint::At(path) if waiting.order.len() < MAX_WAITING => {
                if !waiting.present.insert(path.clone()) {
                    return;
                }
                waiting.order.push_back(path);
            }
            Hint::At(_) | Hint::Everything => {
                *waiting = Waiting { everything: true, ..Waiting::default() };
            }
        }
        self.more.notify_one();
    }

    fn take(&self) -> Option<Hint> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut waiting.everything) {
            return Some(Hint::Everything);
        }
        let path = waiting.order.pop_front()?;
        waiting.present.remove(&path);
        Some(Hint::At(path))
    }

    async fn next(&self) -> Hint {
        loop {
            if let Some(hint) = self.take() {
                return hint;
            }
            self.more.notified().await;
        }
    }
}

/// Some watched paths with one queue. Dropping it ends its watches.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    tokens: HashMap<WatchPath, u64>,
}

impl Watcher {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, queue: Arc::default(), tokens: HashMap::new() }
    }

    /// Watches a path too; it stays watched through reconnections. XenStore tells each path once at its
    /// registration, so a first hint comes by itself. The future may be dropped: the path is then not watched.
    pub async fn add(&mut self, path: impl Into<WatchPath>) -> Result<()> {
        let path = path.into();
        if self.tokens.contains_key(&path) {
            return Ok(());
        }
        let (token, asked) = self.ask_for(path.clone())?;
        asked.await?;
        self.tokens.insert(path, token);
        Ok(())
    }

    /// As [`Watcher::add`] for many paths, asked for all at once. Stops at the first that fails; those that
    /// were registered stay.
    pub async fn add_all(&mut self, paths: Vec<WatchPath>) -> Result<()> {
        let mut asked = Vec::new();
        for path in paths {
            if !self.tokens.contains_key(&path) {
                let (token, answer) = self.ask_for(path.clone())?;
                asked.push(async move { answer.await.map(|()| (path, token)) });
            }
        }
        let mut result = Ok(());
        for done in futures_util::future::join_all(asked).await {
            match done {
                Ok((path, token)) => {
                    self.tokens.insert(path, token);
                }
                Err(error) => result = Err(error),
            }
        }
        result
    }

    fn ask_for(&self, path: WatchPath) -> Result<(u64, impl Future<Output = Result<()>> + use<>)> {
        if self.tokens.len() >= MAX_PATHS {
            return Err(StoreError::TooMany { what: "watched paths", max: MAX_PATHS });
        }
        let token = self.shared.new_token();
        let shared = Arc::clone(&self.shared);
        let queue = Arc::downgrade(&self.queue);
        let asked = async move {
            let command = |reply| Command::Watch { path, token, queue, reply };
            shared.command(command).await.map(drop)
        };
        Ok((token, asked))
    }

    /// Ends one watch. Its hints may still come if they were on their way.
    pub async fn remove(&mut self, path: &WatchPath) -> Result<()> {
        let Some(token) = self.tokens.remove(path) else { return Ok(()) };
        self.shared.command(|reply| Command::Unwatch { token, reply }).await.map(drop)
    }

    pub fn is_watched(&self, path: &WatchPath) -> bool {
        self.tokens.contains_key(path)
    }

    /// The next hint. Waits without a deadline, as there may be none for a long time; may be dropped at any time
    /// without losing one.
    pub async fn next(&self) -> Hint {
        self.queue.next().await
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The runner holds the queue weakly, and looks which ones are gone.
        self.queue = Arc::default();
        self.shared.reap();
    }
}

#[cfg(test)]
mod tests {
    use super::super::StorePath;
    use super::*;

    fn at(n: usize) -> Hint {
        Hint::At(StorePath::of_domain(0, &format!("k{n}")).unwrap().into())
    }

    #[tokio::test]
    async fn a_path_that_changes_a_thousand_times_is_told_once_and_in_turn() {
        let queue = Queue::default();
        for _ in 0..1000 {
            queue.tell(at(1));
            queue.tell(at(2));
        }
        assert_eq!((queue.next().await, queue.next().await), (at(1), at(2)));
        assert_eq!(queue.take(), None);
        queue.tell(at(1));
        assert_eq!(queue.next().await, at(1), "what changes after the look is told again");
    }

    #[tokio::test]
    async fn a_watcher_too_far_behind_is_told_to_look_at_everything() {
        let queue = Queue::default();
        (0..MAX_WAITING * 2).for_each(|n| queue.tell(at(n)));
        assert_eq!(queue.next().await, Hint::Everything);
        assert_eq!(queue.take(), None);
    }
}
