//! A store in a volume, on one medium without names: power cuts at every operation of a history, and
//! errors of every operation.
//!
//! The oracle is that of `crash.rs`: what is found is one of the epochs that were written, byte for
//! byte, not older than the newest acknowledged one, and not newer than the one being written.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, SimHost, history, models, read_back};
use outlive_epoch::{EpochReader, StoreError};
use outlive_epoch_store::{Access, Store};
use outlive_media::{
    BLOCK, Directory, Fate, Fault, MediumError, Pending, SimDisk, Volume, power_off,
};
use std::io;
use std::sync::Arc;

const DEVICE: &str = "device";
const BLOCKS: usize = 700;

fn volume(disk: &SimDisk, access: Access) -> Result<Arc<dyn Directory>, MediumError> {
    let device = disk.directory().open(DEVICE, access)?;
    Ok(Arc::new(Volume::open(device, access)?))
}

/// A disk with an empty volume in space that was used before.
fn start() -> SimDisk {
    let disk = SimDisk::new();
    disk.set_contents(DEVICE, vec![0xd7; BLOCKS * BLOCK]);
    let device = disk.directory().open(DEVICE, Access::Write).unwrap();
    Volume::format(device, [1; 16], true).unwrap();
    disk
}

/// Writes the history, each time from an opening of its own where it is `apart`; gives the newest
/// acknowledged epoch and the newest one that was begun.
fn scenario(disk: &SimDisk, history: &[Script], apart: bool) -> (u64, u64) {
    let (mut acked, mut begun) = (0, 0);
    let result = (|| -> Result<(), StoreError> {
        let failed = |e: MediumError| StoreError::Medium {
            place: e.to_string(),
            source: io::ErrorKind::Other.into(),
        };
        let open = || {
            let dir = volume(disk, Access::Write).map_err(failed)?;
            Store::open_in(dir, Arc::new(SimHost::default()), Access::Write)
        };
        let mut store = open()?;
        for (i, script) in history.iter().enumerate() {
            begun = i as u64 + 1;
            acked = script.write(&mut store)?.0;
            if apart {
                store.close()?;
                store = open()?;
            }
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
    let dir = volume(disk, Access::Read).unwrap();
    let store = match Store::open_in(dir, Arc::new(SimHost::default()), Access::Read) {
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

fn cuts(pending: &[Pending]) -> Vec<Vec<Fate>> {
    let many = pending.len();
    let mut cuts = vec![
        vec![Fate::Drop; many],
        vec![Fate::Keep; many],
        vec![Fate::Trash(3); many],
    ];
    // The last ones, where tables and commit records are.
    for one in many.saturating_sub(5)..many {
        for fate in [Fate::Keep, Fate::Torn(0x33), Fate::Trash(1)] {
            let mut fates = vec![Fate::Drop; many];
            fates[one] = fate;
            cuts.push(fates);
        }
        let mut fates = vec![Fate::Keep; many];
        fates[one] = Fate::Drop;
        cuts.push(fates);
    }
    cuts
}

#[test]
fn epochs_in_a_volume_survive_power_cuts() {
    let (history, start) = (history(), start());
    let models = models(&history);
    let mut states = 0;
    for apart in [false, true] {
        let whole = start.fork();
        assert_eq!(scenario(&whole, &history, apart), (5, 5));
        let (from, to) = (start.trace().len() as u64, whole.trace().len() as u64);
        for at in (from..=to).step_by(if apart { 5 } else { 2 }) {
            let disk = start.fork();
            let (lasting, error) = (true, power_off());
            disk.fault(Some(Fault {
                at,
                lasting,
                error,
                applied: false,
            }));
            let (acked, begun) = scenario(&disk, &history, apart);
            for fates in cuts(&disk.pending()) {
                let after = disk.power_cut(&mut |i, _| fates[i]);
                let found = find(&after, &models);
                assert!(
                    (acked..=begun).contains(&found),
                    "{found}: {acked} to {begun}, cut {at}"
                );
                // A writer finds the same, and a power cut right then does not change that.
                let (again, _) = scenario(&after, &[], apart);
                assert_eq!(again, 0);
                let after = after.power_cut(&mut |_, _| Fate::Drop);
                assert_eq!(find(&after, &models), found, "cut {at}, opened again");
                states += 1;
            }
        }
    }
    assert!(states > 300, "{states} states");
}

#[test]
fn a_store_in_a_volume_goes_on_after_any_error() {
    let (history, start) = (history(), start());
    let models = models(&history);
    let whole = start.fork();
    scenario(&whole, &history, false);
    for at in start.trace().len()..whole.trace().len() {
        let disk = start.fork();
        disk.forget_on_failed_flush(true);
        let at = at as u64;
        let (lasting, error) = (false, io::ErrorKind::Other);
        disk.fault(Some(Fault {
            at,
            lasting,
            error,
            applied: at.is_multiple_of(2),
        }));
        let (acked, begun) = scenario(&disk, &history, false);
        let after = disk.power_cut(&mut |_, _| Fate::Drop);
        let found = find(&after, &models);
        assert!(
            (acked..=begun).contains(&found),
            "{found}: {acked} to {begun}, error {at}"
        );
    }
}

#[test]
fn a_full_volume_keeps_what_it_has() {
    let (history, start) = (history(), start());
    let models = models(&history);
    let dir = volume(&start, Access::Write).unwrap();
    let mut store = Store::open_in(
        Arc::clone(&dir),
        Arc::new(SimHost::default()),
        Access::Write,
    )
    .unwrap();
    history[0].write(&mut store).unwrap();
    let free = store.free_bytes().unwrap();
    assert!(free < (BLOCKS * BLOCK) as u64);
    let much = Script {
        base: false,
        steps: vec![common::Step::Put(1, 1000, vec![5; BLOCKS])],
        trees: vec![],
    };
    let full = much.write(&mut store).unwrap_err();
    assert!(matches!(full, StoreError::Full { .. }), "{full}");
    history[1].write(&mut store).unwrap();
    store.close().unwrap();
    drop(dir);
    assert_eq!(find(&start, &models), 2);
}
