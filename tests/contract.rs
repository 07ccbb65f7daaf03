//! The contracts of the toolstack and of the kernel, held against every body that this machine can run: the simulated
//! world in this process (in virtual time) and behind its socket (in real time), and the real kernel in a network namespace of
//! its own, for which the tests must run as root. The body for real Xen is held to the same rules in the lab, in a real dom0:
//! `real`.

#![allow(clippy::unwrap_used, reason = "a test: a failure shall stop it")]

#[path = "contract/dhcp.rs"]
mod dhcp;
#[path = "contract/env.rs"]
mod env;
#[path = "contract/figures.rs"]
mod figures;
#[path = "contract/kernel.rs"]
mod kernel;
#[path = "contract/machine.rs"]
mod machine;
#[path = "contract/migration.rs"]
mod migration;
#[path = "contract/namespace.rs"]
mod namespace;
#[path = "contract/real.rs"]
mod real;
#[path = "contract/routes.rs"]
mod routes;
#[path = "contract/toolstack.rs"]
mod toolstack;
#[path = "contract/traffic.rs"]
mod traffic;

use dom0d::kernel::sim::SimKernel;
use dom0d::machine::linux::LinuxMachine;
use dom0d::machine::sim::SimMachine;
use dom0d::model::{MiB, SafePath, VmId};
use dom0d::sim::{Behaviour, Handle, Options, Reason, process};
use dom0d::xen::Toolstack;
use dom0d::xen::sim::SimToolstack;
use env::{Env, Guests, small_guest, unseen_disk};
use std::sync::Arc;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(20);

struct SimGuests(Handle);

#[async_trait::async_trait]
impl Guests for SimGuests {
    async fn ignore_shutdown(&self, vm: VmId) {
        self.0.set_behaviour(Some(vm), Behaviour::deaf()).await.unwrap();
    }

    async fn crash(&self, vm: VmId) {
        self.0.end_guest(vm, Reason::Crash).await.unwrap();
    }
}

fn options() -> Options {
    Options { memory: MiB(8192), ..Options::default() }
}

fn environment(here: Handle, there: Handle, dir: tempfile::TempDir) -> Env {
    Env {
        toolstack: Arc::new(SimToolstack::new(here.clone(), TIMEOUT)),
        peer: Some(Arc::new(SimToolstack::new(there, TIMEOUT))),
        guests: Some(Box::new(SimGuests(here))),
        folder: SafePath::parse(dir.path().to_str().unwrap()).unwrap(),
        config: small_guest,
        disk: unseen_disk,
        slack: MiB(0),
        is_up: |_| true,
        patience: Duration::from_secs(10),
        kept: Box::new(dir),
    }
}

async fn in_process_world() -> Env {
    let (here, there) = (Handle::in_process(options()), Handle::in_process(options()));
    environment(here, there, tempfile::tempdir().unwrap())
}

async fn world_behind_a_socket() -> Env {
    let dir = tempfile::tempdir().unwrap();
    let serve = |name: &str| {
        let socket = dir.path().join(name);
        let path = socket.clone();
        tokio::spawn(async move { process::serve(&path, options()).await });
        socket
    };
    let (here, there) = (serve("here"), serve("there"));
    while !here.exists() || !there.exists() {
        tokio::task::yield_now().await;
    }
    environment(Handle::remote(&here), Handle::remote(&there), dir)
}

macro_rules! hold_in_process {
    ($($rule:ident,)*) => {
        mod simulated_in_virtual_time {
            $(#[tokio::test(start_paused = true)]
            async fn $rule() {
                crate::toolstack::$rule(&crate::in_process_world().await).await;
            })*
        }
    };
}

macro_rules! hold_behind_a_socket {
    ($($rule:ident,)*) => {
        mod simulated_behind_a_socket {
            $(#[tokio::test]
            async fn $rule() {
                crate::toolstack::$rule(&crate::world_behind_a_socket().await).await;
            })*
        }
    };
}

toolstack::rules!(hold_in_process);
toolstack::rules!(hold_behind_a_socket);

