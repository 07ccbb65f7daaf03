"""What goes to a manager by itself, received by Python's own HTTPS server; and what is kept of what was measured."""

import http.server
import json
import pathlib
import shutil
import ssl
import tempfile
import threading
import time

from harness import MANAGER, PATIENCE_S, REPO, DaemonCase, new_vm, run, wait_for

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Receiver:
    """A manager's HTTPS server, which takes only callers with a certificate of the agent's CA."""

    def __init__(self, ca_pem):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dom0d-manager-"))
        made = run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", "key.pem", "-out", "manager.pem", "-days", "2", "-subj", "/CN=manager",
            "-addext", "subjectAltName=IP:127.0.0.1", cwd=self.folder)  # fmt: skip
        assert made.returncode == 0, made.stderr
        (self.folder / "agent.pem").write_text(ca_pem)
        self.pem = (self.folder / "manager.pem").read_text()
        self.items, self.heads = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.heads.append((self.headers, self.connection.getpeercert()))
                outer.items.setdefault(self.path, []).extend(json.loads(body))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_):
                pass

        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.folder / "manager.pem", self.folder / "key.pem")
        tls.verify_mode = ssl.CERT_REQUIRED
        tls.load_verify_locations(self.folder / "agent.pem")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"https://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        shutil.rmtree(self.folder)

    def of(self, path, kind):
        return [item for item in self.items.get(path, []) if item["type"] == kind]


class TheManager(DaemonCase):
    def setUp(self):
        self.receiver = Receiver(self.proxy.certificate_get()["ca_pem"])
        self.addCleanup(self.receiver.stop)

    def take(self, **more):
        self.proxy.take_ownership({"manager_uuid": MANAGER, "manager_event_url": f"{self.receiver.url}/events",
            "manager_statistic_url": f"{self.receiver.url}/stats", "manager_certificate": self.receiver.pem, **more})  # fmt: skip
        self.addCleanup(self.daemon.ctl, "ownership", "release")

    def test_events_and_figures_come_by_mutual_tls(self):
        self.take()
        self.assertIsNone(self.proxy.set_statistic_interval(10))
        self.assertIsNone(self.proxy.notify_manager("hello", {"a": [1, None, "x"]}))
        self.assertFault("up to 1000", self.proxy.notify_manager, "many", [0] * 1000)
        self.assertFault("up to 16384", self.proxy.notify_manager, "long", "x" * 16384)
        (word,) = wait_for("the word", lambda: self.receiver.of("/events", "dom0d.manager.notification"))
        self.assertEqual((word["data"]["text"], word["data"]["data"]["data"]), ("hello", {"a": [1, None, "x"]}))
        self.assertEqual(word["subject"], "host")
        sample = wait_for("a sample", lambda: self.receiver.of("/stats", "dom0d.statistics"))[0]
        self.assertTrue({"metric", "value"} <= set(sample["data"]["figures"][0]))
        headers, shown = self.receiver.heads[0]
        self.assertEqual(headers["Content-Type"], "application/cloudevents-batch+json")
        self.assertTrue(shown["subject"])
        status = self.proxy.manager_status()
        self.assertEqual((status["owned"], status["manager"]), (True, MANAGER))
        self.assertEqual([one["stream"] for one in status["streams"]], ["events", "statistics"])
        self.assertFault("interval", self.proxy.set_statistics_interval, 9)
        self.assertFault("interval", self.proxy.set_statistic_interval, "20")

    def test_the_trace_of_a_call_goes_along_to_the_delivered_event(self):
        self.take()
        vm, params = new_vm("traced")
        import xmlrpc.client

        body = xmlrpc.client.dumps((REPO, vm, params), "create_vm", allow_none=True).encode()
        connection = self.daemon.connection()
        headers = {"Content-Type": "text/xml", "traceparent": TRACE, "Authorization": self.daemon.basic()}
        connection.request("POST", "/RPC2", body, headers)
        self.assertEqual(connection.getresponse().status, 200)
        made = wait_for("the event", lambda: [e for e in self.receiver.of("/events", "dom0d.vm.created")
                                              if e["subject"].endswith(vm)])  # fmt: skip
        self.assertEqual(made[0]["traceparent"], TRACE)

    def delivers_to(self, url):
        """The deliveries hear of it a moment after the call that changed it was answered."""
        wait_for(url, lambda: self.proxy.manager_status()["streams"][0]["url"] == url)

    def test_the_older_form_has_one_url_and_it_can_be_moved(self):
        self.proxy.take_ownership(MANAGER, f"{self.receiver.url}/one")
        self.addCleanup(self.daemon.ctl, "ownership", "release")
        self.proxy.notify_manager("first")
        wait_for("the first word", lambda: self.receiver.of("/one", "dom0d.manager.notification"))
        self.assertIsNone(self.proxy.update_core_api_bindings(f"{self.receiver.url}/other", 0))
        self.delivers_to(f"{self.receiver.url}/other")
        self.proxy.notify_manager("second")
        # The first may come again, if its answer was still on its way.
        wait_for("the second word", lambda: "second" in [
            word["data"]["text"] for word in self.receiver.of("/other", "dom0d.manager.notification")])  # fmt: skip
        self.assertNotIn("second", [word["data"]["text"] for word in self.receiver.of("/one", "dom0d.manager.notification")])
        self.assertFault("url", self.proxy.update_core_api_bindings, "gopher://x")

    def test_an_operator_sees_what_is_wrong_and_what_works(self):
        self.take()
        tried = json.loads(self.daemon.ctl("-o", "json", "manager", "test").stdout)
        self.assertEqual([one["ok"] for one in tried], [True, True])
        self.assertTrue(wait_for("the test", lambda: self.receiver.of("/events", "dom0d.test")))
        self.proxy.update_core_api_bindings("https://127.0.0.1:1/")
        self.proxy.take_ownership({"manager_uuid": MANAGER, "manager_event_url": "https://127.0.0.1:1/x"})
        self.delivers_to("https://127.0.0.1:1/x")
        done = self.daemon.ctl("manager", "test")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("no connection", done.stdout + done.stderr)
        shown = self.daemon.ctl("manager", "show")
        self.assertEqual(shown.returncode, 0, shown.stderr)
        self.assertIn("https://127.0.0.1:1/x", shown.stdout)


