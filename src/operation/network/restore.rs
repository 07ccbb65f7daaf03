//! The way back: after a failure, after a crash, after a reboot, and once more when it was blocked.

use super::document::write_document;
use super::{
    Confirmed, Ending, NETWORK, OnFailure, Open, Operations, PAST, Past, Result, kernel_fault, locks,
    store_fault, told,
};
use crate::event::{Event, Severity};
use crate::job::{JobFault, Options as JobOptions, Outcome, StepContext};
use crate::model::network::NetworkView;
use crate::model::{JobId, Timestamp};
use crate::network::{Desired, Scope, aim, back, is_there, plan};
use crate::operation::plan::Plan;
use crate::operation::step::Step;
use crate::store::Txn;
use std::time::Duration;
use tokio::time::Instant;

/// A rollback that meets a refusal tries on for so long before it is called blocked.
const TRY_FOR: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Carries out a rollback that was blocked, or what is declared after the host's boot.
pub fn restore() -> Plan {
    Plan::new("bring the network back to what is declared", locks(), vec![Step::NetworkRestore {}])
        .essential()
}

impl Operations {
    /// Undoes a change: tells it, rolls back (or keeps), has the network discovered, and closes the change.
    pub(in crate::operation) async fn undo_network(&self, context: &StepContext) -> Result<Outcome> {
        let Some(mut open) = self.network_of(context.job).await? else { return Ok(Outcome::done()) };
        let why = self.why_failed(context.job).await;
        if open.told.is_none() {
            let text = format!("the change of the network by job {} failed: {why}", context.job);
            let event = Event::new("network.operation_failed", Severity::Error, "network", text)
                .with_job(context.job);
            open.told = Some(self.events.publish(&event).await.map_err(|e| store_fault(&e))?);
            self.write_open(&open).await?;
        }
        let kept = why.starts_with("NETWORK_") && self.may_be_kept(&open).await;
        let back = if kept { Ok(()) } else { self.roll_back(&open).await };
        self.discover_below(&open, context).await;
        if let Err(fault) = back {
            self.tell_blocked(open, &fault).await;
            return Err(fault);
        }
        let mut outcome = Outcome::done();
        self.close_failed(&open, kept, Some(why), context, &mut outcome.writes).await?;
        Ok(outcome)
    }

    /// Whether what worked may stay: it was asked for, nobody waits to see whether he is cut off, and nobody is.
    async fn may_be_kept(&self, open: &Open) -> bool {
        if open.options.on_failure != OnFailure::Keep || open.options.confirm_within_s.is_some() {
            return false;
        }
        let Ok(now) = self.kernel.network().await else { return false };
        open.options.may_cut_management
            || self.cut_off(&open.before, &open.snapshot, &now, open.caller).is_none()
    }

    async fn why_failed(&self, job: JobId) -> String {
        let record = match self.engine() {
            Some(engine) => engine.get(job).await.ok().flatten(),
            None => None,
        };
        let fault = record.and_then(|record| record.fault.as_ref().map(ToString::to_string));
        fault.unwrap_or_else(|| "it was not finished".to_owned())
    }

    /// Brings back what the snapshot says; after a reboot, what was declared.
    async fn roll_back(&self, open: &Open) -> Result<()> {
        let rebooted = open.boot_id != self.machine_boot_id().await?;
        let scope = open.scope();
        if rebooted {
            return self.try_for(&open.before.desired, None, &scope).await;
        }
        self.try_for(&open.before.desired, Some(&open.snapshot), &scope).await
    }

