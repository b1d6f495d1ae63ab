//! Judges what the restartable kernel says.
//!
//! # What must hold
//! - What tasks say is numbered over all of them, and no number is missing or said anew; only the lines of
//!   the last turn before a reset may come again, as they were, and marked so.
//! - Each task's own numbers go on as if nothing had happened: counters by one, primes that are the next
//!   primes, stirred numbers that are what the same stirring comes to here.
//! - The counters with which tasks come back are never behind what was seen before.
//! - Each flipped bit that must be found is reported by the next scrub that ends: at its place, or else
//!   among those that opening the heap had corrected before, which are only counted. Nothing is reported
//!   where no bit flipped; nothing is lost.
//! - The kernel says nothing else. A line that does not end with ` .` was cut short by a reset, which must
//!   follow.

use super::flips::{Flip, Part, parity_of, part};
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

#[path = "../../../../examples/restartable-kernel/src/mixer.rs"]
mod mixer;

/// What tasks can be, as the kernel numbers them.
const TALLY: u64 = 0;
const PRIMES: u64 = 1;
const MIXER: u64 = 2;
/// The task that makes rays says nothing as a task.
const RAY: u64 = 3;
/// How many primes there are from one line to the next.
const PRIMES_A_LINE: u64 = 50;

/// A line of a task: its number, the task, two words.
type Said = [u64; 4];

/// What is known so far.
#[derive(Default)]
pub struct Judge {
    boots: u64,
    times: u64,
    replayed: u64,
    reported: u64,
    flips: usize,
    rays: u64,
    /// All lines of tasks, in order.
    said: Vec<Said>,
    /// What each task is, and the last counter that was seen of it.
    tasks: BTreeMap<u64, (u64, u64)>,
    /// The first word of the last line of each task.
    last: BTreeMap<u64, u64>,
    primes: Vec<u64>,
    mixer: Box<mixer::Mixer>,
    archive: Option<Range<usize>>,
    /// Lines and superblocks that the next scrub must report.
    due: BTreeSet<Part>,
    /// Those that it may report.
    possible: BTreeSet<Part>,
    /// The bit that a ray was announced for, since the machine came up.
    ray: Option<Part>,
    /// Places that were reported since the last scrub ended.
    found: BTreeSet<usize>,
    /// Corrections that were counted when the heap was opened, and that nothing explains yet.
    counted: u64,
    /// The number of the last line that came again, 0 before; none after the first new line.
    again: Option<u64>,
}

impl Judge {
    /// Where the kernel's archive is, once it told.
    pub fn archive(&self) -> Option<Range<usize>> {
        self.archive.clone()
    }

    /// These bits flipped while the machine was off.
    pub fn flipped(&mut self, flips: &[Flip]) {
        self.flips += flips.len();
        for flip in flips {
            let to = if flip.must {
                &mut self.due
            } else {
                &mut self.possible
            };
            to.insert(flip.part);
        }
    }

    /// What all this was.
    pub fn summary(&self) -> String {
        let Self {
            times,
            replayed,
            flips,
            rays,
            reported,
            ..
        } = self;
        let lines = self.said.len();
        format!(
            "came up {times} times, {replayed} commits replayed; {flips} bits flipped while it was off and \
             {rays} while it ran, {reported} corrections reported; {lines} lines of tasks, none missing"
        )
    }

    /// What must be reported may have been, by a kernel that was reset before it could say so.
    pub fn may_have_been_reported(&mut self) {
        self.possible.append(&mut self.due);
    }

    /// Hears all that the kernel said from switching on to switching off.
    pub fn hear(&mut self, text: &str) -> Result<()> {
        // What was reported before the machine came up again was before its last words.
        self.found.clear();
        self.ray_may_have_hit();
        let mut cut = None;
        for line in text.split('\n') {
            let line = line.trim_end_matches('\r');
            let Some(whole) = line.strip_suffix(" .") else {
                if !line.is_empty() {
                    cut = Some(line);
                }
                continue;
            };
            if let Some(cut) = cut.take() {
                ensure!(whole.starts_with("boot "), "a line is broken: {cut:?}");
            }
            self.line(whole)
                .with_context(|| format!("the kernel said {whole:?}"))?;
        }
        self.may_have_been_reported();
        Ok(())
    }

