"""The lab's nodes: QEMU machines that boot real Xen with a Debian dom0, and a way into them.

A node has a folder below the lab's: its disk, which outlives reboots and power cuts until `fresh`; its serial log;
the folder that it sees as /mnt/host; and state.json, which says how to reach it while it is on. Nodes outlive the
process that started them, so that a developer's lab stays warm.

What a node is like inside is the matter of dom0/; what is tested is the matter of the suites.
"""

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAB = pathlib.Path(os.environ.get("DOM0D_LAB") or ROOT / "target" / "lab").resolve()
IMAGES = pathlib.Path(os.environ.get("DOM0D_LAB_IMAGES") or LAB / "images").resolve()
NUMBERS = {"a": 1, "b": 2}
# A busy machine boots ten times as slowly as an idle one.
BOOT_S = 600
COMMAND_S = 300
# Without SMAP, which kills a PV dom0 under QEMU 7.2's emulation at its first return from an interrupt; without AVX
# and XSAVE, whose emulation corrupted guests in runs of two nodes.
CPU = "max,-smap,-avx,-avx2,-f16c,-fma,-pku,-xsave,-xsaveopt,-la57"
XEN = (
    "console=com1 com1=115200,8n1 loglvl=all guest_loglvl=info bootscrub=0 spec-ctrl=no cpufreq=none "
    "dom0_mem={dom0}M,max:{dom0}M dom0_max_vcpus={cpus}"
)
LINUX = (
    "console=hvc0 earlyprintk=xen mitigations=off panic=5 net.ifnames=0 lab.node={name} lab.number={number} "
    "systemd.machine_id={number:032x}"
)


class LabError(Exception):
    """The lab itself failed; its words say what to look at."""


class CommandFailed(LabError):
    def __init__(self, command, code, output):
        super().__init__(f"exit code {code} of: {command}\n{output}")
        self.code, self.output = code, output


def wait_for(what, condition, patience_s=60, pause_s=0.1):
    """The condition's first true value."""
    end = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise LabError(f"waited {patience_s} s for {what}")
        time.sleep(pause_s)


