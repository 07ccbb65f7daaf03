//! A VM goes to another host: the source's steps.
//!
//! ```text
//! check ── prepare_target ── send_domain ────────────────── commit ── tell_target
//!                            (S1 is written inside: hand over)  S2      T2 over there
//! ```
//!
//! `send_domain` succeeds only if the judge ([`crate::vm::migration`]) says that the VM is the target's; else it fails,
//! and its way back carries out what the judge says. What nobody can judge yet is marked in the record, and
//! `migrate_watch` goes on from there. A cancel is heeded until the handover.

use super::migrate_in::Document;
use super::migrate_stream::{self, Sending};
use super::peers::LinkError;
use super::vm_steps::Result;
use super::{Operations, fault};
use crate::event::{Event, Severity, kind};
use crate::host::Peer;
use crate::job::{JobFault, Outcome, StepContext};
use crate::model::{MigrationId, SafePath, Timestamp, VmId};
use crate::store::Txn;
use crate::vm::migration::{Ended, Evidence, Here, Missing, OUTCOMES, Side, There, Verdict, judge};
use crate::vm::{Intent, Leaving, VMS, VmRecord};
use crate::xen::{DomainInfo, Handover, RunState, ShutdownReason};
use async_trait::async_trait;
use serde_json::json;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// One call of a peer. Its answers are made of what it knows, but for the pre-check and the taking over.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(10);
const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// So long the target is told of the commit again and again; afterwards it asks by itself.
const TELL_FOR: Duration = Duration::from_secs(60);
const TELL_AGAIN: Duration = Duration::from_secs(1);
/// A domain whose sender was killed may stand still for a moment before it goes on.
const GOES_ON_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A migration as its steps name it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Going {
    pub id: MigrationId,
    pub vm: VmId,
    /// The peer's address.
    pub dest: String,
}

impl Going {
    /// For the log: how far it has come.
    fn phase(&self, phase: &str) {
        tracing::info!(vm_uuid = %self.vm, migration = %self.id, dest = self.dest, phase, "a VM is on its way out");
    }
}

/// Stands between the toolstack and the store at the handover.
struct Handing {
    operations: Arc<Operations>,
    going: Going,
    was_paused: bool,
    sending: Arc<Sending>,
    limit: Duration,
    cancelled: CancellationToken,
    /// The step is over: no handover any more.
    closed: AtomicBool,
    /// When the domain was first seen standing still; 0: not yet.
    still: AtomicU64,
    handed_over: AtomicBool,
    why_not: Mutex<Option<String>>,
}

impl Handing {
    fn refuse(&self, why: impl Into<String>) -> bool {
        *self.why_not.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.into());
        false
    }

    fn called_off(&self) -> bool {
        self.closed.load(Ordering::SeqCst) || self.cancelled.is_cancelled()
    }
}

#[async_trait]
impl Handover for Handing {
    async fn hand_over(&self) -> bool {
        let still = Timestamp::now();
        self.still.store(still.0, Ordering::SeqCst);
        self.going.phase("all sent");
        if let Err(why) = self.sending.finish(self.limit).await {
            return self.refuse(why);
        }
        if self.called_off() {
            return self.refuse("it was called off");
        }
        let Some(vm) = self.operations.vms.get(self.going.vm) else { return self.refuse("the VM is gone") };
        let mut record = VmRecord::clone(&vm.record);
        record.intent = Intent::Leaving(Leaving {
            id: self.going.id,
            dest: self.going.dest.clone(),
            since: still,
            handed_over: true,
            was_paused: self.was_paused,
        });
        let mut writes = Txn::essential();
        writes.put(&VMS, &self.going.vm, &record);
        if let Err(error) = self.operations.store.commit(writes).await {
            // It may be on disk all the same: then the judge sees it, and the domain running here.
            return self.refuse(format!("the handover could not be written down: {error}"));
        }
        self.operations.vms.put(record);
        // Whoever judged before this was written must not be overtaken; whoever judges after sees it.
        if self.closed.load(Ordering::SeqCst) {
            return self.refuse("it was called off");
        }
        self.handed_over.store(true, Ordering::SeqCst);
        self.going.phase("handed over");
        true
    }
}

