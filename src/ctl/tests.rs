//! Commands on a fake daemon: what they ask, what they print and where, and how they end.

use super::fake::{Fake, Ran, Reply, ctl};
use super::{Cli, Exit};
use clap::{CommandFactory, Parser};
use serde_json::{Value as Json, json};

const WEB: &str = "0004fb00-0000-0000-0000-00000000000a";
const DB: &str = "0004fb00-0000-0000-0000-00000000000b";
const DB2: &str = "0004fb00-0000-0000-0000-00000000000c";
const REPO: &str = "0004fb0000030000aaaaaaaaaaaaaaaa";

fn vm(name: &str, uuid: &str, domid: Json) -> Json {
    json!({"uuid": uuid, "name": name, "state": "running", "repo_id": REPO, "memory_mib": 512, "vcpus": 2,
           "domid": domid, "ha": false})
}

fn vms() -> Json {
    json!([vm("web", WEB, json!(3)), vm("db", DB, Json::Null), vm("db", DB2, Json::Null)])
}

fn job_in(state: &str, fault: Json) -> Json {
    json!({"id": 12, "verb": "start_vm", "state": state, "about": "start web", "progress": 50, "step": "start",
           "fault": fault, "result": null, "waiting_for": []})
}

fn asserted(ran: &Ran, exit: Exit) {
    assert_eq!(ran.exit, exit, "stdout: {}\nstderr: {}", ran.stdout, ran.stderr);
}

#[test]
fn what_can_be_typed_is_well_formed() {
    Cli::command().debug_assert();
    for bad in [vec!["vm"], vec!["vm", "start"], vec!["host", "fly"], vec!["--timeout", "0", "host", "show"]]
    {
        assert!(Cli::try_parse_from([vec!["dom0ctl"], bad.clone()].concat()).is_err(), "{bad:?}");
    }
}

#[tokio::test]
async fn a_list_is_a_table_with_a_row_for_each_vm() {
    let fake =
        Fake::default().answers("vm_list", json!([vm("web", WEB, json!(3)), vm("db", DB, Json::Null)]));
    let ran = ctl(&fake, &["vm", "list"]).await;
    asserted(&ran, Exit::Ok);
    let expected = "\
NAME  STATE    MIB  VCPUS  DOMID  HA  UUID
web   running  512  2      3      no  0004fb00-0000-0000-0000-00000000000a
db    running  512  2      -      no  0004fb00-0000-0000-0000-00000000000b
";
    assert_eq!(ran.stdout, expected);
    assert_eq!(ran.stderr, "");
}

#[tokio::test]
async fn json_is_what_the_daemon_answered() {
    let fake = Fake::default().answers("vm_list", vms());
    let ran = ctl(&fake, &["-o", "json", "vm", "list"]).await;
    assert_eq!(serde_json::from_str::<Json>(&ran.stdout).unwrap(), vms());
}

#[tokio::test]
async fn a_struct_is_names_with_values_and_longer_things_below() {
    let host = json!({"hostname": "h1", "xen": {"version": "4.19", "free": 12}, "flags": ["a", "b"],
        "links": [{"name": "eth0", "up": true}], "pem": "one\ntwo\n", "empty": ""});
    let ran = ctl(&Fake::default().answers("host_get", host), &["host", "show"]).await;
    let expected = "\
empty
flags        a, b
hostname     h1
xen.free     12
xen.version  4.19

links:
NAME  UP
eth0  yes

pem:
one
two
";
    assert_eq!(ran.stdout, expected);
}

#[tokio::test]
async fn what_others_wrote_cannot_end_a_row_or_steer_the_terminal() {
    let evil = "x\nroot  running\u{1b}[2J\u{9b}31m\u{202e}";
    let bad = |text: &str| text.contains(['\u{1b}', '\u{9b}', '\u{202e}']);
    let ran =
        ctl(&Fake::default().answers("vm_list", json!([vm(evil, WEB, json!(1))])), &["vm", "list"]).await;
    assert!(!bad(&ran.stdout) && ran.stdout.lines().count() == 2, "{:?}", ran.stdout);
    let ran = ctl(&Fake::default().answers("host_get", json!({evil: evil})), &["host", "show"]).await;
    assert!(!bad(&ran.stdout), "{:?}", ran.stdout);
    let fake = Fake::default().then("host_get", Reply::Fault("INTERNAL: \u{1b}[2J\nhint: run this"));
    let ran = ctl(&fake, &["host", "show"]).await;
    assert!(!bad(&ran.stderr) && ran.stderr.lines().count() == 1, "{:?}", ran.stderr);
    let ran = ctl(&Fake::default().answers("get_log", json!(evil)), &["call", "get_log"]).await;
    assert!(!bad(&ran.stdout), "{:?}", ran.stdout);
}

