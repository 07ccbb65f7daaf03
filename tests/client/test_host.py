"""The verbs on the host itself."""

import datetime
import xmlrpc.client

import shapes
from harness import REPO, DaemonCase, new_vm, wait_for

DOCUMENTED_LOGS = ["ovs-agent", "messages", "xend", "dmesg"]


class TheHost(DaemonCase):
    def test_the_clock_is_read_and_set_as_six_numbers(self):
        before = self.proxy.get_datetime()
        self.assertEqual([type(part) for part in before], [int] * 6)
        self.assertIsNone(self.proxy.set_datetime(2031, 2, 3, 4, 5, 6))
        now = datetime.datetime(*self.proxy.get_datetime())
        self.assertLess(abs(now - datetime.datetime(2031, 2, 3, 4, 5, 6)), datetime.timedelta(minutes=2))
        self.assertFault("month", self.proxy.set_datetime, 2031, 13, 3, 4, 5, 6)
        self.assertIsNone(self.proxy.set_datetime(*before))

    def test_the_time_zone_decides_what_the_clock_shows(self):
        self.assertIsNone(self.proxy.set_timezone("UTC", True))
        self.assertEqual(self.proxy.get_timezone(), ["UTC", True])
        utc = datetime.datetime(*self.proxy.get_datetime())
        self.assertIsNone(self.proxy.set_timezone("Asia/Tokyo", False))
        self.assertEqual(self.proxy.get_timezone(), ["Asia/Tokyo", False])
        self.assertEqual(self.element("Date_Time/Time_Zone"), "Asia/Tokyo")
        self.assertEqual(self.element("Date_Time/UTC"), "False")
        ahead = datetime.datetime(*self.proxy.get_datetime()) - utc
        self.assertLess(abs(ahead - datetime.timedelta(hours=9)), datetime.timedelta(minutes=2))
        self.assertFault("Mars", self.proxy.set_timezone, "Mars/Base", True)

    def test_ntp_is_set_by_two_or_three_parameters_switched_and_read(self):
        self.assertIsNone(self.proxy.set_ntp(["ntp.example.org"], False, True))
        self.assertIsNone(self.proxy.set_ntp(["192.0.2.1", "192.0.2.2"], True))
        self.assertEqual(self.proxy.get_ntp()[:2], [["192.0.2.1", "192.0.2.2"], True])
        self.assertIsNone(self.proxy.enable_ntp())
        self.assertIs(self.proxy.get_ntp()[2], True)
        self.assertEqual(self.element("NTP/Is_NTP_Running"), "True")
        self.assertIsNone(self.proxy.disable_ntp())
        self.assertIs(self.proxy.get_ntp()[2], False)
        self.assertEqual(self.element("NTP/Is_NTP_Running"), "False")
        self.assertFault("NTP server", self.proxy.set_ntp, ["; reboot"], True)

    def test_roles_are_those_of_the_dialect(self):
        self.assertIsNone(self.proxy.update_server_roles("utility"))
        self.assertEqual(self.element("Server_Roles"), "utility")
        self.assertIsNone(self.proxy.update_server_roles("xen,utility"))
        self.assertEqual(self.element("Server_Roles"), "xen,utility")
        self.assertFault("cook", self.proxy.update_server_roles, "xen,cook")

    def test_logs_come_by_name_and_others_do_not(self):
        logs = self.proxy.get_log(DOCUMENTED_LOGS)
        self.assertEqual(sorted(logs), sorted(DOCUMENTED_LOGS))
        self.assertTrue(all(isinstance(text, str) for text in logs.values()))
        self.assertFault("shadow", self.proxy.get_log, ["../../etc/shadow"])

    def test_support_files_are_texts_without_secrets(self):
        vm, params = new_vm("secretive")
        params["vfb"] = ["type=vnc,vnclisten=0.0.0.0,vncpasswd=SoSecret42"]
        self.proxy.create_vm(REPO, vm, params)
        self.proxy.start_vm(REPO, vm)
        files = self.proxy.get_support_files()
        self.assertGreater(len(files), 3)
        for name, text in files.items():
            self.assertIsInstance(text, str, name)
            for secret in (self.daemon.password, "SoSecret42"):
                self.assertNotIn(secret, text, name)
        for secret in (self.daemon.password, "SoSecret42"):
            self.assertNotIn(secret, str(self.proxy.job_list()))
            self.assertNotIn(secret, str(self.proxy.event_list()))

    def test_disk_space_is_told_by_mount_point(self):
        space = self.proxy.get_system_disk_space()
        self.assertIn("/", space)
        for filesystem in space.values():
            self.assertGreaterEqual(int(filesystem["size"]), int(filesystem["free"]))

    def test_the_time_of_boot_is_two_i8s_that_agree_with_discover_server(self):
        raw = self.daemon.raw("get_last_boot_time")
        self.assertEqual(raw.count(b"<i8>"), 2, raw)
        times = self.proxy.get_last_boot_time()
        self.assertLessEqual(times["last_boot_time"], times["local_time"])
        self.assertEqual(self.element("Boot_Time"), str(times["last_boot_time"]))

    def test_what_every_client_calls_first(self):
        self.assertEqual(self.proxy.get_api_version(), [3])
        self.assertEqual(self.proxy.echo("ping"), "ping")
        self.assertEqual(self.proxy.echo({"a": [1, "x", None, True]}), {"a": [1, "x", None, True]})
        self.assertIsNone(self.proxy.sleep(0))

    def test_our_own_view_of_the_host(self):
        host = self.proxy.host_get()
        self.assertEqual(host["worlds"], {"toolstack": "sim", "kernel": "sim", "host": "sim"})
        self.assertEqual(host["unique_id"], self.element("Unique_Id"))
        self.assertEqual(host["agent"]["store"], "good")
        self.assertEqual(self.proxy.store_check()["problems"], [])

    def test_a_renewed_certificate_is_served_to_new_connections_and_trusted_by_the_same_ca(self):
        before = self.proxy.certificate_get()
        self.assertIsNone(self.proxy.certificate_renew())
        after = self.daemon.proxy().certificate_get()
        self.assertNotEqual(after["fingerprint"], before["fingerprint"])
        self.assertEqual(after["ca_pem"], before["ca_pem"])


