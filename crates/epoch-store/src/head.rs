//! The header of a generation file: which epoch is the newest, and what is harmed of the header.
//!
//! Each of the two slots and the seal stands twice, so far apart that no damage of a repairable length
//! harms both places. The slots of two epochs in a row are different ones. The seal is written with
//! the data of an epoch, before its slot: it names the epoch that is acknowledged, and the one whose
//! commit may follow.
//!
//! # Which epoch is the newest
//! The newest one that a good sector of a slot names, or of a seal as acknowledged; or the one whose
//! commit may follow, if nothing at all can be read of its slot: its slot was being written then, or
//! was, so its data had been flushed.
//!
//! That no newer one was committed must be shown: by a good sector of the slot which that one would
//! have (it says something older, and would have been written over in both places), or by a good
//! sector of the seal that does not go beyond the newest. A power cut leaves one of these: it
//! harms the seal or a slot, never both. Where neither is left, the newest epoch is *in doubt*, and
//! nothing but a repair, which says so, opens the file.
//!
//! # Rules for writing
//! - The seal is written over only where a slot names the newest epoch.
//! - The slot of the newest epoch is written over only where a durable seal names that epoch: as
//!   acknowledged, or if nothing can be read of the slot, as the one that may follow.
//! - The other slot is written over, but by the commit of what may follow, only where a durable seal
//!   names nothing that may follow.

use crate::cipher::FileCipher;
use crate::damage::{Damage, Outcome, Part, Trouble};
use crate::format::{
    BLOCK_LEN, Key, LOG_AT, Record, SEAL_AT, SLOT_AT, STAMP_COPIES, SUPERBLOCK_AT, Stamp,
    Superblock, SuperblockRead, VERSION,
};
use crate::generation::{Generation, damaged};
use crate::planted::bug;
use crate::store::Live;
use outlive_epoch::StoreError;
use outlive_media::{Medium, MediumError};
use std::sync::Arc;

/// What the header of a file says.
#[derive(Debug)]
pub(crate) struct Head {
    /// The newest commit record.
    pub record: Record,
    /// Whether the seal must name the newest record as acknowledged before its slot is written. Not so
    /// where it does; nor where the slot tells nothing, and the seal names it as the one that may follow.
    pub seal_first: bool,
    /// Whether the seal names an epoch after the newest that may follow.
    pub offers: bool,
    /// Whether both places of the seal name the newest record as acknowledged, and nothing that follows.
    pub sealed: bool,
    /// Damage that does no harm, because of the copies.
    pub harmless: Vec<Damage>,
    /// Why a newer epoch than that of the record may be lost.
    pub doubt: Option<Damage>,
}

/// The epoch that uses the other slot.
fn other_slot(epoch: u64) -> u64 {
    epoch ^ 1
}

/// The two places of the slot of an epoch.
pub(crate) fn slot_at(epoch: u64) -> [u64; 2] {
    SLOT_AT[(epoch % 2) as usize * usize::from(!bug("one slot for all epochs"))]
}

/// All stamps that can be read, by place.
struct Stamps {
    slots: [[Vec<Stamp>; 2]; 2],
    seals: [Vec<Stamp>; 2],
}

impl Stamps {
    fn read(key: Key, cipher: Option<&FileCipher>, header: &[u8]) -> Self {
        let read = |at: u64| Stamp::decode(key, cipher, at, block(header, at));
        Self {
            slots: SLOT_AT.map(|places| places.map(read)),
            seals: SEAL_AT.map(read),
        }
    }

    fn slot(&self, epoch: u64) -> &[Vec<Stamp>; 2] {
        &self.slots[(epoch % 2) as usize]
    }

    fn sealed(&self) -> impl Iterator<Item = &Stamp> {
        self.seals.iter().flatten()
    }

