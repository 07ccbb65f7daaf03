"""dom0d is killed at each step of start, stop and save, and started again: the job ends, the record and Xen agree,
and nothing is there twice.

A step's bounds are commits to the store, at which the daemon can be told to end by itself. In the middle of a step, when
xl is at work, it is killed from outside."""

import contextlib
import http.client
import itertools
import random
import time
import xmlrpc.client

from case import LONG, PATIENCE_S, REPO, LabCase, by_form, from_form
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

        wait_for(f"step {number} of {verb}", there, PATIENCE_S, 0.05)
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

        return wait_for("record and Xen to agree", so, PATIENCE_S, 1)

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

    def prepared(self, verb, wanted, params, devices=True):
        """A VM in the state that the verb starts from: (its id, its name, the verb's arguments)."""
        name = f"dies-{verb.split('_')[0]}{'' if devices else '-bare'}"
        known = {one["name"]: one["uuid"] for one in self.proxy.vm_list()}
        vm = known.get(name) or self.create(name, disk=devices, vif=devices)[0]
        self.brought(vm, name, wanted)
        return vm, name, [REPO, vm, *params]

    def jobs_ended(self):
        """Waits until no job is open."""
        wait_for("all jobs to end", lambda: self.proxy.host_get()["agent"]["open_jobs"] == 0, PATIENCE_S, 0.5)

    def dies_at(self, point, verb, arguments):
        """The verb of a daemon that dies at a commit. Whether it did, or the verb was over before."""
        self.agent.halt()
        if not self.agent.start_dying(point):
            return True
        try:
            self.agent.proxy().job_wait(self.agent.proxy().job_submit(verb, arguments), PATIENCE_S)
        except (OSError, http.client.HTTPException):
            return True
        return False

    def killed_at_each_commit(self, verb, wanted, params):
        sides = ["before", "after"] if LONG else ["after"]
        for commit, side in itertools.product(range(1, 40), sides):
            # Without devices, whose scripts take most of xl's time: what counts here is between xl's calls.
            vm, name, arguments = self.prepared(verb, wanted, params, devices=False)
            with self.subTest(commit=commit, side=side):
                began = time.monotonic()
                died = self.dies_at(f"{commit}:{side}", verb, arguments)
                if not died:
                    self.agent.halt()
                self.agent.start()
                self.jobs_ended()
                state = self.agrees(vm, name)
                print(f"    {verb} at commit {commit}, {side}: {'died' if died else 'was over'}, then {state} "
                      f"({time.monotonic() - began:.1f} s)", flush=True)  # fmt: skip
                self.assertIn(state, (wanted, {"start_vm": "running", "stop_vm": "off", "save_vm": "saved"}[verb]))
            if not died:
                return
        self.fail(f"{verb} makes no end of commits")

    def killed_in_each_step(self, verb, wanted, params):
        chance = random.Random(7)
        pauses = [0.0, 0.3, 1.0, 2.5] if LONG else []
        devices = verb == "start_vm"
        vm, _, arguments = self.prepared(verb, wanted, params, devices)
        for number in range(len(self.steps_of(verb, arguments))):
            for pause_s in pauses + [chance.uniform(0.1, 1.5)]:
                with self.subTest(step=number, pause_s=pause_s):
                    vm, name, arguments = self.prepared(verb, wanted, params, devices)
                    self.killed_at(verb, arguments, number, pause_s)
                    self.agrees(vm, name)

    def sweep(self, *how):
        self.killed_in_each_step(*how)
        # The same is done at every commit of every verb on the simulated host (tests/daemon), in a thousandth of the time.
        if by_form(False, False, how[0] == "start_vm", True):
            self.killed_at_each_commit(*how)
        # Whatever it went through, it can still do everything.
        vm, name, _ = self.prepared(*how)
        self.brought(vm, name, "running")
        self.proxy.stop_vm(REPO, vm)

    def test_killed_at_each_step_of_a_start(self):
        self.sweep("start_vm", "off", [])

    @from_form("brief")
    def test_killed_at_each_step_of_a_stop(self):
        self.sweep("stop_vm", "running", [False])

    @from_form("brief")
    def test_killed_at_each_step_of_a_save(self):
        self.sweep("save_vm", "running", [False])

    @from_form("brief")
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

    @from_form("whole")
    def test_a_guest_that_ended_while_the_daemon_was_dead_is_off_or_started_anew_as_told(self):
        name = "meanwhile"
        vm, _ = self.create(name)
        self.proxy.start_vm(REPO, vm)
        self.up(name)
        self.agent.kill()
        self.agent.tell_guest(self.agent.domains()[name][0], "poweroff")
        wait_for("the domain to end", lambda: "s" in self.agent.domains().get(name, (0, "s"))[1], PATIENCE_S, 1)
        self.agent.start()
        self.assertEqual(self.agrees(vm, name), "off")
        # A caller that was cut off by the daemon's death asks again and is answered.
        with contextlib.suppress(xmlrpc.client.Fault):
            self.proxy.stop_vm(REPO, vm, True)
        self.proxy.start_vm(REPO, vm)
        self.up(name)
