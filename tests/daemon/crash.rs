//! F2: the daemon is killed at every transaction of every verb that is a job, and started again. Whatever was
//! accepted ends in one terminal state, record and world agree, and nothing ran twice.
//!
//! One verb is swept in one home. For N = 1, 2, … and for both sides of the Nth transaction after the call: a
//! normal daemon prepares a fresh VM, a second one is called and kills itself there, a third one must find its
//! way. The sweep is over when the call is answered before the daemon could die.

use crate::support::*;
use dom0d::api::value::{int, structure, text, texts};
use dom0d::model::VmId;
use dom0d::sim::{Answer, Handle, Reason, Request};
use dom0d::wire::{ClientError, Value};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// From READY to the end of everything that was open.
const CONVERGES_WITHIN: Duration = Duration::from_secs(5);
/// More transactions than any verb makes.
const MOST_COMMITS: u64 = 40;

/// What is there before the call.
#[derive(Debug, Clone, Copy, PartialEq)]
enum From {
    Nothing,
    Off,
    Running,
    Paused,
    Saved,
    /// Running, with a core dump.
    Dumped,
    Unowned,
    Owned,
    Host,
}

/// What there is to be once the job has succeeded.
#[derive(Clone, Copy)]
enum Then {
    /// The VM is in this state, and its domain has begun so often.
    Vm(&'static str, u64),
    Gone,
    Check(Check),
}

/// What else must hold; `done` is whether the job was accepted.
type Check = for<'a> fn(&'a mut Scene, bool) -> futures_util::future::BoxFuture<'a, Result<(), String>>;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    verb: &'static str,
    from: From,
    params: fn(&Target) -> Vec<Value>,
    then: Then,
    /// Effects that the world must have counted for the VM, each so often as said.
    effects: &'static [(&'static str, usize)],
    /// Beyond the VM's state.
    also: Option<Check>,
}

/// What one cycle is about.
#[derive(Debug, Clone)]
struct Target {
    vm: VmId,
    cycle: u64,
    core: String,
    /// Host reboots and the certificate before the call.
    reboots: u64,
    fingerprint: String,
    before: u64,
}

/// A home with a daemon that was started again, looked at.
struct Scene {
    daemon: Daemon,
    local: Caller,
    world: Handle,
    target: Target,
}

const MANAGER: &str = "0004fb0000010000aabbccddeeff0011";

fn vm(target: &Target) -> Vec<Value> {
    vec![text(REPO), text(target.vm)]
}

fn vm_and(target: &Target, more: impl IntoIterator<Item = Value>) -> Vec<Value> {
    vm(target).into_iter().chain(more).collect()
}

const fn case(
    name: &'static str,
    from: From,
    params: fn(&Target) -> Vec<Value>,
    then: Then,
    effects: &'static [(&'static str, usize)],
) -> Case {
    Case { name, verb: name, from, params, then, effects, also: None }
}

impl Case {
    const fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    const fn also(self, check: Check) -> Self {
        Self { also: Some(check), ..self }
    }
}

