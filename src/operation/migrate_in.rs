//! A VM comes from another host: the target's verbs and steps.
//!
//! ```text
//! prepared ──stream──► receiving ──whole──► arrival (T1, paused) ──commit──► ours (T2), runs
//!     │ 60 s               │ broken               │ abort
//!     ▼                    ▼                      ▼
//!   nothing              nothing                nothing
//! ```
//!
//! A preparation is in memory only: whoever loses it has received nothing. What arrives is received in a job that
//! holds the VM's lock; an arrival is a row of its own, so that nothing that works on records (start, adoption, the
//! observer) can take it for a VM of ours.

use super::migrate_stream::{self, Answer, Receiving};
use super::vm_steps::Result;
use super::{Operations, fault, plan};
use crate::event::{Event, Severity, kind};
use crate::job::{JobFault, Options, Outcome, StepContext};
use crate::model::{JobId, MiB, MigrationId, SafePath, Timestamp, VmId};
use crate::store::Txn;
use crate::vm::migration::{ARRIVALS, Arrival, Ended, OUTCOMES, Side, There, Word, word};
use crate::vm::{EndCause, Intent, VmRecord};
use crate::wire::Stream;
use crate::xen::config::{Boot, DiskBacking};
use crate::xen::{DomId, HypervisorInfo, Inflow, RunState};
use futures_util::future::{Either, select};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

const VERSION: u16 = 1;
/// A document beyond this is no VM's.
const MAX_DOCUMENT_BYTES: usize = 512 * 1024;
/// From the preparation to the stream.
const PREPARED_FOR: Duration = Duration::from_secs(60);
/// Where a domain of a peer lies in a stream that ended: how long its toolstack may take to see that.
const WHOLE_WITHIN: Duration = Duration::from_secs(30);

/// What the source tells of a VM before it sends it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    version: u16,
    pub id: MigrationId,
    pub record: VmRecord,
    pub paused: bool,
    hw_caps: Vec<u32>,
    xen: (u32, u32),
}

impl Document {
    pub(super) fn of(id: MigrationId, record: VmRecord, paused: bool, info: &HypervisorInfo) -> Self {
        // Files of the source's disk stay there.
        let record = VmRecord { intent: Intent::On, cores: vec![], checkpoint: None, ..record };
        let xen = (info.version_major, info.version_minor);
        Self { version: VERSION, id, record, paused, hw_caps: info.hw_caps.clone(), xen }
    }

    fn parse(text: &str) -> Result<Self> {
        if text.len() > MAX_DOCUMENT_BYTES {
            return Err(refused("the VM's document is too long"));
        }
        // serde's words could repeat a secret of the text.
        let document: Self = serde_json::from_str(text)
            .map_err(|error| refused(format!("the VM's document cannot be read, line {}", error.line())))?;
        if document.version != VERSION {
            return Err(refused(format!("this agent knows documents of version {VERSION}")));
        }
        let plain = matches!(document.record.intent, Intent::On) && document.record.cores.is_empty();
        if !plain || document.record.checkpoint.is_some() || document.record.kept.len() > 64 {
            return Err(refused("the VM's document holds what belongs to the source"));
        }
        Ok(document)
    }
}

fn refused(why: impl Into<String>) -> JobFault {
    JobFault::refusal("MIGRATION_REFUSED", why)
}

struct Prepared {
    document: Document,
    source: String,
    until: Instant,
}

/// Migrations under way, in memory.
#[derive(Default)]
pub struct Moves {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    prepared: HashMap<MigrationId, Prepared>,
    /// Streams whose job has not taken them yet.
    streams: HashMap<MigrationId, Stream>,
    receiving: HashMap<MigrationId, VmRecord>,
    arrivals: BTreeMap<MigrationId, Arrival>,
    outgoing: HashMap<JobId, MigrationId>,
}

impl Inner {
    /// Records of VMs that are not ours yet and take their names and memory already.
    fn coming(&self) -> impl Iterator<Item = &VmRecord> {
        let prepared = self.prepared.values().map(|p| &p.document.record);
        prepared.chain(self.receiving.values()).chain(self.arrivals.values().map(|a| &a.record))
    }

