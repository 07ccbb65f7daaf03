//! How each kind of VM step is carried out. Every one looks at the world first, so that running it again after
//! a crash reaches the same end. A domain is always found by its VM's identity, never by a domid remembered
//! from before.

use super::step::Hotplug;
use super::{Operations, fault};
use crate::event::{Event, Kind, kind};
use crate::job::{JobFault, Outcome, StepContext};
use crate::model::{SafePath, Timestamp, VmId};
use crate::store::Txn;
use crate::vm::{Action, Change, EndCause, Intent, VMS, Vm, VmRecord, VmState, allowed, state_of};
use crate::xen::{DomId, DomainInfo, RunState, ToolstackError};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

pub(super) type Result<T> = std::result::Result<T, JobFault>;

/// A guest that has not ended is asked again after this long.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// What a guest is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Shutdown,
    Reboot,
}

impl Operations {
    pub(super) fn vm(&self, id: VmId) -> Result<Vm> {
        self.vms.get(id).ok_or_else(|| JobFault::refusal("VM_NOT_FOUND", format!("no VM {id} is known here")))
    }

    /// The VM's domain as it is now, not as last seen.
    pub(super) async fn domain(&self, id: VmId) -> Result<Option<DomainInfo>> {
        let found = self.toolstack.find(id).await.map_err(fault::toolstack)?;
        Ok(found.filter(|d| d.state != RunState::Dying))
    }

    pub(super) async fn living(&self, id: VmId) -> Result<DomainInfo> {
        match self.domain(id).await? {
            Some(domain) if !matches!(domain.state, RunState::Shutdown(_)) => Ok(domain),
            _ => Err(JobFault::refusal("VM_STATE", format!("VM {id} has no living domain"))),
        }
    }

    /// Lets the registry see a domain as it is now; what our own step did is seen before its caller is told.
    pub(super) async fn look(&self, domid: DomId) {
        if let Err(fault) = self.see(domid).await {
            tracing::debug!(domid = domid.0, %fault, "a domain cannot be looked at now");
        }
    }

    /// The same; answers the VM that the domain is of, and what changed.
    pub(super) async fn see(&self, domid: DomId) -> Result<(Option<VmId>, Option<Change>)> {
        let last = self.vms.last_look(domid);
        let info = self.toolstack.get(domid).await.map_err(fault::toolstack)?;
        let vm = info.as_ref().and_then(|info| info.vm);
        Ok((vm, self.vms.observe_since(last, domid, info)))
    }

    /// The record after `change`, written with the outcome, and in memory once that is on disk.
    pub(super) fn record_outcome(&self, id: VmId, change: impl FnOnce(&mut VmRecord)) -> Result<Outcome> {
        let mut record = VmRecord::clone(&self.vm(id)?.record);
        change(&mut record);
        Ok(self.write_record(record))
    }

    pub(super) fn write_record(&self, record: VmRecord) -> Outcome {
        let mut writes = Txn::new();
        writes.put(&VMS, &record.id(), &record);
        let vms = std::sync::Arc::clone(&self.vms);
        Outcome { writes, then: Some(Box::new(move || vms.put(record))), ..Outcome::default() }
    }

    pub(super) async fn check_vm(&self, id: VmId, action: Action, base: Option<u32>) -> Result<Outcome> {
        let vm = self.vm(id)?;
        let domain = self.domain(id).await?;
        let state = state_of(&vm.record.intent, domain.as_ref());
        allowed(state, action).map_err(|refusal| JobFault::refusal("VM_STATE", refusal.to_string()))?;
        if base.is_some_and(|base| base != vm.record.mark()) {
            let text = format!("VM {id} was changed by another job meanwhile; nothing was done, ask again");
            return Err(JobFault::refusal("CONFLICT", text));
        }
        Ok(Outcome::value(json!({ "paused": state == VmState::Paused })))
    }

    pub(super) fn check_new_vm(&self, id: VmId) -> Result<Outcome> {
        match self.vms.get(id) {
            Some(_) => Err(JobFault::refusal("VM_EXISTS", format!("VM {id} exists"))),
            None if self.moves.expects(id) => {
                let text = format!("VM {id} is just coming from another host");
                Err(JobFault::refusal("VM_EXISTS", text))
            }
            None => Ok(Outcome::done()),
        }
    }

