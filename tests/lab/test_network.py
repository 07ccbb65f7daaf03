"""The network of a real dom0: bonds, VLANs and VLAN filtering, which not every kernel has; a change that cuts its caller
off; a reboot in the window; and what passes through bridges and bonds meanwhile."""

import re
import threading
import time
import xmlrpc.client

from case import LabCase, by_form, from_form
from nodes import wait_for

# What a kernel has, as `ip` and `bridge` tell it, without what comes by itself.
STATE = r"""ip -d -j link; echo; ip -j address | tr ',' '\n' | grep -E '"(ifname|local|prefixlen|label)"' | tr '\n' ' '; echo
ip route; ip -6 route | grep -v 'proto kernel'; bridge -j vlan 2>/dev/null"""
UNSTEADY = re.compile(
    r'"(operstate|linkmode|ifindex|link_index|promiscuity|allmulti|num_tx_queues|num_rx_queues|gc_timer|hello_timer|tcn_timer|topology_change_timer|'
    r'bridge_id|root_id|root_port|root_path_cost|designated_root|designated_bridge|hold_timer|message_age_timer|forward_delay_timer|state)":[^,}]*,?|"(NO-CARRIER|LOWER_UP)",?|expires \d+sec'
)


class Network(LabCase):
    maxDiff = 4000

    def setUp(self):
        super().setUp()
        self.addCleanup(lambda: self.agent.proxy().network_apply({}))

    def links(self):
        return self.proxy.network_show()["links"]

    def is_state(self):
        # In lines, so that a difference is told by the line.
        return UNSTEADY.sub("", self.node.sh(STATE)).replace(",", ",\n").splitlines()

    def desired(self):
        """A bond of two, a VLAN on it, and a bridge that filters VLANs."""
        return {
            "links": {
                "d0": {"kind": "dummy"},
                "d1": {"kind": "dummy"},
                "d2": {"kind": "dummy"},
                "bond7": {"kind": "bond", "mode": "active-backup", "miimon_ms": 100, "primary": "d1", "ports": ["d0", "d1"], "mtu": 9000},
                "bond7.70": {"kind": "vlan", "parent": "bond7", "id": 70, "mtu": 1500, "vlans": [{"id": 20, "pvid": True, "untagged": True}, {"id": 30}]},
                "br7": {"kind": "bridge", "vlan_filtering": True, "ports": ["bond7.70", "d2"], "addresses": ["198.51.100.1/24", "2001:db8::1/64"], "stp": True, "forward_delay_ms": 4000},
            },
            "routes": [{"to": "203.0.113.0/24", "via": "198.51.100.2"}],
        }  # fmt: skip


class Made(Network):
    def test_a_bond_a_vlan_and_a_filtering_bridge_are_made_and_go(self):
        before = self.is_state()
        self.timed("network_apply", self.proxy.network_apply, self.desired())
        told = self.node.sh("cat /proc/net/bonding/bond7; ip -d link show bond7.70; ip -d link show br7; bridge vlan; ip route")
        for words in ("active-backup", "Primary Slave: d1", "Slave Interface: d0", "id 70", "vlan_filtering 1", "203.0.113.0/24 via 198.51.100.2"):
            self.assertIn(words, told)
        self.assertRegex(told, r"bond7\.70\s+20 PVID Egress Untagged\s+30\b")
        self.assertEqual(self.proxy.network_plan(self.desired())["steps"], [], "the kernel has what was asked for")
        changed = self.desired()
        changed["links"]["bond7"] |= {"mode": "802.3ad", "lacp_rate": "fast", "xmit_hash": "layer3+4"}
        del changed["links"]["bond7"]["primary"]
        self.proxy.network_apply(changed)
        told = self.node.sh("cat /proc/net/bonding/bond7")
        for words in ("802.3ad", "LACP rate: fast", "layer3+4", "Slave Interface: d1"):
            self.assertIn(words, told)
        self.assertEqual(self.proxy.network_plan(changed)["steps"], [])
        self.proxy.network_apply({})
        self.assertEqual(self.is_state(), before)

    def test_a_step_that_the_kernel_refuses_brings_back_all_that_was(self):
        self.proxy.network_apply(self.desired())
        before, since = self.is_state(), self.proxy.event_list()["last"]
        wrong = self.desired()
        wrong["links"]["d3"] = {"kind": "dummy"}
        wrong["links"]["bond7"] |= {"mode": "802.3ad", "ports": ["d0", "d3"]}
        del wrong["links"]["bond7"]["primary"]
        wrong["links"]["br7"]["vlan_filtering"] = False
        del wrong["links"]["bond7.70"]["vlans"]
        # Its device takes 1500 at most.
        wrong["links"]["lan1"] = {"kind": "ethernet", "mtu": 9000}
        began = time.monotonic()
        with self.assertRaises(xmlrpc.client.Fault) as refused:
            self.proxy.network_apply(wrong)
        took = time.monotonic() - began
        self.assertIn("lan1", refused.exception.faultString)
        self.assertEqual(self.is_state(), before)
        (event,) = [one for one in self.proxy.event_list({"since": since})["events"] if one["type"] == "network.operation_failed"]
        self.assertTrue(event["acknowledged"])
        print(f"    failed, rolled back, discovered, acknowledged: {took:.1f} s", flush=True)

    @from_form("whole")
    def test_500_vlans_each_in_a_bridge_take_little_longer_than_ip_batch(self):
        vlans = {f"d9.{n}": {"kind": "vlan", "parent": "d9", "id": n} for n in range(1, 501)}
        bridges = {f"b{n}": {"kind": "bridge", "ports": [f"d9.{n}"]} for n in range(1, 501)}
        began = time.monotonic()
        self.proxy.network_apply({"links": {"d9": {"kind": "dummy"}, **vlans, **bridges}})
        ours = time.monotonic() - began
        self.proxy.network_apply({})
        lines = ["link add d9 type dummy", "link set d9 up"]
        for n in range(1, 501):
            lines += [f"link add link d9 name d9.{n} type vlan id {n}", f"link add b{n} type bridge",
                      f"link set d9.{n} master b{n} up", f"link set b{n} up"]  # fmt: skip
        (self.node.share / "batch").write_text("\n".join(lines) + "\n")
        took = float(self.node.sh("began=$EPOCHREALTIME; ip -batch /mnt/host/batch; echo $EPOCHREALTIME $began | awk '{print $1 - $2}'", 600))
        self.node.sh("for n in $(seq 500); do echo link del b$n; done >/tmp/del; ip -batch /tmp/del; ip link del d9", 900)
        print(f"    500 VLANs and 500 bridges: {ours:.1f} s; ip -batch: {took:.1f} s; {ours / took:.2f} times", flush=True)


