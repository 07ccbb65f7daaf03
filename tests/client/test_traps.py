"""What clients of the original agent stumble over if it differs: the wire's forms and the answers' small print."""

import socket
import threading
import xmlrpc.client

import apache
import shapes
from harness import DISKS, MANAGER, REPO, Curl, Daemon, DaemonCase, mac, new_vm, request, wait_for

EX = apache.EX


def call(name, *values):
    """A call whose values are written out by the test."""
    params = "".join(f"<param>{value}</param>" for value in values)
    return f"<?xml version='1.0'?><methodCall><methodName>{name}</methodName><params>{params}</params></methodCall>"


class Values(DaemonCase):
    def echo(self, value):
        return shapes.answer(self.daemon.post(call("echo", value)))

    def test_void_success_is_a_plain_nil_without_prefix_or_name_space(self):
        raw = self.daemon.raw("set_ntp", ["192.0.2.1"], True)
        self.assertIn(b"<value><nil/></value>", raw)
        self.assertNotIn(b"ex:", raw)
        self.assertNotIn(b"xmlns", raw)
        self.assertTrue(raw.startswith(b"<?xml version='1.0'"), raw[:40])

    def test_numbers_come_as_int_i4_or_i8_and_go_as_int_or_i8(self):
        for number in (0, 2**31 - 1, -(2**31)):
            for sent in ("int", "i4"):
                answer = self.echo(f"<value><{sent}>{number}</{sent}></value>")
                self.assertEqual((shapes.kind(answer), answer[0].text), ("int", str(number)))
        for number in (0, 2**31, 2**63 - 1, -(2**63)):
            for sent in ("<i8>", f"<ex:i8 xmlns:ex='{EX}'>", "<ex:i8>"):
                answer = self.echo(f"<value>{sent}{number}</{sent[1:].split()[0].rstrip('>')}></value>")
                self.assertEqual((shapes.kind(answer), answer[0].text), ("i8", str(number)))
        self.assertIn("no 32-bit integer", self.echo_fault(f"<value><int>{2**31}</int></value>"))

    def echo_fault(self, value):
        fault = shapes.fault(self.daemon.post(call("echo", value)))
        return "".join(fault.itertext()) if fault is not None else "no fault"

    def test_nil_comes_with_and_without_a_prefix(self):
        for nil in ("<nil/>", "<nil></nil>", "<ex:nil/>", f"<ex:nil xmlns:ex='{EX}'/>", " <nil/>\n"):
            self.assertEqual(shapes.kind(self.echo(f"<value>{nil}</value>")), "nil", nil)

    def test_untyped_text_is_a_string_with_all_its_white_space(self):
        for text in ("", "a", " a b ", "two\nlines", "i-2-3-VM", "&lt;x&gt; &amp; é"):
            answer = self.echo(f"<value>{text}</value>")
            want = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
            self.assertEqual((shapes.kind(answer), "".join(answer.itertext())), ("string", want))

    def test_white_space_between_elements_means_nothing(self):
        tidy = {"a": [1, "x", {"b": True}], "c": "", "d": []}
        raw = self.daemon.post(request("echo", [tidy]))
        self.assertEqual(xmlrpc.client.loads(raw)[0][0], tidy)

    def test_booleans_are_booleans(self):
        for sent, want in (("1", "1"), ("0", "0")):
            answer = self.echo(f"<value><boolean>{sent}</boolean></value>")
            self.assertEqual((shapes.kind(answer), answer[0].text), ("boolean", want))

    def test_a_nil_for_an_optional_parameter_is_as_if_it_were_not_there(self):
        vm, params = new_vm("optional")
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        self.assertIsNone(self.proxy.stop_vm(REPO, vm, None))
        self.assertIsNone(self.proxy.delete_vm(REPO, vm))

    def test_apaches_extensions_are_taken_from_apaches_client(self):
        c = apache.Connection(self.daemon.port, self.daemon.password, context=self.daemon.tls())
        self.addCleanup(c.close)
        self.assertEqual(c.call("echo", [None, 2**40, 1, "x", True], extensions=True), [None, 2**40, 1, "x", True])


