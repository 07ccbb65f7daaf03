//! The toolstack's simulated body: translates each call into a request to the simulated world and its answer
//! back. It holds no state but the way to the world and the least deadline of each call (for a migration: of
//! each exchange in it).

mod migrate;
mod translate;

use super::config::{Disk, DiskDevice, DomainConfig, Vif};
use super::{
    AfterSave, CpuIdle, DomId, DomainInfo, GuestFigures, GuestTold, Handover, HypervisorInfo, Inflow,
    Observation, Outflow, Result, Toolstack, ToolstackError, Trigger, Usage, check_guest_value,
    moving_deadline,
};
use crate::model::{Mac, MiB, SafePath, VmId};
use crate::sim::{Answer, Handle, Request, WorldError};
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Clone)]
pub struct SimToolstack {
    handle: Handle,
    timeout: Duration,
}

impl SimToolstack {
    /// Each call ends within `timeout`, or within the time that its domain's memory takes to be moved.
    pub fn new(handle: Handle, timeout: Duration) -> Self {
        Self { handle, timeout }
    }

    async fn ask(&self, request: Request) -> Result<Answer> {
        Ok(self.handle.call(request, self.timeout).await?)
    }

    /// How long a call about this domain may take that moves its memory. Where that cannot be read, the least:
    /// nothing was asked yet, so the call itself must tell what is wrong.
    async fn moving(&self, domid: DomId) -> Duration {
        match self.get(domid).await {
            Ok(Some(domain)) => moving_deadline(self.timeout, MiB(domain.memory.0.div_ceil(1024))),
            _ => self.timeout,
        }
    }

    async fn ask_within(&self, limit: Duration, request: Request) -> Result<Answer> {
        Ok(self.handle.call(request, limit).await?)
    }

    /// For requests whose answer says nothing.
    async fn tell(&self, request: Request) -> Result<()> {
        self.ask(request).await.map(|_| ())
    }

    async fn ask_domid(&self, request: Request) -> Result<DomId> {
        match self.ask(request).await? {
            Answer::DomId(domid) => Ok(DomId(domid)),
            _ => Err(unexpected()),
        }
    }

    async fn ask_domain(&self, request: Request) -> Result<Option<DomainInfo>> {
        match self.ask(request).await? {
            Answer::Domain(view) => Ok(view.map(DomainInfo::from)),
            _ => Err(unexpected()),
        }
    }
}

fn unexpected() -> ToolstackError {
    ToolstackError::Failed("the simulated world gave an answer of another kind".to_owned())
}

impl From<WorldError> for ToolstackError {
    fn from(error: WorldError) -> Self {
        match error {
            WorldError::NoSuchDomain => Self::NoSuchDomain,
            WorldError::Exists => Self::Exists,
            WorldError::OutOfMemory { needed, free } => Self::OutOfMemory { needed, free },
            WorldError::BadState(why) => Self::BadState(why),
            WorldError::Failed(why) => Self::Failed(why),
            WorldError::Refused(why) => Self::Failed(why.to_string()),
            WorldError::Timeout => Self::Timeout,
            WorldError::Unreachable(why) => Self::Unreachable(why),
        }
    }
}

#[async_trait]
impl Toolstack for SimToolstack {
    async fn info(&self) -> Result<HypervisorInfo> {
        match self.ask(Request::Info).await? {
            Answer::Info(view) => Ok(view.into()),
            _ => Err(unexpected()),
        }
    }

    async fn list(&self) -> Result<Vec<DomainInfo>> {
        match self.ask(Request::List).await? {
            Answer::Domains(views) => Ok(views.into_iter().map(DomainInfo::from).collect()),
            _ => Err(unexpected()),
        }
    }

    async fn get(&self, domid: DomId) -> Result<Option<DomainInfo>> {
        self.ask_domain(Request::Get { domid: domid.0 }).await
    }

    async fn find(&self, vm: VmId) -> Result<Option<DomainInfo>> {
        self.ask_domain(Request::Find { vm }).await
    }

    async fn usage(&self) -> Result<Usage> {
        let Answer::Usage(view) = self.ask(Request::Usage).await? else { return Err(unexpected()) };
        Ok(Usage {
            total_memory: view.total_memory,
            free_memory: view.free_memory,
            clock_ns: view.up_ns,
            cpus: (0..).zip(view.idle_ns).map(|(cpu, idle_ns)| CpuIdle { cpu, idle_ns }).collect(),
            domains: view.domains.into_iter().map(|(domid, memory)| (DomId(domid), memory)).collect(),
        })
    }

    async fn guest_figures(&self, domids: &[DomId]) -> Result<Vec<GuestFigures>> {
        let asked = Request::GuestMemory { domids: domids.iter().map(|domid| domid.0).collect() };
        let Answer::GuestMemory(told) = self.ask(asked).await? else { return Err(unexpected()) };
        let mut all: Vec<GuestFigures> = told
            .into_iter()
            .map(|one| {
                let told = GuestTold { target: one.target, max: one.max, total: one.total, free: one.free };
                told.checked(DomId(one.domid))
            })
            .collect();
        all.sort_by_key(|one| one.domid);
        Ok(all)
    }

