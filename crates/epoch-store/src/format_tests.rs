use super::*;
use proptest::prelude::*;

fn key() -> Key {
    Superblock {
        uuid: [7; 16],
        generation: 3,
        first_epoch: 1,
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
    Trailer::decode(key(), epoch, Twice { at, copy_at, crc }, block)
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
    }
}

#[test]
fn records_come_back_and_are_bound_to_their_place() {
    let superblock = Superblock {
        uuid: [7; 16],
        generation: 3,
        first_epoch: 1,
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
        let block = stamp.encode(key(), SLOT_AT[0][0]);
        let read = Stamp::decode(key(), SLOT_AT[0][0], &block);
        assert_eq!(read, [stamp; STAMP_COPIES]);
        assert_eq!(Stamp::decode(key(), SLOT_AT[0][1], &block), []);
        assert_eq!(Stamp::decode(other, SLOT_AT[0][0], &block), []);
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
    let place = Twice { at, copy_at, crc };
    assert_eq!(Trailer::decode(key(), 9, place, &block), None);
}

#[test]
fn a_newer_version_is_named() {
    let superblock = Superblock {
        uuid: [7; 16],
        generation: 3,
        first_epoch: 1,
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
    let mut block = old.encode(key(), at);
    block[1024..1536].copy_from_slice(&new.encode(key(), at)[1024..1536]);
    block[0] ^= 1;
    let read = Stamp::decode(key(), at, &block);
    assert_eq!(read, [old, new, old, old, old, old, old]);
    assert_eq!(
        (old.limit(), new.limit(), Stamp::default().limit()),
        (2, 5, 0)
    );
    // What may follow is newer than what is there.
    let backwards = stamp(4, Some(4)).encode(key(), at);
    assert_eq!(Stamp::decode(key(), at, &backwards), []);
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

proptest! {
    #[test]
    fn an_index_comes_back(parts in prop::collection::vec((0u32..3, 0u64..1000, 1u64..50, 0u8..3), 0..40)) {
        let mut index = Index::default();
        let pages = parts.iter().filter(|part| part.3 == 0).map(|part| part.2).sum();
        let layout = Layout::new(LOG_AT, pages, Layout::place_parity(LOG_AT, pages, 1 << 30)).unwrap();
        for (space, first, count, kind) in parts {
            let stored = index.crcs.len() as u64;
            let count = if kind == 0 { count.min(Layout::contiguous(stored)) } else { count };
            let run = Run::new(SpaceId(space), first, count).unwrap();
            let says = [Says::Data(layout.page_at(stored)), Says::Zero, Says::Absent][usize::from(kind)];
            if kind == 0 {
                index.crcs.extend((0..count).map(|i| (stored + i) as u32));
            }
            index.push(run, says);
        }
        let pages = index.crcs.len() as u64;
        let layout = Layout::new(LOG_AT, pages, Layout::place_parity(LOG_AT, pages, 1 << 30)).unwrap();
        index.parity = (0..layout.parity_blocks() as u32).collect();
        let mut bytes = Vec::new();
        index.encode(&mut bytes);
        prop_assert_eq!(bytes.len(), index.encoded_len());
        let entries = index.entries.len() as u64;
        prop_assert_eq!(Index::decode(&bytes, entries, &layout), Some(index.clone()));
        let stored = index.stored();
        let ends: Vec<u64> = stored.iter().map(|(before, run)| before + run.count()).collect();
        let begins: Vec<u64> = stored.iter().map(|(before, _)| *before).collect();
        prop_assert_eq!(begins.get(1..).unwrap_or_default(), &ends[..ends.len().saturating_sub(1)]);
        prop_assert_eq!(ends.last().copied().unwrap_or(0), pages);
        let longer = Layout::new(LOG_AT, pages + 1, 1 << 30).or_else(|| Layout::new(LOG_AT, pages + 1, Layout::place_parity(LOG_AT, pages + 1, 1 << 30))).unwrap();
        prop_assert_eq!(Index::decode(&bytes, entries, &longer), None);
        if pages > 0 {
            let elsewhere = Layout::new(LOG_AT + BLOCK_LEN, pages, Layout::place_parity(LOG_AT + BLOCK_LEN, pages, 1 << 30)).unwrap();
            prop_assert_eq!(Index::decode(&bytes, entries, &elsewhere), None);
        }
        bytes.push(0);
        prop_assert_eq!(Index::decode(&bytes, entries, &layout), None);
    }

    #[test]
    fn groups_come_back_sorted(names in prop::collection::btree_set("[a-z/é]{0,12}", 0..12)) {
        let mut bytes = Vec::new();
        let mut groups = Vec::new();
        for (i, name) in names.into_iter().enumerate() {
            let place = TreePlace { epoch: 1, section: section(LOG_AT + 10 * i as u64, 10), copy_at: LOG_AT + 500 };
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
            let _ = Index::decode(&bytes, n % 20, &layout);
            let _ = Index::decode(&bytes, n, &layout);
        }
        let _ = Stamp::decode(key(), 0, &bytes);
        let _ = Trailer::decode(key(), n, twice(n % (1 << 60)), &bytes);
        let _ = Superblock::decode(n, &bytes);
    }
}
