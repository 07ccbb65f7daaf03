//! The toolstack's body for real Xen, on the `xl` command line (Xen 4.14 to 4.20).
//!
//! Words: a *call* is one run of xl, by argument vector, with a deadline, in a process group of its own (`run`).
//! A *look* is the hypervisor's own list of domains (`hypercall`), or else one `xl list -v`, dressed with what
//! XenStore tells (`look`, `read`). A *half-made* domain is one that a failed, killed or forgotten `xl create` has
//! left: it never ran.
//!
//! How it keeps the contract:
//! - xl is always started without its monitor (`-e`) and each domain with `preserve` for every end
//!   (`config_file`), so an ended domain waits until our runner destroys it.
//! - xl says little by its exit code and nothing at all for some calls (`xl pause` of an ended domain succeeds),
//!   so the domain's state is looked at first, and a failure is explained by another look.
//! - What moves memory to a file or a peer may take as long as it moves; what does not move any more is ended.
//! - A call that changes a domain goes on in a task of its own: a caller that stops waiting ends the call in good
//!   order (the family of xl is killed, a half-made domain destroyed, a save or migration resumed by xl itself).
//! - While a domain is built, its configuration lies in a private file named after its VM. One that is still
//!   there when we start anew tells of a build that nobody finished: see [`Xl::open`].
//!
//! What it does not do: it keeps no record and retries nothing; it holds no lock for its callers (calls for one
//! domain come one at a time), but builds of one VM wait for each other and for the clearing up after them.
//!
//! Known limits of xl: it builds, restores and receives one domain of a host at a time, so one that hangs (libxl
//! bounds its hotplug scripts by 10 to 40 s) or takes long delays other builds, not other calls. CPU time has 0.1 s
//! resolution.

mod build;
pub mod config_file;
mod control;
mod devices;
mod figures;
mod hypercall;
mod json;
mod look;
mod memory;
mod migrate;
pub mod pipe;
mod read;
mod run;
pub mod stream;
#[cfg(test)]
mod tests;

use super::config::{Disk, DiskDevice, DomainConfig, Vif};
use super::xenstore::{Client, DomainWatch, Endpoint, StoreError, StoreRead};
use super::{
    AfterSave, DomId, DomainInfo, GuestFigures, Handover, HypervisorInfo, Inflow, Observation, Outflow,
    Result, Toolstack, ToolstackError, Trigger, Usage,
};
use crate::model::{Mac, MiB, SafePath, VmId};
use async_trait::async_trait;
use run::{Leaves, Runner};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{OnceCell, mpsc};
use tokio_util::sync::CancellationToken;

/// What the body needs to know of its host.
#[derive(Debug, Clone)]
pub struct Options {
    /// The `xl` to run; `None`: the one of the running Xen's release, or the one in PATH.
    pub xl: Option<PathBuf>,
    /// Our own binary, which `xl migrate` starts as its transport.
    pub exe: PathBuf,
    /// A private folder of ours, made if it is not there: configurations of domains in the making, sockets.
    pub folder: PathBuf,
    /// The deadline of a call that moves no memory.
    pub limit: Duration,
}

/// See the module. A clone is the same body.
#[derive(Clone)]
pub struct Xl {
    inner: Arc<Inner>,
}

struct Inner {
    runner: Runner,
    store: Arc<dyn StoreRead>,
    watch: DomainWatch,
    /// `None`: xl is asked.
    hypervisor: Option<look::Asked>,
    /// Whether its figures are those of `xl info` too; asked once.
    figures_agree: OnceCell<bool>,
    exe: PathBuf,
    folder: PathBuf,
    limit: Duration,
    scheduler: OnceCell<control::Scheduler>,
    builds: Builds,
    /// Whose turn it is to build or to receive a domain.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Xl {
    /// Opens the body and clears up what a former one of this folder has left: an `xl create` or `xl restore` that
    /// still runs is killed, and a domain that it built and that never ran is destroyed.
    pub async fn open(options: Options) -> Result<Self> {
        let client = Client::start(Endpoint::of_dom0(), options.limit);
        Self::on_store(options, Arc::new(client.clone()), DomainWatch::start(client)).await
    }