class Reached(Network):
    WINDOW_S = 20

    def test_a_change_that_cuts_its_caller_off_is_undone_and_the_caller_reads_why(self):
        refused = {"links": {"host0": {"kind": "ethernet", "up": False}}}
        with self.assertRaises(xmlrpc.client.Fault) as fault:
            self.proxy.network_apply(refused)
        self.assertIn("INVALID_NETWORK", fault.exception.faultString)
        lost_at = time.monotonic()

        def cut():
            # The answer cannot come: its way is gone.
            try:
                self.agent.proxy().network_apply(refused, {"confirm_within": self.WINDOW_S, "may_cut_management": True})
            except (OSError, xmlrpc.client.Fault, xmlrpc.client.ProtocolError):
                pass

        threading.Thread(target=cut, daemon=True).start()

        def undone():
            try:
                past = self.agent.proxy().network_history(1)
            except (OSError, xmlrpc.client.ProtocolError):
                return None
            return past and past[0]["ending"] == "rolled_back" and past[0]

        past = wait_for("the agent to be reached again", undone, 300, 0.5)
        print(f"    cut off, and back after {time.monotonic() - lost_at:.1f} s: {past['why']}", flush=True)
        self.assertRegex(past["why"], "MANAGEMENT_LOST|NOT_CONFIRMED")
        self.assertTrue(self.links()["host0"]["up"])

    @from_form("brief")
    def test_a_reboot_in_the_window_leaves_what_was_confirmed(self):
        confirmed = {"links": {"brc": {"kind": "bridge", "addresses": ["198.51.100.1/24"]}}}
        self.proxy.network_apply(confirmed)
        tried = {"links": {**confirmed["links"], "brt": {"kind": "bridge"}}}
        self.proxy.network_apply(tried, {"confirm_within": 3000})
        self.assertIn("brt", self.links())
        self.node.reboot()
        self.agent.start()
        wait_for("the confirmed network", lambda: "brc" in self.links() and self.proxy.network_show()["change"] is None, 240, 0.5)
        links = self.links()
        self.assertEqual(links["brc"]["addresses"], ["198.51.100.1/24"])
        self.assertNotIn("brt", links)

    def test_what_passes_a_bridge_and_a_bond_loses_nothing_while_other_things_change(self):
        self.node.sh("ip netns add far; ip link add n0 type veth peer name n1; ip link set n1 netns far; ip -n far link set n1 up; ip -n far link set lo up; "
                     "ip -n far addr add 192.0.2.2/24 dev n1")  # fmt: skip
        self.addCleanup(self.node.sh, "ip netns del far; ip link del n0 2>/dev/null; true")
        passing = {"bond8": {"kind": "bond", "mode": "active-backup", "miimon_ms": 100, "ports": ["n0"]},
                   "br8": {"kind": "bridge", "ports": ["bond8"], "addresses": ["192.0.2.1/24"]},
                   "n0": {"kind": "ethernet"}}  # fmt: skip
        self.proxy.network_apply({"links": passing})
        wait_for("the way", lambda: self.node.run("ping -c 1 -W 2 192.0.2.2").code == 0, 60, 0.5)
        self.node.sh("ping -i 0.05 192.0.2.2 >/tmp/ping.txt 2>&1 & echo $! >/tmp/ping.pid")
        for _ in range(by_form(2, 3, 5, 20)):
            self.proxy.network_apply({"links": {**passing, **self.desired()["links"]}})
            self.proxy.network_apply({"links": passing})
        told = self.node.sh("kill -INT $(cat /tmp/ping.pid); while [ -d /proc/$(cat /tmp/ping.pid) ]; do sleep 0.1; done; cat /tmp/ping.txt")
        answered = sorted({int(number) for number in re.findall(r"icmp_seq=(\d+)", told)})
        print(f"    {len(answered)} echoes answered, the last was number {answered[-1]}", flush=True)
        # The last ones may still be on their way.
        self.assertEqual(answered, list(range(1, answered[-1] + 1)))
        self.assertGreater(len(answered), 20)
