//! The tables of an encrypted epoch: what of them is encrypted, and what is not.
//!
//! # Rules
//! - What a check and a repair need is not encrypted: the checksums of blocks, where trees stand, and how long they
//!   are. All of it is covered by a tag, so that readers trust nothing that was put there by others.
//! - What is encrypted, once it is decrypted, is read by the same code as that of an epoch which is not encrypted,
//!   and trusted as little.
//! - Without the key an index has no entries and no clusters, and groups have numbers in the place of names.

use crate::cipher::{Cipher, Tag};
use crate::format::{ENTRY_LEN, Kind, Section, Take, put_numbers};
use crate::groups::{TreeLock, TreePlace, decode_groups, encode_group, group_len};
use crate::index::{CLUSTER_LEN, Counts, Index};
use crate::stripe::Layout;

/// Bytes of a group besides its name.
const GROUP_LEN: usize = 4 * 8 + 4 + 16 + 16;
/// Bytes of a tag.
pub const TAG_LEN: usize = 16;

/// Why a table cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Its numbers do not fit each other, or their place.
    Order,
    /// It does not have its tag.
    Tag,
}

/// Bytes of the group table with these names.
pub fn groups_len<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    let group = |name: &str| GROUP_LEN + 2 + name.len();
    4 + names.map(group).sum::<usize>() + TAG_LEN
}

/// A group table that will stand at `at`: the places, then the names, which are encrypted, and the tag over both.
/// `None` where it is too long.
pub fn encode_groups<'a>(
    groups: impl Iterator<Item = (&'a str, TreePlace)> + Clone,
    cipher: &Cipher,
    at: u64,
) -> Option<Vec<u8>> {
    let count = u32::try_from(groups.clone().count()).ok()?;
    let mut out = count.to_le_bytes().to_vec();
    let mut names = Vec::new();
    for (name, place) in groups {
        let section = place.section;
        let numbers = [place.epoch, section.at, place.copy_at, section.len];
        put_numbers(&mut out, &numbers);
        out.extend_from_slice(&section.crc.to_le_bytes());
        out.extend_from_slice(&place.lock.attempt);
        out.extend_from_slice(&place.lock.tag);
        names.extend_from_slice(&(name.len() as u16).to_le_bytes());
        names.extend_from_slice(name.as_bytes());
    }
    let tag = cipher.encrypt(Kind::Groups, at, &out, &mut names)?;
    out.extend_from_slice(&names);
    out.extend_from_slice(&tag);
    Some(out)
}

fn take_place(take: &mut Take<'_>) -> Option<TreePlace> {
    let epoch = take.u64()?;
    let (at, copy_at) = (take.u64()?, take.u64()?);
    let section = Section {
        at,
        len: take.u64()?,
        crc: take.u32()?,
    };
    let lock = TreeLock {
        attempt: take.array()?,
        tag: take.array()?,
    };
    Some(TreePlace {
        epoch,
        section,
        copy_at,
        lock,
    })
}

/// Reads a group table that stands at `at`. Without the key the groups have numbers in the place of names.
pub fn read_groups(
    bytes: &[u8],
    at: u64,
    (epoch, end): (u64, u64),
    cipher: Option<&Cipher>,
) -> Result<Vec<(String, TreePlace)>, Unfit> {
    let split = || {
        let count = Take(bytes).u32()? as usize;
        let (places, rest) = bytes.split_at_checked(4 + count.checked_mul(GROUP_LEN)?)?;
        let (names, tag) = rest.split_last_chunk::<TAG_LEN>()?;
        Some((places, names, tag))
    };
    let (places, names, tag) = split().ok_or(Unfit::Order)?;
    let mut names = names.to_vec();
    if let Some(cipher) = cipher
        && !cipher.decrypt(Kind::Groups, at, places, tag, &mut names)
    {
        return Err(Unfit::Tag);
    }
    let (mut plain, mut locks) = (Vec::new(), Vec::new());
    let mut listed = || {
        let (mut places, mut names) = (Take(places.get(4..)?), Take(&names));
        while !places.0.is_empty() {
            let place = take_place(&mut places)?;
            let name = match cipher {
                None => format!("#{:010}", locks.len()),
                Some(_) => {
                    let len = usize::from(names.u16()?);
                    String::from_utf8(names.bytes(len)?.to_vec()).ok()?
                }
            };
            encode_group(&mut plain, &name, &place);
            locks.push(place.lock);
        }
        (cipher.is_none() || names.0.is_empty()).then_some(())
    };
    listed().ok_or(Unfit::Order)?;
    let mut groups = decode_groups(&plain, epoch, end).ok_or(Unfit::Order)?;
    for ((_, place), lock) in groups.iter_mut().zip(locks) {
        place.lock = lock;
    }
    Ok(groups)
}

