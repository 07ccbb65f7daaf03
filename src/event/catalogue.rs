//! All types of events there are, in one table.
//!
//! Words: a *kind* is a type that cannot be wrong: nobody outside this file can make one, so every event that is
//! published has its row here; an *alert* is an event of severity warning or above, open until it is acknowledged; an
//! event *clears* alerts of the same object if their rows say so.
//!
//! `docs/events.md` is made from this table (`UPDATE_DOCS=1 cargo test --lib reference`). A stored event keeps its type
//! as text: one that an older agent wrote and this table does not have any more is shown, and clears nothing.

use super::Severity;
use std::collections::HashMap;
use std::sync::LazyLock;

/// A type of events, of the table below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind(&'static str);

impl Kind {
    pub const fn as_str(self) -> &'static str {
        self.0
    }

    pub fn entry(self) -> &'static Entry {
        find(self.0).expect("a kind is made together with its row")
    }
}

impl PartialEq<Kind> for String {
    fn eq(&self, other: &Kind) -> bool {
        self == other.0
    }
}

/// One row.
#[derive(Debug)]
pub struct Entry {
    pub kind: Kind,
    /// Of most events of this type; the meaning says when it is another.
    pub severity: Severity,
    /// The form of the object: `host`, `vm/<uuid>`, …
    pub object: &'static str,
    pub meaning: &'static str,
    /// An event of one of these, of the same object, acknowledges an alert of this type.
    pub cleared_by: &'static [Kind],
    /// The name in `data` of what the event is about within its object: an event that has it clears, and is damped
    /// with, only those that have the same.
    pub part: Option<&'static str>,
    /// It may come and go quickly, and is damped then, together with all others of this name and the same object.
    pub damped_as: Option<&'static str>,
}

impl Entry {
    /// What of its object an event with this `data` is about; `None`: all of it.
    pub fn part_of<'a>(&self, data: &'a serde_json::Map<String, serde_json::Value>) -> Option<&'a str> {
        data.get(self.part?)?.as_str()
    }

    /// Whether an object has the form that the row tells.
    pub fn fits(&self, object: &str) -> bool {
        self.object.split(" or ").any(|form| match form.split_once('<') {
            None => object == form,
            Some((_, "object>")) => !object.is_empty(),
            Some((front, what)) => object.strip_prefix(front).is_some_and(|rest| match what {
                "uuid>" => crate::model::VmId::parse(rest).is_ok(),
                "number>" => rest.parse::<u64>().is_ok(),
                _ => !rest.is_empty(),
            }),
        })
    }
}

/// The row of a type.
pub fn find(kind: &str) -> Option<&'static Entry> {
    static BY_NAME: LazyLock<HashMap<&'static str, &'static Entry>> =
        LazyLock::new(|| CATALOGUE.iter().map(|entry| (entry.kind.0, entry)).collect());
    BY_NAME.get(kind).copied()
}

/// The types of alerts that an event of this type clears.
pub fn clears(kind: &str) -> &'static [Kind] {
    static CLEARS: LazyLock<HashMap<&'static str, Vec<Kind>>> = LazyLock::new(|| {
        let mut clears: HashMap<&'static str, Vec<Kind>> = HashMap::new();
        for entry in CATALOGUE {
            entry.cleared_by.iter().for_each(|by| clears.entry(by.0).or_default().push(entry.kind));
        }
        clears
    });
    CLEARS.get(kind).map_or(&[], Vec::as_slice)
}

macro_rules! catalogue {
    ($($name:ident $kind:literal $severity:ident $object:literal, $meaning:literal
        $(, each $part:literal)? $(, cleared by $by:expr)? $(, damped as $group:literal)?;)+) => {
        /// A constant for each row.
        pub mod kind {
            use super::Kind;
            $(
                #[doc = $meaning]
                pub const $name: Kind = Kind($kind);
            )+
        }

        /// The table.
        pub const CATALOGUE: &[Entry] = &[$(
            Entry {
                kind: kind::$name,
                severity: Severity::$severity,
                object: $object,
                meaning: $meaning,
                cleared_by: catalogue!(@by $($by)?),
                part: catalogue!(@some $($part)?),
                damped_as: catalogue!(@some $($group)?),
            },
        )+];
    };
    (@by) => { &[] };
    (@by $by:expr) => { $by };
    (@some) => { None };
    (@some $name:literal) => { Some($name) };
}

