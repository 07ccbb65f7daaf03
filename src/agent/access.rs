//! What surrounds the operations: who may call (the wire's gate), the server's certificate, and the wire's own
//! figures. Joins rooms that must not know each other.

use crate::api::{About, Certificate};
use crate::config::{PasswordAfterOwnership, Settings};
use crate::host::{HostRecord, Peer, certificate};
use crate::model::{Secret, Timestamp};
use crate::operation::Access;
use crate::wire::{Gate, Metrics, OwnerPin, Policy, Role, TlsIdentity, TlsState};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use tokio::sync::watch;

/// Whom the store knows.
#[derive(Clone, Default)]
struct Known {
    password: Option<String>,
    host: Option<HostRecord>,
    peers: Vec<Peer>,
}

pub(super) struct Surroundings {
    settings: RwLock<Arc<Settings>>,
    gate: Arc<Gate>,
    tls: Arc<TlsState>,
    tls_dir: PathBuf,
    names: certificate::Names,
    metrics: OnceLock<Arc<Metrics>>,
    /// What the policy is made of, for a reload.
    known: RwLock<Known>,
    /// Rises when the host's record or our certificate has changed.
    changes: watch::Sender<u64>,
}

impl Surroundings {
    pub(super) fn new(
        settings: Arc<Settings>,
        gate: Arc<Gate>,
        tls: Arc<TlsState>,
        tls_dir: PathBuf,
        names: certificate::Names,
    ) -> Self {
        let settings = RwLock::new(settings);
        Self {
            settings,
            gate,
            tls,
            tls_dir,
            names,
            metrics: OnceLock::new(),
            known: RwLock::default(),
            changes: watch::Sender::new(0),
        }
    }

    pub(super) fn serve(&self, metrics: Arc<Metrics>) {
        let _ = self.metrics.set(metrics);
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over what may change while we serve: who may call, and the certificate on disk.
    pub(super) async fn reload(self: &Arc<Self>, new: Settings) {
        let old = self.settings();
        self.gate.set_max_failures_per_minute(new.access.max_failures_per_minute);
        let rest = Settings { access: new.access.clone(), ..Settings::clone(&old) };
        if rest != new {
            tracing::warn!("settings outside [access] have changed; they hold after a restart");
        }
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rest);
        self.decide_anew();
        let this = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || this.read_certificate()).await;
        match read.map_err(|e| e.to_string()).and_then(|r| r) {
            Ok(()) => tracing::info!("settings and certificate were read again"),
            Err(error) => {
                tracing::error!(error, "the certificate cannot be read again; the old one is served")
            }
        }
    }

    fn decide_anew(&self) {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).clone();
        let policy =
            gate_policy(&self.settings(), known.password.as_deref(), known.host.as_ref(), &known.peers);
        self.gate.set_policy(policy);
    }

    /// Our certificate with its key: how other hosts know us.
    pub(super) fn identity(&self) -> Result<TlsIdentity, String> {
        let read = |name: &str| {
            let path = self.tls_dir.join(name);
            std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
        };
        Ok(TlsIdentity { chain_pem: read("server.pem")?, key_pem: Secret::new(read("server.key")?) })
    }

    fn read_certificate(&self) -> Result<(), String> {
        let certificate =
            certificate::ensure(&self.tls_dir, &self.names, Timestamp::now()).map_err(|e| e.to_string())?;
        self.put_in_force(certificate)
    }

    fn put_in_force(&self, certificate: certificate::ServerCertificate) -> Result<(), String> {
        let identity = TlsIdentity { chain_pem: certificate.chain_pem, key_pem: certificate.key_pem };
        self.tls.replace(&identity).map_err(|e| e.to_string())?;
        self.changes.send_modify(|changes| *changes += 1);
        Ok(())
    }
}

/// Who may call, and as what.
///
/// Once a manager owns the host, the password keeps the role that the settings give it; but an owner that pinned
/// no certificate has nothing but the password, so it keeps it.
pub(super) fn gate_policy(
    settings: &Settings,
    password: Option<&str>,
    host: Option<&HostRecord>,
    peers: &[Peer],
) -> Policy {
    let owner = host.and_then(|host| host.ownership.owner());
    let pinned = owner.and_then(|owner| owner.certificate.as_ref());
    let pin = pinned.and_then(|certificate| match certificate.der() {
        Ok(der) => Some(OwnerPin { der }),
        Err(error) => {
            tracing::error!(%error, "the owner's certificate cannot be read; it is not accepted");
            None
        }
    });
    let password_role = match settings.access.password_after_ownership {
        PasswordAfterOwnership::None if pin.is_some() => None,
        PasswordAfterOwnership::Admin | PasswordAfterOwnership::None => Some(Role::Admin),
    };
    let group = &settings.wire.socket_group;
    Policy {
        password_hash: password.map(str::to_owned),
        password_role,
        owner: pin,
        peers: peers.iter().map(|peer| peer.fingerprint.as_str().to_owned()).collect(),
        local_group: (!group.is_empty()).then(|| group.clone()),
    }
}

impl Access for Surroundings {
    fn policy_changed(&self, password_hash: Option<&str>, host: &HostRecord) {
        {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            known.password = password_hash.map(str::to_owned);
            known.host = Some(host.clone());
        }
        self.decide_anew();
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn peers_changed(&self, peers: &[Peer]) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).peers = peers.to_vec();
        self.decide_anew();
    }

    fn renew_certificate(&self, if_due: bool) -> Result<bool, String> {
        let now = Timestamp::now();
        let text = |e: certificate::CertificateError| e.to_string();
        if if_due {
            let served = self.certificate()?.fingerprint;
            let certificate = certificate::ensure(&self.tls_dir, &self.names, now).map_err(text)?;
            let renewed = certificate.info.fingerprint != served;
            self.put_in_force(certificate)?;
            return Ok(renewed);
        }
        let certificate = certificate::renew(&self.tls_dir, &self.names, now).map_err(text)?;
        self.put_in_force(certificate)?;
        Ok(true)
    }
}

impl About for Surroundings {
    fn certificate(&self) -> Result<Certificate, String> {
        let read = |name: &str| {
            let path = self.tls_dir.join(name);
            std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
        };
        let (pem, ca_pem) = (read("server.pem")?, read("ca.pem")?);
        let info = certificate::describe(&pem).map_err(|e| e.to_string())?;
        let ca = certificate::describe(&ca_pem).map_err(|e| e.to_string())?;
        Ok(Certificate {
            subject: info.subject,
            issuer: info.issuer,
            serial: info.serial,
            not_before: info.not_before.to_string(),
            not_after: info.not_after.to_string(),
            fingerprint: info.fingerprint,
            ca_fingerprint: ca.fingerprint,
            pem,
            ca_pem,
        })
    }

    fn plain_http(&self) -> bool {
        self.settings().wire.plain_http
    }

    fn wire_counts(&self) -> (u64, u64) {
        self.metrics
            .get()
            .map_or((0, 0), |m| (m.calls.load(Ordering::Relaxed), m.connections.load(Ordering::Relaxed)))
    }
}