/// However the step ends, nothing is handed over after it and the stream ends.
struct CloseOnDrop(Arc<Handing>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::SeqCst);
        self.0.sending.cut();
    }
}

impl Operations {
    fn dest(&self, going: &Going) -> Result<Peer> {
        self.peer_at(&going.dest).ok_or_else(|| {
            let text = format!("{} is no peer any more; nothing was sent", going.dest);
            JobFault::refusal("PEER_NOT_FOUND", text)
        })
    }

    /// Asks the target whether it can take the VM, and to keep a place for it.
    pub(super) async fn prepare_target(&self, going: &Going, context: &StepContext) -> Result<Outcome> {
        let peer = self.dest(going)?;
        self.moves.take_place(context.job, going.id, self.settings.migration.max_out)?;
        let record = VmRecord::clone(&self.vm(going.vm)?.record);
        let info = self.toolstack.info().await.map_err(fault::toolstack)?;
        let document = Document::of(going.id, record, was_paused(context), &info);
        let text = serde_json::to_string(&document)
            .map_err(|error| JobFault::refusal("INTERNAL", format!("the VM cannot be written: {error}")))?;
        let params = vec![going.id.as_str(), text];
        let answer = self.link().map_err(unreachable(&peer))?;
        let answer = answer.call(&peer, "migration_prepare", params, PREPARE_LIMIT).await;
        answer.map(|_| going.phase("prepared")).map(|()| Outcome::done()).map_err(|error| match error {
            LinkError::Fault { name, text } => {
                let text = format!("{} cannot take the VM: {name}: {text}", peer.address);
                JobFault::refusal("MIGRATION_REFUSED", text)
            }
            other => JobFault { no_effect: true, ..unreachable(&peer)(other) },
        })
    }

    pub(super) async fn send_domain(
        &self,
        going: &Going,
        live: bool,
        context: &StepContext,
    ) -> Result<Outcome> {
        let mut bytes = 0;
        let mut why = "the agent ended in the middle of it".to_owned();
        if !context.resumed {
            let (sent, count) = self.send_through(going, live, context).await?;
            bytes = count;
            if let Err(fault) = sent {
                why = fault;
            }
        }
        match self.judged(going).await? {
            Verdict::Committed => Ok(Outcome::value(json!({ "bytes": bytes }))),
            Verdict::Aborted if context.cancelled.is_cancelled() => {
                Err(JobFault::new("CANCELLED", "cancelled"))
            }
            Verdict::Aborted => {
                let text = format!("VM {} stays here: {why}", going.vm);
                Err(JobFault::new("MIGRATION_FAILED", text))
            }
            Verdict::Wait(missing) => {
                let text =
                    format!("it is not known yet who runs VM {}: {}; {why}", going.vm, missing.words());
                Err(JobFault::new("MIGRATION_UNDECIDED", text))
            }
        }
    }

