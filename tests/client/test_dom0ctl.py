"""dom0ctl as an operator uses it: every command, both outputs, every exit code."""

import json
import re
import shlex
import subprocess

from harness import DISKS, MANAGER, REPO, Daemon, DaemonCase, binary, mac, new_vm, run, wait_for

OK, FAILED, USAGE, NOT_FOUND, CONFLICT, TIMED_OUT, UNREACHABLE = 0, 1, 2, 3, 4, 5, 7


def subcommands(*path):
    """The commands below `path`, as --help lists them."""
    text = run(binary("dom0ctl"), *path, "--help").stdout
    section = re.search(r"\nCommands:\n((?:  .*\n)+)", text)
    names = re.findall(r"^  (\S+)", section[1], re.M) if section else []
    # `verb help VERB` is a command of its own; everywhere else `help` is clap's.
    return [name for name in names if name != "help" or path == ("verb",)]


class CtlCase(DaemonCase):
    def ctl(self, *arguments, code=OK, **options):
        done = self.daemon.ctl(*arguments, **options)
        self.assertEqual(done.returncode, code, f"{arguments}\n{done.stdout}{done.stderr}")
        if code != OK:
            self.assertTrue(done.stderr.startswith(("dom0ctl: ", "error: ")), done.stderr)
        self.assertNotIn("panicked", done.stderr)
        return done.stdout

    def json(self, *arguments, **options):
        return json.loads(self.ctl("-o", "json", *arguments, **options))

    def file(self, name, text):
        path = self.daemon.folder / name
        path.write_text(text)
        return str(path)

    def new(self, name):
        vm, params = new_vm(name)
        self.ctl("vm", "create", self.file(f"{name}.json", json.dumps(params | {"repo_id": REPO})))
        return vm


class FirstCommand(CtlCase):
    def test_the_first_command_that_the_daemon_tells_works_as_it_is_told(self):
        told = re.search("^first command: (.*)$", self.daemon.log.read_text(), re.M)[1]
        self.assertIn("hostname", run(*shlex.split(told)).stdout)


