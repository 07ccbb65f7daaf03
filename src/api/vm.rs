//! The family of VMs: the dialect's verbs, and `vm_list`, `vm_get`.

use super::arguments::{Arguments, Type, int as integer, may, need};
use super::fault::{ApiFault, Result};
use super::value::{structure, text, texts};
use super::verb::{Kind, Origin, Row, Verb, nil};
use super::vm_form::Form;
use super::{Api, vm_found, vm_show};
use crate::job::JobRecord;
use crate::model::{RepoId, Timestamp, VmId};
use crate::operation::plan::{self, Plan};
use crate::vm::{Action, Autostart, Vm, VmRecord, VmState};
use crate::wire::{Answer, Caller, Role, Value};
use crate::xen::{Trigger, check_guest_value};
use futures_util::future::{BoxFuture, FutureExt};

const REPO: super::arguments::Param =
    need("repo_id", Type::Text, "the repository's id: 32 hex digits, with or without dashes");
const VM: super::arguments::Param =
    need("vm_id", Type::Text, "the VM's id: 32 hex digits, with or without dashes");

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("create_vm", &[REPO, VM, need("params", Type::Struct, "vm.cfg as a struct")], "nil", Role::Operator,
        Kind::Job(create_vm, nil), "Creates a VM. It is off. One that is off already, of the same id, name and repository, is made anew."),
    Row::new("configure_vm", &[REPO, VM, need("params", Type::Struct, "what is to change; the rest stays")], "nil", Role::Operator,
        Kind::Job(configure_vm, nil), "Changes a VM; a running one by plugging and unplugging.").on_vm(Action::Configure),
    Row::new("unconfigure_vm", &[REPO, VM, need("params", Type::Struct, "disk and vif entries to take away, as get_vm_config shows them")], "nil", Role::Operator,
        Kind::Job(unconfigure_vm, nil), "Takes disks and vifs away from a VM.").on_vm(Action::Configure),
    Row::new("get_vm_config", &[REPO, VM], "struct", Role::Viewer,
        Kind::Read(get_vm_config), "What a VM is configured to be, on or off."),
    Row::new("set_vm_config", &[REPO, VM, need("params", Type::Struct, "the whole of vm.cfg as a struct")], "nil", Role::Operator,
        Kind::Job(set_vm_config, nil), "Replaces the configuration of a VM that is off.").on_vm(Action::Reconfigure),
    Row::new("delete_vm", &[REPO, VM], "nil", Role::Operator,
        Kind::Job(delete_vm, nil), "Deletes a VM that is off, with its saved memory and core dumps. Its disks stay.").on_vm(Action::Delete),
    Row::new("start_vm", &[REPO, VM], "nil", Role::Operator,
        Kind::Job(start_vm, nil), "Starts a VM.").on_vm(Action::Start),
    Row::new("stop_vm", &[REPO, VM, may("force", Type::Bool, "end the domain at once instead of asking the guest")], "nil", Role::Operator,
        Kind::Job(stop_vm, nil), "Stops a VM. Without force its guest is asked, and a guest that does not shut down in time is a fault.").on_vm(Action::Stop),
    Row::new("reboot_vm", &[REPO, VM, may("wait", Type::Int, "seconds the guest has before its domain is ended and built anew; at least the settings' shutdown time")], "nil", Role::Operator,
        Kind::Job(reboot_vm, nil), "Reboots a VM.").on_vm(Action::Reboot),
    Row::new("pause_vm", &[REPO, VM], "nil", Role::Operator,
        Kind::Job(pause_vm, nil), "Pauses a running VM.").on_vm(Action::Pause),
    Row::new("unpause_vm", &[REPO, VM], "nil", Role::Operator,
        Kind::Job(unpause_vm, nil), "Lets a paused VM run.").on_vm(Action::Unpause),
    Row::new("save_vm", &[REPO, VM, may("checkpoint", Type::Bool, "let the VM run on after its memory was written")], "nil", Role::Operator,
        Kind::Job(save_vm, nil), "Writes a VM's memory to disk and ends its domain.").on_vm(Action::Save),
    Row::new("restore_vm", &[REPO, VM, may("paused", Type::Bool, "leave it paused")], "nil", Role::Operator,
        Kind::Job(restore_vm, nil), "Restores a saved VM.").on_vm(Action::Restore),
    Row::new("list_vm", &[REPO, VM], "struct", Role::Viewer,
        Kind::Read(list_vm), "A running VM as list_vms shows it; nil if it is not running or not known."),
    Row::new("list_vms", &[], "array", Role::Viewer,
        Kind::Read(list_vms), "All running domains, Domain-0 first. VMs that are off are in vm_list."),
    Row::new("configure_vm_ha", &[REPO, VM, need("enable_ha", Type::Bool, "")], "nil", Role::Operator,
        Kind::Job(configure_vm_ha, nil), "Whether a pool restarts the VM elsewhere when its host dies.").in_every_state(),
    Row::new("sysrq_vm", &[REPO, VM, need("letter", Type::Text, "one letter or digit")], "nil", Role::Operator,
        Kind::Job(sysrq_vm, nil), "Sends a magic SysRq letter to a VM.").on_vm(Action::Signal),
    Row::new("trigger_vm", &[REPO, VM, need("name", Type::Text, "nmi, reset, init, power, sleep, s3resume"), may("vcpu", Type::Int, "")], "nil", Role::Operator,
        Kind::Job(trigger_vm, nil), "Triggers an event in a VM, as its hardware would.").on_vm(Action::Signal),
    Row::new("send_to_guest", &[REPO, VM, need("params", Type::Struct, "key -> text, for an agent in the guest")], "nil", Role::Operator,
        Kind::Job(send_to_guest, nil), "Writes values where an agent in the guest reads them.").on_vm(Action::Signal),
    Row::new("dump_vm_core", &[REPO, VM, may("live", Type::Bool, "without pausing it"), may("crash", Type::Bool, "end it afterwards"), may("reset", Type::Bool, "start it anew afterwards")], "struct", Role::Operator,
        Kind::Job(dump_vm_core, core_answer), "Dumps a VM's memory to a file on the host.").on_vm(Action::DumpCore),
    Row::new("list_vm_core", &[REPO, VM], "array", Role::Viewer,
        Kind::Read(list_vm_core), "The core dumps of a VM."),
    Row::new("delete_vm_core", &[REPO, VM, need("core_date", Type::Text, "as list_vm_core tells")], "nil", Role::Operator,
        Kind::Job(delete_vm_core, nil), "Deletes a core dump of a VM.").in_every_state(),
];

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("vm_list", &[], "array", Role::Viewer, Kind::Read(vm_list), "All VMs, also those that are off, by name."),
    Row::new("vm_get", &[VM], "struct", Role::Viewer, Kind::Read(vm_get), "All that is known of a VM: configuration, state, what is allowed now."),
    Row::new("vm_autostart", &[VM, need("enabled", Type::Bool, "whether it is started after the host's boot, if it ran when the host went down"), may("order", Type::Int, "0 to 9999, lower ones first; 1000 if it was never given"), may("delay", Type::Int, "seconds after its start until the VMs of the next order are started, 0 to 3600; 0 if it was never given")], "nil", Role::Operator,
        Kind::Job(vm_autostart, nil), "Whether and when a VM is started after its host has booted. One that somebody stopped stays off.").in_every_state(),
    Row::new("vm_adopted", &[], "struct", Role::Viewer, Kind::Read(vm_adopted), "What the agent found when it was started last: running VMs adopted, unknown domains, VMs whose domain had gone, VMs started again, and why."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    let dialect = DIALECT.iter().map(|row| row.of("vm", Origin::Dialect));
    dialect.chain(OWN.iter().map(|row| row.of("vm", Origin::Own)))
}

