//! The page `docs/metrics.md` and the rules `docs/alerts.yml`, made from the table and from the alerts below. The test
//! holds that both are what is said here; `UPDATE_DOCS=1 cargo test --lib reference` writes them anew.

use super::table::{Family, Kind, OWN, SAMPLED};
use std::fmt::Write;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/alerts.yml");

struct Alert {
    name: &'static str,
    /// In Prometheus's words.
    when: &'static str,
    lasting: &'static str,
    severity: &'static str,
    summary: &'static str,
    what_to_do: &'static str,
}

#[rustfmt::skip]
const ALERTS: &[Alert] = &[
    Alert { name: "Dom0dDown", when: "up{job=\"dom0d\"} == 0", lasting: "2m", severity: "critical",
        summary: "dom0d does not answer on {{ $labels.instance }}.",
        what_to_do: "VMs run on without it. On the host: `systemctl status dom0d`, `journalctl -u dom0d -p warning`. If it runs, is `metrics.listen` what Prometheus asks, and was the port free (`journalctl -u dom0d -g metrics`)?" },
    Alert { name: "Dom0dRestarts", when: "changes(dom0d_process_start_time_seconds[30m]) > 3", lasting: "0m", severity: "warning",
        summary: "dom0d was started more than three times in half an hour on {{ $labels.instance }}.",
        what_to_do: "`journalctl -u dom0d -p err` says why it ended. Jobs go on after each start; none is lost." },
    Alert { name: "Dom0dStoreReadOnly", when: "dom0d_store_mode{mode=\"read_only\"} == 1", lasting: "1m", severity: "critical",
        summary: "The store on {{ $labels.instance }} can only be read: nothing can be changed.",
        what_to_do: "The log says why (`journalctl -u dom0d -g store`): a disk that failed, a file system that went read-only. Mend that; the daemon opens the store again by itself." },
    Alert { name: "Dom0dDiskFull", when: "dom0d_store_mode{mode=\"low_space\"} == 1", lasting: "1m", severity: "critical",
        summary: "The disk of dom0d's state on {{ $labels.instance }} is nearly full: new jobs are refused.",
        what_to_do: "Free space on the file system of the state folder. Stopping VMs and recovery still work, from the reserve. It goes back to normal by itself." },
    Alert { name: "Dom0dSlowDisk", when: "histogram_quantile(0.99, rate(dom0d_store_commit_duration_seconds_bucket[10m])) > 0.5", lasting: "10m", severity: "warning",
        summary: "One commit in a hundred takes longer than half a second on {{ $labels.instance }}.",
        what_to_do: "Each change waits for the disk of the state folder. Look at what else writes there (`iostat -x 1`), or move the state to a disk of its own." },
    Alert { name: "Dom0dCommitsStuck", when: "min_over_time(dom0d_store_commits_waiting[5m]) > 0 and rate(dom0d_store_commit_duration_seconds_count[5m]) == 0", lasting: "0m", severity: "critical",
        summary: "The store on {{ $labels.instance }} has written nothing for five minutes, and something waits to be written.",
        what_to_do: "The disk of the state folder hangs. Look at the kernel's log (`dmesg`) for errors of the disk or its controller." },
    Alert { name: "Dom0dJobsFail", when: "increase(dom0d_jobs_failed_total[15m]) > 5", lasting: "0m", severity: "warning",
        summary: "More than five jobs failed within 15 minutes on {{ $labels.instance }}.",
        what_to_do: "`dom0ctl job list --state failed` shows them, `dom0ctl job show ID` the step and why; `dom0d_jobs_ended_total` has them by verb." },
    Alert { name: "Dom0dLockWait", when: "dom0d_lock_oldest_wait_seconds > 900", lasting: "5m", severity: "warning",
        summary: "A job on {{ $labels.instance }} has waited for a lock for more than a quarter of an hour.",
        what_to_do: "`dom0ctl lock list` shows who holds what and who waits; a long migration is no fault. `dom0ctl job cancel ID` ends the holder, and what it did is taken back." },
    Alert { name: "Dom0dQueueGrows", when: "dom0d_jobs_open{state=\"queued\"} > 1000", lasting: "10m", severity: "warning",
        summary: "More than a thousand jobs wait on {{ $labels.instance }}.",
        what_to_do: "A manager asks for more than the host does, or one job holds the `host` lock: `dom0ctl lock list`. At `jobs.max_open` further ones are refused." },
    Alert { name: "Dom0dSlowCalls", when: "histogram_quantile(0.99, sum by (instance, verb, le) (rate(dom0d_rpc_duration_seconds_bucket{verb=~\"list_vms|list_vm|vm_list|vm_get|job_get|job_list|event_list|lock_list|host_get|get_api_version\"}[10m]))) > 1", lasting: "10m", severity: "warning",
        summary: "Calls of {{ $labels.verb }}, which reads from memory, take longer than a second on {{ $labels.instance }}.",
        what_to_do: "dom0 has too little CPU time, or the toolstack hangs: compare `dom0d_loop_lag_max_seconds` and `dom0d_dom0_cpu_steal_seconds_total`, and try `xl list` on the host." },
    Alert { name: "Dom0dLoopLag", when: "dom0d_loop_lag_max_seconds > 1", lasting: "5m", severity: "warning",
        summary: "dom0d's workers on {{ $labels.instance }} are held up for more than a second.",
        what_to_do: "dom0 gets too little CPU time (`xl sched-credit2`, `xl vcpu-list`), or this is a fault of dom0d: please report it with its log." },
    Alert { name: "Dom0dDeliveryStands", when: "dom0d_delivery_behind > 0 and dom0d_delivery_last_success_age_seconds > 600", lasting: "5m", severity: "warning",
        summary: "The manager has taken nothing of {{ $labels.stream }} from {{ $labels.instance }} for more than ten minutes, and something waits.",
        what_to_do: "Nothing is lost yet: it is kept and delivered when the manager is back. Is the manager up, is its address right (`dom0ctl host show`), does it accept the host's certificate? The log says what it answers." },
    Alert { name: "Dom0dDeliveryBehind", when: "dom0d_delivery_behind > 50000", lasting: "10m", severity: "critical",
        summary: "{{ $labels.instance }} has more than 50,000 of {{ $labels.stream }} that the manager has not taken; the oldest will be dropped.",
        what_to_do: "As for Dom0dDeliveryStands. What is dropped is told to the manager as a gap." },
    Alert { name: "Dom0dCriticalEvents", when: "dom0d_alerts_open{severity=\"critical\"} > 0", lasting: "1m", severity: "critical",
        summary: "{{ $value }} critical events are open on {{ $labels.instance }}.",
        what_to_do: "`dom0ctl event list --severity critical --unacknowledged` shows them." },
    Alert { name: "Dom0dGuessing", when: "rate(dom0d_wire_unauthorized_total[5m]) > 0.5", lasting: "10m", severity: "warning",
        summary: "Somebody tries to log in to {{ $labels.instance }} again and again without success.",
        what_to_do: "`journalctl -u dom0d -g Unauthorized` tells the address. After a changed password it may be a manager that still has the old one." },
    Alert { name: "Dom0dDescriptors", when: "dom0d_process_open_fds / dom0d_process_max_fds > 0.8", lasting: "10m", severity: "warning",
        summary: "dom0d on {{ $labels.instance }} has used four fifths of its descriptors.",
        what_to_do: "Too many connections (`dom0d_wire_open_connections`): lower `wire.max_connections_per_address`, or raise `LimitNOFILE` of the unit." },
    Alert { name: "Dom0dMemory", when: "dom0d_process_resident_memory_bytes > 512 * 1024 * 1024", lasting: "30m", severity: "warning",
        summary: "dom0d on {{ $labels.instance }} takes more than 512 MiB.",
        what_to_do: "It should take some tens of MiB. Please report it with its log and `dom0d_store_rows`." },
    Alert { name: "Dom0dFiguresOld", when: "dom0d_sample_age_seconds > 300", lasting: "0m", severity: "warning",
        summary: "The figures of host and domains on {{ $labels.instance }} are more than five minutes old.",
        what_to_do: "Nothing was read since, which is a fault of dom0d, or dom0 gets no CPU time: see Dom0dLoopLag, and the log." },
    Alert { name: "Dom0dFiguresMissing", when: "dom0d_sample_problem == 1", lasting: "5m", severity: "warning",
        summary: "A source of figures on {{ $labels.instance }} cannot be read: {{ $labels.source }}.",
        what_to_do: "It fails or hangs, and its figures are not there; all others are. The log says why (`journalctl -u dom0d -g statistics`)." },
    Alert { name: "Dom0dFiguresNone", when: "up{job=\"dom0d\"} == 1 unless on (instance) dom0d_sample_age_seconds", lasting: "5m", severity: "warning",
        summary: "There are no figures of host and domains on {{ $labels.instance }}, though dom0d answers.",
        what_to_do: "The first reading has not ended: see the log (`journalctl -u dom0d`), and try `xl list` on the host." },
    Alert { name: "Dom0MemoryLow", when: "dom0d_dom0_memory_available_bytes / dom0d_dom0_memory_total_bytes < 0.05", lasting: "10m", severity: "critical",
        summary: "dom0 on {{ $labels.instance }} has less than a twentieth of its memory left.",
        what_to_do: "Before the kernel ends something that VMs need: find what takes it (`ps axo rss,cmd --sort -rss`), or give dom0 more (`dom0_mem` of Xen, `xl mem-set 0`)." },
    Alert { name: "HostLinkErrors", when: "rate(dom0d_link_errors_total[10m]) > 1", lasting: "10m", severity: "warning",
        summary: "Link {{ $labels.link }} on {{ $labels.instance }} has errors.",
        what_to_do: "Cable, transceiver or switch port: `ethtool -S LINK`." },
];

