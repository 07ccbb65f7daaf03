//! What `xl list -v` and `xl info` write, read strictly: a line of another form is an error that shows a piece of
//! it, never a guess.
//!
//! `xl list -v` tells CPU seconds with one decimal, so CPU time from there has a resolution of 0.1 s.

use super::super::{DomId, HypervisorInfo, Result, RunState, ShutdownReason, ToolstackError};
use crate::model::{KiB, MiB, VmId, excerpt};

/// One line of `xl list -v`, or the hypervisor's own word on a domain.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    pub domid: DomId,
    /// As XenStore has it; a guest can not write it.
    pub name: String,
    pub vm: Option<VmId>,
    pub state: RunState,
    pub memory: KiB,
    pub online_vcpus: u32,
    pub cpu_time_ns: u64,
}

fn garbled(what: &str, line: &str) -> ToolstackError {
    ToolstackError::Failed(format!("{what} wrote what is not understood: {}", excerpt(line)))
}

/// All lines of `xl list -v`, dom0 first, then by domid.
pub(super) fn domains(output: &[u8]) -> Result<Vec<Line>> {
    let text = String::from_utf8_lossy(output);
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let head = lines.next().unwrap_or_default();
    if !head.starts_with("Name") || !head.contains("UUID") {
        return Err(garbled("xl list", head));
    }
    let mut all = lines.map(line).collect::<Result<Vec<_>>>()?;
    all.sort_by_key(|line| line.domid);
    Ok(all)
}

/// `Name  ID  Mem  VCPUs  State  Time(s)  UUID  Reason-Code  Security-Label`. The name comes first and may hold
/// anything, so a line is read from its end; no other column has a space inside.
fn line(text: &str) -> Result<Line> {
    let bad = || garbled("xl list", text);
    let mut rest = text.trim_end();
    let mut column = || {
        let at = rest.rfind(char::is_whitespace)?;
        let word = &rest[at + rest[at..].chars().next()?.len_utf8()..];
        rest = rest[..at].trim_end();
        Some(word)
    };
    let columns: Option<Vec<&str>> = (0..8).map(|_| column()).collect();
    let columns = columns.ok_or_else(bad)?;
    let [_label, reason, uuid, time, state, vcpus, memory, domid] = columns[..] else { return Err(bad()) };
    Ok(Line {
        domid: DomId(number(domid).ok_or_else(bad)?),
        name: rest.trim().to_owned(),
        vm: vm(uuid).ok_or_else(bad)?,
        state: run_state(state, reason).ok_or_else(bad)?,
        memory: KiB::from(MiB(number(memory).ok_or_else(bad)?.into())),
        online_vcpus: number(vcpus).ok_or_else(bad)?,
        cpu_time_ns: nanoseconds(time).ok_or_else(bad)?,
    })
}

fn number(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    if plain { text.parse().ok() } else { None }
}

/// `Some(None)`: all zeros, which is nobody.
fn vm(text: &str) -> Option<Option<VmId>> {
    if text.len() == 36 && text.bytes().all(|c| c == b'0' || c == b'-') {
        return Some(None);
    }
    (text.len() == 36).then(|| VmId::parse(text).ok()).flatten().map(Some)
}

/// `rbpsXd`: X is why it ended, if it has.
fn run_state(letters: &str, reason: &str) -> Option<RunState> {
    let known = ["r-", "b-", "p-", "s-", "rscwS?-", "d-"];
    let fits = letters.len() == known.len() && letters.chars().zip(known).all(|(c, of)| of.contains(c));
    if !fits {
        return None;
    }
    let has = |at: usize| letters.as_bytes()[at] != b'-';
    Some(if has(5) {
        RunState::Dying
    } else if has(3) {
        RunState::Shutdown(shutdown_reason(u32::from_str_radix(reason, 16).ok()?)?)
    } else if has(2) {
        RunState::Paused
    } else if has(1) {
        RunState::Blocked
    } else {
        // No letter at all: it wants a CPU and has none just now.
        RunState::Running
    })
}

