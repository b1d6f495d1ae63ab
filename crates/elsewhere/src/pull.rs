//! One epoch from a shelf.
//!
//! # Rules
//! - Every piece is compared with its hash when it comes, and again when it is put in its place.
//! - Pieces that came are kept in a directory beside the store until all are there: a pull that was
//!   interrupted goes on where it was.

use crate::manifest::{Hash, LARGEST_MANIFEST, Manifest, Piece, VERSION};
use crate::publication::{Error, Publication, chunk_name, heads, place_of, published};
use crate::shelf::Shelf;
use crate::together::together;
use outlive_epoch::{EpochId, EpochWriter, PAGE_SIZE, PageSink, StoreError};
use outlive_epoch_store::Store;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Which epoch is wanted, where there are several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Its number; else the newest.
    pub epoch: Option<u64>,
    /// The first digits of the hash of its description.
    pub hash: Option<String>,
}

/// What a pull did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// What it was.
    pub publication: Publication,
    /// Pieces that it consists of.
    pub pieces: u64,
    /// Pieces that had to be fetched.
    pub fetched: u64,
    /// Bytes of these.
    pub bytes: u64,
}

/// Pulls an epoch of `subject` into the store, without any epoch, that `open` gives for what is
/// known about the subject. What was fetched stays in `spool` until the caller removes it.
/// `progress` hears the bytes fetched, and of how many.
///
/// # Errors
/// Refused, where it is not clear which epoch is meant; [`StoreError::Missing`] where there is none;
/// [`StoreError::Damaged`] and [`StoreError::Newer`]; what store and shelf say.
pub fn pull<E: From<Error> + From<StoreError>>(
    shelf: &dyn Shelf,
    subject: &str,
    wanted: &Wanted,
    spool: &Path,
    open: impl FnOnce(&[u8]) -> Result<Store, E>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Pulled, E> {
    let publication = choose(shelf, subject, wanted)?;
    let manifest = describe(shelf, subject, &publication)?;
    let made = fs::create_dir_all(spool);
    made.map_err(|error| medium(spool, error))?;
    let pulled = gather(shelf, &manifest, publication, spool, progress)?;
    let mut store = open(&manifest.about)?;
    assemble(&manifest, spool, &mut store)?;
    store.close()?;
    Ok(pulled)
}

/// The epoch that is meant.
fn choose(shelf: &dyn Shelf, subject: &str, wanted: &Wanted) -> Result<Publication, Error> {
    let (place, all) = (shelf.place(), published(shelf, subject)?);
    let missing = |what| StoreError::Missing {
        place: place.clone(),
        what,
    };
    if all.is_empty() {
        return Err(missing(format!("no epoch of a subject named {subject} is here")).into());
    }
    let Wanted { epoch, hash } = wanted;
    let mut meant = match (epoch, hash) {
        (None, None) => heads(&all),
        _ => all.clone(),
    };
    meant.retain(|one| epoch.is_none_or(|epoch| one.epoch == epoch));
    let digits = hash.as_deref().unwrap_or_default();
    meant.retain(|one| one.hash.to_string().starts_with(digits));
    match meta_sorted(&meant)[..] {
        [] => {
            let (first, last) = (all.first(), all.last());
            let range = first.zip(last).map_or((0, 0), |(a, b)| (a.epoch, b.epoch));
            let what = format!(
                "there is no such epoch of {subject}: {} of them are here, {} to {}",
                all.len(),
                range.0,
                range.1
            );
            Err(missing(what).into())
        }
        [one] => Ok(one),
        ref several => {
            let list = several.iter().map(|one| {
                let hash = one.hash.to_string();
                format!("epoch {} ({})", one.epoch, &hash[..12])
            });
            let list: Vec<String> = list.collect();
            Err(Error::Refused(format!(
                "{place}: several epochs of {subject} are meant, since hosts went different ways: {}. \
                 Choose with --epoch, or --hash and the first digits",
                list.join(", ")
            )))
        }
    }
}

/// Without those that are the same epoch, pushed twice.
fn meta_sorted(meant: &[Publication]) -> Vec<Publication> {
    let mut one_each: Vec<Publication> = Vec::new();
    for one in meant {
        if one_each.iter().all(|other| other.hash != one.hash) {
            one_each.push(*one);
        }
    }
    one_each
}

fn describe(
    shelf: &dyn Shelf,
    subject: &str,
    publication: &Publication,
) -> Result<Manifest, StoreError> {
    let name = format!("{}/{}", place_of(subject), publication.name());
    let place = format!("{}/{name}", shelf.place());
    let bytes = shelf.get(&name, LARGEST_MANIFEST)?;
    let damaged = |what: &str| StoreError::Damaged {
        place: place.clone(),
        what: what.to_owned(),
    };
    let bytes = bytes.ok_or_else(|| damaged("it was there, and is not any more"))?;
    if Hash::of(&bytes) != publication.hash {
        return Err(damaged("its bytes do not have the hash in its name"));
    }
    let manifest = Manifest::decode(&bytes).map_err(|newer| match newer {
        None => damaged("it is not in order"),
        Some(found) => StoreError::Newer {
            place: place.clone(),
            found,
            supported: VERSION,
        },
    })?;
    if manifest.epoch != publication.epoch {
        return Err(damaged("it is of another epoch than its name says"));
    }
    Ok(manifest)
}

/// Sees to it that all pieces are in the spool.
fn gather(
    shelf: &dyn Shelf,
    manifest: &Manifest,
    publication: Publication,
    spool: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Pulled, StoreError> {
    let all: u64 = manifest.pieces().map(|piece| u64::from(piece.len)).sum();
    let (fetched, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
    let done = AtomicU64::new(0);
    let mut seen = BTreeSet::new();
    let work = |piece: Piece| {
        let len = u64::from(piece.len);
        if fetch(shelf, piece, spool)? {
            fetched.fetch_add(1, Ordering::Relaxed);
            bytes.fetch_add(len, Ordering::Relaxed);
        }
        done.fetch_add(len, Ordering::Relaxed);
        Ok(())
    };
    together(work, |hand| {
        for piece in manifest.pieces() {
            if seen.insert(piece.hash) {
                hand(piece)?;
            } else {
                done.fetch_add(u64::from(piece.len), Ordering::Relaxed);
            }
            progress(done.load(Ordering::Relaxed), all);
        }
        Ok(())
    })?;
    progress(all, all);
    Ok(Pulled {
        publication,
        pieces: seen.len() as u64,
        fetched: fetched.into_inner(),
        bytes: bytes.into_inner(),
    })
}

/// Sees to it that a piece is in the spool; says whether it had to come from the shelf.
fn fetch(shelf: &dyn Shelf, piece: Piece, spool: &Path) -> Result<bool, StoreError> {
    if spooled(piece, spool)?.is_some() {
        return Ok(false);
    }
    let name = chunk_name(piece.hash);
    let bytes = shelf.get(&name, u64::from(piece.len))?;
    let damaged = |what: &str| StoreError::Damaged {
        place: format!("{}/{name}", shelf.place()),
        what: what.to_owned(),
    };
    let bytes = bytes.ok_or_else(|| damaged("it is missing"))?;
    if bytes.len() != piece.len as usize || Hash::of(&bytes) != piece.hash {
        return Err(damaged("its bytes do not have the hash in its name"));
    }
    let path = spool.join(piece.hash.to_string());
    fs::write(&path, &bytes).map_err(|error| medium(&path, error))?;
    Ok(true)
}

/// A piece that came already, where it is whole.
fn spooled(piece: Piece, spool: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    let path = spool.join(piece.hash.to_string());
    match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(medium(&path, error)),
        Ok(found) if found.len() != u64::from(piece.len) => return Ok(None),
        Ok(_) => {}
    }
    let bytes = fs::read(&path).map_err(|error| medium(&path, error))?;
    Ok(Some(bytes).filter(|bytes| Hash::of(bytes) == piece.hash))
}

fn again(piece: Piece, spool: &Path) -> Result<Vec<u8>, StoreError> {
    spooled(piece, spool)?.ok_or_else(|| StoreError::Damaged {
        place: spool.join(piece.hash.to_string()).display().to_string(),
        what: "it does not hold what came from the shelf".into(),
    })
}

fn assemble(manifest: &Manifest, spool: &Path, store: &mut Store) -> Result<(), StoreError> {
    let mut writer = store.begin_first(EpochId(manifest.epoch))?;
    for (group, pieces) in &manifest.groups {
        let mut tree = Vec::new();
        for piece in pieces {
            tree.extend_from_slice(&again(*piece, spool)?);
        }
        writer.tree(group, &tree)?;
    }
    for window in &manifest.windows {
        let bytes = again(window.piece(), spool)?;
        let mut rest = &bytes[..];
        for run in window.runs() {
            let len = run.count() as usize * PAGE_SIZE;
            let (here, others) = rest
                .split_at_checked(len)
                .ok_or_else(|| StoreError::Misuse("a window is shorter than its pages".into()))?;
            writer.put(run, here)?;
            rest = others;
        }
    }
    for run in &manifest.zero {
        writer.zero(*run)?;
    }
    writer.commit(manifest.facts)?;
    Ok(())
}

fn medium(path: &Path, source: io::Error) -> StoreError {
    let place = path.display().to_string();
    match source.kind() {
        io::ErrorKind::StorageFull => StoreError::Full { place, needed: 0 },
        _ => StoreError::Medium { place, source },
    }
}
