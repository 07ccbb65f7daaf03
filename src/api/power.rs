//! The power family. Every VM is stopped first, each in a child job; one that cannot be stopped keeps the host up.

use super::Api;
use super::arguments::Arguments;
use super::fault::Result;
use super::verb::{Kind, Origin, Row, Verb, nil};
use crate::operation::fault;
use crate::operation::plan::{self, Plan};
use crate::wire::{Caller, Role};
use futures_util::future::{BoxFuture, FutureExt};

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("sys_reboot", &[], "nil", Role::Admin, Kind::Job(sys_reboot, nil), "Stops all VMs and reboots the host."),
    Row::new("sys_shutdown", &[], "nil", Role::Admin, Kind::Job(sys_shutdown, nil), "Stops all VMs and switches the host off."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    DIALECT.iter().map(|row| row.of("power", Origin::Dialect))
}

async fn power(api: &Api, off: bool) -> Result<Plan> {
    let facts = api.operations.machine.facts().await.map_err(fault::machine)?;
    Ok(plan::power(off, facts.boot_id))
}

fn sys_reboot<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    power(api, false).boxed()
}

fn sys_shutdown<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    power(api, true).boxed()
}
