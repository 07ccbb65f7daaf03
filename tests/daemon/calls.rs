//! What callers may count on: jobs that go on without them, waits that end with an answer, keys that hold over a
//! restart, plans that touch nothing; and the dialect's paths and refusals on HTTP.

use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::model::VmId;
use dom0d::sim::{Kind, Rule};
use dom0d::wire::{ClientError, Value};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

fn options() -> Value {
    structure([])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_hangs_up_does_not_stop_its_job() {
    let home = Home::new();
    let daemon = home.start().await;
    let vm = VmId::random();
    let mut other = daemon.local();
    // The daemon's own work at its start would be taken for the job.
    other.until_settled().await;
    other.create(vm).await;
    let slow = dom0d::sim::Fate::DelayMs(5000);
    home.world().add_rule(Rule::next(Kind::Create, slow)).await.unwrap();
    let mut caller = daemon.remote();
    let call = tokio::spawn(async move { caller.call("start_vm", &[text(REPO), text(vm)]).await });
    until("the job runs", PATIENCE, async || other.open_jobs().await > 0).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    other.until_idle().await;
    assert_eq!(other.state_of(vm).await.as_deref(), Some("running"));
    assert_eq!(home.world().audit().await.unwrap().begun(vm), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_for_a_job_ends_with_the_job_or_with_its_time() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    let job = caller.submit("sleep", &[int(8)], options()).await;
    let at_once = Instant::now();
    let record = caller.ask("job_wait", &[int(job), int(0)]).await;
    assert!(at_once.elapsed() < Duration::from_secs(8));
    assert_ne!(string(field(&record, "state")), "succeeded");
    let record = caller.ask("job_wait", &[int(job), int(300)]).await;
    assert_eq!(string(field(&record, "state")), "succeeded");
    assert!(at_once.elapsed() < Duration::from_secs(120), "it did not wait its whole time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_for_events_ends_with_the_next_one() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    caller.until_settled().await;
    let last = number(field(&caller.ask("event_list", &[structure([])]).await, "last"));
    let vm = VmId::random();
    let waiter = tokio::spawn({
        let mut caller = daemon.remote();
        async move { caller.ask("event_wait", &[int(last), int(300)]).await }
    });
    // The wait is on its way when there is one more connection than those of this test.
    let connections = async |caller: &mut Caller| {
        number(field(field(&caller.ask("host_get", &[]).await, "agent"), "connections"))
    };
    until("the wait has begun", PATIENCE, async || connections(&mut caller).await >= 2).await;
    assert!(!waiter.is_finished());
    let created = Instant::now();
    caller.create(vm).await;
    let page = timeout(PATIENCE, waiter).await.unwrap().unwrap();
    assert!(created.elapsed() < Duration::from_secs(120), "it did not wait its whole time");
    let kinds: Vec<_> = list(field(&page, "events")).iter().map(|e| string(field(e, "type"))).collect();
    assert_eq!(kinds, ["vm.created"]);
    let none = caller.ask("event_wait", &[field(&page, "last").clone(), int(0)]).await;
    assert_eq!(list(field(&none, "events")).len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idempotency_key_names_the_same_job_after_a_restart() {
    let home = Home::new();
    let daemon = home.start().await;
    let vm = VmId::random();
    let params = [text(REPO), text(vm), vm_params(vm)];
    let key = || structure([("idempotency_key", text("order-17"))]);
    let first = daemon.remote().submit("create_vm", &params, key()).await;
    daemon.kill().await;
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    assert_eq!(caller.submit("create_vm", &params, key()).await, first);
    caller.until_idle().await;
    assert_eq!(list(&caller.ask("vm_list", &[]).await).len(), 1);
    let other = [text("sleep"), Value::Array(vec![int(0)]), key()];
    let refused = caller.refused("job_submit", &other).await;
    assert!(refused.starts_with("IDEMPOTENCY_CONFLICT") && refused.contains(&first.to_string()), "{refused}");
    // The operator's key of the same name is another key.
    let local = daemon.local().submit("sleep", &[int(0)], key()).await;
    assert_ne!(local, first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_answers_the_plan_and_touches_nothing() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    caller.until_settled().await;
    let vm = VmId::random();
    caller.create(vm).await;
    caller.until_idle().await;
    let commit = async |caller: &mut Caller| number(field(&caller.ask("store_check", &[]).await, "commit"));
    let before = (commit(&mut caller).await, caller.last_job().await);
    let effects = home.world().audit().await.unwrap().effects.len();
    for (verb, params) in [
        ("start_vm", vec![text(REPO), text(vm)]),
        ("delete_vm", vec![text(REPO), text(vm)]),
        ("sys_reboot", vec![]),
        ("update_agent_password", vec![text("oracle"), text("other")]),
        ("take_ownership", vec![text("aa"), text(NO_MANAGER)]),
    ] {
        let dry = structure([("dry_run", Value::Bool(true))]);
        let plan = caller.ask("job_submit", &[text(verb), Value::Array(params), dry]).await;
        assert_eq!(string(field(&plan, "verb")), verb);
        assert!(!list(field(&plan, "steps")).is_empty() && !list(field(&plan, "locks")).is_empty());
    }
    assert_eq!((commit(&mut caller).await, caller.last_job().await), before);
    assert_eq!(home.world().audit().await.unwrap().effects.len(), effects);
    assert_eq!(caller.state_of(vm).await.as_deref(), Some("off"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_and_a_deadline_end_a_running_job_soon() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut caller = daemon.remote();
    let job = caller.submit("sleep", &[int(3600)], options()).await;
    until("it runs", PATIENCE, async || {
        string(field(&caller.ask("job_get", &[int(job)]).await, "state")) == "running"
    })
    .await;
    caller.ask("job_cancel", &[int(job)]).await;
    let record = caller.ask("job_wait", &[int(job), int(20)]).await;
    assert_eq!(string(field(&record, "state")), "cancelled");
    let refused = caller.refused("job_cancel", &[int(job)]).await;
    assert!(refused.starts_with("JOB_ENDED"), "{refused}");

    let deadline = structure([("deadline_s", int(1))]);
    let job = caller.submit("sleep", &[int(3600)], deadline).await;
    let record = caller.ask("job_wait", &[int(job), int(20)]).await;
    assert_eq!(string(field(&record, "state")), "failed");
    assert_eq!(string(field(field(&record, "fault"), "name")), "JOB_DEADLINE");
    assert_eq!(caller.locks().await, 0);
}

/// One HTTP/1.1 request in the clear; the status and all that follows the head.
async fn post(address: std::net::SocketAddr, path: &str, authorization: &str) -> (u16, String) {
    let body =
        "<?xml version='1.0'?><methodCall><methodName>get_api_version</methodName><params/></methodCall>";
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\n{authorization}Content-Type: text/xml\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // A refused connection may be reset under the reader.
    let _ = timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap();
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

fn basic(user: &str, password: &str) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Authorization: Basic {text}\r\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_http_is_served_on_the_same_port_only_if_the_settings_say_so() {
    let home = Home::new();
    let daemon = home.start().await;
    let (status, body) = post(daemon.address, "/RPC2", &basic("oracle", PASSWORD)).await;
    assert!(status != 200 && !body.contains("methodResponse"), "{status} {body}");
    daemon.kill().await;
    home.settings("[wire]\nplain_http = true\n");
    let daemon = home.start().await;
    for path in ["/", "/RPC2", "/api/3", "/api/3/"] {
        let (status, body) = post(daemon.address, path, &basic("oracle", PASSWORD)).await;
        assert_eq!(status, 200, "{path}");
        assert!(body.contains("<int>3</int>") || body.contains("<i4>3</i4>"), "{path}: {body}");
    }
    assert_eq!(post(daemon.address, "/else", &basic("oracle", PASSWORD)).await.0, 404);
    for bad in [basic("oracle", "wrong"), basic("root", PASSWORD), String::new()] {
        let (status, body) = post(daemon.address, "/", &bad).await;
        assert_eq!(status, 403, "{bad}");
        assert!(!body.contains("methodResponse"), "{body}");
    }
    daemon.remote().ask("get_api_version", &[]).await;
    assert!(home.log().to_lowercase().contains("plain"), "it is told in the log: {}", home.log());
    let document = string(&daemon.local().ask("discover_server", &[]).await);
    assert!(document.contains("<Plain_Http>True</Plain_Http>"), "{document}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_refused_over_tls_and_the_right_one_still_works() {
    let home = Home::new();
    let daemon = home.start().await;
    let wrong = daemon.remote_as("wrong").call("get_api_version", &[]).await;
    assert!(matches!(wrong, Err(ClientError::Refused { status: 403, .. })), "{wrong:?}");
    daemon.remote().ask("get_api_version", &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_on_the_same_state_shows_no_password_that_is_not_the_one() {
    let home = Home::new();
    home.start().await.kill().await;
    let daemon = home.start().await;
    assert!(daemon.greeting[1].contains("(as it was set)"), "{:?}", daemon.greeting);
    daemon.remote().ask("get_api_version", &[]).await;
}
