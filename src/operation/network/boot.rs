//! The network after the host's boot: the kernel has forgotten all, and what is declared is carried out.
//!
//! A job of its own, submitted at the agent's start before anything that asks Xen: a hypervisor that does not answer must
//! not keep a host from being reached. The host's boot waits for it, since VMs need their bridges, and goes on however it
//! ended: those that lack their bridge fail for themselves.
//!
//! A boot is *done* when what can be is there; what was missing then is written with it. A restore that was refused is tried
//! again by [`super::look`]; and when a port comes that was missing (a card whose driver is slow), what stands on it is
//! carried out. An agent that starts again within a boot that is done touches nothing: what is different then was done from
//! outside, and is told as drift.

use super::{Confirmed, Desired, Open, Operations, Result, kernel_fault, locks, store_fault, told};
use crate::event::{Event, kind};
use crate::host::record::HOST_KEY;
use crate::job::{JobFault, Options as JobOptions, Outcome, StepContext, Submission};
use crate::model::IfName;
use crate::model::network::{Kind, NetworkView};
use crate::network::{Scope, aim, plan};
use crate::operation::plan::Plan;
use crate::operation::step::Step;
use crate::store::{Table, Txn};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// How far what is declared was carried out after a boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Done {
    boot_id: String,
    /// Ports that were not there.
    missing: BTreeSet<IfName>,
    /// Links that another service of the host had: told once.
    left_alone: BTreeSet<IfName>,
}

const DONE: Table<Done> = Table::new("network_boot", 1);

/// What is still to be carried out in this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lack {
    Nothing,
    /// Only what stands on ports that are not there.
    Ports,
    /// One of those has come.
    Arrived,
    /// The restore has not ended well.
    All,
}

/// Carries out a rollback that was blocked, and what is declared.
pub fn restore() -> Plan {
    Plan::new("bring the network back to what is declared", locks(), vec![Step::NetworkRestore {}])
        .essential()
}

/// The declared links that nobody can make and that are not there.
pub(super) fn missing(declared: &Desired, now: &NetworkView) -> BTreeSet<IfName> {
    let made = |name: &IfName| declared.links.get(name).is_some_and(|link| link.kind.is_made());
    let ports = declared.links.values().filter(|link| link.kind.has_ports()).flat_map(|link| &link.ports);
    let parents = declared.links.values().filter_map(|link| match &link.kind {
        Kind::Vlan { parent, .. } => Some(parent),
        _ => None,
    });
    let named = declared.links.keys().chain(ports).chain(parents);
    named.filter(|name| !made(name) && !now.links.contains_key(*name)).cloned().collect()
}

/// The network of this boot is as the change has it, which holds from now on.
pub(super) fn put_done(writes: &mut Txn, open: &Open) {
    let done = Done {
        boot_id: open.boot_id.clone(),
        missing: missing(&open.after.desired, &open.aim),
        left_alone: open.left_alone.clone(),
    };
    writes.put(&DONE, HOST_KEY, &done);
}

impl Operations {
    async fn done_in(&self, boot_id: &str) -> Result<Option<Done>> {
        let done = self.store.get(&DONE, HOST_KEY).await.map_err(|e| store_fault(&e))?;
        Ok(done.filter(|done| done.boot_id == boot_id))
    }

    /// Whether what is declared has been carried out since the host's boot, or nothing is.
    async fn is_boot_done(&self, boot_id: &str) -> Result<bool> {
        Ok(self.done_in(boot_id).await?.is_some() || self.network_confirmed().await? == Confirmed::default())
    }

    /// Whether there is something to carry out: the boot is not done, or a port has come that was missing.
    pub(super) async fn boot_lacks(&self, boot_id: &str, now: &NetworkView) -> Result<Lack> {
        match self.done_in(boot_id).await? {
            Some(done) if done.missing.is_empty() => Ok(Lack::Nothing),
            Some(done) if done.missing.iter().any(|link| now.links.contains_key(link)) => Ok(Lack::Arrived),
            Some(_) => Ok(Lack::Ports),
            None if self.is_boot_done(boot_id).await? => Ok(Lack::Nothing),
            None => Ok(Lack::All),
        }
    }

    fn boot_job(&self, boot_id: &str, caller: &str) -> Submission {
        let options = JobOptions {
            idempotency_key: Some(format!("network_at_boot/{boot_id}")),
            ..JobOptions::default()
        };
        self.submission("network_restore", caller, restore(), options)
    }

    /// At the agent's start. What cannot be submitted now is tried again by [`super::look`].
    pub async fn submit_network_at_boot(&self) {
        let Some(engine) = self.engine() else { return };
        let submitted = async {
            let boot_id = self.machine_boot_id().await?;
            if self.is_boot_done(&boot_id).await? {
                return Ok(());
            }
            let submitted = engine.submit(self.boot_job(&boot_id, "agent")).await;
            submitted.map(drop).map_err(|error| JobFault::new("BUSY", error.to_string()))
        };
        if let Err(fault) = submitted.await {
            tracing::error!(%fault, "the network is not brought to what is declared now");
        }
    }

