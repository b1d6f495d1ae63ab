//! `pool`: one pool of memory that survives, for many owners.
//!
//! - `args`: the words.
//! - `devices`: which memory a pool could lie on.
//! - `paging`: owners that do not run.
//! - `show`: what a pool looks like.

mod args;
mod devices;
mod paging;
mod show;

pub use args::PoolCommand;

use crate::out;
use args::{AllocateArgs, CreateArgs, PoolPath};
use outlive_keeper::KeeperError;
use outlive_media::{
    Access, BlockMedium, DaxMedium, FileMedium, Medium, MediumError, is_block_device,
};
use outlive_nvpool::{Error, PAGE, Pool, Refused, Request, Shape};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

/// `outlive pool`
pub fn pool(command: &PoolCommand, json: bool) -> Result<u8, KeeperError> {
    match command {
        PoolCommand::Devices(args) => devices::devices(args, json),
        PoolCommand::Create(args) => create(args, json),
        PoolCommand::Status(PoolPath { pool }) => show::status(pool, json),
        PoolCommand::Map(args) => show::map(args, json),
        PoolCommand::Verify(args) => show::verify(args, json),
        PoolCommand::Allocate(args) => allocate(args, json),
        PoolCommand::Release(args) => {
            let pool = open(&args.pool, Access::Write)?;
            let extents = match (args.extent, &args.owner) {
                (Some(id), _) => pool.release(id).map(|()| 1),
                (None, Some(owner)) => pool.release_owner(owner),
                (None, None) => {
                    return Err(KeeperError::Usage("give --extent or --owner".to_owned()));
                }
            };
            let extents = extents.map_err(told)?;
            let zeroed = pool.scrub().map_err(told)?;
            if json {
                out::json(&json!({ "extents": extents, "zeroed_bytes": zeroed * PAGE }));
            } else {
                let what = out::plural(extents, "extent", "extents");
                out::line(&format!(
                    "{what} released, {} zeroed",
                    out::bytes(zeroed * PAGE)
                ));
            }
            Ok(0)
        }
        PoolCommand::PageOut(args) => paging::page_out(args, json),
        PoolCommand::Start(args) => paging::start(args, json),
        PoolCommand::Stop(args) => paging::stop(args, json),
    }
}

/// An error with the exit code of the contract.
fn told(error: Error) -> KeeperError {
    let exit = match &error {
        Error::Refused(_) => 3,
        Error::Damaged { .. } | Error::File { .. } => 4,
        Error::Medium(error) => medium_code(error),
        Error::NoPool { .. } | Error::Tables(_) | Error::Unknown { .. } => 1,
    };
    let message = error.to_string();
    KeeperError::Told { message, exit }
}

fn medium_code(error: &MediumError) -> u8 {
    match error {
        MediumError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            5
        }
        MediumError::Busy { .. } | MediumError::Misuse { .. } => 3,
        _ => 1,
    }
}

/// The medium at a path: a block device, memory that is mapped, or a file.
fn medium(path: &Path, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
    let mapped = fs::metadata(path).is_ok_and(|found| found.file_type().is_char_device());
    Ok(match () {
        () if is_block_device(path) => Arc::new(BlockMedium::open(path, access)?),
        () if mapped => Arc::new(DaxMedium::open(path, access)?),
        () => Arc::new(FileMedium::open(path, access)?),
    })
}

fn open(path: &Path, access: Access) -> Result<Pool, KeeperError> {
    let medium = medium(path, access).map_err(|error| told(error.into()))?;
    Pool::open(medium, access).map_err(told)
}

