//! Calls that go wrong: deadlines, families that are killed whole, output without end, garbage, half-made domains.

use super::super::config_file;
use super::fake::{Fake, HEAD, VM, line};
use crate::model::{KiB, MiB, SafePath, VmId, VmName};
use crate::xen::config::{Boot, DomainConfig, GuestType, OnEnd, PygrubArgs, TscMode};
use crate::xen::{AfterSave, DomId, RunState, Toolstack, ToolstackError};
use futures_util::FutureExt;
use std::time::{Duration, Instant};

const LIST: (&str, &str) = ("list", "cat listing");
const SHORT: Duration = Duration::from_secs(3);
const LONG: Duration = Duration::from_secs(60);
const SIX: DomId = DomId(6);

pub fn config() -> DomainConfig {
    DomainConfig {
        vm: VmId::parse(VM).unwrap(),
        name: VmName::parse("pv1").unwrap(),
        guest: GuestType::Pv,
        boot: Boot::Pygrub { args: PygrubArgs::default(), extra: crate::model::Text::default() },
        memory: MiB(96),
        max_memory: MiB(96),
        vcpus: 1,
        max_vcpus: 1,
        cpu_weight: 256,
        cpu_cap: 0,
        cpus: vec![],
        disks: vec![],
        vifs: vec![],
        vnc: None,
        on_poweroff: OnEnd::Destroy,
        on_reboot: OnEnd::Restart,
        on_crash: OnEnd::Restart,
        tsc_mode: TscMode::Default,
        acpi: true,
        apic: true,
        pae: true,
        usb_tablet: false,
        serial_pty: false,
        localtime: false,
    }
}

fn is_alive(pid: &str) -> bool {
    // A zombie waits for its parent only.
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}

async fn until(what: impl Fn() -> bool) {
    let wait = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.expect("it comes about in time");
}

