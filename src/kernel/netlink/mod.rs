//! rtnetlink(7): the real kernel's links, addresses and routes, read ([`dump`]) and changed ([`change`]), and its notices of
//! what others change ([`notices`]); `reach` asks whether an address answers.
//!
//! The kernel does what a message asks while it is being sent, and may take its time (the removal of a link waits for all
//! processors, 20 ms each). So the socket lives on a thread of its own, in the handle's namespace; it is opened at the first
//! question, kept, and opened anew when that thread has ended. Each call ends by its deadline. Changes are made on that
//! thread too: from one to the next no other thread has to wake up.

mod change;
mod dump;
mod notices;
mod reach;

pub(super) use notices::{Counts, RECEIVE_BUFFER, ring_on_notices};

use super::KernelError;
use super::place::Place;
use crate::model::network::{Neighbour, NetworkView, Refused};
use futures_util::{Stream, StreamExt};
use nix::errno::Errno;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, oneshot};

/// Of each call of the trait.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// How often a dump is begun that the kernel says was overtaken by changes. In a storm of changes each dump may be.
const DUMP_ATTEMPTS: usize = 50;
/// netlink(7): what an error message has before its attributes when NETLINK_CAP_ACK is set: the header of what was asked.
const HEADER_BYTES: usize = 16;
/// The kernel keeps some 1,024 of each family (`gc_thresh3`; arp(7)), unless told otherwise.
const MAX_NEIGHBOURS: usize = 8192;
/// `NLMSGERR_ATTR_MSG` (linux/netlink.h).
const ERROR_TEXT: u16 = 1;

type Message = NetlinkMessage<RouteNetlinkMessage>;

/// One namespace's rtnetlink, by one socket.
#[derive(Debug, Default)]
pub(super) struct Netlink {
    place: Place,
    socket: Mutex<Option<Open>>,
    asked: AtomicU64,
    failed: AtomicU64,
}

/// An open socket, and the runtime of the thread that it lives on.
#[derive(Debug, Clone)]
struct Open {
    handle: rtnetlink::Handle,
    thread: tokio::runtime::Handle,
}

/// What was answered to one message.
#[derive(Debug, Default)]
struct Answers {
    messages: Vec<RouteNetlinkMessage>,
    /// The tables changed meanwhile: some may be old, some new, some missing.
    interrupted: bool,
    /// The kernel has said that this is all.
    whole: bool,
    error: Option<Refusal>,
}

/// An error number with the kernel's words, if it had some.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    errno: Errno,
    text: Option<String>,
}

impl Netlink {
    pub(super) fn new(place: Place) -> Self {
        Self { place, ..Self::default() }
    }

    /// Questions and changes so far, and those that were refused or not answered.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.asked.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }

    /// The open socket, or a new one.
    async fn open(&self) -> Result<Open, KernelError> {
        let mut socket = self.socket.lock().await;
        if let Some(open) = &*socket {
            return Ok(open.clone());
        }
        let (tx, opened) = oneshot::channel();
        let serve = |entered: std::io::Result<()>| async move {
            match entered.and_then(|()| connect()) {
                Ok((connection, handle)) => {
                    drop(tx.send(Ok(Open { handle, thread: tokio::runtime::Handle::current() })));
                    connection.await;
                }
                Err(error) => drop(tx.send(Err(error))),
            }
        };
        self.place.inhabit("netlink", serve).map_err(unanswered)?;
        let open = opened.await.map_err(unanswered)?.map_err(unanswered)?;
        *socket = Some(open.clone());
        Ok(open)
    }

    /// The next question opens a new socket.
    pub(super) async fn close(&self) {
        *self.socket.lock().await = None;
    }

