//! Real Xen: the rules one after the other in one dom0. Run there by the lab, as root:
//!
//! ```text
//! DOM0D_EXE=/path/dom0d DOM0D_XL_KERNEL=… DOM0D_XL_RAMDISK=… contract --ignored real_xen --nocapture
//! ```
//!
//! `DOM0D_EXE`: our binary, which `xl migrate` starts. `DOM0D_XL_GUEST` is `pv` (as is) or `pvh`; `DOM0D_XL_CMDLINE` goes to the
//! guest's kernel; `DOM0D_XL_BARE` leaves its disk and network card out; `DOM0D_XL_ONLY` runs only the rules whose names
//! hold one of these words, with commas between. The guest's kernel heeds shutdown, reboot and suspend, and balloons. A
//! bridge `xenbr0` exists. Each rule's domains are destroyed after it.

use crate::env::{Env, guest, vif};
use crate::toolstack::{self, Decision};
use dom0d::model::{MiB, SafePath, Text, VmId};
use dom0d::xen::config::{Boot, Disk, DiskBacking, DiskDevice, DiskMode, DomainConfig, GuestType, TscMode};
use dom0d::xen::xl::{Options, Xl};
use dom0d::xen::{AfterSave, DomId, RunState, ToolstackError};
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWrite};

type Rule = for<'a> fn(&'a Env) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

macro_rules! listed {
    ($($rule:ident,)*) => {
        vec![$((stringify!($rule), (|env| Box::pin(toolstack::$rule(env))) as Rule),)*]
    };
}

macro_rules! of_real_xen {
    ($($rule:ident,)*) => {
        vec![$((stringify!($rule), (|env| Box::pin($rule(env))) as Rule),)*]
    };
}

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn path(name: &str, otherwise: &str) -> SafePath {
    SafePath::parse(&set(name).unwrap_or_else(|| otherwise.to_owned())).unwrap()
}

/// What no rule takes, however slow the host.
const OF_A_RULE: Duration = Duration::from_secs(1800);
const FOLDER: &str = "/var/tmp/dom0d-contract";

/// A file of its own for each disk of each VM.
fn disk(vm: VmId, device: &str) -> Disk {
    let path = format!("{FOLDER}/{vm}-{device}.img");
    if let Ok(file) = std::fs::File::create_new(&path) {
        file.set_len(16 * 1024 * 1024).unwrap();
    }
    Disk {
        backing: DiskBacking::File,
        path: Some(SafePath::parse(&path).unwrap()),
        device: DiskDevice::parse(device).unwrap(),
        cdrom: false,
        mode: DiskMode::ReadWrite,
    }
}

fn small_guest() -> DomainConfig {
    let vm = VmId::random();
    let pvh = set("DOM0D_XL_GUEST").as_deref() == Some("pvh");
    let cmdline = set("DOM0D_XL_CMDLINE").unwrap_or_else(|| "console=hvc0 mitigations=off".to_owned());
    DomainConfig {
        guest: if pvh { GuestType::Pvh } else { GuestType::Pv },
        boot: Boot::Kernel {
            kernel: path("DOM0D_XL_KERNEL", "/lab/vmlinux"),
            ramdisk: Some(path("DOM0D_XL_RAMDISK", "/lab/domu.cpio")),
            cmdline: Text::parse(&cmdline).unwrap(),
        },
        memory: if pvh { MiB(160) } else { MiB(96) },
        max_memory: if pvh { MiB(192) } else { MiB(160) },
        tsc_mode: if pvh { TscMode::Native } else { TscMode::Default },
        ..with_devices(guest(vm, disk(vm, "xvda")))
    }
}

/// A slow host builds a bare guest sooner: its hotplug scripts take most of a build.
fn with_devices(mut guest: DomainConfig) -> DomainConfig {
    if set("DOM0D_XL_BARE").is_some() {
        guest.disks.clear();
        guest.vifs.clear();
    }
    guest
}

fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

async fn environment() -> Env {
    let options = Options {
        xl: set("DOM0D_XL").map(Into::into),
        exe: set("DOM0D_EXE").expect("DOM0D_EXE names our binary").into(),
        folder: format!("{FOLDER}/xl").into(),
        limit: Duration::from_secs(300),
    };
    std::fs::create_dir_all(FOLDER).unwrap();
    let toolstack = Xl::open(options).await.expect("xl can be used");
    Env {
        toolstack: Arc::new(toolstack),
        peer: None,
        guests: None,
        folder: SafePath::parse(FOLDER).unwrap(),
        config: small_guest,
        disk,
        is_up,
        patience: Duration::from_secs(120),
        slack: MiB(4),
        kept: Box::new(()),
    }
}

