//! Amounts of memory and disk, each with its unit in its type.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! size {
    ($(#[$doc:meta])* $name:ident, $unit:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{} ", $unit), self.0)
            }
        }
    };
}

size!(
    /// Mebibytes: the unit in which Xen's toolstack takes memory.
    MiB, "MiB"
);
size!(
    /// Kibibytes: the unit in which Xen's toolstack tells memory.
    KiB, "KiB"
);
size!(
    /// Bytes.
    Bytes, "bytes"
);

impl From<MiB> for KiB {
    fn from(mib: MiB) -> Self {
        Self(mib.0.saturating_mul(1024))
    }
}

impl From<KiB> for MiB {
    /// Rounds down.
    fn from(kib: KiB) -> Self {
        Self(kib.0 / 1024)
    }
}
