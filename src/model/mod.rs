//! Ids, names, addresses and sizes: types that cannot be wrong.
//!
//! A value of one of these types has been checked once, where it came in, and is not checked again. Each
//! `parse` says in its error what is allowed. Nothing here does I/O or knows a domain. Three things here are no types of
//! that kind, since rooms of every floor need them: the bounded queue in which hints melt together ([`Observers`]), the
//! trace that a task works for ([`trace`]), and the counting of how long things took ([`Histogram`]).

pub mod histogram;
mod id;
mod name;
pub mod network;
mod observers;
mod secret;
mod size;
mod time;
pub mod trace;

pub use histogram::Histogram;
pub use id::{EventNumber, JobId, MigrationId, RepoId, VmId};
pub use name::{BridgeName, IfName, Label, Mac, SafePath, Text, VmName};
pub use observers::{Hint, Observers};
pub use secret::Secret;
pub use size::{Bytes, KiB, MiB};
pub use time::Timestamp;
pub use trace::TraceParent;

/// A value that is not of its type: which type, what was wrong, and what is allowed. It never repeats more
/// than a short, escaped piece of the input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {problem}; allowed: {allowed}")]
pub struct Invalid {
    pub what: &'static str,
    pub problem: String,
    pub allowed: &'static str,
}

impl Invalid {
    pub fn new(what: &'static str, problem: impl Into<String>, allowed: &'static str) -> Self {
        Self { what, problem: problem.into(), allowed }
    }
}

/// At most 40 characters of `text`, quoted, with control characters escaped, for error messages.
pub fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(40).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}

/// The text in pieces of at most so many bytes (at least 4, the longest character), in order.
pub fn pieces(text: &str, bytes: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut end = rest.len().min(bytes.max(4));
        while !rest.is_char_boundary(end) {
            end -= 1;
        }
        let (piece, left) = rest.split_at(end);
        rest = left;
        Some(piece)
    })
}

/// Implements `Display`, `FromStr`, and serde by way of the text form, for a type with `parse` and `as_str`.
macro_rules! text_type {
    ($type:ty) => {
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str().as_ref())
            }
        }
        impl std::str::FromStr for $type {
            type Err = $crate::model::Invalid;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::parse(text)
            }
        }
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str().as_ref())
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use text_type;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_joined_are_the_text_and_none_is_longer_than_was_said() {
        for text in ["", "a", "abcdefgh", "ééééé", "a😀b😀c"] {
            for bytes in [0, 4, 5, 100] {
                let all: Vec<&str> = pieces(text, bytes).collect();
                assert_eq!(all.concat(), text);
                assert!(all.iter().all(|piece| !piece.is_empty() && piece.len() <= bytes.max(4)), "{all:?}");
            }
        }
    }
}
