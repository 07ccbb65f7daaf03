//! What every body of [`dom0d::xen::Toolstack`] must do, as rules over an [`Env`]. No rule knows which body it is held
//! against: it waits for conditions (never for a time), takes a new VM for itself, and cleans up nothing, so an
//! environment of real Xen must destroy what is left.
//!
//! The rules come in no order and each with an environment of its own, or one after the other with the same.

pub use crate::figures::*;
pub use crate::migration::*;

use crate::env::{Env, mac_of, vif};
use dom0d::model::{MiB, SafePath, VmId, VmName};
use dom0d::xen::config::{DomainConfig, Vnc};
use dom0d::xen::{
    AfterSave, DomId, DomainInfo, Observation, RunState, ShutdownReason, ToolstackError, Trigger,
};
use std::collections::BTreeSet;
use std::path::Path;

/// Calls the macro with the names of all rules.
macro_rules! rules {
    ($hold:ident) => {
        $hold! {
            a_created_domain_is_listed_found_and_alive,
            dom0_is_listed_first_and_belongs_to_no_vm,
            a_domain_created_paused_is_paused_until_it_is_unpaused,
            a_second_domain_of_a_vm_is_refused_and_the_first_goes_on,
            a_second_domain_of_the_same_name_is_refused,
            a_domain_without_room_in_memory_is_refused_and_leaves_nothing_behind,
            domids_are_not_used_again,
            pausing_and_unpausing_twice_does_no_harm,
            a_guest_that_is_asked_to_shut_down_ends_with_poweroff_and_waits,
            a_guest_that_is_asked_to_reboot_ends_with_reboot_and_waits,
            a_guest_that_ignores_a_shutdown_lives_on_and_can_be_destroyed,
            a_guest_that_crashes_ends_with_crash_and_waits,
            an_ended_domain_keeps_its_name_until_it_is_destroyed,
            destroying_frees_memory_and_name,
            an_unknown_domid_is_no_such_domain_for_every_call,
            a_saved_domain_is_gone_and_comes_back_as_the_same_vm,
            a_saved_domain_comes_back_paused_if_asked_for,
            a_checkpoint_leaves_the_domain_running,
            a_save_that_fails_leaves_the_domain_running_and_no_file,
            a_restore_of_no_saved_domain_leaves_nothing_behind,
            a_disk_is_plugged_once_and_told_by_the_config,
            a_vif_is_plugged_once_and_told_by_the_config,
            virtual_cpus_go_up_to_the_maximum_and_no_further,
            memory_goes_up_to_the_maximum_and_no_further,
            scheduling_is_told_by_the_config,
            the_config_is_what_the_domain_was_built_from,
            signals_to_the_guest_are_taken_while_it_lives_and_refused_when_it_has_ended,
            what_is_no_plain_key_or_too_long_is_not_sent_to_the_guest,
            a_core_is_dumped_to_a_new_file_and_the_domain_goes_on,
            a_core_dumped_with_crash_destroys_the_domain,
            a_domain_is_observed_when_it_appears_ends_and_goes,
            a_migrated_domain_is_gone_here_and_stands_paused_there,
            a_domain_that_is_not_handed_over_goes_on_here,
            a_migration_that_breaks_leaves_the_domain_running_here_and_none_there,
            a_migration_that_the_target_refuses_leaves_the_domain_running_here,
            a_vnc_server_has_a_port_of_its_own,
            cpu_time_grows_while_a_domain_lives,
            usage_agrees_with_what_is_told_of_the_machine_and_of_its_domains,
            cpus_never_idle_longer_than_time_passes,
            a_domains_target_is_told_and_of_one_that_is_not_there_nothing,
        }
    };
}
pub(crate) use rules;

fn exists(file: &SafePath) -> bool {
    Path::new(file.as_str()).exists()
}

pub fn is_alive(info: &DomainInfo) -> bool {
    matches!(info.state, RunState::Running | RunState::Blocked)
}

