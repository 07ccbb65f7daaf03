"""dom0d is killed at each step of start, stop and save, and started again: the job ends, the record and Xen agree,
and nothing is there twice."""

import contextlib
import random
import time
import xmlrpc.client

from case import LONG, PATIENCE_S, REPO, LabCase
from nodes import wait_for


class AgentDies(LabCase):
    def steps_of(self, verb, params):
        """The names of the steps that a job would take."""
        plan = self.proxy.job_submit(verb, params, {"dry_run": True})
        return [step["name"] if isinstance(step, dict) else step for step in plan["steps"]]

    def killed_at(self, verb, params, number, pause_s):
        """Asks for the job, and kills the daemon as soon as the step of that number runs, and a little later."""
        job = self.proxy.job_submit(verb, params)

        def there():
            seen = self.proxy.job_get(job)
            begun = sum(step["started"] != "" for step in seen["steps"])
            return begun > number or seen["state"] not in ("queued", "running")

        wait_for(f"step {number} of {verb}", there, PATIENCE_S, 0.01)
        time.sleep(pause_s)
        self.agent.kill()
        seconds = self.agent.start()
        ended = self.proxy.job_wait(job, PATIENCE_S)
        print(f"    {verb} killed at step {number} +{pause_s:.2f} s: back after {seconds:.1f} s, job "
              f"{ended['state']} {(ended['fault'] or {}).get('name', '')}", flush=True)  # fmt: skip
        self.assertIn(ended["state"], ("succeeded", "failed", "cancelled"))
        return ended

    def agrees(self, vm, name):
        """The record says what Xen says, and Xen has the domain at most once."""

        def so():
            rows = [line.split() for line in self.node.sh("xl list").splitlines()[1:]]
            here = [row for row in rows if row and row[0].split("--")[0] == name]
            self.assertLessEqual(len(here), 1, here)
            state = self.state(vm)
            letters = here[0][-2] if here else ""
            return {"running": letters and "p" not in letters and "s" not in letters and "d" not in letters,
                    "paused": "p" in letters, "off": not here, "saved": not here}.get(state) and state  # fmt: skip

        return wait_for("record and Xen to agree", so, PATIENCE_S, 0.5)

    def brought(self, vm, name, wanted):
        """The VM in the state that the verb starts from."""
        state = self.agrees(vm, name)
        if wanted == "off" and state == "saved":
            self.proxy.restore_vm(REPO, vm, False)
            state = "running"
        if wanted == "off" and state != "off":
            self.proxy.stop_vm(REPO, vm, True)
        if wanted == "running":
            if state == "saved":
                self.proxy.restore_vm(REPO, vm, False)
            elif state == "off":
                self.proxy.start_vm(REPO, vm)
            elif state == "paused":
                self.proxy.unpause_vm(REPO, vm)
            self.ticks_on(name)

    def sweep(self, verb, wanted, params):
        name = f"dies-{verb.split('_')[0]}"
        vm, _ = self.create(name)
        arguments = [REPO, vm, *params]
        self.brought(vm, name, wanted)
        count = len(self.steps_of(verb, arguments))
        chance = random.Random(7)
        pauses = [0.0, 0.3, 1.0, 2.5] if LONG else [0.0]
        for number in range(count):
            for pause_s in pauses + [chance.uniform(0.1, 1.5)]:
                with self.subTest(step=number, pause_s=pause_s):
                    self.brought(vm, name, wanted)
                    self.killed_at(verb, arguments, number, pause_s)
                    self.agrees(vm, name)
        # Whatever it went through, it can still do everything.
        self.brought(vm, name, "running")
        self.proxy.stop_vm(REPO, vm)

    def test_killed_at_each_step_of_a_start(self):
        self.sweep("start_vm", "off", [])

    def test_killed_at_each_step_of_a_stop(self):
        self.sweep("stop_vm", "running", [False])

    def test_killed_at_each_step_of_a_save(self):
        self.sweep("save_vm", "running", [False])

    def test_a_guest_does_not_notice_that_the_daemon_died(self):
        name = "unmoved"
        vm, _ = self.create(name)
        self.proxy.start_vm(REPO, vm)
        self.up(name)
        domid = self.agent.domains()[name][0]
        for _ in range(3):
            self.agent.kill()
            self.ticks_on(name)
            self.agent.start()
            self.assertEqual(self.running(name)["domid"], str(domid))
        ticks = self.agent.ticks(name)
        self.assertEqual(ticks, list(range(1, len(ticks) + 1)), "no tick is missing and none is told twice")

    def test_a_guest_that_ended_while_the_daemon_was_dead_is_off_or_started_anew_as_told(self):
        name = "meanwhile"
        vm, _ = self.create(name)
        self.proxy.start_vm(REPO, vm)
        self.up(name)
        self.agent.kill()
        self.agent.tell_guest(self.agent.domains()[name][0], "poweroff")
        wait_for("the domain to end", lambda: "s" in self.agent.domains().get(name, (0, "s"))[1], PATIENCE_S, 0.5)
        self.agent.start()
        self.assertEqual(self.agrees(vm, name), "off")
        # A caller that was cut off by the daemon's death asks again and is answered.
        with contextlib.suppress(xmlrpc.client.Fault):
            self.proxy.stop_vm(REPO, vm, True)
        self.proxy.start_vm(REPO, vm)
        self.up(name)