/// The verbs that are one action of the VM's machine.
pub fn verbs_of(action: Action) -> impl Iterator<Item = &'static str> {
    DIALECT.iter().filter(move |row| row.action == Some(action)).map(|row| row.name)
}

pub(super) fn ids(arguments: &Arguments) -> Result<(RepoId, VmId)> {
    Ok((arguments.parse("repo_id")?, arguments.parse("vm_id")?))
}

fn same_repo(a: &RepoId, b: &RepoId) -> bool {
    a.as_str().replace('-', "").eq_ignore_ascii_case(&b.as_str().replace('-', ""))
}

/// The VM that a call names. The repository is a part of its name: a VM of another one is not found.
pub(super) fn known(api: &Api, arguments: &Arguments) -> Result<Vm> {
    let (repo, vm) = ids(arguments)?;
    let found = api.operations.vms.get(vm).filter(|v| same_repo(&v.record.repo, &repo));
    found.ok_or_else(|| {
        ApiFault::new(
            "VM_NOT_FOUND",
            format!("no VM {vm} is known here in repository {repo}; vm_list shows all"),
        )
    })
}

fn form<'a>(api: &'a Api, verb: &'static str) -> Form<'a> {
    Form { verb, settings: &api.operations.settings.vm }
}

/// A planner that needs no more than the call's parameters and our records.
macro_rules! planner {
    ($name:ident, |$api:ident, $arguments:ident| $body:expr) => {
        fn $name<'a>($api: &'a Api, $arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
            async move { $body }.boxed()
        }
    };
}

