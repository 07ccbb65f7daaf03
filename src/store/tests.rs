//! The engines' contract, run on both bodies, and the store against a model.

use super::core::{Core, Numbers};
use super::engine::{Batch, Engine, Range, TableBatch};
use super::memory::MemoryEngine;
use super::options::{Opened, Options, Recovered};
use super::sled_engine::SledEngine;
use super::{Mode, Store, StoreError, Table, Txn};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Bound;

static WORDS: Table<String> = Table::new("word", 1);
static NUMBERS: Table<u64> = Table::new("number", 1);
static LOG: Table<String> = Table::new("log", 1);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn on_disk(dir: &std::path::Path) -> Opened {
    let options = Options { ledger_tables: &[("word", 1)], reserve_mib: 1, ..Options::new(dir) };
    Store::open(options).unwrap()
}

fn batch(table: &str, rows: &[(&[u8], Option<&[u8]>)], head: &[u8]) -> Batch {
    let rows = rows.iter().map(|(key, value)| (key.to_vec(), value.map(<[u8]>::to_vec))).collect();
    Batch { tables: BTreeMap::from([(table.to_owned(), TableBatch { rows, head: head.to_vec() })]) }
}

/// What any engine must do.
fn contract(engine: &dyn Engine) {
    assert_eq!(engine.tables().unwrap(), Vec::<String>::new());
    assert_eq!(engine.get("a", b"k").unwrap(), None);
    assert_eq!(engine.head("a").unwrap(), None);
    assert_eq!(engine.scan("a", &Range::all().limit(9)).unwrap(), vec![]);
    let lowest: &[u8] = &[0];
    let highest: &[u8] = &[0xff, 0xff];
    engine
        .apply(&batch("a", &[(b"k", Some(b"1")), (lowest, Some(b"2")), (highest, Some(b"3"))], b"h1"))
        .unwrap();
    engine.sync().unwrap();
    assert_eq!(engine.get("a", b"k").unwrap().as_deref(), Some(b"1".as_slice()));
    assert_eq!(engine.head("a").unwrap().as_deref(), Some(b"h1".as_slice()), "no row collides with the head");
    let keys = |range: Range| -> Vec<Vec<u8>> {
        engine.scan("a", &range.limit(512)).unwrap().into_iter().map(|(key, _)| key).collect()
    };
    let all = vec![lowest.to_vec(), b"k".to_vec(), highest.to_vec()];
    assert_eq!(keys(Range::all()), all);
    assert_eq!(keys(Range::all().reversed()), all.iter().rev().cloned().collect::<Vec<_>>());
    assert_eq!(keys(Range::after(b"k".to_vec())), vec![highest.to_vec()]);
    assert_eq!(keys(Range::before(b"k".to_vec())), vec![lowest.to_vec()]);
    let backwards =
        Range { from: Bound::Included(b"z".to_vec()), to: Bound::Included(b"a".to_vec()), ..Range::all() };
    assert_eq!(keys(backwards), Vec::<Vec<u8>>::new(), "a range with its ends swapped is empty");
    engine.apply(&batch("a", &[(b"k", None), (b"none", None)], b"h2")).unwrap();
    assert_eq!(engine.get("a", b"k").unwrap(), None);
    assert_eq!(engine.head("a").unwrap().as_deref(), Some(b"h2".as_slice()));
    engine.apply(&batch("b", &[], b"only a head")).unwrap();
    assert_eq!(engine.tables().unwrap(), vec!["a".to_owned(), "b".to_owned()]);
    assert_eq!(engine.scan("b", &Range::all().limit(9)).unwrap(), vec![]);
}

#[test]
fn the_memory_engine_keeps_the_contract() {
    contract(&MemoryEngine::default());
}

#[test]
fn the_disk_engine_keeps_the_contract_and_its_content() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("sled");
    contract(&SledEngine::open(&dir, 1 << 20).unwrap());
    let again = SledEngine::open(&dir, 1 << 20).unwrap();
    assert_eq!(again.head("a").unwrap().as_deref(), Some(b"h2".as_slice()));
    assert_eq!(again.tables().unwrap(), vec!["a".to_owned(), "b".to_owned()]);
}

#[derive(Debug, Clone)]
enum Action {
    /// Changes of one transaction: key and value of a put, key of a delete, value of an append.
    Commit(Vec<Change>),
    /// The daemon dies and starts again.
    Crash,
}

