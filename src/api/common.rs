//! The common family: what every client calls first.

use super::Api;
use super::arguments::{Arguments, Type, need};
use super::fault::Result;
use super::value::int;
use super::verb::{Kind, Origin, Row, Verb, nil};
use crate::operation::plan::{self, Plan};
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("get_api_version", &[], "array", Role::Viewer, Kind::Read(get_api_version), "The version of this interface: [3]."),
    Row::new("echo", &[need("value", Type::Any, "")], "any", Role::Viewer, Kind::Read(echo), "Answers its parameter."),
    Row::new("sleep", &[need("secs", Type::Int, "0 to 3600")], "nil", Role::Operator, Kind::Job(sleep, nil), "Waits, as a job."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    DIALECT.iter().map(|row| row.of("common", Origin::Dialect))
}

fn get_api_version<'a>(_: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async { Ok(Value::Array(vec![int(3)]).into()) }.boxed()
}

fn echo<'a>(_: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async { Ok(arguments.value("value").cloned().unwrap_or(Value::Nil).into()) }.boxed()
}

fn sleep<'a>(_: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async {
        let secs = arguments.within("secs", 0..=3600)?;
        Ok(plan::sleep(u64::try_from(secs).unwrap_or(0) * 1000))
    }
    .boxed()
}