fn vm_cases() -> Vec<Case> {
    vec![
        case("create_vm", From::Nothing, |t| vm_and(t, [vm_params(t.vm)]), Then::Vm("off", 0), &[]),
        case("start_vm", From::Off, vm, Then::Vm("running", 1), &[("create", 1)]),
        case("stop_vm", From::Running, vm, Then::Vm("off", 1), &[("destroy", 1)]),
        case(
            "stop_vm",
            From::Running,
            |t| vm_and(t, [Value::Bool(true)]),
            Then::Vm("off", 1),
            &[("destroy", 1)],
        )
        .named("stop_vm by force"),
        case("reboot_vm", From::Running, vm, Then::Vm("running", 2), &[("create", 2), ("destroy", 1)]),
        case("pause_vm", From::Running, vm, Then::Vm("paused", 1), &[("pause", 1)]),
        case("unpause_vm", From::Paused, vm, Then::Vm("running", 1), &[("unpause", 1)]),
        case("save_vm", From::Running, vm, Then::Vm("saved", 1), &[]),
        case("save_vm", From::Running, |t| vm_and(t, [Value::Bool(true)]), Then::Vm("running", 1), &[])
            .named("save_vm as a checkpoint"),
        case("restore_vm", From::Saved, vm, Then::Vm("running", 2), &[("create", 1)]),
        case("restore_vm", From::Saved, |t| vm_and(t, [Value::Bool(true)]), Then::Vm("paused", 2), &[])
            .named("restore_vm, paused"),
        case("delete_vm", From::Off, vm, Then::Gone, &[]),
        case("delete_vm", From::Saved, vm, Then::Gone, &[]).named("delete_vm, saved"),
        case("configure_vm", From::Running, |t| vm_and(t, [grown(t)]), Then::Vm("running", 1), &[])
            .also(has_grown),
        case("configure_vm", From::Off, |t| vm_and(t, [grown(t)]), Then::Vm("off", 0), &[])
            .named("configure_vm, off")
            .also(has_grown),
        case(
            "unconfigure_vm",
            From::Running,
            |t| vm_and(t, [its_vif(t)]),
            Then::Vm("running", 1),
            &[("detach vif", 1)],
        )
        .also(has_no_vif),
        case("set_vm_config", From::Off, |t| vm_and(t, [changed(t)]), Then::Vm("off", 0), &[])
            .also(has_grown),
        case("configure_vm_ha", From::Off, |t| vm_and(t, [Value::Bool(true)]), Then::Vm("off", 0), &[])
            .also(is_ha),
        case("sysrq_vm", From::Running, |t| vm_and(t, [text("s")]), Then::Vm("running", 1), &[]),
        case("trigger_vm", From::Running, |t| vm_and(t, [text("nmi")]), Then::Vm("running", 1), &[]),
        case(
            "send_to_guest",
            From::Running,
            |t| vm_and(t, [structure([("a", text("1")), ("b", text("2"))])]),
            Then::Vm("running", 1),
            &[],
        )
        .also(guest_has_it),
        case("dump_vm_core", From::Running, vm, Then::Vm("running", 1), &[]).also(has_one_core),
        case(
            "dump_vm_core",
            From::Running,
            |t| vm_and(t, [Value::Bool(false), Value::Bool(true), Value::Bool(false)]),
            Then::Vm("off", 1),
            &[],
        )
        .named("dump_vm_core, ending it")
        .also(has_one_core),
        case(
            "dump_vm_core",
            From::Running,
            |t| vm_and(t, [Value::Bool(false), Value::Bool(false), Value::Bool(true)]),
            Then::Vm("running", 2),
            &[("create", 2)],
        )
        .named("dump_vm_core, starting it anew")
        .also(has_one_core),
        case("delete_vm_core", From::Dumped, |t| vm_and(t, [text(&t.core)]), Then::Vm("running", 1), &[])
            .also(has_no_core),
    ]
}

fn host_cases() -> Vec<Case> {
    let none = |_: &Target| Vec::new();
    vec![
        case("set_datetime", From::Host, date, Then::Check(clock_is_set), &[]),
        case(
            "set_timezone",
            From::Host,
            |_| vec![text("Europe/Amsterdam"), Value::Bool(true)],
            Then::Check(zone_is_set),
            &[],
        ),
        case(
            "set_ntp",
            From::Host,
            |t| vec![texts([server(t)]), Value::Bool(true)],
            Then::Check(ntp_is_set),
            &[],
        ),
        case("enable_ntp", From::Host, none, Then::Check(ntp_runs), &[]),
        case("disable_ntp", From::Host, none, Then::Check(ntp_rests), &[]),
        case(
            "update_agent_password",
            From::Host,
            |t| vec![text("oracle"), text(new_password(t))],
            Then::Check(password_is_new),
            &[],
        ),
        case(
            "update_server_roles",
            From::Host,
            |t| vec![text(roles(t.cycle))],
            Then::Check(roles_are_set),
            &[],
        ),
        case(
            "take_ownership",
            From::Unowned,
            |_| vec![text(MANAGER), text("https://manager.example:7001/api")],
            Then::Check(is_owned),
            &[],
        ),
        case("release_ownership", From::Owned, |_| vec![text(MANAGER)], Then::Check(is_unowned), &[]),
        case("certificate_renew", From::Host, none, Then::Check(certificate_is_new), &[]),
        case("sleep", From::Host, |_| vec![int(0)], Then::Check(nothing_to_see), &[]),
        case("sys_reboot", From::Running, none, Then::Check(rebooted), &[]),
        case("sys_shutdown", From::Running, none, Then::Check(switched_off), &[]),
    ]
}

