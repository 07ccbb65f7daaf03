//! Tests of `ownership`.

use super::*;
use rcgen::{CertificateParams, KeyPair};

fn request(manager: &str) -> TakeRequest {
    TakeRequest::parse(&RawTake { manager, ..RawTake::default() }).unwrap()
}

fn pem() -> String {
    let key = KeyPair::generate().unwrap();
    CertificateParams::new(vec!["manager".to_owned()]).unwrap().self_signed(&key).unwrap().pem()
}

/// Made with openssl: RSA of 1,024 bits and SHA-256; RSA of 2,048 bits and SHA-1.
const SHORT_RSA: &str = include_str!("../../tests/fixtures/rsa1024.pem");
const SHA1: &str = include_str!("../../tests/fixtures/sha1.pem");
const MD5: &str = include_str!("../../tests/fixtures/md5.pem");
const PSS_SHA1: &str = include_str!("../../tests/fixtures/pss-sha1.pem");
const GOOD_RSA: &str = include_str!("../../tests/fixtures/rsa2048.pem");

#[test]
fn only_the_owner_changes_what_it_told_and_only_it_releases() {
    let a = "d1a749d4295041fb99854f52ea4dea97";
    let with_dashes = "D1A749D4-2950-41FB-9985-4F52EA4DEA97";
    let first = TakeRequest::parse(&RawTake {
        manager: a,
        core_api_url: Some("https://u:p@192.0.2.1:7002/core"),
        event_url: Some(""),
        ..RawTake::default()
    })
    .unwrap();
    let owned = Ownership::Unowned.take(first.clone(), Timestamp(5), 7).unwrap();
    let Ownership::Owned(again) = owned.take(first, Timestamp(9), 8).unwrap() else { panic!("it is owned") };
    let Ownership::Owned(before) = &owned else { panic!("it is owned") };
    assert_eq!((again.taken, again.since, again.from_event), (Timestamp(9), Timestamp(5), Some(7)));
    assert_eq!(
        Owner { taken: before.taken, ..*again },
        **before,
        "twice the same is the same but for its time"
    );
    let update = TakeRequest::parse(&RawTake {
        manager: with_dashes,
        event_url: Some("http://192.0.2.1/e"),
        ..RawTake::default()
    });
    let updated = owned.take(update.unwrap(), Timestamp(9), 7).unwrap();
    let owner = updated.owner().unwrap();
    assert_eq!((owner.since, owner.manager.as_str()), (Timestamp(5), a));
    assert_eq!(owner.core_api_url.as_ref().unwrap().as_str(), "https://192.0.2.1:7002/core");
    assert_eq!(owner.event_url.as_ref().unwrap().as_str(), "http://192.0.2.1/e");

    let refused = owned.take(request("bb"), Timestamp(9), 7).unwrap_err().to_string();
    assert!(refused.starts_with("ALREADY_OWNED: ") && refused.contains(a), "{refused}");
    let stranger = ManagerId::parse("bb").unwrap();
    assert!(matches!(owned.release(&stranger), Err(OwnershipError::NotOwner { .. })));
    assert_eq!(owned.release(&ManagerId::parse(with_dashes).unwrap()).unwrap(), Ownership::Unowned);
    assert_eq!(Ownership::Unowned.release(&stranger), Err(OwnershipError::NotOwned));
}

#[test]
fn credentials_of_a_url_stay_out_of_everything_that_is_kept_or_shown() {
    let raw =
        RawTake { manager: "aa", core_api_url: Some("https://admin:planted@h:1/x"), ..RawTake::default() };
    let request = TakeRequest::parse(&raw).unwrap();
    assert_eq!(request.credentials.as_ref().unwrap().expose(), "admin:planted");
    assert!(!format!("{request:?}").contains("planted"));
    let owned = Ownership::Unowned.take(request, Timestamp(1), 7).unwrap();
    let stored = serde_json::to_string(&owned).unwrap();
    assert!(!stored.contains("planted") && !stored.contains("admin"), "{stored}");
    assert_eq!(serde_json::from_str::<Ownership>(&stored).unwrap(), owned);
    for bad in ["https://admin:planted@h:x/", "ftp://admin:planted@h/", "https://admin:planted@h/ x"] {
        let told = ManagerUrl::split(bad).unwrap_err().to_string();
        assert!(!told.contains("planted"), "{told}");
    }
    assert!(ManagerUrl::parse("https://u:p@h/").is_err());
}

