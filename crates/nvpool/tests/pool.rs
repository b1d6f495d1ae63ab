//! Pools on files and in memory; extents as homes of other things; page-out with damaged and foreign files.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use outlive_media::{Access, BLOCK, Directory, FileDirectory, FileMedium, Medium, MediumError};
use outlive_media::{Geometry, MemoryMedium, SimDisk, Volume};
use outlive_nvpool::{Error, Holder, Ledger, PAGE, Pool, Refused, Request, Shape, State};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

fn ask(owner: &str, bytes: u64, thin: bool) -> Request {
    Request {
        owner: owner.to_owned(),
        pages: bytes / PAGE,
        thin,
        below: None,
        quota: None,
        file: None,
    }
}

fn in_memory(len: u64) -> Pool {
    let medium = Arc::new(MemoryMedium::new("a pool", len).unwrap());
    Pool::create(medium, Shape::of(len), [1; 16], true, false).unwrap()
}

#[test]
fn a_pool_in_a_file_comes_back_and_is_not_made_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (path, len) = (dir.path().join("pool"), 16 << 20);
    let medium = FileMedium::create(&path).unwrap();
    medium.reserve(len).unwrap();
    let pool = Pool::create(Arc::new(medium), Shape::of(len), [2; 16], true, false).unwrap();
    let id = pool.allocate(&ask("vm1", 4 << 20, false)).unwrap();
    let extent = pool.extent(id).unwrap();
    extent.write(1 << 20, &[7; 3 * BLOCK]).unwrap();
    extent.flush().unwrap();
    let ledger = pool.ledger();
    assert_eq!(ledger.extent(id).unwrap().pieces.len(), 1);
    drop((extent, pool));
    let open = |access| FileMedium::open(&path, access).map(Arc::new).unwrap();
    let pool = Pool::open(open(Access::Read), Access::Read).unwrap();
    assert!(pool.allocate(&ask("vm2", PAGE, false)).is_err());
    assert_eq!(
        pool.ledger().extent(id).unwrap(),
        ledger.extent(id).unwrap()
    );
    drop(pool);
    let again = Pool::create(open(Access::Write), Shape::of(len), [3; 16], true, false);
    assert!(matches!(
        again.err(),
        Some(Error::Refused(Refused::Taken(_)))
    ));
    let pool = Pool::open(open(Access::Write), Access::Write).unwrap();
    let mut bytes = vec![0; 4 * BLOCK];
    pool.extent(id).unwrap().read(1 << 20, &mut bytes).unwrap();
    assert!(
        bytes[..3 * BLOCK].iter().all(|b| *b == 7) && bytes[3 * BLOCK..].iter().all(|b| *b == 0)
    );
    assert_eq!(pool.release_owner("vm1").unwrap(), 1);
    assert!(pool.scrub().unwrap() > 0);
    let verified = pool.verify(true).unwrap();
    assert!(verified.unscrubbed.is_empty() && verified.read == pool.ledger().space().len);
    assert!(pool.ledger().owners().next().is_none());
}

