//! Figures for sampling: of the machine by the hypervisor itself, or else by `xl info`; of guests by XenStore.

use super::Xl;
use super::hypercall::{Hypervisor, Physical};
use crate::model::{KiB, MiB};
use crate::xen::{DomId, GuestFigures, GuestTold, Result, ToolstackError, Usage};
use futures_util::{StreamExt, stream};
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};

/// Domains whose nodes are asked for at the same time.
const AT_ONCE: usize = 32;

/// Whether both tell the same memory and CPUs, since a structure that is not as we think could tell anything. What was
/// found holds for good; while the hypervisor tells nothing, nothing is found.
async fn agree<T, X>(found: &OnceCell<bool>, told: impl Fn() -> T, by_xl: impl Fn() -> X) -> Result<bool>
where
    T: Future<Output = Option<Physical>>,
    X: Future<Output = Result<(MiB, u32)>>,
{
    if let Some(agree) = found.get() {
        return Ok(*agree);
    }
    let mut agree = false;
    // Between the two looks a CPU may go off or on; hardly twice.
    for _ in 0..3 {
        let by_xl = by_xl().await?;
        let Some(told) = told().await else { return Ok(false) };
        agree = (MiB::from(told.total), told.cpus) == by_xl;
        if agree {
            break;
        }
        tracing::warn!(?told, ?by_xl, "the hypervisor's figures do not agree with xl's");
    }
    if found.set(agree).is_ok() && !agree {
        tracing::warn!("xl is asked for figures from now on");
    }
    Ok(agree)
}

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

    /// Whether the hypervisor's own figures can be had, and are those of xl.
    async fn figures_agree(&self) -> Result<bool> {
        if self.inner.hypervisor.is_none() {
            return Ok(false);
        }
        let told = || self.ask_hypervisor(Hypervisor::physical);
        agree(&self.inner.figures_agree, told, || self.told_by_xl()).await
    }

    async fn told_by_xl(&self) -> Result<(MiB, u32)> {
        let info = self.hypervisor().await?;
        Ok((info.total_memory, info.nr_cpus))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[tokio::test]
    async fn only_what_was_told_and_compared_holds_for_good() {
        let by_xl = || std::future::ready(Ok((MiB(4), 2)));
        let physical = |mib: u64, cpus| Some(Physical { total: MiB(mib).into(), free: KiB(0), cpus });
        let found = OnceCell::new();
        let ask = async |answers: &[Option<Physical>]| {
            let left = Mutex::new(answers.to_vec());
            let told = || std::future::ready(left.lock().unwrap().remove(0));
            let agree = agree(&found, told, by_xl).await;
            (agree.unwrap(), left.lock().unwrap().len())
        };
        assert_eq!(ask(&[None]).await, (false, 0), "xl is asked this time");
        assert_eq!(ask(&[physical(4, 1), physical(4, 2)]).await, (true, 0), "and the hypervisor the next");
        assert_eq!(ask(&[None]).await, (true, 1), "it is known");
        let found = OnceCell::new();
        let other = [physical(5, 2); 4];
        let left = Mutex::new(other.to_vec());
        for _ in 0..2 {
            let told = || std::future::ready(left.lock().unwrap().remove(0));
            assert!(!agree(&found, told, by_xl).await.unwrap());
        }
        assert_eq!(left.lock().unwrap().len(), 1, "it was asked three times, and then no more");
    }
}
