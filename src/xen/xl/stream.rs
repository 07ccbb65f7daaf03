//! The framing of a saved or migrating domain, followed as it passes, so that its end is known before anybody
//! says so: for a migration the end is the moment of the handover, and a file that has it is whole.
//!
//! ```text
//! xl header (magic, flags, the domain's configuration as JSON)
//!   libxl header, records … LIBXC_CONTEXT ┐                      … END
//!                                         └ libxc headers, records … END
//! ```
//!
//! Layouts: docs/specs/libxl-migration-stream and libxc-migration-stream of Xen, version 2 of both (Xen 4.6
//! and later; libxc's version 3 differs in no frame); xl's header is `struct save_file_header` of xl. Memory
//! itself is skipped over, never looked at. Nothing here reads or writes: it is a pure machine.

const XL_MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
const XL_BYTE_ORDER: u32 = 0x0102_0304;
const LIBXL_IDENT: &[u8; 8] = b"LibxlFmt";
const LIBXC_MARKER: [u8; 8] = [0xff; 8];
const LIBXC_IDENT: &[u8; 4] = b"XENF";
const END: u32 = 0;
const LIBXC_CONTEXT: u32 = 1;
/// The longest configuration that is taken.
const MAX_CONFIG_BYTES: u32 = 1024 * 1024;
/// The longest part that is looked at.
const MAX_PART_BYTES: usize = 48;

/// What passes is no domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("this is no saved domain of xl")]
    NoDomain,
    #[error("the saved domain is of a release or kind that is not known")]
    Unknown,
    #[error("the saved domain's configuration is too long")]
    TooLong,
    #[error("there is more after the saved domain's end")]
    TooMuch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    XlHeader,
    Config { left: u32 },
    LibxlHeader,
    LibxlRecord,
    LibxlBody { left: u64 },
    LibxcHeader,
    LibxcDomain,
    LibxcRecord,
    LibxcBody { left: u64 },
    Whole,
}

/// How far a stream has passed.
#[derive(Debug)]
pub struct Stream {
    at: At,
    part: Vec<u8>,
    config: Vec<u8>,
}

impl Default for Stream {
    fn default() -> Self {
        Self { at: At::XlHeader, part: Vec::with_capacity(MAX_PART_BYTES), config: Vec::new() }
    }
}

impl Stream {
    pub fn is_whole(&self) -> bool {
        self.at == At::Whole
    }

    /// The domain's configuration, once it has passed: JSON of libxl.
    pub fn config(&self) -> Option<&[u8]> {
        let passed = !matches!(self.at, At::XlHeader | At::Config { .. });
        // Four bytes of length stand before it, a zero byte behind.
        let text = self.config.get(4..)?;
        let text = text.strip_suffix(&[0]).unwrap_or(text);
        (passed && !text.is_empty()).then_some(text)
    }

    /// The next bytes, in pieces of any size.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Broken> {
        while !bytes.is_empty() {
            let taken = match self.at {
                At::Whole => return Err(Broken::TooMuch),
                At::Config { left } => self.keep_config(bytes, left),
                At::LibxlBody { left } => {
                    let taken = smaller(bytes, left);
                    let left = left - taken as u64;
                    self.at = if left == 0 { At::LibxlRecord } else { At::LibxlBody { left } };
                    taken
                }
                At::LibxcBody { left } => {
                    let taken = smaller(bytes, left);
                    let left = left - taken as u64;
                    self.at = if left == 0 { At::LibxcRecord } else { At::LibxcBody { left } };
                    taken
                }
                _ => self.gather(bytes)?,
            };
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    fn keep_config(&mut self, bytes: &[u8], left: u32) -> usize {
        let taken = smaller(bytes, left.into());
        self.config.extend_from_slice(&bytes[..taken]);
        let left = left - u32::try_from(taken).unwrap_or(left);
        self.at = if left == 0 { At::LibxlHeader } else { At::Config { left } };
        taken
    }

    /// Fills the part at hand and, when it is whole, goes on to the next.
    fn gather(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let length = match self.at {
            At::XlHeader => 48,
            At::LibxlHeader | At::LibxcDomain => 16,
            At::LibxcHeader => 24,
            _ => 8,
        };
        let taken = bytes.len().min(length - self.part.len());
        self.part.extend_from_slice(&bytes[..taken]);
        if self.part.len() == length {
            self.at = self.next()?;
            self.part.clear();
        }
        Ok(taken)
    }

    fn little(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.four(at))
    }

