//! Power cuts at every boundary of a small history, with every fate of what was not flushed;
//! power cuts during recovery; and failures of every single operation.
//!
//! The oracle: what is found is exactly one of the epochs that were written, byte for byte; it is
//! not older than the newest acknowledged one, and not newer than the one being written.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, Step, create, history, models, open, read_back};
use outlive_epoch::{EpochFacts, EpochReader, EpochWriter, StoreError};
use outlive_epoch_store::{Access, Codec, REPAIRABLE, Store, repair_in, verify_in};
use outlive_media::{Fate, Fault, Lie, Op, Pending, SimDisk, power_off};
use std::io;

/// The larger part of the subsets is taken exhaustively up to this many pending changes.
const EXHAUSTIVE: usize = 12;
/// Mixed fates tried for each cut.
const MIXED: u64 = 24;

/// Writes the history with an abandoned epoch and a reopening in it, as far as the disk goes;
/// gives the newest acknowledged epoch and the newest one that was begun.
fn scenario(disk: &SimDisk, history: &[Script]) -> (u64, u64) {
    let (mut acked, mut begun) = (0, 0);
    let result = (|| -> Result<(), StoreError> {
        let mut store = create(disk)?;
        for (i, script) in history.iter().enumerate() {
            if i == 2 {
                history[0].stage(&mut *store.begin()?)?;
                store.close()?;
                store = open(disk, Access::Write)?;
            }
            begun = i as u64 + 1;
            // The second is that of a power event.
            acked = if i == 1 {
                script.write_event(&mut store)?.0
            } else {
                script.write(&mut store)?.0
            };
        }
        store.close()
    })();
    if let Err(e) = result {
        assert!(matches!(e, StoreError::Medium { .. }), "{e}");
    }
    (acked, begun)
}

/// What a reader finds: the newest epoch, all of whose contents are compared.
fn find(disk: &SimDisk, models: &[Model]) -> u64 {
    let store = match open(disk, Access::Read) {
        Ok(store) => store,
        Err(StoreError::Missing { .. }) => return 0,
        Err(e) => panic!("{e}"),
    };
    for epoch in store.epochs() {
        let found = read_back(&store.epoch(Some(epoch.id)).unwrap()).unwrap();
        assert_eq!(found, models[epoch.id.0 as usize - 1], "epoch {}", epoch.id);
    }
    store.epoch(None).unwrap().id().0
}

/// A sequence of numbers that look random.
fn next(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    *seed >> 17
}

/// All cuts that are tried for so many pending changes, as lists of fates.
fn cuts(pending: &[Pending], mixed: u64) -> Vec<Vec<Fate>> {
    let n = pending.len();
    let keep = |on: bool| if on { Fate::Keep } else { Fate::Drop };
    let mut cuts: Vec<Vec<Fate>> = Vec::new();
    if n <= EXHAUSTIVE {
        cuts.extend((0..1u64 << n).map(|set| (0..n).map(|i| keep(set >> i & 1 == 1)).collect()));
    } else {
        cuts.push(vec![Fate::Keep; n]);
        cuts.push(vec![Fate::Drop; n]);
    }
    for (i, change) in pending.iter().enumerate() {
        let Pending::Write(_, _, bytes) = change else {
            continue;
        };
        let sectors = (bytes.len() / 512).min(64);
        let torn = (1..sectors).flat_map(|k| [Fate::Torn((1 << k) - 1), Fate::Torn(!0 << k)]);
        let single = (0..sectors).map(|k| Fate::Torn(1 << k));
        for fate in torn
            .chain(single)
            .chain([Fate::Trash(i as u64), Fate::Trash(!0)])
        {
            for others in [Fate::Keep, Fate::Drop] {
                let mut cut = vec![others; n];
                cut[i] = fate;
                cuts.push(cut);
            }
        }
    }
    let mut seed = n as u64 + 99;
    for _ in 0..mixed {
        let fate = |seed: &mut u64| match next(seed) % 4 {
            0 => Fate::Keep,
            1 => Fate::Drop,
            2 => Fate::Torn(next(seed)),
            _ => Fate::Trash(next(seed)),
        };
        cuts.push((0..n).map(|_| fate(&mut seed)).collect());
    }
    cuts
}

