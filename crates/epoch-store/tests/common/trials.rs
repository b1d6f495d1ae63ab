//! Trials of a [`Life`]: power cuts at its boundaries and in the recovery from them, errors of its
//! operations, lies of the medium, and damage to what it left. Each is drawn from dice, and counted.

use super::life::{
    Dice, Found, Life, Truth, begin_identities, forget, life, live, open, tried, trying,
};
use outlive_epoch::StoreError;
use outlive_epoch_store::Access;
use outlive_media::{Directory, Fate, Fault, Lie, Op, Pending, SimDisk, power_off};
use std::collections::HashMap;
use std::io;

/// All subsets are tried up to this many pending changes.
pub const EXHAUSTIVE: usize = 12;

/// Bytes of the header.
const HEADER: usize = 24 * 4096;

/// What was tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Lives that were led.
    pub lives: u64,
    /// Disks after a power cut that were read back.
    pub cuts: u64,
    /// The same after a power cut in recovery, or in the recovery from that.
    pub recoveries: u64,
    /// Disks that were read back after a writer was killed, another one opened the store, and
    /// the power was cut then.
    pub kills: u64,
    /// Errors that the store met.
    pub errors: u64,
    /// Disks with errors in their life that were read back.
    pub after_errors: u64,
    /// Writes that were lost or went elsewhere, flushes that did nothing.
    pub lies: u64,
    /// Images with changed bits, sectors, blocks or runs.
    pub flips: u64,
    /// Lies and flips that were answered with the place of the damage; the others were made up for, or
    /// did no harm.
    pub named: u64,
    /// Power cuts after which an epoch was found that was not acknowledged yet.
    pub next_found: u64,
    /// States that were alike to one that was compared before, on the disk and in what may be found
    /// there; they were not compared again.
    pub alike: u64,
}

impl Tally {
    /// Disks that were read back and compared.
    pub fn states(&self) -> u64 {
        self.cuts + self.recoveries + self.kills + self.after_errors + self.lies + self.flips
    }

    pub fn add(&mut self, other: &Self) {
        self.lives += other.lives;
        self.cuts += other.cuts;
        self.recoveries += other.recoveries;
        self.kills += other.kills;
        self.errors += other.errors;
        self.after_errors += other.after_errors;
        self.lies += other.lies;
        self.flips += other.flips;
        self.named += other.named;
        self.next_found += other.next_found;
        self.alike += other.alike;
    }
}

/// A power cut before this operation.
pub fn cut_at(at: u64) -> Fault {
    Fault {
        at,
        lasting: true,
        error: power_off(),
        applied: false,
    }
}

/// The operations that change something or flush: cutting before a read is no other case.
pub fn boundaries(trace: &[Op]) -> Vec<u64> {
    let changes = trace.iter().enumerate().filter(|(_, op)| **op != Op::Read);
    changes
        .map(|(i, _)| i as u64)
        .chain([trace.len() as u64])
        .collect()
}

/// All cuts that are tried for these pending changes, as lists of fates, with so many mixed ones.
pub fn cuts(pending: &[Pending], mixed: u64, dice: &mut Dice) -> Vec<Vec<Fate>> {
    let n = pending.len();
    let keep = |on: bool| if on { Fate::Keep } else { Fate::Drop };
    let mut cuts: Vec<Vec<Fate>> = Vec::new();
    if n <= EXHAUSTIVE {
        cuts.extend((0..1u64 << n).map(|set| (0..n).map(|i| keep(set >> i & 1 == 1)).collect()));
    } else {
        for on in [false, true] {
            cuts.push(vec![keep(on); n]);
            for (a, b) in (0..n).flat_map(|a| (0..=a).map(move |b| (a, b))) {
                let mut cut = vec![keep(on); n];
                (cut[a], cut[b]) = (keep(!on), keep(!on));
                cuts.push(cut);
            }
        }
        cuts.extend((0..mixed).map(|_| (0..n).map(|_| keep(dice.below(2) == 0)).collect()));
    }
    for (i, change) in pending.iter().enumerate() {
        for fate in harms(change, dice) {
            for others in [Fate::Keep, Fate::Drop] {
                let mut cut = vec![others; n];
                cut[i] = fate;
                cuts.push(cut);
            }
        }
    }
    let fate = |dice: &mut Dice| match dice.below(6) {
        0 => Fate::Keep,
        1 => Fate::Drop,
        2 => Fate::Zero,
        3 => Fate::Torn(dice.next()),
        4 => Fate::Stale(dice.next()),
        _ => Fate::Trash(dice.next()),
    };
    cuts.extend((0..mixed).map(|_| (0..n).map(|_| fate(dice)).collect()));
    cuts
}

