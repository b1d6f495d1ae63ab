//! Checking what is stored, piece by piece, by the writer that goes on.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, SimHost, Step, create, history, open, read_back};
use outlive_epoch::EpochReader;
use outlive_epoch_store::{Access, Damage, Outcome, REPAIRABLE, Scrubbed, Store};
use outlive_media::{Directory, Geometry, Medium, MediumError, SimDirectory, SimDisk};
use std::sync::Arc;

/// A whole pass: what it found, and in how many calls.
fn pass(store: &mut Store) -> (Vec<Damage>, u32) {
    let (mut damages, mut calls) = (Vec::new(), 0);
    loop {
        let scrubbed = store.scrub().unwrap();
        damages.extend(scrubbed.damages);
        calls += 1;
        assert!(scrubbed.finished || scrubbed.bytes >= 1 << 20);
        if scrubbed.finished {
            return (damages, calls);
        }
    }
}

/// Harms what a store has open.
fn harm(disk: &SimDisk, name: &str, from: usize, len: usize) {
    let mut bytes = disk.contents(name).unwrap();
    bytes[from..from + len].fill(0x3c);
    disk.set_contents(name, bytes);
}

fn large() -> Script {
    Script {
        base: false,
        steps: vec![Step::Put(
            9,
            0,
            (0..1500).map(|i| (i % 250 + 1) as u8).collect(),
        )],
        trees: vec![("root", vec![1; 100])],
    }
}

#[test]
fn what_is_harmed_is_written_again_while_epochs_go_on() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    assert_eq!(pass(&mut store), (vec![], 1), "there is nothing yet");
    let scripts = [large(), history().remove(1)];
    let mut model = Model::default();
    for script in &scripts {
        script.write(&mut store).unwrap();
        model = script.apply(&model);
    }
    let (damages, calls) = pass(&mut store);
    assert!(damages.is_empty() && calls > 2, "{damages:?} in {calls}");
    let log = 24 * 4096;
    for from in [log, log + 1100 * 4096, log + 1541 * 4096] {
        harm(&disk, "epochs.1", from, REPAIRABLE as usize);
    }
    let (damages, _) = pass(&mut store);
    assert!(damages.len() > 30, "{damages:?}");
    assert!(damages.iter().all(|d| d.outcome == Outcome::Repaired));
    assert!(store.verify(&mut |_, _| {}).unwrap().is_clean());
    // A pass that is under way takes a new epoch, and a new base, as they come.
    assert!(!store.scrub().unwrap().finished);
    history()[2].write(&mut store).unwrap();
    model = history()[2].apply(&model);
    assert!(pass(&mut store).0.is_empty());
    assert_eq!(read_back(&store.epoch(None).unwrap()).unwrap(), model);
    assert!(!store.scrub().unwrap().finished);
    history()[3].write(&mut store).unwrap();
    harm(&disk, "epochs.2", log, 10);
    let (damages, _) = pass(&mut store);
    assert_eq!(damages.len(), 1);
    store.close().unwrap();
    let mut reading = open(&disk, Access::Read).unwrap();
    assert_eq!(reading.epoch(None).unwrap().id().0, 4);
    assert!(reading.scrub().unwrap().finished, "it is only read");
}

#[test]
fn the_header_is_written_again_whatever_is_left_of_it() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    let scripts = &history()[..3];
    for (n, script) in scripts.iter().enumerate() {
        script.write(&mut store).unwrap();
        for (from, len) in [(0, 24 * 4096), (3 * 4096 + 512, 1), (23 * 4096, 4096)] {
            harm(&disk, "epochs.1", from, len);
            let (damages, _) = pass(&mut store);
            let blocks = if len > 24 * 4096 - 1 { 8 } else { 1 };
            assert_eq!(damages.len(), blocks, "{damages:?}");
            assert!(damages.iter().all(|d| d.outcome == Outcome::Repaired));
            assert_eq!(pass(&mut store).0, []);
            // It counts at once.
            let copy = disk.power_cut(&mut |_, _| outlive_media::Fate::Drop);
            let reading = open(&copy, Access::Read).unwrap();
            assert_eq!(reading.newest().unwrap().0, n as u64 + 1);
            assert!(reading.verify(&mut |_, _| {}).unwrap().is_clean());
        }
    }
}

#[test]
fn what_is_lost_is_told_and_left() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    large().write(&mut store).unwrap();
    let log = 24 * 4096;
    harm(&disk, "epochs.1", log, 2 * REPAIRABLE as usize);
    let before = disk.contents("epochs.1");
    let (damages, _) = pass(&mut store);
    let lost = damages
        .iter()
        .filter(|d| d.outcome == Outcome::Lost)
        .count();
    assert_eq!((lost, damages.len()), (30, 32), "{damages:?}");
    assert_ne!(
        disk.contents("epochs.1"),
        before,
        "two blocks were alone in their class"
    );
}

