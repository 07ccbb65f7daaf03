//! The agent's first look at the host, and the host's boots: verdicts of `vm::adopt` told and carried out.
//!
//! Words: a boot is *taken* when it is written down, in one transaction with what it means for each record: a VM that
//! ran is off since its host went down. Until then nothing is settled whose domain is missing, so that a VM is never
//! taken for lost whose host has only been rebooted. *Autostart* then starts those that are to be started, one job
//! that outlives the agent; each start is a job of its own, so that nobody else's job waits for the whole, and one
//! that fails stops no other. Those that failed are tried again when all have had their turn: a host that has just
//! booted is busy, and its storage may still be coming.
//!
//! Who owns what: `observe` calls in here once it has seen all domains; the boot that is kept and the one that is now
//! are [`BootState`], in memory; the row of the kept one changes only with the records (or when there was none).
//! Every decision on a missing domain asks the machine for its boot first.

use super::{Operations, plan};
use crate::event::{Event, Severity, kind};
use crate::host::record::{BOOT, BootRecord, HOST_KEY, HostId};
use crate::job::{JobFault, JobRecord, JobState, Options, Outcome, StepContext};
use crate::machine::Machine;
use crate::model::{JobId, Timestamp, VmId};
use crate::store::{Store, StoreError, Txn};
use crate::vm::adopt::{self, Boot, DomainVerdict, Evidence, Facts, VmVerdict};
use crate::vm::{EndCause, Intent, VMS, VmRecord};
use crate::xen::{DomId, DomainInfo};
use futures_util::StreamExt;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

type Result<T> = std::result::Result<T, JobFault>;

/// VMs of one order that are started at the same time: building domains is work for dom0's CPUs and disks.
const STARTS_AT_ONCE: usize = 4;
/// Before those that failed are tried again, and once more.
const TRIED_AGAIN_AFTER: [Duration; 2] = [Duration::from_secs(15), Duration::from_secs(60)];
/// Names in the event of an adoption; `vm_adopted` tells more.
const NAMES_TOLD: usize = 50;
/// Tries of taking one boot, each a job, some seconds from one to the next.
const BOOT_JOBS: usize = 500;

/// The boot that is written down, and the one that is.
#[derive(Debug, Clone, Default)]
pub(super) struct BootState {
    kept: Option<BootRecord>,
    now: Option<String>,
}

/// What was found at the agent's start, and what it was taken for.
#[derive(Debug)]
pub struct Found {
    pub at: Timestamp,
    pub boot: Boot,
    pub domains: Vec<FoundDomain>,
    pub vms: Vec<FoundVm>,
}

#[derive(Debug)]
pub struct FoundDomain {
    pub domid: DomId,
    pub name: String,
    pub uuid: Option<VmId>,
    pub verdict: DomainVerdict,
}

#[derive(Debug)]
pub struct FoundVm {
    pub vm: VmId,
    pub name: String,
    pub verdict: VmVerdict,
}

/// The boot kept by the store. A store that keeps none yet, or that of another machine, begins with the boot that is
/// now: what ran before is not known to have gone with it.
pub(super) async fn load_boot(
    store: &Store,
    machine: &dyn Machine,
) -> std::result::Result<BootState, StoreError> {
    let now = read(machine).await;
    let mut kept = store.get(&BOOT, HOST_KEY).await?;
    if let Some(now) = now.clone().filter(|now| kept.as_ref().is_none_or(|kept| kept.machine != now.machine))
    {
        if kept.is_some() {
            tracing::warn!(
                "the state is that of another machine; what has gone is not known to have gone with it"
            );
        }
        let mut txn = Txn::essential();
        txn.put(&BOOT, HOST_KEY, &now);
        match store.commit(txn).await {
            Ok(_) | Err(StoreError::ReadOnly(_) | StoreError::DiskFull(_)) => kept = Some(now),
            Err(error) => return Err(error),
        }
    }
    Ok(BootState { kept, now: now.map(|now| now.boot_id) })
}

