"""The host reboots, and its power is cut: what was acknowledged is there, and a VM runs again only if it was told to."""

import time

from case import PATIENCE_S, REPO, LabCase, from_form
from nodes import wait_for


class Power(LabCase):
    def boot_id(self):
        return self.node.sh("cat /proc/sys/kernel/random/boot_id").strip()

    def two_running(self):
        """A VM that is to be started by itself, and one that is not, both running."""
        made = {}
        for name, enabled in (("by-itself", True), ("by-hand", False)):
            vm, _ = self.create(name, disk=enabled, vif=enabled)
            self.proxy.vm_autostart(vm, enabled)
            self.proxy.start_vm(REPO, vm)
            self.up(name)
            made[name] = vm
        return made

    def after_the_boot(self, made, before):
        self.assertNotEqual(self.boot_id(), before)
        # The console's log of the last boot is the same file.
        wait_for("autostart", lambda: "by-itself" in self.agent.domains(), PATIENCE_S, 1)
        wait_for("its record", lambda: self.state(made["by-itself"]) == "running", PATIENCE_S, 1)
        self.assertEqual(self.state(made["by-hand"]), "off")
        found = self.proxy.vm_adopted()
        self.assertEqual(found["boot"], "new")
        self.assertEqual([vm["name"] for vm in found["restarted"]], ["by-itself"])
        self.assertIn("by-hand", [vm["name"] for vm in found["gone"]])
        # Once more the agent alone, which is no boot.
        self.agent.kill()
        self.agent.start()
        found = self.proxy.vm_adopted()
        self.assertEqual((found["boot"], found["counts"]["adopted"], found["counts"]["restarted"]), ("same", 1, 0))

    def test_after_a_cut_of_the_power_vms_run_as_they_are_told(self):
        made, before = self.two_running(), self.boot_id()
        self.proxy.configure_vm(REPO, made["by-hand"], {"OVM_description": "acknowledged"})
        self.node.kill()
        began = time.monotonic()
        booted_s = self.node.up()
        self.agent.wait()
        print(f"    up after {booted_s:.1f} s, dom0d answers after {time.monotonic() - began:.1f} s", flush=True)
        self.assertEqual(self.proxy.get_vm_config(REPO, made["by-hand"])["OVM_description"], "acknowledged")
        self.after_the_boot(made, before)

    @from_form("whole")
    def test_after_a_reboot_of_the_host_vms_run_as_they_are_told(self):
        made, before = self.two_running(), self.boot_id()
        print(f"    rebooted in {self.node.reboot():.1f} s", flush=True)
        self.agent.wait()
        self.after_the_boot(made, before)
