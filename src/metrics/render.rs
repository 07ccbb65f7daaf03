//! Writes figures by the table. Pure: figures in, text out.

use super::exposition::{Exposition, Form};
use super::table;
use super::{Delivery, EventCounts, Figures, Wire};
use crate::job;
use crate::model::histogram::Called;
use crate::stats::sweep::{Figure, Object, ObjectFigures, Sweep};
use crate::stats::{METRICS, metric::Of};
use crate::store::{self, Mode};
use bytes::Bytes;
use std::time::Duration;
use tokio::time::Instant;

/// What the listener counts of itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Own {
    pub scrapes: u64,
    pub refused: u64,
}

/// The whole text, in pieces.
pub fn render(figures: &Figures, own: Own, form: Form) -> Vec<Bytes> {
    let mut out = Exposition::new(form);
    out.family(&table::BUILD).put(&[env!("CARGO_PKG_VERSION")], 1_u64);
    process(&mut out, figures);
    let mut vms = out.family(&table::VMS);
    figures.vms.iter().for_each(|(state, count)| vms.put(&[state], *count));
    jobs(&mut out, &figures.jobs);
    events(&mut out, &figures.events);
    delivery(&mut out, &figures.delivery);
    calls(&mut out, &figures.calls);
    wire(&mut out, &figures.wire);
    store(&mut out, figures);
    if let Some(kernel) = figures.kernel {
        out.family(&table::NETLINK_MESSAGES).put(&[], kernel.messages);
        out.family(&table::NETLINK_FAILURES).put(&[], kernel.failures);
        out.family(&table::NETLINK_NOTICES).put(&[], kernel.notices);
        out.family(&table::NETLINK_OVERRUNS).put(&[], kernel.overruns);
    }
    out.family(&table::SCRAPES).put(&[], own.scrapes);
    out.family(&table::SCRAPE_REFUSED).put(&[], own.refused);
    if let Some(sweep) = &figures.sweep {
        // Last, since they are the ones that may be too many.
        sampled(&mut out, sweep);
    }
    left_out(&mut out);
    out.end()
}

/// Whoever reads a text that was cut must learn it, so this is written whether there is room or not.
fn left_out(out: &mut Exposition) {
    let count = out.left_out();
    out.family(&table::LEFT_OUT).put_past_bound(&[], count);
}

fn process(out: &mut Exposition, figures: &Figures) {
    let process = &figures.process;
    out.family(&table::STARTED).put(&[], Duration::from_millis(process.started.0).as_secs_f64());
    if let Some(cpu) = process.cpu {
        out.family(&table::CPU).put(&[], cpu.as_secs_f64());
    }
    for (family, value) in [
        (&table::RESIDENT, process.resident_bytes),
        (&table::THREADS, process.threads),
        (&table::OPEN_FDS, process.open_fds),
        (&table::MAX_FDS, process.max_fds),
    ] {
        if let Some(value) = value {
            out.family(family).put(&[], value);
        }
    }
    out.family(&table::LAG).put_histogram(&[], &figures.lag.late);
    out.family(&table::LAG_MAX).put(&[], figures.lag.max.as_secs_f64());
}

fn jobs(out: &mut Exposition, jobs: &job::Figures) {
    let mut open = out.family(&table::JOBS_OPEN);
    open.put(&["queued"], jobs.queued);
    open.put(&["running"], jobs.running);
    open.put(&["undoing"], jobs.undoing);
    let mut ended = out.family(&table::JOBS_ENDED);
    for of in &jobs.ended {
        ended.put(&[&of.verb, "succeeded"], of.succeeded);
        ended.put(&[&of.verb, "failed"], of.failed);
        ended.put(&[&of.verb, "cancelled"], of.cancelled);
    }
    // A verb's series begin with its first end, with which its first burst may be over: this one counts from zero on.
    let failed = jobs.ended.iter().map(|of| of.failed).fold(0, u64::saturating_add);
    out.family(&table::JOBS_FAILED).put(&[], failed);
    let mut took = out.family(&table::JOB_TIME);
    jobs.ended.iter().for_each(|of| took.put_histogram(&[&of.verb], &of.took));
    let mut locks = out.family(&table::LOCKS);
    locks.put(&["held"], jobs.locks_held);
    locks.put(&["waiting"], jobs.locks_waiting);
    out.family(&table::LOCK_WAIT).put(&[], jobs.oldest_wait.unwrap_or_default().as_secs_f64());
}

fn events(out: &mut Exposition, events: &EventCounts) {
    out.family(&table::EVENT_LAST).put(&[], events.last_number);
    if let Some(kept) = events.kept {
        out.family(&table::EVENTS_KEPT).put(&[], kept);
    }
    let mut open = out.family(&table::ALERTS);
    events.open.iter().for_each(|(severity, count)| open.put(&[severity], *count));
}

fn delivery(out: &mut Exposition, streams: &[Delivery]) {
    let mut last = out.family(&table::DELIVERY_LAST);
    streams.iter().for_each(|stream| last.put(&[stream.stream], stream.last_number));
    let mut behind = out.family(&table::DELIVERY_BEHIND);
    streams.iter().for_each(|stream| behind.put(&[stream.stream], stream.behind));
    let mut failures = out.family(&table::DELIVERY_FAILURES);
    streams.iter().for_each(|stream| failures.put(&[stream.stream], stream.failures));
    let mut age = out.family(&table::DELIVERY_AGE);
    for stream in streams {
        if let Some(since) = stream.since_ok {
            age.put(&[stream.stream], since.as_secs_f64());
        }
    }
}