/// The operations that change something or flush: cutting before a read is no other case.
fn boundaries(trace: &[Op]) -> Vec<u64> {
    let changes = trace.iter().enumerate().filter(|(_, op)| **op != Op::Read);
    changes
        .map(|(i, _)| i as u64)
        .chain([trace.len() as u64])
        .collect()
}

fn cut_at(at: u64) -> Option<Fault> {
    Some(Fault {
        at,
        lasting: true,
        error: power_off(),
        applied: false,
    })
}

#[test]
pub(crate) fn a_power_cut_anywhere_leaves_packed_epochs_whole() {
    common::pack(Some(Codec::Lz4));
    a_power_cut_anywhere_leaves_the_last_or_the_next_epoch();
    common::pack(None);
}

#[test]
pub(crate) fn encrypted_epochs_survive_power_cuts_too() {
    common::encrypt(Some(common::secret(1)));
    a_power_cut_anywhere_leaves_the_last_or_the_next_epoch();
    a_power_cut_in_recovery_loses_nothing_that_was_found();
    common::encrypt(None);
}

#[test]
pub(crate) fn a_power_cut_anywhere_leaves_the_last_or_the_next_epoch() {
    let history = history();
    let models = models(&history);
    let disk = SimDisk::new();
    assert_eq!(scenario(&disk, &history), (5, 5));
    let (mut states, mut next_found) = (0u64, 0u64);
    for at in boundaries(&disk.trace()) {
        let disk = SimDisk::new();
        disk.fault(cut_at(at));
        let (acked, begun) = scenario(&disk, &history);
        for cut in cuts(&disk.pending(), MIXED) {
            let after = disk.power_cut(&mut |i, _| cut[i]);
            let found = find(&after, &models);
            assert!(
                found >= acked,
                "cut at {at}, {cut:?}: {found}, but {acked} was acknowledged"
            );
            assert!(found <= begun, "cut at {at}, {cut:?}");
            states += 1;
            next_found += u64::from(found > acked);
        }
    }
    // The test is worth something only if it met both outcomes, often.
    assert!(
        states > 5_000 && next_found > 100,
        "{states} states, {next_found} with the next"
    );
}

#[test]
pub(crate) fn a_power_cut_in_recovery_loses_nothing_that_was_found() {
    let history = history();
    let models = models(&history);
    let disk = SimDisk::new();
    scenario(&disk, &history);
    let mut states = 0u64;
    for at in boundaries(&disk.trace()) {
        let disk = SimDisk::new();
        disk.fault(cut_at(at));
        scenario(&disk, &history);
        let all = cuts(&disk.pending(), 8);
        let some = all
            .iter()
            .enumerate()
            .filter(|(i, _)| i % (1 + all.len() / 40) == 0);
        for (_, cut) in some {
            let after = disk.power_cut(&mut |i, _| cut[i]);
            let found = find(&after, &models);
            let rest = &history[found as usize..];
            states += recover(&after, found, &models, rest);
        }
    }
    assert!(states > 5_000, "{states} states");
}

/// Recovers with a power cut at each boundary; then without, and goes on writing.
fn recover(disk: &SimDisk, found: u64, models: &[Model], rest: &[Script]) -> u64 {
    let whole = disk.fork();
    let mut store = open(&whole, Access::Write).unwrap();
    let trace = whole.trace();
    if let Some(script) = rest.first() {
        assert_eq!(script.write(&mut store).unwrap().0, found + 1);
    }
    drop(store);
    assert_eq!(find(&whole, models), (found + 1).min(models.len() as u64));
    let mut states = 0;
    for at in boundaries(&trace) {
        let again = disk.fork();
        again.fault(cut_at(at));
        let cut_short = open(&again, Access::Write).is_err();
        assert!(cut_short || at >= trace.len() as u64);
        // Others of them after another cut: the recovery is always much the same.
        let all = cuts(&again.pending(), 0);
        for cut in all.iter().skip((found + at) as usize % 11).step_by(11) {
            let after = again.power_cut(&mut |i, _| cut[i]);
            assert_eq!(
                find(&after, models),
                found,
                "cut at {at} of the recovery, {cut:?}"
            );
            states += 1;
        }
    }
    states
}

