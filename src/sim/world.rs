//! The world as a pure state machine: a request and the time go in, an answer and observations come out.
//!
//! Invariants, which `tests.rs` holds with random requests: memory given to domains never exceeds what there
//! is; no VM has two domains that run; a domid is not used again before the numbers wrap.

use super::domain::{Condition, Domain, attach, detach};
use super::host::{Host, PowerChange};
use super::script::Script;
use super::{
    Answer, Audit, Behaviour, Display, DomainView, Effect, Fate, HypervisorView, Image, Observation, Reason,
    Request, Result, Spec, State, Trigger, WorldError,
};
use crate::model::{KiB, MiB, Timestamp, VmId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Xen reserves the domids from here on (`DOMID_FIRST_RESERVED`, xen/include/public/xen.h); numbers wrap below.
const FIRST_RESERVED_DOMID: u32 = 0x7FF0;
const FIRST_VNC_PORT: u16 = 5900;
/// Behaviours kept for single VMs.
const MAX_BEHAVIOURS: usize = 65_536;

/// What the world is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Of the whole machine; dom0 takes an eighth, at most 2 GiB.
    pub memory: MiB,
    pub cpus: u32,
    /// Makes the machine's UUID and boot ids: the same number, the same machine.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { memory: MiB(64 * 1024), cpus: 16, seed: 1 }
    }
}

#[derive(Debug)]
pub struct World {
    options: Options,
    started: Timestamp,
    domains: BTreeMap<u32, Domain>,
    next_domid: u32,
    /// By VM: a lookup that 1,000 domains make worth keeping.
    by_vm: HashMap<VmId, Vec<u32>>,
    default_behaviour: Behaviour,
    behaviours: HashMap<VmId, Behaviour>,
    script: Script,
    host: Host,
    audit: Audit,
    observed: Vec<Observation>,
}

impl World {
    pub fn new(options: Options, now: Timestamp) -> Self {
        Self {
            options,
            started: now,
            domains: BTreeMap::new(),
            next_domid: 1,
            by_vm: HashMap::new(),
            default_behaviour: Behaviour::default(),
            behaviours: HashMap::new(),
            script: Script::default(),
            host: Host::new(options.seed, now),
            audit: Audit::default(),
            observed: Vec::new(),
        }
    }

    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// What the script says of this request. Uses up the rule.
    pub fn fate(&mut self, request: &Request) -> Fate {
        let Some(kind) = request.kind() else { return Fate::Do };
        let by_domid = || request.domid().and_then(|d| self.domains.get(&d)).map(|d| d.spec.vm);
        let vm = request.vm().or_else(by_domid);
        self.script.fate(kind, vm)
    }

    /// The next moment at which something happens by itself.
    pub fn next_event_at(&self) -> Option<Timestamp> {
        let guests = self.domains.values().filter_map(Domain::next_event_at);
        guests.chain(self.host.pending.map(|(at, _)| at)).min()
    }

    /// Lets everything happen that was to happen until `now`.
    pub fn advance(&mut self, now: Timestamp) -> Vec<Observation> {
        let ended: Vec<(u32, Reason)> = self
            .domains
            .values_mut()
            .filter_map(|d| d.advance(now).map(|reason| (d.domid, reason)))
            .collect();
        for (domid, reason) in ended {
            self.note_end(domid, reason, now);
        }
        if let Some(change) = self.host.advance(now) {
            self.lose_all_domains(change, now);
        }
        std::mem::take(&mut self.observed)
    }

    /// Does one request. Those that need a file (`Save`, `Restore`, `DumpCore`) are the engine's: it calls
    /// [`World::image`], [`World::finish_save`], [`World::restore`] and [`World::finish_dump`] around its I/O.
    pub fn apply(&mut self, request: Request, now: Timestamp) -> (Result<Answer>, Vec<Observation>) {
        let mut observed = self.advance(now);
        let answer = self.answer(request, now);
        observed.append(&mut self.observed);
        (answer, observed)
    }