    /// Every record that says that its epoch was committed, with the place.
    fn records(&self) -> impl Iterator<Item = (u64, Record)> + '_ {
        let places = SLOT_AT.iter().flatten().chain(&SEAL_AT);
        let stamps = self.slots.iter().flatten().chain(&self.seals);
        let named = |(at, stamps): (&u64, &'_ Vec<Stamp>)| {
            let at = *at;
            let records = stamps.iter().filter_map(|stamp| stamp.newest);
            records.map(|record| (at, record)).collect::<Vec<_>>()
        };
        places.zip(stamps).flat_map(named)
    }

    /// Whether anything can be read of the slot of an epoch, or of the one that uses it too.
    fn tells_of(&self, epoch: u64) -> bool {
        self.slot(epoch).iter().any(|stamps| !stamps.is_empty())
    }

    /// The commit that may follow, by the newest seal; nothing where its copies name different ones.
    fn coming(&self) -> Option<Record> {
        let epoch = |stamp: &Stamp| stamp.newest.map_or(0, |record| record.epoch);
        let newest = self.sealed().map(epoch).max()?;
        let newest = self.sealed().filter(|stamp| epoch(stamp) == newest);
        let mut coming = newest.filter_map(|stamp| stamp.coming);
        let first = coming.next()?;
        coming.all(|other| other == first).then_some(first)
    }

    fn newest(&self) -> Option<Record> {
        let cut_short = self.coming().filter(|coming| !self.tells_of(coming.epoch));
        let named = self.records().map(|(_, record)| record);
        named.chain(cut_short).max_by_key(|record| {
            if bug("older record counts") {
                (!record.epoch, 0)
            } else {
                (record.epoch, record.durable_us)
            }
        })
    }

    /// Whether a newer epoch than this one may have been committed.
    fn may_hide(&self, epoch: u64) -> bool {
        let open = |stamp: &Stamp| {
            stamp
                .coming
                .is_some_and(|next| next.epoch > epoch && !self.tells_of(next.epoch))
        };
        let unsealed = self.sealed().next().is_none() && !self.tells_of(other_slot(epoch));
        (unsealed || self.sealed().any(open)) && !bug("doubt not seen")
    }
}

/// How many sectors of a place say what the newest of them says.
fn copies(stamps: &[Stamp]) -> usize {
    let order = |stamp: &&Stamp| {
        let epoch = |record: Option<Record>| record.map_or(0, |record| record.epoch);
        (epoch(stamp.newest), epoch(stamp.coming))
    };
    let newest = stamps.iter().max_by_key(order);
    let same = |stamp: &&Stamp| Some(*stamp) == newest;
    stamps.iter().filter(same).count()
}

