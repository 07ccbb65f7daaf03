//! The verbs that `crash` sweeps: what is there before the call, what is asked, and what there is to be then.

use crate::support::*;
use dom0d::api::value::{int, structure, text, texts};
use dom0d::model::VmId;
use dom0d::sim::{Answer, Fate, Handle, Kind, Reason, Request, WorldError};
use dom0d::wire::{ClientError, Value};

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

/// What is there before the call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum From {
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
pub enum Then {
    /// The VM is in this state, and its domain has begun so often.
    Vm(&'static str, u64),
    Gone,
    Check(Check),
}

/// What else must hold; `done` is whether the job was accepted.
pub type Check = for<'a> fn(&'a mut Scene, bool) -> futures_util::future::BoxFuture<'a, Result<(), String>>;

#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub verb: &'static str,
    pub from: From,
    pub params: fn(&Target) -> Vec<Value>,
    pub then: Then,
    /// Effects that the world must have counted for the VM, each so often as said.
    pub effects: &'static [(&'static str, usize)],
    /// Beyond the VM's state.
    pub also: Option<Check>,
    /// What the world does with each request of this kind about the VM.
    pub script: Option<(Kind, fn() -> Fate)>,
    /// The job ends as failed, and what it did is taken back.
    pub fails: bool,
    /// What a guest may have heard is not sent again: killed in the midst, the job fails and says so.
    pub once: bool,
    /// There is no call; the guest ends by itself.
    pub ends: Option<Reason>,
}

/// What one cycle is about.
#[derive(Debug, Clone)]
pub struct Target {
    pub vm: VmId,
    pub cycle: u64,
    pub core: String,
    /// Host reboots and the certificate before the call.
    pub reboots: u64,
    pub fingerprint: String,
    pub before: u64,
    /// A daemon that starts writes what it has found, before anything else; if there is something.
    pub finds: bool,
}

/// A home with a daemon that was started again, looked at.
pub struct Scene {
    pub daemon: Daemon,
    pub local: Caller,
    pub world: Handle,
    pub target: Target,
}

pub const MANAGER: &str = "0004fb0000010000aabbccddeeff0011";

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
    Case {
        name,
        verb: name,
        from,
        params,
        then,
        effects,
        also: None,
        script: None,
        fails: false,
        once: false,
        ends: None,
    }
}

impl Case {
    const fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    const fn while_the_world(self, kind: Kind, fate: fn() -> Fate) -> Self {
        Self { script: Some((kind, fate)), ..self }
    }

    const fn failing(self, kind: Kind) -> Self {
        Self { fails: true, ..self.while_the_world(kind, refusal) }
    }

    const fn once(self) -> Self {
        Self { once: true, ..self }
    }

    const fn also(self, check: Check) -> Self {
        Self { also: Some(check), ..self }
    }
}

pub fn vm_cases() -> Vec<Case> {
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
        case("sysrq_vm", From::Running, |t| vm_and(t, [text("s")]), Then::Vm("running", 1), &[]).once(),
        case("trigger_vm", From::Running, |t| vm_and(t, [text("nmi")]), Then::Vm("running", 1), &[]).once(),
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
        guest_ends(
            "a crash of the guest",
            Reason::Crash,
            Then::Vm("running", 2),
            &[("create", 2), ("destroy", 1)],
        ),
        guest_ends(
            "a reboot by the guest",
            Reason::Reboot,
            Then::Vm("running", 2),
            &[("create", 2), ("destroy", 1)],
        ),
        guest_ends("a power-off by the guest", Reason::Poweroff, Then::Vm("off", 1), &[("destroy", 1)]),
        guest_ends(
            "a watchdog's bite",
            Reason::Watchdog,
            Then::Vm("running", 2),
            &[("create", 2), ("destroy", 1)],
        ),
    ]
}

fn refusal() -> Fate {
    Fate::Fail(WorldError::Failed("the toolstack refuses".to_owned()))
}

fn eight_values(target: &Target) -> Vec<Value> {
    let values = (0..8).map(|n| (format!("key{n}"), text("value")));
    vm_and(target, [Value::Struct(values.collect())])
}

/// What does not go as it should in the world, and states less usual.
pub fn troubled_cases() -> Vec<Case> {
    vec![
        case("start_vm", From::Off, vm, Then::Vm("running", 1), &[("create", 1)])
            .named("start_vm, the answer comes too late")
            .while_the_world(Kind::Create, || Fate::DoThenTimeout),
        case("start_vm", From::Off, vm, Then::Vm("running", 1), &[("create", 1)])
            .named("start_vm, the answer is lost")
            .while_the_world(Kind::Create, || Fate::DoThenLose),
        case("start_vm", From::Off, vm, Then::Vm("off", 0), &[])
            .named("start_vm, refused")
            .failing(Kind::Create),
        case("configure_vm", From::Running, |t| vm_and(t, [grown(t)]), Then::Vm("running", 1), &[])
            .named("configure_vm, refused in the middle")
            .failing(Kind::SetScheduling)
            .also(has_grown),
        case("save_vm", From::Running, vm, Then::Vm("running", 1), &[])
            .named("save_vm, refused")
            .failing(Kind::Save),
        case("restore_vm", From::Saved, vm, Then::Vm("saved", 1), &[])
            .named("restore_vm, refused")
            .failing(Kind::Restore),
        case("pause_vm", From::Running, vm, Then::Vm("running", 1), &[])
            .named("pause_vm, refused")
            .failing(Kind::Pause),
        case("dump_vm_core", From::Running, vm, Then::Vm("running", 1), &[])
            .named("dump_vm_core, refused")
            .failing(Kind::DumpCore)
            .also(has_no_more_core),
        case("stop_vm", From::Paused, vm, Then::Vm("off", 1), &[("destroy", 1)]).named("stop_vm, paused"),
        case("save_vm", From::Paused, vm, Then::Vm("saved", 1), &[]).named("save_vm, paused"),
        case("reboot_vm", From::Dumped, vm, Then::Vm("running", 2), &[("create", 2), ("destroy", 1)])
            .named("reboot_vm, with a core dump"),
        case("unconfigure_vm", From::Off, |t| vm_and(t, [its_vif(t)]), Then::Vm("off", 0), &[])
            .named("unconfigure_vm, off"),
        case("dump_vm_core", From::Running, |t| vm_and(t, [Value::Bool(true)]), Then::Vm("running", 1), &[])
            .named("dump_vm_core, live")
            .also(has_one_core),
        case("send_to_guest", From::Running, eight_values, Then::Vm("running", 1), &[])
            .named("send_to_guest, eight values"),
    ]
}

check!(has_no_more_core, |scene, _done| {
    let cores = scene.local.on_vm("list_vm_core", scene.target.vm).await;
    same("core dumps", list(&cores).len(), 0)
});

/// No call: what a guest does by itself becomes a job, too. The verb is that job's.
const fn guest_ends(
    name: &'static str,
    reason: Reason,
    then: Then,
    effects: &'static [(&'static str, usize)],
) -> Case {
    let case = case("settle_vm", From::Running, vm, then, effects).named(name);
    Case { ends: Some(reason), ..case }
}

pub fn host_cases() -> Vec<Case> {
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
            |_| vec![text(MANAGER), text(NO_MANAGER)],
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

pub fn roles(cycle: u64) -> &'static str {
    if cycle.is_multiple_of(2) { "xen" } else { "xen,utility" }
}

pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), String> {
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

pub async fn fingerprint(caller: &mut Caller) -> String {
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
