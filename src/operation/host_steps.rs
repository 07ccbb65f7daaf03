//! How each kind of host step is carried out, and the agent's own work.

use super::step::Step;
use super::{Operations, PASSWORD, fault, plan};
use crate::event::{Event, kind};
use crate::host::record::{HOST, HOST_KEY, HostRecord};
use crate::job::{JobFault, JobState, Options, Outcome, StepContext};
use crate::machine::TimeZone;
use crate::model::{SafePath, Timestamp};
use crate::store::Txn;
use crate::xen::{DomId, RunState};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

type Result<T> = std::result::Result<T, JobFault>;

impl Operations {
    pub(super) async fn run_host_step(&self, step: Step, context: &StepContext) -> Result<Outcome> {
        match step {
            Step::SetClock { year, month, day, hour, minute, second } => {
                self.set_clock([
                    i64::from(year),
                    month.into(),
                    day.into(),
                    hour.into(),
                    minute.into(),
                    second.into(),
                ])
                .await
            }
            Step::SetTimezone { name, rtc_utc } => {
                self.machine.set_timezone(&TimeZone { name, rtc_utc }).await.map_err(fault::machine)?;
                Ok(Outcome::done())
            }
            Step::SetNtp { servers, local_time_source, allow_query } => {
                self.machine
                    .set_ntp(&servers, local_time_source, allow_query)
                    .await
                    .map_err(fault::machine)?;
                Ok(Outcome::done())
            }
            Step::EnableNtp { enabled } => {
                self.machine.enable_ntp(enabled).await.map_err(fault::machine)?;
                Ok(Outcome::done())
            }
            Step::PutHost { before, record, event } => self.put_host(&before, *record, &event, context),
            Step::SetPassword { hash } => self.password_outcome(hash, context),
            Step::RenewCertificate { if_due } => self.renew_certificate(if_due, context).await,
            Step::StopAllVms { boot_id } => self.stop_all_vms(&boot_id, context).await,
            Step::Power { off, boot_id } => self.end_host(off, &boot_id, context).await,
            Step::TakeBoot { boot_id } => self.take_boot(&boot_id, context).await,
            Step::WriteBoot { boot_id } => self.write_boot(&boot_id, context).await,
            Step::Autostart { boot_id } => self.autostart(&boot_id, context).await,
            Step::Sleep { ms } => self.sleep(ms, context).await,
            Step::Discover {} => self.discover().await,
            Step::Prune {} => self.prune().await,
            other => Err(JobFault::refusal("INTERNAL", format!("no executor for {other:?}"))),
        }
    }

    /// The time is the host's local time, in its time zone.
    async fn set_clock(&self, at: [i64; 6]) -> Result<Outcome> {
        let invalid =
            |e: jiff::Error| JobFault::refusal("INVALID_PARAMETER", format!("not a date and time: {e}"));
        let zone = self.machine.timezone().await.map_err(fault::machine)?;
        let small = |n: i64| i8::try_from(n).unwrap_or(-1);
        let year = i16::try_from(at[0]).unwrap_or(-1);
        let local = jiff::civil::DateTime::new(
            year,
            small(at[1]),
            small(at[2]),
            small(at[3]),
            small(at[4]),
            small(at[5]),
            0,
        )
        .map_err(invalid)?;
        let zoned = local.in_tz(&zone.name).map_err(invalid)?;
        let ms = u64::try_from(zoned.timestamp().as_millisecond())
            .map_err(|_| JobFault::refusal("INVALID_PARAMETER", "the time is before 1970"))?;
        self.machine.set_clock(Timestamp(ms)).await.map_err(fault::machine)?;
        Ok(Outcome::done())
    }

    fn put_host(
        &self,
        before: &HostRecord,
        record: HostRecord,
        event: &str,
        context: &StepContext,
    ) -> Result<Outcome> {
        if *self.host_record() != *before {
            let text = "the host's record was changed by somebody else meanwhile; look at it and ask again";
            return Err(JobFault::refusal("CONFLICT", text));
        }
        let mut writes = Txn::new();
        writes.put(&HOST, HOST_KEY, &record);
        Event::new(kind::HOST_CHANGED, "host", event).with_job(context.job).append_to(&mut writes);
        let then = self.hook(move |operations| operations.set_host(record));
        Ok(Outcome { writes, then, ..Outcome::default() })
    }

    fn password_outcome(&self, hash: String, context: &StepContext) -> Result<Outcome> {
        let mut writes = Txn::new();
        writes.put(&PASSWORD, "oracle", &hash);
        let text = "the agent's password was changed";
        Event::new(kind::HOST_PASSWORD_CHANGED, "host", text).with_job(context.job).append_to(&mut writes);
        let then = self.hook(move |operations| operations.set_password(hash));
        Ok(Outcome { writes, then, ..Outcome::default() })
    }

    async fn renew_certificate(&self, if_due: bool, context: &StepContext) -> Result<Outcome> {
        let access = Arc::clone(&self.access);
        let done = tokio::task::spawn_blocking(move || access.renew_certificate(if_due)).await;
        let renewed = done
            .map_err(|e| JobFault::new("INTERNAL", e.to_string()))?
            .map_err(|text| JobFault::new("CERTIFICATE_FAILED", text))?;
        let mut outcome = Outcome::done();
        if !renewed {
            return Ok(outcome);
        }
        let text = "a new server certificate is served";
        let event = Event::new(kind::HOST_CERTIFICATE_RENEWED, "host", text);
        event.with_job(context.job).append_to(&mut outcome.writes);
        Ok(outcome)
    }

