//! The way forward: snapshot, changes, verification, confirmation, and the record.

use super::document::{delete_document, write_document};
use super::{
    CONFIRMED, Confirmed, Draft, Ending, NETWORK, OPEN, Open, Operations, Options, PAST, Past, Result, Want,
    kernel_fault, locks, store_fault, told,
};
use crate::event::{Event, kind};
use crate::job::{JobFault, Outcome, StepContext, StepState};
use crate::kernel::KernelError;
use crate::model::network::{Change, NetworkView, Refused};
use crate::model::{JobId, Timestamp};
use crate::network::{Scope, Way, differences, is_there, plan};
use crate::operation::plan::Plan;
use crate::operation::step::Step;
use crate::store::Txn;
use serde_json::json;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A kernel may do more than it was asked (a bond brings a port's MTU along): then what is left is planned once more.
const ROUNDS: usize = 3;
/// Changes between two looks whether the job was cancelled.
const AT_ONCE: usize = 32;
/// What comes a moment after its change (an address that is being checked) is waited for.
const VERIFY: Duration = Duration::from_secs(3);
const VERIFY_PAUSE: Duration = Duration::from_millis(20);
/// It goes into one transaction, where it is a fifth larger.
const MAX_OPEN_BYTES: usize = 3_200_000;
/// A neighbour is asked anew for so long before it counts as lost: a link that was off and on again needs its time.
const LOST_AFTER: Duration = Duration::from_secs(15);

/// A change of the network. `what`: for people.
/// `answer`: what its caller is told when it holds.
pub fn change(what: &str, want: Want, options: Options, caller: Option<Way>, answer: Option<String>) -> Plan {
    let steps = vec![
        Step::NetworkSnapshot { want, options, caller },
        Step::NetworkApply {},
        Step::NetworkConfirm { within_s: options.confirm_within_s.unwrap_or(0) },
        Step::NetworkKeep { answer },
    ];
    Plan::new(what, locks(), steps)
}

impl Operations {
    /// Plans under the lock, and writes down the way back before anything is done.
    pub(in crate::operation) async fn network_snapshot(
        &self,
        want: &Want,
        options: Options,
        caller: Option<Way>,
        context: &StepContext,
    ) -> Result<Outcome> {
        if let Some(open) = self.network_open().await?.filter(|open| open.job != context.job) {
            let text = format!(
                "the change of job {} could not be rolled back yet and is tried again; nothing else is changed before",
                open.job
            );
            return Err(JobFault::refusal("NETWORK_BUSY", text));
        }
        let draft = self.network_draft(want, options, caller).await?;
        let boot_id = self.machine_boot_id().await?;
        let words = told(&draft.changes);
        let Draft { before, after, now, aim, left_alone, changes, .. } = draft;
        let began = Timestamp::now();
        let confirm_until = options.confirm_within_s.map(|within_s| Timestamp(began.0 + within_s * 1000));
        let after = Confirmed { job: Some(context.job), changed: Some(began), ..after };
        let open = Open {
            job: context.job,
            boot_id,
            began,
            before,
            after,
            snapshot: now,
            aim,
            options,
            confirm_until,
            caller,
            by: context.caller.clone(),
            verb: context.verb.clone(),
            why: None,
            left_alone,
            changes,
            told_after: None,
            blocked_after: None,
        };
        let mut outcome = Outcome::value(json!({ "changes": words }));
        let bytes = write_document(&mut outcome.writes, &OPEN, &open);
        if bytes > MAX_OPEN_BYTES {
            let text = format!(
                "what has to be written down for the way back has {bytes} bytes, {MAX_OPEN_BYTES} are allowed: change \
                 the network in smaller parts; nothing was changed"
            );
            return Err(JobFault::refusal("INVALID_NETWORK", text));
        }
        // Nobody asks for it before the job has it on disk.
        self.keep_known(Some(Arc::new(open)));
        Ok(outcome)
    }

    /// Which boot of the host this is.
    pub(super) async fn machine_boot_id(&self) -> Result<String> {
        let facts = self.machine.facts().await.map_err(crate::operation::fault::machine)?;
        Ok(facts.boot_id)
    }

    /// A change that ended before anything was done leaves nothing open. One whose rollback is blocked stays.
    pub(in crate::operation) async fn undo_network_snapshot(&self, context: &StepContext) -> Result<Outcome> {
        let mut outcome = Outcome::done();
        let Some(open) = self.network_of(context.job).await? else { return Ok(outcome) };
        let record = match self.engine() {
            Some(engine) => engine.get(context.job).await.map_err(|e| store_fault(&e))?,
            None => None,
        };
        let apply = record.as_ref().and_then(|record| record.steps.get(context.step + 1));
        if apply.is_some_and(|step| step.state == StepState::Pending) {
            self.close_open(&open, &mut outcome.writes).await?;
        }
        Ok(outcome)
    }

    /// Has the kernel do it, and looks whether it has, and whether the caller can still reach us.
    pub(in crate::operation) async fn network_apply(&self, context: &StepContext) -> Result<Outcome> {
        let open = self.open_change(context.job).await?;
        if let Err(fault) = self.carry_forward(&open, context).await {
            self.back_at_once(&open, &fault).await;
            return Err(fault);
        }
        Ok(Outcome::done())
    }

    async fn open_change(&self, job: JobId) -> Result<Arc<Open>> {
        let open = self.network_known(job).await?;
        open.ok_or_else(|| JobFault::refusal("INTERNAL", "the snapshot of this change is gone"))
    }

    async fn carry_forward(&self, open: &Open, context: &StepContext) -> Result<()> {
        if open.boot_id != self.machine_boot_id().await? {
            return Err(rebooted());
        }
        let scope = open.scope();
        let reached = self.reaches(open.caller.map(|way| way.peer)).await;
        let (done, now) = self.lead_to(open, &scope, context).await?;
        if !is_there(&now, &open.aim, &scope) {
            self.verify(&open.aim, &scope).await?;
        }
        if reached {
            self.verify_reach(open, context).await?;
        }
        tracing::info!(job_id = %context.job, changes = done, "the network was changed");
        Ok(())
    }

    /// Does what leads there: first what the snapshot's plan says, then at most [`ROUNDS`] plans in all of what the kernel has
    /// then. Answers how many changes were made, and what is there.
    async fn lead_to(
        &self,
        open: &Open,
        scope: &Scope,
        context: &StepContext,
    ) -> Result<(usize, NetworkView)> {
        let mut changes = open.changes.clone();
        self.walk(&changes, context).await?;
        let mut done = changes.len();
        let mut now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        for _ in 1..ROUNDS {
            changes = plan(&now, &open.aim, scope);
            if changes.is_empty() {
                break;
            }
            self.walk(&changes, context).await?;
            done += changes.len();
            now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        }
        Ok((done, now))
    }

    /// One change after another; between some of them it looks whether it is to go on.
    async fn walk(&self, changes: &[Change], context: &StepContext) -> Result<()> {
        let count = changes.len();
        for (before, part) in (0..).step_by(AT_ONCE).zip(changes.chunks(AT_ONCE)) {
            if context.cancelled.is_cancelled() {
                return Err(JobFault::new("CANCELLED", "cancelled"));
            }
            if context.engine.is_stopping() {
                return Err(stopping());
            }
            context.progress(u8::try_from(100 * before / count).unwrap_or(100));
            let mut left = part;
            while let Err(stopped) = self.change_network(left).await {
                let (number, change) =
                    (before + part.len() - left.len() + stopped.done + 1, &left[stopped.done]);
                if !is_gone_already(change, &stopped.error) {
                    let fault = kernel_fault(&stopped.error);
                    let text = format!("step {number} of {count}, {change}: {}", fault.text);
                    return Err(JobFault::new(fault.name, text));
                }
                left = &left[stopped.done + 1..];
            }
        }
        Ok(())
    }

    async fn verify(&self, aim: &NetworkView, scope: &Scope) -> Result<()> {
        let end = Instant::now() + VERIFY;
        loop {
            let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
            if is_there(&now, aim, scope) {
                return Ok(());
            }
            if Instant::now() >= end {
                let words = told(differences(&now, aim, scope)).join("; ");
                return Err(JobFault::new(
                    "NETWORK_NOT_AS_ASKED",
                    format!("the kernel has something else: {words}"),
                ));
            }
            tokio::time::sleep(VERIFY_PAUSE).await;
        }
    }

    /// Whether this one can be reached now. A kernel that cannot tell says no: then nothing is concluded later.
    async fn reaches(&self, who: Option<IpAddr>) -> bool {
        match who.filter(|ip| !ip.is_loopback()) {
            Some(ip) => self.kernel.reaches(ip).await.unwrap_or(false),
            None => false,
        }
    }

    /// Whoever is cut off is so no longer than the change may stay without a word.
    async fn verify_reach(&self, open: &Open, context: &StepContext) -> Result<()> {
        let end = Instant::now()
            + open.options.confirm_within_s.map_or(LOST_AFTER, Duration::from_secs).min(LOST_AFTER);
        while !self.reaches(open.caller.map(|way| way.peer)).await {
            if Instant::now() >= end {
                let who = open.caller.map_or_else(String::new, |way| way.peer.to_string());
                let text =
                    format!("{who}, who asked for the change, was reached before it and is not any more");
                return Err(JobFault::new("MANAGEMENT_LOST", text));
            }
            if context.engine.is_stopping() {
                return Err(stopping());
            }
            tokio::time::sleep(VERIFY_PAUSE).await;
        }
        Ok(())
    }

    /// Waits for the word that the change is good. An agent that stops or dies meanwhile takes the change back: nobody else
    /// would, at its deadline.
    pub(in crate::operation) async fn network_confirm_step(&self, context: &StepContext) -> Result<Outcome> {
        let open = self.open_change(context.job).await?;
        let heard = self.await_word(&open, context).await;
        if let Err(fault) = &heard {
            self.back_at_once(&open, fault).await;
        }
        heard
    }

    async fn await_word(&self, open: &Open, context: &StepContext) -> Result<Outcome> {
        if open.boot_id != self.machine_boot_id().await? {
            return Err(rebooted());
        }
        let Some(until) = open.confirm_until else { return Ok(Outcome::done()) };
        // A clock that was set back does not make the wait longer than it may be.
        let longest_ms = open.options.confirm_within_s.unwrap_or(0) * 1000;
        let left_ms = until.0.saturating_sub(Timestamp::now().0).min(longest_ms);
        let end = Instant::now() + Duration::from_millis(left_ms);
        loop {
            let heard = self.network_word.notified();
            if let Some(by) = self.store.get(&CONFIRMED, &context.job).await.map_err(|e| store_fault(&e))? {
                return Ok(Outcome::value(json!({ "confirmed_by": by })));
            }
            tokio::select! {
                () = heard => {}
                () = context.cancelled.cancelled() => return Err(JobFault::new("CANCELLED", "cancelled")),
                () = context.engine.stopping() => return Err(stopping()),
                () = tokio::time::sleep_until(end) => return self.last_word(open, context).await,
            }
        }
    }

    /// The time is up. Whoever confirms at the same moment is either heard here, or told that it was too late.
    async fn last_word(&self, open: &Open, context: &StepContext) -> Result<Outcome> {
        let mut late = self.network_late.lock().await;
        if let Some(by) = self.store.get(&CONFIRMED, &context.job).await.map_err(|e| store_fault(&e))? {
            return Ok(Outcome::value(json!({ "confirmed_by": by })));
        }
        *late = Some(context.job);
        let within_s = open.options.confirm_within_s.unwrap_or(0);
        Err(JobFault::new("NOT_CONFIRMED", format!("nobody confirmed the change within {within_s} s")))
    }

    /// The change is good, says a caller; `job`: which one he means. Refused if none waits for it.
    pub async fn network_confirm(&self, by: &str, job: Option<JobId>) -> Result<Open> {
        let late = self.network_late.lock().await;
        let is_meant = |open: &Open| job.is_none_or(|job| job == open.job) && *late != Some(open.job);
        let mut found = self.network_open().await?.filter(is_meant);
        if let Some(open) = &found
            && !self.waits_for_word(open).await
        {
            found = None;
        }
        let Some(open) = found else {
            let text =
                "no such change of the network waits to be confirmed: there is none, or its time was over";
            return Err(JobFault::refusal("NOTHING_TO_CONFIRM", text));
        };
        let mut txn = Txn::essential();
        txn.put(&CONFIRMED, &open.job, &by.to_owned());
        self.store.commit(txn).await.map_err(|e| store_fault(&e))?;
        self.network_word.notify_waiters();
        Ok(open)
    }

    /// The change holds from now on.
    pub(in crate::operation) async fn network_keep(
        &self,
        answer: Option<String>,
        context: &StepContext,
    ) -> Result<Outcome> {
        // In doubt after a crash: the outcome and this deletion are one transaction, so it is still there.
        let Some(open) = self.network_known(context.job).await? else { return Ok(Outcome::done()) };
        let changes = planned(context);
        let mut outcome =
            Outcome::result(json!({ "job": context.job.0, "changes": changes, "answer": answer }));
        write_document(&mut outcome.writes, &NETWORK, &open.after);
        super::boot::put_done(&mut outcome.writes, &open);
        self.close_open(&open, &mut outcome.writes).await?;
        let same = open.before.desired == open.after.desired && open.before.meta == open.after.meta;
        if changes.is_empty() && same {
            // A manager that asks for its bridges again before each start of a VM is no news.
            return Ok(outcome);
        }
        let text = match changes.len() {
            0 => "another declaration of the network, which the kernel has already".to_owned(),
            _ => format!("the network was changed: {}", changes.join("; ")),
        };
        Event::new(kind::NETWORK_CHANGED, "network", text)
            .with_job(context.job)
            .append_to(&mut outcome.writes);
        let past = Past {
            at: Timestamp::now(),
            job: context.job,
            caller: context.caller.clone(),
            verb: context.verb.clone(),
            ending: Ending::Applied,
            changes,
            why: None,
        };
        outcome.writes.append(&PAST, &past);
        Ok(outcome)
    }

    /// Writes that there is no open change any more.
    pub(super) async fn close_open(&self, open: &Open, writes: &mut Txn) -> Result<()> {
        self.keep_known(None);
        delete_document(&self.store, writes, &OPEN).await.map_err(|e| store_fault(&e))?;
        writes.delete(&CONFIRMED, &open.job);
        writes.set_importance(crate::store::Importance::Essential);
        Ok(())
    }
}

/// The words of the snapshot's plan.
fn planned(context: &StepContext) -> Vec<String> {
    let words = context.outcomes.first().and_then(|outcome| outcome.as_ref()?.get("changes"));
    words.and_then(|words| serde_json::from_value(words.clone()).ok()).unwrap_or_default()
}

/// What a change before took with it: the address and the routes of a lease go with the DHCP client that had them.
fn is_gone_already(change: &Change, error: &KernelError) -> bool {
    matches!(
        (change, error),
        (Change::DeleteAddress { .. }, KernelError::Refused(Refused::NoSuchAddress))
            | (Change::DeleteRoute { .. }, KernelError::Refused(Refused::NoSuchRoute))
    )
}

fn stopping() -> JobFault {
    JobFault::new("INTERRUPTED", "the agent stopped before the change was confirmed")
}

pub(super) fn rebooted() -> JobFault {
    JobFault::new("INTERRUPTED", "the host was rebooted before the change was confirmed")
}
