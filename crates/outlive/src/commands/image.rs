//! Which image is meant, and `verify`.

use crate::out;
use crate::progress::Progress;
use outlive_keeper::KeeperError;
use outlive_keeper::images::{self, Damage, Verified};
use outlive_keeper::subject::Root;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

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

/// `outlive verify`
pub fn verify(root: &Root, what: &str, json: bool) -> Result<u8, KeeperError> {
    let dir = find(root, what)?;
    let mut progress = Progress::new("verifying");
    let found = images::verify(&dir, &mut |done, all| progress.at(done, all))?;
    drop(progress);
    let lost = found.more > 0 || found.damages.iter().any(|damage| !damage.harmless);
    if json {
        out::json(&as_json(&found));
    } else {
        print(what, &found);
    }
    Ok(if lost { 4 } else { 0 })
}

fn as_json(found: &Verified) -> Value {
    let damage = |d: &Damage| json!({ "place": d.place, "what": d.what, "harmless": d.harmless });
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
        let weight = if damage.harmless {
            "warning, another copy is intact: "
        } else {
            ""
        };
        out::say(&format!(
            "{weight}{} is damaged: {}",
            damage.place,
            out::tame(&damage.what)
        ));
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
