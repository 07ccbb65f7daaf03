//! VMs go from one daemon to another and back, by real mutual TLS on loopback; and whoever may not, is refused.

use crate::pair::*;
use crate::support::*;
use dom0d::api::value::{int, structure, text, texts};
use dom0d::model::VmId;
use dom0d::sim::{Behaviour, Fate, Kind, Rule, WorldError};
use dom0d::wire::{ClientError, Value};

fn slow(ms: u64) -> Behaviour {
    Behaviour { migration_ms: ms, ..Behaviour::default() }
}

/// A job of this verb, waited for.
async fn job(caller: &mut Caller, verb: &str, params: &[Value]) -> Value {
    let id = caller.submit(verb, params, structure([])).await;
    caller.ask("job_wait", &[int(id), int(25)]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_goes_to_a_peer_and_back_and_its_downtime_is_told() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    pair.a.local().ask("migrate_vm", &pair.to_b(vm)).await;
    assert_eq!(pair.decided(vm, "there").await, "b");
    let job = job(&mut pair.b.local(), "migrate_vm", &pair.to_a(vm)).await;
    assert_eq!(string(field(&job, "state")), "succeeded", "{job:?}");
    assert!(number(field(field(&job, "result"), "downtime_ms")) < 5000);
    assert!(number(field(field(&job, "result"), "bytes")) > 500_000, "{job:?}");
    assert_eq!(pair.decided(vm, "back").await, "a");
    assert_eq!(pair.a.events("vm.migrated").await.len(), 1);
    assert_eq!(pair.b.events("vm.arrived").await.len(), 1);
    // As its owner knew it.
    assert_eq!(pair.a.world().audit().await.unwrap().begun(vm), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_vm_stays_paused_and_one_that_is_off_does_not_go() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    pair.a.local().on_vm("pause_vm", vm).await;
    pair.a.local().ask("migrate_vm", &pair.to_b(vm)).await;
    assert_eq!(pair.b.local().state_of(vm).await.as_deref(), Some("paused"));
    assert_eq!(pair.a.local().state_of(vm).await, None);
    let off = VmId::random();
    pair.a.local().create(off).await;
    let fault = pair.a.local().refused("migrate_vm", &pair.to_b(off)).await;
    assert!(fault.contains("VM_STATE") && fault.contains("running or paused"), "{fault}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_trust_on_both_sides_nothing_goes() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    let mut a = pair.a.local();
    let fault = a.refused("migrate_vm", &[text(REPO), text(vm), text("192.0.2.99")]).await;
    assert!(fault.contains("PEER_NOT_FOUND") && fault.contains(&pair.b.way.address.to_string()), "{fault}");

    // Another certificate there than the one that is pinned.
    let pinned = pair.b.fingerprint().await;
    let way = pair.b.way.address;
    a.ask("peer_add", &[text(way), text("ab".repeat(32))]).await;
    let fault = a.refused("migrate_vm", &pair.to_b(vm)).await;
    assert!(fault.contains("PEER_UNREACHABLE"), "{fault}");
    a.ask("peer_add", &[text(way), text(&pinned)]).await;

    // We are no peer there any more.
    pair.b.local().ask("peer_remove", &[text(pair.a.way.address)]).await;
    let fault = a.refused("migrate_vm", &pair.to_b(vm)).await;
    assert!(fault.contains("PEER_UNREACHABLE") && fault.contains("peer_add"), "{fault}");
    assert_eq!(pair.settled_on(vm).await, Ok("a"));
    pair.b.trust(&pair.a).await;
    a.ask("migrate_vm", &pair.to_b(vm)).await;
    assert_eq!(pair.decided(vm, "trusted again").await, "b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_certificate_of_the_same_ca_is_still_the_peers() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    pair.a.local().ask("certificate_renew", &[]).await;
    pair.b.local().ask("certificate_renew", &[]).await;
    pair.a.local().ask("migrate_vm", &pair.to_b(vm)).await;
    assert_eq!(pair.decided(vm, "renewed").await, "b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_may_call_the_verbs_of_peers_alone_and_nobody_else_may() {
    let pair = Pair::new().await;
    let mut peer = pair.peer_of_b().await;
    for verb in ["vm_list", "peer_list", "job_list", "host_get", "event_list"] {
        let fault = peer.call(verb, &[]).await.unwrap_err().to_string();
        assert!(fault.contains("NOT_PERMITTED") || fault.contains("INVALID"), "{verb}: {fault}");
    }
    let (id, vm) = (VmId::random(), VmId::random());
    let state = peer.ask("migration_state", &[text(id), text(vm)]).await;
    assert_eq!(string(field(&state, "state")), "nothing");
    let outcome = peer.ask("migration_outcome", &[text(id), text(vm)]).await;
    assert_eq!(string(field(&outcome, "outcome")), "unknown");
    peer.ask("system.listMethods", &[]).await;
    let daemon = pair.b.daemon.as_ref().unwrap();
    for caller in [&mut daemon.remote(), &mut daemon.local()] {
        for verb in ["migration_state", "migration_outcome", "migration_commit", "migration_abort"] {
            let fault = caller.refused(verb, &[text(id), text(vm)]).await;
            assert!(fault.contains("NOT_PERMITTED"), "{verb}: {fault}");
        }
        let fault = caller.refused("migration_prepare", &[text(id), text("{}")]).await;
        assert!(fault.contains("NOT_PERMITTED"), "{fault}");
    }
    let path = format!("/migration/{id}");
    for caller in [daemon.remote(), daemon.local(), peer] {
        let opened = caller.0.open_stream(&path, "dom0d-migration", PATIENCE).await;
        assert!(matches!(opened, Err(ClientError::Status { status: 404, .. })), "nothing was prepared");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_document_of_a_peer_is_refused() {
    let pair = Pair::new().await;
    let mut peer = pair.peer_of_b().await;
    let id = VmId::random();
    for bad in ["", "{}", "[]", "null", &"x".repeat(600_000), "{\"version\":1}", "<a/>", "\u{0}"] {
        let refused = peer.call("migration_prepare", &[text(id), text(bad)]).await;
        assert!(refused.is_err(), "{:?}", bad.get(..20));
    }
    for bad in ["", "x", "../../etc", "{00000000-0000-0000-0000-000000000000}"] {
        let fault = peer.refused("migration_prepare", &[text(bad), text("{}")]).await;
        assert!(fault.contains("INVALID_PARAMETER"), "{fault}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_cannot_take_a_vm_says_what_it_lacks_and_the_vm_runs_on() {
    let pair = Pair::new().await;
    let (mut a, mut b) = (pair.a.local(), pair.b.local());
    let refusal = async |vm: VmId, a: &mut Caller| {
        let fault = a.refused("migrate_vm", &pair.to_b(vm)).await;
        assert!(fault.contains("MIGRATION_REFUSED"), "{fault}");
        assert_eq!(pair.a.local().state_of(vm).await.as_deref(), Some("running"));
        fault
    };
    let with = |vm: VmId, changes: &[(&str, Value)]| {
        let Value::Struct(mut params) = vm_params(vm) else { panic!("no struct") };
        params.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        [text(REPO), text(vm), Value::Struct(params)]
    };

    let vm = pair.started().await;
    let other = VmId::random();
    let name = ("name", text(vm.as_str().replace('-', "")));
    b.ask("create_vm", &with(other, &[name])).await;
    assert!(refusal(vm, &mut a).await.contains("the name"));
    b.on_vm("delete_vm", other).await;
    let mac = ("vif", field(&vm_params(vm), "vif").clone());
    b.ask("create_vm", &with(other, &[mac])).await;
    assert!(refusal(vm, &mut a).await.contains("MAC address"));
    b.on_vm("delete_vm", other).await;
    b.create(vm).await;
    assert!(refusal(vm, &mut a).await.contains("exists"));
    b.on_vm("delete_vm", vm).await;

    let rule = Rule::next(Kind::HasDisk, Fate::Fail(WorldError::BadState("no disk".to_owned())));
    pair.b.world().add_rule(rule).await.unwrap();
    let fault = refusal(vm, &mut a).await;
    assert!(fault.contains("that host has not: disk /OVS/Repositories"), "{fault}");

    let wired = VmId::random();
    let vif = texts(["mac=02:00:00:11:22:33,bridge=xenbr7"]);
    a.ask("create_vm", &with(wired, &[("vif", vif)])).await;
    a.on_vm("start_vm", wired).await;
    assert!(refusal(wired, &mut a).await.contains("bridge xenbr7"));

    let (big, bigger) = (VmId::random(), VmId::random());
    let memory = |mib: i64| [("memory", int(mib)), ("maxmem", int(mib))];
    a.ask("create_vm", &with(big, &memory(20_000))).await;
    a.on_vm("start_vm", big).await;
    b.ask("create_vm", &with(bigger, &memory(50_000))).await;
    b.on_vm("start_vm", bigger).await;
    assert!(refusal(big, &mut a).await.contains("OUT_OF_MEMORY"));
    assert_eq!((a.locks().await, b.locks().await), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_migration_leaves_the_vm_running_where_it_was_and_nothing_there() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    pair.a.world().set_behaviour(Some(vm), slow(20_000)).await.unwrap();
    let mut a = pair.a.local();
    let id = a.submit("migrate_vm", &pair.to_b(vm), structure([])).await;
    until("it is under way", PATIENCE, async || {
        pair.b.way.bytes() > 100_000 && list(&pair.b.local().ask("job_list", &[]).await).len() > 1
    })
    .await;
    a.ask("job_cancel", &[int(id)]).await;
    let job = a.ask("job_wait", &[int(id), int(25)]).await;
    assert_eq!(string(field(&job, "state")), "cancelled", "{job:?}");
    assert_eq!(pair.decided(vm, "cancelled").await, "a");
    assert_eq!(pair.a.world().audit().await.unwrap().begun(vm), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toolstack_that_cannot_send_says_why_in_its_own_words() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    let rule = Rule::next(Kind::Export, Fate::Fail(WorldError::BadState("no log of dirty pages".to_owned())));
    pair.a.world().add_rule(rule).await.unwrap();
    let fault = pair.a.local().refused("migrate_vm", &pair.to_b(vm)).await;
    assert!(fault.contains("MIGRATION_FAILED") && fault.contains("no log of dirty pages"), "{fault}");
    assert_eq!(pair.decided(vm, "not sent").await, "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrations_are_bounded_on_their_way_out_and_in() {
    for (settings, name) in [
        ("[migration]\nmax_out = 1\n", "migration.max_out"),
        ("[migration]\nmax_out = 4\nmax_in = 1\n", "migration.max_in"),
    ] {
        let pair = Pair::with(settings).await;
        let (first, second) = (pair.started().await, pair.started().await);
        pair.a.world().set_behaviour(Some(first), slow(6000)).await.unwrap();
        let mut a = pair.a.local();
        a.submit("migrate_vm", &pair.to_b(first), structure([])).await;
        until("the first is under way", PATIENCE, async || pair.b.way.bytes() > 100_000).await;
        let fault = a.refused("migrate_vm", &pair.to_b(second)).await;
        assert!(fault.contains("MIGRATION_LIMIT") && fault.contains(name), "{fault}");
        assert_eq!(pair.decided(first, "the first").await, "b");
        a.ask("migrate_vm", &pair.to_b(second)).await;
        assert_eq!(pair.decided(second, "the second").await, "b");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_takes_longer_than_its_deadline_is_given_up() {
    let pair = Pair::with("[migration]\ndeadline_s = 1\n").await;
    let vm = pair.started().await;
    pair.a.world().set_behaviour(Some(vm), slow(60_000)).await.unwrap();
    let fault = pair.a.local().refused("migrate_vm", &pair.to_b(vm)).await;
    assert!(fault.contains("MIGRATION_FAILED") && fault.contains("longer than 1 s"), "{fault}");
    assert_eq!(pair.decided(vm, "given up").await, "a");
}
