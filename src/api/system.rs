//! Introspection, as XML-RPC clients know it (`system.*`), and our own `verb_list`, all from the table; and
//! `system.multicall`.

use super::Api;
use super::arguments::{Arguments, Type, need, type_name};
use super::fault::{ApiFault, Result};
use super::value::{int, structure, text, texts};
use super::verb::{Kind, Origin, Row, Verb};
use crate::wire::{Answer, Caller, Encoded, Role, Value, encode_list, encode_value};
use futures_util::future::{BoxFuture, FutureExt};
use tokio::time::{Instant, timeout_at};

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
    let states = verb.states();
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
        let mut room = Room::new(api.operations.settings.wire.max_answer_bytes, calls.len());
        let end = api.wait_end();
        let mut answers = Vec::with_capacity(calls.len());
        for call in calls {
            let answer = match room.refusal(end) {
                Some(fault) => Err((fault, false)),
                None => one(api, call, caller, end).await,
            };
            let answer = answer.and_then(|answer| room.take(answer).map_err(|fault| (fault, false)));
            answers.push(answer.unwrap_or_else(|(fault, dialect_verb)| {
                let fault = fault.on_wire(dialect_verb, dialect);
                room.used(encode_value(&structure([
                    ("faultCode", int(fault.fault_code)),
                    ("faultString", text(fault.fault_string)),
                ])))
            }));
        }
        Ok(Answer::Array(answers))
    }
    .boxed()
}

/// What one multicall may answer. Answers are kept as the bytes that go out: no other form of them is known to be
/// as small.
struct Room {
    bytes: usize,
    used: usize,
}

/// What a call is answered at the least: a fault.
const FAULT_BYTES: usize = 512;

impl Room {
    fn new(max_answer_bytes: usize, calls: usize) -> Self {
        // All that are refused must find room as well.
        Self { bytes: max_answer_bytes.saturating_sub((calls + 1) * FAULT_BYTES), used: 0 }
    }

    /// Why the next call is not made. Half of the room is kept for the answer of a call that is under way when
    /// the other half is full: what was done ought to be told.
    fn refusal(&self, end: Instant) -> Option<ApiFault> {
        if self.used > self.bytes / 2 {
            return Some(too_big("the answers before were too big together; not called"));
        }
        (Instant::now() >= end).then(|| {
            ApiFault::new("NOT_CALLED", "the time of system.multicall was over before this call's turn")
        })
    }

    fn used(&mut self, answer: Encoded) -> Encoded {
        self.used += answer.0.len();
        answer
    }

    fn take(&mut self, answer: Answer) -> Result<Encoded> {
        let bytes = match &answer {
            Answer::Value(_) => 0,
            Answer::Array(items) => items.iter().map(|item| item.0.len()).sum(),
        };
        // Before it is copied: the parts may be shared with others, the copy is not.
        let left = self.bytes.saturating_sub(self.used);
        let encoded = match answer {
            _ if bytes > left => None,
            Answer::Value(value) => Some(encode_value(&value)),
            Answer::Array(items) => Some(encode_list(&items)),
        };
        let encoded =
            encoded.map(|encoded| encode_list(&[encoded])).filter(|encoded| encoded.0.len() <= left);
        encoded
            .map(|encoded| self.used(encoded))
            .ok_or_else(|| too_big("the answer is too big beside the others"))
    }
}

fn too_big(why: &str) -> ApiFault {
    ApiFault::new("ANSWER_TOO_BIG", format!("system.multicall: {why}"))
}

async fn one(
    api: &Api,
    call: &Value,
    caller: &Caller,
    end: Instant,
) -> std::result::Result<Answer, (ApiFault, bool)> {
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
    let answer = api.answer(verb, params, caller, end);
    let answer = match verb.kind {
        // It may wait for an event or a job longer than the time for all. A change keeps to the end by itself.
        Kind::Read(_) => timeout_at(end, answer).await.unwrap_or_else(|_| {
            let text = format!("the time of system.multicall was over while {} was waited for", verb.name);
            Err(ApiFault::new("NOT_CALLED", text))
        }),
        _ => answer.await,
    };
    answer.map_err(|fault| (fault, verb.origin == Origin::Dialect))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_multicall_calls_no_more_once_its_answers_are_half_of_what_may_be_answered() {
        let later = Instant::now() + Duration::from_secs(60);
        let mut room = Room::new(100_000, 10);
        room.take(text("x".repeat(40_000)).into()).unwrap();
        assert_eq!(room.refusal(later), None);
        room.take(Answer::Array(vec![encode_value(&text("x".repeat(10_000)))])).unwrap();
        assert_eq!(room.refusal(later).unwrap().name, "ANSWER_TOO_BIG");
    }

    #[test]
    fn an_answer_that_finds_no_room_is_a_fault_and_the_whole_is_never_too_big() {
        let big = encode_value(&text("x".repeat(60_000)));
        let mut room = Room::new(100_000, 10);
        for answer in [text("x".repeat(120_000)).into(), Answer::Array(vec![big.clone(), big.clone()])] {
            assert_eq!(room.take(answer).unwrap_err().name, "ANSWER_TOO_BIG");
        }
        let fits = room.take(Answer::Array(vec![big])).unwrap();
        assert!(fits.0.len() < 100_000 - 10 * FAULT_BYTES);
    }

    #[test]
    fn a_multicall_whose_time_is_over_calls_no_more() {
        assert_eq!(Room::new(100_000, 1).refusal(Instant::now()).unwrap().name, "NOT_CALLED");
    }
}
