//! A daemon for tests: answers what it was told to, in order, and keeps what it was asked.

use super::{Cli, CtlError, Exit, Format, Printer, Rpc, run};
use async_trait::async_trait;
use clap::Parser;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xmlrpc::Value;

/// What the fake does when it is called.
pub enum Reply {
    Answer(Value),
    Fault(&'static str),
    Unreachable,
    /// The daemon answers nothing within the time it was given.
    Silence,
    /// An answer after all the seconds that the second parameter allows.
    Late(serde_json::Value),
}

/// A verb with the parameters it was called with.
type Called = (String, Vec<Value>);

#[derive(Default, Clone)]
pub struct Fake {
    /// The verb that must come next, and what it is answered.
    script: Arc<Mutex<VecDeque<(&'static str, Reply)>>>,
    pub calls: Arc<Mutex<Vec<Called>>>,
}

impl Fake {
    pub fn then(self, verb: &'static str, reply: Reply) -> Self {
        self.script.lock().unwrap().push_back((verb, reply));
        self
    }

    pub fn answers(self, verb: &'static str, json: serde_json::Value) -> Self {
        self.then(verb, Reply::Answer(super::values::from_json(json).unwrap()))
    }

    /// The parameters of the n-th call.
    pub fn params(&self, n: usize) -> serde_json::Value {
        super::values::to_json(&Value::Array(self.calls.lock().unwrap()[n].1.clone()))
    }
}

#[async_trait]
impl Rpc for Fake {
    async fn call(&mut self, verb: &str, params: &[Value], timeout: Duration) -> Result<Value, CtlError> {
        self.calls.lock().unwrap().push((verb.to_owned(), params.to_vec()));
        let next = self.script.lock().unwrap().pop_front();
        let Some((expected, reply)) = next else { panic!("{verb} was called, and nothing was expected") };
        assert_eq!(verb, expected);
        match reply {
            Reply::Answer(value) => Ok(value),
            Reply::Fault(text) => Err(CtlError::fault(1, text)),
            Reply::Unreachable => {
                let problem = "No such file or directory".to_owned();
                Err(CtlError::Unreachable { socket: PathBuf::from("/s"), problem })
            }
            Reply::Late(json) => {
                let wait_s = super::values::whole(&params[1]).unwrap();
                tokio::time::sleep(Duration::from_secs(u64::try_from(wait_s).unwrap())).await;
                Ok(super::values::from_json(json).unwrap())
            }
            Reply::Silence => {
                tokio::time::sleep(timeout).await;
                Err(CtlError::Timeout { verb: verb.to_owned(), seconds: timeout.as_secs() })
            }
        }
    }
}

/// How a run ended.
pub struct Ran {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

/// Runs dom0ctl with these words on a fake daemon, to the end of the fake's script.
pub async fn ctl(fake: &Fake, words: &[&str]) -> Ran {
    let cli = Cli::try_parse_from([&["dom0ctl"], words].concat()).unwrap();
    let format: Format = cli.output;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let printer = Printer::new(&mut stdout, &mut stderr, format, false);
    let exit = run(cli, Box::new(fake.clone()), printer).await;
    assert_eq!(fake.script.lock().unwrap().len(), 0, "calls that were expected did not come");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { exit, stdout: text(stdout), stderr: text(stderr) }
}
