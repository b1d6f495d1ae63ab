//! `export` and `import`.

use super::image;
use crate::cli::{ExportArgs, ImportArgs};
use crate::out;
use outlive_elsewhere::{LARGEST_ABOUT, Passed, Which};
use outlive_epoch::EpochId;
use outlive_epoch_store::Store;
use outlive_keeper::KeeperError;
use outlive_keeper::arrival::Arrival;
use outlive_keeper::images::Image;
use outlive_keeper::subject::{CARD_VERSION, Card, Root};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What is carried along of a subject besides its epochs.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct About {
    /// Its name; images have none.
    name: Option<String>,
    /// What is known of it.
    card: Option<Card>,
}

impl About {
    /// What is known of the subject, or the image, of this name.
    pub fn of(root: &Root, what: &str) -> Result<Self, KeeperError> {
        if what.contains('/') {
            return Ok(Self::default());
        }
        match root.existing(what) {
            Ok(subject) => Ok(Self {
                name: Some(what.to_owned()),
                card: Some(subject.card()?.arrived("elsewhere")),
            }),
            Err(_) if Path::new(what).is_dir() => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, KeeperError> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        if bytes.len() > LARGEST_ABOUT {
            let what = "its command line is longer than can be carried along";
            return Err(KeeperError::Refused(what.into()));
        }
        Ok(bytes)
    }

    /// From bytes of somebody else.
    pub fn decode(bytes: &[u8], place: &str) -> Result<Self, KeeperError> {
        let about: Self = serde_json::from_slice(bytes).map_err(|error| {
            KeeperError::Other(format!(
                "{place}: what it says of its subject does not make sense: {error}"
            ))
        })?;
        match &about.card {
            Some(card) if card.version > CARD_VERSION => Err(KeeperError::Refused(format!(
                "{place} is of a newer outlive (its subject has version {}, this one reads up to \
                 {CARD_VERSION}): use a newer one",
                card.version
            ))),
            _ => Ok(about),
        }
    }

    /// The card that the subject gets here, and its name: `asked`, or the one it had.
    pub fn settle(self, asked: Option<&str>, how: &str) -> Result<(String, Card), KeeperError> {
        let name = asked.map(str::to_owned).or(self.name);
        let name = name.ok_or_else(|| {
            KeeperError::Usage("it has no name, being of an image: give one with --name".into())
        })?;
        let card = self.card.map(|card| card.arrived(how));
        Ok((name, card.unwrap_or_else(|| Card::elsewhere(how))))
    }
}

/// A new file that has its name only when it is complete.
struct NewFile {
    file: File,
    path: PathBuf,
    part: Option<PathBuf>,
}

impl NewFile {
    fn create(path: &Path) -> Result<Self, KeeperError> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(KeeperError::Refused(format!(
                "{} is there already; remove it, or choose another name",
                path.display()
            )));
        }
        let mut part = path.as_os_str().to_owned();
        part.push(format!(".part-{}", std::process::id()));
        let part = PathBuf::from(part);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&part);
        let file = file.map_err(KeeperError::io(format!("create {}", part.display())))?;
        Ok(Self {
            file,
            path: path.into(),
            part: Some(part),
        })
    }

    fn publish(mut self) -> Result<(), KeeperError> {
        let Some(part) = &self.part else {
            return Ok(());
        };
        let place = || format!("write {}", self.path.display());
        self.file.sync_all().map_err(KeeperError::io(place()))?;
        let here = rustix::fs::CWD;
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        rustix::fs::renameat_with(here, part, here, &self.path, flags)
            .map_err(KeeperError::io(place()))?;
        self.part = None;
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        let synced = File::open(parent.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all());
        synced.map_err(KeeperError::io(place()))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            let _ = fs::remove_file(part);
        }
    }
}

/// Refuses what would leave the key behind: what is carried away is not encrypted.
pub fn not_encrypted(image: &Image, what: &str, carried: &str) -> Result<(), KeeperError> {
    match image.store().key() {
        None => Ok(()),
        Some(key) => Err(KeeperError::Refused(format!(
            "{what} is encrypted with key {key}, and {carried} is not, which is refused: `outlive checkpoint {what} \
             --image DIR` makes an encrypted copy that can be carried"
        ))),
    }
}

/// `outlive export`
pub fn export(root: &Root, args: &ExportArgs, json: bool) -> Result<u8, KeeperError> {
    let about = About::of(root, &args.what)?.encode()?;
    let image = Image::open(&image::find(root, &args.what)?)?;
    not_encrypted(&image, &args.what, "what export writes")?;
    let which = args.epoch.map_or(Which::All, |k| Which::One(EpochId(k)));
    let mut ignored = |_| {};
    let path = args
        .output
        .as_deref()
        .filter(|path| *path != Path::new("-"));
    let Some(path) = path else {
        let mut stdout = io::stdout().lock();
        if json || stdout.is_terminal() {
            let what = "the export itself would go to standard output: name a file with -o";
            return Err(KeeperError::Usage(what.into()));
        }
        let place = "standard output";
        let passed = outlive_elsewhere::export(
            image.store(),
            which,
            &about,
            &mut stdout,
            place,
            &mut ignored,
        )?;
        out::say(&told(&args.what, "exported", &passed));
        return Ok(0);
    };
    let mut file = NewFile::create(path)?;
    let place = path.display().to_string();
    let store = image.store();
    let out = &mut file.file;
    let passed = outlive_elsewhere::export(store, which, &about, out, &place, &mut ignored)?;
    file.publish()?;
    if json {
        out::json(&figures(&args.what, &passed));
    } else {
        out::line(&told(&args.what, "exported", &passed));
    }
    Ok(0)
}

/// `outlive import`
pub fn import(root: &Root, args: &ImportArgs, json: bool) -> Result<u8, KeeperError> {
    let place = args.file.display().to_string();
    let (mut from, place): (Box<dyn Read>, String) = if place == "-" {
        (Box::new(io::stdin().lock()), "standard input".into())
    } else {
        let file = File::open(&args.file).map_err(KeeperError::io(format!("open {place}")))?;
        (Box::new(file), place)
    };
    let (mut arrival, mut known) = (None, None);
    let passed = outlive_elsewhere::import(
        &mut *from,
        &place,
        |about| -> Result<Store, KeeperError> {
            let about = About::decode(about, &place)?;
            let (name, card) = about.settle(args.name.as_deref(), "imported")?;
            let begun = Arrival::begin(root, &name)?;
            let store = Store::create(begun.epochs_dir())?;
            (arrival, known) = (Some(begun), Some((name, card)));
            Ok(store)
        },
        &mut |_| {},
    )?;
    let (Some(arrival), Some((name, card))) = (arrival, known) else {
        return Err(KeeperError::Other(format!("{place} names no subject")));
    };
    arrival.settle(&card)?;
    if json {
        out::json(&figures(&name, &passed));
    } else {
        out::line(&format!(
            "{}; `outlive restore {name}` continues it",
            told(&name, "imported", &passed)
        ));
    }
    Ok(0)
}

fn told(what: &str, done: &str, passed: &Passed) -> String {
    let (first, last) = passed.epochs.unwrap_or_default();
    let epochs = if first == last {
        format!("epoch {last}")
    } else {
        format!("epochs {first} to {last}")
    };
    format!("{what}: {epochs} {done}, {}", out::bytes(passed.bytes))
}

fn figures(name: &str, passed: &Passed) -> serde_json::Value {
    let (first, last) = passed.epochs.unwrap_or_default();
    json!({
        "name": name,
        "first_epoch": first,
        "epoch": last,
        "pages": passed.pages,
        "bytes": passed.bytes,
    })
}
