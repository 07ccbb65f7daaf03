//! Whether others answer: ICMP echo (RFC 792, RFC 4443) and TCP connections.
//!
//! The echo goes by a datagram socket of ICMP (icmp(7)), or by a raw one where the kernel lets only some groups have the
//! former. Its answer is known by what it carries, since with a raw socket all answers of the host come.

use super::PING;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, recv,
    sendto, setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

pub(super) async fn connects(address: SocketAddr, patience: Duration) -> bool {
    matches!(tokio::time::timeout(patience, tokio::net::TcpStream::connect(address)).await, Ok(Ok(_)))
}

/// Blocks for [`PING`] at most.
pub(super) fn ping(address: IpAddr) -> bool {
    // Random, so that an answer to somebody else's echo is not taken for ours.
    let mark = *uuid::Uuid::new_v4().as_bytes();
    ask(address, mark).unwrap_or(false)
}

fn ask(address: IpAddr, mark: [u8; 16]) -> nix::Result<bool> {
    let socket = open(address)?;
    let echo = message(address, mark);
    match address {
        IpAddr::V4(ip) => send(&socket, &echo, &SockaddrIn::from(std::net::SocketAddrV4::new(ip, 0)))?,
        IpAddr::V6(ip) => send(&socket, &echo, &SockaddrIn6::from(std::net::SocketAddrV6::new(ip, 0, 0, 0)))?,
    }
    let end = Instant::now() + PING;
    let mut answer = [0; 256];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let left_us = i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1);
        setsockopt(&socket, ReceiveTimeout, &TimeVal::microseconds(left_us))?;
        match recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()) {
            Ok(size) if is_answer(address, &answer[..size], mark) => return Ok(true),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

fn send<A: SockaddrLike>(socket: &OwnedFd, echo: &[u8], to: &A) -> nix::Result<()> {
    sendto(socket.as_raw_fd(), echo, to, MsgFlags::empty()).map(|_| ())
}

fn open(address: IpAddr) -> nix::Result<OwnedFd> {
    let (family, protocol) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)
        .or_else(|_| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol))
}

const REQUEST_V4: u8 = 8;
const REPLY_V4: u8 = 0;
const REQUEST_V6: u8 = 128;
const REPLY_V6: u8 = 129;

/// Type, code, checksum, identifier, number, and the mark. The kernel makes the checksum of ICMPv6, and of a datagram
/// socket's; a raw one's for IPv4 is ours.
fn message(address: IpAddr, mark: [u8; 16]) -> Vec<u8> {
    let kind = if address.is_ipv4() { REQUEST_V4 } else { REQUEST_V6 };
    let mut message = vec![kind, 0, 0, 0, mark[0], mark[1], 0, 1];
    message.extend(mark);
    if address.is_ipv4() {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// RFC 1071. The message has an even number of bytes.
fn checksum(message: &[u8]) -> u16 {
    let sum: u32 =
        message.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

/// A raw socket of IPv4 has the IP header before the message.
fn is_answer(address: IpAddr, packet: &[u8], mark: [u8; 16]) -> bool {
    let kind = if address.is_ipv4() { REPLY_V4 } else { REPLY_V6 };
    let header = match packet.first() {
        Some(first) if address.is_ipv4() && first >> 4 == 4 => usize::from(first & 0x0f) * 4,
        _ => 0,
    };
    let message = packet.get(header..).unwrap_or_default();
    message.first() == Some(&kind) && message.get(8..24) == Some(&mark[..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_over_a_message_with_its_checksum_is_zero() {
        let message = message(IpAddr::from([192, 0, 2, 1]), [0xa5; 16]);
        assert_eq!(checksum(&message), 0);
    }

    #[tokio::test]
    async fn the_loopback_address_answers_and_a_port_that_listens_takes_a_connection() {
        assert!(ping(IpAddr::from([127, 0, 0, 1])));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(connects(address, Duration::from_secs(10)).await);
        drop(listener);
        assert!(!connects(address, Duration::from_secs(10)).await);
    }
}
