//! Starts the sampler on the worlds that the operations act on, and tells it whose a vif is. Operations know nothing of
//! statistics, and the sampler nothing of VMs' records.

use crate::model::VmId;
use crate::operation::Operations;
use crate::stats::{Roster, Sampler, Sources};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often all figures are read.
pub(super) const EVERY: Duration = Duration::from_secs(10);

struct Records {
    operations: Arc<Operations>,
    host_name: OnceLock<Arc<str>>,
}

impl Roster for Records {
    fn host_name(&self) -> Arc<str> {
        self.host_name.get().cloned().unwrap_or_else(|| "".into())
    }

    fn is_ours(&self, vm: VmId) -> bool {
        self.operations.vms.get(vm).is_some()
    }

    fn chosen_vifs(&self) -> HashMap<Arc<str>, VmId> {
        self.operations.vms.chosen_vifs().into_iter().map(|(name, vm)| (name.as_str().into(), vm)).collect()
    }
}

/// Sweeps until `stop`.
pub(super) fn start(operations: &Arc<Operations>, stop: &CancellationToken) -> Arc<Sampler> {
    let roster = Arc::new(Records { operations: Arc::clone(operations), host_name: OnceLock::new() });
    let sources = Sources {
        toolstack: Arc::clone(&operations.toolstack),
        kernel: Arc::clone(&operations.kernel),
        machine: Arc::clone(&operations.machine),
    };
    let sampler = Sampler::new(sources, Arc::clone(&roster) as _);
    let (sampling, stop) = (Arc::clone(&sampler), stop.clone());
    tokio::spawn(async move {
        // What it is called does not change while it is up; one that is not told has no name.
        if let Ok(facts) = roster.operations.machine.facts().await {
            let _ = roster.host_name.set(facts.hostname.into());
        }
        sampling.run(EVERY, stop).await;
    });
    sampler
}