    fn big(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.four(at))
    }

    fn four(&self, at: usize) -> [u8; 4] {
        let mut four = [0; 4];
        four.copy_from_slice(&self.part[at..at + 4]);
        four
    }

    fn next(&self) -> Result<At, Broken> {
        match self.at {
            At::XlHeader => self.after_xl_header(),
            At::LibxlHeader => {
                // No option is known to us but little-endian numbers, which is none.
                let good = self.part.starts_with(LIBXL_IDENT) && self.big(8) == 2 && self.big(12) == 0;
                if good { Ok(At::LibxlRecord) } else { Err(Broken::Unknown) }
            }
            At::LibxlRecord => Ok(match (self.little(0), padded(self.little(4))) {
                (END, 0) => At::Whole,
                (LIBXC_CONTEXT, 0) => At::LibxcHeader,
                (END | LIBXC_CONTEXT, _) => return Err(Broken::Unknown),
                (_, 0) => At::LibxlRecord,
                (_, left) => At::LibxlBody { left },
            }),
            At::LibxcHeader => {
                let good = self.part.starts_with(&LIBXC_MARKER)
                    && self.part[8..12] == LIBXC_IDENT[..]
                    && matches!(self.big(12), 2 | 3)
                    && self.part[16..18] == [0, 0];
                if good { Ok(At::LibxcDomain) } else { Err(Broken::Unknown) }
            }
            At::LibxcDomain => Ok(At::LibxcRecord),
            At::LibxcRecord => Ok(match (self.little(0), padded(self.little(4))) {
                (END, 0) => At::LibxlRecord,
                (END, _) => return Err(Broken::Unknown),
                (_, 0) => At::LibxcRecord,
                (_, left) => At::LibxcBody { left },
            }),
            // These gather nothing.
            At::Config { .. } | At::LibxlBody { .. } | At::LibxcBody { .. } | At::Whole => Ok(self.at),
        }
    }

    fn after_xl_header(&self) -> Result<At, Broken> {
        if !self.part.starts_with(XL_MAGIC) {
            return Err(Broken::NoDomain);
        }
        if self.little(32) != XL_BYTE_ORDER {
            return Err(Broken::Unknown);
        }
        match self.little(44) {
            0 => Ok(At::LibxlHeader),
            left if left <= MAX_CONFIG_BYTES => Ok(At::Config { left }),
            _ => Err(Broken::TooLong),
        }
    }
}

fn smaller(bytes: &[u8], left: u64) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len())
}

/// Bodies end on eight bytes.
fn padded(length: u32) -> u64 {
    u64::from(length).next_multiple_of(8)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        let mut bytes = [kind.to_le_bytes(), length.to_le_bytes()].concat();
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// A domain whose memory is these pages.
    pub fn domain(config: &str, pages: &[Vec<u8>]) -> Vec<u8> {
        let config = [config.as_bytes(), &[0]].concat();
        let length = u32::try_from(config.len()).unwrap();
        let mut bytes = XL_MAGIC.to_vec();
        for word in [XL_BYTE_ORDER, 3, 0, length + 4, length] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend(config);
        bytes.extend_from_slice(LIBXL_IDENT);
        bytes.extend([0, 0, 0, 2, 0, 0, 0, 0]);
        bytes.extend(record(LIBXC_CONTEXT, &[]));
        bytes.extend([0xff; 8]);
        bytes.extend_from_slice(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0");
        bytes.extend([2, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
        for page in pages {
            bytes.extend(record(1, page));
        }
        bytes.extend(record(END, &[]));
        bytes.extend(record(2, b"emulator"));
        bytes.extend(record(END, &[]));
        bytes
    }

    #[test]
    fn the_end_is_known_with_the_last_byte_and_the_configuration_is_kept() {
        let bytes = domain(r#"{"c_info":{}}"#, &[vec![7; 4097], vec![], vec![0; 8]]);
        let mut stream = Stream::default();
        for (at, byte) in bytes.iter().enumerate() {
            assert!(!stream.is_whole(), "{at}");
            stream.feed(&[*byte]).unwrap();
        }
        assert!(stream.is_whole());
        assert_eq!(stream.config(), Some(&br#"{"c_info":{}}"#[..]));
        assert_eq!(stream.feed(b"x"), Err(Broken::TooMuch));
    }

    #[test]
    fn what_is_no_domain_is_told_by_its_head() {
        assert_eq!(Stream::default().feed(&[b'x'; 48]), Err(Broken::NoDomain));
        let mut bytes = domain("{}", &[]);
        bytes[44..48].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Stream::default().feed(&bytes), Err(Broken::TooLong));
    }

    proptest! {
        #[test]
        fn a_stream_is_followed_in_pieces_of_any_size(
            pages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..6),
            sizes in proptest::collection::vec(1_usize..200, 1..40),
        ) {
            let bytes = domain("{}", &pages);
            let mut stream = Stream::default();
            let mut rest = &bytes[..];
            for size in sizes.iter().cycle() {
                let (piece, after) = rest.split_at(rest.len().min(*size));
                stream.feed(piece).unwrap();
                rest = after;
                if rest.is_empty() { break; }
                prop_assert!(!stream.is_whole());
            }
            prop_assert!(stream.is_whole());
        }

        #[test]
        fn a_torn_or_spoiled_stream_is_never_whole_too_early_and_never_a_panic(
            cut in 0_usize..400, at in 0_usize..400, byte in any::<u8>(),
        ) {
            let mut bytes = domain("{}", &[vec![1; 100]]);
            let at = at % bytes.len();
            let cut = cut % bytes.len();
            let mut torn = Stream::default();
            torn.feed(&bytes[..cut]).unwrap();
            prop_assert!(!torn.is_whole());
            bytes[at] = byte;
            let _ = Stream::default().feed(&bytes);
        }
    }
}
