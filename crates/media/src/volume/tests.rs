use super::*;
use crate::{Fate, Fault, Op, Pending, SimDisk, power_off};
use std::collections::BTreeSet;

const NAME: &str = "device";
const UUID: [u8; 16] = [3; 16];

/// A disk with nothing but one medium of so many blocks, which hold `dirt`.
fn device(blocks: u64, dirt: u8) -> SimDisk {
    let disk = SimDisk::new();
    disk.set_contents(NAME, vec![dirt; blocks as usize * BLOCK]);
    disk
}

fn medium(disk: &SimDisk, access: Access) -> Arc<dyn Medium> {
    disk.directory().open(NAME, access).unwrap()
}

fn volume(disk: &SimDisk) -> Volume {
    Volume::open(medium(disk, Access::Write), Access::Write).unwrap()
}

fn filled(byte: u8, blocks: usize) -> Vec<u8> {
    vec![byte; blocks * BLOCK]
}

fn at(block: usize) -> u64 {
    (block * BLOCK) as u64
}

/// The whole of a medium.
fn contents(medium: &Arc<dyn Medium>) -> Vec<u8> {
    let mut bytes = vec![0; medium.geometry().unwrap().len as usize];
    medium.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn media_keep_their_bytes_beside_each_other() {
    let disk = device(4096, 9);
    let refused = Volume::format(medium(&disk, Access::Write), UUID, false);
    assert!(matches!(refused, Err(MediumError::NoVolume { .. })));
    let dir = Volume::format(medium(&disk, Access::Write), UUID, true).unwrap();
    let (a, b) = (dir.create("a").unwrap(), dir.create("b").unwrap());
    assert!(dir.create("a").is_err() && dir.create("x/y").is_err() && dir.create("").is_err());
    // In turns, so that both are in pieces; across the borders of pieces, too.
    for round in 0..6 {
        a.write(at(round * 300), &filled(10 + round as u8, 300))
            .unwrap();
        b.write(at(round), &filled(50 + round as u8, 1)).unwrap();
    }
    a.write(at(299), &filled(99, 2)).unwrap();
    a.flush().unwrap();
    dir.rename("b", "c").unwrap();
    dir.sync().unwrap();
    drop((dir, a, b));
    let dir = volume(&disk);
    assert_eq!(dir.uuid(), UUID);
    assert_eq!(dir.list().unwrap(), ["a", "c"]);
    let a = contents(&dir.open("a", Access::Read).unwrap());
    for block in 0..1800 {
        let wanted = if block == 299 || block == 300 {
            99
        } else {
            10 + (block / 300) as u8
        };
        assert_eq!(
            a[block * BLOCK..][..BLOCK],
            filled(wanted, 1),
            "block {block}"
        );
    }
    let c = dir.open("c", Access::Write).unwrap();
    assert_eq!(contents(&c)[5 * BLOCK], 55);
    assert!(dir.open("b", Access::Read).is_err_and(|e| e.is_not_found()));
    assert!(c.read(1 << 40, &mut [0]).is_err());
    assert!(c.write(1, &[0; BLOCK]).is_err());
}

#[test]
fn space_comes_back_but_not_too_early() {
    let disk = device(RESERVED + 1000, 0);
    let dir = Volume::format(medium(&disk, Access::Write), UUID, false).unwrap();
    assert_eq!(dir.free_bytes(), Some(at(1000)));
    let a = dir.create("a").unwrap();
    a.reserve(at(800)).unwrap();
    assert!(matches!(
        dir.create("b").unwrap().reserve(at(201)),
        Err(MediumError::Full { .. })
    ));
    dir.sync().unwrap();
    dir.remove("a").unwrap();
    let b = dir.open("b", Access::Write).unwrap();
    assert!(
        b.reserve(at(201)).is_err(),
        "a power cut would bring it back"
    );
    dir.sync().unwrap();
    assert!(b.reserve(at(201)).is_err(), "somebody has it open");
    drop(a);
    b.reserve(at(201)).unwrap();
    b.truncate(at(100)).unwrap();
    assert_eq!(b.geometry().unwrap().len, at(100));
    let c = dir.create("c").unwrap();
    assert!(c.reserve(at(900)).is_err());
    b.flush().unwrap();
    c.reserve(at(900)).unwrap();
    assert_eq!(dir.free_bytes(), Some(0));
}

#[test]
fn a_reader_sees_what_a_writer_did_meanwhile() {
    let disk = device(4096, 0);
    let dir = Volume::format(medium(&disk, Access::Write), UUID, false).unwrap();
    let a = dir.create("a").unwrap();
    a.write(0, &filled(1, 1)).unwrap();
    dir.sync().unwrap();
    let reader = Volume::open(medium(&disk, Access::Read), Access::Read).unwrap();
    let old = reader.open("a", Access::Read).unwrap();
    a.write(at(600), &filled(2, 1)).unwrap();
    a.flush().unwrap();
    let mut block = filled(0, 1);
    old.read(at(600), &mut block).unwrap();
    assert_eq!(block, filled(2, 1));
    dir.rename("a", "b").unwrap();
    dir.sync().unwrap();
    assert_eq!(reader.list().unwrap(), ["b"]);
    assert!(reader.create("x").is_err() && reader.remove("b").is_err() && reader.sync().is_err());
    assert!(old.write(0, &block).is_err() && old.flush().is_err());
}

#[test]
fn what_is_no_volume_is_left_alone() {
    for (dirt, what) in [(0, "nothing is on it"), (7, "something else")] {
        let disk = device(200, dirt);
        let error = Volume::open(medium(&disk, Access::Write), Access::Write)
            .err()
            .unwrap();
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(disk.contents(NAME).unwrap(), filled(dirt, 200));
    }
    // Something at the far end alone, as partition tables have it.
    let disk = device(2000, 0);
    let mut bytes = filled(0, 2000);
    bytes[1990 * BLOCK] = 1;
    disk.set_contents(NAME, bytes);
    assert!(Volume::format(medium(&disk, Access::Write), UUID, false).is_err());
    let small = device(RESERVED, 0);
    let error = Volume::format(medium(&small, Access::Write), UUID, false)
        .err()
        .unwrap();
    assert!(matches!(error, MediumError::Full { .. }));
}

#[test]
fn a_run_of_damage_in_the_table_costs_nothing() {
    let disk = device(300, 0);
    let dir = Volume::format(medium(&disk, Access::Write), UUID, false).unwrap();
    dir.create("a").unwrap().write(0, &filled(1, 1)).unwrap();
    dir.sync().unwrap();
    let whole = disk.contents(NAME).unwrap();
    for from in (0..RESERVED as usize * BLOCK - (64 << 10)).step_by(2048) {
        let mut harmed = whole.clone();
        harmed[from..from + (64 << 10)].fill(0xa5);
        disk.set_contents(NAME, harmed);
        let dir = volume(&disk);
        assert_eq!(dir.list().unwrap(), ["a"], "{from}");
        assert_eq!(
            contents(&dir.open("a", Access::Read).unwrap())[..BLOCK],
            filled(1, 1)
        );
    }
}

/// What must be found after a cut.
#[derive(Clone, Debug, Default)]
struct Oracle {
    /// Names and what fills their media, after each step.
    names: Vec<BTreeMap<&'static str, u8>>,
    /// The step that is durable.
    durable: usize,
    /// By what fills it: blocks that are durable, and blocks that are written.
    blocks: BTreeMap<u8, (usize, usize)>,
}

impl Oracle {
    fn step(&mut self, change: impl FnOnce(&mut BTreeMap<&'static str, u8>)) {
        let mut names = self.names.last().cloned().unwrap_or_default();
        change(&mut names);
        self.names.push(names);
    }

    fn flushed(&mut self) {
        self.durable = self.names.len() - 1;
        self.blocks
            .values_mut()
            .for_each(|(durable, written)| *durable = *written);
    }

    fn judge(&self, disk: &SimDisk) {
        let dir = volume(disk);
        let mut found = BTreeMap::new();
        for name in dir.list().unwrap() {
            let bytes = contents(&dir.open(&name, Access::Read).unwrap());
            found.insert(name, bytes);
        }
        let fits = |names: &BTreeMap<&str, u8>| {
            names.len() == found.len()
                && names.iter().all(|(name, fill)| {
                    let durable = self.blocks.get(fill).map_or(0, |blocks| blocks.0);
                    let bytes = found.get(*name).and_then(|b| b.get(..durable * BLOCK));
                    bytes.is_some_and(|bytes| bytes.iter().all(|b| b == fill))
                })
        };
        let may_be = &self.names[self.durable..];
        let names: Vec<_> = found.keys().collect();
        assert!(may_be.iter().any(fits), "{names:?} is none of {may_be:?}");
    }
}

/// A history until the power fails; what must be found then.
fn history(disk: &SimDisk) -> Oracle {
    let mut oracle = Oracle::default();
    let _ = steps(disk, &mut oracle);
    oracle
}

fn steps(disk: &SimDisk, oracle: &mut Oracle) -> Result<(), MediumError> {
    let dir = Volume::open(disk.directory().open(NAME, Access::Write)?, Access::Write)?;
    oracle.step(|_| {});
    let made = |oracle: &mut Oracle, name: &'static str, fill: u8| {
        oracle.step(|names| {
            names.insert(name, fill);
        });
        dir.create(name)
    };
    let write = |oracle: &mut Oracle, medium: &Arc<dyn Medium>, fill: u8, count: usize| {
        let written = oracle.blocks.get(&fill).map_or(0, |blocks| blocks.1);
        medium.write(at(written), &filled(fill, count))?;
        oracle.blocks.entry(fill).or_default().1 += count;
        Ok::<(), MediumError>(())
    };
    let flush = |oracle: &mut Oracle, medium: &Arc<dyn Medium>| {
        medium.flush()?;
        oracle.flushed();
        Ok::<(), MediumError>(())
    };
    let sync = |oracle: &mut Oracle| {
        dir.sync()?;
        oracle.flushed();
        Ok::<(), MediumError>(())
    };
    let a = made(oracle, "new.1", 1)?;
    write(oracle, &a, 1, 2)?;
    flush(oracle, &a)?;
    oracle.step(|names| {
        names.remove("new.1");
        names.insert("epochs.1", 1);
    });
    dir.rename("new.1", "epochs.1")?;
    sync(oracle)?;
    write(oracle, &a, 1, 1)?;
    flush(oracle, &a)?;
    let b = made(oracle, "new.2", 2)?;
    write(oracle, &b, 2, 3)?;
    flush(oracle, &b)?;
    oracle.step(|names| {
        names.remove("new.2");
        names.insert("epochs.2", 2);
    });
    dir.rename("new.2", "epochs.2")?;
    sync(oracle)?;
    oracle.step(|names| {
        names.remove("epochs.1");
    });
    dir.remove("epochs.1")?;
    drop(a);
    // All the space that there is: what was removed is given out again, once that is safe.
    b.truncate(at(3))?;
    let c = made(oracle, "new.3", 3)?;
    write(oracle, &c, 3, 2)?;
    flush(oracle, &c)?;
    write(oracle, &c, 3, 54)?;
    oracle.step(|names| {
        names.remove("new.3");
        names.insert("epochs.2", 3);
    });
    dir.rename("new.3", "epochs.2")?;
    sync(oracle)
}

/// Ways in which all that is pending may be found after a cut.
fn cuts(pending: &[Pending]) -> Vec<Vec<Fate>> {
    let many = pending.len();
    let mut cuts = vec![vec![Fate::Drop; many], vec![Fate::Keep; many]];
    let others = [Fate::Torn(0x5a), Fate::Torn(1), Fate::Trash(4), Fate::Zero];
    // The last ones, where tables are.
    for one in many.saturating_sub(6)..many {
        for rest in [Fate::Drop, Fate::Keep] {
            for fate in [Fate::Drop, Fate::Keep].into_iter().chain(others) {
                let mut fates = vec![rest; many];
                fates[one] = fate;
                cuts.push(fates);
            }
        }
    }
    cuts.push(vec![Fate::Trash(9); many]);
    cuts
}

fn failing(disk: &SimDisk, at: u64) {
    let fault = Fault {
        at,
        lasting: true,
        error: power_off(),
        applied: false,
    };
    disk.fault(Some(fault));
}

#[test]
fn names_and_bytes_survive_every_power_cut() {
    let start = device(RESERVED + 60, 0xee);
    Volume::format(medium(&start, Access::Write), UUID, true).unwrap();
    let whole = start.fork();
    assert_eq!(history(&whole).durable, 7, "the history has an end");
    let operations = whole.trace().len() as u64;
    let (mut states, mut recovered) = (0, BTreeSet::new());
    for cut in start.trace().len() as u64..=operations {
        let disk = start.fork();
        failing(&disk, cut);
        let oracle = history(&disk);
        if oracle.names.is_empty() {
            continue;
        }
        for fates in cuts(&disk.pending()) {
            let after = disk.power_cut(&mut |i, _| fates[i]);
            oracle.judge(&after.fork());
            states += 1;
            if fates
                .first()
                .is_none_or(|fate| matches!(fate, Fate::Drop | Fate::Trash(_)))
            {
                // In the opening, too.
                for again in 0..12 {
                    let opened = after.fork();
                    failing(&opened, again);
                    let directory = opened.directory();
                    let device = directory.open(NAME, Access::Write);
                    let done = device.and_then(|device| Volume::open(device, Access::Write));
                    for fate in [Fate::Drop, Fate::Keep, Fate::Trash(2), Fate::Torn(0xf0)] {
                        oracle.judge(&opened.power_cut(&mut |_, _| fate));
                        states += 1;
                    }
                    recovered.insert(done.is_ok());
                }
            }
        }
    }
    assert_eq!(
        recovered.len(),
        2,
        "openings that end, and openings that are cut"
    );
    assert!(states > 1500, "{states} states");
}

#[test]
fn after_any_error_it_goes_on() {
    let start = device(RESERVED + 60, 0xee);
    Volume::format(medium(&start, Access::Write), UUID, true).unwrap();
    let whole = start.fork();
    history(&whole);
    let trace = whole.trace();
    for (n, op) in trace.iter().enumerate().skip(start.trace().len()) {
        let disk = start.fork();
        disk.forget_on_failed_flush(true);
        let error = io::ErrorKind::Other;
        let fault = |applied| Fault {
            at: n as u64,
            lasting: false,
            error,
            applied,
        };
        disk.fault(Some(fault(*op == Op::Write)));
        let oracle = history(&disk);
        if !oracle.names.is_empty() {
            oracle.judge(&disk.power_cut(&mut |_, _| Fate::Drop));
            oracle.judge(&disk.power_cut(&mut |_, _| Fate::Keep));
        }
        // The same volume is used by whoever comes next.
        let dir = volume(&disk);
        let more = dir.create("more").unwrap();
        more.write(0, &filled(8, 1)).unwrap();
        dir.sync().unwrap();
        let after = disk.power_cut(&mut |_, _| Fate::Drop);
        let more = volume(&after).open("more", Access::Read).unwrap();
        assert_eq!(contents(&more)[..BLOCK], filled(8, 1));
    }
}
