//! Checking of a whole image.
//!
//! Everything that any epoch needs is read and compared with its checksum: also pages that later
//! epochs have replaced, because earlier epochs can still be restored. What is never used is not
//! checked: padding, and pages that were staged and superseded within one epoch.

use crate::damage::{Damage, Part, Trouble};
use crate::format::{BLOCK_LEN, Kind, LOG_AT, Record, SLOT_AT, Trailer};
use crate::generation::{Generation, Head};
use crate::map::{PageMap, Where};
use crate::reader::new_buffer;
use crate::store::open_newest;
use outlive_epoch::{EpochId, PAGE_SIZE, Run, StoreError};
use outlive_media::{Access, Buffer, Directory, TRANSFER};

/// Told how many bytes are checked, and of how many.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Damages that a report lists; more are only counted.
const LISTED: usize = 10_000;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The epochs that were found, oldest first.
    pub epochs: Vec<EpochId>,
    /// Pages that were checked.
    pub pages: u64,
    /// Bytes of pages, trees and tables that were checked.
    pub bytes: u64,
    /// What is damaged, in the order in which it was found; at most 10,000.
    pub damages: Vec<Damage>,
    /// How many damages there are that are not listed.
    pub more: u64,
}

impl Report {
    /// Whether every byte that counts is as it was written.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damages.is_empty()
    }

    /// Whether something is lost (and not merely one of several copies).
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        self.more > 0 || self.damages.iter().any(|damage| !damage.harmless)
    }

    fn add(&mut self, trouble: Trouble, place: &str, at: u64, part: Part) {
        let damage = match trouble {
            Trouble::Damage(damage) => *damage,
            Trouble::Store(error) => Damage {
                file: place.to_owned(),
                offset: at,
                epoch: None,
                part,
                what: error.to_string(),
                harmless: false,
            },
        };
        if self.damages.contains(&damage) {
            return;
        }
        if self.damages.len() < LISTED {
            self.damages.push(damage);
        } else {
            self.more += 1;
        }
    }
}

/// Checks the newest generation in any directory.
///
/// # Errors
/// [`StoreError::Missing`], [`StoreError::Newer`], [`StoreError::Medium`]: nothing can be checked.
pub fn verify_in(dir: &dyn Directory, progress: Progress<'_>) -> Result<Report, StoreError> {
    let mut report = Report::default();
    let (generation, head) = match open_newest(dir, Access::Read) {
        Ok(Some(opened)) => opened,
        Ok(None) => {
            let what = "no committed epoch is here".to_owned();
            return Err(StoreError::Missing {
                place: dir.place(),
                what,
            });
        }
        Err(Trouble::Damage(damage)) => {
            report.damages.push(*damage);
            return Ok(report);
        }
        Err(Trouble::Store(error)) => return Err(error),
    };
    let mut walk = Walk {
        generation: &generation,
        report,
        progress,
        total: 0,
        buffer: None,
    };
    walk.all(&head);
    Ok(walk.report)
}

struct Walk<'a> {
    generation: &'a Generation,
    report: Report,
    progress: Progress<'a>,
    total: u64,
    buffer: Option<Buffer>,
}

