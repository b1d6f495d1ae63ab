//! Every strategy brings back exactly what stood, of programs whose memory changes in all ways.

use crate::store::Store;
use crate::support::{
    Program, adopt_orphans, alone, bring_back, clean_up, epoch, last_epoch, look, may_run, prepare,
    times,
};
use outlive_epoch::SpaceId;
use outlive_process::{Granularity, Strategy, TrackOptions, Tracked, Tracking};
use std::sync::Arc;
use std::time::Duration;

/// What is tried: strategies and units.
const ALL: [(Strategy, u32); 6] = [
    (Strategy::Copy, 1),
    (Strategy::Incremental, 1),
    (Strategy::Incremental, 8),
    (Strategy::Incremental, 1024),
    (Strategy::Redundant, 1),
    (Strategy::Redundant, 64),
];

fn begin(program: &Program, (strategy, pages): (Strategy, u32)) -> Tracked {
    let options = TrackOptions {
        strategy,
        granularity: Granularity::new(pages).expect("a power of two"),
        ..TrackOptions::default()
    };
    Tracked::attach(program.pid, options)
        .unwrap_or_else(|e| panic!("{strategy}: {e}; {}", program.story()))
}

#[test]
fn every_strategy_brings_back_what_stood() {
    let _alone = alone();
    if !may_run("every_strategy_brings_back_what_stood") {
        return;
    }
    adopt_orphans();
    for seed in 0..times(2, 60) {
        for how in ALL {
            let mut program = Program::start("shifter", &[&seed.to_string()]);
            let mut store = Store::default();
            for life in 0..2 {
                let mut tracked = begin(&program, how);
                for _ in 0..4 {
                    epoch(&mut tracked, &mut store)
                        .unwrap_or_else(|e| panic!("{how:?}: {e}; {}", program.story()));
                    std::thread::sleep(Duration::from_millis(seed as u64 % 20));
                    program.must_be_well();
                }
                assert_eq!(
                    *tracked.tracking() == Tracking::Off,
                    how.0 == Strategy::Copy
                );
                let seen = last_epoch(&mut program, tracked, &mut store);
                clean_up();
                if life == 0 {
                    a_spoilt_page_is_seen(&program, &store, &seen);
                }
                bring_back(&mut program, store.newest(), &seen);
                store.epochs.clear();
            }
            program.must_report();
        }
    }
}

/// The comparison would find a page that is not as it was.
fn a_spoilt_page_is_seen(program: &Program, store: &Store, seen: &crate::view::View) {
    let mut spoilt = store.newest().clone();
    let own = |space: SpaceId| space.0 == program.pid;
    let mut pages = spoilt.pages.iter_mut();
    let last = pages.rfind(|((space, _), _)| own(*space));
    let page = Arc::make_mut(last.expect("a page of its own").1);
    page[100] ^= 1;
    let ready = prepare(&spoilt);
    let found = seen.differences(&look(&ready, &spoilt));
    drop(ready);
    clean_up();
    assert_eq!(found.len(), 1, "{found:?}");
}

/// Nothing of a program is registered anywhere where everything is copied.
#[test]
fn copying_everything_registers_nothing() {
    let _alone = alone();
    if !may_run("copying_everything_registers_nothing") {
        return;
    }
    let tracked_mappings = |how| {
        let program = Program::start("shifter", &["1"]);
        let mut tracked = begin(&program, how);
        epoch(&mut tracked, &mut Store::default()).expect("an epoch");
        let maps = outlive_linux::maps::read_with_flags(program.pid).expect("its mappings");
        let registered = maps
            .iter()
            .filter(|(_, flags)| flags.has(outlive_linux::maps::VmFlags::WRITE_PROTECT));
        registered.count()
    };
    assert_eq!(tracked_mappings((Strategy::Copy, 1)), 0);
    assert_ne!(tracked_mappings((Strategy::Incremental, 1)), 0);
}