/// The ways in which one write can be found half done: torn at every sector, a single sector
/// there, zeros, garbage, what is left from elsewhere.
fn harms(change: &Pending, dice: &mut Dice) -> Vec<Fate> {
    let Pending::Write(_, _, bytes) = change else {
        return Vec::new();
    };
    let sectors = (bytes.len() / 512).min(64);
    let torn = (1..sectors).flat_map(|k| [Fate::Torn((1 << k) - 1), Fate::Torn(!0 << k)]);
    let single = (0..sectors).map(|k| Fate::Torn(1 << k));
    let whole = [
        Fate::Zero,
        Fate::Trash(dice.next()),
        Fate::Stale(dice.next()),
        Fate::Stale(dice.next()),
    ];
    torn.chain(single).chain(whole).collect()
}

/// At most so many of these, drawn.
fn some<T: Clone>(all: &[T], limit: usize, dice: &mut Dice) -> Vec<T> {
    if all.len() <= limit {
        return all.to_vec();
    }
    (0..limit)
        .map(|_| all[dice.below(all.len() as u64) as usize].clone())
        .collect()
}

/// One life with everything that can befall it.
pub struct Trial {
    pub life: Life,
    pub dice: Dice,
    /// Cuts tried at each boundary, at most.
    pub width: usize,
    pub tally: Tally,
    dirt: Vec<u8>,
    /// What was found on disks that were compared, by what they hold and what may be found there.
    seen: HashMap<([u64; 2], u64), Found>,
}

impl Trial {
    pub fn new(seed: u64, width: usize) -> Self {
        begin_identities(seed);
        let mut dice = Dice(seed);
        let life = life(dice.next());
        // The space of the disk was used before: by an image of another life, for half of them.
        let dirt = if dice.below(2) == 0 {
            let disk = SimDisk::new();
            live(&disk, &super::life::life(dice.next()));
            disk.contents("epochs.1").unwrap_or_default()
        } else {
            Vec::new()
        };
        Self {
            life,
            dice,
            width,
            tally: Tally::default(),
            dirt,
            seen: HashMap::new(),
        }
    }

    /// Compares everything on a disk with what may be there.
    fn check(&mut self, truth: &Truth, disk: &SimDisk) -> Result<Found, StoreError> {
        let key = (disk.fingerprint(), truth.key());
        if let Some(found) = self.seen.get(&key) {
            self.tally.alike += 1;
            return Ok(*found);
        }
        let found = truth.check(disk)?;
        self.seen.insert(key, found);
        Ok(found)
    }

    fn disk(&self) -> SimDisk {
        let disk = SimDisk::new();
        disk.set_dirt(&self.dirt);
        disk
    }

    /// All trials.
    pub fn all(mut self) -> Tally {
        self.tally.lives = 1;
        self.power_cuts();
        self.kills();
        self.errors();
        self.lies();
        self.flips();
        self.tally
    }

    fn trace(&self) -> Vec<Op> {
        let disk = self.disk();
        let truth = live(&disk, &self.life);
        assert_eq!(truth.failures, 0, "without any harm nothing fails");
        disk.trace()
    }

    /// The power is cut at every boundary; of what is found then, some is recovered from.
    pub fn power_cuts(&mut self) {
        for at in boundaries(&self.trace()) {
            trying(format!("cut at {at}"));
            let disk = self.disk();
            disk.fault(Some(cut_at(at)));
            let truth = live(&disk, &self.life);
            let all = cuts(&disk.pending(), 12, &mut self.dice);
            for (i, cut) in some(&all, self.width, &mut self.dice).iter().enumerate() {
                let after = disk.power_cut(&mut |i, _| cut[i]);
                let found = self
                    .check(&truth, &after)
                    .unwrap_or_else(|e| panic!("cut at {at}, {cut:?}: {e}"));
                self.tally.cuts += 1;
                self.tally.next_found += u64::from(found.id > truth.acked());
                if i % 24 == 0 {
                    self.recover(&after, &truth, found, 1);
                }
            }
        }
    }

