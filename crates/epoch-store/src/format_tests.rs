use super::*;
use crate::groups::*;
use crate::index::{Cluster, Index, Says};
use crate::pack::Codec;
use outlive_epoch::{Run, SpaceId};
use proptest::prelude::*;

fn key() -> Key {
    Superblock {
        uuid: [7; 16],
        generation: 3,
        first_epoch: 1,
        lock: None,
    }
    .key()
}

fn section(at: u64, len: u64) -> Section {
    Section {
        at,
        len,
        crc: 0x1234_5678,
    }
}

/// Where the trailer stands.
const AT: u64 = LOG_AT + 4 * BLOCK_LEN;

fn twice(at: u64) -> Twice {
    Twice {
        at,
        copy_at: at + WIDTH * BLOCK_LEN,
        crc: 0x8765_4321,
        tag: [0; 16],
    }
}

fn record(epoch: u64) -> Record {
    Record {
        epoch,
        trailer: twice(LOG_AT + epoch * BLOCK_LEN),
        durable_us: 12,
    }
}

fn stamp(newest: u64, coming: Option<u64>) -> Stamp {
    Stamp {
        newest: Some(record(newest)),
        coming: coming.map(record),
    }
}

/// Decodes a trailer by the reference that leads to these bytes.
fn decode(at: u64, epoch: u64, copy_at: u64, block: &[u8]) -> Option<Trailer> {
    let crc = Trailer::crc(block).unwrap();
    Trailer::decode(
        key(),
        epoch,
        Twice {
            at,
            copy_at,
            crc,
            tag: [0; 16],
        },
        block,
    )
}

fn trailer() -> Trailer {
    Trailer {
        epoch: 9,
        previous: twice(LOG_AT),
        copy_at: AT + 18 * BLOCK_LEN,
        start: LOG_AT + BLOCK_LEN,
        parity_at: LOG_AT + 18 * BLOCK_LEN,
        groups: section(LOG_AT + 3 * BLOCK_LEN, 100),
        index: section(LOG_AT + 3 * BLOCK_LEN + 100, 72),
        entries: 2,
        facts: EpochFacts {
            taken_at_ns: 5,
            stop_us: 6,
        },
        pages: 1,
        bytes_written: 8,
        previous_durable_us: 9,
        skipped: 3,
        saved: 0,
        clusters: 0,
        lock: EpochLock::default(),
    }
}

#[test]
fn records_come_back_and_are_bound_to_their_place() {
    let superblock = Superblock {
        uuid: [7; 16],
        generation: 3,
        first_epoch: 1,
        lock: None,
    };
    let block = superblock.encode(0);
    assert_eq!(
        Superblock::decode(0, &block),
        SuperblockRead::Good(superblock)
    );
    assert_eq!(Superblock::decode(8192, &block), SuperblockRead::Bad);

    let other = Superblock {
        generation: 4,
        ..superblock
    }
    .key();
    for stamp in [Stamp::default(), stamp(4, None), stamp(4, Some(5))] {
        let block = stamp.encode(key(), None, SLOT_AT[0][0]);
        let read = Stamp::decode(key(), None, SLOT_AT[0][0], &block);
        assert_eq!(read, [stamp; STAMP_COPIES]);
        assert_eq!(Stamp::decode(key(), None, SLOT_AT[0][1], &block), []);
        assert_eq!(Stamp::decode(other, None, SLOT_AT[0][0], &block), []);
    }

    let at = AT;
    let block = trailer().encode(key(), at);
    let copy_at = trailer().copy_at;
    assert_eq!(decode(at, 9, copy_at, &block), Some(trailer()));
    assert_eq!(decode(at, 8, copy_at, &block), None);
    assert_eq!(decode(at + BLOCK_LEN, 9, copy_at, &block), None);
    assert_eq!(decode(at, 9, copy_at + BLOCK_LEN, &block), None);
    // Another attempt at the same epoch, at the same place.
    let another = Trailer {
        pages: 0,
        parity_at: 0,
        ..trailer()
    };
    let crc = Trailer::crc(&another.encode(key(), at)).unwrap();
    let place = Twice {
        at,
        copy_at,
        crc,
        tag: [0; 16],
    };
    assert_eq!(Trailer::decode(key(), 9, place, &block), None);
}

