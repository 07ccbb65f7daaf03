//! The host family: what it is, its clock, NTP, logs, password, certificate.

use super::Api;
use super::arguments::{Arguments, Type, may, need};
use super::document::{CAPABILITIES, HardwareDocument, ServerDocument, discover_hardware, discover_server};
use super::fault::{ApiFault, Result};
use super::value::{int, is_secret, or_nil, structure, text, texts};
use super::verb::{Kind, Origin, Row, Verb, nil};
use crate::host::support::{PIECES, Piece, SupportFiles};
use crate::host::{HostRecord, parse_roles, password};
use crate::machine::MachineError;
use crate::model::{Bytes, MiB};
use crate::operation::fault;
use crate::operation::plan::{self, Plan};
use crate::operation::step::Step;
use crate::vm::KeptValue;
use crate::wire::{Answer, AuthError, Caller, Role, Value, hash_password_alone};
use crate::xen::{HypervisorInfo, ToolstackError};
use futures_util::future::{BoxFuture, FutureExt};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

#[rustfmt::skip]
const DIALECT: &[Row] = &[
    Row::new("discover_server", &[], "string", Role::Viewer, Kind::Read(server), "What the host is, as an XML document."),
    Row::new("discover_hardware", &[], "string", Role::Viewer, Kind::Read(hardware), "CPUs, memory, adapters and DMI, as an XML document."),
    Row::new("get_last_boot_time", &[], "struct", Role::Viewer, Kind::Read(get_last_boot_time), "last_boot_time and local_time, seconds since 1970."),
    Row::new("get_datetime", &[], "array", Role::Viewer, Kind::Read(get_datetime), "[year, month, day, hour, minute, second] in the host's time zone."),
    Row::new("set_datetime", &[need("year", Type::Int, "1970 to 9999"), need("month", Type::Int, ""), need("day", Type::Int, ""), need("hour", Type::Int, ""), need("min", Type::Int, ""), need("sec", Type::Int, "")], "nil", Role::Admin,
        Kind::Job(set_datetime, nil), "Sets the clock, in the host's time zone."),
    Row::new("get_timezone", &[], "array", Role::Viewer, Kind::Read(get_timezone), "[name, whether the hardware clock runs in UTC]"),
    Row::new("set_timezone", &[need("timezone", Type::Text, "a name of the zone database"), need("utc", Type::Bool, "whether the hardware clock runs in UTC")], "nil", Role::Admin,
        Kind::Job(set_timezone, nil), "Sets the time zone."),
    Row::new("get_ntp", &[], "array", Role::Viewer, Kind::Read(get_ntp), "[[servers], whether the local clock is a source, whether NTP runs]"),
    Row::new("set_ntp", &[need("servers", Type::Array, "names or addresses"), need("local_time_source", Type::Bool, ""), may("allow_query", Type::Bool, "")], "nil", Role::Admin,
        Kind::Job(set_ntp, nil), "Where the time comes from."),
    Row::new("enable_ntp", &[], "nil", Role::Admin, Kind::Job(enable_ntp, nil), "Starts the NTP service, now and at boot."),
    Row::new("disable_ntp", &[], "nil", Role::Admin, Kind::Job(disable_ntp, nil), "Stops the NTP service, now and at boot."),
    Row::new("get_log", &[need("loglist", Type::Array, "ovs-agent, messages, xend, dmesg")], "struct", Role::Admin,
        Kind::Read(get_log), "The ends of logs, by name."),
    Row::new("get_support_files", &[], "struct", Role::Admin, Kind::Read(get_support_files), "Logs and state for support, by file name, without secrets."),
    Row::new("get_system_disk_space", &[], "struct", Role::Viewer, Kind::Read(get_system_disk_space), "Size and free space of the file systems, bytes as strings, by mount point."),
    Row::new("update_agent_password", &[need("user", Type::Text, "oracle"), need("password", Type::Text, "up to 256 bytes"), may("old_password", Type::Text, "not looked at: the caller is known already")], "nil", Role::Admin,
        Kind::Job(update_agent_password, nil), "Changes the agent's password."),
    Row::new("update_server_roles", &[need("roles", Type::Text, "xen, utility or xen,utility")], "nil", Role::Admin,
        Kind::Job(update_server_roles, nil), "What the host is for."),
];

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("host_get", &[], "struct", Role::Viewer, Kind::Read(host_get), "The host, its owner, its worlds, and the agent's own figures."),
    Row::new("certificate_get", &[], "struct", Role::Viewer, Kind::Read(certificate_get), "The server certificate that is served, and its CA."),
    Row::new("certificate_renew", &[], "nil", Role::Admin, Kind::Job(certificate_renew, nil), "Makes a new server certificate; new connections get it."),
    Row::new("store_check", &[], "struct", Role::Viewer, Kind::Read(store_check), "Reads the whole store and compares every checksum."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    let dialect = DIALECT.iter().map(|row| row.of("host", Origin::Dialect));
    dialect.chain(OWN.iter().map(|row| row.of("host", Origin::Own)))
}

