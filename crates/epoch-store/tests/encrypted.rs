//! Stores that are encrypted: what is on the medium tells nothing to those who do not have the key, and whatever they
//! change is found, also where checksums find nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{
    Model, Script, Step, create, encrypt, history, models, open, page, read_back, secret,
};
use outlive_epoch::{EpochId, PAGE_SIZE, StoreError};
use outlive_epoch_store::{
    Access, Codec, Outcome, Part, REPAIRABLE, Report, repair_in, repair_in_with, verify_in,
    verify_in_with,
};
use outlive_media::{Fault, SimDisk};
use std::io;

const FILE: &str = "epochs.1";
/// Where the first page of the first epoch stands.
const LOG_AT: usize = 24 * PAGE_SIZE;

/// Three epochs, encrypted with the first key and closed. The thread's key stays set.
fn image() -> (SimDisk, Vec<Model>) {
    encrypt(Some(secret(1)));
    let disk = SimDisk::new();
    let history = &history()[..3];
    let mut store = create(&disk).unwrap();
    for script in history {
        script.write(&mut store).unwrap();
    }
    store.close().unwrap();
    (disk, models(history))
}

fn with(bytes: Vec<u8>) -> SimDisk {
    let disk = SimDisk::new();
    disk.set_contents(FILE, bytes);
    disk
}

/// All epochs, as far as they can be read: whether each is what was written. Something else than that is no answer.
fn reads(disk: &SimDisk, models: &[Model]) -> Result<(), StoreError> {
    let store = open(disk, Access::Read)?;
    for (id, model) in (1..).zip(models) {
        let got = read_back(&store.epoch(Some(EpochId(id)))?)?;
        assert!(got == *model, "epoch {id} is not what was written");
    }
    assert_eq!(store.newest(), Some(EpochId(models.len() as u64)));
    Ok(())
}

fn check(disk: &SimDisk, key: bool) -> Report {
    let key = key.then(|| secret(1));
    verify_in_with(&disk.directory(), key.as_ref(), &mut |_, _| {}).unwrap()
}

/// Changes five bytes so that no CRC32C over any range which has all of them changes: they are the polynomial.
fn change_unseen(bytes: &mut [u8], at: usize) {
    let pattern = (1 | (0x82f6_3b78_u64 << 1)).to_le_bytes();
    let sum = |bytes: &[u8]| crc32c::crc32c(&bytes[at.saturating_sub(9)..at + 5]);
    let before = sum(bytes);
    for (byte, change) in bytes[at..].iter_mut().zip(&pattern[..5]) {
        *byte ^= change;
    }
    assert_eq!(sum(bytes), before, "the pattern is not what it must be");
}

#[test]
pub(crate) fn what_was_encrypted_comes_back() {
    for codec in [None, Some(Codec::Lz4), Some(Codec::Zstd)] {
        common::pack(codec);
        encrypt(Some(secret(1)));
        let (history, disk) = (history(), SimDisk::new());
        let models = models(&history);
        let mut store = create(&disk).unwrap();
        store.keep_older(true);
        for (script, model) in history.iter().zip(&models) {
            let id = script.write(&mut store).unwrap();
            assert_eq!(read_back(&store.epoch(Some(id)).unwrap()).unwrap(), *model);
        }
        store.close().unwrap();
        reads(&disk, &models).unwrap();
        assert!(check(&disk, true).is_clean());
        assert!(check(&disk, false).is_clean(), "checksums need no key");
        // Flattened, it has other keys and the same contents; trees of earlier epochs are among them.
        let mut store = open(&disk, Access::Write).unwrap();
        store.begin_flattening().unwrap();
        while !store.work(1 << 20).unwrap().ready {}
        store.switch().unwrap();
        assert!(store.scrub().unwrap().damages.is_empty());
        store.close().unwrap();
        let store = open(&disk, Access::Read).unwrap();
        assert_eq!(read_back(&store.epoch(None).unwrap()).unwrap(), models[4]);
        assert!(check(&disk, true).is_clean());
    }
    common::pack(None);
}

