//! Calls that steer a living domain and move no memory: pause, end, signals to the guest, sizes, scheduling.

use super::Xl;
use super::run::Leaves;
use crate::model::{KiB, MiB};
use crate::xen::{DomId, Result, RunState, ToolstackError, Trigger, check_guest_value};
use std::time::Duration;

/// How long a destroyed domain may take to be gone; its backends may hold pages of it a while longer.
const TO_GO: Duration = Duration::from_secs(10);
/// How long `xl destroy` is given at least. libxl waits 40 s for each hotplug script that hangs before it goes on, and
/// takes the domain itself last of all: killed sooner, the domain would stay.
const TO_DESTROY: Duration = Duration::from_secs(100);

/// Which of Xen's schedulers hands out the CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheduler {
    Credit,
    Credit2,
}

impl Xl {
    pub(super) async fn ask_guest(&self, domid: DomId, what: &str) -> Result<()> {
        self.living(domid).await?;
        // -F: an HVM guest without drivers of ours gets the power or reset button.
        let asked = self.xl(&[what, "-F", &domid.0.to_string()], Leaves::Nothing).await;
        self.explained(domid, asked.map(drop)).await
    }

    pub(super) async fn set_paused(&self, domid: DomId, paused: bool) -> Result<()> {
        let line = self.living(domid).await?;
        // Xen counts pauses: one that is paused twice would stay so.
        if (line.state == RunState::Paused) == paused {
            return Ok(());
        }
        if self.paused_by_hypercall(domid, paused).await? {
            return Ok(());
        }
        let call = if paused { "pause" } else { "unpause" };
        let done = self.xl(&[call, &domid.0.to_string()], Leaves::Nothing).await;
        self.explained(domid, done.map(drop)).await?;
        Ok(())
    }

    /// Whether it was done without xl. An HVM domain's device model may have to be woken too: that is for xl.
    async fn paused_by_hypercall(&self, domid: DomId, paused: bool) -> Result<bool> {
        if !paused && self.kind(domid).await?.is_none_or(|kind| kind == b"hvm") {
            return Ok(false);
        }
        let done = self.ask_hypervisor(move |hypervisor| hypervisor.pause(domid, paused)).await;
        Ok(done.is_some())
    }

    /// Ends a domain and waits until Xen has let it go.
    pub(super) async fn end(&self, domid: DomId) -> Result<()> {
        if domid == DomId(0) {
            return Err(ToolstackError::BadState("this is dom0".to_owned()));
        }
        let limit = self.inner.limit.max(TO_DESTROY);
        let args = ["destroy", &domid.0.to_string()];
        let destroyed = self.inner.runner.xl(&args, Leaves::Nothing, limit).await;
        if let Err(error) = destroyed {
            return match self.line(domid).await {
                Ok(None) => Err(ToolstackError::NoSuchDomain),
                Ok(Some(line)) if line.state == RunState::Dying => Ok(()),
                _ => Err(error),
            };
        }
        let gone = async {
            while self.line(domid).await?.is_some() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        };
        let gone = tokio::time::timeout(TO_GO, gone).await;
        gone.unwrap_or_else(|_| {
            tracing::warn!(domid = domid.0, "a destroyed domain is still being taken apart");
            Ok(())
        })
    }

    pub(super) async fn online_vcpus(&self, domid: DomId, online: u32) -> Result<()> {
        self.living(domid).await?;
        let all = self.vcpus(domid).await?.map_or(0, |(all, _)| all);
        if online == 0 || online > all {
            return Err(ToolstackError::Failed(format!("{online} virtual CPUs; allowed: 1 to {all}")));
        }
        // How many a VM may have is not xl's to say: a VM is built with more than the host has, too.
        let args = ["vcpu-set", "--ignore-host", &domid.0.to_string(), &online.to_string()];
        let set = self.xl(&args, Leaves::Nothing).await;
        self.explained(domid, set.map(drop)).await
    }

    pub(super) async fn balloon(&self, domid: DomId, target: MiB) -> Result<()> {
        self.living(domid).await?;
        let max = self.max_memory(domid).await?.map_or(MiB(0), MiB::from);
        if target.0 == 0 || target > max {
            return Err(ToolstackError::Failed(format!("{target} of memory; allowed: at most {max}")));
        }
        let args = ["mem-set", &domid.0.to_string(), &format!("{}k", KiB::from(target).0)];
        let set = self.xl(&args, Leaves::Nothing).await;
        self.explained(domid, set.map(drop)).await
    }

    pub(super) async fn schedule(&self, domid: DomId, weight: u16, cap: u16) -> Result<()> {
        if weight == 0 {
            return Err(ToolstackError::Failed("a weight is 1 to 65535".to_owned()));
        }
        self.there(domid).await?;
        let call = match self.scheduler().await? {
            Scheduler::Credit => "sched-credit",
            Scheduler::Credit2 => "sched-credit2",
        };
        let (domid_text, weight, cap) =
            (format!("--domain={}", domid.0), format!("--weight={weight}"), format!("--cap={cap}"));
        let set = self.xl(&[call, &domid_text, &weight, &cap], Leaves::Nothing).await;
        self.explained(domid, set.map(drop)).await
    }

    async fn scheduler(&self) -> Result<Scheduler> {
        let known = self.inner.scheduler.get_or_try_init(|| async {
            match self.xl_info().await?.text("xen_scheduler")? {
                "credit" => Ok(Scheduler::Credit),
                "credit2" => Ok(Scheduler::Credit2),
                other => {
                    let text =
                        format!("the scheduler {other} knows no weight and cap; credit and credit2 do");
                    Err(ToolstackError::Failed(text))
                }
            }
        });
        known.await.copied()
    }

    pub(super) async fn send_sysrq(&self, domid: DomId, letter: char) -> Result<()> {
        if !letter.is_ascii_alphanumeric() {
            return Err(ToolstackError::Failed("a SysRq is one ASCII letter or digit".to_owned()));
        }
        self.living(domid).await?;
        let args = ["sysrq", &domid.0.to_string(), &letter.to_string()];
        let sent = self.xl(&args, Leaves::Nothing).await;
        self.explained(domid, sent.map(drop)).await
    }

    pub(super) async fn send_trigger(&self, domid: DomId, trigger: Trigger, vcpu: Option<u32>) -> Result<()> {
        self.living(domid).await?;
        let name = match trigger {
            Trigger::Nmi => "nmi",
            Trigger::Reset => "reset",
            Trigger::Init => "init",
            Trigger::Power => "power",
            Trigger::Sleep => "sleep",
            Trigger::S3resume => "s3resume",
        };
        let (domid_text, vcpu) = (domid.0.to_string(), vcpu.map(|vcpu| vcpu.to_string()));
        let mut args = vec!["trigger", &domid_text, name];
        args.extend(vcpu.as_deref());
        let sent = self.xl(&args, Leaves::Nothing).await;
        self.explained(domid, sent.map(drop)).await
    }

    pub(super) async fn send_value(&self, domid: DomId, key: &str, value: &str) -> Result<()> {
        check_guest_value(key, value)?;
        self.living(domid).await?;
        let path = format!("/local/domain/{}/control/dom0d/{}", domid.0, key.replace('.', "@2E"));
        Ok(self.inner.store.write(&path, value.as_bytes()).await?)
    }
}
