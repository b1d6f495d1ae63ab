//! A block device, or a file, for the epochs of a subject.
//!
//! The subject's directory has a symbolic link to the device where otherwise the directory of its epochs
//! is; so whoever opens the one opens the other.

use crate::cli::Device;
use outlive_epoch::StoreError;
use outlive_keeper::KeeperError;
use outlive_keeper::subject::Subject;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Makes the device that was chosen, if any, the place of the epochs of a subject that has none.
pub fn choose(subject: &Subject, chosen: &Device) -> Result<(), KeeperError> {
    let Some(given) = &chosen.medium else {
        return Ok(());
    };
    let shown = given.display();
    let found = fs::metadata(given).map_err(KeeperError::io(format!("look at {shown}")))?;
    if !found.file_type().is_block_device() && !found.is_file() {
        return Err(KeeperError::Usage(format!(
            "{shown} is neither a block device nor a file"
        )));
    }
    outlive_epoch_store::format(given, chosen.format).map_err(|error| match error {
        StoreError::Misuse(what) => KeeperError::Refused(format!(
            "{what}; with --format it is used all the same, and everything on it is lost"
        )),
        error => error.into(),
    })?;
    let place = subject.epochs_dir();
    let failed = || KeeperError::io(format!("make {} a link to {shown}", place.display()));
    // What is there is empty, or a link to a device that was used before.
    remove(&place).map_err(failed())?;
    let given = std::path::absolute(given).map_err(failed())?;
    std::os::unix::fs::symlink(given, &place).map_err(failed())?;
    let dir = fs::File::open(subject.dir());
    dir.and_then(|dir| dir.sync_all()).map_err(failed())
}

fn remove(place: &Path) -> std::io::Result<()> {
    let removed = match fs::symlink_metadata(place) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(place),
        Ok(_) => fs::remove_file(place),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes the epochs of a subject from its device, where it has one that is there.
pub fn clear(subject: &Subject) -> Result<(), KeeperError> {
    Ok(outlive_epoch_store::clear(&subject.epochs_dir())?)
}