#[tokio::test]
async fn a_vm_is_found_by_name_and_by_either_form_of_its_uuid() {
    for named in ["web", WEB, "0004FB0000000000000000000000000A"] {
        let fake = Fake::default().answers("vm_list", vms()).answers("vm_get", json!({"name": "web"}));
        let ran = ctl(&fake, &["vm", "show", named]).await;
        asserted(&ran, Exit::Ok);
        assert_eq!(fake.params(1), json!([WEB]));
    }
}

#[tokio::test]
async fn a_name_of_two_vms_is_refused_with_both_uuids_and_nothing_is_changed() {
    let ran = ctl(&Fake::default().answers("vm_list", vms()), &["vm", "stop", "db"]).await;
    asserted(&ran, Exit::Usage);
    assert!(ran.stderr.contains(DB) && ran.stderr.contains(DB2), "{}", ran.stderr);
    let ran = ctl(&Fake::default().answers("vm_list", vms()), &["vm", "stop", "none"]).await;
    asserted(&ran, Exit::NotFound);
    assert!(ran.stderr.contains("hint: dom0ctl vm list"), "{}", ran.stderr);
}

#[tokio::test]
async fn a_change_is_submitted_with_the_dialects_parameters_and_followed_to_its_end() {
    for (words, verb, params) in [
        (vec!["start", "web"], "start_vm", json!([REPO, WEB])),
        (vec!["stop", "web", "--force"], "stop_vm", json!([REPO, WEB, true])),
        (vec!["stop", "web"], "stop_vm", json!([REPO, WEB, false])),
        (vec!["reboot", "web"], "reboot_vm", json!([REPO, WEB, 3])),
        (vec!["pause", "web"], "pause_vm", json!([REPO, WEB])),
        (vec!["unpause", "web"], "unpause_vm", json!([REPO, WEB])),
        (vec!["save", "web", "--checkpoint"], "save_vm", json!([REPO, WEB, true])),
        (vec!["restore", "web"], "restore_vm", json!([REPO, WEB, false])),
        (vec!["delete", "web"], "delete_vm", json!([REPO, WEB])),
        (
            vec!["config", "web", "--set", "memory=1024", "--set", "name=w2"],
            "configure_vm",
            json!([REPO, WEB, {"memory": 1024, "name": "w2"}]),
        ),
    ] {
        let fake = Fake::default()
            .answers("vm_list", vms())
            .answers("job_submit", json!(12))
            .answers("job_wait", job_in("running", Json::Null))
            .answers("job_wait", job_in("succeeded", Json::Null));
        let ran = ctl(&fake, &[vec!["vm"], words].concat()).await;
        asserted(&ran, Exit::Ok);
        assert_eq!(fake.params(1), json!([verb, params, {}]));
        assert_eq!(ran.stdout, "");
        assert_eq!(ran.stderr, "job 12 succeeded\n");
    }
}

#[tokio::test]
async fn options_of_a_change_reach_the_job() {
    let fake = Fake::default().answers("vm_list", vms()).answers("job_submit", json!(12));
    let words = ["vm", "start", "web", "--no-wait", "--deadline", "60", "--idempotency-key", "k"];
    let ran = ctl(&fake, &words).await;
    asserted(&ran, Exit::Ok);
    assert_eq!(ran.stdout, "12\n");
    assert_eq!(fake.params(1)[2], json!({"deadline_s": 60, "idempotency_key": "k"}));
    let plan =
        json!({"verb": "start_vm", "locks": ["vm/a"], "steps": [{"name": "start", "about": "start it"}]});
    let fake = Fake::default().answers("vm_list", vms()).answers("job_submit", plan);
    let ran = ctl(&fake, &["vm", "start", "web", "--dry-run"]).await;
    assert_eq!(ran.stdout, "locks  vm/a\nverb   start_vm\n\nsteps:\nNAME   ABOUT\nstart  start it\n");
    assert_eq!(fake.params(1)[2], json!({"dry_run": true}));
}

