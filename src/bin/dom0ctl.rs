//! dom0ctl's entrance. What it does is in the room `ctl`.

use std::process::ExitCode;

/// One thread: dom0ctl waits for the daemon and does nothing else.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    dom0d::ctl::main().await
}
