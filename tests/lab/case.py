"""What the lab's suites stand on: dom0d in a dom0 under real Xen, reached by the clients of tests/client, and dom0
itself, where `xl` and XenStore tell what is true.
"""

import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time
import unittest
import uuid

import nodes

sys.path.insert(0, str(nodes.ROOT / "tests" / "client"))
import harness  # noqa: E402

# How much is done: a slow machine has no time for all of it (`run --form auto`).
FORMS = ("glance", "brief", "whole", "long")
FORM = os.environ.get("DOM0D_LAB_FORM", "whole")
LONG = FORM == "long"
WARM = os.environ.get("DOM0D_LAB_WARM") == "1"
# Where the suites of one node run.
NODE = os.environ.get("DOM0D_LAB_NODE", "a")
# Emulated, on a machine that may be busy with something else; the longest that `job_wait` takes.
PATIENCE_S = 840
harness.PATIENCE_S = PATIENCE_S
REPO = harness.REPO
DISKS = harness.DISKS
KERNELS = "/var/lib/dom0d/kernels"
STATE = "/var/lib/dom0d"

def by_form(*values):
    """The value for the form: one for each of FORMS."""
    return values[FORMS.index(FORM)]


def from_form(form):
    """A test, or a class of them, that shorter forms leave out, and say so."""
    return unittest.skipIf(FORMS.index(FORM) < FORMS.index(form), f"left out of the form {FORM!r}")


# The newest tick of a guest's console, for Node.wait.
TICK = r"""
tick() {
  local at lines
  n=0 line=
  [ -e "/var/log/xen/guest-$1.log" ] || return 0
  mapfile -t lines <"/var/log/xen/guest-$1.log"
  for ((at = ${#lines[@]} - 1; at >= 0; at--)); do
    line=${lines[at]%$'\r'}
    [[ $line =~ ^TICK\ ([0-9]+)\  ]] && n=${BASH_REMATCH[1]} && return
  done
}"""

socket.setdefaulttimeout(900)


def lay_out(node):
    """Puts what is to be tested where the node takes it from, at its next boot or `/lab/deploy`."""
    node.deploy.mkdir(parents=True, exist_ok=True)
    for name in ("dom0d", "dom0ctl"):
        _strip(pathlib.Path(harness.binary(name)), node.deploy / name)
    if os.environ.get("DOM0D_LAB_CONTRACT"):
        _strip(pathlib.Path(os.environ["DOM0D_LAB_CONTRACT"]), node.deploy / "contract")
    toolstack = os.environ.get("DOM0D_LAB_TOOLSTACK", "xl")
    _write(node.deploy / "dom0d.toml", (nodes.HERE / "dom0d.toml").read_text().replace("@toolstack@", toolstack))
    _write(node.deploy / "password", harness.PASSWORD + "\n")
    for unit in ("dom0d.service", "dom0d.socket"):
        _write(node.deploy / unit, (nodes.ROOT / "systemd" / unit).read_text())


def _strip(source, destination):
    """The program without what only debuggers read, with the source's time, by which dom0 knows what is new."""
    times = source.stat()
    if destination.exists() and destination.stat().st_mtime_ns == times.st_mtime_ns:
        return
    if not shutil.which("strip") or subprocess.run(["strip", "-o", destination, source], check=False).returncode:
        shutil.copyfile(source, destination)
    os.utime(destination, ns=(times.st_atime_ns, times.st_mtime_ns))


def _write(file, text):
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def deployed(name, **how):
    """A node that is on, with today's programs in it and dom0d answering: its Agent. `how`: as Node.up takes it."""
    node = nodes.Node(name)
    lay_out(node)
    state = node.state()
    if state and any(state[key] != value for key, value in how.items()):
        node.down()
        state = None
    if state:
        agent = Agent(node)
        agent.halt()
        node.sh("/lab/deploy")
        agent.start()
        return agent
    began = time.monotonic()
    booted_s = node.up(**how)
    agent = Agent(node)
    agent.start()
    print(f"    node {name}: up after {booted_s:.1f} s, dom0d answers after {time.monotonic() - began:.1f} s", flush=True)
    return agent