fn grown(_: &Target) -> Value {
    structure([("memory", int(48)), ("vcpus", int(2)), ("cpu_weight", int(512))])
}

fn changed(target: &Target) -> Value {
    let Value::Struct(mut map) = vm_params(target.vm) else { unreachable!("it is a struct") };
    let Value::Struct(grown) = grown(target) else { unreachable!("it is a struct") };
    map.extend(grown);
    Value::Struct(map)
}

fn its_vif(target: &Target) -> Value {
    structure([("vif", field(&vm_params(target.vm), "vif").clone())])
}

fn date(target: &Target) -> Vec<Value> {
    [2030 + target.cycle, 5, 6, 7, 8, 9].into_iter().map(int).collect()
}

fn server(target: &Target) -> String {
    format!("ntp{}.example.org", target.cycle)
}

fn new_password(target: &Target) -> String {
    format!("new-Passwort-{}", target.cycle)
}

fn roles(cycle: u64) -> &'static str {
    if cycle.is_multiple_of(2) { "xen" } else { "xen,utility" }
}

/// A check that reads with the local caller.
macro_rules! check {
    ($name:ident, |$scene:ident, $done:ident| $body:expr) => {
        fn $name<'a>(
            $scene: &'a mut Scene,
            $done: bool,
        ) -> futures_util::future::BoxFuture<'a, Result<(), String>> {
            Box::pin(async move { $body })
        }
    };
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{what}: {found:?} instead of {expected:?}")) }
}

check!(nothing_to_see, |_scene, _done| Ok(()));

check!(has_grown, |scene, done| {
    let config = scene.local.on_vm("get_vm_config", scene.target.vm).await;
    let expected = if done { (48, 2, 512) } else { (32, 1, 256) };
    let part = |name: &str| number(field(&config, name));
    same("the configuration", (part("memory"), part("vcpus"), part("cpu_weight")), expected)?;
    if let Some(domain) = domain(&scene.world, scene.target.vm).await {
        same(
            "the domain",
            (domain.memory.0 / 1024, u64::from(domain.online_vcpus)),
            (expected.0, expected.1),
        )?;
    }
    Ok(())
});

check!(has_no_vif, |scene, done| {
    let config = scene.local.on_vm("get_vm_config", scene.target.vm).await;
    let domid = domain(&scene.world, scene.target.vm).await.ok_or("no domain")?.domid;
    let spec = match scene.world.call(Request::Config { domid }, PATIENCE).await {
        Ok(Answer::Config(spec)) => spec,
        other => return Err(format!("{other:?}")),
    };
    let expected = usize::from(!done);
    same("vifs", (list(field(&config, "vif")).len(), spec.vifs.len()), (expected, expected))
});

check!(is_ha, |scene, done| {
    let vm = scene.local.ask("vm_get", &[text(scene.target.vm)]).await;
    same("ha", field(&vm, "ha").clone(), Value::Bool(done))
});

check!(guest_has_it, |scene, done| {
    let domid = domain(&scene.world, scene.target.vm).await.ok_or("no domain")?.domid;
    match scene.world.call(Request::GuestStore { domid }, PATIENCE).await {
        Ok(Answer::Pairs(pairs)) => same("values", pairs.len(), if done { 2 } else { 0 }),
        other => Err(format!("{other:?}")),
    }
});

check!(has_one_core, |scene, done| {
    let cores = scene.local.on_vm("list_vm_core", scene.target.vm).await;
    same("core dumps", list(&cores).len(), usize::from(done))?;
    for core in list(&cores) {
        let file = string(field(core, "file"));
        same(&file, std::path::Path::new(&file).exists(), true)?;
    }
    Ok(())
});

check!(has_no_core, |scene, done| {
    let cores = scene.local.on_vm("list_vm_core", scene.target.vm).await;
    same("core dumps", list(&cores).len(), usize::from(!done))
});

check!(clock_is_set, |scene, done| {
    let now = scene.local.ask("get_datetime", &[]).await;
    let there = number(&list(&now)[0]) == 2030 + scene.target.cycle;
    same("the year is the one asked for", there, done)
});

check!(zone_is_set, |scene, done| {
    let zone = scene.local.ask("get_timezone", &[]).await;
    match (string(&list(&zone)[0]).as_str(), done) {
        ("Europe/Amsterdam", _) | ("UTC", false) => Ok(()),
        (other, _) => Err(format!("the time zone is {other}")),
    }
});

