//! A machine whose clock, medium and program are simulated: for tests of the policy, and for
//! planning machines that are not there.
//!
//! Everything comes from a seed; the same seed gives the same history. The truth (how much is
//! written and not durable at each instant, when the epoch on its way will be durable) is known
//! here, and nobody tells the policy.

use super::model::{FLUSHES, Figures, MIB, Model, Sample};
use super::pacing::{Pacing, Step, Taken};
use super::strict::{self, Bound};
use crate::plan::Plan;

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1_000 * MS;

/// Numbers from a seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// From `low` to `high`, evenly on a logarithmic scale of powers of two.
    pub fn scale(&mut self, low: u64, high: u64) -> u64 {
        let steps = u64::from((high / low.max(1)).max(1).ilog2());
        let base = low << self.below(steps + 1);
        (base + self.below(base.max(1))).min(high)
    }
}

/// A program.
#[derive(Clone, Debug)]
pub struct Load {
    /// Bytes that it writes to again and again.
    pub working_set: u64,
    /// Bytes a second, and until when.
    pub phases: Vec<(u64, u64)>,
    /// Bytes that nobody can guard.
    pub exposed: u64,
    /// In one tick out of so many (0: never) it maps and writes up to so many bytes, which nobody
    /// guards before the next tick.
    pub maps: (u64, u64),
    /// Until all threads stand still.
    pub freeze: u64,
    /// The scan.
    pub scan: u64,
}

/// A medium.
#[derive(Clone, Debug)]
pub struct Disk {
    /// A usual flush.
    pub flush: u64,
    /// One flush in so many stalls …
    pub stall_one_in: u64,
    /// … for so long.
    pub stall: u64,
    /// Copying and writing a MiB.
    pub mib: u64,
}

/// What is to be simulated.
#[derive(Clone, Debug)]
pub struct Scene {
    pub load: Load,
    pub disk: Disk,
    pub budget: u64,
    pub interval: u64,
    pub strict: bool,
    /// One epoch in so many fails; 0 for none.
    pub fails_one_in: u64,
    pub length: u64,
    pub tick: u64,
    /// Whether what is mapped anew is looked for: a planted error where it is not.
    pub looks: bool,
    /// What the policy believes that a commit flushes: a planted error where it is not [`FLUSHES`].
    pub believes: u64,
}

/// An epoch between its stop and its being durable.
#[derive(Clone, Copy, Debug)]
struct Way {
    stopped: u64,
    resumed: u64,
    durable: u64,
    bytes: u64,
    sample: Sample,
    fails: bool,
}

/// One instant, for the oracle.
#[derive(Clone, Copy, Debug)]
struct Instant {
    at: u64,
    /// Written and not captured.
    dirty: u64,
    /// When the epoch on its way is durable; 0 without one.
    durable: u64,
    /// Not running.
    stopped: bool,
}

/// A power cut: how long it took in truth, and by the measured figures.
#[derive(Clone, Copy, Debug)]
struct Cut {
    at: u64,
    truth: u64,
    said: u64,
    stopped: bool,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub epochs: u64,
    /// Intervals in which the budget was not kept, by the oracle …
    pub broken: u64,
    /// … and those of them that the policy did not count.
    pub hidden: Vec<u64>,
    /// Violations that the policy counted.
    pub counted: u64,
    /// Nanoseconds that the program was held.
    pub held: u64,
    /// Nanoseconds since the first epoch was durable, and those of them that the program ran.
    pub observed: u64,
    pub ran: u64,
    /// Power cuts, those that took longer than the budget, and those of the latter that neither a
    /// counted violation nor the medium explains.
    pub cuts: u64,
    pub late: u64,
    pub unexplained: u64,
    /// Strict: instants at which more than the limit was not durable, and no violation was counted.
    pub over_limit: u64,
    pub bytes_written: u64,
    pub largest_residue: u64,
    /// Of everything that happened, for replays.
    pub digest: u64,
    pub floor: u64,
    pub allowed: u64,
}