#[test]
fn a_newer_version_is_named() {
    let superblock = Superblock {
        uuid: [7; 16],
        generation: 3,
        first_epoch: 1,
        lock: None,
    };
    let mut block = superblock.encode(0);
    block[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
    assert_eq!(Superblock::decode(0, &block), SuperblockRead::Bad);
    Superblock::seed().seal(0, &mut block);
    assert_eq!(
        Superblock::decode(0, &block),
        SuperblockRead::Newer(VERSION + 1)
    );
}

#[test]
fn a_sector_says_all_that_its_block_says() {
    let (old, new) = (stamp(2, None), stamp(4, Some(5)));
    let at = SEAL_AT[1];
    let mut block = old.encode(key(), None, at);
    block[1024..1536].copy_from_slice(&new.encode(key(), None, at)[1024..1536]);
    block[0] ^= 1;
    let read = Stamp::decode(key(), None, at, &block);
    assert_eq!(read, [old, new, old, old, old, old, old]);
    assert_eq!(
        (old.limit(), new.limit(), Stamp::default().limit()),
        (2, 5, 0)
    );
    // What may follow is newer than what is there.
    let backwards = stamp(4, Some(4)).encode(key(), None, at);
    assert_eq!(Stamp::decode(key(), None, at, &backwards), []);
}

#[test]
fn a_trailer_out_of_order_is_refused_even_with_its_checksum() {
    let at = AT;
    let bad: [fn(&mut Trailer); 21] = [
        |t| t.previous.at = 1,
        |t| t.previous = twice(LOG_AT + BLOCK_LEN),
        |t| t.previous.at = u64::MAX - 4095,
        |t| t.previous.copy_at = LOG_AT + BLOCK_LEN,
        |t| t.previous.copy_at = u64::MAX - 4095,
        |t| t.start = LOG_AT + 100,
        |t| t.copy_at = AT + 16 * BLOCK_LEN,
        |t| t.copy_at = u64::MAX - 4095,
        |t| t.parity_at = AT,
        |t| t.parity_at = LOG_AT + 35 * BLOCK_LEN,
        |t| t.parity_at = u64::MAX - 4095,
        |t| t.groups = section(LOG_AT, 100),
        |t| t.groups = section(LOG_AT + 3 * BLOCK_LEN, u64::MAX - 50),
        |t| t.groups = section(LOG_AT + 3 * BLOCK_LEN, 99),
        |t| t.index = section(LOG_AT + 3 * BLOCK_LEN, 172),
        |t| t.index.len += BLOCK_LEN,
        |t| t.index = section(LOG_AT + 3 * BLOCK_LEN + 100, u64::MAX - 50),
        |t| t.entries = u64::MAX,
        |t| t.entries = 3,
        |t| t.pages = 3,
        |t| t.pages = u64::MAX,
    ];
    for change in bad {
        let mut trailer = trailer();
        change(&mut trailer);
        let block = trailer.encode(key(), at);
        assert_eq!(decode(at, 9, trailer.copy_at, &block), None, "{trailer:?}");
    }
}

#[test]
fn trees_that_overlap_are_refused() {
    let table = |sections: [(u64, u64); 3]| {
        let mut bytes = Vec::new();
        for (name, (at, len)) in ["a", "b", "c"].into_iter().zip(sections) {
            let place = TreePlace {
                epoch: 1,
                section: section(LOG_AT + at, len),
                copy_at: LOG_AT + at + 500,
                lock: TreeLock::default(),
            };
            encode_group(&mut bytes, name, &place);
        }
        decode_groups(&bytes, 1, LOG_AT + 1000).is_some()
    };
    assert!(table([(20, 10), (0, 20), (30, 0)]));
    assert!(!table([(20, 10), (0, 21), (30, 0)]));
    // One large tree under many names would cost its length for each of them.
    assert!(!table([(0, 200), (0, 200), (0, 200)]));
    assert!(!table([(0, 200), (200, 10), (100, 1)]));
}

fn layout_of(start: u64, blocks: u64) -> Layout {
    let parity_at = Layout::place_parity(start, blocks, 1 << 30);
    Layout::new(start, blocks, parity_at).unwrap()
}

/// An index of parts: space, first page, pages, and what is said of them: stored as they are, zero, absent,
/// or packed, two of them together.
fn index_of(parts: &[(u32, u64, u64, u8)]) -> Index {
    let (mut index, mut half) = (Index::default(), None);
    for (space, first, count, kind) in parts.iter().copied() {
        let stored = index.crcs.len() as u64;
        let room = Layout::contiguous(stored);
        let run = |first, count| Run::new(SpaceId(space), first, count).unwrap();
        match kind {
            1 => index.push(run(first, count), Says::Zero),
            2 => index.push(run(first, count), Says::Absent),
            3 if half.is_none() && room > 1 => {
                let pages = 2 + count as u32 % 14;
                let blocks = 1 + u64::from(pages) / 8;
                index.clusters.push(Cluster {
                    at: layout_of(LOG_AT, stored + 1).page_at(stored),
                    first: stored,
                    pages,
                    len: (blocks * BLOCK_LEN) as u32 - 3,
                    codec: [Codec::Lz4, Codec::Zstd][pages as usize % 2],
                    crc: pages,
                });
                let cluster = index.clusters.len() as u32 - 1;
                index.push(run(first, 1), Says::Packed { cluster, skip: 0 });
                half = Some((cluster, run(first + 7, u64::from(pages) - 1)));
            }
            // Not inside of a cluster.
            _ if half.is_none() => {
                let run = run(first, count.min(room));
                let at = layout_of(LOG_AT, stored + 1).page_at(stored);
                index.push(run, Says::Data(at));
                index
                    .crcs
                    .extend((0..run.count()).map(|i| (stored + i) as u32));
            }
            _ => {}
        }
        if let (Some((cluster, rest)), true) = (half, kind != 3) {
            index.push(rest, Says::Packed { cluster, skip: 1 });
            let blocks = index.clusters[cluster as usize].blocks();
            index.crcs.extend((0..blocks).map(|i| i as u32));
            half = None;
        }
    }
    if let Some((cluster, rest)) = half {
        index.push(rest, Says::Packed { cluster, skip: 1 });
        let blocks = index.clusters[cluster as usize].blocks();
        index.crcs.extend((0..blocks).map(|i| i as u32));
    }
    let layout = layout_of(LOG_AT, index.crcs.len() as u64);
    index.parity = (0..layout.parity_blocks() as u32).collect();
    index
}

proptest! {
    #[test]
    fn an_index_comes_back(parts in prop::collection::vec((0u32..3, 0u64..1000, 1u64..50, 0u8..4), 0..40)) {
        let index = index_of(&parts);
        let blocks = index.crcs.len() as u64;
        let pages = blocks + index.saved();
        let layout = layout_of(LOG_AT, blocks);
        let mut bytes = Vec::new();
        index.encode(&mut bytes);
        prop_assert_eq!(bytes.len(), index.encoded_len());
        let counts = Counts { entries: index.entries.len() as u64, clusters: index.clusters.len() as u64, pages };
        prop_assert_eq!(Index::decode(&bytes, counts, &layout), Some(index.clone()));
        // Stretch follows stretch, and each page is in one of them.
        let stored = index.stored();
        let mut next = 0;
        for stretch in &stored {
            prop_assert_eq!(stretch.first, next);
            next += stretch.blocks;
        }
        prop_assert_eq!(next, blocks);
        let held: u64 = stored.iter().flat_map(|stretch| &stretch.runs).map(Run::count).sum();
        prop_assert_eq!(held, pages);
        prop_assert_eq!(Index::decode(&bytes, counts, &layout_of(LOG_AT, blocks + 1)), None);
        if blocks > 0 {
            prop_assert_eq!(Index::decode(&bytes, counts, &layout_of(LOG_AT + BLOCK_LEN, blocks)), None);
        }
        for (more, fewer) in [
            (Counts { pages: pages + 1, ..counts }, Counts { pages: pages.wrapping_sub(1), ..counts }),
            (Counts { clusters: counts.clusters + 1, ..counts }, Counts { clusters: counts.clusters.wrapping_sub(1), ..counts }),
            (Counts { entries: counts.entries + 1, ..counts }, Counts { entries: counts.entries.wrapping_sub(1), ..counts }),
        ] {
            prop_assert_eq!(Index::decode(&bytes, more, &layout), None);
            prop_assert_eq!(Index::decode(&bytes, fewer, &layout), None);
        }
        bytes.push(0);
        prop_assert_eq!(Index::decode(&bytes, counts, &layout), None);
    }

    /// A cluster that says it holds more or fewer pages, or takes more or fewer blocks, fits nowhere.
    #[test]
    fn a_cluster_of_another_size_is_none(pages in 2u32..=16, blocks in 1u64..16, len in any::<u32>(), said in any::<u16>(), codec in any::<u16>()) {
        let blocks = blocks.min(u64::from(pages) - 1);
        let mut index = Index { crcs: vec![0; blocks as usize], ..Index::default() };
        let good = Cluster { at: LOG_AT, first: 0, pages, len: blocks as u32 * 4096 - 7, codec: Codec::Lz4, crc: 1 };
        index.clusters.push(good);
        index.push(Run::new(SpaceId(1), 5, u64::from(pages)).unwrap(), Says::Packed { cluster: 0, skip: 0 });
        let layout = layout_of(LOG_AT, blocks);
        index.parity = vec![0; layout.parity_blocks() as usize];
        let counts = Counts { entries: 1, clusters: 1, pages: u64::from(pages) };
        let mut bytes = Vec::new();
        index.encode(&mut bytes);
        prop_assert_eq!(Index::decode(&bytes, counts, &layout), Some(index));
        let from = bytes.len() - 12;
        bytes[from..][..4].copy_from_slice(&len.to_le_bytes());
        let same = u64::from(len).div_ceil(BLOCK_LEN) == blocks;
        prop_assert_eq!(Index::decode(&bytes, counts, &layout).is_some(), same);
        bytes[from..][..4].copy_from_slice(&good.len.to_le_bytes());
        bytes[from + 4..][..2].copy_from_slice(&said.to_le_bytes());
        prop_assert_eq!(Index::decode(&bytes, counts, &layout).is_some(), u32::from(said) == pages);
        bytes[from + 4..][..2].copy_from_slice(&(pages as u16).to_le_bytes());
        bytes[from + 6..][..2].copy_from_slice(&codec.to_le_bytes());
        prop_assert_eq!(Index::decode(&bytes, counts, &layout).is_some(), codec == 1 || codec == 2);
    }

    #[test]
    fn groups_come_back_sorted(names in prop::collection::btree_set("[a-z/é]{0,12}", 0..12)) {
        let mut bytes = Vec::new();
        let mut groups = Vec::new();
        for (i, name) in names.into_iter().enumerate() {
            let place = TreePlace { epoch: 1, section: section(LOG_AT + 10 * i as u64, 10), copy_at: LOG_AT + 500, lock: TreeLock::default() };
            let before = bytes.len();
            encode_group(&mut bytes, &name, &place);
            prop_assert_eq!(bytes.len() - before, group_len(&name));
            groups.push((name, place));
        }
        prop_assert_eq!(decode_groups(&bytes, 1, LOG_AT + 600), Some(groups.clone()));
        if !groups.is_empty() {
            prop_assert_eq!(decode_groups(&bytes, 0, LOG_AT + 600), None);
            prop_assert_eq!(decode_groups(&bytes, 1, LOG_AT + 509), None);
            let twice = [bytes.clone(), bytes].concat();
            prop_assert_eq!(decode_groups(&twice, 1, LOG_AT + 600), None);
        }
    }

    #[test]
    fn decoding_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..512), n in any::<u64>()) {
        let _ = decode_groups(&bytes, n, n);
        for layout in [Layout::new(LOG_AT, n % 20, 1 << 30), Layout::new(n, n, n)].into_iter().flatten() {
            for (entries, clusters) in [(n % 20, 0), (n, n), (n % 4, n % 3)] {
                let _ = Index::decode(&bytes, Counts { entries, clusters, pages: n }, &layout);
            }
        }
        let _ = Stamp::decode(key(), None, 0, &bytes);
        let _ = Trailer::decode(key(), n, twice(n % (1 << 60)), &bytes);
        let _ = Superblock::decode(n, &bytes);
    }
}

