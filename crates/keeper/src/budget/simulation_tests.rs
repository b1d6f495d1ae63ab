//! Thousands of simulated machines, and errors that must be found.

use super::model::{FLUSHES, MIB};
use super::simulation::{Disk, Load, MS, Outcome, Random, SECOND, Scene, Simulation};

/// A machine from a seed.
fn scene(seed: u64, strict: bool) -> Scene {
    let mut random = Random(seed ^ 0x5eed);
    let length = 600 * MS;
    let mut until = 0;
    let mut phases = Vec::new();
    while until < length {
        until += random.scale(5 * MS, 300 * MS);
        let idle = random.below(4) == 0;
        let rate = if idle {
            0
        } else {
            random.scale(MIB, 8192 * MIB)
        };
        phases.push((rate, until));
    }
    let flush = random.scale(MS / 20, 8 * MS);
    Scene {
        load: Load {
            working_set: random.scale(MIB, 4096 * MIB),
            exposed: [0, 0, 1, 64][random.below(4) as usize] * random.scale(MIB / 256, MIB),
            maps: match random.below(4) {
                0 if strict => (random.scale(2, 256), random.scale(MIB, 256 * MIB)),
                _ => (0, 0),
            },
            phases,
            freeze: random.scale(MS / 20, 2 * MS),
            scan: random.scale(MS / 10, 8 * MS),
        },
        disk: Disk {
            flush,
            stall_one_in: [0, 20, 200, 2000][random.below(4) as usize],
            stall: random.scale(MS, 60 * MS),
            mib: random.scale(MS / 20, 4 * MS),
        },
        budget: [10, 20, 50, 100, 500][random.below(5) as usize] * MS,
        interval: random.scale(10 * MS, 200 * MS),
        strict,
        fails_one_in: [0, 0, 10][random.below(3) as usize],
        length,
        tick: MS / 2,
        looks: true,
        believes: FLUSHES,
    }
}

fn run(seed: u64, strict: bool, believes: u64) -> Outcome {
    let scene = Scene {
        believes,
        ..scene(seed, strict)
    };
    Simulation::new(scene, seed).run()
}

fn seeds() -> u64 {
    let long = std::env::var_os("OUTLIVE_LONG").is_some();
    if long { 200_000 } else { 10_000 }
}

#[test]
fn no_violation_is_hidden_whatever_the_machine_does() {
    let (mut epochs, mut broken, mut cuts, mut late) = (0, 0, 0, 0);
    for seed in 0..seeds() {
        let out = run(seed, seed % 3 == 0, FLUSHES);
        assert!(
            out.hidden.is_empty(),
            "seed {seed}: at {:?} the budget was not kept, and nobody said so",
            out.hidden
        );
        assert_eq!(out.unexplained, 0, "seed {seed}");
        assert_eq!(out.over_limit, 0, "seed {seed}: over the strict limit");
        epochs += out.epochs;
        broken += out.broken;
        cuts += out.cuts;
        late += out.late;
    }
    // The machines are such that there is something to be found.
    assert!(
        epochs > seeds() && broken > seeds() / 10,
        "{epochs} {broken}"
    );
    assert!(cuts > seeds() && late > seeds() / 100, "{cuts} {late}");
}

#[test]
fn a_policy_that_forgets_one_flush_is_found_out() {
    let found = (0..500)
        .filter(|seed| !run(*seed, false, FLUSHES - 1).hidden.is_empty())
        .count();
    assert!(found > 50, "{found}");
}

#[test]
fn a_policy_that_does_not_look_for_new_mappings_is_found_out() {
    let blind = |seed: &u64| {
        let scene = Scene {
            looks: false,
            ..scene(*seed, true)
        };
        Simulation::new(scene, *seed).run().over_limit > 0
    };
    let found = (0..500).filter(blind).count();
    assert!(found > 10, "{found}");
}

#[test]
fn a_seed_gives_the_same_history_again() {
    for seed in 0..50 {
        assert_eq!(
            run(seed, seed % 2 == 0, FLUSHES),
            run(seed, seed % 2 == 0, FLUSHES)
        );
    }
    assert_ne!(run(1, false, FLUSHES).digest, run(2, false, FLUSHES).digest);
}

/// A steady program on a steady disk.
fn steady(rate: u64, strict: bool) -> Outcome {
    let scene = Scene {
        load: Load {
            working_set: 1024 * MIB,
            exposed: 0,
            maps: (0, 0),
            phases: vec![(rate, u64::MAX)],
            freeze: MS / 10,
            scan: MS / 2,
        },
        disk: Disk {
            flush: MS / 2,
            stall_one_in: 0,
            stall: 0,
            mib: MS / 2,
        },
        budget: 50 * MS,
        interval: 100 * MS,
        strict,
        fails_one_in: 0,
        length: 5 * SECOND,
        tick: MS / 10,
        looks: true,
        believes: FLUSHES,
    };
    Simulation::new(scene, 1).run()
}

#[test]
fn a_steady_program_is_kept_within_the_budget_and_held_only_where_the_disk_is_slower() {
    let slow = steady(100 * MIB, false);
    assert_eq!((slow.held, slow.late), (0, 0), "{slow:?}");
    // Only the first interval, of a program that nobody knew, may have been too long.
    assert!(slow.counted <= 1, "{slow:?}");
    let fast = steady(8192 * MIB, false);
    assert!(fast.held > SECOND, "{fast:?}");
    assert!(fast.counted <= 3, "{fast:?}");
    assert!(fast.ran > SECOND / 10, "it makes progress: {fast:?}");
    let strict = steady(8192 * MIB, true);
    assert_eq!(strict.late, 0, "{strict:?}");
}