#[derive(Debug, Clone)]
enum Change {
    Put(u8, String),
    PutNumber(u64, u64),
    Delete(u8),
    Append(String),
}

fn action() -> impl Strategy<Value = Action> {
    let change = prop_oneof![
        (0..20u8, "[a-z]{0,40}").prop_map(|(key, value)| Change::Put(key, value)),
        (0..9u64, any::<u64>()).prop_map(|(key, value)| Change::PutNumber(key, value)),
        (0..20u8).prop_map(Change::Delete),
        "[a-z]{0,20}".prop_map(Change::Append),
    ];
    prop_oneof![
        9 => proptest::collection::vec(change, 1..8).prop_map(Action::Commit),
        1 => Just(Action::Crash),
    ]
}

#[derive(Debug, Default)]
struct Model {
    words: BTreeMap<u8, String>,
    numbers: BTreeMap<u64, u64>,
    log: Vec<String>,
    commits: u64,
}

impl Model {
    fn apply(&mut self, changes: &[Change]) -> (Txn, Vec<u64>) {
        let (mut txn, mut appended) = (Txn::new(), Vec::new());
        for change in changes {
            match change {
                Change::Put(key, value) => {
                    txn.put(&WORDS, [*key].as_slice(), value);
                    self.words.insert(*key, value.clone());
                }
                Change::PutNumber(key, value) => {
                    txn.put(&NUMBERS, key, value);
                    self.numbers.insert(*key, *value);
                }
                Change::Delete(key) => {
                    txn.delete(&WORDS, [*key].as_slice());
                    self.words.remove(key);
                }
                Change::Append(value) => {
                    txn.append(&LOG, value);
                    self.log.push(value.clone());
                    appended.push(self.log.len() as u64);
                }
            }
        }
        self.commits += 1;
        (txn, appended)
    }

    async fn assert_same(&self, store: &Store) {
        let words = store.scan(&WORDS, Range::all()).await.unwrap();
        let expected: Vec<_> = self.words.iter().map(|(key, value)| (vec![*key], value.clone())).collect();
        assert_eq!(words, expected);
        assert_eq!(store.count("word").await.unwrap(), self.words.len() as u64);
        for key in 0..20 {
            let got = store.get(&WORDS, [key].as_slice()).await.unwrap();
            assert_eq!(got.as_ref(), self.words.get(&key));
        }
        let last_key = store.last_key("number").await.unwrap();
        assert_eq!(last_key, self.numbers.keys().last().map(|key| key.to_be_bytes().to_vec()));
        let log = store.scan(&LOG, Range::all().reversed()).await.unwrap();
        let expected: Vec<_> = (1u64..).zip(self.log.iter().cloned()).collect();
        let expected: Vec<_> =
            expected.into_iter().rev().map(|(n, v)| (n.to_be_bytes().to_vec(), v)).collect();
        assert_eq!(log, expected);
        assert_eq!(*store.sequence("log").borrow(), self.log.len() as u64);
    }
}