fn failed<T: std::fmt::Debug>(result: &crate::xen::Result<T>) -> &str {
    match result {
        Err(ToolstackError::Failed(words)) => words,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_xl_that_hangs_is_killed_at_its_deadline_with_all_that_it_started() {
    // Its child is in a session of its own, as libxl's hotplug scripts are.
    let hang = "setsid sleep 1000 & echo $! > child; sleep 1000";
    let fake = Fake::new(&[LIST, ("info", hang)]);
    let xl = fake.open(SHORT).await;
    let began = Instant::now();
    assert_eq!(xl.info().await, Err(ToolstackError::Timeout));
    assert!(began.elapsed() < LONG);
    let child = std::fs::read_to_string(fake.path("child")).unwrap();
    until(|| !is_alive(&child)).await;
}

#[tokio::test]
async fn the_last_words_of_an_xl_that_was_killed_at_its_deadline_are_kept() {
    let fake = Fake::new(&[LIST, ("create", "echo killing execution of vif-bridge >&2; exec sleep 1000")]);
    let xl = fake.open(SHORT).await;
    let runner = super::super::run::Runner::new(fake.path("xl"));
    let told = runner.xl_or_words(&["create"], super::super::run::Leaves::Nothing, SHORT).await;
    let (error, words) = told.unwrap_err();
    assert_eq!((error, words.as_str()), (ToolstackError::Timeout, "killing execution of vif-bridge"));
    assert_eq!(xl.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn an_xl_that_hangs_about_one_domain_delays_no_call_about_another() {
    let pause = "if [ $2 = 6 ]; then echo $$ > hangs; exec sleep 1000; fi; sed s/-b----/--p---/ listing > less; mv less listing";
    let fake = Fake::new(&[LIST, ("pause", pause)]);
    let xl = fake.open(LONG).await;
    let other =
        line("-b----", "-").replace("pv1 6", "pv2 7").replace(VM, "98cd556e-8b89-4870-8957-8c0d9a96dbb5");
    fake.list(&(line("-b----", "-") + &other));
    let hung = tokio::spawn({
        let xl = xl.clone();
        async move { xl.pause(SIX).await }
    });
    until(|| fake.path("hangs").exists()).await;
    xl.pause(DomId(7)).await.unwrap();
    assert_eq!(xl.get(DomId(7)).await.unwrap().unwrap().state, RunState::Paused);
    assert!(!hung.is_finished());
    hung.abort();
}

#[tokio::test]
async fn while_the_connection_to_xenstore_is_lost_calls_say_so_and_do_nothing() {
    let fake = Fake::new(&[LIST, ("vcpu-set", "exit 0"), ("create", "exit 0")]);
    let xl = fake.open(LONG).await;
    fake.list(&line("-b----", "-"));
    fake.store.0.lock().unwrap().insert("/local/domain/6/cpu/0/availability".to_owned(), b"online".to_vec());
    fake.store.1.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(xl.get(SIX).await, Err(ToolstackError::Unreachable(_))));
    assert!(matches!(xl.set_vcpus(SIX, 1).await, Err(ToolstackError::Unreachable(_))));
    assert!(matches!(xl.send_to_guest(SIX, "key", "value").await, Err(ToolstackError::Unreachable(_))));
    assert!(!fake.calls().iter().any(|call| call.starts_with("vcpu-set")));
    fake.store.1.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(xl.set_vcpus(SIX, 1).await, Ok(()));
}

#[tokio::test]
async fn a_caller_that_goes_takes_the_call_with_it() {
    let fake = Fake::new(&[LIST, ("info", "echo $$ > pid; exec sleep 1000")]);
    let xl = fake.open(LONG).await;
    let pid = fake.path("pid");
    tokio::select! {
        _ = xl.info() => panic!("it hangs"),
        () = until(|| std::fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n'))) => {}
    }
    let pid = std::fs::read_to_string(pid).unwrap();
    until(|| !is_alive(&pid)).await;
}

#[tokio::test]
async fn a_child_that_holds_the_streams_is_not_waited_for() {
    let fake = Fake::new(&[("list", "cat listing; sleep 1000 & echo $! > child")]);
    let xl = fake.open(LONG).await;
    let began = Instant::now();
    assert_eq!(xl.list().await.unwrap().len(), 1);
    assert!(began.elapsed() < LONG / 2, "the deadline was not waited for");
    let child = std::fs::read_to_string(fake.path("child")).unwrap();
    assert!(is_alive(&child), "what a call leaves behind is left");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.trim().parse().unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

#[tokio::test]
async fn output_without_end_is_refused_and_takes_no_memory() {
    let fake = Fake::new(&[LIST, ("info", "exec yes xen_major : 4")]);
    let xl = fake.open(LONG).await;
    let error = xl.info().await;
    assert!(failed(&error).contains("more than"), "{error:?}");
}

#[tokio::test]
async fn of_a_flood_of_complaints_the_last_words_are_kept() {
    let fake =
        Fake::new(&[LIST, ("info", "yes libxl: error | head -c 300000 >&2; echo the end >&2; exit 3")]);
    let xl = fake.open(LONG).await;
    let error = xl.info().await;
    assert!(failed(&error).len() <= 5000 && failed(&error).ends_with("the end"), "{error:?}");
}

#[tokio::test]
async fn garbage_is_a_clear_fault_that_shows_a_piece_of_it() {
    let fake = Fake::new(&[LIST, ("info", "echo nothing of sense")]);
    let xl = fake.open(LONG).await;
    std::fs::write(fake.path("listing"), b"Name UUID\n\xff\xfe\x00 garbage 7\n").unwrap();
    let error = xl.list().await;
    assert!(failed(&error).contains("garbage"), "{error:?}");
    assert!(failed(&xl.info().await.map(drop)).contains("xl info"));
}

#[tokio::test]
async fn a_domain_is_dressed_with_what_xenstore_tells() {
    let fake = Fake::new(&[LIST]);
    let xl = fake.open(LONG).await;
    fake.list(&line("-b----", "-"));
    for (path, value) in [
        ("/local/domain/6/memory/target", "65536"),
        ("/local/domain/6/memory/static-max", "131072"),
        ("/local/domain/6/cpu/0/availability", "online"),
        ("/local/domain/6/cpu/1/availability", "offline"),
        ("/local/domain/6/console/vnc-port", "5901"),
        ("/local/domain/6/vm", "/vm/u"),
        ("/vm/u/start_time", "1795305827.90"),
    ] {
        fake.store.0.lock().unwrap().insert(path.to_owned(), value.into());
    }
    let info = xl.get(SIX).await.unwrap().unwrap();
    assert_eq!((info.memory.0, info.max_memory.0), (65536, 131_072));
    assert_eq!((info.vcpus, info.online_vcpus, info.vnc_port), (2, 1, Some(5901)));
    assert_eq!((info.started.0, info.state), (1_795_305_827_900, RunState::Blocked));
}

#[tokio::test]
async fn what_a_failed_create_has_left_is_destroyed_and_why_it_failed_is_told() {
    let create = format!("printf '%s' '{}' >> listing; echo no such bridge >&2; exit 3", line("--p---", "-"));
    let destroy = "head -n 2 listing > less; mv less listing";
    let fake = Fake::new(&[LIST, ("create", &create), ("destroy", destroy)]);
    let xl = fake.open(LONG).await;
    let error = xl.create(&config(), false).await;
    assert!(failed(&error).contains("no such bridge"), "{error:?}");
    assert!(fake.calls().contains(&"destroy 6".to_owned()), "{:?}", fake.calls());
    assert_eq!(xl.find(config().vm).await, Ok(None));
    assert_eq!(std::fs::read_dir(fake.path("private")).unwrap().count(), 0, "the configuration is gone");
}

#[tokio::test]
async fn a_create_that_hangs_is_killed_and_nothing_is_left_of_it() {
    let create = format!("printf '%s' '{}' >> listing; exec sleep 1000", line("--p---", "-"));
    let fake =
        Fake::new(&[LIST, ("create", &create), ("destroy", "head -n 2 listing > less; mv less listing")]);
    let xl = fake.open(LONG).await;
    let listing = fake.path("listing");
    {
        let config = config();
        tokio::select! {
            _ = xl.create(&config, false) => panic!("it hangs"),
            () = until(|| std::fs::read_to_string(&listing).is_ok_and(|text| text.contains("pv1"))) => {}
        }
    }
    // The caller has gone: the call ends all the same, and in good order.
    until(|| fake.calls().contains(&"destroy 6".to_owned())).await;
}

#[tokio::test]
async fn a_destroy_that_waits_for_a_hotplug_script_is_given_the_time_to_take_the_domain() {
    let create =
        format!("printf '%s' '{}' >> listing; echo the script hangs >&2; exit 3", line("--p---", "-"));
    let destroy = "sleep 5; head -n 2 listing > less; mv less listing";
    let fake = Fake::new(&[LIST, ("create", &create), ("destroy", destroy)]);
    let xl = fake.open(SHORT).await;
    let error = xl.create(&config(), false).await;
    assert!(failed(&error).contains("the script hangs"), "{error:?}");
    assert_eq!(xl.find(config().vm).await, Ok(None), "the domain is not leaked");
}

#[tokio::test]
async fn a_domain_that_was_there_before_is_refused_and_not_touched() {
    let fake = Fake::new(&[LIST, ("create", "exit 0"), ("destroy", "exit 0")]);
    let xl = fake.open(LONG).await;
    fake.list(&line("-b----", "-"));
    assert_eq!(xl.create(&config(), false).await, Err(ToolstackError::Exists));
    let of_the_name = DomainConfig { vm: VmId::random(), ..config() };
    assert_eq!(xl.create(&of_the_name, false).await, Err(ToolstackError::Exists));
    assert!(!fake.calls().iter().any(|call| call.starts_with("create") || call.starts_with("destroy")));
}

#[tokio::test]
async fn a_domain_in_the_making_that_a_former_life_left_is_destroyed_and_one_that_runs_is_not() {
    for (state, destroyed) in [("--p---", true), ("-b----", false)] {
        let fake = Fake::new(&[LIST, ("destroy", "head -n 2 listing > less; mv less listing")]);
        fake.list(&line(state, "-"));
        std::fs::create_dir(fake.path("private")).unwrap();
        let left = fake.path("private").join(format!("{VM}.cfg"));
        std::fs::write(&left, config_file::write(&config()).unwrap()).unwrap();
        let xl = fake.open(LONG).await;
        assert_eq!(xl.find(config().vm).await.unwrap().is_none(), destroyed, "{state}");
        assert!(!left.exists());
    }
}

#[tokio::test]
async fn what_has_ended_is_not_paused_though_xl_would_say_that_it_is() {
    let fake = Fake::new(&[LIST, ("pause", "exit 0"), ("save", "exit 0")]);
    let xl = fake.open(LONG).await;
    fake.list(&line("---s--", "0"));
    assert!(matches!(xl.pause(SIX).await, Err(ToolstackError::BadState(_))));
    assert!(matches!(xl.pause(DomId(0)).await, Err(ToolstackError::BadState(_))));
    assert_eq!(xl.pause(DomId(9)).await, Err(ToolstackError::NoSuchDomain));
    assert!(!fake.calls().iter().any(|call| call.starts_with("pause")));
}

#[tokio::test]
async fn a_save_that_xl_ends_early_leaves_no_file() {
    let fake = Fake::new(&[LIST, ("save", "echo this is no domain; exit 0"), ("pause", ""), ("unpause", "")]);
    let xl = fake.open(LONG).await;
    fake.list(&line("-b----", "-"));
    let file = SafePath::parse(fake.path("saved").to_str().unwrap()).unwrap();
    let error = xl.save(SIX, &file, AfterSave::Destroy).await;
    assert!(failed(&error).contains("before the domain was saved"), "{error:?}");
    assert!(!fake.path("saved").exists() && !fake.path("saved.part").exists());
    assert!(!fake.calls().iter().any(|call| call.starts_with("destroy")));
}

#[tokio::test]
async fn a_value_for_a_guest_lands_below_its_own_folder_and_nowhere_else() {
    let fake = Fake::new(&[LIST]);
    let xl = fake.open(LONG).await;
    fake.list(&line("-b----", "-"));
    for key in ["", "a/b", "..", "a b", "a\0", "é", &"k".repeat(300)] {
        assert!(xl.send_to_guest(SIX, key, "x").await.is_err(), "{key:?}");
    }
    for (key, node) in [("key", "key"), ("com.example.key", "com@2Eexample@2Ekey")] {
        fake.store.0.lock().unwrap().clear();
        xl.send_to_guest(SIX, key, "value").await.unwrap();
        let all = fake.store.0.lock().unwrap().clone();
        let path = format!("/local/domain/6/control/dom0d/{node}");
        assert_eq!(all.into_iter().collect::<Vec<_>>(), [(path, b"value".to_vec())]);
    }
}

#[tokio::test]
async fn a_domain_that_stands_still_for_a_save_that_broke_off_is_waited_for() {
    let fake = Fake::new(&[LIST, ("sysrq", "exit 0")]);
    let xl = fake.open(LONG).await;
    // As xl leaves it until it meets its broken pipe, after we were killed and have started anew.
    fake.list(&line("---s--", "2"));
    let looks = || fake.calls().iter().filter(|call| call.starts_with("list")).count();
    let before = looks();
    let goes_on = async {
        until(|| looks() > before + 1).await;
        fake.list(&line("-b----", "-"));
    };
    let (sent, ()) = tokio::join!(xl.sysrq(SIX, 'h'), goes_on);
    assert_eq!(sent, Ok(()));
    fake.list(&line("---s--", "0"));
    let began = Instant::now();
    let refused = xl.sysrq(SIX, 'h').await;
    assert!(matches!(refused, Err(ToolstackError::BadState(_))), "one that has ended does not come back");
    assert!(began.elapsed() < Duration::from_secs(12));
}

/// Of memory that moves: so long may nothing of it move.
const STALL: Duration = Duration::from_secs(3);
/// A saved domain's head.
const SAVED_HEAD: &str = "printf 'Xen saved domain, xl format\\n \\000 \\r\\004\\003\\002\\001'";

/// What a save of domain 6 says by an xl whose `save` does this.
async fn saved_by(script: &str) -> crate::xen::Result<()> {
    let fake = Fake::new(&[LIST, ("save", script), ("pause", ""), ("unpause", "")]);
    let xl = fake.open(STALL).await;
    fake.list(&line("-b----", "-"));
    let file = SafePath::parse(fake.path("saved").to_str().unwrap()).unwrap();
    let saved = xl.save(SIX, &file, AfterSave::Destroy).await;
    assert!(!fake.path("saved").exists() && !fake.path("saved.part").exists());
    saved
}

/// What a core dump says by an xl whose `dump-core` does this, and whether a core is there.
async fn dumped_by(script: &str) -> (crate::xen::Result<()>, bool) {
    let fake = Fake::new(&[LIST, ("dump-core", script)]);
    let xl = fake.open(STALL).await;
    fake.list(&line("-b----", "-"));
    let core = SafePath::parse(fake.path("core").to_str().unwrap()).unwrap();
    let dumped = xl.dump_core(SIX, &core, true, false).await;
    assert!(!fake.path("core.part").exists());
    (dumped, fake.path("core").exists())
}

/// What a restore says by an xl whose `restore` does this, and the saved domain as xl has read it.
async fn restored_by(script: &str, saved: Option<&[u8]>) -> (crate::xen::Result<DomId>, Vec<u8>) {
    let fake = Fake::new(&[LIST, ("restore", script)]);
    let xl = fake.open(STALL).await;
    match saved {
        Some(bytes) => std::fs::write(fake.path("saved"), bytes).unwrap(),
        None => std::fs::create_dir(fake.path("saved")).unwrap(),
    }
    std::fs::write(fake.path("built"), format!("{HEAD}{}", line("-b----", "-"))).unwrap();
    let file = SafePath::parse(fake.path("saved").to_str().unwrap()).unwrap();
    let restored = xl.restore(&config(), &file, false).await;
    assert!(fake.path("saved").exists(), "what was saved stays until its domain runs");
    (restored, std::fs::read(fake.path("read")).unwrap_or_default())
}

#[tokio::test]
async fn a_restore_reads_the_saved_domain_to_its_end() {
    let saved: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let (restored, read) = restored_by(r#"cat "$4" > read; mv built listing"#, Some(&saved)).await;
    assert_eq!(restored, Ok(SIX));
    assert!(read == saved, "{} bytes of {}", read.len(), saved.len());
}

#[tokio::test]
async fn builds_at_once_take_turns_before_xl_has_to() {
    // As xl does, which holds its lock until a domain is whole.
    let create = format!(
        "if ! mkdir lock 2>/dev/null; then echo two at once >&2; exit 3; fi; sleep 2; rmdir lock; \
         printf '%s' '{}' | sed \"s/pv1 6/$(grep -o 'pv[0-9]' $3) $(wc -l <listing)/; s/{VM}/$(basename $3 .cfg)/\" >>listing",
        line("-b----", "-")
    );
    let fake = Fake::new(&[LIST, ("create", &create)]);
    let xl = fake.open(LONG).await;
    let named =
        |name: &str| DomainConfig { vm: VmId::random(), name: VmName::parse(name).unwrap(), ..config() };
    let (one, two, three) = (named("pv1"), named("pv2"), named("pv3"));
    let built = tokio::join!(
        xl.create(&one, false).boxed(),
        xl.create(&two, false).boxed(),
        xl.create(&three, false).boxed()
    );
    assert!(matches!(built, (Ok(_), Ok(_), Ok(_))), "{built:?}");
}

#[tokio::test]
async fn why_a_restore_failed_is_told_in_the_words_of_who_knows() {
    let refuses = "head -c 9 >&2; echo is no saved domain >&2; exit 3";
    let (restored, _) = restored_by(refuses, Some(&vec![b'x'; 1_000_000])).await;
    assert!(failed(&restored).contains("xxxxxxxxxis no saved domain"), "{restored:?}");
    // A folder can be opened, and not read.
    let (restored, _) = restored_by("cat > read; echo it is too short >&2; exit 3", None).await;
    assert!(failed(&restored).contains("cannot be read"), "{restored:?}");
}

#[tokio::test]
async fn memory_that_moves_slowly_is_waited_for_and_memory_that_does_not_move_is_not() {
    // Longer than the limit in all.
    let slow_save =
        format!("{SAVED_HEAD}; for n in 1 2 3 4 5 6 7 8; do sleep 0.5; printf '\\000'; done; exit 0");
    let slow_dump = "for n in 1 2 3 4 5 6 7 8; do sleep 0.5; echo more >>\"$3\"; done; exit 0";
    // It works, though its file stands still.
    let busy_dump =
        "end=$(($(date +%s) + 5)); while [ $(date +%s) -lt $end ]; do :; done; echo more >>\"$3\"; exit 0";
    let hung_save = format!("{SAVED_HEAD}; sleep 600");
    let hung_dump = "echo some >>\"$3\"; echo half a core >&2; sleep 600";
    // More than a pipe takes at once, a piece at a time.
    let image = vec![b'x'; 2_000_000];
    let slow_restore =
        "for n in 1 2 3 4 5 6 7 8; do sleep 0.5; head -c 250000 >>read; done; mv built listing";
    let hung_restore = "head -c 250000 >>read; echo half a domain >&2; sleep 600";
    let slow = async {
        tokio::join!(
            saved_by(&slow_save).boxed(),
            dumped_by(slow_dump).boxed(),
            dumped_by(busy_dump).boxed(),
            restored_by(slow_restore, Some(&image)).boxed()
        )
    };
    let hung = async {
        tokio::join!(
            saved_by(&hung_save).boxed(),
            dumped_by(hung_dump).boxed(),
            restored_by(hung_restore, Some(&image)).boxed()
        )
    };
    let all = async { tokio::join!(slow, hung) };
    let (slowly, not) =
        tokio::time::timeout(Duration::from_secs(120), all).await.expect("what does not move is ended");
    let (slowly_saved, slowly_dumped, busily_dumped, slowly_restored) = slowly;
    let (not_saved, not_dumped, not_restored) = not;
    assert!(
        failed(&slowly_saved).contains("before the domain was saved"),
        "it was heard to its end: {slowly_saved:?}"
    );
    assert_eq!((slowly_dumped, busily_dumped), ((Ok(()), true), (Ok(()), true)));
    assert!(matches!(not_saved, Err(ToolstackError::Timeout | ToolstackError::Failed(_))), "{not_saved:?}");
    let (not_dumped, core) = not_dumped;
    assert!(
        failed(&not_dumped).ends_with("for 3 s; xl's last words: half a core") && !core,
        "{not_dumped:?}"
    );
    assert_eq!((slowly_restored.0, slowly_restored.1.len()), (Ok(SIX), image.len()));
    let not_restored = not_restored.0;
    let told = "nothing more was read for 3 s; xl's last words: half a domain";
    assert_eq!(failed(&not_restored), told, "and not by the deadline of a build, ten times as long");
}

const INFO: &str = "echo 'nr_cpus : 2
nr_nodes : 1
cores_per_socket : 2
threads_per_core : 1
cpu_mhz : 3295.047
hw_caps : 1fcbf3fd:c2d8220b:ec500800:00000077:00000000:01884389:00000204:00000000
total_memory : 3071
free_memory : 2014
xen_major : 4
xen_minor : 17
xen_extra : .7
xen_caps : xen-3.0-x86_64
cc_compiler : gcc
cc_compile_by : x
cc_compile_domain : x
cc_compile_date : x'";

#[tokio::test]
async fn where_the_hypervisor_is_not_known_to_us_memory_is_as_xl_tells_it_and_idle_time_unknown() {
    let fake = Fake::new(&[LIST, ("info", INFO)]);
    let usage = fake.open(LONG).await.usage().await.unwrap();
    assert_eq!((usage.total_memory, usage.free_memory), (KiB(3071 * 1024), KiB(2014 * 1024)));
    assert_eq!((usage.cpus, usage.domains), (vec![], vec![]));
}

#[tokio::test]
async fn what_guests_wrote_is_read_beside_what_they_were_told_and_held_against_it() {
    let fake = Fake::new(&[LIST]);
    let xl = fake.open(LONG).await;
    let put = |domid: u32, node: &str, value: &[u8]| {
        let path = format!("/local/domain/{domid}/{node}");
        fake.store.0.lock().unwrap().insert(path, value.to_vec());
    };
    for domid in [3, 6, 7] {
        put(domid, "memory/target", b"1000");
        put(domid, "memory/static-max", b"2000");
    }
    put(6, "data/meminfo_total", b"900");
    put(6, "data/meminfo_free", b"100");
    put(7, "data/meminfo_total", b"\xff\xff\xff");
    put(7, "data/meminfo_free", b"100");
    let told = xl.guest_figures(&[DomId(9), DomId(7), DomId(6), DomId(3)]).await.unwrap();
    let kib = |told: Option<KiB>| told.map(|kib| kib.0);
    let told: Vec<_> = told
        .iter()
        .map(|one| (one.domid.0, kib(one.memory_target), kib(one.guest_total), kib(one.guest_free)))
        .collect();
    let expected = [
        (3, Some(1000), None, None),
        (6, Some(1000), Some(900), Some(100)),
        (7, Some(1000), None, None),
        (9, None, None, None),
    ];
    assert_eq!(told, expected);
    fake.store.1.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(xl.guest_figures(&[SIX]).await, Err(ToolstackError::Unreachable(_))));
}
