"""Statistics beside what dom0's own tools tell. A tool is read, then a sweep that began after that, then the tool again: what
counts must lie between the two readings, by what the source can tell apart."""

import datetime
import json
import re

from case import REPO, LabCase, from_form
from nodes import wait_for

XENTOP = "/usr/lib/xen-4.17/bin/xentop"

# One look by all tools, in parts that begin with @name. The last is the time at which the look had ended.
LOOK = r"""
part() { printf '\n@%%s\n' "$1"; }
part list; xl list -v
part info; xl info
part links; ip -s -j link
part dev; cat /proc/net/dev
part stat; cat /proc/stat
part meminfo; cat /proc/meminfo
part loadavg; cat /proc/loadavg
part diskstats; cat /proc/diskstats
part target; xenstore-read /local/domain/%d/memory/target
part vbds
for file in /sys/bus/xen-backend/devices/vbd-*/statistics/*; do
  [ -e "$file" ] && echo "$file $(<"$file")"
done
part ended; echo $EPOCHREALTIME
"""

MIB = 1024 * 1024


class Look:
    """What the tools told."""

    def __init__(self, text):
        self.parts = dict(part.split("\n", 1) for part in text.split("\n@")[1:])
        self.ended = float(self.parts["ended"])

    def domain(self, domid):
        """(memory in MiB, virtual CPUs, CPU seconds) by `xl list -v`."""
        lines = [line.split() for line in self.parts["list"].splitlines()[1:]]
        row = next(line for line in lines if len(line) > 6 and line[1] == str(domid))
        return int(row[2]), int(row[3]), float(row[5])

    def info(self, name):
        return int(re.search(rf"^{name}\s*: (\d+)$", self.parts["info"], re.M)[1])

    def link(self, name):
        """As `ip` tells it: {rx_bytes, rx_packets, tx_bytes, tx_packets}."""
        one = next(link for link in json.loads(self.parts["links"]) if link.get("ifname") == name)
        counts = one.get("stats64") or one["stats"]
        return {f"{way}_{what}": counts[way][what] for way in ("rx", "tx") for what in ("bytes", "packets")}

    def dev(self, name):
        """Errors and drops of both ways together, by /proc/net/dev."""
        line = next(line for line in self.parts["dev"].splitlines() if line.strip().startswith(f"{name}:"))
        counts = [int(word) for word in line.split(":", 1)[1].split()]
        return {"errors": counts[2] + counts[10], "drops": counts[3] + counts[11]}

    def cpu(self, number):
        """(busy, stolen) seconds of one of dom0's CPUs."""
        row = next(line.split() for line in self.parts["stat"].splitlines() if line.startswith(f"cpu{number} "))
        user, nice, system, _, _, irq, softirq, steal = (int(word) for word in row[1:9])
        return (user + nice + system + irq + softirq) / 100, steal / 100

    def meminfo(self, name):
        return int(re.search(rf"^{name}:\s*(\d+) kB$", self.parts["meminfo"], re.M)[1]) * 1024

    def disks(self):
        """{name: (bytes read, bytes written, reads, writes)}, partitions too."""
        rows = [line.split() for line in self.parts["diskstats"].splitlines() if line.strip()]
        return {row[2]: (512 * int(row[5]), 512 * int(row[9]), int(row[3]), int(row[7])) for row in rows}

    def vbd(self, domid, device):
        """{file: count} of the back-end's statistics."""
        start = f"/sys/bus/xen-backend/devices/vbd-{domid}-{device}/statistics/"
        lines = [line.split() for line in self.parts["vbds"].splitlines() if line.startswith(start)]
        return {path.removeprefix(start): int(count) for path, count in lines}


class Sweep:
    """What stats_latest answered."""

    def __init__(self, answer):
        self.at = datetime.datetime.fromisoformat(answer["time"]).timestamp()
        self.objects = {one["object"]: one for one in answer["objects"]}

    def value(self, thing, metric, instance=""):
        """None: it is not told."""
        figures = self.objects[thing]["figures"]
        is_it = (one["value"] for one in figures if one["metric"] == metric and (one.get("instance") or "") == instance)
        return next(is_it, None)

    def instances(self, thing, metric):
        return [one.get("instance") or "" for one in self.objects[thing]["figures"] if one["metric"] == metric]


