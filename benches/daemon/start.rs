//! From the process's start to READY=1, with an empty store.

use crate::daemon::{Home, median, say};
use tokio::runtime::Runtime;

const TURNS: usize = 11;

pub fn figures(_: &Runtime) {
    let (mut with, mut without, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..TURNS {
        let home = Home::new();
        let daemon = home.start("");
        with.push(daemon.ready.as_secs_f64() * 1e3);
        cpu.push(daemon.process.cpu().as_secs_f64() * 1e3);
        let home = Home::new();
        home.start_world(65_536);
        without.push(home.start("").ready.as_secs_f64() * 1e3);
    }
    let worst = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
    say(&format!(
        "start to READY, empty store, first password and certificates made: with the start of the simulated world \
         median {:.0} ms, worst {:.0} ms (bar: at most 150); with that world running already median {:.0} ms; CPU until then {:.0} ms",
        median(&mut with),
        worst(&with),
        median(&mut without),
        median(&mut cpu)
    ));
}
