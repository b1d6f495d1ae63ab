//! When stored epochs are checked again, while the program runs (pure), and what is done then.
//!
//! # Rules
//! - At most [`RATE`] bytes a second are read, and nothing right before an epoch is due.
//! - Passes begin [`REST`] after the last one ended, the first one [`FIRST`] after the keeper began.
//! - With a hold-up budget nothing is checked: a power event would have to wait for it.
//! - What is lost on the medium is still in the program's memory: the next epoch is a full one.

use crate::epoch::EpochLog;
use outlive_epoch_store::Outcome;

/// Bytes that are read a second, at most.
pub const RATE: u64 = 8 << 20;
/// From the beginning to the first pass, nanoseconds.
pub const FIRST: u64 = 60_000_000_000;
/// From one pass to the next, nanoseconds.
pub const REST: u64 = 6 * 3600 * 1_000_000_000;
/// A piece is checked where the next epoch is due so much later, nanoseconds.
const ROOM: u64 = 20_000_000;

/// When the next piece is due.
#[derive(Debug)]
pub struct Scrub {
    due: u64,
    on: bool,
}

/// What a piece turned out to be.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// What is to be said.
    pub warnings: Vec<String>,
    /// Something is lost that is needed.
    pub lost: bool,
}

impl Scrub {
    /// Begins at `now` (nanoseconds), if it is to be done at all.
    #[must_use]
    pub fn new(now: u64, on: bool) -> Self {
        let due = now.saturating_add(FIRST);
        Self { due, on }
    }

    /// Nanoseconds until a piece is to be checked, if the next epoch is due in `wait`; `None` where
    /// it comes first.
    #[must_use]
    pub fn wait(&self, now: u64, wait: u64) -> Option<u64> {
        let until = self.due.saturating_sub(now);
        (self.on && until.saturating_add(ROOM) <= wait).then_some(until)
    }

    /// Checks a piece of the log.
    pub fn check(&mut self, now: u64, log: &mut dyn EpochLog) -> Checked {
        let mut checked = Checked::default();
        match log.scrub() {
            Ok(scrubbed) => {
                self.due = now.saturating_add(match scrubbed.finished {
                    true => REST,
                    false => scrubbed.bytes.saturating_mul(1_000_000_000) / RATE,
                });
                let newest = scrubbed.damages.iter().map(|damage| (true, damage));
                let older = scrubbed.older.iter().map(|damage| (false, damage));
                for (newest, damage) in newest.chain(older) {
                    checked.lost |= newest && damage.outcome == Outcome::Lost;
                    let what = match damage.outcome {
                        Outcome::Repaired => "it was repaired",
                        Outcome::Lost if newest => "it is lost; the next epoch holds everything",
                        Outcome::Lost => {
                            "it is lost, of an epoch that was kept; newer ones do not need it"
                        }
                        Outcome::Repairable | Outcome::Unneeded => "nothing is lost",
                    };
                    let place = format!("{} at offset {}", damage.file, damage.offset);
                    let warning = format!("{place} was damaged: {damage}; {what}");
                    checked.warnings.push(warning);
                }
            }
            Err(error) => {
                self.due = now.saturating_add(REST);
                let warning = format!("stored epochs cannot be checked: {error}");
                checked.warnings.push(warning);
            }
        }
        checked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeLog;
    use outlive_epoch_store::Scrubbed;

    #[test]
    fn a_piece_is_checked_only_where_there_is_time_and_not_too_often() {
        let mut scrub = Scrub::new(5, true);
        assert_eq!(scrub.wait(5, FIRST + ROOM - 1), None);
        assert_eq!(scrub.wait(5, FIRST + ROOM), Some(FIRST));
        let mut log = FakeLog::default();
        log.scrubs.push(Ok(Scrubbed {
            bytes: RATE,
            ..Scrubbed::default()
        }));
        let now = FIRST + 5;
        assert_eq!(scrub.check(now, &mut log), Checked::default());
        assert_eq!(scrub.wait(now, u64::MAX), Some(1_000_000_000));
        // The log has no more.
        scrub.check(now, &mut log);
        assert_eq!(scrub.wait(now, u64::MAX), Some(REST));
        assert_eq!(Scrub::new(0, false).wait(u64::MAX, u64::MAX), None);
    }
}
