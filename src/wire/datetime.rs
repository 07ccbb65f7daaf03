//! `dateTime.iso8601`: text to `iso8601::DateTime` and back, both ways ours.
//!
//! The vocabulary crate's own writer is not used: it turns 5 ms into `.5` and panics on week dates. Its reader
//! accepts those week dates. What we read: `YYYYMMDDThh:mm:ss`, then optionally a fraction (kept to the
//! millisecond), then optionally `Z` or an offset. The type cannot tell `Z` from no zone at all, so neither is
//! written back.

use iso8601::{Date, DateTime, Time};
use std::io::Write;

pub(super) const ALLOWED: &str = "YYYYMMDDThh:mm:ss[.fff][Z|±hh:mm]";

/// `None` if the text is not exactly of the allowed form, or names a day or time that does not exist.
pub(super) fn parse(text: &str) -> Option<DateTime> {
    let bytes = text.as_bytes();
    if bytes.len() < 17 || bytes[8] != b'T' || bytes[11] != b':' || bytes[14] != b':' {
        return None;
    }
    let year = number(&bytes[0..4])?;
    let month = number(&bytes[4..6])?;
    let day = number(&bytes[6..8])?;
    // Knows the calendar: no 30 February.
    jiff::civil::Date::new(i16::try_from(year).ok()?, i8::try_from(month).ok()?, i8::try_from(day).ok()?)
        .ok()?;
    let hour = number(&bytes[9..11])?;
    let minute = number(&bytes[12..14])?;
    let second = number(&bytes[15..17])?;
    // 60 is a leap second.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (millisecond, rest) = fraction(&bytes[17..])?;
    let (tz_offset_hours, tz_offset_minutes) = zone(rest)?;
    Some(DateTime {
        date: Date::YMD { year: i32::try_from(year).ok()?, month, day },
        time: Time { hour, minute, second, millisecond, tz_offset_hours, tz_offset_minutes },
    })
}

fn number(digits: &[u8]) -> Option<u32> {
    digits
        .iter()
        .try_fold(0u32, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + u32::from(digit - b'0')))
}

/// Milliseconds, and what follows the fraction.
fn fraction(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let Some(rest) = bytes.strip_prefix(b".") else {
        return Some((0, bytes));
    };
    let length = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if !(1..=9).contains(&length) {
        return None;
    }
    let (digits, rest) = rest.split_at(length);
    let kept = digits.iter().map(|digit| u32::from(digit - b'0')).chain(std::iter::repeat(0)).take(3);
    Some((kept.fold(0, |sum, digit| sum * 10 + digit), rest))
}

fn zone(bytes: &[u8]) -> Option<(i32, i32)> {
    let sign = match bytes.first() {
        None => return Some((0, 0)),
        Some(b'Z') if bytes.len() == 1 => return Some((0, 0)),
        Some(b'+') => 1,
        Some(b'-') => -1,
        Some(_) => return None,
    };
    let (hours, minutes) = match bytes.len() {
        6 if bytes[3] == b':' => (number(&bytes[1..3])?, number(&bytes[4..6])?),
        5 => (number(&bytes[1..3])?, number(&bytes[3..5])?),
        _ => return None,
    };
    if hours > 23 || minutes > 59 {
        return None;
    }
    Some((sign * i32::try_from(hours).ok()?, sign * i32::try_from(minutes).ok()?))
}

/// Appends the text form; `false`, and nothing appended, if the value is no date that the form can hold.
pub(super) fn write(value: &DateTime, out: &mut Vec<u8>) -> bool {
    let Some((year, month, day)) = day_of(&value.date) else {
        return false;
    };
    let time = &value.time;
    let offset = time.tz_offset_hours.unsigned_abs() <= 23 && time.tz_offset_minutes.unsigned_abs() <= 59;
    if time.hour > 23 || time.minute > 59 || time.second > 60 || time.millisecond > 999 || !offset {
        return false;
    }
    append(
        out,
        format_args!("{year:04}{month:02}{day:02}T{:02}:{:02}:{:02}", time.hour, time.minute, time.second),
    );
    if time.millisecond > 0 {
        append(out, format_args!(".{:03}", time.millisecond));
    }
    if time.tz_offset_hours != 0 || time.tz_offset_minutes != 0 {
        let sign = if time.tz_offset_hours < 0 || time.tz_offset_minutes < 0 { '-' } else { '+' };
        let (hours, minutes) = (time.tz_offset_hours.unsigned_abs(), time.tz_offset_minutes.unsigned_abs());
        append(out, format_args!("{sign}{hours:02}:{minutes:02}"));
    }
    true
}

