//! Permissions of a node: who owns it, and what others may.

use super::{Result, StoreError};
use crate::xen::DomId;

/// What a domain may do with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    None,
    Read,
    Write,
    Both,
}

impl Access {
    const LETTERS: [(u8, Self); 4] =
        [(b'n', Self::None), (b'r', Self::Read), (b'w', Self::Write), (b'b', Self::Both)];

    fn letter(self) -> char {
        let found = Self::LETTERS.iter().find(|(_, access)| *access == self);
        found.map_or('n', |(letter, _)| char::from(*letter))
    }
}

/// One entry of a node's list. The first one is special: its domain owns the node and may do all, and its access
/// is everybody's who has no entry of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permission {
    pub domain: DomId,
    pub access: Access,
}

pub(super) fn encode(permissions: &[Permission]) -> Vec<u8> {
    let one = |p: &Permission| format!("{}{}\0", p.access.letter(), p.domain.0).into_bytes();
    permissions.iter().flat_map(one).collect()
}

pub(super) fn decode(payload: &[u8]) -> Result<Vec<Permission>> {
    let entries = payload.split(|byte| *byte == 0).filter(|entry| !entry.is_empty());
    entries.map(|entry| one(entry).ok_or(StoreError::Garbled("a permission that is none"))).collect()
}

fn one(entry: &[u8]) -> Option<Permission> {
    let (letter, digits) = entry.split_first()?;
    let access = Access::LETTERS.iter().find(|(l, _)| l == letter)?.1;
    let domain = DomId(u32::try_from(super::number(digits)?).ok()?);
    Some(Permission { domain, access })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn permissions_are_letters_and_domids() {
        let list = [
            Permission { domain: DomId(0), access: Access::None },
            Permission { domain: DomId(7), access: Access::Read },
        ];
        assert_eq!(encode(&list), b"n0\0r7\0");
        assert_eq!(decode(b"n0\0r7\0").unwrap(), list);
        assert!(decode(b"x0\0").is_err() && decode(b"n\0").is_err() && decode(b"n-1\0").is_err());
    }

    proptest! {
        #[test]
        fn any_list_is_read_or_refused(payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(list) = decode(&payload) {
                prop_assert_eq!(decode(&encode(&list)).unwrap(), list);
            }
        }
    }
}