#[test]
pub(crate) fn a_repair_that_is_cut_short_does_no_harm() {
    let history = &history()[..3];
    let models = models(history);
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    for script in history {
        script.write(&mut store).unwrap();
    }
    store.close().unwrap();
    let image = disk.contents("epochs.1").unwrap();
    let mut states = 0u64;
    // Both parts of the header, then all over the log: pages, tables, parity, copies.
    let places = [0, 20 * 4096]
        .into_iter()
        .chain((24 * 4096..image.len()).step_by(7 * 4096));
    for from in places {
        let to = image.len().min(from + REPAIRABLE as usize);
        let mut bytes = image.clone();
        bytes[from..to].fill(0x77);
        let harmed = SimDisk::new();
        harmed.set_contents("epochs.1", bytes);
        let whole = harmed.fork();
        repair_in(&whole.directory(), &mut |_, _| {}).unwrap();
        assert!(
            verify_in(&whole.directory(), &mut |_, _| {})
                .unwrap()
                .is_clean()
        );
        for at in boundaries(&whole.trace()) {
            let cut_short = harmed.fork();
            cut_short.fault(cut_at(at));
            let _ = repair_in(&cut_short.directory(), &mut |_, _| {});
            for cut in cuts(&cut_short.pending(), 4).iter().step_by(29) {
                let after = cut_short.power_cut(&mut |i, _| cut[i]);
                assert_eq!(
                    find(&after, &models),
                    3,
                    "damage at {from}, cut at {at}: {cut:?}"
                );
                repair_in(&after.directory(), &mut |_, _| {}).unwrap();
                let report = verify_in(&after.directory(), &mut |_, _| {}).unwrap();
                assert!(
                    report.is_clean(),
                    "damage at {from}, cut at {at}: {report:?}"
                );
                states += 1;
            }
        }
    }
    assert!(states > 500, "{states} states");
}

/// Writes the history, repeating what fails; gives the newest model.
fn persist(disk: &SimDisk, history: &[Script], models: &[Model], failures: &mut u64) -> u64 {
    let mut count = |e: StoreError| {
        let known = matches!(e, StoreError::Medium { .. } | StoreError::Full { .. });
        assert!(known, "{e}");
        *failures += 1;
        e
    };
    let mut tries = 0;
    let mut store = loop {
        match create(disk).map_err(&mut count) {
            Ok(store) => break store,
            Err(_) => tries += 1,
        }
        assert!(tries < 3);
    };
    let mut newest = 0;
    for (script, model) in history.iter().zip(models) {
        let id = loop {
            match script.write(&mut store).map_err(&mut count) {
                Ok(id) => break id.0,
                Err(_) => tries += 1,
            }
            assert!(tries < 3, "one failure is met once");
            // What was acknowledged before is untouched by the failure.
            if newest > 0 {
                store
                    .epoch(Some(outlive_epoch::EpochId(newest)))
                    .map_err(&mut count)
                    .ok();
            }
        };
        assert!(id > newest);
        newest = id;
        if let Ok(reader) = store.epoch(None).map_err(&mut count) {
            match read_back(&reader).map_err(&mut count) {
                Ok(found) => assert_eq!(found, *model),
                Err(_) => tries += 1,
            }
        }
    }
    newest
}

#[test]
pub(crate) fn any_operation_may_fail_once_and_the_next_attempt_succeeds() {
    let history = history();
    let models = models(&history);
    let clean = SimDisk::new();
    persist(&clean, &history, &models, &mut 0);
    let mut met = 0;
    for error in [io::ErrorKind::Other, io::ErrorKind::StorageFull] {
        for at in 0..clean.trace().len() as u64 {
            for (applied, deferred) in [(false, false), (true, false), (false, true)] {
                let disk = SimDisk::new();
                disk.defer_errors(deferred);
                disk.fault(Some(Fault {
                    at,
                    lasting: false,
                    error,
                    applied,
                }));
                let newest = persist(&disk, &history, &models, &mut met);
                let last = models.last().unwrap();
                for fate in [Fate::Drop, Fate::Keep] {
                    let after = disk.power_cut(&mut |_, _| fate);
                    let store = open(&after, Access::Read).unwrap();
                    assert_eq!(store.newest().unwrap().0, newest);
                    let found = read_back(&store.epoch(None).unwrap()).unwrap();
                    assert_eq!(found, *last, "operation {at} failed");
                    assert!(!store.verify(&mut |_, _| {}).unwrap().is_lossy());
                }
            }
        }
    }
    assert!(met > 200, "{met} failures were met");
}