    /// How the toolstack's sending ended, and how many bytes went.
    async fn send_through(
        &self,
        going: &Going,
        live: bool,
        context: &StepContext,
    ) -> Result<(std::result::Result<(), String>, u64)> {
        let Some(this) = self.this.upgrade() else { return Err(JobFault::refusal("STOPPING", "stopping")) };
        let peer = self.dest(going)?;
        let domain = self.living(going.vm).await.map_err(|fault| JobFault { no_effect: true, ..fault })?;
        let settings = &self.settings.migration;
        let stall = Duration::from_secs(settings.stall_s);
        let link = self.link().map_err(unreachable(&peer))?;
        let stream = link.open(&peer, going.id, CALL_LIMIT).await.map_err(unreachable(&peer))?;
        going.phase("sending");
        let (out, sending) = migrate_stream::send(stream, stall);
        let handing = Arc::new(Handing {
            operations: this,
            going: going.clone(),
            was_paused: was_paused(context),
            sending: Arc::clone(&sending),
            limit: Duration::from_secs(settings.deadline_s),
            cancelled: context.cancelled.clone(),
            closed: AtomicBool::new(false),
            still: AtomicU64::new(0),
            handed_over: AtomicBool::new(false),
            why_not: Mutex::default(),
        });
        let _close = CloseOnDrop(Arc::clone(&handing));
        let toolstack = Arc::clone(&self.toolstack);
        let sent = toolstack.migrate_out(domain.domid, live, Box::new(out), Arc::clone(&handing) as _);
        tokio::pin!(sent);
        let deadline = Instant::now() + Duration::from_secs(settings.deadline_s);
        let memory = domain.memory.0.max(1) * 1024;
        let mut called_off = None;
        let ended = loop {
            tokio::select! {
                ended = &mut sent => break ended,
                () = tokio::time::sleep(LOOK_EVERY) => {
                    let percent = sending.bytes().saturating_mul(100) / memory;
                    context.progress(u8::try_from(percent).unwrap_or(99).min(99));
                }
                () = context.cancelled.cancelled(), if called_off.is_none() => {
                    called_off = Some("it was cancelled".to_owned());
                }
                () = tokio::time::sleep_until(deadline), if called_off.is_none() => {
                    called_off = Some(format!("it took longer than {} s", settings.deadline_s));
                }
            }
            if called_off.is_some() && !handing.handed_over.load(Ordering::SeqCst) {
                sending.cut();
            }
        };
        self.look(domain.domid).await;
        let why_not = handing.why_not.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Of a broken link the stream knows more than the toolstack, which sees a broken pipe.
        let trouble = called_off.or(why_not).or(sending.trouble().await);
        let told = ended.map_err(|error| trouble.unwrap_or_else(|| error.to_string()));
        Ok((told, sending.bytes()))
    }