class EveryCommand(CtlCase):
    """One operator's day. What it runs is written down and compared with what --help lists."""

    def setUp(self):
        self.ran = set()

    def both(self, *arguments):
        """The command as a table and as JSON; answers the JSON."""
        self.ran.add(arguments)
        self.assertTrue(self.ctl(*arguments).strip(), arguments)
        return self.json(*arguments)

    def do(self, *arguments, **options):
        self.ran.add(arguments)
        return self.ctl(*arguments, **options)

    def test_every_command_of_the_help_works_once(self):
        self.assertEqual(self.both("host", "show")["worlds"]["host"], "sim")
        self.assertTrue(self.both("certificate", "show")["pem"].startswith("-----BEGIN CERTIFICATE"))
        self.do("certificate", "renew")
        self.do("password", "set", "--file", self.file("new-password", "second Password\n"))
        self.assertEqual(self.daemon.proxy(password="second%20Password").echo("x"), "x")

        self.daemon.proxy(password="second%20Password").take_ownership(MANAGER, "")
        self.assertIn(MANAGER, str(self.both("ownership", "show")))
        self.do("ownership", "release")
        self.assertNotIn(MANAGER, str(self.both("ownership", "show")))

        toml = self.file("vm.toml", f'name = "toml"\nmemory = 512\nvcpus = 1\nrepo_id = "{REPO}"\n'
            f'disk = ["file:{DISKS}/toml.raw,xvda,w"]\nvif = ["mac={mac()},bridge=xenbr0"]\n'
            'vfb = ["type=vnc,vnclisten=127.0.0.1"]\n')  # fmt: skip
        self.do("vm", "create", toml)
        (vm,) = self.both("vm", "list")
        self.assertEqual((vm["name"], vm["state"]), ("toml", "off"))
        self.assertEqual(self.both("vm", "show", "toml")["uuid"], vm["uuid"])
        self.assertEqual(self.both("vm", "show", vm["uuid"])["name"], "toml")
        for command, state in [("start", "running"), ("pause", "paused"), ("unpause", "running"), ("save", "saved"),
                               ("restore", "running"), ("reboot", "running"), ("stop", "off")]:  # fmt: skip
            self.do("vm", command, "toml")
            self.assertEqual(self.json("vm", "show", "toml")["state"], state, command)
        self.do("vm", "config", "toml", "--set", "memory=1024", "--set", "OVM_description=said by an operator")
        config = self.both("vm", "config", "toml")
        self.assertEqual((config["memory"], config["OVM_description"]), (1024, "said by an operator"))
        self.ctl("vm", "start", "toml")
        self.ctl("vm", "save", "toml", "--checkpoint")
        self.assertEqual(self.json("vm", "show", "toml")["state"], "running")
        self.ctl("vm", "stop", "toml", "--force")
        plan = self.json("vm", "start", "toml", "--dry-run")
        self.assertTrue(plan["steps"])
        self.assertEqual(self.json("vm", "show", "toml")["state"], "off")
        job = self.json("vm", "start", "toml", "--no-wait", "--deadline", "60", "--idempotency-key", "k")
        self.assertEqual(self.json("vm", "start", "toml", "--no-wait", "--deadline", "60", "--idempotency-key", "k"), job)
        number = str(job if isinstance(job, int) else job["id"])
        self.do("job", "wait", number)
        shown = self.both("job", "show", number)
        self.assertEqual((shown["verb"], shown["state"]), ("start_vm", "succeeded"))
        self.assertIn(int(number), [one["id"] for one in self.both("job", "list")])
        self.assertEqual(self.json("job", "list", "--verb", "reboot_vm", "--limit", "1")[0]["verb"], "reboot_vm")
        self.daemon.deafen(vm["uuid"])
        stopping = self.json("vm", "stop", "toml", "--no-wait")
        stopping = stopping if isinstance(stopping, int) else stopping["id"]
        self.do("call", "echo", "5", "x", code=USAGE)
        self.assertEqual(self.both("call", "echo", '{"a": [1, null, true]}'), {"a": [1, None, True]})
        wait_for("the lock", lambda: any(lock["job"] == stopping for lock in self.json("lock", "list")))
        self.assertTrue(self.both("lock", "list"))
        self.do("job", "cancel", str(stopping))
        self.do("job", "wait", str(stopping), code=FAILED)
        self.assertEqual(self.json("job", "show", str(stopping))["state"], "cancelled")
        self.ctl("vm", "stop", "toml", "--force")

        self.do("vm", "autostart", "toml", "on", "--order", "7", "--delay", "30")
        self.do("vm", "autostart", "toml", "on", "--delay", "0")
        shown = self.json("vm", "show", "toml")
        self.assertEqual([shown[key] for key in ("autostart", "autostart_order", "autostart_delay")], [True, 7, 0])
        self.do("vm", "autostart", "toml", "off")
        self.assertIs(self.json("vm", "show", "toml")["autostart"], False)
        found = self.both("vm", "adopted")
        self.assertEqual((found["boot"], found["counts"]["adopted"]), ("same", 0))

        self.do("peer", "add", "192.0.2.7", "ab" * 32)
        self.assertEqual([peer["address"] for peer in self.both("peer", "list")], ["192.0.2.7:8899"])
        self.do("vm", "migrate", "toml", "192.0.2.8", code=NOT_FOUND)
        self.do("vm", "migrate", "toml", "192.0.2.7", "--no-live", code=CONFLICT)  # it is off
        self.do("peer", "remove", "192.0.2.7")
        self.do("peer", "remove", "192.0.2.7", code=NOT_FOUND)
        self.assertEqual(self.both("migration", "list"), [])
        self.do("migration", "resolve", "toml", "destroy", code=NOT_FOUND)

        declared = self.file("network.toml", '[links.br5]\nkind = "bridge"\nports = ["eth0.5"]\n'
            '[links."eth0.5"]\nkind = "vlan"\nparent = "eth0"\nid = 5\n')  # fmt: skip
        self.assertEqual(self.both("network", "plan", declared)["count"], 5)
        self.do("network", "apply", declared, "--confirm-within", "600")
        self.do("network", "rollback")
        self.do("network", "rollback", code=FAILED)
        self.do("network", "apply", declared, "--confirm-within", "600")
        self.do("network", "confirm", "1", code=FAILED)
        self.do("network", "confirm")
        self.assertEqual(self.both("network", "show")["links"]["eth0.5"]["controller"], "br5")
        self.do("network", "discover")
        self.assertEqual([one["ending"] for one in self.both("network", "history")][:2], ["applied", "rolled_back"])
        self.assertIn("br5", self.both("network", "diagram"))
        nothing = self.file("nothing.json", "{}")
        self.do("network", "apply", nothing)
        self.assertNotIn("br5", self.json("network", "show")["links"])
        wrong = self.file("wrong.json", '{"links": {"br5": {"kind": "bridge", "mtu": 1}}}')
        self.do("network", "plan", wrong, code=USAGE)

        self.both("manager", "show")
        self.do("manager", "test", code=FAILED)
        self.assertEqual(self.both("stats", "show")["objects"][0]["object"], "host")
        self.assertIn("host", self.both("stats", "list"))
        wait_for("two sweeps", lambda: any(self.json("stats", "graph", "host", "host_load_1m")["values"]))
        self.both("stats", "graph", "host", "host_load_1m")
        self.both("top")

        self.do("vm", "delete", "toml")
        self.assertEqual(self.json("vm", "list"), [])
        events = self.both("event", "list", "--limit", "5")
        newest = max(event["number"] for event in events["events"])
        self.do("event", "ack", str(newest))
        watched = self.do("-o", "json", "event", "watch", "--since", "0", "--count", "3")
        self.assertEqual(len([json.loads(line) for line in watched.splitlines()]), 3, watched)
        self.assertTrue(self.do("event", "watch", "--since", "0", "--count", "3").strip())
        token = self.json("call", "event_list", '{"since": 0, "limit": 2}')["token"]
        third = json.loads(self.do("-o", "json", "event", "watch", "--token", token, "--count", "1"))
        self.assertEqual(third["number"], 3)
        self.assertEqual(self.json("event", "list", "--token", token, "--limit", "1")["events"], [third])

        self.assertGreater(len(self.both("verb", "list")), 40)
        self.assertEqual({verb["family"] for verb in self.json("verb", "list", "--family", "job")}, {"job"})
        self.assertEqual(self.both("verb", "help", "start_vm")["name"], "start_vm")
        self.both("store", "check")
        for shell in ("bash", "zsh", "fish"):
            self.assertIn("dom0ctl", self.do("completion", shell))

        # The rest of the store's commands need a daemon that is stopped.
        self.do("store", "export", "--state-dir", str(self.daemon.state), "-", code=CONFLICT)
        self.daemon.process.terminate()
        self.daemon.process.wait(60)
        export = str(self.daemon.folder / "export")
        self.do("store", "export", "--state-dir", str(self.daemon.state), export)
        self.do("store", "import", "--state-dir", str(self.daemon.folder / "again"), export)
        self.assertTrue(json.loads(self.do("-o", "json", "store", "check", "--state-dir", str(self.daemon.folder / "again"))))
        self.assertLessEqual({("vm", "create"), ("store", "import"), ("completion",)}, self.listed())
        self.assertEqual(self.listed() - self.commands(), set(), "in the help and not run here")
        self.daemon.start()

    def listed(self):
        families = subcommands()
        return {(family, name) for family in families for name in subcommands(family)} | {
            (family,) for family in families if not subcommands(family)
        }

    def commands(self):
        words = [tuple(w for w in command if w not in ("-o", "json")) for command in self.ran]
        return {command[:2] for command in words} | {command[:1] for command in words}


