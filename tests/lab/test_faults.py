"""What dom0d stands on fails: xl hangs or writes garbage, a hotplug script hangs, XenStore stands still or its connection
breaks. Each call ends by its deadline with a clear fault, nothing is left of what was half made, calls about other VMs
go on meanwhile, and afterwards everything works again."""

import time
import xmlrpc.client

from case import PATIENCE_S, REPO, LabCase, from_form
from nodes import wait_for

XL = "/usr/lib/xen-4.17/bin/xl"
VIF_SCRIPT = "/etc/xen/scripts/vif-bridge"
STORE = "/run/xenstored"

# xl, but for the words that /run/bad-xl tells: `hang sysrq 5`, `garbage create -e`.
BAD_XL = """#!/bin/bash
how='' words=''
[ -e /run/bad-xl ] && read -r how words </run/bad-xl
if [ -n "$how" ] && [[ "$* " == "$words "* ]]; then
  case $how in
    hang) setsid sleep 54321 & wait ;;
    garbage) head -c 100000 /dev/urandom; head -c 100000 /dev/urandom >&2; echo "nothing of sense" >&2; exit 0 ;;
  esac
fi
exec -a "$0" XL.real "$@"
""".replace("XL", XL)

HANGING_SCRIPT = """#!/bin/bash
exec sleep 54321
"""


