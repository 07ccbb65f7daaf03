//! Hostile values in every text that a verb takes: each is refused by a fault that names the parameter, or kept
//! as the inert text that it is. None crashes the daemon, none starts a process, none touches a file.

use crate::pair::Pair;
use crate::support::*;
use dom0d::api::value::{int, structure, text, texts};
use dom0d::model::VmId;
use dom0d::wire::{ClientError, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// Argument, command and configuration injection, and paths.
fn hostile(canary: &Path) -> Vec<String> {
    let canary = canary.display();
    let fixed = [
        "'; id;'",
        "$(id)",
        "`id`",
        "|id",
        "&& id",
        "a\nb",
        "-rf",
        "--config=/etc/shadow",
        "-",
        "*",
        "?[a-z]*",
        "%s%s%n",
        "a\"b",
        "a'b",
        "a]b",
        "a,b",
        "x=1",
        "\u{202e}x",
        "../../etc/shadow",
        "/etc/shadow",
        "/OVS/Repositories/../../etc/shadow",
        "/OVS/Repositories/r/../../../etc/shadow",
        "file:///etc/shadow",
        "\\\\?\\C:\\x",
        "/dev/sda",
        "/proc/self/mem",
        "C:\\x",
        "é",
        "\u{1F600}",
        " ",
        "",
        "http://169.254.169.254/",
        "gopher://x/",
        "0x10",
        "1e9",
        "NaN",
        "2147483648",
        "-1",
        "device_model_args",
        "script=/bin/sh",
        "vnclisten=0.0.0.0",
    ];
    let mut all: Vec<String> = fixed.into_iter().map(str::to_owned).collect();
    all.extend([format!("$(touch {canary})"), format!("`touch {canary}`"), format!("x; touch {canary} #")]);
    all.extend(["x".repeat(255), "x".repeat(256), "x".repeat(5000), "a/".repeat(600)]);
    all
}

/// Parameters with which the verb would be allowed.
fn good(verb: &str, vm: VmId) -> BTreeMap<String, Value> {
    let mut values: BTreeMap<String, Value> = [
        ("repo_id", text(REPO)),
        ("vm_id", text(vm)),
        ("timezone", text("UTC")),
        ("utc", Value::Bool(true)),
        ("servers", texts(["ntp.example.org"])),
        ("local_time_source", Value::Bool(false)),
        ("loglist", texts(["messages"])),
        ("user", text("oracle")),
        ("password", text(PASSWORD)),
        ("roles", text("xen")),
        ("manager", text("ab")),
        ("manager_uuid", text("ab")),
        ("letter", text("s")),
        ("name", text("nmi")),
        ("core_date", text("20260101000000000")),
        ("enable_ha", Value::Bool(true)),
        ("params", structure([])),
        ("value", text("x")),
        ("document", text("{}")),
        ("address", text("127.0.0.1:1")),
        ("fingerprint", text("ab".repeat(32))),
        ("action", text("run")),
        ("dest", text("127.0.0.1:1")),
        ("verb", text("sleep")),
        ("method", text("echo")),
        ("id", int(1)),
        ("timeout_s", int(0)),
        ("since", int(0)),
        ("numbers", Value::Array(vec![])),
        ("calls", Value::Array(vec![])),
        ("secs", int(0)),
        ("interface", text("eth1")),
        ("bridge", text("hostile")),
        ("net_dev", text("eth1")),
        ("bond", text("bond9")),
        ("backup", text("eth2")),
        ("mode", text("active-backup")),
        ("optype", text("static")),
        ("ip", text("198.51.100.1")),
        ("host", text("198.51.100.1")),
        ("netmask", text("255.255.255.0")),
        ("virtual_ip", text("192.0.2.99")),
        ("base_ip", text("192.0.2.10")),
        ("network", text("198.51.100.0/24")),
        ("vlan", int(7)),
        ("mtu", int(1500)),
        ("port", int(1)),
        ("notification", text("hello")),
        ("url", text("https://127.0.0.1:1/")),
        ("interval", int(20)),
        ("object", text("host")),
        ("metric", text("host_load_1m")),
        ("from", int(-60)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    if verb.starts_with("ovs_") {
        let word = if matches!(verb, "ovs_vlan_config" | "ovs_bond_op") { "add" } else { "start" };
        values.insert("action".to_owned(), text(word));
    }
    if verb == "job_submit" {
        values.insert("params".to_owned(), Value::Array(vec![int(0)]));
    }
    if verb.starts_with("migration_") {
        values.insert("id".to_owned(), text(vm));
    }
    if verb == "set_datetime" {
        values.extend(["year", "month", "day", "hour", "min", "sec"].map(|name| (name.to_owned(), int(1))));
    }
    values
}

/// Faults that are a plain "there is no such thing" for a text that only names something.
const NAMES_NOTHING: &[(&str, &str, &str)] = &[
    ("delete_vm_core", "core_date", "CORE_NOT_FOUND"),
    ("job_submit", "verb", "UNKNOWN_VERB"),
    ("system.methodHelp", "method", "UNKNOWN_VERB"),
    ("system.methodSignature", "method", "UNKNOWN_VERB"),
    ("get_log", "loglist", "NOT_AVAILABLE"),
    ("migrate_vm", "dest", "PEER_NOT_FOUND"),
    ("migration_prepare", "document", "MIGRATION_REFUSED"),
    ("peer_add", "address", "PEER_EXISTS"),
    ("peer_remove", "address", "PEER_NOT_FOUND"),
    ("ovs_domU_stats", "vm", "VM_NOT_FOUND"),
];

/// Texts that are kept, or only answered, whatever they are; a console of no VM has port "0" in the dialect.
const INERT: &[(&str, &str)] = &[
    ("echo", "value"),
    ("get_vncport", "vm"),
    ("notify_manager", "notification"),
    ("notify_manager", "data"),
    ("ovs_if_meta", "data"),
    ("update_agent_password", "password"),
    ("update_agent_password", "old_password"),
    ("update_core_api_bindings", "option"),
];

/// Parameters that others than the verb judge, and how they call them.
const IN_WORDS: &[(&str, &str)] =
    &[("timezone", "time zone"), ("servers", "NTP server"), ("core_api_url", "manager URL")];

/// Letters, digits and dashes are a good text in many places: an id of a manager, a host's name.
fn harmless(value: &str) -> bool {
    (1..=256).contains(&value.len()) && value.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
}

/// `None`: as it should be.
fn judge(verb: &str, param: &str, value: &str, answer: &Result<Value, ClientError>) -> Option<String> {
    // No URL, or a good one, to which nothing goes in the clear.
    let no_harm =
        ["core_api_url", "url"].contains(&param) && ["", "http://169.254.169.254/"].contains(&value);
    if no_harm && !matches!(answer, Err(error) if !matches!(error, ClientError::Fault(_))) {
        return None;
    }
    let inert = INERT.contains(&(verb, param));
    let complaint = |what: String| {
        Some(format!("{verb}({param}: {:?}): {what}", value.chars().take(60).collect::<String>()))
    };
    match answer {
        Err(ClientError::Fault(fault)) => {
            let said = fault.fault_string.as_str();
            let unknown = NAMES_NOTHING.iter().any(|(v, p, f)| *v == verb && *p == param && said.contains(f));
            let named =
                said.contains(param) || IN_WORDS.iter().any(|(p, words)| *p == param && said.contains(words));
            let refused = said.contains("INVALID_PARAMETER") || said.contains("INVALID_NETWORK");
            if unknown || (refused && named) || harmless(value) {
                return (said.len() > 3000)
                    .then(|| format!("{verb}({param}): a fault of {} bytes", said.len()));
            }
            complaint(said.chars().take(300).collect())
        }
        Ok(_) if inert || harmless(value) => None,
        Ok(answer) => complaint(format!("accepted: {answer:?}")),
        Err(error) => complaint(error.to_string()),
    }
}

/// What the daemon has started and what still lives, but for the world. Looked at after every call: nothing that
/// a call could start would be gone as fast, and a zombie waits to be read.
fn children(daemon: &Daemon) -> Vec<String> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap().flatten() {
        let Ok(text) = std::fs::read_to_string(task.path().join("children")) else { continue };
        for child in text.split_whitespace() {
            let command = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&command).replace('\0', " "));
        }
    }
    let before = found.len();
    found.retain(|command| !command.contains(" simulated-world "));
    assert_eq!(before - found.len(), 1, "the world is the daemon's child, and the kernel shows it");
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_texts_in_every_parameter_are_refused_by_name_or_kept_as_inert_text() {
    let pair = Pair::new().await;
    let (home, daemon) = (&pair.b.home, pair.b.daemon.as_ref().unwrap());
    let (mut local, mut peer) = (daemon.local(), pair.peer_of_b().await);
    let vm = VmId::random();
    local.create(vm).await;
    local.on_vm("start_vm", vm).await;
    let canary = home.path("canary");
    let mut complaints = Vec::new();
    let mut count = 0;
    for verb in list(&local.ask("verb_list", &[]).await) {
        let caller = if string(field(verb, "role")) == "peer" { &mut peer } else { &mut local };
        let name = string(field(verb, "name"));
        let params: Vec<(String, String)> = list(field(verb, "params"))
            .iter()
            .map(|param| (string(field(param, "name")), string(field(param, "type"))))
            .collect();
        let good = good(&name, vm);
        for (at, (param, kind)) in params.iter().enumerate() {
            // In the place of texts, and within lists of texts; structs have tables of their own below.
            if !["string", "array", "any"].contains(&kind.as_str())
                || ["calls", "numbers", "params"].contains(&param.as_str())
            {
                continue;
            }
            for value in hostile(&canary) {
                let hostile = if kind == "array" { texts([&value]) } else { text(&value) };
                let arguments: Vec<Value> = params[..=params.len() - 1]
                    .iter()
                    .enumerate()
                    .filter_map(|(i, (name, _))| match i == at {
                        true => Some(hostile.clone()),
                        false => good.get(name).cloned(),
                    })
                    .collect();
                let answer = caller.call(&name, &arguments).await;
                count += 1;
                complaints.extend(judge(&name, param, &value, &answer));
                if name == "echo" {
                    assert_eq!(answer.unwrap(), hostile);
                }
                assert_eq!(children(daemon), Vec::<String>::new(), "{name}({param}: {value:?})");
            }
        }
    }
    println!("{count} hostile texts");
    assert!(!canary.exists());
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
    assert_eq!(local.state_of(vm).await.as_deref(), Some("running"));
    assert!(!home.log().contains("panicked"), "{}", home.log());
}

/// Keys of a VM whose text is the manager's own affair.
const KEPT: &[&str] = &[
    "guest_os_type",
    "timer_mode",
    "device_model",
    "on_xend_start",
    "on_xend_stop",
    "description",
    "OVM_description",
    "OVM_os_type",
    "extra",
];
/// Typed keys that take a text.
const TYPED: &[&str] = &[
    "name",
    "uuid",
    "cpus",
    "bootloader",
    "bootargs",
    "bootloader_args",
    "kernel",
    "ramdisk",
    "builder",
    "type",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "tsc_mode",
    "usbdevice",
    "serial",
    "vnclisten",
    "vncpasswd",
    "vncdisplay",
    "keymap",
    "memory",
    "maxmem",
    "vcpus",
    "maxvcpus",
    "cpu_weight",
    "cpu_cap",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_texts_in_the_configuration_of_a_vm_are_refused_by_key_or_come_back_as_they_were() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.local();
    let canary = home.path("canary");
    let vm = VmId::random();
    caller.create(vm).await;
    let mut complaints = Vec::new();
    let devices = [
        ("disk", "file:/OVS/Repositories/0004fb0000030000aa11bb22cc33dd44/VirtualDisks/{},xvda,w"),
        ("disk", "file:{},xvda,w"),
        ("disk", "phy:{},xvda,w"),
        ("disk", "{}:/x,xvda,w"),
        ("disk", "file:/OVS/Repositories/0004fb0000030000aa11bb22cc33dd44/x.img,{},w"),
        ("disk", "file:/OVS/Repositories/0004fb0000030000aa11bb22cc33dd44/x.img,xvda,{}"),
        ("disk", "file:/OVS/Repositories/0004fb0000030000aa11bb22cc33dd44/x.img,xvda,w,{}"),
        ("vif", "mac={},bridge=xenbr0"),
        ("vif", "mac=02:00:00:00:00:01,bridge={}"),
        ("vif", "mac=02:00:00:00:00:01,bridge=xenbr0,script={}"),
        ("vif", "mac=02:00:00:00:00:01,bridge=xenbr0,vifname={}"),
        ("vif", "mac=02:00:00:00:00:01,bridge=xenbr0,type={}"),
        ("vif", "mac=02:00:00:00:00:01,bridge=xenbr0,model={}"),
        ("vif", "mac=02:00:00:00:00:01,bridge=xenbr0,backend={}"),
        ("vfb", "type=vnc,vnclisten={}"),
        ("vfb", "type=vnc,keymap={}"),
        ("vfb", "type={}"),
    ];
    for verb in ["configure_vm", "set_vm_config"] {
        for value in hostile(&canary) {
            for key in TYPED {
                try_key(&mut caller, verb, vm, key, text(&value), &mut complaints).await;
            }
            for (key, form) in devices {
                let line = form.replace("{}", &value);
                try_key(&mut caller, verb, vm, key, texts([line]), &mut complaints).await;
            }
            for key in KEPT {
                let answer =
                    caller.call(verb, &[text(REPO), text(vm), structure([(key, text(&value))])]).await;
                match answer {
                    Ok(_) => {
                        let config = caller.on_vm("get_vm_config", vm).await;
                        if *field(&config, key) != text(&value) {
                            complaints.push(format!(
                                "{verb}: {key} {value:?} came back as {:?}",
                                field(&config, key)
                            ));
                        }
                    }
                    Err(ClientError::Fault(fault)) if fault.fault_string.contains(key) => {}
                    Err(error) => complaints.push(format!("{verb}: {key} {value:?}: {error}")),
                }
            }
        }
        for key in [
            "device_model_override",
            "device_model_args",
            "bootloader_override",
            "script",
            "pci",
            "vncviewer",
            "xen_platform_pci",
            "backend",
            "cpus_soft",
            "init",
            "usbdev",
            "spice",
            "hap",
            "__proto__",
            "ovm_x",
            "OVM",
        ] {
            let answer = caller.refused(verb, &[text(REPO), text(vm), structure([(key, text("x"))])]).await;
            assert!(answer.contains("INVALID_PARAMETER") && answer.contains(key), "{key}: {answer}");
        }
        let many = |n: u32, form: fn(u32) -> String| texts((0..n).map(form));
        for (key, value) in [
            ("vcpus", int(-1)),
            ("memory", Value::Int64(i64::MAX)),
            ("memory", int(0)),
            (
                "disk",
                many(1000, |n| {
                    format!("file:/OVS/Repositories/0004fb0000030000aa11bb22cc33dd44/{n},xvda{n},w")
                }),
            ),
            ("vif", many(1000, |n| format!("mac=02:00:00:00:{:02x}:{:02x},bridge=b", n / 256, n % 256))),
            ("vif", texts(["mac=03:00:00:00:00:01,bridge=b"])),
            ("vif", texts(["mac=02:00:00:00:00:01,bridge=b", "mac=02:00:00:00:00:01,bridge=c"])),
            ("uuid", text(VmId::random())),
        ] {
            let answer = caller.refused(verb, &[text(REPO), text(vm), structure([(key, value)])]).await;
            assert!(answer.contains("INVALID_PARAMETER") && answer.contains(key), "{key}: {answer}");
        }
    }
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
    assert!(!canary.exists());
    assert_eq!(children(&daemon), Vec::<String>::new());
    assert!(!home.log().contains("panicked"));
}

/// Refused by the key's name; or, if taken, what comes back holds nothing that means more than text.
async fn try_key(
    caller: &mut Caller,
    verb: &str,
    vm: VmId,
    key: &str,
    value: Value,
    complaints: &mut Vec<String>,
) {
    let shown: String = format!("{value:?}").chars().take(120).collect();
    match caller.call(verb, &[text(REPO), text(vm), structure([(key, value)])]).await {
        Ok(_) => {
            let config = caller.on_vm("get_vm_config", vm).await;
            let names = ["name", "kernel", "ramdisk", "disk", "vif", "vfb", "bootargs", "bootloader"];
            for (name, value) in fields(&config).iter().filter(|(name, _)| names.contains(&name.as_str())) {
                let held = format!("{value:?}");
                let held = held.trim_start_matches("String(\"").trim_end_matches("\")");
                let evil = ["$(", "`", ";", "\\n", "..", "|", "&&", "\\\"", "'"];
                if evil.iter().any(|part| held.contains(part)) {
                    complaints.push(format!("{verb}: {key} {shown} was taken: {name} is {held}"));
                }
            }
        }
        Err(ClientError::Fault(fault))
            if fault.fault_string.contains("INVALID_PARAMETER")
                && (fault.fault_string.contains(key) || fault.fault_string.contains("vfb")) => {}
        Err(error) => complaints.push(format!(
            "{verb}: {key} {shown}: {}",
            error.to_string().chars().take(300).collect::<String>()
        )),
    }
}

/// Bodies that try to make the daemon large, each with the right password before it.
fn large_bodies() -> Vec<String> {
    let call = |inner: &str| {
        format!(
            "<methodCall><methodName>echo</methodName><params><param><value>{inner}</value></param></params></methodCall>"
        )
    };
    let nested =
        |n: usize| format!("{}{}", "<array><data><value>".repeat(n), "</value></data></array>".repeat(n));
    vec![
        call(&format!("<array><data>{}</data></array>", "<value/>".repeat(400_000))),
        call(&format!("<struct>{}</struct>", "<member><name>a</name><value/></member>".repeat(90_000))),
        call(&nested(10_000)),
        call(&format!("<string>{}</string>", "&amp;".repeat(700_000))),
        call(&format!("<base64>{}</base64>", "AAAA".repeat(900_000))),
        format!("<!DOCTYPE x [<!ENTITY a \"{}\">]>{}", "x".repeat(10_000), call("&a;&a;&a;")),
        format!("<methodCall><methodName>{}</methodName></methodCall>", "m".repeat(1_000_000)),
        "x".repeat(3_900_000),
        call(&format!("<string>{}", "y".repeat(3_000_000))),
    ]
}

/// One request on a connection of its own; how soon it was answered or closed after its last byte.
async fn sent(address: std::net::SocketAddr, body: &str) -> std::time::Duration {
    use base64::Engine;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let credentials = base64::engine::general_purpose::STANDARD.encode(format!("oracle:{PASSWORD}"));
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {credentials}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    // It may be refused and closed before all of it is written.
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(body.as_bytes()).await;
    let since = tokio::time::Instant::now();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "neither answered nor closed");
    since.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_bodies_that_try_to_make_it_large_the_daemon_is_as_small_as_before() {
    let home = Home::new();
    home.settings("[wire]\nplain_http = true\n");
    let daemon = home.start().await;
    daemon.remote().until_settled().await;
    // What is allocated once and kept (a first large body, threads) is part of the base.
    for body in large_bodies() {
        sent(daemon.address, &body).await;
    }
    let base = (daemon.status("VmRSS"), daemon.open_files(), daemon.status("Threads"));
    let mut slowest = std::time::Duration::ZERO;
    for _ in 0..20 {
        for body in large_bodies() {
            slowest = slowest.max(sent(daemon.address, &body).await);
        }
    }
    println!("slowest answer {slowest:?}, RSS before {} KiB, after {} KiB", base.0, daemon.status("VmRSS"));
    until("it is small again", PATIENCE, async || {
        daemon.status("VmRSS") <= base.0 + 16 * 1024
            && daemon.open_files() <= base.1 + 4
            && daemon.status("Threads") <= base.2 + 4
    })
    .await;
    daemon.remote().ask("get_api_version", &[]).await;
}
