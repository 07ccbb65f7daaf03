//! Names of nodes: checked once, so that no path we send can lead elsewhere or carry a second argument.

use crate::model::{Invalid, excerpt};
use std::fmt;

/// XENSTORE_ABS_PATH_MAX (xs_wire.h).
const MAX_BYTES: usize = 3072;
const ALLOWED: &str =
    "an absolute path of at most 3072 letters, digits and -_@ in parts parted by single slashes";

/// The absolute path of a node. xenstored allows letters, digits and `-/_@`: neither `.` nor NUL.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePath(String);

impl StorePath {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let wrong = |problem: String| Err(Invalid::new("XenStore path", problem, ALLOWED));
        if text.len() > MAX_BYTES {
            return wrong(format!("has {} bytes", text.len()));
        }
        let whole = text == "/";
        let parts = text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(is_name));
        if whole || parts {
            Ok(Self(text.to_owned()))
        } else {
            wrong(format!("{} is not one", excerpt(text)))
        }
    }

    /// `/local/domain/<domid>/<below>`
    pub fn of_domain(domid: u32, below: &str) -> Result<Self, Invalid> {
        Self::parse(&format!("/local/domain/{domid}/{below}"))
    }

    pub fn join(&self, name: &str) -> Result<Self, Invalid> {
        let above = self.0.strip_suffix('/').unwrap_or(&self.0);
        Self::parse(&format!("{above}/{name}"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One part of a path.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_@".contains(&c))
}

/// What can be watched: a node with all below it, or the comings and goings of domains.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WatchPath {
    Node(StorePath),
    /// A domain came.
    IntroduceDomain,
    /// A domain ended by itself, or went.
    ReleaseDomain,
}

impl WatchPath {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Node(path) => path.as_str(),
            Self::IntroduceDomain => "@introduceDomain",
            Self::ReleaseDomain => "@releaseDomain",
        }
    }
}

impl From<StorePath> for WatchPath {
    fn from(path: StorePath) -> Self {
        Self::Node(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_path_leads_down_from_the_root_and_nowhere_else() {
        for good in ["/", "/local/domain/0", "/vm/98cd556e-8b89-4870-8957-8c0d9a96dbb4/name", "/a@b/_c"] {
            assert_eq!(StorePath::parse(good).unwrap().as_str(), good);
        }
        let long = format!("/{}", "a".repeat(MAX_BYTES));
        let bad = [
            "",
            "local",
            "//",
            "/a/",
            "/a//b",
            "/..",
            "/a/../b",
            "/a\0b",
            "/a b",
            "/ä",
            "@releaseDomain",
            &long,
        ];
        for bad in bad {
            assert!(StorePath::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_child_of_the_root_has_one_slash() {
        assert_eq!(StorePath::parse("/").unwrap().join("vm").unwrap().as_str(), "/vm");
        assert_eq!(StorePath::parse("/vm").unwrap().join("a/b").unwrap().as_str(), "/vm/a/b");
        assert!(StorePath::parse("/vm").unwrap().join("../x").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_a_bounded_path_without_nul(text in any::<String>()) {
            if let Ok(path) = StorePath::parse(&text) {
                prop_assert!(path.as_str().len() <= MAX_BYTES && !path.as_str().contains(['\0', '.', ' ']));
            }
        }
    }
}
