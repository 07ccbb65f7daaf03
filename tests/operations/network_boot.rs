//! What is declared after the host's boot: without Xen, with ports that come late, with links that others have taken; and
//! an agent that starts again within a boot.

use crate::faulty::Faulty;
use crate::house::*;
use crate::network::{change, first, house, is, name};
use dom0d::model::network::{Address, Bond, BondMode, Bridge, Change, Kind, NetworkView, Owner, Route};
use dom0d::network::{Desired, DesiredLink};
use dom0d::operation::network::{Options, discover};
use dom0d::sim::{Fate, Kind as Asked, Request, Rule};
use dom0d::store::Store;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A bridge over a port of hardware, beside another bridge.
fn on_a_card() -> Desired {
    let mut desired = first();
    let mut bridge = DesiredLink::new(Kind::Bridge(Bridge::default()));
    bridge.ports.insert(name("eth3"));
    desired.links.insert(name("br3"), bridge);
    desired
}

async fn rebooted(life: Life, host: &Host) -> Store {
    let store = life.crash().await;
    host.world.call(Request::HostReboot, Duration::from_secs(1)).await.unwrap();
    seconds(1.0).await;
    store
}

async fn again(host: &Host, store: Store) -> Life {
    Life::on(host, store, CancellationToken::new()).await
}

async fn port_of(kernel: &Faulty, port: &str) -> Option<dom0d::model::IfName> {
    let view: NetworkView = is(kernel).await;
    view.links.get(&name(port)).and_then(|link| link.controller.clone())
}

