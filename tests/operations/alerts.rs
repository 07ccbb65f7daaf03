//! Alerts that end while nobody looks: over a death of the agent, in a burst of changes, behind a job.

use crate::house::*;
use crate::network::{address, house, name};
use dom0d::event::{Event, kind};
use dom0d::model::VmId;
use dom0d::model::network::{Change, Kind};
use dom0d::operation::plan;
use dom0d::sim::Request;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

async fn restart(life: Life, host: &Host, meanwhile: impl AsyncFnOnce()) -> Life {
    let store = life.crash().await;
    meanwhile().await;
    Life::on(host, store, CancellationToken::new()).await
}

async fn plug(host: &Host, link: &str, plugged: bool) {
    let request = Request::PlugCable { link: name(link), plugged };
    host.world.call(request, Duration::from_secs(1)).await.unwrap();
}

/// Of this type and object, by whom it was acknowledged.
async fn acknowledged(life: &Life, kind: &str, object: &str) -> Vec<Option<String>> {
    let events = life.events(kind).await.into_iter().filter(|event| event.object == object);
    events.map(|event| event.acknowledged.map(|ack| ack.by)).collect()
}

const SHOWN: &str = "agent: the network shows that it is over";

#[tokio::test(start_paused = true)]
async fn alerts_of_links_that_ended_while_the_agent_was_dead_are_over_and_the_others_are_not() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    seconds(30.0).await;
    let (link, first, second) = (name("eth0"), address("198.51.100.7/24"), address("198.51.100.8/24"));
    let put = |address| Change::AddAddress { link: link.clone(), address };
    let take = |address| Change::DeleteAddress { link: link.clone(), address };
    for change in [put(first), put(second)] {
        kernel.inner.change(&change).await.unwrap();
    }
    seconds(30.0).await;
    for change in [take(first), take(second)] {
        kernel.inner.change(&change).await.unwrap();
    }
    plug(&host, "eth0", false).await;
    seconds(30.0).await;
    assert_eq!(acknowledged(&life, "network.carrier_lost", "network/eth0").await, [None]);
    assert_eq!(acknowledged(&life, "network.address_removed", "network/eth0").await, [None, None]);
    let life = restart(life, &host, async || ()).await;
    seconds(30.0).await;
    assert_eq!(acknowledged(&life, "network.carrier_lost", "network/eth0").await, [None], "it is so still");
    let life = restart(life, &host, async || {
        plug(&host, "eth0", true).await;
        kernel.inner.change(&put(first)).await.unwrap();
    })
    .await;
    seconds(30.0).await;
    let by = Some(SHOWN.to_owned());
    assert_eq!(acknowledged(&life, "network.carrier_lost", "network/eth0").await, [by]);
    let removed = life.events("network.address_removed").await;
    let mut told = removed.iter().map(|event| (event.data["address"].as_str().unwrap(), &event.acknowledged));
    assert!(told.all(|(address, ack)| ack.is_some() == (address == "198.51.100.7/24")), "{removed:?}");
}

#[tokio::test(start_paused = true)]
async fn an_alert_that_ends_in_a_burst_that_is_told_as_one_is_over() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    seconds(30.0).await;
    plug(&host, "eth0", false).await;
    seconds(30.0).await;
    assert_eq!(acknowledged(&life, "network.carrier_lost", "network/eth0").await, [None]);
    for n in 0..30 {
        let link = name(&format!("dummy{n}"));
        let new = Change::Create { link, kind: Kind::Dummy, mac: None, mtu: None };
        kernel.inner.change(&new).await.unwrap();
    }
    plug(&host, "eth0", true).await;
    seconds(30.0).await;
    assert_eq!(life.events("network.links_changed").await.len(), 1);
    assert_eq!(life.events("network.carrier_back").await.len(), 0);
    let by = Some(SHOWN.to_owned());
    assert_eq!(acknowledged(&life, "network.carrier_lost", "network/eth0").await, [by]);
}