/// What slots and seals of an encrypted file say counts only with its tag, which is the same at each of its places.
#[test]
fn a_stamp_without_its_tag_says_nothing() {
    let secret = crate::cipher::Secret::parse(&(0..32).collect::<Vec<u8>>()).unwrap();
    let cipher = FileCipher::new(&secret, &[7; 16], 3, &[1; 32]);
    let other = FileCipher::new(&secret, &[7; 16], 4, &[1; 32]);
    let mut stamp = stamp(4, Some(5));
    for record in [&mut stamp.newest, &mut stamp.coming].into_iter().flatten() {
        record.trailer.tag = [record.epoch as u8; 16];
    }
    let at = SEAL_AT[0];
    let block = stamp.encode(key(), Some(&cipher), at);
    let read = |cipher, block: &[u8]| Stamp::decode(key(), cipher, at, block);
    assert_eq!(read(Some(&cipher), &block), [stamp; STAMP_COPIES]);
    assert_eq!(read(None, &block), [stamp; STAMP_COPIES]);
    assert_eq!(read(Some(&other), &block), []);
    // With a right checksum, by somebody who does not have the key.
    let forged = stamp.encode(key(), None, at);
    assert_eq!(read(None, &forged), [stamp; STAMP_COPIES]);
    assert_eq!(read(Some(&cipher), &forged), []);
}

