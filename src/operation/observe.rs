//! The world's own doing: observations of the toolstack become a true registry, events, and jobs that settle
//! what changed. The same path as a caller's job from there on.
//!
//! One task. A VM whose record and world disagree is *dirty*. While a job is open on its lock the job knows what
//! it does, so a dirty VM is looked at again when no such job is open.
//!
//! What is told of the world and may be over one day (a domain that nobody knows, two domains of one VM, one that stands
//! still) is held against the world for as long as its alert is open, whichever life of ours told it: the log knows which
//! are, so none is told twice, and the end of each is told.

use super::settle::Decision;
use super::{Operations, plan};
use crate::event::{Event, Kind, OpenAlert, kind};
use crate::job::Options;
use crate::model::{EventNumber, VmId};
use crate::vm::adopt::Boot;
use crate::vm::{Change, Intent, VmRecord};
use crate::xen::{DomId, DomainInfo, Observation, RunState, ShutdownReason};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How soon a dirty VM is looked at again while a job is open on it.
const RECHECK: Duration = Duration::from_millis(200);
/// After a settle job failed, the same VM is tried again no sooner than this.
const RETRY: Duration = Duration::from_secs(30);
/// How often a domain that stands still is looked at: nothing tells when it goes on.
const LOOK_AT_STANDING: Duration = Duration::from_secs(5);
/// A save or a migration by hand lets a domain stand still for less; one that stands longer is told.
const STANDS_LONG: Duration = Duration::from_secs(60);
/// How soon all domains are looked at again if they could not be read at the start, or a boot is not taken yet.
const ADOPT_RETRY: Duration = Duration::from_secs(5);

/// How often open alerts are held against the world.
const LOOK_AT_ALERTS: Duration = Duration::from_secs(1);
/// Alerts that are ended by what is seen here.
const ENDED_HERE: [Kind; 3] = [kind::DOMAIN_UNKNOWN, kind::DOMAIN_DOUBLE, kind::VM_STANDS_STILL];

struct Observer {
    operations: Arc<Operations>,
    dirty: HashSet<VmId>,
    not_before: HashMap<VmId, Instant>,
    /// VMs that should run and whose domain is suspended, by nobody of ours.
    standing: HashMap<VmId, Standing>,
    /// Unknown domains, and domains of a VM that has two, that were told of already.
    told: HashSet<DomId>,
    /// Open alerts whose end was told: the log follows a moment later.
    ended: HashSet<EventNumber>,
    /// Whether the domains that were there at our start have had their verdicts. Nothing is settled before.
    adopted: bool,
}

/// A domain that was seen to be suspended since then.
struct Standing {
    domid: DomId,
    since: Instant,
}

/// Watches until `stop`. Looks at everything first.
pub async fn run(operations: Arc<Operations>, stop: CancellationToken) {
    let mut observations = operations.toolstack.observe();
    let look = Arc::clone(&operations);
    let mut observer = Observer {
        operations,
        dirty: HashSet::new(),
        not_before: HashMap::new(),
        standing: HashMap::new(),
        told: HashSet::new(),
        ended: HashSet::new(),
        adopted: false,
    };
    observer.everything().await;
    let mut retry = tokio::time::interval(ADOPT_RETRY);
    retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    retry.reset();
    let mut alerts = tokio::time::interval(LOOK_AT_ALERTS);
    alerts.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut recheck = tokio::time::interval(RECHECK);
    recheck.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            observation = observations.recv() => match observation {
                Some(observation) => observer.take(observation).await,
                None => return,
            },
            () = look.look_again.notified() => observer.everything().await,
            () = look.suspected.notified() => {
                observer.dirty.extend(look.take_suspects());
                observer.settle().await;
            }
            _ = retry.tick(), if !observer.adopted || look.boot() == Boot::New => observer.everything().await,
            _ = alerts.tick(), if observer.adopted => observer.hold_alerts_against_the_world().await,
            _ = recheck.tick(), if !observer.dirty.is_empty() => observer.settle().await,
            () = stop.cancelled() => return,
        }
    }
}