    fn answer(&mut self, request: Request, now: Timestamp) -> Result<Answer> {
        match request {
            Request::Info => Ok(Answer::Info(self.info())),
            Request::List => Ok(Answer::Domains(self.list(now))),
            Request::Get { domid: 0 } => Ok(Answer::Domain(Some(self.dom0(now)))),
            Request::Get { domid } => Ok(Answer::Domain(self.domains.get(&domid).map(|d| d.view(now)))),
            Request::Find { vm } => Ok(Answer::Domain(self.find(vm).map(|d| d.view(now)))),
            Request::Create { spec, paused } => self.create(*spec, paused, now).map(Answer::DomId),
            Request::Destroy { domid } => self.destroy(domid, now),
            Request::Shutdown { domid } => self.ask_to_end(domid, Reason::Poweroff, now),
            Request::Reboot { domid } => self.ask_to_end(domid, Reason::Reboot, now),
            Request::Pause { domid } => self.pause(domid, now),
            Request::Unpause { domid } => self.unpause(domid, now),
            Request::Save { .. } | Request::Restore { .. } | Request::DumpCore { .. } => {
                Err(WorldError::Failed("this needs a disk, which a world alone has not".to_owned()))
            }
            Request::Export { domid } => self.export(domid, now),
            Request::EndExport { domid, gone } => self.end_export(domid, gone, now),
            Request::Import { image } => self.import(*image, now).map(Answer::DomId),
            Request::Config { domid } => self.domain(domid).map(|d| Answer::Config(Box::new(d.spec.clone()))),
            Request::SetBehaviour { vm, behaviour } => self.set_behaviour(vm, behaviour),
            Request::EndGuest { vm, reason } => self.end_guest(vm, reason, now),
            Request::GuestStore { domid } => self.domain(domid).map(|d| Answer::Pairs(d.guest_store.clone())),
            Request::AddRule { rule } => self.script.add(rule).map(|()| Answer::Done),
            Request::ClearRules => {
                self.script.clear();
                Ok(Answer::Done)
            }
            Request::Audit => Ok(Answer::Audit(Box::new(self.audit.clone()))),
            Request::EndWorld => Ok(Answer::Done),
            other if other.domid().is_some() => self.change(other, now),
            other => self.answer_for_host(other, now),
        }
    }

    /// Requests to the machine and the kernel under the domains.
    fn answer_for_host(&mut self, request: Request, now: Timestamp) -> Result<Answer> {
        match request {
            Request::Host => {
                let view = self.host.view(now, self.options.memory, self.options.cpus);
                return Ok(Answer::Host(Box::new(view)));
            }
            Request::HostLog { max_bytes } => return Ok(Answer::Text(self.host.log_tail(max_bytes))),
            Request::Links => return Ok(Answer::Links(self.links())),
            Request::SetClock { time } => self.host.set_clock(now, time),
            Request::SetZone { zone } => self.host.zone = zone,
            Request::SetNtp { servers, local_time_source } => {
                self.host.ntp.servers = servers;
                self.host.ntp.local_time_source = local_time_source;
            }
            Request::EnableNtp { enabled } => self.host.ntp.running = enabled,
            Request::HostReboot => self.host.request_power(now, PowerChange::Reboot),
            Request::HostPowerOff => self.host.request_power(now, PowerChange::Off),
            _ => return Err(WorldError::Failed("not a request to the machine".to_owned())),
        }
        Ok(Answer::Done)
    }

