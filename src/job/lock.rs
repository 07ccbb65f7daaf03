//! The lock table: which job holds which object, who waits behind it. Pure: no clock, no I/O.
//!
//! Each object has a queue in order of arrival. A job enters the queues of all its objects at one moment and
//! runs when it is in the *front* of all of them; the front of a queue is its first claim, with the shared
//! claims right behind it if that is shared. As every job arrives in all its queues at the same moment, of two
//! jobs one is before the other in every queue they share: no circle of waiting can form (no deadlock), and
//! nobody is overtaken on an object (no starvation).

use crate::model::JobId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, VecDeque};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    Shared,
    Exclusive,
}

/// A lock a job needs: `host`, `vm/<uuid>`, `repository/<uuid>`, `pool`, `network/…`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LockWant {
    pub object: String,
    pub mode: Mode,
}

impl LockWant {
    pub fn exclusive(object: impl Into<String>) -> Self {
        Self { object: object.into(), mode: Mode::Exclusive }
    }

    pub fn shared(object: impl Into<String>) -> Self {
        Self { object: object.into(), mode: Mode::Shared }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockState {
    Held,
    Waiting,
}

/// One line of `lock_list`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockView {
    pub object: String,
    pub mode: Mode,
    pub job: JobId,
    pub state: LockState,
}

#[derive(Debug, Default)]
struct Queue {
    claims: VecDeque<(JobId, Mode)>,
    /// How many claims from the first are in front.
    front: usize,
}

#[derive(Debug)]
struct Claimant {
    wants: Vec<LockWant>,
    /// In how many of its queues it is not in front yet.
    behind: usize,
}

#[derive(Debug, Default)]
pub struct LockTable {
    queues: BTreeMap<String, Queue>,
    jobs: HashMap<JobId, Claimant>,
}

impl LockTable {
    /// Puts a job into the queues of all its objects. `true`: it holds all its locks now.
    pub fn enqueue(&mut self, job: JobId, wants: &[LockWant]) -> bool {
        let wants = merged(wants);
        let mut behind = 0;
        for want in &wants {
            let queue = self.queues.entry(want.object.clone()).or_default();
            queue.claims.push_back((job, want.mode));
            let advanced = queue.advance();
            debug_assert!(advanced.iter().all(|j| *j == job));
            behind += usize::from(advanced.is_empty());
        }
        self.jobs.insert(job, Claimant { wants, behind });
        behind == 0
    }

    /// Takes a job out of all its queues, whether it held its locks or waited. Answers the jobs that hold all
    /// theirs now and did not before, in order of arrival.
    pub fn release(&mut self, job: JobId) -> Vec<JobId> {
        let Some(claimant) = self.jobs.remove(&job) else { return Vec::new() };
        let mut granted = Vec::new();
        for want in &claimant.wants {
            let Some(queue) = self.queues.get_mut(&want.object) else { continue };
            queue.remove(job);
            for next in queue.advance() {
                if let Some(other) = self.jobs.get_mut(&next) {
                    other.behind -= 1;
                    if other.behind == 0 {
                        granted.push(next);
                    }
                }
            }
            if queue.claims.is_empty() {
                self.queues.remove(&want.object);
            }
        }
        granted.sort_unstable();
        granted
    }

    pub fn holds(&self, job: JobId) -> bool {
        self.jobs.get(&job).is_some_and(|c| c.behind == 0)
    }

    /// Whether any job holds this object or waits for it.
    pub fn is_claimed(&self, object: &str) -> bool {
        self.queues.contains_key(object)
    }

    /// Everything held and waited for, by object, in order of arrival.
    pub fn view(&self) -> Vec<LockView> {
        let mut view = Vec::new();
        for (object, queue) in &self.queues {
            for (job, mode) in &queue.claims {
                let state = if self.holds(*job) { LockState::Held } else { LockState::Waiting };
                view.push(LockView { object: object.clone(), mode: *mode, job: *job, state });
            }
        }
        view
    }

    /// How many claims on objects belong to jobs that hold all theirs, and how many to jobs that wait.
    pub fn counts(&self) -> (usize, usize) {
        let all: usize = self.jobs.values().map(|claimant| claimant.wants.len()).sum();
        let held = self.jobs.values().filter(|claimant| claimant.behind == 0).map(|c| c.wants.len()).sum();
        (held, all - held)
    }

    /// What a waiting job waits for: each object where it is not in front, and the job first in that queue.
    pub fn waiting_for(&self, job: JobId) -> Vec<(String, JobId)> {
        let Some(claimant) = self.jobs.get(&job) else { return Vec::new() };
        let mut list = Vec::new();
        for want in &claimant.wants {
            let Some(queue) = self.queues.get(&want.object) else { continue };
            let position = queue.claims.iter().position(|(j, _)| *j == job);
            if let (Some(position), Some((first, _))) = (position, queue.claims.front())
                && position >= queue.front
            {
                list.push((want.object.clone(), *first));
            }
        }
        list
    }

    pub fn is_empty(&self) -> bool {
        self.queues.is_empty() && self.jobs.is_empty()
    }
}

impl Queue {
    /// Moves the end of the front as far as it may go; answers who came into it.
    fn advance(&mut self) -> Vec<JobId> {
        let mut came = Vec::new();
        while let Some((job, mode)) = self.claims.get(self.front) {
            let fits = match self.claims.front() {
                _ if self.front == 0 => true,
                Some((_, first)) => *first == Mode::Shared && *mode == Mode::Shared,
                None => false,
            };
            if !fits {
                break;
            }
            came.push(*job);
            self.front += 1;
        }
        came
    }

