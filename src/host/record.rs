//! (being built)
use serde::{Deserialize, Serialize};
pub const HOST: crate::store::Table<HostRecord> = crate::store::Table::new("host", 1);
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct HostRecord {}
