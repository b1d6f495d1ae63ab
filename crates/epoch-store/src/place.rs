//! Where a store is: a directory of files, or a block device with a [`Volume`] on it.
//!
//! A path that leads to a block device, also through a symbolic link, means the volume on that device;
//! any other means a directory.
//!
//! # What it refuses
//! To write to a device that holds anything else, unless [`format`] is told to.

use crate::damage;
use crate::host::{Host, SystemHost};
use outlive_epoch::StoreError;
use outlive_media::{
    Access, BlockMedium, Directory, FileDirectory, MediumError, Volume, is_block_device,
};
use std::path::Path;
use std::sync::Arc;

/// The place for a store, made where it is missing, and opened for writing.
pub(crate) fn create(path: &Path) -> Result<Arc<dyn Directory>, MediumError> {
    match is_block_device(path) {
        true => open(path, Access::Write),
        false => Ok(Arc::new(FileDirectory::create(path)?)),
    }
}

/// A place that exists.
pub(crate) fn open(path: &Path, access: Access) -> Result<Arc<dyn Directory>, MediumError> {
    if !is_block_device(path) {
        return Ok(Arc::new(FileDirectory::open(path, access)?));
    }
    let device = Arc::new(BlockMedium::open(path, access)?);
    Ok(Arc::new(Volume::open(device, access)?))
}

/// Sees to it that there is an empty volume on a block device: one that is there and empty is taken as
/// it is, and one is made of a device that is blank. Anything else is lost if `overwrite` says so.
///
/// # Errors
/// [`StoreError::Misuse`] where the device holds something, or is none; [`StoreError::Busy`];
/// [`StoreError::Full`] where it is too small; [`StoreError::Medium`].
pub fn format(path: &Path, overwrite: bool) -> Result<(), StoreError> {
    let device = Arc::new(BlockMedium::open(path, Access::Write).map_err(damage::medium)?);
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

/// Removes all epochs from a block device; what else it holds is left alone, and so is a directory.
///
/// # Errors
/// [`StoreError::Busy`]; [`StoreError::Misuse`] where there is no volume; [`StoreError::Medium`].
pub fn clear(path: &Path) -> Result<(), StoreError> {
    if !is_block_device(path) {
        return Ok(());
    }
    let clear = || {
        let volume = open(path, Access::Write)?;
        for name in volume.list()? {
            volume.remove(&name)?;
        }
        volume.sync()
    };
    clear().map_err(damage::medium)
}
