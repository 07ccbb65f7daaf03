//! What needs no process: the hypervisor's own list of domains, pausing one, and its figures of memory and CPUs, by one
//! hypercall each through `/dev/xen/privcmd` (`XEN_SYSCTL_getdomaininfolist`, `XEN_DOMCTL_pausedomain`,
//! `XEN_DOMCTL_unpausedomain`, `XEN_SYSCTL_physinfo`, `XEN_SYSCTL_getcpuinfo`): all that
//! `xl list`, `xl pause` and `xl info` do, but in microseconds, where an xl takes as long as a program takes to start. CPU time is
//! told in nanoseconds.
//!
//! These calls are no stable interface of Xen: their structures change with releases, and Xen refuses a caller that names
//! another version. So only releases whose structures are known here are asked (`KNOWN`), the version is Xen's own to
//! accept, and when we open, what is told must agree with `xl list`; otherwise, and on any failure later, xl is asked
//! as before.

#![allow(unsafe_code, reason = "a hypercall takes memory by address")]

use super::read::{Line, shutdown_reason};
use crate::model::{KiB, VmId};
use crate::xen::{CpuIdle, DomId, RunState, Usage};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::raw::{c_int, c_ulong};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// Releases whose structures are as below, by the versions of their interfaces: Xen 4.17.
const KNOWN: [Release; 1] = [Release { sysctl: 0x15, domctl: 0x15 }];
/// `_IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall))`
const IOCTL_HYPERCALL: c_ulong = 0x0030_5000;
const HYPERVISOR_SYSCTL: u64 = 35;
const HYPERVISOR_DOMCTL: u64 = 36;
/// `XEN_SYSCTL_getdomaininfolist`
const GET_DOMAIN_INFO_LIST: u32 = 6;
/// `XEN_SYSCTL_physinfo`, `XEN_SYSCTL_getcpuinfo`
const PHYSICAL_INFO: u32 = 3;
const CPU_INFO: u32 = 8;
/// `struct xen_sysctl_cpuinfo`, Xen 4.17.
const IDLE_BYTES: usize = 8;
/// As many as fit into the buffer.
const MAX_CPUS: usize = (PAGES - 1) * PAGE_BYTES / IDLE_BYTES;
/// `XEN_DOMCTL_pausedomain`, `XEN_DOMCTL_unpausedomain`
const PAUSE: u32 = 3;
const UNPAUSE: u32 = 4;
const PAGE_BYTES: usize = 4096;
/// One page for the request, the others for what is told.
const PAGES: usize = 8;
/// `struct xen_domctl_getdomaininfo`, Xen 4.17.
const ENTRY_BYTES: usize = 112;
const ENTRIES: usize = (PAGES - 1) * PAGE_BYTES / ENTRY_BYTES;
/// Xen's domids end below this.
const MAX_DOMAINS: usize = 0x7ff0;

/// `XEN_SYSCTL_INTERFACE_VERSION` and `XEN_DOMCTL_INTERFACE_VERSION` of a release.
#[derive(Debug, Clone, Copy)]
struct Release {
    sysctl: u32,
    domctl: u32,
}

#[repr(C)]
struct Hypercall {
    op: u64,
    args: [u64; 5],
}

/// Memory that stays where it is while the hypervisor writes to it.
struct Pages(NonNull<u8>);

// SAFETY: the pages are plain memory that nobody else knows; access goes through a mutex.
unsafe impl Send for Pages {}

impl Pages {
    fn new() -> io::Result<Self> {
        let length = PAGES * PAGE_BYTES;
        // The kernel's device for it gives pages that are never moved; before Linux 4.18 locked ones must do.
        let device = OpenOptions::new().read(true).write(true).open("/dev/xen/hypercall");
        let (flags, fd) = match &device {
            Ok(device) => (libc::MAP_SHARED, device.as_raw_fd()),
            Err(_) => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE, -1),
        };
        // SAFETY: a new mapping at a place of the kernel's choice; the descriptor may be closed afterwards.
        let mapped = unsafe {
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A fork would make the pages copy-on-write, and so move them. Failing that, the open's check fails.
        // SAFETY: the range is the mapping made above.
        unsafe { libc::madvise(mapped, length, libc::MADV_DONTFORK) };
        NonNull::new(mapped.cast()).map(Self).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// The first page, empty but for the head that sysctl and domctl share.
    fn request(&mut self, command: u32, version: u32) -> &mut [u8] {
        let page = &mut self.bytes()[..PAGE_BYTES];
        page.fill(0);
        page[0..4].copy_from_slice(&command.to_ne_bytes());
        page[4..8].copy_from_slice(&version.to_ne_bytes());
        page
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is of this length, initialised by the kernel, and ours as long as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), PAGES * PAGE_BYTES) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, and nobody has a pointer into it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGES * PAGE_BYTES) };
    }
}

