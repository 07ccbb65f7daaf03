"""Every verb on a VM, by Python's client and by curl, both over TLS."""

import xmlrpc.client

from harness import DISKS, REPO, Curl, DaemonCase, Python, mac, new_vm, wait_for


class EveryVerb:
    """A VM's whole life; the subclasses say by which client."""

    client = None

    def setUp(self):
        self.call = self.client(self.daemon).call

    def listed(self, name):
        return next((vm for vm in self.call("list_vms") if vm["name"] == name), None)

    def whole_life(self, kind):
        name = f"{self.client.__name__}-{kind}"
        vm, params = new_vm(name, kind)
        self.assertIsNone(self.call("create_vm", REPO, vm, params))
        self.assertIsNone(self.listed(name), "a VM that is off is not in list_vms")
        self.assertIsNone(self.call("list_vm", REPO, vm))

        self.assertIsNone(self.call("start_vm", REPO, vm))
        shown = self.listed(name)
        self.assertEqual(shown["uuid"], vm)
        self.assertRegex(shown["state"], "^(r-----|-b----)$")
        self.assertEqual(shown["builder"], "hvm" if kind == "hvm" else "linux")
        self.assertEqual(self.call("list_vm", REPO, vm)["domid"], shown["domid"])

        self.assertIsNone(self.call("pause_vm", REPO, vm))
        self.assertEqual(self.listed(name)["state"], "--p---")
        self.assertIsNone(self.call("unpause_vm", REPO, vm))
        self.assertRegex(self.listed(name)["state"], "^(r-----|-b----)$")

        self.assertIsNone(self.call("save_vm", REPO, vm, True))
        self.assertEqual(self.listed(name)["domid"], shown["domid"], "after a checkpoint the same domain runs on")
        self.assertIsNone(self.call("save_vm", REPO, vm, False))
        self.assertIsNone(self.listed(name))
        self.assertEqual(self.state(vm), "saved")
        self.assertIsNone(self.call("restore_vm", REPO, vm, True))
        self.assertEqual(self.listed(name)["state"], "--p---")
        self.assertIsNone(self.call("unpause_vm", REPO, vm))

        before = self.listed(name)["domid"]
        self.assertIsNone(self.call("reboot_vm", REPO, vm, 3))
        after = self.listed(name)
        self.assertNotEqual(after["domid"], before, "a rebooted guest is a new domain")
        self.assertRegex(after["state"], "^(r-----|-b----)$")

        self.assertIsNone(self.call("stop_vm", REPO, vm))
        self.assertIsNone(self.listed(name))
        self.assertIsNone(self.call("start_vm", REPO, vm))
        self.assertIsNone(self.call("stop_vm", REPO, vm, True))
        self.assertIsNone(self.listed(name))
        self.assertIsNone(self.call("delete_vm", REPO, vm))
        self.assertFault("VM_NOT_FOUND", self.call, "get_vm_config", REPO, vm)

    def test_a_pv_guest_with_pygrub_lives_its_whole_life(self):
        self.whole_life("pv")

    def test_an_hvm_guest_lives_its_whole_life(self):
        self.whole_life("hvm")

    def test_a_guest_with_a_kernel_of_its_own_lives_its_whole_life(self):
        self.whole_life("kernel")

    def test_a_pvh_guest_lives_its_whole_life(self):
        self.whole_life("pvh")

    def test_both_forms_of_take_ownership_are_taken(self):
        for form in [("0a" * 16, "http://user:pw@127.0.0.1:7002/ovm/core"), ({"manager_uuid": "0a" * 16,
                "manager_event_url": "https://127.0.0.1:7002/e", "manager_statistic_url": "https://127.0.0.1:7002/s",
                "manager_certificate": "", "signed_server_certificate": ""},)]:  # fmt: skip
            self.assertIsNone(self.call("take_ownership", *form))
            self.assertEqual(self.element("Manager_Unique_Id"), "0a" * 16)
            self.assertIsNone(self.call("release_ownership", "0a" * 16))
            self.assertEqual(self.element("Manager_Unique_Id"), "none")

    def test_a_running_guest_takes_signals_messages_and_a_core_dump(self):
        name = f"{self.client.__name__}-signals"
        vm, params = new_vm(name)
        self.call("create_vm", REPO, vm, params)
        self.call("start_vm", REPO, vm)
        domid = self.listed(name)["domid"]
        self.assertIsNone(self.call("sysrq_vm", REPO, vm, "h"))
        self.assertIsNone(self.call("trigger_vm", REPO, vm, "nmi", 0))
        self.assertIsNone(self.call("send_to_guest", REPO, vm, {"com.oracle.message": "hello", "n": 1, "b": True}))
        self.assertFault("letter", self.call, "sysrq_vm", REPO, vm, "reboot")
        self.assertFault("allowed: nmi", self.call, "trigger_vm", REPO, vm, "smoke", 0)

        self.assertEqual(self.call("list_vm_core", REPO, vm), [])
        self.call("dump_vm_core", REPO, vm, True, False, False)
        self.assertEqual(self.listed(name)["domid"], domid, "a live dump does not end the guest")
        (core,) = self.call("list_vm_core", REPO, vm)
        self.assertFault("CORE_NOT_FOUND", self.call, "delete_vm_core", REPO, vm, "1999")
        self.assertIsNone(self.call("delete_vm_core", REPO, vm, core["core_date"]))
        self.assertEqual(self.call("list_vm_core", REPO, vm), [])
        self.call("dump_vm_core", REPO, vm, False, True, True)
        self.assertNotEqual(self.listed(name)["domid"], domid, "a dump with reset starts the guest anew")
        self.call("dump_vm_core", REPO, vm, False, True, False)
        self.assertIsNone(self.listed(name), "a dump with crash ends it")
        self.assertEqual(len(self.call("list_vm_core", REPO, vm)), 2)
        self.call("delete_vm", REPO, vm)

    def disks(self, vm):
        return self.call("get_vm_config", REPO, vm)["disk"]

    def plugging(self, running):
        name = f"{self.client.__name__}-plug-{running}"
        vm, params = new_vm(name)
        self.call("create_vm", REPO, vm, params)
        if running:
            self.call("start_vm", REPO, vm)
        disk, vif = f"file:{DISKS}/data-{vm}.raw,xvdb,w!", f"mac={mac()},bridge=xenbr0"
        self.assertIsNone(self.call("configure_vm", REPO, vm, {"disk": params["disk"] + [disk]}))
        self.assertIsNone(self.call("configure_vm", REPO, vm, {"vif": params["vif"] + [vif]}))
        config = self.call("get_vm_config", REPO, vm)
        self.assertEqual(config["disk"], params["disk"] + [disk])
        self.assertEqual(config["vif"], params["vif"] + [vif])
        self.assertEqual(config["vfb"], self.call("get_vm_config", REPO, vm)["vfb"])
        self.assertEqual((config["memory"], config["name"]), (512, name), "what was not named stays")
        if running:
            devices = self.listed(name)["device"]
            self.assertEqual([d["dev"] for d in devices["vbd"]], ["xvda:disk", "xvdb:disk"])
            self.assertEqual(devices["vif"][1]["mac"], vif.split(",")[0][4:])
        self.assertIsNone(self.call("unconfigure_vm", REPO, vm, {"disk": [disk], "vif": [vif]}))
        config = self.call("get_vm_config", REPO, vm)
        self.assertEqual((config["disk"], config["vif"]), (params["disk"], params["vif"]))
        if running:
            self.call("stop_vm", REPO, vm, True)
        self.call("delete_vm", REPO, vm)

    def test_disks_and_vifs_come_and_go_while_a_guest_runs(self):
        self.plugging(True)

    def test_disks_and_vifs_come_and_go_while_a_guest_is_off(self):
        self.plugging(False)

    def test_the_configuration_is_read_changed_and_written_back(self):
        name = f"{self.client.__name__}-config"
        vm, params = new_vm(name)
        self.call("create_vm", REPO, vm, params)
        config = self.call("get_vm_config", REPO, vm)
        self.assertIsNone(self.call("set_vm_config", REPO, vm, config | {"memory": 1024, "OVM_note": "moved"}))
        again = self.call("get_vm_config", REPO, vm)
        self.assertEqual(again, config | {"memory": 1024, "maxmem": 1024, "OVM_note": "moved"})
        self.assertIsNone(self.call("configure_vm_ha", REPO, vm, True))
        self.assertIs(self.call("get_vm_config", REPO, vm)["OVM_high_availability"], True)
        self.call("start_vm", REPO, vm)
        self.assertFault("VM_STATE", self.call, "set_vm_config", REPO, vm, config)
        self.assertFault("VM_STATE", self.call, "delete_vm", REPO, vm)
        self.assertFault("VM_STATE", self.call, "start_vm", REPO, vm)
        self.call("stop_vm", REPO, vm, True)
        self.call("delete_vm", REPO, vm)


