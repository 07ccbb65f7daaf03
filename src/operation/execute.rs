//! From a step's data to the function that carries it out, and back when it is undone.

use super::Operations;
use super::step::Step;
use super::vm_steps::Signal;
use crate::event::{Event, Severity, kind};
use crate::job::{Executor, JobFault, JobRecord, JobState, Mode, Outcome, PlannedStep, StepContext};
use crate::model::VmId;
use crate::store::Txn;
use crate::vm::EndCause;
use async_trait::async_trait;

fn parse(step: &PlannedStep) -> Result<Step, JobFault> {
    serde_json::from_value(step.what.clone())
        .map_err(|error| JobFault::refusal("INTERNAL", format!("a stored step cannot be read: {error}")))
}

/// Somebody asked for what cannot be done now, and nothing was: no trouble of the host's.
fn is_refusal(fault: &JobFault) -> bool {
    fault.no_effect
        && matches!(
            fault.name.as_str(),
            "VM_STATE"
                | "VM_EXISTS"
                | "CONFLICT"
                | "MIGRATION_REFUSED"
                | "MIGRATION_LIMIT"
                | "INVALID_NETWORK"
                | "NETWORK_BUSY"
        )
}

#[async_trait]
impl Executor for Operations {
    async fn run(&self, step: &PlannedStep, context: &StepContext) -> Result<Outcome, JobFault> {
        match parse(step)? {
            Step::CheckVm { vm, action, base } => self.check_vm(vm, action, base).await,
            Step::CheckNewVm { vm } => self.check_new_vm(vm),
            Step::PutVm { record, created, from } => self.put_vm(*record, created, from.as_deref(), context),
            Step::SetHa { vm, enabled } => self.record_outcome(vm, |record| record.ha = enabled),
            Step::SetAutostart { vm, autostart } => {
                self.record_outcome(vm, |record| record.autostart = Some(autostart))
            }
            Step::DeleteVm { vm } => self.delete_vm(vm, context).await,
            Step::RecordCore { vm, date, file } => self.record_core(vm, &date, &file, context).await,
            Step::ForgetCore { vm, date } => self.record_outcome(vm, |r| r.cores.retain(|c| c.date != date)),
            Step::CreateDomain { vm } => self.create_domain(vm, kind::VM_STARTED, context).await,
            Step::ShutdownDomain { vm, timeout_s, then_force } => {
                self.shutdown_domain(vm, timeout_s, then_force, context).await
            }
            Step::DestroyDomain { vm, host_goes_down } => {
                let cause = if host_goes_down { EndCause::HostDown } else { EndCause::Asked };
                self.destroy_domain(vm, cause, context).await
            }
            Step::AskReboot { vm, timeout_s } => self.ask_reboot(vm, timeout_s, context).await,
            Step::ClearDomain { vm, .. } => self.clear_domain(vm).await,
            Step::RebuildDomain { vm } => self.rebuild_domain(vm, context).await,
            Step::PauseDomain { vm } => self.pause_domain(vm, true).await,
            Step::UnpauseDomain { vm } => self.pause_domain(vm, false).await,
            Step::SaveDomain { vm, file, checkpoint } => {
                self.save_domain(vm, &file, checkpoint, context).await
            }
            Step::RestoreDomain { vm, paused } => self.restore_domain(vm, paused, context).await,
            Step::Hotplug { vm, change } => self.hotplug(vm, &change).await,
            Step::Sysrq { vm, letter } => self.signal(vm, Signal::Sysrq(letter)).await,
            Step::Trigger { vm, trigger, vcpu } => self.signal(vm, Signal::Trigger(trigger, vcpu)).await,
            Step::SendToGuest { vm, key, value } => self.signal(vm, Signal::Send(&key, &value)).await,
            Step::DumpCore { vm, file, live, crash, .. } => {
                self.dump_core(vm, &file, live, crash, context).await
            }
            Step::InspectDomain { vm } => self.inspect_domain(vm).await,
            Step::SettleClear { vm } => self.settle_clear(vm, context).await,
            Step::SettleRebuild { vm } => self.settle_rebuild(vm, context).await,
            Step::PrepareTarget { going } => self.prepare_target(&going, context).await,
            Step::SendDomain { going, live, .. } => self.send_domain(&going, live, context).await,
            Step::CommitMigration { going } => self.commit_migration(&going, context).await,
            Step::TellTarget { going } => self.tell_target(&going, context).await,
            Step::SettleMigration { going } => self.settle_migration(&going, context).await,
            Step::ForceLeaving { vm, keep } => self.force_leaving(vm, keep, context).await,
            Step::ReceiveDomain { document, source, .. } => {
                self.receive_domain(&document, &source, context).await
            }
            Step::TakeOver { id } => self.take_over(id, context).await,
            Step::LetRun { vm } => self.let_run(vm, context).await,
            Step::DropArrival { id } => self.drop_arrival(id, context).await,
            Step::PutPeer { peer } => self.put_peer(peer, context),
            Step::RemovePeer { address } => self.remove_peer(&address, context),
            Step::NetworkSnapshot { want, options, caller } => {
                self.network_snapshot(&want, options, caller, context).await
            }
            Step::NetworkApply {} => self.network_apply(context).await,
            Step::NetworkConfirm { .. } => self.network_confirm_step(context).await,
            Step::NetworkKeep { answer } => self.network_keep(answer, context).await,
            Step::NetworkRestore {} => self.network_restore(context).await,
            Step::NetworkAtBoot { boot_id } => self.network_at_boot(&boot_id, context).await,
            Step::NetworkDiscover { event, of } => self.network_discover(event, of, context).await,
            Step::RemoveLeftFiles {} => self.remove_left_files(context).await,
            Step::RemoveFile { file } => self.remove_file(&file).await,
            other => self.run_host_step(other, context).await,
        }
    }

