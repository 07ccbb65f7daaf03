//! The world as a pure state machine: a request and the time go in, an answer and observations come out.
//!
//! Invariants, which `tests.rs` holds with random requests: memory given to domains never exceeds what there
//! is; no VM has two domains that run; a domid is not used again before the numbers wrap.

use super::domain::{Domain, attach, detach};
use super::figures::Spent;
use super::host::{Host, PowerChange};
use super::network::Network;
use super::script::Script;
use super::{
    Answer, Audit, Behaviour, DomainView, Effect, Fate, HypervisorView, Observation, Reason, Request, Result,
    State, WorldError,
};
use crate::model::network::{Kind, Refused};
use crate::model::{IfName, KiB, MiB, Timestamp, VmId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

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
    pub(super) options: Options,
    pub(super) started: Timestamp,
    pub(super) domains: BTreeMap<u32, Domain>,
    pub(super) next_domid: u32,
    /// By VM: a lookup that 1,000 domains make worth keeping.
    pub(super) by_vm: HashMap<VmId, Vec<u32>>,
    pub(super) default_behaviour: Behaviour,
    pub(super) behaviours: HashMap<VmId, Behaviour>,
    pub(super) script: Script,
    pub(super) host: Host,
    pub(super) network: Network,
    pub(super) audit: Audit,
    pub(super) observed: Vec<Observation>,
    pub(super) spent: Spent,
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
            network: Network::new(),
            audit: Audit::default(),
            observed: Vec::new(),
            spent: Spent::default(),
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

    pub(super) fn answer(&mut self, request: Request, now: Timestamp) -> Result<Answer> {
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
            Request::BeginExport { domid } => self.begin_export(domid, now),
            Request::Export { domid } => self.export(domid, now),
            Request::HandOver { domid } => self.hand_over(domid, now),
            Request::EndExport { domid, gone } => self.end_export(domid, gone, now),
            Request::Import { image } => self.import(*image, now).map(Answer::DomId),
            Request::EndImport { domid, paused } => self.end_import(domid, paused, now),
            Request::Config { domid } => self.domain(domid).map(|d| Answer::Config(Box::new(d.spec.clone()))),
            Request::SetBehaviour { vm, behaviour } => self.set_behaviour(vm, behaviour),
            Request::Usage => Ok(Answer::Usage(Box::new(self.usage(now)))),
            Request::GuestMemory { domids } => Ok(Answer::GuestMemory(self.guest_memory(&domids, now))),
            Request::GuestWrites { vm, key, value } => self.guest_writes(vm, key, value),
            Request::EndGuest { vm, reason } => self.end_guest(vm, reason, now),
            Request::GuestStore { domid } => self.domain(domid).map(|d| Answer::Pairs(d.guest_store.clone())),
            Request::AddRule { rule } => self.script.add(rule).map(|()| Answer::Done),
            Request::ClearRules => {
                self.script.clear();
                Ok(Answer::Done)
            }
            Request::Audit => Ok(Answer::Audit(Box::new(self.audit.clone()))),
            Request::EndWorld => Ok(Answer::Done),
            other if other.is_of_network() => self.answer_for_network(other, now),
            other if other.domid().is_some() => self.change(other, now),
            other => self.answer_for_host(other, now),
        }
    }

    /// Requests to the machine and the kernel under the domains.
    pub(super) fn answer_for_host(&mut self, request: Request, now: Timestamp) -> Result<Answer> {
        match request {
            Request::Host => {
                let view = self.host.view(now, self.options.memory, self.options.cpus);
                return Ok(Answer::Host(Box::new(view)));
            }
            Request::HostLog { max_bytes } => return Ok(Answer::Text(self.host.log_tail(max_bytes))),
            Request::LinkTraffic => return Ok(Answer::LinkTraffic(self.link_traffic(now))),
            Request::HostFigures => return Ok(Answer::HostFigures(Box::new(self.host_figures(now)))),
            Request::DiskTraffic { domid } => return Ok(Answer::DiskTraffic(self.disk_traffic(domid, now))),
            Request::HasDisk { .. } => return Ok(Answer::Done),
            Request::SetClock { time } => self.host.set_clock(now, time),
            Request::SetZone { zone } => self.host.zone = zone,
            Request::SetNtp { servers, local_time_source } => {
                self.host.ntp.servers = servers;
                self.host.ntp.local_time_source = local_time_source;
            }
            Request::SetXendomains { enabled } => self.host.xendomains = enabled,
            Request::EnableNtp { enabled } => self.host.ntp.running = enabled,
            Request::HostReboot => self.host.request_power(now, PowerChange::Reboot),
            Request::HostPowerOff => self.host.request_power(now, PowerChange::Off),
            _ => return Err(WorldError::Failed("not a request to the machine".to_owned())),
        }
        Ok(Answer::Done)
    }

    /// Requests to the kernel's network.
    fn answer_for_network(&mut self, request: Request, now: Timestamp) -> Result<Answer> {
        let done: std::result::Result<(), Refused> = match request {
            Request::Links => return Ok(Answer::Links(self.links())),
            Request::Network => return Ok(Answer::Network(Box::new(self.network.view().clone()))),
            Request::LinkOwners => return Ok(Answer::LinkOwners(self.network.owners())),
            Request::LinkFacts { link } => {
                let facts = self.network.facts(&link).map_err(WorldError::Refused)?;
                return Ok(Answer::LinkFacts(Box::new(facts)));
            }
            Request::Neighbours => return Ok(Answer::Neighbours(self.network.neighbours())),
            Request::Reaches { address } => return Ok(Answer::Reaches(self.network.reaches(address))),
            Request::ChangeNetwork { change } => {
                let done = self.network.change(&change);
                if done.is_ok() {
                    self.note(now, None, None, "change network");
                }
                done
            }
            Request::ChangeFromOutside { change } => self.network.change(&change),
            Request::PlugCable { link, plugged } => self.network.plug(&link, plugged),
            Request::SetLinkOwner { link, owner } => self.network.set_owner(link, owner),
            Request::SetLinkFacts { link, facts } => self.network.set_facts(link, *facts),
            Request::SetSilent { address, silent } => self.network.set_silent(address, silent),
            _ => return Err(WorldError::Failed("not a request to the network".to_owned())),
        };
        done.map(|()| Answer::Done).map_err(WorldError::Refused)
    }

    /// Has the network know the cards of this domain, or that it is gone.
    pub(super) fn show_vifs(&mut self, domid: u32) {
        // Opaque but for this: the bridge that a card is for, by the toolstack's word.
        let bridge = |vif: &super::Device| IfName::parse(vif.detail.get("bridge")?.as_str()?).ok();
        let vifs = self.domains.get(&domid).map(|domain| domain.spec.vifs.iter().map(bridge).collect());
        let vifs: Vec<Option<IfName>> = vifs.unwrap_or_default();
        self.network.set_vifs(domid, &vifs);
    }

    /// Rises with each change of the network.
    pub(super) fn network_version(&self) -> u64 {
        self.network.version()
    }

    /// Requests that change something about one domain that lives.
    pub(super) fn change(&mut self, request: Request, now: Timestamp) -> Result<Answer> {
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
        if matches!(what, "attach vif" | "detach vif") {
            self.show_vifs(domid);
        }
        self.note(now, Some(vm), Some(domid), what);
        Ok(Answer::Done)
    }

    // What there is.

    pub(super) fn dom0_memory(&self) -> MiB {
        MiB((self.options.memory.0 / 8).min(2048))
    }

    pub fn free_memory(&self) -> MiB {
        let used: u64 = self.domains.values().map(|d| d.spec.memory.0).sum();
        MiB(self.options.memory.0.saturating_sub(self.dom0_memory().0).saturating_sub(used))
    }

    pub(super) fn info(&self) -> HypervisorView {
        HypervisorView {
            total_memory: self.options.memory,
            free_memory: self.free_memory(),
            cpus: self.options.cpus,
        }
    }

    pub(super) fn dom0(&self, now: Timestamp) -> DomainView {
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

    /// The VM's domain; of two, the one that is not in the middle of a migration.
    pub(super) fn find(&self, vm: VmId) -> Option<&Domain> {
        let of_vm = || self.by_vm.get(&vm).into_iter().flatten().filter_map(|d| self.domains.get(d));
        of_vm().find(|d| !d.is_migrating()).or_else(|| of_vm().next())
    }

    pub(super) fn domain(&self, domid: u32) -> Result<&Domain> {
        self.domains.get(&domid).ok_or_else(|| no_domain(domid))
    }

    pub(super) fn domain_mut(&mut self, domid: u32) -> Result<&mut Domain> {
        self.domains.get_mut(&domid).ok_or_else(|| no_domain(domid))
    }

    /// By name.
    pub(super) fn links(&self) -> Vec<super::Link> {
        let all = self.network.view().links.iter();
        all.map(|(name, link)| {
            let loopback = matches!(link.kind, Kind::Loopback);
            super::Link {
                name: name.as_str().to_owned(),
                mac: if loopback {
                    Some("00:00:00:00:00:00".to_owned())
                } else {
                    link.mac.map(|mac| mac.as_str())
                },
                up: link.up,
                loopback,
                addresses: link.addresses.iter().map(|address| (address.ip, address.prefix)).collect(),
            }
        })
        .collect()
    }

    // Behaviours and the audit.

    pub(super) fn behaviour(&self, vm: VmId) -> &Behaviour {
        self.behaviours.get(&vm).unwrap_or(&self.default_behaviour)
    }

    pub(super) fn set_behaviour(&mut self, vm: Option<VmId>, behaviour: Behaviour) -> Result<Answer> {
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

    pub(super) fn note(&mut self, at: Timestamp, vm: Option<VmId>, domid: Option<u32>, what: &'static str) {
        self.host.log(at, what);
        self.audit.note(Effect { at, vm, domid, what: what.to_owned() });
    }

    pub(super) fn note_change(&mut self, domid: u32, what: &'static str, now: Timestamp) {
        let vm = self.domains.get(&domid).map(|d| d.spec.vm);
        self.note(now, vm, Some(domid), what);
        self.observed.push(Observation::At(domid));
    }

    pub(super) fn note_end(&mut self, domid: u32, reason: Reason, now: Timestamp) {
        let what = match reason {
            Reason::Poweroff => "end poweroff",
            Reason::Reboot => "end reboot",
            Reason::Suspend => "end suspend",
            Reason::Crash => "end crash",
            Reason::Watchdog => "end watchdog",
        };
        self.note_change(domid, what, now);
    }

    pub(super) fn note_running(&mut self, vm: VmId) {
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