    /// Requests that change something about one domain that lives.
    fn change(&mut self, request: Request, now: Timestamp) -> Result<Answer> {
        let free = self.free_memory();
        let domain = self.domain_mut(request.domid().unwrap_or(0))?;
        domain.must_live()?;
        let vm = domain.spec.vm;
        let what = match request {
            Request::AttachDisk { disk, .. } => {
                attach(&mut domain.spec.disks, disk)?;
                "attach disk"
            }
            Request::DetachDisk { key, .. } => {
                detach(&mut domain.spec.disks, &key)?;
                "detach disk"
            }
            Request::AttachVif { vif, .. } => {
                attach(&mut domain.spec.vifs, vif)?;
                "attach vif"
            }
            Request::DetachVif { key, .. } => {
                detach(&mut domain.spec.vifs, &key)?;
                "detach vif"
            }
            Request::SetVcpus { online, .. } => {
                let max = domain.spec.max_vcpus;
                if online == 0 || online > max {
                    return Err(WorldError::BadState(format!("1 to {max} virtual CPUs can be online")));
                }
                domain.online_vcpus = online;
                domain.spec.vcpus = online;
                "set vcpus"
            }
            Request::SetMemory { target, .. } => {
                let max = domain.spec.max_memory;
                if target.0 == 0 || target > max {
                    return Err(WorldError::BadState(format!("memory can be at most {max}")));
                }
                let more = target.0.saturating_sub(domain.spec.memory.0);
                if more > free.0 {
                    return Err(WorldError::OutOfMemory { needed: MiB(more), free });
                }
                domain.spec.memory = target;
                "set memory"
            }
            Request::SetScheduling { weight, cap, .. } => {
                domain.spec.weight = weight;
                domain.spec.cap = cap;
                "set scheduling"
            }
            Request::SendToGuest { key, value, .. } => {
                domain.send(key, value)?;
                "send to guest"
            }
            Request::Sysrq { domid, letter } => return self.sysrq(domid, letter, now),
            Request::Trigger { domid, trigger } => return self.trigger(domid, trigger, now),
            _ => return Err(WorldError::Failed("not a change of a domain".to_owned())),
        };
        let domid = domain.domid;
        self.note(now, Some(vm), Some(domid), what);
        Ok(Answer::Done)
    }

    // What there is.

    fn dom0_memory(&self) -> MiB {
        MiB((self.options.memory.0 / 8).min(2048))
    }

    pub fn free_memory(&self) -> MiB {
        let used: u64 = self.domains.values().map(|d| d.spec.memory.0).sum();
        MiB(self.options.memory.0.saturating_sub(self.dom0_memory().0).saturating_sub(used))
    }

    fn info(&self) -> HypervisorView {
        HypervisorView {
            total_memory: self.options.memory,
            free_memory: self.free_memory(),
            cpus: self.options.cpus,
        }
    }

    fn dom0(&self, now: Timestamp) -> DomainView {
        DomainView {
            domid: 0,
            vm: None,
            name: "Domain-0".to_owned(),
            state: State::Running,
            memory: KiB::from(self.dom0_memory()),
            max_memory: KiB::from(self.dom0_memory()),
            vcpus: self.options.cpus,
            online_vcpus: self.options.cpus,
            cpu_time_ns: now.0.saturating_sub(self.started.0).saturating_mul(100_000),
            started: self.started,
            vnc_port: None,
        }
    }

    pub fn list(&self, now: Timestamp) -> Vec<DomainView> {
        std::iter::once(self.dom0(now)).chain(self.domains.values().map(|d| d.view(now))).collect()
    }

    /// The VM's domain; while one is on its way out and another on its way in, the latter.
    fn find(&self, vm: VmId) -> Option<&Domain> {
        let of_vm = || self.by_vm.get(&vm).into_iter().flatten().filter_map(|d| self.domains.get(d));
        of_vm().find(|d| !matches!(d.condition, Condition::Exporting { .. })).or_else(|| of_vm().next())
    }

    fn domain(&self, domid: u32) -> Result<&Domain> {
        self.domains.get(&domid).ok_or_else(|| no_domain(domid))
    }

    fn domain_mut(&mut self, domid: u32) -> Result<&mut Domain> {
        self.domains.get_mut(&domid).ok_or_else(|| no_domain(domid))
    }

    fn links(&self) -> Vec<super::Link> {
        let vif = |domid: u32, n: usize| super::Link {
            name: format!("vif{domid}.{n}"),
            mac: Some("fe:ff:ff:ff:ff:ff".to_owned()),
            up: true,
            loopback: false,
            addresses: Vec::new(),
        };
        let vifs = self.domains.values().flat_map(|d| (0..d.spec.vifs.len()).map(|n| vif(d.domid, n)));
        let mut links: Vec<_> = Host::links().into_iter().chain(vifs).collect();
        links.sort_by(|a, b| a.name.cmp(&b.name));
        links
    }

