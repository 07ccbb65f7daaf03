//! F24: a crowd of clients, each with a handful of random verbs on the same few VMs.

use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::model::VmId;
use dom0d::sim::Behaviour;
use dom0d::wire::{ClientError, Value};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout};

const CLIENTS: u64 = 200;
const CALLS: u64 = 20;
const VMS: usize = 20;
/// All of it, or there is a deadlock.
const DEADLINE: Duration = Duration::from_secs(300);
/// A wait is no longer than others by so much if the machine has stood still.
const STOOD_STILL: Duration = Duration::from_secs(20);

/// splitmix64: a run is named by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % bound as u64).unwrap()
    }
}

/// A verb with its parameters, and whether it waits for the VM's lock.
fn any(random: &mut Random, vm: VmId) -> (&'static str, Vec<Value>, bool) {
    let on = |more: Vec<Value>| [vec![text(REPO), text(vm)], more].concat();
    match random.below(20) {
        0..3 => ("start_vm", on(vec![]), true),
        3 => ("stop_vm", on(vec![]), true),
        4 | 5 => ("stop_vm", on(vec![Value::Bool(true)]), true),
        6 => ("pause_vm", on(vec![]), true),
        7 => ("unpause_vm", on(vec![]), true),
        8 => ("reboot_vm", on(vec![]), true),
        9 => ("save_vm", on(vec![]), true),
        10 => ("restore_vm", on(vec![]), true),
        11 => {
            ("configure_vm", on(vec![structure([("cpu_weight", int(random.below(1000) as u64 + 1))])]), true)
        }
        12 => ("configure_vm_ha", on(vec![Value::Bool(random.below(2) == 0)]), true),
        13 => ("send_to_guest", on(vec![structure([("k", text("v"))])]), true),
        14 => ("list_vm", on(vec![]), false),
        15 => ("vm_get", vec![text(vm)], false),
        16 => ("list_vms", vec![], false),
        17 => ("job_list", vec![structure([("limit", int(5))])], false),
        18 => ("lock_list", vec![], false),
        _ => ("get_vm_config", on(vec![]), false),
    }
}

/// The waits of one client's changes.
async fn one(mut caller: Caller, seed: u64, calls: u64, vms: Arc<Vec<VmId>>) -> Vec<Duration> {
    let mut random = Random(seed);
    let mut waits = Vec::new();
    for _ in 0..calls {
        let vm = vms[random.below(VMS)];
        let (verb, params, change) = any(&mut random, vm);
        let began = Instant::now();
        match caller.0.call(verb, &params, DEADLINE).await {
            Ok(_) => {}
            // Another client was there first.
            Err(ClientError::Fault(fault)) if fault.fault_string.contains("VM_STATE: ") => {}
            Err(error) => panic!("seed {seed}: {verb}: {error}"),
        }
        if change {
            waits.push(began.elapsed());
        }
    }
    waits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_clients_on_twenty_vms_all_come_through_and_leave_nothing_behind() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut local = daemon.local();
    let quick = Behaviour { boot_ms: 0, shutdown_ms: 1, ..Behaviour::default() };
    home.world().set_behaviour(None, quick).await.unwrap();
    let vms: Arc<Vec<VmId>> = Arc::new((0..VMS).map(|_| VmId::random()).collect());
    for vm in vms.iter() {
        local.create(*vm).await;
    }
    // A smaller crowd first, so that the base is that of a daemon that has worked.
    let early = (0..CLIENTS).map(|n| tokio::spawn(one(daemon.remote(), n, 3, Arc::clone(&vms))));
    for client in futures_util::future::join_all(early).await {
        client.unwrap();
    }
    local.until_idle().await;
    let base = (daemon.status("VmRSS"), daemon.open_files(), daemon.status("Threads"));

    let began = Instant::now();
    let clients: Vec<_> =
        (0..CLIENTS).map(|n| tokio::spawn(one(daemon.remote(), 1000 + n, CALLS, Arc::clone(&vms)))).collect();
    let mut waits = Vec::new();
    let all = async {
        for client in clients {
            waits.extend(client.await.unwrap());
        }
    };
    if timeout(DEADLINE, all).await.is_err() {
        panic!("not through within {DEADLINE:?}; locks: {:#?}", local.ask("lock_list", &[]).await);
    }
    waits.sort_unstable();
    let (median, most) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    println!(
        "{} calls in {:?}; waits for changes: median {median:?}, longest {most:?}",
        CLIENTS * CALLS,
        began.elapsed()
    );
    assert!(
        most <= median * 10 + STOOD_STILL,
        "nobody waits far longer than others: median {median:?}, longest {most:?}"
    );

    local.until_idle().await;
    assert_eq!(local.locks().await, 0);
    let audit = home.world().audit().await.unwrap();
    assert_eq!(audit.doubled(), []);
    assert_eq!(audit.refused_doubles, 0);
    for vm in vms.iter() {
        let state = local.state_of(*vm).await.unwrap();
        let word = state_word(domain(&home.world(), *vm).await.as_ref());
        assert!(
            state == word || (state == "saved" && word == "off"),
            "{vm} is {state}, its domain is {word}"
        );
    }
    // Idle threads end after ten seconds, connections at once.
    let limit = Duration::from_secs(25);
    until("files are closed", limit, async || daemon.open_files() <= base.1 + 4).await;
    until("threads end", limit, async || daemon.status("Threads") <= base.2 + 2).await;
    let rss = daemon.status("VmRSS");
    println!(
        "memory: {} KiB before, {rss} KiB after; files: {} before, {} after",
        base.0,
        base.1,
        daemon.open_files()
    );
    assert!(rss <= base.0 + 16 * 1024, "memory: {} KiB before, {rss} KiB after", base.0);
}
