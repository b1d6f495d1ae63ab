//! A disk that keeps in a volatile cache what was not flushed, and loses of it what it likes when the
//! power is cut. Pure: who reads and writes it is [`super::nbd`]'s business.
//!
//! # Rules
//! - A flush makes durable everything that was written before it; a write with FUA is durable when it
//!   is done.
//! - Of everything else, each sector of 512 bytes is after a cut what it was at the last flush, or what any
//!   write since then made of it, in any combination that the dice give: the order of writes means
//!   nothing, and a write of many sectors may be torn between any two of them.
//! - A sector is never a mixture, and never garbage: file systems rely on that too.
//! - A disk that *lies* answers a flush and does nothing. It is what a test must find.

use fastrand::Rng;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The unit that a disk writes whole or not at all, in bytes.
pub const SECTOR: usize = 512;

type Sector = Arc<[u8; SECTOR]>;

/// What becomes of what was not flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All of it is lost.
    Nothing,
    /// All of it is there.
    Everything,
    /// Each sector for itself: as at the last flush, or as any write since then left it.
    Any,
    /// Each write is there or not, later ones over earlier ones; some are torn.
    Torn,
}

impl Fate {
    /// All of them, the harshest first.
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Any, Self::Torn, Self::Everything];
}

/// The disk.
#[derive(Clone, Debug)]
pub struct Disk {
    len: u64,
    /// Sectors that are safe; what is missing holds zeros.
    durable: BTreeMap<u64, Sector>,
    /// Writes since the last flush, in their order: first sector, contents.
    cached: Vec<(u64, Vec<Sector>)>,
    /// The newest contents of what is in the cache.
    newest: BTreeMap<u64, Sector>,
    lies: bool,
    flushes: u64,
}

impl Disk {
    /// A disk with these contents, all safe; `len` bytes long, in whole sectors.
    pub fn new(len: u64, contents: impl IntoIterator<Item = (u64, [u8; SECTOR])>) -> Self {
        let contents = contents.into_iter();
        Self {
            len: len - len % SECTOR as u64,
            durable: contents.map(|(at, bytes)| (at, Arc::new(bytes))).collect(),
            cached: Vec::new(),
            newest: BTreeMap::new(),
            lies: false,
            flushes: 0,
        }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Sectors that a cut may take away now.
    pub fn at_risk(&self) -> usize {
        self.newest.len()
    }

    /// From now on it says that it flushed, and does not.
    pub fn lie(&mut self) {
        self.lies = true;
    }

    /// The range in sectors; `None` unless it is on the disk and made of whole sectors.
    fn sectors(&self, offset: u64, len: usize) -> Option<std::ops::Range<u64>> {
        let unit = SECTOR as u64;
        let end = offset.checked_add(len as u64)?;
        let whole = offset.is_multiple_of(unit) && end.is_multiple_of(unit) && end <= self.len;
        whole.then(|| offset / unit..end / unit)
    }

    /// Reads as if nothing could be lost; `None` beyond the end or beside the sectors.
    pub fn read(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        for at in self.sectors(offset, len)? {
            match self.newest.get(&at).or_else(|| self.durable.get(&at)) {
                Some(sector) => bytes.extend_from_slice(&sector[..]),
                None => bytes.extend_from_slice(&[0; SECTOR]),
            }
        }
        Some(bytes)
    }

    /// Writes into the cache; `None` beyond the end or beside the sectors.
    pub fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) -> Option<()> {
        let range = self.sectors(offset, bytes.len())?;
        let (chunks, _) = bytes.as_chunks::<SECTOR>();
        let sectors: Vec<Sector> = chunks.iter().map(|chunk| Arc::new(*chunk)).collect();
        for (at, sector) in range.clone().zip(&sectors) {
            self.newest.insert(at, Arc::clone(sector));
        }
        if durable && !self.lies {
            // What was written here before can never come back.
            for (first, older) in &mut self.cached {
                for (at, sector) in (*first..).zip(older.iter_mut()) {
                    if let Some(newer) = at.checked_sub(range.start)
                        && let Some(newer) = sectors.get(newer as usize)
                    {
                        *sector = Arc::clone(newer);
                    }
                }
            }
            self.durable.extend(range.zip(sectors));
        } else {
            self.cached.push((range.start, sectors));
        }
        Some(())
    }

    /// Makes all of it safe.
    pub fn flush(&mut self) {
        self.flushes += 1;
        if !self.lies {
            self.cached.clear();
            self.durable.append(&mut self.newest);
        }
    }