impl Generation {
    /// Finds the newest commit record, and what is harmed.
    pub fn head(&self, header: &[u8], len: u64, harmless: Vec<Damage>) -> Result<Head, Trouble> {
        let stamps = Stamps::read(self.key, self.cipher.as_deref(), header);
        let harmed = |at: u64, epoch, what: &str| self.damaged(at, epoch, Part::CommitRecord, what);
        let Some(record) = stamps.newest() else {
            let what = "no copy of a commit record is intact";
            return Err(harmed(SLOT_AT[0][0], None, what).into());
        };
        let other = |(_, other): &(u64, Record)| {
            other.epoch == record.epoch && other.trailer != record.trailer
        };
        let early = record.epoch < self.superblock.first_epoch;
        let wrong = stamps.records().find(other).map(|(at, _)| at);
        if let Some(at) = wrong.or(early.then_some(SLOT_AT[0][0])) {
            let what = "the commit records contradict each other";
            return Err(harmed(at, None, what).into());
        }
        let is_it = |other: Option<Record>| {
            other.is_some_and(|o| (o.epoch, o.trailer) == (record.epoch, record.trailer))
        };
        let acknowledged = |stamp: &Stamp| is_it(stamp.newest) && stamp.coming.is_none();
        let whole =
            |place: &Vec<Stamp>| place.len() == STAMP_COPIES && place.iter().all(acknowledged);
        let mut head = Head {
            record,
            seal_first: !stamps.sealed().any(|stamp| is_it(stamp.newest))
                && stamps.tells_of(record.epoch),
            offers: stamps.sealed().any(|stamp| stamp.limit() > record.epoch),
            sealed: stamps.seals.iter().all(whole),
            harmless,
            doubt: None,
        };
        let places = SLOT_AT.iter().flatten().chain(&SEAL_AT);
        for (at, stamps) in places.zip(stamps.slots.iter().flatten().chain(&stamps.seals)) {
            let copies = copies(stamps);
            if copies < STAMP_COPIES {
                let epoch = stamps
                    .iter()
                    .filter_map(|s| s.newest)
                    .map(|r| r.epoch)
                    .max();
                let what = format!("only {copies} of {STAMP_COPIES} copies are intact");
                head.harmless
                    .push(harmed(*at, epoch, &what).with(Outcome::Repairable));
            }
        }
        if stamps.may_hide(record.epoch) {
            let what = format!(
                "nothing tells any more whether epoch {} is the newest: a newer one may be lost; \
                 'outlive repair' settles on it",
                record.epoch
            );
            head.doubt = Some(harmed(slot_at(other_slot(record.epoch))[0], None, &what));
        }
        if len < record.log_end() {
            let end = record.log_end();
            let what = format!("the file ends at {len}, its committed epochs at {end}");
            let damage = self.damaged(len, Some(record.epoch), Part::End, &what);
            head.harmless.push(damage.with(Outcome::Repairable));
        }
        Ok(head)
    }
}

impl Generation {
    /// The newest epoch before this one of which the header says where it ends.
    pub fn record_before(&self, epoch: u64) -> Option<Record> {
        let header = header(&*self.medium).ok()?;
        let stamps = Stamps::read(self.key, self.cipher.as_deref(), &header);
        let records = stamps.records().map(|(_, record)| record);
        let before = records.filter(|record| record.epoch < epoch);
        before.max_by_key(|record| record.epoch)
    }
}

impl Live {
    /// Writes both copies of a stamp; they are durable after a flush.
    fn write_stamp(&self, places: [u64; 2], stamp: &Stamp) -> Result<(), MediumError> {
        let Generation {
            medium,
            key,
            cipher,
            ..
        } = &self.generation;
        let mut write = |at| medium.write(at, &stamp.encode(*key, cipher.as_deref(), at));
        places.into_iter().try_for_each(&mut write)
    }

    /// Writes the seal: this epoch is acknowledged, and that one may be committed next.
    pub fn write_seal(&self, coming: Option<Record>) -> Result<(), MediumError> {
        let newest = Some(self.record);
        self.write_stamp(SEAL_AT, &Stamp { newest, coming })
    }

    /// Writes the seal of a file in which nothing is acknowledged yet: this epoch may be committed first.
    pub fn announce(&self) -> Result<(), MediumError> {
        let (newest, coming) = (None, Some(self.record));
        self.write_stamp(SEAL_AT, &Stamp { newest, coming })
    }

    /// What the slot of the newest epoch says.
    fn slot(&self) -> Stamp {
        let newest = Some(Record {
            durable_us: 0,
            ..self.record
        });
        let coming = None;
        Stamp { newest, coming }
    }

    /// Writes the slot.
    pub fn write_slot(&self) -> Result<(), MediumError> {
        if self.copied {
            // The file is not in use yet, and how long the epoch took is known.
            self.write_seal(None)?;
        }
        self.write_stamp(slot_at(self.record.epoch), &self.slot())
    }

    /// What the other slot says: the epoch before, if it is of that slot, or none. Any stamp shows that
    /// no newer epoch was committed there.
    fn before(&self) -> Stamp {
        let newest = self.chain.last().and_then(|(_, trailer)| {
            let epoch = trailer.previous_epoch()?;
            let of_it = epoch % 2 != self.record.epoch % 2;
            of_it.then_some(Record {
                epoch,
                trailer: trailer.previous,
                durable_us: 0,
            })
        });
        let coming = None;
        Stamp { newest, coming }
    }