/// The VM runs, or is no VM of this host any more: whatever was wrong with its running is over.
const RUNS: &[Kind] = &[
    kind::VM_STARTED,
    kind::VM_REBOOTED,
    kind::VM_RESTARTED_AFTER_CRASH,
    kind::VM_RESTORED,
    kind::VM_FOUND_RUNNING,
    kind::VM_ARRIVED,
    kind::VM_LEFT,
    kind::VM_DELETED,
];
/// What was found without us being asked is in order again: somebody has ended it, or begun it anew, by us.
const CHANGED_BY_US: &[Kind] = &[
    kind::VM_STARTED,
    kind::VM_REBOOTED,
    kind::VM_RESTORED,
    kind::VM_STOPPED,
    kind::VM_SAVED,
    kind::VM_LEFT,
    kind::VM_DELETED,
];
/// A domain that was suspended goes on, or is gone.
const MOVES: &[Kind] = &[
    kind::VM_GOES_ON,
    kind::VM_STARTED,
    kind::VM_REBOOTED,
    kind::VM_RESTARTED_AFTER_CRASH,
    kind::VM_STOPPED,
    kind::VM_CRASHED,
    kind::VM_GONE,
    kind::VM_SAVED,
    kind::VM_RESTORED,
    kind::VM_LEFT,
    kind::VM_DELETED,
];
/// What was wrong with a carrier; `carrier_back` is told only of one that does not flap.
const CARRIER_IS_OVER: &[Kind] = &[
    kind::NETWORK_CARRIER_BACK,
    kind::NETWORK_SETTLED,
    kind::NETWORK_LINK_ADDED,
    kind::NETWORK_LINK_REMOVED,
];
/// It is known who runs the VM.
const DECIDED: &[Kind] = &[
    kind::VM_LEFT,
    kind::VM_MIGRATED,
    kind::VM_MIGRATION_FAILED,
    kind::VM_ARRIVED,
    kind::VM_ARRIVAL_DROPPED,
    kind::VM_DELETED,
];