    /// The writer is killed at every boundary: nothing is lost of what it wrote, but not all of it
    /// is durable. What the next writer finds must stay, also if the power is cut at once.
    pub fn kills(&mut self) {
        for at in boundaries(&self.trace()) {
            trying(format!("killed at {at}"));
            let disk = self.disk();
            disk.fault(Some(cut_at(at)));
            let truth = live(&disk, &self.life);
            disk.fault(None);
            let found = self.check(&truth, &disk).unwrap();
            let mut store = open(&disk, Access::Write).unwrap();
            forget(&mut store).unwrap();
            assert_eq!(store.newest().map_or(0, |id| id.0), found.id, "{}", tried());
            let files = Directory::list(&disk.directory()).unwrap();
            assert!(files.len() <= 1, "{}: {files:?} are left", tried());
            let all = cuts(&disk.pending(), 8, &mut self.dice);
            for cut in some(&all, 2 + self.width / 2, &mut self.dice) {
                let after = disk.power_cut(&mut |i, _| cut[i]);
                let again = self
                    .check(&truth, &after)
                    .unwrap_or_else(|e| panic!("{}: {e}", tried()));
                assert_eq!(again, found, "{}, {cut:?}", tried());
                self.tally.kills += 1;
            }
        }
    }

    /// Power cuts at the boundaries of a recovery: what was found is found again.
    fn recover(&mut self, disk: &SimDisk, truth: &Truth, found: Found, depth: u32) {
        let whole = disk.fork();
        drop(open(&whole, Access::Write).unwrap());
        for at in boundaries(&whole.trace()) {
            let again = disk.fork();
            again.fault(Some(cut_at(at)));
            drop(open(&again, Access::Write));
            let all = cuts(&again.pending(), 4, &mut self.dice);
            for (i, cut) in some(&all, 1 + self.width / 24, &mut self.dice)
                .iter()
                .enumerate()
            {
                let after = again.power_cut(&mut |i, _| cut[i]);
                let again = self
                    .check(truth, &after)
                    .unwrap_or_else(|e| panic!("cut at {at} of the recovery, {cut:?}: {e}"));
                assert_eq!(again, found, "cut at {at} of the recovery, {cut:?}");
                self.tally.recoveries += 1;
                if depth > 0 && i == 0 && self.dice.below(3) == 0 {
                    self.recover(&after, truth, found, depth - 1);
                }
            }
        }
    }

    /// Each operation fails in some way, and another one later, or the power; then all is well.
    pub fn errors(&mut self) {
        const KINDS: [io::ErrorKind; 5] = [
            io::ErrorKind::Other,
            io::ErrorKind::StorageFull,
            io::ErrorKind::Interrupted,
            io::ErrorKind::TimedOut,
            io::ErrorKind::ReadOnlyFilesystem,
        ];
        for at in 0..self.trace().len() as u64 {
            trying(format!("operation {at} fails"));
            let disk = self.disk();
            let dice = &mut self.dice;
            disk.defer_errors(dice.below(3) == 0);
            disk.forget_on_failed_flush(dice.below(2) == 0);
            let fault = |at, dice: &mut Dice| Fault {
                at,
                lasting: dice.below(5) == 0,
                error: KINDS[dice.below(5) as usize],
                applied: dice.below(2) == 0,
            };
            disk.fault(Some(fault(at, dice)));
            match dice.below(3) {
                0 => disk.fault_too(fault(at + 1 + dice.below(12), dice)),
                1 => disk.fault_too(cut_at(at + 1 + dice.below(20))),
                _ => {}
            }
            let truth = live(&disk, &self.life);
            self.tally.errors += truth.failures;
            let all = cuts(&disk.pending(), 4, &mut self.dice);
            for cut in some(&all, 2 + self.width / 12, &mut self.dice) {
                let after = disk.power_cut(&mut |i, _| cut[i]);
                let found = self.check(&truth, &after);
                found.unwrap_or_else(|e| panic!("operation {at} failed, {cut:?}: {e}"));
                self.tally.after_errors += 1;
            }
        }
    }

