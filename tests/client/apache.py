"""Apache's XML-RPC client 3.1.3 on the wire, as CloudStack's OVM3 plug-in uses it, and the plug-in's own steps.

The class names and steps follow the plug-in's (objects/Connection, OvmObject, Linux, Xen, Pool), so that what breaks
here would break there. Java's habits that matter are kept: strings go untyped, numbers as i4, the first matching
map wins in Linux.get, a missing member is a KeyError.
"""

import base64
import http.client
import xml.etree.ElementTree as ET
import xmlrpc.client

from harness import PATIENCE_S, escape

EX = "http://ws.apache.org/xmlrpc/namespaces/extensions"


def value(item, extensions=False):
    if item is None:
        assert extensions, "Apache's client refuses to send nil without extensions"
        return "<value><ex:nil/></value>"
    if isinstance(item, bool):
        return f"<value><boolean>{int(item)}</boolean></value>"
    if isinstance(item, int):
        tag = "ex:i8" if extensions and abs(item) > 2**31 else "i4"
        return f"<value><{tag}>{item}</{tag}></value>"
    if isinstance(item, str):
        return f"<value>{escape(item)}</value>"
    if isinstance(item, (list, tuple)):
        return "<value><array><data>" + "".join(value(i, extensions) for i in item) + "</data></array></value>"
    members = (f"<member><name>{escape(k)}</name>{value(v, extensions)}</member>" for k, v in item.items())
    return "<value><struct>" + "".join(members) + "</struct></value>"


def call_body(method, params, extensions=False):
    head = f' xmlns:ex="{EX}"' if extensions else ""
    inner = "".join(f"<param>{value(p, extensions)}</param>" for p in params)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<methodCall{head}><methodName>{method}</methodName><params>{inner}</params></methodCall>"
    ).encode()


class Connection:
    """One kept-alive connection: plain HTTP and no path, unless a TLS context is given."""

    def __init__(self, port, password, user="oracle", context=None):
        if context:
            self.http = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=PATIENCE_S)
        else:
            self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        self.headers = {
            "Content-Type": "text/xml",
            "User-Agent": "Apache XML RPC 3.1.3 (Sun HTTP Transport)",
            "Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode(),
            "Accept": "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
            "Connection": "keep-alive",
        }
        self.last = b""

    def post(self, body, path="/"):
        self.http.request("POST", path, body, self.headers)
        answer = self.http.getresponse()
        self.last = answer.read()
        if answer.status != 200:
            raise xmlrpc.client.ProtocolError(path, answer.status, answer.reason, dict(answer.headers))
        assert answer.version == 11 and answer.headers["Content-Length"] == str(len(self.last))
        assert answer.headers["Content-Type"].startswith("text/xml")
        return self.last

    def call(self, method, *params, extensions=False):
        raw = self.post(call_body(method, params, extensions))
        # RpcTypeFactory knows nil and i8 without a namespace only.
        assert b"nil/>" not in raw.replace(b"<nil/>", b""), raw
        assert b"xmlns" not in raw
        return xmlrpc.client.loads(raw)[0][0]

    def close(self):
        self.http.close()


def xml_to_map(path, document):
    """OvmObject.xmlToMap: one level; what has more than one child is left out; the last one wins."""
    flat = {}
    for node in document.findall(path):
        for child in node:
            if len(child) <= 1:
                flat[child.tag] = "".join(child.itertext())
    return flat


class Linux:
    def __init__(self, connection):
        self.c = connection
        hardware, server = (ET.fromstring(self.c.call(name)) for name in ("discover_hardware", "discover_server"))
        self.server, self.hardware = server, hardware
        self.maps = [
            xml_to_map("./Server", server),
            xml_to_map("./Server/VMM", server),
            xml_to_map("./Server/VMM/Version", server),
            xml_to_map("./NodeInformation/VMM/PhysicalInfo", hardware),
            xml_to_map("./NodeInformation/DMTF/System", hardware),
            xml_to_map("./Server/Capabilities", server),
        ]

    def get(self, element):
        return next((m[element] for m in self.maps if element in m), "")


