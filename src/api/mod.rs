//! The verb table: every verb's name, typed parameters, role and help, and what it does: a read, a job, or a
//! signal. Here the wire's values become typed parameters, and typed results become values; nothing below knows
//! the wire's form, nothing here knows how a thing is done.
//!
//! A call's way: the verb is found, the caller's role and the parameters are checked, then a read is answered
//! at once, and a change is planned and submitted as a job. The dialect's synchronous callers wait for the job's
//! end, at most the settings' `jobs.wait_limit_s`, and are then told its number; the job goes on.
//!
//! One file per family. `verb` says what a verb is, `arguments` and `value` convert, `fault` has the table of
//! faults, `vm_form` and `vm_show` read and write the dialect's VMs, `document` its XML documents.

pub mod arguments;
mod common;
pub mod document;
mod event;
pub mod fault;
mod fragments;
mod history;
mod host;
mod job;
mod manager;
mod migration;
mod network;
mod network_dialect;
mod ownership;
mod peer;
mod power;
mod reading;
#[cfg(test)]
mod reference;
mod statistics;
mod system;
pub mod value;
pub mod verb;
mod vm;
mod vm_form;
mod vm_found;
mod vm_show;

use crate::job::{Engine, JobRecord, JobState, Options};
use crate::manager::Deliveries;
use crate::model::histogram::Calls;
use crate::model::{JobId, trace};
use crate::operation::Operations;
use crate::operation::plan::Plan;
use crate::stats::{History, Sampler};
use crate::wire::{Answer, Call, Caller, Fault, Handler, Role, Value};
use arguments::Arguments;
use fault::{ApiFault, Result};
use fragments::Fragments;
use futures_util::future::{BoxFuture, FutureExt};
use reading::Reading;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tracing::Instrument;
use verb::{Kind, Origin, Verb};

/// Figures that change without anybody's doing (CPU time) may be this old in an answer.
const SAMPLE_AGE: Duration = Duration::from_secs(1);

/// How often one call's change is planned, if others overtake it again and again.
const PLANS: u32 = 16;

pub struct Api {
    pub(crate) operations: Arc<Operations>,
    engine: Engine,
    verbs: BTreeMap<&'static str, Verb>,
    /// What monitoring asks of the verbs.
    calls: Arc<Calls>,
    fragments: Fragments,
    /// All domains.
    domains: Reading,
    /// The hypervisor, until it has told of itself.
    hypervisor: Reading,
    /// 0 until the hypervisor has told.
    host_cpus: Arc<AtomicU32>,
    /// How busy the host was of late.
    load: std::sync::Mutex<statistics::Load>,
    /// What the wire and the certificates tell of themselves; the composition root knows.
    about: Arc<dyn About>,
    reports: Reports,
}

/// What is measured, kept and sent.
#[derive(Clone)]
pub struct Reports {
    pub deliveries: Arc<Deliveries>,
    pub history: Arc<History>,
    pub sampler: Arc<Sampler>,
}

/// What the composition root knows and verbs tell.
pub trait About: Send + Sync + 'static {
    /// The server certificate that is served.
    fn certificate(&self) -> std::result::Result<Certificate, String>;
    fn plain_http(&self) -> bool;
    /// Calls answered so far, connections now.
    fn wire_counts(&self) -> (u64, u64);
}

/// A certificate, for people.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub subject: String,
    pub issuer: String,
    pub serial: String,
    pub not_before: String,
    pub not_after: String,
    /// SHA-256 of the DER, lower-case hex.
    pub fingerprint: String,
    pub ca_fingerprint: String,
    pub pem: String,
    pub ca_pem: String,
}

/// All verbs, by name.
pub fn table() -> BTreeMap<&'static str, Verb> {
    let families = common::verbs()
        .chain(system::verbs())
        .chain(host::verbs())
        .chain(ownership::verbs())
        .chain(vm::verbs())
        .chain(migration::verbs())
        .chain(network::verbs())
        .chain(network_dialect::verbs())
        .chain(peer::verbs())
        .chain(power::verbs())
        .chain(statistics::verbs())
        .chain(job::verbs())
        .chain(event::verbs())
        .chain(manager::verbs())
        .chain(history::verbs());
    families.map(|verb| (verb.name, verb)).collect()
}

impl Api {
    pub fn new(operations: Arc<Operations>, engine: Engine, about: Arc<dyn About>, reports: Reports) -> Self {
        let verbs = table();
        Self {
            operations,
            engine,
            calls: Arc::new(Calls::of(verbs.keys().copied())),
            verbs,
            fragments: Fragments::default(),
            domains: Reading::default(),
            hypervisor: Reading::default(),
            host_cpus: Arc::default(),
            load: std::sync::Mutex::default(),
            about,
            reports,
        }
    }