#[test]
pub(crate) fn a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space() {
    let history = history();
    let models = models(&history);
    let clean = SimDisk::new();
    scenario(&clean, &history);
    let need = clean.contents("epochs.2").unwrap().len() as u64 * 3;
    for capacity in (0..need).step_by(4096) {
        let disk = SimDisk::new();
        disk.set_capacity(Some(capacity));
        let mut store = create(&disk).unwrap();
        for (i, script) in history.iter().enumerate() {
            let result = script.write(&mut store);
            if let Err(e) = result {
                assert!(matches!(e, StoreError::Full { .. }), "{e}");
                if i > 0 {
                    let found = read_back(&store.epoch(None).unwrap()).unwrap();
                    assert_eq!(found, models[i - 1]);
                }
                disk.set_capacity(None);
                assert_eq!(script.write(&mut store).unwrap().0, i as u64 + 1);
            }
        }
        drop(store);
        assert_eq!(find(&disk, &models), 5);
    }
}

/// The only models that may be found after a failed attempt at `a` and an attempt at `b`.
fn candidates(before: &Model, a: &Script, b: &Script) -> Vec<Model> {
    let after_a = a.apply(before);
    vec![before.clone(), b.apply(before), b.apply(&after_a), after_a]
}

fn write_two(store: &mut Store) {
    for script in &history()[..2] {
        script.write(store).unwrap();
    }
}

/// An attempt at `a` in which one operation fails, then one at `b` that is cut short.
fn fail_then_cut(a: &Script, b: &Script) -> u64 {
    let before = models(&history())[1].clone();
    let allowed = candidates(&before, a, b);
    let prepared = SimDisk::new();
    let mut store = create(&prepared).unwrap();
    write_two(&mut store);
    let start = prepared.trace().len() as u64;
    drop(store);
    let mut states = 0;
    // More operations than an attempt has.
    for (failing, applied) in (0..40).flat_map(|i| [(i, false), (i, true)]) {
        for cut in 0..40 {
            let disk = SimDisk::new();
            let mut store = create(&disk).unwrap();
            write_two(&mut store);
            let error = io::ErrorKind::Other;
            disk.fault(Some(Fault {
                at: start + failing,
                lasting: false,
                error,
                applied,
            }));
            let first = a.write(&mut store);
            let Err(_) = first else { break };
            disk.fault(cut_at(disk.trace().len() as u64 + cut));
            let acked = b.write(&mut store).map_or(2, |id| id.0);
            let finished = acked > 2;
            // The power is off: what the store does when it is dropped does not matter.
            disk.fault(cut_at(0));
            drop(store);
            for fates in cuts(&disk.pending(), 4).iter().step_by(5) {
                let after = disk.power_cut(&mut |i, _| fates[i]);
                let store = open(&after, Access::Read).unwrap();
                assert!(store.newest().unwrap().0 >= acked);
                let found = read_back(&store.epoch(None).unwrap()).unwrap();
                assert!(
                    allowed.contains(&found),
                    "failed at {failing}, cut at {cut}: {fates:?}"
                );
                assert!(!finished || found == allowed[1] || found == allowed[2]);
                states += 1;
            }
            if finished {
                break;
            }
        }
    }
    states
}

#[test]
pub(crate) fn an_attempt_after_a_failed_one_harms_neither() {
    let script = |base, seed| Script {
        base,
        steps: vec![Step::Put(1, 11, vec![seed; 2]), Step::Put(7, 0, vec![seed])],
        trees: vec![("root", vec![seed; 30])],
    };
    for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
        let states = fail_then_cut(&script(first, 40), &script(second, 50));
        assert!(states > 1000, "{states} states");
    }
}

