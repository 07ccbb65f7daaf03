//! Faults by script: what shall happen to the next requests of a kind instead of, before, or after what they
//! ask for. The script is asked once per request; the first rule that fits and is not used up decides.

use super::{Kind, WorldError};
use crate::model::VmId;
use serde::{Deserialize, Serialize};

/// Rules kept at once; a further one is refused.
const MAX_RULES: usize = 1000;

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It is done at once.
    Do,
    /// Nothing is done; this is the answer.
    Fail(WorldError),
    /// It is done after this long.
    DelayMs(u64),
    /// Nothing is done and no answer ever comes: the caller's deadline must end it.
    Hang,
    /// Nothing is done, and the answer is that it is: a request to a guest that does not listen yet.
    Pretend,
    /// It is done, but the answer is "timed out".
    DoThenTimeout,
    /// It is done, and the connection breaks before the answer.
    DoThenLose,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// `None`: any kind.
    pub kind: Option<Kind>,
    /// Only requests about this VM; `None`: any, also requests about none.
    pub vm: Option<VmId>,
    /// So many fitting requests pass before the rule begins to act.
    pub skip: u32,
    /// So many requests it then acts on.
    pub times: u32,
    pub fate: Fate,
}

impl Rule {
    /// The next request of this kind meets this fate.
    pub fn next(kind: Kind, fate: Fate) -> Self {
        Self { kind: Some(kind), vm: None, skip: 0, times: 1, fate }
    }

    pub fn of_vm(self, vm: VmId) -> Self {
        Self { vm: Some(vm), ..self }
    }

    pub fn times(self, times: u32) -> Self {
        Self { times, ..self }
    }

    pub fn after(self, skip: u32) -> Self {
        Self { skip, ..self }
    }
}

#[derive(Debug, Default)]
pub(super) struct Script {
    rules: Vec<Rule>,
}

impl Script {
    pub(super) fn add(&mut self, rule: Rule) -> super::Result<()> {
        if self.rules.len() >= MAX_RULES {
            return Err(WorldError::Failed(format!("the script holds {MAX_RULES} rules already")));
        }
        self.rules.push(rule);
        Ok(())
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    pub(super) fn fate(&mut self, kind: Kind, vm: Option<VmId>) -> Fate {
        let fits = |r: &Rule| r.kind.is_none_or(|k| k == kind) && r.vm.is_none_or(|v| Some(v) == vm);
        let mut fate = Fate::Do;
        for rule in self.rules.iter_mut().filter(|r| fits(r)) {
            if rule.skip > 0 {
                rule.skip -= 1;
            } else {
                rule.times = rule.times.saturating_sub(1);
                fate = rule.fate.clone();
                break;
            }
        }
        self.rules.retain(|r| r.times > 0);
        fate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_acts_on_the_requests_it_names_so_often_as_it_says_and_no_more() {
        let vm = VmId::random();
        let mut script = Script::default();
        script.add(Rule::next(Kind::Pause, Fate::Hang).of_vm(vm).after(1).times(2)).unwrap();
        assert_eq!(script.fate(Kind::Pause, None), Fate::Do);
        assert_eq!(script.fate(Kind::Create, Some(vm)), Fate::Do);
        assert_eq!(script.fate(Kind::Pause, Some(vm)), Fate::Do, "the first is let pass");
        assert_eq!(script.fate(Kind::Pause, Some(vm)), Fate::Hang);
        assert_eq!(script.fate(Kind::Pause, Some(vm)), Fate::Hang);
        assert_eq!(script.fate(Kind::Pause, Some(vm)), Fate::Do);
    }

    #[test]
    fn the_script_is_bounded() {
        let mut script = Script::default();
        for _ in 0..MAX_RULES {
            script.add(Rule::next(Kind::Pause, Fate::Hang)).unwrap();
        }
        assert!(script.add(Rule::next(Kind::Pause, Fate::Hang)).is_err());
    }
}