    /// Something to do on ourselves once the outcome is on disk.
    pub(super) fn hook(
        &self,
        work: impl FnOnce(&Operations) + Send + 'static,
    ) -> Option<Box<dyn FnOnce() + Send>> {
        let this = self.this.upgrade()?;
        Some(Box::new(move || work(&this)))
    }

    /// Every VM with a domain, each in a child job, all at once. A VM that cannot be stopped stops the plan.
    async fn stop_all_vms(&self, boot_id: &str, context: &StepContext) -> Result<Outcome> {
        // Plans of older agents do not tell the boot.
        let now = self.machine.facts().await.map_err(fault::machine)?.boot_id;
        if !boot_id.is_empty() && now != boot_id {
            return Ok(Outcome::done());
        }
        let living = |d: &crate::xen::DomainInfo| d.domid != DomId(0) && d.state != RunState::Dying;
        let domains = self.toolstack.list().await.map_err(fault::toolstack)?;
        let mut ours: Vec<_> = domains.iter().filter(|d| living(d)).filter_map(|d| d.vm).collect();
        ours.retain(|vm| self.vms.get(*vm).is_some());
        let total = ours.len().max(1);
        let mut children: FuturesUnordered<_> = ours
            .into_iter()
            .map(|vm| {
                let plan = plan::stop_vm_for_power(vm, &self.settings.vm);
                let submission = self.submission("stop_vm", &context.caller, plan, Options::default());
                async move { (vm, context.child(&format!("stop/{vm}"), submission).await) }
            })
            .collect();
        let mut done = 0;
        while let Some((vm, ended)) = children.next().await {
            let ended = ended?;
            if ended.state != JobState::Succeeded {
                let why = ended.fault.as_ref().map_or_else(String::new, ToString::to_string);
                return Err(JobFault::new(
                    "VM_NOT_STOPPED",
                    format!("VM {vm} was not stopped (job {}): {why}", ended.id),
                ));
            }
            done += 1;
            context.progress(u8::try_from(done * 100 / total).unwrap_or(100));
        }
        Ok(Outcome::done())
    }

    async fn end_host(&self, off: bool, boot_id: &str, context: &StepContext) -> Result<Outcome> {
        let now = self.machine.facts().await.map_err(fault::machine)?.boot_id;
        if now != boot_id {
            return Ok(Outcome::done());
        }
        tracing::warn!(job_id = %context.job, off, "the host goes down");
        let ordered = if off { self.machine.power_off().await } else { self.machine.reboot().await };
        ordered.map_err(fault::machine)?;
        let mut outcome = Outcome::done();
        let text = if off { "the host was switched off" } else { "the host was rebooted" };
        let event = Event::new(kind::HOST_POWER, "host", text).with_job(context.job);
        event.append_to(&mut outcome.writes);
        Ok(outcome)
    }

    async fn sleep(&self, ms: u64, context: &StepContext) -> Result<Outcome> {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(ms)) => Ok(Outcome::done()),
            () = context.cancelled.cancelled() => Err(JobFault::new("CANCELLED", "cancelled")),
        }
    }

    /// Looks at everything, as the observer does at the start; it hears of the changes.
    async fn discover(&self) -> Result<Outcome> {
        let domains = self.toolstack.list().await.map_err(fault::toolstack)?;
        let count = domains.len();
        self.look_again.notify_one();
        Ok(Outcome::result(json!({ "domains": count })))
    }

    async fn prune(&self) -> Result<Outcome> {
        let store = |e: crate::store::StoreError| JobFault::new("STORE", e.to_string());
        let pruning = async {
            let events = self.events.prune().await.map_err(store)?;
            let jobs = match self.engine() {
                Some(engine) => engine.prune().await.map_err(store)?,
                None => 0,
            };
            self.prune_network_history().await.map_err(store)?;
            // The quietest moment there is to give back what this and bursts of calls have left in the heap.
            give_back_memory().await;
            Ok(Outcome::result(json!({ "events": events, "jobs": jobs })))
        };
        tokio::select! {
            done = pruning => done,
            // A long history leaves holes all over the heap while it goes.
            () = give_back_memory_now_and_then() => Err(JobFault::new("INTERRUPTED", "stopped")),
        }
    }

    pub(super) async fn remove_left_files(&self, context: &StepContext) -> Result<Outcome> {
        let told = context.step.checked_sub(1).and_then(|before| context.outcomes.get(before)?.clone());
        let files = told.map(|told| told["left_files"].clone()).unwrap_or_default();
        let files: Vec<SafePath> = serde_json::from_value(files)
            .map_err(|e| JobFault::new("INTERNAL", format!("the step before told of no files: {e}")))?;
        for file in &files {
            self.remove_file(file).await?;
        }
        Ok(Outcome::done())
    }

    pub(super) async fn remove_file(&self, file: &SafePath) -> Result<Outcome> {
        self.files.remove(file).await.map_err(fault::files)?;
        Ok(Outcome::done())
    }
}

/// Never ends. A short pruning is over before the first time.
async fn give_back_memory_now_and_then() {
    const EVERY: Duration = Duration::from_secs(5);
    loop {
        tokio::time::sleep(EVERY).await;
        give_back_memory().await;
    }
}

async fn give_back_memory() {
    let _ = tokio::task::spawn_blocking(crate::machine::memory::give_back).await;
}
