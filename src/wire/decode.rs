//! Bytes to values: `methodCall` and `methodResponse` documents by quick-xml's pull reader.
//!
//! The bytes are a stranger's. There is no recursion (containers stand on an explicit stack), nothing is
//! allocated beyond what the body's own length pays for, and depth, values and bytes are bounded. A DOCTYPE is
//! refused, so the only entities are the five of XML and character references. An error says at which byte, what
//! is wrong and what is allowed, in words of ours alone: it never repeats the body, which may hold a password.
//!
//! Strict where a guess could be wrong (duplicate member names, numbers out of range, text beside elements);
//! lenient where clients are known to differ: white space between elements, untyped values, `ex:nil`, `ex:i8`,
//! blanks around numbers, `<array/>` without `<data>`, comments and processing instructions anywhere.

use super::lexis::{
    BLANKS, LONGEST_TAG, Tag, base64, check_characters, double, is_blank, is_xml_character, one_newline,
};
use super::{Fault, Value, datetime};
use crate::config;
use quick_xml::Reader;
use quick_xml::events::{BytesDecl, BytesRef, BytesStart, Event};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::BufRead;

/// A method name is at most this long: the longest of the dialect has 40.
const MAX_METHOD_BYTES: usize = 256;
/// Attributes have no meaning here; what a client's namespace declarations need fits.
const MAX_ATTRIBUTE_BYTES: usize = 1024;

/// Why a document was refused. `at` counts bytes from the start of the body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The document is not what it should be.
    #[error("byte {at}: {problem}; allowed: {allowed}")]
    Malformed { at: usize, problem: &'static str, allowed: &'static str },
    /// The document is larger than the settings allow.
    #[error("byte {at}: too many {what}; allowed: at most {max}")]
    Limit { at: usize, what: &'static str, max: usize },
}

type Result<T> = std::result::Result<T, DecodeError>;

/// Reads one `methodCall`: the method's name and its parameters.
pub fn decode_call(body: &[u8], limits: &config::Wire) -> Result<(String, Vec<Value>)> {
    let mut decoder = Decoder::new(body, limits)?;
    decoder.open(Tag::MethodCall, "<methodCall>")?;
    decoder.open(Tag::MethodName, "<methodName>")?;
    let method = decoder.method_name()?;
    let mut params = Vec::new();
    match decoder.token()? {
        Token::Close => {}
        Token::Open(Tag::Params) => {
            params = decoder.params()?;
            decoder.close("</methodCall>")?;
        }
        _ => return Err(decoder.malformed("something other than parameters", "<params> or </methodCall>")),
    }
    decoder.end()?;
    Ok((method, params))
}

/// Reads one `methodResponse`: a value or a fault.
pub fn decode_response(body: &[u8], limits: &config::Wire) -> Result<std::result::Result<Value, Fault>> {
    let mut decoder = Decoder::new(body, limits)?;
    decoder.open(Tag::MethodResponse, "<methodResponse>")?;
    let answer = match decoder.token()? {
        Token::Open(Tag::Params) => {
            let mut params = decoder.params()?;
            match (params.pop(), params.is_empty()) {
                (Some(value), true) => Ok(value),
                _ => return Err(decoder.malformed("not exactly one value in the answer", "one <param>")),
            }
        }
        Token::Open(Tag::Fault) => {
            decoder.open(Tag::Value, "<value>")?;
            let value = decoder.value()?;
            decoder.close("</fault>")?;
            Err(decoder.fault(value)?)
        }
        _ => return Err(decoder.malformed("neither an answer nor a fault", "<params> or <fault>")),
    };
    decoder.close("</methodResponse>")?;
    decoder.end()?;
    Ok(answer)
}

/// Markup, where only markup may stand. `Close` is always the end of the innermost open element, because the
/// reader has compared its name.
enum Token {
    Open(Tag),
    Close,
    End,
}

/// A container whose end has not been read.
enum Frame {
    Array(Vec<Value>),
    Struct { members: BTreeMap<String, Value>, name: String },
}

enum Begun {
    Scalar(Value),
    Array,
    Struct,
}