pub struct Simulation {
    scene: Scene,
    random: Random,
    now: u64,
    dirty: u64,
    way: Option<Way>,
    model: Model,
    pacing: Pacing,
    plan: Plan,
    bound: Option<Bound>,
    /// Bytes of a failed epoch that the next one takes.
    owed: u64,
    wild: u32,
    /// Violations before this interval.
    violations: u64,
    history: Vec<Instant>,
    /// Power cuts that are not judged yet.
    cuts: Vec<Cut>,
    begun: bool,
    /// What was not durable when the limit was last lowered below it.
    over_before: u64,
    out: Outcome,
}

impl Simulation {
    pub fn new(scene: Scene, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut model = Model::new(Figures {
            flushes: scene.believes,
            ..Figures::default()
        });
        let flushes: Vec<u64> = (0..100).map(|_| flush(&scene.disk, &mut random)).collect();
        let mib: Vec<u64> = (0..8)
            .map(|_| transfer(&scene.disk, MIB, &mut random))
            .collect();
        model.calibrate(&flushes, &mib);
        Self {
            pacing: Pacing::new(scene.budget),
            plan: Plan::new(scene.interval, 0),
            scene,
            random,
            now: 0,
            dirty: 0,
            way: None,
            model,
            bound: None,
            owed: 0,
            wild: 0,
            violations: 0,
            history: Vec::new(),
            cuts: Vec::new(),
            begun: false,
            over_before: 0,
            out: Outcome::default(),
        }
    }

    pub fn run(mut self) -> Outcome {
        while self.now < self.scene.length {
            self.tick();
        }
        let figures = self.model.figures();
        self.out.floor = figures.floor();
        self.out.allowed = figures.allowed(self.scene.budget).unwrap_or(0);
        let counts = self.pacing.counts();
        self.out.counted = counts.violations;
        self.out.held = counts.held;
        self.out
    }

    fn tick(&mut self) {
        self.arrive();
        if self.way.is_none() {
            self.decide();
        }
        let stopped = self.way.is_some_and(|w| self.now < w.resumed);
        if !stopped {
            self.write();
        }
        if self.begun && self.scene.strict && self.scene.looks {
            self.look();
        }
        if self.begun {
            self.out.observed += self.scene.tick;
            self.observe(stopped);
        }
        self.now += self.scene.tick;
    }

    /// The epoch on its way is durable, or has failed.
    fn arrive(&mut self) {
        let Some(way) = self.way.filter(|w| self.now >= w.durable) else {
            return;
        };
        self.way = None;
        if way.fails {
            self.pacing.failed();
            if self.scene.strict && way.bytes % 2 == 0 {
                // A full store: the next epoch takes what this one had.
                self.owed = way.bytes - self.exposed();
                self.plan.failed(self.now, false);
                return;
            }
            // What it took counts as written again, and so does all else: tracking begins anew.
            (self.dirty, self.owed) = (self.scene.load.working_set, 0);
            self.plan.failed(self.now, true);
            self.over_before = u64::MAX;
            return;
        }
        self.model.add(&way.sample);
        let figures = self.model.figures();
        let taken = Taken {
            begun: way.stopped,
            base: false,
            event: false,
            stopped: way.stopped,
            durable: way.durable,
            resumed: way.resumed,
            bytes: way.bytes,
        };
        self.pacing.taken(taken, &figures);
        let violations = self.pacing.counts().violations;
        let counted = violations > std::mem::replace(&mut self.violations, violations);
        self.judge(&way, counted);
        self.plan.committed(way.stopped, self.now);
        if self.scene.strict {
            self.bound = strict::bound(&figures, self.scene.budget, self.exposed()).ok();
            self.over_before = self.dirty + self.exposed();
            self.owed = 0;
            self.wild = self.wild.saturating_sub(1);
        }
        self.out.epochs += 1;
        if self.begun {
            self.out.bytes_written += way.bytes;
        }
        self.out.digest = self.out.digest.rotate_left(7) ^ way.bytes ^ way.durable;
        self.begun = true;
    }

