//! Writing damaged blocks again, from their other copy or from the parity.
//!
//! # Rules
//! - Only blocks that are harmed are written, so a repair that is cut short leaves each of them
//!   harmed or whole, and what makes up for it is untouched.
//! - What is lost stays as it is.

use crate::cipher::Secret;
use crate::damage::{self, Damage, Outcome, Part, Trouble};
use crate::format::{SEAL_AT, SUPERBLOCK_AT};
use crate::generation::Generation;
use crate::head::Head;
use crate::older;
use crate::opening::open_newest;
use crate::store::Live;
use crate::tables::Fix;
use crate::verify::{Progress, Report, Walk};
use outlive_epoch::StoreError;
use outlive_media::{Access, Directory, MediumError};

/// Checks all generations in any directory, and writes again what can be. The caller sees to it
/// that nobody else writes.
///
/// # Errors
/// As for a check; and [`StoreError::Medium`] where a flush failed: then check again.
pub fn repair_in(dir: &dyn Directory, progress: Progress<'_>) -> Result<Report, StoreError> {
    repair_in_with(dir, None, progress)
}

/// [`repair_in`], with the key of an encrypted image. Without it all is written again but the commit records, which
/// have authentication tags.
///
/// # Errors
/// As for [`repair_in`]; [`StoreError::Locked`] for another key than that of the image.
pub fn repair_in_with(
    dir: &dyn Directory,
    secret: Option<&Secret>,
    progress: Progress<'_>,
) -> Result<Report, StoreError> {
    let (generation, head) = match open_newest(dir, Access::Write, secret) {
        Ok(Some(opened)) => opened,
        Ok(None) => {
            let what = "no committed epoch is here".to_owned();
            let place = dir.place();
            return Err(StoreError::Missing { place, what });
        }
        Err(Trouble::Damage(damage)) => {
            return Ok(Report {
                damages: vec![*damage],
                ..Report::default()
            });
        }
        Err(Trouble::Store(error)) => return Err(error),
    };
    let mut report = repair(&generation, &head, progress)?;
    for older in older::numbers(dir, generation.number)? {
        report.merge(match Generation::open(dir, older, Access::Write, secret) {
            Ok((older, head)) => repair(&older, &head, progress)?,
            Err(error) => older::unreadable(dir, older, error),
        });
    }
    Ok(report)
}

fn repair(
    generation: &Generation,
    head: &Head,
    progress: Progress<'_>,
) -> Result<Report, StoreError> {
    let mut mender = |fixes: &[Fix]| write(generation, fixes).is_ok();
    let mut report = Walk::new(generation, progress, Some(&mut mender)).all(head);
    // Without its newest trailer the chain cannot be followed: then the header stays as well.
    if generation.is_locked() {
        mend_superblocks(generation, head, &mut report).map_err(damage::medium)?;
    } else if let Ok(chain) = generation.chain(&head.record) {
        let live = Live::new(generation.clone(), head.record, chain);
        mend_header(live, head, &mut report).map_err(damage::medium)?;
    }
    generation.medium.flush().map_err(damage::medium)?;
    Ok(report)
}

/// Writes blocks; they are durable after a flush.
pub(crate) fn write(generation: &Generation, fixes: &[Fix]) -> Result<(), MediumError> {
    let medium = &generation.medium;
    fixes
        .iter()
        .try_for_each(|fix| medium.write(fix.at, &fix.bytes))
}

/// Writes superblocks again: all of the header that needs no key.
fn mend_superblocks(
    generation: &Generation,
    head: &Head,
    report: &mut Report,
) -> Result<(), MediumError> {
    let harmed = head.harmless.iter().map(|damage| damage.offset);
    for at in harmed.filter(|at| SUPERBLOCK_AT.contains(at)) {
        let block = generation.superblock.encode(at);
        generation.medium.write(at, &block)?;
    }
    for damage in &mut report.damages {
        if damage.part == Part::Superblock && damage.outcome == Outcome::Repairable {
            damage.outcome = Outcome::Repaired;
        }
    }
    Ok(())
}

/// Writes superblocks, slots and seal again.
fn mend_header(mut live: Live, head: &Head, report: &mut Report) -> Result<(), MediumError> {
    live.repair(head)?;
    // The newest slot is whole in both places now, and durable: nothing depends on the seal.
    let sealed = |damage: &Damage| SEAL_AT.contains(&damage.offset);
    if head.harmless.iter().any(sealed) {
        live.write_seal(None)?;
    }
    let medium = &live.generation.medium;
    let whole = medium.geometry()?.len >= head.record.log_end();
    for damage in &mut report.damages {
        let part = &damage.part;
        let header = matches!(part, Part::Superblock | Part::CommitRecord);
        let mended = header || (whole && *part == Part::End);
        if mended && damage.outcome == Outcome::Repairable {
            damage.outcome = Outcome::Repaired;
        }
    }
    Ok(())
}
