//! The machine below folders of made-up files, and one look at the real one that only reads.

use super::*;
use crate::machine::{CpuTime, VbdFigures};
use std::os::unix::fs::PermissionsExt;

/// A folder that looks like a machine.
struct World {
    folder: tempfile::TempDir,
}

impl World {
    fn empty() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn with(files: &[(&str, &str)]) -> Self {
        let world = Self::empty();
        for (path, text) in files {
            world.put(path, text.as_bytes());
        }
        world
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// A program that writes its arguments into the file `called`, then does `body`. It is a link to a script
    /// that no test writes: one just written cannot be run while another thread, forking, holds it open.
    fn program(&self, path: &str, body: &str) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/program.sh");
        self.put(
            &format!("{path}.does"),
            format!("echo \"$0 $@\" >> {}/called\n{body}\n", self.root()).as_bytes(),
        );
        std::os::unix::fs::symlink(script, self.path(path)).unwrap();
    }

    fn called(&self) -> String {
        self.text("called").replace(&format!("{}/", self.root()), "")
    }

    fn root(&self) -> String {
        self.folder.path().display().to_string()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap_or_default()
    }

    fn machine(&self) -> LinuxMachine {
        LinuxMachine::new(self.folder.path().to_path_buf())
    }
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

#[tokio::test]
async fn facts_come_from_the_files_of_the_kernel_and_of_dmi() {
    let world = World::with(&[
        ("proc/sys/kernel/hostname", "node-7\n"),
        ("proc/sys/kernel/osrelease", "6.1.0-18-amd64\n"),
        ("proc/sys/kernel/arch", "x86_64\n"),
        ("proc/stat", "cpu 1 2\nintr 9 0 0\nbtime 1700000000\n"),
        ("proc/meminfo", "MemTotal:        2048000 kB\nMemFree: 1 kB\n"),
        (
            "proc/cpuinfo",
            "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu MHz\t\t: 2000.5\ncore id : 3\n\nprocessor : 1\n",
        ),
        ("etc/os-release", "NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12.5\"\n"),
        ("etc/iscsi/initiatorname.iscsi", "# one\nInitiatorName=iqn.1993-08.org.debian:01:ab\n"),
        ("sys/class/dmi/id/product_uuid", "1dd5e891-d9d0-edbd-81c2-a69ab3d1b7ea\n"),
        ("sys/class/dmi/id/sys_vendor", "Bochs\n"),
    ]);
    world.put("sys/firmware/dmi/tables/DMI", &[0, 24, 0, 0]);
    world.put("sys/firmware/dmi/tables/smbios_entry_point", b"_SM_\x00\x1f\x02\x04\x30\x00rest");
    let facts = world.machine().facts().await.unwrap();
    assert_eq!((facts.hostname.as_str(), facts.kernel_release.as_str()), ("node-7", "6.1.0-18-amd64"));
    assert_eq!(facts.boot_time, Timestamp(1_700_000_000_000));
    assert_eq!(facts.memory.0, 2_048_000);
    assert_eq!(
        (facts.os_name.as_str(), facts.os_major.as_str(), facts.os_minor.as_str()),
        ("Debian GNU/Linux", "12", "5")
    );
    assert_eq!(facts.cpus.len(), 2);
    assert_eq!((facts.cpus[0].mhz, facts.cpus[0].core_id), (2000.5, 3));
    assert_eq!(facts.dmi.system_uuid[..3], [0x1d, 0xd5, 0xe8]);
    assert_eq!(facts.dmi.system_manufacturer, "Bochs");
    assert_eq!((facts.dmi.tables.version.as_str(), facts.dmi.tables.max_structure_bytes), ("2.4.0", 48));
    assert_eq!(facts.iscsi_initiator.as_deref(), Some("iqn.1993-08.org.debian:01:ab"));
}

#[tokio::test]
async fn a_machine_that_tells_nothing_still_has_facts() {
    let facts = World::empty().machine().facts().await.unwrap();
    assert!(facts.cpus.is_empty() && facts.scsi_hosts.is_empty() && facts.hostname.is_empty());
    assert_eq!(facts.dmi.system_uuid, [0; 16]);
    assert_eq!(facts.os_name, "Linux");
}

#[tokio::test]
async fn without_a_uuid_in_dmi_the_machine_id_names_the_machine_and_is_not_shown() {
    let id = "0123456789abcdef0123456789abcdef";
    for dmi in
        ["", "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff", "Not Settable"]
    {
        let world = World::with(&[("etc/machine-id", id), ("sys/class/dmi/id/product_uuid", dmi)]);
        let first = world.machine().facts().await.unwrap().dmi.system_uuid;
        assert_eq!(first, world.machine().facts().await.unwrap().dmi.system_uuid);
        assert_ne!(first, [0; 16], "{dmi}");
        assert_ne!(uuid::Uuid::from_bytes(first).simple().to_string(), id);
    }
}

#[tokio::test]
async fn text_that_is_no_text_is_cleaned_and_what_is_too_long_is_cut() {
    let world = World::empty();
    world.put("proc/sys/kernel/hostname", b"no\x00de\x1b[31m\xff\n");
    world.put("sys/class/dmi/id/sys_vendor", &vec![b'x'; 200_000]);
    let facts = world.machine().facts().await.unwrap();
    assert_eq!(facts.hostname, "node[31m\u{fffd}");
    assert_eq!(facts.dmi.system_manufacturer.len(), file::MAX_BYTES);
}

#[test]
fn processors_are_read_in_the_words_of_arm_and_past_broken_lines() {
    let arm = "Processor : ARMv7 rev 1\nprocessor : 0\nBogoMIPS : 50\nFeatures : fp asimd\nCPU implementer : 0x41\n\
               CPU architecture: 8\nCPU part : 0xd08\n\nprocessor : x\nrubbish\nprocessor : 7\ncpu MHz : NaN\n";
    let cpus = facts::cpus(arm);
    assert_eq!(cpus.iter().map(|cpu| cpu.id).collect::<Vec<_>>(), [0, 7]);
    assert_eq!(
        (cpus[0].vendor.as_str(), cpus[0].model.as_str(), cpus[0].flags.as_str()),
        ("0x41", "0xd08", "fp asimd")
    );
    assert_eq!(cpus[1].mhz, 0.0);
}

proptest::proptest! {
    #[test]
    fn any_text_for_cpuinfo_is_taken_without_a_panic(text in "(processor|model|cpu MHz|core id)?[ \t:]{0,3}.{0,60}\n?") {
        facts::cpus(&text);
    }
}

#[tokio::test]
async fn scsi_hosts_come_in_order_of_their_numbers_with_the_pci_device_they_hang_on() {
    let world = World::with(&[
        ("sys/devices/pci0000:00/0000:00:05.0/vendor", "0x8086\n"),
        ("sys/devices/pci0000:00/0000:00:05.0/class", "0x010601\n"),
        ("sys/devices/pci0000:00/0000:00:05.0/rom", "never read\n"),
        ("sys/devices/pci0000:00/0000:00:05.0/msi_irqs/58", "msi\n"),
        ("sys/devices/pci0000:00/0000:00:05.0/host10/scsi_host/host10/state", "running\n"),
        ("sys/devices/pci0000:00/0000:00:05.0/host10/scsi_host/host10/scan", "write only"),
        ("sys/class/scsi_host/host2/proc_name", "iscsi_tcp\n"),
    ]);
    let host = world.path("sys/devices/pci0000:00/0000:00:05.0/host10/scsi_host/host10");
    std::fs::set_permissions(host.join("scan"), std::fs::Permissions::from_mode(0o200)).unwrap();
    std::os::unix::fs::symlink(host, world.path("sys/class/scsi_host/host10")).unwrap();
    let hosts = world.machine().facts().await.unwrap().scsi_hosts;
    assert_eq!(hosts.iter().map(|host| host.number).collect::<Vec<_>>(), [2, 10]);
    assert!(hosts[0].device.is_empty());
    assert_eq!(hosts[1].attributes, [("state".to_owned(), "running".to_owned())]);
    let told: Vec<_> = hosts[1].device.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(told, [("class", "0x010601"), ("msi_irqs", "58"), ("vendor", "0x8086")]);
}

#[tokio::test]
async fn a_time_zone_is_set_by_a_link_into_the_database_and_read_back() {
    let world = World::with(&[
        ("usr/share/zoneinfo/Europe/Amsterdam", "TZif2..."),
        ("etc/timezone", "Etc/UTC\n"),
        ("etc/adjtime", "0.5 1 0.0\n7\nUTC\n"),
    ]);
    world.program("usr/sbin/hwclock", "");
    let machine = world.machine();
    assert_eq!(machine.timezone().await.unwrap(), TimeZone { name: "Etc/UTC".into(), rtc_utc: true });
    let zone = TimeZone { name: "Europe/Amsterdam".into(), rtc_utc: false };
    machine.set_timezone(&zone).await.unwrap();
    assert_eq!(machine.timezone().await.unwrap(), zone);
    assert!(world.text("etc/localtime").starts_with("TZif2"), "the link leads into the database");
    assert_eq!(world.text("etc/timezone"), "Europe/Amsterdam\n");
    assert_eq!(world.text("etc/adjtime"), "0.5 1 0.0\n7\nLOCAL\n");
    assert_eq!(world.called(), "usr/sbin/hwclock --systohc --localtime\n");
}

#[tokio::test]
async fn a_time_zone_outside_the_database_is_refused_and_changes_nothing() {
    let world = World::with(&[
        ("usr/share/zoneinfo/Europe/Amsterdam", "TZif2"),
        ("usr/share/zoneinfo/zone.tab", "# a table"),
        ("etc/passwd", "TZif"),
    ]);
    for bad in [
        "",
        "/etc/passwd",
        "../../../etc/passwd",
        "Europe",
        "Europe/",
        "Europe//Amsterdam",
        "zone.tab",
        "No/Such",
        "a\nb",
        "-x",
    ] {
        let zone = TimeZone { name: bad.into(), rtc_utc: true };
        let told = world.machine().set_timezone(&zone).await;
        assert!(matches!(told, Err(MachineError::Invalid(_))), "{bad:?}: {told:?}");
    }
    assert!(world.path("etc/localtime").symlink_metadata().is_err());
    let bare = World::empty().machine().set_timezone(&TimeZone { name: "UTC".into(), rtc_utc: true }).await;
    assert!(matches!(bare, Err(MachineError::Unavailable(_))), "no database");
}

fn chrony(main: &str) -> World {
    let world = World::with(&[("etc/chrony/chrony.conf", main), ("run/systemd/system/x", "")]);
    world.program("usr/sbin/chronyd", "");
    world.put("lib/systemd/system/chrony.service", b"");
    world.program("bin/systemctl", "exit 0");
    world
}

#[tokio::test]
async fn with_chrony_the_servers_go_into_a_drop_in_file_and_others_sources_are_set_aside() {
    let world = chrony("confdir /etc/chrony/conf.d\nPool 2.debian.pool.ntp.org iburst\ndriftfile /x\n");
    let machine = world.machine();
    assert_eq!(machine.ntp().await.unwrap().servers, names(&["2.debian.pool.ntp.org"]));
    machine
        .set_ntp(&names(&["ntp1.example.org", "2001:db8::1", "ntp1.example.org"]), true, true)
        .await
        .unwrap();
    let told = machine.ntp().await.unwrap();
    assert_eq!(told.servers, names(&["ntp1.example.org", "2001:db8::1"]));
    assert!(told.local_time_source && told.running);
    assert!(world.text("etc/chrony/conf.d/dom0d.conf").contains("\nallow\n"));
    assert!(world.text("etc/chrony/chrony.conf").contains("#dom0d: Pool 2.debian"));
    assert!(world.called().contains("bin/systemctl restart chrony\n"));
}

#[tokio::test]
async fn with_a_chrony_without_drop_ins_a_marked_block_is_written_once() {
    let world = chrony("driftfile /x\nserver old.example.org\nsourcedir /run/chrony-dhcp\n");
    let machine = world.machine();
    machine.set_ntp(&names(&["a.example.org"]), false, false).await.unwrap();
    machine.set_ntp(&names(&["b.example.org"]), false, false).await.unwrap();
    let text = world.text("etc/chrony/chrony.conf");
    assert_eq!(text.matches("# dom0d: begin").count(), 1);
    assert!(text.contains("server b.example.org iburst") && !text.contains("a.example.org"), "{text}");
    assert!(text.starts_with("driftfile /x\n#dom0d: server old.example.org\n"), "{text}");
    assert_eq!(machine.ntp().await.unwrap().servers, names(&["b.example.org"]));
}

#[tokio::test]
async fn a_marked_block_that_lost_its_end_swallows_nothing() {
    let world = chrony("# dom0d: begin (written by dom0d; changes here are lost)\nmakestep 1 3\n");
    world.machine().set_ntp(&[], false, false).await.unwrap();
    assert!(world.text("etc/chrony/chrony.conf").starts_with("makestep 1 3\n"));
}

#[tokio::test]
async fn with_timesyncd_a_drop_in_file_replaces_all_servers() {
    let world = World::with(&[
        ("usr/lib/systemd/systemd-timesyncd", ""),
        ("etc/systemd/timesyncd.conf", "[Time]\n#NTP=x\nNTP=old.example.org\n"),
        ("run/systemd/system/x", ""),
    ]);
    world.program("bin/systemctl", "[ \"$1\" = is-active ] && exit 3; exit 0");
    let machine = world.machine();
    assert_eq!(machine.ntp().await.unwrap().servers, names(&["old.example.org"]));
    machine.set_ntp(&names(&["192.0.2.1", "n.example.org"]), true, false).await.unwrap();
    let told = machine.ntp().await.unwrap();
    assert_eq!(
        told,
        Ntp { servers: names(&["192.0.2.1", "n.example.org"]), local_time_source: true, running: false }
    );
    assert!(!world.called().contains("restart"), "a service that does not run is not started");
    machine.enable_ntp(false).await.unwrap();
    assert!(world.called().ends_with("bin/systemctl disable --now systemd-timesyncd\n"));
    let refused = machine.set_ntp(&[], false, true).await;
    assert!(matches!(refused, Err(MachineError::Unavailable(_))), "timesyncd answers nobody: {refused:?}");
}

#[tokio::test]
async fn openrc_starts_and_stops_where_there_is_no_systemd() {
    let world = World::with(&[("etc/chrony/chrony.conf", "pool pool.ntp.org\n")]);
    world.program("usr/sbin/chronyd", "");
    world.program("sbin/rc-service", "");
    world.program("sbin/rc-update", "");
    world.machine().enable_ntp(true).await.unwrap();
    assert_eq!(
        world.called(),
        "sbin/rc-update add chronyd default\nsbin/rc-service --ifstopped chronyd start\n"
    );
}

#[tokio::test]
async fn without_an_ntp_service_it_is_said_what_to_install() {
    let machine = World::empty().machine();
    let refused = machine.ntp().await.unwrap_err();
    assert!(matches!(&refused, MachineError::Unavailable(text) if text.contains("chrony")), "{refused}");
    assert!(machine.set_ntp(&[], true, false).await.is_err());
    assert!(machine.enable_ntp(true).await.is_err());
}

#[tokio::test]
async fn a_server_that_is_no_name_or_address_reaches_no_file() {
    let world = chrony("");
    let long = "x".repeat(64);
    for bad in
        ["", "a b", "a\nserver evil", "-x", "x-", "a..b", "999.1.1.1", "a;b", "fe80::1%eth0", "é.org", &long]
    {
        let told = world.machine().set_ntp(&names(&[bad]), false, false).await;
        assert!(matches!(told, Err(MachineError::Invalid(_))), "{bad:?}: {told:?}");
    }
    let many: Vec<String> = (0..17).map(|n| format!("s{n}.example.org")).collect();
    assert!(matches!(world.machine().set_ntp(&many, false, false).await, Err(MachineError::Invalid(_))));
    assert_eq!(world.text("etc/chrony/chrony.conf"), "");
}

#[tokio::test]
async fn a_program_that_hangs_or_floods_ends_within_its_bounds() {
    let world = World::empty();
    world.program(
        "bin/flood",
        "i=0; while [ $i -lt 3000 ]; do echo line-$i-xxxxxxxxxxxxxxxx; i=$((i+1)); done",
    );
    let machine = world.machine();
    let flooded = machine.programs().ask("flood", &[], 1000).await.unwrap();
    assert!(flooded.cut && flooded.output.len() == 1000);
    assert!(flooded.output.ends_with(b"line-2999-xxxxxxxxxxxxxxxx\n"));
    world.program("bin/refuse", "echo 'no such unit' >&2; exit 4");
    let refused = machine.programs().run("refuse", &["--all"]).await.unwrap_err();
    assert_eq!(refused, MachineError::Failed("refuse --all: no such unit".into()));
    assert!(matches!(machine.programs().run("missing", &[]).await, Err(MachineError::Unavailable(_))));
}

#[tokio::test]
async fn a_program_whose_caller_goes_away_dies_with_its_children() {
    let world = World::empty();
    // The grandchild holds the write end of a pipe; its end is seen when all writers are gone.
    let fifo = world.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    world.program("bin/hang", &format!("(echo up; exec sleep 600) > {} & wait", fifo.display()));
    let machine = world.machine();
    let hanging = tokio::spawn(async move { machine.programs().run("hang", &[]).await.map(drop) });
    let reader = tokio::task::spawn_blocking(move || {
        use std::io::{BufRead, Read};
        let mut pipe = std::io::BufReader::new(std::fs::File::open(fifo).unwrap());
        let mut line = String::new();
        pipe.read_line(&mut line).unwrap();
        hanging.abort();
        pipe.read_to_string(&mut line).unwrap();
        line
    });
    let read = tokio::time::timeout(std::time::Duration::from_secs(60), reader).await;
    assert_eq!(read.expect("the grandchild was left behind").unwrap(), "up\n");
}

#[tokio::test]
async fn a_program_starts_with_a_clean_environment() {
    let world = World::empty();
    world.program("bin/tell", "env | grep -v -e '^PWD=' -e '^_=' -e '^SHLVL=' | sort");
    let told = world.machine().programs().run("tell", &[]).await.unwrap();
    assert_eq!(String::from_utf8(told.output).unwrap(), "LC_ALL=C\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n");
}

#[tokio::test]
async fn logs_come_by_the_dialects_names_bounded_from_a_whole_line_on() {
    let world = World::with(&[
        ("var/log/syslog", "first line\nsecond line\nthird\x07 line\n"),
        ("var/log/xen/xl-a.log", "about a"),
        ("var/log/xen/xend.log", "of old"),
    ]);
    let machine = world.machine();
    assert_eq!(machine.log("messages", Bytes(20)).await.unwrap(), "third line\n");
    assert_eq!(machine.log("xend", Bytes(100)).await.unwrap(), "about a");
    assert!(matches!(machine.log("ovs-agent", Bytes(9)).await, Err(MachineError::Unavailable(_))));
    let refused = machine.log("../../etc/shadow", Bytes(9)).await.unwrap_err();
    assert!(refused.to_string().contains("ovs-agent, messages, xend, dmesg"), "{refused}");
    world.program("bin/journalctl", "echo from the journal");
    world.program("bin/dmesg", "echo from the kernel");
    assert_eq!(machine.log("ovs-agent", Bytes(100)).await.unwrap(), "from the journal\n");
    assert_eq!(machine.log("dmesg", Bytes(100)).await.unwrap(), "from the kernel\n");
    assert!(world.called().contains("--unit=dom0d"));
}

#[tokio::test]
async fn a_fifo_in_the_place_of_a_file_holds_nobody() {
    let world = World::with(&[("var/log/x", "")]);
    nix::unistd::mkfifo(&world.path("var/log/dom0d.log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(world.machine().log("ovs-agent", Bytes(10)).await.is_err());
}

#[tokio::test]
async fn a_reboot_goes_through_systemd_or_init_and_never_from_a_folder_to_the_kernel() {
    let world = World::with(&[("run/systemd/system/x", "")]);
    world.program("bin/systemctl", "");
    world.machine().reboot().await.unwrap();
    world.machine().power_off().await.unwrap();
    assert_eq!(world.called(), "bin/systemctl --no-block reboot\nbin/systemctl --no-block poweroff\n");
    let old = World::empty();
    old.program("sbin/poweroff", "");
    old.machine().power_off().await.unwrap();
    assert_eq!(old.called(), "sbin/poweroff \n");
    assert!(matches!(World::empty().machine().reboot().await, Err(MachineError::Unavailable(_))));
    assert!(World::empty().machine().set_clock(Timestamp(1)).await.is_err());
}

#[tokio::test]
async fn work_that_never_ends_costs_its_waiter_only_the_deadline_and_a_bounded_number_of_threads() {
    let machine = World::empty().machine();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(std::sync::Mutex::new(held));
    for _ in 0..BLOCKING_AT_ONCE {
        let held = held.clone();
        let machine = machine.clone();
        tokio::spawn(async move {
            let work = move |_: &Path| {
                let _ = held.lock().unwrap().recv();
                Ok(())
            };
            machine.blocking("stuck", work).await
        });
    }
    while machine.blocking.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    tokio::time::pause();
    let pass = async {
        tokio::task::yield_now().await;
        tokio::time::advance(DEADLINE + Duration::from_secs(1)).await;
    };
    let (late, ()) = tokio::join!(machine.blocking("late", |_| Ok(())), pass);
    assert_eq!(late, Err(MachineError::Timeout("late".into())));
    drop(release);
}

#[tokio::test]
async fn the_real_machine_can_be_read() {
    let machine = LinuxMachine::new(PathBuf::from("/"));
    let facts = machine.facts().await.unwrap();
    assert!(!facts.cpus.is_empty() && facts.memory.0 > 0 && facts.boot_time.0 > 0);
    assert!(!facts.kernel_release.is_empty() && !facts.architecture.is_empty());
    machine.timezone().await.unwrap();
    let told = machine.filesystems().await.unwrap();
    assert_eq!(told.first().map(|f| f.mount_point.as_str()), Some("/"));
}

#[tokio::test]
async fn the_disks_of_a_domain_are_counted_together_and_no_other_domains() {
    let vbd = |domid: u32, device: u32, what: &str| {
        format!("sys/bus/xen-backend/devices/vbd-{domid}-{device}/statistics/{what}")
    };
    let world = World::empty();
    for (device, factor) in [(51712, 1), (51728, 10)] {
        for (what, n) in [("rd_req", 2), ("rd_sect", 16), ("wr_req", 3), ("wr_sect", 24), ("f_req", 9)] {
            world.put(&vbd(1, device, what), format!("{}\n", n * factor).as_bytes());
            world.put(&vbd(11, device, what), b"1000000\n");
        }
    }
    world.put("sys/bus/xen-backend/devices/vbd-1-5632/state", b"1\n");
    world.put("sys/bus/xen-backend/devices/vif-1-0/state", b"4\n");
    let expected =
        DiskTraffic { read: Bytes(11 * 16 * 512), written: Bytes(11 * 24 * 512), reads: 22, writes: 33 };
    assert_eq!(world.machine().disk_traffic(1).await, Ok(expected));
    assert_eq!(world.machine().disk_traffic(2).await, Ok(DiskTraffic::default()));
    assert_eq!(World::empty().machine().disk_traffic(1).await, Ok(DiskTraffic::default()));
}

/// A machine with two CPUs, two disks and some sensors, some of them garbled.
fn sampled() -> World {
    let world = World::with(&[
        (
            "proc/stat",
            "cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 100 20 3 4000 500 6 7 50 9 10\ncpu1 1 x 1\ncpu2 0 0 0 0 0 0 0 0\nintr 9\ncpu9 1 1 1 1 1 1 1 1\n",
        ),
        ("proc/loadavg", "0.20 0.18 0.12 1/80 11206\n"),
        ("proc/meminfo", "MemTotal:        2048000 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\n"),
        (
            "proc/diskstats",
            "   8       0 sda 10 1 16 9 20 2 24 9 0 9 9 0 0 0 0 0 0\n   8       1 sda1 5 1 8 9 20 2 24 9 0 9 9\n\
             259 0 nvme0n1 1 0 1 0 0 0 0 0 0 0 0\n   8      16 sdb garbled\n   7 0 loop0 1 1 1 1 1 1 1 1\n   1 0 ram0 1 1 1 1 1 1 1 1\n",
        ),
        ("sys/class/hwmon/hwmon1/name", "coretemp\n"),
        ("sys/class/hwmon/hwmon1/temp2_input", "41500\n"),
        ("sys/class/hwmon/hwmon1/temp2_label", "Core 0\n"),
        ("sys/class/hwmon/hwmon1/temp10_input", "-5000\n"),
        ("sys/class/hwmon/hwmon1/temp3_input", "warm\n"),
        ("sys/class/hwmon/hwmon1/fan1_input", "900\n"),
        ("sys/class/hwmon/hwmon10/temp2_input", "30000\n"),
        ("sys/class/hwmon/hwmon10/temp2_label", "Core 0\n"),
    ]);
    for disk in ["sda", "sdb", "nvme0n1", "loop0", "ram0"] {
        world.put(&format!("sys/block/{disk}/size"), b"1\n");
    }
    world
}

#[tokio::test]
async fn figures_are_read_in_one_pass_and_what_is_garbled_is_passed_over() {
    let world = sampled();
    for (what, n) in [("rd_req", 2), ("rd_sect", 16), ("wr_req", 3), ("wr_sect", 24)] {
        world.put(
            &format!("sys/bus/xen-backend/devices/vbd-7-51712/statistics/{what}"),
            format!("{n}\n").as_bytes(),
        );
        world.put(&format!("sys/bus/xen-backend/devices/vbd-7-5632/statistics/{what}"), b"x\n");
        world.put(&format!("sys/bus/xen-backend/devices/vbd-+7-1/statistics/{what}"), b"1\n");
    }
    let told = world.machine().figures().await.unwrap();
    let idle = CpuTime { cpu: 2, busy_s: 0.0, steal_s: 0.0 };
    assert_eq!(told.cpus, [CpuTime { cpu: 0, busy_s: 1.36, steal_s: 0.5 }, idle]);
    assert_eq!(told.load, Some([0.20, 0.18, 0.12]));
    assert_eq!(told.memory_total, Some(Bytes(2_048_000 * 1024)));
    assert_eq!(told.memory_available, Some(Bytes(1024 * 1024)));
    let sda = DiskTraffic { read: Bytes(16 * 512), written: Bytes(24 * 512), reads: 10, writes: 20 };
    let nvme = DiskTraffic { read: Bytes(512), reads: 1, ..DiskTraffic::default() };
    let disks: Vec<_> = told.disks.iter().map(|disk| (disk.name.as_str(), disk.traffic)).collect();
    assert_eq!(disks, [("nvme0n1", nvme), ("sda", sda)]);
    let sensors: Vec<_> = told.temperatures.iter().map(|(name, celsius)| (name.as_str(), *celsius)).collect();
    assert_eq!(sensors, [("Core 0", 41.5), ("coretemp 2", -5.0), ("Core 0 2", 30.0)]);
    let traffic = DiskTraffic { read: Bytes(16 * 512), written: Bytes(24 * 512), reads: 2, writes: 3 };
    assert_eq!(told.vbds, [VbdFigures { domid: 7, device: 51712, traffic }]);
    assert_eq!(told.problems, []);
}

#[tokio::test]
async fn a_sensor_keeps_its_name_whatever_the_others_do() {
    let world = World::empty();
    let put = |sensor: &str, what: &str, text: &str| {
        world.put(&format!("sys/class/hwmon/hwmon{sensor}_{what}"), text.as_bytes());
    };
    for (sensor, label, thousandths) in
        [("0/temp1", "X", 1000), ("0/temp2", "X", 2000), ("1/temp1", "X 2", 3000), ("1/temp2", "X", 4000)]
    {
        put(sensor, "label", label);
        put(sensor, "input", &thousandths.to_string());
    }
    let told = async || world.machine().figures().await.unwrap().temperatures;
    let named = |name: &str, celsius| (name.to_owned(), celsius);
    let all = [named("X", 1.0), named("X 3", 2.0), named("X 2", 3.0), named("X 4", 4.0)];
    assert_eq!(told().await, all);
    put("0/temp1", "input", "no answer");
    assert_eq!(told().await, all[1..]);
}

#[tokio::test]
async fn a_source_of_figures_that_is_missing_or_nonsense_is_told_and_the_rest_stands() {
    let sources = |told: &HostFigures| told.problems.iter().map(|(source, _)| *source).collect::<Vec<_>>();
    let told = World::empty().machine().figures().await.unwrap();
    assert_eq!(sources(&told), ["/proc/stat", "/proc/loadavg", "/proc/meminfo", "/proc/diskstats"]);
    assert_eq!(HostFigures { problems: vec![], ..told }, HostFigures::default());
    for (path, garbage) in [
        ("proc/stat", &b"\xff\0cpu 1\n"[..]),
        ("proc/loadavg", b"nan nan nan"),
        ("proc/meminfo", b"MemTotal: lots kB\n"),
    ] {
        let world = sampled();
        world.put(path, garbage);
        let told = world.machine().figures().await.unwrap();
        assert_eq!(sources(&told), [format!("/{path}")]);
        assert!(!told.disks.is_empty() && told.temperatures.len() == 3);
    }
    let world = sampled();
    std::fs::remove_dir_all(world.path("sys/block")).unwrap();
    assert_eq!(sources(&world.machine().figures().await.unwrap()), ["/proc/diskstats"]);
    let world = sampled();
    world.put("sys/bus/xen-backend/devices", b"a file");
    assert_eq!(sources(&world.machine().figures().await.unwrap()), ["/sys/bus/xen-backend"]);
}

#[tokio::test]
async fn figures_that_hang_take_one_thread_and_leave_the_others_to_all_else() {
    let machine = sampled().machine();
    let permit = machine.sampling.clone().acquire_owned().await.unwrap();
    tokio::time::pause();
    for _ in 0..=BLOCKING_AT_ONCE {
        let pass = async {
            tokio::task::yield_now().await;
            tokio::time::advance(DEADLINE + Duration::from_secs(1)).await;
        };
        let (late, ()) = tokio::join!(machine.figures(), pass);
        assert_eq!(late, Err(MachineError::Timeout("figures".into())));
    }
    assert_eq!(machine.blocking.available_permits(), BLOCKING_AT_ONCE);
    tokio::time::resume();
    drop(permit);
    machine.figures().await.unwrap();
}
