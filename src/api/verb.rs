//! What a verb is. The table of all verbs makes introspection, role checks, the command line's completion and the
//! reference page.

use super::Api;
use super::arguments::{Arguments, Param};
use super::fault::Result;
use crate::job::JobRecord;
use crate::model::JobId;
use crate::operation::plan::Plan;
use crate::vm::{Action, VmState, allowed_states};
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::BoxFuture;
use tokio::time::Instant;

/// What a read or a signal does.
pub type Reader = for<'a> fn(&'a Api, &'a Arguments, &'a Caller) -> BoxFuture<'a, Result<Answer>>;
/// What a change plans. Touches nothing.
pub type Planner = for<'a> fn(&'a Api, &'a Arguments, &'a Caller) -> BoxFuture<'a, Result<Plan>>;
/// What the caller of a change with a window is told, and when.
pub type Windower = for<'a> fn(&'a Api, JobId, Instant) -> BoxFuture<'a, Result<Value>>;
/// What a finished job answers its synchronous caller.
pub type Answerer = fn(&JobRecord) -> Value;

#[derive(Clone, Copy)]
pub enum Kind {
    /// Changes nothing.
    Read(Reader),
    /// A change: planned, then run as a job.
    Job(Planner, Answerer),
    /// A change whose caller is answered while it still waits to be confirmed: planned, run as a job, and told by the
    /// last of these.
    Window(Planner, Windower),
    /// Acts on a job or an event, at once.
    Signal(Reader),
    /// Carries other verbs, each of which is checked and audited as if called alone.
    Envelope(Reader),
}

/// Whose manner a verb follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The Oracle VM Agent's: faults have code 1.
    Dialect,
    Own,
}

#[derive(Clone, Copy)]
pub struct Verb {
    pub name: &'static str,
    pub family: &'static str,
    pub origin: Origin,
    pub params: &'static [Param],
    /// The type of the answer, as introspection tells it.
    pub returns: &'static str,
    pub role: Role,
    pub kind: Kind,
    /// The VM action that the verb is, if it is one: tells in which states it is allowed.
    pub action: Option<Action>,
    /// It acts on one VM, whatever that is doing.
    pub in_every_state: bool,
    pub help: &'static str,
}

impl Verb {
    /// In which states of its VM it is allowed; none: it is not about one VM that exists, or only reads.
    pub fn states(&self) -> Vec<VmState> {
        match self.action {
            Some(action) => allowed_states(action),
            None if self.in_every_state => VmState::ALL.to_vec(),
            None => Vec::new(),
        }
    }

    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::Read(_) => "read",
            Kind::Job(..) | Kind::Window(..) => "job",
            Kind::Signal(_) | Kind::Envelope(_) => "signal",
        }
    }
}

/// A job whose success needs no words.
pub fn nil(_: &JobRecord) -> Value {
    Value::Nil
}

/// A verb's parameters and what it does, with the family's name filled in by the family.
pub struct Row {
    pub name: &'static str,
    pub params: &'static [Param],
    pub returns: &'static str,
    pub role: Role,
    pub kind: Kind,
    pub action: Option<Action>,
    pub in_every_state: bool,
    pub help: &'static str,
}

impl Row {
    pub const fn new(
        name: &'static str,
        params: &'static [Param],
        returns: &'static str,
        role: Role,
        kind: Kind,
        help: &'static str,
    ) -> Self {
        Self { name, params, returns, role, kind, action: None, in_every_state: false, help }
    }

    pub const fn on_vm(mut self, action: Action) -> Self {
        self.action = Some(action);
        self
    }

    pub const fn in_every_state(mut self) -> Self {
        self.in_every_state = true;
        self
    }

    pub fn of(&self, family: &'static str, origin: Origin) -> Verb {
        let Self { name, params, returns, role, kind, action, in_every_state, help } = *self;
        Verb { name, family, origin, params, returns, role, kind, action, in_every_state, help }
    }
}
