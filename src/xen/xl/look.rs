//! Looks: which domains there are and what they do. The hypervisor's list, or one `xl list -v`, dressed with what
//! XenStore tells: memory and virtual CPUs as they were set (the guest comes after), the VNC port, the start.

use super::hypercall::Hypervisor;
use super::read::{self, Info, Line};
use super::run::{Leaves, Runner, failed};
use super::{Xl, json};
use crate::model::{KiB, Timestamp};
use crate::xen::config::DomainConfig;
use crate::xen::{DomId, DomainInfo, HypervisorInfo, Result, RunState, ShutdownReason, ToolstackError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// How long a domain that stands still for a save may take to go on.
const TO_GO_ON: Duration = Duration::from_secs(15);

/// The hypervisor, which answers one call at a time: who asks while a call hangs waits here, and takes no thread to wait in.
pub(super) struct Asked<H = Hypervisor> {
    hypervisor: Arc<H>,
    turn: Arc<Semaphore>,
}

impl<H: Send + Sync + 'static> Asked<H> {
    pub fn new(hypervisor: Arc<H>) -> Self {
        Self { hypervisor, turn: Arc::new(Semaphore::new(1)) }
    }

    /// `None`: its turn did not come in time, and it was not asked.
    async fn ask<T: Send + 'static>(
        &self,
        limit: Duration,
        ask: impl FnOnce(&H) -> std::io::Result<T> + Send + 'static,
    ) -> Option<std::io::Result<T>> {
        let turn = Arc::clone(&self.turn).acquire_owned();
        let turn = tokio::time::timeout(limit, turn).await.ok()?.ok()?;
        let hypervisor = Arc::clone(&self.hypervisor);
        // Short, but a call into the kernel all the same. The turn goes with the call, not with who waits for it.
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            ask(&hypervisor)
        });
        done.await.ok()
    }
}

/// The way to the hypervisor without xl, if it tells the same as xl.
pub(super) async fn hypervisor(runner: &Runner, limit: Duration) -> Result<Option<Arc<Hypervisor>>> {
    let opened = tokio::task::spawn_blocking(Hypervisor::open).await;
    let hypervisor = match opened {
        Ok(Ok(hypervisor)) => hypervisor,
        Ok(Err(error)) => {
            tracing::info!(%error, "domains are looked at by xl: this Xen's own list is not known to us");
            return Ok(None);
        }
        Err(_) => return Ok(None),
    };
    let lasting = |lines: &[Line]| {
        let told = lines.iter().map(|line| (line.domid, line.vm, line.memory.0 / 1024, line.online_vcpus));
        told.collect::<Vec<_>>()
    };
    // Between the two looks a domain may change; hardly twice.
    for _ in 0..3 {
        let by_xl = read::domains(&runner.xl(&["list", "-v"], Leaves::Nothing, limit).await?)?;
        if hypervisor.domains().is_ok_and(|by_call| lasting(&by_call) == lasting(&by_xl)) {
            return Ok(Some(Arc::new(hypervisor)));
        }
    }
    tracing::warn!("the hypervisor's list of domains does not agree with xl's; xl is asked");
    Ok(None)
}

impl Xl {
    pub(super) async fn lines(&self) -> Result<Vec<Line>> {
        let Some(asked) = self.ask_hypervisor(|hypervisor| hypervisor.domains()).await else {
            return read::domains(&self.xl(&["list", "-v"], Leaves::Nothing).await?);
        };
        let mut lines = asked;
        for line in &mut lines {
            line.name = self.name_of(line.domid).await?;
        }
        Ok(lines)
    }

    pub(super) async fn line(&self, domid: DomId) -> Result<Option<Line>> {
        if let Some(told) = self.ask_hypervisor(move |hypervisor| hypervisor.domain(domid)).await {
            let Some(line) = told else { return Ok(None) };
            return Ok(Some(Line { name: self.name_of(domid).await?, ..line }));
        }
        let args = ["list", "-v", &domid.0.to_string()];
        let ended = self.inner.runner.ask(&args, Leaves::Nothing, self.inner.limit).await?;
        if !ended.success {
            let words = &ended.complaint;
            let none = words.contains("does not exist") || words.contains("invalid domain identifier");
            return if none { Ok(None) } else { Err(failed(&args, words)) };
        }
        Ok(read::domains(&ended.output)?.into_iter().find(|line| line.domid == domid))
    }