pub async fn a_created_domain_is_listed_found_and_alive(env: &Env) {
    let (config, domid) = env.started().await;
    let info = env.info(domid).await;
    assert!(is_alive(&info), "{info:?}");
    assert_eq!((info.vm, info.name.as_str()), (Some(config.vm), config.name.as_str()));
    assert_eq!((MiB::from(info.memory), info.online_vcpus), (config.memory, config.vcpus));
    assert_eq!(env.toolstack.find(config.vm).await.unwrap().map(|d| d.domid), Some(domid));
    let listed = env.toolstack.list().await.unwrap();
    assert!(listed.iter().any(|d| d.domid == domid));
    assert!(listed.is_sorted_by_key(|d| d.domid.0));
    assert_eq!(env.toolstack.find(VmId::random()).await, Ok(None));
}

pub async fn dom0_is_listed_first_and_belongs_to_no_vm(env: &Env) {
    let listed = env.toolstack.list().await.unwrap();
    assert_eq!((listed[0].domid, listed[0].vm), (DomId(0), None));
    assert!(env.toolstack.destroy(DomId(0)).await.is_err());
    assert!(env.toolstack.pause(DomId(0)).await.is_err());
}

pub async fn a_domain_created_paused_is_paused_until_it_is_unpaused(env: &Env) {
    let domid = env.toolstack.create(&env.new_vm(), true).await.unwrap();
    assert_eq!(env.info(domid).await.state, RunState::Paused);
    env.toolstack.unpause(domid).await.unwrap();
    assert!(is_alive(&env.info(domid).await));
    env.toolstack.pause(domid).await.unwrap();
    assert_eq!(env.info(domid).await.state, RunState::Paused);
}

pub async fn a_second_domain_of_a_vm_is_refused_and_the_first_goes_on(env: &Env) {
    let (config, domid) = env.started().await;
    assert_eq!(env.toolstack.create(&config, false).await, Err(ToolstackError::Exists));
    let renamed = DomainConfig { name: VmName::parse("contract-renamed").unwrap(), ..config.clone() };
    assert_eq!(env.toolstack.create(&renamed, false).await, Err(ToolstackError::Exists));
    let of_vm = env.toolstack.list().await.unwrap().into_iter().filter(|d| d.vm == Some(config.vm));
    assert_eq!(of_vm.map(|d| d.domid).collect::<Vec<_>>(), [domid]);
    assert!(is_alive(&env.info(domid).await));
}

pub async fn a_second_domain_of_the_same_name_is_refused(env: &Env) {
    let (config, _) = env.started().await;
    let other = DomainConfig { name: config.name, ..env.new_vm() };
    assert_eq!(env.toolstack.create(&other, false).await, Err(ToolstackError::Exists));
    assert_eq!(env.toolstack.find(other.vm).await, Ok(None));
}

pub async fn a_domain_without_room_in_memory_is_refused_and_leaves_nothing_behind(env: &Env) {
    let free = env.free().await;
    let config = env.new_vm();
    let too_much = DomainConfig { memory: MiB(free.0 + 1), max_memory: MiB(free.0 + 1), ..config.clone() };
    let refused = env.toolstack.create(&too_much, false).await;
    assert!(matches!(refused, Err(ToolstackError::OutOfMemory { .. })), "{refused:?}");
    assert_eq!(env.toolstack.find(config.vm).await, Ok(None));
    env.free_becomes(free).await;
    env.toolstack.create(&config, false).await.expect("what fits is built");
}

pub async fn domids_are_not_used_again(env: &Env) {
    let config = env.new_vm();
    let mut seen = BTreeSet::new();
    for _ in 0..5 {
        let domid = env.toolstack.create(&config, false).await.unwrap();
        assert!(seen.insert(domid.0), "{domid:?} came twice");
        env.toolstack.destroy(domid).await.unwrap();
    }
}

pub async fn pausing_and_unpausing_twice_does_no_harm(env: &Env) {
    let (_, domid) = env.started().await;
    for _ in 0..2 {
        env.toolstack.pause(domid).await.unwrap();
        assert_eq!(env.info(domid).await.state, RunState::Paused);
    }
    for _ in 0..2 {
        env.toolstack.unpause(domid).await.unwrap();
        assert!(is_alive(&env.info(domid).await));
    }
}

