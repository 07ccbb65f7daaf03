//! Building domains: `xl create` and `xl restore`. All or nothing: what a build that failed, was killed or was
//! forgotten has left is destroyed, and never what was there before.

use super::memory::{FROM_STDIN, Feed, nothing_moved};
use super::run::{Leaves, Patience, kill_family};
use super::{Xl, config_file};
use crate::model::{MiB, SafePath, VmId};
use crate::xen::config::DomainConfig;
use crate::xen::{DomId, Result, RunState, ToolstackError, moving_deadline};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tokio_util::sync::CancellationToken;

/// What the file of a configuration in use is called: the VM's id and this.
const ENDING: &str = ".cfg";

/// A folder that only we may enter.
pub(super) fn make_folder(folder: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| ToolstackError::Unreachable(format!("{}: {error}", folder.display())))
}

/// A configuration on its way to xl, for root's eyes only, and gone with the build.
struct ConfigFile(PathBuf);

impl ConfigFile {
    fn new(folder: &Path, vm: VmId, text: &str) -> Result<Self> {
        let path = folder.join(format!("{vm}{ENDING}"));
        let failed = |error| ToolstackError::Failed(format!("{}: {error}", path.display()));
        // One of a build that is over: builds of a VM come one at a time.
        let _ = std::fs::remove_file(&path);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        Ok(Self(path))
    }
}

impl Drop for ConfigFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(file = %self.0.display(), %error, "a configuration that was used stays behind");
        }
    }
}

/// Why a build failed.
#[derive(Debug)]
enum NotBuilt {
    /// xl said no, in these words.
    Refused(String),
    /// It was killed; these were its last words.
    Killed(String),
    Known(ToolstackError),
}

impl From<(ToolstackError, String)> for NotBuilt {
    fn from((error, words): (ToolstackError, String)) -> Self {
        match error {
            ToolstackError::Failed(text) => Self::Refused(text),
            ToolstackError::Timeout => Self::Killed(words),
            other => Self::Known(other),
        }
    }
}

impl Xl {
    /// Builds a domain anew, or from a saved file.
    pub(super) async fn build(
        &self,
        config: &DomainConfig,
        from: Option<&SafePath>,
        paused: bool,
        cancelled: &CancellationToken,
    ) -> Result<DomId> {
        let text = config_file::write(config).map_err(|error| ToolstackError::Failed(error.to_string()))?;
        let _one_at_a_time = self.inner.builds.lock(config.vm).await;
        let _turn = self.turn_to_build(cancelled).await?;
        let before = self.lines().await?;
        if before.iter().any(|line| line.vm == Some(config.vm) || line.name == config.name.as_str()) {
            return Err(ToolstackError::Exists);
        }
        let before: BTreeSet<DomId> = before.into_iter().map(|line| line.domid).collect();
        let file = ConfigFile::new(&self.inner.folder, config.vm, &text)?;
        let path = file.0.to_string_lossy().into_owned();
        let mut args = vec![if from.is_some() { "restore" } else { "create" }, "-e"];
        args.extend(paused.then_some("-p"));
        args.push(&path);
        args.extend(from.map(|_| FROM_STDIN));
        let built = tokio::select! {
            built = self.run_build(&args, from, config.memory) => built,
            () = cancelled.cancelled() => Err(NotBuilt::Killed(String::new())),
        };
        let built = match built {
            Ok(()) => self.new_domain(config.vm, &before).await.map_err(NotBuilt::Known),
            Err(why) => Err(why),
        };
        match built {
            Ok(domid) => Ok(domid),
            Err(why) => Err(self.nothing_left(config, &before, why).await),
        }
    }

    /// A create has the longer the more memory it gives; a restore has time as long as the saved domain is read.
    async fn run_build(
        &self,
        args: &[&str],
        from: Option<&SafePath>,
        memory: MiB,
    ) -> std::result::Result<(), NotBuilt> {
        let (runner, limit) = (&self.inner.runner, self.inner.limit);
        let Some(file) = from else {
            let limit = moving_deadline(limit, memory);
            return runner
                .xl_or_words(args, Leaves::Processes, limit)
                .await
                .map(drop)
                .map_err(NotBuilt::from);
        };
        let started = tokio::time::timeout(limit, Feed::start(file)).await;
        let late = || ToolstackError::Failed(format!("{file} did not open for {} s", limit.as_secs()));
        let (mut feed, stdin) = started.unwrap_or_else(|_| Err(late())).map_err(NotBuilt::Known)?;
        let patience = Patience::WhileItMoves(limit, feed.moved());
        let built = runner.xl_patiently(args, Leaves::Processes, stdin, patience).await.map(drop);
        built.map_err(|error| match (feed.broke(), NotBuilt::from(error)) {
            (Some(unread), _) => NotBuilt::Known(unread),
            (None, NotBuilt::Killed(words)) => NotBuilt::Known(nothing_moved("read", limit, &words)),
            (None, other) => other,
        })
    }

