//! The flags that say where a key is; [`outlive_keeper::keys`] gets it from there.

use clap::Args;
use outlive_keeper::KeeperError;
use outlive_keeper::keys::KeySource;
use std::path::PathBuf;

/// Where the key is that epochs are encrypted with: 32 random bytes, or 64 hexadecimal digits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[group(multiple = false)]
pub struct KeyArgs {
    /// File that holds the key, 32 random bytes or 64 hexadecimal digits, which nobody else can read. The
    /// epochs of a new subject, or of an image, are encrypted with it; those that are there must be. Not
    /// with a hold-up budget. Where the key is, is remembered; the key is not: without it nothing can be
    /// restored
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Command of the shell that prints the key
    #[arg(long, value_name = "CMD")]
    pub key_command: Option<String>,
    /// Credential that holds the key, where systemd runs this
    #[arg(long, value_name = "NAME")]
    pub key_credential: Option<String>,
}

impl KeyArgs {
    /// Where the key is, if anything was said of that.
    ///
    /// # Errors
    /// Refused where the path of a file cannot be found from elsewhere.
    pub fn source(&self) -> Result<Option<KeySource>, KeeperError> {
        if let Some(path) = &self.key_file {
            // It is found again from other directories.
            let found = std::path::absolute(path);
            let found = found.map_err(KeeperError::io(format!("find {}", path.display())))?;
            return Ok(Some(KeySource::File(found)));
        }
        let command = self.key_command.clone().map(KeySource::Command);
        let credential = self.key_credential.clone().map(KeySource::Credential);
        Ok(command.or(credential))
    }
}
