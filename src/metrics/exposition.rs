//! The text that monitoring reads: OpenMetrics 1.0, or the older Prometheus text for who asks for nothing else.
//!
//! Written family by family, each once, into pieces of bounded size: no figure makes a large block of memory move, and a
//! slow reader gives back what it has read. Names and help are ours; values of labels are others' words (a sensor's name, a
//! VM's), so they are escaped, cut, and have no control characters.

use super::table::{Family, Kind};
use crate::model::histogram::Counted;
use bytes::Bytes;
use std::fmt::Write as _;

/// Large enough to be memory of its own, which goes back to the kernel when it is freed.
const PIECE_BYTES: usize = 256 * 1024;
/// Ten thousand domains with twenty figures each. What does not fit is left out, and counted.
const MAX_BYTES: usize = 32 * 1024 * 1024;
/// The longest value of a label, before it is escaped.
const MAX_VALUE_BYTES: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    OpenMetrics,
    /// Prometheus text 0.0.4.
    Classic,
}

impl Form {
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// What a reader takes, by its `Accept`: the older text only if that is all it names.
    pub fn accepted(accept: Option<&str>) -> Self {
        let Some(accept) = accept.map(str::to_ascii_lowercase) else { return Self::OpenMetrics };
        let types = || accept.split(',').filter_map(|range| range.split(';').next()).map(str::trim);
        let new = types().any(|one| matches!(one, "*/*" | "application/*" | "application/openmetrics-text"));
        let old = types().any(|one| matches!(one, "text/*" | "text/plain"));
        if old && !new { Self::Classic } else { Self::OpenMetrics }
    }
}

/// A sample's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    Whole(u64),
    Real(f64),
}

impl From<u64> for Number {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<usize> for Number {
    fn from(value: usize) -> Self {
        Self::Whole(value as u64)
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Whole(value) => value.fmt(f),
            Self::Real(value) if value.is_nan() => f.write_str("NaN"),
            Self::Real(value) if value == f64::INFINITY => f.write_str("+Inf"),
            Self::Real(value) if value == f64::NEG_INFINITY => f.write_str("-Inf"),
            // Debug keeps it short (1e21) and a number of this kind (1.0).
            Self::Real(value) => write!(f, "{value:?}"),
        }
    }
}

/// A text in the making.
#[derive(Debug)]
pub struct Exposition {
    form: Form,
    full: Vec<Bytes>,
    piece: String,
    bytes: usize,
    max_bytes: usize,
    left_out: u64,
}

impl Exposition {
    pub fn new(form: Form) -> Self {
        Self::bounded(form, MAX_BYTES)
    }

    /// With room for so much.
    pub(super) fn bounded(form: Form, max_bytes: usize) -> Self {
        let piece = String::with_capacity(PIECE_BYTES);
        Self { form, full: Vec::new(), piece, bytes: 0, max_bytes, left_out: 0 }
    }

    /// All samples of a family are written through one of these; a family without any is left out.
    pub fn family<'a>(&'a mut self, family: &'a Family) -> Samples<'a> {
        Samples { to: self, family, begun: false }
    }

    /// Samples that found no room.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// The whole text.
    pub fn end(mut self) -> Vec<Bytes> {
        if self.form == Form::OpenMetrics {
            self.piece.push_str("# EOF\n");
        }
        if !self.piece.is_empty() {
            self.full.push(self.piece.into());
        }
        self.full
    }

    fn has_room(&mut self) -> bool {
        if self.piece.len() >= PIECE_BYTES - PIECE_BYTES / 8 {
            let next = String::with_capacity(PIECE_BYTES);
            let full = std::mem::replace(&mut self.piece, next);
            self.bytes += full.len();
            self.full.push(full.into());
        }
        let room = self.bytes + self.piece.len() < self.max_bytes;
        self.left_out += u64::from(!room);
        room
    }
}

/// The samples of one family.
pub struct Samples<'a> {
    to: &'a mut Exposition,
    family: &'a Family,
    begun: bool,
}