class Agent(harness.Daemon):
    """dom0d of a node, with the face that tests/client gives a daemon on this machine."""

    # pylint: disable=super-init-not-called
    def __init__(self, node):
        self.node = node
        self.password = harness.PASSWORD
        self.folder = node.folder
        self.proxies = []
        self.ca = str(node.folder / "ca.pem")
        # How often it was waited for: after a start, or a boot of its node, connections are others.
        self.lives = 0

    @property
    def port(self):
        return self.node.agent_port

    @property
    def systemd(self):
        return self.node.state()["systemd"]

    def start(self):
        """Starts the daemon if it is not running, and waits until it answers. Seconds until then."""
        began = time.monotonic()
        if self.systemd:
            self.node.sh("systemctl start dom0d.socket dom0d.service && dom0ctl password set --file /etc/dom0d/password")
        else:
            self.node.sh("/lab/agent start")
        self.wait()
        return time.monotonic() - began

    def start_dying(self, point):
        """Starts the daemon so that it ends, as if killed, at a commit to its store (`7:before`, `7:after`). Whether it
        lived until it answered."""
        toolstack = os.environ.get("DOM0D_LAB_TOOLSTACK", "xl")
        self.node.sh(
            "setsid bash -c 'echo $$ >/run/dom0d.lab.pid; exec /usr/sbin/dom0d --dev --config /etc/dom0d/dom0d.toml "
            f"--toolstack {toolstack} --kernel linux --host linux --state-dir {STATE} --listen 0.0.0.0:8899 "
            f"--die-at-commit {point}' </dev/null >>/var/log/dom0d.log 2>&1 & until [ -s /run/dom0d.lab.pid ]; do :; done"
        )
        return nodes.wait_for("the daemon to answer or die", lambda: self.alive_or_dead(), PATIENCE_S, 0.2) == "alive"

    def alive_or_dead(self):
        try:
            return "alive" if self.raw("echo", "lab") else None
        except OSError:
            return None if self.pid() else "dead"

    def wait(self):
        """Waits until the daemon answers."""
        self.lives += 1
        nodes.wait_for(f"dom0d of node {self.node.name}; its log: {self.node.folder}", self.answers, PATIENCE_S, 0.2)

    def answers(self):
        try:
            pathlib.Path(self.ca).write_text(self.node.sh(f"cat {STATE}/tls/ca.pem", 20))
            return self.raw("echo", "lab")
        except (OSError, nodes.LabError):
            if not self.pid():
                words = self.node.run("tail -n 20 /var/log/dom0d.log", 20).output
                raise nodes.LabError(f"dom0d of node {self.node.name} is not running: {words}") from None
            return None

    def pid(self):
        """The daemon's number in dom0, or None."""
        asked = "systemctl show -P MainPID dom0d.service" if self.systemd else "/lab/agent pid"
        return int(self.node.run(asked).output.strip() or 0) or None

    def halt(self):
        self.node.sh("systemctl stop dom0d.socket dom0d.service" if self.systemd else "/lab/agent stop")

    def kill(self):
        """As if it had crashed."""
        self.node.sh("systemctl kill -s KILL dom0d.service" if self.systemd else "/lab/agent kill")

    def stop(self):
        for proxy in self.proxies:
            proxy("close")()
        self.proxies = []

    def ctl(self, *arguments, **options):
        quoted = " ".join("'" + one.replace("'", "'\\''") + "'" for one in arguments)
        return self.node.run(f"dom0ctl {quoted}", **options)

    # dom0's own view.

    def domains(self):
        """{name: (domid, state letters)} of `xl list`, without dom0."""
        lines = self.node.sh("xl list").splitlines()[1:]
        rows = [line.split() for line in lines if line.strip()]
        return {row[0]: (int(row[1]), row[-2]) for row in rows if row[1] != "0"}

    def disk(self, name, size_mib=16):
        """A new disk image in the repository: its path."""
        path = f"{DISKS}/{name}.raw"
        self.node.sh(f"mkdir -p {DISKS} && rm -f {path} && truncate -s {size_mib}M {path}")
        return path

    def tell_guest(self, domid, words):
        """Tells a test guest something, as guest/init lists it."""
        self.node.sh(f"xenstore-write /local/domain/{domid}/data/lab '{words}'")

    def console(self, name):
        """What a guest has printed since its domain's console was first opened."""
        return self.node.sh(f"cat /var/log/xen/guest-{name}.log 2>/dev/null || true")

    def ticks(self, name):
        """The numbers of a guest's ticks, as its console told them, since that was first opened."""
        words = [line.split() for line in self.console(name).splitlines() if line.startswith("TICK ")]
        return [int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()]