/// Linux says so with the others of its xenbus's words, once it has drivers. Before, a PV guest cannot even be saved.
fn is_up(domid: DomId) -> bool {
    let path = format!("/local/domain/{}/control/feature-poweroff", domid.0);
    let told = std::process::Command::new("xenstore-read").arg(path).output();
    told.is_ok_and(|told| told.stdout.starts_with(b"1"))
}

async fn destroy_all(env: &Env) {
    for domain in env.toolstack.list().await.unwrap() {
        if domain.name.starts_with("contract-") {
            let _ = env.toolstack.destroy(domain.domid).await;
        }
    }
    for entry in std::fs::read_dir(FOLDER).unwrap().flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
}

#[test]
#[ignore = "needs a real dom0, and destroys every domain whose name begins with contract-"]
fn real_xen() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut rules: Vec<(&str, Rule)> = toolstack::rules!(listed);
    rules.extend(of_real_xen![
        a_domain_sent_live_comes_back_from_what_was_sent,
        a_domain_sent_while_it_stands_still_comes_back_from_what_was_sent,
        a_domain_that_was_sent_but_not_handed_over_goes_on,
        a_domain_whose_stream_breaks_goes_on,
        a_torn_stream_leaves_no_domain,
        a_caller_that_goes_leaves_no_domain_and_no_part,
        what_xl_cfg_could_take_for_its_own_reaches_the_guest_as_it_is,
    ]);
    let only = set("DOM0D_XL_ONLY").unwrap_or_default();
    let mut failed = Vec::new();
    let wanted = |name: &str| only.split(',').any(|part| name.contains(part));
    for (name, rule) in rules.into_iter().filter(|(name, _)| wanted(name)) {
        let began = Instant::now();
        let held = std::panic::catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async {
                let env = environment().await;
                destroy_all(&env).await;
                tokio::time::timeout(OF_A_RULE, rule(&env)).await.expect("a rule comes to its end");
            });
        }));
        let word = if held.is_ok() { "holds" } else { "DOES NOT HOLD" };
        say(&format!("{name}: {word} ({} ms)", began.elapsed().as_millis()));
        if held.is_err() {
            failed.push(name);
        }
    }
    runtime.block_on(async { destroy_all(&environment().await).await });
    assert!(failed.is_empty(), "{} rules do not hold: {failed:?}", failed.len());
}

async fn state(env: &Env, domid: DomId) -> RunState {
    env.info(domid).await.state
}

fn alive(state: RunState) -> bool {
    matches!(state, RunState::Running | RunState::Blocked)
}

