"""What every test here stands on: a daemon on a simulated host, and the clients that managers use.

A Daemon lives in a temporary folder, listens on a free port of 127.0.0.1, and is gone afterwards together with its
simulated world. The clients know nothing of dom0d: xmlrpc.client and curl over TLS, and dom0ctl over the socket.
"""

import base64
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import unittest
import uuid
import xml.etree.ElementTree as ET
import xmlrpc.client

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PASSWORD = "first-Password.7"
REPO = "f12842ebf5ed3fe78da1eb0e17f5ede8"
DISKS = f"/OVS/Repositories/{REPO}/VirtualDisks"
MANAGER = "d1a749d4295041fb99854f52ea4dea97"
# How long anything here may take on a busy machine before it counts as hung.
PATIENCE_S = 60


def binary(name):
    """The program under test: $DOM0D_BIN or $DOM0CTL_BIN, else what cargo built."""
    named = os.environ.get(name.upper() + "_BIN")
    places = [pathlib.Path(named)] if named else [ROOT / "target" / kind / name for kind in ("debug", "release")]
    for place in places:
        if place.exists():
            return str(place)
    raise AssertionError(f"{name} is not built: {places}")


def wait_for(what, condition):
    """The condition's first true value; fails with `what` when patience ends."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE_S} s for {what}")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, **options)


class Daemon:
    """dom0d --dev in a folder of its own. `settings`: text of its settings file."""

    def __init__(self, settings=""):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dom0d-client-"))
        self.state = self.folder / "state"
        self.password = PASSWORD
        (self.folder / "password").write_text(PASSWORD + "\n")
        (self.folder / "password").chmod(0o600)
        (self.folder / "settings.toml").write_text(settings)
        self.log = self.folder / "log"
        self.process = None
        self.proxies = []
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self):
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    binary("dom0d"),
                    "--dev",
                    "--config", str(self.folder / "settings.toml"),
                    "--state-dir", str(self.state),
                    "--password-file", str(self.folder / "password"),
                    "--listen", "127.0.0.1:0",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        printed = re.compile(r"listens on https://127\.0\.0\.1:(\d+)/RPC2 +\(CA certificate: (\S+)\)")

        def address():
            if self.process.poll() is not None:
                raise AssertionError(f"dom0d ended: {self.log.read_text()}")
            # What an earlier life printed names its own port.
            return printed.search(self.log.read_bytes()[before:].decode())

        found = wait_for("dom0d to listen", address)
        self.port, self.ca = int(found[1]), found[2]
        self.socket = str(self.state / "dom0d.sock")

    def stop(self):
        """Ends the daemon and its world, and removes the folder."""
        for proxy in self.proxies:
            proxy("close")()
        try:
            if self.process and self.process.poll() is None:
                self.process.terminate()
                self.process.wait(PATIENCE_S)
        finally:
            if self.process and self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._end_world()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _end_world(self):
        try:
            pid = int((self.state / "world.sock.pid").read_text())
            # Only if the number still belongs to it.
            if b"simulated-world" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGTERM)
        except (OSError, ValueError):
            pass

    def deafen(self, vm):
        """From now on the VM's guest heeds no request to shut down: asked of the world itself, in its own frames."""
        asked = {"set_behaviour": {"vm": vm, "behaviour": {"ignores_shutdown": True}}}
        frame = json.dumps({"id": 1, "request": asked}).encode()
        with socket.socket(socket.AF_UNIX) as world:
            world.settimeout(PATIENCE_S)
            world.connect(str(self.state / "world.sock"))
            world.sendall(len(frame).to_bytes(4, "big") + frame)
            answers = world.makefile("rb")
            while True:
                answer = json.loads(answers.read(int.from_bytes(answers.read(4), "big")))
                if "Answer" in answer:
                    assert "Ok" in answer["Answer"]["result"], answer
                    return

    def tls(self, certificate=None):
        """Trusts the printed CA and nothing else; `certificate`: (certificate file, key file) to show."""
        context = ssl.create_default_context(cafile=self.ca)
        if certificate:
            context.load_cert_chain(*certificate)
        return context

    def url(self, path="/RPC2", password=None):
        return f"https://oracle:{password or self.password}@127.0.0.1:{self.port}{path}"

    def proxy(self, path="/RPC2", password=None):
        """Python's own client, as PyOVM and ovs-agent-rpc use it."""
        proxy = xmlrpc.client.ServerProxy(self.url(path, password), context=self.tls(), allow_none=True)
        self.proxies.append(proxy)
        return proxy

    def connection(self, certificate=None):
        """A bare HTTPS connection that is kept alive."""
        context = self.tls(certificate)
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=PATIENCE_S)

    def basic(self, password=None):
        pair = f"oracle:{password or self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()

    def raw(self, method, *params, path="/RPC2"):
        """A call's answer as its bytes."""
        return self.post(xmlrpc.client.dumps(params, method, allow_none=True), path)

    def post(self, body, path="/RPC2"):
        connection = self.connection()
        try:
            headers = {"Content-Type": "text/xml", "Authorization": self.basic()}
            # http.client would send a str as Latin-1.
            connection.request("POST", path, body.encode(), headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.status
            return answer.read()
        finally:
            connection.close()

    def ctl(self, *arguments, **options):
        return run(binary("dom0ctl"), "--socket", self.socket, *arguments, stdin=subprocess.DEVNULL, **options)


class Curl:
    """The same calls by curl: each request is a file of XML, laid out as a person would."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.requests = daemon.folder / "requests"
        self.requests.mkdir(exist_ok=True)
        self.count = 0
        # Not on the command line, where every user of the machine could read it.
        self.options = self.requests / "curl.conf"
        self.options.write_text(f'user = "oracle:{daemon.password}"\ncacert = "{daemon.ca}"\nmax-time = 120\n')
        self.options.chmod(0o600)

    def post(self, body, path="/RPC2"):
        self.count += 1
        file = self.requests / f"{self.count}.xml"
        file.write_text(body)
        done = run(
            "curl", "--config", str(self.options), "--silent", "--show-error", "--fail-with-body",
            "--header", "Content-Type: text/xml", "--data-binary", f"@{file}",
            f"https://127.0.0.1:{self.daemon.port}{path}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def call(self, method, *params):
        return xmlrpc.client.loads(self.post(request(method, params)), use_builtin_types=True)[0][0]


def request(method, params, indent="  "):
    """A call with white space wherever XML lets one put it, and untyped strings."""
    lines = ["<?xml version='1.0'?>", "<methodCall>", f"{indent}<methodName>{method}</methodName>", "<params>"]
    for param in params:
        lines += ["<param>", *value_lines(param), "</param>"]
    return "\n".join([*lines, "</params>", "</methodCall>", ""])


def value_lines(value):
    if isinstance(value, str):
        return [f"  <value>{escape(value)}</value>"]
    if value is None:
        return ["  <value>", "    <nil/>", "  </value>"]
    if isinstance(value, bool):
        return ["  <value>", f"    <boolean>{int(value)}</boolean>", "  </value>"]
    if isinstance(value, int):
        return ["  <value>", f"    <i4>{value}</i4>", "  </value>"]
    if isinstance(value, (list, tuple)):
        inner = [line for item in value for line in value_lines(item)]
        return ["  <value>", "<array>", "<data>", *inner, "</data>", "</array>", "  </value>"]
    inner = []
    for name, item in value.items():
        inner += ["<member>", f"  <name>{escape(name)}</name>", *value_lines(item), "</member>"]
    return ["  <value>", "<struct>", *inner, "</struct>", "  </value>"]


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Python:
    """xmlrpc.client with the same face as Curl."""

    def __init__(self, daemon):
        self.proxy = daemon.proxy()

    def call(self, method, *params):
        return getattr(self.proxy, method)(*params)


class DaemonCase(unittest.TestCase):
    """One daemon for all tests of a class."""

    settings = ""

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(cls.settings)
        cls.addClassCleanup(cls.daemon.stop)
        cls.proxy = cls.daemon.proxy()

    def assertFault(self, text, call, *params):
        """The call is refused by a fault that holds `text`."""
        with self.assertRaises(xmlrpc.client.Fault) as raised:
            call(*params)
        self.assertIn(text, raised.exception.faultString)
        return raised.exception

    def element(self, name, proxy=None):
        """A leaf of discover_server."""
        document = ET.fromstring((proxy or self.proxy).discover_server())
        return document.find(f"Server/{name}").text

    def running(self, name, proxy=None):
        """The VM in list_vms, or None."""
        return next((vm for vm in (proxy or self.proxy).list_vms() if vm["name"] == name), None)

    def state(self, vm):
        return self.proxy.vm_get(vm)["state"]


_macs = iter(range(1, 1 << 16))


def mac():
    number = next(_macs)
    return f"00:21:f6:00:{number >> 8:02x}:{number & 255:02x}"


def new_vm(name, kind="pv", **more):
    """(id, parameters of create_vm) of a VM, as a manager sends them."""
    vm = str(uuid.uuid4())
    params = {
        "name": name,
        "OVM_simple_name": name,
        "uuid": vm,
        "memory": 512,
        "vcpus": 1,
        "maxvcpus": 2,
        "cpu_weight": 27500,
        "cpu_cap": 0,
        "disk": [f"file:{DISKS}/{vm}.raw,xvda,w"],
        "vif": [f"mac={mac()},bridge=xenbr0"],
        "vfb": ["type=vnc,vncunused=1,vnclisten=0.0.0.0,vncpasswd=7693f834ca67912e,keymap=en-us"],
        "on_poweroff": "destroy",
        "on_reboot": "restart",
        "on_crash": "restart",
        "guest_os_type": "Other.Linux",
        "OVM_high_availability": False,
        "OVM_description": "",
        "OVM_cpu_compat_group": "",
    }
    if kind == "pv":
        params |= {"OVM_domain_type": "xen_pvm", "bootloader": "/usr/bin/pygrub", "bootargs": "", "extra": ""}
    elif kind == "hvm":
        iso = f"file:/OVS/Repositories/{REPO}/ISOs/install.iso,hdc:cdrom,r"
        params |= {
            "OVM_domain_type": "xen_hvm", "builder": "hvm", "boot": "cd", "acpi": 1, "apic": 1, "pae": 1,
            "usbdevice": "tablet", "serial": "pty", "kernel": "/usr/lib/xen/boot/hvmloader",
            "disk": [f"file:{DISKS}/{vm}.raw,hda,w", iso],
            "vif": [f"mac={mac()},bridge=xenbr0,type=ioemu"],
        }  # fmt: skip
    elif kind == "kernel":
        params |= {
            "OVM_domain_type": "xen_pvm",
            "kernel": "/var/lib/dom0d/kernels/vmlinuz",
            "ramdisk": "/var/lib/dom0d/kernels/initrd.img",
            "extra": "root=/dev/xvda ro console=hvc0",
        }
    elif kind == "pvh":
        params |= {"OVM_domain_type": "xen_pvh", "kernel": "/var/lib/dom0d/kernels/vmlinuz", "extra": "quiet"}
    return vm, params | more
