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
use crate::xen::xl::{self, Xl};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The world's socket in the state folder.
const SOCKET: &str = "world.sock";
/// The folder of the xl body in the state folder. Sockets lie in it: a short name.
const XL: &str = "xl";
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
        ToolstackChoice::Sim | ToolstackChoice::Xl => Ok(()),
        ToolstackChoice::Auto if is_dom0() => Ok(()),
        ToolstackChoice::Auto => Err(no_xen()),
    }
}

pub(super) async fn open(settings: &Settings, state_dir: &Path) -> Result<Worlds, StartError> {
    check(settings)?;
    let choice = &settings.world;
    let simulated = choice.toolstack == ToolstackChoice::Sim
        || choice.host == WorldChoice::Sim
        || choice.kernel == WorldChoice::Sim;
    let world = if simulated { Some(simulated_world(state_dir).await?) } else { None };
    let sim = || world.clone().ok_or_else(|| StartError::World("there is no simulated world".to_owned()));
    let limit = Duration::from_secs(settings.vm.toolstack_timeout_s);
    let toolstack: Arc<dyn Toolstack> = match choice.toolstack {
        ToolstackChoice::Sim => Arc::new(SimToolstack::new(sim()?, limit)),
        ToolstackChoice::Auto | ToolstackChoice::Xl => Arc::new(real_xen(state_dir, limit).await?),
    };
    Ok(Worlds {
        toolstack,
        machine: match choice.host {
            WorldChoice::Sim => Arc::new(SimMachine::new(sim()?, SIM_TIMEOUT)),
            WorldChoice::Linux => Arc::new(LinuxMachine::new(PathBuf::from("/"))),
        },
        kernel: match choice.kernel {
            WorldChoice::Sim => Arc::new(SimKernel::new(sim()?, SIM_TIMEOUT)),
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
        "the xendomains service is enabled ({link}): it starts and saves VMs by itself, which is dom0d's work. \
         Disable it: `systemctl disable xendomains`, `update-rc.d xendomains disable` or `rc-update del xendomains`; \
         do not stop it while VMs run, since that shuts them down or saves them. dom0d starts those VMs for which \
         `dom0ctl vm autostart VM on` was said. Where xendomains cannot be disabled and does nothing, the setting \
         vm.beside_xendomains = true lets dom0d start. No VM was touched"
    )))
}

/// Whether this kernel is the one that controls Xen.
fn is_dom0() -> bool {
    std::fs::read_to_string("/proc/xen/capabilities").is_ok_and(|words| words.contains("control_d"))
}

fn no_xen() -> StartError {
    let guest = std::fs::read_to_string("/sys/hypervisor/type").is_ok_and(|kind| kind.trim() == "xen");
    let here = if guest { "Xen runs here, but this is not its dom0" } else { "no Xen runs here" };
    StartError::World(format!(
        "--toolstack auto: {here} (/proc/xen/capabilities does not say control_d; is xenfs mounted?). Allowed: \
         --toolstack xl to try all the same, --toolstack sim, or --dev to try everything on a simulated host. \
         Nothing was changed"
    ))
}

async fn real_xen(state_dir: &Path, limit: Duration) -> Result<Xl, StartError> {
    let options = xl::Options { xl: None, exe: std::env::current_exe()?, folder: state_dir.join(XL), limit };
    let failed = |error| StartError::World(format!("xl cannot be used: {error}"));
    Xl::open(options).await.map_err(failed)
}

/// The world's process: found again if it lives, else started from our own binary.
async fn simulated_world(state_dir: &Path) -> Result<Handle, StartError> {
    let exe = std::env::current_exe()?;
    let socket = state_dir.join(SOCKET);
    sim::process::ensure(&socket, &exe, sim::Options::default())
        .await
        .map_err(|error| StartError::World(format!("the simulated world does not start: {error}")))
}