    // Beginning.

    pub fn create(&mut self, spec: Spec, paused: bool, now: Timestamp) -> Result<u32> {
        self.check_room(&spec)?;
        let guest = self.behaviour(spec.vm).clone();
        let domid = self.take_domid()?;
        let port = self.vnc_port(spec.display)?;
        self.begin(Domain::begin(domid, spec, &guest, now), port, paused, "create", now);
        Ok(domid)
    }

    /// Builds a domain from an image of the VM that `spec` describes; what the image says of it holds.
    pub fn restore(&mut self, spec: &Spec, image: Image, paused: bool, now: Timestamp) -> Result<u32> {
        if image.format != Image::FORMAT {
            return Err(WorldError::Failed("the file does not hold a saved domain".to_owned()));
        }
        if image.spec.vm != spec.vm {
            return Err(WorldError::Failed(format!("the file holds another VM, {}", image.spec.vm)));
        }
        self.resume(image, paused, "restore", now)
    }

    fn import(&mut self, image: Image, now: Timestamp) -> Result<u32> {
        if image.format != Image::FORMAT {
            return Err(WorldError::Failed("what arrived is no domain".to_owned()));
        }
        self.resume(image, true, "import", now)
    }

    fn resume(&mut self, image: Image, paused: bool, what: &str, now: Timestamp) -> Result<u32> {
        self.check_room(&image.spec)?;
        let guest = self.behaviour(image.spec.vm).clone();
        let domid = self.take_domid()?;
        let port = self.vnc_port(image.spec.display)?;
        self.begin(Domain::resume(domid, image, &guest, now), port, paused, what, now);
        Ok(domid)
    }

    fn begin(&mut self, mut domain: Domain, port: Option<u16>, paused: bool, what: &str, now: Timestamp) {
        let (domid, vm) = (domain.domid, domain.spec.vm);
        domain.vnc_port = port;
        if paused {
            domain.become_(Condition::Paused, now);
        }
        self.domains.insert(domid, domain);
        self.by_vm.entry(vm).or_default().push(domid);
        self.audit.note_begun(vm);
        self.note_running(vm);
        self.note(now, Some(vm), Some(domid), what);
        self.observed.push(Observation::Domain(domid));
    }

    /// Whether a domain of this VM and name may begin, and has memory. The one that is being sent away does
    /// not stand in the way: a VM may be sent to the host it is on.
    fn check_room(&mut self, spec: &Spec) -> Result<()> {
        if !self.host.powered_on {
            return Err(WorldError::Failed("the host is powered off".to_owned()));
        }
        let clash = |d: &Domain| {
            !matches!(d.condition, Condition::Exporting { .. })
                && (d.spec.vm == spec.vm || d.spec.name == spec.name)
        };
        if let Some(other) = self.domains.values().find(|d| clash(d)) {
            if other.spec.vm == spec.vm {
                self.audit.refused_doubles += 1;
            }
            return Err(WorldError::Exists);
        }
        let (needed, free) = (spec.memory, self.free_memory());
        if needed > free {
            return Err(WorldError::OutOfMemory { needed, free });
        }
        Ok(())
    }

    fn take_domid(&mut self) -> Result<u32> {
        for _ in 0..FIRST_RESERVED_DOMID {
            let domid = self.next_domid;
            self.next_domid = if domid + 1 >= FIRST_RESERVED_DOMID { 1 } else { domid + 1 };
            if !self.domains.contains_key(&domid) {
                return Ok(domid);
            }
        }
        Err(WorldError::Failed("all domain numbers are in use".to_owned()))
    }