#[tokio::test(start_paused = true)]
async fn simulated_traffic_of_a_domain_grows_while_it_runs_and_goes_with_it() {
    let handle = Handle::in_process(options());
    let worlds = traffic::Worlds {
        toolstack: &SimToolstack::new(handle.clone(), TIMEOUT),
        kernel: &SimKernel::new(handle.clone(), TIMEOUT),
        machine: &SimMachine::new(handle, TIMEOUT),
    };
    traffic::traffic_of_a_domain_grows_while_it_runs_and_goes_with_it(&worlds).await;
}

#[tokio::test(start_paused = true)]
async fn simulated_figures_of_a_machine_only_grow_where_they_count() {
    machine::figures_only_grow_where_they_count(&SimMachine::new(Handle::in_process(options()), TIMEOUT))
        .await;
}

/// Those of the machine that we run on, which has no Xen as a rule.
#[tokio::test]
async fn real_figures_of_a_machine_only_grow_where_they_count() {
    machine::figures_only_grow_where_they_count(&LinuxMachine::new("/".into())).await;
}

#[tokio::test(start_paused = true)]
async fn a_simulated_guest_is_believed_only_what_may_be_true() {
    let world = Handle::in_process(options());
    let toolstack = SimToolstack::new(world.clone(), TIMEOUT);
    let config = small_guest();
    let domid = toolstack.create(&config, false).await.unwrap();
    let told = || async {
        let told = toolstack.guest_figures(&[domid]).await.unwrap().remove(0);
        (told.guest_total.map(|kib| kib.0), told.guest_free.map(|kib| kib.0))
    };
    assert_eq!(told().await, (None, None), "it has not booted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(told().await, (Some(64_512), Some(32_256)));
    for (free, believed) in [
        (&b"7"[..], Some(7)),
        (b"64512", Some(64_512)),
        (b"64513", None),
        (b"99999999999999999999", None),
        (b"\xff\0", None),
        (&[b'0'; 4096], None),
        (b"", None),
    ] {
        world.guest_writes(config.vm, "data/meminfo_free", free).await.unwrap();
        assert_eq!(told().await, (Some(64_512), believed), "{free:?}");
    }
    assert!(world.guest_writes(config.vm, "data/meminfo_free", &[0; 4097]).await.is_err());
    world.guest_writes(config.vm, "data/meminfo_total", b"131073").await.unwrap();
    assert_eq!(told().await, (None, None), "more than the 128 MiB that it may have");
}

macro_rules! hold_kernel_in_process {
    ($($rule:ident,)*) => {
        mod simulated_kernel_in_virtual_time {
            $(#[tokio::test(start_paused = true)]
            async fn $rule() {
                let world = dom0d::sim::Handle::in_process(crate::options());
                crate::kernel::$rule(&dom0d::kernel::sim::SimKernel::new(world, crate::TIMEOUT)).await;
            })*
        }
    };
}

macro_rules! hold_kernel_behind_a_socket {
    ($($rule:ident,)*) => {
        mod simulated_kernel_behind_a_socket {
            $(#[tokio::test]
            async fn $rule() {
                let dir = tempfile::tempdir().unwrap();
                let socket = dir.path().join("world");
                let path = socket.clone();
                tokio::spawn(async move { dom0d::sim::process::serve(&path, crate::options()).await });
                while !socket.exists() {
                    tokio::task::yield_now().await;
                }
                let world = dom0d::sim::Handle::remote(&socket);
                crate::kernel::$rule(&dom0d::kernel::sim::SimKernel::new(world, crate::TIMEOUT)).await;
            })*
        }
    };
}

macro_rules! hold_kernel_in_a_namespace {
    ($($rule:ident,)*) => {
        mod real_kernel_in_a_namespace {
            $(#[tokio::test]
            async fn $rule() {
                crate::kernel::$rule(&crate::namespace::fresh().kernel()).await;
            })*
        }
    };
}

kernel::rules!(hold_kernel_in_process);
kernel::rules!(hold_kernel_behind_a_socket);
kernel::rules!(hold_kernel_in_a_namespace);