class TheHistory(DaemonCase):
    def test_what_a_vm_does_is_measured_kept_and_drawn(self):
        vm, params = new_vm("busy")
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        dashed = f"{vm[:8]}-{vm[8:12]}-{vm[12:16]}-{vm[16:20]}-{vm[20:]}" if "-" not in vm else vm
        name = f"vm/{dashed.lower()}"

        def measured():
            latest = self.proxy.stats_latest({})
            return next((one for one in latest["objects"] if one["object"] == name), None)

        first = wait_for("the VM's figures", measured)
        self.assertEqual({"cpu_time", "memory"} - {figure["metric"] for figure in first["figures"]}, set())

        wait_for("a rate", lambda: "cpu_time" in [row["series"] for row in self.proxy.stats_list(name)])

        def history():
            begun = int(time.time()) - 60
            answer = self.proxy.stats_query(name, "cpu_time", begun)
            self.assertEqual((answer["step_s"], answer["resolution_s"], answer["unit"]), (10, 10, "s/s"))
            return [value for value in answer["values"] if value is not None]

        values = wait_for("two rates", lambda: len(history()) >= 2 and history())
        self.assertTrue(all(0 <= value <= 64 for value in values), values)
        self.assertIn("vif_rx_bytes:0", [row["series"] for row in self.proxy.stats_list(name)])
        self.assertIn(name, self.proxy.stats_list())
        drawn = self.daemon.ctl("stats", "graph", "busy", "cpu_time", "--last", "2m")
        self.assertEqual(drawn.returncode, 0, drawn.stderr)
        self.assertIn("CPU │", drawn.stdout)
        top = self.daemon.ctl("top")
        self.assertEqual(top.returncode, 0, top.stderr)
        self.assertIn("busy", top.stdout)
        self.assertFault("STATISTIC_NOT_FOUND", self.proxy.stats_query, name, "temperature", -60)
        self.assertFault("no series", self.proxy.stats_query, name, "no_such", -60)
        self.assertFault("allowed", self.proxy.stats_query, "vm/17", "memory", -60)
        self.assertFault("a year", self.proxy.stats_query, name, "memory", -60, 0, 86_400 * 400)
        year = self.proxy.stats_query(name, "memory", -86_400 * 364, 0, 10)
        self.assertEqual((year["resolution_s"], len(year["values"]) <= 366), (86_400, True))


if __name__ == "__main__":
    import unittest

    assert PATIENCE_S
    unittest.main()