check!(ntp_is_set, |scene, done| {
    let ntp = scene.local.ask("get_ntp", &[]).await;
    let there = list(&list(&ntp)[0]) == [text(server(&scene.target))];
    same("the server is the one asked for", there, done)
});

async fn ntp(scene: &mut Scene, done: bool, running: bool) -> Result<(), String> {
    let ntp = scene.local.ask("get_ntp", &[]).await;
    if done { same("NTP runs", list(&ntp)[2].clone(), Value::Bool(running)) } else { Ok(()) }
}

check!(ntp_runs, |scene, done| ntp(scene, done, true).await);
check!(ntp_rests, |scene, done| ntp(scene, done, false).await);

check!(password_is_new, |scene, done| {
    let mut caller = scene.daemon.remote_as(&new_password(&scene.target));
    match (caller.call("get_api_version", &[]).await, done) {
        (Ok(_), true) | (Err(ClientError::Refused { .. }), false) => Ok(()),
        (other, done) => Err(format!("the new password: {other:?} although done is {done}")),
    }
});

check!(roles_are_set, |scene, done| {
    let found = string(field(&scene.local.ask("host_get", &[]).await, "roles"));
    let expected = if done { roles(scene.target.cycle) } else { roles(scene.target.cycle + 1) };
    same("the roles", found.as_str(), expected)
});

async fn ownership(scene: &mut Scene) -> String {
    let host = scene.local.ask("host_get", &[]).await;
    string(field(field(&host, "ownership"), "state"))
}

check!(is_owned, |scene, done| {
    same("ownership", ownership(scene).await.as_str(), if done { "owned" } else { "unowned" })
});
check!(is_unowned, |scene, done| {
    same("ownership", ownership(scene).await.as_str(), if done { "unowned" } else { "owned" })
});

async fn fingerprint(caller: &mut Caller) -> String {
    string(field(&caller.ask("certificate_get", &[]).await, "fingerprint"))
}

check!(certificate_is_new, |scene, done| {
    let now = fingerprint(&mut scene.local).await;
    same("the certificate is another", now != scene.target.fingerprint, done)?;
    // And it is what is served, and the CA vouches for it.
    scene.daemon.remote().call("get_api_version", &[]).await.map(|_| ()).map_err(|e| e.to_string())
});

check!(rebooted, |scene, done| {
    let reboots = scene.world.audit().await.map_err(|e| e.to_string())?.host_reboots;
    same("reboots", reboots, scene.target.reboots + u64::from(done))?;
    let expected = if done { "off" } else { "running" };
    same("the VM", scene.local.state_of(scene.target.vm).await.as_deref(), Some(expected))
});

check!(switched_off, |scene, done| {
    let host = scene.world.call(Request::Host, PATIENCE).await;
    match host {
        Ok(Answer::Host(host)) => same("the power", host.powered_on, !done)?,
        other => return Err(format!("{other:?}")),
    }
    let expected = if done { "off" } else { "running" };
    same("the VM", scene.local.state_of(scene.target.vm).await.as_deref(), Some(expected))
});

/// Brings the world to where the call begins.
async fn prepare(home: &Home, daemon: &Daemon, case: &Case, cycle: u64) -> Target {
    let mut local = daemon.local();
    let vm = VmId::random();
    let mut target =
        Target { vm, cycle, core: String::new(), reboots: 0, fingerprint: String::new(), before: 0 };
    let powered_on = async |home: &Home| matches!(home.world().call(Request::Host, PATIENCE).await, Ok(Answer::Host(host)) if host.powered_on);
    // Asked again and again: a power-off that was ordered twice beats a reboot asked for in between.
    until("the host is on", PATIENCE, async || {
        let on = powered_on(home).await;
        if !on {
            home.world().call(Request::HostReboot, PATIENCE).await.unwrap();
        }
        on
    })
    .await;
    match case.from {
        From::Nothing | From::Host => {}
        From::Unowned | From::Owned => {
            let host = local.ask("host_get", &[]).await;
            let owned = string(field(field(&host, "ownership"), "state")) == "owned";
            if owned && case.from == From::Unowned {
                local.ask("release_ownership", &[text(MANAGER)]).await;
            } else if !owned && case.from == From::Owned {
                local.ask("take_ownership", &[text(MANAGER), text("https://m.example/api")]).await;
            }
        }
        _ => {
            local.create(vm).await;
            if case.from != From::Off {
                local.on_vm("start_vm", vm).await;
            }
            match case.from {
                From::Paused => drop(local.on_vm("pause_vm", vm).await),
                From::Saved => drop(local.on_vm("save_vm", vm).await),
                From::Dumped => {
                    let core = local.on_vm("dump_vm_core", vm).await;
                    target.core = string(field(&core, "core_date"));
                }
                _ => {}
            }
        }
    }
    if case.verb == "enable_ntp" || case.verb == "disable_ntp" {
        let other = if case.verb == "enable_ntp" { "disable_ntp" } else { "enable_ntp" };
        local.ask(other, &[]).await;
    }
    if case.verb == "update_server_roles" {
        local.ask("update_server_roles", &[text(roles(cycle + 1))]).await;
    }
    local.until_idle().await;
    target.reboots = home.world().audit().await.unwrap().host_reboots;
    target.fingerprint = fingerprint(&mut local).await;
    target.before = local.last_job().await;
    target
}

