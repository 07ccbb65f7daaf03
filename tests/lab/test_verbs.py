"""Every verb about VMs on a PV guest and on a PVH guest of real Xen, through the real wire. What a verb answers is
one thing; whether it happened is asked of `xl`, of XenStore, and of the guest, which tells each second what it has."""

import unittest
import xmlrpc.client

from case import DISKS, FORM, PATIENCE_S, REPO, LabCase, by_form, mac
from nodes import wait_for

ALIVE = "^[r-][b-]----$"


class EveryVerb(LabCase):
    """The subclasses say of which kind the guest is."""

    kind = None
    # What shorter forms do with this kind of guest.
    in_brief = ()

    def setUp(self):
        test = self._testMethodName
        if not by_form("whole_life" in test, any(word in test for word in self.in_brief), True, True):
            self.skipTest(f"left out of the form {FORM!r}")
        super().setUp()

    def sees(self, name, **wanted):
        """Waits until the guest has what is wanted, by its own newest tick."""
        self.tick(name, " && ".join(f"[[ $line' ' == *' {key}={value} '* ]]" for key, value in wanted.items()))

    def started(self, name, devices=False, **more):
        """A guest that is up. Without devices it is there in a third of the time."""
        vm, params = self.create(name, self.kind, disk=devices, vif=devices, **more)
        self.timed("start_vm", self.proxy.start_vm, REPO, vm)
        self.up(name)
        return vm, params

    def test_a_guest_lives_its_whole_life(self):
        name = f"life-{self.kind}"
        vm, _ = self.create(name, self.kind)
        self.assertIsNone(self.running(name), "a VM that is off is not in list_vms")
        self.assertIsNone(self.proxy.list_vm(REPO, vm))
        self.assertNotIn(name, self.agent.domains())

        self.timed("start_vm", self.proxy.start_vm, REPO, vm)
        self.up(name)
        shown = self.running(name)
        domid, letters = self.agent.domains()[name]
        self.assertEqual((shown["uuid"], shown["domid"]), (vm, str(domid)))
        self.assertRegex(letters, ALIVE)
        self.assertEqual(self.node.sh(f"xenstore-read /local/domain/{domid}/vm").strip().lower(), f"/vm/{vm}")
        self.assertEqual(self.proxy.list_vm(REPO, vm)["domid"], str(domid))
        self.assertEqual(self.state(vm), "running")

        self.timed("pause_vm", self.proxy.pause_vm, REPO, vm)
        self.assertEqual(self.agent.domains()[name], (domid, "--p---"))
        self.assertEqual(self.running(name)["state"], "--p---")
        self.timed("unpause_vm", self.proxy.unpause_vm, REPO, vm)
        self.ticks_on(name)

        self.timed("save_vm, checkpoint", self.proxy.save_vm, REPO, vm, True)
        self.assertEqual(self.agent.domains()[name][0], domid, "after a checkpoint the same domain runs on")
        last = self.ticks_on(name)

        self.timed("save_vm", self.proxy.save_vm, REPO, vm, False)
        self.assertNotIn(name, self.agent.domains())
        self.assertEqual(self.state(vm), "saved")
        self.timed("restore_vm, paused", self.proxy.restore_vm, REPO, vm, True)
        self.assertEqual(self.agent.domains()[name][1], "--p---")
        self.timed("unpause_vm", self.proxy.unpause_vm, REPO, vm)
        self.assertGreater(self.ticks_on(name), last, "a restored guest counts on from where it stood")

        before = self.agent.domains()[name][0]
        self.timed("reboot_vm", self.proxy.reboot_vm, REPO, vm, 30)
        self.assertNotEqual(self.agent.domains()[name][0], before, "a rebooted guest is a new domain")
        self.tick(name, f"[ $n -gt 0 ] && [ $n -lt {last} ]")

        self.timed("stop_vm", self.proxy.stop_vm, REPO, vm)
        self.assertNotIn(name, self.agent.domains())
        self.assertEqual(self.state(vm), "off")
        self.timed("start_vm", self.proxy.start_vm, REPO, vm)
        self.timed("stop_vm, force", self.proxy.stop_vm, REPO, vm, True)
        self.assertNotIn(name, self.agent.domains())
        self.timed("delete_vm", self.proxy.delete_vm, REPO, vm)
        self.assertNotIn(vm, [one["uuid"] for one in self.proxy.vm_list()])

    def test_a_checkpointed_guest_still_reboots(self):
        """With xl's own monitor it would wait for ever as ---sr-."""
        name = f"checked-{self.kind}"
        vm, _ = self.started(name)
        self.proxy.save_vm(REPO, vm, True)
        domid = self.agent.domains()[name][0]
        self.agent.tell_guest(domid, "reboot")
        wait_for("a new domain", lambda: self.agent.domains().get(name, (domid,))[0] != domid, PATIENCE_S, 1)
        self.tick(name, "[ $n -gt 0 ] && [ $n -lt 3 ]")
        self.proxy.stop_vm(REPO, vm)
        self.proxy.start_vm(REPO, vm)
        self.up(name)

    def test_cpus_and_memory_are_given_and_taken_while_it_runs(self):
        name = f"size-{self.kind}"
        vm, params = self.started(name, params={"maxmem": 192})
        self.timed("configure_vm, vcpus", self.proxy.configure_vm, REPO, vm, {"vcpus": 2})
        self.sees(name, cpus="0-1")
        self.timed("configure_vm, vcpus", self.proxy.configure_vm, REPO, vm, {"vcpus": 1})
        self.sees(name, cpus="0")
        less = params["memory"] - 16
        self.timed("configure_vm, memory", self.proxy.configure_vm, REPO, vm, {"memory": less})
        told = f"xenstore-read /local/domain/{self.agent.domains()[name][0]}/memory/target"
        self.assertAlmostEqual(int(self.node.sh(told)) / 1024, less, delta=8)
        self.assertEqual(self.proxy.get_vm_config(REPO, vm)["memory"], less)
        self.timed("configure_vm, memory", self.proxy.configure_vm, REPO, vm, {"memory": params["memory"]})

    def test_disks_and_vifs_come_and_go_while_it_runs(self):
        name = f"plug-{self.kind}"
        vm, params = self.started(name, devices=True)
        self.sees(name, disks="xvda", vifs="eth0")
        self.agent.disk(f"{vm}-data")
        disk, vif = f"file:{DISKS}/{vm}-data.raw,xvdb,w", f"mac={mac()},bridge=xenbr0"
        self.timed("configure_vm, disk", self.proxy.configure_vm, REPO, vm, {"disk": params["disk"] + [disk]})
        self.sees(name, disks="xvda,xvdb")
        self.timed("configure_vm, vif", self.proxy.configure_vm, REPO, vm, {"vif": params["vif"] + [vif]})
        self.sees(name, vifs="eth0,eth1")
        domid = self.agent.domains()[name][0]
        self.assertIn("xenbr0", self.node.sh(f"ip -o link show vif{domid}.1"))
        devices = self.running(name)["device"]
        self.assertEqual((len(devices["vbd"]), len(devices["vif"])), (2, 2))
        self.timed("unconfigure_vm", self.proxy.unconfigure_vm, REPO, vm, {"disk": [disk], "vif": [vif]})
        self.sees(name, disks="xvda", vifs="eth0")
        self.assertNotIn(f"vif{domid}.1", self.node.sh("ip -o link"))
        self.assertNotIn(f"{vm}-data", self.node.sh("losetup -a"))

    def test_signals_and_messages_reach_it(self):
        name = f"signals-{self.kind}"
        vm, _ = self.started(name)
        domid = self.agent.domains()[name][0]
        self.timed("sysrq_vm", self.proxy.sysrq_vm, REPO, vm, "h")
        wait_for("help", lambda: "sysrq: HELP" in self.agent.console(name), PATIENCE_S, 1)
        self.timed("trigger_vm", self.proxy.trigger_vm, REPO, vm, "nmi", 0)
        self.ticks_on(name)
        self.timed("send_to_guest", self.proxy.send_to_guest, REPO, vm, {"com.example.greeting": "hello"})
        self.assertIn("hello", self.node.sh(f"xenstore-ls /local/domain/{domid}"))
        with self.assertRaises(xmlrpc.client.Fault):
            self.proxy.sysrq_vm(REPO, vm, "reboot")

    def test_its_memory_is_dumped_while_it_runs_and_as_it_ends(self):
        if self.kind == "pvh" and FORM != "long":
            # It tries a million holes between the guest's memory and the top of its address space.
            self.skipTest("xl takes up to a quarter of an hour for the core of a PVH guest under emulation")
        name = f"core-{self.kind}"
        vm, _ = self.started(name)
        domid = self.agent.domains()[name][0]
        self.timed("dump_vm_core, live", self.proxy.dump_vm_core, REPO, vm, True, False, False)
        self.assertEqual(self.agent.domains()[name][0], domid)
        self.ticks_on(name)
        (core,) = self.proxy.list_vm_core(REPO, vm)
        files = self.node.sh("find /var/lib/dom0d -name '*core*' -size +10M").split()
        self.assertEqual(len(files), 1, files)
        self.timed("delete_vm_core", self.proxy.delete_vm_core, REPO, vm, core["core_date"])
        self.assertEqual(self.node.sh("find /var/lib/dom0d -name '*core*' -size +10M").split(), [])
        self.timed("dump_vm_core, reset", self.proxy.dump_vm_core, REPO, vm, False, True, True)
        self.assertNotEqual(self.agent.domains()[name][0], domid, "a dump with reset starts the guest anew")
        self.proxy.stop_vm(REPO, vm, True)

    def test_a_deaf_guest_is_told_of_and_ended_by_force(self):
        name = f"deaf-{self.kind}"
        vm, _ = self.started(name, more="lab.deaf")
        job = self.proxy.job_submit("stop_vm", [REPO, vm, False], {"deadline_s": 600})
        ended = self.proxy.job_wait(job, 300)
        self.assertEqual((ended["state"], ended["fault"]["name"]), ("failed", "SHUTDOWN_IGNORED"))
        self.assertRegex(self.agent.domains()[name][1], ALIVE)
        self.ticks_on(name)
        self.timed("stop_vm, force", self.proxy.stop_vm, REPO, vm, True)
        self.assertNotIn(name, self.agent.domains())

    def test_what_ends_by_itself_is_treated_as_configured(self):
        for told, config, then in (
            ("poweroff", {}, "off"),
            ("crash", {"on_crash": "destroy"}, "off"),
            ("crash", {"on_crash": "restart"}, "running"),
            ("reboot", {"on_reboot": "destroy"}, "off"),
        ):
            with self.subTest(told=told, **config):
                name = f"ends-{self.kind}-{told}-{then}"
                vm, _ = self.started(name, params=config)
                domid = self.agent.domains()[name][0]
                self.agent.tell_guest(domid, told)

                def settled():
                    now = self.agent.domains().get(name)
                    return now is None if then == "off" else now is not None and now[0] != domid

                wait_for(f"the VM to be {then}", settled, PATIENCE_S, 1)
                wait_for(f"vm_get to say {then}", lambda: self.state(vm) == then, PATIENCE_S, 1)


class OfPv(EveryVerb):
    kind = "pv"
    in_brief = ("whole_life", "disks_and_vifs", "signals")


class OfPvh(EveryVerb):
    kind = "pvh"
    in_brief = ("test_",)


def load_tests(loader, _tests, _pattern):
    """The subclasses alone: EveryVerb itself has no kind."""
    return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in (OfPv, OfPvh))
