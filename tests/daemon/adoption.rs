//! F4 with real processes: the daemon is killed, the host reboots, and what runs is adopted exactly once.

use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::model::VmId;
use dom0d::sim::Request;
use dom0d::wire::Value;
use std::time::Duration;

async fn adopted(local: &mut Caller) -> Value {
    let mut found = Value::Nil;
    until("domains are adopted", PATIENCE, async || {
        found = local.call("vm_adopted", &[]).await.unwrap_or(Value::Nil);
        found != Value::Nil
    })
    .await;
    found
}

fn counts(found: &Value) -> [u64; 5] {
    ["adopted", "unknown", "gone", "restarted", "off"].map(|name| number(field(field(found, "counts"), name)))
}

fn names(found: &Value, list_of: &str) -> Vec<String> {
    list(field(found, list_of)).iter().map(|row| string(field(row, "uuid"))).collect()
}

async fn running(local: &mut Caller, count: usize) -> Vec<VmId> {
    let mut vms = Vec::new();
    for _ in 0..count {
        let vm = VmId::random();
        local.create(vm).await;
        local.on_vm("start_vm", vm).await;
        vms.push(vm);
    }
    vms
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_killed_again_and_again_adopts_each_running_domain_once_and_touches_none() {
    let home = Home::new();
    let mut daemon = home.start().await;
    let vms = running(&mut daemon.local(), 5).await;
    let off = VmId::random();
    daemon.local().create(off).await;
    let before = home.world().audit().await.unwrap().effects.len();
    for _ in 0..10 {
        daemon.kill().await;
        daemon = home.start().await;
        let mut local = daemon.local();
        let found = adopted(&mut local).await;
        assert_eq!(string(field(&found, "boot")), "same");
        assert_eq!(counts(&found), [5, 0, 0, 0, 1], "{found:?}");
        let mut uuids = names(&found, "adopted");
        uuids.sort();
        let mut expected: Vec<String> = vms.iter().map(ToString::to_string).collect();
        expected.sort();
        assert_eq!(uuids, expected);
    }
    let mut local = daemon.local();
    local.until_idle().await;
    let audit = home.world().audit().await.unwrap();
    assert!(vms.iter().all(|vm| audit.begun(*vm) == 1));
    assert_eq!(audit.effects.len(), before, "nothing was done to any: {:?}", audit.effects.back());
    let events = local.ask("event_list", &[structure([("limit", int(1000))])]).await;
    let told = list(field(&events, "events")).iter().filter(|e| string(field(e, "type")) == "vm.adoption");
    assert!(told.count() >= 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_host_has_rebooted_its_vms_are_started_in_their_order_by_whichever_daemon_lives() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut local = daemon.local();
    let vms = running(&mut local, 4).await;
    for (vm, order) in [(vms[0], 20), (vms[1], 10)] {
        local.ask("vm_autostart", &[text(vm), Value::Bool(true), int(order), int(10)]).await;
    }
    local.ask("vm_autostart", &[text(vms[2]), Value::Bool(true)]).await;
    local.on_vm("stop_vm", vms[2]).await;
    let refused = local.refused("vm_autostart", &[text(vms[0]), Value::Bool(true), int(10_000)]).await;
    assert!(refused.contains("0 to 9999"), "{refused}");
    let shown = local.ask("vm_get", &[text(vms[1])]).await;
    assert_eq!(number(field(&shown, "autostart_order")), 10);
    assert_eq!(*field(&shown, "autostart"), Value::Bool(true));
    daemon.kill().await;
    home.world().call(Request::HostReboot, PATIENCE).await.unwrap();
    until("the host is down", PATIENCE, async || domain(&home.world(), vms[0]).await.is_none()).await;

    let daemon = home.start().await;
    let mut local = daemon.local();
    let found = adopted(&mut local).await;
    assert_eq!(string(field(&found, "boot")), "new");
    assert_eq!(counts(&found), [0, 0, 1, 2, 1], "{found:?}");
    assert_eq!(names(&found, "gone"), [vms[3].to_string()]);
    until("the first is started", PATIENCE, async || {
        local.state_of(vms[1]).await.as_deref() == Some("running")
    })
    .await;
    // Killed in the delay between the two.
    assert_eq!(local.state_of(vms[0]).await.as_deref(), Some("off"));
    daemon.kill().await;
    let daemon = home.start().await;
    let mut local = daemon.local();
    let found = adopted(&mut local).await;
    assert_eq!(string(field(&found, "boot")), "same");
    until("the second is started", PATIENCE, async || {
        local.state_of(vms[0]).await.as_deref() == Some("running")
    })
    .await;
    local.until_idle().await;
    let audit = home.world().audit().await.unwrap();
    assert_eq!([0, 1, 2, 3].map(|n| audit.begun(vms[n])), [2, 2, 1, 1]);
    let begun =
        |vm: VmId| audit.effects.iter().rfind(|e| e.vm == Some(vm) && e.what == "create").unwrap().at.0;
    assert!(begun(vms[0]) >= begun(vms[1]) + 10_000, "its delay was kept over the restart");
    let last = local.ask("vm_get", &[text(vms[3])]).await;
    assert_eq!(string(field(&last, "last_end")), "host_down");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_xendomains_the_daemon_does_not_start_and_says_what_to_do() {
    let home = Home::new();
    let daemon = home.start().await;
    let vms = running(&mut daemon.local(), 1).await;
    daemon.kill().await;
    home.world().set_xendomains(true).await.unwrap();
    let refused = tokio::time::timeout(PATIENCE, home.command().output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "a restart mends nothing: {said}");
    for words in ["xendomains service is enabled", "systemctl disable xendomains", "vm.beside_xendomains"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(domain(&home.world(), vms[0]).await.is_some(), "no VM was touched");

    home.settings("[vm]\nbeside_xendomains = true\n");
    let daemon = home.start().await;
    assert_eq!(counts(&adopted(&mut daemon.local()).await)[0], 1);
    assert!(home.log().contains("may start and stop VMs by itself"));
    daemon.kill().await;
    home.settings("");
    home.world().set_xendomains(false).await.unwrap();
    let daemon = home.start().await;
    tokio::time::timeout(Duration::from_secs(60), adopted(&mut daemon.local())).await.unwrap();
}