struct Decoder<'a> {
    reader: Reader<&'a [u8]>,
    /// The same document as the reader's, known to be UTF-8.
    document: &'a str,
    /// Bytes before the reader's first: a byte order mark.
    skipped: usize,
    /// Something of the document has been read: no declaration may follow.
    started: bool,
    /// The element just opened was `<like-this/>`.
    empty: bool,
    values: usize,
    max_values: usize,
    max_depth: usize,
}

impl<'a> Decoder<'a> {
    fn new(body: &'a [u8], limits: &config::Wire) -> Result<Self> {
        if body.len() > limits.max_body_bytes {
            let max = limits.max_body_bytes;
            return Err(DecodeError::Limit { at: max, what: "bytes", max });
        }
        let document = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
        let skipped = body.len() - document.len();
        let document = check_characters(document, skipped)?;
        Ok(Self {
            reader: Reader::from_reader(document.as_bytes()),
            document,
            skipped,
            started: false,
            empty: false,
            values: 0,
            max_values: limits.max_values,
            max_depth: limits.max_depth,
        })
    }

    #[cold]
    fn malformed(&self, problem: &'static str, allowed: &'static str) -> DecodeError {
        DecodeError::Malformed { at: self.position(), problem, allowed }
    }

    fn position(&self) -> usize {
        usize::try_from(self.reader.buffer_position()).unwrap_or(usize::MAX).saturating_add(self.skipped)
    }

    /// Takes the whole of `<name>text</name>` at once, if that comes next, has a name that is wanted, and is plain: no
    /// attributes, references or carriage returns. Most of a call is of such elements, and an event for each of their
    /// three parts was half of the time of reading it. If it is not plain, nothing is taken, and the reader's events
    /// tell all of it. To be called after a start tag only.
    #[inline]
    fn plain_element(&mut self, wanted: impl Fn(Tag) -> bool) -> Option<(Tag, &'a str)> {
        if self.empty {
            return None;
        }
        let at = usize::try_from(self.reader.buffer_position()).ok()?;
        let rest = self.document.get(at..)?;
        let inside = rest.trim_start_matches(BLANKS).strip_prefix('<')?;
        let name_length = inside.bytes().take(LONGEST_TAG + 1).position(|byte| byte == b'>')?;
        let (name, after) = (&inside[..name_length], &inside[name_length + 1..]);
        let tag = Tag::of(name);
        if !wanted(tag) {
            return None;
        }
        let text_length = after.bytes().position(|byte| matches!(byte, b'<' | b'&' | b'\r'))?;
        let (text, after) = after.split_at(text_length);
        let after = after.strip_prefix("</")?.strip_prefix(name)?.strip_prefix('>')?;
        self.reader.stream().consume(rest.len() - after.len());
        Some((tag, text))
    }