@from_form("brief")
class Faults(LabCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # A deadline that an xl in good health keeps here, by how long this machine takes just now.
        began = time.monotonic()
        cls.node.sh("xl list >/dev/null; xl info >/dev/null")
        cls.limit_s = int(max(20, 60 * (time.monotonic() - began)))
        cls.agent.halt()
        cls.addClassCleanup(cls.again)
        cls.node.sh(f"""
            sed -i 's/^\\[vm\\]/&\\ntoolstack_timeout_s = {cls.limit_s}/' /etc/dom0d/dom0d.toml
            cp -n {XL} {XL}.real
            cat >/run/bad-xl.sh <<'SCRIPT'\n{BAD_XL}SCRIPT
            cat >/run/hangs.sh <<'SCRIPT'\n{HANGING_SCRIPT}SCRIPT
            chmod 755 /run/bad-xl.sh /run/hangs.sh
            mount --bind /run/bad-xl.sh {XL}
        """)
        cls.agent.start()
        print(f"    deadline {cls.limit_s} s", flush=True)

    @classmethod
    def again(cls):
        cls.agent.halt()
        cls.node.sh(f"umount {XL}; rm -f {XL}.real /run/bad-xl /etc/dom0d/dom0d.toml; /lab/deploy")
        cls.agent.start()

    def setUp(self):
        super().setUp()
        self.addCleanup(self.node.sh, "rm -f /run/bad-xl")

    def bad(self, words):
        self.node.sh(f"echo '{words}' >/run/bad-xl")

    def bare(self, name):
        """A VM without devices: they take most of the time of a build."""
        vm, _ = self.create(name, disk=False, vif=False)
        return vm

    def unhurt(self, job, other):
        """While a job runs, reads are answered at once, and another VM's calls are as quick as ever."""
        proxy = self.agent.proxy()
        reads, calls = [], []
        while proxy.job_get(job)["state"] in ("queued", "running"):
            for times, verb, arguments in (
                (reads, "list_vms", ()),
                (calls, "pause_vm", (REPO, other)),
                (reads, "vm_get", (other,)),
                (calls, "unpause_vm", (REPO, other)),
                (calls, "sysrq_vm", (REPO, other, "h")),
            ):
                began = time.monotonic()
                try:
                    getattr(proxy, verb)(*arguments)
                except xmlrpc.client.Fault as fault:
                    took_s = time.monotonic() - began
                    raise AssertionError(f"{verb} meanwhile, after {took_s:.1f} s: {fault.faultString}") from fault
                times.append(time.monotonic() - began)
        print(f"    meanwhile {len(reads)} reads, most {max(reads):.2f} s; {len(calls)} calls about another VM, most "
              f"{max(calls):.2f} s", flush=True)  # fmt: skip
        self.assertLess(max(calls), self.limit_s)
        return proxy.job_get(job)

    def assertNothingHangs(self):
        """What a killed call has started is gone too."""
        wait_for("nothing to hang", lambda: not self.node.run("pgrep -fx 'sleep 54321'").output.strip(), PATIENCE_S, 1)

    def test_an_xl_that_hangs_is_ended_at_its_deadline(self):
        hurt, well = self.bare("hurt"), self.bare("well")
        for vm in (hurt, well):
            self.proxy.start_vm(REPO, vm)
        self.bad(f"hang sysrq {self.agent.domains()['hurt'][0]}")
        began = time.monotonic()
        job = self.unhurt(self.proxy.job_submit("sysrq_vm", [REPO, hurt, "h"]), well)
        self.assertGreaterEqual(time.monotonic() - began, self.limit_s)
        self.assertEqual((job["state"], job["fault"]["name"]), ("failed", "TOOLSTACK_TIMEOUT"))
        self.assertNothingHangs()
        self.assertEqual(self.state(hurt), "running")
        self.node.sh("rm /run/bad-xl")
        self.proxy.sysrq_vm(REPO, hurt, "h")

    def test_a_build_that_hangs_or_writes_garbage_leaves_no_domain(self):
        vm = self.bare("unborn")
        for how in ("hang", "garbage"):
            with self.subTest(how):
                self.bad(f"{how} create -e")
                job = self.proxy.job_submit("start_vm", [REPO, vm])
                ended = self.proxy.job_wait(job, PATIENCE_S)
                self.assertEqual((ended["state"], ended["fault"]["name"]), ("failed", "TOOLSTACK_FAILED"), ended["fault"])
                self.assertLess(len(ended["fault"]["text"]), 6000)
                self.assertEqual(self.agent.domains(), {})
                self.assertEqual(self.state(vm), "off")
                self.assertNothingHangs()
        self.node.sh("rm /run/bad-xl")
        self.proxy.start_vm(REPO, vm)

    def test_a_hotplug_script_that_hangs_fails_the_start_and_leaves_no_domain(self):
        vm, _ = self.create("unplugged")
        well = self.bare("well")
        self.proxy.start_vm(REPO, well)
        self.node.sh(f"mount --bind /run/hangs.sh {VIF_SCRIPT}")
        unmount = f"mountpoint -q {VIF_SCRIPT} && umount {VIF_SCRIPT}; true"
        self.addCleanup(self.node.sh, unmount)
        began = time.monotonic()
        job = self.unhurt(self.proxy.job_submit("start_vm", [REPO, vm]), well)
        print(f"    failed after {time.monotonic() - began:.0f} s: {job['fault']['text'][:200]}", flush=True)
        self.assertEqual((job["state"], job["fault"]["name"]), ("failed", "TOOLSTACK_FAILED"), job["fault"])
        self.assertEqual(set(self.agent.domains()), {"well"})
        self.assertEqual(self.state(vm), "off")
        self.assertNothingHangs()
        self.assertNotIn("vif", self.node.sh("ip -o link"))
        self.node.sh(unmount)
        self.proxy.start_vm(REPO, vm)
        self.up("unplugged")

    def test_while_xenstore_stands_still_calls_wait_or_end_and_reads_are_answered(self):
        vm = self.bare("waits")
        self.proxy.start_vm(REPO, vm)
        still = "kill -STOP $(cat /run/xenstore.pid)"
        goes_on = "kill -CONT $(cat /run/xenstore.pid)"
        self.addCleanup(self.node.sh, goes_on)
        # Shorter than a XenStore that is given up: the call waits, and is done.
        self.node.sh(still)
        job = self.proxy.job_submit("send_to_guest", [REPO, vm, {"key": "value"}])
        began = time.monotonic()
        self.assertEqual(self.proxy.echo("here"), "here")
        self.assertIn("waits", [one["name"] for one in self.proxy.list_vms()])
        answered_s = time.monotonic() - began
        self.node.sh(f"sleep 10; {goes_on}")
        self.assertEqual(self.proxy.job_wait(job, PATIENCE_S)["state"], "succeeded")
        # Longer: it ends with a clear fault.
        self.node.sh(still)
        began = time.monotonic()
        with self.assertRaisesRegex(xmlrpc.client.Fault, "TOOLSTACK_(TIMEOUT|UNREACHABLE)"):
            self.proxy.pause_vm(REPO, vm)
        print(f"    reads in {answered_s:.2f} s; a fault after {time.monotonic() - began:.1f} s", flush=True)
        self.node.sh(goes_on)
        self.proxy.stop_vm(REPO, vm, True)
        self.assertEqual(self.agent.domains(), {})

    def test_a_lost_connection_to_xenstore_is_made_anew_and_no_end_is_missed(self):
        """The daemon is joined to XenStore by a relay that is then ended."""
        vm = self.bare("watched")
        self.proxy.start_vm(REPO, vm)
        relay = f"""
            setsid systemd-socket-activate -l {STORE}/socket /lib/systemd/systemd-socket-proxyd {STORE}/socket.real \
                >/run/relay.log 2>&1 </dev/null &
            echo $! >/run/relay.pid
            until [ -S {STORE}/socket ]; do sleep 0.1; done"""
        self.agent.halt()
        self.node.sh(f"mv {STORE}/socket {STORE}/socket.real; {relay}")
        self.addCleanup(self.node.sh, f"kill $(cat /run/relay.pid); mv {STORE}/socket.real {STORE}/socket")
        self.agent.start()
        self.assertEqual(self.state(vm), "running")
        last = self.proxy.event_list()["last"]
        # Between the two nobody sees the domain go.
        self.node.sh(f"kill $(cat /run/relay.pid); xl destroy watched; rm {STORE}/socket; {relay}")
        told = lambda: "vm.gone" in [event["type"] for event in self.proxy.event_list({"since": last})["events"]]  # noqa: E731
        wait_for("the event", told, PATIENCE_S, 1)
        self.assertEqual(self.state(vm), "off")
        self.proxy.start_vm(REPO, vm)
        self.node.sh("xl destroy watched")
        wait_for("the new connection to tell", lambda: self.state(vm) == "off", PATIENCE_S, 1)
