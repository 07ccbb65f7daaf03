//! What monitoring reads, from the listener's outside: text that is right for whatever the figures are, and bounds that
//! hold against whoever connects.

#![allow(clippy::unwrap_used, reason = "a test: a failure shall stop it")]

use dom0d::metrics::table::{Kind, OWN, SAMPLED};
use dom0d::metrics::{Delivery, EventCounts, Figures, Lag, Source, Wire, bind, process, serve};
use dom0d::model::histogram::{CALL_BOUNDS, Called, Histogram};
use dom0d::model::{Timestamp, VmId};
use dom0d::stats::metric::{METRICS, MetricId, Of};
use dom0d::stats::{Figure, Object, ObjectFigures, Sweep};
use dom0d::store::Mode;
use dom0d::xen::DomId;
use dom0d::{job, kernel, store};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

/// For what takes a moment on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn timed(ms: &[u64]) -> dom0d::model::histogram::Counted {
    let histogram = Histogram::new(CALL_BOUNDS);
    ms.iter().for_each(|ms| histogram.observe(Duration::from_millis(*ms)));
    histogram.counted()
}

/// All metrics of the host and of these domains, with instances of this name.
fn sweep(domains: usize, instance: &str) -> Sweep {
    let figures = |of: Of| -> Vec<Figure> {
        let mine = METRICS.iter().enumerate().filter(|(_, metric)| metric.of == of);
        mine.map(|(at, metric)| Figure {
            metric: MetricId(u8::try_from(at).unwrap()),
            instance: metric.instance.map(|_| instance.into()),
            value: at as f64 + 0.5,
        })
        .collect()
    };
    let host =
        ObjectFigures { object: Object::Host, name: "h".into(), domid: None, figures: figures(Of::Host) };
    let domain = |n: usize| {
        let domid = DomId(u32::try_from(n).unwrap());
        let object = match n {
            0 => Object::Dom0,
            1 => Object::Domain(domid),
            _ => Object::Vm(VmId::random()),
        };
        let name = format!("vm{n}").into();
        ObjectFigures { object, name, domid: Some(domid), figures: figures(Of::Domain) }
    };
    Sweep {
        at: Timestamp::now(),
        instant: Instant::now(),
        took: Duration::from_millis(12),
        objects: std::iter::once(host).chain((0..domains).map(domain)).collect(),
        problems: vec![("/sys/class/hwmon", "gone".to_owned())],
    }
}

/// Something of everything.
fn figures(sweep: Sweep) -> Figures {
    let ended = job::Ended {
        verb: "start_vm".to_owned(),
        succeeded: 3,
        failed: 1,
        cancelled: 0,
        took: timed(&[1, 20, 300, 4000]),
    };
    let stream = |stream| Delivery {
        stream,
        last_number: 7,
        behind: 2,
        failures: 1,
        since_ok: Some(Duration::from_secs(3)),
    };
    Figures {
        sweep: Some(Arc::new(sweep)),
        vms: vec![("running", 2), ("off", 1)],
        jobs: job::Figures { queued: 1, ended: vec![ended], ..job::Figures::default() },
        events: EventCounts { last_number: 17, kept: Some(12), open: vec![("critical", 1)] },
        delivery: vec![stream("events"), stream("statistics")],
        calls: vec![Called { verb: "list_vms", took: timed(&[1, 2, 70_000]), faults: 1 }],
        wire: Wire { open: 4, ..Wire::default() },
        store: store::Figures {
            commits: timed(&[4]),
            waiting: 0,
            mode: Mode::Normal,
            rows: Some(vec![("job".to_owned(), 4)]),
        },
        store_bytes: Some(4096),
        kernel: Some(kernel::Figures { messages: 5, ..kernel::Figures::default() }),
        lag: Lag { late: timed(&[1]), max: Duration::from_millis(1) },
        process: process::read(Timestamp::now()),
    }
}

struct Made(Figures);

impl Source for Made {
    fn figures(&self) -> Figures {
        self.0.clone()
    }
}

/// A listener of a test's own; it ends with what is answered second.
fn listener(source: impl Source) -> (SocketAddr, DropGuard) {
    let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(serve(listener, Arc::new(source), stop.clone()));
    (address, stop.drop_guard())
}

async fn connect(address: SocketAddr) -> TcpStream {
    timeout(PATIENCE, TcpStream::connect(address)).await.unwrap().unwrap()
}

/// All that is answered to these bytes; a connection that is reset ends the answer.
async fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = connect(address).await;
    let _ = stream.write_all(request).await;
    rest(stream).await
}