/// The machine's memory as `xl info` tells it, and how many of its CPUs are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Physical {
    pub total: KiB,
    pub free: KiB,
    pub cpus: u32,
}

/// The way to the hypervisor.
pub(super) struct Hypervisor {
    privcmd: File,
    release: Release,
    pages: Mutex<Pages>,
}

impl Hypervisor {
    /// Fails where there is no Xen, or one whose structures are not known.
    pub fn open() -> io::Result<Self> {
        let privcmd = OpenOptions::new().read(true).write(true).open("/dev/xen/privcmd")?;
        let mut hypervisor = Self { privcmd, release: KNOWN[0], pages: Mutex::new(Pages::new()?) };
        let mut refused = io::Error::from(io::ErrorKind::Unsupported);
        for release in KNOWN {
            hypervisor.release = release;
            match hypervisor.domain(DomId(0)) {
                Ok(_) => return Ok(hypervisor),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    /// All domains, without their names, by domid.
    pub fn domains(&self) -> io::Result<Vec<Line>> {
        let mut all = Vec::new();
        let mut first = 0;
        while all.len() < MAX_DOMAINS {
            let some = self.ask(first, ENTRIES)?;
            let Some(last) = some.last() else { break };
            first = last.domid.0 + 1;
            let whole = some.len() < ENTRIES;
            all.extend(some);
            if whole {
                break;
            }
        }
        Ok(all)
    }

    pub fn domain(&self, domid: DomId) -> io::Result<Option<Line>> {
        // What is told is the first one from this on.
        Ok(self.ask(domid.0, 1)?.into_iter().find(|line| line.domid == domid))
    }

    /// Xen counts pauses: whoever pauses twice must unpause twice.
    pub fn pause(&self, domid: DomId, paused: bool) -> io::Result<()> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let head = pages.request(if paused { PAUSE } else { UNPAUSE }, self.release.domctl);
        head[8..10].copy_from_slice(&number_of(domid.0)?.to_ne_bytes());
        self.call(HYPERVISOR_DOMCTL, &mut pages)
    }

    /// Memory, domains' memory, and the CPUs' idle time, which stays unknown where Xen does not tell it.
    pub fn usage(&self) -> io::Result<Usage> {
        let physical = self.physical()?;
        let domains = self.domains()?.into_iter().map(|line| (line.domid, line.memory)).collect();
        let idle = self.idle().and_then(|(clock_ns, cpus)| Ok((clock_ns, all_on(cpus, physical.cpus)?)));
        let (clock_ns, cpus) = idle.unwrap_or_else(|error| {
            tracing::debug!(%error, "the hypervisor does not tell how long its CPUs idle");
            (0, Vec::new())
        });
        Ok(Usage { total_memory: physical.total, free_memory: physical.free, clock_ns, cpus, domains })
    }

    pub fn physical(&self) -> io::Result<Physical> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.request(PHYSICAL_INFO, self.release.sysctl);
        self.call(HYPERVISOR_SYSCTL, &mut pages)?;
        physical(pages.bytes()).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The clock, and how long each CPU that is on has idled by then.
    fn idle(&self) -> io::Result<(u64, Vec<CpuIdle>)> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_RAW)?;
        let buffer = pages.0.as_ptr() as u64 + PAGE_BYTES as u64;
        let entries = u32::try_from(MAX_CPUS).map_err(|_| io::ErrorKind::InvalidInput)?;
        let head = pages.request(CPU_INFO, self.release.sysctl);
        // At most what `MAX_CPUS` keeps within the mapping.
        head[8..12].copy_from_slice(&entries.to_ne_bytes());
        head[16..24].copy_from_slice(&buffer.to_ne_bytes());
        self.call(HYPERVISOR_SYSCTL, &mut pages)?;
        let bytes = pages.bytes();
        let told = (number(bytes, 24) as usize).min(MAX_CPUS);
        Ok((nanoseconds(clock), idle(&bytes[PAGE_BYTES..PAGE_BYTES + told * IDLE_BYTES])))
    }

