//! I13: secrets are planted wherever a caller may give one, the host lives with them for a while, and then
//! everything that leaves the daemon or stays behind for people is searched for them.

use crate::support::*;
use dom0d::api::value::{int, structure, text, texts};
use dom0d::model::VmId;
use dom0d::sim::Reason;
use dom0d::wire::{ClientError, Value};

const AGENT: &str = "Geheim-agent-1";
const OLD: &str = "Geheim-old-2";
const VNC: &str = "gEh3imV4";
const GUEST: &str = "Geheim-guest-5";
const URL_USER: &str = "Geheim-user-6";
const URL_PASSWORD: &str = "Geheim-url-7";
const REFUSED: &str = "Geheim-refused-8";
const WRONG: &str = "Geheim-wrong-9";
const DRY: &str = "Geheim-dry-10";

fn planted() -> Vec<String> {
    use base64::Engine;
    let plain = [PASSWORD, AGENT, OLD, VNC, GUEST, URL_USER, URL_PASSWORD, REFUSED, WRONG, DRY];
    let engine = base64::engine::general_purpose::STANDARD;
    let basic = [PASSWORD, AGENT, WRONG].map(|password| engine.encode(format!("oracle:{password}")));
    let mut all: Vec<String> = plain.into_iter().map(str::to_owned).chain(basic).collect();
    // Also what the codes of a structure would make of it.
    all.extend(plain.iter().map(|secret| engine.encode(secret).trim_end_matches('=').to_owned()));
    all
}

/// Everything that was said, with where.
#[derive(Default)]
struct Said(Vec<(String, String)>);

impl Said {
    fn add(&mut self, whence: impl Into<String>, what: impl Into<String>) {
        self.0.push((whence.into(), what.into()));
    }

    fn search(&self) {
        for secret in planted() {
            for (whence, what) in &self.0 {
                if let Some(at) = what.find(&secret) {
                    let from = what[..at].char_indices().rev().nth(120).map_or(0, |(i, _)| i);
                    panic!("{secret} stands in {whence}: …{}", &what[from..at + secret.len()]);
                }
            }
        }
    }
}

async fn live_with_secrets(daemon: &Daemon, vm: VmId, said: &mut Said) {
    let mut caller = daemon.remote();
    let Value::Struct(mut params) = vm_params(vm) else { unreachable!("it is a struct") };
    params.insert(
        "vfb".to_owned(),
        texts([format!("type=vnc,vnclisten=127.0.0.1,vncpasswd={VNC},keymap=en-us")]),
    );
    params.insert("OVM_description".to_owned(), text("a VM with a display"));
    caller.ask("create_vm", &[text(REPO), text(vm), Value::Struct(params)]).await;
    let on = [text(REPO), text(vm)];
    let and = |value: Value| [text(REPO), text(vm), value];
    caller.ask("start_vm", &on).await;
    caller
        .ask("send_to_guest", &and(structure([("com.example.password", text(GUEST)), ("motd", text(GUEST))])))
        .await;
    let vfb = texts([format!("type=vnc,vnclisten=127.0.0.1,vncpasswd={VNC}")]);
    caller.ask("configure_vm", &and(structure([("vfb", vfb), ("memory", int(48))]))).await;
    for verb in ["pause_vm", "unpause_vm", "save_vm", "restore_vm", "reboot_vm", "dump_vm_core"] {
        caller.ask(verb, &on).await;
    }
    let url = format!("https://{URL_USER}:{URL_PASSWORD}@127.0.0.1:1/api");
    caller.ask("take_ownership", &[text("0004fb0000010000aabbccddeeff0011"), text(url)]).await;
    let change = [text("oracle"), text(AGENT), text(OLD)];
    caller.ask("update_agent_password", &change).await;

    // What is refused is not repeated either.
    let mut caller = daemon.remote_as(AGENT);
    let refused: Vec<(&str, Vec<Value>)> = vec![
        ("update_agent_password", vec![text("root"), text(REFUSED), text(OLD)]),
        ("update_agent_password", vec![text("oracle"), text(format!("{REFUSED}\n")), text(OLD)]),
        ("update_agent_password", vec![text("oracle"), text(REFUSED), text(OLD), text(REFUSED)]),
        ("update_agent_password", vec![text("oracle"), structure([("password", text(REFUSED))])]),
        ("take_ownership", vec![text("ab"), text(format!("https://{URL_USER}:{URL_PASSWORD}@"))]),
        ("take_ownership", vec![text("ab"), text(format!("gopher://{URL_USER}:{URL_PASSWORD}@h/"))]),
        ("take_ownership", vec![structure([("manager_uuid", text("ab")), ("password", text(REFUSED))])]),
        ("create_vm", and(structure([("vncpasswd", text(format!("{REFUSED} with blanks")))])).to_vec()),
        (
            "configure_vm",
            and(structure([("vfb", texts([format!("type=vnc,vncpasswd={REFUSED} with blanks")]))])).to_vec(),
        ),
        (
            "configure_vm",
            and(structure([("vfb", texts([format!("type=vnc,vncpasswd={VNC},script=x")]))])).to_vec(),
        ),
        ("send_to_guest", and(structure([("a b", text(GUEST))])).to_vec()),
        ("send_to_guest", and(structure([("a", texts([GUEST]))])).to_vec()),
    ];
    for (verb, params) in refused {
        said.add(format!("the refusal of {verb}"), caller.refused(verb, &params).await);
        let submit = [text(verb), Value::Array(params), structure([])];
        said.add(format!("the refusal of {verb}, submitted"), caller.refused("job_submit", &submit).await);
    }
    let dry = structure([("dry_run", Value::Bool(true))]);
    let submit = [
        text("update_agent_password"),
        Value::Array(vec![text("oracle"), text(DRY), text(DRY)]),
        dry.clone(),
    ];
    said.add("a plan", format!("{:?}", caller.ask("job_submit", &submit).await));
    let params = and(structure([("motd", text(DRY))])).to_vec();
    let submit = [text("send_to_guest"), Value::Array(params), dry];
    said.add("a plan", format!("{:?}", caller.ask("job_submit", &submit).await));
    let wrong = daemon.remote_as(WRONG).call("get_api_version", &[]).await;
    assert!(matches!(wrong, Err(ClientError::Refused { .. })));
}

