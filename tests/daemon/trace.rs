//! What a request was done for goes with it: from the header of a call to its job, that job's events, and every
//! record of the log made on the way. And the fields by which the log is searched.

use crate::pair::Pair;
use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::model::{TraceParent, VmId};
use dom0d::wire::Value;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::time::timeout;

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn trace() -> Option<TraceParent> {
    TraceParent::parse(TRACE).ok()
}

async fn job(caller: &mut Caller, id: u64) -> Value {
    caller.ask("job_get", &[int(id)]).await
}

/// The events of a VM.
async fn events_of(caller: &mut Caller, vm: VmId) -> Vec<Value> {
    let filter = structure([("since", int(0)), ("object", text(format!("vm/{vm}")))]);
    let page = caller.ask("event_list", &[filter]).await;
    list(field(&page, "events")).to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_header_of_a_call_stands_in_its_job_and_in_the_jobs_events_also_after_a_restart() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    let vm = VmId::random();
    caller.create(vm).await;
    let untraced = caller.last_job().await;
    caller.0.set_trace(trace());
    caller.on_vm("start_vm", vm).await;
    let traced = caller.last_job().await;
    caller.0.set_trace(None);
    caller.on_vm("pause_vm", vm).await;
    daemon.kill().await;
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    assert_eq!(*field(&job(&mut caller, untraced).await, "trace"), Value::Nil);
    assert_eq!(*field(&job(&mut caller, traced).await, "trace"), text(TRACE));
    let events = events_of(&mut caller, vm).await;
    let of_job = |id: u64| -> Vec<&Value> {
        events.iter().filter(|event| *field(event, "job") == int(id)).map(|e| field(e, "trace")).collect()
    };
    assert!(!of_job(traced).is_empty(), "{events:?}");
    assert!(of_job(traced).iter().all(|trace| **trace == text(TRACE)), "{events:?}");
    let others = events.iter().filter(|event| *field(event, "job") != int(traced));
    assert!(others.clone().count() > 0, "{events:?}");
    others.for_each(|event| assert_eq!(*field(event, "trace"), Value::Nil));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_goes_on_after_a_crash_tells_its_events_with_the_trace_it_began_with() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.local();
    caller.until_settled().await;
    caller.0.set_trace(trace());
    let nap = caller.submit("sleep", &[int(3600)], structure([])).await;
    daemon.kill().await;
    let daemon = home.start().await;
    let mut caller = daemon.local();
    caller.ask("job_cancel", &[int(nap)]).await;
    let ended = caller.ask("job_wait", &[int(nap), int(60)]).await;
    assert_eq!(string(field(&ended, "state")), "cancelled");
    let filter = structure([("since", int(0)), ("object", text(format!("job/{nap}")))]);
    let page = caller.ask("event_list", &[filter]).await;
    let events = list(field(&page, "events"));
    assert_eq!(events.iter().map(|e| field(e, "trace")).collect::<Vec<_>>(), [&text(TRACE)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_host_of_a_migration_knows_the_trace_too() {
    let pair = Pair::new().await;
    let vm = pair.started().await;
    let mut caller = pair.a.local();
    caller.0.set_trace(trace());
    caller.ask("migrate_vm", &pair.to_b(vm)).await;
    assert_eq!(pair.decided(vm, "there").await, "b");
    let arrived = pair.b.events("vm.arrived").await;
    let [arrived] = &arrived[..] else { panic!("{arrived:?}") };
    let there = TraceParent::parse(&string(field(arrived, "trace"))).unwrap();
    assert_eq!(there.trace_id(), TRACE_ID);
    assert_ne!(Some(there), trace(), "a span of its own");
}

/// One call on the operator's socket with these header lines; the answer's status line and body.
async fn call(daemon: &Daemon, headers: &str) -> String {
    let body = "<?xml version='1.0'?><methodCall><methodName>job_submit</methodName><params><param><value>\
        sleep</value></param><param><value><array><data><value><int>0</int></value></data></array></value>\
        </param></params></methodCall>";
    let request = format!(
        "POST /RPC2 HTTP/1.1\r\nHost: x\r\n{headers}Content-Type: text/xml\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = UnixStream::connect(&daemon.socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_or_doubled_header_is_as_good_as_none() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.local();
    let good = format!("traceparent: {TRACE}\r\n");
    let upper = TRACE.to_uppercase();
    for (headers, expected) in [
        (good.clone(), text(TRACE)),
        (format!("Traceparent: {TRACE}\r\n"), text(TRACE)),
        (format!("{good}{good}"), Value::Nil),
        (format!("traceparent: {upper}\r\n"), Value::Nil),
        ("traceparent: \u{e9}\r\n".to_owned(), Value::Nil),
        ("traceparent:\r\n".to_owned(), Value::Nil),
        (format!("traceparent: {}\r\n", "0".repeat(4000)), Value::Nil),
    ] {
        let answer = call(&daemon, &headers).await;
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("<fault>"), "{answer}");
        let id = answer.split(['<', '>']).find_map(|part| part.parse().ok()).unwrap();
        assert_eq!(*field(&job(&mut caller, id).await, "trace"), expected, "{headers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dom0ctl_sends_the_trace_of_its_surroundings() {
    let home = Home::new();
    let daemon = home.start().await;
    let ctl = async |value: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dom0ctl"));
        command.arg("--socket").arg(&daemon.socket).args(["call", "sleep", "0"]).env("TRACEPARENT", value);
        let ran = timeout(PATIENCE, command.output()).await.unwrap().unwrap();
        assert!(ran.status.success(), "{ran:?}");
        let mut caller = daemon.local();
        let id = caller.last_job().await;
        field(&job(&mut caller, id).await, "trace").clone()
    };
    assert_eq!(ctl(TRACE).await, text(TRACE));
    assert_eq!(ctl("nonsense").await, Value::Nil);
}

/// A field of a record, or of the span it was made in.
fn said<'a>(record: &'a serde_json::Value, name: &str) -> Option<&'a str> {
    record[name].as_str().or_else(|| record["span"][name].as_str())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_of_json_tell_whose_job_they_are_of_and_events_by_their_number() {
    let home = Home::new();
    home.settings("[log]\nformat = \"json\"\nlevel = \"debug\"\n");
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    let vm = VmId::random();
    caller.create(vm).await;
    caller.0.set_trace(trace());
    caller.on_vm("start_vm", vm).await;
    let started = caller.last_job().await.to_string();
    let records = || -> Vec<serde_json::Value> {
        // The last line may be on its way.
        let log = home.log();
        let whole = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let told = async || records().iter().any(|record| said(record, "kind") == Some("vm.started"));
    until("the event is in the log", PATIENCE, told).await;
    let vm = vm.to_string();
    for message in ["job accepted", "job runs", "job ended"] {
        let all = records();
        let mut of = all.iter().filter(|r| r["message"] == message);
        let record = of.find(|r| said(r, "job_id") == Some(&started)).unwrap_or_else(|| panic!("{all:#?}"));
        assert_eq!(said(record, "verb"), Some("start_vm"), "{record}");
        assert_eq!(said(record, "trace_id"), Some(TRACE_ID), "{record}");
        assert!(message == "job accepted" || said(record, "vm_uuid") == Some(&vm), "{record}");
    }
    let all = records();
    let event = all.iter().find(|record| said(record, "kind") == Some("vm.started")).unwrap();
    assert!(said(event, "event_id").unwrap().parse::<u64>().is_ok(), "{event}");
    assert_eq!(said(event, "vm_uuid"), Some(vm.as_str()), "{event}");
    assert_eq!(said(event, "job_id"), Some(started.as_str()), "{event}");
    assert_eq!(said(event, "trace_id"), Some(TRACE_ID), "{event}");
}

/// A record in the journal's own form: `NAME=value` lines, and `NAME`, the length in 8 bytes, the value.
fn journal_record(mut bytes: &[u8]) -> BTreeMap<String, Vec<String>> {
    let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
        let (name, value) = match line.iter().position(|byte| *byte == b'=') {
            Some(at) => {
                bytes = rest;
                (text(&line[..at]), text(&line[at + 1..]))
            }
            None => {
                let (length, rest) = rest.split_first_chunk::<8>().unwrap();
                let (value, rest) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
                bytes = rest.strip_prefix(b"\n").unwrap();
                (text(line), text(value))
            }
        };
        fields.entry(name).or_default().push(value);
    }
    fields
}

/// A thread with mounts of its own, where a journal's socket can be put in its place.
fn own_journal() -> UnixDatagram {
    unshare(CloneFlags::CLONE_NEWNS).expect("this test makes a mount namespace: run it as root");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    std::fs::create_dir_all("/run/systemd/journal").unwrap();
    UnixDatagram::bind("/run/systemd/journal/socket").unwrap()
}

/// Starts a daemon whose log is the journal, starts a VM there, and hears what the journal is sent until that has been
/// told.
async fn hear(journal: UnixDatagram, vm: VmId) -> (u64, Vec<BTreeMap<String, Vec<String>>>) {
    journal.set_nonblocking(true).unwrap();
    let journal = tokio::net::UnixDatagram::from_std(journal).unwrap();
    let home = Home::new();
    home.settings("[log]\nformat = \"auto\"\n");
    let stderr = std::fs::File::create(home.path("daemon.log")).unwrap().metadata().unwrap();
    let mut command = home.command();
    command.env("JOURNAL_STREAM", format!("{}:{}", stderr.dev(), stderr.ino()));
    let live = async {
        let daemon = home.launch(command).await;
        let mut caller = daemon.local();
        caller.create(vm).await;
        caller.0.set_trace(trace());
        caller.on_vm("start_vm", vm).await;
        let job = caller.last_job().await;
        (daemon, job)
    };
    let heard = async {
        let mut records = Vec::new();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let length = journal.recv(&mut buffer).await.unwrap();
            let record = journal_record(&buffer[..length]);
            let last = record.get("KIND").is_some_and(|kind| kind[0] == "vm.started");
            records.push(record);
            if last {
                return records;
            }
        }
    };
    let both = async { tokio::join!(live, heard) };
    let heard = timeout(PATIENCE, both).await;
    let Ok(((_daemon, job), records)) = heard else {
        panic!("the journal does not hear of the VM's start; the log on stderr:\n{}", home.log())
    };
    (job, records)
}

#[test]
fn the_journal_is_searched_by_job_vm_event_verb_and_trace() {
    let vm = VmId::random();
    let thread = std::thread::spawn(move || {
        let journal = own_journal();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(hear(journal, vm))
    });
    let (job, records) = thread.join().unwrap();
    let (job, vm) = (job.to_string(), vm.to_string());
    let has = |record: &BTreeMap<String, Vec<String>>, name: &str, value: &str| {
        record.get(name).is_some_and(|all| all.iter().all(|one| one == value))
    };
    let ended = records.iter().find(|r| has(r, "MESSAGE", "job ended") && has(r, "JOB_ID", &job));
    let ended = ended.unwrap_or_else(|| panic!("{records:#?}"));
    assert!(has(ended, "VERB", "start_vm") && has(ended, "VM_UUID", &vm), "{ended:?}");
    assert!(has(ended, "TRACE_ID", TRACE_ID), "{ended:?}");
    let event = records.last().unwrap();
    assert!(event["EVENT_ID"][0].parse::<u64>().is_ok(), "{event:?}");
    assert!(has(event, "JOB_ID", &job) && has(event, "VM_UUID", &vm), "{event:?}");
    assert!(has(event, "TRACE_ID", TRACE_ID), "{event:?}");
    let prefixed = records.iter().flat_map(BTreeMap::keys).find(|name| name.starts_with("DOM0D"));
    assert_eq!(prefixed, None);
}
