//! The part of the toolstack's contract that is about a domain on its way to another host.

use crate::env::Env;
use crate::toolstack::is_alive;
use dom0d::xen::config::DomainConfig;
use dom0d::xen::{DomId, Handover, RunState, Toolstack};
use std::sync::Arc;

/// Decides on handovers as it was told, and counts how often it was asked.
pub struct Decision(bool, std::sync::atomic::AtomicU32);

impl Decision {
    pub fn new(handed_over: bool) -> Arc<Self> {
        Arc::new(Self(handed_over, 0.into()))
    }

    pub fn asked(&self) -> u32 {
        self.1.load(std::sync::atomic::Ordering::SeqCst)
    }
}

#[async_trait::async_trait]
impl Handover for Decision {
    async fn hand_over(&self) -> bool {
        self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.0
    }
}

async fn migrate(
    from: &Arc<dyn Toolstack>,
    to: &Arc<dyn Toolstack>,
    domid: DomId,
    decision: Arc<Decision>,
) -> (dom0d::xen::Result<()>, dom0d::xen::Result<DomId>) {
    let (near, far) = tokio::io::duplex(4096);
    tokio::join!(from.migrate_out(domid, true, Box::new(near), decision), to.migrate_in(Box::new(far)))
}

pub async fn a_migrated_domain_is_gone_here_and_stands_paused_there(env: &Env) {
    let Some(peer) = &env.peer else { return };
    let free = env.free().await;
    let (config, domid) = env.started().await;
    env.toolstack.attach_disk(domid, &(env.disk)(config.vm, "xvdb")).await.unwrap();
    let decision = Decision::new(true);
    let (sent, received) = migrate(&env.toolstack, peer, domid, decision.clone()).await;
    sent.unwrap();
    assert_eq!(decision.asked(), 1);
    let there = peer.get(received.unwrap()).await.unwrap().unwrap();
    assert_eq!((there.vm, there.name.as_str()), (Some(config.vm), config.name.as_str()));
    assert_eq!(there.state, RunState::Paused);
    assert_eq!(peer.config(there.domid).await.unwrap().disks.len(), 2, "plugged devices go along");
    assert_eq!(env.toolstack.find(config.vm).await, Ok(None));
    env.free_becomes(free).await;
    peer.unpause(there.domid).await.unwrap();
    assert!(is_alive(&peer.get(there.domid).await.unwrap().unwrap()));
    peer.destroy(there.domid).await.unwrap();
}

pub async fn a_domain_that_is_not_handed_over_goes_on_here(env: &Env) {
    let Some(peer) = &env.peer else { return };
    let (config, domid) = env.started().await;
    let decision = Decision::new(false);
    let (sent, received) = migrate(&env.toolstack, peer, domid, decision.clone()).await;
    assert!(sent.is_err());
    assert_eq!(decision.asked(), 1);
    assert!(is_alive(&env.info(domid).await));
    // The copy is paused, and its receiver's to throw away.
    let copy = received.unwrap();
    assert_eq!(peer.get(copy).await.unwrap().unwrap().state, RunState::Paused);
    peer.destroy(copy).await.unwrap();
    assert_eq!(peer.find(config.vm).await, Ok(None));
}

pub async fn a_migration_that_breaks_leaves_the_domain_running_here_and_none_there(env: &Env) {
    let (config, domid) = env.started().await;
    let (near, far) = tokio::io::duplex(64);
    drop(far);
    let decision = Decision::new(true);
    assert!(env.toolstack.migrate_out(domid, true, Box::new(near), decision.clone()).await.is_err());
    assert_eq!(decision.asked(), 0, "what was not sent is not handed over");
    assert!(is_alive(&env.info(domid).await));
    let Some(peer) = &env.peer else { return };
    // Only the first bytes arrive.
    let (near, mut heard) = tokio::io::duplex(64);
    let (mut further, far) = tokio::io::duplex(64);
    let cut = async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut first = [0; 20];
        heard.read_exact(&mut first).await.unwrap();
        further.write_all(&first).await.unwrap();
    };
    let sending = env.toolstack.migrate_out(domid, true, Box::new(near), decision.clone());
    let (sent, received, ()) = tokio::join!(sending, peer.migrate_in(Box::new(far)), cut);
    assert!(sent.is_err() && received.is_err(), "{sent:?} {received:?}");
    assert_eq!(decision.asked(), 0);
    assert!(is_alive(&env.info(domid).await));
    assert_eq!(peer.find(config.vm).await, Ok(None));
}

pub async fn a_migration_that_the_target_refuses_leaves_the_domain_running_here(env: &Env) {
    let Some(peer) = &env.peer else { return };
    let (config, domid) = env.started().await;
    // The target has a domain of the same name.
    let other = DomainConfig { name: config.name, ..env.new_vm() };
    peer.create(&other, true).await.unwrap();
    let (near, far) = tokio::io::duplex(4096);
    let (answer, refused) = tokio::sync::oneshot::channel();
    let sending = env.toolstack.migrate_out(domid, true, Box::new(near), Arc::new(Heard(refused.into())));
    let receiving = async { answer.send(peer.migrate_in(Box::new(far)).await.is_ok()).unwrap() };
    let (sent, ()) = tokio::join!(sending, receiving);
    assert!(sent.is_err(), "{sent:?}");
    assert!(is_alive(&env.info(domid).await));
    assert_eq!(peer.find(config.vm).await, Ok(None));
}

/// Hands over what the other side has taken.
struct Heard(tokio::sync::Mutex<tokio::sync::oneshot::Receiver<bool>>);

#[async_trait::async_trait]
impl Handover for Heard {
    async fn hand_over(&self) -> bool {
        (&mut *self.0.lock().await).await.unwrap_or(false)
    }
}