#[test]
fn a_manager_url_is_http_with_a_host_and_nothing_strange() {
    let long = format!("https://h/{}", "x".repeat(1024));
    for bad in [
        "",
        "h",
        "https://",
        "file:///etc/passwd",
        "https://h:0",
        "https://h:65536",
        "https://h:",
        "https://[::1",
        "https://[x]/",
        "https://a b/",
        "https://h/\n",
        "https://é/",
        "https://u@/",
        "https://h:1:2/",
        &long,
    ] {
        assert!(ManagerUrl::split(bad).is_err(), "{bad:?}");
    }
    for good in ["http://h", "HTTPS://h:7002/a?b=c&d", "https://[2001:db8::1]:8443/x"] {
        assert!(ManagerUrl::parse(good).is_ok(), "{good:?}");
    }
}

#[test]
fn a_manager_id_is_hex_and_dashes() {
    for bad in ["", "-", "xyz", "a b", "none", &"a".repeat(65)] {
        assert!(ManagerId::parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_weak_or_broken_certificate_is_refused_and_it_is_said_which_and_why() {
    let with = |certificate: &str| {
        let raw = RawTake { manager: "aa", certificate: Some(certificate), ..RawTake::default() };
        TakeRequest::parse(&raw).map(|request| request.certificate.unwrap())
    };
    let good = with(&pem()).unwrap();
    assert_eq!(good.fingerprint.len(), 64);
    assert!(!good.is_ca && !good.der().unwrap().is_empty());
    assert!(with(GOOD_RSA).is_ok());
    for (bad, word) in
        [(SHORT_RSA, "1024 bits"), (SHA1, "SHA-1"), (MD5, "MD5"), (PSS_SHA1, "1.2.840.113549.1.1.10")]
    {
        let told = with(bad).unwrap_err().to_string();
        assert!(
            told.starts_with("INVALID_CERTIFICATE: manager_certificate: ") && told.contains(word),
            "{told}"
        );
    }
    let cut = &pem()[..200];
    let two = format!("{}{}", pem(), pem());
    for bad in [
        "rubbish",
        cut,
        &two,
        &"x".repeat(100_000),
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        assert!(matches!(with(bad), Err(OwnershipError::Certificate { .. })), "{bad:.40}");
    }
}

proptest::proptest! {
    /// Whatever is asked in whatever order: the owner changes only from nobody to somebody and back.
    #[test]
    fn no_sequence_of_requests_takes_a_host_from_its_owner(steps in proptest::collection::vec((0..3_u8, proptest::bool::ANY), 0..30)) {
        let mut state = Ownership::Unowned;
        for (who, takes) in steps {
            let id = ManagerId::parse(&format!("{who}f")).unwrap();
            let next = if takes { state.take(request(id.as_str()), Timestamp(1), 7) } else { state.release(&id) };
            let free_or_own = state.owner().is_none_or(|owner| owner.manager == id);
            proptest::prop_assert_eq!(next.is_ok(), free_or_own && (takes || state.owner().is_some()));
            if let Ok(next) = next {
                proptest::prop_assert_eq!(next.owner().is_some(), takes);
                state = next;
            }
        }
    }

    #[test]
    fn any_text_for_a_url_or_a_certificate_is_answered_without_a_panic(text in ".{0,200}") {
        let _ = ManagerUrl::split(&text);
        let _ = ManagerUrl::split(&format!("https://{text}"));
        let _ = OwnerCertificate::parse(&text);
    }
}
