//! Where the key of a store comes from.
//!
//! # Rules
//! - A card remembers the place of a key, never the key.
//! - The key is read anew by each command that needs it, and is held in memory only.
//! - What a card says is done only where the card is the effective user's own and nobody else may write it: one place
//!   is a command that is run.
//! - A key that others can read is refused: it protects nothing. Only of a credential this is not asked: it is systemd
//!   that made it for this service, and the list of who may read it shows as rights of a group.
//! - What was read is wiped from memory.

use crate::KeeperError;
use crate::ownership::Own;
use crate::subject::{Card, Subject};
use outlive_epoch_store::{SECRET_LEN, Secret};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use zeroize::Zeroizing;

/// Bytes that are read of what should be a key: more than any form of it has.
const LONGEST: u64 = 4 * SECRET_LEN as u64;
/// Where systemd puts the credentials of a service.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Where a key is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeySource {
    /// In this file.
    File(PathBuf),
    /// This command of the shell prints it.
    Command(String),
    /// In the credential of this name, which systemd gives to a service.
    Credential(String),
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "the key in {}", path.display()),
            Self::Command(command) => write!(f, "the key that `{command}` prints"),
            Self::Credential(name) => write!(f, "the key in the credential {name}"),
        }
    }
}

impl KeySource {
    /// Gets the key.
    ///
    /// # Errors
    /// Refused, with the remedy, where it is no key, or one that others can read; what the system says.
    pub fn read(&self) -> Result<Secret, KeeperError> {
        let given = match self {
            Self::File(path) => self.file(path, true)?,
            Self::Command(command) => self.command(command)?,
            Self::Credential(name) => self.file(&credential(name)?, false)?,
        };
        Secret::parse(&given).map_err(|error| KeeperError::Refused(format!("{self}: {error}")))
    }

    fn file(&self, path: &Path, private: bool) -> Result<Zeroizing<Vec<u8>>, KeeperError> {
        let failed = |source| KeeperError::Io {
            what: format!("read {self}"),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        let me = rustix::process::geteuid().as_raw();
        let owner = found.uid();
        if private && found.is_file() && owner != me && owner != 0 {
            return Err(KeeperError::Refused(format!(
                "{self} belongs to uid {owner}, and you are uid {me}: whose file it is knows the key; \
                 if it is yours: chown {me} {}",
                path.display()
            )));
        }
        if private && found.is_file() && found.mode() & 0o077 != 0 {
            return Err(KeeperError::Refused(format!(
                "{self} can be read or written by others (mode {:o}): chmod 600 {}",
                found.mode() & 0o7777,
                path.display()
            )));
        }
        let mut given = room();
        file.take(LONGEST).read_to_end(&mut given).map_err(failed)?;
        Ok(given)
    }

    fn command(&self, command: &str) -> Result<Zeroizing<Vec<u8>>, KeeperError> {
        let failed = |source| KeeperError::Io {
            what: format!("run the command for {self}"),
            source,
        };
        // It may ask whoever is at the terminal, on standard error.
        let mut child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut given = room();
        let read = match child.stdout.take() {
            Some(out) => out.take(LONGEST).read_to_end(&mut given),
            None => Ok(0),
        };
        let status = child.wait().map_err(failed)?;
        read.map_err(failed)?;
        if !status.success() {
            let what = format!("{self} is not there: the command ended with {status}");
            return Err(KeeperError::Refused(what));
        }
        Ok(given)
    }
}

/// For what should be a key: it does not grow, so that no copy of it is left behind.
fn room() -> Zeroizing<Vec<u8>> {
    Zeroizing::new(Vec::with_capacity(2 * LONGEST as usize))
}

/// The file of a credential.
fn credential(name: &str) -> Result<PathBuf, KeeperError> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(KeeperError::Usage(format!(
            "{name:?} is no name of a credential"
        )));
    }
    let dir = std::env::var_os(CREDENTIALS).ok_or_else(|| {
        KeeperError::Refused(format!(
            "the key is the credential {name} of a service, and this is run by none: use LoadCredential={name}:FILE \
             in its unit, or name another place of the key"
        ))
    })?;
    Ok(PathBuf::from(dir).join(name))
}

/// The key of a subject: from the place that was `asked` for, or else from the one on its card. `None` where neither
/// names one.
///
/// # Errors
/// As for [`KeySource::read`]; refused where the card is not one's own.
pub fn of_subject(
    asked: Option<&KeySource>,
    subject: &Subject,
    card: &Card,
) -> Result<Option<Secret>, KeeperError> {
    match (asked, &card.key) {
        (Some(source), _) => source.read().map(Some),
        (None, Some(source)) => {
            Own::check(subject.dir())?;
            source.read().map(Some)
        }
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn key(bytes: &[u8], mode: u32) -> (tempfile::TempDir, KeySource) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        (dir, KeySource::File(path))
    }

    fn bytes() -> Vec<u8> {
        (0..32).collect()
    }

    #[test]
    fn a_file_and_a_command_give_the_same_key() {
        let (_dir, file) = key(&bytes(), 0o600);
        let right = Secret::parse(&bytes()).unwrap().fingerprint();
        assert_eq!(file.read().unwrap().fingerprint(), right);
        let KeySource::File(path) = &file else {
            panic!("a file")
        };
        let command = KeySource::Command(format!("cat '{}'", path.display()));
        assert_eq!(command.read().unwrap().fingerprint(), right);
    }

    #[test]
    fn what_protects_nothing_is_refused_with_the_remedy() {
        let (_dir, file) = key(&bytes(), 0o640);
        let error = file.read().unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("chmod 600"), "{error}");
        let (_dir, file) = key(b"secret\n", 0o600);
        let error = file.read().unwrap_err();
        assert!(error.to_string().contains("passphrase"), "{error}");
        // However much there is, little of it is read.
        let (_dir, file) = key(&vec![7; 1 << 20], 0o600);
        assert_eq!(file.read().unwrap_err().exit_code(), 3);
    }

    #[test]
    fn a_command_that_fails_gives_no_key() {
        let command = format!("printf '%s' {}; exit 3", "01".repeat(31) + "02");
        let error = KeySource::Command(command).read().unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains('3'), "{error}");
    }

    #[test]
    fn a_credential_is_a_name_and_nothing_else() {
        for name in ["", ".", "..", "a/b", "/etc/shadow"] {
            let error = KeySource::Credential(name.into()).read().unwrap_err();
            assert_eq!(error.exit_code(), 2, "{name:?}");
        }
    }

    #[test]
    fn the_place_of_a_key_is_written_down_by_its_kind() {
        for (source, text) in [
            (KeySource::File("/k".into()), r#"{"file":"/k"}"#),
            (KeySource::Command("tool".into()), r#"{"command":"tool"}"#),
            (KeySource::Credential("n".into()), r#"{"credential":"n"}"#),
        ] {
            assert_eq!(serde_json::to_string(&source).unwrap(), text);
            assert_eq!(serde_json::from_str::<KeySource>(text).unwrap(), source);
        }
    }
}
