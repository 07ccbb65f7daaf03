//! What is undecided after a crash or a broken link goes on from here: copies that stand here and wait for their
//! source's word, and VMs of ours of which it is not known who runs them.
//!
//! One task. It asks, and when there is an answer submits a job that carries it out, as if somebody had called; until
//! then nothing holds a lock, so that a human may decide (`migration_resolve`). What is missing is told once.

use super::migrate_out::{CALL_LIMIT, Going};
use super::{Operations, plan};
use crate::event::{Event, kind};
use crate::job::Options;
use crate::model::{MigrationId, VmId};
use crate::vm::migration::{Arrival, Verdict, Word};
use crate::vm::{Intent, VmRecord};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const EVERY: Duration = Duration::from_secs(2);
/// A question that goes on for this long is told of: a daemon that restarts is back before.
const TELL_AFTER: Duration = Duration::from_secs(10);

/// Open questions: since when, and whether they were told of.
#[derive(Default)]
struct Open(HashMap<MigrationId, (Instant, bool)>);

/// Watches until `stop`.
pub async fn run(operations: Arc<Operations>, stop: CancellationToken) {
    let mut open = Open::default();
    loop {
        tokio::select! {
            () = look(&operations, &mut open) => {}
            () = stop.cancelled() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn look(operations: &Arc<Operations>, open: &mut Open) {
    let Some(engine) = operations.engine() else { return };
    let arrivals = operations.moves.arrivals();
    let leaving: Vec<Going> = operations.vms.all().iter().filter_map(|vm| going(&vm.record)).collect();
    open.0.retain(|id, _| arrivals.iter().any(|a| a.id == *id) || leaving.iter().any(|l| l.id == *id));
    for arrival in arrivals {
        let vm = arrival.record.id();
        if !engine.is_claimed(&VmRecord::lock(vm)) {
            ask_source(operations, &arrival, open).await;
        }
    }
    for going in leaving {
        if engine.is_claimed(&VmRecord::lock(going.vm)) {
            continue;
        }
        match operations.judged(&going).await {
            Ok(Verdict::Wait(missing)) => {
                open.note(operations, going.id, going.vm, missing.words()).await;
            }
            Ok(_) => submit(operations, "settle_migration", plan::settle_migration(going)).await,
            Err(error) => {
                tracing::warn!(vm_uuid = %going.vm, %error, "an undecided migration cannot be looked at")
            }
        }
    }
}

fn going(record: &VmRecord) -> Option<Going> {
    match &record.intent {
        Intent::Leaving(leaving) => {
            Some(Going { id: leaving.id, vm: record.id(), dest: leaving.dest.clone() })
        }
        _ => None,
    }
}

async fn ask_source(operations: &Arc<Operations>, arrival: &Arrival, open: &mut Open) {
    let (id, vm) = (arrival.id, arrival.record.id());
    let word = match (operations.peer_of(&arrival.source), operations.link()) {
        (Some(peer), Ok(link)) => {
            let params = vec![id.as_str(), vm.as_str()];
            let answer = link.call(&peer, "migration_outcome", params, CALL_LIMIT).await;
            let read = |answer: serde_json::Value| serde_json::from_value(answer["outcome"].clone());
            answer.map_err(|error| format!("source {}: {error}", peer.address)).and_then(|answer| {
                read(answer).map_err(|_| format!("source {} gave no answer of ours", peer.address))
            })
        }
        (None, _) => Err("its source is no peer any more".to_owned()),
        (_, Err(error)) => Err(error.to_string()),
    };
    match word {
        Ok(Word::Committed) => submit(operations, "take_over_vm", plan::take_over(id, vm)).await,
        Ok(Word::Aborted) => submit(operations, "drop_arrival", plan::drop_arrival(id, vm)).await,
        Ok(Word::Pending) => {}
        Ok(Word::Unknown) => open.note(operations, id, vm, "its source knows nothing of it").await,
        Err(why) => open.note(operations, id, vm, &why).await,
    }
}

async fn submit(operations: &Arc<Operations>, verb: &str, plan: plan::Plan) {
    let Some(engine) = operations.engine() else { return };
    let submission = operations.submission(verb, "agent", plan, Options::default());
    match engine.submit(submission).await {
        Ok(job) => {
            // The next look must not find it still queued and submit another.
            let _ = engine.wait(job, Duration::from_secs(30)).await;
        }
        Err(error) => tracing::warn!(verb, %error, "a migration cannot be settled now"),
    }
}

impl Open {
    async fn note(&mut self, operations: &Operations, id: MigrationId, vm: VmId, why: &str) {
        let (since, told) = self.0.entry(id).or_insert_with(|| (Instant::now(), false));
        if *told || since.elapsed() < TELL_AFTER {
            return;
        }
        *told = true;
        let text = format!("VM {vm} stands still: it is not known who runs it; {why}");
        let event = Event::new(kind::VM_MIGRATION_WAITS, VmRecord::lock(vm), text);
        if let Err(error) = operations.events.publish(&event.with("migration", id.as_str())).await {
            tracing::warn!(%error, "an event was not written");
        }
    }
}
