//! The binaries as they are run: dom0ctl against a real socket, and both by their exit codes.

use dom0d::config::{Access, Wire};
use dom0d::model::Secret;
use dom0d::store::{Options, Store, Table, Txn};
use dom0d::wire::{
    Answer, Call, Fault, Gate, Handler, Identity, Policy, Role, Server, ServerConfig, TlsIdentity, TlsState,
    Value, bind_unix,
};
use futures_util::future::BoxFuture;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use tokio::process::Command;

/// Answers `echo` with its parameters, `who` with the caller's role, and everything else with a fault.
struct Echo;

impl Handler for Echo {
    fn call(&self, call: Call) -> BoxFuture<'_, Result<Answer, Fault>> {
        Box::pin(async move {
            assert!(matches!(call.caller.identity, Identity::Local { .. }));
            match call.method.as_str() {
                "echo" => Ok(Value::Array(call.params).into()),
                "who" => Ok(Value::Bool(call.caller.role == Role::Admin).into()),
                "vm_list" => Ok(Value::Array(Vec::new()).into()),
                other => {
                    let fault_string = format!("UNKNOWN_VERB: there is no verb {other}");
                    Err(Fault { fault_code: 1, fault_string })
                }
            }
        })
    }
}

fn serve(socket: &Path) -> Server {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate is made");
    let identity =
        TlsIdentity { chain_pem: key.cert.pem(), key_pem: Secret::new(key.signing_key.serialize_pem()) };
    let config = ServerConfig {
        settings: Wire::default(),
        access: Access::default(),
        gate: Arc::new(Gate::new(Policy::default()).expect("a gate without passwords")),
        tls: Arc::new(TlsState::new(&identity).expect("the certificate is good")),
        handler: Arc::new(Echo),
        upgrades: None,
        tcp: Vec::new(),
        unix: vec![bind_unix(socket, "").expect("the socket is free")],
    };
    Server::start(config).expect("the server starts")
}

async fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(args).env_remove("DOM0D_SOCKET").stdin(std::process::Stdio::null()).kill_on_drop(true);
    command.output().await.expect("the program can be started")
}

async fn ctl(socket: &Path, args: &[&str]) -> (i32, String, String) {
    let socket = socket.to_str().expect("the test's folder has a plain name");
    let output = run(env!("CARGO_BIN_EXE_dom0ctl"), &[&["--socket", socket], args].concat()).await;
    told(output)
}

async fn dom0d(args: &[&str]) -> (i32, String, String) {
    told(run(env!("CARGO_BIN_EXE_dom0d"), args).await)
}

fn told(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn a_call_goes_over_the_operators_socket_and_its_answer_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("dom0d.sock");
    let _server = serve(&socket);
    let (code, out, err) = ctl(&socket, &["call", "echo", "5", "web"]).await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "5\nweb\n", ""));
    let (code, out, _) = ctl(&socket, &["-o", "json", "call", "who"]).await;
    assert_eq!((code, out.as_str()), (0, "true\n"));
}

#[tokio::test]
async fn a_fault_is_told_on_stderr_with_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("dom0d.sock");
    let _server = serve(&socket);
    let (code, out, err) = ctl(&socket, &["call", "fly"]).await;
    assert_eq!((code, out.as_str()), (2, ""));
    assert_eq!(err, "dom0ctl: UNKNOWN_VERB: there is no verb fly\nhint: dom0ctl verb list\n");
    let (code, _, err) = ctl(&socket, &["vm", "start", "web"]).await;
    assert_eq!(code, 3, "{err}");
}

#[tokio::test]
async fn without_a_daemon_the_code_is_7_and_without_sense_it_is_2() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none.sock");
    let (code, out, err) = ctl(&socket, &["host", "show"]).await;
    assert_eq!((code, out.as_str()), (7, ""));
    assert!(err.contains("none.sock") && err.contains("hint: "), "{err}");
    assert_eq!(ctl(&socket, &["vm", "fly"]).await.0, 2);
    assert_eq!(ctl(&socket, &["completion", "bash"]).await.0, 0);
}

