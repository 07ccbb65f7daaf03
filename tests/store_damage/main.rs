//! The store under what happens to disks: torn ends, zeroed sectors, flipped bits, a full disk, a read-only
//! folder, and death at any moment. The rule in all: what was acknowledged is there, or the store says that it
//! was rebuilt and holds what the ledger held; never a panic, never silently something else.

// Clippy knows test functions, not their helpers; all of this file is a test.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[cfg(test)]
mod death;
#[cfg(test)]
mod disks;

use dom0d::store::{OpenError, Opened, Options, Range, Recovered, Store, StoreError, Table, Txn, tools};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Vm {
    name: String,
    generation: u64,
}

static VMS: Table<Vm> = Table::new("vm", 1);
static JOBS: Table<String> = Table::new("job", 1);
static EVENTS: Table<u64> = Table::new("event", 1);

fn options(dir: &Path) -> Options {
    Options { ledger_tables: &[("vm", 1)], counter_tables: &["job"], reserve_mib: 1, ..Options::new(dir) }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn opened(dir: &Path) -> Opened {
    Store::open(options(dir)).unwrap()
}

/// The nth commit of every test here: a new job, a changed VM, an event.
fn nth(n: u64) -> Txn {
    let mut txn = Txn::new();
    txn.put(&JOBS, &n, &job_text(n));
    txn.put(&VMS, format!("vm-{}", n % 7).as_str(), &vm(n));
    txn.append(&EVENTS, &(n * 3));
    txn
}

fn job_text(n: u64) -> String {
    format!("job {n} {}", "x".repeat(usize::try_from(n % 300).unwrap()))
}

fn vm(n: u64) -> Vm {
    Vm { name: format!("machine {}", n % 7), generation: n }
}

fn vms_after(last: u64) -> BTreeMap<String, Vm> {
    (1..=last).rev().take(7).map(|n| (format!("vm-{}", n % 7), vm(n))).collect()
}

async fn vms_in(store: &Store) -> BTreeMap<String, Vm> {
    let rows = store.scan(&VMS, Range::all()).await.unwrap();
    rows.into_iter().map(|(key, vm)| (String::from_utf8(key).unwrap(), vm)).collect()
}

/// The store holds exactly the first `last` commits.
async fn assert_holds(store: &Store, last: u64) {
    let jobs = store.scan(&JOBS, Range::all()).await.unwrap();
    assert_eq!(jobs.len() as u64, last);
    for (n, (key, text)) in (1..).zip(&jobs) {
        assert_eq!((key.as_slice(), text), (u64::to_be_bytes(n).as_slice(), &job_text(n)));
    }
    let events = store.scan(&EVENTS, Range::all()).await.unwrap();
    let expected: Vec<_> = (1..=last).map(|n| (n.to_be_bytes().to_vec(), n * 3)).collect();
    assert_eq!(events, expected);
    assert_eq!(vms_in(store).await, vms_after(last));
}

/// A small generator, so that a failing run can be named by its seed.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

const COMMITS: u64 = 700;

/// A folder with `COMMITS` commits, closed. Half of it was written before a first restart, so that the engine
/// has a snapshot and a log behind it.
fn template(runtime: &tokio::runtime::Runtime) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for half in [1..=COMMITS / 2, COMMITS / 2 + 1..=COMMITS] {
        let store = opened(folder.path()).store;
        runtime.block_on(async {
            for n in half {
                store.commit(nth(n)).await.unwrap();
            }
            store.close().await;
        });
    }
    folder
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[derive(Debug, Default, PartialEq)]
struct Outcomes {
    intact: u32,
    rebuilt: u32,
    /// Said to be intact before all rows were read: it is allowed so long only, and the machine was slow.
    not_all_read: u32,
}

/// Damages copies of one folder, opens each and holds it against the rule.
fn damage_runs(runs: u64, damage: impl Fn(&Path, &mut Seeded) -> String) -> Outcomes {
    let runtime = runtime();
    let template = template(&runtime);
    let mut outcomes = Outcomes::default();
    for seed in 0..runs {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(template.path(), folder.path());
        let what = damage(folder.path(), &mut Seeded(seed));
        let found = opened(folder.path());
        runtime.block_on(async {
            match &found.report.recovered {
                Recovered::Intact if found.report.verified_rows < found.report.rows => {
                    outcomes.not_all_read += 1;
                    found.store.close().await;
                    return;
                }
                Recovered::Intact => {
                    outcomes.intact += 1;
                    assert_holds(&found.store, COMMITS).await;
                    found.store.commit(nth(COMMITS + 1)).await.unwrap();
                }
                Recovered::Rebuilt { moved_aside, .. } => {
                    outcomes.rebuilt += 1;
                    assert!(moved_aside.join("db").exists(), "seed {seed}: {what}");
                    assert_eq!(vms_in(&found.store).await, vms_after(COMMITS), "seed {seed}: {what}");
                    let committed = found.store.commit(nth(COMMITS + 1)).await.unwrap();
                    assert!(committed.number > COMMITS, "seed {seed}: {what}");
                    assert!(committed.appended[0] > COMMITS, "seed {seed}: {what}");
                    assert!(found.report.counters["job"] > COMMITS, "seed {seed}: {what}");
                }
                other => panic!("seed {seed}: {what}: {other:?}"),
            }
            found.store.close().await;
        });
        // What was done about the damage lasts.
        let again = opened(folder.path());
        assert_eq!(again.report.recovered, Recovered::Intact, "seed {seed}: {what}");
        runtime.block_on(async {
            assert_eq!(vms_in(&again.store).await, vms_after(COMMITS + 1), "seed {seed}: {what}");
            again.store.close().await;
        });
    }
    outcomes
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("sled/db")
}

/// Where the log's content ends; sled pads its file.
fn content_end(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at as u64 + 1)
}

