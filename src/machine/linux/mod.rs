//! The real machine: facts from /proc, /sys and DMI; the clock by the kernel; NTP by chrony or timesyncd.
//!
//! Everything lies below one *root*: `/` in life, a folder of made-up files in tests. Files, folders and the
//! programs we start are all looked up below it, and what cannot be looked up there (the kernel's clock, its
//! log, a reboot by the kernel) is refused unless the root is `/`. So a test can never touch the machine it
//! runs on.
//!
//! Every file read is bounded and its text cleaned of control characters; every program runs from an absolute
//! path with an argument vector, a clean environment and a deadline; what blocks runs on the blocking pool,
//! at most [`BLOCKING_AT_ONCE`] at a time and each waited for at most [`DEADLINE`], so that a dead disk costs
//! a few threads and never an answer.
//!
//! What this room does not do: it decides nothing, keeps no record, and writes no file but those named in
//! `clock` and `ntp`.

mod clock;
mod command;
mod disks;
mod facts;
mod figures;
mod file;
mod filesystem;
mod log;
mod ntp;
mod ntp_service;
mod scsi;
#[cfg(test)]
mod tests;
mod xendomains;

use super::{DiskTraffic, Facts, Filesystem, HostFigures, Machine, MachineError, Ntp, Result, TimeZone};
use crate::model::{Bytes, SafePath, Timestamp};
use async_trait::async_trait;
use command::Programs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// How long anything here may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// Threads that may at worst be stuck in reads of a dead device.
const BLOCKING_AT_ONCE: usize = 4;

/// The machine below a root.
#[derive(Debug, Clone)]
pub struct LinuxMachine {
    root: Arc<Path>,
    blocking: Arc<Semaphore>,
    /// One reading of figures at a time: one that hangs must not take the threads of all else.
    sampling: Arc<Semaphore>,
}

impl LinuxMachine {
    pub fn new(root: PathBuf) -> Self {
        Self {
            root: root.into(),
            blocking: Arc::new(Semaphore::new(BLOCKING_AT_ONCE)),
            sampling: Arc::new(Semaphore::new(1)),
        }
    }

    /// Whether this is the machine itself and not a folder made for a test.
    fn is_life(&self) -> bool {
        *self.root == *Path::new("/")
    }

    fn programs(&self) -> Programs<'_> {
        Programs::new(&self.root)
    }

    /// Runs `work` on the blocking pool with the root. The permit goes with the work, not with the waiter, so
    /// that work that never ends counts for as long as it holds its thread.
    async fn blocking<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Path) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.blocking_by(self.blocking.clone(), what, work).await
    }

    async fn blocking_by<T: Send + 'static>(
        &self,
        permits: Arc<Semaphore>,
        what: &'static str,
        work: impl FnOnce(&Path) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let root = self.root.clone();
        let run = async move {
            let permit =
                permits.acquire_owned().await.map_err(|_| MachineError::Failed("stopping".to_owned()))?;
            let task = tokio::task::spawn_blocking(move || {
                let result = work(&root);
                drop(permit);
                result
            });
            task.await.map_err(|error| MachineError::Failed(format!("{what}: {error}")))?
        };
        tokio::time::timeout(DEADLINE, run).await.map_err(|_| MachineError::Timeout(what.to_owned()))?
    }

    /// systemd is asked where it runs; else the machine's own `reboot`, which tells init; and the kernel
    /// itself only where there is neither.
    async fn end(&self, verb: &'static str, mode: nix::sys::reboot::RebootMode) -> Result<()> {
        let programs = self.programs();
        if ntp_service::Init::detect(&self.root) == ntp_service::Init::Systemd {
            return programs.run("systemctl", &["--no-block", verb]).await.map(drop);
        }
        if programs.find(verb).is_some() {
            return programs.run(verb, &[]).await.map(drop);
        }
        if !self.is_life() {
            return Err(MachineError::Unavailable(format!("no way to {verb} a folder")));
        }
        tracing::warn!(verb, "neither systemd nor a {verb} program: the kernel is asked directly");
        let thread = std::thread::Builder::new().name("end".to_owned()).spawn(move || {
            nix::unistd::sync();
            let Err(error) = nix::sys::reboot::reboot(mode);
            tracing::error!(%error, verb, "the kernel refused");
        });
        thread.map(drop).map_err(|error| MachineError::Failed(format!("{verb}: {error}")))
    }
}