planner!(create_vm, |api, arguments| {
    let (repo, vm) = ids(arguments)?;
    let record = form(api, "create_vm").create(repo, vm, arguments.structure("params")?, Timestamp::now())?;
    // CloudStack deletes a VM only when it has stopped it itself. One whose guest powered off, or whose start
    // failed, it creates once more under the same id and name, and must be able to.
    let old = api.operations.vms.get(vm).map(|old| old.record);
    let old = old.filter(|old| same_repo(&old.repo, &record.repo) && old.config.name == record.config.name);
    match old {
        Some(old) if api.operations.fresh_state(vm).await? == VmState::Off => {
            Ok(plan::set_vm_config(&old, record))
        }
        _ => Ok(plan::create_vm(record)),
    }
});

planner!(set_vm_config, |api, arguments| {
    let old = known(api, arguments)?.record;
    let new = form(api, "set_vm_config").create(
        old.repo.clone(),
        old.id(),
        arguments.structure("params")?,
        old.created,
    )?;
    Ok(plan::set_vm_config(&old, new))
});

planner!(configure_vm, |api, arguments| {
    let old = known(api, arguments)?.record;
    let new = form(api, "configure_vm").merge(VmRecord::clone(&old), arguments.structure("params")?)?;
    Ok(plan::configure_vm(&old, new))
});

planner!(unconfigure_vm, |api, arguments| {
    let old = known(api, arguments)?.record;
    let params = arguments.structure("params")?;
    if let Some(other) = params.keys().find(|k| !matches!(k.as_str(), "disk" | "vif")) {
        return Err(
            arguments.wrong("params", format!("has {}; allowed: disk, vif", crate::model::excerpt(other)))
        );
    }
    // What is named is read as a VM of its own, so that every way to write an entry finds the same device.
    let named = form(api, "unconfigure_vm").create(old.repo.clone(), old.id(), params, old.created)?.config;
    let mut new = VmRecord::clone(&old);
    new.config.disks.retain(|d| !named.disks.iter().any(|n| n.device == d.device));
    new.config.vifs.retain(|v| !named.vifs.iter().any(|n| n.mac == v.mac));
    Ok(plan::configure_vm(&old, new))
});

planner!(delete_vm, |api, arguments| Ok(plan::delete_vm(&known(api, arguments)?.record)));
planner!(start_vm, |api, arguments| Ok(plan::start_vm(known(api, arguments)?.record.id())));
planner!(pause_vm, |api, arguments| Ok(plan::pause_vm(known(api, arguments)?.record.id())));
planner!(unpause_vm, |api, arguments| Ok(plan::unpause_vm(known(api, arguments)?.record.id())));

planner!(stop_vm, |api, arguments| {
    let vm = known(api, arguments)?.record.id();
    Ok(plan::stop_vm(vm, arguments.opt_bool("force").unwrap_or(false), &api.operations.settings.vm))
});

planner!(reboot_vm, |api, arguments| {
    let vm = known(api, arguments)?.record.id();
    let least = api.operations.settings.vm.shutdown_timeout_s;
    let wait = u64::try_from(arguments.opt_int("wait").unwrap_or(0))
        .map_err(|_| arguments.wrong("wait", "is negative"))?;
    Ok(plan::reboot_vm(vm, wait.clamp(least, 3600.max(least))))
});

