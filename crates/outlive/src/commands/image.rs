//! Which image is meant; `verify` and `repair`.

use crate::cli::{KeyArgs, VerifyArgs};
use crate::out;
use crate::progress::Progress;
use outlive_epoch_store::Secret;
use outlive_keeper::KeeperError;
use outlive_keeper::images::{self, Damage, Holder, Image, Outcome, Verified};
use outlive_keeper::keys;
use outlive_keeper::subject::Root;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Damages that a restore lists.
const TOLD: usize = 5;

/// The directory that `what` means: a path where it has a slash in it, else the subject of that
/// name, else a directory of that name.
pub fn find(root: &Root, what: &str) -> Result<PathBuf, KeeperError> {
    if what.contains('/') {
        return Ok(PathBuf::from(what));
    }
    match root.existing(what) {
        Ok(subject) => Ok(subject.epochs_dir()),
        Err(_) if Path::new(what).is_dir() => Ok(PathBuf::from(what)),
        Err(error) => Err(error),
    }
}

/// The key of an image or a subject: from the place that was asked for, or the one that the subject's card names.
pub fn key(root: &Root, what: &str, asked: &KeyArgs) -> Result<Option<Secret>, KeeperError> {
    let asked = asked.source()?;
    if !what.contains('/')
        && let Ok(subject) = root.existing(what)
    {
        return keys::of_subject(asked.as_ref(), &subject, &subject.card()?);
    }
    asked.map(|source| source.read()).transpose()
}

/// The key for a repair: what can be done without it is done without it.
fn key_if_there(root: &Root, what: &str, asked: &KeyArgs) -> Result<Option<Secret>, KeeperError> {
    match key(root, what, asked) {
        Err(error) if *asked == KeyArgs::default() => {
            out::say(&format!("checksums only, without the key: {error}"));
            Ok(None)
        }
        other => other,
    }
}

/// `outlive verify`
pub fn verify(root: &Root, args: &VerifyArgs, json: bool) -> Result<u8, KeeperError> {
    let what = &args.what;
    let dir = find(root, what)?;
    let secret = if args.checksums_only {
        None
    } else {
        key(root, what, &args.key).inspect_err(|_| {
            out::say("`outlive verify --checksums-only` checks all that needs no key");
        })?
    };
    let mut progress = Progress::new("verifying");
    let found = images::verify(&dir, secret.as_ref(), &mut |done, all| {
        progress.at(done, all)
    })?;
    drop(progress);
    let tags = Tags::of(&dir, secret.as_ref());
    Ok(tell(what, &found, tags, json))
}

/// `outlive repair`
pub fn repair(root: &Root, what: &str, asked: &KeyArgs, json: bool) -> Result<u8, KeeperError> {
    let dir = find(root, what)?;
    let secret = key_if_there(root, what, asked)?;
    let mut progress = Progress::new("repairing");
    let found = images::repair(&dir, secret.as_ref(), &mut |done, all| {
        progress.at(done, all)
    })?;
    drop(progress);
    let tags = Tags::of(&dir, secret.as_ref());
    Ok(tell(what, &found, tags, json))
}

/// What became of authentication tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tags {
    /// All were checked.
    Checked,
    /// There are some, and no key to check them with.
    Unchecked,
    /// As far as can be seen without a key, nothing is encrypted.
    None,
}

impl Tags {
    fn of(dir: &Path, secret: Option<&Secret>) -> Self {
        // With a key, what is not encrypted is refused.
        if secret.is_some() {
            return Self::Checked;
        }
        match Image::open(dir) {
            Ok(image) if image.store().key().is_some() => Self::Unchecked,
            _ => Self::None,
        }
    }

    /// What the verdict says of them.
    fn words(self) -> &'static str {
        match self {
            Self::Checked => ", with their authentication tags",
            Self::Unchecked => " by checksums only, without the key",
            Self::None => "",
        }
    }
}

/// Says what was damaged of an image that was read, and made up for.
pub fn warnings_of(met: &[Damage], what: &str) -> Vec<String> {
    let told = met.iter().take(TOLD).map(line);
    let remedy = match met.len() {
        0 => None,
        n if n <= TOLD => Some(format!("`outlive repair {what}` writes it again")),
        n => Some(format!(
            "and {} more; `outlive repair {what}` writes them again",
            n - TOLD
        )),
    };
    told.chain(remedy).collect()
}

fn tell(what: &str, found: &Verified, tags: Tags, json: bool) -> u8 {
    if json {
        out::json(&as_json(found, tags));
    } else {
        print(what, found, tags);
    }
    if found.lossy { 4 } else { 0 }
}

/// What is damaged, and what becomes of it.
fn line(damage: &Damage) -> String {
    let (place, what) = (&damage.place, out::tame(&damage.what));
    let outcome = match damage.outcome {
        Outcome::Repairable => "nothing is lost, it can be repaired",
        Outcome::Repaired => "repaired",
        Outcome::Unneeded => "nobody needs it",
        Outcome::Lost => "lost",
    };
    let whose = whose(damage);
    format!("{place} is damaged: {what}{whose}; {outcome}")
}

/// Which processes it is of, and at which address.
fn whose(damage: &Damage) -> String {
    let one = |holder: &Holder| {
        let (pid, program) = (holder.pid, out::tame(&holder.program));
        let place = holder
            .address
            .map_or_else(String::new, |a| format!(" at {a:#x}"));
        format!("process {pid} ({program}){place}")
    };
    let file = damage.contents_of.as_ref();
    let file = file.map(|path| format!("the file {}", out::tame(path)));
    let all: Vec<String> = damage.holders.iter().map(one).chain(file).collect();
    match all.is_empty() {
        true => String::new(),
        false => format!(" (it is of {})", all.join(", ")),
    }
}

fn as_json(found: &Verified, tags: Tags) -> Value {
    let damage = |d: &Damage| {
        let (place, what) = (&d.place, &d.what);
        let holder =
            |h: &Holder| json!({ "pid": h.pid, "program": h.program, "address": h.address });
        let holders: Vec<Value> = d.holders.iter().map(holder).collect();
        json!({
            "place": place,
            "what": what,
            "outcome": d.outcome.word(),
            "processes": holders,
            "file": d.contents_of,
        })
    };
    let damages: Vec<Value> = found.damages.iter().map(damage).collect();
    json!({
        "epochs": found.epochs,
        "pages": found.pages,
        "bytes": found.bytes,
        "damages": damages,
        "more_damages": found.more,
        "authenticated": tags == Tags::Checked,
    })
}

fn print(what: &str, found: &Verified, tags: Tags) {
    for damage in &found.damages {
        out::say(&line(damage));
    }
    if found.more > 0 {
        out::say(&format!(
            "and {} more",
            out::plural(found.more, "damage", "damages")
        ));
    }
    let verdict = match found.damages.len() as u64 + found.more {
        0 => "no damage".into(),
        n => out::plural(n, "damage", "damages"),
    };
    out::line(&format!(
        "{what}: {} and {} in {} checked{}, {verdict}",
        out::plural(found.pages, "page", "pages"),
        out::bytes(found.bytes),
        out::plural(found.epochs, "epoch", "epochs"),
        tags.words(),
    ));
}
