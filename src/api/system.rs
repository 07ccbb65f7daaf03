//! Introspection, as XML-RPC clients know it (`system.*`), and our own `verb_list`, all from the table; and
//! `system.multicall`.

use super::Api;
use super::arguments::{Arguments, Type, need, type_name};
use super::fault::{ApiFault, Result};
use super::value::{int, structure, text, texts};
use super::verb::{Kind, Origin, Row, Verb};
use crate::wire::{Answer, Caller, Role, Value, decode_response, encode_response};
use futures_util::future::{BoxFuture, FutureExt};

/// Calls in one `system.multicall`.
const MAX_CALLS: usize = 1000;

const METHOD: super::arguments::Param = need("method", Type::Text, "a verb's name");

#[rustfmt::skip]
const SYSTEM: &[Row] = &[
    Row::new("system.listMethods", &[], "array", Role::Viewer, Kind::Read(list_methods), "The names of all verbs."),
    Row::new("system.methodHelp", &[METHOD], "string", Role::Viewer, Kind::Read(method_help), "What a verb does."),
    Row::new("system.methodSignature", &[METHOD], "array", Role::Viewer, Kind::Read(method_signature),
        "The types of a verb: an array of signatures, each the answer's type and then the parameters'."),
    Row::new("system.multicall", &[need("calls", Type::Array, "up to 1000 structs {methodName, params}")], "array", Role::Viewer, Kind::Envelope(multicall),
        "Several calls, one after the other: an array of [answer] or fault structs."),
];

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("verb_list", &[], "array", Role::Viewer, Kind::Read(verb_list), "All verbs with their parameters, roles, kinds, and the VM states in which they are allowed."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    let system = SYSTEM.iter().map(|row| row.of("system", Origin::Own));
    system.chain(OWN.iter().map(|row| row.of("verb", Origin::Own)))
}

fn list_methods<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async { Ok(texts(api.verbs.keys()).into()) }.boxed()
}

fn method_help<'a>(api: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async {
        let verb = api.verb(arguments.text("method")?)?;
        let mut help = verb.help.to_owned();
        for param in verb.params {
            let optional = if param.optional { ", optional" } else { "" };
            help.push_str(&format!("\n{} ({}{optional})", param.name, param.kind.as_str()));
            if !param.help.is_empty() {
                help.push_str(&format!(": {}", param.help));
            }
        }
        Ok(text(help).into())
    }
    .boxed()
}

fn method_signature<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    _: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async {
        let verb = api.verb(arguments.text("method")?)?;
        let least = verb.params.iter().filter(|p| !p.optional).count();
        let signatures = (least..=verb.params.len()).map(|n| {
            let types = verb.params[..n].iter().map(|p| p.kind.as_str());
            texts(std::iter::once(verb.returns).chain(types))
        });
        Ok(Value::Array(signatures.collect()).into())
    }
    .boxed()
}

fn verb_list<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async { Ok(Value::Array(api.verbs.values().map(verb_value).collect()).into()) }.boxed()
}

fn verb_value(verb: &Verb) -> Value {
    let params = verb.params.iter().map(|p| {
        structure([
            ("name", text(p.name)),
            ("type", text(p.kind.as_str())),
            ("optional", Value::Bool(p.optional)),
            ("help", text(p.help)),
        ])
    });
    let states = verb.action.map(crate::vm::allowed_states).unwrap_or_default();
    structure([
        ("name", text(verb.name)),
        ("family", text(verb.family)),
        ("kind", text(verb.kind_name())),
        ("origin", text(if verb.origin == Origin::Dialect { "dialect" } else { "own" })),
        ("role", text(format!("{:?}", verb.role).to_lowercase())),
        ("params", Value::Array(params.collect())),
        ("returns", text(verb.returns)),
        ("states", texts(states.iter().map(|s| s.as_str()))),
        ("help", text(verb.help)),
    ])
}

fn multicall<'a>(
    api: &'a Api,
    arguments: &'a Arguments,
    caller: &'a Caller,
) -> BoxFuture<'a, Result<Answer>> {
    async {
        let calls = arguments.array("calls")?;
        if calls.len() > MAX_CALLS {
            return Err(
                arguments.wrong("calls", format!("{} calls; allowed: up to {MAX_CALLS}", calls.len()))
            );
        }
        let dialect = api.operations.settings.dialect;
        let mut answers = Vec::with_capacity(calls.len());
        for call in calls {
            answers.push(match one(api, call, caller).await {
                Ok(value) => Value::Array(vec![value]),
                Err((fault, dialect_verb)) => {
                    let fault = fault.on_wire(dialect_verb, dialect);
                    structure([
                        ("faultCode", int(fault.fault_code)),
                        ("faultString", text(fault.fault_string)),
                    ])
                }
            });
        }
        Ok(Value::Array(answers).into())
    }
    .boxed()
}

async fn one(api: &Api, call: &Value, caller: &Caller) -> std::result::Result<Value, (ApiFault, bool)> {
    let own = |fault: ApiFault| (fault, false);
    let Value::Struct(call) = call else {
        let text = format!("system.multicall: calls: holds a {}; allowed: structs", type_name(call));
        return Err(own(ApiFault::invalid(text)));
    };
    let (Some(Value::String(name)), params) = (call.get("methodName"), call.get("params")) else {
        return Err(own(ApiFault::invalid("system.multicall: calls: a call has no methodName")));
    };
    let params = match params {
        Some(Value::Array(params)) => params.clone(),
        None => Vec::new(),
        Some(_) => return Err(own(ApiFault::invalid("system.multicall: calls: params is no array"))),
    };
    let verb = api.verb(name).map_err(|fault| (fault, true))?;
    if verb.name == "system.multicall" {
        return Err(own(ApiFault::invalid("system.multicall cannot be called by itself")));
    }
    let answer = api.answer(verb, params, caller).await;
    let answer = answer.map_err(|fault| (fault, verb.origin == Origin::Dialect))?;
    plain(api, answer).map_err(own)
}

/// An answer as a value, even if it was encoded before.
fn plain(api: &Api, answer: Answer) -> Result<Value> {
    match answer {
        Answer::Value(value) => Ok(value),
        array @ Answer::Array(_) => {
            let limits = &api.operations.settings.wire;
            let internal = |e: String| ApiFault::new("ANSWER_TOO_BIG", e);
            let parts =
                encode_response(&array, limits.max_answer_bytes).map_err(|e| internal(e.to_string()))?;
            let own =
                crate::config::Wire { max_body_bytes: usize::MAX, max_values: usize::MAX, ..limits.clone() };
            let decoded = decode_response(&parts.concat(), &own).map_err(|e| internal(e.to_string()))?;
            decoded.map_err(|fault| ApiFault::new("INTERNAL", fault.fault_string))
        }
    }
}
