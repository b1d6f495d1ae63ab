//! Owners that do not run: their contents in their files, and back.

use super::args::{OwnerArgs, PageOutArgs, StartArgs};
use super::{open, told, uuid};
use crate::out;
use outlive_keeper::{KeeperError, procfs};
use outlive_media::{Access, FileDirectory};
use outlive_nvpool::{Error, Holder, Pool, Refused, State};
use serde_json::json;
use std::path::Path;

/// Whether the process that is noted is there still. Where the boot has no name it may be this one.
fn alive(holder: &Holder) -> bool {
    let same = |boot| holder.boot == boot;
    uuid(&procfs::boot_id()).is_none_or(same)
        && procfs::start_time(holder.pid) == Some(holder.started)
}

/// The directory and the name of an owner's file.
fn file_of(pool: &Pool, owner: &str) -> Result<(FileDirectory, String), KeeperError> {
    let ledger = pool.ledger();
    let file = ledger.owner(owner).map(|owner| owner.file.clone());
    let file = file.map_err(|error| told(error.into()))?;
    let none = || told(Error::Refused(Refused::NoFile(owner.to_owned())));
    let path = Path::new(&file);
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(none)?;
    let folder = path.parent().ok_or_else(none)?;
    // Opening a pipe would wait for somebody at its other end.
    if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        let owner = owner.to_owned();
        return Err(told(Error::Refused(Refused::InTheWay { file, owner })));
    }
    let folder = FileDirectory::open(folder, Access::Write).map_err(|error| told(error.into()))?;
    Ok((folder, name.to_owned()))
}

/// `outlive pool page-out`
pub fn page_out(args: &PageOutArgs, json: bool) -> Result<u8, KeeperError> {
    let pool = open(&args.pool, Access::Write)?;
    let gone = pool.orphans(alive);
    let owners = match &args.owner {
        Some(owner) => vec![owner.clone()],
        None => gone.clone(),
    };
    let (mut done, mut failed) = (Vec::new(), None);
    for owner in &owners {
        let orphan = gone.contains(owner);
        let paged = file_of(&pool, owner).and_then(|(folder, name)| {
            let paged = pool.page_out(owner, &folder, &name, orphan);
            paged.map_err(told)
        });
        match paged {
            Ok(()) if json => done.push(owner),
            Ok(()) => out::line(&format!("{owner} is in its file")),
            // One without a file keeps nobody else from theirs.
            Err(error) if failed.is_none() => failed = Some(error),
            Err(error) => out::say(&error.to_string()),
        }
    }
    pool.scrub().map_err(told)?;
    if let Some(error) = failed {
        return Err(error);
    }
    if json {
        out::json(&json!({ "paged_out": done }));
    }
    Ok(0)
}

/// `outlive pool start`
pub fn start(args: &StartArgs, json: bool) -> Result<u8, KeeperError> {
    let pool = open(&args.pool, Access::Write)?;
    let owner = args.owner.as_str();
    let ledger = pool.ledger();
    let state = ledger
        .owner(owner)
        .map_err(|error| told(error.into()))?
        .state;
    let holder = match args.pid {
        None => None,
        Some(pid) => {
            let gone = || KeeperError::Refused(format!("there is no process {pid}"));
            let started = procfs::start_time(pid).ok_or_else(gone)?;
            let boot = uuid(&procfs::boot_id()).ok_or_else(|| KeeperError::Told {
                message: "/proc/sys/kernel/random/boot_id has no UUID: nobody could tell later whether the process is there still".to_owned(),
                exit: 1,
            })?;
            Some(Holder { boot, started, pid })
        }
    };
    match state {
        State::PagedOut => {
            let (folder, name) = file_of(&pool, owner)?;
            pool.page_in(owner, &folder, &name).map_err(told)?;
        }
        // Whoever it was is gone, and left the contents where they are.
        State::Running(other) if !alive(&other) => pool.hold(owner, None).map_err(told)?,
        State::Running(_) | State::Stopped => {}
    }
    if holder.is_some() {
        pool.hold(owner, holder).map_err(told)?;
    }
    let paged_in = state == State::PagedOut;
    if json {
        out::json(&json!({ "owner": owner, "paged_in": paged_in, "pid": args.pid }));
    } else {
        let from = if paged_in {
            "came back from its file"
        } else {
            "was in the pool"
        };
        out::line(&format!("{owner} {from}"));
    }
    Ok(0)
}

/// `outlive pool stop`
pub fn stop(args: &OwnerArgs, json: bool) -> Result<u8, KeeperError> {
    let pool = open(&args.pool, Access::Write)?;
    pool.hold(&args.owner, None).map_err(told)?;
    if json {
        out::json(&json!({ "owner": args.owner }));
    } else {
        out::line(&format!("nobody uses {} now", args.owner));
    }
    Ok(0)
}
