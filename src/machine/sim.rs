//! The machine's simulated body: what changes is asked of the simulated world; what does not (processors, DMI,
//! a SCSI host) is made up here, the same each time. It can do nothing to the machine it runs on.

use super::{
    Cpu, CpuTime, DiskFigures, DiskTraffic, Dmi, Facts, Filesystem, HostFigures, Machine, MachineError, Ntp,
    Result, ScsiHost, TimeZone, VbdFigures,
};
use crate::model::{Bytes, KiB, SafePath, Timestamp, excerpt};
use crate::sim::{self, Answer, Handle, HostView, Request, WorldError};
use async_trait::async_trait;
use std::time::Duration;

const MAX_NTP_SERVERS: usize = 16;
/// The dialect's names for logs.
const LOGS: [&str; 4] = ["ovs-agent", "messages", "xend", "dmesg"];
/// The first parts of the time zone database's names. The machine's own database is not asked: it may lack one.
const ZONE_AREAS: [&str; 11] = [
    "Africa",
    "America",
    "Antarctica",
    "Arctic",
    "Asia",
    "Atlantic",
    "Australia",
    "Etc",
    "Europe",
    "Indian",
    "Pacific",
];

#[derive(Debug, Clone)]
pub struct SimMachine {
    handle: Handle,
    timeout: Duration,
}

impl SimMachine {
    /// Each call ends within `timeout`.
    pub fn new(handle: Handle, timeout: Duration) -> Self {
        Self { handle, timeout }
    }

    async fn ask(&self, request: Request) -> Result<Answer> {
        Ok(self.handle.call(request, self.timeout).await?)
    }

    async fn tell(&self, request: Request) -> Result<()> {
        self.ask(request).await.map(|_| ())
    }

    async fn host(&self) -> Result<HostView> {
        match self.ask(Request::Host).await? {
            Answer::Host(view) => Ok(*view),
            _ => Err(unexpected()),
        }
    }
}

fn unexpected() -> MachineError {
    MachineError::Failed("the simulated world gave an answer of another kind".to_owned())
}

impl From<WorldError> for MachineError {
    fn from(error: WorldError) -> Self {
        match error {
            WorldError::Timeout => Self::Timeout("the simulated world".to_owned()),
            other => Self::Failed(other.to_string()),
        }
    }
}

#[async_trait]
impl Machine for SimMachine {
    async fn facts(&self) -> Result<Facts> {
        Ok(facts(self.host().await?))
    }

    async fn now(&self) -> Result<Timestamp> {
        Ok(self.host().await?.now)
    }

    async fn set_clock(&self, time: Timestamp) -> Result<()> {
        self.tell(Request::SetClock { time }).await
    }

    async fn timezone(&self) -> Result<TimeZone> {
        let zone = self.host().await?.zone;
        Ok(TimeZone { name: zone.name, rtc_utc: zone.rtc_utc })
    }

    async fn set_timezone(&self, zone: &TimeZone) -> Result<()> {
        check_zone(&zone.name)?;
        let zone = sim::Zone { name: zone.name.clone(), rtc_utc: zone.rtc_utc };
        self.tell(Request::SetZone { zone }).await
    }

    async fn ntp(&self) -> Result<Ntp> {
        let ntp = self.host().await?.ntp;
        Ok(Ntp { servers: ntp.servers, local_time_source: ntp.local_time_source, running: ntp.running })
    }

    async fn set_ntp(&self, servers: &[String], local_time_source: bool, _allow_query: bool) -> Result<()> {
        if servers.len() > MAX_NTP_SERVERS {
            return Err(MachineError::Invalid(format!("more than {MAX_NTP_SERVERS} NTP servers")));
        }
        servers.iter().try_for_each(|server| check_server(server))?;
        self.tell(Request::SetNtp { servers: servers.to_vec(), local_time_source }).await
    }

    async fn enable_ntp(&self, enabled: bool) -> Result<()> {
        self.tell(Request::EnableNtp { enabled }).await
    }

    async fn log(&self, name: &str, max: Bytes) -> Result<String> {
        if !LOGS.contains(&name) {
            return Err(MachineError::Unavailable(format!("a log {}", excerpt(name))));
        }
        match self.ask(Request::HostLog { max_bytes: max.0 }).await? {
            Answer::Text(text) => Ok(text),
            _ => Err(unexpected()),
        }
    }

    async fn filesystems(&self) -> Result<Vec<Filesystem>> {
        // Asked only so that a world that is away is told as such.
        self.host().await?;
        let gib = |n: u64| Bytes(n * 1024 * 1024 * 1024);
        let ext4 = |mount_point: &str, device: &str, size, free| Filesystem {
            mount_point: mount_point.to_owned(),
            device: device.to_owned(),
            kind: "ext4".to_owned(),
            size,
            free,
        };
        Ok(vec![
            ext4("/", "/dev/sda2", gib(50), gib(42)),
            ext4("/boot", "/dev/sda1", gib(1), gib(1)),
            ext4("/OVS/Repositories", "/dev/sdb1", gib(2000), gib(1500)),
        ])
    }