planner!(save_vm, |api, arguments| {
    let vm = known(api, arguments)?.record.id();
    let file = api.operations.save_file(vm, &format!("{}.save", stamp()));
    Ok(plan::save_vm(vm, file, arguments.opt_bool("checkpoint").unwrap_or(false)))
});

planner!(restore_vm, |api, arguments| {
    let vm = known(api, arguments)?;
    Ok(plan::restore_vm(&vm.record, arguments.opt_bool("paused").unwrap_or(false)))
});

planner!(configure_vm_ha, |api, arguments| {
    Ok(plan::configure_vm_ha(known(api, arguments)?.record.id(), arguments.bool("enable_ha")?))
});

planner!(sysrq_vm, |api, arguments| {
    let vm = known(api, arguments)?.record.id();
    let mut letters = arguments.text("letter")?.chars();
    match (letters.next(), letters.next()) {
        (Some(letter), None) if letter.is_ascii_alphanumeric() => Ok(plan::sysrq_vm(vm, letter)),
        _ => Err(arguments.wrong("letter", "allowed: one letter or digit")),
    }
});

planner!(trigger_vm, |api, arguments| {
    let vm = known(api, arguments)?.record.id();
    let trigger = match arguments.text("name")? {
        "nmi" => Trigger::Nmi,
        "reset" => Trigger::Reset,
        "init" => Trigger::Init,
        "power" => Trigger::Power,
        "sleep" => Trigger::Sleep,
        "s3resume" => Trigger::S3resume,
        other => {
            return Err(arguments.wrong(
                "name",
                format!(
                    "{} is not one; allowed: nmi, reset, init, power, sleep, s3resume",
                    crate::model::excerpt(other)
                ),
            ));
        }
    };
    let vcpu = match arguments.opt_int("vcpu") {
        None => None,
        Some(n) => Some(u32::try_from(n).map_err(|_| arguments.wrong("vcpu", "allowed: 0 or more"))?),
    };
    Ok(plan::trigger_vm(vm, trigger, vcpu))
});

planner!(send_to_guest, |api, arguments| {
    let vm = known(api, arguments)?.record.id();
    let params = arguments.structure("params")?;
    if params.is_empty() || params.len() > 32 {
        return Err(arguments.wrong("params", "allowed: 1 to 32 keys"));
    }
    let mut values = Vec::new();
    for (key, value) in params {
        let value = match (value, integer(value)) {
            (Value::String(s), _) => s.clone(),
            (Value::Bool(b), _) => b.to_string(),
            (_, Some(n)) => n.to_string(),
            _ => {
                return Err(arguments.wrong(
                    "params",
                    format!("{} is no text, number or boolean", crate::model::excerpt(key)),
                ));
            }
        };
        if check_guest_value(key, &value).is_err() {
            let why = format!(
                "{}: allowed: keys of 1 to 64 letters, digits, _ . - (no dot first); values up to 1024 bytes",
                crate::model::excerpt(key)
            );
            return Err(arguments.wrong("params", why));
        }
        values.push((key.clone(), value));
    }
    Ok(plan::send_to_guest(vm, values))
});

planner!(dump_vm_core, |api, arguments| {
    let vm = known(api, arguments)?.record.id();
    let flag = |name| arguments.opt_bool(name).unwrap_or(false);
    let date = stamp();
    let file = api.operations.core_file(vm, &format!("{date}.core"));
    Ok(plan::dump_vm_core(vm, &date, file, flag("live"), flag("crash"), flag("reset")))
});

planner!(delete_vm_core, |api, arguments| {
    let vm = known(api, arguments)?;
    let date = arguments.text("core_date")?;
    plan::delete_vm_core(&vm.record, date).ok_or_else(|| {
        let dates: Vec<&str> = vm.record.cores.iter().map(|c| c.date.as_str()).collect();
        let text = format!("no core dump {}; there are: {}", crate::model::excerpt(date), dates.join(", "));
        ApiFault::new("CORE_NOT_FOUND", text)
    })
});

