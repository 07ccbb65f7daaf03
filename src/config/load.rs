//! (being built) Reads the file and lays the flags over it.
use super::Settings;
use std::path::Path;

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

#[derive(Debug, Clone, Default)]
pub struct Overrides {}

pub fn load(_file: Option<&Path>, _overrides: &Overrides) -> Result<Settings, ConfigError> {
    Ok(Settings::default())
}