catalogue! {
    STORE_REBUILT "store.rebuilt" Critical "host",
        "The agent's store was damaged and was made anew from the ledger; jobs and events before this are gone.";
    EVENT_FLAPPING "event.flapping" Info "<object>",
        "Events of this object came and went so quickly that they were held back; it is calm again, or has gone on for ten \
         minutes. `data`: `type`, `severity`, `text` and `data` of the last one held back, which is how things stand; \
         `count` and `counts` by type, `from` and `to`; `after`, by type, behind which event number the last such was held \
         back, and which one in order. It has the last one's severity and is cleared by what would have cleared that \
         one. It clears what those that were held back would have cleared then, and no alert that came later.";

    HOST_CHANGED "host.changed" Info "host", "The host's record was changed: roles, ownership, pool.";
    HOST_PASSWORD_CHANGED "host.password_changed" Info "host", "The agent's password was changed.";
    HOST_CERTIFICATE_RENEWED "host.certificate_renewed" Info "host", "A new server certificate is served.";
    HOST_POWER "host.power" Warning "host", "The host was switched off or rebooted by a job.";
    PEER_ADDED "peer.added" Info "host", "Another host may send VMs here and take VMs from here.";
    PEER_REMOVED "peer.removed" Info "host", "Another host may not any more.";

    JOB_FAILED "job.failed" Error "job/<number>",
        "A job failed. Warning, if it was refused before it changed anything.";
    JOB_CANCELLED "job.cancelled" Warning "job/<number>", "A job was cancelled.";

    DOMAIN_UNKNOWN "domain.unknown" Warning "domain/<number>",
        "A domain runs here that is no VM of ours; it is left alone. `data.name` is its name.",
        each "name", cleared by &[kind::DOMAIN_GONE];
    DOMAIN_GONE "domain.gone" Info "domain/<number>",
        "A domain that was no VM of ours is gone, or is a VM of ours now.", each "name";
    DOMAIN_DOUBLE "domain.double" Critical "vm/<uuid>",
        "A VM has more than one domain; none is touched until one of them is gone.",
        cleared by &[kind::DOMAIN_SINGLE, kind::VM_STARTED, kind::VM_DELETED];
    DOMAIN_SINGLE "domain.single" Info "vm/<uuid>", "A VM that had more than one domain has no more than one again.";

    VM_CREATED "vm.created" Info "vm/<uuid>", "A VM was created.";
    VM_CHANGED "vm.changed" Info "vm/<uuid>", "A VM's configuration was changed.";
    VM_DELETED "vm.deleted" Info "vm/<uuid>", "A VM was deleted.";
    VM_STARTED "vm.started" Info "vm/<uuid>", "A VM was started.";
    VM_STOPPED "vm.stopped" Info "vm/<uuid>", "A VM is off: it was asked to, or its guest did it; `data.cause` tells.";
    VM_REBOOTED "vm.rebooted" Info "vm/<uuid>", "A VM was rebooted, by a job or by its guest.";
    VM_CRASHED "vm.crashed" Error "vm/<uuid>", "A guest crashed and is off.", cleared by RUNS;
    VM_RESTARTED_AFTER_CRASH "vm.restarted_after_crash" Warning "vm/<uuid>",
        "A guest crashed and was started again. Nothing but a hand acknowledges it: it may well crash again.";
    VM_LEFT_OFF "vm.left_off" Critical "vm/<uuid>",
        "A guest crashed too often in a row, or its domain is kept to be looked at: it is not started again.",
        cleared by RUNS;
    VM_GONE "vm.gone" Error "vm/<uuid>",
        "A VM's domain is gone and nobody knows why. Warning, if the host went down and the VM is started again.",
        cleared by RUNS;
    VM_FOUND_RUNNING "vm.found_running" Warning "vm/<uuid>",
        "A VM runs although it was not started by the agent; its record says so now.", cleared by CHANGED_BY_US;
    VM_STANDS_STILL "vm.stands_still" Error "vm/<uuid>",
        "A VM's domain has been suspended for long, and no job of ours does that.", cleared by MOVES;
    VM_GOES_ON "vm.goes_on" Info "vm/<uuid>", "A VM whose standing still was told stands still no more.";
    VM_SAVED "vm.saved" Info "vm/<uuid>",
        "A VM's memory was saved and it is off. Warning, if that was found after a save that nobody saw end.",
        cleared by &[kind::VM_RESTORED, kind::VM_STARTED, kind::VM_DELETED];
    VM_RESTORED "vm.restored" Info "vm/<uuid>", "A VM goes on from its saved memory.";
    VM_CHECKPOINTED "vm.checkpointed" Info "vm/<uuid>", "A checkpoint of a VM's memory was written.";
    VM_AUTOSTART "vm.autostart" Info "host",
        "VMs were started after the host's boot. Error, if some could not be.", cleared by &[kind::VM_AUTOSTART];
    VM_ADOPTION "vm.adoption" Info "host",
        "What the agent found running at its start. Warning, if there were unknown domains, or VMs are gone.",
        cleared by &[kind::VM_ADOPTION];

    VM_LEFT "vm.left" Info "vm/<uuid>", "Told by the source of a migration: the VM is another host's from now on.";
    VM_MIGRATED "vm.migrated" Info "vm/<uuid>",
        "Told by the source of a migration: it is done. Error, if the VM is off at the target.",
        cleared by &[kind::VM_ARRIVING, kind::VM_CREATED];
    VM_MIGRATION_FAILED "vm.migration_failed" Warning "vm/<uuid>",
        "A migration did not come about; the VM stays here.", cleared by &[kind::VM_LEFT, kind::VM_DELETED];
    VM_MIGRATION_UNDECIDED "vm.migration_undecided" Error "vm/<uuid>",
        "It is not known whether the VM is here or at the target; the agent goes on asking.", cleared by DECIDED;
    VM_MIGRATION_WAITS "vm.migration_waits" Critical "vm/<uuid>",
        "A VM stands still, because the other host of its migration does not answer.", cleared by DECIDED;
    VM_ARRIVING "vm.arriving" Info "vm/<uuid>", "Told by the target: a VM has arrived, paused; its source decides.";
    VM_ARRIVED "vm.arrived" Info "vm/<uuid>",
        "Told by the target: the VM is this host's. Critical, if it is off because its memory was lost.",
        cleared by RUNS;
    VM_ARRIVAL_DROPPED "vm.arrival_dropped" Warning "vm/<uuid>",
        "Told by the target: the VM goes on at its source; the copy here was destroyed.",
        cleared by &[kind::VM_ARRIVING, kind::VM_ARRIVED, kind::VM_DELETED];

    NETWORK_CHANGED "network.changed" Info "network", "The network was changed by a job, and that is confirmed.";
    NETWORK_RESTORED "network.restored" Info "network",
        "The network was brought to what is declared, after a boot or a rollback that was blocked.";
    NETWORK_LEFT_ALONE "network.left_alone" Warning "network",
        "Declared links are another service's of the host now, and are left to it.";
    NETWORK_OPERATION_FAILED "network.operation_failed" Error "network",
        "A change of the network failed. The discovery that follows acknowledges it.";
    NETWORK_ROLLBACK_BLOCKED "network.rollback_blocked" Critical "network",
        "A rollback of the network is refused by the kernel; it is tried again and again. The one that comes through \
         acknowledges it.";
    NETWORK_DRIFT "network.drift" Warning "network",
        "The network is not as declared; `data.plan` would mend it. Acknowledged by the agent when it is over, or another.";
    NETWORK_LINK_ADDED "network.link_added" Info "network/<link>", "A link has appeared, from outside.", damped as "link";
    NETWORK_LINK_REMOVED "network.link_removed" Info "network/<link>", "A link has gone, from outside.", damped as "link";
    NETWORK_LINK_CHANGED "network.link_changed" Info "network/<link>", "A link was changed from outside.",
        damped as "link";
    NETWORK_LINKS_CHANGED "network.links_changed" Info "network", "So many changes from outside that they are told as one.",
        damped as "links";
    NETWORK_CARRIER_LOST "network.carrier_lost" Warning "network/<link>", "A link has lost its carrier.",
        cleared by CARRIER_IS_OVER;
    NETWORK_CARRIER_BACK "network.carrier_back" Info "network/<link>", "A link has a carrier again.";
    NETWORK_FLAPPING "network.flapping" Warning "network/<link>",
        "A link's carrier comes and goes; no more is told of it until it has been quiet.",
        cleared by CARRIER_IS_OVER;
    NETWORK_SETTLED "network.settled" Info "network/<link>",
        "A carrier that came and went has been quiet for a while. Warning, if it is not there.",
        cleared by CARRIER_IS_OVER;
    NETWORK_ADDRESS_ADDED "network.address_added" Info "network/<link>", "A link got an address from outside.",
        each "address", damped as "address";
    NETWORK_ADDRESS_REMOVED "network.address_removed" Warning "network/<link>", "A link lost an address, from outside.",
        each "address", cleared by &[kind::NETWORK_ADDRESS_ADDED, kind::NETWORK_LINK_REMOVED], damped as "address";
    NETWORK_ROUTES_CHANGED "network.routes_changed" Info "network", "Routes were changed from outside.",
        damped as "routes";

    MANAGER_UNREACHABLE "manager.unreachable" Warning "manager/events or manager/statistics",
        "The manager does not take what is delivered; it is tried on.", cleared by &[kind::MANAGER_REACHABLE, kind::MANAGER_LEFT];
    MANAGER_REFUSED "manager.refused" Error "manager/events or manager/statistics",
        "What answers at the manager's address has another certificate than the pinned one; nothing is delivered to it.",
        cleared by &[kind::MANAGER_REACHABLE, kind::MANAGER_LEFT];
    MANAGER_REACHABLE "manager.reachable" Info "manager/events or manager/statistics",
        "The manager takes again what is delivered.";
    MANAGER_LEFT "manager.left" Info "manager/events or manager/statistics",
        "Nothing is delivered any more to the manager that could not be reached: it is no longer the owner, or gave no URL.";
    MANAGER_CERTIFICATE_LEARNED "manager.certificate_learned" Info "manager/events or manager/statistics",
        "The manager gave no certificate with take_ownership: the one that it showed first is pinned from now on.";
    MANAGER_NOTIFICATION "manager.notification" Info "host", "Somebody asked the agent to tell the manager this.";
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_type_is_there_once_and_is_dotted_words_of_small_letters() {
        let names: BTreeSet<&str> = CATALOGUE.iter().map(|entry| entry.kind.0).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for name in names {
            let (family, what) = name.split_once('.').unwrap();
            let word = |text: &str| text.bytes().all(|c| c.is_ascii_lowercase() || c == b'_');
            assert!(!family.is_empty() && !what.is_empty() && word(family) && word(what), "{name}");
        }
    }

    /// The worst that an event of this type may be; the meaning says when it is not what the row says.
    fn worst(entry: &Entry) -> Severity {
        let words =
            [("Warning,", Severity::Warning), ("Error,", Severity::Error), ("Critical,", Severity::Critical)];
        let told = words.iter().filter(|(word, _)| entry.meaning.contains(word));
        told.map(|(_, severity)| *severity).chain([entry.severity]).max().unwrap()
    }

    #[test]
    fn what_clears_an_alert_has_the_same_object_and_is_no_worse() {
        for entry in CATALOGUE {
            for by in entry.cleared_by {
                assert_eq!(by.entry().object, entry.object, "{} by {}", entry.kind.0, by.0);
                assert!(by.entry().severity <= worst(entry), "{} by {}", entry.kind.0, by.0);
                assert!(clears(by.0).contains(&entry.kind));
            }
            // A type of which no event is ever an alert has nothing that could be cleared.
            assert!(worst(entry) >= Severity::Warning || entry.cleared_by.is_empty(), "{}", entry.kind.0);
        }
    }

    /// The damper tells only the last one of a family: alerts before it must be over by then, or be that one.
    #[test]
    fn of_a_damped_family_every_type_clears_the_alerts_of_the_others_and_is_of_the_same_part() {
        for entry in CATALOGUE.iter().filter(|entry| entry.damped_as.is_some()) {
            for other in CATALOGUE.iter().filter(|other| other.damped_as == entry.damped_as) {
                assert_eq!((other.object, other.part), (entry.object, entry.part), "{}", other.kind.0);
                let is_over = worst(entry) == Severity::Info
                    || other.kind == entry.kind
                    || entry.cleared_by.contains(&other.kind);
                assert!(is_over, "{} by {}", entry.kind.0, other.kind.0);
            }
        }
    }

    #[test]
    fn a_kind_has_its_row_and_a_type_that_is_not_there_has_none() {
        assert_eq!(kind::VM_CRASHED.entry().severity, Severity::Error);
        assert!(find("vm.of_an_older_agent").is_none());
        assert!(clears("vm.of_an_older_agent").is_empty());
    }

    #[test]
    fn objects_are_held_to_their_forms() {
        let fits = |kind: Kind, object: &str| kind.entry().fits(object);
        assert!(fits(kind::HOST_POWER, "host") && !fits(kind::HOST_POWER, "host/x"));
        assert!(fits(kind::VM_STARTED, "vm/11111111-2222-3333-4444-555555555555"));
        assert!(!fits(kind::VM_STARTED, "vm/x") && !fits(kind::VM_STARTED, "host"));
        assert!(fits(kind::JOB_FAILED, "job/17") && !fits(kind::JOB_FAILED, "job/"));
        assert!(fits(kind::NETWORK_SETTLED, "network/eth0") && !fits(kind::NETWORK_SETTLED, "network"));
        assert!(fits(kind::MANAGER_REFUSED, "manager/statistics") && !fits(kind::MANAGER_REFUSED, "manager"));
        assert!(fits(kind::EVENT_FLAPPING, "network/eth0") && !fits(kind::EVENT_FLAPPING, ""));
    }
}