/// A volume with names, as epoch stores have, in a thin extent: it takes what it needs and gives back what
/// is cut off.
#[test]
fn an_extent_is_a_home_for_a_volume() {
    let pool = in_memory(64 << 20);
    let id = pool.allocate(&ask("store", 32 << 20, true)).unwrap();
    let populated = || pool.ledger().extent(id).unwrap().populated() * PAGE;
    assert_eq!(populated(), 0);
    let volume = || Arc::new(pool.extent(id).unwrap());
    let dir = Volume::format(volume(), [9; 16], false).unwrap();
    let medium = dir.create("epochs").unwrap();
    medium.write(0, &[3; 64 * BLOCK]).unwrap();
    medium.flush().unwrap();
    dir.sync().unwrap();
    let taken = populated();
    assert!((64 * PAGE..32 << 20).contains(&taken), "{taken}");
    drop((dir, medium));
    let dir = Volume::open(volume(), Access::Write).unwrap();
    let mut back = vec![0; 64 * BLOCK];
    dir.open("epochs", Access::Read)
        .unwrap()
        .read(0, &mut back)
        .unwrap();
    assert!(back.iter().all(|byte| *byte == 3));
    drop(dir);
    let extent = pool.extent(id).unwrap();
    extent.truncate(0).unwrap();
    assert_eq!(populated(), 0);
    extent.read(0, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    let beyond = extent.write(32 << 20, &[0; BLOCK]);
    assert!(
        matches!(beyond, Err(MediumError::Full { .. })),
        "{beyond:?}"
    );
    assert!(matches!(
        extent.read(32 << 20, &mut [0]),
        Err(MediumError::Short { .. })
    ));
}

/// A pool in an extent of a pool: its tables, a heap, live in an extent.
#[test]
fn an_extent_is_a_home_for_a_heap() {
    let outer = in_memory(64 << 20);
    let len = 16 << 20;
    let id = outer.allocate(&ask("inner", len, false)).unwrap();
    let medium = || Arc::new(outer.extent(id).unwrap());
    let inner = Pool::create(medium(), Shape::of(len), [4; 16], true, false).unwrap();
    let part = inner.allocate(&ask("x", 1 << 20, false)).unwrap();
    drop(inner);
    let inner = Pool::open(medium(), Access::Write).unwrap();
    assert_eq!(inner.ledger().extent(part).unwrap().populated(), 256);
}

#[test]
fn owners_come_and_go_with_their_files() {
    let pool = in_memory(16 << 20);
    let tmp = tempfile::tempdir().unwrap();
    let files = FileDirectory::create(tmp.path()).unwrap();
    let id = pool.allocate(&ask("vm", 1 << 20, true)).unwrap();
    let extent = pool.extent(id).unwrap();
    for page in [0, 7, 200] {
        extent.write(page * PAGE, &[page as u8 + 1; BLOCK]).unwrap();
    }
    let holder = Holder {
        boot: [1; 16],
        started: 5,
        pid: 77,
    };
    pool.hold("vm", Some(holder)).unwrap();
    let running = pool.page_out("vm", &files, "vm.out", false);
    assert!(matches!(
        running,
        Err(Error::Refused(Refused::Running(_, 77)))
    ));
    assert!(matches!(
        pool.release(id),
        Err(Error::Refused(Refused::Running(..)))
    ));
    assert_eq!(pool.orphans(|_| true).len(), 0);
    assert_eq!(pool.orphans(|found| *found != holder), ["vm"]);
    // Whoever held it is gone with its machine.
    pool.page_out("vm", &files, "vm.out", true).unwrap();
    let ledger = pool.ledger();
    assert_eq!(ledger.owner("vm").unwrap().state, State::PagedOut);
    assert_eq!(ledger.free().pages(), ledger.space().len);
    assert!(extent.read(0, &mut [0]).is_err() && pool.release(id).is_err());
    let path = tmp.path().join("vm.out");
    let whole = std::fs::read(&path).unwrap();
    // Any damage is found, and leaves the owner where it is.
    let head_and_table = (0..2 * BLOCK).step_by(149);
    for at in head_and_table.chain((2 * BLOCK..whole.len()).step_by(50_021)) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        let refused = pool.page_in("vm", &files, "vm.out");
        assert!(
            matches!(refused, Err(Error::File { .. })),
            "{at}: {refused:?}"
        );
    }
    assert!(pool.verify(true).unwrap().unscrubbed.is_empty());
    for cut in [0, 100, BLOCK, 3 * BLOCK, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let refused = pool.page_in("vm", &files, "vm.out");
        assert!(
            matches!(refused, Err(Error::File { .. })),
            "{cut}: {refused:?}"
        );
    }
    std::fs::write(&path, &whole).unwrap();
    pool.page_in("vm", &files, "vm.out").unwrap();
    assert!(!path.exists());
    let mut bytes = vec![0; 1 << 20];
    extent.read(0, &mut bytes).unwrap();
    for (page, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
        let expected = if [0, 7, 200].contains(&page) {
            page as u8 + 1
        } else {
            0
        };
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}");
    }
    // A file of an earlier time is none.
    pool.page_out("vm", &files, "vm.out", false).unwrap();
    std::fs::write(&path, &whole).unwrap();
    let old = pool.page_in("vm", &files, "vm.out").unwrap_err();
    assert!(old.to_string().contains("number 2 counts"), "{old}");
}

