//! The family of peers: other hosts that this one sends VMs to and takes VMs from.

use super::Api;
use super::arguments::{Arguments, Type, need};
use super::fault::Result;
use super::value::{structure, text};
use super::verb::{Kind, Origin, Row, Verb, nil};
use crate::host::{Peer, PeerAddress};
use crate::model::Timestamp;
use crate::operation::plan::{self, Plan};
use crate::wire::{Answer, Caller, Role, Value};
use futures_util::future::{BoxFuture, FutureExt};

const ADDRESS: super::arguments::Param = need(
    "address",
    Type::Text,
    "HOST or HOST:PORT; HOST is a name or an IP address, PORT is 8899 if not said",
);

#[rustfmt::skip]
const OWN: &[Row] = &[
    Row::new("peer_add", &[ADDRESS, need("fingerprint", Type::Text, "SHA-256 of the peer's CA certificate (ca_fingerprint of certificate_get there), or of its server certificate")], "nil", Role::Admin,
        Kind::Job(peer_add, nil), "Trusts another host: VMs may go there and come from there. The other host must trust this one too. One that is there already gets the new fingerprint."),
    Row::new("peer_list", &[], "array", Role::Viewer, Kind::Read(peer_list), "All peers, by address."),
    Row::new("peer_remove", &[ADDRESS], "nil", Role::Admin,
        Kind::Job(peer_remove, nil), "Trusts another host no more, from the next call on."),
];

pub fn verbs() -> impl Iterator<Item = Verb> {
    OWN.iter().map(|row| row.of("peer", Origin::Own))
}

fn peer_add<'a>(_: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move {
        let address = arguments.parse("address")?;
        let fingerprint = arguments.parse("fingerprint")?;
        Ok(plan::add_peer(Peer { address, fingerprint, added: Timestamp::now() }))
    }
    .boxed()
}

fn peer_remove<'a>(_: &'a Api, arguments: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Plan>> {
    async move { Ok(plan::remove_peer(arguments.parse::<PeerAddress>("address")?)) }.boxed()
}

fn peer_list<'a>(api: &'a Api, _: &'a Arguments, _: &'a Caller) -> BoxFuture<'a, Result<Answer>> {
    async move {
        let peers = api.operations.peers();
        let rows = peers.iter().map(|peer| {
            structure([
                ("address", text(&peer.address)),
                ("fingerprint", text(&peer.fingerprint)),
                ("added", text(peer.added)),
            ])
        });
        Ok(Value::Array(rows.collect()).into())
    }
    .boxed()
}