class ExitCodes(CtlCase):
    def test_3_what_is_not_there(self):
        self.ctl("vm", "show", "nobody", code=NOT_FOUND)
        self.ctl("vm", "start", "11111111-2222-3333-4444-555555555555", code=NOT_FOUND)
        self.ctl("job", "show", "987654", code=NOT_FOUND)
        self.ctl("verb", "help", "fly", code=NOT_FOUND)
        self.ctl("call", "get_vm_config", REPO, "11111111-2222-3333-4444-555555555555", code=NOT_FOUND)

    def test_2_wrong_use(self):
        for wrong in (["fly"], ["vm", "show"], ["call", "fly"], ["call", "start_vm", "x"], ["job", "show", "x"], ["--output", "xml", "vm", "list"],
                      ["vm", "config", "x", "--set", "y"], ["vm", "autostart", "x"], ["vm", "autostart", "x", "maybe"],
                      ["vm", "autostart", "x", "on", "--order", "10000"]):  # fmt: skip
            self.assertEqual(self.ctl(*wrong, code=USAGE), "", wrong)

    def test_7_no_daemon(self):
        done = run(binary("dom0ctl"), "--socket", str(self.daemon.folder / "none.sock"), "host", "show")
        self.assertEqual((done.returncode, done.stdout), (UNREACHABLE, ""))
        self.assertIn("none.sock", done.stderr)

    def test_1_a_change_that_fails(self):
        self.ctl("vm", "create", self.file("bad.json", '{"name": 5'), code=FAILED)
        self.ctl("vm", "create", "/nowhere/vm.toml", code=FAILED)
        _, params = new_vm("huge")
        self.ctl("vm", "create", self.file("huge.json", json.dumps(params | {"repo_id": REPO, "memory": 10_000_000})))
        self.ctl("vm", "start", "huge", code=FAILED)
        newest = self.json("job", "list", "--verb", "start_vm")[0]
        self.assertEqual(newest["state"], "failed")
        self.assertEqual(newest["fault"]["name"], "OUT_OF_MEMORY")
        self.ctl("job", "wait", str(newest["id"]), code=FAILED)

    def test_4_what_is_in_the_way(self):
        self.new("busy")
        self.ctl("vm", "start", "busy")
        self.ctl("vm", "start", "busy", code=CONFLICT)
        self.ctl("vm", "delete", "busy", code=CONFLICT)
        _, params = new_vm("busy")
        self.ctl("vm", "create", self.file("again.json", json.dumps(params | {"repo_id": REPO})), code=CONFLICT)
        self.ctl("vm", "stop", "busy", "--force")

    def test_5_patience_ends_and_the_job_goes_on(self):
        job = self.json("call", "job_submit", "sleep", "[600]")
        self.ctl("--timeout", "1", "job", "wait", str(job), code=TIMED_OUT)
        self.ctl("--timeout", "1", "call", "sleep", "600", code=TIMED_OUT)
        self.assertEqual(self.json("job", "show", str(job))["state"], "running")
        for one in self.json("job", "list", "--state", "running"):
            self.ctl("job", "cancel", str(one["id"]))

    def test_a_refused_change_says_why_on_stderr_and_as_json_shows_its_job(self):
        self.new("why")
        done = self.daemon.ctl("-o", "json", "vm", "pause", "why")
        self.assertEqual((done.returncode, json.loads(done.stdout)["state"]), (CONFLICT, "failed"))
        done = self.daemon.ctl("vm", "pause", "why")
        self.assertEqual((done.returncode, done.stdout), (CONFLICT, ""))
        self.assertIn("VM_STATE", done.stderr)
        self.assertNotIn("exceptions.Exception", done.stderr, "the dialect's prefix is for its clients")