async fn rest(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection ends");
    String::from_utf8(answer).unwrap()
}

async fn scrape(address: SocketAddr, headers: &str) -> String {
    let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    let answer = exchange(address, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{}", &answer[..answer.len().min(400)]);
    answer
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

/// A sample's name, its labels, and its value.
fn parse(line: &str) -> (String, Vec<(String, String)>, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let value = if value == "+Inf" { f64::INFINITY } else { value.parse().unwrap() };
    let Some((name, labels)) = series.split_once('{') else { return (series.to_owned(), vec![], value) };
    let mut rest = labels.strip_suffix('}').unwrap();
    let mut all = Vec::new();
    while !rest.is_empty() {
        let (label, after) = rest.split_once("=\"").unwrap();
        let mut escaped = false;
        let end = after.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let (value, after) = after.split_at(end.unwrap());
        all.push((label.to_owned(), value.to_owned()));
        rest = after[1..].strip_prefix(',').unwrap_or(&after[1..]);
    }
    (name.to_owned(), all, value)
}

#[tokio::test]
async fn every_family_of_the_table_is_told_once_with_its_labels_and_nothing_else_is() {
    let (address, _end) = listener(Made(figures(sweep(3, "x"))));
    let answer = scrape(address, "").await;
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"));
    let text = body(&answer);
    assert!(text.ends_with("\n# EOF\n") && text.matches("# EOF").count() == 1);
    let mut families: BTreeMap<&str, BTreeSet<Vec<String>>> = BTreeMap::new();
    let mut series = BTreeSet::new();
    let mut current = "";
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("# TYPE ") {
            current = head.split(' ').next().unwrap();
            assert!(families.insert(current, BTreeSet::new()).is_none(), "{current} comes twice");
        }
        if line.starts_with('#') {
            continue;
        }
        let (name, labels, value) = parse(line);
        assert!(name.starts_with(current) && !value.is_nan(), "{line} under {current}");
        assert!(series.insert((name, labels.clone())), "{line} comes twice");
        let names = labels.into_iter().map(|(name, _)| name).filter(|name| name != "le");
        families.get_mut(current).unwrap().insert(names.collect());
    }
    let expected: BTreeMap<&str, BTreeSet<Vec<String>>> = OWN
        .iter()
        .copied()
        .chain(SAMPLED.iter())
        .map(|f| (&*f.name, BTreeSet::from([f.labels.iter().map(|l| (*l).to_owned()).collect()])))
        .collect();
    assert_eq!(families, expected);
}

#[tokio::test]
async fn a_reader_of_the_older_text_gets_it_with_the_same_series() {
    let (address, _end) = listener(Made(figures(sweep(2, "x"))));
    let new = scrape(address, "Accept: */*\r\n").await;
    let old = scrape(address, "Accept: text/plain;version=0.0.4\r\n").await;
    assert!(old.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{old}");
    assert!(!body(&old).contains("# EOF") && !body(&old).contains("# UNIT"));
    let series = |text: &str| -> BTreeSet<String> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
    };
    assert_eq!(series(body(&new)), series(body(&old)));
    let counters = OWN.iter().filter(|family| family.kind == Kind::Counter);
    for family in counters {
        assert!(body(&old).contains(&format!("# TYPE {}_total counter\n", family.name)), "{}", family.name);
    }
}

#[tokio::test]
async fn a_thing_with_a_hostile_name_is_one_series_among_the_others() {
    let evil = "a\"} 1\n# EOF\nx{y=\"\\\r\0";
    let (address, _end) = listener(Made(figures(sweep(2, evil))));
    let answer = scrape(address, "").await;
    let told = body(&answer).lines().filter(|line| !line.starts_with('#')).map(parse);
    let disks: Vec<_> = told.filter(|(name, ..)| name == "dom0d_disk_reads_total").collect();
    let [(_, labels, _)] = &disks[..] else { panic!("{disks:?}") };
    let expected = "a\\\"} 1\\n# EOF\\nx{y=\\\"\\\\\u{fffd}\u{fffd}";
    assert_eq!(labels, &[("disk".to_owned(), expected.to_owned())]);
    assert_eq!(answer.matches("\n# EOF").count(), 1);
}

#[tokio::test]
async fn only_get_and_head_of_metrics_are_answered() {
    let (address, _end) = listener(Made(figures(sweep(1, "x"))));
    for (request, status) in [
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", "405"),
        ("DELETE /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "405"),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("GET /metrics/../RPC2 HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /RPC2 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "404"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let answer = exchange(address, request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:?}: {answer}");
    }
    let allowed = exchange(address, b"PUT /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(allowed.contains("allow: GET, HEAD\r\n"), "{allowed}");
    let head = exchange(address, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 OK") && body(&head).is_empty(), "{head}");
    assert!(head.contains("content-length: "), "{head}");
}

#[tokio::test]
async fn one_connection_carries_one_request() {
    let (address, _end) = listener(Made(figures(sweep(1, "x"))));
    let twice = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
    let answer = exchange(address, twice.as_bytes()).await;
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1);
    assert!(answer.contains("connection: close\r\n"), "{}", &answer[..300]);
}

#[tokio::test]
async fn a_head_that_is_huge_or_never_ends_is_refused() {
    let (address, _end) = listener(Made(figures(sweep(1, "x"))));
    let many = "X-A: b\r\n".repeat(200);
    let long = format!("X-Long: {}\r\n", "y".repeat(64 * 1024));
    for headers in [many, long] {
        let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
        let answer = exchange(address, request.as_bytes()).await;
        assert!(!answer.contains("200 OK"), "{answer}");
    }
    // It ends by its deadline, or earlier: nobody else waits for it.
    let mut slow = connect(address).await;
    slow.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ").await.unwrap();
    scrape(address, "").await;
    let ended = Instant::now();
    assert!(!rest(slow).await.contains("200 OK"));
    assert!(ended.elapsed() < Duration::from_secs(20), "{:?}", ended.elapsed());
}

#[tokio::test]
async fn those_who_connect_and_say_nothing_keep_nobody_out() {
    let (address, _end) = listener(Made(figures(sweep(1, "x"))));
    let mut idle = Vec::new();
    for _ in 0..100 {
        idle.push(connect(address).await);
    }
    let began = Instant::now();
    let answer = scrape(address, "").await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let refused = body(&answer).lines().find(|line| line.starts_with("dom0d_metrics_refused")).unwrap();
    let (_, _, refused) = parse(refused);
    assert!((90.0..=101.0).contains(&refused), "{refused}");
    // All but the newest were sent away at once; the rest go by their deadline.
    for stream in idle {
        assert_eq!(rest(stream).await, "");
    }
}

#[tokio::test]
async fn readers_that_take_nothing_keep_nobody_out_and_are_cut() {
    let (address, _end) = listener(Made(figures(sweep(3000, "x"))));
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut stream = connect(address).await;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        // The head is there, so it is being answered.
        let mut first = [0; 15];
        timeout(PATIENCE, stream.read_exact(&mut first)).await.unwrap().unwrap();
        slow.push(stream);
    }
    let cut = |answer: &str| {
        let line = body(answer).lines().find(|line| line.starts_with("dom0d_metrics_refused")).unwrap();
        parse(line).2
    };
    let answer = scrape(address, "").await;
    assert!(answer.ends_with("# EOF\n"), "the newcomer has it all");
    // On a slow machine some have met their deadline by now.
    assert!((1.0..=8.0).contains(&cut(&answer)), "the oldest had to go for it");
    // The others are cut by their deadline.
    let began = Instant::now();
    while cut(&scrape(address, "").await) < 8.0 {
        assert!(began.elapsed() < PATIENCE, "slow readers stay");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(slow);
}

#[tokio::test]
async fn a_source_that_hangs_costs_one_thread_and_is_told() {
    struct Hangs(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);
    impl Source for Hangs {
        fn figures(&self) -> Figures {
            // Ends when the test does.
            let _ = self.0.lock().unwrap().recv();
            figures(sweep(1, "x"))
        }
    }
    let (end, hanging) = std::sync::mpsc::channel();
    let (address, _end) = listener(Hangs(std::sync::Mutex::new(hanging)));
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let (first, second) = tokio::join!(exchange(address, request), exchange(address, request));
    assert!(first.starts_with("HTTP/1.1 503") && second.starts_with("HTTP/1.1 503"), "{first} {second}");
    drop(end);
    scrape(address, "").await;
}

#[test]
fn the_alerts_name_verbs_that_there_are() {
    let rules = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/alerts.yml")).unwrap();
    let verbs = dom0d::api::table();
    let named: Vec<&str> =
        rules.split("verb=~\"").skip(1).flat_map(|rest| rest.split('"').next().unwrap().split('|')).collect();
    assert!(named.len() > 5, "{named:?}");
    for verb in named {
        assert!(verbs.contains_key(verb), "{verb}");
    }
}
