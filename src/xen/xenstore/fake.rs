//! A xenstored for tests, on a Unix socket: tree, watches, transactions that meet, errors by name, and the moods
//! that a client must live through (slowness, silence, garbage, closing in the middle of a message).

use super::codec::{Decoder, Kind, Message};
use super::{Client, Endpoint};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// How it answers.
#[derive(Debug, Clone, Default)]
pub struct Mood {
    /// Before each answer.
    pub delay: Duration,
    /// Requests of these types get no answer.
    pub deaf_to: Vec<u32>,
    /// Instead of the next answer: these bytes.
    pub garbage: Option<Vec<u8>>,
    /// Of the next answer only so many bytes, then the connection is closed.
    pub cut_at: Option<usize>,
    /// Answers in the reverse order, two at a time.
    pub swaps: bool,
}

#[derive(Debug, Default)]
pub struct State {
    pub nodes: BTreeMap<String, Vec<u8>>,
    pub domains: BTreeSet<u32>,
    pub mood: Mood,
    /// Requests seen, by type.
    pub seen: HashMap<u32, usize>,
    pub open_transactions: BTreeMap<u32, Snapshot>,
    /// By connection: path and token.
    pub watches: HashMap<u64, Vec<(String, String)>>,
    connections: HashMap<u64, mpsc::UnboundedSender<Vec<u8>>>,
    pub connections_made: u64,
    generation: u64,
    next_transaction: u32,
}

#[derive(Debug)]
pub struct Snapshot {
    generation: u64,
    nodes: BTreeMap<String, Vec<u8>>,
    changed: Vec<String>,
}

pub struct Fake {
    pub state: Arc<Mutex<State>>,
    pub folder: tempfile::TempDir,
    listener: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.close();
    }
}

impl Fake {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut fake = Self { state: Arc::default(), folder, listener: None };
        fake.open();
        fake
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn client(&self) -> Client {
        Client::start(Endpoint::Socket(self.socket()), Duration::from_secs(5))
    }

    pub fn open(&mut self) {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let state = Arc::clone(&self.state);
        self.listener = Some(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&state)));
            }
        }));
    }

    /// Gone, with its socket; the tree stays for the next one.
    pub fn close(&mut self) {
        if let Some(task) = self.listener.take() {
            task.abort();
        }
        let _ = std::fs::remove_file(self.socket());
        self.disconnect();
    }

    pub fn disconnect(&self) {
        let mut state = self.state.lock().unwrap();
        state.connections.clear();
        state.watches.clear();
        state.open_transactions.clear();
    }

    pub fn mood(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }

    pub fn seen(&self, kind: Kind) -> usize {
        self.state.lock().unwrap().seen.get(&(kind as u32)).copied().unwrap_or(0)
    }

    pub fn write(&self, path: &str, value: &[u8]) {
        self.state.lock().unwrap().write(path, value);
    }

    pub fn introduce(&self, domid: u32, name: &str) {
        let mut state = self.state.lock().unwrap();
        state.domains.insert(domid);
        state.write(&format!("/local/domain/{domid}/name"), name.as_bytes());
        state.fire("@introduceDomain");
    }

    pub fn release(&self, domid: u32) {
        let mut state = self.state.lock().unwrap();
        state.domains.remove(&domid);
        state.remove(&format!("/local/domain/{domid}"));
        state.fire("@releaseDomain");
    }

    /// Ended by itself: still there.
    pub fn end(&self) {
        self.state.lock().unwrap().fire("@releaseDomain");
    }
}

fn below(path: &str, above: &str) -> bool {
    path == above || above == "/" || path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'))
}

fn children(nodes: &BTreeMap<String, Vec<u8>>, path: &str) -> Vec<String> {
    let above = if path == "/" { "/".to_owned() } else { format!("{path}/") };
    let names =
        nodes.keys().filter_map(|key| key.strip_prefix(&above)).map(|rest| rest.split('/').next().unwrap());
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect()
}

fn put(nodes: &mut BTreeMap<String, Vec<u8>>, path: &str, value: &[u8]) {
    for (at, _) in path.match_indices('/').skip(1) {
        nodes.entry(path[..at].to_owned()).or_default();
    }
    nodes.insert(path.to_owned(), value.to_vec());
}

