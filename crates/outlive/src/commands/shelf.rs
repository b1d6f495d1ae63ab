//! `push` and `pull`.

use super::carry::About;
use crate::cli::{PullArgs, PushArgs};
use crate::out;
use crate::progress::Progress;
use outlive_elsewhere::{Error, Hash, Load, Opened, Pushed, Shelf, Wanted};
use outlive_epoch::{EpochId, StoreError};
use outlive_epoch_store::Store;
use outlive_keeper::KeeperError;
use outlive_keeper::arrival::Arrival;
use outlive_keeper::images::Image;
use outlive_keeper::places::Places;
use outlive_keeper::subject::Root;
use serde_json::json;
use std::path::Path;

/// A failure of a pull.
struct Failure(KeeperError);

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self(error.into())
    }
}

impl From<KeeperError> for Failure {
    fn from(error: KeeperError) -> Self {
        Self(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(told(error))
    }
}

fn told(error: Error) -> KeeperError {
    match error {
        Error::Store(error) => error.into(),
        Error::Refused(text) => KeeperError::Refused(text),
    }
}

/// The shelf that is meant, and its name in the records.
fn shelf(url: &str) -> Result<(Box<dyn Shelf>, String), KeeperError> {
    let Opened { shelf, name } = outlive_elsewhere::open(url).map_err(KeeperError::Usage)?;
    Ok((shelf, name))
}

/// `outlive push`
pub fn push(root: &Root, args: &PushArgs, json: bool) -> Result<u8, KeeperError> {
    let (shelf, place) = shelf(&args.url)?;
    let (name, there) = (&args.name, args.there.as_ref().unwrap_or(&args.name));
    root.subject(there)?;
    let subject = root.existing(name)?;
    let mut places = Places::open(&subject)?;
    let about = About::of(root, name)?.encode()?;
    let image = Image::open(&subject.epochs_dir())?;
    super::carry::not_encrypted(&image, name, "what is pushed")?;
    let newest = image.epochs().last().map_or(0, |epoch| epoch.epoch);
    let epoch = args.epoch.unwrap_or(newest);
    let key = format!("{place}#{there}");
    let known: Vec<Hash> = places
        .known(&key)
        .iter()
        .filter_map(|hash| Hash::parse(hash))
        .collect();
    let load = Load {
        store: image.store(),
        epoch: EpochId(epoch),
        about: &about,
    };
    let mut failed = None;
    let mut intend = |before: Option<Hash>, hash: Hash| {
        let before = before.map(|before| before.to_string());
        let noted = places.note(&key, before.as_deref(), &hash.to_string());
        noted.map_err(|error| {
            failed = Some(error);
            Error::Refused("what is pushed cannot be written down".into())
        })
    };
    let size = outlive_epoch::EpochReader::runs(&*image.epoch(Some(epoch))?);
    let size = crate::progress::bytes(&size);
    let mut progress = Progress::new("pushing");
    let pushed = outlive_elsewhere::push(&*shelf, there, load, &known, &mut intend, &mut |done| {
        progress.at(done, size);
    });
    drop(progress);
    let pushed = match (failed, pushed) {
        (Some(error), _) => return Err(error),
        (None, pushed) => pushed.map_err(told)?,
    };
    places.settle(&key, &pushed.publication.hash.to_string())?;
    say_pushed(there, &place, &pushed, json);
    Ok(0)
}

fn say_pushed(there: &str, place: &str, pushed: &Pushed, json: bool) {
    let publication = pushed.publication;
    if json {
        out::json(&json!({
            "name": there,
            "place": place,
            "epoch": publication.epoch,
            "hash": publication.hash.to_string(),
            "pieces": pushed.pieces,
            "new_pieces": pushed.new_pieces,
            "new_bytes": pushed.new_bytes,
            "forked": pushed.forked,
        }));
    } else if pushed.pieces == 0 && pushed.new_pieces == 0 {
        out::line(&format!(
            "{there}: epoch {} is at {place} already",
            publication.epoch
        ));
    } else {
        out::line(&format!(
            "{there}: epoch {} pushed to {place}; {} of {} were new ({})",
            publication.epoch,
            out::count(pushed.new_pieces),
            out::plural(pushed.pieces, "piece", "pieces"),
            out::bytes(pushed.new_bytes),
        ));
    }
    if pushed.forked {
        out::say(&format!(
            "warning: another host pushed {there} at the same time; both epochs are at {place}, and \
             `outlive pull` asks which one is meant"
        ));
    }
}

/// `outlive pull`
pub fn pull(root: &Root, args: &PullArgs, json: bool) -> Result<u8, KeeperError> {
    let (shelf, place) = shelf(&args.url)?;
    let (there, here) = (&args.name, args.here.as_ref().unwrap_or(&args.name));
    root.subject(there)?;
    let arrival = Arrival::begin(root, here)?;
    let wanted = Wanted {
        epoch: args.epoch,
        hash: args.hash.clone(),
    };
    let mut card = None;
    let mut progress = Progress::new("pulling");
    let epochs = arrival.epochs_dir();
    let pulled = outlive_elsewhere::pull(
        &*shelf,
        there,
        &wanted,
        &arrival.spool_dir(),
        |about| -> Result<Store, Failure> {
            let about = About::decode(about, &place)?;
            card = Some(about.settle(Some(here), "pulled")?.1);
            Ok(Store::create(&epochs)?)
        },
        &mut |done, all| progress.at(done, all),
    );
    drop(progress);
    let pulled = match pulled {
        Ok(pulled) => pulled,
        Err(Failure(error)) => {
            keep_what_came(arrival, &error);
            return Err(error);
        }
    };
    let Some(card) = card else {
        return Err(KeeperError::Other(format!("{place} names no subject")));
    };
    let key = format!("{place}#{there}");
    let hash = pulled.publication.hash.to_string();
    let mut places = Places::open_in(arrival.dir(), here)?;
    places.settle(&key, &hash)?;
    arrival.settle(&card)?;
    let epoch = pulled.publication.epoch;
    if json {
        out::json(&json!({
            "name": here,
            "place": place,
            "epoch": epoch,
            "hash": hash,
            "pieces": pulled.pieces,
            "fetched": pulled.fetched,
            "bytes": pulled.bytes,
        }));
    } else {
        out::line(&format!(
            "{here}: epoch {epoch} pulled from {place}, {}; `outlive restore {here}` continues it",
            out::bytes(pulled.bytes),
        ));
    }
    Ok(0)
}

/// After a failure of a medium it may go on; after any other there is nothing to go on with.
fn keep_what_came(arrival: Arrival, error: &KeeperError) {
    let medium = matches!(
        error,
        KeeperError::Store(StoreError::Medium { .. } | StoreError::Full { .. })
    );
    if medium && Path::exists(&arrival.spool_dir()) {
        out::say("what came is kept: the same command goes on from there");
        arrival.postpone();
    }
}