pub(super) fn append(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to memory does not fail.
    let _ = out.write_fmt(text);
}

fn day_of(date: &Date) -> Option<(i16, i8, i8)> {
    let date = match *date {
        Date::YMD { year, month, day } => jiff::civil::Date::new(
            i16::try_from(year).ok()?,
            i8::try_from(month).ok()?,
            i8::try_from(day).ok()?,
        )
        .ok()?,
        Date::Week { year, ww, d } => {
            let weekday = jiff::civil::Weekday::from_monday_one_offset(i8::try_from(d).ok()?).ok()?;
            jiff::civil::ISOWeekDate::new(i16::try_from(year).ok()?, i8::try_from(ww).ok()?, weekday)
                .ok()?
                .date()
        }
        Date::Ordinal { year, ddd } => {
            let first = jiff::civil::Date::new(i16::try_from(year).ok()?, 1, 1).ok()?;
            if ddd == 0 || ddd > u32::from(first.days_in_year().unsigned_abs()) {
                return None;
            }
            first.checked_add(jiff::Span::new().try_days(i64::from(ddd) - 1).ok()?).ok()?
        }
    };
    (0..=9999).contains(&date.year()).then(|| (date.year(), date.month(), date.day()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(text: &str) -> Option<String> {
        let value = parse(text)?;
        let mut out = Vec::new();
        assert!(write(&value, &mut out), "{text} was read and cannot be written");
        Some(String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_date_is_written_as_it_was_read() {
        for text in [
            "19980717T14:08:55",
            "20240229T00:00:00",
            "20240101T23:59:60",
            "20240101T01:02:03.005",
            "20240101T01:02:03.050+02:00",
            "20240101T01:02:03-00:30",
            "00000101T00:00:00",
            "99991231T23:59:59.999-23:59",
        ] {
            assert_eq!(round(text).as_deref(), Some(text));
        }
        assert_eq!(round("20240101T01:02:03Z").as_deref(), Some("20240101T01:02:03"));
        assert_eq!(round("20240101T01:02:03.5Z").as_deref(), Some("20240101T01:02:03.500"));
        assert_eq!(round("20240101T01:02:03.123456789+0130").as_deref(), Some("20240101T01:02:03.123+01:30"));
    }

    #[test]
    fn what_is_no_date_is_refused() {
        for text in [
            "",
            "2024",
            "20240230T00:00:00",
            "20230229T00:00:00",
            "20241301T00:00:00",
            "20240100T00:00:00",
            "20240101T24:00:00",
            "20240101T00:60:00",
            "20240101T00:00:61",
            "20240101 00:00:00",
            "20240101T000000",
            "2024-W05-1T00:00:00",
            "2024-001T00:00:00",
            "20240101T00:00:00.",
            "20240101T00:00:00.1234567890",
            "20240101T00:00:00Zjunk",
            "20240101T00:00:00+1",
            "20240101T00:00:00+24:00",
            "20240101T00:00:00+00:60",
            "+0240101T00:00:00",
            "2024010éT00:00:0",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn week_and_day_of_year_dates_are_written_as_their_calendar_day() {
        let at = |date| {
            let mut out = Vec::new();
            let written = write(&DateTime { date, time: Time::default() }, &mut out);
            written.then(|| String::from_utf8(out).unwrap())
        };
        assert_eq!(at(Date::Week { year: 2024, ww: 5, d: 1 }).as_deref(), Some("20240129T00:00:00"));
        assert_eq!(at(Date::Ordinal { year: 2024, ddd: 60 }).as_deref(), Some("20240229T00:00:00"));
        assert_eq!(at(Date::Ordinal { year: 2023, ddd: 366 }), None);
        assert_eq!(at(Date::YMD { year: 123_456, month: 1, day: 1 }), None);
    }
}
