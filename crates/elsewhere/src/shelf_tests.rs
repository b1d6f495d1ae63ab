//! What is pushed is pulled as it was, by whatever way, and nobody takes anything from anybody.

use crate::manifest::{Hash, LARGEST_CHUNK, Manifest, Piece, Window};
use crate::publication::{Error, published};
use crate::push::Load;
use crate::shelf::{DirectoryShelf, Shelf};
use crate::stream_tests::{Does, sample, whole, wholes, write};
use crate::{Pulled, Pushed, Wanted, pull, push};
use outlive_epoch::{EpochFacts, EpochId, Run, SpaceId, StoreError};
use outlive_epoch_store::{Access, Store};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard};

/// A shelf in memory, of which an operation can be made to fail.
#[derive(Default)]
struct Memory {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Operations so far, and the one at which everything begins to fail.
    operations: AtomicU64,
    fails_at: Mutex<Option<u64>>,
    puts: AtomicU64,
}

impl Memory {
    fn step(&self) -> Result<(), StoreError> {
        let now = self.operations.fetch_add(1, SeqCst);
        match *self.fails_at.lock().unwrap() {
            Some(at) if now >= at => Err(StoreError::Medium {
                place: self.place(),
                source: std::io::Error::other("unplugged"),
            }),
            _ => Ok(()),
        }
    }

    fn repaired(&self) {
        *self.fails_at.lock().unwrap() = None;
        self.operations.store(0, SeqCst);
        self.puts.store(0, SeqCst);
    }

    fn fails_at(&self, operation: u64) {
        *self.fails_at.lock().unwrap() = Some(operation);
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.objects.lock().unwrap()
    }
}

impl Shelf for Memory {
    fn place(&self) -> String {
        "memory".into()
    }

    fn len(&self, name: &str) -> Result<Option<u64>, StoreError> {
        self.step()?;
        let objects = self.objects();
        Ok(objects.get(name).map(|bytes| bytes.len() as u64))
    }

    fn get(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.step()?;
        let bytes = self.objects().get(name).cloned();
        assert!(
            bytes
                .as_ref()
                .is_none_or(|bytes| bytes.len() as u64 <= most)
        );
        Ok(bytes)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.step()?;
        self.puts.fetch_add(1, SeqCst);
        let old = self.objects().insert(name.into(), bytes.into());
        assert!(old.is_none_or(|old| old == bytes), "{name} was changed");
        Ok(())
    }

    fn list(&self, below: &str) -> Result<Vec<String>, StoreError> {
        self.step()?;
        let objects = self.objects();
        let names = objects.keys().filter_map(|name| {
            let (parent, name) = name.rsplit_once('/')?;
            (parent == below).then(|| name.to_owned())
        });
        Ok(names.collect())
    }
}

fn send(shelf: &dyn Shelf, store: &Store, epoch: u64, known: &[Hash]) -> Result<Pushed, Error> {
    let load = Load {
        store,
        epoch: EpochId(epoch),
        about: b"about",
    };
    push(shelf, "s", load, known, &mut |_, _| Ok(()), &mut |_| {})
}

fn fetch(shelf: &dyn Shelf, wanted: &Wanted, dir: &Path) -> Result<Pulled, Error> {
    let open = |about: &[u8]| {
        assert_eq!(about, b"about");
        let to = dir.join("to");
        let _ = std::fs::remove_dir_all(&to);
        Store::create(to).map_err(Error::from)
    };
    pull(shelf, "s", wanted, &dir.join("spool"), open, &mut |_, _| {})
}

fn newest(shelf: &dyn Shelf, dir: &Path) -> Result<Pulled, Error> {
    fetch(shelf, &Wanted::default(), dir)
}

fn opened(dir: &Path) -> Store {
    Store::open(dir.join("to"), Access::Read).unwrap()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Refused(text)) => text,
        other => panic!("{other:?}"),
    }
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