#[async_trait]
impl Machine for LinuxMachine {
    async fn facts(&self) -> Result<Facts> {
        let life = self.is_life();
        self.blocking("facts", move |root| facts::read(root, life)).await
    }

    async fn now(&self) -> Result<Timestamp> {
        Ok(Timestamp::now())
    }

    async fn set_clock(&self, time: Timestamp) -> Result<()> {
        if !self.is_life() {
            return Err(MachineError::Unavailable("a folder has no clock".to_owned()));
        }
        clock::set(time)?;
        clock::keep_in_hardware(&self.programs(), &[]).await;
        Ok(())
    }

    async fn timezone(&self) -> Result<TimeZone> {
        self.blocking("time zone", clock::timezone).await
    }

    async fn set_timezone(&self, zone: &TimeZone) -> Result<()> {
        let wanted = zone.clone();
        let changed = self.blocking("time zone", move |root| clock::set_timezone(root, &wanted)).await?;
        if changed.rtc {
            let base = if zone.rtc_utc { "--utc" } else { "--localtime" };
            clock::keep_in_hardware(&self.programs(), &[base]).await;
        }
        Ok(())
    }

    async fn ntp(&self) -> Result<Ntp> {
        let (service, mut ntp) = self.blocking("NTP", ntp::read).await?;
        ntp.running = service.is_running(&self.programs()).await?;
        Ok(ntp)
    }

    async fn set_ntp(&self, servers: &[String], local_time_source: bool, allow_query: bool) -> Result<()> {
        let wanted = ntp::Wanted::parse(servers, local_time_source, allow_query)?;
        let service = self.blocking("NTP", move |root| ntp::write(root, &wanted)).await?;
        let programs = self.programs();
        if service.is_running(&programs).await? {
            service.restart(&programs).await?;
        }
        Ok(())
    }

    async fn enable_ntp(&self, enabled: bool) -> Result<()> {
        let service = self.blocking("NTP", ntp_service::Service::detect).await?;
        service.enable(&self.programs(), enabled).await
    }

    async fn log(&self, name: &str, max: Bytes) -> Result<String> {
        log::read(self, name, max).await
    }

    async fn filesystems(&self) -> Result<Vec<Filesystem>> {
        self.blocking("file systems", filesystem::list).await
    }

    async fn xendomains(&self) -> Result<Option<String>> {
        let find =
            |root: &Path| Ok(xendomains::enabled(root).map(|link| link.to_string_lossy().into_owned()));
        self.blocking("xendomains", find).await
    }

    async fn disk_traffic(&self, domid: u32) -> Result<DiskTraffic> {
        self.blocking("disk traffic", move |root| disks::traffic(root, domid)).await
    }

    async fn figures(&self) -> Result<HostFigures> {
        self.blocking_by(self.sampling.clone(), "figures", |root| Ok(figures::read(root))).await
    }

    /// Asked by a child of its own: a look at a dead file server may hang for ever.
    async fn has_disk(&self, path: &SafePath) -> Result<bool> {
        let whole = self.root.join(path.as_str().trim_start_matches('/')).to_string_lossy().into_owned();
        let looked = self.programs().ask("stat", &["-L", "--format=%F", "--", &whole], 256).await?;
        let kind = String::from_utf8_lossy(&looked.output).into_owned();
        Ok(looked.success && (kind.contains("regular") || kind.contains("block")))
    }

    async fn reboot(&self) -> Result<()> {
        self.end("reboot", nix::sys::reboot::RebootMode::RB_AUTOBOOT).await
    }

    async fn power_off(&self) -> Result<()> {
        self.end("poweroff", nix::sys::reboot::RebootMode::RB_POWER_OFF).await
    }
}
