//! `list_vms` with a thousand VMs is megabytes of XML that hardly changes between two calls: each domain's element
//! is encoded once and kept until the domain or its record changes, which its generation tells. Its CPU time does
//! change between any two calls; its digits are replaced where they stand.

use super::vm_show;
use crate::vm::ObservedDomain;
use crate::wire::{Encoded, encode_value};
use crate::xen::DomId;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// How the element of the CPU time begins. No text of a user can look like it, for that is escaped.
const CPU_TIME: &[u8] = b"<name>cpu_time</name><value><string>";

/// Bounded by the number of domains: what is not in the newest list is dropped.
#[derive(Default)]
pub(super) struct Fragments {
    kept: Mutex<HashMap<DomId, Kept>>,
}

struct Kept {
    generation: u64,
    /// How many CPUs of the host it shows.
    host_cpus: u32,
    cpu_time_ns: u64,
    encoded: Encoded,
    /// Where in `encoded` the digits of the CPU time are; empty if they are not found.
    digits: Range<usize>,
}

impl Fragments {
    /// The domains' elements, with secrets: for operators and admins only.
    pub(super) fn of(&self, domains: &[ObservedDomain], host_cpus: u32) -> Vec<Encoded> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut elements = Vec::with_capacity(domains.len());
        for domain in domains {
            let domid = domain.info.domid;
            let known = kept.get_mut(&domid).and_then(|known| known.brought_up_to(domain, host_cpus));
            elements.push(known.unwrap_or_else(|| {
                let new = Kept::new(domain, host_cpus);
                let encoded = new.encoded.clone();
                kept.insert(domid, new);
                encoded
            }));
        }
        if kept.len() > domains.len() {
            let now: std::collections::HashSet<DomId> = domains.iter().map(|d| d.info.domid).collect();
            kept.retain(|domid, _| now.contains(domid));
        }
        elements
    }
}

impl Kept {
    fn new(domain: &ObservedDomain, host_cpus: u32) -> Self {
        let encoded = encode_value(&vm_show::domain(domain, host_cpus, true));
        let begin = encoded.0.windows(CPU_TIME.len()).position(|bytes| bytes == CPU_TIME);
        let begin = begin.map_or(0, |at| at + CPU_TIME.len());
        let length = encoded.0[begin..].iter().take_while(|byte| **byte != b'<').count();
        Self {
            generation: domain.generation,
            host_cpus,
            cpu_time_ns: domain.info.cpu_time_ns,
            encoded,
            digits: begin..begin + length,
        }
    }

    /// The domain's element, if no more than its CPU time has changed.
    fn brought_up_to(&mut self, domain: &ObservedDomain, host_cpus: u32) -> Option<Encoded> {
        if (self.generation, self.host_cpus) != (domain.generation, host_cpus) {
            return None;
        }
        if self.cpu_time_ns != domain.info.cpu_time_ns {
            let text = vm_show::cpu_time(&domain.info);
            if text.len() != self.digits.len() {
                return None;
            }
            let digits = self.digits.clone();
            match Arc::get_mut(&mut self.encoded.0) {
                Some(bytes) => bytes[digits].copy_from_slice(text.as_bytes()),
                // An answer that has it is still under way.
                None => {
                    let mut bytes = self.encoded.0.to_vec();
                    bytes[digits].copy_from_slice(text.as_bytes());
                    self.encoded = Encoded(bytes.into());
                }
            }
            self.cpu_time_ns = domain.info.cpu_time_ns;
        }
        Some(self.encoded.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{KiB, Timestamp};
    use crate::xen::{DomainInfo, RunState};

    fn domain(generation: u64, cpu_time_ns: u64) -> ObservedDomain {
        let info = DomainInfo {
            domid: DomId(7),
            vm: None,
            name: "<name>cpu_time</name><value><string>".to_owned(),
            state: RunState::Running,
            memory: KiB(1024),
            max_memory: KiB(1024),
            vcpus: 1,
            online_vcpus: 1,
            cpu_time_ns,
            started: Timestamp(1000),
            vnc_port: None,
        };
        ObservedDomain { info: Arc::new(info), record: None, generation }
    }

    fn fresh(domain: &ObservedDomain) -> Vec<u8> {
        encode_value(&vm_show::domain(domain, 4, true)).0.to_vec()
    }

    #[test]
    fn a_new_cpu_time_is_in_the_element_whether_or_not_an_answer_still_holds_the_old_one() {
        let fragments = Fragments::default();
        let mut under_way = Vec::new();
        // The third has more digits than the others.
        for cpu_time_ns in [1_500_000_000, 2_000_000_007, 12_000_000_000, 13_000_000_000] {
            let domain = domain(1, cpu_time_ns);
            let got = fragments.of(std::slice::from_ref(&domain), 4);
            assert_eq!(got[0].0[..], fresh(&domain));
            under_way.push((got, fresh(&domain)));
        }
        for (got, was) in &under_way {
            assert_eq!(got[0].0[..], was[..], "an answer under way never changes");
        }
        drop(under_way);
        let domain = domain(1, 14_000_000_000);
        assert_eq!(fragments.of(std::slice::from_ref(&domain), 4)[0].0[..], fresh(&domain));
    }

    #[test]
    fn only_another_generation_is_encoded_anew() {
        let fragments = Fragments::default();
        let first = fragments.of(&[domain(1, 5)], 4).remove(0);
        let mut other = domain(1, 5);
        Arc::make_mut(&mut other.info).vcpus = 2;
        assert!(Arc::ptr_eq(&fragments.of(std::slice::from_ref(&other), 4)[0].0, &first.0));
        other.generation = 2;
        assert_eq!(fragments.of(std::slice::from_ref(&other), 4)[0].0[..], fresh(&other));
    }
}
