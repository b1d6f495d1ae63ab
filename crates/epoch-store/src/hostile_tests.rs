//! Images made by an enemy: every checksum is right, the numbers are not.
//!
//! The oracle: no panic, no endless walk, nothing read outside the file; what is refused is
//! refused as damage.

use crate::format::{
    BLOCK_LEN, Kind, LOG_AT, Record, SEAL_AT, SLOT_AT, Stamp, Superblock, SuperblockRead, Trailer,
    Twice,
};
use crate::index::Index;
use crate::stripe::Layout;
use crate::{Access, Codec, Store, SystemHost, repair_in, verify_in};
use outlive_epoch::{
    Content, EpochFacts, EpochReader, EpochWriter, PAGE_SIZE, PageSink, Run, SpaceId, StoreError,
    VisitError,
};
use outlive_media::SimDisk;
use proptest::prelude::*;
use std::sync::Arc;

const FILE: &str = "epochs.1";

fn open(disk: &SimDisk, access: Access) -> Result<Store, StoreError> {
    Store::open_in(
        Arc::new(disk.directory()),
        Arc::new(SystemHost::default()),
        access,
    )
}

/// Three epochs with pages of all kinds and trees that are kept.
fn image() -> Vec<u8> {
    let disk = SimDisk::new();
    let mut store = open(&disk, Access::Write).unwrap();
    for epoch in 0..3u64 {
        // Those of the first one stand as they are.
        store.pack([None, Some(Codec::Lz4), Some(Codec::Zstd)][epoch as usize]);
        let mut writer = store.begin().unwrap();
        let run = |first, count| Run::new(SpaceId(1), first, count).unwrap();
        let bytes = [epoch as u8 + 1; 3 * PAGE_SIZE];
        writer.put(run(10 + epoch, 3), &bytes).unwrap();
        writer.put(run(20, 2), &[0; 2 * PAGE_SIZE]).unwrap();
        writer.absent(run(21, 1)).unwrap();
        writer.tree("root", &[epoch as u8; 100]).unwrap();
        writer.tree("kept", &[7; 300]).unwrap();
        writer.commit(EpochFacts::default()).unwrap();
    }
    store.close().unwrap();
    disk.contents(FILE).unwrap()
}

/// An image with the means to change it and to make its checksums right again.
struct Forge {
    bytes: Vec<u8>,
    superblock: Superblock,
}

impl Forge {
    fn new() -> Self {
        let bytes = image();
        let SuperblockRead::Good(superblock) = Superblock::decode(0, &bytes[..4096]) else {
            panic!("a good superblock");
        };
        Self { bytes, superblock }
    }

