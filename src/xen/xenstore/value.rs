//! Values as text. A value is whatever bytes its writer chose; these are the only ways from it to a string.

use crate::model::excerpt;

/// What a value may be at most where a short text is meant: a name, a number, a port.
const MAX_TEXT_BYTES: usize = 1024;

/// The value as text, if it is UTF-8 without control characters and of at most 1,024 bytes.
pub fn text(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok().filter(|text| text.len() <= MAX_TEXT_BYTES)?;
    (!text.contains(char::is_control)).then_some(text)
}

/// The value as a decimal number, and nothing but that.
pub fn number(value: &[u8]) -> Option<u64> {
    let digits = text(value).filter(|t| t.bytes().all(|c| c.is_ascii_digit()))?;
    digits.parse().ok()
}

/// For logs: at most 40 characters, quoted and escaped; what is no UTF-8 is replaced.
pub fn shown(value: &[u8]) -> String {
    // 40 characters of four bytes each, and one more that tells there was more.
    excerpt(&String::from_utf8_lossy(&value[..value.len().min(164)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_value_is_text_only_if_it_is_short_clean_utf8() {
        assert_eq!(text("naïve".as_bytes()), Some("naïve"));
        assert_eq!(text(&[b'a'; MAX_TEXT_BYTES + 1]), None);
        assert_eq!(text(b"a\nb"), None);
        assert_eq!(text(b"a\0"), None);
        assert_eq!(text(b"\xff"), None);
    }

    #[test]
    fn a_number_is_digits_and_fits() {
        assert_eq!(number(b"5901"), Some(5901));
        for bad in [&b""[..], b"-1", b"+1", b" 1", b"1 ", b"0x10", b"18446744073709551616"] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_of_any_value_is_short_and_on_one_line(value in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let shown = shown(&value);
            prop_assert!(shown.len() <= 500 && !shown.contains(['\n', '\r', '\u{1b}']), "{shown}");
        }
    }
}