/// Bytes of an index.
pub fn index_len(index: &Index, blocks: usize) -> usize {
    index.encoded_len() + blocks * TAG_LEN
}

/// An index that will stand at `at`: entries and clusters, which are encrypted, then the checksums and the tags of
/// the blocks; and the tag over all of it. `None` where it is too long.
pub fn encode_index(index: &Index, cipher: &Cipher, at: u64) -> Option<(Vec<u8>, Tag)> {
    let mut out = Vec::with_capacity(index_len(index, index.tags.len()));
    index.encode_entries(&mut out);
    index.encode_clusters(&mut out);
    let private = out.len();
    index.encode_crcs(&mut out);
    out.extend_from_slice(index.tags.as_flattened());
    let (inside, beside) = out.split_at_mut(private);
    let tag = cipher.encrypt(Kind::Index, at, beside, inside)?;
    Some((out, tag))
}

/// Reads an index that stands at `at`, whose blocks have this layout. Without the key it has no entries.
pub fn read_index(
    mut bytes: Vec<u8>,
    at: u64,
    counts: Counts,
    layout: &Layout,
    opener: Option<(&Cipher, &Tag)>,
) -> Result<Index, Unfit> {
    let lens = || {
        let entries = usize::try_from(counts.entries)
            .ok()?
            .checked_mul(ENTRY_LEN)?;
        let clusters = usize::try_from(counts.clusters).ok()?;
        let private = entries.checked_add(clusters.checked_mul(CLUSTER_LEN)?)?;
        let blocks = usize::try_from(layout.pages()).ok()?;
        let parity = usize::try_from(layout.parity_blocks()).ok()?;
        let crcs = blocks.checked_add(parity)?.checked_mul(4)?;
        let tags = blocks.checked_mul(TAG_LEN)?;
        let all = private.checked_add(crcs)?.checked_add(tags)?;
        (all == bytes.len()).then_some((entries, private, blocks, crcs))
    };
    let (entries, private, blocks, crcs) = lens().ok_or(Unfit::Order)?;
    let (inside, beside) = bytes.split_at_mut(private);
    if let Some((cipher, tag)) = opener
        && !cipher.decrypt(Kind::Index, at, beside, tag, inside)
    {
        return Err(Unfit::Tag);
    }
    let (crcs, tags) = beside.split_at(crcs);
    let mut index = match opener {
        None => {
            let (all, _) = crcs.as_chunks::<4>();
            let all: Vec<u32> = all.iter().map(|crc| u32::from_le_bytes(*crc)).collect();
            let (crcs, parity) = all.split_at_checked(blocks).ok_or(Unfit::Order)?;
            Index {
                crcs: crcs.to_vec(),
                parity: parity.to_vec(),
                ..Index::default()
            }
        }
        Some(_) => {
            // As it is laid out where nothing is encrypted.
            let (entries, clusters) = inside.split_at(entries);
            let plain = [entries, crcs, clusters].concat();
            Index::decode(&plain, counts, layout).ok_or(Unfit::Order)?
        }
    };
    index.tags = tags.as_chunks::<TAG_LEN>().0.to_vec();
    Ok(index)
}

