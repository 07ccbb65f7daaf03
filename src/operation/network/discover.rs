//! Discovery: what the kernel really has, beside what was asked for and what was. It changes nothing.

use super::{MAX_TOLD, Operations, Result, kernel_fault, locks, told};
use crate::job::{JobFault, Outcome, StepContext};
use crate::model::{EventNumber, JobId};
use crate::network::{Difference, Scope, aim, differences, plan};
use crate::operation::plan::Plan;
use crate::operation::step::Step;
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;

/// `event`: acknowledged when it ends. `of`: the change that failed.
pub fn discover(event: Option<EventNumber>, of: Option<JobId>) -> Plan {
    let step = Step::NetworkDiscover { event, of };
    Plan::new("look at the network and make the record true", locks(), vec![step]).essential()
}

impl Operations {
    pub(in crate::operation) async fn network_discover(
        &self,
        event: Option<EventNumber>,
        of: Option<JobId>,
        context: &StepContext,
    ) -> Result<Outcome> {
        let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        let confirmed = self.network_confirmed().await?;
        let declared = &confirmed.desired;
        let target = aim(&now, declared, declared);
        let owners = self.kernel.owners().await.map_err(|e| kernel_fault(&e))?;
        let others = owners.into_keys().collect();
        let scope = Scope::of(declared, declared, &now).without(&others, &target);
        let mut result = json!({
            "links": now.links.len(),
            "routes": now.routes.len(),
            "drift": told(plan(&now, &target, &scope)),
        });
        if let Some(open) = self.network_open().await?.filter(|open| Some(open.job) == of) {
            let scope = open.scope();
            let (asked, was) =
                (differences(&now, &open.aim, &scope), differences(&now, &open.snapshot, &scope));
            let rows = beside(&asked, &was);
            result["differences"] = json!(&rows[..rows.len().min(MAX_TOLD)]);
            result["differences_in_all"] = rows.len().into();
        }
        if let Some(event) = event {
            // By hand or by us: whoever was first. What was found is told by this job, whose number the event has.
            let by = format!("discovery, job {}", context.job);
            let acknowledged = self.events.acknowledge(&[event], &by).await;
            acknowledged.map_err(|error| JobFault::new("STORE", error.to_string()))?;
        }
        Ok(Outcome::result(result))
    }
}

/// What was asked for, what was before, and what is: of all that differs from one or the other.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row<'a> {
    object: &'a str,
    what: &'static str,
    asked: &'a str,
    was: &'a str,
    is: &'a str,
}

fn beside<'a>(asked: &'a [Difference], was: &'a [Difference]) -> Vec<Row<'a>> {
    let mut rows: BTreeMap<(&str, &'static str), Row<'a>> = BTreeMap::new();
    fn row<'a>(one: &'a Difference) -> Row<'a> {
        Row { object: &one.object, what: one.what, asked: &one.is, was: &one.is, is: &one.is }
    }
    for one in asked {
        rows.entry((&one.object, one.what)).or_insert_with(|| row(one)).asked = &one.asked;
    }
    for one in was {
        rows.entry((&one.object, one.what)).or_insert_with(|| row(one)).was = &one.asked;
    }
    rows.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_what_was_and_what_is_stand_beside_each_other() {
        let one = |what, asked: &str, is: &str| Difference {
            object: "br0".to_owned(),
            what,
            asked: asked.to_owned(),
            is: is.to_owned(),
        };
        let asked = [one("MTU", "9000", "1400"), one("state", "on", "off")];
        let was = [one("MTU", "1500", "1400")];
        let told: Vec<_> = beside(&asked, &was)
            .iter()
            .map(|row| (row.what, row.asked, row.was, row.is))
            .map(|(a, b, c, d)| [a, b, c, d])
            .collect();
        assert_eq!(told, [["MTU", "9000", "1500", "1400"], ["state", "on", "off", "off"]]);
    }
}