/// Makes the n-th flush from now on fail.
fn fail_flush(disk: &SimDisk, history: &[Script], n: usize) {
    let clean = SimDisk::new();
    let mut store = create(&clean).unwrap();
    write_two(&mut store);
    let start = clean.trace().len();
    assert_eq!(start, disk.trace().len());
    history[0].write(&mut store).unwrap();
    let trace = clean.trace();
    let mut flushes = (start..trace.len()).filter(|at| trace[*at] == Op::Flush);
    disk.fault(Some(Fault {
        at: flushes.nth(n).unwrap() as u64,
        lasting: false,
        error: io::ErrorKind::Other,
        applied: false,
    }));
}

#[test]
pub(crate) fn a_trailer_of_a_failed_attempt_is_not_taken_for_that_of_the_next() {
    let script = |seed| Script {
        base: false,
        steps: vec![Step::Put(1, 11, vec![5; 2])],
        trees: vec![("root", vec![seed; 30])],
    };
    let (first, second) = (script(40), script(50));
    let wanted = second.apply(&models(&history())[1]);
    let (mut lost, mut at) = (0, 0);
    loop {
        let disk = SimDisk::new();
        let mut store = create(&disk).unwrap();
        write_two(&mut store);
        fail_flush(&disk, std::slice::from_ref(&first), 0);
        first.write(&mut store).unwrap_err();
        let began = disk.trace().len();
        // The medium forgets one write of the second attempt: the first one's bytes stay there.
        disk.lie((began + at) as u64, Lie::Lost);
        assert_eq!(second.write(&mut store).unwrap().0, 3);
        let trace = disk.trace();
        store.close().unwrap();
        let Some(op) = trace.get(began + at) else {
            break;
        };
        lost += u32::from(*op == Op::Write);
        at += 1;
        let store = open(&disk, Access::Read).unwrap();
        let found = read_back(&store.epoch(None).unwrap()).unwrap();
        assert_eq!(found, wanted, "operation {at} was lost");
        assert!(!store.verify(&mut |_, _| {}).unwrap().is_lossy());
    }
    assert!(lost >= 7, "{lost} writes");
}

#[test]
pub(crate) fn a_record_that_a_failed_flush_forgot_is_written_again_by_the_next_writer() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    write_two(&mut store);
    disk.forget_on_failed_flush(true);
    fail_flush(&disk, &history()[2..3], 1);
    history()[2].write(&mut store).unwrap_err();
    // The writer is killed: it cannot repeat the step.
    disk.fault(cut_at(disk.trace().len() as u64));
    drop(store);
    disk.fault(None);
    let models = models(&history());
    assert_eq!(find(&disk, &models), 3, "it can be read");
    let dropped = disk.power_cut(&mut |_, _| Fate::Drop);
    assert_eq!(find(&dropped, &models), 2, "but it is not there");
    let store = open(&disk, Access::Write).unwrap();
    assert_eq!(store.newest().unwrap().0, 3);
    let dropped = disk.power_cut(&mut |_, _| Fate::Drop);
    assert_eq!(find(&dropped, &models), 3);
}

#[test]
pub(crate) fn an_error_of_an_abandoned_epoch_does_not_hit_the_next() {
    let disk = SimDisk::new();
    disk.defer_errors(true);
    let mut store = create(&disk).unwrap();
    write_two(&mut store);
    let (at, error) = (disk.trace().len() as u64, io::ErrorKind::Other);
    disk.fault(Some(Fault {
        at,
        lasting: false,
        error,
        applied: false,
    }));
    history()[0].stage(&mut *store.begin().unwrap()).unwrap();
    assert!(disk.trace().len() as u64 > at && disk.trace()[at as usize] == Op::Write);
    assert_eq!(history()[2].write(&mut store).unwrap().0, 3);
    assert_eq!(find(&disk, &models(&history())), 3);
}

#[test]
pub(crate) fn an_epoch_that_lacks_a_page_cannot_be_committed() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    write_two(&mut store);
    let (at, error) = (disk.trace().len() as u64, io::ErrorKind::StorageFull);
    disk.fault(Some(Fault {
        at,
        lasting: false,
        error,
        applied: false,
    }));
    let mut writer = store.begin().unwrap();
    assert!(matches!(
        history()[2].stage(&mut *writer),
        Err(StoreError::Full { .. })
    ));
    let committed = writer.commit(EpochFacts::default());
    assert!(
        matches!(committed, Err(StoreError::Misuse(_))),
        "{committed:?}"
    );
    assert_eq!(find(&disk, &models(&history())), 2);
}