/// In single quotes YAML knows no escape but the quote doubled.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn rules() -> String {
    let mut rules = String::from(
        "# Alerts for hosts with dom0d: rules for Prometheus, which scrapes them as the job `dom0d`. Made from\n\
         # src/metrics/reference.rs; docs/metrics.md says how to use them and what to do.\n\
         groups:\n  - name: dom0d\n    rules:\n",
    );
    for alert in ALERTS {
        writeln!(rules, "      - alert: {}", alert.name).unwrap();
        writeln!(rules, "        expr: {}", quoted(alert.when)).unwrap();
        writeln!(rules, "        for: {}", alert.lasting).unwrap();
        writeln!(rules, "        labels:\n          severity: {}", alert.severity).unwrap();
        writeln!(rules, "        annotations:\n          summary: {}", quoted(alert.summary)).unwrap();
        writeln!(rules, "          description: {}", quoted(alert.what_to_do)).unwrap();
    }
    rules
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn row(page: &mut String, family: &Family) {
    let suffix = if family.kind == Kind::Counter { "_total" } else { "" };
    let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
    let cells = [
        format!("`{}{suffix}`", family.name),
        family.kind.as_str().to_owned(),
        labels.join(", "),
        cell(family.meaning),
        cell(family.source),
    ];
    writeln!(page, "| {} |", cells.join(" | ")).unwrap();
}

