//! Other hosts: whom this one trusts to send VMs to and take VMs from, and VMs of which it is not settled who runs
//! them.

use super::args::{MigrationCommand, PeerCommand, Settle};
use super::output::Column;
use super::{CtlError, Session, job, vm};
use xmlrpc::Value;

const PEERS: &[Column] = &[("ADDRESS", "address"), ("ADDED", "added"), ("FINGERPRINT", "fingerprint")];

const UNSETTLED: &[Column] = &[
    ("VM", "vm"),
    ("NAME", "name"),
    ("DIRECTION", "direction"),
    ("PEER", "peer"),
    ("SINCE", "since"),
    ("ID", "id"),
];

pub async fn peers(session: &mut Session<'_>, command: PeerCommand) -> Result<(), CtlError> {
    match command {
        PeerCommand::List => {
            let peers = session.read("peer_list", &[]).await?;
            session.printer.list(PEERS, &peers)
        }
        PeerCommand::Add { address, fingerprint, change } => {
            let params = vec![Value::from(address), Value::from(fingerprint)];
            job::change(session, "peer_add", params, &change).await.map(drop)
        }
        PeerCommand::Remove { address, change } => {
            job::change(session, "peer_remove", vec![Value::from(address)], &change).await.map(drop)
        }
    }
}

pub async fn migrations(session: &mut Session<'_>, command: MigrationCommand) -> Result<(), CtlError> {
    let unsettled = session.read("migration_list", &[]).await?;
    match command {
        MigrationCommand::List => session.printer.list(UNSETTLED, &unsettled),
        MigrationCommand::Resolve { vm, settle, change } => {
            let found = vm::among(&unsettled, ("vm", "name"), &vm)?;
            let action = match settle {
                Settle::Run => "run",
                Settle::Destroy => "destroy",
            };
            let params = vec![Value::from(found), Value::from(action)];
            job::change(session, "migration_resolve", params, &change).await.map(drop)
        }
    }
}
