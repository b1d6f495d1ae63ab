//! How a store is made and opened, with a key or without, and checked without being opened.
//!
//! # Rules
//! - The newest generation counts; one that a writer replaces just now is looked for again.
//! - Whoever gives a key gets what that key protects, and nothing else; without the key of an encrypted store, nothing
//!   is written.

use crate::cipher::Secret;
use crate::damage::{self, Trouble};
use crate::generation::{Generation, OpenError, number_of};
use crate::head::Head;
use crate::host::{Host, SystemHost};
use crate::older;
use crate::place;
use crate::planted::bug;
use crate::repair::repair_in_with;
use crate::store::{Live, Store};
use crate::verify::{self, Progress, Report};
use outlive_epoch::StoreError;
use outlive_media::{Access, Directory, MediumError};
use std::path::Path;
use std::sync::Arc;

/// How often the list of files is read again while a writer replaces them.
const OPEN_TRIES: usize = 16;

impl Store {
    /// Makes a store in a directory that is absent or empty, or on a block device with an empty volume
    /// ([`crate::format`]), and opens it for writing.
    ///
    /// A directory in which a first epoch was begun, but never committed, counts as empty.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] where the directory holds anything else; [`StoreError::Busy`];
    /// [`StoreError::Medium`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::create_with(path, None)
    }

    /// [`Store::create`]; with a key, all that is written to it is encrypted.
    ///
    /// # Errors
    /// As for [`Store::create`].
    pub fn create_with(path: impl AsRef<Path>, secret: Option<Secret>) -> Result<Self, StoreError> {
        let dir = place::create(path.as_ref()).map_err(damage::medium)?;
        Self::create_in_with(dir, Arc::new(SystemHost::default()), secret)
    }

    /// Opens a store that exists.
    ///
    /// # Errors
    /// [`StoreError::Missing`] where there is no directory, or (for reading) no committed epoch;
    /// [`StoreError::Damaged`], [`StoreError::Newer`], [`StoreError::Busy`],
    /// [`StoreError::Medium`].
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self, StoreError> {
        Self::open_with(path, access, None)
    }

    /// [`Store::open`], with the key of an encrypted store. Without it, its epochs can be listed and checked; their
    /// contents cannot be read, and nothing can be written. With a key, a store that is not encrypted is refused:
    /// somebody may have put it there.
    ///
    /// # Errors
    /// Those of [`Store::open`]; [`StoreError::Locked`] without the key where one is needed, with another one, or
    /// with one that nothing is encrypted with.
    pub fn open_with(
        path: impl AsRef<Path>,
        access: Access,
        secret: Option<Secret>,
    ) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let dir = place::open(path, access).map_err(|e| missing_directory(path, e))?;
        Self::open_in_with(dir, Arc::new(SystemHost::default()), access, secret)
    }

    /// Opens a store for writing, and makes it first where it is missing.
    ///
    /// # Errors
    /// Those of [`Store::create`] and [`Store::open`].
    pub fn open_or_create(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let dir = place::create(path.as_ref()).map_err(damage::medium)?;
        Self::open_in(dir, Arc::new(SystemHost::default()), Access::Write)
    }

    /// [`Store::create`], in any directory.
    ///
    /// # Errors
    /// As for [`Store::create`].
    pub fn create_in(dir: Arc<dyn Directory>, host: Arc<dyn Host>) -> Result<Self, StoreError> {
        Self::create_in_with(dir, host, None)
    }

    /// [`Store::create_with`], in any directory.
    ///
    /// # Errors
    /// As for [`Store::create`].
    pub fn create_in_with(
        dir: Arc<dyn Directory>,
        host: Arc<dyn Host>,
        secret: Option<Secret>,
    ) -> Result<Self, StoreError> {
        let names = dir.list().map_err(damage::medium)?;
        if let Some(name) = names.iter().find(|name| number_of(name, "new.").is_none()) {
            let place = dir.place();
            return Err(StoreError::Misuse(format!(
                "{place} is not empty (it holds {name}): an image needs a directory of its own"
            )));
        }
        Self::open_in_with(dir, host, Access::Write, secret)
    }

    /// [`Store::open`], in any directory. The caller sees to it that there is one writer only.
    ///
    /// # Errors
    /// As for [`Store::open`].
    pub fn open_in(
        dir: Arc<dyn Directory>,
        host: Arc<dyn Host>,
        access: Access,
    ) -> Result<Self, StoreError> {
        Self::open_in_with(dir, host, access, None)
    }

    /// [`Store::open_with`], in any directory. The caller sees to it that there is one writer only.
    ///
    /// # Errors
    /// As for [`Store::open_with`].
    pub fn open_in_with(
        dir: Arc<dyn Directory>,
        host: Arc<dyn Host>,
        access: Access,
        secret: Option<Secret>,
    ) -> Result<Self, StoreError> {
        let opened = open_newest(&*dir, access, secret.as_ref())?;
        let mut store = Self::empty(dir, host, access);
        store.secret = secret;
        let Some((generation, head)) = opened else {
            if access == Access::Read {
                let what = "no committed epoch is here (it was never begun, or its writing was \
                            interrupted)";
                let (place, what) = (store.dir.place(), what.to_owned());
                return Err(StoreError::Missing { place, what });
            }
            store.remove_leftovers().map_err(damage::medium)?;
            return Ok(store);
        };
        if let Some(doubt) = head.doubt {
            return Err(Trouble::from(doubt).into());
        }
        if access == Access::Write {
            generation.must_be_open()?;
        }
        let chain = generation.chain(&head.record)?;
        let mut live = Live::new(generation, head.record, chain);
        live.sealed = head.sealed;
        if access == Access::Write {
            // What was read may not have been durable yet, if its writer was killed.
            live.repair(&head).map_err(damage::medium)?;
            if !bug("found but not synced") {
                store.dir.sync().map_err(damage::medium)?;
            }
        }
        let number = live.generation.number;
        store.current = Some(live);
        store.older = older::open(&*store.dir, number, store.secret.as_ref())?;
        if access == Access::Write {
            store.remove_leftovers().map_err(damage::medium)?;
        }
        Ok(store)
    }
}

