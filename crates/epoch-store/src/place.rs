//! Where a store is: a directory of files, or a [`Volume`] on a block device or in a mapped file.
//!
//! A path that leads to a block device or a file, also through a symbolic link, means the volume there;
//! any other means a directory.
//!
//! # What it refuses
//! To write to a device that holds anything else, unless [`format`] is told to.

use crate::damage;
use crate::host::{Host, SystemHost};
use outlive_epoch::StoreError;
use outlive_media::{
    Access, BlockMedium, DaxMedium, Directory, FileDirectory, Medium, MediumError, Volume,
    is_block_device,
};
use std::path::Path;
use std::sync::Arc;

/// The one medium that a path leads to; `None` where it leads to a directory, or to nothing.
fn medium(path: &Path, access: Access) -> Result<Option<Arc<dyn Medium>>, MediumError> {
    Ok(match () {
        () if is_block_device(path) => Some(Arc::new(BlockMedium::open(path, access)?)),
        () if path.is_file() => Some(Arc::new(DaxMedium::open(path, access)?)),
        () => None,
    })
}

/// The place for a store, made where it is missing, and opened for writing.
pub(crate) fn create(path: &Path) -> Result<Arc<dyn Directory>, MediumError> {
    match medium(path, Access::Write)? {
        Some(medium) => Ok(Arc::new(Volume::open(medium, Access::Write)?)),
        None => Ok(Arc::new(FileDirectory::create(path)?)),
    }
}

/// A place that exists.
pub(crate) fn open(path: &Path, access: Access) -> Result<Arc<dyn Directory>, MediumError> {
    match medium(path, access)? {
        Some(medium) => Ok(Arc::new(Volume::open(medium, access)?)),
        None => Ok(Arc::new(FileDirectory::open(path, access)?)),
    }
}

/// Sees to it that there is an empty volume on a block device or in a file: one that is there and empty is taken as
/// it is, and one is made of a device that is blank. Anything else is lost if `overwrite` says so.
///
/// # Errors
/// [`StoreError::Misuse`] where the device holds something, or is none; [`StoreError::Busy`];
/// [`StoreError::Full`] where it is too small; [`StoreError::Medium`].
pub fn format(path: &Path, overwrite: bool) -> Result<(), StoreError> {
    let device = medium(path, Access::Write).map_err(damage::medium)?;
    let device = device.ok_or_else(|| {
        StoreError::Misuse(format!(
            "{} is neither a block device nor a file",
            path.display()
        ))
    })?;
    if !overwrite && let Ok(volume) = Volume::open(device.clone(), Access::Write) {
        let names = volume.list().map_err(damage::medium)?;
        if names.iter().all(|name| name.starts_with("new.")) {
            return Ok(());
        }
        let place = path.display();
        return Err(StoreError::Misuse(format!(
            "{place} holds epochs of a program"
        )));
    }
    let uuid = SystemHost::default().uuid();
    Volume::format(device, uuid, overwrite).map_err(damage::medium)?;
    Ok(())
}

/// Removes all epochs from a block device or a file; what else it holds is left alone, and so is a directory.
///
/// # Errors
/// [`StoreError::Busy`]; [`StoreError::Misuse`] where there is no volume; [`StoreError::Medium`].
pub fn clear(path: &Path) -> Result<(), StoreError> {
    let clear = || {
        let Some(device) = medium(path, Access::Write)? else {
            return Ok(());
        };
        let volume = Volume::open(device, Access::Write)?;
        for name in volume.list()? {
            volume.remove(&name)?;
        }
        volume.sync()
    };
    clear().map_err(damage::medium)
}