    async fn xendomains(&self) -> Result<Option<String>> {
        Ok(self.host().await?.xendomains)
    }

    async fn disk_traffic(&self, domid: u32) -> Result<DiskTraffic> {
        match self.ask(Request::DiskTraffic { domid }).await? {
            Answer::DiskTraffic(told) => Ok(told.into()),
            _ => Err(unexpected()),
        }
    }

    async fn figures(&self) -> Result<HostFigures> {
        match self.ask(Request::HostFigures).await? {
            Answer::HostFigures(view) => Ok(figures(*view)),
            _ => Err(unexpected()),
        }
    }

    async fn has_disk(&self, path: &SafePath) -> Result<bool> {
        let asked = Request::HasDisk { path: path.clone() };
        match self.handle.call(asked, self.timeout).await {
            Ok(_) => Ok(true),
            Err(WorldError::BadState(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn reboot(&self) -> Result<()> {
        self.tell(Request::HostReboot).await
    }

    async fn power_off(&self) -> Result<()> {
        self.tell(Request::HostPowerOff).await
    }
}

fn check_zone(name: &str) -> Result<()> {
    let part = |p: &str| !p.is_empty() && p.bytes().all(|c| c.is_ascii_alphanumeric() || b"_+-".contains(&c));
    let known = match name.split_once('/') {
        Some((area, place)) => ZONE_AREAS.contains(&area) && place.split('/').all(part),
        None => ["UTC", "GMT"].contains(&name),
    };
    if known && name.len() <= 64 {
        return Ok(());
    }
    let allowed = "a name of the time zone database, such as Europe/Amsterdam";
    Err(MachineError::Invalid(format!("time zone {} is not known; allowed: {allowed}", excerpt(name))))
}

fn check_server(name: &str) -> Result<()> {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let is_name = name.len() <= 253 && name.split('.').all(label);
    if is_name || name.parse::<std::net::IpAddr>().is_ok() {
        return Ok(());
    }
    Err(MachineError::Invalid(format!(
        "NTP server {} is not one; allowed: a host name or an address",
        excerpt(name)
    )))
}

impl From<sim::DiskTraffic> for DiskTraffic {
    fn from(told: sim::DiskTraffic) -> Self {
        Self {
            read: Bytes(told.read_bytes),
            written: Bytes(told.written_bytes),
            reads: told.reads,
            writes: told.writes,
        }
    }
}

fn figures(told: sim::HostFigures) -> HostFigures {
    let seconds = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
    let bytes = |memory: KiB| Bytes(memory.0.saturating_mul(1024));
    let cpu = |(cpu, (busy, steal))| CpuTime { cpu, busy_s: seconds(busy), steal_s: seconds(steal) };
    let disks = told.disks.into_iter();
    let vbds = told.vbds.into_iter();
    HostFigures {
        cpus: (0..).zip(told.cpus).map(cpu).collect(),
        load: Some(told.load),
        memory_total: Some(bytes(told.memory_total)),
        memory_available: Some(bytes(told.memory_available)),
        disks: disks.map(|(name, traffic)| DiskFigures { name, traffic: traffic.into() }).collect(),
        // As on most machines under Xen.
        temperatures: Vec::new(),
        vbds: vbds
            .map(|vbd| VbdFigures { domid: vbd.domid, device: vbd.device, traffic: vbd.traffic.into() })
            .collect(),
        problems: Vec::new(),
    }
}

fn facts(host: HostView) -> Facts {
    Facts {
        hostname: host.hostname,
        boot_id: host.boot_id,
        boot_time: host.boot_time,
        architecture: "x86_64".to_owned(),
        kernel_release: "6.1.0-simulated-amd64".to_owned(),
        kernel_version: "#1 SMP PREEMPT_DYNAMIC (simulated)".to_owned(),
        os_name: "Simulated Linux".to_owned(),
        os_major: "12".to_owned(),
        os_minor: "0".to_owned(),
        memory: KiB::from(host.memory),
        cpus: (0..host.cpus).map(cpu).collect(),
        dmi: dmi(host.system_uuid),
        scsi_hosts: vec![scsi_host()],
        iscsi_initiator: Some("iqn.2026-01.org.example:simulated-host".to_owned()),
    }
}

fn cpu(id: u32) -> Cpu {
    Cpu {
        id,
        vendor: "GenuineIntel".to_owned(),
        family: "6".to_owned(),
        model: "85".to_owned(),
        model_name: "Simulated CPU @ 2.40GHz".to_owned(),
        stepping: "7".to_owned(),
        cache_size: "16384 KB".to_owned(),
        flags: "fpu de tsc msr pae mce cx8 apic mca cmov pat clflush mmx fxsr sse sse2 ht syscall nx lm \
                constant_tsc rep_good pni ssse3 cx16 sse4_1 sse4_2 popcnt aes hypervisor lahf_lm"
            .to_owned(),
        mhz: 2400.0,
        core_id: id,
        physical_id: 0,
    }
}

fn dmi(system_uuid: [u8; 16]) -> Dmi {
    Dmi {
        system_uuid,
        system_manufacturer: "dom0d".to_owned(),
        system_product: "Simulated Host".to_owned(),
        system_version: "1".to_owned(),
        system_serial: "SIM-0001".to_owned(),
        bios_vendor: "dom0d".to_owned(),
        bios_version: "1.0".to_owned(),
        bios_date: "01/01/2026".to_owned(),
        chassis_manufacturer: "dom0d".to_owned(),
        chassis_type: "23".to_owned(),
        board_manufacturer: "dom0d".to_owned(),
        board_product: "Simulated Board".to_owned(),
        ..Dmi::default()
    }
}

fn scsi_host() -> ScsiHost {
    let pairs =
        |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    ScsiHost {
        number: 0,
        attributes: pairs(&[
            ("active_mode", "Initiator"),
            ("can_queue", "32"),
            ("cmd_per_lun", "1"),
            ("host_busy", "0"),
            ("proc_name", "ahci"),
            ("sg_tablesize", "168"),
            ("state", "running"),
            ("supported_mode", "Initiator"),
            ("unique_id", "1"),
        ]),
        device: pairs(&[("class", "0x010601"), ("device", "0x2922"), ("vendor", "0x8086")]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Options;

    fn machine() -> SimMachine {
        SimMachine::new(Handle::in_process(Options::default()), Duration::from_secs(1))
    }

    #[tokio::test(start_paused = true)]
    async fn setting_the_clock_moves_the_simulated_one_alone_and_it_goes_on_from_there() {
        let machine = machine();
        let before = Timestamp::now();
        machine.set_clock(Timestamp(1_000_000)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(machine.now().await.unwrap(), Timestamp(1_005_000));
        assert!(Timestamp::now() >= before);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reboot_gives_a_new_boot_id_and_boot_time_after_it_was_answered() {
        let machine = machine();
        let before = machine.facts().await.unwrap();
        machine.reboot().await.unwrap();
        assert_eq!(machine.facts().await.unwrap().boot_id, before.boot_id, "answered before it happens");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let after = machine.facts().await.unwrap();
        assert_ne!(after.boot_id, before.boot_id);
        assert!(after.boot_time > before.boot_time);
        assert_eq!(after.dmi, before.dmi, "it is the same machine");
    }

    #[tokio::test(start_paused = true)]
    async fn zones_and_ntp_are_kept_and_what_is_none_is_refused() {
        let machine = machine();
        let zone = TimeZone { name: "Europe/Amsterdam".to_owned(), rtc_utc: false };
        machine.set_timezone(&zone).await.unwrap();
        assert_eq!(machine.timezone().await.unwrap(), zone);
        for bad in ["", "Mars/Olympus", "Europe/", "Europe/../etc", "/etc/passwd", "$(id)"] {
            let zone = TimeZone { name: bad.to_owned(), rtc_utc: true };
            let refused = machine.set_timezone(&zone).await;
            assert!(matches!(refused, Err(MachineError::Invalid(_))), "{bad:?}");
        }
        let servers = vec!["ntp.example.org".to_owned(), "192.0.2.1".to_owned(), "2001:db8::1".to_owned()];
        machine.set_ntp(&servers, true, false).await.unwrap();
        machine.enable_ntp(true).await.unwrap();
        let expected = Ntp { servers, local_time_source: true, running: true };
        assert_eq!(machine.ntp().await.unwrap(), expected);
        for bad in ["", "a b", "-x", "a;b", "a\nserver b"] {
            let refused = machine.set_ntp(&[bad.to_owned()], false, false).await;
            assert!(matches!(refused, Err(MachineError::Invalid(_))), "{bad:?}");
        }
        assert_eq!(machine.ntp().await.unwrap(), expected, "a refused change changes nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_is_given_by_whole_lines_within_the_size_asked_for() {
        let machine = machine();
        machine.reboot().await.unwrap();
        let whole = machine.log("messages", Bytes(10_000)).await.unwrap();
        assert!(whole.lines().count() >= 2 && whole.ends_with("reboot asked for\n"));
        let tail = machine.log("dmesg", Bytes(60)).await.unwrap();
        assert!(tail.len() <= 60 && whole.ends_with(&tail) && tail.lines().count() == 1);
        let refused = machine.log("../../etc/shadow", Bytes(10)).await;
        assert!(matches!(refused, Err(MachineError::Unavailable(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_root_is_the_first_file_system() {
        assert_eq!(machine().filesystems().await.unwrap()[0].mount_point, "/");
    }
}