/// Runs actions on a store and a model; `crash` makes the store of after a crash.
async fn against_model(actions: &[Action], mut store: Store, mut crash: impl AsyncFnMut(Store) -> Store) {
    let mut model = Model::default();
    for action in actions {
        match action {
            Action::Commit(changes) => {
                let (txn, appended) = model.apply(changes);
                let committed = store.commit(txn).await.unwrap();
                assert_eq!((committed.number, committed.appended), (model.commits, appended));
            }
            Action::Crash => {
                store = crash(store).await;
                model.assert_same(&store).await;
            }
        }
    }
    model.assert_same(&store).await;
    store.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_store_in_memory_is_what_the_model_is(actions in proptest::collection::vec(action(), 1..40)) {
        runtime().block_on(against_model(&actions, Store::memory(), async |old: Store| {
            let new = old.crash_copy();
            assert_eq!(old.commit(Txn::new()).await, Err(StoreError::Closed));
            assert_eq!(old.get(&WORDS, "x").await, Err(StoreError::Closed));
            new
        }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn a_store_on_disk_is_what_the_model_is(actions in proptest::collection::vec(action(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let store = on_disk(folder.path()).store;
        runtime().block_on(against_model(&actions, store, async |old: Store| {
            old.close().await;
            let opened = on_disk(folder.path());
            assert_eq!(opened.report.recovered, Recovered::Intact);
            opened.store
        }));
    }
}

#[test]
fn many_committers_at_once_get_numbers_without_holes_in_commit_order() {
    let folder = tempfile::tempdir().unwrap();
    let store = on_disk(folder.path()).store;
    runtime().block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..64u64 {
            let store = store.clone();
            tasks.spawn(async move {
                let mut given = Vec::new();
                for n in 0..20 {
                    let mut txn = Txn::new();
                    txn.append(&LOG, &format!("{task} {n}"));
                    txn.put(&NUMBERS, &(task * 100 + n), &n);
                    let committed = store.commit(txn).await.unwrap();
                    given.push((committed.number, committed.appended[0]));
                }
                given
            });
        }
        let mut given: Vec<(u64, u64)> = tasks.join_all().await.into_iter().flatten().collect();
        given.sort_unstable();
        let expected: Vec<(u64, u64)> = (1..=1280).map(|n| (n, n)).collect();
        assert_eq!(given, expected);
        store.close().await;
    });
}

#[test]
fn one_refused_transaction_does_not_hurt_its_group() {
    let core = Core::new(Box::new(MemoryEngine::default()), Numbers::default(), Mode::Normal);
    let put = |key: &str, value: &str| {
        let mut txn = Txn::new();
        txn.put(&WORDS, key, &value.to_owned());
        txn
    };
    let mut unencodable = Txn::new();
    unencodable.put(&Table::<BTreeMap<Vec<u8>, u8>>::new("map", 1), "k", &BTreeMap::from([(vec![1], 1)]));
    let group = [put("a", "1"), put("b", &"x".repeat(300 * 1024)), unencodable, put("", "x"), put("c", "2")];
    let results = core.commit_group(&group).unwrap();
    let numbers: Vec<Option<u64>> =
        results.iter().map(|result| result.as_ref().ok().map(|committed| committed.number)).collect();
    assert_eq!(numbers, [Some(1), None, None, None, Some(2)]);
    assert!(matches!(&results[1], Err(StoreError::Refused(why)) if why.contains("word")), "{results:?}");
    assert_eq!(core.numbers().tables["word"].rows, 2);
}

#[test]
fn rows_are_counted_while_a_commit_waits_for_its_disk() {
    let store = Store::memory();
    runtime().block_on(async {
        let mut txn = Txn::new();
        txn.append(&LOG, &"x".to_owned());
        store.commit(txn).await.unwrap();
    });
    // As the writer holds them over the sync.
    let held = store.core.numbers();
    let (tell, told) = std::sync::mpsc::channel();
    let asks = store.clone();
    std::thread::spawn(move || tell.send(runtime().block_on(asks.count("log"))));
    let count = told.recv_timeout(std::time::Duration::from_secs(20));
    drop(held);
    assert_eq!(count.expect("it does not wait").unwrap(), 1);
}

#[test]
fn pruning_keeps_the_rest_and_never_restarts_numbers() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let append = async |store: &Store, rows: usize| {
            let mut txn = Txn::new();
            (0..rows).for_each(|_| txn.append(&LOG, &"x".to_owned()));
            store.commit(txn).await.unwrap().appended
        };
        let store = on_disk(folder.path()).store;
        append(&store, 1000).await;
        let keep_from = 901u64.to_be_bytes().to_vec();
        assert_eq!(store.prune(&LOG, keep_from.clone(), 300).await.unwrap(), 300);
        assert_eq!(store.prune(&LOG, keep_from.clone(), 9999).await.unwrap(), 600);
        assert_eq!(store.first_key("log").await.unwrap(), Some(keep_from));
        assert_eq!(store.count("log").await.unwrap(), 100);
        assert_eq!(store.prune(&LOG, vec![0xff; 9], 9999).await.unwrap(), 100);
        assert_eq!(store.first_key("log").await.unwrap(), None);
        store.close().await;
        let store = on_disk(folder.path()).store;
        assert_eq!(append(&store, 1).await, vec![1001]);
        store.close().await;
    });
}

#[test]
fn a_scan_longer_than_a_page_has_every_row_once_and_keeps_its_limit() {
    runtime().block_on(async {
        let store = Store::memory();
        let mut txn = Txn::new();
        (0..1500u64).for_each(|n| txn.put(&NUMBERS, &n, &n));
        store.commit(txn).await.unwrap();
        let numbers = async |range| -> Vec<u64> {
            store.scan(&NUMBERS, range).await.unwrap().into_iter().map(|(_, n)| n).collect()
        };
        assert_eq!(numbers(Range::all()).await, (0..1500).collect::<Vec<_>>());
        assert_eq!(numbers(Range::all().reversed()).await, (0..1500).rev().collect::<Vec<_>>());
        assert_eq!(numbers(Range::all().limit(700)).await, (0..700).collect::<Vec<_>>());
        assert_eq!(numbers(Range::all().reversed().limit(513)).await, (987..1500).rev().collect::<Vec<_>>());
        assert_eq!(numbers(Range::all().limit(0)).await, Vec::<u64>::new());
    });
}

