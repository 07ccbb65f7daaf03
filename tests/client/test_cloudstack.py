"""Apache CloudStack's OVM3 plug-in, step by step: host added, VMs started, changed, rebooted, stopped."""

import uuid
import xml.etree.ElementTree as ET
import xmlrpc.client

import apache
from harness import MANAGER, DaemonCase, mac, wait_for

POOL = "f12842eb-f5ed-3fe7-8da1-eb0e17f5ede8"
REPO = POOL.replace("-", "")


def disk(name):
    return f"/OVS/Repositories/{REPO}/VirtualDisks/{name}.raw"


class CloudStack(DaemonCase):
    settings = "[wire]\nplain_http = true\n"

    def setUp(self):
        self.c = apache.Connection(self.daemon.port, self.daemon.password)
        self.addCleanup(self.c.close)
        self.xen = apache.Xen(self.c)

    def prepare_for_pool(self):
        """Ovm3StoragePool.prepareForPool: what it says of a host."""
        host = apache.Linux(self.c)
        if host.get("Server_Roles") != "[xen, utility]":
            self.assertIsNone(self.c.call("update_server_roles", "xen,utility"))
        if host.get("Membership_State") == "Unowned":
            self.assertIsNone(self.c.call("take_ownership", MANAGER, ""))
            return "taken"
        return "ours" if host.get("Manager_Unique_Id") == MANAGER else "another's"

    def start(self, name, os_type="xen_pvm", system_vm=False):
        """StartCommand. The first disk decides on the repository."""
        vm = apache.Vm()
        vm.params["vcpus"] = 2
        vm.params["memory"] = str(512)
        vm.params["uuid"] = str(uuid.uuid3(uuid.NAMESPACE_DNS, name))
        vm.params["name"] = vm.params["OVM_simple_name"] = name
        vm.params["OVM_domain_type"] = os_type
        boot_args = " template=domP type=consoleproxy host=192.0.2.1 port=8250 name=v-1-VM" if system_vm else ""
        vm.params["extra"] = boot_args.replace(" ", "%")
        vm.add_disk(disk(f"{name}-root"), "w")
        vm.add_disk(disk(f"{name}-data"), "w!")
        if system_vm:
            vm.add_disk(f"/OVS/Repositories/{REPO}/ISOs/systemvm.iso", "r!")
        vm.add_vif("xenbr0.160", mac())
        vm.add_vif("xenbr0", mac())
        vm.set_vnc("0.0.0.0", "7693f834ca67912e")
        self.assertIsNone(self.c.call("create_vm", REPO, vm.params["uuid"], vm.params))
        self.assertIsNone(self.c.call("start_vm", REPO, vm.params["uuid"]))
        return vm

    def stop(self, name):
        """StopCommand: stops, polls until it is gone, deletes."""
        vm = self.xen.running(name)
        repo, vm_id = vm.root_disk_pool(), vm.params["uuid"]
        self.assertEqual(repo, REPO)
        self.assertIsNone(self.c.call("stop_vm", repo, vm_id, False))
        wait_for("the VM to vanish", lambda: self.xen.running(name) is None)
        self.assertIsNone(self.c.call("delete_vm", repo, vm_id))
        self.assertIsNone(self.xen.running(name))

    def test_a_host_is_added_and_connected_again(self):
        """prepareForPool, fillHostInfo, masterCheck, PING."""
        try:
            self.c.call("release_ownership", MANAGER)
        except xmlrpc.client.Fault:
            pass
        self.assertEqual(self.prepare_for_pool(), "taken")
        self.assertEqual(self.prepare_for_pool(), "ours")
        host = apache.Linux(self.c)
        self.assertTrue(host.get("OVM_Version").startswith("3.2."))
        for name in ("CPUKHz", "SocketsPerNode", "ThreadsPerCore", "CoresPerSocket"):
            self.assertGreater(int(host.get(name)), 0, name)
        self.assertGreater(float(host.get("TotalPages")), float(host.get("FreePages")))
        for name in ("Hostname", "Agent_Version", "Capabilities", "Unique_Id", "Host_Kernel_Release", "OS_Name",
                     "OS_Major_Version", "OS_Minor_Version", "Hypervisor_Name", "Major", "Minor"):  # fmt: skip
            self.assertNotEqual(host.get(name), "", name)
        host.get("Extra").replace(".", "")
        self.assertEqual(host.get("Is_Current_Master"), "false")
        self.assertEqual(self.c.call("echo", "put"), "put")
        self.assertEqual(self.c.call("get_api_version")[0], 3)
        boot = self.c.call("get_last_boot_time")
        self.assertEqual(self.c.last.count(b"<i8>"), 2)
        self.assertEqual(sorted(boot), ["last_boot_time", "local_time"])
        servers, local, running = self.c.call("get_ntp")
        self.assertIs(type(servers), list)
        self.assertIs(type(local), bool)
        self.assertIs(type(running), bool)
        self.assertIsNone(self.c.call("set_ntp", ["192.0.2.1"], True))
        zone, utc = self.c.call("get_timezone")
        self.assertTrue(zone and isinstance(utc, bool))

    def test_a_host_of_another_manager_is_left_alone(self):
        self.prepare_for_pool()
        self.c.call("release_ownership", MANAGER)
        self.c.call("take_ownership", "00" * 16, "")
        self.assertEqual(self.prepare_for_pool(), "another's")
        self.c.call("release_ownership", "00" * 16)

    def test_a_user_vm_starts_reboots_and_stops(self):
        vm = self.start("i-2-3-VM")
        running = self.xen.running("i-2-3-VM")
        self.assertEqual(running.params["uuid"], vm.params["uuid"])
        self.assertEqual(running.params["memory"], "512")
        self.assertEqual(running.root_disk_pool(), REPO)
        self.assertGreaterEqual(running.vnc_port(), 5900)
        self.assertEqual(running.params["device"]["vfb"][0]["location"].split(":")[0], "0.0.0.0")
        self.assertEqual(self.xen.states()["i-2-3-VM"], "Running")
        self.assertIsNone(self.c.call("configure_vm_ha", REPO, vm.params["uuid"], True))
        self.assertIsNone(self.c.call("reboot_vm", running.root_disk_pool(), running.params["uuid"], 3))
        self.assertGreaterEqual(self.xen.running("i-2-3-VM").vnc_port(), 5900)
        self.stop("i-2-3-VM")
        self.start("i-2-3-VM")
        self.stop("i-2-3-VM")

    def test_a_system_vm_has_its_iso_and_boot_arguments(self):
        vm = self.start("v-1-VM", system_vm=True)
        config = self.xen.config("v-1-VM")
        self.assertEqual(config.params["extra"], vm.params["extra"])
        self.assertEqual(config.disks, vm.disks)
        self.assertTrue(config.disks[2].endswith(".iso,xvdc:cdrom,r"))
        self.stop("v-1-VM")

    def test_an_hvm_vm_has_its_disks_by_short_letters(self):
        for kind in ("hvm", "xen_hvm"):
            vm = self.start(f"i-2-{kind}-VM".replace("_", "-"), kind, system_vm=True)
            name = vm.params["name"]
            self.assertEqual([d.split(",")[1] for d in vm.disks], ["c", "d", "e:cdrom"])
            running = self.xen.running(name)
            self.assertEqual(running.params["builder"], "hvm")
            devices = [vbd["dev"] for vbd in running.params["device"]["vbd"]]
            self.assertEqual(devices, ["hdc:disk", "hdd:disk", "xvde:cdrom"])
            self.attach_and_detach(name)
            self.stop(name)

    def test_a_vm_of_a_type_that_cloudstack_does_not_know_is_a_pv_guest(self):
        for kind in ("default", "ldoms_pvm"):
            self.start(f"i-3-{kind[0]}-VM", kind)
            name = f"i-3-{kind[0]}-VM"
            self.assertEqual(self.xen.running(name).params["builder"], "linux")
            self.assertEqual(self.xen.config(name).params["OVM_domain_type"], kind)
            self.attach_and_detach(name)
            self.stop(name)

    def test_zero_maxvcpus_means_as_many_as_it_has(self):
        self.start("i-4-5-VM")
        params = self.xen.config("i-4-5-VM").params
        self.assertEqual((params["vcpus"], params["maxvcpus"], params["memory"]), (2, 2, 512))
        self.assertIs(type(params["memory"]), int)
        self.stop("i-4-5-VM")

    def attach_and_detach(self, name):
        """AttachCommand, DettachCommand, PlugNicCommand: get_vm_config goes back whole, with one list changed."""
        before = self.xen.config(name)
        domid = self.xen.running(name).params["domid"]
        config = self.xen.config(name)
        config.add_disk(disk("attached"), "w!")
        self.assertIsNone(self.xen.configure(config))
        now = self.xen.config(name)
        self.assertEqual(len(now.disks), len(before.disks) + 1)
        self.assertTrue(any(disk("attached") in d and d.endswith(",w!") for d in now.disks))
        self.assertEqual((now.vifs, now.vfbs), (before.vifs, before.vfbs))
        now.remove_disk(disk("attached"))
        self.assertIsNone(self.xen.configure(now))
        address = mac()
        plug = self.xen.config(name)
        self.assertEqual(plug.disks, before.disks)
        plug.add_vif("xenbr0", address)
        self.assertIsNone(self.xen.configure(plug))
        self.assertEqual(len(self.xen.running(name).params["device"]["vif"]), len(before.vifs) + 1)
        unplug = self.xen.config(name)
        unplug.remove_vif("xenbr0", address)
        self.assertIsNone(self.xen.configure(unplug))
        after = self.xen.config(name)
        self.assertEqual((after.vifs, after.disks, after.vfbs), (before.vifs, before.disks, before.vfbs))
        self.assertEqual(after.params, before.params)
        self.assertEqual(self.xen.running(name).params["domid"], domid, "the guest ran on")

    def test_disks_and_nics_are_attached_to_a_running_vm_and_detached(self):
        self.start("i-5-6-VM")
        self.attach_and_detach("i-5-6-VM")
        self.stop("i-5-6-VM")

    def test_a_configuration_that_goes_back_as_it_came_changes_nothing(self):
        for kind in ("xen_pvm", "hvm"):
            name = f"i-6-{kind[0]}-VM"
            vm = self.start(name, kind)
            vm_id = vm.params["uuid"]
            config = self.c.call("get_vm_config", REPO, vm_id)
            self.assertIsNone(self.c.call("configure_vm", REPO, vm_id, config))
            self.assertEqual(self.c.call("get_vm_config", REPO, vm_id), config)
            self.stop(name)

    def test_a_vms_statistics_give_cloudstack_its_share_of_a_cpu_and_its_traffic(self):
        self.start("i-8-9-VM")
        plugin = apache.Plugin(self.c)
        self.assertIsNone(plugin.vm_stat("i-8-9-VM"))
        first = plugin.vm_stats["i-8-9-VM"]
        self.assertEqual(sorted(first), ["cputime", "rd_bytes", "rd_ops", "rx_bytes", "tx_bytes", "uptime", "vcpus",
                                         "wr_bytes", "wr_ops"])  # fmt: skip
        wait_for("three seconds of the VM's life", lambda: float(self.c.call("ovs_domU_stats", "i-8-9-VM")["uptime"])
                 > float(first["uptime"]) + 3e9)  # fmt: skip
        stat = plugin.vm_stat("i-8-9-VM")
        self.assertEqual(stat["cpus"], 2)
        # A simulated guest uses a fiftieth of a CPU.
        self.assertTrue(0.01 < stat["share"] < 0.03, stat)
        for name in ("rx_bytes", "tx_bytes", "rd_bytes", "wr_bytes", "rd_ops", "wr_ops"):
            self.assertGreater(stat[name], 0, name)
        self.assertGreater(stat["rx_bytes"], stat["tx_bytes"], "as the guest sees it, which receives more")
        paused = self.xen.running("i-8-9-VM").params["uuid"]
        self.assertIsNone(self.c.call("pause_vm", REPO, paused))
        plugin.vm_stat("i-8-9-VM")
        wait_for("a guest that does nothing while time goes on", lambda: (stat := plugin.vm_stat("i-8-9-VM"))["cputime"] == 0
                 and stat["uptime"] > 0)  # fmt: skip
        self.assertIsNone(self.c.call("unpause_vm", REPO, paused))
        self.assertEqual(plugin.vnc_port("i-8-9-VM"), str(self.xen.running("i-8-9-VM").vnc_port()))
        self.assertEqual(plugin.vnc_port(paused), plugin.vnc_port("i-8-9-VM"), "the id will do")
        self.c.call("stop_vm", REPO, paused, True)
        self.assertFault("VM_STATE", self.c.call, "ovs_domU_stats", "i-8-9-VM")
        self.assertEqual(plugin.vnc_port("i-8-9-VM"), "0")
        self.assertIsNone(self.c.call("delete_vm", REPO, paused))
        self.assertFault("VM_NOT_FOUND", self.c.call, "ovs_domU_stats", "i-8-9-VM")
        self.assertFault("VM_NOT_FOUND", self.c.call, "ovs_domU_stats", "Domain-0")
        self.assertEqual(plugin.vnc_port("no-such-VM"), "0")

    def test_the_hosts_statistics_are_numbers_that_its_other_answers_agree_with(self):
        plugin = apache.Plugin(self.c)
        before = plugin.host_stats("xenbr0")
        self.assertTrue(0 < before["cpu"] < 100, before)
        self.assertTrue(0 < before["free"] < before["total"])
        self.assertEqual(before["total"], float(apache.Linux(self.c).get("TotalPages")) * 4096)
        self.start("i-9-1-VM")
        now = plugin.host_stats("xenbr0")
        self.assertEqual(before["free"] - now["free"], 512 * 2**20)
        wait_for("traffic", lambda: plugin.host_stats("xenbr0")["rx"] > before["rx"])
        self.stop("i-9-1-VM")
        self.assertFault("xenbr0", self.c.call, "ovs_dom0_stats", "no-such-bridge")

    def test_ids_go_with_and_without_dashes(self):
        vm = self.start("i-7-8-VM")
        plain = vm.params["uuid"].replace("-", "")
        for repo in (REPO, POOL, POOL.upper()):
            self.assertEqual(self.c.call("list_vm", repo, plain)["uuid"], vm.params["uuid"])
            self.assertEqual(self.c.call("get_vm_config", repo, plain)["uuid"], vm.params["uuid"])
        self.assertFault("VM_NOT_FOUND", self.c.call, "get_vm_config", "00" * 16, plain)
        self.stop("i-7-8-VM")