    /// Whether one more may come, besides those on their way; a preparation of `same` counts as the one.
    fn check_room(&self, same: Option<MigrationId>, max_in: usize) -> Result<()> {
        let prepared = self.prepared.keys().filter(|id| Some(**id) != same).count();
        let busy = prepared + self.receiving.len();
        if busy < max_in {
            return Ok(());
        }
        let text = format!("{busy} VMs are being received already, as many as migration.max_in allows");
        Err(JobFault::refusal("MIGRATION_LIMIT", text))
    }
}

impl Moves {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        inner.prepared.retain(|_, prepared| prepared.until > now);
        inner
    }

    pub(super) fn load(&self, arrivals: impl IntoIterator<Item = Arrival>) {
        self.inner().arrivals.extend(arrivals.into_iter().map(|arrival| (arrival.id, arrival)));
    }

    pub fn arrivals(&self) -> Vec<Arrival> {
        self.inner().arrivals.values().cloned().collect()
    }

    fn arrival(&self, id: MigrationId) -> Option<Arrival> {
        self.inner().arrivals.get(&id).cloned()
    }

    /// Whether a domain of this VM is one that is on its way to us.
    pub(super) fn expects(&self, vm: VmId) -> bool {
        self.inner().coming().any(|record| record.id() == vm)
    }

    /// What a new record would clash with among those that are coming.
    pub(super) fn clash(&self, record: &VmRecord) -> Option<String> {
        let inner = self.inner();
        let mac = |other: &VmRecord| {
            other.config.vifs.iter().any(|v| record.config.vifs.iter().any(|own| own.mac == v.mac))
        };
        let clashes = |other: &&VmRecord| {
            other.id() == record.id() || other.config.name == record.config.name || mac(other)
        };
        let found = inner.coming().find(clashes);
        found.map(|other| {
            format!("VM {} ({}) is just coming from another host", other.config.name, other.id())
        })
    }

    /// A place among the migrations out, until the job ends.
    pub(super) fn take_place(&self, job: JobId, id: MigrationId, max: usize) -> Result<()> {
        let mut inner = self.inner();
        if !inner.outgoing.contains_key(&job) && inner.outgoing.len() >= max {
            let text = format!("{max} VMs are being sent away already, as many as migration.max_out allows");
            return Err(JobFault::refusal("MIGRATION_LIMIT", text));
        }
        inner.outgoing.insert(job, id);
        Ok(())
    }

    pub(super) fn give_place_back(&self, job: JobId) {
        self.inner().outgoing.remove(&job);
    }
}

impl Operations {
    /// `migration_prepare`: can this host take the VM? If so a place is kept for it for a minute.
    pub async fn prepare_arrival(&self, source: &str, id: MigrationId, document: &str) -> Result<()> {
        let document = Document::parse(document)?;
        if document.id != id {
            return Err(refused("the document is of another migration"));
        }
        let max_in = self.settings.migration.max_in;
        self.moves.inner().check_room(Some(id), max_in)?;
        self.check_host(&document).await?;
        self.check_devices(&document).await?;
        // Again, and in one go with the noting down: others may have asked meanwhile.
        self.check_names(&document)?;
        let mut inner = self.moves.inner();
        inner.check_room(Some(id), max_in)?;
        let until = Instant::now() + PREPARED_FOR;
        inner.prepared.insert(id, Prepared { document, source: source.to_owned(), until });
        Ok(())
    }

    fn check_names(&self, document: &Document) -> Result<()> {
        let record = &document.record;
        if self.vms.get(record.id()).is_some() {
            return Err(JobFault::refusal("VM_EXISTS", format!("VM {} exists there already", record.id())));
        }
        if let Some(clash) = self.vms.clash(record) {
            return Err(JobFault::refusal("VM_EXISTS", clash));
        }
        let inner = self.moves.inner();
        let same = inner.prepared.get(&document.id).map(|p| p.document.record.id());
        drop(inner);
        match self.moves.clash(record) {
            // Asked again for the same migration.
            Some(_) if same == Some(record.id()) => Ok(()),
            Some(clash) => Err(JobFault::refusal("VM_EXISTS", clash)),
            None => Ok(()),
        }
    }