#[test]
fn each_pushed_epoch_is_pulled_as_it_was_and_unchanged_pieces_go_over_once() {
    let (dir, shelves) = (scratch(), scratch());
    let directory = DirectoryShelf::new(&shelves.path().join("new/shelf"));
    let memory = Memory::default();
    let from = sample(dir.path());
    for shelf in [&directory as &dyn Shelf, &memory] {
        let first = send(shelf, &from, 2, &[]).unwrap();
        assert!(!first.forked && first.new_pieces == first.pieces);
        let second = send(shelf, &from, 3, &[first.publication.hash]).unwrap();
        // Two windows of pages and one small tree are others than before.
        assert_eq!(second.new_pieces, 3);
        let known = [first.publication.hash, second.publication.hash];
        let third = send(shelf, &from, 4, &known).unwrap();
        assert_eq!(third.new_pieces, 0, "an empty tree has no pieces");
        let repeated = send(shelf, &from, 4, &[third.publication.hash]).unwrap();
        assert_eq!(
            (repeated.publication, repeated.pieces),
            (third.publication, 0)
        );
        for (epoch, wanted) in [(2, Some(2)), (3, Some(3)), (4, None)] {
            let to = scratch();
            let wanted = Wanted {
                epoch: wanted,
                hash: None,
            };
            let pulled = fetch(shelf, &wanted, to.path()).unwrap();
            assert_eq!(pulled.publication.epoch, epoch);
            assert_eq!(pulled.fetched, pulled.pieces);
            let expected = BTreeMap::from([(epoch, whole(&from, EpochId(epoch)))]);
            assert_eq!(wholes(&opened(to.path())), expected);
        }
    }
}

#[test]
fn wherever_a_push_is_interrupted_nothing_is_there_yet_and_it_goes_on() {
    let dir = scratch();
    let from = sample(dir.path());
    let whole_push = {
        let shelf = Memory::default();
        send(&shelf, &from, 2, &[]).unwrap();
        shelf.operations.load(SeqCst)
    };
    for at in 0..whole_push {
        let shelf = Memory::default();
        shelf.fails_at(at);
        let failed = send(&shelf, &from, 2, &[]);
        let before = shelf.puts.load(SeqCst);
        shelf.repaired();
        let there = published(&shelf, "s").unwrap();
        // Only the look for others comes after the description.
        assert_eq!(there.is_empty(), at + 1 < whole_push, "{at}");
        assert!(failed.is_err());
        let known: Vec<Hash> = there.iter().map(|one| one.hash).collect();
        send(&shelf, &from, 2, &known).unwrap();
        let (again, all) = (shelf.puts.load(SeqCst), shelf.objects().len() as u64);
        assert_eq!(before + again, all, "{at}: nothing is written twice");
        let to = scratch();
        newest(&shelf, to.path()).unwrap();
        let expected = whole(&from, EpochId(2));
        assert!(whole(&opened(to.path()), EpochId(2)) == expected);
    }
}

#[test]
fn wherever_a_pull_is_interrupted_it_goes_on_with_what_came() {
    let dir = scratch();
    let from = sample(dir.path());
    let shelf = Memory::default();
    let pushed = send(&shelf, &from, 3, &[]).unwrap();
    for at in 0..pushed.pieces + 2 {
        let to = scratch();
        shelf.repaired();
        shelf.fails_at(at);
        assert!(matches!(newest(&shelf, to.path()), Err(Error::Store(_))));
        assert!(!to.path().join("to").exists());
        shelf.repaired();
        let pulled = newest(&shelf, to.path()).unwrap();
        let came = at.saturating_sub(2);
        assert_eq!(pulled.fetched, pushed.pieces - came, "{at}");
    }
}