    fn check_clash(&self, record: &VmRecord) -> Result<Outcome> {
        match self.vms.clash(record).or_else(|| self.moves.clash(record)) {
            Some(clash) => Err(JobFault::refusal("VM_EXISTS", clash)),
            None => Ok(Outcome::done()),
        }
    }

    pub(super) fn put_vm(
        &self,
        mut record: VmRecord,
        created: bool,
        from: Option<&VmRecord>,
        context: &StepContext,
    ) -> Result<Outcome> {
        if let Some(from) = from {
            let now = self.vm(record.id())?.record;
            record = record.rebased(from, &now).ok_or_else(|| {
                let text =
                    "another job has changed the same meanwhile, and both together cannot be; ask again";
                JobFault::refusal("CONFLICT", text)
            })?;
        }
        self.check_clash(&record)?;
        let name = record.config.name.clone();
        let (kind, done) =
            if created { (kind::VM_CREATED, "created") } else { (kind::VM_CHANGED, "changed") };
        let event = Event::new(kind, VmRecord::lock(record.id()), format!("VM {name}: {done}"));
        let mut outcome = if created {
            self.write_record(record)
        } else {
            // What is not configuration may have changed since the plan was made.
            let id = record.id();
            self.record_outcome(id, |now| {
                now.config = record.config;
                now.kept = record.kept;
                now.repo = record.repo;
                now.ha = record.ha;
            })?
        };
        event.with_job(context.job).append_to(&mut outcome.writes);
        Ok(outcome)
    }

    pub(super) async fn delete_vm(&self, id: VmId, context: &StepContext) -> Result<Outcome> {
        let record = self.vm(id)?.record;
        let name = &record.config.name;
        let mut files: Vec<SafePath> = record.cores.iter().map(|core| core.file.clone()).collect();
        if let Intent::Saved { file, .. } = &record.intent {
            files.push(file.clone());
        }
        files.extend(record.checkpoint.clone());
        files.extend(self.stray_files(id).await);
        files.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        files.dedup();
        let mut writes = Txn::new();
        writes.delete(&VMS, &id);
        let event = Event::new(kind::VM_DELETED, VmRecord::lock(id), format!("VM {name}: deleted"));
        event.with_job(context.job).append_to(&mut writes);
        let vms = std::sync::Arc::clone(&self.vms);
        let value = Some(json!({ "left_files": files }));
        Ok(Outcome { value, writes, then: Some(Box::new(move || vms.remove(id))), ..Outcome::default() })
    }

    /// Builds the domain, or finds the one that an interrupted run of this very step has built.
    pub(super) async fn create_domain(
        &self,
        id: VmId,
        event: Kind,
        context: &StepContext,
    ) -> Result<Outcome> {
        let vm = self.vm(id)?;
        let domid = match self.domain(id).await? {
            Some(domain) if !matches!(domain.state, RunState::Shutdown(_)) && context.resumed => domain.domid,
            Some(_) if !context.resumed => {
                return Err(JobFault::refusal("VM_STATE", format!("VM {id} has a domain already")));
            }
            Some(ended) => {
                self.destroy_found(ended.domid).await?;
                self.build(id, &vm.record).await?
            }
            None => self.build(id, &vm.record).await?,
        };
        self.look(domid).await;
        let how = match event {
            kind::VM_RESTARTED_AFTER_CRASH => "started again after it crashed",
            kind::VM_REBOOTED => "rebooted",
            _ => "started",
        };
        let text = format!("VM {}: {how}", vm.record.config.name);
        let event = Event::new(event, VmRecord::lock(id), text).with_job(context.job);
        let mut outcome = self.record_outcome(id, |record| {
            record.intent = Intent::On;
            record.changed = Timestamp::now();
            record.last_end = None;
            record.crashes_in_a_row = 0;
            record.crash_seen = None;
        })?;
        event.with("domid", domid.0).append_to(&mut outcome.writes);
        Ok(outcome)
    }

    async fn build(&self, id: VmId, record: &VmRecord) -> Result<DomId> {
        let built = self.toolstack.create(&record.config, false).await;
        self.built(id, built).await
    }

