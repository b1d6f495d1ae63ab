//! Random lives of a store against a plain model, on a simulated disk and in real files.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, SimHost, Step, read_back};
use outlive_epoch::{EpochFacts, EpochId, EpochReader, EpochWriter, PageSink, StoreError};
use outlive_epoch_store::{Access, Store, SystemHost};
use outlive_media::{Directory, FileDirectory, SimDisk};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

#[derive(Clone, Debug)]
enum Act {
    Epoch(Script),
    Abandon(Script),
    Reopen,
    Verify,
}

fn step() -> impl Strategy<Value = Step> {
    let put = (0u32..3, 0u64..30, prop::collection::vec(0u8..8, 1..12));
    prop_oneof![
        4 => put.prop_map(|(space, first, seeds)| Step::Put(space, first, seeds)),
        1 => (0u32..3, 0u64..30, 1u64..12).prop_map(|(s, f, c)| Step::Absent(s, f, c)),
    ]
}

fn script() -> impl Strategy<Value = Script> {
    let trees = prop::collection::btree_map(
        prop::sample::select(vec!["", "root", "files", "threads"]),
        prop_oneof![
            Just(vec![]),
            Just(vec![1; 5000]),
            Just(vec![2; 5000]),
            prop::collection::vec(any::<u8>(), 0..40)
        ],
        0..4,
    );
    (
        prop::bool::weighted(0.2),
        prop::collection::vec(step(), 0..8),
        trees,
    )
        .prop_map(|(base, steps, trees)| Script {
            base,
            steps,
            trees: trees.into_iter().collect(),
        })
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => script().prop_map(Act::Epoch),
        2 => script().prop_map(Act::Abandon),
        2 => Just(Act::Reopen),
        1 => Just(Act::Verify),
    ]
}

type Opener<'a> = &'a dyn Fn(Access) -> Result<Store, StoreError>;

/// Compares every epoch that should be there.
fn check(store: &mut Store, kept: &BTreeMap<u64, Model>) {
    let ids: Vec<u64> = store.epochs().iter().map(|e| e.id.0).collect();
    assert_eq!(ids, kept.keys().copied().collect::<Vec<_>>());
    for (id, model) in kept {
        let reader = store.epoch(Some(EpochId(*id))).unwrap();
        assert_eq!(reader.id().0, *id);
        assert_eq!(read_back(&reader).unwrap(), *model, "epoch {id}");
    }
    let stored = kept.last_key_value().map_or(0, |(_, m)| {
        m.pages.values().filter(|seed| **seed != 0).count()
    });
    assert_eq!(store.live_bytes().unwrap(), stored as u64 * 4096);
}

fn live(acts: Vec<Act>, open: Opener<'_>) {
    let mut store = open(Access::Write).unwrap();
    let (mut kept, mut newest) = (BTreeMap::<u64, Model>::new(), 0);
    for act in acts {
        match act {
            Act::Epoch(script) => {
                let before = kept
                    .last_key_value()
                    .map(|(_, m)| m.clone())
                    .unwrap_or_default();
                let id = script.write(&mut store).unwrap();
                newest += 1;
                assert_eq!(id.0, newest);
                if script.base {
                    kept.clear();
                }
                kept.insert(newest, script.apply(&before));
            }
            Act::Abandon(script) => {
                let begun = if script.base {
                    store.begin_base()
                } else {
                    store.begin()
                };
                script.stage(&mut *begun.unwrap()).unwrap();
            }
            Act::Reopen => {
                store.close().unwrap();
                match open(Access::Read) {
                    Ok(mut store) => check(&mut store, &kept),
                    Err(StoreError::Missing { .. }) if kept.is_empty() => {}
                    Err(e) => panic!("{e}"),
                }
                store = open(Access::Write).unwrap();
            }
            Act::Verify if !kept.is_empty() => {
                let report = store.verify(&mut |done, all| assert!(done <= all)).unwrap();
                assert!(report.is_clean(), "{report:?}");
                assert_eq!(report.epochs.len(), kept.len());
            }
            Act::Verify => {}
        }
        check(&mut store, &kept);
    }
}

