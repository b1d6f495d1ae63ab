//! What a keeper knows of its budget: the model fed by its own epochs, the pacing, the wear, and what
//! became of events.

use super::model::{Figures, Model, Sample};
use super::pacing::{self, Pacing, Step};
use super::strict::{self, Bound};
use super::wear::Wear;
use crate::epoch::Taken;
use outlive_epoch::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// The most space that is kept ready for the epoch of an event, bytes: of a larger one the file
/// system's journal is a small part.
const MOST_READY: u64 = 32 << 20;

/// A hold-up budget, as it is asked for and remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldUp {
    /// The budget, nanoseconds.
    pub budget_ns: u64,
    /// Whether it is kept at every instant, at the cost of synchronous write protection.
    pub strict: bool,
}

/// How things stand with the budget, for the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetStatus {
    /// The budget.
    #[serde(flatten)]
    pub hold_up: HoldUp,
    /// How long an event is expected to take that comes now, nanoseconds.
    pub expected_ns: u64,
    /// Bytes that are expected to be written and not durable now.
    pub expected_bytes: u64,
    /// The most of them with which an event fits into the budget.
    pub allowed_bytes: u64,
    /// Strict: the bytes that are written and not durable now, as they are known, without those of an
    /// epoch on its way. Not known before an epoch is committed, and again after one that was not.
    pub dirty_bytes: Option<u64>,
    /// Strict: the most of them; whoever would write more is held.
    pub limit_bytes: Option<u64>,
    /// Strict: those of them that nobody can guard, and that count as written all the time.
    pub exposed_bytes: Option<u64>,
    /// Intervals in which the budget may not have been kept at some instant.
    pub violations: u64,
    /// How long it may not have been kept, nanoseconds.
    pub violated_ns: u64,
    /// Whether the program is held during epochs at present.
    pub holding: bool,
    /// How long it was held, nanoseconds.
    pub held_ns: u64,
}

/// What became of power events that the program outlived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// How many there were.
    pub count: u64,
    /// How many of them took longer than the budget, or failed.
    pub late: u64,
    /// From the event until everything was durable, the last one, nanoseconds.
    pub last_ns: u64,
    /// The longest.
    pub longest_ns: u64,
}

impl Events {
    /// One more, with its time, or without one where it failed.
    pub fn add(&mut self, took_ns: Option<u64>, budget_ns: Option<u64>) {
        self.count += 1;
        let Some(took) = took_ns else {
            self.late += 1;
            return;
        };
        self.late += u64::from(budget_ns.is_some_and(|budget| took > budget));
        self.last_ns = took;
        self.longest_ns = self.longest_ns.max(took);
    }
}

/// When an epoch was taken, on the keeper's clock (nanoseconds).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct When {
    /// It was begun.
    pub begun: u64,
    /// It was durable, or the program ran on after that.
    pub ended: u64,
    /// The program was held until then.
    pub held: bool,
    /// Everything was copied.
    pub base: bool,
    /// It was that of a power event.
    pub event: bool,
}

/// The budget of one subject.
#[derive(Clone, Debug)]
pub struct Watch {
    hold_up: Option<HoldUp>,
    model: Model,
    pacing: Option<Pacing>,
    /// Strict, since the first epoch.
    bound: Option<Bound>,
    begun: bool,
    /// Bytes of failed epochs that the next one takes.
    owed: u64,
    /// Epochs during which the program is still held, because it mapped too much anew.
    wild: u32,
    wear: Wear,
    /// What became of events.
    pub events: Events,
}

impl Watch {
    /// A watch that begins at `now`.
    #[must_use]
    pub fn new(hold_up: Option<HoldUp>, model: Model, max_wear: Option<u64>, now: u64) -> Self {
        Self {
            hold_up,
            model,
            pacing: hold_up.map(|h| Pacing::new(h.budget_ns)),
            bound: None,
            begun: false,
            owed: 0,
            wild: 0,
            wear: Wear::new(max_wear, now),
            events: Events::default(),
        }
    }

    /// The measured terms.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.model.figures()
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The wear.
    #[must_use]
    pub fn wear(&self) -> &Wear {
        &self.wear
    }

