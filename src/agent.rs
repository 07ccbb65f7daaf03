//! (placeholder: the lead replaces this file) The composition root.

use crate::config::{Overrides, Settings};
use crate::store::FaultPoint;
use std::path::PathBuf;

/// What the entrance hands over.
#[derive(Debug)]
pub struct Start {
    pub settings: Settings,
    pub dev: bool,
    /// The state folder was made for this run (`--dev` without `--state-dir`); `main` removes it afterwards, so
    /// nothing must outlive the run.
    pub ephemeral_state: bool,
    pub password_file: Option<PathBuf>,
    /// Where a daemon under test ends itself, as if killed.
    pub fault: Option<FaultPoint>,
    /// For a reload: the settings are `config::load(config_file, &overrides)`.
    pub config_file: Option<PathBuf>,
    pub overrides: Overrides,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}")]
    Failed(String),
}

/// Runs the daemon until it is told to stop.
pub async fn run(_start: Start) -> Result<(), StartError> {
    Err(StartError::Failed("the agent is not joined yet".to_owned()))
}
