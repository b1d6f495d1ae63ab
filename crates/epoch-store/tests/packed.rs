//! Pages that are packed together: whatever they are, wherever they go and whoever reads them, they come
//! back as they were; and damage to them is made up for or named, as everywhere.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{create, open, run};
use outlive_epoch::{
    Content, EpochFacts, EpochId, EpochReader, EpochWriter, Order, PAGE_SIZE, PageSink, SpaceId,
};
use outlive_epoch_store::{
    Access, Codec, EpochSummary, Outcome, REPAIRABLE, Reader, STRIPE, Store, repair_in, verify_in,
};
use outlive_media::SimDisk;
use std::collections::BTreeMap;

const FILE: &str = "epochs.1";
const CODECS: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

/// The contents of pages, by space and index.
type Pages = BTreeMap<(u32, u64), Vec<u8>>;

/// A page that packs well, one that does not pack at all, one of zeros, or one in between.
fn page(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE];
    let noise = match random.u8(..8) {
        0 => 0,
        1 | 2 => PAGE_SIZE,
        3 => 2000,
        _ => 20,
    };
    random.fill(&mut page[..noise]);
    if noise > 0 {
        page[PAGE_SIZE - 1] = 1;
    }
    page
}

/// What a writer is told, and the same in the model: runs of some pages, scattered pages, runs that become zero or
/// absent.
fn write(store: &mut Store, random: &mut fastrand::Rng, model: &mut Pages, steps: usize) {
    let mut writer = store.begin().unwrap();
    for _ in 0..steps {
        let (space, first) = (random.u32(..3), random.u64(..700));
        match random.u8(..10) {
            0 => {
                let count = random.u64(1..20);
                writer.zero(run(space, first, count)).unwrap();
                model.extend((0..count).map(|i| ((space, first + i), vec![0; PAGE_SIZE])));
            }
            1 => {
                let count = random.u64(1..20);
                writer.absent(run(space, first, count)).unwrap();
                model.retain(|(s, i), _| *s != space || !(first..first + count).contains(i));
            }
            kind => {
                let count = if kind < 6 { 1 } else { random.u64(1..90) };
                let pages: Vec<Vec<u8>> = (0..count).map(|_| page(random)).collect();
                writer
                    .put(run(space, first, count), &pages.concat())
                    .unwrap();
                model.extend((first..).map(|i| (space, i)).zip(pages));
            }
        }
    }
    writer.tree("root", b"tree").unwrap();
    writer.commit(EpochFacts::default()).unwrap();
}

fn read(reader: &Reader) -> Pages {
    let mut pages = Pages::new();
    reader
        .pages(&mut |run, content| {
            for i in 0..run.count() {
                let page = match content {
                    Content::Zero => vec![0; PAGE_SIZE],
                    Content::Bytes(bytes) => bytes[i as usize * PAGE_SIZE..][..PAGE_SIZE].to_vec(),
                };
                let before = pages.insert((run.space().0, run.first() + i), page);
                assert!(before.is_none(), "page {i} of {run:?} is handed out twice");
            }
            Ok(())
        })
        .unwrap();
    pages
}

/// Compares without printing megabytes.
fn same(found: &Pages, model: &Pages, what: &str) {
    assert!(found.keys().eq(model.keys()), "{what}: other pages");
    for (at, page) in found {
        assert!(*page == model[at], "{what}: page {at:?}");
    }
}

/// A store of some epochs, and what each of them holds.
fn some_epochs(disk: &SimDisk, codec: Codec, steps: usize) -> Vec<Pages> {
    let mut random = fastrand::Rng::with_seed(steps as u64);
    let mut store = create(disk).unwrap();
    let mut models = vec![Pages::new()];
    for epoch in 0..5 {
        // The fourth one is not packed, and rests on others that are.
        store.pack(Some(codec).filter(|_| epoch != 3));
        let mut model = models[epoch].clone();
        write(&mut store, &mut random, &mut model, steps);
        models.push(model);
    }
    store.close().unwrap();
    models.remove(0);
    models
}

