//! The simulated world as a process of its own, started as the daemon starts it. The "daemon's binary" here is a
//! script that runs this very test binary, so that these tests need nothing but themselves.
#![allow(clippy::unwrap_used, reason = "a test: a failure shall stop it")]

use dom0d::sim::{Answer, Handle, Options, Request, process};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Not a rule: the world's process, if the script asks for it.
#[test]
fn child_that_serves_the_world() {
    if let Some(socket) = std::env::var_os("SIMULATED_WORLD_SOCKET") {
        process::run(Path::new(&socket), Options::default()).unwrap();
    }
}

fn binary(folder: &Path) -> PathBuf {
    let path = folder.join("dom0d");
    let itself = std::env::current_exe().unwrap();
    // $1 simulated-world, $2 --socket, $3 its path
    let script = format!(
        "#!/bin/sh\n[ \"$1 $2 $4\" = 'simulated-world --socket --memory-mib' ] || exit 1\n\
         SIMULATED_WORLD_SOCKET=\"$3\" exec '{}' --exact child_that_serves_the_world\n",
        itself.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    path
}

fn pid(socket: &Path) -> nix::unistd::Pid {
    let text = std::fs::read_to_string(socket.with_extension("pid")).unwrap();
    nix::unistd::Pid::from_raw(text.trim().parse().unwrap())
}

async fn boot_id(handle: &Handle) -> String {
    match handle.call(Request::Host, TIMEOUT).await.unwrap() {
        Answer::Host(host) => host.boot_id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_world_is_started_once_found_again_and_out_of_reach_of_its_starters_signals() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, exe) = (folder.path().join("world"), binary(folder.path()));
    let first = process::ensure(&socket, &exe, Options::default()).await.unwrap();
    let (world, id) = (pid(&socket), boot_id(&first).await);
    drop(first);
    // Without its binary no second world could be started.
    let again = process::ensure(&socket, Path::new("/nonexistent"), Options::default()).await.unwrap();
    assert_eq!((pid(&socket), boot_id(&again).await), (world, id));
    let group = |pid| nix::unistd::getpgid(pid).unwrap();
    assert_ne!(group(Some(world)), group(None), "Ctrl-C on our terminal does not reach it");
    again.end_world().await.unwrap();
}

#[tokio::test]
async fn a_killed_world_is_replaced_although_its_socket_and_pid_file_still_lie_there() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, exe) = (folder.path().join("world"), binary(folder.path()));
    let first = process::ensure(&socket, &exe, Options::default()).await.unwrap();
    let killed = pid(&socket);
    nix::sys::signal::kill(killed, nix::sys::signal::Signal::SIGKILL).unwrap();
    while first.call(Request::Info, TIMEOUT).await.is_ok() {}
    assert!(socket.exists());
    let second = process::ensure(&socket, &exe, Options::default()).await.unwrap();
    assert_ne!(pid(&socket), killed);
    second.end_world().await.unwrap();
}

#[tokio::test]
async fn two_that_start_a_world_at_the_same_moment_get_the_same_one() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, exe) = (folder.path().join("world"), binary(folder.path()));
    let ensure = || process::ensure(&socket, &exe, Options::default());
    let (a, b) = tokio::join!(ensure(), ensure());
    let (a, b) = (a.unwrap(), b.unwrap());
    let mut seen = a.observe::<dom0d::sim::Observation>();
    assert_eq!(boot_id(&a).await, boot_id(&b).await);
    // A reboot through one is observed through the other.
    b.call(Request::HostReboot, TIMEOUT).await.unwrap();
    tokio::time::timeout(TIMEOUT, seen.recv()).await.unwrap().unwrap();
    a.end_world().await.unwrap();
}
