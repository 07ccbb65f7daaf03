//! Trace context as the W3C has it: which request of which manager something was done for.
//!
//! A *traceparent* comes with a call, goes with its job, and stands in every event made on the way, so that the other
//! end can join what it asked for with what became of it. It is another's word: checked strictly, shown, and believed
//! in nothing. What we ask of others carries it on, as a *child*: the same trace, a new span.

use super::{Invalid, excerpt, text_type};
use std::future::Future;

/// `00-<trace>-<span>-<flags>`, all in lower-case hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent {
    trace: [u8; 16],
    span: [u8; 8],
    flags: u8,
}

impl TraceParent {
    const ALLOWED: &'static str =
        "00-<32 hex digits>-<16 hex digits>-<2 hex digits>, lower case, neither id all zeros";

    /// Only version 00: another's form is not known to us.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::new("traceparent", format!("{} is not one", excerpt(text)), Self::ALLOWED);
        let mut parts = text.split('-');
        let mut next = || parts.next().ok_or_else(wrong);
        let (version, trace, span, flags) = (next()?, next()?, next()?, next()?);
        let (Some([0]), Some(trace), Some(span), Some([flags]), None) =
            (hex(version), hex(trace), hex(span), hex(flags), parts.next())
        else {
            return Err(wrong());
        };
        if trace == [0; 16] || span == [0; 8] {
            return Err(wrong());
        }
        Ok(Self { trace, span, flags })
    }

    pub fn as_str(&self) -> String {
        format!("00-{}-{:016x}-{:02x}", self.trace_id(), u64::from_be_bytes(self.span), self.flags)
    }

    /// What all spans of one trace share.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.trace))
    }

    /// The same trace, for what we ask of others.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { span: random_span(), ..*self }
    }
}
text_type!(TraceParent);

/// Lower-case hex of exactly `N` bytes.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn random_span() -> [u8; 8] {
    loop {
        // Of a random UUID, these bytes are all random: its version and variant lie elsewhere.
        let [a, b, c, d, e, f, .., g, h] = *uuid::Uuid::new_v4().as_bytes();
        let span = [a, b, c, d, e, f, g, h];
        if span != [0; 8] {
            return span;
        }
    }
}

tokio::task_local! {
    static CURRENT: Option<TraceParent>;
}

/// What this task works for, if it is known. Tasks and threads that it starts do not inherit it: who starts one for the
/// same end takes it along with [`scope`].
pub fn current() -> Option<TraceParent> {
    CURRENT.try_with(|trace| *trace).ok().flatten()
}

/// A future in which [`current`] is `trace`.
pub fn scope<F: Future>(trace: Option<TraceParent>, future: F) -> impl Future<Output = F::Output> {
    CURRENT.scope(trace, future)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_good_one_is_shown_as_it_came() {
        let trace = TraceParent::parse(GOOD).unwrap();
        assert_eq!(trace.to_string(), GOOD);
        assert_eq!(trace.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        let json = serde_json::to_string(&trace).unwrap();
        assert_eq!(json, format!("{GOOD:?}"));
        assert_eq!(serde_json::from_str::<TraceParent>(&json).unwrap(), trace);
    }

    #[test]
    fn whatever_is_not_of_that_form_is_refused() {
        let zero_trace = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
        let zero_span = "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01";
        for bad in [
            "",
            "00",
            zero_trace,
            zero_span,
            &GOOD.to_uppercase(),
            &GOOD[1..],
            &GOOD[..GOOD.len() - 1],
            &format!("{GOOD} "),
            &format!(" {GOOD}"),
            &format!("{GOOD}-00"),
            &format!("{GOOD}-"),
            &GOOD.replacen("00", "01", 1),
            &GOOD.replacen("00", "ff", 1),
            &GOOD.replace('-', "_"),
            &GOOD.replacen('4', "+", 1),
            &GOOD.replacen('4', "g", 1),
            &GOOD.replacen("4b", "é", 1),
        ] {
            assert!(TraceParent::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_child_is_of_the_same_trace_and_has_a_span_of_its_own() {
        let trace = TraceParent::parse(GOOD).unwrap();
        let (one, two) = (trace.child(), trace.child());
        assert_eq!((one.trace_id(), one.flags), (trace.trace_id(), trace.flags));
        assert!(one.span != trace.span && one.span != two.span);
        assert!(TraceParent::parse(&one.to_string()).is_ok());
    }

    #[tokio::test]
    async fn a_task_knows_what_it_works_for_and_the_next_one_does_not() {
        let trace = TraceParent::parse(GOOD).ok();
        assert_eq!(current(), None);
        let seen = scope(trace, async {
            let inner = scope(None, async { current() }).await;
            let other = tokio::spawn(async { current() }).await.unwrap();
            (current(), inner, other)
        });
        assert_eq!(seen.await, (trace, None, None));
        assert_eq!(current(), None);
    }
}
