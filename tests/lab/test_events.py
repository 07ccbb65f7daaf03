"""A domain that goes without our doing is an event soon: at most a second later for 99 of 100."""

import datetime
import re
import time

from case import REPO, LabCase, by_form, from_form
from nodes import wait_for

# Ends a domain behind dom0d's back, and tells when that was asked for and when XenStore told that it has gone. Each wait
# has an end, and what did not happen is told with what was running then.
DESTROY = r"""
fail() {
  echo "$*"
  xl list
  ps axww -o pid,stat,wchan:20,args | grep -v '\['
  exit 1
}
exec {released}< <(exec xenstore-watch @releaseDomain 2>&1)
watcher=$!
# A watch fires once as it is set.
read -rt 60 -u $released line || fail "XenStore took no watch"
echo "asked $EPOCHREALTIME"
timeout 200 xl destroy %d &
destroyer=$!
read -rt 120 -u $released line || fail "XenStore told of no domain's going in two minutes: $line"
echo "gone $EPOCHREALTIME"
wait $destroyer || fail "xl destroy ended with $?"
kill $watcher
"""

# A machine that is only fast enough for a glance keeps no bar on time.
BAR_S = by_form(10, 1, 1, 1)


class SeenInTime(LabCase):
    def seen(self, name, vm):
        """Ends the VM's domain; (seconds from its going, seconds from the command) until the event's own time."""
        last = self.proxy.event_list()["last"]
        told = self.node.sh(DESTROY % self.agent.domains()[name][0])
        asked, gone = (float(re.search(rf"{word} ([\d.]+)", told)[1]) for word in ("asked", "gone"))

        def event():
            known = self.proxy.event_list({"since": last, "object": f"vm/{vm}"})["events"]
            return next((one for one in known if one["type"] == "vm.gone"), None)

        at = datetime.datetime.fromisoformat(wait_for("the event", event, pause_s=0.3)["time"]).timestamp()
        return at - gone, at - asked

    def test_a_domain_that_goes_without_our_doing_is_an_event_within_a_second(self):
        name = "goes"
        # Bare, since it is built often and need not come up.
        vm, _ = self.create(name, disk=False, vif=False)
        since_gone, since_asked = [], []
        for _ in range(by_form(5, 10, 20, 100)):
            self.proxy.start_vm(REPO, vm)
            gone, asked = self.seen(name, vm)
            since_gone.append(gone)
            since_asked.append(asked)
            self.assertEqual(self.state(vm), "off")
        for what, seconds in (("xl destroy", since_asked), ("domain gone", since_gone)):
            seconds.sort()
            print(f"    {what} -> event: p50 {1000 * seconds[len(seconds) // 2]:.0f} ms, p99 "
                  f"{1000 * seconds[int(0.99 * len(seconds))]:.0f} ms of {len(seconds)}", flush=True)  # fmt: skip
        self.assertLessEqual(since_gone[int(0.99 * len(since_gone))], BAR_S)

    @from_form("whole")
    def test_a_stop_and_a_start_at_once_do_not_meet(self):
        """`xl shutdown -w` returns before the domain is gone, and the next create then says that it exists."""
        name = "again"
        vm, _ = self.create(name)
        self.proxy.start_vm(REPO, vm)
        for force in (False, True, False):
            self.up(name)
            began = time.monotonic()
            self.proxy.stop_vm(REPO, vm, force)
            self.proxy.start_vm(REPO, vm)
            print(f"    stop (force: {force}) and start {time.monotonic() - began:.1f} s", flush=True)
            self.assertEqual(self.state(vm), "running")