/// A pool whose tables are gone never becomes an empty one, whose pages would be given out again.
#[test]
fn tables_that_are_gone_are_damage_and_stay_so() {
    let len = 8 << 20;
    let memory = Arc::new(MemoryMedium::new("a pool", len).unwrap());
    let pool = Pool::create(memory.clone(), Shape::of(len), [1; 16], true, false).unwrap();
    let start = pool.ledger().space().start * PAGE;
    drop(pool);
    memory
        .write(2 * PAGE, &vec![0; (start - 2 * PAGE) as usize])
        .unwrap();
    for _ in 0..2 {
        let error = Pool::open(memory.clone(), Access::Write).err();
        assert!(matches!(error, Some(Error::Damaged { .. })), "{error:?}");
    }
}

/// Every bit of the tables is corrected, or refused; none is believed.
#[test]
fn a_flipped_bit_in_the_tables_is_corrected() {
    let len = 8 << 20;
    let memory = Arc::new(MemoryMedium::new("a pool", len).unwrap());
    let shape = Shape::of(len);
    let pool = Pool::create(memory.clone(), shape, [1; 16], true, false).unwrap();
    pool.allocate(&ask("a", 1 << 20, false)).unwrap();
    let ledger = pool.ledger();
    drop(pool);
    let end = ledger.space().start * PAGE;
    let mut clean = vec![0; end as usize];
    memory.read(0, &mut clean).unwrap();
    let mut seed = 7u64;
    for _ in 0..150 {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let bit = (seed >> 20) % (end * 8);
        let page = (bit / 8) as usize / BLOCK * BLOCK;
        let mut block = clean[page..page + BLOCK].to_vec();
        block[(bit / 8) as usize - page] ^= 1 << (bit % 8);
        memory.write(page as u64, &block).unwrap();
        let pool = Pool::open(memory.clone(), Access::Write).unwrap();
        let verified = pool.verify(false).unwrap();
        assert!(verified.tables.lost.is_empty());
        let extents =
            |ledger: &outlive_nvpool::Ledger| ledger.extents().cloned().collect::<Vec<_>>();
        assert_eq!(extents(&pool.ledger()), extents(&ledger));
        drop(pool);
        memory.write(0, &clean).unwrap();
    }
}

/// What is on a medium is lost only where that is said, wherever its owner left his mark.
#[test]
fn a_medium_that_holds_anything_is_not_taken() {
    let len = 16 << 20;
    for at in [0, 1 << 19, len - PAGE] {
        let medium = Arc::new(MemoryMedium::new("a disk", len).unwrap());
        let mut mark = vec![0; BLOCK];
        mark[1080] = 0x53;
        medium.write(at, &mark).unwrap();
        let mut before = vec![0; len as usize];
        medium.read(0, &mut before).unwrap();
        let create =
            |force| Pool::create(medium.clone(), Shape::of(len), [1; 16], false, force).err();
        let refused = create(false);
        assert!(
            matches!(refused, Some(Error::Refused(Refused::Taken(_)))),
            "{refused:?}"
        );
        let mut after = vec![1; len as usize];
        medium.read(0, &mut after).unwrap();
        assert!(before == after);
        assert!(create(true).is_none());
    }
}

/// Writes a page of an owner's extent, and makes it durable.
fn fill(pool: &Pool, id: u64, byte: u8) {
    let extent = pool.extent(id).unwrap();
    extent.write(0, &[byte; BLOCK]).unwrap();
    extent.flush().unwrap();
}

fn first(pool: &Pool, id: u64) -> u8 {
    let mut byte = [0];
    pool.extent(id).unwrap().read(0, &mut byte).unwrap();
    byte[0]
}

