//! How fast the codec reads a large request, beside the `xmlrpc` crate's own parser: `cargo bench --bench codec`.
//!
//! The crate's parser reads answers only, so it is given the same value as an answer; ours is measured on both.
//! Rounds of the two alternate, and the time is CPU time, so that what else the machine does matters little.
#![allow(clippy::unwrap_used, reason = "a bench: a failure shall stop it")]
#![allow(clippy::explicit_write, reason = "println is for what must never print")]

use dom0d::config;
use dom0d::wire::{Answer, Value, decode_call, decode_response, encode_call, encode_response, encode_value};
use nix::time::ClockId;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::Write;
use std::time::Duration;

const VMS: usize = 1150;
const ROUNDS: usize = 31;

fn main() {
    // Without it we were only built, with all other targets.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let value = request();
    let limits = config::Wire::default();
    let call = encode_call("vms_sync", std::slice::from_ref(&value));
    let answer = joined(&encode_response(&Answer::Value(value.clone()), usize::MAX).unwrap());
    let own_call = || drop(black_box(decode_call(black_box(&call), &limits).unwrap()));
    let own_answer = || drop(black_box(decode_response(black_box(&answer), &limits).unwrap().unwrap()));
    let theirs = || drop(black_box(xmlrpc::Request::new("x").call(Canned(black_box(&answer))).unwrap()));
    let encode = || drop(black_box(encode_value(black_box(&value))));
    // The memory that a parse frees is used by the next: what is measured is parsing, not the kernel's page faults.
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        times[0].push(time(own_call));
        times[1].push(time(own_answer));
        times[2].push(time(theirs));
        times[3].push(time(encode));
    }
    let [own_call, own_answer, theirs, encode] = times.map(median);
    let rate = |bytes: usize, seconds: f64| bytes as f64 / seconds / 1e6;
    say(&format!("document: {} bytes, {VMS} VM records, {ROUNDS} rounds, medians", call.len()));
    say(&format!(
        "parse request, ours:          {:7.2} ms  {:6.1} MB/s",
        own_call * 1e3,
        rate(call.len(), own_call)
    ));
    say(&format!(
        "parse answer, ours:           {:7.2} ms  {:6.1} MB/s",
        own_answer * 1e3,
        rate(answer.len(), own_answer)
    ));
    say(&format!(
        "parse answer, xmlrpc crate:   {:7.2} ms  {:6.1} MB/s",
        theirs * 1e3,
        rate(answer.len(), theirs)
    ));
    say(&format!(
        "encode, ours:                 {:7.2} ms  {:6.1} MB/s",
        encode * 1e3,
        rate(call.len(), encode)
    ));
    say(&format!("ratio, request:               {:7.1}     bar: 7 or more", theirs / own_call));
    say(&format!("ratio, answer:                {:7.1}", theirs / own_answer));
}

fn time(work: impl Fn()) -> f64 {
    let now = || Duration::from(ClockId::CLOCK_THREAD_CPUTIME_ID.now().unwrap());
    let start = now();
    work();
    (now() - start).as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn joined(chunks: &[bytes::Bytes]) -> Vec<u8> {
    chunks.concat()
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap();
}

/// Answers what it was given.
struct Canned<'a>(&'a [u8]);

impl<'a> xmlrpc::Transport for Canned<'a> {
    type Stream = &'a [u8];

    fn transmit(self, _: &xmlrpc::Request<'_>) -> Result<&'a [u8], Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0)
    }
}

/// About a megabyte, as a manager that tells all its VMs would send it.
fn request() -> Value {
    Value::Array((0..VMS).map(vm).collect())
}

fn vm(n: usize) -> Value {
    let text = |text: String| Value::String(text);
    let id = format!("{:08x}-0004-4000-8000-{:012x}", n * 7919, n);
    let fields = [
        ("uuid", text(id.clone())),
        ("OVM_simple_name", text(format!("web-{n:04} & \"front\""))),
        ("memory", Value::Int(2048)),
        ("maxmem", Value::Int(4096)),
        ("vcpus", Value::Int(2)),
        ("cpu_weight", Value::Int(256)),
        ("OVM_high_availability", Value::Bool(n.is_multiple_of(3))),
        ("bootloader", text("/usr/bin/pygrub".to_owned())),
        ("on_crash", text("restart".to_owned())),
        (
            "disk",
            Value::Array(vec![text(format!(
                "file:/OVS/Repositories/0004fb0000030000d4f1e2c3b4a59687/VirtualDisks/{id}.img,xvda,w"
            ))]),
        ),
        (
            "vif",
            Value::Array(vec![text(format!(
                "mac=00:21:f6:00:{:02x}:{:02x},bridge=xenbr0",
                n / 256,
                n % 256
            ))]),
        ),
    ];
    Value::Struct(fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<BTreeMap<_, _>>())
}