    /// Memory, CPUs, hypervisor, and a domain that nobody knows.
    async fn check_host(&self, document: &Document) -> Result<()> {
        let record = &document.record;
        if let Some(domain) = self.toolstack.find(record.id()).await.map_err(fault::toolstack)? {
            let text = format!("a domain of this VM is there already (domid {})", domain.domid.0);
            return Err(JobFault::refusal("VM_EXISTS", text));
        }
        let info = self.toolstack.info().await.map_err(fault::toolstack)?;
        let promised: u64 = {
            let inner = self.moves.inner();
            let others = inner.prepared.iter().filter(|(id, _)| **id != document.id);
            others.map(|(_, prepared)| prepared.document.record.config.memory.0).sum()
        };
        let free = MiB(info.free_memory.0.saturating_sub(promised));
        if record.config.memory > free {
            let text = format!("not enough free memory: {} needed, {free} free", record.config.memory);
            return Err(JobFault::refusal("OUT_OF_MEMORY", text));
        }
        if (info.version_major, info.version_minor) < document.xen {
            let (major, minor) = document.xen;
            let text = format!(
                "the hypervisor there is {}.{}, older than the source's {major}.{minor}",
                info.version_major, info.version_minor
            );
            return Err(refused(text));
        }
        let lacks = |(n, word): (usize, &u32)| {
            let missing = word & !info.hw_caps.get(n).copied().unwrap_or(0);
            (missing != 0).then(|| format!("word {n}: {missing:08x}"))
        };
        let lacking: Vec<String> = document.hw_caps.iter().enumerate().filter_map(lacks).collect();
        if !lacking.is_empty() {
            let text = format!("the CPUs there lack features of the source's: {}", lacking.join(", "));
            return Err(refused(text));
        }
        Ok(())
    }

    /// Bridges and disks.
    async fn check_devices(&self, document: &Document) -> Result<()> {
        let config = &document.record.config;
        let links = self.kernel.links().await.map_err(|e| JobFault::refusal("HOST_FAILED", e.to_string()))?;
        let mut lacking = Vec::new();
        for vif in &config.vifs {
            if !links.iter().any(|link| link.name == vif.bridge.as_str()) {
                lacking.push(format!("bridge {}", vif.bridge));
            }
        }
        let settings = &self.settings.vm;
        let mapper = SafePath::parse("/dev/mapper").map_err(|error| refused(error.to_string()))?;
        for (disk, path) in config.disks.iter().filter_map(|disk| Some((disk, disk.path.as_ref()?))) {
            let root = if disk.backing == DiskBacking::Phy { &mapper } else { &settings.repositories };
            if !path.is_below(root) {
                lacking.push(format!("disk {path} (allowed: below {root})"));
            } else if !self.machine.has_disk(path).await.map_err(fault::machine)? {
                lacking.push(format!("disk {path} ({})", disk.device.as_str()));
            }
        }
        if let Boot::Kernel { kernel, ramdisk, .. } = &config.boot {
            let wrong = |path: &&SafePath| !path.is_below(&settings.kernels);
            for path in std::iter::once(kernel).chain(ramdisk).filter(wrong) {
                lacking.push(format!("kernel file {path} (allowed: below {})", settings.kernels));
            }
        }
        if lacking.is_empty() {
            return Ok(());
        }
        Err(refused(format!("that host has not: {}", lacking.join("; "))))
    }

    /// Whether the peer may open the stream of this migration.
    pub fn expects_stream(&self, source: &str, id: MigrationId) -> bool {
        self.moves.inner().prepared.get(&id).is_some_and(|prepared| prepared.source == source)
    }