// Writing to a String cannot fail, so what `write!` says is not looked at.
impl Samples<'_> {
    /// One value. `labels`: the values of the family's labels, in its order.
    pub fn put(&mut self, labels: &[&str], value: impl Into<Number>) {
        if self.to.has_room() {
            self.put_past_bound(labels, value);
        }
    }

    /// The same, room or not: for the few that are about the text itself.
    pub fn put_past_bound(&mut self, labels: &[&str], value: impl Into<Number>) {
        debug_assert!(self.family.kind != Kind::Histogram);
        debug_assert_eq!(labels.len(), self.family.labels.len(), "{}", self.family.name);
        self.begin();
        let suffix = if self.family.kind == Kind::Counter { "_total" } else { "" };
        self.sample(suffix, labels, None);
        let _ = writeln!(self.to.piece, " {}", value.into());
    }

    pub fn put_histogram(&mut self, labels: &[&str], counted: &Counted) {
        debug_assert!(self.family.kind == Kind::Histogram);
        if !self.to.has_room() {
            return;
        }
        self.begin();
        let mut below = 0;
        for (count, bound) in counted.counts.iter().zip(counted.bounds.iter().chain(&[f64::INFINITY])) {
            below += count;
            self.sample("_bucket", labels, Some(*bound));
            let _ = writeln!(self.to.piece, " {below}");
        }
        self.sample("_sum", labels, None);
        let _ = writeln!(self.to.piece, " {}", Number::Real(counted.sum.as_secs_f64()));
        self.sample("_count", labels, None);
        let _ = writeln!(self.to.piece, " {below}");
    }

    fn begin(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let (out, name, help) = (&mut self.to.piece, &self.family.name, &self.family.meaning);
        // The older text knows a counter by the name of its samples.
        let classic_counter = self.to.form == Form::Classic && self.family.kind == Kind::Counter;
        let suffix = if classic_counter { "_total" } else { "" };
        let _ = writeln!(out, "# TYPE {name}{suffix} {}", self.family.kind.as_str());
        if let (Form::OpenMetrics, Some(unit)) = (self.to.form, self.family.unit) {
            let _ = writeln!(out, "# UNIT {name} {unit}");
        }
        let _ = write!(out, "# HELP {name}{suffix} ");
        escape(out, help, usize::MAX);
        out.push('\n');
    }

    fn sample(&mut self, suffix: &str, labels: &[&str], bound: Option<f64>) {
        let out = &mut self.to.piece;
        out.push_str(&self.family.name);
        out.push_str(suffix);
        let mut before = '{';
        for (name, value) in self.family.labels.iter().zip(labels) {
            out.push(before);
            out.push_str(name);
            out.push_str("=\"");
            escape(out, value, MAX_VALUE_BYTES);
            out.push('"');
            before = ',';
        }
        if let Some(bound) = bound {
            let _ = write!(out, "{before}le=\"{}\"", Number::Real(bound));
            before = ',';
        }
        if before == ',' {
            out.push('}');
        }
    }
}

