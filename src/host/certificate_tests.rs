//! Tests of `certificate`.

use super::*;

const NOW: Timestamp = Timestamp(1_800_000_000_000);

fn names() -> Names {
    Names { hostname: "node-7".into(), addresses: vec!["192.0.2.7".parse().unwrap()] }
}

fn after(days: u64) -> Timestamp {
    Timestamp(NOW.0 + days * DAY_S * 1000)
}

fn text(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap()
}

#[test]
fn what_is_made_once_is_read_again_and_keys_are_private() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("certificates");
    let first = ensure(&dir, &names(), NOW).unwrap();
    let again = ensure(&dir, &names(), after(1)).unwrap();
    assert_eq!(first.chain_pem, again.chain_pem);
    assert_eq!(first.info, again.info);
    assert!(!first.info.is_ca && describe(&first.ca_pem).unwrap().is_ca);
    assert_eq!(first.info.issuer, describe(&first.ca_pem).unwrap().subject);
    assert_eq!((first.info.not_after.0 - first.info.not_before.0) / 1000, SERVER_LIFE_S);
    assert!(first.info.not_before < NOW);
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("server.key"), mode(".")), (0o600, 0o600, 0o700));
    assert!(!format!("{first:?}").contains("PRIVATE"));
}

#[test]
fn a_strict_verifier_accepts_the_chain_for_each_name_and_for_no_other() {
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
    let folder = tempfile::tempdir().unwrap();
    let server = ensure(folder.path(), &names(), NOW).unwrap();
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(server.chain_pem.as_bytes()).map(|one| one.unwrap()).collect();
    let ca = CertificateDer::from_pem_slice(server.ca_pem.as_bytes()).unwrap();
    let anchor = webpki::anchor_from_trusted_cert(&ca).unwrap();
    let end = webpki::EndEntityCert::try_from(&chain[0]).unwrap();
    let time = UnixTime::since_unix_epoch(Duration::from_millis(NOW.0));
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms.all;
    let usage = webpki::KeyUsage::server_auth();
    end.verify_for_usage(algorithms, &[anchor], &chain[1..], time, usage, None, None).unwrap();
    for (name, good) in
        [("node-7", true), ("192.0.2.7", true), ("::1", true), ("192.0.2.8", false), ("other", false)]
    {
        let name = ServerName::try_from(name).unwrap();
        assert_eq!(end.verify_is_valid_for_subject_name(&name).is_ok(), good, "{name:?}");
    }
}

#[test]
fn a_certificate_is_renewed_when_a_third_of_its_life_is_left_or_the_names_changed() {
    let folder = tempfile::tempdir().unwrap();
    let first = ensure(folder.path(), &names(), NOW).unwrap();
    assert!(!first.needs_renewal(after(260)));
    assert!(first.needs_renewal(after(270)));
    assert!(!first.needs_renewal(Timestamp(0)), "a clock that stands at its beginning is no reason");
    let renewed = ensure(folder.path(), &names(), after(270)).unwrap();
    assert_ne!(first.info.serial, renewed.info.serial);
    assert_eq!(first.ca_pem, renewed.ca_pem);
    let mut moved = names();
    moved.addresses.push("2001:db8::7".parse().unwrap());
    assert_ne!(ensure(folder.path(), &moved, after(271)).unwrap().info.serial, renewed.info.serial);
    let serial = ensure(folder.path(), &moved, after(272)).unwrap().info.serial;
    assert_ne!(renew(folder.path(), &moved, after(272)).unwrap().info.serial, serial);
}

#[test]
fn a_damaged_server_pair_is_moved_aside_and_made_anew_by_the_same_ca() {
    let other = tempfile::tempdir().unwrap();
    let strange = ensure(other.path(), &names(), NOW).unwrap();
    let damages: [(&str, Option<String>); 5] = [
        ("server.key", Some("rubbish".into())),
        ("server.key", None),
        ("server.pem", Some(String::new())),
        ("server.key", Some(strange.key_pem.expose().to_owned())),
        ("server.pem", Some(strange.chain_pem.clone())),
    ];
    for (name, damage) in damages {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let first = ensure(dir, &names(), NOW).unwrap();
        match &damage {
            Some(text) => std::fs::write(dir.join(name), text).unwrap(),
            None => std::fs::remove_file(dir.join(name)).unwrap(),
        }
        let second = ensure(dir, &names(), NOW).unwrap();
        assert_ne!(first.info.serial, second.info.serial, "{name} {damage:?}");
        assert_eq!(first.ca_pem, second.ca_pem);
        assert_eq!(text(dir, "server.pem"), second.chain_pem);
        let aside = format!("{name}.damaged-{}", NOW.seconds());
        assert_eq!(damage, std::fs::read_to_string(dir.join(aside)).ok());
    }
}

#[test]
fn a_flipped_bit_in_a_certificates_signature_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let first = ensure(folder.path(), &names(), NOW).unwrap();
    let (mut der, _) = x509::der_of(&first.chain_pem).unwrap();
    *der.last_mut().unwrap() ^= 1;
    let broken = first.chain_pem.replacen(
        first.chain_pem.split("-----").nth(2).unwrap().trim(),
        &base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &der),
        1,
    );
    std::fs::write(folder.path().join("server.pem"), broken).unwrap();
    assert_ne!(ensure(folder.path(), &names(), NOW).unwrap().info.serial, first.info.serial);
}

#[test]
fn a_damaged_ca_is_left_as_it_is_and_it_is_said_what_to_do() {
    for (name, damage) in [("ca.pem", Some("x")), ("ca.key", Some("x")), ("ca.key", None), ("ca.pem", None)] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        ensure(dir, &names(), NOW).unwrap();
        match damage {
            Some(text) => std::fs::write(dir.join(name), text).unwrap(),
            None => std::fs::remove_file(dir.join(name)).unwrap(),
        }
        let refused = ensure(dir, &names(), NOW).unwrap_err();
        assert!(matches!(refused, CertificateError::DamagedCa { .. }), "{name}: {refused}");
        assert!(refused.to_string().contains("start again"));
        assert_eq!(std::fs::read_to_string(dir.join(name)).ok().as_deref(), damage);
    }
}

#[test]
fn a_host_name_that_no_certificate_takes_does_not_keep_the_host_from_starting() {
    for hostname in ["", "with blank", "é", &"x".repeat(300)] {
        let folder = tempfile::tempdir().unwrap();
        let names = Names { hostname: hostname.to_owned(), addresses: Vec::new() };
        let first = ensure(folder.path(), &names, NOW).unwrap();
        assert_eq!(ensure(folder.path(), &names, NOW).unwrap().info, first.info, "{hostname:?}");
    }
}
