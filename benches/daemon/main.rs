//! The daemon's own figures, each beside its bar: `cargo bench --bench daemon [-- FIGURE…]`.
//!
//! The real binary runs as a process of its own, with `--dev` (a simulated host), and is called over TLS. CPU is
//! that of its process by the kernel's clock for it, so the callers, which are in this process, do not count. What
//! is compared with something is measured in the same run, in turns.
#![allow(clippy::unwrap_used, reason = "a bench: a failure shall stop it")]
#![allow(clippy::explicit_write, reason = "println is for what must never print")]
#![allow(clippy::disallowed_methods, reason = "a bench lets time pass between two readings")]
#![allow(clippy::zombie_processes, reason = "the world ends with the bench")]

mod adopt;
mod bare;
mod calls;
mod daemon;
mod history;
mod jobs;
mod memory;
mod scrape;
mod series;
mod start;

use daemon::say;

type Figure = (&'static str, fn(&tokio::runtime::Runtime));

const FIGURES: &[Figure] = &[
    ("start", start::figures),
    ("adopt", adopt::figures),
    ("echo", calls::echo),
    ("list_vms", calls::list_vms),
    ("jobs", jobs::figures),
    ("memory", memory::figures),
    ("history", history::figures),
    ("scrape", scrape::figures),
    ("series", series::figures),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [command, tls_dir] = &args[..]
        && command == "bare-echo"
    {
        return bare::serve(tls_dir.as_ref());
    }
    // Without it we were only built, with all other targets.
    if !args.iter().any(|arg| arg == "--bench") {
        return;
    }
    let wanted: Vec<&String> = args.iter().filter(|arg| !arg.starts_with("--")).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for (name, figures) in FIGURES {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            say(&format!("[{name}]"));
            figures(&runtime);
        }
    }
}