    /// Tries until the network is there or the time is up; goes round what is refused, since the rest is worth having.
    async fn try_for(&self, declared: &Desired, snapshot: Option<&NetworkView>, scope: &Scope) -> Result<()> {
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
        for change in plan(&now, &target(&now), scope) {
            if let Err(error) = self.kernel.change(&change).await {
                refused.push(format!("{change}: {error}"));
            }
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

    /// As a child, under our locks: what was touched stays locked until it is known what is there.
    async fn discover_below(&self, open: &Open, context: &StepContext) {
        let plan = super::discover::discover(open.told, Some(open.job));
        let submission = self.submission("network_discover", "agent", plan, JobOptions::default());
        if let Err(fault) = context.child("discover", submission).await {
            tracing::warn!(job = %context.job, %fault, "the network was not discovered after a failure");
        }
    }

    /// Once, and acknowledged when it is over.
    async fn tell_blocked(&self, mut open: Open, fault: &JobFault) {
        if open.blocked.is_some() {
            return;
        }
        let text = format!(
            "the rollback of job {} is blocked ({}); it is tried again every {} s and at the next start, and no other \
             change of the network is begun before",
            open.job,
            fault.text,
            super::look::RETRY.as_secs()
        );
        let event =
            Event::new("network.rollback_blocked", Severity::Critical, "network", text).with_job(open.job);
        match self.events.publish(&event).await {
            Ok(number) => {
                open.blocked = Some(number);
                if let Err(fault) = self.write_open(&open).await {
                    tracing::warn!(%fault, "a blocked rollback is told once more at its next try");
                }
            }
            Err(error) => tracing::error!(%error, "a blocked rollback was not told"),
        }
    }

    async fn close_failed(
        &self,
        open: &Open,
        kept: bool,
        why: Option<String>,
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
        if let Some(blocked) = open.blocked {
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
            caller: context.caller.clone(),
            verb: context.verb.clone(),
            ending,
            changes: told(plan(&open.snapshot, &open.aim, &open.scope())),
            why,
        };
        writes.append(&PAST, &past);
        Ok(())
    }

    /// In a job of its own, since the host's boot holds no locks. A network that cannot be brought back is told, and does
    /// not keep VMs from starting: those that lack their bridge fail for themselves.
    pub(in crate::operation) async fn network_at_boot(
        &self,
        boot_id: &str,
        context: &StepContext,
    ) -> Result<Outcome> {
        let confirmed = self.network_confirmed().await?;
        if confirmed == Confirmed::default() && self.network_open().await?.is_none() {
            return Ok(Outcome::done());
        }
        let key = Some(format!("network_at_boot/{boot_id}/{}", context.job));
        let options = JobOptions { idempotency_key: key, ..JobOptions::default() };
        let job = self.submission("network_restore", &context.caller, restore(), options);
        let ended = self.run_beside(job, context).await?;
        Ok(Outcome::value(serde_json::json!({ "job": ended.id.0 })))
    }

    /// What a blocked rollback left, once more; and what is declared.
    pub(in crate::operation) async fn network_restore(&self, context: &StepContext) -> Result<Outcome> {
        let mut outcome = Outcome::done();
        outcome.writes.set_importance(crate::store::Importance::Essential);
        if let Some(open) = self.network_open().await? {
            if let Err(fault) = self.roll_back(&open).await {
                self.tell_blocked(open, &fault).await;
                return Err(fault);
            }
            self.discover_below(&open, context).await;
            self.close_failed(&open, false, None, context, &mut outcome.writes).await?;
            let text = format!("the rollback of job {} is done", open.job);
            Event::new("network.restored", Severity::Info, "network", text)
                .with_job(context.job)
                .append_to(&mut outcome.writes);
            return Ok(outcome);
        }
        let confirmed = self.network_confirmed().await?;
        let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        let scope = Scope::of(&confirmed.desired, &confirmed.desired, &now);
        let target = aim(&now, &confirmed.desired, &confirmed.desired);
        let changes = told(plan(&now, &target, &scope));
        if changes.is_empty() {
            return Ok(outcome);
        }
        self.try_for(&confirmed.desired, None, &scope).await?;
        let text = format!("the network was brought to what is declared: {}", changes.join("; "));
        Event::new("network.restored", Severity::Info, "network", text)
            .with_job(context.job)
            .append_to(&mut outcome.writes);
        Ok(outcome)
    }
}