    /// The domain of this VM that was not there before.
    pub(super) async fn new_domain(&self, vm: VmId, before: &BTreeSet<DomId>) -> Result<DomId> {
        let all = self.lines().await?;
        let new = all.iter().find(|line| line.vm == Some(vm) && !before.contains(&line.domid));
        let lost = || ToolstackError::Failed("xl built a domain, and now there is none".to_owned());
        new.map(|line| line.domid).ok_or_else(lost)
    }

    /// Destroys what a failed build has left, and says why it failed.
    async fn nothing_left(
        &self,
        config: &DomainConfig,
        before: &BTreeSet<DomId>,
        why: NotBuilt,
    ) -> ToolstackError {
        if let Err(left) = self.destroy_new(config.vm, before).await {
            tracing::warn!(vm_uuid = %config.vm, ?why, %left, "what a failed build has left cannot be destroyed");
            return ToolstackError::Timeout;
        }
        match why {
            NotBuilt::Killed(words) => ToolstackError::Failed(format!(
                "xl did not end in time, or its caller has gone; it was killed, and nothing is left of the domain{}{words}",
                if words.is_empty() { "" } else { ". Its last words: " }
            )),
            NotBuilt::Refused(words) => match self.hypervisor().await {
                // xl's words for it differ with the kind of guest and the release; the figures tell.
                Ok(host) if host.free_memory < config.memory => {
                    ToolstackError::OutOfMemory { needed: config.memory, free: host.free_memory }
                }
                _ => ToolstackError::Failed(words),
            },
            NotBuilt::Known(error) => error,
        }
    }

    /// Destroys the domains of this VM that were not there before.
    pub(super) async fn destroy_new(&self, vm: VmId, before: &BTreeSet<DomId>) -> Result<()> {
        for line in self.lines().await? {
            if line.vm == Some(vm) && !before.contains(&line.domid) {
                match self.end(line.domid).await {
                    Ok(()) | Err(ToolstackError::NoSuchDomain) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// What builds of a former life have left. A domain that is paused then was never let run (xl lets it run last
    /// of all), so nothing is lost with it; one that runs was built to its end and stays.
    pub(super) async fn clear_up(&self) -> Result<()> {
        let folder = self.inner.folder.clone();
        let left = tokio::task::spawn_blocking(move || leftovers(&folder)).await.unwrap_or_default();
        if left.is_empty() {
            return Ok(());
        }
        let users = left.iter().map(|(_, path)| path.clone()).collect::<Vec<_>>();
        let _ = tokio::task::spawn_blocking(move || kill_users(&users)).await;
        let lines = self.lines().await?;
        for (vm, path) in left {
            let never_ran = |line: &&super::read::Line| line.vm == vm && line.state == RunState::Paused;
            if let (Some(vm), Some(line)) = (vm, lines.iter().find(never_ran)) {
                tracing::warn!(vm_uuid = %vm, domid = line.domid.0, "a domain in the making was left behind; it is destroyed");
                self.end(line.domid).await?;
            }
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }
}

/// Configurations (and sockets) of a former life.
fn leftovers(folder: &Path) -> Vec<(Option<VmId>, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name.strip_suffix(ENDING).and_then(|id| VmId::parse(id).ok()), entry.path())
        })
        .collect()
}

/// Kills each process, with its family, that was started with one of these files.
fn kill_users(files: &[PathBuf]) {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(words) = std::fs::read(process.path().join("cmdline")) else { continue };
        let mut words = words.split(|byte| *byte == 0);
        let is_xl = words.next().is_some_and(|first| first.ends_with(b"/xl") || first == b"xl");
        let uses = |word: &[u8]| files.iter().any(|file| file.as_os_str().as_encoded_bytes() == word);
        if is_xl && words.any(uses) {
            tracing::warn!(pid, "an xl of a former life still builds; it is killed");
            kill_family(Pid::from_raw(pid));
        }
    }
}
