//! Generations that are written beside others: flattening while epochs keep coming, and leaving epochs
//! out; whole, cut short at every boundary, with failures of every operation, without space, and on
//! damaged images.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::life::Dice;
use common::trials::{boundaries, cut_at, cuts};
use common::{Model, Script, Step, create, models, open, read_back};
use outlive_epoch::{EpochId, EpochReader, StoreError};
use outlive_epoch_store::{Access, Store, repair_in, verify_in};
use outlive_media::{Directory, Fate, Fault, SimDisk};
use std::io;

/// So many epochs, none of which is a base: pages that are superseded, zero, gone and there again,
/// trees that change, stay and go.
fn growing(epochs: u8) -> Vec<Script> {
    let script = |i: u8| Script {
        base: false,
        steps: vec![
            Step::Put(
                1,
                u64::from(i % 4),
                vec![i, i + 1, if i.is_multiple_of(3) { 0 } else { i }],
            ),
            Step::Absent(1, u64::from(i % 5), 1 + u64::from(i % 2)),
            Step::Put(2, u64::from(i), vec![i]),
        ],
        trees: [("root", vec![i / 2; 30]), ("fds", vec![9; 700])]
            .into_iter()
            .filter(|(name, _)| *name == "root" || i % 4 != 1)
            .collect(),
    };
    (1..=epochs).map(script).collect()
}

/// Everything that is listed, which must be what was written; the numbers.
fn listed(store: &Store, models: &[Model]) -> Vec<u64> {
    let ids: Vec<u64> = store.epochs().iter().map(|epoch| epoch.id.0).collect();
    for id in &ids {
        let found = read_back(&store.epoch(Some(EpochId(*id))).unwrap()).unwrap();
        assert_eq!(found, models[*id as usize - 1], "epoch {id}");
    }
    ids
}

fn find(disk: &SimDisk, models: &[Model]) -> Vec<u64> {
    match open(disk, Access::Read) {
        Ok(store) => {
            let ids = listed(&store, models);
            assert_eq!(store.epoch(None).unwrap().id().0, *ids.last().unwrap());
            ids
        }
        Err(StoreError::Missing { .. }) => Vec::new(),
        Err(e) => panic!("{e}"),
    }
}