#[test]
pub(crate) fn a_stranger_finds_nothing_of_the_program() {
    let mut history = history()[..3].to_vec();
    history.push(Script {
        base: false,
        steps: vec![Step::Put(1, 0, vec![77])],
        trees: vec![(
            "a group with a long name",
            b"and what its tree says".to_vec(),
        )],
    });
    let written = |key| {
        encrypt(key);
        let disk = SimDisk::new();
        let mut store = create(&disk).unwrap();
        for script in &history {
            script.write(&mut store).unwrap();
        }
        store.close().unwrap();
        disk.contents(FILE).unwrap()
    };
    let (plain, encrypted) = (written(None), written(Some(secret(1))));
    let holds = |image: &[u8], bytes: &[u8]| image.windows(bytes.len()).any(|part| part == bytes);
    let models = models(&history);
    let pages = models.iter().flat_map(|model| model.pages.values());
    let pages = pages.filter(|seed| **seed != 0);
    let pages = pages.map(|seed| page(*seed)[..32].to_vec());
    let trees = models.iter().flat_map(|model| &model.trees);
    let trees = trees.flat_map(|(name, tree)| [name.clone().into_bytes(), tree.clone()]);
    let mut hidden = 0;
    // Shorter ones may be met by chance.
    for part in pages.chain(trees).filter(|part| part.len() > 4) {
        assert!(holds(&plain, &part), "the search finds what is there");
        assert!(!holds(&encrypted, &part), "{part:?}");
        hidden += 1;
    }
    assert!(hidden > 10, "{hidden} parts were looked for");
}

#[test]
pub(crate) fn equal_pages_have_different_bytes() {
    encrypt(Some(secret(1)));
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    let script = Script {
        base: false,
        steps: vec![Step::Put(1, 0, vec![5; 4])],
        trees: vec![],
    };
    script.write(&mut store).unwrap();
    let bytes = disk.contents(FILE).unwrap();
    let blocks: Vec<&[u8]> = bytes[LOG_AT..].chunks(PAGE_SIZE).take(4).collect();
    for (i, block) in blocks.iter().enumerate() {
        assert!(!blocks[..i].contains(block), "block {i}");
        assert_ne!(*block, page(5));
    }
}

/// Two attempts at the same epoch, with the same contents at the same places.
#[test]
pub(crate) fn what_is_written_again_has_other_bytes() {
    let (disk, _) = image();
    let mut store = open(&disk, Access::Write).unwrap();
    let from = store.log_bytes() as usize;
    let script = Script {
        base: false,
        steps: vec![Step::Put(1, 0, vec![5, 6])],
        trees: vec![("root", b"tree".to_vec())],
    };
    let mut attempt = || {
        let mut writer = store.begin().unwrap();
        assert_eq!(outlive_epoch::EpochWriter::id(&*writer), EpochId(4));
        script.stage(&mut *writer).unwrap();
        drop(writer);
        disk.contents(FILE).unwrap()[from..][..2 * PAGE_SIZE].to_vec()
    };
    let (one, other) = (attempt(), attempt());
    for (i, (a, b)) in one.chunks(16).zip(other.chunks(16)).enumerate() {
        assert_ne!(a, b, "cipher block {i}");
    }
}

/// A write that fails may have written something: its place is not used again by this attempt.
#[test]
pub(crate) fn after_a_failed_write_an_attempt_takes_no_more_pages() {
    let (disk, models) = image();
    let mut store = open(&disk, Access::Write).unwrap();
    let script = |seed| Script {
        base: false,
        steps: vec![Step::Put(1, 0, vec![seed; 2])],
        trees: vec![],
    };
    let mut writer = store.begin().unwrap();
    let (at, error) = (disk.trace().len() as u64, io::ErrorKind::StorageFull);
    disk.fault(Some(Fault {
        at,
        lasting: false,
        error,
        applied: true,
    }));
    let failed = script(5).stage(&mut *writer);
    assert!(matches!(failed, Err(StoreError::Full { .. })), "{failed:?}");
    let written = disk.contents(FILE).unwrap();
    let again = script(6).stage(&mut *writer);
    assert!(matches!(again, Err(StoreError::Misuse(_))), "{again:?}");
    assert!(disk.contents(FILE).unwrap() == written);
    drop(writer);
    drop(store);
    reads(&disk, &models).unwrap();
}