    pub(super) async fn built(
        &self,
        id: VmId,
        built: std::result::Result<DomId, ToolstackError>,
    ) -> Result<DomId> {
        match built {
            Ok(domid) => Ok(domid),
            // The effect is unknown: the world knows. A domain that is there and alive is ours, since none was
            // there a moment ago and we hold the VM's lock.
            Err(error) if is_unsure(&error) => match self.domain(id).await? {
                Some(domain) if !matches!(domain.state, RunState::Shutdown(_)) => Ok(domain.domid),
                _ => Err(fault::toolstack(error)),
            },
            Err(error) => Err(fault::toolstack(error)),
        }
    }

    /// Takes back a domain that this job has built: before it there was none.
    pub(super) async fn undo_create(&self, id: VmId) -> Result<Outcome> {
        if let Some(domain) = self.domain(id).await? {
            self.destroy_found(domain.domid).await?;
        }
        Ok(Outcome::done())
    }

    pub(super) async fn destroy_found(&self, domid: DomId) -> Result<()> {
        match self.toolstack.destroy(domid).await {
            Ok(()) | Err(ToolstackError::NoSuchDomain) => {}
            // The effect is unknown: the world knows.
            Err(error) if is_unsure(&error) && matches!(self.toolstack.get(domid).await, Ok(None)) => {}
            Err(error) => return Err(fault::toolstack(error)),
        }
        let _ = self.vms.observe_one(domid, None);
        Ok(())
    }

    /// Asks the guest to end and waits. `then_force`: a guest that does not is no failure, the next step ends it.
    pub(super) async fn shutdown_domain(
        &self,
        id: VmId,
        timeout_s: u64,
        then_force: bool,
        context: &StepContext,
    ) -> Result<Outcome> {
        let Some(domain) = self.domain(id).await? else { return Ok(Outcome::done()) };
        if matches!(domain.state, RunState::Shutdown(_)) {
            return Ok(Outcome::done());
        }
        let paused_now = domain.state == RunState::Paused;
        // Also if it was this very step, before a crash, that let it run.
        let told = context.outcomes.first().and_then(|first| first.as_ref()?["paused"].as_bool());
        let was_paused = paused_now || (context.resumed && told == Some(true));
        if paused_now {
            // A paused guest hears nothing.
            self.toolstack.unpause(domain.domid).await.map_err(fault::toolstack)?;
        }
        let limit = Duration::from_secs(timeout_s);
        let ended = self.ask_to_end(domain.domid, Asked::Shutdown, limit, context).await;
        if matches!(ended, Ok(true)) || (then_force && ended.is_ok()) {
            return Ok(Outcome::done());
        }
        if was_paused {
            if let Err(error) = self.toolstack.pause(domain.domid).await {
                tracing::warn!(vm_uuid = %id, job_id = %context.job, %error, "a guest that was paused runs now");
            }
            self.look(domain.domid).await;
        }
        ended?;
        let goes_on = if was_paused { "is paused again" } else { "runs on" };
        let text = format!(
            "the guest of VM {id} was asked to shut down and has not within {timeout_s} s; it {goes_on}. \
             Ask again with force to end it at once"
        );
        Err(JobFault::new("SHUTDOWN_IGNORED", text))
    }

    /// Asks a guest to end, and waits until its domain has ended or gone. `false`: it has not within `limit`.
    ///
    /// It is asked again and again: a guest that is just booting does not listen yet, and nothing tells that it did
    /// not hear. One that did pays no heed to the same once more.
    async fn ask_to_end(
        &self,
        domid: DomId,
        asked: Asked,
        limit: Duration,
        context: &StepContext,
    ) -> Result<bool> {
        let start = Instant::now();
        let deadline = start + limit;
        let mut changes = self.world_changes.subscribe();
        self.ask(domid, asked).await.map_err(fault::toolstack)?;
        let mut again = Instant::now() + ASK_AGAIN;
        loop {
            changes.mark_unchanged();
            match self.toolstack.get(domid).await.map_err(fault::toolstack)? {
                None => return Ok(true),
                Some(info) if matches!(info.state, RunState::Shutdown(_) | RunState::Dying) => {
                    return Ok(true);
                }
                Some(_) if Instant::now() >= deadline => return Ok(false),
                Some(_) => {}
            }
            if Instant::now() >= again {
                if let Err(error) = self.ask(domid, asked).await {
                    tracing::debug!(domid = domid.0, %error, "a guest cannot be asked again to end");
                }
                again = Instant::now() + ASK_AGAIN;
            }
            let percent = start.elapsed().as_millis() * 100 / limit.as_millis().max(1);
            context.progress(u8::try_from(percent).unwrap_or(100).min(99));
            tokio::select! {
                _ = changes.changed() => {}
                // An observation may be lost; a second is soon enough then.
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = context.cancelled.cancelled() => return Err(JobFault::new("CANCELLED", "cancelled")),
            }
        }
    }