class Http(DaemonCase):
    def test_every_path_of_the_dialect_serves_the_same_and_no_other_does(self):
        for path in ("/", "/RPC2", "/api/3", "/api/3/"):
            self.assertEqual(self.daemon.proxy(path).get_api_version(), [3], path)
        for path in ("/api/2", "/RPC2/", "/etc/passwd"):
            with self.assertRaises(xmlrpc.client.ProtocolError) as raised:
                self.daemon.proxy(path).get_api_version()
            self.assertEqual(raised.exception.errcode, 404, path)

    def test_a_connection_is_kept_alive_for_many_calls_of_apaches_client(self):
        c = apache.Connection(self.daemon.port, self.daemon.password, context=self.daemon.tls())
        self.addCleanup(c.close)
        c.call("echo", "first")
        kept = c.http.sock
        for number in range(20):
            self.assertEqual(c.call("echo", number), number)
            # A fault closes nothing.
            self.assertFault("UNKNOWN_VERB", c.call, "fly")
        self.assertIs(c.http.sock, kept)

    def test_a_body_that_curl_announces_first_is_taken(self):
        text = "x" * 1_500_000
        self.assertEqual(Curl(self.daemon).call("echo", text), text)

    def test_plain_http_is_not_spoken_unless_the_settings_say_so(self):
        with socket.create_connection(("127.0.0.1", self.daemon.port), timeout=30) as plain:
            plain.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            try:
                answer = plain.recv(100)
            except ConnectionResetError:
                answer = b""
        self.assertNotIn(b"HTTP/1.1 200", answer)
        self.assertEqual(self.element("Plain_Http"), "False")


class PlainHttp(DaemonCase):
    settings = "[wire]\nplain_http = true\n"

    def test_a_post_to_no_path_is_answered_beside_tls_on_the_same_port(self):
        c = apache.Connection(self.daemon.port, self.daemon.password)
        self.addCleanup(c.close)
        self.assertEqual(c.call("get_api_version"), [3])
        self.assertEqual(self.proxy.get_api_version(), [3])
        self.assertEqual(self.element("Plain_Http"), "True")
        with xmlrpc.client.ServerProxy(f"http://oracle:{self.daemon.password}@127.0.0.1:{self.daemon.port}") as plain:
            self.assertEqual(plain.echo("x"), "x")

    def test_a_wrong_password_is_403_there_too(self):
        c = apache.Connection(self.daemon.port, "wrong")
        self.addCleanup(c.close)
        with self.assertRaises(xmlrpc.client.ProtocolError) as raised:
            c.call("echo", "x")
        self.assertEqual(raised.exception.errcode, 403)

    def test_a_request_written_by_hand_is_answered(self):
        body = apache.call_body("echo", ["by hand"])
        head = f"POST / HTTP/1.1\r\nHost: h:8899\r\nUser-Agent: Apache XML RPC 3.1.3\r\nContent-Type: text/xml\r\n" \
               f"Authorization: {self.daemon.basic()}\r\nContent-Length: {len(body)}\r\n\r\n"  # fmt: skip
        with socket.create_connection(("127.0.0.1", self.daemon.port), timeout=30) as plain:
            for _ in range(3):
                plain.sendall(head.encode() + body)
                answer = b""
                while b"</methodResponse>" not in answer:
                    piece = plain.recv(4096)
                    self.assertTrue(piece, answer)
                    answer += piece
                self.assertTrue(answer.startswith(b"HTTP/1.1 200 OK\r\n"))
                self.assertIn(b"by hand", answer)


class Ownership(DaemonCase):
    def shown(self):
        return tuple(self.element(name) for name in ("Membership_State", "Manager_Unique_Id", "Server_Roles"))

    def test_discover_server_shows_every_turn_of_ownership_as_clients_compare_it(self):
        self.assertEqual(self.shown(), ("Unowned", "none", "xen,utility"))
        self.assertEqual(self.element("Pool_Unique_Id"), "none")
        self.proxy.take_ownership(MANAGER, "")
        self.assertEqual(self.shown(), ("Owned", MANAGER, "xen,utility"))
        self.proxy.take_ownership(MANAGER, "http://127.0.0.1:7002/ovm")
        self.assertFault("ALREADY_OWNED", self.proxy.take_ownership, "01" * 16, "")
        self.assertFault("NOT_OWNER", self.proxy.release_ownership, "01" * 16)
        self.assertEqual(self.shown()[1], MANAGER)
        self.proxy.update_server_roles("xen")
        self.assertEqual(self.shown(), ("Owned", MANAGER, "xen"))
        self.proxy.update_server_roles("utility,xen")
        self.proxy.release_ownership(MANAGER)
        self.assertEqual(self.shown(), ("Unowned", "none", "xen,utility"))
        self.assertFault("NOT_OWNED", self.proxy.release_ownership, MANAGER)

    def test_the_release_is_3_2_and_faults_are_python_2_4s(self):
        self.assertTrue(self.element("OVM_Version").startswith("3.2."))
        for verb, params in (("start_vm", (REPO, "0b" * 16)), ("update_server_roles", ("cook",)), ("fly", ())):
            fault = self.assertFault("", getattr(self.proxy, verb), *params)
            self.assertEqual(fault.faultCode, 1)
            self.assertTrue(fault.faultString.startswith("exceptions.Exception:"), fault.faultString)


