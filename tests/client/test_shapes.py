"""Each element of the answers recorded from the original agent is in ours, of the same XML-RPC type."""

import xml.etree.ElementTree as ET

import shapes
from harness import REPO, DaemonCase, new_vm


class EveryRecordedElement(DaemonCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.vms = {}
        for kind in ("pv", "hvm", "kernel", "pvh"):
            vm, params = new_vm(f"shape-{kind}", kind)
            cls.proxy.create_vm(REPO, vm, params)
            cls.proxy.start_vm(REPO, vm)
            cls.vms[kind] = vm
        cls.off, params = new_vm("shape-off")
        cls.proxy.create_vm(REPO, cls.off, params)

    def assertShape(self, name, value):
        self.assertEqual(shapes.missing(name, value), [])

    def answer(self, method, *params):
        return shapes.answer(self.daemon.raw(method, *params))

    def listed(self):
        elements = self.answer("list_vms")[0].findall("data/value")
        name = lambda e: next(m.find("value") for m in e[0] if m.find("name").text == "name")  # noqa: E731
        return {"".join(name(element).itertext()).strip(): element for element in elements}

    def test_domain_0_in_list_vms(self):
        self.assertShape("list_vms.domain0", self.listed()["Domain-0"])

    def test_a_guest_in_list_vms_whatever_its_kind(self):
        listed = self.listed()
        self.assertEqual(len(listed), 5)
        for kind in self.vms:
            with self.subTest(kind):
                self.assertShape("list_vm", listed[f"shape-{kind}"])

    def test_list_vm(self):
        for kind, vm in self.vms.items():
            with self.subTest(kind):
                self.assertShape("list_vm", self.answer("list_vm", REPO, vm))

    def test_every_scalar_of_list_vms_is_a_string(self):
        for name, element in self.listed().items():
            types = {kind for _, kind in shapes.found(element)}
            self.assertEqual(types, {"struct", "array", "string"}, name)

    def test_get_vm_config_on_and_off(self):
        for kind, vm in [*self.vms.items(), ("off", self.off)]:
            with self.subTest(kind):
                self.assertShape("get_vm_config", self.answer("get_vm_config", REPO, vm))

    def test_a_vm_without_devices_has_empty_arrays_of_them(self):
        vm, params = new_vm("shape-bare")
        self.proxy.create_vm(REPO, vm, params | {"disk": [], "vif": [], "vfb": []})
        config = self.proxy.get_vm_config(REPO, vm)
        self.assertEqual((config["disk"], config["vif"], config["vfb"]), ([], [], []))
        self.proxy.delete_vm(REPO, vm)

    def test_get_ntp(self):
        self.proxy.set_ntp(["ntp1.example.org", "192.0.2.1"], True)
        self.assertShape("get_ntp", self.answer("get_ntp"))

    def test_get_timezone(self):
        self.assertShape("get_timezone", self.answer("get_timezone"))

    def test_get_last_boot_time(self):
        self.assertShape("get_last_boot_time", self.answer("get_last_boot_time"))

    def test_discover_server(self):
        value = self.answer("discover_server")
        self.assertShape("discover_server.answer", value)
        self.assertEqual(shapes.missing_in_document("discover_server", "".join(value.itertext())), [])

    def test_discover_hardware(self):
        value = self.answer("discover_hardware")
        self.assertShape("discover_hardware.answer", value)
        self.assertEqual(shapes.missing_in_document("discover_hardware", "".join(value.itertext())), [])

    def test_nil(self):
        self.assertShape("nil", self.answer("configure_vm_ha", REPO, self.off, False))

    def test_a_fault(self):
        raw = self.daemon.raw("get_vm_config", REPO, "0b" * 16)
        self.assertShape("fault", shapes.fault(raw))
        self.assertEqual([child.tag for child in ET.fromstring(raw)], ["fault"])

    def test_the_walker_notices_what_is_missing_and_what_is_of_another_type(self):
        value = ET.fromstring("<value><array><data><value><int>1</int></value></data></array></value>")
        self.assertEqual(len(shapes.missing("get_timezone", value)), 2)
        self.assertEqual(len(shapes.missing_in_document("discover_server", "<Discover_Server_Result/>")), 71 - 1)
