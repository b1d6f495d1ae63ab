//! Damage done from outside: every byte changed, every length cut, parts from elsewhere.
//!
//! The oracle: what is read is what was written, or it is an error that names the place.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, Step, create, history, models, open, read_back};
use outlive_epoch::StoreError;
use outlive_epoch_store::{Access, Part, Report};
use outlive_media::SimDisk;

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

/// Whether a report names a place within a block of `at`.
fn names(report: &Report, at: usize) -> bool {
    let block = |offset: u64| offset / 4096 == at as u64 / 4096;
    let near = |offset: u64| block(offset) || (offset <= at as u64 && at as u64 - offset < 8192);
    report.damages.iter().any(|damage| near(damage.offset))
}

#[test]
fn every_changed_byte_is_reported_or_does_no_harm() {
    let (image, models) = image();
    let clean = disk_with(image.clone());
    assert!(!loses(&clean, &models) && verify(&clean).is_clean());
    let (mut lossy, mut harmless, mut unused) = (0, 0, 0);
    for at in 0..image.len() {
        let mut bytes = image.clone();
        bytes[at] ^= 1 << (at % 8);
        let disk = disk_with(bytes);
        let (lost, report) = (loses(&disk, &models), verify(&disk));
        assert_eq!(lost, report.is_lossy(), "byte {at}: {report:?}");
        assert!(
            report.is_clean() || names(&report, at),
            "byte {at}: {report:?}"
        );
        match (lost, report.is_clean()) {
            (true, _) => lossy += 1,
            (false, false) => harmless += 1,
            (false, true) => unused += 1,
        }
    }
    // The header has copies of everything; pages and tables have none; only padding is unused.
    assert!(
        harmless == 5 * 4096 - 4096 || harmless == 5 * 4096,
        "{harmless}"
    );
    assert!(lossy > unused, "{lossy} lossy, {unused} unused");
}

#[test]
fn a_lost_block_of_the_header_is_made_up_for() {
    let (image, models) = image();
    for block in 0..5 {
        for filler in [0, 0xff] {
            let mut bytes = image.clone();
            bytes[block * 4096..][..4096].fill(filler);
            let disk = disk_with(bytes);
            assert!(!loses(&disk, &models), "block {block}");
            assert!(!verify(&disk).is_lossy());
            assert!(!verify(&disk).is_clean(), "block {block}");
            // A writer mends what it found, but for the older slot, which the next epoch uses.
            drop(open(&disk, Access::Write).unwrap());
            assert_eq!(verify(&disk).is_clean(), block != 1, "block {block}");
        }
    }
}

#[test]
fn a_cut_file_is_reported() {
    let (image, models) = image();
    for len in (0..image.len()).step_by(512) {
        let disk = disk_with(image[..len].to_vec());
        assert!(loses(&disk, &models), "cut to {len}");
        assert!(verify(&disk).is_lossy());
        match open(&disk, Access::Write) {
            Err(e) => assert_damaged(&e),
            Ok(store) => panic!("{store:?}"),
        }
    }
    let mut longer = image;
    longer.extend_from_slice(&[7; 4096]);
    assert!(!loses(&disk_with(longer), &models));
}

#[test]
fn blocks_in_wrong_places_are_found() {
    let (image, models) = image();
    let blocks = image.len() / 4096;
    // A page that was staged and then superseded within the second epoch: nobody needs it.
    let superseded = 11;
    for from in 0..blocks {
        for to in (0..blocks).filter(|to| *to != from) {
            let mut bytes = image.clone();
            bytes.copy_within(from * 4096..(from + 1) * 4096, to * 4096);
            let disk = disk_with(bytes.clone());
            let lost = loses(&disk, &models);
            assert_eq!(lost, verify(&disk).is_lossy(), "block {from} over {to}");
            assert!(
                lost || to == superseded || to < 5 || bytes == image,
                "block {from} over {to}"
            );
        }
    }
}

#[test]
fn a_page_of_another_image_is_found() {
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
        (
            disk.contents(FILE).unwrap(),
            script.apply(&Model::default()),
        )
    };
    let ((mine, model), (other, _)) = (write(0), write(1));
    assert_eq!(mine.len(), other.len());
    for block in 5..mine.len() / 4096 {
        let mut bytes = mine.clone();
        let range = block * 4096..(block + 1) * 4096;
        bytes[range.clone()].copy_from_slice(&other[range]);
        // The page itself is the same in both, and so are its bytes: it is not damage.
        let lost = loses(&disk_with(bytes), std::slice::from_ref(&model));
        assert_eq!(lost, block > 5, "block {block}");
    }
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let (mut image, _) = image();
    for at in [0, 8192] {
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
fn a_report_says_what_is_lost() {
    let (image, _) = image();
    let mut bytes = image;
    // The third page of the first epoch that is not zero: page 13 of space 1.
    bytes[20480 + 2 * 4096 + 17] ^= 1;
    let report = verify(&disk_with(bytes));
    let damage = &report.damages[0];
    assert_eq!(damage.part, Part::Pages(common::run(1, 13, 1)));
    assert_eq!(
        (damage.offset, damage.epoch.map(|e| e.0)),
        (20480 + 8192, Some(1))
    );
    assert_eq!(report.damages.len(), 1);
    assert!(damage.to_string().contains("address 0xd000"), "{damage}");
}

#[test]
fn the_bytes_of_the_format_are_what_they_were() {
    let (image, _) = image();
    // A change of this sum is a change of the format: it needs a new version, and a reader for
    // images of the old one.
    assert_eq!(
        (image.len(), crc32c::crc32c(&image)),
        (73_728, 3_113_979_613)
    );
}