/// Whether everything is as it must be. `accepted`: what is known of whether the job was.
async fn look(scene: &mut Scene, case: &Case, accepted: Option<bool>) -> Result<(), String> {
    same("open jobs", scene.local.open_jobs().await, 0)?;
    let jobs = scene.local.jobs_after(scene.target.before).await;
    let ours: Vec<_> = jobs
        .iter()
        .filter(|job| string(field(job, "verb")) == case.verb && *field(job, "parent") == Value::Nil)
        .collect();
    let done = ours.len() == 1;
    same("jobs of the call", ours.len() <= 1, true)?;
    if let Some(accepted) = accepted {
        same("the job was accepted", done, accepted)?;
    }
    for job in &ours {
        same("the job's state", string(field(job, "state")).as_str(), "succeeded")
            .map_err(|why| format!("{why}: {job:?}"))?;
    }
    same("locks", scene.local.locks().await, 0)?;
    if case.from != From::Host {
        agree(scene).await?;
    }
    let audit = scene.world.audit().await.map_err(|e| e.to_string())?;
    same("VMs that ran twice", audit.doubled(), Vec::new())?;
    same("second domains asked for", audit.refused_doubles, 0)?;
    let vm = scene.target.vm;
    match case.then {
        Then::Vm(state, begun) if done => {
            same("the VM's state", scene.local.state_of(vm).await.as_deref(), Some(state))?;
            same("domains begun", audit.begun(vm), begun)?;
            for (what, count) in case.effects {
                same(what, audit.count(vm, what), *count)?;
            }
        }
        Then::Gone if done => same("the VM", scene.local.state_of(vm).await, None)?,
        Then::Vm(..) | Then::Gone => {
            let expected = match case.from {
                From::Nothing => None,
                From::Off => Some("off"),
                From::Paused => Some("paused"),
                From::Saved => Some("saved"),
                _ => Some("running"),
            };
            same("the untouched VM", scene.local.state_of(vm).await.as_deref(), expected)?;
        }
        Then::Check(check) => check(scene, done).await?,
    }
    match case.also {
        Some(check) => check(scene, done).await,
        None => Ok(()),
    }
}

/// Every VM of the record is in the world what the record says, and the world has no other domain.
async fn agree(scene: &mut Scene) -> Result<(), String> {
    let known = scene.local.ask("vm_list", &[]).await;
    let domains = match scene.world.call(Request::List, PATIENCE).await {
        Ok(Answer::Domains(domains)) => domains,
        other => return Err(format!("{other:?}")),
    };
    let mut with_domain = 0;
    for vm in list(&known) {
        let id = VmId::parse(&string(field(vm, "uuid"))).map_err(|e| e.to_string())?;
        let state = string(field(vm, "state"));
        let domain = domains.iter().find(|domain| domain.vm == Some(id));
        with_domain += usize::from(domain.is_some());
        let word = state_word(domain);
        let agreed = word == state || (word == "off" && state == "saved");
        same(&format!("VM {id} is {state} and its domain is {word}"), agreed, true)?;
    }
    same("domains without a VM", domains.len() - 1 - with_domain, 0)
}

