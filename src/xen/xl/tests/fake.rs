//! The fake xl: a Python-free script that does what a file beside it says for each call, and a XenStore in memory.

use super::super::{Options, Xl};
use crate::xen::xenstore::{Client, DomainWatch, Endpoint, StoreError, StoreRead};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const HEAD: &str = "Name ID Mem VCPUs\tState\tTime(s) UUID Reason-Code\tSecurity Label\nDomain-0 0 1024 2 r----- 60.5 \
     00000000-0000-0000-0000-000000000000 - -\n";
pub const VM: &str = "98cd556e-8b89-4870-8957-8c0d9a96dbb4";

/// A line of `xl list -v` for domain 6 of [`VM`].
pub fn line(state: &str, reason: &str) -> String {
    format!("pv1 6 96 1 {state} 3.2 {VM} {reason} -\n")
}

/// What it holds, and whether it is lost.
#[derive(Default)]
pub struct Memory(pub Mutex<BTreeMap<String, Vec<u8>>>, pub AtomicBool);

impl Memory {
    fn there(&self) -> crate::xen::xenstore::Result<()> {
        if self.1.load(Ordering::Relaxed) { Err(StoreError::Lost) } else { Ok(()) }
    }
}

#[async_trait]
impl StoreRead for Memory {
    async fn read(&self, path: &str) -> crate::xen::xenstore::Result<Option<Vec<u8>>> {
        self.there()?;
        Ok(self.0.lock().unwrap().get(path).cloned())
    }

    async fn list(&self, path: &str) -> crate::xen::xenstore::Result<Vec<String>> {
        self.there()?;
        let below = format!("{path}/");
        let all = self.0.lock().unwrap();
        let names = all.keys().filter_map(|key| key.strip_prefix(&below));
        let mut names: Vec<String> =
            names.map(|rest| rest.split('/').next().unwrap_or(rest).to_owned()).collect();
        names.dedup();
        Ok(names)
    }

    async fn write(&self, path: &str, value: &[u8]) -> crate::xen::xenstore::Result<()> {
        self.there()?;
        self.0.lock().unwrap().insert(path.to_owned(), value.to_vec());
        Ok(())
    }

    async fn rm(&self, path: &str) -> crate::xen::xenstore::Result<()> {
        self.there()?;
        self.0.lock().unwrap().remove(path);
        Ok(())
    }
}

pub struct Fake {
    folder: tempfile::TempDir,
    pub store: Arc<Memory>,
}

impl Fake {
    /// An xl that does, for each of its commands, what the script given for it says.
    pub fn new(commands: &[(&str, &str)]) -> Self {
        let fake = Self { folder: tempfile::tempdir().unwrap(), store: Arc::default() };
        let cases = commands.iter().map(|(name, script)| format!("{name})\n{script}\n;;\n"));
        let script = format!(
            "#!/bin/sh\ncd {}\necho \"$*\" >> calls\ncase \"$1\" in\n{}*) echo no such command >&2; exit 1;;\nesac\n",
            fake.folder.path().display(),
            cases.collect::<String>()
        );
        let path = fake.path("xl");
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        fake.list("");
        fake
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What `cat listing` tells from now on.
    pub fn list(&self, lines: &str) {
        std::fs::write(self.path("new"), format!("{HEAD}{lines}")).unwrap();
        std::fs::rename(self.path("new"), self.path("listing")).unwrap();
    }

    pub fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub async fn open(&self, limit: Duration) -> Xl {
        let options = Options {
            xl: Some(self.path("xl")),
            exe: "/bin/true".into(),
            folder: self.path("private"),
            limit,
        };
        // Nobody is there: the watch waits.
        let client = Client::start(Endpoint::Socket(self.path("no-xenstore")), limit);
        Xl::on_store(options, self.store.clone(), DomainWatch::start(client)).await.unwrap()
    }
}