#[test]
pub(crate) fn what_was_packed_comes_back() {
    for codec in CODECS {
        let disk = SimDisk::new();
        let models = some_epochs(&disk, codec, 200);
        let mut store = open(&disk, Access::Write).unwrap();
        store.pack(Some(codec));
        let (mut saved, mut pages) = (0, 0);
        for (epoch, model) in store.epochs().iter().zip(&models) {
            let reader = store.epoch(Some(epoch.id)).unwrap();
            same(
                &read(&reader),
                model,
                &format!("{codec:?}, epoch {}", epoch.id),
            );
            saved += epoch.saved_bytes;
            pages += epoch.pages * PAGE_SIZE as u64;
            assert_eq!(epoch.saved_bytes > 0, epoch.id != EpochId(4), "{epoch:?}");
        }
        let blocks = |epoch: &EpochSummary| epoch.pages - epoch.saved_bytes / PAGE_SIZE as u64;
        let stripes = store
            .epochs()
            .iter()
            .map(|e| blocks(e) / STRIPE)
            .sum::<u64>();
        assert!(stripes > 3, "clusters meet the ends of stripes");
        assert!(saved > pages / 4, "{codec:?} saved {saved} of {pages}");
        assert!(store.log_bytes() < pages, "{codec:?}");
        let reader = store.epoch(None).unwrap();
        let model = models.last().unwrap();
        let stored = model.values().filter(|page| page.iter().any(|b| *b != 0));
        assert_eq!(
            reader.stored_bytes(),
            stored.count() as u64 * PAGE_SIZE as u64
        );
        assert!(store.live_bytes().unwrap() < reader.stored_bytes());
        // One by one, as they are when memory is brought in as it is touched.
        for ((space, index), page) in model.iter().step_by(13) {
            let wanted = [run(*space, *index, 1)];
            let mut found = None;
            reader
                .pages_in(&wanted, Order::LatestFirst, &mut |run, content| {
                    assert_eq!(run, wanted[0]);
                    assert!(found.is_none());
                    found = Some(match content {
                        Content::Zero => vec![0; PAGE_SIZE],
                        Content::Bytes(bytes) => bytes.to_vec(),
                    });
                    Ok(())
                })
                .unwrap();
            assert!(found.as_ref() == Some(page), "page {index} of {space}");
        }
        assert!(
            verify_in(&disk.directory(), &mut |_, _| {})
                .unwrap()
                .is_clean()
        );
    }
}

#[test]
pub(crate) fn clusters_of_two_epochs_are_two() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    store.pack(Some(Codec::Lz4));
    let mut model = Pages::new();
    for (first, byte) in [(0, b'a'), (100, b'b')] {
        let pages = vec![byte; 16 * PAGE_SIZE];
        let mut writer = store.begin().unwrap();
        writer.put(run(1, first, 16), &pages).unwrap();
        writer.commit(EpochFacts::default()).unwrap();
        model.extend((first..first + 16).map(|i| ((1, i), vec![byte; PAGE_SIZE])));
    }
    same(&read(&store.epoch(None).unwrap()), &model, "both");
}

#[test]
pub(crate) fn a_flattened_store_is_packed_as_its_epochs_are() {
    for codec in CODECS {
        let disk = SimDisk::new();
        let models = some_epochs(&disk, codec, 60);
        let model = models.last().unwrap();
        let mut store = open(&disk, Access::Write).unwrap();
        store.pack(Some(codec));
        let (long, live) = (store.log_bytes(), store.live_bytes().unwrap());
        store.begin_flattening().unwrap();
        while !store.work(3 * PAGE_SIZE as u64).unwrap().ready {}
        store.switch().unwrap();
        same(&read(&store.epoch(None).unwrap()), model, "flattened");
        // What it was in clusters with may differ, and with it how well it packs.
        assert!(store.log_bytes() < long && store.log_bytes() < 2 * live);
        assert!(store.epochs().iter().all(|epoch| epoch.saved_bytes > 0));
        // And as it is, where nobody wants it packed any more.
        store.pack(None);
        store.begin_flattening().unwrap();
        while !store.work(1 << 20).unwrap().ready {}
        store.switch().unwrap();
        same(&read(&store.epoch(None).unwrap()), model, "unpacked");
        assert!(store.epochs().iter().all(|epoch| epoch.saved_bytes == 0));
        store.close().unwrap();
    }
}

#[test]
fn nothing_is_packed_for_somebody_who_waits() {
    let text = vec![b'a'; 64 * PAGE_SIZE];
    for event in [false, true] {
        let disk = SimDisk::new();
        let mut store = create(&disk).unwrap();
        store.pack(Some(Codec::Lz4));
        for half in [1, 2] {
            let mut writer = match event {
                true => store.begin_event().unwrap(),
                false => store.begin().unwrap(),
            };
            // Some pages wait to be packed when it is said.
            writer
                .put(run(1, 0, 5 * half), &text[..5 * half as usize * PAGE_SIZE])
                .unwrap();
            writer.hurry();
            writer.absent(run(1, 2, 1)).unwrap();
            writer
                .put(run(1, 100, 40), &text[..40 * PAGE_SIZE])
                .unwrap();
            writer.commit(EpochFacts::default()).unwrap();
        }
        for epoch in store.epochs() {
            assert_eq!(epoch.saved_bytes, 0, "{epoch:?}");
        }
        let found = read(&store.epoch(None).unwrap());
        assert_eq!(found.len(), 9 + 40);
        assert!(found.values().all(|page| *page == text[..PAGE_SIZE]));
    }
}