fn calls(out: &mut Exposition, calls: &[Called]) {
    let mut took = out.family(&table::CALL_TIME);
    calls.iter().for_each(|called| took.put_histogram(&[called.verb], &called.took));
    let mut faults = out.family(&table::CALL_FAULTS);
    calls.iter().for_each(|called| faults.put(&[called.verb], called.faults));
}

fn wire(out: &mut Exposition, wire: &Wire) {
    for (family, value) in [
        (&table::CONNECTIONS, wire.open),
        (&table::ACCEPTED, wire.connections),
        (&table::REFUSED, wire.refused),
        (&table::TIMEOUTS, wire.timeouts),
        (&table::UNAUTHORIZED, wire.unauthorized),
        (&table::WIRE_CALLS, wire.calls),
        (&table::WIRE_FAULTS, wire.faults),
    ] {
        out.family(family).put(&[], value);
    }
}

fn store(out: &mut Exposition, figures: &Figures) {
    let store: &store::Figures = &figures.store;
    out.family(&table::COMMIT_TIME).put_histogram(&[], &store.commits);
    out.family(&table::COMMITS_WAITING).put(&[], store.waiting);
    let now = match store.mode {
        Mode::Normal => "normal",
        Mode::LowSpace => "low_space",
        Mode::ReadOnly { .. } => "read_only",
    };
    let mut modes = out.family(&table::STORE_MODE);
    for mode in ["normal", "low_space", "read_only"] {
        modes.put(&[mode], u64::from(mode == now));
    }
    if let Some(bytes) = figures.store_bytes {
        out.family(&table::STORE_BYTES).put(&[], bytes);
    }
    let mut rows = out.family(&table::STORE_ROWS);
    for (table, count) in store.rows.iter().flatten() {
        rows.put(&[table], *count);
    }
}

fn sampled(out: &mut Exposition, sweep: &Sweep) {
    let age = Instant::now().saturating_duration_since(sweep.instant);
    out.family(&table::SWEEP_AGE).put(&[], age.as_secs_f64());
    out.family(&table::SWEEP_TIME).put(&[], sweep.took.as_secs_f64());
    let mut problems = out.family(&table::SWEEP_PROBLEMS);
    sweep.problems.iter().for_each(|(source, _)| problems.put(&[source], 1_u64));
    // By metric, since a family's samples stand together.
    let objects: Vec<Named> = sweep.objects.iter().map(Named::new).collect();
    let mut by_metric: Vec<Vec<(&Named, &Figure)>> = vec![Vec::new(); METRICS.len()];
    for (named, object) in objects.iter().zip(&sweep.objects) {
        for figure in &object.figures {
            if let Some(of_metric) = by_metric.get_mut(usize::from(figure.metric.0)) {
                of_metric.push((named, figure));
            }
        }
    }
    for ((metric, family), figures) in METRICS.iter().zip(table::SAMPLED.iter()).zip(&by_metric) {
        let mut samples = out.family(family);
        for (object, figure) in figures {
            let (value, instance) = (figure.value, figure.instance.as_deref().unwrap_or(""));
            match (metric.of, metric.instance) {
                (Of::Host, None) => samples.put(&[], value),
                (Of::Host, Some(_)) => samples.put(&[instance], value),
                (Of::Domain, None) => samples.put(&[&object.vm, object.name], value),
                (Of::Domain, Some(_)) => samples.put(&[&object.vm, object.name, instance], value),
            }
        }
    }
}

/// An object's labels, made once for all its figures.
struct Named<'a> {
    /// A VM's id; what is no VM of ours as in events: `dom0`, `domain/7`.
    vm: String,
    name: &'a str,
}

impl<'a> Named<'a> {
    fn new(object: &'a ObjectFigures) -> Self {
        let vm = match object.object {
            Object::Vm(vm) => vm.to_string(),
            other => other.to_string(),
        };
        Self { vm, name: &object.name }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Ended;
    use crate::model::histogram::{Histogram, JOB_BOUNDS};

    fn text(out: Exposition) -> String {
        out.end().iter().map(|piece| std::str::from_utf8(piece).unwrap()).collect()
    }

    #[test]
    fn a_text_that_was_cut_says_so() {
        let mut out = Exposition::bounded(Form::OpenMetrics, 500);
        for _ in 0..10 {
            delivery(&mut out, &[Delivery { stream: "events", ..Delivery::default() }]);
        }
        let count = out.left_out();
        assert!(count > 0);
        left_out(&mut out);
        let text = text(out);
        assert!(text.ends_with(&format!("\ndom0d_metrics_left_out {count}\n# EOF\n")), "{text}");
    }

    #[test]
    fn failed_jobs_are_counted_before_the_first_has_failed() {
        let told = |ended: &[(&str, u64)]| {
            let ended = ended.iter().map(|(verb, failed)| Ended {
                verb: (*verb).to_owned(),
                succeeded: 1,
                failed: *failed,
                cancelled: 1,
                took: Histogram::new(JOB_BOUNDS).counted(),
            });
            let mut out = Exposition::new(Form::OpenMetrics);
            jobs(&mut out, &job::Figures { ended: ended.collect(), ..job::Figures::default() });
            text(out)
                .lines()
                .find_map(|line| line.strip_prefix("dom0d_jobs_failed_total "))
                .map(str::to_owned)
        };
        assert_eq!(told(&[]).as_deref(), Some("0"));
        assert_eq!(told(&[("start_vm", 2), ("stop_vm", 3)]).as_deref(), Some("5"));
    }
}
