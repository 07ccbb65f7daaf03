//! Disks of our own making, full or read-only. They need root, and say so instead of passing without having looked.

use super::{assert_holds, nth, options, runtime, vms_after, vms_in};
use dom0d::store::{Mode, Options, Recovered, Store, StoreError, Txn};
use std::path::{Path, PathBuf};

/// A small tmpfs that only this thread, and threads it starts, can see; gone with them.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn new(mib: u32) -> Self {
        use nix::mount::{MsFlags, mount};
        assert!(nix::unistd::Uid::effective().is_root(), "this test mounts a small disk and needs root");
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace (needs root)");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(size.as_str())).unwrap();
        Self { folder }
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn remount(&self, flags: nix::mount::MsFlags) {
        let none = None::<&str>;
        let flags = flags | nix::mount::MsFlags::MS_REMOUNT;
        nix::mount::mount(none, self.folder.path(), none, flags, none).unwrap();
    }

    /// Takes space until only `left` bytes are free.
    fn fill(&self, left: u64) {
        let stat = nix::sys::statvfs::statvfs(self.folder.path()).unwrap();
        let free = stat.blocks_available() * stat.fragment_size();
        let file = std::fs::File::options().create(true).append(true).open(self.ballast()).unwrap();
        let length = file.metadata().unwrap().len() + free.saturating_sub(left);
        nix::fcntl::posix_fallocate(&file, 0, i64::try_from(length).unwrap()).unwrap();
    }

    fn empty(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.folder.path().join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Else the folder could not be removed.
        let _ = nix::mount::umount2(self.folder.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn small_disk_options(dir: &Path) -> Options {
    Options { reserve_mib: 6, ..options(dir) }
}

fn essential(n: u64) -> Txn {
    let mut txn = nth(n);
    txn.set_importance(dom0d::store::Importance::Essential);
    txn
}

/// Commits `next(n + 1)` until one is refused; how many are there now, and why.
async fn commit_until_refused(store: &Store, mut n: u64, next: impl Fn(u64) -> Txn) -> (u64, StoreError) {
    loop {
        match store.commit(next(n + 1)).await {
            Ok(_) => n += 1,
            Err(error) => return (n, error),
        }
    }
}

#[test]
fn on_a_full_disk_essential_work_goes_on_and_nothing_acknowledged_is_lost() {
    let disk = SmallDisk::new(40);
    let runtime = runtime();
    let found = Store::open(small_disk_options(&disk.dir())).unwrap();
    let store = found.store;
    let last = runtime.block_on(async {
        store.commit(nth(1)).await.unwrap();
        assert!(disk.dir().join("reserve").exists());
        disk.fill(1024 * 1024);
        let mut mode = store.mode();
        // The look at the disk is at most 100 ms old: some commits may still pass.
        let (mut n, refused) = commit_until_refused(&store, 1, nth).await;
        assert!(matches!(refused, StoreError::DiskFull(_)), "{refused}");
        assert_eq!(*mode.borrow_and_update(), Mode::LowSpace);
        assert!(!disk.dir().join("reserve").exists(), "the reserve was not given back");
        for _ in 0..20 {
            n += 1;
            store.commit(essential(n)).await.unwrap();
        }
        disk.empty();
        mode.wait_for(|mode| *mode == Mode::Normal).await.unwrap();
        assert!(disk.dir().join("reserve").exists(), "the reserve was not made again");
        n += 1;
        store.commit(nth(n)).await.unwrap();
        // Now to the last byte, more than once, since each refusal gives the reserve back.
        disk.fill(0);
        let (n, _) = commit_until_refused(&store, n, nth).await;
        disk.fill(0);
        let (n, refused) = commit_until_refused(&store, n, essential).await;
        assert!(matches!(refused, StoreError::DiskFull(_)), "{refused}");
        assert_holds(&store, n).await;
        store.close().await;
        n
    });
    disk.fill(0);
    let full = Store::open(small_disk_options(&disk.dir())).unwrap();
    runtime.block_on(async {
        match &full.report.recovered {
            Recovered::Intact => assert_holds(&full.store, last).await,
            // The engine could not even open; then it says so, and nothing was moved.
            Recovered::ReadOnly { .. } => assert_eq!(vms_in(&full.store).await.len(), 7),
            other => panic!("{other:?}"),
        }
        full.store.close().await;
    });
    disk.empty();
    let again = Store::open(small_disk_options(&disk.dir())).unwrap();
    assert_eq!(again.report.recovered, Recovered::Intact);
    runtime.block_on(async {
        assert_holds(&again.store, last).await;
        again.store.close().await;
    });
}

#[test]
fn a_read_only_folder_is_read_from_the_ledger_and_every_commit_is_refused() {
    let disk = SmallDisk::new(40);
    let runtime = runtime();
    let store = Store::open(options(&disk.dir())).unwrap().store;
    runtime.block_on(async {
        for n in 1..=20 {
            store.commit(nth(n)).await.unwrap();
        }
        store.close().await;
    });
    disk.remount(nix::mount::MsFlags::MS_RDONLY);
    let found = Store::open(options(&disk.dir())).unwrap();
    assert!(matches!(found.report.recovered, Recovered::ReadOnly { .. }), "{:?}", found.report);
    runtime.block_on(async {
        assert_eq!(vms_in(&found.store).await, vms_after(20));
        let refused = found.store.commit(nth(21)).await;
        assert!(matches!(refused, Err(StoreError::ReadOnly(_))), "{refused:?}");
        assert!(matches!(&*found.store.mode().borrow(), Mode::ReadOnly { .. }));
        found.store.close().await;
    });
    disk.remount(nix::mount::MsFlags::empty());
    let again = Store::open(options(&disk.dir())).unwrap();
    assert_eq!(again.report.recovered, Recovered::Intact);
    runtime.block_on(async {
        assert_holds(&again.store, 20).await;
        again.store.close().await;
    });
}