class Vm:
    """Xen.Vm: what the plug-in keeps of a VM, and how it names disks."""

    def __init__(self, params=None):
        self.disks, self.vifs, self.vfbs = [], [], []
        self.params = params or {
            "vif": self.vifs, "OVM_simple_name": "", "disk": self.disks, "bootargs": "", "uuid": "",
            "on_reboot": "restart", "cpu_weight": 27500, "memory": 256, "cpu_cap": 0, "maxvcpus": 0,
            "OVM_high_availability": False, "OVM_description": "", "on_poweroff": "destroy", "on_crash": "restart",
            "bootloader": "/usr/bin/pygrub", "name": "", "guest_os_type": "Other Linux", "vfb": self.vfbs, "vcpus": 1,
            "OVM_cpu_compat_group": "", "OVM_domain_type": "xen_pvm", "extra": "",
        }  # fmt: skip

    def domain_type(self):
        kind = self.params["OVM_domain_type"]
        if kind == "xen_pvm":
            builder = self.params.get("builder")
            kind = "xen_pvm" if builder is None or "linux" in builder else "hvm"
        return kind

    def add_disk(self, image, mode):
        letter = ord("a") + len(self.disks)
        device = chr(letter + 2) if "hvm" in self.domain_type() else "xvd" + chr(letter)
        if image.endswith(".iso"):
            device, mode = device + ":cdrom", "r"
        if not any(image in disk for disk in self.disks):
            self.disks.append(f"file:{image},{device},{mode}")
            self.params["disk"] = self.disks

    def remove_disk(self, image):
        self.disks = [disk for disk in self.disks if image not in disk]
        self.params["disk"] = self.disks

    def add_vif(self, bridge, mac):
        self.vifs.append(f"mac={mac},bridge={bridge}")
        self.params["vif"] = self.vifs

    def remove_vif(self, bridge, mac):
        self.vifs = [vif for vif in self.vifs if vif != f"mac={mac},bridge={bridge}"]
        self.params["vif"] = self.vifs

    def set_vnc(self, address, password):
        parts = {"vnclisten": address, "vncpasswd": password, "vncunused": "1", "type": "vnc", "keymap": "en-us"}
        self.vfbs.append(",".join(f"{k}={v}" for k, v in parts.items()))

    def root_disk_pool(self):
        return self.params["device"]["vbd"][0]["uname"].split("/")[3]

    def vnc_port(self):
        vfb = self.params["device"]["vfb"][0]
        if "port" in vfb:
            return int(vfb["port"])
        return int(vfb["location"].split(":")[1])


class Xen:
    def __init__(self, connection):
        self.c = connection

    def running(self, name):
        """getRunningVmConfig."""
        return {vm["name"]: Vm(vm) for vm in self.c.call("list_vms")}.get(name)

    def states(self):
        """getAllVmStates: every letter must mean something."""
        meaning = {"r": "Running", "b": "Running", "p": "Running", "s": "Stopped", "c": "Error", "d": "Stopping"}
        found = {}
        for vm in self.c.call("list_vms"):
            if vm["name"] != "Domain-0":
                found[vm["name"]] = next((meaning[c] for c in "rbpscd" if c in vm["state"]), "Unknown")
        return found

    def config(self, name):
        """getVmConfig(name): the file's parameters, with disks, vifs and vfb taken out."""
        running = self.running(name)
        repo, vm = running.root_disk_pool(), running.params["uuid"]
        rest = self.c.call("get_vm_config", repo, vm)
        config = Vm()
        for key, kept in (("vif", config.vifs), ("disk", config.disks), ("vfb", config.vfbs)):
            assert all(isinstance(item, str) for item in rest[key])
            kept += rest.pop(key)
        config.params = rest
        config.repo, config.vm = repo, vm
        return config

    def configure(self, config):
        return self.c.call("configure_vm", config.repo, config.vm, config.params)


class Plugin:
    """CloudstackPlugin: answers are maps of strings, which the client trims and parses as numbers."""

    def __init__(self, connection):
        self.c = connection
        self.vm_stats = {}

    def strings(self, method, *params):
        answer = self.c.call(method, *params)
        assert all(isinstance(value, str) for value in answer.values()), answer
        return answer

    def vnc_port(self, name):
        port = self.c.call("get_vncport", name)
        assert isinstance(port, str)
        return port

    def host_stats(self, bridge):
        """GetHostStats: Double.parseDouble, and the link's counters trimmed."""
        stats = self.strings("ovs_dom0_stats", bridge)
        return {name: float(stats[name].strip()) for name in ("cpu", "free", "total", "rx", "tx")}

    def vm_stat(self, name):
        """getVmStat: the difference to the call before; None at the first."""
        old, new = self.vm_stats.get(name), self.strings("ovs_domU_stats", name)
        self.vm_stats[name] = new
        if old is None:
            return None
        names = ("uptime", "cputime", "rx_bytes", "tx_bytes", "rd_bytes", "wr_bytes", "rd_ops", "wr_ops")
        stat = {name: float(new[name]) - float(old[name]) for name in names}
        # Java divides by zero without a word.
        share = stat["cputime"] / stat["uptime"] if stat["uptime"] else float("nan")
        return stat | {"cpus": int(new["vcpus"]), "share": share}
