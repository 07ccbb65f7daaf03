//! Figures for sampling: of the machine by the hypervisor itself, or else by `xl info`; of guests by XenStore.

use super::Xl;
use super::hypercall::Hypervisor;
use crate::model::{KiB, MiB};
use crate::xen::{DomId, GuestFigures, GuestTold, Result, ToolstackError, Usage};
use futures_util::{StreamExt, stream};
use tokio::time::{Instant, timeout_at};

/// Domains whose nodes are asked for at the same time.
const AT_ONCE: usize = 32;

impl Xl {
    pub(super) async fn usage_now(&self) -> Result<Usage> {
        if self.figures_agree().await?
            && let Some(usage) = self.ask_hypervisor(Hypervisor::usage).await
        {
            return Ok(usage);
        }
        let info = self.hypervisor().await?;
        Ok(Usage {
            total_memory: KiB::from(info.total_memory),
            free_memory: KiB::from(info.free_memory),
            clock_ns: 0,
            cpus: Vec::new(),
            domains: Vec::new(),
        })
    }

    /// Whether the hypervisor's own figures can be had, and are those of xl: asked once, since a structure that is not
    /// as we think could tell anything.
    async fn figures_agree(&self) -> Result<bool> {
        if self.inner.hypervisor.is_none() {
            return Ok(false);
        }
        let compare = || async {
            let by_xl = self.hypervisor().await?;
            let told = self.ask_hypervisor(Hypervisor::physical).await;
            let agree = told.is_some_and(|told| {
                (MiB::from(told.total), told.cpus) == (by_xl.total_memory, by_xl.nr_cpus)
            });
            if !agree {
                tracing::warn!(?told, "the hypervisor's figures do not agree with xl's; xl is asked");
            }
            Ok::<_, ToolstackError>(agree)
        };
        self.inner.figures_agree.get_or_try_init(compare).await.copied()
    }

    pub(super) async fn figures_of(&self, domids: &[DomId]) -> Result<Vec<GuestFigures>> {
        let until = Instant::now() + self.inner.limit;
        // Futures of a slice's own items would not be general enough for the trait's.
        let domids: Vec<DomId> = domids.into();
        let count = domids.len();
        let readings = domids.into_iter().map(|domid| self.figures_of_one(domid));
        let mut readings = stream::iter(readings).buffer_unordered(AT_ONCE);
        let (mut told, mut trouble) = (Vec::with_capacity(count), None);
        loop {
            match timeout_at(until, readings.next()).await {
                Ok(Some(Ok(figures))) => told.push(figures),
                Ok(Some(Err(error))) => trouble = trouble.or(Some(error)),
                Ok(None) => break,
                Err(_) => {
                    trouble = trouble.or(Some(ToolstackError::Timeout));
                    break;
                }
            }
        }
        match trouble {
            Some(error) if told.is_empty() => Err(error),
            _ => {
                told.sort_by_key(|one: &GuestFigures| one.domid);
                Ok(told)
            }
        }
    }

    /// A guest without tools costs two reads.
    async fn figures_of_one(&self, domid: DomId) -> Result<GuestFigures> {
        let mut told = GuestTold {
            target: self.node_kib(domid, "memory/target").await?.map(KiB),
            total: self.value(domid, "data/meminfo_total").await?,
            ..GuestTold::default()
        };
        if told.total.is_some() {
            told.max = self.max_memory(domid).await?;
            told.free = self.value(domid, "data/meminfo_free").await?;
        }
        Ok(told.checked(domid))
    }

    /// A node of the domain's own folder, as it is.
    async fn value(&self, domid: DomId, path: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.inner.store.read(&format!("/local/domain/{}/{path}", domid.0)).await?)
    }
}