#[test]
fn whatever_is_spoilt_on_the_shelf_or_beside_the_store_is_noticed() {
    let dir = scratch();
    let from = sample(dir.path());
    let shelf = Memory::default();
    send(&shelf, &from, 3, &[]).unwrap();
    let names: Vec<String> = shelf.objects().keys().cloned().collect();
    for name in names {
        let good = shelf.objects()[&name].clone();
        for flip in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[flip] ^= 1;
            shelf.objects().insert(name.clone(), bad);
            let error = newest(&shelf, scratch().path()).unwrap_err();
            let told = matches!(&error, Error::Store(StoreError::Damaged { place, .. }) if place.contains(&name));
            assert!(told, "{name}: {error}");
        }
        let cut = good[..good.len() - 1].to_vec();
        shelf.objects().insert(name.clone(), cut);
        assert!(newest(&shelf, scratch().path()).is_err());
        shelf.objects().remove(&name);
        assert!(newest(&shelf, scratch().path()).is_err());
        shelf.objects().insert(name, good);
    }
    let to = scratch();
    let all = newest(&shelf, to.path()).unwrap().pieces;
    let spool = to.path().join("spool");
    let one = std::fs::read_dir(&spool).unwrap().next().unwrap().unwrap();
    let mut bytes = std::fs::read(one.path()).unwrap();
    bytes[0] ^= 1;
    std::fs::write(one.path(), bytes).unwrap();
    let again = newest(&shelf, to.path()).unwrap();
    assert_eq!((again.pieces, again.fetched), (all, 1));
}

#[test]
fn a_piece_of_the_wrong_length_is_written_again() {
    let dir = scratch();
    let from = sample(dir.path());
    let shelves = scratch();
    let shelf = DirectoryShelf::new(shelves.path());
    let pushed = send(&shelf, &from, 2, &[]).unwrap();
    let manifest = shelf.list("subjects/s").unwrap();
    let manifest = shelf
        .get(&format!("subjects/s/{}", manifest[0]), 1 << 20)
        .unwrap();
    let piece = Manifest::decode(&manifest.unwrap()).unwrap().windows[0].piece();
    let path = shelves
        .path()
        .join(crate::publication::chunk_name(piece.hash));
    std::fs::write(path, "torn").unwrap();
    send(&shelf, &from, 3, &[pushed.publication.hash]).unwrap();
    let wanted = Wanted {
        epoch: Some(2),
        hash: None,
    };
    let torn = fetch(&shelf, &wanted, scratch().path());
    // The first window is another in epoch 3, so the wreck stays and is noticed.
    assert!(matches!(
        torn,
        Err(Error::Store(StoreError::Damaged { .. }))
    ));
    let again = DirectoryShelf::new(shelves.path());
    let load = Load {
        store: &from,
        epoch: EpochId(2),
        about: b"about",
    };
    push(&again, "other", load, &[], &mut |_, _| Ok(()), &mut |_| {}).unwrap();
    fetch(&shelf, &wanted, scratch().path()).unwrap();
}

#[test]
fn hosts_that_go_different_ways_take_nothing_from_each_other() {
    let (dir, other) = (scratch(), scratch());
    let here = sample(dir.path());
    let shelf = Memory::default();
    let base = send(&shelf, &here, 3, &[]).unwrap().publication;
    newest(&shelf, other.path()).unwrap();
    let mut there = Store::open(other.path().join("to"), Access::Write).unwrap();
    write(
        &mut there,
        false,
        &[(5, 5, 1, Does::Put(5))],
        &[("a", b"there")],
        9,
    );
    // Who knows nothing of it, and who has an older one, cannot push.
    let stranger = refusal(send(&shelf, &here, 4, &[]));
    assert!(
        stranger.contains("--as") && stranger.contains("epoch 3"),
        "{stranger}"
    );
    let older = refusal(send(&shelf, &here, 2, &[base.hash]));
    assert!(older.contains("older"), "{older}");
    let ours = send(&shelf, &here, 4, &[base.hash]).unwrap();
    let late = refusal(send(&shelf, &there, 4, &[base.hash]));
    assert!(late.contains("neither pushed nor pulled"), "{late}");
    // At the same time: the other's description comes while this one is being written.
    let race = Memory::default();
    *race.objects() = shelf.objects().clone();
    let name = format!("subjects/s/{}", ours.publication.name());
    let description = race.objects().remove(&name).unwrap();
    let load = Load {
        store: &there,
        epoch: EpochId(4),
        about: b"about",
    };
    let mut comes = |_: Option<Hash>, _: Hash| {
        race.objects().insert(name.clone(), description.clone());
        Ok(())
    };
    let theirs = push(&race, "s", load, &[base.hash], &mut comes, &mut |_| {}).unwrap();
    assert!(theirs.forked);
    let both = refusal(newest(&race, scratch().path()));
    let digits = |one: &Pushed| one.publication.hash.to_string()[..12].to_owned();
    assert!(
        both.contains(&digits(&ours)) && both.contains(&digits(&theirs)),
        "{both}"
    );
    for (one, store) in [(&ours, &here), (&theirs, &there)] {
        let to = scratch();
        let wanted = Wanted {
            epoch: Some(4),
            hash: Some(digits(one)),
        };
        fetch(&race, &wanted, to.path()).unwrap();
        assert!(whole(&opened(to.path()), EpochId(4)) == whole(store, EpochId(4)));
    }
    assert!(refusal(send(&race, &here, 4, &[ours.publication.hash])).contains("beside it"));
}