#[test]
fn a_torn_end_loses_nothing_silently() {
    let outcomes = damage_runs(60, |dir, seeded| {
        let path = log_file(dir);
        let end = content_end(&path);
        let most = if seeded.below(2) == 0 { 4096 } else { end };
        let cut = 1 + seeded.below(most);
        std::fs::File::options().write(true).open(&path).unwrap().set_len(end.saturating_sub(cut)).unwrap();
        format!("{cut} of {end} bytes cut off")
    });
    assert!(outcomes.rebuilt > 0, "the cuts never hit anything: {outcomes:?}");
}

#[test]
fn a_zeroed_sector_loses_nothing_silently() {
    let outcomes = damage_runs(60, |dir, seeded| {
        let path = log_file(dir);
        let sector = seeded.below(content_end(&path).div_ceil(512));
        let mut file = std::fs::File::options().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(sector * 512)).unwrap();
        file.write_all(&[0; 512]).unwrap();
        format!("sector {sector} zeroed")
    });
    // Whether any sector may go unmissed is the engine's affair: it lays out its file differently each time.
    assert!(outcomes.rebuilt > 0, "the sectors never held anything: {outcomes:?}");
}

#[test]
fn flipped_bits_lose_nothing_silently() {
    let outcomes = damage_runs(60, |dir, seeded| {
        let path = log_file(dir);
        let mut bytes = std::fs::read(&path).unwrap();
        let end = content_end(&path);
        let flips = 1 + seeded.below(8);
        for _ in 0..flips {
            let at = usize::try_from(seeded.below(end)).unwrap();
            bytes[at] ^= 1 << seeded.below(8);
        }
        std::fs::write(&path, bytes).unwrap();
        format!("{flips} bits flipped")
    });
    assert!(outcomes.rebuilt > 0, "{outcomes:?}");
}

#[test]
fn damage_beside_the_log_loses_nothing_silently() {
    damage_runs(40, |dir, seeded| {
        let beside = ["sled/conf", "witness", "ledger.0.json", "ledger.1.json", "reserve", "lock"];
        let mut files: Vec<PathBuf> = beside.iter().map(|name| dir.join(name)).collect();
        let engine = std::fs::read_dir(dir.join("sled")).unwrap().map(|entry| entry.unwrap().path());
        files.extend(engine.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("snap.")));
        let path = &files[usize::try_from(seeded.below(files.len() as u64)).unwrap()];
        let mut bytes = std::fs::read(path).unwrap_or_default();
        match seeded.below(3) {
            0 => std::fs::remove_file(path).unwrap_or_default(),
            1 => {
                let keep = seeded.below(bytes.len() as u64);
                bytes.truncate(usize::try_from(keep).unwrap());
                std::fs::write(path, bytes).unwrap();
            }
            _ => {
                let at = usize::try_from(seeded.below(bytes.len() as u64)).unwrap();
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << seeded.below(8);
                }
                std::fs::write(path, bytes).unwrap();
            }
        }
        format!("{} damaged", path.display())
    });
}

