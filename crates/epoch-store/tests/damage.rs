//! Damage done from outside: every byte changed, runs of every length, every length cut, parts from
//! elsewhere.
//!
//! The oracle: what is read is what was written, or it is an error that names the place; and one run
//! of up to the published length, wherever it is, is made up for.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, Step, create, history, models, open, read_back};
use outlive_epoch::StoreError;
use outlive_epoch_store::{Access, Outcome, Part, REPAIRABLE, Report, STRIPE, WIDTH, repair_in};
use outlive_media::SimDisk;
use proptest::prelude::*;
use std::collections::BTreeSet;

const FILE: &str = "epochs.1";

/// An image with three epochs, properly closed.
fn image() -> (Vec<u8>, Vec<Model>) {
    let disk = SimDisk::new();
    let history = &history()[..3];
    let mut store = create(&disk).unwrap();
    for script in history {
        script.write(&mut store).unwrap();
    }
    store.close().unwrap();
    (disk.contents(FILE).unwrap(), models(history))
}

fn disk_with(bytes: Vec<u8>) -> SimDisk {
    let disk = SimDisk::new();
    disk.set_contents(FILE, bytes);
    disk
}

fn assert_damaged(error: &StoreError) {
    match error {
        StoreError::Damaged { place, .. } => {
            assert!(place.contains("epochs.1 at offset"), "{place}");
        }
        other => panic!("{other}"),
    }
}

/// Reads all that can be read; whether something is lost.
fn loses(disk: &SimDisk, models: &[Model]) -> bool {
    let store = match open(disk, Access::Read) {
        Ok(store) => store,
        Err(e) => {
            assert_damaged(&e);
            return true;
        }
    };
    assert_eq!(store.epochs().len(), models.len());
    let mut lost = false;
    for (epoch, model) in store.epochs().iter().zip(models) {
        match store
            .epoch(Some(epoch.id))
            .and_then(|reader| read_back(&reader))
        {
            Ok(found) => assert_eq!(found, *model),
            Err(e) => {
                assert_damaged(&e);
                lost = true;
            }
        }
    }
    lost
}

fn verify(disk: &SimDisk) -> Report {
    outlive_epoch_store::verify_in(&disk.directory(), &mut |_, _| {}).unwrap()
}

/// Blocks that hold something: everything else is space between the parts of epochs.
fn used(image: &[u8]) -> BTreeSet<usize> {
    let harmed = |block: &usize| {
        let mut bytes = image.to_vec();
        bytes[block * 4096] ^= 1;
        !verify(&disk_with(bytes)).is_clean()
    };
    (0..image.len() / 4096).filter(harmed).collect()
}

/// Superblocks, slots and seals; then for each epoch its pages, twice its tables (one block of trees,
/// groups and index, and the trailer), and parity: of so few pages, a copy of each.
const USED: usize = 8 + (4 + 4 + 4) + (2 + 4 + 2) + (1 + 4 + 1);

/// Repairs, and compares with what was there before in all blocks that are used.
fn repaired(disk: &SimDisk, image: &[u8], used: &BTreeSet<usize>) -> Report {
    let report = repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
    let bytes = disk.contents(FILE).unwrap();
    for block in used {
        let range = block * 4096..(block + 1) * 4096;
        assert!(
            bytes[range.clone()] == image[range],
            "block {block}: {report:?}"
        );
    }
    assert!(verify(disk).is_clean());
    report
}

/// An image with one small epoch.
fn small_image() -> Vec<u8> {
    let disk = SimDisk::new();
    let script = Script {
        base: false,
        steps: vec![Step::Put(1, 0, vec![5])],
        trees: vec![("root", vec![7; 90])],
    };
    let mut store = create(&disk).unwrap();
    script.write(&mut store).unwrap();
    store.close().unwrap();
    disk.contents(FILE).unwrap()
}

#[test]
pub(crate) fn every_changed_byte_is_reported() {
    let image = small_image();
    let used = used(&image);
    // The slot that is not used before the second epoch says so.
    assert_eq!(used.len(), 8 + 1 + 2 + 1 + 2);
    for at in 0..image.len() {
        let block = at / 4096;
        // What belongs to nobody is tried here and there.
        if !used.contains(&block) && at % 509 != 0 {
            continue;
        }
        let mut bytes = image.clone();
        bytes[at] ^= 1 << (at % 8);
        let report = verify(&disk_with(bytes));
        assert_eq!(report.is_clean(), !used.contains(&block), "byte {at}");
        let named = |d: &outlive_epoch_store::Damage| {
            d.offset / 4096 == block as u64 && d.outcome == Outcome::Repairable
        };
        assert!(report.damages.iter().all(named), "byte {at}: {report:?}");
    }
}