/// By Xen's number. A soft reset is taken for a reboot: the guest wants to begin anew.
pub(super) fn shutdown_reason(code: u32) -> Option<ShutdownReason> {
    Some(match code {
        0 => ShutdownReason::Poweroff,
        1 | 5 => ShutdownReason::Reboot,
        2 => ShutdownReason::Suspend,
        3 => ShutdownReason::Crash,
        4 => ShutdownReason::Watchdog,
        _ => return None,
    })
}

fn nanoseconds(seconds: &str) -> Option<u64> {
    let (whole, tenths) = seconds.split_once('.')?;
    let (whole, tenths) = (u64::from(number(whole)?), u64::from(number(tenths).filter(|t| *t < 10)?));
    Some(whole.saturating_mul(1_000_000_000) + tenths * 100_000_000)
}

/// `key : value` lines of `xl info`.
pub(super) struct Info(Vec<(String, String)>);

impl Info {
    pub fn parse(output: &[u8]) -> Self {
        let text = String::from_utf8_lossy(output);
        let pairs = text.lines().take(256).filter_map(|line| line.split_once(':'));
        Self(pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect())
    }

    pub fn text(&self, key: &str) -> Result<&str> {
        let found = self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        found.ok_or_else(|| ToolstackError::Failed(format!("xl info does not tell {key}")))
    }

    fn number(&self, key: &str) -> Result<u32> {
        let text = self.text(key)?;
        number(text).ok_or_else(|| garbled("xl info", text))
    }

    pub fn hypervisor(&self) -> Result<HypervisorInfo> {
        let words = self.text("hw_caps")?;
        let hw_caps: Option<Vec<u32>> =
            words.split(':').map(|word| u32::from_str_radix(word, 16).ok()).collect();
        let (threads, cores, nodes) =
            (self.number("threads_per_core")?, self.number("cores_per_socket")?, self.number("nr_nodes")?);
        let nr_cpus = self.number("nr_cpus")?;
        let in_socket = threads.saturating_mul(cores).saturating_mul(nodes).max(1);
        Ok(HypervisorInfo {
            version_major: self.number("xen_major")?,
            version_minor: self.number("xen_minor")?,
            version_extra: self.text("xen_extra")?.to_owned(),
            compiler: self.text("cc_compiler")?.to_owned(),
            compiled_by: self.text("cc_compile_by")?.to_owned(),
            compile_domain: self.text("cc_compile_domain")?.to_owned(),
            compile_date: self.text("cc_compile_date")?.to_owned(),
            capabilities: self.text("xen_caps")?.to_owned(),
            total_memory: MiB(self.number("total_memory")?.into()),
            free_memory: MiB(self.number("free_memory")?.into()),
            nr_cpus,
            threads_per_core: threads,
            cores_per_socket: cores,
            sockets_per_node: (nr_cpus / in_socket).max(1),
            nr_nodes: nodes,
            cpu_khz: kilohertz(self.text("cpu_mhz")?)?,
            hw_caps: hw_caps.ok_or_else(|| garbled("xl info", words))?,
        })
    }
}

