//! When a domain changes without us: it ended by itself, it has gone, or it is there although we thought it off.
//!
//! The decision is pure ([`decide`]); it is written down before it is carried out, so that a crash in between
//! does not decide anew on a world that is half changed.

use super::Operations;
use super::vm_steps::words;
use crate::event::{Event, Severity, kind};
use crate::job::{JobFault, Outcome, StepContext};
use crate::model::{SafePath, Timestamp, VmId};
use crate::vm::adopt::Boot;
use crate::vm::{EndCause, Intent, VmRecord};
use crate::xen::config::OnEnd;
use crate::xen::{DomainInfo, RunState, ShutdownReason};
use serde::{Deserialize, Serialize};

/// A VM that crashes this often in a row, each time soon after its start, is left off.
const CRASHES_UNTIL_LEFT_OFF: u32 = 5;
/// "Soon": within this of its start.
const CRASH_SOON_MS: u64 = 60_000;

/// What to do about a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "snake_case")]
pub(super) enum Decision {
    /// Record and world agree.
    Nothing,
    /// The domain runs; the record must say so.
    FoundRunning,
    /// The domain is gone; nobody saw how.
    Gone,
    /// It is gone, and has left its memory in this file: a save ended after its job was given up.
    Saved { file: SafePath },
    /// It ended. `dump`: keep its memory first; `preserve`: leave it as it is, for somebody to look at.
    Ended { cause: EndCause, restart: bool, dump: bool, preserve: bool, crashes: u32 },
}

/// See [`Decision`]. `now` is the host's time.
pub(super) fn decide(record: &VmRecord, domain: Option<&DomainInfo>, now: Timestamp) -> Decision {
    if matches!(record.intent, Intent::Leaving(_)) {
        // Who runs it is the judge's to say (`migrate_watch`).
        return Decision::Nothing;
    }
    let wanted_on = record.intent == Intent::On;
    let Some(domain) = domain else {
        return match (wanted_on, record.crash_seen) {
            (true, Some(cause)) => start_again(cause, record),
            (true, None) => Decision::Gone,
            (false, _) => Decision::Nothing,
        };
    };
    let RunState::Shutdown(reason) = domain.state else {
        return if wanted_on { Decision::Nothing } else { Decision::FoundRunning };
    };
    let config = &record.config;
    let (cause, action) = match reason {
        ShutdownReason::Poweroff => (EndCause::Poweroff, config.on_poweroff),
        ShutdownReason::Reboot => (EndCause::Poweroff, config.on_reboot),
        ShutdownReason::Crash => (EndCause::Crash, config.on_crash),
        ShutdownReason::Watchdog => (EndCause::Watchdog, config.on_crash),
        // It stands still while its memory is written to a file or another host: by an operator's hand, or by an xl of
        // our former life that lets it go on as soon as it meets its broken pipe. It is not ours to take.
        ShutdownReason::Suspend if wanted_on => return Decision::Nothing,
        // Its memory is in a file: what is left here is of no use.
        ShutdownReason::Suspend => (EndCause::Unknown, OnEnd::Destroy),
    };
    if action == OnEnd::Preserve && !wanted_on {
        return Decision::Nothing;
    }
    let crashed = matches!(cause, EndCause::Crash | EndCause::Watchdog);
    let soon = now.0.saturating_sub(domain.started.0) < CRASH_SOON_MS;
    // This very one may have been counted by a settling that failed.
    let before = record.crashes_in_a_row.saturating_sub(u32::from(record.crash_seen.is_some()));
    let crashes = match (crashed, soon) {
        (true, true) => before + 1,
        (true, false) => 1,
        (false, _) => 0,
    };
    let restart = matches!(action, OnEnd::Restart | OnEnd::CoredumpRestart);
    Decision::Ended {
        cause,
        restart: restart && wanted_on && crashes < CRASHES_UNTIL_LEFT_OFF,
        dump: matches!(action, OnEnd::CoredumpRestart | OnEnd::CoredumpDestroy),
        preserve: action == OnEnd::Preserve,
        crashes,
    }
}

/// It crashed, and its restart has failed or was never begun. Tries count as crashes do, so that they end.
fn start_again(cause: EndCause, record: &VmRecord) -> Decision {
    let crashes = record.crashes_in_a_row + 1;
    let restart = crashes < CRASHES_UNTIL_LEFT_OFF;
    Decision::Ended { cause, restart, dump: false, preserve: false, crashes }
}

impl Operations {
    /// As [`decide`]; but a domain that has gone, perhaps with its host, is nobody's to decide about before that
    /// boot was taken, and one that a migration has taken is the migration's.
    pub(super) fn decide_now(&self, record: &VmRecord, domain: Option<&DomainInfo>) -> Decision {
        let host_may_have_gone = domain.is_none() && self.boot() == Boot::New;
        if host_may_have_gone || matches!(record.intent, Intent::Leaving(_)) {
            return Decision::Nothing;
        }
        decide(record, domain, Timestamp::now())
    }

    pub(super) async fn inspect_domain(&self, id: VmId) -> Result<Outcome, JobFault> {
        let Some(vm) = self.vms.get(id) else {
            return Ok(decision_outcome(&Decision::Nothing));
        };
        let domain = self.domain(id).await?;
        let mut decision = self.decide_now(&vm.record, domain.as_ref());
        if domain.is_none() && decision != Decision::Nothing && self.read_boot().await == Boot::New {
            self.look_again.notify_one();
            decision = Decision::Nothing;
        }
        if decision == Decision::Gone
            && let Some(file) = self.finished_save(&vm.record).await?
        {
            decision = Decision::Saved { file };
        }
        let mut outcome = decision_outcome(&decision);
        if let Decision::Ended {
            cause: cause @ (EndCause::Crash | EndCause::Watchdog),
            crashes,
            restart: true,
            ..
        } = decision
        {
            // The evidence, which must outlive the domain and this job.
            let noted = self.record_outcome(id, |record| {
                record.crash_seen = Some(cause);
                record.crashes_in_a_row = crashes;
            })?;
            (outcome.writes, outcome.then) = (noted.writes, noted.then);
        }
        Ok(outcome)
    }

