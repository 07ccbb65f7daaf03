//! Which bodies the drivers have: real or simulated, as the settings say.

use super::StartError;
use crate::config::{Settings, ToolstackChoice, WorldChoice};
use crate::kernel::linux::LinuxKernel;
use crate::kernel::sim::SimKernel;
use crate::machine::Machine;
use crate::machine::linux::LinuxMachine;
use crate::machine::sim::SimMachine;
use crate::operation::Worlds;
use crate::sim::{self, Handle};
use crate::xen::Toolstack;
use crate::xen::sim::SimToolstack;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The world's socket in the state folder.
const SOCKET: &str = "world.sock";
/// The simulated host answers at once or never.
const SIM_TIMEOUT: Duration = Duration::from_secs(10);

/// Ends the simulated world of a state folder, if it has one: nothing of this run is to be left.
pub(super) async fn end(state_dir: &Path) {
    let socket = state_dir.join(SOCKET);
    if socket.exists()
        && let Err(error) = Handle::remote(&socket).end_world().await
    {
        tracing::warn!(%error, "the simulated world did not end");
    }
}

/// Whether there are bodies for what the settings choose. Asked before anything is touched.
pub(super) fn check(settings: &Settings) -> Result<(), StartError> {
    match settings.world.toolstack {
        ToolstackChoice::Sim => Ok(()),
        choice @ (ToolstackChoice::Auto | ToolstackChoice::Xl) => Err(no_xen(choice)),
    }
}

pub(super) async fn open(settings: &Settings, state_dir: &Path) -> Result<Worlds, StartError> {
    check(settings)?;
    let choice = &settings.world;
    let world = simulated_world(state_dir).await?;
    let sim = || world.clone();
    let limit = Duration::from_secs(settings.vm.toolstack_timeout_s);
    let toolstack: Arc<dyn Toolstack> = Arc::new(SimToolstack::new(sim(), limit));
    Ok(Worlds {
        toolstack,
        machine: match choice.host {
            WorldChoice::Sim => Arc::new(SimMachine::new(sim(), SIM_TIMEOUT)),
            WorldChoice::Linux => Arc::new(LinuxMachine::new(PathBuf::from("/"))),
        },
        kernel: match choice.kernel {
            WorldChoice::Sim => Arc::new(SimKernel::new(sim(), SIM_TIMEOUT)),
            WorldChoice::Linux => Arc::new(LinuxKernel::new()),
        },
    })
}

/// Two that start and stop the same VMs would start some of them twice. A simulated toolstack on a real machine is none
/// of that machine's business.
pub(super) async fn refuse_xendomains(settings: &Settings, machine: &dyn Machine) -> Result<(), StartError> {
    let simulated =
        settings.world.toolstack == ToolstackChoice::Sim && settings.world.host == WorldChoice::Linux;
    if simulated {
        return Ok(());
    }
    let link = match machine.xendomains().await {
        Ok(Some(link)) => link,
        Ok(None) => return Ok(()),
        Err(error) => {
            tracing::warn!(%error, "it is not known whether the xendomains service is enabled");
            return Ok(());
        }
    };
    if settings.vm.beside_xendomains {
        tracing::warn!(link, "the xendomains service is enabled; it may start and stop VMs by itself");
        return Ok(());
    }
    Err(StartError::Refused(format!(
        "the xendomains service is enabled ({link}): it starts and saves VMs by itself, which is dom0d's work.          Disable it: `systemctl disable xendomains`, `update-rc.d xendomains disable` or `rc-update del xendomains`;          do not stop it while VMs run, since that shuts them down or saves them. dom0d starts those VMs for which          `dom0ctl vm autostart VM on` was said. Where xendomains cannot be disabled and does nothing, the setting          vm.beside_xendomains = true lets dom0d start. No VM was touched"
    )))
}

/// Real Xen is the next floor of the house; until then a real host is refused rather than half managed.
fn no_xen(choice: ToolstackChoice) -> StartError {
    let asked = if choice == ToolstackChoice::Xl { "--toolstack xl" } else { "--toolstack auto" };
    let xen = Path::new("/proc/xen/capabilities").exists();
    let here = if xen { "Xen runs here, but this build" } else { "no Xen runs here, and this build" };
    StartError::World(format!(
        "{asked}: {here} drives only the simulated toolstack. Allowed: --toolstack sim, or --dev to try everything \
         on a simulated host. Nothing was changed"
    ))
}

/// The world's process: found again if it lives, else started from our own binary.
async fn simulated_world(state_dir: &Path) -> Result<Handle, StartError> {
    let exe = std::env::current_exe()?;
    let socket = state_dir.join(SOCKET);
    sim::process::ensure(&socket, &exe, sim::Options::default())
        .await
        .map_err(|error| StartError::World(format!("the simulated world does not start: {error}")))
}
