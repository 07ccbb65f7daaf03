//! F14 on the whole daemon: a damaged store, a folder that can only be read, a disk that is full.

use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::model::VmId;
use dom0d::sim::{Fate, Kind, Rule};
use dom0d::wire::Value;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MANAGER: &str = "0004fb0000010000aabbccddeeff0011";

/// The engine's data file.
fn data_file(home: &Home) -> PathBuf {
    let file = home.state.join("sled/db");
    assert!(file.is_file(), "{}", file.display());
    file
}

fn tear(home: &Home) {
    let file = std::fs::File::options().write(true).open(data_file(home)).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length / 3).unwrap();
}

fn zero(home: &Home) {
    let mut file = std::fs::File::options().write(true).open(data_file(home)).unwrap();
    // Wherever the data lies in the file, some of these are in it.
    let length = file.metadata().unwrap().len();
    for at in (0..length.min(256 * 1024)).step_by(4096) {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&[0; 512]).unwrap();
    }
}

async fn a_damaged_store(damage: impl Fn(&Home)) {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    let (on, off) = (VmId::random(), VmId::random());
    caller.create(on).await;
    caller.create(off).await;
    caller.on_vm("start_vm", on).await;
    caller.ask("take_ownership", &[text(MANAGER), text(NO_MANAGER)]).await;
    caller.ask("update_agent_password", &[text("oracle"), text("another-Passwort")]).await;
    let last_job = daemon.local().last_job().await;
    let last_event = number(field(&daemon.local().ask("event_list", &[structure([])]).await, "last"));
    let token = field(&daemon.local().ask("event_list", &[structure([])]).await, "token").clone();
    // The ledger is written behind the store, within a moment.
    let ledger = || {
        let read =
            |n| std::fs::read_to_string(home.state.join(format!("ledger.{n}.json"))).unwrap_or_default();
        let (a, b) = (read(0), read(1));
        [a, b].iter().any(|text| text.contains(MANAGER) && text.matches(REPO).count() >= 2)
    };
    until("the ledger has it all", PATIENCE, async || ledger()).await;
    assert_eq!(daemon.stop().await, Some(0));
    damage(&home);

    let daemon = home.start().await;
    let log = home.log();
    assert!(log.contains("the store was damaged"), "{log}");
    let mut caller = daemon.remote_as("another-Passwort");
    assert_eq!(caller.state_of(on).await.as_deref(), Some("running"));
    assert_eq!(caller.state_of(off).await.as_deref(), Some("off"));
    let host = caller.ask("host_get", &[]).await;
    assert_eq!(string(field(field(&host, "ownership"), "manager_uuid")), MANAGER);
    let page = caller.ask("event_list", &[structure([])]).await;
    let told = list(field(&page, "events")).iter().find(|e| string(field(e, "type")) == "store.rebuilt");
    let told = told.unwrap_or_else(|| panic!("{page:?}"));
    assert_eq!(string(field(told, "severity")), "critical");
    assert!(number(field(told, "number")) > last_event, "no number is given twice");
    // Whoever goes on by token is told at once that the history is another, gets all of it, and goes on from there.
    let page = caller.ask("event_wait", &[token.clone(), int(300)]).await;
    assert_eq!(field(&page, "lost"), &Value::Bool(true));
    assert!(list(field(&page, "events")).iter().any(|e| string(field(e, "type")) == "store.rebuilt"));
    assert_ne!(string(field(&page, "token")).split(':').next(), string(&token).split(':').next());
    let page = caller.ask("event_list", &[structure([("token", field(&page, "token").clone())])]).await;
    assert_eq!((field(&page, "lost"), field(&page, "gap")), (&Value::Bool(false), &Value::Nil));
    assert!(list(field(&caller.ask("store_check", &[]).await, "problems")).is_empty());
    let audit = home.world().audit().await.unwrap();
    assert_eq!((audit.begun(on), audit.begun(off)), (1, 0), "the domain was adopted");
    // And it works on, with new numbers.
    caller.on_vm("stop_vm", on).await;
    caller.on_vm("start_vm", off).await;
    assert!(caller.last_job().await > last_job, "no number is given twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_store_is_rebuilt_and_vms_ownership_and_password_are_back() {
    a_damaged_store(tear).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zeroed_store_is_rebuilt_and_vms_ownership_and_password_are_back() {
    a_damaged_store(zero).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_store_is_rebuilt_and_vms_ownership_and_password_are_back() {
    a_damaged_store(|home| std::fs::remove_dir_all(home.state.join("sled")).unwrap()).await;
}

/// A disk of its own, in memory; gone with this.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(mib: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m,mode=700");
        let mounted =
            mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(size.as_str()));
        mounted
            .unwrap_or_else(|error| panic!("this test mounts a disk of its own, so it needs root: {error}"));
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn remount(&self, flags: MsFlags) {
        mount(None::<&str>, self.path(), None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).unwrap();
    }

    fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        while file.write_all(&[7; 64 * 1024]).is_ok() {}
        while file.write_all(&[7; 512]).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // One over the other, if the test did not come to its end.
        while umount2(self.path(), MntFlags::MNT_DETACH).is_ok() {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_disk_that_can_only_be_read_reads_are_answered_and_changes_refused_with_the_reason() {
    let disk = Disk::new(64);
    let home = Home::with_state(disk.path().join("state"));
    let daemon = home.start().await;
    let vm = VmId::random();
    let mut caller = daemon.remote();
    caller.create(vm).await;
    caller.on_vm("start_vm", vm).await;
    until("the ledger has it", PATIENCE, async || {
        let read =
            |n| std::fs::read_to_string(home.state.join(format!("ledger.{n}.json"))).unwrap_or_default();
        (0..2).any(|n| read(n).contains(&vm.to_string()) && read(n).contains("\"on\""))
    })
    .await;
    assert_eq!(daemon.stop().await, Some(0));
    // The world's log is open for writing; it must not keep the disk from becoming read-only.
    let bind = MsFlags::MS_BIND;
    mount(Some(disk.path()), disk.path(), None::<&str>, bind, None::<&str>).unwrap();
    disk.remount(MsFlags::MS_BIND | MsFlags::MS_RDONLY);
    assert!(std::fs::write(home.state.join("x"), "").is_err());

    let daemon = home.start().await;
    let mut caller = daemon.remote();
    assert_eq!(caller.state_of(vm).await.as_deref(), Some("running"));
    assert_eq!(list(&caller.ask("list_vms", &[]).await).len(), 2);
    let host = caller.ask("host_get", &[]).await;
    assert!(string(field(field(&host, "agent"), "store")).starts_with("read-only: "), "{host:?}");
    for (verb, params) in [
        ("stop_vm", vec![text(REPO), text(vm)]),
        ("create_vm", vec![text(REPO), text(VmId::random()), structure([])]),
        ("update_server_roles", vec![text("xen")]),
    ] {
        let refused = caller.refused(verb, &params).await;
        assert!(refused.contains("STORE_READ_ONLY") && refused.contains("cannot be written"), "{refused}");
    }
    assert_eq!(home.world().audit().await.unwrap().begun(vm), 1);
    assert!(home.log().contains("can only be read"), "{}", home.log());
    daemon.kill().await;

    umount2(disk.path(), MntFlags::MNT_DETACH).unwrap();
    let daemon = home.start().await;
    daemon.remote().on_vm("stop_vm", vm).await;
    assert_eq!(daemon.local().state_of(vm).await.as_deref(), Some("off"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_new_vms_are_refused_nothing_is_lost_and_a_vm_can_still_be_stopped() {
    let disk = Disk::new(96);
    let home = Home::with_state(disk.path().join("state"));
    let daemon = home.start().await;
    let (on, off) = (VmId::random(), VmId::random());
    let mut caller = daemon.remote();
    caller.until_settled().await;
    caller.create(on).await;
    caller.create(off).await;
    caller.on_vm("start_vm", on).await;
    let filler = disk.fill();

    let new = VmId::random();
    let mut said = String::new();
    until("a new VM is refused", PATIENCE, async || {
        match caller.call("create_vm", &[text(REPO), text(new), vm_params(new)]).await {
            // The room is looked at every 100 ms, and the disk has just been filled.
            Ok(_) => drop(caller.on_vm("delete_vm", new).await),
            Err(error) => said = error.to_string(),
        }
        said.contains("DISK_FULL")
    })
    .await;
    assert_eq!(caller.state_of(new).await, None);
    assert_eq!(caller.state_of(off).await.as_deref(), Some("off"));
    caller.on_vm("stop_vm", on).await;
    assert_eq!(caller.state_of(on).await.as_deref(), Some("off"));
    // Also after a restart on the disk that is still full.
    daemon.kill().await;
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    assert_eq!(list(&caller.ask("vm_list", &[]).await).len(), 2);
    assert_eq!(caller.state_of(on).await.as_deref(), Some("off"));
    caller.on_vm("delete_vm", off).await;

    std::fs::remove_file(filler).unwrap();
    until("there is room again", Duration::from_secs(60), async || {
        caller.call("create_vm", &[text(REPO), text(new), vm_params(new)]).await.is_ok()
    })
    .await;
    caller.on_vm("start_vm", new).await;
    assert_eq!(caller.state_of(new).await.as_deref(), Some("running"));
    let names: Vec<_> = list(&caller.ask("vm_list", &[]).await).to_vec();
    assert_eq!(names.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_what_was_accepted_before_lets_go_of_its_locks_so_that_a_vm_can_be_stopped() {
    let disk = Disk::new(96);
    let home = Home::with_state(disk.path().join("state"));
    let daemon = home.start().await;
    let vm = VmId::random();
    let mut caller = daemon.remote();
    caller.until_settled().await;
    caller.create(vm).await;
    caller.on_vm("start_vm", vm).await;
    home.world().add_rule(Rule::next(Kind::Pause, Fate::DelayMs(10_000)).of_vm(vm)).await.unwrap();
    let named = [text(REPO), text(vm)];
    let pause = caller.submit("pause_vm", &named, structure([])).await;
    let unpause = caller.submit("unpause_vm", &named, structure([])).await;
    let stop = caller.submit("stop_vm", &[text(REPO), text(vm), Value::Bool(true)], structure([])).await;
    disk.fill();
    let mut ends = Vec::new();
    for job in [pause, unpause, stop] {
        let ended = caller.ask("job_wait", &[int(job), Value::Int(120)]).await;
        ends.push(format!("{} {:?}", string(field(&ended, "state")), field(&ended, "fault")));
    }
    assert!(ends[0].starts_with("succeeded"), "it had begun: {ends:?}");
    assert!(ends[1].starts_with("failed") && ends[1].contains("DISK_FULL"), "{ends:?}");
    assert!(ends[2].starts_with("succeeded"), "{ends:?}");
    assert_eq!(caller.state_of(vm).await.as_deref(), Some("off"));
    assert_eq!(caller.locks().await, 0);
}
