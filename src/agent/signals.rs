//! Signals from the system, and words to systemd (sd_notify(3)).

use crate::store::{Store, Table};
use sd_notify::NotifyState;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    pub(super) async fn stop_or_reload(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.hangup.recv() => Asked::Reload,
        }
    }

    /// Ends when we are asked to stop; a reload asked meanwhile has nothing to read again yet.
    pub(super) async fn stop(&mut self) {
        while self.stop_or_reload().await == Asked::Reload {}
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Stop,
    Reload,
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

pub(super) fn reloading() {
    notify(&[NotifyState::Reloading]);
}

pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Any row will do; there is none.
const PULSE: Table<u8> = Table::new("pulse", 1);

/// Tells systemd that we live, for as long as the runtime turns and the store answers.
pub(super) fn watchdog(store: Store, stop: CancellationToken) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let Some(interval) = sd_notify::watchdog_enabled() else { return };
        let mut tick = tokio::time::interval((interval / 3).max(Duration::from_millis(100)));
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = stop.cancelled() => return,
            }
            match tokio::time::timeout(interval / 3, store.get(&PULSE, "pulse")).await {
                Ok(_) => notify(&[NotifyState::Watchdog]),
                Err(_) => tracing::error!("the store does not answer; systemd is not told that we live"),
            }
        }
    })
}