    /// The same, with a XenStore of the caller's.
    async fn on_store(options: Options, store: Arc<dyn StoreRead>, watch: DomainWatch) -> Result<Self> {
        let xl = options.xl.or_else(installed).ok_or_else(|| {
            ToolstackError::Unreachable("xl is not installed (Debian: xen-utils, Fedora: xen-runtime)".into())
        })?;
        build::make_folder(&options.folder)?;
        let runner = Runner::new(xl);
        let body = Self {
            inner: Arc::new(Inner {
                hypervisor: look::hypervisor(&runner, options.limit).await?.map(look::Asked::new),
                runner,
                store,
                watch,
                exe: options.exe,
                folder: options.folder,
                limit: options.limit,
                figures_agree: OnceCell::new(),
                scheduler: OnceCell::new(),
                builds: Builds::default(),
                turn: Arc::default(),
            }),
        };
        body.clear_up().await?;
        Ok(body)
    }

    async fn xl(&self, args: &[&str], leaves: Leaves) -> Result<Vec<u8>> {
        self.inner.runner.xl(args, leaves, self.inner.limit).await
    }

    /// `xl` builds one domain at a time: its lock is held from before the memory is found until the domain is whole, also
    /// that of a restore and of a migration. Who waits here, and not there, is not taken for hanging.
    async fn turn_to_build(&self, cancelled: &CancellationToken) -> Result<tokio::sync::OwnedMutexGuard<()>> {
        tokio::select! {
            turn = Arc::clone(&self.inner.turn).lock_owned() => Ok(turn),
            () = cancelled.cancelled() => Err(ToolstackError::Failed("its caller has gone".to_owned())),
        }
    }

    /// Runs a change in a task of its own. A caller that goes cancels the token.
    async fn change<T, F>(&self, change: impl FnOnce(Self, CancellationToken) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let cancelled = CancellationToken::new();
        let _gone = cancelled.clone().drop_guard();
        let task = tokio::spawn(change(self.clone(), cancelled));
        let failed = |_| Err(ToolstackError::Failed("the call of the toolstack broke off".to_owned()));
        task.await.unwrap_or_else(failed)
    }
}

/// Where the running Xen's release has its own xl (Debian's /usr/sbin/xl is a shell script that looks for it).
fn installed() -> Option<PathBuf> {
    let part = |name: &str| std::fs::read_to_string(format!("/sys/hypervisor/version/{name}"));
    if let (Ok(major), Ok(minor)) = (part("major"), part("minor")) {
        let path = PathBuf::from(format!("/usr/lib/xen-{}.{}/bin/xl", major.trim(), minor.trim()));
        if path.is_file() {
            return Some(path);
        }
    }
    run::find("xl")
}

/// One build of a VM at a time.
#[derive(Default)]
struct Builds(Mutex<HashMap<VmId, Weak<tokio::sync::Mutex<()>>>>);

impl Builds {
    async fn lock(&self, vm: VmId) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, lock| lock.strong_count() > 0);
            let known = all.get(&vm).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let new = Arc::default();
                all.insert(vm, Arc::downgrade(&new));
                new
            })
        };
        lock.lock_owned().await
    }
}

#[async_trait]
impl Toolstack for Xl {
    async fn info(&self) -> Result<HypervisorInfo> {
        self.hypervisor().await
    }

    async fn list(&self) -> Result<Vec<DomainInfo>> {
        let mut all = Vec::new();
        for line in self.lines().await? {
            all.push(self.dressed(line).await?);
        }
        Ok(all)
    }

    async fn get(&self, domid: DomId) -> Result<Option<DomainInfo>> {
        match self.line(domid).await? {
            Some(line) => Ok(Some(self.dressed(line).await?)),
            None => Ok(None),
        }
    }

    async fn find(&self, vm: VmId) -> Result<Option<DomainInfo>> {
        let of_vm = self.lines().await?.into_iter().filter(|line| line.vm == Some(vm));
        // Should there be two for once, the one that is not on its way out.
        match of_vm.min_by_key(|line| line.state == super::RunState::Dying) {
            Some(line) => Ok(Some(self.dressed(line).await?)),
            None => Ok(None),
        }
    }

    async fn usage(&self) -> Result<Usage> {
        self.usage_now().await
    }

    async fn guest_figures(&self, domids: &[DomId]) -> Result<Vec<GuestFigures>> {
        self.figures_of(domids).await
    }

    async fn create(&self, config: &DomainConfig, paused: bool) -> Result<DomId> {
        let config = config.clone();
        self.change(move |xl, cancelled| async move { xl.build(&config, None, paused, &cancelled).await })
            .await
    }

