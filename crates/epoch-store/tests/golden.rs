//! Images that earlier versions wrote: each stays readable for ever.
//!
//! `tests/golden/v<N>` holds an image as the last release with format `N` wrote it (before the first
//! release, as the present code does). An image that is there is never changed after its release.
//! `OUTLIVE_UPDATE_GOLDEN=1` writes that of the present version, where there is none yet.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{SimHost, create, encrypt, history, models, open, read_back, secret};
use outlive_epoch_store::{
    Access, Codec, Host, REPAIRABLE, Store, repair_in, repair_in_with, verify_in, verify_in_with,
};
use outlive_media::SimDisk;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// The version that the present code writes.
const PRESENT: u32 = 1;
/// Epochs in each image: the first ones of the history.
const EPOCHS: usize = 3;

fn golden(version: u32) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    tests.join(format!("v{version}/epochs.1"))
}

/// The same epochs, the first of which is packed with LZ4, the second with zstd.
fn packed(version: u32) -> PathBuf {
    golden(version).with_file_name("packed.epochs.1")
}

/// The same epochs, encrypted with a key that everybody knows: 1, 1, 2, 3 … 31.
fn encrypted(version: u32) -> PathBuf {
    golden(version).with_file_name("encrypted.epochs.1")
}

/// Its random bytes are known beforehand, for one image and no other.
#[derive(Default)]
struct Foreseen {
    host: SimHost,
    drawn: AtomicU8,
}

impl Host for Foreseen {
    fn realtime_ns(&self) -> u64 {
        self.host.realtime_ns()
    }

    fn monotonic_us(&self) -> u64 {
        self.host.monotonic_us()
    }

    fn uuid(&self) -> [u8; 16] {
        self.host.uuid()
    }

    fn random(&self, into: &mut [u8]) -> io::Result<()> {
        let drawn = || self.drawn.fetch_add(1, Ordering::Relaxed);
        into.iter_mut().for_each(|byte| *byte = drawn());
        Ok(())
    }
}

fn encrypted_now() -> Vec<u8> {
    let (disk, host) = (SimDisk::new(), Arc::new(Foreseen::default()));
    let dir = Arc::new(disk.directory());
    let mut store = Store::create_in_with(dir, host, Some(secret(1))).unwrap();
    for script in &history()[..EPOCHS] {
        script.write(&mut store).unwrap();
    }
    store.close().unwrap();
    disk.contents("epochs.1").unwrap()
}

fn written_now(codecs: [Option<Codec>; EPOCHS]) -> Vec<u8> {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    for (script, codec) in history()[..EPOCHS].iter().zip(codecs) {
        store.pack(codec);
        script.write(&mut store).unwrap();
    }
    store.close().unwrap();
    disk.contents("epochs.1").unwrap()
}

/// Writes an image that is not there yet, if that is asked for.
fn update(path: &Path, bytes: &dyn Fn() -> Vec<u8>) {
    if std::env::var_os("OUTLIVE_UPDATE_GOLDEN").is_some() && !path.exists() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes()).unwrap();
    }
}

#[test]
pub(crate) fn the_present_version_writes_its_golden_image() {
    let path = golden(PRESENT);
    let written_now = || written_now([None; EPOCHS]);
    update(&path, &written_now);
    let golden = fs::read(&path).unwrap();
    assert!(
        golden == written_now(),
        "the bytes of the format have changed: that needs a new version, and a reader for the old one"
    );
}

#[test]
pub(crate) fn every_golden_image_is_read_repaired_and_gone_on_from() {
    let history = history();
    let models = models(&history);
    let codecs = [Some(Codec::Lz4), Some(Codec::Zstd), None];
    update(&packed(PRESENT), &|| written_now(codecs));
    for (version, path) in (1..=PRESENT).flat_map(|v| [(v, golden(v)), (v, packed(v))]) {
        let image = fs::read(&path).unwrap();
        for from in (0..image.len()).step_by(5 * 4096) {
            let disk = SimDisk::new();
            let mut bytes = image.clone();
            let to = image.len().min(from + REPAIRABLE as usize);
            // The first one is left as it is.
            if from > 0 {
                bytes[from..to].fill(0xe1);
            }
            disk.set_contents("epochs.1", bytes);
            let store = open(&disk, Access::Read).unwrap();
            let found: Vec<u64> = store.epochs().iter().map(|epoch| epoch.id.0).collect();
            assert_eq!(found, [1, 2, 3], "version {version}");
            let epochs = store.epochs();
            let saved = epochs.iter().map(|epoch| epoch.saved_bytes > 0);
            let is_packed = path == packed(version);
            assert!(saved.eq([is_packed, is_packed, false]), "{path:?}");
            for (epoch, model) in store.epochs().iter().zip(&models) {
                let reader = store.epoch(Some(epoch.id)).unwrap();
                assert_eq!(read_back(&reader).unwrap(), *model, "version {version}");
            }
            repair_in(&disk.directory(), &mut |_, _| {}).unwrap();
            let report = verify_in(&disk.directory(), &mut |_, _| {}).unwrap();
            assert!(report.is_clean(), "version {version}: {report:?}");
            let mut store = open(&disk, Access::Write).unwrap();
            for (script, model) in history.iter().zip(&models).skip(EPOCHS) {
                script.write(&mut store).unwrap();
                let reader = store.epoch(None).unwrap();
                assert_eq!(read_back(&reader).unwrap(), *model, "version {version}");
            }
        }
    }
}

#[test]
pub(crate) fn the_encrypted_golden_image_is_written_read_and_gone_on_from() {
    let (history, path) = (history(), encrypted(PRESENT));
    let models = models(&history);
    update(&path, &encrypted_now);
    let image = fs::read(&path).unwrap();
    assert!(
        image == encrypted_now(),
        "the bytes of the format have changed: that needs a new version, and a reader for the old one"
    );
    encrypt(Some(secret(1)));
    for from in (0..image.len()).step_by(5 * 4096) {
        let disk = SimDisk::new();
        let mut bytes = image.clone();
        let to = image.len().min(from + REPAIRABLE as usize);
        // The first one is left as it is.
        if from > 0 {
            bytes[from..to].fill(0xe1);
        }
        disk.set_contents("epochs.1", bytes);
        let store = open(&disk, Access::Read).unwrap();
        for (epoch, model) in store.epochs().iter().zip(&models) {
            let reader = store.epoch(Some(epoch.id)).unwrap();
            assert_eq!(read_back(&reader).unwrap(), *model);
        }
        assert_eq!(store.epochs().len(), EPOCHS);
        repair_in_with(&disk.directory(), Some(&secret(1)), &mut |_, _| {}).unwrap();
        let report = verify_in_with(&disk.directory(), Some(&secret(1)), &mut |_, _| {}).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let mut store = open(&disk, Access::Write).unwrap();
        for (script, model) in history.iter().zip(&models).skip(EPOCHS) {
            script.write(&mut store).unwrap();
            let reader = store.epoch(None).unwrap();
            assert_eq!(read_back(&reader).unwrap(), *model);
        }
    }
    encrypt(None);
}
