"""A VM goes from node a to node b and back while it runs, over the agents' own TLS on the link of their own; and
whatever dies meanwhile, it never runs twice and is never lost.

Its guest counts: each number must be told once, by one of the two nodes. A number told twice is a guest that ran
twice; one that nobody tells was lost on the way."""

import contextlib
import threading
import time
import unittest
import uuid
import xmlrpc.client

from case import PATIENCE_S, REPO, WARM, by_form, deployed, from_form, guest, harness
from nodes import LabError, Node, wait_for

LINK = "lan2"
ADDRESSES = {"a": "10.98.0.1:8899", "b": "10.98.0.2:8899"}
OTHER = {"a": "b", "b": "a"}
DISK = "phy:/dev/mapper/shared,xvda,w"
# Every byte of it is sent, enciphered by an emulated CPU.
MEMORY_MIB = 112
# Once both hosts are back; a machine that is only fast enough for a glance keeps no bar on time.
DECIDED_WITHIN_S = by_form(300, 60, 60, 60)
# Longer than `stall_s` of dom0d.toml.
CABLE_OUT_S = 20
ROUNDS = by_form(1, 1, 1, 3)
# How far a migration has come, as the source's daemon says in its log.
PHASES = ("prepared", "sending", "handed over", "committed")
# Of a migration that is being sent, something is to be under way.
INTO_SENDING_S = 2
# The newest tick that a guest told here, for Node.wait: it has another name while it arrives.
NEWEST = r"""
newest() {
  local at file lines
  n=0
  for file in "/var/log/xen/guest-$1.log" "/var/log/xen/guest-$1--incoming.log"; do
    [ -e "$file" ] || continue
    mapfile -t lines <"$file"
    for ((at = ${#lines[@]} - 1; at >= 0; at--)); do
      [[ ${lines[at]} =~ ^TICK\ ([0-9]+)\  ]] || continue
      [ ${BASH_REMATCH[1]} -gt $n ] && n=${BASH_REMATCH[1]}
      break
    done
  done
}"""


def tearDownModule():
    """Other suites need one node, and the CPU of the other."""
    if not WARM:
        Node("b").down()


