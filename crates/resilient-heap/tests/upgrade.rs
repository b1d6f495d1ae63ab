//! Upgrades: all of the old heap, or all of the new one.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use resilient_heap::{
    Error, FileMemory, Heap, Options, PHashMap, PString, PVec, Persist, Upgrades,
};
use std::path::{Path, PathBuf};

#[derive(Persist)]
#[repr(C)]
struct First<'h> {
    names: PVec<'h, PString<'h>>,
}

#[derive(Persist)]
#[repr(C)]
struct Second<'h> {
    names: PVec<'h, PString<'h>>,
    visits: u64,
}

#[derive(Persist)]
#[repr(C)]
struct Third<'h> {
    by_name: PHashMap<'h, PString<'h>, u64>,
}

fn options() -> Options {
    Options::default().zone_pages(16).log_pages(4)
}

/// A heap of the first kind with so many names, left as a crash leaves it: its last commit is in the log.
fn first(path: &Path, names: u64) {
    let whole = path.with_extension("whole");
    let memory = FileMemory::open(&whole).unwrap();
    let mut heap = options()
        .open::<First>(memory, |_| Ok(First { names: PVec::new() }))
        .unwrap();
    for n in 0..names {
        heap.write(|root, tx| root.names.push(tx, PString::new(tx, &format!("name {n}"))?))
            .unwrap();
    }
    std::fs::copy(&whole, path).unwrap();
    drop(heap);
    std::fs::remove_file(&whole).unwrap();
}

/// What upgrades the first kind in many small transactions.
fn fill(old: &Heap<First<'static>>, new: &mut Heap<Third<'static>>) -> Result<(), Error> {
    old.read(|old, s| {
        for name in old.names.as_slice(s)? {
            new.write(|new, tx| {
                let name = PString::new(tx, name.as_str(s)?)?;
                new.by_name.insert(tx, name, 1).map(drop)
            })?;
        }
        Ok(())
    })
}

fn upgrades() -> Upgrades<Third<'static>> {
    Upgrades::new(options())
}

fn open(upgrades: Upgrades<Third<'static>>, path: &Path) -> Result<Heap<Third<'static>>, Error> {
    upgrades.open(path, |_| {
        Ok(Third {
            by_name: PHashMap::new(),
        })
    })
}

fn names(heap: &Heap<Third<'static>>) -> usize {
    heap.read(|root, s| {
        for n in 0..root.by_name.len() {
            assert!(root.by_name.contains_key(s, &format!("name {n}"))?);
        }
        Ok(root.by_name.len())
    })
    .unwrap()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_heap_with_older_types_is_upgraded_once_and_the_old_file_untouched_until_then() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("names.heap");
    // More than the log holds in one transaction.
    first(&path, 500);
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    let before = std::fs::read(&path).unwrap();
    let (same, of_old) = (before.clone(), path.clone());
    let mut heap = open(
        upgrades()
            .from::<Second>(|_, _| panic!("it was not written with these types"))
            .from::<First>(move |old, new| {
                fill(old, new)?;
                // Whatever ended the program now, this is what would be found.
                assert!(
                    std::fs::read(&of_old).unwrap() == same,
                    "the old heap was changed"
                );
                Ok(())
            }),
        &path,
    )
    .unwrap();
    assert_eq!(names(&heap), 500);
    assert_eq!(files(dir.path()), std::slice::from_ref(&path));
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
    assert_eq!(mode & 0o777, 0o640);
    // The file with the name is the one that is open, and locked.
    assert!(matches!(
        FileMemory::open(&path),
        Err(Error::Memory { what: "lock", .. })
    ));
    heap.write(|root, tx| {
        let name = PString::new(tx, "name 500")?;
        root.by_name.insert(tx, name, 2).map(drop)
    })
    .unwrap();
    drop(heap);
    let heap = open(
        upgrades().from::<First>(|_, _| panic!("there is nothing to upgrade")),
        &path,
    )
    .unwrap();
    assert_eq!(names(&heap), 501);
}

#[test]
fn an_upgrade_that_fails_or_panics_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("names.heap");
    first(&path, 3);
    let before = std::fs::read(&path).unwrap();
    let failed = open(
        upgrades().from::<First>(|old, new| {
            fill(old, new)?;
            Err(Error::Aborted("on purpose"))
        }),
        &path,
    );
    assert!(matches!(failed, Err(Error::Aborted("on purpose"))));
    let of_path = path.clone();
    let panicked = std::panic::catch_unwind(|| {
        open(
            upgrades().from::<First>(|old, new| {
                fill(old, new)?;
                panic!("on purpose")
            }),
            &of_path,
        )
        .map(drop)
    });
    assert!(panicked.is_err());
    assert_eq!(files(dir.path()), std::slice::from_ref(&path));
    // A file left by an upgrade that was killed is in nobody's way.
    std::fs::write(dir.path().join("names.heap.upgrade"), before.as_slice()).unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
    let heap = open(upgrades().from::<First>(fill), &path).unwrap();
    assert_eq!(names(&heap), 3);
    assert_eq!(files(dir.path()), [path]);
}

#[test]
fn what_has_no_upgrade_is_refused_and_what_is_not_there_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("names.heap");
    first(&path, 3);
    let before = std::fs::read(&path).unwrap();
    let refused = open(upgrades().from::<Second>(|_, _| Ok(())), &path).map(drop);
    let Err(Error::Layout { stored, wanted }) = refused else {
        panic!("{refused:?}")
    };
    assert!(stored.contains("struct First") && wanted.contains("struct Third"));
    assert!(std::fs::read(&path).unwrap() == before);
    let fresh = dir.path().join("fresh.heap");
    let heap = open(upgrades().from::<First>(fill), &fresh).unwrap();
    assert!(heap.opened().created);
    assert_eq!(names(&heap), 0);
}
