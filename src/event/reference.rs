//! The page of events (docs/events.md), made from the catalogue. The test below holds that the page is what the table
//! says; `UPDATE_DOCS=1 cargo test --lib reference` writes it anew.

use super::catalogue::{CATALOGUE, Entry};
use super::{clearing, damper};
use std::fmt::Write;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/events.md");

fn row(page: &mut String, entry: &Entry) {
    let by: Vec<String> = entry.cleared_by.iter().map(|kind| format!("`{}`", kind.as_str())).collect();
    let cells = [
        format!("`{}`", entry.kind.as_str()),
        entry.severity.as_str().to_owned(),
        format!("`{}`{}", entry.object.replace(" or ", "` or `"), each(entry)),
        entry.meaning.to_owned(),
        by.join(", "),
        entry.damped_as.unwrap_or_default().to_owned(),
    ];
    writeln!(page, "| {} |", cells.join(" | ")).unwrap();
}

fn each(entry: &Entry) -> String {
    entry.part.map(|part| format!(", each `{part}`")).unwrap_or_default()
}

fn page() -> String {
    let mut page = format!(
        "# Events\n\n\
         Made from the catalogue (`src/event/catalogue.rs`). Events are numbered without a hole; `event_list` and `event_wait` \
         read them, `event_ack` acknowledges, [verbs.md](verbs.md) has the parameters.\n\n\
         ## Going on where one was: the token\n\n\
         Every answer has a `token`, the text `<stream>:<number>`. Give it back (`event_wait(token, …)`, \
         `event_list({{\"token\": …}})`) and the answer begins with the event after it, also after a lost connection or a \
         restart of the agent. Whoever took only the first events of an answer may put the number of the last one taken \
         behind the same stream. The stream is made with the agent's store; a plain number works too, but does not \
         tell when the store is another.\n\n\
         `lost` is true if events may have been missed. Then either `gap` tells which numbers are no longer kept (`from`, \
         `to`); or the token is of another stream, because the store was made anew, or is ahead of the newest event, because \
         the store was set back to an older state. In these two cases the answer begins with the oldest event that is kept, \
         `gap` (if there is one) counts from 1 and is about the numbers of the present stream, and how much was missed \
         is not known. Read the state itself then (`vm_list`, `network_show`, …) and go on with the new token. A token that \
         is none is a fault; one that is merely old is not. A store that was set back and has since passed the token's \
         number cannot be told from one that was not.\n\n\
         An event is shown only when it is on disk for good: no crash gives its number to another.\n\n\
         ## Alerts\n\n\
         An event of severity `warning` or above is an alert, open until it is acknowledged: by hand, or by the agent when \
         an event comes that clears it (`acknowledged_by` is `agent: <type>` then). Both are events of the same object; \
         where the column says *each*, also with the same value of that name in `data`. An \
         acknowledgement that the agent's death prevented is made up for at its next start. Of \
         more than {open} open alerts the oldest are left to a hand.\n\n\
         ## Damping\n\n\
         Of types with an entry in the column *damped with*, {pass} events of one object pass within {window} s; all types of one \
         name count together, *each* value by itself. Further ones are held back until the window is over and it has been calm for {calm} s, or for \
         {longest} s at the longest; then `event.flapping` tells how many there were, and the last of them whole. An orderly stop \
         of the agent tells it at once; what was held back when the agent is killed is told nowhere.\n\n\
         ## What is kept\n\n\
         `events.history` events (100,000 by default): a job prunes what is older every 10 minutes, and the log prunes itself when \
         it has twice as many. So the bound on disk is twice the setting, and what is written while the surplus is deleted.\n\n\
         ## Types\n\n\
         | type | severity | object | meaning | cleared by | damped with |\n|---|---|---|---|---|---|\n",
        open = clearing::MAX_OPEN,
        pass = damper::PASS,
        window = damper::WINDOW.as_secs(),
        calm = damper::CALM.as_secs(),
        longest = damper::LONGEST.as_secs(),
    );
    CATALOGUE.iter().for_each(|entry| row(&mut page, entry));
    page
}

#[test]
fn the_page_of_events_says_what_the_catalogue_says() {
    let made = page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(PAGE, &made).unwrap();
    }
    let kept = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(kept == made, "docs/events.md is old; UPDATE_DOCS=1 cargo test --lib reference writes it anew");
}