fn create(args: &CreateArgs, json: bool) -> Result<u8, KeeperError> {
    let (path, shown) = (&args.pool, args.pool.display());
    let id = id()?;
    let fresh = !path.exists();
    let medium: Arc<dyn Medium> = match (fresh, args.size) {
        (true, None) => {
            let what = format!("{shown} does not exist: give --size to make a file of it");
            return Err(KeeperError::Usage(what));
        }
        (true, Some(size)) => {
            let made = FileMedium::create(path);
            let made = made.and_then(|file| file.reserve(size - size % PAGE).map(|()| file));
            Arc::new(made.map_err(|error| undo(path, told(error.into())))?)
        }
        (false, Some(_)) => {
            let what = format!("{shown} exists and has a size of its own: leave out --size");
            return Err(KeeperError::Usage(what));
        }
        (false, None) => medium(path, Access::Write).map_err(|error| told(error.into()))?,
    };
    let made = medium
        .geometry()
        .map_err(Error::from)
        .and_then(|geometry| Pool::create(medium, Shape::of(geometry.len), id, fresh, args.force));
    let pool = made.map_err(|error| match fresh {
        true => undo(path, told(error)),
        false => told(error),
    })?;
    let bytes = pool.ledger().space().len * PAGE;
    if json {
        out::json(&json!({ "pool": shown.to_string(), "id": hex(pool.id()), "bytes": bytes }));
    } else {
        out::line(&format!("{shown}: {} to give out", out::bytes(bytes)));
    }
    Ok(0)
}

/// Removes a file that did not become a pool.
fn undo(path: &Path, error: KeeperError) -> KeeperError {
    // Where it was never made, or cannot be removed, the first error says enough.
    let taken =
        matches!(&error, KeeperError::Told { message, .. } if message.contains("File exists"));
    if !taken {
        let _ = fs::remove_file(path);
    }
    error
}

/// The identity of a new pool: files of owners name it, so no two pools may have the same one.
fn id() -> Result<[u8; 16], KeeperError> {
    let path = "/proc/sys/kernel/random/uuid";
    let text = fs::read_to_string(path).map_err(KeeperError::io(format!("read {path}")))?;
    uuid(&text).ok_or_else(|| KeeperError::Told {
        message: format!("{path} has no UUID: a pool needs one as its identity"),
        exit: 1,
    })
}

/// The bytes of a UUID as the kernel writes it.
fn uuid(text: &str) -> Option<[u8; 16]> {
    let digits = text.trim().replace('-', "");
    let number = u128::from_str_radix(&digits, 16).ok();
    let number = number.filter(|number| digits.len() == 32 && *number != 0);
    number.map(u128::to_be_bytes)
}

fn hex(id: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(id))
}

/// Whole pages.
fn pages(what: &str, bytes: u64) -> Result<u64, KeeperError> {
    if bytes.is_multiple_of(PAGE) {
        return Ok(bytes / PAGE);
    }
    let text = format!("--{what} {bytes} is no multiple of 4096 bytes; write it as 64MiB");
    Err(KeeperError::Usage(text))
}

fn allocate(args: &AllocateArgs, json: bool) -> Result<u8, KeeperError> {
    let file = match &args.file {
        None => None,
        Some(file) => {
            let absolute = std::path::absolute(file);
            let absolute = absolute.map_err(KeeperError::io(format!("find {}", file.display())))?;
            let text = absolute.to_str().map(str::to_owned);
            let what = format!("{} is no UTF-8 and cannot be noted", file.display());
            Some(text.ok_or(KeeperError::Usage(what))?)
        }
    };
    let optional = |what: &str, bytes: Option<u64>| bytes.map(|b| pages(what, b)).transpose();
    let request = Request {
        owner: args.owner.clone(),
        pages: pages("size", args.size)?,
        thin: args.thin,
        below: optional("below", args.below)?,
        quota: optional("quota", args.quota)?,
        file,
    };
    let pool = open(&args.pool, Access::Write)?;
    let id = pool.allocate(&request).map_err(told)?;
    let ledger = pool.ledger();
    let extent = ledger
        .extent(id)
        .map_err(|error: Refused| told(error.into()))?;
    if json {
        out::json(&show::extent(extent));
    } else {
        let how = match extent.pieces.len() {
            0 => "promised".to_owned(),
            1 => "in one piece".to_owned(),
            n => format!("in {n} pieces"),
        };
        let size = out::bytes(extent.pages * PAGE);
        out::line(&format!("extent {id} of {}: {size}, {how}", extent.owner));
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_sixteen_bytes() {
        let text = "00112233-4455-6677-8899-aabbccddeeff\n";
        let expected = "00112233445566778899aabbccddeeff";
        assert_eq!(uuid(text).map(hex), Some(expected.to_owned()));
        let zeros = "00000000-0000-0000-0000-000000000000";
        for none in ["", "nothing", "0011", zeros] {
            assert_eq!(uuid(none), None, "{none}");
        }
    }
}