    fn block(&self, at: u64) -> &[u8] {
        &self.bytes[at as usize..][..BLOCK_LEN as usize]
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn record(&self) -> Record {
        let at = SEAL_AT[0];
        let stamps = Stamp::decode(self.superblock.key(), None, at, self.block(at));
        stamps[0].newest.unwrap()
    }

    /// Trailers, newest first.
    fn trailers(&self) -> Vec<(u64, Trailer)> {
        let record = self.record();
        let (mut twice, mut epoch, mut all) = (record.trailer, record.epoch, Vec::new());
        while twice != Twice::NONE {
            let block = self.block(twice.at);
            let trailer = Trailer::decode(self.superblock.key(), epoch, twice, block).unwrap();
            all.push((twice.at, trailer));
            (twice, epoch) = (trailer.previous, epoch - 1);
        }
        all
    }

    fn put_record(&mut self, record: Record) {
        let key = self.superblock.key();
        let newest = Some(record);
        let coming = None;
        for at in SLOT_AT.into_iter().flatten().chain(SEAL_AT) {
            self.put(at, &Stamp { newest, coming }.encode(key, None, at));
        }
    }

    /// Both copies; `copy_at` is where the second one really stands. What leads there, leads to these
    /// bytes afterwards.
    fn put_trailer(&mut self, at: u64, copy_at: u64, trailer: &Trailer) {
        let newer: Vec<_> = self.trailers();
        let newer = newer.into_iter().take_while(|(newer, _)| *newer != at);
        let newer: Vec<_> = newer.collect();
        let mut crc = self.put_both(at, copy_at, trailer);
        for (at, mut trailer) in newer.into_iter().rev() {
            trailer.previous.crc = crc;
            crc = self.put_both(at, trailer.copy_at, &trailer);
        }
        let mut record = self.record();
        record.trailer.crc = crc;
        self.put_record(record);
    }

    fn put_both(&mut self, at: u64, copy_at: u64, trailer: &Trailer) -> u32 {
        let block = trailer.encode(self.superblock.key(), at);
        self.put(at, &block);
        self.put(copy_at, &block);
        Trailer::crc(&block).unwrap()
    }

    /// Makes the checksum of a section right after its bytes were changed.
    fn reseal(&mut self, at: u64, mut trailer: Trailer) {
        let key = self.superblock.key();
        let crc = |kind, section: crate::format::Section| {
            let bytes = &self.bytes[section.at as usize..][..section.len as usize];
            key.of(kind, trailer.epoch).crc(section.at, bytes)
        };
        let (groups, index) = (
            crc(Kind::Groups, trailer.groups),
            crc(Kind::Index, trailer.index),
        );
        (trailer.groups.crc, trailer.index.crc) = (groups, index);
        self.put_trailer(at, trailer.copy_at, &trailer);
    }

    /// Does everything that can be done with an image; gives how much of it worked.
    fn use_all(self) -> usize {
        let len = self.bytes.len() as u64;
        let disk = SimDisk::new();
        disk.set_contents(FILE, self.bytes);
        let mut worked = 0;
        if let Ok(report) = verify_in(&disk.directory(), &mut |_, _| {}) {
            assert!(report.bytes <= 1100 * len);
        }
        let copy = disk.fork();
        let _ = repair_in(&copy.directory(), &mut |_, _| {});
        match open(&disk, Access::Read) {
            Err(e) => assert_damaged(&e),
            Ok(store) => {
                for epoch in store.epochs() {
                    match store.epoch(Some(epoch.id)) {
                        Err(e) => assert_damaged(&e),
                        Ok(reader) => worked += read(&reader),
                    }
                }
            }
        }
        if let Ok(mut store) = open(&disk, Access::Write) {
            let _ = store.live_bytes();
            if let Ok(writer) = store.begin() {
                worked += usize::from(writer.commit(EpochFacts::default()).is_ok());
            }
        }
        worked
    }
}

fn assert_damaged(e: &StoreError) {
    assert!(matches!(e, StoreError::Damaged { .. }), "{e}");
}

fn read(reader: &dyn EpochReader) -> usize {
    let mut worked = 0;
    for group in reader.groups() {
        worked += usize::from(reader.tree(&group).is_ok());
    }
    let _ = reader.runs();
    let walked = reader.pages(&mut |run, content| {
        if let Content::Bytes(bytes) = content {
            assert_eq!(bytes.len() as u64, run.bytes());
            worked += 1;
        }
        Ok(())
    });
    if let Err(VisitError::Store(e)) = walked {
        assert_damaged(&e);
    }
    worked
}

/// Numbers at which arithmetic goes wrong.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        prop::sample::select(vec![
            0,
            1,
            2,
            4,
            4095,
            4096,
            LOG_AT,
            LOG_AT + 4096,
            1 << 32,
            1 << 51,
            1 << 52,
            i64::MAX as u64,
            u64::MAX - 4096,
            u64::MAX - 4095,
            u64::MAX - 1,
            u64::MAX,
        ]),
        (0u64..40).prop_map(|n| n * 4096),
        any::<u64>(),
    ]
}

fn set(trailer: &mut Trailer, field: usize, n: u64) {
    match field {
        0 => trailer.previous.at = n,
        11 => trailer.previous.copy_at = n,
        12 => trailer.copy_at = n,
        14 => trailer.saved = n,
        15 => trailer.clusters = n,
        13 => trailer.parity_at = n,
        1 => trailer.start = n,
        2 => trailer.groups.at = n,
        3 => trailer.groups.len = n,
        4 => trailer.index.at = n,
        5 => trailer.index.len = n,
        6 => trailer.entries = n,
        7 => trailer.pages = n,
        8 => trailer.bytes_written = n,
        9 => trailer.previous_durable_us = n,
        _ => {
            trailer.facts = EpochFacts {
                taken_at_ns: n,
                stop_us: n,
            }
        }
    }
}

#[test]
fn an_untouched_image_works() {
    assert!(Forge::new().use_all() > 10);
}

#[test]
fn an_index_may_not_lead_outside_its_epoch() {
    let forge = Forge::new();
    let (_, newest) = forge.trailers()[0];
    let bytes = &forge.bytes[newest.index.at as usize..][..newest.index.len as usize];
    let decode = |start| {
        let blocks = newest.blocks().unwrap();
        let parity_at = Layout::place_parity(start, blocks, newest.parity_at);
        let layout = Layout::new(start, blocks, parity_at).unwrap();
        Index::decode(bytes, newest.counts(), &layout)
    };
    assert!(decode(newest.start).is_some());
    assert_eq!(decode(newest.start + BLOCK_LEN), None);
}