def images():
    """Builds the images if what they are made from has changed."""
    done = subprocess.run([HERE / "image"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LabError("the images were not built")
    return done.stdout.strip()


def qemu(program):
    """A program of our own QEMU, by its own loader with its own libraries."""
    root = IMAGES / "qemu"
    lib = root / "usr/lib/x86_64-linux-gnu"
    loader = [root / "lib64/ld-linux-x86-64.so.2", "--library-path", f"{lib}:{lib}/pulseaudio", root / "usr/bin" / program]
    return ["env", f"QEMU_MODULE_DIR={lib}/qemu", *map(str, loader)]


class Node:
    def __init__(self, name):
        if name not in NUMBERS:
            raise LabError(f"there is no node {name!r}: allowed are {', '.join(NUMBERS)}")
        self.name, self.number = name, NUMBERS[name]
        self.folder = LAB / f"node-{name}"
        self.disk = self.folder / "disk.qcow2"
        self.serial = self.folder / "serial.log"
        self.share = self.folder / "share"
        self.deploy = self.share / "deploy"
        self._state = self.folder / "state.json"
        self._monitor = self.folder / "monitor.sock"

    # What is known of it.

    def state(self):
        """How the node is reached, or None if it is off."""
        try:
            state = json.loads(self._state.read_text())
        except (OSError, ValueError):
            return None
        return state if _started(state["pid"]) == state["started"] else None

    def _on(self):
        state = self.state()
        if state is None:
            raise LabError(f"node {self.name} is off; its last words: {self.last_words()}")
        return state

    @property
    def agent_port(self):
        """dom0d's port, on this machine's loopback."""
        return self._on()["agent_port"]

    def last_words(self):
        try:
            return self.serial.read_bytes()[-1500:].decode(errors="replace")
        except OSError:
            return "none"

    def cpu_s(self):
        """The time that this machine's CPUs have given it since it was switched on."""
        state = self.state()
        if state is None:
            return 0
        fields = pathlib.Path(f"/proc/{state['pid']}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def boots(self):
        """How often it has come up since it was switched on."""
        try:
            return len(re.findall(rb"^.*LAB-READY", self.serial.read_bytes(), re.MULTILINE))
        except OSError:
            return 0

    # Power.

    def fresh(self):
        """Forgets the disk: the next start has a new one."""
        if self.state():
            raise LabError(f"node {self.name} is on")
        self.disk.unlink(missing_ok=True)

    def up(self, systemd=False, cpus=None, memory=3072, dom0=1024):
        """Switches it on, unless it is, and waits until it takes commands. Seconds until then, or 0."""
        if self.state():
            return 0
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deploy.mkdir(parents=True, exist_ok=True)
        self._make_disks()
        for old in (self.serial, self._monitor, self._state):
            old.unlink(missing_ok=True)
        cpus = cpus or int(os.environ.get("DOM0D_LAB_CPUS") or 1)
        command = self._command(systemd, cpus, memory, dom0)
        with (self.folder / "qemu.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        state = {"pid": process.pid, "started": _started(process.pid), "systemd": systemd, "cpus": cpus}
        # At once: whoever comes after a run that was killed here finds the node, and can switch it off.
        self._state.write_text(json.dumps(state))
        try:
            wait_for("QEMU's monitor", lambda: self._is_monitored() or process.poll() is not None, 20, 0.02)
            # Ports are chosen by the kernel: nodes of several labs stand side by side.
            for guest_port, what in ((2323, "command_port"), (8899, "agent_port")):
                self._human(f"hostfwd_add tcp:127.0.0.1:0-10.0.2.15:{guest_port}")
            forwards = self._human("info usernet")
            for guest_port, what in ((2323, "command_port"), (8899, "agent_port")):
                state[what] = int(re.search(rf"127\.0\.0\.1 +(\d+) +\S+ +{guest_port}\b", forwards)[1])
            self._state.write_text(json.dumps(state))
            self.wait_ready(1)
        except (LabError, OSError, TypeError) as error:
            words = (self.folder / "qemu.log").read_text()
            if process.poll() is None:
                process.kill()
            raise LabError(f"node {self.name} did not come up: {error}\n{words}\n{self.last_words()}") from error
        return time.monotonic() - began

    def wait_ready(self, boots):
        """Waits until it has come up so many times and takes commands."""

        def ready():
            self._on()
            return self.boots() >= boots

        wait_for(f"node {self.name} to boot", ready, BOOT_S)
        wait_for(f"node {self.name} to take a command", lambda: self._answers("true"), BOOT_S)

    def _answers(self, script, patience_s=5):
        try:
            return self.run(script, patience_s).code == 0
        except (OSError, LabError):
            return False

    def is_lost(self):
        """Whether it takes no command: its QEMU has ended, or its kernel stands still."""
        return not self._answers("true", 60)

    def reboot(self):
        """As an orderly host does: the daemon is stopped, disks are written, then it starts again."""
        boots = self.boots()
        began = time.monotonic()
        if self._on()["systemd"]:
            self._last("systemctl reboot")
        else:
            self._last("/lab/agent stop; sync; echo u >/proc/sysrq-trigger; sleep 0.3; echo b >/proc/sysrq-trigger")
        self.wait_ready(boots + 1)
        return time.monotonic() - began

    def down(self):
        """Switches it off in good order, and by force if that takes long."""
        state = self.state()
        if state is None:
            return
        if state["systemd"]:
            self._last("systemctl poweroff")
        else:
            self._last("/lab/agent stop; sync; echo u >/proc/sysrq-trigger; sleep 0.3; echo o >/proc/sysrq-trigger")
        with contextlib.suppress(LabError):
            wait_for("the power to go", lambda: self.state() is None, 30)
        self.kill()

    def kill(self):
        """Cuts the power."""
        state = self.state()
        if state:
            os.kill(state["pid"], signal.SIGKILL)
            wait_for("the power to go", lambda: self.state() is None, 30, 0.02)

    def _last(self, script):
        """A command that ends the node: it may or may not answer."""
        with contextlib.suppress(OSError, LabError):
            self.run(f"(sleep 0.3; {script}) >/dev/null 2>&1 </dev/null &", patience_s=10)

    # Commands and files.

    def run(self, script, patience_s=COMMAND_S):
        """Runs a bash script in dom0: a Result, whatever its exit code."""
        port = self._on()["command_port"]
        with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as connection:
            end = time.monotonic() + patience_s
            connection.sendall(b"%d %s\n" % (patience_s, base64.b64encode(script.encode())))
            pieces = []
            while True:
                connection.settimeout(max(0.01, end - time.monotonic()))
                try:
                    piece = connection.recv(1 << 16)
                except TimeoutError:
                    so_far = b"".join(pieces).decode(errors="replace")
                    raise LabError(f"no end in {patience_s} s: {script}\n{so_far}") from None
                if not piece:
                    break
                pieces.append(piece)
        text = b"".join(pieces).decode(errors="replace")
        body, mark, code = text.rpartition("\n@@EXIT=")
        if not mark:
            raise LabError(f"node {self.name} broke off: {script}\n{text}")
        return Result(int(code), body)

    def sh(self, script, patience_s=COMMAND_S):
        """What a script prints; it must succeed."""
        result = self.run(script, patience_s)
        if result.code:
            raise CommandFailed(script, result.code, result.output)
        return result.output

    def wait(self, what, condition, patience_s=60, functions=""):
        """Waits in dom0 until a condition holds, and answers what it printed then. Bash that starts no program costs
        an emulated dom0 nothing; asking it again and again from here would take it from its guests."""
        script = f"""{functions}
exec {{nap}}<> <(:)
until {condition}; do
  [ $SECONDS -lt {patience_s} ] || exit 99
  read -rt 0.2 -u $nap
done
exit 0"""
        done = self.run(script, patience_s + 30)
        if done.code:
            raise LabError(f"waited {patience_s} s for {what}: exit code {done.code}: {done.output}")
        return done.output.strip()

    def put(self, source, path, mode="755"):
        """A file into dom0."""
        passing = self.share / f"put.{os.getpid()}"
        self.share.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, passing)
        try:
            self.sh(f"cp '/mnt/host/{passing.name}' '{path}' && chmod {mode} '{path}'")
        finally:
            passing.unlink()

    def get(self, path, destination):
        """A file out of dom0."""
        passing = self.share / f"get.{os.getpid()}"
        try:
            self.sh(f"cp '{path}' '/mnt/host/{passing.name}'")
            shutil.copyfile(passing, destination)
        finally:
            passing.unlink(missing_ok=True)

    # What only the machine around it can do.

    def link(self, name, up):
        """Plugs a cable in or out: `lan1` guests' and nodes' own traffic, `lan2` migrations."""
        self.monitor("set_link", name=name, up=up)

    def _is_monitored(self):
        """Whether the monitor takes a connection: its socket has a name a moment before it listens."""
        try:
            self._connected().close()
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True

    def _connected(self):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(20)
            # A name of at most 107 bytes, however deep the lab's folder lies.
            with _inside(self.folder):
                connection.connect(self._monitor.name)
        except OSError:
            connection.close()
            raise
        return connection

    def monitor(self, command, **arguments):
        """A command of QEMU's machine protocol."""
        with self._connected() as connection:
            answers = connection.makefile("rb")
            answers.readline()
            for one in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                connection.sendall(json.dumps(one).encode() + b"\n")
                answer = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(answers.readline())
            if "error" in answer:
                raise LabError(f"{command}: {answer['error']['desc']}")
            return answer["return"]

    def _human(self, line):
        answer = self.monitor("human-monitor-command", **{"command-line": line})
        if "could not" in answer.lower() or "invalid" in answer.lower():
            raise LabError(f"{line}: {answer}")
        return answer

    # The machine.

    def _make_disks(self):
        image = IMAGES / "dom0.img"
        key = (IMAGES / "dom0.key").read_text().strip()
        of = self.folder / "disk.key"
        if not self.disk.exists() or not of.exists() or of.read_text() != key:
            self.disk.unlink(missing_ok=True)
            create = [*qemu("qemu-img"), "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "raw", str(self.disk)]
            subprocess.run(create, check=True)
            of.write_text(key)
        shared = LAB / "shared.img"
        if not shared.exists():
            shared.touch()
            os.truncate(shared, 512 << 20)

    def _command(self, systemd, cpus, memory, dom0):
        xen = XEN.format(dom0=dom0, cpus=cpus)
        linux = LINUX.format(name=self.name, number=self.number) + (
            " lab.init=systemd systemd.show_status=0" if systemd else ""
        )
        mac = f"52:54:00:aa:{self.number:02x}"
        # Links are datagram sockets with short names, relative to this node's folder.
        other = next(name for name in NUMBERS if name != self.name)
        lans = []
        for lan, mtu in ((1, 1500), (2, 9000)):
            local = self.folder / f"lan{lan}"
            local.unlink(missing_ok=True)
            lans += [
                "-netdev", f"dgram,id=lan{lan},local.type=unix,local.path=lan{lan},"
                f"remote.type=unix,remote.path=../node-{other}/lan{lan}",
                "-device", f"virtio-net-pci,netdev=lan{lan},mac={mac}:{lan:02x},host_mtu={mtu},romfile=",
            ]  # fmt: skip
        qemu_root = IMAGES / "qemu"
        return [
            *qemu("qemu-system-x86_64"), "-L", f"{qemu_root}/usr/share/qemu", "-L", f"{qemu_root}/usr/share/seabios",
            "-name", f"lab-{self.name}", "-uuid", f"00000000-0000-4000-8000-{self.number:012d}", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", CPU,
            "-smp", str(cpus), "-m", str(memory), "-nodefaults", "-nographic",
            "-serial", f"file:{self.serial.name}", "-qmp", f"unix:{self._monitor.name},server=on,wait=off",
            "-kernel", f"{IMAGES}/xen", "-append", xen,
            "-initrd", f"{IMAGES}/vmlinux {linux},{IMAGES}/initrd.cpio",
            "-drive", f"file={self.disk.name},if=none,id=disk,format=qcow2,cache=writeback",
            "-device", "virtio-blk-pci,drive=disk",
            "-drive", f"file={LAB}/shared.img,if=none,id=shared,format=raw,cache=none,file.locking=off",
            "-device", "virtio-blk-pci,drive=shared,share-rw=on,serial=shared",
            "-netdev", "user,id=host0,restrict=on",
            "-device", f"virtio-net-pci,netdev=host0,mac={mac}:00,romfile=",
            *lans,
            "-fsdev", f"local,id=fs,path={self.share.name},security_model=none",
            "-device", "virtio-9p-pci,fsdev=fs,mount_tag=lab",
        ]  # fmt: skip


class Result:
    def __init__(self, code, output):
        self.code, self.output = code, output


def _started(pid):
    """When a process started, in the kernel's count; None if it is gone. With the number it names it for ever."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # Its first thread is a zombie soon; its files, and their locks, go with the last of the others.
        gone = fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except OSError:
        return None
    return None if gone else int(fields[19])


@contextlib.contextmanager
def _inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def alone():
    """The lab for one user at a time."""
    LAB.mkdir(parents=True, exist_ok=True)
    with (LAB / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LabError(f"another run uses the lab in {LAB}") from None
        yield
