//! What drivers hold: a way to the world, in this process or in another. Each call ends by its deadline.

use super::engine::Outcome;
use super::remote::Remote;
use super::{
    Answer, Audit, Behaviour, Engine, Observation, Options, Reason, Request, Result, Rule, WorldError,
};
use crate::model::network::{Change, Changed, LinkFacts, Owner};
use crate::model::{IfName, VmId};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// For the requests of tests and owners, which nothing delays.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);

/// A client within this process, by its number; the switch says that it is gone.
type Client = (u64, tokio_util::sync::CancellationToken);

/// Cheap to clone; all clones speak to the same world, as the same client.
#[derive(Debug, Clone)]
pub struct Handle(Way);

#[derive(Debug, Clone)]
enum Way {
    InProcess(Arc<Engine>, Client),
    Remote(Arc<Remote>),
}

impl Handle {
    /// A world of its own in this process, in tokio's time; gone when the last handle is. Must be called
    /// within a tokio runtime.
    pub fn in_process(options: Options) -> Self {
        let engine = Engine::start(options);
        let client = (engine.new_client(), tokio_util::sync::CancellationToken::new());
        Self(Way::InProcess(engine, client))
    }

    /// Another client of the same world, with an end of its own.
    pub fn another_client(&self) -> Self {
        match &self.0 {
            Way::InProcess(engine, _) => {
                let client = (engine.new_client(), tokio_util::sync::CancellationToken::new());
                Self(Way::InProcess(Arc::clone(engine), client))
            }
            Way::Remote(remote) => Self(Way::Remote(Arc::clone(remote))),
        }
    }

    /// Goes away, as a process that is killed: nothing is asked any more, and the world sees it go.
    pub fn leave(&self) {
        if let Way::InProcess(engine, (number, gone)) = &self.0 {
            gone.cancel();
            engine.client_gone(*number);
        }
    }

    /// The world's process behind this socket. Connects in the background, and again whenever the connection
    /// breaks. Must be called within a tokio runtime.
    pub fn remote(socket: &Path) -> Self {
        Self(Way::Remote(Arc::new(Remote::start(socket.to_owned()))))
    }

    /// `Timeout`: the effect is unknown, and may still come.
    pub async fn call(&self, request: Request, timeout: Duration) -> Result<Answer> {
        let call = async {
            match &self.0 {
                Way::InProcess(engine, client) => {
                    call_in_process(engine.clone(), client.clone(), request).await
                }
                Way::Remote(remote) => remote.call(request).await,
            }
        };
        tokio::time::timeout(timeout, call).await.unwrap_or(Err(WorldError::Timeout))
    }

    /// Observations from now on; `Everything` on each new connection, or for a slow reader.
    pub fn observe<T: From<Observation> + Send + 'static>(&self) -> mpsc::Receiver<T> {
        match &self.0 {
            Way::InProcess(engine, _) => engine.observe(),
            Way::Remote(remote) => remote.observe(),
        }
    }

    /// Rings after each change of links, addresses and routes, whoever made it, and on each new connection.
    pub fn observe_network(&self) -> mpsc::Receiver<Changed> {
        match &self.0 {
            Way::InProcess(engine, _) => engine.observe_network(),
            Way::Remote(remote) => remote.observe_network(),
        }
    }

    async fn control(&self, request: Request) -> Result<()> {
        self.call(request, CONTROL_TIMEOUT).await.map(|_| ())
    }

    /// `vm` `None`: the default for all VMs without one of their own.
    pub async fn set_behaviour(&self, vm: Option<VmId>, behaviour: Behaviour) -> Result<()> {
        self.control(Request::SetBehaviour { vm, behaviour }).await
    }

    /// The VM's guest ends now, by itself.
    pub async fn end_guest(&self, vm: VmId, reason: Reason) -> Result<()> {
        self.control(Request::EndGuest { vm, reason }).await
    }

    /// The VM's guest writes into its own part of XenStore: `data/meminfo_free`.
    pub async fn guest_writes(&self, vm: VmId, key: &str, value: &[u8]) -> Result<()> {
        self.control(Request::GuestWrites { vm, key: key.to_owned(), value: value.to_vec() }).await
    }

    /// Whether the machine is set up to run the `xendomains` service.
    pub async fn set_xendomains(&self, enabled: bool) -> Result<()> {
        self.control(Request::SetXendomains { enabled }).await
    }

    /// The cable of a port of hardware.
    pub async fn plug_cable(&self, link: &IfName, plugged: bool) -> Result<()> {
        self.control(Request::PlugCable { link: link.clone(), plugged }).await
    }

    /// Another service of the host configures this link, or none does.
    pub async fn set_link_owner(&self, link: &IfName, owner: Option<Owner>) -> Result<()> {
        self.control(Request::SetLinkOwner { link: link.clone(), owner }).await
    }

    pub async fn set_link_facts(&self, link: &IfName, facts: LinkFacts) -> Result<()> {
        self.control(Request::SetLinkFacts { link: link.clone(), facts: Box::new(facts) }).await
    }

    /// An address beyond the cables that does not answer, or answers again.
    pub async fn set_silent(&self, address: IpAddr, silent: bool) -> Result<()> {
        self.control(Request::SetSilent { address, silent }).await
    }

    /// Somebody else changes the network.
    pub async fn change_from_outside(&self, change: Change) -> Result<()> {
        self.control(Request::ChangeFromOutside { change }).await
    }

    pub async fn add_rule(&self, rule: Rule) -> Result<()> {
        self.control(Request::AddRule { rule }).await
    }

    pub async fn clear_rules(&self) -> Result<()> {
        self.control(Request::ClearRules).await
    }

    pub async fn audit(&self) -> Result<Audit> {
        match self.call(Request::Audit, CONTROL_TIMEOUT).await? {
            Answer::Audit(audit) => Ok(*audit),
            _ => Err(unexpected()),
        }
    }

    /// Ends the world's process and all domains with it. A world in this process ends with its handles.
    pub async fn end_world(&self) -> Result<()> {
        self.control(Request::EndWorld).await
    }
}

/// What was begun is finished even if the caller stops waiting, as in a world of another process.
async fn call_in_process(engine: Arc<Engine>, client: Client, request: Request) -> Result<Answer> {
    let (number, gone) = client;
    if gone.is_cancelled() {
        return Err(WorldError::Unreachable("the client is gone".to_owned()));
    }
    let served = tokio::spawn(async move {
        let outcome = engine.serve_client(request, number).await;
        if gone.is_cancelled() {
            // What was done after the client had gone is abandoned too.
            engine.client_gone(number);
        }
        outcome
    });
    let served = served.await;
    match served {
        Ok(Outcome::Answer(result)) => result,
        Ok(Outcome::Lost) => Err(WorldError::Unreachable("the connection broke".to_owned())),
        Ok(Outcome::Never) => std::future::pending().await,
        Err(_) => Err(WorldError::Failed("the simulated world failed".to_owned())),
    }
}

/// The world answered something that the request does not ask for.
pub(crate) fn unexpected() -> WorldError {
    WorldError::Failed("the simulated world gave an answer of another kind".to_owned())
}