pub async fn a_guest_that_is_asked_to_shut_down_ends_with_poweroff_and_waits(env: &Env) {
    let (config, domid) = env.started().await;
    env.toolstack.shutdown(domid).await.unwrap();
    assert_eq!(env.end_of(domid).await, ShutdownReason::Poweroff);
    let found = env.toolstack.find(config.vm).await.unwrap();
    assert_eq!(found.map(|d| d.domid), Some(domid), "an ended domain is found until it is destroyed");
    assert!(matches!(env.toolstack.pause(domid).await, Err(ToolstackError::BadState(_))));
    assert!(matches!(env.toolstack.unpause(domid).await, Err(ToolstackError::BadState(_))));
    env.toolstack.destroy(domid).await.unwrap();
    assert_eq!(env.toolstack.get(domid).await, Ok(None));
}

pub async fn a_guest_that_is_asked_to_reboot_ends_with_reboot_and_waits(env: &Env) {
    let (config, domid) = env.started().await;
    env.toolstack.reboot(domid).await.unwrap();
    assert_eq!(env.end_of(domid).await, ShutdownReason::Reboot);
    let of_vm = env.toolstack.list().await.unwrap().into_iter().filter(|d| d.vm == Some(config.vm));
    assert_eq!(of_vm.map(|d| d.domid).collect::<Vec<_>>(), [domid], "the toolstack restarts nothing");
}

pub async fn a_guest_that_ignores_a_shutdown_lives_on_and_can_be_destroyed(env: &Env) {
    let Some(guests) = &env.guests else { return };
    let deaf = env.new_vm();
    guests.ignore_shutdown(deaf.vm).await;
    let deaf_domid = env.toolstack.create(&deaf, false).await.unwrap();
    env.toolstack.shutdown(deaf_domid).await.expect("it is asked, whether it heeds it or not");
    // An obedient guest that is asked later shows that there was time enough.
    let (_, obedient) = env.started().await;
    env.toolstack.shutdown(obedient).await.unwrap();
    env.end_of(obedient).await;
    assert!(is_alive(&env.info(deaf_domid).await));
    env.toolstack.destroy(deaf_domid).await.unwrap();
    assert_eq!(env.toolstack.find(deaf.vm).await, Ok(None));
}

pub async fn a_guest_that_crashes_ends_with_crash_and_waits(env: &Env) {
    let Some(guests) = &env.guests else { return };
    let (config, domid) = env.started().await;
    guests.crash(config.vm).await;
    assert_eq!(env.end_of(domid).await, ShutdownReason::Crash);
    assert!(env.toolstack.list().await.unwrap().iter().any(|d| d.domid == domid));
}

pub async fn an_ended_domain_keeps_its_name_until_it_is_destroyed(env: &Env) {
    let (config, domid) = env.started().await;
    env.toolstack.shutdown(domid).await.unwrap();
    env.end_of(domid).await;
    assert_eq!(env.toolstack.create(&config, false).await, Err(ToolstackError::Exists));
    env.toolstack.destroy(domid).await.unwrap();
    env.toolstack.create(&config, false).await.unwrap();
}

pub async fn destroying_frees_memory_and_name(env: &Env) {
    let free = env.free().await;
    let (config, domid) = env.started().await;
    assert!(env.free().await.0 + config.memory.0 <= free.0, "a domain takes its memory");
    env.toolstack.destroy(domid).await.unwrap();
    env.free_becomes(free).await;
    env.toolstack.create(&config, false).await.unwrap();
}