    /// Writes again what is harmed of the header, but for the seal, which the next commit writes; and
    /// the newest slot in any case, since what was found may be a record that can be read but was never
    /// made durable, because its writer was killed, or a flush failed that forgot it.
    pub fn repair(&mut self, head: &Head) -> Result<(), MediumError> {
        let medium = &self.generation.medium;
        let mut harmed = head.harmless.iter().map(|damage| damage.offset);
        for at in harmed.clone().filter(|at| SUPERBLOCK_AT.contains(at)) {
            if !bug("superblock not mended") {
                medium.write(at, &self.generation.superblock.encode(at))?;
            }
        }
        // Not even a power cut now may take away the record that was just found: one place of the slot
        // may have it, and the other what it said before.
        if head.seal_first && !bug("slot mended before it is sealed") {
            self.write_seal(None)?;
        }
        if !bug("slot mended before the seal is durable") {
            medium.flush()?;
        }
        self.write_slot()?;
        medium.flush()?;
        let older = slot_at(other_slot(self.record.epoch));
        if harmed.any(|at| older.contains(&at)) {
            // While nothing can be read of this slot, what the seal says may follow would count.
            if head.offers && !bug("what may follow is left to the seal") {
                self.write_seal(None)?;
                medium.flush()?;
            }
            self.write_stamp(older, &self.before())?;
            medium.flush()?;
        }
        Ok(())
    }
}

impl Live {
    /// What is harmed of the header, by what it must say.
    fn harmed(&self) -> Result<Vec<Damage>, Trouble> {
        let Generation {
            key, place, cipher, ..
        } = &self.generation;
        let cipher = cipher.as_deref();
        let header = header(&*self.generation.medium).map_err(crate::damage::medium)?;
        let slot = |at: u64, stamp: Stamp| (at, stamp.encode(*key, cipher, at), Part::CommitRecord);
        let superblock = |at| (at, self.generation.superblock.encode(at), Part::Superblock);
        let (own, older) = (
            slot_at(self.record.epoch),
            slot_at(other_slot(self.record.epoch)),
        );
        let known = SUPERBLOCK_AT.into_iter().map(superblock);
        let known = known.chain(own.into_iter().map(|at| slot(at, self.slot())));
        let known = known.filter(|(at, right, _)| block(&header, *at) != *right);
        let known = known.map(|(at, _, part)| (at, part));
        // What the seal says beside the newest epoch depends on what was begun since, and what the
        // other slot says on the epochs that were left out.
        let whole = |at: &u64| {
            let stamps = Stamp::decode(*key, cipher, *at, block(&header, *at));
            copies(&stamps) == STAMP_COPIES
                && (older.contains(at) || stamps[0].limit() >= self.record.epoch)
        };
        let others = older.into_iter().chain(SEAL_AT).filter(|at| !whole(at));
        let seals = others.map(|at| (at, Part::CommitRecord));
        let what = "it is not what it must be";
        let damage = |(at, part)| damaged(place, at, None, part, what).with(Outcome::Repairable);
        Ok(known.chain(seals).map(damage).collect())
    }

    /// Writes again what is harmed of the header of an open file, and says what that was.
    pub fn mend_header(&mut self) -> Result<Vec<Damage>, StoreError> {
        let harmless = self.harmed()?;
        if harmless.is_empty() {
            return Ok(harmless);
        }
        let is_harmed = |at: &u64| harmless.iter().any(|damage| damage.offset == *at);
        let seal_first = !slot_at(self.record.epoch).iter().all(is_harmed);
        let seal_after = !seal_first && SEAL_AT.iter().any(is_harmed);
        let head = Head {
            record: self.record,
            seal_first,
            offers: true,
            sealed: self.sealed,
            harmless,
            doubt: None,
        };
        let medium = Arc::clone(&self.generation.medium);
        self.repair(&head).map_err(crate::damage::medium)?;
        if seal_after {
            let written = self.write_seal(None).and_then(|()| medium.flush());
            written.map_err(crate::damage::medium)?;
        }
        self.sealed |= seal_first || seal_after;
        let repaired = |damage: Damage| damage.with(Outcome::Repaired);
        Ok(head.harmless.into_iter().map(repaired).collect())
    }
}

