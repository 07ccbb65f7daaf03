//! The daemon as a service: told to stop, to read its settings again, started by its sockets, watched.

use crate::support::*;
use dom0d::api::value::{int, structure, text};
use dom0d::model::VmId;
use dom0d::sim::{Behaviour, Reason};
use dom0d::wire::{Client, ClientError, Credentials, ServerTrust, Value};
use nix::sys::signal::Signal;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_stop_it_answers_who_waits_and_the_job_goes_on_after_the_restart() {
    let home = Home::new();
    let daemon = home.start().await;
    let vm = VmId::random();
    let mut local = daemon.local();
    local.create(vm).await;
    local.on_vm("start_vm", vm).await;
    home.world().set_behaviour(Some(vm), Behaviour::deaf()).await.unwrap();
    let job = local.last_job().await + 1;
    let mut caller = daemon.remote();
    let synchronous = tokio::spawn(async move { caller.call("stop_vm", &[text(REPO), text(vm)]).await });
    until("the job runs", PATIENCE, async || local.open_jobs().await > 0).await;
    let newest = number(field(&local.ask("event_list", &[structure([])]).await, "last"));
    let mut waiting = vec![];
    for (verb, params) in [("job_wait", vec![int(job), int(60)]), ("event_wait", vec![int(newest), int(60)])]
    {
        let mut caller = daemon.remote();
        // Connected and known: a wait that is only about to be asked for may be refused without a word.
        caller.ask("get_api_version", &[]).await;
        waiting.push(tokio::spawn(async move { caller.call(verb, &params).await }));
    }
    let connections = async |caller: &mut Caller| {
        number(field(field(&caller.ask("host_get", &[]).await, "agent"), "connections"))
    };
    until("all of them wait", PATIENCE, async || connections(&mut local).await >= 4).await;
    assert_eq!(daemon.stop().await, Some(0), "{}", home.log());

    let Err(ClientError::Fault(fault)) = synchronous.await.unwrap() else { panic!("no fault") };
    assert!(
        fault.fault_string.contains("STOPPING") && fault.fault_string.contains(&job.to_string()),
        "{fault:?}"
    );
    let record = waiting.remove(0).await.unwrap().unwrap();
    assert_eq!(string(field(&record, "state")), "running", "the wait ended before the job");
    let Err(ClientError::Fault(fault)) = waiting.remove(0).await.unwrap() else { panic!("no fault") };
    assert!(fault.fault_string.starts_with("STOPPING"), "{fault:?}");

    let daemon = home.start().await;
    let mut local = daemon.local();
    let record = local.ask("job_get", &[int(job)]).await;
    assert!(["queued", "running"].contains(&string(field(&record, "state")).as_str()), "{record:?}");
    home.world().end_guest(vm, Reason::Poweroff).await.unwrap();
    let record = local.ask("job_wait", &[int(job), int(120)]).await;
    assert_eq!(string(field(&record, "state")), "succeeded", "{record:?}");
    assert_eq!(local.state_of(vm).await.as_deref(), Some("off"));
    assert_eq!(local.locks().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_stop_it_refuses_no_call_half_done_and_leaves_no_socket_behind_that_answers() {
    let home = Home::new();
    let daemon = home.start().await;
    // A step that ends within the drain time ends, and its caller gets its answer or the job's number.
    let mut caller = daemon.remote();
    let mut local = daemon.local();
    let call = tokio::spawn(async move { caller.call("sleep", &[int(4)]).await });
    until("the job runs", PATIENCE, async || local.open_jobs().await > 0).await;
    let job = local.last_job().await;
    let socket = daemon.socket.clone();
    assert_eq!(daemon.stop().await, Some(0));
    match call.await.unwrap() {
        Ok(_) => {}
        Err(ClientError::Fault(fault)) => assert!(fault.fault_string.contains("STOPPING"), "{fault:?}"),
        Err(error) => panic!("cut off: {error}"),
    }
    assert!(std::os::unix::net::UnixStream::connect(socket).is_err());
    let daemon = home.start().await;
    let record = daemon.local().ask("job_wait", &[int(job), int(120)]).await;
    assert_eq!(string(field(&record, "state")), "succeeded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_reload_it_reads_who_may_call_again() {
    let home = Home::new();
    home.settings("[access]\npassword_after_ownership = \"admin\"\n");
    let daemon = home.start().await;
    let key = rcgen::generate_simple_self_signed(["manager".to_owned()]).unwrap();
    let take = structure([
        ("manager_uuid", text("0004fb0000010000aabbccddeeff0011")),
        ("manager_event_url", text("https://127.0.0.1:1/events")),
        ("manager_statistic_url", text("https://127.0.0.1:1/statistics")),
        ("manager_certificate", text(key.cert.pem())),
    ]);
    daemon.remote().ask("take_ownership", &[take]).await;
    daemon.remote().ask("get_api_version", &[]).await;

    home.settings("[access]\npassword_after_ownership = \"none\"\n");
    daemon.signal(Signal::SIGHUP);
    until("the password is refused", PATIENCE, async || {
        matches!(daemon.remote().call("get_api_version", &[]).await, Err(ClientError::Refused { .. }))
    })
    .await;
    // Settings that cannot be read change nothing.
    home.settings("[access]\npassword_after_ownership = 7\n");
    daemon.signal(Signal::SIGHUP);
    until("it is told", PATIENCE, async || home.log().contains("the settings cannot be read")).await;
    let still = daemon.remote().call("get_api_version", &[]).await;
    assert!(matches!(still, Err(ClientError::Refused { .. })), "{still:?}");
    home.settings("[access]\npassword_after_ownership = \"admin\"\n");
    daemon.signal(Signal::SIGHUP);
    until("the password is good again", PATIENCE, async || {
        daemon.remote().call("get_api_version", &[]).await.is_ok()
    })
    .await;
}

/// Does what systemd does for a socket unit: holds the sockets, and starts the daemon on them again and again.
const SUPERVISOR: &str = r#"
import os, signal, socket, sys
path, arguments = sys.argv[1], sys.argv[2:]
tcp = socket.socket(); tcp.bind(("127.0.0.1", 0)); tcp.listen(256)
unix = socket.socket(socket.AF_UNIX); unix.bind(path); unix.listen(256)
def start():
    pid = os.fork()
    if pid == 0:
        high = [os.dup(os.dup(s.fileno())) + 0 for s in (tcp, unix)]
        high = [os.dup2(fd, 50 + i) for i, fd in enumerate(high)]
        for i, fd in enumerate(high): os.dup2(fd, 3 + i)
        os.closerange(5, 60)
        os.environ.update(LISTEN_FDS="2", LISTEN_FDNAMES="tcp:unix", LISTEN_PID=str(os.getpid()))
        os.dup2(2, 1)
        os.execv(arguments[0], arguments)
    return pid
pid = start()
print(tcp.getsockname()[1], flush=True)
for line in sys.stdin:
    os.kill(pid, signal.SIGTERM)
    code = os.waitpid(pid, 0)[1]
    pid = start()
    print(code, flush=True)
os.kill(pid, signal.SIGTERM)
print(os.waitpid(pid, 0)[1], flush=True)
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_sockets_of_the_service_manager_a_restart_refuses_no_connection() {
    let home = Home::new();
    // A first life makes the certificates.
    let first = home.start().await;
    let ca = first.ca_der();
    first.stop().await;
    let socket = home.path("handed.sock");
    let mut supervisor = tokio::process::Command::new("python3")
        .args(["-c", SUPERVISOR, socket.to_str().unwrap(), env!("CARGO_BIN_EXE_dom0d")])
        .args(home.arguments())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::options().append(true).create(true).open(home.path("daemon.log")).unwrap())
        .spawn()
        .expect("this test needs python3");
    let mut commands = supervisor.stdin.take().unwrap();
    let mut said = BufReader::new(supervisor.stdout.take().unwrap()).lines();
    let mut line = async || timeout(PATIENCE, said.next_line()).await.unwrap().unwrap().unwrap();
    let port: u16 = line().await.parse().unwrap();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));

    let over = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..4)
        .map(|n| {
            let (over, answered, ca, socket) =
                (Arc::clone(&over), Arc::clone(&answered), ca.clone(), socket.clone());
            tokio::spawn(async move {
                let password = Some(dom0d::model::Secret::new(PASSWORD));
                let credentials = Credentials { password, certificate: None };
                while !over.load(Ordering::SeqCst) {
                    // A new connection each time.
                    let mut client = match n % 2 {
                        0 => Client::unix(&socket),
                        _ => {
                            let trust = ServerTrust::Ca { der: ca.clone(), name: None };
                            Client::tls(address, &trust, &credentials).unwrap()
                        }
                    };
                    let answer = client.call("get_api_version", &[], PATIENCE).await;
                    answer.unwrap_or_else(|error| panic!("a caller was refused: {error:?}"));
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for _ in 0..3 {
        let before = answered.load(Ordering::SeqCst);
        until("calls are answered", PATIENCE, async || answered.load(Ordering::SeqCst) > before + 8).await;
        commands.write_all(b"restart\n").await.unwrap();
        assert_eq!(line().await, "0", "{}", home.log());
    }
    let before = answered.load(Ordering::SeqCst);
    until("calls are answered", PATIENCE, async || answered.load(Ordering::SeqCst) > before + 8).await;
    over.store(true, Ordering::SeqCst);
    for caller in callers {
        timeout(PATIENCE, caller).await.unwrap().unwrap();
    }
    drop(commands);
    assert_eq!(line().await, "0");
    timeout(PATIENCE, supervisor.wait()).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_manager_is_told_of_readiness_life_reload_and_stop() {
    let home = Home::new();
    let path = home.path("notify.sock");
    let notify = UnixDatagram::bind(&path).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = |wanted: &str| {
        let mut buffer = [0; 1024];
        let mut heard = Vec::new();
        while !heard.iter().any(|text: &String| text.contains(wanted)) {
            let length = notify.recv(&mut buffer).unwrap_or_else(|e| panic!("no {wanted}: {e}; {heard:?}"));
            heard.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        heard
    };
    let mut command = home.command();
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "600000");
    let daemon = home.launch(command).await;
    tokio::task::block_in_place(|| hear("READY=1"));
    daemon.local().ask("get_api_version", &[]).await;
    for _ in 0..3 {
        tokio::task::block_in_place(|| hear("WATCHDOG=1"));
    }
    daemon.signal(Signal::SIGHUP);
    tokio::task::block_in_place(|| hear("RELOADING=1"));
    tokio::task::block_in_place(|| hear("READY=1"));
    daemon.signal(Signal::SIGTERM);
    tokio::task::block_in_place(|| hear("STOPPING=1"));
    let mut daemon = daemon;
    assert!(timeout(PATIENCE, daemon.child.wait()).await.unwrap().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_daemon_on_the_same_state_ends_with_a_word_and_leaves_the_first_alone() {
    let home = Home::new();
    let daemon = home.start().await;
    let mut command = home.command();
    command.stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let second = timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("in use by another process"), "{said}");
    daemon.remote().ask("echo", &[Value::Bool(true)]).await;
}
