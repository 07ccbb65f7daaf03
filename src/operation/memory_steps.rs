//! Steps that write or read a guest's memory: save, restore, dump.
//!
//! Words: a *save* ends the domain once its memory is on disk, a *checkpoint* lets it go on; a *core* is a dump for
//! people to look at.
//!
//! The toolstack may go on with a save that we have given up (a late answer, a cancel): it makes the file appear
//! whole, and ends the domain after that. So a file whose domain has gone is all there is of the guest. The way
//! back waits for that, and what it does not see `settle` finds. A checkpoint's file is never taken for such a
//! memory, since its guest has lived on: it has another name.

use super::vm_steps::{Result, is_unsure};
use super::{Operations, fault};
use crate::event::{Event, Severity, kind};
use crate::job::{JobFault, Outcome, StepContext};
use crate::model::{Bytes, SafePath, Timestamp, VmId};
use crate::vm::{CoreDump, Intent, VmRecord};
use crate::xen::{AfterSave, DomainInfo, RunState, ShutdownReason, ToolstackError};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// How long the way back of a save waits for a toolstack that may still be at it. Within the engine's bound for
/// one undo.
const SAVE_MAY_TAKE: Duration = Duration::from_secs(100);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A file's time comes from a clock that ticks more coarsely than the one records are dated by.
const FILE_CLOCK_MS: u64 = 20;
/// Dumps of crashed guests that are kept of one VM.
const CRASH_CORES: usize = 3;
const CRASH_CORE: &str = ".crash-";

impl Operations {
    pub(super) async fn save_domain(
        &self,
        id: VmId,
        file: &SafePath,
        checkpoint: bool,
        context: &StepContext,
    ) -> Result<Outcome> {
        // Until the toolstack is asked nothing has happened, unless an interrupted run has asked it.
        let nothing_yet = |fault: JobFault| JobFault { no_effect: !context.resumed, ..fault };
        let domain = self.domain(id).await.map_err(nothing_yet)?;
        match &domain {
            Some(domain) => {
                self.drop_stale_memory(id, domain).await.map_err(nothing_yet)?;
                self.make_room(file).await.map_err(nothing_yet)?;
                let after = if checkpoint { AfterSave::Continue } else { AfterSave::Destroy };
                let saved = self.toolstack.save(domain.domid, file, after).await;
                if let Err(error) = saved {
                    self.has_left_file(id, file, &error, !checkpoint).await?;
                }
                self.look(domain.domid).await;
            }
            // The domain went with its memory safe on disk; only the outcome was not written.
            None if context.resumed
                && !checkpoint
                && self.files.exists(file).await.map_err(fault::files)? => {}
            None => return Err(JobFault::refusal("VM_STATE", format!("VM {id} has no domain to save"))),
        }
        let name = self.vm(id)?.record.config.name.clone();
        if checkpoint {
            let all = self.files.list(&self.save_file(id, CHECKPOINT)).await.map_err(fault::files)?;
            let mut older: Vec<SafePath> = self.vm(id)?.record.checkpoint.iter().cloned().collect();
            older.extend(all.into_iter().map(|one| one.file));
            older.retain(|one| one != file);
            let mut outcome = self.record_outcome(id, |record| record.checkpoint = Some(file.clone()))?;
            outcome.result = Some(json!({ "file": file }));
            outcome.value = Some(json!({ "left_files": older }));
            let text = format!("VM {name}: checkpoint written");
            let event = Event::new(kind::VM_CHECKPOINTED, VmRecord::lock(id), text);
            event.with_job(context.job).append_to(&mut outcome.writes);
            return Ok(outcome);
        }
        self.saved_outcome(id, file, Severity::Info, &format!("VM {name}: saved"), context)
    }

    /// A VM that is saved and has a domain was restored, unseen: its disks do not fit that memory any more. A
    /// domain that is suspended may be what that memory was made of.
    pub(super) async fn drop_stale_memory(&self, id: VmId, domain: &DomainInfo) -> Result<()> {
        let suspended = domain.state == RunState::Shutdown(ShutdownReason::Suspend);
        if let Intent::Saved { file, .. } = &self.vm(id)?.record.intent
            && !suspended
        {
            self.remove_file(file).await?;
        }
        Ok(())
    }

    /// What an interrupted run left is of no use: the domain has lived on.
    async fn make_room(&self, file: &SafePath) -> Result<()> {
        self.files.remove(file).await.map_err(fault::files)?;
        self.files.make_parent(file).await.map_err(fault::files)
    }