class Documents(DaemonCase):
    """OvmObject.xmlToMap flattens, and of equal names the last wins."""

    settings = "[wire]\nplain_http = true\n"

    def setUp(self):
        connection = apache.Connection(self.daemon.port, self.daemon.password)
        self.addCleanup(connection.close)
        self.linux = apache.Linux(connection)

    def test_no_map_that_the_client_makes_has_two_values_for_one_name(self):
        places = [(self.linux.server, "./Server"), (self.linux.server, "./Server/VMM"),
            (self.linux.server, "./Server/VMM/Version"), (self.linux.server, "./Server/NTP"),
            (self.linux.server, "./Server/Date_Time"), (self.linux.server, "./Server/Capabilities"),
            (self.linux.hardware, "./NodeInformation/VMM/PhysicalInfo"),
            (self.linux.hardware, "./NodeInformation/DMTF/System")]  # fmt: skip
        for document, path in places:
            nodes = document.findall(path)
            self.assertEqual(len(nodes), 1, path)
            names = [child.tag for child in nodes[0]]
            self.assertEqual(len(names), len(set(names)), path)
            self.assertTrue(apache.xml_to_map(path, document), path)

    def test_no_map_hides_what_the_client_reads_from_a_later_one(self):
        seen = {}
        for number, flat in enumerate(self.linux.maps):
            for name, text in flat.items():
                if name in seen and name in ("Major", "Minor", "Extra", "CPUKHz", "SocketsPerNode", "ThreadsPerCore",
                                             "CoresPerSocket", "TotalPages", "FreePages", "Capabilities"):  # fmt: skip
                    self.assertEqual(text, seen[name], name)
                seen.setdefault(name, text)
        self.assertTrue(self.linux.get("Capabilities").startswith("xen-"))

    def test_documents_are_in_one_line_so_that_no_child_is_white_space(self):
        for document in (self.linux.server, self.linux.hardware):
            for element in document.iter():
                if len(element):
                    self.assertFalse((element.text or "").strip(), element.tag)
        self.assertEqual(self.linux.maps[0]["Statistic"], ET.tostring(
            self.linux.server.find("Server/Statistic/Interval"), "unicode", "text"))  # fmt: skip


class Release33(DaemonCase):
    settings = 'dialect = "3.3"\n[wire]\nplain_http = true\n'

    def test_the_host_calls_itself_3_3_and_is_taken_by_the_struct(self):
        c = apache.Connection(self.daemon.port, self.daemon.password)
        self.addCleanup(c.close)
        self.assertTrue(apache.Linux(c).get("OVM_Version").startswith("3.3."))
        c.call("take_ownership", {"manager_uuid": MANAGER, "manager_event_url": "https://127.0.0.1:7002/e",
            "manager_statistic_url": "https://127.0.0.1:7002/s", "manager_certificate": "",
            "signed_server_certificate": ""})  # fmt: skip
        self.assertEqual(apache.Linux(c).get("Manager_Unique_Id"), MANAGER)
        self.assertEqual(apache.Linux(c).get("Membership_State"), "Owned")
        fault = self.assertFault("VM_NOT_FOUND", c.call, "start_vm", REPO, "0b" * 16)
        self.assertTrue(fault.faultString.startswith("<type 'exceptions.Exception'>:"))
        self.assertEqual(fault.faultCode, 1)
        self.assertTrue(self.assertFault("fly", c.call, "fly").faultString.startswith("<type 'exceptions.Exception'>:"))