/// The machine's boot; `None`: it does not tell.
async fn read(machine: &dyn Machine) -> Option<BootRecord> {
    match machine.facts().await {
        Ok(facts) if !facts.boot_id.is_empty() => {
            let machine = HostId::from_bytes(facts.dmi.system_uuid);
            Some(BootRecord { boot_id: facts.boot_id, machine, taken: Timestamp::now() })
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, "the machine does not tell its boot id");
            None
        }
    }
}

impl Operations {
    fn boot_state(&self) -> BootState {
        self.boot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_boot(&self, change: impl FnOnce(&mut BootState)) {
        change(&mut self.boot.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// As of the last reading of the machine.
    pub(super) fn boot(&self) -> Boot {
        match self.boot_state() {
            BootState { kept: Some(kept), now: Some(now) } if kept.boot_id == now => Boot::Same,
            BootState { kept: Some(_), now: Some(_) } => Boot::New,
            _ => Boot::Unknown,
        }
    }

    /// Whether this boot is written down with what it meant for the VMs.
    pub fn boot_taken(&self, boot_id: &str) -> bool {
        self.boot_state().kept.is_some_and(|kept| kept.boot_id == boot_id)
    }

    /// Reads the machine's boot. (A host of ours does not boot under a living agent; a simulated one does.)
    pub(super) async fn read_boot(&self) -> Boot {
        if let Some(now) = read(&*self.machine).await {
            self.set_boot(|state| state.now = Some(now.boot_id));
        }
        self.boot()
    }

    /// What was found at the start; `None` before all domains could be read.
    pub fn found(&self) -> Option<Arc<Found>> {
        self.found.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives every domain and every record its verdict, and tells it.
    pub(super) async fn adopt(&self, domains: &[DomainInfo]) {
        let records: Vec<Arc<VmRecord>> = self.vms.all().into_iter().map(|vm| vm.record).collect();
        let in_job = |vm| self.engine().is_some_and(|engine| engine.is_claimed(&VmRecord::lock(vm)));
        let arriving = |vm| self.moves.expects(vm);
        let boot = self.read_boot().await;
        let adoption = adopt::adopt(&records, domains, &self.facts_of(boot, &in_job, &arriving));
        let by_id: BTreeMap<DomId, &DomainInfo> = domains.iter().map(|d| (d.domid, d)).collect();
        let domains = adoption.domains.iter().filter_map(|(domid, verdict)| {
            let info = by_id.get(domid)?;
            Some(FoundDomain { domid: *domid, name: info.name.clone(), uuid: info.vm, verdict: *verdict })
        });
        let domains = domains.collect();
        let mut vms = Vec::with_capacity(records.len());
        for (record, (vm, verdict)) in records.iter().zip(&adoption.vms) {
            let verdict = match self.has_moved_on(record, *verdict).await {
                true => VmVerdict::InJob,
                false => *verdict,
            };
            vms.push(FoundVm { vm: *vm, name: record.config.name.to_string(), verdict });
        }
        let found = Arc::new(Found { at: Timestamp::now(), boot, domains, vms });
        // A host without VMs has nothing to tell at each start.
        if !(found.domains.is_empty() && found.vms.is_empty()) {
            let event = found.event();
            tracing::info!(text = event.text, "running domains were matched with records");
            if let Err(error) = self.events.publish(&event).await {
                tracing::warn!(%error, "an event was not written");
            }
        }
        *self.found.write().unwrap_or_else(PoisonError::into_inner) = Some(found);
    }

    /// Whether a VM that seems gone is not: jobs of an earlier life go on, and new ones come, while domains and records
    /// are read one after the other.
    async fn has_moved_on(&self, record: &VmRecord, verdict: VmVerdict) -> bool {
        let lock = VmRecord::lock(record.id());
        let has_moved = || {
            // In this order: a job writes its record before it lets go of the lock.
            let is_in_job = self.engine().is_some_and(|engine| engine.is_claimed(&lock));
            is_in_job || self.vms.get(record.id()).is_none_or(|now| *now.record != *record)
        };
        match verdict {
            // Asked again after the toolstack's answer, which takes its time.
            VmVerdict::Gone => {
                has_moved() || matches!(self.domain(record.id()).await, Ok(Some(_))) || has_moved()
            }
            // Its domain went with the boot before this one.
            VmVerdict::WentWithHost => has_moved(),
            _ => false,
        }
    }

    fn facts_of<'a>(
        &self,
        boot: Boot,
        in_job: &'a dyn Fn(VmId) -> bool,
        arriving: &'a dyn Fn(VmId) -> bool,
    ) -> Facts<'a> {
        let autostart_default = self.settings.vm.autostart_default;
        Facts { boot, autostart_default, in_job, arriving }
    }

    /// Submits the job that takes a new boot and starts what is to be started, unless it is open or done. A try that
    /// has failed is made again.
    pub(super) async fn submit_host_boot(&self) {
        let (Boot::New, Some(engine)) = (self.boot(), self.engine()) else { return };
        let Some(boot_id) = self.boot_state().now else { return };
        for n in 0..BOOT_JOBS {
            let key = Some(format!("host_boot/{boot_id}/{n}"));
            let options = Options { idempotency_key: key, ..Options::default() };
            let plan = plan::host_boot(&boot_id, self.autostart_waits_s());
            match engine.submit(self.submission("host_boot", "agent", plan, options)).await {
                Ok(job) => match engine.get(job).await {
                    Ok(Some(record)) if record.state.is_terminal() && self.boot() == Boot::New => {}
                    _ => return tracing::debug!(job_id = %job, boot_id, "the host has booted anew"),
                },
                Err(error) => return tracing::warn!(%error, "the host's boot cannot be taken now"),
            }
        }
        tracing::error!(boot_id, "the host's boot could not be taken; VMs that ran stay as they are");
    }

    /// How long autostart may take by its own data.
    fn autostart_waits_s(&self) -> u64 {
        let settings = &self.settings.vm;
        let records = self.vms.all().into_iter().map(|vm| vm.record);
        let starting: Vec<_> = records.filter(|r| r.starts_by_itself(settings.autostart_default)).collect();
        let mut delays = BTreeMap::new();
        for place in starting.iter().map(|r| r.autostart_place()) {
            let longest: &mut u32 = delays.entry(place.order).or_default();
            *longest = place.delay_s.max(*longest);
        }
        let delays: u64 = delays.into_values().map(u64::from).sum();
        let starts = (starting.len().div_ceil(STARTS_AT_ONCE) + delays_count(&starting)) as u64;
        let rounds = 1 + TRIED_AGAIN_AFTER.len() as u64;
        let pauses: u64 = TRIED_AGAIN_AFTER.iter().map(Duration::as_secs).sum();
        settings.autostart_delay_s + delays + pauses + rounds * starts * settings.toolstack_timeout_s
    }

    /// The first step of `host_boot`: has the boot written down, under the host's lock, which this job does not hold.
    pub(super) async fn take_boot(&self, boot_id: &str, context: &StepContext) -> Result<Outcome> {
        let key = Some(format!("take_boot/{boot_id}/{}", context.job));
        let options = Options { idempotency_key: key, ..Options::default() };
        let job = self.submission("take_boot", &context.caller, plan::take_boot(boot_id), options);
        let ended = self.run_beside(job, context).await?;
        match ended.state {
            JobState::Succeeded => Ok(Outcome::value(json!({ "job": ended.id.0 }))),
            _ => {
                let (name, why) = match &ended.fault {
                    Some(fault) => (fault.name.as_str(), fault.to_string()),
                    None => ("INTERNAL", String::new()),
                };
                let text = format!("the host's boot was not written down (job {}): {why}", ended.id);
                Err(JobFault::new(name, text))
            }
        }
    }

    /// Every job on a VM has ended, none begins: what ran went down with the host, unless it runs.
    pub(super) async fn write_boot(&self, boot_id: &str, context: &StepContext) -> Result<Outcome> {
        if self.read_boot().await != Boot::New || self.boot_state().now.as_deref() != Some(boot_id) {
            // Taken already, or the host has booted once more, which is another job's.
            return Ok(Outcome::done());
        }
        let domains = self.toolstack.list().await.map_err(super::fault::toolstack)?;
        let records: Vec<Arc<VmRecord>> = self.vms.all().into_iter().map(|vm| vm.record).collect();
        let adoption = adopt::adopt(&records, &domains, &self.facts_of(Boot::New, &|_| false, &|_| false));
        let mut writes = Txn::essential();
        let mut changed = Vec::new();
        for (record, (id, verdict)) in records.iter().zip(&adoption.vms) {
            let starts = *verdict == VmVerdict::Restart(Evidence::HostBooted);
            let went = (starts || *verdict == VmVerdict::WentWithHost) && record.intent == Intent::On;
            // One that was saved, unseen, has its memory: that is found when it is settled.
            if !went || self.finished_save(record).await?.is_some() {
                continue;
            }
            let mut record = VmRecord::clone(record);
            record.intent = Intent::Off;
            record.changed = Timestamp::now();
            record.last_end = Some(EndCause::HostDown);
            writes.put(&VMS, id, &record);
            let then = if starts { "it is started again" } else { "autostart is not set, so it stays off" };
            let text = format!("VM {}: its host went down while it ran; {then}", record.config.name);
            let mut event = Event::new(kind::VM_GONE, VmRecord::lock(*id), text).with_job(context.job);
            if starts {
                event = event.with_severity(Severity::Warning);
            }
            event.with("cause", super::vm_steps::words(EndCause::HostDown)).append_to(&mut writes);
            changed.push(record);
        }
        let Some(before) = self.boot_state().kept else { return Ok(Outcome::done()) };
        let kept = BootRecord { boot_id: boot_id.to_owned(), taken: Timestamp::now(), ..before };
        writes.put(&BOOT, HOST_KEY, &kept);
        let result = json!({ "went_with_host": changed.len() });
        let then = self.hook(move |operations| {
            changed.into_iter().for_each(|record| operations.vms.put(record));
            operations.set_boot(|state| state.kept = Some(kept));
            operations.look_again.notify_one();
        });
        Ok(Outcome { result: Some(result), writes, then, ..Outcome::default() })
    }

    /// The second step of `host_boot`. What is still to be started is read off the records, so that a run after a
    /// crash goes on where the one before was.
    pub(super) async fn autostart(&self, boot_id: &str, context: &StepContext) -> Result<Outcome> {
        let (mut started, mut failed) = (Vec::new(), Vec::new());
        for round in 0..=TRIED_AGAIN_AFTER.len() {
            if let Some(before) = round.checked_sub(1) {
                if failed.is_empty() {
                    break;
                }
                pause(TRIED_AGAIN_AFTER[before], context).await?;
            }
            failed.clear();
            if !self.autostart_round(boot_id, round, context, &mut started, &mut failed).await? {
                return Ok(Outcome::done());
            }
        }
        Ok(autostart_outcome(&started, &failed, context))
    }

    /// Starts all that wait for it, order by order. False: the host has booted once more, which is another job's.
    async fn autostart_round(
        &self,
        boot_id: &str,
        round: usize,
        context: &StepContext,
        started: &mut Vec<String>,
        failed: &mut Vec<String>,
    ) -> Result<bool> {
        let mut last = None;
        while let Some((order, group)) = self.next_order(last) {
            last = Some(order);
            self.await_turn(order, context).await?;
            if self.boot_state().kept.is_none_or(|kept| kept.boot_id != boot_id) {
                return Ok(false);
            }
            let starts =
                group.into_iter().map(|vm| async move { (vm, self.autostart_one(vm, round, context).await) });
            let mut starts = futures_util::stream::iter(starts).buffer_unordered(STARTS_AT_ONCE);
            while let Some((vm, done)) = starts.next().await {
                let name =
                    self.vms.get(vm).map_or_else(|| vm.to_string(), |vm| vm.record.config.name.to_string());
                match done? {
                    Some(true) => started.push(name),
                    Some(false) => failed.push(name),
                    None => {}
                }
            }
        }
        Ok(true)
    }

    /// The VMs that come next, all of one order.
    fn next_order(&self, after: Option<u32>) -> Option<(u32, Vec<VmId>)> {
        let default = self.settings.vm.autostart_default;
        let waiting = self.vms.all().into_iter().map(|vm| vm.record).filter(|r| r.awaits_autostart(default));
        let mut orders: BTreeMap<u32, Vec<VmId>> = BTreeMap::new();
        for record in waiting {
            let order = record.autostart_place().order;
            if after.is_none_or(|after| order > after) {
                orders.entry(order).or_default().push(record.id());
            }
        }
        orders.pop_first()
    }

    /// Waits for the delay of the order that was started before this one, or for the one after the boot. Both count
    /// from what is written down, so that a restart of the agent does not begin them anew.
    async fn await_turn(&self, order: u32, context: &StepContext) -> Result<()> {
        let Some(kept) = self.boot_state().kept else { return Ok(()) };
        let settings = &self.settings.vm;
        let records = self.vms.all().into_iter().map(|vm| vm.record);
        let started = records.filter(|r| r.starts_by_itself(settings.autostart_default));
        let started = started.filter(|r| r.intent == Intent::On && r.changed >= kept.taken);
        let mut before: BTreeMap<u32, Vec<(u64, Timestamp)>> = BTreeMap::new();
        for record in started {
            let place = record.autostart_place();
            before.entry(place.order).or_default().push((place.delay_s.into(), record.changed));
        }
        let last = before.range(..order).next_back().map(|(_, delays)| delays.clone());
        let delays = last.unwrap_or_else(|| vec![(settings.autostart_delay_s, kept.taken)]);
        let now = Timestamp::now();
        let wait =
            delays.into_iter().map(|(delay_s, since)| left(Duration::from_secs(delay_s), since, now)).max();
        pause(wait.unwrap_or_default(), context).await
    }

    /// Whether it was started; `None`: somebody else has decided about it meanwhile.
    async fn autostart_one(&self, vm: VmId, round: usize, context: &StepContext) -> Result<Option<bool>> {
        let default = self.settings.vm.autostart_default;
        if !self.vms.get(vm).is_some_and(|vm| vm.record.awaits_autostart(default)) {
            return Ok(None);
        }
        let key = Some(format!("autostart/{}/{vm}/{round}", context.job));
        let options = Options { idempotency_key: key, ..Options::default() };
        let job = self.submission("start_vm", &context.caller, plan::start_vm(vm), options);
        let ended = self.run_beside(job, context).await?;
        Ok(Some(ended.state == JobState::Succeeded))
    }

    /// Runs a job that is no child of this one, since this one holds no locks, and waits for its end. A cancel of
    /// this one leaves that one alone.
    pub(super) async fn run_beside(
        &self,
        submission: crate::job::Submission,
        context: &StepContext,
    ) -> Result<Arc<JobRecord>> {
        let engine = self.engine().ok_or_else(|| JobFault::new("INTERNAL", "no engine"))?;
        let refused = |e: crate::job::SubmitError| JobFault::new("CHILD_REFUSED", e.to_string());
        let id: JobId = engine.submit(submission).await.map_err(refused)?;
        loop {
            let waited = tokio::select! {
                waited = engine.wait(id, Duration::from_secs(3600)) => waited,
                () = context.cancelled.cancelled() => return Err(JobFault::new("CANCELLED", "cancelled")),
            };
            match waited {
                Ok(Some(record)) if record.state.is_terminal() => return Ok(record),
                // The daemon stops: both jobs go on after the restart.
                Ok(Some(_)) if engine.is_stopping() => std::future::pending().await,
                Ok(Some(_)) => {}
                Ok(None) => return Err(JobFault::new("JOB_NOT_FOUND", format!("job {id} is gone"))),
                Err(error) => return Err(JobFault::new("STORE", error.to_string())),
            }
        }
    }
}

async fn pause(time: Duration, context: &StepContext) -> Result<()> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        () = context.cancelled.cancelled() => Err(JobFault::new("CANCELLED", "cancelled")),
    }
}