#[test]
fn a_value_of_an_older_schema_is_an_error_and_not_a_guess() {
    runtime().block_on(async {
        let store = Store::memory();
        let mut txn = Txn::new();
        txn.put(&WORDS, "k", &"v".to_owned());
        store.commit(txn).await.unwrap();
        let newer: Table<String> = Table::new("word", 2);
        assert!(matches!(store.get(&newer, "k").await, Err(StoreError::Damaged(_))));
    });
}

#[test]
fn heads_that_disagree_and_rows_that_do_not_add_up_are_found() {
    let engine = MemoryEngine::default();
    let core = Core::new(Box::new(MemoryEngine::default()), Numbers::default(), Mode::Normal);
    let mut txn = Txn::new();
    txn.put(&WORDS, "a", &"1".to_owned());
    txn.put(&NUMBERS, &1, &1);
    core.commit_group(&[txn]).unwrap()[0].as_ref().unwrap();
    // A copy of it, but with one table left out, as if the batch was torn.
    let copy = |engine: &MemoryEngine, from: &dyn Engine, skip: &str| {
        for table in from.tables().unwrap().iter().filter(|table| *table != skip) {
            let rows = from.scan(table, &Range::all().limit(512)).unwrap();
            let rows = rows.into_iter().map(|(key, value)| (key, Some(value))).collect();
            let head = from.head(table).unwrap().unwrap();
            let tables = BTreeMap::from([(table.clone(), TableBatch { rows, head })]);
            engine.apply(&Batch { tables }).unwrap();
        }
        Ok(())
    };
    core.read(|from| copy(&engine, from, "word")).unwrap();
    assert!(matches!(Numbers::load(&engine), Err(StoreError::Damaged(_))));
    core.read(|from| copy(&engine, from, "")).unwrap();
    let numbers = Numbers::load(&engine).unwrap();
    let far = std::time::Instant::now() + std::time::Duration::from_secs(60);
    assert_eq!(super::verify::verify(&engine, &numbers, &[], far, 100).unwrap(), 2);
    // The row goes back to an older value: its envelope is whole, only the sum tells.
    let head = engine.head("word").unwrap().unwrap();
    engine.apply(&batch("word", &[(b"a", Some(&super::envelope::seal(1, b"\"0\"")))], &head)).unwrap();
    assert!(super::verify::verify(&engine, &numbers, &[], far, 100).is_err());
}

#[test]
fn a_ledger_gives_back_every_row_whatever_its_key() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let store = on_disk(folder.path()).store;
        let keys: Vec<Vec<u8>> =
            vec![b"plain".to_vec(), b"hex:00".to_vec(), vec![0, 1, 0xff], "é".into(), b"a\"b".to_vec()];
        let mut txn = Txn::new();
        keys.iter().for_each(|key| txn.put(&WORDS, key.as_slice(), &format!("{key:?} \u{1F600} \n")));
        store.commit(txn).await.unwrap();
        let before = store.scan(&WORDS, Range::all()).await.unwrap();
        store.close().await;
        let ledger = super::ledger::newest_document(folder.path()).unwrap();
        let copy = Store::memory();
        for txn in super::restore_from_ledger(&ledger, &[("word", 1)]) {
            copy.commit(txn).await.unwrap();
        }
        assert_eq!(copy.scan(&WORDS, Range::all()).await.unwrap(), before);
    });
}

#[test]
fn large_rows_live_through_a_restart() {
    // Pages above 128 KiB go to files of their own in the engine.
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let store = on_disk(folder.path()).store;
        for n in 0..30u64 {
            let mut txn = Txn::new();
            txn.put(&WORDS, &n, &"v".repeat(60_000));
            store.commit(txn).await.unwrap();
        }
        store.close().await;
        let opened = on_disk(folder.path());
        assert_eq!(opened.report.recovered, Recovered::Intact);
        assert_eq!(opened.store.scan(&WORDS, Range::all()).await.unwrap().len(), 30);
        opened.store.close().await;
    });
}
