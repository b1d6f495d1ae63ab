//! Pools on files and in memory; extents as homes of other things; page-out with damaged and foreign files.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use outlive_media::{Access, BLOCK, Directory, FileDirectory, FileMedium, Medium, MediumError};
use outlive_media::{MemoryMedium, Volume};
use outlive_nvpool::{Error, Holder, PAGE, Pool, Refused, Request, Shape, State};
use std::sync::Arc;

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
