//! The store in mapped memory: stores reach it word by word in any order, until a fence; and without any
//! single one of its flushes something is lost.
//!
//! A flush of a mapped medium is a fence (what is written passes the caches by), so this is the model of stores,
//! flushes and fences for it. To take a flush away is a [`Lie`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, SimHost, create, history, models, open, read_back};
use outlive_epoch::{EpochReader, StoreError};
use outlive_epoch_store::{Access, Host, Store};
use outlive_media::{Fate, Fault, Lie, Op, SimDisk, power_off};
use std::sync::{Arc, LazyLock};

/// Fates drawn for each cut, of whole writes and of words.
const DRAWN: u64 = 40;

/// A disk whose space holds the image of another life, as memory does that was given back.
fn disk() -> SimDisk {
    static DIRT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let host = SimHost::default();
        // Another identity than that of the life that follows.
        for _ in 0..100 {
            host.uuid();
        }
        let disk = SimDisk::new();
        let mut store = Store::create_in(Arc::new(disk.directory()), Arc::new(host)).unwrap();
        for script in history()[..3].iter().rev() {
            script.write(&mut store).unwrap();
        }
        store.close().unwrap();
        disk.contents("epochs.1").unwrap()
    });
    let disk = SimDisk::new();
    disk.set_dirt(&DIRT);
    disk
}

/// Writes the history, as far as the disk goes; gives the newest acknowledged epoch.
fn write(disk: &SimDisk, history: &[Script]) -> u64 {
    let mut acked = 0;
    let result = (|| -> Result<(), StoreError> {
        let mut store = create(disk)?;
        for (i, script) in history.iter().enumerate() {
            acked = match i {
                1 => script.write_event(&mut store)?.0,
                _ => script.write(&mut store)?.0,
            };
        }
        store.close()
    })();
    if let Err(error) = result {
        assert!(matches!(error, StoreError::Medium { .. }), "{error}");
    }
    acked
}

/// What is wrong with what is found, if anything.
fn wrong(disk: &SimDisk, models: &[Model], acked: u64) -> Option<String> {
    let found = match open(disk, Access::Read) {
        Ok(store) => store.epochs().iter().try_fold(0, |_, epoch| {
            let reader = store.epoch(Some(epoch.id)).map_err(|e| e.to_string())?;
            let found = read_back(&reader).map_err(|e| e.to_string())?;
            match found == models[epoch.id.0 as usize - 1] {
                true => Ok(reader.id().0),
                false => Err(format!("epoch {} is another", epoch.id)),
            }
        }),
        Err(StoreError::Missing { .. }) => Ok(0),
        Err(error) => Err(error.to_string()),
    };
    match found {
        Ok(found) if found >= acked => None,
        Ok(found) => Some(format!("epoch {found}, and {acked} was acknowledged")),
        Err(what) => Some(what),
    }
}

/// A sequence of numbers that look random.
fn next(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    *seed >> 17
}

/// What may become of so many pending changes.
fn cuts(n: usize) -> Vec<Vec<Fate>> {
    let mut cuts = vec![vec![Fate::Keep; n], vec![Fate::Drop; n]];
    for i in 0..n {
        for (one, others) in [(Fate::Drop, Fate::Keep), (Fate::Keep, Fate::Drop)] {
            let mut cut = vec![others; n];
            cut[i] = one;
            cuts.push(cut);
        }
    }
    let mut seed = n as u64;
    for _ in 0..DRAWN {
        let fate = |seed: &mut u64| match next(seed) % 3 {
            0 => Fate::Keep,
            1 => Fate::Drop,
            _ => Fate::Words(next(seed)),
        };
        cuts.push((0..n).map(|_| fate(&mut seed)).collect());
    }
    cuts
}

/// Tries power cuts before each operation from one on, with the lie; what was wrong, of how many.
fn tried(
    history: &[Script],
    models: &[Model],
    from: usize,
    to: usize,
    lie: Option<u64>,
) -> (u64, Option<String>) {
    let mut states = 0;
    for at in from..=to {
        let disk = disk();
        if let Some(at) = lie {
            disk.lie(at, Lie::Lost);
        }
        disk.fault(Some(Fault {
            at: at as u64,
            lasting: true,
            error: power_off(),
            applied: false,
        }));
        let acked = write(&disk, history);
        for cut in cuts(disk.pending().len()) {
            states += 1;
            let after = disk.power_cut(&mut |i, _| cut[i]);
            if let Some(what) = wrong(&after, models, acked) {
                return (states, Some(format!("cut before {at}, {cut:?}: {what}")));
            }
        }
    }
    (states, None)
}

#[test]
pub(crate) fn words_that_reach_memory_in_any_order_harm_nothing() {
    let history = history();
    let models = models(&history);
    let disk = disk();
    assert_eq!(write(&disk, &history), 5);
    let (states, what) = tried(&history, &models, 0, disk.trace().len(), None);
    assert_eq!(what, None);
    assert!(states > 3_000, "{states} states");
}

#[test]
pub(crate) fn without_any_single_flush_something_is_lost() {
    let history = history();
    let models = models(&history);
    let disk = disk();
    write(&disk, &history);
    let trace = disk.trace();
    let flushes: Vec<usize> = (0..trace.len())
        .filter(|at| matches!(trace[*at], Op::Flush | Op::Sync))
        .collect();
    let needed = |at: usize| tried(&history, &models, at, trace.len(), Some(at as u64)).1;
    let harmless: Vec<usize> = (flushes.iter().copied())
        .filter(|at| needed(*at).is_none())
        .collect();
    // What a file without a name holds is flushed twice, and the second time alone would do, but for flushes
    // that fail, which those of memory do not.
    let mut expected: Vec<usize> = flushes
        .windows(3)
        .filter(|three| trace[three[1]] == Op::Flush && trace[three[2]] == Op::Sync)
        .map(|three| three[0])
        .collect();
    assert_eq!(
        expected.len(),
        history.iter().filter(|s| s.base).count() + 1
    );
    // And that of the closing, which promises nothing more: it saves the next writer a search.
    expected.extend(flushes.last());
    assert_eq!(harmless, expected, "of {flushes:?}");
}