    async fn destroy(&self, domid: DomId) -> Result<()> {
        self.change(move |xl, _| async move { xl.end(domid).await }).await
    }

    async fn shutdown(&self, domid: DomId) -> Result<()> {
        self.ask_guest(domid, "shutdown").await
    }

    async fn reboot(&self, domid: DomId) -> Result<()> {
        self.ask_guest(domid, "reboot").await
    }

    async fn pause(&self, domid: DomId) -> Result<()> {
        self.change(move |xl, _| async move { xl.set_paused(domid, true).await }).await
    }

    async fn unpause(&self, domid: DomId) -> Result<()> {
        self.change(move |xl, _| async move { xl.set_paused(domid, false).await }).await
    }

    async fn save(&self, domid: DomId, file: &SafePath, after: AfterSave) -> Result<()> {
        let file = file.clone();
        self.change(move |xl, cancelled| async move { xl.save_to(domid, &file, after, &cancelled).await })
            .await
    }

    async fn restore(&self, config: &DomainConfig, file: &SafePath, paused: bool) -> Result<DomId> {
        let (config, file) = (config.clone(), file.clone());
        self.change(
            move |xl, cancelled| async move { xl.build(&config, Some(&file), paused, &cancelled).await },
        )
        .await
    }

    async fn migrate_out(
        &self,
        domid: DomId,
        live: bool,
        out: Box<dyn Outflow>,
        handover: Arc<dyn Handover>,
    ) -> Result<()> {
        self.change(move |xl, cancelled| async move { xl.send(domid, live, out, handover, &cancelled).await })
            .await
    }

    async fn migrate_in(&self, input: Box<dyn Inflow>) -> Result<DomId> {
        self.change(move |xl, cancelled| async move { xl.receive(input, &cancelled).await }).await
    }

    async fn config(&self, domid: DomId) -> Result<DomainConfig> {
        self.told_config(domid).await
    }

    async fn attach_disk(&self, domid: DomId, disk: &Disk) -> Result<()> {
        let disk = disk.clone();
        self.change(move |xl, _| async move { xl.plug_disk(domid, &disk).await }).await
    }

    async fn detach_disk(&self, domid: DomId, device: &DiskDevice) -> Result<()> {
        let device = device.clone();
        self.change(move |xl, _| async move { xl.unplug_disk(domid, &device).await }).await
    }

    async fn attach_vif(&self, domid: DomId, vif: &Vif) -> Result<()> {
        let vif = vif.clone();
        self.change(move |xl, _| async move { xl.plug_vif(domid, &vif).await }).await
    }

    async fn detach_vif(&self, domid: DomId, mac: Mac) -> Result<()> {
        self.change(move |xl, _| async move { xl.unplug_vif(domid, mac).await }).await
    }

    async fn set_vcpus(&self, domid: DomId, online: u32) -> Result<()> {
        self.online_vcpus(domid, online).await
    }

    async fn set_memory(&self, domid: DomId, target: MiB) -> Result<()> {
        self.balloon(domid, target).await
    }

    async fn set_scheduling(&self, domid: DomId, weight: u16, cap: u16) -> Result<()> {
        self.schedule(domid, weight, cap).await
    }

    async fn sysrq(&self, domid: DomId, letter: char) -> Result<()> {
        self.send_sysrq(domid, letter).await
    }

    async fn trigger(&self, domid: DomId, trigger: Trigger, vcpu: Option<u32>) -> Result<()> {
        self.send_trigger(domid, trigger, vcpu).await
    }

    async fn send_to_guest(&self, domid: DomId, key: &str, value: &str) -> Result<()> {
        self.send_value(domid, key, value).await
    }

    async fn dump_core(&self, domid: DomId, file: &SafePath, live: bool, crash: bool) -> Result<()> {
        let file = file.clone();
        self.change(move |xl, cancelled| async move { xl.dump(domid, &file, live, crash, &cancelled).await })
            .await
    }

    fn observe(&self) -> mpsc::Receiver<Observation> {
        self.inner.watch.observe()
    }
}

impl From<StoreError> for ToolstackError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Timeout => Self::Timeout,
            StoreError::Unreachable(_) | StoreError::Lost => Self::Unreachable(error.to_string()),
            other => Self::Failed(other.to_string()),
        }
    }
}
