//! Who is calling, and what may they do: the gate in front of every call.
//!
//! Words: the *policy* is what the agent says now (the password's hash and role, the owner's pinned
//! certificate, the local group); each new policy gets a new *generation*, and every decision that was kept
//! dies with its generation (of passwords: with the hash or the role). So a release of ownership or a new password acts at once, on kept-alive and on
//! resumed connections too, because the role is asked for at each request and never kept in a connection.
//!
//! A password costs 19 MiB and some 30 ms to verify, which is why
//! - only one is computed at a time, verified or hashed, on a thread that may block, and its memory is given back;
//! - those who bring the same credentials wait for one computation together;
//! - credentials once verified are known again by a keyed hash, so that a kept-alive call costs microseconds;
//! - an address with too many failures in a minute is refused without computing. Known credentials pass before
//!   that is asked, so that a brute force from the manager's own address does not lock the manager out; and one
//!   attempt every few seconds is let through all the same, so that a manager not known yet gets in.

use super::Role;
use super::certificate::{self, PeerCertificate, Usage};
use super::throttle::Throttle;
use crate::model::Secret;
use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use subtle::ConstantTimeEq;
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::{Duration, Instant};

/// The dialect has one user.
pub const USER: &str = "oracle";

/// Good credentials have few spellings (the case of `Basic`); more than this are never worth keeping.
const MAX_VERIFIED: usize = 16;
/// Different credentials waiting to be computed. At some 30 ms each the last waits 2 s.
const MAX_PENDING: usize = 64;
/// Longer `Authorization` headers are refused unread.
const MAX_HEADER_BYTES: usize = 4096;
/// A certificate's decision is asked again after this, because certificates expire.
const CERTIFICATE_DECISION_LIFE: Duration = Duration::from_secs(60);
const MAX_CERTIFICATE_DECISIONS: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("the system gives no random numbers")]
    Random,
    #[error("the password cannot be hashed: {0}")]
    Hash(argon2::password_hash::Error),
    #[error("too many passwords wait to be hashed; try again later")]
    Busy,
    #[error("the agent is stopping")]
    Stopping,
}

/// What the gate decides by.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// A PHC string of argon2id. `None`: no password is accepted.
    pub password_hash: Option<String>,
    /// `None`: the right password is refused too.
    pub password_role: Option<Role>,
    pub owner: Option<OwnerPin>,
    /// Other hosts, each by the fingerprint of its CA or its server certificate.
    pub peers: Vec<String>,
    /// The group whose members may use the operator's socket, besides root and the daemon's own user.
    pub local_group: Option<String>,
}

/// The certificate of the manager that owns the host: itself accepted, and what it issued if it is a CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerPin {
    pub der: Vec<u8>,
}

/// Why a caller is not let in. The caller is told no more than the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No credentials, or wrong ones.
    Unauthorized,
    /// The address has failed too often in the last minute.
    Throttled,
    /// Too many others wait to be verified.
    Busy,
}

/// Whose a certificate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shown {
    Owner,
    /// By the fingerprint that is pinned.
    Peer(String),
    Nobody,
}

/// One policy and everything decided under it.
struct Generation {
    policy: Policy,
    passwords: Arc<Passwords>,
    certificates: Mutex<HashMap<[u8; 32], (Shown, Instant)>>,
}

/// What was decided about one password's hash. Outlives a policy that changed something else: else every change
/// of the host's record would throw the manager out while somebody guesses from its address.
#[derive(Default)]
struct Passwords {
    verified: Mutex<Vec<Key>>,
    /// One cell per different credentials that are being computed; all who bring them wait on it.
    pending: Mutex<HashMap<Key, Arc<OnceCell<bool>>>>,
}

type Key = [u8; 32];

/// One password is computed at a time in this process, verified or hashed.
static COMPUTING: Semaphore = Semaphore::const_new(1);
/// How many may be hashed or wait for it.
const MAX_HASHING: usize = 4;
static HASHING: Semaphore = Semaphore::const_new(MAX_HASHING);

