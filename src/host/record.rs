//! The one record of the host, and beside it the boot it was last seen in.

use super::ownership::Ownership;
use crate::model::{Invalid, Timestamp, excerpt, text_type};
use crate::store::Table;
use serde::{Deserialize, Serialize};

/// The table of the record; its one row has the key [`HOST_KEY`].
pub const HOST: Table<HostRecord> = Table::new("host", 1);
pub const HOST_KEY: &str = "host";

/// The boot that our records are true for. A table of its own: it changes without anybody's asking, and a change of
/// the host's record that was planned before would find the record changed. One row, with the key [`HOST_KEY`].
pub const BOOT: Table<BootRecord> = Table::new("boot", 1);

/// Seconds between two statistics until a manager says otherwise.
pub const STATISTIC_INTERVAL_S: u32 = 20;

/// What we keep of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Fixed at the first start: a new mainboard does not make a new host.
    pub unique_id: HostId,
    pub roles: Roles,
    pub ownership: Ownership,
    pub statistic_interval_s: u32,
    /// Its number in a pool; 0 in none.
    pub node_number: u32,
}

/// A boot of the host whose consequences were written down: see `vm::adopt`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRecord {
    /// /proc/sys/kernel/random/boot_id
    pub boot_id: String,
    /// The machine that booted: state that was copied to another one tells nothing about what runs where.
    pub machine: HostId,
    /// When it was written down; delays of autostart count from here.
    pub taken: Timestamp,
}

impl HostRecord {
    /// The record of a host that starts for the first time. `system_uuid` is DMI's; all zeros (the machine has
    /// none) gives a random id.
    pub fn new(system_uuid: [u8; 16]) -> Self {
        let unique_id = if system_uuid == [0; 16] { *uuid::Uuid::new_v4().as_bytes() } else { system_uuid };
        Self {
            unique_id: HostId(unique_id),
            roles: Roles::default(),
            ownership: Ownership::Unowned,
            statistic_interval_s: STATISTIC_INTERVAL_S,
            node_number: 0,
        }
    }
}

/// A host's identity: 16 bytes, in the dialect's writing with a colon after each (`1d:d5:…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostId([u8; 16]);

impl HostId {
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The dialect's writing, or a UUID.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let wrong = || {
            Invalid::new(
                "host id",
                format!("{} is not one", excerpt(text)),
                "16 two-digit hex numbers with colons, or a UUID",
            )
        };
        let colons = text.len() == 47 && text.bytes().skip(2).step_by(3).all(|c| c == b':');
        let digits = if colons { text.replace(':', "") } else { text.to_owned() };
        let plain = digits.len() == 32 || digits.len() == 36;
        let uuid = uuid::Uuid::try_parse(&digits).ok().filter(|_| plain).ok_or_else(wrong)?;
        Ok(Self(uuid.into_bytes()))
    }

    pub fn as_str(&self) -> String {
        self.0.map(|byte| format!("{byte:02x}")).join(":")
    }
}
text_type!(HostId);

/// What a host is for: `xen` runs VMs, `utility` does the pool's chores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    pub xen: bool,
    pub utility: bool,
}

impl Default for Roles {
    fn default() -> Self {
        Self { xen: true, utility: true }
    }
}

impl Roles {
    fn parse(text: &str) -> Result<Self, Invalid> {
        parse_roles(text)
            .map_err(|error| Invalid::new("roles", error.to_string(), "xen, utility or xen,utility"))
    }

    pub fn as_str(&self) -> &'static str {
        match (self.xen, self.utility) {
            (true, true) => "xen,utility",
            (true, false) => "xen",
            (false, true) => "utility",
            (false, false) => "",
        }
    }
}
text_type!(Roles);

/// The dialect's own words for roles it does not know; its clients may look for them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Invalid roles: set([{}])", .0.iter().map(|role| format!("'{role}'")).collect::<Vec<_>>().join(", "))]
pub struct InvalidRoles(Vec<String>);

/// `xen`, `utility`, or both with a comma, in any order.
pub fn parse_roles(text: &str) -> Result<Roles, InvalidRoles> {
    let mut roles = Roles { xen: false, utility: false };
    let mut told: Vec<String> = Vec::new();
    let mut good = true;
    for role in text.split(',').map(str::trim) {
        match role {
            "xen" => roles.xen = true,
            "utility" => roles.utility = true,
            _ => good = false,
        }
        let shown: String = role.chars().take(40).flat_map(char::escape_default).collect();
        if told.len() < 8 && !told.contains(&shown) {
            told.push(shown);
        }
    }
    if good { Ok(roles) } else { Err(InvalidRoles(told)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_xen_and_utility_and_others_are_named_in_the_dialects_words() {
        assert_eq!(parse_roles("utility, xen").unwrap().as_str(), "xen,utility");
        assert_eq!(parse_roles("xen").unwrap(), Roles { xen: true, utility: false });
        assert_eq!(parse_roles("xen,foo").unwrap_err().to_string(), "Invalid roles: set(['xen', 'foo'])");
        for bad in ["", ",", "xen,", "Xen", "xen;utility"] {
            assert!(parse_roles(bad).is_err(), "{bad:?}");
        }
        let long = parse_roles(&"evil\n'x,".repeat(10_000)).unwrap_err().to_string();
        assert!(long.len() < 100 && !long.contains('\n'), "{long}");
    }

    #[test]
    fn a_host_id_reads_and_writes_the_dialects_colons() {
        let text = "1d:d5:e8:91:d9:d0:ed:bd:81:c2:a6:9a:b3:d1:b7:ea";
        let id = HostId::parse(text).unwrap();
        assert_eq!(id.as_str(), text);
        assert_eq!(HostId::parse("1dd5e891-d9d0-edbd-81c2-a69ab3d1b7ea").unwrap(), id);
        for bad in
            ["", "1d:d5", &text[1..], &text.replace(':', ";"), "{1dd5e891-d9d0-edbd-81c2-a69ab3d1b7ea}"]
        {
            assert!(HostId::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_record_survives_its_stored_form_and_a_machine_without_a_uuid_gets_one_of_its_own() {
        let record = HostRecord::new([7; 16]);
        let stored = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<HostRecord>(&stored).unwrap(), record);
        assert_eq!(record.unique_id, HostId([7; 16]));
        assert_ne!(HostRecord::new([0; 16]).unique_id, HostRecord::new([0; 16]).unique_id);
    }
}
