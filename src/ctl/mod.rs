//! dom0ctl: what an operator on the host types, as calls over the operator's socket.
//!
//! Words: a *command* is what was typed, noun and verb (`vm start`); a *verb* is the daemon's (`start_vm`); a
//! *change* is a command that makes a job, and *follows* it to its end unless told not to.
//!
//! What was asked for goes to stdout, and nothing else does; progress, notes and errors go to stderr. The exit
//! code says how it ended ([`Exit`]), taken from the symbolic name of a fault, so that scripts need not read texts.
//! Everything that others wrote (names of guests, texts of events) is shown with its control characters escaped.
//!
//! This room is a client and nothing more: it knows the wire's client, and the daemon by its verbs alone. `store
//! export` and `store import` are the exception: they work on the folder of a daemon that does not run.

mod args;
mod call;
mod error;
mod event;
mod host;
mod job;
mod manager;
mod network;
mod output;
mod peer;
mod plot;
mod rpc;
mod scale;
mod stats;
mod store;
mod top;
mod values;
mod vm;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

pub use args::Cli;
pub use error::{CtlError, Exit};
pub use output::{Format, Printer};
pub use rpc::{Rpc, UnixRpc};

use crate::model::TraceParent;
use args::{Command, JobCommand};
use clap::{CommandFactory, Parser};
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use xmlrpc::Value;

/// Where the daemon's socket lies if nothing else is said: in the usual state folder.
pub const DEFAULT_SOCKET: &str = "/var/lib/dom0d/dom0d.sock";

/// Reads are answered from memory; one that takes longer than this is not coming.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Verbs that wait for their job themselves end before the dialect's 900 s.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(900);

/// One run of dom0ctl: the connection, the printer, and how long to wait.
pub struct Session<'a> {
    rpc: Box<dyn Rpc + 'a>,
    printer: Printer<'a>,
    timeout: Option<Duration>,
}

impl Session<'_> {
    /// Calls a verb that only reads.
    async fn read(&mut self, verb: &str, params: &[Value]) -> Result<Value, CtlError> {
        self.rpc.call(verb, params, self.timeout.unwrap_or(READ_TIMEOUT)).await
    }

    /// Calls a verb that may take as long as a job.
    async fn change(&mut self, verb: &str, params: &[Value]) -> Result<Value, CtlError> {
        self.rpc.call(verb, params, self.timeout.unwrap_or(CHANGE_TIMEOUT)).await
    }
}

/// dom0ctl's whole life: from the arguments of the process to its exit code.
pub async fn main() -> ExitCode {
    let cli = Cli::parse();
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let socket = cli.socket.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET));
    let terminal = stderr.is_terminal();
    let printer = Printer::new(&mut stdout, &mut stderr, cli.output, terminal);
    let exit = run(cli, Box::new(UnixRpc::new(socket, trace())), printer).await;
    ExitCode::from(exit as u8)
}

/// What the caller's own trace says this is done for, by the usual variable; a malformed one is no reason to refuse.
fn trace() -> Option<TraceParent> {
    TraceParent::parse(&std::env::var("TRACEPARENT").ok()?).ok()
}

/// Runs one command and tells how it ended; an error is printed, with a hint where there is one.
pub async fn run<'a>(cli: Cli, rpc: Box<dyn Rpc + 'a>, printer: Printer<'a>) -> Exit {
    let timeout = cli.timeout.map(Duration::from_secs);
    let mut session = Session { rpc, printer, timeout };
    match execute(cli.command, &mut session).await {
        Ok(()) => Exit::Ok,
        Err(error) if error.is_broken_pipe() => Exit::Ok,
        Err(error) => {
            session.printer.note(&format!("dom0ctl: {error}"));
            if let Some(hint) = error.hint() {
                session.printer.note(&format!("hint: {hint}"));
            }
            error.exit()
        }
    }
}

async fn execute(command: Command, session: &mut Session<'_>) -> Result<(), CtlError> {
    match command {
        Command::Host(args::HostCommand::Show) => host::show(session).await,
        Command::Password(args::PasswordCommand::Set { file }) => host::set_password(session, file).await,
        Command::Ownership(command) => host::ownership(session, command).await,
        Command::Certificate(command) => host::certificate(session, command).await,
        Command::Vm(command) => vm::execute(session, command).await,
        Command::Peer(command) => peer::peers(session, command).await,
        Command::Network(command) => network::execute(session, command).await,
        Command::Migration(command) => peer::migrations(session, command).await,
        Command::Job(JobCommand::List(filter)) => job::list(session, filter).await,
        Command::Job(JobCommand::Show { id }) => job::show(session, id).await,
        Command::Job(JobCommand::Wait { id }) => job::wait(session, id).await,
        Command::Job(JobCommand::Cancel { id, no_wait }) => job::cancel(session, id, no_wait).await,
        Command::Event(command) => event::execute(session, command).await,
        Command::Manager(command) => manager::execute(session, command).await,
        Command::Stats(command) => stats::execute(session, command).await,
        Command::Top(command) => top::execute(session, command).await,
        Command::Lock(args::LockCommand::List) => job::locks(session).await,
        Command::Verb(command) => call::verbs(session, command).await,
        Command::Call { verb, args } => call::call(session, &verb, &args).await,
        Command::Store(command) => store::execute(session, command).await,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "dom0ctl", &mut script);
            session.printer.raw(&script)
        }
    }
}
