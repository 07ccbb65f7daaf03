//! The way back of a change: after a failure, after a crash, after a reboot, and once more when it was blocked.

use super::document::write_document;
use super::{
    Confirmed, Ending, NETWORK, OPEN, OnFailure, Open, Operations, PAST, Past, Result, kernel_fault,
    store_fault, told,
};
use crate::event::{Event, Kind, kind};
use crate::job::{JobFault, Options as JobOptions, Outcome, StepContext};
use crate::model::network::NetworkView;
use crate::model::{EventNumber, JobId, Timestamp};
use crate::network::{Desired, Scope, aim, back, is_there, plan};
use crate::store::Txn;
use std::sync::PoisonError;
use std::time::Duration;
use tokio::time::Instant;

/// A rollback that meets a refusal tries on for so long before it is called blocked.
const TRY_FOR: Duration = Duration::from_secs(20);
/// Types of events.
pub(super) const FAILED: Kind = kind::NETWORK_OPERATION_FAILED;
const BLOCKED: Kind = kind::NETWORK_ROLLBACK_BLOCKED;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Operations {
    /// Undoes a change: tells it, rolls back (or keeps), has the network discovered, and closes the change.
    pub(in crate::operation) async fn undo_network(&self, context: &StepContext) -> Result<Outcome> {
        let Some(mut open) = self.network_of(context.job).await? else { return Ok(Outcome::done()) };
        let why = self.why_failed(context.job).await;
        open.why = Some(why.clone());
        let text = format!("the change of the network by job {} failed: {why}", context.job);
        // A log that cannot be written keeps nobody cut off: first the way back, then the complaint.
        let told = self.tell(&mut open, FAILED, text).await;
        let went_back = *self.network_back.lock().unwrap_or_else(PoisonError::into_inner) == Some(open.job);
        let kept = !went_back && self.is_kept(&open, &why).await;
        let back = if kept { Ok(()) } else { self.roll_back(&open).await };
        self.discover_below(&open, Some(told?), context).await;
        if let Err(fault) = back {
            self.tell_blocked(open, &fault).await;
            return Err(fault);
        }
        let mut outcome = Outcome::done();
        self.close_failed(&open, kept, context, &mut outcome.writes).await?;
        Ok(outcome)
    }

    /// The event that tells this of the change: told now, and once, also by an agent that dies on the way.
    async fn tell(&self, open: &mut Open, kind: Kind, text: String) -> Result<EventNumber> {
        if let Some(number) = self.told(open, kind).await? {
            return Ok(number);
        }
        let after = if kind == FAILED { &mut open.told_after } else { &mut open.blocked_after };
        *after = Some(self.events.last());
        self.keep_known(None);
        let mut note = Txn::essential();
        write_document(&mut note, &OPEN, open);
        let event = Event::new(kind, "network", text).with_job(open.job);
        self.events.publish_with(&event, note).await.map_err(|e| store_fault(&e))
    }

    /// That event, if it was told.
    pub(super) async fn told(&self, open: &Open, kind: Kind) -> Result<Option<EventNumber>> {
        let after = if kind == FAILED { open.told_after } else { open.blocked_after };
        match after {
            Some(after) => self.events.find(after, kind, Some(open.job)).await.map_err(|e| store_fault(&e)),
            None => Ok(None),
        }
    }

    /// Whether what worked may stay: it was asked for, the kernel is who failed, nobody waits to see whether he is cut off,
    /// and nobody is.
    async fn is_kept(&self, open: &Open, why: &str) -> bool {
        if !why.starts_with("NETWORK_")
            || open.options.on_failure != OnFailure::Keep
            || open.options.confirm_within_s.is_some()
        {
            return false;
        }
        let Ok(now) = self.kernel.network().await else { return false };
        if is_there(&now, &open.snapshot, &open.scope()) {
            // Nothing of it is left to be kept.
            return false;
        }
        open.options.may_cut_management
            || self.cut_off((&open.before, &open.after), &open.snapshot, &now, open.caller).is_none()
    }

    async fn why_failed(&self, job: JobId) -> String {
        let record = match self.engine() {
            Some(engine) => engine.get(job).await.ok().flatten(),
            None => None,
        };
        let fault = record.and_then(|record| record.fault.as_ref().map(ToString::to_string));
        fault.unwrap_or_else(|| "it was not finished".to_owned())
    }

    /// What failed goes back at once, before anything is written: a disk that is full or broken keeps nobody cut off. What
    /// this leaves, the undo of the job does and tells.
    pub(super) async fn back_at_once(&self, open: &Open, fault: &JobFault) {
        if self.is_kept(open, &fault.name).await {
            return;
        }
        *self.network_back.lock().unwrap_or_else(PoisonError::into_inner) = Some(open.job);
        let (declared, scope) = (&open.before.desired, open.scope());
        let snapshot = (!self.has_rebooted(open).await.unwrap_or(true)).then_some(&open.snapshot);
        match self.once(declared, snapshot, &scope).await {
            Ok(None) => {}
            Ok(Some(left)) => {
                tracing::warn!(job_id = %open.job, left, "not all of a change went back at once")
            }
            Err(error) => tracing::warn!(job_id = %open.job, %error, "a change did not go back at once"),
        }
    }

    async fn has_rebooted(&self, open: &Open) -> Result<bool> {
        Ok(open.boot_id != self.machine_boot_id().await?)
    }

    /// Brings back what the snapshot says; after a reboot, what was declared.
    pub(super) async fn roll_back(&self, open: &Open) -> Result<()> {
        let snapshot = (!self.has_rebooted(open).await?).then_some(&open.snapshot);
        self.try_for(&open.before.desired, snapshot, &open.scope()).await
    }

    /// Tries until the network is there or the time is up; goes round what is refused, since the rest is worth having.
    pub(super) async fn try_for(
        &self,
        declared: &Desired,
        snapshot: Option<&NetworkView>,
        scope: &Scope,
    ) -> Result<()> {
        let end = Instant::now() + TRY_FOR;
        let mut pause = FIRST_PAUSE;
        loop {
            let blocked = match self.once(declared, snapshot, scope).await {
                Ok(None) => return Ok(()),
                Ok(Some(words)) => words,
                Err(fault) => fault.to_string(),
            };
            if Instant::now() + pause >= end {
                return Err(JobFault::new("ROLLBACK_BLOCKED", blocked));
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    /// One round. `Some`: what stands in the way.
    async fn once(
        &self,
        declared: &Desired,
        snapshot: Option<&NetworkView>,
        scope: &Scope,
    ) -> Result<Option<String>> {
        let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        let target = |now: &NetworkView| match snapshot {
            Some(snapshot) => back(now, snapshot, scope),
            None => aim(now, declared, declared),
        };
        let mut refused = Vec::new();
        let changes = plan(&now, &target(&now), scope);
        let mut left = changes.as_slice();
        while let Err(stopped) = self.change_network(left).await {
            refused.push(format!("{}: {}", left[stopped.done], stopped.error));
            left = &left[stopped.done + 1..];
        }
        let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        let target = target(&now);
        if is_there(&now, &target, scope) {
            return Ok(None);
        }
        if refused.is_empty() {
            refused = told(crate::network::differences(&now, &target, scope));
        }
        Ok(Some(told(refused).join("; ")))
    }

    /// As a child, under our locks: what was touched stays locked until it is known what is there. `told` is acknowledged
    /// then.
    pub(super) async fn discover_below(&self, open: &Open, told: Option<EventNumber>, context: &StepContext) {
        let plan = super::discover::discover(told, Some(open.job));
        let submission = self.submission("network_discover", "agent", plan, JobOptions::default());
        if let Err(fault) = context.child("discover", submission).await {
            tracing::warn!(job_id = %context.job, %fault, "the network was not discovered after a failure");
        }
    }

    /// Once, and acknowledged when it is over.
    pub(super) async fn tell_blocked(&self, mut open: Open, fault: &JobFault) {
        let text = format!(
            "the rollback of job {} is blocked ({}); it is tried again and again, and at the next start, and no other \
             change of the network is begun before",
            open.job, fault.text,
        );
        if let Err(fault) = self.tell(&mut open, BLOCKED, text).await {
            tracing::error!(%fault, "a blocked rollback was not told");
        }
    }

    pub(super) async fn close_failed(
        &self,
        open: &Open,
        kept: bool,
        context: &StepContext,
        writes: &mut Txn,
    ) -> Result<()> {
        if kept {
            let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
            let desired = crate::network::settled::settled(&open.before.desired, &open.after.desired, &now);
            let kept = Confirmed { desired, meta: open.after.meta.clone(), ..open.after.clone() };
            write_document(writes, &NETWORK, &kept);
        }
        self.close_open(open, writes).await?;
        if let Some(blocked) = self.told(open, BLOCKED).await? {
            let by = format!("rollback done, job {}", context.job);
            self.events.acknowledge(&[blocked], &by).await.map_err(|e| store_fault(&e))?;
        }
        let ending = match (kept, context.job == open.job) {
            (true, _) => Ending::Kept,
            (false, true) => Ending::RolledBack,
            (false, false) => Ending::Restored,
        };
        let past = Past {
            at: Timestamp::now(),
            job: open.job,
            caller: open.by.clone(),
            verb: open.verb.clone(),
            ending,
            changes: told(plan(&open.snapshot, &open.aim, &open.scope())),
            why: open.why.clone(),
        };
        writes.append(&PAST, &past);
        Ok(())
    }
}
