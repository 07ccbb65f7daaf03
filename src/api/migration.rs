//! The family of migration: what managers ask (`migrate_vm` and its neighbours of the dialect, `migration_list`,
//! `migration_resolve`), and what hosts ask each other, which nobody else may.

use super::Api;
use super::arguments::{Arguments, Type, may, need};
use super::fault::{ApiFault, Result};
use super::value::{from_json, structure, text};
use super::verb::{Kind, Origin, Row, Verb, nil};
use super::vm::{ids, known};
use crate::host::peer;
use crate::job::JobRecord;
use crate::model::{MigrationId, VmId};
use crate::operation::migrate_out::Going;
use crate::operation::plan::{self, Plan};
use crate::vm::{Action, Intent};
use crate::wire::{Answer, Caller, Identity, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};

const REPO: super::arguments::Param =
    need("repo_id", Type::Text, "the repository's id: 32 hex digits, with or without dashes");
const VM: super::arguments::Param =
    need("vm_id", Type::Text, "the VM's id: 32 hex digits, with or without dashes");
const ID: super::arguments::Param = need("id", Type::Text, "the migration's id, made by the source");

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("migrate_vm", &[REPO, VM, need("dest", Type::Text, "a peer: HOST or HOST:PORT as peer_list shows it"), may("live", Type::Bool, "let it run while its memory is sent; true if not said"), may("ssl", Type::Bool, "kept for the dialect: the stream always goes by mutual TLS")], "nil", Role::Operator,
        Kind::Job(migrate_vm, nil), "Takes a VM to another host, which must be a peer and see the same disks and bridges. Cancelled before the handover, or failed, it runs on here.").on_vm(Action::Migrate),
    Row::new("setup_migration_target", &[REPO, VM], "nil", Role::Operator,
        Kind::Signal(setup_target), "Whether this host would take the VM now. A migration asks again by itself."),
    Row::new("cleanup_migration_target", &[REPO, VM], "nil", Role::Operator,
        Kind::Signal(cleanup_target), "Gives back the place that was kept for a VM that did not come."),
];

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("migration_list", &[], "array", Role::Viewer, Kind::Read(migration_list),
        "VMs of which it is not settled who runs them: those that have arrived and wait for their source's word, and those that were handed over and not settled."),
    Row::new("migration_resolve", &[need("vm_id", Type::Text, "the VM's id: 32 hex digits, with or without dashes"), need("action", Type::Text, "run: it is this host's; destroy: it is the other host's, and what is here goes")], "any", Role::Admin,
        Kind::Job(migration_resolve, result), "A human decides an undecided migration, because the other host is lost. The risk: if `run` is said on both hosts, or `run` here while the other runs it, the VM runs twice and ruins its disks; if `destroy` is said on both, its memory is gone."),
];

#[rustfmt::skip]
const PEER: &[Row] = &[
    Row::new("migration_prepare", &[ID, need("document", Type::Text, "the VM, JSON")], "nil", Role::Peer,
        Kind::Signal(prepare), "Can this host take the VM? Keeps a place for it for a minute."),
    Row::new("migration_state", &[ID, VM], "struct", Role::Peer, Kind::Read(state), "What this host has of a migration."),
    Row::new("migration_outcome", &[ID, VM], "struct", Role::Peer, Kind::Read(outcome), "What the source has decided."),
    Row::new("migration_commit", &[ID, VM], "struct", Role::Peer, Kind::Job(commit, result), "The VM is this host's: it runs from now on."),
    Row::new("migration_abort", &[ID, VM], "nil", Role::Peer, Kind::Job(abort, nil), "The VM stays at its source: what came of it goes."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    let dialect = DIALECT.iter().map(|row| row.of("migration", Origin::Dialect));
    dialect.chain(OWN.iter().chain(PEER).map(|row| row.of("migration", Origin::Own)))
}

/// The verbs that are one action of the VM's machine.
pub fn verbs_of(action: Action) -> impl Iterator<Item = &'static str> {
    DIALECT.iter().filter(move |row| row.action == Some(action)).map(|row| row.name)
}

fn result(job: &JobRecord) -> Value {
    from_json(job.result.as_ref().unwrap_or(&serde_json::Value::Null))
}

fn migrate_vm<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let vm = known(api, arguments)?.record.id();
        let dest = arguments.text("dest")?;
        let peers = api.operations.peers();
        let Some(peer) = peer::find(&peers, dest) else {
            let all: Vec<&str> = peers.iter().map(|peer| peer.address.as_str()).collect();
            let there = if all.is_empty() { "none".to_owned() } else { all.join(", ") };
            let text =
                format!("{} is no peer; peer_add adds one; there are: {there}", crate::model::excerpt(dest));
            return Err(ApiFault::new("PEER_NOT_FOUND", text));
        };
        let going = Going { id: MigrationId::random(), vm, dest: peer.address.as_str().to_owned() };
        let live = arguments.opt_bool("live").unwrap_or(true);
        Ok(plan::migrate_vm(going, live, api.operations.settings.migration.deadline_s))
    }
    .boxed()
}