/// Sends a domain and takes it in again, as another host would.
async fn there_and_back(env: &Env, live: bool) {
    let (config, domid) = env.started().await;
    env.toolstack.attach_vif(domid, &vif(crate::env::mac_of(config.vm, 3))).await.unwrap();
    let sent = Collected::default();
    let decision = Decision::new(true);
    env.toolstack.migrate_out(domid, live, Box::new(sent.clone()), decision.clone()).await.unwrap();
    assert_eq!(decision.asked(), 1);
    assert_eq!(env.toolstack.find(config.vm).await, Ok(None));
    let back = env.toolstack.migrate_in(sent.again()).await.unwrap();
    let info = env.info(back).await;
    assert_eq!((info.vm, info.name.as_str()), (Some(config.vm), config.name.as_str()));
    assert_eq!(info.state, RunState::Paused);
    assert_eq!(
        env.toolstack.config(back).await.unwrap().vifs.len(),
        config.vifs.len() + 1,
        "plugged devices go along"
    );
    env.toolstack.unpause(back).await.unwrap();
    assert!(alive(state(env, back).await));
    let before = env.info(back).await.cpu_time_ns;
    while env.info(back).await.cpu_time_ns <= before {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Keeps what is written to it.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl Collected {
    fn again(&self) -> Box<std::io::Cursor<Vec<u8>>> {
        Box::new(std::io::Cursor::new(std::mem::take(&mut self.0.lock().unwrap())))
    }
}

impl AsyncWrite for Collected {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

async fn a_domain_sent_live_comes_back_from_what_was_sent(env: &Env) {
    // Live migration needs an HVM container: Debian's Xen has no shadow paging for PV guests.
    if set("DOM0D_XL_GUEST").as_deref() == Some("pvh") {
        there_and_back(env, true).await;
    }
}

async fn a_domain_sent_while_it_stands_still_comes_back_from_what_was_sent(env: &Env) {
    there_and_back(env, false).await;
}

fn lives() -> Vec<bool> {
    if set("DOM0D_XL_GUEST").as_deref() == Some("pvh") { vec![true, false] } else { vec![false] }
}

async fn a_domain_that_was_sent_but_not_handed_over_goes_on(env: &Env) {
    let (config, domid) = env.started().await;
    for live in lives() {
        let decision = Decision::new(false);
        let sent =
            env.toolstack.migrate_out(domid, live, Box::new(tokio::io::sink()), decision.clone()).await;
        assert!(matches!(sent, Err(ToolstackError::Failed(_))), "{sent:?}");
        assert_eq!(decision.asked(), 1);
        let info = env.info(domid).await;
        assert!(alive(info.state), "{info:?}");
        assert_eq!(info.name, config.name.as_str());
    }
    env.toolstack.shutdown(domid).await.unwrap();
    env.end_of(domid).await;
}

async fn a_domain_whose_stream_breaks_goes_on(env: &Env) {
    let (_, domid) = env.started().await;
    for live in lives() {
        let (near, mut far) = tokio::io::duplex(64 * 1024);
        let reading = async move {
            let mut first = vec![0; 20 * 1024 * 1024];
            far.read_exact(&mut first).await.unwrap();
        };
        let decision = Decision::new(true);
        let sending = env.toolstack.migrate_out(domid, live, Box::new(near), decision.clone());
        let (sent, ()) = tokio::join!(sending, reading);
        assert!(matches!(sent, Err(ToolstackError::Failed(_))), "{sent:?}");
        assert_eq!(decision.asked(), 0);
        assert!(alive(state(env, domid).await));
    }
    env.toolstack.shutdown(domid).await.unwrap();
    env.end_of(domid).await;
}

async fn a_torn_stream_leaves_no_domain(env: &Env) {
    let (config, domid) = env.started().await;
    let sent = Collected::default();
    env.toolstack.migrate_out(domid, false, Box::new(sent.clone()), Decision::new(true)).await.unwrap();
    sent.0.lock().unwrap().truncate(20 * 1024 * 1024);
    let torn = env.toolstack.migrate_in(sent.again()).await;
    assert!(matches!(torn, Err(ToolstackError::Failed(_))), "{torn:?}");
    assert_eq!(env.toolstack.find(config.vm).await, Ok(None));
}

async fn a_caller_that_goes_leaves_no_domain_and_no_part(env: &Env) {
    let config = env.new_vm();
    let soon = Duration::from_millis(500);
    assert!(tokio::time::timeout(soon, env.toolstack.create(&config, false)).await.is_err());
    // The next build of the VM waits for what is cleared up after the last.
    let domid = env.toolstack.create(&config, false).await.unwrap();
    assert_eq!(env.toolstack.find(config.vm).await.unwrap().map(|d| d.domid), Some(domid));
    let file = env.file("left");
    let save = env.toolstack.save(domid, &file, AfterSave::Destroy);
    assert!(tokio::time::timeout(soon, save).await.is_err());
    let wait = async {
        while !alive(state(env, domid).await) || std::path::Path::new(&format!("{file}.part")).exists() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(env.patience, wait).await.expect("the domain goes on");
    assert!(!std::path::Path::new(file.as_str()).exists());
}

async fn what_xl_cfg_could_take_for_its_own_reaches_the_guest_as_it_is(env: &Env) {
    for hostile in [r#"a" b\" c'"#, "x]\ny = [ \"1\" ]", "back\\slash \\n \\x41", "tab\tend\n\nkernel=\"/x\""]
    {
        let mut config = env.new_vm();
        let Boot::Kernel { cmdline, .. } = &mut config.boot else { panic!("a kernel is booted") };
        let text = format!("{} {hostile}", cmdline.as_str());
        *cmdline = Text::parse(&text).unwrap();
        let domid = env.toolstack.create(&config, true).await.unwrap();
        let told = env.toolstack.config(domid).await.unwrap();
        assert_eq!(told.boot, config.boot);
        env.toolstack.destroy(domid).await.unwrap();
    }
}