#[test]
fn older_generations_are_checked_after_the_newest() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    store.keep_older(true);
    large().write(&mut store).unwrap();
    history()[3].write(&mut store).unwrap();
    let pass = |store: &mut Store| {
        let mut all = Scrubbed::default();
        while !all.finished {
            let done = store.scrub().unwrap();
            all.damages.extend(done.damages);
            all.older.extend(done.older);
            all.bytes += done.bytes;
            all.finished = done.finished;
        }
        all
    };
    let whole = disk.contents("epochs.1").unwrap();
    let clean = pass(&mut store);
    assert_eq!((clean.damages, clean.older), (vec![], vec![]));
    assert!(clean.bytes > whole.len() as u64, "all of it is read");
    // A superblock, a slot, pages.
    let log = 24 * 4096;
    for (from, len) in [(0, 4096), (2 * 4096, 600), (log, REPAIRABLE as usize)] {
        harm(&disk, "epochs.1", from, len);
    }
    let mended = pass(&mut store);
    assert!(mended.damages.is_empty() && mended.older.len() > 16);
    assert!(mended.older.iter().all(|d| d.outcome == Outcome::Repaired));
    assert!(disk.contents("epochs.1").unwrap()[log..] == whole[log..]);
    // More than parity makes up for: it is told as what it is, and not as a harm of the newest.
    harm(&disk, "epochs.1", log, 3 * REPAIRABLE as usize);
    let lost = pass(&mut store);
    assert!(lost.damages.is_empty());
    assert!(lost.older.iter().any(|d| d.outcome == Outcome::Lost));
    // One that is removed in the middle of a pass is not looked for.
    assert!(!store.scrub().unwrap().finished);
    store.remove_generation(1).unwrap();
    let rest = pass(&mut store);
    assert_eq!((rest.damages, rest.older), (vec![], vec![]));
}

/// All of a pass, errors too.
fn whole_pass(store: &mut Store) -> (Scrubbed, u32) {
    let (mut all, mut errors) = (Scrubbed::default(), 0);
    while !all.finished {
        match store.scrub() {
            Ok(done) => {
                all.damages.extend(done.damages);
                all.older.extend(done.older);
                all.finished = done.finished;
            }
            Err(_) => errors += 1,
        }
        assert!(errors < 10, "it does not get on");
    }
    (all, errors)
}

#[test]
fn an_older_generation_in_doubt_is_told_and_left() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    store.keep_older(true);
    let scripts = history();
    for script in &scripts[..2] {
        script.write(&mut store).unwrap();
    }
    scripts[3].write(&mut store).unwrap();
    // The slot of epoch 2, and the seal.
    for block in [1, 21, 3, 23] {
        harm(&disk, "epochs.1", block * 4096, 4096);
    }
    let before = disk.contents("epochs.1");
    let (found, errors) = whole_pass(&mut store);
    assert_eq!((found.damages, errors), (vec![], 0));
    let told: Vec<_> = found.older.iter().map(|d| d.outcome).collect();
    assert_eq!(told, [Outcome::Lost], "{:?}", found.older);
    assert!(found.older[0].what.contains("outlive repair"));
    assert_eq!(disk.contents("epochs.1"), before, "nothing is settled");
}

/// The second file of a disk cannot be written.
struct Stubborn(SimDirectory);

impl Directory for Stubborn {
    fn place(&self) -> String {
        self.0.place()
    }

    fn list(&self) -> Result<Vec<String>, MediumError> {
        self.0.list()
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Medium>, MediumError> {
        self.0.create(name)
    }

    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        let medium = self.0.open(name, access)?;
        Ok(match name {
            "epochs.2" => Arc::new(ReadOnly(medium)),
            _ => medium,
        })
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), MediumError> {
        self.0.rename(from, to)
    }

    fn remove(&self, name: &str) -> Result<(), MediumError> {
        self.0.remove(name)
    }

    fn sync(&self) -> Result<(), MediumError> {
        self.0.sync()
    }
}

struct ReadOnly(Arc<dyn Medium>);

impl Medium for ReadOnly {
    fn place(&self) -> String {
        self.0.place()
    }

    fn geometry(&self) -> Result<Geometry, MediumError> {
        self.0.geometry()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        self.0.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        Err(MediumError::Full {
            place: self.place(),
            needed: offset + bytes.len() as u64,
        })
    }

    fn flush(&self) -> Result<(), MediumError> {
        self.0.flush()
    }

    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        self.0.reserve(len)
    }

    fn truncate(&self, len: u64) -> Result<(), MediumError> {
        self.0.truncate(len)
    }
}

#[test]
fn a_file_that_cannot_be_mended_does_not_hide_those_behind_it() {
    let log = 24 * 4096;
    // A slot, and a page.
    for (from, errors) in [(4096, 0), (log, 1)] {
        let disk = SimDisk::new();
        let directory = Arc::new(Stubborn(disk.directory()));
        let mut store = Store::create_in(directory, Arc::new(SimHost::default())).unwrap();
        store.keep_older(true);
        for _ in 0..3 {
            history()[3].write(&mut store).unwrap();
        }
        let (clean, none) = whole_pass(&mut store);
        assert_eq!(
            (clean, none),
            (
                Scrubbed {
                    finished: true,
                    ..Scrubbed::default()
                },
                0
            )
        );
        let whole = disk.contents("epochs.1");
        harm(&disk, "epochs.2", from, 600);
        harm(&disk, "epochs.1", log, 600);
        let harmed = disk.contents("epochs.2");
        let (found, met) = whole_pass(&mut store);
        assert_eq!((found.damages, met), (vec![], errors));
        let of = |n: &str| {
            let of_it = found.older.iter().filter(|d| d.file.ends_with(n));
            of_it.map(|d| d.outcome).collect::<Vec<_>>()
        };
        assert_eq!(of("epochs.2").len() as u32, 1 - errors, "{:?}", found.older);
        assert_eq!(of("epochs.1"), [Outcome::Repaired]);
        assert!(disk.contents("epochs.1") == whole && disk.contents("epochs.2") == harmed);
    }
}
