"""Who may act once a manager owns the host: the owner's certificate, the password, the operator on the host."""

import http.client
import pathlib
import shutil
import ssl
import tempfile
import threading
import xmlrpc.client

from harness import MANAGER, PATIENCE_S, REPO, DaemonCase, new_vm, run


class Keys:
    """Certificates made by openssl in a folder: two managers' CAs, and what they issued."""

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dom0d-keys-"))
        self.authority("ours")
        self.authority("theirs")
        self.issue("agent", "ours")
        self.issue("second", "ours")
        self.issue("stranger", "theirs")
        self.openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "alone.key", "-out", "alone.pem", "-days",
            "2", "-subj", "/CN=alone", "-addext", "basicConstraints=critical,CA:FALSE")  # fmt: skip

    def openssl(self, *arguments):
        done = run("openssl", *arguments, cwd=self.folder)
        assert done.returncode == 0, done.stderr

    KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

    def authority(self, name):
        self.openssl("req", "-x509", *self.KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2",
            "-subj", f"/CN=manager {name}", "-addext", "basicConstraints=critical,CA:TRUE",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip

    def issue(self, name, authority):
        self.openssl("req", *self.KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (self.folder / "extensions").write_text(
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=clientAuth\n"
        )
        self.openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "extensions")  # fmt: skip

    def pair(self, name):
        return str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")

    def pem(self, name):
        return (self.folder / f"{name}.pem").read_text()


class OwnershipCase(DaemonCase):
    @classmethod
    def setUpClass(cls):
        cls.keys = Keys()
        cls.addClassCleanup(shutil.rmtree, cls.keys.folder)
        super().setUpClass()

    def tearDown(self):
        self.daemon.ctl("ownership", "release")

    def take(self, certificate, manager=MANAGER):
        struct = {"manager_uuid": manager, "manager_event_url": "https://127.0.0.1:7002/event",
            "manager_statistic_url": "https://127.0.0.1:7002/statistic",
            "manager_certificate": self.keys.pem(certificate) if certificate else "",
            "signed_server_certificate": ""}  # fmt: skip
        self.assertIsNone(self.proxy.take_ownership(struct))

    def status(self, connection, password=None, method="get_api_version", params=()):
        """What a call by this connection is answered: HTTP status, or the fault's text."""
        headers = {"Content-Type": "text/xml"}
        if password:
            headers["Authorization"] = self.daemon.basic(password)
        connection.request("POST", "/RPC2", xmlrpc.client.dumps(params, method), headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status == 200:
            try:
                xmlrpc.client.loads(body)
            except xmlrpc.client.Fault as fault:
                return fault.faultString
        return answer.status

    def by(self, certificate, password=None, **more):
        connection = self.daemon.connection(self.keys.pair(certificate) if certificate else None)
        try:
            return self.status(connection, password, **more)
        except (ssl.SSLError, http.client.RemoteDisconnected, ConnectionResetError) as error:
            return f"closed: {type(error).__name__}"
        finally:
            connection.close()


class Certificates(OwnershipCase):
    def test_the_pinned_certificate_acts_without_password_and_no_other_does(self):
        self.assertEqual(self.by("agent"), 403, "before it is pinned, it is nobody's")
        self.take("agent")
        self.assertEqual(self.by("agent"), 200)
        for other in ("second", "stranger", None):
            self.assertEqual(self.by(other), 403, other)
        self.assertEqual(self.by("stranger", self.daemon.password), 200, "the password still holds")
        vm, params = new_vm("by-certificate")
        self.assertEqual(self.by("agent", method="create_vm", params=(REPO, vm, params)), 200)
        self.assertEqual(self.by("agent", method="delete_vm", params=(REPO, vm)), 200)
        jobs = self.proxy.job_list({"verb": "create_vm"})
        self.assertNotIn("oracle", jobs[0]["caller"], "the job names the certificate")

    def test_a_pinned_ca_vouches_for_what_it_issued_and_for_nothing_else(self):
        self.take("ours")
        self.assertEqual([self.by(name) for name in ("agent", "second", "stranger")], [200, 200, 403])

    def test_a_certificate_that_signed_itself_is_pinned_and_works_over_tls_1_2_and_by_curl(self):
        self.take("alone")
        self.assertEqual(self.by("alone"), 200)
        context = self.daemon.tls(self.keys.pair("alone"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        connection = http.client.HTTPSConnection("127.0.0.1", self.daemon.port, context=context, timeout=PATIENCE_S)
        self.addCleanup(connection.close)
        self.assertEqual(self.status(connection), 200)
        self.assertEqual(connection.sock.version(), "TLSv1.2")
        body = self.keys.folder / "call.xml"
        body.write_text(xmlrpc.client.dumps((), "get_api_version"))
        for name, status in (("alone", "200"), ("stranger", "403")):
            certificate, key = self.keys.pair(name)
            done = run("curl", "--silent", "--cacert", self.daemon.ca, "--cert", certificate, "--key", key, "--data-binary",
                f"@{body}", "--output", str(self.keys.folder / "answer"), "--write-out", "%{http_code}",
                f"https://127.0.0.1:{self.daemon.port}/RPC2")  # fmt: skip
            self.assertEqual((done.returncode, done.stdout), (0, status))

    def test_the_owner_changes_its_certificate_and_the_old_one_is_nothing_at_once(self):
        self.take("agent")
        open_one = self.daemon.connection(self.keys.pair("agent"))
        self.addCleanup(open_one.close)
        self.assertEqual(self.status(open_one), 200)
        self.take("second")
        self.assertEqual(self.status(open_one), 403)
        self.assertEqual([self.by("agent"), self.by("second")], [403, 200])

    def test_after_release_the_certificate_is_nothing_even_on_an_open_connection(self):
        for pinned in ("agent", "ours"):
            self.take(pinned)
            open_one = self.daemon.connection(self.keys.pair("agent"))
            self.assertEqual(self.status(open_one), 200)
            self.assertEqual(self.status(open_one), 200)
            kept = open_one.sock
            self.assertEqual(self.by("agent", method="release_ownership", params=(MANAGER,)), 200)
            self.assertIs(open_one.sock, kept)
            self.assertEqual(self.status(open_one), 403)
            open_one.close()
            self.assertEqual(self.by("agent"), 403)

    def test_a_certificate_that_is_none_or_too_weak_is_refused_and_nothing_changes(self):
        for pem in ("x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                    self.keys.pem("agent") + self.keys.pem("second")):  # fmt: skip
            take = {"manager_uuid": MANAGER, "manager_certificate": pem}
            self.assertFault("INVALID_CERTIFICATE", self.proxy.take_ownership, take)
        self.assertEqual(self.element("Membership_State"), "Unowned")

    def test_ownership_is_shown_to_the_operator(self):
        self.take("agent")
        owner = self.proxy.host_get()["ownership"]
        self.assertEqual((owner["state"], owner["manager_uuid"]), ("owned", MANAGER))
        self.assertEqual(len(owner["certificate"]), 64)

    def test_credentials_in_a_managers_url_are_kept_nowhere(self):
        self.proxy.take_ownership(MANAGER, "https://weblogic:TopSecret9@127.0.0.1:7002/ovm/core")
        told = str(self.proxy.host_get()) + str(self.proxy.job_list()) + str(self.proxy.get_support_files())
        told += str(self.proxy.event_list()) + self.daemon.log.read_text()
        self.assertNotIn("TopSecret9", told)
        self.assertIn("127.0.0.1:7002/ovm/core", told)


class NoPasswordAfterOwnership(OwnershipCase):
    settings = '[access]\npassword_after_ownership = "none"\n'

    def setUp(self):
        self.assertEqual(self.by(None, self.daemon.password), 200)

    def test_an_owner_with_a_certificate_shuts_the_password_out_but_not_the_operator(self):
        open_one = self.daemon.connection()
        self.addCleanup(open_one.close)
        self.assertEqual(self.status(open_one, self.daemon.password), 200)
        self.take("agent")
        self.assertEqual(self.status(open_one, self.daemon.password), 403, "also on an open connection")
        self.assertEqual(self.by(None, self.daemon.password), 403)
        self.assertEqual(self.by("stranger", self.daemon.password), 403)
        self.assertEqual(self.by("agent"), 200)
        shown = self.daemon.ctl("ownership", "show")
        self.assertEqual((shown.returncode, MANAGER in shown.stdout), (0, True), shown)
        self.assertEqual(self.daemon.ctl("ownership", "release").returncode, 0)
        self.assertEqual(self.by(None, self.daemon.password), 200)
        self.assertEqual(self.by("agent"), 403)

    def test_an_owner_without_a_certificate_keeps_the_password(self):
        self.proxy.take_ownership(MANAGER, "")
        self.assertEqual(self.by(None, self.daemon.password), 200)
        self.assertIsNone(self.proxy.release_ownership(MANAGER))
        self.take(None)
        self.assertEqual(self.by(None, self.daemon.password), 200)


class Rivals(OwnershipCase):
    def test_of_racing_managers_exactly_one_wins_and_the_others_are_told_who(self):
        for _ in range(5):
            managers = [f"{number:032x}" for number in range(1, 9)]
            proxies = [self.daemon.proxy() for _ in managers]
            for proxy in proxies:
                proxy.echo("connected")
            start, won, lost = threading.Barrier(len(managers)), [], []

            def take(proxy, manager):
                start.wait(PATIENCE_S)
                try:
                    proxy.take_ownership(manager, "")
                    won.append(manager)
                except xmlrpc.client.Fault as fault:
                    lost.append(fault.faultString)

            threads = [threading.Thread(target=take, args=pair) for pair in zip(proxies, managers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE_S)
            self.assertEqual((len(won), len(lost)), (1, 7), lost)
            self.assertEqual(self.element("Manager_Unique_Id"), won[0])
            for text in lost:
                self.assertIn("ALREADY_OWNED", text)
                self.assertIn(won[0], text)
            self.proxy.release_ownership(won[0])

    def test_another_manager_is_refused_and_the_owner_is_named(self):
        self.take("agent")
        fault = self.assertFault("ALREADY_OWNED", self.proxy.take_ownership, "0b" * 16, "")
        self.assertIn(MANAGER, fault.faultString)
        self.assertFault("ALREADY_OWNED", self.proxy.take_ownership, {"manager_uuid": "0b" * 16})
        self.assertFault("NOT_OWNER", self.proxy.release_ownership, "0b" * 16)
        self.assertEqual(self.by("agent"), 200)