    /// One message and all its answers. An answer that did not come whole closes the socket.
    async fn ask(&self, message: RouteNetlinkMessage, flags: u16) -> Result<Answers, KernelError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let answers = self.ask_and_wait(message, flags).await;
        let failed = answers.as_ref().map_or(true, |answers| answers.error.is_some());
        self.failed.fetch_add(u64::from(failed), Ordering::Relaxed);
        answers
    }

    async fn ask_and_wait(&self, message: RouteNetlinkMessage, flags: u16) -> Result<Answers, KernelError> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        let asked = async {
            // A socket whose thread has ended refuses at once, and nothing was asked then.
            for _ in 0..2 {
                match self.open().await?.handle.request(message.clone()) {
                    Ok(stream) => return Ok(gather(stream).await),
                    Err(_) => self.close().await,
                }
            }
            Err(KernelError::Unanswered("no netlink socket stays open".to_owned()))
        };
        let answers = match tokio::time::timeout(DEADLINE, asked).await {
            Ok(answers) => answers?,
            Err(_) => {
                self.close().await;
                return Err(KernelError::Unanswered("no answer in time".to_owned()));
            }
        };
        if !answers.whole {
            self.close().await;
            return Err(KernelError::Unanswered("the netlink socket broke".to_owned()));
        }
        Ok(answers)
    }

    /// A change, which the kernel answers with yes or an error.
    async fn order(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Result<(), Refusal>, KernelError> {
        let answers = self.ask(message, NLM_F_ACK | flags).await?;
        Ok(answers.error.map_or(Ok(()), Err))
    }

    /// One object.
    async fn get(
        &self,
        message: RouteNetlinkMessage,
    ) -> Result<Result<Option<RouteNetlinkMessage>, Refusal>, KernelError> {
        let answers = self.ask(message, 0).await?;
        Ok(answers.error.map_or_else(|| Ok(answers.messages.into_iter().next()), Err))
    }

    /// A whole table, as it was at one moment.
    async fn dump(&self, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        repeated(|| self.ask(message.clone(), NLM_F_DUMP)).await
    }

    /// Who is known on the links' networks; at most [`MAX_NEIGHBOURS`].
    pub(super) async fn neighbours(&self) -> Result<Vec<Neighbour>, KernelError> {
        match tokio::time::timeout(DEADLINE, dump::neighbours(self)).await {
            Ok(all) => all,
            Err(_) => Err(KernelError::Unanswered("no answer in time".to_owned())),
        }
    }

    /// Everything that a plan may be about.
    pub(super) async fn network(&self) -> Result<NetworkView, KernelError> {
        match tokio::time::timeout(DEADLINE, dump::network(self)).await {
            Ok(view) => view,
            Err(_) => Err(KernelError::Unanswered("no answer in time".to_owned())),
        }
    }
}

/// Asks again while what was answered is of no one moment.
async fn repeated<F>(ask: impl Fn() -> F) -> Result<Vec<RouteNetlinkMessage>, KernelError>
where
    F: Future<Output = Result<Answers, KernelError>>,
{
    for _ in 0..DUMP_ATTEMPTS {
        let answers = ask().await?;
        if let Some(error) = answers.error {
            return Err(KernelError::Refused(error.into()));
        }
        if !answers.interrupted {
            return Ok(answers.messages);
        }
    }
    Err(KernelError::Unanswered("the network did not stand still to be read".to_owned()))
}

type Connection = rtnetlink::proto::Connection<RouteNetlinkMessage>;

fn connect() -> std::io::Result<(Connection, rtnetlink::Handle)> {
    let (mut connection, handle, _) = rtnetlink::new_connection()?;
    // Without these the end of an answer cannot be told from the end of the socket.
    connection.set_forward_done(true);
    connection.set_forward_ack(true);
    let socket = connection.socket_mut();
    let socket = rtnetlink::sys::AsyncSocket::socket_ref(socket);
    // Linux 4.12: the kernel's own words on an error, without the message repeated. An older one refuses these.
    let _ = socket.set_ext_ack(true).and_then(|()| socket.set_cap_ack(true));
    Ok((connection, handle))
}

async fn gather(answers: impl Stream<Item = Message>) -> Answers {
    let mut all = Answers::default();
    let mut answers = std::pin::pin!(answers);
    while let Some(message) = answers.next().await {
        let flags = message.header.flags;
        all.interrupted |= flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(inner) => {
                // One object that was asked for comes alone; a dump ends with a message of its own.
                all.whole |= flags & rtnetlink::packet_core::NLM_F_MULTIPART == 0;
                all.messages.push(inner);
            }
            NetlinkPayload::Error(error) => {
                all.whole = true;
                all.error = error.code.map(|code| Refusal::new(code.get(), &error.header));
            }
            NetlinkPayload::Done(done) => {
                all.whole = true;
                if done.code != 0 {
                    all.error = Some(Refusal::new(done.code, &[]));
                }
            }
            NetlinkPayload::Overrun(_) => all.interrupted = true,
            _ => {}
        }
    }
    all
}

impl Refusal {
    /// `code` is negative; `rest` is what follows it in the message.
    fn new(code: i32, rest: &[u8]) -> Self {
        let text = rest.get(HEADER_BYTES..).and_then(error_text);
        Self { errno: Errno::from_raw(code.saturating_neg()), text }
    }
}

