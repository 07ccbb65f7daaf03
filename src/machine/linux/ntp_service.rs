//! Which NTP service is installed, and how it is started and stopped.
//!
//! chrony wins over timesyncd where both are: it can serve, and whoever installs it beside timesyncd means it.

use super::command::Programs;
use super::file::below;
use crate::machine::{MachineError, Result};
use std::path::{Path, PathBuf};

/// What starts services here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    Systemd,
    OpenRc,
    Other,
}

impl Init {
    /// sd_booted(3) looks for the same folder.
    pub fn detect(root: &Path) -> Self {
        if below(root, "/run/systemd/system").is_dir() {
            Self::Systemd
        } else if Programs::new(root).find("rc-service").is_some() {
            Self::OpenRc
        } else {
            Self::Other
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// With its main file.
    Chrony {
        main: PathBuf,
    },
    Timesyncd,
}

/// The NTP service of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub kind: Kind,
    init: Init,
    unit: &'static str,
}

impl Service {
    pub fn detect(root: &Path) -> Result<Self> {
        let init = Init::detect(root);
        if Programs::new(root).find("chronyd").is_some() {
            let places = ["/etc/chrony/chrony.conf", "/etc/chrony.conf"];
            let main = places.iter().map(|path| below(root, path)).find(|path| path.is_file());
            let main = main.unwrap_or_else(|| below(root, places[0]));
            let unit = if has_unit(root, "chrony.service") { "chrony" } else { "chronyd" };
            return Ok(Self { kind: Kind::Chrony { main }, init, unit });
        }
        let places = ["/usr/lib/systemd/systemd-timesyncd", "/lib/systemd/systemd-timesyncd"];
        if places.iter().any(|path| below(root, path).is_file()) {
            return Ok(Self { kind: Kind::Timesyncd, init, unit: "systemd-timesyncd" });
        }
        Err(MachineError::Unavailable("no NTP service (install chrony, or systemd-timesyncd)".to_owned()))
    }

    pub async fn is_running(&self, programs: &Programs<'_>) -> Result<bool> {
        let (program, args) = match self.init {
            Init::Systemd => ("systemctl", ["is-active", self.unit]),
            Init::OpenRc => ("rc-service", [self.unit, "status"]),
            Init::Other => return Ok(false),
        };
        Ok(programs.ask(program, &args, 1024).await?.success)
    }

    pub async fn restart(&self, programs: &Programs<'_>) -> Result<()> {
        match self.init {
            Init::Systemd => programs.run("systemctl", &["restart", self.unit]).await.map(drop),
            Init::OpenRc => programs.run("rc-service", &[self.unit, "restart"]).await.map(drop),
            Init::Other => Err(no_init()),
        }
    }

    /// Now and at the next start of the machine.
    pub async fn enable(&self, programs: &Programs<'_>, enabled: bool) -> Result<()> {
        match (self.init, enabled) {
            (Init::Systemd, true) => {
                programs.run("systemctl", &["enable", "--now", self.unit]).await.map(drop)
            }
            (Init::Systemd, false) => {
                programs.run("systemctl", &["disable", "--now", self.unit]).await.map(drop)
            }
            (Init::OpenRc, true) => {
                programs.run("rc-update", &["add", self.unit, "default"]).await?;
                programs.run("rc-service", &["--ifstopped", self.unit, "start"]).await.map(drop)
            }
            (Init::OpenRc, false) => {
                // Fails where it was in no runlevel, which is what is wanted.
                programs.ask("rc-update", &["del", self.unit], 1024).await?;
                programs.run("rc-service", &["--ifstarted", self.unit, "stop"]).await.map(drop)
            }
            (Init::Other, _) => Err(no_init()),
        }
    }
}

fn has_unit(root: &Path, unit: &str) -> bool {
    let folders = ["/usr/lib/systemd/system", "/lib/systemd/system", "/etc/systemd/system"];
    folders.iter().any(|folder| below(root, folder).join(unit).exists())
}

fn no_init() -> MachineError {
    MachineError::Unavailable("starting services (neither systemd nor OpenRC runs here)".to_owned())
}