#[test]
pub(crate) fn changed_bytes_are_made_up_for() {
    let (image, models) = image();
    let clean = disk_with(image.clone());
    assert!(!loses(&clean, &models) && verify(&clean).is_clean());
    let used = used(&image);
    assert_eq!(used.len(), USED);
    for at in used
        .iter()
        .flat_map(|block| (block * 4096..(block + 1) * 4096).step_by(373))
    {
        let mut bytes = image.clone();
        bytes[at] ^= 1 << (at % 8);
        let disk = disk_with(bytes);
        assert!(!loses(&disk, &models), "byte {at}");
        let report = repaired(&disk, &image, &used);
        let mended = report
            .damages
            .iter()
            .all(|d| d.outcome == Outcome::Repaired);
        assert!(mended, "byte {at}: {report:?}");
    }
}

/// Fills a part of an image with other bytes.
fn harm(image: &[u8], from: usize, len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = image.to_vec();
    let to = image.len().min(from + len);
    match seed % 3 {
        0 => bytes[from..to].fill(0),
        1 => bytes[from..to].fill(0xff),
        _ => {
            let mut random = fastrand::Rng::with_seed(seed);
            random.fill(&mut bytes[from..to]);
        }
    }
    bytes
}

#[test]
pub(crate) fn one_run_of_the_published_length_is_made_up_for_wherever_it_is() {
    let (image, models) = image();
    let used = used(&image);
    // At 512 bytes, and one byte before and behind.
    let places = (0..image.len())
        .step_by(1024)
        .flat_map(|at| [at.saturating_sub(1), at, at + 1]);
    for (i, from) in places.enumerate() {
        let disk = disk_with(harm(&image, from, REPAIRABLE as usize, i as u64));
        assert!(!loses(&disk, &models), "run at {from}");
        if i % 8 == 0 {
            let report = verify(&disk);
            assert!(
                !report.is_lossy() && !report.is_clean(),
                "run at {from}: {report:?}"
            );
            repaired(&disk, &image, &used);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn shorter_runs_are_made_up_for(from in any::<prop::sample::Index>(), len in 1..=REPAIRABLE as usize, seed: u64) {
        let (image, models) = image();
        let disk = disk_with(harm(&image, from.index(image.len()), len, seed));
        prop_assert!(!loses(&disk, &models));
        prop_assert!(!verify(&disk).is_lossy());
        repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
        prop_assert!(verify(&disk).is_clean());
        prop_assert!(!loses(&disk, &models));
    }

    #[test]
    fn what_several_runs_destroy_is_told_as_lost(runs in prop::collection::vec((any::<prop::sample::Index>(), 1..200_000usize, any::<u64>()), 2..5)) {
        let (image, models) = image();
        let mut bytes = image;
        for (from, len, seed) in runs {
            bytes = harm(&bytes, from.index(bytes.len()), len, seed);
        }
        let disk = disk_with(bytes);
        let report = verify(&disk);
        let lost = loses(&disk, &models);
        prop_assert!(!lost || report.is_lossy(), "{:?}", report);
        let mended = repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
        prop_assert_eq!(mended.is_lossy(), report.is_lossy());
        prop_assert!(lost || !loses(&disk, &models));
        // What is unneeded, or harmed in both copies of a table block, stays as it is. That there may
        // have been a newer epoch is told once: then the header is whole again.
        prop_assert!(report.is_lossy() || !verify(&disk).is_lossy());
        let n = open(&disk, Access::Read).map_or(models.len(), |store| store.epochs().len());
        prop_assert!(!loses(&disk, &models[..n]) || verify(&disk).is_lossy());
    }
}

/// An image with so many epochs, closed or as a power cut leaves it.
fn image_of(epochs: usize, closed: bool) -> (Vec<u8>, Vec<Model>) {
    let disk = SimDisk::new();
    let history = &history()[..epochs];
    let mut store = create(&disk).unwrap();
    for script in history {
        script.write(&mut store).unwrap();
    }
    if closed {
        store.close().unwrap();
    } else {
        let cut = disk.power_cut(&mut |_, _| outlive_media::Fate::Drop);
        return (cut.contents(FILE).unwrap(), models(history));
    }
    (disk.contents(FILE).unwrap(), models(history))
}

#[test]
pub(crate) fn whatever_is_left_of_the_header_the_newest_epoch_is_found_or_missed_by_name() {
    const BLOCKS: [usize; 8] = [0, 20, 1, 21, 2, 22, 3, 23];
    let mut doubts = 0;
    for (epochs, closed) in [(1, true), (1, false), (2, false), (3, true), (3, false)] {
        let (image, models) = image_of(epochs, closed);
        for left in 0..256u32 {
            let mut bytes = image.clone();
            for (i, block) in BLOCKS.iter().enumerate() {
                if left >> i & 1 == 0 {
                    bytes[block * 4096..][..4096].fill(0xff * u8::from(left % 3 == 0));
                }
            }
            let any = |pair: u32| left >> (2 * pair) & 3 > 0;
            let newest = 1 + epochs as u32 % 2;
            let (slot, older) = (any(newest), any(3 - newest));
            let found = any(0) && (any(3) || slot && older);
            let disk = disk_with(bytes);
            assert_eq!(loses(&disk, &models), !found, "{epochs} {closed} {left:b}");
            assert_eq!(
                verify(&disk).is_lossy(),
                !found,
                "{epochs} {closed} {left:b}"
            );
            let refused = open(&disk, Access::Write).is_err();
            assert_eq!(refused, !found, "{epochs} {closed} {left:b}");
            // A repair settles it, where it can be said which epochs there are.
            let readable = any(0) && (any(3) || slot || older && epochs > 1);
            let report = repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
            assert_eq!(report.is_lossy(), !found);
            match open(&disk, Access::Write) {
                Ok(store) => {
                    assert_eq!(store.epochs().len(), epochs - usize::from(!slot && !any(3)))
                }
                Err(e) => assert!(!readable, "{epochs} {closed} {left:b}: {e}"),
            }
            assert_eq!(
                verify(&disk).is_clean(),
                readable,
                "{epochs} {closed} {left:b}"
            );
            doubts += u32::from(!found && readable);
        }
    }
    assert!(doubts > 50, "{doubts}");
}

#[test]
pub(crate) fn each_stripe_and_the_tables_may_have_a_run_of_damage_at_once() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    let seeds: Vec<u8> = (0..2 * STRIPE + 300).map(|i| (i % 251 + 1) as u8).collect();
    let script = Script {
        base: false,
        steps: vec![Step::Put(1, 0, seeds)],
        trees: vec![("root", vec![7; 300_000])],
    };
    script.write(&mut store).unwrap();
    store.close().unwrap();
    let image = disk.contents(FILE).unwrap();
    let models = [script.apply(&Model::default())];
    let log = 24 * 4096;
    let stripe = (STRIPE + WIDTH) as usize * 4096;
    let tables = log + 2 * stripe + 300 * 4096;
    let mut random = fastrand::Rng::with_seed(5);
    for _ in 0..4 {
        let mut bytes = image.clone();
        let runs = [
            0..log,
            log..log + stripe,
            log + stripe..log + 2 * stripe,
            log + 2 * stripe..tables,
            // The parity of the last stripe stands behind the tables.
            tables..tables + 70 * 4096,
        ];
        for run in runs {
            let from = random.usize(run.start..run.end - REPAIRABLE as usize);
            bytes = harm(&bytes, from, REPAIRABLE as usize, random.u64(..));
        }
        let disk = disk_with(bytes);
        assert!(!loses(&disk, &models));
        let report = repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
        assert!(report.damages.len() > 3 * WIDTH as usize - 3, "{report:?}");
        assert!(
            report
                .damages
                .iter()
                .all(|d| d.outcome == Outcome::Repaired),
            "{report:?}"
        );
        assert!(disk.contents(FILE).unwrap()[log..] == image[log..]);
        assert!(verify(&disk).is_clean());
    }
}

#[test]
pub(crate) fn a_writer_mends_the_header() {
    let (image, models) = image();
    for block in [0, 1, 2, 3, 20, 21, 22, 23] {
        for filler in [0, 0xff] {
            let mut bytes = image.clone();
            bytes[block * 4096..][..4096].fill(filler);
            let disk = disk_with(bytes);
            assert!(!loses(&disk, &models), "block {block}");
            assert!(!verify(&disk).is_lossy() && !verify(&disk).is_clean());
            drop(open(&disk, Access::Write).unwrap());
            assert!(verify(&disk).is_clean(), "block {block}");
        }
    }
}

#[test]
pub(crate) fn a_cut_file_is_reported() {
    let (image, models) = image();
    let used = used(&image);
    for len in (0..image.len()).step_by(1536) {
        let disk = disk_with(image[..len].to_vec());
        let lost = loses(&disk, &models);
        assert_eq!(lost, verify(&disk).is_lossy(), "cut to {len}");
        assert!(!verify(&disk).is_clean(), "cut to {len}");
        if image.len() - len <= REPAIRABLE as usize {
            assert!(!lost, "cut to {len}");
            repaired(&disk, &image, &used);
        }
    }
    let mut longer = image;
    longer.extend_from_slice(&[7; 4096]);
    assert!(!loses(&disk_with(longer), &models));
}

#[test]
pub(crate) fn blocks_in_wrong_places_are_found() {
    let (image, models) = image();
    let used = used(&image);
    for from in (0..image.len() / 4096).filter(|from| used.contains(from) || from % 9 == 0) {
        for to in used.iter().copied().filter(|to| *to != from) {
            let mut bytes = image.clone();
            bytes.copy_within(from * 4096..(from + 1) * 4096, to * 4096);
            let same = bytes == image;
            let disk = disk_with(bytes);
            assert!(!loses(&disk, &models), "block {from} over {to}");
            assert_eq!(verify(&disk).is_clean(), same, "block {from} over {to}");
        }
    }
}

#[test]
pub(crate) fn a_block_of_another_image_is_found() {
    let write = |uuid_shift: usize| {
        let disk = SimDisk::new();
        let script = Script {
            base: false,
            steps: vec![Step::Put(1, 1, vec![5])],
            trees: vec![],
        };
        let host = common::SimHost::default();
        for _ in 0..uuid_shift {
            outlive_epoch_store::Host::uuid(&host);
        }
        let dir = std::sync::Arc::new(disk.directory());
        let mut store =
            outlive_epoch_store::Store::create_in(dir, std::sync::Arc::new(host)).unwrap();
        script.write(&mut store).unwrap();
        drop(store);
        let model = script.apply(&Model::default());
        (disk.contents(FILE).unwrap(), model)
    };
    let ((mine, model), (other, _)) = (write(0), write(1));
    assert_eq!(mine.len(), other.len());
    assert!(
        mine[24 * 4096..] != other[24 * 4096..],
        "the same checksums in two images"
    );
    for block in 24..mine.len() / 4096 {
        let mut bytes = mine.clone();
        let range = block * 4096..(block + 1) * 4096;
        bytes[range.clone()].copy_from_slice(&other[range]);
        let same = bytes == mine;
        let disk = disk_with(bytes);
        assert!(!loses(&disk, std::slice::from_ref(&model)), "block {block}");
        assert_eq!(verify(&disk).is_clean(), same, "block {block}");
    }
}

#[test]
pub(crate) fn a_newer_version_is_refused_by_name() {
    let (mut image, _) = image();
    for at in [0, 20 * 4096] {
        let block: &mut [u8] = &mut image[at..at + 4096];
        block[8..12].copy_from_slice(&7u32.to_le_bytes());
        let start = crc32c::crc32c(b"OUTLIVES");
        let start = crc32c::crc32c_append(start, &(at as u64).to_le_bytes());
        let crc = crc32c::crc32c_append(start, &block[..4092]);
        block[4092..].copy_from_slice(&crc.to_le_bytes());
    }
    let disk = disk_with(image);
    for access in [Access::Read, Access::Write] {
        let opened = open(&disk, access);
        assert!(
            matches!(
                opened,
                Err(StoreError::Newer {
                    found: 7,
                    supported: 1,
                    ..
                })
            ),
            "{opened:?}"
        );
    }
}

#[test]
pub(crate) fn a_report_says_what_is_lost() {
    let (image, _) = image();
    let mut bytes = image;
    // The third page of the first epoch that is not zero (page 13 of space 1), and its parity.
    let log = 24 * 4096;
    bytes[log + 2 * 4096 + 17] ^= 1;
    bytes[log + 19 * 4096 + 17] ^= 1;
    let report = verify(&disk_with(bytes));
    let damage = &report.damages[0];
    assert_eq!(damage.part, Part::Pages(common::run(1, 13, 1)));
    let place = (damage.offset, damage.epoch.map(|e| e.0));
    assert_eq!(place, (log as u64 + 8192, Some(1)));
    assert_eq!(damage.outcome, Outcome::Lost);
    assert!(damage.to_string().contains("address 0xd000"), "{damage}");
    let parity = (&report.damages[1].part, report.damages[1].outcome);
    assert_eq!(parity, (&Part::Parity, Outcome::Unneeded));
    assert_eq!(report.damages.len(), 2);
}