#[tokio::test(start_paused = true)]
async fn the_network_of_a_new_boot_is_there_while_xen_does_not_answer() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    let before = is(&kernel).await;
    let store = rebooted(life, &host).await;
    host.world.add_rule(Rule { times: 1_000_000, ..Rule::next(Asked::List, Fate::Hang) }).await.unwrap();
    let life = again(&host, store).await;
    seconds(2.0).await;
    assert_eq!(is(&kernel).await, before);
    assert_eq!(life.events("network.restored").await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_port_that_comes_long_after_the_boot_gets_what_is_declared_and_nothing_is_tried_before() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(on_a_card(), Options::default())).await;
    let store = rebooted(life, &host).await;
    kernel.hidden.lock().unwrap().insert(name("eth3"));
    let life = again(&host, store).await;
    life.quiet().await;
    let now = is(&kernel).await;
    assert!(
        now.links.contains_key(&name("old")) && now.links.contains_key(&name("br3")),
        "what can be is there"
    );
    let before = life.good("network_discover", discover::discover(None, None)).await.id.0;
    seconds(3600.0).await;
    let after = life.good("network_discover", discover::discover(None, None)).await.id.0;
    assert_eq!(after, before + 1, "no job while there is nothing to do");
    // Other changes go on meanwhile, and forget nothing.
    let mut more = on_a_card();
    more.links.insert(name("d9"), DesiredLink::new(Kind::Dummy));
    life.good("network_apply", change(more, Options::default())).await;
    kernel.hidden.lock().unwrap().clear();
    seconds(15.0).await;
    life.quiet().await;
    assert_eq!(port_of(&kernel, "eth3").await, Some(name("br3")));
    assert_eq!(life.operations.network_show().await.unwrap().drift, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_bond_whose_primary_port_is_dead_works_by_the_other_and_what_operators_do_meanwhile_stays() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    let mut desired = first();
    desired.links.remove(&name("bond7"));
    let options = Bond { miimon_ms: 100, primary: Some(name("eth3")), ..Bond::new(BondMode::ActiveBackup) };
    let mut bond = DesiredLink::new(Kind::Bond(options));
    bond.ports = [name("eth2"), name("eth3")].into();
    bond.addresses = Some([Address::parse("203.0.113.1/24").unwrap()].into());
    desired.links.insert(name("bond0"), bond);
    // By a gateway that only a card leads to which is not there.
    let mut card = DesiredLink::new(Kind::Ethernet);
    card.addresses = Some([Address::parse("10.1.1.1/24").unwrap()].into());
    desired.links.insert(name("eth1"), card);
    let via = Some("10.1.1.254".parse().unwrap());
    desired.routes.insert(Route { via, ..Route::new(Address::parse("10.0.0.0/8").unwrap()) });
    life.good("network_apply", change(desired, Options::default())).await;
    let store = rebooted(life, &host).await;
    kernel.hidden.lock().unwrap().extend([name("eth1"), name("eth3")]);
    let life = again(&host, store).await;
    life.quiet().await;
    assert_eq!(port_of(&kernel, "eth2").await, Some(name("bond0")));
    assert_eq!(life.events("network.restored").await.len(), 1, "as far as it can be");
    // One card is gone for good, and the host is an operator's all the same.
    kernel.inner.change(&Change::SetMtu { link: name("old"), mtu: 1300 }).await.unwrap();
    host.world.set_link_owner(&name("old"), Some(Owner::NetworkManager)).await.unwrap();
    seconds(4000.0).await;
    life.quiet().await;
    let restored =
        life.events("network.restored").await.len() + life.events("network.left_alone").await.len();
    assert_eq!(restored, 1, "nothing was done and nothing told again");
    kernel.hidden.lock().unwrap().clear();
    seconds(15.0).await;
    life.quiet().await;
    assert_eq!(port_of(&kernel, "eth3").await, Some(name("bond0")));
    let now = is(&kernel).await;
    assert!(now.routes.iter().any(|route| route.via == via), "{:?}", now.routes);
    assert_eq!(now.links[&name("old")].mtu, 1300, "only what stands on the cards that came");
    let Kind::Bond(bond) = &now.links[&name("bond0")].kind else { panic!() };
    assert_eq!(bond.primary, Some(name("eth3")));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_starts_again_within_a_boot_leaves_what_others_did_and_tells_it_once() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(first(), Options::default())).await;
    life.quiet().await;
    kernel.inner.change(&Change::SetMtu { link: name("old"), mtu: 1300 }).await.unwrap();
    seconds(15.0).await;
    assert_eq!(life.events("network.drift").await.len(), 1);
    let store = life.crash().await;
    let life = again(&host, store).await;
    life.quiet().await;
    assert_eq!(is(&kernel).await.links[&name("old")].mtu, 1300, "nobody asked for that to be undone");
    let alerts = life.events("network.drift").await;
    assert!(alerts.len() == 1 && alerts[0].acknowledged.is_none(), "{alerts:?}");
    kernel.inner.change(&Change::SetMtu { link: name("old"), mtu: 1400 }).await.unwrap();
    seconds(15.0).await;
    let alerts = life.events("network.drift").await;
    assert!(alerts.len() == 1 && alerts[0].acknowledged.is_some(), "{alerts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_link_that_another_service_has_taken_is_left_alone_at_the_boot_and_told() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    life.good("network_apply", change(on_a_card(), Options::default())).await;
    let store = rebooted(life, &host).await;
    host.world.set_link_owner(&name("eth3"), Some(Owner::NetworkManager)).await.unwrap();
    let life = again(&host, store).await;
    life.quiet().await;
    assert_eq!(port_of(&kernel, "eth3").await, None);
    assert!(is(&kernel).await.links.contains_key(&name("old")), "the rest is there");
    let told = life.events("network.left_alone").await;
    assert!(told.len() == 1 && told[0].text.contains("eth3 (NetworkManager)"), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn what_others_do_while_a_change_waits_for_its_word_is_told_and_what_we_do_is_not() {
    let (host, kernel) = house();
    let life = Life::begin(&host).await;
    let options = Options { confirm_within_s: Some(600), ..Options::default() };
    let job = life.submit("network_apply", change(first(), options)).await;
    seconds(30.0).await;
    kernel.inner.change(&Change::SetMtu { link: name("eth2"), mtu: 1300 }).await.unwrap();
    seconds(30.0).await;
    let told = life.events("network.link_changed").await;
    assert!(told.len() == 1 && told[0].object == "network/eth2", "{told:?}");
    life.end(job).await;
    life.quiet().await;
    for kind in ["network.link_added", "network.link_removed", "network.address_removed", "network.drift"] {
        assert_eq!(life.events(kind).await, [], "{kind}");
    }
}
