"""What monitoring reads: checked by Prometheus's own tools, scraped by Prometheus itself, and asked for by curl."""

import json
import pathlib
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request

from harness import PATIENCE_S, REPO, ROOT, Daemon, DaemonCase, new_vm, run, wait_for

OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
# What Prometheus 2 and 3 send.
PROMETHEUS = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"  # noqa: E501


def address(daemon):
    """Where the daemon serves its metrics: with --dev a free port, which its log tells."""
    told = re.compile(r"metrics are served address=(127\.0\.0\.1:\d+)")
    return wait_for("the address of the metrics", lambda: told.search(daemon.log.read_text()))[1]


def fetch(daemon, accept=None):
    request = urllib.request.Request(f"http://{address(daemon)}/metrics", headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def samples(text):
    """{name: {labels as written: value}}"""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, value = line.rsplit(" ", 1)
            name, _, labels = series.partition("{")
            found.setdefault(name, {})[labels.rstrip("}")] = float(value)
    return found


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class TheFigures(DaemonCase):
    def test_promtool_finds_nothing_to_say_about_the_text(self):
        vm, params = new_vm("watched")
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        kind, text = fetch(self.daemon, "text/plain")
        self.assertTrue(kind.startswith("text/plain; version=0.0.4"), kind)
        checked = run("promtool", "check", "metrics", input=text)
        self.assertEqual((checked.returncode, checked.stdout + checked.stderr), (0, ""))

    def test_what_was_done_is_counted(self):
        before = samples(fetch(self.daemon)[1])
        vm, params = new_vm("counted")
        self.proxy.create_vm(REPO, vm, params)
        for _ in range(5):
            self.proxy.echo("x")
        self.assertFault("VM", self.proxy.vm_get, "no such VM")
        after = samples(fetch(self.daemon)[1])

        def grown(name, labels=""):
            return after[name][labels] - before.get(name, {}).get(labels, 0)

        self.assertEqual(grown("dom0d_rpc_duration_seconds_count", 'verb="echo"'), 5)
        self.assertEqual(grown("dom0d_rpc_faults_total", 'verb="vm_get"'), 1)
        self.assertEqual(grown("dom0d_jobs_ended_total", 'verb="create_vm",state="succeeded"'), 1)
        self.assertEqual(grown("dom0d_vms", 'state="off"'), 1)
        self.assertGreaterEqual(grown("dom0d_store_commit_duration_seconds_count"), 2)
        self.assertGreaterEqual(grown("dom0d_events_last_number"), 1)
        self.assertGreaterEqual(grown("dom0d_wire_calls_total"), 7)
        self.assertEqual(grown("dom0d_metrics_scrapes_total"), 1)
        self.assertEqual(after["dom0d_store_mode"]['mode="normal"'], 1)
        self.assertGreater(after["dom0d_process_resident_memory_bytes"][""], 1 << 20)
        self.assertGreater(after["dom0d_store_disk_bytes"][""], 4096)
        self.assertEqual(after["dom0d_events_kept"], after["dom0d_events_last_number"])

    def test_locks_that_wait_are_told_with_how_long_they_have(self):
        job = self.proxy.job_submit("sleep", [3600])
        vm, params = new_vm("locked")
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        self.daemon.deafen(vm)
        stop = self.proxy.job_submit("stop_vm", [REPO, vm, False])
        wait_for("the stop to begin", lambda: self.proxy.job_get(stop)["state"] == "running")
        wait = self.proxy.job_submit("start_vm", [REPO, vm])
        told = lambda: samples(fetch(self.daemon)[1])  # noqa: E731
        wait_for("the wait to be told", lambda: told()["dom0d_locks"]['state="waiting"'] > 0)
        self.assertEqual(told()["dom0d_jobs_open"]['state="queued"'], 1)
        wait_for("it to grow", lambda: told()["dom0d_lock_oldest_wait_seconds"][""] > 0)
        for one in (wait, stop, job):
            self.proxy.job_cancel(one)
            wait_for("the job to end", lambda one=one: self.proxy.job_get(one)["ended"])
        self.assertEqual(told()["dom0d_locks"]['state="waiting"'], 0)

    def test_curl_gets_open_metrics_and_other_methods_and_paths_are_refused(self):
        url = f"http://{address(self.daemon)}/metrics"
        done = run("curl", "--silent", "--show-error", "--fail", "--include", url)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(OPEN_METRICS, done.stdout)
        self.assertTrue(done.stdout.endswith("# EOF\n"))
        for options, status in [
            (["--data", "x=1", url], "405"),
            (["--request", "DELETE", url], "405"),
            ([url.replace("/metrics", "/")], "404"),
            (["--header", "X-Long: " + "y" * 60000, url], "431"),
            (["--head", url], "200"),
        ]:
            command = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", *options]
            self.assertEqual(run(*command).stdout, status, options[0])

    def test_calls_are_answered_while_monitoring_is_abused(self):
        host, port = address(self.daemon).split(":")
        stop = threading.Event()

        def abuse():
            while not stop.is_set():
                held = []
                for number in range(20):
                    one = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
                    one.sendall(b"" if number % 2 else b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                    held.append(one)
                for one in held:
                    one.close()

        abusers = [threading.Thread(target=abuse) for _ in range(2)]
        for one in abusers:
            one.start()
        try:
            slowest = 0
            for _ in range(50):
                began = time.monotonic()
                self.proxy.echo("x")
                slowest = max(slowest, time.monotonic() - began)
            self.assertLess(slowest, 30)
        finally:
            stop.set()
            for one in abusers:
                one.join()
        after = wait_for("the listener to be itself again", lambda: fetch(self.daemon)[1])
        self.assertLess(samples(after)["dom0d_process_open_fds"][""], 200)


class Prometheus(DaemonCase):
    """The real one scrapes a daemon by its own parser, with the shipped rules loaded."""

    def setUp(self):
        folder = self.daemon.folder / "prometheus"
        folder.mkdir()
        port = free_port()
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 5s, scrape_timeout: 5s, evaluation_interval: 1s}\n"
            f"rule_files: ['{ROOT / 'docs' / 'alerts.yml'}']\n"
            f"scrape_configs: [{{job_name: dom0d, static_configs: [{{targets: ['{address(self.daemon)}']}}]}}]\n"
        )
        self.log = (folder / "log").open("wb")
        self.addCleanup(self.log.close)
        self.process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
            ],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        self.addCleanup(self.process.wait, PATIENCE_S)
        self.addCleanup(self.process.terminate)
        self.url = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, path, **query):
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                return json.load(answer)["data"]
        except OSError:
            # Not there yet.
            return None

    def query(self, expression):
        data = self.ask("query", query=expression)
        return [(one["metric"], float(one["value"][1])) for one in data["result"]] if data else []

    def test_it_reads_all_there_is_and_finds_nothing_to_alarm(self):
        wait_for("a good scrape", lambda: self.query('up{job="dom0d"} == 1'))
        (target,) = self.ask("targets")["activeTargets"]
        self.assertEqual((target["health"], target["lastError"]), ("up", ""))
        ((labels, value),) = self.query("last_over_time(dom0d_build_info[1h])")
        self.assertEqual(value, 1)
        self.assertIn("version", labels)
        _, text = fetch(self.daemon, PROMETHEUS)
        for name in samples(text):
            # What came up since the last scrape is there with the next one; what a late one lacks was there before.
            wait_for(name, lambda name=name: self.query(f"last_over_time({name}[1h])"))
        kinds = self.ask("targets/metadata", metric="dom0d_store_commit_duration_seconds")
        self.assertEqual([(one["type"], one["unit"]) for one in kinds], [("histogram", "seconds")])
        (group,) = self.ask("rules")["groups"]
        self.assertEqual({rule["health"] for rule in group["rules"]} - {"unknown"}, {"ok"})
        self.assertEqual([rule["name"] for rule in group["rules"] if rule["state"] == "firing"], [])


class TheRules(DaemonCase):
    def test_promtool_takes_the_shipped_alerts(self):
        checked = run("promtool", "check", "rules", str(ROOT / "docs" / "alerts.yml"))
        self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)

    def test_they_alarm_for_what_they_are_for_and_for_nothing_else(self):
        tests = pathlib.Path(__file__).with_name("alerts_test.yml")
        checked = run("promtool", "test", "rules", str(tests))
        self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)


class Several(DaemonCase):
    def test_two_daemons_that_are_tried_out_serve_their_own(self):
        other = Daemon()
        self.addCleanup(other.stop)
        self.assertNotEqual(address(self.daemon), address(other))
        other.proxy().echo("x")
        self.assertIn('verb="echo"', samples(fetch(other)[1])["dom0d_rpc_duration_seconds_count"])
        self.assertNotIn('verb="echo"', samples(fetch(self.daemon)[1]).get("dom0d_rpc_duration_seconds_count", {}))
