//! A toolstack that dies with the daemon: what a dead daemon still wanted to ask is never asked.

use dom0d::model::{Mac, MiB, SafePath, VmId};
use dom0d::xen::config::{Disk, DiskDevice, DomainConfig, Vif};
use dom0d::xen::{
    AfterSave, DomId, DomainInfo, GuestFigures, Handover, HypervisorInfo, Inflow, Observation, Outflow,
    Result, Toolstack, Trigger, Usage,
};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub struct Mortal {
    pub inner: Arc<dyn Toolstack>,
    pub dead: CancellationToken,
}

macro_rules! while_alive {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)*) -> $answer:ty;)*) => {
        #[async_trait::async_trait]
        impl Toolstack for Mortal {
            $(async fn $name(&self $(, $arg: $type)*) -> Result<$answer> {
                if self.dead.is_cancelled() {
                    std::future::pending::<()>().await;
                }
                self.inner.$name($($arg),*).await
            })*

            fn observe(&self) -> tokio::sync::mpsc::Receiver<Observation> {
                self.inner.observe()
            }
        }
    };
}

while_alive! {
    fn info(&self) -> HypervisorInfo;
    fn list(&self) -> Vec<DomainInfo>;
    fn get(&self, domid: DomId) -> Option<DomainInfo>;
    fn find(&self, vm: VmId) -> Option<DomainInfo>;
    fn usage(&self) -> Usage;
    fn guest_figures(&self, domids: &[DomId]) -> Vec<GuestFigures>;
    fn create(&self, config: &DomainConfig, paused: bool) -> DomId;
    fn destroy(&self, domid: DomId) -> ();
    fn shutdown(&self, domid: DomId) -> ();
    fn reboot(&self, domid: DomId) -> ();
    fn pause(&self, domid: DomId) -> ();
    fn unpause(&self, domid: DomId) -> ();
    fn save(&self, domid: DomId, file: &SafePath, after: AfterSave) -> ();
    fn restore(&self, config: &DomainConfig, file: &SafePath, paused: bool) -> DomId;
    fn migrate_out(&self, domid: DomId, live: bool, out: Box<dyn Outflow>, handover: Arc<dyn Handover>) -> ();
    fn migrate_in(&self, input: Box<dyn Inflow>) -> DomId;
    fn config(&self, domid: DomId) -> DomainConfig;
    fn attach_disk(&self, domid: DomId, disk: &Disk) -> ();
    fn detach_disk(&self, domid: DomId, device: &DiskDevice) -> ();
    fn attach_vif(&self, domid: DomId, vif: &Vif) -> ();
    fn detach_vif(&self, domid: DomId, mac: Mac) -> ();
    fn set_vcpus(&self, domid: DomId, online: u32) -> ();
    fn set_memory(&self, domid: DomId, target: MiB) -> ();
    fn set_scheduling(&self, domid: DomId, weight: u16, cap: u16) -> ();
    fn sysrq(&self, domid: DomId, letter: char) -> ();
    fn trigger(&self, domid: DomId, trigger: Trigger, vcpu: Option<u32>) -> ();
    fn send_to_guest(&self, domid: DomId, key: &str, value: &str) -> ();
    fn dump_core(&self, domid: DomId, file: &SafePath, live: bool, crash: bool) -> ();
}