    fn line(&mut self, line: &str) -> Result<()> {
        let mut words = line.split(' ');
        let what = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        match (what, numbers.as_slice()) {
            ("boot", &[boot, created, replayed, _, corrected]) => {
                self.boot(boot, created == 1, corrected)?;
                self.replayed += replayed;
            }
            ("corrected", &[place]) => self.corrected(usize::try_from(place)?)?,
            ("scrubbed", &[_]) => self.scrubbed()?,
            ("archive", &[at, len]) => {
                let at = usize::try_from(at)?;
                self.archive = Some(at..at + usize::try_from(len)?);
            }
            ("task", &[task, program, counter]) => self.task(task, program, counter)?,
            ("ray", &[place, _]) => {
                self.rays += 1;
                self.ray = Some(part(usize::try_from(place)?));
            }
            ("say", &[number, task, a, b]) => {
                self.again = None;
                self.says([number, task, a, b])?;
            }
            ("again", &[number, task, a, b]) => self.says_again([number, task, a, b])?,
            _ => bail!("nobody expects that"),
        }
        Ok(())
    }

    fn boot(&mut self, boot: u64, created: bool, corrected: u64) -> Result<()> {
        ensure!(boot > self.boots, "it came up {} times before", self.boots);
        ensure!(!created || self.boots == 0, "it began anew");
        let superblocks = |part: &&Part| matches!(part, Part::Superblock(_));
        let due = self.due.iter().filter(superblocks).count() as u64;
        ensure!(
            corrected >= due,
            "{due} flips in the superblock, {corrected} corrections"
        );
        self.reported += corrected;
        self.counted = corrected - due;
        self.ray_may_have_hit();
        self.found.clear();
        self.again = Some(0);
        self.times += 1;
        self.boots = boot;
        Ok(())
    }

    /// A ray that was announced before a reset may have come, or not.
    fn ray_may_have_hit(&mut self) {
        self.possible.extend(self.ray.take());
    }

    /// A correction must have a reason: a flip of this line, or of one with this parity.
    fn corrected(&mut self, place: usize) -> Result<()> {
        self.reported += 1;
        self.found.insert(place);
        let flips = self.due.iter().chain(&self.possible).chain(&self.ray);
        let reason = flips.into_iter().any(|flip| match flip {
            Part::Line(line) => *line == place || parity_of(*line) == place,
            Part::Superblock(_) | Part::Other => false,
        });
        ensure!(reason, "no bit had flipped there");
        Ok(())
    }

    fn scrubbed(&mut self) -> Result<()> {
        for flip in self.due.iter().chain(&self.ray) {
            if let Part::Line(line) = flip
                && !self.found.contains(line)
            {
                // Where a commit is written again, its columns are corrected on the way.
                let counted = self.counted.checked_sub(1);
                self.counted = counted.with_context(|| {
                    format!("a bit had flipped in the line at {line}, which was not reported")
                })?;
            }
        }
        self.counted = 0;
        self.due.clear();
        self.possible.clear();
        self.found.clear();
        self.ray = None;
        Ok(())
    }

    fn task(&mut self, task: u64, program: u64, counter: u64) -> Result<()> {
        ensure!(program <= RAY, "a strange program");
        if let Some((known, seen)) = self.tasks.insert(task, (program, counter)) {
            ensure!(known == program, "it was program {known}");
            ensure!(counter >= seen, "its counter was {seen}");
        }
        Ok(())
    }

    fn says(&mut self, said: Said) -> Result<()> {
        let [number, task, a, b] = said;
        let before = self.said.len() as u64;
        ensure!(number == before + 1, "the last line had number {before}");
        let known = self.tasks.get_mut(&task).context("a strange task")?;
        let last = self.last.insert(task, a).unwrap_or(0);
        match known.0 {
            TALLY => {
                ensure!(a == last + 1, "it had counted to {last}");
                ensure!(a >= known.1, "its counter was {}", known.1);
                known.1 = a;
            }
            PRIMES => {
                ensure!(a == last + PRIMES_A_LINE, "its last was number {last}");
                let prime = self.prime(a);
                ensure!(prime == Some(b), "that prime is {prime:?}");
            }
            MIXER => {
                ensure!(a == last + 1, "its last was number {last}");
                let right = self.mixer.next();
                ensure!(right == (a, b), "it comes to {right:?}");
            }
            other => bail!("program {other} says nothing"),
        }
        self.said.push(said);
        Ok(())
    }