class Statistics(LabCase):
    def look(self, domid=0):
        return Look(self.node.sh(LOOK % domid))

    def sweep(self, after):
        """The first sweep that we see which began after this time of dom0's clock."""

        def began_since():
            sweep = Sweep(self.proxy.stats_latest({}))
            return sweep if sweep.at >= after else None

        return wait_for("a sweep", began_since, 120, 0.5)

    def looked_at(self, domid):
        """A look, a sweep after it, and a look after that."""
        before = self.look(domid)
        sweep = self.sweep(before.ended)
        return before, sweep, self.look(domid)

    def now(self):
        return float(self.node.sh("echo $EPOCHREALTIME"))

    def lies(self, what, before, value, after, apart=0.0):
        """`apart`: how much the tool and we may differ for what each can tell."""
        self.assertIsNotNone(value, what)
        self.assertGreaterEqual(value, before - apart, what)
        self.assertLessEqual(value, after + apart, what)

    def started(self, name, **how):
        vm, _ = self.create(name, **how)
        self.proxy.start_vm(REPO, vm)
        return f"vm/{vm}", self.agent.domains()[name][0]


class Agreeing(Statistics):
    def test_figures_of_a_guest_and_of_its_host_are_those_of_dom0s_tools(self):
        guest, domid = self.started("counted")
        self.up("counted")
        # Once it has ticked again, it has written to its disk.
        self.ticks_on("counted")
        before, sweep, after = self.looked_at(domid)
        self.assertEqual(sweep.objects[guest]["domid"], domid)
        self.assertEqual(sweep.objects[guest]["name"], "counted")
        self.of_domain(guest, domid, before, sweep, after)
        self.of_domain("dom0", 0, before, sweep, after)
        self.of_vif(guest, f"vif{domid}.0", before, sweep, after)
        self.of_vbd(guest, domid, before, sweep, after)
        self.of_memory(guest, before, sweep, after)
        self.of_dom0(before, sweep, after)
        self.of_links(before, sweep, after)
        self.of_disks(before, sweep, after)

    def of_domain(self, thing, domid, before, sweep, after):
        (memory, vcpus, cpu_s), (memory_then, vcpus_then, cpu_s_then) = before.domain(domid), after.domain(domid)
        self.lies("CPU time", cpu_s, sweep.value(thing, "cpu_time"), cpu_s_then, 0.1)
        low, high = sorted((memory, memory_then))
        # xl rounds down.
        self.lies("memory in MiB", low, sweep.value(thing, "memory") / MIB, high + 1)
        self.lies("CPUs", min(vcpus, vcpus_then), sweep.value(thing, "vcpus"), max(vcpus, vcpus_then))

    def of_vif(self, guest, link, before, sweep, after):
        counts, counts_then = before.link(link), after.link(link)
        for what in ("bytes", "packets"):
            # What dom0 received the guest has sent.
            self.lies(what, counts[f"rx_{what}"], sweep.value(guest, f"vif_tx_{what}", "0"), counts_then[f"rx_{what}"])
            self.lies(what, counts[f"tx_{what}"], sweep.value(guest, f"vif_rx_{what}", "0"), counts_then[f"tx_{what}"])
        counts, counts_then = before.dev(link), after.dev(link)
        for what in ("errors", "drops"):
            self.lies(what, counts[what], sweep.value(guest, f"vif_{what}", "0"), counts_then[what])
        self.assertEqual(sweep.instances(guest, "vif_rx_bytes"), ["0"])

    def of_vbd(self, guest, domid, before, sweep, after):
        counts, counts_then = before.vbd(domid, 51712), after.vbd(domid, 51712)
        self.assertTrue(counts, "the kernel serves xvda")
        for metric, file, bytes_each in (
            ("vbd_read_bytes", "rd_sect", 512),
            ("vbd_written_bytes", "wr_sect", 512),
            ("vbd_reads", "rd_req", 1),
            ("vbd_writes", "wr_req", 1),
        ):
            value = sweep.value(guest, metric, "51712")
            self.lies(metric, counts[file] * bytes_each, value, counts_then[file] * bytes_each)
        # It writes at each tick.
        self.assertGreater(sweep.value(guest, "vbd_writes", "51712"), 0)

    def of_memory(self, guest, before, sweep, after):
        self.assertEqual(sweep.value(guest, "memory_target"), int(before.parts["target"]) * 1024)
        self.assertGreaterEqual(sweep.value(guest, "memory_max"), sweep.value(guest, "memory_target"))
        self.assertEqual(int(sweep.value("host", "host_memory_total") / MIB), before.info("total_memory"))
        low, high = sorted((before.info("free_memory"), after.info("free_memory")))
        self.lies("free MiB", low, sweep.value("host", "host_memory_free") / MIB, high + 1)
        self.assertEqual(sweep.value("host", "host_domains"), len(self.agent.domains()))

    def of_dom0(self, before, sweep, after):
        for number in sweep.instances("host", "dom0_cpu_busy"):
            (busy, steal), (busy_then, steal_then) = before.cpu(number), after.cpu(number)
            self.lies("busy", busy, sweep.value("host", "dom0_cpu_busy", number), busy_then)
            self.lies("stolen", steal, sweep.value("host", "dom0_cpu_steal", number), steal_then)
        self.assertIn("0", sweep.instances("host", "dom0_cpu_busy"))
        self.assertEqual(sweep.value("host", "dom0_memory_total"), before.meminfo("MemTotal"))
        low, high = sorted((before.meminfo("MemAvailable"), after.meminfo("MemAvailable")))
        # The tools themselves take some and give it back.
        self.lies("available", low, sweep.value("host", "dom0_memory_available"), high, 64 * MIB)
        for metric, place in (("host_load_1m", 0), ("host_load_5m", 1), ("host_load_15m", 2)):
            loads = sorted(float(look.parts["loadavg"].split()[place]) for look in (before, after))
            # It rises and falls between two looks, by at most what one runnable program more or less makes in their time.
            self.lies(metric, loads[0], sweep.value("host", metric), loads[1], 1.0)

    def of_links(self, before, sweep, after):
        told = set(sweep.instances("host", "link_rx_bytes"))
        links = [link["ifname"] for link in json.loads(before.parts["links"])]
        self.assertEqual(told, {name for name in links if name != "lo" and not name.startswith("vif")})
        self.assertIn("xenbr0", told)
        for name in told:
            counts, counts_then = before.link(name), after.link(name)
            for what in ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets"):
                self.lies(f"{name} {what}", counts[what], sweep.value("host", f"link_{what}", name), counts_then[what])
            counts, counts_then = before.dev(name), after.dev(name)
            for what in ("errors", "drops"):
                self.lies(f"{name} {what}", counts[what], sweep.value("host", f"link_{what}", name), counts_then[what])

    def of_disks(self, before, sweep, after):
        disks, disks_then = before.disks(), after.disks()
        told = sweep.instances("host", "disk_reads")
        self.assertTrue(told)
        self.assertFalse([name for name in told if name.startswith(("loop", "ram"))])
        for name in told:
            for place, metric in enumerate(("disk_read_bytes", "disk_written_bytes", "disk_reads", "disk_writes")):
                value = sweep.value("host", metric, name)
                self.lies(f"{name} {metric}", disks[name][place], value, disks_then[name][place])


