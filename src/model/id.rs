//! Identities of things that outlive a process.

use super::{Invalid, excerpt, text_type};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A VM's identity: 128 bits, shown as a lower-case UUID with dashes. Managers also write it as 32 hex digits
/// without dashes (Oracle VM Manager); both forms name the same VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmId(uuid::Uuid);

impl VmId {
    const ALLOWED: &'static str = "a UUID: 32 hex digits, with or without dashes";

    pub fn parse(text: &str) -> Result<Self, Invalid> {
        // `try_parse` also takes braces and a URN prefix, which no client sends and paths must not hold.
        let plain = text.len() == 32 || text.len() == 36;
        match uuid::Uuid::try_parse(text) {
            Ok(uuid) if plain && !uuid.is_nil() => Ok(Self(uuid)),
            Ok(_) if plain => Err(Invalid::new("VM id", "is all zeros", "any UUID but the nil one")),
            _ => Err(Invalid::new("VM id", format!("{} is not one", excerpt(text)), Self::ALLOWED)),
        }
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(uuid::Uuid::from_bytes(bytes))
    }

    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    pub fn as_str(&self) -> String {
        self.0.hyphenated().to_string()
    }
}
text_type!(VmId);

/// A repository's identity, kept as the caller wrote it, since it is a part of paths; 32 hex digits with or
/// without dashes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepoId(String);

impl RepoId {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let plain = text.len() == 32 || text.len() == 36;
        if plain && uuid::Uuid::try_parse(text).is_ok() {
            return Ok(Self(text.to_owned()));
        }
        Err(Invalid::new(
            "repository id",
            format!("{} is not one", excerpt(text)),
            "a UUID: 32 hex digits, with or without dashes",
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}
text_type!(RepoId);

/// One attempt to take a VM to another host; made by the source, known to both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MigrationId(uuid::Uuid);

impl MigrationId {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        match uuid::Uuid::try_parse(text) {
            Ok(uuid) if text.len() == 36 => Ok(Self(uuid)),
            _ => Err(Invalid::new(
                "migration id",
                format!("{} is not one", excerpt(text)),
                "a UUID with dashes",
            )),
        }
    }

    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    pub fn as_str(&self) -> String {
        self.0.hyphenated().to_string()
    }
}
text_type!(MigrationId);

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id!(
    /// A job's number: rises by one with each accepted job and is never used again.
    JobId
);
number_id!(
    /// An event's number: rises by one with each event, without a hole.
    EventNumber
);
