//! TLS: handshakes, and what a client's certificate is worth.

use crate::support::*;
use dom0d::wire::{Client, ClientError, OwnerPin, Policy, TlsIdentity, Value, fingerprint};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, date_time_ymd};
use rustls::client::WantsClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

fn owned_by(certified: &Certified) -> Policy {
    Policy { owner: Some(OwnerPin { der: certified.der.clone() }), password_role: None, ..policy() }
}

async fn is_let_in(client: &mut Client) -> bool {
    match client.call("echo", &[], PATIENCE).await {
        Ok(_) => true,
        // The handshake itself may refuse what is no certificate at all.
        Err(ClientError::Refused { status: 403, .. }) => false,
        Err(other) => panic!("{other:?}"),
    }
}

/// A ClientHello that offers `version` and no newer one.
fn client_hello(version: [u8; 2]) -> Vec<u8> {
    let mut hello = version.to_vec();
    hello.extend([7; 32]);
    hello.push(0);
    // ECDHE-ECDSA-AES128-SHA, AES128-SHA, 3DES, RC4.
    hello.extend([0, 8, 0xC0, 0x09, 0x00, 0x2F, 0x00, 0x0A, 0x00, 0x05]);
    hello.extend([1, 0]);
    let length = u8::try_from(hello.len()).unwrap();
    let mut record = vec![0x16, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    record
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_tls_and_its_ciphers_are_refused_by_an_alert() {
    let host = start();
    for version in [[3, 0], [3, 1], [3, 2], [3, 3]] {
        let mut stream = host.plain().await;
        stream.write_all(&client_hello(version)).await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
        // An alert record, fatal; never a ServerHello.
        assert_eq!((answer[0], answer[5]), (0x15, 2), "{version:?}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_instead_of_a_handshake_ends_the_connection_and_a_stalled_one_is_cut_off() {
    let host = start_with(hurried(), 10);
    for garbage in [&b"\x16garbage garbage garbage"[..], b"\x16\x03\x01\xFF\xFF", &[0x16; 70_000]] {
        let mut stream = host.plain().await;
        let _ = stream.write_all(garbage).await;
        rest(&mut stream).await;
    }
    let mut stalled = host.plain().await;
    stalled.write_all(&client_hello([3, 3])[..20]).await.unwrap();
    assert_eq!(rest(&mut stalled).await, "");
    host.timeouts(1).await;
    until(|| host.server.open_connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_http_is_answered_in_words_where_it_is_not_allowed() {
    let host = start_with(dom0d::config::Wire { plain_http: false, ..settings() }, 10);
    let answer = host.say(&post(&good(), &echo_call("x"))).await;
    assert!(status(&answer) == "400" && answer.contains("TLS only"), "{answer}");
    assert!(is_let_in(&mut host.client(Some(PASSWORD), None)).await);
}

fn client_config(host: &Host) -> rustls::ConfigBuilder<rustls::ClientConfig, WantsClientCert> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(host.ca.der.clone())).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_in_single_bytes_is_understood() {
    let host = start();
    let stream = host.plain().await;
    stream.set_nodelay(true).unwrap();
    let name = ServerName::try_from("dom0.test").unwrap();
    let connector = TlsConnector::from(Arc::new(client_config(&host).with_no_client_auth()));
    let mut stream = connector.connect(name, ByteByByte(stream)).await.unwrap();
    stream.write_all(&post(&format!("{}{CLOSE}", good()), &echo_call("x"))).await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(value(&rest(&mut stream).await), Ok(Value::from("x")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hello_with_a_huge_server_name_does_no_harm() {
    let host = start();
    // Length fields that promise 16 KiB of names in a record of that size, and none of it a name.
    let mut hello = vec![0x16, 3, 1, 0x40, 0, 1, 0, 0x3F, 0xFC, 3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0x13, 0x01, 1, 0, 0x3F, 0xCC, 0, 0, 0x3F, 0xC8]);
    hello.resize(5 + 0x4000, b'a');
    let mut stream = host.plain().await;
    stream.write_all(&hello).await.unwrap();
    rest(&mut stream).await;
    assert!(is_let_in(&mut host.client(Some(PASSWORD), None)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pinned_certificate_is_the_owner_and_no_other_is() {
    let host = start();
    let owner = self_signed(client_params());
    host.gate.set_policy(owned_by(&owner));
    let who = host.client(None, Some(&owner)).call("who", &[], PATIENCE).await.unwrap();
    let expected = format!("owner:{}@127.0.0.1", &fingerprint(&owner.der)[..8]);
    assert_eq!(who, Value::String(expected));
    for (other, why) in [
        (self_signed(client_params()), "another of the same name"),
        (issued(client_params(), &owner), "issued by the pinned one, which is no CA"),
        (issued(client_params(), &host.ca), "issued by our own CA"),
    ] {
        assert!(!is_let_in(&mut host.client(None, Some(&other))).await, "{why}");
    }
    assert!(!is_let_in(&mut host.client(None, None)).await);
    assert!(!is_let_in(&mut host.client(Some(PASSWORD), None)).await, "the password has no role any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pinned_ca_lets_in_what_it_issued_for_clients_and_is_valid_now() {
    let host = start();
    let owner = ca();
    host.gate.set_policy(owned_by(&owner));
    let with = |change: fn(&mut CertificateParams)| {
        let mut params = client_params();
        change(&mut params);
        params
    };
    let expired = with(|params| params.not_after = date_time_ymd(2020, 1, 1));
    let not_yet = with(|params| params.not_before = date_time_ymd(3000, 1, 1));
    let server_only = with(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let any_use = with(|params| params.extended_key_usages = Vec::new());
    for (certified, accepted, why) in [
        (issued(client_params(), &owner), true, "issued for clients"),
        (issued(any_use, &owner), true, "issued for any use"),
        (issued(expired, &owner), false, "expired"),
        (issued(not_yet, &owner), false, "not yet valid"),
        (issued(server_only, &owner), false, "for servers only"),
        (issued(client_params(), &ca()), false, "of another CA of the same name"),
        (self_signed(client_params()), false, "self-signed"),
    ] {
        assert_eq!(is_let_in(&mut host.client(None, Some(&certified))).await, accepted, "{why}");
    }
    assert!(
        is_let_in(&mut host.client(None, Some(&owner))).await,
        "the CA's own certificate is the exact pin"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pinned_certificate_is_accepted_only_within_its_dates() {
    let host = start();
    for (from, to, accepted) in [(2000, 2001, false), (3000, 3001, false), (2000, 3000, true)] {
        let mut params = client_params();
        params.not_before = date_time_ymd(from, 1, 1);
        params.not_after = date_time_ymd(to, 1, 1);
        let owner = self_signed(params);
        host.gate.set_policy(owned_by(&owner));
        assert_eq!(is_let_in(&mut host.client(None, Some(&owner))).await, accepted, "{from} to {to}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_without_its_key_is_worth_nothing() {
    let host = start();
    let owner = self_signed(client_params());
    let thief = self_signed(client_params());
    host.gate.set_policy(owned_by(&owner));
    let chain = vec![CertificateDer::from(owner.der.clone())];
    let key = PrivateKeyDer::from_pem_slice(thief.identity.key_pem.expose().as_bytes()).unwrap();
    let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
    let forged = SingleCertAndKey::from(CertifiedKey::new(chain, key));
    let config = client_config(&host).with_client_cert_resolver(Arc::new(forged));
    // In TLS 1.3 the client is done before the server has looked at its signature.
    let name = ServerName::try_from("dom0.test").unwrap();
    if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, host.plain().await).await {
        let _ = stream.write_all(&post(CLOSE, &echo_call("x"))).await;
        let _ = stream.flush().await;
        assert_eq!(rest(&mut stream).await, "");
    }
    assert_eq!(host.server.metrics().unauthorized.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_of_ownership_acts_on_open_and_on_resumed_connections() {
    let host = start();
    let owner = self_signed(client_params());
    host.gate.set_policy(owned_by(&owner));
    let mut client = host.client(None, Some(&owner));
    assert!(is_let_in(&mut client).await);
    assert!(is_let_in(&mut client).await, "the connection is kept");
    let connections = host.server.metrics().connections.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(connections, 1);
    host.gate.set_policy(policy());
    assert!(!is_let_in(&mut client).await, "the kept connection");
    assert!(!is_let_in(&mut client).await, "a new connection, resumed by the ticket of the first");
    host.gate.set_policy(owned_by(&owner));
    assert!(is_let_in(&mut client).await, "owned again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_server_certificate_greets_new_connections_and_a_bad_one_is_not_taken() {
    let host = start();
    let mut kept = host.client(Some(PASSWORD), None);
    assert!(is_let_in(&mut kept).await);
    let bad = TlsIdentity { chain_pem: "none".to_owned(), key_pem: dom0d::model::Secret::new("none") };
    assert!(host.tls.replace(&bad).is_err());
    assert!(is_let_in(&mut host.client(Some(PASSWORD), None)).await);

    let other = ca();
    host.tls.replace(&issued(params(), &other).identity).unwrap();
    assert!(is_let_in(&mut kept).await, "an open connection goes on");
    let mut old_trust = host.client(Some(PASSWORD), None);
    let error = old_trust.call("echo", &[], Duration::from_secs(5)).await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
}