    /// A line of the last turn before a reset: known, or the next one.
    fn says_again(&mut self, said: Said) -> Result<()> {
        let again = self.again.context("not when the machine comes up")?;
        ensure!(
            again == 0 || said[0] == again + 1,
            "the one before was {again}"
        );
        self.again = Some(said[0]);
        let place = usize::try_from(said[0])?.wrapping_sub(1);
        match self.said.get(place) {
            Some(known) => ensure!(*known == said, "it was {known:?}"),
            None => self.says(said)?,
        }
        Ok(())
    }

    /// The prime with this number, counted from 1; none where that would take for ever.
    fn prime(&mut self, number: u64) -> Option<u64> {
        let place = usize::try_from(number.checked_sub(1)?).ok()?;
        let mut limit = 1 << 18;
        while self.primes.len() <= place && limit <= 1 << 28 {
            self.primes = sieve(limit);
            limit *= 4;
        }
        self.primes.get(place).copied()
    }
}

fn sieve(limit: usize) -> Vec<u64> {
    let mut composite = vec![false; limit];
    let mut primes = Vec::new();
    for n in 2..limit {
        if !composite[n] {
            primes.push(n as u64);
            for multiple in (n.saturating_mul(n)..limit).step_by(n) {
                composite[multiple] = true;
            }
        }
    }
    primes
}