#[test]
fn paging_out_replaces_nothing_that_it_did_not_write() {
    let pool = in_memory(16 << 20);
    let tmp = tempfile::tempdir().unwrap();
    let files = FileDirectory::create(tmp.path()).unwrap();
    let at = |name: &str| tmp.path().join(name);
    let [a, b] = ["a", "b"].map(|owner| pool.allocate(&ask(owner, PAGE, false)).unwrap());
    fill(&pool, a, 1);
    fill(&pool, b, 2);
    let in_the_way = |owner: &str, name: &str, file: &str| {
        let before = std::fs::read(at(file)).unwrap();
        let refused = pool.page_out(owner, &files, name, false);
        assert!(
            matches!(&refused, Err(Error::Refused(Refused::InTheWay { file: found, .. })) if found.ends_with(file)),
            "{refused:?}"
        );
        assert!(std::fs::read(at(file)).unwrap() == before);
        assert_eq!(pool.ledger().owner(owner).unwrap().state, State::Stopped);
    };
    // The only copy of another owner, under the name and under names that look like those on the way.
    pool.page_out("b", &files, "vm.new", false).unwrap();
    in_the_way("a", "vm.new", "vm.new");
    pool.page_out("a", &files, "vm", false).unwrap();
    pool.page_in("a", &files, "vm").unwrap();
    let new = format!("vm.{}.new", "01".repeat(16));
    std::fs::copy(at("vm.new"), at(&new)).unwrap();
    in_the_way("a", "vm", &new);
    pool.page_in("b", &files, "vm.new").unwrap();
    assert_eq!((first(&pool, a), first(&pool, b)), (1, 2));
    // Anything else.
    for bytes in [&b""[..], b"a letter", &[7; 3 * BLOCK]] {
        std::fs::write(at("letter"), bytes).unwrap();
        in_the_way("a", "letter", "letter");
    }
    // What a crash left of its own is no hindrance, whole or torn, nor is a file that counts no more.
    std::fs::write(at(&new), [7; 3 * BLOCK]).unwrap();
    pool.page_out("a", &files, "vm", false).unwrap();
    assert!(!at(&new).exists());
    let old = std::fs::read(at("vm")).unwrap();
    pool.page_in("a", &files, "vm").unwrap();
    std::fs::write(at("vm"), &old).unwrap();
    std::fs::write(at(&new), &old).unwrap();
    pool.page_out("a", &files, "vm", false).unwrap();
    pool.page_in("a", &files, "vm").unwrap();
    assert_eq!(first(&pool, a), 1);
}

/// A file that was written, and named, by a paging out that failed later is not taken for the next one's.
#[test]
fn a_file_of_an_attempt_that_failed_never_counts() {
    let mut failed = 0;
    for at in 0.. {
        let (pool, disk) = (in_memory(16 << 20), SimDisk::new());
        let files = disk.directory();
        let id = pool.allocate(&ask("a", PAGE, false)).unwrap();
        fill(&pool, id, 1);
        disk.fault(Some(outlive_media::Fault {
            at,
            lasting: false,
            error: std::io::ErrorKind::Other,
            applied: true,
        }));
        if pool.page_out("a", &files, "old", false).is_ok() {
            break;
        }
        fill(&pool, id, 2);
        pool.page_out("a", &files, "current", false).unwrap();
        if disk.contents("old").is_some() {
            failed += 1;
            let refused = pool.page_in("a", &files, "old");
            assert!(
                matches!(refused, Err(Error::File { .. })),
                "{at}: {refused:?}"
            );
        }
        pool.page_in("a", &files, "current").unwrap();
        assert_eq!(first(&pool, id), 2);
    }
    assert!(failed > 0);
}

/// The most scattered pool, and owners with as much as they can have: all of it is moved and released, and
/// what is dirty stays so little that it can be zeroed.
#[test]
fn a_scattered_owner_goes_to_its_file_and_comes_back() {
    let pool = in_memory(16 << 20);
    let files = SimDisk::new().directory();
    for n in 0..9 {
        let id = pool
            .allocate(&ask(&format!("x{n}"), 200 * PAGE, false))
            .unwrap();
        let extent = pool.extent(id).unwrap();
        for page in 0..100 {
            extent.discard(2 * page * PAGE, PAGE).unwrap();
            assert!(pool.ledger().dirty().runs().count() <= 130);
        }
    }
    while let rest @ 2.. = pool.ledger().free().longest(u64::MAX) {
        pool.allocate(&ask("rest", rest * PAGE, false)).unwrap();
    }
    assert!(pool.ledger().dirty().runs().count() > 64);
    let move_it = |owner: &str| {
        pool.page_out(owner, &files, owner, false).unwrap();
        assert!(pool.ledger().extents_of(owner).all(|e| e.pieces.is_empty()));
        pool.page_in(owner, &files, owner).unwrap();
    };
    let full = |error: String| assert!(error.contains("pieces"), "{error}");

    let ids: Vec<u64> = (0..3)
        .map(|_| pool.allocate(&ask("v", 300 * PAGE, true)).unwrap())
        .collect();
    let mut written = 0u64;
    loop {
        let extent = pool.extent(ids[written as usize % 3]).unwrap();
        match extent.write(written / 3 * 2 * PAGE, &[written as u8 + 1; BLOCK]) {
            Ok(()) => written += 1,
            Err(error) => break full(error.to_string()),
        }
    }
    assert!(written > 200, "{written}");
    move_it("v");
    for n in 0..written {
        let (extent, mut byte) = (pool.extent(ids[n as usize % 3]).unwrap(), [0]);
        extent.read(n / 3 * 2 * PAGE, &mut byte).unwrap();
        assert_eq!(byte[0], n as u8 + 1, "page {n}");
    }

    let mut extents = 0;
    loop {
        match pool.allocate(&ask("w", PAGE, false)) {
            Ok(_) => extents += 1,
            Err(error) => break full(error.to_string()),
        }
    }
    assert!(extents > 40, "{extents}");
    move_it("w");
    assert_eq!(pool.release_owner("w").unwrap(), extents);
    assert_eq!(pool.release_owner("v").unwrap(), 3);
    assert!(pool.ledger().dirty().runs().count() > 64);
    assert!(pool.scrub().unwrap() > 64);
    assert!(pool.ledger().dirty().is_empty());
    assert!(pool.verify(true).unwrap().unscrubbed.is_empty());
    for owner in (0..9).map(|n| format!("x{n}")) {
        assert_eq!(pool.release_owner(&owner).unwrap(), 1);
    }
}

