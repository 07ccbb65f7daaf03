"""The network over the wire: declared, planned, applied, confirmed or taken back; hostile declarations; the dialect."""

import json
import time
import xml.etree.ElementTree as ET

from harness import DaemonCase, new_vm, REPO, run, binary, wait_for


def bridge(*ports, **more):
    return {"kind": "bridge", "ports": list(ports), **more}


class Network(DaemonCase):
    settings = "[wire]\nplain_http = true\n"

    def setUp(self):
        # By a connection of its own: the daemon may be another one then.
        self.addCleanup(lambda: self.daemon.proxy().network_apply({}))

    def links(self):
        return self.proxy.network_show()["links"]

    def events(self, kind, since):
        known = self.proxy.event_list({"since": since, "limit": 1000})["events"]
        return [one for one in known if one["type"] == kind]

    def last(self):
        return self.proxy.event_list()["last"]


class Declared(Network):
    def test_the_host_is_shown_with_its_bridge_and_what_is_not_ours_is_said(self):
        shown = self.proxy.network_show()
        self.assertEqual(shown["links"]["xenbr0"]["kind"], "bridge")
        self.assertEqual(shown["links"]["eth0"]["controller"], "xenbr0")
        self.assertIn("192.0.2.10/24", shown["links"]["xenbr0"]["addresses"])
        self.assertNotIn("owner", shown["links"]["xenbr0"])
        self.assertEqual((shown["change"], shown["drift"]), (None, []))

    def test_a_declaration_is_planned_applied_and_then_has_nothing_left_to_do(self):
        desired = {"links": {"br7": bridge("eth0.7", addresses=["198.51.100.1/24"], mtu=1400),
                             "eth0.7": {"kind": "vlan", "parent": "eth0", "id": 7, "mtu": 1400}},
                   "routes": [{"to": "203.0.113.0/24", "via": "198.51.100.2"}]}  # fmt: skip
        plan = self.proxy.network_plan(desired)
        self.assertGreaterEqual(plan["count"], 5)
        self.assertNotIn("br7", self.links())
        done = self.proxy.network_apply(desired)
        self.assertEqual(len(done["changes"]), plan["count"])
        links = self.links()
        self.assertEqual(links["eth0.7"]["controller"], "br7")
        self.assertEqual((links["br7"]["addresses"], links["br7"]["mtu"], links["br7"]["owner"]),
                         (["198.51.100.1/24"], 1400, "dom0d"))  # fmt: skip
        routes = self.proxy.network_show()["routes"]
        self.assertIn("203.0.113.0/24", [route["to"] for route in routes])
        self.assertEqual(self.proxy.network_plan(desired)["count"], 0)
        self.assertEqual(self.proxy.network_history()[0]["ending"], "applied")
        self.proxy.network_apply({})
        self.assertNotIn("br7", self.links())
        self.assertNotIn("eth0.7", self.links())
        self.assertIn("xenbr0", self.links(), "never declared, so left alone")

    def test_a_change_that_nobody_confirms_comes_back_and_its_event_acknowledges_itself(self):
        since, before = self.last(), self.links()
        asked = self.proxy.network_apply({"links": {"br8": bridge()}}, {"confirm_within": 5})
        self.assertTrue(asked["confirm_until"])
        self.assertEqual(asked["changes"], ["make bridge br8", "switch br8 on"])
        self.assertIn("br8", self.links())
        self.assertIn("network", [lock["lock"] for lock in self.proxy.lock_list()])
        ended = self.proxy.job_wait(asked["job"], 60)
        self.assertEqual((ended["state"], ended["fault"]["name"]), ("failed", "NOT_CONFIRMED"))
        self.assertEqual(self.links(), before)
        (failed,) = self.events("network.operation_failed", since)
        self.assertIn("discovery", failed["acknowledged_by"])
        (child,) = ended["children"]
        found = self.proxy.job_get(child)
        self.assertEqual((found["verb"], found["state"]), ("network_discover", "succeeded"))
        rows = found["result"]["differences"]
        self.assertEqual(found["result"]["differences_in_all"], len(rows))
        self.assertTrue(rows and all(row["was"] == row["is"] != row["asked"] for row in rows), rows)
        self.assertEqual(self.proxy.network_history()[0]["ending"], "rolled_back")
        self.assertFault("NOTHING_TO_CONFIRM", self.proxy.network_confirm)

    def test_a_change_that_is_confirmed_holds(self):
        asked = self.proxy.network_apply({"links": {"br9": bridge()}}, {"confirm_within": 600})
        self.proxy.network_confirm()
        self.assertEqual(self.proxy.job_get(asked["job"])["state"], "succeeded")
        self.assertIn("br9", self.links())
        self.assertIsNone(self.proxy.network_show()["change"])

    def test_a_change_under_way_is_taken_back_when_asked(self):
        before = self.links()
        asked = self.proxy.network_apply({"links": {"br10": bridge()}}, {"confirm_within": 600})
        self.proxy.network_rollback()
        self.assertEqual(self.proxy.job_get(asked["job"])["state"], "cancelled")
        self.assertEqual(self.links(), before)

    def test_what_the_agents_death_leaves_in_the_window_is_taken_back_at_its_start(self):
        before = self.links()
        asked = self.proxy.network_apply({"links": {"br11": bridge()}}, {"confirm_within": 3000})
        self.daemon.process.kill()
        self.daemon.process.wait()
        self.daemon.start()
        type(self).proxy = self.daemon.proxy()
        ended = self.proxy.job_wait(asked["job"], 60)
        self.assertEqual((ended["state"], ended["fault"]["name"]), ("failed", "INTERRUPTED"))
        self.assertEqual(self.links(), before)

    def test_a_running_vms_vif_is_on_its_bridge_again_after_a_rollback(self):
        self.proxy.network_apply({"links": {"brv": bridge()}})
        vm, params = new_vm("on-brv")
        params["vif"] = ["mac=00:21:f6:ff:00:01,bridge=brv"]
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        try:
            (vif,) = [name for name, link in self.links().items() if link.get("controller") == "brv"]
            asked = self.proxy.network_apply({}, {"confirm_within": 5})
            self.assertNotIn("brv", self.links())
            self.proxy.job_wait(asked["job"], 60)
            self.assertEqual(self.links()[vif]["controller"], "brv")
        finally:
            self.proxy.stop_vm(REPO, vm, True)
            self.proxy.delete_vm(REPO, vm)

    def test_4094_vlans_on_one_port_come_and_go(self):
        vlans = {f"eth0.{n}": {"kind": "vlan", "parent": "eth0", "id": n} for n in range(1, 4095)}
        self.proxy.network_apply({"links": vlans})
        self.assertEqual(sum(link["kind"] == "vlan" for link in self.links().values()), 4094)
        self.proxy.network_apply({})
        self.assertEqual(sum(link["kind"] == "vlan" for link in self.links().values()), 0)

    def test_what_cannot_be_is_refused_with_the_fields_name_and_nothing_is_changed(self):
        before = self.links()
        eth0 = {"kind": "ethernet"}
        for links, field in [
            ({"br%d": bridge()}, "links"),
            ({"a" * 16: bridge()}, "links"),
            ({"a/b": bridge()}, "links"),
            ({"x": {"kind": "vlan", "parent": "eth0", "id": 0}}, "links.x.id"),
            ({"x": {"kind": "vlan", "parent": "eth0", "id": 4095}}, "links.x.id"),
            ({"x": {"kind": "vlan", "parent": "no", "id": 5}}, "links.x.parent"),
            ({"x": bridge(mtu=67)}, "links.x.mtu"),
            ({"x": bridge(mtu=65536)}, "links.x.mtu"),
            ({"x": bridge("y"), "y": bridge("x")}, "links."),
            ({"x": bridge("no")}, "links.x.ports"),
            ({"x": bridge(addresses=["192.0.2.10/24"])}, "links.x.addresses"),
            ({"x": bridge(addresses=["127.0.0.1/8"])}, "links.x.addresses"),
            ({"x": bridge(mac="01:00:5e:00:00:01")}, "links.x.mac"),
            ({"x": {"kind": "bond", "mode": "round"}}, "links.x.mode"),
            ({"x": {"kind": "tunnel"}}, "links.x.kind"),
            ({"x": bridge(script="/bin/sh")}, "links.x.script"),
            ({"no": eth0}, "links.no"),
            ({"lo": eth0}, "links.lo"),
        ]:
            with self.subTest(field=field, links=str(links)[:60]):
                self.assertFault(field, self.proxy.network_plan, {"links": links})
                self.assertFault(field, self.proxy.network_apply, {"links": links})
        self.assertFault("options", self.proxy.network_apply, {}, {"confirm_within": 0})
        self.assertFault("options", self.proxy.network_apply, {}, {"on_failure": "pray"})
        self.assertEqual(self.links(), before)

    def test_the_hosts_last_address_is_taken_only_if_that_is_said(self):
        without = {"links": {"xenbr0": bridge("eth0", addresses=[])}}
        for call in (self.proxy.network_plan, self.proxy.network_apply):
            self.assertFault("management", call, without)
        self.assertGreater(self.proxy.network_plan(without, {"may_cut_management": True})["count"], 0)
        asked = self.proxy.network_apply(without, {"may_cut_management": True, "confirm_within": 5})
        self.assertEqual(self.proxy.job_wait(asked["job"], 60)["state"], "failed")
        self.assertEqual(self.links()["xenbr0"]["addresses"], ["192.0.2.10/24"])

    def test_dom0ctl_shows_plans_applies_and_draws(self):
        file = self.daemon.folder / "network.json"
        file.write_text(json.dumps({"links": {"brc": bridge("eth0.12"),
                                              "eth0.12": {"kind": "vlan", "parent": "eth0", "id": 12}}}))  # fmt: skip
        ctl = lambda *arguments: run(binary("dom0ctl"), "--socket", self.daemon.socket, "network", *arguments)  # noqa: E731
        self.assertIn("make bridge brc", ctl("plan", str(file)).stdout)
        applied = ctl("apply", str(file), "--confirm-within", "600")
        self.assertIn("dom0ctl network confirm", applied.stderr)
        self.assertEqual(ctl("confirm").returncode, 0)
        self.assertIn("brc", ctl("show").stdout)
        drawn = ctl("diagram").stdout
        for name in ("xenbr0", "eth0", "brc", "eth0.12"):
            self.assertIn(name, drawn)
        self.assertIn("applied", ctl("history").stdout)
        refused = ctl("confirm")
        self.assertEqual((refused.returncode, refused.stdout), (1, ""))


