"""The contract of the toolstack, which the simulated host keeps too, held against `xl` in dom0."""

import os
import unittest

from case import KERNELS, LONG, LabCase, from_form

# Words, with commas between: only the rules whose names hold one of them.
ONLY = os.environ.get("DOM0D_XL_ONLY")


@unittest.skipUnless(os.environ.get("DOM0D_LAB_CONTRACT"), "run by tests/lab/run, which builds the contract's program")
class Contract(LabCase):
    def held(self, kind):
        # Hotplug scripts take most of a build; the rules about devices plug their own.
        bare = "" if LONG else "DOM0D_XL_BARE=1"
        only = f"DOM0D_XL_ONLY='{ONLY}'" if ONLY else ""
        done = self.node.run(
            f"cd /tmp && {bare} {only} DOM0D_EXE=/usr/sbin/dom0d DOM0D_XL_KERNEL={KERNELS}/vmlinux DOM0D_XL_RAMDISK={KERNELS}/guest.cpio "
            f"DOM0D_XL_GUEST={kind} /lab/contract --ignored real_xen --nocapture",
            patience_s=1800,
        )
        for line in done.output.splitlines():
            if ": holds (" in line or "DOES NOT HOLD" in line:
                print("    " + line, flush=True)
        self.assertEqual(done.code, 0, done.output[-4000:])
        self.assertIn(": holds (", done.output)

    @from_form("whole")
    def test_it_is_kept_with_pv_guests(self):
        self.held("pv")

    @from_form("whole")
    def test_it_is_kept_with_pvh_guests(self):
        self.held("pvh")
