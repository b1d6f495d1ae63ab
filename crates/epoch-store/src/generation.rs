//! One generation file: a base epoch and the epochs that rest on it.
//!
//! # Names
//! A file is called `new.<n>` until its first epoch is durable, then `epochs.<n>`. So whatever is
//! found under the second name was once complete: what does not validate there is damage, never
//! an interrupted beginning.

use crate::cipher::{Cipher, FileCipher, Secret, same};
use crate::damage::{self, Damage, Met, Outcome, Part, Trouble};
use crate::format::{
    BLOCK_LEN, FileLock, Key, Kind, LOG_AT, Record, Section, Superblock, Trailer, Twice,
};
use crate::groups::{TreePlace, decode_groups};
use crate::head::{self, Head};
use crate::host::Host;
use crate::index::Index;
use crate::locked::{self, Unfit};
use crate::planted::bug;
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
    /// The number in its name before it had its final one.
    pub fresh: u64,
    pub medium: Arc<dyn Medium>,
    pub superblock: Superblock,
    pub key: Key,
    /// The keys of an encrypted file, if they are known.
    pub cipher: Option<Arc<FileCipher>>,
    /// Damage that was made up for while reading.
    pub met: Met,
}

/// Sections up to this length are read without asking whether the file is so long.
const SMALL: u64 = 1 << 16;

impl Generation {
    /// Makes a new file, called by its `fresh` number, with an empty log. Nothing of it is durable yet.
    pub fn create(
        dir: &dyn Directory,
        (number, fresh): (u64, u64),
        first_epoch: u64,
        host: &dyn Host,
        secret: Option<&Secret>,
    ) -> Result<Self, StoreError> {
        let mut superblock = Superblock {
            uuid: host.uuid(),
            generation: number,
            first_epoch,
            lock: None,
        };
        let mut cipher = None;
        if let Some(secret) = secret {
            let mut salt = [0; 32];
            random(dir, host, &mut salt)?;
            let keys = FileCipher::new(secret, &superblock.uuid, number, &salt);
            let mut lock = FileLock {
                fingerprint: secret.fingerprint(),
                salt,
                tag: [0; 16],
            };
            superblock.lock = Some(lock);
            lock.tag = superblock.tag(&keys);
            superblock.lock = Some(lock);
            cipher = Some(Arc::new(keys));
        }
        let name = fresh_name(fresh);
        let medium = dir.create(&name).map_err(damage::medium)?;
        let header = head::fresh(&superblock, cipher.as_deref());
        medium.write(0, &header).map_err(damage::medium)?;
        let place = format!("{}/{}", dir.place(), committed_name(number));
        Ok(Self {
            place,
            number,
            fresh,
            medium,
            key: superblock.key(),
            superblock,
            cipher,
            met: Met::default(),
        })
    }

    /// Opens a file that has a committed epoch, and finds the newest. Without the key of an encrypted file all can be
    /// done that needs no contents; with a key, a file that is not encrypted is refused.
    pub fn open(
        dir: &dyn Directory,
        number: u64,
        access: Access,
        secret: Option<&Secret>,
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
        let header = head::header(&*medium).map_err(OpenError::Medium)?;
        let mut harmless = Vec::new();
        let unlock = |superblock: &Superblock| keys(&place, number, superblock, secret);
        let unlock = (secret.is_some(), unlock);
        let (superblock, cipher) = head::superblock(&place, &header, unlock, &mut harmless)?;
        let (key, cipher) = (superblock.key(), cipher.map(Arc::new));
        let generation = Self {
            place,
            number,
            fresh: number,
            medium,
            superblock,
            key,
            cipher,
            met: Met::default(),
        };
        let head = generation.head(&header, len, harmless)?;
        Ok((generation, head))
    }

    /// Whether its contents are encrypted, and the key is not known.
    pub fn is_locked(&self) -> bool {
        self.superblock.lock.is_some() && self.cipher.is_none()
    }

    /// Refuses what cannot be done without the key.
    pub fn must_be_open(&self) -> Result<(), StoreError> {
        match self.superblock.lock {
            Some(lock) if self.cipher.is_none() => Err(StoreError::Locked {
                place: self.place.clone(),
                what: format!(
                    "is encrypted with key {}, and no key was given",
                    lock.fingerprint
                ),
            }),
            _ => Ok(()),
        }
    }

    /// The keys of another attempt to write an epoch; `None` where nothing is encrypted.
    pub fn attempt(
        &self,
        dir: &dyn Directory,
        host: &dyn Host,
        epoch: u64,
    ) -> Result<Option<Arc<Cipher>>, StoreError> {
        self.must_be_open()?;
        let Some(keys) = &self.cipher else {
            return Ok(None);
        };
        let mut attempt = [0; 16];
        if !bug("attempts have the same key") {
            random(dir, host, &mut attempt)?;
        }
        Ok(Some(Arc::new(keys.of(epoch, attempt))))
    }

    /// The keys with which an epoch was written; `None` where nothing is encrypted, or they are not known.
    pub fn cipher_of(&self, trailer: &Trailer) -> Option<Arc<Cipher>> {
        let keys = self.cipher.as_ref()?;
        Some(Arc::new(keys.of(trailer.epoch, trailer.lock.attempt)))
    }