#[test]
fn what_does_not_pack_is_stored_as_it_is() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    store.pack(Some(Codec::Zstd));
    let mut noise = vec![0; 600 * PAGE_SIZE];
    fastrand::Rng::with_seed(5).fill(&mut noise);
    let mut writer = store.begin().unwrap();
    writer.put(run(1, 0, 600), &noise).unwrap();
    writer.commit(EpochFacts::default()).unwrap();
    assert_eq!(store.epochs()[0].saved_bytes, 0);
    // It is tried again, and found out that now it pays.
    let text = vec![b'a'; 600 * PAGE_SIZE];
    let mut writer = store.begin().unwrap();
    for again in 0..20 {
        writer.put(run(1, 600 * again, 600), &text).unwrap();
    }
    let acked = writer.commit(EpochFacts::default()).unwrap();
    assert!(
        acked.bytes_written < acked.pages * PAGE_SIZE as u64 / 2,
        "{acked:?}"
    );
}

#[test]
pub(crate) fn damage_to_packed_pages_is_made_up_for() {
    let disk = SimDisk::new();
    let models = some_epochs(&disk, Codec::Lz4, 12);
    let image = disk.contents(FILE).unwrap();
    for from in (0..image.len()).step_by(3 * 4096 + 512) {
        let disk = SimDisk::new();
        let mut bytes = image.clone();
        let to = image.len().min(from + REPAIRABLE as usize);
        bytes[from..to].fill(0xa7);
        disk.set_contents(FILE, bytes);
        let store = open(&disk, Access::Read).unwrap();
        for (epoch, model) in store.epochs().iter().zip(&models) {
            let reader = store.epoch(Some(epoch.id)).unwrap();
            same(&read(&reader), model, &format!("damage at {from}"));
        }
        let report = repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
        assert!(!report.is_lossy(), "{report:?}");
        assert!(
            verify_in(&disk.directory(), &mut |_, _| {})
                .unwrap()
                .is_clean()
        );
    }
}

#[test]
pub(crate) fn all_pages_of_a_lost_cluster_are_named() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    store.pack(Some(Codec::Lz4));
    let text = vec![b'a'; 3 * PAGE_SIZE];
    let mut writer = store.begin().unwrap();
    // Three scattered pages and one that is stored once more, in one cluster.
    for first in [100, 200, 300, 400] {
        writer.put(run(1, first, 1), &text[..PAGE_SIZE]).unwrap();
    }
    for more in 0..12 {
        writer.put(run(2, more, 1), &text[..PAGE_SIZE]).unwrap();
    }
    let noise: Vec<u8> = (0..PAGE_SIZE).map(|_| fastrand::u8(1..)).collect();
    writer.put(run(1, 400, 1), &noise).unwrap();
    writer.commit(EpochFacts::default()).unwrap();
    store.close().unwrap();
    let image = disk.contents(FILE).unwrap();
    let log_at = 24 * 4096;
    let mut bytes = image.clone();
    // The block of the cluster, and its parity.
    bytes[log_at + 9] ^= 1;
    let parity = (0..image.len() / 4096)
        .map(|block| block * 4096)
        .find(|at| *at > log_at && image[*at..][..4096] == image[log_at..][..4096]);
    bytes[parity.unwrap() + 9] ^= 1;
    disk.set_contents(FILE, bytes);
    let report = verify_in(&disk.directory(), &mut |_, _| {}).unwrap();
    let lost = report.damages.iter().filter(|d| d.outcome == Outcome::Lost);
    let named: Vec<String> = lost.map(|damage| damage.part.to_string()).collect();
    let all = named.join("; ");
    assert_eq!(named.len(), 4, "{all}");
    for page in [100u64, 200, 300] {
        let page = format!("{page:#x}");
        let address = format!("{:#x}", u64::from_str_radix(&page[2..], 16).unwrap() * 4096);
        assert!(all.contains(&address), "{address}: {all}");
    }
    let store = open(&disk, Access::Read).unwrap();
    let reader = store.epoch(None).unwrap();
    assert!(reader.pages(&mut |_, _| Ok(())).is_err());
    // What is not in it can still be read.
    let mut found = 0;
    reader
        .pages_in(&[run(1, 400, 1)], Order::Fastest, &mut |_, content| {
            assert!(content == Content::Bytes(&noise));
            found += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(found, 1);
    assert!(reader.runs().iter().any(|run| run.space() == SpaceId(2)));
}
