//! What a scrape costs with 1,000 domains of some twenty figures each, beside writing the same samples with nothing but the
//! standard library: `cargo bench --bench metrics`.
//!
//! Rounds of the two alternate, and the time is CPU time of this thread, so that what else the machine does matters little.
#![allow(clippy::unwrap_used, reason = "a bench: a failure shall stop it")]
#![allow(clippy::explicit_write, reason = "println is for what must never print")]

use bytes::Bytes;
use dom0d::metrics::{EventCounts, Figures, Form, Lag, Own, Wire, process, render};
use dom0d::model::{Timestamp, VmId};
use dom0d::stats::metric::{METRICS, MetricId, Of};
use dom0d::stats::{Figure, Object, ObjectFigures, Sweep};
use dom0d::store::Mode;
use dom0d::xen::DomId;
use dom0d::{job, store};
use nix::time::ClockId;
use std::fmt::Write as _;
use std::hint::black_box;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const DOMAINS: u32 = 1000;
const ROUNDS: usize = 31;

fn main() {
    // Without it we were only built, with all other targets.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let sweep = Arc::new(sweep());
    let figures = figures(Arc::clone(&sweep));
    let samples: usize = sweep.objects.iter().map(|object| object.figures.len()).sum();
    let ours = || render(black_box(&figures), Own::default(), Form::OpenMetrics);
    let bytes: usize = ours().iter().map(Bytes::len).sum();
    let mut times = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        times[0].push(time(|| drop(black_box(ours()))));
        times[1].push(time(|| drop(black_box(plain(black_box(&sweep))))));
    }
    let [ours, plain] = times.map(median);
    say(&format!("{DOMAINS} domains, {samples} figures, {bytes} bytes in all, {ROUNDS} rounds, medians"));
    say(&format!("a scrape's text, ours (20 ms allowed): {:7.2} ms", ours.as_secs_f64() * 1e3));
    say(&format!("the same samples by write! alone:      {:7.2} ms", plain.as_secs_f64() * 1e3));
    say(&format!("ratio:                                 {:7.2}", ours.as_secs_f64() / plain.as_secs_f64()));
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap();
}

fn time(work: impl FnOnce()) -> Duration {
    let now = || Duration::from(ClockId::CLOCK_THREAD_CPUTIME_ID.now().unwrap());
    let began = now();
    work();
    now() - began
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Each domain has all metrics of a domain, and its vif's and disk's twice.
fn sweep() -> Sweep {
    let object = |n: u32| {
        let mut figures = Vec::new();
        for (at, metric) in METRICS.iter().enumerate().filter(|(_, metric)| metric.of == Of::Domain) {
            let instances: &[&str] = if metric.instance.is_some() { &["0", "1"] } else { &[""] };
            for instance in instances {
                figures.push(Figure {
                    metric: MetricId(u8::try_from(at).unwrap()),
                    instance: metric.instance.map(|_| (*instance).into()),
                    value: f64::from(n) * 1_234.567 + at as f64,
                });
            }
        }
        ObjectFigures {
            object: Object::Vm(VmId::random()),
            name: format!("customer-{n}-webserver").into(),
            domid: Some(DomId(n)),
            figures,
        }
    };
    Sweep {
        at: Timestamp::now(),
        instant: Instant::now(),
        took: Duration::from_millis(20),
        objects: (0..DOMAINS).map(object).collect(),
        problems: Vec::new(),
    }
}

fn figures(sweep: Arc<Sweep>) -> Figures {
    Figures {
        sweep: Some(sweep),
        vms: vec![("running", u64::from(DOMAINS))],
        jobs: job::Figures::default(),
        events: EventCounts::default(),
        delivery: Vec::new(),
        calls: Vec::new(),
        wire: Wire::default(),
        store: store::Figures {
            commits: dom0d::model::histogram::Counted::default(),
            waiting: 0,
            mode: Mode::Normal,
            rows: None,
        },
        store_bytes: None,
        kernel: None,
        lag: Lag::default(),
        process: process::read(Timestamp::now()),
    }
}

/// The least that anybody could do for the same lines: no escaping, no order, no bound.
fn plain(sweep: &Sweep) -> String {
    let mut text = String::new();
    for object in &sweep.objects {
        let vm = object.object.to_string();
        for figure in &object.figures {
            let name = METRICS[usize::from(figure.metric.0)].name;
            let instance = figure.instance.as_deref().unwrap_or("");
            writeln!(
                text,
                "dom0d_domain_{name}{{vm=\"{vm}\",name=\"{}\",vif=\"{instance}\"}} {:?}",
                object.name, figure.value
            )
            .unwrap();
        }
    }
    text
}