    /// Receives what comes on the stream of a prepared migration, in a job, and waits for its end.
    pub async fn receive(&self, source: &str, id: MigrationId, stream: Stream) {
        let prepared = {
            let mut inner = self.moves.inner();
            let Some(prepared) = inner.prepared.remove(&id).filter(|p| p.source == source) else { return };
            inner.receiving.insert(id, prepared.document.record.clone());
            inner.streams.insert(id, stream);
            prepared
        };
        if let Some(engine) = self.engine() {
            let caller = format!("peer:{}", &source[..source.len().min(8)]);
            let limit_s = self.settings.migration.deadline_s;
            let plan = plan::receive_vm(prepared.document, source.to_owned(), limit_s);
            let submission = self.submission("receive_vm", &caller, plan, Options::default());
            match engine.submit(submission).await {
                Ok(job) => {
                    let _ = engine.wait(job, Duration::from_secs(limit_s + 600)).await;
                }
                Err(error) => tracing::warn!(migration = %id, %error, "a VM cannot be received now"),
            }
        }
        let mut inner = self.moves.inner();
        inner.streams.remove(&id);
        inner.receiving.remove(&id);
    }

    pub(super) async fn receive_domain(
        &self,
        document: &Document,
        source: &str,
        context: &StepContext,
    ) -> Result<Outcome> {
        let (id, vm) = (document.id, document.record.id());
        if self.moves.arrival(id).is_some() {
            // Whole and written down by this very step, before a crash.
            return Ok(Outcome::done());
        }
        let stream = self.moves.inner().streams.remove(&id);
        let Some(stream) = stream.filter(|_| !context.resumed) else {
            return Err(JobFault::new("MIGRATION_FAILED", "the stream ended with the agent"));
        };
        let stall = Duration::from_secs(self.settings.migration.stall_s);
        tracing::info!(vm_uuid = %vm, migration = %id, phase = "receiving", "a VM is on its way in");
        let (input, mut receiving) = migrate_stream::receive(stream, stall);
        let cut = receiving.cut();
        let arrived = {
            let arriving = pin!(self.arrive(document, source, Box::new(input), &mut receiving, context));
            match select(arriving, pin!(context.cancelled.cancelled())).await {
                Either::Left((arrived, _)) => arrived,
                Either::Right(((), arriving)) => {
                    // The toolstack sees the end of its stream, and takes its half back.
                    cut.cancel();
                    arriving.await
                }
            }
        };
        match arrived {
            Ok(domid) => {
                receiving.answer(Answer::Ready, stall).await;
                self.look(domid).await;
                Ok(Outcome::done())
            }
            Err(fault) => {
                receiving.answer(Answer::Refused(fault.to_string()), stall).await;
                tracing::warn!(vm_uuid = %vm, migration = %id, %fault, "a VM was not received");
                Err(JobFault { no_effect: false, ..fault })
            }
        }
    }

    /// From the first byte to T1.
    async fn arrive(
        &self,
        document: &Document,
        source: &str,
        input: Box<dyn Inflow>,
        receiving: &mut Receiving,
        context: &StepContext,
    ) -> Result<DomId> {
        self.check_still_free(document).await?;
        let domid = self.toolstack.migrate_in(input).await.map_err(fault::toolstack)?;
        receiving.is_whole(WHOLE_WITHIN).await.map_err(|why| JobFault::new("MIGRATION_FAILED", why))?;
        self.check_arrived(domid, document).await?;
        self.write_arrival(document, source, context).await?;
        let (vm, migration) = (document.record.id(), document.id);
        tracing::info!(vm_uuid = %vm, migration = %migration, phase = "whole", "a VM is on its way in");
        Ok(domid)
    }

    /// Under the VM's lock.
    async fn check_still_free(&self, document: &Document) -> Result<()> {
        let id = document.record.id();
        let clash = self.vms.get(id).is_some() || self.vms.clash(&document.record).is_some();
        if clash || self.domain(id).await?.is_some() {
            return Err(JobFault::refusal("VM_EXISTS", format!("VM {id} exists there already")));
        }
        Ok(())
    }

    /// A peer sends the VM that it has said, and no other.
    async fn check_arrived(&self, domid: DomId, document: &Document) -> Result<()> {
        let domain = self.toolstack.get(domid).await.map_err(fault::toolstack)?;
        let vm = document.record.id();
        match domain {
            Some(domain) if domain.vm == Some(vm) && domain.state == RunState::Paused => Ok(()),
            Some(domain) if domain.vm != Some(vm) => {
                if let Err(left) = self.toolstack.destroy(domid).await {
                    tracing::error!(domid = domid.0, said = %vm, %left, "a domain that nobody asked for stays");
                }
                Err(refused("what came is not the VM that was said"))
            }
            _ => Err(refused("the domain is gone again")),
        }
    }