    async fn undo(
        &self,
        step: &PlannedStep,
        outcome: Option<&serde_json::Value>,
        context: &StepContext,
    ) -> Result<Outcome, JobFault> {
        match parse(step)? {
            Step::CreateDomain { vm } => self.undo_create(vm).await,
            Step::RestoreDomain { vm, .. } => self.undo_restore(vm, outcome).await,
            Step::PauseDomain { vm } | Step::UnpauseDomain { vm } => self.undo_pause(vm, outcome).await,
            Step::SaveDomain { vm, file, checkpoint } => self.undo_save(vm, &file, checkpoint, context).await,
            Step::ClearDomain { vm, .. } => self.undo_clear(vm, context).await,
            Step::DumpCore { vm, file, rebuild_on_undo, .. } => {
                self.undo_dump(vm, &file, rebuild_on_undo, context).await
            }
            Step::Hotplug { vm, change } => self.hotplug(vm, &change.inverse()).await,
            Step::SendDomain { going, .. } => self.settle_migration(&going, context).await,
            Step::ReceiveDomain { document, .. } => self.undo_receive(&document).await,
            Step::NetworkApply {} => self.undo_network(context).await,
            Step::NetworkSnapshot { .. } => self.undo_network_snapshot(context).await,
            // The plan says of every other step that it cannot be undone.
            _ => Ok(Outcome::done()),
        }
    }

    fn ended(&self, job: &JobRecord, txn: &mut Txn) {
        self.moves.give_place_back(job.id);
        tracing::info!(
            caller = job.caller,
            outcome = job.state.as_str(),
            fault = job.fault.as_ref().map(|f| f.name.as_str()),
            "job ended"
        );
        for lock in job.locks.iter().filter(|lock| lock.mode == Mode::Exclusive) {
            // Whatever the job left behind: the observer compares it with the record once the lock is free.
            if let Some(Ok(vm)) = lock.object.strip_prefix("vm/").map(VmId::parse) {
                self.suspect(vm);
            }
        }
        let kind = match job.state {
            JobState::Failed => kind::JOB_FAILED,
            JobState::Cancelled => kind::JOB_CANCELLED,
            // A success is told by what it changed.
            _ => return,
        };
        let why = job.fault.as_ref().map_or_else(String::new, |f| f.to_string());
        let doubt = if job.fault.as_ref().is_some_and(|f| f.name == "INTERRUPTED") {
            "; what that step sends may or may not have been sent"
        } else {
            ""
        };
        let text = format!("job {} ({}) {}: {why}{doubt}", job.id, job.verb, job.state.as_str());
        let mut event = Event::new(kind, format!("job/{}", job.id), text).with_job(job.id);
        if job.fault.as_ref().is_some_and(is_refusal) {
            event = event.with_severity(Severity::Warning);
        }
        event.with("verb", job.verb.clone()).append_to(txn);
    }
}