const HEAD: &str = "\
# Metrics

Made from the table of families (`src/metrics/table.rs`, `src/stats/metric.rs`) and the alerts (`src/metrics/reference.rs`).

The daemon serves its figures at `http://127.0.0.1:9178/metrics` as OpenMetrics 1.0 (and as the older Prometheus text for a
reader whose `Accept` names only `text/plain`). The setting `metrics.listen` says where; `\"\"` is nowhere. With `--dev` a free
port is taken, which the log tells (`--metrics-listen` names one). The listener knows no credentials and no TLS: whoever can
connect reads names of VMs and their use of the host, and can change nothing. To read it from elsewhere, put a proxy with
TLS before it, or listen on the address of a network of trust.

    scrape_configs:
      - job_name: dom0d
        static_configs:
          - targets: ['127.0.0.1:9178']
    rule_files:
      - alerts.yml

Figures of the host and its domains are as old as the last sweep (`dom0d_sample_age_seconds`); all others are of the moment.
A scrape asks nothing of Xen, the kernel or the disk. A figure that is not known is not there. Counters of a domain begin
anew with each of its lives; counters of the daemon with each of its starts.

The label `vm` is a VM's id, `dom0`, or `domain/NUMBER` for a domain that is no VM of ours; `name` is its name.
";

fn page() -> String {
    let mut page = HEAD.to_owned();
    let title = "\n| name | type | labels | meaning | source |\n|---|---|---|---|---|\n";
    write!(page, "\n## The daemon\n{title}").unwrap();
    OWN.iter().for_each(|family| row(&mut page, family));
    write!(page, "\n## The host and its domains\n{title}").unwrap();
    SAMPLED.iter().for_each(|family| row(&mut page, family));
    page.push_str(
        "\n## Alerts\n\n`docs/alerts.yml` has these as rules for Prometheus; they take it that hosts are scraped as the job `dom0d`.\n",
    );
    for alert in ALERTS {
        let summary =
            alert.summary.replace("{{ $labels.instance }}", "the host").replace("{{ $labels.", "its ");
        let summary = summary.replace("{{ $value }} c", "C").replace(" }}", "");
        let lasting =
            if alert.lasting == "0m" { "at once".to_owned() } else { format!("for {}", alert.lasting) };
        write!(page, "\n### {} ({})\n\n{summary}\n\n", alert.name, alert.severity).unwrap();
        write!(page, "    {}\n\n{lasting}. {}\n", alert.when, alert.what_to_do).unwrap();
    }
    page
}

#[test]
fn the_page_and_the_rules_say_what_the_table_says() {
    for (file, made) in [(PAGE, page()), (RULES, rules())] {
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(file, &made).unwrap();
        }
        let kept = std::fs::read_to_string(file).unwrap_or_default();
        assert!(kept == made, "{file} is old; UPDATE_DOCS=1 cargo test --lib reference writes it anew");
    }
}

#[test]
fn every_alert_is_about_a_metric_and_labels_that_there_are() {
    let samples = |family: &Family| match family.kind {
        Kind::Gauge => vec![family.name.to_string()],
        Kind::Counter => vec![format!("{}_total", family.name)],
        Kind::Histogram => ["_bucket", "_count", "_sum"].map(|end| format!("{}{end}", family.name)).to_vec(),
    };
    let all: Vec<String> = OWN.iter().copied().chain(SAMPLED.iter()).flat_map(samples).collect();
    for alert in ALERTS {
        let words = alert.when.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let named: Vec<&str> = words.filter(|word| word.starts_with("dom0d_")).collect();
        assert!(!named.is_empty() || alert.name == "Dom0dDown", "{}", alert.name);
        for name in named {
            assert!(all.iter().any(|known| known == name), "{}: there is no {name}", alert.name);
        }
    }
}