    pub fn damaged(&self, offset: u64, epoch: Option<u64>, part: Part, what: &str) -> Damage {
        damaged(&self.place, offset, epoch, part, what)
    }

    /// Reads bytes. Memory is only taken for what the file has.
    pub fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, Trouble> {
        if len > SMALL {
            let end = self.medium.geometry().map_err(damage::medium)?.len;
            if at.saturating_add(len) > end {
                return Err(self.too_long(at, len).into());
            }
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| self.too_long(at, len))?];
        self.medium
            .read(at, &mut bytes)
            .map_err(|e| self.read_failed(at, e))?;
        Ok(bytes)
    }

    /// Notes what was harmed where a second copy was intact.
    fn made_up(&self, trouble: Trouble, at: u64, epoch: u64, part: Part) {
        let damage = match trouble {
            Trouble::Damage(damage) => *damage,
            Trouble::Store(error) => self.damaged(at, Some(epoch), part, &error.to_string()),
        };
        self.met.note(damage.with(Outcome::Repairable));
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

    /// Reads the trailer of an epoch, from either place.
    pub fn trailer(&self, twice: Twice, epoch: u64) -> Result<Trailer, Trouble> {
        match self.trailer_from(twice, twice.at, epoch) {
            Ok(trailer) => Ok(trailer),
            Err(trouble) => match self.trailer_from(twice, twice.copy_at, epoch) {
                Ok(trailer) => {
                    self.made_up(trouble, twice.at, epoch, Part::Trailer);
                    Ok(trailer)
                }
                Err(_) => Err(trouble),
            },
        }
    }

    /// Reads the trailer of an epoch from the place `from`.
    pub fn trailer_from(&self, twice: Twice, from: u64, epoch: u64) -> Result<Trailer, Trouble> {
        let block = self.read(from, BLOCK_LEN)?;
        let trailer = Trailer::decode(self.key, epoch, twice, &block);
        let first = self.superblock.first_epoch;
        // Only the first epoch of the file has none before it.
        let linked = |t: &Trailer| match t.previous_epoch() {
            None => epoch == first,
            Some(before) => before >= first,
        };
        let trailer = trailer.filter(linked);
        let what = "it is not the one that was committed, or is not in order";
        let damage = |what| Trouble::from(self.damaged(from, Some(epoch), Part::Trailer, what));
        let trailer = trailer.ok_or_else(|| damage(what))?;
        if let Some(cipher) = self.cipher_of(&trailer) {
            let tag = cipher.record_tag(twice.at, Trailer::said(&block));
            if !same(&tag, &trailer.lock.own) {
                return Err(damage(NOT_ITS_TAG));
            }
        }
        Ok(trailer)
    }

    /// All epochs from the oldest to the newest, each with the place of its trailer.
    pub fn chain(&self, record: &Record) -> Result<Vec<(u64, Trailer)>, Trouble> {
        let mut chain = Vec::new();
        let (mut twice, mut epoch) = (record.trailer, record.epoch);
        loop {
            let trailer = self.trailer(twice, epoch)?;
            chain.push((twice.at, trailer));
            let Some(before) = trailer.previous_epoch() else {
                break;
            };
            // The one before is below `start`, which is below the trailer: this ends.
            (twice, epoch) = (trailer.previous, before);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Reads a section of an epoch from the place `from`.
    pub fn section_from(
        &self,
        kind: Kind,
        epoch: u64,
        section: &Section,
        from: u64,
        part: &Part,
    ) -> Result<Vec<u8>, Trouble> {
        let bytes = self.read(from, section.len)?;
        if self.key.of(kind, epoch).crc(section.at, &bytes) == section.crc {
            return Ok(bytes);
        }
        let what = format!("its {} bytes do not have their checksum", section.len);
        let damage = self.damaged(from, Some(epoch), part.clone(), &what);
        Err(damage.into())
    }

    /// Reads a section of an epoch from either place.
    fn section(
        &self,
        kind: Kind,
        epoch: u64,
        section: &Section,
        copy_at: u64,
        part: &Part,
    ) -> Result<Vec<u8>, Trouble> {
        match self.section_from(kind, epoch, section, section.at, part) {
            Ok(bytes) => Ok(bytes),
            Err(trouble) => match self.section_from(kind, epoch, section, copy_at, part) {
                Ok(bytes) => {
                    self.made_up(trouble, section.at, epoch, part.clone());
                    Ok(bytes)
                }
                Err(_) => Err(trouble),
            },
        }
    }

    /// The groups of an epoch.
    pub fn groups(
        &self,
        at: u64,
        trailer: &Trailer,
    ) -> Result<BTreeMap<String, TreePlace>, Trouble> {
        let Trailer { epoch, groups, .. } = trailer;
        let copy_at = groups.at + trailer.apart(at);
        let bytes = self.section(Kind::Groups, *epoch, groups, copy_at, &Part::Groups)?;
        let bounds = (*epoch, trailer.copy_at);
        let decoded = match self.superblock.lock {
            None => decode_groups(&bytes, bounds.0, bounds.1).ok_or(Unfit::Order),
            Some(_) => {
                let cipher = self.cipher_of(trailer);
                locked::read_groups(&bytes, groups.at, bounds, cipher.as_deref())
            }
        };
        let decoded = decoded
            .map_err(|unfit| self.damaged(groups.at, Some(*epoch), Part::Groups, why(unfit)))?;
        Ok(decoded.into_iter().collect())
    }

    /// The page index of an epoch.
    pub fn index(&self, at: u64, trailer: &Trailer) -> Result<Index, Trouble> {
        let Trailer { epoch, index, .. } = trailer;
        let copy_at = index.at + trailer.apart(at);
        let bytes = self.section(Kind::Index, *epoch, index, copy_at, &Part::Index)?;
        let decoded = match (trailer.layout(), self.superblock.lock) {
            (None, _) => Err(Unfit::Order),
            (Some(layout), None) => {
                Index::decode(&bytes, trailer.counts(), &layout).ok_or(Unfit::Order)
            }
            (Some(layout), Some(_)) => {
                let cipher = self.cipher_of(trailer);
                let opener = cipher
                    .as_deref()
                    .map(|cipher| (cipher, &trailer.lock.index));
                locked::read_index(bytes, index.at, trailer.counts(), &layout, opener)
            }
        };
        decoded.map_err(|unfit| {
            self.damaged(index.at, Some(*epoch), Part::Index, why(unfit))
                .into()
        })
    }

    /// The state tree of a group.
    pub fn tree(&self, group: &str, place: &TreePlace) -> Result<Vec<u8>, Trouble> {
        self.must_be_open()?;
        let part = Part::Tree(group.to_owned());
        let mut bytes = self.section(
            Kind::Tree,
            place.epoch,
            &place.section,
            place.copy_at,
            &part,
        )?;
        if let Some(keys) = self.cipher.as_ref().filter(|_| !bytes.is_empty()) {
            let cipher = keys.of(place.epoch, place.lock.attempt);
            let (at, tag) = (place.section.at, &place.lock.tag);
            if !cipher.decrypt(Kind::Tree, at, &[], tag, &mut bytes) {
                let damage = self.damaged(at, Some(place.epoch), part, NOT_ITS_TAG);
                return Err(damage.into());
            }
        }
        Ok(bytes)
    }
}

/// What is said of bytes that have their checksum, but are not what the holder of the key wrote there.
pub(crate) const NOT_ITS_TAG: &str =
    "its checksum is right and its authentication tag is not: somebody changed it";

fn why(unfit: Unfit) -> &'static str {
    match unfit {
        Unfit::Order => "it is not in order",
        Unfit::Tag => NOT_ITS_TAG,
    }
}

/// Random bytes for keys, which nothing can take the place of.
fn random(dir: &dyn Directory, host: &dyn Host, into: &mut [u8]) -> Result<(), StoreError> {
    host.random(into).map_err(|source| StoreError::Medium {
        place: format!("random bytes for the encryption of {}", dir.place()),
        source,
    })
}

/// The keys of the file with this number, if it is encrypted and the secret is known.
fn keys(
    place: &str,
    number: u64,
    superblock: &Superblock,
    secret: Option<&Secret>,
) -> Result<Option<FileCipher>, Trouble> {
    let refused = |what: String| StoreError::Locked {
        place: place.to_owned(),
        what,
    };
    let (secret, lock) = match (secret, superblock.lock) {
        (None, _) => return Ok(None),
        (Some(_), None) if bug("plain file read with a key") => return Ok(None),
        (Some(secret), None) => {
            let what = format!(
                "is not encrypted, although key {} was given: it is not what that key protects",
                secret.fingerprint()
            );
            return Err(refused(what).into());
        }
        (Some(secret), Some(lock)) => (secret, lock),
    };
    let given = secret.fingerprint();
    if given != lock.fingerprint {
        let needed = lock.fingerprint;
        let what = format!("is encrypted with key {needed}, and key {given} was given");
        return Err(refused(what).into());
    }
    let Superblock {
        uuid, generation, ..
    } = superblock;
    let keys = FileCipher::new(secret, uuid, *generation, &lock.salt);
    if !same(&superblock.tag(&keys), &lock.tag) {
        let damage = damaged(place, 0, None, Part::Superblock, NOT_ITS_TAG);
        return Err(damage.into());
    }
    if *generation != number && !bug("renamed file read") {
        let name = committed_name(*generation);
        let what = format!("it is that of {name}: somebody gave it another name");
        return Err(damaged(place, 0, None, Part::Superblock, &what).into());
    }
    Ok(Some(keys))
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

pub(crate) fn damaged(
    place: &str,
    offset: u64,
    epoch: Option<u64>,
    part: Part,
    what: &str,
) -> Damage {
    Damage {
        file: place.to_owned(),
        offset,
        epoch: epoch.map(EpochId),
        part,
        what: what.to_owned(),
        outcome: Outcome::Lost,
    }
}
