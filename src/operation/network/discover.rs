//! Discovery: what the kernel really has, beside what was asked for and what was. It changes nothing.

use super::{Operations, Result, kernel_fault, locks, told};
use crate::job::{JobFault, Outcome, StepContext};
use crate::model::{EventNumber, JobId};
use crate::network::{Scope, aim, differences, plan};
use crate::operation::plan::Plan;
use crate::operation::step::Step;
use serde_json::json;

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
        let scope = Scope::of(declared, declared, &now);
        let mut result = json!({
            "links": now.links.len(),
            "routes": now.routes.len(),
            "drift": told(plan(&now, &target, &scope)),
        });
        if let Some(open) = self.network_open().await?.filter(|open| Some(open.job) == of) {
            let scope = open.scope();
            result["asked_and_is"] = told(differences(&now, &open.aim, &scope)).into();
            result["was_and_is"] = told(differences(&now, &open.snapshot, &scope)).into();
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
