"""One boot under systemd, with the units that are shipped, unchanged."""

import time

from case import PATIENCE_S, REPO, LabCase, from_form
from nodes import wait_for


@from_form("brief")
class UnderSystemd(LabCase):
    systemd = True

    def show(self, what, unit="dom0d.service"):
        return self.node.sh(f"systemctl show -P {what} {unit}").strip()

    def test_it_says_when_it_is_ready_and_keeps_the_watchdog_quiet(self):
        self.assertEqual(self.show("ActiveState"), "active")
        self.assertEqual(self.show("Type"), "notify")
        self.assertEqual(self.show("NRestarts"), "0")
        seconds = int(self.show("WatchdogUSec").rstrip("s") or 0)
        pid = self.agent.pid()
        time.sleep(seconds + 5)
        self.assertEqual(self.agent.pid(), pid, "it is still the same process when the watchdog's time has passed")
        self.assertIn("dom0d", self.node.sh("journalctl -u dom0d.service -o cat -n 20"))

    def test_its_socket_wakes_it(self):
        self.node.sh("systemctl stop dom0d.service")
        self.assertEqual(self.show("ActiveState"), "inactive")
        self.assertEqual(self.show("ActiveState", "dom0d.socket"), "active")
        self.assertEqual(self.proxy.echo("wake"), "wake")
        self.assertEqual(self.show("ActiveState"), "active")

    def test_a_restart_never_ends_a_vm(self):
        name = "outlives"
        vm, _ = self.create(name)
        self.proxy.start_vm(REPO, vm)
        self.up(name)
        domid = self.agent.domains()[name][0]
        for how in ("systemctl restart dom0d.service", "systemctl kill -s KILL dom0d.service"):
            pid = self.agent.pid()
            self.node.sh(how)
            wait_for("a new daemon", lambda: self.agent.pid() not in (None, pid), PATIENCE_S, 1)
            self.agent.wait()
            self.assertEqual(self.running(name)["domid"], str(domid))
            self.ticks_on(name)
        # What xl left running belongs to the VM and not to the daemon.
        unit = self.node.sh("systemctl show -P ControlGroup dom0d.service").strip()
        inside = self.node.sh(f"cat /sys/fs/cgroup{unit}/cgroup.procs").split()
        self.assertEqual(inside, [str(self.agent.pid())])

    def test_connections_wait_while_it_restarts(self):
        self.node.sh("systemctl restart --no-block dom0d.service")
        for number in range(20):
            self.assertEqual(self.agent.proxy().echo(str(number)), str(number))

    def test_it_does_not_start_beside_xendomains(self):
        self.node.sh("update-rc.d xendomains enable 2>/dev/null; ln -sf ../init.d/xendomains /etc/rc3.d/S02xendomains; "
                     "systemctl daemon-reload")  # fmt: skip
        self.addCleanup(self.agent.start)
        self.addCleanup(self.node.sh, "rm -f /etc/rc3.d/S02xendomains; systemctl daemon-reload; "
                                      "systemctl reset-failed dom0d.service dom0d.socket; systemctl start dom0d.socket")  # fmt: skip
        self.node.run("systemctl restart dom0d.service")
        wait_for("the refusal", lambda: self.show("ActiveState") in ("failed", "activating"), PATIENCE_S, 1)
        words = self.node.sh("journalctl -u dom0d.service -o cat -n 50")
        self.assertIn("xendomains", words)
        self.assertIn("disable", words)