#[test]
fn what_does_not_unpack_to_its_pages_is_lost_by_name() {
    for which in 0..2 {
        let mut forge = Forge::new();
        let (at, trailer) = forge.trailers()[which];
        let bytes = &forge.bytes[trailer.index.at as usize..][..trailer.index.len as usize];
        let index = Index::decode(bytes, trailer.counts(), &trailer.layout().unwrap());
        let index = index.unwrap();
        let cluster = index.clusters[0];
        assert_eq!((cluster.pages, cluster.blocks()), (3, 1));
        // Other bytes in the block, with the right checksum of the block.
        let mut block = forge.block(cluster.at).to_vec();
        let inside = cluster.len as usize - 1;
        block[inside] ^= 0x41;
        let crc = forge.superblock.key().of(Kind::Page, trailer.epoch);
        let crc = crc.crc(cluster.at, &block).to_le_bytes();
        forge.put(cluster.at, &block);
        let crc_at = trailer.index.at + trailer.entries * 32;
        forge.put(crc_at, &crc);
        forge.put(crc_at + trailer.apart(at), &crc);
        forge.reseal(at, trailer);
        let disk = SimDisk::new();
        disk.set_contents(FILE, forge.bytes);
        let report = verify_in(&disk.directory(), &mut |_, _| {}).unwrap();
        assert!(report.is_lossy(), "{report:?}");
        assert!(
            report
                .damages
                .iter()
                .all(|damage| damage.offset == cluster.at)
        );
        let store = open(&disk, Access::Read).unwrap();
        let reader = store
            .epoch(Some(outlive_epoch::EpochId(trailer.epoch)))
            .unwrap();
        let walked = reader.pages(&mut |_, _| Ok(()));
        let Err(VisitError::Store(StoreError::Damaged { place, .. })) = walked else {
            panic!("{walked:?}");
        };
        assert!(place.contains(&format!("offset {}", cluster.at)), "{place}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn forged_records_do_no_harm(epoch in number(), trailer_at in number(), copy_at in number(), own in any::<[bool; 3]>()) {
        let mut forge = Forge::new();
        let mut record = forge.record();
        if own[0] { record.epoch = epoch; }
        if own[1] { record.trailer.at = trailer_at; }
        if own[2] { record.trailer.copy_at = copy_at; }
        forge.put_record(record);
        forge.use_all();
    }

    #[test]
    fn forged_trailers_do_no_harm(which in 0usize..3, changes in prop::collection::vec((0usize..16, number()), 1..3)) {
        let mut forge = Forge::new();
        let (at, mut trailer) = forge.trailers()[which];
        let copy_at = trailer.copy_at;
        for (field, n) in changes {
            set(&mut trailer, field, n);
        }
        forge.put_trailer(at, copy_at, &trailer);
        forge.use_all();
    }

    #[test]
    fn forged_tables_do_no_harm(which in 0usize..3, index: bool, changes in prop::collection::vec((any::<prop::sample::Index>(), number()), 1..4)) {
        let mut forge = Forge::new();
        let (at, trailer) = forge.trailers()[which];
        let section = if index { trailer.index } else { trailer.groups };
        let words = section.len as usize / 4;
        for (word, n) in changes {
            let from = section.at + 4 * word.index(words) as u64;
            let bytes = n.to_le_bytes();
            let room = bytes.len().min((section.at + section.len - from) as usize);
            forge.put(from, &bytes[..room]);
            forge.put(from + trailer.apart(at), &bytes[..room]);
        }
        forge.reseal(at, trailer);
        forge.use_all();
    }

    #[test]
    fn forged_superblocks_do_no_harm(generation in number(), first_epoch in number()) {
        let mut forge = Forge::new();
        let superblock = Superblock { generation, first_epoch, ..forge.superblock };
        for at in crate::format::SUPERBLOCK_AT {
            forge.put(at, &superblock.encode(at));
        }
        forge.use_all();
        let mut forge = Forge::new();
        let superblock = Superblock { first_epoch, ..forge.superblock };
        for at in crate::format::SUPERBLOCK_AT {
            forge.put(at, &superblock.encode(at));
        }
        forge.use_all();
    }
}