/// `3295.047`, or a whole number.
fn kilohertz(mhz: &str) -> Result<u64> {
    let bad = || garbled("xl info", mhz);
    let (whole, thousandths) = mhz.split_once('.').unwrap_or((mhz, "0"));
    if thousandths.len() > 3 {
        return Err(bad());
    }
    let scale = 10_u64.pow(3 - u32::try_from(thousandths.len()).map_err(|_| bad())?);
    let (whole, part) = (number(whole).ok_or_else(bad)?, number(thousandths).ok_or_else(bad)?);
    Ok(u64::from(whole) * 1000 + u64::from(part) * scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIST: &str = "\
Name                                        ID   Mem VCPUs\tState\tTime(s)   UUID                            Reason-Code\tSecurity Label
Domain-0                                     0  1024     2     r-----      60.5 00000000-0000-0000-0000-000000000000        -                -
a name with blanks                           7   256     0     --psr-       0.3 98cd556e-8b89-4870-8957-8c0d9a96dbb5        1                -
pv1                                          6    96     1     -b----       3.2 98cd556e-8b89-4870-8957-8c0d9a96dbb4        -                -
(null)                                       8     0     1     --ps-d       1.0 98cd556e-8b89-4870-8957-8c0d9a96dbb6        0                -
";

    #[test]
    fn a_listing_is_read_whole_and_ordered_by_domid() {
        let all = domains(LIST.as_bytes()).unwrap();
        assert_eq!(all.iter().map(|d| d.domid.0).collect::<Vec<_>>(), [0, 6, 7, 8]);
        assert_eq!((all[0].vm, all[0].name.as_str()), (None, "Domain-0"));
        let pv1 = &all[1];
        assert_eq!(pv1.vm, VmId::parse("98cd556e-8b89-4870-8957-8c0d9a96dbb4").ok());
        assert_eq!((pv1.state, pv1.memory, pv1.online_vcpus), (RunState::Blocked, KiB(96 * 1024), 1));
        assert_eq!(pv1.cpu_time_ns, 3_200_000_000);
        assert_eq!(all[2].name, "a name with blanks");
        assert_eq!(all[2].state, RunState::Shutdown(ShutdownReason::Reboot));
        assert_eq!(all[3].state, RunState::Dying);
    }

    #[test]
    fn a_line_of_another_form_is_an_error_and_no_guess() {
        let head = LIST.lines().next().unwrap();
        for bad in [
            "pv1 6 96 1 -b---- 3.2 98cd556e-8b89-4870-8957-8c0d9a96dbb4 -",
            "pv1 -6 96 1 -b---- 3.2 98cd556e-8b89-4870-8957-8c0d9a96dbb4 - -",
            "pv1 6 96 1 -x---- 3.2 98cd556e-8b89-4870-8957-8c0d9a96dbb4 - -",
            "pv1 6 96 1 -b---- 3.2 98cd556e - -",
            "pv1 6 96 1 ---s9- 3.2 98cd556e-8b89-4870-8957-8c0d9a96dbb4 ff -",
            "Segmentation fault",
        ] {
            assert!(domains(format!("{head}\n{bad}\n").as_bytes()).is_err(), "{bad}");
        }
        assert!(domains(b"").is_err());
        assert!(domains(b"libxl: error\n").is_err());
    }

    const INFO: &str = "\
host                   : nodea
nr_cpus                : 2
max_cpu_id             : 1
nr_nodes               : 1
cores_per_socket       : 2
threads_per_core       : 1
cpu_mhz                : 3295.047
hw_caps                : 1fcbf3fd:c2d8220b:ec500800:00000077:00000000:01884389:00000204:00000000
total_memory           : 3071
free_memory            : 2014
xen_major              : 4
xen_minor              : 17
xen_extra              : .7
xen_caps               : xen-3.0-x86_64 hvm-3.0-x86_32
xen_scheduler          : credit2
cc_compiler            : x86_64-linux-gnu-gcc (Debian 12.2.0-14) 12.2.0
cc_compile_by          : pkg-xen-devel
cc_compile_domain      : lists.example
cc_compile_date        : Wed Nov  4 16:52:28 UTC 2026
";

    #[test]
    fn the_hypervisor_is_read() {
        let info = Info::parse(INFO.as_bytes());
        let told = info.hypervisor().unwrap();
        assert_eq!((told.version_major, told.version_minor, told.version_extra.as_str()), (4, 17, ".7"));
        assert_eq!((told.total_memory, told.free_memory), (MiB(3071), MiB(2014)));
        assert_eq!((told.cpu_khz, told.sockets_per_node), (3_295_047, 1));
        assert_eq!(told.hw_caps.len(), 8);
        assert_eq!(told.compile_date, "Wed Nov  4 16:52:28 UTC 2026");
        assert_eq!(info.text("xen_scheduler"), Ok("credit2"));
    }

    #[test]
    fn what_xl_info_does_not_tell_is_named() {
        let without = INFO.replace("free_memory", "fee_memory");
        let error = Info::parse(without.as_bytes()).hypervisor().unwrap_err().to_string();
        assert!(error.contains("free_memory"), "{error}");
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = domains(&bytes);
            let _ = Info::parse(&bytes).hypervisor();
            let with_head = [LIST.lines().next().unwrap().as_bytes(), b"\n", &bytes].concat();
            let _ = domains(&with_head);
        }

        #[test]
        fn a_listing_with_any_byte_changed_is_read_or_refused(at in 0..LIST.len(), byte in any::<u8>()) {
            let mut bytes = LIST.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = domains(&bytes);
        }
    }
}
