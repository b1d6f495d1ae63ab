//! Upgrades: a heap in a file that was written with older types becomes one of today's.
//!
//! The old heap is read from a private mapping, so that even what recovery would write to it does not reach
//! the file. The new one is made in a file beside it and made durable; then it takes the old one's name,
//! and the folder is made durable. Whatever ends the program, the name leads to all of the old heap or to
//! all of the new one.
//!
//! # Rules
//! - The old file stays locked until the new one, locked too, has its name. Whoever waited for the old
//!   file finds that it lost its name and takes the new one (see `FileMemory`).
//! - A file left behind by an upgrade that was interrupted is removed by the next one.

use crate::error::Error;
use crate::file::{FileMemory, error};
use crate::heap::{Durability, Heap, Options};
use crate::home::Home;
use crate::layout::Geometry;
use crate::persist::{Family, Schema};
use crate::superblock;
use crate::transaction::Tx;
use alloc::boxed::Box;
use alloc::vec::Vec;
use std::path::{Path, PathBuf};

/// The old heap was never given a root.
const NO_ROOT: &str = "the heap has no root";

/// Fills a new heap from the memory of an old one.
type Fill<R> = Box<dyn FnOnce(FileMemory, &mut Heap<R>) -> Result<(), Error>>;

/// Opens a heap in a file, and upgrades it where it was written with older types.
///
/// ```
/// use resilient_heap::{Options, PHashMap, PString, PVec, Persist, Upgrades};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct List<'h> {
///     names: PVec<'h, PString<'h>>,
/// }
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Visits<'h> {
///     by_name: PHashMap<'h, PString<'h>, u64>,
/// }
///
/// # fn main() -> Result<(), resilient_heap::Error> {
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("visits.heap");
/// let heap = Upgrades::<Visits>::new(Options::default())
///     .from::<List>(|old, new| {
///         old.read(|old, s| {
///             new.write(|new, tx| {
///                 for name in old.names.as_slice(s)? {
///                     let name = PString::new(tx, name.as_str(s)?)?;
///                     *new.by_name.get_or_insert_with(tx, name, |_| Ok(0))? += 1;
///                 }
///                 Ok(())
///             })
///         })
///     })
///     .open(&path, |_| Ok(Visits { by_name: PHashMap::new() }))?;
/// # Ok(())
/// # }
/// ```
pub struct Upgrades<R> {
    options: Options,
    from: Vec<(u64, Fill<R>)>,
}

impl<R: Family + 'static> Upgrades<R> {
    /// None yet; the heap is opened with these options.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            from: Vec::new(),
        }
    }

    /// How a heap with the root `Old` becomes one with the root `R`: `fill` is given the old heap, and a new
    /// one as `init` makes it. It may use as many transactions as it likes: the upgrade counts when it
    /// returned, and not before.
    #[must_use]
    pub fn from<Old: Family + 'static>(
        mut self,
        fill: impl FnOnce(&Heap<Old>, &mut Heap<R>) -> Result<(), Error> + 'static,
    ) -> Self {
        let written_with = Schema::of::<Old::At<'_>>().fingerprint();
        let fill: Fill<R> = Box::new(|memory, new| {
            match Options::default().open::<Old>(memory, |_| Err(Error::Aborted(NO_ROOT))) {
                Ok(old) => fill(&old, new),
                // It was never finished: there is nothing to take over.
                Err(Error::Aborted(NO_ROOT)) => Ok(()),
                Err(error) => Err(error),
            }
        });
        self.from.push((written_with, fill));
        self
    }

    /// Opens the heap; where there is none, makes one, whose root is what `init` says; where it was
    /// written with types from which there is an upgrade, upgrades it first.
    ///
    /// # Errors
    /// Those of [`Options::open`], [`FileMemory::open`], `init` and the upgrade. If an upgrade fails, the
    /// heap is as it was. [`Error::Layout`] where there is no upgrade from its types.
    pub fn open(
        self,
        path: impl AsRef<Path>,
        init: impl for<'h> FnOnce(&Tx<'h>) -> Result<R::At<'h>, Error>,
    ) -> Result<Heap<R>, Error> {
        let path = path.as_ref();
        let memory = FileMemory::open(path)?;
        let written_with = fingerprint(memory.private()?)?;
        let current = Schema::of::<R::At<'_>>().fingerprint();
        let mut from = self.from.into_iter();
        let step = match written_with {
            Some(other) if other != current => from.find(|(known, _)| *known == other),
            _ => None,
        };
        match step {
            Some((_, fill)) => replace(self.options, path, &memory, fill, init),
            // Nothing to upgrade, or nothing that it could be upgraded from: that is told.
            None => self.options.open(memory, init),
        }
    }
}

/// The fingerprint of the types that a heap was written with, if there is one. Nothing is changed.
fn fingerprint(memory: FileMemory) -> Result<Option<u64>, Error> {
    let any = Geometry::new(16, 1).ok_or(Error::NotAHeap)?;
    let mut home = Home::new(Box::new(memory), any, 0, 0);
    match superblock::find(&mut home, any) {
        Ok(found) => Ok(found.map(|found| found.fingerprint)),
        // Said again, or not, by who opens it.
        Err(Error::NotAHeap) => Ok(None),
        Err(other) => Err(other),
    }
}

/// The file in which the new heap is made: `NAME.upgrade`.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.to_path_buf().into_os_string();
    name.push(".upgrade");
    name.into()
}

/// Removes the new file unless it got its name.
struct Unfinished<'a>(Option<&'a Path>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn replace<R: Family>(
    options: Options,
    path: &Path,
    old: &FileMemory,
    fill: Fill<R>,
    init: impl for<'h> FnOnce(&Tx<'h>) -> Result<R::At<'h>, Error>,
) -> Result<Heap<R>, Error> {
    let new = beside(path);
    match rustix::fs::unlink(&new) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(errno) => return Err(error("removing an unfinished upgrade")(errno)),
    }
    let mut unfinished = Unfinished(Some(&new));
    let memory = FileMemory::open(&new)?;
    memory.take_over(old)?;
    // Nobody needs what is not finished: durable once, at the end.
    let mut heap = options.durability(Durability::Barrier).open(memory, init)?;
    fill(old.private()?, &mut heap)?;
    heap.sync()?;
    heap.set_durability(options);
    rustix::fs::rename(&new, path).map_err(error("rename"))?;
    unfinished.0 = None;
    FileMemory::sync_folder(path)?;
    Ok(heap)
}
