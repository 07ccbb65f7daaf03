//! A kernel's body with faults: refuses a change, stands in the way of all from one on, hears the daemon's death.

use dom0d::kernel::{Changed, Kernel, KernelError, Link, LinkFacts, LinkTraffic};
use dom0d::model::IfName;
use dom0d::model::network::{Change, Neighbour, NetworkView, Owner, Refused};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};

/// What lives on when the daemon dies: the kernel, and what is wrong with it.
pub struct Faulty {
    pub inner: Arc<dyn Kernel>,
    /// Changes asked for so far, from 1.
    pub asked: AtomicUsize,
    /// The change that is refused; 0: none.
    pub refuse_at: AtomicUsize,
    /// All from this one on are refused; 0: none.
    pub refuse_from: AtomicUsize,
    /// Where the daemon stands still, so that it can be killed there: before this change or, done, after it.
    pub stand_before: AtomicUsize,
    pub stand_after: AtomicUsize,
    pub stands: Notify,
    /// Whoever is asked for is not reached any more.
    pub cut_off: AtomicBool,
    /// Whoever ends DHCP on a link finds its addresses and routes gone, as with clients that give their lease back.
    pub lease_ends_with_client: AtomicBool,
    /// Links that are not there yet.
    pub hidden: Mutex<BTreeSet<IfName>>,
    /// How long a reading takes.
    pub reading: Mutex<Duration>,
    pub log: Mutex<Vec<Change>>,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Kernel>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            asked: AtomicUsize::new(0),
            refuse_at: AtomicUsize::new(0),
            refuse_from: AtomicUsize::new(0),
            stand_before: AtomicUsize::new(0),
            stand_after: AtomicUsize::new(0),
            stands: Notify::new(),
            cut_off: AtomicBool::new(false),
            lease_ends_with_client: AtomicBool::new(false),
            hidden: Mutex::default(),
            reading: Mutex::default(),
            log: Mutex::default(),
        })
    }

    /// Counts from here, without faults.
    pub fn heal(&self) {
        for number in [&self.asked, &self.refuse_at, &self.refuse_from, &self.stand_before, &self.stand_after]
        {
            number.store(0, Ordering::SeqCst);
        }
        self.cut_off.store(false, Ordering::SeqCst);
        self.log.lock().unwrap().clear();
    }

    async fn flush(&self, link: &IfName) {
        let now = self.inner.network().await.unwrap();
        for route in now.routes.into_iter().filter(|route| route.link.as_ref() == Some(link)) {
            self.inner.change(&Change::DeleteRoute { route }).await.unwrap();
        }
        for address in now.links[link].addresses.clone() {
            self.inner.change(&Change::DeleteAddress { link: link.clone(), address }).await.unwrap();
        }
    }

    async fn stand(&self) {
        self.stands.notify_one();
        std::future::pending::<()>().await;
    }
}

#[async_trait::async_trait]
impl Kernel for Faulty {
    async fn links(&self) -> Result<Vec<Link>, KernelError> {
        self.inner.links().await
    }

    async fn traffic(&self) -> Result<Vec<LinkTraffic>, KernelError> {
        self.inner.traffic().await
    }

    async fn network(&self) -> Result<NetworkView, KernelError> {
        let pause = *self.reading.lock().unwrap();
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let mut view = self.inner.network().await?;
        let hidden = self.hidden.lock().unwrap().clone();
        view.links.retain(|name, _| !hidden.contains(name));
        Ok(view)
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, KernelError> {
        self.inner.neighbours().await
    }

    async fn facts(&self, link: &IfName) -> Result<LinkFacts, KernelError> {
        self.inner.facts(link).await
    }

    async fn owners(&self) -> Result<BTreeMap<IfName, Owner>, KernelError> {
        self.inner.owners().await
    }

    async fn change(&self, change: &Change) -> Result<(), KernelError> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let is = |at: &AtomicUsize| at.load(Ordering::SeqCst) == number;
        if is(&self.stand_before) {
            self.stand().await;
        }
        let from = self.refuse_from.load(Ordering::SeqCst);
        if is(&self.refuse_at) || (from > 0 && number >= from) {
            return Err(KernelError::Refused(Refused::Busy));
        }
        self.inner.change(change).await?;
        if let Change::SetDhcp { link, on: false } = change
            && self.lease_ends_with_client.load(Ordering::SeqCst)
        {
            self.flush(link).await;
        }
        self.log.lock().unwrap().push(change.clone());
        if is(&self.stand_after) {
            self.stand().await;
        }
        Ok(())
    }

    async fn reaches(&self, address: IpAddr) -> Result<bool, KernelError> {
        if self.cut_off.load(Ordering::SeqCst) && self.asked.load(Ordering::SeqCst) > 0 {
            return Ok(false);
        }
        self.inner.reaches(address).await
    }

    async fn connects(&self, address: SocketAddr, patience: Duration) -> bool {
        self.inner.connects(address, patience).await
    }

    async fn ping(&self, address: IpAddr) -> bool {
        self.inner.ping(address).await
    }

    fn observe(&self) -> mpsc::Receiver<Changed> {
        self.inner.observe()
    }
}
