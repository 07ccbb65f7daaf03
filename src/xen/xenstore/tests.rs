//! The rules of the client and of observing domains, held against a made-up xenstored, and, where there is one,
//! against the real one of dom0 (`real_xen`).

use super::codec::Kind;
use super::fake::{Fake, Mood};
use super::*;
use crate::xen::{DomId, Observation};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Far longer than anything here takes.
const SOON: Duration = Duration::from_secs(20);

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

/// Waits for a condition, not for the clock.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !holds().await {
        assert!(Instant::now() < end, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn hint(watcher: &Watcher) -> Hint {
    timeout(SOON, watcher.next()).await.expect("a hint comes")
}

/// What holds of any xenstored. `below`: a node that nobody else uses.
async fn holds_of_any_store(client: &Client, below: &str) {
    let at = |name: &str| path(&format!("{below}/{name}"));
    // Values are bytes; making a node makes those above it.
    client.set(&at("a/b"), b"\xff\n\0x").await.unwrap();
    assert_eq!(client.get(&at("a/b")).await.unwrap().unwrap(), b"\xff\n\0x");
    assert_eq!(client.get(&at("a")).await.unwrap().unwrap(), b"");
    assert_eq!(client.get(&at("nothing")).await.unwrap(), None);
    client.make(&at("a/c")).await.unwrap();
    let mut names = client.children(&at("a")).await.unwrap();
    names.sort();
    assert_eq!(names, ["b", "c"]);
    assert_eq!(client.children(&at("nothing")).await.unwrap(), [""; 0]);
    assert_eq!(client.children(&at("a/c")).await.unwrap(), [""; 0]);
    client.remove(&at("nothing/at/all")).await.unwrap();
    // A watch tells at its registration, and again at a change of the node or of one below.
    let mut watcher = client.watcher();
    watcher.add(at("w")).await.unwrap();
    assert_eq!(hint(&watcher).await, Hint::At(at("w").into()));
    client.set(&at("w/x"), b"1").await.unwrap();
    assert_eq!(hint(&watcher).await, Hint::At(at("w").into()));
    watcher.remove(&at("w").into()).await.unwrap();
    // A transaction is done again when another one came between, and happens once.
    let tries = AtomicUsize::new(0);
    let (node, tried) = (&at("t"), &tries);
    client
        .transaction(|transaction| async move {
            let before = transaction.get(node).await?;
            if tried.fetch_add(1, Ordering::Relaxed) == 0 {
                client.set(node, b"from outside").await?;
            }
            transaction.set(node, &[&before.unwrap_or_default()[..], b"!"].concat()).await
        })
        .await
        .unwrap();
    assert_eq!(client.get(node).await.unwrap().unwrap(), b"from outside!");
    assert_eq!(tries.load(Ordering::Relaxed), 2);
    // One that fails leaves nothing.
    let failed: Result<()> = client
        .transaction(|transaction| async move {
            transaction.remove(node).await?;
            Err(StoreError::NotFound)
        })
        .await;
    assert_eq!(failed, Err(StoreError::NotFound));
    assert!(client.get(node).await.unwrap().is_some());
    assert_eq!(client.domain_path(DomId(3)).await.unwrap(), path("/local/domain/3"));
    assert!(!client.is_introduced(DomId(32_000)).await.unwrap());
    client.remove(&path(below)).await.unwrap();
    assert_eq!(client.get(&path(below)).await.unwrap(), None);
}

/// Not for the device: oxenstored's long answer is more than the kernel takes from the ring.
async fn many_children_are_told_whole(client: &Client, below: &str) {
    let at = |name: &str| path(&format!("{below}/{name}"));
    let many: Vec<String> = (0..600).map(|n| format!("child-{n:06}")).collect();
    for some in many.chunks(100) {
        futures_util::future::try_join_all(some.iter().map(|name| {
            let path = at(&format!("many/{name}"));
            async move { client.set(&path, b"").await }
        }))
        .await
        .unwrap();
    }
    let mut told = client.children(&at("many")).await.unwrap();
    told.sort();
    assert_eq!(told, many);
    client.remove(&path(below)).await.unwrap();
}

#[tokio::test]
async fn the_made_up_store_keeps_the_rules_of_any_store() {
    let fake = Fake::start();
    holds_of_any_store(&fake.client(), "/tool/test").await;
    many_children_are_told_whole(&fake.client(), "/tool/test").await;
    assert!(fake.seen(Kind::DirectoryPart) > 1, "the list came in parts");
}

#[tokio::test]
async fn the_small_interface_reads_lists_writes_and_removes_by_plain_paths_and_refuses_others() {
    let fake = Fake::start();
    let client = fake.client();
    let store: &dyn StoreRead = &client;
    store.write("/a/b", b"1").await.unwrap();
    assert_eq!(store.read("/a/b").await.unwrap().unwrap(), b"1");
    assert_eq!(store.list("/a").await.unwrap(), ["b"]);
    store.rm("/a").await.unwrap();
    assert_eq!(store.read("/a/b").await.unwrap(), None);
    for bad in ["a", "/a/../b", "/a\0b", "", "/a "] {
        assert!(matches!(store.write(bad, b"").await, Err(StoreError::BadPath(_))), "{bad:?}");
    }
    assert_eq!(fake.seen(Kind::Write), 1, "no bad path was sent");
}

#[tokio::test]
async fn a_value_that_no_message_can_carry_is_refused_and_the_connection_goes_on() {
    let fake = Fake::start();
    let client = fake.client();
    assert!(matches!(client.set(&path("/a"), &[0; 4095]).await, Err(StoreError::TooLarge(4098))));
    client.set(&path("/a"), &[0; 4093]).await.unwrap();
    assert_eq!(fake.state.lock().unwrap().connections_made, 1);
}

#[tokio::test]
async fn answers_find_their_requests_in_whatever_order_they_come() {
    let fake = Fake::start();
    let client = fake.client();
    for n in 0..40 {
        fake.write(&format!("/n/{n}"), n.to_string().as_bytes());
    }
    fake.mood(Mood { swaps: true, ..Mood::default() });
    let reads = (0..40).map(|n| {
        let client = &client;
        async move {
            let value = client.get(&path(&format!("/n/{n}"))).await.unwrap().unwrap();
            assert_eq!(number(&value), Some(n));
        }
    });
    futures_util::future::join_all(reads).await;
}

#[tokio::test]
async fn a_request_without_an_answer_ends_by_its_deadline_and_others_go_on_meanwhile() {
    let fake = Fake::start();
    fake.write("/a/b", b"1");
    fake.mood(Mood { deaf_to: vec![Kind::Read as u32], ..Mood::default() });
    let client = Client::start(Endpoint::Socket(fake.socket()), Duration::from_secs(3));
    let (deaf, other) = (path("/a/b"), path("/a"));
    let (read, list) = tokio::join!(client.get(&deaf), client.children(&other));
    assert_eq!((read, list.unwrap()), (Err(StoreError::Timeout), vec!["b".to_owned()]));
}

/// A client whose reading is owed an answer that does not come; from here on time is virtual.
async fn owed(fake: &Fake) -> Client {
    fake.write("/a/b", b"1");
    fake.mood(Mood { deaf_to: vec![Kind::Read as u32], ..Mood::default() });
    let client = Client::start(Endpoint::Socket(fake.socket()), Duration::from_secs(3600));
    let reading = client.clone();
    tokio::spawn(async move { reading.get(&path("/a/b")).await });
    until("the reading to arrive", async || fake.seen(Kind::Read) == 1).await;
    tokio::time::pause();
    client
}

#[tokio::test]
async fn a_xenstored_that_owes_an_answer_for_half_a_minute_is_given_up() {
    let fake = Fake::start();
    let _client = owed(&fake).await;
    let began = Instant::now();
    while fake.state.lock().unwrap().connections_made == 1 {
        assert!(began.elapsed() < Duration::from_secs(60), "it is not given up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(began.elapsed() >= Duration::from_secs(29), "{:?}", began.elapsed());
}

#[tokio::test]
async fn time_in_which_nobody_ran_is_no_silence_of_xenstored() {
    let fake = Fake::start();
    let client = owed(&fake).await;
    // As after a dom0 was not run for so long: the clock is on, and xenstored has had no time either.
    for _ in 0..3 {
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(client.children(&path("/a")).await, Ok(vec!["b".to_owned()]));
    }
    assert_eq!(fake.state.lock().unwrap().connections_made, 1);
}

#[tokio::test]
async fn without_a_xenstored_callers_are_told_so_and_find_it_once_it_is_there() {
    let mut fake = Fake::start();
    fake.close();
    let client = fake.client();
    let refused = client.get(&path("/a")).await;
    assert!(matches!(refused, Err(StoreError::Unreachable(_))), "{refused:?}");
    fake.open();
    until("an answer", async || client.get(&path("/a")).await == Ok(None)).await;
}

#[tokio::test]
async fn garbage_of_any_kind_costs_the_connection_and_nothing_else() {
    let fake = Fake::start();
    fake.write("/a", b"1");
    let client = fake.client();
    let frame = |numbers: [u32; 4]| numbers.iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<u8>>();
    let garbage = [
        frame([2, 1, 0, u32::MAX]),
        frame([99, 1, 0, 0]),
        frame([2, 77_777, 0, 0]),
        frame([15, 0, 0, 0]),
        vec![0xff; 300],
    ];
    for garbage in garbage {
        fake.mood(Mood { garbage: Some(garbage.clone()), ..Mood::default() });
        // A reading is asked again on the next connection.
        let mut value = client.get(&path("/a")).await;
        if matches!(value, Err(StoreError::Unreachable(_))) {
            until("an answer", async || {
                value = client.get(&path("/a")).await;
                value.is_ok()
            })
            .await;
        }
        assert_eq!(value.unwrap().unwrap(), b"1", "{garbage:?}");
    }
    assert_eq!(fake.state.lock().unwrap().connections_made, 6);
}

#[tokio::test]
async fn a_writing_whose_connection_broke_in_the_middle_of_the_answer_is_told_as_lost_and_not_done_twice() {
    let fake = Fake::start();
    let client = fake.client();
    assert_eq!(client.get(&path("/a")).await, Ok(None));
    for cut_at in [0, 7, 17] {
        let before = fake.seen(Kind::Write);
        fake.mood(Mood { cut_at: Some(cut_at), ..Mood::default() });
        assert_eq!(client.set(&path("/a"), b"1").await, Err(StoreError::Lost));
        assert_eq!(fake.seen(Kind::Write), before + 1);
        assert_eq!(client.get(&path("/a")).await.unwrap().unwrap(), b"1");
    }
}

#[tokio::test]
async fn after_a_broken_connection_all_watches_stand_again_and_each_watcher_looks_at_everything() {
    let mut fake = Fake::start();
    let client = fake.client();
    let mut watcher = client.watcher();
    let all: Vec<WatchPath> = (0..300).map(|n| path(&format!("/w/{n}")).into()).collect();
    watcher.add_all(all.clone()).await.unwrap();
    fake.close();
    fake.write("/w/7", b"while away");
    fake.open();
    while hint(&watcher).await != Hint::Everything {}
    let watches: usize = fake.state.lock().unwrap().watches.values().map(Vec::len).sum();
    assert_eq!(watches, 300);
    until("the first hints are over", async || {
        timeout(Duration::from_millis(50), watcher.next()).await.is_err()
    })
    .await;
    fake.write("/w/7", b"again");
    assert_eq!(hint(&watcher).await, Hint::At(all[7].clone()));
}

#[tokio::test]
async fn a_watcher_or_a_transaction_that_is_dropped_leaves_nothing_in_the_store() {
    let fake = Fake::start();
    let client = fake.client();
    let mut watcher = client.watcher();
    watcher.add(path("/a")).await.unwrap();
    watcher.add(WatchPath::ReleaseDomain).await.unwrap();
    drop(watcher);
    let never = client.transaction(|_| std::future::pending::<Result<()>>());
    assert!(timeout(Duration::from_millis(100), never).await.is_err());
    assert_eq!(fake.seen(Kind::TransactionStart), 1);
    // Dropped while its registration is on its way.
    fake.mood(Mood { delay: Duration::from_millis(50), ..Mood::default() });
    let mut late = client.watcher();
    assert!(timeout(Duration::from_millis(10), late.add(path("/late"))).await.is_err());
    until("an empty store", async || {
        let state = fake.state.lock().unwrap();
        let watches: usize = state.watches.values().map(Vec::len).sum();
        state.open_transactions.is_empty() && watches == 0 && state.seen.contains_key(&(Kind::Watch as u32))
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_meets_others_each_time_is_given_up_with_a_clear_word() {
    let fake = Fake::start();
    let client = fake.client();
    let (tries, tried, fake_ref) = (AtomicUsize::new(0), path("/t"), &fake);
    let result = client
        .transaction(|transaction| {
            let (tries, tried) = (&tries, &tried);
            async move {
                tries.fetch_add(1, Ordering::Relaxed);
                fake_ref.write("/other", b"");
                transaction.set(tried, b"1").await
            }
        })
        .await;
    assert_eq!(result, Err(StoreError::Conflict));
    assert_eq!((tries.load(Ordering::Relaxed), client.get(&tried).await), (8, Ok(None)));
}

#[tokio::test]
async fn a_guest_that_writes_without_pause_costs_one_hint_at_a_time() {
    let fake = Fake::start();
    let client = fake.client();
    let mut watcher = client.watcher();
    watcher.add(path("/local/domain/5/data")).await.unwrap();
    watcher.add(path("/local/domain/6/name")).await.unwrap();
    for n in 0..10_000 {
        fake.write(&format!("/local/domain/5/data/{}", n % 1000), b"x");
    }
    fake.write("/local/domain/6/name", b"quiet");
    // An answer comes after all the events that were sent before it.
    client.get(&path("/a")).await.unwrap();
    let mut hints = Vec::new();
    while let Ok(hint) = timeout(Duration::from_millis(50), watcher.next()).await {
        hints.push(hint);
    }
    assert!(hints.len() <= 3, "{hints:?}");
    assert!(hints.contains(&Hint::At(path("/local/domain/6/name").into())));
}

async fn next(observations: &mut tokio::sync::mpsc::Receiver<Observation>) -> Observation {
    timeout(SOON, observations.recv()).await.expect("an observation comes").expect("the watch lives")
}

/// Watches a store with domain 1 in it, until it has looked at everything.
async fn watched() -> (Fake, Client, DomainWatch, tokio::sync::mpsc::Receiver<Observation>) {
    let fake = Fake::start();
    fake.introduce(1, "one");
    fake.introduce(0, "Domain-0");
    let client = fake.client();
    let watch = DomainWatch::start(client.clone());
    let mut observations = watch.observe();
    while next(&mut observations).await != Observation::Everything {}
    // The watches on comings and endings tell once at their registration.
    until("the first hints are over", async || {
        timeout(Duration::from_millis(100), observations.recv()).await.is_err()
    })
    .await;
    (fake, client, watch, observations)
}

#[tokio::test]
async fn a_domain_that_comes_is_told_by_its_number_and_so_is_one_that_goes() {
    let (fake, _, _watch, mut observations) = watched().await;
    fake.introduce(2, "two");
    assert_eq!(next(&mut observations).await, Observation::At(DomId(2)));
    fake.release(1);
    assert_eq!(next(&mut observations).await, Observation::At(DomId(1)));
    // A domain that ended at the same moment may hide behind it.
    assert_eq!(next(&mut observations).await, Observation::Everything);
    until("no watches of the gone one", async || {
        let state = fake.state.lock().unwrap();
        !state.watches.values().flatten().any(|(path, _)| path.starts_with("/local/domain/1/"))
    })
    .await;
}

#[tokio::test]
async fn a_domain_that_ended_by_itself_makes_everything_be_looked_at() {
    let (fake, _, _watch, mut observations) = watched().await;
    fake.end();
    assert_eq!(next(&mut observations).await, Observation::Everything);
}

#[tokio::test]
async fn a_changed_name_is_told_and_the_same_value_written_again_is_not() {
    let (fake, client, _watch, mut observations) = watched().await;
    fake.write("/local/domain/1/name", b"one");
    fake.write("/local/domain/1/name", b"renamed");
    assert_eq!(next(&mut observations).await, Observation::At(DomId(1)));
    let reads = fake.seen(Kind::Read);
    let began = Instant::now();
    for n in 0..500 {
        // Waited for, so that the events come one after the other.
        client.set(&path("/local/domain/1/console/vnc-port"), n.to_string().as_bytes()).await.unwrap();
    }
    assert_eq!(next(&mut observations).await, Observation::At(DomId(1)));
    let looks = (fake.seen(Kind::Read) - reads) / 3;
    assert!(looks as u64 <= 2 + began.elapsed().as_secs(), "{looks} looks");
}

#[tokio::test]
async fn after_xenstored_was_away_everything_is_looked_at_and_new_domains_are_known() {
    let (mut fake, _, _watch, mut observations) = watched().await;
    fake.close();
    fake.introduce(9, "nine");
    fake.open();
    while next(&mut observations).await != Observation::Everything {}
    until("nine is known", async || {
        let state = fake.state.lock().unwrap();
        state.watches.values().flatten().any(|(path, _)| path == "/local/domain/9/name")
    })
    .await;
    fake.release(9);
    while next(&mut observations).await != Observation::At(DomId(9)) {}
}

#[tokio::test]
async fn five_hundred_domains_are_taken_in_at_once_and_one_of_them_going_is_told() {
    let fake = Fake::start();
    (1..=500).for_each(|n| fake.introduce(n, "many"));
    let began = Instant::now();
    let watch = DomainWatch::start(fake.client());
    let mut observations = watch.observe();
    assert_eq!(next(&mut observations).await, Observation::Everything);
    let took = began.elapsed();
    eprintln!("500 domains taken in after {took:?}");
    // Generous, since the machine may be busy.
    assert!(took < SOON / 2, "{took:?}");
    fake.release(250);
    while next(&mut observations).await != Observation::At(DomId(250)) {}
}

// Real Xen: run in dom0 as `--ignored real_xen`.

async fn each_real_way(rule: impl AsyncFn(Client)) {
    let ways = [Endpoint::Socket("/run/xenstored/socket".into()), Endpoint::Device("/dev/xen/xenbus".into())];
    for way in ways {
        rule(Client::start(way, Duration::from_secs(10))).await;
    }
}

#[tokio::test]
#[ignore = "needs the xenstored of a dom0"]
async fn real_xen_keeps_the_rules_of_any_store() {
    each_real_way(async |client| holds_of_any_store(&client, "/tool/dom0d-test").await).await;
}

#[tokio::test]
#[ignore = "needs the xenstored of a dom0"]
async fn real_xen_tells_many_children_whole() {
    let client = Client::start(Endpoint::of_dom0(), Duration::from_secs(10));
    many_children_are_told_whole(&client, "/tool/dom0d-test").await;
}

#[tokio::test]
#[ignore = "needs the xenstored of a dom0"]
async fn real_xen_tells_of_dom0_and_leaves_no_watch_behind() {
    each_real_way(async |client| {
        let name = client.get(&path("/local/domain/0/name")).await.unwrap().unwrap();
        assert_eq!(text(&name), Some("Domain-0"));
        assert!(client.is_introduced(DomId(0)).await.unwrap());
        assert!(!client.permissions(&path("/local/domain/0/name")).await.unwrap().is_empty());
        let mut watcher = client.watcher();
        watcher.add_all(vec![WatchPath::IntroduceDomain, WatchPath::ReleaseDomain]).await.unwrap();
        hint(&watcher).await;
        hint(&watcher).await;
    })
    .await;
}

/// `DOM0D_TEST_GUEST`: an xl.cfg whose domain this may create, and destroys.
#[tokio::test]
#[ignore = "needs a dom0 and DOM0D_TEST_GUEST, an xl.cfg"]
async fn real_xen_domains_are_observed_within_a_second_of_coming_and_going() {
    let guest = std::env::var("DOM0D_TEST_GUEST").expect("DOM0D_TEST_GUEST names an xl.cfg");
    let client = Client::start(Endpoint::of_dom0(), Duration::from_secs(10));
    let watch = Arc::new(DomainWatch::start(client.clone()));
    let mut observations = watch.observe();
    while next(&mut observations).await != Observation::Everything {}
    let xl = async |arguments: &[&str]| {
        let output = tokio::process::Command::new("/usr/sbin/xl").args(arguments).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let watching = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Ok(Some(observation)) = timeout(Duration::from_secs(30), observations.recv()).await {
            seen.push((Instant::now(), observation));
        }
        seen
    });
    xl(&["create", "-e", "-q", &guest, "name=\"observed\""]).await;
    let domid = DomId(xl(&["domid", "observed"]).await.parse().unwrap());
    xl(&["rename", "observed", "renamed"]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let destroyed = Instant::now();
    xl(&["destroy", "renamed"]).await;
    let gone = Instant::now();
    let seen = watching.await.unwrap();
    let of_it: Vec<_> = seen.iter().filter(|(_, o)| *o == Observation::At(domid)).collect();
    assert!(of_it.len() >= 2, "{seen:?}");
    let last = of_it.last().unwrap().0;
    assert!(last > destroyed && last < gone + Duration::from_secs(1), "{seen:?}");
    eprintln!("the destroyed domain was observed {:?} before `xl destroy` returned", gone - last);
}