class Pair(unittest.TestCase):
    """Two nodes whose agents trust each other."""

    @classmethod
    def setUpClass(cls):
        cls.agents = {name: deployed(name, systemd=False) for name in OTHER}
        for agent in cls.agents.values():
            cls.addClassCleanup(agent.stop)
        for name, other in OTHER.items():
            pinned = cls.ask(other).certificate_get()["ca_fingerprint"]
            for peer in cls.ask(name).peer_list():
                if peer["fingerprint"] == pinned and peer["address"] != ADDRESSES[other]:
                    cls.ask(name).peer_remove(peer["address"])
            cls.ask(name).peer_add(ADDRESSES[other], pinned)
        cls.wipe_all()

    def setUp(self):
        began = time.monotonic()
        self.addCleanup(lambda: print(f"    {self.id()}: {time.monotonic() - began:.1f} s", flush=True))

    @classmethod
    def ask(cls, name):
        """A caller of its own: threads share none, and a connection to a daemon that died is not used again."""
        agent = cls.agents[name]
        while len(agent.proxies) > 20:
            with contextlib.suppress(OSError):
                agent.proxies.pop(0)("close")()
        return agent.proxy()

    @classmethod
    def sh(cls, name, script, patience_s=PATIENCE_S):
        return cls.agents[name].node.sh(script, patience_s)

    @classmethod
    def wipe_all(cls):
        """VMs that a former run has left."""
        for name in OTHER:
            for vm in cls.ask(name).vm_list():
                cls.remove(name, vm["uuid"])

    @classmethod
    def remove(cls, name, vm):
        known = {one["uuid"]: one["state"] for one in cls.ask(name).vm_list()}
        if known.get(vm) in ("running", "paused", "ended"):
            cls.ask(name).stop_vm(REPO, vm, True)
        if vm in known:
            cls.ask(name).delete_vm(REPO, vm)

    # What is true, by those who do not lie.

    def rows(self, name, vm_name):
        """(domain's name, state letters) of the VM in `xl list`, also half a domain under a passing name."""
        rows = [line.split() for line in self.sh(name, "xl list").splitlines()[1:] if line.strip()]
        return [(row[0], row[-2]) for row in rows if row[0].split("--")[0] == vm_name]

    def told(self, name, vm_name):
        """The numbers that the guest has told on a node."""
        text = self.sh(name, f"cat /var/log/xen/guest-{vm_name}.log /var/log/xen/guest-{vm_name}--*.log 2>/dev/null || true")
        words = [line.split() for line in text.splitlines() if line.startswith("TICK ")]
        return [int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()]

    def counted(self, vm_name, *, lossless=True):
        """No number was told twice, and none is missing: the newest number."""
        numbers = {name: self.told(name, vm_name) for name in OTHER}
        for name, told in numbers.items():
            self.assertEqual(len(told), len(set(told)), f"told twice on {name}: {told}")
        both = set(numbers["a"]) & set(numbers["b"])
        self.assertEqual(both, set(), "these were told on both nodes: it ran twice")
        every = sorted(numbers["a"] + numbers["b"])
        if lossless:
            self.assertEqual(every, list(range(1, len(every) + 1)), "numbers are missing")
        return every[-1] if every else 0

    def ticks_on(self, name, vm_name):
        """Waits until the guest has counted on here."""
        node = self.agents[name].node
        further = f"newest '{vm_name}' && [ $n -gt ${{first:=$n}} ] && echo $n"
        return int(node.wait(f"guest {vm_name} to count on at {name}", further, PATIENCE_S, NEWEST))

    def unsettled(self, vm, vm_name):
        """Why it is not yet true that it runs on exactly one node and nothing is left anywhere; else the node's name."""
        states = {name: {one["uuid"]: one["state"] for one in self.ask(name).vm_list()}.get(vm) for name in OTHER}
        rows = {name: self.rows(name, vm_name) for name in OTHER}
        runs = [name for name in OTHER if any(set(state) & set("rb") and not set(state) & set("psd")
                                              for _, state in rows[name])]  # fmt: skip
        # A domain that waits for its CPU has no letter at all.
        runs += [name for name in OTHER if any(state == "------" for _, state in rows[name])]
        self.assertLess(len(runs), 2, f"it runs twice: {rows}")
        if len(runs) != 1:
            return None, f"it runs on none: {rows}, records: {states}"
        here, there = runs[0], OTHER[runs[0]]
        if states[here] != "running" or states[there] is not None:
            return None, f"it runs on {here}, records: {states}"
        if rows[there] or len(rows[here]) != 1 or rows[here][0][0] != vm_name:
            return None, f"left over: {rows}"
        for name in OTHER:
            why = self.left_over(name, vm)
            if why:
                return None, f"left over on {name}: {why}"
        return here, None

    def left_over(self, name, vm):
        caller = self.ask(name)
        jobs = [job for state in ("queued", "running") for job in caller.job_list({"state": state})]
        undecided = caller.migration_list()
        script = (
            "ls -A /var/lib/dom0d/xl; ps -eo args | grep -E 'xl (migrate|save|restore)|migration-pipe' | grep -v grep; "
            f"xenstore-list /local/domain | while read -r id; do xenstore-read /local/domain/$id/vm 2>/dev/null | "
            f"grep -q {vm} && echo domain; done; true"
        )
        seen = [line for line in self.sh(name, script).split("\n") if line]
        domains = [line for line in seen if line == "domain"]
        others = [line for line in seen if line != "domain"]
        if len(domains) > 1:
            others += ["more than one domain in XenStore"]
        return [*jobs, *undecided, *others]

    def decided(self, vm, vm_name, within_s=DECIDED_WITHIN_S):
        """(node, seconds): where it runs, once that is settled."""
        began, why = time.monotonic(), ""
        while time.monotonic() - began < within_s:
            with contextlib.suppress(OSError, xmlrpc.client.Error):
                here, why = self.unsettled(vm, vm_name)
                if here:
                    return here, time.monotonic() - began
            time.sleep(0.5)
        raise AssertionError(f"not settled within {within_s} s: {why}")

    # What is done.

    def made(self, name, vm_name, **params):
        """A VM that runs on a node, and is gone after the test wherever it is."""
        kind = params.pop("kind", "pvh")
        vm, all_params = guest(self.agents[name], vm_name, kind, disk=False)
        memory = {"memory": MEMORY_MIB} if kind == "pvh" else {}
        self.ask(name).create_vm(REPO, vm, all_params | memory | {"disk": [DISK]} | params)
        for node in OTHER:
            self.addCleanup(self.remove, node, vm)
        self.ask(name).start_vm(REPO, vm)
        self.agents[name].node.wait(f"guest {vm_name} to count", f"newest '{vm_name}' && [ $n -gt 1 ]", PATIENCE_S, NEWEST)
        return vm

    def submitted(self, vm, source, live=True):
        return self.ask(source).job_submit("migrate_vm", [REPO, vm, ADDRESSES[OTHER[source]], live])

    def sent(self, vm, source, live=True):
        """Goes to the other node, and must get there. What the job says."""
        began = time.monotonic()
        job = self.submitted(vm, source, live)
        ended = self.ask(source).job_wait(job, PATIENCE_S)
        seconds = time.monotonic() - began
        self.assertEqual(ended["state"], "succeeded", ended["fault"])
        told = ended["result"]
        print(f"    {source} to {OTHER[source]}: {seconds:.1f} s, {told['bytes'] / 1e6:.0f} MB, "
              f"{told['bytes'] / 1e6 / seconds:.1f} MB/s, stood still for {told['downtime_ms']} ms", flush=True)  # fmt: skip
        return told