class Machines(DaemonCase):
    def create(self, name, kind="pv", **more):
        vm, params = new_vm(name, kind, **more)
        self.assertIsNone(self.proxy.create_vm(REPO, vm, params))
        self.addCleanup(self.proxy.delete_vm, REPO, vm)
        return vm, params

    def test_list_vms_has_what_the_client_reads_without_a_look(self):
        vm, _ = self.create("read-me")
        self.proxy.start_vm(REPO, vm)
        dom0, shown = self.proxy.list_vms()
        self.assertEqual((dom0["name"], dom0["domid"]), ("Domain-0", "0"))
        self.assertEqual(dom0["uuid"], "00000000-0000-0000-0000-000000000000")
        self.assertEqual((shown["name"], shown["uuid"], shown["memory"]), ("read-me", vm, "512"))
        self.assertEqual(len(shown["state"]), 6)
        self.assertEqual(shown["device"]["vbd"][0]["uname"].split("/")[3], REPO)
        self.assertRegex(shown["device"]["vfb"][0]["location"], r"^0\.0\.0\.0:59\d\d$")
        self.assertRegex(shown["cpu_time"], r"^\d+\.\d+$")
        self.proxy.stop_vm(REPO, vm, True)
        self.assertEqual([one["name"] for one in self.proxy.list_vms()], ["Domain-0"])
        self.assertIsNone(self.proxy.list_vm(REPO, vm))
        self.assertIsNone(self.proxy.list_vm(REPO, "0b" * 16))

    def test_memory_may_be_a_string_maxvcpus_zero_and_the_type_default(self):
        vm, _ = self.create("strings", memory="768", maxvcpus=0, vcpus="3", OVM_domain_type="default")
        config = self.proxy.get_vm_config(REPO, vm)
        self.assertEqual([config[key] for key in ("memory", "vcpus", "maxvcpus")], [768, 3, 3])
        self.assertEqual(config["OVM_domain_type"], "default")

    def test_disks_have_short_letters_cdroms_and_shared_modes(self):
        disks = [f"file:{DISKS}/a.raw,c,w", f"file:{DISKS}/b.raw,d,w!",
                 f"file:/OVS/Repositories/{REPO}/ISOs/x.iso,e:cdrom,r", f"file:{DISKS}/f.raw,f,r!"]  # fmt: skip
        vm, _ = self.create("letters", "hvm", disk=disks)
        self.assertEqual(self.proxy.get_vm_config(REPO, vm)["disk"], [
            f"file:{DISKS}/a.raw,hdc,w", f"file:{DISKS}/b.raw,hdd,w!",
            f"file:/OVS/Repositories/{REPO}/ISOs/x.iso,xvde:cdrom,r", f"file:{DISKS}/f.raw,xvdf,r"])  # fmt: skip

    def test_configure_vm_merges_one_list_at_a_time(self):
        vm, params = self.create("merge")
        for key, value in [("disk", [f"file:{DISKS}/z.raw,xvda,w"]), ("vif", [f"mac={mac()},bridge=xenbr0.7"]),
                           ("vfb", ["type=vnc,vncunused=1,vnclisten=127.0.0.1,keymap=de"]), ("memory", "1024"),
                           ("OVM_description", "moved <here>")]:  # fmt: skip
            before = self.proxy.get_vm_config(REPO, vm)
            self.assertIsNone(self.proxy.configure_vm(REPO, vm, {key: value}))
            after = self.proxy.get_vm_config(REPO, vm)
            changed = {name for name in after if after[name] != before.get(name)}
            self.assertEqual(changed, {key, "maxmem"} if key == "memory" else {key})
        self.assertIsNone(self.proxy.configure_vm(REPO, vm, {}))

    def test_a_vnc_line_is_taken_in_any_order_of_its_parts(self):
        vfb = "keymap=en-us, vncpasswd=7693f834ca67912e,type=vnc,vnclisten=0.0.0.0,vncunused=1,vncused=1"
        vm, _ = self.create("vnc", vfb=[vfb])
        (line,) = self.proxy.get_vm_config(REPO, vm)["vfb"]
        self.assertLessEqual({"type=vnc", "vnclisten=0.0.0.0", "keymap=en-us"}, set(line.split(",")))
        self.assertIn("vncpasswd=7693f834ca67912e", line)

    def test_keys_of_the_managers_own_are_kept_and_unknown_ones_are_refused_by_name(self):
        vm, params = self.create("own-keys", OVM_os_type="Oracle Linux 6", OVM_network_config=["a", "b"], OVM_n=5)
        config = self.proxy.get_vm_config(REPO, vm)
        self.assertEqual((config["OVM_os_type"], config["OVM_network_config"], config["OVM_n"]),
                         ("Oracle Linux 6", ["a", "b"], 5))  # fmt: skip
        self.assertFault("device_model_args", self.proxy.configure_vm, REPO, vm, {"device_model_args": ["-monitor"]})

    def test_a_disk_outside_the_repositories_is_refused(self):
        for path in ("/etc/shadow", "/OVS/Repositories/../../etc/shadow", f"{DISKS}/../../../../../etc/shadow"):
            vm, params = new_vm("outside", disk=[f"file:{path},xvda,w"])
            self.assertFault("disk", self.proxy.create_vm, REPO, vm, params)

    def test_a_configuration_goes_back_as_it_came_whatever_is_in_it(self):
        rich = {"cpus": "0-1", "tsc_mode": "native", "localtime": 1, "OVM_high_availability": True, "maxmem": 2048,
                "vfb": ["type=vnc,vnclisten=127.0.0.1,vncdisplay=77,keymap=de"], "on_crash": "coredump-restart"}  # fmt: skip
        for kind in ("pv", "hvm", "kernel", "pvh"):
            with self.subTest(kind):
                vif = f"mac={mac()},bridge=xenbr0" + (",type=ioemu,model=e1000" if kind == "hvm" else "")
                vm, _ = self.create(f"rich-{kind}", kind, **rich, vif=[vif])
                config = self.proxy.get_vm_config(REPO, vm)
                everything = self.proxy.vm_get(vm)["config"]
                for key in ("cpus", "tsc_mode", "on_crash", "maxmem"):
                    self.assertEqual(config[key], rich[key], key)
                self.assertTrue(config["localtime"])
                self.assertIs(config["OVM_high_availability"], True)
                self.assertIsNone(self.proxy.set_vm_config(REPO, vm, config))
                self.assertEqual(self.proxy.get_vm_config(REPO, vm), config)
                self.assertIsNone(self.proxy.configure_vm(REPO, vm, config))
                self.assertEqual(self.proxy.get_vm_config(REPO, vm), config)
                self.assertEqual(self.proxy.vm_get(vm)["config"], everything)

    def test_an_hvm_vm_as_oracles_own_manager_writes_it(self):
        disks = [f"file:{DISKS}/0004fb00.img,xvda,w", f"file:/OVS/Repositories/{REPO}/ISOs/0004fb01.iso,xvdb:cdrom,r"]
        addresses = [mac(), mac()]
        vifs = [f"type=ioemu,mac={addresses[0]},bridge=10238073c2,model=e1000", f"mac={addresses[1]}, bridge=xenbr0"]
        vm = "0004fb0000060000cfe2da48f9e2120e"
        params = {
            "vif": vifs, "OVM_simple_name": "ESXi-01", "vnclisten": "127.0.0.1", "serial": "pty", "disk": disks,
            "vncunused": 1, "uuid": "0004fb00-0006-0000-cfe2-da48f9e2120e", "on_reboot": "restart", "boot": "dc",
            "cpu_weight": 27500, "memory": 4096, "cpu_cap": 0, "maxvcpus": 2, "OVM_high_availability": False, "vnc": 1,
            "OVM_description": "", "on_poweroff": "destroy", "on_crash": "restart", "guest_os_type": "linux",
            "name": vm, "builder": "hvm", "vcpus": 2, "keymap": "pt-br", "OVM_os_type": "Other Linux", "acpi": 1,
            "OVM_cpu_compat_group": "", "OVM_domain_type": "xen_hvm", "kernel": "hvmloader", "timer_mode": 2,
            "device_model": "/usr/lib/xen/bin/qemu-dm", "disk_other_config": [], "vif_other_config": [],
        }  # fmt: skip
        self.assertIsNone(self.proxy.create_vm(REPO, vm, params))
        self.addCleanup(self.proxy.delete_vm, REPO, vm)
        self.proxy.start_vm(REPO, vm)
        shown = self.running(vm)
        self.assertEqual([vif["mac"] for vif in shown["device"]["vif"]], addresses)
        self.assertEqual([vbd["dev"] for vbd in shown["device"]["vbd"]], ["xvda:disk", "xvdb:cdrom"])
        self.assertEqual(shown["device"]["vfb"][0]["keymap"], "pt-br")
        config = self.proxy.get_vm_config(REPO, vm)
        for key in params.keys() - {"vif", "uuid", "vnc", "vncunused", "vnclisten", "keymap", "acpi", "kernel"}:
            self.assertEqual(config[key], params[key], key)
        limits = [[disks[0], "xvda", {"priority": "7"}]]
        self.assertFault("disk_other_config", self.proxy.configure_vm, REPO, vm, {"disk_other_config": limits})
        self.proxy.stop_vm(REPO, vm, True)

    def test_high_availability_is_switched_by_configure_vm_too(self):
        vm, _ = self.create("ha")
        for wanted in (True, False):
            self.proxy.configure_vm(REPO, vm, {"OVM_high_availability": wanted})
            self.assertIs(self.proxy.get_vm_config(REPO, vm)["OVM_high_availability"], wanted)
            self.assertIs(self.proxy.vm_get(vm)["ha"], wanted)

    def test_changes_at_the_same_time_do_not_undo_each_other(self):
        vm, params = self.create("crowd")
        self.proxy.start_vm(REPO, vm)
        self.addCleanup(self.proxy.stop_vm, REPO, vm, True)
        changes = [{"disk": params["disk"] + [f"file:{DISKS}/crowd.raw,xvdb,w"]}, {"memory": 384},
                   {"vif": params["vif"] + [f"mac={mac()},bridge=xenbr0"]}, {"OVM_a": "1"}, {"cpu_cap": 50}]  # fmt: skip
        proxies, told = [self.daemon.proxy() for _ in changes], []

        def change(proxy, what):
            try:
                proxy.configure_vm(REPO, vm, what)
            except xmlrpc.client.Fault as fault:
                told.append((what, fault.faultString))

        threads = [threading.Thread(target=change, args=pair) for pair in zip(proxies, changes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(told, [])
        config = self.proxy.get_vm_config(REPO, vm)
        for what in changes:
            ((key, value),) = what.items()
            self.assertEqual(config.get(key), value)
        devices = self.running("crowd")["device"]
        self.assertEqual((len(devices["vbd"]), len(devices["vif"])), (2, 2))

    def test_a_submitted_change_that_was_overtaken_says_so_and_does_nothing(self):
        vm, _ = self.create("overtaken")
        jobs = [self.proxy.job_submit("configure_vm", [REPO, vm, {"OVM_n": n}]) for n in range(40)]
        ends = [self.proxy.job_wait(job, 30) for job in jobs]
        for job in ends:
            self.assertTrue(job["state"] == "succeeded" or job["fault"]["name"] == "CONFLICT", job)
        last = max(n for n, job in enumerate(ends) if job["state"] == "succeeded")
        self.assertEqual(self.proxy.get_vm_config(REPO, vm)["OVM_n"], last)

    def test_a_vm_that_went_off_by_itself_is_created_and_started_again(self):
        """CloudStack deletes a VM only when it stops it: one whose guest powered off it creates once more."""
        vm, params = self.create("again")
        self.proxy.start_vm(REPO, vm)
        self.assertFault("VM_EXISTS", self.proxy.create_vm, REPO, vm, params)
        self.proxy.trigger_vm(REPO, vm, "power", 0)
        wait_for("the guest to end", lambda: self.running("again") is None and self.state(vm) == "off")
        self.assertIsNone(self.proxy.create_vm(REPO, vm, params | {"memory": "640"}))
        self.assertEqual(self.proxy.get_vm_config(REPO, vm)["memory"], 640)
        self.assertIsNone(self.proxy.start_vm(REPO, vm))
        self.proxy.save_vm(REPO, vm, False)
        self.assertFault("VM_EXISTS", self.proxy.create_vm, REPO, vm, params)
        self.proxy.restore_vm(REPO, vm, False)
        self.proxy.stop_vm(REPO, vm, True)
        other, more = new_vm("again")
        self.assertFault("VM_EXISTS", self.proxy.create_vm, REPO, other, more)
        self.assertFault("VM_EXISTS", self.proxy.create_vm, REPO, vm, params | {"name": "another-name"})
        self.assertFault("VM_EXISTS", self.proxy.create_vm, "0c" * 16, vm, params)


class Restart(DaemonCase):
    def test_vms_ownership_and_password_outlive_the_daemon(self):
        vm, params = new_vm("survivor")
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        self.proxy.take_ownership(MANAGER, "")
        domid = self.running("survivor")["domid"]
        daemon: Daemon = self.daemon
        daemon.process.kill()
        daemon.process.wait()
        daemon.log.write_text("")
        daemon.start()
        proxy = daemon.proxy()
        self.assertEqual(self.running("survivor", proxy)["domid"], domid)
        self.assertEqual(self.element("Manager_Unique_Id", proxy), MANAGER)