    fn decide(&mut self) {
        let figures = self.model.figures();
        let mut step = self
            .pacing
            .step(self.now, self.plan.wait(self.now), &figures);
        if let Some(bound) = self.bound {
            let full = self.unsaved() >= bound.hold_at && self.plan.failures() == 0;
            let held = bound.held || self.wild > 0 || self.owed > 0;
            step = match full || self.plan.wait(self.now) == 0 {
                true if held => Step::Held,
                true => Step::Epoch,
                false => Step::Wait(self.scene.tick),
            };
        }
        match step {
            Step::Wait(_) => {}
            // The residue is to be bounded from the first moment on.
            Step::Epoch if self.scene.strict && !self.begun => self.begin(true),
            Step::Epoch => self.begin(false),
            Step::Held => self.begin(true),
        }
    }

    fn begin(&mut self, held: bool) {
        let bytes = self.unsaved() + self.owed;
        (self.dirty, self.owed) = (0, 0);
        let (disk, random) = (&self.scene.disk, &mut self.random);
        let jitter = |random: &mut Random, ns: u64| ns + random.below(ns / 4 + 1);
        let mut sample = Sample {
            freeze: jitter(random, self.scene.load.freeze),
            scan: jitter(random, self.scene.load.scan),
            transfer: transfer(disk, bytes, random),
            bytes,
            tables: 16 << 10,
            flush: flush(disk, random),
            ..Sample::default()
        };
        let second = flush(disk, random);
        let copied = self.now + sample.freeze + sample.scan + sample.transfer / 4;
        let durable = copied + sample.transfer * 3 / 4 + sample.flush + second;
        let fails = self.scene.fails_one_in;
        let fails = fails > 0 && random.below(fails) == 0;
        sample.flush = second;
        self.way = Some(Way {
            stopped: self.now,
            resumed: if held { durable } else { copied },
            durable,
            bytes,
            sample,
            fails,
        });
        self.out.largest_residue = self.out.largest_residue.max(bytes);
    }

    /// The program writes for a tick.
    fn write(&mut self) {
        let load = &self.scene.load;
        let phase = load.phases.iter().find(|(_, until)| self.now < *until);
        let rate = phase.map_or(0, |(rate, _)| *rate);
        let bytes = u128::from(rate) * u128::from(self.scene.tick) / u128::from(SECOND);
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        // The more of the working set is dirty, the more is written again.
        let clean = load.working_set.saturating_sub(self.dirty);
        let share = u128::from(bytes) * u128::from(clean) / u128::from(load.working_set.max(1));
        let mut new = u64::try_from(share).unwrap_or(u64::MAX);
        if let Some(bound) = self.bound {
            new = new.min(bound.holds_at(self.owed).saturating_sub(self.unsaved()));
        }
        self.dirty += new;
        let (one_in, most) = self.scene.load.maps;
        if one_in > 0 && self.random.below(one_in) == 0 {
            self.dirty += self.random.below(most);
        }
        if self.begun {
            self.out.ran += self.scene.tick;
        }
    }

    /// Bytes that nobody can guard, which count as written all the time.
    fn exposed(&self) -> u64 {
        if self.scene.strict {
            self.scene.load.exposed
        } else {
            0
        }
    }

    /// What the next epoch takes, but for what is owed to it.
    fn unsaved(&self) -> u64 {
        self.dirty + self.exposed()
    }

    /// What the guard has found is counted at once.
    fn look(&mut self) {
        let most = self.unsaved();
        if let Some(bound) = self.bound {
            if bound.covers(most, self.owed) {
                return;
            }
            self.wild = strict::WILD;
        }
        self.pacing.exceeded();
    }

