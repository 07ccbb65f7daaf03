//! What a link's driver tells by SIOCETHTOOL (netdevice(7), linux/ethtool.h): its name and bus, its permanent address, what
//! wakes the host, speed and negotiation. A driver that does not answer a question leaves the answer out.

#![allow(unsafe_code, reason = "the ioctl takes memory by address")]

use crate::model::network::LinkFacts;
use crate::model::{IfName, Mac};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

const SIOCETHTOOL: u64 = 0x8946;
/// `ETHTOOL_G…`.
const DRIVER_INFO: u32 = 0x03;
const WAKE_ON_LAN: u32 = 0x05;
const PERMANENT_ADDRESS: u32 = 0x20;
const LINK_SETTINGS: u32 = 0x4c;

/// `struct ethtool_drvinfo`: after the command driver, version, firmware and bus, 32 bytes each.
const DRIVER_INFO_BYTES: usize = 196;
const DRIVER: std::ops::Range<usize> = 4..36;
const BUS: std::ops::Range<usize> = 100..132;
/// `struct ethtool_wolinfo`: what is possible, what is on, a password.
const WAKE_ON_LAN_BYTES: usize = 20;
/// `struct ethtool_perm_addr`: command, size, then the address.
const MAX_ADDRESS_BYTES: u32 = 32;
/// `struct ethtool_link_settings`: speed at 4, duplex at 8, negotiation at 11, the masks' length in words at 15; three masks
/// of at most 127 words follow.
const LINK_SETTINGS_BYTES: usize = 48 + 3 * 4 * 127;
const MASK_WORDS: usize = 15;

/// `WAKE_PHY` to `WAKE_FILTER` in the order of their bits, as ethtool(8) writes them.
const WAKE_LETTERS: &str = "pumbagsf";

/// Adds what the driver tells to what is known. Runs in the link's namespace.
pub(super) fn add_to(facts: &mut LinkFacts, link: &IfName) -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let ask = |words: &[u32], bytes: usize| ask(&socket, link, words, bytes);
    if let Some(answer) = ask(&[DRIVER_INFO], DRIVER_INFO_BYTES) {
        facts.driver = text(&answer[DRIVER]).or(facts.driver.take());
        facts.bus = text(&answer[BUS]).or(facts.bus.take());
    }
    if let Some(answer) = ask(&[WAKE_ON_LAN], WAKE_ON_LAN_BYTES) {
        facts.wake_on_supported = Some(letters(word(&answer, 4)));
        facts.wake_on = Some(letters(word(&answer, 8)));
    }
    if let Some(answer) = ask(&[PERMANENT_ADDRESS, MAX_ADDRESS_BYTES], 8 + MAX_ADDRESS_BYTES as usize) {
        facts.permanent_mac = permanent_mac(&answer);
    }
    // The first answer tells how long the masks are, by a negative number; only with that length comes the rest.
    let first = ask(&[LINK_SETTINGS], LINK_SETTINGS_BYTES);
    let words = first.map(|answer| answer[MASK_WORDS].cast_signed().unsigned_abs());
    if let Some(words @ 1..=127) = words {
        let length = u32::from_ne_bytes([0, 0, 0, words]);
        if let Some(answer) = ask(&[LINK_SETTINGS, 0, 0, length], LINK_SETTINGS_BYTES) {
            add_settings(facts, &answer);
        }
    }
    Ok(())
}

/// One question: its first words, and room for the answer. `None`: not answered.
fn ask(socket: &OwnedFd, link: &IfName, words: &[u32], bytes: usize) -> Option<Vec<u8>> {
    let mut buffer = vec![0_u32; bytes.div_ceil(4)];
    buffer[..words.len()].copy_from_slice(words);
    // SAFETY: all of `ifreq` is numbers and a pointer, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(link.as_str().bytes()) {
        *to = from.cast_signed() as libc::c_char;
    }
    request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel reads the name and the pointer of `request`, which has room for them, and reads and writes the
    // structure of the command at the pointer; the buffer is at least as long as that structure and lives.
    let answered =
        unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, std::ptr::from_mut(&mut request)) };
    (answered == 0).then(|| buffer.iter().flat_map(|word| word.to_ne_bytes()).collect())
}

fn word(answer: &[u8], at: usize) -> u32 {
    answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn text(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0).next()?;
    let text = std::str::from_utf8(text).ok()?;
    // A driver without a bus of its own says that it has none.
    (!text.is_empty() && text != "N/A").then(|| text.to_owned())
}

fn letters(bits: u32) -> String {
    let lit = WAKE_LETTERS.chars().enumerate().filter(|(bit, _)| bits & (1 << bit) != 0);
    lit.map(|(_, letter)| letter).collect()
}

/// All zero: the link has none.
fn permanent_mac(answer: &[u8]) -> Option<String> {
    let bytes: [u8; 6] = answer.get(8..14).filter(|_| word(answer, 4) == 6)?.try_into().ok()?;
    (bytes != [0; 6]).then(|| Mac::from_bytes(bytes).as_str())
}

/// `SPEED_UNKNOWN` is all ones, `DUPLEX_UNKNOWN` 255.
fn add_settings(facts: &mut LinkFacts, answer: &[u8]) {
    let speed = word(answer, 4);
    if speed != 0 && speed != u32::MAX {
        facts.speed_mbps = Some(speed);
    }
    match answer.get(8) {
        Some(0) => facts.full_duplex = Some(false),
        Some(1) => facts.full_duplex = Some(true),
        _ => {}
    }
    facts.autonegotiation = answer.get(11).map(|on| *on != 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wakes_the_host_is_written_as_ethtool_writes_it() {
        assert_eq!(letters(0), "");
        assert_eq!(letters(1 << 5), "g");
        assert_eq!(letters(0b0010_1111), "pumbg");
        assert_eq!(letters(u32::MAX), "pumbagsf");
    }

    #[test]
    fn a_permanent_address_is_six_bytes_and_not_all_zero() {
        let answer = |size: u32, bytes: &[u8]| {
            let mut answer = vec![0; 4];
            answer.extend(size.to_ne_bytes());
            answer.extend(bytes);
            answer.resize(40, 0);
            answer
        };
        assert_eq!(permanent_mac(&answer(6, &[2, 0, 0, 0, 0, 9])).as_deref(), Some("02:00:00:00:00:09"));
        assert_eq!(permanent_mac(&answer(6, &[0; 6])), None);
        assert_eq!(permanent_mac(&answer(20, &[1; 20])), None);
    }

    #[test]
    fn unknown_speed_and_duplex_are_absent() {
        let mut answer = vec![0; LINK_SETTINGS_BYTES];
        answer[4..8].fill(255);
        answer[8] = 255;
        let mut facts = LinkFacts::default();
        add_settings(&mut facts, &answer);
        assert_eq!(facts, LinkFacts { autonegotiation: Some(false), ..LinkFacts::default() });
        answer[4..8].copy_from_slice(&1000_u32.to_ne_bytes());
        (answer[8], answer[11]) = (1, 1);
        add_settings(&mut facts, &answer);
        assert_eq!(
            (facts.speed_mbps, facts.full_duplex, facts.autonegotiation),
            (Some(1000), Some(true), Some(true))
        );
    }

    #[test]
    fn a_question_to_a_link_that_is_not_there_adds_nothing() {
        let mut facts = LinkFacts::default();
        add_to(&mut facts, &"no-such-link".parse().unwrap()).unwrap();
        assert_eq!(facts, LinkFacts::default());
    }
}