    fn remove(&mut self, job: JobId) {
        if let Some(position) = self.claims.iter().position(|(j, _)| *j == job) {
            self.claims.remove(position);
            if position < self.front {
                self.front -= 1;
            }
        }
    }
}

/// One want an object, exclusive if any asked so, in order of the object's name.
fn merged(wants: &[LockWant]) -> Vec<LockWant> {
    let mut by_object: BTreeMap<&str, Mode> = BTreeMap::new();
    for want in wants {
        let mode = by_object.entry(&want.object).or_insert(want.mode);
        *mode = (*mode).max(want.mode);
    }
    by_object.into_iter().map(|(object, mode)| LockWant { object: object.to_owned(), mode }).collect()
}

/// Whether holding `held` allows what `want` asks. `host` held exclusively allows everything, since every job
/// takes `host` at least shared.
pub(super) fn covers(held: &[LockWant], want: &LockWant) -> bool {
    held.iter().any(|h| {
        h.mode >= want.mode && (h.object == want.object || (h.object == "host" && h.mode == Mode::Exclusive))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn job(n: u64) -> JobId {
        JobId(n)
    }

    #[test]
    fn an_exclusive_lock_is_held_by_one_and_passed_on_in_order() {
        let mut table = LockTable::default();
        assert!(table.enqueue(job(1), &[LockWant::exclusive("vm/a")]));
        assert!(!table.enqueue(job(2), &[LockWant::exclusive("vm/a")]));
        assert!(!table.enqueue(job(3), &[LockWant::exclusive("vm/a")]));
        assert_eq!(table.waiting_for(job(3)), vec![("vm/a".to_owned(), job(1))]);
        assert_eq!(table.release(job(1)), vec![job(2)]);
        assert_eq!(table.release(job(2)), vec![job(3)]);
        assert!(table.release(job(3)).is_empty());
        assert!(table.is_empty());
    }

    #[test]
    fn shared_locks_are_held_together_and_do_not_overtake_an_exclusive_one() {
        let mut table = LockTable::default();
        assert!(table.enqueue(job(1), &[LockWant::shared("host")]));
        assert!(table.enqueue(job(2), &[LockWant::shared("host")]));
        assert!(!table.enqueue(job(3), &[LockWant::exclusive("host")]));
        assert!(!table.enqueue(job(4), &[LockWant::shared("host")]));
        assert!(table.release(job(1)).is_empty());
        assert_eq!(table.release(job(2)), vec![job(3)]);
        assert_eq!(table.release(job(3)), vec![job(4)]);
    }

    #[test]
    fn a_waiter_that_leaves_lets_those_behind_it_pass() {
        let mut table = LockTable::default();
        table.enqueue(job(1), &[LockWant::shared("host")]);
        table.enqueue(job(2), &[LockWant::exclusive("host")]);
        table.enqueue(job(3), &[LockWant::shared("host")]);
        assert_eq!(table.release(job(2)), vec![job(3)]);
    }

    proptest! {
        /// Random jobs on a few objects: whoever holds is compatible with every other holder, someone always
        /// holds while anyone waits, and when all have ended the table is empty.
        #[test]
        fn no_two_holders_clash_and_somebody_can_always_go_on(
            jobs in prop::collection::vec(prop::collection::vec((0..4_u8, any::<bool>()), 1..4), 1..40),
            ends in prop::collection::vec(any::<prop::sample::Index>(), 80),
        ) {
            let mut table = LockTable::default();
            let mut open: Vec<u64> = Vec::new();
            let mut holding: std::collections::BTreeSet<u64> = Default::default();
            let mut ends = ends.into_iter();
            for (n, wants) in jobs.iter().enumerate() {
                let wants: Vec<_> = wants.iter().map(|(o, x)| LockWant {
                    object: format!("vm/{o}"), mode: if *x { Mode::Exclusive } else { Mode::Shared },
                }).collect();
                let n = n as u64;
                open.push(n);
                if table.enqueue(job(n), &wants) { holding.insert(n); }
                if n.is_multiple_of(2) && let Some(index) = ends.next() {
                    let gone = *index.get(&open);
                    open.retain(|j| *j != gone);
                    holding.remove(&gone);
                    for j in table.release(job(gone)) { prop_assert!(holding.insert(j.0)); }
                }
                let view = table.view();
                for a in &view { for b in &view {
                    if a.job != b.job && a.object == b.object && a.state == LockState::Held && b.state == LockState::Held {
                        prop_assert!(a.mode == Mode::Shared && b.mode == Mode::Shared);
                    }
                }}
                prop_assert!(open.is_empty() || !holding.is_empty());
                for j in &open { prop_assert_eq!(holding.contains(j), table.holds(job(*j))); }
            }
            while let Some(first) = holding.iter().next().copied() {
                holding.remove(&first);
                open.retain(|j| *j != first);
                for j in table.release(job(first)) { holding.insert(j.0); }
            }
            prop_assert!(open.is_empty(), "waiting for ever: {:?}", open);
            prop_assert!(table.is_empty());
        }
    }
}