#[tokio::test]
async fn settings_are_checked_and_wrong_ones_end_the_daemon_with_2_and_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dom0d.toml");
    let name = file.to_str().unwrap();
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/config/dom0d.toml");
    assert_eq!(
        dom0d(&["--config", shipped, "--check-config"]).await,
        (0, format!("{shipped}: good\n"), String::new())
    );
    std::fs::write(&file, "[wire]\nmax_depth = 1\n").unwrap();
    for args in
        [vec!["--config", name, "--check-config"], vec!["--config", name], vec!["--dev", "--config", name]]
    {
        let (code, out, err) = dom0d(&args).await;
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
        let expected = format!(
            "dom0d: {name}:2: wire.max_depth: is 1; allowed: a whole number from 4 to 256 (levels)\n"
        );
        assert_eq!(err, expected);
    }
    assert_eq!(dom0d(&["--config", "/nowhere/at/all.toml"]).await.0, 2);
    assert_eq!(dom0d(&["--fly"]).await.0, 2);
    assert_eq!(dom0d(&["--die-at-commit", "1"]).await.0, 2);
}

#[tokio::test]
async fn a_store_is_exported_from_a_folder_and_imported_into_another_and_never_over_one_unasked() {
    const TABLE: Table<String> = Table::new("words", 1);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (from, to, file) = (path("from"), path("to"), path("export"));
    let socket = folder.path().join("none.sock");
    let ctl = async |args: &[&str]| ctl(&socket, args).await;

    let store = Store::open(Options::new(&from)).unwrap().store;
    let mut txn = Txn::new();
    txn.put(&TABLE, "a", &"b".to_owned());
    store.commit(txn).await.unwrap();
    let (code, _, err) = ctl(&["store", "export", "--state-dir", &from, &file]).await;
    assert_eq!(code, 4, "the daemon runs: {err}");
    assert!(!Path::new(&file).exists());
    store.close().await;
    drop(store);

    let (code, out, err) = ctl(&["store", "export", "--state-dir", &from, &file]).await;
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(ctl(&["store", "export", "--state-dir", &from, &file]).await.0, 1, "the file is there");
    let (code, out, _) = ctl(&["store", "export", "--state-dir", &from, "-"]).await;
    assert_eq!((code, out), (0, std::fs::read_to_string(&file).unwrap()));

    let (code, _, err) = ctl(&["store", "import", "--state-dir", &to, &file]).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(ctl(&["store", "import", "--state-dir", &to, &file]).await.0, 4);
    assert_eq!(ctl(&["store", "import", "--state-dir", &to, "--force", &file]).await.0, 0);
    let (code, out, err) = ctl(&["store", "check", "--state-dir", &to]).await;
    assert_eq!((code, err.as_str()), (0, "the store is good\n"));
    assert!(out.contains("words"), "{out}");
    assert_eq!(ctl(&["store", "check", "--state-dir", &path("absent")]).await.0, 3);
    let store = Store::open(Options::new(&to)).unwrap().store;
    assert_eq!(store.get(&TABLE, "a").await.unwrap().as_deref(), Some("b"));
    store.close().await;
}

#[tokio::test]
async fn the_simulated_world_is_a_process_that_is_found_again_and_ends_when_told() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("world.sock");
    let exe = Path::new(env!("CARGO_BIN_EXE_dom0d"));
    let options = dom0d::sim::Options { memory: dom0d::model::MiB(1024), ..Default::default() };
    let world = dom0d::sim::process::ensure(&socket, exe, options).await.unwrap();
    let again = dom0d::sim::process::ensure(&socket, exe, options).await.unwrap();
    again.audit().await.unwrap();
    world.end_world().await.unwrap();
    let log = std::fs::read_to_string(folder.path().join("world.sock.log")).unwrap();
    assert_eq!(log.matches("simulated world ready").count(), 1, "{log}");
}
