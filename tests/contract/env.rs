//! Where the rules of a contract are held: a toolstack, what its surroundings can do, and a small guest.

use dom0d::model::{Mac, MiB, SafePath, Text, VmId, VmName};
use dom0d::xen::config::{
    Boot, Disk, DiskBacking, DiskDevice, DiskMode, DomainConfig, GuestType, OnEnd, TscMode, Vif, VifModel,
};
use dom0d::xen::{DomId, DomainInfo, RunState, ShutdownReason, Toolstack};
use std::sync::Arc;
use std::time::Duration;

/// Where a rule is held.
pub struct Env {
    pub toolstack: Arc<dyn Toolstack>,
    /// Another host to send domains to.
    pub peer: Option<Arc<dyn Toolstack>>,
    /// What the environment can make guests do.
    pub guests: Option<Box<dyn Guests>>,
    /// For saved domains and core dumps; exists, and is the toolstack's to write to.
    pub folder: SafePath,
    /// A new VM with a small guest that heeds a shutdown.
    pub config: fn() -> DomainConfig,
    /// A disk of this name for this VM, that can be plugged.
    pub disk: fn(VmId, &str) -> Disk,
    /// Whether a guest has come up so far that it does what it is asked, and can be saved.
    pub is_up: fn(DomId) -> bool,
    /// How long a guest may take to do what it was asked.
    pub patience: Duration,
    /// By how much the free memory of a host may differ from what it was before, once all is freed.
    pub slack: MiB,
    /// Whatever must live as long.
    #[allow(dead_code, reason = "only its drop matters")]
    pub kept: Box<dyn std::any::Any + Send + Sync>,
}

/// What only some environments can do to a guest.
#[async_trait::async_trait]
pub trait Guests: Send + Sync {
    /// From now on. Called before the VM's domain is made.
    async fn ignore_shutdown(&self, vm: VmId);
    async fn crash(&self, vm: VmId);
}

/// A small guest that boots from a disk nobody looks at, each time a new VM.
pub fn small_guest() -> DomainConfig {
    let vm = VmId::random();
    guest(vm, unseen_disk(vm, "xvda"))
}

/// A small PV guest of this VM, with this disk.
pub fn guest(vm: VmId, disk: Disk) -> DomainConfig {
    let mac = mac_of(vm, 0);
    DomainConfig {
        vm,
        name: VmName::parse(&format!("contract-{vm}")).unwrap(),
        guest: GuestType::Pv,
        boot: Boot::Pygrub { args: dom0d::xen::config::PygrubArgs::default(), extra: Text::default() },
        memory: MiB(64),
        max_memory: MiB(128),
        vcpus: 1,
        max_vcpus: 2,
        cpu_weight: 256,
        cpu_cap: 0,
        cpus: vec![],
        disks: vec![disk],
        vifs: vec![vif(mac)],
        vnc: None,
        on_poweroff: OnEnd::Destroy,
        on_reboot: OnEnd::Restart,
        on_crash: OnEnd::Restart,
        tsc_mode: TscMode::Default,
        acpi: true,
        apic: true,
        pae: true,
        usb_tablet: false,
        serial_pty: false,
        localtime: false,
    }
}

pub fn mac_of(vm: VmId, n: u8) -> Mac {
    let [a, b, c, ..] = *vm.as_bytes();
    Mac::from_bytes([0x02, n, 0x9a, a, b, c])
}

/// A disk that only a simulated world takes for one.
pub fn unseen_disk(_vm: VmId, device: &str) -> Disk {
    Disk {
        backing: DiskBacking::File,
        path: Some(SafePath::parse(&format!("/OVS/Repositories/r/VirtualDisks/{device}.img")).unwrap()),
        device: DiskDevice::parse(device).unwrap(),
        cdrom: false,
        mode: DiskMode::ReadWrite,
    }
}

pub fn vif(mac: Mac) -> Vif {
    Vif { mac, bridge: "xenbr0".parse().unwrap(), ifname: None, model: VifModel::Netfront }
}

impl Env {
    pub fn new_vm(&self) -> DomainConfig {
        (self.config)()
    }

    pub fn file(&self, name: &str) -> SafePath {
        SafePath::parse(&format!("{}/{name}", self.folder)).unwrap()
    }

    pub async fn started(&self) -> (DomainConfig, DomId) {
        let config = self.new_vm();
        let domid = self.toolstack.create(&config, false).await.unwrap();
        let up = async {
            while !(self.is_up)(domid) {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(self.patience, up).await.expect("a guest comes up");
        (config, domid)
    }

    pub async fn info(&self, domid: DomId) -> DomainInfo {
        self.toolstack.get(domid).await.unwrap().expect("the domain exists")
    }

    pub async fn free(&self) -> MiB {
        self.toolstack.info().await.unwrap().free_memory
    }

    /// Waits until so much memory is free: it is freed, and a guest balloons, in its own time.
    pub async fn free_becomes(&self, expected: MiB) {
        let mut free = self.free().await;
        let wait = async {
            while free.0.abs_diff(expected.0) > self.slack.0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                free = self.free().await;
            }
        };
        let waited = tokio::time::timeout(self.patience, wait).await;
        assert!(waited.is_ok(), "{free} free, not {expected}");
    }

    /// Waits until the domain has ended, and says why it did.
    pub async fn end_of(&self, domid: DomId) -> ShutdownReason {
        let wait = async {
            loop {
                if let RunState::Shutdown(reason) = self.info(domid).await.state {
                    return reason;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(self.patience, wait).await.expect("the guest ends in time")
    }
}