planner!(vm_autostart, |api, arguments| {
    let id: VmId = arguments.parse("vm_id")?;
    let vm = api.operations.vms.get(id).ok_or_else(|| unknown(id))?;
    let within = |name, range: std::ops::RangeInclusive<u32>, before| match arguments.opt_int(name) {
        None => Ok(before),
        Some(n) => u32::try_from(n).ok().filter(|n| range.contains(n)).ok_or_else(|| {
            arguments.wrong(name, format!("is {n}; allowed: {} to {}", range.start(), range.end()))
        }),
    };
    let before = vm.record.autostart_place();
    let autostart = Autostart {
        enabled: arguments.bool("enabled")?,
        order: within("order", Autostart::ORDERS, before.order)?,
        delay_s: within("delay", Autostart::DELAYS_S, before.delay_s)?,
    };
    Ok(plan::vm_autostart(id, autostart))
});

fn unknown(vm: VmId) -> ApiFault {
    ApiFault::new("VM_NOT_FOUND", format!("no VM {vm} is known here; vm_list shows all"))
}

/// Tells two files of one VM apart: the time, to the millisecond, in digits.
fn stamp() -> String {
    Timestamp::now().to_string().chars().filter(char::is_ascii_digit).collect()
}

fn core_answer(job: &JobRecord) -> Value {
    super::value::from_json(job.result.as_ref().unwrap_or(&serde_json::Value::Null))
}

fn get_vm_config<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let vm = known(api, arguments)?;
        Ok(vm_show::config(&vm.record, caller.role >= Role::Operator).into())
    }
    .boxed()
}

fn list_vm<'a>(api: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let (_, id) = ids(arguments)?;
        api.fresh_sample().await;
        let observed = api.operations.vms.domains().into_iter().find(|d| d.info.vm == Some(id));
        let shown = observed.map(|d| vm_show::domain(&d, api.host_cpus(), caller.role >= Role::Operator));
        Ok(super::value::or_nil(shown).into())
    }
    .boxed()
}

fn list_vms<'a>(api: &'a Api, _: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        api.fresh_sample().await;
        let domains = api.operations.vms.domains();
        if caller.role < Role::Operator {
            let shown = domains.iter().map(|d| vm_show::domain(d, api.host_cpus(), false));
            return Ok(Value::Array(shown.collect()).into());
        }
        Ok(Answer::Array(api.fragments.of(&domains, api.host_cpus())))
    }
    .boxed()
}

fn list_vm_core<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let vm = known(api, arguments)?;
        let cores = vm.record.cores.iter().map(|core| {
            structure([
                ("core_date", text(&core.date)),
                ("file", text(&core.file)),
                ("size", super::value::int(core.size.0)),
                ("job", super::value::int(core.job.0)),
            ])
        });
        Ok(Value::Array(cores.collect()).into())
    }
    .boxed()
}

fn vm_list<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let default = api.operations.settings.vm.autostart_default;
        let vms = api.operations.vms.all();
        Ok(Value::Array(vms.iter().map(|vm| vm_show::summary(vm, default)).collect()).into())
    }
    .boxed()
}

fn vm_adopted<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let found = api.operations.found();
        let found = found.ok_or_else(|| {
            let text = "the domains could not be read since the agent was started; nothing is adopted yet";
            ApiFault::new("TOOLSTACK_UNREACHABLE", text)
        })?;
        Ok(vm_found::shown(&found).into())
    }
    .boxed()
}

fn vm_get<'a>(api: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let id: VmId = arguments.parse("vm_id")?;
        let vm = api.operations.vms.get(id);
        let vm = vm.ok_or_else(|| unknown(id))?;
        api.fresh_sample().await;
        let vm = api.operations.vms.get(id).unwrap_or(vm);
        let default = api.operations.settings.vm.autostart_default;
        let Value::Struct(mut map) = vm_show::details(&vm, default, caller.role >= Role::Operator) else {
            return Ok(Value::Nil.into());
        };
        let open = api.engine().locks().into_iter().filter(|l| l.object == VmRecord::lock(id));
        map.insert("jobs".to_owned(), texts(open.map(|l| l.job)));
        Ok(Value::Struct(map).into())
    }
    .boxed()
}