fn delays_count(starting: &[Arc<VmRecord>]) -> usize {
    let mut orders: Vec<u32> = starting.iter().map(|r| r.autostart_place().order).collect();
    orders.sort_unstable();
    orders.dedup();
    orders.len()
}

/// What is left of a delay that began at `since`: never more than the whole, whatever the clock does.
fn left(delay: Duration, since: Timestamp, now: Timestamp) -> Duration {
    delay.saturating_sub(Duration::from_millis(now.0.saturating_sub(since.0)))
}

fn autostart_outcome(started: &[String], failed: &[String], context: &StepContext) -> Outcome {
    let mut outcome = Outcome::result(json!({ "started": started, "failed": failed }));
    if started.is_empty() && failed.is_empty() {
        return outcome;
    }
    let severity = if failed.is_empty() { Severity::Info } else { Severity::Error };
    let text = match failed.len() {
        0 => format!("{} VMs were started after the host's boot", started.len()),
        n => format!("{} VMs were started after the host's boot; {n} could not be", started.len()),
    };
    let event = Event::new(kind::VM_AUTOSTART, "host", text).with_severity(severity).with_job(context.job);
    let told = |names: &[String]| names.iter().take(NAMES_TOLD).cloned().collect::<Vec<_>>();
    event
        .with("started", started.len())
        .with("failed", failed.len())
        .with("failed_names", told(failed))
        .append_to(&mut outcome.writes);
    outcome
}