    fn vnc_port(&self, display: Option<Display>) -> Result<Option<u16>> {
        let used = |port: u16| self.domains.values().any(|d| d.vnc_port == Some(port));
        match display {
            None => Ok(None),
            Some(Display::Number(n)) => {
                let port = FIRST_VNC_PORT.saturating_add(n);
                if used(port) {
                    return Err(WorldError::Failed(format!("VNC port {port} is in use")));
                }
                Ok(Some(port))
            }
            Some(Display::FirstFree) => match (FIRST_VNC_PORT..u16::MAX).find(|port| !used(*port)) {
                Some(port) => Ok(Some(port)),
                None => Err(WorldError::Failed("no VNC port is free".to_owned())),
            },
        }
    }

    // Pausing, ending, leaving.

    fn pause(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        domain.must_live()?;
        if domain.condition != Condition::Paused {
            domain.become_(Condition::Paused, now);
            self.note_change(domid, "pause", now);
        }
        Ok(Answer::Done)
    }

    fn unpause(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        domain.must_live()?;
        if domain.condition == Condition::Paused {
            domain.become_(Condition::Alive, now);
            let vm = domain.spec.vm;
            self.note_running(vm);
            self.note_change(domid, "unpause", now);
        }
        Ok(Answer::Done)
    }

    fn ask_to_end(&mut self, domid: u32, reason: Reason, now: Timestamp) -> Result<Answer> {
        let domain = self.domain(domid)?;
        domain.must_live()?;
        let vm = domain.spec.vm;
        let guest = self.behaviour(vm).clone();
        self.domain_mut(domid)?.ask_to_end(reason, &guest, now);
        let what = if reason == Reason::Reboot { "ask to reboot" } else { "ask to shut down" };
        self.note(now, Some(vm), Some(domid), what);
        Ok(Answer::Done)
    }

    fn sysrq(&mut self, domid: u32, letter: char, now: Timestamp) -> Result<Answer> {
        match letter {
            'b' => self.end(domid, Reason::Reboot, now),
            'o' => self.end(domid, Reason::Poweroff, now),
            'c' => self.end(domid, Reason::Crash, now),
            _ => self.note_change(domid, "sysrq", now),
        }
        Ok(Answer::Done)
    }

    fn trigger(&mut self, domid: u32, trigger: Trigger, now: Timestamp) -> Result<Answer> {
        match trigger {
            Trigger::Power => return self.ask_to_end(domid, Reason::Poweroff, now),
            Trigger::Reset => self.end(domid, Reason::Reboot, now),
            Trigger::Other => self.note_change(domid, "trigger", now),
        }
        Ok(Answer::Done)
    }

    fn end_guest(&mut self, vm: VmId, reason: Reason, now: Timestamp) -> Result<Answer> {
        let domain = self.find(vm).ok_or(WorldError::NoSuchDomain)?;
        domain.must_live()?;
        self.end(domain.domid, reason, now);
        Ok(Answer::Done)
    }

    fn end(&mut self, domid: u32, reason: Reason, now: Timestamp) {
        if let Some(domain) = self.domains.get_mut(&domid) {
            domain.end(reason, now);
            self.note_end(domid, reason, now);
        }
    }

    fn destroy(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        self.domain(domid)?;
        self.remove(domid, "destroy", now);
        Ok(Answer::Done)
    }

    fn export(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        domain.must_live()?;
        let image = domain.image(now);
        domain.become_(Condition::Exporting { was_paused: domain.condition == Condition::Paused }, now);
        self.note_change(domid, "export", now);
        Ok(Answer::Image(Box::new(image)))
    }

    fn end_export(&mut self, domid: u32, gone: bool, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        let Condition::Exporting { was_paused } = domain.condition else {
            return Err(WorldError::BadState("the domain is not being sent away".to_owned()));
        };
        if gone {
            self.remove(domid, "sent away", now);
            return Ok(Answer::Done);
        }
        domain.become_(if was_paused { Condition::Paused } else { Condition::Alive }, now);
        let vm = domain.spec.vm;
        self.note_running(vm);
        self.note_change(domid, "export undone", now);
        Ok(Answer::Done)
    }

    /// The domain as a file would hold it.
    pub fn image(&self, domid: u32, now: Timestamp) -> Result<Image> {
        let domain = self.domain(domid)?;
        domain.must_live()?;
        Ok(domain.image(now))
    }

