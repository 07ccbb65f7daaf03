//! Virtual machines: found by name or UUID, changed by the dialect's verbs as jobs.

use super::args::{Change, OnOff, VmChange, VmCommand};
use super::output::Column;
use super::values::{from_argument, from_json, from_toml, members, text};
use super::{CtlError, Session, job};
use crate::model::VmId;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use xmlrpc::Value;

const COLUMNS: &[Column] = &[
    ("NAME", "name"),
    ("STATE", "state"),
    ("MIB", "memory_mib"),
    ("VCPUS", "vcpus"),
    ("DOMID", "domid"),
    ("HA", "ha"),
    ("UUID", "uuid"),
];

const FOUND: &[Column] =
    &[("FOUND", "found"), ("DOMID", "domid"), ("NAME", "name"), ("UUID", "uuid"), ("WHY", "why")];

/// A file of a VM is a page; what is larger is the wrong file.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// A VM that exists, as the daemon names it.
struct Found {
    repo_id: String,
    uuid: String,
}

pub async fn execute(session: &mut Session<'_>, command: VmCommand) -> Result<(), CtlError> {
    match command {
        VmCommand::List => {
            let vms = session.read("vm_list", &[]).await?;
            session.printer.list(COLUMNS, &vms)
        }
        VmCommand::Show { vm } => {
            let found = find(session, &vm).await?;
            let shown = session.read("vm_get", &[Value::from(found.uuid)]).await?;
            session.printer.value(&shown)
        }
        VmCommand::Create { file, repo, change } => create(session, &file, repo, &change).await,
        VmCommand::Start(target) => act(session, "start_vm", &target, None).await,
        VmCommand::Stop { target, force } => act(session, "stop_vm", &target, Some(Value::Bool(force))).await,
        VmCommand::Reboot { target, wait } => {
            act(session, "reboot_vm", &target, Some(Value::Int(wait))).await
        }
        VmCommand::Pause(target) => act(session, "pause_vm", &target, None).await,
        VmCommand::Unpause(target) => act(session, "unpause_vm", &target, None).await,
        VmCommand::Save { target, checkpoint } => {
            act(session, "save_vm", &target, Some(Value::Bool(checkpoint))).await
        }
        VmCommand::Restore { target, paused } => {
            act(session, "restore_vm", &target, Some(Value::Bool(paused))).await
        }
        VmCommand::Migrate { target, dest, no_live } => {
            let found = find(session, &target.vm).await?;
            let dest = Value::from(dest);
            let params =
                vec![Value::from(found.repo_id), Value::from(found.uuid), dest, Value::Bool(!no_live)];
            job::change(session, "migrate_vm", params, &target.change).await.map(drop)
        }
        VmCommand::Delete(target) => act(session, "delete_vm", &target, None).await,
        VmCommand::Autostart { target, enabled, order, delay } => {
            let found = find(session, &target.vm).await?;
            let given = |n: Option<i32>| n.map_or(Value::Nil, Value::Int);
            let on = Value::Bool(enabled == OnOff::On);
            let params = vec![Value::from(found.uuid), on, given(order), given(delay)];
            job::change(session, "vm_autostart", params, &target.change).await?;
            Ok(())
        }
        VmCommand::Adopted => adopted(session).await,
        VmCommand::Config { target, set } => config(session, &target, &set).await,
    }
}

/// The lists of `vm_adopted` as one table, with the list's name before each row.
async fn adopted(session: &mut Session<'_>) -> Result<(), CtlError> {
    let found = session.read("vm_adopted", &[]).await?;
    let Value::Struct(lists) = &found else { return session.printer.value(&found) };
    if session.printer.is_json() {
        return session.printer.value(&found);
    }
    let mut rows = Vec::new();
    for name in ["unknown", "gone", "restarted", "left", "adopted"] {
        let Some(Value::Array(list)) = lists.get(name) else { continue };
        rows.extend(list.iter().filter_map(|row| {
            let Value::Struct(row) = row else { return None };
            let mut row = row.clone();
            row.insert("found".to_owned(), Value::from(name));
            Some(Value::Struct(row))
        }));
    }
    let boot = match text(&found, "boot") {
        "new" => "the host had booted anew",
        "same" => "the host had not booted since",
        _ => "whether the host had booted was not known",
    };
    session.printer.note(&format!("the agent was started at {}; {boot}", text(&found, "at")));
    session.printer.list(FOUND, &Value::Array(rows))
}

/// The UUID of the VM of that UUID, or else of that name.
pub(super) async fn resolve(session: &mut Session<'_>, named: &str) -> Result<String, CtlError> {
    find(session, named).await.map(|found| found.uuid)
}

/// The VM of that UUID, or else of that name.
async fn find(session: &mut Session<'_>, named: &str) -> Result<Found, CtlError> {
    let vms = session.read("vm_list", &[]).await?;
    let uuid = among(&vms, ("uuid", "name"), named)?;
    let Value::Array(all) = &vms else { return Err(no_list()) };
    let repo_id = all.iter().find(|vm| text(vm, "uuid") == uuid).map_or("", |vm| text(vm, "repo_id"));
    Ok(Found { repo_id: repo_id.to_owned(), uuid })
}