impl Observer {
    async fn take(&mut self, observation: Observation) {
        match observation {
            Observation::Everything => self.everything().await,
            Observation::At(domid) => match self.operations.see(domid).await {
                Ok((vm, change)) => {
                    // A job's own look may have taken the change away before us: its VM is looked at all the same.
                    self.dirty.extend(vm);
                    self.operations.world_changes.send_modify(|n| *n += 1);
                    if let Some(change) = change {
                        self.changed(change).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(domid = domid.0, %error, "a domain that changed cannot be read");
                    self.everything().await;
                }
            },
        }
        self.settle().await;
    }

    /// Reads all domains, and compares every record with them.
    async fn everything(&mut self) {
        let stamp = self.operations.vms.stamp();
        match self.operations.toolstack.list().await {
            Ok(domains) => {
                if self.adopted {
                    self.operations.read_boot().await;
                } else {
                    self.operations.adopt(&domains).await;
                    self.adopted = true;
                }
                self.operations.submit_host_boot().await;
                let changes = self.operations.vms.observe(stamp, domains);
                self.operations.world_changes.send_modify(|n| *n += 1);
                for change in changes {
                    self.changed(change).await;
                }
                // A reading by somebody else may have taken the change away before us.
                self.report_all_unknown().await;
                self.dirty.extend(self.operations.vms.all().iter().map(|vm| vm.record.id()));
                self.settle().await;
            }
            Err(error) => tracing::warn!(%error, "the domains cannot be listed"),
        }
    }

    async fn changed(&mut self, change: Change) {
        let Some(info) = change.after.as_ref().or(change.before.as_ref()) else { return };
        match info.vm {
            Some(vm) if self.operations.vms.get(vm).is_some() => {
                // Something new: no reason to wait for the time of the last try.
                self.not_before.remove(&vm);
                self.dirty.insert(vm);
            }
            _ if change.after.is_none() => {
                self.told.remove(&info.domid);
            }
            _ => self.report_unknown(info).await,
        }
    }

    async fn report_all_unknown(&mut self) {
        for domain in self.operations.vms.domains() {
            if domain.record.is_none() {
                self.report_unknown(&domain.info).await;
            }
        }
    }

    /// Told once, never touched.
    async fn report_unknown(&mut self, info: &DomainInfo) {
        let expected = info.vm.is_some_and(|vm| self.operations.moves.expects(vm));
        if info.domid == DomId(0) || expected || self.told.contains(&info.domid) {
            return;
        }
        let object = format!("domain/{}", info.domid.0);
        // While that is not known: at the next look at alerts.
        let Some(is_open) = self.is_open(kind::DOMAIN_UNKNOWN, &object, Some(&info.name)) else { return };
        self.told.insert(info.domid);
        if is_open {
            return;
        }
        let mut text = format!("domain {} ({:?}) runs here and is no VM of ours", info.domid.0, info.name);
        if let Some(vm) = self.operations.vms.named(&info.name) {
            text.push_str(&format!("; it has the name of VM {vm}, but another UUID"));
        }
        self.tell(&Event::new(kind::DOMAIN_UNKNOWN, object, text).with("name", info.name.clone())).await;
    }

    /// Two domains of one VM: told once, and neither is touched while both are there.
    async fn report_double(&mut self, vm: VmId, domids: &[DomId], now: Instant) {
        if domids.iter().all(|domid| self.told.contains(domid)) {
            return;
        }
        let object = VmRecord::lock(vm);
        let Some(is_open) = self.is_open(kind::DOMAIN_DOUBLE, &object, None) else {
            self.dirty.insert(vm);
            self.not_before.insert(vm, now + LOOK_AT_ALERTS);
            return;
        };
        self.told.extend(domids);
        if is_open {
            return;
        }
        let numbers: Vec<u32> = domids.iter().map(|domid| domid.0).collect();
        let text = format!(
            "VM {vm} has more than one domain ({numbers:?}); none is touched by itself until one of them is gone"
        );
        self.tell(&Event::new(kind::DOMAIN_DOUBLE, object, text)).await;
    }

    /// Whether this was told and is not over. `None`: that is not known yet.
    fn is_open(&self, kind: Kind, object: &str, part: Option<&str>) -> Option<bool> {
        let open = self.operations.events.open_of(&[kind])?;
        let is_it = |alert: &OpenAlert| *alert.object == *object && alert.part.as_deref() == part;
        Some(open.iter().any(|alert| is_it(alert) && !self.ended.contains(&alert.number)))
    }

    /// Tells the end of what is over, and what could not be told before.
    async fn hold_alerts_against_the_world(&mut self) {
        let Some(open) = self.operations.events.open_of(&ENDED_HERE) else { return };
        self.ended.retain(|number| open.iter().any(|alert| alert.number == *number));
        let mut told = Vec::new();
        for alert in &open {
            if self.ended.contains(&alert.number) {
                continue;
            }
            let Some(event) = self.end_of(alert) else { continue };
            let what = (alert.kind, &alert.object, &alert.part);
            if told.contains(&what) || self.tell(&event).await {
                told.push(what);
                self.ended.insert(alert.number);
            }
        }
        self.report_all_unknown().await;
    }

    /// What is to be told if it is over.
    fn end_of(&self, alert: &OpenAlert) -> Option<Event> {
        let vms = &self.operations.vms;
        let (_, about) = alert.object.split_once('/')?;
        let object = alert.object.to_string();
        if alert.kind == kind::DOMAIN_UNKNOWN {
            let domid = about.parse().map(DomId).ok()?;
            let is_it = |info: &DomainInfo| info.domid == domid && alert.part.as_deref() == Some(&info.name);
            if vms.domains().iter().any(|domain| domain.record.is_none() && is_it(&domain.info)) {
                return None;
            }
            let name = alert.part.as_deref().unwrap_or_default();
            let text = format!("domain {about} ({name:?}) is no unknown one any more");
            return Some(Event::new(kind::DOMAIN_GONE, object, text).with("name", name));
        }
        let vm = VmId::parse(about).ok()?;
        if alert.kind == kind::DOMAIN_DOUBLE {
            let text = format!("VM {vm} has no more than one domain again");
            let is_over = !vms.doubles().contains_key(&vm);
            return is_over.then(|| Event::new(kind::DOMAIN_SINGLE, object, text));
        }
        // Of one that is gone, its end is told by what comes of that.
        let domain = vms.get(vm)?.domain?;
        let goes_on = !matches!(domain.state, RunState::Shutdown(_) | RunState::Dying);
        let text = format!("VM {vm}: its domain {} goes on", domain.domid.0);
        goes_on.then(|| Event::new(kind::VM_GOES_ON, object, text))
    }

    /// Whoever saves or sends a domain by hand suspends it, and it is his. It is looked at until it goes on or goes;
    /// one that does neither, since its xl was killed perhaps, is told once.
    async fn watch_standing(&mut self, vm: VmId, now: Instant) {
        let Some(domid) = self.suspended_domain(vm) else {
            self.standing.remove(&vm);
            return;
        };
        self.dirty.insert(vm);
        self.not_before.insert(vm, now + LOOK_AT_STANDING);
        if let Err(error) = self.operations.see(domid).await {
            tracing::warn!(domid = domid.0, %error, "a domain that stands still cannot be read");
            return;
        }
        if self.suspended_domain(vm) != Some(domid) {
            self.standing.remove(&vm);
            return;
        }
        let new = || Standing { domid, since: now };
        let standing = self.standing.entry(vm).or_insert_with(new);
        if standing.domid != domid {
            *standing = new();
        }
        let is_long = now.duration_since(standing.since) >= STANDS_LONG;
        // Told by us before a job of ours, or by a former life; not known yet: at the next look.
        if is_long && self.is_open(kind::VM_STANDS_STILL, &VmRecord::lock(vm), None) == Some(false) {
            let text = format!(
                "VM {vm}: its domain {} has been suspended for {} s, as for a save or a migration, and no job of this \
                 agent does that. It goes on when whoever suspended it lets it; stop_vm with force ends it",
                domid.0,
                STANDS_LONG.as_secs()
            );
            self.tell(&Event::new(kind::VM_STANDS_STILL, VmRecord::lock(vm), text)).await;
        }
    }

    /// The domain of a VM that should run, if it is suspended.
    fn suspended_domain(&self, vm: VmId) -> Option<DomId> {
        let entry = self.operations.vms.get(vm).filter(|entry| entry.record.intent == Intent::On)?;
        let domain = entry.domain.as_ref()?;
        (domain.state == RunState::Shutdown(ShutdownReason::Suspend)).then_some(domain.domid)
    }

    /// Whether it is written.
    async fn tell(&self, event: &Event) -> bool {
        let written = self.operations.events.publish(event).await;
        if let Err(error) = &written {
            tracing::warn!(%error, "an event was not written");
        }
        written.is_ok()
    }

    /// Submits a job for each dirty VM on which no job is open and whose record and world disagree.
    async fn settle(&mut self) {
        let operations = Arc::clone(&self.operations);
        let Some(engine) = operations.engine().filter(|_| self.adopted) else { return };
        let now = Instant::now();
        let doubles = if self.dirty.is_empty() { HashMap::new() } else { operations.vms.doubles() };
        for vm in self.dirty.clone() {
            if engine.is_claimed(&VmRecord::lock(vm)) {
                // Who stands still now does so for that job.
                self.standing.remove(&vm);
                continue;
            }
            if self.not_before.get(&vm).is_some_and(|at| *at > now) {
                continue;
            }
            self.dirty.remove(&vm);
            self.not_before.remove(&vm);
            if let Some(domids) = doubles.get(&vm).filter(|_| operations.vms.get(vm).is_some()) {
                self.report_double(vm, domids, now).await;
                continue;
            }
            if !self.disagree(vm).await {
                self.watch_standing(vm, now).await;
                continue;
            }
            let submission =
                operations.submission("settle_vm", "agent", plan::settle_vm(vm), Options::default());
            match engine.submit(submission).await {
                Ok(job) => {
                    tracing::info!(vm_uuid = %vm, job_id = %job, "record and world disagree; settling")
                }
                Err(error) => tracing::warn!(vm_uuid = %vm, %error, "a VM cannot be settled now"),
            }
            // Looked at again when the job has ended, in case it failed.
            self.dirty.insert(vm);
            self.not_before.insert(vm, now + RETRY);
        }
    }

    /// Whether this VM's record and domain disagree. What was seen of it before may be older than what a job has done
    /// since, so a disagreement is believed only if another look, with no job open, finds it too.
    async fn disagree(&self, vm: VmId) -> bool {
        let operations = &self.operations;
        let Some(entry) = operations.vms.get(vm) else { return false };
        let seen = entry.domain.as_deref().filter(|d| d.state != RunState::Dying);
        if operations.decide_now(&entry.record, seen) == Decision::Nothing {
            return false;
        }
        if let Some(domain) = &entry.domain {
            operations.look(domain.domid).await;
        }
        match operations.domain(vm).await {
            Ok(found) => {
                if let Some(domain) = &found {
                    operations.look(domain.domid).await;
                }
                let Some(entry) = operations.vms.get(vm) else { return false };
                operations.decide_now(&entry.record, found.as_ref()) != Decision::Nothing
            }
            // The job has the time and the words for a toolstack that does not answer.
            Err(_) => true,
        }
    }
}