    async fn ask(&self, domid: DomId, asked: Asked) -> std::result::Result<(), ToolstackError> {
        match asked {
            Asked::Shutdown => self.toolstack.shutdown(domid).await,
            Asked::Reboot => self.toolstack.reboot(domid).await,
        }
    }

    pub(super) async fn destroy_domain(
        &self,
        id: VmId,
        cause: EndCause,
        context: &StepContext,
    ) -> Result<Outcome> {
        let vm = self.vm(id)?;
        let domain = self.domain(id).await?;
        // One that waits for its start after a boot is off and is to stay so from now on.
        let waits = cause == EndCause::Asked && vm.record.last_end == Some(EndCause::HostDown);
        let was_off = domain.is_none() && vm.record.intent == Intent::Off && !waits;
        if let Some(domain) = domain {
            self.drop_stale_memory(id, &domain).await?;
            self.destroy_found(domain.domid).await?;
        }
        if was_off && !context.resumed {
            return Ok(Outcome::done());
        }
        self.off_outcome(id, cause, kind::VM_STOPPED, context)
    }

    /// The VM is off from now on, for this reason.
    pub(super) fn off_outcome(
        &self,
        id: VmId,
        cause: EndCause,
        kind: Kind,
        context: &StepContext,
    ) -> Result<Outcome> {
        let name = self.vm(id)?.record.config.name.clone();
        let mut outcome = self.record_outcome(id, |record| {
            record.intent = Intent::Off;
            record.changed = Timestamp::now();
            record.last_end = Some(cause);
            record.crash_seen = None;
        })?;
        let text = format!("VM {name}: off ({})", words(cause));
        let event = Event::new(kind, VmRecord::lock(id), text).with_job(context.job);
        event.with("cause", words(cause)).append_to(&mut outcome.writes);
        Ok(outcome)
    }

    pub(super) async fn ask_reboot(
        &self,
        id: VmId,
        timeout_s: u64,
        context: &StepContext,
    ) -> Result<Outcome> {
        let Some(domain) = self.domain(id).await? else { return Ok(Outcome::done()) };
        if matches!(domain.state, RunState::Shutdown(_)) {
            return Ok(Outcome::done());
        }
        let limit = Duration::from_secs(timeout_s);
        if !self.ask_to_end(domain.domid, Asked::Reboot, limit, context).await? {
            tracing::warn!(vm_uuid = %id, job_id = %context.job, timeout_s, "guest ignores the reboot; its domain is ended");
        }
        Ok(Outcome::done())
    }

    pub(super) async fn clear_domain(&self, id: VmId) -> Result<Outcome> {
        if let Some(domain) = self.domain(id).await? {
            self.drop_stale_memory(id, &domain).await?;
            self.destroy_found(domain.domid).await?;
        }
        Ok(Outcome::done())
    }

    /// A guest that was to come back after its domain was cleared away comes back all the same.
    pub(super) async fn undo_clear(&self, id: VmId, context: &StepContext) -> Result<Outcome> {
        if self.vm(id)?.record.intent != Intent::On || self.domain(id).await?.is_some() {
            return Ok(Outcome::done());
        }
        self.rebuild_domain(id, context).await
    }

    pub(super) async fn pause_domain(&self, id: VmId, pause: bool) -> Result<Outcome> {
        let domain = self.living(id).await?;
        let paused = domain.state == RunState::Paused;
        match (paused, pause) {
            (false, true) => self.toolstack.pause(domain.domid).await.map_err(fault::toolstack)?,
            (true, false) => self.toolstack.unpause(domain.domid).await.map_err(fault::toolstack)?,
            _ => {}
        }
        self.look(domain.domid).await;
        Ok(Outcome::value(json!({ "was_paused": paused })))
    }