async fn listen(daemon: &Daemon, vm: VmId, said: &mut Said) {
    let mut caller = daemon.remote_as(AGENT);
    let jobs = caller.jobs_after(0).await;
    assert!(jobs.len() > 15, "{}", jobs.len());
    for job in &jobs {
        let full = caller.ask("job_get", &[field(job, "id").clone()]).await;
        said.add(format!("job_get of {}", string(field(job, "verb"))), format!("{full:?}"));
    }
    said.add("job_list", format!("{jobs:?}"));
    let all = structure([("since", int(0)), ("limit", int(1000))]);
    for (verb, params) in [
        ("event_list", vec![all]),
        ("event_wait", vec![int(0), int(0)]),
        ("get_support_files", vec![]),
        ("get_log", vec![texts(["ovs-agent", "messages", "xend", "dmesg"])]),
        ("host_get", vec![]),
        ("vm_list", vec![]),
        ("lock_list", vec![]),
        ("store_check", vec![]),
        ("discover_server", vec![]),
        ("verb_list", vec![]),
        ("list_vm_core", vec![text(REPO), text(vm)]),
    ] {
        said.add(verb, format!("{:?}", caller.ask(verb, &params).await));
    }
    let support = caller.ask("get_support_files", &[]).await;
    assert!(fields(&support).len() >= 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planted_secrets_stand_in_no_log_job_event_fault_or_support_file() {
    let home = Home::new();
    home.settings("[log]\nlevel = \"trace\"\nformat = \"text\"\n[wire]\nplain_http = true\n");
    let daemon = home.start().await;
    let vm = VmId::random();
    let mut said = Said::default();
    live_with_secrets(&daemon, vm, &mut said).await;
    // A crash of the guest and one of the daemon in the middle of a job with secrets.
    home.world().end_guest(vm, Reason::Crash).await.unwrap();
    until("the guest was started again", PATIENCE, async || {
        home.world().audit().await.unwrap().begun(vm) >= 4
    })
    .await;
    let mut local = daemon.local();
    local.until_idle().await;
    daemon.kill().await;
    let mut dying = home.start_with(&["--die-at-commit", "2:after"]).await;
    let guest = [text(REPO), text(vm), structure([("motd", text(GUEST)), ("token", text(GUEST))])];
    let _ = dying.local().call("send_to_guest", &guest).await;
    tokio::time::timeout(PATIENCE, dying.child.wait()).await.unwrap().unwrap();
    let daemon = home.start().await;
    daemon.local().until_idle().await;
    listen(&daemon, vm, &mut said).await;
    // The manager itself may see a VM's password, as it gave it.
    let config = format!("{:?}", daemon.remote_as(AGENT).on_vm("get_vm_config", vm).await);
    assert!(config.contains(VNC));
    assert_eq!(daemon.stop().await, Some(0));

    let log = home.log();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "the log tells everything");
    said.add("the log", log);
    let world = std::fs::read_to_string(home.state.join("world.sock.log")).unwrap();
    assert!(world.contains("simulated world ready"));
    said.add("the world's log", world);
    said.search();
}