    fn observe(&mut self, stopped: bool) {
        let now = Instant {
            at: self.now,
            // After a failure everything must be copied again.
            dirty: match self.way {
                Some(way) if way.fails => {
                    self.scene.load.working_set.max(way.bytes + self.unsaved())
                }
                _ => self.unsaved() + self.owed,
            },
            durable: self.way.map_or(0, |w| w.durable),
            stopped,
        };
        self.history.push(now);
        if let Some(bound) = self.bound {
            let residue = self.unsaved() + self.owed + self.way.map_or(0, |w| w.bytes);
            let before = self.over_before.saturating_add(bound.flush_at);
            let counted = self.pacing.counts().violations > self.violations;
            self.out.over_limit += u64::from(residue > bound.limit.max(before) && !counted);
        }
        if self.random.below(64) == 0 {
            self.cut(&now);
        }
    }

    /// The power fails now: how long it would truly take, and how long by the figures.
    fn cut(&mut self, now: &Instant) {
        let (disk, random) = (&self.scene.disk, &mut self.random);
        let wait = now.durable.saturating_sub(now.at);
        let figures = Figures {
            flushes: FLUSHES,
            ..self.model.figures()
        };
        self.out.cuts += 1;
        let (truth, said) = if now.stopped {
            (wait, wait)
        } else {
            let load = &self.scene.load;
            let commit: u64 = (0..FLUSHES).map(|_| flush(disk, random)).sum();
            let own = transfer(disk, now.dirty, random) + commit;
            let own = own + load.freeze * 5 / 4 + load.scan * 5 / 4;
            (wait + own, wait + figures.cost(now.dirty))
        };
        self.cuts.push(Cut {
            at: now.at,
            truth,
            said,
            stopped: now.stopped,
        });
    }

    /// The oracle: was the budget kept at each instant before this stop? By what is true of what was
    /// written and when, with the measured figures for an event that did not happen.
    fn judge(&mut self, way: &Way, counted: bool) {
        let figures = Figures {
            flushes: FLUSHES,
            ..self.model.figures()
        };
        let budget = self.scene.budget;
        let over = |at: u64, stopped: bool| at < way.stopped || stopped;
        let (history, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.history)
            .into_iter()
            .partition(|i| over(i.at, i.stopped));
        self.history = later;
        let (mut broke, mut then) = (false, (0, 0));
        for now in history.iter().rev() {
            // While an epoch is on its way the event waits for it, and the program writes on.
            if then.0 != now.durable {
                then = (now.durable, now.dirty);
            }
            let dirty = if now.durable > 0 { then.1 } else { now.dirty };
            let wait = now.durable.saturating_sub(now.at);
            let own = if now.stopped { 0 } else { figures.cost(dirty) };
            broke |= wait + own > budget;
        }
        self.out.broken += u64::from(broke);
        if broke && !counted {
            self.out.hidden.push(way.stopped);
        }
        let (cuts, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.cuts)
            .into_iter()
            .partition(|c| over(c.at, c.stopped));
        self.cuts = later;
        for cut in cuts {
            let late = cut.truth > budget;
            self.out.late += u64::from(late);
            // Late although the figures said that it fits: the medium was worse than ever before.
            let medium = cut.said <= budget;
            self.out.unexplained += u64::from(late && !counted && !medium);
        }
    }
}

fn flush(disk: &Disk, random: &mut Random) -> u64 {
    let mut ns = disk.flush + random.below(disk.flush / 2 + 1);
    if disk.stall_one_in > 0 && random.below(disk.stall_one_in) == 0 {
        ns += disk.stall;
    }
    ns
}

fn transfer(disk: &Disk, bytes: u64, random: &mut Random) -> u64 {
    let ns = u128::from(bytes) * u128::from(disk.mib) / u128::from(MIB);
    let ns = u64::try_from(ns).unwrap_or(u64::MAX);
    ns + random.below(ns / 8 + 1)
}
