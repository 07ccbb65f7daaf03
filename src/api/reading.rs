//! Reading the world for callers who need it fresh, without making them wait for a toolstack that hangs.
//!
//! Many callers cause one reading; each waits for it until it is two seconds old and then makes do with what was
//! last seen. The reading is a task of its own: whoever hangs up does not end it, and when it comes, late, it is
//! still put where it belongs. A reading that failed is not tried again at once either.

use futures_util::future::{BoxFuture, FutureExt, Shared};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long a caller waits for a reading, from the reading's begin.
const PATIENCE: Duration = Duration::from_secs(2);

/// One thing to read, again and again.
#[derive(Default)]
pub(super) struct Reading {
    turn: Arc<Mutex<Turn>>,
}

#[derive(Default)]
struct Turn {
    /// When the last one ended, well or not.
    ended: Option<Instant>,
    under_way: Option<(Instant, Shared<BoxFuture<'static, ()>>)>,
}

impl Reading {
    /// Returns when a reading no older than `age` has ended, or one that is under way has taken too long.
    /// `read` is called if none is under way.
    pub(super) async fn wait<F>(&self, age: Duration, read: impl FnOnce() -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if let Some((since, reading)) = self.join(age, read) {
            let _ = timeout_at(since + PATIENCE, reading).await;
        }
    }

    /// When the last reading ended.
    pub(super) fn ended(&self) -> Option<Instant> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner).ended
    }

    fn join<F>(
        &self,
        age: Duration,
        read: impl FnOnce() -> F,
    ) -> Option<(Instant, Shared<BoxFuture<'static, ()>>)>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if turn.under_way.is_some() {
            return turn.under_way.clone();
        }
        if turn.ended.is_some_and(|at| at.elapsed() < age) {
            return None;
        }
        let (read, done) = (read(), Arc::clone(&self.turn));
        // The turn ends with the task even if the reading panics.
        let task = tokio::spawn(async move {
            let _over = Over(done);
            read.await;
        });
        turn.under_way = Some((Instant::now(), task.map(|_| ()).boxed().shared()));
        turn.under_way.clone()
    }
}

struct Over(Arc<Mutex<Turn>>);

impl Drop for Over {
    fn drop(&mut self) {
        let mut turn = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *turn = Turn { ended: Some(Instant::now()), under_way: None };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    const AGE: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn callers_of_a_hung_toolstack_wait_two_seconds_together_and_not_one_after_the_other() {
        let reading = Reading::default();
        let count = Arc::new(AtomicU32::new(0));
        let hang = || {
            let count = Arc::clone(&count);
            async move {
                tokio::time::sleep(Duration::from_secs(60)).await;
                count.fetch_add(1, SeqCst);
            }
        };
        let start = Instant::now();
        futures_util::future::join_all((0..50).map(|_| reading.wait(AGE, hang))).await;
        assert_eq!(start.elapsed(), PATIENCE);
        // Who comes later does not wait for what is late already, and causes no second one.
        reading.wait(AGE, hang).await;
        assert_eq!(start.elapsed(), PATIENCE);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(count.load(SeqCst), 1, "the late reading is used when it comes");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reading_is_made_again_only_when_the_last_one_is_too_old() {
        let reading = Reading::default();
        let count = Arc::new(AtomicU32::new(0));
        let read = || {
            count.fetch_add(1, SeqCst);
            async {}
        };
        for _ in 0..3 {
            reading.wait(AGE, read).await;
        }
        assert_eq!(count.load(SeqCst), 1);
        tokio::time::sleep(AGE).await;
        reading.wait(AGE, read).await;
        assert_eq!(count.load(SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reading_that_panics_is_over() {
        let reading = Reading::default();
        reading.wait(AGE, || async { panic!("in a test") }).await;
        tokio::time::sleep(AGE).await;
        let count = AtomicU32::new(0);
        reading
            .wait(AGE, || {
                count.fetch_add(1, SeqCst);
                async {}
            })
            .await;
        assert_eq!(count.load(SeqCst), 1);
    }
}