/// Bytes of the group table of an epoch with these names, encrypted or not.
pub fn any_groups_len<'a>(names: impl Iterator<Item = &'a str>, encrypted: bool) -> usize {
    match encrypted {
        true => groups_len(names),
        false => names.map(group_len).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cipher::{FileCipher, Secret};
    use crate::format::{BLOCK_LEN, LOG_AT};
    use crate::index::Says;
    use outlive_epoch::{Run, SpaceId};
    use proptest::prelude::*;

    fn cipher() -> Cipher {
        let bytes: Vec<u8> = (0..32).collect();
        let secret = Secret::parse(&bytes).unwrap();
        FileCipher::new(&secret, &[1; 16], 1, &[2; 32]).of(1, [3; 16])
    }

    fn place(n: u64) -> TreePlace {
        TreePlace {
            epoch: 1,
            section: Section {
                at: LOG_AT + 10 * n,
                len: 10,
                crc: 7,
            },
            copy_at: LOG_AT + 500,
            lock: TreeLock {
                attempt: [n as u8; 16],
                tag: [9; 16],
            },
        }
    }

    const AT: u64 = LOG_AT + BLOCK_LEN;
    const BOUNDS: (u64, u64) = (1, LOG_AT + 600);

    proptest! {
        #[test]
        fn groups_come_back_and_every_flipped_bit_is_found(
            names in prop::collection::btree_set("[a-z]{0,9}", 0..5), at: prop::sample::Index, bit in 0u8..8
        ) {
            let groups: Vec<_> = names.iter().zip(0..).map(|(name, n)| (name.clone(), place(n))).collect();
            let listed = groups.iter().map(|(name, place)| (name.as_str(), *place));
            let mut bytes = encode_groups(listed, &cipher(), AT).unwrap();
            prop_assert_eq!(bytes.len(), groups_len(names.iter().map(String::as_str)));
            prop_assert_eq!(read_groups(&bytes, AT, BOUNDS, Some(&cipher())), Ok(groups.clone()));
            let numbered = read_groups(&bytes, AT, BOUNDS, None).unwrap();
            let places = |groups: &[(String, TreePlace)]| groups.iter().map(|g| g.1).collect::<Vec<_>>();
            prop_assert_eq!(places(&numbered), places(&groups));
            let moved = read_groups(&bytes, AT + BLOCK_LEN, BOUNDS, Some(&cipher()));
            prop_assert_eq!(moved, Err(Unfit::Tag));
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(read_groups(&bytes, AT, BOUNDS, Some(&cipher())).is_err());
        }

        #[test]
        fn no_bytes_are_read_as_more_than_they_are(bytes: Vec<u8>, n in 0u64..100, keyed: bool) {
            let cipher = cipher();
            let _ = read_groups(&bytes, n, (n, n), keyed.then_some(&cipher));
            let counts = Counts { entries: n, clusters: n / 2, pages: n };
            if let Some(layout) = Layout::new(LOG_AT, n / 3, LOG_AT + 17 * BLOCK_LEN) {
                let _ = read_index(bytes, AT, counts, &layout, keyed.then_some((&cipher, &[0; 16])));
            }
        }
    }

    #[test]
    fn an_index_comes_back_and_without_the_key_its_checksums() {
        let cipher = cipher();
        let mut index = Index::default();
        let run = |first, count| Run::new(SpaceId(1), first, count).unwrap();
        index.push(run(5, 2), Says::Data(LOG_AT));
        index.push(run(9, 4), Says::Zero);
        (index.crcs, index.parity) = (vec![1, 2], vec![3, 4]);
        index.tags = vec![[5; 16], [6; 16]];
        let layout = Layout::new(LOG_AT, 2, LOG_AT + 17 * BLOCK_LEN).unwrap();
        let counts = Counts {
            entries: 2,
            clusters: 0,
            pages: 2,
        };
        let (bytes, tag) = encode_index(&index, &cipher, AT).unwrap();
        assert_eq!(bytes.len(), index_len(&index, 2));
        let read = |bytes: &[u8], opener| read_index(bytes.to_vec(), AT, counts, &layout, opener);
        assert_eq!(read(&bytes, Some((&cipher, &tag))), Ok(index.clone()));
        let opaque = read(&bytes, None).unwrap();
        assert_eq!((&opaque.crcs, &opaque.parity), (&index.crcs, &index.parity));
        assert_eq!((&opaque.tags, opaque.entries.len()), (&index.tags, 0));
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 0x10;
            let found = read(&other, Some((&cipher, &tag)));
            assert_eq!(found, Err(Unfit::Tag), "byte {at}");
        }
    }
}