    /// The budget, nanoseconds.
    #[must_use]
    pub fn budget_ns(&self) -> Option<u64> {
        self.hold_up.map(|h| h.budget_ns)
    }

    /// What to do now, where the plan says that an epoch is due in `due` nanoseconds. After a failure
    /// only the plan counts, which waits longer each time.
    #[must_use]
    pub fn step(&self, now: u64, due: u64, failing: bool) -> Step {
        let due = due.max(self.wear.wait(now));
        let step = match &self.pacing {
            Some(pacing) if !failing => pacing.step(now, due, &self.figures()),
            _ if due == 0 => Step::Epoch,
            _ => Step::Wait(due),
        };
        match step {
            Step::Epoch if self.holds() => Step::Held,
            step => step,
        }
    }

    /// What to do when an epoch is wanted at once: writers are at the limit, or somebody asked.
    #[must_use]
    pub fn pressed(&self) -> Step {
        if self.holds() {
            Step::Held
        } else {
            Step::Epoch
        }
    }

    /// Strict: before the first epoch there is nothing to go back to, and a budget may have room for
    /// one commit only. After a failure more than half of the bound may be on its way, and a program
    /// that maps much anew is to do so between epochs only.
    fn holds(&self) -> bool {
        let strict = self.hold_up.is_some_and(|h| h.strict);
        let bad = !self.begun || self.wild > 0 || self.owed > 0;
        strict && (bad || self.bound.is_some_and(|b| b.held))
    }

    /// Strict: the most bytes that may be written between two stops. While an epoch is on its way, the
    /// other half of the bound is. What failed epochs had taken leaves less room.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.bound.map(|bound| bound.holds_at(self.owed))
    }

    /// Strict: so many bytes may have been written since the last stop at some instant since this was
    /// said last. Where that is more than the bound, or there is none, it is a violation, and the program
    /// is held during the next epochs.
    pub fn found(&mut self, most: u64) {
        let strict = self.hold_up.is_some_and(|h| h.strict);
        let Some(pacing) = self.pacing.as_mut().filter(|_| strict && self.begun) else {
            return;
        };
        if let Some(bound) = self.bound {
            if bound.covers(most, self.owed) {
                return;
            }
            self.wild = strict::WILD;
        }
        pacing.exceeded();
    }

    /// How often the budget was not kept.
    #[must_use]
    pub fn violations(&self) -> u64 {
        let pacing = self.pacing.as_ref();
        pacing.map_or(0, |pacing| pacing.counts().violations)
    }

    /// Strict: the least budget, nanoseconds, with which there would be a bound where so much is exposed;
    /// `None` where there is one.
    #[must_use]
    pub fn least_budget(&self, exposed: u64) -> Option<u64> {
        let hold_up = self.hold_up.filter(|h| h.strict)?;
        strict::bound(&self.figures(), hold_up.budget_ns, exposed).err()
    }

    /// Bytes were written ahead.
    pub fn wrote_ahead(&mut self, bytes: u64) {
        self.wear.also(bytes);
    }

    /// How much space is to be kept ready for the epoch of an event, bytes; `None` without a budget.
    #[must_use]
    pub fn ready_bytes(&self) -> Option<u64> {
        let figures = self.figures();
        let allowed = figures.allowed(self.hold_up?.budget_ns)?;
        let bytes = allowed.saturating_add(figures.tables.saturating_mul(2));
        Some(bytes.clamp(1 << 20, MOST_READY))
    }

    /// Learns from an epoch. So many bytes are exposed since.
    pub fn taken(&mut self, taken: &Taken, when: When, exposed: u64) {
        // Packing takes time that an event does not take.
        if taken.saved_bytes == 0 {
            self.model.add(&sample(taken));
        }
        self.wear.add(when.begun, taken.bytes_written);
        let figures = self.model.figures();
        self.begun = true;
        self.owed = 0;
        self.wild = self.wild.saturating_sub(1);
        self.bound = self
            .hold_up
            .filter(|h| h.strict)
            .and_then(|h| strict::bound(&figures, h.budget_ns, exposed).ok());
        let ns = |us: u64| us.saturating_mul(1000);
        let Some(pacing) = &mut self.pacing else {
            return;
        };
        let length = ns(taken
            .durable_us
            .max(if when.held { taken.stop_us } else { 0 }));
        let stopped = when.ended.saturating_sub(length);
        let durable = stopped.saturating_add(ns(taken.durable_us)).min(when.ended);
        let resumed = if when.held {
            when.ended
        } else {
            stopped
                .saturating_add(ns(taken.stop_us))
                .min(durable.saturating_sub(1))
        };
        let files = taken.steps.files_bytes.unwrap_or(0);
        pacing.taken(
            pacing::Taken {
                begun: when.begun,
                stopped,
                durable,
                resumed,
                bytes: taken.bytes_written.saturating_add(files),
                base: when.base,
                event: when.event,
            },
            &figures,
        );
    }

    /// An epoch failed, of which the next one takes so many bytes again. Writers are held at the bound
    /// until there is one.
    pub fn failed(&mut self, owed: u64) {
        self.owed = owed;
        if let Some(pacing) = &mut self.pacing {
            pacing.failed();
        }
    }

    /// How things stand; `None` without a budget.
    #[must_use]
    pub fn status(&self, now: u64) -> Option<BudgetStatus> {
        let (hold_up, pacing) = (self.hold_up?, self.pacing.as_ref()?);
        let (figures, counts) = (self.figures(), pacing.counts());
        Some(BudgetStatus {
            hold_up,
            expected_ns: pacing.cost(now, &figures),
            expected_bytes: pacing.expected(now),
            allowed_bytes: figures.allowed(hold_up.budget_ns).unwrap_or(0),
            dirty_bytes: None,
            limit_bytes: self.bound.map(|b| b.flush_at),
            exposed_bytes: None,
            violations: counts.violations,
            violated_ns: counts.violated,
            holding: pacing.holding(),
            held_ns: counts.held,
        })
    }
}

