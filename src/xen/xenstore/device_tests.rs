//! How requests go to the kernel's device, which keeps no copy of one: a made-up device in virtual time, where time passes
//! only when nobody has anything left to do.

use super::codec::{self, Decoder, Kind, Message};
use super::endpoint::{Connection, Endpoint};
use super::runner::{Command, Runner, Session};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{Notify, mpsc, oneshot};

async fn next_request(device: &mut DuplexStream, decoder: &mut Decoder) -> Message {
    loop {
        if let Some(message) = decoder.next().unwrap() {
            return message;
        }
        assert_ne!(device.read_buf(decoder.buffer()).await.unwrap(), 0);
    }
}

/// Answers each request a second later with its own words. How many requests were ever there at once.
async fn serve(mut device: DuplexStream, requests: usize) -> usize {
    let mut decoder = Decoder::default();
    let (mut waiting, mut most) = (Vec::new(), 0);
    for _ in 0..requests {
        if waiting.is_empty() {
            waiting.push(next_request(&mut device, &mut decoder).await);
        }
        let more = async {
            loop {
                waiting.push(next_request(&mut device, &mut decoder).await);
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), more).await;
        most = most.max(waiting.len());
        let asked = waiting.remove(0);
        device.write_all(&asked.encode().unwrap()).await.unwrap();
    }
    most
}

async fn asked_at_once(one_at_a_time: bool) -> usize {
    const REQUESTS: usize = 5;
    let (ours, device) = tokio::io::duplex(64 * 1024);
    let (commands, queue) = mpsc::channel(REQUESTS);
    let mut answers = Vec::new();
    for number in 0..REQUESTS {
        let (reply, answer) = oneshot::channel();
        let payload = Bytes::from(codec::arguments(&[&format!("/node/{number}")]));
        answers.push((payload.clone(), answer));
        commands.send(Command::Ask { kind: Kind::Read, transaction: None, payload, reply }).await.unwrap();
    }
    let mut runner = Runner::new(Endpoint::Any(Vec::new()), queue, Arc::new(Notify::new()));
    let connection = Connection { stream: Box::new(ours), one_at_a_time };
    let client = async {
        Session::new(&mut runner).run(connection).await;
    };
    let ask = async {
        for (payload, answer) in answers {
            assert_eq!(answer.await.unwrap().unwrap().payload, payload);
        }
        drop(commands);
    };
    let (most, (), ()) = tokio::join!(serve(device, REQUESTS), client, ask);
    most
}

#[tokio::test(start_paused = true)]
async fn the_device_gets_a_request_only_when_the_one_before_is_answered_and_a_socket_gets_all_at_once() {
    assert_eq!(asked_at_once(true).await, 1);
    assert_eq!(asked_at_once(false).await, 5);
}
