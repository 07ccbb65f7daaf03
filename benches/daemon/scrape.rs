//! What monitoring costs callers: `echo` over TLS with a thousand running domains, in turns while nobody reads
//! `/metrics` and while somebody does all the time, one scrape after the other.

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
const ROUNDS: usize = 7;
/// Of all callers together, in one round: the slowest hundredth are 80.
const CALLS: usize = 8_000;

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
    let (mut alone, mut scraped) = (Vec::new(), Vec::new());
    let (mut each_alone, mut each_scraped) = (Vec::new(), Vec::new());
    let mut all = Scrapes::default();
    for _ in 0..ROUNDS {
        let mut took = runtime.block_on(latencies(&mut clients, &params));
        each_alone.push(at(&mut took, 0.99));
        alone.append(&mut took);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let scraper = std::thread::spawn(move || {
            let mut scrapes = Scrapes::default();
            while !stopped.load(Ordering::Relaxed) {
                scrapes.one(metrics);
            }
            scrapes
        });
        let mut took = runtime.block_on(latencies(&mut clients, &params));
        stop.store(true, Ordering::Relaxed);
        all.took_ms.append(&mut scraper.join().unwrap().took_ms);
        each_scraped.push(at(&mut took, 0.99));
        scraped.append(&mut took);
    }
    for (how, took) in [("nobody scrapes", &mut alone), ("scraped all the time", &mut scraped)] {
        say(&format!(
            "echo over TLS, {CALLERS} callers, {how}: p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms, worst {:.2} ms",
            at(took, 0.5),
            at(took, 0.99),
            at(took, 0.999),
            at(took, 1.0)
        ));
    }
    let (before, after) = (median(&mut each_alone), median(&mut each_scraped));
    say(&format!(
        "p99, median of {ROUNDS} rounds of {CALLS} calls: {before:.2} ms alone, {after:.2} ms scraped, {:.2} times as long",
        after / before
    ));
    say(&format!(
        "{} scrapes meanwhile: median {:.1} ms, worst {:.1} ms",
        all.took_ms.len(),
        at(&mut all.took_ms, 0.5),
        at(&mut all.took_ms, 1.0)
    ));
}

/// What that part of them is not above.
fn at(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part) as usize]
}

/// Milliseconds of each call, made by all callers at once.
async fn latencies(clients: &mut [Client], params: &[Value]) -> Vec<f64> {
    let each = CALLS / clients.len();
    let callers = clients.iter_mut().map(|client| async move {
        let mut took = Vec::with_capacity(each);
        for _ in 0..each {
            let began = Instant::now();
            call(client, "echo", params).await;
            took.push(began.elapsed().as_secs_f64() * 1e3);
        }
        took
    });
    futures_util::future::join_all(callers).await.concat()
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
