//! One generation file: a base epoch and the epochs that rest on it.
//!
//! # Names
//! A file is called `new.<n>` until its first epoch is durable, then `epochs.<n>`. So whatever is
//! found under the second name was once complete: what does not validate there is damage, never
//! an interrupted beginning.

use crate::damage::{self, Damage, Part, Trouble};
use crate::format::{
    self, BLOCK_LEN, Index, Key, Kind, LOG_AT, RECORD_COPIES, Record, RecordRead, SEAL_AT, SLOT_AT,
    SUPERBLOCK_AT, Section, Superblock, SuperblockRead, Trailer, TreePlace, VERSION,
};
use outlive_epoch::{EpochId, StoreError};
use outlive_media::{Access, Directory, Medium, MediumError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The name of a file whose first epoch is durable.
pub(crate) fn committed_name(number: u64) -> String {
    format!("epochs.{number}")
}

/// The name of a file whose first epoch is not durable yet.
pub(crate) fn fresh_name(number: u64) -> String {
    format!("new.{number}")
}

/// The number in a name that begins with `prefix`, if it is one that we would write.
pub(crate) fn number_of(name: &str, prefix: &str) -> Option<u64> {
    let number = name.strip_prefix(prefix)?.parse().ok()?;
    (format!("{prefix}{number}") == name).then_some(number)
}

/// An open generation file.
#[derive(Clone)]
pub(crate) struct Generation {
    /// For messages.
    pub place: String,
    pub number: u64,
    pub medium: Arc<dyn Medium>,
    pub superblock: Superblock,
    pub key: Key,
}

/// What the head of a file says.
#[derive(Debug)]
pub(crate) struct Head {
    /// The newest commit record.
    pub record: Record,
    /// Whether the newest record stands whole in its slot.
    pub slot_intact: bool,
    /// Whether the copy beside the slots is of the newest record.
    pub sealed: bool,
    /// Damage that does no harm, because of the copies.
    pub harmless: Vec<Damage>,
}

impl Generation {
    /// Makes a new file with an empty log. Nothing of it is durable yet.
    pub fn create(
        dir: &dyn Directory,
        number: u64,
        first_epoch: u64,
        uuid: [u8; 16],
    ) -> Result<Self, StoreError> {
        let name = fresh_name(number);
        let medium = dir.create(&name).map_err(damage::medium)?;
        let superblock = Superblock {
            uuid,
            generation: number,
            first_epoch,
        };
        let mut header = vec![0; LOG_AT as usize];
        for at in SUPERBLOCK_AT {
            header[at as usize..][..BLOCK_LEN as usize].copy_from_slice(&superblock.encode(at));
        }
        medium.write(0, &header).map_err(damage::medium)?;
        let place = format!("{}/{}", dir.place(), committed_name(number));
        Ok(Self {
            place,
            number,
            medium,
            key: superblock.key(),
            superblock,
        })
    }

    /// Opens a file that has a committed epoch, and finds the newest.
    pub fn open(
        dir: &dyn Directory,
        number: u64,
        access: Access,
    ) -> Result<(Self, Head), OpenError> {
        let name = committed_name(number);
        let medium = dir.open(&name, access).map_err(OpenError::Medium)?;
        let place = format!("{}/{name}", dir.place());
        let len = medium.geometry().map_err(OpenError::Medium)?.len;
        if len < LOG_AT {
            let what = format!("the file ends at {len}, inside its header");
            return Err(OpenError::Trouble(
                damaged(&place, len, None, Part::End, &what).into(),
            ));
        }
        let mut header = vec![0; LOG_AT as usize];
        medium.read(0, &mut header).map_err(OpenError::Medium)?;
        let mut harmless = Vec::new();
        let superblock = superblock(&place, &header, &mut harmless)?;
        let key = superblock.key();
        let generation = Self {
            place,
            number,
            medium,
            superblock,
            key,
        };
        let head = generation.head(&header, len, harmless)?;
        Ok((generation, head))
    }

    /// Chooses the newest commit record.
    fn head(&self, header: &[u8], len: u64, harmless: Vec<Damage>) -> Result<Head, Trouble> {
        let read = |at: u64| Record::decode(self.key, at, block(header, at));
        let slots = SLOT_AT.map(read);
        let seal = read(SEAL_AT);
        let records = slots.iter().chain([&seal]).filter_map(|r| r.record);
        let Some(record) = records.max_by_key(|r| (r.epoch, r.durable_us)) else {
            let what = "no copy of a commit record is intact";
            return Err(self
                .damaged(SLOT_AT[0], None, Part::CommitRecord, what)
                .into());
        };
        let own_slot = &slots[(record.epoch % 2) as usize];
        let same = |r: &RecordRead| r.record.is_some_and(|r| r.epoch == record.epoch);
        let mut head = Head {
            record,
            slot_intact: same(own_slot) && own_slot.copies == RECORD_COPIES,
            sealed: same(&seal) && seal.copies == RECORD_COPIES,
            harmless,
        };
        for (at, slot) in SLOT_AT.into_iter().zip(&slots).chain([(SEAL_AT, &seal)]) {
            let agrees = slot
                .record
                .is_none_or(|r| r.epoch != record.epoch || r.trailer_at == record.trailer_at);
            if record.epoch < self.superblock.first_epoch || !agrees {
                let what = "the commit records contradict each other";
                return Err(self.damaged(at, None, Part::CommitRecord, what).into());
            }
            // Before a second epoch was begun, the other slot and the copy are unused.
            let unused = slot.blank && record.epoch == self.superblock.first_epoch;
            if slot.copies < RECORD_COPIES && !unused {
                let epoch = slot.record.map(|r| r.epoch);
                let what = format!("only {} of {RECORD_COPIES} copies are intact", slot.copies);
                let damage = self.damaged(at, epoch, Part::CommitRecord, &what);
                head.harmless.push(Damage {
                    harmless: true,
                    ..damage
                });
            }
        }
        if len < record.log_end() {
            let end = record.log_end();
            let what = format!("the file ends at {len}, its committed epochs at {end}");
            return Err(self
                .damaged(len, Some(record.epoch), Part::End, &what)
                .into());
        }
        Ok(head)
    }

    pub fn damaged(&self, offset: u64, epoch: Option<u64>, part: Part, what: &str) -> Damage {
        damaged(&self.place, offset, epoch, part, what)
    }

    /// Reads bytes; the caller has checked that `len` is not beyond the end of the file, or
    /// bounds it otherwise.
    fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, Trouble> {
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| self.too_long(at, len))?];
        self.medium
            .read(at, &mut bytes)
            .map_err(|e| self.read_failed(at, e))?;
        Ok(bytes)
    }

    fn too_long(&self, at: u64, len: u64) -> Damage {
        self.damaged(at, None, Part::End, &format!("{len} bytes cannot be here"))
    }

    /// Says what happened to the file, by the name that it has (or will have once committed).
    pub fn failed(&self, error: MediumError) -> StoreError {
        match damage::medium(error) {
            StoreError::Medium { source, .. } => StoreError::Medium {
                place: self.place.clone(),
                source,
            },
            StoreError::Full { needed, .. } => StoreError::Full {
                place: self.place.clone(),
                needed,
            },
            other => other,
        }
    }

    pub fn read_failed(&self, at: u64, error: MediumError) -> Trouble {
        match error {
            MediumError::Short { end, .. } => {
                let what = format!("the file ends before offset {end}");
                self.damaged(at, None, Part::End, &what).into()
            }
            MediumError::Io {
                op, offset, source, ..
            } => {
                let place = format!("{}: {op} at offset {offset}", self.place);
                StoreError::Medium { place, source }.into()
            }
            other => damage::medium(other).into(),
        }
    }

    /// Reads the trailer of an epoch.
    pub fn trailer(&self, at: u64, epoch: u64) -> Result<Trailer, Trouble> {
        let block = self.read(at, BLOCK_LEN)?;
        let trailer = Trailer::decode(self.key, at, epoch, &block);
        let first = self.superblock.first_epoch;
        // Only the first epoch of the file has none before it.
        let linked = trailer.filter(|t| (t.previous_at == 0) == (epoch == first));
        let what = "it does not have its checksum, or is not in order";
        linked.ok_or_else(|| self.damaged(at, Some(epoch), Part::Trailer, what).into())
    }

    /// All epochs from the oldest to the newest, each with the place of its trailer.
    pub fn chain(&self, record: &Record) -> Result<Vec<(u64, Trailer)>, Trouble> {
        let mut chain = Vec::new();
        let (mut at, mut epoch) = (record.trailer_at, record.epoch);
        loop {
            let trailer = self.trailer(at, epoch)?;
            chain.push((at, trailer));
            if trailer.previous_at == 0 {
                break;
            }
            // `previous_at` is below `start`, which is below `at`: this ends.
            (at, epoch) = (trailer.previous_at, epoch - 1);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Reads a section of an epoch. A trailer that passed its checks bounds its sections by its
    /// own place, which is inside the file.
    fn section(
        &self,
        kind: Kind,
        epoch: u64,
        section: &Section,
        part: &Part,
    ) -> Result<Vec<u8>, Trouble> {
        let bytes = self.read(section.at, section.len)?;
        if self.key.of(kind, epoch).crc(section.at, &bytes) == section.crc {
            return Ok(bytes);
        }
        let what = format!("its {} bytes do not have their checksum", section.len);
        Err(self
            .damaged(section.at, Some(epoch), part.clone(), &what)
            .into())
    }

    /// The groups of an epoch.
    pub fn groups(
        &self,
        at: u64,
        trailer: &Trailer,
    ) -> Result<BTreeMap<String, TreePlace>, Trouble> {
        let Trailer { epoch, groups, .. } = trailer;
        let bytes = self.section(Kind::Groups, *epoch, groups, &Part::Groups)?;
        let decoded = format::decode_groups(&bytes, *epoch, at);
        let what = "it is not in order";
        let decoded =
            decoded.ok_or_else(|| self.damaged(groups.at, Some(*epoch), Part::Groups, what))?;
        Ok(decoded.into_iter().collect())
    }

    /// The page index of an epoch.
    pub fn index(&self, trailer: &Trailer) -> Result<Index, Trouble> {
        let Trailer { epoch, index, .. } = trailer;
        let bytes = self.section(Kind::Index, *epoch, index, &Part::Index)?;
        let decoded = Index::decode(&bytes, trailer.entries, trailer.start, trailer.groups.at);
        let what = "it is not in order";
        decoded.ok_or_else(|| {
            self.damaged(index.at, Some(*epoch), Part::Index, what)
                .into()
        })
    }

    /// The state tree of a group.
    pub fn tree(&self, group: &str, place: &TreePlace) -> Result<Vec<u8>, Trouble> {
        let part = Part::Tree(group.to_owned());
        self.section(Kind::Tree, place.epoch, &place.section, &part)
    }
}

/// Why a generation file could not be opened.
pub(crate) enum OpenError {
    /// The medium's own answer, which may say that the file has just been replaced.
    Medium(MediumError),
    Trouble(Trouble),
}

impl From<Trouble> for OpenError {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl From<OpenError> for Trouble {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Medium(error) => Self::Store(damage::medium(error)),
            OpenError::Trouble(trouble) => trouble,
        }
    }
}