/// A medium of which some blocks cannot be read until they are written.
struct Spoiled(MemoryMedium, Mutex<BTreeSet<u64>>);

impl Medium for Spoiled {
    fn place(&self) -> String {
        self.0.place()
    }
    fn geometry(&self) -> Result<Geometry, MediumError> {
        self.0.geometry()
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let blocks = offset / PAGE..(offset + into.len() as u64).div_ceil(PAGE);
        if self.1.lock().unwrap().range(blocks).next().is_some() {
            let (place, op) = (self.place(), "read");
            let source = std::io::Error::other("spoiled");
            return Err(MediumError::Io {
                place,
                op,
                offset,
                source,
            });
        }
        self.0.read(offset, into)
    }
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        let blocks = offset / PAGE..offset / PAGE + bytes.len() as u64 / PAGE;
        self.1
            .lock()
            .unwrap()
            .retain(|block| !blocks.contains(block));
        self.0.write(offset, bytes)
    }
    fn flush(&self) -> Result<(), MediumError> {
        self.0.flush()
    }
    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        self.0.reserve(len)
    }
    fn truncate(&self, len: u64) -> Result<(), MediumError> {
        self.0.truncate(len)
    }
}

/// Whichever block cannot be read: the pool is as it was, or it is said that it cannot be opened. Most do not
/// matter, and those are mended.
#[test]
fn a_block_that_cannot_be_read_is_mended_or_named() {
    let len = 8 << 20;
    let memory = MemoryMedium::new("a pool", len).unwrap();
    let medium = Arc::new(Spoiled(memory, Mutex::default()));
    let pool = Pool::create(medium.clone(), Shape::of(len), [1; 16], true, false).unwrap();
    for owner in ["a", "b", "c"] {
        pool.allocate(&ask(owner, 1 << 20, false)).unwrap();
    }
    let expected: Vec<_> = pool.ledger().extents().cloned().collect();
    let front = pool.ledger().space().start;
    drop(pool);
    let mut clean = vec![0; (front * PAGE) as usize];
    medium.read(0, &mut clean).unwrap();
    let same = |ledger: &Ledger| ledger.extents().eq(&expected);
    let mut opened = 0;
    for block in 0..front {
        medium.write(0, &clean).unwrap();
        medium.1.lock().unwrap().insert(block);
        for access in [Access::Read, Access::Write] {
            match Pool::open(medium.clone(), access) {
                Ok(pool) => assert!(same(&pool.ledger()), "block {block}"),
                Err(Error::Medium(_) | Error::Damaged { .. }) => continue,
                Err(error) => panic!("block {block}: {error}"),
            }
            opened += u64::from(access == Access::Write);
            assert!(block > 1 || access == Access::Read || medium.1.lock().unwrap().is_empty());
        }
    }
    assert!(opened > front / 2, "{opened} of {front}");
    // One copy of the superblock says as much as two; none says nothing, not even that there is no pool.
    medium.write(0, &clean).unwrap();
    medium.1.lock().unwrap().extend([0, 1]);
    let none = Pool::open(medium.clone(), Access::Read).err();
    assert!(matches!(none, Some(Error::Medium(_))), "{none:?}");
}
