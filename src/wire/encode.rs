//! Values to bytes. Never makes XML that a strict parser would refuse: what XML 1.0 cannot hold becomes U+FFFD,
//! a number that the dialect cannot hold becomes nil.
//!
//! `Value::Int` is `<int>`, `Value::Int64` is `<i8>` always: which of the two is the verb's choice, because some
//! clients insist on `<i8>` for small numbers too.

use super::{Answer, Encoded, Fault, Value, datetime};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use std::collections::btree_map;
use std::sync::Arc;

const HEAD: &[u8] = b"<?xml version='1.0'?>\n<methodResponse><params><param>";
const TAIL: &[u8] = b"</param></params></methodResponse>\n";
const ARRAY_HEAD: &[u8] = b"<value><array><data>";
const ARRAY_TAIL: &[u8] = b"</data></array></value>";

/// Pieces shorter than this are copied together; longer ones are sent from where they are. A copy of 4 KiB
/// costs less than a buffer of its own on the way to the socket.
const COPY_BELOW: usize = 4096;

/// The answer would be longer than the settings allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer is too big; allowed: at most {max_bytes} bytes of XML")]
pub struct TooBig {
    pub max_bytes: usize,
}

/// A whole `methodResponse`, in pieces to be sent one after the other. Its size is counted after escaping.
pub fn encode_response(answer: &Answer, max_bytes: usize) -> Result<Vec<Bytes>, TooBig> {
    match answer {
        Answer::Value(value) => {
            let mut out = Vec::with_capacity(256);
            out.extend_from_slice(HEAD);
            write_value(value, &mut out, max_bytes)?;
            out.extend_from_slice(TAIL);
            within(out.len(), max_bytes)?;
            Ok(vec![Bytes::from(out)])
        }
        Answer::Array(items) => {
            let around = HEAD.len() + ARRAY_HEAD.len() + ARRAY_TAIL.len() + TAIL.len();
            within(items.iter().map(|item| item.0.len()).sum::<usize>() + around, max_bytes)?;
            Ok(join(items))
        }
    }
}

fn within(bytes: usize, max_bytes: usize) -> Result<(), TooBig> {
    if bytes > max_bytes { Err(TooBig { max_bytes }) } else { Ok(()) }
}