/// The header of a file without epochs.
pub(crate) fn fresh(superblock: &Superblock, cipher: Option<&FileCipher>) -> Vec<u8> {
    let (key, mut header) = (superblock.key(), vec![0; LOG_AT as usize]);
    let mut put = |at: u64, bytes: &[u8]| {
        header[at as usize..][..BLOCK_LEN as usize].copy_from_slice(bytes);
    };
    let superblocks = if bug("one superblock") { 1 } else { 2 };
    for at in SUPERBLOCK_AT.into_iter().take(superblocks) {
        put(at, &superblock.encode(at));
    }
    for at in SLOT_AT.into_iter().flatten().chain(SEAL_AT) {
        put(at, &Stamp::default().encode(key, cipher, at));
    }
    header
}

/// Reads the header; blocks that the medium does not give are zeros, like damaged ones.
pub(crate) fn header(medium: &dyn Medium) -> Result<Vec<u8>, MediumError> {
    let mut header = vec![0; LOG_AT as usize];
    if medium.read(0, &mut header).is_err() {
        let mut failed = None;
        let mut good = 0;
        for (i, block) in header.chunks_mut(BLOCK_LEN as usize).enumerate() {
            match medium.read(i as u64 * BLOCK_LEN, block) {
                Ok(()) => good += 1,
                Err(e) => {
                    block.fill(0);
                    failed.get_or_insert(e);
                }
            }
        }
        if let (Some(e), 0) = (failed, good) {
            return Err(e);
        }
    }
    Ok(header)
}

fn block(header: &[u8], at: u64) -> &[u8] {
    header
        .get(at as usize..(at + BLOCK_LEN) as usize)
        .unwrap_or_default()
}

/// The superblock, from either copy, with the keys that `unlock` gives for it. A copy for which it gives an error
/// is harmed where the other one is good: anybody can make its checksum right. Without a key (`trusted` is false
/// then) nobody can tell, and whatever is newer than this program is refused.
pub(crate) fn superblock<K>(
    place: &str,
    header: &[u8],
    (trusted, unlock): (bool, impl Fn(&Superblock) -> Result<K, Trouble>),
    harmless: &mut Vec<Damage>,
) -> Result<(Superblock, K), Trouble> {
    let (mut good, mut refused) = (None, None);
    for at in SUPERBLOCK_AT {
        let (what, trouble) = match Superblock::decode(at, block(header, at)) {
            SuperblockRead::Good(superblock) => match unlock(&superblock) {
                Ok(keys) => {
                    good = Some((superblock, keys));
                    continue;
                }
                Err(trouble) => (NOT_OF_THE_KEY, Some(trouble)),
            },
            SuperblockRead::Newer(found) => {
                let newer = Trouble::from(StoreError::Newer {
                    place: place.to_owned(),
                    found,
                    supported: VERSION,
                });
                if !trusted {
                    return Err(newer);
                }
                (NOT_OF_THE_KEY, Some(newer))
            }
            SuperblockRead::Bad => ("this copy does not have its checksum", None),
        };
        refused = refused.or(trouble);
        let damage = damaged(place, at, None, Part::Superblock, what);
        harmless.push(damage.with(Outcome::Repairable));
    }
    let what = "neither copy has its checksum, or this is not an image";
    let missing = || damaged(place, 0, None, Part::Superblock, what).into();
    good.ok_or_else(|| refused.unwrap_or_else(missing))
}

/// What is said of a copy of the superblock where the other one is what the holder of the key wrote.
const NOT_OF_THE_KEY: &str =
    "this copy has its checksum and is not what the holder of the key wrote: somebody changed it";