class ThereAndBack(Pair):
    def test_a_pvh_guest_goes_there_and_back_and_misses_no_tick(self):
        name = f"tour-{uuid.uuid4().hex[:4]}"
        vm = self.made("a", name, OVM_description="travels")
        before, here = self.ask("a").get_vm_config(REPO, vm), "a"
        downtimes = []
        for _ in range(by_form(6, 6, 6, 40)):
            downtimes.append(self.sent(vm, here)["downtime_ms"])
            here, seconds = self.decided(vm, name)
            self.assertEqual(here, OTHER["a" if len(downtimes) % 2 else "b"])
            self.ticks_on(here, name)
            self.counted(name)
        self.assertEqual(self.ask(here).get_vm_config(REPO, vm), before, "its record went with it")
        downtimes.sort()
        print(f"    stood still: median {downtimes[len(downtimes) // 2]} ms, worst {downtimes[-1]} ms", flush=True)

    @from_form("brief")
    def test_a_guest_that_stands_still_goes_too(self):
        name = f"still-{uuid.uuid4().hex[:4]}"
        vm = self.made("a", name, kind="pv")
        self.sent(vm, "a", live=False)
        self.assertEqual(self.decided(vm, name)[0], "b")
        self.ticks_on("b", name)
        self.counted(name)

    @from_form("whole")
    def test_a_target_that_lacks_something_says_so_and_the_guest_notices_nothing(self):
        self.sh("a", "ip link show onlya >/dev/null 2>&1 || ip link add onlya type bridge; ip link set onlya up")
        self.addCleanup(self.sh, "a", "ip link del onlya")
        name = f"stays-{uuid.uuid4().hex[:4]}"
        vif = [f"mac={harness.mac()},bridge=onlya"]
        vm = self.made("a", name, vif=vif)
        self.assertIn("bridge onlya", self.refusal(vm))
        # Its memory is taken there by a domain that nobody manages.
        free = int(self.sh("b", "xl info free_memory"))
        hog = "/run/hog.cfg"
        config = f'name="hog"\\ntype="pvh"\\nkernel="/var/lib/dom0d/kernels/vmlinux"\\nmemory={free - 100}\\nvcpus=1\\n'
        self.sh("b", f"printf '{config}' >{hog} && xl create -p -e {hog}")
        self.addCleanup(self.sh, "b", "xl destroy hog || true")
        self.ask("a").unconfigure_vm(REPO, vm, {"vif": vif})
        words = self.refusal(vm)
        self.assertIn("memory", words)
        here, _ = self.decided(vm, name)
        self.assertEqual(here, "a")
        self.ticks_on("a", name)
        self.counted(name)

    def refusal(self, vm):
        with self.assertRaises(xmlrpc.client.Fault) as refused:
            self.ask("a").migrate_vm(REPO, vm, ADDRESSES["b"], True)
        words = refused.exception.faultString
        print(f"    {words}", flush=True)
        self.assertIn("MIGRATION_REFUSED", words)
        return words

    @from_form("brief")
    def test_a_cancelled_migration_leaves_the_guest_where_it_is(self):
        name = f"called-{uuid.uuid4().hex[:4]}"
        vm = self.made("a", name)
        job = self.submitted(vm, "a")
        wait_for("something to be under way", lambda: self.ask("a").job_get(job)["progress"] >= 5, PATIENCE_S, 0.2)
        self.ask("a").job_cancel(job)
        ended = self.ask("a").job_wait(job, PATIENCE_S)
        self.assertEqual(ended["state"], "cancelled")
        self.assertEqual(self.decided(vm, name)[0], "a")
        self.ticks_on("a", name)
        self.counted(name)