/// Trees without bytes have no place of their own, so that they must not have a nonce either.
#[test]
pub(crate) fn empty_trees_come_back() {
    encrypt(Some(secret(1)));
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    let script = Script {
        base: false,
        steps: vec![Step::Put(1, 0, vec![5])],
        trees: vec![
            ("a", vec![]),
            ("b", vec![]),
            ("c", b"tree".to_vec()),
            ("d", vec![]),
        ],
    };
    script.write(&mut store).unwrap();
    store.close().unwrap();
    reads(&disk, &models(&[script])).unwrap();
    assert!(check(&disk, true).is_clean());
    assert!(check(&disk, false).is_clean());
}

/// An older generation under the name of a newer one, and a store that lost its newest.
#[test]
pub(crate) fn a_file_with_another_name_is_refused() {
    let (disk, _) = image();
    let bytes = disk.contents(FILE).unwrap();
    let renamed = SimDisk::new();
    renamed.set_contents("epochs.2", bytes);
    let error = open(&renamed, Access::Read).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("another name"), "{error}");
    encrypt(None);
    open(&renamed, Access::Read).unwrap();
}

#[test]
pub(crate) fn a_missing_or_wrong_key_is_refused_by_name() {
    let (disk, models) = image();
    let locked = |result: Result<outlive_epoch_store::Store, StoreError>| match result {
        Err(StoreError::Locked { what, .. }) => what,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it opened"),
    };
    let (right, wrong) = (secret(1).fingerprint(), secret(2).fingerprint());
    encrypt(Some(secret(2)));
    for access in [Access::Read, Access::Write] {
        let what = locked(open(&disk, access));
        assert!(what.contains(&right.to_string()), "{what}");
        assert!(what.contains(&wrong.to_string()), "{what}");
    }
    encrypt(None);
    let what = locked(open(&disk, Access::Write));
    assert!(what.contains(&right.to_string()), "{what}");
    // What needs no contents can be done.
    let store = open(&disk, Access::Read).unwrap();
    assert_eq!(store.epochs().len(), models.len());
    assert!(matches!(store.epoch(None), Err(StoreError::Locked { .. })));
    let increment = store.increment(EpochId(2));
    assert!(matches!(increment, Err(StoreError::Locked { .. })));
    drop(store);
    encrypt(Some(secret(1)));
    reads(&disk, &models).unwrap();
}

/// Whoever gives a key gets what that key protects, and nothing else.
#[test]
pub(crate) fn a_plain_store_in_the_place_of_an_encrypted_one_is_refused() {
    encrypt(None);
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    history()[0].write(&mut store).unwrap();
    store.close().unwrap();
    encrypt(Some(secret(1)));
    for access in [Access::Read, Access::Write] {
        let opened = open(&disk, access);
        assert!(
            matches!(opened, Err(StoreError::Locked { .. })),
            "{opened:?}"
        );
    }
}

/// Every place is changed so that the checksums stay right: what is read is what was written, or an error.
#[test]
pub(crate) fn changes_that_no_checksum_sees_are_found() {
    let (disk, models) = image();
    let image = disk.contents(FILE).unwrap();
    reads(&disk, &models).unwrap();
    let (mut found, mut unseen) = (0, 0);
    for at in (0..image.len() - 5).step_by(127) {
        let mut bytes = image.clone();
        if at < 9 {
            continue;
        }
        change_unseen(&mut bytes, at);
        let disk = with(bytes);
        match reads(&disk, &models) {
            Ok(()) => {}
            Err(StoreError::Damaged { .. }) => {
                found += 1;
                let quiet = check(&disk, false).is_clean();
                unseen += u64::from(quiet);
                assert!(!check(&disk, true).is_clean(), "a check at {at}");
            }
            Err(StoreError::Locked { .. } | StoreError::Newer { .. }) => found += 1,
            Err(other) => panic!("at {at}: {other}"),
        }
    }
    assert!(
        found > 150 && unseen > 100,
        "{found} found, {unseen} of them by tags alone"
    );
    // Each page of the first epoch.
    for block in 0..4 {
        let mut bytes = image.clone();
        change_unseen(&mut bytes, LOG_AT + block * PAGE_SIZE + 100);
        let error = reads(&with(bytes), &models).unwrap_err();
        assert!(error.to_string().contains("authentication tag"), "{error}");
    }
}

