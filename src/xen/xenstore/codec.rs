//! The wire form (xen/include/public/io/xs_wire.h): messages of a 16-byte header, four 32-bit numbers of the
//! machine's own byte order (type, request, transaction, length), and a payload of at most 4,096 bytes. Pure:
//! bytes in, messages out, at whatever places a read cuts them. An answer may be longer than the protocol says:
//! oxenstored tells a long list of children whole, where the C xenstored refuses it and tells it in parts.

use super::{MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES, Refusal, Result, StoreError};
use bytes::{Buf, BufMut, Bytes, BytesMut};

pub(super) const HEADER_BYTES: usize = 16;

/// A message's type, of those we send or understand (`xsd_sockmsg_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory = 1,
    Read = 2,
    GetPerms = 3,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    GetDomainPath = 10,
    Write = 11,
    Mkdir = 12,
    Rm = 13,
    SetPerms = 14,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
    ResetWatches = 21,
    DirectoryPart = 22,
}

impl Kind {
    pub(super) const ALL: [Self; 17] = [
        Self::Directory,
        Self::Read,
        Self::GetPerms,
        Self::Watch,
        Self::Unwatch,
        Self::TransactionStart,
        Self::TransactionEnd,
        Self::GetDomainPath,
        Self::Write,
        Self::Mkdir,
        Self::Rm,
        Self::SetPerms,
        Self::WatchEvent,
        Self::Error,
        Self::IsDomainIntroduced,
        Self::ResetWatches,
        Self::DirectoryPart,
    ];

    fn parse(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// Whether asking twice does no harm, so that a broken connection need not be the caller's affair.
    pub(super) fn only_reads(self) -> bool {
        matches!(
            self,
            Self::Directory
                | Self::DirectoryPart
                | Self::Read
                | Self::GetPerms
                | Self::GetDomainPath
                | Self::IsDomainIntroduced
        )
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub kind: Kind,
    pub request: u32,
    /// 0: none.
    pub transaction: u32,
    pub payload: Bytes,
}

impl Message {
    /// The whole message as one piece: the device takes a message a write.
    pub(super) fn encode(&self) -> Result<Bytes> {
        let length = u32::try_from(self.payload.len()).ok().filter(|l| *l as usize <= MAX_PAYLOAD_BYTES);
        let length = length.ok_or(StoreError::TooLarge(self.payload.len()))?;
        let mut bytes = BytesMut::with_capacity(HEADER_BYTES + self.payload.len());
        for number in [self.kind as u32, self.request, self.transaction, length] {
            bytes.put_u32_ne(number);
        }
        bytes.put_slice(&self.payload);
        Ok(bytes.freeze())
    }
}

/// Puts messages together from what reads bring.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Where the next read goes. Never longer than one message and what one read brings, as long as
    /// [`Decoder::next`] is asked until it has none.
    pub(super) fn buffer(&mut self) -> &mut BytesMut {
        self.buffer.reserve(HEADER_BYTES + MAX_PAYLOAD_BYTES);
        &mut self.buffer
    }

    /// The next whole message. After an error the rest means nothing any more.
    pub(super) fn next(&mut self) -> Result<Option<Message>> {
        let Some(mut header) = self.buffer.get(..HEADER_BYTES) else { return Ok(None) };
        let (kind, request, transaction) = (header.get_u32_ne(), header.get_u32_ne(), header.get_u32_ne());
        let length = usize::try_from(header.get_u32_ne()).unwrap_or(usize::MAX);
        let kind = Kind::parse(kind).ok_or(StoreError::Garbled("a message of an unknown type"))?;
        if length > MAX_ANSWER_BYTES {
            return Err(StoreError::Garbled("a message longer than 1 MiB"));
        }
        if self.buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        // A copy: a slice of the buffer would keep all of it for one short value.
        let payload = Bytes::copy_from_slice(&self.buffer.split_to(length));
        Ok(Some(Message { kind, request, transaction, payload }))
    }
}

/// Arguments as the protocol wants them, each ended by NUL.
pub(super) fn arguments(parts: &[&str]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.bytes().chain([0])).collect()
}

