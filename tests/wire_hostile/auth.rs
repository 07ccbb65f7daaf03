//! Passwords: wrong ones, many of them, and what must never be seen of the right one.

use crate::support::*;
use dom0d::model::Secret;
use dom0d::wire::{Policy, Role, Value, hash_password};
use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

/// All that is logged in this process, at every level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn log() -> Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        log
    })
    .clone()
}

async fn answer(host: &Host, headers: &str) -> String {
    host.say(&post(&format!("{headers}{CLOSE}"), &echo_call("x"))).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_right_user_with_the_right_password_is_let_in_and_nothing_of_it_is_logged() {
    let log = log();
    let host = start();
    let encoded = good().trim_end().rsplit(' ').next().unwrap().to_owned();
    let lines: Vec<(String, &str)> = vec![
        (good(), "200"),
        (format!("Authorization: basic {encoded}\r\n"), "200"),
        (String::new(), "403"),
        (basic("oracle", "wrong"), "403"),
        (basic("oracle", ""), "403"),
        (basic("oracle", &format!("{PASSWORD} ")), "403"),
        (basic("root", PASSWORD), "403"),
        (basic("", PASSWORD), "403"),
        (basic("ora\ncle", PASSWORD), "403"),
        (basic("oracle\n", PASSWORD), "403"),
        (basic("oracle\0", PASSWORD), "403"),
        (basic("ORACLE", PASSWORD), "403"),
        (format!("Authorization: Bearer {encoded}\r\n"), "403"),
        (format!("Authorization: Basic{encoded}\r\n"), "403"),
        ("Authorization: Basic\r\n".to_owned(), "403"),
        ("Authorization: Basic !!!!\r\n".to_owned(), "403"),
        ("Authorization: Basic /////w==\r\n".to_owned(), "403"),
        (format!("Authorization: Basic {}\r\n", "A".repeat(8000)), "403"),
        (format!("{}{}", good(), good()), "403"),
        (format!("{}{}", basic("oracle", "wrong"), good()), "403"),
    ];
    for (headers, expected) in lines {
        let answer = answer(&host, &headers).await;
        assert_eq!(status(&answer), expected, "{headers}");
        assert!(!answer.contains(PASSWORD) && !answer.contains(&encoded));
    }
    let in_url =
        format!("POST http://oracle:{PASSWORD}@host/RPC2 HTTP/1.1\r\n{CLOSE}Content-Length: 0\r\n\r\n");
    let in_url = in_url.replace(PASSWORD, "hunter2hunter2");
    assert_ne!(status(&host.say(in_url.as_bytes()).await), "200");

    let logged = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    assert!(logged.contains("Unauthorized access attempt address=127.0.0.1:"), "the log watchers' line");
    for secret in [PASSWORD, &encoded, "hunter2hunter2"] {
        assert!(!logged.contains(secret), "a secret is in the log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_refusal_comes_before_the_body_is_sent() {
    let host = start();
    let head = "POST /RPC2 HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n";
    assert_eq!(status(&host.say(head.as_bytes()).await), "403");
    // And the client that sends it all the same can still read why.
    let answer = host.say(&post(&basic("oracle", "wrong"), &vec![b'x'; 200_000])).await;
    assert_eq!(status(&answer), "403");
    assert_eq!(host.server.metrics().calls.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_brute_force_is_stopped_and_the_manager_at_the_same_address_is_not() {
    let host = start_with(settings(), 3);
    let mut manager = host.client(Some(PASSWORD), None);
    manager.call("echo", &[], PATIENCE).await.unwrap();
    let begun = Instant::now();
    for attempt in 0..50 {
        assert_eq!(status(&answer(&host, &basic("oracle", &format!("guess {attempt}"))).await), "403");
    }
    // Known credentials pass, on the kept connection and on a new one.
    manager.call("echo", &[], PATIENCE).await.unwrap();
    assert_eq!(status(&answer(&host, &good()).await), "200");
    // The right password, if never seen before, waits like all others: else the guesses would be worth making.
    let anew = hash_password(&Secret::new(PASSWORD)).unwrap();
    host.gate.set_policy(Policy { password_hash: Some(anew), ..policy() });
    let status_now = status(&answer(&host, &good()).await).to_owned();
    // As long as it is not that one attempt already.
    assert!(status_now == "403" || begun.elapsed() > std::time::Duration::from_secs(4), "{status_now}");
    // But not for long: every few seconds one attempt is let through.
    let end = Instant::now() + PATIENCE;
    while status(&answer(&host, &good()).await) != "200" {
        assert!(Instant::now() < end, "the manager with the right password stays outside");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn known_credentials_cost_no_computation() {
    let host = start();
    let mut client = host.client(Some(PASSWORD), None);
    client.call("echo", &[], PATIENCE).await.unwrap();
    let begun = Instant::now();
    hash_password(&Secret::new(PASSWORD)).unwrap();
    let computed = begun.elapsed();
    let mut calls = Vec::new();
    for _ in 0..100 {
        let begun = Instant::now();
        client.call("echo", &[], PATIENCE).await.unwrap();
        calls.push(begun.elapsed());
    }
    calls.sort_unstable();
    assert!(calls[50] < computed, "half of the calls take {:?}, to compute one {computed:?}", calls[50]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_come_at_once_with_the_right_password_are_all_let_in() {
    let host = start_with(settings(), 3);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let mut client = host.client(Some(PASSWORD), None);
        calls.spawn(async move { client.call("echo", &[Value::from(1)], PATIENCE).await });
    }
    while let Some(answer) = calls.join_next().await {
        assert_eq!(answer.unwrap().unwrap(), Value::from(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_password_or_role_acts_on_the_next_request_of_an_open_connection() {
    let host = start();
    let mut client = host.client(Some(PASSWORD), None);
    client.call("echo", &[], PATIENCE).await.unwrap();
    let other = hash_password(&Secret::new("another password")).unwrap();
    host.gate.set_policy(Policy { password_hash: Some(other), ..policy() });
    assert!(client.call("echo", &[], PATIENCE).await.is_err(), "the old password");
    host.client(Some("another password"), None).call("echo", &[], PATIENCE).await.unwrap();
    host.gate.set_policy(Policy { password_role: None, ..policy() });
    assert!(client.call("echo", &[], PATIENCE).await.is_err(), "a password without a role");
    host.gate.set_policy(Policy { password_role: Some(Role::Viewer), ..policy() });
    client.call("echo", &[], PATIENCE).await.unwrap();
    host.gate.set_policy(Policy { password_hash: None, ..policy() });
    assert!(client.call("echo", &[], PATIENCE).await.is_err(), "no password is set");
}

#[test]
fn two_hashes_of_one_password_differ_and_are_argon2id() {
    let [a, b] = [(), ()].map(|()| hash_password(&Secret::new("x")).unwrap());
    assert_ne!(a, b);
    assert!(a.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{a}");
}
