//! `list_vms` with a thousand VMs is megabytes of XML that hardly changes between two calls: each domain's element
//! is encoded once and kept until the domain or its record changes, which its generation tells.

use super::vm_show;
use crate::vm::ObservedDomain;
use crate::wire::{Encoded, encode_value};
use crate::xen::DomId;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// With the generation and the number of CPUs that they show. Bounded by the number of domains: what is not in the newest list is dropped.
#[derive(Default)]
pub(super) struct Fragments {
    kept: Mutex<HashMap<DomId, (u64, u32, Encoded)>>,
}

impl Fragments {
    /// The domains' elements, with secrets: for operators and admins only.
    pub(super) fn of(&self, domains: &[ObservedDomain], host_cpus: u32) -> Vec<Encoded> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let elements = domains
            .iter()
            .map(|domain| match kept.get(&domain.info.domid) {
                Some((generation, cpus, encoded))
                    if (*generation, *cpus) == (domain.generation, host_cpus) =>
                {
                    encoded.clone()
                }
                _ => {
                    let encoded = encode_value(&vm_show::domain(domain, host_cpus, true));
                    kept.insert(domain.info.domid, (domain.generation, host_cpus, encoded.clone()));
                    encoded
                }
            })
            .collect();
        if kept.len() > domains.len() {
            let now: std::collections::HashSet<DomId> = domains.iter().map(|d| d.info.domid).collect();
            kept.retain(|domid, _| now.contains(domid));
        }
        elements
    }
}