/// A watch event's path and token.
pub(super) fn watch_event(payload: &[u8]) -> Result<(&[u8], &[u8])> {
    let mut parts = payload.split(|byte| *byte == 0);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(path), Some(token), Some(_)) => Ok((path, token)),
        _ => Err(StoreError::Garbled("a watch event without path and token")),
    }
}

/// An answer: its payload, or what xenstored refused.
pub(super) fn answer(asked: Kind, message: Message) -> Result<Bytes> {
    match message.kind {
        Kind::Error => Err(Refusal::parse(&message.payload).into()),
        kind if kind == asked => Ok(message.payload),
        _ => Err(StoreError::Garbled("an answer of another type")),
    }
}

/// A list of names, each ended by NUL. Names that are none are left out.
pub(super) fn names(payload: &[u8]) -> Vec<String> {
    let parts = payload.split(|byte| *byte == 0).filter_map(|part| std::str::from_utf8(part).ok());
    parts.filter(|part| super::path::is_name(part)).map(str::to_owned).collect()
}

/// One number as text ended by NUL, as TRANSACTION_START answers it.
pub(super) fn number_answer(payload: &[u8]) -> Result<u32> {
    let number = super::number(payload.strip_suffix(&[0]).unwrap_or(payload));
    number.and_then(|n| u32::try_from(n).ok()).ok_or(StoreError::Garbled("an answer that is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = Message> {
        let kind = proptest::sample::select(Kind::ALL.to_vec());
        let payload = proptest::collection::vec(any::<u8>(), 0..200);
        (kind, any::<u32>(), any::<u32>(), payload).prop_map(|(kind, request, transaction, payload)| {
            Message { kind, request, transaction, payload: payload.into() }
        })
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in_wherever_reads_cut_them(
            messages in proptest::collection::vec(message(), 0..8),
            cut in 1..50_usize,
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(|m| m.encode().unwrap()).collect();
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.buffer().extend_from_slice(piece);
                while let Some(message) = decoder.next().unwrap() {
                    seen.push(message);
                }
            }
            prop_assert_eq!(seen, messages);
        }

        #[test]
        fn any_bytes_are_messages_or_an_error_and_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.buffer().extend_from_slice(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
            let _ = (watch_event(&bytes), number_answer(&bytes), Refusal::parse(&bytes));
            for name in names(&bytes) {
                prop_assert!(super::super::path::is_name(&name));
            }
        }

        #[test]
        fn a_header_that_tells_of_more_than_a_mebibyte_is_refused_before_it_comes(length in (1 << 20) + 1..=u32::MAX) {
            let mut decoder = Decoder::default();
            for number in [Kind::Read as u32, 1, 0, length] {
                decoder.buffer().put_u32_ne(number);
            }
            prop_assert!(decoder.next().is_err());
        }
    }

    #[test]
    fn a_payload_of_4096_bytes_goes_out_and_one_of_4097_does_not() {
        let message =
            |n: usize| Message { kind: Kind::Write, request: 1, transaction: 0, payload: vec![0; n].into() };
        assert_eq!(message(4096).encode().unwrap().len(), HEADER_BYTES + 4096);
        assert_eq!(message(4097).encode(), Err(StoreError::TooLarge(4097)));
    }

    #[test]
    fn a_long_list_in_one_answer_is_taken_whole() {
        let mut decoder = Decoder::default();
        for number in [Kind::Directory as u32, 1, 0, 1 << 20] {
            decoder.buffer().put_u32_ne(number);
        }
        for _ in 0..256 {
            assert_eq!(decoder.next(), Ok(None));
            decoder.buffer().extend_from_slice(&[b'a'; 4096]);
        }
        assert_eq!(decoder.next().unwrap().unwrap().payload.len(), 1 << 20);
    }

    #[test]
    fn a_watch_event_has_a_path_and_a_token() {
        assert_eq!(watch_event(b"/a\0t1\0").unwrap(), (&b"/a"[..], &b"t1"[..]));
        assert!(watch_event(b"/a\0t1").is_err() && watch_event(b"").is_err());
    }
}
