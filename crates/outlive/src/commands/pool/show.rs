//! What a pool looks like.

use super::args::{MapArgs, VerifyArgs};
use super::{hex, open, told};
use crate::out::{self, Column};
use outlive_keeper::KeeperError;
use outlive_media::Access;
use outlive_nvpool::{Extent, Ledger, PAGE, Run, State, picture};
use serde_json::{Value, json};
use std::path::Path;

/// An extent as `--json` prints it.
pub fn extent(extent: &Extent) -> Value {
    let piece = |piece: &outlive_nvpool::Piece| {
        json!({
            "at": piece.at * PAGE,
            "offset": piece.run.start * PAGE,
            "bytes": piece.run.len * PAGE,
        })
    };
    json!({
        "extent": extent.id,
        "owner": extent.owner,
        "bytes": extent.pages * PAGE,
        "populated": extent.populated() * PAGE,
        "pieces": extent.pieces.iter().map(piece).collect::<Vec<_>>(),
    })
}

fn state(state: State) -> (&'static str, Option<u32>) {
    match state {
        State::Stopped => ("stopped", None),
        State::Running(holder) => ("running", Some(holder.pid)),
        State::PagedOut => ("paged-out", None),
    }
}

fn owners(ledger: &Ledger) -> Vec<Value> {
    let owner = |(name, owner): (&str, &outlive_nvpool::Owner)| {
        let (state, pid) = state(owner.state);
        let extents: Vec<Value> = ledger.extents_of(name).map(extent).collect();
        json!({
            "owner": name,
            "state": state,
            "pid": pid,
            "quota": owner.quota.map(|pages| pages * PAGE),
            "promised": ledger.promised(name) * PAGE,
            "file": Some(&owner.file).filter(|file| !file.is_empty()),
            "extents": extents,
        })
    };
    ledger.owners().map(owner).collect()
}

/// `outlive pool status`
pub fn status(path: &Path, json: bool) -> Result<u8, KeeperError> {
    let pool = open(path, Access::Read)?;
    let ledger = pool.ledger();
    let (free, dirty) = (ledger.free(), ledger.dirty().count());
    let longest = free.longest(u64::MAX);
    let scattered = picture::fragmentation(&ledger);
    if json {
        out::json(&json!({
            "pool": path.display().to_string(),
            "id": hex(pool.id()),
            "bytes": ledger.space().len * PAGE,
            "free": free.pages() * PAGE,
            "not_zeroed": dirty * PAGE,
            "longest_free": longest * PAGE,
            "fragmentation": scattered,
            "free_blocks": free.blocks(),
            "owners": owners(&ledger),
        }));
        return Ok(0);
    }
    let size = |pages: u64| out::bytes(pages * PAGE);
    out::line(&format!(
        "{} of {} free, {} in one run, {:.0} % scattered, {} to be zeroed",
        size(free.pages()),
        size(ledger.space().len),
        size(longest),
        scattered * 100.0,
        size(dirty)
    ));
    if let Some(table) = extents(&ledger) {
        out::line(&table);
    }
    Ok(0)
}

/// All extents, and owners without any; `None` where there is nobody.
fn extents(ledger: &Ledger) -> Option<String> {
    let columns = [
        ("OWNER", Column::Left),
        ("STATE", Column::Left),
        ("EXTENT", Column::Right),
        ("SIZE", Column::Right),
        ("HERE", Column::Right),
        ("PIECES", Column::Right),
        ("QUOTA", Column::Right),
    ];
    let size = |pages: u64| out::bytes(pages * PAGE);
    let mut rows = Vec::new();
    for (name, owner) in ledger.owners() {
        let state = match state(owner.state) {
            (state, Some(pid)) => format!("{state} ({pid})"),
            (state, None) => state.to_owned(),
        };
        let quota = owner.quota.map_or_else(|| "-".to_owned(), size);
        let row = |cells: [String; 4]| {
            let [id, all, here, pieces] = cells;
            vec![
                out::tame(name),
                state.clone(),
                id,
                all,
                here,
                pieces,
                quota.clone(),
            ]
        };
        for extent in ledger.extents_of(name) {
            let (all, here) = (size(extent.pages), size(extent.populated()));
            rows.push(row([
                extent.id.to_string(),
                all,
                here,
                extent.pieces.len().to_string(),
            ]));
        }
        if ledger.extents_of(name).next().is_none() {
            rows.push(row(["-", "-", "-", "-"].map(str::to_owned)));
        }
    }
    (!rows.is_empty()).then(|| out::table(&columns, &rows))
}

/// `outlive pool map`
pub fn map(args: &MapArgs, json: bool) -> Result<u8, KeeperError> {
    let ledger = open(&args.pool, Access::Read)?.ledger();
    if let Some(file) = &args.svg {
        let title = args.pool.display().to_string();
        let drawn = std::fs::write(file, picture::svg(&ledger, &title));
        drawn.map_err(KeeperError::io(format!("write {}", file.display())))?;
    }
    if json {
        let part = |(run, part): (Run, picture::Part<'_>)| {
            let (what, owner) = match part {
                picture::Part::Tables => ("tables", None),
                picture::Part::Free => ("free", None),
                picture::Part::Dirty => ("not-zeroed", None),
                picture::Part::Of(owner) => ("owned", Some(owner)),
            };
            json!({
                "offset": run.start * PAGE,
                "bytes": run.len * PAGE,
                "what": what,
                "owner": owner,
            })
        };
        let parts: Vec<Value> = picture::parts(&ledger).into_iter().map(part).collect();
        out::json(&Value::Array(parts));
    } else if args.svg.is_none() {
        out::line(picture::text(&ledger, 64, 16).trim_end());
    }
    Ok(0)
}

/// `outlive pool verify`
pub fn verify(args: &VerifyArgs, json: bool) -> Result<u8, KeeperError> {
    let pool = open(&args.pool, Access::Read)?;
    let found = pool.verify(args.free).map_err(told)?;
    let (corrected, lost) = (found.tables.corrected.len(), found.tables.lost.len());
    if json {
        let run = |run: &Run| json!({ "offset": run.start * PAGE, "bytes": run.len * PAGE });
        out::json(&json!({
            "lines": found.tables.lines,
            "corrected": corrected,
            "lost": lost,
            "superblock": if found.mended { "one copy damaged" } else { "whole" },
            "free_read": found.read * PAGE,
            "not_zeros": found.unscrubbed.iter().map(run).collect::<Vec<_>>(),
        }));
    } else {
        for run in &found.unscrubbed {
            let (at, len) = (run.start * PAGE, out::bytes(run.len * PAGE));
            out::say(&format!(
                "{len} at byte {at} are free and should be zeros, and are not"
            ));
        }
        if found.mended {
            out::say("warning: one copy of the superblock is damaged; the next change mends it");
        }
        let lines = out::plural(found.tables.lines, "line", "lines");
        out::line(&format!(
            "{lines} checked, {corrected} damaged, {lost} lost"
        ));
    }
    let sound = lost == 0 && found.unscrubbed.is_empty();
    Ok(if sound { 0 } else { 4 })
}
