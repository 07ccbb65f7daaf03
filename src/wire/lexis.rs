//! The smallest pieces of a document: its tags, its characters, and scalars in text.

use super::Value;
use super::decode::DecodeError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::borrow::Cow;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    MethodCall,
    MethodName,
    MethodResponse,
    Fault,
    Params,
    Param,
    Value,
    Array,
    Data,
    Struct,
    Member,
    Name,
    Int,
    Int64,
    Boolean,
    Double,
    String,
    Base64,
    DateTime,
    Nil,
    Unknown,
}

impl Tag {
    pub(super) fn is_scalar(self) -> bool {
        match self {
            Self::Int
            | Self::Int64
            | Self::Boolean
            | Self::Double
            | Self::String
            | Self::Base64
            | Self::DateTime
            | Self::Nil => true,
            Self::MethodCall
            | Self::MethodName
            | Self::MethodResponse
            | Self::Fault
            | Self::Params
            | Self::Param
            | Self::Value
            | Self::Array
            | Self::Data
            | Self::Struct
            | Self::Member
            | Self::Name
            | Self::Unknown => false,
        }
    }

    pub(super) fn of(name: &str) -> Self {
        match name {
            "value" => Self::Value,
            "string" => Self::String,
            "member" => Self::Member,
            "name" => Self::Name,
            "int" | "i4" => Self::Int,
            "i8" | "ex:i8" => Self::Int64,
            "boolean" => Self::Boolean,
            "struct" => Self::Struct,
            "array" => Self::Array,
            "data" => Self::Data,
            "double" => Self::Double,
            "nil" | "ex:nil" => Self::Nil,
            "base64" => Self::Base64,
            "dateTime.iso8601" => Self::DateTime,
            "param" => Self::Param,
            "params" => Self::Params,
            "methodCall" => Self::MethodCall,
            "methodName" => Self::MethodName,
            "methodResponse" => Self::MethodResponse,
            "fault" => Self::Fault,
            _ => Self::Unknown,
        }
    }
}

/// `dateTime.iso8601` and `methodResponse` are the longest names of tags.
pub(super) const LONGEST_TAG: usize = 16;

pub(super) const BLANKS: [char; 4] = [' ', '\t', '\r', '\n'];

pub(super) fn is_blank(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n'))
}

pub(super) fn is_xml_character(character: char) -> bool {
    matches!(character, '\t' | '\n' | '\r' | ' '..='\u{FFFD}' | '\u{10000}'..)
}

/// As XML asks: `\r\n` and a lone `\r` are read as `\n`.
pub(super) fn one_newline(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.as_bytes().contains(&b'\r') {
        text.replace("\r\n", "\n").replace('\r', "\n").into()
    } else {
        text
    }
}

pub(super) fn double(text: &str) -> Option<Value> {
    // The parser of numbers also takes "nan" and "inf".
    if text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E')) {
        text.parse().ok().filter(|number: &f64| number.is_finite()).map(Value::Double)
    } else {
        None
    }
}

pub(super) fn base64(text: &str) -> Option<Value> {
    let decoded = if text.bytes().any(|byte| byte.is_ascii_whitespace()) {
        let packed: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        STANDARD.decode(packed)
    } else {
        STANDARD.decode(text)
    };
    decoded.ok().map(Value::Base64)
}

/// The whole document is UTF-8 and has no character that XML 1.0 forbids, in text, markup or comment.
pub(super) fn check_characters(document: &[u8], skipped: usize) -> Result<&str, DecodeError> {
    let refuse = |at: usize, problem| {
        Err(DecodeError::Malformed { at: at + skipped, problem, allowed: "XML 1.0 characters in UTF-8" })
    };
    // Looked at in blocks without a branch per byte: this runs over every byte of every request.
    let control = |byte: u8| byte < 0x20 && !matches!(byte, b'\t' | b'\n' | b'\r');
    for (block, bytes) in document.chunks(256).enumerate() {
        if bytes.iter().fold(false, |found, byte| found | control(*byte)) {
            let within = bytes.iter().position(|byte| control(*byte)).unwrap_or(0);
            return refuse(block * 256 + within, "a control character");
        }
    }
    match std::str::from_utf8(document) {
        Err(error) => refuse(error.valid_up_to(), "not UTF-8"),
        Ok(text) if document.contains(&0xEF) => match text.find(['\u{FFFE}', '\u{FFFF}']) {
            Some(at) => refuse(at, "a character that XML forbids"),
            None => Ok(text),
        },
        Ok(text) => Ok(text),
    }
}
