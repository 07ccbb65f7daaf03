//! The part of the toolstack's contract that is about what it measures.

use crate::env::Env;
use dom0d::model::MiB;
use dom0d::xen::DomId;
use std::time::Duration;

pub async fn cpu_time_grows_while_a_domain_lives(env: &Env) {
    let (_, domid) = env.started().await;
    let first = env.info(domid).await.cpu_time_ns;
    let wait = async {
        while env.info(domid).await.cpu_time_ns <= first {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(env.patience, wait).await.expect("CPU time grows");
}

pub async fn usage_agrees_with_what_is_told_of_the_machine_and_of_its_domains(env: &Env) {
    let (config, domid) = env.started().await;
    let (info, usage) = (env.toolstack.info().await.unwrap(), env.toolstack.usage().await.unwrap());
    assert_eq!(MiB::from(usage.total_memory), info.total_memory);
    env.free_becomes(usage.free_memory.into()).await;
    let given: u64 = usage.domains.iter().map(|(_, memory)| memory.0).sum();
    assert!(given + usage.free_memory.0 <= usage.total_memory.0, "{usage:?}");
    // A toolstack that has no figures of its own tells none.
    if usage.domains.is_empty() {
        return;
    }
    let listed: Vec<DomId> = env.toolstack.list().await.unwrap().iter().map(|d| d.domid).collect();
    assert_eq!(usage.domains.iter().map(|(domid, _)| *domid).collect::<Vec<_>>(), listed);
    let (_, memory) = usage.domains.iter().find(|(one, _)| *one == domid).unwrap();
    // Real ones have a little more, for what no guest sees, or less, until they have ballooned.
    assert!(MiB::from(*memory).0.abs_diff(config.memory.0) <= 8 + env.slack.0, "{memory}");
}

pub async fn cpus_never_idle_longer_than_time_passes(env: &Env) {
    let (info, before) = (env.toolstack.info().await.unwrap(), env.toolstack.usage().await.unwrap());
    let half_a_second_later = async {
        loop {
            let usage = env.toolstack.usage().await.unwrap();
            // A toolstack that has no figures of its own tells none.
            if usage.cpus.is_empty() || usage.clock_ns >= before.clock_ns + 500_000_000 {
                return usage;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let after = tokio::time::timeout(env.patience, half_a_second_later).await.expect("its clock goes");
    assert_eq!(after.cpus.len(), before.cpus.len());
    assert!(after.cpus.is_empty() || after.cpus.len() == info.nr_cpus as usize, "{after:?}");
    let passed_ns = after.clock_ns.saturating_sub(before.clock_ns);
    for (one, then) in after.cpus.iter().zip(&before.cpus) {
        assert_eq!(one.cpu, then.cpu);
        // The two clocks are read one after the other, on a machine that may be busy.
        let idled_ns = one.idle_ns.checked_sub(then.idle_ns).expect("idle time never gets less");
        assert!(idled_ns <= passed_ns + 250_000_000, "{idled_ns} ns idle in {passed_ns} ns");
    }
}

pub async fn a_domains_target_is_told_and_of_one_that_is_not_there_nothing(env: &Env) {
    let (config, domid) = env.started().await;
    let nobody = DomId(30_000);
    let told = env.toolstack.guest_figures(&[nobody, domid]).await.unwrap();
    assert_eq!(told.iter().map(|one| one.domid).collect::<Vec<_>>(), [domid, nobody]);
    let target = told[0].memory_target.expect("the toolstack has written it");
    // Less what is set aside for a screen.
    assert!(target <= config.memory.into() && MiB::from(target).0 + 8 >= config.memory.0, "{target}");
    assert!(told[0].guest_total.is_none_or(|total| total <= config.max_memory.into()));
    assert_eq!((told[1].memory_target, told[1].guest_total, told[1].guest_free), (None, None, None));
    assert_eq!(env.toolstack.guest_figures(&[]).await, Ok(vec![]));
}