fn clean(disk: &SimDisk) {
    let report = verify_in(&disk.directory(), &mut |_, _| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
pub(crate) fn a_flattened_store_holds_what_it_held() {
    for keeps in [false, true] {
        let (history, disk) = (growing(12), SimDisk::new());
        let models = models(&history);
        let mut store = create(&disk).unwrap();
        store.keep_older(keeps);
        let mut scripts = history.iter();
        for script in scripts.by_ref().take(5) {
            script.write(&mut store).unwrap();
        }
        store.begin_flattening().unwrap();
        let mut pieces = 0;
        // An epoch after each second piece.
        while !store.work(4096).unwrap().ready {
            pieces += 1;
            if pieces % 2 == 0 && scripts.len() > 3 {
                scripts.next().unwrap().write(&mut store).unwrap();
            }
        }
        assert!(pieces > 8, "{pieces} pieces");
        scripts.next().unwrap().write(&mut store).unwrap();
        let newest = store.newest().unwrap().0;
        let times = store.epochs();
        store.switch().unwrap();
        assert_eq!(store.newest().unwrap().0, newest, "nothing is lost");
        for epoch in store.epochs() {
            let was = times.iter().find(|was| was.id == epoch.id).unwrap();
            assert_eq!((was.facts, was.durable_us), (epoch.facts, epoch.durable_us));
        }
        let ids = listed(&store, &models);
        if keeps {
            assert_eq!(ids, (1..=newest).collect::<Vec<_>>());
        } else {
            assert_eq!(ids.first(), Some(&5), "the new base");
        }
        for script in scripts {
            script.write(&mut store).unwrap();
        }
        store.close().unwrap();
        clean(&disk);
        let store = open(&disk, Access::Read).unwrap();
        for epoch in &store.epochs() {
            let was = times.iter().find(|was| was.id == epoch.id);
            assert!(was.is_none_or(|was| was.durable_us == epoch.durable_us));
        }
        assert_eq!(listed(&store, &models).last(), Some(&12));
        let files = Directory::list(&disk.directory()).unwrap().len();
        assert_eq!(files, if keeps { 2 } else { 1 });
    }
}

#[test]
pub(crate) fn what_is_left_out_leaves_the_others_as_they_were() {
    let (history, disk) = (growing(9), SimDisk::new());
    let models = models(&history);
    let mut store = create(&disk).unwrap();
    store.keep_older(true);
    for script in &history[..6] {
        script.write(&mut store).unwrap();
    }
    let times = store.epochs();
    store.begin_flattening().unwrap();
    store.switch().unwrap();
    let [old, new] = &store.generations()[..] else {
        panic!("two generations");
    };
    assert!(new.newest && !old.newest && new.bytes < old.bytes);
    let (old, new) = (old.number, new.number);
    let wanted = [EpochId(2), EpochId(5)];
    store.begin_thinning(old, &wanted).unwrap();
    // An epoch is committed meanwhile.
    history[6].write(&mut store).unwrap();
    store.switch().unwrap();
    assert_eq!(listed(&store, &models), [2, 5, 6, 7]);
    for epoch in store.epochs().iter().filter(|epoch| epoch.id.0 < 6) {
        let was = &times[epoch.id.0 as usize - 1];
        assert_eq!((was.facts, was.durable_us), (epoch.facts, epoch.durable_us));
    }
    clean(&disk);
    let missing = store.epoch(Some(EpochId(3))).unwrap_err().to_string();
    assert!(missing.contains("the next ones are 2 and 5"), "{missing}");
    // Of the newest one epochs can be left out, too; the newest stays.
    history[7].write(&mut store).unwrap();
    store.begin_thinning(new, &[EpochId(7)]).unwrap();
    store.switch().unwrap();
    assert_eq!(listed(&store, &models), [2, 5, 7, 8]);
    drop(store);
    clean(&disk);
    let mut store = open(&disk, Access::Write).unwrap();
    assert_eq!(
        listed(&store, &models),
        [2, 5, 7, 8],
        "opening removes nothing"
    );
    assert_eq!(find(&disk, &models), [2, 5, 7, 8], "nor from the disk");
    history[8].write(&mut store).unwrap();
    for id in [EpochId(5), EpochId(8)] {
        assert!(store.begin_thinning(77, &[id]).is_err());
        assert!(store.begin_thinning(old, &[EpochId(3), id]).is_err());
    }
    assert!(store.begin_thinning(old, &[]).is_err());
    let newest = store.generations()[1].number;
    assert!(store.remove_generation(newest).is_err());
    assert!(store.remove_generation(old).unwrap() > 0);
    assert_eq!(listed(&store, &models), [7, 8, 9]);
    store.close().unwrap();
    assert_eq!(find(&disk, &models), [7, 8, 9]);
}

/// Epochs, a flattening with epochs in it, and the older generation with two of its epochs; gives the
/// newest acknowledged epoch, the newest that was begun, and whether the epochs that are wanted of the
/// older one must be there.
fn scenario(disk: &SimDisk, history: &[Script], keeps: bool) -> (u64, u64, bool) {
    let (mut acked, mut begun, mut wanted) = (0, 0, false);
    let result = (|| -> Result<(), StoreError> {
        let mut store = create(disk)?;
        store.keep_older(keeps);
        for (i, script) in history.iter().enumerate() {
            match i {
                3 => {
                    store.begin_flattening()?;
                    store.work(4096)?;
                }
                4 => {
                    store.work(4096)?;
                    store.work(4096)?;
                }
                5 => store.switch()?,
                6 if keeps => {
                    store.begin_thinning(1, &[EpochId(1), EpochId(4)])?;
                    store.work(4096)?;
                }
                7 if keeps => store.switch()?,
                _ => {}
            }
            begun = i as u64 + 1;
            acked = script.write(&mut store)?.0;
            wanted |= keeps && i >= 4;
        }
        store.close()
    })();
    if let Err(e) = result {
        assert!(matches!(e, StoreError::Medium { .. }), "{e}");
    }
    (acked, begun, wanted)
}

#[test]
pub(crate) fn a_power_cut_anywhere_in_growth_leaves_the_last_or_the_next_epoch() {
    let history = growing(8);
    let models = models(&history);
    let mut dice = Dice(7);
    let mut states = 0;
    for keeps in [false, true] {
        let disk = SimDisk::new();
        assert_eq!(scenario(&disk, &history, keeps), (8, 8, keeps));
        for at in boundaries(&disk.trace()) {
            let disk = SimDisk::new();
            disk.fault(Some(cut_at(at)));
            let (acked, begun, wanted) = scenario(&disk, &history, keeps);
            let all = cuts(&disk.pending(), 6, &mut dice);
            for cut in all.iter().step_by(1 + all.len() / 60) {
                let after = disk.power_cut(&mut |i, _| cut[i]);
                let ids = find(&after, &models);
                let found = ids.last().copied().unwrap_or(0);
                assert!(
                    found >= acked && found <= begun,
                    "cut at {at}, {cut:?}: {found}, but {acked} was acknowledged"
                );
                let kept = ids.contains(&1) && ids.contains(&4);
                assert!(!wanted || kept, "cut at {at}, {cut:?}: only {ids:?}");
                states += 1;
                if states % 16 == 0 {
                    // Whatever is left over, a writer goes on.
                    let mut store = open(&after, Access::Write).unwrap();
                    store.begin_flattening().ok();
                    store.switch().unwrap();
                    if let Some(next) = history.get(found as usize) {
                        assert_eq!(next.write(&mut store).unwrap().0, found + 1);
                    }
                    drop(store);
                    find(&after, &models);
                }
            }
        }
    }
    assert!(states > 3_000, "{states} states");
}

#[test]
pub(crate) fn a_failure_in_growth_costs_nothing_but_the_work() {
    let history = growing(8);
    let models = models(&history);
    let mut met = 0;
    let mut lead = |disk: &SimDisk, fault: Option<Fault>| {
        let mut store = create(disk).unwrap();
        store.keep_older(true);
        let begins = disk.trace().len() as u64;
        disk.fault(fault);
        // By number: an attempt that failed may count as well, and holds the same.
        let mut written: Vec<Model> = Vec::new();
        for (i, (script, model)) in history.iter().zip(&models).enumerate() {
            let oldest = store.generations().first().map_or(0, |one| one.number);
            let done = match i {
                2 => store.begin_flattening(),
                3 => store.work(4096).map(|_| ()),
                4 | 7 => store.switch(),
                6 => store.begin_thinning(oldest, &[EpochId(2)]),
                _ => Ok(()),
            };
            met += u64::from(done.is_err());
            let id = loop {
                match script.write(&mut store) {
                    Ok(id) => break id.0,
                    Err(StoreError::Medium { .. }) => met += 1,
                    Err(error) => panic!("{error}"),
                }
            };
            written.resize(id as usize, model.clone());
        }
        let there = listed(&store, &written);
        assert!(there.contains(&2) && there.last() == Some(&(written.len() as u64)));
        (begins, written)
    };
    let clean = SimDisk::new();
    let (begins, _) = lead(&clean, None);
    for at in begins..clean.trace().len() as u64 {
        for applied in [false, true] {
            let disk = SimDisk::new();
            let error = io::ErrorKind::Other;
            let fault = Fault {
                at,
                lasting: false,
                error,
                applied,
            };
            let (_, written) = lead(&disk, Some(fault));
            for fate in [Fate::Drop, Fate::Keep] {
                let after = disk.power_cut(&mut |_, _| fate);
                let newest = find(&after, &written).last().copied();
                assert_eq!(newest, Some(written.len() as u64), "operation {at}");
            }
        }
    }
    assert!(met > 100, "{met} failures were met");
}

#[test]
pub(crate) fn growth_without_space_leaves_the_epochs_and_room_for_more() {
    let history = growing(9);
    let models = models(&history);
    let mut full = 0;
    for spare in (0..90).step_by(5) {
        let disk = SimDisk::new();
        let mut store = create(&disk).unwrap();
        for script in &history[..8] {
            script.write(&mut store).unwrap();
        }
        disk.set_capacity(Some(store.log_bytes() + spare * 4096));
        let done = store.begin_flattening().and_then(|()| store.switch());
        match done {
            Err(StoreError::Full { .. }) => full += 1,
            other => other.unwrap(),
        }
        let files = Directory::list(&disk.directory()).unwrap();
        assert_eq!(files.len(), 1, "{files:?}");
        assert_eq!(listed(&store, &models).last(), Some(&8));
        if spare >= 40 {
            history[8].write(&mut store).unwrap();
        }
        clean(&disk);
    }
    assert!(full > 3 && full < 18, "{full} of 18 were full");
}

#[test]
pub(crate) fn what_is_lost_is_not_carried_over() {
    let history = growing(5);
    let models = models(&history);
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    for script in &history[..4] {
        script.write(&mut store).unwrap();
    }
    store.close().unwrap();
    let image = disk.contents("epochs.1").unwrap();
    // The four pages of the base, and their parity.
    let mut harmed = image.clone();
    harmed[24 * 4096..28 * 4096].fill(0x55);
    harmed[41 * 4096..45 * 4096].fill(0x55);
    disk.set_contents("epochs.1", harmed);
    let mut store = open(&disk, Access::Write).unwrap();
    store.begin_flattening().unwrap();
    let done = store.switch();
    assert!(matches!(done, Err(StoreError::Damaged { .. })), "{done:?}");
    assert!(!store.is_working());
    assert_eq!(Directory::list(&disk.directory()).unwrap().len(), 1);
    // The program still has everything.
    let base = Script {
        base: true,
        steps: models[4]
            .pages
            .iter()
            .map(|((space, page), seed)| Step::Put(*space, *page, vec![*seed]))
            .collect(),
        trees: history[4].trees.clone(),
    };
    base.write(&mut store).unwrap();
    let found = read_back(&store.epoch(None).unwrap()).unwrap();
    assert_eq!(found, models[4]);
    drop(store);
    clean(&disk);
}

#[test]
pub(crate) fn older_generations_are_checked_and_repaired() {
    let history = growing(6);
    let models = models(&history);
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    store.keep_older(true);
    for script in &history {
        script.write(&mut store).unwrap();
    }
    store.begin_flattening().unwrap();
    store.switch().unwrap();
    store.close().unwrap();
    let image = disk.contents("epochs.1").unwrap();
    for from in (0..image.len()).step_by(5 * 4096) {
        let mut harmed = image.clone();
        let to = harmed.len().min(from + (64 << 10));
        harmed[from..to].fill(0x33);
        disk.set_contents("epochs.1", harmed);
        let report = verify_in(&disk.directory(), &mut |_, _| {}).unwrap();
        assert!(
            !report.is_clean() && !report.is_lossy(),
            "{from}: {report:?}"
        );
        assert!(report.damages.iter().all(|d| d.file.ends_with("epochs.1")));
        assert_eq!(find(&disk, &models), (1..=6).collect::<Vec<_>>());
        repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
        clean(&disk);
    }
    // One that is lost as a whole takes nothing else with it.
    disk.set_contents("epochs.1", vec![0x33; 200_000]);
    let report = verify_in(&disk.directory(), &mut |_, _| {}).unwrap();
    assert!(report.is_lossy(), "{report:?}");
    assert_eq!(find(&disk, &models), [6]);
}
