//! Which bodies the drivers have: real or simulated, as the settings say.

use super::StartError;
use crate::config::{Settings, ToolstackChoice, WorldChoice};
use crate::kernel::linux::LinuxKernel;
use crate::kernel::sim::SimKernel;
use crate::machine::linux::LinuxMachine;
use crate::machine::sim::SimMachine;
use crate::operation::Worlds;
use crate::sim::{self, Handle};
use crate::xen::Toolstack;
use crate::xen::sim::SimToolstack;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The simulated host answers at once or never.
const SIM_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Opened {
    pub(super) drivers: Worlds,
    world: Option<Handle>,
}

impl Opened {
    /// Ends the simulated world, if there is one: nothing of this run is to be left.
    pub(super) async fn end(&self) {
        if let Some(world) = &self.world
            && let Err(error) = world.end_world().await
        {
            tracing::warn!(%error, "the simulated world did not end");
        }
    }
}

pub(super) async fn open(settings: &Settings, state_dir: &Path) -> Result<Opened, StartError> {
    let choice = &settings.world;
    let toolstack = match choice.toolstack {
        ToolstackChoice::Sim => ToolstackChoice::Sim,
        ToolstackChoice::Auto | ToolstackChoice::Xl => return Err(no_xen(choice.toolstack)),
    };
    let simulated = toolstack == ToolstackChoice::Sim
        || choice.kernel == WorldChoice::Sim
        || choice.host == WorldChoice::Sim;
    let world = if simulated { Some(simulated_world(state_dir).await?) } else { None };
    let sim = || world.clone().ok_or_else(|| StartError::World("there is no simulated world".to_owned()));
    let limit = Duration::from_secs(settings.vm.toolstack_timeout_s);
    let toolstack: Arc<dyn Toolstack> = Arc::new(SimToolstack::new(sim()?, limit));
    let drivers = Worlds {
        toolstack,
        machine: match choice.host {
            WorldChoice::Sim => Arc::new(SimMachine::new(sim()?, SIM_TIMEOUT)),
            WorldChoice::Linux => Arc::new(LinuxMachine::new(PathBuf::from("/"))),
        },
        kernel: match choice.kernel {
            WorldChoice::Sim => Arc::new(SimKernel::new(sim()?, SIM_TIMEOUT)),
            WorldChoice::Linux => Arc::new(LinuxKernel::new()),
        },
    };
    Ok(Opened { drivers, world })
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
    let socket = state_dir.join("world.sock");
    sim::process::ensure(&socket, &exe, sim::Options::default())
        .await
        .map_err(|error| StartError::World(format!("the simulated world does not start: {error}")))
}