/// Whether in this text every task goes on, with at least so many lines, and a ray was found.
pub fn works(text: &str, lines: usize) -> bool {
    let tasks: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("task ")?.split(' ').next())
        .collect();
    let of = |task: &str| {
        let from_it = |line: &&str| {
            let mut words = line.split(' ');
            words.next() == Some("say") && words.nth(1) == Some(task)
        };
        text.lines().filter(from_it).count()
    };
    let quiet = tasks.iter().filter(|task| of(task) < lines).count();
    // Only the task that makes rays is quiet.
    let ray = text.find("\nray ").map(|at| &text[at..]);
    !tasks.is_empty() && quiet == 1 && ray.is_some_and(|rest| rest.contains("\nscrubbed "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "\nboot 1 created 1 replayed 0 discarded 0 corrected 0 .\nscrubbed 16640 .\n\
        archive 689664 65536 .\ntask 0 0 0 .\ntask 1 1 0 .\ntask 2 3 0 .\n\
        say 1 0 1 0 .\nsay 2 1 50 229 .\nsay 3 0 2 0 .\n";
    const SECOND: &str = "\nboot 2 created 0 replayed 1 discarded 0 corrected 0 .\n";
    const TASKS: &str = "scrubbed 16640 .\ntask 0 0 2 .\ntask 1 1 1 .\ntask 2 3 1 .\n";

    /// What is wrong with these words of two times that the machine was on, with flips in between.
    fn judge(first: &str, flips: &[Flip], second: &str) -> Option<String> {
        let mut judge = Judge::default();
        let heard = judge.hear(first).and_then(|()| {
            judge.flipped(flips);
            judge.hear(second)
        });
        heard.err().map(|error| format!("{error:#}"))
    }

    fn wrong(second: &str, why: &str) {
        let found = judge(FIRST, &[], &format!("{SECOND}{TASKS}{second}"));
        assert!(found.as_ref().is_some_and(|w| w.contains(why)), "{found:?}");
    }

    #[test]
    fn what_goes_on_is_well() {
        assert_eq!(judge(FIRST, &[], SECOND), None);
        let on = "again 3 0 2 0 .\nsay 4 0 3 0 .\nsay 5 1 100 541 .\nsay 6 0 4";
        assert_eq!(judge(FIRST, &[], &format!("{SECOND}{TASKS}{on}")), None);
        let unheard = "again 3 0 2 0 .\nagain 4 0 3 0 .\nsay 5 1 100 541 .\n";
        assert_eq!(
            judge(FIRST, &[], &format!("{SECOND}{TASKS}{unheard}")),
            None
        );
        let reset = format!("{FIRST}say 4 0 3{SECOND}{TASKS}again 4 0 3 0 .\n");
        assert_eq!(judge(&reset, &[], ""), None);
    }

    #[test]
    fn what_goes_back_or_skips_is_found() {
        wrong("say 3 0 2 0 .\n", "the last line had number 3");
        wrong("say 5 0 3 0 .\n", "the last line had number 3");
        wrong("say 4 0 2 0 .\n", "it had counted to 2");
        wrong("say 4 0 4 0 .\n", "it had counted to 2");
        wrong("say 4 1 50 229 .\n", "its last was number 50");
        wrong("say 4 1 100 547 .\n", "that prime is Some(541)");
        wrong("again 3 0 3 0 .\n", "it was [3, 0, 2, 0]");
        wrong("again 1 0 1 0 .\nagain 3 0 2 0 .\n", "the one before was 1");
        wrong("say 4 0 3 0 .\nagain 4 0 3 0 .\n", "not when the machine");
        wrong("task 0 0 1 .\n", "its counter was 2");
        wrong("panic at the disco .\n", "nobody expects that");
        wrong("say 4 0 3\nsay 5 0 4 0 .\n", "a line is broken");
        wrong(FIRST, "it came up 2 times");
        let anew = SECOND.replace("created 0", "created 1");
        assert!(judge(FIRST, &[], &anew).is_some());
    }

    #[test]
    fn a_wrong_stirring_is_found() {
        let first = FIRST.replace("task 2 3 0", "task 2 3 0 .\ntask 3 2 0");
        let (round, right) = mixer::Mixer::default().next();
        let say = |state: u64| format!("{first}say 4 3 {round} {state} .\n");
        assert_eq!(judge(&say(right), &[], ""), None);
        let found = judge(&say(right ^ 1), &[], "").unwrap_or_default();
        assert!(found.contains("it comes to"), "{found}");
    }

    #[test]
    fn flips_must_be_reported_and_reports_must_have_a_reason() {
        let line = Part::Line(700_032);
        let hit = |part, must| [Flip { part, must }];
        let report = |corrected: u64, places: &str| {
            let boot = SECOND.replace("corrected 0", &format!("corrected {corrected}"));
            format!("{boot}{places}{TASKS}")
        };
        let found = "corrected 700032 .\n";
        assert_eq!(judge(FIRST, &hit(line, true), &report(0, found)), None);
        assert!(judge(FIRST, &hit(line, true), &report(0, "")).is_some());
        assert_eq!(judge(FIRST, &hit(line, true), &report(1, "")), None);
        assert_eq!(judge(FIRST, &hit(line, false), &report(0, found)), None);
        assert_eq!(judge(FIRST, &hit(line, false), &report(0, "")), None);
        assert!(judge(FIRST, &[], &report(0, found)).is_some());
        assert!(judge(FIRST, &hit(line, true), &report(0, "lost 700032 .\n")).is_some());
        let superblock = hit(Part::Superblock(1), true);
        assert_eq!(judge(FIRST, &superblock, &report(1, "")), None);
        assert!(judge(FIRST, &superblock, &report(0, "")).is_some());
        let both = [superblock, hit(line, true)].concat();
        assert!(judge(FIRST, &both, &report(1, "")).is_some());
        let ray = format!("{FIRST}ray 700033 4 .\n");
        assert_eq!(judge(&format!("{ray}{found}scrubbed 1 .\n"), &[], ""), None);
        assert!(judge(&format!("{ray}scrubbed 1 .\n"), &[], "").is_some());
        // A reset came: maybe before the ray.
        assert_eq!(judge(&ray, &[], &report(0, found)), None);
        assert_eq!(judge(&ray, &[], &report(0, "")), None);
    }

    #[test]
    fn only_a_kernel_all_of_whose_tasks_go_on_works() {
        let ray = "ray 700033 4 .\ncorrected 700032 .\nscrubbed 1 .\n";
        assert!(works(&format!("{FIRST}{ray}"), 1));
        assert!(!works(&format!("{FIRST}{ray}"), 2));
        assert!(!works(FIRST, 1));
        assert!(!works("", 0));
    }
}
