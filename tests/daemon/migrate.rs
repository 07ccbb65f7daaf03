//! VMs go from one daemon to another and back, by real mutual TLS on loopback.

use crate::pair::*;
use crate::support::*;
use dom0d::api::value::{structure, text};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_goes_to_a_peer_and_back_and_its_downtime_is_told() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    pair.a.local().ask("migrate_vm", &pair.to_b(vm)).await;
    assert_eq!(pair.decided(vm, "there").await, "b");
    let id = pair.b.local().submit("migrate_vm", &pair.to_a(vm), structure([])).await;
    let job = pair.b.local().ask("job_wait", &[dom0d::api::value::int(id), dom0d::api::value::int(30)]).await;
    assert_eq!(string(field(&job, "state")), "succeeded", "{job:?}");
    assert!(number(field(field(&job, "result"), "downtime_ms")) < 5000);
    assert!(number(field(field(&job, "result"), "bytes")) > 500_000, "{job:?}");
    assert_eq!(pair.decided(vm, "back").await, "a");
    let told = pair.a.events("vm.migrated").await;
    assert_eq!(told.len(), 1, "{told:?}");
    let _ = text("");
}