fn setup_target<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let (_, vm) = ids(arguments)?;
        api.operations.would_take(vm)?;
        Ok(Value::Nil.into())
    }
    .boxed()
}

fn cleanup_target<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    _: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let (_, vm) = ids(arguments)?;
        api.operations.forget_preparation(vm);
        Ok(Value::Nil.into())
    }
    .boxed()
}

fn migration_list<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let mut rows = Vec::new();
        for vm in api.operations.vms.all() {
            if let Intent::Leaving(leaving) = &vm.record.intent {
                rows.push(structure([
                    ("id", text(leaving.id)),
                    ("vm", text(vm.record.id())),
                    ("name", text(&vm.record.config.name)),
                    ("direction", text("out")),
                    ("peer", text(&leaving.dest)),
                    ("since", text(leaving.since)),
                ]));
            }
        }
        let peers = api.operations.peers();
        for arrival in api.operations.moves.arrivals() {
            let source = peers.iter().find(|peer| peer.fingerprint.as_str() == arrival.source);
            rows.push(structure([
                ("id", text(arrival.id)),
                ("vm", text(arrival.record.id())),
                ("name", text(&arrival.record.config.name)),
                ("direction", text("in")),
                ("peer", text(source.map_or(arrival.source.as_str(), |peer| peer.address.as_str()))),
                ("since", text(arrival.since)),
            ]));
        }
        Ok(Value::Array(rows).into())
    }
    .boxed()
}

fn migration_resolve<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    _: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let vm: VmId = arguments.parse("vm_id")?;
        let run = match arguments.text("action")? {
            "run" => true,
            "destroy" => false,
            _ => return Err(arguments.wrong("action", "allowed: run, destroy")),
        };
        let arrivals = api.operations.moves.arrivals();
        match arrivals.iter().find(|arrival| arrival.record.id() == vm) {
            Some(arrival) if run => Ok(plan::take_over(arrival.id, vm)),
            Some(arrival) => Ok(plan::drop_arrival(arrival.id, vm)),
            None => Ok(plan::force_leaving(vm, run)),
        }
    }
    .boxed()
}

// What hosts ask each other.

/// The caller's pinned fingerprint; the role says that it has one.
fn fingerprint(caller: &Caller) -> Result<&str> {
    match &caller.identity {
        Identity::Peer { fingerprint } => Ok(fingerprint),
        _ => Err(ApiFault::new("NOT_PERMITTED", "only a peer may ask this")),
    }
}

fn prepare<'a>(api: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let (id, document) = (arguments.parse("id")?, arguments.text("document")?);
        api.operations.prepare_arrival(fingerprint(caller)?, id, document).await?;
        Ok(Value::Nil.into())
    }
    .boxed()
}

fn state<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let there = api.operations.arrival_state(arguments.parse("id")?, arguments.parse("vm_id")?).await?;
        Ok(word("state", &there))
    }
    .boxed()
}

fn outcome<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let said = api.operations.source_word(arguments.parse("id")?, arguments.parse("vm_id")?).await?;
        Ok(word("outcome", &said))
    }
    .boxed()
}

fn word(name: &str, value: &impl serde::Serialize) -> Answer {
    let json = serde_json::to_value(value).unwrap_or_default();
    Value::Struct(std::iter::once((name.to_owned(), from_json(&json))).collect()).into()
}

fn commit<'a>(api: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let (id, vm): (MigrationId, VmId) = (arguments.parse("id")?, arguments.parse("vm_id")?);
        may_decide(api, caller, id)?;
        Ok(plan::take_over(id, vm))
    }
    .boxed()
}

fn abort<'a>(api: &'a Api, arguments: &'a Arguments, caller: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let (id, vm): (MigrationId, VmId) = (arguments.parse("id")?, arguments.parse("vm_id")?);
        may_decide(api, caller, id)?;
        Ok(plan::drop_arrival(id, vm))
    }
    .boxed()
}

/// Only the host that it came from.
fn may_decide(api: &Api, caller: &Caller, id: MigrationId) -> Result<()> {
    let caller = fingerprint(caller)?;
    let others = api.operations.moves.arrivals().into_iter().any(|a| a.id == id && a.source != caller);
    if others {
        return Err(ApiFault::new(
            "NOT_PERMITTED",
            "the VM came from another peer, and only that one decides",
        ));
    }
    Ok(())
}
