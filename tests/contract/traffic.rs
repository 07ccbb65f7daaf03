//! What every set of worlds must tell of a domain's traffic: the domain is the toolstack's, its vifs are the
//! kernel's links, and its disks the machine's devices.

use crate::env::{mac_of, small_guest, unseen_disk, vif};
use dom0d::kernel::{Kernel, LinkTraffic};
use dom0d::machine::{DiskTraffic, Machine};
use dom0d::model::Bytes;
use dom0d::xen::{DomId, Toolstack};
use std::time::Duration;

pub struct Worlds<'a> {
    pub toolstack: &'a dyn Toolstack,
    pub kernel: &'a dyn Kernel,
    pub machine: &'a dyn Machine,
}

impl Worlds<'_> {
    async fn vifs(&self, domid: DomId) -> Vec<LinkTraffic> {
        let mut links = self.kernel.traffic().await.unwrap();
        links.retain(|link| link.name.starts_with(&format!("vif{}.", domid.0)));
        links
    }

    /// What sampling reads of a domain's disks, which must be what is told of the domain.
    async fn each_disk_added_up(&self, domid: DomId) -> DiskTraffic {
        let figures = self.machine.figures().await.unwrap();
        assert_eq!(figures.problems, []);
        assert!(figures.vbds.is_sorted_by_key(|vbd| (vbd.domid, vbd.device)));
        let of_it = figures.vbds.iter().filter(|vbd| vbd.domid == domid.0);
        of_it.fold(DiskTraffic::default(), |sum, vbd| DiskTraffic {
            read: Bytes(sum.read.0 + vbd.traffic.read.0),
            written: Bytes(sum.written.0 + vbd.traffic.written.0),
            reads: sum.reads + vbd.traffic.reads,
            writes: sum.writes + vbd.traffic.writes,
        })
    }

    async fn disks(&self, domid: DomId) -> DiskTraffic {
        self.machine.disk_traffic(domid.0).await.unwrap()
    }
}

fn at_least(now: &DiskTraffic, before: &DiskTraffic) -> bool {
    now.read >= before.read
        && now.written >= before.written
        && now.reads >= before.reads
        && now.writes >= before.writes
}

pub async fn traffic_of_a_domain_grows_while_it_runs_and_goes_with_it(worlds: &Worlds<'_>) {
    let mut config = small_guest();
    config.disks.push(unseen_disk(config.vm, "xvdb"));
    config.vifs.push(vif(mac_of(config.vm, 1)));
    let domid = worlds.toolstack.create(&config, false).await.unwrap();
    assert_eq!(worlds.vifs(domid).await.len(), 2);
    let network = worlds.kernel.network().await.unwrap();
    let vif = &network.links[&format!("vif{}.1", domid.0).parse().unwrap()];
    assert_eq!(vif.kind, dom0d::model::network::Kind::Vif);
    assert_eq!(vif.controller, Some("xenbr0".parse().unwrap()), "on the bridge that its card is for");
    let first = worlds.disks(domid).await;
    let (disks, vifs) = loop {
        let (disks, vifs) = (worlds.disks(domid).await, worlds.vifs(domid).await);
        assert!(at_least(&disks, &first));
        if disks.reads > first.reads && vifs.iter().all(|vif| vif.received.0 > 0 && vif.sent.0 > 0) {
            break (disks, vifs);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(disks.read.0 >= disks.reads * 512);
    for vif in &vifs {
        // No packet is empty, and what is dropped has come.
        assert!((1..=vif.received.0).contains(&vif.received_packets), "{vif:?}");
        assert!((1..=vif.sent.0).contains(&vif.sent_packets), "{vif:?}");
        assert!(vif.receive_errors + vif.receive_drops <= vif.received_packets, "{vif:?}");
    }
    worlds.toolstack.pause(domid).await.unwrap();
    let still = (worlds.disks(domid).await, worlds.vifs(domid).await);
    assert!(at_least(&still.0, &disks));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((worlds.disks(domid).await, worlds.vifs(domid).await), still, "a paused guest does nothing");
    assert_eq!(still.1.len(), vifs.len());
    assert_eq!(worlds.each_disk_added_up(domid).await, still.0, "each disk by itself, and all together");
    worlds.toolstack.destroy(domid).await.unwrap();
    assert_eq!((worlds.disks(domid).await, worlds.vifs(domid).await), (DiskTraffic::default(), vec![]));
    let links = worlds.kernel.links().await.unwrap();
    let names: Vec<_> = worlds.kernel.traffic().await.unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(names, links.into_iter().map(|link| link.name).collect::<Vec<_>>(), "all links, by name");
}