impl Found {
    pub fn count_domains(&self, is: impl Fn(&DomainVerdict) -> bool) -> usize {
        self.domains.iter().filter(|d| is(&d.verdict)).count()
    }

    pub fn count_vms(&self, is: impl Fn(&VmVerdict) -> bool) -> usize {
        self.vms.iter().filter(|vm| is(&vm.verdict)).count()
    }

    fn event(&self) -> Event {
        let adopted = self.count_domains(|v| matches!(v, DomainVerdict::Adopted(_)));
        let strange =
            |v: &DomainVerdict| matches!(v, DomainVerdict::Unknown { .. } | DomainVerdict::Double(_));
        let gone = |v: &VmVerdict| matches!(v, VmVerdict::Gone | VmVerdict::WentWithHost);
        let restart = |v: &VmVerdict| matches!(v, VmVerdict::Restart(_));
        let (unknown, lost) = (self.count_domains(strange), self.count_vms(gone));
        let restarted = self.count_vms(restart);
        let boot = match self.boot {
            Boot::Same => "the agent was restarted",
            Boot::New => "the host has booted anew",
            Boot::Unknown => "the host's boot is not known",
        };
        let text = format!(
            "{boot}: {adopted} running VMs adopted, {unknown} unknown domains left alone, {lost} VMs found gone, \
             {restarted} to be started again"
        );
        let severity = if unknown + lost > 0 { Severity::Warning } else { Severity::Info };
        let names = |is: &dyn Fn(&VmVerdict) -> bool| {
            let found = self.vms.iter().filter(|vm| is(&vm.verdict)).take(NAMES_TOLD);
            found.map(|vm| vm.name.clone()).collect::<Vec<_>>()
        };
        let strangers = self.domains.iter().filter(|d| strange(&d.verdict)).take(NAMES_TOLD);
        let strangers: Vec<String> = strangers.map(|d| format!("{} {}", d.domid.0, d.name)).collect();
        Event::new(kind::VM_ADOPTION, "host", text)
            .with_severity(severity)
            .with("adopted", adopted)
            .with("unknown", unknown)
            .with("gone", lost)
            .with("restarted", restarted)
            .with("unknown_domains", strangers)
            .with("gone_names", names(&gone))
            .with("restarted_names", names(&restart))
    }
}