class BesideXentop(Statistics):
    def xentop(self, name):
        """The last of two rounds: {column: number} of a guest, which has no blank in any column."""
        lines = self.node.sh(f"TERM=dumb {XENTOP} -b -i 2 -d 1 -f").splitlines()
        head = next(line for line in lines if line.split()[:1] == ["NAME"]).split()
        row = [line.split() for line in lines if line.split()[:1] == [name]][-1]
        self.assertEqual(len(row), len(head), row)
        return {column: float(word) for column, word in zip(head, row) if re.fullmatch(r"[\d.]+", word)}

    def test_figures_of_a_guest_are_those_of_xentop(self):
        guest, _ = self.started("topped")
        self.up("topped")
        before = self.xentop("topped")
        sweep = self.sweep(self.now())
        after = self.xentop("topped")
        # Whole seconds, rounded either way.
        self.lies("CPU(sec)", before["CPU(sec)"], sweep.value(guest, "cpu_time"), after["CPU(sec)"], 1)
        low, high = sorted((before["MEM(k)"], after["MEM(k)"]))
        self.lies("MEM(k)", low, sweep.value(guest, "memory") / 1024, high)
        # It counts those that the VM was built with.
        self.assertLessEqual(sweep.value(guest, "vcpus"), before["VCPUS"])
        for column, metric in (("VBD_RD", "vbd_reads"), ("VBD_WR", "vbd_writes")):
            self.lies(column, before[column], sweep.value(guest, metric, "51712"), after[column])
        for column, metric in (("VBD_RSECT", "vbd_read_bytes"), ("VBD_WSECT", "vbd_written_bytes")):
            self.lies(column, before[column], sweep.value(guest, metric, "51712") / 512, after[column])