pub async fn an_unknown_domid_is_no_such_domain_for_every_call(env: &Env) {
    let gone = {
        let (_, domid) = env.started().await;
        env.toolstack.destroy(domid).await.unwrap();
        domid
    };
    let t = &env.toolstack;
    assert_eq!(t.get(gone).await, Ok(None));
    let file = env.file("unknown");
    let mac = mac_of(VmId::random(), 9);
    let disk = (env.disk)(VmId::random(), "xvdb");
    let (ours, _theirs) = tokio::io::duplex(1024);
    let results = [
        t.destroy(gone).await,
        t.shutdown(gone).await,
        t.reboot(gone).await,
        t.pause(gone).await,
        t.unpause(gone).await,
        t.save(gone, &file, AfterSave::Destroy).await,
        t.migrate_out(gone, true, Box::new(ours), Decision::new(true)).await,
        t.config(gone).await.map(|_| ()),
        t.attach_disk(gone, &disk).await,
        t.detach_disk(gone, &disk.device).await,
        t.attach_vif(gone, &vif(mac)).await,
        t.detach_vif(gone, mac).await,
        t.set_vcpus(gone, 1).await,
        t.set_memory(gone, MiB(64)).await,
        t.set_scheduling(gone, 256, 0).await,
        t.sysrq(gone, 's').await,
        t.trigger(gone, Trigger::Nmi, None).await,
        t.send_to_guest(gone, "key", "value").await,
        t.dump_core(gone, &file, false, false).await,
    ];
    for (number, result) in results.into_iter().enumerate() {
        assert_eq!(result, Err(ToolstackError::NoSuchDomain), "call {number}");
    }
    assert!(!exists(&file));
}

pub async fn a_saved_domain_is_gone_and_comes_back_as_the_same_vm(env: &Env) {
    let free = env.free().await;
    let (config, domid) = env.started().await;
    let file = env.file("saved");
    env.toolstack.save(domid, &file, AfterSave::Destroy).await.unwrap();
    assert_eq!(env.toolstack.find(config.vm).await, Ok(None));
    env.free_becomes(free).await;
    assert!(exists(&file));
    let again = env.toolstack.restore(&config, &file, false).await.unwrap();
    assert_ne!(again, domid);
    let info = env.info(again).await;
    assert_eq!((info.vm, info.name.as_str()), (Some(config.vm), config.name.as_str()));
    assert!(is_alive(&info));
    assert!(exists(&file), "the file stays until somebody removes it");
    let twice = env.toolstack.restore(&config, &file, false).await;
    assert_eq!(twice, Err(ToolstackError::Exists));
}

pub async fn a_saved_domain_comes_back_paused_if_asked_for(env: &Env) {
    let (config, domid) = env.started().await;
    let file = env.file("saved-for-pause");
    env.toolstack.save(domid, &file, AfterSave::Destroy).await.unwrap();
    let again = env.toolstack.restore(&config, &file, true).await.unwrap();
    assert_eq!(env.info(again).await.state, RunState::Paused);
}

pub async fn a_checkpoint_leaves_the_domain_running(env: &Env) {
    let (_, domid) = env.started().await;
    let file = env.file("checkpoint");
    env.toolstack.save(domid, &file, AfterSave::Continue).await.unwrap();
    assert!(exists(&file));
    assert!(is_alive(&env.info(domid).await));
}

pub async fn a_save_that_fails_leaves_the_domain_running_and_no_file(env: &Env) {
    let (_, domid) = env.started().await;
    let file = env.file("no-such-folder/saved");
    let failed = env.toolstack.save(domid, &file, AfterSave::Destroy).await;
    assert!(matches!(failed, Err(ToolstackError::Failed(_))), "{failed:?}");
    assert!(is_alive(&env.info(domid).await));
    assert!(!exists(&file));
}

pub async fn a_restore_of_no_saved_domain_leaves_nothing_behind(env: &Env) {
    let free = env.free().await;
    let config = env.new_vm();
    let missing = env.file("missing");
    assert!(env.toolstack.restore(&config, &missing, false).await.is_err());
    let torn = env.file("torn");
    std::fs::write(torn.as_str(), b"this is no saved domain").unwrap();
    assert!(env.toolstack.restore(&config, &torn, false).await.is_err());
    assert_eq!(env.toolstack.find(config.vm).await, Ok(None));
    env.free_becomes(free).await;
}

pub async fn a_disk_is_plugged_once_and_told_by_the_config(env: &Env) {
    let (config, domid) = env.started().await;
    let new = (env.disk)(config.vm, "xvdb");
    env.toolstack.attach_disk(domid, &new).await.unwrap();
    assert!(env.toolstack.config(domid).await.unwrap().disks.contains(&new));
    let twice = env.toolstack.attach_disk(domid, &new).await;
    assert!(matches!(twice, Err(ToolstackError::BadState(_))), "{twice:?}");
    env.toolstack.detach_disk(domid, &new.device).await.unwrap();
    assert_eq!(env.toolstack.config(domid).await.unwrap().disks, config.disks);
    let not_there = env.toolstack.detach_disk(domid, &new.device).await;
    assert!(matches!(not_there, Err(ToolstackError::BadState(_))), "{not_there:?}");
}