#[tokio::test(start_paused = true)]
async fn flapping_that_a_former_life_told_ends_with_how_the_carrier_is() {
    let (host, _) = house();
    let life = Life::begin(&host).await;
    seconds(30.0).await;
    plug(&host, "eth0", false).await;
    seconds(1.0).await;
    let told = Event::new(kind::NETWORK_FLAPPING, "network/eth0", "text");
    life.operations.events.publish(&told).await.unwrap();
    let life = restart(life, &host, async || ()).await;
    seconds(30.0).await;
    let by = Some("agent: network.settled".to_owned());
    assert_eq!(acknowledged(&life, "network.flapping", "network/eth0").await, [by]);
    assert_eq!(acknowledged(&life, "network.settled", "network/eth0").await, [None], "it has no carrier");
    plug(&host, "eth0", true).await;
    seconds(30.0).await;
    let by = Some("agent: network.carrier_back".to_owned());
    assert_eq!(acknowledged(&life, "network.settled", "network/eth0").await, [by]);
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_stood_still_before_a_restart_is_not_told_again_and_its_going_on_is() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm = life.started("web").await;
    let domid = host.domain(vm).await.unwrap().domid.0;
    let somebody = host.world.another_client();
    somebody.call(Request::Export { domid }, Duration::from_secs(1)).await.unwrap();
    seconds(100.0).await;
    let life = restart(life, &host, async || ()).await;
    seconds(300.0).await;
    let object = format!("vm/{vm}");
    assert_eq!(acknowledged(&life, "vm.stands_still", &object).await, [None], "told once");
    let life = restart(life, &host, async || {
        somebody.call(Request::EndExport { domid, gone: false }, Duration::from_secs(1)).await.unwrap();
    })
    .await;
    seconds(100.0).await;
    assert_eq!(life.events("vm.goes_on").await.len(), 1);
    let by = Some("agent: vm.goes_on".to_owned());
    assert_eq!(acknowledged(&life, "vm.stands_still", &object).await, [by]);
}

#[tokio::test(start_paused = true)]
async fn two_domains_of_one_vm_are_over_when_one_is_left_whoever_ended_the_other() {
    let host = Host::new();
    let life = Life::begin(&host).await;
    let vm: VmId = life.started("web").await;
    let object = format!("vm/{vm}");
    // By a life that saw two.
    for _ in 0..2 {
        let told = Event::new(kind::DOMAIN_DOUBLE, object.clone(), "text");
        life.operations.events.publish(&told).await.unwrap();
    }
    let life = restart(life, &host, async || ()).await;
    seconds(30.0).await;
    assert_eq!(life.events("domain.single").await.len(), 1, "one end for both");
    let by = Some("agent: domain.single".to_owned());
    assert_eq!(acknowledged(&life, "domain.double", &object).await, [by.clone(), by]);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_domain_is_told_once_over_all_restarts_and_its_end_is_told() {
    let host = Host::new();
    let stranger = vm("stranger").config;
    let domid = host.toolstack.create(&stranger, false).await.unwrap();
    let mut life = Life::begin(&host).await;
    let object = format!("domain/{}", domid.0);
    for _ in 0..3 {
        seconds(30.0).await;
        assert_eq!(acknowledged(&life, "domain.unknown", &object).await, [None]);
        life = restart(life, &host, async || ()).await;
    }
    seconds(30.0).await;
    host.toolstack.destroy(domid).await.unwrap();
    seconds(30.0).await;
    let over = [Some("agent: domain.gone".to_owned())];
    assert_eq!(acknowledged(&life, "domain.unknown", &object).await, over);
    // Another, which goes while the agent is dead.
    let domid = host.toolstack.create(&stranger, false).await.unwrap();
    seconds(30.0).await;
    let object = format!("domain/{}", domid.0);
    assert_eq!(acknowledged(&life, "domain.unknown", &object).await, [None]);
    let life = restart(life, &host, async || host.toolstack.destroy(domid).await.unwrap()).await;
    seconds(30.0).await;
    assert_eq!(acknowledged(&life, "domain.unknown", &object).await, over);
    life.good("discover", plan::discover()).await;
    assert_eq!(life.events("domain.gone").await.len(), 2);
}
