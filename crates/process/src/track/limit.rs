//! How long a stop may take, and what becomes of what a stop that was given up had taken already.
//!
//! # Rules
//! - The time is looked at between the steps of a stop and before pages are copied: a copy is not
//!   begun that would not end in time. A step that was begun is ended, so a stop can last longer by
//!   one step.
//! - Nothing that was handed over, or was found to be written, is lost with a stop or with an epoch
//!   that was given up: the next pass hands it over again ([`Notes`]).

use crate::ProcessError;
use crate::interval::IntervalSet;
use outlive_epoch::{PageSink, Run, SpaceId, StoreError};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Bytes a second that are assumed before any were copied.
const FIRST_SPEED: f64 = 1e9;
/// Copies of fewer bytes tell nothing of the speed.
const TELLING: u64 = 1 << 20;

/// What earlier stops tell of the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experience {
    /// How long it takes to let all threads go on.
    release: Duration,
    /// Bytes that are copied in a second.
    speed: f64,
}

impl Default for Experience {
    fn default() -> Self {
        Self {
            release: Duration::from_micros(50),
            speed: FIRST_SPEED,
        }
    }
}

impl Experience {
    /// So long it took to let the program go on.
    pub(super) fn released(&mut self, took: Duration) {
        self.release = (self.release * 3 + took) / 4;
    }

    /// A stop was given up. What was feared may have been one bad moment, of which nothing else would
    /// ever tell.
    pub(super) fn given_up(&mut self) {
        self.release = self.release * 3 / 4;
        self.speed *= 1.25;
    }

    /// So many bytes were copied in this time.
    pub(super) fn copied(&mut self, bytes: u64, took: Duration) {
        if bytes >= TELLING && !took.is_zero() {
            let speed = bytes as f64 / took.as_secs_f64();
            self.speed = (self.speed * 3.0 + speed) / 4.0;
        }
    }
}

/// Until when the program must go on.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    whole: Option<Duration>,
    began: Instant,
    experience: Experience,
}

impl Limit {
    /// For a stop that begins now; `whole` is the longest that it may take.
    pub(super) fn begin(whole: Option<Duration>, experience: Experience) -> Self {
        Self {
            whole,
            began: Instant::now(),
            experience,
        }
    }

    /// When the stop began.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// What is left until threads must be let go; `None` where there is no limit.
    pub(crate) fn left(&self) -> Option<Duration> {
        let whole = self.whole?;
        let gone = self.began.elapsed() + self.experience.release.min(whole / 4);
        Some(whole.saturating_sub(gone))
    }

    /// What is said when there is no time left.
    pub(super) fn exceeded(&self) -> ProcessError {
        let limit = self.whole.unwrap_or_default();
        ProcessError::TooLong {
            limit_us: u64::try_from(limit.as_micros()).unwrap_or(u64::MAX),
        }
    }

    /// Fails when the program must go on now.
    pub fn check(&self) -> Result<(), ProcessError> {
        match self.left() {
            Some(Duration::ZERO) => Err(self.exceeded()),
            _ => Ok(()),
        }
    }

    /// Fails when there is no time left to copy so many bytes.
    pub fn check_copy(&self, bytes: u64) -> Result<(), ProcessError> {
        self.check()?;
        let needed = bytes as f64 / self.experience.speed;
        match self.left() {
            Some(left) if left.as_secs_f64() < needed => Err(self.exceeded()),
            _ => Ok(()),
        }
    }
}

/// What the epoch that is being written was given of each space so far.
#[derive(Debug, Default)]
pub(crate) struct Notes(BTreeMap<SpaceId, Given>);

#[derive(Debug, Default)]
struct Given {
    pages: IntervalSet,
    absent: IntervalSet,
}

impl Notes {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Everything by spaces, pages and absent ones, as ranges of page indexes. Forgets it.
    pub(super) fn take(&mut self) -> impl Iterator<Item = (SpaceId, Vec<Run>, Vec<Run>)> {
        let runs = |space, set: &IntervalSet| {
            let all = set.iter().filter_map(|(s, e)| Run::new(space, s, e - s));
            all.collect::<Vec<Run>>()
        };
        std::mem::take(&mut self.0)
            .into_iter()
            .map(move |(space, given)| {
                (space, runs(space, &given.pages), runs(space, &given.absent))
            })
    }
}

/// A sink that takes notes.
pub(super) struct Noting<'a> {
    pub(super) sink: &'a mut dyn PageSink,
    pub(super) notes: &'a mut Notes,
}

impl PageSink for Noting<'_> {
    fn put(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let given = self.notes.0.entry(run.space()).or_default();
        given.pages.insert(run.first(), run.end());
        self.sink.put(run, bytes)
    }

    fn absent(&mut self, run: Run) -> Result<(), StoreError> {
        let given = self.notes.0.entry(run.space()).or_default();
        given.absent.insert(run.first(), run.end());
        self.sink.absent(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_copy_is_begun_that_would_not_end_in_time() {
        let mut experience = Experience::default();
        experience.copied(1 << 30, Duration::from_secs(1));
        let limit = |whole| Limit::begin(whole, experience);
        assert!(limit(None).check_copy(u64::MAX).is_ok());
        let hour = limit(Some(Duration::from_secs(3600)));
        assert!(hour.check().is_ok() && hour.check_copy(1 << 30).is_ok());
        assert!(hour.check_copy(1 << 52).is_err());
        let none = limit(Some(Duration::ZERO));
        assert!(matches!(
            none.check(),
            Err(ProcessError::TooLong { limit_us: 0 })
        ));
    }

    #[test]
    fn one_bad_moment_does_not_end_all_epochs() {
        let mut experience = Experience::default();
        experience.released(Duration::from_secs(100));
        experience.copied(1 << 30, Duration::from_secs(4000));
        let second = |experience| Limit::begin(Some(Duration::from_secs(1)), experience);
        assert!(second(experience).check().is_ok());
        assert!(second(experience).check_copy(600 << 20).is_err());
        (0..10).for_each(|_| experience.given_up());
        assert!(second(experience).check_copy(600 << 20).is_ok());
    }

    #[test]
    fn notes_tell_what_was_given_once() {
        struct Nowhere;
        impl PageSink for Nowhere {
            fn put(&mut self, _: Run, _: &[u8]) -> Result<(), StoreError> {
                Ok(())
            }
            fn absent(&mut self, _: Run) -> Result<(), StoreError> {
                Ok(())
            }
        }
        let run = |first, count| Run::new(SpaceId(7), first, count).unwrap();
        let mut notes = Notes::default();
        let mut sink = Noting {
            sink: &mut Nowhere,
            notes: &mut notes,
        };
        sink.put(run(3, 2), &[]).unwrap();
        sink.put(run(5, 1), &[]).unwrap();
        sink.absent(run(9, 1)).unwrap();
        let all: Vec<_> = notes.take().collect();
        assert_eq!(all, [(SpaceId(7), vec![run(3, 3)], vec![run(9, 1)])]);
        assert_eq!(notes.take().count(), 0);
    }
}