    /// The medium lies about each operation once: what is found is true, or named as damaged.
    pub fn lies(&mut self) {
        let trace = self.trace();
        for (at, op) in trace.iter().enumerate().filter(|(_, op)| **op != Op::Read) {
            let elsewhere = self.dice.below(72) * 4096;
            let lies = [Lie::Lost, Lie::Misdirected(elsewhere)];
            let lies = if *op == Op::Write {
                &lies[..]
            } else {
                &lies[..1]
            };
            // A name that is not changed shows at once: the store cannot go on.
            for lie in lies
                .iter()
                .filter(|_| matches!(op, Op::Write | Op::Flush | Op::Sync))
            {
                let disk = self.disk();
                trying(format!("{op:?} {at}: {lie:?}"));
                disk.lie(at as u64, *lie);
                let truth = live(&disk, &self.life);
                self.judge(&truth, &disk);
                self.tally.lies += 1;
            }
        }
    }

    /// The image is harmed, closed or as a power cut left it: one run of up to 64 KiB is made up for,
    /// wherever it is; of more, what is found is true, or named as damaged.
    pub fn flips(&mut self) {
        let disk = self.disk();
        let truth = live(&disk, &self.life);
        self.harm_all(&truth, &disk, self.width * 3);
        let boundaries = boundaries(&disk.trace());
        for at in some(&boundaries, 4, &mut self.dice) {
            let disk = self.disk();
            disk.fault(Some(cut_at(at)));
            let truth = live(&disk, &self.life);
            let all = cuts(&disk.pending(), 12, &mut self.dice);
            for cut in some(&all, 4, &mut self.dice) {
                let after = disk.power_cut(&mut |i, _| cut[i]);
                self.harm_all(&truth, &after, self.width / 16);
            }
        }
    }

    /// Harms the newest file of a disk in so many ways.
    fn harm_all(&mut self, truth: &Truth, disk: &SimDisk, ways: usize) {
        let names = (1..19).rev().map(|n| format!("epochs.{n}"));
        let image = |name: String| Some((name.clone(), disk.contents(&name)?));
        let Some((name, image)) = names.into_iter().find_map(image) else {
            return;
        };
        for i in 0..ways {
            let (mut bytes, mut what) = (image.clone(), Vec::new());
            let harms = if i % 4 == 0 {
                2 + self.dice.below(5)
            } else {
                1
            };
            for _ in 0..harms {
                what.push(harm(&mut bytes, &mut self.dice));
            }
            trying(what.join(", "));
            disk.set_contents(&name, bytes);
            let named = self.tally.named;
            self.judge(truth, disk);
            assert!(
                harms > 1 || self.tally.named == named,
                "not made up for: {}",
                tried()
            );
            self.tally.flips += 1;
        }
    }

    fn judge(&mut self, truth: &Truth, disk: &SimDisk) {
        match self.check(truth, disk) {
            Ok(_) => {}
            Err(StoreError::Damaged { place, .. }) => {
                assert!(place.contains(" at offset "), "{place}");
                self.tally.named += 1;
            }
            Err(e) => panic!("{}: {e}", tried()),
        }
    }
}

/// Changes a bit, a sector, a block or a run of up to 64 KiB, in the header as often as in all the
/// rest; says what.
fn harm(image: &mut [u8], dice: &mut Dice) -> String {
    let within = [HEADER.min(image.len()), image.len()][dice.below(2) as usize];
    let at = dice.below(within as u64) as usize;
    // A file that grew while the power was cut may end within a block.
    let fits = |len: usize| (at / len * len).min(image.len().saturating_sub(len));
    let (sector, block) = (fits(512), fits(4096));
    match dice.below(8) {
        0 | 1 if image.len() < 4096 => {
            image[at] ^= 0xff;
            format!("a byte at {at}")
        }
        0 => {
            image[sector..sector + 512].fill(dice.below(2) as u8 * 0xff);
            format!("a sector at {sector}")
        }
        1 => {
            let from = dice.below(image.len() as u64 / 4096) as usize * 4096;
            image.copy_within(from..from + 4096, block);
            format!("the block at {from} copied to {block}")
        }
        2 | 3 => {
            let end = image
                .len()
                .min(block + (1 + dice.below(16) as usize) * 4096);
            image[block..end].fill_with(|| dice.next() as u8);
            format!("garbage from {block} to {end}")
        }
        _ => {
            image[at] ^= 1 << dice.below(8);
            format!("a bit at {at}")
        }
    }
}