    /// The image is on disk.
    pub fn finish_save(&mut self, domid: u32, keep_running: bool, now: Timestamp) -> Result<()> {
        self.domain(domid)?.must_live()?;
        if keep_running {
            self.note_change(domid, "save", now);
        } else {
            self.remove(domid, "save", now);
        }
        Ok(())
    }

    /// What a dump holds; also of a domain that has crashed and waits.
    pub fn core(&self, domid: u32, now: Timestamp) -> Result<DomainView> {
        self.domain(domid).map(|d| d.view(now))
    }

    pub fn finish_dump(&mut self, domid: u32, crash: bool, now: Timestamp) -> Result<()> {
        self.domain(domid)?;
        if crash {
            self.remove(domid, "dump core", now);
        } else {
            self.note_change(domid, "dump core", now);
        }
        Ok(())
    }

    fn remove(&mut self, domid: u32, what: &str, now: Timestamp) {
        let Some(domain) = self.domains.remove(&domid) else { return };
        let vm = domain.spec.vm;
        if let Some(domids) = self.by_vm.get_mut(&vm) {
            domids.retain(|d| *d != domid);
            if domids.is_empty() {
                self.by_vm.remove(&vm);
            }
        }
        self.note(now, Some(vm), Some(domid), what);
        self.observed.push(Observation::Domain(domid));
    }

    fn lose_all_domains(&mut self, change: PowerChange, now: Timestamp) {
        let domids: Vec<u32> = self.domains.keys().copied().collect();
        for domid in domids {
            self.remove(domid, "lost with the host", now);
        }
        // A new Xen counts domids from 1 again.
        self.next_domid = 1;
        if change == PowerChange::Reboot {
            self.audit.host_reboots += 1;
            self.started = now;
        }
        let what = if change == PowerChange::Reboot { "host reboot" } else { "host power-off" };
        self.note(now, None, None, what);
        self.observed.push(Observation::Everything);
    }

    // Behaviours and the audit.

    fn behaviour(&self, vm: VmId) -> &Behaviour {
        self.behaviours.get(&vm).unwrap_or(&self.default_behaviour)
    }

    fn set_behaviour(&mut self, vm: Option<VmId>, behaviour: Behaviour) -> Result<Answer> {
        let Some(vm) = vm else {
            self.default_behaviour = behaviour;
            return Ok(Answer::Done);
        };
        if self.behaviours.len() >= MAX_BEHAVIOURS {
            return Err(WorldError::Failed("too many behaviours of single VMs".to_owned()));
        }
        self.behaviours.insert(vm, behaviour);
        Ok(Answer::Done)
    }

    fn note(&mut self, at: Timestamp, vm: Option<VmId>, domid: Option<u32>, what: &str) {
        self.host.log(at, what);
        self.audit.note(Effect { at, vm, domid, what: what.to_owned() });
    }

    fn note_change(&mut self, domid: u32, what: &str, now: Timestamp) {
        let vm = self.domains.get(&domid).map(|d| d.spec.vm);
        self.note(now, vm, Some(domid), what);
        self.observed.push(Observation::Domain(domid));
    }

    fn note_end(&mut self, domid: u32, reason: Reason, now: Timestamp) {
        let what = match reason {
            Reason::Poweroff => "end poweroff",
            Reason::Reboot => "end reboot",
            Reason::Suspend => "end suspend",
            Reason::Crash => "end crash",
            Reason::Watchdog => "end watchdog",
        };
        self.note_change(domid, what, now);
    }

    fn note_running(&mut self, vm: VmId) {
        let domids = self.by_vm.get(&vm).into_iter().flatten();
        let running = domids.filter(|d| self.domains.get(d).is_some_and(Domain::is_executing)).count();
        self.audit.note_running(vm, u32::try_from(running).unwrap_or(u32::MAX));
    }
}

fn no_domain(domid: u32) -> WorldError {
    if domid == 0 {
        return WorldError::BadState("domain 0 is the host itself".to_owned());
    }
    WorldError::NoSuchDomain
}