    /// `None`: it cannot be asked, and xl must.
    pub(super) async fn ask_hypervisor<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Hypervisor) -> std::io::Result<T> + Send + 'static,
    ) -> Option<T> {
        let Some(done) = self.inner.hypervisor.as_ref()?.ask(self.inner.limit, ask).await else {
            tracing::warn!("the hypervisor has not answered the call before; xl is asked");
            return None;
        };
        match done {
            Ok(told) => Some(told),
            Err(error) => {
                tracing::warn!(%error, "the hypervisor does not answer us; xl is asked");
                None
            }
        }
    }

    async fn name_of(&self, domid: DomId) -> Result<String> {
        Ok(self.node(domid, "name").await?.unwrap_or_default())
    }

    /// A domain that is there, ended or not.
    pub(super) async fn there(&self, domid: DomId) -> Result<Line> {
        self.line(domid).await?.ok_or(ToolstackError::NoSuchDomain)
    }

    /// A domain that has not ended, and is not dom0. One that stands still for a save or a migration which broke off is
    /// waited for a while: an xl of our former life lets it go on as soon as it meets its broken pipe.
    pub(super) async fn living(&self, domid: DomId) -> Result<Line> {
        let patience = tokio::time::Instant::now() + TO_GO_ON.min(self.inner.limit);
        let mut line = self.there(domid).await?;
        while line.state == RunState::Shutdown(ShutdownReason::Suspend)
            && tokio::time::Instant::now() < patience
        {
            tokio::time::sleep(Duration::from_millis(200)).await;
            line = self.there(domid).await?;
        }
        let bad = |why: &str| Err(ToolstackError::BadState(why.to_owned()));
        match line.state {
            _ if domid == DomId(0) => bad("this is dom0"),
            RunState::Shutdown(_) => bad("the domain has ended"),
            RunState::Dying => bad("the domain is being taken apart"),
            RunState::Running | RunState::Blocked | RunState::Paused => Ok(line),
        }
    }

    /// Why a call failed: if its domain has gone or ended meanwhile, that; else what xl said.
    pub(super) async fn explained<T>(&self, domid: DomId, result: Result<T>) -> Result<T> {
        match result {
            Err(error @ ToolstackError::Failed(_)) => match self.living(domid).await {
                Err(better @ (ToolstackError::NoSuchDomain | ToolstackError::BadState(_))) => Err(better),
                _ => Err(error),
            },
            other => other,
        }
    }

    pub(super) async fn hypervisor(&self) -> Result<HypervisorInfo> {
        self.xl_info().await?.hypervisor()
    }

    pub(super) async fn xl_info(&self) -> Result<Info> {
        Ok(Info::parse(&self.xl(&["info"], Leaves::Nothing).await?))
    }

    pub(super) async fn told_config(&self, domid: DomId) -> Result<DomainConfig> {
        let args = ["list", "--long", &domid.0.to_string()];
        let ended = self.inner.runner.ask(&args, Leaves::Nothing, self.inner.limit).await?;
        if !ended.success {
            self.there(domid).await?;
            return Err(failed(&args, &ended.complaint));
        }
        let mut config = json::domain(&ended.output, domid)?;
        // What libxl keeps of these is the build's; XenStore has what was set since.
        let info = self.dressed(self.there(domid).await?).await?;
        config.memory = info.memory.into();
        config.vcpus = info.online_vcpus.clamp(1, config.max_vcpus);
        Ok(config)
    }

    /// A node of the domain's own folder.
    pub(super) async fn node(&self, domid: DomId, path: &str) -> Result<Option<String>> {
        let value = self.inner.store.read(&format!("/local/domain/{}/{path}", domid.0)).await?;
        Ok(value.and_then(|bytes| String::from_utf8(bytes).ok()))
    }

    pub(super) async fn node_kib(&self, domid: DomId, path: &str) -> Result<Option<u64>> {
        Ok(self.node(domid, path).await?.and_then(|text| text.parse().ok()))
    }

    /// `pv`, `pvh` or `hvm`, as libxl built it.
    pub(super) async fn kind(&self, domid: DomId) -> Result<Option<Vec<u8>>> {
        Ok(self.inner.store.read(&format!("/libxl/{}/type", domid.0)).await?)
    }

    /// How many virtual CPUs the domain has, and how many of them it is to use.
    pub(super) async fn vcpus(&self, domid: DomId) -> Result<Option<(u32, u32)>> {
        let names = self.inner.store.list(&format!("/local/domain/{}/cpu", domid.0)).await?;
        let (mut all, mut online) = (0, 0);
        for name in names.iter().filter(|name| name.bytes().all(|c| c.is_ascii_digit())) {
            all += 1;
            let available = self.node(domid, &format!("cpu/{name}/availability")).await?;
            online += u32::from(available.as_deref() == Some("online"));
        }
        Ok((all > 0).then_some((all, online)))
    }

    /// The most memory a domain may balloon to.
    pub(super) async fn max_memory(&self, domid: DomId) -> Result<Option<KiB>> {
        Ok(self.node_kib(domid, "memory/static-max").await?.map(KiB))
    }

    pub(super) async fn dressed(&self, line: Line) -> Result<DomainInfo> {
        let domid = line.domid;
        let target = self.node_kib(domid, "memory/target").await?;
        let video = self.node_kib(domid, "memory/videoram").await?.unwrap_or(0);
        let memory = match target {
            // dom0's is told a page short of what it has.
            Some(target) if domid != DomId(0) => KiB(target.saturating_add(video)),
            _ => line.memory,
        };
        let max_memory = self.max_memory(domid).await?.unwrap_or(memory);
        let kind = self.kind(domid).await?;
        let (vcpus, online) = match self.vcpus(domid).await? {
            // A device model plugs virtual CPUs without a word in XenStore.
            Some((all, _)) if kind.as_deref() == Some(b"hvm") => (all, line.online_vcpus),
            Some(told) => told,
            None => (line.online_vcpus, line.online_vcpus),
        };
        Ok(DomainInfo {
            domid,
            vm: if domid == DomId(0) { None } else { line.vm },
            name: line.name,
            state: line.state,
            memory,
            max_memory,
            vcpus,
            online_vcpus: online,
            cpu_time_ns: line.cpu_time_ns,
            started: self.start_of(domid).await?,
            vnc_port: self.node(domid, "console/vnc-port").await?.and_then(|port| port.parse().ok()),
        })
    }

    /// libxl notes the start as seconds with two decimals.
    async fn start_of(&self, domid: DomId) -> Result<Timestamp> {
        let Some(vm) = self.node(domid, "vm").await? else { return Ok(Timestamp::default()) };
        // A path of XenStore, not one a guest may have bent.
        let plain =
            vm.starts_with("/vm/") && vm.bytes().all(|c| c.is_ascii_alphanumeric() || b"/-_".contains(&c));
        if !plain {
            return Ok(Timestamp::default());
        }
        let told = self.inner.store.read(&format!("{vm}/start_time")).await?.unwrap_or_default();
        let text = String::from_utf8_lossy(&told);
        let (seconds, hundredths) = text.split_once('.').unwrap_or((&text, "0"));
        let number = |text: &str| text.parse::<u64>().ok().filter(|n| *n < u64::MAX / 1000);
        let milliseconds = number(seconds).map(|s| s * 1000 + number(hundredths).unwrap_or(0).min(99) * 10);
        Ok(Timestamp(milliseconds.unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_hangs_takes_one_thread_and_leaves_the_others_to_all_else() {
        let two = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
        two.unwrap().block_on(async {
            let (release, gate) = std::sync::mpsc::channel::<()>();
            let asked = Asked::new(Arc::new(std::sync::Mutex::new(gate)));
            let limit = Duration::from_secs(60);
            for _ in 0..2 {
                let hanging = asked.ask(limit, |gate| {
                    let _ = gate.lock().map(|gate| gate.recv());
                    Ok(())
                });
                // Who asked has gone; its call hangs on.
                assert!(tokio::time::timeout(Duration::from_millis(20), hanging).await.is_err());
            }
            assert!(asked.ask(Duration::from_millis(20), |_| Ok(())).await.is_none(), "it is not its turn");
            let other = tokio::task::spawn_blocking(|| ());
            let free = tokio::time::timeout(Duration::from_secs(10), other).await.is_ok();
            drop(release);
            assert!(free, "no thread is left");
            assert!(matches!(asked.ask(limit, |_| Ok(7)).await, Some(Ok(7))));
        });
    }
}