/// The UUID of the one row of `rows` that has this UUID, or else this name, in these columns.
pub(super) fn among(rows: &Value, (uuid, name): (&str, &str), named: &str) -> Result<String, CtlError> {
    let Value::Array(rows) = rows else { return Err(no_list()) };
    let id = VmId::parse(named).ok();
    let of_id = |vm: &&Value| id.is_some() && VmId::parse(text(vm, uuid)).ok() == id;
    let mut found: Vec<&Value> = rows.iter().filter(of_id).collect();
    if found.is_empty() {
        found = rows.iter().filter(|vm| text(vm, name) == named).collect();
    }
    match found.as_slice() {
        [] => Err(CtlError::NotFound(format!("no VM has the name or UUID {named:?}"))),
        [vm] => Ok(text(vm, uuid).to_owned()),
        several => {
            let uuids: Vec<&str> = several.iter().map(|vm| text(vm, uuid)).collect();
            let problem = format!("{} VMs have the name {named:?}", several.len());
            Err(CtlError::Usage(format!("{problem}; say which by its UUID: {}", uuids.join(", "))))
        }
    }
}

fn no_list() -> CtlError {
    CtlError::Answer { verb: "vm_list".to_owned(), problem: "no list".to_owned() }
}

/// A verb of the dialect on one VM: (repo_id, vm_id[, one more]).
async fn act(
    session: &mut Session<'_>,
    verb: &str,
    target: &VmChange,
    more: Option<Value>,
) -> Result<(), CtlError> {
    let found = find(session, &target.vm).await?;
    let mut params = vec![Value::from(found.repo_id), Value::from(found.uuid)];
    params.extend(more);
    job::change(session, verb, params, &target.change).await?;
    Ok(())
}

async fn config(session: &mut Session<'_>, target: &VmChange, set: &[String]) -> Result<(), CtlError> {
    if !set.is_empty() {
        let changes = Value::Struct(set.iter().map(|pair| setting(pair)).collect::<Result<_, _>>()?);
        return act(session, "configure_vm", target, Some(changes)).await;
    }
    let found = find(session, &target.vm).await?;
    let params = [Value::from(found.repo_id), Value::from(found.uuid)];
    let config = session.read("get_vm_config", &params).await?;
    session.printer.value(&config)
}

fn setting(pair: &str) -> Result<(String, Value), CtlError> {
    let (key, value) = pair
        .split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .ok_or_else(|| CtlError::Usage(format!("--set {pair:?}: allowed: KEY=VALUE")))?;
    let value = from_argument(value).map_err(|problem| CtlError::Usage(format!("--set {key}: {problem}")))?;
    Ok((key.to_owned(), value))
}

async fn create(
    session: &mut Session<'_>,
    file: &Path,
    repo: Option<String>,
    change: &Change,
) -> Result<(), CtlError> {
    let mut params = read_params(file)?;
    let wrong = |problem: &str| CtlError::File { file: file.to_owned(), problem: problem.to_owned() };
    let in_file = take_text(&mut params, "repo_id").map_err(|problem| wrong(&problem))?;
    let repo = repo.or(in_file).ok_or_else(|| {
        CtlError::Usage("no repository: add repo_id to the file, or give --repo".to_owned())
    })?;
    let uuid = match take_text(&mut params, "uuid").map_err(|problem| wrong(&problem))? {
        Some(uuid) => uuid,
        None => VmId::random().as_str(),
    };
    let call = vec![Value::from(repo), Value::from(uuid.as_str()), Value::Struct(params)];
    let created = job::change(session, "create_vm", call, change).await?;
    if created.is_some() && !session.printer.is_json() {
        session.printer.line(&uuid)?;
    } else {
        // stdout belongs to the job here, but the UUID that we made must not be lost.
        session.printer.note(&format!("uuid {uuid}"));
    }
    Ok(())
}

fn take_text(params: &mut BTreeMap<String, Value>, key: &str) -> Result<Option<String>, String> {
    match params.remove(key) {
        None | Some(Value::Nil) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("{key} must be text")),
    }
}

/// The parameters in a file: JSON if it begins so, else TOML.
fn read_params(file: &Path) -> Result<BTreeMap<String, Value>, CtlError> {
    let wrong = |problem: String| CtlError::File { file: file.to_owned(), problem };
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(MAX_FILE_BYTES + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|opened| opened.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
    };
    read.map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(wrong(format!("is larger than {MAX_FILE_BYTES} bytes")));
    }
    parse_params(&text).map_err(wrong)
}

fn parse_params(text: &str) -> Result<BTreeMap<String, Value>, String> {
    if text.trim_start().starts_with('{') {
        let json = serde_json::from_str(text).map_err(|error| error.to_string())?;
        return Ok(members(from_json(json)?));
    }
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| error.to_string())?;
    Ok(members(from_toml(toml::Value::Table(table))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_in_toml_and_in_json_is_the_same() {
        let toml = "name = \"web\"\nmemory = 512\ndisk = [\"file:/x,xvda,w\"]\n[extra]\na = true\n";
        let json = r#"{"name": "web", "memory": 512, "disk": ["file:/x,xvda,w"], "extra": {"a": true}}"#;
        assert_eq!(parse_params(toml).unwrap(), parse_params(json).unwrap());
        assert!(parse_params("{").is_err() && parse_params("= 5").is_err());
    }

    #[test]
    fn a_setting_has_a_key() {
        assert_eq!(setting("memory=512").unwrap(), ("memory".to_owned(), Value::Int(512)));
        assert_eq!(setting("a=b=c").unwrap(), ("a".to_owned(), Value::from("b=c")));
        assert!(setting("memory").is_err() && setting("=5").is_err());
    }
}