    /// How long calls took, by verb; those made inside a multicall are its own.
    pub fn calls(&self) -> Arc<Calls> {
        Arc::clone(&self.calls)
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    fn host_cpus(&self) -> u32 {
        self.host_cpus.load(Ordering::Relaxed)
    }

    /// How many CPUs the host has; asked until it is known.
    async fn ask_hypervisor(&self) {
        if self.host_cpus() != 0 {
            return;
        }
        let (operations, cpus) = (Arc::clone(&self.operations), Arc::clone(&self.host_cpus));
        let ask = || async move {
            if let Ok(info) = operations.toolstack.info().await {
                cpus.store(info.nr_cpus, Ordering::Relaxed);
            }
        };
        self.hypervisor.wait(SAMPLE_AGE, ask).await;
    }

    /// Reads all domains if the last reading is too old. If the toolstack does not answer (or not soon), what was
    /// last seen is what there is to tell.
    async fn fresh_sample(&self) {
        let operations = Arc::clone(&self.operations);
        let list = || async move {
            if let Err(error) = operations.look_at_all().await {
                tracing::warn!(%error, "the domains cannot be listed; answering with what was last seen");
            }
        };
        tokio::join!(self.ask_hypervisor(), self.domains.wait(SAMPLE_AGE, list));
    }

    fn verb(&self, name: &str) -> Result<&Verb> {
        self.verbs.get(name).ok_or_else(|| {
            let near = self.verbs.keys().filter(|known| near(known, name)).copied().collect::<Vec<_>>();
            let hint = if near.is_empty() {
                "system.listMethods lists all".to_owned()
            } else {
                format!("did you mean {}?", near.join(", "))
            };
            ApiFault::new("UNKNOWN_VERB", format!("there is no verb {}; {hint}", crate::model::excerpt(name)))
        })
    }

    fn permit(verb: &Verb, caller: &Caller) -> Result<()> {
        let permitted = match (caller.role, verb.role) {
            (Role::Peer, needed) => needed == Role::Peer || verb.family == "system",
            (_, Role::Peer) => false,
            (has, needed) => has >= needed,
        };
        if permitted {
            return Ok(());
        }
        let text = format!("{} needs the role {:?}; the caller has {:?}", verb.name, verb.role, caller.role);
        Err(ApiFault::new("NOT_PERMITTED", text.to_lowercase()))
    }

    /// Until when a change's caller waits for its job.
    fn wait_end(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.operations.settings.jobs.wait_limit_s)
    }

    async fn answer(&self, verb: &Verb, params: Vec<Value>, caller: &Caller, end: Instant) -> Result<Answer> {
        Self::permit(verb, caller)?;
        match verb.kind {
            Kind::Read(read) | Kind::Envelope(read) => {
                read(self, &Arguments::check(verb.name, verb.params, params)?, caller).await
            }
            Kind::Signal(signal) => {
                let arguments = Arguments::check(verb.name, verb.params, params)?;
                let answer = signal(self, &arguments, caller).await;
                let outcome = answer.as_ref().map_or_else(|f| f.name.as_str(), |_| "done");
                tracing::info!(verb = verb.name, %caller, outcome, "signal");
                answer
            }
            Kind::Window(_, tell) => {
                let id = self.submit(verb, params, caller, Options::default()).await?;
                Ok(tell(self, id, end).await?.into())
            }
            Kind::Job(_, answer) => Ok(answer(&*self.change(verb, params, caller, end).await?).into()),
        }
    }

    /// Makes a change and waits for its success, no longer than the dialect's clients would.
    ///
    /// A job whose plan was overtaken by somebody else's change has done nothing: the plan is made anew from what
    /// is now, as if the call had come a moment later. Each time, somebody else got on.
    async fn change(
        &self,
        verb: &Verb,
        params: Vec<Value>,
        caller: &Caller,
        end: Instant,
    ) -> Result<Arc<JobRecord>> {
        for _ in 1..PLANS {
            let id = self.submit(verb, params.clone(), caller, Options::default()).await?;
            match self.finished(id, end).await {
                Err(fault) if fault.name == "CONFLICT" && Instant::now() < end => {}
                ended => return ended,
            }
        }
        let id = self.submit(verb, params, caller, Options::default()).await?;
        self.finished(id, end).await
    }

