//! Where the daemon's log goes: the journal, or lines of text or JSON on stderr.
//!
//! An entrance's helper: called once by `main`, known to no room. Rooms log by `tracing` with fields and do not
//! know where to.
//!
//! The fields by which records are found bear the same names everywhere: `job_id`, `vm_uuid`, `event_id`, `verb`,
//! `trace_id`; the journal has them in capitals. A job's run and a call are spans with those they know, so that every
//! record made inside has them; JSON lines show them in `span`.
//!
//! Fields carry what others wrote: names of guests, methods of strangers, messages of tools. So a record is
//! always *one* line: control characters in it (line ends, terminal escapes) and characters that reorder text
//! are shown as escapes. The journal needs none of this, since it takes fields by length.

use crate::config::{LogFormat, LogLevel};
use std::fmt::Write as _;
use std::io::{self, Write};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("the log was set up twice")]
    Twice,
}

/// Sets up the log of this process.
pub fn init(level: LogLevel, format: LogFormat) -> Result<(), LogError> {
    let layer = match format {
        LogFormat::Json => lines(true, io::stderr),
        LogFormat::Text => lines(false, io::stderr),
        LogFormat::Auto => match journal() {
            Some(layer) => layer,
            None => lines(false, io::stderr),
        },
    };
    let registry = tracing_subscriber::registry().with(layer.with_filter(filter(level)));
    registry.try_init().map_err(|_| LogError::Twice)
}

/// Our own records from `level` on; those of libraries from warnings on, since their rare states are not ours.
fn filter(level: LogLevel) -> Targets {
    let own = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new().with_target("dom0d", own).with_default(own.min(LevelFilter::WARN))
}

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// The journal, if it is what our stderr leads to. systemd tells the device and inode of that stream; a child
/// that was given another stderr inherits the variable too, so it is compared.
fn journal() -> Option<BoxedLayer> {
    let told = std::env::var("JOURNAL_STREAM").ok()?;
    let (device, inode) = told.split_once(':')?;
    let stat = nix::sys::stat::fstat(io::stderr()).ok()?;
    if device.parse() != Ok(stat.st_dev) || inode.parse() != Ok(stat.st_ino) {
        return None;
    }
    // Without a prefix: `journalctl JOB_ID=17` is what people type. None of our fields is called as one of systemd's.
    Some(tracing_journald::layer().ok()?.with_field_prefix(None).boxed())
}

fn lines<W, F>(json: bool, make: F) -> BoxedLayer
where
    W: Write + 'static,
    F: Fn() -> W + Send + Sync + 'static,
{
    let layer = fmt::layer().with_ansi(false).with_writer(move || OneLine { json, to: make() });
    if json { layer.json().flatten_event(true).with_span_list(false).boxed() } else { layer.boxed() }
}

/// Writes each record (which the formatter hands over in one piece) as one line.
struct OneLine<W> {
    json: bool,
    to: W,
}

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(record);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let mut line = String::with_capacity(text.len() + 1);
        escape_into(&mut line, text, self.json);
        line.push('\n');
        self.to.write_all(line.as_bytes())?;
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Appends `text` with everything escaped that could end a line, steer a terminal, or reorder what is read. The
/// escapes of JSON have four digits, which is enough: none of these characters lies above U+FFFF.
fn escape_into(line: &mut String, text: &str, json: bool) {
    for c in text.chars() {
        let reorders =
            matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || reorders {
            // Writing to a String cannot fail.
            let _ = if json {
                write!(line, "\\u{:04x}", u32::from(c))
            } else {
                write!(line, "{}", c.escape_default())
            };
        } else {
            line.push(c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(json: bool, level: LogLevel, emit: impl FnOnce()) -> String {
        let sink = Shared::default();
        let writer = sink.clone();
        let layer = lines(json, move || writer.clone());
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(filter(level)));
        tracing::subscriber::with_default(subscriber, emit);
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    const EVIL: &str = "a\n2026-01-01 INFO dom0d: owner released\r\u{1b}[2Jb\u{9b}31m\u{202e}c\u{7f}";

    #[test]
    fn what_others_wrote_cannot_make_a_second_line_or_steer_the_terminal() {
        for json in [false, true] {
            let text = logged(json, LogLevel::Info, || {
                tracing::info!(vm_uuid = %EVIL, debug = ?EVIL, plain = EVIL, "a message of {EVIL}");
            });
            assert_eq!(text.matches('\n').count(), 1, "{text:?}");
            assert!(text.ends_with('\n'));
            let bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
            assert!(!text.contains(bad), "{text:?}");
            assert!(text.contains("owner released"), "it is shown, not dropped: {text:?}");
        }
    }

    #[test]
    fn a_json_record_stays_json() {
        let text = logged(true, LogLevel::Info, || tracing::warn!(vm_uuid = EVIL, count = 3, "odd"));
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(record["message"], "odd");
        assert_eq!(record["count"], 3);
        assert_eq!(record["vm_uuid"], EVIL);
    }

    #[test]
    fn the_level_is_ours_and_libraries_tell_warnings_only() {
        let emit = || {
            tracing::debug!("own debug");
            tracing::info!(target: "hyper", "their info");
            tracing::warn!(target: "hyper", "their warning");
            tracing::trace!("own trace");
        };
        let text = logged(false, LogLevel::Debug, emit);
        assert!(text.contains("own debug") && text.contains("their warning"), "{text}");
        assert!(!text.contains("their info") && !text.contains("own trace"), "{text}");
        assert!(!logged(false, LogLevel::Error, emit).contains("warning"));
    }
}
