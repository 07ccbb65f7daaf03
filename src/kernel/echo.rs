//! Whether others answer: ICMP echo (RFC 792, RFC 4443) and TCP connections.
//!
//! The echo goes by a datagram socket of ICMP (icmp(7)), or by a raw one where the kernel lets only some groups have the
//! former. Its answer is known by what it carries, since with a raw socket all answers of the host come.

use super::PING;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::net::{TcpSocket, UdpSocket};

/// A socket for [`connects`]. It acts in the network namespace of the thread that makes it.
pub(super) fn connection_to(address: SocketAddr) -> std::io::Result<TcpSocket> {
    if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}

pub(super) async fn connects(socket: TcpSocket, address: SocketAddr, patience: Duration) -> bool {
    matches!(tokio::time::timeout(patience, socket.connect(address)).await, Ok(Ok(_)))
}

/// Waits for [`PING`] at most. `socket`: from [`echo_to`].
pub(super) async fn ping(socket: OwnedFd, address: IpAddr) -> bool {
    // Random, so that an answer to somebody else's echo is not taken for ours.
    let mark = *uuid::Uuid::new_v4().as_bytes();
    matches!(tokio::time::timeout(PING, ask(socket, address, mark)).await, Ok(Ok(())))
}

/// Until the answer comes.
async fn ask(socket: OwnedFd, address: IpAddr, mark: [u8; 16]) -> std::io::Result<()> {
    // One of datagrams like those of UDP, but for the protocol.
    let socket = UdpSocket::from_std(std::net::UdpSocket::from(socket))?;
    socket.send_to(&message(address, mark), SocketAddr::new(address, 0)).await?;
    let mut answer = [0; 256];
    loop {
        let size = socket.recv(&mut answer).await?;
        if is_answer(address, &answer[..size], mark) {
            return Ok(());
        }
    }
}

/// A socket for [`ping`]. It acts in the network namespace of the thread that makes it.
pub(super) fn echo_to(address: IpAddr) -> std::io::Result<OwnedFd> {
    let (family, protocol) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = socket(family, SockType::Datagram, flags, protocol);
    Ok(made.or_else(|_| socket(family, SockType::Raw, flags, protocol))?)
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
        let own = IpAddr::from([127, 0, 0, 1]);
        assert!(ping(echo_to(own).unwrap(), own).await);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connects = || connects(connection_to(address).unwrap(), address, Duration::from_secs(10));
        assert!(connects().await);
        drop(listener);
        assert!(!connects().await);
    }
}