pub async fn a_vif_is_plugged_once_and_told_by_the_config(env: &Env) {
    let (config, domid) = env.started().await;
    let new = vif(mac_of(config.vm, 1));
    env.toolstack.attach_vif(domid, &new).await.unwrap();
    let told = env.toolstack.config(domid).await.unwrap().vifs;
    assert!(told.iter().any(|v| v.mac == new.mac && v.bridge == new.bridge));
    let twice = env.toolstack.attach_vif(domid, &new).await;
    assert!(matches!(twice, Err(ToolstackError::BadState(_))), "{twice:?}");
    env.toolstack.detach_vif(domid, new.mac).await.unwrap();
    assert_eq!(env.toolstack.config(domid).await.unwrap().vifs.len(), config.vifs.len());
    let not_there = env.toolstack.detach_vif(domid, new.mac).await;
    assert!(matches!(not_there, Err(ToolstackError::BadState(_))), "{not_there:?}");
}

pub async fn virtual_cpus_go_up_to_the_maximum_and_no_further(env: &Env) {
    let (config, domid) = env.started().await;
    env.toolstack.set_vcpus(domid, config.max_vcpus).await.unwrap();
    assert_eq!(env.info(domid).await.online_vcpus, config.max_vcpus);
    for wrong in [0, config.max_vcpus + 1] {
        assert!(env.toolstack.set_vcpus(domid, wrong).await.is_err(), "{wrong}");
    }
    assert_eq!(env.info(domid).await.online_vcpus, config.max_vcpus);
}

pub async fn memory_goes_up_to_the_maximum_and_no_further(env: &Env) {
    let (config, domid) = env.started().await;
    let free = env.free().await;
    env.toolstack.set_memory(domid, config.max_memory).await.unwrap();
    assert_eq!(MiB::from(env.info(domid).await.memory), config.max_memory);
    env.free_becomes(MiB(free.0 + config.memory.0 - config.max_memory.0)).await;
    assert!(env.toolstack.set_memory(domid, MiB(config.max_memory.0 + 1)).await.is_err());
    env.toolstack.set_memory(domid, config.memory).await.unwrap();
    env.free_becomes(free).await;
}

pub async fn scheduling_is_told_by_the_config(env: &Env) {
    let (_, domid) = env.started().await;
    env.toolstack.set_scheduling(domid, 512, 50).await.unwrap();
    let config = env.toolstack.config(domid).await.unwrap();
    assert_eq!((config.cpu_weight, config.cpu_cap), (512, 50));
    assert!(env.toolstack.set_scheduling(domid, 0, 0).await.is_err());
}

pub async fn the_config_is_what_the_domain_was_built_from(env: &Env) {
    let (config, domid) = env.started().await;
    let told = env.toolstack.config(domid).await.unwrap();
    assert_eq!((told.vm, &told.name, told.guest), (config.vm, &config.name, config.guest));
    assert_eq!((told.memory, told.max_memory), (config.memory, config.max_memory));
    assert_eq!((told.vcpus, told.max_vcpus), (config.vcpus, config.max_vcpus));
    assert_eq!(told.disks, config.disks);
    let macs = |c: &DomainConfig| c.vifs.iter().map(|v| v.mac).collect::<Vec<_>>();
    assert_eq!(macs(&told), macs(&config));
}

