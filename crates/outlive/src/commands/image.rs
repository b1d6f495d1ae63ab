//! Which image is meant; `verify` and `repair`.

use crate::cli::KeyArgs;
use crate::out;
use crate::progress::Progress;
use outlive_epoch_store::Secret;
use outlive_keeper::KeeperError;
use outlive_keeper::images::{self, Damage, Holder, Outcome, Verified};
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

/// The key for a check: what can be done without it is done without it.
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
pub fn verify(root: &Root, what: &str, asked: &KeyArgs, json: bool) -> Result<u8, KeeperError> {
    let dir = find(root, what)?;
    let secret = key_if_there(root, what, asked)?;
    let mut progress = Progress::new("verifying");
    let found = images::verify(&dir, secret.as_ref(), &mut |done, all| {
        progress.at(done, all)
    })?;
    drop(progress);
    Ok(tell(what, &found, json))
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
    Ok(tell(what, &found, json))
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

fn tell(what: &str, found: &Verified, json: bool) -> u8 {
    if json {
        out::json(&as_json(found));
    } else {
        print(what, found);
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

fn as_json(found: &Verified) -> Value {
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
    })
}

fn print(what: &str, found: &Verified) {
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
        "{what}: {} and {} in {} checked, {verdict}",
        out::plural(found.pages, "page", "pages"),
        out::bytes(found.bytes),
        out::plural(found.epochs, "epoch", "epochs"),
    ));
}
