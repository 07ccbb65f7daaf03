//! The family of ownership: a manager takes the host, and lets it go.
//!
//! Both forms of `take_ownership` are always taken: the 3.2 one (id and URL) and the 3.3 one (a struct with URLs
//! and certificates). Credentials inside a URL are the manager's secret: they are neither kept nor shown.

use super::Api;
use super::arguments::{Arguments, Type, may, need};
use super::fault::{ApiFault, Result};
use super::verb::{Kind, Origin, Row, Verb, nil};
use crate::host::ownership::{ManagerId, OwnershipError, RawTake, TakeRequest};
use crate::host::{HostRecord, Ownership};
use crate::model::Timestamp;
use crate::operation::plan::{self, Plan};
use crate::operation::step::Step;
use crate::wire::{Caller, Identity, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("take_ownership", &[need("manager", Type::Any, "3.2: the manager's id; 3.3: a struct manager_uuid, manager_event_url, manager_statistic_url, manager_certificate, signed_server_certificate"),
        may("core_api_url", Type::Text, "3.2: where the manager is called")], "nil", Role::Admin,
        Kind::Job(take_ownership, nil), "A manager becomes the host's owner. Its certificate, if it gives one, is pinned: itself, and what it issued if it is a CA."),
    Row::new("release_ownership", &[need("manager_uuid", Type::Text, "the owner's id")], "nil", Role::Admin,
        Kind::Job(release_ownership, nil), "The owner lets the host go. The operator on the host may do it too."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    DIALECT.iter().map(|row| row.of("ownership", Origin::Dialect))
}

/// The fields of the 3.3 form.
const FIELDS: [&str; 6] = [
    "manager_uuid",
    "manager_core_api_url",
    "manager_event_url",
    "manager_statistic_url",
    "manager_certificate",
    "signed_server_certificate",
];

impl From<OwnershipError> for ApiFault {
    fn from(error: OwnershipError) -> Self {
        let said = error.to_string();
        // The domain's texts begin with the fault's name.
        match said.split_once(": ") {
            Some((name, text)) => Self::new(name, text),
            None => Self::invalid(said),
        }
    }
}

fn change(api: &Api, ownership: Ownership, event: String) -> Plan {
    let record = HostRecord { ownership, ..HostRecord::clone(&api.operations.host_record()) };
    host_changed(api, record, event)
}

/// The host's record becomes this one.
pub(super) fn host_changed(api: &Api, record: HostRecord, event: String) -> Plan {
    let before = Box::new(HostRecord::clone(&api.operations.host_record()));
    plan::host_change(event.clone(), "host-record", Step::PutHost { before, record: Box::new(record), event })
}

fn take_ownership<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let mut raw = RawTake {
            manager: "",
            core_api_url: arguments.opt_text("core_api_url"),
            event_url: None,
            statistic_url: None,
            certificate: None,
            signed_server_certificate: None,
        };
        match arguments.value("manager") {
            Some(Value::String(id)) => raw.manager = id,
            Some(Value::Struct(map)) => {
                if let Some(other) = map.keys().find(|k| !FIELDS.contains(&k.as_str())) {
                    let why = format!(
                        "has no field {}; allowed: {}",
                        crate::model::excerpt(other),
                        FIELDS.join(", ")
                    );
                    return Err(arguments.wrong("manager", why));
                }
                let field = |name: &str| match map.get(name) {
                    None | Some(Value::Nil) => Ok(None),
                    Some(Value::String(text)) => Ok(Some(text.as_str())),
                    Some(_) => Err(arguments.wrong("manager", format!("{name} is no string"))),
                };
                raw.manager = field("manager_uuid")?
                    .ok_or_else(|| arguments.wrong("manager", "manager_uuid is missing"))?;
                raw.core_api_url = field("manager_core_api_url")?;
                raw.event_url = field("manager_event_url")?;
                raw.statistic_url = field("manager_statistic_url")?;
                raw.certificate = field("manager_certificate")?;
                raw.signed_server_certificate = field("signed_server_certificate")?;
            }
            _ => return Err(arguments.wrong("manager", "allowed: a string or a struct")),
        }
        let request = TakeRequest::parse(&raw)?;
        let manager = request.manager.clone();
        let newest = api.operations.events.last().0;
        let ownership = api.operations.host_record().ownership.take(request, Timestamp::now(), newest)?;
        Ok(change(api, ownership, format!("manager {manager} owns the host")))
    }
    .boxed()
}

fn release_ownership<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let ownership = &api.operations.host_record().ownership;
        // The operator can always free the host, whatever a manager has left behind.
        let local = matches!(caller.identity, Identity::Local { .. });
        let manager = match (arguments.text("manager_uuid")?, ownership.owner()) {
            (_, Some(owner)) if local => owner.manager.clone(),
            (id, _) => ManagerId::parse(id).map_err(|e| arguments.wrong("manager_uuid", e))?,
        };
        let released = ownership.release(&manager)?;
        Ok(change(api, released, format!("manager {manager} no longer owns the host")))
    }
    .boxed()
}
