//! The resume token: a place in the numbers of one store.
//!
//! Words: a *stream* is the life of one store, named by random digits that were made with it; numbers of different
//! streams have nothing to do with each other. A token is `<stream>:<number>`. A reader who took only a part of an
//! answer may put the number of the last event it has taken behind the same stream.

use crate::model::{EventNumber, Invalid, excerpt};
use std::fmt;
use std::str::FromStr;

/// Hexadecimal digits of a stream's name.
pub const STREAM_DIGITS: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub stream: String,
    pub number: EventNumber,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.stream, self.number)
    }
}

impl FromStr for Token {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let is_hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        let parsed = text.split_once(':').and_then(|(stream, number)| {
            let good = stream.len() == STREAM_DIGITS
                && stream.bytes().all(is_hex)
                && !number.is_empty()
                && number.bytes().all(|c| c.is_ascii_digit());
            let number = number.parse().ok().filter(|_| good)?;
            Some(Self { stream: stream.to_owned(), number: EventNumber(number) })
        });
        parsed.ok_or_else(|| {
            let allowed = "the token of an earlier answer: 16 hex digits, a colon, a number";
            Invalid::new("event token", format!("{} is not one", excerpt(text)), allowed)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_written_and_nothing_else_is_one() {
        let token = Token { stream: "00ff00ff00ff00ff".to_owned(), number: EventNumber(17) };
        assert_eq!(token.to_string(), "00ff00ff00ff00ff:17");
        assert_eq!(token.to_string().parse(), Ok(token));
        for wrong in [
            "",
            "17",
            ":",
            "00ff00ff00ff00ff",
            "00ff00ff00ff00ff:",
            "00ff00ff00ff00f:1",
            "00FF00ff00ff00ff:1",
            "00ff00ff00ff00ff:-1",
            "00ff00ff00ff00ff:+1",
            "00ff00ff00ff00ff:1:1",
            "00ff00ff00ff00ff:99999999999999999999",
            " 00ff00ff00ff00ff:1",
        ] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong:?}");
        }
    }
}