    /// Brings back the state before, if the outcome tells it: a step in doubt leaves the guest as it is found.
    pub(super) async fn undo_pause(&self, id: VmId, outcome: Option<&serde_json::Value>) -> Result<Outcome> {
        match outcome.and_then(|o| o["was_paused"].as_bool()) {
            Some(was_paused) => self.pause_domain(id, was_paused).await,
            None => Ok(Outcome::done()),
        }
    }

    /// Builds the domain after a reboot or a dump; the step before cleared the old one away.
    pub(super) async fn rebuild_domain(&self, id: VmId, context: &StepContext) -> Result<Outcome> {
        let context = StepContext { resumed: true, ..context.clone() };
        self.create_domain(id, kind::VM_REBOOTED, &context).await
    }

    /// Applies one change to the running domain. A domain that has gone meanwhile needs none: the record says
    /// what the next start builds.
    pub(super) async fn hotplug(&self, id: VmId, change: &Hotplug) -> Result<Outcome> {
        let living = |domain: &DomainInfo| !matches!(domain.state, RunState::Shutdown(_));
        let Some(domain) = self.domain(id).await?.filter(living) else { return Ok(Outcome::done()) };
        let now = self.toolstack.config(domain.domid).await.map_err(fault::toolstack)?;
        let t = &self.toolstack;
        let domid = domain.domid;
        let done = match change {
            Hotplug::AttachDisk(disk) if now.disks.contains(disk) => Ok(()),
            Hotplug::AttachDisk(disk) => t.attach_disk(domid, disk).await,
            Hotplug::DetachDisk(disk) if !now.disks.iter().any(|d| d.device == disk.device) => Ok(()),
            Hotplug::DetachDisk(disk) => t.detach_disk(domid, &disk.device).await,
            Hotplug::AttachVif(vif) if now.vifs.contains(vif) => Ok(()),
            Hotplug::AttachVif(vif) => t.attach_vif(domid, vif).await,
            Hotplug::DetachVif(vif) if !now.vifs.iter().any(|v| v.mac == vif.mac) => Ok(()),
            Hotplug::DetachVif(vif) => t.detach_vif(domid, vif.mac).await,
            Hotplug::Vcpus { online, .. } => t.set_vcpus(domid, *online).await,
            Hotplug::Memory { target, .. } => t.set_memory(domid, *target).await,
            Hotplug::Scheduling { weight, cap, .. } => t.set_scheduling(domid, *weight, *cap).await,
        };
        done.map_err(fault::toolstack)?;
        self.look(domid).await;
        Ok(Outcome::done())
    }

    pub(super) async fn signal(&self, id: VmId, signal: Signal<'_>) -> Result<Outcome> {
        let domid = self.living(id).await?.domid;
        match signal {
            Signal::Sysrq(letter) => self.toolstack.sysrq(domid, letter).await,
            Signal::Trigger(trigger, vcpu) => self.toolstack.trigger(domid, trigger, vcpu).await,
            Signal::Send(key, value) => self.toolstack.send_to_guest(domid, key, value).await,
        }
        .map_err(fault::toolstack)?;
        Ok(Outcome::done())
    }

    /// The VM's state as the world is now.
    pub async fn fresh_state(&self, id: VmId) -> Result<VmState> {
        let vm = self.vm(id)?;
        Ok(state_of(&vm.record.intent, self.domain(id).await?.as_ref()))
    }
}

/// Whether the effect of a call that ended so is unknown.
pub(super) fn is_unsure(error: &ToolstackError) -> bool {
    matches!(error, ToolstackError::Timeout | ToolstackError::Unreachable(_))
}

/// What goes to a living guest.
pub(super) enum Signal<'a> {
    Sysrq(char),
    Trigger(crate::xen::Trigger, Option<u32>),
    Send(&'a str, &'a str),
}

pub(super) fn words(cause: EndCause) -> &'static str {
    match cause {
        EndCause::Asked => "stopped",
        EndCause::Poweroff => "shut itself down",
        EndCause::Crash => "crashed",
        EndCause::Watchdog => "its watchdog ended it",
        EndCause::HostDown => "its host went down",
        EndCause::Unknown => "cause unknown",
    }
}
