//! The daemon's verbs: which there are, and any of them called.

use super::args::VerbCommand;
use super::output::{Column, cell};
use super::values::{from_argument, text};
use super::{CtlError, Session};
use xmlrpc::Value;

const COLUMNS: &[Column] =
    &[("VERB", "name"), ("FAMILY", "family"), ("KIND", "kind"), ("ROLE", "role"), ("HELP", "help")];

const PARAM_COLUMNS: &[Column] =
    &[("PARAMETER", "name"), ("TYPE", "type"), ("OPTIONAL", "optional"), ("HELP", "help")];

pub async fn call(session: &mut Session<'_>, verb: &str, args: &[String]) -> Result<(), CtlError> {
    let mut params = Vec::with_capacity(args.len());
    for (index, arg) in args.iter().enumerate() {
        let param = from_argument(arg);
        params.push(param.map_err(|problem| CtlError::Usage(format!("argument {}: {problem}", index + 1)))?);
    }
    let answer = session.change(verb, &params).await?;
    session.printer.value(&answer)
}

pub async fn verbs(session: &mut Session<'_>, command: VerbCommand) -> Result<(), CtlError> {
    let answer = session.read("verb_list", &[]).await?;
    let Value::Array(all) = answer else {
        return Err(CtlError::Answer { verb: "verb_list".to_owned(), problem: "no list".to_owned() });
    };
    match command {
        VerbCommand::List { family } => {
            let wanted = |verb: &Value| family.as_deref().is_none_or(|family| text(verb, "family") == family);
            let chosen = all.into_iter().filter(wanted).collect();
            session.printer.list(COLUMNS, &Value::Array(chosen))
        }
        VerbCommand::Help { verb } => {
            let found = all.iter().find(|one| text(one, "name") == verb);
            help(session, found.ok_or_else(|| unknown(&verb, &all))?)
        }
    }
}

fn unknown(verb: &str, all: &[Value]) -> CtlError {
    let near: Vec<&str> = all
        .iter()
        .map(|one| text(one, "name"))
        .filter(|name| verb.split('_').any(|part| part.len() > 2 && name.contains(part)))
        .take(8)
        .collect();
    let mut problem = format!("there is no verb {verb:?}");
    if !near.is_empty() {
        problem = format!("{problem}; similar ones: {}", near.join(", "));
    }
    CtlError::NotFound(problem)
}

fn help(session: &mut Session<'_>, verb: &Value) -> Result<(), CtlError> {
    if session.printer.is_json() {
        return session.printer.value(verb);
    }
    let params = verb["params"].as_array().unwrap_or(&[]);
    let names: Vec<String> = params
        .iter()
        .map(|param| match &param["optional"] {
            Value::Bool(true) => format!("[{}]", text(param, "name")),
            _ => text(param, "name").to_owned(),
        })
        .collect();
    session.printer.line(&format!(
        "{}({}) -> {}",
        text(verb, "name"),
        names.join(", "),
        text(verb, "returns")
    ))?;
    session.printer.line(text(verb, "help"))?;
    let (kind, role) = (text(verb, "kind"), text(verb, "role"));
    session.printer.line(&format!("{} ({kind}), for the role {role} and above", text(verb, "family")))?;
    if verb["states"].as_array().is_some_and(|states| !states.is_empty()) {
        session.printer.line(&format!("allowed while the VM is: {}", cell(&verb["states"])))?;
    }
    if params.is_empty() {
        return Ok(());
    }
    session.printer.line("")?;
    session.printer.list(PARAM_COLUMNS, &verb["params"])
}