class ThePassword(DaemonCase):
    def test_a_changed_password_holds_at_once_and_the_old_one_is_403_even_on_an_open_connection(self):
        open_one = self.daemon.proxy()
        open_one.echo(1)
        self.assertFault("root", self.proxy.update_agent_password, "root", "x")
        self.assertIsNone(self.proxy.update_agent_password("oracle", "second Password: é"))
        for proxy in (open_one, self.daemon.proxy()):
            with self.assertRaises(xmlrpc.client.ProtocolError) as raised:
                proxy.echo(1)
            self.assertEqual(raised.exception.errcode, 403)
        connection = self.daemon.connection()
        body = xmlrpc.client.dumps((), "get_api_version")
        connection.request("POST", "/RPC2", body, {"Authorization": self.daemon.basic("second Password: é")})
        self.assertEqual(connection.getresponse().read().count(b"<int>3</int>"), 1)
        connection.close()
        # 3.3's third parameter, and back again.
        self.daemon.password = "third"
        again = self.daemon.ctl("call", "update_agent_password", "oracle", "third", "second Password: é")
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual(self.daemon.proxy().get_api_version(), [3])

    def test_no_credentials_wrong_ones_and_another_user_are_403(self):
        body = xmlrpc.client.dumps((), "get_api_version")
        for authorization in (None, "Basic b3JhY2xlOndyb25n", "Basic cm9vdDpyb290", "Bearer x"):
            connection = self.daemon.connection()
            connection.request("POST", "/RPC2", body, {"Authorization": authorization} if authorization else {})
            self.assertEqual(connection.getresponse().status, 403, authorization)
            connection.close()
        self.assertIn("Unauthorized access attempt", self.daemon.log.read_text())


class Guessing(DaemonCase):
    def test_a_manager_that_is_known_is_served_while_somebody_guesses_passwords_beside_it(self):
        self.proxy.echo("known")
        body = xmlrpc.client.dumps((), "get_api_version")
        for number in range(25):
            connection = self.daemon.connection()
            connection.request("POST", "/RPC2", body, {"Authorization": self.daemon.basic(f"guess{number}")})
            self.assertEqual(connection.getresponse().status, 403)
            connection.close()
        self.assertEqual(self.proxy.get_api_version(), [3])
        self.assertEqual(self.daemon.proxy().get_api_version(), [3], "also on a new connection")


class TheHostGoesDown(DaemonCase):
    def test_a_reboot_stops_every_vm_and_the_host_is_up_again_since_later(self):
        vms = []
        for number in range(3):
            vm, params = new_vm(f"down-{number}")
            self.proxy.create_vm(REPO, vm, params)
            self.proxy.start_vm(REPO, vm)
            vms.append(vm)
        self.proxy.pause_vm(REPO, vms[2])
        # Seconds are the unit, so the world must be older than that for a later boot to show.
        up = lambda: (t := self.proxy.get_last_boot_time())["local_time"] - t["last_boot_time"]  # noqa: E731
        wait_for("the host to be up for seconds", lambda: up() >= 2)
        before = self.proxy.get_last_boot_time()["last_boot_time"]
        boot_id = self.proxy.host_get()["boot_id"]
        self.assertIsNone(self.proxy.sys_reboot())
        wait_for("the new boot", lambda: self.proxy.host_get()["boot_id"] != boot_id)
        self.assertGreater(self.proxy.get_last_boot_time()["last_boot_time"], before)
        self.assertEqual([vm["name"] for vm in self.proxy.list_vms()], ["Domain-0"])
        self.assertEqual([self.state(vm) for vm in vms], ["off"] * 3)
        self.proxy.start_vm(REPO, vms[0])
        self.assertIsNotNone(self.running("down-0"))
        self.assertEqual(shapes.kind(shapes.answer(self.daemon.raw("sys_reboot"))), "nil")
