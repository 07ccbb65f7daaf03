//! The host, its password, its owner, its certificate.

use super::args::{CertificateCommand, OwnershipCommand};
use super::values::text;
use super::{CtlError, Session};
use crate::model::Secret;
use nix::sys::termios::{self, LocalFlags, SetArg, Termios};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use xmlrpc::Value;
use zeroize::Zeroizing;

/// The dialect's one user.
const USER: &str = "oracle";

/// No password is longer; what is longer is the wrong file.
const MAX_PASSWORD_BYTES: u64 = 1024;

pub async fn show(session: &mut Session<'_>) -> Result<(), CtlError> {
    let host = session.read("host_get", &[]).await?;
    session.printer.value(&host)
}

pub async fn set_password(session: &mut Session<'_>, file: Option<PathBuf>) -> Result<(), CtlError> {
    let password = match file {
        Some(file) => password_of_file(&file)?,
        None if io::stdin().is_terminal() => ask_password(session)?,
        None => first_line(io::stdin().lock(), Path::new("the input"))?,
    };
    let params = [Value::from(USER), Value::from(password.expose())];
    session.change("update_agent_password", &params).await?;
    session.printer.note("the password is set");
    Ok(())
}

fn password_of_file(file: &Path) -> Result<Secret, CtlError> {
    let opened = std::fs::File::open(file)
        .map_err(|error| CtlError::File { file: file.to_owned(), problem: error.to_string() })?;
    first_line(BufReader::new(opened), file)
}

fn first_line(input: impl BufRead, name: &Path) -> Result<Secret, CtlError> {
    let wrong = |problem: String| CtlError::File { file: name.to_owned(), problem };
    let mut line = Zeroizing::new(String::new());
    input.take(MAX_PASSWORD_BYTES + 2).read_line(&mut line).map_err(|error| wrong(error.to_string()))?;
    let password = line.trim_end_matches(['\n', '\r']);
    if password.is_empty() || password.len() as u64 > MAX_PASSWORD_BYTES {
        let allowed = format!("its first line must be a password of 1 to {MAX_PASSWORD_BYTES} bytes");
        return Err(wrong(allowed));
    }
    Ok(Secret::new(password))
}

fn ask_password(session: &mut Session<'_>) -> Result<Secret, CtlError> {
    let terminal = Path::new("the terminal");
    let quiet = Quiet::new().map_err(|error| CtlError::Failed(format!("the terminal's echo: {error}")))?;
    prompt("New password: ")?;
    let first = first_line(io::stdin().lock(), terminal);
    session.printer.note("");
    let first = first?;
    prompt("The same again: ")?;
    let second = first_line(io::stdin().lock(), terminal);
    session.printer.note("");
    drop(quiet);
    if first != second? {
        return Err(CtlError::Usage("the two passwords differ; nothing was changed".to_owned()));
    }
    Ok(first)
}

/// Prompts go to stderr: stdout is for what was asked for.
fn prompt(text: &str) -> Result<(), CtlError> {
    let mut stderr = io::stderr();
    stderr.write_all(text.as_bytes())?;
    Ok(stderr.flush()?)
}

/// A terminal that shows nothing of what is typed, as long as this lives.
struct Quiet(Termios);

impl Quiet {
    fn new() -> nix::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut without = before.clone();
        without.local_flags.remove(LocalFlags::ECHO);
        termios::tcsetattr(io::stdin(), SetArg::TCSAFLUSH, &without)?;
        Ok(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // Nothing can be done if the terminal is gone.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSAFLUSH, &self.0);
    }
}

pub async fn ownership(session: &mut Session<'_>, command: OwnershipCommand) -> Result<(), CtlError> {
    let host = session.read("host_get", &[]).await?;
    let ownership = host.get("ownership").cloned().unwrap_or(Value::Nil);
    let manager = text(&ownership, "manager_uuid").to_owned();
    match command {
        OwnershipCommand::Show if session.printer.is_json() => session.printer.value(&ownership),
        OwnershipCommand::Show if manager.is_empty() => session.printer.line("nobody owns this host"),
        OwnershipCommand::Show => session.printer.value(&ownership),
        OwnershipCommand::Release if manager.is_empty() => {
            session.printer.note("nobody owns this host");
            Ok(())
        }
        OwnershipCommand::Release => {
            session.change("release_ownership", &[Value::from(manager.as_str())]).await?;
            session.printer.note(&format!("{manager} no longer owns this host"));
            Ok(())
        }
    }
}

pub async fn certificate(session: &mut Session<'_>, command: CertificateCommand) -> Result<(), CtlError> {
    if let CertificateCommand::Renew = command {
        session.change("certificate_renew", &[]).await?;
        session.printer.note("the certificate is renewed");
    }
    let certificate = session.read("certificate_get", &[]).await?;
    session.printer.value(&certificate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_the_first_line_and_never_empty_or_endless() {
        let of = |text: &str| first_line(text.as_bytes(), Path::new("f"));
        assert_eq!(of("secret\nmore\n").unwrap().expose(), "secret");
        assert_eq!(of("with blanks \r\n").unwrap().expose(), "with blanks ");
        assert_eq!(of("no end").unwrap().expose(), "no end");
        assert!(of("").is_err() && of("\nsecond").is_err());
        assert!(of(&"x".repeat(1024)).is_ok() && of(&"x".repeat(1025)).is_err());
    }
}
