//! Domains begin, pause, end and leave: the part of the world that [`super::world`] dispatches to.

use super::domain::{Condition, Domain};
use super::host::PowerChange;
use super::world::World;
use super::{Answer, Display, DomainView, Image, Observation, Reason, Result, Spec, Trigger, WorldError};
use crate::model::{Timestamp, VmId};
use std::collections::HashSet;

/// Xen reserves the domids from here on (`DOMID_FIRST_RESERVED`, xen/include/public/xen.h); numbers wrap below.
const FIRST_RESERVED_DOMID: u32 = 0x7FF0;
const FIRST_VNC_PORT: u16 = 5900;

impl World {
    // Beginning.

    pub fn create(&mut self, spec: Spec, paused: bool, now: Timestamp) -> Result<u32> {
        self.check_room(&spec, false)?;
        let guest = self.behaviour(spec.vm).clone();
        let domid = self.take_domid()?;
        let port = self.vnc_port(spec.display)?;
        self.begin(Domain::begin(domid, spec, &guest, now), port, paused, "create", now);
        Ok(domid)
    }

    /// Builds a domain as `spec` says that goes on where the image of the same VM stopped.
    pub fn restore(&mut self, spec: Spec, image: Image, paused: bool, now: Timestamp) -> Result<u32> {
        if image.format != Image::FORMAT {
            return Err(WorldError::Failed("the file does not hold a saved domain".to_owned()));
        }
        if image.spec.vm != spec.vm {
            return Err(WorldError::Failed(format!("the file holds another VM, {}", image.spec.vm)));
        }
        self.check_room(&spec, false)?;
        let guest = self.behaviour(spec.vm).clone();
        let domid = self.take_domid()?;
        let port = self.vnc_port(spec.display)?;
        let image = Image { spec, ..image };
        self.begin(Domain::resume(domid, image, &guest, now), port, paused, "restore", now);
        Ok(domid)
    }

    /// Builds a domain that stands still until [`World::end_import`].
    pub(super) fn import(&mut self, image: Image, now: Timestamp) -> Result<u32> {
        if image.format != Image::FORMAT {
            return Err(WorldError::Failed("what arrived is no domain".to_owned()));
        }
        self.check_room(&image.spec, true)?;
        let guest = self.behaviour(image.spec.vm).clone();
        let domid = self.take_domid()?;
        // Within one world the sender still holds a fixed port; the arriving one gets it at the end.
        let mut domain = Domain::resume(domid, image, &guest, now);
        domain.become_(Condition::Arriving, now);
        self.begin(domain, None, false, "import", now);
        Ok(domid)
    }

    /// Lets an arrived domain live, unless its VM lives here already.
    pub(super) fn end_import(&mut self, domid: u32, paused: bool, now: Timestamp) -> Result<Answer> {
        let domain = self.domain(domid)?;
        if domain.condition != Condition::Arriving {
            return Err(WorldError::BadState("the domain is not arriving".to_owned()));
        }
        let (vm, display) = (domain.spec.vm, domain.spec.display);
        if self.domains.values().any(|d| d.domid != domid && d.spec.vm == vm) {
            self.audit.refused_doubles += 1;
            return Err(WorldError::Exists);
        }
        let port = self.vnc_port(display)?;
        let domain = self.domain_mut(domid)?;
        domain.vnc_port = port;
        domain.become_(if paused { Condition::Paused } else { Condition::Alive }, now);
        self.note_running(vm);
        self.note_change(domid, "arrived", now);
        Ok(Answer::Done)
    }

    pub(super) fn begin(
        &mut self,
        mut domain: Domain,
        port: Option<u16>,
        paused: bool,
        what: &'static str,
        now: Timestamp,
    ) {
        let (domid, vm) = (domain.domid, domain.spec.vm);
        domain.vnc_port = port;
        if paused {
            domain.become_(Condition::Paused, now);
        }
        self.domains.insert(domid, domain);
        self.by_vm.entry(vm).or_default().push(domid);
        self.audit.note_begun(vm);
        self.note_running(vm);
        self.show_vifs(domid);
        self.note(now, Some(vm), Some(domid), what);
        self.observed.push(Observation::At(domid));
    }