/// Shared by the server, which asks, and by whoever keeps password and ownership, who sets.
pub struct Gate {
    generation: RwLock<Arc<Generation>>,
    /// Random for each process: a hash found in memory or a dump is worth nothing elsewhere.
    hash_key: hmac::Key,
    throttle: Mutex<Throttle>,
    max_failures_per_minute: AtomicU32,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    pub fn new(policy: Policy) -> Result<Self, AuthError> {
        let hash_key =
            hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).map_err(|_| AuthError::Random)?;
        Ok(Self {
            generation: RwLock::new(Arc::new(Generation::new(policy))),
            hash_key,
            throttle: Mutex::new(Throttle::default()),
            max_failures_per_minute: AtomicU32::new(10),
        })
    }

    /// From now on this policy holds, for requests on open connections too.
    pub fn set_policy(&self, policy: Policy) {
        let mut generation = self.generation.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Generation::new(policy);
        let old = &generation.policy;
        if old.password_hash == next.policy.password_hash && old.password_role == next.policy.password_role {
            next.passwords = Arc::clone(&generation.passwords);
        }
        *generation = Arc::new(next);
    }

    /// The policy that holds now.
    pub fn policy(&self) -> Policy {
        self.current().policy.clone()
    }

    pub fn set_max_failures_per_minute(&self, failures: u32) {
        self.max_failures_per_minute.store(failures, Ordering::Relaxed);
    }

    fn current(&self) -> Arc<Generation> {
        self.generation.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The role of credentials known to be good, without waiting.
    pub(super) fn known(&self, authorization: &[u8]) -> Option<Role> {
        let generation = self.current();
        let role = generation.policy.password_role?;
        generation.passwords.is_verified(&self.key(authorization)).then_some(role)
    }

    /// The role that the value of an `Authorization` header gives.
    pub(super) async fn password(&self, address: IpAddr, authorization: &[u8]) -> Result<Role, Refusal> {
        if authorization.len() > MAX_HEADER_BYTES {
            return Err(Refusal::Unauthorized);
        }
        let key = self.key(authorization);
        // Again only if the policy changed while the password was computed.
        for _ in 0..3 {
            let generation = self.current();
            let Some(role) = generation.policy.password_role else {
                return Err(Refusal::Unauthorized);
            };
            if generation.passwords.is_verified(&key) {
                return Ok(role);
            }
            let verified = self.compute_once(&generation, address, key, authorization).await?;
            if Arc::ptr_eq(&generation, &self.current()) {
                return if verified { Ok(role) } else { Err(Refusal::Unauthorized) };
            }
        }
        Err(Refusal::Busy)
    }

    fn key(&self, authorization: &[u8]) -> Key {
        let mut key = [0; 32];
        key.copy_from_slice(hmac::sign(&self.hash_key, authorization).as_ref());
        key
    }

    async fn compute_once(
        &self,
        generation: &Arc<Generation>,
        address: IpAddr,
        key: Key,
        authorization: &[u8],
    ) -> Result<bool, Refusal> {
        let (cell, first) = generation.passwords.join(key)?;
        // Whoever computed them may have finished between the look before and the joining.
        if generation.passwords.is_verified(&key) {
            generation.passwords.leave(&key);
            return Ok(true);
        }
        // The first of those who bring these credentials pays for all: a thousand clients that start
        // together with the right password are one attempt.
        if first && !self.failures().admit(address, self.max_failures(), Instant::now()) {
            generation.passwords.leave(&key);
            return Err(Refusal::Throttled);
        }
        let verified = *cell
            .get_or_init(|| async {
                let verified = self.compute(generation, authorization).await;
                if verified {
                    generation.passwords.remember(key);
                }
                verified
            })
            .await;
        generation.passwords.leave(&key);
        if verified && first {
            self.failures().forgive(address);
        }
        Ok(verified)
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, Throttle> {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn max_failures(&self) -> u32 {
        self.max_failures_per_minute.load(Ordering::Relaxed)
    }

    async fn compute(&self, generation: &Generation, authorization: &[u8]) -> bool {
        let Some(password) = password_of(authorization) else {
            return false;
        };
        let Some(hash) = generation.policy.password_hash.clone() else {
            return false;
        };
        let Ok(permit) = COMPUTING.acquire().await else {
            return false;
        };
        // The permit goes with the computation: it stays taken if the caller hangs up meanwhile.
        let verified = tokio::task::spawn_blocking(move || {
            let verified = verify_password(&hash, &password);
            give_back_memory();
            drop(permit);
            verified
        });
        verified.await.unwrap_or(false)
    }

    /// Whose is this certificate, now?
    pub(super) fn whose(&self, shown: &PeerCertificate) -> Shown {
        let generation = self.current();
        let policy = &generation.policy;
        if policy.owner.is_none() && policy.peers.is_empty() {
            return Shown::Nobody;
        }
        let now = Instant::now();
        let mut decisions = generation.certificates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((whose, until)) = decisions.get(&shown.digest)
            && *until > now
        {
            return whose.clone();
        }
        let whose = if policy.owner.as_ref().is_some_and(|pin| certificate::accepts(&pin.der, &shown.chain)) {
            Shown::Owner
        } else {
            let pinned = |pin: &&String| certificate::accepts_fingerprint(pin, &shown.chain, Usage::Client);
            policy.peers.iter().find(pinned).cloned().map_or(Shown::Nobody, Shown::Peer)
        };
        if decisions.len() >= MAX_CERTIFICATE_DECISIONS {
            decisions.clear();
        }
        decisions.insert(shown.digest, (whose.clone(), now + CERTIFICATE_DECISION_LIFE));
        whose
    }

    /// May this process use the operator's socket? Asks the user database, which may block.
    pub(super) async fn is_local_operator(&self, uid: u32, gid: u32) -> bool {
        if uid == 0 || uid == nix::unistd::geteuid().as_raw() {
            return true;
        }
        let Some(group) = self.current().policy.local_group.clone() else {
            return false;
        };
        tokio::task::spawn_blocking(move || is_member(&group, uid, gid)).await.unwrap_or(false)
    }
}

impl Generation {
    fn new(policy: Policy) -> Self {
        Self { policy, passwords: Arc::default(), certificates: Mutex::default() }
    }
}

impl Passwords {
    fn is_verified(&self, key: &Key) -> bool {
        let verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        // All are compared, whichever is equal.
        verified.iter().fold(false, |found, known| found | bool::from(known.ct_eq(key)))
    }

    fn remember(&self, key: Key) {
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.len() >= MAX_VERIFIED {
            verified.remove(0);
        }
        verified.push(key);
    }

    /// The cell of these credentials, and whether it was made for this caller.
    fn join(&self, key: Key) -> Result<(Arc<OnceCell<bool>>, bool), Refusal> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        // Callers that hung up while they waited left theirs behind.
        pending.retain(|_, cell| Arc::strong_count(cell) > 1);
        if let Some(cell) = pending.get(&key) {
            return Ok((cell.clone(), false));
        }
        if pending.len() >= MAX_PENDING {
            return Err(Refusal::Busy);
        }
        let cell = Arc::new(OnceCell::new());
        pending.insert(key, cell.clone());
        Ok((cell, true))
    }

    fn leave(&self, key: &Key) {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// The password of `Basic base64(oracle:password)`. Anything else is no credentials.
fn password_of(authorization: &[u8]) -> Option<Secret> {
    let text = std::str::from_utf8(authorization).ok()?;
    let (scheme, encoded) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = zeroize::Zeroizing::new(STANDARD.decode(encoded.trim()).ok()?);
    let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    // One user, known to all: nothing is given away by looking at the name first.
    (user == USER).then(|| Secret::new(password))
}

fn verify_password(hash: &str, password: &Secret) -> bool {
    match PasswordHash::new(hash) {
        Ok(hash) => Argon2::default().verify_password(password.expose().as_bytes(), &hash).is_ok(),
        Err(error) => {
            tracing::error!(%error, "the password's hash is not readable; no password is accepted");
            false
        }
    }
}

/// The PHC string to keep instead of the password. Takes some 30 ms and 19 MiB: not for an async worker.
pub fn hash_password(password: &Secret) -> Result<String, AuthError> {
    let mut salt = [0; 16];
    SystemRandom::new().fill(&mut salt).map_err(|_| AuthError::Random)?;
    let salt = SaltString::encode_b64(&salt).map_err(AuthError::Hash)?;
    let params = Params::new(19 * 1024, 2, 1, None).map_err(|error| AuthError::Hash(error.into()))?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hash = argon2.hash_password(password.expose().as_bytes(), &salt).map_err(AuthError::Hash)?;
    let text = hash.to_string();
    give_back_memory();
    Ok(text)
}

/// [`hash_password`] on a thread that may block, and not beside another computation.
pub async fn hash_password_alone(password: Secret) -> Result<String, AuthError> {
    let place = HASHING.try_acquire().map_err(|_| AuthError::Busy)?;
    let permit = COMPUTING.acquire().await.map_err(|_| AuthError::Stopping)?;
    // Both go with the computation: they stay taken if the caller hangs up meanwhile.
    let hashed = tokio::task::spawn_blocking(move || {
        let hashed = hash_password(&password);
        drop((permit, place));
        hashed
    });
    hashed.await.map_err(|_| AuthError::Stopping)?
}

/// The 19 MiB of a computed password would otherwise stay in the allocator for ever.
#[allow(unsafe_code)]
fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointer, is thread-safe, and touches only memory that is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn is_member(group: &str, uid: u32, gid: u32) -> bool {
    use nix::unistd::{Group, Uid, User, getgrouplist};
    let Ok(Some(group)) = Group::from_name(group) else {
        return false;
    };
    if group.gid.as_raw() == gid {
        return true;
    }
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else {
        return false;
    };
    let Ok(name) = std::ffi::CString::new(user.name) else {
        return false;
    };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group.gid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_process_is_of_a_group_by_its_own_group_or_by_its_users() {
        let group = nix::unistd::Group::from_gid(nix::unistd::getegid()).unwrap().unwrap();
        let gid = group.gid.as_raw();
        let nobody = u32::MAX - 7;
        assert!(is_member(&group.name, nobody, gid));
        assert!(!is_member(&group.name, nobody, gid + 1));
        assert!(!is_member("no-such-group-anywhere", nobody, gid));
    }

    #[tokio::test]
    async fn only_root_the_daemons_own_user_and_the_group_are_local_operators() {
        let gate = Gate::new(Policy::default()).unwrap();
        let (own, stranger) = (nix::unistd::geteuid().as_raw(), u32::MAX - 7);
        let gid = nix::unistd::getegid();
        assert!(gate.is_local_operator(0, u32::MAX - 7).await);
        assert!(gate.is_local_operator(own, u32::MAX - 7).await);
        assert!(!gate.is_local_operator(stranger, gid.as_raw()).await);
        let group = nix::unistd::Group::from_gid(gid).unwrap().unwrap();
        gate.set_policy(Policy { local_group: Some(group.name), ..Policy::default() });
        assert!(gate.is_local_operator(stranger, gid.as_raw()).await);
    }

    const GOOD: &[u8] = b"Basic b3JhY2xlOnNlY3JldA==";

    fn policy(hash: &str) -> Policy {
        Policy { password_hash: Some(hash.to_owned()), password_role: Some(Role::Admin), ..Policy::default() }
    }

    #[tokio::test]
    async fn known_credentials_outlive_a_policy_that_changes_neither_the_password_nor_its_role() {
        let hash = hash_password(&Secret::new("secret")).unwrap();
        let gate = Gate::new(policy(&hash)).unwrap();
        assert_eq!(gate.password([192, 0, 2, 1].into(), GOOD).await, Ok(Role::Admin));
        gate.set_policy(Policy { owner: Some(OwnerPin { der: vec![1] }), ..policy(&hash) });
        assert_eq!(gate.known(GOOD), Some(Role::Admin));
        gate.set_policy(Policy { password_role: Some(Role::Viewer), ..policy(&hash) });
        assert_eq!(gate.known(GOOD), None, "another role");
        gate.set_policy(policy(&hash));
        assert_eq!(gate.known(GOOD), None, "what was forgotten does not come back");
        gate.password([192, 0, 2, 1].into(), GOOD).await.unwrap();
        gate.set_policy(policy("another hash"));
        assert_eq!(gate.known(GOOD), None, "another password");
    }

    #[tokio::test]
    async fn passwords_are_hashed_one_at_a_time_with_verifications_and_few_may_wait() {
        let permit = COMPUTING.acquire().await.unwrap();
        let mut waiting: Vec<_> =
            (0..MAX_HASHING).map(|_| Box::pin(hash_password_alone(Secret::new("x")))).collect();
        for hashed in &mut waiting {
            assert!(hashed.as_mut().now_or_never().is_none());
        }
        assert!(matches!(hash_password_alone(Secret::new("x")).await, Err(AuthError::Busy)));
        waiting.truncate(1);
        drop(permit);
        assert!(waiting.remove(0).await.unwrap().starts_with("$argon2id$"));
    }
}