def mac():
    """An address that a VM which a broken-off run has left does not have."""
    return "00:16:3e:" + ":".join(f"{random.randrange(256):02x}" for _ in range(3))


def guest(agent, name, kind="pvh", *, disk=True, vif=True, more=""):
    """(id, parameters of create_vm) of a test guest, whose disk is made."""
    vm = str(uuid.uuid4())
    params = {
        "name": name,
        "OVM_simple_name": name,
        "uuid": vm,
        "memory": 96 if kind == "pv" else 128,
        "vcpus": 1,
        "maxvcpus": 2,
        "disk": [f"file:{agent.disk(vm)},xvda,w"] if disk else [],
        "vif": [f"mac={mac()},bridge=xenbr0"] if vif else [],
        "vfb": [],
        "on_poweroff": "destroy",
        "on_reboot": "restart",
        "on_crash": "destroy",
        "OVM_domain_type": f"xen_{'pvm' if kind == 'pv' else kind}",
        "kernel": f"{KERNELS}/vmlinux",
        "ramdisk": f"{KERNELS}/guest.cpio",
        "extra": f"console=hvc0 mitigations=off {more}".strip(),
        # Emulating the time-stamp counter inside an emulated machine kills PVH guests.
        "tsc_mode": "native",
    }
    return vm, params


class LabCase(unittest.TestCase):
    """Tests on one node, warm if it is on already."""

    systemd = False

    @classmethod
    def setUpClass(cls):
        cls.agent = deployed(NODE, systemd=cls.systemd)
        cls.node = cls.agent.node
        cls.addClassCleanup(cls.agent.stop)
        # Of a run that was broken off on a warm node.
        for left in cls.agent.proxy().vm_list():
            cls.remove(left["uuid"])

    @property
    def proxy(self):
        """A caller of the daemon that is: one that was connected to a life before it finds nobody."""
        kind, lives = type(self), self.agent.lives
        if getattr(kind, "_asked", (None, None))[0] != lives:
            kind._asked = (lives, self.agent.proxy())
        return kind._asked[1]

    def setUp(self):
        began = time.monotonic()
        self.addCleanup(lambda: print(f"    {self.id()}: {time.monotonic() - began:.1f} s", flush=True))

    def create(self, name, kind="pvh", **more):
        """A VM that is gone after the test, whatever happened to it."""
        params = more.pop("params", {})
        vm, all_params = guest(self.agent, name, kind, **more)
        all_params |= params
        self.assertIsNone(self.proxy.create_vm(REPO, vm, all_params))
        self.addCleanup(self.remove, vm)
        return vm, all_params

    @classmethod
    def remove(cls, vm):
        proxy = cls.agent.proxy()
        known = {one["uuid"]: one["state"] for one in proxy.vm_list()}
        if known.get(vm) in ("running", "paused", "ended"):
            proxy.stop_vm(REPO, vm, True)
        if vm in known:
            proxy.delete_vm(REPO, vm)

    def up(self, name):
        """Waits until a guest has said that it is up, and answers its newest tick."""
        return self.tick(name, "[ $n -gt 0 ]")

    def ticks_on(self, name):
        """Waits until a guest has ticked again, and answers that tick."""
        # Its number is less after a boot.
        return self.tick(name, "{ [ $n -gt 0 ] && [ $n -ne ${first:=$n} ]; }")

    def tick(self, name, condition):
        """Waits until a condition holds of the guest's newest tick: n is its number, line its words. Answers n."""
        told = self.node.wait(f"guest {name}: {condition}", f"tick '{name}' && {condition} && echo $n", PATIENCE_S, TICK)
        return int(told)

    def running(self, name):
        return next((vm for vm in self.proxy.list_vms() if vm["name"] == name), None)

    def state(self, vm):
        return self.proxy.vm_get(vm)["state"]

    def timed(self, what, call, *params):
        """The call's answer; how long it took is printed."""
        began = time.monotonic()
        answer = call(*params)
        print(f"    {what:<28} {1000 * (time.monotonic() - began):8.0f} ms", flush=True)
        return answer