    /// Whether a domain of this VM and name may begin, and has memory. One that is being sent away does not
    /// stand in the way of one that arrives: a VM may be sent to the host it is on.
    pub(super) fn check_room(&mut self, spec: &Spec, arriving: bool) -> Result<()> {
        if !self.host.powered_on {
            return Err(WorldError::Failed("the host is powered off".to_owned()));
        }
        let clash = |d: &Domain| {
            let makes_room = arriving && matches!(d.condition, Condition::Exporting { .. });
            !makes_room && (d.spec.vm == spec.vm || d.spec.name == spec.name)
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

    pub(super) fn take_domid(&mut self) -> Result<u32> {
        for _ in 0..FIRST_RESERVED_DOMID {
            let domid = self.next_domid;
            self.next_domid = if domid + 1 >= FIRST_RESERVED_DOMID { 1 } else { domid + 1 };
            if !self.domains.contains_key(&domid) {
                return Ok(domid);
            }
        }
        Err(WorldError::Failed("all domain numbers are in use".to_owned()))
    }

    pub(super) fn vnc_port(&self, display: Option<Display>) -> Result<Option<u16>> {
        let used: HashSet<u16> = self.domains.values().filter_map(|d| d.vnc_port).collect();
        let (wanted, trouble) = match display {
            None => return Ok(None),
            Some(Display::Number(n)) => {
                let port = FIRST_VNC_PORT.saturating_add(n);
                (Some(port).filter(|port| !used.contains(port)), format!("VNC port {port} is in use"))
            }
            Some(Display::FirstFree) => {
                let free = (FIRST_VNC_PORT..u16::MAX).find(|port| !used.contains(port));
                (free, "no VNC port is free".to_owned())
            }
        };
        wanted.map(Some).ok_or(WorldError::Failed(trouble))
    }

    // Pausing, ending, leaving.

    pub(super) fn pause(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        domain.must_live()?;
        if domain.condition != Condition::Paused {
            domain.become_(Condition::Paused, now);
            self.note_change(domid, "pause", now);
        }
        Ok(Answer::Done)
    }

    pub(super) fn unpause(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
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

    pub(super) fn ask_to_end(&mut self, domid: u32, reason: Reason, now: Timestamp) -> Result<Answer> {
        let domain = self.domain(domid)?;
        domain.must_live()?;
        let vm = domain.spec.vm;
        let guest = self.behaviour(vm).clone();
        self.domain_mut(domid)?.ask_to_end(reason, &guest, now);
        let what = if reason == Reason::Reboot { "ask to reboot" } else { "ask to shut down" };
        self.note(now, Some(vm), Some(domid), what);
        Ok(Answer::Done)
    }

    pub(super) fn sysrq(&mut self, domid: u32, letter: char, now: Timestamp) -> Result<Answer> {
        match letter {
            'b' => self.end(domid, Reason::Reboot, now),
            'o' => self.end(domid, Reason::Poweroff, now),
            'c' => self.end(domid, Reason::Crash, now),
            _ => self.note_change(domid, "sysrq", now),
        }
        Ok(Answer::Done)
    }

    pub(super) fn trigger(&mut self, domid: u32, trigger: Trigger, now: Timestamp) -> Result<Answer> {
        match trigger {
            Trigger::Power => return self.ask_to_end(domid, Reason::Poweroff, now),
            Trigger::Reset => self.end(domid, Reason::Reboot, now),
            Trigger::Other => self.note_change(domid, "trigger", now),
        }
        Ok(Answer::Done)
    }

    pub(super) fn end_guest(&mut self, vm: VmId, reason: Reason, now: Timestamp) -> Result<Answer> {
        let domain = self.find(vm).ok_or(WorldError::NoSuchDomain)?;
        domain.must_live()?;
        self.end(domain.domid, reason, now);
        Ok(Answer::Done)
    }

    pub(super) fn end(&mut self, domid: u32, reason: Reason, now: Timestamp) {
        if let Some(domain) = self.domains.get_mut(&domid) {
            domain.end(reason, now);
            self.note_end(domid, reason, now);
        }
    }

    pub(super) fn destroy(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        self.domain(domid)?;
        self.remove(domid, "destroy", now);
        Ok(Answer::Done)
    }

    pub(super) fn begin_export(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        let domain = self.domain(domid)?;
        domain.must_live()?;
        let takes_ms = self.behaviour(domain.spec.vm).migration_ms;
        self.note_change(domid, "begin export", now);
        Ok(Answer::Millis(takes_ms))
    }

    pub(super) fn hand_over(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        let Condition::Exporting { handed_over, .. } = &mut domain.condition else {
            return Err(WorldError::BadState("the domain is not being sent away".to_owned()));
        };
        *handed_over = true;
        self.note_change(domid, "handed over", now);
        Ok(Answer::Done)
    }

    /// Whoever sent or received this domain has gone away. One that was not handed over goes on, one that was
    /// stands still for ever, and one that has not arrived goes.
    pub(super) fn abandon(&mut self, domid: u32, now: Timestamp) {
        match self.domains.get(&domid).map(|d| d.condition) {
            Some(Condition::Exporting { handed_over: true, .. }) => self.end(domid, Reason::Suspend, now),
            Some(Condition::Exporting { .. }) => drop(self.end_export(domid, false, now)),
            Some(Condition::Arriving) => self.remove(domid, "arrival abandoned", now),
            _ => {}
        }
    }

    pub(super) fn export(&mut self, domid: u32, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        domain.must_live()?;
        let image = domain.image(now);
        domain.become_(
            Condition::Exporting { was_paused: domain.condition == Condition::Paused, handed_over: false },
            now,
        );
        self.note_change(domid, "export", now);
        Ok(Answer::Image(Box::new(image)))
    }

    pub(super) fn end_export(&mut self, domid: u32, gone: bool, now: Timestamp) -> Result<Answer> {
        let domain = self.domain_mut(domid)?;
        let Condition::Exporting { was_paused, .. } = domain.condition else {
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

    pub(super) fn remove(&mut self, domid: u32, what: &'static str, now: Timestamp) {
        let Some(domain) = self.domains.remove(&domid) else { return };
        self.spent.by_one_that_goes(&domain, now);
        let vm = domain.spec.vm;
        if let Some(domids) = self.by_vm.get_mut(&vm) {
            domids.retain(|d| *d != domid);
            if domids.is_empty() {
                self.by_vm.remove(&vm);
            }
        }
        self.show_vifs(domid);
        self.note(now, Some(vm), Some(domid), what);
        self.observed.push(Observation::At(domid));
    }

    pub(super) fn lose_all_domains(&mut self, change: PowerChange, now: Timestamp) {
        let domids: Vec<u32> = self.domains.keys().copied().collect();
        for domid in domids {
            self.remove(domid, "lost with the host", now);
        }
        // A new Xen counts domids from 1 again.
        self.next_domid = 1;
        self.network.reboot();
        if change == PowerChange::Reboot {
            self.audit.host_reboots += 1;
            self.started = now;
            self.spent = super::figures::Spent::default();
        }
        let what = if change == PowerChange::Reboot { "host reboot" } else { "host power-off" };
        self.note(now, None, None, what);
        self.observed.push(Observation::Everything);
    }
}