    /// What the source sees, and what the judge makes of it.
    pub(super) async fn judged(&self, going: &Going) -> Result<Verdict> {
        let until = Instant::now() + GOES_ON_WITHIN;
        loop {
            let handed_over = match &self.vm(going.vm)?.record.intent {
                Intent::Leaving(leaving) => leaving.id == going.id && leaving.handed_over,
                _ => false,
            };
            let here = here(self.domain(going.vm).await?.as_ref());
            // Alive decides by itself, and so does gone after the handover: nobody need be asked.
            let settled = here == Here::Alive || (here == Here::Gone && handed_over);
            let there = if settled { There::Unknown } else { self.there(going).await };
            let verdict = judge(Evidence { handed_over, here, there });
            // Before the handover the toolstack itself lets it go on.
            if here == Here::StandsStill && !handed_over && Instant::now() < until {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            return Ok(verdict);
        }
    }

    async fn there(&self, going: &Going) -> There {
        let Some(peer) = self.peer_at(&going.dest) else { return There::Unknown };
        let Ok(link) = self.link() else { return There::Unknown };
        let params = vec![going.id.as_str(), going.vm.as_str()];
        match link.call(&peer, "migration_state", params, CALL_LIMIT).await {
            Ok(answer) => serde_json::from_value(answer["state"].clone()).unwrap_or(There::Unknown),
            Err(error) => {
                tracing::warn!(vm_uuid = %going.vm, peer = %peer.address, %error, "the target does not say what it has");
                There::Unknown
            }
        }
    }

    /// The domain goes if it is still there, and the VM's record with it.
    pub(super) async fn commit_migration(&self, going: &Going, context: &StepContext) -> Result<Outcome> {
        let Some(vm) = self.vms.get(going.vm) else { return Ok(Outcome::done()) };
        if let Some(domain) = self.domain(going.vm).await? {
            if here(Some(&domain)) == Here::Alive {
                let text = format!("VM {} runs here after all; it stays", going.vm);
                return Err(JobFault::new("MIGRATION_FAILED", text));
            }
            self.destroy_found(domain.domid).await?;
        }
        let since = match &vm.record.intent {
            Intent::Leaving(leaving) => leaving.since,
            _ => Timestamp::now(),
        };
        let mut writes = Txn::essential();
        writes.delete(&VMS, &going.vm);
        writes.put(&OUTCOMES, &going.id, &ended(going, true));
        let name = &vm.record.config.name;
        let text = format!("VM {name} is {}'s from now on; it runs here no more", going.dest);
        let event = Event::new(kind::VM_LEFT, VmRecord::lock(going.vm), text);
        event.with_job(context.job).with("migration", going.id.as_str()).append_to(&mut writes);
        let vms = Arc::clone(&self.vms);
        let gone = going.vm;
        // What is of no use without the VM here. Core dumps stay: somebody may want to look at them.
        let cores: Vec<&SafePath> = vm.record.cores.iter().map(|core| &core.file).collect();
        let mut files = self.stray_files(going.vm).await;
        files.retain(|file| !cores.contains(&file));
        let value = json!({ "since": since.0, "name": name, "left_files": files });
        let decided = going.clone();
        let then: Box<dyn FnOnce() + Send> = Box::new(move || {
            vms.remove(gone);
            decided.phase("committed");
        });
        Ok(Outcome { value: Some(value), writes, then: Some(then), ..Outcome::default() })
    }

    /// The target lets it run. If it does not answer, it asks us by itself when it can.
    pub(super) async fn tell_target(&self, going: &Going, context: &StepContext) -> Result<Outcome> {
        let told = |step: usize| context.outcomes.get(step).cloned().flatten().unwrap_or_default();
        let committed = told(context.step.saturating_sub(1));
        let bytes = told(context.step.saturating_sub(2))["bytes"].as_u64().unwrap_or(0);
        let until = Instant::now() + TELL_FOR;
        let params = vec![going.id.as_str(), going.vm.as_str()];
        let state = loop {
            let answer = match (self.peer_at(&going.dest), self.link()) {
                (Some(peer), Ok(link)) => {
                    link.call(&peer, "migration_commit", params.clone(), PREPARE_LIMIT).await
                }
                (None, _) => Err(LinkError::Unreachable("it is no peer any more".to_owned())),
                (_, Err(error)) => Err(error),
            };
            match answer {
                Ok(answer) => break answer["state"].as_str().unwrap_or("unknown").to_owned(),
                Err(LinkError::Unreachable(why)) if Instant::now() < until => {
                    tracing::warn!(vm_uuid = %going.vm, dest = going.dest, why, "the target is told again");
                    tokio::time::sleep(TELL_AGAIN).await;
                }
                Err(error) => {
                    let text = format!(
                        "VM {} is {}'s, which did not confirm that it runs ({error}); it asks this host by itself",
                        going.vm, going.dest
                    );
                    return Err(JobFault::new("MIGRATION_UNCONFIRMED", text));
                }
            }
        };
        let since = committed["since"].as_u64().unwrap_or_else(|| Timestamp::now().0);
        let downtime_ms = Timestamp::now().0.saturating_sub(since);
        let name = committed["name"].as_str().unwrap_or_default().to_owned();
        let result = json!({
            "migration": going.id, "dest": going.dest, "state": state, "downtime_ms": downtime_ms, "bytes": bytes,
        });
        let mut outcome = Outcome::result(result);
        let text = format!("VM {name} went to {} ({state}); it stood still for {downtime_ms} ms", going.dest);
        let severity = if state == "off" { Severity::Error } else { Severity::Info };
        let event = Event::new(kind::VM_MIGRATED, VmRecord::lock(going.vm), text)
            .with_severity(severity)
            .with_job(context.job);
        let event =
            event.with("dest", going.dest.clone()).with("downtime_ms", downtime_ms).with("bytes", bytes);
        event.append_to(&mut outcome.writes);
        Ok(outcome)
    }

    /// The way back of a migration, and the end of one that was undecided: what the judge says is carried out.
    pub(super) async fn settle_migration(&self, going: &Going, context: &StepContext) -> Result<Outcome> {
        let Some(vm) = self.vms.get(going.vm) else { return Ok(Outcome::done()) };
        match self.judged(going).await? {
            Verdict::Committed => self.commit_migration(going, context).await,
            Verdict::Aborted => self.abort_migration(going, context).await,
            Verdict::Wait(missing) => self.mark_undecided(going, &vm.record, missing, context),
        }
    }

    async fn abort_migration(&self, going: &Going, context: &StepContext) -> Result<Outcome> {
        let record = self.vm(going.vm)?.record;
        let name = &record.config.name;
        let mut outcome = match &record.intent {
            Intent::Leaving(leaving) if leaving.id == going.id => {
                self.record_outcome(going.vm, |record| {
                    record.intent = Intent::On;
                    record.changed = Timestamp::now();
                })?
            }
            _ => Outcome::done(),
        };
        outcome.writes.put(&OUTCOMES, &going.id, &ended(going, false));
        let text = format!("VM {name} did not go to {}; it stays here", going.dest);
        let event = Event::new(kind::VM_MIGRATION_FAILED, VmRecord::lock(going.vm), text);
        event.with_job(context.job).with("migration", going.id.as_str()).append_to(&mut outcome.writes);
        // Told at once so that nothing stands there long; if it does not hear, it asks.
        if let (Some(peer), Ok(link)) = (self.peer_at(&going.dest), self.link()) {
            let params = vec![going.id.as_str(), going.vm.as_str()];
            if let Err(error) = link.call(&peer, "migration_abort", params, CALL_LIMIT).await {
                tracing::debug!(vm_uuid = %going.vm, %error, "the target was not told that the migration is off");
            }
        }
        Ok(outcome)
    }

    fn mark_undecided(
        &self,
        going: &Going,
        record: &VmRecord,
        missing: Missing,
        context: &StepContext,
    ) -> Result<Outcome> {
        if matches!(record.intent, Intent::Leaving(_)) {
            return Ok(Outcome::done());
        }
        let leaving = Leaving {
            id: going.id,
            dest: going.dest.clone(),
            since: Timestamp::now(),
            handed_over: false,
            was_paused: was_paused(context),
        };
        let mut outcome = self.record_outcome(going.vm, |record| record.intent = Intent::Leaving(leaving))?;
        let text = format!("VM {}: who runs it is not known yet: {}", record.config.name, missing.words());
        let event = Event::new(kind::VM_MIGRATION_UNDECIDED, VmRecord::lock(going.vm), text);
        event.with_job(context.job).append_to(&mut outcome.writes);
        Ok(outcome)
    }

    /// A human decides for this host: `keep` what is here, or let it be the other's.
    pub(super) async fn force_leaving(&self, vm: VmId, keep: bool, context: &StepContext) -> Result<Outcome> {
        let record = self.vm(vm)?.record;
        let Intent::Leaving(leaving) = &record.intent else {
            return Err(JobFault::refusal("VM_STATE", format!("nothing is undecided about VM {vm} here")));
        };
        let going = Going { id: leaving.id, vm, dest: leaving.dest.clone() };
        tracing::warn!(vm_uuid = %vm, keep, caller = context.caller, "a human decides an undecided migration");
        let domain = self.domain(vm).await?;
        // What still stands still when a human comes is let go on by nobody: that VM is off here.
        let ends = !keep || here(domain.as_ref()) == Here::StandsStill;
        if let Some(domain) = domain.filter(|_| ends) {
            self.destroy_found(domain.domid).await?;
        }
        if keep {
            return self.abort_migration(&going, context).await;
        }
        self.commit_migration(&going, context).await
    }
}

pub(super) fn here(domain: Option<&DomainInfo>) -> Here {
    match domain.map(|domain| domain.state) {
        None | Some(RunState::Dying) => Here::Gone,
        Some(RunState::Shutdown(ShutdownReason::Suspend)) => Here::StandsStill,
        Some(RunState::Running | RunState::Blocked | RunState::Paused) => Here::Alive,
        // The guest ended by itself: its runner settles that, and what was sent of it is worth nothing.
        Some(RunState::Shutdown(_)) => Here::Alive,
    }
}

fn was_paused(context: &StepContext) -> bool {
    context.outcomes.first().and_then(|first| first.as_ref()?["paused"].as_bool()).unwrap_or(false)
}

fn ended(going: &Going, committed: bool) -> Ended {
    Ended {
        id: going.id,
        vm: going.vm,
        side: Side::Source,
        committed,
        peer: going.dest.clone(),
        at: Timestamp::now(),
    }
}

fn unreachable(peer: &Peer) -> impl Fn(LinkError) -> JobFault {
    move |error| JobFault::refusal("PEER_UNREACHABLE", format!("peer {}: {error}", peer.address))
}