class Dialect(Network):
    def bridges(self):
        document = ET.fromstring(self.proxy.discover_network())
        devices = document.findall("Network/Active/Bridges/Device")
        return {one.get("Name"): one for one in devices}

    def test_cloudstack_adds_a_host(self):
        self.assertEqual(self.bridges()["xenbr0"].find("Family/Address").text, "192.0.2.10")
        self.assertEqual([one.text for one in self.bridges()["xenbr0"].findall("Interfaces/PhyInterface")], ["eth0"])
        self.assertTrue(self.proxy.ovs_local_config("start", "control0").startswith("start"))
        self.assertFault("Bridge control0 Is Busy", self.proxy.ovs_local_config, "start", "control0")
        self.assertIn("control0", self.bridges())
        self.proxy.ovs_ip_config("control0", "static", "169.254.0.1", "255.255.0.0")
        self.proxy.ovs_control_interface("control0", "169.254.0.0/16")
        control = self.bridges()["control0"]
        self.assertEqual((control.find("Family/Address").text, control.find("Family/Netmask").text),
                         ("169.254.0.1", "255.255.0.0"))  # fmt: skip
        self.assertEqual(len(control.findall("Family")), 1)
        self.assertEqual(control.find("Interfaces").findall("PhyInterface"), [])

    def test_a_guests_vlan_bridge_comes_twice_the_same_and_goes(self):
        for _ in range(2):
            self.assertTrue(self.proxy.ovs_vlan_bridge("start", "xenbr0.160", "eth0", 160).startswith("start"))
            ports = self.bridges()["xenbr0.160"].findall("Interfaces/PhyInterface")
            self.assertEqual([one.text for one in ports], ["eth0.160"])
        self.assertTrue(self.proxy.ovs_vlan_bridge("stop", "xenbr0.160", "eth0", 160).startswith("stop"))
        self.assertNotIn("eth0.160", self.links())

    def test_the_management_address_moves_into_a_bridge_and_back(self):
        self.assertTrue(self.proxy.ovs_vlan_config("add", "eth0", 50) is None)
        self.proxy.ovs_ip_config("eth0.50", "static", "198.51.100.9", "255.255.255.0")
        self.assertTrue(self.proxy.ovs_br_config("start", "mgmt", "eth0.50").startswith("start"))
        links = self.links()
        self.assertEqual((links["mgmt"]["addresses"], links["eth0.50"]["addresses"]), (["198.51.100.9/24"], []))
        self.assertTrue(self.proxy.ovs_br_config("stop", "mgmt", "eth0.50").startswith("stop"))
        links = self.links()
        self.assertNotIn("mgmt", links)
        self.assertEqual(links["eth0.50"]["addresses"], ["198.51.100.9/24"])
        self.assertIsNone(self.proxy.ovs_vlan_config("remove", "eth0", 50))
        self.assertNotIn("eth0.50", self.links())

    def test_a_bridge_that_nobody_declared_is_not_removed_and_that_is_said(self):
        self.assertFault("not managed here", self.proxy.ovs_br_config, "stop", "xenbr0", "eth0")
        self.assertFault("there is no link", self.proxy.ovs_br_config, "stop", "nobridge", "eth0")
        self.assertIn("xenbr0", self.bridges())

    def test_a_vlan_bridge_on_a_port_that_is_off_switches_the_port_on(self):
        self.assertFalse(self.links()["eth3"]["up"])
        self.assertTrue(self.proxy.ovs_vlan_bridge("start", "xenbr3.9", "eth3", 9).startswith("start"))
        links = self.links()
        self.assertTrue(links["eth3"]["up"] and links["eth3.9"]["up"])

    def test_bonds_mtu_notes_and_virtual_addresses(self):
        self.assertTrue(self.proxy.ovs_bond_config("start", "bond7").startswith("start"))
        self.proxy.ovs_bond_mode("bond7", "802.3ad")
        self.assertEqual(self.links()["bond7"]["mode"], "802.3ad")
        self.proxy.ovs_change_mtu("bond7", 9000)
        self.assertEqual(self.links()["bond7"]["mtu"], 9000)
        self.proxy.ovs_if_meta("bond7", "ethernet:c0a80100{192.168.1.0}:MANAGEMENT")
        self.assertIn("c0a80100", self.proxy.discover_network())
        self.proxy.ovs_if_meta("bond7", "")
        self.assertNotIn("c0a80100", self.proxy.discover_network())
        self.assertFault("data", self.proxy.ovs_if_meta, "bond7", " leading")
        self.assertTrue(self.proxy.ovs_bond_config("stop", "bond7").startswith("stop"))
        self.proxy.configure_virtual_ip("192.0.2.99", "192.0.2.10")
        self.assertTrue(self.proxy.check_dom0_ip("192.0.2.99"))
        self.proxy.deconfigure_virtual_ip("192.0.2.99")
        self.assertFalse(self.proxy.check_dom0_ip("192.0.2.99"))
        self.assertFault("base_ip", self.proxy.configure_virtual_ip, "192.0.2.99", "203.0.113.77")

    def test_who_answers_is_told_and_silence_is_no_fault(self):
        for answer in (self.proxy.ping("192.0.2.1"), self.proxy.ping("192.0.2.1", 2), self.proxy.check_dom0_port("192.0.2.1", 443)):
            self.assertIs(answer, True)
        # No route leads there.
        self.assertIs(self.proxy.ping("2001:db8:7::1", 1), False)
        self.assertIsNone(self.proxy.check_dom0_port("2001:db8:7::1", 443, 1))

    def test_a_port_comes_into_a_bond_and_goes_and_a_link_is_leased_and_flushed(self):
        self.proxy.ovs_bond_config("start", "bond6")
        self.assertTrue(self.proxy.ovs_bond_op("add", "bond6", "eth2").startswith("add"))
        self.assertEqual(self.links()["eth2"]["controller"], "bond6")
        self.assertTrue(self.proxy.ovs_bond_op("remove", "bond6", "eth2").startswith("remove"))
        self.assertIsNone(self.links()["eth2"]["controller"])
        self.assertFault("backup", self.proxy.ovs_bond_op, "remove", "bond6", "eth2")
        self.assertIsInstance(self.proxy.ovs_ip_config("eth2", "dynamic"), str)
        self.assertTrue(self.links()["eth2"]["dhcp"])
        # The bridge asks for the lease from then on.
        self.proxy.ovs_br_config("start", "leased", "eth2")
        self.assertTrue(self.links()["leased"]["dhcp"] and not self.links()["eth2"]["dhcp"])
        self.proxy.ovs_ip_config("leased", "flush")
        leased = self.links()["leased"]
        self.assertEqual((leased["dhcp"], leased["addresses"]), (False, []))

    def test_what_is_asked_without_waiting_answers_a_job(self):
        job = self.proxy.ovs_async_bond("start", "bond8")
        self.assertEqual(self.proxy.job_wait(job, 60)["state"], "succeeded")
        job = self.proxy.ovs_async_bridge("start", "brb8", "bond8")
        self.assertEqual(self.proxy.job_wait(job, 60)["state"], "succeeded")
        self.assertEqual(self.links()["bond8"]["controller"], "brb8")

    def test_hostile_words_are_refused_with_the_parameters_name(self):
        for name, call, params in [
            ("action", self.proxy.ovs_br_config, ("begin", "x", "eth0")),
            ("bridge", self.proxy.ovs_br_config, ("start", "x; reboot", "eth0")),
            ("net_dev", self.proxy.ovs_br_config, ("start", "x", "../eth0")),
            ("vlan", self.proxy.ovs_vlan_bridge, ("start", "x", "eth0", 4095)),
            ("netmask", self.proxy.ovs_ip_config, ("xenbr0", "static", "192.0.2.7", "255.0.255.0")),
            ("ip", self.proxy.ovs_ip_config, ("xenbr0", "static", "192.0.2.256", "255.255.255.0")),
            ("optype", self.proxy.ovs_ip_config, ("xenbr0", "static; id", "192.0.2.7", "255.255.255.0")),
            ("mtu", self.proxy.ovs_change_mtu, ("eth0", 67)),
            ("mode", self.proxy.ovs_bond_mode, ("eth0", "$(id)")),
            ("host", self.proxy.ping, ("-f 192.0.2.1",)),
            ("count", self.proxy.ping, ("192.0.2.1", 11)),
            ("port", self.proxy.check_dom0_port, ("192.0.2.1", 0)),
        ]:
            with self.subTest(name=name):
                self.assertFault(name, call, *params)