/// What an epoch says of the terms of the model.
fn sample(taken: &Taken) -> Sample {
    let steps = &taken.steps;
    let ns = |us: u64| us.saturating_mul(1000);
    // The first flush with no bytes would have taken as long as the second.
    let bytes = steps.flush_us.saturating_sub(steps.record_us);
    let transfer = [steps.precopy_us, steps.copy_us, steps.write_us, bytes];
    let pages = taken.pages.saturating_mul(PAGE_SIZE as u64);
    Sample {
        freeze: ns(steps.freeze_us),
        scan: ns(steps.scan_us),
        files: ns(steps.files_us),
        transfer: ns(transfer.iter().sum()),
        bytes: taken.bytes_written,
        tables: taken.bytes_written.saturating_sub(pages),
        flush: ns(steps.record_us),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Steps;

    const MS: u64 = 1_000_000;

    fn taken(pages: u64) -> Taken {
        Taken {
            epoch: 1,
            time_ns: 1,
            processes: 1,
            threads: 1,
            stop_us: 1_000,
            durable_us: 5_000,
            pages,
            bytes_written: pages * 4096 + 8192,
            saved_bytes: 0,
            steps: Steps {
                freeze_us: 100,
                scan_us: 500,
                copy_us: 400,
                write_us: 600,
                flush_us: 2_000,
                record_us: 1_000,
                ..Steps::default()
            },
        }
    }

    fn when(ended: u64) -> When {
        When {
            begun: ended - 6 * MS,
            ended,
            held: false,
            base: false,
            event: false,
        }
    }

    #[test]
    fn an_epoch_teaches_the_model_and_files_count_as_residue() {
        let hold_up = HoldUp {
            budget_ns: 50 * MS,
            strict: false,
        };
        let model = Model::new(Figures::default());
        let mut watch = Watch::new(Some(hold_up), model, None, 0);
        watch.taken(&taken(1000), when(100 * MS), 0);
        let figures = watch.figures();
        assert_eq!((figures.freeze_ns, figures.scan_ns), (MS / 10, MS / 2));
        assert_eq!((figures.flush_ns, figures.tables), (MS, 8192));
        assert_eq!(figures.cost(0), watch.figures().floor());
        watch.taken(&taken(1000), when(200 * MS), 0);
        let quiet = watch.status(210 * MS).unwrap();
        assert_eq!(quiet.violations, 0);
        assert!(quiet.expected_bytes > 0 && quiet.expected_ns > figures.floor());
        let mut big = taken(1000);
        big.steps.files_bytes = Some(1 << 30);
        watch.taken(&big, when(300 * MS), 0);
        assert_eq!(watch.status(310 * MS).unwrap().violations, 1);
    }

    fn strict_watch() -> Watch {
        let hold_up = HoldUp {
            budget_ns: 500 * MS,
            strict: true,
        };
        let mut watch = Watch::new(Some(hold_up), Model::new(Figures::default()), None, 0);
        assert_eq!((watch.limit(), watch.pressed()), (None, Step::Held));
        watch.taken(&taken(1000), when(100 * MS), 0);
        assert_eq!(watch.pressed(), Step::Epoch);
        watch
    }

    #[test]
    fn strictly_writers_are_held_after_a_failure_too_with_less_room() {
        let mut watch = strict_watch();
        let limit = watch.limit().unwrap();
        watch.failed(0);
        assert_eq!((watch.limit(), watch.pressed()), (Some(limit), Step::Epoch));
        assert_eq!(watch.status(0).unwrap().violations, 1, "said at once");
        let all = watch.bound.unwrap().limit;
        watch.failed(all - 4096);
        // More than half may be on its way to the medium: nothing may be written meanwhile.
        assert_eq!((watch.limit(), watch.pressed()), (Some(4096), Step::Held));
        watch.failed(all + 1);
        assert_eq!(watch.limit(), Some(0));
        watch.taken(&taken(1000), when(200 * MS), 0);
        assert_eq!((watch.limit(), watch.pressed()), (Some(limit), Step::Epoch));
        assert_eq!(watch.status(0).unwrap().violations, 1, "it was counted");
    }

    #[test]
    fn strictly_more_than_the_bound_is_a_violation_at_once() {
        let mut watch = strict_watch();
        let most = watch.bound.unwrap().flush_at;
        watch.found(most);
        assert_eq!(watch.status(0).unwrap().violations, 0);
        for _ in 0..2 {
            watch.found(most + 1);
            assert_eq!(watch.status(0).unwrap().violations, 1, "one interval");
        }
        let mut now = 200 * MS;
        while watch.pressed() == Step::Held {
            watch.taken(&taken(1), when(now), 0);
            now += 100 * MS;
        }
        assert_eq!(now, (200 + 100 * u64::from(strict::WILD)) * MS);
    }

    #[test]
    fn strictly_there_is_no_bound_where_too_much_is_exposed() {
        let mut watch = strict_watch();
        let much = watch.bound.unwrap().limit;
        assert_eq!(watch.least_budget(0), None);
        assert!(watch.least_budget(2 * much).unwrap() > 500 * MS);
        watch.taken(&taken(1000), when(200 * MS), 2 * much);
        assert_eq!(watch.limit(), None);
        let before = watch.status(0).unwrap().violations;
        watch.found(0);
        assert_eq!(watch.status(0).unwrap().violations, before + 1);
    }

    #[test]
    fn without_a_budget_the_plan_counts_and_wear_may_stretch_it() {
        let model = Model::new(Figures::default());
        let mut watch = Watch::new(None, model, Some(86_400 * 4096), 0);
        assert_eq!(watch.step(0, 5, false), Step::Wait(5));
        assert_eq!(watch.step(0, 0, false), Step::Epoch);
        watch.taken(&taken(1), when(100 * MS), 0);
        watch.taken(&taken(1), when(200 * MS), 0);
        // Three blocks at one a second, from the beginning of the epoch on.
        assert_eq!(watch.step(200 * MS, 0, false), Step::Wait(2_994 * MS));
        assert_eq!(watch.status(0), None);
    }

    #[test]
    fn events_are_counted_and_late_ones_among_them() {
        let mut events = Events::default();
        events.add(Some(5), Some(10));
        events.add(Some(11), Some(10));
        events.add(None, Some(10));
        events.add(Some(7), None);
        let expected = Events {
            count: 4,
            late: 2,
            last_ns: 7,
            longest_ns: 11,
        };
        assert_eq!(events, expected);
    }
}