class Shells(CtlCase):
    def test_bash_loads_the_completion_and_completes_a_command(self):
        script = self.file("completion.bash", self.ctl("completion", "bash"))
        self.assertEqual(run("bash", "-n", script).returncode, 0)
        ask = (
            f"source {script}; COMP_WORDS=(dom0ctl vm sta); COMP_CWORD=2; COMP_LINE='dom0ctl vm sta'; COMP_POINT=14; "
            '_dom0ctl dom0ctl sta vm; echo "${COMPREPLY[@]}"'
        )
        done = run("bash", "-c", ask)
        self.assertEqual((done.stdout.split(), done.returncode), (["start"], 0), done.stderr)

    def test_a_reader_that_leaves_early_is_no_error(self):
        command = f"{binary('dom0ctl')} --socket {self.daemon.socket} verb list | head -n 1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_events_are_watched_as_they_come(self):
        with subprocess.Popen(
            [binary("dom0ctl"), "--socket", self.daemon.socket, "--timeout", "30", "-o", "json", "event", "watch", "--count", "1"],
            stdout=subprocess.PIPE, text=True,
        ) as watch:  # fmt: skip
            wait_for("the watcher to wait", lambda: self.proxy.host_get()["agent"]["connections"] >= 2)
            end = wait_for("an event", lambda: self.rename() and watch.poll() is not None)
            self.assertTrue(end)
            self.assertEqual(len(watch.stdout.read().splitlines()), 1)
            self.assertEqual(watch.returncode, 0)

    def rename(self):
        self.proxy.update_server_roles("xen,utility")
        return True


class SecondDaemon(CtlCase):
    def test_two_daemons_on_one_machine_do_not_meet(self):
        other = Daemon()
        self.addCleanup(other.stop)
        self.new("mine")
        self.assertEqual(json.loads(other.ctl("-o", "json", "vm", "list").stdout), [])
