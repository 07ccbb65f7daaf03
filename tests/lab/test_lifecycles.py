"""Many lives of VMs leave Xen as it was: `xl list`, XenStore, links, loop devices, processes and files."""

import re
import statistics
import time

from case import DISKS, LONG, REPO, LabCase, by_form, guest

# What changes by itself, or counts up for ever.
VOLATILE = re.compile(
    r"^/tool/xenstored/|^/local/domain/0/(memory|data)/|^/libxl/0/dm-version|/(uptime|clock|domid|start_time)\b"
)


class Lifecycles(LabCase):
    def leftovers(self):
        """What a VM could leave behind, by kind, as sets of lines."""
        store = self.node.sh("xenstore-ls -f").splitlines()
        return {
            "domains": set(self.agent.domains()),
            "XenStore": {line for line in store if line and not VOLATILE.search(line)},
            "links": set(re.findall(r"^\d+: (\S+?)[@:]", self.node.sh("ip -o link"), re.MULTILINE)),
            "loop devices": set(re.findall(r"\((.*)\)", self.node.sh("losetup -a"))),
            "processes": set(re.findall(r"^(?:\S*/)?((?:xl|qemu-system-i386|pygrub)\b.*)$",
                                        self.node.sh("ps -eo args"), re.MULTILINE)),
            # The history of a VM that is gone is kept for a week.
            "files": set(self.node.sh("find /var/lib/xen /var/lib/dom0d /run/xen -type f -size +0 "
                                      "! -path '*/sled/*' ! -path '*/stats/*' ! -name '*.json' ! -path '*/kernels/*'").split()),
        }  # fmt: skip

    def life(self, number, kind, times):
        """Created, started, paused, saved, restored, stopped, deleted."""
        name = f"life-{number}"
        # Hotplug scripts take most of a life's time.
        devices = LONG or number % 5 == 0
        vm, params = guest(self.agent, name, kind, disk=devices, vif=devices)
        steps = (
            ("create", self.proxy.create_vm, (REPO, vm, params)),
            ("start", self.proxy.start_vm, (REPO, vm)),
            ("pause", self.proxy.pause_vm, (REPO, vm)),
            ("unpause", self.proxy.unpause_vm, (REPO, vm)),
            # A guest that has not booted can neither suspend nor shut down.
            ("boot", self.up, (name,)),
            ("save", self.proxy.save_vm, (REPO, vm, False)),
            ("restore", self.proxy.restore_vm, (REPO, vm, False)),
            ("stop", self.proxy.stop_vm, (REPO, vm)),
            ("delete", self.proxy.delete_vm, (REPO, vm)),
        )
        for step, call, arguments in steps:
            began = time.monotonic()
            call(*arguments)
            times.setdefault(step, []).append(time.monotonic() - began)
        self.node.sh(f"rm -f {DISKS}/{vm}.raw /var/log/xen/guest-{name}.log")

    def test_lives_leave_nothing_behind(self):
        # What is made once and stays (a folder, a module's link) is made by the first.
        self.life(0, "pv", {})
        self.life(0, "pvh", {})
        before = self.leftovers()
        times = {}
        lives = by_form(2, 5, 20, 100)
        for number in range(1, lives + 1):
            self.life(number, "pvh" if number % 2 else "pv", times)
            print(f"    life {number}: {sum(seconds[-1] for seconds in times.values()):.1f} s", flush=True)
        for step, seconds in times.items():
            print(f"    {step:<8} median {statistics.median(seconds):6.2f} s, most {max(seconds):6.2f} s", flush=True)
        after = self.leftovers()
        for kind, lines in before.items():
            with self.subTest(kind):
                self.assertEqual(sorted(after[kind] - lines), [], "left behind")
                self.assertEqual(sorted(lines - after[kind]), [], "lost")