    /// T1.
    async fn write_arrival(&self, document: &Document, source: &str, context: &StepContext) -> Result<()> {
        let arrival = Arrival {
            id: document.id,
            source: source.to_owned(),
            record: document.record.clone(),
            paused: document.paused,
            since: Timestamp::now(),
        };
        let mut writes = Txn::essential();
        writes.put(&ARRIVALS, &arrival.id, &arrival);
        let text = format!("VM {} has arrived, paused; its source decides", arrival.record.config.name);
        let event = Event::new(kind::VM_ARRIVING, VmRecord::lock(arrival.record.id()), text);
        event.with_job(context.job).with("migration", arrival.id.as_str()).append_to(&mut writes);
        // In memory first: once it is on disk nobody may take its domain for debris.
        self.moves.inner().arrivals.insert(arrival.id, arrival.clone());
        if let Err(error) = self.store.commit(writes).await {
            self.moves.inner().arrivals.remove(&arrival.id);
            return Err(JobFault::new("STORE", error.to_string()));
        }
        Ok(())
    }

    /// What came and is not written down goes.
    pub(super) async fn undo_receive(&self, document: &Document) -> Result<Outcome> {
        let vm = document.record.id();
        let ours = self.vms.get(vm).is_some() || self.moves.arrival(document.id).is_some();
        if !ours && let Some(domain) = self.domain(vm).await? {
            self.destroy_found(domain.domid).await?;
        }
        Ok(Outcome::done())
    }

    /// `migration_state`: what this host has of a migration.
    pub async fn arrival_state(&self, id: MigrationId, vm: VmId) -> Result<There> {
        if let Some(arrival) = self.moves.arrival(id) {
            let domain = self.domain(arrival.record.id()).await?;
            let alive = domain.is_some_and(|domain| !matches!(domain.state, RunState::Shutdown(_)));
            return Ok(if alive { There::Whole } else { There::Lost });
        }
        let ended = self.outcome_row(id).await?;
        if let Some(ended) = ended.filter(|ended| ended.side == Side::Target) {
            return Ok(if ended.committed { There::Taken } else { There::Nothing });
        }
        let coming =
            self.moves.expects(vm) || self.engine().is_some_and(|e| e.is_claimed(&VmRecord::lock(vm)));
        Ok(if coming { There::Unknown } else { There::Nothing })
    }

    /// `migration_outcome`: what the source says.
    pub async fn source_word(&self, id: MigrationId, vm: VmId) -> Result<Word> {
        let busy = self.engine().is_some_and(|engine| engine.is_claimed(&VmRecord::lock(vm)));
        let ended = self.outcome_row(id).await?;
        let record = self.vms.get(vm).map(|vm| vm.record);
        Ok(word(id, ended.as_ref(), record.as_deref(), busy))
    }

    async fn outcome_row(&self, id: MigrationId) -> Result<Option<Ended>> {
        let row = self.store.get(&OUTCOMES, &id).await;
        row.map_err(|error| JobFault::new("STORE", error.to_string()))
    }

    /// The VM that a peer's migration brought here, if it is this peer's.
    pub fn arrived_from(&self, source: &str, id: MigrationId) -> Option<VmId> {
        self.moves.arrival(id).filter(|arrival| arrival.source == source).map(|arrival| arrival.record.id())
    }