    fn ask(&self, first: u32, entries: usize) -> io::Result<Vec<Line>> {
        let first = number_of(first)?;
        let entries = u32::try_from(entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = pages.0.as_ptr() as u64 + PAGE_BYTES as u64;
        let head = pages.request(GET_DOMAIN_INFO_LIST, self.release.sysctl);
        head[8..10].copy_from_slice(&first.to_ne_bytes());
        // At most what `ENTRIES` keeps within the mapping.
        head[12..16].copy_from_slice(&entries.to_ne_bytes());
        head[16..24].copy_from_slice(&buffer.to_ne_bytes());
        self.call(HYPERVISOR_SYSCTL, &mut pages)?;
        let bytes = pages.bytes();
        let told = number(bytes, 24) as usize;
        let entries = bytes[PAGE_BYTES..].chunks_exact(ENTRY_BYTES).take(told.min(ENTRIES));
        entries.map(|entry| line(entry).ok_or_else(|| io::ErrorKind::InvalidData.into())).collect()
    }

    /// Makes the call whose request lies in the first page.
    fn call(&self, op: u64, pages: &mut Pages) -> io::Result<()> {
        let mut call = Hypercall { op, args: [pages.0.as_ptr() as u64, 0, 0, 0, 0] };
        // SAFETY: the ioctl reads `call`, which lives; the hypervisor reads the first page, and writes only to it and to
        // the buffer that its request names, which lies within the mapping; both stay ours until this returns.
        let done: c_int = unsafe {
            libc::ioctl(self.privcmd.as_raw_fd(), IOCTL_HYPERCALL as _, std::ptr::from_mut(&mut call))
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A domid as Xen takes it.
fn number_of(domid: u32) -> io::Result<u16> {
    u16::try_from(domid).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(four)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(number(bytes, at)) | (u64::from(number(bytes, at + 4)) << 32)
}

fn nanoseconds(clock: nix::sys::time::TimeSpec) -> u64 {
    u64::try_from(std::time::Duration::from(clock).as_nanos()).unwrap_or(u64::MAX)
}

/// `struct xen_sysctl_physinfo` behind the head of a sysctl. What is free is what no domain has claimed, as `xl info`
/// has it. `None`: it cannot be that.
fn physical(request: &[u8]) -> Option<Physical> {
    const AT: usize = 8;
    let kib = |pages: u64| KiB(pages.saturating_mul(4));
    let (total, free, claimed) = (long(request, AT + 40), long(request, AT + 48), long(request, AT + 64));
    let told = Physical {
        total: kib(total),
        free: kib(free.saturating_sub(claimed)),
        cpus: number(request, AT + 8),
    };
    (total > 0 && free <= total && told.cpus > 0).then_some(told)
}

/// Of the CPUs that are on: one `struct xen_sysctl_cpuinfo` each. One that is off or parked (`smt=0`, `xen-hptool
/// cpu-offline`) stays in its place, and Xen tells nothing of its idling; one that is on has idled before it did anything
/// else. (The topology does not tell them apart: a CPU without hyper-threads has no core's number, on or off.)
fn idle(entries: &[u8]) -> Vec<CpuIdle> {
    let all = (0..).zip(entries.chunks_exact(IDLE_BYTES));
    all.map(|(cpu, entry)| CpuIdle { cpu, idle_ns: long(entry, 0) }).filter(|cpu| cpu.idle_ns > 0).collect()
}

/// The CPUs, if they are as many as Xen says are on: else one went off or on meanwhile, or they are not what we think.
fn all_on(cpus: Vec<CpuIdle>, count: u32) -> io::Result<Vec<CpuIdle>> {
    if u32::try_from(cpus.len()) == Ok(count) {
        return Ok(cpus);
    }
    Err(io::Error::other(format!("{} CPUs have idled, and {count} are on", cpus.len())))
}

/// One `struct xen_domctl_getdomaininfo`. `None`: a shutdown for a reason that is not known.
fn line(entry: &[u8]) -> Option<Line> {
    let (flags, outstanding) = (number(entry, 4), long(entry, 24));
    let has = |bit: u32| flags & (1 << bit) != 0;
    let state = if has(0) {
        RunState::Dying
    } else if has(2) {
        RunState::Shutdown(shutdown_reason((flags >> 16) & 0xff)?)
    } else if has(3) {
        RunState::Paused
    } else if has(4) {
        RunState::Blocked
    } else {
        RunState::Running
    };
    let handle: [u8; 16] = entry[76..92].try_into().ok()?;
    let pages = long(entry, 8).saturating_add(outstanding);
    Some(Line {
        domid: DomId(number(entry, 0) & 0xffff),
        name: String::new(),
        vm: (handle != [0; 16]).then(|| VmId::from_bytes(handle)),
        state,
        memory: KiB(pages.saturating_mul(4)),
        online_vcpus: number(entry, 64),
        cpu_time_ns: long(entry, 56),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xen::ShutdownReason;

    #[test]
    fn an_entry_is_read_where_xen_writes_it() {
        let mut entry = [0_u8; ENTRY_BYTES];
        entry[0..2].copy_from_slice(&7_u16.to_ne_bytes());
        entry[4..8].copy_from_slice(&((1_u32 << 2) | (1 << 3) | (3 << 16)).to_ne_bytes());
        entry[8..16].copy_from_slice(&24_576_u64.to_ne_bytes());
        entry[56..64].copy_from_slice(&1_234_567_890_u64.to_ne_bytes());
        entry[64..68].copy_from_slice(&2_u32.to_ne_bytes());
        entry[76..92].copy_from_slice(&[9; 16]);
        let read = line(&entry).unwrap();
        assert_eq!((read.domid, read.vm), (DomId(7), Some(VmId::from_bytes([9; 16]))));
        assert_eq!(read.state, RunState::Shutdown(ShutdownReason::Crash));
        assert_eq!((read.memory, read.online_vcpus), (KiB(96 * 1024), 2));
        assert_eq!(read.cpu_time_ns, 1_234_567_890);
    }

    #[test]
    fn the_machines_memory_is_read_where_xen_writes_it() {
        let mut request = [0xff_u8; PAGE_BYTES];
        let numbers: [u32; 10] = [2, 8, 16, 15, 1, 0, 2_400_000, 0, 0, 0];
        for (n, value) in numbers.iter().enumerate() {
            request[8 + 4 * n..12 + 4 * n].copy_from_slice(&value.to_ne_bytes());
        }
        for (at, pages) in [(48, 1000_u64), (56, 300), (64, 5), (72, 100), (80, 4096)] {
            request[at..at + 8].copy_from_slice(&pages.to_ne_bytes());
        }
        let told = Physical { total: KiB(4000), free: KiB(800), cpus: 16 };
        assert_eq!(physical(&request), Some(told));
        request[56..64].copy_from_slice(&1001_u64.to_ne_bytes());
        assert_eq!(physical(&request), None, "more is free than there is");
    }

    #[test]
    fn a_cpu_that_is_off_or_parked_has_not_worked_all_the_while() {
        let times: Vec<u8> = [7_u64, 0, 9].map(u64::to_ne_bytes).concat();
        let told = idle(&times);
        assert_eq!(told, [CpuIdle { cpu: 0, idle_ns: 7 }, CpuIdle { cpu: 2, idle_ns: 9 }]);
        assert_eq!(all_on(told.clone(), 2).unwrap(), told);
        assert!(all_on(told, 3).is_err(), "one of three that are on is not told");
    }

    #[test]
    fn where_there_is_no_xen_there_is_no_hypervisor() {
        if !std::path::Path::new("/dev/xen/privcmd").exists() {
            assert!(Hypervisor::open().is_err());
        }
    }
}