#[test]
fn check_finds_a_damaged_store_and_leaves_it_where_it_is() {
    let runtime = runtime();
    let folder = template(&runtime);
    assert_eq!(tools::check(folder.path()).unwrap().problems, Vec::<String>::new());
    let path = log_file(folder.path());
    let end = content_end(&path);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(end - 3000).unwrap();
    let report = tools::check(folder.path()).unwrap();
    assert!(!report.good());
    assert!(path.exists());
}

#[test]
fn a_lost_store_comes_back_from_the_ledger_and_at_most_three_damaged_ones_are_kept() {
    let runtime = runtime();
    let folder = template(&runtime);
    for _ in 0..5 {
        std::fs::write(log_file(folder.path()), b"not a log").unwrap();
        let found = opened(folder.path());
        assert!(matches!(found.report.recovered, Recovered::Rebuilt { .. }), "{:?}", found.report);
        runtime.block_on(async {
            assert_eq!(vms_in(&found.store).await, vms_after(COMMITS));
            found.store.close().await;
        });
    }
    let names = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_string_lossy().starts_with("damaged-")).count(), 3);
    std::fs::remove_dir_all(folder.path().join("sled")).unwrap();
    let found = opened(folder.path());
    assert!(matches!(found.report.recovered, Recovered::Rebuilt { .. }), "{:?}", found.report);
    runtime.block_on(found.store.close());
}

#[test]
fn a_folder_in_use_is_refused_by_name_and_left_alone() {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let first = opened(folder.path());
    let error = Store::open(options(folder.path())).unwrap_err();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(error.to_string().contains(&folder.path().display().to_string()));
    runtime.block_on(async {
        first.store.commit(nth(1)).await.unwrap();
        first.store.close().await;
        assert_eq!(first.store.commit(nth(2)).await, Err(StoreError::Closed));
    });
    let again = opened(folder.path());
    assert_eq!(again.report.recovered, Recovered::Intact);
    runtime.block_on(again.store.close());
}

#[test]
fn an_export_imports_to_the_same_rows_and_a_damaged_export_replaces_nothing() {
    let runtime = runtime();
    let folder = template(&runtime);
    let mut export = Vec::new();
    let rows = tools::export(folder.path(), &mut export).unwrap();
    assert_eq!(rows, COMMITS * 2 + 7);
    let target = tempfile::tempdir().unwrap();
    assert_eq!(tools::import(target.path(), export.as_slice(), false).unwrap(), rows);
    let found = opened(target.path());
    assert_eq!(found.report.recovered, Recovered::Intact);
    runtime.block_on(async {
        assert_holds(&found.store, COMMITS).await;
        // Numbers go on.
        assert_eq!(found.store.commit(nth(COMMITS + 1)).await.unwrap().appended, vec![COMMITS + 1]);
        found.store.close().await;
    });
    let refused = tools::import(target.path(), export.as_slice(), false);
    assert!(matches!(refused, Err(tools::ToolError::NotEmpty(_))), "{refused:?}");
    let mut seeded = Seeded(4);
    for _ in 0..20 {
        let mut bad = export.clone();
        let at = usize::try_from(seeded.below(bad.len() as u64)).unwrap();
        match seeded.below(2) {
            0 => bad[at] ^= 1 << seeded.below(7),
            _ => bad.truncate(at),
        }
        tools::import(target.path(), bad.as_slice(), true).unwrap_err();
    }
    let found = opened(target.path());
    assert_eq!(found.report.recovered, Recovered::Intact);
    runtime.block_on(async {
        assert_holds(&found.store, COMMITS + 1).await;
        found.store.close().await;
    });
    tools::import(target.path(), export.as_slice(), true).unwrap();
    let found = opened(target.path());
    assert_eq!(found.report.recovered, Recovered::Intact, "an import is not taken for an old store");
    runtime.block_on(async {
        assert_holds(&found.store, COMMITS).await;
        found.store.close().await;
    });
}

#[test]
fn a_ledger_can_be_read_by_people_and_keeps_two_copies() {
    let runtime = runtime();
    let folder = template(&runtime);
    let read = |copy| {
        let text = std::fs::read(folder.path().join(format!("ledger.{copy}.json"))).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()
    };
    let copies = [read(0), read(1)];
    let newest = copies.iter().max_by_key(|copy| copy["generation"].as_u64()).unwrap();
    assert_eq!(newest["commit"], COMMITS);
    assert_eq!(newest["counters"]["event"], COMMITS);
    assert_eq!(newest["tables"]["vm"]["vm-3"]["name"], "machine 3");
    assert_ne!(copies[0]["generation"], copies[1]["generation"]);
}