    /// Dumps if decided, and clears the ended domain away.
    pub(super) async fn settle_clear(&self, id: VmId, context: &StepContext) -> Result<Outcome, JobFault> {
        let Decision::Ended { dump, preserve, .. } = decision(context)? else { return Ok(Outcome::done()) };
        let Some(domain) = self.domain(id).await? else {
            // Cleared away by this very step, before a crash; what it has dumped is still to be noted.
            let noted =
                if dump && context.resumed { self.dump_crashed(id, true, context).await? } else { None };
            return Ok(noted.unwrap_or_default());
        };
        if preserve || !matches!(domain.state, RunState::Shutdown(_)) {
            return Ok(Outcome::done());
        }
        let mut outcome = Outcome::done();
        if dump {
            match self.dump_crashed(id, false, context).await {
                Ok(noted) => outcome = noted.unwrap_or_default(),
                Err(error) => {
                    tracing::warn!(vm_uuid = %id, job_id = %context.job, %error, "the crashed domain's memory was not dumped");
                }
            }
        }
        self.destroy_found(domain.domid).await?;
        Ok(outcome)
    }

    pub(super) async fn settle_rebuild(&self, id: VmId, context: &StepContext) -> Result<Outcome, JobFault> {
        let decision = decision(context)?;
        let Some(vm) = self.vms.get(id) else { return Ok(Outcome::done()) };
        if let (Decision::Ended { cause, .. }, Intent::Saved { file, .. }) = (&decision, &vm.record.intent)
            && *cause != EndCause::Unknown
        {
            // It was restored, unseen, and has ended since: its disks do not fit that memory any more.
            self.remove_file(file).await?;
        }
        match decision {
            Decision::Nothing => Ok(Outcome::done()),
            Decision::FoundRunning => self.found_running(id, context).await,
            Decision::Saved { file } => {
                let text = format!("VM {id}: its memory was found, whole, after a save that nobody saw end");
                self.saved_outcome(id, &file, Severity::Warning, &text, context)
            }
            Decision::Gone => self.off_outcome(id, EndCause::Unknown, kind::VM_GONE, context),
            Decision::Ended { restart: true, cause, crashes, .. } => {
                let kind = if crashes > 0 { kind::VM_RESTARTED_AFTER_CRASH } else { kind::VM_REBOOTED };
                // The step before cleared the old domain away: one that is alive now is this step's own, from a
                // run that was interrupted.
                let context = StepContext { resumed: true, ..context.clone() };
                let mut outcome = self.create_domain(id, kind, &context).await?;
                let noted = self.record_outcome(id, |record| {
                    record.intent = Intent::On;
                    record.changed = Timestamp::now();
                    record.crashes_in_a_row = crashes;
                    record.crash_seen = None;
                    record.last_end = (crashes > 0).then_some(cause);
                })?;
                outcome.writes.merge(noted.writes);
                outcome.then = noted.then;
                Ok(outcome)
            }
            Decision::Ended { cause, preserve, crashes, .. } => {
                let kind = match cause {
                    EndCause::Crash | EndCause::Watchdog => kind::VM_CRASHED,
                    _ => kind::VM_STOPPED,
                };
                let mut outcome = self.off_outcome(id, cause, kind, context)?;
                if crashes >= CRASHES_UNTIL_LEFT_OFF || preserve {
                    let why = if preserve { "its domain is kept to be looked at" } else { "it is left off" };
                    let text = format!(
                        "VM {} {} or could not be started again, {crashes} times in a row; {why}",
                        vm.record.config.name,
                        words(cause)
                    );
                    let event = Event::new(kind::VM_LEFT_OFF, VmRecord::lock(id), text);
                    event.with_job(context.job).append_to(&mut outcome.writes);
                }
                Ok(outcome)
            }
        }
    }

    async fn found_running(&self, id: VmId, context: &StepContext) -> Result<Outcome, JobFault> {
        if let Some(vm) = self.vms.get(id)
            && let Intent::Saved { file, .. } = &vm.record.intent
        {
            // The guest has lived on since: its disks do not fit that memory any more.
            self.remove_file(file).await?;
        }
        let mut outcome = self.record_outcome(id, |record| {
            record.intent = Intent::On;
            record.changed = Timestamp::now();
            record.crash_seen = None;
        })?;
        let text = format!("VM {id} runs although it was not started here; its record says so now");
        let event = Event::new(kind::VM_FOUND_RUNNING, VmRecord::lock(id), text);
        event.with_job(context.job).append_to(&mut outcome.writes);
        Ok(outcome)
    }
}

fn decision_outcome(decision: &Decision) -> Outcome {
    Outcome::value(serde_json::to_value(decision).expect("an enum of plain fields has a JSON form"))
}

/// What `InspectDomain`, the first step, decided.
fn decision(context: &StepContext) -> Result<Decision, JobFault> {
    let value = context.outcomes.first().cloned().flatten().unwrap_or_default();
    serde_json::from_value(value)
        .map_err(|e| JobFault::new("INTERNAL", format!("no decision was written: {e}")))
}