/// Anybody can make the checksum of a superblock; the copy that he leaves counts for those who have the key.
#[test]
pub(crate) fn one_forged_superblock_leaves_the_other() {
    let (disk, models) = image();
    let image = disk.contents(FILE).unwrap();
    let forged = |ats: &[usize], offset: usize| {
        let mut bytes = image.clone();
        for at in ats {
            change_unseen(&mut bytes, at + offset);
        }
        with(bytes)
    };
    let copies = [0, 20 * PAGE_SIZE];
    // Version, identity, generation, fingerprint, salt, tag.
    for offset in [8, 18, 34, 57, 70, 100] {
        for at in copies {
            let disk = forged(&[at], offset);
            reads(&disk, &models).unwrap();
            let report = check(&disk, true);
            let damages: Vec<_> = report
                .damages
                .iter()
                .map(|d| (d.offset, d.outcome))
                .collect();
            assert_eq!(
                damages,
                [(at as u64, Outcome::Repairable)],
                "offset {offset}"
            );
            // A writer writes it again.
            drop(open(&disk, Access::Write).unwrap());
            assert!(check(&disk, true).is_clean(), "offset {offset} of {at}");
            assert!(disk.contents(FILE).unwrap()[at..][..PAGE_SIZE] == image[at..][..PAGE_SIZE]);
        }
        reads(&forged(&copies, offset), &models).unwrap_err();
    }
}

/// The times in a trailer are not encrypted, and nobody may change them.
#[test]
pub(crate) fn changed_numbers_of_a_trailer_are_found() {
    let (disk, models) = image();
    let image = disk.contents(FILE).unwrap();
    let is_trailer = |block: &usize| image[block * PAGE_SIZE..].starts_with(b"OLTRAILR");
    let trailers: Vec<usize> = (24..image.len() / PAGE_SIZE).filter(is_trailer).collect();
    assert_eq!(trailers.len(), 6, "three epochs, each with two trailers");
    // The time and what the stop took: numbers that may be anything.
    for offset in [121, 130] {
        for at in &trailers {
            let mut bytes = image.clone();
            change_unseen(&mut bytes, at * PAGE_SIZE + offset);
            let disk = with(bytes);
            let report = check(&disk, true);
            assert!(!report.is_clean(), "trailer in block {at}");
        }
        // In both places, nothing makes up for it.
        let mut bytes = image.clone();
        for at in &trailers[..2] {
            change_unseen(&mut bytes, at * PAGE_SIZE + offset);
        }
        reads(&with(bytes), &models).unwrap_err();
    }
}

/// Blocks behind the header that hold something.
fn used(image: &[u8]) -> Vec<usize> {
    let harmed = |block: &usize| {
        let mut bytes = image.to_vec();
        bytes[block * PAGE_SIZE] ^= 1;
        !check(&with(bytes), false).is_clean()
    };
    let blocks = LOG_AT / PAGE_SIZE..image.len() / PAGE_SIZE;
    blocks.filter(harmed).collect()
}

#[test]
pub(crate) fn damage_is_repaired_without_the_key() {
    let (disk, models) = image();
    let image = disk.contents(FILE).unwrap();
    let used = used(&image);
    // Pages, twice the tables, and parity, of three epochs.
    assert_eq!(used.len(), (4 + 4 + 4) + (2 + 4 + 2) + (1 + 4 + 1));
    let from_log = (LOG_AT..image.len()).step_by(4 * PAGE_SIZE);
    for from in [0, PAGE_SIZE].into_iter().chain(from_log) {
        let mut bytes = image.clone();
        let end = image.len().min(from + REPAIRABLE as usize);
        bytes[from..end].fill(0xa5);
        let disk = with(bytes);
        reads(&disk, &models).unwrap();
        let report = repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
        assert!(!report.is_lossy(), "run at {from}");
        let left = |damage: &&outlive_epoch_store::Damage| damage.outcome == Outcome::Repairable;
        let left: Vec<_> = report.damages.iter().filter(left).collect();
        // Commit records have tags.
        let records = left.iter().all(|damage| damage.part == Part::CommitRecord);
        assert!(records, "run at {from}: {left:?}");
        let repaired = disk.contents(FILE).unwrap();
        for block in &used {
            let range = block * PAGE_SIZE..(block + 1) * PAGE_SIZE;
            assert!(
                repaired[range.clone()] == image[range],
                "run at {from}, block {block}"
            );
        }
        repair_in_with(&disk.directory(), Some(&secret(1)), &mut |_, _| {}).unwrap();
        assert!(check(&disk, true).is_clean(), "run at {from}");
        reads(&disk, &models).unwrap();
    }
}