/// Kills the daemon at one point of the call. `true`: it was answered first.
async fn call_and_die(home: &Home, case: &Case, target: &Target, point: &str) -> bool {
    let mut daemon = home.start_with(&["--die-at-commit", point]).await;
    let mut local = daemon.local();
    let answer = match case.verb {
        "a crash of the guest" => {
            home.world().end_guest(target.vm, Reason::Crash).await.unwrap();
            settled(&home.world(), &mut local, target.vm).await
        }
        verb => local.call(verb, &(case.params)(target)).await,
    };
    match answer {
        Ok(_) => {
            daemon.kill().await;
            true
        }
        Err(ClientError::Fault(fault)) => panic!("{}: {}", case.name, fault.fault_string),
        Err(_) => {
            let ended = timeout(PATIENCE, daemon.child.wait()).await;
            let ended = ended.unwrap_or_else(|_| panic!("{} at {point}: it lives on", case.name));
            assert!(ended.unwrap().code().is_none(), "killed by a signal");
            false
        }
    }
}

/// Waits until a crashed guest runs again, or the daemon is gone.
async fn settled(world: &Handle, local: &mut Caller, vm: VmId) -> Result<Value, ClientError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let host = local.call("host_get", &[]).await?;
        let idle = number(field(field(&host, "agent"), "open_jobs")) == 0;
        if idle && world.audit().await.unwrap().begun(vm) == 2 {
            return Ok(Value::Nil);
        }
        assert!(Instant::now() < deadline, "the guest is not started again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Sweeps one verb; how many points there were.
async fn sweep(case: Case) -> u64 {
    let home = Home::new();
    let mut daemon = home.start().await;
    daemon.local().until_settled().await;
    let mut cycle = 0;
    for commit in 1..=MOST_COMMITS {
        for side in ["before", "after"] {
            cycle += 1;
            let target = prepare(&home, &daemon, &case, cycle).await;
            daemon.kill().await;
            let point = format!("{commit}:{side}");
            let answered = call_and_die(&home, &case, &target, &point).await;
            daemon = home.start().await;
            let local = daemon.local();
            let mut scene = Scene { daemon, local, world: home.world(), target };
            let accepted = match case.verb {
                "a crash of the guest" => None,
                _ => Some(point != "1:before"),
            };
            let deadline = Instant::now() + CONVERGES_WITHIN;
            while let Err(why) = look(&mut scene, &case, accepted).await {
                let at = format!("{} killed at {point}: {why}", case.name);
                assert!(Instant::now() < deadline, "{at}\n{}", home.log());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            daemon = scene.daemon;
            if answered {
                return cycle;
            }
        }
    }
    panic!("{} makes more than {MOST_COMMITS} commits", case.name)
}

/// Two at a time: each is mostly processes that start.
async fn sweep_all(cases: Vec<Case>) {
    let only = std::env::var("CRASH_ONLY").ok();
    let cases: VecDeque<Case> =
        cases.into_iter().filter(|case| only.as_ref().is_none_or(|only| case.name == only)).collect();
    let cases = Arc::new(Mutex::new(cases));
    let began = Instant::now();
    let lanes = (0..2).map(|_| {
        let cases = Arc::clone(&cases);
        async move {
            let mut done = Vec::new();
            loop {
                let next = cases.lock().unwrap().pop_front();
                let Some(case) = next else { return done };
                done.push((case.name, sweep(case).await));
            }
        }
    });
    let mut points = 0;
    for lane in futures_util::future::join_all(lanes).await {
        for (name, count) in lane {
            println!("{name}: {count} points");
            points += count;
        }
    }
    println!("{points} points in {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_transaction_of_a_verb_of_vms_the_daemon_finds_its_way_and_nothing_runs_twice() {
    let settle = Case {
        verb: "a crash of the guest",
        ..case("a crash of the guest", From::Running, vm, Then::Check(runs_again), &[])
    };
    sweep_all(vm_cases().into_iter().chain([settle]).collect()).await;
}

check!(runs_again, |scene, _done| {
    let vm = scene.target.vm;
    same("the VM", scene.local.state_of(vm).await.as_deref(), Some("running"))?;
    same("domains begun", scene.world.audit().await.map_err(|e| e.to_string())?.begun(vm), 2)
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_transaction_of_a_verb_of_the_host_the_daemon_finds_its_way() {
    sweep_all(host_cases()).await;
}
