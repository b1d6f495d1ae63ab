//! One epoch onto a shelf.
//!
//! # Rules
//! - Pieces first, the description last: an epoch that is on a shelf is there with all its pieces,
//!   and a push that was interrupted is gone on with by pushing again.
//! - A push comes after exactly what this store knows to be there, or it is refused.

use crate::manifest::{Hash, LARGEST_CHUNK, Manifest, Piece, WINDOW, Window};
use crate::publication::{Error, Publication, chunk_name, heads, place_of, published};
use crate::shelf::Shelf;
use crate::together::together;
use outlive_epoch::{
    Content, EpochId, EpochReader, Order, PAGE_SIZE, Run, SpaceId, StoreError, VisitError,
};
use outlive_epoch_store::{Reader, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

/// Windows that are read together.
const BATCH: usize = 16;

/// What a push did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// What is on the shelf now.
    pub publication: Publication,
    /// Pieces that the epoch consists of, and those that had to be written.
    pub pieces: u64,
    /// Pieces that were not there before.
    pub new_pieces: u64,
    /// Bytes of these.
    pub new_bytes: u64,
    /// Another host pushed at the same time: both are there.
    pub forked: bool,
}

/// What is pushed: an epoch, and what is known about its subject.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// The store that holds the epoch.
    pub store: &'a Store,
    /// Its number.
    pub epoch: EpochId,
    /// What is known of the subject besides its epochs.
    pub about: &'a [u8],
}

/// Pushes an epoch as one of `subject`. `known` are the hashes of what this store pushed or
/// pulled last; `intend` writes down after what the push comes, and the hash of what is about to
/// appear, so that it is known again after a crash. `progress` hears the bytes looked at.
///
/// # Errors
/// Refused, where others pushed what this store does not know, or a newer epoch is there; what
/// store and shelf say.
pub fn push(
    shelf: &dyn Shelf,
    subject: &str,
    load: Load<'_>,
    known: &[Hash],
    intend: &mut dyn FnMut(Option<Hash>, Hash) -> Result<(), Error>,
    progress: &mut dyn FnMut(u64),
) -> Result<Pushed, Error> {
    let before = allowed(shelf, subject, load.epoch, known)?;
    if let Some(same) = before.filter(|before| before.epoch == load.epoch.0) {
        return Ok(Pushed {
            publication: same,
            pieces: 0,
            new_pieces: 0,
            new_bytes: 0,
            forked: false,
        });
    }
    let reader = load.store.epoch(Some(load.epoch))?;
    let epochs = load.store.epochs();
    let facts = epochs.iter().find(|epoch| epoch.id == load.epoch);
    let mut manifest = Manifest {
        epoch: load.epoch.0,
        facts: facts.map(|epoch| epoch.facts).unwrap_or_default(),
        about: load.about.to_vec(),
        ..Manifest::default()
    };
    let counts = Counts::default();
    let mut seen = BTreeSet::new();
    let work = |(piece, bytes): (Piece, Vec<u8>)| counts.put(shelf, piece, &bytes);
    together(work, |hand| {
        let mut loading = Loading {
            hand,
            seen: &mut seen,
            counts: &counts,
            progress,
        };
        loading.trees(&reader, &mut manifest)?;
        loading.pages(&reader, &mut manifest)
    })?;
    progress(counts.done.load(Ordering::Relaxed));
    let bytes = manifest.encode();
    let publication = Publication {
        epoch: load.epoch.0,
        hash: Hash::of(&bytes),
        before: before.map(|before| before.hash),
    };
    intend(publication.before, publication.hash)?;
    let name = format!("{}/{}", place_of(subject), publication.name());
    shelf.put(&name, &bytes)?;
    let forked = heads(&published(shelf, subject)?) != [publication];
    Ok(Pushed {
        publication,
        pieces: seen.len() as u64,
        new_pieces: counts.new_pieces.into_inner(),
        new_bytes: counts.new_bytes.into_inner(),
        forked,
    })
}

/// After which one this epoch may be pushed.
fn allowed(
    shelf: &dyn Shelf,
    subject: &str,
    epoch: EpochId,
    known: &[Hash],
) -> Result<Option<Publication>, Error> {
    let (place, heads) = (shelf.place(), heads(&published(shelf, subject)?));
    match heads[..] {
        [] => Ok(None),
        [head] if known.contains(&head.hash) && head.epoch <= epoch.0 => Ok(Some(head)),
        [head] if known.contains(&head.hash) => Err(Error::Refused(format!(
            "{place} has epoch {} of {subject} already, and epoch {epoch} is older: push a newer \
             one, or push it with --as under another name",
            head.epoch
        ))),
        [head, ..] => {
            let count = match heads.len() {
                1 => String::new(),
                n => format!(" (and {} that came beside it)", n - 1),
            };
            Err(Error::Refused(format!(
                "{place} has epoch {}{count} of a subject named {subject} that this store has neither \
                 pushed nor pulled: nothing was pushed. Pull it under another name to go on from \
                 it, or push with --as under another name",
                head.epoch
            )))
        }
    }
}