    /// The disk as it may be found after the power was cut now.
    pub fn after_cut(&self, fate: Fate, dice: &mut Rng) -> Self {
        let mut durable = self.durable.clone();
        match fate {
            Fate::Nothing => {}
            Fate::Everything => durable.extend(self.newest.clone()),
            Fate::Any => {
                let mut seen: BTreeMap<u64, Vec<&Sector>> = BTreeMap::new();
                for (first, sectors) in &self.cached {
                    for (at, sector) in (*first..).zip(sectors) {
                        seen.entry(at).or_default().push(sector);
                    }
                }
                for (at, versions) in seen {
                    if let Some(chosen) = versions.get(dice.usize(..=versions.len())) {
                        durable.insert(at, Arc::clone(chosen));
                    }
                }
            }
            Fate::Torn => {
                for (first, sectors) in &self.cached {
                    let from = dice.usize(..=sectors.len());
                    let kept = match dice.u8(..4) {
                        0 => 0..0,
                        1 => 0..from,
                        2 => from..sectors.len(),
                        _ => 0..sectors.len(),
                    };
                    let start = *first + kept.start as u64;
                    durable.extend((start..).zip(sectors[kept].iter().cloned()));
                }
            }
        }
        Self {
            len: self.len,
            durable,
            cached: Vec::new(),
            newest: BTreeMap::new(),
            lies: false,
            flushes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 8 * SECTOR as u64;

    fn filled(byte: u8, sectors: usize) -> Vec<u8> {
        vec![byte; sectors * SECTOR]
    }

    /// The first byte of each sector.
    fn looks(disk: &Disk) -> Vec<u8> {
        let all = disk.read(0, LEN as usize).unwrap();
        all.chunks(SECTOR)
            .map(|sector| {
                assert!(sector.iter().all(|b| *b == sector[0]), "a mixture");
                sector[0]
            })
            .collect()
    }

    /// Two sectors of it are safe, then come two writes that overlap.
    fn disk() -> Disk {
        let mut disk = Disk::new(LEN + 7, [(7, [7; SECTOR])]);
        disk.write(0, &filled(1, 2), false).unwrap();
        disk.flush();
        disk.write(0, &filled(2, 4), false).unwrap();
        disk.write(SECTOR as u64, &filled(3, 2), false).unwrap();
        disk
    }

    #[test]
    fn what_was_written_is_read_and_what_was_flushed_stays() {
        let disk = disk();
        assert_eq!(disk.len(), LEN);
        assert_eq!(looks(&disk), [2, 3, 3, 2, 0, 0, 0, 7]);
        assert_eq!((disk.at_risk(), disk.flushes()), (4, 1));
        let mut dice = Rng::with_seed(1);
        let nothing = disk.after_cut(Fate::Nothing, &mut dice);
        assert_eq!(looks(&nothing), [1, 1, 0, 0, 0, 0, 0, 7]);
        let everything = disk.after_cut(Fate::Everything, &mut dice);
        assert_eq!(looks(&everything), looks(&disk));
        assert_eq!(everything.at_risk(), 0);
    }

    #[test]
    fn any_sector_may_be_any_that_was_written_there() {
        let (disk, mut dice) = (disk(), Rng::with_seed(2));
        let mut found = std::collections::BTreeSet::new();
        for _ in 0..2000 {
            let now = looks(&disk.after_cut(Fate::Any, &mut dice));
            assert_eq!(now[4..], [0, 0, 0, 7]);
            found.insert(now);
        }
        // 1 or 2; 1, 2 or 3; 0, 2 or 3; 0 or 2.
        assert_eq!(found.len(), 2 * 3 * 3 * 2);
    }

    #[test]
    fn writes_are_lost_torn_and_reordered() {
        let (disk, mut dice) = (disk(), Rng::with_seed(3));
        let torn: std::collections::BTreeSet<Vec<u8>> = (0..2000)
            .map(|_| looks(&disk.after_cut(Fate::Torn, &mut dice))[..4].to_vec())
            .collect();
        for wanted in [
            [1, 1, 0, 0],
            [2, 2, 0, 0],
            [1, 1, 2, 2],
            [1, 3, 3, 0],
            [2, 3, 2, 2],
        ] {
            assert!(torn.contains(&wanted[..]), "{wanted:?} of {torn:?}");
        }
    }

    #[test]
    fn what_is_forced_is_safe_at_once_and_nothing_older_comes_back() {
        let (mut disk, mut dice) = (disk(), Rng::with_seed(4));
        disk.write(SECTOR as u64, &filled(9, 1), true).unwrap();
        for fate in Fate::ALL {
            for _ in 0..100 {
                assert_eq!(looks(&disk.after_cut(fate, &mut dice))[1], 9, "{fate:?}");
            }
        }
    }

    #[test]
    fn a_disk_that_lies_loses_what_it_said_it_flushed() {
        let mut disk = disk();
        disk.lie();
        disk.write(0, &filled(5, 1), true).unwrap();
        disk.flush();
        assert_eq!(looks(&disk), [5, 3, 3, 2, 0, 0, 0, 7]);
        let after = disk.after_cut(Fate::Nothing, &mut Rng::with_seed(5));
        assert_eq!(looks(&after), [1, 1, 0, 0, 0, 0, 0, 7]);
    }

    #[test]
    fn what_is_not_on_the_disk_or_no_whole_sector_is_refused() {
        let mut disk = disk();
        for (offset, len) in [
            (LEN, SECTOR),
            (0, 9 * SECTOR),
            (1, SECTOR),
            (0, 100),
            (u64::MAX - 511, 512),
        ] {
            assert!(disk.read(offset, len).is_none(), "{offset} {len}");
            assert!(
                disk.write(offset, &vec![0; len], false).is_none(),
                "{offset} {len}"
            );
        }
    }
}