    async fn create(&self, config: &DomainConfig, paused: bool) -> Result<DomId> {
        let spec = Box::new(translate::spec(config)?);
        self.ask_domid(Request::Create { spec, paused }).await
    }

    async fn destroy(&self, domid: DomId) -> Result<()> {
        self.tell(Request::Destroy { domid: domid.0 }).await
    }

    async fn shutdown(&self, domid: DomId) -> Result<()> {
        self.tell(Request::Shutdown { domid: domid.0 }).await
    }

    async fn reboot(&self, domid: DomId) -> Result<()> {
        self.tell(Request::Reboot { domid: domid.0 }).await
    }

    async fn pause(&self, domid: DomId) -> Result<()> {
        self.tell(Request::Pause { domid: domid.0 }).await
    }

    async fn unpause(&self, domid: DomId) -> Result<()> {
        self.tell(Request::Unpause { domid: domid.0 }).await
    }

    async fn save(&self, domid: DomId, file: &SafePath, after: AfterSave) -> Result<()> {
        let keep_running = after == AfterSave::Continue;
        let limit = self.moving(domid).await;
        let save = Request::Save { domid: domid.0, file: file.clone(), keep_running };
        self.ask_within(limit, save).await.map(|_| ())
    }

    async fn restore(&self, config: &DomainConfig, file: &SafePath, paused: bool) -> Result<DomId> {
        let spec = Box::new(translate::spec(config)?);
        let limit = moving_deadline(self.timeout, config.memory);
        match self.ask_within(limit, Request::Restore { spec, file: file.clone(), paused }).await? {
            Answer::DomId(domid) => Ok(DomId(domid)),
            _ => Err(unexpected()),
        }
    }

    async fn migrate_out(
        &self,
        domid: DomId,
        live: bool,
        out: Box<dyn Outflow>,
        handover: Arc<dyn Handover>,
    ) -> Result<()> {
        migrate::send(self.clone(), domid, live, out, handover).await
    }

    async fn migrate_in(&self, input: Box<dyn Inflow>) -> Result<DomId> {
        migrate::receive(self.clone(), input).await
    }

    async fn config(&self, domid: DomId) -> Result<DomainConfig> {
        match self.ask(Request::Config { domid: domid.0 }).await? {
            Answer::Config(spec) => translate::config(*spec),
            _ => Err(unexpected()),
        }
    }

    async fn attach_disk(&self, domid: DomId, disk: &Disk) -> Result<()> {
        let disk = translate::disk(disk)?;
        self.tell(Request::AttachDisk { domid: domid.0, disk }).await
    }

    async fn detach_disk(&self, domid: DomId, device: &DiskDevice) -> Result<()> {
        self.tell(Request::DetachDisk { domid: domid.0, key: device.as_str().to_owned() }).await
    }

    async fn attach_vif(&self, domid: DomId, vif: &Vif) -> Result<()> {
        let vif = translate::vif(vif)?;
        self.tell(Request::AttachVif { domid: domid.0, vif }).await
    }

    async fn detach_vif(&self, domid: DomId, mac: Mac) -> Result<()> {
        self.tell(Request::DetachVif { domid: domid.0, key: mac.as_str() }).await
    }

    async fn set_vcpus(&self, domid: DomId, online: u32) -> Result<()> {
        self.tell(Request::SetVcpus { domid: domid.0, online }).await
    }

    async fn set_memory(&self, domid: DomId, target: MiB) -> Result<()> {
        self.tell(Request::SetMemory { domid: domid.0, target }).await
    }

    async fn set_scheduling(&self, domid: DomId, weight: u16, cap: u16) -> Result<()> {
        if weight == 0 {
            return Err(ToolstackError::Failed("a weight is 1 to 65535".to_owned()));
        }
        self.tell(Request::SetScheduling { domid: domid.0, weight, cap }).await
    }

    async fn sysrq(&self, domid: DomId, letter: char) -> Result<()> {
        if !letter.is_ascii_alphanumeric() {
            return Err(ToolstackError::Failed("a SysRq is one ASCII letter or digit".to_owned()));
        }
        self.tell(Request::Sysrq { domid: domid.0, letter }).await
    }

    async fn trigger(&self, domid: DomId, trigger: Trigger, _vcpu: Option<u32>) -> Result<()> {
        self.tell(Request::Trigger { domid: domid.0, trigger: trigger.into() }).await
    }

    async fn send_to_guest(&self, domid: DomId, key: &str, value: &str) -> Result<()> {
        check_guest_value(key, value)?;
        let (key, value) = (key.to_owned(), value.to_owned());
        self.tell(Request::SendToGuest { domid: domid.0, key, value }).await
    }

    async fn dump_core(&self, domid: DomId, file: &SafePath, _live: bool, crash: bool) -> Result<()> {
        let limit = self.moving(domid).await;
        let dump = Request::DumpCore { domid: domid.0, file: file.clone(), crash };
        self.ask_within(limit, dump).await.map(|_| ())
    }

    fn observe(&self) -> tokio::sync::mpsc::Receiver<Observation> {
        self.handle.observe()
    }
}