/// Backslash, quote and line end are escaped; other control characters, which some readers end at, are replaced.
fn escape(out: &mut String, value: &str, max_bytes: usize) {
    let plain = |byte: u8| matches!(byte, b' '..=b'~') && byte != b'\\' && byte != b'"';
    if value.len() <= max_bytes && value.bytes().all(plain) {
        // Nearly all are.
        out.push_str(value);
        return;
    }
    for (at, c) in value.char_indices() {
        match c {
            _ if at + c.len_utf8() > max_bytes => return,
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::{OWN, family};
    use super::*;
    use proptest::prelude::*;

    fn text(pieces: Vec<Bytes>) -> String {
        pieces.iter().map(|piece| std::str::from_utf8(piece).unwrap()).collect()
    }

    /// What a reader makes of an escaped value.
    fn unescaped(value: &str) -> String {
        let mut out = String::new();
        let mut chars = value.chars();
        while let Some(c) = chars.next() {
            match (c, c == '\\') {
                (_, true) => match chars.next() {
                    Some('n') => out.push('\n'),
                    Some(c @ ('\\' | '"')) => out.push(c),
                    other => panic!("{other:?} is no escape"),
                },
                ('"', _) => panic!("the value ends early"),
                (c, _) => out.push(c),
            }
        }
        out
    }

    fn one(form: Form, value: &str) -> String {
        let family = family("dom0d_test_things", Kind::Counter, &["name"], "Things.");
        let mut exposition = Exposition::new(form);
        exposition.family(&family).put(&[value], 7_u64);
        text(exposition.end())
    }

    proptest! {
        #[test]
        fn whatever_a_thing_is_called_it_is_one_sample_of_that_name(value in ".{0,80}") {
            let text = one(Form::OpenMetrics, &value);
            let lines: Vec<&str> = text.split('\n').collect();
            prop_assert_eq!(lines.len(), 5, "{}", text);
            let inner = lines[2].strip_prefix("dom0d_test_things_total{name=\"").unwrap();
            let shown = unescaped(inner.strip_suffix("\"} 7").unwrap());
            let expected: String =
                value.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect();
            prop_assert!(shown == expected || (value.len() > MAX_VALUE_BYTES && expected.starts_with(&shown)));
        }
    }

    #[test]
    fn what_a_text_must_not_hold_is_escaped_and_what_is_too_long_is_cut() {
        let text = one(Form::OpenMetrics, "a\"b\\c\nd\r\0e\u{9b}");
        assert!(text.contains("{name=\"a\\\"b\\\\c\\nd\u{fffd}\u{fffd}e\u{fffd}\"} 7\n"), "{text}");
        let long = one(Form::OpenMetrics, &"é".repeat(1000));
        assert_eq!(long.matches('é').count(), MAX_VALUE_BYTES / 2);
    }

    #[test]
    fn a_counter_has_its_suffix_where_each_form_wants_it() {
        let open = one(Form::OpenMetrics, "x");
        assert!(
            open.starts_with("# TYPE dom0d_test_things counter\n# HELP dom0d_test_things Things.\n"),
            "{open}"
        );
        assert!(open.ends_with("dom0d_test_things_total{name=\"x\"} 7\n# EOF\n"), "{open}");
        let classic = one(Form::Classic, "x");
        assert!(classic.starts_with("# TYPE dom0d_test_things_total counter\n"), "{classic}");
        assert!(classic.ends_with("dom0d_test_things_total{name=\"x\"} 7\n"), "{classic}");
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_at_infinity() {
        let family = family("dom0d_test_seconds", Kind::Histogram, &["verb"], "Time.");
        let mut exposition = Exposition::new(Form::OpenMetrics);
        let counted = Counted {
            bounds: &[0.001, 1.0],
            counts: vec![1, 2, 3],
            sum: std::time::Duration::from_millis(1500),
        };
        exposition.family(&family).put_histogram(&["v"], &counted);
        let expected = "# TYPE dom0d_test_seconds histogram\n# UNIT dom0d_test_seconds seconds\n\
            # HELP dom0d_test_seconds Time.\n\
            dom0d_test_seconds_bucket{verb=\"v\",le=\"0.001\"} 1\n\
            dom0d_test_seconds_bucket{verb=\"v\",le=\"1.0\"} 3\n\
            dom0d_test_seconds_bucket{verb=\"v\",le=\"+Inf\"} 6\n\
            dom0d_test_seconds_sum{verb=\"v\"} 1.5\ndom0d_test_seconds_count{verb=\"v\"} 6\n# EOF\n";
        assert_eq!(text(exposition.end()), expected);
    }

    #[test]
    fn a_family_without_samples_is_left_out() {
        let mut exposition = Exposition::new(Form::OpenMetrics);
        let _ = exposition.family(OWN[0]);
        assert_eq!(text(exposition.end()), "# EOF\n");
    }

    #[test]
    fn numbers_are_written_as_readers_read_them() {
        let cases: [(Number, &str); 8] = [
            (7_u64.into(), "7"),
            (1.0.into(), "1.0"),
            (0.000_000_1.into(), "1e-7"),
            (1e21.into(), "1e21"),
            (f64::NAN.into(), "NaN"),
            (f64::INFINITY.into(), "+Inf"),
            (f64::NEG_INFINITY.into(), "-Inf"),
            (u64::MAX.into(), "18446744073709551615"),
        ];
        for (number, expected) in cases {
            assert_eq!(number.to_string(), expected);
        }
    }

    #[test]
    fn a_text_ends_at_its_bound_and_counts_what_it_left_out() {
        let family = family("dom0d_test_things", Kind::Gauge, &["name"], "Things.");
        let mut exposition = Exposition::new(Form::OpenMetrics);
        let name = "x".repeat(MAX_VALUE_BYTES);
        let mut samples = exposition.family(&family);
        for _ in 0..MAX_BYTES / MAX_VALUE_BYTES {
            samples.put(&[&name], 1_u64);
        }
        assert!(exposition.left_out() > 0);
        let pieces = exposition.end();
        assert!(pieces.iter().all(|piece| piece.len() <= PIECE_BYTES));
        assert!(pieces.iter().map(Bytes::len).sum::<usize>() <= MAX_BYTES + PIECE_BYTES);
    }

    #[test]
    fn a_reader_gets_the_older_text_only_if_it_names_nothing_else() {
        use Form::{Classic, OpenMetrics};
        let prometheus =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
        for (accept, form) in [
            (None, OpenMetrics),
            (Some("*/*"), OpenMetrics),
            (Some(prometheus), OpenMetrics),
            (Some("text/plain"), Classic),
            (Some("Text/Plain;version=0.0.4;q=0.3, text/html"), Classic),
            (Some("text/plain, application/openmetrics-text"), OpenMetrics),
            (Some("image/png"), OpenMetrics),
            (Some(""), OpenMetrics),
        ] {
            assert_eq!(Form::accepted(accept), form, "{accept:?}");
        }
    }
}