/// What became of the pieces.
#[derive(Default)]
struct Counts {
    new_pieces: AtomicU64,
    new_bytes: AtomicU64,
    /// Bytes of those that are on the shelf for certain.
    done: AtomicU64,
}

impl Counts {
    /// Sees to it that a piece is on the shelf.
    fn put(&self, shelf: &dyn Shelf, piece: Piece, bytes: &[u8]) -> Result<(), StoreError> {
        let (name, len) = (chunk_name(piece.hash), bytes.len() as u64);
        // One of another length is a wreck: its name says what it should hold.
        if shelf.len(&name)? != Some(len) {
            shelf.put(&name, bytes)?;
            self.new_pieces.fetch_add(1, Ordering::Relaxed);
            self.new_bytes.fetch_add(len, Ordering::Relaxed);
        }
        self.done.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}

struct Loading<'a> {
    /// Hands a piece over to whoever puts it on the shelf.
    hand: &'a mut dyn FnMut((Piece, Vec<u8>)) -> Result<(), StoreError>,
    /// Pieces that were handed over.
    seen: &'a mut BTreeSet<Hash>,
    counts: &'a Counts,
    progress: &'a mut dyn FnMut(u64),
}

impl Loading<'_> {
    /// Sees to it that these bytes get onto the shelf.
    fn piece(&mut self, bytes: Vec<u8>) -> Result<Piece, StoreError> {
        let piece = Piece {
            hash: Hash::of(&bytes),
            len: bytes.len() as u32,
        };
        if self.seen.insert(piece.hash) {
            (self.hand)((piece, bytes))?;
        } else {
            let len = bytes.len() as u64;
            self.counts.done.fetch_add(len, Ordering::Relaxed);
        }
        (self.progress)(self.counts.done.load(Ordering::Relaxed));
        Ok(piece)
    }

    fn trees(&mut self, reader: &Reader, manifest: &mut Manifest) -> Result<(), StoreError> {
        for group in reader.groups() {
            let tree = reader.tree(&group)?.unwrap_or_default();
            let parts = tree.chunks(LARGEST_CHUNK as usize);
            let pieces: Result<_, _> = parts.map(|part| self.piece(part.to_vec())).collect();
            manifest.groups.push((group, pieces?));
        }
        Ok(())
    }

    fn pages(&mut self, reader: &Reader, manifest: &mut Manifest) -> Result<(), StoreError> {
        let (stored, zero) = reader.parts();
        manifest.zero = joined(zero);
        let windows: Vec<Window> = windows(&stored).collect();
        for batch in windows.chunks(BATCH) {
            let contents = read(reader, batch)?;
            for (window, bytes) in batch.iter().zip(contents) {
                let Piece { hash, .. } = self.piece(bytes)?;
                manifest.windows.push(Window { hash, ..*window });
            }
        }
        Ok(())
    }
}

/// Runs that are adjacent as one: how an epoch came about is not to be seen in its description.
fn joined(runs: Vec<Run>) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::new();
    for run in runs {
        let last = all.last().copied();
        let last = last.filter(|last| last.space() == run.space() && last.end() == run.first());
        let both = last.and_then(|l| Run::new(l.space(), l.first(), l.count() + run.count()));
        if both.is_some() {
            all.pop();
        }
        all.push(both.unwrap_or(run));
    }
    all
}

/// The windows of sorted runs, without their hashes.
fn windows(runs: &[Run]) -> impl Iterator<Item = Window> {
    let mut all: BTreeMap<(SpaceId, u64), Window> = BTreeMap::new();
    for run in runs {
        for page in run.first()..run.end() {
            let (space, index) = (run.space(), page / WINDOW);
            let window = all.entry((space, index)).or_insert(Window {
                space,
                index,
                pages: [0; WINDOW as usize / 8],
                hash: Hash::default(),
            });
            window.mark(page % WINDOW);
        }
    }
    all.into_values()
}

/// The contents of windows: of each, its pages one after the other.
fn read(reader: &Reader, batch: &[Window]) -> Result<Vec<Vec<u8>>, StoreError> {
    let len = |window: &Window| window.count() as usize * PAGE_SIZE;
    let mut contents: Vec<Vec<u8>> = batch.iter().map(|w| vec![0; len(w)]).collect();
    let wanted: Vec<Run> = batch.iter().flat_map(Window::runs).collect();
    let walked = reader.pages_in(&wanted, Order::Fastest, &mut |run, content| {
        let Content::Bytes(bytes) = content else {
            return Ok(());
        };
        for (page, bytes) in (run.first()..).zip(bytes.chunks_exact(PAGE_SIZE)) {
            let of = (run.space(), page / WINDOW);
            let Ok(at) = batch.binary_search_by_key(&of, |w| (w.space, w.index)) else {
                continue;
            };
            let before = (0..page % WINDOW).filter(|bit| batch[at].has(*bit)).count();
            contents[at][before * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(bytes);
        }
        Ok(())
    });
    match walked {
        Ok(()) => Ok(contents),
        Err(VisitError::Store(error)) => Err(error),
        Err(VisitError::Visitor(error)) => Err(StoreError::Misuse(error.to_string())),
    }
}