class ByPython(EveryVerb, DaemonCase):
    client = Python


class ByCurl(EveryVerb, DaemonCase):
    client = Curl


class OurOwnVerbs(DaemonCase):
    def test_a_change_can_be_submitted_watched_and_found_in_the_events(self):
        vm, params = new_vm("own")
        last = self.proxy.event_list()["last"]
        plan = self.proxy.job_submit("create_vm", [REPO, vm, params], {"dry_run": True})
        self.assertTrue(plan["steps"])
        self.assertEqual(self.proxy.vm_list(), [])
        options = {"idempotency_key": "once"}
        job = self.proxy.job_submit("create_vm", [REPO, vm, params], options)
        self.assertEqual(self.proxy.job_submit("create_vm", [REPO, vm, params], options), job)
        ended = self.proxy.job_wait(job, 30)
        self.assertEqual((ended["state"], ended["progress"]), ("succeeded", 100))
        self.assertEqual([v["name"] for v in self.proxy.vm_list()], ["own"])
        self.assertEqual(self.proxy.job_get(job)["id"], job)
        self.assertIn(job, [j["id"] for j in self.proxy.job_list({"verb": "create_vm"})])
        page = self.proxy.event_wait(last, 10)
        self.assertTrue(page["events"])
        self.assertIsNone(page["gap"])
        numbers = [event["number"] for event in page["events"]]
        self.assertEqual(self.proxy.event_ack(numbers), len(numbers))
        self.assertEqual(self.proxy.event_ack(numbers), 0)

    def test_a_job_shows_its_lock_and_can_be_cancelled(self):
        vm, params = new_vm("deaf")
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        self.daemon.deafen(vm)
        job = self.proxy.job_submit("stop_vm", [REPO, vm, False])
        wait_for("the lock", lambda: any(lock["job"] == job for lock in self.proxy.lock_list()))
        self.assertIsNone(self.proxy.job_cancel(job))
        self.assertEqual(self.proxy.job_wait(job, 30)["state"], "cancelled")
        with self.assertRaises(xmlrpc.client.Fault) as raised:
            self.proxy.job_cancel(job)
        self.assertEqual(raised.exception.faultCode, 302)
        self.assertFalse(any(lock["job"] == job for lock in self.proxy.lock_list()))
