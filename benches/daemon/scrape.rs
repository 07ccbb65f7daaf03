//! What monitoring costs callers: `echo` over TLS with a thousand running domains, in turns while nobody reads
//! `/metrics`, while somebody does once a second, and while somebody does all the time, one scrape after the other. Callers,
//! scraper and daemon share the machine's CPUs.

use crate::daemon::{Home, call, create_vms, median, say, text};
use dom0d::wire::{Client, Value};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const VMS: usize = 1000;
const CALLERS: usize = 4;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
/// How long a scraper waits between two scrapes; `None`: there is none.
const MODES: [(&str, Option<Duration>); 3] = [
    ("nobody scrapes", None),
    ("scraped once a second", Some(Duration::from_secs(1))),
    ("scraped all the time", Some(Duration::ZERO)),
];

pub fn figures(runtime: &Runtime) {
    let home = Home::new();
    home.start_world(1_000_000);
    let daemon = home.start("");
    let mut clients: Vec<Client> = (0..CALLERS).map(|_| home.client(daemon.address)).collect();
    runtime.block_on(create_vms(&mut clients, VMS, true));
    let metrics = home.metrics();
    // A sweep with all of them in it.
    let mut scrape = Scrapes::default();
    while scrape.last_domains < VMS {
        std::thread::sleep(Duration::from_millis(200));
        scrape.one(metrics);
    }
    say(&format!("{VMS} running VMs: a scrape has {} KiB", scrape.last_bytes / 1024));
    let params = [text("x".repeat(200))];
    runtime.block_on(latencies(&mut clients, &params));
    let mut took: [Vec<f64>; 3] = Default::default();
    let mut p99: [Vec<f64>; 3] = Default::default();
    let mut scrapes = Vec::new();
    for _ in 0..ROUNDS {
        for (mode, (_, pause)) in MODES.iter().enumerate() {
            let scraper = pause.map(|pause| Scraper::start(metrics, pause));
            let mut round = runtime.block_on(latencies(&mut clients, &params));
            if let Some(scraper) = scraper {
                scrapes.append(&mut scraper.end());
            }
            p99[mode].push(at(&mut round, 0.99));
            took[mode].append(&mut round);
        }
    }
    let alone = median(&mut p99[0]);
    for (mode, (how, _)) in MODES.iter().enumerate() {
        let took = &mut took[mode];
        let p99 = median(&mut p99[mode]);
        say(&format!(
            "echo over TLS, {CALLERS} callers, {how}, {} calls: p50 {:.2} ms, p99 {p99:.2} ms ({:.2} times as long), p99.9 {:.2} ms, worst {:.2} ms",
            took.len(),
            at(took, 0.5),
            p99 / alone,
            at(took, 0.999),
            at(took, 1.0)
        ));
    }
    say(&format!(
        "{} scrapes meanwhile: median {:.1} ms, worst {:.1} ms",
        scrapes.len(),
        at(&mut scrapes, 0.5),
        at(&mut scrapes, 1.0)
    ));
}

/// What that part of them is not above.
fn at(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part) as usize]
}

/// Milliseconds of each call of one round, made by all callers at once.
async fn latencies(clients: &mut [Client], params: &[Value]) -> Vec<f64> {
    let end = Instant::now() + ROUND;
    let callers = clients.iter_mut().map(|client| async move {
        let mut took = Vec::new();
        while Instant::now() < end {
            let began = Instant::now();
            call(client, "echo", params).await;
            took.push(began.elapsed().as_secs_f64() * 1e3);
        }
        took
    });
    futures_util::future::join_all(callers).await.concat()
}

/// Scrapes on a thread of its own.
struct Scraper {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Scrapes>,
}

impl Scraper {
    fn start(metrics: SocketAddr, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut scrapes = Scrapes::default();
            while !stopped.load(Ordering::Relaxed) {
                scrapes.one(metrics);
                std::thread::park_timeout(pause);
            }
            scrapes
        });
        Self { stop, thread }
    }

    /// How many milliseconds each took.
    fn end(self) -> Vec<f64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        self.thread.join().unwrap().took_ms
    }
}

#[derive(Default)]
struct Scrapes {
    took_ms: Vec<f64>,
    last_bytes: usize,
    last_domains: usize,
}

impl Scrapes {
    /// As Prometheus asks, a connection each.
    fn one(&mut self, address: SocketAddr) {
        let began = Instant::now();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = Vec::with_capacity(self.last_bytes + 4096);
        stream.read_to_end(&mut answer).unwrap();
        self.took_ms.push(began.elapsed().as_secs_f64() * 1e3);
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("# EOF\n"), "a scrape failed");
        self.last_bytes = answer.len();
        // dom0 has none of its own besides them.
        self.last_domains = answer
            .lines()
            .filter(|line| line.starts_with("dom0d_domain_cpu_seconds_total{vm=\"0004fb"))
            .count();
    }
}