fn damaged(place: &str, offset: u64, epoch: Option<u64>, part: Part, what: &str) -> Damage {
    Damage {
        file: place.to_owned(),
        offset,
        epoch: epoch.map(EpochId),
        part,
        what: what.to_owned(),
        harmless: false,
    }
}

fn block(header: &[u8], at: u64) -> &[u8] {
    header
        .get(at as usize..(at + BLOCK_LEN) as usize)
        .unwrap_or_default()
}

/// The superblock, from either copy.
fn superblock(
    place: &str,
    header: &[u8],
    harmless: &mut Vec<Damage>,
) -> Result<Superblock, Trouble> {
    let mut good = None;
    for at in SUPERBLOCK_AT {
        match Superblock::decode(at, block(header, at)) {
            SuperblockRead::Good(superblock) => good = Some(superblock),
            SuperblockRead::Newer(found) => {
                let place = place.to_owned();
                return Err(StoreError::Newer {
                    place,
                    found,
                    supported: VERSION,
                }
                .into());
            }
            SuperblockRead::Bad => {
                let what = "this copy does not have its checksum";
                let damage = damaged(place, at, None, Part::Superblock, what);
                harmless.push(Damage {
                    harmless: true,
                    ..damage
                });
            }
        }
    }
    let what = "neither copy has its checksum, or this is not an image";
    good.ok_or_else(|| damaged(place, 0, None, Part::Superblock, what).into())
}