impl State {
    fn write(&mut self, path: &str, value: &[u8]) {
        put(&mut self.nodes, path, value);
        self.generation += 1;
        self.fire(path);
    }

    fn remove(&mut self, path: &str) {
        self.nodes.retain(|key, _| !below(key, path));
        self.generation += 1;
        self.fire(path);
    }

    pub fn fire(&self, path: &str) {
        for (connection, watches) in &self.watches {
            let Some(out) = self.connections.get(connection) else { continue };
            for (watched, token) in watches.iter().filter(|(w, _)| below(path, w) || below(w, path)) {
                let at = if below(path, watched) { path } else { watched };
                let _ = out.send(message(Kind::WatchEvent, 0, 0, format!("{at}\0{token}\0").as_bytes()));
            }
        }
    }

    fn answer(&mut self, connection: u64, request: &Message) -> Result<Vec<u8>, &'static str> {
        let payload = String::from_utf8_lossy(&request.payload).into_owned();
        let mut parts = payload.split('\0');
        let (path, second) = (parts.next().unwrap_or("").to_owned(), parts.next().unwrap_or("").to_owned());
        let raw = || request.payload[path.len() + 1..].to_vec();
        match request.kind {
            Kind::Watch => {
                let watches = self.watches.entry(connection).or_default();
                if watches.contains(&(path.clone(), second.clone())) {
                    return Err("EEXIST");
                }
                watches.push((path, second));
                Ok(b"OK\0".to_vec())
            }
            Kind::Unwatch => {
                let watches = self.watches.entry(connection).or_default();
                let before = watches.len();
                watches.retain(|w| *w != (path.clone(), second.clone()));
                if watches.len() < before { Ok(b"OK\0".to_vec()) } else { Err("ENOENT") }
            }
            Kind::TransactionStart => {
                self.next_transaction += 1;
                let snapshot =
                    Snapshot { generation: self.generation, nodes: self.nodes.clone(), changed: Vec::new() };
                self.open_transactions.insert(self.next_transaction, snapshot);
                Ok(format!("{}\0", self.next_transaction).into_bytes())
            }
            Kind::TransactionEnd => {
                let snapshot = self.open_transactions.remove(&request.transaction).ok_or("ENOENT")?;
                if path == "T" {
                    if snapshot.generation != self.generation {
                        return Err("EAGAIN");
                    }
                    self.nodes = snapshot.nodes;
                    self.generation += 1;
                    snapshot.changed.iter().for_each(|path| self.fire(path));
                }
                Ok(b"OK\0".to_vec())
            }
            Kind::GetDomainPath => Ok(format!("/local/domain/{path}\0").into_bytes()),
            Kind::IsDomainIntroduced => {
                let there = path.parse().is_ok_and(|domid: u32| self.domains.contains(&domid));
                Ok(if there { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
            Kind::GetPerms | Kind::Read | Kind::Directory | Kind::DirectoryPart => {
                let nodes = match request.transaction {
                    0 => &self.nodes,
                    number => &self.open_transactions.get(&number).ok_or("ENOENT")?.nodes,
                };
                let value = nodes.get(&path).filter(|_| path != "/").map_or(&[][..], |value| value);
                if !nodes.contains_key(&path) && path != "/" {
                    return Err("ENOENT");
                }
                let names: Vec<u8> =
                    children(nodes, &path).iter().flat_map(|n| format!("{n}\0").into_bytes()).collect();
                match request.kind {
                    Kind::Read => Ok(value.to_vec()),
                    Kind::GetPerms => Ok(b"n0\0r7\0".to_vec()),
                    Kind::Directory if names.len() > super::MAX_PAYLOAD_BYTES => Err("E2BIG"),
                    Kind::Directory => Ok(names),
                    _ => Ok(part(self.generation, &names, second.parse().unwrap())),
                }
            }
            Kind::Write | Kind::Mkdir | Kind::Rm | Kind::SetPerms => {
                let value = if request.kind == Kind::Write { raw() } else { Vec::new() };
                match request.transaction {
                    0 if request.kind == Kind::Rm && !self.nodes.contains_key(&path) => return Err("ENOENT"),
                    0 if request.kind == Kind::Rm => self.remove(&path),
                    0 if request.kind == Kind::SetPerms => {}
                    0 => self.write(&path, &value),
                    number => {
                        let snapshot = self.open_transactions.get_mut(&number).ok_or("ENOENT")?;
                        match request.kind {
                            Kind::Rm => snapshot.nodes.retain(|key, _| !below(key, &path)),
                            _ => put(&mut snapshot.nodes, &path, &value),
                        }
                        snapshot.changed.push(path);
                    }
                }
                Ok(b"OK\0".to_vec())
            }
            _ => Err("ENOSYS"),
        }
    }
}

/// What fits of the names from `offset` on; an empty name at the end of all.
fn part(generation: u64, names: &[u8], offset: usize) -> Vec<u8> {
    let mut part = format!("{generation}\0").into_bytes();
    let mut at = offset.min(names.len());
    while at < names.len() {
        let length = names[at..].iter().position(|byte| *byte == 0).unwrap() + 1;
        if part.len() + length + 1 > super::MAX_PAYLOAD_BYTES {
            return part;
        }
        part.extend_from_slice(&names[at..at + length]);
        at += length;
    }
    part.push(0);
    part
}

fn message(kind: Kind, request: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let payload = Bytes::copy_from_slice(payload);
    Message { kind, request, transaction, payload }.encode().unwrap().to_vec()
}

async fn serve(stream: UnixStream, state: Arc<Mutex<State>>) {
    let (mut read, mut write) = stream.into_split();
    let (out, mut outgoing) = mpsc::unbounded_channel::<Vec<u8>>();
    let connection = {
        let mut state = state.lock().unwrap();
        state.connections_made += 1;
        let connection = state.connections_made;
        state.connections.insert(connection, out);
        connection
    };
    let writer = tokio::spawn(async move {
        while let Some(bytes) = outgoing.recv().await {
            // An empty message is the end.
            if bytes.is_empty() || write.write_all(&bytes).await.is_err() {
                break;
            }
        }
    });
    let reader = async {
        let mut decoder = Decoder::default();
        let mut held: Option<Vec<u8>> = None;
        while read.read_buf(decoder.buffer()).await.is_ok_and(|n| n > 0) {
            while let Ok(Some(request)) = decoder.next() {
                let delay = state.lock().unwrap().mood.delay;
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                handle(&state, connection, &request, &mut held);
            }
        }
    };
    tokio::select! {
        _ = writer => {}
        () = reader => {}
    }
    let mut state = state.lock().unwrap();
    state.connections.remove(&connection);
    state.watches.remove(&connection);
}

fn handle(state: &Mutex<State>, connection: u64, request: &Message, held: &mut Option<Vec<u8>>) {
    let mut state = state.lock().unwrap();
    *state.seen.entry(request.kind as u32).or_default() += 1;
    let answer = state.answer(connection, request);
    let Some(out) = state.connections.get(&connection).cloned() else { return };
    if state.mood.deaf_to.contains(&(request.kind as u32)) {
        return;
    }
    if let Some(garbage) = state.mood.garbage.take() {
        let _ = out.send(garbage);
        return;
    }
    let (kind, payload) = match &answer {
        Ok(payload) => (request.kind, payload.clone()),
        Err(name) => (Kind::Error, format!("{name}\0").into_bytes()),
    };
    let bytes = message(kind, request.request, request.transaction, &payload);
    if let Some(at) = state.mood.cut_at.take() {
        let _ = out.send(bytes[..at].to_vec());
        let _ = out.send(Vec::new());
        return;
    }
    if state.mood.swaps && held.is_none() {
        *held = Some(bytes);
        return;
    }
    let _ = out.send(bytes);
    if let Some(earlier) = held.take() {
        let _ = out.send(earlier);
    }
    // A watch is told once at its registration.
    if request.kind == Kind::Watch && answer.is_ok() {
        let text = String::from_utf8_lossy(&request.payload).into_owned();
        let _ = out.send(message(Kind::WatchEvent, 0, 0, text.as_bytes()));
    }
}