    /// T2: the record is ours from now on.
    pub(super) async fn take_over(&self, id: MigrationId, context: &StepContext) -> Result<Outcome> {
        let Some(arrival) = self.moves.arrival(id) else {
            return match self.outcome_row(id).await? {
                Some(ended) if ended.committed => Ok(Outcome::done()),
                _ => {
                    let text = format!("no VM of migration {id} is here");
                    Err(JobFault::refusal("MIGRATION_NOT_FOUND", text))
                }
            };
        };
        let vm = arrival.record.id();
        let domain = self.domain(vm).await?;
        let alive = domain.is_some_and(|domain| !matches!(domain.state, RunState::Shutdown(_)));
        let mut record = arrival.record.clone();
        record.changed = Timestamp::now();
        record.intent = if alive { Intent::On } else { Intent::Off };
        record.last_end = (!alive).then_some(EndCause::Unknown);
        let mut outcome = self.write_record(record);
        self.end_arrival(&arrival, true, &mut outcome);
        let name = &arrival.record.config.name;
        let event = if alive {
            Event::new(kind::VM_ARRIVED, VmRecord::lock(vm), format!("VM {name} is this host's now"))
        } else {
            let text =
                format!("VM {name} is this host's, and off: its memory was lost with this host's last boot");
            Event::new(kind::VM_ARRIVED, VmRecord::lock(vm), text).with_severity(Severity::Critical)
        };
        event.with_job(context.job).with("migration", id.as_str()).append_to(&mut outcome.writes);
        outcome.value = Some(json!({ "paused": arrival.paused }));
        Ok(outcome)
    }

    fn end_arrival(&self, arrival: &Arrival, committed: bool, outcome: &mut Outcome) {
        let (id, vm) = (arrival.id, arrival.record.id());
        let ended = Ended {
            id,
            vm,
            side: Side::Target,
            committed,
            peer: arrival.source.clone(),
            at: Timestamp::now(),
        };
        outcome.writes.delete(&ARRIVALS, &id);
        outcome.writes.put(&OUTCOMES, &id, &ended);
        let before = outcome.then.take();
        let forget = self.hook(move |operations| {
            operations.moves.inner().arrivals.remove(&id);
            let phase = if committed { "taken over" } else { "given up" };
            tracing::info!(vm_uuid = %vm, migration = %id, phase, "a VM is on its way in");
        });
        outcome.then = Some(Box::new(move || {
            before.into_iter().chain(forget).for_each(|then| then());
        }));
    }

    /// After T2: it goes on where it stopped.
    pub(super) async fn let_run(&self, vm: VmId, context: &StepContext) -> Result<Outcome> {
        let told = context.step.checked_sub(1).and_then(|before| context.outcomes.get(before)?.clone());
        let stays_paused = told.is_some_and(|told| told["paused"].as_bool() == Some(true));
        let state = match self.domain(vm).await? {
            None => "off",
            Some(domain) if matches!(domain.state, RunState::Shutdown(_)) => "off",
            Some(domain) if domain.state == RunState::Paused && stays_paused => "paused",
            Some(domain) => {
                if domain.state == RunState::Paused {
                    self.toolstack.unpause(domain.domid).await.map_err(fault::toolstack)?;
                }
                self.look(domain.domid).await;
                "running"
            }
        };
        Ok(Outcome::result(json!({ "state": state })))
    }

    /// The source says that it is off, or a human does: the copy goes.
    pub(super) async fn drop_arrival(&self, id: MigrationId, context: &StepContext) -> Result<Outcome> {
        self.moves.inner().prepared.remove(&id);
        let Some(arrival) = self.moves.arrival(id) else { return Ok(Outcome::done()) };
        let vm = arrival.record.id();
        if self.vms.get(vm).is_none()
            && let Some(domain) = self.domain(vm).await?
        {
            self.destroy_found(domain.domid).await?;
        }
        let mut outcome = Outcome::done();
        self.end_arrival(&arrival, false, &mut outcome);
        let text =
            format!("VM {} goes on where it was; its copy here was destroyed", arrival.record.config.name);
        let event = Event::new(kind::VM_ARRIVAL_DROPPED, VmRecord::lock(vm), text);
        event.with_job(context.job).with("migration", id.as_str()).append_to(&mut outcome.writes);
        Ok(outcome)
    }

    /// Forgets preparations for this VM.
    pub fn forget_preparation(&self, vm: VmId) {
        self.moves.inner().prepared.retain(|_, prepared| prepared.document.record.id() != vm);
    }

    /// Whether this host would take one more VM, and not this one already.
    pub fn would_take(&self, vm: VmId) -> Result<()> {
        if self.vms.get(vm).is_some() {
            return Err(JobFault::refusal("VM_EXISTS", format!("VM {vm} is this host's already")));
        }
        self.moves.inner().check_room(None, self.settings.migration.max_in)
    }
}