fn missing_directory(path: &Path, error: MediumError) -> StoreError {
    if error.is_not_found() {
        let what = "there is no such directory".to_owned();
        return StoreError::Missing {
            place: path.display().to_string(),
            what,
        };
    }
    damage::medium(error)
}

/// Opens the newest generation that was published; `None` where there is none.
pub(crate) fn open_newest(
    dir: &dyn Directory,
    access: Access,
    secret: Option<&Secret>,
) -> Result<Option<(Generation, Head)>, Trouble> {
    let mut tries = 0;
    loop {
        let names = dir.list().map_err(damage::medium)?;
        let newest = names
            .iter()
            .filter_map(|name| number_of(name, "epochs."))
            .max_by_key(|n| if bug("oldest file counts") { !n } else { *n });
        let Some(number) = newest else {
            return Ok(None);
        };
        tries += 1;
        match Generation::open(dir, number, access, secret) {
            // A writer has replaced it just now.
            Err(OpenError::Medium(e)) if e.is_not_found() && tries < OPEN_TRIES => {}
            Err(e) => return Err(e.into()),
            Ok(opened) => return Ok(Some(opened)),
        }
    }
}

/// Checks an image without opening it as a store, so that one that is too damaged to be opened
/// can be reported on as well.
///
/// # Errors
/// [`StoreError::Missing`], [`StoreError::Newer`], [`StoreError::Medium`] for the directory.
pub fn verify(path: impl AsRef<Path>, progress: Progress<'_>) -> Result<Report, StoreError> {
    verify_with(path, None, progress)
}

/// [`verify`], with the key of an encrypted image: its authentication tags are checked as well.
///
/// # Errors
/// Those of [`verify`]; [`StoreError::Locked`] for another key than that of the image.
pub fn verify_with(
    path: impl AsRef<Path>,
    secret: Option<&Secret>,
    progress: Progress<'_>,
) -> Result<Report, StoreError> {
    let path = path.as_ref();
    let dir = place::open(path, Access::Read).map_err(|e| missing_directory(path, e))?;
    verify::verify_in_with(&*dir, secret, progress)
}

/// Checks an image, and writes again what is damaged and can be made good.
///
/// # Errors
/// Those of [`verify`]; [`StoreError::Busy`] where somebody is writing to it.
pub fn repair(path: impl AsRef<Path>, progress: Progress<'_>) -> Result<Report, StoreError> {
    repair_with(path, None, progress)
}

/// [`repair`], with the key of an encrypted image; without it all is written again but the commit records.
///
/// # Errors
/// Those of [`repair`]; [`StoreError::Locked`] for another key than that of the image.
pub fn repair_with(
    path: impl AsRef<Path>,
    secret: Option<&Secret>,
    progress: Progress<'_>,
) -> Result<Report, StoreError> {
    let path = path.as_ref();
    let dir = place::open(path, Access::Write).map_err(|e| missing_directory(path, e))?;
    repair_in_with(&*dir, secret, progress)
}
