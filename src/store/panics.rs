//! Panics of the engine become errors, and their messages go to the log instead of the terminal.

use super::StoreError;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    /// This thread is inside a guarded call.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`; a panic inside becomes `Damaged`, the only cause ever seen.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    install();
    let before = GUARDED.replace(true);
    // The engine's state after a panic is not trusted: whoever gets this error opens it again or moves it away.
    let result = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(before);
    result.unwrap_or_else(|payload| {
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        let text: String = text.chars().take(200).collect();
        Err(StoreError::Damaged(format!("the engine panicked: {text}")))
    })
}

/// Once per process, in front of whatever hook there is: panics of guarded calls and of the engine's own threads
/// are logged only; all others go on to the hook that was there.
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let engines_thread =
                std::thread::current().name().is_some_and(|name| name.starts_with("sled-io"));
            if GUARDED.get() || engines_thread {
                tracing::debug!(%panic, "the store's engine panicked");
            } else {
                next(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_engine_becomes_an_error_with_its_text() {
        let result: Result<(), _> = guarded(|| panic!("tried to serialize Uninitialized"));
        let error = result.unwrap_err();
        assert!(error.to_string().contains("Uninitialized"), "{error}");
    }
}