    /// The VM's memory lies in this file from now on.
    pub(super) fn saved_outcome(
        &self,
        id: VmId,
        file: &SafePath,
        severity: Severity,
        text: &str,
        context: &StepContext,
    ) -> Result<Outcome> {
        let mut outcome = self.record_outcome(id, |record| {
            record.intent = Intent::Saved { file: file.clone(), at: Timestamp::now() };
            record.changed = Timestamp::now();
        })?;
        let event = Event::new(kind::VM_SAVED, VmRecord::lock(id), text)
            .with_severity(severity)
            .with_job(context.job);
        event.append_to(&mut outcome.writes);
        Ok(outcome)
    }

    /// The file of a save that ended after its job had: the only whole one since the record last changed.
    pub(super) async fn finished_save(&self, record: &VmRecord) -> Result<Option<SafePath>> {
        let id = record.id();
        let checkpoint = self.save_file(id, CHECKPOINT);
        let mut found = self.files.list(&self.save_file(id, "")).await.map_err(fault::files)?;
        found.retain(|one| {
            let path = one.file.as_str();
            let whole = !path.ends_with(".part") && !path.starts_with(checkpoint.as_str());
            whole && one.modified.0 + FILE_CLOCK_MS >= record.changed.0
        });
        let only = if found.len() == 1 { found.pop() } else { None };
        Ok(only.map(|one| one.file))
    }

    /// After an error: whether what was asked happened all the same. It has if the domain has gone, which it does
    /// last, and its file is there.
    async fn has_left_file(
        &self,
        id: VmId,
        file: &SafePath,
        error: &ToolstackError,
        goes: bool,
    ) -> Result<()> {
        let gone = is_unsure(error) && goes && self.domain(id).await?.is_none();
        if gone && self.files.exists(file).await.map_err(fault::files)? {
            return Ok(());
        }
        Err(fault::toolstack(error.clone()))
    }