macro_rules! reader {
    ($name:ident, |$api:ident, $arguments:ident| $body:expr) => {
        fn $name<'a>(
            $api: &'a Api,
            $arguments: &'a Arguments,
            _: &'a Caller,
        ) -> BoxFuture<'a, Result<Answer>> {
            async move { $body }.boxed()
        }
    };
}

macro_rules! planner {
    ($name:ident, |$api:ident, $arguments:ident| $body:expr) => {
        fn $name<'a>($api: &'a Api, $arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
            async move { $body }.boxed()
        }
    };
}

impl From<MachineError> for ApiFault {
    fn from(error: MachineError) -> Self {
        fault::machine(error).into()
    }
}

impl From<ToolstackError> for ApiFault {
    fn from(error: ToolstackError) -> Self {
        fault::toolstack(error).into()
    }
}

/// The hypervisor with its free memory as it is now.
async fn hypervisor(api: &Api) -> Result<HypervisorInfo> {
    Ok(api.operations.toolstack.info().await?)
}

/// The address that managers reach us by: the one we listen on, else the first global one of the host.
async fn registered_ip(api: &Api) -> IpAddr {
    let listen = api.operations.settings.wire.listen.ip();
    if !listen.is_unspecified() && !listen.is_loopback() {
        return listen;
    }
    let links = api.operations.kernel.links().await.unwrap_or_default();
    let mut addresses =
        links.iter().filter(|l| l.up && !l.loopback).flat_map(|l| l.addresses.iter().map(|(a, _)| *a));
    addresses.find(IpAddr::is_ipv4).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

reader!(server, |api, _arguments| {
    let machine = &api.operations.machine;
    let ntp = match machine.ntp().await {
        Ok(ntp) => Some(ntp),
        Err(MachineError::Unavailable(_)) => None,
        Err(error) => return Err(error.into()),
    };
    let document = discover_server(&ServerDocument {
        facts: &machine.facts().await?,
        hypervisor: &hypervisor(api).await?,
        timezone: &machine.timezone().await?,
        ntp: ntp.as_ref(),
        host: &api.operations.host_record(),
        dialect: api.operations.settings.dialect,
        registered_ip: registered_ip(api).await,
        agent_version: env!("CARGO_PKG_VERSION"),
        plain_http: api.about.plain_http(),
        capabilities: &CAPABILITIES,
    });
    Ok(text(document).into())
});

reader!(hardware, |api, _arguments| {
    let facts = api.operations.machine.facts().await?;
    let hypervisor = hypervisor(api).await?;
    Ok(text(discover_hardware(&HardwareDocument { facts: &facts, hypervisor: &hypervisor })).into())
});

reader!(get_last_boot_time, |api, _arguments| {
    let seconds = |t: crate::model::Timestamp| Value::Int64(i64::try_from(t.seconds()).unwrap_or(i64::MAX));
    let facts = api.operations.machine.facts().await?;
    let now = api.operations.machine.now().await?;
    Ok(structure([("last_boot_time", seconds(facts.boot_time)), ("local_time", seconds(now))]).into())
});

reader!(get_datetime, |api, _arguments| {
    let now = api.operations.machine.now().await?;
    let zone = api.operations.machine.timezone().await?;
    let unknown = |e: jiff::Error| ApiFault::new("HOST_FAILED", format!("the time zone cannot be used: {e}"));
    let instant =
        jiff::Timestamp::from_millisecond(i64::try_from(now.0).unwrap_or(i64::MAX)).map_err(unknown)?;
    let local = instant.in_tz(&zone.name).map_err(unknown)?.datetime();
    let parts = [
        i64::from(local.year()),
        local.month().into(),
        local.day().into(),
        local.hour().into(),
        local.minute().into(),
        local.second().into(),
    ];
    Ok(Value::Array(parts.into_iter().map(int).collect()).into())
});

planner!(set_datetime, |_api, arguments| {
    let part = |name, range| arguments.within(name, range);
    let small = |n: i64| i8::try_from(n).unwrap_or(i8::MAX);
    let step = Step::SetClock {
        year: i16::try_from(part("year", 1970..=9999)?).unwrap_or(i16::MAX),
        month: small(part("month", 1..=12)?),
        day: small(part("day", 1..=31)?),
        hour: small(part("hour", 0..=23)?),
        minute: small(part("min", 0..=59)?),
        second: small(part("sec", 0..=59)?),
    };
    Ok(plan::host_change("set the clock", "clock", step))
});

reader!(get_timezone, |api, _arguments| {
    let zone = api.operations.machine.timezone().await?;
    Ok(Value::Array(vec![text(zone.name), Value::Bool(zone.rtc_utc)]).into())
});

planner!(set_timezone, |_api, arguments| {
    let step =
        Step::SetTimezone { name: arguments.text("timezone")?.to_owned(), rtc_utc: arguments.bool("utc")? };
    Ok(plan::host_change("set the time zone", "clock", step))
});

reader!(get_ntp, |api, _arguments| {
    let ntp = api.operations.machine.ntp().await?;
    Ok(Value::Array(vec![texts(ntp.servers), Value::Bool(ntp.local_time_source), Value::Bool(ntp.running)])
        .into())
});

planner!(set_ntp, |_api, arguments| {
    let step = Step::SetNtp {
        servers: arguments.texts("servers")?,
        local_time_source: arguments.bool("local_time_source")?,
        allow_query: arguments.opt_bool("allow_query").unwrap_or(false),
    };
    Ok(plan::host_change("set the NTP servers", "clock", step))
});

planner!(enable_ntp, |_api, _arguments| Ok(plan::host_change(
    "start NTP",
    "clock",
    Step::EnableNtp { enabled: true }
)));
planner!(disable_ntp, |_api, _arguments| Ok(plan::host_change(
    "stop NTP",
    "clock",
    Step::EnableNtp { enabled: false }
)));

/// How much of one log is answered.
const LOG_BYTES: Bytes = Bytes(256 * 1024);

reader!(get_log, |api, arguments| {
    let names = arguments.texts("loglist")?;
    if names.len() > 16 {
        return Err(arguments.wrong("loglist", "allowed: up to 16 names"));
    }
    let mut logs = std::collections::BTreeMap::new();
    for name in names {
        let log = api.operations.machine.log(&name, LOG_BYTES).await?;
        logs.insert(name, text(log));
    }
    Ok(Value::Struct(logs).into())
});

reader!(get_support_files, |api, _arguments| {
    let mut files = SupportFiles::default();
    let secrets = api.secrets();
    let secrets: Vec<&str> = secrets.iter().map(String::as_str).collect();
    for (name, piece) in PIECES {
        let piece = support_text(api, piece).await;
        let shown = piece.unwrap_or_else(|fault| format!("not available: {fault}"));
        files.add(name, &shown, &secrets);
    }
    let files = files.into_files().into_iter().map(|(name, file)| (name.to_owned(), text(file)));
    Ok(Value::Struct(files.collect()).into())
});

async fn support_text(api: &Api, piece: Piece) -> Result<String> {
    let json = |value: std::result::Result<String, serde_json::Error>| {
        value.map_err(|e| ApiFault::new("INTERNAL", e.to_string()))
    };
    match piece {
        Piece::Log(name) => Ok(api.operations.machine.log(name, LOG_BYTES).await?),
        Piece::Settings => Ok(format!("{:#?}", api.operations.settings)),
        Piece::HostRecord => json(serde_json::to_string_pretty(&*api.operations.host_record())),
        Piece::StoreCheck => Ok(format!("{:#?}", api.operations.store.check().await?)),
        Piece::Jobs => {
            let listing = crate::job::Listing { limit: 200, ..Default::default() };
            let jobs = api.engine().list(&listing).await?;
            json(serde_json::to_string_pretty(&jobs))
        }
        Piece::Events => {
            let events = &api.operations.events;
            let since = crate::model::EventNumber(events.last().0.saturating_sub(500));
            let page = events.list(&crate::event::Query { since, limit: 500, ..Default::default() }).await?;
            json(serde_json::to_string_pretty(&page.events))
        }
        Piece::Locks => Ok(format!("{:#?}", api.engine().locks())),
    }
}

impl Api {
    /// Everything secret that records hold in the clear, to be masked in what leaves for support.
    fn secrets(&self) -> Vec<String> {
        let vms = self.operations.vms.all();
        let passwords = vms.iter().filter_map(|vm| vm.record.config.vnc.as_ref()?.password.as_ref());
        let own = vms.iter().flat_map(|vm| &vm.record.kept).filter(|(key, _)| is_secret(key));
        let own = own.filter_map(|(_, value)| match value {
            KeptValue::Text(text) => Some(text.as_str().to_owned()),
            _ => None,
        });
        passwords.map(|p| p.expose().to_owned()).chain(own).collect()
    }
}

reader!(get_system_disk_space, |api, _arguments| {
    let filesystems = api.operations.machine.filesystems().await?;
    let spaces = filesystems.into_iter().map(|fs| {
        let used = fs.size.0.saturating_sub(fs.free.0);
        let space = structure([
            ("device", text(fs.device)),
            ("type", text(fs.kind)),
            ("size", text(fs.size.0)),
            ("free", text(fs.free.0)),
            ("used", text(used)),
        ]);
        (fs.mount_point, space)
    });
    Ok(Value::Struct(spaces.collect()).into())
});

planner!(update_agent_password, |_api, arguments| {
    let secret = password::check(arguments.text("user")?, arguments.text("password")?)
        .map_err(|e| arguments.wrong("password", e))?;
    // Hashed here, so that the job never knows the password.
    let hash = match arguments.dry {
        true => String::new(),
        false => hash_password_alone(secret).await.map_err(|e| {
            let name = if matches!(e, AuthError::Busy) { "QUEUE_FULL" } else { "INTERNAL" };
            ApiFault::new(name, e.to_string())
        })?,
    };
    Ok(plan::host_change("change the password", "password", Step::SetPassword { hash }))
});

planner!(update_server_roles, |api, arguments| {
    let roles = parse_roles(arguments.text("roles")?).map_err(|e| ApiFault::invalid(e.to_string()))?;
    let record = HostRecord { roles, ..HostRecord::clone(&api.operations.host_record()) };
    Ok(super::ownership::host_changed(api, record, format!("the host's roles are {roles}")))
});

planner!(certificate_renew, |_api, _arguments| Ok(plan::host_change(
    "renew the certificate",
    "certificate",
    Step::RenewCertificate { if_due: false }
)));

reader!(certificate_get, |api, _arguments| {
    let about = Arc::clone(&api.about);
    let read = tokio::task::spawn_blocking(move || about.certificate()).await;
    let failed = |e: String| ApiFault::new("CERTIFICATE_FAILED", e);
    let certificate = read.map_err(|e| failed(e.to_string()))?.map_err(failed)?;
    Ok(structure([
        ("subject", text(certificate.subject)),
        ("issuer", text(certificate.issuer)),
        ("serial", text(certificate.serial)),
        ("not_before", text(certificate.not_before)),
        ("not_after", text(certificate.not_after)),
        ("fingerprint", text(certificate.fingerprint)),
        ("ca_fingerprint", text(certificate.ca_fingerprint)),
        ("pem", text(certificate.pem)),
        ("ca_pem", text(certificate.ca_pem)),
    ])
    .into())
});

reader!(store_check, |api, _arguments| {
    let report = api.operations.store.check().await?;
    let json = serde_json::to_value(&report).map_err(|e| ApiFault::new("INTERNAL", e.to_string()))?;
    Ok(super::value::from_json(&json).into())
});

reader!(host_get, |api, _arguments| {
    let facts = api.operations.machine.facts().await?;
    let record = api.operations.host_record();
    let settings = &api.operations.settings;
    let hypervisor = hypervisor(api).await.ok();
    let owner = record.ownership.owner();
    let ownership = structure([
        ("state", text(if owner.is_some() { "owned" } else { "unowned" })),
        ("manager_uuid", text(owner.map_or("", |o| o.manager.as_str()))),
        ("since", text(owner.map_or_else(String::new, |o| o.since.to_string()))),
        (
            "certificate",
            text(owner.and_then(|o| o.certificate.as_ref()).map_or("", |c| c.fingerprint.as_str())),
        ),
        ("event_url", text(owner.and_then(|o| o.event_url.as_ref()).map_or("", |u| u.as_str()))),
        ("core_api_url", text(owner.and_then(|o| o.core_api_url.as_ref()).map_or("", |u| u.as_str()))),
        ("statistic_url", text(owner.and_then(|o| o.statistic_url.as_ref()).map_or("", |u| u.as_str()))),
    ]);
    let worlds = structure([
        ("toolstack", text(format!("{:?}", settings.world.toolstack).to_lowercase())),
        ("kernel", text(format!("{:?}", settings.world.kernel).to_lowercase())),
        ("host", text(format!("{:?}", settings.world.host).to_lowercase())),
    ]);
    let xen = hypervisor.map(|h| {
        structure([
            ("version", text(format_args!("{}.{}{}", h.version_major, h.version_minor, h.version_extra))),
            ("cpus", int(h.nr_cpus)),
            ("memory_mib", int(h.total_memory.0)),
            ("free_memory_mib", int(h.free_memory.0)),
        ])
    });
    let (calls, connections) = api.about.wire_counts();
    let store = mode_text(&api.operations.store.mode().borrow());
    let address = registered_ip(api).await;
    let agent = structure([
        ("version", text(env!("CARGO_PKG_VERSION"))),
        ("dialect", text(if settings.dialect == crate::config::Dialect::V32 { "3.2" } else { "3.3" })),
        ("plain_http", Value::Bool(api.about.plain_http())),
        ("store", text(store)),
        ("calls", int(calls)),
        ("connections", int(connections)),
        ("open_jobs", int(i64::try_from(api.engine().open_jobs()).unwrap_or(i64::MAX))),
        ("last_event", int(api.operations.events.last().0)),
    ]);
    Ok(structure([
        ("hostname", text(facts.hostname)),
        ("unique_id", text(record.unique_id)),
        ("boot_time", text(facts.boot_time)),
        ("boot_taken", Value::Bool(api.operations.boot_taken(&facts.boot_id))),
        ("boot_id", text(facts.boot_id)),
        ("kernel", text(facts.kernel_release)),
        ("os", text(format_args!("{} {}", facts.os_name, facts.os_major))),
        ("address", text(address)),
        ("memory_mib", int(MiB::from(facts.memory).0)),
        ("roles", text(record.roles)),
        ("ownership", ownership),
        ("worlds", worlds),
        ("hypervisor", or_nil(xen)),
        ("agent", agent),
        ("vms", int(i64::try_from(api.operations.vms.len()).unwrap_or(i64::MAX))),
    ])
    .into())
});

fn mode_text(mode: &crate::store::Mode) -> String {
    match mode {
        crate::store::Mode::Normal => "good".to_owned(),
        crate::store::Mode::LowSpace => "low disk space: only stopping and recovery are accepted".to_owned(),
        crate::store::Mode::ReadOnly { why } => format!("read-only: {why}"),
    }
}