class Trap:
    """Waits in a dom0 until the daemon says that a migration has come so far, and then does something at once."""

    def __init__(self, agent, phase, script="true"):
        self.agent, self.error = agent, None
        words = f'phase="{phase}"'
        delay = f"sleep {INTO_SENDING_S}; " if phase == "sending" else ""
        # Not a pipe, whose end would wait for tail to write once more.
        self.script = (
            f"touch /run/trap.set; timeout {PATIENCE_S} bash -c "
            f"'grep -m 1 -q \"$0\" <(tail -n 0 -F /var/log/dom0d.log 2>/dev/null)' '{words}' && {{ {delay}{script}; }}"
        )
        agent.node.sh("rm -f /run/trap.set")
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_for("the trap", lambda: agent.node.run("test -e /run/trap.set").code == 0, 30, 0.1)
        # tail is under way a moment later.
        time.sleep(0.5)

    def _run(self):
        try:
            self.agent.node.sh(self.script, PATIENCE_S + 60)
        except (OSError, LabError) as error:
            self.error = error

    def sprung(self):
        self.thread.join(PATIENCE_S + 60)
        if self.error:
            raise self.error


class SomethingDies(Pair):
    """One guest for all phases, taken from where it is."""

    def strike(self, phase, victim, what, *, on=None, back=None, expect=None):
        """A migration from where the VM is; at the phase something happens; then the VM is on exactly one node."""
        source, target = self.here, OTHER[self.here]
        job = None
        trap = Trap(self.agents[source], phase, on(source) if on else "true")
        with contextlib.suppress(OSError, xmlrpc.client.Error):
            job = self.submitted(self.vm, source)
        trap.sprung()
        if what:
            what(source, target)
        if back:
            back(source, target)
        self.here, seconds = self.decided(self.vm, self.name)
        ended = {}
        with contextlib.suppress(OSError, xmlrpc.client.Error):
            ended = self.ask(source).job_wait(job, PATIENCE_S)
        print(f"    {victim} at {phase!r}, {source} to {target}: runs on {self.here} after {seconds:.1f} s; job "
              f"{ended.get('state')} {(ended.get('fault') or {}).get('name', '')}", flush=True)  # fmt: skip
        if phase in ("prepared", "sending") and victim != "link":
            self.assertEqual(self.here, source, "nothing was handed over")
        if expect:
            self.assertEqual(self.here, expect(source, target))
        self.ticks_on(self.here, self.name)
        self.counted(self.name)

    def cut_off(self, phase, victim):
        """The power of the victim's node is cut at the phase. If the memory of the VM dies with it, the VM is off on
        exactly one node, where it can be started anew."""
        source, target = "a", "b"
        name = f"cut-{uuid.uuid4().hex[:4]}"
        vm = self.made(source, name)
        dies = {"source": source, "target": target}[victim]
        trap = Trap(self.agents[source], phase)
        self.submitted(vm, source)
        trap.sprung()
        node = self.agents[dies].node
        node.kill()
        seconds = node.up()
        self.agents[dies].wait()
        began = time.monotonic()
        died = (victim == "source") == (phase in ("prepared", "sending"))
        if not died:
            here, _ = self.decided(vm, name)
            self.ticks_on(here, name)
        else:
            here = self.off(vm, name)
        print(f"    power of the {victim} cut at {phase!r}: booted in {seconds:.1f} s, {'off' if died else 'runs'} on "
              f"{here} after {time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
        self.assertEqual(here, source if phase in ("prepared", "sending") else target)
        self.counted(name, lossless=False)
        if died:
            self.ask(here).start_vm(REPO, vm)
            self.decided(vm, name)
        # The next one has the same disk.
        for node_name in OTHER:
            self.remove(node_name, vm)

    def off(self, vm, vm_name):
        """The only node that knows it, where it is off."""
        end, seen = time.monotonic() + DECIDED_WITHIN_S, None
        while time.monotonic() < end:
            with contextlib.suppress(OSError, xmlrpc.client.Error):
                seen = {name: {one["uuid"]: one["state"] for one in self.ask(name).vm_list()}.get(vm) for name in OTHER}
                rows = [row for name in OTHER for row in self.rows(name, vm_name)]
                left = [why for name in OTHER for why in self.left_over(name, vm)]
                if sorted(map(str, seen.values())) == ["None", "off"] and not rows and not left:
                    return next(name for name in OTHER if seen[name])
                seen = seen, rows, left
            time.sleep(0.5)
        raise AssertionError(f"not settled: {seen}")

    def each(self, brief, strike):
        """At each phase; `brief`: at the phases that a short form has time for."""
        self.name = f"f22-{uuid.uuid4().hex[:4]}"
        self.here = "a"
        self.vm = self.made("a", self.name)
        for _ in range(ROUNDS):
            for phase in by_form(brief[:1], brief, PHASES, PHASES):
                with self.subTest(phase=phase):
                    strike(phase)

    def test_the_source_agent_is_killed_in_each_phase(self):
        back = lambda source, _: self.agents[source].start()  # noqa: E731
        self.each(["handed over", "sending"], lambda phase: self.strike(phase, "source agent", None, on=lambda _: "/lab/agent kill", back=back))

    def test_the_target_agent_is_killed_in_each_phase(self):
        def kill(_, target):
            self.agents[target].kill()
            self.agents[target].start()

        self.each(["prepared", "committed"], lambda phase: self.strike(phase, "target agent", kill))

    def test_the_link_is_pulled_in_each_phase(self):
        def pull(source, _):
            node = self.agents[source].node
            node.link(LINK, False)
            try:
                time.sleep(CABLE_OUT_S)
            finally:
                node.link(LINK, True)

        self.each(["sending"], lambda phase: self.strike(phase, "link", pull))

    def test_the_power_is_cut_in_the_middle(self):
        """Of the source while memory is sent: it dies with the host. Of the target: the guest notices nothing."""
        for victim in by_form(["source"], ["source"], ["source", "target"], ["source", "target"]):
            for _ in range(ROUNDS):
                for phase in by_form(["sending"], ["sending"], ["sending"], PHASES):
                    with self.subTest(victim=victim, phase=phase):
                        self.cut_off(phase, victim)