    /// Plans a change and hands it to the engine.
    async fn submit(
        &self,
        verb: &Verb,
        params: Vec<Value>,
        caller: &Caller,
        options: Options,
    ) -> Result<JobId> {
        let shown = masked(verb, &params);
        let plan = self.plan(verb, params, caller, false).await?;
        let mut submission = self.operations.submission(verb.name, &caller.to_string(), plan, options);
        submission.params = shown;
        let id = self.engine.submit(submission).await?;
        tracing::info!(job_id = %id, %caller, "job accepted");
        Ok(id)
    }

    /// `dry`: the plan is only to be shown.
    async fn plan(&self, verb: &Verb, params: Vec<Value>, caller: &Caller, dry: bool) -> Result<Plan> {
        let (Kind::Job(planner, _) | Kind::Window(planner, _)) = verb.kind else {
            let text = format!("{} is a {}; only changes are jobs", verb.name, verb.kind_name());
            return Err(ApiFault::new("NOT_A_JOB", text));
        };
        let mut arguments = Arguments::check(verb.name, verb.params, params)?;
        arguments.dry = dry;
        planner(self, &arguments, caller).await
    }

    /// Waits for a job's success.
    async fn finished(&self, id: JobId, end: Instant) -> Result<Arc<JobRecord>> {
        let record = self.engine.wait(id, end.saturating_duration_since(Instant::now())).await?;
        let record = record.ok_or_else(|| ApiFault::new("JOB_NOT_FOUND", format!("job {id} is gone")))?;
        match record.state {
            JobState::Succeeded => Ok(record),
            state if state.is_terminal() => {
                let fault = record.fault.clone().map(ApiFault::from);
                let fault = fault.unwrap_or_else(|| ApiFault::new("INTERNAL", "it failed without a word"));
                Err(ApiFault { text: format!("{} (job {id})", fault.text), ..fault })
            }
            _ if self.engine.is_stopping() => {
                let text = format!("the agent is stopping; job {id} goes on when it is back");
                Err(ApiFault::new("STOPPING", text))
            }
            _ => {
                let text = format!(
                    "job {id} is still {} after {} s and goes on; job_wait({id}, …) waits for it",
                    record.state.as_str(),
                    self.operations.settings.jobs.wait_limit_s
                );
                Err(ApiFault::new("JOB_STILL_RUNNING", text))
            }
        }
    }
}

/// The parameters as a job shows them. What goes to a guest may be anything, so only its keys are kept.
fn masked(verb: &Verb, params: &[Value]) -> serde_json::Value {
    let list = verb.params.iter().zip(params).map(|(param, value)| match value {
        Value::Struct(map) if verb.name == "send_to_guest" => {
            serde_json::Value::from(map.keys().cloned().collect::<Vec<_>>())
        }
        value => {
            let named = Value::Struct(std::iter::once((param.name.to_owned(), value.clone())).collect());
            value::to_json_masked(&named)[param.name].clone()
        }
    });
    serde_json::Value::Array(list.collect())
}

/// Whether a name could be a slip for another: the same letters but for case and underscores, or one contains
/// the other.
fn near(known: &str, name: &str) -> bool {
    let plain = |s: &str| s.replace(['_', '-', '.'], "").to_ascii_lowercase();
    let (known, name) = (plain(known), plain(name));
    name.len() >= 4 && name.len() <= 64 && (known == name || known.contains(&name) || name.contains(&known))
}

impl Handler for Api {
    fn call(&self, call: Call) -> BoxFuture<'_, std::result::Result<Answer, Fault>> {
        async move {
            let dialect = self.operations.settings.dialect;
            let verb = match self.verb(&call.method) {
                Ok(verb) => verb,
                // The dialect's clients know an unknown method by code 1.
                Err(fault) => return Err(fault.on_wire(true, dialect)),
            };
            let started = Instant::now();
            let trace_id = call.trace.map(|trace| trace.trace_id());
            // Of the highest level, so that no filter leaves warnings without it.
            let span = tracing::error_span!("call", verb = verb.name, trace_id);
            let answering = self.answer(verb, call.params, &call.caller, self.wait_end());
            let answer = trace::scope(call.trace, answering).instrument(span).await;
            let took = started.elapsed();
            self.calls.observe(verb.name, took, answer.is_err());
            if let Err(fault) = &answer {
                let took_ms = took.as_millis();
                tracing::debug!(verb = verb.name, caller = %call.caller, fault = fault.name, took_ms, "call failed");
            }
            answer.map_err(|fault| fault.on_wire(verb.origin == Origin::Dialect, dialect))
        }
        .boxed()
    }
}
