//! What the agent found at its start, as `vm_adopted` shows it.

use super::value::{int, or_nil, structure, text};
use crate::operation::adoption::{Found, FoundDomain, FoundVm};
use crate::vm::adopt::{Boot, DomainVerdict, Evidence, VmVerdict};
use crate::wire::Value;

/// Entries of one list; `counts` tells how many there are.
const MAX_ENTRIES: usize = 1000;

pub fn shown(found: &Found) -> Value {
    let boot = match found.boot {
        Boot::Same => "same",
        Boot::New => "new",
        Boot::Unknown => "unknown",
    };
    let adopted = |v: &DomainVerdict| matches!(v, DomainVerdict::Adopted(_));
    let unknown = |v: &DomainVerdict| !adopted(v) && *v != DomainVerdict::Dying;
    let gone = |v: &VmVerdict| matches!(v, VmVerdict::Gone | VmVerdict::WentWithHost);
    let restarted = |v: &VmVerdict| matches!(v, VmVerdict::Restart(_));
    let left = |v: &VmVerdict| matches!(v, VmVerdict::InJob | VmVerdict::Migrating);
    let vms = |is: &dyn Fn(&VmVerdict) -> bool| {
        Value::Array(found.vms.iter().filter(|vm| is(&vm.verdict)).take(MAX_ENTRIES).map(vm).collect())
    };
    let domains = |is: &dyn Fn(&DomainVerdict) -> bool| {
        let found = found.domains.iter().filter(|d| is(&d.verdict));
        Value::Array(found.take(MAX_ENTRIES).map(domain).collect())
    };
    structure([
        ("at", text(found.at)),
        ("boot", text(boot)),
        (
            "counts",
            structure([
                ("adopted", count(found.count_domains(adopted))),
                ("unknown", count(found.count_domains(unknown))),
                ("gone", count(found.count_vms(gone))),
                ("restarted", count(found.count_vms(restarted))),
                ("left", count(found.count_vms(left))),
                ("off", count(found.count_vms(|v| matches!(v, VmVerdict::Off | VmVerdict::Saved)))),
            ]),
        ),
        ("adopted", domains(&adopted)),
        ("unknown", domains(&unknown)),
        ("gone", vms(&gone)),
        ("restarted", vms(&restarted)),
        ("left", vms(&left)),
    ])
}

fn count(n: usize) -> Value {
    int(n as u64)
}

fn domain(found: &FoundDomain) -> Value {
    let why = match found.verdict {
        DomainVerdict::Adopted(_) => "its UUID is that of a VM of ours".to_owned(),
        DomainVerdict::Unknown { same_name: None } => "no VM of ours has its UUID".to_owned(),
        DomainVerdict::Unknown { same_name: Some(vm) } => {
            format!("no VM of ours has its UUID; VM {vm} has its name, which does not count")
        }
        DomainVerdict::Double(vm) => format!("VM {vm} has another domain, which was adopted"),
        DomainVerdict::Migrating(vm) => format!("the migration of VM {vm} decides"),
        DomainVerdict::Dying => "it is being taken apart".to_owned(),
    };
    structure([
        ("domid", int(found.domid.0)),
        ("name", text(&found.name)),
        ("uuid", or_nil(found.uuid.map(text))),
        ("why", text(why)),
    ])
}

fn vm(found: &FoundVm) -> Value {
    let why = match found.verdict {
        VmVerdict::Gone => "its domain had gone, cause unknown: it is off",
        VmVerdict::WentWithHost => "its host went down with it, and autostart is not set: it is off",
        VmVerdict::Restart(Evidence::CrashSeen) => "it was seen to crash",
        VmVerdict::Restart(Evidence::HostBooted) => {
            "its host went down with it and has booted; autostart is set"
        }
        VmVerdict::InJob => "an open job of before decides",
        VmVerdict::Migrating => "its migration decides",
        VmVerdict::HasDomain => "it has a domain",
        VmVerdict::Off | VmVerdict::Saved => "it is off, as it should be",
    };
    structure([("uuid", text(found.vm)), ("name", text(&found.name)), ("why", text(why))])
}