impl Walk<'_> {
    fn all(&mut self, head: &Head) {
        self.report.damages.clone_from(&head.harmless);
        let chain = self.chain(&head.record);
        self.total = head.record.log_end() - LOG_AT;
        for (at, trailer) in chain.iter().rev() {
            self.report.epochs.push(EpochId(trailer.epoch));
            self.epoch(*at, trailer);
        }
        (self.progress)(self.total, self.total);
    }

    fn add(&mut self, trouble: impl Into<Trouble>, at: u64, part: Part) {
        self.report
            .add(trouble.into(), &self.generation.place, at, part);
    }

    /// Follows the trailers from the newest to the oldest. One that is damaged hides those
    /// before it, unless the other commit slot leads around it.
    fn chain(&mut self, newest: &Record) -> Vec<(u64, Trailer)> {
        let mut chain = Vec::new();
        let mut next = Some((newest.trailer_at, newest.epoch));
        while let Some((at, epoch)) = next {
            next = match self.generation.trailer(at, epoch) {
                Ok(trailer) => {
                    chain.push((at, trailer));
                    (trailer.previous_at != 0).then(|| (trailer.previous_at, epoch - 1))
                }
                Err(trouble) => {
                    self.add(trouble, at, Part::Trailer);
                    self.other_slot(epoch).filter(|(other, _)| *other < at)
                }
            };
        }
        chain
    }

    /// Where the other commit slot says that the epoch before this one ends.
    fn other_slot(&self, epoch: u64) -> Option<(u64, u64)> {
        let at = SLOT_AT[((epoch % 2) ^ 1) as usize];
        let mut block = vec![0; BLOCK_LEN as usize];
        self.generation.medium.read(at, &mut block).ok()?;
        let record = Record::decode(self.generation.key, at, &block).record?;
        let before = record.epoch == epoch.checked_sub(1)?;
        (before && record.epoch >= self.generation.superblock.first_epoch)
            .then_some((record.trailer_at, record.epoch))
    }

    fn epoch(&mut self, at: u64, trailer: &Trailer) {
        let generation = self.generation;
        match generation.groups(at, trailer) {
            Err(trouble) => self.add(trouble, trailer.groups.at, Part::Groups),
            Ok(groups) => {
                for (name, place) in groups.iter().filter(|(_, p)| p.epoch == trailer.epoch) {
                    self.report.bytes += place.section.len;
                    if let Err(trouble) = generation.tree(name, place) {
                        self.add(trouble, place.section.at, Part::Tree(name.clone()));
                    }
                }
                self.report.bytes += trailer.groups.len;
            }
        }
        let index = match generation.index(trailer) {
            Err(trouble) => return self.add(trouble, trailer.index.at, Part::Index),
            Ok(index) => index,
        };
        self.report.bytes += trailer.index.len;
        // Pages that were superseded within the epoch are needed by nobody.
        let mut map = PageMap::default();
        map.apply(&index, 0);
        for (run, place) in map.pieces() {
            if let Where::Data { at, crc, .. } = place {
                self.pages(
                    trailer.epoch,
                    run,
                    at,
                    &index.crcs[crc..crc + run.count() as usize],
                );
            }
        }
    }

    fn pages(&mut self, epoch: u64, run: Run, at: u64, crcs: &[u32]) {
        let per_read = TRANSFER / PAGE_SIZE;
        for (i, crcs) in crcs.chunks(per_read).enumerate() {
            let from = (i * per_read) as u64;
            let part = Run::new(run.space(), run.first() + from, crcs.len() as u64);
            if let Err(trouble) = self.read(epoch, part.unwrap_or(run), at + from * BLOCK_LEN, crcs)
            {
                self.add(
                    trouble,
                    at + from * BLOCK_LEN,
                    Part::Pages(part.unwrap_or(run)),
                );
            }
            self.report.pages += crcs.len() as u64;
            self.report.bytes += (crcs.len() * PAGE_SIZE) as u64;
            (self.progress)(self.report.bytes.min(self.total), self.total);
        }
    }

    fn read(&mut self, epoch: u64, run: Run, at: u64, crcs: &[u32]) -> Result<(), Trouble> {
        let len = crcs.len() * PAGE_SIZE;
        let mut buffer = match self.buffer.take().filter(|buffer| buffer.len() >= len) {
            Some(buffer) => buffer,
            None => new_buffer(std::iter::once(len as u64))?,
        };
        let bytes = &mut buffer[..len];
        let read = self.generation.medium.read(at, bytes);
        let seed = self.generation.key.of(Kind::Page, epoch);
        if read.is_ok() {
            for (i, (page, crc)) in bytes.chunks_exact(PAGE_SIZE).zip(crcs).enumerate() {
                let at = at + (i * PAGE_SIZE) as u64;
                if seed.crc(at, page) != *crc {
                    let page = Run::new(run.space(), run.first() + i as u64, 1);
                    let part = Part::Pages(page.unwrap_or(run));
                    let what = "its bytes do not have their checksum";
                    let damage = self.generation.damaged(at, Some(epoch), part.clone(), what);
                    self.add(damage, at, part);
                }
            }
        }
        self.buffer = Some(buffer);
        read.map_err(|e| self.generation.read_failed(at, e))
    }
}