#[tokio::test]
async fn a_job_that_fails_ends_with_the_code_of_its_fault_and_a_hint() {
    for (state, text, exit) in [
        ("failed", "VM_STATE: it runs already", Exit::Conflict),
        ("failed", "exceptions.Exception:VM_STATE: it runs already", Exit::Conflict),
        ("failed", "JOB_DEADLINE: over", Exit::TimedOut),
        ("failed", "REFUSED_UNSAFE: no proof", Exit::Unsafe),
        ("cancelled", "", Exit::Failed),
    ] {
        let fake = Fake::default().answers("job_wait", job_in(state, json!({"code": 1, "text": text})));
        let ran = ctl(&fake, &["job", "wait", "12"]).await;
        asserted(&ran, exit);
        assert!(ran.stderr.starts_with(&format!("dom0ctl: job 12 {state}")), "{}", ran.stderr);
        assert!(!ran.stderr.contains("exceptions."), "{}", ran.stderr);
    }
}

#[tokio::test(start_paused = true)]
async fn following_survives_a_restart_of_the_daemon_and_not_its_absence() {
    let fake = Fake::default()
        .then("job_wait", Reply::Unreachable)
        .then("job_wait", Reply::Fault("STOPPING: come back"))
        .then("job_wait", Reply::Unreachable)
        .answers("job_wait", job_in("succeeded", Json::Null));
    asserted(&ctl(&fake, &["job", "wait", "12"]).await, Exit::Ok);
    let fake = (0..161).fold(Fake::default(), |fake, _| fake.then("job_wait", Reply::Unreachable));
    let ran = ctl(&fake, &["job", "wait", "12"]).await;
    asserted(&ran, Exit::Unreachable);
    assert!(
        ran.stderr.contains("job 12 was accepted, and goes on when the daemon is back"),
        "{}",
        ran.stderr
    );
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_when_it_was_told_to_and_says_that_the_job_goes_on() {
    let fake = Fake::default().then("job_wait", Reply::Silence);
    asserted(&ctl(&fake, &["job", "wait", "12"]).await, Exit::TimedOut);
    // The first wait uses up the time that was given.
    let fake = Fake::default().then("job_wait", Reply::Late(job_in("running", Json::Null)));
    let ran = ctl(&fake, &["--timeout", "5", "job", "wait", "12"]).await;
    asserted(&ran, Exit::TimedOut);
    assert_eq!(fake.params(0), json!([12, 5]));
    assert!(
        ran.stderr.contains("it goes on") && ran.stderr.contains("hint: dom0ctl job wait 12"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn an_absent_daemon_is_told_with_its_socket_and_a_code_of_its_own() {
    let ran = ctl(&Fake::default().then("host_get", Reply::Unreachable), &["host", "show"]).await;
    asserted(&ran, Exit::Unreachable);
    assert!(ran.stderr.contains("/s") && ran.stderr.contains("hint: is dom0d running?"), "{}", ran.stderr);
}

#[tokio::test]
async fn a_created_vm_gets_a_uuid_and_tells_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("web.toml");
    let name = file.to_str().unwrap();
    std::fs::write(&file, format!("name = \"web\"\nmemory = 512\nrepo_id = \"{REPO}\"\n")).unwrap();
    let done = job_in("succeeded", Json::Null);
    let fake = Fake::default().answers("job_submit", json!(12)).answers("job_wait", done.clone());
    let ran = ctl(&fake, &["vm", "create", name]).await;
    asserted(&ran, Exit::Ok);
    let uuid = ran.stdout.trim_end();
    assert!(crate::model::VmId::parse(uuid).is_ok(), "{uuid}");
    assert_eq!(fake.params(0), json!(["create_vm", [REPO, uuid, {"name": "web", "memory": 512}], {}]));

    std::fs::write(&file, format!("{{\"uuid\": \"{WEB}\", \"name\": \"web\"}}")).unwrap();
    let ran = ctl(&Fake::default(), &["vm", "create", name]).await;
    asserted(&ran, Exit::Usage);
    let fake = Fake::default().answers("job_submit", json!(12)).answers("job_wait", done);
    let ran = ctl(&fake, &["vm", "create", name, "--repo", REPO]).await;
    assert_eq!(ran.stdout, format!("{WEB}\n"));
}

#[tokio::test]
async fn the_password_goes_from_a_file_to_the_dialects_verb_and_is_never_printed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p");
    std::fs::write(&file, "planted-secret\n").unwrap();
    let fake = Fake::default().answers("update_agent_password", Json::Null);
    let ran = ctl(&fake, &["password", "set", "--file", file.to_str().unwrap()]).await;
    asserted(&ran, Exit::Ok);
    assert_eq!(fake.params(0), json!(["oracle", "planted-secret"]));
    assert!(!format!("{}{}", ran.stdout, ran.stderr).contains("planted"));
}

#[tokio::test]
async fn ownership_is_released_in_the_name_of_the_owner() {
    let owned = json!({"ownership": {"manager_uuid": "m-1", "url": "https://m"}});
    let fake = Fake::default().answers("host_get", owned).answers("release_ownership", Json::Null);
    asserted(&ctl(&fake, &["ownership", "release"]).await, Exit::Ok);
    assert_eq!(fake.params(1), json!(["m-1"]));
    let fake = Fake::default().answers("host_get", json!({"ownership": null}));
    assert_eq!(ctl(&fake, &["ownership", "show"]).await.stdout, "nobody owns this host\n");
}

fn event(number: u32) -> Json {
    json!({"number": number, "time": "t", "type": "vm.started", "severity": "info", "object": "vm/a",
           "text": "started", "job": null, "acknowledged": false})
}

fn page(events: Json, token: &str) -> Json {
    json!({"events": events, "last": 0, "gap": null, "lost": false, "token": token})
}

#[tokio::test]
async fn a_watch_goes_on_by_token_and_tells_of_a_gap_and_of_a_history_that_was_lost() {
    let mut gap = page(json!([event(20)]), "s:20");
    gap["gap"] = json!({"from": 10, "to": 19});
    gap["lost"] = json!(true);
    let mut lost = page(json!([event(1)]), "t:1");
    lost["lost"] = json!(true);
    let fake = Fake::default()
        .answers("event_list", page(json!([event(7)]), "s:7"))
        .answers("event_wait", page(json!([event(8), event(9)]), "s:9"))
        .then("event_wait", Reply::Unreachable)
        .answers("event_wait", page(json!([]), "s:9"))
        .answers("event_wait", gap)
        .answers("event_wait", lost);
    let ran = ctl(&fake, &["event", "watch", "--count", "4"]).await;
    asserted(&ran, Exit::Ok);
    assert_eq!(ran.stdout.lines().count(), 4);
    assert!(ran.stdout.starts_with("8  t  info  vm.started  vm/a  started\n"), "{}", ran.stdout);
    let notes: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!((notes[0], notes[2]), ("events 10 to 19 are no longer kept", "to go on: --token t:1"));
    assert!(notes[1].contains("may have been missed"), "{}", ran.stderr);
    let asked: Vec<Json> = (1..6).map(|n| fake.params(n)).collect();
    assert_eq!(asked[0], json!(["s:7", 30, {"limit": 4}]));
    assert_eq!((&asked[1], &asked[2]), (&json!(["s:9", 30, {"limit": 2}]), &asked[1]));
    assert_eq!(asked[4], json!(["s:20", 30, {"limit": 1}]));
}

#[tokio::test]
async fn a_watch_begins_where_it_is_told_to() {
    let fake = Fake::default().answers("event_wait", page(json!([event(8)]), "s:8"));
    let ran = ctl(&fake, &["-o", "json", "event", "watch", "--since", "7", "--count", "1"]).await;
    assert_eq!(serde_json::from_str::<Json>(ran.stdout.trim_end()).unwrap(), event(8));
    assert_eq!(ran.stdout.lines().count(), 1, "one event a line");
    assert_eq!(fake.params(0)[0], json!(7));
    let fake = Fake::default().answers("event_wait", page(json!([event(8)]), "s:8"));
    ctl(&fake, &["event", "watch", "--token", "s:5", "--count", "1"]).await;
    assert_eq!(fake.params(0)[0], json!("s:5"));
    let fake = Fake::default().answers("event_list", page(json!([event(8)]), "s:8"));
    let ran = ctl(&fake, &["event", "list", "--token", "s:5"]).await;
    assert_eq!(fake.params(0), json!([{"token": "s:5", "limit": 100}]));
    assert_eq!(ran.stderr, "to go on: --token s:8\n");
}

#[tokio::test(start_paused = true)]
async fn a_watch_ends_well_when_it_was_told_to() {
    let nothing = page(json!([]), "s:7");
    let fake = Fake::default()
        .then("event_wait", Reply::Late(nothing.clone()))
        .then("event_wait", Reply::Unreachable)
        .then("event_wait", Reply::Late(nothing.clone()))
        .then("event_wait", Reply::Late(nothing.clone()))
        .then("event_wait", Reply::Late(nothing));
    let ran = ctl(&fake, &["--timeout", "65", "event", "watch", "--since", "7"]).await;
    asserted(&ran, Exit::Ok);
    assert_eq!((fake.params(0), fake.params(3)), (json!([7, 30, {}]), json!(["s:7", 4, {}])));
    assert_eq!(fake.params(4), json!(["s:7", 1, {}]));
    assert_eq!(ran.stdout, "");
}

#[tokio::test]
async fn events_are_acknowledged_by_number() {
    let fake = Fake::default().answers("event_ack", json!(2));
    let ran = ctl(&fake, &["event", "ack", "3", "4"]).await;
    assert_eq!((fake.params(0), ran.stderr.as_str()), (json!([[3, 4]]), "2 acknowledged\n"));
}

#[tokio::test]
async fn a_cancelled_job_is_waited_for() {
    let fake = Fake::default()
        .answers("job_cancel", Json::Null)
        .answers("job_wait", job_in("cancelled", Json::Null));
    let ran = ctl(&fake, &["job", "cancel", "12"]).await;
    asserted(&ran, Exit::Ok);
    assert_eq!(ran.stderr, "job 12 cancelled\n");
    let fake = Fake::default()
        .answers("job_cancel", Json::Null)
        .answers("job_wait", job_in("succeeded", Json::Null));
    asserted(&ctl(&fake, &["job", "cancel", "12"]).await, Exit::Failed);
}

#[tokio::test]
async fn filters_of_a_list_are_sent_only_if_given() {
    let fake = Fake::default().answers("job_list", json!([]));
    ctl(&fake, &["job", "list"]).await;
    assert_eq!(fake.params(0), json!([{"limit": 50}]));
    let fake = Fake::default().answers("job_list", json!([job_in("running", Json::Null)]));
    let ran = ctl(&fake, &["job", "list", "--state", "running", "--object", "host"]).await;
    assert_eq!(fake.params(0), json!([{"limit": 50, "state": "running", "object": "host"}]));
    assert!(ran.stdout.contains("12  running  50  start_vm  start web"), "{}", ran.stdout);
}

#[tokio::test]
async fn call_sends_json_as_json_and_text_as_text_and_prints_the_answer() {
    let fake = Fake::default().answers("echo", json!("<a>\n<b/>\n</a>"));
    let ran = ctl(&fake, &["call", "echo", "5", "-5", "web-1", "{\"a\": [true]}"]).await;
    asserted(&ran, Exit::Ok);
    assert_eq!(fake.params(0), json!([5, -5, "web-1", {"a": [true]}]));
    assert_eq!(ran.stdout, "<a>\n<b/>\n</a>\n");
}

#[tokio::test]
async fn help_of_a_verb_tells_its_parameters_and_an_unknown_one_its_likes() {
    let verbs = json!([{"name": "stop_vm", "family": "vm", "kind": "job", "role": "operator", "returns": "nil",
        "help": "Asks the guest to shut down.", "states": ["running"], "params": [
            {"name": "vm_id", "type": "string", "optional": false, "help": "the VM"},
            {"name": "force", "type": "bool", "optional": true, "help": "cut the power"}]}]);
    let ran = ctl(&Fake::default().answers("verb_list", verbs.clone()), &["verb", "help", "stop_vm"]).await;
    let expected = "\
stop_vm(vm_id, [force]) -> nil
Asks the guest to shut down.
vm (job), for the role operator and above
allowed while the VM is: running

PARAMETER  TYPE    OPTIONAL  HELP
vm_id      string  no        the VM
force      bool    yes       cut the power
";
    assert_eq!(ran.stdout, expected);
    let ran = ctl(&Fake::default().answers("verb_list", verbs), &["verb", "help", "halt_vm_now"]).await;
    asserted(&ran, Exit::NotFound);
}

#[tokio::test]
async fn completion_knows_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let ran = ctl(&Fake::default(), &["completion", shell]).await;
        asserted(&ran, Exit::Ok);
        assert!(ran.stdout.contains("certificate") && ran.stdout.contains("checkpoint"), "{shell}");
    }
}