class Counting(Statistics):
    def test_counters_never_fall_and_the_cpus_are_busy_with_what_domains_use(self):
        self.started("counts")
        self.up("counts")
        first = self.sweep(self.now())
        self.ticks_on("counts")
        then = self.sweep(first.at + 15)
        passed_s = then.at - first.at
        counters = 0
        for thing, one in first.objects.items():
            for figure in one["figures"]:
                metric, instance = figure["metric"], figure.get("instance") or ""
                counts = metric == "cpu_time" or re.search(r"_(busy|steal|bytes|packets|errors|drops|reads|writes)$", metric)
                if thing in then.objects and counts:
                    value = then.value(thing, metric, instance)
                    # A link or disk of somebody else's may have gone.
                    if value is not None:
                        counters += 1
                        self.assertGreaterEqual(value, figure["value"], f"{thing} {metric} {instance}")
        self.assertGreater(counters, 20)

        def grown(metric):
            sums = [
                sum(one["value"] for thing in sweep.objects.values() for one in thing["figures"] if one["metric"] == metric)
                for sweep in (first, then)
            ]
            return sums[1] - sums[0]

        cpus = len(then.instances("host", "host_cpu_busy"))
        self.assertEqual(cpus, self.look().info("nr_cpus"))
        busy_s, used_s = grown("host_cpu_busy"), grown("cpu_time")
        print(f"    in {passed_s:.1f} s {cpus} CPUs worked for {busy_s:.2f} s, domains used {used_s:.2f} s", flush=True)
        self.assertLessEqual(busy_s, cpus * passed_s * 1.02 + 0.5)
        # Xen's own work is nobody's; the two are not read at quite the same moment.
        self.assertAlmostEqual(busy_s, used_s, delta=0.2 * cpus * passed_s + 0.5)

    @from_form("brief")
    def test_a_vm_that_starts_again_has_another_domid_and_counts_anew(self):
        guest, domid = self.started("again", disk=False, vif=False)
        before = self.sweep(self.now())
        self.proxy.stop_vm(REPO, guest.removeprefix("vm/"), True)
        self.assertNotIn(guest, self.sweep(self.now()).objects)
        self.proxy.start_vm(REPO, guest.removeprefix("vm/"))
        after = self.sweep(self.now())
        self.assertEqual(before.objects[guest]["domid"], domid)
        self.assertEqual(after.objects[guest]["domid"], self.agent.domains()["again"][0])
        self.assertNotEqual(after.objects[guest]["domid"], domid)


class Lying(Statistics):
    # A thousand times what is no number, the last one a byte that no text has.
    FLOOD = r"""
for n in $(seq 250); do
  xenstore-write %(free)s "lie $n" %(free)s -1 %(free)s 99999999999999999999999 %(free)s ''
done
xenstore-write %(free)s $'\xff\x01'"""

    def tells(self, domid, total_kib, free_kib):
        at = f"/local/domain/{domid}/data/meminfo_"
        self.node.sh(f"xenstore-write {at}total {total_kib} {at}free {free_kib}")

    def test_a_guest_that_writes_garbage_changes_only_its_own_figures(self):
        # Bare, and need not come up: it is we who write for them.
        liar, liars = self.started("liar", disk=False, vif=False)
        honest, honests = self.started("honest", disk=False, vif=False)
        self.tells(liars, 100_000, 50_000)
        self.tells(honests, 90_000, 40_000)
        sweep = self.sweep(self.now())
        self.assertEqual(sweep.value(liar, "guest_memory_free"), 50_000 * 1024)
        self.assertEqual(sweep.value(honest, "guest_memory_free"), 40_000 * 1024)
        target = sweep.value(honest, "memory_target")
        self.node.sh(self.FLOOD % {"free": f"/local/domain/{liars}/data/meminfo_free"})
        sweep = self.sweep(self.now())
        self.assertIsNone(sweep.value(liar, "guest_memory_free"))
        self.assertEqual(sweep.value(liar, "guest_memory_total"), 100_000 * 1024)
        self.tells(liars, 10**9, 10**8)
        sweep = self.sweep(self.now())
        self.assertIsNone(sweep.value(liar, "guest_memory_free"))
        self.assertIsNone(sweep.value(liar, "guest_memory_total"), "more than it may have")
        self.assertIsNotNone(sweep.value(liar, "cpu_time"))
        self.assertEqual(sweep.value(honest, "guest_memory_free"), 40_000 * 1024)
        self.assertEqual(sweep.value(honest, "guest_memory_total"), 90_000 * 1024)
        self.assertEqual(sweep.value(honest, "memory_target"), target)
        self.tells(liars, 100_000, 60_000)
        self.assertEqual(self.sweep(self.now()).value(liar, "guest_memory_free"), 60_000 * 1024)