    /// The next event that means something. Inlined, as `token` is: an event is large, and moving each one twice
    /// more was a fifth of the time of reading a call.
    #[inline(always)]
    fn event(&mut self) -> Result<Event<'a>> {
        loop {
            let first = !std::mem::replace(&mut self.started, true);
            match self.reader.read_event() {
                Ok(Event::Comment(_) | Event::PI(_)) => {}
                Ok(Event::Decl(declaration)) => self.declaration(&declaration, first)?,
                Ok(Event::DocType(_)) => {
                    return Err(self.malformed("a document type", "no DOCTYPE and no entities of one's own"));
                }
                Ok(event) => return Ok(event),
                Err(_) => return Err(self.ill_formed()),
            }
        }
    }

    /// The reader's own words are not used: they may repeat the body.
    #[cold]
    fn ill_formed(&self) -> DecodeError {
        let at = usize::try_from(self.reader.error_position()).unwrap_or(usize::MAX);
        DecodeError::Malformed {
            at: at.saturating_add(self.skipped),
            problem: "not well-formed XML",
            allowed: "well-formed XML 1.0 whose tags match",
        }
    }

    fn declaration(&self, declaration: &BytesDecl<'_>, first: bool) -> Result<()> {
        if !first {
            return Err(self.malformed("an XML declaration inside the document", "one, at the very start"));
        }
        match declaration.encoding() {
            None => Ok(()),
            Some(Ok(name)) if ["utf-8", "utf8", "us-ascii"].iter().any(|n| name.eq_ignore_ascii_case(n)) => {
                Ok(())
            }
            Some(_) => Err(self.malformed("another encoding is declared", "UTF-8")),
        }
    }

    #[inline]
    fn started_element(&mut self, element: &BytesStart<'a>, empty: bool) -> Result<Tag> {
        self.empty = empty;
        let attributes = element.attributes_raw();
        if !attributes.is_empty() {
            if attributes.len() > MAX_ATTRIBUTE_BYTES {
                return Err(self.limit("bytes of attributes", MAX_ATTRIBUTE_BYTES));
            }
            if element.attributes().any(|attribute| attribute.is_err()) {
                return Err(self.malformed("attributes that are not well-formed", "name=\"value\""));
            }
        }
        Ok(Tag::of(element.name().as_ref()))
    }

    fn limit(&self, what: &'static str, max: usize) -> DecodeError {
        DecodeError::Limit { at: self.position(), what, max }
    }

    #[inline(always)]
    fn token(&mut self) -> Result<Token> {
        if std::mem::take(&mut self.empty) {
            return Ok(Token::Close);
        }
        loop {
            return match self.event()? {
                Event::Start(element) => Ok(Token::Open(self.started_element(&element, false)?)),
                Event::Empty(element) => Ok(Token::Open(self.started_element(&element, true)?)),
                Event::End(_) => Ok(Token::Close),
                Event::Eof => Ok(Token::End),
                Event::Text(text) if is_blank(&text) => continue,
                _ => Err(self.malformed("text between elements", "white space")),
            };
        }
    }

    fn open(&mut self, name: Tag, allowed: &'static str) -> Result<()> {
        match self.token()? {
            Token::Open(found) if found == name => Ok(()),
            Token::End => Err(self.malformed("the document ends too early", allowed)),
            _ => Err(self.malformed("another element than expected", allowed)),
        }
    }

    fn close(&mut self, allowed: &'static str) -> Result<()> {
        match self.token()? {
            Token::Close => Ok(()),
            Token::End => Err(self.malformed("the document ends too early", allowed)),
            Token::Open(_) => Err(self.malformed("one element too many", allowed)),
        }
    }

    fn end(&mut self) -> Result<()> {
        match self.token()? {
            Token::End => Ok(()),
            _ => Err(self.malformed("something after the end of the document", "one document")),
        }
    }

    /// The text of the element just opened, up to and with its end.
    fn text(&mut self) -> Result<Cow<'a, str>> {
        let mut text = Cow::Borrowed("");
        if std::mem::take(&mut self.empty) {
            return Ok(text);
        }
        loop {
            match self.event()? {
                Event::End(_) => return Ok(text),
                Event::Text(only) if text.is_empty() => text = one_newline(only.into_inner()),
                event => self.append(&mut text, event)?,
            }
        }
    }

    fn append(&self, text: &mut Cow<'a, str>, event: Event<'a>) -> Result<()> {
        let more = match event {
            Event::Text(more) => one_newline(more.into_inner()),
            Event::CData(more) => one_newline(more.into_inner()),
            Event::GeneralRef(reference) => {
                text.to_mut().push(self.resolve(&reference)?);
                return Ok(());
            }
            Event::Eof => return Err(self.malformed("the document ends too early", "every tag closed")),
            _ => return Err(self.malformed("an element inside text", "text")),
        };
        if text.is_empty() {
            *text = more;
        } else {
            text.to_mut().push_str(&more);
        }
        Ok(())
    }

    fn resolve(&self, reference: &BytesRef<'_>) -> Result<char> {
        let name: &str = reference;
        let character = match name {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            _ => reference.resolve_char_ref().ok().flatten().filter(|c| is_xml_character(*c)),
        };
        character.ok_or_else(|| {
            self.malformed(
                "an unknown entity",
                "&amp; &lt; &gt; &quot; &apos; and references to XML characters",
            )
        })
    }

    fn method_name(&mut self) -> Result<String> {
        const ALLOWED: &str = "1 to 256 of A-Z a-z 0-9 _ . : /";
        let name = self.text()?;
        let name = name.trim_matches(BLANKS);
        let character = |byte: u8| byte.is_ascii_alphanumeric() || b"_.:/".contains(&byte);
        if name.is_empty() || name.len() > MAX_METHOD_BYTES || !name.bytes().all(character) {
            return Err(self.malformed("no method name", ALLOWED));
        }
        Ok(name.to_owned())
    }

    /// After `<params>`, up to and with `</params>`.
    fn params(&mut self) -> Result<Vec<Value>> {
        let mut params = Vec::new();
        loop {
            match self.token()? {
                Token::Open(Tag::Param) => {
                    self.open(Tag::Value, "<value>")?;
                    params.push(self.value()?);
                    self.close("</param>")?;
                }
                Token::Close => return Ok(params),
                _ => return Err(self.malformed("something other than a parameter", "<param> or </params>")),
            }
        }
    }

    /// After `<value>`, up to and with its `</value>`, with all it holds.
    fn value(&mut self) -> Result<Value> {
        let mut stack: Vec<Frame> = Vec::new();
        'inside_a_value: loop {
            let mut done = match self.begin()? {
                Begun::Scalar(value) => value,
                container => {
                    if stack.len() >= self.max_depth {
                        return Err(self.limit("values inside each other", self.max_depth));
                    }
                    let (frame, more) = self.first(container)?;
                    if more {
                        stack.push(frame);
                        continue 'inside_a_value;
                    }
                    frame.into_value()
                }
            };
            // Hand the finished value to its container; a container it completes is finished in turn.
            loop {
                let Some(frame) = stack.last_mut() else {
                    return Ok(done);
                };
                if self.deliver(frame, done)? {
                    continue 'inside_a_value;
                }
                match stack.pop() {
                    Some(frame) => done = frame.into_value(),
                    None => return Err(self.malformed("one end too many", "every tag closed once")),
                }
            }
        }
    }

    /// Reads what stands inside `<value>`: a whole scalar with the end of the value, or the start of a container.
    fn begin(&mut self) -> Result<Begun> {
        self.values += 1;
        if self.values > self.max_values {
            return Err(self.limit("values", self.max_values));
        }
        if let Some((tag, text)) = self.plain_element(Tag::is_scalar) {
            let value = self.typed(tag, Cow::Borrowed(text))?;
            self.close("</value>")?;
            return Ok(Begun::Scalar(value));
        }
        let mut text = Cow::Borrowed("");
        if std::mem::take(&mut self.empty) {
            return Ok(Begun::Scalar(Value::String(String::new())));
        }
        let name = loop {
            match self.event()? {
                Event::Start(element) => break self.started_element(&element, false)?,
                Event::Empty(element) => break self.started_element(&element, true)?,
                Event::End(_) => return Ok(Begun::Scalar(Value::String(text.into_owned()))),
                Event::Text(only) if text.is_empty() => text = one_newline(only.into_inner()),
                event => self.append(&mut text, event)?,
            }
        };
        if !is_blank(&text) {
            return Err(self.malformed("text beside a typed value", "white space"));
        }
        match name {
            Tag::Array => Ok(Begun::Array),
            Tag::Struct => Ok(Begun::Struct),
            scalar => {
                let value = self.scalar(scalar)?;
                self.close("</value>")?;
                Ok(Begun::Scalar(value))
            }
        }
    }

    fn scalar(&mut self, name: Tag) -> Result<Value> {
        // Before the text is read, so that an unknown element with children is told as what it is.
        if !name.is_scalar() {
            return Err(self.malformed(
                "an unknown type",
                "int i4 i8 boolean double string base64 dateTime.iso8601 nil struct array",
            ));
        }
        let text = self.text()?;
        self.typed(name, text)
    }

    fn typed(&self, name: Tag, text: Cow<'a, str>) -> Result<Value> {
        if name == Tag::String {
            return Ok(Value::String(text.into_owned()));
        }
        let trimmed = text.trim_matches(BLANKS);
        let (value, problem, allowed) = match name {
            Tag::Int => {
                (trimmed.parse().ok().map(Value::Int), "no 32-bit integer", "-2147483648 to 2147483647")
            }
            Tag::Int64 => (
                trimmed.parse().ok().map(Value::Int64),
                "no 64-bit integer",
                "-9223372036854775808 to 9223372036854775807",
            ),
            Tag::Boolean => {
                let value = match trimmed {
                    "0" => Some(Value::Bool(false)),
                    "1" => Some(Value::Bool(true)),
                    _ => None,
                };
                (value, "no boolean", "0 or 1")
            }
            Tag::Double => (double(trimmed), "no finite number", "decimal digits, as in -1.5e3"),
            Tag::Base64 => (base64(trimmed), "no base64", "A-Z a-z 0-9 + / with = at the end"),
            Tag::DateTime => {
                (datetime::parse(trimmed).map(Value::DateTime), "no date and time", datetime::ALLOWED)
            }
            _ => (trimmed.is_empty().then_some(Value::Nil), "something inside nil", "<nil/>"),
        };
        value.ok_or_else(|| self.malformed(problem, allowed))
    }

    /// After `<array>` or `<struct>`: up to its first value (`true`), or up to and with its `</value>`.
    fn first(&mut self, container: Begun) -> Result<(Frame, bool)> {
        match container {
            Begun::Struct => match self.member()? {
                Some(name) => Ok((Frame::Struct { members: BTreeMap::new(), name }, true)),
                None => Ok((Frame::Struct { members: BTreeMap::new(), name: String::new() }, false)),
            },
            _ => match self.token()? {
                Token::Open(Tag::Data) => Ok((Frame::Array(Vec::new()), self.item()?)),
                Token::Close => {
                    self.close("</value>")?;
                    Ok((Frame::Array(Vec::new()), false))
                }
                _ => Err(self.malformed("something other than data in an array", "<data> or </array>")),
            },
        }
    }

    /// Puts a value into its container; `true` if another one follows.
    fn deliver(&mut self, frame: &mut Frame, value: Value) -> Result<bool> {
        match frame {
            Frame::Array(items) => {
                items.push(value);
                self.item()
            }
            Frame::Struct { members, name } => {
                self.close("</member>")?;
                if members.insert(std::mem::take(name), value).is_some() {
                    return Err(self.malformed("a member name used twice", "each name once in a struct"));
                }
                match self.member()? {
                    Some(next) => {
                        *name = next;
                        Ok(true)
                    }
                    None => Ok(false),
                }
            }
        }
    }

    /// The next item of an array: `true` after its `<value>`, `false` after the array's `</value>`.
    fn item(&mut self) -> Result<bool> {
        match self.token()? {
            Token::Open(Tag::Value) => Ok(true),
            Token::Close => {
                self.close("</array>")?;
                self.close("</value>")?;
                Ok(false)
            }
            _ => Err(self.malformed("something other than a value in an array", "<value> or </data>")),
        }
    }

    /// The next member of a struct: its name, after its `<value>`; `None` after the struct's `</value>`.
    fn member(&mut self) -> Result<Option<String>> {
        match self.token()? {
            Token::Open(Tag::Member) => {
                let name = match self.plain_element(|tag| tag == Tag::Name) {
                    Some((_, name)) => name.to_owned(),
                    None => {
                        self.open(Tag::Name, "<name>")?;
                        self.text()?.into_owned()
                    }
                };
                self.open(Tag::Value, "<value>")?;
                Ok(Some(name))
            }
            Token::Close => {
                self.close("</value>")?;
                Ok(None)
            }
            _ => Err(self.malformed("something other than a member in a struct", "<member> or </struct>")),
        }
    }

    fn fault(&self, value: Value) -> Result<Fault> {
        if let Value::Struct(mut members) = value
            && let Some(Value::Int(fault_code)) = members.remove("faultCode")
            && let Some(Value::String(fault_string)) = members.remove("faultString")
        {
            return Ok(Fault { fault_code, fault_string });
        }
        Err(self.malformed("no fault", "a struct of faultCode (int) and faultString (string)"))
    }
}

impl Frame {
    fn into_value(self) -> Value {
        match self {
            Self::Array(items) => Value::Array(items),
            Self::Struct { members, .. } => Value::Struct(members),
        }
    }
}