fn sim_opener(disk: &SimDisk) -> impl Fn(Access) -> Result<Store, StoreError> {
    let disk = disk.clone();
    move |access| common::open(&disk, access)
}

fn file_opener(path: &Path) -> impl Fn(Access) -> Result<Store, StoreError> {
    let path = path.to_owned();
    move |access| match access {
        Access::Write => Store::open_or_create(&path),
        Access::Read => Store::open(&path, access),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn a_simulated_store_agrees_with_the_model(acts in prop::collection::vec(act(), 1..14)) {
        live(acts, &sim_opener(&SimDisk::new()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn a_store_in_files_agrees_with_the_model(acts in prop::collection::vec(act(), 1..14)) {
        let tmp = tempfile::tempdir().unwrap();
        live(acts, &file_opener(&tmp.path().join("store")));
    }
}

#[test]
pub(crate) fn an_image_needs_an_empty_directory() {
    let tmp = tempfile::tempdir().unwrap();
    std::fs::write(tmp.path().join("precious"), b"x").unwrap();
    match Store::create(tmp.path()) {
        Err(StoreError::Misuse(what)) => assert!(what.contains("precious"), "{what}"),
        other => panic!("{other:?}"),
    }
    let missing = Store::open(tmp.path().join("nothing"), Access::Read);
    assert!(
        matches!(missing, Err(StoreError::Missing { .. })),
        "{missing:?}"
    );
}

#[test]
pub(crate) fn what_was_never_committed_is_missing_and_can_be_begun_again() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("image");
    let mut store = Store::create(&path).unwrap();
    let busy = Store::open(&path, Access::Write);
    assert!(matches!(busy, Err(StoreError::Busy { .. })), "{busy:?}");
    let mut writer = store.begin().unwrap();
    writer.put(common::run(1, 0, 1), common::page(1)).unwrap();
    // As a writer leaves it that is killed.
    let names = std::fs::read_dir(&path).unwrap().count();
    assert_eq!(names, 1);
    std::fs::copy(path.join("new.1"), path.join("new.2")).unwrap();
    drop(writer);
    drop(store);
    match Store::open(&path, Access::Read) {
        Err(StoreError::Missing { what, .. }) => assert!(what.contains("no committed epoch")),
        other => panic!("{other:?}"),
    }
    let mut store = Store::create(&path).unwrap();
    assert_eq!(
        store
            .begin()
            .unwrap()
            .commit(EpochFacts::default())
            .unwrap()
            .epoch
            .0,
        1
    );
}

#[test]
pub(crate) fn misuse_is_refused() {
    let disk = SimDisk::new();
    let mut store = common::create(&disk).unwrap();
    let mut writer = store.begin().unwrap();
    let short = writer.put(common::run(0, 0, 2), common::page(1));
    assert!(matches!(short, Err(StoreError::Misuse(_))), "{short:?}");
    writer.tree("a", b"1").unwrap();
    assert!(matches!(writer.tree("a", b"2"), Err(StoreError::Misuse(_))));
    writer.commit(EpochFacts::default()).unwrap();
    drop(store);
    let mut store = common::open(&disk, Access::Read).unwrap();
    assert!(matches!(store.begin(), Err(StoreError::Misuse(_))));
    let other = store.epoch(Some(EpochId(7)));
    assert!(
        matches!(other, Err(StoreError::Missing { .. })),
        "{other:?}"
    );
}

#[test]
pub(crate) fn an_idle_epoch_costs_nineteen_blocks_of_log_and_its_durable_time_is_kept() {
    let disk = SimDisk::new();
    let host = Arc::new(SimHost::default());
    let dir: Arc<dyn Directory> = Arc::new(disk.directory());
    let mut store = Store::create_in(Arc::clone(&dir), host.clone()).unwrap();
    let script = |base| Script {
        base,
        steps: vec![],
        trees: vec![("big", vec![3; 100_000])],
    };
    script(false).write(&mut store).unwrap();
    let before = store.log_bytes();
    script(false).write(&mut store).unwrap();
    // Two blocks, and their copies 17 blocks further on.
    assert_eq!(store.log_bytes() - before, 19 * 4096);
    let live = store.epochs();
    assert!(live.iter().all(|e| e.durable_us > 0), "{live:?}");
    store.close().unwrap();
    let store = Store::open_in(dir, host, Access::Read).unwrap();
    assert_eq!(store.epochs(), live);
}

#[test]
pub(crate) fn a_large_epoch_in_files_comes_back_in_large_runs() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("store");
    let dir = Arc::new(FileDirectory::create(&path).unwrap());
    let mut store = Store::create_in(dir, Arc::new(SystemHost::default())).unwrap();
    let seeds: Vec<u8> = (0..9000u32).map(|i| (i % 251 + 1) as u8).collect();
    let big = Script {
        base: false,
        steps: seeds
            .chunks(700)
            .enumerate()
            .map(|(i, s)| Step::Put(5, i as u64 * 700, s.to_vec()))
            .collect(),
        trees: vec![],
    };
    big.write(&mut store).unwrap();
    let pages = seeds.len() as u64 * 4096;
    let beside = store.log_bytes() - 24 * 4096 - pages;
    assert!(
        beside * 50 <= pages,
        "{beside} bytes of parity and tables, more than 2 %"
    );
    let few = Script {
        base: false,
        steps: vec![Step::Put(5, 100, vec![0, 1, 0])],
        trees: vec![],
    };
    few.write(&mut store).unwrap();
    let model = few.apply(&big.apply(&Model::default()));
    let reader = store.epoch(None).unwrap();
    assert_eq!(read_back(&reader).unwrap(), model);
    let mut runs = 0;
    reader
        .pages(&mut |_, _| {
            runs += 1;
            Ok(())
        })
        .unwrap();
    assert!(runs < 20, "{runs} runs");
    let mut seen = 0;
    let stopped = reader.pages(&mut |_, _| {
        seen += 1;
        Err(outlive_epoch::VisitError::Visitor("enough".into()))
    });
    assert!(matches!(
        stopped,
        Err(outlive_epoch::VisitError::Visitor(_))
    ));
    assert_eq!(seen, 1);
    store.close().unwrap();
    let len = std::fs::metadata(path.join("epochs.1")).unwrap().len();
    assert_eq!(len, Store::open(&path, Access::Read).unwrap().log_bytes());
}

#[test]
pub(crate) fn readers_are_not_disturbed_by_a_writer_that_replaces_the_file() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("store");
    let mut store = Store::create(&path).unwrap();
    let script = |base, seed| Script {
        base,
        steps: vec![Step::Put(1, 0, vec![seed; 20])],
        trees: vec![("root", vec![seed; 50])],
    };
    script(true, 1).write(&mut store).unwrap();
    let reading = std::sync::atomic::AtomicBool::new(true);
    let on = std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut seen, mut opened) = (0, 0);
            loop {
                let last = !reading.load(on) && opened >= 20;
                let store = Store::open(&path, Access::Read).unwrap();
                let reader = store.epoch(None).unwrap();
                assert!(reader.id().0 >= seen, "a reader went back in time");
                seen = reader.id().0;
                let model = read_back(&reader).unwrap();
                assert_eq!(model, script(true, seen as u8).apply(&Model::default()));
                opened += 1;
                if last {
                    return seen;
                }
            }
        });
        for seed in 2..=200 {
            script(seed % 3 == 0, seed).write(&mut store).unwrap();
        }
        reading.store(false, on);
        assert_eq!(reader.join().unwrap(), 200);
    });
}
