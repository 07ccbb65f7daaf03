//! Between the trait's types and the world's. What the world does not count travels as the JSON of the
//! [`DomainConfig`], its devices taken out and put back when it returns.

use super::super::config::{Disk, DomainConfig, Vif};
use super::super::{
    DomId, DomainInfo, HypervisorInfo, Observation, Result, RunState, ShutdownReason, ToolstackError, Trigger,
};
use crate::sim;

pub(super) fn spec(config: &DomainConfig) -> Result<sim::Spec> {
    let display = config.vnc.as_ref().map(|vnc| match vnc.display {
        Some(number) => sim::Display::Number(number),
        None => sim::Display::FirstFree,
    });
    let rest = DomainConfig { disks: Vec::new(), vifs: Vec::new(), ..config.clone() };
    Ok(sim::Spec {
        vm: config.vm,
        name: config.name.clone(),
        memory: config.memory,
        max_memory: config.max_memory.max(config.memory),
        vcpus: config.vcpus,
        max_vcpus: config.max_vcpus.max(config.vcpus),
        weight: config.cpu_weight,
        cap: config.cpu_cap,
        display,
        disks: config.disks.iter().map(disk).collect::<Result<_>>()?,
        vifs: config.vifs.iter().map(vif).collect::<Result<_>>()?,
        rest: json(&rest)?,
    })
}

pub(super) fn config(spec: sim::Spec) -> Result<DomainConfig> {
    let rest: DomainConfig = from_json(spec.rest)?;
    let details = |devices: Vec<sim::Device>| devices.into_iter().map(|d| d.detail);
    Ok(DomainConfig {
        memory: spec.memory,
        vcpus: spec.vcpus,
        cpu_weight: spec.weight,
        cpu_cap: spec.cap,
        disks: details(spec.disks).map(from_json).collect::<Result<_>>()?,
        vifs: details(spec.vifs).map(from_json).collect::<Result<_>>()?,
        ..rest
    })
}

pub(super) fn disk(disk: &Disk) -> Result<sim::Device> {
    Ok(sim::Device { key: disk.device.as_str().to_owned(), detail: json(disk)? })
}

pub(super) fn vif(vif: &Vif) -> Result<sim::Device> {
    Ok(sim::Device { key: vif.mac.as_str(), detail: json(vif)? })
}

fn json<T: serde::Serialize>(value: &T) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|_| ToolstackError::Failed("cannot be written as JSON".to_owned()))
}

/// serde's words could repeat a VNC password, so they are not told.
fn from_json<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> Result<T> {
    serde_json::from_value(value)
        .map_err(|_| ToolstackError::Failed("the simulated world's domain is none of ours".to_owned()))
}

impl From<sim::DomainView> for DomainInfo {
    fn from(view: sim::DomainView) -> Self {
        Self {
            domid: DomId(view.domid),
            vm: view.vm,
            name: view.name,
            state: match view.state {
                sim::State::Running => RunState::Running,
                sim::State::Blocked => RunState::Blocked,
                sim::State::Paused => RunState::Paused,
                sim::State::Ended(reason) => RunState::Shutdown(match reason {
                    sim::Reason::Poweroff => ShutdownReason::Poweroff,
                    sim::Reason::Reboot => ShutdownReason::Reboot,
                    sim::Reason::Suspend => ShutdownReason::Suspend,
                    sim::Reason::Crash => ShutdownReason::Crash,
                    sim::Reason::Watchdog => ShutdownReason::Watchdog,
                }),
            },
            memory: view.memory,
            max_memory: view.max_memory,
            vcpus: view.vcpus,
            online_vcpus: view.online_vcpus,
            cpu_time_ns: view.cpu_time_ns,
            started: view.started,
            vnc_port: view.vnc_port,
        }
    }
}

impl From<sim::HypervisorView> for HypervisorInfo {
    /// A made-up Xen 4.17 on one socket; its name says what it is.
    fn from(view: sim::HypervisorView) -> Self {
        Self {
            version_major: 4,
            version_minor: 17,
            version_extra: ".0-simulated".to_owned(),
            compiler: "gcc (simulated) 12.2.0".to_owned(),
            compiled_by: "dom0d".to_owned(),
            compile_domain: "example.org".to_owned(),
            compile_date: "Thu Jan  1 00:00:00 UTC 2026".to_owned(),
            capabilities: "xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64".to_owned(),
            total_memory: view.total_memory,
            free_memory: view.free_memory,
            nr_cpus: view.cpus,
            threads_per_core: 1,
            cores_per_socket: view.cpus,
            sockets_per_node: 1,
            nr_nodes: 1,
            cpu_khz: 2_400_000,
            hw_caps: vec![
                0xbfeb_fbff,
                0x77fe_f3ff,
                0x2c10_0800,
                0x0000_0121,
                0x0000_000f,
                0xd19f_47ab,
                0x0000_0008,
                0x0000_0100,
            ],
        }
    }
}

impl From<Trigger> for sim::Trigger {
    fn from(trigger: Trigger) -> Self {
        match trigger {
            Trigger::Power => Self::Power,
            Trigger::Reset => Self::Reset,
            Trigger::Nmi | Trigger::Init | Trigger::Sleep | Trigger::S3resume => Self::Other,
        }
    }
}

impl From<sim::Observation> for Observation {
    fn from(observation: sim::Observation) -> Self {
        match observation {
            sim::Observation::At(domid) => Self::At(DomId(domid)),
            sim::Observation::Everything => Self::Everything,
        }
    }
}