struct Shared(Arc<[u8]>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn join(items: &[Encoded]) -> Vec<Bytes> {
    let mut chunks = Vec::new();
    let mut small = Vec::with_capacity(COPY_BELOW);
    small.extend_from_slice(HEAD);
    small.extend_from_slice(ARRAY_HEAD);
    for Encoded(item) in items {
        if item.len() < COPY_BELOW {
            small.extend_from_slice(item);
            // Not only the last: many small ones must not become one huge copy.
            if small.len() >= 16 * COPY_BELOW {
                chunks.push(Bytes::from(std::mem::take(&mut small)));
            }
        } else {
            if !small.is_empty() {
                chunks.push(Bytes::from(std::mem::take(&mut small)));
            }
            chunks.push(Bytes::from_owner(Shared(item.clone())));
        }
    }
    small.extend_from_slice(ARRAY_TAIL);
    small.extend_from_slice(TAIL);
    chunks.push(Bytes::from(small));
    chunks
}

/// A whole `methodResponse` that holds a fault.
pub fn encode_fault(fault: &Fault) -> Bytes {
    let mut out = Vec::with_capacity(320 + fault.fault_string.len());
    out.extend_from_slice(b"<?xml version='1.0'?>\n<methodResponse><fault><value><struct>");
    datetime::append(
        &mut out,
        format_args!("<member><name>faultCode</name><value><int>{}</int></value></member>", fault.fault_code),
    );
    out.extend_from_slice(b"<member><name>faultString</name><value><string>");
    write_text(&fault.fault_string, &mut out);
    out.extend_from_slice(b"</string></value></member></struct></value></fault></methodResponse>\n");
    Bytes::from(out)
}

/// A whole `methodCall`.
pub fn encode_call(method: &str, params: &[Value]) -> Bytes {
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(b"<?xml version='1.0'?>\n<methodCall><methodName>");
    write_text(method, &mut out);
    out.extend_from_slice(b"</methodName><params>");
    for param in params {
        out.extend_from_slice(b"<param>");
        // No limit is set, so none is crossed.
        let _ = write_value(param, &mut out, usize::MAX);
        out.extend_from_slice(b"</param>");
    }
    out.extend_from_slice(b"</params></methodCall>\n");
    Bytes::from(out)
}

/// An array of values that were encoded before, as a value.
pub fn encode_list(items: &[Encoded]) -> Encoded {
    let parts = items.iter().map(|item| &*item.0);
    let parts = std::iter::once(ARRAY_HEAD).chain(parts).chain([ARRAY_TAIL]);
    Encoded(parts.collect::<Vec<_>>().concat().into())
}

/// One `<value>` element, to be kept and sent many times.
pub fn encode_value(value: &Value) -> Encoded {
    let mut out = Vec::with_capacity(256);
    // No limit is set, so none is crossed.
    let _ = write_value(value, &mut out, usize::MAX);
    Encoded(out.into())
}

enum Open<'a> {
    Array(std::slice::Iter<'a, Value>),
    Struct(btree_map::Iter<'a, String, Value>),
}

/// Without recursion, for the depth of a value is its maker's choice.
fn write_value(value: &Value, out: &mut Vec<u8>, max_bytes: usize) -> Result<(), TooBig> {
    let mut open: Vec<Open<'_>> = Vec::new();
    let mut next = Some(value);
    loop {
        if let Some(value) = next.take() {
            match value {
                Value::Array(items) => {
                    out.extend_from_slice(ARRAY_HEAD);
                    open.push(Open::Array(items.iter()));
                }
                Value::Struct(members) => {
                    out.extend_from_slice(b"<value><struct>");
                    open.push(Open::Struct(members.iter()));
                }
                scalar => {
                    if let Value::String(text) = scalar {
                        within(out.len().saturating_add(text.len()), max_bytes)?;
                    }
                    write_scalar(scalar, out);
                    if let Some(Open::Struct(_)) = open.last() {
                        out.extend_from_slice(b"</member>");
                    }
                }
            }
            within(out.len(), max_bytes)?;
        }
        match open.last_mut() {
            None => return Ok(()),
            Some(Open::Array(items)) => match items.next() {
                Some(item) => next = Some(item),
                None => close(ARRAY_TAIL, &mut open, out),
            },
            Some(Open::Struct(members)) => match members.next() {
                Some((name, member)) => {
                    out.extend_from_slice(b"<member><name>");
                    write_text(name, out);
                    out.extend_from_slice(b"</name>");
                    next = Some(member);
                }
                None => close(b"</struct></value>", &mut open, out),
            },
        }
    }
}

fn close(tail: &[u8], open: &mut Vec<Open<'_>>, out: &mut Vec<u8>) {
    out.extend_from_slice(tail);
    open.pop();
    if let Some(Open::Struct(_)) = open.last() {
        out.extend_from_slice(b"</member>");
    }
}

fn write_scalar(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Int(number) => datetime::append(out, format_args!("<value><int>{number}</int></value>")),
        Value::Int64(number) => datetime::append(out, format_args!("<value><i8>{number}</i8></value>")),
        Value::Bool(true) => out.extend_from_slice(b"<value><boolean>1</boolean></value>"),
        Value::Bool(false) => out.extend_from_slice(b"<value><boolean>0</boolean></value>"),
        Value::String(text) => {
            out.extend_from_slice(b"<value><string>");
            write_text(text, out);
            out.extend_from_slice(b"</string></value>");
        }
        Value::Double(number) if number.is_finite() => {
            datetime::append(out, format_args!("<value><double>{number}</double></value>"));
        }
        Value::DateTime(date) => {
            let start = out.len();
            out.extend_from_slice(b"<value><dateTime.iso8601>");
            if datetime::write(date, out) {
                out.extend_from_slice(b"</dateTime.iso8601></value>");
            } else {
                out.truncate(start);
                out.extend_from_slice(NIL);
            }
        }
        Value::Base64(data) => {
            out.extend_from_slice(b"<value><base64>");
            out.extend_from_slice(STANDARD.encode(data).as_bytes());
            out.extend_from_slice(b"</base64></value>");
        }
        // NaN and the infinities have no form; the other two never come here.
        Value::Nil | Value::Double(_) | Value::Struct(_) | Value::Array(_) => out.extend_from_slice(NIL),
    }
}

const NIL: &[u8] = b"<value><nil/></value>";

/// For each byte: may it be copied as it is? 0xEF may begin U+FFFE or U+FFFF and is looked at closer.
const PLAIN: [bool; 256] = {
    let mut plain = [true; 256];
    let mut byte = 0;
    while byte < 0x20 {
        plain[byte] = false;
        byte += 1;
    }
    plain[b'\t' as usize] = true;
    plain[b'\n' as usize] = true;
    plain[b'&' as usize] = false;
    plain[b'<' as usize] = false;
    plain[b'>' as usize] = false;
    plain[0xEF] = false;
    plain
};

/// Escaped text. A carriage return is written as a reference, because a parser turns a bare one into a newline.
fn write_text(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    let mut copied = 0;
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        if PLAIN[usize::from(byte)] {
            at += 1;
            continue;
        }
        let (length, instead): (usize, &[u8]) = match byte {
            b'&' => (1, b"&amp;"),
            b'<' => (1, b"&lt;"),
            b'>' => (1, b"&gt;"),
            b'\r' => (1, b"&#13;"),
            0xEF if matches!(bytes[at..], [_, 0xBF, 0xBE | 0xBF, ..]) => (3, "\u{FFFD}".as_bytes()),
            0xEF => {
                at += 3;
                continue;
            }
            _ => (1, "\u{FFFD}".as_bytes()),
        };
        out.extend_from_slice(&bytes[copied..at]);
        out.extend_from_slice(instead);
        at += length;
        copied = at;
    }
    out.extend_from_slice(&bytes[copied..]);
}