    /// A step of the host's boot: waits for that job.
    pub(in crate::operation) async fn network_at_boot(
        &self,
        boot_id: &str,
        context: &StepContext,
    ) -> Result<Outcome> {
        if self.is_boot_done(boot_id).await.unwrap_or(false) {
            return Ok(Outcome::done());
        }
        match self.run_beside(self.boot_job(boot_id, &context.caller), context).await {
            Ok(ended) => Ok(Outcome::value(serde_json::json!({ "job": ended.id.0 }))),
            Err(fault) if fault.name == "CANCELLED" => Err(fault),
            Err(fault) => {
                tracing::error!(%fault, "VMs are started without knowing of their bridges");
                Ok(Outcome::done())
            }
        }
    }

    /// What a blocked rollback left, once more; and what is declared.
    pub(in crate::operation) async fn network_restore(&self, context: &StepContext) -> Result<Outcome> {
        let mut outcome = Outcome::done();
        outcome.writes.set_importance(crate::store::Importance::Essential);
        let boot_id = self.machine_boot_id().await?;
        if let Some(open) = self.network_open().await? {
            if let Err(fault) = self.roll_back(&open).await {
                self.tell_blocked(open, &fault).await;
                return Err(fault);
            }
            let failed = self.told(&open, super::restore::FAILED).await?;
            self.discover_below(&open, failed, context).await;
            self.close_failed(&open, false, context, &mut outcome.writes).await?;
            let text = format!("the rollback of job {} is done", open.job);
            Event::new(kind::NETWORK_RESTORED, "network", text)
                .with_job(context.job)
                .append_to(&mut outcome.writes);
        }
        let done = self.done_in(&boot_id).await?;
        if done.as_ref().is_none_or(|done| !done.missing.is_empty()) {
            self.carry_out(&boot_id, done.unwrap_or_default(), context, &mut outcome.writes).await?;
        }
        Ok(outcome)
    }

    /// All that is declared, as far as its ports are there and no other service has them; of a boot that is done, what stands
    /// on the ports that have come since.
    async fn carry_out(
        &self,
        boot_id: &str,
        before: Done,
        context: &StepContext,
        writes: &mut Txn,
    ) -> Result<()> {
        let declared = self.network_confirmed().await?.desired;
        let now = self.kernel.network().await.map_err(|e| kernel_fault(&e))?;
        let owners = self.kernel.owners().await.map_err(|e| kernel_fault(&e))?;
        let target = aim(&now, &declared, &declared);
        let mut scope = Scope::of(&declared, &declared, &now);
        let left_alone: BTreeSet<IfName> =
            scope.links.iter().filter(|link| owners.contains_key(*link)).cloned().collect();
        scope = scope.without(&left_alone, &target);
        if before.boot_id == boot_id {
            let arrived =
                before.missing.iter().filter(|link| now.links.contains_key(*link)).cloned().collect();
            scope = scope.above(&arrived, &target);
        }
        let changes = told(plan(&now, &target, &scope));
        if !changes.is_empty() {
            self.try_for(&declared, None, &scope).await?;
            let text = format!("the network was brought to what is declared: {}", changes.join("; "));
            Event::new(kind::NETWORK_RESTORED, "network", text).with_job(context.job).append_to(writes);
        }
        if !left_alone.is_subset(&before.left_alone) {
            let words: Vec<String> = left_alone
                .iter()
                .filter_map(|link| Some(format!("{link} ({})", owners.get(link)?)))
                .collect();
            let text = format!(
                "declared links are left alone, since another service of the host has them now: {}",
                words.join(", ")
            );
            Event::new(kind::NETWORK_LEFT_ALONE, "network", text).with_job(context.job).append_to(writes);
        }
        let done = Done { boot_id: boot_id.to_owned(), missing: missing(&declared, &now), left_alone };
        writes.put(&DONE, HOST_KEY, &done);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::network::{Bridge, LinkView, VlanId};
    use crate::network::DesiredLink;

    #[test]
    fn what_nobody_can_make_is_missing_until_it_comes_also_as_a_port_or_below_a_vlan() {
        let name = |text: &str| IfName::parse(text).unwrap();
        let mut declared = Desired::default();
        let mut bridge = DesiredLink::new(Kind::Bridge(Bridge::default()));
        bridge.ports = BTreeSet::from([name("eth0"), name("eth1.5")]);
        declared.links.insert(name("br0"), bridge);
        let vlan = Kind::Vlan { parent: name("eth1"), id: VlanId::new(5).unwrap() };
        declared.links.insert(name("eth1.5"), DesiredLink::new(vlan));
        declared.links.insert(name("eth2"), DesiredLink::new(Kind::Ethernet));
        let mut now = NetworkView::default();
        assert_eq!(missing(&declared, &now), [name("eth0"), name("eth1"), name("eth2")].into());
        for link in ["eth0", "eth1", "eth2"] {
            now.links.insert(name(link), LinkView::new(Kind::Ethernet));
        }
        assert!(missing(&declared, &now).is_empty());
    }
}