/// Whoever copies the record of the epoch before into the slot of the newest one does not make it forgotten.
#[test]
fn a_stamp_says_nothing_in_the_place_of_another() {
    let secret = crate::cipher::Secret::parse(&(0..32).collect::<Vec<u8>>()).unwrap();
    let cipher = FileCipher::new(&secret, &[7; 16], 3, &[1; 32]);
    let places = [SLOT_AT[0], SLOT_AT[1], SEAL_AT];
    for (i, from) in places.into_iter().enumerate() {
        for (j, to) in places.into_iter().enumerate() {
            for (from, to) in [(from[0], to[0]), (from[0], to[1])] {
                let mut block = stamp(4, None).encode(key(), Some(&cipher), from);
                for (n, sector) in block.chunks_mut(SECTOR).enumerate() {
                    let at = to + (n * SECTOR) as u64;
                    key().of(Kind::Stamp, 0).seal(at, sector);
                }
                let said = Stamp::decode(key(), Some(&cipher), to, &block);
                assert_eq!(
                    said.len(),
                    if i == j { STAMP_COPIES } else { 0 },
                    "{from} to {to}"
                );
            }
        }
    }
}

/// The places that other code relies on.
#[test]
fn tags_stand_behind_what_they_cover() {
    let mut trailer = trailer();
    trailer.previous.tag = [1; 16];
    trailer.lock = EpochLock {
        attempt: [2; 16],
        index: [3; 16],
        own: [4; 16],
    };
    let block = trailer.encode(key(), AT);
    assert_eq!(block[TRAILER_TAG_AT - 16..][..16], [1; 16]);
    assert_eq!(block[TRAILER_TAG_AT..][..16], [4; 16]);
    assert_eq!(block[TRAILER_TAG_AT + 16..BLOCK - 4], [0; 3844]);
    let crc = Trailer::crc(&block).unwrap();
    let place = |tag| Twice {
        at: AT,
        copy_at: trailer.copy_at,
        crc,
        tag,
    };
    assert_eq!(
        Trailer::decode(key(), 9, place([4; 16]), &block),
        Some(trailer)
    );
    assert_eq!(Trailer::decode(key(), 9, place([5; 16]), &block), None);

    let mut superblock = Superblock {
        uuid: [7; 16],
        generation: 3,
        first_epoch: 1,
        lock: Some(FileLock {
            fingerprint: Fingerprint([8; 8]),
            salt: [9; 32],
            tag: [5; 16],
        }),
    };
    let block = superblock.encode(0);
    assert_eq!(
        Superblock::decode(0, &block),
        SuperblockRead::Good(superblock)
    );
    assert_eq!(block[SUPERBLOCK_TAG_AT..][..16], [5; 16]);
    assert_eq!(block[SUPERBLOCK_TAG_AT - 32..][..32], [9; 32]);
    superblock.lock = None;
    assert_eq!(superblock.encode(0)[48..BLOCK - 4], [0; BLOCK - 52]);
}