/// The kernel's words among the attributes (length and type, 16 bits each by the machine's order, padded to four bytes).
fn error_text(mut attributes: &[u8]) -> Option<String> {
    while let [a, b, c, d, ..] = attributes {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([*c, *d]) == ERROR_TEXT {
            let text = String::from_utf8_lossy(value);
            let text = text.trim_end_matches('\0');
            return (!text.is_empty()).then(|| text.chars().filter(|c| !c.is_control()).take(200).collect());
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

impl From<Refusal> for Refused {
    /// What each number means by itself; where it means more, `change` knows.
    fn from(refusal: Refusal) -> Self {
        match refusal.errno {
            Errno::EEXIST => Self::Exists,
            Errno::ENODEV => Self::NoSuchLink,
            Errno::EADDRNOTAVAIL => Self::NoSuchAddress,
            Errno::ESRCH => Self::NoSuchRoute,
            Errno::EOPNOTSUPP => Self::NotSupported,
            Errno::EBUSY | Errno::ENOTEMPTY => Self::Busy,
            Errno::ENETDOWN => Self::Down,
            Errno::ENETUNREACH | Errno::EHOSTUNREACH => Self::Unreachable,
            Errno::ELOOP => Self::Loop,
            Errno::ERANGE => Self::Range,
            Errno::EPERM | Errno::EACCES => Self::NotPermitted,
            Errno::EINVAL if refusal.text.is_none() => Self::Range,
            errno => Self::Other(refusal.text.unwrap_or_else(|| errno.desc().to_owned())),
        }
    }
}

impl From<Refusal> for KernelError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.into())
    }
}

fn unanswered(error: impl std::fmt::Display) -> KernelError {
    KernelError::Unanswered(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn answers(interrupted: bool) -> Answers {
        Answers { interrupted, whole: true, ..Answers::default() }
    }

    #[tokio::test]
    async fn a_dump_that_was_overtaken_by_a_change_is_asked_for_again() {
        let asked = Cell::new(0);
        let ask = || {
            asked.set(asked.get() + 1);
            let interrupted = asked.get() < 3;
            async move { Ok(answers(interrupted)) }
        };
        assert!(repeated(ask).await.unwrap().is_empty());
        assert_eq!(asked.get(), 3);
    }

    #[tokio::test]
    async fn a_network_that_never_stands_still_is_an_error_and_no_loop_without_end() {
        let told = repeated(|| async { Ok(answers(true)) }).await;
        assert!(matches!(told, Err(KernelError::Unanswered(_))));
    }

    #[tokio::test]
    async fn an_interruption_is_seen_in_any_message_of_a_dump_also_in_its_last() {
        let done = |flags| {
            let mut message = Message::from(RouteNetlinkMessage::GetLink(Default::default()));
            message.payload = NetlinkPayload::Done(Default::default());
            message.header.flags = flags;
            message
        };
        let told = gather(futures_util::stream::iter([done(NLM_F_DUMP_INTR)])).await;
        assert!(told.interrupted && told.whole);
        let told = gather(futures_util::stream::iter([done(0)])).await;
        assert!(!told.interrupted && told.whole);
        assert!(!gather(futures_util::stream::iter([])).await.whole, "a socket that breaks ends no answer");
    }

    #[test]
    fn the_kernels_own_words_are_found_behind_the_header() {
        let mut rest = vec![7; HEADER_BYTES];
        // An attribute of another kind (`NLMSGERR_ATTR_OFFS`), then the text.
        rest.extend([8_u16.to_ne_bytes(), 2_u16.to_ne_bytes()].concat());
        rest.extend([1, 2, 3, 4]);
        rest.extend([11_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat());
        rest.extend(b"no way\0\0");
        let refusal = Refusal::new(-libc::EINVAL, &rest);
        assert_eq!(refusal, Refusal { errno: Errno::EINVAL, text: Some("no way".to_owned()) });
        assert_eq!(Refused::from(refusal), Refused::Other("no way".to_owned()));
        assert_eq!(Refused::from(Refusal::new(-libc::EINVAL, &[])), Refused::Range);
        for broken in [&[][..], &[1], &[3, 0, 1, 0], &[0, 0, 0, 0], &[255, 255, 1, 0, 65]] {
            assert_eq!(error_text(broken), None, "{broken:?}");
        }
    }
}
