"""Introspection and multicall, as XML-RPC clients know them."""

import xmlrpc.client

from harness import REPO, DaemonCase, new_vm

KINDS = {"int", "string", "boolean", "array", "struct", "any", "nil"}


class Introspection(DaemonCase):
    def test_every_verb_has_help_and_signatures_that_agree_with_verb_list(self):
        methods = self.proxy.system.listMethods()
        self.assertEqual(methods, sorted(set(methods)))
        verbs = {verb["name"]: verb for verb in self.proxy.verb_list()}
        self.assertEqual(sorted(verbs), methods)
        for name in methods:
            with self.subTest(name):
                verb = verbs[name]
                help_text = self.proxy.system.methodHelp(name)
                self.assertTrue(help_text.startswith(verb["help"]) and verb["help"])
                for param in verb["params"]:
                    self.assertIn(param["name"], help_text)
                signatures = self.proxy.system.methodSignature(name)
                types = [param["type"] for param in verb["params"]]
                needed = sum(not param["optional"] for param in verb["params"])
                self.assertEqual(signatures, [[verb["returns"], *types[:n]] for n in range(needed, len(types) + 1)])
                self.assertLessEqual({kind for kind in types}, KINDS)

    def test_the_dialects_verbs_of_this_release_are_there_under_their_names(self):
        methods = set(self.proxy.system.listMethods())
        dialect = """echo get_api_version sleep discover_server discover_hardware get_last_boot_time get_datetime
            set_datetime get_timezone set_timezone get_ntp set_ntp enable_ntp disable_ntp get_log get_support_files
            get_system_disk_space update_agent_password update_server_roles take_ownership release_ownership create_vm
            configure_vm unconfigure_vm get_vm_config set_vm_config delete_vm start_vm stop_vm reboot_vm pause_vm
            unpause_vm save_vm restore_vm list_vm list_vms configure_vm_ha sysrq_vm trigger_vm send_to_guest
            dump_vm_core list_vm_core delete_vm_core sys_reboot sys_shutdown"""
        self.assertEqual(set(dialect.split()) - methods, set())

    def test_introspection_of_what_is_not_there_is_a_fault(self):
        for ask in (self.proxy.system.methodHelp, self.proxy.system.methodSignature):
            self.assertFault("UNKNOWN_VERB", ask, "fly")
        self.assertEqual(self.assertFault("UNKNOWN_VERB", self.proxy.fly).faultCode, 1)
        self.assertIn("start_vm", self.assertFault("UNKNOWN_VERB", self.proxy.StartVM).faultString)

    def test_wrong_parameters_are_named_in_the_fault(self):
        self.assertFault("start_vm takes (repo_id, vm_id)", self.proxy.start_vm, REPO)
        self.assertFault("vm_id is of the wrong type", self.proxy.start_vm, REPO, 5)
        self.assertFault("vm_id", self.proxy.start_vm, REPO, "../../etc")


class Multicall(DaemonCase):
    def test_many_calls_in_one_have_each_its_answer_or_fault_in_order(self):
        vm, params = new_vm("multi")
        calls = [
            ("create_vm", [REPO, vm, params]),
            ("start_vm", [REPO, vm]),
            ("list_vms", []),
            ("start_vm", [REPO, vm]),
            ("fly", []),
            ("vm_get", ["0b" * 16]),
            ("system.multicall", [[]]),
            ("echo", ["last"]),
        ]
        answers = self.proxy.system.multicall([{"methodName": name, "params": p} for name, p in calls])
        self.assertEqual(len(answers), len(calls))
        self.assertEqual(answers[0], [None])
        self.assertEqual(answers[1], [None])
        self.assertEqual([d["name"] for d in answers[2][0]], ["Domain-0", "multi"])
        self.assertEqual(answers[3]["faultCode"], 1)
        self.assertIn("VM_STATE", answers[3]["faultString"])
        self.assertEqual(answers[4]["faultCode"], 1)
        self.assertEqual(answers[5]["faultCode"], 200)
        self.assertIn("cannot be called by itself", answers[6]["faultString"])
        self.assertEqual(answers[7], ["last"])

    def test_pythons_own_multicall_works(self):
        many = xmlrpc.client.MultiCall(self.proxy)
        many.echo(1)
        many.get_api_version()
        many.fly()
        answers = many()
        self.assertEqual((answers[0], answers[1]), (1, [3]))
        self.assertFault("UNKNOWN_VERB", lambda: answers[2])

    def test_what_is_no_call_is_a_fault_in_its_place(self):
        answers = self.proxy.system.multicall([{"methodName": "echo", "params": "x"}, {}, "x"])
        self.assertEqual([answer["faultCode"] for answer in answers], [100] * 3)
        self.assertFault("calls", self.proxy.system.multicall, "x")


class MulticallLimits(DaemonCase):
    settings = "[wire]\nmax_answer_bytes = 65536\n[jobs]\nwait_limit_s = 2\n"

    def test_calls_after_too_many_bytes_are_not_made(self):
        vm, params = new_vm("bytes")
        calls = [("echo", ["x" * 30000]), ("echo", ["x" * 60000]), ("echo", ["y" * 3000]), ("create_vm", [REPO, vm, params])]
        answers = self.proxy.system.multicall([{"methodName": name, "params": given} for name, given in calls])
        self.assertEqual(answers[0], ["x" * 30000])
        self.assertIn("too big beside the others", answers[1]["faultString"])
        self.assertEqual(answers[2], ["y" * 3000])
        self.assertEqual(answers[3]["faultCode"], 701)
        self.assertIn("not called", answers[3]["faultString"])
        self.assertFault("VM_NOT_FOUND", self.proxy.vm_get, vm)

    def test_calls_after_the_time_are_not_made_and_none_waits_longer(self):
        vm, params = new_vm("late")
        calls = [("sleep", [60]), ("create_vm", [REPO, vm, params])]
        answers = self.proxy.system.multicall([{"methodName": name, "params": given} for name, given in calls])
        self.assertIn("JOB_STILL_RUNNING", answers[0]["faultString"])
        self.assertEqual(answers[1]["faultCode"], 702)
        self.assertFault("VM_NOT_FOUND", self.proxy.vm_get, vm)
        job = self.proxy.job_submit("sleep", [60])
        answers = self.proxy.system.multicall([{"methodName": "job_wait", "params": [job, 60]}])
        self.assertEqual(answers[0]["faultCode"], 702)