/// Which pages are lost is not known without the key, but that some are.
#[test]
pub(crate) fn lost_pages_are_told_with_and_without_the_key() {
    let (disk, _) = image();
    let mut bytes = disk.contents(FILE).unwrap();
    // Two blocks and the parity of one of them.
    bytes[LOG_AT..LOG_AT + 2 * PAGE_SIZE].fill(1);
    bytes[LOG_AT + 17 * PAGE_SIZE..][..PAGE_SIZE].fill(1);
    let disk = with(bytes);
    let lost = |report: Report| {
        let lost = report
            .damages
            .into_iter()
            .filter(|d| d.outcome == Outcome::Lost);
        lost.map(|damage| damage.part).collect::<Vec<_>>()
    };
    let plain = verify_in(&disk.directory(), &mut |_, _| {}).unwrap();
    assert_eq!(lost(plain), [Part::Block]);
    let named = lost(check(&disk, true));
    assert!(matches!(named[..], [Part::Pages(_)]), "{named:?}");
}

/// The checksum of a sector of a commit record, which anybody can make: what it starts from stands in the superblock.
fn stamp_crc(image: &[u8], at: u64, said: &[u8]) -> [u8; 4] {
    let file = crc32c::crc32c_append(crc32c::crc32c(&image[16..32]), &image[32..40]);
    let kind = crc32c::crc32c_append(crc32c::crc32c_append(file, &[6]), &0u64.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(kind, &at.to_le_bytes()), said);
    crc.to_le_bytes()
}

/// An image is stolen while the program runs, and put back with the record of the epoch before in the place of the
/// newest one, with right checksums.
#[test]
pub(crate) fn the_record_of_an_epoch_does_not_stand_in_for_the_next() {
    encrypt(Some(secret(1)));
    let disk = SimDisk::new();
    let history = &history()[..3];
    let mut store = create(&disk).unwrap();
    for script in history {
        script.write(&mut store).unwrap();
    }
    let mut bytes = disk.contents(FILE).unwrap();
    // Epoch 2 has the slot in blocks 1 and 21, epoch 3 that in blocks 2 and 22.
    for second in [0, 20] {
        let from = (1 + second) * PAGE_SIZE;
        let stamp = bytes[from..from + PAGE_SIZE].to_vec();
        for (i, sector) in stamp.chunks(512).enumerate() {
            let at = from + i * 512;
            assert_eq!(sector[508..], stamp_crc(&bytes, at as u64, &sector[..508]));
            let to = at + PAGE_SIZE;
            let crc = stamp_crc(&bytes, to as u64, &sector[..508]);
            bytes[to..to + 508].copy_from_slice(&sector[..508]);
            bytes[to + 508..to + 512].copy_from_slice(&crc);
        }
    }
    let disk = with(bytes);
    assert_eq!(
        open(&disk, Access::Read).unwrap().newest(),
        Some(EpochId(3))
    );
    reads(&disk, &models(history)).unwrap();
    // Without the key, nobody can tell.
    encrypt(None);
    assert_eq!(
        open(&disk, Access::Read).unwrap().newest(),
        Some(EpochId(2))
    );
    encrypt(Some(secret(1)));
}

/// What is not promised: an older state of all of it is one that the key was used for.
#[test]
pub(crate) fn an_older_image_as_a_whole_is_taken_for_what_it_is() {
    encrypt(Some(secret(1)));
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    history()[0].write(&mut store).unwrap();
    let older = disk.contents(FILE).unwrap();
    history()[1].write(&mut store).unwrap();
    drop(store);
    reads(&with(older), &models(&history()[..1])).unwrap();
}