#[test]
fn an_epoch_that_is_not_there_is_missing_with_those_that_are() {
    let dir = scratch();
    let from = sample(dir.path());
    let shelf = Memory::default();
    let missing = |error: Error| match error {
        Error::Store(StoreError::Missing { what, .. }) => what,
        other => panic!("{other}"),
    };
    let nothing = newest(&shelf, dir.path()).unwrap_err();
    assert!(missing(nothing).contains("named s"));
    send(&shelf, &from, 3, &[]).unwrap();
    let wanted = Wanted {
        epoch: Some(9),
        hash: None,
    };
    let other = missing(fetch(&shelf, &wanted, dir.path()).unwrap_err());
    assert!(other.contains("1 of them are here, 3 to 3"), "{other}");
}

fn described() -> Manifest {
    let mut window = Window {
        space: SpaceId(1),
        index: 3,
        pages: [0; 32],
        hash: Hash::of(b"w"),
    };
    for bit in [0, 1, 7, 8, 255] {
        window.mark(bit);
    }
    let piece = Piece {
        hash: Hash::of(b"t"),
        len: 5,
    };
    Manifest {
        epoch: 4,
        facts: EpochFacts::default(),
        about: b"x".to_vec(),
        groups: vec![("a".into(), vec![piece]), ("b".into(), vec![])],
        zero: vec![Run::new(SpaceId(0), 1, 1 << 51).unwrap()],
        windows: vec![window],
    }
}

#[test]
fn descriptions_that_mean_harm_are_refused() {
    let good = described();
    assert_eq!(Manifest::decode(&good.encode()), Ok(good.clone()));
    let spoilt = |spoil: fn(&mut Manifest)| {
        let mut bad = good.clone();
        spoil(&mut bad);
        Manifest::decode(&bad.encode())
    };
    let bad: &[fn(&mut Manifest)] = &[
        |m| m.epoch = 0,
        |m| m.epoch = u64::MAX,
        |m| m.groups.swap(0, 1),
        |m| m.groups[1].0 = "a".into(),
        |m| m.groups[0].1[0].len = LARGEST_CHUNK as u32 + 1,
        |m| {
            m.groups[0].1 = vec![
                Piece {
                    hash: Hash::default(),
                    len: LARGEST_CHUNK as u32
                };
                1025
            ]
        },
        |m| m.windows[0].pages = [0; 32],
        |m| m.windows[0].index = u64::MAX / 2,
        |m| m.windows[0].index = 1 << 44,
        |m| m.windows.push(m.windows[0]),
    ];
    for (i, spoil) in bad.iter().enumerate() {
        assert_eq!(spoilt(*spoil), Err(None), "{i}");
    }
    let mut newer = good.encode();
    newer[8] = 2;
    assert_eq!(Manifest::decode(&newer), Err(Some(2)));
    let mut longer = good.encode();
    longer.push(0);
    assert_eq!(Manifest::decode(&longer), Err(None));
    let runs = good.windows[0].runs();
    let expected = [(768, 2), (775, 2), (1023, 1)];
    let expected = expected.map(|(first, count)| Run::new(SpaceId(1), first, count).unwrap());
    assert_eq!(runs, expected);
}

proptest! {
    #[test]
    fn no_bytes_make_a_description_do_harm(cut in 0_usize..400, at in 0_usize..400, byte: u8) {
        let mut bytes = described().encode();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        let _ = Manifest::decode(&bytes);
    }
}