    /// The save may still be going on, so nothing is taken away from it. If the guest has gone, its file is all
    /// there is of it: the VM is saved, and its record says so. One that lives on is left alone; should it be
    /// saved later still, `settle` finds the file.
    pub(super) async fn undo_save(
        &self,
        id: VmId,
        file: &SafePath,
        checkpoint: bool,
        context: &StepContext,
    ) -> Result<Outcome> {
        let record = self.vm(id)?.record;
        if checkpoint && record.checkpoint.as_ref() == Some(file) {
            return Ok(Outcome::done());
        }
        let deadline = Instant::now() + SAVE_MAY_TAKE;
        loop {
            // A look that fails is no answer; the next may be one.
            let domain = self.domain(id).await;
            let gone = matches!(domain, Ok(None));
            let ended = matches!(&domain, Ok(Some(d)) if has_ended(d.state));
            let there = self.files.exists(file).await.map_err(fault::files)?;
            match (checkpoint, gone, there) {
                (true, _, true) => return self.remove_file(file).await,
                (true, true, false) => return Ok(Outcome::done()),
                (false, true, true) if record.intent == Intent::On => {
                    let text = format!(
                        "VM {}: saved all the same, although its job was given up in the middle of the save",
                        record.config.name
                    );
                    return self.saved_outcome(id, file, Severity::Warning, &text, context);
                }
                (false, true, _) => return Ok(Outcome::done()),
                (_, false, _) if ended || Instant::now() >= deadline => return Ok(Outcome::done()),
                (_, false, _) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// A guest that went on from its saved memory has changed its disks: to go back to that memory would ruin
    /// them. So a restored domain stays.
    pub(super) async fn undo_restore(
        &self,
        id: VmId,
        outcome: Option<&serde_json::Value>,
    ) -> Result<Outcome> {
        if outcome.is_none() && self.domain(id).await?.is_some() {
            let text = format!("VM {id} goes on from its saved memory already; it is left running");
            return Err(JobFault::new("CANNOT_UNDO", text));
        }
        Ok(Outcome::done())
    }

    /// A dump that the record lists is kept, whatever failed after it. `rebuild`: the guest was to be started
    /// anew after it.
    pub(super) async fn undo_dump(
        &self,
        id: VmId,
        file: &SafePath,
        rebuild: bool,
        context: &StepContext,
    ) -> Result<Outcome> {
        if !self.vms.get(id).is_some_and(|vm| vm.record.cores.iter().any(|core| core.file == *file)) {
            self.remove_file(file).await?;
        }
        if rebuild { self.undo_clear(id, context).await } else { Ok(Outcome::done()) }
    }

    pub(super) async fn restore_domain(
        &self,
        id: VmId,
        paused: bool,
        context: &StepContext,
    ) -> Result<Outcome> {
        let vm = self.vm(id)?;
        let Intent::Saved { file, .. } = &vm.record.intent else {
            return Err(JobFault::refusal("VM_STATE", format!("VM {id} is not saved")));
        };
        let domid = match self.domain(id).await? {
            Some(domain) if context.resumed => domain.domid,
            Some(_) => return Err(JobFault::refusal("VM_STATE", format!("VM {id} has a domain already"))),
            None => {
                let built = self.toolstack.restore(&vm.record.config, file, paused).await;
                self.built(id, built).await?
            }
        };
        self.look(domid).await;
        let mut outcome = self.record_outcome(id, |record| {
            record.intent = Intent::On;
            record.changed = Timestamp::now();
            record.crashes_in_a_row = 0;
        })?;
        outcome.value = Some(json!({ "domid": domid.0, "left_files": [file] }));
        let text = format!("VM {}: restored", vm.record.config.name);
        let event = Event::new(kind::VM_RESTORED, VmRecord::lock(id), text).with_job(context.job);
        event.with("domid", domid.0).append_to(&mut outcome.writes);
        Ok(outcome)
    }

    pub(super) async fn dump_core(
        &self,
        id: VmId,
        file: &SafePath,
        live: bool,
        crash: bool,
        context: &StepContext,
    ) -> Result<Outcome> {
        match self.domain(id).await? {
            Some(domain) => {
                self.make_room(file).await?;
                let dumped = self.toolstack.dump_core(domain.domid, file, live, crash).await;
                if let Err(error) = dumped {
                    self.has_left_file(id, file, &error, crash).await?;
                }
                self.look(domain.domid).await;
            }
            None if context.resumed && crash && self.files.exists(file).await.map_err(fault::files)? => {}
            None => return Err(JobFault::refusal("VM_STATE", format!("VM {id} has no domain to dump"))),
        }
        Ok(Outcome::done())
    }

    pub(super) async fn record_core(
        &self,
        id: VmId,
        date: &str,
        file: &SafePath,
        context: &StepContext,
    ) -> Result<Outcome> {
        let size = self.files.size(file).await.map_err(fault::files)?.unwrap_or(Bytes(0));
        let core = CoreDump { date: date.to_owned(), file: file.clone(), size, job: context.job };
        let mut outcome = self.record_outcome(id, |record| {
            record.cores.retain(|c| c.date != core.date);
            record.cores.push(core);
        })?;
        outcome.result = Some(json!({ "core_date": date, "file": file, "size": size.0 }));
        Ok(outcome)
    }

    /// Dumps a crashed guest, notes the core, and makes room for it among those kept. `Ok(None)`: there is none.
    pub(super) async fn dump_crashed(
        &self,
        id: VmId,
        dumped_before: bool,
        context: &StepContext,
    ) -> Result<Option<Outcome>> {
        let file = self.core_file(id, &format!("{}{}.core", &CRASH_CORE[1..], context.job));
        if !dumped_before {
            self.dump_core(id, &file, false, false, context).await?;
        }
        let Some(size) = self.files.size(&file).await.map_err(fault::files)? else { return Ok(None) };
        let time: String = Timestamp::now().to_string().chars().filter(char::is_ascii_digit).collect();
        let core = CoreDump { date: format!("{time}-{}", context.job), file, size, job: context.job };
        let mut too_old = Vec::new();
        let outcome = self.record_outcome(id, |record| {
            record.cores.retain(|c| c.file != core.file);
            record.cores.push(core);
            let of_crashes = |c: &CoreDump| c.file.as_str().contains(CRASH_CORE);
            let count = record.cores.iter().filter(|c| of_crashes(c)).count();
            let mut surplus = count.saturating_sub(CRASH_CORES);
            record.cores.retain(|c| {
                let goes = surplus > 0 && of_crashes(c);
                if goes {
                    surplus -= 1;
                    too_old.push(c.file.clone());
                }
                !goes
            });
        })?;
        for file in &too_old {
            self.remove_file(file).await?;
        }
        Ok(Some(outcome))
    }

    /// Files of this VM that no record need list: what a save or dump that was given up has left later.
    pub(super) async fn stray_files(&self, id: VmId) -> Vec<SafePath> {
        let mut all = Vec::new();
        for start in [self.save_file(id, ""), self.core_file(id, "")] {
            match self.files.list(&start).await {
                Ok(found) => all.extend(found.into_iter().map(|one| one.file)),
                Err(error) => tracing::warn!(vm_uuid = %id, %error, "a VM's files cannot be listed"),
            }
        }
        all
    }
}

/// By itself, so that there is nothing to save any more. A domain that is being saved is suspended.
fn has_ended(state: RunState) -> bool {
    matches!(state, RunState::Shutdown(reason) if reason != ShutdownReason::Suspend)
}

/// The tag of a checkpoint's file begins so.
pub(super) const CHECKPOINT: &str = "checkpoint.";