pub async fn signals_to_the_guest_are_taken_while_it_lives_and_refused_when_it_has_ended(env: &Env) {
    let (config, domid) = env.started().await;
    let t = &env.toolstack;
    t.sysrq(domid, 's').await.unwrap();
    t.trigger(domid, Trigger::Nmi, Some(0)).await.unwrap();
    t.send_to_guest(domid, "message", "hello").await.unwrap();
    t.shutdown(domid).await.unwrap();
    env.end_of(domid).await;
    let results = [
        t.sysrq(domid, 's').await,
        t.trigger(domid, Trigger::Nmi, Some(0)).await,
        t.send_to_guest(domid, "message", "hello").await,
        t.shutdown(domid).await,
        t.reboot(domid).await,
        t.save(domid, &env.file("ended"), AfterSave::Destroy).await,
        t.attach_disk(domid, &(env.disk)(config.vm, "xvdc")).await,
        t.set_memory(domid, MiB(64)).await,
    ];
    for (number, result) in results.into_iter().enumerate() {
        assert!(matches!(result, Err(ToolstackError::BadState(_))), "call {number}: {result:?}");
    }
}

pub async fn what_is_no_plain_key_or_too_long_is_not_sent_to_the_guest(env: &Env) {
    let (_, domid) = env.started().await;
    for key in ["", "a/b", "..", "a b", "a\0", "é", &"k".repeat(300)] {
        assert!(env.toolstack.send_to_guest(domid, key, "x").await.is_err(), "{key:?}");
    }
    assert!(env.toolstack.send_to_guest(domid, "key", &"x".repeat(1025)).await.is_err());
    for key in ["key", "com.example.key"] {
        env.toolstack.send_to_guest(domid, key, &"x".repeat(1024)).await.unwrap();
    }
    for letter in ['\0', '\n', 'é', ' '] {
        assert!(env.toolstack.sysrq(domid, letter).await.is_err(), "{letter:?}");
    }
}

pub async fn a_core_is_dumped_to_a_new_file_and_the_domain_goes_on(env: &Env) {
    let (_, domid) = env.started().await;
    for (name, live) in [("core", false), ("core-live", true)] {
        let file = env.file(name);
        env.toolstack.dump_core(domid, &file, live, false).await.unwrap();
        assert!(std::fs::metadata(file.as_str()).unwrap().len() > 0);
        assert!(is_alive(&env.info(domid).await));
    }
    let nowhere = env.file("no-such-folder/core");
    assert!(env.toolstack.dump_core(domid, &nowhere, false, true).await.is_err());
    assert!(is_alive(&env.info(domid).await), "a dump that failed destroys nothing");
}

pub async fn a_core_dumped_with_crash_destroys_the_domain(env: &Env) {
    let (config, domid) = env.started().await;
    let file = env.file("core-crash");
    env.toolstack.dump_core(domid, &file, false, true).await.unwrap();
    assert!(exists(&file));
    assert_eq!(env.toolstack.find(config.vm).await, Ok(None));
}

pub async fn a_domain_is_observed_when_it_appears_ends_and_goes(env: &Env) {
    let mut observed = env.toolstack.observe();
    let patience = env.patience;
    let mut see = async |domid: DomId| {
        let wait = async {
            loop {
                match observed.recv().await.expect("observations go on") {
                    Observation::Everything => return,
                    Observation::At(seen) if seen == domid => return,
                    Observation::At(_) => {}
                }
            }
        };
        tokio::time::timeout(patience, wait).await.expect("it is observed in time");
    };
    let (_, domid) = env.started().await;
    see(domid).await;
    env.toolstack.shutdown(domid).await.unwrap();
    // What was seen of the creation may come more than once: look until the end shows.
    while !matches!(env.info(domid).await.state, RunState::Shutdown(_)) {
        see(domid).await;
    }
    env.toolstack.destroy(domid).await.unwrap();
    see(domid).await;
}

pub async fn a_vnc_server_has_a_port_of_its_own(env: &Env) {
    let vnc =
        Vnc { listen: std::net::Ipv4Addr::LOCALHOST.into(), display: None, password: None, keymap: None };
    let mut ports = BTreeSet::new();
    for _ in 0..2 {
        let config = DomainConfig { vnc: Some(vnc.clone()), ..env.new_vm() };
        let domid = env.toolstack.create(&config, false).await.unwrap();
        let port = env.info(domid).await.vnc_port.expect("a VNC server was asked for");
        assert!(port >= 5900 && ports.insert(port), "{port}");
    }
    let (_, without) = env.started().await;
    assert_eq!(env.info(without).await.vnc_port, None);
}
