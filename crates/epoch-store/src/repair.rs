//! Writing damaged blocks again, from their other copy or from the parity.
//!
//! # Rules
//! - Only blocks that are harmed are written, so a repair that is cut short leaves each of them
//!   harmed or whole, and what makes up for it is untouched.
//! - What is lost stays as it is.

use crate::damage::{self, Outcome, Part, Trouble};
use crate::format::{BLOCK_LEN, Record, SEAL_AT, SLOT_AT};
use crate::generation::{Generation, Head};
use crate::older;
use crate::store::{Live, open_newest};
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
    let (generation, head) = match open_newest(dir, Access::Write) {
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
        report.merge(match Generation::open(dir, older, Access::Write) {
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
    if let Ok(chain) = generation.chain(&head.record) {
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

/// Writes superblocks, slots and seal again.
fn mend_header(mut live: Live, head: &Head, report: &mut Report) -> Result<(), MediumError> {
    live.sealed = head.sealed;
    live.repair(head)?;
    let medium = &live.generation.medium;
    // The newest slot is whole in both places now, and durable: nothing depends on the others.
    let older = SLOT_AT[((head.record.epoch % 2) ^ 1) as usize];
    let before = live.before();
    for damage in &head.harmless {
        if older.contains(&damage.offset) {
            let key = live.generation.key;
            let block = before.map_or_else(
                || vec![0; BLOCK_LEN as usize],
                |record: Record| record.encode(key, damage.offset),
            );
            medium.write(damage.offset, &block)?;
        } else if damage.offset == SEAL_AT {
            live.write_record(SEAL_AT)?;
        }
    }
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
